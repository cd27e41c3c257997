"""The gate under senders that die and stall: whose effects took place, and how often.

A real server, a destination with a ledger (destination.py), senders that walk through the same keys
(senders.py). Meanwhile, by seed: senders are killed by SIGKILL at random moments and replaced, others
are stopped by SIGSTOP until their leases are long over, and continued. Some of these stand exactly
between the grant and begin(), between begin() and the effect, or between the destination's `absent`
and its record, and are not continued before the key has gone another way. The destination is
troublesome as well. Every sender reconciles all the while. When each key was granted, all are killed
at once, and what is left is reconciled and finished without them.

Then three books are compared: the destination's ledger, the intents, and what the senders had noted
as far as they lived. PROMISED names the scenarios in which no key may be applied twice; the others are
run for their double effects to be seen. All else that is checked must hold in every one.

`PYTHONPATH=tests python -m fault.test_senders --calls 20000 --senders 8` prints both tables, and ends
with 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

import msgspec
import pytest
from fault.destination import Entry, Kind, Line, kind_of
from fault.sender_messages import (
    Book,
    BookEnds,
    Held,
    Hold,
    Listening,
    Mode,
    Notes,
    Plan,
    Ready,
    Report,
    Setup,
    TellBook,
    Walked,
    Where,
    Woke,
    decode_report,
)
from fault.senders import ORG, WORKSPACE, Caller, event_of, is_asked_by, key_of
from servers import NoServer, ServerProcess

import leasekit
from leasekit import Tenant
from leasekit.codec import BATCH_MAX
from leasekit.demo.crew import Crew, DemoFailed, Member
from leasekit.gate import Intent, IntentStatus
from leasekit.gate.identity import outbox_id

SMOKE = {"calls": 300, "senders": 3, "kills": 2, "stops": 2}
LEASE_MS = 400
CALLS_A_KILL = 250
CALLS_A_STOP = 125
KILL_MS, STOP_MS = 100, 250  # of the walk: so long at least, so that all of them come in time
STOP_LEASES = (1.3, 3.0)
MOVED_LEASES_MAX = 8.0
POLL_S = 0.05
WALKED_SHARES = (0.02, 0.75)  # of the walk, within which faults befall the senders
AT_ONCE = 50  # calls of the parent, when it finishes what was left
SETTLING_S_MAX = 120.0
BITES_MIN = 3  # holds after begin() from which on they must have been seen at the destination

PLANS = {
    plan.name: plan
    for plan in (
        Plan(name="park, fence", on_expiry="park", mode=Mode.FENCE, claims="fence_recorded"),
        Plan(name="park, key", on_expiry="park", mode=Mode.KEY, claims="key_honoured"),
        Plan(name="park, nothing", on_expiry="park", mode=Mode.NOTHING, asks_max=4),
        Plan(name="park, a lie", on_expiry="park", mode=Mode.NOTHING, claims="key_honoured"),
        Plan(name="reclaim, key", on_expiry="reclaim", mode=Mode.KEY),
        Plan(name="reclaim, fence", on_expiry="reclaim", mode=Mode.FENCE),
        Plan(name="reclaim, nothing", on_expiry="reclaim", mode=Mode.NOTHING),
    )
}

# Where no key may be applied twice. The others are there to show what is not promised.
PROMISED = ("park, fence", "park, key", "park, nothing", "reclaim, key")

WORDS = """\
Promised: {promised}.
  With `park` a key is granted again only where its sender said that nothing was done, or where the
  destination said `absent` and gave a reason to believe it: it recorded the fence, or honours the key.
  "park, nothing" is a destination that honours nothing and is asked honestly: without a reason `absent`
  decides nothing: nothing is sent twice, and what nobody knows is dead-lettered for an operator, who
  decides here when all senders are gone.
Not promised, and run to be seen: {shown}.
  "park, a lie" is the same destination, of which the callback claims that it honours the key: who is
  believed wrongly makes double effects. `reclaim` lets the next sender try when a lease is over; it needs
  a destination that honours the key. The fence alone keeps late senders out, but not a second grant
  after an effect whose sender died before it could say so."""


class Fault(StrEnum):
    """What befalls a sender."""

    KILL = "kill"
    STOP = "stop"
    HOLD_GRANTED = "hold granted"
    HOLD_BEGUN = "hold begun"
    HOLD_ASKED = "hold asked"
    KILL_BEGUN = "kill begun"


HOLDS = {
    Fault.HOLD_GRANTED: Where.GRANTED,
    Fault.HOLD_BEGUN: Where.BEGUN,
    Fault.KILL_BEGUN: Where.BEGUN,
    Fault.HOLD_ASKED: Where.ASKED,
}


def faults_of(plan: Plan, kills: int, stops: int) -> list[tuple[float, Fault]]:
    """(share of the walk, what befalls a sender then), in order."""
    chance = random.Random(f"{plan.seed} faults")
    kinds = [Fault.KILL if number % 4 else Fault.KILL_BEGUN for number in range(kills)]
    fourth = Fault.HOLD_ASKED if plan.on_expiry == "park" else Fault.HOLD_BEGUN
    of_stops = (Fault.HOLD_BEGUN, Fault.STOP, Fault.HOLD_GRANTED, fourth)
    kinds += [of_stops[number % len(of_stops)] for number in range(stops)]
    chance.shuffle(kinds)
    shares = sorted(chance.uniform(*WALKED_SHARES) for _ in kinds)
    return list(zip(shares, kinds, strict=True))


@dataclass
class Result:
    """What a scenario came to."""

    plan: Plan
    counts: dict[str, int | str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


@dataclass
class Noted:
    """What the senders noted, all together."""

    dispatches: int = 0
    grants: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    told: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    late_begins: list[int] = field(default_factory=list)
    stray_cancels: list[int] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def add(self, notes: Notes) -> None:
        self.dispatches += notes.dispatches
        for key, attempts, fence in notes.grants:
            self.grants[key].append((attempts, fence))
        for key, status in notes.told:
            self.told[key].add(status)
        self.late_begins += notes.late_begins
        self.stray_cancels += notes.stray_cancels
        self.others.update(notes.others)


class Run:
    """One scenario: the processes, what befalls them, and the verdict."""

    def __init__(self, plan: Plan, url: str, tenant: Tenant) -> None:
        self.plan = plan
        self.result = Result(plan)
        self._url = url
        self._tenant = tenant
        self._chance = random.Random(f"{plan.seed} victims")
        self._crew = Crew(
            self._note, lambda: self._reports, module="fault.senders", decode=decode_report
        )
        self._reports = 0
        self._destination = ""
        self._senders: dict[int, Member] = {}
        self._low = dict.fromkeys(range(plan.senders), 0)
        self._walked: set[int] = set()
        self._held: set[Member] = set()
        self._orders: dict[Member, Fault] = {}  # what is done to a sender when it holds
        self._starts = 0
        self._stopping: set[asyncio.Task[None]] = set()
        self._noted = Noted()
        self._ledger: dict[int, Entry] = {}
        self._is_told = False
        self._faults: Counter[str] = Counter()

    async def run(self, faults: Iterable[tuple[float, Fault]]) -> Result:
        began_at = time.monotonic()
        try:
            await self._act(list(faults))
        finally:
            for task in self._stopping:
                task.cancel()
            await self._crew.close()
        self.result.counts["seconds"] = f"{time.monotonic() - began_at:.0f}"
        return self.result

    async def _act(self, faults: list[tuple[float, Fault]]) -> None:
        crew, plan = self._crew, self.plan
        destination = crew.start("destination", "destination", Setup(plan=plan, name="destination"))
        await crew.until(lambda: bool(self._destination), "the destination to listen")
        for number in range(plan.senders):
            self._start(number)
        await self._hurt(faults)
        await self._until_all_granted()
        await self._end_senders()
        before = await self._when_leases_are_over()
        line = await Line.reach(self._destination)
        caller = Caller(plan, self._tenant, line)
        await self._settle(caller)
        reconciled = await self._intents()
        await self._finish(caller)
        await self._read_book(destination)
        while await self._operate():
            await self._finish(caller)
            await self._read_book(destination)
        self._noted.add(caller.take_notes(0))
        await line.close()
        await crew.dismiss(destination)
        self._judge(before, reconciled, await self._intents())

    # ------------------------------------------------------------------------- what befalls them

    def _start(self, number: int) -> None:
        self._starts += 1
        setup = Setup(
            plan=self.plan,
            name=f"sender-{number}-{self._starts}",
            url=self._url,
            destination=self._destination,
            number=number,
            first=self._low[number],
        )
        self._senders[number] = self._crew.start("sender", setup.name, setup)

    def _progress(self) -> float:
        """The share of the walk that is behind all senders together."""
        calls = self.plan.calls
        done = [calls if number in self._walked else low for number, low in self._low.items()]
        return sum(done) / (calls * self.plan.senders)

    def _victims(self) -> list[int]:
        """Senders at work, with whom nothing is going on."""
        stopped = sum(member.state == "stopped" for member in self._senders.values())
        if stopped > self.plan.senders // 2:
            return []
        return [
            number
            for number, member in self._senders.items()
            if member.state == "running"
            and number not in self._walked
            and member not in self._orders
            and member not in self._held
        ]

    def _is_all_walked(self) -> bool:
        """Whether for each key one at least of those who ask for it is through."""
        plan = self.plan
        return all(
            any(is_asked_by(plan, key, number) for number in self._walked)
            for key in range(plan.senders)
        )

    async def _until_all_granted(self) -> None:
        """Wait until there is an intent of every key: many calls are under way then."""
        noted, left = self._noted, set(range(self.plan.calls))

        def is_near() -> bool:
            left.difference_update(noted.grants, noted.told)
            return len(left) <= self.plan.calls // 100 or self._is_all_walked()

        await self._crew.until(is_near, "every key to be granted")
        give_up_at = time.monotonic() + SETTLING_S_MAX
        while left and not self._is_all_walked():
            if time.monotonic() > give_up_at:
                self._problem(f"{len(left)} keys are not granted, among them {sorted(left)[:5]}")
                return
            # Whoever was granted a key may have died before it could note it.
            keys = sorted(left.difference(noted.grants, noted.told))
            found = await asyncio.gather(*[self._intent(key) for key in keys])
            left = {key for key, intent in zip(keys, found, strict=True) if intent is None}

    async def _hurt(self, faults: list[tuple[float, Fault]]) -> None:
        for share, fault in faults:
            await self._crew.until(
                lambda share=share: (
                    self._is_all_walked() or (self._progress() >= share and bool(self._victims()))
                ),
                "the senders to walk on",
            )
            if not (victims := self._victims()):
                continue
            number = self._chance.choice(victims)
            member = self._senders[number]
            if fault is Fault.KILL:
                self._kill(number)
                self._start(number)
            elif fault is Fault.STOP:
                self._stop(member, None)
            else:
                self._orders[member] = fault
                member.tell(Hold(HOLDS[fault]))

    def _kill(self, number: int) -> None:
        member = self._senders[number]
        self._faults["SIGKILL"] += 1
        self._orders.pop(member, None)
        self._held.discard(member)
        member.kill()

    async def _end_senders(self) -> None:
        """Kill all who are at work, at once; then the others, when they have gone on for a while."""
        self._orders.clear()
        for number, member in self._senders.items():
            if member.state != "stopped" and not member.is_over:
                self._kill(number)
        await asyncio.gather(*self._stopping)
        await asyncio.sleep(self.plan.lease_ms / 1_000)
        for number, member in self._senders.items():
            if not member.is_over:
                self._kill(number)

    def _stop(self, member: Member, held: Held | None) -> None:
        self._faults["SIGSTOP"] += 1
        member.stop()
        task = asyncio.create_task(self._continue(member, held))
        self._stopping.add(task)

    async def _continue(self, member: Member, held: Held | None) -> None:
        """Let a stopped sender go on when its leases are long over, one that holds when it matters."""
        lease_s = self.plan.lease_ms / 1_000
        await asyncio.sleep(lease_s * self._chance.uniform(*STOP_LEASES))
        if held is not None:
            for _ in range(int(lease_s * MOVED_LEASES_MAX / POLL_S)):
                if await self._has_moved(held):
                    break
                await asyncio.sleep(POLL_S)
        # It says that it holds before it stops: the first signal might come in between.
        while not member.is_over:
            member.go_on()
            if member not in self._held:
                return
            await asyncio.sleep(POLL_S)

    async def _has_moved(self, held: Held) -> bool:
        """Whether the key that a sender holds has been granted anew, or is done with."""
        intent = await self._intent(held.key)
        if intent is None:
            return True
        is_final = intent.status not in ("claimed", "unknown", "cancelled")
        return is_final or (intent.fence or 0) > held.fence

    def _note(self, member: Member, report: Report) -> None:
        self._reports += 1
        if isinstance(report, Listening):
            self._destination = report.path
        elif isinstance(report, Book):
            for key, effects, questions, refused, recognised in report.rows:
                self._ledger[key] = Entry(0, 0, effects, questions, refused, recognised)
        elif isinstance(report, BookEnds):
            self._is_told = True
        elif not isinstance(report, Ready):
            self._note_sender(member, report)

    def _note_sender(self, member: Member, report: Held | Woke | Notes | Walked) -> None:
        number = int(member.name.split("-")[1])
        if isinstance(report, Notes):
            self._noted.add(report)
            self._low[number] = max(self._low[number], report.low)
        elif isinstance(report, Walked):
            self._walked.add(number)
            self._orders.pop(member, None)
        elif isinstance(report, Woke):
            self._held.discard(member)
        elif self._senders[number] is member and member in self._orders:
            self._faults[f"held {report.where}"] += 1
            if self._orders.pop(member) is Fault.KILL_BEGUN:
                self._kill(number)
                self._start(number)
            else:
                self._held.add(member)
                self._stop(member, report)

    # --------------------------------------------------------------------------------- the end

    async def _intent(self, key: int) -> Intent | None:
        return await self._tenant.gate.get(outbox_id(event_of(key).dispatch_id))

    async def _intents(self) -> dict[int, Intent]:
        found: dict[int, Intent] = {}
        cursor: str | None = None
        while True:
            page = await self._tenant.gate.list(limit=BATCH_MAX, cursor=cursor)
            found |= {key_of(intent.idempotency_key or ""): intent for intent in page.items}
            if (cursor := page.next_cursor) is None:
                return found

    async def _when_leases_are_over(self) -> dict[int, Intent]:
        """The intents when no sender is left, and no lease."""
        await asyncio.sleep(2 * self.plan.lease_ms / 1_000)
        return await self._intents()

    async def _settle(self, caller: Caller) -> None:
        """Reconcile until nothing is unknown."""
        give_up_at = time.monotonic() + SETTLING_S_MAX
        while (await self._tenant.gate.unknown(limit=1)).items:
            if time.monotonic() > give_up_at:
                self._problem("reconcile found no end")
                return
            await caller.reconcile()
            await asyncio.sleep(POLL_S)

    async def _finish(self, caller: Caller) -> None:
        """Dispatch again what is cancelled or was never granted, until every key is done with."""
        left = set(range(self.plan.calls))
        give_up_at = time.monotonic() + SETTLING_S_MAX
        while left:
            if time.monotonic() > give_up_at:
                self._problem(f"{len(left)} keys cannot be finished, among them {sorted(left)[:5]}")
                return
            keys = iter(sorted(left))

            async def work(keys: Iterable[int] = keys) -> None:
                for key in keys:
                    if await caller.attempt(key):
                        left.discard(key)

            await asyncio.gather(*[work() for _ in range(AT_ONCE)])
            await self._settle(caller)

    async def _read_book(self, destination: Member) -> None:
        self._is_told = False
        destination.tell(TellBook())
        await self._crew.until(lambda: self._is_told, "the destination's book")

    async def _operate(self) -> int:
        """Decide what is dead-lettered, as an operator can who knows that no sender is left."""
        buried = [one for one in (await self._intents()).values() if one.status == "dead_lettered"]
        for intent in buried:
            key = key_of(intent.idempotency_key or "")
            verdict: Literal["sent", "not_sent"] = (
                "sent" if self._ledger[key].effects else "not_sent"
            )
            word = await self._tenant.gate.resolve(
                intent.outbox_id, verdict, actor="ada", reason="its book was read"
            )
            if word != "resolved":
                self._problem(f"key {key} cannot be resolved: {word}")
        return len(buried)

    # ------------------------------------------------------------------------------- the verdict

    def _problem(self, what: str) -> None:
        self.result.problems.append(f"{self.plan.name}: {what}")

    def _check(self, what: str, keys: Iterable[object]) -> None:
        if found := list(keys):
            self._problem(f"{what}: {len(found)}, among them {found[:5]}")

    def _judge(
        self, before: dict[int, Intent], reconciled: dict[int, Intent], after: dict[int, Intent]
    ) -> None:
        self._count(before, after)
        self._judge_statuses(before, reconciled, after)
        self._judge_effects(after)
        self._judge_notes(after)

    def _judge_statuses(
        self, before: dict[int, Intent], reconciled: dict[int, Intent], after: dict[int, Intent]
    ) -> None:
        plan = self.plan
        ends = {IntentStatus.SENT, IntentStatus.FAILED}
        # One that reclaims stays claimed where nobody asked for it after its lease.
        waits = IntentStatus.UNKNOWN if plan.on_expiry == "park" else IntentStatus.CLAIMED
        open_ends = ends | {IntentStatus.CANCELLED, waits}
        if is_honest_about_nothing(plan):
            open_ends.add(IntentStatus.DEAD_LETTERED)
        self._check(
            "keys that ended neither sent, failed, cancelled nor unknown",
            (repr(intent) for intent in before.values() if intent.status not in open_ends),
        )
        self._check(
            "keys that are unknown after reconcile",
            (key for key, intent in reconciled.items() if intent.status is IntentStatus.UNKNOWN),
        )
        self._check("keys without an intent", set(range(plan.calls)) - set(after))
        self._check(
            "keys that are not done with",
            (repr(intent) for intent in after.values() if intent.status not in ends),
        )

    def _judge_effects(self, after: dict[int, Intent]) -> None:
        plan = self.plan
        effects = {key: entry.effects for key, entry in self._ledger.items() if entry.effects}
        doubles = {key: made for key, made in effects.items() if len(made) > 1}
        if plan.name in PROMISED:
            self._check("keys applied twice", doubles.items())
        self._check(
            "keys that are sent without an effect",
            (key for key, one in after.items() if one.status == "sent" and key not in effects),
        )
        self._check(
            "effects of keys that are not sent",
            (key for key in effects if after[key].status != "sent"),
        )
        self._check(
            "keys that failed though the destination never refused them for good",
            (
                key
                for key, one in after.items()
                if one.status == "failed" and kind_of(plan.seed, key) is not Kind.BAD
            ),
        )
        self._check(
            "effects under a fence that is above the last grant's",
            (key for key, made in effects.items() if max(made)[0] > (after[key].fence or 0)),
        )
        if self._faults["held begun"] >= BITES_MIN:
            self._judge_bites(len(doubles))

    def _judge_bites(self, doubles: int) -> None:
        """Senders that stalled must have been seen at the destination, else nothing was shown."""
        plan = self.plan
        if plan.mode is Mode.FENCE and not self.result.counts["refused by their fence"]:
            self._problem("no late effect was refused by its fence: the stops do not bite")
        if plan.mode is Mode.KEY and not self.result.counts["recognised by their key"]:
            self._problem("no second effect was recognised: the stops do not bite")
        if plan.name not in PROMISED and not doubles:
            self._problem("not one double effect: the stops do not bite")

    def _judge_notes(self, after: dict[int, Intent]) -> None:
        noted = self._noted
        self._check(
            "keys of which a sender was told what is not so",
            (
                (key, statuses, str(after[key].status))
                for key, statuses in noted.told.items()
                # A dead letter may be decided, by an operator or a late word of its sender.
                if statuses - {"dead_lettered", str(after[key].status)}
            ),
        )
        self._check(
            "keys granted twice at once, or under fences that do not rise",
            (
                (key, grants)
                for key, grants in noted.grants.items()
                if len({attempts for attempts, _ in grants}) < len(grants)
                or [fence for _, fence in sorted(grants)] != sorted(fence for _, fence in grants)
            ),
        )
        self._check("calls begun when their lease was over", noted.late_begins)
        self._check("calls that ended as cancelled by nobody", noted.stray_cancels)
        if self.plan.on_expiry == "park":
            self._check(
                "keys granted again though nobody had said that they were not sent",
                (
                    repr(intent)
                    for intent in after.values()
                    if intent.attempts > 1 + releases(intent)
                ),
            )

    def _count(self, before: dict[int, Intent], after: dict[int, Intent]) -> None:
        entries = self._ledger.values()
        said = Counter(
            fact.kind for intent in after.values() for fact in intent.facts if fact.applied
        )
        asked = sum(len({about for _, about in entry.questions}) for entry in entries)
        effects = sum(len(entry.effects) for entry in entries)
        twice = sum(len(entry.effects) > 1 for entry in entries)
        self.result.counts |= {
            "calls (keys)": self.plan.calls,
            "dispatched, by several senders": self._noted.dispatches,
            "grants": sum(intent.attempts for intent in after.values()),
            "effects": effects,
            "keys applied twice": twice,
            "effects too many": effects - sum(bool(entry.effects) for entry in entries),
            "refused by their fence": sum(entry.refused for entry in entries),
            "recognised by their key": sum(entry.recognised for entry in entries),
            "SIGKILLs": self._faults["SIGKILL"],
            "SIGSTOPs": self._faults["SIGSTOP"],
            "  of both, between begin and effect": self._faults["held begun"],
            "  of both, between grant and begin": self._faults["held granted"],
            "  of both, between question and answer": self._faults["held asked"],
            "grants that became unknown, and asked about": asked,
            "reconciled: applied": said["applied"],
            "reconciled: absent": said["absent"],
            "reconciled: undecidable": said["undecidable"],
            "dead-lettered, resolved by an operator: sent": said["resolved_sent"],
            "dead-lettered, resolved by an operator: not sent": said["resolved_not_sent"],
            **ends_of(before, "ended", self.plan.calls),
            **ends_of(after, "at last", self.plan.calls),
        }


def is_honest_about_nothing(plan: Plan) -> bool:
    """Whether `absent` comes without a reason, so that only an operator can end what is unknown."""
    return plan.on_expiry == "park" and plan.mode is Mode.NOTHING and not plan.claims


def releases(intent: Intent) -> int:
    """How often an intent was given back for a new grant: by sender, destination or operator."""
    words = ("blocked", "absent", "resolved_not_sent")
    return sum(fact.applied and fact.kind in words for fact in intent.facts)


def ends_of(intents: dict[int, Intent], when: str, calls: int) -> dict[str, int]:
    found = Counter(str(intent.status) for intent in intents.values())
    statuses = ("sent", "failed", "cancelled", "unknown", "claimed", "dead_lettered")
    named = {f"{when}: {status}": found[status] for status in statuses}
    return named | {f"{when}: never granted": calls - len(intents)}


# ---------------------------------------------------------------------------------------- scenarios


async def run_plan(plan: Plan, kills: int, stops: int) -> Result:
    server = ServerProcess("valkey-9", appendonly="yes", appendfsync="always")
    server.start()
    try:
        async with leasekit.connect(server.url) as kit:
            run = Run(plan, server.url, kit.tenant(ORG, WORKSPACE))
            return await run.run(faults_of(plan, kills, stops))
    finally:
        server.stop()


def plan_of(name: str, seed: int, *, calls: int, senders: int, kills: int, stops: int) -> Plan:
    return msgspec.structs.replace(
        PLANS[name],
        calls=calls,
        senders=senders,
        seed=seed,
        lease_ms=LEASE_MS,
        walk_ms=kills * KILL_MS + stops * STOP_MS,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["park, fence", "reclaim, key"])
async def test_no_key_is_applied_twice(name: str) -> None:
    """Senders die and stall, the destination is troublesome, and each effect takes place once."""
    plan = plan_of(name, 1, **SMOKE)
    result = await run_plan(plan, SMOKE["kills"], SMOKE["stops"])
    assert not result.problems
    assert result.counts["effects"]


# -------------------------------------------------------------------------------------------- table


def table_of(results: list[Result]) -> str:
    """Scenarios side by side."""
    rows = [["", *[result.plan.name for result in results]]]
    for name in results[0].counts:
        values = [result.counts[name] for result in results]
        if any(value != 0 for value in values):
            rows.append([name, *[f"{v:,}" if isinstance(v, int) else v for v in values]])
    rows.insert(1, ["promised", *["yes" if r.plan.name in PROMISED else "NO" for r in results]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--senders", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, help=f"default: one for {CALLS_A_KILL} calls")
    parser.add_argument("--stops", type=int, help=f"default: one for {CALLS_A_STOP} calls")
    parser.add_argument("--scenario", action="append", choices=list(PLANS), help="default: all")
    given = parser.parse_args()
    logging.getLogger("leasekit").setLevel(logging.ERROR)  # calls without a word are meant here
    kills = given.calls // CALLS_A_KILL if given.kills is None else given.kills
    stops = given.calls // CALLS_A_STOP if given.stops is None else given.stops
    results: list[Result] = []
    problems: list[str] = []
    for name in given.scenario or PLANS:
        plan = plan_of(
            name, given.seed, calls=given.calls, senders=given.senders, kills=kills, stops=stops
        )
        try:
            result = asyncio.run(run_plan(plan, kills, stops))
        except (NoServer, DemoFailed) as error:
            problems.append(f"{name}: it could not be run to its end: {error}")
            continue
        print(f"{name}: {result.counts['seconds']} s", file=sys.stderr)  # noqa: T201
        results.append(result)
        problems += result.problems
    for policy in ("park", "reclaim"):
        if shown := [result for result in results if result.plan.on_expiry == policy]:
            print(f"\n{policy}, seed {given.seed}\n{table_of(shown)}")  # noqa: T201
    print(  # noqa: T201
        "\n"
        + WORDS.format(
            promised="; ".join(PROMISED),
            shown="; ".join(name for name in PLANS if name not in PROMISED),
        )
    )
    for problem in problems:
        print(f"BROKEN: {problem}")  # noqa: T201
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
