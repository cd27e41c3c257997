"""tenant/barrier: it leaves nothing behind. What it does to WAIT: tests/integration/test_durability.py."""

from __future__ import annotations

from lua.commands import Tenant


def test_barrier_leaves_nothing(tenant: Tenant) -> None:
    """It answers the time, and the tenant is as it was, also the second time."""
    tenant.enqueue("m1", now_ms=1)
    before = tenant.dump()

    assert tenant.run("tenant/barrier", now_ms=10) == [10]
    assert tenant.run("tenant/barrier", now_ms=20) == [20]

    assert tenant.dump() == before


def test_barrier_clears_what_was_left_there(tenant: Tenant) -> None:
    """Whatever a script that was cut off left is gone with the next one."""
    tenant.raw.hset(tenant.keys.tenant_barrier, "at", "")

    tenant.run("tenant/barrier", now_ms=10)

    assert tenant.dump() == {}


def test_barrier_refuses_a_time_that_is_none(tenant: Tenant) -> None:
    """As every command: nothing is written."""
    assert "LK_ARGUMENT now_ms" in tenant.refusal("tenant/barrier", now_ms="soon")
