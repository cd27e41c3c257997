"""A sender of test_senders: a process in which many coroutines take keys through the gate.

Several senders walk through the same keys, and reconcile. Some calls are left without a word, or end
with an exception. On Hold a sender reports at which point it stands, and stops itself there by SIGSTOP,
without giving its event loop another turn: nothing but the fence can help then.

`python -m fault.senders sender|destination NAME`; all else comes by standard input.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from fault.destination import Destination, Line
from fault.sender_messages import (
    Finish,
    Held,
    Hold,
    Notes,
    Order,
    Plan,
    Ready,
    Setup,
    Walked,
    Where,
    Woke,
    decode_order,
    decode_setup,
)

import leasekit
from leasekit import Tenant
from leasekit.coalesce import local_clock_s
from leasekit.demo.child import Role, live, say
from leasekit.demo.loop import loop_factory
from leasekit.errors import (
    Conflict,
    InProgress,
    LeasekitError,
    LeaseLost,
    OutcomeUnknown,
    Unavailable,
)
from leasekit.gate import (
    Permit,
    PreSendEvent,
    Question,
    ReconcileCounts,
    Source,
    Verdict,
    absent,
    applied,
)

ORG, WORKSPACE = "senders", "w"
TOOL = "payments.charge"
SOURCE = Source(kind="test", run_id="run-1")

COROUTINES = 24  # of a sender
ASKERS = 3  # senders that walk through a key
TRIES_MAX = 8  # of a sender and key, while it walks
PATIENCE_LEASES = 1.5
RECONCILE_EVERY_S = 0.15
REPORT_EVERY_S = 0.05
FINAL = ("sent", "failed", "dead_lettered")

# Shares of calls that end otherwise than by saying what became of them.
LEAVES_UNBEGUN = 0.01
LEAVES_BEGUN = 0.02
RAISES_BEFORE = 0.01
RAISES_AFTER = 0.02


class Walkout(Exception):
    """A sender's own failure in the middle of a call."""


def event_of(key: int) -> PreSendEvent:
    return PreSendEvent(
        dispatch_id=f"charge-{key}",
        tool=TOOL,
        source=SOURCE,
        args={"account": str(key)},
        external_side_effect=True,
    )


def key_of(dispatch_id: str) -> int:
    return int(dispatch_id.rpartition("-")[2])


def is_asked_by(plan: Plan, key: int, number: int) -> bool:
    """Whether a key is among those that a sender walks through: neighbours share most of them."""
    return (number - key) % plan.senders < ASKERS


@dataclass(slots=True)
class Notebook:
    """What a sender has seen since it last told."""

    dispatches: int = 0
    grants: list[tuple[int, int, int]] = field(default_factory=list)
    told: list[tuple[int, str]] = field(default_factory=list)
    late_begins: list[int] = field(default_factory=list)
    stray_cancels: list[int] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


class Caller:
    """Takes single keys through the gate to the destination. chance: None = nothing goes wrong here."""

    def __init__(
        self, plan: Plan, tenant: Tenant, line: Line, chance: random.Random | None = None
    ) -> None:
        self._notebook = Notebook()
        self.hold: Where | None = None
        self._plan = plan
        self._gate = tenant.gate
        self._line = line
        self._chance = chance

    def take_notes(self, low: int) -> Notes:
        """What was seen since the last time."""
        book, self._notebook = self._notebook, Notebook()
        return Notes(
            low=low,
            dispatches=book.dispatches,
            grants=book.grants,
            told=book.told,
            late_begins=book.late_begins,
            stray_cancels=book.stray_cancels,
            others=dict(book.others),
        )

    async def attempt(self, key: int) -> bool:
        """Ask for the grant of a key and send if it comes; gives whether the key is done with."""
        plan = self._plan
        self._notebook.dispatches += 1
        try:
            async with self._gate.dispatch(
                event_of(key), on_expiry=plan.on_expiry, lease_ms=plan.lease_ms
            ) as permit:
                return await self._send(key, permit)
        except InProgress:
            self._notebook.others["in progress"] += 1
        except Conflict as error:
            # Not among the words that the gate has for a key: it is not one that this test uses.
            if error.status not in FINAL:
                raise
            self._notebook.told.append((key, error.status))
            return True
        except Walkout:
            self._notebook.others["walked out"] += 1
        except (OutcomeUnknown, LeaseLost, Unavailable) as error:
            self._notebook.others[type(error).__name__] += 1
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            self._notebook.stray_cancels.append(key)
        return False

    async def reconcile(self) -> ReconcileCounts:
        plan = self._plan
        return await self._gate.reconcile(
            {TOOL: self._ask},
            settle_ms=plan.lease_ms // 8,
            asks_max=plan.asks_max,
            backoff_ms=(plan.lease_ms // 8, plan.lease_ms),
            lease_ms=plan.lease_ms,
            concurrency=50,
        )

    async def _send(self, key: int, permit: Permit) -> bool:
        assert permit.fence is not None
        assert permit.receipt is not None
        self._notebook.grants.append((key, permit.attempts, permit.fence))
        whim = self._chance.random() if self._chance else 1.0
        self._may_hold(Where.GRANTED, key, permit.fence)
        if whim < LEAVES_UNBEGUN:
            return False
        before_s = local_clock_s()
        permit.begin()
        if before_s >= permit.receipt.deadline_s:
            self._notebook.late_begins.append(key)
        self._may_hold(Where.BEGUN, key, permit.fence)
        if (whim := whim - LEAVES_UNBEGUN) < LEAVES_BEGUN:
            return False
        if (whim := whim - LEAVES_BEGUN) < RAISES_BEFORE:
            raise Walkout
        try:
            async with asyncio.timeout(self._plan.lease_ms * PATIENCE_LEASES / 1_000):
                word = await self._line.effect(key, permit.fence)
        except TimeoutError:
            raise Walkout from None
        if whim - RAISES_BEFORE < RAISES_AFTER:
            raise Walkout
        return await self._tell(key, permit, word)

    async def _tell(self, key: int, permit: Permit, word: str) -> bool:
        """Say what became of a call, by the destination's answer."""
        if word in ("applied", "again"):
            await permit.sent({"fence": permit.fence})
            self._notebook.told.append((key, "sent"))
            return True
        if word == "bad":
            await permit.failed("no such account")
            self._notebook.told.append((key, "failed"))
            return True
        self._notebook.others[word] += 1
        await permit.not_sent(word)
        return False

    def _may_hold(self, where: Where, key: int, fence: int) -> None:
        if self.hold is where:
            self.hold = None
            say(Held(where, key, fence))
            os.kill(os.getpid(), signal.SIGSTOP)
            say(Woke())

    async def _ask(self, question: Question) -> Verdict:
        key, about = key_of(question.key), question.intent.fence or 0
        if await self._line.ask(key, question.fence, about) == "applied":
            return applied({"asked": question.fence})
        self._may_hold(Where.ASKED, key, about)
        return absent(
            fence_recorded=self._plan.claims == "fence_recorded",
            key_honoured=self._plan.claims == "key_honoured",
        )


class Sender:
    """Walks through its keys once, and reconciles meanwhile and until Finish."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._chance = random.Random(f"{setup.plan.seed} {setup.name}")
        self._walk = iter(
            key
            for key in range(setup.first, setup.plan.calls)
            if is_asked_by(setup.plan, key, setup.number)
        )
        self._began_at = time.monotonic()
        self._open: set[int] = set()
        self._next = setup.first
        self._later: list[tuple[float, int, int]] = []  # when, key, tries so far
        self._caller: Caller | None = None
        self._must_finish = asyncio.Event()

    def obey(self, order: Order) -> None:
        if isinstance(order, Hold) and self._caller is not None:
            self._caller.hold = order.where
        elif isinstance(order, Finish):
            self._must_finish.set()

    async def run(self) -> None:
        setup = self._setup
        line = await Line.reach(setup.destination)
        async with leasekit.connect(setup.url) as kit:
            caller = self._caller = Caller(
                setup.plan, kit.tenant(ORG, WORKSPACE), line, self._chance
            )
            say(Ready())
            reporting = asyncio.create_task(self._keep_reporting(caller))
            reconciling = asyncio.create_task(self._keep_reconciling(caller))
            async with asyncio.TaskGroup() as group:
                for _ in range(COROUTINES):
                    group.create_task(self._work(caller))
            reporting.cancel()
            say(caller.take_notes(self._low()))
            say(Walked())
            finish = asyncio.create_task(self._must_finish.wait())
            await asyncio.wait({finish, reconciling}, return_when=asyncio.FIRST_COMPLETED)
            reconciling.cancel()
            with suppress(asyncio.CancelledError):
                await reconciling
        await line.close()

    async def _work(self, caller: Caller) -> None:
        while True:
            if self._later and self._later[0][0] <= time.monotonic():
                _, key, tries = heapq.heappop(self._later)
            elif (key := next(self._walk, -1)) >= 0:
                self._open.add(key)
                self._next, tries = key + 1, 0
                await asyncio.sleep(self._too_early_s(key))
            elif self._later:
                await asyncio.sleep(max(self._later[0][0] - time.monotonic(), 0))
                continue
            else:
                return
            if await caller.attempt(key) or tries + 1 >= TRIES_MAX:
                self._open.discard(key)
            else:
                pause_s = self._setup.plan.lease_ms / 4_000 * self._chance.uniform(1, 2 + tries)
                heapq.heappush(self._later, (time.monotonic() + pause_s, key, tries + 1))

    def _too_early_s(self, key: int) -> float:
        """How long before its time a key is; one that comes late comes at once."""
        plan, setup = self._setup.plan, self._setup
        due_s = (key - setup.first) / plan.calls * plan.walk_ms / 1_000
        return max(self._began_at + due_s - time.monotonic(), 0)

    def _low(self) -> int:
        return min(self._open, default=self._next)

    async def _keep_reporting(self, caller: Caller) -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            say(caller.take_notes(self._low()))

    async def _keep_reconciling(self, caller: Caller) -> None:
        while True:
            await asyncio.sleep(RECONCILE_EVERY_S * self._chance.uniform(0.5, 1.5))
            if self._setup.plan.on_expiry == "park":
                with suppress(LeasekitError):
                    await caller.reconcile()


ROLES: dict[str, Callable[[Setup], Role]] = {"sender": Sender, "destination": Destination}


def main() -> None:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(live(ROLES[sys.argv[1]], decode_setup, decode_order))


if __name__ == "__main__":
    main()
