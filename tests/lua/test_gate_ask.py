"""gate/ask: an unknown intent is claimed, to ask its destination what became of it."""

from __future__ import annotations

import pytest
from lua.commands import A, B, C, D, Tenant, intent, intent_line


@pytest.fixture
def unknown(tenant: Tenant) -> Tenant:
    """i1 of a run, granted to A at 10 until 20, parked and written down as unknown at 20."""
    tenant.prepare(intent("i1", run="r"))
    tenant.run("gate/expire", now_ms=20)
    return tenant


def test_ask_claims_the_question(unknown: Tenant) -> None:
    """A question has a token, an end, a fence above every sender's, and is counted as it begins."""
    before = unknown.dump()

    reply = unknown.run("gate/ask", ("i1", C), now_ms=30, lease_ms=40)

    assert reply == [30, ["asked", "30000", "70", 3, "1"]]
    asked = {"asks": 1, "ask_token": C, "ask_fence": 30_000, "ask_end": 70, "ask_at": 80}
    line = intent_line("unknown", "asked", updated_at=30, revision=3, run="r", **asked)
    assert unknown.changes(before) == {
        "fence": "30000",
        "gate:runs": {"r:0000000000000020:i1": None, "r:0000000000000030:i1": 0},
        "gate:state": {"i1": line},
        "gate:unknown": {"i1": 80},
        "gate:updated": {"i1": 30},
    }


def test_ask_writes_down_what_parks_by_itself(tenant: Tenant) -> None:
    """An intent whose lease has ended may be asked about before it was written down as unknown."""
    tenant.prepare("i1")

    assert tenant.run("gate/ask", ("i1", C), now_ms=25)[1][0] == "asked"

    state = tenant.dump()
    assert state["gate:state"]["i1"].startswith("unknown asked ")
    assert "gate:expiring" not in state
    assert state["gate:unknown"] == {"i1": 45}


@pytest.mark.parametrize(("now_ms", "is_asked"), [(24, False), (25, True), (26, True)])
@pytest.mark.parametrize("written", [True, False])
def test_ask_waits_until_things_have_settled(
    tenant: Tenant, now_ms: int, is_asked: bool, written: bool
) -> None:
    """Not before settle_ms after the end of the sender's lease, to the millisecond."""
    tenant.prepare("i1")
    if written:
        tenant.run("gate/expire", now_ms=20)
    before = tenant.dump()

    answer = tenant.run("gate/ask", ("i1", C), now_ms=now_ms)[1]

    assert answer[0] == ("asked" if is_asked else "wait")
    if not is_asked:
        assert answer == ["wait", 25]
        assert tenant.dump() == before


def test_a_sender_that_left_has_settled_settle_ms_after_it_left(tenant: Tenant) -> None:
    """Its lease ended when it left."""
    tenant.prepare("i1")
    tenant.run("gate/complete", ("i1", A, "left", "{}"), now_ms=12)

    assert tenant.run("gate/ask", ("i1", C), now_ms=16)[1] == ["wait", 17]
    assert tenant.run("gate/ask", ("i1", C), now_ms=17)[1][0] == "asked"


@pytest.mark.parametrize(("now_ms", "is_asked"), [(49, False), (50, True)])
def test_one_question_at_a_time(unknown: Tenant, now_ms: int, is_asked: bool) -> None:
    """Another one waits for the end of the first and for the pause behind it."""
    unknown.run("gate/ask", ("i1", C), now_ms=30)  # until 40, and 10 of pause
    before = unknown.dump()

    answer = unknown.run("gate/ask", ("i1", D), now_ms=now_ms)[1]

    assert answer == (["asked", "50000", "60", 4, "2"] if is_asked else ["wait", 50])
    assert (unknown.dump() != before) == is_asked


@pytest.mark.parametrize("now_ms", [30, 39, 40, 999])
def test_the_token_of_a_question_has_it_again(unknown: Tenant, now_ms: int) -> None:
    """A repeat is the same question, whatever it says of leases: not counted again, no new fence."""
    first = unknown.run("gate/ask", ("i1", C), now_ms=30)
    before = unknown.dump()

    assert unknown.run("gate/ask", ("i1", C), now_ms=now_ms, lease_ms=99)[1:] == first[1:]
    assert unknown.dump() == before


@pytest.mark.parametrize(
    ("asks", "ask_at"),
    [(1, 1_050), (2, 1_060), (3, 1_080), (4, 1_115), (60, 1_115), (9_999, 1_115)],
)
def test_pause_doubles_up_to_a_bound(tenant: Tenant, asks: int, ask_at: int) -> None:
    """Behind the n-th question: first_ms, twice, four times as much, at most most_ms."""
    tenant.is_damaged = asks > 1
    tenant.prepare("i1")
    line = tenant.intent("i1").replace(" park 0 ~ 0 ", f" park {asks - 1} {D} 1 ")
    if asks > 1:
        tenant.raw.hset(tenant.keys.gate_state, "i1", line)

    pace = {"asks_max": 10_000, "first_ms": 10, "most_ms": 75}
    reply = tenant.run("gate/ask", ("i1", C), now_ms=1_000, lease_ms=40, **pace)

    assert reply[1][4] == f"{asks}"
    assert tenant.dump()["gate:unknown"] == {"i1": ask_at}


@pytest.mark.parametrize(("first_ms", "most_ms", "ask_at"), [(0, 75, 40), (90, 75, 115)])
@pytest.mark.parametrize("asks", [0, 9_998])
def test_pause_may_be_none_or_constant(
    tenant: Tenant, first_ms: int, most_ms: int, ask_at: int, asks: int
) -> None:
    """first_ms = 0 asks again at once, however often; one above most_ms is cut to it."""
    tenant.is_damaged = True
    tenant.prepare("i1")
    line = tenant.intent("i1").replace(" park 0 ", f" park {asks} ")
    tenant.raw.hset(tenant.keys.gate_state, "i1", line)

    pace = {"asks_max": 10_000, "first_ms": first_ms, "most_ms": most_ms}
    tenant.run("gate/ask", ("i1", C), now_ms=30, **pace)

    assert tenant.dump()["gate:unknown"] == {"i1": ask_at}


def test_questions_nobody_answers_end(unknown: Tenant) -> None:
    """After asks_max questions it is buried, also where everybody died who asked."""
    unknown.run("gate/ask", ("i1", C), now_ms=100)
    unknown.run("gate/ask", ("i1", D), now_ms=200)
    before = unknown.dump()

    assert unknown.run("gate/ask", ("i1", B), now_ms=300) == [300, "buried"]

    asked = {"asks": 2, "ask_token": B, "ask_fence": 200_000, "ask_end": 210, "ask_at": 225}
    line = intent_line("dead_lettered", "undecidable", updated_at=300, revision=5, run="r", **asked)
    assert unknown.changes(before) == {
        "gate:dead": {"i1": 300},
        "gate:runs": {"r:0000000000000200:i1": None, "r:0000000000000300:i1": 0},
        "gate:state": {"i1": line},
        "gate:unknown": {"i1": None},
        "gate:updated": {"i1": 300},
    }


def test_second_burial_is_the_same(unknown: Tenant) -> None:
    """The token that buried an intent is told so again; others that it is buried."""
    unknown.run("gate/ask", ("i1", C), now_ms=100)
    unknown.run("gate/ask", ("i1", B), now_ms=200, asks_max=1)
    before = unknown.dump()

    reply = unknown.run("gate/ask", ("i1", B), ("i1", C), now_ms=201, asks_max=1)

    assert reply == [201, "buried", ["not_unknown", "dead_lettered"]]
    assert unknown.dump() == before


@pytest.mark.parametrize(
    ("result", "status"),
    [("", "claimed"), ("succeeded", "sent"), ("failed", "failed"), ("blocked", "cancelled")],
)
def test_only_what_is_unknown_is_asked_about(tenant: Tenant, result: str, status: str) -> None:
    """A sender that is at work is left alone, and what is decided stays so."""
    tenant.prepare(intent("i1", on_expiry="reclaim"), intent("i2", lease_ms=90))
    if result:
        tenant.run("gate/complete", *((id, A, result, "{}") for id in ("i1", "i2")), now_ms=11)
    before = tenant.dump()

    reply = tenant.run("gate/ask", ("i1", C), ("i2", C), now_ms=50)

    assert reply == [50, ["not_unknown", status], ["not_unknown", status]]
    assert tenant.dump() == before


def test_what_was_granted_anew_is_asked_about_anew(unknown: Tenant) -> None:
    """A grant starts the count of questions again, and no old question's token is of any use."""
    unknown.run("gate/ask", ("i1", C), now_ms=25)
    unknown.run("gate/answer", ("i1", C, 3, "absent", "{}"), now_ms=26)
    unknown.prepare(intent("i1", B), now_ms=30)

    reply = unknown.run("gate/ask", ("i1", C), now_ms=45)

    assert reply == [45, ["asked", "45000", "55", 6, "1"]]


def test_items_are_asked_about_one_after_the_other(tenant: Tenant) -> None:
    """Questions of one call share a fence; the second about one intent waits for the first."""
    tenant.is_damaged = True
    tenant.prepare("i1", "i2", intent("i3", lease_ms=900))
    tenant.raw.hset(tenant.keys.gate_state, "i4", "x")

    items = ((id, token) for id, token in zip(["i1", "i2", "i3", "i4", "i5"], [C] * 5, strict=True))
    reply = tenant.run("gate/ask", *items, ("i1", D), ("i1", C), now_ms=30)

    asked = ["asked", "30000", "40", 2, "1"]
    assert reply == [
        *(30, asked, asked, ["not_unknown", "claimed"], "missing", "missing", ["wait", 50], asked)
    ]


def test_fence_of_a_question_rises_also_when_the_clock_steps_back(tenant: Tenant) -> None:
    """Above every grant so far; and later grants are above it."""
    tenant.prepare("i2", now_ms=70)
    tenant.prepare("i1", now_ms=10)

    assert tenant.run("gate/ask", ("i1", C), now_ms=30)[1][1] == "70002"
    assert tenant.prepare("i3", now_ms=30)[2][1] == "70003"
