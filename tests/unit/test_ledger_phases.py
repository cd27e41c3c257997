"""Phases of runs, every pair of spec/reliability 5.4."""

from __future__ import annotations

from typing import Any

import pytest

from leasekit import Conflict, InvalidInput
from leasekit.ledger import phases
from leasekit.ledger.records import (
    ExecutionClaim,
    PhaseTransition,
    Run,
    RunSnapshot,
    StatefulRuntimeScope,
)
from leasekit.model import TenantContext

# The table of the specification, word for word.
TABLE = """
created: queued, cancelled
queued: running_phase, paused_attention_required, cancelled
running_phase: sleeping, waiting_webhook, awaiting_approval, retrying, paused_attention_required, \
completed, failed, cancelled
sleeping: running_phase, paused_attention_required, cancelled
waiting_webhook: running_phase, retrying, paused_attention_required, failed, cancelled
awaiting_approval: running_phase, paused_attention_required, failed, cancelled
retrying: running_phase, paused_attention_required, failed, cancelled
paused_attention_required: queued, running_phase, failed, cancelled
failed:
completed:
cancelled:
"""
ALLOWED = {
    phase: [after for after in rest.strip().split(", ") if after]
    for phase, _, rest in (line.partition(":") for line in TABLE.strip().splitlines())
}
PHASE_OF = {
    **{"queued": "queued", "running": "running_phase", "sleeping": "sleeping"},
    **{"awaiting_webhook": "waiting_webhook", "awaiting_approval": "awaiting_approval"},
    **dict.fromkeys(("pausing", "paused", "blocked"), "paused_attention_required"),
    **{"retrying": "retrying", "completed": "completed", "dry_run": "completed"},
    **{"failed": "failed", "dead_lettered": "failed", "cancelled": "cancelled"},
}
SCOPE = StatefulRuntimeScope(tenant_context=TenantContext.explicit("org-a", "workspace-a"))
CLAIM = ExecutionClaim(
    claim_id="c", claimant_id="w", claimed_at_ms=1, lease_expires_at_ms=9, lease_epoch=3
)
KNOWN = PhaseTransition(event_id="e", to_phase="x", event_type="t", occurred_at_ms=1)


def run(status: str, phase: str, **fields: Any) -> Run:
    given: dict[str, Any] = {
        "run_id": "run-a",
        "kind": "workflow",
        "scope": SCOPE,
        "created_at_ms": 1,
        "updated_at_ms": 2,
        "phase_history": [KNOWN],
        "execution_claim": CLAIM,
        "execution_claim_epoch": 3,
    }
    return Run(status=status, phase=phase, **(given | fields))


def test_tables_are_those_of_the_specification() -> None:
    """Which phase may follow which, and the phase of each status."""
    assert {phase: list(after) for phase, after in phases.ALLOWED_NEXT.items()} == ALLOWED
    assert phases.PHASE_OF == PHASE_OF


@pytest.mark.parametrize("before", ALLOWED)
@pytest.mark.parametrize("after", ALLOWED)
def test_every_pair(before: str, after: str) -> None:
    """Allowed, or refused in the words of the specification."""
    terminal = "" if ALLOWED[before] else "terminal phase "
    text = f"workflow phase transition from {terminal}{before} to {after} is not allowed"

    assert phases.refusal(before, after) == (None if after in ALLOWED[before] else text)


@pytest.mark.parametrize("before", ALLOWED)
@pytest.mark.parametrize("status", PHASE_OF)
def test_every_status_after_every_phase(before: str, status: str) -> None:
    """The same phase keeps the history, another one adds a step to it or is refused."""
    after = PHASE_OF[status]
    given = run("queued", before)

    if after != before and after not in ALLOWED[before]:
        with pytest.raises(
            Conflict, match=f"{before} to {after} is not allowed: nothing"
        ) as refused:
            phases.with_status(given, status, 50)
        assert refused.value.status == before
        return
    changed = phases.with_status(given, status, 50)

    assert (changed.status, changed.phase, changed.updated_at_ms) == (status, after, 50)
    assert changed.allowed_next_phases == ALLOWED[after]
    assert changed.phase_history[0] == KNOWN
    assert len(changed.phase_history) == (1 if after == before else 2)
    assert changed.execution_claim == (CLAIM if status == "running" else None)
    assert changed.execution_claim_epoch == 3


def test_observed_phase() -> None:
    assert phases.observed("run-a", "blocked", 50, "step-1") == PhaseTransition(
        event_id="run-a:phase:paused_attention_required:50",
        to_phase="paused_attention_required",
        event_type="stateful_runtime.phase.observed",
        occurred_at_ms=50,
        phase_id="step-1",
        reason="observed_status:blocked",
    )


@pytest.mark.parametrize(
    ("reason", "told"), [("because", "because"), (None, "status_transition:awaiting_webhook")]
)
def test_transition(reason: str | None, told: str) -> None:
    step = phases.transition(
        "run-a", "running_phase", "awaiting_webhook", 50, phase_id="step-1", reason=reason
    )

    assert step == PhaseTransition(
        event_id="run-a:phase_transition:running_phase:waiting_webhook:50",
        from_phase="running_phase",
        to_phase="waiting_webhook",
        event_type="stateful_runtime.phase.transition",
        occurred_at_ms=50,
        phase_id="step-1",
        reason=told,
    )


@pytest.mark.parametrize("history", [[], [KNOWN]])
def test_phase_without_one_before_is_observed(history: list[PhaseTransition]) -> None:
    """Nothing is refused where nothing is known."""
    phase, steps, allowed = phases.derived("r", "running", 50, before=None, history=history)

    assert phase == "running_phase"
    assert steps == [phases.observed("r", "running", 50)]
    assert allowed == ALLOWED["running_phase"]


@pytest.mark.parametrize("history", [[], [KNOWN]])
def test_same_phase_is_observed_only_where_nothing_is_known(
    history: list[PhaseTransition],
) -> None:
    _, steps, _ = phases.derived("r", "failed", 50, before="failed", history=history)

    assert steps == (history or [phases.observed("r", "failed", 50)])


@pytest.mark.parametrize("status", PHASE_OF)
@pytest.mark.parametrize("phase", ALLOWED)
def test_filled_run_has_the_phase_of_its_status(status: str, phase: str) -> None:
    """What is left out, or is another status's, is observed; a history that fits stays."""
    bare = run(status, phase, phase_history=[], current_phase_id="step-1")
    seen = phases.observed("run-a", status, 70, "step-1")

    filled = phases.filled(bare, 70)
    assert (filled.phase, filled.phase_history) == (PHASE_OF[status], [seen])
    assert filled.allowed_next_phases == ALLOWED[PHASE_OF[status]]

    told = phases.filled(run(status, phase, current_phase_id="step-1"), 70)
    fits = phase == PHASE_OF[status]
    assert told.phase == PHASE_OF[status]
    assert told.phase_history == ([KNOWN] if fits else [KNOWN, seen])
    assert told.allowed_next_phases == ALLOWED[PHASE_OF[status]]


def test_filled_snapshot() -> None:
    """A snapshot without phase is one of its status, at its own step."""
    bare = RunSnapshot(
        snapshot_id="s", run_id="r", seq=1, created_at_ms=70, scope=SCOPE, status="paused",
        phase_id="step-1",
    )  # fmt: skip
    filled = phases.filled(bare, bare.created_at_ms)

    assert filled.phase == "paused_attention_required"
    assert filled.phase_history == [phases.observed("r", "paused", 70, "step-1")]
    assert phases.filled(filled, 99) is filled


def test_unknown_status_is_refused() -> None:
    """Before anything is derived from it."""
    for refuse in (lambda: phases.check_status("gone"), lambda: phases.filled(run("gone", "x"), 1)):
        with pytest.raises(InvalidInput, match="not gone: nothing was changed") as refused:
            refuse()
        assert refused.value.field == "status"


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (None, {}),
        ({"x": 1, "pause_reason": "p", "scheduler": {}}, {"x": 1}),
        (5, {"previous_metadata": 5}),
    ],
)
def test_requeued(before: Any, kept: dict[str, Any]) -> None:
    """In line again without a step of its phases: no claim, no pause, the epoch as it was."""
    queued = phases.requeued(run("sleeping", "sleeping", metadata=before), 50, {"why": "so"})

    assert (queued.status, queued.phase, queued.updated_at_ms) == ("queued", "queued", 50)
    assert queued.allowed_next_phases == ALLOWED["queued"]
    assert queued.phase_history == [KNOWN]
    assert (queued.execution_claim, queued.execution_claim_epoch) == (None, 3)
    assert queued.metadata == kept | {"why": "so"}
