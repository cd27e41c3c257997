"""What an operator may do about what failed: dispositions, transitions and the compensation engine.

Pure functions over records: they decide, `transact` writes.

Source: spec/reliability 4.7, 4.8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from leasekit import codec
from leasekit.errors import Conflict, InvalidInput
from leasekit.ledger.records import Compensation, DeadLetter, PrincipalRef, ToolEffect
from leasekit.ledger.redaction import digest, merged, redacted, short16

__all__ = [
    "TRANSITIONS",
    "Execution",
    "begun",
    "disposed",
    "ended",
    "failed",
    "is_superseded",
    "linked",
    "moved",
    "outbox_row",
    "receipt_of",
    "sent",
    "superseded",
    "without_mark",
]

ENGINE = "stateful_compensation_engine"
CLAIM_MS = 300_000

LETTER_STATUSES = (
    *("open", "retry_requested", "retrying", "ignored", "linked_to_compensation", "resolved"),
)
TRANSITIONS: dict[str, tuple[str, ...]] = {
    "proposed": ("awaiting_approval", "approved", "cancelled"),
    "awaiting_approval": ("approved", "cancelled"),
    "approved": ("running", "cancelled"),
    "running": ("completed", "failed", "cancelled"),
    "failed": ("approved", "running", "cancelled"),
    "completed": (),
    "cancelled": (),
}


def moved(compensation: Compensation, status: str, now_ms: int) -> Compensation:
    """A compensation in another status; Conflict where the table does not allow it, InvalidInput for
    what is no status."""
    before = compensation.status
    if status not in TRANSITIONS:
        raise InvalidInput(
            f"status must be one of {', '.join(TRANSITIONS)}, not {status!r}", field="status"
        )
    if status != before and status not in TRANSITIONS.get(before, ()):
        raise Conflict(
            f"illegal stateful compensation status transition from `{before}` to `{status}`: nothing "
            "was changed",
            id=compensation.compensation_id,
            status=before,
        )
    return msgspec.structs.replace(compensation, status=status, updated_at_ms=now_ms)


def disposed(
    letter: DeadLetter,
    status: str,
    disposition: str,
    *,
    reason: str | None,
    actor: PrincipalRef | None,
    now_ms: int,
) -> DeadLetter:
    """A dead letter as an operator left it; InvalidInput for what is no status or label."""
    if status not in LETTER_STATUSES:
        raise InvalidInput(
            f"status must be one of {', '.join(LETTER_STATUSES)}, not {status!r}", field="status"
        )
    codec.check_text(disposition, "disposition")
    return msgspec.structs.replace(
        letter,
        status=status,
        operator_disposition=disposition,
        disposition_reason=reason,
        disposition_actor=actor,
        disposition_at_ms=now_ms,
        updated_at_ms=now_ms,
    )


# --- superseded by a success (4.7) ----------------------------------------------------------------


_MARK = frozenset(
    {
        *("superseded_by_success", "superseded_by_effect_id", "superseded_at_ms"),
        "superseded_by_outbox_id",
    }
)


def is_superseded(metadata: Any) -> bool:
    """Whether a later success of the same effect has made a record idle; a lone flag does not count."""
    if not isinstance(metadata, dict):
        return False
    by, at = metadata.get("superseded_by_effect_id"), metadata.get("superseded_at_ms")
    return (
        metadata.get("superseded_by_success") is True
        and isinstance(by, str)
        and bool(by.strip())
        and isinstance(at, int)
        and not isinstance(at, bool)
        and at >= 0
    )


def without_mark(metadata: Any) -> Any:
    """Metadata without the mark of a success: it failed again since."""
    return {name: value for name, value in metadata.items() if name not in _MARK}


def superseded(metadata: Any, effect: ToolEffect) -> Any:
    """Metadata with the mark of the effect that succeeded."""
    return merged(
        metadata,
        {
            "superseded_by_success": True,
            "superseded_by_effect_id": effect.effect_id,
            "superseded_at_ms": effect.updated_at_ms,
            "superseded_by_outbox_id": effect.outbox_id,
        },
    )


# --- the engine (4.8) -----------------------------------------------------------------------------


class Execution(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an execution led to: the records as they are now.

    receipt_effect: None where the compensating call failed (the compensation is `failed`), or was
    certainly not made (it is still `running`). already_completed: it was executed before.
    """

    compensation: Compensation
    receipt_effect: ToolEffect | None = None
    linked_dead_letters: list[DeadLetter] = msgspec.field(default_factory=lambda: [])
    already_completed: bool = msgspec.field(default_factory=lambda: False)


def begun(
    compensation: Compensation, *, actor: PrincipalRef, reason: str | None, now_ms: int
) -> Compensation:
    """The compensation while it is executed. Conflict for one that is cancelled."""
    if compensation.status == "cancelled":
        raise Conflict(
            f"stateful compensation `{compensation.compensation_id}` is cancelled: nothing was "
            "executed",
            id=compensation.compensation_id,
            status="cancelled",
        )
    stage: dict[str, Any] = {
        "execution_engine": ENGINE,
        "execution_stage": "running",
        "previous_status": compensation.status,
        "executed_at_ms": now_ms,
        "executed_by": msgspec.to_builtins(actor),
    }
    if reason is not None:
        stage["execution_reason"] = reason
    return msgspec.structs.replace(
        compensation,
        status="running",
        attempts=compensation.attempts + 1,
        updated_at_ms=now_ms,
        metadata=merged(compensation.metadata, stage),
    )


def outbox_row(running: Compensation, now_ms: int) -> dict[str, Any]:
    """The fields of the intent that stands for the execution (spec 4.8), as it is claimed."""
    identity, run = running.compensation_id, running.run_id or ""
    attempts = str(running.attempts)
    outbox_id = "outbox-compensation-" + short16(
        codec.hash_terminated([identity, run, attempts, "outbox"])
    )
    fields = {
        "outbox_id": outbox_id,
        "run_id": running.run_id,
        "scope": msgspec.to_builtins(running.scope),
        "operation": f"stateful_compensation.{running.compensation_type}",
        "status": "claimed",
        "source_kind": "stateful_compensation",
        "source_id": identity,
        "provider": "stateful_runtime",
        "tool": ENGINE,
        "target": running.target_effect_id,
        "idempotency_key": f"stateful-compensation:{identity}:{attempts}",
        "payload_digest": digest(running.metadata),
        "policy_decision_id": running.policy_decision_id,
        "compensation_id": identity,
        "attempts": running.attempts,
        "created_at_ms": now_ms,
        "updated_at_ms": now_ms,
        "claimed_by": ENGINE,
        "claimed_at_ms": now_ms,
        "claim_expires_at_ms": now_ms + CLAIM_MS,
        "metadata": {
            "execution_engine": ENGINE,
            "observed_before_execution": True,
            "original_outbox_id": running.outbox_id,
            "target_effect_id": running.target_effect_id,
            "rollback_instruction": running.rollback_instruction,
            "forward_fix_instruction": running.forward_fix_instruction,
        },
    }
    return {name: value for name, value in fields.items() if value is not None}


def receipt_of(
    running: Compensation,
    row: dict[str, Any],
    *,
    actor: PrincipalRef,
    reason: str | None,
    now_ms: int,
) -> ToolEffect:
    """The effect that proves an execution."""
    identity = running.compensation_id
    effect_id = "effect-compensation-" + short16(
        codec.hash_terminated([identity, running.run_id or "", str(running.attempts)])
    )
    by = msgspec.to_builtins(actor)
    payload = {
        "status": "completed",
        "compensation_id": identity,
        "compensation_type": running.compensation_type,
        "target_effect_id": running.target_effect_id,
        "outbox_id": running.outbox_id,
        "rollback_instruction": running.rollback_instruction,
        "forward_fix_instruction": running.forward_fix_instruction,
        "attempt": running.attempts,
        "actor": by,
        "reason": reason,
    }
    payload_digest = digest(payload)
    operation = row["operation"]
    return ToolEffect(
        effect_id=effect_id,
        outbox_id=row["outbox_id"],
        action_id=f"stateful-compensation:{identity}",
        run_id=running.run_id,
        scope=running.scope,
        status="succeeded",
        operation=operation,
        source_kind="stateful_compensation",
        source_id=identity,
        provider="stateful_runtime",
        tool=ENGINE,
        target=running.target_effect_id,
        external_resource={
            "target_effect_id": running.target_effect_id,
            "original_outbox_id": running.outbox_id,
            "receipt_outbox_id": row["outbox_id"],
        },
        policy_decision_id=running.policy_decision_id,
        input_digest=row["payload_digest"],
        output_digest=payload_digest,
        receipt_payload_digest=payload_digest,
        receipt_payload_redacted=redacted(payload),
        receipt_pointer=f"stateful-compensation://{identity}",
        redaction_tier="safe_ui",
        audit_hash=codec.hash_terminated([effect_id, identity, operation, payload_digest]),
        compensation_id=identity,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        metadata={
            "execution_engine": ENGINE,
            "approval_required": running.approval_required,
            "approved_by": by,
        },
    )


def ended(running: Compensation, receipt: ToolEffect, now_ms: int) -> Compensation:
    """The compensation once its receipt is there."""
    stage = {
        "execution_stage": "completed",
        "previous_status": "running",
        "receipt_effect_id": receipt.effect_id,
    }
    return msgspec.structs.replace(
        running,
        status="completed",
        receipt_effect_id=receipt.effect_id,
        updated_at_ms=now_ms,
        metadata=merged(running.metadata, stage),
    )


def failed(running: Compensation, error: str | None, now_ms: int) -> Compensation:
    """The compensation once its call has failed: it may be executed again, as another attempt."""
    stage: dict[str, Any] = {"execution_stage": "failed", "previous_status": "running"}
    if error is not None:
        stage["execution_error"] = error
    return msgspec.structs.replace(
        running,
        status="failed",
        updated_at_ms=now_ms,
        metadata=merged(running.metadata, stage),
    )


def sent(row: dict[str, Any], receipt: ToolEffect, now_ms: int) -> dict[str, Any]:
    """The intent of an execution once it is sent."""
    without_claim = {name: value for name, value in row.items() if name != "claim_expires_at_ms"}
    return without_claim | {
        "status": "sent",
        "effect_id": receipt.effect_id,
        "receipt_id": receipt.effect_id,
        "updated_at_ms": now_ms,
        "metadata": row["metadata"]
        | {
            "observed_after_execution": True,
            "dispatch_completed": True,
            "receipt_effect_id": receipt.effect_id,
            "completion_recorded_at_ms": now_ms,
        },
    }


def linked(
    letters: Sequence[DeadLetter],
    compensation: Compensation,
    *,
    actor: PrincipalRef,
    reason: str | None,
    now_ms: int,
) -> list[DeadLetter]:
    """The dead letters of a completed compensation: open ones are linked to it, others stay."""
    because = (
        reason or f"compensation `{compensation.compensation_id}` completed by stateful runtime"
    )
    status = "linked_to_compensation"
    return [
        disposed(letter, status, status, reason=because, actor=actor, now_ms=now_ms)
        if letter.status in ("open", "retry_requested")
        else letter
        for letter in letters
    ]
