"""From a URL to replies: what a back end checks, and what a wire promises about each send."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hiredis
import pytest
import uvloop
from redis.exceptions import ResponseError
from servers import NoServer, Server, ServerProcess, binary_of

from leasekit.connect import Backend, ConnectionLost, Wire, _memory_servers, _Server, open_backend
from leasekit.errors import InvalidInput, Unavailable

SECRET = "open-sesame"
PrivateServer = Callable[..., ServerProcess]
INFO = "redis_version:7.2.0\r\nloading:0\r\nmaxmemory_policy:noeviction\r\naof_enabled:0\r\n"


class Opener:
    """Opens back ends and connected wires, and closes them when the test ends."""

    def __init__(self, stack: contextlib.AsyncExitStack) -> None:
        self._stack = stack

    async def backend(self, url: str, **options: Any) -> Backend:
        backend = await open_backend(url, **options)
        self._stack.push_async_callback(backend.close)
        return backend

    async def wire(self, url: str, **options: Any) -> Wire:
        wire = (await self.backend(url, **options)).wire()
        await wire.connect()
        return wire


@pytest.fixture
async def opened() -> Any:
    async with contextlib.AsyncExitStack() as stack:
        yield Opener(stack)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory whose sockets have short paths."""
    with tempfile.TemporaryDirectory(prefix="lk-") as name:
        yield Path(name)


class Listener:
    """A hand-made server on a unix socket; serves each connection until the test ends."""

    def __init__(self, path: Path) -> None:
        self.url = f"unix://{path}"
        self.connection_count = 0
        self._path = path
        self._tasks: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def __aenter__(self) -> Any:
        self._server = await asyncio.start_unix_server(self._accept, str(self._path))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connection_count += 1
        self._writers.append(writer)
        self._tasks.append(asyncio.create_task(self.serve(reader, writer)))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise NotImplementedError


class Puppet(Listener):
    """Speaks just enough to be connected to; `answers` says what else it replies, byte for byte.

    A command without an answer gets none. None as the answer closes the connection.
    """

    def __init__(self, path: Path, answers: dict[str, bytes | None] | None = None) -> None:
        super().__init__(path)
        self.answers: dict[str, bytes | None] = {
            "HELLO": b"%1\r\n$5\r\nproto\r\n:3\r\n",
            "CLIENT": b":7\r\n",
            "CONFIG": b"-NOPERM no\r\n",
            "INFO": bulk(INFO),
            **(answers or {}),
        }
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests = hiredis.Reader()
        while data := await reader.read(65_536):
            requests.feed(data)
            while request := requests.gets():
                name = request[0].decode()
                self.asked.append(name)
                answer = self.answers.get(name, b"")
                if answer is None:
                    writer.close()
                    return
                await self.reply(writer, answer)

    async def reply(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
        writer.write(answer)


class Proxy(Listener):
    """Passes bytes on to a server, and what comes back as `replies` says: pass, cut or swallow."""

    def __init__(self, path: Path, server: Server) -> None:
        super().__init__(path)
        self._server_path = server.url.removeprefix("unix://")
        self.replies = "pass"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers, requests = await asyncio.open_unix_connection(self._server_path)
        self._writers.append(requests)
        back = asyncio.create_task(self._back(answers, writer))
        self._tasks.append(back)
        while data := await reader.read(65_536):
            requests.write(data)
        requests.close()

    async def _back(self, answers: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await answers.read(65_536):
            if self.replies == "cut":
                writer.close()
                return
            if self.replies == "pass":
                writer.write(data)
        writer.close()


def bulk(text: str) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(text), text.encode())


def everything_said(error: BaseException) -> str:
    """All that a log could show of an error, hidden contexts included."""
    shown = "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))
    inner = error.__cause__ or error.__context__
    return shown + (everything_said(inner) if inner else "")


async def one_turn() -> None:
    """Give the event loop one turn."""
    loop = asyncio.get_running_loop()
    turned = loop.create_future()
    loop.call_soon(turned.set_result, None)
    await turned


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Replies


async def test_replies_come_in_the_order_of_the_sends(server: Server, opened: Opener) -> None:
    """Many sends may be outstanding; each gets its own replies, in the order of its commands."""
    wire = await opened.wire(server.url)
    sends = [
        wire.send([("ECHO", f"{number}a"), (b"ECHO", b"%db" % number), ("ECHO", number)])
        for number in range(50)
    ]
    assert await asyncio.gather(*sends) == [
        [b"%da" % number, b"%db" % number, b"%d" % number] for number in range(50)
    ]


async def test_error_reply_stands_in_the_list(server: Server, opened: Opener) -> None:
    """An error reply is a ResponseError with the server's whole text; its neighbours are served."""
    wire = await opened.wire(server.url)
    unknown = "a" * 40
    replies = await wire.send(
        [
            ("ECHO", "before"),
            ("EVALSHA", unknown, 0),
            ("EVAL", "return redis.error_reply('LK_DAMAGED row 7')", 0),
            ("EVAL", "return {1, {redis.error_reply('LK_DAMAGED row 8')}}", 0),
            ("ECHO", "after"),
        ]
    )
    assert replies[0] == b"before"
    assert type(replies[1]) is ResponseError
    assert str(replies[1]).startswith("NOSCRIPT ")
    assert str(replies[2]).startswith("LK_DAMAGED row 7")
    assert type(replies[3][1][0]) is ResponseError
    assert str(replies[3][1][0]).startswith("LK_DAMAGED row 8")
    assert replies[4] == b"after"


async def test_replies_are_bytes_integers_none_and_lists(server: Server, opened: Opener) -> None:
    """Scripts answer the same on every server, and nothing is decoded to text."""
    wire = await opened.wire(server.url)
    replies = await wire.send(
        [("EVAL", "return {'word', 7, {'\\255', {}}, ARGV[1]}", 0, "x"), ("GET", "absent")]
    )
    assert replies == [[b"word", 7, [b"\xff", []], b"x"], None]


async def test_send_of_nothing_gives_nothing(server: Server, opened: Opener) -> None:
    """No commands, no replies: the future is not left to wait for somebody else's."""
    wire = await opened.wire(server.url)
    assert await wire.send([]) == []


async def test_wrong_argument_is_refused_before_anything_is_written(
    server: Server, opened: Opener
) -> None:
    """An argument of another type raises at once and does not disturb the order of replies."""
    wire = await opened.wire(server.url)
    with pytest.raises(TypeError):
        wire.send([("ECHO", "a"), ("ECHO", None)])  # type: ignore[list-item]
    assert await wire.send([("ECHO", "b")]) == [b"b"]


async def test_cancelled_future_keeps_the_order_of_the_others(
    server: Server, opened: Opener
) -> None:
    """Replies to a cancelled or dropped send are read and thrown away."""
    wire = await opened.wire(server.url)
    first, second, third = (wire.send([("ECHO", name), ("ECHO", name)]) for name in "abc")
    second.cancel()
    wire.send([("ECHO", "dropped")])
    last = wire.send([("ECHO", "d")])
    assert await first == [b"a", b"a"]
    assert await third == [b"c", b"c"]
    assert await last == [b"d"]


async def test_push_messages_are_not_replies(real_server: Server, opened: Opener) -> None:
    """What the server says by itself (RESP3 push) stands between replies and answers nothing."""
    wire = await opened.wire(real_server.url)
    replies = await wire.send(
        [("CLIENT", "TRACKING", "ON", "BCAST"), ("SET", "pushed", 1), ("GET", "pushed")]
    )
    assert replies == [b"OK", b"OK", b"1"]
    assert await wire.send([("SET", "pushed", 2), ("GET", "pushed")]) == [b"OK", b"2"]


async def test_push_message_before_a_reply_is_skipped(folder: Path, opened: Opener) -> None:
    """A push message in front of a reply does not take its place."""
    answers: dict[str, bytes | None] = {"ASK": b">2\r\n$4\r\nnews\r\n:9\r\n:42\r\n"}
    async with Puppet(folder / "s", answers) as puppet:
        wire = await opened.wire(puppet.url)
        assert await wire.send([("ASK",)]) == [42]


async def test_reply_may_arrive_byte_by_byte(folder: Path, opened: Opener) -> None:
    """Where the network cuts a reply does not matter."""

    class Trickle(Puppet):
        async def reply(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
            for byte in answer:
                writer.write(bytes([byte]))
                await one_turn()

    async with Trickle(folder / "s", {"ASK": b"*2\r\n$3\r\nabc\r\n*1\r\n:5\r\n"}) as puppet:
        wire = await opened.wire(puppet.url)
        first, second = wire.send([("ASK",), ("ASK",)]), wire.send([("ASK",)])
        assert await first == [[b"abc", [5]], [b"abc", [5]]]
        assert await second == [[b"abc", [5]]]


async def test_large_commands_and_replies_pass_whole(server: Server, opened: Opener) -> None:
    """Four megabytes each way need no more care than four bytes."""
    wire = await opened.wire(server.url)
    large = bytes(range(256)) * 16_384
    [reply] = await wire.send([("ECHO", large)])
    assert reply == large


# Lost connections


async def test_lost_reply_is_not_sent_again_by_a_wire(
    running: Callable[[str], ServerProcess], folder: Path, opened: Opener
) -> None:
    """A command whose reply is lost was executed once, and its sender learns that nobody knows."""
    server = running("valkey-9")
    async with Proxy(folder / "p", server) as proxy:
        wire = await opened.wire(proxy.url)
        proxy.replies = "cut"
        first = wire.send([("INCR", "wire-count"), ("INCR", "wire-count")])
        second = wire.send([("INCR", "wire-count")])

        with pytest.raises(ConnectionLost) as lost:
            await first
        assert lost.value.sent
        with pytest.raises(ConnectionLost) as lost:
            await second
        assert lost.value.sent
        assert not wire.is_connected
        assert proxy.connection_count == 2  # the examination at start, and the wire
    assert server.raw.get("wire-count") == b"3"


async def test_lost_reply_is_not_sent_again_by_a_command(
    running: Callable[[str], ServerProcess], folder: Path, opened: Opener
) -> None:
    """The pool for single commands does not repeat either; the cause says that it was sent."""
    server = running("valkey-9")
    async with Proxy(folder / "p", server) as proxy:
        backend = await opened.backend(proxy.url)
        assert await backend.command("PING") == b"PONG"
        proxy.replies = "cut"
        with pytest.raises(Unavailable, match="may have been executed") as unavailable:
            await backend.command("INCR", "command-count")
        assert isinstance(unavailable.value.__cause__, ConnectionLost)
        assert unavailable.value.__cause__.sent
        assert server.raw.get("command-count") == b"1"

        proxy.replies = "pass"
        assert await backend.command("INCR", "command-count") == 2


@pytest.mark.parametrize(
    "url", ["redis://host:1", "rediss://host:1", "unix:///socket"], ids=["tcp", "tls", "unix"]
)
async def test_connections_are_made_without_hidden_retries(url: str) -> None:
    """No kind of connection retries, checks health or follows maintenance notices by itself."""
    server = _Server.from_url(url, url.partition(":")[0], timeout_ms=1_500)
    connection: Any = server.connection()
    assert connection.retry.get_retries() == 0
    assert connection.retry_on_error == []
    assert connection.health_check_interval == 0
    assert not connection.maint_notifications_config.enabled
    assert connection.protocol == 3
    assert connection.socket_timeout == connection.socket_connect_timeout == 1.5


async def test_stalled_server_fails_all_outstanding_at_the_deadline(
    running: Callable[[str], ServerProcess], folder: Path, opened: Opener
) -> None:
    """When the oldest send has no reply in time, the connection is closed and nobody knows."""
    async with Proxy(folder / "p", running("valkey-9")) as proxy:
        wire = await opened.wire(proxy.url, timeout_ms=150)
        assert await wire.send([("PING",)]) == [b"PONG"]
        proxy.replies = "swallow"
        started_at = time.monotonic()
        results = await asyncio.gather(
            wire.send([("PING",)]), wire.send([("PING",)]), return_exceptions=True
        )
        waited = time.monotonic() - started_at
        assert [type(result) for result in results] == [ConnectionLost, ConnectionLost]
        assert [result.sent for result in results if isinstance(result, ConnectionLost)] == [
            True,
            True,
        ]
        assert "150 ms" in str(results[0])
        assert 0.14 < waited < 1
        assert not wire.is_connected


async def test_idle_wire_outlives_its_deadline(server: Server, opened: Opener) -> None:
    """The deadline belongs to a send: a connection without one stays open."""
    wire = await opened.wire(server.url, timeout_ms=500)
    assert await wire.send([("PING",)]) == [b"PONG"]
    elapsed = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.25, elapsed.set_result, None)
    await elapsed
    assert wire.is_connected
    assert await wire.send([("PING",)]) == [b"PONG"]


async def blocked_loop(url: str) -> list[Any]:
    backend = await open_backend(url, timeout_ms=400)
    wire = backend.wire()
    await wire.connect()
    reply = wire.send([("ECHO", "in time")])
    await one_turn()
    blocked_until = time.monotonic() + 0.6
    while time.monotonic() < blocked_until:
        pass
    try:
        return await reply
    finally:
        await backend.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_blocked_event_loop_is_not_blamed_on_the_server(
    run: Callable[[Any], Any], running: Callable[[str], ServerProcess]
) -> None:
    """A reply that came in time is taken, though this process was too busy to look."""
    assert run(blocked_loop(running("valkey-9").url)) == [b"in time"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"garbage\r\n", "not the Redis protocol"),
        (b"*2\r\n:1\r\n?\r\n", "not the Redis protocol"),
        (b"$-7\r\n", "not the Redis protocol"),
        (None, "closed the connection"),
    ],
    ids=["no type", "inside a list", "length", "closed"],
)
async def test_nonsense_ends_the_connection(
    answer: bytes | None, reason: str, folder: Path, opened: Opener
) -> None:
    """A server that breaks the protocol or hangs up fails all outstanding sends."""
    async with Puppet(folder / "s", {"ASK": answer}) as puppet:
        wire = await opened.wire(puppet.url)
        good, bad = wire.send([("CLIENT",)]), wire.send([("ASK",), ("SILENCE",)])
        assert await good == [7]
        with pytest.raises(ConnectionLost, match=reason) as lost:
            await bad
        assert lost.value.sent
        assert not wire.is_connected


async def test_reply_that_nobody_asked_for_ends_the_connection(
    folder: Path, opened: Opener
) -> None:
    """One reply too many shifts all that follow, so none may follow."""
    async with Puppet(folder / "s", {"ASK": b":1\r\n:2\r\n"}) as puppet:
        wire = await opened.wire(puppet.url)
        assert await wire.send([("ASK",)]) == [1]
        assert not wire.is_connected


async def test_dropped_send_that_fails_does_not_complain(
    folder: Path, opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody has to look at the failure of a send that nobody waits for."""
    async with Puppet(folder / "s", {"ASK": None}) as puppet:
        wire = await opened.wire(puppet.url)
        wire.send([("SILENCE",)])
        with pytest.raises(ConnectionLost):
            await wire.send([("ASK",)])
        wire.send([("PING",)])
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_send_without_a_connection_was_not_sent(server: Server, opened: Opener) -> None:
    """Before connect() and after close() a send fails, and certainly nothing was written."""
    wire = (await opened.backend(server.url)).wire()
    with pytest.raises(ConnectionLost) as lost:
        await wire.send([("PING",)])
    assert not lost.value.sent
    assert not wire.is_connected

    await wire.connect()
    assert wire.is_connected
    await wire.close()
    assert not wire.is_connected
    with pytest.raises(ConnectionLost) as lost:
        await wire.send([("PING",)])
    assert not lost.value.sent


async def test_wire_connects_again_after_a_loss(
    running: Callable[[str], ServerProcess], folder: Path, opened: Opener
) -> None:
    """connect() after a loss makes a new connection with a new client id."""
    server = running("valkey-9")
    async with Proxy(folder / "p", server) as proxy:
        wire = await opened.wire(proxy.url)
        first_id = wire.client_id
        assert await wire.send([("CLIENT", "ID")]) == [first_id]
        server.raw.client_kill_filter(_id=first_id)
        with pytest.raises(ConnectionLost):
            await wire.send([("BLPOP", "nothing", 0)])

        await wire.connect()
        assert wire.client_id != first_id
        assert await wire.send([("CLIENT", "ID")]) == [wire.client_id]


async def test_concurrent_connects_are_one(
    running: Callable[[str], ServerProcess], folder: Path, opened: Opener
) -> None:
    """Many callers who find a wire unconnected cause one connection; one may give up."""
    async with Proxy(folder / "p", running("valkey-9")) as proxy:
        wire = (await opened.backend(proxy.url)).wire()
        before = proxy.connection_count
        impatient = asyncio.create_task(wire.connect())
        others = [asyncio.create_task(wire.connect()) for _ in range(5)]
        await one_turn()
        impatient.cancel()
        await asyncio.gather(*others)
        await wire.connect()
        assert proxy.connection_count == before + 1
        assert impatient.cancelled()
        assert await wire.send([("PING",)]) == [b"PONG"]


async def test_failed_connect_fails_all_who_wait_for_it(folder: Path, opened: Opener) -> None:
    """Callers who share an attempt share its failure, and the next attempt is a new one."""
    async with Puppet(folder / "s") as puppet:
        wire = (await opened.backend(puppet.url)).wire()
        puppet.answers["HELLO"] = None
        results = await asyncio.gather(wire.connect(), wire.connect(), return_exceptions=True)
        assert [type(result) for result in results] == [Unavailable, Unavailable]
        puppet.answers["HELLO"] = b"%0\r\n"
        await wire.connect()
        assert wire.client_id == 7


# Closing


async def test_close_fails_what_is_outstanding(server: Server) -> None:
    """close() does not wait for replies: whoever waits learns at once that nobody knows."""
    backend = await open_backend(server.url)
    wire = backend.wire()
    await wire.connect()
    outstanding = [wire.send([("BLPOP", "nothing", 0)]), wire.send([("PING",)])]
    await one_turn()
    await backend.close()
    results = await asyncio.gather(*outstanding, return_exceptions=True)
    assert [getattr(result, "sent", None) for result in results] == [True, True]


async def test_close_leaves_nothing_behind(server: Server) -> None:
    """After close() no task is left, wires of the back end included, and closing again is fine."""
    backend = await open_backend(server.url)
    wires = [backend.wire() for _ in range(3)]
    for wire in wires:
        await wire.connect()
    await backend.command("PING")
    wires[0].send([("PING",)])
    await backend.close()
    await backend.close()
    await wires[1].close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    with pytest.raises(Unavailable, match="closed"):
        await wires[0].connect()
    with pytest.raises(Unavailable, match="closed"):
        backend.wire()
    with pytest.raises(Unavailable, match="closed"):
        await backend.command("PING")


async def test_close_does_not_wait_for_a_server_that_does_not_read(folder: Path) -> None:
    """What is still to be written is dropped, so that close() is quick whatever the server does."""

    class Deaf(Puppet):
        async def reply(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
            if self.asked[-1] == "DEAFEN":
                await asyncio.get_running_loop().create_future()
            await super().reply(writer, answer)

    async with Deaf(folder / "s") as puppet:
        backend = await open_backend(puppet.url)
        wire = backend.wire()
        await wire.connect()
        large = wire.send([("DEAFEN",), ("ECHO", b"x" * 8_000_000)])
        await one_turn()
        started_at = time.monotonic()
        await backend.close()
        assert time.monotonic() - started_at < 1
        with pytest.raises(ConnectionLost):
            await large


async def test_close_while_connecting_ends_the_attempt(folder: Path, opened: Opener) -> None:
    """close() during connect() ends it: the waiting caller gets Unavailable, not a cancellation."""
    async with Puppet(folder / "s") as puppet:
        wire = (await opened.backend(puppet.url)).wire()
        asked = len(puppet.asked)
        puppet.answers["HELLO"] = b""
        attempt = asyncio.create_task(wire.connect())
        while len(puppet.asked) == asked:
            await one_turn()
        await wire.close()
        with pytest.raises(Unavailable, match="closed"):
            await attempt


# Single commands


async def test_command_gives_the_raw_reply(server: Server, opened: Opener) -> None:
    """A single command travels beside the wires; an error reply is raised with its whole text."""
    backend = await opened.backend(server.url)
    assert await backend.command("ECHO", b"\xff") == b"\xff"
    assert await backend.command(b"DEL", "command:absent", 1) == 0
    with pytest.raises(ResponseError, match=r"^NOSCRIPT "):
        await backend.command("EVALSHA", "a" * 40, 0)


async def test_cancelled_command_does_not_hold_up_the_next(
    real_server: Server, opened: Opener
) -> None:
    """A command that waits long for its reply is dropped with its connection when cancelled."""
    backend = await opened.backend(real_server.url)
    await backend.command("PING")
    long = asyncio.create_task(backend.command("BLPOP", "nothing", 0))
    while b"cmd=blpop" not in await backend.command("CLIENT", "LIST"):
        pass
    long.cancel()
    with pytest.raises(asyncio.CancelledError):
        await long
    assert await backend.command("PING") == b"PONG"


async def test_commands_wait_for_a_connection_of_the_pool(server: Server, opened: Opener) -> None:
    """More commands than the pool has connections take turns."""
    backend = await opened.backend(server.url)
    replies = await asyncio.gather(*(backend.command("ECHO", number) for number in range(40)))
    assert replies == [b"%d" % number for number in range(40)]


# What is examined at start


async def test_server_is_described(server: Server, opened: Opener) -> None:
    """ServerInfo tells product, version, whether `#!lua` is known, and what is kept on disk."""
    info = (await opened.backend(server.url)).info
    assert info.url == server.url
    assert info.name == {"valkey-9": "valkey", "memory": "memory"}.get(server.kind, "redis")
    assert info.persistence == ("memory" if server.kind == "memory" else "none")
    assert info.shebang == server.knows_flags
    assert server.kind == "memory" or info.version == server.version


async def test_persistence_is_described(private_server: PrivateServer, opened: Opener) -> None:
    """Snapshots are "rdb"; an append-only file is "aof:" and its fsync policy."""
    server = private_server(appendonly="no")

    async def persistence() -> str:
        return (await opened.backend(server.url)).info.persistence

    assert await persistence() == "none"
    server.raw.config_set("save", "3600 1")
    assert await persistence() == "rdb"
    server.raw.config_set("appendonly", "yes")
    server.raw.config_set("appendfsync", "always")
    assert await persistence() == "aof:always"
    server.raw.acl_setuser(
        "plain", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-config"]
    )
    user_url = server.url.replace("unix://", "unix://plain:any@")
    assert (await opened.backend(user_url)).info.persistence == "aof:unknown"
    server.raw.config_set("appendonly", "no")
    assert (await opened.backend(user_url)).info.persistence == "unknown"


async def test_tcp_url_works(private_server: PrivateServer, opened: Opener) -> None:
    """redis:// connects by host, port and database."""
    port = free_port()
    private_server(port=str(port), bind="127.0.0.1")
    backend = await opened.backend(f"redis://127.0.0.1:{port}/3")
    assert backend.info.url == f"redis://127.0.0.1:{port}/3"
    wire = backend.wire()
    await wire.connect()
    assert await wire.send([("SET", "a", 1), ("GET", "a")]) == [b"OK", b"1"]
    assert b" db=3 " in await backend.command("CLIENT", "INFO")


async def test_eviction_policy_is_refused(
    private_server: PrivateServer, opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that may evict is refused with the way out; allow_eviction=True overrides it."""
    server = private_server(maxmemory_policy="allkeys-lru")
    with pytest.raises(Unavailable) as unavailable:
        await open_backend(server.url)
    for part in ("allkeys-lru", "CONFIG SET maxmemory-policy noeviction", "allow_eviction=True"):
        assert part in str(unavailable.value)

    backend = await opened.backend(server.url, allow_eviction=True)
    assert await backend.command("PING") == b"PONG"
    assert "allkeys-lru" in caplog.text


async def test_untold_eviction_policy_is_refused(folder: Path) -> None:
    """A server that does not tell its policy cannot be trusted to have the right one."""
    info = INFO.replace("maxmemory_policy:noeviction\r\n", "")
    async with Puppet(folder / "s", {"INFO": bulk(info)}) as puppet:
        with pytest.raises(Unavailable, match="which it does not tell"):
            await open_backend(puppet.url)


@pytest.mark.parametrize(
    ("info", "version"),
    [
        ("redis_version:6.2.0", (6, 2, 0)),
        ("redis_version:7.4", (7, 4, 0)),
        ("redis_version:7.2.4\r\nvalkey_version:8.1.10", (8, 1, 10)),
        ("redis_version:5.0.0\r\nvalkey_version:7.2.5-rc1", (7, 2, 5)),
    ],
)
async def test_version_is_accepted(
    info: str, version: tuple[int, int, int], folder: Path, opened: Opener
) -> None:
    """Redis from 6.2 on, and every Valkey by its own version, are accepted."""
    info = INFO.replace("redis_version:7.2.0", info)
    async with Puppet(folder / "s", {"INFO": bulk(info)}) as puppet:
        assert (await opened.backend(puppet.url)).info.version == version


@pytest.mark.parametrize("version", ["6.0.16", "2.8", "", "odd"])
async def test_old_version_is_refused(version: str, folder: Path) -> None:
    """Redis before 6.2, or of a version that nobody can read, is refused by name."""
    info = INFO.replace("7.2.0", version)
    async with Puppet(folder / "s", {"INFO": bulk(info)}) as puppet:
        with pytest.raises(Unavailable, match=r"needs 6\.2") as unavailable:
            await open_backend(puppet.url)
    assert version in str(unavailable.value)


async def test_loading_server_is_waited_for(folder: Path, opened: Opener) -> None:
    """A server that still reads its data is asked again until it is ready."""

    class Loading(Puppet):
        async def reply(self, writer: asyncio.StreamWriter, answer: bytes) -> None:
            if self.asked.count("INFO") < 3:
                answer = answer.replace(b"loading:0", b"loading:1")
            await super().reply(writer, answer)

    async with Loading(folder / "s") as puppet:
        await opened.backend(puppet.url)
        assert puppet.asked.count("INFO") == 3


async def test_loading_is_waited_for_within_the_timeout(folder: Path) -> None:
    """A server that does not get ready in time is reported as loading, not as broken."""
    info = INFO.replace("loading:0", "loading:1")
    async with Puppet(folder / "s", {"INFO": bulk(info)}) as puppet:
        with pytest.raises(Unavailable, match="still loading its data after 120 ms"):
            await open_backend(puppet.url, timeout_ms=120)


async def test_server_that_hangs_up_during_the_examination(folder: Path) -> None:
    """Losing the server while it is examined is Unavailable, as all trouble at start is."""
    async with Puppet(folder / "s", {"INFO": None}) as puppet:
        with pytest.raises(Unavailable, match="closed the connection"):
            await open_backend(puppet.url)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"HELLO": b"-ERR unknown command 'HELLO'\r\n"}, "does not speak RESP3"),
        ({"HELLO": b"-ERR max number of clients reached\r\n"}, "maxclients"),
        ({"HELLO": b"-DENIED protected mode\r\n"}, "DENIED"),
        ({"HELLO": b"HTTP/1.1 400 Bad Request\r\n\r\n"}, "cannot connect"),
        ({"HELLO": None}, "cannot connect"),
        ({"HELLO": b"+OK\r\n", "CLIENT": b"-NOPERM no permission\r\n"}, "client|id"),
        ({"CLIENT": b":7\r\n:8\r\n"}, "more than it was asked for"),
        ({"INFO": b"-NOPERM no permission\r\n"}, "+info"),
    ],
    ids=["old", "full", "protected", "http", "hangs up", "no client id", "talks", "no info"],
)
async def test_refusal_at_start_is_explained(
    answers: dict[str, bytes | None], words: str, folder: Path
) -> None:
    """Each way in which a server may refuse is Unavailable and says what it is about."""
    async with Puppet(folder / "s", answers) as puppet:
        with pytest.raises(Unavailable) as unavailable:
            await open_backend(puppet.url, timeout_ms=500)
    assert words in str(unavailable.value)


async def test_silent_server_is_unavailable_at_the_deadline(folder: Path) -> None:
    """A server that accepts and says nothing costs one deadline."""
    async with Puppet(folder / "s", {"HELLO": b""}) as puppet:
        with pytest.raises(Unavailable, match="no answer within 120 ms"):
            await open_backend(puppet.url, timeout_ms=120)


async def test_unreachable_server_is_named(folder: Path) -> None:
    """A closed port and a missing socket are Unavailable, with address and advice."""
    url = f"redis://127.0.0.1:{free_port()}/0"
    with pytest.raises(Unavailable, match="check that the server runs") as unavailable:
        await open_backend(url)
    assert url in str(unavailable.value)

    url = f"unix://{folder}/absent"
    with pytest.raises(Unavailable, match="No such file or directory") as unavailable:
        await open_backend(url)
    assert url in str(unavailable.value)


async def test_wrong_database_is_named(real_server: Server) -> None:
    """A database that the server does not have is one clear error."""
    with pytest.raises(Unavailable, match="has no database 99"):
        await open_backend(f"{real_server.url}?db=99")


# Secrets


async def test_password_is_used_and_never_shown(
    private_server: PrivateServer, opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    """The right password opens, a wrong one is refused; no error, repr or log shows either."""
    caplog.set_level("DEBUG")
    server = private_server(requirepass=SECRET)
    with_password = server.url.replace("unix://", f"unix://default:{SECRET}@")
    backend = await opened.backend(with_password)
    wire = backend.wire()
    await wire.connect()
    assert await wire.send([("PING",)]) == [b"PONG"]
    assert SECRET not in repr(backend) + repr(backend.info) + repr(wire)

    for url in (server.url, with_password.replace(SECRET, f"wrong-{SECRET}")):
        with pytest.raises(Unavailable, match="refuses the user name or password") as unavailable:
            await open_backend(url)
        assert SECRET not in everything_said(unavailable.value)
    assert SECRET not in caplog.text


async def test_password_echoed_by_a_server_is_not_shown(folder: Path) -> None:
    """A server that does not know HELLO repeats its arguments; leasekit does not repeat those."""
    echo = f"-ERR unknown command `HELLO`, with args beginning with: `AUTH`, `{SECRET}`\r\n"
    async with Puppet(folder / "s", {"HELLO": echo.encode()}) as puppet:
        url = puppet.url.replace("unix://", f"unix://default:{SECRET}@")
        with pytest.raises(Unavailable) as unavailable:
            await open_backend(url)
    assert SECRET not in everything_said(unavailable.value)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}/2@host:6379/0",
        f"redis://:{SECRET}#2@host:6379/0",
        f"redis://:{SECRET}?2@host:6379/0",
        f"redis://:{SECRET}@host:port/0",
        f"redis://:{SECRET}@[::1/0",
        f"redis://:{SECRET}\u2100@host/0",
        f"redis://:{SECRET}@host/zero",
        f"redis://:{SECRET}@host/0?db={SECRET}",
        f"unix://:{SECRET}@host/socket",
        f"redis+cluster://:{SECRET}@host/0",
        f"mysql://:{SECRET}@host/0",
        SECRET,
    ],
)
async def test_malformed_url_is_refused_without_its_password(url: str) -> None:
    """Even where the password is what breaks the URL, the error does not show it."""
    with pytest.raises(InvalidInput) as invalid:
        await open_backend(url)
    assert invalid.value.field.startswith("url")
    assert SECRET not in everything_said(invalid.value)


# URLs


@pytest.mark.parametrize(
    ("url", "field"),
    [
        ("", "url.scheme"),
        ("localhost:6379", "url.scheme"),
        ("http://localhost", "url.scheme"),
        ("redis+sentinel://localhost/main", "url.scheme"),
        ("redis+cluster://localhost", "url.scheme"),
        ("redis://localhost:0", "url.port"),
        ("redis://localhost:65536", "url.port"),
        ("redis://localhost:x", "url.port"),
        ("redis://localhost/zero", "url.db"),
        ("redis://localhost?db=-1", "url.db"),
        ("redis://localhost?db=", "url.db"),
        ("redis://localhost?db=zero", "url.query"),
        ("redis://localhost?retry_on_timeout=yes", "url.query"),
        ("redis://localhost?health_check_interval=3", "url.query"),
        ("redis://localhost?protocol=2", "url.query"),
        ("redis://localhost#a", "url.fragment"),
        ("redis://localhost?ssl_ca_certs=/ca.pem", "url.ssl_ca_certs"),
        ("rediss://localhost?ssl_min_version=769", "url.ssl_min_version"),
        ("rediss://localhost?ssl_ca_certs=/absent/ca.pem", "url.ssl"),
        ("rediss://localhost?ssl_cert_reqs=maybe", "url.ssl"),
        ("unix://", "url.path"),
        ("unix://relative/socket", "url.path"),
        ("embedded://folder?db=1", "url.query"),
        ("memory://name?db=1", "url.query"),
        ("memory://a/b", "url.name"),
    ],
)
async def test_unusable_url_is_refused(url: str, field: str) -> None:
    """A URL that cannot be used is refused before anything is opened, naming the part."""
    with pytest.raises(InvalidInput) as invalid:
        await open_backend(url)
    assert invalid.value.field == field
    assert field in str(invalid.value)


async def test_timeout_must_be_positive() -> None:
    """A deadline of nothing would fail everything."""
    with pytest.raises(InvalidInput, match="timeout_ms"):
        await open_backend("memory://", timeout_ms=0)


async def test_environment_names_the_server(
    server: Server, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a URL, LEASEKIT_URL is used."""
    monkeypatch.setenv("LEASEKIT_URL", server.url)
    backend = await opened.backend(None)  # type: ignore[arg-type]
    assert backend.info.url == server.url


# memory://


async def test_memory_is_private_unless_named(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back ends of one memory://name share their data; each memory:// has its own."""
    monkeypatch.delitem(_memory_servers, "shop", raising=False)
    one, two = await opened.backend("memory://shop"), await opened.backend("memory://shop")
    await one.command("SET", "a", 1)
    assert await two.command("GET", "a") == b"1"

    one, two = await opened.backend("memory://"), await opened.backend("memory://")
    await one.command("SET", "a", 1)
    assert await two.command("GET", "a") is None


async def test_memory_says_once_that_it_is_not_durable(
    opened: Opener, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning for each start, none for each wire."""
    await opened.wire("memory://")
    assert caplog.text.count("not durable") == 1


@pytest.mark.parametrize("package", ["fakeredis", "lupa"])
async def test_memory_without_its_extra_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without fakeredis or its Lua, memory:// names the extra."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(Unavailable, match=r"leasekit\[memory\]"):
        await open_backend("memory://")


async def test_failure_inside_the_fake_server_is_an_error_reply(
    opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug of fakeredis fails the command that met it and no other."""
    from fakeredis.aioredis import AsyncFakeSocket

    def break_down(*_: object) -> None:
        raise AssertionError("a bug")

    wire = await opened.wire("memory://")
    with monkeypatch.context() as broken:
        broken.setattr(AsyncFakeSocket, "echo", break_down)
        replies = await wire.send([("SET", "a", 1), ("ECHO", "x"), ("GET", "a")])
    assert [replies[0], replies[2]] == [b"OK", b"1"]
    assert str(replies[1]) == "ERR the fake server failed: AssertionError"


# embedded://


async def test_embedded_server_is_used_and_left(folder: Path) -> None:
    """embedded:// starts a server in the directory of the URL and leaves it at close."""
    backend = await open_backend(f"embedded://{folder}")
    process_id = 0
    try:
        assert backend.info.url == f"embedded://{folder}"
        assert backend.info.persistence == "aof:always"
        facts = (await backend.command("INFO", "server")).decode()
        process_id = int(facts.partition("process_id:")[2].split()[0])
    finally:
        await backend.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process_id, 0)


async def test_embedded_server_is_left_when_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing keeps running when the start fails."""
    stopped: list[str] = []

    class Unfit:
        socket_path = "/absent/socket"
        directory = "/absent"

        async def stop(self) -> None:
            stopped.append(self.directory)

    async def start(directory: str | None) -> Unfit:
        assert directory == "relative/folder"
        return Unfit()

    monkeypatch.setattr("leasekit.embedded.start", start)
    with pytest.raises(Unavailable):
        await open_backend("embedded://relative/folder")
    assert stopped == ["/absent"]


# TLS and uvloop


@pytest.fixture
def tls(private_server: PrivateServer, folder: Path) -> str:
    """A TLS server for the name localhost; gives host, port and the query naming its authority."""
    try:
        binary = binary_of("redis-path")
    except NoServer as error:
        pytest.skip(str(error))
    linked = subprocess.run(["ldd", binary], capture_output=True, text=True).stdout
    if "libssl" not in linked:
        pytest.skip(f"{binary} was built without TLS")
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: no certificate for the test")
    key, certificate, port = folder / "key.pem", folder / "cert.pem", free_port()
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    private_server(
        "redis-path",
        bind="127.0.0.1",
        tls_port=str(port),
        tls_cert_file=str(certificate),
        tls_key_file=str(key),
        tls_ca_cert_file=str(certificate),
        tls_auth_clients="no",
    )
    return f"localhost:{port}?ssl_ca_certs={certificate}"


async def tls_round_trip(url: str) -> list[Any]:
    backend = await open_backend(url)
    try:
        wire = backend.wire()
        await wire.connect()
        replies = await wire.send([("SET", "a", b"x" * 100_000), ("GET", "a")])
        assert await backend.command("PING") == b"PONG"
        return replies
    finally:
        await backend.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_tls_with_a_known_authority_works(run: Callable[[Any], Any], tls: str) -> None:
    """rediss:// encrypts, and replies are read the same way."""
    assert run(tls_round_trip(f"rediss://{tls}")) == [b"OK", b"x" * 100_000]


async def test_tls_with_an_unknown_authority_is_refused(tls: str) -> None:
    """A certificate that nobody vouches for is refused, and the error says what to give."""
    with pytest.raises(Unavailable, match=r"certificate verify failed.*ssl_ca_certs"):
        await open_backend(f"rediss://{tls.partition('?')[0]}")


async def test_tls_certificate_for_another_host_is_refused(tls: str) -> None:
    """The certificate must name the host of the URL."""
    with pytest.raises(Unavailable, match="certificate verify failed"):
        await open_backend(f"rediss://{tls.replace('localhost:', '127.0.0.1:')}")


@pytest.mark.parametrize("option", ["ssl_cert_reqs=none", "ssl_check_hostname=no"])
async def test_switched_off_certificate_check_is_logged(
    option: str, tls: str, caplog: pytest.LogCaptureFixture, opened: Opener
) -> None:
    """Whoever switches a check off gets a connection and a warning."""
    address = tls.replace("localhost:", "127.0.0.1:")
    backend = await opened.backend(f"rediss://{address}&{option}")
    assert await backend.command("PING") == b"PONG"
    assert "certificate" in caplog.text


async def uvloop_life(url: str) -> tuple[list[Any], BaseException]:
    backend = await open_backend(url, timeout_ms=200)
    wire = backend.wire()
    await wire.connect()
    replies = await asyncio.gather(*(wire.send([("ECHO", number)]) for number in range(100)))
    lost = await asyncio.gather(wire.send([("BLPOP", "nothing", 0)]), return_exceptions=True)
    await wire.connect()
    assert await wire.send([("PING",)]) == [b"PONG"]
    wire.send([("PING",)])
    await backend.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert isinstance(lost[0], ConnectionLost)
    return replies, lost[0]


def test_uvloop_carries_a_wire_as_asyncio_does(real_server: Server) -> None:
    """Order, deadline, reconnect and close hold under uvloop too."""
    replies, lost = uvloop.run(uvloop_life(real_server.url))
    assert replies == [[b"%d" % number] for number in range(100)]
    assert isinstance(lost, ConnectionLost)
    assert lost.sent
