"""Logs and snapshots of runs on every server: spec/reliability 7.1-7.5."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from servers import Server

from leasekit import Conflict, CorruptState, InvalidInput, Leasekit, Tenant
from leasekit.keys import Keys, tenant_tag
from leasekit.ledger import events as log_module
from leasekit.ledger.events import Events, Snapshots
from leasekit.ledger.phases import observed
from leasekit.ledger.records import (
    PhaseTransition,
    PrincipalRef,
    RunEvent,
    RunSnapshot,
    StatefulRuntimeScope,
)
from leasekit.model import TenantContext

Connect = Callable[..., Awaitable[Leasekit]]
Make = Callable[..., RunEvent]
Snap = Callable[..., RunSnapshot]
COMPACTED = "stateful_runtime.event_log_compacted"


@pytest.fixture
def events(tenant: Tenant) -> Events:
    return tenant.ledger.events


@pytest.fixture
def snapshots(tenant: Tenant) -> Snapshots:
    return tenant.ledger.snapshots


@pytest.fixture
def make(tenant: Tenant) -> Make:
    """An event of run-a in the test's tenant."""

    def event(event_id: str, at: int = 10, **fields: Any) -> RunEvent:
        given: dict[str, Any] = {
            "run_id": "run-a",
            "event_type": "step",
            "scope": StatefulRuntimeScope(tenant_context=tenant.context),
        }
        return RunEvent(event_id=event_id, occurred_at_ms=at, **(given | fields))

    return event


@pytest.fixture
def snap(tenant: Tenant) -> Snap:
    def snapshot(snapshot_id: str, seq: int, **fields: Any) -> RunSnapshot:
        given: dict[str, Any] = {
            "run_id": "run-a",
            "created_at_ms": 10,
            "status": "running",
            "scope": StatefulRuntimeScope(tenant_context=tenant.context),
        }
        return RunSnapshot(snapshot_id=snapshot_id, seq=seq, **(given | fields))

    return snapshot


async def add(events: Events, make: Make, count: int, **fields: Any) -> None:
    """Events e1, e2, ... at 1, 2, ..."""
    for n in range(1, count + 1):
        await events.append(make(f"e{n}", n, **fields), now_ms=20)


def ids(found: list[RunEvent]) -> list[str]:
    return [event.event_id for event in found]


# --- append ---------------------------------------------------------------------------------------


async def test_event_is_kept_whole(events: Events, make: Make) -> None:
    """Every field; the log gives the place, whatever the event says."""
    step = PhaseTransition(event_id="t", to_phase="queued", event_type="x", occurred_at_ms=1)
    event = make(
        "e", seq=99, actor=PrincipalRef(kind="human_user", id="u"), phase_id="p",
        phase_transition=step, wait_kind="timer", causation_id="c", correlation_id="d",
        payload={"é": [1, None, 1.5]},
    )  # fmt: skip

    appended = await events.append(event, now_ms=20)

    assert (appended.is_new, appended.seq) == (True, 1)
    window = await events.list("run-a", now_ms=20)
    assert window.events == [msgspec.structs.replace(event, seq=1)]
    assert (window.more, window.last_seq) == (False, 1)


async def test_event_is_added_once(events: Events, make: Make) -> None:
    """The same id again gets the first place; in another run it is another event."""
    await add(events, make, 2)
    again = await events.append(make("e1", 999, payload="other"), now_ms=20)
    other = await events.append(make("e1", run_id="RUN_A"), now_ms=20)

    assert (again.is_new, again.seq) == (False, 1)
    assert (other.is_new, other.seq) == (True, 1)
    window = await events.list("run-a", now_ms=20)
    assert [(event.event_id, event.occurred_at_ms) for event in window.events] == [
        ("e1", 1),
        ("e2", 2),
    ]


async def test_sequence_has_no_gaps_under_contention(
    connected: Connect, tenant: Tenant, events: Events, make: Make
) -> None:
    """Two clients add 300 ids at once, each id three times: 300 places, each once."""
    other = (await connected()).tenant(tenant.context.org_id, "w").ledger.events
    sides = (events, other, events)
    told = await asyncio.gather(
        *(side.append(make(f"e{n}"), now_ms=20) for n in range(300) for side in sides)
    )

    assert sorted(one.seq for one in told if one.is_new) == list(range(1, 301))
    for n in range(300):
        assert len({one.seq for one in told[3 * n : 3 * n + 3]}) == 1
        assert [one.is_new for one in told[3 * n : 3 * n + 3]].count(True) == 1
    window = await events.list("run-a", limit=1_000, now_ms=20)
    assert [event.seq for event in window.events] == list(range(1, 301))


async def test_event_at_its_own_place(events: Events, make: Make) -> None:
    """With keep_seq; a place is given once, and the log goes on behind the highest."""
    await events.append(make("a", seq=7), keep_seq=True, now_ms=20)
    after = await events.append(make("b", seq=3), now_ms=20)
    before = await events.append(make("c", seq=5), keep_seq=True, now_ms=20)

    assert (after.seq, before.seq) == (8, 5)
    assert ids((await events.list("run-a", now_ms=20)).events) == ["c", "a", "b"]
    with pytest.raises(Conflict, match="is another event's: nothing was added"):
        await events.append(make("d", seq=7), keep_seq=True, now_ms=20)
    known = await events.append(make("a", seq=5), keep_seq=True, now_ms=20)
    assert (known.is_new, known.seq) == (False, 7)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"event_id": ""}, "event_id"),
        ({"run_id": " "}, "run_id"),
        ({"event_type": ""}, "event_type"),
        ({"occurred_at_ms": -1}, "occurred_at_ms"),
        ({"seq": 0}, "seq"),
        ({"seq": 10**15 + 1}, "seq"),
        ({"event_type": COMPACTED}, "event_type"),
        ({"payload": float("nan")}, "event"),
        ({"payload": "x" * 300_000}, "event"),
    ],
)
async def test_event_that_is_none_is_refused(
    events: Events,
    make: Make,
    state: Callable[[], dict[str, Any]],
    fields: dict[str, Any],
    field: str,
) -> None:
    """Before anything is sent."""
    event = msgspec.structs.replace(make("e", seq=1), **fields)

    with pytest.raises(InvalidInput) as refused:
        await events.append(event, keep_seq=True, now_ms=20)
    assert refused.value.field == field
    assert state() == {}


async def test_what_is_no_event_or_anothers_is_refused(events: Events, make: Make) -> None:
    scope = StatefulRuntimeScope(tenant_context=TenantContext.explicit("elsewhere", "w"))

    with pytest.raises(InvalidInput, match="another tenant"):
        await events.append(make("e", scope=scope), now_ms=20)
    with pytest.raises(InvalidInput, match="not dict"):
        await events.append({}, now_ms=20)  # type: ignore[arg-type]


async def test_append_and_read(events: Events, make: Make) -> None:
    """A known id gives the event as it was first added; a compacted one, what is given at its place."""
    first = await events.append_and_read(make("e1", 1), now_ms=20)
    await events.append(make("e2", 2), now_ms=20)

    assert first == make("e1", 1, seq=1)
    assert await events.append_and_read(make("e1", 9), now_ms=20) == first
    await events.compact("run-a", retention_ms=1, now_ms=20)
    assert await events.append_and_read(make("e1", 9), now_ms=20) == make("e1", 9, seq=1)
    assert await events.append_and_read(make("e2", 9), now_ms=20) == make("e2", 9, seq=2)


# --- windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "seqs", "more"),
    [
        ({}, [1, 2, 3, 4, 5], False),
        ({"after_seq": 0}, [1, 2, 3, 4, 5], False),
        ({"after_seq": 3}, [4, 5], False),
        ({"before_seq": 3}, [1, 2], False),
        ({"after_seq": 1, "before_seq": 4}, [2, 3], False),
        ({"limit": 2}, [1, 2], True),
        ({"limit": 2, "after_seq": 2}, [3, 4], True),
        ({"limit": 2, "tail": True}, [4, 5], True),
        ({"limit": 2, "tail": True, "before_seq": 3}, [1, 2], False),
        ({"after_seq": 5}, [], False),
    ],
)
async def test_window(
    events: Events, make: Make, bounds: dict[str, Any], seqs: list[int], more: bool
) -> None:
    """Bounds are exclusive, the order ascends; `last_seq` is the log's own."""
    await add(events, make, 5)

    window = await events.list("run-a", now_ms=20, **bounds)
    assert [event.seq for event in window.events] == seqs
    assert (window.more, window.last_seq) == (more, 5)


async def test_window_of_no_log(events: Events) -> None:
    window = await events.list("run-a", now_ms=20)

    assert (window.events, window.more, window.last_seq) == ([], False, 0)


@pytest.mark.parametrize(
    ("bounds", "field"),
    [({"limit": 0}, "limit"), ({"limit": 1_001}, "limit"), ({"after_seq": -1}, "seq")],
)
async def test_window_that_is_none(events: Events, bounds: dict[str, int], field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        await events.list("run-a", now_ms=20, **bounds)  # type: ignore[arg-type]
    assert refused.value.field == field


async def test_log_is_walked_while_others_add(events: Events, make: Make) -> None:
    """Window after window, each event once, whatever is added meanwhile."""
    await add(events, make, 40)
    seen: list[int] = []
    more = True
    while more:
        window = await events.list(
            "run-a", after_seq=seen[-1] if seen else None, limit=7, now_ms=20
        )
        seen += [event.seq for event in window.events]
        more = window.more
        if len(seen) < 50:
            await events.append(make(f"more {len(seen)}"), now_ms=20)

    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) > 40


async def test_event_that_is_damaged_is_named(
    events: Events, make: Make, server: Server, tenant_name: str
) -> None:
    await add(events, make, 2)
    keys = Keys("lk", tenant_tag(tenant_name, "w"))
    server.raw.hdel(keys.named("ledger", "events", "run-a"), "e2")

    with pytest.raises(CorruptState, match="at place 2 but is not there"):
        await events.list("run-a", now_ms=20)


# --- compaction -----------------------------------------------------------------------------------


async def test_compaction(events: Events, make: Make, tenant: Tenant) -> None:
    """Events before the cutoff give way to one marker at the place of the last of them."""
    await add(events, make, 5)

    assert await events.compact("run-a", retention_ms=16, now_ms=20) == 3
    window = await events.list("run-a", now_ms=20)
    marker, *kept = window.events
    parts = [tenant.context.org_id, "w", "", "run-a", "3"]
    digest = hashlib.sha256(b"".join(part.encode() + b"\0" for part in parts)).hexdigest()
    assert marker == RunEvent(
        event_id=f"stateful-compaction-{digest}",
        run_id="run-a",
        seq=3,
        event_type=COMPACTED,
        occurred_at_ms=20,
        scope=StatefulRuntimeScope(tenant_context=tenant.context),
        payload={
            "compacted_through_seq": 3,
            "compacted_through_ms": 3,
            "pruned_events": 3,
            "compacted_event_ids": [{"event_id": f"e{n}", "seq": n} for n in (1, 2, 3)],
            "source": "stateful_event_log_compaction",
        },
    )
    assert ids(kept) == ["e4", "e5"]
    assert window.last_seq == 5


async def test_compacted_ids_stay_known_and_the_sequence_goes_on(
    events: Events, make: Make
) -> None:
    await add(events, make, 5)
    await events.compact("run-a", retention_ms=1, now_ms=20)

    again = await events.append(make("e2"), now_ms=20)
    after = await events.append(make("e6"), now_ms=20)
    assert (again.is_new, again.seq) == (False, 2)
    assert (after.is_new, after.seq) == (True, 6)


async def test_markers_are_folded(events: Events, make: Make) -> None:
    """The next marker stands for what the ones before it stood for; nothing old: nothing written."""
    await add(events, make, 4)
    for now, gone in ((12, 1), (12, 0), (13, 1), (1_000, 2), (10_000, 0)):
        assert await events.compact("run-a", retention_ms=10, now_ms=now) == gone

    [marker] = (await events.list("run-a", now_ms=20)).events
    assert marker.seq == 4
    assert marker.payload["pruned_events"] == 4
    assert marker.payload["compacted_through_ms"] == 4
    assert [one["event_id"] for one in marker.payload["compacted_event_ids"]] == [
        *("e1", "e2", "e3", "e4"),
    ]


async def test_compaction_by_the_age_of_each_event(events: Events, make: Make) -> None:
    """An old event behind a young one goes; a later compaction takes the young one in."""
    for id, at in (("a", 1), ("young", 19), ("b", 2)):
        await events.append(make(id, at), now_ms=20)

    assert await events.compact("run-a", retention_ms=10, now_ms=20) == 2
    window = (await events.list("run-a", now_ms=20)).events
    assert [event.seq for event in window] == [2, 3]
    assert await events.compact("run-a", retention_ms=10, now_ms=40) == 1
    [marker] = (await events.list("run-a", now_ms=40)).events
    assert (marker.seq, marker.payload["pruned_events"]) == (3, 3)
    assert [one["seq"] for one in marker.payload["compacted_event_ids"]] == [1, 2, 3]


@pytest.mark.parametrize(("retention", "gone"), [(0, 0), (18, 1), (19, 0), (17, 2)])
async def test_compaction_by_retention(
    events: Events, make: Make, retention: int, gone: int
) -> None:
    """Strictly older than the cutoff; 0 is off."""
    await add(events, make, 3)

    assert await events.compact("run-a", retention_ms=retention, now_ms=20) == gone


async def test_newest_snapshot_protects(
    events: Events, snapshots: Snapshots, make: Make, snap: Snap
) -> None:
    """From its own event on; a snapshot of a run with a similar name protects nothing here."""
    await add(events, make, 6)
    await snapshots.put(snap("old", 2), now_ms=20)
    await snapshots.put(snap("new", 4), now_ms=20)
    await snapshots.put(snap("other", 1, run_id="RUN_A"), now_ms=20)
    await snapshots.put(snap("later", 9, run_id="RUN_A"), now_ms=20)

    assert await events.compact("run-a", retention_ms=1, now_ms=20) == 3
    assert [event.seq for event in (await events.list("run-a", now_ms=20)).events] == [3, 4, 5, 6]


async def test_compaction_of_a_long_log(
    events: Events, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 1 000 events a call, all of them in the end; a marker that is full stays."""
    monkeypatch.setattr(log_module, "MARKER_EVENTS_MAX", 1_600)
    await asyncio.gather(*(events.append(make(f"e{n}", 1), now_ms=20) for n in range(2_600)))

    gone = [await events.compact("run-a", retention_ms=1, now_ms=20) for _ in range(4)]
    assert gone == [1_000, 999, 601, 0]
    markers = (await events.list("run-a", now_ms=20)).events
    assert [marker.seq for marker in markers] == [1_000, 2_600]
    assert [marker.payload["pruned_events"] for marker in markers] == [1_000, 1_600]
    known = [one["seq"] for marker in markers for one in marker.payload["compacted_event_ids"]]
    assert known == list(range(1, 2_601))


async def test_compaction_walks_over_full_markers(
    events: Events, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first window of nothing but markers hides no event."""
    monkeypatch.setattr(log_module, "MARKER_EVENTS_MAX", 1)
    monkeypatch.setattr(log_module.codec, "BATCH_MAX", 2)
    for n in range(1, 6):
        await events.append(make(f"e{n}", n), now_ms=20)
        assert await events.compact("run-a", retention_ms=1, now_ms=20) == 1

    window = await events.list("run-a", limit=2, now_ms=20)
    assert {event.event_type for event in window.events} == {COMPACTED}
    assert window.more


async def test_compaction_by_many_at_once(
    connected: Connect, tenant: Tenant, events: Events, make: Make
) -> None:
    """Each event is counted once, in one marker, also where its instant differs."""
    await add(events, make, 50)
    other = (await connected()).tenant(tenant.context.org_id, "w").ledger.events

    gone = await asyncio.gather(
        *(
            side.compact("run-a", retention_ms=1, now_ms=100 + n)
            for n in range(5)
            for side in (events, other)
        )
    )
    assert sum(gone) == 50
    [marker] = (await events.list("run-a", now_ms=20)).events
    assert marker.payload["pruned_events"] == 50


# --- snapshots ------------------------------------------------------------------------------------


async def test_snapshot_is_kept_whole(snapshots: Snapshots, snap: Snap) -> None:
    """Every field; known by run and id; the last one written wins."""
    whole = snap(
        "s", 3, phase="running_phase", phase_history=[observed("run-a", "running", 5)],
        allowed_next_phases=["sleeping"], phase_id="p", source_record_kind="k", checkpoint={"a": 1},
        payload_digest="d", workflow_definition_version="v", workflow_definition_snapshot_hash="h",
        metadata=[1],
    )  # fmt: skip

    assert await snapshots.put(whole, now_ms=20) == whole
    assert await snapshots.get("run-a", "s", now_ms=20) == whole
    assert await snapshots.get("RUN_A", "s", now_ms=20) is None
    assert await snapshots.get("run-a", "S", now_ms=20) is None
    later = msgspec.structs.replace(whole, seq=9)
    await snapshots.put(later, now_ms=20)
    assert await snapshots.list("run-a", now_ms=20) == [later]


@pytest.mark.parametrize("given", [{}, {"phase": "running_phase"}])
async def test_snapshot_without_phase_gets_that_of_its_status(
    snapshots: Snapshots, snap: Snap, given: dict[str, str]
) -> None:
    kept = await snapshots.put(snap("s", 1, **given), now_ms=20)

    assert kept.phase == "running_phase"
    assert kept.phase_history == [observed("run-a", "running", 10)]
    assert "sleeping" in kept.allowed_next_phases
    assert await snapshots.get("run-a", "s", now_ms=20) == kept


async def test_snapshots_are_listed_from_the_end(snapshots: Snapshots, snap: Snap) -> None:
    """The newest, in ascending order, of this very run."""
    for n in (3, 1, 2, 5, 4):
        await snapshots.put(snap(f"s{n}", n), now_ms=20)
        await snapshots.put(snap(f"s{n}", n + 10, run_id="RUN_A"), now_ms=20)

    for limit in (1, 2, 5, 100):
        found = await snapshots.list("run-a", limit=limit, now_ms=20)
        assert [one.seq for one in found] == [1, 2, 3, 4, 5][-limit:]


async def test_snapshot_that_is_none_is_refused(
    snapshots: Snapshots, snap: Snap, state: Callable[[], dict[str, Any]]
) -> None:
    elsewhere = StatefulRuntimeScope(tenant_context=TenantContext.explicit("elsewhere", "w"))
    wrong = {
        "run_id": snap("s", 1, run_id=""),
        "snapshot_id": snap(" ", 1),
        "seq": snap("s", -1),
        "created_at_ms": snap("s", 1, created_at_ms=-1),
        "status": snap("s", 1, status="gone"),
        "scope.tenant_context": snap("s", 1, scope=elsewhere),
    }
    for field, snapshot in wrong.items():
        with pytest.raises(InvalidInput) as refused:
            await snapshots.put(snapshot, now_ms=20)
        assert refused.value.field == field
    assert state() == {}


async def test_prune_keeps_the_newest(snapshots: Snapshots, snap: Snap) -> None:
    """By sequence, then by id; of the others those that are older than the cutoff go."""
    for n in range(1, 7):
        await snapshots.put(snap(f"s{n}", n, created_at_ms=10 if n != 2 else 90), now_ms=99)
    await snapshots.put(snap("s5b", 5), now_ms=99)
    await snapshots.put(snap("other", 1, run_id="RUN_A"), now_ms=99)

    assert await snapshots.prune("run-a", retention_ms=0, now_ms=99) == 0
    assert await snapshots.prune("run-a", retention_ms=89, now_ms=99) == 0
    assert await snapshots.prune("run-a", retention_ms=50, keep=2, now_ms=99) == 4
    kept = await snapshots.list("run-a", now_ms=99)
    assert [one.snapshot_id for one in kept] == ["s2", "s5b", "s6"]
    assert len(await snapshots.list("RUN_A", now_ms=99)) == 1
    assert await snapshots.prune("run-a", retention_ms=50, keep=1, now_ms=99) == 1


async def test_prune_of_many(snapshots: Snapshots, snap: Snap) -> None:
    """More than a page shows."""
    many = (snap(f"s{n}", n) for n in range(310))
    await asyncio.gather(*(snapshots.put(one, now_ms=99) for one in many))

    assert await snapshots.prune("run-a", retention_ms=1, now_ms=99) == 307
    assert [one.seq for one in await snapshots.list("run-a", now_ms=99)] == [307, 308, 309]


@pytest.mark.parametrize("keep", [0, -1, 1_001])
async def test_prune_keeps_at_least_one(snapshots: Snapshots, keep: int) -> None:
    with pytest.raises(InvalidInput) as refused:
        await snapshots.prune("run-a", retention_ms=1, keep=keep, now_ms=99)
    assert refused.value.field == "keep"
