"""idempotency/reserve: the first use of a key, or what is known of the first use."""

from __future__ import annotations

from typing import Any

import pytest
from lua.commands import A, B, Item, Tenant

DAY = 86_400_000
NEVER = 2**53 - 1


def reservation(
    id: str = "r1",
    token: str = A,
    fingerprint: str = "f",
    *,
    lease_ms: str | int = "",
    expires_at: str | int = "",
    on_expiry: str = "reclaim",
    text: str = "{}",
) -> Item:
    return (id, token, fingerprint, lease_ms, expires_at, on_expiry, text)


def reserve(tenant: Tenant, *items: Item, now_ms: int) -> list[Any]:
    return tenant.run("idempotency/reserve", *items, now_ms=now_ms)


def test_first_use_reserves(tenant: Tenant) -> None:
    """A new key is reserved: the record names token, times, fingerprint and the reservation."""
    reply = reserve(tenant, reservation(text='{"key":"k"}'), now_ms=10)

    record = f'reserved {A} 10 10 0 0 0 reclaim ~\nf\n{{"key":"k"}}\n'
    assert reply == [10, ["reserved", record]]
    assert tenant.dump() == {
        "idempotency:docs": {"r1": record},
        "idempotency:due": {"r1": NEVER},
    }


def test_reserve_by_the_token_that_has_it_changes_nothing(tenant: Tenant) -> None:
    """A repeat by the reservation's own token is reserved again."""
    reserve(tenant, reservation(), now_ms=10)
    before = tenant.dump()

    reply = reserve(tenant, reservation(), now_ms=11)

    assert reply == [11, ["reserved", before["idempotency:docs"]["r1"]]]
    assert tenant.dump() == before


def test_second_use_with_the_same_fingerprint_is_a_duplicate(tenant: Tenant) -> None:
    """The same request by another token is a duplicate; only last_seen changes."""
    reserve(tenant, reservation(), now_ms=10)
    before = tenant.dump()

    reply = reserve(tenant, reservation(token=B), now_ms=11)

    record = f"reserved {A} 10 11 0 0 0 reclaim ~\nf\n{{}}\n"
    assert reply == [11, ["duplicate", record]]
    assert tenant.changes(before) == {"idempotency:docs": {"r1": record}}


def test_duplicate_of_a_completed_key_gets_the_outcome(tenant: Tenant) -> None:
    """What the first use led to is told to every duplicate."""
    reserve(tenant, reservation(), now_ms=10)
    tenant.run("idempotency/complete", ("r1", A, 1_000, '{"ok":1}'), now_ms=11)

    reply = reserve(tenant, reservation(token=B), now_ms=12)

    record = f'completed {A} 10 12 0 1011 0 reclaim 11\nf\n{{}}\n{{"ok":1}}'
    assert reply == [12, ["duplicate", record]]


def test_second_use_with_another_fingerprint_is_a_conflict(tenant: Tenant) -> None:
    """Another request under the same key is a conflict, counted each time, noted once."""
    reserve(tenant, reservation(), now_ms=10)

    replies = [
        reserve(tenant, reservation(token=B, fingerprint=word), now_ms=now_ms)[1]
        for word, now_ms in (("g", 11), ("h", 12), ("g", 13))
    ]

    assert replies == [
        ["conflict", f"conflicted {A} 10 11 0 0 1 reclaim ~\nf g\n{{}}\n"],
        ["conflict", f"conflicted {A} 10 12 0 0 2 reclaim ~\nf g h\n{{}}\n"],
        ["conflict", f"conflicted {A} 10 13 0 0 3 reclaim ~\nf g h\n{{}}\n"],
    ]


def test_conflict_keeps_the_outcome(tenant: Tenant) -> None:
    """A completed key that is used with another fingerprint is conflicted, its outcome kept."""
    reserve(tenant, reservation(), now_ms=10)
    tenant.run("idempotency/complete", ("r1", A, 1_000, "{}"), now_ms=11)

    reply = reserve(tenant, reservation(token=B, fingerprint="g"), now_ms=12)

    assert reply == [12, ["conflict", f"conflicted {A} 10 12 0 1011 1 reclaim 11\nf g\n{{}}\n{{}}"]]


def test_first_fingerprint_stays_good_after_a_conflict(tenant: Tenant) -> None:
    """The first request is still a duplicate, and still reserved to its own token."""
    reserve(tenant, reservation(), reservation(token=B, fingerprint="g"), now_ms=10)

    reply = reserve(tenant, reservation(token=B), reservation(), now_ms=11)

    assert [item[0] for item in reply[1:]] == ["duplicate", "reserved"]


def test_own_token_with_another_fingerprint_is_a_conflict(tenant: Tenant) -> None:
    """A token does not excuse another request."""
    reserve(tenant, reservation(), now_ms=10)

    assert reserve(tenant, reservation(fingerprint="g"), now_ms=11)[1][0] == "conflict"


def test_conflicting_fingerprints_are_kept_up_to_32(tenant: Tenant) -> None:
    """A record notes 32 fingerprints that conflicted; more are counted only."""
    reserve(tenant, reservation(), now_ms=10)

    reserve(tenant, *(reservation(token=B, fingerprint=f"g{i}") for i in range(40)), now_ms=11)

    words, fingerprints, *_ = tenant.dump()["idempotency:docs"]["r1"].split("\n")
    assert fingerprints.split() == ["f", *(f"g{i}" for i in range(32))]
    assert words.split()[6] == "40"


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("now_ms", "word"), [(99, "duplicate"), (100, "reserved")])
@pytest.mark.parametrize("status", ["reserved", "completed", "conflicted"])
def test_key_is_free_from_its_end_on(tenant: Tenant, status: str, now_ms: int, word: str) -> None:
    """At expires_at itself the key is free whatever its status, and begins anew."""
    reserve(tenant, reservation(expires_at=100), now_ms=10)
    if status == "completed":
        tenant.run("idempotency/complete", ("r1", A, 1_000, "{}"), now_ms=11)
    if status == "conflicted":
        reserve(tenant, reservation(token=B, fingerprint="g"), now_ms=11)

    reply = reserve(tenant, reservation(token=B), now_ms=now_ms)

    assert reply[1][0] == word
    if word == "reserved":
        assert reply[1][1] == f"reserved {B} 100 100 0 0 0 reclaim ~\nf\n{{}}\n"
        assert tenant.dump()["idempotency:due"] == {"r1": NEVER}


@pytest.mark.parametrize(("now_ms", "word"), [(29, "duplicate"), (30, "reserved")])
def test_key_is_free_from_the_first_attempts_lease_end_on(
    tenant: Tenant, now_ms: int, word: str
) -> None:
    """With reclaim, at the end of the first attempt's lease itself the key is free."""
    reserve(tenant, reservation(lease_ms=20), now_ms=10)

    assert reserve(tenant, reservation(token=B), now_ms=now_ms)[1][0] == word


def test_key_that_parks_stays_taken(tenant: Tenant) -> None:
    """With park a first attempt that vanished keeps the key for ever."""
    reserve(tenant, reservation(lease_ms=20, on_expiry="park"), now_ms=10)

    assert reserve(tenant, reservation(token=B), now_ms=DAY)[1][0] == "duplicate"
    assert tenant.dump()["idempotency:due"] == {"r1": NEVER}


def test_lease_end_of_a_completed_key_frees_nothing(tenant: Tenant) -> None:
    """Once there is an outcome, the end of the first attempt's lease does not count."""
    reserve(tenant, reservation(lease_ms=20), now_ms=10)
    tenant.run("idempotency/complete", ("r1", A, 1_000, "{}"), now_ms=11)

    assert reserve(tenant, reservation(token=B), now_ms=30)[1][0] == "duplicate"


def test_conflicted_attempt_may_be_reclaimed(tenant: Tenant) -> None:
    """A conflict does not keep a vanished first attempt's key."""
    reserve(tenant, reservation(lease_ms=20), reservation(token=B, fingerprint="g"), now_ms=10)

    assert reserve(tenant, reservation(token=B), now_ms=30)[1][0] == "reserved"


@pytest.mark.parametrize(
    ("words", "due"),
    [
        ({}, NEVER),
        ({"lease_ms": 20}, 30 + DAY),
        ({"lease_ms": 20, "on_expiry": "park"}, NEVER),
        ({"expires_at": 100}, 100),
        ({"expires_at": 100, "lease_ms": 20}, 100),
        ({"expires_at": 100, "lease_ms": 20, "on_expiry": "park"}, 100),
        ({"expires_at": 5}, 5),
    ],
)
def test_record_may_be_forgotten(tenant: Tenant, words: dict[str, Any], due: int) -> None:
    """At the key's own end; else a day after the lease end if it can be reclaimed; else never."""
    reserve(tenant, reservation(**words), now_ms=10)

    assert tenant.dump()["idempotency:due"] == {"r1": due}


def test_end_in_the_past_holds_nothing(tenant: Tenant) -> None:
    """A key whose end has come already is reserved, and free for the next."""
    for token in (A, B):
        assert (
            reserve(tenant, reservation(token=token, expires_at=5), now_ms=10)[1][0] == "reserved"
        )


# --- released, many, forgotten --------------------------------------------------------------------


def test_released_key_is_free_for_others(tenant: Tenant) -> None:
    """After a release another token reserves the key anew."""
    reserve(tenant, reservation(), now_ms=10)
    tenant.run("idempotency/release", ("r1", A, ""), now_ms=11)

    assert reserve(tenant, reservation(token=B, fingerprint="g"), now_ms=12)[1][0] == "reserved"


def test_late_request_of_a_released_reservation_takes_nothing(tenant: Tenant) -> None:
    """The token that released the reservation is spent."""
    reserve(tenant, reservation(), now_ms=10)
    tenant.run("idempotency/release", ("r1", A, ""), now_ms=11)
    before = tenant.dump()

    assert reserve(tenant, reservation(), now_ms=12) == [12, "spent"]
    assert tenant.dump() == before


@pytest.mark.parametrize("record", ["", "reserved", f"reserved {A} 10 10 0 0 0 reclaim ~\nf\n{{}}"])
def test_damaged_record_is_not_free(tenant: Tenant, record: str) -> None:
    """A record that cannot be read lets nobody in; its neighbours are reserved."""
    tenant.is_damaged = True
    tenant.raw.hset(tenant.keys.idempotency_docs, "r1", record)

    reply = reserve(tenant, reservation(), reservation("r2"), now_ms=10)

    assert reply[1] == "damaged"
    assert reply[2][0] == "reserved"
    assert tenant.dump()["idempotency:docs"]["r1"] == record


def test_items_are_decided_one_after_the_other(tenant: Tenant) -> None:
    """The later item of a call sees what the earlier did to its key."""
    reply = reserve(
        tenant,
        *(reservation(), reservation("r2", B), reservation(token=B)),
        reservation(token=B, fingerprint="g"),
        now_ms=10,
    )

    assert [item[0] for item in reply[1:]] == ["reserved", "reserved", "duplicate", "conflict"]
    assert sorted(tenant.dump()["idempotency:docs"]) == ["r1", "r2"]


@pytest.mark.parametrize(("now_ms", "left"), [(99, ["r1", "r2"]), (100, ["r2"])])
def test_reserve_deletes_records_that_are_over(
    tenant: Tenant, now_ms: int, left: list[str]
) -> None:
    """A reserve of another key deletes records that may be forgotten, to the millisecond."""
    reserve(tenant, reservation(expires_at=100), now_ms=10)

    reserve(tenant, reservation("r2"), now_ms=now_ms)

    assert sorted(tenant.dump()["idempotency:docs"]) == left


def test_reserve_deletes_2n_plus_10_records(tenant: Tenant) -> None:
    """A call of n items deletes up to 2n + 10 records."""
    reserve(tenant, *(reservation(f"r{i:02}", expires_at=100) for i in range(30)), now_ms=10)

    reserve(tenant, reservation("s1"), reservation("s2"), now_ms=100)

    assert len(tenant.dump()["idempotency:docs"]) == 30 + 2 - 14
