"""lease/list: pages of the leases held now, by name."""

from __future__ import annotations

from typing import Any

import pytest
from lua.commands import A, Tenant


def names(reply: list[Any]) -> list[str]:
    return [lease[0] for lease in reply[3:]]


@pytest.fixture
def held(tenant: Tenant) -> Tenant:
    """a1, a2, b1 held until 30, a3 until 20, b0 released at 12."""
    items = [(name, A, 20, "o") for name in ("b1", "a2", "a1", "b0")]
    tenant.run("lease/acquire", *items, ("a3", A, 10, "o"), now_ms=10)
    tenant.run("lease/release", ("b0", A), now_ms=12)
    return tenant


def test_list_gives_leases_in_the_order_of_their_names(held: Tenant) -> None:
    """Held leases come by name with their fence, begin, end and owner; reading writes nothing."""
    before = held.dump()

    reply = held.run("lease/list", now_ms=15)

    assert reply == [
        *(15, 0, "b1"),
        ["a1", "10000", 10, 30, "o"],
        ["a2", "10000", 10, 30, "o"],
        ["a3", "10000", 10, 20, "o"],
        ["b1", "10000", 10, 30, "o"],
    ]
    assert held.dump() == before


def test_list_of_nothing(tenant: Tenant) -> None:
    """Without leases there is one empty page."""
    assert tenant.run("lease/list", now_ms=15) == [15, 0, ""]


@pytest.mark.parametrize(
    ("now_ms", "expected"), [(19, ["a1", "a2", "a3", "b1"]), (20, ["a1", "a2", "b1"]), (30, [])]
)
def test_list_passes_over_ended_leases(held: Tenant, now_ms: int, expected: list[str]) -> None:
    """A lease is listed up to its end."""
    assert names(held.run("lease/list", now_ms=now_ms)) == expected


@pytest.mark.parametrize(
    ("prefix", "expected"),
    [
        ("", ["a1", "a2", "a3", "b1"]),
        ("a", ["a1", "a2", "a3"]),
        ("a2", ["a2"]),
        ("c", []),
        ("[", []),
    ],
)
def test_list_by_prefix(held: Tenant, prefix: str, expected: list[str]) -> None:
    """Only names that begin with the prefix are listed."""
    assert names(held.run("lease/list", now_ms=15, prefix=prefix)) == expected


@pytest.mark.parametrize(
    ("limit", "after", "more", "expected"),
    [
        (2, "", 1, ["a1", "a2"]),
        (2, "a2", 0, ["a3", "b1"]),
        (2, "a1", 1, ["a2", "a3"]),
        (3, "a1", 0, ["a2", "a3", "b1"]),
        (1, "b1", 0, []),
        (1, "a22", 1, ["a3"]),
    ],
)
def test_list_comes_in_pages(
    held: Tenant, limit: int, after: str, more: int, expected: list[str]
) -> None:
    """A page goes on behind the last name looked at, whether that one is still there or not."""
    reply = held.run("lease/list", now_ms=15, limit=limit, after=after)

    assert (reply[1], names(reply)) == (more, expected)


def test_page_looks_at_no_more_than_1000_names(tenant: Tenant) -> None:
    """A page of ended leases is empty and goes on."""
    tenant.run("lease/acquire", *((f"n{i:04}", A, 5, "o") for i in range(1_000)), now_ms=10)
    tenant.run("lease/acquire", ("x", A, 50, "o"), now_ms=10)

    first = tenant.run("lease/list", now_ms=20)
    second = tenant.run("lease/list", now_ms=20, after=first[2])

    assert first == [20, 1, "n0999"]
    assert (second[1], names(second)) == (0, ["x"])
