"""gate/run: pages of the intents of one run, the last changed first."""

from __future__ import annotations

from typing import Any

import pytest
from lua.commands import A, B, Tenant, intent, intent_line

MEGABYTE = 1 << 20


def ids(reply: list[Any]) -> list[str]:
    return [found[0] for found in reply[3:]]


def pages(tenant: Tenant, run: str = "r", **arguments: Any) -> list[list[str]]:
    """All pages of a run."""
    found, after = [], ""
    for _ in range(2_000):
        reply = tenant.run("gate/run", now_ms=30, run=run, after=after, **arguments)
        found.append(ids(reply))
        after = reply[2]
        if not reply[1]:
            return found
    raise AssertionError("the pages never end")


def prepare(tenant: Tenant, *ids: str, run: str = "r", now_ms: int = 10) -> None:
    tenant.prepare(*(intent(id, run=run) for id in ids), now_ms=now_ms)


def test_run_gives_all_that_is_stored(tenant: Tenant) -> None:
    """Per intent its id, document, state line and facts, the last changed first; nothing is written."""
    tenant.prepare(intent("i2", run="r", doc="[2]"), intent("i1", run="r", doc="[1]"))
    prepare(tenant, "i3", run="q")
    tenant.run("gate/complete", ("i2", A, "failed", "{}"), now_ms=11)
    before = tenant.dump()

    reply = tenant.run("gate/run", now_ms=15, run="r")

    failed = intent_line("failed", "failed", updated_at=11, revision=2, run="r")
    assert reply == [
        *(15, 0, "r:0000000000000010:i1"),
        ["i2", "[2]", failed, "11 failed 10000 1 {}"],
        ["i1", "[1]", intent_line("claimed", "granted", run="r"), ""],
    ]
    assert tenant.dump() == before


RUNS = ["a", "aa", "a-", "a_", "a0", "a~3a", "a~3b", "-", "b", "~7e"]


@pytest.mark.parametrize("run", RUNS)
def test_a_run_is_told_from_those_whose_names_begin_alike(tenant: Tenant, run: str) -> None:
    """A run has its own intents and no other's, whatever stands before and behind it."""
    for name in RUNS:
        prepare(tenant, f"{name}1", f"{name}2", run=name)
    prepare(tenant, ":aa1", run="z")  # as the end of a member of `aa` reads, counted as one of `a`

    reply = tenant.run("gate/run", now_ms=15, run=run)

    assert ids(reply) == [f"{run}2", f"{run}1"]
    assert pages(tenant, run, limit=1) == [[f"{run}2"], [f"{run}1"]]


@pytest.mark.parametrize("run", ["q", "~", "rr"])
def test_run_without_intents_is_an_empty_page(tenant: Tenant, run: str) -> None:
    """An unknown run has one page, with nothing on it; intents of no run are in none."""
    prepare(tenant, "i1")
    prepare(tenant, "i2", run="~")

    assert tenant.run("gate/run", now_ms=15, run=run) == [15, 0, ""]


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("same_time", [True, False])
def test_pages_join_without_gap_or_double(tenant: Tenant, limit: int, same_time: bool) -> None:
    """Each intent is on one page, also where many changed in one millisecond; none follows the last."""
    order = ["i4", "i3", "i2", "i1", "i0"]
    for i, id in enumerate(order[::-1]):
        prepare(tenant, id, now_ms=10 if same_time else 10 + i)

    expected = [order[at : at + limit] for at in range(0, 5, limit)]
    assert pages(tenant, limit=limit) == expected


def test_page_goes_on_where_its_last_intent_was(tenant: Tenant) -> None:
    """What moves to the front meanwhile is not seen again, and hides nobody behind it."""
    for i in range(5):
        prepare(tenant, f"i{i}", now_ms=10 + i)
    first = tenant.run("gate/run", now_ms=15, run="r", limit=2)
    tenant.run("gate/complete", ("i3", A, "failed", "{}"), ("i1", A, "failed", "{}"), now_ms=16)
    prepare(tenant, "i5", now_ms=17)

    second = tenant.run("gate/run", now_ms=18, run="r", after=first[2])

    assert (ids(first), ids(second)) == (["i4", "i3"], ["i2", "i0"])


@pytest.mark.parametrize("after", ["q:", "r", "rr:0000000000000010:i1", ":", "R:"])
def test_a_page_goes_on_within_its_run(tenant: Tenant, after: str) -> None:
    """A place in another run is refused."""
    assert tenant.refusal("gate/run", now_ms=15, run="r", after=after) == "LK_ARGUMENT after"


@pytest.mark.parametrize("run", ["", " ", "a b", "a:", "a\n", "a\0", "é", "{a}"])
def test_a_run_is_one_word(tenant: Tenant, run: str) -> None:
    """Nothing that could mean another range."""
    assert tenant.refusal("gate/run", now_ms=15, run=run) == "LK_ARGUMENT run"


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ("", ["i3", "i2", "i4", "i1"]),
        (" claimed ", ["i1"]),
        (" unknown ", ["i4"]),
        (" failed sent ", ["i3", "i2"]),
        ("sent", []),
        (" cancelled ", []),
    ],
)
def test_run_filters_by_status(tenant: Tenant, statuses: str, expected: list[str]) -> None:
    """A filter lets whole words through; what parks and is over counts as unknown."""
    tenant.prepare(intent("i1", run="r", on_expiry="reclaim"))
    prepare(tenant, "i2", "i3", "i4")
    items = (("i2", A, "succeeded", "{}"), ("i3", A, "failed", "{}"))
    tenant.run("gate/complete", *items, now_ms=11)

    assert ids(tenant.run("gate/run", now_ms=20, run="r", statuses=statuses)) == expected


def test_page_looks_at_no_more_than_1000_intents(tenant: Tenant) -> None:
    """A filter that lets nothing through gives an empty page that goes on."""
    tenant.prepare(intent("i0", run="r", lease_ms=1))
    for first in (0, 500):
        many = (f"j{first + i:03}" for i in range(500))
        tenant.prepare(*(intent(id, run="r", lease_ms=99) for id in many))

    reply = tenant.run("gate/run", now_ms=30, run="r", statuses=" unknown ")
    rest = tenant.run("gate/run", now_ms=30, run="r", statuses=" unknown ", after=reply[2])

    assert reply == [30, 1, "r:0000000000000010:j000"]
    assert (rest[:2], ids(rest)) == ([30, 0], ["i0"])


@pytest.mark.parametrize("count", [99, 100, 101, 200])
def test_run_of_whole_chunks_ends(tenant: Tenant, count: int) -> None:
    """Intents are read a hundred at a time; a run of just so many has no empty page behind it."""
    wanted = [f"i{i:03}" for i in range(count)]
    prepare(tenant, *wanted)

    assert pages(tenant, limit=count) == [wanted[::-1]]


def test_page_ends_beyond_4_mib(tenant: Tenant) -> None:
    """A page ends once it holds more than 4 MiB, documents, lines and facts together."""
    for i in range(6):
        tenant.prepare(intent(f"i{i}", run="r", doc="x" * (MEGABYTE - 4_096 * (i == 5))))
    facts = (("i4", B, "failed", "x" * 65_536), ("i4", B, "failed", "y" * 65_536))
    tenant.run("gate/complete", *facts, now_ms=11)

    assert pages(tenant) == [["i5", "i4", "i3", "i2"], ["i1", "i0"]]


@pytest.mark.parametrize("line", [None, "", "x"])
def test_entry_that_cannot_be_read_is_passed_over(tenant: Tenant, line: str | None) -> None:
    """What has no readable state line has no status to be listed under; the page goes on behind it."""
    tenant.is_damaged = True
    prepare(tenant, "i1", "i2", "i3")
    tenant.raw.hdel(tenant.keys.gate_docs, "i1")
    tenant.raw.hdel(tenant.keys.gate_state, "i2")
    if line is not None:
        tenant.raw.hset(tenant.keys.gate_state, "i2", line)

    reply = tenant.run("gate/run", now_ms=15, run="r", limit=2)

    assert reply[:3] == [15, 0, "r:0000000000000010:i1"]
    assert [found[:2] for found in reply[3:]] == [["i3", "{}"], ["i1", ""]]
