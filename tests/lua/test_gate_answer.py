"""gate/answer: what the destination says is recorded, if the intent is still as it was asked about."""

from __future__ import annotations

from typing import Any

import pytest
from lua.commands import A, B, C, D, Item, Tenant, intent, intent_line

NOTE = '{"result":1}'
VERDICTS = [("applied", "sent"), ("absent", "cancelled"), ("undecidable", "unknown")]


@pytest.fixture
def asked(tenant: Tenant) -> Tenant:
    """i1 of a run, unknown since 20, asked about by C at 30 until 40: revision 3."""
    tenant.prepare(intent("i1", run="r"))
    tenant.run("gate/expire", now_ms=20)
    assert tenant.run("gate/ask", ("i1", C), now_ms=30)[1][3] == 3
    return tenant


def answer(tenant: Tenant, *items: Item, now_ms: int = 35, **arguments: Any) -> list[Any]:
    return tenant.run("gate/answer", *items, now_ms=now_ms, **arguments)


@pytest.mark.parametrize(("verdict", "status"), VERDICTS)
@pytest.mark.parametrize("now_ms", [35, 40, 999])
def test_answer_records_the_verdict(asked: Tenant, verdict: str, status: str, now_ms: int) -> None:
    """Under the question's fence, with the note; late as well, as long as nobody asked anew."""
    before = asked.dump()

    reply = answer(asked, ("i1", C, 3, verdict, NOTE), now_ms=now_ms)

    assert reply == [now_ms, ["recorded", status]]
    ask_end, ask_at = min(40, now_ms), now_ms + 10 if verdict == "undecidable" else 50
    known = {"asks": 1, "ask_token": C, "ask_fence": 30_000, "ask_end": ask_end, "ask_at": ask_at}
    line = intent_line(status, verdict, updated_at=now_ms, revision=4, run="r", **known)
    assert asked.changes(before) == {
        "gate:facts": {"i1": f"{now_ms} {verdict} 30000 1 {NOTE}"},
        "gate:runs": {"r:0000000000000030:i1": None, f"r:{now_ms:016}:i1": 0},
        "gate:state": {"i1": line},
        "gate:updated": {"i1": now_ms},
        **({"gate:unknown": {"i1": None if status != "unknown" else ask_at}}
           if (status, ask_at) != ("unknown", 50) else {}),
        **({"gate:done": {"i1": now_ms}} if status != "unknown" else {}),
    }  # fmt: skip


@pytest.mark.parametrize(("asks_max", "status"), [(2, "unknown"), (1, "dead_lettered")])
def test_the_last_question_without_an_answer_buries(
    asked: Tenant, asks_max: int, status: str
) -> None:
    """asks_max questions that found nothing out are enough; an answer to the last one counts."""
    reply = answer(asked, ("i1", C, 3, "undecidable", NOTE), asks_max=asks_max)

    assert reply == [35, ["recorded", status]]
    state = asked.dump()
    assert ("gate:dead" in state, "gate:unknown" in state) == (asks_max == 1, asks_max == 2)
    if asks_max == 1:
        assert state["gate:dead"] == {"i1": 35}
        assert state["gate:state"]["i1"].startswith("dead_lettered undecidable ")


@pytest.mark.parametrize("verdict", ["applied", "absent"])
def test_an_answer_to_the_last_question_counts(asked: Tenant, verdict: str) -> None:
    """The bound is for questions that found nothing out."""
    reply = answer(asked, ("i1", C, 3, verdict, NOTE), asks_max=1)

    assert reply[1] == ["recorded", dict(VERDICTS)[verdict]]


def test_pause_after_an_answer_is_counted_from_it(asked: Tenant) -> None:
    """The next question may be put first_ms, then twice as much, after the answer, up to most_ms."""
    pace = {"asks_max": 9, "first_ms": 20, "most_ms": 50}
    answer(asked, ("i1", C, 3, "undecidable", "1"), **pace)
    assert asked.dump()["gate:unknown"] == {"i1": 55}
    assert asked.run("gate/ask", ("i1", D), now_ms=54, **pace)[1] == ["wait", 55]
    assert asked.run("gate/ask", ("i1", D), now_ms=55, **pace)[1][0] == "asked"

    answer(asked, ("i1", D, 5, "undecidable", "2"), now_ms=60, **pace)
    assert asked.dump()["gate:unknown"] == {"i1": 100}
    asked.run("gate/ask", ("i1", B), now_ms=100, **pace)
    answer(asked, ("i1", B, 7, "undecidable", "3"), now_ms=105, **pace)
    assert asked.dump()["gate:unknown"] == {"i1": 155}
    assert asked.facts("i1") == [
        "35 undecidable 30000 1 1",
        "60 undecidable 55000 1 2",
        "105 undecidable 100000 1 3",
    ]


@pytest.mark.parametrize(("verdict", "status"), VERDICTS)
@pytest.mark.parametrize("asks_max", [1, 2])
def test_second_answer_is_as_the_first(
    asked: Tenant, verdict: str, status: str, asks_max: int
) -> None:
    """The same verdict on the same revision again is recorded, and changes nothing."""
    first = answer(asked, ("i1", C, 3, verdict, NOTE), asks_max=asks_max)
    before = asked.dump()

    for note in (NOTE, "{}"):
        item = ("i1", C, 3, verdict, note)
        assert answer(asked, item, now_ms=36, asks_max=asks_max)[1:] == first[1:]
    for revision in (2, 4):
        item = ("i1", C, revision, verdict, NOTE)
        assert answer(asked, item, now_ms=36, asks_max=asks_max)[1][0] == "lost"
    assert asked.dump() == before


@pytest.mark.parametrize(("verdict", "_"), VERDICTS)
@pytest.mark.parametrize("item", [(D, 3), (C, 2), (C, 4), ("", 3), ("~", 3), (C[:-1], 3), (A, 3)])
def test_an_answer_is_to_its_own_question(
    asked: Tenant, verdict: str, _: str, item: tuple[str, int]
) -> None:
    """Another token, or another revision, is another question."""
    before = asked.dump()

    assert answer(asked, ("i1", *item, verdict, NOTE)) == [35, ["lost", "unknown"]]
    assert asked.dump() == before


@pytest.mark.parametrize(
    ("first", "second"),
    [(one, two) for one, _ in VERDICTS for two, _ in VERDICTS if one != two],
)
def test_another_verdict_comes_too_late(asked: Tenant, first: str, second: str) -> None:
    """A question is answered once."""
    answer(asked, ("i1", C, 3, first, NOTE))
    before = asked.dump()

    reply = answer(asked, ("i1", C, 3, second, NOTE), ("i1", C, 4, second, NOTE), now_ms=36)

    assert reply == [36, *[["lost", dict(VERDICTS)[first]]] * 2]
    assert asked.dump() == before


@pytest.mark.parametrize(("verdict", "_"), VERDICTS)
@pytest.mark.parametrize(
    ("result", "status"), [("succeeded", "sent"), ("failed", "failed"), ("blocked", "cancelled")]
)
def test_a_late_word_of_the_sender_wins(
    asked: Tenant, verdict: str, _: str, result: str, status: str
) -> None:
    """Who did it knows best: the answer that comes after it counts for nothing."""
    asked.run("gate/complete", ("i1", A, result, "{}"), now_ms=34)
    before = asked.dump()

    assert answer(asked, ("i1", C, 3, verdict, NOTE)) == [35, ["lost", status]]
    assert asked.dump() == before


@pytest.mark.parametrize(("verdict", "_"), VERDICTS)
def test_an_operators_word_wins(asked: Tenant, verdict: str, _: str) -> None:
    """What was decided meanwhile stays decided."""
    asked.run("gate/resolve", ("i1", 3, "failed", "{}"), now_ms=34)
    before = asked.dump()

    assert answer(asked, ("i1", C, 3, verdict, NOTE)) == [35, ["lost", "failed"]]
    assert asked.dump() == before


def test_an_answer_after_a_newer_question_is_lost(asked: Tenant) -> None:
    """Whoever asked too long ago says nothing about what is asked now."""
    asked.run("gate/ask", ("i1", D), now_ms=60)
    before = asked.dump()

    items = (("i1", C, revision, "absent", NOTE) for revision in (3, 4))
    assert answer(asked, *items, now_ms=61) == [61, *[["lost", "unknown"]] * 2]
    assert asked.dump() == before
    assert answer(asked, ("i1", D, 4, "applied", NOTE), now_ms=61)[1] == ["recorded", "sent"]


def test_an_answer_after_a_newer_grant_is_lost(asked: Tenant) -> None:
    """A copy of an old answer does not cancel what was granted since."""
    answer(asked, ("i1", C, 3, "absent", NOTE))
    asked.prepare(intent("i1", B), now_ms=36)
    before = asked.dump()

    items = (("i1", C, revision, "absent", NOTE) for revision in (3, 4, 5))
    assert answer(asked, *items, now_ms=37) == [37, *[["lost", "claimed"]] * 3]
    assert asked.dump() == before


def test_what_was_not_asked_about_has_no_answer(tenant: Tenant) -> None:
    """Without a question no token and no revision fits; what parks reads as unknown by itself."""
    tenant.is_damaged = True
    tenant.prepare("i1")
    tenant.raw.hset(tenant.keys.gate_state, "i2", "x")
    before = tenant.dump()

    items = ((id, token, 1, "applied", NOTE) for id in ("i1", "i2", "i3") for token in ("~", A))
    reply = answer(tenant, *items, now_ms=50)

    assert reply == [50, *[["lost", "unknown"]] * 2, *["missing"] * 4]
    assert tenant.dump() == before


def test_items_are_answered_one_after_the_other(tenant: Tenant) -> None:
    """Each answer is to its own question; a second one to the same is its repeat, or lost."""
    ids = ["i1", "i2", "i3"]
    tenant.prepare(*ids)
    tenant.run("gate/ask", *((id, C) for id in ids), now_ms=30)

    reply = answer(
        tenant,
        *(("i1", C, 2, "applied", "1"), ("i2", C, 2, "absent", "2"), ("i9", C, 2, "absent", "3")),
        *(("i1", C, 2, "applied", "4"), ("i1", C, 2, "absent", "5")),
        *(("i3", C, 2, "undecidable", "6"), ("i2", D, 2, "absent", "7")),
    )

    assert reply == [
        *(35, ["recorded", "sent"], ["recorded", "cancelled"], "missing", ["recorded", "sent"]),
        *(["lost", "sent"], ["recorded", "unknown"], ["lost", "cancelled"]),
    ]
    assert [tenant.facts(id) for id in ids] == [
        ["35 applied 30000 1 1"], ["35 absent 30000 1 2"], ["35 undecidable 30000 1 6"],
    ]  # fmt: skip


def test_answers_are_added_to_what_was_said(asked: Tenant) -> None:
    """The oldest of sixteen facts makes room."""
    asked.run("gate/complete", *(("i1", B, "failed", f"{i}") for i in range(16)), now_ms=31)

    answer(asked, ("i1", C, 3, "applied", "a" * 65_536))

    noted = [fact.split(" ")[4] for fact in asked.facts("i1")]
    assert noted == [*(f"{i}" for i in range(1, 16)), "a" * 65_536]
