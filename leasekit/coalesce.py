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

**Repeats.** A connection that ends with a call under way leaves nobody knowing whether it was applied.
Every command carries a name under which it applies once (lua/PROTOCOL.md, "Repeats and forgetting"), so
the call is sent again, marked as a repeat and ahead of all others: REPEATS_MAX times, and not later than
two time limits after it was first sent (one for a reply that never came, one for the connection to come
back). Before that the server must have dropped the old connection, or a request that is stuck there could
be applied after its repeat: `CLIENT KILL ID` is answered before any call leaves on the new one. Where
that cannot be had, the caller is told OutcomeUnknown and decides.

**Durability.** A coalescer is of one class. Under `replicated(n)` a flight that may have written ends with
`tenant/barrier` and one `WAIT n`. The barrier is a write of its own, because WAIT waits for what its
connection wrote last: after a call that wrote nothing it passed on Valkey 9.1 and Redis 7.0 with the only
replica stopped, and so it did after a PUBLISH in a cluster; after the barrier it did not, on Redis 6.2 and
with full memory neither. Where fewer than n replicas answer in time, callers get NotDurable, and what was
granted is given back. Under `fsync` the server's settings are verified with each connection; WAITAOF is not
used, because it acknowledges on Valkey 9.1 under `everysec` what is not synced.

Source: design 5, 7; measured in bench/.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
from redis.exceptions import ResponseError

from leasekit import scripts
from leasekit.connect import ConnectionLost, Wire
from leasekit.durability import FSYNC_SETTINGS, NONE, Durability
from leasekit.errors import (
    LeasekitError,
    NotDurable,
    OutcomeUnknown,
    ScriptFailed,
    Unavailable,
)
from leasekit.scripts import Argument, Script

__all__ = ["Coalescer", "Reply", "local_clock_s"]

FLIGHT_ROWS = 100
FLIGHT_BYTES = 128 * 1024
FLIGHTS_MAX = 4
ITEMS_MAX = 1_000
QUEUE_ROWS_MAX = 20_000
QUEUE_BYTES_MAX = 64 * 1024 * 1024
RECONNECT_FIRST_MS = 10
RECONNECT_MOST_MS = 500
REPEATS_MAX = 2
# The server runs nothing of this connection while it waits: a second flight is there when it is done.
FLIGHTS_MAX_WAITING = 2
REPEAT_WITHIN_TIMEOUTS = 2

_BARRIER = scripts.script("tenant/barrier")
_RUN_ID = re.compile(rb"\brun_id:(\w+)")
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
    now_ms: int = field(init=False)

    def __post_init__(self) -> None:
        self.now_ms = int(self.head[0])


Variant = tuple[Any, ...]
Bind = Callable[[Script, Variant, bool], Sequence[Argument]]
Decode = Callable[[Any, Any, Reply], Any]
Undo = Callable[[Any], None]
_Key = tuple[str, str, Variant, bool]
# One connection: the server process that it leads to, and its id there; None for what is not known.
_Link = tuple[bytes | None, int | None]


class _Call(msgspec.Struct, eq=False, gc=False):
    """One item and who waits for it; `lost_count` flights were lost that carried it."""

    fields: Sequence[Argument]
    decode: Decode
    context: Any
    rows: int
    size: int
    undo: Undo | None
    lease_ms: int | None
    future: Any
    lost_count: int = 0
    first_sent_at_s: float = 0.0

    @property
    def is_dropped(self) -> bool:
        """Nobody waits for it, and nothing is granted that would have to be given back."""
        return bool(self.future.cancelled()) and not (self.lost_count and self.undo)


class _Group:
    """Calls that may share one script call; the first `returned` of them came back from a flight."""

    __slots__ = ("bind", "bound", "calls", "head", "key", "returned", "script")

    def __init__(self, key: _Key, script: Script, bind: Bind, head: int) -> None:
        self.key = key
        self.script = script
        self.bind = bind
        self.bound = bind(script, key[2], key[3])
        self.head = head
        self.calls: deque[_Call] = deque()
        self.returned = 0

    @property
    def tenant(self) -> str:
        return self.key[1]

    def repeating(self) -> _Group:
        """A group for the same calls, said to be repeats."""
        return _Group((*self.key[:3], True), self.script, self.bind, self.head)


_Part = tuple[_Group, list[_Call]]


class _Shortfall(msgspec.Struct, frozen=True):
    """How far a flight's writes got, where that was not far enough; `why` in words."""

    reached: int
    wanted: int
    why: str


class Coalescer:
    """Gathers calls into flights over one wire. One event loop; `start` first, `close` last.

    durability: of all its calls. barrier_key: a tenant's key for `tenant/barrier`, which `replicated`
    needs.
    """

    def __init__(
        self,
        wire: Wire,
        *,
        shebang: bool,
        timeout_ms: int,
        durability: Durability = NONE,
        barrier_key: Callable[[str], str] | None = None,
    ) -> None:
        self._wire = wire
        self._shebang = shebang
        self._timeout_s = timeout_ms / 1_000
        self.durability = durability
        self._barrier_key: Callable[[str], str] | None = None
        self._flights_max = FLIGHTS_MAX
        if durability.kind == "replicated":
            if barrier_key is None:
                raise TypeError("replicated needs a key for its barrier")
            self._barrier_key = barrier_key
            self._flights_max = min(FLIGHTS_MAX, FLIGHTS_MAX_WAITING)
        # A reply comes after the waits of all flights under way, and must be in time.
        in_time_ms = timeout_ms // 2 // self._flights_max
        self._wait_ms = max(min(durability.timeout_ms, in_time_ms), 1)
        self._groups: dict[_Key, _Group] = {}
        self._ready: deque[_Group] = deque()
        self._flights = 0
        self._queued_rows = 0
        self._queued_bytes = 0
        self._flush_is_due = False
        self._waiting: deque[tuple[_Key, _Call, Script, Bind, int]] = deque()
        self._returned: list[_Part] = []
        self._link: _Link = (None, None)
        self._is_fit = False  # whether what `_connect` asks of a connection was answered well
        self._left_behind: set[_Link] = set()
        self.repeats = 0
        """Calls that were sent again after a lost reply, so far."""
        self._reconnecting: asyncio.Task[None] | None = None
        self._idle: asyncio.Future[None] | None = None
        self._is_closing = False
        self._is_undoing = False
        self._is_closed = False

    async def start(self) -> None:
        """Connect and give the server the scripts.

        Raises Unavailable, also for a server that cannot keep the class of durability, or ScriptFailed.
        """
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

    @property
    def is_closing(self) -> bool:
        """Whether new calls are refused."""
        return self._is_closing

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
        lease_ms: int | None = None,
        repeat: bool = False,
    ) -> asyncio.Future[Any]:
        """Queue one item; the future gives what `decode(item reply, context, Reply)` returns.

        Items of the same script, tenant, variant and `repeat` share a call; `bind(script, variant,
        repeat)` gives its keys and arguments. `repeat`: the caller sent the item before; the coalescer
        itself sets it when it sends an item again. `rows` is what the item may take out of a batch,
        `size` its bytes, `head` how many values the script answers before the items. A LeasekitError
        that `decode` returns is raised to the caller. `undo` gets the result if the caller had given
        up by the time it arrived, or if too few replicas have it. `lease_ms`: the lease that the item
        asks for, if any; no more than a quarter of it is spent waiting for replicas.
        """
        if self._is_closing and not self._is_undoing:
            raise Unavailable(
                "this client is closing or closed: nothing was sent; connect anew", tenant=tenant
            )
        future: asyncio.Future[Any] = self._loop.create_future()
        call = _Call(fields, decode, context, rows, size, undo, lease_ms, future)
        key = (script.name, tenant, variant, bool(repeat))
        queued_rows, queued_bytes = self._queued_rows, self._queued_bytes
        if self._waiting or queued_rows >= QUEUE_ROWS_MAX or queued_bytes >= QUEUE_BYTES_MAX:
            # Back-pressure: the caller waits in line until the queue has room again.
            self._waiting.append((key, call, script, bind, head))
            return future
        group = self._groups.get(key)
        if group is None:
            group = self._open_group(key, script, bind, head)
        # What _enter does, written out: every call of every caller passes here.
        group.calls.append(call)
        self._queued_rows = queued_rows + rows
        self._queued_bytes = queued_bytes + size
        if not self._flush_is_due and self._flights < self._flights_max:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)
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
        group = self._groups[key] = _Group(key, script, bind, head)
        self._ready.append(group)
        return group

    def _enter(self, group: _Group, call: _Call) -> None:
        group.calls.append(call)
        self._queued_rows += call.rows
        self._queued_bytes += call.size
        if not self._flush_is_due and self._flights < self._flights_max:
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
        if not self._flush_is_due and self._flights < self._flights_max:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        if self._reconnecting is not None:
            return  # Not even on an open connection: the old one must be gone first.
        if not self._wire.is_connected or not self._is_fit:
            self._reconnect()
            return
        while self._flights < self._flights_max and self._ready:
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
            waiting = len(calls)
            while calls:
                call = calls[0]
                if call.future.cancelled() and call.is_dropped:
                    self._forget(calls.popleft())
                    continue
                if rows and (rows + call.rows > FLIGHT_ROWS or size + call.size > FLIGHT_BYTES):
                    break
                taken.append(calls.popleft())
                rows += call.rows
                size += call.size
            if taken:
                parts.append((group, taken))
            if group.returned:
                group.returned = max(0, group.returned - waiting + len(calls))
            if calls:
                if not taken or group.returned:
                    # It needs more room than is left here, or came before all that is behind it: it
                    # comes first in the next one.
                    self._ready.appendleft(group)
                    break
                self._ready.append(group)
            else:
                del self._groups[group.key]
        self._queued_rows -= rows
        self._queued_bytes -= size
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
        waits = self._barrier_key is not None and self._add_barrier(commands, parts)
        sent_at_s = local_clock_s()
        self._flights += 1
        flight = self._wire.send(commands)
        flight.add_done_callback(
            lambda future: self._landed(
                parts, sent_at_s, future, waits=waits, just_loaded=just_loaded
            )
        )

    def _add_barrier(self, commands: list[tuple[Argument, ...]], parts: list[_Part]) -> bool:
        """Let a flight end with a write and a WAIT for it, unless all that it does is read."""
        writing = [part for part in parts if not part[0].script.reads_only]
        if not writing:
            return False
        assert self._barrier_key is not None
        wait_ms = self._wait_ms
        for _, calls in writing:
            for call in calls:
                if call.lease_ms is not None and call.lease_ms // 4 < wait_ms:
                    wait_ms = max(call.lease_ms // 4, 1)
        key = self._barrier_key(writing[0][0].tenant)
        bound = _BARRIER.bind({"barrier": key}, {"now_ms": ""})
        commands.append(scripts.call_command(_BARRIER, bound, (), shebang=self._shebang))
        commands.append(("WAIT", self.durability.replicas, wait_ms))
        return True

    def _shortfall(self, moved: Any, reached: Any) -> _Shortfall | None:
        """What the replies to barrier and WAIT mean; None where enough replicas have the flight."""
        wanted = self.durability.replicas
        for name, reply in (("barrier's write", moved), ("WAIT", reached)):
            if isinstance(reply, ResponseError):
                if scripts.is_missing(reply):
                    # Ahead of whatever flight is the next, and of this one where it is sent again.
                    self._wire.send([scripts.load_command(_BARRIER, shebang=self._shebang)])
                code = str(reply).partition(" ")[0]
                return _Shortfall(0, wanted, f"the server refused the {name} ({code})")
        if type(reached) is int and reached >= wanted:
            return None
        count = reached if type(reached) is int else 0
        return _Shortfall(count, wanted, f"{count} of the {wanted} replicas had it in time")

    def _landed(
        self,
        parts: list[_Part],
        sent_at_s: float,
        flight: asyncio.Future[list[Any]],
        *,
        waits: bool,
        just_loaded: bool,
    ) -> None:
        self._flights -= 1
        error = flight.exception()
        if error is None:
            missing = []
            replies, short = flight.result(), None
            if waits:
                *replies, moved, reached = replies
                short = self._shortfall(moved, reached)
            for (group, calls), reply in zip(parts, replies, strict=True):
                lacks = isinstance(reply, ResponseError) and scripts.is_missing(reply)
                if lacks and not just_loaded:
                    missing.append((group, calls))
                else:
                    self._settle(group, calls, reply, sent_at_s, short)
            if missing:
                self._load_and_send(missing)
        else:
            for group, calls in parts:
                self._lost(group, calls, error, sent_at_s)
            if not self._flights:
                self._put_back()
        # After the callers that were just answered: what they ask next may join this flight.
        if self._ready or self._waiting:
            self._flush_soon()
        self._check_idle()

    def _settle(
        self,
        group: _Group,
        calls: list[_Call],
        reply: Any,
        sent_at_s: float,
        short: _Shortfall | None,
    ) -> None:
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
        if group.script.reads_only:
            short = None  # It told what is on this server, as it always does.
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
            elif short is not None:
                if call.undo is not None:
                    self._undo(call.undo, result)
                future.set_exception(_not_durable(group, short, is_undone=call.undo is not None))
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

    def _lost(
        self, group: _Group, calls: list[_Call], error: BaseException, sent_at_s: float
    ) -> None:
        """The connection ended: what may be sent again goes back to the front of the line."""
        if isinstance(error, ConnectionLost) and not error.sent:
            self._returned.append((group, calls))
            return
        has_id = self._link[1] is not None
        if has_id:
            self._left_behind.add(self._link)
        can_repeat = isinstance(error, ConnectionLost) and has_id
        reads = group.script.reads_only
        again, over = [], []
        for call in calls:
            if not call.lost_count:
                call.first_sent_at_s = sent_at_s
            call.lost_count += 1
            in_time = not self._is_late(call)
            if in_time and (reads or (can_repeat and call.lost_count <= REPEATS_MAX)):
                again.append(call)
            else:
                over.append(call)
        if again:
            self.repeats += 0 if reads else len(again)
            self._returned.append((group if reads else group.repeating(), again))
        self._fail_lost(group, over, str(error))

    def _is_late(self, call: _Call) -> bool:
        """Whether it is too late to send a lost call again."""
        limit_s = REPEAT_WITHIN_TIMEOUTS * self._timeout_s
        return local_clock_s() - call.first_sent_at_s > limit_s

    def _put_back(self) -> None:
        """All flights of a lost connection have landed: the oldest call is the first in line again."""
        front: dict[_Group, None] = {}
        while self._returned:
            group, calls = self._returned.pop()
            queued = self._groups.setdefault(group.key, group)
            queued.calls.extendleft(reversed(calls))
            queued.returned += len(calls)
            front.pop(queued, None)
            front[queued] = None  # The last to come has the oldest call.
            self._queued_rows += sum(call.rows for call in calls)
            self._queued_bytes += sum(call.size for call in calls)
        if front:
            behind = [group for group in self._ready if group not in front]
            self._ready = deque([*reversed(front), *behind])
        if self._is_closed:
            self._fail_queued("the client was closed")

    def _drop_repeats(self, is_over: Callable[[_Call], bool], why: str) -> None:
        """Tell those whose calls are not sent again after all; reads and unsent calls stay."""
        for group in self._ready:
            if group.returned and not group.script.reads_only:
                over = [call for call in group.calls if call.lost_count and is_over(call)]
                for call in over:
                    group.calls.remove(call)
                    self._forget(call)
                group.returned -= len(over)
                self._fail_lost(group, over, why)

    def _fail_lost(self, group: _Group, calls: Sequence[_Call], why: str) -> None:
        """The callers of calls that had left and were not answered learn why, and what to do."""
        name, tenant = group.script.name, group.tenant
        if group.script.reads_only:
            text = f"{name}: {why} before the reply came; nothing was changed; try again"
            self._fail(calls, partial(Unavailable, text, tenant=tenant))
            return
        for call in calls:
            asked = f" (asked {call.lost_count} times)" if call.lost_count > 1 else ""
            text = (
                f"{name}: {why} before the reply came{asked}; it may or may not have been applied; ask "
                "again by the same name with repeat=True"
            )
            self._fail([call], partial(OutcomeUnknown, text, tenant=tenant))

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
            reads = group.script.reads_only
            lost = [call for call in group.calls if call.lost_count and not reads]
            self._fail_lost(group, lost, why)
            # The others: those that are lost have been told.
            self._fail(group.calls, partial(Unavailable, message, tenant=group.tenant))
            group.calls.clear()
            group.returned = 0
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
            if self._ready and not self._is_closed:
                self._flush_soon()

    async def _connect(self) -> None:
        self._is_fit = False
        await self._wire.connect()
        loads = scripts.load_commands(shebang=self._shebang)
        asked = self._durability_commands()
        try:
            told = await self._wire.send([*loads, ("INFO", "server"), *asked])
        except ConnectionLost as error:
            raise Unavailable(f"the scripts could not be loaded: {error}") from None
        replies, facts, answers = told[: len(loads)], told[len(loads)], told[len(loads) + 1 :]
        for reply in replies:
            # A user without the right to load scripts may still find them loaded: calls will tell.
            if isinstance(reply, ResponseError) and "NOPERM" not in str(reply):
                raise scripts.translate(reply, "script load")
        self._check_durability(answers)
        process = _RUN_ID.search(facts) if isinstance(facts, bytes) else None
        self._link = (process and process[1], self._wire.client_id)
        if self._left_behind:
            await self._end_old_connections()
        self._is_fit = True
        self._drop_repeats(self._is_late, "the connection was lost, and came back too late,")

    def _durability_commands(self) -> list[tuple[Argument, ...]]:
        """What to ask of a server whose word on durability is to count."""
        if self.durability.kind == "replicated":
            return [("WAIT", 0, 1)]
        if self.durability.kind == "fsync":
            return [("CONFIG", "GET", name) for name in FSYNC_SETTINGS]
        return []

    def _check_durability(self, answers: Sequence[Any]) -> None:
        """Refuse a server that cannot keep the class, before anything is sent to it."""
        if self.durability.kind == "replicated" and isinstance(answers[0], ResponseError):
            code = str(answers[0]).partition(" ")[0]
            raise Unavailable(
                f"durability {self.durability}: the server refuses WAIT ({code}); nothing was sent; "
                "name the primary in the URL, and allow this user +wait"
            )
        if self.durability.kind == "fsync":
            for (name, wanted), answer in zip(FSYNC_SETTINGS.items(), answers, strict=True):
                if not isinstance(answer, dict):
                    raise Unavailable(
                        "durability fsync: the server does not let this user see whether it syncs each "
                        "write; nothing was sent; allow +config|get, or use another class"
                    )
                found = answer.get(name.encode(), b"missing").decode()
                if found != wanted:
                    raise Unavailable(
                        f"durability fsync: the server has {name} {found}, so it may answer before a "
                        f"write is on its disk; nothing was sent; CONFIG SET {name} {wanted}, and write "
                        "it into its configuration"
                    )

    async def _end_old_connections(self) -> None:
        """Have the server drop what was left behind, so that nothing stuck there is applied any more.

        An id means something in one server process only: after a restart the old connections are gone,
        and their ids may be other clients'.
        """
        here = self._link[0]
        old = [one for there, one in self._left_behind if None in (here, there) or here == there]
        try:
            replies = await self._wire.send([("CLIENT", "KILL", "ID", one or 0) for one in old])
        except ConnectionLost as error:
            raise Unavailable(f"the old connection could not be ended: {error}") from None
        self._left_behind.clear()
        for reply in replies:
            if isinstance(reply, ResponseError):
                code = str(reply).partition(" ")[0]
                why = f"the connection was lost, and the server refuses CLIENT KILL ({code}),"
                self._drop_repeats(lambda call: True, why)
                return


def _unreadable(group: _Group, why: str) -> ScriptFailed:
    return ScriptFailed(
        f"{group.script.name}: an answer could not be read ({why}); it was applied; "
        "run `leasekit doctor`",
        tenant=group.tenant,
    )


def _not_durable(group: _Group, short: _Shortfall, *, is_undone: bool) -> NotDurable:
    state = (
        "what it granted is being given back by its token; ask anew, without that token"
        if is_undone
        else "it stands on this server and may be lost in a failover; ask again by the same name with "
        "repeat=True, which is safe"
    )
    return NotDurable(
        f"{group.script.name}: {short.why}; it was applied by this server; {state}",
        reached=short.reached,
        wanted=short.wanted,
        tenant=group.tenant,
    )
