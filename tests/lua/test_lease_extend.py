"""lease/extend: the holder moves the end of its lease, never backwards, and not after it."""

from __future__ import annotations

import pytest
from lua.commands import A, B, Tenant

MISS = ["", "~", A[:-1], A[1:], A + "a", f"{A} 10000", B, A + "\n"]


@pytest.fixture
def held(tenant: Tenant) -> Tenant:
    """n1 and n2, held by A from 10 until 30."""
    tenant.run("lease/acquire", ("n1", A, 20, "a"), ("n2", A, 20, "a"), now_ms=10)
    return tenant


def test_extend_moves_the_end(held: Tenant) -> None:
    """An extended lease ends ttl_ms after now; fence and begin stay."""
    before = held.dump()

    reply = held.run("lease/extend", ("n1", A, 30), now_ms=15)

    assert reply == [15, ["extended", "10000", 10, 45, "a"]]
    assert held.changes(before) == {
        "lease:docs": {"n1": f"held {A} 10000 10 45 a"},
        "lease:due": {"n1": 45},
    }


@pytest.mark.parametrize(("ttl_ms", "end"), [(1, 30), (15, 30), (16, 31)])
def test_end_never_moves_back(held: Tenant, ttl_ms: int, end: int) -> None:
    """An end that would be earlier than before stays."""
    assert held.run("lease/extend", ("n1", A, ttl_ms), now_ms=15)[1][3] == end


@pytest.mark.parametrize(("now_ms", "is_lost"), [(29, False), (30, True), (31, True)])
def test_extend_is_refused_from_the_end_on(held: Tenant, now_ms: int, is_lost: bool) -> None:
    """At the lease's end itself the name may be another's: extend answers lost."""
    before = held.dump()

    reply = held.run("lease/extend", ("n1", A, 20), now_ms=now_ms)

    assert (reply[1] == "lost") == is_lost
    assert (held.dump() == before) == is_lost


@pytest.mark.parametrize("token", MISS)
def test_extend_needs_exactly_the_token(held: Tenant, token: str) -> None:
    """Anything but the very token is lost and writes nothing."""
    before = held.dump()

    assert held.run("lease/extend", ("n1", token, 30), now_ms=15) == [15, "lost"]
    assert held.dump() == before


def test_extend_of_what_is_not_held_is_lost(held: Tenant) -> None:
    """A released or unknown name is lost."""
    held.run("lease/release", ("n1", A), now_ms=12)
    before = held.dump()

    assert held.run("lease/extend", ("n1", A, 30), ("n3", A, 30), now_ms=13) == [13, "lost", "lost"]
    assert held.dump() == before


def test_two_items_for_one_name_give_the_later_end(held: Tenant) -> None:
    """Items are decided one after the other, refused ones between good ones."""
    reply = held.run("lease/extend", ("n1", A, 30), ("n3", A, 30), ("n1", A, 20), now_ms=15)

    assert [item[3] if isinstance(item, list) else item for item in reply[1:]] == [45, "lost", 45]
    assert held.dump()["lease:due"] == {"n1": 45, "n2": 30}


@pytest.mark.parametrize("ttl_ms", [1, 43_200_000])
def test_extend_takes_1_ms_to_12_h(held: Tenant, ttl_ms: int) -> None:
    """The shortest and the longest lease are good; the values next to them are refused."""
    assert held.run("lease/extend", ("n1", A, ttl_ms), now_ms=15)[1][0] == "extended"
    for wrong in (0, 43_200_001):
        assert held.refusal("lease/extend", ("n1", A, wrong), now_ms=15) == "LK_ARGUMENT ttl_ms"
