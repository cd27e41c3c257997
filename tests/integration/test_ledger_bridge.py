"""What other systems say they did: the bridge, its reconcile with the gate, receipts of a dispatcher."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gate_events import KEY, call, outcome
from ledger_records import COMPENSATION, RECEIPT, action, failed_action, scope_of

from leasekit import InProgress, InvalidInput, Leasekit, Tenant
from leasekit.gate import IntentStatus
from leasekit.ledger import ExternalAction, Ledger, PrincipalRef, StatefulRuntimeScope, ToolEffect
from leasekit.ledger.store import Store

SUFFIX = "adad354a36524a9b"
EFFECT, OUTBOX = f"effect-{SUFFIX}", f"outbox-{SUFFIX}"
LETTER, COMPENSATION_ID = f"dead-letter-{EFFECT}", f"compensation-{EFFECT}"
OPERATOR = PrincipalRef(kind="human_user", id="operator-a")


@pytest.fixture
def ledger(tenant: Tenant) -> Ledger:
    return tenant.ledger


@pytest.fixture
def scope(tenant: Tenant) -> StatefulRuntimeScope:
    return scope_of(tenant.context)


@pytest.fixture
def told(ledger: Ledger, scope: StatefulRuntimeScope) -> Any:
    """Records an action in the test's own scope."""

    async def record(one: ExternalAction, now_ms: int = 3_000) -> ToolEffect:
        return await ledger.record_external_action(scope, one, now_ms=now_ms)

    return record


async def _all(records: Any, **filters: Any) -> list[Any]:
    return (await records.list(limit=1_000, now_ms=9_000, **filters)).items


async def test_a_success_is_an_intent_and_an_effect(
    tenant: Tenant, ledger: Ledger, scope: StatefulRuntimeScope, told: Any
) -> None:
    """4.5, 4.12: every field of both, literally; digests over what is not shown."""
    effect = await told(action("action-a", source_kind="s", provider="p", target="t"))

    assert effect == ToolEffect(
        effect_id=EFFECT,
        outbox_id=OUTBOX,
        action_id="action-a",
        run_id="run-a",
        scope=scope,
        status="succeeded",
        operation="mock_external_action.send",
        source_kind="s",
        node_id="node-a",
        provider="p",
        tool="SendMessage",
        target="t",
        external_resource={"provider": "p", "target": "t", "capability_id": None},
        input_digest="sha256:15d8299a23298dc302c91f30d5bca73ab1f5fe316178cbb9057cc702d8f1927a",
        output_digest="sha256:71385556c1a64cc48ed7d2e4337abeb943ac5f66c665376f62724ffec92767e8",
        receipt_payload_digest=(
            "sha256:48204035006dfd070cd0faf5525b9c429dcd845e47030924f1305b57bea257f7"
        ),
        receipt_payload_redacted={
            "result": {"status": "ok"},
            "authorization": "[redacted]",
            "nested": {"api_key": "[redacted]"},
        },
        receipt_pointer="external-action://action-a",
        redaction_tier="safe_ui",
        audit_hash="05107f4cea0830b3dcdfb045b511445bedcc1ba59b06fb7fe143af4f91dfbd16",
        created_at_ms=1_000,
        updated_at_ms=2_000,
        metadata={
            "approval_state": None,
            "idempotency_key": "idempotency-action-a",
            "context_run_id": "automation-v2-run-a",
            "routine_run_id": None,
        },
    )
    assert await _all(ledger.effects) == [effect]
    row = await tenant.gate.get(OUTBOX, now_ms=3_000)
    assert row is not None
    assert (row.status, row.cause, row.attempts) == ("sent", "ledger", 2)
    assert (row.created_at_ms, row.updated_at_ms) == (1_000, 2_000)
    assert (row.run_id, row.effect_id, row.receipt_id) == ("run-a", EFFECT, EFFECT)
    assert (row.claimed_by, row.claimed_at_ms, row.claim_expires_at_ms) == (None, None, None)
    assert row.payload_digest == effect.input_digest
    assert row.metadata == {
        "bridged_from": "external_action_record",
        "observed_after_execution": True,
        "external_action_id": "action-a",
    }
    assert await _all(ledger.dead_letters) == await _all(ledger.compensations) == []


async def test_a_failure_asks_for_an_operator(tenant: Tenant, ledger: Ledger, told: Any) -> None:
    """4.5, 6: a dead letter, and the compensation that the action describes; all know each other."""
    more = {"compensation": COMPENSATION | {"token": "s"}, "policyDecisionID": "p"}
    effect = await told(action("action-a", "failed", error="no route", metadata=more))

    [letter], [compensation] = await _all(ledger.dead_letters), await _all(ledger.compensations)
    row = await tenant.gate.get(OUTBOX, now_ms=3_000)
    assert row is not None
    assert (effect.status, effect.error) == ("failed", "no route")
    assert (letter.dead_letter_id, letter.status, letter.reason) == (LETTER, "open", "no route")
    assert (letter.source_type, letter.source_id, letter.attempts) == ("tool_effect", EFFECT, 2)
    assert letter.recovery_options == ["retry", "ignore", "compensate"]
    assert letter.payload_pointer == "external-action://action-a"
    assert letter.metadata == {
        "operation": "mock_external_action.send",
        "status": "failed",
        "idempotency_key": "idempotency-action-a",
    }
    assert (compensation.compensation_id, compensation.status) == (COMPENSATION_ID, "proposed")
    assert (compensation.target_effect_id, compensation.outbox_id) == (EFFECT, OUTBOX)
    assert (compensation.compensation_type, compensation.rollback_instruction) == (
        "operator_review",
        "undo it",
    )
    assert (compensation.attempts, compensation.policy_decision_id) == (0, "p")
    assert compensation.metadata == COMPENSATION | {"token": "[redacted]"}
    assert letter.created_at_ms == compensation.updated_at_ms == 2_000
    assert {effect.compensation_id, letter.compensation_id, row.compensation_id} == {
        COMPENSATION_ID
    }
    assert (row.status, row.dead_letter_id) == ("failed", LETTER)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, None),
        ({"compensation": {}}, (COMPENSATION_ID, "operator_review", True)),
        ({"compensation": {"kind": "refund"}}, (COMPENSATION_ID, "refund", True)),
        ({"compensation": {"type": "a", "kind": "b"}}, (COMPENSATION_ID, "a", True)),
        (
            {"compensation_policy": {"compensation_id": "c", "approval_required": False}},
            ("c", "operator_review", False),
        ),
        ({"compensation": {"approval_required": "no"}}, (COMPENSATION_ID, "operator_review", True)),
    ],
)
async def test_an_action_says_how_it_is_compensated(
    ledger: Ledger, told: Any, metadata: Any, expected: Any
) -> None:
    """4.5, 6a."""
    await told(action("action-a", "rejected", metadata=metadata))

    found = [
        (one.compensation_id, one.compensation_type, one.approval_required)
        for one in await _all(ledger.compensations)
    ]
    assert found == ([] if expected is None else [expected])
    [letter] = await _all(ledger.dead_letters)
    assert letter.reason == "external action `mock_external_action.send` failed"


@pytest.mark.parametrize("status", ["queued", "who knows"])
async def test_what_is_not_over_clears_and_makes_nothing(
    tenant: Tenant, ledger: Ledger, told: Any, status: str
) -> None:
    """4.5, 7: pending and unknown."""
    await told(action("action-b", status))
    assert await _all(ledger.dead_letters) == await _all(ledger.compensations) == []
    await told(failed_action("action-a"))
    before = await _all(ledger.dead_letters), await _all(ledger.compensations)

    await told(action("action-a", status))

    assert (await _all(ledger.dead_letters), await _all(ledger.compensations)) == before
    row = await tenant.gate.get(OUTBOX, now_ms=3_000)
    assert row is not None
    assert row.status == "failed"


async def test_a_success_clears_what_nobody_touched(ledger: Ledger, told: Any) -> None:
    """4.5, 7: the pristine dead letter and compensation of the same effect, and no others."""
    await told(failed_action("action-a"))
    await told(failed_action("action-b"))

    await told(action("action-a", updated_at_ms=2_500))

    assert [one.source_id for one in await _all(ledger.dead_letters)] != [EFFECT]
    assert len(await _all(ledger.dead_letters)) == len(await _all(ledger.compensations)) == 1


@pytest.mark.parametrize("actor", [None, "somebody"])
async def test_a_success_of_another_scope_clears_nothing(
    ledger: Ledger, scope: StatefulRuntimeScope, told: Any, actor: str | None
) -> None:
    """4.5, 7: scopes are compared whole, the run too."""
    await told(failed_action("action-a"))
    if actor is None:
        await told(action("action-a", metadata={"automationRunID": "run-b"}))
    else:
        context = scope.tenant_context.__class__.explicit(
            scope.tenant_context.org_id, scope.tenant_context.workspace_id, actor
        )
        await ledger.record_external_action(scope_of(context), action("action-a"), now_ms=3_000)

    assert len(await _all(ledger.dead_letters)) == len(await _all(ledger.compensations)) == 1


async def test_what_an_operator_began_becomes_idle(ledger: Ledger, told: Any) -> None:
    """4.7: it is kept, and marked; active views do not show it."""
    await told(failed_action("action-a"))
    await ledger.dispose(LETTER, "open", "reviewed", reason="mine", now_ms=4_000)
    await ledger.move_compensation(COMPENSATION_ID, "approved", now_ms=1_500)

    effect = await told(action("action-a", updated_at_ms=2_500))

    [letter], [compensation] = await _all(ledger.dead_letters), await _all(ledger.compensations)
    mark = {
        "superseded_by_success": True,
        "superseded_by_effect_id": EFFECT,
        "superseded_at_ms": 2_500,
        "superseded_by_outbox_id": OUTBOX,
    }
    assert letter.metadata.items() >= mark.items()
    assert compensation.metadata.items() >= mark.items()
    assert (letter.status, letter.disposition_reason, letter.updated_at_ms) == (
        "open",
        "mine",
        4_000,
    )
    assert (compensation.status, compensation.updated_at_ms) == ("approved", 2_500)
    assert effect.status == "succeeded"
    assert await _all(ledger.dead_letters, active_only=True) == []
    assert await _all(ledger.compensations, active_only=True) == []


@pytest.mark.parametrize("status", ["retrying", "ignored", "linked_to_compensation", "resolved"])
async def test_a_replay_of_a_failure_keeps_what_an_operator_began(
    ledger: Ledger, told: Any, status: str
) -> None:
    """Spec 9, hazard 10: neither disposition, nor approval, nor counts are lost."""
    await told(failed_action("action-a"))
    letter = await ledger.dispose(LETTER, status, status, now_ms=4_000)
    compensation = await ledger.move_compensation(COMPENSATION_ID, "approved", now_ms=4_000)

    effect = await told(failed_action("action-a", updated_at_ms=5_000))

    assert await _all(ledger.dead_letters) == [letter]
    assert await _all(ledger.compensations) == [compensation]
    assert (effect.status, effect.compensation_id) == ("failed", COMPENSATION_ID)


async def test_a_failure_of_another_run_keeps_it_too(ledger: Ledger, told: Any) -> None:
    """The ids say what they are about: the run does not make them others."""
    await told(failed_action("action-a"))
    letter = await ledger.dispose(LETTER, "ignored", "ignored", now_ms=4_000)

    await told(failed_action("action-a", metadata={"automationRunID": "run-b"}))

    assert await _all(ledger.dead_letters) == [letter]


async def test_a_failure_after_a_success_is_news(ledger: Ledger, told: Any) -> None:
    """What became idle needs somebody again; what was done about the first failure is still to be seen."""
    await told(failed_action("action-a"))
    await ledger.dispose(LETTER, "ignored", "ignored", reason="mine", now_ms=4_000)
    await ledger.move_compensation(COMPENSATION_ID, "approved", now_ms=4_000)
    await told(action("action-a", updated_at_ms=4_500))

    await told(failed_action("action-a", updated_at_ms=5_000))

    [letter] = await _all(ledger.dead_letters, active_only=True)
    [compensation] = await _all(ledger.compensations, active_only=True)
    assert (letter.status, letter.disposition_reason, letter.updated_at_ms) == (
        "open",
        "mine",
        5_000,
    )
    assert "superseded_by_success" not in letter.metadata
    assert (compensation.status, compensation.updated_at_ms) == ("approved", 5_000)


async def test_the_latest_action_of_a_key_wins(tenant: Tenant, ledger: Ledger, told: Any) -> None:
    """4.5, 8: one intent and one effect a key."""
    await told(action("action-a", "queued"))
    await told(action("action-x", idempotency_key="idempotency-action-a", receipt=None))

    [effect] = await _all(ledger.effects)
    assert (effect.action_id, effect.status, effect.output_digest) == (
        "action-x",
        "succeeded",
        None,
    )
    [row] = (await tenant.gate.list(now_ms=9_000)).items
    assert (row.status, row.metadata["external_action_id"]) == ("sent", "action-x")


async def test_an_action_of_another_tenant_is_refused(
    tenant: Tenant, scope: StatefulRuntimeScope
) -> None:
    """Nothing crosses a tenant."""
    context = scope.tenant_context.__class__.explicit("another", "w")
    with pytest.raises(InvalidInput, match="names another tenant"):
        await tenant.ledger.record_external_action(scope_of(context), action("a"), now_ms=1)
    assert (await tenant.gate.list(now_ms=2)).items == []


async def test_a_record_that_is_too_large_is_refused_whole(ledger: Ledger, told: Any) -> None:
    """64 KiB a record; nothing of the action is there."""
    with pytest.raises(InvalidInput, match="at most 65536"):
        await told(failed_action("action-a", receipt={"text": "x" * 65_536}))
    assert await _all(ledger.effects) == await _all(ledger.dead_letters) == []


async def test_a_failing_and_a_succeeding_action_at_once(ledger: Ledger, told: Any) -> None:
    """Whichever lands last, nothing active stands beside a success."""
    for i in range(10):
        name = f"action-{i}"
        await asyncio.gather(told(failed_action(name)), told(action(name)))
    for effect in await _all(ledger.effects):
        about = [
            one for one in await _all(ledger.dead_letters) if one.source_id == effect.effect_id
        ]
        assert len(about) == (effect.status == "failed")


async def test_a_failure_that_lands_while_a_success_reads_is_noticed(
    kit: Leasekit,
    ledger: Ledger,
    scope: StatefulRuntimeScope,
    told: Any,
    tenant_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its dead letter was not there when the lists were read: the success begins again."""
    # Of another process, as it were: it does not wait in this one's line.
    other = kit.tenant(tenant_name, "w", actor="b").ledger
    read, has_landed = Store.page, False

    async def page(store: Store, *arguments: Any, **words: Any) -> Any:
        nonlocal has_landed
        found = await read(store, *arguments, **words)
        if not has_landed:
            has_landed = True
            await other.record_external_action(scope, failed_action("action-a"), now_ms=3_000)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Store, "page", page)
        effect = await told(action("action-a"))

    assert has_landed
    assert await _all(ledger.effects) == [effect]
    assert await _all(ledger.dead_letters) == await _all(ledger.compensations) == []


# --- reconcile with what the gate granted (3.9) ---------------------------------------------------


def of_call(status: str, **changes: Any) -> ExternalAction:
    """The action that reports the fixture's call."""
    return action("action-a", status, idempotency_key=KEY, **changes)


async def test_a_receipt_reconciles_what_was_prepared(tenant: Tenant, told: Any) -> None:
    """3.9: the older creation, the larger attempts, claimant and what was known before."""
    receipt = await tenant.gate.prepare(call(), now_ms=500)
    assert receipt is not None
    before = await tenant.gate.get(receipt.outbox_id, now_ms=600)
    assert before is not None

    await told(of_call("posted", metadata={"input": None}, source_id=None))

    row = await tenant.gate.get(receipt.outbox_id, now_ms=3_000)
    assert row is not None
    assert (row.status, row.cause, row.claim_expires_at_ms) == ("sent", "ledger", None)
    assert (row.created_at_ms, row.attempts) == (500, 2)
    assert (row.claimed_by, row.claimed_at_ms) == ("tool-dispatch-ledger", 500)
    assert (row.source_id, row.payload_digest) == (KEY, "sha256:payload")
    assert row.metadata == {
        "bridged_from": "external_action_record",
        "observed_after_execution": True,
        "external_action_id": "action-a",
        "pre_send_dispatch_gate": True,
        "observed_before_execution": True,
        "reconciled_after_execution": True,
        "pre_send_metadata": before.metadata,
    }


async def test_a_second_receipt_does_not_wrap_the_first(tenant: Tenant, told: Any) -> None:
    """What was known before the call stays what it was, however often the action is told."""
    receipt = await tenant.gate.prepare(call(), now_ms=500)
    assert receipt is not None
    before = await tenant.gate.get(receipt.outbox_id, now_ms=600)
    for _ in range(3):
        await told(of_call("posted"))

    row = await tenant.gate.get(receipt.outbox_id, now_ms=3_000)
    assert row is not None
    assert before is not None
    assert row.metadata["pre_send_metadata"] == before.metadata


@pytest.mark.parametrize("on_expiry", ["reclaim", "park"])
@pytest.mark.parametrize("status", ["queued", "who knows"])
async def test_what_says_nothing_final_takes_no_grant(
    tenant: Tenant, told: Any, status: str, on_expiry: Any
) -> None:
    """A pending or unknown action never takes a grant from its sender, nor frees what it holds."""
    receipt = await tenant.gate.prepare(call(), on_expiry=on_expiry, now_ms=500)
    assert receipt is not None

    await told(of_call(status), now_ms=600)

    row = await tenant.gate.get(receipt.outbox_id, now_ms=700)
    assert row is not None
    assert (row.status, row.claim_expires_at_ms) == ("claimed", receipt.lease_expires_at_ms)
    assert row.metadata["reconciled_after_execution"] is True
    with pytest.raises(InProgress):
        await tenant.gate.prepare(call(), now_ms=700)
    extended = await tenant.gate.extend(receipt, lease_ms=900, now_ms=800)
    assert extended is not None
    assert await tenant.gate.complete(outcome(), receipt=receipt, now_ms=900) == "recorded"
    # And what was sent is not freed by it either.
    await told(of_call(status), now_ms=1_000)
    row = await tenant.gate.get(receipt.outbox_id, now_ms=1_100)
    assert row is not None
    assert row.status == "sent"


async def test_a_receipt_answers_what_nobody_knew(tenant: Tenant, told: Any) -> None:
    """An intent that is unknown is sent once the destination's own record says so."""
    receipt = await tenant.gate.prepare(call(), on_expiry="park", lease_ms=10, now_ms=500)
    assert receipt is not None
    unknown = await tenant.gate.get(receipt.outbox_id, now_ms=600)
    assert unknown is not None
    assert unknown.status == IntentStatus.UNKNOWN

    await told(of_call("queued"), now_ms=600)
    still = await tenant.gate.get(receipt.outbox_id, now_ms=600)
    assert still is not None
    assert still.status == IntentStatus.UNKNOWN
    await told(of_call("delivered"), now_ms=700)

    row = await tenant.gate.get(receipt.outbox_id, now_ms=700)
    assert row is not None
    assert (row.status, row.unknown_since_ms) == ("sent", None)
    assert (await tenant.gate.unknown(now_ms=700)).items == []


async def test_its_sender_may_still_say_what_weighs_more(tenant: Tenant, told: Any) -> None:
    """The ledger believed a failure; the sender, who was granted it, says that it was sent."""
    receipt = await tenant.gate.prepare(call(), now_ms=500)
    await told(of_call("failed"))

    assert await tenant.gate.complete(outcome(), receipt=receipt, now_ms=4_000) == "recorded"
    assert receipt is not None
    row = await tenant.gate.get(receipt.outbox_id, now_ms=4_000)
    assert row is not None
    assert row.status == "sent"


# --- receipts of a dispatcher (3.7) ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "policy", "status", "expected"),
    [
        ("policy_decision", "denied", "blocked", "failed"),
        ("policy_decision", "approval_required", "blocked", "pending"),
        ("policy_decision", "allowed", "succeeded", "succeeded"),
        ("execution_started", "allowed", "succeeded", "pending"),
        ("execution_completed", "allowed", "succeeded", "succeeded"),
        ("execution_failed", "allowed", "failed", "failed"),
        ("execution_failed", "allowed", "blocked", "failed"),
    ],
)
async def test_each_phase_leaves_a_receipt(
    tenant: Tenant, ledger: Ledger, phase: str, policy: str, status: str, expected: str
) -> None:
    """3.7: one effect a phase; only the last phases complete the intent."""
    await tenant.gate.prepare(call(), now_ms=500)
    event = outcome(
        status, policy_outcome=policy, receipt_phase=phase, error=None, scope_allowlist=["mcp.*"]
    )

    effect = await ledger.record_dispatch(event, now_ms=600)

    assert (effect.effect_id, effect.status) == (f"tool-dispatch-{KEY}-{phase}", expected)
    assert (effect.source_kind, effect.source_id) == ("automation_v2", KEY)
    assert (effect.outbox_id, effect.run_id) == (None, "run-1")
    assert effect.receipt_pointer == f"tool-dispatch://{KEY}/{phase}"
    assert effect.receipt_payload_digest is not None
    assert not effect.receipt_payload_digest.startswith("sha256:")
    assert effect.receipt_payload_redacted["approval_requirement"] is None
    assert effect.metadata == {
        "receipt_source": "central_tool_dispatcher",
        "receipt_phase": phase,
        "scope_allowlist": ["mcp.*"],
    }
    assert await _all(ledger.effects) == [effect]
    [row] = (await tenant.gate.list(now_ms=700)).items
    done = {"succeeded": "sent", "failed": "failed", "blocked": "cancelled"}[status]
    assert row.status == (
        done if phase in ("execution_completed", "execution_failed") else "claimed"
    )


async def test_a_receipt_holds_what_was_told_unredacted(ledger: Ledger) -> None:
    """3.7; the hash is over the canonical text."""
    event = outcome("failed", "d", receipt_phase="execution_failed", error="token abc")

    effect = await ledger.record_dispatch(event, now_ms=600)

    assert effect.receipt_payload_redacted == {
        "dispatch_id": "d",
        "tool": "mcp.github.create_issue",
        "canonical_tool": None,
        "source": {"kind": "automation_v2", "run_id": "run-1", "node_id": "node-1"},
        "policy_outcome": "allowed",
        "receipt_phase": "execution_failed",
        "policy_decision_id": "policy-1",
        "approval_requirement": None,
        "status": "failed",
        "error": "token abc",
    }
    assert effect.error == "token abc"
    assert RECEIPT["authorization"] == "Bearer abc"


async def test_a_receipt_without_a_dispatch_id_has_a_name_all_the_same(ledger: Ledger) -> None:
    """3.7: H0 of tool, source and payload digest."""
    events = [outcome("succeeded", None, payload_digest=digest) for digest in ("x", "x", None)]
    found = [await ledger.record_dispatch(event, now_ms=600) for event in events]

    assert found[0].effect_id == found[1].effect_id != found[2].effect_id
    assert found[0].effect_id.endswith("-execution_completed")
    assert len(found[0].source_id or "") == 64
