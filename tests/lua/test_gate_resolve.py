"""gate/resolve: an operator decides what became of an intent that nobody else can tell."""

from __future__ import annotations

from typing import Any

import pytest
from lua.commands import A, B, C, Item, Tenant, intent, intent_line

NOTE = '{"actor":"ann","reason":"saw it"}'
VERDICTS = [("sent", "sent"), ("failed", "failed"), ("not_sent", "cancelled")]


def resolve(tenant: Tenant, *items: Item, now_ms: int = 50) -> list[Any]:
    return tenant.run("gate/resolve", *items, now_ms=now_ms)


@pytest.fixture
def unknown(tenant: Tenant) -> Tenant:
    """i1 of a run, granted to A at 10, unknown since 20: revision 2."""
    tenant.prepare(intent("i1", run="r"))
    tenant.run("gate/expire", now_ms=20)
    return tenant


@pytest.mark.parametrize(("verdict", "status"), VERDICTS)
def test_resolve_decides(unknown: Tenant, verdict: str, status: str) -> None:
    """The intent gets the status of the verdict, with the note, under the fence of its grant."""
    before = unknown.dump()

    assert resolve(unknown, ("i1", 2, verdict, NOTE)) == [50, ["resolved", status]]

    line = intent_line(status, "resolved", updated_at=50, revision=3, ask_at=20, run="r")
    assert unknown.changes(before) == {
        **({"gate:done": {"i1": 50}} if status != "failed" else {}),
        "gate:facts": {"i1": f"50 resolved_{verdict} 10000 1 {NOTE}"},
        "gate:runs": {"r:0000000000000020:i1": None, "r:0000000000000050:i1": 0},
        "gate:state": {"i1": line},
        "gate:unknown": {"i1": None},
        "gate:updated": {"i1": 50},
    }


@pytest.mark.parametrize(("verdict", "status"), VERDICTS)
def test_resolve_of_what_is_buried(unknown: Tenant, verdict: str, status: str) -> None:
    """A dead letter waits for just that."""
    unknown.run("gate/ask", ("i1", C), now_ms=30)
    unknown.run("gate/answer", ("i1", C, 3, "undecidable", "{}"), now_ms=31, asks_max=1)

    assert resolve(unknown, ("i1", 4, verdict, NOTE)) == [50, ["resolved", status]]
    assert "gate:dead" not in unknown.dump()
    assert unknown.facts("i1")[1:] == [f"50 resolved_{verdict} 10000 1 {NOTE}"]


@pytest.mark.parametrize(("verdict", "status"), VERDICTS)
def test_resolve_of_what_is_being_asked_about(unknown: Tenant, verdict: str, status: str) -> None:
    """A question under way keeps no operator from deciding."""
    unknown.run("gate/ask", ("i1", C), now_ms=30)

    assert resolve(unknown, ("i1", 3, verdict, NOTE), now_ms=31) == [31, ["resolved", status]]


@pytest.mark.parametrize(("verdict", "status"), VERDICTS)
@pytest.mark.parametrize(("now_ms", "is_over"), [(19, False), (20, True)])
def test_what_parks_may_be_resolved_from_its_lease_end_on(
    tenant: Tenant, verdict: str, status: str, now_ms: int, is_over: bool
) -> None:
    """Also before it was written down as unknown; not while its sender is at work."""
    tenant.prepare("i1")
    before = tenant.dump()

    reply = resolve(tenant, ("i1", 1, verdict, NOTE), now_ms=now_ms)

    assert reply == [now_ms, ["resolved", status] if is_over else ["not_unknown", "claimed"]]
    assert (tenant.dump() != before) == is_over


@pytest.mark.parametrize("verdict", ["sent", "failed", "not_sent"])
@pytest.mark.parametrize(
    ("result", "status"),
    [("", "claimed"), ("succeeded", "sent"), ("failed", "failed"), ("blocked", "cancelled")],
)
def test_only_what_is_unknown_is_resolved(
    tenant: Tenant, result: str, status: str, verdict: str
) -> None:
    """What a sender said, and what it may still say, is not an operator's to decide."""
    tenant.prepare(intent("i1", on_expiry="reclaim"))
    if result:
        tenant.run("gate/complete", ("i1", A, result, "{}"), now_ms=11)
    before = tenant.dump()

    items = (("i1", revision, verdict, NOTE) for revision in (0, 1, 2))
    assert resolve(tenant, *items) == [50, *[["not_unknown", status]] * 3]
    assert tenant.dump() == before


@pytest.mark.parametrize("verdict", ["sent", "failed", "not_sent"])
@pytest.mark.parametrize("revision", [0, 1, 3, 2**53 - 1])
def test_resolve_is_about_what_was_seen(unknown: Tenant, verdict: str, revision: int) -> None:
    """Where the intent has changed since it was looked at, nothing is decided."""
    before = unknown.dump()

    assert resolve(unknown, ("i1", revision, verdict, NOTE)) == [50, ["changed", "unknown"]]
    assert unknown.dump() == before


@pytest.mark.parametrize(("verdict", "status"), VERDICTS)
def test_second_resolve_is_as_the_first(unknown: Tenant, verdict: str, status: str) -> None:
    """The same verdict on the same revision again is resolved, and changes nothing."""
    resolve(unknown, ("i1", 2, verdict, NOTE))
    before = unknown.dump()

    for note in (NOTE, "{}"):
        reply = resolve(unknown, ("i1", 2, verdict, note), now_ms=51)
        assert reply == [51, ["resolved", status]]
    items = (("i1", revision, verdict, NOTE) for revision in (1, 3))
    assert resolve(unknown, *items, now_ms=51) == [51, *[["not_unknown", status]] * 2]
    assert unknown.dump() == before


@pytest.mark.parametrize(
    ("first", "second"),
    [(one, two) for one, _ in VERDICTS for two, _ in VERDICTS if one != two],
)
def test_another_verdict_comes_too_late(unknown: Tenant, first: str, second: str) -> None:
    """What one operator decided is not unknown any more for the next."""
    resolve(unknown, ("i1", 2, first, NOTE))
    before = unknown.dump()

    items = (("i1", revision, second, NOTE) for revision in (2, 3))
    assert resolve(unknown, *items, now_ms=51) == [
        51,
        *[["not_unknown", dict(VERDICTS)[first]]] * 2,
    ]
    assert unknown.dump() == before


@pytest.mark.parametrize(("verdict", "_"), VERDICTS)
def test_a_late_copy_of_an_order_does_nothing(unknown: Tenant, verdict: str, _: str) -> None:
    """not_sent led to a new grant that became unknown in its turn: the old order is not about it."""
    resolve(unknown, ("i1", 2, "not_sent", NOTE))
    unknown.prepare(intent("i1", B), now_ms=60)
    before = unknown.dump()

    item = ("i1", 2, verdict, NOTE)
    assert resolve(unknown, item, now_ms=61) == [61, ["not_unknown", "claimed"]]
    assert resolve(unknown, item, now_ms=70) == [70, ["changed", "unknown"]]
    assert unknown.dump() == before


def test_items_are_resolved_one_after_the_other(tenant: Tenant) -> None:
    """Several orders share a call; what is missing or cannot be read harms no neighbour."""
    tenant.is_damaged = True
    tenant.prepare("i1", "i2", "i3")
    tenant.raw.hset(tenant.keys.gate_state, "i4", "x")

    reply = resolve(
        tenant,
        *(("i1", 1, "sent", "1"), ("i2", 1, "failed", "2"), ("i3", 1, "not_sent", "3")),
        *(("i4", 1, "sent", "4"), ("i5", 1, "sent", "5")),
        *(("i1", 1, "sent", "6"), ("i2", 1, "sent", "7")),
    )

    assert reply == [
        *(50, ["resolved", "sent"], ["resolved", "failed"], ["resolved", "cancelled"]),
        *("missing", "missing", ["resolved", "sent"], ["not_unknown", "failed"]),
    ]
    assert [tenant.facts(f"i{i}") for i in range(1, 6)] == [
        *(["50 resolved_sent 10000 1 1"], ["50 resolved_failed 10000 1 2"]),
        *(["50 resolved_not_sent 10000 1 3"], [], []),
    ]


def test_an_order_is_added_to_what_was_said(unknown: Tenant) -> None:
    """The oldest of sixteen facts makes room."""
    unknown.run("gate/complete", *(("i1", B, "failed", f"{i}") for i in range(16)), now_ms=31)

    resolve(unknown, ("i1", 2, "sent", "a" * 65_536))

    noted = [fact.split(" ")[4] for fact in unknown.facts("i1")]
    assert noted == [*(f"{i}" for i in range(1, 16)), "a" * 65_536]
