"""Who claims next: routes in turn, each with its share, woken by hints and due times.

Pure: no clock, no tasks, no server. Seconds come in from outside, so that a test plays hours at once.

An *entry* is one route of one tenant. It is ready (rows may be due: it stands in line), being
claimed, or waits for its next due time; `poll_s` bounds how long it waits when hints get lost. Polls
lie on a grid of the entry's own, so that ten thousand entries spread evenly over `poll_s` also after
all of them were asked at once.

Turns are deficit round robin: an entry takes up to `turn` rows while it has more, and then goes to
the end of the line, whatever it has left. A tenant never has more than its room's share in flight;
an entry without room leaves the line until there is some again. So one tenant with a long line costs
the others at most its share of the slots.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from typing import Any

__all__ = ["Entry", "Room", "Schedule"]

# A claim takes about as many rows as a flight carries: handlers begin with the first while the next
# are on their way.
CLAIM_ROWS_MAX = 200
DUES_LEAST = 1_000


class Room:
    """A tenant's share: at most `most` rows in flight, over all its routes."""

    __slots__ = ("in_flight", "most", "waiting")

    def __init__(self, most: int) -> None:
        self.most = most
        self.in_flight = 0
        self.waiting: list[Entry] = []


class Entry:
    """One route of one tenant. `turn`: rows that it may take before the next one has its turn."""

    __slots__ = (
        *("claim_id", "credit", "due_s", "failures", "is_claiming", "is_ready", "is_woken"),
        *("lane", "phase", "room", "source", "target", "turn"),
    )

    def __init__(self, source: Any, lane: str, target: str, room: Room, *, turn: int) -> None:
        self.source = source
        self.lane = lane
        self.target = target
        self.room = room
        self.turn = turn
        self.phase = random.random()
        self.credit = 0
        self.due_s = math.inf
        self.is_ready = False
        self.is_claiming = False
        self.is_woken = False
        # Of claims that failed: how many in a row, and the name under which to ask again.
        self.failures = 0
        self.claim_id: str | None = None


class Schedule:
    """Entries, their line, and the slots that all of them share."""

    def __init__(self, slots: int, *, poll_s: float) -> None:
        self.free = slots
        self._poll_s = poll_s
        self._ready: deque[Entry] = deque()
        self._dues: list[tuple[float, int, Entry]] = []
        self._dues_most = DUES_LEAST
        self._numbers = itertools.count()

    def wake(self, entry: Entry, delay_s: float, now_s: float) -> None:
        """Rows of the entry may be due in `delay_s`; an earlier time that is known stays."""
        if delay_s > 0:
            if now_s + delay_s < entry.due_s:
                entry.due_s = now_s + delay_s
                heapq.heappush(self._dues, (entry.due_s, next(self._numbers), entry))
                if len(self._dues) > self._dues_most:
                    self._forget_old_dues()
        elif entry.is_claiming:
            entry.is_woken = True  # The claim under way may have been too early to see it.
        elif not entry.is_ready:
            entry.is_ready = True
            entry.due_s = math.inf
            self._ready.append(entry)

    def next_due_s(self) -> float | None:
        """When `advance` has something to do next; None = not before somebody is woken."""
        while self._dues and self._dues[0][0] != self._dues[0][2].due_s:
            heapq.heappop(self._dues)
        return self._dues[0][0] if self._dues else None

    def advance(self, now_s: float) -> None:
        """Let those whose time has come stand in line."""
        while (due_s := self.next_due_s()) is not None and due_s <= now_s:
            entry = heapq.heappop(self._dues)[2]
            entry.due_s = math.inf
            self.wake(entry, 0, now_s)

    def take(self) -> tuple[Entry, int] | None:
        """The entry whose turn it is and how many rows it may claim; their slots are taken now.

        None: nobody is ready, or no slot is free. `took` must follow.
        """
        while self._ready and self.free > 0:
            entry = self._ready.popleft()
            room = entry.room
            left = room.most - room.in_flight
            if left <= 0:
                room.waiting.append(entry)
                continue
            if entry.credit <= 0:
                entry.credit = entry.turn
            rows = min(entry.credit, self.free, left, CLAIM_ROWS_MAX)
            entry.is_ready = False
            entry.is_claiming = True
            self.free -= rows
            room.in_flight += rows
            return entry, rows
        return None

    def took(
        self,
        entry: Entry,
        asked: int,
        got: int,
        *,
        more: bool,
        next_s: float | None,
        now_s: float,
    ) -> None:
        """A claim is over: `got` rows of `asked` keep their slots. `more`: further rows are due now;
        `next_s`: in so many seconds some will be."""
        entry.is_claiming = False
        entry.credit -= got
        self.freed(entry, asked - got)
        if more and entry.credit > 0:
            entry.is_ready, entry.due_s = True, math.inf
            self._ready.appendleft(entry)
        elif more or entry.is_woken:
            self.wake(entry, 0, now_s)
        else:
            entry.credit = 0
            self.wake(entry, self._until_poll_s(entry, now_s), now_s)
            if next_s is not None:
                self.wake(entry, max(next_s, 0.001), now_s)
        entry.is_woken = False

    def failed(self, entry: Entry, asked: int, *, pause_s: float, now_s: float) -> None:
        """A claim failed: the entry stands back for so long, or until somebody wakes it."""
        entry.is_claiming = entry.is_woken = False
        entry.credit, entry.due_s = 0, math.inf
        self.freed(entry, asked)
        self.wake(entry, pause_s, now_s)

    def freed(self, entry: Entry, rows: int) -> None:
        """So many rows of the entry are no longer in flight."""
        self.free += rows
        room = entry.room
        room.in_flight -= rows
        if room.waiting and room.in_flight < room.most:
            self._ready.extend(room.waiting)
            room.waiting.clear()

    def _forget_old_dues(self) -> None:
        """Drop times that count no more, which a busy entry leaves behind with each claim."""
        self._dues = [due for due in self._dues if due[0] == due[2].due_s]
        heapq.heapify(self._dues)
        self._dues_most = max(2 * len(self._dues), DUES_LEAST)

    def _until_poll_s(self, entry: Entry, now_s: float) -> float:
        left_s = self._poll_s - (now_s - entry.phase * self._poll_s) % self._poll_s
        # A timer that was a little early must not make two polls of one.
        return left_s if left_s > self._poll_s / 100 else left_s + self._poll_s
