"""Records that the tests of the views read, with the values of spec/reliability 6.11.

Every function takes what a test is about; the rest is filled in as that section has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from leasekit.gate import PreSendEvent, Source
from leasekit.ledger import (
    Compensation,
    DeadLetter,
    OrganizationUnit,
    OrganizationUnitAccessGrant,
    PolicyDecision,
    PrincipalRef,
    ResourceRef,
    ResourceScope,
    Run,
    RunEvent,
    RunSnapshot,
    SourceBinding,
    StatefulRuntimeScope,
    ToolEffect,
    Wait,
)
from leasekit.ledger.ledger import put_intent
from leasekit.ledger.store import Store, Transaction
from leasekit.model import TenantContext

MARK = {
    "superseded_by_success": True,
    "superseded_by_effect_id": "effect-later",
    "superseded_at_ms": 1_900,
}
"""What makes a record superseded (4.7)."""

AUTOMATION = PrincipalRef(kind="automation", id="automation-hardening")


def resource(context: TenantContext, id: str, **fields: Any) -> ResourceRef:
    return ResourceRef(
        **{
            "organization_id": context.org_id,
            "workspace_id": context.workspace_id,
            "resource_kind": "repository",
            "resource_id": id,
        }
        | fields
    )


def scope(
    context: TenantContext,
    unit: str | None = "finance",
    *,
    repository: str | None = "repo-finance",
    grants: Sequence[str] = ("grant-finance",),
) -> StatefulRuntimeScope:
    """The scope of 6.11: owner, org unit, root repository, data class, tier, policy and one grant."""
    return StatefulRuntimeScope(
        tenant_context=context,
        owning_org_unit_id=unit,
        owner_principal=AUTOMATION,
        resource_scope=None
        if repository is None
        else ResourceScope(root=resource(context, repository)),
        data_classes=["financial_record"],
        risk_tier="financial_record_access",
        policy_version_id=f"policy-{unit}",
        delegation_grant_ids=list(grants),
    )


def run(context: TenantContext, run_id: str, **fields: Any) -> Run:
    """A failed automation run with one node in each list of its checkpoint."""
    return Run(
        **{
            "run_id": run_id,
            "kind": "automation_v2",
            "automation_id": "automation-hardening",
            "automation_run_id": run_id,
            "scope": scope(context),
            "status": "failed",
            "created_at_ms": 1_000,
            "updated_at_ms": 2_000,
            "checkpoint": {
                "completed_nodes": ["node-sent"],
                "pending_nodes": ["node-retry"],
                "blocked_nodes": ["node-failed"],
                "last_failure": {"node_id": "node-failed", "reason": "provider timeout"},
            },
        }
        | fields
    )


def workflow_run(
    context: TenantContext, run_id: str, unit: str | None, repository: str, **fields: Any
) -> Run:
    return run(
        context,
        run_id,
        **{
            "kind": "workflow",
            "workflow_id": f"workflow-{unit}",
            "automation_id": None,
            "automation_run_id": None,
            "scope": scope(context, unit, repository=repository, grants=[f"grant-{unit}"]),
            "checkpoint": None,
        }
        | fields,
    )


def wait(context: TenantContext, run_id: str, wait_id: str, **fields: Any) -> Wait:
    return Wait(
        **{
            "wait_id": wait_id,
            "run_id": run_id,
            "wait_kind": "approval",
            "status": "waiting",
            "scope": scope(context),
            "phase_id": "node-failed",
            "created_at_ms": 1_100,
            "updated_at_ms": 1_200,
        }
        | fields
    )


def event(context: TenantContext, run_id: str, event_id: str, seq: int, **fields: Any) -> RunEvent:
    return RunEvent(
        **{
            "event_id": event_id,
            "run_id": run_id,
            "seq": seq,
            "event_type": "runtime.step",
            "occurred_at_ms": 1_250 + seq,
            "scope": scope(context),
        }
        | fields
    )


def snapshot(
    context: TenantContext, run_id: str, snapshot_id: str, seq: int, **fields: Any
) -> RunSnapshot:
    return RunSnapshot(
        **{
            "snapshot_id": snapshot_id,
            "run_id": run_id,
            "seq": seq,
            "created_at_ms": 1_300 + seq,
            "scope": scope(context),
            "status": "failed",
        }
        | fields
    )


def effect(context: TenantContext, run_id: str | None, effect_id: str, **fields: Any) -> ToolEffect:
    return ToolEffect(
        **{
            "effect_id": effect_id,
            "run_id": run_id,
            "scope": scope(context),
            "status": "failed",
            "operation": "mock_external_action.send",
            "source_kind": "automation_v2",
            "audit_hash": f"hash-{effect_id}",
            "error": "provider timeout",
            "created_at_ms": 1_350,
            "updated_at_ms": 1_450,
        }
        | fields
    )


def letter(context: TenantContext, run_id: str | None, id: str, **fields: Any) -> DeadLetter:
    return DeadLetter(
        **{
            "dead_letter_id": id,
            "source_type": "tool_effect",
            "source_id": f"source-of-{id}",
            "run_id": run_id,
            "scope": scope(context),
            "reason": "provider timeout",
            "status": "open",
            "recovery_options": ["retry", "compensate"],
            "attempts": 2,
            "created_at_ms": 1_450,
            "updated_at_ms": 1_460,
        }
        | fields
    )


def compensation(
    context: TenantContext, run_id: str | None, id: str, **fields: Any
) -> Compensation:
    return Compensation(
        **{
            "compensation_id": id,
            "run_id": run_id,
            "scope": scope(context),
            "status": "awaiting_approval",
            "compensation_type": "operator_review",
            "approval_required": True,
            "created_at_ms": 1_460,
            "updated_at_ms": 1_470,
        }
        | fields
    )


def decision(context: TenantContext, run_id: str, id: str, **fields: Any) -> PolicyDecision:
    return PolicyDecision(
        **{
            "decision_id": id,
            "tenant_context": context,
            "run_id": run_id,
            "tool": "SendMessage",
            "decision": "approval_required",
            "reason_code": "tier_requires_approval",
            "reason": "s3cret reason of the policy",
            "created_at_ms": 1_340,
            "metadata": {"s3cret": True},
        }
        | fields
    )


def grant(
    context: TenantContext, id: str, unit: str, repository: str, **fields: Any
) -> OrganizationUnitAccessGrant:
    return OrganizationUnitAccessGrant(
        **{
            "grant_id": id,
            "tenant_context": context,
            "unit": PrincipalRef(kind="organization_unit", id=f"organization_unit/{unit}"),
            "resource": resource(context, repository),
            "permissions": ["execute"],
            "data_classes": ["financial_record"],
            "created_at_ms": 1,
            "updated_at_ms": 1,
        }
        | fields
    )


def unit(context: TenantContext, id: str, **fields: Any) -> OrganizationUnit:
    return OrganizationUnit(
        **{
            "unit_id": id,
            "tenant_context": context,
            "display_name": id.title(),
            "kind": "department",
            "created_by": AUTOMATION,
            "created_at_ms": 1,
            "updated_at_ms": 1,
        }
        | fields
    )


def binding(context: TenantContext, id: str, repository: str, **fields: Any) -> SourceBinding:
    return SourceBinding(
        **{
            "binding_id": id,
            "tenant_context": context,
            "connector_id": "connector-a",
            "source_type": "wiki",
            "native_source_id": f"native-{id}",
            "resource_ref": resource(context, repository),
            "data_class": "customer_data",
            "created_by": AUTOMATION,
            "created_at_ms": 1,
            "updated_at_ms": 1,
        }
        | fields
    )


def outbox_row(
    context: TenantContext, run_id: str | None, outbox_id: str, **fields: Any
) -> dict[str, Any]:
    """The fields of an intent as the ledger writes them."""
    return {
        "schema_version": 1,
        "outbox_id": outbox_id,
        "run_id": run_id,
        "scope": msgspec.to_builtins(scope(context)),
        "operation": "mock_external_action.send",
        "status": "failed",
        "attempts": 2,
        "created_at_ms": 1_350,
        "updated_at_ms": 1_450,
        "metadata": {},
    } | fields


async def write_outbox(store: Store, *rows: dict[str, Any], now_ms: int | None = None) -> None:
    """Write intents that are not there yet, as the ledger does: with times of their own."""

    async def write(transaction: Transaction) -> None:
        for row in rows:
            put_intent(transaction, {k: v for k, v in row.items() if v is not None}, 0)

    await store.transact(write, now_ms=now_ms)


def gate_event(run_id: str, dispatch_id: str) -> PreSendEvent:
    return PreSendEvent(
        dispatch_id=dispatch_id,
        tool="SendMessage",
        source=Source(kind="automation_v2", run_id=run_id),
        external_side_effect=True,
    )
