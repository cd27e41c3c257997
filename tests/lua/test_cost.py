"""What a command costs: its calls into the server do not grow with its rows; memory full stops few."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from lua.commands import A, B, Field, Item, Tenant, change, intent, record, row
from redis import ResponseError
from servers import Server, ServerProcess

from leasekit.scripts import read_scripts

# Reading the ends of old claims, and how much finished work is kept: the calls that prune.
PRUNING = {"outbox/claim": 1, "outbox/ack": 3}

# What the test itself calls while it counts.
OUTSIDE = {"evalsha", "info", "config|resetstat", "config"}


@pytest.fixture
def real(real_server: Server, tenant_name: str) -> Tenant:
    return Tenant(real_server, tenant_name)


def counted(tenant: Tenant, name: str, *items: Item, **arguments: Field) -> Counter[str]:
    """What a script calls in the server, by command."""
    tenant.raw.config_resetstat()
    tenant.run(name, *items, **arguments)
    stats = tenant.raw.info("commandstats")
    found = {key.removeprefix("cmdstat_"): stat["calls"] for key, stat in stats.items()}
    return Counter({key: n for key, n in found.items() if key not in OUTSIDE})


def claim_and_ack(tenant: Tenant, rows: int, token: str) -> tuple[Counter[str], Counter[str]]:
    """The calls of a claim and of an ack of so many fresh rows, on the server's clock."""
    ids = [f"{token[:1]}{i:03}" for i in range(rows)]
    tenant.enqueue(*ids, now_ms="")
    hint = tenant.keys.hint_channel
    claim = counted(
        tenant, "outbox/claim", (token, rows, "a"), now_ms="", lease_ms=10_000, hint=hint
    )
    items = [(id, token) for id in ids]
    keep: dict[str, Field] = {"keep_ms": 1_000_000, "keep_count": 10_000}
    return claim, counted(tenant, "outbox/ack", *items, now_ms="", **keep)


def test_claim_and_ack_call_the_server_as_often_for_10_rows_as_for_100(real: Tenant) -> None:
    """The number of calls is that of the structures: at most 14 and 10, pruning apart."""
    claim_and_ack(real, 1, "x" * 22)  # scripts loaded, something finished is kept

    claim_10, ack_10 = claim_and_ack(real, 10, "a" * 22)
    claim_100, ack_100 = claim_and_ack(real, 100, "b" * 22)

    assert (claim_10, ack_10) == (claim_100, ack_100)
    assert claim_10.total() - PRUNING["outbox/claim"] <= 14, claim_10
    assert ack_10.total() - PRUNING["outbox/ack"] <= 10, ack_10


def test_coalesced_claims_call_the_server_as_often_as_one(real: Tenant) -> None:
    """A hundred claims of one row in a call cost the calls of one claim of a hundred rows."""
    claim_and_ack(real, 1, "x" * 22)
    one, _ = claim_and_ack(real, 100, "a" * 22)
    real.enqueue(*(f"c{i:03}" for i in range(100)), now_ms="")

    items = [(f"{i:022}", 1, "c") for i in range(100)]
    hint = real.keys.hint_channel
    many = counted(real, "outbox/claim", *items, now_ms="", lease_ms=10_000, hint=hint)

    assert many == one


def test_a_claim_that_tells_its_lease_end_makes_one_call_more(real: Tenant) -> None:
    """Once a lease a claim publishes, and notes what it told."""
    claim_and_ack(real, 1, "x" * 22)
    silent, _ = claim_and_ack(real, 10, "a" * 22)
    real.enqueue("c1", "c2", "c3", now_ms="")

    sooner = {"lease_ms": 1_000, "hint": real.keys.hint_channel}
    telling = counted(real, "outbox/claim", ("c" * 22, 3, "a"), now_ms="", **sooner)

    assert telling - silent == {"publish": 1, "hset": 1}
    assert not silent - telling


def prepare_and_complete(
    tenant: Tenant, count: int, name: str, **words: str
) -> tuple[Counter[str], Counter[str]]:
    """The calls of granting so many new intents of a run, and of recording that they were sent."""
    ids = [f"{name}{i:03}" for i in range(count)]
    items = [intent(id, run="r", lease_ms=10_000, **words) for id in ids]
    prepare = counted(tenant, "gate/prepare", *items, now_ms="")
    said = [(id, A, "succeeded", "{}") for id in ids]
    return prepare, counted(tenant, "gate/complete", *said, now_ms="", keep_ms=1_000_000)


@pytest.mark.parametrize(("on_expiry", "calls"), [("park", (10, 13)), ("reclaim", (9, 12))])
def test_gate_calls_the_server_as_often_for_10_intents_as_for_100(
    real: Tenant, on_expiry: str, calls: tuple[int, int]
) -> None:
    """The number of calls is that of the structures, pruning (one call) included."""
    prepare_and_complete(real, 1, "x")  # scripts loaded, the data has its name

    ten = prepare_and_complete(real, 10, "a", on_expiry=on_expiry)
    hundred = prepare_and_complete(real, 100, "b", on_expiry=on_expiry)

    assert ten == hundred
    assert tuple(found.total() for found in ten) == calls, ten


def test_ledger_calls_the_server_as_often_for_10_records_as_for_100(real: Tenant) -> None:
    """The number of calls is that of the structures, whatever lists and runs the records are of."""
    found = []
    for token, count in (("x", 1), ("a", 10), ("b", 100)):
        names = [f"effects/{token}{i}" for i in range(count)]
        made = [record(name, run="r", order=i) for i, name in enumerate(names)]
        put = counted(real, "ledger/put", *made, now_ms="")
        items = [change(name, 1, run="r", order=i + 7) for i, name in enumerate(names)]
        commit = counted(real, "ledger/commit", *items, now_ms="", commit=token.upper() * 22)
        found.append((put, commit))

    assert found[1] == found[2]
    assert [calls.total() for calls in found[2]] == [6, 7], found[2]


# --- memory full ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["valkey-9", "redis-6.2", "redis-path"])
def test_what_frees_memory_works_when_memory_is_full(
    private_server: Callable[..., ServerProcess], kind: str
) -> None:
    """At maxmemory allow-oom commands do their work, and the others are refused before a write."""
    tenant = Tenant(private_server(kind), "t")
    tenant.enqueue(*(f"m{i}" for i in range(1, 10)), *(row(f"p{i}") for i in range(3)))
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/nack", ("m9", A, "", 1, '"x"'), now_ms=11)
    tenant.run("lease/acquire", ("n1", A, 100, "a"), ("n2", A, 100, "a"), now_ms=10)
    reservations = [(f"r{i}", A, "f", "", "", "reclaim", "{}") for i in range(3)]
    tenant.run("idempotency/reserve", *reservations, now_ms=10)
    tenant.prepare(*(intent(f"g{i}", lease_ms=1) for i in range(4)), "g4", now_ms=5)
    tenant.prepare(*(intent(f"g{i}", on_expiry="reclaim") for i in range(5, 9)))
    tenant.run("gate/ask", ("g0", B), now_ms=11, settle_ms=0)
    works = [
        ("outbox/ack", ("m1", A), "acked"),
        ("outbox/nack", ("m2", A, 50, 0, '"x"'), ["requeued", 50]),
        ("outbox/nack", ("m3", A, "", 1, '"x"'), "dead_lettered"),
        ("outbox/release", ("m4", A), "released"),
        ("outbox/extend", ("m5", A, 50), ["extended", 62]),
        ("outbox/cancel", ("p2",), "cancelled"),
        ("lease/extend", ("n1", A, 200), ["extended", "10001", 10, 212, "a"]),
        ("lease/release", ("n2", A), "released"),
        ("idempotency/release", ("r2", A, ""), "released"),
        ("gate/extend", ("g4", A, 50), ["extended", 62]),
        ("gate/extend", ("g5", A, 50), ["extended", 62]),
        ("gate/complete", ("g4", A, "succeeded", "{}"), ["recorded", "sent"]),
        ("gate/complete", ("g5", A, "succeeded", "{}"), ["recorded", "sent"]),
        ("gate/complete", ("g6", A, "left", "{}"), ["recorded", "claimed"]),
        ("gate/complete", ("g7", A, "blocked", "{}"), ["recorded", "cancelled"]),
        ("gate/complete", ("g8", B, "failed", "{}"), ["lost", "claimed"]),
        ("gate/answer", ("g0", B, 2, "absent", "{}"), ["recorded", "cancelled"]),
        ("gate/resolve", ("g1", 1, "sent", "{}"), ["resolved", "sent"]),
    ]
    refused = [
        ("outbox/enqueue", row("q1")),
        ("outbox/claim", ("b" * 22, 1, "b")),
        ("lease/acquire", ("n3", A, 100, "a")),
        ("idempotency/reserve", ("r3", A, "f", "", "", "reclaim", "{}")),
        ("gate/prepare", intent("g9")),
        ("gate/ask", ("g2", B)),
        ("gate/open", (B, "{}")),
        ("ledger/put", record("effects/e1")),
        ("ledger/append", ("v1", "", "{}")),
        ("tenant/touch", ("o.w",)),
    ]
    if tenant.server.knows_flags:  # Redis 6.2 lets a script pass whose first write deletes
        refused.append(("outbox/redrive", ("m9",)))
    for one in read_scripts().values():  # loading needs memory, too
        tenant.raw.script_load(one.text(shebang=tenant.server.knows_flags))

    tenant.raw.config_set("maxmemory", 1)

    before = tenant.dump()
    for name, item in refused:
        with pytest.raises(ResponseError, match="not allowed when used memory"):
            tenant.run(name, item, now_ms=12)
    with pytest.raises(ResponseError, match="not allowed when used memory"):
        tenant.run("ledger/commit", change("effects/e1"), now_ms=12, commit=A)
    assert tenant.dump() == before
    for name, item, answer in works:
        assert tenant.run(name, item, now_ms=12) == [12, answer], name
    completed = tenant.run("idempotency/complete", ("r0", A, 100, "{}"), now_ms=12)
    assert completed[1][0] == "completed"
    assert tenant.run("outbox/purge", now_ms=12, noun="dead")[1] == 2
    assert tenant.run("gate/expire", now_ms=12) == [12, 0, 2]
    assert tenant.run("tenant/barrier", now_ms=12) == [12]  # without it no ack would be replicated
