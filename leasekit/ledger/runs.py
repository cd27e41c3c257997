"""`tenant.ledger.runs`: runs, and who may execute them.

An execution claim has an epoch that only rises: a worker that was overtaken is refused by it.

Source: spec/reliability 5.7, 6.2.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from leasekit import codec
from leasekit.ledger import phases
from leasekit.ledger.events import Events
from leasekit.ledger.filing import LEASED, QUEUED, RUNS
from leasekit.ledger.records import ExecutionClaim, Run, RunEvent
from leasekit.ledger.store import Store, Transaction
from leasekit.model import Page
from leasekit.scope import PAGE_LIMIT_DEFAULT, decode_cursor, encode_cursor

__all__ = ["Runs"]

LEASE_MS_DEFAULT = 1_800_000
LEASE_MS_MIN, LEASE_MS_MAX = 5_000, 21_600_000
LIFECYCLE = "stateful_runtime.automation_v2."
CLAIMED, REQUEUED = "run_execution_claimed", "run_execution_claim_expired_requeued"
RECLAIM_ROWS = 100
SETTLED = frozenset({"completed", "cancelled", "dry_run", "queued", "running"})


class Runs:
    """Every step gives the run as it is afterwards, or None where it is refused."""

    __slots__ = ("_events", "_store")

    def __init__(self, store: Store, events: Events) -> None:
        self._store = store
        self._events = events

    async def upsert(self, run: Run, *, now_ms: int | None = None) -> Run:
        """Write a run whole, in the place of one with the same id."""
        codec.check_text(run.run_id, "run_id")

        async def write(transaction: Transaction) -> Run:
            await transaction.get(RUNS.name_for(run))
            self._write(transaction, run)
            return run

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

    async def set_status(
        self, run_id: str, status: str, *, reason: str | None = None, now_ms: int | None = None
    ) -> Run | None:
        """Bring a run into another status, its phase with it; Conflict where its phase forbids it."""

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
        vanished is queued again first. lease_ms: brought within 5 s and 6 h."""
        codec.check_text(claimant, "claimant")
        claimed = await self._claim_queued(claimant, lease_ms, now_ms)
        if claimed is None and await self.reclaim_expired(now_ms=now_ms):
            claimed = await self._claim_queued(claimant, lease_ms, now_ms)
        return claimed

    async def _claim_queued(self, claimant: str, lease_ms: int, now_ms: int | None) -> Run | None:
        after: str | None = ""
        while after is not None:
            page, after = await self._store.page(
                RUNS.name, QUEUED, limit=RECLAIM_ROWS, after=after, newest=False, now_ms=now_ms
            )
            for found in page:
                claimed = await self.claim(
                    RUNS.decode(found.doc).run_id,
                    claimant=claimant,
                    lease_ms=lease_ms,
                    now_ms=now_ms,
                )
                if claimed is not None:
                    return claimed
        return None

    async def claim(
        self,
        run_id: str,
        *,
        claimant: str,
        lease_ms: int = LEASE_MS_DEFAULT,
        now_ms: int | None = None,
    ) -> Run | None:
        """Take a queued run, under an epoch above all before; None for any other."""
        length = min(max(lease_ms, LEASE_MS_MIN), LEASE_MS_MAX)

        async def take(transaction: Transaction) -> Run | None:
            run, now = await self._read(transaction, run_id), transaction.now_ms
            if run is None or run.status != "queued" or _retry_after(run) > now:
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

    async def reclaim_expired(self, *, now_ms: int | None = None) -> Sequence[Run]:
        """Queue again the runs whose executor has vanished: claim over, nobody in session, and nothing
        heard of the run since it was claimed. Gives those runs."""
        now = await self._store.now_ms(now_ms)
        page, _ = await self._store.page(
            RUNS.name, LEASED, limit=RECLAIM_ROWS, newest=False, upto=now, now_ms=now_ms
        )
        requeued = []
        for found in page:
            run = RUNS.decode(found.doc)
            if run.execution_claim is None or await self._was_heard_of(run, now_ms):
                continue
            changed = await self._requeue(run.run_id, run.execution_claim.claim_id, now_ms)
            if changed is not None:
                await self._note(changed, REQUEUED, run.execution_claim.claim_id, now_ms)
                requeued.append(changed)
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

    async def requeue(self, run_id: str, reason: str, *, now_ms: int | None = None) -> Run | None:
        """Put a run back in line that waits, pauses or has failed; one that is over, or in line, stays."""

        async def change(transaction: Transaction) -> Run | None:
            run = await self._read(transaction, run_id)
            if run is None or run.status in SETTLED:
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

        async def change(transaction: Transaction) -> Run | None:
            run, now = await self._read(transaction, run_id), transaction.now_ms
            if run is None or run.status != "running" or run.execution_claim_epoch != epoch:
                return None
            pause = {"queue_reason": "retry_backoff", "retry_after_ms": retry_after_ms}
            queued = phases.requeued(run, now, {"scheduler": pause})
            self._write(transaction, queued)
            return queued

        return await self._store.transact(change, now_ms=now_ms)

    async def _was_heard_of(self, run: Run, now_ms: int | None) -> bool:
        """Whether the run's log says that somebody has worked on it since it was claimed."""
        claim = run.execution_claim
        window = await self._events.list(run.run_id, limit=RECLAIM_ROWS, tail=True, now_ms=now_ms)
        own = (LIFECYCLE + CLAIMED, LIFECYCLE + REQUEUED)
        return claim is not None and any(
            event.event_type.startswith(LIFECYCLE)
            and event.event_type not in own
            and event.occurred_at_ms >= claim.claimed_at_ms
            for event in window.events
        )

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


def _retry_after(run: Run) -> int:
    """The instant before which a run that is to be tried again stays in line."""
    told: Any = run.metadata.get("scheduler") if isinstance(run.metadata, Mapping) else None
    if not isinstance(told, Mapping) or told.get("queue_reason") != "retry_backoff":
        return 0
    at = told.get("retry_after_ms")
    return at if type(at) is int else 0


def _sessions(run: Run) -> bool:
    """Whether somebody is in session with a run."""
    active = run.metadata.get("active_session_ids") if isinstance(run.metadata, Mapping) else None
    return bool(active) or bool(run.related_context_run_ids)
