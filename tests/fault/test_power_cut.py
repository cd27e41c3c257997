"""The gate over power cuts: with `fsync` nothing that was acknowledged is lost.

A run takes one seed: senders are granted intents and complete them until, at a moment of the seed's
choice, the server's power is cut (fault/power.py says how). What was acknowledged is then held
against what the server knows after its restart, and every key is asked for once more:

- lost: a grant or a completion that was acknowledged, and is not there;
- double: a key that had been granted is granted again;
- out of order: a later fence that is not above all before.

With `fsync`, on `appendfsync always`, all of them must be none. With `none`, on `everysec`, they are what
a power cut costs there, and are counted. `PYTHONPATH=tests python -m fault.test_power_cut --seeds 20`
runs both, and prints the table.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fault.calls import intent_of, success_of
from fault.power import TracedServer, synced_bytes, why_not
from servers import NoServer, dump

import leasekit
from leasekit import LeasekitError, Tenant
from leasekit.gate.identity import outbox_id

SMOKE_SEEDS = 2
SENDERS = 16
GRANTS_MIN = 50  # before the cut
SECONDS_MAX = 1.5  # of work after that: more than `everysec` waits
TIMEOUT_MS = 5_000
LEASE_MS = 600_000
APPENDFSYNC = {"fsync": "always", "none": "everysec"}
PROBLEMS_SHOWN = 10


pytestmark = pytest.mark.timeout(180)  # a busy machine has other things to do


@dataclass
class Table:
    """What happened, all runs of a class of durability together."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def note_problem(self, problem: str, what: str) -> None:
        self.counts[problem] += 1
        self.problems.append(f"{problem}: {what}")

    def __str__(self) -> str:
        rows = (
            *("runs", "grants", "completions", "refused", "bytes lost"),
            *("grants lost", "completions lost", "keys granted twice", "fences out of order"),
        )
        return "\n".join(f"{row:24}{self.counts[row]:10}" for row in rows)


class Senders:
    """They go through keys of their own, and note what was acknowledged."""

    def __init__(self, tenant: Tenant, table: Table) -> None:
        self.tenant = tenant
        self.table = table
        self.fences: dict[str, int] = {}
        self.completed: set[str] = set()
        self.at_work, self.is_over = asyncio.Event(), False

    async def send(self, number: int) -> None:
        turn = 0
        while not self.is_over:
            turn += 1
            key = f"{number}-{turn}"
            try:
                receipt = await self.tenant.gate.prepare(intent_of(key), lease_ms=LEASE_MS)
                assert receipt is not None
                self.fences[key] = receipt.fence
                if len(self.fences) >= GRANTS_MIN:
                    self.at_work.set()
                if turn % 4:  # Some are under way when the power goes.
                    word = await self.tenant.gate.complete(success_of(key), receipt=receipt)
                    if word == "recorded":
                        self.completed.add(key)
            except LeasekitError:
                self.table.counts["refused"] += 1

    async def ask_again(self, key: str) -> None:
        try:
            await self.tenant.gate.prepare(intent_of(key), lease_ms=LEASE_MS)
        except LeasekitError:
            return
        self.table.note_problem("keys granted twice", key)


async def run_seed(seed: int, durability: str, table: Table) -> None:
    """A server of its own, whose power is cut once."""
    chance = random.Random(seed)
    traced = TracedServer(appendfsync=APPENDFSYNC[durability])
    try:
        await asyncio.to_thread(traced.start)
        async with leasekit.connect(
            traced.server.url, durability=durability, timeout_ms=TIMEOUT_MS
        ) as kit:
            senders = Senders(kit.tenant("o", "w"), table)
            async with asyncio.TaskGroup() as tasks:
                for number in range(SENDERS):
                    tasks.create_task(senders.send(number))
                await senders.at_work.wait()
                await asyncio.sleep(chance.uniform(0, SECONDS_MAX))
                # In threads: senders are at work when the power goes, and learn of it.
                await asyncio.to_thread(traced.server.kill)
                senders.is_over = True
                table.counts["bytes lost"] += await asyncio.to_thread(traced.come_back)
            await judge(senders, traced, table)
    finally:
        await asyncio.to_thread(traced.stop)
    table.counts["runs"] += 1


async def judge(senders: Senders, traced: TracedServer, table: Table) -> None:
    table.counts["grants"] += len(senders.fences)
    table.counts["completions"] += len(senders.completed)
    state = dump(traced.server.raw, "lk", senders.tenant.tag).get("gate:state", {})
    for key, fence in senders.fences.items():
        words = state.get(outbox_id(key), "").split(" ")
        if words[8:9] != [str(fence)]:
            table.note_problem("grants lost", f"{key} of fence {fence}")
        elif key in senders.completed and words[0] != "sent":
            table.note_problem("completions lost", f"{key} is {words[0]}")
    await asyncio.gather(*map(senders.ask_again, senders.fences))
    try:
        receipt = await senders.tenant.gate.prepare(intent_of("last"), lease_ms=LEASE_MS)
    except LeasekitError:  # All data is gone, and nothing is granted any more.
        return
    assert receipt is not None
    if receipt.fence <= max(senders.fences.values()):
        table.note_problem("fences out of order", str(receipt.fence))


async def run_seeds(seeds: int, durability: str, first: int = 0) -> Table:
    table = Table()
    for seed in range(first, first + seeds):
        await run_seed(seed, durability, table)
    return table


@pytest.fixture
def power_can_be_cut() -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)


@pytest.mark.usefixtures("power_can_be_cut")
async def test_fsync_loses_nothing_that_was_acknowledged() -> None:
    try:
        table = await run_seeds(SMOKE_SEEDS, "fsync")
    except NoServer as error:
        pytest.skip(str(error))
    assert not table.problems, "\n".join(table.problems[:PROBLEMS_SHOWN])
    assert table.counts["completions"] > 0


@pytest.mark.usefixtures("power_can_be_cut")
async def test_a_power_cut_is_felt_where_nothing_is_synced() -> None:
    """Else the test above would show nothing."""
    try:
        table = await run_seeds(1, "none")
    except NoServer as error:
        pytest.skip(str(error))
    assert table.counts["bytes lost"] > 0
    assert table.counts["grants lost"] + table.counts["completions lost"] > 0


def test_synced_is_what_was_written_before_the_sync_began() -> None:
    """Also where the sync is another thread's, and calls overlap."""
    lines = """
7 openat(AT_FDCWD</h>, "a.incr.aof", O_WRONLY) = 9</h/a.incr.aof>
7 write(9</h/a.incr.aof>, ""..., 50) = 50
7 write(8<socket:[3]>, ""..., 500) = 500
8 fdatasync(9</h/a.incr.aof> <unfinished ...>
7 write(9</h/a.incr.aof>, ""..., 20) = 20
8 <... fdatasync resumed>) = 0
7 write(9</h/a.incr.aof>, ""..., 5 <unfinished ...>
8 fdatasync(4</h/manifest>) = 0
7 <... write resumed>) = 5
""".splitlines()
    path = Path("/h/a.incr.aof")
    assert synced_bytes(lines, path) == 50
    assert synced_bytes([*lines, "8 fdatasync(9</h/a.incr.aof>) = 0"], path) == 75
    assert synced_bytes([*lines, "8 fdatasync(9</h/a.incr.aof> <unfinished ...>"], path) == 50
    assert synced_bytes([*lines, "8 fdatasync(9</h/a.incr.aof>) = -1 EIO"], path) == 50


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    if (reason := why_not()) is not None:
        parser.error(reason)
    for durability, appendfsync in APPENDFSYNC.items():
        began_at = time.monotonic()
        table = asyncio.run(run_seeds(given.seeds, durability, given.first))
        print(f"durability {durability}, appendfsync {appendfsync}")  # noqa: T201
        print(table)  # noqa: T201
        print(f"{'seconds':24}{time.monotonic() - began_at:10.0f}\n")  # noqa: T201
        if durability == "fsync" and table.problems:
            sys.exit("\n".join(table.problems[:PROBLEMS_SHOWN]))


if __name__ == "__main__":
    main()
