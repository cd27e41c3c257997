"""Many callers, few commands: the coalescer, where the throughput comes from.

Calls of the same command for the same tenant (and route, lease length, ...) that arrive in one turn
of the event loop, or while earlier ones are under way, travel in one script call; calls for different
tenants travel in one write. A *flight* is one write: the commands of several groups, up to FLIGHT_ROWS
rows or FLIGHT_BYTES, which is about a millisecond of server time. FLIGHTS_MAX of them are under way
at a time, so that client and server work side by side; what arrives meanwhile makes the next one
larger. A lone call finds no flight under way and leaves in the same turn: no timer exists.

What holds: calls of one group leave in the order of their arrival, on one connection; one failed item
fails only its caller; a caller who gives up before its call left costs nothing, and one who gives up
later has its claim undone when the answer arrives; the queue is bounded, and who finds it full waits.

Source: design 5; measured in bench/.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from redis.exceptions import ResponseError

from leasekit import scripts
from leasekit.connect import ConnectionLost, Wire
from leasekit.errors import LeasekitError, OutcomeUnknown, ScriptFailed, Unavailable
from leasekit.scripts import Argument, Script

__all__ = ["Coalescer", "Reply", "local_clock_s"]

FLIGHT_ROWS = 200
FLIGHT_BYTES = 128 * 1024
FLIGHTS_MAX = 3
ITEMS_MAX = 1_000
QUEUE_ROWS_MAX = 20_000
QUEUE_BYTES_MAX = 64 * 1024 * 1024
RECONNECT_FIRST_MS = 10
RECONNECT_MOST_MS = 500

_LOCAL_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def local_clock_s() -> float:
    """Seconds on a clock that no one sets and that goes on while the machine is suspended."""
    return time.clock_gettime(_LOCAL_CLOCK)


@dataclass(slots=True)
class Reply:
    """What the items of one script call have in common.

    head: what the script answered before the items, `now_ms` first. sent_at_s: the local clock just
    before the request was sent, so that a deadline counted from it is never too late.
    """

    head: list[Any]
    sent_at_s: float

    @property
    def now_ms(self) -> int:
        return int(self.head[0])


Variant = tuple[Any, ...]
Bind = Callable[[Script, Variant], Sequence[Argument]]
Decode = Callable[[Any, Any, Reply], Any]
Undo = Callable[[Any], None]
_Key = tuple[str, str, Variant]


class _Call(msgspec.Struct, eq=False, gc=False):
    """One item and who waits for it."""

    fields: Sequence[Argument]
    decode: Decode
    context: Any
    rows: int
    size: int
    undo: Undo | None
    future: Any


class _Group:
    """Calls that may share one script call."""

    __slots__ = ("bound", "calls", "head", "key", "script")

    def __init__(self, key: _Key, script: Script, bound: Sequence[Argument], head: int) -> None:
        self.key = key
        self.script = script
        self.bound = bound
        self.head = head
        self.calls: deque[_Call] = deque()

    @property
    def tenant(self) -> str:
        return self.key[1]


_Part = tuple[_Group, list[_Call]]


class Coalescer:
    """Gathers calls into flights over one wire. One event loop; `start` first, `close` last."""

    def __init__(self, wire: Wire, *, shebang: bool, timeout_ms: int) -> None:
        self._wire = wire
        self._shebang = shebang
        self._timeout_s = timeout_ms / 1_000
        self._groups: dict[_Key, _Group] = {}
        self._ready: deque[_Group] = deque()
        self._flights = 0
        self._queued_rows = 0
        self._queued_bytes = 0
        self._flush_is_due = False
        self._waiting: deque[tuple[_Key, _Call, Script, Bind, int]] = deque()
        self._returned: list[_Part] = []
        self._reconnecting: asyncio.Task[None] | None = None
        self._idle: asyncio.Future[None] | None = None
        self._is_closing = False
        self._is_undoing = False
        self._is_closed = False

    async def start(self) -> None:
        """Connect and give the server the scripts. Raises Unavailable or ScriptFailed."""
        self._loop = asyncio.get_running_loop()
        await self._connect()

    @property
    def queued_rows(self) -> int:
        """Rows that wait for a flight."""
        return self._queued_rows

    @property
    def flights(self) -> int:
        """Writes whose replies have not all arrived."""
        return self._flights

    def submit(
        self,
        script: Script,
        tenant: str,
        variant: Variant,
        bind: Bind,
        fields: Sequence[Argument],
        decode: Decode,
        *,
        context: Any = None,
        rows: int = 1,
        size: int = 0,
        head: int = 1,
        undo: Undo | None = None,
    ) -> asyncio.Future[Any]:
        """Queue one item; the future gives what `decode(item reply, context, Reply)` returns.

        Items of the same script, tenant and variant share a call; `bind(script, variant)` gives its
        keys and arguments. `rows` is what the item may take out of a batch, `size` its bytes, `head` how many
        values the script answers before the items. A LeasekitError that `decode` returns is raised
        to the caller. `undo` gets the result if the caller had given up by the time it arrived.
        """
        if self._is_closing and not self._is_undoing:
            raise Unavailable(
                "this client is closing or closed: nothing was sent; connect anew", tenant=tenant
            )
        future: asyncio.Future[Any] = self._loop.create_future()
        call = _Call(fields, decode, context, rows, size, undo, future)
        key = (script.name, tenant, variant)
        if self._waiting or self._is_full:
            # Back-pressure: the caller waits in line until the queue has room again.
            self._waiting.append((key, call, script, bind, head))
            return future
        group = self._groups.get(key)
        if group is None:
            group = self._open_group(key, script, bind, head)
        self._enter(group, call)
        return future

    async def close(self) -> None:
        """Refuse new calls, let those under way finish, then close the wire."""
        self._is_closing = True
        try:
            async with asyncio.timeout(self._timeout_s):
                while self._queued_rows or self._flights or self._waiting:
                    if self._idle is None or self._idle.done():
                        self._idle = self._loop.create_future()
                    await self._idle
        except TimeoutError:
            pass
        self._is_closed = True
        self._fail_queued("the client was closed")
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.wait([self._reconnecting])
        await self._wire.close()

    @property
    def _is_full(self) -> bool:
        return self._queued_rows >= QUEUE_ROWS_MAX or self._queued_bytes >= QUEUE_BYTES_MAX

    def _open_group(self, key: _Key, script: Script, bind: Bind, head: int) -> _Group:
        group = self._groups[key] = _Group(key, script, bind(script, key[2]), head)
        self._ready.append(group)
        return group

    def _enter(self, group: _Group, call: _Call) -> None:
        group.calls.append(call)
        self._queued_rows += call.rows
        self._queued_bytes += call.size
        if not self._flush_is_due and self._flights < FLIGHTS_MAX:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _let_in(self) -> None:
        """Queue those who wait for room, in the order of their arrival, while there is room."""
        while self._waiting and not self._is_full:
            key, call, script, bind, head = self._waiting.popleft()
            if not call.future.cancelled():
                self._enter(
                    self._groups.get(key) or self._open_group(key, script, bind, head), call
                )

    def _flush_soon(self) -> None:
        if not self._flush_is_due and self._flights < FLIGHTS_MAX:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        if not self._wire.is_connected:
            self._reconnect()
            return
        while self._flights < FLIGHTS_MAX and self._ready:
            parts = self._next_flight()
            if parts:
                self._send(parts)
        if self._waiting:
            self._let_in()
        self._check_idle()

    def _next_flight(self) -> list[_Part]:
        """Take calls off the queue: groups in turn, so that a large one starves no other."""
        parts: list[_Part] = []
        rows = size = 0
        while self._ready and rows < FLIGHT_ROWS and size < FLIGHT_BYTES:
            group = self._ready.popleft()
            calls, taken = group.calls, []
            while calls:
                call = calls[0]
                if call.future.cancelled():
                    self._forget(calls.popleft())
                    continue
                if rows and (rows + call.rows > FLIGHT_ROWS or size + call.size > FLIGHT_BYTES):
                    break
                taken.append(calls.popleft())
                self._forget(call)
                rows += call.rows
                size += call.size
            if taken:
                parts.append((group, taken))
            if calls:
                if not taken:
                    # It needs more room than is left here: it comes first in the next one.
                    self._ready.appendleft(group)
                    break
                self._ready.append(group)
            else:
                del self._groups[group.key]
        return parts

    def _forget(self, call: _Call) -> None:
        self._queued_rows -= call.rows
        self._queued_bytes -= call.size

    def _send(self, parts: list[_Part], *, just_loaded: bool = False) -> None:
        commands = [
            scripts.call_command(
                group.script,
                group.bound,
                [field for call in calls for field in call.fields],
                shebang=self._shebang,
            )
            for group, calls in parts
        ]
        sent_at_s = local_clock_s()
        self._flights += 1
        flight = self._wire.send(commands)
        flight.add_done_callback(
            lambda future: self._landed(parts, sent_at_s, future, just_loaded=just_loaded)
        )

    def _landed(
        self,
        parts: list[_Part],
        sent_at_s: float,
        flight: asyncio.Future[list[Any]],
        *,
        just_loaded: bool,
    ) -> None:
        self._flights -= 1
        error = flight.exception()
        if error is None:
            missing = []
            for (group, calls), reply in zip(parts, flight.result(), strict=True):
                lacks = isinstance(reply, ResponseError) and scripts.is_missing(reply)
                if lacks and not just_loaded:
                    missing.append((group, calls))
                else:
                    self._settle(group, calls, reply, sent_at_s)
            if missing:
                self._load_and_send(missing)
        else:
            for group, calls in parts:
                self._lost(group, calls, error)
            if not self._flights:
                self._put_back()
        # After the callers that were just answered: what they ask next may join this flight.
        if self._ready or self._waiting:
            self._flush_soon()
        self._check_idle()

    def _settle(self, group: _Group, calls: list[_Call], reply: Any, sent_at_s: float) -> None:
        if isinstance(reply, ResponseError):
            self._fail(
                calls, lambda: scripts.translate(reply, group.script.name, tenant=group.tenant)
            )
            return
        if not isinstance(reply, list) or len(reply) != group.head + len(calls):
            # Whose answer is whose cannot be told: a caller must not get another one's.
            self._fail(calls, lambda: _unreadable(group, "of a wrong shape"))
            return
        shared = Reply(reply[: group.head], sent_at_s)
        for call, item in zip(calls, reply[group.head :], strict=True):
            future = call.future
            try:
                result = call.decode(item, call.context, shared)
            except Exception as error:  # One item that cannot be read fails only its caller.
                result = _unreadable(group, type(error).__name__)
            if future.cancelled():
                if call.undo is not None and not isinstance(result, LeasekitError):
                    self._undo(call.undo, result)
            elif isinstance(result, LeasekitError):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _undo(self, undo: Undo, result: Any) -> None:
        """Give back what nobody waits for any more, also while closing."""
        self._is_undoing = True
        try:
            undo(result)
        finally:
            self._is_undoing = False

    def _load_and_send(self, parts: list[_Part]) -> None:
        """The server lost its scripts (SCRIPT FLUSH, a restart behind a proxy): nothing was run."""
        loads = [scripts.load_command(group.script, shebang=self._shebang) for group, _ in parts]
        self._wire.send(loads)
        self._send(parts, just_loaded=True)

    def _lost(self, group: _Group, calls: list[_Call], error: BaseException) -> None:
        """The connection ended: what was not sent, or only reads, goes back to its place in line."""
        unsent = isinstance(error, ConnectionLost) and not error.sent
        if unsent or group.script.reads_only:
            self._returned.append((group, calls))
            return
        self._fail(
            calls,
            lambda: OutcomeUnknown(
                f"{group.script.name}: {error} before the reply came; it may or may not have been "
                "applied; ask again by the same name with repeat=True",
                tenant=group.tenant,
            ),
        )

    def _put_back(self) -> None:
        """All flights of a lost connection have landed: the oldest call is the first in line again."""
        while self._returned:
            group, calls = self._returned.pop()
            queued = self._groups.get(group.key)
            if queued is None:
                queued = self._groups[group.key] = group
                self._ready.appendleft(group)
            queued.calls.extendleft(reversed(calls))
            self._queued_rows += sum(call.rows for call in calls)
            self._queued_bytes += sum(call.size for call in calls)
        if self._is_closed:
            self._fail_queued("the client was closed")

    @staticmethod
    def _fail(calls: Sequence[_Call], make: Callable[[], LeasekitError]) -> None:
        for call in calls:
            if not call.future.done():
                call.future.set_exception(make())

    def _fail_queued(self, why: str) -> None:
        while self._ready:
            group = self._ready.popleft()
            del self._groups[group.key]
            message = f"{group.script.name}: {why}; nothing was applied; it is safe to try again"
            for call in group.calls:
                self._forget(call)
            self._fail(group.calls, partial(Unavailable, message, tenant=group.tenant))
            group.calls.clear()
            self._let_in()
        self._check_idle()

    def _check_idle(self) -> None:
        busy = self._queued_rows or self._flights or self._waiting
        if self._idle is not None and not self._idle.done() and not busy:
            self._idle.set_result(None)

    def _reconnect(self) -> None:
        if self._reconnecting is None and not self._is_closed:
            self._reconnecting = self._loop.create_task(self._reconnect_until_done())

    async def _reconnect_until_done(self) -> None:
        """Try again with growing pauses; what has waited for the whole time limit is told so."""
        pause_s = RECONNECT_FIRST_MS / 1_000
        give_up_at = self._loop.time() + self._timeout_s
        try:
            while not self._is_closed:
                try:
                    await self._connect()
                    break
                except LeasekitError as error:
                    if self._loop.time() >= give_up_at:
                        self._fail_queued(f"no connection for {self._timeout_s:g} s ({error})")
                        return
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RECONNECT_MOST_MS / 1_000)
        finally:
            self._reconnecting = None
            if self._ready and self._wire.is_connected:
                self._flush_soon()

    async def _connect(self) -> None:
        await self._wire.connect()
        try:
            replies = await self._wire.send(scripts.load_commands(shebang=self._shebang))
        except ConnectionLost as error:
            raise Unavailable(f"the scripts could not be loaded: {error}") from None
        for reply in replies:
            # A user without the right to load scripts may still find them loaded: calls will tell.
            if isinstance(reply, ResponseError) and "NOPERM" not in str(reply):
                raise scripts.translate(reply, "script load")


def _unreadable(group: _Group, why: str) -> ScriptFailed:
    return ScriptFailed(
        f"{group.script.name}: an answer could not be read ({why}); it was applied; "
        "run `leasekit doctor`",
        tenant=group.tenant,
    )
