"""How each kind of record is named and filed: the one place that knows the lists.

Source: spec/reliability 4.1, 4.11, 5.1, 6.3, 6.12, 7.5; lua/PROTOCOL.md, "Ledger".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from leasekit import codec
from leasekit.errors import InvalidInput
from leasekit.gate.identity import same_tenant
from leasekit.keys import encode_word
from leasekit.ledger.records import (
    AuditEvent,
    Compensation,
    DeadLetter,
    PolicyDecision,
    Run,
    RunSnapshot,
    StatefulRuntimeScope,
    ToolEffect,
    Wait,
)
from leasekit.ledger.recovery import is_superseded
from leasekit.ledger.store import NO_SOURCE, RECORD_ID_BYTES_MAX, Listed, name_of, place
from leasekit.scope import Scope

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
    "check_scope",
    "is_off",
    "list_about",
    "run_word",
    "word",
]

NO_RUN = "~"
NEVER_MS = codec.INSTANT_MS_MAX
# A name behind `~` that is no escape: no run's list can have it (nor `list_about`'s below).
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


def is_off(text: str | None) -> bool:
    """Whether a filter lets everything through: none, a blank one, or `all` (spec 0.2)."""
    return text is None or codec.normalised(text) in ("", "all")


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
        source: Callable[[Any], str | None] | None = None,
        run: Callable[[Any], str | None] = lambda record: record.run_id,
        is_active: Callable[[Any], bool] = lambda record: True,
        more: Callable[[Any], dict[str, int]] = lambda record: {},
        bytes_max: int = codec.DOCUMENT_BYTES_MAX,
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
        self._bytes_max = bytes_max

    @property
    def has_source(self) -> bool:
        """Whether its records are told apart by where they come from; else that filter is ignored."""
        return self._source is not None

    def name_of(self, *parts: str) -> str:
        """The stored name of the record with that id; waits and snapshots are named by run and id."""
        return name_of(self.name, *parts)

    def check(self, record: object) -> None:
        """InvalidInput for what is no record of this kind."""
        if not isinstance(record, self._kind):
            raise InvalidInput(
                f"{self.name} takes a {self._kind.__name__}, not {type(record).__name__}",
                field="record",
            )

    def name_for(self, record: Record) -> str:
        return self.name_of(*self._parts(record))

    def list_of(self, run_id: str | None) -> str:
        """The list of all records, or of those of a run."""
        return self.name if run_id is None else f"{self.name}:{run_word(run_id)}"

    def run_of(self, record: Record) -> str:
        return run_word(self._run(record))

    def listed(self, record: Record) -> Listed:
        """The lists a record stands in, and what pages filter it by.

        InvalidInput for a record whose times, names or words cannot be filed.
        """
        run, order = self.run_of(record), self._order(record)
        created_at = getattr(record, "created_at_ms", 0)
        for at, field in ((order, "order"), (created_at, "created_at_ms")):
            codec.check_whole(at, f"{self.name}: {field}", 0, codec.INSTANT_MS_MAX)
        status, source = self._status(record), self._source(record) if self._source else None
        for text, field in ((self._run(record), "run_id"), (status, "status"), (source, "source")):
            if text:
                codec.check_text(text, f"{self.name}: {field}", bytes_max=RECORD_ID_BYTES_MAX)
        lists = {self.name: order} | self._more(record)
        if run != NO_RUN:
            lists[f"{self.name}:{run}"] = order
        tail = self.name_for(record).partition("/")[2]
        return Listed(
            places=tuple(place(listed, at, tail) for listed, at in lists.items()),
            created_at_ms=created_at,
            status=word(status),
            run=run,
            source=word(source),
            is_active=self._is_active(record),
        )

    def encode(self, record: Record) -> bytes:
        """A record's JSON in the order of its fields; InvalidInput for what JSON cannot carry, and for
        more than 64 KiB (runs and snapshots: 256)."""
        codec.canonical_json(record, self.name, bytes_max=self._bytes_max)
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
    more=lambda record: _about(
        "dead_letters", record, source=record.source_id, settled_by=record.compensation_id
    ),
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
    more=lambda record: _about(
        "compensations", record, effect=record.target_effect_id, outbox=record.outbox_id
    ),
)


def list_about(collection: Collection[Any], what: str, id: str) -> str:
    """The list of records of a collection that are about one other record, such as an effect."""
    return _list_about(collection.name, what, id)


def _list_about(name: str, what: str, id: str) -> str:
    return f"{name}:~{what}.{encode_word(id)}"


def _about(name: str, record: Any, **others: str | None) -> dict[str, int]:
    """The lists in which a record is found by what it is about."""
    return {_list_about(name, what, id): record.updated_at_ms for what, id in others.items() if id}


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
    bytes_max=codec.PAYLOAD_BYTES_DEFAULT,
)
SNAPSHOTS = Collection(
    "snapshots",
    RunSnapshot,
    parts=lambda record: (record.run_id, record.snapshot_id),
    order=lambda record: record.seq,
    status=_status,
    bytes_max=codec.PAYLOAD_BYTES_DEFAULT,
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


def check_scope(scope: Scope, record: Any) -> None:
    """InvalidInput for a record of another tenant."""
    whose = record if isinstance(record, StatefulRuntimeScope) else getattr(record, "scope", None)
    context = record.tenant_context if whose is None else whose.tenant_context
    if not same_tenant(context, scope.context):
        raise InvalidInput(
            f"the record's scope names another tenant than {scope.tag}: nothing was written",
            field="scope.tenant_context",
        )
