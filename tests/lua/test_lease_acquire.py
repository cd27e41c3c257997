"""lease/acquire: a name has one holder at a time, and each grant a higher fence."""

from __future__ import annotations

import pytest
from lua.commands import A, B, C, Tenant

FIVE_MINUTES = 300_000


def test_acquire_of_a_free_name(tenant: Tenant) -> None:
    """A free name is held from now for ttl_ms, under a fence."""
    reply = tenant.run("lease/acquire", ("n1", A, 20, "owner 1"), now_ms=10)

    assert reply == [10, ["acquired", "10000", 10, 30]]
    assert tenant.dump() == {
        "fence": "10000",
        "lease:docs": {"n1": f"held {A} 10000 10 30 owner 1"},
        "lease:due": {"n1": 30},
        "lease:names": {"n1": 0},
    }


def test_acquire_of_a_held_name_is_busy(tenant: Tenant) -> None:
    """Another token is told who holds the name until when, and nothing is written."""
    tenant.run("lease/acquire", ("n1", A, 20, "owner 1"), now_ms=10)
    before = tenant.dump()

    reply = tenant.run("lease/acquire", ("n1", B, 20, "owner 2"), now_ms=11)

    assert reply == [11, ["busy", "10000", 10, 30, "owner 1"]]
    assert tenant.dump() == before


def test_acquire_by_the_holder_is_the_first_answer_again(tenant: Tenant) -> None:
    """A repeat by the token that holds the name changes nothing, not even the end."""
    tenant.run("lease/acquire", ("n1", A, 20, "owner 1"), now_ms=10)
    before = tenant.dump()

    reply = tenant.run("lease/acquire", ("n1", A, 50, "owner 1"), now_ms=12)

    assert reply == [12, ["acquired", "10000", 10, 30]]
    assert tenant.dump() == before


@pytest.mark.parametrize(("now_ms", "word"), [(29, "busy"), (30, "acquired"), (31, "acquired")])
def test_name_is_free_from_the_lease_end_on(tenant: Tenant, now_ms: int, word: str) -> None:
    """Another may acquire the name at the lease's end itself, not a millisecond before."""
    tenant.run("lease/acquire", ("n1", A, 20, "a"), now_ms=10)

    reply = tenant.run("lease/acquire", ("n1", B, 20, "b"), now_ms=now_ms)

    assert reply[1][0] == word


def test_same_token_after_its_end_is_a_new_grant(tenant: Tenant) -> None:
    """A token whose lease ended gets a new lease under a higher fence."""
    tenant.run("lease/acquire", ("n1", A, 20, "a"), now_ms=10)

    assert tenant.run("lease/acquire", ("n1", A, 20, "a"), now_ms=30) == [
        30,
        ["acquired", "30000", 30, 50],
    ]


def test_released_name_is_free(tenant: Tenant) -> None:
    """A released name may be acquired at once by another token."""
    tenant.run("lease/acquire", ("n1", A, 20, "a"), now_ms=10)
    tenant.run("lease/release", ("n1", A), now_ms=12)

    reply = tenant.run("lease/acquire", ("n1", B, 20, "b"), now_ms=12)

    assert reply == [12, ["acquired", "12000", 12, 32]]


def test_late_request_of_a_released_lease_takes_nothing(tenant: Tenant) -> None:
    """The token that gave the name back is spent, as long as that is remembered."""
    tenant.run("lease/acquire", ("n1", A, 20, "a"), now_ms=10)
    tenant.run("lease/release", ("n1", A), now_ms=12)
    before = tenant.dump()

    assert tenant.run("lease/acquire", ("n1", A, 20, "a"), now_ms=13) == [13, "spent"]
    assert tenant.dump() == before


def test_acquire_takes_many_names_under_one_fence(tenant: Tenant) -> None:
    """Items are decided one after the other; all that a call grants has one fence."""
    reply = tenant.run(
        "lease/acquire",
        *(("n1", A, 20, "a"), ("n2", B, 5, "b"), ("n1", C, 20, "c"), ("n1", A, 9, "a")),
        now_ms=10,
    )

    assert reply == [
        10,
        ["acquired", "10000", 10, 30],
        ["acquired", "10000", 10, 15],
        ["busy", "10000", 10, 30, "a"],
        ["acquired", "10000", 10, 30],
    ]


def test_fence_rises_also_when_the_clock_steps_back(tenant: Tenant) -> None:
    """Each grant has a higher fence than the one before, of rows and of names alike."""
    tenant.enqueue("m1")
    fences = [tenant.claim(A, now_ms=100)[4][1]]

    for token, now_ms in ((A, 50), (B, 200), (C, 100)):
        reply = tenant.run("lease/acquire", (f"n{now_ms}", token, 20, "a"), now_ms=now_ms)
        fences.append(reply[1][1])

    assert fences == ["100000", "100001", "200000", "200001"]


@pytest.mark.parametrize(
    ("now_ms", "left"),
    [(29 + FIVE_MINUTES, ["n1", "n2", "n3"]), (30 + FIVE_MINUTES, ["n2", "n3"])],
)
def test_ended_lease_is_deleted_after_five_minutes(
    tenant: Tenant, now_ms: int, left: list[str]
) -> None:
    """An acquire of any name deletes what ended five minutes ago, to the millisecond."""
    tenant.run("lease/acquire", ("n1", A, 20, "a"), ("n2", A, 21, "a"), now_ms=10)

    tenant.run("lease/acquire", ("n3", B, 20, "b"), now_ms=now_ms)

    assert list(tenant.dump()["lease:docs"]) == left


def test_name_that_is_acquired_is_not_deleted(tenant: Tenant) -> None:
    """A long-ended name that the call itself acquires stays."""
    tenant.run("lease/acquire", ("n1", A, 20, "a"), now_ms=10)

    tenant.run("lease/acquire", ("n1", B, 20, "b"), now_ms=1_000_000)

    assert list(tenant.dump()["lease:docs"]) == ["n1"]


@pytest.mark.parametrize("line", ["", "held", f"held {A} soon 10 30 a"])
def test_damaged_lease_is_free(tenant: Tenant, line: str) -> None:
    """A lease that cannot be read holds nobody off: it would be for ever."""
    tenant.raw.hset(tenant.keys.lease_docs, "n1", line)

    assert tenant.run("lease/get", ("n1",), now_ms=10) == [10, "free"]
    assert tenant.run("lease/extend", ("n1", A, 20), now_ms=10) == [10, "lost"]
    assert tenant.run("lease/release", ("n1", A), now_ms=10, repeated=1) == [10, "lost"]
    assert tenant.run("lease/acquire", ("n1", B, 20, "b"), now_ms=10)[1][0] == "acquired"


def test_acquire_deletes_2n_plus_10_leases(tenant: Tenant) -> None:
    """A call of n items deletes up to 2n + 10 ended leases."""
    tenant.run("lease/acquire", *((f"n{i:02}", A, 20, "a") for i in range(30)), now_ms=10)

    tenant.run("lease/acquire", ("x", B, 20, "b"), ("y", B, 20, "b"), now_ms=1_000_000)

    assert len(tenant.dump()["lease:docs"]) == 30 + 2 - 14


@pytest.mark.parametrize(
    "owner", ["", "two words\nnew line", "nul\0", "é\udcff", B, "held x 1 2 3"]
)
def test_owner_is_free_text(tenant: Tenant, owner: str) -> None:
    """An owner of any bytes is stored as it is and confuses no later command."""
    tenant.run("lease/acquire", ("n1", A, 20, owner), now_ms=10)

    assert tenant.run("lease/get", ("n1",), now_ms=11) == [11, ["held", "10000", 10, 30, owner]]
    assert tenant.run("lease/release", ("n1", A), now_ms=12) == [12, "released"]
    assert tenant.dump()["lease:docs"] == {"n1": f"released {A} 10000 10 12 {owner}"}


@pytest.mark.parametrize("name", ["", " ", "a b\nc", "nul\0", "é\udcff", A])
def test_name_is_free_text(tenant: Tenant, name: str) -> None:
    """A name of any bytes is a field like any other."""
    tenant.run("lease/acquire", (name, A, 20, "a"), now_ms=10)

    assert tenant.run("lease/get", (name,), now_ms=11) == [11, ["held", "10000", 10, 30, "a"]]


@pytest.mark.parametrize("ttl_ms", [1, 43_200_000])
def test_acquire_takes_1_ms_to_12_h(tenant: Tenant, ttl_ms: int) -> None:
    """The shortest and the longest lease are good; the values next to them are refused."""
    reply = tenant.run("lease/acquire", ("n1", A, ttl_ms, "a"), now_ms=10)

    assert reply[1][3] == 10 + ttl_ms
    for wrong in (0, 43_200_001):
        assert tenant.refusal("lease/acquire", ("n2", A, wrong, "a"), now_ms=10) == (
            "LK_ARGUMENT item"
        )
