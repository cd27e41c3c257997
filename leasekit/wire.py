"""One FIFO pipelined connection, behind an interface that knows nothing of leases or URLs.

A `Wire` takes commands and gives their replies in order. That is all the rest of leasekit knows
about talking to a server, so that a leaner carrier may replace redis-py's connection one day, and
a wire per cluster node may stand where one stands today.

**redis-py opens, leasekit talks.** redis-py resolves, connects, speaks TLS and does the handshake
(HELLO, AUTH, SELECT). After that its `read_response` would cost a timeout context, a lock and
several coroutines per reply, and there are tens of thousands of replies a second. So `_Pipeline`
becomes the protocol of the open transport (`BaseTransport.set_protocol`, public asyncio, also on
TLS and uvloop) and feeds what arrives straight into a hiredis reader: no task, no queue, no copy.
The only private thing it touches is `connection._writer`, for the transport: should redis-py rename
that, every test of a wire fails.

**Nothing is ever sent twice here.** A lost connection fails what is outstanding with
`ConnectionLost`; whether to repeat, and under which name, is decided above.

**Deadlines without a timer per call.** A single timer per connection looks at the oldest
outstanding send; the replies come in order, so no later one can be overdue before it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeAlias, cast

from hiredis import ProtocolError, PushNotification, Reader, pack_command
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError

from leasekit.errors import Unavailable

__all__ = ["Command", "ConnectionLost", "MemoryEars", "MemoryWire", "OnPush", "RedisWire", "Wire"]

Command: TypeAlias = Sequence[bytes | str | int]
OnPush: TypeAlias = Callable[[Sequence[Any]], None]  # what the server says unasked (RESP3)

_NOT_ENOUGH_DATA = object()
_CLOSED_HERE = "the connection was closed by this process"


class ConnectionLost(Exception):
    """The connection ended with commands outstanding. Internal: users never see it.

    `sent` False: nothing of these commands can have reached the server. True: nobody knows.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class Wire(Protocol):
    """One FIFO pipelined connection."""

    @property
    def client_id(self) -> int | None:
        """The server's CLIENT ID of the latest connection; None before it, and in memory."""

    @property
    def is_connected(self) -> bool:
        """Whether a send now would be written."""

    async def connect(self) -> None:
        """Connect, or do nothing if connected; concurrent calls share one attempt.

        May be called again after a loss. Raises Unavailable.
        """

    def send(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """Write all commands at once; the future gives their replies in order.

        A reply is bytes, int, None or a list of these, never text (commands outside of scripts
        may also answer RESP3's float, bool and dict). An error reply is a ResponseError instance
        in the list with the server's full text, not raised. The future fails with ConnectionLost
        when the connection ends first, when the deadline passes and when the wire is closed.
        It may be cancelled or dropped: the order of the others holds. Never blocks. Raises
        TypeError, before anything is written, for an argument that is no bytes, str or int.
        """

    async def close(self) -> None:
        """Close for good: outstanding sends fail. Returns when the transport is gone."""


class _Pipeline(asyncio.Protocol):
    """One physical connection: packs and writes, reads and resolves, and ends once."""

    def __init__(
        self, connection: AbstractConnection, *, timeout_ms: int, on_push: OnPush | None
    ) -> None:
        # redis-py keeps the writer, and so the ownership: its disconnect() ends the transport.
        writer = cast(Any, connection)._writer
        self._transport = cast(asyncio.Transport, writer.transport)
        self._stream_protocol = cast(asyncio.Protocol, self._transport.get_protocol())
        self._loop = asyncio.get_running_loop()
        self._timeout_s = timeout_ms / 1_000
        self._on_push = on_push
        self._timer: asyncio.TimerHandle | None = None
        reader = Reader(replyError=ResponseError, notEnoughData=_NOT_ENOUGH_DATA)
        self._feed, self._next_reply = reader.feed, reader.gets
        # What is outstanding, oldest first: reply count, future, deadline in loop time.
        self._outstanding: deque[tuple[int, asyncio.Future[list[Any]], float]] = deque()
        self._replies: list[Any] = []
        self.is_open = True
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self._transport.set_protocol(self)

    def send(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        future: asyncio.Future[list[Any]] = self._loop.create_future()
        if not commands:
            future.set_result([])
            return future
        packed = [pack_command(cast(Any, tuple(command))) for command in commands]
        deadline = self._loop.time() + self._timeout_s
        self._transport.write(packed[0] if len(packed) == 1 else b"".join(packed))
        self._outstanding.append((len(packed), future, deadline))
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._check_deadline)
        return future

    def tell(self, commands: Sequence[Command]) -> None:
        """Write commands that are answered by pushes alone: SUBSCRIBE and its kin."""
        packed = [pack_command(cast(Any, tuple(command))) for command in commands]
        self._transport.write(b"".join(packed))

    def data_received(self, data: bytes) -> None:
        next_reply, outstanding, replies = self._next_reply, self._outstanding, self._replies
        try:
            self._feed(data)
            while (reply := next_reply()) is not _NOT_ENOUGH_DATA:
                if type(reply) is PushNotification:
                    # The server's own message (RESP3): the answer to no command.
                    if self._on_push is not None:
                        self._on_push(reply)
                    continue
                if not outstanding:
                    self.end("the server sent a reply that nobody asked for")
                    return
                replies.append(reply)
                if len(replies) == outstanding[0][0]:
                    future = outstanding.popleft()[1]
                    if not future.done():
                        future.set_result(replies)
                    replies = []
        except ProtocolError:
            self.end("the server sent something that is not the Redis protocol")
        self._replies = replies

    def eof_received(self) -> None:
        self.end("the server closed the connection")

    def connection_lost(self, error: Exception | None) -> None:
        self.end("the connection broke" if error else "the server closed the connection")
        # redis-py's disconnect() waits for its own stream to hear of it.
        self._stream_protocol.connection_lost(error)

    def end(self, reason: str) -> None:
        """Abort the transport and fail what is outstanding; a second end does nothing."""
        if not self.is_open:
            return
        self.is_open = False
        self.lost.set_result(None)
        self._transport.abort()
        if self._timer is not None:
            self._timer.cancel()
        while self._outstanding:
            _fail(self._outstanding.popleft()[1], reason, sent=True)

    def _check_deadline(self) -> None:
        # After a pause of this process (a blocked loop, SIGSTOP) replies may lie in the socket;
        # asyncio and uvloop both read before they run timers, so what came in time is gone here.
        self._timer = None
        if not self._outstanding:
            return
        deadline = self._outstanding[0][2]
        if self._loop.time() >= deadline:
            self.end(f"no reply within {round(self._timeout_s * 1_000)} ms")
        else:
            self._timer = self._loop.call_at(deadline, self._check_deadline)


class RedisWire:
    """A `Wire` over connections that `make_connection` builds and redis-py opens.

    `explain` turns whatever redis-py raised while connecting into the Unavailable to raise.
    `on_push` gets what the server says unasked; it must not raise.
    """

    def __init__(
        self,
        make_connection: Callable[[], AbstractConnection],
        explain: Callable[[Exception], Unavailable],
        *,
        timeout_ms: int,
        on_push: OnPush | None = None,
    ) -> None:
        self._make_connection = make_connection
        self._explain = explain
        self._timeout_ms = timeout_ms
        self._on_push = on_push
        self._connection: AbstractConnection | None = None
        self._pipeline: _Pipeline | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._is_closed = False
        self.client_id: int | None = None

    @property
    def is_connected(self) -> bool:
        return self._pipeline is not None and self._pipeline.is_open

    async def connect(self) -> None:
        if self._is_closed:
            raise Unavailable(f"{_CLOSED_HERE}: nothing was sent; make a new one")
        if self.is_connected:
            return
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._open())
            self._connecting.add_done_callback(self._forget_attempt)
        attempt = self._connecting
        await asyncio.wait([attempt])  # A caller who gives up does not cancel it for the others.
        if attempt.cancelled():
            raise Unavailable(f"{_CLOSED_HERE}: nothing was sent")
        attempt.result()

    def send(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        if self._pipeline is not None and self._pipeline.is_open:
            return self._pipeline.send(commands)
        return _not_connected()

    @property
    def lost(self) -> asyncio.Future[None] | None:
        """What is done once the latest connection has ended; None before the first."""
        return None if self._pipeline is None else self._pipeline.lost

    def tell(self, commands: Sequence[Command]) -> None:
        """Write commands that are answered by pushes alone; nothing happens without a connection."""
        if self._pipeline is not None and self._pipeline.is_open:
            self._pipeline.tell(commands)

    async def close(self) -> None:
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        await self._disconnect()

    async def _open(self) -> None:
        await self._disconnect()
        self._connection = connection = self._make_connection()
        failure: Unavailable | None = None
        try:
            async with asyncio.timeout(self._timeout_ms / 1_000):
                await cast(Any, connection).connect()
                await connection.send_command("CLIENT", "ID")
                self.client_id = await connection.read_response()
                # Bytes in redis-py's buffers would be lost with the change of protocol, and no
                # server has a reason to speak now: better no connection than a shifted one.
                if await connection.can_read():
                    raise RedisError("the server sent more than it was asked for")
            self._pipeline = _Pipeline(
                connection, timeout_ms=self._timeout_ms, on_push=self._on_push
            )
        except Exception as error:  # A server that answers oddly can make redis-py raise anything.
            failure = self._explain(error)
        finally:
            if self._pipeline is None:
                await self._disconnect()
        # Raised here, not in the except clause: the text of a refused handshake can hold the
        # password, and must not travel along as the context of this error.
        if failure is not None:
            raise failure

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if self._pipeline is not None:
            self._pipeline.end(_CLOSED_HERE)
            self._pipeline = None
        if connection is not None:
            with contextlib.suppress(RedisError, OSError):
                await connection.disconnect()

    def _forget_attempt(self, attempt: asyncio.Task[None]) -> None:
        self._connecting = None
        if not attempt.cancelled():
            attempt.exception()


class MemoryWire:
    """A `Wire` over fakeredis: one task executes the commands in order.

    `make_socket` gives fakeredis' end of a connection: `sendall(packed)` executes, `responses` is
    the queue of replies. A failure inside fakeredis itself is an error reply, as all else is.
    """

    client_id: int | None = None

    def __init__(self, make_socket: Callable[[], Any]) -> None:
        self._make_socket = make_socket
        self._socket: Any = None
        self._server_task: asyncio.Task[None] | None = None
        self._outstanding: deque[tuple[Sequence[bytes], asyncio.Future[list[Any]]]] = deque()
        self._arrived = asyncio.Event()
        self._is_closed = False

    @property
    def is_connected(self) -> bool:
        return self._server_task is not None and not self._is_closed

    async def connect(self) -> None:
        if self._is_closed:
            raise Unavailable(f"{_CLOSED_HERE}: nothing was sent; make a new one")
        if self._server_task is None:
            self._socket = self._make_socket()
            self._server_task = asyncio.create_task(self._serve())

    def send(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        if not self.is_connected:
            return _not_connected()
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        packed = [pack_command(cast(Any, tuple(command))) for command in commands]
        self._outstanding.append((packed, future))
        self._arrived.set()
        return future

    async def close(self) -> None:
        self._is_closed = True
        while self._outstanding:
            _fail(self._outstanding.popleft()[1], _CLOSED_HERE, sent=True)
        if self._server_task is not None:
            self._server_task.cancel()
            await asyncio.wait([self._server_task])
            self._socket = None

    async def _serve(self) -> None:
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._outstanding:
                packed, future = self._outstanding[0]
                replies = [await self._execute(command) for command in packed]
                self._outstanding.popleft()
                if not future.done():
                    future.set_result(replies)

    async def _execute(self, packed: bytes) -> Any:
        try:
            self._socket.sendall(packed)
            return _with_code(await cast(Awaitable[Any], self._socket.responses.get()))
        except Exception as error:
            self._socket = self._make_socket()  # Its parser died of the exception.
            return ResponseError(f"ERR the fake server failed: {type(error).__name__}")


class MemoryEars:
    """What a wire with `on_push` is over fakeredis: it subscribes, and hears; it asks nothing."""

    def __init__(self, make_socket: Callable[[], Any], on_push: OnPush) -> None:
        self._make_socket = make_socket
        self._on_push = on_push
        self._socket: Any = None
        self._hearing: asyncio.Task[None] | None = None
        self.lost: asyncio.Future[None] | None = None

    @property
    def is_connected(self) -> bool:
        return self._hearing is not None

    async def connect(self) -> None:
        if self._hearing is None:
            self.lost = asyncio.get_running_loop().create_future()
            self._socket = self._make_socket()
            self._hearing = asyncio.create_task(self._hear())

    def tell(self, commands: Sequence[Command]) -> None:
        if self._socket is not None:
            for command in commands:
                self._socket.sendall(pack_command(cast(Any, tuple(command))))

    def send(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]:
        """The answer to a PING, which is all that is asked of ears: they cannot be cut off."""
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        future.set_result([b"PONG" for _ in commands])
        return future

    async def close(self) -> None:
        if self._hearing is not None:
            self.tell([("UNSUBSCRIBE",), ("PUNSUBSCRIBE",)])
            self._hearing.cancel()
            await asyncio.wait([self._hearing])
            self._hearing = self._socket = None

    async def _hear(self) -> None:
        while True:
            reply = await cast(Awaitable[Any], self._socket.responses.get())
            if isinstance(reply, list):
                self._on_push(reply)


def _with_code(reply: Any) -> Any:
    """Give the error replies of fakeredis, nested ones too, the code word that a server sends."""
    if isinstance(reply, list):
        return [_with_code(item) for item in reply]
    if isinstance(reply, RedisError):
        return ResponseError(f"{reply.status_code} {reply}" if reply.status_code else str(reply))
    return reply


def _not_connected() -> asyncio.Future[list[Any]]:
    future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
    _fail(future, "there is no connection", sent=False)
    return future


def _fail(future: asyncio.Future[list[Any]], reason: str, *, sent: bool) -> None:
    if not future.done():
        future.set_exception(ConnectionLost(reason, sent=sent))
        future.exception()  # So that a dropped future does not complain when it is collected.
