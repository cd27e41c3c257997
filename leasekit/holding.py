"""Holding one lease while a body runs: renewed in time, and the body cancelled where that fails.

Renewing goes on while the server is away. Only the local end of the lease, less a margin, or the
server's word makes the lease lost; then `lost` is set and the body is cancelled, before anybody else
can have the lease, as far as clocks go equally fast.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from leasekit.coalesce import local_clock_s
from leasekit.errors import LeasekitError

__all__ = ["Upkeep", "margin_s"]

RENEWALS_PER_LEASE = 3
RENEW_RETRY_MS = 50
MARGIN_SHARE = 0.05
MARGIN_MS_MAX = 500

Extend = Callable[[], Awaitable[float | None]]


def margin_s(lease_ms: int) -> float:
    """How long before a lease's end its holder takes it for lost: a 20th of it, half a second at most."""
    return min(lease_ms * MARGIN_SHARE, MARGIN_MS_MAX) / 1_000


class Upkeep:
    """Keeps a lease of the current task's body, from `start` to `stop`.

    `extend` renews it and gives its new end on the local clock, or None where it is lost; where it
    raises, the lease stays as it was. `deadline_s`: its end on the local clock so far. `lost`: is set
    when it is.
    """

    def __init__(
        self, extend: Extend, lease_ms: int, deadline_s: float, lost: asyncio.Event
    ) -> None:
        self._extend = extend
        self._lease_ms = lease_ms
        self.deadline_s = deadline_s
        self._lost = lost
        self._renewing: asyncio.Task[None] | None = None
        self._body: asyncio.Task[Any] | None = None
        self._cancels_before = 0
        self._cancelled_body = False

    def start(self) -> None:
        """The body begins, in the current task."""
        self._body = asyncio.current_task()
        self._cancels_before = self._body.cancelling() if self._body else 0
        self._renewing = asyncio.create_task(self._renew())

    def rest(self) -> None:
        """What the lease protected is over: renew it no more, and let the body go on without it."""
        if self._renewing is not None:
            self._renewing.cancel()

    def stop(self) -> bool:
        """The body is over. False if it was cancelled by somebody else as well, as by a loss."""
        if self._renewing is not None:
            self._renewing.cancel()
        if not self._cancelled_body or self._body is None:
            return True
        return self._body.uncancel() <= self._cancels_before

    def remaining_s(self) -> float:
        """Seconds until the lease counts as lost, by the local clock; negative once it does."""
        return self.deadline_s - margin_s(self._lease_ms) - local_clock_s()

    async def _renew(self) -> None:
        """Extend at a third of the lease, and oftener when that fails; at the margin, give up."""
        pause_s = self._lease_ms / RENEWALS_PER_LEASE / 1_000
        while (left_s := self.remaining_s()) > 0:
            await asyncio.sleep(min(pause_s, left_s))
            if (left_s := self.remaining_s()) <= 0:
                break
            try:
                async with asyncio.timeout(left_s):
                    deadline_s = await self._extend()
            except (TimeoutError, LeasekitError):
                # The server, or its replicas, may be back before the lease is over: try until it is.
                pause_s = min(RENEW_RETRY_MS, self._lease_ms / 10) / 1_000
                continue
            if deadline_s is None:
                break
            self.deadline_s = deadline_s
            pause_s = self._lease_ms / RENEWALS_PER_LEASE / 1_000
        self._lost.set()
        if self._body is not None and not self._body.done():
            self._cancelled_body = True
            self._body.cancel()
