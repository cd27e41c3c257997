"""The phases of a run, and which may follow which.

Source: spec/reliability 5.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from leasekit.errors import Conflict, InvalidInput
from leasekit.ledger.records import PhaseTransition, Run, RunSnapshot
from leasekit.ledger.redaction import merged

__all__ = [
    "ALLOWED_NEXT",
    "PHASE_OF",
    "check_status",
    "derived",
    "filled",
    "observed",
    "refusal",
    "requeued",
    "transition",
    "with_status",
]

OBSERVED = "stateful_runtime.phase.observed"
TRANSITION = "stateful_runtime.phase.transition"
PAUSE_WORDS = frozenset({"pause_reason", "scheduler"})

Phased = TypeVar("Phased", Run, RunSnapshot)

ALLOWED_NEXT: dict[str, tuple[str, ...]] = {
    "created": ("queued", "cancelled"),
    "queued": ("running_phase", "paused_attention_required", "cancelled"),
    "running_phase": (
        *("sleeping", "waiting_webhook", "awaiting_approval", "retrying"),
        *("paused_attention_required", "completed", "failed", "cancelled"),
    ),
    "sleeping": ("running_phase", "paused_attention_required", "cancelled"),
    "waiting_webhook": (
        *("running_phase", "retrying", "paused_attention_required", "failed", "cancelled"),
    ),
    "awaiting_approval": ("running_phase", "paused_attention_required", "failed", "cancelled"),
    "retrying": ("running_phase", "paused_attention_required", "failed", "cancelled"),
    "paused_attention_required": ("queued", "running_phase", "failed", "cancelled"),
    "failed": (),
    "completed": (),
    "cancelled": (),
}

PHASE_OF = {
    "queued": "queued",
    "running": "running_phase",
    "sleeping": "sleeping",
    "awaiting_webhook": "waiting_webhook",
    "awaiting_approval": "awaiting_approval",
    "pausing": "paused_attention_required",
    "paused": "paused_attention_required",
    "blocked": "paused_attention_required",
    "retrying": "retrying",
    "completed": "completed",
    "dry_run": "completed",
    "failed": "failed",
    "dead_lettered": "failed",
    "cancelled": "cancelled",
}


def refusal(before: str, after: str) -> str | None:
    """Why a phase may not follow another, in the words of the specification; None where it may."""
    if after in ALLOWED_NEXT[before]:
        return None
    terminal = "" if ALLOWED_NEXT[before] else "terminal phase "
    return f"workflow phase transition from {terminal}{before} to {after} is not allowed"


def check_status(status: str) -> str:
    """A status that a run may have; InvalidInput for any other word."""
    if status not in PHASE_OF:
        raise InvalidInput(
            f"status must be one of {', '.join(PHASE_OF)}, not {status}: nothing was changed",
            field="status",
        )
    return status


def observed(run_id: str, status: str, at_ms: int, phase_id: str | None = None) -> PhaseTransition:
    """A phase that was found, not entered."""
    phase = PHASE_OF[status]
    return PhaseTransition(
        event_id=f"{run_id}:phase:{phase}:{at_ms}",
        to_phase=phase,
        event_type=OBSERVED,
        occurred_at_ms=at_ms,
        phase_id=phase_id,
        reason=f"observed_status:{status}",
    )


def transition(
    run_id: str,
    before: str,
    status: str,
    at_ms: int,
    *,
    phase_id: str | None = None,
    reason: str | None = None,
) -> PhaseTransition:
    """The step from a phase to that of a status; Conflict where the table does not allow it."""
    after = PHASE_OF[status]
    if (why := refusal(before, after)) is not None:
        raise Conflict(f"{why}: nothing was changed", id=run_id, status=before)
    return PhaseTransition(
        event_id=f"{run_id}:phase_transition:{before}:{after}:{at_ms}",
        from_phase=before,
        to_phase=after,
        event_type=TRANSITION,
        occurred_at_ms=at_ms,
        phase_id=phase_id,
        reason=reason or f"status_transition:{status}",
    )


def derived(
    run_id: str,
    status: str,
    at_ms: int,
    *,
    before: str | None,
    history: list[PhaseTransition],
    phase_id: str | None = None,
    reason: str | None = None,
) -> tuple[str, list[PhaseTransition], list[str]]:
    """Phase, history and allowed next phases of a run that is seen in a status.

    before: its phase so far, None where none is known. Raises Conflict for a step that is not allowed.
    """
    phase = PHASE_OF[status]
    if before is None:
        steps = [observed(run_id, status, at_ms, phase_id)]
    elif before == phase:
        steps = history or [observed(run_id, status, at_ms, phase_id)]
    else:
        step = transition(run_id, before, status, at_ms, phase_id=phase_id, reason=reason)
        steps = [*history, step]
    return phase, steps, list(ALLOWED_NEXT[phase])


def filled(record: Phased, at_ms: int) -> Phased:
    """A run or snapshot whose phase fits its status: one that names no phase, or another status's,
    gets that of its status, as one that was observed (spec 5.4, 7.5). InvalidInput for an unknown
    status."""
    phase = PHASE_OF[check_status(record.status)]
    if record.phase == phase and record.phase_history and record.allowed_next_phases:
        return record
    phase_id = record.current_phase_id if isinstance(record, Run) else record.phase_id
    seen = observed(record.run_id, record.status, at_ms, phase_id)
    history: list[PhaseTransition] = record.phase_history
    return msgspec.structs.replace(
        record,
        phase=phase,
        phase_history=history if history and record.phase == phase else [*history, seen],
        allowed_next_phases=list(ALLOWED_NEXT[phase]),
    )


def requeued(run: Run, now_ms: int, metadata: Mapping[str, Any]) -> Run:
    """A run back in line: no step of its phases, for it goes on where it was once it is claimed.

    Why it paused, and until when, is past; its execution claim is gone, the epoch stays.
    """
    before = run.metadata
    if isinstance(before, Mapping):
        before = {name: value for name, value in before.items() if name not in PAUSE_WORDS}
    return msgspec.structs.replace(
        run,
        status="queued",
        phase="queued",
        allowed_next_phases=list(ALLOWED_NEXT["queued"]),
        execution_claim=None,
        updated_at_ms=now_ms,
        metadata=merged(before, metadata),
    )


def with_status(run: Run, status: str, now_ms: int, *, reason: str | None = None) -> Run:
    """A run in another status, its phase with it; Conflict where its phase does not allow that.

    Whenever a run is not running any more its execution claim is gone; the epoch stays.
    """
    phase, steps, allowed = derived(
        run.run_id,
        status,
        now_ms,
        before=run.phase,
        history=run.phase_history,
        phase_id=run.current_phase_id,
        reason=reason,
    )
    return msgspec.structs.replace(
        run,
        status=status,
        phase=phase,
        phase_history=steps,
        allowed_next_phases=allowed,
        updated_at_ms=now_ms,
        execution_claim=run.execution_claim if status == "running" else None,
    )
