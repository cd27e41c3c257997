"""The destination: a process that takes deliveries at a unix socket and keeps its own ledger.

On a connection the holder says its name, then for each delivery `id fence length`, a line end and so
many bytes of body. The answer is a word: applied | again (this holder, this fence: nothing is done
twice) | stale (a newer fence was seen for the row: refused).
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
import time
from collections import Counter

from leasekit.demo import messages
from leasekit.demo.child import say
from leasekit.demo.messages import Finish, Order, Setup, TellLedger

__all__ = ["Destination", "Ledger", "digest_of", "made_at_ms"]

REPORT_EVERY_S = 0.02
LEDGER_ROWS_A_LINE = 500
READ_AHEAD_BYTES = 2**20

_DIGITS = {ord(digit): value for value, digit in enumerate("0123456789abcdefghjkmnpqrstvwxyz")}
_TIME_DIGITS = 10  # of a row id: 48 bits of milliseconds since 1970


def digest_of(body: bytes) -> int:
    """Eight bytes that tell one body from another."""
    return int.from_bytes(hashlib.blake2b(body, digest_size=7).digest())


def made_at_ms(id: str) -> int:
    """When a row id was made, by the clock of the producer, which is this machine's."""
    number = 0
    for digit in id[:_TIME_DIGITS]:
        number = number * 32 + _DIGITS[ord(digit)]
    return number


class _Entry:
    """What is known of a row: its body, and every application in its order."""

    __slots__ = ("applied", "digest", "fence_seen")

    def __init__(self, digest: int) -> None:
        self.digest = digest
        self.fence_seen = 0
        self.applied: tuple[tuple[int, str], ...] = ()


class Ledger:
    """The door (`fence_seen` decides) and the book (`applied` records), per row id."""

    def __init__(self) -> None:
        self.entries: dict[str, _Entry] = {}
        self.refused_as_stale = 0
        self.altered = 0
        self.shared_fences = 0
        self.latency_ms: Counter[int] = Counter()

    def take(self, id: str, fence: int, digest: int, holder: str, now_ms: int) -> str:
        """Apply a delivery, or refuse it; gives the answer's word."""
        entry = self.entries.get(id)
        if entry is None:
            entry = self.entries[id] = _Entry(digest)
            self.latency_ms[max(now_ms - made_at_ms(id), 0)] += 1
        if fence < entry.fence_seen:
            self.refused_as_stale += 1
            return "stale"
        if entry.applied and entry.applied[-1] == (fence, holder):
            return "again"
        self.shared_fences += fence == entry.fence_seen
        self.altered += digest != entry.digest
        entry.fence_seen = fence
        entry.applied += ((fence, holder),)
        return "applied"


class Destination:
    """Serves until Finish."""

    def __init__(self, setup: Setup) -> None:
        self._ledger = Ledger()
        self._finished = asyncio.Event()
        self._reporting: asyncio.TimerHandle | None = None
        self._conversations: set[asyncio.Task[None]] = set()

    def obey(self, order: Order) -> None:
        if isinstance(order, TellLedger):
            self._tell_ledger()
        elif isinstance(order, Finish):
            self._finished.set()

    async def run(self) -> None:
        home = tempfile.mkdtemp(prefix="leasekit-demo-")
        try:
            path = os.path.join(home, "socket")
            server = await asyncio.start_unix_server(self._converse, path, limit=READ_AHEAD_BYTES)
            say(messages.Listening(path))
            await self._finished.wait()
            server.close()
        finally:
            shutil.rmtree(home, ignore_errors=True)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        holder = (await reader.readline()).decode().strip()
        try:
            while header := await reader.readline():
                id, fence, length = header.decode().split()
                digest = digest_of(await reader.readexactly(int(length)))
                now_ms = time.time_ns() // 1_000_000
                word = self._ledger.take(id, int(fence), digest, holder, now_ms)
                writer.write(f"{word}\n".encode())
                self._report_soon()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # A killed dispatcher stops in the middle of a sentence.
        finally:
            writer.close()

    def _report_soon(self) -> None:
        if self._reporting is None:
            loop = asyncio.get_running_loop()
            self._reporting = loop.call_later(REPORT_EVERY_S, self._report)

    def _report(self) -> None:
        self._reporting = None
        say(messages.Applied(len(self._ledger.entries)))

    def _tell_ledger(self) -> None:
        ledger = self._ledger
        rows = [(id, entry.digest, list(entry.applied)) for id, entry in ledger.entries.items()]
        for start in range(0, len(rows), LEDGER_ROWS_A_LINE):
            say(messages.LedgerRows(rows[start : start + LEDGER_ROWS_A_LINE]))
        say(
            messages.Latencies(
                dict(ledger.latency_ms),
                ledger.refused_as_stale,
                ledger.altered,
                ledger.shared_fences,
            )
        )
