"""A proxy between a client and its server that breaks connections at a chosen point of a chosen command.

It listens on a unix socket and gives every connection a connection of its own to the server, so that
what the server does with one (drop it on CLIENT KILL, say) is real. It knows just enough of RESP to
tell where a request or a reply ends. `arm` says what happens to the next request that a test looks
for; without it everything passes. `stall` and `lead_to` befall the whole of it, for failovers.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self

SETTLE_SECONDS_MAX = 5.0


class Fault(StrEnum):
    """What becomes of a request."""

    CUT_BEFORE = "cut before it is sent on"
    CUT_AFTER = "cut before the reply"
    CUT_IN_REPLY = "cut in mid-reply"
    CUT_AFTER_REPLY = "cut after the reply"
    HOLD = "held back, then let go"
    COPY = "delivered twice"


@dataclass
class Plan:
    """`fault` befalls the next `times` requests that `is_meant` picks.

    cut_at: how much of the reply passes a cut in mid-reply, as a share of it. keeps_upstream: the
    server does not learn of a cut. meanwhile: run at each cut, before the client can notice it.
    """

    is_meant: Callable[[list[bytes]], bool]
    fault: Fault
    times: int = 1
    cut_at: float = 0.5
    keeps_upstream: bool = False
    meanwhile: Callable[[], Awaitable[None]] | None = None
    struck: int = 0
    requests: list[bytes] = field(default_factory=list)

    def strikes(self, request: bytes) -> bool:
        if self.struck >= self.times or not self.is_meant(words_of(request)):
            return False
        self.struck += 1
        self.requests.append(request)
        return True


class Proxy:
    """`async with Proxy(listen_path, server_path) as proxy:`"""

    def __init__(self, path: str, server_path: str) -> None:
        self.path = path
        self._server_path = server_path
        self._plan: Plan | None = None
        self._links: dict[_Link, asyncio.Task[None] | None] = {}
        self._held: list[tuple[_Link, list[bytes]]] = []
        self._flows = asyncio.Event()
        self._flows.set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        running = [task for task in self._links.values() if task is not None]
        for link in self._links:
            link.end()
        self._flows.set()
        await asyncio.gather(*running)
        await self._server.wait_closed()
        os.unlink(self.path)

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    def arm(self, plan: Plan | None) -> None:
        self._plan = plan

    def stall(self) -> None:
        """Nothing passes any more in either direction, and nobody is told."""
        self._flows.clear()

    def lead_to(self, server_path: str) -> None:
        """End all connections; new ones lead to this server. What was stalled never arrives."""
        self._server_path = server_path
        for link in self._links:
            link.end()
        self._flows.set()

    async def let_go(self) -> list[bytes | None]:
        """Send on what was held back; its replies, or None where the server had ended the connection."""
        held, self._held = self._held, []
        return [await link.deliver(request) for link, requests in held for request in requests]

    async def deliver_copy(self, request: bytes) -> bytes:
        """Deliver a request on a connection of the proxy's own; its reply."""
        reader, writer = await asyncio.open_unix_connection(self._server_path)
        try:
            writer.write(b"*2\r\n$5\r\nHELLO\r\n$1\r\n3\r\n" + request)
            replies = frames(reader)
            await anext(replies)
            return await anext(replies)
        finally:
            writer.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(self, reader, writer)
        self._links[link] = asyncio.current_task()
        try:
            await self._flows.wait()
            await link.run(self._server_path)
        except OSError:
            writer.close()  # there is no server
        finally:
            del self._links[link]

    async def flows(self) -> None:
        """Wait while it is stalled."""
        await self._flows.wait()

    def plan_for(self, request: bytes) -> Plan | None:
        plan = self._plan
        return plan if plan is not None and plan.strikes(request) else None

    def hold(self, link: _Link, requests: list[bytes]) -> None:
        self._held.append((link, requests))


class _Link:
    """One client's connection and the connection to the server that belongs to it."""

    def __init__(
        self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy = proxy
        self._reader, self._writer = reader, writer
        self._ended = asyncio.Event()
        self._asked: deque[Plan | None] = deque()
        self._letting_go: asyncio.Future[bytes | None] | None = None
        self._is_cut = False

    async def run(self, server_path: str) -> None:
        self._from_server, self._to_server = await asyncio.open_unix_connection(server_path)
        pumps = [asyncio.create_task(self._requests()), asyncio.create_task(self._replies())]
        try:
            await self._ended.wait()
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for writer in (self._writer, self._to_server):
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()

    def end(self) -> None:
        self._ended.set()

    async def deliver(self, request: bytes) -> bytes | None:
        """A request that was held back, on its own old connection."""
        if self._ended.is_set():
            return None
        self._letting_go = asyncio.get_running_loop().create_future()
        self._to_server.write(request)
        try:
            return await asyncio.wait_for(self._letting_go, SETTLE_SECONDS_MAX)
        finally:
            self.end()

    async def _requests(self) -> None:
        try:
            async for request in frames(self._reader):
                await self._proxy.flows()
                plan = self._proxy.plan_for(request)
                fault = plan.fault if plan else None
                if plan and fault is Fault.HOLD:
                    # The client gives up some time; the connection to the server stays.
                    self._proxy.hold(self, [request])
                    with suppress(OSError):
                        await self._reader.read(-1)
                    return
                if plan and fault is Fault.CUT_BEFORE:
                    await self._cut(plan)
                    return
                if self._to_server.is_closing():
                    break
                self._asked.append(plan)
                self._to_server.write(request)
        except OSError:
            pass
        if not self._is_cut:
            self.end()

    async def _replies(self) -> None:
        with suppress(OSError):
            async for reply in frames(self._from_server):
                await self._proxy.flows()
                if self._letting_go is not None:
                    self._letting_go.set_result(reply)
                    continue
                if reply.startswith(b">"):
                    self._pass(reply)
                    continue
                plan = self._asked.popleft()
                fault = plan.fault if plan else None
                if fault is Fault.CUT_IN_REPLY and plan:
                    self._pass(reply[: max(1, min(len(reply) - 1, int(plan.cut_at * len(reply))))])
                elif fault is not Fault.CUT_AFTER:
                    self._pass(reply)
                if plan and fault is not Fault.COPY:
                    await self._cut(plan)
        if self._letting_go is not None and not self._letting_go.done():
            self._letting_go.set_result(None)
        self.end()

    def _pass(self, data: bytes) -> None:
        if not self._is_cut and not self._writer.is_closing():
            self._writer.write(data)

    async def _cut(self, plan: Plan) -> None:
        """The client's side ends; the server's goes on where the plan says so."""
        if self._is_cut:
            return
        if plan.meanwhile is not None:
            await plan.meanwhile()
        self._is_cut = True
        self._writer.close()
        if not plan.keeps_upstream:
            self.end()


def words_of(request: bytes) -> list[bytes]:
    """The words of a request; requests are arrays of bulk strings."""
    words, at = [], request.index(b"\n") + 1
    while at < len(request):
        line_end = request.index(b"\r\n", at)
        length = int(request[at + 1 : line_end])
        words.append(request[line_end + 2 : line_end + 2 + length])
        at = line_end + length + 4
    return words


async def frames(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Whole requests or replies, as their bytes, until the connection ends."""
    buffer = b""
    while True:
        while (end := frame_end(buffer, 0)) is not None:
            yield buffer[:end]
            buffer = buffer[end:]
        data = await reader.read(65_536)
        if not data:
            return
        buffer += data


def frame_end(buffer: bytes, at: int) -> int | None:
    """Where the RESP value that begins at `at` ends; None if it has not all arrived."""
    line_end = buffer.find(b"\r\n", at)
    if line_end < 0:
        return None
    kind, end = buffer[at : at + 1], line_end + 2
    if kind in b"+-:,#_(":
        return end
    count = int(buffer[at + 1 : line_end])
    if kind in b"$!=":
        end += count + 2 if count >= 0 else 0
        return end if end <= len(buffer) else None
    # Arrays, sets and pushes; a map has two values an entry, an attribute also what it belongs to.
    values = 2 * count + (kind == b"|") if kind in b"%|" else count
    for _ in range(max(values, 0)):
        found = frame_end(buffer, end)
        if found is None:
            return None
        end = found
    return end
