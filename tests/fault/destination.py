"""The destination of the senders: a process whose ledger says what really happened.

What it honours is its mode. With `fence` it refuses whoever comes with a lower fence than the highest
that it has seen for the key, with an effect or with a question. With `key` it makes an effect once,
and takes every later one under the same key for the first. With `nothing` it does what it is told.

By key and seed it is troublesome: a few keys fail for good, some are refused at first before anything
was done, some effects take place after a while, and of some the answer is lost.

On a connection a caller writes `number effect key fence` or `number ask key fence about`; the answer
is `number word`. To an effect: applied | again (it is there already) | stale (refused by its fence) |
bad (fails for good) | busy (nothing was done). To a question: applied | absent.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import tempfile
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from fault.sender_messages import (
    Book,
    BookEnds,
    Finish,
    Listening,
    Mode,
    Order,
    Setup,
    TellBook,
)

from leasekit.demo.child import say

ROWS_A_REPORT = 500
IDLE_STEP_S = 0.02
DELAY_LEASES = (0.2, 4.0)


class Kind(StrEnum):
    """How a destination treats a key."""

    PLAIN = "plain"
    BAD = "fails for good"
    SHY = "busy at first"
    MUTE = "the first answer is lost"
    SLOW = "the first effect takes place later"


SHARES = {Kind.BAD: 0.03, Kind.SHY: 0.04, Kind.MUTE: 0.03, Kind.SLOW: 0.05}


def draw(*words: object) -> float:
    """A number in [0, 1) that depends on the words alone."""
    return zlib.crc32(" ".join(map(str, words)).encode()) / 2**32


def kind_of(seed: int, key: int) -> Kind:
    drawn = draw("kind", seed, key)
    for kind, share in SHARES.items():
        if drawn < share:
            return kind
        drawn -= share
    return Kind.PLAIN


@dataclass(slots=True)
class Entry:
    """What is known of a key.

    effects: (fence, millisecond) of each. questions: (fence, fence of the grant asked about). refused:
    effects turned away by their fence. recognised: effects that were there already.
    """

    highest: int = 0
    arrivals: int = 0
    effects: list[tuple[int, int]] = field(default_factory=list)
    questions: list[tuple[int, int]] = field(default_factory=list)
    refused: int = 0
    recognised: int = 0


class Ledger:
    """The door (`lets_in`) and the book, per key."""

    def __init__(self, mode: Mode) -> None:
        self._mode = mode
        self.entries: dict[int, Entry] = {}

    def entry(self, key: int) -> Entry:
        return self.entries.setdefault(key, Entry())

    def lets_in(self, key: int, fence: int) -> bool:
        """Whether a fence is not too old; notes it."""
        entry = self.entry(key)
        if self._mode is Mode.FENCE and fence < entry.highest:
            entry.refused += 1
            return False
        entry.highest = max(entry.highest, fence)
        return True

    def apply(self, key: int, fence: int) -> str:
        if not self.lets_in(key, fence):
            return "stale"
        entry = self.entry(key)
        is_known = any(applied == fence for applied, _ in entry.effects)
        if (self._mode is Mode.FENCE and is_known) or (self._mode is Mode.KEY and entry.effects):
            entry.recognised += 1
            return "again"
        entry.effects.append((fence, time.time_ns() // 1_000_000))
        return "applied"

    def ask(self, key: int, fence: int, about: int) -> str:
        entry = self.entry(key)
        entry.questions.append((fence, about))
        if self._mode is Mode.FENCE:
            entry.highest = max(entry.highest, fence)
        return "applied" if entry.effects else "absent"


class Destination:
    """Serves until Finish."""

    def __init__(self, setup: Setup) -> None:
        self._plan = setup.plan
        self._ledger = Ledger(setup.plan.mode)
        self._finished = asyncio.Event()
        self._under_way = 0
        self._telling: asyncio.Task[None] | None = None

    def obey(self, order: Order) -> None:
        if isinstance(order, TellBook):
            self._telling = asyncio.create_task(self._tell_book())
        elif isinstance(order, Finish):
            self._finished.set()

    async def run(self) -> None:
        home = tempfile.mkdtemp(prefix="lk-")
        try:
            path = os.path.join(home, "socket")
            server = await asyncio.start_unix_server(self._converse, path)
            say(Listening(path))
            await self._finished.wait()
            server.close()
        finally:
            shutil.rmtree(home, ignore_errors=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                if not line.endswith(b"\n"):
                    break  # A killed sender stops in the middle of a sentence.
                number, what, *numbers = line.decode().split()
                key, fence, *about = map(int, numbers)
                if what == "ask":
                    answer(writer, number, self._ledger.ask(key, fence, *about))
                else:
                    self._take(writer, number, key, fence)
        except ConnectionError:
            pass
        finally:
            writer.close()

    def _take(self, writer: asyncio.StreamWriter, number: str, key: int, fence: int) -> None:
        """An effect arrives. Where it takes place later, its fence is looked at once more then."""
        plan, ledger = self._plan, self._ledger
        entry = ledger.entry(key)
        entry.arrivals += 1
        kind, is_first = kind_of(plan.seed, key), entry.arrivals == 1
        if not ledger.lets_in(key, fence):
            answer(writer, number, "stale")
        elif kind is Kind.BAD:
            answer(writer, number, "bad")
        elif kind is Kind.SHY and is_first:
            answer(writer, number, "busy")
        elif kind is Kind.SLOW and is_first:
            least, most = DELAY_LEASES
            leases = least + (most - least) * draw("delay", plan.seed, key)
            loop = asyncio.get_running_loop()
            loop.call_later(leases * plan.lease_ms / 1_000, self._come, writer, number, key, fence)
            self._under_way += 1
        else:
            word = ledger.apply(key, fence)
            if not (kind is Kind.MUTE and is_first):
                answer(writer, number, word)

    def _come(self, writer: asyncio.StreamWriter, number: str, key: int, fence: int) -> None:
        self._under_way -= 1
        answer(writer, number, self._ledger.apply(key, fence))

    async def _tell_book(self) -> None:
        while self._under_way:  # noqa: ASYNC110  -- what comes later has no event
            await asyncio.sleep(IDLE_STEP_S)
        rows = [
            (key, entry.effects, entry.questions, entry.refused, entry.recognised)
            for key, entry in self._ledger.entries.items()
        ]
        for start in range(0, len(rows), ROWS_A_REPORT):
            say(Book(rows[start : start + ROWS_A_REPORT]))
        say(BookEnds())


def answer(writer: asyncio.StreamWriter, number: str, word: str) -> None:
    if not writer.is_closing():
        writer.write(f"{number} {word}\n".encode())


class Line:
    """A caller's connection to the destination; many calls may be under way on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[str]] = {}
        self._reading = asyncio.create_task(self._read(reader))

    @classmethod
    async def reach(cls, path: str) -> Line:
        return cls(*await asyncio.open_unix_connection(path))

    async def effect(self, key: int, fence: int) -> str:
        return await self._call(f"effect {key} {fence}")

    async def ask(self, key: int, fence: int, about: int) -> str:
        return await self._call(f"ask {key} {fence} {about}")

    async def close(self) -> None:
        self._reading.cancel()
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    async def _call(self, what: str) -> str:
        number = next(self._numbers)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        # Written before anything else gets a turn: whoever holds before this call has not made it.
        self._writer.write(f"{number} {what}\n".encode())
        try:
            return await waiting
        finally:
            del self._waiting[number]

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            number, word = line.decode().split()
            waiting = self._waiting.get(int(number))
            if waiting is not None and not waiting.done():
                waiting.set_result(word)
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ConnectionError("the destination is gone"))
