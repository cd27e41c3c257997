"""The store of records: refusals, lists and filters, transactions, retries, retention, tenants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ledger_records import action, compensation, effect, failed_action, letter, scope_of
from servers import Server

import leasekit
from leasekit import Conflict, CorruptState, InvalidInput, Leasekit, Tenant
from leasekit.ledger import Ledger, Run, StatefulRuntimeScope
from leasekit.ledger.filing import DEAD_LETTERS, EFFECTS
from leasekit.ledger.ledger import get, put
from leasekit.ledger.store import Store, Transaction

DAY_MS = 86_400_000


@pytest.fixture
def ledger(tenant: Tenant) -> Ledger:
    return tenant.ledger


@pytest.fixture
def scope(tenant: Tenant) -> StatefulRuntimeScope:
    return scope_of(tenant.context)


async def pages(records: Any, **filters: Any) -> list[list[Any]]:
    found, cursor = [], None
    while True:
        page = await records.list(cursor=cursor, now_ms=9_000, **filters)
        found.append(page.items)
        if (cursor := page.next_cursor) is None:
            return found


async def _all(records: Any, **filters: Any) -> list[Any]:
    return [one for page in await pages(records, limit=1_000, **filters) for one in page]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"effect_id": ""},
        {"effect_id": " \n"},
        {"effect_id": "e" * 401},
        {"effect_id": "\ud800"},
        {"created_at_ms": -1},
        {"created_at_ms": 1.5},
        {"created_at_ms": 2**53},
        {"updated_at_ms": -1},
        {"updated_at_ms": True},
        {"updated_at_ms": 10**17},
        {"run_id": "r" * 401},
        {"status": "s" * 401},
        {"source_kind": "\udcff"},
        {"metadata": float("nan")},
        {"metadata": 2**70},
        {"metadata": "x" * 65_536},
    ],
)
async def test_a_record_that_could_not_be_filed_is_refused(
    ledger: Ledger, scope: StatefulRuntimeScope, state: Callable[[], Any], changes: Any
) -> None:
    """Before anything is sent."""
    fields = {"effect_id": "e"} | changes
    with pytest.raises(InvalidInput):
        await ledger.effects.upsert(effect(fields.pop("effect_id"), scope, **fields), now_ms=1)
    assert state() == {}


@pytest.mark.parametrize(
    "text",
    ["a b", "a\nb", "a|b", "a\0b", "~", "a:b", "{x}", "é 日", "A-b_C", "x" * 200, "..", "a/b"],
)
async def test_any_text_is_a_name(ledger: Ledger, scope: StatefulRuntimeScope, text: str) -> None:
    """Ids, runs, words: whatever they hold, they break no list, and find their record again."""
    record = effect(text, scope, run_id=text, status=text, source_kind=text, operation=text)
    await ledger.effects.upsert(record, now_ms=1)
    await ledger.effects.upsert(effect("other", scope, run_id="other"), now_ms=1)

    assert await ledger.effects.get(text, now_ms=2) == record
    assert await _all(ledger.effects, run_id=text) == [record]
    assert await _all(ledger.effects, status=text, source=text) == [record]


async def test_records_of_others_are_refused(
    ledger: Ledger, scope: StatefulRuntimeScope, state: Callable[[], Any]
) -> None:
    """Another kind, and another tenant; who acts and who named the tenant does not count."""
    context = scope.tenant_context
    with pytest.raises(InvalidInput, match="takes a ToolEffect, not DeadLetter"):
        await ledger.effects.upsert(letter("l", scope), now_ms=1)  # type: ignore[arg-type]
    other = msgspec.structs.replace(context, deployment_id="d")
    with pytest.raises(InvalidInput, match="names another tenant"):
        await ledger.effects.upsert(effect("e", scope_of(other)), now_ms=1)
    assert state() == {}
    same = msgspec.structs.replace(context, actor_id="a", source="local_implicit")
    await ledger.effects.upsert(effect("e", scope_of(same)), now_ms=1)


async def test_damage_is_told(
    ledger: Ledger, scope: StatefulRuntimeScope, server: Server, tenant_name: str
) -> None:
    """A record that cannot be read is neither shown nor written over."""
    await ledger.dead_letters.upsert(letter("l", scope), now_ms=1)
    server.raw.hset(f"lk:{{{tenant_name}.w}}:ledger:docs", "dead_letters/l", "x")

    with pytest.raises(CorruptState, match="dead_letters/l cannot be read"):
        await ledger.dead_letters.get("l", now_ms=2)
    with pytest.raises(CorruptState):
        await ledger.dispose("l", "ignored", "ignored", now_ms=2)


# --- lists ----------------------------------------------------------------------------------------


async def test_the_last_changed_come_first(ledger: Ledger, scope: StatefulRuntimeScope) -> None:
    """4.1; an upsert replaces whole, and moves."""
    for i in range(5):
        await ledger.effects.upsert(effect(f"e{i}", scope, updated_at_ms=i, error="old"), now_ms=1)
    await ledger.effects.upsert(effect("e1", scope, updated_at_ms=9), now_ms=1)

    found = await pages(ledger.effects, limit=2)
    ids = [[one.effect_id for one in page] for page in found]
    assert ids == [["e1", "e4"], ["e3", "e2"], ["e0"]]
    assert found[0][0].error is None


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, "abcd"),
        ({"run_id": "run_a"}, "abc"),
        ({"run_id": " RUN-A "}, "abc"),
        ({"run_id": "run-b"}, "d"),
        ({"run_id": "run-c"}, ""),
        ({"run_id": "all"}, "abcd"),
        ({"run_id": " "}, "abcd"),
        ({"status": "OPEN"}, "ad"),
        ({"status": "retry-requested"}, "b"),
        ({"status": "All"}, "abcd"),
        ({"status": ""}, "abcd"),
        ({"source": "stateful-wait"}, "c"),
        ({"source": "all"}, "abcd"),
        ({"active_only": True}, "abd"),
        ({"created_before_ms": 1_000}, ""),
        ({"created_before_ms": 1_001}, "abc"),
        ({"run_id": "run-a", "status": "open", "source": "tool_effect", "active_only": True}, "a"),
    ],
)
async def test_filters_compare_normalised_words(
    ledger: Ledger, scope: StatefulRuntimeScope, filters: Any, expected: str
) -> None:
    """4.11."""
    mark = {"superseded_by_success": True, "superseded_by_effect_id": "e", "superseded_at_ms": 1}
    for one in (
        letter("a", scope, run_id="run-a"),
        letter("b", scope, run_id="Run_A", status="retry_requested"),
        letter("c", scope, status="ignored", source_type="stateful_wait", metadata=mark),
        letter("d", scope, run_id="run-b", created_at_ms=1_001),
    ):
        await ledger.dead_letters.upsert(one, now_ms=1)

    found = await _all(ledger.dead_letters, **filters)
    assert "".join(sorted(one.dead_letter_id for one in found)) == expected


async def test_source_is_no_filter_of_compensations(
    ledger: Ledger, scope: StatefulRuntimeScope
) -> None:
    """4.11: it is ignored; active are those that are neither over nor superseded."""
    for status in ("proposed", "failed", "completed", "cancelled"):
        record = compensation(status, scope, status=status)
        await ledger.compensations.upsert(record, now_ms=1)

    assert len(await _all(ledger.compensations, source="tool_effect")) == 4
    active = await _all(ledger.compensations, active_only=True)
    assert {one.status for one in active} == {"proposed", "failed"}


async def test_what_has_no_run_is_of_no_run(ledger: Ledger, scope: StatefulRuntimeScope) -> None:
    await ledger.effects.upsert(effect("e", scope, run_id=None), now_ms=1)
    assert await _all(ledger.effects, run_id="~") == []
    assert len(await _all(ledger.effects)) == 1


# --- transactions ---------------------------------------------------------------------------------


async def test_a_decision_is_made_again_on_what_others_left(
    ledger: Ledger, scope: StatefulRuntimeScope
) -> None:
    """All of it, or none: what was read must still be so when it lands."""
    await ledger.effects.upsert(effect("e", scope), now_ms=1)
    seen = []

    async def decide(transaction: Transaction) -> None:
        found = await get(transaction, EFFECTS, "e")
        assert found is not None
        seen.append(found.error)
        if len(seen) < 3:
            await ledger.effects.upsert(effect("e", scope, error=str(len(seen))), now_ms=1)
        await put(transaction, DEAD_LETTERS, letter("l", scope, reason=str(found.error)))

    await ledger._store.transact(decide, now_ms=1)

    assert seen == [None, "1", "2"]
    assert [one.reason for one in await _all(ledger.dead_letters)] == ["2"]


async def test_a_guard_notices_a_record_that_was_not_there(
    ledger: Ledger, scope: StatefulRuntimeScope
) -> None:
    """Also under another spelling of the run; records of other runs do not count."""
    tries = 0

    async def decide(transaction: Transaction) -> None:
        nonlocal tries
        tries += 1
        await transaction.guard("run_a")
        if tries < 3:
            run = ["RUN-A", "run_a"][tries - 1]
            await ledger.effects.upsert(effect(f"e{tries}", scope, run_id=run), now_ms=1)
        await ledger.effects.upsert(effect("x", scope, run_id="run-b"), now_ms=1)
        await put(transaction, DEAD_LETTERS, letter("l", scope))

    await ledger._store.transact(decide, now_ms=1)
    assert tries == 3


async def test_who_is_never_fast_enough_is_told(
    ledger: Ledger, scope: StatefulRuntimeScope, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 20 attempts, and nothing of them has landed."""
    monkeypatch.setattr("leasekit.ledger.store.PAUSE_MOST_MS", 0)
    tries = 0

    async def decide(transaction: Transaction) -> None:
        nonlocal tries
        tries += 1
        await get(transaction, EFFECTS, "e")
        await ledger.effects.upsert(effect("e", scope), now_ms=1)
        await put(transaction, DEAD_LETTERS, letter("l", scope))

    with pytest.raises(Conflict, match="20 times in a row: nothing was written"):
        await ledger._store.transact(decide, now_ms=1)
    assert tries == 20
    assert await _all(ledger.dead_letters) == []


@pytest.mark.parametrize(("count", "size"), [(1_001, 1), (80, 60_000)])
async def test_a_change_that_is_too_large_is_refused(
    ledger: Ledger, scope: StatefulRuntimeScope, count: int, size: int
) -> None:
    """1 000 records, 4 MiB: nothing is cut off."""

    async def decide(transaction: Transaction) -> None:
        for i in range(count):
            record = letter(f"l{i}", scope, reason="x" * size)
            transaction.put(
                DEAD_LETTERS.name_for(record),
                DEAD_LETTERS.listed(record),
                DEAD_LETTERS.encode(record),
            )

    with pytest.raises(InvalidInput, match="too large to land whole"):
        await ledger._store.transact(decide, now_ms=1)
    assert await _all(ledger.dead_letters) == []


async def test_many_at_once_on_one_record_all_land(
    ledger: Ledger, scope: StatefulRuntimeScope
) -> None:
    """Callers of one process who name one line wait for each other."""
    await ledger.effects.upsert(effect("e", scope, metadata=0), now_ms=1)

    async def count(transaction: Transaction) -> None:
        found = await get(transaction, EFFECTS, "e")
        assert found is not None
        await put(transaction, EFFECTS, effect("e", scope, metadata=found.metadata + 1))

    await asyncio.gather(*(ledger._store.transact(count, line="e", now_ms=1) for _ in range(100)))
    found = await ledger.effects.get("e", now_ms=2)
    assert found is not None
    assert found.metadata == 100


# --- retries (4.9) --------------------------------------------------------------------------------

CHECKPOINT = {
    "completed_nodes": ["a", "d"],
    "pending_nodes": ["c"],
    "blocked_nodes": ["b"],
    "last_failure": {"node_id": "b", "reason": "x"},
    "gate": {"x": 1},
    "node_outputs": {"a": 1, "d": 2},
    "node_attempts": {"a": 1, "b": 3, "d": 1},
    "dependencies": {"a": [], "b": ["a"], "c": ["b"], "d": ["b"], "z": ["a"]},
}


def run_of(scope: StatefulRuntimeScope, **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "run_id": "run-a",
        "kind": "automation_v2",
        "status": "failed",
        "phase": "failed",
        "created_at_ms": 1,
        "updated_at_ms": 1,
        "checkpoint": CHECKPOINT,
    }
    return Run(scope=scope, **(fields | changes))


async def test_a_requested_retry_puts_its_run_in_line(
    ledger: Ledger, scope: StatefulRuntimeScope
) -> None:
    """4.9, 5-6: from the nodes that failed on; the run once, each of its dead letters counted."""
    await ledger.runs.upsert(run_of(scope), now_ms=1)
    for id in ("l", "m"):
        await ledger.dead_letters.upsert(letter(id, scope, metadata="note"), now_ms=1)
        await ledger.dispose(id, "retry_requested", "retry_requested", now_ms=2_000)

    assert await ledger.retry_dead_letters(now_ms=3_000) == 2

    run = await ledger.runs.get("run-a", now_ms=4_000)
    assert run is not None
    assert (run.status, run.phase, run.execution_claim) == ("queued", "queued", None)
    assert run.metadata["resume_reason"] == "stateful_dead_letter_retry_dispatched"
    assert run.checkpoint == {
        "completed_nodes": ["a"],
        "pending_nodes": ["b", "c", "d"],
        "blocked_nodes": [],
        "last_failure": None,
        "gate": None,
        "node_outputs": {"a": 1},
        "node_attempts": {"a": 1},
        "dependencies": CHECKPOINT["dependencies"],
    }
    for one in await _all(ledger.dead_letters):
        assert (one.status, one.attempts, one.updated_at_ms) == ("retrying", 0, 3_000)
        assert one.metadata == {
            "previous_metadata": "note",
            "retry_dispatch_count": 1,
            "retry_dispatched_at_ms": 3_000,
            "retry_backoff_ms": 2_000,
        }
    [noted] = (await ledger.audit.list(now_ms=4_000)).items
    assert (noted.event_type, noted.actor, noted.payload["run_id"]) == (
        "stateful_dead_letter_retry_dispatched",
        "tandem-server:dead-letter-dispatcher",
        "run-a",
    )
    assert await ledger.retry_dead_letters(now_ms=3_000) == 0


async def test_retries_have_a_budget(ledger: Ledger, scope: StatefulRuntimeScope) -> None:
    """4.9, 2 and 4: five, each after a longer pause; a failure told again does not renew it."""
    await ledger.record_external_action(scope, failed_action("action-a"), now_ms=2_000)
    [failed] = await _all(ledger.dead_letters)
    await ledger.dispose(failed.dead_letter_id, "retry_requested", "x", now_ms=2_000)
    now, acted = 3_000, []
    for _ in range(200):
        await ledger.runs.upsert(run_of(scope), now_ms=now)
        if await ledger.retry_dead_letters(now_ms=now):
            acted.append(now)
        await ledger.record_external_action(scope, failed_action("action-a"), now_ms=now)
        now += 1_000

    assert [later - at for at, later in pairwise(acted)] == [
        *(2_000, 4_000, 8_000, 16_000),
        1_000,  # the budget is looked at before the pause
    ]
    [exhausted] = await _all(ledger.dead_letters)
    assert (exhausted.status, exhausted.operator_disposition) == ("ignored", "retry_exhausted")
    assert exhausted.disposition_actor is not None
    assert exhausted.disposition_actor.id == "tandem-server:dead-letter-dispatcher"


async def test_a_retry_that_succeeded_is_resolved(
    ledger: Ledger, scope: StatefulRuntimeScope
) -> None:
    """4.9, 1: also where its budget is used up, and whatever its run does."""
    await ledger.runs.upsert(run_of(scope, status="running", phase="running_phase"), now_ms=1)
    await ledger.record_external_action(scope, failed_action("action-a"), now_ms=2_000)
    [failed] = await _all(ledger.dead_letters)
    await ledger.dispose(failed.dead_letter_id, "retry_requested", "x", now_ms=2_000)
    await ledger.record_external_action(scope, action("action-a"), now_ms=2_500)

    assert await ledger.retry_dead_letters(now_ms=3_000) == 1

    [resolved] = await _all(ledger.dead_letters)
    assert (resolved.status, resolved.operator_disposition) == ("resolved", "retry_succeeded")


@pytest.mark.parametrize(
    ("changes", "run"),
    [
        ({"status": "open"}, {}),
        ({"status": "ignored"}, {}),
        ({"source_type": "stateful_wait"}, {}),
        ({"recovery_options": ["ignore"]}, {}),
        ({"run_id": None}, {}),
        ({"run_id": "run-b"}, {}),
        ({"run_id": "RUN_A"}, {}),
        ({}, {"status": "running"}),
        ({}, {"status": "completed"}),
        ({}, {"checkpoint": None}),
        ({}, {"checkpoint": {"completed_nodes": ["a"]}}),
        ({}, {"checkpoint": {"dependencies": {"a": []}, "last_failure": {"node_id": "gone"}}}),
    ],
)
async def test_all_else_is_not_tried_again(
    ledger: Ledger, scope: StatefulRuntimeScope, changes: Any, run: Any
) -> None:
    """4.9: neither the dead letter nor the run changes."""
    record = letter("l", scope, **({"status": "retry_requested"} | changes))
    await ledger.dead_letters.upsert(record, now_ms=1)
    stopped = await ledger.runs.upsert(run_of(scope, **run), now_ms=1)

    assert await ledger.retry_dead_letters(now_ms=3_000) == 0

    assert await ledger.dead_letters.get("l", now_ms=4_000) == record
    assert await ledger.runs.get("run-a", now_ms=4_000) == stopped


# --- retention (4.10) -----------------------------------------------------------------------------


async def test_what_is_settled_and_old_is_pruned(
    ledger: Ledger, scope: StatefulRuntimeScope
) -> None:
    """4.10: strictly older than the cutoff; all that still needs somebody is kept for ever."""
    for age, at in (("old", 999), ("young", 1_000)):
        for status in ("succeeded", "failed", "pending", "unknown"):
            record = effect(f"{age}-{status}", scope, status=status, updated_at_ms=at)
            await ledger.effects.upsert(record, now_ms=1)
        for status in ("open", "retry_requested", "retrying", "ignored", "resolved"):
            one = letter(f"{age}-{status}", scope, status=status, updated_at_ms=at)
            await ledger.dead_letters.upsert(one, now_ms=1)
        for status in ("proposed", "running", "failed", "completed", "cancelled"):
            other = compensation(f"{age}-{status}", scope, status=status, updated_at_ms=at)
            await ledger.compensations.upsert(other, now_ms=1)

    assert await ledger.prune(0, now_ms=9_000) == 0
    assert await ledger.prune(9_000, now_ms=9_000) == 0
    assert await ledger.prune(8_000, now_ms=9_000) == 5
    assert await ledger.prune(8_000, now_ms=9_000) == 0

    assert len(await _all(ledger.effects)) == 7
    assert len(await _all(ledger.dead_letters)) == 8
    assert len(await _all(ledger.compensations)) == 8
    left = {one.status for one in await _all(ledger.dead_letters) if one.updated_at_ms == 999}
    assert left == {"open", "retry_requested", "retrying"}


@pytest.mark.parametrize("change", [{"updated_at_ms": 8_999}, {"status": "failed"}])
async def test_what_is_touched_meanwhile_is_kept(
    ledger: Ledger, scope: StatefulRuntimeScope, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    """It is settled no more, or not for long enough."""
    await ledger.effects.upsert(effect("e", scope), now_ms=1)
    touched = effect("e", scope, **change)
    read = Store.page

    async def page(store: Store, *arguments: Any, **words: Any) -> Any:
        found = await read(store, *arguments, **words)
        await ledger.effects.upsert(touched, now_ms=1)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Store, "page", page)
        assert await ledger.prune(1_000, now_ms=9_000) == 0
    assert await _all(ledger.effects) == [touched]


async def test_many_are_pruned(ledger: Ledger, scope: StatefulRuntimeScope) -> None:
    """In steps, those between them that stay included."""
    await asyncio.gather(
        *(
            ledger.effects.upsert(
                effect(f"e{i}", scope, status="failed" if i % 3 else "succeeded"), now_ms=1
            )
            for i in range(900)
        )
    )
    assert await ledger.prune(1, now_ms=9_000) == 300
    assert len(await _all(ledger.effects)) == 600


# --- tenants --------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "a-b", "A_B"])
steps = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(
            ["effect", "letter", "compensation", "fail", "succeed", "execute", "dispose"]
        ),
        names,
        names,
        st.integers(1, 9),
    ),
    max_size=25,
)


async def _play(ledger: Ledger, scope: StatefulRuntimeScope, step: Any) -> None:
    _, what, id, run, at = step
    told = {"metadata": {"automationRunID": run}, "updated_at_ms": at}
    match what:
        case "effect":
            record = effect(id, scope, run_id=run, updated_at_ms=at)
            await ledger.effects.upsert(record, now_ms=at)
        case "letter":
            one = letter(id, scope, run_id=run, compensation_id=id, updated_at_ms=at)
            await ledger.dead_letters.upsert(one, now_ms=at)
        case "compensation":
            other = compensation(id, scope, run_id=run, updated_at_ms=at)
            await ledger.compensations.upsert(other, now_ms=at)
        case "fail":
            told["metadata"] = {"automationRunID": run, "compensation": {"compensation_id": id}}
            await ledger.record_external_action(scope, action(id, "failed", **told), now_ms=at)
        case "succeed":
            await ledger.record_external_action(scope, action(id, **told), now_ms=at)
        case "execute":
            await ledger.execute_compensation(id, now_ms=at)
        case "dispose":
            await ledger.dispose(id, "ignored", "ignored", now_ms=at)


async def _read(tenant: Tenant) -> list[Any]:
    """Every list, whole and of each run, and every record by its id."""
    ledger, found = tenant.ledger, []
    for records in (ledger.effects, ledger.dead_letters, ledger.compensations):
        for run in (None, "a", "b", "a-b"):
            found += [
                await pages(records, limit=3, run_id=run, active_only=active)
                for active in (False, True)
            ]
        found += [await records.get(id, now_ms=9) for id in ("a", "b", "a-b", "A_B")]
    intents = (await tenant.gate.list(now_ms=9)).items
    return [*found, [msgspec.to_builtins(one) for one in intents]]


@settings(
    max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(steps=steps)
def test_each_tenant_reads_as_if_it_were_alone(running: Any, tenant_name: str, steps: Any) -> None:
    """Colliding ids and runs: what a tenant reads is what it reads in a store that holds it alone."""
    url = running("valkey-9").url
    one, other = f"{tenant_name}-a", f"{tenant_name}-b"
    names = [(one, "w", None), (one, "w", "d"), (other, "w", None)]

    async def play() -> None:
        prefix = leasekit.new_token()[:20]

        async def told(kit: Leasekit, step: Any) -> None:
            tenant = kit.tenant(*names[step[0]])
            await _play(tenant.ledger, scope_of(tenant.context), step)

        async with leasekit.connect(url, clock="caller", prefix=prefix) as shared:
            for step in steps:
                await told(shared, step)
            for which, name in enumerate(names):
                alone = f"{prefix}-{which}"
                async with leasekit.connect(url, clock="caller", prefix=alone) as lonely:
                    for step in steps:
                        if step[0] == which:
                            await told(lonely, step)
                    assert await _read(shared.tenant(*name)) == await _read(lonely.tenant(*name))

    asyncio.run(play())
