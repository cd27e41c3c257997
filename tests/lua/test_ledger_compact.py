"""ledger/compact: events give way to one marker, and stay known."""

from __future__ import annotations

from typing import Any

import pytest
from lua.commands import A, B, Tenant

RUN = "r"


@pytest.fixture
def log(tenant: Tenant) -> Tenant:
    """Four events, a to d, at 1 to 4."""
    items = [(id, "", f"{{{id}}}") for id in "abcd"]
    tenant.run("ledger/append", *items, now_ms=10, route=RUN)
    return tenant


def compact(
    tenant: Tenant,
    ids: str,
    *,
    marker: str = "m",
    place: int = 2,
    token: str = A,
    event: str = "{m}",
) -> list[Any]:
    items = [(id,) for id in ids]
    given = {"marker": marker, "place": place, "token": token, "event": event}
    return tenant.run("ledger/compact", *items, now_ms=11, route=RUN, **given)


def test_compact_replaces_events_by_a_marker(log: Tenant) -> None:
    """They leave the log; their ids stay with their places, and the marker has the place told."""
    before = log.dump()

    assert compact(log, "ab") == [11, "compacted"]
    assert log.changes(before) == {
        "ledger:log:r": {"a": None, "b": None, "m": 2},
        "ledger:events:r": {"a": "1", "b": "2", "m": f"2 {A}\n{{m}}"},
    }


def test_compact_folds_an_older_marker(log: Tenant) -> None:
    """A marker goes like any event; its id stays known too."""
    compact(log, "ab")

    assert compact(log, "mc", marker="n", place=3, event="{n}") == [11, "compacted"]
    state = log.dump()
    assert state["ledger:log:r"] == {"n": 3, "d": 4}
    assert state["ledger:events:r"] == {
        **{"a": "1", "b": "2", "c": "3", "m": "2"},
        **{"n": f"3 {A}\n{{n}}", "d": "4\n{d}", "": "4"},
    }


def test_compact_renews_a_marker_at_its_place(tenant: Tenant) -> None:
    """A marker that is folded into one of the same id is replaced by it."""
    items = [(id, "", f"{{{id}}}") for id in "abcd"]
    tenant.run("ledger/append", *items, now_ms=10, route=RUN)
    compact(tenant, "ac", place=3)

    assert compact(tenant, "bm", place=3, token=B, event="{new}") == [11, "compacted"]
    state = tenant.dump()
    assert state["ledger:log:r"] == {"m": 3, "d": 4}
    assert state["ledger:events:r"]["m"] == f"3 {B}\n{{new}}"


def test_compact_again_changes_nothing(log: Tenant) -> None:
    """The very same call gives the first answer again."""
    compact(log, "ab")
    before = log.dump()

    assert compact(log, "ab") == [11, "compacted"]
    assert log.dump() == before


@pytest.mark.parametrize(
    ("ids", "changed"),
    [("bc", "b"), ("ca", "a"), ("cx", "x"), ("xy", "x")],
)
def test_compact_of_what_has_gone(log: Tenant, ids: str, changed: str) -> None:
    """Events that were compacted, or never were, are named; none of the others goes."""
    compact(log, "ab")
    before = log.dump()

    reply = compact(log, ids, marker="n", place=3, event="{n}")

    assert reply == [11, ["changed", changed]]
    assert log.dump() == before


def test_compact_late_after_its_marker_was_folded(log: Tenant) -> None:
    """A call that arrives when its marker has gone into another one brings nothing back."""
    compact(log, "ab")
    compact(log, "mc", marker="n", place=3, event="{n}")
    before = log.dump()

    assert compact(log, "ab") == [11, ["changed", "a"]]
    assert log.dump() == before


def test_compact_under_another_name_is_another_compaction(log: Tenant) -> None:
    """Two that decided on the same events in the same millisecond: the second one is told."""
    compact(log, "ab")
    before = log.dump()

    assert compact(log, "ab", token=B) == [11, ["changed", "a"]]
    assert log.dump() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("now_ms", "x"), ("marker", ""), ("place", 0), ("place", "x"), ("token", "x")],
)
def test_compact_refuses(log: Tenant, name: str, value: str | int) -> None:
    """A marker without id or place."""
    given = {"now_ms": 11, "marker": "m", "place": 1, "token": A, "event": "{}"} | {name: value}

    assert log.refusal("ledger/compact", ("a",), route=RUN, **given) == f"LK_ARGUMENT {name}"


@pytest.mark.parametrize("count", [0, 1_001])
def test_compact_needs_events(log: Tenant, count: int) -> None:
    """1 to 1 000 of them."""
    given = {"now_ms": 11, "marker": "m", "place": 1, "token": A, "event": "{}"}
    items = [("a",)] * count

    assert log.refusal("ledger/compact", *items, route=RUN, **given) == "LK_ARGUMENT items"


def test_compact_of_1000_events(tenant: Tenant) -> None:
    """The largest call passes."""
    items = [(f"e{i}", "", "{}") for i in range(1_000)]
    tenant.run("ledger/append", *items, now_ms=10, route=RUN)

    given = {"marker": "m", "place": 1_000, "token": A, "event": "{m}"}
    gone = [(f"e{i}",) for i in range(1_000)]
    reply = tenant.run("ledger/compact", *gone, now_ms=11, route=RUN, **given)

    assert reply == [11, "compacted"]
    assert tenant.dump()["ledger:log:r"] == {"m": 1_000}
