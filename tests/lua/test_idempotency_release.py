"""idempotency/release: an unfinished reservation is withdrawn, so that the key is free again."""

from __future__ import annotations

import pytest
from lua.commands import A, B, Tenant

FIVE_MINUTES = 300_000
MISS = ["~", A[:-1], A[1:], A + "a", f"{A} 10", B, A + "\n"]


@pytest.fixture
def reserved(tenant: Tenant) -> Tenant:
    """r1, reserved by A at 10 with fingerprint f."""
    tenant.run("idempotency/reserve", ("r1", A, "f", "", "", "reclaim", "{}"), now_ms=10)
    return tenant


@pytest.mark.parametrize(("token", "fingerprint"), [(A, ""), ("", "f"), (A, "f")])
def test_release_withdraws_a_reservation(reserved: Tenant, token: str, fingerprint: str) -> None:
    """Token or fingerprint release the key; that is remembered for five minutes."""
    before = reserved.dump()

    reply = reserved.run("idempotency/release", ("r1", token, fingerprint), now_ms=12)

    assert reply == [12, "released"]
    assert reserved.changes(before) == {
        "idempotency:docs": {"r1": f"released {A} 10 12 0 0 0 reclaim ~\nf\n{{}}\n"},
        "idempotency:due": {"r1": 12 + FIVE_MINUTES},
    }


def test_release_needs_a_proof(reserved: Tenant) -> None:
    """Neither token nor fingerprint is no proof, and a bug of the caller."""
    assert reserved.refusal("idempotency/release", ("r1", "", ""), now_ms=12) == "LK_ARGUMENT item"


@pytest.mark.parametrize("token", MISS)
@pytest.mark.parametrize("fingerprint", ["", "f"])
def test_release_needs_exactly_the_token(reserved: Tenant, token: str, fingerprint: str) -> None:
    """A token that is given must be the very token, whatever the fingerprint."""
    before = reserved.dump()

    item = ("r1", token, fingerprint)
    assert reserved.run("idempotency/release", item, now_ms=12) == [12, "lost"]
    assert reserved.dump() == before


@pytest.mark.parametrize("fingerprint", ["g", "f ", "ff"])
@pytest.mark.parametrize("token", ["", A])
def test_release_needs_exactly_the_fingerprint(
    reserved: Tenant, token: str, fingerprint: str
) -> None:
    """A fingerprint that is given must be the reservation's own, whatever the token."""
    before = reserved.dump()

    item = ("r1", token, fingerprint)
    assert reserved.run("idempotency/release", item, now_ms=12) == [12, "lost"]
    assert reserved.dump() == before


@pytest.mark.parametrize("repeated", [0, 1])
def test_second_release_answers_as_the_first(reserved: Tenant, repeated: int) -> None:
    """While it is remembered, the same release is released again; another token's is missing."""
    reserved.run("idempotency/release", ("r1", A, ""), now_ms=12)
    before = reserved.dump()

    items = ("r1", A, ""), ("r1", "", "f"), ("r1", B, ""), ("r1", "", "g")
    reply = reserved.run("idempotency/release", *items, now_ms=13, repeated=repeated)

    assert reply == [13, "released", "released", "missing", "missing"]
    assert reserved.dump() == before


@pytest.mark.parametrize("status", ["completed", "conflicted"])
def test_release_of_what_is_no_reservation_is_kept(reserved: Tenant, status: str) -> None:
    """A completed or conflicted key stays."""
    if status == "completed":
        reserved.run("idempotency/complete", ("r1", A, 1_000, "{}"), now_ms=11)
    else:
        reserved.run("idempotency/reserve", ("r1", B, "g", "", "", "reclaim", "{}"), now_ms=11)
    before = reserved.dump()

    assert reserved.run("idempotency/release", ("r1", A, ""), now_ms=12) == [12, "kept"]
    assert reserved.dump() == before


@pytest.mark.parametrize(("repeated", "answer"), [(0, "missing"), (1, "forgotten")])
def test_release_of_an_unknown_key(tenant: Tenant, repeated: int, answer: str) -> None:
    """Of a key without record a repeat is forgotten, a first request missing."""
    reply = tenant.run("idempotency/release", ("r1", A, ""), now_ms=12, repeated=repeated)

    assert reply == [12, answer]
    assert tenant.dump() == {}


def test_release_after_another_reservation_is_lost(reserved: Tenant) -> None:
    """Once another token has the key, the first one's release is lost."""
    reserved.run("idempotency/release", ("r1", A, ""), now_ms=11)
    reserved.run("idempotency/reserve", ("r1", B, "f", "", "", "reclaim", "{}"), now_ms=12)
    before = reserved.dump()

    assert reserved.run("idempotency/release", ("r1", A, ""), now_ms=13, repeated=1) == [13, "lost"]
    assert reserved.dump() == before


@pytest.mark.parametrize(
    ("now_ms", "is_left"), [(12 + FIVE_MINUTES - 1, True), (12 + FIVE_MINUTES, False)]
)
def test_released_record_is_deleted_after_five_minutes(
    reserved: Tenant, now_ms: int, is_left: bool
) -> None:
    """A release of any key deletes what may be forgotten, to the millisecond."""
    reserved.run("idempotency/release", ("r1", A, ""), now_ms=12)

    reserved.run("idempotency/release", ("r2", A, ""), now_ms=now_ms)

    assert ("idempotency:docs" in reserved.dump()) == is_left


def test_items_are_released_one_after_the_other(reserved: Tenant) -> None:
    """The later item of a call sees the earlier; refused ones between good ones harm nobody."""
    items = ("r1", B, ""), ("r1", A, ""), ("r2", A, ""), ("r1", A, "f")

    reply = reserved.run("idempotency/release", *items, now_ms=12)

    assert reply == [12, "lost", "released", "missing", "released"]
