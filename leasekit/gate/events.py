"""What the gate is told: that a call is about to be made, and what became of it.

A PreSendEvent comes before the call, LedgerEvents after it. Words are plain text here, as they are
in JSON, and `check_event` refuses those that do not exist. No repr shows arguments or error texts.

Source: spec/reliability 3.1, 3.6.
"""

from __future__ import annotations

from typing import Any

import msgspec

from leasekit import codec
from leasekit.errors import InvalidInput
from leasekit.keys import tenant_tag
from leasekit.model import TenantContext

__all__ = [
    "LedgerEvent",
    "PreSendEvent",
    "Source",
    "check_event",
    "is_completion",
    "is_gate_denial",
]

POLICY_OUTCOMES = ("allowed", "denied", "approval_required")
STATUSES = ("succeeded", "failed", "blocked")
TERMINAL_PHASES = ("execution_completed", "execution_failed")
RECEIPT_PHASES = ("policy_decision", "execution_started", *TERMINAL_PHASES)

GATE_DENIAL = "ToolDenied { reason: OutboxGate }"
"""What the error of a call holds that the gate itself refused."""

ARGS_BYTES_MAX = codec.PAYLOAD_BYTES_MAX  # Arguments are hashed, never stored.
ALLOWLIST_MAX = 1_000


class Source(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a call comes from (spec/reliability 3.1); each id <= 200 bytes."""

    kind: str
    session_id: str | None = None
    message_id: str | None = None
    run_id: str | None = None
    node_id: str | None = None
    request_id: str | None = None


class PreSendEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A tool call that is about to be made (spec/reliability 3.1).

    dispatch_id: names the call, and is its idempotency key; identity.dispatch_id makes one.
    canonical_tool: the tool's full name where `tool` is an alias, such as `mcp.github.create_issue`.
    args: the call's arguments, a JSON object <= 1 MiB; hashed, never stored, but for the target's name.
    tenant_context: None = the tenant that the event is prepared in.
    scope_allowlist: the tools that the caller may use; empty = all.
    policy_outcome: allowed, denied or approval_required; recorded, never consulted.
    payload_digest: stands for the arguments where it is given.
    external_side_effect, risk_tier: whether the call is gated, see identity.is_gated.
    """

    dispatch_id: str
    tool: str
    source: Source
    canonical_tool: str | None = None
    args: dict[str, Any] | None = None
    tenant_context: TenantContext | None = None
    scope_allowlist: list[str] = []
    policy_outcome: str = "allowed"
    policy_decision_id: str | None = None
    payload_digest: str | None = None
    external_side_effect: bool = False
    risk_tier: str | None = None

    def __repr__(self) -> str:
        return f"<PreSendEvent {self.dispatch_id} {self.tool}>"


class LedgerEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What happened to a tool call (spec/reliability 3.1).

    receipt_phase: policy_decision, execution_started, execution_completed or execution_failed; only
    the last two complete an intent. None: the event is a completion.
    approval_requirement: the approval that a policy asked for, a JSON object <= 64 KiB.
    status: succeeded, failed or blocked. error: any text; what stores it cuts it.
    The other fields are those of PreSendEvent.
    """

    tool: str
    source: Source
    policy_outcome: str
    status: str
    dispatch_id: str | None = None
    canonical_tool: str | None = None
    tenant_context: TenantContext | None = None
    scope_allowlist: list[str] = []
    receipt_phase: str | None = None
    policy_decision_id: str | None = None
    approval_requirement: dict[str, Any] | None = None
    payload_digest: str | None = None
    error: str | None = None

    def __repr__(self) -> str:
        phase = f" {self.receipt_phase}" if self.receipt_phase else ""
        return f"<LedgerEvent {self.dispatch_id} {self.tool}{phase} {self.status}>"


def is_gate_denial(event: LedgerEvent) -> bool:
    """Whether it reports that the gate itself refused the call, so that the intent is another's."""
    return event.status == "blocked" and event.error is not None and GATE_DENIAL in event.error


def is_completion(event: LedgerEvent) -> bool:
    """Whether it may complete an intent (spec/reliability 3.6); most blocked ones still do not."""
    return (
        event.dispatch_id is not None
        and (event.receipt_phase is None or event.receipt_phase in TERMINAL_PHASES)
        and not is_gate_denial(event)
    )


def check_event(event: PreSendEvent | LedgerEvent) -> None:
    """InvalidInput, naming field and limit, for an event that has a wrong value in any field."""
    if not isinstance(event, (PreSendEvent, LedgerEvent)):
        raise InvalidInput(
            f"event must be a PreSendEvent or a LedgerEvent, not {type(event).__name__}",
            field="event",
        )
    if isinstance(event, PreSendEvent):
        codec.check_text(event.dispatch_id, "dispatch_id")
    else:
        _check_optional(event.dispatch_id, "dispatch_id")
    codec.check_text(event.tool, "tool")
    _check_optional(event.canonical_tool, "canonical_tool")
    _check_source(event.source)
    _check_tenant(event.tenant_context)
    _check_allowlist(event.scope_allowlist)
    _check_word(event.policy_outcome, "policy_outcome", POLICY_OUTCOMES)
    _check_optional(event.policy_decision_id, "policy_decision_id")
    _check_optional(event.payload_digest, "payload_digest")
    if isinstance(event, PreSendEvent):
        _check_object(event.args, "args", ARGS_BYTES_MAX)
        if not isinstance(event.external_side_effect, bool):
            kind = type(event.external_side_effect).__name__
            raise InvalidInput(
                f"external_side_effect must be True or False, not {kind}",
                field="external_side_effect",
            )
        _check_optional(event.risk_tier, "risk_tier")
    else:
        _check_word(event.status, "status", STATUSES)
        if event.receipt_phase is not None:
            _check_word(event.receipt_phase, "receipt_phase", RECEIPT_PHASES)
        _check_object(event.approval_requirement, "approval_requirement", codec.DOCUMENT_BYTES_MAX)
        # A completion must not fail for the length of its error text.
        if event.error is not None and not isinstance(event.error, str):
            raise InvalidInput(
                f"error must be text, not {type(event.error).__name__}", field="error"
            )


def _check_optional(value: object, field: str) -> None:
    if value is not None:
        codec.check_text(value, field)


def _check_word(value: object, field: str, words: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise InvalidInput(f"{field} must be text, not {type(value).__name__}", field=field)
    if value not in words:
        raise InvalidInput(
            f"{field} must be one of {', '.join(words)}", field=field, limit=len(words)
        )


def _check_object(value: object, field: str, bytes_max: int) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise InvalidInput(
            f"{field} must be a JSON object, not {type(value).__name__}", field=field
        )
    codec.canonical_json(value, field, bytes_max=bytes_max)


def _check_source(source: object) -> None:
    if not isinstance(source, Source):
        raise InvalidInput(f"source must be a Source, not {type(source).__name__}", field="source")
    codec.check_text(source.kind, "source.kind")
    _check_optional(source.session_id, "source.session_id")
    _check_optional(source.message_id, "source.message_id")
    _check_optional(source.run_id, "source.run_id")
    _check_optional(source.node_id, "source.node_id")
    _check_optional(source.request_id, "source.request_id")


def _check_tenant(context: object) -> None:
    if context is None:
        return
    if not isinstance(context, TenantContext):
        raise InvalidInput(
            f"tenant_context must be a TenantContext, not {type(context).__name__}",
            field="tenant_context",
        )
    tenant_tag(context.org_id, context.workspace_id, context.deployment_id)
    _check_optional(context.actor_id, "tenant_context.actor_id")


def _check_allowlist(patterns: object) -> None:
    # A single text would be taken for the list of its characters.
    if not isinstance(patterns, (list, tuple)):
        raise InvalidInput(
            f"scope_allowlist must be a list of text, not {type(patterns).__name__}",
            field="scope_allowlist",
        )
    if len(patterns) > ALLOWLIST_MAX:
        raise InvalidInput(
            f"scope_allowlist names {len(patterns)} tools; at most {ALLOWLIST_MAX}",
            field="scope_allowlist",
            limit=ALLOWLIST_MAX,
        )
    for number, pattern in enumerate(patterns):
        codec.check_text(pattern, f"scope_allowlist[{number}]")
