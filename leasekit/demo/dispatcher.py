"""A dispatcher: claims rows, delivers them to the destination, acks them.

The acks of a batch are single calls made at once, as independent coroutines would make them; the
coalescer sends them as one. On Hold it stops to be looked at in its weakest moment: the rows are
delivered, and nobody has been told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from leasekit.client import connect
from leasekit.demo import messages
from leasekit.demo.child import say
from leasekit.demo.messages import LANE, RETENTION, TARGET, Finish, Go, Hold, Order, Pause, Setup
from leasekit.errors import OutcomeUnknown
from leasekit.model import AckOutcome
from leasekit.outbox import Claim, ClaimedRows, Outbox

__all__ = ["Dispatcher"]

IDLE_FIRST_MS = 1
IDLE_MOST_MS = 50


class Dispatcher:
    """Works until Finish."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._must_hold = False
        self._must_finish = False
        self._may_go = asyncio.Event()
        self._may_go.set()

    def obey(self, order: Order) -> None:
        if isinstance(order, Hold):
            self._must_hold = True
        elif isinstance(order, Pause):
            self._may_go.clear()
        elif isinstance(order, Go):
            self._may_go.set()
        elif isinstance(order, Finish):
            self._must_finish = True
            self._may_go.set()

    async def run(self) -> None:
        setup = self._setup
        destination = await Connection.reach(setup.destination, setup.name)
        async with connect(setup.url, prefix=setup.prefix, retention=RETENTION) as kit:
            outbox = kit.tenant(setup.org, setup.workspace).outbox
            say(messages.Ready())
            idle_ms = IDLE_FIRST_MS
            while not self._must_finish:
                await self._may_go.wait()
                claims = await self._claim(outbox)
                if claims:
                    idle_ms = IDLE_FIRST_MS
                    await self._handle(claims, destination)
                else:
                    await asyncio.sleep(idle_ms / 1_000)
                    idle_ms = min(2 * idle_ms, IDLE_MOST_MS)
        await destination.leave()

    async def _claim(self, outbox: Outbox) -> ClaimedRows:
        setup = self._setup
        return await outbox.claim(
            LANE, TARGET, limit=setup.batch, lease_ms=setup.lease_ms, consumer=setup.name
        )

    async def _handle(self, claims: Sequence[Claim], destination: Connection) -> None:
        answers = await destination.deliver(claims)
        refused_as_stale = answers.count("stale")
        if self._must_hold:
            self._must_hold = False
            await self._hold(claims)
            # As one does that was interrupted and does not know how far it came.
            refused_as_stale += (await destination.deliver(claims[:1])).count("stale")
        outcomes = await asyncio.gather(*[_ack(claim) for claim in claims])
        named = [(claim.row.id, claim.fence) for claim in claims]
        by_outcome = list(zip(named, outcomes, strict=True))
        say(
            messages.Acked(
                accepted=[row for row, outcome in by_outcome if outcome is AckOutcome.ACKED],
                refused=[row for row, outcome in by_outcome if outcome is AckOutcome.LOST_CLAIM],
                refused_as_stale=refused_as_stale,
            )
        )

    async def _hold(self, claims: Sequence[Claim]) -> None:
        self._may_go.clear()
        say(messages.Delivered([(claim.row.id, claim.fence) for claim in claims]))
        await self._may_go.wait()


async def _ack(claim: Claim) -> AckOutcome:
    try:
        return await claim.ack()
    except OutcomeUnknown:
        # The connection was lost on the way: whether it was applied, the repeat tells.
        return await claim.ack(repeat=True)


class Connection:
    """A connection to the destination process; see destination.py for what is said on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def reach(cls, path: str, holder: str) -> Connection:
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(f"{holder}\n".encode())
        return cls(reader, writer)

    async def deliver(self, claims: Sequence[Claim]) -> list[str]:
        """Send the bodies of rows with their fences; gives the answers in order."""
        for claim in claims:
            body = messages.body_of(claim.row.payload)
            self._writer.write(f"{claim.row.id} {claim.fence} {len(body)}\n".encode() + body)
            await self._writer.drain()
        return [(await self._reader.readline()).decode().strip() for _ in claims]

    async def leave(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()
