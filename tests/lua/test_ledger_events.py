"""ledger/events: a window of a run's log, in the order of the sequence."""

from __future__ import annotations

import pytest
from lua.commands import A, Tenant

RUN = "r"
BIG = 1_100_000  # bytes; four of these pass 4 MiB


@pytest.fixture
def log(tenant: Tenant) -> Tenant:
    """Five events, a to e, at 1 to 5."""
    items = [(id, "", f"{{{id}}}") for id in "abcde"]
    tenant.run("ledger/append", *items, now_ms=10, route=RUN)
    return tenant


def window(tenant: Tenant, *, run: str = RUN, **arguments: str | int) -> list:
    return tenant.run("ledger/events", now_ms=11, route=run, **arguments)


def test_events_in_order(log: Tenant) -> None:
    """Id, place and JSON of each; behind `now_ms`: whether there is more, and the last place."""
    before = log.dump()

    assert window(log) == [
        *(11, 0, "5"),
        *(["a", "1", "{a}"], ["b", "2", "{b}"], ["c", "3", "{c}"]),
        *(["d", "4", "{d}"], ["e", "5", "{e}"]),
    ]
    assert log.dump() == before


@pytest.mark.parametrize(
    ("bounds", "ids", "more"),
    [
        ({"after": 0}, "abcde", 0),
        ({"after": 2}, "cde", 0),
        ({"after": 5}, "", 0),
        ({"before": 1}, "", 0),
        ({"before": 4}, "abc", 0),
        ({"after": 1, "before": 5}, "bcd", 0),
        ({"after": 4, "before": 2}, "", 0),
        ({"limit": 2}, "ab", 1),
        ({"limit": 5}, "abcde", 0),
        ({"limit": 2, "after": 3}, "de", 0),
        ({"limit": 2, "tail": 1}, "de", 1),
        ({"limit": 2, "tail": 1, "before": 4}, "bc", 1),
        ({"limit": 2, "tail": 1, "before": 3}, "ab", 0),
        ({"limit": 2, "tail": 1, "after": 4}, "e", 0),
        ({"limit": 1_000, "tail": 1}, "abcde", 0),
    ],
)
def test_events_of_a_window(log: Tenant, bounds: dict[str, int], ids: str, more: int) -> None:
    """Both bounds are exclusive; the first ones, or with `tail` the last ones, in ascending order."""
    reply = window(log, **bounds)

    assert "".join(found[0] for found in reply[3:]) == ids
    assert reply[1] == more
    assert reply[2] == "5"


def test_events_of_a_run_without_any(log: Tenant) -> None:
    """An unknown run has an empty log."""
    assert window(log, run="other") == [11, 0, "0"]


def test_events_after_compaction(log: Tenant) -> None:
    """The marker stands at the place of the last event that went; those have no place any more."""
    arguments = {"marker": "m", "place": 2, "token": A, "event": "{m}"}
    log.run("ledger/compact", ("a",), ("b",), now_ms=11, route=RUN, **arguments)

    assert [found[:2] for found in window(log)[3:]] == [
        ["m", "2"],
        ["c", "3"],
        ["d", "4"],
        ["e", "5"],
    ]
    assert window(log)[3][2] == "{m}"


def test_last_place_outlives_the_events(log: Tenant) -> None:
    """It is the last ever given, whatever the window shows."""
    log.run("ledger/append", ("z", 3_000, "{}"), now_ms=11, route=RUN)
    items = [(id,) for id in "abcde"]
    log.run(
        "ledger/compact",
        *items,
        ("z",),
        now_ms=11,
        route=RUN,
        marker="m",
        place=5,
        token=A,
        event="{}",
    )

    assert window(log)[1:3] == [0, "3000"]


def test_event_that_is_missing_is_told_without_json(log: Tenant) -> None:
    """Damage shows as an event without content; the others are there."""
    log.is_damaged = True
    log.raw.hdel(log.keys.named("ledger", "events", RUN), "b")

    assert [found[2] for found in window(log, limit=3)[3:]] == ["{a}", "", "{c}"]


@pytest.mark.parametrize("tail", [0, 1])
def test_events_end_at_4_mib(tenant: Tenant, tail: int) -> None:
    """A window ends with the event that passes 4 MiB, and says that there is more."""
    for id in "abcdef":
        item = (id, "", "x" * BIG)
        tenant.run("ledger/append", item, now_ms=10, route=RUN)

    reply = window(tenant, tail=tail)

    assert "".join(found[0] for found in reply[3:]) == ("cdef" if tail else "abcd")
    assert reply[1] == 1


@pytest.mark.parametrize("tail", [0, 1])
def test_events_in_more_than_one_chunk(tenant: Tenant, tail: int) -> None:
    """Long windows come whole and in order."""
    items = [(f"e{i}", "", f"{{{i}}}") for i in range(1, 252)]
    tenant.run("ledger/append", *items, now_ms=10, route=RUN)

    reply = window(tenant, limit=250, tail=tail)

    first = 2 if tail else 1
    wanted = [[f"e{i}", str(i), f"{{{i}}}"] for i in range(first, first + 250)]
    assert reply == [11, 1, "251", *wanted]


def test_places_are_told_in_full(tenant: Tenant) -> None:
    """Also the highest ones, which a server may keep as a fraction."""
    tenant.run("ledger/append", ("a", 10**15, "{}"), ("b", "", "{}"), now_ms=10, route=RUN)

    assert [found[1] for found in window(tenant)[3:]] == [str(10**15), str(10**15 + 1)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("now_ms", "x"), ("limit", 0), ("limit", 1_001), ("limit", "")),
        *(("after", "x"), ("after", -1), ("before", "x"), ("before", "1.5")),
        *(("tail", 2), ("tail", "")),
    ],
)
def test_events_refuse(log: Tenant, name: str, value: str | int) -> None:
    """Bounds, limits and flags that are none."""
    arguments = {"now_ms": 11, "limit": 10} | {name: value}

    assert log.refusal("ledger/events", route=RUN, **arguments) == f"LK_ARGUMENT {name}"
