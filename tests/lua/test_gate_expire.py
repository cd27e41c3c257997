"""gate/expire: what parks and whose lease has ended is written down as unknown."""

from __future__ import annotations

import pytest
from lua.commands import A, Tenant, intent, intent_line


@pytest.mark.parametrize(("now_ms", "is_over"), [(19, False), (20, True), (21, True)])
def test_expire_writes_what_parks_as_unknown(tenant: Tenant, now_ms: int, is_over: bool) -> None:
    """At its lease end, to the millisecond, an intent goes to the list that is worked through."""
    tenant.prepare(intent("i1", run="r"))
    before = tenant.dump()

    assert tenant.run("gate/expire", now_ms=now_ms) == [now_ms, 0, int(is_over)]

    line = intent_line("unknown", "parked", updated_at=now_ms, revision=2, ask_at=20, run="r")
    assert tenant.changes(before) == (
        {
            "gate:expiring": {"i1": None},
            "gate:runs": {"r:0000000000000010:i1": None, f"r:{now_ms:016}:i1": 0},
            "gate:state": {"i1": line},
            "gate:unknown": {"i1": 20},
            "gate:updated": {"i1": now_ms},
        }
        if is_over
        else {}
    )


def test_expire_goes_by_the_extended_end(tenant: Tenant) -> None:
    """A lease that was extended is not over at its first end."""
    tenant.prepare("i1")
    tenant.run("gate/extend", ("i1", A, 30), now_ms=15)

    assert tenant.run("gate/expire", now_ms=44) == [44, 0, 0]
    assert tenant.run("gate/expire", now_ms=45) == [45, 0, 1]
    assert tenant.dump()["gate:unknown"] == {"i1": 45}


def test_expire_leaves_what_reclaims_and_what_has_ended(tenant: Tenant) -> None:
    """Only a sender that was not heard of becomes unknown, and only where nobody else may try."""
    tenant.prepare(intent("i1", on_expiry="reclaim"), "i2", "i3", "i4")
    items = (("i2", A, "succeeded", "{}"), ("i3", A, "left", "{}"), ("i4", A, "failed", "{}"))
    tenant.run("gate/complete", *items, now_ms=11)
    before = tenant.dump()

    assert tenant.run("gate/expire", now_ms=1_000) == [1_000, 0, 0]
    assert tenant.dump() == before


@pytest.mark.parametrize(
    ("limit", "calls"), [(1, [1, 1, 1, 0]), (2, [2, 1]), (3, [3, 0]), (250, [3])]
)
def test_expire_goes_on_where_it_ended(tenant: Tenant, limit: int, calls: list[int]) -> None:
    """The longest over come first; 1 says that there may be more."""
    tenant.prepare(*(intent(f"i{i}", lease_ms=30 - i) for i in range(3)))

    found = []
    while not found or found[-1][1]:
        found.append(tenant.run("gate/expire", now_ms=50, limit=limit))

    assert [reply[2] for reply in found] == calls
    assert tenant.dump()["gate:unknown"] == {"i2": 38, "i1": 39, "i0": 40}


def test_expire_writes_250_at_most(tenant: Tenant) -> None:
    """The largest call."""
    tenant.prepare(*(f"i{i:03}" for i in range(260)))

    assert tenant.run("gate/expire", now_ms=50, limit=250) == [50, 1, 250]
    assert tenant.run("gate/expire", now_ms=50, limit=250) == [50, 0, 10]


@pytest.mark.parametrize("line", [None, "x", intent_line("sent", "succeeded")])
def test_expire_drops_entries_that_do_not_belong(tenant: Tenant, line: str | None) -> None:
    """An entry without a claimed intent leaves the list, so that it holds nobody up."""
    tenant.is_damaged = True
    tenant.prepare("i2")
    tenant.raw.zadd(tenant.keys.gate_expiring, {"i1": 5})
    if line:
        tenant.raw.hset(tenant.keys.gate_state, "i1", line)

    assert tenant.run("gate/expire", now_ms=30) == [30, 0, 1]

    assert "gate:expiring" not in tenant.dump()
    assert tenant.intent("i1") == (line or "")
