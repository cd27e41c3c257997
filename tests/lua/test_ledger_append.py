"""ledger/append: an event gets its place in the log of its run, once."""

from __future__ import annotations

import pytest
from lua.commands import A, Tenant

RUN = "r"
LAST = 10**15


def append(tenant: Tenant, *items: tuple[str | int, ...], run: str = RUN, now_ms: int = 10) -> list:
    return tenant.run("ledger/append", *items, now_ms=now_ms, route=run)


def test_append_gives_the_next_place(tenant: Tenant) -> None:
    """Events of one call get places in its order, from 1 on; later ones go on from there."""
    before = tenant.dump()

    assert append(tenant, ("a", "", "{1}"), ("b", "", "{2}")) == [
        10,
        ["appended", "1"],
        ["appended", "2"],
    ]
    assert append(tenant, ("c", "", "{3}"), now_ms=11) == [11, ["appended", "3"]]

    assert tenant.changes(before) == {
        "ledger:log:r": {"a": 1, "b": 2, "c": 3},
        "ledger:events:r": {"a": "1\n{1}", "b": "2\n{2}", "c": "3\n{3}", "": "3"},
    }


def test_append_of_a_known_id_writes_nothing(tenant: Tenant) -> None:
    """The id decides: its first place is told, whatever else the event says or asks for."""
    append(tenant, ("a", "", "{1}"), ("b", "", "{2}"))
    before = tenant.dump()

    reply = append(tenant, ("a", "", "{9}"), ("b", 7, "{9}"), now_ms=12)

    assert reply == [12, ["known", "1"], ["known", "2"]]
    assert tenant.dump() == before


def test_append_of_one_id_twice_in_a_call(tenant: Tenant) -> None:
    """The first item is the event, the second is told its place."""
    reply = append(tenant, ("a", "", "{1}"), ("a", "", "{2}"), ("b", "", "{3}"))

    assert reply == [10, ["appended", "1"], ["known", "1"], ["appended", "2"]]
    assert tenant.dump()["ledger:events:r"]["a"] == "1\n{1}"


def test_append_of_a_compacted_id(tenant: Tenant) -> None:
    """An id stays known by its place when its event has gone."""
    append(tenant, ("a", "", "{1}"), ("b", "", "{2}"))
    tenant.run(
        "ledger/compact", ("a",), now_ms=11, route=RUN, marker="m", place=1, token=A, event="{}"
    )

    assert append(tenant, ("a", "", "{1}"), now_ms=12) == [12, ["known", "1"]]
    assert append(tenant, ("c", "", "{3}"), now_ms=12) == [12, ["appended", "3"]]


def test_append_goes_on_after_everything_was_compacted(tenant: Tenant) -> None:
    """The last place outlives the events."""
    append(tenant, ("a", "", "{1}"), ("b", "", "{2}"))
    items = (("a",), ("b",))
    tenant.run(
        "ledger/compact", *items, now_ms=11, route=RUN, marker="m", place=2, token=A, event="{}"
    )

    assert append(tenant, ("c", "", "{3}")) == [10, ["appended", "3"]]


def test_append_at_a_place_of_its_own(tenant: Tenant) -> None:
    """An event may bring its place; the next one stands behind the highest, wherever it was added."""
    reply = append(tenant, ("a", 5, "{1}"), ("b", "", "{2}"), ("c", 2, "{3}"), ("d", "", "{4}"))

    assert reply[1:] == [
        ["appended", "5"],
        ["appended", "6"],
        ["appended", "2"],
        ["appended", "7"],
    ]


@pytest.mark.parametrize("place", [1, "01", 2, 3])
def test_append_at_a_place_that_is_taken(tenant: Tenant, place: str | int) -> None:
    """No place is given twice, neither to one of an earlier call nor within a call."""
    append(tenant, ("a", "", "{1}"))
    before = tenant.dump()

    items = [("b", 2, "{2}"), ("c", "", "{3}"), ("x", place, "{9}")]
    reply = append(tenant, *items)

    assert reply == [10, ["appended", "2"], ["appended", "3"], "taken"]
    assert "x" not in tenant.dump()["ledger:events:r"]
    assert tenant.changes(before)["ledger:log:r"] == {"b": 2, "c": 3}


def test_append_where_only_a_taken_place_is_asked_for(tenant: Tenant) -> None:
    """Then nothing is written at all."""
    append(tenant, ("a", "", "{1}"))
    before = tenant.dump()

    assert append(tenant, ("b", 1, "{2}")) == [10, "taken"]
    assert tenant.dump() == before


def test_append_at_the_highest_place(tenant: Tenant) -> None:
    """Behind it there is room for whatever the log itself adds."""
    assert append(tenant, ("a", LAST, "{1}"), ("b", "", "{2}")) == [
        10,
        ["appended", str(LAST)],
        ["appended", str(LAST + 1)],
    ]
    assert append(tenant, ("b", "", "{2}"), ("c", LAST, "{}")) == [
        10,
        ["known", str(LAST + 1)],
        "taken",
    ]


def test_append_keeps_the_logs_of_runs_apart(tenant: Tenant) -> None:
    """Each run has a sequence and ids of its own."""
    append(tenant, ("a", "", "{1}"), ("b", "", "{2}"))

    assert append(tenant, ("a", "", "{3}"), run="other") == [10, ["appended", "1"]]
    assert tenant.dump()["ledger:events:other"] == {"a": "1\n{3}", "": "1"}


def test_append_keeps_the_event_as_it_is(tenant: Tenant) -> None:
    """What is behind the place is opaque: newlines, NULs, nothing at all."""
    append(tenant, ("a b\n", "", "1\n2\0\x7f"), ("b", "", ""))

    assert tenant.dump()["ledger:events:r"] == {"a b\n": "1\n1\n2\0\x7f", "b": "2\n", "": "2"}


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (("", "", "{}"), "event_id"),
        (("a", 0, "{}"), "seq"),
        (("a", "x", "{}"), "seq"),
        (("a", LAST + 1, "{}"), "seq"),
    ],
)
def test_append_refuses(tenant: Tenant, item: tuple[str | int, ...], problem: str) -> None:
    """Events without id, and places that are none."""
    refusal = tenant.refusal("ledger/append", ("z", "", "{}"), item, now_ms=10, route=RUN)

    assert refusal == f"LK_ARGUMENT {problem}"


def test_append_needs_events_and_an_instant(tenant: Tenant) -> None:
    """1 to 1 000 whole items, and now."""
    item = ("a", "", "{}")
    for items in ([], [item] * 1_001, [("a", "")]):
        assert tenant.refusal("ledger/append", *items, now_ms=10, route=RUN) == "LK_ARGUMENT items"
    assert tenant.refusal("ledger/append", item, now_ms="x", route=RUN) == "LK_ARGUMENT now_ms"


def test_append_of_1000_events(tenant: Tenant) -> None:
    """The largest call passes, also with places that the events bring."""
    reply = append(tenant, *((f"e{i}", i if i % 2 else "", "{}") for i in range(1, 1_001)))

    assert reply[1] == ["appended", "1"]
    assert reply[1_000] == ["appended", "1000"]
