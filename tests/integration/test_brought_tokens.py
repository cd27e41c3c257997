"""A grant under a token that the caller brought is never given back behind its back.

Whoever is cancelled and asks again by the same token must keep what it gets: a release on behalf of the
cancelled call could arrive after the repeat, and hand the same thing to a second holder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from servers import Server

import leasekit
from leasekit import Tenant, new_token
from leasekit.model import AcquireOutcome, ReserveOutcome

Ask = Callable[[Tenant, str | None, bool], Awaitable[bool]]


async def lease(tenant: Tenant, token: str | None, repeat: bool) -> bool:
    given = await tenant.leases.acquire(
        "name", ttl_ms=60_000, owner="a", token=token, repeat=repeat
    )
    return given.outcome is AcquireOutcome.ACQUIRED


async def claim(tenant: Tenant, token: str | None, repeat: bool) -> bool:
    return bool(await tenant.outbox.claim("l", "t", consumer="a", claim_id=token, repeat=repeat))


async def reserve(tenant: Tenant, token: str | None, repeat: bool) -> bool:
    given = await tenant.idempotency.reserve(
        "o", "k", owner="a", fingerprint="f", token=token, repeat=repeat
    )
    return given.outcome is ReserveOutcome.RESERVED


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("ask", [lease, claim, reserve])
async def test_a_repeat_keeps_what_it_gets(
    real_server: Server, tenant_name: str, ask: Ask, turns: int
) -> None:
    """Cancelled after a few turns of the loop, asked again by the same token: nobody else gets it."""
    async with (
        leasekit.connect(real_server.url) as kit,
        leasekit.connect(real_server.url) as another,
    ):
        mine, theirs = (one.tenant(tenant_name, "w") for one in (kit, another))
        await mine.outbox.enqueue("l", "t", 1)
        token = new_token()
        first = asyncio.ensure_future(ask(mine, token, False))
        for _ in range(turns):
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])

        assert await ask(mine, token, True)
        await mine.outbox.counts()  # all that this client has sent so far is answered

        assert not await ask(theirs, None, False)
