"""The words and records that callers get back: outcomes, rows, leases, idempotency records.

Outcomes are string enums with the words of lua/PROTOCOL.md; losing a race is such a word, never an
exception. Instants end in `_at_ms` (milliseconds since 1970 on the server's clock), durations in
`_ms`. No record carries a token unless the caller holds it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Generic, Literal, TypeVar

import msgspec

__all__ = [
    "AckOutcome",
    "AcquireOutcome",
    "AttemptError",
    "CancelOutcome",
    "CompleteOutcome",
    "Counts",
    "Draft",
    "Enqueued",
    "ExtendOutcome",
    "Holder",
    "IdempotencyRecord",
    "IdempotencyStatus",
    "LaneCounts",
    "LeaseExtendOutcome",
    "LeaseReleaseOutcome",
    "NackOutcome",
    "Outcome",
    "Page",
    "RedriveOutcome",
    "ReleaseOutcome",
    "Reservation",
    "ReserveOutcome",
    "ResolveOutcome",
    "Retention",
    "Row",
    "RowStatus",
    "RunCounts",
    "TenantContext",
    "WithdrawOutcome",
]

Item = TypeVar("Item")

DAY_MS = 86_400_000
LOCAL = "local"

# The lanes and targets that spec/outbox 1.2 names.
LANE_CANONICAL = "canonical"
LANE_PROTOCOL_REPLAY = "protocol_replay"
TARGET_PROJECTOR = "protocol_projector"
TARGET_FANOUT = "protocol_fanout"
TARGET_A2A_WEBHOOK = "a2a_webhook"
ATTEMPTS_DEFAULT = 5


class Page(msgspec.Struct, Generic[Item], frozen=True):
    """A page of a list; `next_cursor` is None at the end, else what the next call is given.

    A filtered page may be short, even empty, and go on all the same.
    """

    items: list[Item]
    next_cursor: str | None


class Retention(msgspec.Struct, frozen=True, kw_only=True):
    """How long finished things are kept, per tenant; whichever bound is reached first.

    `finished_ms` or `finished_count` 0: finished rows are deleted at once. `dedupe_ms` is how long a
    dedupe key is remembered, counted from its enqueue, and as long as its row is unfinished.
    """

    finished_ms: int = DAY_MS
    finished_count: int = 100_000
    finished_bytes: int = 64 * 1024 * 1024
    dead_ms: int = 30 * DAY_MS
    dead_count: int = 10_000
    dedupe_ms: int = 7 * DAY_MS


# --- outbox ---------------------------------------------------------------------------------------


class RowStatus(StrEnum):
    """Where a queue row is. The words of spec/outbox 1.3 are understood too."""

    PENDING = "pending"
    CLAIMED = "claimed"
    SENT = "sent"
    DEAD_LETTERED = "dead_lettered"
    UNKNOWN = "unknown"
    CANCELLED = "cancelled"
    FORGOTTEN = "forgotten"
    """Deleted; only its dedupe key is remembered."""

    @classmethod
    def _missing_(cls, value: object) -> RowStatus | None:
        return {"delivered": cls.SENT, "dead_letter": cls.DEAD_LETTERED}.get(str(value))

    @property
    def is_final(self) -> bool:
        return self in (RowStatus.SENT, RowStatus.DEAD_LETTERED, RowStatus.CANCELLED)


class AckOutcome(StrEnum):
    ACKED = "acked"
    LOST_CLAIM = "lost_claim"
    FORGOTTEN = "forgotten"


class NackOutcome(StrEnum):
    REQUEUED = "requeued"
    DEAD_LETTERED = "dead_lettered"
    LOST_CLAIM = "lost_claim"
    FORGOTTEN = "forgotten"


class ExtendOutcome(StrEnum):
    EXTENDED = "extended"
    LOST_CLAIM = "lost_claim"


class ReleaseOutcome(StrEnum):
    RELEASED = "released"
    LOST_CLAIM = "lost_claim"
    FORGOTTEN = "forgotten"


class CancelOutcome(StrEnum):
    CANCELLED = "cancelled"
    NOT_PENDING = "not_pending"
    MISSING = "missing"
    FORGOTTEN = "forgotten"


class RedriveOutcome(StrEnum):
    REDRIVEN = "redriven"
    NOT_DEAD = "not_dead"
    MISSING = "missing"
    FORGOTTEN = "forgotten"


class ResolveOutcome(StrEnum):
    RESOLVED = "resolved"
    NOT_UNKNOWN = "not_unknown"
    MISSING = "missing"
    FORGOTTEN = "forgotten"


class Draft(msgspec.Struct, kw_only=True, gc=False):
    """What a producer wants sent; `enqueue_many` takes a list of these.

    available_at_ms: not before this instant; 0 = at once. max_attempts: None = without end.
    on_expiry: `reclaim` (another claim may take it when a lease ends) or `park` (it becomes unknown).
    """

    lane: str
    target: str
    payload: Any
    id: str | None = None
    dedupe_key: str | None = None
    available_at_ms: int = 0
    max_attempts: int | None = ATTEMPTS_DEFAULT
    on_expiry: str = "reclaim"
    run_id: str | None = None

    def __repr__(self) -> str:
        return f"<Draft {self.lane}/{self.target}>"


class AttemptError(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One entry of a row's history: kind = requeued, nacked, permanent, expired or resolved_..."""

    at_ms: int
    kind: str
    attempt: int
    fence: int
    text: str


class Row(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A queue row as it is now. `cause` is what brought it to its status (lua/PROTOCOL.md)."""

    id: str
    lane: str
    target: str
    payload: Any
    status: RowStatus
    cause: str
    attempt_count: int
    claim_count: int
    max_attempts: int | None
    on_expiry: str
    created_at_ms: int
    available_at_ms: int
    dedupe_key: str | None = None
    run_id: str | None = None
    consumer: str | None = None
    fence: int | None = None
    claimed_at_ms: int | None = None
    lease_expires_at_ms: int | None = None
    finished_at_ms: int | None = None
    errors: tuple[AttemptError, ...] = ()

    @property
    def last_error(self) -> str | None:
        """The text of the latest error, kept also after a later success (spec/outbox 1.5.3)."""
        return self.errors[-1].text if self.errors else None

    def __repr__(self) -> str:
        return f"<Row {self.id} {self.lane}/{self.target} {self.status} {self.attempt_count}>"


class Enqueued(msgspec.Struct, frozen=True, gc=False):
    """`created` False: the row was there already, by its dedupe key or its id, with equal content."""

    row: Row
    created: bool


class LaneCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Rows of one lane and target.

    pending, claimed, unknown and dead_lettered are how many there are now; sent and cancelled how
    many there ever were.
    """

    lane: str
    target: str
    last_enqueue_at_ms: int
    pending: int
    claimed: int
    unknown: int
    dead_lettered: int
    sent: int
    cancelled: int


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """The sum of the lanes asked for; see LaneCounts. `*_kept` are rows and bytes still stored."""

    pending: int
    claimed: int
    unknown: int
    dead_lettered: int
    sent: int
    cancelled: int
    finished_kept: int
    finished_bytes_kept: int
    dead_kept: int
    unknown_kept: int
    lanes: list[LaneCounts]


class RunCounts(msgspec.Struct, kw_only=True):
    """What `run` and `consume` have done so far; rows, unless said otherwise.

    handler_errors: exceptions of the handler, its time limit included. lost: leases that were lost, and
    rows that somebody else had finished. released: given back, uncharged. claim_errors: claims that
    failed and were tried again. restarts: tasks inside that died of something unexpected.
    """

    claimed: int = 0
    acked: int = 0
    requeued: int = 0
    dead_lettered: int = 0
    released: int = 0
    lost: int = 0
    handler_errors: int = 0
    claim_errors: int = 0
    restarts: int = 0


# --- leases ---------------------------------------------------------------------------------------


class AcquireOutcome(StrEnum):
    ACQUIRED = "acquired"
    BUSY = "busy"


class LeaseExtendOutcome(StrEnum):
    EXTENDED = "extended"
    LOST = "lost"


class LeaseReleaseOutcome(StrEnum):
    RELEASED = "released"
    LOST = "lost"
    FORGOTTEN = "forgotten"


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a lease, as anybody may see it: without the token."""

    name: str
    owner: str
    fence: int
    acquired_at_ms: int
    expires_at_ms: int


# --- idempotency ----------------------------------------------------------------------------------


class TenantContext(msgspec.Struct, frozen=True, omit_defaults=True):
    """Whose record it is (spec/reliability 1.1); actor and source never count.

    source: `explicit`, or `local_implicit` where nobody named a tenant; always written, and
    `local_implicit` where a record does not say.
    """

    org_id: str
    workspace_id: str
    deployment_id: str | None = None
    actor_id: str | None = None
    source: Literal["local_implicit", "explicit"] = msgspec.field(
        default_factory=lambda: "local_implicit"
    )

    @classmethod
    def local_implicit(cls) -> TenantContext:
        """The tenant of whoever names none."""
        return cls(LOCAL, LOCAL)

    @classmethod
    def explicit(cls, org_id: str, workspace_id: str, actor_id: str | None = None) -> TenantContext:
        """A tenant that was named, without a deployment."""
        return cls(org_id, workspace_id, None, actor_id, "explicit")

    @classmethod
    def explicit_user_workspace(
        cls, org_id: str, workspace_id: str, deployment_id: str | None, actor_id: str
    ) -> TenantContext:
        """A tenant that was named by somebody."""
        return cls(org_id, workspace_id, deployment_id, actor_id, "explicit")

    @property
    def is_local_implicit(self) -> bool:
        """Whether it is the tenant of whoever names none, and nobody in particular."""
        return self == TenantContext.local_implicit()


class IdempotencyStatus(StrEnum):
    RESERVED = "reserved"
    COMPLETED = "completed"
    CONFLICTED = "conflicted"
    UNKNOWN = "unknown"
    """Reserved with `park`, and the first attempt's lease ended without an outcome."""


class ReserveOutcome(StrEnum):
    RESERVED = "reserved"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


class CompleteOutcome(StrEnum):
    COMPLETED = "completed"
    LOST = "lost"
    MISSING = "missing"


class WithdrawOutcome(StrEnum):
    """What became of a release: `kept` = it is completed or conflicted, and stays."""

    RELEASED = "released"
    LOST = "lost"
    KEPT = "kept"
    MISSING = "missing"
    FORGOTTEN = "forgotten"


class Outcome(msgspec.Struct, kw_only=True):
    """What a first use led to, replayed to duplicates (spec/reliability 2.1).

    completed_at_ms None: the server's clock at the completion.
    """

    outcome_kind: str
    completed_at_ms: int | None = None
    primary_ref_kind: str | None = None
    primary_ref_id: str | None = None
    secondary_ref_kind: str | None = None
    secondary_ref_id: str | None = None
    details: Any = None

    def __repr__(self) -> str:
        return f"<Outcome {self.outcome_kind}>"


class IdempotencyRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is stored of a key (spec/reliability 2.1), with the first attempt's lease beside it."""

    schema_version: int
    record_id: str
    tenant_context: TenantContext
    operation: str
    key: str
    owner: str
    request_fingerprint: str
    status: IdempotencyStatus
    first_seen_at_ms: int
    last_seen_at_ms: int
    first_seen_event_id: str | None = None
    lease_expires_at_ms: int | None = None
    expires_at_ms: int | None = None
    on_expiry: str = "reclaim"
    outcome: Outcome | None = None
    conflict_count: int = 0
    conflict_fingerprints: list[str] = []


class Reservation(msgspec.Struct, frozen=True):
    """`token` is set only where the outcome is `reserved`: it completes or releases the key."""

    outcome: ReserveOutcome
    record: IdempotencyRecord
    token: str | None

    def __repr__(self) -> str:
        return f"<Reservation {self.outcome} {self.record.operation}>"
