"""From what another system, or a dispatcher, says it did to the ledger's records.

Pure functions. A replay of the same action overwrites its own rows; what an operator has begun to do
about a failure is kept: a success makes it idle instead of deleting it, and another failure after
that wakes it up again.

Source: spec/reliability 3.7, 3.9, 4.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from leasekit import codec
from leasekit.gate import LedgerEvent
from leasekit.ledger.records import (
    Compensation,
    DeadLetter,
    ExternalAction,
    StatefulRuntimeScope,
    ToolEffect,
)
from leasekit.ledger.recovery import is_superseded, superseded, without_mark
from leasekit.ledger.redaction import digest, merged, redacted, short16

__all__ = [
    "Bridged",
    "bridge",
    "check_action",
    "compensation_id_of",
    "dispatch_receipt",
    "effect_status",
    "suffix_of",
]

_SUCCEEDED = frozenset(
    {"posted", "sent", "succeeded", "success", "completed", "delivered", "matched"}
)
_PENDING = frozenset({"pending", "queued", "claimed"})
_FAILED = frozenset({"failed", "error", "rejected", "denied", "cancelled"})
_OUTBOX_STATUS = {"succeeded": "sent", "failed": "failed"}
_PHASE_STATUS = {"denied": "failed", "approval_required": "pending", "allowed": "succeeded"}
_RUN_FIELDS = ("automationRunID", "automation_run_id", "workflowRunID", "workflow_run_id")
_RUN_PREFIXES = ("automation-v2-", "workflow-", "routine-")


class Bridged(msgspec.Struct, kw_only=True):
    """What an action makes of the ledger: the intent's fields, the effect, and what failed or is idle.

    outbox: `status` is `kept` where the action says nothing new of an intent. changed_*: older records
    as they are now; removed_*: pristine ones that a success has made idle.
    """

    outbox: dict[str, Any]
    effect: ToolEffect
    compensation: Compensation | None = None
    dead_letter: DeadLetter | None = None
    changed_compensations: list[Compensation] = []
    changed_dead_letters: list[DeadLetter] = []
    removed_compensations: list[Compensation] = []
    removed_dead_letters: list[DeadLetter] = []


def check_action(action: ExternalAction) -> None:
    """InvalidInput, naming the field, for an action that cannot be recorded."""
    for field in ("action_id", "operation", "status"):
        codec.check_text(getattr(action, field), field)
    for field in ("idempotency_key", "routine_run_id", "context_run_id", "source_kind"):
        value = getattr(action, field)
        if value is not None and value.strip():
            codec.check_text(value, field)
    for field in ("created_at_ms", "updated_at_ms"):
        codec.check_whole(getattr(action, field), field, 0, codec.INSTANT_MS_MAX)
    if action.metadata is not None:
        codec.canonical_json(action.metadata, "metadata", bytes_max=codec.PAYLOAD_BYTES_MAX)
    if action.receipt is not None:
        codec.canonical_json(action.receipt, "receipt", bytes_max=codec.PAYLOAD_BYTES_MAX)


def effect_status(action: ExternalAction) -> str:
    """What an action's status means for its effect; an error always means that it failed."""
    if action.error is not None and action.error.strip():
        return "failed"
    word = codec.normalised(action.status)
    if word in _SUCCEEDED:
        return "succeeded"
    if word in _PENDING:
        return "pending"
    return "failed" if word in _FAILED else "unknown"


def suffix_of(action: ExternalAction) -> str:
    """What the ids of an action's rows end with."""
    key = (action.idempotency_key or "").strip()
    return short16(codec.hash_terminated([key])) if key else action.action_id


def run_of(action: ExternalAction) -> str | None:
    """The run of an action: as its metadata says, else its routine's, else its context's."""
    metadata = _object(action.metadata)
    for field in _RUN_FIELDS:
        if (text := _text(metadata.get(field))) is not None:
            return text
    if action.routine_run_id is not None and (text := action.routine_run_id.strip()):
        return text
    context = (action.context_run_id or "").strip()
    for prefix in _RUN_PREFIXES:
        if context.startswith(prefix):
            return context.removeprefix(prefix) or None
    return context or None


def compensation_id_of(action: ExternalAction) -> str | None:
    """The id of the compensation that a failed action asks for; None where it asks for none."""
    told = _compensation(action)
    if told is None:
        return None
    return _either(_object(told), "compensation_id") or f"compensation-effect-{suffix_of(action)}"


def _compensation(action: ExternalAction) -> Any:
    metadata = _object(action.metadata)
    told = metadata.get("compensation")
    return metadata.get("compensation_policy") if told is None else told


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str | None:
    """A JSON scalar as text, trimmed; None for a blank one and for all else."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, float)):
        return str(value).strip() or None
    return None


def _either(metadata: Mapping[str, Any], *names: str) -> str | None:
    for name in names:
        if isinstance(value := metadata.get(name), str) and value.strip():
            return value
    return None


def bridge(
    scope: StatefulRuntimeScope,
    action: ExternalAction,
    *,
    existing: Mapping[str, Any] | None,
    dead_letters: Iterable[DeadLetter],
    compensations: Iterable[Compensation],
) -> Bridged:
    """What an action makes of the ledger.

    existing: the fields of the intent that has the same id, if any. dead_letters, compensations: those
    that are about this effect, and those that have the ids that a failure would take.
    """
    suffix, status, run = suffix_of(action), effect_status(action), run_of(action)
    outbox_id, effect_id = f"outbox-{suffix}", f"effect-{suffix}"
    metadata = _object(action.metadata)
    given = metadata.get("input", metadata.get("args"))
    input_digest = None if given is None else digest(given)
    attempt = metadata.get("attempt")
    attempts = attempt if type(attempt) is int and 0 <= attempt < 2**32 else 1
    decision = _either(metadata, "policyDecisionID", "policy_decision_id")
    assertion = _either(metadata, "contextAssertionID", "context_assertion_id")
    outbox: dict[str, Any] = {
        "outbox_id": outbox_id,
        "run_id": run,
        "scope": msgspec.to_builtins(scope),
        "operation": action.operation,
        "status": _OUTBOX_STATUS.get(status, "pending"),
        "source_kind": action.source_kind,
        "source_id": action.source_id,
        "node_id": _either(metadata, "nodeID", "node_id"),
        "provider": action.provider,
        "tool": _either(metadata, "tool") or action.capability_id,
        "target": action.target,
        "idempotency_key": action.idempotency_key,
        "payload_digest": input_digest,
        "policy_decision_id": decision,
        "context_assertion_id": assertion,
        "effect_id": effect_id,
        "receipt_id": effect_id,
        "attempts": attempts,
        "created_at_ms": action.created_at_ms,
        "updated_at_ms": action.updated_at_ms,
        "metadata": {
            "bridged_from": "external_action_record",
            "observed_after_execution": True,
            "external_action_id": action.action_id,
        },
    }
    effect = _effect(scope, action, outbox, status)
    bridged = Bridged(outbox=outbox, effect=effect)
    if status == "failed":
        _fail(bridged, scope, action, dead_letters, compensations)
    elif status == "succeeded":
        letters = [
            letter
            for letter in dead_letters
            if letter.scope == scope
            and letter.run_id == run
            and letter.source_type == "tool_effect"
            and letter.source_id == effect_id
        ]
        older = [
            compensation
            for compensation in compensations
            if compensation.scope == scope
            and compensation.run_id == run
            and (compensation.target_effect_id == effect_id or compensation.outbox_id == outbox_id)
        ]
        _supersede(bridged, letters, older)
    outbox = {name: value for name, value in bridged.outbox.items() if value is not None}
    bridged.outbox = _reconciled(outbox, existing) if existing else outbox
    return bridged


def _effect(
    scope: StatefulRuntimeScope, action: ExternalAction, outbox: Mapping[str, Any], status: str
) -> ToolEffect:
    receipt = action.receipt
    receipt_digest = None if receipt is None else digest(receipt)
    output = receipt.get("result", receipt) if isinstance(receipt, Mapping) else receipt
    effect_id = outbox["effect_id"]
    return ToolEffect(
        effect_id=effect_id,
        outbox_id=outbox["outbox_id"],
        action_id=action.action_id,
        run_id=outbox["run_id"],
        scope=scope,
        status=status,
        operation=action.operation,
        source_kind=action.source_kind,
        source_id=action.source_id,
        node_id=outbox["node_id"],
        provider=action.provider,
        tool=outbox["tool"],
        target=action.target,
        external_resource={
            "provider": action.provider,
            "target": action.target,
            "capability_id": action.capability_id,
        },
        policy_decision_id=outbox["policy_decision_id"],
        context_assertion_id=outbox["context_assertion_id"],
        input_digest=outbox["payload_digest"],
        output_digest=None if output is None else digest(output),
        receipt_payload_digest=receipt_digest,
        receipt_payload_redacted=None if receipt is None else redacted(receipt),
        receipt_pointer=f"external-action://{action.action_id}",
        redaction_tier="safe_ui",
        audit_hash=codec.hash_terminated(
            [effect_id, action.action_id, action.operation, action.status, receipt_digest or ""]
        ),
        error=action.error,
        created_at_ms=action.created_at_ms,
        updated_at_ms=action.updated_at_ms,
        metadata={
            "approval_state": action.approval_state,
            "idempotency_key": action.idempotency_key,
            "context_run_id": action.context_run_id,
            "routine_run_id": action.routine_run_id,
        },
    )


def _fail(
    bridged: Bridged,
    scope: StatefulRuntimeScope,
    action: ExternalAction,
    dead_letters: Iterable[DeadLetter],
    compensations: Iterable[Compensation],
) -> None:
    """A failure: a dead letter, and a compensation where the action says how. What an operator has
    begun on an earlier failure of the same effect stays (spec 9, hazard 10)."""
    outbox, effect = bridged.outbox, bridged.effect
    asked, compensation_id = _compensation(action), compensation_id_of(action)
    if compensation_id is not None:
        told = _object(asked)
        known = [one for one in compensations if one.compensation_id == compensation_id]
        if known and not _is_pristine_compensation(known[0]):
            if is_superseded(known[0].metadata):
                bridged.changed_compensations.append(
                    msgspec.structs.replace(
                        known[0],
                        metadata=without_mark(known[0].metadata),
                        updated_at_ms=max(known[0].updated_at_ms, action.updated_at_ms),
                    )
                )
        else:
            required = told.get("approval_required")
            bridged.compensation = Compensation(
                compensation_id=compensation_id,
                run_id=effect.run_id,
                scope=scope,
                status="proposed",
                compensation_type=_either(told, "type", "kind") or "operator_review",
                target_effect_id=effect.effect_id,
                outbox_id=effect.outbox_id,
                approval_required=required if isinstance(required, bool) else True,
                policy_decision_id=outbox["policy_decision_id"],
                rollback_instruction=_either(told, "rollback_instruction"),
                forward_fix_instruction=_either(told, "forward_fix_instruction"),
                attempts=0,
                created_at_ms=action.updated_at_ms,
                updated_at_ms=action.updated_at_ms,
                metadata=redacted(asked),
            )
        outbox["compensation_id"] = compensation_id
        bridged.effect = msgspec.structs.replace(effect, compensation_id=compensation_id)
    letter_id = f"dead-letter-{effect.effect_id}"
    outbox["dead_letter_id"] = letter_id
    known_letters = [letter for letter in dead_letters if letter.dead_letter_id == letter_id]
    if known_letters and not _is_pristine_letter(letter := known_letters[0]):
        if is_superseded(letter.metadata):
            # It failed, succeeded and fails again: that is news, whatever was done about the first time.
            bridged.changed_dead_letters.append(
                msgspec.structs.replace(
                    letter,
                    status="open",
                    metadata=without_mark(letter.metadata),
                    updated_at_ms=max(letter.updated_at_ms, action.updated_at_ms),
                )
            )
        return
    bridged.dead_letter = DeadLetter(
        dead_letter_id=letter_id,
        source_type="tool_effect",
        source_id=effect.effect_id,
        run_id=effect.run_id,
        scope=scope,
        reason=_said(action.error) or f"external action `{action.operation}` failed",
        status="open",
        recovery_options=["retry", "ignore", "compensate"],
        payload_pointer=f"external-action://{action.action_id}",
        compensation_id=compensation_id,
        attempts=outbox["attempts"],
        created_at_ms=action.updated_at_ms,
        updated_at_ms=action.updated_at_ms,
        metadata={
            "operation": action.operation,
            "status": action.status,
            "idempotency_key": action.idempotency_key,
        },
    )


def _said(text: str | None) -> str | None:
    return text if text is not None and text.strip() else None


def _is_pristine_letter(letter: DeadLetter) -> bool:
    """Whether nobody has done anything about it yet."""
    return (
        letter.status == "open"
        and letter.operator_disposition is None
        and letter.disposition_reason is None
        and letter.disposition_actor is None
        and letter.disposition_at_ms is None
    )


def _is_pristine_compensation(compensation: Compensation) -> bool:
    return compensation.status == "proposed" and compensation.receipt_effect_id is None


def _supersede(bridged: Bridged, letters: list[DeadLetter], older: list[Compensation]) -> None:
    """A success: what is left of earlier failures goes where nobody touched it, else becomes idle."""
    effect = bridged.effect
    for letter in letters:
        if _is_pristine_letter(letter):
            bridged.removed_dead_letters.append(letter)
            continue
        bridged.changed_dead_letters.append(
            msgspec.structs.replace(
                letter,
                metadata=superseded(letter.metadata, effect),
                updated_at_ms=max(letter.updated_at_ms, effect.updated_at_ms),
            )
        )
    for compensation in older:
        if _is_pristine_compensation(compensation):
            bridged.removed_compensations.append(compensation)
            continue
        bridged.changed_compensations.append(
            msgspec.structs.replace(
                compensation,
                metadata=superseded(compensation.metadata, effect),
                updated_at_ms=max(compensation.updated_at_ms, effect.updated_at_ms),
            )
        )


def _reconciled(outbox: dict[str, Any], existing: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of an intent that was there before, after the call (spec 3.9).

    An action that says nothing final leaves the status to those who know better: it never takes a
    grant from its sender, and never frees what was sent.
    """
    row = dict(outbox)
    if outbox["status"] == "pending":
        row["status"] = "kept"
    before = existing.get("metadata")
    if not isinstance(before, Mapping) or before.get("pre_send_dispatch_gate") is not True:
        return row
    observed = outbox["metadata"].get("observed_after_execution")
    row["created_at_ms"] = min(outbox["created_at_ms"], existing["created_at_ms"])
    row["attempts"] = max(outbox["attempts"], existing.get("attempts", 0))
    for field in ("claimed_by", "claimed_at_ms", "owner"):
        if existing.get(field) is not None:
            row[field] = existing[field]
    for field in ("source_id", "payload_digest"):
        if row.get(field) is None and existing.get(field) is not None:
            row[field] = existing[field]
    # What was there before the call, also where this is the second receipt of it.
    was_reconciled = before.get("reconciled_after_execution") is True
    earlier = before.get("pre_send_metadata") if was_reconciled else before
    row["metadata"] = merged(
        outbox["metadata"],
        {
            "pre_send_dispatch_gate": True,
            "observed_before_execution": True,
            "observed_after_execution": observed if isinstance(observed, bool) else False,
            "reconciled_after_execution": True,
            "pre_send_metadata": earlier,
        },
        wrapped_as="receipt_metadata",
    )
    return row


# --- receipts of a dispatcher, phase by phase (3.7) -----------------------------------------------


def dispatch_receipt(event: LedgerEvent, scope: StatefulRuntimeScope, now_ms: int) -> ToolEffect:
    """The effect that says what a dispatcher told of a call, unredacted as it told it."""
    dispatch_id = event.dispatch_id or codec.hash_terminated(
        [event.tool, event.source.kind, event.payload_digest or ""]
    )
    is_success = event.status == "succeeded"
    phase = event.receipt_phase or ("execution_completed" if is_success else "execution_failed")
    if phase == "execution_started":
        status = "pending"
    elif phase == "policy_decision":
        status = _PHASE_STATUS[event.policy_outcome]
    else:
        status = "succeeded" if is_success else "failed"
    operation = event.canonical_tool or event.tool
    payload = {
        "dispatch_id": dispatch_id,
        "tool": event.tool,
        "canonical_tool": event.canonical_tool,
        "source": msgspec.to_builtins(event.source),
        "policy_outcome": event.policy_outcome,
        "receipt_phase": phase,
        "policy_decision_id": event.policy_decision_id,
        "approval_requirement": event.approval_requirement,
        "status": event.status,
        "error": event.error,
    }
    text = codec.canonical_json(payload, "event", bytes_max=codec.DOCUMENT_BYTES_MAX).decode()
    return ToolEffect(
        effect_id=f"tool-dispatch-{dispatch_id}-{phase}",
        run_id=event.source.run_id,
        scope=scope,
        status=status,
        operation=operation,
        source_kind=event.source.kind,
        source_id=dispatch_id,
        node_id=event.source.node_id,
        tool=event.tool,
        policy_decision_id=event.policy_decision_id,
        input_digest=event.payload_digest,
        receipt_payload_digest=codec.hash_terminated([text]),
        receipt_payload_redacted=payload,
        receipt_pointer=f"tool-dispatch://{dispatch_id}/{phase}",
        redaction_tier="safe_ui",
        audit_hash=codec.hash_terminated(
            [dispatch_id, operation, text, event.payload_digest or ""]
        ),
        error=event.error,
        created_at_ms=now_ms,
        updated_at_ms=now_ms,
        metadata={
            "receipt_source": "central_tool_dispatcher",
            "receipt_phase": phase,
            "scope_allowlist": list(event.scope_allowlist),
        },
    )
