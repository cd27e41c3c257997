"""A tenant on each server of the matrix, recounted after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lua.commands import Tenant, invariants
from lua_coverage import LuaCoverage
from servers import Server


@pytest.fixture
def tenant(server: Server, tenant_name: str, lua_counter: LuaCoverage | None) -> Iterator[Tenant]:
    """A tenant of the test's own; what the test left must add up, unless it planted damage."""
    tenant = Tenant(server, tenant_name, lua_counter)
    yield tenant
    if not tenant.is_damaged:
        invariants(tenant.dump())
