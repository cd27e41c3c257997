"""What the specification's own tests see of the views (spec/reliability 6.11), with their fixtures.

Rows come in pairs, one visible and one of another tenant, on one run id.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import view_records as records

from leasekit import Leasekit, Tenant
from leasekit.ledger.store import Store
from leasekit.views import Catalogue, Filters, RunFilters

RUN = "run-hardening"
NOW = 5_000
HIDDEN = (
    *("wait-hidden", "event-hidden", "snapshot-hidden", "outbox-hidden", "effect-hidden"),
    *("dead-hidden", "comp-hidden", "decision-hidden", "audit.hidden"),
)
NAMES = ("outbox", "tool_effects", "dead_letters", "compensations")
Connect = Callable[..., Awaitable[Leasekit]]


@pytest.fixture
async def pair(connected: Connect, tenant_name: str) -> tuple[Tenant, Tenant]:
    """Tenants A and B, in a part of the server that no other test uses."""
    return tenants(await connected(prefix=tenant_name))


def tenants(kit: Leasekit) -> tuple[Tenant, Tenant]:
    return (
        kit.tenant("org-hardening-a", "workspace-a", actor="operator-a"),
        kit.tenant("org-hardening-b", "workspace-b", actor="operator-b"),
    )


def store_of(tenant: Tenant) -> Store:
    return tenant.views._reader.store


async def write_side(tenant: Tenant, side: str, seq: int) -> None:
    """One row of each kind, named by its side; hidden events and snapshots come second."""
    context, ledger = tenant.context, tenant.ledger
    for _ in range(seq - 1):
        await ledger.events.append(
            records.event(context, RUN, f"event-{side}-before", 1), now_ms=NOW
        )
    await asyncio.gather(
        ledger.waits.upsert(records.wait(context, RUN, f"wait-{side}"), now_ms=NOW),
        ledger.events.append(records.event(context, RUN, f"event-{side}", seq), now_ms=NOW),
        ledger.snapshots.put(records.snapshot(context, RUN, f"snapshot-{side}", seq), now_ms=NOW),
        ledger.effects.upsert(records.effect(context, RUN, f"effect-{side}"), now_ms=NOW),
        ledger.dead_letters.upsert(records.letter(context, RUN, f"dead-{side}"), now_ms=NOW),
        ledger.compensations.upsert(records.compensation(context, RUN, f"comp-{side}"), now_ms=NOW),
        ledger.decisions.record(records.decision(context, RUN, f"decision-{side}"), now_ms=NOW),
        ledger.audit.append(
            f"audit.{side}", {"run_id": RUN, "decision_id": f"decision-{side}"}, now_ms=NOW
        ),
        records.write_outbox(
            store_of(tenant), records.outbox_row(context, RUN, f"outbox-{side}"), now_ms=NOW
        ),
    )


@pytest.fixture
async def sides(pair: tuple[Tenant, Tenant]) -> Tenant:
    """Tenant A, which owns the run, beside B with rows of the same run id."""
    ours, theirs = pair
    await ours.ledger.runs.upsert(records.run(ours.context, RUN), now_ms=NOW)
    await write_side(ours, "visible", 1)
    await write_side(theirs, "hidden", 2)
    return ours


def leaks(body: Any) -> list[str]:
    text = json.dumps(body)
    return [name for name in (*HIDDEN, "org-hardening-b", "workspace-b") if name in text]


# --- the pairs ------------------------------------------------------------------------------------


async def test_observability_shows_one_side(sides: Tenant) -> None:
    body = await sides.views.observability(
        RUN,
        event_limit=10,
        snapshot_limit=10,
        reliability_limit=10,
        audit_limit=10,
        now_ms=NOW,
    )
    assert body is not None
    counted = (
        *("waits", "events", "snapshots", "policy_decisions", *NAMES),
        "protected_audit_events",
    )
    assert {name: body["counts"][name] for name in counted} == dict.fromkeys(counted, 1)
    assert leaks(body) == []
    assert "wait-visible" in json.dumps(body)


async def test_events_show_one_side(sides: Tenant) -> None:
    body = await sides.views.events(RUN, limit=10, now_ms=NOW)
    assert body["count"] == 1
    assert body["events"][0]["event_id"] == "event-visible"
    assert leaks(body) == []


async def test_snapshots_show_one_side(sides: Tenant) -> None:
    body = await sides.views.snapshots(RUN, limit=10, now_ms=NOW)
    assert body["count"] == 1
    assert body["snapshots"][0]["snapshot_id"] == "snapshot-visible"
    assert leaks(body) == []
    assert await sides.views.snapshot(RUN, "snapshot-hidden", now_ms=NOW) is None


async def test_reliability_shows_one_side(sides: Tenant) -> None:
    for body in (
        await sides.views.reliability(limit=10, now_ms=NOW),
        await sides.views.run_reliability(RUN, limit=10, now_ms=NOW),
    ):
        assert body is not None
        assert body["counts"] == dict.fromkeys(NAMES, 1)
        assert leaks(body) == []


async def test_everything_else_shows_one_side(sides: Tenant) -> None:
    """Not among the specification's tests: the list, the detail and the plan."""
    for body in (
        await sides.views.runs(now_ms=NOW),
        await sides.views.run(RUN, now_ms=NOW),
        await sides.views.resume_plan(RUN, now_ms=NOW),
    ):
        assert body is not None
        assert leaks(body) == []


async def test_a_foreign_run_is_a_missing_run(pair: tuple[Tenant, Tenant]) -> None:
    """Nothing tells a run of another tenant from one that nobody has (6.1)."""
    ours, theirs = pair
    await ours.ledger.runs.upsert(records.run(ours.context, RUN), now_ms=NOW)
    views = theirs.views
    for run_id in (RUN, "run-nobody"):
        assert await views.run(run_id, now_ms=NOW) is None
        assert await views.run_reliability(run_id, now_ms=NOW) is None
        assert await views.observability(run_id, now_ms=NOW) is None
        assert await views.resume_plan(run_id, now_ms=NOW) is None
        assert await views.choose(run_id, "abandon_with_audit", now_ms=NOW) is None
        assert (await views.events(run_id, now_ms=NOW))["events"] == []
        assert (await views.snapshots(run_id, now_ms=NOW))["snapshots"] == []


# --- scope filters --------------------------------------------------------------------------------


@pytest.fixture
async def enterprise(connected: Connect, tenant_name: str) -> Tenant:
    """Three workflow runs (finance A, platform A, finance B), and a grant for finance in A."""
    a = records.TenantContext.explicit("org-hardening-a", "workspace-a", "operator-a")
    catalogue = Catalogue(grants=(records.grant(a, "grant-finance", "finance", "repo-finance"),))
    ours, theirs = tenants(await connected(prefix=tenant_name, catalogue=catalogue))
    for tenant, unit, run_id in (
        (ours, "finance", "run-finance"),
        (ours, "platform", "run-platform"),
        (theirs, "finance", "run-finance-hidden"),
    ):
        run = records.workflow_run(tenant.context, run_id, unit, f"repo-{unit}")
        await tenant.ledger.runs.upsert(run, now_ms=NOW)
    return ours


async def test_all_scope_filters_together_show_one_run(enterprise: Tenant) -> None:
    filters = RunFilters(
        org_unit_id="finance",
        data_class="financial_record",
        delegation_grant_id="grant-finance",
        resource_kind="repository",
        resource_id="repo-finance",
        policy_version_id="policy-finance",
    )
    body = await enterprise.views.runs(filters, now_ms=NOW)
    assert [view["run"]["run_id"] for view in body["runs"]] == ["run-finance"]
    assert body["count"] == 1
    [view] = body["runs"]
    assert view["enterprise_scope"]["owning_org_unit_id"] == "finance"
    assert view["enterprise_scope"]["summary"]["delegation_grant_count"] == 1


async def test_a_unit_without_the_data_class_shows_none(enterprise: Tenant) -> None:
    filters = RunFilters(org_unit_id="finance", data_class="credential")
    assert (await enterprise.views.runs(filters, now_ms=NOW))["count"] == 0


async def test_a_run_shows_its_scope(enterprise: Tenant) -> None:
    view = await enterprise.views.run("run-finance", now_ms=NOW)
    assert view is not None
    shown = view["enterprise_scope"]
    assert shown["resource_scope"]["root"]["resource_id"] == "repo-finance"
    assert shown["policy_version_id"] == "policy-finance"
    assert shown["delegation_grant_ids"] == ["grant-finance"]
    assert await enterprise.views.run("run-finance-hidden", now_ms=NOW) is None


async def test_a_scope_that_declares_no_grant_has_none(enterprise: Tenant) -> None:
    """A grant that would authorise a run is no grant of a run that does not name it."""
    context = enterprise.context
    scope = records.scope(context, "finance", grants=[])
    run = records.workflow_run(context, "run-undeclared", "finance", "repo-finance", scope=scope)
    await enterprise.ledger.runs.upsert(run, now_ms=NOW)
    wanted = RunFilters(delegation_grant_id="grant-finance")
    shown = await enterprise.views.runs(wanted, now_ms=NOW)
    assert [view["run"]["run_id"] for view in shown["runs"]] == ["run-finance"]
    view = await enterprise.views.run("run-undeclared", now_ms=NOW)
    assert view is not None
    assert view["enterprise_scope"]["summary"]["org_unit_grant_count"] == 1  # it would


async def test_a_scope_without_unit_rests_on_its_grant(enterprise: Tenant) -> None:
    context = enterprise.context
    scope = records.scope(context, None)
    run = records.workflow_run(context, "run-unitless", None, "repo-finance", scope=scope)
    await enterprise.ledger.runs.upsert(run, now_ms=NOW)
    filters = RunFilters(
        delegation_grant_id="grant-finance", resource_kind="repository", resource_id="repo-finance"
    )
    found = await enterprise.views.runs(filters, now_ms=NOW)
    by_id = {view["run"]["run_id"]: view for view in found["runs"]}
    assert set(by_id) == {"run-finance", "run-unitless"}
    authority = by_id["run-unitless"]["enterprise_scope"]["delegation_grant_authority"]
    assert authority == {"status": "active", "missing_grant_ids": []}


# --- cursors --------------------------------------------------------------------------------------


async def test_a_cursor_moves_its_collection_on(pair: tuple[Tenant, Tenant]) -> None:
    tenant, _ = pair
    context, ledger = tenant.context, tenant.ledger
    for id, at in (("dead-newer", 2_000), ("dead-older", 1_000)):
        row = records.letter(context, RUN, id, created_at_ms=at, updated_at_ms=at)
        await ledger.dead_letters.upsert(row, now_ms=NOW)
    await ledger.effects.upsert(records.effect(context, RUN, "effect-a"), now_ms=NOW)
    await ledger.compensations.upsert(records.compensation(context, RUN, "comp-a"), now_ms=NOW)
    await records.write_outbox(
        store_of(tenant), records.outbox_row(context, RUN, "outbox-a"), now_ms=NOW
    )
    page = await tenant.views.reliability(limit=1, now_ms=NOW)
    assert page["pagination"]["next"]["dead_letters"] == {
        "after_collection": "dead_letters",
        "after_id": "dead-newer",
    }

    second = await tenant.views.reliability(limit=1, after_id="dead-newer", now_ms=NOW)
    assert second["pagination"]["after_collection"] == "dead_letters"
    assert second["counts"] == dict.fromkeys(NAMES, 1)
    assert second["dead_letters"][0]["dead_letter_id"] == "dead-older"

    stale = await tenant.views.reliability(limit=1, after_id="dead-missing", now_ms=NOW)
    assert stale["counts"] == dict.fromkeys(NAMES, 0)
    assert stale["pagination"]["after_collection"] is None
    assert stale["pagination"]["next"] == dict.fromkeys(NAMES)


async def test_an_anchor_beyond_the_thousandth_row_is_found(pair: tuple[Tenant, Tenant]) -> None:
    tenant, _ = pair
    await asyncio.gather(
        *[
            tenant.ledger.dead_letters.upsert(
                records.letter(
                    tenant.context, RUN, f"dead-{at:04d}", created_at_ms=at, updated_at_ms=at
                ),
                now_ms=NOW,
            )
            for at in range(1_005)
        ]
    )
    page = await tenant.views.reliability(limit=1, after_id="dead-0004", now_ms=NOW)
    assert page["pagination"]["after_collection"] == "dead_letters"
    assert page["counts"]["dead_letters"] == 1
    assert page["dead_letters"][0]["dead_letter_id"] == "dead-0003"


async def test_a_bound_on_creation_goes_along_with_the_cursor(pair: tuple[Tenant, Tenant]) -> None:
    tenant, _ = pair
    for id, created, updated in (
        ("first", 3_000, 9_000),
        ("outside", 5_000, 8_500),
        ("second", 2_000, 8_000),
    ):
        row = records.letter(tenant.context, RUN, id, created_at_ms=created, updated_at_ms=updated)
        await tenant.ledger.dead_letters.upsert(row, now_ms=NOW)
    filters = Filters(before_created_at_ms=4_000)
    page = await tenant.views.reliability(filters, limit=1, now_ms=NOW)
    assert [row["dead_letter_id"] for row in page["dead_letters"]] == ["first"]
    cursor = page["pagination"]["next"]["dead_letters"]
    assert cursor == {
        "after_id": "first",
        "after_collection": "dead_letters",
        "before_created_at_ms": 4_000,
    }
    followed = await tenant.views.reliability(
        Filters(before_created_at_ms=cursor["before_created_at_ms"]),
        limit=1,
        after_id=cursor["after_id"],
        after_collection=cursor["after_collection"],
        now_ms=NOW,
    )
    assert followed["counts"]["dead_letters"] == 1
    assert [row["dead_letter_id"] for row in followed["dead_letters"]] == ["second"]


# --- resuming -------------------------------------------------------------------------------------


async def test_a_plan_says_what_is_safe(pair: tuple[Tenant, Tenant]) -> None:
    ours, theirs = pair
    context, ledger = ours.context, ours.ledger
    await ledger.runs.upsert(records.run(context, RUN), now_ms=NOW)
    await write_side(theirs, "hidden", 2)
    await asyncio.gather(
        ledger.effects.upsert(
            records.effect(context, RUN, "effect-sent", status="succeeded", error=None), now_ms=NOW
        ),
        ledger.effects.upsert(records.effect(context, RUN, "effect-failed"), now_ms=NOW),
        ledger.dead_letters.upsert(records.letter(context, RUN, "dead-failed"), now_ms=NOW),
        ledger.dead_letters.upsert(
            records.letter(context, RUN, "dead-superseded", metadata=records.MARK), now_ms=NOW
        ),
        ledger.compensations.upsert(records.compensation(context, RUN, "comp-failed"), now_ms=NOW),
        ledger.compensations.upsert(
            records.compensation(context, RUN, "comp-superseded", metadata=records.MARK),
            now_ms=NOW,
        ),
    )
    plan = await ours.views.resume_plan(RUN, limit=10, now_ms=NOW)
    assert plan is not None
    assert [row["effect_id"] for row in plan["completed_effects"]] == ["effect-sent"]
    assert [row["effect_id"] for row in plan["uncertain_effects"]] == ["effect-failed"]
    assert [row["dead_letter_id"] for row in plan["dead_letters"]] == ["dead-failed"]
    assert [row["compensation_id"] for row in plan["pending_compensations"]] == ["comp-failed"]
    shown = {choice.pop("choice"): choice for choice in plan["operator_choices"]}
    recorded = {"enabled": True, "automatic_dispatch": False}
    assert shown == {
        "abandon_with_audit": {"execution_mode": "audit_disposition_only"} | recorded,
        "resume_from_checkpoint": {"execution_mode": "operator_request_record_only"} | recorded,
        "retry_failed_effect": {"execution_mode": "operator_request_record_only"} | recorded,
        "reconcile_external_effect": {"execution_mode": "operator_request_record_only"} | recorded,
        "compensate_pending_effects": {"execution_mode": "operator_runbook_record_only"} | recorded,
    }
    assert leaks(plan) == []
    assert "superseded" not in json.dumps(plan)


async def test_what_is_superseded_takes_no_room(pair: tuple[Tenant, Tenant]) -> None:
    """The filter comes before the limit: newer rows that are idle hide no active one."""
    tenant, _ = pair
    context, ledger = tenant.context, tenant.ledger
    for state, at, metadata in (("superseded", 2_000, records.MARK), ("active", 1_000, None)):
        times = {"created_at_ms": at, "updated_at_ms": at, "metadata": metadata}
        await ledger.dead_letters.upsert(
            records.letter(context, RUN, f"dead-{state}", **times), now_ms=NOW
        )
        await ledger.compensations.upsert(
            records.compensation(context, RUN, f"comp-{state}", **times), now_ms=NOW
        )
    # No run is needed for the page, but for the plan.
    page = await tenant.views.reliability(Filters(active_only=True), limit=1, now_ms=NOW)
    await ledger.runs.upsert(records.run(context, RUN), now_ms=NOW)
    plan = await tenant.views.resume_plan(RUN, limit=1, now_ms=NOW)
    assert plan is not None
    for letters, compensations in (
        (page["dead_letters"], page["compensations"]),
        (plan["dead_letters"], plan["pending_compensations"]),
    ):
        assert [row["dead_letter_id"] for row in letters] == ["dead-active"]
        assert [row["compensation_id"] for row in compensations] == ["comp-active"]
