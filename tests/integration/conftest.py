"""Fixtures: clients on each server of the matrix, closed when the test ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from servers import Server, dump

import leasekit
from leasekit import Leasekit, Tenant

Connect = Callable[..., Awaitable[Leasekit]]


@pytest.fixture
async def connected(server: Server) -> AsyncIterator[Connect]:
    """Connects to `server`, by default on the caller's clock: `await connected(retention=...)`."""
    async with AsyncExitStack() as stack:

        async def connect(**options: Any) -> Leasekit:
            options = {"clock": "caller"} | options
            return await stack.enter_async_context(leasekit.connect(server.url, **options))

        yield connect


@pytest.fixture
async def kit(connected: Connect) -> Leasekit:
    return await connected()


@pytest.fixture
def tenant(kit: Leasekit, tenant_name: str) -> Tenant:
    return kit.tenant(tenant_name, "w")


@pytest.fixture
def state(server: Server, tenant_name: str) -> Callable[[], dict[str, Any]]:
    """All that the test's tenant keeps: `state() == {}` for nothing."""
    return lambda: dump(server.raw, "lk", f"{tenant_name}.w")
