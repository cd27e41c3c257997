"""A process of the load test: connects, measures what it costs itself, works, and shows its books."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

from leasekit.client import Leasekit, connect
from leasekit.demo.child import say
from leasekit.demo.producer import bodies
from leasekit.load import messages
from leasekit.load.messages import Begin, Order, Setup
from leasekit.load.notes import Book
from leasekit.load.plan import DURATION_S_DEFAULT, DURATION_S_MOST, Plan
from leasekit.load.stand_in import StandIn
from leasekit.load.traffic import Traffic, clock_s

__all__ = ["Worker", "payloads_of"]

PROGRESS_EVERY_S = 0.25
CALIBRATION_ROUNDS = 2_000
SUSPECTS_A_REPORT = 5_000
PAYLOADS_MOST = 1_000
ORG = "load"


class Worker:
    """Begins at Begin, ends at Finish."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._book = Book()
        self._connection: object = None
        self._may_begin = asyncio.Event()
        self._must_finish = asyncio.Event()

    def obey(self, order: Order) -> None:
        self._may_begin.set()
        if not isinstance(order, Begin):
            self._must_finish.set()

    async def run(self) -> None:
        setup, plan = self._setup, self._setup.plan
        payloads = payloads_of(plan)
        async with connect(setup.url, prefix=setup.prefix) as kit:
            tenants = [kit.tenant(ORG, f"tenant-{number}") for number in range(plan.tenants)]
            say(messages.Joined(await _own_cost_us(payloads)))
            await self._may_begin.wait()
            if self._must_finish.is_set():
                return
            traffic = Traffic(plan, setup.number, tenants, payloads, self._book)
            reporting = asyncio.create_task(self._keep_reporting(kit))
            operations, latencies_us = await self._work(traffic)
            reporting.cancel()
            self._look_at_connection(kit)
        self._say_suspects()
        say(self._book.notes(operations, latencies_us))

    async def _work(self, traffic: Traffic) -> tuple[int, dict[str, dict[int, int]]]:
        """Produce, say so, claim what is left until Finish: operations and latencies until then."""
        plan = self._setup.plan
        consuming = asyncio.create_task(traffic.consume()) if plan.rate is not None else None
        began_s, cpu_before_s = clock_s(), time.process_time()
        lasts_s = plan.duration_s or (DURATION_S_MOST if plan.count else DURATION_S_DEFAULT)
        producing = asyncio.create_task(traffic.produce(began_s + lasts_s))
        await _first_of(producing, consuming)
        report = messages.Produced(
            seconds=clock_s() - began_s,
            cpu_seconds=time.process_time() - cpu_before_s,
            operations=self._book.operations,
            acked=self._book.acked,
            arrivals_not_begun=traffic.arrivals_not_begun,
        )
        latencies_us = self._book.latencies_us()
        say(report)
        consuming = consuming or asyncio.create_task(traffic.consume())
        finish = asyncio.create_task(self._must_finish.wait())
        await _first_of(finish, consuming)
        consuming.cancel()
        await asyncio.wait([consuming])
        return report.operations, latencies_us

    async def _keep_reporting(self, kit: Leasekit) -> None:
        while True:
            await asyncio.sleep(PROGRESS_EVERY_S)
            self._look_at_connection(kit)
            self._book.fold()
            say(self._book.progress())

    def _look_at_connection(self, kit: Leasekit) -> None:
        # Only these two know; a client has no need to tell others than this test.
        coalescer = kit._shared.coalescer
        connection = getattr(coalescer._wire, "lost", None)
        if connection is not None and connection is not self._connection:
            self._book.reconnects += self._connection is not None
            self._connection = connection
        self._book.client_repeats = coalescer.repeats

    def _say_suspects(self) -> None:
        suspects = self._book.suspects
        for at in range(0, len(suspects), SUSPECTS_A_REPORT):
            say(messages.Suspects(suspects[at : at + SUSPECTS_A_REPORT]))


async def _first_of(wanted: asyncio.Task[Any], other: asyncio.Task[Any] | None) -> None:
    """Wait for `wanted`; what ends `other` meanwhile is raised: nothing must fail unseen."""
    both = {wanted} if other is None else {wanted, other}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        for task in both:
            task.cancel()
        raise
    if other is not None and other.done():
        wanted.cancel()
        await other
    await wanted


def payloads_of(plan: Plan) -> Sequence[Any]:
    """What is enqueued, in turn: the first values of the input file, or one of the size asked for."""
    if plan.input_path is None:
        return [{"body": "x" * (plan.payload_bytes - len('{"body":""}'))}]
    return list(islice(bodies(plan.input_path), PAYLOADS_MOST))


async def _own_cost_us(payloads: Sequence[Any]) -> float:
    """Microseconds of processor time that the harness itself spends on one lifecycle."""
    book = Book()
    alone = Plan(mix={"lifecycle": 1.0})
    traffic = Traffic(alone, 0, [StandIn(payloads[0])], payloads, book)
    before_s = time.process_time()
    for _ in range(CALIBRATION_ROUNDS):
        await traffic.lifecycle(0, clock_s())
    book.fold()
    return (time.process_time() - before_s) / CALIBRATION_ROUNDS * 1e6
