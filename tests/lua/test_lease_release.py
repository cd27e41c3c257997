"""lease/release: the holder gives its name back before the end."""

from __future__ import annotations

import pytest
from lua.commands import A, B, Tenant

FIVE_MINUTES = 300_000
MISS = ["", "~", A[:-1], A[1:], A + "a", f"{A} 10000", B, A + "\n"]


@pytest.fixture
def held(tenant: Tenant) -> Tenant:
    """n1 and n2, held by A from 10 until 30."""
    tenant.run("lease/acquire", ("n1", A, 20, "a"), ("n2", A, 20, "a"), now_ms=10)
    return tenant


def test_release_frees_a_name(held: Tenant) -> None:
    """A released lease ends now and is remembered as released."""
    before = held.dump()

    assert held.run("lease/release", ("n1", A), now_ms=12) == [12, "released"]
    assert held.changes(before) == {
        "lease:docs": {"n1": f"released {A} 10000 10 12 a"},
        "lease:due": {"n1": 12},
    }


@pytest.mark.parametrize(("now_ms", "answer"), [(29, "released"), (30, "lost"), (31, "lost")])
def test_release_after_the_end_is_lost(held: Tenant, now_ms: int, answer: str) -> None:
    """From the lease's end on there is nothing to give back: the holder is told that it lost it."""
    assert held.run("lease/release", ("n1", A), now_ms=now_ms) == [now_ms, answer]


@pytest.mark.parametrize("token", MISS)
@pytest.mark.parametrize("repeated", [0, 1])
def test_release_needs_exactly_the_token(held: Tenant, token: str, repeated: int) -> None:
    """Anything but the very token is lost and writes nothing."""
    before = held.dump()

    assert held.run("lease/release", ("n1", token), now_ms=12, repeated=repeated) == [12, "lost"]
    assert held.dump() == before


@pytest.mark.parametrize("repeated", [0, 1])
@pytest.mark.parametrize("now_ms", [13, 12 + FIVE_MINUTES - 1])
def test_second_release_answers_as_the_first(held: Tenant, now_ms: int, repeated: int) -> None:
    """While it is remembered, a release by the same token is released again."""
    held.run("lease/release", ("n1", A), now_ms=12)
    before = held.dump()

    reply = held.run("lease/release", ("n1", A), now_ms=now_ms, repeated=repeated)

    assert reply == [now_ms, "released"]
    assert held.dump() == before


@pytest.mark.parametrize(("repeated", "answer"), [(0, "lost"), (1, "forgotten")])
def test_release_of_an_unknown_name(tenant: Tenant, repeated: int, answer: str) -> None:
    """Of a name of which nothing is known a repeat is forgotten, a first request lost."""
    reply = tenant.run("lease/release", ("n1", A), now_ms=12, repeated=repeated)

    assert reply == [12, answer]
    assert tenant.dump() == {}


def test_repeated_release_after_a_newer_lease_is_lost(held: Tenant) -> None:
    """Once another token has the name, the first one is lost."""
    held.run("lease/release", ("n1", A), now_ms=12)
    held.run("lease/acquire", ("n1", B, 20, "b"), now_ms=13)
    before = held.dump()

    assert held.run("lease/release", ("n1", A), now_ms=14, repeated=1) == [14, "lost"]
    assert held.dump() == before


@pytest.mark.parametrize(
    ("now_ms", "is_left"), [(FIVE_MINUTES + 11, True), (FIVE_MINUTES + 12, False)]
)
def test_released_lease_is_deleted_after_five_minutes(
    held: Tenant, now_ms: int, is_left: bool
) -> None:
    """A release of any name deletes what ended five minutes ago, to the millisecond."""
    held.run("lease/release", ("n1", A), now_ms=12)

    held.run("lease/release", ("n9", A), now_ms=now_ms)

    assert ("n1" in held.dump()["lease:docs"]) == is_left


def test_items_are_released_one_after_the_other(held: Tenant) -> None:
    """A name given twice is released once; refused ones between good ones harm nobody."""
    reply = held.run("lease/release", ("n1", A), ("n2", B), ("n1", A), ("n2", A), now_ms=12)

    assert reply == [12, "released", "lost", "released", "released"]
