"""Policy decisions and the audit chain on every server: spec/reliability 6.12."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import Server

from leasekit import CorruptState, InvalidInput, Leasekit, Tenant
from leasekit.keys import Keys, tenant_tag
from leasekit.ledger import audit as audit_module
from leasekit.ledger.audit import Audit, Decisions, record_hash
from leasekit.ledger.records import AuditEvent, PolicyDecision
from leasekit.model import TenantContext

Connect = Callable[..., Awaitable[Leasekit]]


@pytest.fixture
def audit(tenant: Tenant) -> Audit:
    return tenant.ledger.audit


@pytest.fixture
def decisions(tenant: Tenant) -> Decisions:
    return tenant.ledger.decisions


class Vault:
    """The stored chain, to be changed behind the ledger's back."""

    def __init__(self, server: Server, tenant_name: str) -> None:
        self.raw = server.raw
        self.keys = Keys("lk", tenant_tag(tenant_name, "w"))

    def change(self, name: str, old: str, new: str) -> None:
        doc = self.raw.hget(self.keys.ledger_docs, name)
        assert doc is not None
        assert old.encode() in doc
        self.raw.hset(self.keys.ledger_docs, name, doc.replace(old.encode(), new.encode()))

    def remove(self, event_id: str) -> None:
        """Without a trace: record and place."""
        self.raw.hdel(self.keys.ledger_docs, f"audit/{event_id}")
        for place in self.raw.zrange(self.keys.ledger_index, 0, -1):
            if place.startswith(b"audit|") and place.endswith(f"|{event_id}".encode()):
                self.raw.zrem(self.keys.ledger_index, place)

    def add(self, event: AuditEvent) -> None:
        """As if it had been appended, but for the head."""
        doc = self.raw.hget(self.keys.ledger_docs, "audit/e1")
        assert doc is not None
        head, _, _ = doc.split(b"\n", 2)
        place = f"audit|{event.seq:016d}|{event.event_id}"
        text = b"\n".join([head, place.encode(), msgspec.json.encode(event)])
        self.raw.hset(self.keys.ledger_docs, f"audit/{event.event_id}", text)
        self.raw.zadd(self.keys.ledger_index, {place: 0})


@pytest.fixture
def vault(server: Server, tenant_name: str) -> Vault:
    return Vault(server, tenant_name)


async def chain(audit: Audit, count: int = 3) -> list[AuditEvent]:
    """Events e1, e2, ..."""
    return [
        await audit.append("t", {"n": n}, event_id=f"e{n}", now_ms=n) for n in range(1, count + 1)
    ]


# --- the chain ------------------------------------------------------------------------------------


async def test_events_form_a_chain(audit: Audit, tenant: Tenant) -> None:
    """Places from 1 on, each with the hash of the one before, over its fields in their order."""
    first = await audit.append("policy.denied", {"b": 1, "a": [None, 1.5]}, now_ms=10)
    second = await audit.append(
        "x", None, actor="u", durability="best_effort", requester_context={"roles": []}, now_ms=11
    )

    assert (first.seq, first.prev_hash, first.created_at_ms) == (1, None, 10)
    assert (second.seq, second.prev_hash) == (2, first.record_hash)
    assert (second.actor, second.durability) == ("u", "best_effort")
    assert (first.actor, first.durability) == (None, "durable_required")
    context = {"org_id": tenant.context.org_id, "workspace_id": "w", "source": "explicit"}
    text = {
        "event_id": first.event_id,
        "durability": "durable_required",
        "event_type": "policy.denied",
        "tenant_context": context,
        "payload": {"b": 1, "a": [None, 1.5]},
        "created_at_ms": 10,
        "seq": 1,
        "prev_hash": None,
    }
    wanted = json.dumps(text, separators=(",", ":"))
    assert first.record_hash == hashlib.sha256(wanted.encode()).hexdigest()
    assert (await audit.list(now_ms=12)).items == [first, second]
    assert (await audit.list(newest=True, now_ms=12)).items == [second, first]
    assert await audit.verify(now_ms=12) == 2


async def test_actor_of_the_tenant(kit: Leasekit, tenant_name: str) -> None:
    """Who acts is said by the tenant's context, where the call does not say it."""
    audit = kit.tenant(tenant_name, "w", actor="user-a").ledger.audit

    assert (await audit.append("x", 1, now_ms=10)).actor == "user-a"
    assert (await audit.append("x", 1, actor="user-b", now_ms=10)).actor == "user-b"


async def test_event_is_added_once_by_its_id(audit: Audit) -> None:
    first = await audit.append("t", 1, event_id="e", now_ms=10)

    assert await audit.append("other", 2, event_id="e", now_ms=11) == first
    assert await audit.verify(now_ms=12) == 1


async def test_empty_chain(audit: Audit) -> None:
    assert await audit.verify(now_ms=10) == 0
    assert (await audit.list(now_ms=10)).items == []


async def test_concurrent_appends_keep_one_chain(
    connected: Connect, tenant: Tenant, audit: Audit
) -> None:
    """Two clients, 60 events, each sent twice: one chain of 60 events."""
    other = (await connected()).tenant(tenant.context.org_id, "w").ledger.audit

    added = await asyncio.gather(
        *(
            side.append("t", n, event_id=f"e{n}", now_ms=10)
            for n in range(60)
            for side in (audit, other)
        )
    )
    assert len({event.seq for event in added}) == 60
    assert await audit.verify(now_ms=11) == 60
    for n in range(60):
        assert added[2 * n] == added[2 * n + 1]


async def test_chain_is_walked_while_others_add(audit: Audit) -> None:
    """What is added meanwhile is no fault."""
    await chain(audit, 20)
    counts = await asyncio.gather(
        *(audit.append("t", n, now_ms=30) for n in range(20)),
        *(audit.verify(now_ms=30) for _ in range(5)),
    )

    assert all(20 <= count <= 40 for count in counts[20:])
    assert await audit.verify(now_ms=31) == 40


async def test_long_chain_is_walked_whole(
    audit: Audit, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page after page."""
    monkeypatch.setattr("leasekit.ledger.audit.codec.BATCH_MAX", 7)
    await chain(audit, 30)
    assert await audit.verify(now_ms=40) == 30

    vault.change("audit/e25", '{"n":25}', '{"n":26}')
    with pytest.raises(CorruptState, match="at event e25"):
        await audit.verify(now_ms=40)


async def test_tenants_have_chains_of_their_own(kit: Leasekit, tenant_name: str) -> None:
    one = kit.tenant(tenant_name, "w").ledger.audit
    other = kit.tenant(tenant_name, "w2").ledger.audit
    await chain(one, 2)
    await chain(other, 3)

    assert (await one.verify(now_ms=9), await other.verify(now_ms=9)) == (2, 3)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(payload=JSON, context=JSON)
def test_hash_outlives_being_stored(payload: Any, context: Any) -> None:
    """An event that was read again has the hash that it was written with."""
    event = AuditEvent(
        event_id="e", event_type="t", tenant_context=TenantContext.explicit("o", "w"),
        payload=payload, requester_context=context, created_at_ms=1,
    )  # fmt: skip
    read = msgspec.json.decode(msgspec.json.encode(event), type=AuditEvent)

    assert record_hash(read) == record_hash(event)


# --- what is found --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"event_type":"t"', '"event_type":"u"'),
        ('"n":', '"m":'),
        ('"durability":"durable_required"', '"durability":"best_effort"'),
        ('"created_at_ms":', '"created_at_ms":1'),
        ('"seq":', '"seq":1'),
        ('"record_hash":"', '"record_hash":"0'),
    ],
)
async def test_changed_event_is_found(
    audit: Audit, vault: Vault, n: int, old: str, new: str
) -> None:
    """Whichever event, whichever field."""
    await chain(audit)
    vault.change(f"audit/e{n}", old, new)

    with pytest.raises(CorruptState, match=f"does not fit at event e{n} ") as found:
        await audit.verify(now_ms=9)
    assert found.value.id == f"e{n}"


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (1, "does not fit at event e2 (place 2)"),
        (2, "does not fit at event e3 (place 3)"),
        (3, "ends at place 2, before its last event e3 (place 3)"),
    ],
)
async def test_removed_event_is_found(audit: Audit, vault: Vault, n: int, text: str) -> None:
    """The first one, one in the middle, the last one."""
    await chain(audit)
    vault.remove(f"e{n}")

    with pytest.raises(CorruptState) as found:
        await audit.verify(now_ms=9)
    assert text in str(found.value)


async def test_removed_chain_is_found(audit: Audit, vault: Vault) -> None:
    await chain(audit)
    for n in (1, 2, 3):
        vault.remove(f"e{n}")

    with pytest.raises(CorruptState, match="ends at place 0"):
        await audit.verify(now_ms=9)


@pytest.mark.parametrize(
    ("after", "text"),
    [(1, "does not fit at event "), (3, "goes on to event forged (place 4)")],
)
async def test_added_event_is_found(audit: Audit, vault: Vault, after: int, text: str) -> None:
    """In the middle, or behind the end, also where its own hashes fit."""
    events = await chain(audit)
    before = events[after - 1]
    forged = msgspec.structs.replace(
        before, event_id="forged", seq=after + 1, prev_hash=before.record_hash, payload="forged"
    )
    forged = msgspec.structs.replace(forged, record_hash=record_hash(forged))
    vault.add(forged)

    with pytest.raises(CorruptState) as found:
        await audit.verify(now_ms=9)
    assert text in str(found.value)


@pytest.mark.parametrize(("n", "found_at"), [(1, 2), (2, 3), (3, 3)])
async def test_replaced_event_is_found(audit: Audit, vault: Vault, n: int, found_at: int) -> None:
    """One with a hash that fits it, which is not the one that was added: the next one tells, or the
    head of the chain."""
    events = await chain(audit)
    forged = msgspec.structs.replace(events[n - 1], payload="forged")
    forged = msgspec.structs.replace(forged, record_hash=record_hash(forged))
    before, after = (msgspec.json.encode(one).decode() for one in (events[n - 1], forged))
    vault.change(f"audit/e{n}", before, after)

    with pytest.raises(CorruptState, match=f"does not fit at event e{found_at} "):
        await audit.verify(now_ms=9)


@pytest.mark.parametrize("change", ["changed", "removed"])
async def test_nothing_is_added_to_a_broken_end(
    audit: Audit, vault: Vault, state: Callable[[], dict[str, Any]], change: str
) -> None:
    """The last event must be as it was when it was added; an error names it, and nothing is written."""
    await chain(audit)
    if change == "changed":
        vault.change("audit/e3", '{"n":3}', '{"n":4}')
    else:
        vault.remove("e3")
    before = state()

    with pytest.raises(CorruptState, match="nothing was added") as found:
        await audit.append("t", 1, now_ms=9)
    assert found.value.id == "e3"
    assert state() == before


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"event_type": ""}, "event_type"),
        ({"payload": float("nan")}, "payload"),
        ({"payload": "x" * 70_000}, "payload"),
        ({"event_id": " "}, "event_id"),
        ({"actor": 5}, "actor"),
        ({"durability": "best"}, "durability"),
        ({"requester_context": float("inf")}, "requester_context"),
    ],
)
async def test_event_that_is_none_is_refused(
    audit: Audit, state: Callable[[], dict[str, Any]], arguments: dict[str, Any], field: str
) -> None:
    given = {"event_type": "t", "payload": 1} | arguments
    with pytest.raises(InvalidInput) as refused:
        await audit.append(now_ms=9, **given)
    assert refused.value.field == field
    assert state() == {}


# --- policy decisions -----------------------------------------------------------------------------


def decision(tenant: Tenant, id: str, at: int = 10, **fields: Any) -> PolicyDecision:
    given: dict[str, Any] = {
        "tenant_context": tenant.context,
        "run_id": "run-a",
        "decision": "deny",
        "reason_code": "c",
        "reason": "r",
    }
    return PolicyDecision(decision_id=id, created_at_ms=at, **(given | fields))


async def test_decision_is_kept_whole(decisions: Decisions, tenant: Tenant) -> None:
    """Every field; the last one written wins."""
    whole = decision(
        tenant, "d", requester_context={"roles": []}, actor_id="a", session_id="s",
        message_id="m", automation_id="u", node_id="n", tool="t", resource={"x": 1},
        data_classes=["public"], risk_tier="internal_write", policy_id="p", grant_id="g",
        approval_id="v", audit_event_id="e", metadata={"k": 1},
    )  # fmt: skip

    assert await decisions.record(whole, now_ms=20) == whole
    assert await decisions.get("d", now_ms=20) == whole
    assert await decisions.get("D", now_ms=20) is None
    later = msgspec.structs.replace(whole, decision="allow", run_id="run-b")
    await decisions.record(later, now_ms=20)
    assert await decisions.of_run("run-a", now_ms=20) == []
    assert await decisions.of_run("run-b", now_ms=20) == [later]


async def test_decisions_of_a_run(decisions: Decisions, tenant: Tenant) -> None:
    """This very run's, the newest first."""
    for n in (2, 5, 1, 4, 3):
        await decisions.record(decision(tenant, f"d{n}", n), now_ms=20)
        await decisions.record(decision(tenant, f"o{n}", n, run_id="RUN_A"), now_ms=20)
        await decisions.record(decision(tenant, f"n{n}", n, run_id=None), now_ms=20)

    found = await decisions.of_run("run-a", now_ms=20)
    assert [one.decision_id for one in found] == ["d5", "d4", "d3", "d2", "d1"]
    assert await decisions.of_run("run-a", limit=2, now_ms=20) == found[:2]


async def test_decisions_are_at_most_500(
    decisions: Decisions, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit is brought within its bounds."""
    assert audit_module.DECISIONS_MAX == 500
    monkeypatch.setattr(audit_module, "DECISIONS_MAX", 5)
    for n in range(7):
        await decisions.record(decision(tenant, f"d{n}", n), now_ms=20)

    for limit, count in ((-1, 1), (0, 1), (4, 4), (5, 5), (6, 5), (9_999, 5)):
        assert len(await decisions.of_run("run-a", limit=limit, now_ms=20)) == count


async def test_decision_that_is_none_is_refused(
    decisions: Decisions, tenant: Tenant, state: Callable[[], dict[str, Any]]
) -> None:
    elsewhere = TenantContext.explicit("elsewhere", "w")
    wrong = {
        "decision_id": decision(tenant, " "),
        "created_at_ms": decision(tenant, "d", -1),
        "decision": decision(tenant, "d", decision="maybe"),
        "scope.tenant_context": decision(tenant, "d", tenant_context=elsewhere),
    }
    for field, one in wrong.items():
        with pytest.raises(InvalidInput) as refused:
            await decisions.record(one, now_ms=20)
        assert refused.value.field == field
    assert state() == {}
