"""outbox/counts: how many rows there are, by route, without looking at them."""

from __future__ import annotations

import pytest
from lua.commands import A, B, Tenant, row


def test_counts_of_every_status(tenant: Tenant) -> None:
    """Each status of a route is counted; totals are those of the lists; counting writes nothing."""
    tenant.enqueue(*(row(f"m{i}", on_expiry="park") for i in range(7)))
    tenant.claim(A, now_ms=10, limit=4)
    tenant.run("outbox/ack", ("m0", A), now_ms=11)
    tenant.run("outbox/nack", ("m1", A, "", 1, '"x"'), now_ms=11)
    tenant.run("outbox/extend", ("m2", A, 20), now_ms=11)
    tenant.run("outbox/cancel", ("m4",), now_ms=11)
    tenant.claim(B, now_ms=20, limit=3)
    before = tenant.dump()

    reply = tenant.run("outbox/counts", now_ms=21)

    # The second claim took m5 and m6, and parked m3; m2 was extended.
    assert reply == [21, 0, 2, 1, 1, 42, 21, ["l:t", 0, 0, 3, 1, 1, 1, 1]]
    assert tenant.dump() == before


def test_counts_of_an_empty_tenant(tenant: Tenant) -> None:
    """Nothing there counts 0."""
    assert tenant.run("outbox/counts", now_ms=10) == [10, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("limit", "after", "more", "routes"),
    [
        (1, ("", ""), 1, ["l:b"]),
        (2, ("", ""), 1, ["l:b", "l:c"]),
        (3, ("", ""), 0, ["l:b", "l:c", "l:a"]),
        (4, ("", ""), 0, ["l:b", "l:c", "l:a"]),
        (1, (10, "l:b"), 1, ["l:c"]),
        (2, (10, "l:b"), 0, ["l:c", "l:a"]),
        (2, (10, "l:bb"), 0, ["l:c", "l:a"]),
        (2, (10, "l:c"), 0, ["l:a"]),
        (2, (20, "l:a"), 0, []),
    ],
)
def test_counts_come_in_pages(
    tenant: Tenant, limit: int, after: tuple[str | int, str], more: int, routes: list[str]
) -> None:
    """Routes come in the order of their last enqueue, then of their name, a page at a time."""
    for id, route, now_ms in (("m1", "l:b", 10), ("m2", "l:c", 10), ("m3", "l:a", 20)):
        tenant.enqueue(row(id, route=route), route=route, now_ms=now_ms)

    reply = tenant.run(
        "outbox/counts", now_ms=30, limit=limit, after_score=after[0], after_route=after[1]
    )

    assert reply[1] == more
    assert [route[0] for route in reply[7:]] == routes
