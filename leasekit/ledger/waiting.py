"""What a wait may become: predicates and steps, as pure functions over one record.

Each step gives the wait as it is afterwards; None where it is refused without being an error. A claim is
known by three values together (who, since when, until when), and every later step shows them again.

Source: spec/reliability 5.1-5.5, 5.8.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from leasekit import codec
from leasekit.errors import InvalidInput
from leasekit.ledger.records import TimeoutPolicy, Wait
from leasekit.ledger.redaction import merged

__all__ = [
    "TERMINAL",
    "WebhookEvent",
    "begin_completion",
    "cancel_by_guard",
    "check",
    "claim",
    "ended_before",
    "finish_completion",
    "finish_reminder",
    "is_claim_active",
    "is_claimable",
    "is_due",
    "mark_timed_out",
    "mark_woken",
    "match_metadata",
    "matches",
    "release",
    "replaced",
]

KINDS = ("timer", "webhook", "approval", "external_condition", "retry_backoff")
OPEN = ("waiting", "claimed")
ON_TIMEOUT = ("cancel", "escalate", "remind", "resume")
TERMINAL = frozenset({"woken", "timed_out", "escalated", "cancelled"})
TIMED_OUT = frozenset({"timed_out", "escalated", "cancelled"})
MATCH_KEY = "webhook_match"
_NO_CLAIM: dict[str, Any] = {"claimed_by": None, "claimed_at_ms": None, "claim_expires_at_ms": None}


def check(wait: Wait) -> None:
    """InvalidInput for a wait that no step would know how to go on with."""
    if not isinstance(wait, Wait):
        raise InvalidInput(f"wait must be a Wait, not {type(wait).__name__}", field="wait")
    codec.check_text(wait.wait_id, "wait_id")
    codec.check_text(wait.run_id, "run_id")
    _check_word(wait.wait_kind, "wait_kind", KINDS)
    _check_word(wait.status, "status", (*OPEN, *sorted(TERMINAL)))
    policy = wait.timeout_policy
    if policy is not None:
        _check_word(policy.on_timeout, "on_timeout", ON_TIMEOUT)
    instants = {
        "created_at_ms": wait.created_at_ms,
        "updated_at_ms": wait.updated_at_ms,
        "wake_at_ms": wait.wake_at_ms,
        "timeout_at_ms": policy.timeout_at_ms if policy else None,
        "remind_every_ms": policy.remind_every_ms if policy else None,
        "claimed_at_ms": wait.claimed_at_ms,
        "claim_expires_at_ms": wait.claim_expires_at_ms,
        "completed_at_ms": wait.completed_at_ms,
    }
    for field, at_ms in instants.items():
        if at_ms is not None:
            codec.check_whole(at_ms, field, 0, codec.INSTANT_MS_MAX)


def _check_word(given: str, field: str, words: Collection[str]) -> None:
    if given not in words:
        raise InvalidInput(
            f"{field} must be one of {', '.join(words)}, not {given}: nothing was changed",
            field=field,
        )


def is_claim_active(wait: Wait, at_ms: int) -> bool:
    """Whether somebody works on it at that instant; a claim's end itself is not within it."""
    return (
        wait.status == "claimed"
        and wait.claim_expires_at_ms is not None
        and wait.claim_expires_at_ms > at_ms
    )


def is_due(wait: Wait, at_ms: int) -> bool:
    """Whether it is to be woken, or has waited too long."""
    timeout = wait.timeout_policy.timeout_at_ms if wait.timeout_policy else None
    return any(at is not None and at <= at_ms for at in (wait.wake_at_ms, timeout))


def is_claimable(wait: Wait, at_ms: int) -> bool:
    """Whether nobody works on it: it waits, or its claim has ended."""
    return wait.status == "waiting" or (
        wait.status == "claimed" and not is_claim_active(wait, at_ms)
    )


def holds(stored: Wait, presented: Wait) -> bool:
    """Whether the one presented is the current claim of the one stored."""
    return stored.status == presented.status == "claimed" and _claim_of(stored) == _claim_of(
        presented
    )


def _claim_of(wait: Wait) -> tuple[str | None, int | None, int | None]:
    return wait.claimed_by, wait.claimed_at_ms, wait.claim_expires_at_ms


def replaced(stored: Wait | None, given: Wait) -> Wait:
    """What an upsert leaves: a terminal wait stays, but for an approval that was given up on and is
    decided after all."""
    if stored is None or stored.status not in TERMINAL:
        return given
    decided_late = (
        stored.wait_kind == given.wait_kind == "approval"
        and stored.status in ("timed_out", "escalated")
        and given.status in ("woken", "cancelled")
    )
    return given if decided_late else stored


def claim(wait: Wait, claimant: str, now_ms: int, lease_ms: int) -> Wait:
    """Taken by somebody, until now + lease; who calls has seen that it is claimable."""
    return msgspec.structs.replace(
        wait,
        status="claimed",
        claimed_by=claimant,
        claimed_at_ms=now_ms,
        claim_expires_at_ms=now_ms + max(lease_ms, 1),
        updated_at_ms=now_ms,
        wake_idempotency_key=None,
        event_seq=None,
        completed_at_ms=None,
    )


def release(stored: Wait, presented: Wait, now_ms: int) -> Wait | None:
    """Given back by its claimant."""
    if stored.status in TERMINAL or not holds(stored, presented):
        return None
    return msgspec.structs.replace(
        stored,
        status="waiting",
        updated_at_ms=now_ms,
        wake_idempotency_key=None,
        event_seq=None,
        completed_at_ms=None,
        **_NO_CLAIM,
    )


def begin_completion(
    stored: Wait, presented: Wait, key: str, now_ms: int, *, timeout_status: str | None = None
) -> Wait | None:
    """The claimant is about to complete it under a key; an ended one is given back for its own key."""
    if timeout_status is not None:
        _check_word(timeout_status, "timeout_status", sorted(TIMED_OUT))
    if stored.status in TERMINAL:
        return stored if stored.wake_idempotency_key == key else None
    if not holds(stored, presented) or not is_claim_active(stored, now_ms):
        return None
    return msgspec.structs.replace(
        stored,
        wake_idempotency_key=key,
        event_seq=None,
        completed_at_ms=None,
        updated_at_ms=now_ms,
    )


def finish_completion(
    stored: Wait, presented: Wait, key: str, seq: int, status: str, now_ms: int
) -> Wait | None:
    """Completed under the key that was begun with; the claim may have ended, as long as it is the last."""
    _check_word(status, "status", sorted(TERMINAL))
    if stored.status == status:
        same = stored.wake_idempotency_key == key and stored.event_seq == seq
        return stored if same else None
    if stored.status in TERMINAL:
        return None
    if not holds(stored, presented) or stored.wake_idempotency_key != key:
        return None
    return msgspec.structs.replace(
        stored,
        status=status,
        event_seq=seq,
        completed_at_ms=now_ms,
        updated_at_ms=now_ms,
        **_NO_CLAIM,
    )


def finish_reminder(
    stored: Wait, presented: Wait, key: str, seq: int, next_at_ms: int, now_ms: int
) -> Wait | None:
    """Reminded: it waits on, until it is to be reminded again."""
    if stored.status == "waiting":
        same = stored.wake_idempotency_key == key and stored.event_seq == seq
        return stored if same else None
    policy = stored.timeout_policy
    if not holds(stored, presented) or stored.wake_idempotency_key != key or policy is None:
        return None
    count = policy.metadata.get("reminder_count", 0) if isinstance(policy.metadata, Mapping) else 0
    told = {
        "reminder_count": (count if type(count) is int else 0) + 1,
        "last_reminded_at_ms": now_ms,
        "next_reminder_at_ms": next_at_ms,
    }
    reminded: TimeoutPolicy = msgspec.structs.replace(
        policy, timeout_at_ms=next_at_ms, metadata=merged(policy.metadata, told)
    )
    return msgspec.structs.replace(
        stored,
        status="waiting",
        timeout_policy=reminded,
        event_seq=seq,
        completed_at_ms=None,
        updated_at_ms=now_ms,
        **_NO_CLAIM,
    )


def mark_woken(stored: Wait, key: str, seq: int, now_ms: int) -> Wait | None:
    """Woken from outside, without a claim; again for the same key."""
    return _mark(stored, "woken", key, seq, now_ms)


def mark_timed_out(stored: Wait, key: str, seq: int, status: str, now_ms: int) -> Wait | None:
    """Given up from outside, without a claim; again for the same key."""
    _check_word(status, "status", sorted(TIMED_OUT))
    return _mark(stored, status, key, seq, now_ms)


def _mark(stored: Wait, status: str, key: str, seq: int, now_ms: int) -> Wait | None:
    if stored.status == status:
        return stored if stored.wake_idempotency_key == key else None
    if stored.status in TERMINAL or is_claim_active(stored, now_ms):
        return None
    return msgspec.structs.replace(
        stored,
        status=status,
        wake_idempotency_key=key,
        event_seq=seq,
        completed_at_ms=now_ms,
        updated_at_ms=now_ms,
        **_NO_CLAIM,
    )


def cancel_by_guard(stored: Wait, presented: Wait, reason: str, now_ms: int) -> Wait | None:
    """The run's phase does not allow what the wait would do: it is cancelled."""
    if stored.status in TERMINAL or (stored.status == "claimed" and not holds(stored, presented)):
        return None
    denial = {"phase_guard_denied": True, "phase_guard_denial_reason": reason}
    return msgspec.structs.replace(
        stored,
        status="cancelled",
        wake_idempotency_key=f"phase-guard-denied:{stored.wait_id}",
        event_seq=None,
        completed_at_ms=now_ms,
        updated_at_ms=now_ms,
        metadata=merged(stored.metadata, denial),
        **_NO_CLAIM,
    )


def ended_before(wait: Wait, cutoff_ms: int) -> bool:
    """Whether it was over before an instant."""
    ended_at = wait.updated_at_ms if wait.completed_at_ms is None else wait.completed_at_ms
    return wait.status in TERMINAL and ended_at < cutoff_ms


# --- webhooks (5.8) -------------------------------------------------------------------------------


class WebhookEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What arrived: its trigger, provider and content."""

    trigger_id: str
    provider: str
    provider_event_kind: str | None = None
    provider_event_id: str | None = None
    body_digest: str

    @property
    def idempotency_key(self) -> str:
        """The provider's own id of the event, else its content."""
        if self.provider_event_id is None:
            return self.body_digest
        return f"{self.provider}:{self.provider_event_id}"


MATCH_FIELDS = (
    *("trigger_id", "provider", "provider_event_kind", "provider_event_id", "body_digest"),
    "idempotency_key",
)


def matches(wait: Wait, event: WebhookEvent) -> bool:
    """Whether a webhook wait is about this event: every rule that is set, and at least one is."""
    rules = wait.metadata.get(MATCH_KEY) if isinstance(wait.metadata, Mapping) else None
    if wait.wait_kind != "webhook" or not isinstance(rules, Mapping):
        return False
    wanted = {name: rules[name] for name in MATCH_FIELDS if rules.get(name) is not None}
    return bool(wanted) and all(getattr(event, name) == value for name, value in wanted.items())


def match_metadata(rules: Mapping[str, str], extra: Any = None) -> dict[str, Any]:
    """Metadata of a webhook wait: its rules beside what else is to be kept."""
    if isinstance(extra, Mapping):
        return {**extra, MATCH_KEY: dict(rules)}
    base: dict[str, Any] = {} if extra is None else {"extra": extra}
    return base | {MATCH_KEY: dict(rules)}
