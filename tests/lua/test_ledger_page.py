"""ledger/page: a page of one list of records."""

from __future__ import annotations

from typing import Any

import pytest
from lua.commands import Tenant, filed, record, stands

MEGABYTE = 1_048_576
FIVE = ["e0", "e1", "e2", "e3", "e4"]


def put(tenant: Tenant, *items: Any) -> None:
    tenant.run("ledger/put", *items, now_ms=10)


def page(tenant: Tenant, listed: str = "effects", **arguments: Any) -> list[Any]:
    given = {"now_ms": 20, "collection": "effects", "list": listed, "limit": 1_000} | arguments
    return tenant.run("ledger/page", **given)


def ids(reply: list[Any]) -> list[str]:
    return [name.removeprefix("effects/") for name, _ in reply[3:]]


def pages(tenant: Tenant, **arguments: Any) -> list[list[str]]:
    """The ids of all pages, each begun where the one before ended."""
    found, after, more = [], "", 1
    while more:
        reply = page(tenant, after=after, **arguments)
        _, more, after = reply[:3]
        found.append(ids(reply))
    return found


def test_a_page_gives_records_as_they_are_stored(tenant: Tenant) -> None:
    """Name and stored text, and where the page ended; nothing is written."""
    put(tenant, record("effects/e1", order=5, doc="[1]"), record("effects/e2", order=3))
    before = tenant.dump()

    reply = page(tenant)

    assert reply[:3] == [20, 0, "0000000000000005|e1"]
    assert [name for name, _ in reply[3:]] == ["effects/e2", "effects/e1"]
    assert reply[4][1].split("\n")[2] == "[1]"
    assert tenant.dump() == before


def test_an_empty_list_has_one_empty_page(tenant: Tenant) -> None:
    for newest in (0, 1):
        assert page(tenant, newest=newest) == [20, 0, ""]
        assert page(tenant, newest=newest, after="0000000000000005|e1") == [20, 0, ""]


def test_lists_whose_names_begin_alike_are_kept_apart(tenant: Tenant) -> None:
    """The list of all, of a run, and of runs that begin like it."""
    runs = ["r", "ra", "r_", "r-", "r~7c", "r0", "~"]
    put(tenant, *(record(f"effects/e{i}", run=run) for i, run in enumerate(runs)))
    put(tenant, record("effects_more/x", run="r"), record("eff/x", run="r"))

    assert ids(page(tenant)) == [f"e{i}" for i in range(len(runs))]
    for i, run in enumerate(runs):
        for newest in (0, 1):
            assert ids(page(tenant, f"effects:{run}", newest=newest)) == [f"e{i}"]


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("same_time", [True, False])
@pytest.mark.parametrize("newest", [0, 1])
def test_pages_join_without_gap_or_double(
    tenant: Tenant, limit: int, same_time: bool, newest: int
) -> None:
    """Each record is on one page, also where many changed in one millisecond; none follows the last."""
    put(
        tenant, *(record(f"effects/{id}", order=7 if same_time else i) for i, id in enumerate(FIVE))
    )
    order = FIVE[::-1] if newest else FIVE

    expected = [order[at : at + limit] for at in range(0, 5, limit)]
    assert pages(tenant, limit=limit, newest=newest) == expected


@pytest.mark.parametrize("count", [99, 100, 101, 200, 250])
@pytest.mark.parametrize("newest", [0, 1])
@pytest.mark.parametrize("statuses", ["", " open "])
def test_whole_chunks_end(tenant: Tenant, count: int, newest: int, statuses: str) -> None:
    """A list of just so many has no empty page behind it; nor has a page of a part of it."""
    wanted = [f"e{i:03}" for i in range(count)]
    put(tenant, *(record(f"effects/{id}") for id in wanted))
    order = wanted[::-1] if newest else wanted

    given = {"newest": newest, "statuses": statuses}
    assert pages(tenant, limit=count, **given) == [order]
    assert pages(tenant, limit=count - 1, **given) == [order[:-1], order[-1:]]


@pytest.mark.parametrize(("newest", "expected"), [(0, ["e3", "e4"]), (1, ["e1", "e0"])])
@pytest.mark.parametrize("gone", [True, False])
def test_a_page_goes_on_where_its_last_record_was(
    tenant: Tenant, newest: int, expected: list[str], gone: bool
) -> None:
    """Also when that one has moved away; from the newest it is not seen again."""
    put(tenant, *(record(f"effects/{id}", order=i) for i, id in enumerate(FIVE)))
    if gone:
        put(tenant, record("effects/e2", "b" * 22, order=9))

    reply = page(tenant, newest=newest, after="0000000000000002|e2")

    assert ids(reply) == [*expected, *(["e2"] if gone and not newest else [])]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"statuses": " open "}, [0, 3, 4]),
        ({"statuses": " open sent "}, [0, 1, 3, 4]),
        ({"statuses": " ope "}, []),
        ({"statuses": "open"}, []),
        ({"source": "s"}, [3, 4]),
        ({"source": "t"}, []),
        ({"active": 1}, [0, 1, 2, 4]),
        ({"created_before": 6}, [0, 1]),
        ({"created_before": 5}, []),
        ({"created_before": 0}, []),
        ({"statuses": " open ", "source": "s", "active": 1, "created_before": 8}, [4]),
        ({"upto": 2}, [0, 1, 2]),
        ({"upto": 0}, [0]),
        ({"upto": 2, "statuses": " open "}, [0]),
        ({"upto": 2**53 - 1}, [0, 1, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("newest", [0, 1])
def test_filters_let_through_what_they_say(
    tenant: Tenant, filters: dict[str, Any], expected: list[int], newest: int
) -> None:
    """Whole words; created strictly before; orders up to and including."""
    told = [
        {"created_at": 5},
        {"created_at": 5, "status": "sent"},
        {"created_at": 6, "status": "failed"},
        {"created_at": 7, "source": "s", "active": 0},
        {"created_at": 7, "source": "s"},
    ]
    put(tenant, *(record(f"effects/e{i}", order=i, **words) for i, words in enumerate(told)))

    wanted = [f"e{i}" for i in expected]
    reply = page(tenant, newest=newest, **filters)
    assert ids(reply) == (wanted[::-1] if newest else wanted)
    flat = [id for one in pages(tenant, newest=newest, limit=1, **filters) for id in one]
    assert flat == (wanted[::-1] if newest else wanted)


@pytest.mark.parametrize(("newest", "last", "left"), [(0, "j999", "k1"), (1, "j000", "i1")])
def test_a_page_looks_at_no_more_than_1000_records(
    tenant: Tenant, newest: int, last: str, left: str
) -> None:
    """A filter that lets nothing through gives an empty page that goes on."""
    put(tenant, *(record(f"effects/j{i:03}") for i in range(1_000)))
    put(tenant, record(f"effects/{left}", status="sent"))
    wanted = {"statuses": " sent ", "newest": newest}

    reply = page(tenant, **wanted)
    rest = page(tenant, after=reply[2], **wanted)

    assert reply == [20, 1, f"0000000000000001|{last}"]
    assert (rest[1], ids(rest)) == (0, [left])


@pytest.mark.parametrize("statuses", ["", " open "])
def test_a_page_ends_beyond_4_mib(tenant: Tenant, statuses: str) -> None:
    """Whatever its limit is."""
    for i in range(6):
        put(tenant, record(f"effects/e{i}", doc="x" * MEGABYTE))

    assert pages(tenant, statuses=statuses) == [["e0", "e1", "e2", "e3"], ["e4", "e5"]]


@pytest.mark.parametrize("doc", [None, "", "x", "x\ny\nz"])
def test_an_entry_that_cannot_be_read_is_passed_over(tenant: Tenant, doc: str | None) -> None:
    """The page goes on behind it."""
    tenant.is_damaged = True
    put(tenant, *(record(f"effects/{id}") for id in FIVE[:3]))
    tenant.raw.hdel(tenant.keys.ledger_docs, "effects/e1")
    if doc is not None:
        tenant.raw.hset(tenant.keys.ledger_docs, "effects/e1", doc)

    assert pages(tenant, limit=2) == [["e0", "e2"]]
    assert ids(page(tenant)) == ["e0", "e2"]


def test_a_place_of_another_list_begins_nowhere_else(tenant: Tenant) -> None:
    """Whatever a cursor holds, a page stays within its list."""
    put(tenant, record("effects/e1", run="r"), record("aaa/x"), record("zzz/x"))

    for after in ("}", "~", "|", "", "0", "9", "\udcff", "zzz|0000000000000001|x"):
        for newest in (0, 1):
            assert set(ids(page(tenant, after=after, newest=newest))) <= {"e1"}


def test_words_are_those_of_the_record(tenant: Tenant) -> None:
    """A change of a record's words changes what finds it."""
    put(tenant, record("effects/e1"))
    item = ("effects/e1", "b" * 22, filed(status="sent"), stands("effects", 1, "e1"), "{}")
    put(tenant, item)

    assert ids(page(tenant, statuses=" open ")) == []
    assert ids(page(tenant, statuses=" sent ")) == ["e1"]
