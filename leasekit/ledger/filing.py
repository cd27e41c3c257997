"""How each kind of record is named and filed: the one place that knows the lists.

Source: spec/reliability 4.1, 4.11, 5.1, 6.3, 6.12, 7.5; lua/PROTOCOL.md, "Ledger".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from leasekit import codec
from leasekit.keys import encode_word
from leasekit.ledger.records import (
    AuditEvent,
    Compensation,
    DeadLetter,
    PolicyDecision,
    Run,
    RunSnapshot,
    ToolEffect,
    Wait,
)
from leasekit.ledger.recovery import is_superseded
from leasekit.ledger.store import NO_SOURCE, Listed, name_of, place

__all__ = [
    "AUDIT",
    "COMPENSATIONS",
    "DEAD_LETTERS",
    "DECISIONS",
    "EFFECTS",
    "RUNS",
    "SNAPSHOTS",
    "WAITS",
    "Collection",
    "run_word",
    "word",
]

NO_RUN = "~"
NEVER_MS = codec.INSTANT_MS_MAX
# A name behind `~` that is no escape: no run's list can have it.
DUE = "waits:~due"
ENDED = "waits:~ended"
QUEUED = "runs:~queued"
LATER = "runs:~later"
LEASED = "runs:~leased"
TERMINAL_WAITS = frozenset({"woken", "timed_out", "escalated", "cancelled"})
ENDED_COMPENSATIONS = frozenset({"completed", "cancelled"})

Record = TypeVar("Record", bound=msgspec.Struct)


def word(text: str | None) -> str:
    """What pages filter by: normalised (spec 0.2), as one word; `~` for none."""
    return encode_word(codec.normalised(text or "")) or NO_SOURCE


def run_word(run_id: str | None) -> str:
    """A run as pages and guards know it: runs whose names differ in case or `-` are one (spec 4.11)."""
    return word(run_id)


class Collection(Generic[Record]):
    """One kind of record: how it is named, where it stands, how it is read and written."""

    def __init__(
        self,
        name: str,
        kind: type[Record],
        *,
        parts: Callable[[Any], tuple[str, ...]],
        order: Callable[[Any], int],
        status: Callable[[Any], str],
        source: Callable[[Any], str | None] = lambda record: None,
        run: Callable[[Any], str | None] = lambda record: record.run_id,
        is_active: Callable[[Any], bool] = lambda record: True,
        more: Callable[[Any], dict[str, int]] = lambda record: {},
    ) -> None:
        self.name = name
        self._kind = kind
        self._parts = parts
        self._order = order
        self._status = status
        self._source = source
        self._run = run
        self._is_active = is_active
        self._more = more

    def name_of(self, *parts: str) -> str:
        """The stored name of the record with that id; waits and snapshots are named by run and id."""
        return name_of(self.name, *parts)

    def name_for(self, record: Record) -> str:
        return self.name_of(*self._parts(record))

    def list_of(self, run_id: str | None) -> str:
        """The list of all records, or of those of a run."""
        return self.name if run_id is None else f"{self.name}:{run_word(run_id)}"

    def run_of(self, record: Record) -> str:
        return run_word(self._run(record))

    def listed(self, record: Record) -> Listed:
        """The lists a record stands in, and what pages filter it by."""
        run, order = self.run_of(record), self._order(record)
        lists = {self.name: order} | self._more(record)
        if run != NO_RUN:
            lists[f"{self.name}:{run}"] = order
        tail = self.name_for(record).partition("/")[2]
        return Listed(
            places=tuple(place(listed, at, tail) for listed, at in lists.items()),
            created_at_ms=getattr(record, "created_at_ms", 0),
            status=word(self._status(record)),
            run=run,
            source=word(self._source(record)),
            is_active=self._is_active(record),
        )

    def encode(self, record: Record) -> bytes:
        text: bytes = msgspec.json.encode(record)
        return text

    def decode(self, doc: bytes) -> Record:
        return msgspec.json.decode(doc, type=self._kind)


def _updated(record: Any) -> int:
    at: int = record.updated_at_ms
    return at


def _status(record: Any) -> str:
    status: str = record.status
    return status


EFFECTS = Collection(
    "effects",
    ToolEffect,
    parts=lambda record: (record.effect_id,),
    order=_updated,
    status=_status,
    source=lambda record: record.source_kind,
)
DEAD_LETTERS = Collection(
    "dead_letters",
    DeadLetter,
    parts=lambda record: (record.dead_letter_id,),
    order=_updated,
    status=_status,
    source=lambda record: record.source_type,
    is_active=lambda record: not is_superseded(record.metadata),
)
COMPENSATIONS = Collection(
    "compensations",
    Compensation,
    parts=lambda record: (record.compensation_id,),
    order=_updated,
    status=_status,
    is_active=lambda record: (
        record.status not in ENDED_COMPENSATIONS and not is_superseded(record.metadata)
    ),
)


def due_of(wait: Wait) -> int:
    """When a wait is due: the earlier of waking and giving up; never, where it has neither."""
    timeout = wait.timeout_policy.timeout_at_ms if wait.timeout_policy else None
    return min((at for at in (wait.wake_at_ms, timeout) if at is not None), default=NEVER_MS)


def _of_waits(wait: Wait) -> dict[str, int]:
    """Waits that go on, by when they are due, and those that are over, by when they ended."""
    if wait.status in TERMINAL_WAITS:
        ended_at = wait.updated_at_ms if wait.completed_at_ms is None else wait.completed_at_ms
        return {ENDED: ended_at}
    return {DUE: due_of(wait)}


WAITS = Collection(
    "waits",
    Wait,
    parts=lambda record: (record.run_id, record.wait_id),
    order=due_of,
    status=_status,
    source=lambda record: record.wait_kind,
    more=_of_waits,
)


def retry_after_of(run: Run) -> int:
    """The instant before which a run that is to be tried again stays in line (spec 5.7)."""
    told = run.metadata.get("scheduler") if isinstance(run.metadata, Mapping) else None
    if not isinstance(told, Mapping) or told.get("queue_reason") != "retry_backoff":
        return 0
    at = told.get("retry_after_ms")
    return at if type(at) is int and 0 <= at <= NEVER_MS else 0


def _of_runs(run: Run) -> dict[str, int]:
    """Runs in line in the order of their making, those that pause first, those whose claim ends."""
    if run.status == "queued":
        after_ms = retry_after_of(run)
        return {LATER: after_ms} if after_ms else {QUEUED: run.created_at_ms}
    if run.execution_claim is not None:
        return {LEASED: run.execution_claim.lease_expires_at_ms}
    return {}


RUNS = Collection(
    "runs",
    Run,
    parts=lambda record: (record.run_id,),
    order=_updated,
    status=_status,
    source=lambda record: record.kind,
    more=_of_runs,
)
SNAPSHOTS = Collection(
    "snapshots",
    RunSnapshot,
    parts=lambda record: (record.run_id, record.snapshot_id),
    order=lambda record: record.seq,
    status=_status,
)
AUDIT = Collection(
    "audit",
    AuditEvent,
    parts=lambda record: (record.event_id,),
    order=lambda record: record.seq,
    status=lambda record: record.durability,
    source=lambda record: record.event_type,
    run=lambda record: None,
)
DECISIONS = Collection(
    "decisions",
    PolicyDecision,
    parts=lambda record: (record.decision_id,),
    order=lambda record: record.created_at_ms,
    status=lambda record: record.decision,
)
