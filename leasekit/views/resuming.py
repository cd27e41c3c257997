"""How a run may be resumed: the plan, and what a choice of the operator means.

Pure functions. Where two versions of the specification differ, the plan says what the older one's tests
see (Decisions in the README).

Source: spec/reliability 6.9, 6.10.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leasekit import codec
from leasekit.errors import LeasekitError
from leasekit.ledger.records import Run
from leasekit.views.observability import ATTENTION
from leasekit.views.runs import run_fields

__all__ = ["Choice", "Missing", "resume_plan"]

_RETRY = frozenset({"retry_failed_effect", "retry_dead_letter"})
_COMPENSATE = frozenset({"compensate_pending_effects", "compensate"})
_REQUEST = frozenset({"resume_from_checkpoint", "reconcile_external_effect"})
_DISMISS = frozenset({"abandon_with_audit", "ignore_dead_letter"})


class Missing(LeasekitError, LookupError):
    """A record that a choice names is not there, for this tenant: nothing was changed; look at the plan
    again. field: `dead_letter_id` or `compensation_id`."""

    def __init__(self, field: str, id: str) -> None:
        noun = field.removesuffix("_id").replace("_", " ")
        super().__init__(
            f"there is no {noun} {id}: nothing was changed; look at the resume plan again", id=id
        )
        self.field = field


class Choice:
    """What a choice means: how it is executed, and what becomes of its dead letter and compensation."""

    def __init__(self, text: str) -> None:
        self.name = codec.normalised(text)

    @property
    def execution_mode(self) -> str:
        if self.name in _RETRY or self.name in _REQUEST:
            return "operator_request_record_only"
        if self.name in _COMPENSATE:
            return "operator_runbook_record_only"
        if self.name in _DISMISS:
            return "audit_disposition_only"
        return "operator_review_record_only"

    @property
    def automatic_dispatch(self) -> bool:
        return False

    @property
    def disposition(self) -> tuple[str, str]:
        """The status and the disposition of a dead letter that is named with it."""
        if self.name in _RETRY or self.name == "resume_from_checkpoint":
            return "retry_requested", "retry_requested"
        if self.name in _COMPENSATE:
            return "linked_to_compensation", "linked_to_compensation"
        if self.name in _DISMISS:
            return "ignored", "ignored"
        return "open", "reviewed"

    @property
    def compensation_status(self) -> str:
        """The status of a compensation that is named with it."""
        if self.name in _COMPENSATE:
            return "awaiting_approval"
        return "cancelled" if self.name == "abandon_with_audit" else "proposed"


def _shown(choice: str) -> dict[str, Any]:
    told = Choice(choice)
    return {
        "choice": choice,
        "enabled": True,
        "execution_mode": told.execution_mode,
        "automatic_dispatch": told.automatic_dispatch,
    }


def resume_plan(
    run: Run,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    now_ms: int,
) -> dict[str, Any]:
    """The whole body of 6.9. rows: what of the run's four collections still waits for somebody."""
    checkpoint = run.checkpoint if isinstance(run.checkpoint, Mapping) else {}
    completed, pending, blocked = (
        list(nodes) if isinstance(nodes := checkpoint.get(name), (list, tuple)) else []
        for name in ("completed_nodes", "pending_nodes", "blocked_nodes")
    )
    effects = rows["tool_effects"]
    done = [effect for effect in effects if effect["status"] == "succeeded"]
    uncertain = [effect for effect in effects if effect["status"] != "succeeded"]
    letters, compensations = list(rows["dead_letters"]), list(rows["compensations"])
    points: list[dict[str, Any]] = [
        *[
            {"kind": "completed_node_boundary", "node_id": node, "resume_after": True}
            for node in completed
        ],
        *[{"kind": "pending_node", "node_id": node, "retry_safe": True} for node in pending],
        *[
            {"kind": "blocked_node", "node_id": node, "requires_operator_review": True}
            for node in blocked
        ],
    ]
    if not points and run.status in ATTENTION:
        points = [{"kind": "run_boundary", "requires_operator_review": True}]
    choices = ["abandon_with_audit"]
    if points:
        choices.append("resume_from_checkpoint")
    if uncertain or letters:
        choices += ["retry_failed_effect", "reconcile_external_effect"]
    if compensations:
        choices.append("compensate_pending_effects")
    return {
        "plan_id": f"resume-plan-{run.run_id}",
        "run_id": run.run_id,
        "generated_at_ms": now_ms,
        "run": run_fields(run, []),
        "run_status": run.status,
        "completed_nodes": completed,
        "pending_nodes": pending,
        "blocked_nodes": blocked,
        "last_failure": checkpoint.get("last_failure"),
        "completed_effects": done,
        "uncertain_effects": uncertain,
        "pending_compensations": compensations,
        "dead_letters": letters,
        "safe_resume_points": points,
        "operator_choices": [_shown(choice) for choice in choices],
        "audit_summary": {
            "completed_effect_count": len(done),
            "uncertain_effect_count": len(uncertain),
            "dead_letter_count": len(letters),
            "pending_compensation_count": len(compensations),
            "requires_operator_review": bool(uncertain or letters or compensations),
        },
    }
