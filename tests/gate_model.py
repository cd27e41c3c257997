"""The gate as a small machine, and a search through everything that can happen to one key.

`Gate` is the server: pure functions from a row to a row and the word that answers, written from
lua/PROTOCOL.md; tests/lua/test_gate_model.py runs it beside the scripts. `World` puts two senders,
reconcilers, an operator, a destination, a replica and the clock around one row of it, and
`explore` walks through every order of their steps, breadth first, so that what it finds is a
shortest way to go wrong. RULES names what the gate rests on: with any one of them broken, a promise
of PROMISES falls.

    PYTHONPATH=tests python -m gate_model --depth 20

What keeps it small: time is counted in ticks from now on, and what ended long ago is all the same;
of fences only the order counts; the senders are alike, so the first one always moves first. Not in
it: events without a receipt, forgetting, clocks that jump, a reconciler or an operator that lies.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

SETTLE, ASK_LEASE = 1, 1

RANK = {"claimed": 0, "unknown": 1, "dead_lettered": 1, "cancelled": 2, "failed": 3, "sent": 4}
STATUS_OF = {
    "succeeded": "sent",
    "failed": "failed",
    "blocked": "cancelled",
    "left": "unknown",
    "applied": "sent",
    "absent": "cancelled",
    "undecidable": "unknown",
    "not_sent": "cancelled",
    "sent": "sent",
}

PROMISES = {
    "one sender": "under park no two grants are used, unless the first is known to be unused",
    "own lease": "who passes begin holds the running lease of the key",
    "whole lease": "a running lease is taken from nobody, and its fence stays the same",
    "applied once": "a destination applies once, unless an operator said not_sent",
    "sent stays": "what is recorded as sent stays so, over a failover too once it is acknowledged",
    "sent is true": "sent is recorded only of what was applied",
    "own word counts": "what a sender knows of its grant is recorded while nobody else has one",
    "unknown stays": "what reads as unknown is claimed again only after it was decided",
    "freed stays": "what was freed for another sender is not ended by a refusal of the first",
    "given back": "a token that was given back is not granted while nobody else was since",
    "fences rise": "a fence is above all that were given before, over a failover too",
    "time to settle": "reconcile turns away nothing that lands within the time to settle",
    "one question": "while a question is under way nobody else begins one",
    "an end": "a key whose senders are gone is decided or buried after so many questions",
}


class Rule(NamedTuple):
    """What the gate rests on, where its loss shows, and which promise falls."""

    says: str
    broken: str
    promise: str
    setting: str


RULES = {
    # What is granted
    "unknown": Rule("unknown is not granted", "it is", "one sender", "left"),
    "parked": Rule("a parked lease that ends is unknown", "it is free", "one sender", "plain"),
    "running": Rule("a running lease is not granted", "it is", "whole lease", "plain"),
    "failed": Rule("failed is final", "it is granted", "one sender", "plain"),
    "sent": Rule("sent is final", "it is granted", "one sender", "plain"),
    "dead": Rule("dead-lettered is not granted", "it is", "one sender", "one question"),
    "repeat": Rule("a repeat has the first answer", "it is a new grant", "whole lease", "lost"),
    "spent": Rule("a token given back is spent", "it is granted", "given back", "again"),
    "dataset": Rule("other data than known grants nothing", "it does", "one sender", "wiped"),
    # What a sender does
    "begin": Rule("begin looks at the deadline", "it does not", "own lease", "plain"),
    "deadline": Rule("deadlines count from the request", "from the reply", "own lease", "plain"),
    "leave": Rule("who leaves after begin leaves unknown", "cancelled", "one sender", "left"),
    "withdraw": Rule("a grant not used is withdrawn", "it is left", "given back", "failover"),
    "drop": Rule("a repeat ends the old connection", "it does not", "given back", "lost"),
    # Completion, extension
    "token": Rule("completion is by token", "by anybody", "one sender", "lost"),
    "rank": Rule("a lower word changes nothing", "the last word counts", "sent stays", "twice"),
    "freed": Rule("what was freed is not failed", "its old sender may", "freed stays", "asked"),
    "late": Rule("completion looks at no clock", "late is refused", "own word counts", "plain"),
    "extend": Rule("extension ends with the lease", "it does not", "unknown stays", "longer"),
    "extend token": Rule("extension is by token", "by anybody", "own lease", "reclaim"),
    # Reconcile
    "ask running": Rule("no question before the lease ends", "any time", "own lease", "asked"),
    "settle": Rule("no question before things settled", "at once", "time to settle", "asked"),
    "ask fence": Rule("a question has a fence above all", "the sender's", "applied once", "asked"),
    "noted fence": Rule("the question's fence is noted", "it is not", "applied once", "asked"),
    "absent": Rule("absent needs fence or key", "it needs nothing", "applied once", "nothing"),
    "one asks": Rule("one question at a time", "any number", "one question", "two ask"),
    "revision": Rule("an answer is to one revision", "to any", "sent stays", "asked"),
    "ask token": Rule(
        "an answer names its question", "only a revision", "sent stays", "failover key"
    ),
    "undecidable": Rule("what nobody can tell is unknown", "it is sent", "sent is true", "asked"),
    "ask parked": Rule("what parked is written or asked about", "neither", "an end", "plain"),
    "budget": Rule("a question counts as it begins", "as it is answered", "an end", "asked"),
    "buried": Rule("too many questions bury a key", "they go on", "an end", "asked"),
    # The operator
    "operator": Rule("operators decide only the unknown", "anything", "own lease", "operator"),
    "seen": Rule("a decision is on the revision seen", "on any", "one sender", "operator"),
    # Durability
    "barrier": Rule("a grant waits for the replicas", "it does not", "one sender", "failover"),
    "writes": Rule("a repeat writes too", "it may not", "one sender", "failover"),
    "extend short": Rule("extension waits likewise", "it does not", "own lease", "failover longer"),
    "told short": Rule("completion waits likewise", "it does not", "sent stays", "failover"),
    "fence time": Rule("fences come from the clock", "from the store", "fences rise", "failover"),
}


class Row(NamedTuple):
    """What the server keeps of one key; times on the clock of the caller."""

    status: str = "absent"
    cause: str = ""
    token: str = ""
    fence: int = 0
    end: int = 0
    parks: bool = False
    attempts: int = 0
    revision: int = 0
    asks: int = 0
    ask_token: str = ""
    ask_fence: int = 0
    ask_end: int = 0
    ask_at: int = 0

    def read(self, now: int) -> str:
        """The status that everybody is told: what parks is unknown from its lease's end on."""
        parked = self.status == "claimed" and self.parks and self.end <= now
        return "unknown" if parked else self.status


class Gate:
    """The commands of one key. `broken` is a name of RULES, or "" for the gate as it should be."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken

    def prepare(
        self, row: Row, token: str, *, now: int, lease: int, parks: bool, fence: int
    ) -> tuple[Row, str]:
        """granted (also again, with the same fence), spent, or the status that refuses."""
        status, broken = row.read(now), self.broken
        if row.token == token and status == "cancelled" and broken != "spent":
            return row, "spent"
        if row.token == token and row.status == "claimed" and broken != "repeat":
            return row, "granted"
        is_free = (
            status in ("absent", "cancelled")
            or (status == "claimed" and not row.parks and row.end <= now)
            or (status == "unknown" and row.status == "claimed" and broken == "parked")
            or (status == "unknown" and row.status == "unknown" and broken == "unknown")
            or (status == "claimed" and row.end > now and broken == "running")
            or (status == "claimed" and row.token == token and broken == "repeat")
            or (status == "dead_lettered" and broken == "dead")
            or (status == broken and broken in ("failed", "sent"))
        )
        if not is_free:
            return row, status
        granted = Row(
            "claimed", "granted", token, fence, now + lease, parks, row.attempts + 1,
            row.revision + 1,
        )  # fmt: skip
        return granted, "granted"

    def complete(self, row: Row, token: str, result: str, *, now: int) -> tuple[Row, str]:
        """recorded, kept (less than is known), lost (another's), missing."""
        status, wanted = row.read(now), STATUS_OF[result]
        if row.status == "absent":
            return row, "missing"
        if row.token != token and self.broken != "token":
            return row, "lost"
        is_again = result == row.cause == "left"
        is_freed = row.status == "cancelled" and row.cause != "blocked" and self.broken != "freed"
        applies = RANK[wanted] > RANK[row.status] and not is_again
        applies = (applies and not (is_freed and result == "failed")) or self.broken == "rank"
        if self.broken == "late" and status == "unknown":
            return row, "lost"
        if not applies:
            return row, "recorded" if is_again or wanted == status else "kept"
        end, ask_at = row.end, row.ask_at
        if wanted == "unknown":
            end = min(end, now)
            if row.parks:
                ask_at = end
            else:
                wanted = "claimed"
        row = row._replace(
            status=wanted, cause=result, end=end, ask_at=ask_at, revision=row.revision + 1
        )
        return row, "recorded"

    def extend(self, row: Row, token: str, *, now: int, lease: int) -> tuple[Row, str]:
        is_own = row.token == token or self.broken == "extend token"
        is_running = row.end > now or self.broken == "extend"
        if row.status == "claimed" and is_own and is_running:
            return row._replace(end=max(row.end, now + lease)), "extended"
        return row, "lost"

    def expire(self, row: Row, *, now: int) -> tuple[Row, str]:
        """Write down what reads as unknown."""
        if row.status == row.read(now) or self.broken == "ask parked":
            return row, "nothing"
        row = row._replace(
            status="unknown", cause="parked", revision=row.revision + 1, ask_at=row.end
        )
        return row, "written"

    def ask(
        self, row: Row, token: str, *,
        now: int, lease: int, settle: int, asks_max: int, pause: int, fence: int,
    ) -> tuple[Row, str]:  # fmt: skip
        """asked, wait, buried, or the status of what is not unknown. `pause` is not doubled."""
        status, broken = row.read(now), self.broken
        is_early = broken == "ask running" and status == "claimed"
        if broken == "ask parked":
            status = row.status
        if status != "unknown" and not is_early:
            is_his = row.ask_token == token and row.cause == "undecidable"
            return row, "buried" if is_his else status
        if row.cause == "asked" and row.ask_token == token:
            return row, "asked"
        ready = row.end + (0 if broken == "settle" else settle)
        asked = 0 if broken == "one asks" else max(row.ask_end, row.ask_at)
        if not is_early and max(ready, asked) > now:
            return row, "wait"
        row = row._replace(ask_token=token, revision=row.revision + 1)
        if row.asks >= asks_max and broken != "buried":
            return row._replace(status="dead_lettered", cause="undecidable"), "buried"
        return row._replace(
            status="unknown", cause="asked", asks=row.asks + (broken != "budget"),
            ask_fence=row.fence if broken == "ask fence" else fence,
            ask_end=now + lease, ask_at=now + lease + pause,
        ), "asked"  # fmt: skip

    def answer(
        self, row: Row, token: str, revision: int, verdict: str, *,
        now: int, asks_max: int, pause: int,
    ) -> tuple[Row, str]:  # fmt: skip
        """recorded, lost (it has changed since), missing."""
        is_own = row.ask_token == token or self.broken == "ask token"
        if row.status == "absent":
            return row, "missing"
        if is_own and row.cause == verdict and row.revision == revision + 1:
            return row, "recorded"
        if not is_own or (row.revision != revision and self.broken != "revision"):
            return row, "lost"
        if row.cause != "asked" and self.broken not in ("revision", "ask token"):
            return row, "lost"
        status, ask_at = STATUS_OF[verdict], row.ask_at
        if self.broken == "undecidable":
            status = "sent"
        elif verdict == "undecidable":
            ask_at = now + pause
            if row.asks >= asks_max and self.broken != "buried":
                status, ask_at = "dead_lettered", row.ask_at
        row = row._replace(
            status=status, cause=verdict, revision=row.revision + 1,
            ask_end=min(row.ask_end, now), ask_at=ask_at,
            asks=row.asks + (self.broken == "budget"),
        )  # fmt: skip
        return row, "recorded"

    def resolve(self, row: Row, revision: int, verdict: str, *, now: int) -> tuple[Row, str]:
        """resolved, changed (since it was looked at), the status of what is not unknown."""
        status = row.read(now)
        if status == "absent":
            return row, "missing"
        resolved = ("resolved", STATUS_OF[verdict], revision + 1)
        if (row.cause, row.status, row.revision) == resolved:
            return row, "resolved"
        if status not in ("unknown", "dead_lettered") and self.broken != "operator":
            return row, status
        if row.revision != revision and self.broken != "seen":
            return row, "changed"
        row = row._replace(status=STATUS_OF[verdict], cause="resolved", revision=row.revision + 1)
        return row, "resolved"


# ------------------------------------------------------------------------------------- the world


class Setting(NamedTuple):
    """Who takes part, and what may happen to them."""

    parks: bool = True
    destination: str = "fence"  # what it honours: fence, key, nothing
    grants: tuple[int, int] = (1, 1)  # tokens of each sender
    lease: int = 1
    loses: bool = False  # requests and replies of prepare
    leaves: bool = False  # after begin, without a word, or dies there; the call may still land
    declines: bool = False  # the destination may say no
    extends: bool = False
    doubts: bool = False  # a sender that has said sent may leave as if it had not
    again: bool = False  # a caller may prepare with a token that it gave back
    askers: int = 0
    asks_max: int = 2
    undecided: bool = False  # the destination may not know
    operator: bool = False
    failover: bool = False
    wipe: bool = False


SETTINGS = {
    "plain": Setting(declines=True),
    "left": Setting(leaves=True),
    "lost": Setting(grants=(2, 1), loses=True),
    "again": Setting(again=True),
    "twice": Setting(doubts=True),
    "longer": Setting(lease=2, extends=True, askers=1),
    "asked": Setting(leaves=True, askers=1, undecided=True),
    "one question": Setting(askers=1, asks_max=1, undecided=True),
    "key": Setting(destination="key", leaves=True, askers=1),
    "nothing": Setting(destination="nothing", leaves=True, askers=1),
    "two ask": Setting(leaves=True, askers=2),
    "operator": Setting(grants=(2, 1), operator=True),
    "wiped": Setting(wipe=True, leaves=True),
    "failover": Setting(failover=True, loses=True),
    "failover longer": Setting(failover=True, lease=2, extends=True, askers=1),
    "together": Setting(failover=True, loses=True, leaves=True, askers=1),
    "failover key": Setting(failover=True, destination="key", askers=1),
    "failover reclaim": Setting(
        failover=True, parks=False, destination="key", loses=True, leaves=True
    ),
    "reclaim": Setting(parks=False, destination="key", loses=True, leaves=True, extends=True),
    "all": Setting(
        grants=(2, 1), loses=True, leaves=True, declines=True, extends=True, again=True, askers=1,
        undecided=True, operator=True, failover=True, wipe=True, doubts=True,
    ),
}  # fmt: skip


class Sender(NamedTuple):
    """One sender. `left` is what its own clock gives it, `sure` what the replicas have.

    idle -> out (its request) -> back (the answer) -> held -> begun -> knows (what became of it) ->
    told -> idle; lost: it does not know whether it has the grant; short: too few replicas have it.
    """

    phase: str = "idle"
    number: int = 0
    token: str = ""
    fence: int = 0
    left: int = -SETTLE
    sure: bool = True
    answer: str = ""


class Asker(NamedTuple):
    """A reconciler: the question that it is at, and what the destination said."""

    token: str = ""
    about: str = ""
    fence: int = 0
    left: int = 0
    revision: int = 0
    answer: str = ""


class World(NamedTuple):
    row: Row = Row()
    replica: Row | None = None  # what a failover would leave; None = there is none any more
    senders: tuple[Sender, Sender] = (Sender(), Sender())
    askers: tuple[Asker, ...] = ()
    seen: tuple[str, int] | None = None  # what the operator looks at: token, revision
    flights: tuple[tuple[str, int, int], ...] = ()  # calls whose caller is gone: token, fence, left
    stuck: tuple[str, ...] = ()  # requests on connections that nobody ended
    high: int = 0  # the highest fence that the destination noted
    # What only the judge knows.
    applied: int = 0
    used: str = ""  # the grant that passed begin, as long as nobody knows better
    gone: frozenset[str] = frozenset()  # tokens given back
    top: int = 0  # the highest fence ever given
    is_acknowledged: bool = False  # a sender was told that sent is recorded, for good
    is_decided: bool = False  # an operator said not_sent
    has_failed_over: bool = False
    is_wiped: bool = False


Step = tuple[str, str, World, str]  # who, does what, the world then, the broken promise or ""
NAMES = "AB"


class Model:
    """One gate in one setting: where it begins, and what can happen next."""

    def __init__(self, setting: Setting, broken: str = "") -> None:
        self.setting, self.broken = setting, broken
        self.gate = Gate(broken)
        self.ends = cache(self._ends)

    def start(self) -> World:
        replica = Row() if self.setting.failover else None
        return World(replica=replica, askers=(Asker(),) * self.setting.askers)

    def steps(self, world: World) -> Iterator[Step]:
        """Everything that can happen next."""
        for who, does, then, breaks in self._raw_steps(world):
            breaks = breaks or self._judged(world, then)
            yield who, does, self._settled(then), breaks

    def _raw_steps(self, world: World) -> Iterator[Step]:
        for i in (0, 1):
            yield from self._sender(world, i)
        for i in range(len(world.askers)):
            yield from self._asker(world, i)
        for token in world.stuck:
            rest = tuple(other for other in world.stuck if other != token)
            then, answer, shown = self._prepared(world._replace(stuck=rest), token)
            yield "server", f"does the old prepare({token}): {shown}", then, ""
        for flight in world.flights:
            rest = tuple(other for other in world.flights if other != flight)
            then, answer, breaks = self._landed(world._replace(flights=rest), *flight)
            yield (
                "destination",
                f"{answer} the call of {flight[0]}, which was under way",
                then,
                breaks,
            )
        yield from self._server(world)
        if self.setting.operator:
            yield from self._operator(world)

    # Senders

    def _sender(self, world: World, i: int) -> Iterator[Step]:
        me, name, setting = world.senders[i], NAMES[i], self.setting

        def now(then: World, **changes: Any) -> World:
            one = me._replace(**changes)
            return then._replace(senders=(then.senders[0], one) if i else (one, then.senders[1]))

        def idle(then: World) -> World:
            return now(then, **Sender(number=me.number)._asdict())

        def lost(then: World, phase: str = "lost") -> World:
            return now(then, **Sender(phase, me.number, token)._asdict())

        token = me.token
        if me.phase == "idle":
            is_first = i == 0 or world.senders[0].number > 0
            if me.number < setting.grants[i] and is_first:
                token = f"{name.lower()}{me.number + 1}"
                then = now(world, phase="out", number=me.number + 1, token=token, left=0)
                yield name, f"sends prepare({token})", then, ""
        elif me.phase == "out":
            then, answer, shown = self._prepared(world, token)
            # Where there are no replicas to lose there is nothing to wait for.
            wrote = then.row is not world.row or self.broken != "writes"
            sure = then.replica is None or not wrote or answer != "granted"
            fence, left = (
                (then.row.fence, me.left + then.row.end) if answer == "granted" else (0, 0)
            )
            then = now(then, phase="back", answer=answer, fence=fence, left=left, sure=sure)
            yield "server", f"does prepare({token}): {shown}", then, ""
            if setting.loses:
                stuck = (*world.stuck, token) if self.broken == "drop" else world.stuck
                then = lost(world._replace(stuck=stuck))
                yield name, f"waits no longer for prepare({token})", then, ""
        elif me.phase == "back":
            if me.answer != "granted":
                yield name, f"is refused: {me.answer}", idle(world), ""
            elif me.sure or self.broken == "barrier":
                yield name, f"has its grant {token}", now(world, phase="held", answer=""), ""
            if me.answer == "granted" and not me.sure:
                yield name, "hears that too few replicas have it", lost(world, "short"), ""
            if setting.loses:
                yield name, f"does not get the answer to prepare({token})", lost(world), ""
        elif me.phase == "lost":
            yield name, f"sends prepare({token}) again", now(world, phase="out", left=0), ""
        elif me.phase == "begun":
            yield from self._call(world, i, now)
        elif me.phase == "knows":
            yield from self._say(world, i, now)
        elif me.phase == "told":
            if me.sure:
                is_own = world.row.token == token and me.answer == "succeeded"
                acknowledged = world.is_acknowledged or (is_own and not world.is_wiped)
                then = idle(world._replace(is_acknowledged=acknowledged))
                yield name, "hears that it is recorded", then, ""
            if setting.doubts:
                then, answer = self._told(world, i, "left")
                yield name, f"leaves({token}) as well: {answer}", now(then, phase="knows"), ""
        if me.phase in ("lost", "short", "held"):
            then = world
            if self.broken != "withdraw":
                then, answer = self._told(world, i, "blocked")
            then = then._replace(gone=then.gone | {token})
            is_held = then.row.status == "claimed" and then.row.token == token
            breaks = "given back" if is_held else ""
            if setting.again and me.phase != "lost":
                yield name, f"gives {token} back; its caller wants it again", lost(then), breaks
            yield name, f"gives {token} back", idle(then), breaks
        if me.phase == "held":
            yield from self._begin(world, i, now)
        if me.phase in ("held", "begun") and setting.extends:
            yield from self._extend(world, i, now)
        if setting.leaves and me.phase in ("out", "lost", "held"):
            stuck = (*world.stuck, token) if me.phase == "out" else world.stuck
            yield name, "dies", idle(world._replace(stuck=stuck)), ""

    def _call(self, world: World, i: int, now: Callable[..., World]) -> Iterator[Step]:
        """What may become of a call that has begun."""
        me, name = world.senders[i], NAMES[i]
        idle, knows = Sender(number=me.number), Sender("knows", me.number, me.token)
        then, answer, breaks = self._landed(world, me.token, me.fence, me.left)
        known = knows._replace(answer="succeeded" if answer == "applies" else "failed")
        then = now(then, **known._asdict())
        yield "destination", f"{answer} the call of {me.token}", then, breaks
        if self.setting.declines:
            then = now(world, **knows._replace(answer="failed")._asdict())
            yield "destination", f"declines the call of {me.token}", then, ""
        then, answer = self._told(world, i, "blocked")
        yield name, f"says not_sent({me.token}): {answer}", now(then, **idle._asdict()), ""
        if self.setting.leaves:
            # The call may still arrive, long after whoever made it is gone.
            flights = tuple(sorted((*world.flights, (me.token, me.fence, me.left))))
            then = now(world._replace(flights=flights), **idle._asdict())
            yield name, "dies, its call under way", then, ""
            flights = tuple(sorted((*world.flights, (me.token, me.fence, min(me.left, 0)))))
            result = "blocked" if self.broken == "leave" else "left"
            then, answer = self._told(world._replace(flights=flights), i, result)
            then = now(then, **idle._asdict())
            yield name, f"leaves({me.token}), its call under way: {answer}", then, ""

    def _say(self, world: World, i: int, now: Callable[..., World]) -> Iterator[Step]:
        """Whoever knows what became of its call says so, however late."""
        me, name = world.senders[i], NAMES[i]
        then, answer = self._told(world, i, me.answer)
        word = STATUS_OF[me.answer]
        is_unheard = then.row.token == me.token and then.row.status != word and answer != "kept"
        sure = then.replica is None or self.broken == "told short"
        then = now(then, phase="told", sure=sure)
        yield name, f"says {word}({me.token}): {answer}", then, "own word counts" * is_unheard
        if self.setting.leaves:
            then = now(world, **Sender(number=me.number)._asdict())
            yield name, "dies before it says so", then, ""

    def _prepared(self, world: World, token: str) -> tuple[World, str, str]:
        """What prepare does, answers, and looks like."""
        setting = self.setting
        if world.is_wiped and self.broken != "dataset":
            return world, "data_lost", "data_lost"
        row, answer = self.gate.prepare(
            world.row, token, now=0, lease=setting.lease, parks=setting.parks,
            fence=self._next_fence(world),
        )  # fmt: skip
        is_again = answer == "granted" and row is world.row
        return world._replace(row=row), answer, "granted as before" if is_again else answer

    @staticmethod
    def _question(world: World) -> str:
        """A token for a question that none has now."""
        known = {world.row.ask_token, *(asker.token for asker in world.askers)}
        if world.replica is not None:
            known.add(world.replica.ask_token)
        return next(token for token in ("q1", "q2", "q3", "q4", "q5") if token not in known)

    def _next_fence(self, world: World) -> int:
        if self.broken == "fence time":
            return max(world.row.fence, world.row.ask_fence) + 1
        return world.top + 1

    def _begin(self, world: World, i: int, now: Callable[..., World]) -> Iterator[Step]:
        me, row = world.senders[i], world.row
        if me.left <= 0 and self.broken != "begin":
            return
        breaks = ""
        is_own = row.status == "claimed" and row.token == me.token and row.end > 0
        if not is_own and not world.is_wiped:
            breaks = "own lease"
        if self.setting.parks and world.used not in ("", me.token):
            breaks = "one sender"
        then = now(world._replace(used=me.token), phase="begun")
        yield NAMES[i], f"passes begin with {me.token}", then, breaks

    def _extend(self, world: World, i: int, now: Callable[..., World]) -> Iterator[Step]:
        me, lease = world.senders[i], self.setting.lease
        row, answer = self.gate.extend(world.row, me.token, now=0, lease=lease)
        if answer != "extended":
            return
        then = world._replace(row=row)
        if then.replica is not None:
            counts = self.broken == "extend short"
            yield NAMES[i], f"extends({me.token}), but too few replicas have it", now(
                then, left=lease if counts else me.left
            ), ""  # fmt: skip
            then = self._replicated(then)
        # Its own changes are all that now() needs of the senders; the barrier made the rest sure.
        yield NAMES[i], f"extends({me.token})", now(then, left=lease, sure=True), ""

    def _told(self, world: World, i: int, result: str) -> tuple[World, str]:
        """A completion by the token of a sender, and what the judge learns from it."""
        token = world.senders[i].token
        row, answer = self.gate.complete(world.row, token, result, now=0)
        used = world.used
        if result == "blocked" and self.broken != "leave" and used == token:
            used = ""
        return world._replace(row=row, used=used), answer

    # Destination, reconcile, operator

    def _landed(self, world: World, token: str, fence: int, left: int) -> tuple[World, str, str]:
        destination = self.setting.destination
        if destination == "fence" and fence < world.high:
            is_early = self.setting.parks and left > -SETTLE and not world.is_decided
            return world, "refuses", "time to settle" if is_early else ""
        if destination == "key" and world.applied:
            return world, "applies", ""
        then = world._replace(applied=world.applied + 1, high=max(world.high, fence))
        counts = self.setting.parks and not world.is_decided
        return then, "applies", "applied once" if then.applied > 1 and counts else ""

    def _asker(self, world: World, i: int) -> Iterator[Step]:
        me, setting = world.askers[i], self.setting
        name = "reconcile" if setting.askers == 1 else f"reconcile {i + 1}"

        def now(then: World, asker: Asker) -> World:
            return then._replace(askers=(*then.askers[:i], asker, *then.askers[i + 1 :]))

        if not me.token:
            row, answer = self._asked(world.row, self._question(world), self._next_fence(world))
            if row is world.row:
                return
            then, breaks = world._replace(row=row), ""
            if answer == "asked" and any(other.left > 0 for other in world.askers):
                breaks = "one question"
            yield name, f"asks: {answer}; and dies", then, breaks
            if answer != "asked":
                return
            said = "applied" if world.applied else "absent"
            if setting.destination == "fence":
                if row.ask_fence < world.high:
                    said = "undecidable"
                elif self.broken != "noted fence":
                    then = then._replace(high=row.ask_fence)
            if setting.destination == "nothing" and said == "absent" and self.broken != "absent":
                said = "undecidable"
            for word in {said, "undecidable"} if setting.undecided else {said}:
                asker = Asker(
                    row.ask_token, row.token, row.ask_fence, ASK_LEASE, row.revision, word
                )
                then_asked = now(then, asker)
                yield name, f"asks: asked; the destination says {word}", then_asked, breaks
        else:
            row, answer = self._answered(world.row, me.token, me.revision, me.answer)
            used = world.used
            if me.answer == "absent" and answer == "recorded" and used == me.about:
                used = ""
            then = now(world._replace(row=row, used=used), Asker())
            yield name, f"answers {me.answer}: {answer}", then, ""
            yield name, "dies before it answers", now(world, Asker()), ""

    def _operator(self, world: World) -> Iterator[Step]:
        row = world.row
        if world.seen is None:
            if row.read(0) in ("unknown", "dead_lettered") or (
                self.broken == "operator" and row.status == "claimed"
            ):
                then = world._replace(seen=(row.token, row.revision))
                yield "operator", f"looks at {row.token}, {row.read(0)}", then, ""
            return
        about, revision = world.seen
        for verdict in ("not_sent", "sent") if world.applied else ("not_sent",):
            row, answer = self.gate.resolve(world.row, revision, verdict, now=0)
            then = world._replace(row=row, seen=None)
            if verdict == "not_sent" and answer == "resolved":
                used = "" if world.used == about else world.used
                then = then._replace(used=used, is_decided=True)
            yield "operator", f"decides {verdict} of {about}: {answer}", then, ""

    # Time and servers

    def _server(self, world: World) -> Iterator[Step]:
        yield "clock", "ticks", self._ticked(world), ""
        row, answer = self.gate.expire(world.row, now=0)
        if answer == "written" and (self.setting.operator or world.askers):
            yield "server", "writes unknown down", world._replace(row=row), ""
        if world.replica is not None:
            then = self._replicated(world)
            if then != world:
                yield "replica", "catches up", then, ""
            # Every connection ends; what was asked is asked again.
            lost = {"out": "lost", "back": "lost", "told": "knows"}
            senders = tuple(
                one._replace(phase=lost.get(one.phase, one.phase), sure=True)
                for one in world.senders
            )
            yield "replica", "takes over", world._replace(
                row=world.replica, replica=None, senders=senders, stuck=(), has_failed_over=True
            ), ""  # fmt: skip
        if self.setting.wipe and not world.is_wiped:
            yield "server", "loses all its data", world._replace(
                row=Row(), replica=None, is_wiped=True, is_acknowledged=False
            ), ""  # fmt: skip

    @staticmethod
    def _replicated(world: World) -> World:
        senders = tuple(one if one.sure else one._replace(sure=True) for one in world.senders)
        return world._replace(replica=world.row, senders=senders)

    def _ticked(self, world: World) -> World:
        # A request counts down from 0: how long ago it was sent, once that makes a difference.
        waited_most = self.setting.lease + SETTLE

        def aged(one: Sender) -> Sender:
            if one.phase in ("out", "back"):
                if self.broken == "deadline":
                    return one
                return one._replace(left=max(one.left - 1, -waited_most))
            return one._replace(left=max(one.left - 1, -SETTLE))

        return world._replace(
            row=_older(world.row),
            replica=world.replica and _older(world.replica),
            senders=tuple(aged(one) for one in world.senders),
            askers=tuple(one._replace(left=max(one.left - 1, 0)) for one in world.askers),
            flights=tuple(
                (token, fence, max(left - 1, -SETTLE)) for token, fence, left in world.flights
            ),
        )

    # The judge

    def _judged(self, before: World, after: World) -> str:
        """The promise that a step broke by what it did to the row, or ""."""
        old, new = before.row, after.row
        if after.is_acknowledged and new.status != "sent":
            return "sent stays"
        if new is old or after.has_failed_over != before.has_failed_over:
            return ""
        if old.status == "sent" and new.status != "sent" and not after.is_wiped:
            return "sent stays"
        if new.status == "sent" and not after.applied:
            return "sent is true"
        if (new.status, old.status) == ("failed", "cancelled") and old.cause != "blocked":
            return "freed stays"
        if new.status == "claimed":
            if (new.token, new.fence) == (old.token, old.fence):
                if old.read(0) == "unknown" and new.read(0) == "claimed":
                    return "unknown stays"
            elif new.fence <= before.top:
                return "fences rise"
            elif old.status == "claimed" and old.end > 0:
                return "whole lease"
            if new.token in after.gone and not after.has_failed_over:
                return "given back"
        elif new.ask_fence > old.ask_fence and new.ask_fence <= before.top:
            return "fences rise"
        return "" if self.ends(new) else "an end"

    def _ends(self, row: Row) -> bool:
        """Whether a row whose lease is over is decided though all who knew of it are gone."""
        for is_answered in (False, True):
            now, one = 0, row
            for number in range(self.setting.asks_max + 1):
                now += 10
                if one.parks:
                    one, _ = self.gate.expire(one, now=now)
                    token = f"last {number}"
                    one, answer = self._asked(one, token, 1, now=now)
                    if is_answered and answer == "asked":
                        one, _ = self._answered(one, token, one.revision, "undecidable", now=now)
                else:
                    one, _ = self.gate.prepare(one, "last", now=now, lease=1, parks=True, fence=1)
                if one.status not in ("claimed", "unknown") or one.token == "last":
                    break
            else:
                return False
        return True

    def _asked(self, row: Row, token: str, fence: int, now: int = 0) -> tuple[Row, str]:
        return self.gate.ask(
            row, token, now=now, lease=ASK_LEASE, settle=SETTLE,
            asks_max=self.setting.asks_max, pause=0, fence=fence,
        )  # fmt: skip

    def _answered(
        self, row: Row, token: str, revision: int, verdict: str, now: int = 0
    ) -> tuple[Row, str]:
        return self.gate.answer(
            row, token, revision, verdict, now=now, asks_max=self.setting.asks_max, pause=0
        )

    def _settled(self, world: World) -> World:
        """The same world, without what makes no difference any more."""
        row, replica, askers, seen = world.row, world.replica, world.askers, world.seen
        counted = [row.revision, *(asker.revision for asker in askers if asker.token)]
        if replica is not None:
            counted.append(replica.revision)
        if seen is not None:
            counted.append(seen[1])
        if base := min(counted):
            askers = tuple(
                one._replace(revision=one.revision - base) if one.token else one for one in askers
            )
            seen = seen and (seen[0], seen[1] - base)
        gone = world.gone
        if gone:
            # Only the last token is known to be spent.
            a, b = world.senders
            gone = gone & ({row.token} if row.token else {a.token, b.token, *world.stuck})
        return self._lowered(
            world._replace(
                row=_plain(row, base), replica=replica and _plain(replica, base),
                askers=askers, seen=seen, gone=gone,
                top=max(world.top, row.fence, row.ask_fence),
            )
        )  # fmt: skip

    def _lowered(self, world: World) -> World:
        """The same world with the least fences that stand in the same order."""
        rows = [world.row, world.replica] if world.replica is not None else [world.row]
        known = {0, world.high}
        for row in rows:
            known |= {row.fence, row.ask_fence}
        known.update(one.fence for one in (*world.senders, *world.askers))
        known.update(fence for _, fence, _ in world.flights)
        if len(known) > world.top or self.broken == "fence time":
            return world
        rank = {fence: i for i, fence in enumerate(sorted(known))}
        rows = [row._replace(fence=rank[row.fence], ask_fence=rank[row.ask_fence]) for row in rows]
        return world._replace(
            row=rows[0],
            replica=rows[1] if world.replica is not None else None,
            senders=tuple(one._replace(fence=rank[one.fence]) for one in world.senders),
            askers=tuple(one._replace(fence=rank[one.fence]) for one in world.askers),
            flights=tuple((token, rank[fence], left) for token, fence, left in world.flights),
            high=rank[world.high],
            top=len(rank) - 1,
        )


@cache
def _older(row: Row) -> Row:
    """A row after a tick."""
    return row._replace(
        end=max(row.end - 1, -SETTLE),
        ask_end=max(row.ask_end - 1, 0),
        ask_at=max(row.ask_at - 1, 0),
    )


@cache
def _plain(row: Row, base: int) -> Row:
    """A row without what nobody looks at any more; revisions count from `base`."""
    row = row._replace(attempts=0, revision=row.revision - base)
    if row.status in ("claimed", "unknown"):
        return row
    return row._replace(end=-SETTLE, ask_end=0, ask_at=0)


# ------------------------------------------------------------------------------------ the search


class Found(NamedTuple):
    """What a search came to. `trace` is empty where every promise was kept."""

    states: int
    depth: int  # all that can happen in so many steps was looked at
    is_all: bool  # and nothing else can happen in more
    seconds: float = 0.0
    promise: str = ""
    trace: tuple[str, ...] = ()


def explore(setting: Setting, *, depth: int, broken: str = "", promise: str = "") -> Found:
    """Every order of steps, up to `depth` of them, until `promise` (or any, if "") is broken."""
    began, collects = time.perf_counter(), gc.isenabled()
    gc.disable()  # there are no cycles to find, and very many tuples to look through
    try:
        found = _explored(Model(setting, broken), depth, promise)
    finally:
        if collects:
            gc.enable()
    return found._replace(seconds=time.perf_counter() - began)


def _explored(model: Model, depth: int, promise: str) -> Found:
    front = [model.start()]
    parents: dict[World, tuple[World, str] | None] = {front[0]: None}
    level = 0
    while front and level < depth:
        level += 1
        following: list[World] = []
        for world in front:
            for who, does, then, breaks in model.steps(world):
                if breaks and promise in ("", breaks):
                    trace = (*_trace(parents, world), f"{who} {does}")
                    return Found(len(parents), level, False, promise=breaks, trace=trace)
                if then not in parents:
                    parents[then] = (world, f"{who} {does}")
                    following.append(then)
        front = following
    return Found(len(parents), level, not front)


def _trace(parents: dict[World, tuple[World, str] | None], world: World) -> list[str]:
    steps: list[str] = []
    while (reached := parents[world]) is not None:
        world, step = reached
        steps.append(step)
    return steps[::-1]


# Where much may happen there is more to look at: so many steps less deep.
LESS_DEEP = {
    "two ask": 6, "failover longer": 6, "failover key": 4, "failover reclaim": 6,
    "together": 6, "all": 9,
}  # fmt: skip


def search(setting: str, depth: int) -> Found:
    """What the gate as it should be comes to in one of SETTINGS."""
    return explore(SETTINGS[setting], depth=depth - LESS_DEEP.get(setting, 0))


def break_rule(name: str, depth: int) -> Found:
    """The shortest way to break a promise without one of RULES."""
    rule = RULES[name]
    return explore(SETTINGS[rule.setting], depth=depth, broken=name, promise=rule.promise)


def main(arguments: list[str] | None = None) -> int:
    """Print what was looked at and, for each rule, what goes wrong without it."""
    parser = argparse.ArgumentParser(prog="gate_model", description=main.__doc__)
    parser.add_argument("--depth", type=int, default=20, help="steps to look ahead (20)")
    depth = parser.parse_args(arguments).depth
    say, is_sound = sys.stdout.write, True
    say("The gate: every order of steps, until nothing else can happen or to a depth\n")
    for name in SETTINGS:
        found = search(name, depth)
        reach = f"all, {found.depth} steps" if found.is_all else f"to {found.depth} steps"
        say(f"  {name:<16} {found.states:>9} states  {reach:<15} {found.seconds:6.1f} s\n")
        is_sound &= _told_of(found, say)
    say("\nWithout one rule: the shortest way to a broken promise\n")
    for name, rule in RULES.items():
        found = break_rule(name, depth)
        say(f"\n{name}: {rule.says}. If not ({rule.broken}), in the setting {rule.setting}: ")
        say(f"{len(found.trace) or 'no'} steps, {found.states} states, {found.seconds:.2f} s\n")
        is_sound &= not _told_of(found, say)
    return 0 if is_sound else 1


def _told_of(found: Found, say: Callable[[str], object]) -> bool:
    """Whether every promise was kept; says how one was not."""
    for number, step in enumerate(found.trace, 1):
        say(f"  {number:>3} {step}\n")
    if found.promise:
        say(f"      broken: {found.promise} ({PROMISES[found.promise]})\n")
    return not found.promise


if __name__ == "__main__":
    sys.exit(main())
