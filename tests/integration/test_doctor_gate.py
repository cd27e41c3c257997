"""The sweep of the gate: each planted damage is found and named, and a busy gate has none."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
from servers import Server, dump

import leasekit
from leasekit import GatePolicy, Leasekit, LeasekitError, Tenant, doctor
from leasekit.doctor.gate import IntentLook, judge_dataset, judge_intent, judge_run_entry
from leasekit.gate import (
    LedgerEvent,
    PreSendEvent,
    Receipt,
    Source,
    absent,
    applied,
    undecidable,
)
from leasekit.keys import Keys

Ward = SimpleNamespace

TOOL = "mail.send"
STATE_WORDS = (
    *("status", "cause", "token", "lease_end", "updated_at", "created_at", "revision", "attempts"),
    *("fence", "claimed_at", "on_expiry", "asks", "ask_token", "ask_fence", "ask_end", "ask_at"),
    *("run", "key_digest", "arguments_digest", "owner"),
)


def event(key: str, run: str | None = "r1") -> PreSendEvent:
    return PreSendEvent(
        dispatch_id=key,
        tool=TOOL,
        source=Source(kind="test", run_id=run),
        args={"to": key},
        external_side_effect=True,
    )


def word(key: str, status: str) -> LedgerEvent:
    return LedgerEvent(
        dispatch_id=key,
        tool=TOOL,
        source=Source(kind="test"),
        policy_outcome="allowed",
        status=status,
        error=None if status == "succeeded" else "no",
    )


async def granted(tenant: Tenant, key: str, **options: Any) -> Receipt:
    receipt = await tenant.gate.prepare(event(key), **options)
    assert receipt is not None
    return receipt


@pytest.fixture
async def ward(server: Server, tenant_name: str) -> AsyncIterator[Ward]:
    """A tenant with an intent in each state, one that is unknown and not written down among them."""
    async with leasekit.connect(server.url) as kit:
        tenant = kit.tenant(tenant_name, "w")
        made = SimpleNamespace(
            kit=kit, raw=server.raw, tenant=tenant, keys=Keys("lk", tenant.tag), tag=tenant.tag
        )
        ids: dict[str, str] = {}
        for key, ending in (("sent", "succeeded"), ("failed", "failed"), ("cancelled", "blocked")):
            receipt = await granted(tenant, key)
            await tenant.gate.complete(word(key, ending), receipt=receipt)
            ids[key] = receipt.outbox_id
        ids["buried"] = await parked(made, "buried")
        await tenant.gate.unknown()  # writes down that it is unknown
        counts = await tenant.gate.reconcile(
            {"*": no_idea}, settle_ms=0, asks_max=1, backoff_ms=(0, 0)
        )
        assert counts.dead_lettered == 1
        ids["unknown"] = await parked(made, "unknown")
        await tenant.gate.unknown()
        ids["ended"] = await parked(made, "ended")
        ids["held"] = (await granted(tenant, "held")).outbox_id
        ids["parking"] = (await granted(tenant, "parking", on_expiry="park")).outbox_id
        made.ids = SimpleNamespace(**ids)
        yield made


async def no_idea(_: Any) -> Any:
    return undecidable()


async def parked(ward: Ward, key: str) -> str:
    """An intent that parks, and whose lease ended as it began; nobody has written that down."""
    receipt = await granted(ward.tenant, key, on_expiry="park")
    change_state(ward, receipt.outbox_id, lease_end=receipt.granted_at_ms)
    ward.raw.zadd(ward.keys.gate_expiring, {receipt.outbox_id: receipt.granted_at_ms})
    return receipt.outbox_id


async def swept(kit: Leasekit, tag: str) -> list[doctor.Finding]:
    return [finding async for finding in doctor.sweep(kit.backend, "lk", tag)]


async def found(ward: Ward) -> list[tuple[str, str, str | None]]:
    """What a sweep finds: kind, key after the tenant, id; it must have written nothing."""
    before = dump(ward.raw, "lk", ward.tag)
    findings = await swept(ward.kit, ward.tag)
    assert dump(ward.raw, "lk", ward.tag) == before
    tokens = {
        line.split(b" ")[2].decode()
        for line in ward.raw.hvals(ward.keys.gate_state)
        if len(line.split(b" ")) > 2
    } - {"~", ""}
    for finding in findings:
        assert finding.what
        assert finding.advice
        assert not any(token in str(finding) for token in tokens if len(token) == 22)
    start = f"{ward.keys.tenant}:"
    return sorted((one.kind, one.key.removeprefix(start), one.id) for one in findings)


def change_state(ward: Ward, id: str, **changes: object) -> None:
    """Change some words of an intent's state line, and nothing else."""
    words = ward.raw.hget(ward.keys.gate_state, id).decode().split(" ", 19)
    for name, value in changes.items():
        words[STATE_WORDS.index(name)] = str(value)
    ward.raw.hset(ward.keys.gate_state, id, " ".join(words))


async def test_a_healthy_gate_has_no_damage(ward: Ward) -> None:
    """An intent in each state, and one whose lease has ended and that nobody has written down."""
    assert await found(ward) == []


# --- the three texts of an intent -----------------------------------------------------------------


async def test_an_unreadable_state_line_is_found(ward: Ward) -> None:
    """A line that no command writes; its entries are not judged by it."""
    ward.raw.hset(ward.keys.gate_state, ward.ids.sent, "sent nonsense")
    assert await found(ward) == [("unreadable_intent", "gate:state", ward.ids.sent)]


async def test_a_claim_by_no_token_is_found(ward: Ward) -> None:
    """A claimed intent that its sender cannot complete."""
    change_state(ward, ward.ids.held, token="~")
    assert await found(ward) == [("intent_without_token", "gate:state", ward.ids.held)]


@pytest.mark.parametrize("doc", ["nonsense", "[]", '{"metadata": 7}', '{"tool": "t"}'])
async def test_an_unreadable_document_is_found(ward: Ward, doc: str) -> None:
    """JSON that is none, or that is no intent."""
    ward.raw.hset(ward.keys.gate_docs, ward.ids.sent, doc)
    assert await found(ward) == [("unreadable_intent_document", "gate:docs", ward.ids.sent)]


@pytest.mark.parametrize("facts", ["nonsense", "1 left 2 1 {}\n7", "1 left 2 1 {"])
async def test_unreadable_facts_are_found(ward: Ward, facts: str) -> None:
    """A line that no command writes, also behind one that is sound."""
    ward.raw.hset(ward.keys.gate_facts, ward.ids.failed, facts)
    assert await found(ward) == [("unreadable_facts", "gate:facts", ward.ids.failed)]


async def test_an_intent_without_a_document_is_found(ward: Ward) -> None:
    """A state line that does not say any more which effect it is about."""
    ward.raw.hdel(ward.keys.gate_docs, ward.ids.held)
    assert await found(ward) == [("intent_without_document", "gate:docs", ward.ids.held)]


async def test_what_speaks_of_an_intent_without_a_state_line_is_found(ward: Ward) -> None:
    """Document, facts and entries of an intent whose state line is gone: it can be granted again."""
    ward.raw.hdel(ward.keys.gate_state, ward.ids.sent)
    findings = await found(ward)
    assert findings == [
        ("document_without_intent", "gate:docs", ward.ids.sent),
        ("entry_without_intent", "gate:done", ward.ids.sent),
        ("entry_without_intent", "gate:updated", ward.ids.sent),
        ("facts_without_intent", "gate:facts", ward.ids.sent),
        ("stale_run_entry", "gate:runs", ward.ids.sent),
    ]
    [document] = [
        one for one in await swept(ward.kit, ward.tag) if one.kind == "document_without_intent"
    ]
    assert "granted anew" in document.advice


# --- lists ----------------------------------------------------------------------------------------

HOMES = [
    ("sent", "done"),
    ("cancelled", "done"),
    ("buried", "dead"),
    ("unknown", "unknown"),
    ("ended", "expiring"),
    ("parking", "expiring"),
    ("held", "updated"),
    ("failed", "updated"),
]


@pytest.mark.parametrize(("key", "noun"), HOMES)
async def test_an_intent_that_a_list_lacks_is_found(ward: Ward, key: str, noun: str) -> None:
    """It must stand where its state line says, and where all stand."""
    id = getattr(ward.ids, key)
    ward.raw.zrem(ward.keys.named("gate", noun, ""), id)
    assert await found(ward) == [("intent_without_entry", f"gate:{noun}", id)]


@pytest.mark.parametrize(("key", "noun"), HOMES)
async def test_a_wrong_place_is_found(ward: Ward, key: str, noun: str) -> None:
    """A list that has another instant than the state line."""
    id = getattr(ward.ids, key)
    ward.raw.zadd(ward.keys.named("gate", noun, ""), {id: 5})
    assert await found(ward) == [("intent_in_wrong_place", f"gate:{noun}", id)]


@pytest.mark.parametrize("noun", ["expiring", "unknown", "dead"])
async def test_an_intent_in_a_list_of_others_is_found(ward: Ward, noun: str) -> None:
    """A sent intent that somebody would ask or decide about."""
    ward.raw.zadd(ward.keys.named("gate", noun, ""), {ward.ids.sent: 5})
    assert await found(ward) == [("intent_in_wrong_list", f"gate:{noun}", ward.ids.sent)]


@pytest.mark.parametrize("key", ["unknown", "held", "failed", "buried"])
async def test_an_intent_that_would_be_forgotten_is_found(ward: Ward, key: str) -> None:
    """Whatever stands among the done is deleted by its age there, and its key granted anew."""
    id = getattr(ward.ids, key)
    ward.raw.zadd(ward.keys.gate_done, {id: 5})
    assert await found(ward) == [("intent_among_done", "gate:done", id)]


@pytest.mark.parametrize("noun", ["expiring", "unknown", "dead", "done", "updated"])
async def test_an_entry_without_an_intent_is_found(ward: Ward, noun: str) -> None:
    """An entry of any list that no state line speaks of."""
    ward.raw.zadd(ward.keys.named("gate", noun, ""), {"ghost": 5})
    assert await found(ward) == [("entry_without_intent", f"gate:{noun}", "ghost")]


# --- runs, data, fence ----------------------------------------------------------------------------


async def test_an_intent_that_its_run_lacks_is_found(ward: Ward) -> None:
    """A page of its run would leave it out; the entry that it lacks is named."""
    [entry] = [
        member
        for member in ward.raw.zrange(ward.keys.gate_runs, 0, -1)
        if member.decode().endswith(ward.ids.sent)
    ]
    ward.raw.zrem(ward.keys.gate_runs, entry)
    assert await found(ward) == [("intent_without_run_entry", "gate:runs", ward.ids.sent)]
    [finding] = await swept(ward.kit, ward.tag)
    assert entry.decode() in finding.what


async def test_stale_entries_of_runs_are_found(ward: Ward) -> None:
    """Of another time, of another run, of no intent, of no form, at a place of its own."""
    id = ward.ids.held
    [own] = [
        member.decode()
        for member in ward.raw.zrange(ward.keys.gate_runs, 0, -1)
        if member.decode().endswith(id)
    ]
    old, other = f"r1:{5:016}:{id}", f"r2:{own.split(':')[1]}:{id}"
    ward.raw.zadd(ward.keys.gate_runs, {old: 0, other: 0, f"r1:{5:016}:ghost": 0, "odd": 0})
    assert await found(ward) == [
        ("stale_run_entry", "gate:runs", "ghost"),
        ("stale_run_entry", "gate:runs", "odd"),
        ("stale_run_entry", "gate:runs", id),
        ("stale_run_entry", "gate:runs", id),
    ]
    ward.raw.zrem(ward.keys.gate_runs, old, other, f"r1:{5:016}:ghost", "odd")
    ward.raw.zadd(ward.keys.gate_runs, {own: 5})
    assert await found(ward) == [("intent_in_wrong_place", "gate:runs", id)]


@pytest.mark.parametrize(
    ("stored", "kind"),
    [(None, "dataset_without_name"), ("\n" + "L" * 22 + " 5 {}", "dataset_without_name"),
     ("nonsense", "unreadable_dataset"), ("N" * 22 + "\nlost", "unreadable_dataset")],
)  # fmt: skip
async def test_data_without_its_name_is_found(ward: Ward, stored: str | None, kind: str) -> None:
    """The name by which senders know the data, gone or damaged while there are intents."""
    ward.raw.delete(ward.keys.gate_dataset)
    if stored is not None:
        ward.raw.set(ward.keys.gate_dataset, stored)
    assert await found(ward) == [(kind, "gate:dataset", None)]


async def test_an_opened_gate_is_no_damage(ward: Ward) -> None:
    """An opening stands behind the name, and before there is a name."""
    await ward.tenant.gate.open("L" * 22, actor="ann", reason="restored")
    assert await found(ward) == []
    fresh = ward.kit.tenant(ward.tag.partition(".")[0], "fresh")
    await fresh.gate.open("L" * 22, actor="ann", reason="restored")
    assert await swept(ward.kit, fresh.tag) == []


@pytest.mark.parametrize("word_of_fence", ["fence", "ask_fence"])
async def test_a_fence_that_fell_back_is_found(ward: Ward, word_of_fence: str) -> None:
    """The last fence given is below that of a grant, or of a question."""
    change_state(ward, ward.ids.unknown, **{word_of_fence: 9_000_000_000_000_000})
    assert await found(ward) == [("fence_behind", "fence", None)]


async def test_the_gates_keys_are_of_their_types(ward: Ward) -> None:
    """A key of another type ends the sweep: nothing can be said of the rest."""
    ward.raw.delete(ward.keys.gate_facts)
    ward.raw.set(ward.keys.gate_facts, "x")
    assert await found(ward) == [("wrong_type", "gate:facts", None)]


def test_judges_are_pure() -> None:
    """They say nothing of what is not there, and nothing twice of what cannot be read."""
    nothing = IntentLook(id="x", line=None, doc=None, facts=None, scores={})
    assert judge_intent(nothing) == []
    assert judge_run_entry(b"r:0000000000000005:x", 0, b"nonsense") == []
    assert judge_dataset(None, 0) == []


# --- while others write ---------------------------------------------------------------------------


async def traffic(tenant: Tenant, seed: int, steps: int | None, stop: asyncio.Event) -> None:
    """Random calls of the gate, until `steps` are done or `stop` is set."""
    chance, done = random.Random(seed), 0

    async def answer(_: Any) -> Any:
        return chance.choice((applied(), absent(key_honoured=True), undecidable()))

    while not stop.is_set() and done != steps:
        done += 1
        key = f"k{chance.randrange(30)}"
        what = chance.random()
        with suppress(LeasekitError):
            if what < 0.7:
                receipt = await tenant.gate.prepare(
                    event(key, chance.choice((None, "r1", "r2"))),
                    on_expiry=chance.choice(("park", "reclaim")),
                    lease_ms=chance.choice((1, 60_000)),
                )
                assert receipt is not None
                if chance.random() < 0.5:
                    await tenant.gate.extend(receipt, lease_ms=60_000)
                ending = chance.choice(("succeeded", "failed", "blocked", None))
                if ending is not None:
                    await tenant.gate.complete(word(key, ending), receipt=receipt)
            elif what < 0.8:
                await tenant.gate.complete(word(key, chance.choice(("succeeded", "failed"))))
            elif what < 0.95:
                await tenant.gate.reconcile(
                    {"*": answer}, settle_ms=0, asks_max=2, backoff_ms=(0, 0)
                )
            else:
                for intent in (await tenant.gate.unknown(limit=3)).items:
                    verdict = chance.choice(("sent", "failed", "not_sent"))
                    await tenant.gate.resolve(intent.outbox_id, verdict, actor="a", reason="r")


async def test_an_intent_that_moves_meanwhile_is_no_damage(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that changes between two reads has another entry of its run than the first one says."""
    look = type(ward.kit.backend).look

    async def move_and_look(self: Any, *commands: Any) -> Any:
        verdict = await ward.tenant.gate.complete(word("held", "failed"))
        assert verdict == "recorded"
        return await look(self, *commands)

    monkeypatch.setattr(type(ward.kit.backend), "look", move_and_look)
    assert await swept(ward.kit, ward.tag) == []


async def test_a_busy_gate_has_no_damage(server: Server, tenant_name: str) -> None:
    """After much traffic, and while more goes on: every sweep finds nothing."""
    async with leasekit.connect(server.url, gate=GatePolicy()) as kit:
        tenant, stop = kit.tenant(tenant_name, "w"), asyncio.Event()
        await asyncio.gather(*[traffic(tenant, seed, 40, stop) for seed in range(4)])
        assert await swept(kit, tenant.tag) == []
        writers = [asyncio.create_task(traffic(tenant, seed, None, stop)) for seed in range(4, 8)]
        try:
            for _ in range(3 if server.kind == "memory" else 10):
                assert await swept(kit, tenant.tag) == []
        finally:
            stop.set()
            await asyncio.gather(*writers)
        assert await swept(kit, tenant.tag) == []
