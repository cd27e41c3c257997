"""The events of the gate's tests: the fixture of spec/reliability 3.10, changed where a test says so."""

from __future__ import annotations

from typing import Any

from leasekit.gate import LedgerEvent, PreSendEvent, Source

KEY = "tool-dispatch-test"
ID = "outbox-5b0a6f037273d4d4"
TOOL = "mcp.github.create_issue"
ARGS = {"owner_repo": "frumu-ai/tandem", "title": "hello"}
SOURCE = Source(kind="automation_v2", run_id="run-1", node_id="node-1")
FIVE_MINUTES = 300_000


def call(dispatch_id: str = KEY, **changes: Any) -> PreSendEvent:
    """The call of the fixture, about to be made."""
    fields: dict[str, Any] = {
        "tool": TOOL,
        "args": ARGS,
        "source": SOURCE,
        "policy_outcome": "allowed",
        "policy_decision_id": "policy-1",
        "payload_digest": "sha256:payload",
        "external_side_effect": True,
        "risk_tier": "external_send",
    }
    return PreSendEvent(dispatch_id=dispatch_id, **(fields | changes))


def outcome(
    status: str = "succeeded", dispatch_id: str | None = KEY, **changes: Any
) -> LedgerEvent:
    """What became of it."""
    fields: dict[str, Any] = {
        "tool": TOOL,
        "source": SOURCE,
        "policy_outcome": "allowed",
        "policy_decision_id": "policy-1",
        "payload_digest": "sha256:payload",
    }
    return LedgerEvent(status=status, dispatch_id=dispatch_id, **(fields | changes))
