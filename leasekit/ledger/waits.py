"""`tenant.ledger.waits`: what runs wait for, claimed for a time and completed once.

Source: spec/reliability 5.1-5.3, 5.8.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from leasekit import codec
from leasekit.ledger import waiting
from leasekit.ledger.filing import DUE, ENDED, WAITS, check_scope, due_of, word
from leasekit.ledger.records import Wait
from leasekit.ledger.store import Store, Transaction
from leasekit.ledger.waiting import WebhookEvent

__all__ = ["Waits", "in_order", "read", "write_wait"]

PRUNE_ROWS = 100

Result = TypeVar("Result")
Step = Callable[[Wait, int], Wait | None]


class Waits:
    """Every step gives the wait as it is afterwards, or None where it is refused.

    Waits are known by run and id. Those that go on stand in a list by when they are due, those that are
    over in one by when they ended: no step looks at more than these.
    """

    __slots__ = ("_store",)

    def __init__(self, store: Store) -> None:
        self._store = store

    async def upsert(self, wait: Wait, *, now_ms: int | None = None) -> Wait:
        """Write a wait; gives it as it is kept: a terminal one stays as it is, but an approval that was
        given up on may still be woken or cancelled."""
        waiting.check(wait)
        check_scope(self._store.scope, wait)

        async def write(transaction: Transaction) -> Wait:
            stored = await read(transaction, wait.run_id, wait.wait_id)
            kept = waiting.replaced(stored, wait)
            if kept is not stored:
                write_wait(transaction, kept)
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
        """Waits in the order in which they are due, those that never are at the end; then by creation
        and id. limit: None or 0 = all. Reads, 1 000 at a time, until it has so many, and on to the end
        of those that are due at the same instant as the last."""
        found: list[Wait] = []
        async for page in self._pages(
            WAITS.list_of(run_id), kind=kind, status=status, now_ms=now_ms
        ):
            # Lists know runs by their normalised names; a wait belongs to one run alone.
            found += [wait for wait in page if run_id is None or wait.run_id == run_id]
            if limit and len(found) >= limit and due_of(found[limit - 1]) < due_of(found[-1]):
                break
        return in_order(found)[: limit or None]

    async def due(self, *, limit: int = 100, now_ms: int | None = None) -> Sequence[Wait]:
        """Waits that are due and that nobody works on, in order. limit: 1..1 000. Reads only what is
        due; where more than 1 000 fell due at one instant, those of them that were read first."""
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        now = await self._store.now_ms(now_ms)
        found: list[Wait] = []
        async for page in self.due_pages(now, now_ms=now_ms):
            found += [wait for wait in page if waiting.is_claimable(wait, now)]
            if len(found) >= limit:
                break
        return in_order(found)[:limit]

    def due_pages(
        self, upto_ms: int, *, now_ms: int | None = None
    ) -> AsyncIterator[Sequence[Wait]]:
        """Waits that go on and are due at an instant, claimed ones too, at most 1 000 a page."""
        return self._pages(DUE, upto=upto_ms, now_ms=now_ms)

    async def _pages(
        self,
        listed: str,
        *,
        kind: str | None = None,
        status: str | None = None,
        upto: int | None = None,
        now_ms: int | None,
    ) -> AsyncIterator[Sequence[Wait]]:
        after: str | None = ""
        while after is not None:
            page, after = await self._store.page(
                WAITS.name,
                listed,
                limit=codec.BATCH_MAX,
                after=after,
                newest=False,
                upto=upto,
                statuses=() if status is None else (word(status),),
                source="" if kind is None else word(kind),
                now_ms=now_ms,
            )
            yield [WAITS.decode(one.doc) for one in page]

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
        _check_lease(lease_ms)

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
        """Take the first webhook wait that the event is meant for, in the order of `list`. Reads all
        webhook waits that go on."""
        codec.check_text(claimant, "claimant")
        _check_lease(lease_ms)
        now = await self._store.now_ms(now_ms)
        meant: list[Wait] = []
        async for page in self._pages(DUE, kind="webhook", now_ms=now_ms):
            meant += [
                wait
                for wait in page
                if waiting.is_claimable(wait, now) and waiting.matches(wait, event)
            ]

        def step(wait: Wait, now: int) -> Wait | None:
            if not waiting.is_claimable(wait, now) or not waiting.matches(wait, event):
                return None
            return waiting.claim(wait, claimant, now, lease_ms)

        return await self._first(meant, step, now_ms)

    async def claim_for_resolution(
        self,
        wait_id: str,
        kind: str,
        *,
        run_id: str | None = None,
        claimant: str,
        lease_ms: int,
        now_ms: int | None = None,
    ) -> Wait | None:
        """Take a wait of a kind, due or not, to say that what it waited for has happened. Without a run
        it is the first of that id, and all waits of the kind that go on are read."""
        codec.check_text(claimant, "claimant")
        codec.check_text(wait_id, "wait_id")
        _check_lease(lease_ms)

        def step(wait: Wait, now: int) -> Wait | None:
            if wait.wait_kind != kind or not waiting.is_claimable(wait, now):
                return None
            return waiting.claim(wait, claimant, now, lease_ms)

        if run_id is not None:
            return await self._step(run_id, wait_id, step, now_ms)
        named: list[Wait] = []
        async for page in self._pages(DUE, kind=kind, now_ms=now_ms):
            named += [wait for wait in page if wait.wait_id == wait_id]
        return await self._first(named, step, now_ms)

    async def _first(self, waits: Sequence[Wait], step: Step, now_ms: int | None) -> Wait | None:
        """The first in order with which the step is possible."""
        for wait in in_order(waits):
            after = await self._step(wait.run_id, wait.wait_id, step, now_ms)
            if after is not None:
                return after
        return None

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
        """Delete terminal waits that ended more than `retention_ms` ago; gives how many. 0 = off. Reads
        no others, 100 at a time."""
        codec.check_whole(retention_ms, "retention_ms", 0, codec.DURATION_MS_MAX)
        if retention_ms == 0:
            return 0
        cutoff = await self._store.now_ms(now_ms) - retention_ms
        deleted = 0
        after: str | None = "" if cutoff > 0 else None
        while after is not None:
            page, after = await self._store.page(
                WAITS.name,
                ENDED,
                limit=PRUNE_ROWS,
                after=after,
                newest=False,
                upto=cutoff - 1,
                now_ms=now_ms,
            )
            deleted += await self._delete([one.name for one in page], cutoff, now_ms)
        return deleted

    async def _delete(self, names: Sequence[str], cutoff: int, now_ms: int | None) -> int:
        """Delete those that are still over, and have been for as long."""

        async def delete(transaction: Transaction) -> int:
            docs = await asyncio.gather(*(transaction.get(name) for name in names))
            deleted = 0
            for name, doc in zip(names, docs, strict=True):
                if doc is not None and waiting.ended_before(WAITS.decode(doc), cutoff):
                    transaction.drop(name)
                    deleted += 1
            return deleted

        return await self._store.transact(delete, now_ms=now_ms)

    async def transact(
        self, decide: Callable[[Transaction], Awaitable[Result]], *, now_ms: int | None = None
    ) -> Result:
        """A change of a wait and of other records, which lands whole or not at all: see
        `Store.transact`, and `read` and `write_wait` here."""
        return await self._store.transact(decide, now_ms=now_ms)

    async def _step(self, run_id: str, wait_id: str, step: Step, now_ms: int | None) -> Wait | None:
        """One step of one wait, on what is stored at that moment."""
        codec.check_text(run_id, "run_id")
        codec.check_text(wait_id, "wait_id")

        async def change(transaction: Transaction) -> Wait | None:
            wait = await read(transaction, run_id, wait_id)
            after = None if wait is None else step(wait, transaction.now_ms)
            if after is not None and after is not wait:
                write_wait(transaction, after)
            return after

        return await self._store.transact(change, now_ms=now_ms)


async def read(transaction: Transaction, run_id: str, wait_id: str) -> Wait | None:
    """A wait, which then must not change until the commit."""
    doc = await transaction.get(WAITS.name_of(run_id, wait_id))
    return None if doc is None else WAITS.decode(doc)


def write_wait(transaction: Transaction, wait: Wait) -> None:
    """Write a wait that was read in this transaction."""
    transaction.put(WAITS.name_for(wait), WAITS.listed(wait), WAITS.encode(wait))


def in_order(waits: Sequence[Wait]) -> list[Wait]:
    """By due time, then by creation, then by id (spec 5.1)."""
    return sorted(waits, key=lambda wait: (due_of(wait), wait.created_at_ms, wait.wait_id))


def _check_lease(lease_ms: int) -> None:
    # 0 is taken for 1 (spec 5.3).
    codec.check_whole(lease_ms, "lease_ms", 0, codec.LEASE_MS_MAX)
