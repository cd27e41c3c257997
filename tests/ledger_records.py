"""Records of the ledger's tests: the fixtures of spec/reliability 4.12, changed where a test says so."""

from __future__ import annotations

from typing import Any

from leasekit.ledger import (
    Compensation,
    DeadLetter,
    ExternalAction,
    StatefulRuntimeScope,
    ToolEffect,
)
from leasekit.model import TenantContext

RECEIPT = {
    "result": {"status": "ok"},
    "authorization": "Bearer abc",
    "nested": {"api_key": "secret-value"},
}
COMPENSATION = {
    "type": "operator_review",
    "approval_required": True,
    "rollback_instruction": "undo it",
}


def scope_of(context: TenantContext, **fields: Any) -> StatefulRuntimeScope:
    return StatefulRuntimeScope(tenant_context=context, **fields)


def action(
    action_id: str, status: str = "posted", *, metadata: Any = None, **changes: Any
) -> ExternalAction:
    """The external action of the fixture; metadata: what is added to its own."""
    fields: dict[str, Any] = {
        "operation": "mock_external_action.send",
        "context_run_id": "automation-v2-run-a",
        "idempotency_key": f"idempotency-{action_id}",
        "receipt": RECEIPT,
        "metadata": {
            "automationRunID": "run-a",
            "nodeID": "node-a",
            "attempt": 2,
            "tool": "SendMessage",
            "input": {"message": "hello"},
        }
        | (metadata or {}),
        "created_at_ms": 1_000,
        "updated_at_ms": 2_000,
    }
    return ExternalAction(action_id=action_id, status=status, **(fields | changes))


def failed_action(action_id: str, **changes: Any) -> ExternalAction:
    """An action that failed and says how it is compensated."""
    more = changes.pop("metadata", {})
    return action(action_id, "failed", metadata={"compensation": COMPENSATION} | more, **changes)


def effect(effect_id: str, scope: StatefulRuntimeScope, **changes: Any) -> ToolEffect:
    fields: dict[str, Any] = {
        "run_id": "run-a",
        "status": "succeeded",
        "operation": "op",
        "audit_hash": "hash",
        "created_at_ms": 1_000,
        "updated_at_ms": 2_000,
    }
    return ToolEffect(effect_id=effect_id, scope=scope, **(fields | changes))


def letter(dead_letter_id: str, scope: StatefulRuntimeScope, **changes: Any) -> DeadLetter:
    fields: dict[str, Any] = {
        "run_id": "run-a",
        "source_type": "tool_effect",
        "source_id": "effect-a",
        "reason": "failed",
        "status": "open",
        "recovery_options": ["retry", "ignore"],
        "created_at_ms": 1_000,
        "updated_at_ms": 2_000,
    }
    return DeadLetter(dead_letter_id=dead_letter_id, scope=scope, **(fields | changes))


def compensation(compensation_id: str, scope: StatefulRuntimeScope, **changes: Any) -> Compensation:
    fields: dict[str, Any] = {
        "run_id": "run-a",
        "status": "proposed",
        "compensation_type": "operator_review",
        "created_at_ms": 1_000,
        "updated_at_ms": 2_000,
    }
    return Compensation(compensation_id=compensation_id, scope=scope, **(fields | changes))
