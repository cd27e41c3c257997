"""The tool call that the rigs of this folder send through the gate, one key each."""

from __future__ import annotations

from leasekit.gate import LedgerEvent, PreSendEvent, Source

SOURCE = Source(kind="test", run_id="run-1")


def intent_of(key: str) -> PreSendEvent:
    return PreSendEvent(dispatch_id=key, tool="mail.send", source=SOURCE, risk_tier="external_send")


def success_of(key: str) -> LedgerEvent:
    return LedgerEvent(
        dispatch_id=key,
        tool="mail.send",
        source=SOURCE,
        policy_outcome="allowed",
        receipt_phase="execution_completed",
        status="succeeded",
    )
