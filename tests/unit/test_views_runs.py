"""Which runs a list shows, and how (spec/reliability 6.3, 6.4): pure functions over one run."""

from __future__ import annotations

from typing import Any

import pytest
import view_records as records

from leasekit.ledger import Run, TimeoutPolicy
from leasekit.model import TenantContext
from leasekit.views import Catalogue, RunFilters
from leasekit.views.runs import run_view, shows

NOW = 1_000
A = TenantContext("Org-A", "work_a", "eu", "operator-a", "explicit")
CATALOGUE = Catalogue(
    grants=(records.grant(A, "grant-finance", "finance", "repo-finance"),),
    bindings=(
        records.binding(A, "source-1", "repo-finance"),
        records.binding(A, "source-2", "repo-other", data_class="credential"),
    ),
)


def the_run(**fields: Any) -> Run:
    given = {
        "scope": records.scope(A, "Organization_Unit/Finance"),
        "workflow_id": "Flow-1",
        "trigger_type": "Webhook-In",
        "trigger_event": "issue.opened",
        "source_event_id": "evt_7",
        "phase": "running_phase",
    } | fields
    if "grants" in given:
        given["scope"] = records.scope(A, "finance", grants=given.pop("grants"))
    return records.run(A, "run-a", **given)


@pytest.mark.parametrize(
    ("filters", "is_shown"),
    [
        ({"status": " FAILED"}, True),
        ({"status": "fail"}, False),
        ({"phase": "Running-Phase"}, True),
        ({"phase": "running"}, False),
        ({"trigger": "hook"}, True),
        ({"trigger": "WEBHOOK-in"}, True),
        ({"trigger": "issue."}, True),
        ({"trigger": "EVT-7"}, True),
        ({"trigger": "manual"}, False),
        ({"kind": "automation_v2"}, True),
        ({"kind": "Automation-V2"}, True),
        ({"kind": "automation"}, True),
        ({"kind": "workflow"}, False),
        ({"kind": "context"}, False),
        ({"kind": "unknown"}, False),
        ({"kind": "all"}, True),
        ({"org_id": "org_a"}, True),
        ({"org_id": "org-b"}, False),
        ({"workspace_id": "WORK-A"}, True),
        ({"workspace_id": "work"}, False),
        ({"deployment_id": "EU"}, True),
        ({"deployment_id": "us"}, False),
        ({"workflow_id": "flow_1"}, True),
        ({"workflow_id": "flow"}, False),
        ({"automation_id": "automation-hardening"}, True),
        ({"automation_id": "other"}, False),
        ({"org_unit_id": "finance"}, True),
        ({"org_unit_id": "organization-unit/finance"}, True),
        ({"org_unit_id": "unit/finance"}, False),
        ({"org_unit_id": "organization_unit"}, False),
        ({"owner_id": "Automation_Hardening"}, True),
        ({"owner_id": "bob"}, False),
        ({"owner_kind": "AUTOMATION"}, True),
        ({"owner_kind": "human_user"}, False),
        ({"resource_kind": "repository"}, True),
        ({"resource_kind": "file"}, False),
        ({"resource_id": "repo_finance"}, True),
        ({"resource_id": "repo"}, False),
        ({"policy_version_id": "policy-Organization_Unit/Finance"}, True),
        ({"policy_version_id": "policy"}, False),
        ({"risk_tier": "financial-record-access"}, True),
        ({"risk_tier": "external_send"}, False),
        ({"data_class": "financial-record"}, True),  # of the scope
        ({"data_class": "customer_data"}, True),  # of a source that it may read
        ({"data_class": "credential"}, False),  # of one that it may not
        ({"source_binding_id": "SOURCE_1"}, True),
        ({"source_binding_id": "source-2"}, False),
        ({"status": "", "phase": " ", "org_id": "All", "trigger": "ALL"}, True),
        ({"data_class": "all", "source_binding_id": "", "delegation_grant_id": " "}, True),
        ({"status": "failed", "org_id": "org-b"}, False),
    ],
)
def test_each_filter(filters: dict[str, str], is_shown: bool) -> None:
    assert shows(the_run(), RunFilters(**filters), CATALOGUE, NOW) is is_shown


@pytest.mark.parametrize("field", RunFilters.__struct_fields__)
def test_what_a_run_lacks_fails_its_filter(field: str) -> None:
    bare = records.StatefulRuntimeScope(tenant_context=TenantContext("o", "w"))
    run = Run(
        run_id="r", kind="workflow", scope=bare, status="queued", created_at_ms=1, updated_at_ms=1
    )
    filters = RunFilters(**{field: "something"})
    assert not shows(run, filters, CATALOGUE, NOW)
    assert shows(run, RunFilters(**{field: "all"}), CATALOGUE, NOW)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("automation_v2", {"automation_v2", "automation"}),
        ("workflow", {"workflow"}),
        ("context_run", {"context_run", "context"}),
        ("context", {"context"}),
        ("unknown", {"unknown"}),
    ],
)
def test_kinds_have_other_names(kind: str, wanted: set[str]) -> None:
    names = ("automation_v2", "automation", "workflow", "context_run", "context", "unknown")
    run = the_run(kind=kind)
    assert {name for name in names if shows(run, RunFilters(kind=name), CATALOGUE, NOW)} == wanted


def test_a_grant_must_be_declared_and_authorise() -> None:
    wanted = RunFilters(delegation_grant_id=" GRANT_FINANCE ")
    assert shows(the_run(grants=["Grant-Finance"]), wanted, CATALOGUE, NOW)
    assert not shows(the_run(grants=[]), wanted, CATALOGUE, NOW)
    assert not shows(the_run(grants=["grant-other"]), wanted, CATALOGUE, NOW)
    assert not shows(the_run(grants=["grant-finance"]), wanted, Catalogue(), NOW)


def test_a_view_has_these_keys() -> None:
    policy = TimeoutPolicy(timeout_at_ms=9, on_timeout="remind")
    view = run_view(
        the_run(latest_snapshot_id="own"),
        wait=records.wait(A, "run-a", "w", timeout_policy=policy),
        events=[records.event(A, "run-a", "e", 3)],
        earliest=records.event(A, "run-a", "first", 1),
        snapshots=[records.snapshot(A, "run-a", "s", 2)],
        catalogue=Catalogue(),
        now_ms=NOW,
        is_detail=False,
    )
    assert set(view) == {
        *("run", "current_wait", "latest_event", "latest_snapshot", "enterprise_scope"),
        *("replay_boundaries", "event_source", "event_authority", "detail_level"),
    }
    # A run's own claim and checkpoint are its executor's.
    assert not {"execution_claim", "execution_claim_epoch", "checkpoint"} & set(view["run"])
    assert view["run"]["latest_snapshot_id"] == "own"
    assert view["current_wait"] == {
        "wait_id": "w",
        "wait_kind": "approval",
        "status": "waiting",
        "phase_id": "node-failed",
        "reason": None,
        "wake_at_ms": None,
        "timeout_policy": {"timeout_at_ms": 9, "on_timeout": "remind"},
        "event_seq": None,
    }
    assert view["latest_event"] == {
        "event_id": "e",
        "seq": 3,
        "event_type": "runtime.step",
        "occurred_at_ms": 1_253,
        "phase_id": None,
        "wait_kind": None,
        "authoritative": True,
    }
    assert view["latest_snapshot"] == {
        "snapshot_id": "s",
        "seq": 2,
        "created_at_ms": 1_302,
        "status": "failed",
        "phase": "created",
        "phase_id": None,
        "payload_digest": None,
        "workflow_definition_version": None,
        "workflow_definition_snapshot_hash": None,
    }
    assert view["event_source"] == "stateful_runtime"
    assert view["event_authority"] == "authoritative_runtime_log"


def test_a_run_without_anything_shows_nulls() -> None:
    view = run_view(
        the_run(),
        wait=None,
        events=[],
        earliest=None,
        snapshots=[],
        catalogue=Catalogue(),
        now_ms=NOW,
        is_detail=True,
    )
    assert [view[name] for name in ("current_wait", "latest_event", "latest_snapshot")] == [
        None
    ] * 3
    assert view["replay_boundaries"] == {
        "earliest_event_seq": None,
        "latest_event_seq": None,
        "latest_snapshot_id": None,
        "latest_snapshot_seq": None,
        "can_replay_from_event_log": False,
        "can_replay_from_snapshot": False,
    }
    assert (view["events"], view["snapshots"]) == ([], [])
