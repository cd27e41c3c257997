"""gate/list: pages of a list of intents, from either end, whatever changes between two pages."""

from __future__ import annotations

from typing import Any

import pytest
from lua.commands import A, B, C, Tenant, intent, intent_line

MEGABYTE = 1 << 20


def ids(reply: list[Any]) -> list[str]:
    return [found[0] for found in reply[4:]]


def pages(tenant: Tenant, **arguments: Any) -> list[list[str]]:
    """All pages of a list."""
    found, after = [], ["", ""]
    for _ in range(2_000):
        reply = tenant.run(
            "gate/list", now_ms=30, after_score=after[0], after_id=after[1], **arguments
        )
        found.append(ids(reply))
        after = reply[2:4]
        if not reply[1]:
            return found
    raise AssertionError("the pages never end")


def test_list_gives_all_that_is_stored(tenant: Tenant) -> None:
    """Per intent its id, document, state line and facts, in the order of the list; nothing is written."""
    tenant.prepare(intent("i2", doc="[2]"), intent("i1", doc="[1]"))
    tenant.run("gate/complete", ("i1", A, "failed", "{}"), now_ms=11)
    before = tenant.dump()

    reply = tenant.run("gate/list", now_ms=15)

    failed = intent_line("failed", "failed", updated_at=11, revision=2)
    assert reply == [
        *(15, 0, "11", "i1"),
        ["i2", "[2]", intent_line("claimed", "granted"), ""],
        ["i1", "[1]", failed, "11 failed 10000 1 {}"],
    ]
    assert tenant.dump() == before


@pytest.mark.parametrize("members", ["unknown", "dead", "done", "expiring", "updated"])
@pytest.mark.parametrize("newest", [0, 1])
def test_empty_list_is_an_empty_page(tenant: Tenant, members: str, newest: int) -> None:
    """A list that is not there has one page, with nothing on it, wherever it is begun."""
    for after in ({}, {"after_score": 5, "after_id": "x"}):
        reply = tenant.run("gate/list", members=members, now_ms=15, newest=newest, **after)
        assert reply == [15, 0, "0", ""]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ("expiring", ["i5", "i1"]),
        ("unknown", ["i2"]),
        ("dead", ["i3"]),
        ("done", ["i4"]),
        ("updated", ["i1", "i5", "i4", "i2", "i3"]),
    ],
)
def test_list_reads_the_list_it_is_given(tenant: Tenant, members: str, expected: list[str]) -> None:
    """By lease end, by when it may be asked about, by when it got there, by its last change."""
    tenant.prepare(intent("i1", lease_ms=90), "i2", "i3", "i4", intent("i5", lease_ms=80))
    tenant.run("gate/complete", ("i4", A, "succeeded", "{}"), now_ms=11)
    tenant.run("gate/expire", now_ms=20)
    tenant.run("gate/ask", ("i3", C), now_ms=25)
    tenant.run("gate/answer", ("i3", C, 3, "undecidable", "{}"), now_ms=26, asks_max=1)

    assert ids(tenant.run("gate/list", members=members, now_ms=30)) == expected
    newest = tenant.run("gate/list", members=members, now_ms=30, newest=1)
    assert ids(newest) == expected[::-1]


FIVE = ["i0", "i1", "i2", "i3", "i4"]


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("same_time", [True, False])
@pytest.mark.parametrize("newest", [0, 1])
def test_pages_join_without_gap_or_double(
    tenant: Tenant, limit: int, same_time: bool, newest: int
) -> None:
    """Each intent is on one page, also where many changed in one millisecond; none follows the last."""
    for i, id in enumerate(FIVE):
        tenant.prepare(id, now_ms=10 if same_time else 10 + i)
    order = FIVE[::-1] if newest else FIVE

    expected = [order[at : at + limit] for at in range(0, 5, limit)]
    assert pages(tenant, limit=limit, newest=newest) == expected


@pytest.mark.parametrize(("newest", "expected"), [(0, ["i3", "i4"]), (1, ["i1", "i0"])])
@pytest.mark.parametrize("gone", [True, False])
def test_page_goes_on_where_its_last_intent_was(
    tenant: Tenant, newest: int, expected: list[str], gone: bool
) -> None:
    """The next page begins behind the last one looked at, also when that one has moved away."""
    for i, id in enumerate(FIVE):
        tenant.prepare(id, now_ms=10 + i)
    if gone:
        tenant.run("gate/complete", ("i2", A, "failed", "{}"), now_ms=20)

    reply = tenant.run("gate/list", now_ms=30, newest=newest, after_score=12, after_id="i2")

    moved = ["i2"] if gone and not newest else []
    assert ids(reply) == [*expected, *moved]


@pytest.mark.parametrize(
    ("after", "newest", "expected"),
    [
        ((9, "i9"), 0, ["i1", "i2"]),
        ((9, "i9"), 1, []),
        ((10, "i0"), 0, ["i1", "i2"]),
        ((10, "i0"), 1, []),
        ((10, "i1"), 0, ["i2"]),
        ((10, "i1"), 1, []),
        ((10, "i15"), 0, ["i2"]),
        ((10, "i15"), 1, ["i1"]),
        ((10, "i2"), 0, []),
        ((10, "i2"), 1, ["i1"]),
        ((10, "i3"), 0, []),
        ((10, "i3"), 1, ["i2", "i1"]),
        ((11, "i0"), 0, []),
        ((11, "i0"), 1, ["i2", "i1"]),
        ((11, "i2"), 1, ["i1"]),  # the last one of the page before has moved: it was seen
        ((2**53 - 1, ""), 1, ["i2", "i1"]),
    ],
)
def test_page_begins_behind_any_place(
    tenant: Tenant, after: tuple[int, str], newest: int, expected: list[str]
) -> None:
    """A place is an instant and an id, and need not be anybody's."""
    tenant.prepare("i1", "i2")

    given = {"after_score": after[0], "after_id": after[1]}
    assert ids(tenant.run("gate/list", now_ms=30, newest=newest, **given)) == expected


def test_what_changes_meanwhile_is_listed_once_from_the_newest(tenant: Tenant) -> None:
    """Of pages from the newest, what moves to the front after they began is not seen again."""
    for i, id in enumerate(FIVE):
        tenant.prepare(id, now_ms=10 + i)
    first = tenant.run("gate/list", now_ms=15, newest=1, limit=2)
    tenant.run("gate/complete", ("i4", A, "failed", "{}"), ("i1", A, "failed", "{}"), now_ms=16)
    tenant.prepare("i5", now_ms=17)

    after = {"after_score": first[2], "after_id": first[3]}
    second = tenant.run("gate/list", now_ms=18, newest=1, **after)

    assert (ids(first), ids(second)) == (["i4", "i3"], ["i2", "i0"])


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ("", ["i1", "i5", "i2", "i3", "i4"]),
        (" claimed ", ["i1"]),
        (" unknown ", ["i5"]),
        (" sent ", ["i2"]),
        (" failed ", ["i3"]),
        (" cancelled ", ["i4"]),
        (" sent failed ", ["i2", "i3"]),
        (" dead_lettered ", []),
        ("sent", []),
        (" sen ", []),
    ],
)
def test_list_filters_by_status(tenant: Tenant, statuses: str, expected: list[str]) -> None:
    """A filter lets whole words through; what parks and is over counts as unknown."""
    tenant.prepare(intent("i1", on_expiry="reclaim"), "i2", "i3", "i4", "i5")
    items = (("i2", A, "succeeded", "{}"), ("i3", A, "failed", "{}"), ("i4", A, "blocked", "{}"))
    tenant.run("gate/complete", *items, now_ms=11)

    assert ids(tenant.run("gate/list", now_ms=20, statuses=statuses)) == expected


@pytest.mark.parametrize(("now_ms", "status"), [(19, "claimed"), (20, "unknown")])
def test_filter_sees_what_parks_as_unknown_from_its_lease_end_on(
    tenant: Tenant, now_ms: int, status: str
) -> None:
    """At its lease end, to the millisecond."""
    tenant.prepare("i1")

    for wanted in ("claimed", "unknown"):
        found = ids(tenant.run("gate/list", now_ms=now_ms, statuses=f" {wanted} "))
        assert found == (["i1"] if wanted == status else [])


@pytest.mark.parametrize(("newest", "last", "left"), [(0, "j999", "k1"), (1, "j000", "i1")])
def test_page_looks_at_no_more_than_1000_intents(
    tenant: Tenant, newest: int, last: str, left: str
) -> None:
    """A filter that lets nothing through gives an empty page that goes on."""
    for first in (0, 500):
        many = (f"j{first + i:03}" for i in range(500))
        tenant.prepare(*(intent(id, lease_ms=99) for id in many))
    tenant.prepare(left)
    wanted = {"statuses": " unknown ", "newest": newest}

    reply = tenant.run("gate/list", now_ms=30, **wanted)
    after = {"after_score": reply[2], "after_id": reply[3]}
    rest = tenant.run("gate/list", now_ms=30, **wanted, **after)

    assert reply == [30, 1, "10", last]
    assert (rest[:2], ids(rest)) == ([30, 0], [left])


@pytest.mark.parametrize("count", [99, 100, 101, 200])
@pytest.mark.parametrize("newest", [0, 1])
def test_list_of_whole_chunks_ends(tenant: Tenant, count: int, newest: int) -> None:
    """Intents are read a hundred at a time; a list of just so many has no empty page behind it."""
    wanted = [f"i{i:03}" for i in range(count)]
    tenant.prepare(*wanted)

    assert pages(tenant, limit=count, newest=newest) == [wanted[::-1] if newest else wanted]


def test_page_ends_beyond_4_mib(tenant: Tenant) -> None:
    """A page ends once it holds more than 4 MiB, documents, lines and facts together."""
    for i in range(6):
        tenant.prepare(intent(f"i{i}", doc="x" * (MEGABYTE - 4_096 * (i == 0))))
    facts = (("i0", B, "failed", "x" * 65_536), ("i0", B, "failed", "y" * 65_536))
    tenant.run("gate/complete", *facts, now_ms=11)

    assert pages(tenant) == [["i0", "i1", "i2", "i3"], ["i4", "i5"]]


@pytest.mark.parametrize("line", [None, "", "x"])
def test_entry_that_cannot_be_read_is_passed_over(tenant: Tenant, line: str | None) -> None:
    """What has no readable state line has no status to be listed under; the page goes on behind it."""
    tenant.is_damaged = True
    tenant.prepare("i1", "i2", "i3")
    tenant.raw.hdel(tenant.keys.gate_docs, "i1")
    tenant.raw.hdel(tenant.keys.gate_state, "i2")
    if line is not None:
        tenant.raw.hset(tenant.keys.gate_state, "i2", line)

    reply = tenant.run("gate/list", now_ms=15, limit=2)

    assert reply[:4] == [15, 0, "10", "i3"]
    assert [found[:2] for found in reply[4:]] == [["i1", ""], ["i3", "{}"]]
