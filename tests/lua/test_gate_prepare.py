"""gate/prepare: an intent is recorded, and granted to one sender at a time."""

from __future__ import annotations

from typing import Any

import pytest
from lua.commands import A, B, C, D, Tenant, intent, intent_line

DATA = "f" * 22
OTHER = "e" * 22


def granted(fence: int, claimed_at: int, lease_end: int, attempts: int = 1) -> list[Any]:
    """The answer for an intent that was created at 10."""
    return ["granted", str(fence), str(claimed_at), lease_end, attempts, "10"]


def test_prepare_records_the_intent_and_grants_it(tenant: Tenant) -> None:
    """A new intent is stored once, granted at once, and stands in the lists by its last change."""
    reply = tenant.prepare(
        intent("i1", run="run-1", owner="host 1", doc='{"operation":"send"}'),
        intent("i2", B, key="l" * 22, sent="y" * 22, lease_ms=20, on_expiry="reclaim"),
    )

    assert reply == [10, DATA, granted(10_000, 10, 20), granted(10_000, 10, 30)]
    assert tenant.dump() == {
        "fence": "10000",
        "gate:dataset": DATA,
        "gate:docs": {"i1": '{"operation":"send"}', "i2": "{}"},
        "gate:expiring": {"i1": 20},
        "gate:runs": {"run-1:0000000000000010:i1": 0},
        "gate:state": {
            "i1": f"claimed granted {A} 20 10 10 1 1 10000 10 park 0 ~ 0 0 0 run-1 "
            f"{'k' * 22} {'x' * 22} host 1",
            "i2": f"claimed granted {B} 30 10 10 1 1 10000 10 reclaim 0 ~ 0 0 0 ~ "
            f"{'l' * 22} {'y' * 22} s",
        },
        "gate:updated": {"i1": 10, "i2": 10},
    }


def test_prepare_takes_the_servers_clock(tenant: Tenant) -> None:
    """Without now_ms the server's own clock says when an intent was granted, and its fence."""
    now, _, answer = tenant.prepare("i1", now_ms="")

    seconds = tenant.raw.time()[0]
    assert 0 <= seconds * 1_000 - now + 1_000 < 60_000
    assert answer[2:] == [str(now), now + 10, 1, str(now)]
    assert now * 1_000 <= int(answer[1]) < (now + 1) * 1_000


def test_prepare_keeps_any_bytes(tenant: Tenant) -> None:
    """Intent and owner are bytes: NUL, newlines and what is not UTF-8 come back as they were."""
    text = "\0\r\n\n{é\udcff} "

    tenant.prepare(intent("i1", owner=text, doc=text))

    assert tenant.dump()["gate:docs"] == {"i1": text}
    assert tenant.intent("i1") == intent_line("claimed", "granted", owner=text)
    assert tenant.prepare(intent("i1", B), now_ms=11)[2][5] == text


# --- who else wants it ----------------------------------------------------------------------------


@pytest.mark.parametrize("on_expiry", ["park", "reclaim"])
@pytest.mark.parametrize("now_ms", [10, 19])
def test_an_intent_is_granted_to_one_sender(tenant: Tenant, on_expiry: str, now_ms: int) -> None:
    """Until the end of its lease nobody else is granted it; they are told who has it."""
    tenant.prepare(intent("i1", on_expiry=on_expiry))
    before = tenant.dump()

    reply = tenant.prepare(intent("i1", B, on_expiry=on_expiry), now_ms=now_ms)

    assert reply == [now_ms, DATA, ["taken", "claimed", 20, "10000", 1, "s"]]
    assert tenant.dump() == before


@pytest.mark.parametrize("now_ms", [20, 21])
def test_an_intent_that_reclaims_is_free_from_its_lease_end_on(tenant: Tenant, now_ms: int) -> None:
    """At its lease end, to the millisecond, the next sender is granted it, under a higher fence."""
    tenant.prepare(intent("i1", on_expiry="reclaim", run="r"))

    item = intent("i1", B, on_expiry="park", run="q", owner="b", lease_ms=30, doc="[]")
    reply = tenant.prepare(item, now_ms=now_ms)

    assert reply[2] == granted(now_ms * 1_000, now_ms, now_ms + 30, attempts=2)
    assert tenant.intent("i1") == intent_line(
        *("claimed", "granted"),
        **{"token": B, "lease_end": now_ms + 30, "updated_at": now_ms, "revision": 2},
        **{"attempts": 2, "fence": now_ms * 1_000, "claimed_at": now_ms, "run": "r", "owner": "b"},
    )
    state = tenant.dump()
    assert state["gate:docs"] == {"i1": "{}"}
    assert state["gate:runs"] == {f"r:{now_ms:016}:i1": 0}
    assert state["gate:expiring"] == {"i1": now_ms + 30}


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("now_ms", [20, 1_000_000])
def test_an_intent_that_parks_is_never_granted_again_by_itself(
    tenant: Tenant, now_ms: int, written: bool
) -> None:
    """From its lease end on it is unknown, written down as that or not; waiting does not help."""
    tenant.prepare("i1")
    if written:
        tenant.run("gate/expire", now_ms=20)
    before = tenant.dump()

    reply = tenant.prepare(intent("i1", B, on_expiry="reclaim"), now_ms=now_ms)

    assert reply == [now_ms, DATA, ["taken", "unknown", 20, "10000", 1, "s"]]
    assert tenant.dump() == before


@pytest.mark.parametrize(("result", "status"), [("succeeded", "sent"), ("failed", "failed")])
def test_what_was_sent_or_failed_is_final(tenant: Tenant, result: str, status: str) -> None:
    """Neither is granted again, however late."""
    tenant.prepare(intent("i1", on_expiry="reclaim"))
    tenant.run("gate/complete", ("i1", A, result, "{}"), now_ms=11)
    before = tenant.dump()

    reply = tenant.prepare(intent("i1", A), intent("i1", B), now_ms=1_000)

    assert reply == [1_000, DATA, *[["taken", status, 20, "10000", 1, "s"]] * 2]
    assert tenant.dump() == before


def test_what_is_buried_is_not_granted(tenant: Tenant) -> None:
    """A dead letter waits for an operator."""
    tenant.prepare("i1")
    tenant.run("gate/ask", ("i1", C), now_ms=30, asks_max=1)
    tenant.run("gate/answer", ("i1", C, 2, "undecidable", "{}"), now_ms=31, asks_max=1)
    before = tenant.dump()

    assert tenant.prepare(intent("i1", B), now_ms=99)[2][:2] == ["taken", "dead_lettered"]
    assert tenant.dump() == before


@pytest.mark.parametrize("by", ["sender", "destination", "operator"])
def test_a_cancelled_intent_is_granted_anew(tenant: Tenant, by: str) -> None:
    """What certainly was not sent may be: with all that was recorded of it, and no question open."""
    tenant.prepare(intent("i1", run="r"))
    if by == "sender":
        tenant.run("gate/complete", ("i1", A, "blocked", "{}"), now_ms=11)
    elif by == "destination":
        tenant.run("gate/ask", ("i1", C), now_ms=25)
        tenant.run("gate/answer", ("i1", C, 2, "absent", "{}"), now_ms=26)
    else:
        tenant.run("gate/resolve", ("i1", 1, "not_sent", "{}"), now_ms=26)
    before, revision = tenant.dump(), int(tenant.intent("i1").split(" ")[6])

    reply = tenant.prepare(intent("i1", B, run="q", doc="[]"), now_ms=40)

    assert reply[2] == granted(40_000, 40, 50, attempts=2)
    assert tenant.intent("i1") == intent_line(
        *("claimed", "granted"),
        **{"token": B, "lease_end": 50, "updated_at": 40, "revision": revision + 1},
        **{"attempts": 2, "fence": 40_000, "claimed_at": 40, "run": "r"},
    )
    state = tenant.dump()
    assert state["gate:facts"] == before["gate:facts"]
    assert state["gate:docs"] == {"i1": "{}"}
    assert "gate:done" not in state


def test_fence_rises_also_when_the_clock_steps_back(tenant: Tenant) -> None:
    """Each call that grants something has a fence above all before, also above those of rows."""
    tenant.prepare("i1", now_ms=10)
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=20)

    assert tenant.prepare("i2", "i3", now_ms=10)[2:] == [
        ["granted", "20001", "10", 20, 1, "10"],
        ["granted", "20001", "10", 20, 1, "10"],
    ]
    assert tenant.dump()["fence"] == "20001"


# --- repeats --------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_expiry", ["park", "reclaim"])
@pytest.mark.parametrize("now_ms", [11, 20, 500])
def test_the_token_that_has_the_grant_gets_it_again(
    tenant: Tenant, on_expiry: str, now_ms: int
) -> None:
    """A repeat is the same grant, before and after its lease: no new fence, end or attempt."""
    tenant.prepare(intent("i1", on_expiry=on_expiry))
    before = tenant.dump()

    item = intent("i1", on_expiry=on_expiry, lease_ms=99, owner="other")
    reply = tenant.prepare(item, now_ms=now_ms, fresh=OTHER)

    assert reply == [now_ms, DATA, granted(10_000, 10, 20)]
    assert tenant.dump() == before


def test_a_token_that_was_overtaken_is_granted_nothing(tenant: Tenant) -> None:
    """After a newer grant the old token is one of many."""
    tenant.prepare(intent("i1", on_expiry="reclaim"))
    tenant.prepare(intent("i1", B, on_expiry="reclaim"), now_ms=20)
    before = tenant.dump()

    assert tenant.prepare("i1", now_ms=21)[2] == ["taken", "claimed", 30, "20000", 2, "s"]
    assert tenant.dump() == before


@pytest.mark.parametrize("by", ["sender", "destination", "operator"])
def test_a_token_whose_grant_was_given_back_is_spent(tenant: Tenant, by: str) -> None:
    """An old request that comes late is not granted what nobody will use."""
    tenant.prepare("i1")
    if by == "sender":
        tenant.run("gate/complete", ("i1", A, "blocked", "{}"), now_ms=11)
    elif by == "destination":
        tenant.run("gate/ask", ("i1", C), now_ms=25)
        tenant.run("gate/answer", ("i1", C, 2, "absent", "{}"), now_ms=26)
    else:
        tenant.run("gate/resolve", ("i1", 1, "not_sent", "{}"), now_ms=26)
    before = tenant.dump()

    assert tenant.prepare("i1", now_ms=30) == [30, DATA, "spent"]
    assert tenant.dump() == before


# --- the same key for something else --------------------------------------------------------------


@pytest.mark.parametrize("token", [A, B])
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ({"key": "l" * 22}, "key_conflict"),
        ({"key": "K" * 22}, "key_conflict"),
        ({"sent": "y" * 22}, "arguments_conflict"),
        ({"key": "l" * 22, "sent": "y" * 22}, "key_conflict"),
    ],
)
@pytest.mark.parametrize("status", ["claimed", "cancelled", "sent"])
def test_another_key_or_other_arguments_are_a_conflict(
    tenant: Tenant, status: str, words: dict[str, str], answer: str, token: str
) -> None:
    """One id is one effect, whatever has become of it and whoever asks; a conflict changes nothing."""
    tenant.prepare("i1")
    if status != "claimed":
        result = {"cancelled": "blocked", "sent": "succeeded"}[status]
        tenant.run("gate/complete", ("i1", A, result, "{}"), now_ms=11)
    before = tenant.dump()

    assert tenant.prepare(intent("i1", token, **words), now_ms=12) == [12, DATA, answer]
    assert tenant.dump() == before


def test_what_was_recorded_without_digests_is_compared_with_nothing(tenant: Tenant) -> None:
    """An intent from elsewhere, pending and without digests, is granted; it gets none by that."""
    line = intent_line(
        *("pending", "imported"),
        **{"token": "~", "lease_end": 0, "revision": 0, "attempts": 0, "fence": 0},
        **{"claimed_at": 0, "key": "~", "sent": "~"},
    )
    tenant.raw.hset(tenant.keys.gate_state, "i1", line)
    tenant.raw.hset(tenant.keys.gate_docs, "i1", "{}")
    tenant.raw.zadd(tenant.keys.gate_updated, {"i1": 10})

    assert tenant.prepare("i1")[2] == granted(10_000, 10, 20)
    assert tenant.intent("i1") == intent_line("claimed", "granted", key="~", sent="~")


# --- which data -----------------------------------------------------------------------------------


def test_the_first_grant_names_the_data(tenant: Tenant) -> None:
    """Data has the name that its first grant brought; every later call is told that one."""
    assert tenant.prepare("i1", fresh=DATA)[1] == DATA
    assert tenant.prepare("i2", fresh=OTHER)[1] == DATA
    assert tenant.prepare("i3", fresh=OTHER, known=DATA)[1] == DATA
    assert tenant.dump()["gate:dataset"] == DATA


def test_data_without_grants_has_no_name(tenant: Tenant) -> None:
    """A call that grants nothing names nothing."""
    tenant.is_damaged = True
    tenant.raw.hset(tenant.keys.gate_state, "i1", "x")

    assert tenant.prepare("i1") == [10, "", "damaged"]
    assert "gate:dataset" not in tenant.dump()


@pytest.mark.parametrize("known", [OTHER, DATA[:-1] + "F"])
def test_a_sender_that_knows_other_data_is_granted_nothing(tenant: Tenant, known: str) -> None:
    """What it sent before may be forgotten here: no item of the call is looked at."""
    tenant.prepare("i1")
    before = tenant.dump()

    reply = tenant.prepare("i1", "i2", now_ms=11, known=known)

    assert reply == [11, DATA, "data_lost", "data_lost"]
    assert tenant.dump() == before


def test_a_sender_that_knows_data_is_granted_nothing_by_an_empty_server(tenant: Tenant) -> None:
    """A server that was emptied does not grant everything again."""
    assert tenant.prepare("i1", known=DATA) == [10, "", "data_lost"]
    assert tenant.dump() == {}


def test_an_opening_lets_those_in_who_know_what_was_lost(tenant: Tenant) -> None:
    """After an opening, whoever knows the lost data is granted, and told the new name."""
    tenant.run("gate/open", (OTHER, "{}"), now_ms=9)

    assert tenant.prepare("i1", known=D) == [10, "", "data_lost"]
    assert tenant.prepare("i1", known=OTHER) == [10, DATA, granted(10_000, 10, 20)]
    assert tenant.prepare("i2", known=D) == [10, DATA, "data_lost"]
    assert tenant.prepare("i2", known=OTHER)[2] == ["granted", "10001", "10", 20, 1, "10"]
    assert tenant.dump()["gate:dataset"] == f"{DATA}\n{OTHER} 9 {{}}"


# --- several at once ------------------------------------------------------------------------------


def test_items_are_decided_one_after_the_other(tenant: Tenant) -> None:
    """Of two senders in one call the first has the intent; its repeat in the call is the same."""
    reply = tenant.prepare(
        *(intent("i1"), intent("i1", B), intent("i1"), intent("i1", sent="y" * 22), intent("i2", B))
    )

    assert reply[2:] == [
        granted(10_000, 10, 20),
        ["taken", "claimed", 20, "10000", 1, "s"],
        granted(10_000, 10, 20),
        "arguments_conflict",
        granted(10_000, 10, 20),
    ]


def test_a_refused_item_harms_no_other(tenant: Tenant) -> None:
    """Each item has its own answer."""
    tenant.prepare("i1", intent("i2", on_expiry="reclaim"), "i3")
    tenant.run("gate/complete", ("i3", A, "blocked", "{}"), now_ms=11)

    items = (intent(id, B) for id in ("i1", "i2", "i3", "i4"))
    reply = tenant.prepare(*items, now_ms=20)

    assert [answer[0] for answer in reply[2:]] == ["taken", *["granted"] * 3]
    assert {answer[1] for answer in reply[3:]} == {"20000"}


@pytest.mark.parametrize(
    "line", ["", "x", "claimed granted", intent_line("claimed", "granted")[:-2]]
)
def test_a_damaged_intent_is_not_granted(tenant: Tenant, line: str) -> None:
    """Where nobody can read what became of an intent nobody sends; its neighbour is granted."""
    tenant.is_damaged = True
    tenant.raw.hset(tenant.keys.gate_state, "i1", line)

    reply = tenant.prepare("i1", "i2")

    assert reply[2:] == ["damaged", granted(10_000, 10, 20)]
    assert tenant.intent("i1") == line
