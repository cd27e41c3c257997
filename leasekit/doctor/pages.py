"""One tenant, read page by page while others write, and the findings about it.

Every call is bounded: pages grow while documents are small and shrink when they are large.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from leasekit.connect import Backend
from leasekit.doctor.finding import ADVICE, Finding, Problem
from leasekit.keys import Keys

__all__ = ["LOOKS_MAX", "PAGE_MOST", "Pace", "Pages"]

PAGE_FIRST = 16
PAGE_MOST = 500
PAGE_BYTES_LOW = 256 * 1024
PAGE_BYTES_HIGH = 1024 * 1024
LOOKS_MAX = 3


class Pace:
    """How many documents to read at a time, so that a page stays between two sizes."""

    def __init__(self) -> None:
        self.count = PAGE_FIRST

    def learn(self, size_bytes: int) -> None:
        if size_bytes > PAGE_BYTES_HIGH:
            self.count = max(self.count // 2, 1)
        elif size_bytes < PAGE_BYTES_LOW:
            self.count = min(self.count * 2, PAGE_MOST)


class Pages:
    """What all sweeps of a tenant share. `fence_most`: the highest fence that any of them saw."""

    def __init__(self, backend: Backend, keys: Keys, on_progress: Callable[[int], None]) -> None:
        self.backend = backend
        self.keys = keys
        self.pace = Pace()
        self.fence_most = 0
        self._on_progress = on_progress

    def note_fence(self, fence: int) -> None:
        self.fence_most = max(self.fence_most, fence)

    async def scan(
        self, command: str, key: str, *, documents: bool = False
    ) -> AsyncIterator[list[tuple[bytes, Any]]]:
        """Pages of a hash or a sorted set; everything that is there all the while comes at least once."""
        cursor: Any = 0
        while True:
            count = self.pace.count if documents else PAGE_MOST
            cursor, flat = await self.backend.command(command, key, cursor, "COUNT", count)
            page = list(zip(flat[::2], flat[1::2], strict=True))
            if documents:
                self.pace.learn(sum(len(value) for value in flat if isinstance(value, bytes)))
            if page:
                self._on_progress(len(page))
                yield page
            if not int(cursor):
                return

    def finding(
        self, problem: Problem, id: str | None, route: str = "", *, concept: str = "outbox"
    ) -> Finding:
        return self.finding_at(self.keys.named(concept, problem.noun, route), id, problem)

    def finding_at(self, key: str, id: str | None, problem: Problem) -> Finding:
        return Finding(
            kind=problem.kind, key=key, id=id, what=problem.what, advice=ADVICE[problem.kind]
        )
