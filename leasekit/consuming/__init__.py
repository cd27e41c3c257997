"""Consuming without polling: what `outbox.run`, `outbox.consume` and `kit.run` are made of.

`schedule` decides whose turn it is, `keeper` extends what is held, `pump` is the engine of both;
here they are put together. Source: design 5, "Waking"; spec/outbox 3.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any

from leasekit.consuming.pump import Options, Pump, consumer_name
from leasekit.durability import Durability, durability_of
from leasekit.errors import InvalidInput
from leasekit.model import RunCounts
from leasekit.scope import Shared

__all__ = [
    "BACKOFF_MS_DEFAULT",
    "DRAIN_MS_DEFAULT",
    "POLL_MS_DEFAULT",
    "SWEEP_MS_DEFAULT",
    "TURN_ROWS",
    "Pump",
    "feed",
    "make_feed",
    "make_pump",
]

BACKOFF_MS_DEFAULT = (1_000, 30_000)
DRAIN_MS_DEFAULT = 30_000
POLL_MS_DEFAULT = 1_000
SWEEP_MS_DEFAULT = 55_000
TURN_ROWS = 10

Claims = asyncio.Queue[Any]


def make_pump(
    shared: Shared,
    *,
    consumer: str | None,
    concurrency: int,
    lease_ms: int,
    drain_ms: int,
    poll_ms: int,
    counts: RunCounts | None,
    per_tenant: int | None = None,
    handler_timeout_ms: int | None = None,
    backoff_ms: tuple[int, int] = BACKOFF_MS_DEFAULT,
    durability: Durability | str | None = None,
    handler: Callable[[Any], Awaitable[Any]] | None = None,
    give: Callable[[Any], None] | None = None,
    new_tenant: Callable[[str], None] | None = None,
) -> Pump:
    """A pump over a client's connection; InvalidInput for what it cannot be told."""
    if shared.settings.clock != "server":
        raise InvalidInput(
            "consuming needs the server's clock: this client was connected with clock='caller'",
            field="clock",
        )
    options = Options(
        consumer=consumer_name() if consumer is None else consumer,
        concurrency=concurrency,
        per_tenant=concurrency if per_tenant is None else per_tenant,
        lease_ms=lease_ms,
        handler_timeout_ms=handler_timeout_ms,
        backoff_ms=backoff_ms,
        drain_ms=drain_ms,
        poll_ms=poll_ms,
        durability=None if durability is None else durability_of(durability),
    )
    return Pump(
        shared.hub,
        options,
        RunCounts() if counts is None else counts,
        is_closing=lambda: shared.coalescer.is_closing,
        handler=handler,
        give=give,
        new_tenant=new_tenant,
    )


def make_feed(shared: Shared, **options: Any) -> tuple[Pump, Claims]:
    """A pump that hands its claims over in a queue, None at its end."""
    claims: Claims = asyncio.Queue()
    return make_pump(shared, give=claims.put_nowait, **options), claims


async def feed(
    pump: Pump, claims: Claims, *, stop: asyncio.Event | None, tags: Iterable[str]
) -> AsyncGenerator[Any, None]:
    """Run the pump and give its claims one by one; whoever leaves gives back what is not finished."""
    running = asyncio.get_running_loop().create_task(pump.run(stop=stop, tags=tags))
    running.add_done_callback(lambda task: claims.put_nowait(None))
    try:
        while (claim := await claims.get()) is not None:
            if not claim.lost.is_set():
                yield claim
        await asyncio.shield(running)
    finally:
        pump.leave()
        await asyncio.gather(running, return_exceptions=True)
