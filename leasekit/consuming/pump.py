"""The engine of `run` and `consume`: claims in turn, hands rows over, keeps, finishes, and stops.

    hints, due times, polls --> schedule --> claims --> handlers --> ack, nack
                                               |
                                               +--> keeper: extends what is held

A claim asks for no more rows than may run at once, so nobody hoards; claims for several routes are
under way together and share a write. What is here runs in a few tasks of its own; each of them that
dies of something unexpected is started again and counted, so that none is silently dead.

*Stopping*: no more claims; rows at work are extended and may finish for `drain_ms`; then their
handlers are cancelled and the rows released, which charges no attempt. Being cancelled stops the
same way; being cancelled again cuts it short.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from leasekit import codec
from leasekit.consuming.backoff import backoff_ms, jittered_ms
from leasekit.consuming.keeper import Held, Keeper
from leasekit.consuming.schedule import Entry, Room, Schedule
from leasekit.durability import Durability
from leasekit.errors import (
    InvalidInput,
    LeasekitError,
    NotDurable,
    OutcomeUnknown,
    Permanent,
    RetryAfter,
    Unavailable,
)
from leasekit.hints import Hub
from leasekit.keys import route_of
from leasekit.model import RunCounts

__all__ = ["Options", "Pump", "consumer_name"]

CLAIM_PAUSE_FIRST_S = 0.02
CLAIM_PAUSE_MOST_S = 1.0
FINISH_PAUSE_S = 0.05
RESTART_PAUSE_FIRST_S = 0.05
RESTART_PAUSE_MOST_S = 1.0
RELEASE_S_MAX = 6.0  # how long rows may take to be given back at the end

_logger = logging.getLogger(__name__)


def consumer_name() -> str:
    """Who claims, unless told otherwise: host, process, and something that no restart repeats."""
    return f"{socket.gethostname()[:100]}:{os.getpid()}:{codec.new_token()[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to consume; checked here, named as the callers name it."""

    consumer: str
    concurrency: int
    per_tenant: int
    lease_ms: int
    handler_timeout_ms: int | None
    backoff_ms: tuple[int, int]
    drain_ms: int
    poll_ms: int
    durability: Durability | None = None

    def __post_init__(self) -> None:
        codec.check_text(self.consumer, "consumer")
        codec.check_whole(self.concurrency, "concurrency", 1, 100_000)
        codec.check_whole(self.per_tenant, "per_tenant", 1, 100_000)
        codec.check_whole(self.lease_ms, "lease_ms", 100, codec.LEASE_MS_MAX)
        if self.handler_timeout_ms is not None:
            codec.check_whole(
                self.handler_timeout_ms, "handler_timeout_ms", 1, codec.DURATION_MS_MAX
            )
        base_ms, max_ms = self.backoff_ms
        codec.check_whole(base_ms, "backoff_ms", 0, codec.DURATION_MS_MAX)
        codec.check_whole(max_ms, "backoff_ms", base_ms, codec.DURATION_MS_MAX)
        codec.check_whole(self.drain_ms, "drain_ms", 0, codec.DURATION_MS_MAX)
        codec.check_whole(self.poll_ms, "poll_ms", 10, codec.DURATION_MS_MAX)


class Pump:
    """Consumes routes of tenants. Use it once: `add` what to consume, then `run`.

    handler: works on a claim; what it raises decides what becomes of the row. None: claims go to
    `give` instead, and whoever gets them finishes them. new_tenant: told the encoded name of a tenant
    that a hint named and nobody added; only where all tenants are heard.
    """

    def __init__(
        self,
        hub: Hub,
        options: Options,
        counts: RunCounts,
        *,
        is_closing: Callable[[], bool],
        handler: Callable[[Any], Awaitable[Any]] | None = None,
        give: Callable[[Any], None] | None = None,
        new_tenant: Callable[[str], None] | None = None,
    ) -> None:
        self._hub = hub
        self._options = options
        self.counts = counts
        self._is_closing = is_closing
        self._handler = handler
        self._give = give
        self._new_tenant = new_tenant
        self._schedule = Schedule(options.concurrency, poll_s=options.poll_ms / 1_000)
        self._keeper = Keeper(options.lease_ms, self._on_lost)
        self._entries: dict[tuple[str, str], Entry] = {}
        self._rooms: dict[str, Room] = {}
        self._held: set[Held] = set()
        self._empty = asyncio.Event()
        self._claims: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._ended = asyncio.Event()
        self._is_draining = False
        self._is_cutting = False
        self._is_over = False
        self._failure: LeasekitError | None = None

    # --- what is consumed -------------------------------------------------------------------------

    def add(self, source: Any, tag: str, lane: str, target: str, *, turn: int) -> None:
        """Consume one more route of a tenant, at once; adding it again does nothing.

        source: has `claim` as an Outbox has it. turn: rows that it may take in turn.
        """
        key = (tag, route_of(lane, target))
        if key in self._entries:
            return
        room = self._rooms.setdefault(tag, Room(self._options.per_tenant))
        self._entries[key] = entry = Entry(source, lane, target, room, turn=turn)
        self._schedule.wake(entry, 0, self._now_s())
        self._wake.set()

    def has_tenant(self, tag: str) -> bool:
        """Whether a route of this tenant is consumed."""
        return tag in self._rooms

    def on_hint(self, tag: str, route: str, delay_ms: int) -> None:
        entry = self._entries.get((tag, route))
        if entry is not None:
            # A millisecond more: the server's clock ticks in whole ones.
            self._schedule.wake(entry, (delay_ms + 1) / 1_000 if delay_ms else 0, self._now_s())
            self._wake.set()
        elif self._new_tenant is not None and not self.has_tenant(tag):
            self._new_tenant(tag)

    def on_gap(self) -> None:
        now_s = self._now_s()
        for entry in self._entries.values():
            self._schedule.wake(entry, 0, now_s)
        self._wake.set()

    # --- running ----------------------------------------------------------------------------------

    async def run(
        self,
        *,
        stop: asyncio.Event | None = None,
        tags: Iterable[str] | None = (),
        feed: Callable[[], Awaitable[None]] | None = None,
    ) -> RunCounts:
        """Consume until `stop` is set or the caller is cancelled; then drain.

        tags: the tenants whose hints to hear, None = all. feed: a task beside, such as one that
        looks for new tenants. Raises what makes going on useless: a closed client, a refused input.
        """
        scheduler = self._supervised("scheduler", self._schedule_claims)
        keeper = self._supervised("keeper", self._keeper.run)
        feeder = None if feed is None else self._supervised("feeder", feed)
        stopping = None if stop is None else asyncio.ensure_future(_set_with(stop, self._ended))
        was_cancelled = False
        try:
            self._hub.add(self, tags)
            await self._ended.wait()
        except LeasekitError as error:
            self._fail(error)
        except asyncio.CancelledError:
            was_cancelled = True
        ending = asyncio.ensure_future(self._end(scheduler, keeper, feeder, stopping))
        while not ending.done():
            try:
                await asyncio.shield(ending)
            except asyncio.CancelledError:
                was_cancelled = True
                self._cut()
        ending.result()
        if was_cancelled:
            raise asyncio.CancelledError
        if self._failure is not None:
            raise self._failure
        return self.counts

    async def _end(self, scheduler: Any, keeper: Any, *others: Any) -> None:
        self._is_draining = True
        for task in (scheduler, *others, *self._claims):
            if task is not None:
                task.cancel()
        # A claim that is cancelled gives back by itself what it got.
        await asyncio.gather(
            *filter(None, (scheduler, *others, *self._claims)), return_exceptions=True
        )
        with suppress(LeasekitError):
            await self._hub.remove(self)
        if self._give is not None:
            self._give(None)
        if not self._is_cutting:
            await self._wait_until_empty(self._options.drain_ms / 1_000)
        self._cut()
        tasks = [held.task for held in self._held if held.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=RELEASE_S_MAX)
        left = [held for held in self._held if held.task is None or held.task.done()]
        for held in left:
            held.claim.lost.set()
        releases = [asyncio.ensure_future(self._release(held)) for held in left]
        if releases:
            await asyncio.wait(releases, timeout=RELEASE_S_MAX)
        self._is_over = True
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)

    async def _wait_until_empty(self, seconds: float) -> None:
        """Until nothing is held, the time is over, or it is cut short."""
        if self._held:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._empty.wait()

    def leave(self) -> None:
        """Stop without waiting for what is at work: it is released."""
        self._cut()
        self._ended.set()

    def _cut(self) -> None:
        """Let nothing more be waited for: cancel the handlers; their rows are released."""
        if self._is_cutting:
            return
        self._is_cutting = True
        self._empty.set()
        for held in list(self._held):
            # An ack on its way is not taken back: nobody would know what became of the row.
            if held.task is not None and not held.is_over and not held.is_finishing:
                held.task.cancel()

    def _fail(self, error: LeasekitError) -> None:
        self._failure = self._failure or error
        self._ended.set()

    # --- claiming ---------------------------------------------------------------------------------

    async def _schedule_claims(self) -> None:
        loop, schedule = asyncio.get_running_loop(), self._schedule
        while True:
            self._wake.clear()
            schedule.advance(loop.time())
            while (taken := schedule.take()) is not None:
                claim = loop.create_task(self._claim(*taken))
                self._claims.add(claim)
                claim.add_done_callback(self._claims.discard)
            due_s = schedule.next_due_s()
            timer = None if due_s is None else loop.call_at(due_s, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                if timer is not None:
                    timer.cancel()

    async def _claim(self, entry: Entry, asked: int) -> None:
        is_repeat = entry.claim_id is not None
        entry.claim_id = entry.claim_id or codec.new_token()
        begun = 0
        try:
            rows = await entry.source.claim(
                entry.lane,
                entry.target,
                limit=min(asked, codec.BATCH_MAX),
                lease_ms=self._options.lease_ms,
                consumer=self._options.consumer,
                claim_id=entry.claim_id,
                gives_back=True,  # It repeats only where it knows of no answer.
                durability=self._options.durability,
                repeat=is_repeat,
            )
            entry.claim_id, entry.failures = None, 0
            for claim in rows:
                self._begin(entry, claim)
                begun += 1
            due_in_ms = rows.next_due_at_ms - rows.now_ms + 1 if rows.next_due_at_ms else None
            self._schedule.took(
                entry,
                asked,
                begun,
                more=rows.more,
                next_s=None if due_in_ms is None else due_in_ms / 1_000,
                now_s=self._now_s(),
            )
        except Exception as error:
            self._claim_failed(entry, asked - begun, error)
        self._wake.set()

    def _claim_failed(self, entry: Entry, asked: int, error: Exception) -> None:
        self.counts.claim_errors += 1
        if isinstance(error, InvalidInput) or self._is_closing():
            # Asking again gets the same answer.
            self._schedule.failed(entry, asked, pause_s=1e9, now_s=self._now_s())
            self._entries = {key: one for key, one in self._entries.items() if one is not entry}
            if self._new_tenant is None or self._is_closing():
                self._fail(error if isinstance(error, LeasekitError) else Unavailable(str(error)))
            else:
                _logger.error("%s/%s is not consumed: %s", entry.lane, entry.target, error)
            return
        if not isinstance(error, OutcomeUnknown):
            entry.claim_id = None  # Else: under the same name it takes nothing twice.
        if not isinstance(error, LeasekitError):
            self.counts.restarts += 1
            _logger.error("a claim failed unexpectedly; it is tried again", exc_info=error)
        elif entry.failures == 0:
            _logger.warning("claiming pauses: %s", error)
        entry.failures = min(entry.failures + 1, 10)
        pause_s = min(CLAIM_PAUSE_FIRST_S * 2**entry.failures, CLAIM_PAUSE_MOST_S)
        self._schedule.failed(
            entry, asked, pause_s=pause_s * random.uniform(0.5, 1), now_s=self._now_s()
        )
        self._wake.set()

    # --- working ----------------------------------------------------------------------------------

    def _begin(self, entry: Entry, claim: Any) -> None:
        held = Held(entry, claim)
        claim.on_end = lambda word: self._on_end(held, word)
        self._held.add(held)
        self._empty.clear()
        self._keeper.hold(held)
        self.counts.claimed += 1
        if self._handler is None:
            assert self._give is not None
            self._give(claim)
            return
        held.task = asyncio.get_running_loop().create_task(self._work(held))
        held.task.add_done_callback(lambda task: self._worked(held, task))

    async def _work(self, held: Held) -> None:
        """Run the handler on a claim, then say what became of it."""
        assert self._handler is not None
        claim, timeout_ms = held.claim, self._options.handler_timeout_ms
        limit = None if timeout_ms is None else asyncio.timeout(timeout_ms / 1_000)
        try:
            if limit is None:
                await self._handler(claim)
            else:
                async with limit:
                    await self._handler(claim)
        except asyncio.CancelledError:
            if held.is_lost or self._is_cutting:
                raise
            await self._failed(held, "CancelledError: the handler was cancelled", None)
        except Permanent as error:
            self.counts.handler_errors += 1
            reason = str(error)
            await self._finish(
                held, lambda repeat: claim.nack(error=reason, permanent=True, repeat=repeat)
            )
        except RetryAfter as error:
            await self._failed(held, str(error), error.delay_ms)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if limit is not None and limit.expired():
                text = f"TimeoutError: the handler took longer than {timeout_ms} ms"
            await self._failed(held, text, None)
        else:
            await self._finish(held, lambda repeat: claim.ack(repeat=repeat))

    async def _failed(self, held: Held, text: str, delay_ms: int | None) -> None:
        """The handler failed: the row waits for a while, or is buried if its attempts are used up."""
        self.counts.handler_errors += 1
        claim = held.claim
        if delay_ms is None:
            delay_ms = jittered_ms(backoff_ms(claim.row.attempt_count, *self._options.backoff_ms))
        # Now, on the server's clock, as far as it is known here.
        now_ms = claim.lease_expires_at_ms - claim.remaining_ms()
        retry_at_ms = now_ms + delay_ms
        await self._finish(
            held,
            lambda repeat: claim.nack(error=text, retry_at_ms=retry_at_ms, repeat=repeat),
        )

    async def _finish(self, held: Held, end: Callable[[bool], Awaitable[Any]]) -> None:
        """Ack, nack or release, again and again while the lease lasts; what the server says counts."""
        if held.is_over or held.is_lost:
            return
        self._keeper.let_go(held)
        held.is_finishing = True
        repeat = False
        while True:
            try:
                await end(repeat)
                return
            except (NotDurable, OutcomeUnknown, Unavailable) as error:
                repeat = True
                if self._is_closing() or self._is_cutting or held.claim.remaining_ms() <= 0:
                    _logger.warning(
                        "row %s is left to its lease's end: %s", held.claim.row.id, error
                    )
                    break
            except LeasekitError as error:
                _logger.error("row %s is left to its lease's end: %s", held.claim.row.id, error)
                break
            await asyncio.sleep(FINISH_PAUSE_S)
        self._on_end(held, "lost_claim")

    async def _release(self, held: Held) -> None:
        await self._finish(held, lambda repeat: held.claim.release(repeat=repeat))

    def _worked(self, held: Held, task: asyncio.Task[None]) -> None:
        """The task of a row is over, however it went."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.counts.restarts += 1
            _logger.error("row %s was left to its lease's end", held.claim.row.id, exc_info=error)
            self._on_end(held, "lost_claim")
        if held.is_over:
            self._drop(held)
        elif not self._is_cutting:
            # Somebody cancelled it before its first turn: nothing has begun. (What is cut at the end
            # is released there.)
            release = asyncio.get_running_loop().create_task(self._release(held))
            self._claims.add(release)
            release.add_done_callback(self._claims.discard)

    def _on_end(self, held: Held, word: str) -> None:
        """The server said what became of a row, or its lease is lost."""
        if held.is_over:
            return
        held.is_over = True
        self._keeper.let_go(held)
        counts = self.counts
        if word in ("acked", "forgotten"):
            counts.acked += 1
        elif word == "requeued":
            counts.requeued += 1
        elif word == "dead_lettered":
            counts.dead_lettered += 1
        elif word == "released":
            counts.released += 1
        else:
            counts.lost += 1
        if held.task is None or held.task.done():
            self._drop(held)

    def _on_lost(self, held: Held) -> None:
        """The keeper lost the lease: whoever works on the row is told, and nothing is said of it."""
        held.is_lost = True
        held.claim.lost.set()
        if held.task is not None:
            held.task.cancel()
        self._on_end(held, "lost_claim")

    def _drop(self, held: Held) -> None:
        if held in self._held:
            self._held.discard(held)
            self._schedule.freed(held.entry, 1)
            self._wake.set()
            if not self._held:
                self._empty.set()

    # --- supervision ------------------------------------------------------------------------------

    def _supervised(self, name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(self._supervise(name, work))

    async def _supervise(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Start it again whenever it ends, until this pump stops."""
        pause_s = RESTART_PAUSE_FIRST_S
        while not self._is_draining or name == "keeper":
            began_s = self._now_s()
            try:
                await work()
                problem: BaseException | None = None
            except asyncio.CancelledError as error:
                if self._is_over or (self._is_draining and name != "keeper"):
                    raise
                problem = error
            except Exception as error:
                problem = error
            self.counts.restarts += 1
            _logger.error("the %s died; it is started again", name, exc_info=problem)
            if self._now_s() - began_s > 10:
                pause_s = RESTART_PAUSE_FIRST_S
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RESTART_PAUSE_MOST_S)
            self._wake.set()

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()


async def _set_with(first: asyncio.Event, second: asyncio.Event) -> None:
    await first.wait()
    second.set()
