"""Dead letters and compensations: dispositions, the transition table, the engine, and its executor."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ledger_records import compensation, failed_action, letter, scope_of
from servers import Server

import leasekit
from leasekit import Conflict, InProgress, InvalidInput, Leasekit, OutcomeUnknown, Tenant
from leasekit.gate import IntentStatus, Permit
from leasekit.ledger import Compensation, Ledger, PrincipalRef, StatefulRuntimeScope

OPERATOR = PrincipalRef(kind="human_user", id="operator-a")
STATUSES = (
    *("proposed", "awaiting_approval", "approved", "running", "completed", "failed", "cancelled"),
)
ALLOWED = {
    "proposed": {"awaiting_approval", "approved", "cancelled"},
    "awaiting_approval": {"approved", "cancelled"},
    "approved": {"running", "cancelled"},
    "running": {"completed", "failed", "cancelled"},
    "failed": {"approved", "running", "cancelled"},
    "completed": set(),
    "cancelled": set(),
}

EFFECT = "effect-35b5e734e7652de3"
COMPENSATION = f"compensation-{EFFECT}"
LETTER = f"dead-letter-{EFFECT}"
ACTION = "action-execute-compensation"


@pytest.fixture
def ledger(tenant: Tenant) -> Ledger:
    return tenant.ledger


@pytest.fixture
def scope(tenant: Tenant) -> StatefulRuntimeScope:
    return scope_of(tenant.context)


async def _all(records: Any, now_ms: int = 9_000, **filters: Any) -> list[Any]:
    return (await records.list(limit=1_000, now_ms=now_ms, **filters)).items


# --- the seed's tests (4.12) ----------------------------------------------------------------------


async def test_a_compensation_is_executed_once(
    tenant: Tenant, ledger: Ledger, scope: StatefulRuntimeScope
) -> None:
    """[SEED] 4.12: execution, its receipt, the linked dead letter; a second one does nothing."""
    await ledger.record_external_action(scope, failed_action(ACTION), now_ms=3_000)
    [proposed] = await _all(ledger.compensations)
    assert (proposed.compensation_id, proposed.status) == (COMPENSATION, "proposed")
    assert proposed.approval_required

    execution = await ledger.execute_compensation(
        COMPENSATION, actor=OPERATOR, reason="rollback approved", now_ms=4_000
    )

    assert execution is not None
    assert not execution.already_completed
    done, receipt = execution.compensation, execution.receipt_effect
    assert receipt is not None
    assert (done.status, done.attempts, done.receipt_effect_id) == (
        "completed",
        1,
        "effect-compensation-4b5165103f81e032",
    )
    assert done.metadata["execution_stage"] == "completed"
    assert (receipt.status, receipt.source_kind, receipt.compensation_id) == (
        "succeeded",
        "stateful_compensation",
        COMPENSATION,
    )
    [linked] = execution.linked_dead_letters
    assert (linked.dead_letter_id, linked.status) == (LETTER, "linked_to_compensation")
    assert linked.disposition_reason == "rollback approved"
    assert await _all(ledger.dead_letters) == [linked]
    rows = sorted(
        (await tenant.gate.list(now_ms=9_000)).items,
        key=lambda row: row.updated_at_ms,
        reverse=True,
    )
    assert [row.outbox_id for row in rows] == [
        "outbox-compensation-ee31f6fdad57d37f",
        "outbox-35b5e734e7652de3",
    ]
    assert (rows[0].compensation_id, rows[0].status, rows[0].effect_id) == (
        COMPENSATION,
        "sent",
        receipt.effect_id,
    )
    assert len(await _all(ledger.effects)) == 2
    assert await _all(ledger.compensations, run_id="run-a", active_only=True) == []

    again = await ledger.execute_compensation(COMPENSATION, actor=OPERATOR, now_ms=5_000)

    assert again is not None
    assert again.already_completed
    assert (again.compensation, again.receipt_effect) == (done, receipt)
    assert again.linked_dead_letters == [linked]
    assert len(await _all(ledger.effects)) == 2


async def test_another_tenant_cannot_touch_them(
    kit: Leasekit, ledger: Ledger, scope: StatefulRuntimeScope, tenant_name: str
) -> None:
    """[SEED] 4.12: the setters find nothing in another tenant; in the right one the table holds."""
    await ledger.record_external_action(scope, failed_action(ACTION), now_ms=3_000)
    other = kit.tenant(tenant_name, "workspace-b").ledger

    assert await other.move_compensation(COMPENSATION, "approved", now_ms=4_000) is None
    assert await other.dispose(LETTER, "ignored", "ignored", now_ms=4_000) is None
    assert await other.execute_compensation(COMPENSATION, now_ms=4_000) is None
    with pytest.raises(Conflict, match="illegal stateful compensation status transition"):
        await ledger.move_compensation(COMPENSATION, "completed", now_ms=4_000)
    moved = await ledger.move_compensation(COMPENSATION, "awaiting_approval", now_ms=4_001)
    assert moved is not None
    assert (moved.status, moved.updated_at_ms) == ("awaiting_approval", 4_001)
    disposed = await ledger.dispose(
        LETTER,
        "linked_to_compensation",
        "linked_to_compensation",
        reason="see there",
        actor=OPERATOR,
        now_ms=4_002,
    )
    assert disposed is not None
    assert (disposed.status, disposed.operator_disposition) == (
        "linked_to_compensation",
        "linked_to_compensation",
    )
    assert (disposed.disposition_reason, disposed.disposition_actor) == ("see there", OPERATOR)
    assert disposed.disposition_at_ms == disposed.updated_at_ms == 4_002
    assert await ledger.dead_letters.get(LETTER, now_ms=5_000) == disposed


# --- the transition table (4.8) -------------------------------------------------------------------


@pytest.mark.parametrize("before", STATUSES)
async def test_the_transition_table_holds(
    ledger: Ledger, scope: StatefulRuntimeScope, before: str
) -> None:
    """4.8: every pair of states, allowed or refused with its text; a refusal changes nothing."""
    for after in STATUSES:
        record = compensation("c", scope, status=before)
        await ledger.compensations.upsert(record, now_ms=3_000)
        if after == before or after in ALLOWED[before]:
            moved = await ledger.move_compensation("c", after, now_ms=4_000)
            assert moved == compensation("c", scope, status=after, updated_at_ms=4_000)
            continue
        with pytest.raises(Conflict) as refused:
            await ledger.move_compensation("c", after, now_ms=4_000)
        assert str(refused.value).startswith(
            f"illegal stateful compensation status transition from `{before}` to `{after}`"
        )
        assert await ledger.compensations.get("c", now_ms=5_000) == record


@pytest.mark.parametrize("word", ["", "done", "Completed", "proposed "])
async def test_what_is_no_status_is_refused(
    ledger: Ledger, scope: StatefulRuntimeScope, word: str
) -> None:
    """Words outside of the enumerations are no states."""
    await ledger.compensations.upsert(compensation("c", scope), now_ms=3_000)
    await ledger.dead_letters.upsert(letter("l", scope), now_ms=3_000)

    with pytest.raises(InvalidInput, match="status must be one of"):
        await ledger.move_compensation("c", word, now_ms=4_000)
    with pytest.raises(InvalidInput, match="status must be one of"):
        await ledger.dispose("l", word, "x", now_ms=4_000)


@pytest.mark.parametrize(
    "before",
    ["open", "retry_requested", "retrying", "ignored", "linked_to_compensation", "resolved"],
)
async def test_any_disposition_may_follow_any(
    ledger: Ledger, scope: StatefulRuntimeScope, before: str
) -> None:
    """4.4, 4.8: the setter has no guard, and clears a reason that is not given again."""
    record = letter("l", scope, status=before, disposition_reason="old")
    for after in ("open", "retry_requested", "ignored", "linked_to_compensation", "resolved"):
        await ledger.dead_letters.upsert(record, now_ms=3_000)
        disposed = await ledger.dispose("l", after, "reviewed", now_ms=4_000)
        assert disposed is not None
        assert (disposed.status, disposed.operator_disposition) == (after, "reviewed")
        assert disposed.disposition_reason is None


# --- the engine (4.8) -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before", ["proposed", "awaiting_approval", "approved", "running", "failed"]
)
async def test_the_engine_executes_from_any_state_that_is_not_over(
    ledger: Ledger, scope: StatefulRuntimeScope, before: str
) -> None:
    """4.8, 4: without require_approval the table is not consulted; attempts go on."""
    record = compensation("c", scope, status=before, attempts=2, metadata="note")
    await ledger.compensations.upsert(record, now_ms=3_000)

    execution = await ledger.execute_compensation("c", actor=OPERATOR, now_ms=4_000)

    assert execution is not None
    assert (execution.compensation.status, execution.compensation.attempts) == ("completed", 3)
    assert execution.compensation.metadata == {
        "previous_metadata": "note",
        "execution_engine": "stateful_compensation_engine",
        "execution_stage": "completed",
        "previous_status": "running",
        "executed_at_ms": 4_000,
        "executed_by": {"kind": "human_user", "id": "operator-a"},
        "receipt_effect_id": execution.compensation.receipt_effect_id,
    }


async def test_a_cancelled_compensation_is_not_executed(
    tenant: Tenant, ledger: Ledger, scope: StatefulRuntimeScope
) -> None:
    """4.8, 2."""
    record = compensation("c", scope, status="cancelled")
    await ledger.compensations.upsert(record, now_ms=3_000)

    with pytest.raises(Conflict, match=r"^stateful compensation `c` is cancelled"):
        await ledger.execute_compensation("c", now_ms=4_000)

    assert await ledger.compensations.get("c", now_ms=4_000) == record
    assert await _all(ledger.effects) == []
    assert (await tenant.gate.list(now_ms=4_000)).items == []


@pytest.mark.parametrize("before", ["proposed", "awaiting_approval"])
async def test_an_approval_can_be_required(
    ledger: Ledger, scope: StatefulRuntimeScope, before: str
) -> None:
    """require_approval: what requires an approval and has none is refused; approved, it is executed."""
    record = compensation("c", scope, status=before, approval_required=True)
    await ledger.compensations.upsert(record, now_ms=3_000)

    with pytest.raises(Conflict, match="requires an approval: nothing was executed"):
        await ledger.execute_compensation("c", require_approval=True, now_ms=4_000)
    assert await ledger.compensations.get("c", now_ms=4_000) == record

    await ledger.move_compensation("c", "approved", now_ms=4_001)
    execution = await ledger.execute_compensation("c", require_approval=True, now_ms=4_002)
    assert execution is not None
    assert execution.compensation.status == "completed"


async def test_who_needs_no_approval_is_executed(
    ledger: Ledger, scope: StatefulRuntimeScope
) -> None:
    await ledger.compensations.upsert(compensation("c", scope), now_ms=3_000)
    execution = await ledger.execute_compensation("c", require_approval=True, now_ms=4_000)
    assert execution is not None
    assert execution.compensation.status == "completed"


async def test_the_receipt_says_what_was_done(
    tenant: Tenant, ledger: Ledger, scope: StatefulRuntimeScope
) -> None:
    """4.8, 5: every field of the receipt and of its intent."""
    record = compensation(
        "c",
        scope,
        target_effect_id="e",
        outbox_id="o",
        policy_decision_id="p",
        rollback_instruction="undo",
        metadata={"token": "hidden"},
    )
    await ledger.compensations.upsert(record, now_ms=3_000)

    execution = await ledger.execute_compensation(
        "c", actor=OPERATOR, reason="because", now_ms=4_000
    )

    assert execution is not None
    receipt = execution.receipt_effect
    assert receipt is not None
    by = {"kind": "human_user", "id": "operator-a"}
    assert receipt.receipt_payload_redacted == {
        "status": "completed",
        "compensation_id": "c",
        "compensation_type": "operator_review",
        "target_effect_id": "e",
        "outbox_id": "o",
        "rollback_instruction": "undo",
        "forward_fix_instruction": None,
        "attempt": 1,
        "actor": by,
        "reason": "because",
    }
    assert receipt.action_id == "stateful-compensation:c"
    assert receipt.receipt_pointer == "stateful-compensation://c"
    assert (receipt.provider, receipt.tool, receipt.target) == (
        "stateful_runtime",
        "stateful_compensation_engine",
        "e",
    )
    assert receipt.operation == "stateful_compensation.operator_review"
    assert receipt.output_digest == receipt.receipt_payload_digest
    assert receipt.external_resource == {
        "target_effect_id": "e",
        "original_outbox_id": "o",
        "receipt_outbox_id": receipt.outbox_id,
    }
    assert receipt.metadata == {
        "execution_engine": "stateful_compensation_engine",
        "approval_required": False,
        "approved_by": by,
    }
    [row] = (await tenant.gate.list(now_ms=5_000)).items
    assert (row.outbox_id, row.status, row.cause) == (receipt.outbox_id, "sent", "ledger")
    assert row.idempotency_key == "stateful-compensation:c:1"
    assert (row.effect_id, row.receipt_id) == (receipt.effect_id, receipt.effect_id)
    assert (row.claimed_by, row.claimed_at_ms) == ("stateful_compensation_engine", 4_000)
    assert row.claim_expires_at_ms is None
    assert (row.created_at_ms, row.updated_at_ms, row.attempts) == (4_000, 4_000, 1)
    assert row.payload_digest == receipt.input_digest
    assert row.metadata == {
        "execution_engine": "stateful_compensation_engine",
        "observed_before_execution": True,
        "original_outbox_id": "o",
        "target_effect_id": "e",
        "rollback_instruction": "undo",
        "forward_fix_instruction": None,
        "observed_after_execution": True,
        "dispatch_completed": True,
        "receipt_effect_id": receipt.effect_id,
        "completion_recorded_at_ms": 4_000,
    }


@pytest.mark.parametrize(
    ("before", "is_linked"),
    [
        ("open", True),
        ("retry_requested", True),
        ("retrying", False),
        ("ignored", False),
        ("resolved", False),
        ("linked_to_compensation", False),
    ],
)
async def test_open_dead_letters_are_linked(
    ledger: Ledger, scope: StatefulRuntimeScope, before: str, is_linked: bool
) -> None:
    """4.8, 5: of any run; others stay as they are, and are told all the same."""
    await ledger.compensations.upsert(compensation("c", scope), now_ms=3_000)
    ours = letter("l", scope, status=before, compensation_id="c", run_id="another-run")
    other = letter("m", scope, compensation_id="d")
    for record in (ours, other):
        await ledger.dead_letters.upsert(record, now_ms=3_000)

    execution = await ledger.execute_compensation("c", actor=OPERATOR, now_ms=4_000)

    assert execution is not None
    [told] = execution.linked_dead_letters
    assert await ledger.dead_letters.get("l", now_ms=5_000) == told
    assert await ledger.dead_letters.get("m", now_ms=5_000) == other
    if not is_linked:
        assert told == ours
        return
    assert (told.status, told.operator_disposition) == (
        "linked_to_compensation",
        "linked_to_compensation",
    )
    assert told.disposition_reason == "compensation `c` completed by stateful runtime"
    assert (told.disposition_actor, told.disposition_at_ms) == (OPERATOR, 4_000)


async def test_two_at_once_execute_it_once(ledger: Ledger, scope: StatefulRuntimeScope) -> None:
    """One execution; all the others are told that it was done."""
    await ledger.compensations.upsert(compensation("c", scope), now_ms=3_000)

    found = await asyncio.gather(
        *(ledger.execute_compensation("c", now_ms=4_000 + i) for i in range(8))
    )

    assert sorted(one.already_completed for one in found if one) == [False, *[True] * 7]
    assert len({one.compensation.updated_at_ms for one in found if one}) == 1
    assert len(await _all(ledger.effects)) == 1


# --- with an executor -----------------------------------------------------------------------------


@pytest.fixture
async def live(server: Server, tenant_name: str) -> Any:
    """A tenant on the server's clock, which the gate's dispatch needs."""
    async with leasekit.connect(server.url) as kit:
        yield kit.tenant(tenant_name, "w")


async def _proposed(live: Tenant, **changes: Any) -> Ledger:
    record = compensation("c", scope_of(live.context), **changes)
    await live.ledger.compensations.upsert(record)
    return live.ledger


async def _executed(live: Tenant) -> Compensation:
    found = await live.ledger.compensations.get("c")
    assert found is not None
    return found


async def test_an_executor_makes_the_call_once(live: Tenant) -> None:
    """The call is made with the key of the attempt, through the gate; then the receipt is written."""
    ledger, keys = await _proposed(live), []

    async def call(running: Compensation, permit: Permit) -> dict[str, int]:
        assert (running.status, running.attempts) == ("running", 1)
        assert await _executed(live) == running
        keys.append(permit.key)
        return {"refunded": 1}

    first = await ledger.execute_compensation("c", executor=call)
    second = await ledger.execute_compensation("c", executor=call)

    assert keys == ["stateful-compensation:c:1"]
    assert first is not None
    assert second is not None
    assert (first.already_completed, second.already_completed) == (False, True)
    assert first.compensation.attempts == 1
    assert first.compensation == second.compensation == await _executed(live)
    rows = (await live.gate.list()).items
    assert {row.status for row in rows} == {"sent"}
    [made] = [row for row in rows if row.result is not None]
    assert made.result == {"refunded": 1}


async def test_a_crash_before_the_receipt_goes_on_under_the_same_key(
    live: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call was made, its receipt not written: the next execution writes it and calls nobody."""
    ledger, calls = await _proposed(live), 0

    async def call(running: Compensation, permit: Permit) -> None:
        nonlocal calls
        calls += 1

    async def crash(*_: object) -> None:
        raise RuntimeError("the process ends here")

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_letters_of", crash)
        with pytest.raises(RuntimeError):
            await ledger.execute_compensation("c", executor=call)
    assert (await _executed(live)).status == "running"
    assert (await ledger.effects.list()).items == []

    execution = await ledger.execute_compensation("c", executor=call)

    assert calls == 1
    assert execution is not None
    assert (execution.already_completed, execution.compensation.attempts) == (False, 1)
    assert execution.compensation.status == "completed"
    assert len((await ledger.effects.list()).items) == 1


async def test_a_crash_while_the_call_is_made_leaves_it_unknown(live: Tenant) -> None:
    """Nobody knows whether it arrived: it is not made again before somebody says that it did not."""
    ledger, calls = await _proposed(live), 0

    async def call(running: Compensation, permit: Permit) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise TimeoutError("no answer")

    with pytest.raises(TimeoutError):
        await ledger.execute_compensation("c", executor=call)
    with pytest.raises(OutcomeUnknown):
        await ledger.execute_compensation("c", executor=call)
    assert calls == 1
    assert (await _executed(live)).status == "running"

    [row] = (await live.gate.list()).items
    assert row.status == IntentStatus.UNKNOWN
    await live.gate.resolve(row.outbox_id, "not_sent", actor="a", reason="asked them")
    execution = await ledger.execute_compensation("c", executor=call)

    assert calls == 2
    assert execution is not None
    assert (execution.compensation.status, execution.compensation.attempts) == ("completed", 1)


async def test_a_call_that_fails_is_another_attempt_the_next_time(live: Tenant) -> None:
    """`permit.failed`: the compensation is failed; executing it again has a key of its own."""
    ledger, keys = await _proposed(live), []

    async def call(running: Compensation, permit: Permit) -> None:
        keys.append(permit.key)
        if len(keys) == 1:
            await permit.failed("no such payment")

    failed = await ledger.execute_compensation("c", executor=call)
    assert failed is not None
    assert (failed.compensation.status, failed.receipt_effect) == ("failed", None)
    assert failed.compensation.metadata["execution_error"] == "no such payment"
    assert failed.compensation == await _executed(live)

    execution = await ledger.execute_compensation("c", executor=call)

    assert keys == ["stateful-compensation:c:1", "stateful-compensation:c:2"]
    assert execution is not None
    assert (execution.compensation.status, execution.compensation.attempts) == ("completed", 2)


async def test_a_crash_after_a_failure_is_noticed(
    live: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate knows that the call failed: the next execution says so, and calls nobody."""
    ledger, calls = await _proposed(live), 0

    async def call(running: Compensation, permit: Permit) -> None:
        nonlocal calls
        calls += 1
        await permit.failed("no")

    async def crash(*_: object) -> None:
        raise RuntimeError("the process ends here")

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_unmade", crash)
        with pytest.raises(RuntimeError):
            await ledger.execute_compensation("c", executor=call)
    assert (await _executed(live)).status == "running"

    execution = await ledger.execute_compensation("c", executor=call)

    assert calls == 1
    assert execution is not None
    assert execution.compensation.status == "failed"


async def test_a_call_that_was_not_made_is_made_under_the_same_key(live: Tenant) -> None:
    """`permit.not_sent`: the compensation stays running, and the attempt is not used up."""
    ledger, keys = await _proposed(live), []

    async def call(running: Compensation, permit: Permit) -> None:
        keys.append(permit.key)
        if len(keys) == 1:
            await permit.not_sent("no connection")

    unmade = await ledger.execute_compensation("c", executor=call)
    assert unmade is not None
    assert (unmade.compensation.status, unmade.receipt_effect) == ("running", None)

    execution = await ledger.execute_compensation("c", executor=call)

    assert keys == ["stateful-compensation:c:1"] * 2
    assert execution is not None
    assert (execution.compensation.status, execution.compensation.attempts) == ("completed", 1)


async def test_while_one_makes_the_call_another_is_told_so(live: Tenant) -> None:
    """Two operators, two executors: one call."""
    ledger, calls, started, go_on = await _proposed(live), 0, asyncio.Event(), asyncio.Event()

    async def call(running: Compensation, permit: Permit) -> None:
        nonlocal calls
        calls += 1
        started.set()
        await go_on.wait()

    first = asyncio.create_task(ledger.execute_compensation("c", executor=call))
    await started.wait()
    with pytest.raises(InProgress):
        await ledger.execute_compensation("c", executor=call)
    go_on.set()
    execution = await first

    assert calls == 1
    assert execution is not None
    assert execution.compensation.status == "completed"


async def test_a_compensation_cancelled_during_its_call_is_told(live: Tenant) -> None:
    """The call was made, and the table lets nothing follow `cancelled`: somebody must look."""
    ledger = await _proposed(live)

    async def call(running: Compensation, permit: Permit) -> None:
        await ledger.move_compensation("c", "cancelled")

    with pytest.raises(Conflict, match="its call was made"):
        await ledger.execute_compensation("c", executor=call)
    assert (await _executed(live)).status == "cancelled"
    [row] = (await live.gate.list()).items
    assert row.status == "sent"


async def test_an_approval_is_required_before_the_call(live: Tenant) -> None:
    """The executor is not called without it."""
    ledger = await _proposed(live, approval_required=True)

    async def call(running: Compensation, permit: Permit) -> None:
        raise AssertionError("called")

    with pytest.raises(Conflict, match="requires an approval"):
        await ledger.execute_compensation("c", executor=call, require_approval=True)
    assert await ledger.execute_compensation("missing", executor=call) is None
    assert (await live.gate.list()).items == []


async def test_an_executor_needs_the_servers_clock(
    ledger: Ledger, scope: StatefulRuntimeScope
) -> None:
    """Its lease counts by it; nothing is begun."""
    record = compensation("c", scope)
    await ledger.compensations.upsert(record, now_ms=3_000)

    async def call(running: Compensation, permit: Permit) -> None:
        raise AssertionError("called")

    with pytest.raises(InvalidInput, match="needs the server's clock"):
        await ledger.execute_compensation("c", executor=call, now_ms=4_000)
    assert await ledger.compensations.get("c", now_ms=4_000) == record
