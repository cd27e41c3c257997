"""The records of the ledger, field by field as other systems read and write them.

Field names, words and the order of JSON keys are those of spec/reliability 1.3, 1.4, 4.2, 5.1, 5.7, 6.2,
6.12, 7.1 and 7.5. Times are milliseconds. A field that is absent is left out of the JSON, but where the
specification says that it is always written. Enumerations are plain text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from leasekit.model import TenantContext

__all__ = [
    "AuditEvent",
    "AutomationEnterpriseScope",
    "Compensation",
    "DeadLetter",
    "ExecutionClaim",
    "ExternalAction",
    "OrganizationUnit",
    "OrganizationUnitAccessGrant",
    "PhaseTransition",
    "PolicyDecision",
    "PrincipalRef",
    "ResourceRef",
    "ResourceScope",
    "Run",
    "RunEvent",
    "RunSnapshot",
    "SourceBinding",
    "StatefulRuntimeScope",
    "TimeoutPolicy",
    "ToolEffect",
    "Wait",
    "operator_principal",
]

Field = TypeVar("Field")


def _written(value: Field) -> Field:
    """A default that is written all the same; only absent fields are left out."""
    return msgspec.field(default_factory=lambda: value)


def _made(make: Callable[[], Field]) -> Field:
    """The same for what can be changed: made anew each time, and written also where it is empty."""
    return msgspec.field(default_factory=lambda: make())


def _new_list() -> list[Any]:
    return []


# --- scope and authority (spec 1.3, 1.4) ----------------------------------------------------------


class PrincipalRef(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who: a person, a unit, an agent, an automation ..."""

    kind: str
    id: str
    tenant_actor_id: str | None = None
    issuer: str | None = None
    subject: str | None = None


def operator_principal(actor: str | None) -> PrincipalRef:
    """The person at the console; `operator` where no name is given."""
    return PrincipalRef(kind="human_user", id=(actor or "").strip() or "operator")


class PathPart(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    kind: str
    id: str
    name: str | None = None


class ResourceRef(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that can be acted on, or a pattern of such things."""

    organization_id: str
    workspace_id: str
    project_id: str | None = None
    resource_kind: str
    resource_id: str
    parent_path: list[PathPart] = []
    branch_id: str | None = None
    path_prefix: str | None = None


class ResourceScope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a run may act on: a root, and what is allowed and denied besides."""

    root: ResourceRef
    allowed_resources: list[ResourceRef] = []
    denied_resources: list[ResourceRef] = []
    max_depth: int | None = None


class StatefulRuntimeScope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Whose record it is, and under which authority; only the tenant decides who may see it."""

    schema_version: int = _written(1)
    tenant_context: TenantContext
    owning_org_unit_id: str | None = None
    owner_principal: PrincipalRef | None = None
    resource_scope: ResourceScope | None = None
    data_classes: list[str] = []
    risk_tier: str | None = None
    policy_version_id: str | None = None
    delegation_grant_ids: list[str] = []


class OrganizationUnit(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A department, a team ... that owns runs and is granted resources."""

    unit_id: str
    tenant_context: TenantContext
    taxonomy_id: str = _written("organization_unit")
    display_name: str
    kind: str = _written("unspecified")
    parent_unit_id: str | None = None
    state: str = _written("active")
    description: str | None = None
    labels: list[str] = []
    created_by: PrincipalRef
    created_at_ms: int
    updated_at_ms: int


class OrganizationUnitAccessGrant(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a unit may do with a resource."""

    grant_id: str
    tenant_context: TenantContext
    unit: PrincipalRef
    resource: ResourceRef
    effect: str = _written("allow")
    permissions: list[str] = []
    data_classes: list[str] = []
    tool_patterns: list[str] = []
    state: str = _written("active")
    created_at_ms: int
    updated_at_ms: int
    expires_at_ms: int | None = None

    def is_active(self, now_ms: int) -> bool:
        return self.state == "active" and (
            self.expires_at_ms is None or self.expires_at_ms > now_ms
        )


class IngestionPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    allow_indexing: bool = _written(True)
    allow_prompt_context: bool = _written(True)
    require_review: bool = _written(False)
    max_depth: int | None = None


class SourceBinding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A source of knowledge that a connector brings in."""

    binding_id: str
    tenant_context: TenantContext
    connector_id: str
    source_type: str
    native_source_id: str
    source_root_label: str | None = None
    resource_ref: ResourceRef
    data_class: str
    state: str = _written("enabled")
    credential_ref_id: str | None = None
    ingestion_policy: IngestionPolicy = _made(IngestionPolicy)
    created_by: PrincipalRef
    created_at_ms: int
    updated_at_ms: int


class AutomationEnterpriseScope(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The enterprise part of a scope, as automations declare it; all of it optional."""

    owning_org_unit_id: str | None = None
    owner_principal: PrincipalRef | None = None
    resource_scope: ResourceScope | None = None
    data_classes: list[str] = []
    risk_tier: str | None = None
    policy_version_id: str | None = None
    delegation_grant_ids: list[str] = []


# --- what happened, and what is to be done about it (spec 4.2) ------------------------------------


class ToolEffect(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a tool call did outside. status: pending, succeeded, failed, unknown."""

    schema_version: int = _written(1)
    effect_id: str
    outbox_id: str | None = None
    action_id: str | None = None
    run_id: str | None = None
    scope: StatefulRuntimeScope
    status: str
    operation: str
    source_kind: str | None = None
    source_id: str | None = None
    node_id: str | None = None
    provider: str | None = None
    tool: str | None = None
    target: str | None = None
    external_resource: Any = None
    policy_decision_id: str | None = None
    context_assertion_id: str | None = None
    input_digest: str | None = None
    output_digest: str | None = None
    receipt_payload_digest: str | None = None
    receipt_payload_redacted: Any = None
    receipt_pointer: str | None = None
    redaction_tier: str = _written("")
    audit_hash: str
    error: str | None = None
    compensation_id: str | None = None
    created_at_ms: int
    updated_at_ms: int
    metadata: Any = None


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What failed and waits for an operator.

    status: open, retry_requested, retrying, ignored, linked_to_compensation, resolved.
    """

    schema_version: int = _written(1)
    dead_letter_id: str
    source_type: str
    source_id: str
    run_id: str | None = None
    scope: StatefulRuntimeScope
    reason: str
    status: str
    recovery_options: list[str] = _made(_new_list)
    payload_pointer: str | None = None
    compensation_id: str | None = None
    attempts: int = _written(0)
    created_at_ms: int
    updated_at_ms: int
    operator_disposition: str | None = None
    disposition_reason: str | None = None
    disposition_actor: PrincipalRef | None = None
    disposition_at_ms: int | None = None
    metadata: Any = None


class Compensation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an effect is taken back.

    status: proposed, awaiting_approval, approved, running, completed, failed, cancelled.
    """

    schema_version: int = _written(1)
    compensation_id: str
    run_id: str | None = None
    scope: StatefulRuntimeScope
    status: str
    compensation_type: str
    target_effect_id: str | None = None
    outbox_id: str | None = None
    approval_required: bool = _written(False)
    policy_decision_id: str | None = None
    rollback_instruction: str | None = None
    forward_fix_instruction: str | None = None
    receipt_effect_id: str | None = None
    attempts: int = _written(0)
    created_at_ms: int
    updated_at_ms: int
    metadata: Any = None


class ExternalAction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What another system says it did: the input of the bridge."""

    action_id: str
    operation: str
    status: str
    source_kind: str | None = None
    source_id: str | None = None
    routine_run_id: str | None = None
    context_run_id: str | None = None
    capability_id: str | None = None
    provider: str | None = None
    target: str | None = None
    approval_state: str | None = None
    idempotency_key: str | None = None
    receipt: Any = None
    error: str | None = None
    metadata: Any = None
    created_at_ms: int
    updated_at_ms: int


# --- runs (spec 5.1, 5.4, 5.7, 6.2, 7.1, 7.5) -----------------------------------------------------


class TimeoutPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """When a wait gives up, and what that means: cancel, escalate, remind, resume."""

    timeout_at_ms: int
    on_timeout: str
    escalate_to: str | None = None
    remind_every_ms: int | None = None
    metadata: Any = None


class Wait(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a run waits for. status: waiting, claimed, woken, timed_out, escalated, cancelled."""

    schema_version: int = _written(1)
    wait_id: str
    run_id: str
    wait_kind: str
    status: str
    scope: StatefulRuntimeScope
    phase_id: str | None = None
    reason: str | None = None
    created_at_ms: int
    updated_at_ms: int
    wake_at_ms: int | None = None
    timeout_policy: TimeoutPolicy | None = None
    event_seq: int | None = None
    wake_idempotency_key: str | None = None
    claimed_by: str | None = None
    claimed_at_ms: int | None = None
    claim_expires_at_ms: int | None = None
    completed_at_ms: int | None = None
    metadata: Any = None


class PhaseTransition(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of a run from phase to phase, observed or guarded."""

    schema_version: int = _written(1)
    event_id: str
    from_phase: str | None = None
    to_phase: str
    event_type: str
    occurred_at_ms: int
    phase_id: str | None = None
    reason: str | None = None


class ExecutionClaim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who executes a run, until when, and under which epoch: the fence of runs."""

    claim_id: str
    claimant_id: str
    claimed_at_ms: int
    lease_expires_at_ms: int
    lease_epoch: int


class Run(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A run of an automation or a workflow (spec 6.2), with its execution claim (5.7) and, where it is
    known, its checkpoint: lists of nodes, and the last failure."""

    schema_version: int = _written(1)
    run_id: str
    kind: str
    workflow_id: str | None = None
    automation_id: str | None = None
    automation_run_id: str | None = None
    scope: StatefulRuntimeScope
    status: str
    phase: str = _written("created")
    phase_history: list[PhaseTransition] = _made(_new_list)
    allowed_next_phases: list[str] = _made(_new_list)
    trigger_type: str | None = None
    trigger_event: str | None = None
    source_event_id: str | None = None
    task_id: str | None = None
    current_phase_id: str | None = None
    active_wait_kind: str | None = None
    active_wait_id: str | None = None
    workflow_definition_version: str | None = None
    workflow_definition_snapshot_hash: str | None = None
    created_at_ms: int
    updated_at_ms: int
    started_at_ms: int | None = None
    finished_at_ms: int | None = None
    latest_snapshot_id: str | None = None
    related_context_run_ids: list[str] = []
    metadata: Any = None
    execution_claim: ExecutionClaim | None = None
    execution_claim_epoch: int = 0
    checkpoint: Any = None


class RunEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that happened in a run. seq: its place in the run's log, given by the log."""

    schema_version: int = _written(1)
    event_id: str
    run_id: str
    seq: int = _written(0)
    event_type: str
    occurred_at_ms: int
    scope: StatefulRuntimeScope
    actor: PrincipalRef | None = None
    phase_id: str | None = None
    phase_transition: PhaseTransition | None = None
    wait_kind: str | None = None
    causation_id: str | None = None
    correlation_id: str | None = None
    payload: Any = _written(None)


class RunSnapshot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A run as it was at one event."""

    schema_version: int = _written(1)
    snapshot_id: str
    run_id: str
    seq: int
    created_at_ms: int
    scope: StatefulRuntimeScope
    status: str
    phase: str = _written("created")
    phase_history: list[PhaseTransition] = _made(_new_list)
    allowed_next_phases: list[str] = _made(_new_list)
    phase_id: str | None = None
    source_record_kind: str | None = None
    checkpoint: Any = None
    payload_digest: str | None = None
    workflow_definition_version: str | None = None
    workflow_definition_snapshot_hash: str | None = None
    metadata: Any = None


# --- decisions and audit (spec 6.12) --------------------------------------------------------------


class PolicyDecision(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a policy said of a call. decision: allow, deny, approval_required."""

    decision_id: str
    tenant_context: TenantContext
    requester_context: Any = None
    actor_id: str | None = None
    session_id: str | None = None
    message_id: str | None = None
    run_id: str | None = None
    automation_id: str | None = None
    node_id: str | None = None
    tool: str | None = None
    resource: Any = None
    data_classes: list[str] = []
    risk_tier: str | None = None
    decision: str
    reason_code: str
    reason: str
    policy_id: str | None = None
    grant_id: str | None = None
    approval_id: str | None = None
    audit_event_id: str | None = None
    created_at_ms: int
    metadata: Any = None


class AuditEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One link of a tenant's audit chain: `record_hash` covers all of it and the link before."""

    event_id: str
    durability: str = _written("durable_required")
    event_type: str
    tenant_context: TenantContext
    requester_context: Any = None
    actor: str | None = None
    payload: Any = _written(None)
    created_at_ms: int
    seq: int = _written(0)
    prev_hash: str | None = _written(None)
    record_hash: str = _written("")
