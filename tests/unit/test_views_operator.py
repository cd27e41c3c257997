"""What blocks a run and how it may be resumed (spec/reliability 6.8, 6.9): pure functions over records."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import view_records as records

from leasekit.model import TenantContext
from leasekit.views.observability import mentions, observability
from leasekit.views.resuming import resume_plan

A = TenantContext("org-a", "work-a", None, None, "explicit")
RUN = "run-a"
LIMITS = {"event_limit": 1, "snapshot_limit": 2, "reliability_limit": 3, "audit_limit": 4}
ATTENTION = ["paused", "blocked", "failed", "dead_lettered", "retrying"]
NOTHING: dict[str, list[dict[str, Any]]] = {
    name: [] for name in ("outbox", "tool_effects", "dead_letters", "compensations")
}


def as_json(*rows: msgspec.Struct) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(row) for row in rows]


def observed(run: dict[str, Any] | None = None, **given: Any) -> dict[str, Any]:
    """The body for a run that is well, but for what is given."""
    rows = given.pop("rows", {})
    fields: dict[str, Any] = {
        "waits": [],
        "events": [],
        "snapshots": [],
        "rows": NOTHING | rows,
        "active": NOTHING | given.pop("active", rows),
        "decisions": [],
        "audit": [],
        "limits": LIMITS,
    }
    subject = records.run(A, RUN, **{"status": "running"} | (run or {}))
    return observability(subject, **fields | given)


def reasons(body: dict[str, Any]) -> list[dict[str, Any]]:
    summary = body["operator_summary"]
    assert summary["is_blocked"] is bool(summary["blocking_reasons"])
    found: list[dict[str, Any]] = summary["blocking_reasons"]
    return found


def actions(body: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = body["operator_summary"]["allowed_actions"]
    return found


def test_the_body_has_these_keys() -> None:
    body = observed()
    assert set(body) == {
        *("run_id", "source", "run", "current_wait", "waits", "policy_decisions", "reliability"),
        *("audit", "events", "snapshots", "operator_summary", "counts", "limits"),
    }
    assert body["source"] == "stateful_runtime_observability"
    assert set(body["counts"]) == {
        *("waits", "active_waits", "policy_decisions", "outbox", "tool_effects"),
        *("dead_letters", "compensations", "protected_audit_events", "events", "snapshots"),
    }
    assert set(body["counts"].values()) == {0}
    assert body["limits"] == LIMITS
    assert body["events"] == {"latest": None, "tail": [], "correlation_ids": []}
    assert body["snapshots"] == {"latest": None, "items": []}
    assert body["operator_summary"] == {
        "is_blocked": False,
        "blocking_reasons": [],
        "allowed_actions": [],
    }


def test_reasons_stand_in_the_order_of_looking() -> None:
    rows = {
        "outbox": [{"outbox_id": "o", "status": "failed", "operation": "send"}],
        "tool_effects": as_json(records.effect(A, RUN, "e", compensation_id="c")),
        "dead_letters": as_json(records.letter(A, RUN, "d")),
        "compensations": as_json(records.compensation(A, RUN, "c", target_effect_id="e")),
    }
    body = observed(
        {"status": "failed", "current_phase_id": "p"},
        waits=[records.wait(A, RUN, "w", reason="r")],
        decisions=[records.decision(A, RUN, "x", approval_id="y")],
        rows=rows,
    )
    assert reasons(body) == [
        {"kind": "run_status", "status": "failed", "phase_id": "p"},
        {
            "kind": "active_wait",
            "wait_id": "w",
            "wait_kind": "approval",
            "status": "waiting",
            "phase_id": "node-failed",
            "reason": "r",
        },
        {
            "kind": "policy_decision",
            "decision_id": "x",
            "decision": "approval_required",
            "reason_code": "tier_requires_approval",
            "tool": "SendMessage",
            "approval_id": "y",
        },
        {
            "kind": "outbox",
            "outbox_id": "o",
            "status": "failed",
            "operation": "send",
            "dead_letter_id": None,
        },
        {
            "kind": "tool_effect",
            "effect_id": "e",
            "status": "failed",
            "operation": "mock_external_action.send",
            "compensation_id": "c",
        },
        {
            "kind": "dead_letter",
            "dead_letter_id": "d",
            "source_type": "tool_effect",
            "reason": "provider timeout",
        },
        {
            "kind": "compensation",
            "compensation_id": "c",
            "status": "awaiting_approval",
            "target_effect_id": "e",
            "approval_required": True,
        },
    ]
    assert actions(body) == [
        {"action": "resume_from_checkpoint", "requires_status": ATTENTION},
        {"action": "review_wait", "wait_ids": ["w"]},
        {"action": "approve_or_deny_policy_decision", "approval_refs": ["y"]},
        {"action": "retry_or_reconcile_effect", "effect_ids": ["e"]},
        {"action": "resolve_dead_letter", "dead_letter_ids": ["d"]},
        {"action": "run_or_cancel_compensation", "compensation_ids": ["c"]},
    ]


@pytest.mark.parametrize(
    ("collection", "blocking", "acting", "well"),
    [
        (
            *("outbox", {"pending", "failed", "dead_lettered", "unknown"}, set()),
            {"claimed", "sent", "cancelled"},
        ),
        ("tool_effects", {"failed", "unknown"}, {"failed", "unknown"}, {"pending", "succeeded"}),
        (
            *("dead_letters", {"open"}, {"open"}),
            {"retry_requested", "retrying", "ignored", "linked_to_compensation", "resolved"},
        ),
        (
            "compensations",
            {"proposed", "awaiting_approval", "failed"},
            {"proposed", "awaiting_approval"},
            {"approved", "running"},
        ),
    ],
)
def test_which_rows_block_and_which_are_acted_on(
    collection: str, blocking: set[str], acting: set[str], well: set[str]
) -> None:
    field = {"outbox": "outbox_id", "tool_effects": "effect_id"}.get(
        collection, collection[:-1] + "_id"
    )
    rows = [{field: one, "status": one} for one in sorted(blocking | well)]
    body = observed(rows={collection: rows})
    assert {one[field] for one in reasons(body)} == blocking
    found = [one[name] for one in actions(body) for name in one if name != "action"]
    assert {id for ids in found for id in ids} == acting


def test_letters_and_compensations_block_while_they_are_active() -> None:
    rows = {
        "dead_letters": as_json(records.letter(A, RUN, "d")),
        "compensations": as_json(records.compensation(A, RUN, "c")),
    }
    body = observed(rows=rows, active={})
    assert (reasons(body), actions(body)) == ([], [])
    assert body["counts"]["dead_letters"] == body["counts"]["compensations"] == 1


@pytest.mark.parametrize("status", [*ATTENTION, "running", "queued", "completed", "cancelled"])
def test_which_runs_need_attention(status: str) -> None:
    body = observed({"status": status})
    assert [one["kind"] for one in reasons(body)] == ["run_status"] * (status in ATTENTION)
    assert [one["action"] for one in actions(body)] == ["resume_from_checkpoint"] * (
        status in ATTENTION
    )


@pytest.mark.parametrize(
    ("decision", "blocks", "asks"),
    [("allow", False, False), ("deny", True, False), ("approval_required", True, True)],
)
def test_which_decisions_block(decision: str, blocks: bool, asks: bool) -> None:
    """One that asks without an approval of its own is referred to by its own id."""
    body = observed(decisions=[records.decision(A, RUN, "x", decision=decision)])
    assert bool(reasons(body)) is blocks
    wanted = [{"action": "approve_or_deny_policy_decision", "approval_refs": ["x"]}]
    assert actions(body) == (wanted if asks else [])
    [shown] = body["policy_decisions"]
    assert set(shown) == {
        *("decision_id", "run_id", "automation_id", "node_id", "tool", "decision"),
        *("reason_code", "risk_tier", "policy_id", "grant_id", "approval_id", "audit_event_id"),
        "created_at_ms",
    }


@pytest.mark.parametrize("status", ["waiting", "claimed", "escalated", "woken", "timed_out"])
def test_which_waits_are_active(status: str) -> None:
    """An escalated one is over, but still holds the run up."""
    body = observed(waits=[records.wait(A, RUN, "w", status=status)])
    is_active = status in ("waiting", "claimed", "escalated")
    assert body["counts"]["waits"] == 1
    assert body["counts"]["active_waits"] == len(reasons(body)) == int(is_active)
    assert (body["current_wait"] is not None) is is_active
    assert [wait["wait_id"] for wait in body["waits"]] == ["w"]


def test_a_wait_that_only_the_run_knows_is_made_up() -> None:
    run = {"active_wait_id": "gate", "active_wait_kind": "approval", "current_phase_id": "p"}
    over = records.wait(A, RUN, "gate", status="woken")
    body = observed(run, waits=[over])
    assert (body["counts"]["waits"], body["counts"]["active_waits"]) == (1, 1)
    assert body["current_wait"] == {
        "schema_version": 1,
        "wait_id": "gate",
        "run_id": RUN,
        "wait_kind": "approval",
        "status": "waiting",
        "scope": msgspec.to_builtins(records.scope(A)),
        "phase_id": "p",
        "reason": "run_level_active_wait",
        "created_at_ms": 2_000,
        "updated_at_ms": 2_000,
        "metadata": {"source": "run_record"},
    }
    # It comes last, and not where the wait itself is active.
    both = observed(run, waits=[records.wait(A, RUN, "other")])
    assert both["current_wait"]["wait_id"] == "other"
    assert both["counts"]["active_waits"] == 2
    known = observed(run, waits=[records.wait(A, RUN, "gate")])
    assert known["counts"]["active_waits"] == 1


def test_events_and_snapshots_are_summed_up() -> None:
    body = observed(
        events=[
            records.event(A, RUN, "e1", 1, causation_id="c"),
            records.event(A, RUN, "e2", 2),
            records.event(A, RUN, "e3", 3, correlation_id="k"),
        ],
        snapshots=[records.snapshot(A, RUN, "s1", 1), records.snapshot(A, RUN, "s2", 2)],
    )
    assert body["events"]["latest"] == {
        "event_id": "e3",
        "seq": 3,
        "event_type": "runtime.step",
        "occurred_at_ms": 1_253,
        "phase_id": None,
        "causation_id": None,
        "correlation_id": "k",
    }
    assert body["events"]["correlation_ids"] == [
        {"event_id": "e1", "seq": 1, "causation_id": "c", "correlation_id": None},
        {"event_id": "e3", "seq": 3, "causation_id": None, "correlation_id": "k"},
    ]
    assert [event["seq"] for event in body["events"]["tail"]] == [1, 2, 3]
    assert body["snapshots"]["latest"] == {
        "snapshot_id": "s2",
        "seq": 2,
        "status": "failed",
        "phase": "created",
        "created_at_ms": 1_302,
    }
    assert [snapshot["seq"] for snapshot in body["snapshots"]["items"]] == [1, 2]
    assert body["run"]["latest_snapshot_id"] == "s2"


@pytest.mark.parametrize(
    ("payload", "is_mentioned"),
    [
        ("x", True),
        ({"a": [{"b": ["x"]}]}, True),
        ({"x": 1}, False),
        ({"a": "xx", "b": ["x "]}, False),
        (None, False),
        (5, False),
    ],
)
def test_what_mentions_a_run(payload: Any, is_mentioned: bool) -> None:
    assert mentions(payload, frozenset({"x"})) is is_mentioned


# --- the plan -------------------------------------------------------------------------------------


def plan(rows: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return resume_plan(records.run(A, RUN, **fields), NOTHING | (rows or {}), 5_000)


def choices(body: dict[str, Any]) -> list[str]:
    return [one["choice"] for one in body["operator_choices"]]


def test_the_plan_has_these_keys() -> None:
    body = plan()
    assert body.pop("run")["run_id"] == RUN
    assert body.pop("operator_choices") == [
        {
            "choice": choice,
            "enabled": True,
            "execution_mode": mode,
            "automatic_dispatch": False,
        }
        for choice, mode in (
            ("abandon_with_audit", "audit_disposition_only"),
            ("resume_from_checkpoint", "operator_request_record_only"),
        )
    ]
    assert body == {
        "plan_id": "resume-plan-run-a",
        "run_id": RUN,
        "generated_at_ms": 5_000,
        "run_status": "failed",
        "completed_nodes": ["node-sent"],
        "pending_nodes": ["node-retry"],
        "blocked_nodes": ["node-failed"],
        "last_failure": {"node_id": "node-failed", "reason": "provider timeout"},
        "completed_effects": [],
        "uncertain_effects": [],
        "pending_compensations": [],
        "dead_letters": [],
        "safe_resume_points": [
            {"kind": "completed_node_boundary", "node_id": "node-sent", "resume_after": True},
            {"kind": "pending_node", "node_id": "node-retry", "retry_safe": True},
            {"kind": "blocked_node", "node_id": "node-failed", "requires_operator_review": True},
        ],
        "audit_summary": {
            "completed_effect_count": 0,
            "uncertain_effect_count": 0,
            "dead_letter_count": 0,
            "pending_compensation_count": 0,
            "requires_operator_review": False,
        },
    }


@pytest.mark.parametrize("status", [*ATTENTION, "running", "completed"])
@pytest.mark.parametrize(
    "checkpoint", [None, {}, {"completed_nodes": None}, {"completed_nodes": "odd"}, "odd"]
)
def test_a_run_without_nodes_is_resumed_as_a_whole(status: str, checkpoint: Any) -> None:
    """Where it needs attention; a workflow run has no checkpoint."""
    body = plan(status=status, checkpoint=checkpoint)
    boundary = {"kind": "run_boundary", "requires_operator_review": True}
    needs = status in ATTENTION
    assert body["safe_resume_points"] == [boundary] * needs
    assert choices(body) == ["abandon_with_audit"] + ["resume_from_checkpoint"] * needs
    assert [body[name] for name in ("completed_nodes", "pending_nodes", "blocked_nodes")] == [
        [],
        [],
        [],
    ]
    assert body["last_failure"] is None


@pytest.mark.parametrize(
    ("collection", "status", "added", "needs_review"),
    [
        ("tool_effects", "succeeded", [], False),
        *[
            ("tool_effects", status, ["retry_failed_effect", "reconcile_external_effect"], True)
            for status in ("pending", "failed", "unknown")
        ],
        ("dead_letters", "open", ["retry_failed_effect", "reconcile_external_effect"], True),
        ("compensations", "proposed", ["compensate_pending_effects"], True),
    ],
)
def test_which_choices_there_are(
    collection: str, status: str, added: list[str], needs_review: bool
) -> None:
    body = plan({collection: [{"status": status}]}, status="running", checkpoint=None)
    assert choices(body) == ["abandon_with_audit", *added]
    assert body["audit_summary"]["requires_operator_review"] is needs_review
    counted = body["audit_summary"]
    shown = {
        "completed_effect_count": body["completed_effects"],
        "uncertain_effect_count": body["uncertain_effects"],
        "dead_letter_count": body["dead_letters"],
        "pending_compensation_count": body["pending_compensations"],
    }
    assert {name: counted[name] for name in shown} == {
        name: len(rows) for name, rows in shown.items()
    }
    assert sum(len(rows) for rows in shown.values()) == 1
