"""`tenant.ledger.runs`: runs, and who may execute them.

An execution claim has an epoch that only rises: a worker that was overtaken is refused by it.

Source: spec/reliability 5.7, 6.2.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence

import msgspec

from leasekit import codec
from leasekit.ledger import phases
from leasekit.ledger.events import Events
from leasekit.ledger.filing import LATER, LEASED, QUEUED, RUNS, check_scope, retry_after_of, word
from leasekit.ledger.records import ExecutionClaim, Run, RunEvent
from leasekit.ledger.store import Store, Transaction
from leasekit.model import Page
from leasekit.scope import PAGE_LIMIT_DEFAULT, decode_cursor, encode_cursor

__all__ = ["Runs"]

LEASE_MS_DEFAULT = 1_800_000
LEASE_MS_MIN, LEASE_MS_MAX = 5_000, 21_600_000
LIFECYCLE = "stateful_runtime.automation_v2."
CLAIMED, REQUEUED = "run_execution_claimed", "run_execution_claim_expired_requeued"
OWN = frozenset({LIFECYCLE + CLAIMED, LIFECYCLE + REQUEUED})
PAGE_RUNS = 100
WINDOW_EVENTS = 100
EPOCH_MAX = 2**53 - 2
SETTLED = frozenset({"completed", "cancelled", "dry_run", "queued", "running"})


class Runs:
    """Every step gives the run as it is afterwards, or None where it is refused."""

    __slots__ = ("_events", "_store")

    def __init__(self, store: Store, events: Events) -> None:
        self._store = store
        self._events = events

    async def upsert(self, run: Run, *, now_ms: int | None = None) -> Run:
        """Write a run whole, in the place of one with the same id; gives it as it is kept.

        Its phase is made to fit its status. Its execution claim and epoch stay as they are: who writes
        an older copy brings back no claim and lowers no epoch. A run that is not running has no claim.
        """
        codec.check_text(run.run_id, "run_id")
        codec.check_whole(run.created_at_ms, "created_at_ms", 0, codec.INSTANT_MS_MAX)
        codec.check_whole(run.updated_at_ms, "updated_at_ms", 0, codec.INSTANT_MS_MAX)
        codec.check_whole(run.execution_claim_epoch, "execution_claim_epoch", 0, EPOCH_MAX)
        check_scope(self._store.scope, run)
        given = phases.filled(run, run.updated_at_ms)

        async def write(transaction: Transaction) -> Run:
            stored = await self._read(transaction, run.run_id)
            kept = _claim_kept(given, stored)
            self._write(transaction, kept)
            return kept

        return await self._store.transact(write, now_ms=now_ms)

    async def get(self, run_id: str, *, now_ms: int | None = None) -> Run | None:
        """A run by its id; None if there is none."""
        codec.check_text(run_id, "run_id")
        [found] = await self._store.get([RUNS.name_of(run_id)], now_ms=now_ms)
        return None if found is None else RUNS.decode(found.doc)

    async def list(
        self,
        *,
        limit: int = PAGE_LIMIT_DEFAULT,
        cursor: str | None = None,
        now_ms: int | None = None,
    ) -> Page[Run]:
        """A page of runs, the last changed first. limit: 1..1 000."""
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        position = decode_cursor(cursor, (str,))
        found, after = await self._store.page(
            RUNS.name,
            RUNS.name,
            limit=limit,
            after=position[0] if position else "",
            now_ms=now_ms,
        )
        items = [RUNS.decode(one.doc) for one in found]
        return Page(items, None if after is None else encode_cursor(after))

    async def with_status(self, status: str, *, now_ms: int | None = None) -> Sequence[Run]:
        """All runs in a status, the last changed first. Walks all runs, 1 000 a call."""
        phases.check_status(status)
        found: list[Run] = []
        after: str | None = ""
        while after is not None:
            page, after = await self._store.page(
                RUNS.name,
                RUNS.name,
                limit=codec.BATCH_MAX,
                after=after,
                statuses=(word(status),),
                now_ms=now_ms,
            )
            found += [RUNS.decode(one.doc) for one in page]
        return found

    async def set_status(
        self, run_id: str, status: str, *, reason: str | None = None, now_ms: int | None = None
    ) -> Run | None:
        """Bring a run into another status, its phase with it; Conflict where its phase forbids it."""
        codec.check_text(run_id, "run_id")
        phases.check_status(status)

        async def change(transaction: Transaction) -> Run | None:
            run = await self._read(transaction, run_id)
            if run is None:
                return None
            changed = phases.with_status(run, status, transaction.now_ms, reason=reason)
            self._write(transaction, changed)
            return changed

        return await self._store.transact(change, now_ms=now_ms)

    async def claim_next(
        self, *, claimant: str, lease_ms: int = LEASE_MS_DEFAULT, now_ms: int | None = None
    ) -> Run | None:
        """Take the oldest queued run whose pause is over; where there is none, one whose executor has
        vanished is queued again first. lease_ms: brought within 5 s and 6 h. Reads no run that pauses."""
        codec.check_text(claimant, "claimant")
        claimed = await self._claim_queued(claimant, lease_ms, now_ms)
        if claimed is None and await self.reclaim_expired(limit=1, now_ms=now_ms):
            claimed = await self._claim_queued(claimant, lease_ms, now_ms)
        return claimed

    async def _claim_queued(self, claimant: str, lease_ms: int, now_ms: int | None) -> Run | None:
        now = await self._store.now_ms(now_ms)
        rested = [run async for page in self._pages(LATER, now, now_ms) for run in page]
        async for page in self._pages(QUEUED, None, now_ms):
            oldest = page[-1].created_at_ms if page else codec.INSTANT_MS_MAX
            here = [run for run in rested if run.created_at_ms <= oldest]
            rested = [run for run in rested if run.created_at_ms > oldest]
            claimed = await self._claim_one([*here, *page], claimant, lease_ms, now_ms)
            if claimed is not None:
                return claimed
        return await self._claim_one(rested, claimant, lease_ms, now_ms)

    async def _claim_one(
        self, runs: Sequence[Run], claimant: str, lease_ms: int, now_ms: int | None
    ) -> Run | None:
        """The oldest of these that nobody else took meanwhile."""
        for run in sorted(runs, key=lambda run: (run.created_at_ms, run.run_id)):
            claimed = await self.claim(
                run.run_id, claimant=claimant, lease_ms=lease_ms, now_ms=now_ms
            )
            if claimed is not None:
                return claimed
        return None

    async def _pages(
        self, listed: str, upto: int | None, now_ms: int | None
    ) -> AsyncIterator[Sequence[Run]]:
        after: str | None = ""
        while after is not None:
            page, after = await self._store.page(
                RUNS.name,
                listed,
                limit=PAGE_RUNS,
                after=after,
                newest=False,
                upto=upto,
                now_ms=now_ms,
            )
            yield [RUNS.decode(found.doc) for found in page]

    async def claim(
        self,
        run_id: str,
        *,
        claimant: str,
        lease_ms: int = LEASE_MS_DEFAULT,
        now_ms: int | None = None,
    ) -> Run | None:
        """Take a queued run whose pause is over, under an epoch above all before; None for any other."""
        codec.check_text(run_id, "run_id")
        codec.check_text(claimant, "claimant")
        codec.check_whole(lease_ms, "lease_ms", 0, codec.DURATION_MS_MAX)
        length = min(max(lease_ms, LEASE_MS_MIN), LEASE_MS_MAX)

        async def take(transaction: Transaction) -> Run | None:
            run, now = await self._read(transaction, run_id), transaction.now_ms
            if run is None or run.status != "queued" or retry_after_of(run) > now:
                return None
            epoch = max(run.execution_claim_epoch + 1, 1)
            claimed = msgspec.structs.replace(
                phases.with_status(run, "running", now),
                execution_claim_epoch=epoch,
                execution_claim=ExecutionClaim(
                    claim_id=f"run-claim-{uuid.uuid4()}",
                    claimant_id=claimant,
                    claimed_at_ms=now,
                    lease_expires_at_ms=now + length,
                    lease_epoch=epoch,
                ),
            )
            self._write(transaction, claimed)
            return claimed

        claimed = await self._store.transact(take, now_ms=now_ms)
        if claimed is not None and claimed.execution_claim is not None:
            await self._note(claimed, CLAIMED, claimed.execution_claim.claim_id, now_ms)
        return claimed

    async def reclaim_expired(
        self, *, limit: int = codec.BATCH_MAX, now_ms: int | None = None
    ) -> Sequence[Run]:
        """Queue again the runs whose executor has vanished: claim over, nobody in session, and nothing
        heard of the run since it was claimed. Gives those runs, at most `limit`. Reads the runs whose
        claim is over, and of each the log since that claim."""
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        now = await self._store.now_ms(now_ms)
        requeued: list[Run] = []
        async for page in self._pages(LEASED, now, now_ms):
            for run in page:
                claim = run.execution_claim
                if claim is None or _sessions(run) or await self._was_heard_of(run, claim, now_ms):
                    continue
                changed = await self._requeue(run.run_id, claim.claim_id, now_ms)
                if changed is None:
                    continue
                await self._note(changed, REQUEUED, claim.claim_id, now_ms)
                requeued.append(changed)
                if len(requeued) >= limit:
                    return requeued
        return requeued

    async def _requeue(self, run_id: str, claim_id: str, now_ms: int | None) -> Run | None:
        async def change(transaction: Transaction) -> Run | None:
            run, now = await self._read(transaction, run_id), transaction.now_ms
            claim = None if run is None else run.execution_claim
            if run is None or claim is None or claim.claim_id != claim_id:
                return None
            if run.status != "running" or claim.lease_expires_at_ms > now or _sessions(run):
                return None
            queued = phases.requeued(run, now, {"resume_reason": "abandoned_execution_claim"})
            self._write(transaction, queued)
            return queued

        return await self._store.transact(change, now_ms=now_ms)

    async def requeue(
        self, run_id: str, reason: str, *, seen: Run | None = None, now_ms: int | None = None
    ) -> Run | None:
        """Put a run back in line that waits, pauses or has failed; one that is over, or in line, stays.
        seen: only if it has not changed since it was read."""
        codec.check_text(run_id, "run_id")

        async def change(transaction: Transaction) -> Run | None:
            run = await self._read(transaction, run_id)
            if run is None or run.status in SETTLED:
                return None
            if seen is not None and (run.status, run.updated_at_ms) != (
                seen.status,
                seen.updated_at_ms,
            ):
                return None
            queued = phases.requeued(run, transaction.now_ms, {"resume_reason": reason})
            self._write(transaction, queued)
            return queued

        return await self._store.transact(change, now_ms=now_ms)

    async def retry_later(
        self, run_id: str, *, epoch: int, retry_after_ms: int, now_ms: int | None = None
    ) -> Run | None:
        """A worker queues its run again, not before an instant; None where it was overtaken: the run is
        not running any more, or under another epoch."""
        codec.check_text(run_id, "run_id")
        codec.check_whole(epoch, "epoch", 0, EPOCH_MAX)
        codec.check_whole(retry_after_ms, "retry_after_ms", 0, codec.INSTANT_MS_MAX)

        async def change(transaction: Transaction) -> Run | None:
            run, now = await self._read(transaction, run_id), transaction.now_ms
            if run is None or run.status != "running" or run.execution_claim_epoch != epoch:
                return None
            pause = {"queue_reason": "retry_backoff", "retry_after_ms": retry_after_ms}
            queued = phases.requeued(run, now, {"scheduler": pause})
            self._write(transaction, queued)
            return queued

        return await self._store.transact(change, now_ms=now_ms)

    async def _was_heard_of(self, run: Run, claim: ExecutionClaim, now_ms: int | None) -> bool:
        """Whether the run's log says that somebody has worked on it since it was claimed; read from its
        end back to where the claim was noted."""
        before: int | None = None
        while True:
            window = await self._events.list(
                run.run_id, before_seq=before, limit=WINDOW_EVENTS, tail=True, now_ms=now_ms
            )
            for event in window.events:
                is_news = event.event_type.startswith(LIFECYCLE) and event.event_type not in OWN
                if is_news and event.occurred_at_ms >= claim.claimed_at_ms:
                    return True
            start = f"{CLAIMED}:{claim.claim_id}"
            if not window.more or any(event.event_id == start for event in window.events):
                return False
            before = window.events[0].seq

    async def _note(self, run: Run, what: str, claim_id: str, now_ms: int | None) -> None:
        await self._events.append(
            RunEvent(
                event_id=f"{what}:{claim_id}",
                run_id=run.run_id,
                event_type=LIFECYCLE + what,
                occurred_at_ms=run.updated_at_ms,
                scope=run.scope,
                payload={"claim_id": claim_id, "lease_epoch": run.execution_claim_epoch},
            ),
            now_ms=now_ms,
        )

    async def _read(self, transaction: Transaction, run_id: str) -> Run | None:
        doc = await transaction.get(RUNS.name_of(run_id))
        return None if doc is None else RUNS.decode(doc)

    def _write(self, transaction: Transaction, run: Run) -> None:
        transaction.put(RUNS.name_for(run), RUNS.listed(run), RUNS.encode(run))


def _claim_kept(given: Run, stored: Run | None) -> Run:
    """The given run with the execution claim and the epoch that are newer: its own, or the stored."""
    newer = given
    if stored is not None and stored.execution_claim_epoch >= given.execution_claim_epoch:
        newer = stored
    return msgspec.structs.replace(
        given,
        execution_claim_epoch=newer.execution_claim_epoch,
        execution_claim=newer.execution_claim if given.status == "running" else None,
    )


def _sessions(run: Run) -> bool:
    """Whether somebody is in session with a run."""
    active = run.metadata.get("active_session_ids") if isinstance(run.metadata, Mapping) else None
    return bool(active) or bool(run.related_context_run_ids)
