"""tenant/touch: the registry knows each tenant, its last use, and the clock of its data."""

from __future__ import annotations

import pytest
from lua.commands import Tenant


def test_touch_notes_tenants(tenant: Tenant) -> None:
    """A tenant is listed with the instant of its last touch and its first touch's clock."""
    reply = tenant.run("tenant/touch", ("o.w",), ("o.w.d",), now_ms=10, mark="server")

    assert reply == [10, "noted", "noted"]
    assert tenant.dump() == {
        "tenant:clocks": {"o.w": "server", "o.w.d": "server"},
        "tenant:names": {"o.w": 0, "o.w.d": 0},
        "tenant:seen": {"o.w": 10, "o.w.d": 10},
    }


@pytest.mark.parametrize(("first", "second"), [("server", "caller"), ("caller", "server")])
def test_touch_under_the_other_clock_writes_nothing(
    tenant: Tenant, first: str, second: str
) -> None:
    """A tenant whose data is kept on the other clock is told so; its neighbours are noted."""
    tenant.run("tenant/touch", ("o.w",), now_ms=10, mark=first)
    before = tenant.dump()

    reply = tenant.run("tenant/touch", ("o.w",), ("o.x",), now_ms=20, mark=second)

    assert reply == [20, "other_clock", "noted"]
    assert tenant.changes(before) == {
        "tenant:clocks": {"o.x": second},
        "tenant:names": {"o.x": 0},
        "tenant:seen": {"o.x": 20},
    }


def test_second_touch_moves_the_last_use(tenant: Tenant) -> None:
    """A touch under the same clock notes the instant, whichever way the clock went."""
    for now_ms in (10, 30, 20):
        tenant.run("tenant/touch", ("o.w",), now_ms=now_ms)

    assert tenant.dump()["tenant:seen"] == {"o.w": 20}
