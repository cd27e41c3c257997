"""`tenant.views`: what operators and other systems see, as JSON objects of spec/reliability 6.

Everything is read for one tenant alone; a run of another one is not there.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from leasekit import codec
from leasekit.errors import InvalidInput
from leasekit.ledger.ledger import Ledger
from leasekit.ledger.records import (
    AuditEvent,
    Compensation,
    DeadLetter,
    PolicyDecision,
    Run,
    RunEvent,
    operator_principal,
)
from leasekit.model import TenantContext
from leasekit.views.authority import Catalogue
from leasekit.views.observability import mentions, observability
from leasekit.views.pages import COLLECTIONS, LIMIT_DEFAULT, Filters, Reader, clamped
from leasekit.views.reliability import reliability_page
from leasekit.views.resuming import choice_of, resume_plan
from leasekit.views.runs import (
    RunFilters,
    events_page,
    filters_shown,
    run_view,
    shows,
    snapshots_page,
)

__all__ = ["Views"]

OBSERVED_DEFAULT, OBSERVED_MAX = 100, 500
DETAIL_EVENTS, DETAIL_SNAPSHOTS = 50, 10
AUDIT_SCANNED = 10_000


class Views:
    """Bodies of the read models. None = there is no such run, for this tenant."""

    def __init__(
        self, ledger: Ledger, reader: Reader, context: TenantContext, catalogue: Catalogue
    ) -> None:
        self._ledger = ledger
        self._reader = reader
        self._context = context
        self.catalogue = catalogue
        """Units, grants and sources of knowledge that runs are shown with: set it from where they are
        kept."""

    # --- runs -------------------------------------------------------------------------------------

    async def runs(
        self,
        filters: RunFilters | None = None,
        *,
        limit: int | None = None,
        now_ms: int | None = None,
    ) -> dict[str, Any]:
        """The list of runs (spec 6.3), the last changed first."""
        wanted = filters or RunFilters()
        size = clamped(limit)
        now = await self._ledger.now_ms(now_ms)
        found: list[Run] = []
        cursor: str | None = None
        while True:
            page = await self._ledger.runs.list(limit=codec.BATCH_MAX, cursor=cursor, now_ms=now_ms)
            found += [run for run in page.items if shows(run, wanted, self.catalogue, now)]
            if (cursor := page.next_cursor) is None or len(found) > size:
                break
        found.sort(key=lambda run: (-run.updated_at_ms, run.run_id))
        shown = await asyncio.gather(
            *[self._view(run, 1, 1, False, now, now_ms) for run in found[:size]]
        )
        return {
            "runs": list(shown),
            "count": len(shown),
            "limit": size,
            "filters": filters_shown(wanted),
            "source": "stateful_runtime",
        }

    async def run(
        self,
        run_id: str,
        *,
        event_limit: int | None = None,
        snapshot_limit: int | None = None,
        now_ms: int | None = None,
    ) -> dict[str, Any] | None:
        """One run with its last events and snapshots (spec 6.4)."""
        run = await self._ledger.runs.get(run_id, now_ms=now_ms)
        if run is None:
            return None
        now = await self._ledger.now_ms(now_ms)
        events = clamped(event_limit, default=DETAIL_EVENTS)
        snapshots = clamped(snapshot_limit, default=DETAIL_SNAPSHOTS)
        return await self._view(run, events, snapshots, True, now, now_ms)

    async def _view(
        self,
        run: Run,
        event_limit: int,
        snapshot_limit: int,
        is_detail: bool,
        now: int,
        now_ms: int | None,
    ) -> dict[str, Any]:
        ledger, run_id = self._ledger, run.run_id
        waits, events, first, snapshots = await asyncio.gather(
            ledger.waits.list(run_id=run_id, now_ms=now_ms),
            ledger.events.list(run_id, limit=event_limit, tail=True, now_ms=now_ms),
            ledger.events.list(run_id, limit=1, now_ms=now_ms),
            ledger.snapshots.list(run_id, limit=snapshot_limit, now_ms=now_ms),
        )
        return run_view(
            run,
            waits=waits,
            events=events,
            earliest=first.events[0] if first.events else None,
            snapshots=snapshots,
            catalogue=self.catalogue,
            now_ms=now,
            is_detail=is_detail,
        )

    async def events(
        self,
        run_id: str,
        *,
        after_seq: int | None = None,
        before_seq: int | None = None,
        limit: int | None = None,
        tail: int | None = None,
        now_ms: int | None = None,
    ) -> dict[str, Any]:
        """A window of a run's log (spec 6.6): the last `tail` events, or the first `limit`."""
        size = clamped(tail if tail is not None else limit)
        window = await self._ledger.events.list(
            run_id,
            after_seq=after_seq,
            before_seq=before_seq,
            limit=size,
            tail=tail is not None,
            now_ms=now_ms,
        )
        return events_page(run_id, window, size)

    async def snapshots(
        self, run_id: str, *, limit: int | None = None, now_ms: int | None = None
    ) -> dict[str, Any]:
        """The newest snapshots of a run (spec 6.6)."""
        size = clamped(limit)
        found = await self._ledger.snapshots.list(run_id, limit=size, now_ms=now_ms)
        return snapshots_page(run_id, found, size)

    # --- reliability ------------------------------------------------------------------------------

    async def reliability(
        self,
        filters: Filters | None = None,
        *,
        limit: int | None = None,
        after_id: str | None = None,
        after_collection: str | None = None,
        now_ms: int | None = None,
    ) -> dict[str, Any]:
        """One page of each collection of the tenant (spec 6.7)."""
        page = await reliability_page(
            self._reader,
            filters or Filters(),
            limit=limit,
            after_id=after_id,
            after_collection=after_collection,
            now_ms=now_ms,
        )
        return {"source": "stateful_runtime_reliability", **page}

    async def run_reliability(
        self,
        run_id: str,
        filters: Filters | None = None,
        *,
        limit: int | None = None,
        after_id: str | None = None,
        after_collection: str | None = None,
        now_ms: int | None = None,
    ) -> dict[str, Any] | None:
        """The same of one run, with the run."""
        view = await self.run(run_id, now_ms=now_ms)
        if view is None:
            return None
        page = await reliability_page(
            self._reader,
            msgspec.structs.replace(filters or Filters(), run_id=run_id),
            limit=limit,
            after_id=after_id,
            after_collection=after_collection,
            now_ms=now_ms,
        )
        return {"run_id": run_id, "run": view["run"], **page}

    async def observability(
        self,
        run_id: str,
        *,
        event_limit: int | None = None,
        snapshot_limit: int | None = None,
        reliability_limit: int | None = None,
        audit_limit: int | None = None,
        now_ms: int | None = None,
    ) -> dict[str, Any] | None:
        """What blocks a run, and what may be done (spec 6.8)."""
        ledger = self._ledger
        run = await ledger.runs.get(run_id, now_ms=now_ms)
        if run is None:
            return None
        limits = {
            name: clamped(given, default=OBSERVED_DEFAULT, most=OBSERVED_MAX)
            for name, given in (
                ("event_limit", event_limit),
                ("snapshot_limit", snapshot_limit),
                ("reliability_limit", reliability_limit),
                ("audit_limit", audit_limit),
            )
        }
        size = limits["reliability_limit"]
        of_run = Filters(run_id=run_id)
        rows, active, waits, events, snapshots, decisions = await asyncio.gather(
            self._rows(of_run, size, now_ms),
            self._rows(msgspec.structs.replace(of_run, active_only=True), size, now_ms),
            ledger.waits.list(run_id=run_id, limit=size, now_ms=now_ms),
            ledger.events.list(run_id, limit=limits["event_limit"], tail=True, now_ms=now_ms),
            ledger.snapshots.list(run_id, limit=limits["snapshot_limit"], now_ms=now_ms),
            ledger.decisions.of_run(run_id, limit=size, now_ms=now_ms),
        )
        return observability(
            run,
            waits=waits,
            events=events.events,
            snapshots=snapshots,
            rows=rows,
            active=active,
            decisions=decisions,
            audit=await self._audit_of(run_id, decisions, limits["audit_limit"], now_ms),
            limits=limits,
        )

    async def _rows(
        self, filters: Filters, limit: int, now_ms: int | None
    ) -> dict[str, list[dict[str, Any]]]:
        pages = await asyncio.gather(
            *[self._reader.page(name, filters, limit=limit, now_ms=now_ms) for name in COLLECTIONS]
        )
        return dict(zip(COLLECTIONS, pages, strict=True))

    async def _audit_of(
        self,
        run_id: str,
        decisions: list[PolicyDecision],
        limit: int,
        now_ms: int | None,
    ) -> list[AuditEvent]:
        """The last events of the audit chain that name the run or a decision about it, oldest first."""
        wanted = frozenset({run_id, *[decision.decision_id for decision in decisions]})
        found: list[AuditEvent] = []
        cursor: str | None = None
        for _ in range(AUDIT_SCANNED // codec.BATCH_MAX):
            page = await self._ledger.audit.list(
                limit=codec.BATCH_MAX, cursor=cursor, newest=True, now_ms=now_ms
            )
            found += [event for event in page.items if mentions(event.payload, wanted)]
            if (cursor := page.next_cursor) is None or len(found) >= limit:
                break
        return sorted(found[:limit], key=lambda event: (event.created_at_ms, event.event_id))

    # --- resuming ---------------------------------------------------------------------------------

    async def resume_plan(
        self, run_id: str, *, limit: int | None = None, now_ms: int | None = None
    ) -> dict[str, Any] | None:
        """How a run may be resumed (spec 6.9)."""
        run = await self._ledger.runs.get(run_id, now_ms=now_ms)
        if run is None:
            return None
        active = Filters(run_id=run_id, active_only=True)
        rows = await self._rows(active, clamped(limit, default=LIMIT_DEFAULT), now_ms)
        return resume_plan(run, rows, await self._ledger.now_ms(now_ms))

    async def choose(
        self,
        run_id: str,
        choice: str,
        *,
        reason: str | None = None,
        actor_id: str | None = None,
        dead_letter_id: str | None = None,
        compensation_id: str | None = None,
        target_effect_id: str | None = None,
        now_ms: int | None = None,
    ) -> dict[str, Any] | None:
        """Record what an operator chose of the plan (spec 6.10): dead letter, compensation and event.

        Raises InvalidInput for a blank choice, LookupError naming the dead letter or compensation that
        is not there, and Conflict for a step that a compensation may not make.
        """
        ledger = self._ledger
        told = choice_of(choice)
        if told is None:
            raise InvalidInput("choice is required: say what is to be done", field="choice")
        run = await ledger.runs.get(run_id, now_ms=now_ms)
        if run is None:
            return None
        actor = operator_principal(actor_id or self._context.actor_id)
        disposition: dict[str, Any] | None = None
        if dead_letter_id is not None:
            letter = await self._dispose(dead_letter_id, told.disposition, reason, actor, now_ms)
            disposition = {"dead_letter": msgspec.to_builtins(letter)}
        if compensation_id is not None:
            moved: Compensation | None = await ledger.move_compensation(
                compensation_id, told.compensation_status, now_ms=now_ms
            )
            if moved is None:
                raise LookupError(compensation_id)
            disposition = {
                "previous": disposition,
                "compensation": msgspec.to_builtins(moved),
            }
        now = await ledger.now_ms(now_ms)
        event = RunEvent(
            event_id=f"recovery-choice-{run_id}-{now}",
            run_id=run_id,
            event_type="runtime.recovery_choice.recorded",
            occurred_at_ms=now,
            scope=run.scope,
            actor=actor,
            causation_id=dead_letter_id or compensation_id,
            correlation_id=target_effect_id,
            payload={
                "choice": told.name,
                "reason": reason,
                "dead_letter_id": dead_letter_id,
                "compensation_id": compensation_id,
                "target_effect_id": target_effect_id,
                "execution_mode": told.execution_mode,
                "automatic_dispatch": told.automatic_dispatch,
                "disposition": disposition,
            },
        )
        appended = await ledger.events.append(event, now_ms=now_ms)
        return {
            "run_id": run_id,
            "choice": told.name,
            "execution_mode": told.execution_mode,
            "automatic_dispatch": told.automatic_dispatch,
            "recorded": appended.is_new,
            "event_seq": appended.seq,
            "disposition": disposition,
        }

    async def _dispose(
        self,
        dead_letter_id: str,
        disposition: tuple[str, str],
        reason: str | None,
        actor: Any,
        now_ms: int | None,
    ) -> DeadLetter:
        letter = await self._ledger.dispose(
            dead_letter_id, *disposition, reason=reason, actor=actor, now_ms=now_ms
        )
        if letter is None:
            raise LookupError(dead_letter_id)
        return letter
