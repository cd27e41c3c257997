"""Consuming, measured: waking, idling, and what one noisy tenant costs the quiet ones.

    python bench/fairness.py [--rows 100000] [--seconds 20] [--tenants 10000]

Prints, for an embedded server on this machine: enqueue to handler start on an idle system; commands
that an idle `outbox.run` and an idle `kit.run` over many tenants send in a second; and a quiet
tenant's time from enqueue to handler, beside 98 others, with and without one that has `--rows` rows
waiting, in turns. The work of a row is 100 ms of sleep.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import Any

import leasekit
from leasekit import Draft, Leasekit, RunCounts
from leasekit.outbox import Claim

LANE, TARGET = "bench", "destination"
QUIET_COUNT = 99
WORK_S = 0.1
CONCURRENCY = 200
QUIET_ROWS_PER_S = 100  # of all quiet tenants together
BATCH = 1_000
ROUNDS = 3


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


class Wiretap:
    """Counts the commands that a client sends: on its main connection and beside it."""

    def __init__(self, kit: Leasekit) -> None:
        self.commands = 0
        backend, wire = kit.backend, kit._shared.coalescer._wire
        send, command = wire.send, backend.command

        def counting_send(commands: Any) -> Any:
            self.commands += len(commands)
            return send(commands)

        async def counting_command(*parts: Any) -> Any:
            self.commands += 1
            return await command(*parts)

        wire.send = counting_send  # type: ignore[method-assign]
        backend.command = counting_command  # type: ignore[method-assign]

    async def per_second(self, seconds: float) -> float:
        self.commands = 0
        began = time.monotonic()
        await asyncio.sleep(seconds)
        return self.commands / (time.monotonic() - began)


async def waking(kit: Leasekit) -> dict[str, float]:
    """Milliseconds from before the enqueue to the handler's first line, one row at a time."""
    outbox, arrived = kit.tenant("waking", "w").outbox, asyncio.Event()
    took_ms: list[float] = []
    began = 0.0

    async def handler(claim: Claim) -> None:
        took_ms.append((time.perf_counter() - began) * 1_000)
        arrived.set()

    running = asyncio.create_task(outbox.run(LANE, TARGET, handler))
    for _ in range(300):
        await asyncio.sleep(random.uniform(0.005, 0.02))
        arrived.clear()
        began = time.perf_counter()
        await outbox.enqueue(LANE, TARGET, {})
        await arrived.wait()
    tap = Wiretap(kit)
    idle = await tap.per_second(5)
    running.cancel()
    await asyncio.wait([running])
    return {
        "enqueue_to_handler_p50_ms": percentile(took_ms, 50),
        "enqueue_to_handler_p99_ms": percentile(took_ms, 99),
        "idle_run_commands_per_s": idle,
    }


async def idling(kit: Leasekit, tenants: int, seconds: float) -> dict[str, float]:
    """Commands a second of a kit.run that has nothing to do, over so many tenants."""
    for start in range(0, tenants, BATCH):
        names = range(start, min(start + BATCH, tenants))
        await asyncio.gather(
            *(
                kit.tenant(f"t{name}", "w").outbox.claim(LANE, TARGET, consumer="x")
                for name in names
            )
        )

    async def handler(claim: Claim) -> None:
        raise AssertionError("there are no rows")

    tap = Wiretap(kit)
    running = asyncio.create_task(kit.run([(LANE, TARGET)], handler))
    while tap.commands < tenants:  # noqa: ASYNC110  -- it looks everywhere once at its start
        await asyncio.sleep(0.01)
    await asyncio.sleep(2)
    rate = await tap.per_second(seconds)
    running.cancel()
    await asyncio.wait([running])
    return {"idle_kit_run_tenants": tenants, "idle_kit_run_commands_per_s": rate}


async def quiet_times(kit: Leasekit, seconds: float, *, counts: RunCounts) -> list[float]:
    """Milliseconds from enqueue to handler of quiet tenants' rows that come at random (Poisson)."""
    took_ms: list[float] = []
    sent_at: dict[str, float] = {}

    async def handler(claim: Claim) -> None:
        sent = sent_at.pop(claim.row.id, None)
        if sent is not None:
            took_ms.append((time.perf_counter() - sent) * 1_000)
        await asyncio.sleep(WORK_S)

    stop = asyncio.Event()
    running = asyncio.create_task(
        kit.run([(LANE, TARGET)], handler, concurrency=CONCURRENCY, stop=stop, counts=counts)
    )
    await asyncio.sleep(1)
    until = time.monotonic() + seconds
    pending: set[asyncio.Future[Any]] = set()
    while time.monotonic() < until:
        await asyncio.sleep(random.expovariate(QUIET_ROWS_PER_S))
        id = leasekit.new_id()
        sent_at[id] = time.perf_counter()
        outbox = kit.tenant(f"quiet-{random.randrange(QUIET_COUNT)}", "w").outbox
        sent = asyncio.ensure_future(outbox.enqueue(LANE, TARGET, {}, id=id))
        pending.add(sent)
        sent.add_done_callback(pending.discard)
    while sent_at:  # noqa: ASYNC110  -- the last rows are on their way
        await asyncio.sleep(0.01)
    stop.set()
    await running
    return took_ms


async def fairness(url: str, rows: int, seconds: float) -> dict[str, float]:
    """Quiet tenants' p99 with and without a noisy one, in turns; the medians of the rounds."""
    p99: dict[str, list[float]] = {"alone": [], "beside": []}
    p50: dict[str, list[float]] = {"alone": [], "beside": []}
    left = 0
    for number in range(ROUNDS):
        for kind in ("alone", "beside") if number % 2 else ("beside", "alone"):
            async with leasekit.connect(url, prefix=f"fair-{number}-{kind}") as kit:
                noisy = kit.tenant("noisy", "w").outbox
                for start in range(0, rows if kind == "beside" else 0, BATCH):
                    drafts = [Draft(lane=LANE, target=TARGET, payload=start)] * BATCH
                    await noisy.enqueue_many(drafts)
                took_ms = await quiet_times(kit, seconds / ROUNDS, counts=RunCounts())
                p99[kind].append(percentile(took_ms, 99))
                p50[kind].append(percentile(took_ms, 50))
                if kind == "beside":
                    left = (await noisy.counts()).pending
    assert left > 0, "the noisy tenant ran out of rows"
    with_it, without = statistics.median(p99["beside"]), statistics.median(p99["alone"])
    return {
        "noisy_rows": rows,
        "quiet_p50_ms_alone": statistics.median(p50["alone"]),
        "quiet_p50_ms_beside_noisy": statistics.median(p50["beside"]),
        "quiet_p99_ms_alone": without,
        "quiet_p99_ms_beside_noisy": with_it,
        "quiet_p99_ratio": with_it / without,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--tenants", type=int, default=10_000)
    asked = parser.parse_args()
    figures: dict[str, float] = {}
    async with leasekit.connect("embedded://", prefix="waking") as kit:
        figures |= await waking(kit)
        async with leasekit.connect(kit.server.url, prefix="idling") as idle:
            figures |= await idling(idle, asked.tenants, asked.seconds)
        figures |= await fairness(kit.server.url, asked.rows, asked.seconds)
        figures["server"] = f"{kit.server.name} {'.'.join(map(str, kit.server.version))}"  # type: ignore[assignment]
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    asyncio.run(main())
