"""What an operator sees of one run: what blocks it, and what may be done.

Pure functions over the run's records, which the caller has read for one tenant.

Source: spec/reliability 6.8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from leasekit.ledger.records import (
    AuditEvent,
    PolicyDecision,
    Run,
    RunEvent,
    RunSnapshot,
    Wait,
)
from leasekit.ledger.redaction import digest
from leasekit.views.pages import picked
from leasekit.views.runs import run_fields

__all__ = ["active_waits", "allowed_actions", "blocking_reasons", "mentions", "observability"]

SOURCE = "stateful_runtime_observability"
ATTENTION = ("paused", "blocked", "failed", "dead_lettered", "retrying")
ACTIVE_WAITS = frozenset({"waiting", "claimed", "escalated"})
Rows = Mapping[str, Sequence[Mapping[str, Any]]]


def active_waits(run: Run, waits: Sequence[Wait]) -> list[Wait]:
    """The waits that hold a run up; one that only the run's own record names is made up for it."""
    active = [wait for wait in waits if wait.status in ACTIVE_WAITS]
    known = any(wait.wait_id == run.active_wait_id for wait in active)
    if run.active_wait_id is not None and not known:
        active.append(
            Wait(
                wait_id=run.active_wait_id,
                run_id=run.run_id,
                wait_kind=run.active_wait_kind or "external_condition",
                status="waiting",
                scope=run.scope,
                phase_id=run.current_phase_id,
                reason="run_level_active_wait",
                created_at_ms=run.updated_at_ms,
                updated_at_ms=run.updated_at_ms,
                metadata={"source": "run_record"},
            )
        )
    return active


def mentions(payload: Any, wanted: frozenset[str]) -> bool:
    """Whether a payload holds one of some texts as a whole value, anywhere but as a key."""
    unread = [payload]
    while unread:
        value = unread.pop()
        if isinstance(value, str):
            if value in wanted:
                return True
        elif isinstance(value, Mapping):
            unread += value.values()
        elif isinstance(value, (list, tuple)):
            unread += value
    return False


def blocking_reasons(
    run: Run,
    waits: Iterable[Wait],
    decisions: Iterable[PolicyDecision],
    rows: Rows,
    active: Rows,
) -> list[dict[str, Any]]:
    """Why a run does not go on, in the order in which one looks."""
    reasons: list[dict[str, Any]] = []
    if run.status in ATTENTION:
        reasons.append(
            {"kind": "run_status", "status": run.status, "phase_id": run.current_phase_id}
        )
    for wait in waits:
        fields = picked(wait, "wait_id", "wait_kind", "status", "phase_id", "reason")
        reasons.append({"kind": "active_wait", **fields})
    for decision in decisions:
        if decision.decision in ("deny", "approval_required"):
            fields = picked(
                decision, "decision_id", "decision", "reason_code", "tool", "approval_id"
            )
            reasons.append({"kind": "policy_decision", **fields})
    wanted = (
        (rows["outbox"], "outbox", ("pending", "failed", "dead_lettered", "unknown")),
        (rows["tool_effects"], "tool_effect", ("failed", "unknown")),
        (active["dead_letters"], "dead_letter", ("open",)),
        (active["compensations"], "compensation", ("proposed", "awaiting_approval", "failed")),
    )
    for found, kind, statuses in wanted:
        for row in found:
            if row["status"] in statuses:
                shown = {name: row.get(name) for name in _BLOCKING_FIELDS[kind]}
                reasons.append({"kind": kind, **shown})
    return reasons


_BLOCKING_FIELDS = {
    "outbox": ("outbox_id", "status", "operation", "dead_letter_id"),
    "tool_effect": ("effect_id", "status", "operation", "compensation_id"),
    "dead_letter": ("dead_letter_id", "source_type", "reason"),
    "compensation": ("compensation_id", "status", "target_effect_id", "approval_required"),
}


def allowed_actions(
    run: Run,
    waits: Sequence[Wait],
    decisions: Iterable[PolicyDecision],
    rows: Rows,
    active: Rows,
) -> list[dict[str, Any]]:
    """What an operator may do now, in the order of 6.8."""
    actions: list[dict[str, Any]] = []
    if run.status in ATTENTION:
        actions.append({"action": "resume_from_checkpoint", "requires_status": list(ATTENTION)})
    if waits:
        actions.append({"action": "review_wait", "wait_ids": [wait.wait_id for wait in waits]})
    asked = [
        decision.approval_id or decision.decision_id
        for decision in decisions
        if decision.decision == "approval_required"
    ]
    if asked:
        actions.append({"action": "approve_or_deny_policy_decision", "approval_refs": asked})
    for action, field, found in (
        (
            "retry_or_reconcile_effect",
            "effect_ids",
            _ids(rows["tool_effects"], "effect_id", ("failed", "unknown")),
        ),
        (
            "resolve_dead_letter",
            "dead_letter_ids",
            _ids(active["dead_letters"], "dead_letter_id", ("open",)),
        ),
        (
            "run_or_cancel_compensation",
            "compensation_ids",
            _ids(active["compensations"], "compensation_id", ("proposed", "awaiting_approval")),
        ),
    ):
        if found:
            actions.append({"action": action, field: found})
    return actions


def _ids(rows: Sequence[Mapping[str, Any]], field: str, statuses: tuple[str, ...]) -> list[str]:
    return [row[field] for row in rows if row["status"] in statuses]


def observability(
    run: Run,
    *,
    waits: Sequence[Wait],
    events: Sequence[RunEvent],
    snapshots: Sequence[RunSnapshot],
    rows: Rows,
    active: Rows,
    decisions: Sequence[PolicyDecision],
    audit: Sequence[AuditEvent],
    limits: Mapping[str, int],
) -> dict[str, Any]:
    """The whole body of 6.8. `rows` and `active`: the four collections, and what of them still waits."""
    holding = active_waits(run, waits)
    reasons = blocking_reasons(run, holding, decisions, rows, active)
    latest = events[-1] if events else None
    newest = snapshots[-1] if snapshots else None
    return {
        "run_id": run.run_id,
        "source": SOURCE,
        "run": run_fields(run, snapshots),
        "current_wait": msgspec.to_builtins(holding[0]) if holding else None,
        "waits": msgspec.to_builtins(list(waits)),
        "policy_decisions": [
            picked(
                decision,
                *("decision_id", "run_id", "automation_id", "node_id", "tool", "decision"),
                *("reason_code", "risk_tier", "policy_id", "grant_id", "approval_id"),
                *("audit_event_id", "created_at_ms"),
            )
            for decision in decisions
        ],
        "reliability": {name: list(found) for name, found in rows.items()},
        "audit": {
            "protected_events": [
                picked(
                    event,
                    *("event_id", "event_type", "created_at_ms", "seq", "record_hash", "actor"),
                )
                | {"payload_digest": digest(event.payload)}
                for event in audit
            ],
            "payload_policy": "redacted_payload_digest_only",
        },
        "events": {
            "latest": None
            if latest is None
            else picked(
                latest,
                *("event_id", "seq", "event_type", "occurred_at_ms", "phase_id"),
                *("causation_id", "correlation_id"),
            ),
            "tail": msgspec.to_builtins(list(events)),
            "correlation_ids": [
                picked(event, "event_id", "seq", "causation_id", "correlation_id")
                for event in events
                if event.causation_id is not None or event.correlation_id is not None
            ],
        },
        "snapshots": {
            "latest": None
            if newest is None
            else picked(newest, "snapshot_id", "seq", "status", "phase", "created_at_ms"),
            "items": msgspec.to_builtins(list(snapshots)),
        },
        "operator_summary": {
            "is_blocked": bool(reasons),
            "blocking_reasons": reasons,
            "allowed_actions": allowed_actions(run, holding, decisions, rows, active),
        },
        "counts": {
            "waits": len(waits),
            "active_waits": len(holding),
            "policy_decisions": len(decisions),
            **{name: len(found) for name, found in rows.items()},
            "protected_audit_events": len(audit),
            "events": len(events),
            "snapshots": len(snapshots),
        },
        "limits": dict(limits),
    }
