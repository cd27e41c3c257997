"""A primary with replicas on this machine, whose links can be cut, and what Sentinel would do with it.

A replica reaches its primary through an Uplink, a TCP port of the test that leads to the primary's
socket: it can fall silent in either direction, as a network does, or be cut. Clients reach the
primary through a proxy.Proxy at a fixed address, which is led to another server once that one was
promoted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from replicas import Replicated, start_replicated
from servers import ServerProcess

SYNC_SECONDS_MAX = 20.0
STEP_SECONDS = 0.003

# A replica loads what it gets from the socket at once, instead of from a file when it next looks.
# A primary that is told to stop does not wait for replicas that are gone.
QUICK = {"repl_diskless_load": "swapdb", "shutdown_timeout": "0"}


class Uplink:
    """A replica's way to its primary: a TCP port that leads to the primary's socket."""

    def __init__(self, primary_path: str) -> None:
        self._primary_path = primary_path
        self._pumps: set[asyncio.Task[None]] = set()
        self._transports: set[asyncio.WriteTransport] = set()
        self._down, self._up = asyncio.Event(), asyncio.Event()
        self.flow()

    async def open(self) -> int:
        """Listen; the port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    def stall(self, *, down: bool = True, up: bool = True) -> None:
        """Nothing arrives any more: of the writes on their way down, the acknowledgements up."""
        if down:
            self._down.clear()
        if up:
            self._up.clear()

    def flow(self) -> None:
        """What was stalled goes on, and nothing of it is lost."""
        self._down.set()
        self._up.set()

    def cut(self) -> None:
        """End it for good: what was stalled never arrives."""
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        for transport in self._transports:
            transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_primary, to_primary = await asyncio.open_unix_connection(self._primary_path)
        except OSError:
            writer.transport.abort()
            return
        self._transports |= {writer.transport, to_primary.transport}
        for pump in (
            self._pump(reader, to_primary, self._up),
            self._pump(from_primary, writer, self._down),
        ):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flows: asyncio.Event
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                await flows.wait()
                if writer.is_closing():
                    return
                writer.write(data)
        writer.close()


class Node:
    """A server that can be a primary or follow one. It keeps nothing on disk."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server
        self.uplink: Uplink | None = None

    @property
    def path(self) -> str:
        return self.server.url.removeprefix("unix://")

    async def ask(self, *command: object) -> Any:
        """A command's reply. The loop goes on meanwhile: the server may wait for what this process
        forwards to it."""
        return await asyncio.to_thread(self.server.raw.execute_command, *command)

    async def offset(self) -> int:
        """How far it has come in its primary's writes; -1 while it is not connected to it."""
        facts = await self.ask("INFO", "replication")
        is_connected = facts.get("master_link_status", "up") == "up"
        return int(facts["master_repl_offset"]) if is_connected else -1

    async def follow(self, primary: Node) -> None:
        """Become a replica; its data are those of the primary from then on."""
        self.leave()
        self.uplink = Uplink(primary.path)
        port = await self.uplink.open()
        await self.ask("REPLICAOF", "127.0.0.1", port)

    def stall(self, *, down: bool = True, up: bool = True) -> None:
        """Its primary's writes do not reach it, or what it says to have does not reach the primary."""
        if self.uplink is not None:
            self.uplink.stall(down=down, up=up)

    def flow(self) -> None:
        if self.uplink is not None:
            self.uplink.flow()

    def leave(self) -> None:
        if self.uplink is not None:
            self.uplink.cut()
            self.uplink = None


class Group:
    """A primary and its replicas."""

    def __init__(self, started: Replicated) -> None:
        self._started = started
        self.primary = Node(started.primary)
        self.replicas = [Node(server) for server in started.replicas]

    async def most_advanced(self) -> Node:
        """The replica that Sentinel would choose."""
        offsets = [await node.offset() for node in self.replicas]
        return self.replicas[offsets.index(max(offsets))]

    async def promote(self, new: Node) -> Node:
        """Make a replica the primary, which the others follow; gives the old one, which is not told."""
        old, self.primary = self.primary, new
        self.replicas.remove(new)
        await asyncio.to_thread(self._started.promote, new.server)
        new.leave()
        for node in self.replicas:
            await node.follow(new)
        return old

    async def join(self, node: Node) -> None:
        """A server follows the primary, and has all of its data."""
        await node.follow(self.primary)
        self.replicas.append(node)
        await self.are_in_step()

    def pause(self, node: Node) -> None:
        """It stands still and answers nothing; what arrives meanwhile waits in its sockets."""
        self._started.pause(node.server)

    def resume(self, node: Node) -> None:
        self._started.resume(node.server)

    async def are_in_step(self) -> None:
        """Wait until the replicas have all that the primary has by now.

        A link that is up says little: the primary may not have begun yet to send what it writes.
        """
        await self.primary.ask("PUBLISH", "step", "")  # a write that changes nothing
        wanted = await self.primary.offset()
        async with asyncio.timeout(SYNC_SECONDS_MAX):
            for node in self.replicas:
                while await node.offset() < wanted:  # noqa: ASYNC110  # nothing would tell
                    await asyncio.sleep(STEP_SECONDS)

    async def open(self) -> None:
        for node in self.replicas:
            await node.follow(self.primary)
        await self.are_in_step()

    def close(self) -> None:
        for node in self.replicas:
            node.leave()
        self._started.close()


@asynccontextmanager
async def open_group(replicas: int) -> AsyncIterator[Group]:
    """A primary with so many replicas, all in step. Raises NoServer."""
    group = Group(await asyncio.to_thread(start_replicated, "valkey-9", replicas, **QUICK))
    try:
        await group.open()
        yield group
    finally:
        group.close()
