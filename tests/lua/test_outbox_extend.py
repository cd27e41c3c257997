"""outbox/extend: the holder moves the end of its lease, never backwards, and not after it."""

from __future__ import annotations

import pytest
from lua.commands import A, B, Tenant, row

MISS = ["", "~", A[:-1], A[1:], A + "a", f"{A} 20", B, A + "\n"]


@pytest.fixture
def claimed(tenant: Tenant) -> Tenant:
    """m1 and m2, claimed by A at 10 until 20."""
    tenant.enqueue("m1", "m2")
    tenant.claim(A, now_ms=10)
    return tenant


def test_extend_moves_the_end(claimed: Tenant) -> None:
    """An extended row's lease ends lease_ms after now; nothing else of it changes."""
    before = claimed.dump()

    reply = claimed.run("outbox/extend", ("m1", A, 30), now_ms=15)

    assert reply == [15, ["extended", 45]]
    assert claimed.changes(before) == {
        "outbox:due:l:t": {"m1": 45},
        "outbox:state": {"m1": f"claimed claimed {A} 45 24 1 1 10000 10 a"},
    }


@pytest.mark.parametrize(("lease_ms", "lease_end"), [(1, 20), (5, 20), (6, 21)])
def test_end_never_moves_back(claimed: Tenant, lease_ms: int, lease_end: int) -> None:
    """An end that would be earlier than before stays."""
    reply = claimed.run("outbox/extend", ("m1", A, lease_ms), now_ms=15)

    assert reply == [15, ["extended", lease_end]]


@pytest.mark.parametrize(("now_ms", "answer"), [(19, ["extended", 29]), (20, "lost_claim")])
def test_extend_is_refused_from_the_lease_end_on(
    claimed: Tenant, now_ms: int, answer: object
) -> None:
    """At the lease's end itself the row may be another's: extend answers lost_claim."""
    before = claimed.dump()

    assert claimed.run("outbox/extend", ("m1", A, 10), now_ms=now_ms) == [now_ms, answer]
    assert (claimed.dump() == before) == (answer == "lost_claim")


def test_extended_row_is_claimable_at_its_new_end(claimed: Tenant) -> None:
    """Other claims wait for the new end."""
    claimed.run("outbox/extend", ("m1", A, 20), now_ms=15)

    assert claimed.ids_claimed(B, now_ms=34, limit=1) == ["m2"]
    assert claimed.ids_claimed("c" * 22, now_ms=35, limit=1) == ["m1"]


@pytest.mark.parametrize("token", MISS)
def test_extend_needs_exactly_the_token(claimed: Tenant, token: str) -> None:
    """Anything but the very token is lost_claim and writes nothing."""
    before = claimed.dump()

    assert claimed.run("outbox/extend", ("m1", token, 30), now_ms=15) == [15, "lost_claim"]
    assert claimed.dump() == before


@pytest.mark.parametrize(
    ("name", "item"),
    [
        ("outbox/ack", ("m1", A)),
        ("outbox/release", ("m1", A)),
        ("outbox/nack", ("m1", A, 50, 0, '"x"')),
        ("outbox/nack", ("m1", A, 50, 1, '"x"')),
    ],
)
def test_extend_of_an_ended_claim_is_lost(claimed: Tenant, name: str, item: tuple[str]) -> None:
    """The token that ended a claim extends nothing."""
    claimed.run(name, item, now_ms=12)
    before = claimed.dump()

    assert claimed.run("outbox/extend", ("m1", A, 30), now_ms=13) == [13, "lost_claim"]
    assert claimed.dump() == before


def test_extend_of_a_parked_row_is_lost(tenant: Tenant) -> None:
    """An unknown row has no lease any more."""
    tenant.enqueue(row("m1", on_expiry="park"))
    tenant.claim(A, now_ms=10)
    tenant.claim(B, now_ms=20)

    assert tenant.run("outbox/extend", ("m1", A, 30), now_ms=21) == [21, "lost_claim"]


def test_two_items_for_one_row_give_the_later_end(claimed: Tenant) -> None:
    """Items are decided one after the other, refused ones between good ones."""
    reply = claimed.run(
        "outbox/extend", ("m1", A, 30), ("m3", A, 30), ("m1", A, 20), ("m2", A, 9), now_ms=15
    )

    assert reply == [15, ["extended", 45], "lost_claim", ["extended", 45], ["extended", 24]]
    assert claimed.dump()["outbox:due:l:t"] == {"m1": 45, "m2": 24}


@pytest.mark.parametrize(("lease_ms", "is_good"), [(1, True), (43_200_000, True)])
def test_extend_takes_1_ms_to_12_h(claimed: Tenant, lease_ms: int, is_good: bool) -> None:
    """The shortest and the longest lease are good; the values next to them are refused."""
    assert claimed.run("outbox/extend", ("m1", A, lease_ms), now_ms=15)[1][0] == "extended"
    for wrong in (0, 43_200_001):
        assert claimed.refusal("outbox/extend", ("m1", A, wrong), now_ms=15).startswith(
            "LK_ARGUMENT lease_ms"
        )
