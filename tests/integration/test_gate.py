"""The gate's two ends as their users see them, on every server: spec/reliability 3.2-3.6."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from gate_events import ARGS, FIVE_MINUTES, ID, KEY, TOOL, call, outcome
from servers import Server, dump

from leasekit import (
    Conflict,
    CorruptState,
    GatePolicy,
    InProgress,
    InvalidInput,
    Leasekit,
    LeasekitError,
    LeaseLost,
    OutcomeUnknown,
    Tenant,
    new_token,
)
from leasekit.gate import Gate, Intent, Receipt, Source, dispatch_id, undecidable
from leasekit.gate.identity import key_digest
from leasekit.model import TenantContext
from leasekit.policy import SEED_TIERS

Connect = Callable[..., Awaitable[Leasekit]]
State = Callable[[], dict[str, Any]]

NOW = 1_000
ORG_A = TenantContext.explicit("org-a", "workspace-a", "user-a")


@pytest.fixture
def gate(tenant: Tenant) -> Gate:
    return tenant.gate


async def prepare(gate: Gate, now_ms: int = NOW, **options: Any) -> Receipt:
    """Be granted the fixture's call, or the `event` given."""
    event = options.pop("event", None) or call()
    receipt = await gate.prepare(event, now_ms=now_ms, **options)
    assert receipt is not None
    return receipt


async def look(gate: Gate, now_ms: int = NOW, id: str = ID) -> Intent:
    intent = await gate.get(id, now_ms=now_ms)
    assert intent is not None
    return intent


async def only_row(gate: Gate, now_ms: int = NOW) -> Intent:
    """The one intent that there is."""
    page = await gate.list(now_ms=now_ms)
    assert len(page.items) == 1
    return page.items[0]


# --- the tested behaviours [SEED], with their literal fixture -------------------------------------


@pytest.fixture
async def seed_kit(connected: Connect, tenant_name: str) -> Leasekit:
    """A client whose prefix no other test has, so that the tenants can have their literal names."""
    return await connected(prefix=tenant_name)


@pytest.fixture
def org_a(seed_kit: Leasekit) -> Gate:
    """org-a / workspace-a / user-a."""
    return seed_kit.tenant("org-a", "workspace-a", actor="user-a").gate


@pytest.fixture
def org_a_state(server: Server, tenant_name: str) -> State:
    return lambda: dump(server.raw, tenant_name, "org-a.workspace-a")


async def test_a_call_is_recorded_before_and_after(org_a: Gate) -> None:
    """spec/reliability 3.10, first."""
    receipt = await prepare(org_a, event=call(tenant_context=ORG_A))
    claimed = await only_row(org_a)
    assert claimed.outbox_id == receipt.outbox_id
    assert (claimed.status, claimed.attempts) == ("claimed", 1)
    assert claimed.idempotency_key == receipt.idempotency_key
    assert claimed.metadata["observed_before_execution"] is True

    await org_a.complete(outcome(tenant_context=ORG_A), receipt=receipt, now_ms=NOW + 1)
    sent = await only_row(org_a, NOW + 1)
    assert (sent.status, sent.claim_expires_at_ms) == ("sent", None)
    assert sent.metadata["dispatch_status"] == "succeeded"


async def test_a_call_under_way_is_granted_to_nobody_else(org_a: Gate) -> None:
    """spec/reliability 3.10, second."""
    await prepare(org_a, event=call(tenant_context=ORG_A))
    with pytest.raises(InProgress, match="already `claimed`"):
        await prepare(org_a, event=call(tenant_context=ORG_A))
    row = await only_row(org_a)
    assert (row.status, row.attempts) == ("claimed", 1)


async def test_a_call_whose_claim_expired_is_granted_again(org_a: Gate) -> None:
    """spec/reliability 3.10, third: expiry is inclusive."""
    first = await prepare(org_a, event=call(tenant_context=ORG_A))
    assert first.lease_expires_at_ms == NOW + FIVE_MINUTES
    with pytest.raises(InProgress):
        await prepare(org_a, NOW + FIVE_MINUTES - 1)
    again = await prepare(org_a, NOW + FIVE_MINUTES, event=call(tenant_context=ORG_A))

    assert again.idempotency_key == first.idempotency_key
    row = await only_row(org_a, NOW + FIVE_MINUTES)
    assert (row.status, row.attempts) == ("claimed", 2)
    assert row.claim_expires_at_ms == NOW + 2 * FIVE_MINUTES


async def test_of_two_at_once_one_is_granted(
    org_a: Gate, connected: Connect, tenant_name: str
) -> None:
    """spec/reliability 3.10, fourth: in one client, and in two."""
    other = (await connected(prefix=tenant_name)).tenant("org-a", "workspace-a").gate
    for key, gates in (("in-one", [org_a, org_a]), ("in-two", [org_a, other])):
        event = call(key, tenant_context=ORG_A)
        results = await asyncio.gather(
            *(one.prepare(event, now_ms=NOW) for one in gates), return_exceptions=True
        )
        kinds = sorted(type(one).__name__ for one in results)
        assert kinds == ["InProgress", "Receipt"]
        granted = next(one for one in results if isinstance(one, Receipt))
        row = await look(org_a, id=granted.outbox_id)
        assert (row.status, row.attempts) == ("claimed", 1)
    assert len((await org_a.list(now_ms=NOW)).items) == 2


@pytest.mark.parametrize("phase", [None, "execution_failed"])
async def test_the_gates_own_denial_changes_nothing(
    org_a: Gate, org_a_state: State, phase: str | None
) -> None:
    """spec/reliability 3.10, fifth: the intent is the other sender's."""
    await prepare(org_a, event=call(tenant_context=ORG_A))
    before = org_a_state()
    denial = outcome(
        "blocked",
        tenant_context=ORG_A,
        receipt_phase=phase,
        error="ToolDenied { reason: OutboxGate }: pre-send outbox is already `claimed`",
    )
    assert await org_a.complete(denial, now_ms=NOW + 1) == "skipped"
    assert org_a_state() == before
    row = await only_row(org_a)
    assert (row.status, row.attempts) == ("claimed", 1)
    assert row.claim_expires_at_ms is not None


async def test_what_was_sent_is_not_granted_again(org_a: Gate) -> None:
    """spec/reliability 3.10, sixth."""
    await prepare(org_a, event=call(tenant_context=ORG_A))
    await org_a.complete(outcome(tenant_context=ORG_A), now_ms=NOW)
    with pytest.raises(Conflict, match="already `sent`"):
        await prepare(org_a, event=call(tenant_context=ORG_A))
    row = await only_row(org_a)
    assert (row.status, row.attempts, row.claim_expires_at_ms) == ("sent", 1, None)


@pytest.mark.parametrize("phase", [None, "execution_failed"])
async def test_a_blocked_call_is_cancelled(org_a: Gate, phase: str | None) -> None:
    """spec/reliability 3.10, seventh."""
    await prepare(org_a, event=call(tenant_context=ORG_A))
    blocked = outcome(
        "blocked",
        tenant_context=ORG_A,
        receipt_phase=phase,
        error="ToolDenied { reason: PolicyDenied }",
    )
    assert await org_a.complete(blocked, now_ms=NOW) == "recorded"
    row = await only_row(org_a)
    assert (row.status, row.claim_expires_at_ms) == ("cancelled", None)


async def test_a_cancelled_call_is_granted_again(org_a: Gate) -> None:
    """spec/reliability 3.10, eighth."""
    first = await prepare(org_a, event=call(tenant_context=ORG_A))
    await org_a.complete(outcome("blocked", tenant_context=ORG_A), now_ms=NOW)
    again = await prepare(org_a, event=call(tenant_context=ORG_A))
    assert again.idempotency_key == first.idempotency_key
    row = await only_row(org_a)
    assert (row.status, row.attempts) == ("claimed", 2)
    assert row.claim_expires_at_ms == NOW + FIVE_MINUTES


async def test_blocked_does_not_undo_what_was_sent(org_a: Gate) -> None:
    """spec/reliability 3.10, ninth."""
    await prepare(org_a, event=call(tenant_context=ORG_A))
    await org_a.complete(outcome(tenant_context=ORG_A), now_ms=NOW)
    assert await org_a.complete(outcome("blocked", tenant_context=ORG_A), now_ms=NOW) == "skipped"
    row = await only_row(org_a)
    assert (row.status, row.metadata["dispatch_status"]) == ("sent", "succeeded")


@pytest.mark.parametrize(
    "changes",
    [
        {"external_side_effect": True, "risk_tier": None},
        {"external_side_effect": False, "risk_tier": "external_send"},
    ],
    ids=["an effect without a tier", "a tier without the flag"],
)
async def test_either_a_tier_or_an_untiered_effect_is_gated(
    org_a: Gate, changes: dict[str, Any]
) -> None:
    """spec/reliability 3.10, tenth and eleventh."""
    await prepare(org_a, event=call(tenant_context=ORG_A, **changes))
    assert (await only_row(org_a)).status == "claimed"


async def test_a_read_is_not_gated(seed_kit: Leasekit, server: Server, tenant_name: str) -> None:
    """spec/reliability 3.10, last: the local tenant, no grant, nothing written."""
    local = seed_kit.tenant("local", "local").gate
    event = call(
        tool="read",
        external_side_effect=False,
        risk_tier=None,
        tenant_context=TenantContext("local", "local"),
    )
    assert await local.prepare(event, now_ms=NOW) is None
    assert server.raw.keys(f"{tenant_name}:*") == []


# --- what is gated --------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", sorted(SEED_TIERS))
async def test_the_tiers_of_the_seed_are_gated(gate: Gate, tier: str) -> None:
    """Whatever the flag says."""
    event = call(risk_tier=tier, external_side_effect=False)
    assert await gate.prepare(event, now_ms=NOW) is not None


@pytest.mark.parametrize(
    "tier", ["external_draft", "internal_write", "read_discover", "consequential_write", "made-up"]
)
async def test_an_effect_of_another_tier_is_not_gated(gate: Gate, state: State, tier: str) -> None:
    """An external effect with such a tier neither; and nothing is written."""
    event = call(risk_tier=tier, external_side_effect=True)
    assert await gate.prepare(event, now_ms=NOW) is None
    assert state() == {}


async def test_tiers_are_a_matter_of_configuration(connected: Connect, tenant_name: str) -> None:
    """consequential_write, which upstream gates as well; and a tier less."""
    policy = GatePolicy(tiers=SEED_TIERS - {"external_send"} | {"consequential_write"})
    gate = (await connected(gate=policy)).tenant(tenant_name, "w").gate
    gated = call(risk_tier="consequential_write", external_side_effect=False)
    assert await gate.prepare(gated, now_ms=NOW) is not None
    assert gate.is_gated(gated)
    assert await gate.prepare(call("other", risk_tier="external_send"), now_ms=NOW) is None


@pytest.mark.parametrize("policy_outcome", ["allowed", "denied", "approval_required"])
async def test_a_policys_outcome_is_recorded_and_not_consulted(
    gate: Gate, policy_outcome: str
) -> None:
    """Whoever denies must not come here (spec/reliability 3.2)."""
    await prepare(gate, event=call(policy_outcome=policy_outcome))
    assert (await look(gate)).metadata["policy_outcome"] == policy_outcome


# --- ids and the new row --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "id"),
    [
        ("tool-dispatch-test", "outbox-5b0a6f037273d4d4"),
        ("tool-dispatch-claimed", "outbox-ccdcacf91e20f94e"),
    ],
)
async def test_an_intents_id_is_made_of_its_key(gate: Gate, key: str, id: str) -> None:
    """spec/reliability, appendix A; the key is the dispatch id as it is."""
    receipt = await prepare(gate, event=call(key))
    assert (receipt.outbox_id, receipt.idempotency_key) == (id, key)
    row = await look(gate, id=id)
    assert (row.outbox_id, row.idempotency_key, row.source_id) == (id, key, key)


@pytest.mark.parametrize(
    ("deployment", "name"),
    [
        ("deployment-a", "tool-dispatch-2549fc0d6dc16334a0fd6dd8"),
        ("deployment-b", "tool-dispatch-6527312060329df6b396deb2"),
        (None, "tool-dispatch-29f72358719111e53d3f272c"),
    ],
)
async def test_a_calls_name_is_made_of_what_it_is(
    seed_kit: Leasekit, deployment: str | None, name: str
) -> None:
    """spec/reliability, appendix A, last: through the gate, with the digest of the arguments."""
    gate = seed_kit.tenant("org-a", "workspace-a", deployment).gate
    source = Source(kind="engine_loop", session_id="session-1", message_id="message-1")
    args = {"body": "same"}
    found, digest = dispatch_id("mcp.github.send", source, gate.context, args)
    assert found == name
    event = call(found, tool="mcp.github.send", source=source, args=args, payload_digest=digest)
    receipt = await prepare(gate, event=event)
    row = await look(gate, id=receipt.outbox_id)
    assert row.idempotency_key == name
    assert row.payload_digest == (
        "sha256:8eac791d8919fc9b1b6de1e11af9666f5db6d4017a66680117d713db4b25d176"
    )


async def test_a_new_row_has_every_field_of_the_spec(org_a: Gate) -> None:
    """spec/reliability 3.5, and what leasekit adds; what is absent is left out."""
    await prepare(org_a, event=call(tenant_context=ORG_A), owner="sender-1", lease_ms=5_000)
    row = msgspec.to_builtins(await only_row(org_a))
    fence = row.pop("fence")
    assert fence > 0
    assert row == {
        "outbox_id": ID,
        "run_id": "run-1",
        "scope": {
            "schema_version": 1,
            "tenant_context": {
                "org_id": "org-a",
                "workspace_id": "workspace-a",
                "actor_id": "user-a",
                "source": "explicit",
            },
            "risk_tier": "external_send",
        },
        "operation": TOOL,
        "status": "claimed",
        "source_kind": "automation_v2",
        "source_id": KEY,
        "node_id": "node-1",
        "provider": "github",
        "tool": TOOL,
        "target": "frumu-ai/tandem",
        "idempotency_key": KEY,
        "payload_digest": "sha256:payload",
        "policy_decision_id": "policy-1",
        "attempts": 1,
        "created_at_ms": NOW,
        "updated_at_ms": NOW,
        "claimed_by": "tool-dispatch-ledger",
        "claimed_at_ms": NOW,
        "claim_expires_at_ms": NOW + 5_000,
        "metadata": {
            "pre_send_dispatch_gate": True,
            "observed_before_execution": True,
            "dispatch_id": KEY,
            "dispatch_source": {"kind": "automation_v2", "run_id": "run-1", "node_id": "node-1"},
            "scope_allowlist": [],
            "policy_outcome": "allowed",
            "risk_tier": "external_send",
        },
        "cause": "granted",
        "revision": 1,
        "on_expiry": "reclaim",
        "owner": "sender-1",
    }


async def test_a_row_keeps_no_arguments(gate: Gate, state: State) -> None:
    """But for the target's name: they are hashed."""
    event = call(args={"repo": " r ", "title": "s3cret"}, payload_digest=None, risk_tier=None)
    await prepare(gate, event=event)
    row = await look(gate)
    assert (row.target, row.payload_digest) == ("r", None)
    assert (row.metadata["risk_tier"], "risk_tier" in row.scope) == (None, False)
    assert "s3cret" not in str(state())


async def test_an_unknown_tier_is_only_told(connected: Connect, tenant_name: str) -> None:
    """A tier that no ToolRiskTier is stands in the metadata, and not in the scope."""
    kit = await connected(gate=GatePolicy(tiers=frozenset({"our_own"})))
    gate = kit.tenant(tenant_name, "w").gate
    await prepare(gate, event=call(risk_tier="our_own"))
    row = await look(gate)
    assert ("risk_tier" in row.scope, row.metadata["risk_tier"]) == (False, "our_own")


async def test_the_full_name_of_a_tool_counts(gate: Gate) -> None:
    """operation and provider come of canonical_tool, where there is one."""
    await prepare(gate, event=call(tool="issue", canonical_tool=TOOL))
    row = await look(gate)
    assert (row.operation, row.tool, row.provider) == (TOOL, "issue", "github")


# --- reuse ----------------------------------------------------------------------------------------


async def bury(gate: Gate) -> None:
    """Have the fixture's intent become dead_lettered: nobody could tell."""
    await prepare(gate, on_expiry="park", lease_ms=1)

    async def ask(question: object) -> Any:
        return undecidable()

    counts = await gate.reconcile({"*": ask}, settle_ms=0, asks_max=1, now_ms=NOW + 1)
    assert counts.dead_lettered == 1


async def reach(gate: Gate, status: str) -> None:
    """Bring the fixture's intent to a status, as its users do, at NOW (or right after)."""
    if status == "dead_lettered":
        await bury(gate)
        return
    await prepare(gate, **({"on_expiry": "park", "lease_ms": 1} if status == "unknown" else {}))
    said = {"sent": "succeeded", "failed": "failed", "cancelled": "blocked"}.get(status)
    if said:
        assert await gate.complete(outcome(said), now_ms=NOW) == "recorded"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("claimed", InProgress),
        ("sent", Conflict),
        ("failed", Conflict),
        ("dead_lettered", Conflict),
        ("unknown", OutcomeUnknown),
    ],
)
async def test_a_status_that_is_not_reused_says_which(
    gate: Gate, state: State, status: str, kind: type[LeasekitError]
) -> None:
    """spec/reliability 3.4, in its words; and nothing is written."""
    await reach(gate, status)
    before = state()
    with pytest.raises(kind) as raised:
        await prepare(gate, NOW + 1)
    assert str(raised.value).startswith(f"pre-send outbox `{ID}` is already `{status}`")
    assert type(raised.value) is kind
    assert raised.value.id == ID
    assert getattr(raised.value, "status", status) == status
    assert state() == before
    assert (await look(gate, NOW + 1)).status == status


@pytest.mark.parametrize("status", ["failed", "sent"])
async def test_what_is_final_stays_so(gate: Gate, status: str) -> None:
    """However much later: a failed key is used up for ever (spec/reliability 3.6)."""
    await reach(gate, status)
    with pytest.raises(Conflict, match=f"already `{status}`"):
        await prepare(gate, NOW + 100 * FIVE_MINUTES)


@pytest.mark.parametrize(
    "other",
    [
        TenantContext("other", "w"),
        TenantContext("{own}", "other"),
        TenantContext("{own}", "w", "deployment"),
    ],
    ids=["org", "workspace", "deployment"],
)
async def test_an_event_of_another_tenant_is_refused(
    gate: Gate, state: State, tenant_name: str, other: TenantContext
) -> None:
    """In the words of spec/reliability 3.4 2a, and before anything is written."""
    own = other.org_id.replace("{own}", tenant_name)
    context = TenantContext(own, other.workspace_id, other.deployment_id)
    with pytest.raises(Conflict) as raised:
        await prepare(gate, event=call(tenant_context=context))
    assert str(raised.value).startswith(
        f"pre-send outbox `{ID}` belongs to a different tenant scope"
    )
    assert state() == {}


async def test_the_actor_makes_no_other_tenant(gate: Gate, tenant_name: str) -> None:
    """spec/reliability 1.2."""
    await prepare(
        gate, event=call(tenant_context=TenantContext(tenant_name, "w", None, "somebody"))
    )
    with pytest.raises(InProgress):
        await prepare(
            gate, event=call(tenant_context=TenantContext(tenant_name, "w", None, "else"))
        )


async def test_the_same_key_of_another_tenant_is_another_intent(
    kit: Leasekit, tenant_name: str
) -> None:
    """Ids are equal, rows are not."""
    gates = [kit.tenant(tenant_name, workspace).gate for workspace in ("one", "two")]
    receipts = [await prepare(gate) for gate in gates]
    assert receipts[0].outbox_id == receipts[1].outbox_id
    await gates[0].complete(outcome(), receipt=receipts[0], now_ms=NOW)
    assert [(await look(gate)).status for gate in gates] == ["sent", "claimed"]
    assert await gates[1].complete(outcome(), receipt=receipts[0], now_ms=NOW) == "lost"


def move(server: Server, tenant_name: str, change: Callable[[bytes], bytes], to: str = ID) -> None:
    """Have an intent's state line say something else, and stand under another id."""
    keys = [f"lk:{{{tenant_name}.w}}:gate:{noun}" for noun in ("state", "docs")]
    for key in keys:
        value = server.raw.hget(key, ID)
        server.raw.hset(key, to, change(value) if key.endswith("state") else value)


async def test_two_keys_of_one_id_conflict(gate: Gate, server: Server, tenant_name: str) -> None:
    """spec/reliability 3.4 2b, in its words: the id is a short hash."""
    await prepare(gate)
    other = "outbox-ccdcacf91e20f94e"  # of tool-dispatch-claimed
    move(server, tenant_name, lambda line: line, to=other)
    with pytest.raises(Conflict) as raised:
        await prepare(gate, event=call("tool-dispatch-claimed"))
    assert str(raised.value).startswith(
        f"pre-send outbox `{other}` has a conflicting idempotency key"
    )
    assert raised.value.status is None


async def test_a_row_without_a_key_is_anybodys(
    gate: Gate, server: Server, tenant_name: str
) -> None:
    """spec/reliability 3.4 2b: an absent stored key passes; the row's status still counts."""
    await prepare(gate)
    other = "outbox-ccdcacf91e20f94e"
    move(server, tenant_name, lambda line: line.replace(key_digest(KEY).encode(), b"~"), to=other)
    with pytest.raises(InProgress, match="already `claimed`"):
        await prepare(gate, event=call("tool-dispatch-claimed"))


async def test_a_pending_row_is_granted(gate: Gate, server: Server, tenant_name: str) -> None:
    """spec/reliability 3.4 2c."""
    await prepare(gate)
    move(server, tenant_name, lambda line: line.replace(b"claimed granted", b"pending created", 1))
    assert (await look(gate)).status == "pending"
    await prepare(gate)
    assert (await look(gate)).attempts == 2


async def test_a_damaged_row_is_granted_to_nobody(
    gate: Gate, server: Server, tenant_name: str
) -> None:
    """spec/reliability 3.4 1: an error, never a silent overwrite."""
    await prepare(gate)
    move(server, tenant_name, lambda line: line[:20])
    with pytest.raises(CorruptState, match="nothing was granted; run `leasekit doctor`"):
        await prepare(gate)
    stored = server.raw.hget(f"lk:{{{tenant_name}.w}}:gate:state", ID)
    assert len(stored) == 20


@pytest.mark.parametrize(
    "changes",
    [
        {"payload_digest": "sha256:other"},
        {"tool": "mcp.github.close_issue"},
        {"payload_digest": None},
        {"payload_digest": None, "args": {"title": "other"}},
    ],
    ids=["digest", "tool", "arguments for a digest", "arguments"],
)
@pytest.mark.parametrize("status", ["claimed", "sent", "cancelled"])
async def test_the_same_key_with_another_request_is_a_conflict(
    gate: Gate, state: State, status: str, changes: dict[str, Any]
) -> None:
    """Never a send, whatever became of the first (issue 4)."""
    await reach(gate, status)
    before = state()
    with pytest.raises(Conflict, match="with other arguments under the same key") as raised:
        await prepare(gate, event=call(**changes))
    assert type(raised.value) is Conflict
    assert raised.value.status is None
    assert state() == before


async def test_equal_arguments_are_the_same_request(gate: Gate) -> None:
    """In any order, with reserved keys or without; what is beside tool and arguments is not asked."""
    event = call(payload_digest=None)
    await reach_cancelled(gate, event)
    turned = dict(reversed(ARGS.items())) | {"__workflow_phase": "x"}
    again = call(
        payload_digest=None,
        args=turned,
        policy_decision_id="policy-2",
        source=Source(kind="other"),
    )
    assert (await prepare(gate, event=again)).attempts == 2


async def reach_cancelled(gate: Gate, event: Any) -> None:
    receipt = await prepare(gate, event=event)
    await gate.complete(outcome("blocked"), receipt=receipt, now_ms=NOW)


async def test_reuse_keeps_everything_else(gate: Gate) -> None:
    """spec/reliability 3.4: operation, scope, target, created_at, metadata with its old flags."""
    await prepare(gate, event=call(scope_allowlist=["a"]))
    await gate.complete(outcome("blocked", error="E"), now_ms=NOW + 1)
    await prepare(
        gate,
        NOW + 2,
        event=call(
            scope_allowlist=["b"],
            args={"repo": "other"},
            source=Source(kind="other", run_id="run-2"),
            policy_outcome="denied",
        ),
    )
    row = await look(gate, NOW + 2)
    assert (row.status, row.attempts, row.claimed_at_ms) == ("claimed", 2, NOW + 2)
    assert (row.created_at_ms, row.updated_at_ms) == (NOW, NOW + 2)
    assert (row.run_id, row.target, row.source_kind) == (
        "run-1",
        "frumu-ai/tandem",
        "automation_v2",
    )
    assert row.metadata["scope_allowlist"] == ["a"]
    assert row.metadata["policy_outcome"] == "allowed"
    assert row.metadata["dispatch_completed"] is True
    assert (row.metadata["dispatch_status"], row.metadata["dispatch_error"]) == ("blocked", "E")


# --- grants ---------------------------------------------------------------------------------------


async def test_a_grant_is_a_fence_above_all_before(gate: Gate) -> None:
    """Also where the clock steps back."""
    fences = [
        (await prepare(gate, now_ms, event=call(f"key-{now_ms}"))).fence
        for now_ms in (NOW, NOW + 5, NOW - 900)
    ]
    assert fences == sorted(set(fences))


async def test_the_token_that_has_the_grant_gets_it_again(gate: Gate, state: State) -> None:
    """A repeat is the same grant; another token is refused; nothing is written."""
    token = new_token()
    first = await prepare(gate, token=token)
    before = state()
    again = await prepare(gate, NOW + 5, token=token, repeat=True)
    assert again.fence == first.fence
    assert again.lease_expires_at_ms == first.lease_expires_at_ms
    assert (again.attempts, again.granted_at_ms) == (1, NOW)
    assert state() == before


@pytest.mark.parametrize(("on_expiry", "status"), [("reclaim", "claimed"), ("park", "unknown")])
async def test_a_repeat_after_the_lease_gets_nothing(
    gate: Gate, state: State, on_expiry: Any, status: str
) -> None:
    """Its first grant may have been used: what parks stays unknown."""
    token = new_token()
    await prepare(gate, token=token, on_expiry=on_expiry)
    before = state()
    with pytest.raises(LeaseLost, match="do not send; nothing was withdrawn"):
        await prepare(gate, NOW + FIVE_MINUTES, token=token, on_expiry=on_expiry, repeat=True)
    assert state() == before
    assert (await look(gate, NOW + FIVE_MINUTES)).status == status


async def test_a_token_grants_once(gate: Gate) -> None:
    """A late copy of a request whose grant was given back takes nothing."""
    token = new_token()
    receipt = await prepare(gate, token=token)
    await gate.complete(outcome("blocked"), receipt=receipt, now_ms=NOW)
    with pytest.raises(Conflict, match="prepare with a new token"):
        await prepare(gate, token=token, repeat=True)
    assert (await look(gate)).status == "cancelled"


async def test_a_cancelled_caller_leaves_no_grant_behind(gate: Gate) -> None:
    """At whatever moment: what was granted is withdrawn, and the next one gets it."""
    await prepare(gate, event=call("registers the tenant"))
    for moment in range(8):
        event = call(f"key-{moment}")
        task = asyncio.create_task(gate.prepare(event, now_ms=NOW))
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        for _ in range(2):  # The second one leaves after what the first one's answer led to.
            await gate.get(ID, now_ms=NOW)
        if task.cancelled():
            await prepare(gate, event=event)


@pytest.mark.parametrize(
    ("policy", "told", "status"),
    [
        (GatePolicy(), None, "claimed"),
        (GatePolicy(), "park", "unknown"),
        (GatePolicy(on_expiry="park"), None, "unknown"),
        (GatePolicy(on_expiry="park"), "reclaim", "claimed"),
        (GatePolicy(on_expiry_by_tier={"external_send": "park"}), None, "unknown"),
        (GatePolicy(on_expiry_by_tier={"credential_admin": "park"}), None, "claimed"),
        (
            GatePolicy(on_expiry="park", on_expiry_by_tier={"external_send": "reclaim"}),
            None,
            "claimed",
        ),
    ],
)
async def test_the_end_of_a_lease_means_what_call_tier_or_gate_say(
    connected: Connect, tenant_name: str, policy: GatePolicy, told: Any, status: str
) -> None:
    """The call before the tier, the tier before the gate; else prepare reclaims."""
    gate = (await connected(gate=policy)).tenant(tenant_name, "w").gate
    await prepare(gate, on_expiry=told)
    ended = await look(gate, NOW + FIVE_MINUTES)
    assert ended.status == status
    if status == "unknown":
        assert (ended.unknown_since_ms, ended.claim_expires_at_ms) == (NOW + FIVE_MINUTES, None)
        with pytest.raises(OutcomeUnknown):
            await prepare(gate, NOW + FIVE_MINUTES)
    else:
        assert (await prepare(gate, NOW + FIVE_MINUTES)).attempts == 2


async def test_a_policy_sets_the_lease(connected: Connect, tenant_name: str) -> None:
    """And a call may say otherwise."""
    gate = (await connected(gate=GatePolicy(lease_ms=7))).tenant(tenant_name, "w").gate
    assert (await prepare(gate)).lease_expires_at_ms == NOW + 7
    assert (await prepare(gate, event=call("b"), lease_ms=9)).lease_expires_at_ms == NOW + 9


async def test_extend_counts_from_now_and_ends_with_the_lease(gate: Gate) -> None:
    """Never shorter than before, nor after the end, nor for an older token; no change of the row."""
    receipt = await prepare(gate, lease_ms=10)
    longer = await gate.extend(receipt, lease_ms=20, now_ms=NOW + 9)
    assert longer is not None
    assert (longer.lease_expires_at_ms, longer.fence) == (NOW + 29, receipt.fence)
    same = await gate.extend(longer, lease_ms=1, now_ms=NOW + 10)
    assert same is not None
    assert same.lease_expires_at_ms == NOW + 29
    assert (await look(gate, NOW + 10)).revision == 1
    assert await gate.extend(longer, lease_ms=20, now_ms=NOW + 29) is None
    newer = await prepare(gate, NOW + 29)
    assert await gate.extend(longer, lease_ms=20, now_ms=NOW + 30) is None
    assert await gate.extend(newer, lease_ms=20, now_ms=NOW + 30) is not None


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lease_ms": 0}, "lease_ms"),
        ({"lease_ms": 43_200_001}, "lease_ms"),
        ({"on_expiry": "stop"}, "on_expiry"),
        ({"token": "short"}, "token"),
        ({"owner": " "}, "owner"),
        ({"durability": "most"}, "durability"),
        ({"event": call("x" * 201)}, "dispatch_id"),
        ({"event": outcome()}, "event"),
    ],
)
async def test_bad_input_is_refused_before_anything_is_sent(
    gate: Gate, state: State, options: dict[str, Any], field: str
) -> None:
    """Naming the field."""
    with pytest.raises(InvalidInput) as raised:
        await prepare(gate, **options)
    assert raised.value.field == field
    assert state() == {}


# --- completions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "status"), [("succeeded", "sent"), ("failed", "failed"), ("blocked", "cancelled")]
)
@pytest.mark.parametrize("with_receipt", [True, False])
async def test_what_was_said_is_the_status(
    gate: Gate, said: str, status: str, with_receipt: bool
) -> None:
    """spec/reliability 3.6; who claimed it, and when, is kept."""
    receipt = await prepare(gate)
    completed = await gate.complete(
        outcome(said), receipt=receipt if with_receipt else None, now_ms=NOW + 7
    )
    assert completed == "recorded"
    row = await look(gate, NOW + 7)
    assert (row.status, row.cause, row.updated_at_ms) == (status, said, NOW + 7)
    assert (row.claimed_by, row.claimed_at_ms) == ("tool-dispatch-ledger", NOW)
    assert row.claim_expires_at_ms is None
    assert row.metadata["dispatch_completed"] is True
    assert row.metadata["dispatch_status"] == said
    assert row.metadata["completion_recorded_at_ms"] == NOW + 7
    assert "dispatch_error" not in row.metadata
    assert row.metadata["observed_before_execution"] is True


async def test_errors_and_results_are_kept(gate: Gate) -> None:
    """The error in the metadata as the spec says, the result beside it."""
    receipt = await prepare(gate)
    await gate.complete(
        outcome("failed", error="boom"), receipt=receipt, result={"code": 500}, now_ms=NOW
    )
    row = await look(gate)
    assert row.metadata["dispatch_error"] == "boom"
    assert row.result == {"code": 500}
    assert [
        (fact.kind, fact.error, fact.result, fact.fence, fact.applied) for fact in row.facts
    ] == [("failed", "boom", {"code": 500}, receipt.fence, True)]


@pytest.mark.parametrize(
    ("first", "then", "status"),
    [
        ("succeeded", "failed", "failed"),
        ("failed", "succeeded", "sent"),
        ("blocked", "succeeded", "sent"),
        ("blocked", "failed", "failed"),
        ("failed", "blocked", "failed"),
        ("blocked", "blocked", "cancelled"),
    ],
)
async def test_the_last_event_without_a_receipt_counts(
    gate: Gate, first: str, then: str, status: str
) -> None:
    """spec/reliability 3.6: no guard on the status before, but for blocked."""
    await prepare(gate)
    await gate.complete(outcome(first, error="first"), now_ms=NOW + 1)
    counted = await gate.complete(outcome(then), now_ms=NOW + 2)
    assert counted == ("skipped" if then == "blocked" else "recorded")
    row = await look(gate, NOW + 2)
    last = first if then == "blocked" else then
    assert (row.status, row.metadata["dispatch_status"]) == (status, last)
    assert row.metadata["dispatch_error"] == "first"  # merged: what is not said again stays


@pytest.mark.parametrize(
    ("first", "then", "completed", "status"),
    [
        ("succeeded", "failed", "kept", "sent"),
        ("succeeded", "blocked", "kept", "sent"),
        ("failed", "blocked", "kept", "failed"),
        ("failed", "succeeded", "recorded", "sent"),
        ("blocked", "failed", "recorded", "failed"),
        ("blocked", "succeeded", "recorded", "sent"),
        ("succeeded", "succeeded", "recorded", "sent"),
        ("blocked", "blocked", "recorded", "cancelled"),
    ],
)
async def test_a_sender_may_say_more_but_never_less(
    gate: Gate, first: str, then: str, completed: str, status: str
) -> None:
    """With its token: no second word makes what was sent look unsent; it is kept beside it."""
    receipt = await prepare(gate)
    await gate.complete(outcome(first), receipt=receipt, now_ms=NOW + 1)
    assert await gate.complete(outcome(then), receipt=receipt, now_ms=NOW + 2) == completed
    row = await look(gate, NOW + 2)
    assert row.status == status
    assert [(fact.kind, fact.applied) for fact in row.facts] == [(first, True)] + (
        [(then, completed == "recorded")] if first != then else []
    )


@pytest.mark.parametrize("said", ["succeeded", "failed", "blocked"])
async def test_a_receipt_counts_after_its_lease(gate: Gate, said: str) -> None:
    """As long as nobody else was granted the intent."""
    receipt = await prepare(gate)
    completed = await gate.complete(outcome(said), receipt=receipt, now_ms=NOW + 10 * FIVE_MINUTES)
    assert completed == "recorded"


@pytest.mark.parametrize("said", ["succeeded", "failed", "blocked"])
async def test_an_older_receipt_changes_nothing(gate: Gate, said: str) -> None:
    """Completion is fenced: the word of one that was overtaken is only kept, with its fence unknown."""
    older = await prepare(gate)
    newer = await prepare(gate, NOW + FIVE_MINUTES)
    now_ms = NOW + FIVE_MINUTES + 1
    assert await gate.complete(outcome(said), receipt=older, now_ms=now_ms) == "lost"
    row = await look(gate, now_ms)
    assert (row.status, row.attempts, row.fence) == ("claimed", 2, newer.fence)
    assert "dispatch_status" not in row.metadata
    assert [(fact.kind, fact.applied) for fact in row.facts] == [(said, False)]
    assert await gate.complete(outcome(), receipt=newer, now_ms=now_ms) == "recorded"


async def test_blocked_cancels_only_a_first_attempt(gate: Gate) -> None:
    """Nobody knows of which attempt an event without a receipt speaks: then it is only a fact."""
    await prepare(gate)
    await prepare(gate, NOW + FIVE_MINUTES)
    now_ms = NOW + FIVE_MINUTES + 1
    assert await gate.complete(outcome("blocked", error="late"), now_ms=now_ms) == "skipped"
    row = await look(gate, now_ms)
    assert (row.status, row.attempts) == ("claimed", 2)
    assert [(fact.kind, fact.error, fact.applied) for fact in row.facts] == [
        ("blocked", "late", False)
    ]
    assert "dispatch_completed" not in row.metadata


@pytest.mark.parametrize("later_ms", [1, FIVE_MINUTES])
async def test_blocked_never_cancels_what_parks(gate: Gate, later_ms: int) -> None:
    """While it runs, and when it is unknown; with its receipt, it does."""
    receipt = await prepare(gate, on_expiry="park")
    before = await look(gate, NOW + later_ms)
    assert await gate.complete(outcome("blocked"), now_ms=NOW + later_ms) == "skipped"
    row = await look(gate, NOW + later_ms)
    assert (row.status, row.revision) == (before.status, before.revision)
    assert [(fact.kind, fact.applied) for fact in row.facts] == [("blocked", False)]
    own = await gate.complete(outcome("blocked"), receipt=receipt, now_ms=NOW + later_ms)
    assert own == "recorded"
    assert (await look(gate, NOW + later_ms)).status == "cancelled"


async def test_blocked_cancels_an_expired_claim(gate: Gate) -> None:
    """spec/reliability 3.6: an active claim is one that nobody took since; the time is not asked."""
    await prepare(gate)
    assert await gate.complete(outcome("blocked"), now_ms=NOW + 2 * FIVE_MINUTES) == "recorded"


@pytest.mark.parametrize("phase", ["policy_decision", "execution_started"])
@pytest.mark.parametrize("said", ["succeeded", "failed", "blocked"])
async def test_only_the_last_phases_complete(
    gate: Gate, state: State, phase: str, said: str
) -> None:
    """spec/reliability 3.6; with a receipt neither."""
    receipt = await prepare(gate)
    before = state()
    event = outcome(said, receipt_phase=phase)
    assert await gate.complete(event, now_ms=NOW) == "skipped"
    assert await gate.complete(event, receipt=receipt, now_ms=NOW) == "skipped"
    assert state() == before


@pytest.mark.parametrize("phase", ["execution_completed", "execution_failed"])
async def test_the_last_phases_complete(gate: Gate, phase: str) -> None:
    await prepare(gate)
    assert await gate.complete(outcome(receipt_phase=phase), now_ms=NOW) == "recorded"


async def test_events_that_speak_of_nothing_here_are_skipped(
    gate: Gate, state: State, tenant_name: str
) -> None:
    """No dispatch id, another tenant's event, an intent that there is not: no write, no error."""
    await prepare(gate)
    before = state()
    other = TenantContext(tenant_name, "other")
    for event in (
        outcome(dispatch_id=None),
        outcome(tenant_context=other),
        outcome(dispatch_id="never prepared"),
    ):
        assert await gate.complete(event, now_ms=NOW) == "skipped"
    assert state() == before


async def test_a_receipt_of_nothing_is_missing(
    gate: Gate, server: Server, tenant_name: str
) -> None:
    """Its sender is told; an event without a receipt is skipped."""
    receipt = await prepare(gate)
    server.raw.delete(f"lk:{{{tenant_name}.w}}:gate:state")
    assert await gate.complete(outcome(), receipt=receipt, now_ms=NOW) == "missing"
    assert await gate.complete(outcome(), now_ms=NOW) == "skipped"


async def test_a_receipt_belongs_to_one_call(gate: Gate) -> None:
    """An event of another one is refused."""
    receipt = await prepare(gate)
    await prepare(gate, event=call("other"))
    with pytest.raises(InvalidInput, match="nothing was recorded") as raised:
        await gate.complete(outcome(dispatch_id="other"), receipt=receipt, now_ms=NOW)
    assert raised.value.field == "receipt"


async def test_a_result_must_be_json_and_small(gate: Gate) -> None:
    """Else it is refused, and the call can be made again without it."""
    receipt = await prepare(gate)
    for result in (object(), "x" * 60_000, float("nan")):
        with pytest.raises(InvalidInput) as raised:
            await gate.complete(outcome(), receipt=receipt, result=result, now_ms=NOW)
        assert raised.value.field == "result"
    assert (await look(gate)).status == "claimed"


async def test_an_error_of_any_length_is_recorded(gate: Gate) -> None:
    """Cut: a completion must not fail for its text. Results of the largest size stand beside it."""
    receipt = await prepare(gate)
    error = "\x01" * 100_000
    result = "x" * 50_000
    completed = await gate.complete(
        outcome("failed", error=error), receipt=receipt, result=result, now_ms=NOW
    )
    assert completed == "recorded"
    row = await look(gate)
    assert row.result == result
    assert len(row.metadata["dispatch_error"]) == 2_000


async def test_a_completion_said_twice_counts_once(gate: Gate) -> None:
    """A repeat is told the same; without a receipt it must say that it is one."""
    await prepare(gate)
    assert await gate.complete(outcome("failed", error="e"), now_ms=NOW + 1) == "recorded"
    before = await look(gate, NOW + 1)
    again = await gate.complete(outcome("failed", error="e"), repeat=True, now_ms=NOW + 2)
    assert again == "recorded"
    row = await look(gate, NOW + 2)
    assert (row.revision, len(row.facts)) == (before.revision, 1)


async def test_many_completions_at_once_are_told_apart(gate: Gate) -> None:
    """Each caller gets the answer to its own, though they travel together."""
    receipts = await asyncio.gather(
        *(prepare(gate, event=call(f"key-{number}")) for number in range(200))
    )
    assert len({receipt.token for receipt in receipts}) == 200
    words = ("succeeded", "failed", "blocked")
    answers = await asyncio.gather(
        *(
            gate.complete(
                outcome(words[number % 3], f"key-{number}"),
                receipt=receipt if number % 2 else None,
                now_ms=NOW,
            )
            for number, receipt in enumerate(receipts)
        )
    )
    assert set(answers) == {"recorded"}
    for number in (0, 1, 2, 3, 4, 5, 197, 198, 199):
        row = await look(gate, id=receipts[number].outbox_id)
        assert row.status == ("sent", "failed", "cancelled")[number % 3]


# --- looking and forgetting -----------------------------------------------------------------------


async def test_lists_show_the_last_changed_first(gate: Gate) -> None:
    """Whole, by status and by run; in pages."""
    for number in range(5):
        source = Source(kind="k", run_id=f"Run-{number % 2}")
        await prepare(gate, NOW + number, event=call(f"key-{number}", source=source))
    await gate.complete(outcome(dispatch_id="key-1"), now_ms=NOW + 9)

    async def keys(**options: Any) -> list[str | None]:
        found: list[str | None] = []
        cursor = None
        while True:
            page = await gate.list(limit=2, cursor=cursor, now_ms=NOW + 9, **options)
            found += [intent.idempotency_key for intent in page.items]
            assert len(page.items) <= 2
            if (cursor := page.next_cursor) is None:
                return found

    assert await keys() == ["key-1", "key-4", "key-3", "key-2", "key-0"]
    assert await keys(status="claimed") == ["key-4", "key-3", "key-2", "key-0"]
    assert await keys(run_id="run_1") == ["key-1", "key-3"]
    assert await keys(run_id="Run-1", status="sent") == ["key-1"]
    assert await keys(run_id="other") == []
    with pytest.raises(InvalidInput) as raised:
        await keys(status="lost")
    assert raised.value.field == "status"


async def test_an_intent_that_is_not_there_is_none(gate: Gate) -> None:
    assert await gate.get(ID, now_ms=NOW) is None


async def test_old_intents_are_forgotten(
    connected: Connect, tenant_name: str, state: State
) -> None:
    """keep_ms after they were sent or cancelled, with all that was kept of them; others stay."""
    keep_ms = 3_600_000
    gate = (await connected(gate=GatePolicy(keep_ms=keep_ms))).tenant(tenant_name, "w").gate
    for key, said in (("a", "succeeded"), ("b", "blocked"), ("c", "failed"), ("d", None)):
        receipt = await prepare(gate, event=call(key))
        if said:
            await gate.complete(outcome(said, key), receipt=receipt, now_ms=NOW)
    await prepare(gate, event=call("last"))
    await gate.complete(outcome(dispatch_id="last"), now_ms=NOW + keep_ms)
    left = await gate.list(now_ms=NOW + keep_ms)
    assert {intent.idempotency_key for intent in left.items} == {"c", "d", "last"}
    kept = state()
    for noun in ("docs", "state", "updated"):
        assert len(kept[f"gate:{noun}"]) == 3, noun
    assert len(kept["gate:facts"]) == 2
    assert len(kept["gate:runs"]) == 3
    assert (await prepare(gate, NOW + keep_ms, event=call("a"))).attempts == 1


async def test_a_word_about_an_old_intent_leaves_no_trace_of_another(
    connected: Connect, tenant_name: str
) -> None:
    """What is spoken of is not forgotten in the same breath, so that no fact outlives its intent."""
    keep_ms = 3_600_000
    gate = (await connected(gate=GatePolicy(keep_ms=keep_ms))).tenant(tenant_name, "w").gate
    receipt = await prepare(gate)
    await gate.complete(outcome(), receipt=receipt, now_ms=NOW)
    late = await gate.complete(outcome("failed"), receipt=receipt, now_ms=NOW + keep_ms)
    assert late == "kept"
    row = await look(gate, NOW + keep_ms)
    assert [fact.kind for fact in row.facts] == ["succeeded", "failed"]


async def test_time_is_asked_of_who_gives_it(gate: Gate) -> None:
    """clock="caller": every call needs it."""
    receipt = await prepare(gate)
    for late in (
        gate.prepare(call()),
        gate.complete(outcome()),
        gate.extend(receipt, lease_ms=1),
        gate.get(ID),
        gate.list(),
        gate.unknown(),
        gate.resolve(ID, "sent", actor="a", reason="r"),
        gate.open(new_token(), actor="a", reason="r"),
    ):
        with pytest.raises(InvalidInput, match="now_ms is required"):
            await late
