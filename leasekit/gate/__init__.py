"""The gate: before an external side effect its intent is recorded and granted to one sender."""

from leasekit.gate.adapter import GuardedTool
from leasekit.gate.events import LedgerEvent, PreSendEvent, Source
from leasekit.gate.gate import Completion, Gate, Receipt, Resolution
from leasekit.gate.identity import ToolDescriptor, dispatch_id, infer_risk_tier
from leasekit.gate.intent import Fact, Intent, IntentStatus
from leasekit.gate.permit import Permit
from leasekit.gate.reconcile import (
    Question,
    ReconcileCounts,
    Verdict,
    absent,
    applied,
    undecidable,
)

__all__ = [
    "Completion",
    "Fact",
    "Gate",
    "GuardedTool",
    "Intent",
    "IntentStatus",
    "LedgerEvent",
    "Permit",
    "PreSendEvent",
    "Question",
    "Receipt",
    "ReconcileCounts",
    "Resolution",
    "Source",
    "ToolDescriptor",
    "Verdict",
    "absent",
    "applied",
    "dispatch_id",
    "infer_risk_tier",
    "undecidable",
]
