"""One task that extends every lease held: each at a third of its length, together in batches.

Extending goes on while the server is away; only the lease's own local end, or the server's word,
makes a row lost. Whoever works on a lost row is told at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from leasekit.coalesce import local_clock_s
from leasekit.errors import LeasekitError

__all__ = ["Held", "Keeper"]

EXTENDED_AFTER = 1 / 3  # of the lease
TICKS_PER_LEASE = 12
TICK_MOST_S = 2.5


class Held:
    """A claim that this process works on."""

    __slots__ = (
        *("claim", "entry", "extend_at_s", "is_extending", "is_finishing", "is_lost", "is_over"),
        "task",
    )

    def __init__(self, entry: Any, claim: Any) -> None:
        self.entry = entry
        self.claim = claim
        self.task: asyncio.Task[None] | None = None
        self.extend_at_s = 0.0
        self.is_extending = False
        self.is_finishing = False
        self.is_lost = False
        self.is_over = False


class Keeper:
    """Holds on to what it is given until it is told to let go; calls `on_lost` for what is lost."""

    def __init__(self, lease_ms: int, on_lost: Callable[[Held], None]) -> None:
        self._lease_ms = lease_ms
        self._on_lost = on_lost
        self._held: dict[str, Held] = {}
        self._arrived = asyncio.Event()
        self._batches: set[asyncio.Task[None]] = set()

    def hold(self, held: Held) -> None:
        """Extend this claim from now on."""
        held.extend_at_s = local_clock_s() + held.claim.remaining_ms() / 1_000 * (
            1 - 2 * EXTENDED_AFTER
        )
        self._held[held.claim.row.id] = held
        self._arrived.set()

    def let_go(self, held: Held) -> None:
        """Extend it no more. A row that was claimed anew meanwhile is held on."""
        if self._held.get(held.claim.row.id) is held:
            del self._held[held.claim.row.id]

    async def run(self) -> None:
        """Extend what is due, until cancelled."""
        tick_s = min(self._lease_ms / 1_000 / TICKS_PER_LEASE, TICK_MOST_S)
        try:
            while True:
                if not self._held:
                    self._arrived.clear()
                    await self._arrived.wait()
                await asyncio.sleep(tick_s)
                self._look()
        finally:
            for batch in self._batches:
                batch.cancel()

    def _look(self) -> None:
        now_s = local_clock_s()
        due = []
        for held in list(self._held.values()):
            if held.claim.remaining_ms() <= 0:
                self._lose(held)
            elif held.extend_at_s <= now_s and not held.is_extending:
                held.is_extending = True
                due.append(held)
        if due:
            batch = asyncio.get_running_loop().create_task(self._extend(due))
            self._batches.add(batch)
            batch.add_done_callback(self._batches.discard)

    async def _extend(self, due: list[Held]) -> None:
        """All at once, so that they share script calls; one that fails is due again at the next tick."""
        await asyncio.gather(*(self._extend_one(held) for held in due))

    async def _extend_one(self, held: Held) -> None:
        try:
            outcome = await held.claim.extend(lease_ms=self._lease_ms)
        except LeasekitError:
            return
        finally:
            held.is_extending = False
        if outcome == "extended":
            held.extend_at_s = local_clock_s() + self._lease_ms / 1_000 * EXTENDED_AFTER
        elif self._held.get(held.claim.row.id) is held:
            self._lose(held)

    def _lose(self, held: Held) -> None:
        self.let_go(held)
        self._on_lost(held)
