"""`tenant.views`: what operators and other systems see, as JSON objects of spec/reliability 6.

Everything is read for one tenant alone; a run of another one is not there. Lists are read in the order
of their indexes, at most 1 000 records a call of the server; each view says how many it reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from leasekit import codec
from leasekit.ledger import recovery
from leasekit.ledger.audit import HEAD, record_hash
from leasekit.ledger.filing import (
    AUDIT,
    COMPENSATIONS,
    DEAD_LETTERS,
    RUNS,
    WAITS,
    due_of,
    is_off,
    word,
)
from leasekit.ledger.ledger import Ledger, get, put
from leasekit.ledger.records import (
    AuditEvent,
    PolicyDecision,
    PrincipalRef,
    Run,
    RunEvent,
    StatefulRuntimeScope,
    Wait,
    operator_principal,
)
from leasekit.ledger.store import RECORD_ID_BYTES_MAX, Transaction
from leasekit.model import TenantContext
from leasekit.views.authority import Catalogue, check_authority
from leasekit.views.observability import mentions, observability
from leasekit.views.pages import COLLECTIONS, Filters, Reader, clamped
from leasekit.views.reliability import reliability_page
from leasekit.views.resuming import Choice, Missing, resume_plan
from leasekit.views.runs import (
    RunFilters,
    events_page,
    filters_shown,
    run_fields,
    run_view,
    shows,
    snapshots_page,
)

__all__ = ["CatalogueOf", "Views"]

OBSERVED_DEFAULT, OBSERVED_MAX = 100, 500
DETAIL_EVENTS, DETAIL_SNAPSHOTS = 50, 10
AUDIT_SCANNED = 10_000
WAIT_ROWS = 100
VIEWS_AT_A_TIME = 50
GOING_ON = ("waiting", "claimed")
RECOVERABLE = ("dead_letters", "compensations")

CatalogueOf = Callable[[TenantContext], Catalogue]
"""What gives the catalogue that a tenant's runs are shown with, asked at each read."""


class Views:
    """Bodies of the read models. None = there is no such run, for this tenant.

    Limits outside their range are brought within it. A record's `updated_at_ms` orders the lists, the
    last changed first; records of one instant, by their ids backwards.
    """

    __slots__ = ("_catalogue_of", "_context", "_ledger", "_reader")

    def __init__(
        self,
        ledger: Ledger,
        reader: Reader,
        context: TenantContext,
        catalogue: Catalogue | CatalogueOf,
    ) -> None:
        """catalogue: units, grants and sources, also of other tenants: each run is shown with those of
        its own tenant alone."""
        self._ledger = ledger
        self._reader = reader
        self._context = context
        self._catalogue_of = catalogue if callable(catalogue) else lambda context: catalogue

    @property
    def catalogue(self) -> Catalogue:
        """Units, grants and sources of knowledge that runs are shown with."""
        return self._catalogue_of(self._context)

    # --- runs -------------------------------------------------------------------------------------

    async def runs(
        self,
        filters: RunFilters | None = None,
        *,
        limit: int | None = None,
        now_ms: int | None = None,
    ) -> dict[str, Any]:
        """The list of runs (spec 6.3), the last changed first. limit: 250; 1..1 000.

        Reads about as many runs as are wanted; with filters, all runs until so many fit. The status is
        compared by the server, all others here. Of each run shown, what `run` reads.
        """
        wanted = filters or RunFilters()
        wanted.check()
        size, catalogue = clamped(limit), self.catalogue
        now = await self._ledger.now_ms(now_ms)
        found = await self._fitting(wanted, size, catalogue, now, now_ms)
        shown: list[dict[str, Any]] = []
        for start in range(0, len(found), VIEWS_AT_A_TIME):
            shown += await asyncio.gather(
                *[
                    self._view(run, catalogue, now, now_ms)
                    for run in found[start : start + VIEWS_AT_A_TIME]
                ]
            )
        return {
            "runs": shown,
            "count": len(shown),
            "limit": size,
            "filters": filters_shown(wanted),
            "source": "stateful_runtime",
        }

    async def _fitting(
        self,
        wanted: RunFilters,
        size: int,
        catalogue: Catalogue,
        now: int,
        now_ms: int | None,
    ) -> list[Run]:
        """The first runs that the filters let through, by last change and, within an instant, by id."""
        is_filtered = any(not is_off(text) for text in filters_shown(wanted).values())
        found: list[Run] = []
        after: str | None = ""
        while after is not None:
            page, after = await self._reader.store.page(
                RUNS.name,
                RUNS.name,
                limit=codec.BATCH_MAX if is_filtered else size,
                after=after,
                statuses=() if is_off(wanted.status) else (word(wanted.status),),
                now_ms=now_ms,
            )
            runs = [RUNS.decode(one.doc) for one in page]
            found += [run for run in runs if shows(run, wanted, catalogue, now)]
            # Those of the last instant are all needed: the list has them in another order.
            if len(found) >= size and after and _instant(after) < found[size - 1].updated_at_ms:
                break
        return sorted(found, key=lambda run: (-run.updated_at_ms, run.run_id))[:size]

    async def run(
        self,
        run_id: str,
        *,
        event_limit: int | None = None,
        snapshot_limit: int | None = None,
        now_ms: int | None = None,
    ) -> dict[str, Any] | None:
        """One run with its last events and snapshots (spec 6.4). Limits: 50 and 10; 1..1 000.

        Reads these, the first event, and waits of the run: to the first that goes on, 100 at a time.
        """
        run = await self._ledger.runs.get(run_id, now_ms=now_ms)
        if run is None:
            return None
        limits = (
            clamped(event_limit, default=DETAIL_EVENTS),
            clamped(snapshot_limit, default=DETAIL_SNAPSHOTS),
        )
        now = await self._ledger.now_ms(now_ms)
        return await self._view(run, self.catalogue, now, now_ms, limits=limits)

    async def _view(
        self,
        run: Run,
        catalogue: Catalogue,
        now: int,
        now_ms: int | None,
        *,
        limits: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """A run as a list shows it, or with as many events and snapshots."""
        ledger, run_id = self._ledger, run.run_id
        events_max, snapshots_max = limits or (1, 1)
        wait, events, first, snapshots = await asyncio.gather(
            self._current_wait(run_id, now_ms),
            self._events(run_id, events_max, tail=True, now_ms=now_ms),
            self._events(run_id, 1, now_ms=now_ms),
            ledger.snapshots.list(run_id, limit=snapshots_max, now_ms=now_ms),
        )
        return run_view(
            run,
            wait=wait,
            events=events,
            earliest=first[0] if first else None,
            snapshots=snapshots,
            catalogue=catalogue,
            now_ms=now,
            is_detail=limits is not None,
        )

    async def _current_wait(self, run_id: str, now_ms: int | None) -> Wait | None:
        """The first wait that is not over, in due order; else the last one; None where there is none."""
        first = await self._waits_at_end(run_id, GOING_ON, False, now_ms)
        if first:
            return first[0]
        last = await self._waits_at_end(run_id, (), True, now_ms)
        return last[-1] if last else None

    async def _waits_at_end(
        self, run_id: str, statuses: Sequence[str], newest: bool, now_ms: int | None
    ) -> list[Wait]:
        """The waits of a run that are due first, or last, all of one instant, by creation and id."""
        found: list[Wait] = []
        after: str | None = ""
        while after is not None:
            page, after = await self._reader.store.page(
                WAITS.name,
                WAITS.list_of(run_id),
                limit=WAIT_ROWS,
                after=after,
                newest=newest,
                statuses=statuses,
                now_ms=now_ms,
            )
            # Lists know runs by their normalised names; a wait is of one run exactly.
            decoded = [WAITS.decode(one.doc) for one in page]
            found += [wait for wait in decoded if wait.run_id == run_id]
            if found and after and _instant(after) != due_of(found[0]):
                break
        tied = [wait for wait in found if due_of(wait) == due_of(found[0])]
        return sorted(tied, key=lambda wait: (wait.created_at_ms, wait.wait_id))

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
        """A window of a run's log (spec 6.6): the last `tail` events, or the first `limit` (250;
        1..1 000); both bounds exclusive. Of a run that is not there: none. Reads no others."""
        size = clamped(tail if tail is not None else limit)
        events = await self._events(
            run_id,
            size,
            after_seq=after_seq,
            before_seq=before_seq,
            tail=tail is not None,
            now_ms=now_ms,
        )
        return events_page(run_id, events, size)

    async def _events(
        self,
        run_id: str,
        size: int,
        *,
        after_seq: int | None = None,
        before_seq: int | None = None,
        tail: bool = False,
        now_ms: int | None,
    ) -> list[RunEvent]:
        """A whole window, also where the log gives it in pieces because its events are large."""
        found: list[RunEvent] = []
        while True:
            window = await self._ledger.events.list(
                run_id,
                after_seq=after_seq,
                before_seq=before_seq,
                limit=size - len(found),
                tail=tail,
                now_ms=now_ms,
            )
            found = [*window.events, *found] if tail else [*found, *window.events]
            if not window.more or len(found) >= size:
                return found
            if tail:
                before_seq = found[0].seq
            else:
                after_seq = found[-1].seq

    async def snapshots(
        self, run_id: str, *, limit: int | None = None, now_ms: int | None = None
    ) -> dict[str, Any]:
        """The newest snapshots of a run (spec 6.6), in ascending order. limit: 250; 1..1 000. Of a run
        that is not there: none. Reads no others."""
        size = clamped(limit)
        found = await self._ledger.snapshots.list(run_id, limit=size, now_ms=now_ms)
        return snapshots_page(run_id, found, size)

    async def snapshot(
        self, run_id: str, snapshot_id: str, *, now_ms: int | None = None
    ) -> dict[str, Any] | None:
        """One snapshot of a run (spec 6.6); None if there is none of that run and id."""
        found = await self._ledger.snapshots.get(run_id, snapshot_id, now_ms=now_ms)
        return None if found is None else {"snapshot": msgspec.to_builtins(found)}

    def check_authority(self, scope: StatefulRuntimeScope, now_ms: int) -> None:
        """Whether a run may be made with this scope (spec 6.5): InvalidInput, naming the grant, where one
        that it declares does not allow it, or another one denies it. Nothing is read."""
        check_authority(scope, self.catalogue, now_ms)

    # --- reliability ------------------------------------------------------------------------------

    async def reliability(
        self,
        filters: Filters | None = None,
        *,
        limit: int | None = None,
        after_id: str | None = None,
        after_collection: str | None = None,
        after_scan: bool = False,
        now_ms: int | None = None,
    ) -> dict[str, Any]:
        """One page of each collection of the tenant (spec 6.7). limit: 250; 1..1 000, of each.

        after_id, after_collection, after_scan: from `pagination.next` of the page before. Reads as many
        records as are wanted, of the run that is asked for where one is; other filters look at all
        records in turn, at most 100 times 1 000 of a collection. A page that ends there is short, and
        has a cursor all the same.
        """
        page = await reliability_page(
            self._reader,
            filters or Filters(),
            limit=limit,
            after_id=after_id,
            after_collection=after_collection,
            after_scan=after_scan,
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
        after_scan: bool = False,
        now_ms: int | None = None,
    ) -> dict[str, Any] | None:
        """The same of one run, with the run; a `run_id` among the filters does not count."""
        run = await self._ledger.runs.get(run_id, now_ms=now_ms)
        if run is None:
            return None
        newest = await self._ledger.snapshots.list(run_id, limit=1, now_ms=now_ms)
        page = await reliability_page(
            self._reader,
            msgspec.structs.replace(filters or Filters(), run_id=run_id),
            limit=limit,
            after_id=after_id,
            after_collection=after_collection,
            after_scan=after_scan,
            now_ms=now_ms,
        )
        return {"run_id": run_id, "run": run_fields(run, newest), **page}

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
        """What blocks a run, and what may be done (spec 6.8). Limits: 100; 1..500.

        Reads as much of the run as the limits say, of waits, decisions and the four collections each
        `reliability_limit`; and the last 10 000 events of the tenant's audit chain.
        """
        ledger = self._ledger
        limits = {
            name: clamped(given, default=OBSERVED_DEFAULT, most=OBSERVED_MAX)
            for name, given in (
                ("event_limit", event_limit),
                ("snapshot_limit", snapshot_limit),
                ("reliability_limit", reliability_limit),
                ("audit_limit", audit_limit),
            )
        }
        run = await ledger.runs.get(run_id, now_ms=now_ms)
        if run is None:
            return None
        size = limits["reliability_limit"]
        of_run = Filters(run_id=run_id)
        active_only = msgspec.structs.replace(of_run, active_only=True)
        rows, active, waits, events, snapshots, decisions = await asyncio.gather(
            self._rows(COLLECTIONS, of_run, size, now_ms),
            self._rows(RECOVERABLE, active_only, size, now_ms),
            ledger.waits.list(run_id=run_id, limit=size, now_ms=now_ms),
            self._events(run_id, limits["event_limit"], tail=True, now_ms=now_ms),
            ledger.snapshots.list(run_id, limit=limits["snapshot_limit"], now_ms=now_ms),
            ledger.decisions.of_run(run_id, limit=size, now_ms=now_ms),
        )
        return observability(
            run,
            waits=waits,
            events=events,
            snapshots=snapshots,
            rows=rows,
            active=active,
            decisions=decisions,
            audit=await self._audit_of(run_id, decisions, limits["audit_limit"], now_ms),
            limits=limits,
        )

    async def _rows(
        self, collections: Sequence[str], filters: Filters, limit: int, now_ms: int | None
    ) -> dict[str, list[dict[str, Any]]]:
        pages = await asyncio.gather(
            *[self._reader.page(name, filters, limit=limit, now_ms=now_ms) for name in collections]
        )
        return {name: page.rows for name, page in zip(collections, pages, strict=True)}

    async def _audit_of(
        self,
        run_id: str,
        decisions: Sequence[PolicyDecision],
        limit: int,
        now_ms: int | None,
    ) -> list[AuditEvent]:
        """The last events of the audit chain that name the run or a decision about it, oldest first;
        none where the part of the chain that was read does not fit together."""
        wanted = frozenset({run_id, *[decision.decision_id for decision in decisions]})
        # First where the chain ends: what is added while it is read then stands behind.
        [end] = await self._reader.store.get([HEAD], now_ms=now_ms)
        chain: list[AuditEvent] = []
        after: str | None = ""
        while after is not None and len(chain) < AUDIT_SCANNED:
            page, after = await self._reader.store.page(
                AUDIT.name, AUDIT.name, limit=codec.BATCH_MAX, after=after, now_ms=now_ms
            )
            chain += [AUDIT.decode(one.doc) for one in page]
        chain.reverse()
        head = None if end is None else msgspec.json.decode(end.doc)
        if not _fits(chain, head, is_whole=after is None):
            return []
        found = [event for event in chain if mentions(event.payload, wanted)]
        return sorted(found, key=lambda event: (event.created_at_ms, event.event_id))[-limit:]

    # --- resuming ---------------------------------------------------------------------------------

    async def resume_plan(
        self, run_id: str, *, limit: int | None = None, now_ms: int | None = None
    ) -> dict[str, Any] | None:
        """How a run may be resumed (spec 6.9). limit: of each collection, 250; 1..1 000.

        Reads the run's records until so many of a collection are active, at most 100 times 1 000.
        """
        size = clamped(limit)
        run = await self._ledger.runs.get(run_id, now_ms=now_ms)
        if run is None:
            return None
        active = Filters(run_id=run_id, active_only=True)
        rows = await self._rows(COLLECTIONS[1:], active, size, now_ms)
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
        """Record what an operator chose of the plan (spec 6.10): dead letter and compensation change
        together or not at all, then the event is added to the run's log.

        The ids need not be of that run. Raises InvalidInput for a blank choice, Missing for a dead letter
        or compensation that is not there, and Conflict for a step that a compensation may not make:
        nothing was changed. `recorded` is False for the second choice of a run in one millisecond: what
        it asked for is done, but only the first one is in the log.
        """
        told = Choice(codec.check_text(choice, "choice"))
        # All of it must fit into the event, which is added when the records have changed.
        for given, name, most in (
            (reason, "reason", codec.DOCUMENT_BYTES_MAX),
            (actor_id, "actor_id", codec.NAME_BYTES_MAX),
            (dead_letter_id, "dead_letter_id", RECORD_ID_BYTES_MAX),
            (compensation_id, "compensation_id", RECORD_ID_BYTES_MAX),
            (target_effect_id, "target_effect_id", RECORD_ID_BYTES_MAX),
        ):
            if given is not None and given.strip():
                codec.check_text(given, name, bytes_max=most)
        run = await self._ledger.runs.get(run_id, now_ms=now_ms)
        if run is None:
            return None
        dead_letter_id, compensation_id = _said(dead_letter_id), _said(compensation_id)
        actor = operator_principal(_said(actor_id) or self._context.actor_id)
        now, disposition = await self._apply(
            told, dead_letter_id, compensation_id, reason, actor, now_ms
        )
        event = RunEvent(
            event_id=_choice_id(run_id, now),
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
        appended = await self._ledger.events.append(event, now_ms=now_ms)
        return {
            "run_id": run_id,
            "choice": told.name,
            "execution_mode": told.execution_mode,
            "automatic_dispatch": told.automatic_dispatch,
            "recorded": appended.is_new,
            "event_seq": appended.seq,
            "disposition": disposition,
        }

    async def _apply(
        self,
        told: Choice,
        dead_letter_id: str | None,
        compensation_id: str | None,
        reason: str | None,
        actor: PrincipalRef,
        now_ms: int | None,
    ) -> tuple[int, dict[str, Any] | None]:
        """When it was done, and what became of the dead letter and the compensation that are named."""

        async def change(transaction: Transaction) -> tuple[int, dict[str, Any] | None]:
            disposition: dict[str, Any] | None = None
            if dead_letter_id is not None:
                letter = await get(transaction, DEAD_LETTERS, dead_letter_id)
                if letter is None:
                    raise Missing("dead_letter_id", dead_letter_id)
                status, word_of_it = told.disposition
                letter = recovery.disposed(
                    letter,
                    status,
                    word_of_it,
                    reason=reason,
                    actor=actor,
                    now_ms=transaction.now_ms,
                )
                await put(transaction, DEAD_LETTERS, letter)
                disposition = {"dead_letter": msgspec.to_builtins(letter)}
            if compensation_id is not None:
                compensation = await get(transaction, COMPENSATIONS, compensation_id)
                if compensation is None:
                    raise Missing("compensation_id", compensation_id)
                moved = recovery.moved(compensation, told.compensation_status, transaction.now_ms)
                await put(transaction, COMPENSATIONS, moved)
                disposition = {
                    "previous": disposition,
                    "compensation": msgspec.to_builtins(moved),
                }
            return transaction.now_ms, disposition

        return await self._reader.store.transact(change, now_ms=now_ms)


def _said(text: str | None) -> str | None:
    """A text that says something; None for a blank one."""
    return text if text is not None and text.strip() else None


def _instant(after: str) -> int:
    """What the last record looked at is sorted by."""
    return int(after[:16])


def _choice_id(run_id: str, now: int) -> str:
    """The id of a choice's event; that of a run with a very long name has the name's digest."""
    event_id = f"recovery-choice-{run_id}-{now}"
    if len(event_id.encode()) > codec.NAME_BYTES_MAX:
        event_id = f"recovery-choice-{codec.hash_terminated([run_id])}-{now}"
    return event_id


def _fits(chain: Sequence[AuditEvent], head: Mapping[str, Any] | None, *, is_whole: bool) -> bool:
    """Whether the last part of an audit chain is as it was written: each event with its hash and that of
    the one before, up to the chain's end; and from its start, where it is the whole."""
    end = {} if head is None else head
    if not chain:
        return not end
    is_ended = False
    last: AuditEvent | None = None
    for event in chain:
        if event.record_hash != record_hash(event):
            return False
        if last is not None and (event.seq, event.prev_hash) != (last.seq + 1, last.record_hash):
            return False
        if last is None and is_whole and (event.seq, event.prev_hash) != (1, None):
            return False
        is_ended = is_ended or (event.seq, event.record_hash) == (
            end.get("seq"),
            end.get("record_hash"),
        )
        last = event
    return is_ended
