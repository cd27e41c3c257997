"""`tenant.ledger.waits`: what runs wait for, claimed for a time and completed once.

Source: spec/reliability 5.1-5.3, 5.8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from leasekit import codec
from leasekit.errors import InvalidInput
from leasekit.ledger import waiting
from leasekit.ledger.filing import DUE, WAITS, due_of, word
from leasekit.ledger.records import Wait
from leasekit.ledger.store import Store, Transaction
from leasekit.ledger.waiting import WebhookEvent

__all__ = ["Waits"]

Step = Callable[[Wait, int], Wait | None]


class Waits:
    """Every step gives the wait as it is afterwards, or None where it is refused."""

    __slots__ = ("_store",)

    def __init__(self, store: Store) -> None:
        self._store = store

    async def upsert(self, wait: Wait, *, now_ms: int | None = None) -> Wait:
        """Write a wait; a terminal one stays as it is, and is what is given back."""
        _check(wait)

        async def write(transaction: Transaction) -> Wait:
            stored = await self._read(transaction, wait.run_id, wait.wait_id)
            kept = waiting.replaced(stored, wait)
            if kept is not stored:
                self._write(transaction, kept)
            return kept

        return await self._store.transact(write, now_ms=now_ms)

    async def get(self, run_id: str, wait_id: str, *, now_ms: int | None = None) -> Wait | None:
        """A wait of a run; None if there is none."""
        [found] = await self._store.get([WAITS.name_of(run_id, wait_id)], now_ms=now_ms)
        return None if found is None else WAITS.decode(found.doc)

    async def list(
        self,
        *,
        run_id: str | None = None,
        kind: str | None = None,
        status: str | None = None,
        limit: int | None = None,
        now_ms: int | None = None,
    ) -> list[Wait]:
        """Waits in the order in which they are due, those that never are at the end. limit: None = all."""
        found: list[Wait] = []
        after: str | None = ""
        while after is not None and (limit is None or len(found) < limit):
            page, after = await self._store.page(
                WAITS.name,
                WAITS.list_of(run_id),
                limit=codec.BATCH_MAX,
                after=after,
                newest=False,
                statuses=() if status is None else (word(status),),
                source="" if kind is None else word(kind),
                now_ms=now_ms,
            )
            decoded = [WAITS.decode(one.doc) for one in page]
            found += [wait for wait in decoded if run_id is None or wait.run_id == run_id]
        return _in_order(found)[:limit]

    async def due(self, *, limit: int = 100, now_ms: int | None = None) -> Sequence[Wait]:
        """Waits that are due and that nobody works on, in order. limit: 1..1 000."""
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        now = await self._store.now_ms(now_ms)
        found: list[Wait] = []
        after: str | None = ""
        while after is not None and len(found) < limit:
            page, after = await self._store.page(
                WAITS.name,
                DUE,
                limit=codec.BATCH_MAX,
                after=after,
                newest=False,
                upto=now,
                now_ms=now_ms,
            )
            decoded = [WAITS.decode(one.doc) for one in page]
            found += [wait for wait in decoded if waiting.is_claimable(wait, now)]
        return _in_order(found)[:limit]

    async def claim_due(
        self,
        run_id: str,
        wait_id: str,
        *,
        claimant: str,
        lease_ms: int,
        seen: Wait | None = None,
        due_at_ms: int | None = None,
        now_ms: int | None = None,
    ) -> Wait | None:
        """Take a wait that is due. seen: only if it has not changed since it was read. due_at_ms: the
        instant by which it must be due, where that is not now (a clock that went back)."""
        codec.check_text(claimant, "claimant")

        def step(wait: Wait, now: int) -> Wait | None:
            changed = seen is not None and (wait.created_at_ms, wait.updated_at_ms) != (
                seen.created_at_ms,
                seen.updated_at_ms,
            )
            is_due = waiting.is_due(wait, now if due_at_ms is None else due_at_ms)
            if changed or not is_due or not waiting.is_claimable(wait, now):
                return None
            return waiting.claim(wait, claimant, now, lease_ms)

        return await self._step(run_id, wait_id, step, now_ms)

    async def claim_webhook(
        self, event: WebhookEvent, *, claimant: str, lease_ms: int, now_ms: int | None = None
    ) -> Wait | None:
        """Take the first webhook wait that the event is meant for."""
        codec.check_text(claimant, "claimant")
        now = await self._store.now_ms(now_ms)
        for status in ("waiting", "claimed"):
            for wait in await self.list(kind="webhook", status=status, now_ms=now_ms):
                if waiting.is_claimable(wait, now) and waiting.matches(wait, event):
                    claimed = await self.claim_for_resolution(
                        wait.run_id,
                        wait.wait_id,
                        "webhook",
                        claimant=claimant,
                        lease_ms=lease_ms,
                        now_ms=now_ms,
                    )
                    if claimed is not None:
                        return claimed
        return None

    async def claim_for_resolution(
        self,
        run_id: str,
        wait_id: str,
        kind: str,
        *,
        claimant: str,
        lease_ms: int,
        now_ms: int | None = None,
    ) -> Wait | None:
        """Take a wait of a kind, due or not, to say that what it waited for has happened."""
        codec.check_text(claimant, "claimant")

        def step(wait: Wait, now: int) -> Wait | None:
            if wait.wait_kind != kind or not waiting.is_claimable(wait, now):
                return None
            return waiting.claim(wait, claimant, now, lease_ms)

        return await self._step(run_id, wait_id, step, now_ms)

    async def release(self, claimed: Wait, *, now_ms: int | None = None) -> Wait | None:
        """Give a claimed wait back."""
        return await self._step(
            claimed.run_id,
            claimed.wait_id,
            lambda wait, now: waiting.release(wait, claimed, now),
            now_ms,
        )

    async def begin_completion(
        self,
        claimed: Wait,
        key: str,
        *,
        timeout_status: str | None = None,
        now_ms: int | None = None,
    ) -> Wait | None:
        """Say that a claimed wait is about to be completed under a key. The same key again gets what it
        led to; another one None."""
        codec.check_text(key, "key")
        return await self._step(
            claimed.run_id,
            claimed.wait_id,
            lambda wait, now: waiting.begin_completion(
                wait, claimed, key, now, timeout_status=timeout_status
            ),
            now_ms,
        )

    async def finish_completion(
        self, claimed: Wait, key: str, *, seq: int, status: str, now_ms: int | None = None
    ) -> Wait | None:
        """Complete what was begun: woken, timed_out, escalated or cancelled."""
        return await self._step(
            claimed.run_id,
            claimed.wait_id,
            lambda wait, now: waiting.finish_completion(wait, claimed, key, seq, status, now),
            now_ms,
        )

    async def finish_reminder(
        self, claimed: Wait, key: str, *, seq: int, next_at_ms: int, now_ms: int | None = None
    ) -> Wait | None:
        """A reminder was given: wait on until next_at_ms."""
        return await self._step(
            claimed.run_id,
            claimed.wait_id,
            lambda wait, now: waiting.finish_reminder(wait, claimed, key, seq, next_at_ms, now),
            now_ms,
        )

    async def mark_woken(
        self, run_id: str, wait_id: str, key: str, *, seq: int, now_ms: int | None = None
    ) -> Wait | None:
        """Wake a wait that nobody works on, once by its key."""
        codec.check_text(key, "key")
        return await self._step(
            run_id, wait_id, lambda wait, now: waiting.mark_woken(wait, key, seq, now), now_ms
        )

    async def mark_timed_out(
        self,
        run_id: str,
        wait_id: str,
        key: str,
        *,
        seq: int,
        status: str,
        now_ms: int | None = None,
    ) -> Wait | None:
        """Give up a wait that nobody works on, once by its key: timed_out, escalated or cancelled."""
        codec.check_text(key, "key")
        return await self._step(
            run_id,
            wait_id,
            lambda wait, now: waiting.mark_timed_out(wait, key, seq, status, now),
            now_ms,
        )

    async def cancel_by_guard(
        self, presented: Wait, reason: str, *, now_ms: int | None = None
    ) -> Wait | None:
        """Cancel a wait whose run's phase does not allow what it would do."""
        return await self._step(
            presented.run_id,
            presented.wait_id,
            lambda wait, now: waiting.cancel_by_guard(wait, presented, reason, now),
            now_ms,
        )

    async def prune(self, *, retention_ms: int, now_ms: int | None = None) -> int:
        """Delete terminal waits that ended more than `retention_ms` ago; gives how many. 0 = off."""
        codec.check_whole(retention_ms, "retention_ms", 0, codec.DURATION_MS_MAX)
        if retention_ms == 0:
            return 0
        cutoff = await self._store.now_ms(now_ms) - retention_ms
        deleted = 0
        for status in sorted(waiting.TERMINAL):
            for seen in await self.list(status=status, now_ms=now_ms):
                deleted += await self._forget(seen, cutoff, now_ms)
        return deleted

    async def _forget(self, seen: Wait, cutoff: int, now_ms: int | None) -> bool:
        async def delete(transaction: Transaction) -> bool:
            wait = await self._read(transaction, seen.run_id, seen.wait_id)
            if wait is None or wait.status not in waiting.TERMINAL:
                return False
            ended = wait.updated_at_ms if wait.completed_at_ms is None else wait.completed_at_ms
            if ended >= cutoff:
                return False
            transaction.drop(WAITS.name_for(wait), WAITS.run_of(wait))
            return True

        return await self._store.transact(delete, now_ms=now_ms)

    async def _step(self, run_id: str, wait_id: str, step: Step, now_ms: int | None) -> Wait | None:
        """One step of one wait, on what is stored at that moment."""
        codec.check_text(run_id, "run_id")
        codec.check_text(wait_id, "wait_id")

        async def change(transaction: Transaction) -> Wait | None:
            wait = await self._read(transaction, run_id, wait_id)
            after = None if wait is None else step(wait, transaction.now_ms)
            if after is not None and after is not wait:
                self._write(transaction, after)
            return after

        return await self._store.transact(change, now_ms=now_ms)

    async def _read(self, transaction: Transaction, run_id: str, wait_id: str) -> Wait | None:
        doc = await transaction.get(WAITS.name_of(run_id, wait_id))
        return None if doc is None else WAITS.decode(doc)

    def _write(self, transaction: Transaction, wait: Wait) -> None:
        transaction.put(WAITS.name_for(wait), WAITS.listed(wait), WAITS.encode(wait))


def _in_order(waits: list[Wait]) -> list[Wait]:
    """By due time, then by creation, then by id (spec 5.1)."""
    return sorted(waits, key=lambda wait: (due_of(wait), wait.created_at_ms, wait.wait_id))


def _check(wait: Wait) -> None:
    if not isinstance(wait, Wait):
        raise InvalidInput(f"wait must be a Wait, not {type(wait).__name__}", field="wait")
    codec.check_text(wait.wait_id, "wait_id")
    codec.check_text(wait.run_id, "run_id")
