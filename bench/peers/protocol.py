"""The worker's side: orders come as lines, answers leave as lines of JSON.

`prepare N` enqueues N jobs; `process N` starts a worker that works them off, and answers how long that
took until the end of the last job (`seconds`) and this process's CPU time meanwhile (`cpu_s`). What the
queue's own code prints goes to standard error.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

URL = os.environ["BENCH_REDIS_URL"]
TEXT = "x" * 189

_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


class Jobs:
    """Counts the jobs of one order; the handler calls `done` once a job, in any thread."""

    def expect(self, count: int, finish: Callable[[], object]) -> None:
        """Call `finish` at the end of the last of so many jobs, and note the time."""
        self._ends = itertools.count(1)  # its next() is one step, also between threads
        self._last, self._finish = count, finish

    def done(self) -> None:
        if next(self._ends) == self._last:
            clocks.append(_now())
            self._finish()


jobs = Jobs()
clocks: list[tuple[float, float]] = []


def job(number: int, text: str) -> None:
    """A job for queues that want a function of a module."""
    jobs.done()


def serve(prepare: Callable[[int], object], process: Callable[[int], object]) -> None:
    """Answer orders by plain functions until the input ends."""
    for line in sys.stdin:
        order, count = line.split()
        clocks[:] = [_now()]
        (prepare if order == "prepare" else process)(int(count))
        _answer()


async def serve_async(
    prepare: Callable[[int], Awaitable[Any]], process: Callable[[int], Awaitable[Any]]
) -> None:
    """The same by coroutines on one event loop."""
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order, count = line.split()
        clocks[:] = [_now()]
        await (prepare if order == "prepare" else process)(int(count))
        _answer()


async def side_by_side(count: int, work: Callable[[int], Awaitable[Any]], width: int = 50) -> None:
    """`work(number)` for each of so many numbers, a few at a time."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await work(number)

    await asyncio.gather(*[worker() for _ in range(width)])


async def run_until_done(count: int, work: Awaitable[Any]) -> None:
    """Run a worker until so many jobs are done, then cancel it."""
    finished = asyncio.Event()
    jobs.expect(count, finished.set)
    worker = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(finished.wait())
    await asyncio.wait([worker, waiting], return_when=asyncio.FIRST_COMPLETED)
    if not finished.is_set():
        worker.result()
        raise SystemExit("the worker ended before its jobs were done")
    await asyncio.sleep(0.2)  # What it does after the last job, it shall do in peace.
    worker.cancel()
    await asyncio.gather(worker, return_exceptions=True)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _answer() -> None:
    """From the order to the end of the last job; what a worker does to stop is not counted."""
    (began, cpu_before), (ended, cpu_after) = clocks[0], clocks[1] if clocks[1:] else _now()
    answer = {"seconds": ended - began, "cpu_s": cpu_after - cpu_before}
    print(json.dumps(answer), file=_answers, flush=True)
