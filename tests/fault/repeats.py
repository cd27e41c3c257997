"""A tenant is taken through commands while their connections are broken: applied once, or told.

A run takes one seed and one tenant through every case. What befalls a command is the seed's choice:
the fault, how often, whether the server learns of a cut, and whether somebody else acts between the cut
and the repeat (takes over what it is about, finishes and forgets it). Each answer is then held against
what is stored:

- a word of success: applied once, and OutcomeUnknown or an error wherever it was not;
- the repeat answers as lua/PROTOCOL.md says: the first answer, `lost_claim` after a newer claim,
  `forgotten` after deletion;
- a request that was held back is never applied after its repeat; one that is delivered twice changes
  nothing the second time, also after newer commands, but where a case says that it is taken for new;
- a recount of the tenant finds nothing amiss.

`run_seeds` gives a table of what became of each.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault.proxy import Fault, Plan, Proxy
from lua.commands import differences, invariants
from servers import Server, dump

import leasekit
from leasekit import Leasekit, Tenant
from leasekit.coalesce import REPEATS_MAX
from leasekit.errors import LeasekitError, OutcomeUnknown, Unavailable
from leasekit.model import Retention
from leasekit.scripts import read_scripts

SMOKE_SEEDS = 40
WORKERS = 6
TIMEOUT_MS = 3_000
HOLD_TIMEOUT_MS = 150  # the client gives up a request that is held back after this
CONNECT_ATTEMPTS_MAX = 50
LEASE_MS = 30_000
KEEP_NOTHING = Retention(finished_ms=0, dead_ms=0)

UNKNOWN = "unknown"
UNAVAILABLE = "Unavailable"


@dataclass
class World:
    """One tenant, as the client behind the proxy sees it, as others see it, and as it is stored."""

    server: Server
    mine: Tenant
    others: Tenant
    keeper: Tenant  # one more of the others, who keeps what is finished
    keeps_nothing: bool
    chance: random.Random

    def dump(self) -> dict[str, Any]:
        state = dump(self.server.raw, "lk", self.mine.tag)
        # Records of claims go by their own time, and by whatever claim comes next.
        return {key: value for key, value in state.items() if "claims" not in key}

    def line(self, id: str) -> list[str]:
        """The words of a row's state line; none while it is fresh or gone."""
        key = self.mine.outbox._scope.keys.outbox_state
        return (self.server.raw.hget(key, id) or b"").decode().split(" ", 9)

    def errors(self, id: str) -> list[str]:
        lines = self.server.raw.hget(self.mine.outbox._scope.keys.outbox_errors, id)
        return lines.decode().split("\n") if lines else []

    def tally(self, status: str, lane: str) -> int:
        key = self.mine.outbox._scope.keys.outbox_tally
        return int(self.server.raw.hget(key, f"{status}:{lane}:t") or 0)

    def value(self, key: str, member: str) -> str:
        keys = self.mine.outbox._scope.keys
        return (self.server.raw.hget(getattr(keys, key), member) or b"").decode()


class Case:
    """One command: how to come to it, what it does, who comes between, what it must answer.

    `marker` is what its request carries and no other. `applied` counts by what is stored; `history`
    says which of (applied, rival won) was so before the last repeat. `requests` are those that a fault
    befell.
    """

    command: str
    word: str  # of success
    number = 0

    def __init__(self, world: World) -> None:
        self.world = world
        self.mine, self.others = world.mine, world.others
        Case.number += 1
        self.lane = f"lane{Case.number}"
        self.marker = ""
        self.requests: list[bytes] = []

    @property
    def name(self) -> str:
        """What the table calls it."""
        return self.command

    async def prepare(self) -> None: ...

    async def call(self, repeat: bool) -> str:
        raise NotImplementedError

    async def rival(self) -> bool:
        """Somebody else acts; whether that took effect on what the command is about."""
        raise NotImplementedError

    def look(self) -> None:
        """Note what the next request will find."""

    def applied(self) -> int:
        raise NotImplementedError

    def expected(self, applied: bool, rival_won: bool) -> str:
        """The answer to a request; a repeat's, where it was applied or a rival won before."""
        raise NotImplementedError

    def expected_by_name(self, applied: bool, rival_won: bool) -> str:
        """The answer to a caller who was told that nobody can know, and asks again."""
        return self.expected(applied, rival_won)

    def is_borne_out(self) -> bool:
        """Whether what is stored is what the word of success says."""
        return self.applied() == 1

    def undisturbed(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state without what a second delivery may change without harm."""
        return state

    def is_new_in_copy(self, rival_won: bool) -> bool:
        """Whether a second delivery of the first request is one that nobody can know again."""
        return False


@dataclass
class Table:
    """What happened, by command and fault."""

    cells: dict[tuple[str, Fault], Counter[str]] = field(default_factory=dict)

    def note(self, case: Case, fault: Fault, what: str) -> None:
        self.cells.setdefault((case.name, fault), Counter())[what] += 1

    def total(self, what: str) -> int:
        return sum(cell[what] for cell in self.cells.values())

    def __str__(self) -> str:
        columns = ("runs", "applied once", "not applied", "OutcomeUnknown", "copy made anew")
        lines = [f"{'command':28} {'fault':26}" + "".join(f"{column:>16}" for column in columns)]
        for (command, fault), cell in sorted(self.cells.items()):
            counts = "".join(f"{cell[column]:16}" for column in columns)
            lines.append(f"{command:28} {fault:26}{counts}")
        counts = "".join(f"{self.total(column):16}" for column in columns)
        return "\n".join([*lines, f"{'all':55}{counts}"])


@dataclass
class Bench:
    """A server behind proxies: a client for cuts, one with a short patience, and others' direct one."""

    server: Server
    clients: dict[tuple[bool, bool], tuple[Proxy, Leasekit]]
    direct: dict[bool, Leasekit]


@asynccontextmanager
async def open_bench(server: Server) -> AsyncIterator[Bench]:
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="lk-"))
        bench = Bench(server, {}, {})
        for keeps_nothing in (False, True):
            retention = KEEP_NOTHING if keeps_nothing else Retention()
            bench.direct[keeps_nothing] = await connected(stack, server.url, retention, TIMEOUT_MS)
            for holds in (False, True):
                path = str(Path(directory, f"{keeps_nothing:d}{holds:d}"))
                proxy = await stack.enter_async_context(
                    Proxy(path, server.url.removeprefix("unix://"))
                )
                timeout_ms = HOLD_TIMEOUT_MS if holds else TIMEOUT_MS
                kit = await connected(stack, proxy.url, retention, timeout_ms)
                bench.clients[keeps_nothing, holds] = proxy, kit
        yield bench


async def connected(
    stack: AsyncExitStack, url: str, retention: Retention, timeout_ms: int
) -> Leasekit:
    """A client that may have less patience than a busy machine needs for its first connection."""
    for attempt in range(CONNECT_ATTEMPTS_MAX):
        try:
            return await stack.enter_async_context(
                leasekit.connect(url, retention=retention, durability="none", timeout_ms=timeout_ms)
            )
        except Unavailable:
            if attempt + 1 == CONNECT_ATTEMPTS_MAX:
                raise
    raise AssertionError("there was no attempt")


async def run_seed(bench: Bench, seed: int, kinds: Sequence[type[Case]], table: Table) -> None:
    """One tenant through every case."""
    chance = random.Random(seed)
    keeps_nothing = chance.random() < 0.5
    name = f"r{seed}"
    tag = ""
    for kind in chance.sample(kinds, len(kinds)):
        fault = chance.choice(list(Fault))
        proxy, kit = bench.clients[keeps_nothing, fault is Fault.HOLD]
        world = World(
            bench.server,
            kit.tenant(name, "w"),
            bench.direct[keeps_nothing].tenant(name, "w"),
            bench.direct[False].tenant(name, "w"),
            keeps_nothing,
            chance,
        )
        tag = world.mine.tag
        case = kind(world)
        try:
            await run_case(case, fault, proxy, table)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {case.name}, {fault}: {error}") from error
    invariants(dump(bench.server.raw, "lk", tag))


async def run_case(case: Case, fault: Fault, proxy: Proxy, table: Table) -> None:
    chance, world = case.world.chance, case.world
    await case.prepare()
    case.look()
    history = {"applied": False, "rival": False}
    comes_between = chance.random() < 0.5 and fault not in (Fault.CUT_AFTER_REPLY, Fault.COPY)

    async def meanwhile() -> None:
        if comes_between and not plan_has_run.is_set():
            history["applied"] = case.applied() > 0
            history["rival"] = await case.rival()
        plan_has_run.set()
        history["applied"] = case.applied() > 0
        case.look()

    plan_has_run = asyncio.Event()
    sha = read_scripts()[case.command].sha(shebang=world.server.knows_flags).encode()
    marker = case.marker.encode()
    can_recur = fault in (Fault.CUT_BEFORE, Fault.CUT_AFTER, Fault.CUT_IN_REPLY)
    plan = Plan(
        lambda words: words[0] == b"EVALSHA" and words[1] == sha and marker in words,
        fault,
        times=chance.choice([1, 1, 1, 2, REPEATS_MAX + 1]) if can_recur else 1,
        cut_at=chance.random(),
        keeps_upstream=chance.random() < 0.5,
        meanwhile=meanwhile if can_recur else None,
        requests=case.requests,
    )
    proxy.arm(plan)
    answer = await answer_of(case.call, False)
    proxy.arm(None)
    applied = case.applied()
    # On a slow machine the short patience of the client of HOLD may end before anything was sent.
    was_sent = fault is not Fault.HOLD or plan.struck > 0
    assert was_sent or answer in (UNKNOWN, UNAVAILABLE), f"{answer}, and nothing was sent"
    assert plan.struck == (plan.times if was_sent else 0), f"struck {plan.struck} of {plan.times}"
    assert was_sent or not applied, "applied, and told that it was not"
    assert applied <= 1, f"{answer}, applied {applied} times"

    if plan.times > REPEATS_MAX:
        assert answer == UNKNOWN, f"{answer} after {plan.times} lost replies"
    elif fault is not Fault.HOLD or answer not in (UNKNOWN, UNAVAILABLE):
        wanted = case.expected(history["applied"], history["rival"])
        assert answer == wanted, f"answered {answer}, not {wanted}; {history}"
    if answer == case.word:
        assert case.is_borne_out(), f"answered {answer} without being applied"
    table.note(case, fault, "runs")
    table.note(case, fault, "applied once" if applied else "not applied")
    if answer == UNKNOWN:
        table.note(case, fault, "OutcomeUnknown")
        # The caller asks by name: now it learns, or is told that nobody can know.
        again = UNKNOWN
        while again in (UNKNOWN, UNAVAILABLE):
            case.look()
            wanted = case.expected_by_name(case.applied() > 0, history["rival"])
            again = await answer_of(case.call, True)
            if fault is not Fault.HOLD:
                break
        assert again == wanted, f"asked by name: {again}, not {wanted}; {history}"
        assert case.applied() <= 1

    if fault is Fault.HOLD and was_sent:
        if chance.random() < 0.5:
            await case.rival()
        before = world.dump()
        assert set(await proxy.let_go()) == {None}, (
            "the server took an old request after its repeat"
        )
        assert world.dump() == before
    if fault is Fault.COPY:
        rival_won = chance.random() < 0.5 and await case.rival()
        case.look()
        is_new = case.is_new_in_copy(rival_won)
        before = case.undisturbed(world.dump())
        await proxy.deliver_copy(case.requests[0])
        changes = differences(before, case.undisturbed(world.dump()))
        if is_new:
            assert changes, "the second delivery changed nothing"
            table.note(case, fault, "copy made anew")
        else:
            assert not changes, f"the second delivery changed {changes}"


async def answer_of(call: Callable[[bool], Awaitable[str]], repeat: bool) -> str:
    """The word of an answer; an error's name, and UNKNOWN for OutcomeUnknown."""
    try:
        return str(await call(repeat))
    except OutcomeUnknown:
        return UNKNOWN
    except LeasekitError as error:
        return type(error).__name__


async def run_seeds(
    server: Server, kinds: Sequence[type[Case]], seeds: int, first: int = 0
) -> Table:
    """Some runs at a time, so that waiting for one is not waiting for all."""
    table, waiting = Table(), iter(range(first, first + seeds))

    async def work() -> None:
        async with open_bench(server) as bench:
            for seed in waiting:
                await run_seed(bench, seed, kinds, table)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(WORKERS, seeds)):
            group.create_task(work())
    return table


@asynccontextmanager
async def proxied(server: Server) -> AsyncIterator[Proxy]:
    """A proxy before a server, in a directory whose name is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="lk-") as directory:
        path = str(Path(directory, "p"))
        async with Proxy(path, server.url.removeprefix("unix://")) as proxy:
            yield proxy


def is_call(command: str) -> Callable[[list[bytes]], bool]:
    sha = read_scripts()[command].sha(shebang=True).encode()
    return lambda words: words[0] == b"EVALSHA" and words[1] == sha
