"""Runs as operators see them: lists, details, logs, what blocks them, and what was chosen.

Source: spec/reliability 6.3, 6.4, 6.6, 6.8, 6.9, 6.10.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec
import pytest
import view_records as records
from servers import Server

import leasekit
from leasekit import Conflict, InvalidInput, Tenant
from leasekit.ledger import Run
from leasekit.ledger.redaction import digest
from leasekit.ledger.store import Store
from leasekit.model import TenantContext
from leasekit.views import Catalogue, Missing, RunFilters, Views, views

NOW = 5_000
RUN = "run-a"


async def write_run(tenant: Tenant, run_id: str = RUN, **fields: Any) -> Run:
    return await tenant.ledger.runs.upsert(
        records.run(tenant.context, run_id, **fields), now_ms=NOW
    )


async def listed(tenant: Tenant, limit: int | None = None, **filters: Any) -> list[str]:
    body = await tenant.views.runs(RunFilters(**filters), limit=limit, now_ms=NOW)
    assert body["count"] == len(body["runs"])
    return [view["run"]["run_id"] for view in body["runs"]]


# --- the list -------------------------------------------------------------------------------------


async def test_runs_of_one_instant_stand_by_name(tenant: Tenant) -> None:
    """By the last change, backwards, then by id, forwards; only then is the list cut off."""
    for run_id, at in (("c", 10), ("a", 10), ("B", 10), ("old", 9), ("new", 11)):
        await write_run(tenant, run_id, updated_at_ms=at)
    in_order = ["new", "B", "a", "c", "old"]
    for limit in range(1, 7):
        assert await listed(tenant, limit) == in_order[:limit]
        assert await listed(tenant, limit, status="failed") == in_order[:limit]


async def test_a_list_says_what_it_was_asked(tenant: Tenant) -> None:
    await write_run(tenant)
    body = await tenant.views.runs(RunFilters(status=" Failed", org_id="ALL"), now_ms=NOW)
    assert set(body) == {"runs", "count", "limit", "filters", "source"}
    assert (body["count"], body["limit"], body["source"]) == (1, 250, "stateful_runtime")
    assert body["filters"] == dict.fromkeys(RunFilters.__struct_fields__) | {
        "status": " Failed",
        "org_id": "ALL",
    }
    assert body["runs"][0]["detail_level"] == "list"
    assert not {"events", "snapshots"} & set(body["runs"][0])


async def test_a_filter_finds_what_stands_far_behind(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where few runs fit, all are looked at: a thousand a call, not as many as are wanted."""
    read_page, asked = Store.page, Counter[str]()

    async def page(self: Store, collection: str, *given: Any, **named: Any) -> Any:
        asked[collection] += 1
        return await read_page(self, collection, *given, **named)

    monkeypatch.setattr(Store, "page", page)
    await write_run(tenant, "wanted", updated_at_ms=1, trigger_type="manual")
    for at in range(30):
        await write_run(tenant, f"r{at}", updated_at_ms=100 + at)
    assert await listed(tenant, 1, trigger="manual") == ["wanted"]
    assert asked["runs"] == 1
    assert await listed(tenant, 3) == ["r29", "r28", "r27"]


async def test_a_filter_that_is_no_text_is_refused(tenant: Tenant) -> None:
    with pytest.raises(InvalidInput) as refused:
        await tenant.views.runs(RunFilters(risk_tier=3), now_ms=NOW)  # type: ignore[arg-type]
    assert refused.value.field == "risk_tier"


# --- one run --------------------------------------------------------------------------------------


async def test_a_run_shows_the_last_of_its_log(tenant: Tenant) -> None:
    """50 events and 10 snapshots where nothing else is asked for, both in ascending order."""
    await write_run(tenant)
    for seq in range(1, 53):
        event = records.event(tenant.context, RUN, f"e{seq}", seq)
        await tenant.ledger.events.append(event, now_ms=NOW)
    for seq in range(1, 13):
        snapshot = records.snapshot(tenant.context, RUN, f"s{seq}", seq)
        await tenant.ledger.snapshots.put(snapshot, now_ms=NOW)
    view = await tenant.views.run(RUN, now_ms=NOW)
    assert view is not None
    assert [event["seq"] for event in view["events"]] == list(range(3, 53))
    assert [snapshot["seq"] for snapshot in view["snapshots"]] == list(range(3, 13))
    assert view["replay_boundaries"] == {
        "earliest_event_seq": 1,
        "latest_event_seq": 52,
        "latest_snapshot_id": "s12",
        "latest_snapshot_seq": 12,
        "can_replay_from_event_log": True,
        "can_replay_from_snapshot": True,
    }
    assert view["run"]["latest_snapshot_id"] == "s12"
    assert view["latest_event"]["event_id"] == "e52"
    assert view["detail_level"] == "detail"
    few = await tenant.views.run(RUN, event_limit=2, snapshot_limit=0, now_ms=NOW)
    assert few is not None
    assert [event["seq"] for event in few["events"]] == [51, 52]
    assert [snapshot["seq"] for snapshot in few["snapshots"]] == [12]
    in_list = (await tenant.views.runs(now_ms=NOW))["runs"][0]
    for name in ("run", "latest_event", "latest_snapshot", "replay_boundaries"):
        assert in_list[name] == view[name]


async def test_the_current_wait_is_the_first_that_goes_on(
    tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In due order, those without a time last, then by creation and id; where all are over, the last.

    A run of nearly the same name has waits of its own.
    """
    monkeypatch.setattr(views, "WAIT_ROWS", 2)
    await write_run(tenant)

    async def current() -> str | None:
        view = await tenant.views.run(RUN, now_ms=NOW)
        assert view is not None
        wait = view["current_wait"]
        return None if wait is None else wait["wait_id"]

    async def write(wait_id: str, run_id: str = RUN, **fields: Any) -> None:
        wait = records.wait(tenant.context, run_id, wait_id, **fields)
        await tenant.ledger.waits.upsert(wait, now_ms=NOW)

    await write("twin", "RUN_A", wake_at_ms=1)
    assert await current() is None
    for number, created in ((1, 30), (2, 10), (3, 20)):
        await write(f"over-{number}", status="woken", created_at_ms=created)
    await write("over-soon", status="cancelled", wake_at_ms=2)
    assert await current() == "over-1"
    for number, created in ((3, 10), (2, 10), (1, 20)):
        await write(f"on-{number}", created_at_ms=created)
    assert await current() == "on-2"
    await write("on-late", wake_at_ms=900, created_at_ms=99)
    assert await current() == "on-late"
    await write("escalated", status="escalated", wake_at_ms=3)
    assert await current() == "on-late"


# --- logs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "seqs", "limit"),
    [
        ({}, [1, 2, 3, 4, 5, 6], 250),
        ({"limit": 2}, [1, 2], 2),
        ({"tail": 2}, [5, 6], 2),
        ({"tail": 0}, [6], 1),
        ({"tail": 2, "limit": 5}, [5, 6], 2),
        ({"after_seq": 2, "before_seq": 5}, [3, 4], 250),
        ({"after_seq": 2, "limit": 1}, [3], 1),
        ({"before_seq": 5, "tail": 1}, [4], 1),
        ({"after_seq": 6}, [], 250),
        ({"limit": 9_999}, [1, 2, 3, 4, 5, 6], 1_000),
    ],
)
async def test_windows_of_a_log(
    tenant: Tenant, asked: dict[str, int], seqs: list[int], limit: int
) -> None:
    for seq in range(1, 7):
        event = records.event(tenant.context, RUN, f"e{seq}", seq)
        await tenant.ledger.events.append(event, now_ms=NOW)
    body = await tenant.views.events(RUN, **asked, now_ms=NOW)
    assert [event.pop("seq") for event in body.pop("events")] == seqs
    assert body == {
        "run_id": RUN,
        "count": len(seqs),
        "last_seq": seqs[-1] if seqs else None,
        "limit": limit,
        "sequence_scope": "stateful_runtime",
        "event_source": "stateful_runtime",
        "event_authority": "authoritative_runtime_log",
    }


@pytest.mark.parametrize("asked", [{"limit": 25}, {"tail": 25}])
async def test_a_window_of_large_events_is_whole(tenant: Tenant, asked: dict[str, int]) -> None:
    """The log gives no more than 4 MiB at a time; the view shows what it was asked for."""
    for seq in range(1, 27):
        event = records.event(tenant.context, RUN, f"e{seq}", seq, payload="x" * 200_000)
        await tenant.ledger.events.append(event, now_ms=NOW)
    body = await tenant.views.events(RUN, **asked, now_ms=NOW)
    first = 1 if "limit" in asked else 2
    assert [event["seq"] for event in body["events"]] == list(range(first, first + 25))


async def test_snapshots_are_the_newest(tenant: Tenant) -> None:
    for seq in range(1, 5):
        snapshot = records.snapshot(tenant.context, RUN, f"s{seq}", seq)
        await tenant.ledger.snapshots.put(snapshot, now_ms=NOW)
    body = await tenant.views.snapshots(RUN, limit=2, now_ms=NOW)
    assert [snapshot["snapshot_id"] for snapshot in body.pop("snapshots")] == ["s3", "s4"]
    assert body == {"run_id": RUN, "count": 2, "latest_seq": 4, "limit": 2}
    none = await tenant.views.snapshots("run-b", now_ms=NOW)
    assert (none["snapshots"], none["latest_seq"], none["limit"]) == ([], None, 250)
    one = await tenant.views.snapshot(RUN, "s2", now_ms=NOW)
    assert one is not None
    assert set(one) == {"snapshot"}
    assert one["snapshot"]["snapshot_id"] == "s2"
    assert await tenant.views.snapshot("run-b", "s2", now_ms=NOW) is None


# --- what blocks it -------------------------------------------------------------------------------


async def test_an_operator_sees_no_payload_of_the_audit(tenant: Tenant) -> None:
    """Events that name the run, or a decision about it, as a whole value; only digests are shown."""
    await write_run(tenant)
    await tenant.ledger.decisions.record(
        records.decision(tenant.context, RUN, "decision-1"), now_ms=NOW
    )
    payloads: list[Any] = [
        {"deep": [{"at": RUN}]},
        {"by": "decision-1", "s3cret": 1},
        RUN,
        {RUN: "a key is no value"},
        {"text": f"part of {RUN}"},
        {"other": "decision-2"},
        None,
    ]
    for number, payload in enumerate(payloads):
        await tenant.ledger.audit.append(
            "audit.test", payload, event_id=f"a{number}", now_ms=NOW + number
        )
    body = await tenant.views.observability(RUN, now_ms=NOW)
    assert body is not None
    shown = body["audit"]["protected_events"]
    assert [event["event_id"] for event in shown] == ["a0", "a1", "a2"]
    assert [event["payload_digest"] for event in shown] == [digest(one) for one in payloads[:3]]
    assert set(shown[0]) == {
        *("event_id", "event_type", "created_at_ms", "seq", "record_hash", "actor"),
        "payload_digest",
    }
    assert body["audit"]["payload_policy"] == "redacted_payload_digest_only"
    assert "s3cret" not in json.dumps(body)  # nor a decision's reason or metadata
    last = await tenant.views.observability(RUN, audit_limit=2, now_ms=NOW)
    assert last is not None
    assert [event["event_id"] for event in last["audit"]["protected_events"]] == ["a1", "a2"]


@pytest.mark.parametrize("harm", ["change", "remove", "remove the first", "remove the last", "add"])
async def test_a_broken_audit_chain_shows_nothing(
    server: Server, tenant: Tenant, tenant_name: str, harm: str
) -> None:
    await write_run(tenant)
    for number in range(5):
        await tenant.ledger.audit.append(
            "audit.test", {"run": RUN}, event_id=f"a{number}", now_ms=NOW
        )
    before = await tenant.views.observability(RUN, now_ms=NOW)
    assert before is not None
    assert before["counts"]["protected_audit_events"] == 5
    key = f"lk:{{{tenant_name}.w}}:ledger"
    number = {"remove the first": 0, "remove the last": 4}.get(harm, 2)
    name = f"audit/a{number}"
    doc = server.raw.hget(f"{key}:docs", name)
    if harm == "change":
        server.raw.hset(f"{key}:docs", name, doc.replace(b"run-a", b"run-A"))
    elif harm == "add":
        first = server.raw.hget(f"{key}:docs", "audit/a0")
        server.raw.hset(f"{key}:docs", "audit/a9", first)
        server.raw.zadd(f"{key}:index", {"audit|0000000000000006|a9": 0})
    else:
        server.raw.hdel(f"{key}:docs", name)
        server.raw.zrem(f"{key}:index", f"audit|{number + 1:016d}|a{number}")
    body = await tenant.views.observability(RUN, now_ms=NOW)
    assert body is not None
    assert body["audit"]["protected_events"] == []
    assert body["counts"]["protected_audit_events"] == 0


@pytest.mark.parametrize(("given", "used"), [(None, 100), (0, 1), (501, 500)])
async def test_limits_of_observability(tenant: Tenant, given: int | None, used: int) -> None:
    await write_run(tenant)
    names = ("event_limit", "snapshot_limit", "reliability_limit", "audit_limit")
    for name in names:
        body = await tenant.views.observability(RUN, **{name: given}, now_ms=NOW)
        assert body is not None
        assert body["limits"] == dict.fromkeys(names, 100) | {name: used}


async def test_active_recovery_is_seen_behind_what_is_idle(tenant: Tenant) -> None:
    """Reasons and actions come of what is active, whatever stands before it in the lists."""
    await write_run(tenant)
    for state, at, metadata in (("idle", 2_000, records.MARK), ("active", 1_000, None)):
        await tenant.ledger.dead_letters.upsert(
            records.letter(tenant.context, RUN, state, updated_at_ms=at, metadata=metadata),
            now_ms=NOW,
        )
    body = await tenant.views.observability(RUN, reliability_limit=1, now_ms=NOW)
    assert body is not None
    assert [row["dead_letter_id"] for row in body["reliability"]["dead_letters"]] == ["idle"]
    [reason] = [
        one for one in body["operator_summary"]["blocking_reasons"] if one["kind"] == "dead_letter"
    ]
    assert reason["dead_letter_id"] == "active"


# --- what was chosen ------------------------------------------------------------------------------


async def prepared(tenant: Tenant, status: str = "proposed") -> None:
    await write_run(tenant)
    await tenant.ledger.dead_letters.upsert(records.letter(tenant.context, RUN, "dead"), now_ms=NOW)
    await tenant.ledger.compensations.upsert(
        records.compensation(tenant.context, RUN, "comp", status=status), now_ms=NOW
    )


@pytest.mark.parametrize(
    ("choice", "name", "status", "disposition", "mode"),
    [
        *[
            (choice, name, "retry_requested", "retry_requested", "operator_request_record_only")
            for choice, name in (
                ("retry_failed_effect", "retry_failed_effect"),
                (" Retry-Dead-Letter ", "retry_dead_letter"),
                ("resume_from_checkpoint", "resume_from_checkpoint"),
            )
        ],
        *[
            (
                *(choice, choice, "linked_to_compensation", "linked_to_compensation"),
                "operator_runbook_record_only",
            )
            for choice in ("compensate_pending_effects", "compensate")
        ],
        *[
            (choice, choice, "ignored", "ignored", "audit_disposition_only")
            for choice in ("abandon_with_audit", "ignore_dead_letter")
        ],
        (
            *("reconcile_external_effect", "reconcile_external_effect", "open", "reviewed"),
            "operator_request_record_only",
        ),
        ("Ask-Bob", "ask_bob", "open", "reviewed", "operator_review_record_only"),
    ],
)
async def test_a_choice_disposes_of_its_dead_letter(
    tenant: Tenant, choice: str, name: str, status: str, disposition: str, mode: str
) -> None:
    await prepared(tenant)
    body = await tenant.views.choose(
        RUN,
        choice,
        reason="seen",
        actor_id=" operator-a ",
        dead_letter_id="dead",
        target_effect_id="effect",
        now_ms=NOW,
    )
    letter = await tenant.ledger.dead_letters.get("dead", now_ms=NOW)
    assert letter is not None
    assert (letter.status, letter.operator_disposition) == (status, disposition)
    assert (letter.disposition_reason, letter.disposition_at_ms) == ("seen", NOW)
    assert letter.disposition_actor == records.PrincipalRef(kind="human_user", id="operator-a")
    assert body == {
        "run_id": RUN,
        "choice": name,
        "execution_mode": mode,
        "automatic_dispatch": False,
        "recorded": True,
        "event_seq": 1,
        "disposition": {"dead_letter": msgspec.to_builtins(letter)},
    }
    [event] = (await tenant.views.events(RUN, now_ms=NOW))["events"]
    assert event["event_id"] == f"recovery-choice-{RUN}-{NOW}"
    assert event["event_type"] == "runtime.recovery_choice.recorded"
    assert (event["causation_id"], event["correlation_id"]) == ("dead", "effect")
    assert event["actor"] == {"kind": "human_user", "id": "operator-a"}
    assert event["payload"] == {
        "choice": name,
        "reason": "seen",
        "dead_letter_id": "dead",
        "compensation_id": None,
        "target_effect_id": "effect",
        "execution_mode": mode,
        "automatic_dispatch": False,
        "disposition": body["disposition"],
    }


@pytest.mark.parametrize(
    ("choice", "before", "after"),
    [
        ("compensate", "proposed", "awaiting_approval"),
        ("compensate_pending_effects", "awaiting_approval", "awaiting_approval"),
        ("abandon_with_audit", "awaiting_approval", "cancelled"),
        ("ignore_dead_letter", "proposed", "proposed"),
        ("retry_failed_effect", "proposed", "proposed"),
    ],
)
async def test_a_choice_moves_its_compensation(
    tenant: Tenant, choice: str, before: str, after: str
) -> None:
    await prepared(tenant, before)
    body = await tenant.views.choose(RUN, choice, compensation_id="comp", now_ms=NOW)
    assert body is not None
    assert set(body["disposition"]) == {"previous", "compensation"}
    assert body["disposition"]["previous"] is None
    assert body["disposition"]["compensation"]["status"] == after
    moved = await tenant.ledger.compensations.get("comp", now_ms=NOW)
    assert moved is not None
    assert moved.status == after
    [event] = (await tenant.views.events(RUN, now_ms=NOW))["events"]
    assert event["causation_id"] == "comp"
    both = await tenant.views.choose(
        RUN, choice, dead_letter_id="dead", compensation_id="comp", now_ms=NOW + 1
    )
    assert both is not None
    assert set(both["disposition"]["previous"]) == {"dead_letter"}


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"dead_letter_id": "dead", "compensation_id": "nobody"}, Missing),
        ({"dead_letter_id": "nobody", "compensation_id": "comp"}, Missing),
        # completed -> awaiting_approval is no step of the table
        ({"dead_letter_id": "dead", "compensation_id": "done"}, Conflict),
    ],
)
async def test_a_choice_is_made_whole_or_not_at_all(
    tenant: Tenant, given: dict[str, str], error: type[Exception]
) -> None:
    """What one of the two refuses, the other does not do either; and no event says that it was."""
    await prepared(tenant)
    await tenant.ledger.compensations.upsert(
        records.compensation(tenant.context, RUN, "done", status="completed"), now_ms=NOW
    )
    before = await tenant.views.reliability(now_ms=NOW)
    with pytest.raises(error) as refused:
        await tenant.views.choose(RUN, "compensate", **given, now_ms=NOW + 1)
    assert await tenant.views.reliability(now_ms=NOW) == before
    assert (await tenant.views.events(RUN, now_ms=NOW))["events"] == []
    if isinstance(refused.value, Missing):
        assert given[refused.value.field] == refused.value.id == "nobody"
    else:
        text = "illegal stateful compensation status transition from `completed` to"
        assert text in str(refused.value)


@pytest.mark.parametrize("blank", ["", "  "])
async def test_a_blank_choice_is_refused(tenant: Tenant, blank: str) -> None:
    await prepared(tenant)
    with pytest.raises(InvalidInput, match="choice is required"):
        await tenant.views.choose(RUN, blank, dead_letter_id="dead", now_ms=NOW)


async def test_who_chose(server: Server, tenant_name: str) -> None:
    """Who is named, else who acts for the tenant, else an operator."""
    async with leasekit.connect(server.url, clock="caller") as kit:
        for number, (actor, named, shown) in enumerate(
            (
                (None, None, "operator"),
                ("operator-a", None, "operator-a"),
                ("operator-a", "bob", "bob"),
                ("operator-a", "  ", "operator-a"),
            )
        ):
            tenant = kit.tenant(tenant_name, "w", actor=actor)
            await write_run(tenant)
            await tenant.views.choose(RUN, "wait", actor_id=named, now_ms=NOW + number)
            [event] = (await tenant.views.events(RUN, tail=1, now_ms=NOW))["events"]
            assert event["actor"]["id"] == shown


async def test_a_second_choice_in_a_millisecond_is_not_in_the_log(tenant: Tenant) -> None:
    """It is done all the same (spec 9, hazard 15)."""
    await prepared(tenant)
    first = await tenant.views.choose(RUN, "wait", now_ms=NOW)
    second = await tenant.views.choose(RUN, "ignore_dead_letter", dead_letter_id="dead", now_ms=NOW)
    assert first is not None
    assert second is not None
    assert (first["recorded"], second["recorded"]) == (True, False)
    assert first["event_seq"] == second["event_seq"] == 1
    letter = await tenant.ledger.dead_letters.get("dead", now_ms=NOW)
    assert letter is not None
    assert letter.status == "ignored"


async def test_a_choice_of_a_run_with_a_long_name(tenant: Tenant) -> None:
    """The event's id has the name's digest where the name would not fit into it."""
    run_id = "r" * 200
    await write_run(tenant, run_id)
    body = await tenant.views.choose(run_id, "wait", now_ms=NOW)
    assert body is not None
    assert body["recorded"]
    [event] = (await tenant.views.events(run_id, now_ms=NOW))["events"]
    assert event["event_id"].startswith("recovery-choice-")
    assert event["event_id"].endswith(f"-{NOW}")


@pytest.mark.parametrize("field", ["reason", "actor_id", "dead_letter_id", "target_effect_id"])
async def test_what_does_not_fit_into_the_event_is_refused_first(
    tenant: Tenant, field: str
) -> None:
    await prepared(tenant)
    given = {"dead_letter_id": "dead", field: "x" * 70_000}
    with pytest.raises(InvalidInput) as refused:
        await tenant.views.choose(RUN, "ignore_dead_letter", **given, now_ms=NOW)
    assert refused.value.field == field
    letter = await tenant.ledger.dead_letters.get("dead", now_ms=NOW)
    assert letter is not None
    assert letter.status == "open"


# --- the catalogue --------------------------------------------------------------------------------


async def test_a_catalogue_may_be_asked_each_time(server: Server, tenant_name: str) -> None:
    """`connect` takes it, or what gives it for a tenant; a grant ends on the clock of the call."""
    asked: list[TenantContext] = []

    def catalogue_of(context: TenantContext) -> Catalogue:
        asked.append(context)
        grant = records.grant(context, "g", "finance", "repo-finance", expires_at_ms=NOW + 1)
        return Catalogue(grants=(grant,), units=(records.unit(context, "finance"),))

    async with leasekit.connect(server.url, clock="caller", catalogue=catalogue_of) as kit:
        tenant = kit.tenant(tenant_name, "w", actor="operator-a")
        await write_run(tenant, scope=records.scope(tenant.context, grants=["G"]))
        for now, status in ((NOW, "active"), (NOW + 1, "invalid")):
            view = await tenant.views.run(RUN, now_ms=now)
            assert view is not None
            authority = view["enterprise_scope"]["delegation_grant_authority"]
            assert authority["status"] == status
        assert asked == [tenant.context] * 2
        assert isinstance(tenant.views, Views)
        assert tenant.views.catalogue.units[0].display_name == "Finance"
        with pytest.raises(InvalidInput, match="G"):
            tenant.views.check_authority(
                records.scope(tenant.context, grants=["G"]), now_ms=NOW + 1
            )
        tenant.views.check_authority(records.scope(tenant.context, grants=["G"]), now_ms=NOW)
