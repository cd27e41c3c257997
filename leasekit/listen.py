"""A subscription that lasts: it connects by itself, again and again, and says when it was deaf.

A message that was published while nobody listened is gone. So a `Listener` does not pretend to be
reliable; it calls `on_gap` whenever messages may have been missed: after its first subscription and
after each one that follows a loss. Whoever listens then looks for itself.

It has a connection of its own, which carries nothing but subscriptions and, now and then, a PING, so
that a connection that is dead without anybody having said so is noticed within its time limit.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from redis.exceptions import ResponseError

from leasekit.errors import Unavailable
from leasekit.wire import Command, ConnectionLost, OnPush

__all__ = ["Ears", "Listener"]

PING_EVERY_S = 15.0
PAUSE_FIRST_S = 0.02
PAUSE_MOST_S = 1.0
PAUSE_REFUSED_S = 30.0

_logger = logging.getLogger(__name__)


class Ears(Protocol):
    """A wire that hears: what the server says unasked goes to the `on_push` it was made with."""

    @property
    def is_connected(self) -> bool: ...

    @property
    def lost(self) -> asyncio.Future[None] | None: ...

    async def connect(self) -> None: ...

    def tell(self, commands: Sequence[Command]) -> None: ...

    def send(self, commands: Sequence[Command]) -> asyncio.Future[list[Any]]: ...

    async def close(self) -> None: ...


class Listener:
    """Hears channels and patterns until it is closed.

    `on_message(channel, message)` and `on_gap()` are called in the event loop and must return soon;
    an exception of theirs is logged and harms nobody else.
    """

    def __init__(
        self,
        make_ears: Callable[[OnPush], Ears],
        on_message: Callable[[str, bytes], None],
        on_gap: Callable[[], None],
    ) -> None:
        self._ears = make_ears(self._on_push)
        self._on_message = on_message
        self._on_gap = on_gap
        self._channels: set[str] = set()
        self._patterns: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_subscribed(self) -> bool:
        """Whether messages are heard now, as far as one can know."""
        return self._ears.is_connected

    def subscribe(self, *channels: str, then: Callable[[], None]) -> None:
        """Hear these channels, and call `then` once they are heard, if that is before an on_gap."""
        fresh = [channel for channel in channels if channel not in self._channels]
        self._channels.update(fresh)
        self._tell("SUBSCRIBE", fresh)
        self._start(then)

    def subscribe_pattern(self, pattern: str, *, then: Callable[[], None]) -> None:
        """Hear all channels that match; `then` as in `subscribe`."""
        if pattern not in self._patterns:
            self._patterns.add(pattern)
            self._tell("PSUBSCRIBE", [pattern])
        self._start(then)

    def unsubscribe(self, *channels: str) -> None:
        """Hear these channels no more."""
        self._channels.difference_update(channels)
        self._tell("UNSUBSCRIBE", channels)

    def unsubscribe_pattern(self, pattern: str) -> None:
        """Hear what matches no more."""
        self._patterns.discard(pattern)
        self._tell("PUNSUBSCRIBE", [pattern])

    async def close(self) -> None:
        """Hear nothing any more, and end the connection."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await self._ears.close()

    def _start(self, then: Callable[[], None]) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._stay_connected())
        elif self._ears.is_connected:
            # What answers a PING has read the subscription before it.
            answered = self._ears.send([("PING",)])
            answered.add_done_callback(lambda ping: self._answered(ping, then))

    def _answered(self, ping: asyncio.Future[list[Any]], then: Callable[[], None]) -> None:
        if ping.exception() is None:  # Else the connection is lost: on_gap follows.
            self._call(then)

    def _tell(self, command: str, names: Sequence[str]) -> None:
        if names and self._ears.is_connected:
            self._ears.tell([(command, *names)])

    async def _stay_connected(self) -> None:
        pause_s, is_complaining = PAUSE_FIRST_S, False
        while True:
            try:
                await self._ears.connect()
                self._tell("SUBSCRIBE", sorted(self._channels))
                self._tell("PSUBSCRIBE", sorted(self._patterns))
                # What answers this PING has read the subscriptions before.
                await self._ping()
                pause_s, is_complaining = PAUSE_FIRST_S, False
                self._call(self._on_gap)
                while self._ears.lost is not None:
                    await asyncio.wait([self._ears.lost], timeout=PING_EVERY_S)
                    await self._ping()
            except ResponseError as error:
                # No right to these channels: asking often does not help, and polling goes on.
                _logger.warning("the server refuses subscriptions (%s)", str(error).split()[0])
                pause_s = PAUSE_REFUSED_S
            except (ConnectionLost, Unavailable) as error:
                if not is_complaining:
                    _logger.warning("hints are not heard for now: %s", error)
                is_complaining = True
            except Exception:
                _logger.exception("listening failed; it begins anew")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MOST_S)

    async def _ping(self) -> None:
        [reply] = await self._ears.send([("PING",)])
        if isinstance(reply, ResponseError):
            raise reply

    def _on_push(self, reply: Sequence[Any]) -> None:
        kind = reply[0]
        if kind == b"message":
            channel, message = reply[1], reply[2]
        elif kind == b"pmessage":
            channel, message = reply[2], reply[3]
        else:
            return
        self._call(self._on_message, channel.decode(), message)

    def _call(self, callback: Callable[..., None], *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            _logger.exception("what hears hints failed; it goes on")
