"""idempotency/list: pages of records, in the order in which they may be forgotten."""

from __future__ import annotations

from typing import Any

import pytest
from lua.commands import A, Tenant

MEGABYTE = 1 << 20


def reserve(tenant: Tenant, *ids_and_ends: tuple[str, int | str], now_ms: int = 10) -> None:
    items = ((id, A, "f", "", end, "reclaim", "{}") for id, end in ids_and_ends)
    tenant.run("idempotency/reserve", *items, now_ms=now_ms)


def ids(reply: list[Any]) -> list[str]:
    return [record[0] for record in reply[4:]]


def test_list_gives_records_by_their_end(tenant: Tenant) -> None:
    """Records come by the instant at which they may be forgotten, then by id; those kept last."""
    reserve(tenant, ("r1", ""), ("r2", 200), ("r3", 100), ("r0", 200))
    before = tenant.dump()

    reply = tenant.run("idempotency/list", now_ms=20)

    assert reply[:4] == [20, 0, str(2**53 - 1), "r1"]
    assert ids(reply) == ["r3", "r0", "r2", "r1"]
    assert reply[4] == ["r3", f"reserved {A} 10 10 0 100 0 reclaim ~\nf\n{{}}\n"]
    assert tenant.dump() == before


def test_list_of_nothing(tenant: Tenant) -> None:
    """Without records there is one empty page."""
    assert tenant.run("idempotency/list", now_ms=20) == [20, 0, "0", ""]


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6])
def test_pages_join_without_gap_or_double(tenant: Tenant, limit: int) -> None:
    """Each record is on one page, although all have one end."""
    reserve(tenant, *((f"r{i}", 100) for i in range(5)))

    found, after = [], {"after_score": "", "after_id": ""}
    for _ in range(5 // limit + (5 % limit > 0)):
        reply = tenant.run("idempotency/list", now_ms=20, limit=limit, **after)
        found += ids(reply)
        after = {"after_score": reply[2], "after_id": reply[3]}

    assert found == ["r0", "r1", "r2", "r3", "r4"]
    assert reply[1] == 0


def test_list_passes_over_released_records(tenant: Tenant) -> None:
    """A released reservation is not listed."""
    reserve(tenant, ("r1", 100), ("r2", 100))
    tenant.run("idempotency/release", ("r1", A, ""), now_ms=11)

    assert ids(tenant.run("idempotency/list", now_ms=20)) == ["r2"]


def test_page_looks_at_no_more_than_1000_records(tenant: Tenant) -> None:
    """A page of released records is empty and goes on."""
    many = [f"r{i:04}" for i in range(1_000)]
    reserve(tenant, *((id, "") for id in many))
    tenant.run("idempotency/release", *((id, A, "") for id in many), now_ms=11)
    reserve(tenant, ("s", ""))

    first = tenant.run("idempotency/list", now_ms=20)
    second = tenant.run("idempotency/list", now_ms=20, after_score=first[2], after_id=first[3])

    assert (first[1], first[3], ids(first)) == (1, "r0999", [])
    assert (second[1], ids(second)) == (0, ["s"])


def test_page_ends_beyond_4_mib(tenant: Tenant) -> None:
    """A page ends once it holds more than 4 MiB."""
    for i in range(6):
        reserve(tenant, (f"r{i}", 100))
        tenant.run("idempotency/complete", (f"r{i}", A, 1, "x" * MEGABYTE), now_ms=11)

    reply = tenant.run("idempotency/list", now_ms=20)

    assert (reply[1], ids(reply)) == (1, ["r0", "r1", "r2", "r3"])
