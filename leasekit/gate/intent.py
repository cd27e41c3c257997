"""The record of an intent, put together from the three things that are stored of it.

The intent itself is written once. Its state line changes. What was said of it is a list of facts,
which Lua only appends to: what they mean for the metadata is decided here, on reading.

Source: spec/reliability 3.5, 3.6, 4.2; lua/PROTOCOL.md, "Gate".
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from leasekit import codec

__all__ = ["Fact", "Intent", "IntentStatus", "note_of", "read_intent"]

CLAIMED_BY = "tool-dispatch-ledger"
RESULT_BYTES_MAX = 52 * 1024  # Leaves room for the longest error text, every letter escaped.

_COMPLETIONS = frozenset({"succeeded", "failed", "blocked"})


class IntentStatus(StrEnum):
    """Where an intent is. A claimed one that parks is unknown once its lease has ended."""

    PENDING = "pending"
    CLAIMED = "claimed"
    SENT = "sent"
    FAILED = "failed"
    DEAD_LETTERED = "dead_lettered"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


class Fact(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that was said of an intent.

    kind: succeeded, failed, blocked or left (by a sender), applied, absent or undecidable (by the
    destination), resolved_sent, resolved_failed or resolved_not_sent (by an operator). fence: of the
    grant or question under which it was said; None where that is not known. applied: whether it
    changed the intent's status; where not, it is only kept for people.
    """

    at_ms: int
    kind: str
    fence: int | None
    applied: bool
    error: str | None = None
    result: Any = None
    actor: str | None = None
    reason: str | None = None

    def __repr__(self) -> str:
        return f"<Fact {self.kind} at {self.at_ms} fence {self.fence}>"


class Intent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of one side effect (spec/reliability 4.2, outbox), without its sender's token.

    cause: what brought it to its status (lua/PROTOCOL.md). revision: rises with every change. fence: of
    the last grant. owner: the last sender, for people. unknown_since_ms: the end of the lease of a
    sender who has not been heard of. asks: questions put to the destination since the last grant.
    ask_at_ms: when it may be asked next. result: what the sender, or the destination, gave back.
    """

    schema_version: int = 1
    outbox_id: str
    run_id: str | None = None
    scope: dict[str, Any] = {}
    operation: str
    status: IntentStatus
    source_kind: str | None = None
    source_id: str | None = None
    node_id: str | None = None
    provider: str | None = None
    tool: str | None = None
    target: str | None = None
    idempotency_key: str | None = None
    payload_digest: str | None = None
    policy_decision_id: str | None = None
    context_assertion_id: str | None = None
    effect_id: str | None = None
    receipt_id: str | None = None
    compensation_id: str | None = None
    dead_letter_id: str | None = None
    attempts: int = 0
    created_at_ms: int
    updated_at_ms: int
    claimed_by: str | None = None
    claimed_at_ms: int | None = None
    claim_expires_at_ms: int | None = None
    metadata: dict[str, Any] = {}
    cause: str
    revision: int
    fence: int | None = None
    on_expiry: str = "reclaim"
    owner: str | None = None
    unknown_since_ms: int | None = None
    asks: int = 0
    ask_at_ms: int | None = None
    facts: tuple[Fact, ...] = ()

    @property
    def result(self) -> Any:
        """What came back from the destination, as the word that counted last brought it; or None."""
        for fact in reversed(self.facts):
            if fact.applied and fact.result is not None:
                return fact.result
        return None

    def __repr__(self) -> str:
        return f"<Intent {self.outbox_id} {self.operation} {self.status} {self.attempts}>"


class _Note(msgspec.Struct, omit_defaults=True):
    """The JSON of a fact."""

    error: str | None = None
    result: Any = None
    actor: str | None = None
    reason: str | None = None


def note_of(
    *,
    error: object = None,
    result: Any = None,
    actor: str | None = None,
    reason: str | None = None,
) -> bytes:
    """The JSON of a fact, <= 64 KiB. Error and reason are cut; a result that is too large is refused."""
    if result is not None:
        codec.canonical_json(result, "result", bytes_max=RESULT_BYTES_MAX)
    return msgspec.json.encode(_Note(_cut(error), result, actor, _cut(reason)))


def _cut(text: object) -> str | None:
    return None if text is None else msgspec.json.decode(codec.error_text(text), type=str)


def read_intent(identity: str, doc: bytes, line: bytes, facts: bytes, now: int) -> Intent:
    """The record of an intent as it is at `now`, from what is stored of it."""
    words = line.decode().split(" ", 19)
    status, cause, _, lease_end, updated_at, created_at, revision, attempts = words[:8]
    fence, claimed_at, on_expiry, asks, _, _, _, ask_at, _, _, _, owner = words[8:]
    is_claimed = status == "claimed"
    has_ended = is_claimed and on_expiry == "park" and int(lease_end) <= now
    shown = IntentStatus.UNKNOWN if has_ended else IntentStatus(status)
    is_unknown = shown is IntentStatus.UNKNOWN
    told = tuple(_read_fact(one) for one in facts.split(b"\n")) if facts else ()
    fixed: dict[str, Any] = msgspec.json.decode(doc) if doc else {"operation": ""}
    fixed["metadata"] = _merged(fixed.get("metadata", {}), told)
    claimed_by = fixed.get("claimed_by", CLAIMED_BY if int(fence) else None)
    return msgspec.convert(
        fixed
        | {
            "outbox_id": identity,
            "status": shown,
            "cause": cause,
            "revision": int(revision),
            "attempts": int(attempts),
            "created_at_ms": int(created_at),
            "updated_at_ms": int(updated_at),
            "claimed_by": claimed_by,
            "claimed_at_ms": None if claimed_by is None else int(claimed_at),
            "claim_expires_at_ms": int(lease_end) if is_claimed and not has_ended else None,
            "fence": int(fence) or None,
            "on_expiry": on_expiry,
            "owner": owner or None,
            "unknown_since_ms": int(lease_end) if is_unknown else None,
            "asks": int(asks),
            "ask_at_ms": max(int(ask_at), int(lease_end)) if is_unknown else None,
            "facts": told,
        },
        Intent,
    )


def _read_fact(line: bytes) -> Fact:
    at, kind, fence, applied, text = line.split(b" ", 4)
    note = msgspec.json.decode(text, type=_Note)
    return Fact(
        at_ms=int(at),
        kind=kind.decode(),
        fence=int(fence) or None,
        applied=applied == b"1",
        error=note.error,
        result=note.result,
        actor=note.actor,
        reason=note.reason,
    )


def _merged(metadata: dict[str, Any], facts: tuple[Fact, ...]) -> dict[str, Any]:
    """Metadata with what completions add to it (spec/reliability 3.6), the later over the earlier."""
    merged = dict(metadata)
    for fact in facts:
        if fact.applied and fact.kind in _COMPLETIONS:
            merged |= {
                "dispatch_completed": True,
                "dispatch_status": fact.kind,
                "completion_recorded_at_ms": fact.at_ms,
            }
            if fact.error is not None:
                merged["dispatch_error"] = fact.error
    return merged
