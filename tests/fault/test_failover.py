"""The gate over failovers: what was granted is granted once, and the promoted server knows of it.

A run takes one seed and one tenant. Senders of two clients go through the same keys, by prepare and
complete or by dispatch, and enter each call that was granted in the destination's book. Meanwhile
replies are lost, the replication stalls so that barriers fall short, and the primary is killed,
stopped, cut off, or split off with a client that still reaches it; the most advanced replica is
promoted, the clients are led to it, and the old primary comes back as a replica, with its memory or
without. At the end every key is asked for once more, and the book is held against the new primary:

- double: a key is in the book twice. No lease ends in a run, so once is all there may be;
- lost: the new primary does not know a grant, or a completion, that was acknowledged;
- out of order: a fence is no higher than one that had come before its grant was asked for;
- other: a refusal that is none of REFUSALS, a replica that differs in the end.

With `replicated(n)` of n replicas all of them must be none. With `none` they are what a failover costs
there, and are counted. `PYTHONPATH=tests python -m fault.test_failover --seeds 200` runs many, and
prints the table.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import pytest
from fault.calls import intent_of, success_of
from fault.failover import Group, Node, open_group
from fault.proxy import Fault, Plan, Proxy
from servers import NoServer, dump

import leasekit
from leasekit import InProgress, LeasekitError, NotDurable, Tenant, new_token, replicated
from leasekit.durability import Durability, durability_of
from leasekit.gate import Receipt
from leasekit.gate.identity import outbox_id

SMOKE_SEEDS = 6
CLIENTS = 2
SENDERS = 4  # of each client
KEYS_CONTESTED = 50
TIMEOUT_MS = 300
BARRIER_MS = 60
LEASE_MS = 60_000
ASKS_MAX = 4  # for one grant or one completion
PROBLEMS_SHOWN = 10

# What a caller is told who gets no grant, or no answer.
REFUSALS = ("NotDurable", "Unavailable", "OutcomeUnknown", "LeaseLost", "Conflict", "InProgress")
DATA_LOST = (
    "data lost"  # an Unavailable of its own: the server has not the data that granted before
)
FINAL = {"Conflict", "InProgress", DATA_LOST}


pytestmark = pytest.mark.timeout(180)  # a busy machine has other things to do


class Failover(StrEnum):
    """What befalls the primary."""

    KILLED = "killed"
    STOPPED = "stopped"
    CUT = "cut off"
    SPLIT = "split off with a client"


class Problem(StrEnum):
    """What must not be."""

    LOST_GRANT = "grants lost"
    LOST_COMPLETION = "completions lost"
    DOUBLE = "keys granted twice"
    FENCE = "fences out of order"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Entry:
    """One call in the destination's book; times on the test's clock."""

    key: str
    fence: int
    asked_at: float
    granted_at: float


@dataclass
class Book:
    """What the destination was sent, and the keys whose completion was acknowledged."""

    entries: list[Entry] = field(default_factory=list)
    completed: set[str] = field(default_factory=set)

    def doubles(self) -> list[str]:
        counts = Counter(entry.key for entry in self.entries)
        return [key for key, count in counts.items() if count > 1]

    def out_of_order(self) -> list[Entry]:
        """Entries whose fence is no higher than one that had come before they were asked for."""
        late, highest = [], 0
        given, at = sorted(self.entries, key=lambda entry: entry.granted_at), 0
        for entry in sorted(self.entries, key=lambda entry: entry.asked_at):
            while given[at].granted_at < entry.asked_at:
                highest = max(highest, given[at].fence)
                at += 1
            if entry.fence <= highest:
                late.append(entry)
        return late


@dataclass
class Table:
    """What happened, all runs together."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [
            *("runs", "grants", "grants after a short barrier", "completions"),
            *(f"refused: {name}" for name in (*REFUSALS, DATA_LOST)),
            *(f"failover: {kind}" for kind in Failover),
            *Problem,
        ]
        return "\n".join(f"{row:34}{self.counts[row]:8}" for row in rows)


class Run:
    """One seed: senders, what befalls their primary meanwhile, and the verdict."""

    def __init__(self, group: Group, seed: int, table: Table, proxies: list[Proxy]) -> None:
        self.group = group
        self.seed = seed
        self.table = table
        self.proxies = proxies
        # Apart, so that what befalls the servers does not hang on how far the senders came.
        self.chance = random.Random(seed)
        self.senders_chance = random.Random(seed)
        self.book = Book()
        self.keys: list[str] = []
        self.history: dict[str, list[str]] = {}
        self.is_over = False

    # ----------------------------------------------------------------------------------- senders

    async def send(self, tenant: Tenant) -> None:
        """New keys and contested ones, until the run is over."""
        chance = self.senders_chance
        while not self.is_over:
            if not self.keys or chance.random() < 0.5:
                key = f"{self.seed}-{len(self.keys)}"
                self.keys.append(key)
            else:
                key = chance.choice(self.keys[-KEYS_CONTESTED:])
            if chance.random() < 0.3:
                await self.dispatch(tenant, key)
            else:
                await self.attempt(tenant, key)

    async def dispatch(self, tenant: Tenant, key: str) -> None:
        asked_at = time.monotonic()
        try:
            async with tenant.gate.dispatch(intent_of(key), lease_ms=LEASE_MS) as permit:
                permit.begin()
                assert permit.fence is not None
                self.enter(key, permit.fence, asked_at)
                await permit.sent()
        except LeasekitError as error:
            self.note_refusal(key, error)
        else:
            self.note_completed(key)

    async def attempt(self, tenant: Tenant, key: str) -> None:
        """Ask for the grant of a key, enter the call if it comes, complete."""
        token, repeat, fell_short = new_token(), False, False
        asked_at = time.monotonic()
        for _ in range(ASKS_MAX):
            try:
                receipt = await tenant.gate.prepare(
                    intent_of(key), token=token, repeat=repeat, lease_ms=LEASE_MS
                )
            except LeasekitError as error:
                refusal = self.note_refusal(key, error)
                if refusal in FINAL:
                    return
                fell_short = fell_short or refusal == "NotDurable"
                await asyncio.sleep(self.senders_chance.uniform(0, 0.03))
                # By the same name, or anew, as one does who does not know of the first try.
                repeat = self.senders_chance.random() < 0.7
                if not repeat:
                    token, asked_at = new_token(), time.monotonic()
            else:
                assert receipt is not None
                self.enter(key, receipt.fence, asked_at)
                self.table.counts["grants after a short barrier"] += fell_short
                await asyncio.sleep(self.senders_chance.choice([0, 0, 0.002]))
                await self.complete(tenant, key, receipt)
                return

    async def complete(self, tenant: Tenant, key: str, receipt: Receipt) -> None:
        for number in range(ASKS_MAX):
            try:
                word = await tenant.gate.complete(
                    success_of(key), receipt=receipt, repeat=number > 0
                )
            except LeasekitError as error:
                self.note_refusal(key, error)
            else:
                if word == "recorded":
                    self.note_completed(key)
                else:
                    self.note_problem(Problem.LOST_GRANT, f"{key} was completed: {word}")
                return

    def enter(self, key: str, fence: int, asked_at: float) -> None:
        self.book.entries.append(Entry(key, fence, asked_at, time.monotonic()))
        self.table.counts["grants"] += 1
        self.note(key, f"granted with fence {fence}")

    def note_completed(self, key: str) -> None:
        self.book.completed.add(key)
        self.table.counts["completions"] += 1
        self.note(key, "completed")

    def note_refusal(self, key: str, error: LeasekitError) -> str:
        name = type(error).__name__
        if name not in REFUSALS:
            self.note_problem(Problem.OTHER, f"{key}: {name}: {error}")
        if name == "Unavailable" and str(error).startswith(DATA_LOST):
            name = DATA_LOST
        self.table.counts[f"refused: {name}"] += 1
        self.note(key, f"{name}: {error}")
        return name

    def note(self, key: str, what: str) -> None:
        self.history.setdefault(key, []).append(f"{time.monotonic():.3f} {what}")

    def note_problem(self, problem: Problem, what: object) -> None:
        self.table.counts[problem] += 1
        self.table.problems.append(f"seed {self.seed}: {problem}: {what}")

    # ------------------------------------------------------------------------- what befalls them

    async def disturb(self) -> None:
        """The run's time: replies are lost, barriers fall short, the primary fails, all is mended."""
        await self.pass_time(0.1)
        for proxy in self.proxies:
            if self.chance.random() < 0.5:
                faults = [Fault.CUT_BEFORE, Fault.CUT_AFTER, Fault.CUT_IN_REPLY]
                fault, times = self.chance.choice(faults), self.chance.randint(1, 3)
                proxy.arm(Plan(lambda words: words[0] == b"EVALSHA", fault, times))
        if self.chance.random() < 0.6:
            self.stall_replication()
            await self.pass_time(0.15)
            for node in self.group.replicas:
                node.flow()
            await self.pass_time(0.05)
        await self.fail_over()
        await self.pass_time(0.15)

    def stall_replication(self) -> None:
        """Writes do not come down, acknowledgements do not come up, or neither."""
        down, up = self.chance.choice([(True, True), (True, False), (False, True)])
        for node in self.group.replicas:
            node.stall(down=down, up=up)

    async def fail_over(self) -> None:
        kind = self.chance.choice(list(Failover))
        self.table.counts[f"failover: {kind}"] += 1
        old = self.group.primary
        left_behind = 1 if kind is Failover.SPLIT else 0
        if kind in (Failover.CUT, Failover.SPLIT) or self.chance.random() < 0.5:
            # The replicas lose their primary before the clients do: what it grants now, they lack.
            self.stall_replication()
            await self.pass_time(0.08)
        if kind is Failover.KILLED:
            await asyncio.to_thread(old.server.kill)
        elif kind is Failover.STOPPED:
            self.group.pause(old)
        for proxy in self.proxies[left_behind:]:
            proxy.stall()
        await self.pass_time(0.05)
        new = await self.group.most_advanced()
        await self.group.promote(new)
        for proxy in self.proxies[left_behind:]:
            proxy.lead_to(new.path)
        await self.pass_time(0.15)
        for proxy in self.proxies[:left_behind]:
            proxy.lead_to(new.path)
        await self.bring_back(old, kind)

    async def bring_back(self, old: Node, kind: Failover) -> None:
        """The old primary follows the new one, with its memory or without."""
        if kind is Failover.STOPPED:
            self.group.resume(old)
        await self.pass_time(0.02)
        if kind is not Failover.KILLED and self.chance.random() < 0.3:
            await asyncio.to_thread(old.server.kill)
            kind = Failover.KILLED
        if kind is Failover.KILLED:
            await asyncio.to_thread(old.server.start)
        await self.group.join(old)

    async def pass_time(self, seconds_max: float) -> None:
        await asyncio.sleep(self.chance.uniform(0, seconds_max))

    # ------------------------------------------------------------------------------- the verdict

    async def judge(self, tenants: list[Tenant]) -> None:
        """Ask for every key once more, then hold the book against the servers."""
        for proxy in self.proxies:
            proxy.arm(None)
        keys = iter(sorted({entry.key for entry in self.book.entries}))

        async def ask_again(tenant: Tenant) -> None:
            for key in keys:
                await self.attempt(tenant, key)

        await asyncio.gather(*(ask_again(tenant) for tenant in tenants for _ in range(SENDERS)))
        await self.group.are_in_step()
        [state, *others] = [
            dump(node.server.raw, "lk", tenants[0].tag)
            for node in (self.group.primary, *self.group.replicas)
        ]
        if any(other != state for other in others):
            self.note_problem(Problem.OTHER, "a replica differs from its primary in the end")
        lines = state.get("gate:state", {})
        first: dict[str, Entry] = {}
        for entry in self.book.entries:
            first.setdefault(entry.key, entry)
        for key, entry in first.items():
            words = lines.get(outbox_id(key), "").split(" ")
            if words[8:9] != [str(entry.fence)]:
                self.note_problem(Problem.LOST_GRANT, f"{key} of fence {entry.fence}")
            elif key in self.book.completed and words[0] != "sent":
                self.note_problem(Problem.LOST_COMPLETION, f"{key} is {words[0]}")
        for key in self.book.doubles():
            self.note_problem(Problem.DOUBLE, "\n    ".join([key, *self.history[key]]))
        for entry in self.book.out_of_order():
            self.note_problem(Problem.FENCE, entry)
        self.table.counts["runs"] += 1


async def run_seed(group: Group, seed: int, durability: Durability, table: Table) -> None:
    """A tenant of its own, through clients of its own, on servers that went through other runs."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="lk-"))
        proxies, tenants = [], []
        for number in range(CLIENTS):
            proxy = Proxy(str(Path(directory, str(number))), group.primary.path)
            proxies.append(await stack.enter_async_context(proxy))
            kit = await stack.enter_async_context(
                leasekit.connect(proxy.url, timeout_ms=TIMEOUT_MS, durability=durability)
            )
            tenants.append(kit.tenant(f"f{seed}", "w"))
        run = Run(group, seed, table, proxies)
        async with asyncio.TaskGroup() as tasks:
            for tenant in tenants:
                for _ in range(SENDERS):
                    tasks.create_task(run.send(tenant))
            await run.disturb()
            run.is_over = True
        await run.judge(tenants)


async def run_seeds(
    seeds: int,
    durability: Durability,
    *,
    replicas: int,
    first: int = 0,
) -> Table:
    table = Table()
    async with open_group(replicas) as group:
        for seed in range(first, first + seeds):
            await group.primary.ask("FLUSHALL")
            await run_seed(group, seed, durability, table)
    return table


@pytest.mark.parametrize("replicas", [1, 2])
async def test_a_failover_loses_no_grant_and_gives_none_twice(replicas: int) -> None:
    """All replicas have what was granted, so that whichever is promoted knows it."""
    durability = replicated(replicas, timeout_ms=BARRIER_MS)
    try:
        table = await run_seeds(SMOKE_SEEDS, durability, replicas=replicas)
    except NoServer as error:
        pytest.skip(str(error))
    assert not table.problems, "\n".join(table.problems[:PROBLEMS_SHOWN])
    assert table.counts["grants"] > SMOKE_SEEDS


async def test_a_grant_that_fell_short_is_had_by_its_token_alone() -> None:
    """It stands for whoever repeats, and is not taken away again; nobody else gets it meanwhile."""
    durability = replicated(1, timeout_ms=BARRIER_MS)
    try:
        async with (
            open_group(1) as group,
            leasekit.connect(group.primary.server.url, durability=durability) as kit,
        ):
            gate, token = kit.tenant("o", "w").gate, new_token()
            for node in group.replicas:
                node.stall(down=False)
            with pytest.raises(NotDurable, match="ask again by the same name"):
                await gate.prepare(intent_of("key"), token=token)
            with pytest.raises(InProgress):
                await gate.prepare(intent_of("key"))
            for node in group.replicas:
                node.flow()
            receipt = await gate.prepare(intent_of("key"), token=token, repeat=True)
            assert receipt is not None
            assert receipt.attempts == 1
            assert await gate.complete(success_of("key"), receipt=receipt) == "recorded"
    except NoServer as error:
        pytest.skip(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--durability", default=f"replicated(1, timeout_ms={BARRIER_MS})")
    given = parser.parse_args()
    durability = durability_of(given.durability)
    began_at = time.monotonic()
    try:
        table = asyncio.run(
            run_seeds(given.seeds, durability, replicas=given.replicas, first=given.first)
        )
    except NoServer as error:
        parser.error(str(error))
    print(f"durability {durability}, {given.replicas} replicas")  # noqa: T201
    print(table)  # noqa: T201
    print(f"{'seconds':34}{time.monotonic() - began_at:8.0f}")  # noqa: T201
    if durability.kind != "none" and table.problems:
        sys.exit("\n".join(table.problems[:PROBLEMS_SHOWN]))


if __name__ == "__main__":
    main()
