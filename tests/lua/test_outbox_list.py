"""outbox/list: pages of a list of rows, in the list's order, whatever changes between two pages."""

from __future__ import annotations

from typing import Any

import pytest
from lua.commands import A, B, Tenant, row

MEGABYTE = 1 << 20


def ids(reply: list[Any]) -> list[str]:
    return reply[4::4]


def pages(tenant: Tenant, **arguments: Any) -> list[list[str]]:
    """All pages of a list."""
    found, after = [], ["", ""]
    for _ in range(2_000):
        reply = tenant.run(
            "outbox/list", now_ms=30, after_score=after[0], after_id=after[1], **arguments
        )
        found.append(ids(reply))
        after = reply[2:4]
        if not reply[1]:
            return found
    raise AssertionError("the pages never end")


def test_list_gives_rows_in_the_order_of_the_line(tenant: Tenant) -> None:
    """The line of a route is listed by due time, then id; a page writes nothing."""
    tenant.enqueue("m2", "m1", row("m0", available_at=20))
    tenant.claim(A, now_ms=10, limit=1)
    before = tenant.dump()

    reply = tenant.run("outbox/list", now_ms=15)

    claimed = f"claimed claimed {A} 20 24 1 1 10000 10 a"
    assert reply == [
        *(15, 0, "20", "m1"),
        *("m2", "0 0 2 reclaim l:t ~ ~\n{}", "", ""),
        *("m0", "0 20 2 reclaim l:t ~ ~\n{}", "", ""),
        *("m1", "0 0 2 reclaim l:t ~ ~\n{}", claimed, ""),
    ]
    assert tenant.dump() == before


@pytest.mark.parametrize("members", ["done", "dead", "unknown", "due"])
def test_empty_list_is_an_empty_page(tenant: Tenant, members: str) -> None:
    """A list that is not there has one page, with nothing on it."""
    assert tenant.run("outbox/list", members=members, now_ms=15) == [15, 0, "0", ""]


@pytest.mark.parametrize(("members", "id"), [("done", "m1"), ("dead", "m2"), ("unknown", "m3")])
def test_list_reads_the_list_it_is_given(tenant: Tenant, members: str, id: str) -> None:
    """Finished rows, dead letters and unknown rows have lists of their own."""
    tenant.enqueue("m1", "m2", row("m3", on_expiry="park"))
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/ack", ("m1", A), now_ms=11)
    tenant.run("outbox/nack", ("m2", A, "", 1, '"x"'), now_ms=12)
    tenant.claim(B, now_ms=20)

    assert ids(tenant.run("outbox/list", members=members, now_ms=21)) == [id]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (1, [["m0"], ["m1"], ["m2"], ["m3"], ["m4"]]),
        (2, [["m0", "m1"], ["m2", "m3"], ["m4"]]),
        (4, [["m0", "m1", "m2", "m3"], ["m4"]]),
        (5, [["m0", "m1", "m2", "m3", "m4"]]),
        (6, [["m0", "m1", "m2", "m3", "m4"]]),
    ],
)
@pytest.mark.parametrize("same_time", [True, False])
def test_pages_join_without_gap_or_double(
    tenant: Tenant, limit: int, expected: list[list[str]], same_time: bool
) -> None:
    """Each row is on one page, also where many rows have one due time; no page follows the last."""
    tenant.enqueue(*(row(f"m{i}", available_at=0 if same_time else i) for i in range(5)))

    assert pages(tenant, limit=limit) == expected


@pytest.mark.parametrize("score", [1, 2**53 - 1])
def test_cursor_holds_any_instant(tenant: Tenant, score: int) -> None:
    """A page ends at an instant in whole digits, however far away."""
    tenant.enqueue(row("m1", available_at=score), row("m2", available_at=score))

    reply = tenant.run("outbox/list", now_ms=0, limit=1)

    assert reply[:4] == [0, 1, str(score), "m1"]
    after = {"after_score": reply[2], "after_id": reply[3]}
    assert ids(tenant.run("outbox/list", now_ms=0, limit=1, **after)) == ["m2"]


def test_page_goes_on_where_its_last_row_was(tenant: Tenant) -> None:
    """The next page begins behind the last row looked at, also when that one has gone."""
    tenant.enqueue("m1", "m2", "m3", "m4")
    first = tenant.run("outbox/list", now_ms=15, limit=2)
    tenant.run("outbox/cancel", ("m1",), ("m2",), now_ms=15)
    tenant.enqueue("m0", "m25")

    reply = tenant.run("outbox/list", now_ms=15, after_score=first[2], after_id=first[3])

    assert ids(first) == ["m1", "m2"]
    assert ids(reply) == ["m25", "m3", "m4"]


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ("", ["m4", "m5", "m1", "m2"]),
        (" pending ", ["m4", "m5"]),
        (" claimed ", ["m1", "m2"]),
        (" claimed pending ", ["m4", "m5", "m1", "m2"]),
        (" sent ", []),
        ("pending", []),
    ],
)
def test_list_filters_by_status(tenant: Tenant, statuses: str, expected: list[str]) -> None:
    """A filter lets whole words through, a fresh row as pending."""
    tenant.enqueue("m1", "m2", "m3", "m4")
    tenant.claim(A, now_ms=10, limit=3)
    tenant.run("outbox/nack", ("m3", A, 5, 0, '"x"'), now_ms=11)
    tenant.run("outbox/cancel", ("m3",), now_ms=11)
    tenant.enqueue(row("m5", available_at=5))

    assert ids(tenant.run("outbox/list", now_ms=15, statuses=statuses)) == expected


@pytest.mark.parametrize(("now_ms", "status"), [(19, "claimed"), (20, "unknown")])
def test_filter_sees_a_parked_row_as_unknown_from_its_lease_end_on(
    tenant: Tenant, now_ms: int, status: str
) -> None:
    """A row that parks counts as unknown at its lease end itself."""
    tenant.enqueue(row("m1", on_expiry="park"))
    tenant.claim(A, now_ms=10)

    for wanted in ("claimed", "unknown"):
        found = ids(tenant.run("outbox/list", now_ms=now_ms, statuses=f" {wanted} "))
        assert found == (["m1"] if wanted == status else [])


@pytest.mark.parametrize(
    ("routes", "expected"),
    [
        ("", ["m1", "m2", "m3", "m4"]),
        ("l:t", ["m1"]),
        ("l:", ["m1", "m2", "m3"]),
        ("l:ta", ["m2"]),
        ("l", []),
        ("la:", ["m4"]),
        (":", []),
    ],
)
def test_list_filters_by_route(tenant: Tenant, routes: str, expected: list[str]) -> None:
    """A whole route, or a lane with its colon; no part of a word passes for the whole."""
    for id, route in (("m1", "l:t"), ("m2", "l:ta"), ("m3", "l:b"), ("m4", "la:t")):
        tenant.enqueue(row(id, route=route), route=route)
        tenant.run("outbox/cancel", (id,), now_ms=10, route=route)

    reply = tenant.run("outbox/list", members="done", now_ms=15, routes=routes)

    assert ids(reply) == expected


def test_page_looks_at_no_more_than_1000_rows(tenant: Tenant) -> None:
    """A filter that lets nothing through gives an empty page that goes on."""
    tenant.enqueue(*(f"m{i:04}" for i in range(1_000)))
    tenant.enqueue("n1", "n2")
    tenant.claim(A, now_ms=0, limit=1)

    reply = tenant.run("outbox/list", now_ms=5, statuses=" claimed ")
    after = {"after_score": reply[2], "after_id": reply[3]}

    assert reply == [5, 1, "0", "n1"]
    assert ids(tenant.run("outbox/list", now_ms=5, statuses=" claimed ", **after)) == ["m0000"]


@pytest.mark.parametrize("count", [99, 100, 101, 200])
def test_list_of_whole_chunks_ends(tenant: Tenant, count: int) -> None:
    """Rows are read a hundred at a time; a list of just so many has no empty page behind it."""
    wanted = [f"m{i:03}" for i in range(count)]
    tenant.enqueue(*wanted)

    assert pages(tenant, limit=count) == [wanted]


def test_page_ends_beyond_4_mib(tenant: Tenant) -> None:
    """A page ends once it holds more than 4 MiB, documents and errors together."""
    for i in range(6):
        tenant.enqueue(row(f"m{i}", payload="x" * (MEGABYTE - 22)))
    tenant.claim(A, now_ms=10, limit=1)
    tenant.run("outbox/nack", ("m0", A, 0, 0, '"' + "x" * MEGABYTE + '"'), now_ms=11)

    found = pages(tenant)

    assert found == [["m0", "m1", "m2"], ["m3", "m4", "m5"]]


def test_entry_without_row_is_listed_empty(tenant: Tenant) -> None:
    """An entry whose row is gone is shown, with empty texts."""
    tenant.is_damaged = True
    tenant.enqueue("m1")
    tenant.raw.hdel(tenant.keys.outbox_docs, "m1")

    assert tenant.run("outbox/list", now_ms=5) == [5, 0, "0", "m1", "m1", "", "", ""]
