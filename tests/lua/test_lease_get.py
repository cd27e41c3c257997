"""lease/get: who holds names now."""

from __future__ import annotations

import pytest
from lua.commands import A, Tenant


@pytest.mark.parametrize(("now_ms", "is_held"), [(29, True), (30, False)])
def test_get_says_who_holds_a_name(tenant: Tenant, now_ms: int, is_held: bool) -> None:
    """A name is held up to its lease's end, free from it on; reading writes nothing."""
    tenant.run("lease/acquire", ("n1", A, 20, "owner 1"), now_ms=10)
    before = tenant.dump()

    reply = tenant.run("lease/get", ("n1",), ("n2",), now_ms=now_ms)

    held = ["held", "10000", 10, 30, "owner 1"]
    assert reply == [now_ms, held if is_held else "free", "free"]
    assert tenant.dump() == before


def test_released_name_reads_as_free(tenant: Tenant) -> None:
    """A released name is free at once."""
    tenant.run("lease/acquire", ("n1", A, 20, "a"), now_ms=10)
    tenant.run("lease/release", ("n1", A), now_ms=12)

    assert tenant.run("lease/get", ("n1",), now_ms=12) == [12, "free"]
