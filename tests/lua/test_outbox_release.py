"""outbox/release: the holder gives rows back as if it had never claimed them."""

from __future__ import annotations

import pytest
from lua.commands import A, B, C, Tenant, row

MISS = ["", "~", A[:-1], A[1:], A + "a", f"{A} 20", B, A + "\n"]


@pytest.fixture
def claimed(tenant: Tenant) -> Tenant:
    """m1 and m2, claimed by A at 10 until 20."""
    tenant.enqueue("m1", "m2")
    tenant.claim(A, now_ms=10)
    return tenant


def test_release_gives_a_row_back(claimed: Tenant) -> None:
    """A released row is pending, due at the moment of its claim, and its attempt is not charged."""
    before = claimed.dump()

    reply = claimed.run("outbox/release", ("m1", A), now_ms=12)

    assert reply == [12, "released"]
    assert claimed.changes(before) == {
        "outbox:due:l:t": {"m1": 10},
        "outbox:state": {"m1": f"pending released {A} 10 24 0 1 10000 10 a"},
        "outbox:tally": {"pending:l:t": "1", "claimed:l:t": "1"},
    }


def test_released_row_goes_before_those_due_since(claimed: Tenant) -> None:
    """A released row stands before rows that became due after its claim."""
    claimed.enqueue(row("m0", available_at=11))
    claimed.run("outbox/release", ("m2", A), now_ms=12)

    assert claimed.ids_claimed(B, now_ms=13) == ["m2", "m0"]


def test_release_keeps_the_claim_count(claimed: Tenant) -> None:
    """Only attempts are given back: the claim count rises with each claim."""
    claimed.run("outbox/release", ("m1", A), now_ms=12)

    assert claimed.claim(B, now_ms=12)[4][5:7] == [1, 2]


@pytest.mark.parametrize("now_ms", [19, 20, 1_000])
def test_late_release_is_good(claimed: Tenant, now_ms: int) -> None:
    """A release asks no clock, as long as nobody reclaimed the row."""
    assert claimed.run("outbox/release", ("m1", A), now_ms=now_ms) == [now_ms, "released"]


@pytest.mark.parametrize("token", MISS)
@pytest.mark.parametrize("repeated", [0, 1])
def test_release_needs_exactly_the_token(claimed: Tenant, token: str, repeated: int) -> None:
    """Anything but the very token is lost_claim and writes nothing."""
    before = claimed.dump()

    reply = claimed.run("outbox/release", ("m1", token), now_ms=12, repeated=repeated)

    assert reply == [12, "lost_claim"]
    assert claimed.dump() == before


@pytest.mark.parametrize("repeated", [0, 1])
def test_second_release_answers_as_the_first(claimed: Tenant, repeated: int) -> None:
    """With the token that released it a release is released again."""
    claimed.run("outbox/release", ("m1", A), now_ms=12)
    before = claimed.dump()

    reply = claimed.run("outbox/release", ("m1", A), now_ms=13, repeated=repeated)

    assert reply == [13, "released"]
    assert claimed.dump() == before


@pytest.mark.parametrize("repeated", [0, 1])
@pytest.mark.parametrize(
    ("name", "item"),
    [
        ("outbox/ack", ("m1", A)),
        ("outbox/nack", ("m1", A, 50, 0, '"x"')),
        ("outbox/nack", ("m1", A, 50, 1, '"x"')),
    ],
)
def test_release_after_another_end_is_lost(
    claimed: Tenant, name: str, item: tuple[str], repeated: int
) -> None:
    """The token that acked or nacked a row cannot release it afterwards."""
    claimed.run(name, item, now_ms=12)
    before = claimed.dump()

    reply = claimed.run("outbox/release", ("m1", A), now_ms=13, repeated=repeated)

    assert reply == [13, "lost_claim"]
    assert claimed.dump() == before


def test_release_after_a_newer_claim_is_lost(claimed: Tenant) -> None:
    """Once another claim has the row, the first token cannot give it back."""
    claimed.run("outbox/release", ("m1", A), now_ms=12)
    claimed.claim(B, now_ms=13)
    before = claimed.dump()

    reply = claimed.run("outbox/release", ("m1", A), now_ms=14, repeated=1)

    assert reply == [14, "lost_claim"]
    assert claimed.dump() == before


@pytest.mark.parametrize(
    ("id", "repeated", "answer"),
    [("m5", 0, "lost_claim"), ("m5", 1, "forgotten"), ("m6", 1, "lost_claim")],
)
def test_release_of_a_deleted_row_is_forgotten_for_a_repeat(
    tenant: Tenant, id: str, repeated: int, answer: str
) -> None:
    """A repeat of a missing row is forgotten up to the horizon, lost_claim above it."""
    tenant.enqueue("m5")
    tenant.run("outbox/cancel", ("m5",), now_ms=10, keep_ms=0)

    assert tenant.run("outbox/release", (id, A), now_ms=12, repeated=repeated) == [12, answer]


def test_release_of_a_parked_row_is_lost(tenant: Tenant) -> None:
    """An unknown row is not given back untouched: somebody may have sent it."""
    tenant.enqueue(row("m1", on_expiry="park"))
    tenant.claim(A, now_ms=10)
    tenant.claim(B, now_ms=20)
    before = tenant.dump()

    assert tenant.run("outbox/release", ("m1", A), now_ms=21) == [21, "lost_claim"]
    assert tenant.dump() == before


def test_two_items_for_one_row_release_it_once(claimed: Tenant) -> None:
    """Items are decided one after the other; the attempt is given back once."""
    reply = claimed.run("outbox/release", ("m1", A), ("m3", A), ("m1", A), ("m1", C), now_ms=12)

    assert reply == [12, "released", "lost_claim", "released", "lost_claim"]
    assert claimed.row("m1").split()[5] == "0"
    assert claimed.tally() == {"pending:l:t": 1, "claimed:l:t": 1}
