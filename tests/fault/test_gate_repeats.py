"""Every command of the gate, its connection broken in every way: one grant, one word, one question.

The framework is fault.repeats; `python -m fault.test_repeats` runs these cases as well. Others act on the
same intent between the cut and the repeat, one to three things at random: another sender asks for it,
an earlier one speaks late, an event comes without a receipt, time passes, an operator decides, others ask
the destination, what is done is forgotten. What a request finds then says how it must be answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from fault.proxy import Fault, Plan, words_of
from fault.repeats import (
    LEASE_MS,
    SMOKE_SEEDS,
    UNAVAILABLE,
    UNKNOWN,
    Case,
    World,
    is_call,
    proxied,
    run_seeds,
)
from lua.commands import Tenant as Commands
from lua.commands import invariants
from servers import ServerProcess, dump

import leasekit
from leasekit.coalesce import REPEATS_MAX
from leasekit.codec import new_token
from leasekit.errors import Conflict, InProgress, LeasekitError, OutcomeUnknown, Unavailable
from leasekit.gate import LedgerEvent, PreSendEvent, Question, Source, Verdict
from leasekit.gate.identity import outbox_id
from leasekit.gate.intent import note_of
from leasekit.gate.reconcile import absent, applied, undecidable

ASKS_MAX = 3
OPENINGS_KEPT = 16

EVENT = PreSendEvent(
    dispatch_id="d", tool="t", source=Source(kind="test"), external_side_effect=True
)

RANK = {"claimed": 0, "unknown": 1, "dead_lettered": 1, "cancelled": 2, "failed": 3, "sent": 4}
STATUS_OF = {
    "succeeded": "sent",
    "failed": "failed",
    "blocked": "cancelled",
    "left": "unknown",
    "sent": "sent",
    "not_sent": "cancelled",
}
VERDICTS = {
    "applied": applied("seen"),
    "absent": absent(key_honoured=True),
    "undecidable": undecidable(),
}

Row = dict[str, str]


class _Gated(Case):
    """A case about one intent. `found` is its row as the next request finds it; none: it is not there."""

    variant = ""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.commands = Commands(world.server, world.mine.context.org_id)
        self.event = PreSendEvent(
            dispatch_id=self.lane,
            tool=self.lane,
            source=Source(kind="test", run_id=world.chance.choice([None, "run"])),
            external_side_effect=True,
        )
        self.id = self.marker = outbox_id(self.lane)
        self.tokens: list[str] = []  # of senders who may still say something
        self.found: Row = {}

    @property
    def name(self) -> str:
        return f"{self.command} {self.variant}".strip()

    def look(self) -> None:
        self.found = self.row()

    def row(self) -> Row:
        line = self.commands.intent(self.id)
        words = (
            *("status", "cause", "token", "lease_end", "updated_at", "created_at", "revision"),
            *("attempts", "fence", "claimed_at", "on_expiry", "asks", "ask_token", "ask_fence"),
            *("ask_end", "ask_at", "run", "key_digest", "arguments_digest", "owner"),
        )
        return dict(zip(words, line.split(" ", 19), strict=True)) if line else {}

    def facts(self) -> list[str]:
        """What was said, without the times: kind, fence, applied, note."""
        return [fact.split(" ", 1)[1] for fact in self.commands.facts(self.id)]

    def choice_of_expiry(self) -> Any:
        return self.world.chance.choice(["reclaim", "park"])

    def completion(self, status: str, note: str) -> LedgerEvent:
        return LedgerEvent(
            tool=self.event.tool,
            source=self.event.source,
            policy_outcome="allowed",
            status=status,
            dispatch_id=self.lane,
            error=note,
        )

    async def granted(self, on_expiry: Any = None) -> Any:
        """An earlier sender has it; it may speak late."""
        receipt = await self.others.gate.prepare(
            self.event, on_expiry=on_expiry or self.choice_of_expiry()
        )
        assert receipt is not None
        self.tokens.append(receipt.token)
        return receipt

    async def vanished(self) -> None:
        """Nobody knows what became of an earlier sender; that may be written down or not."""
        await self.granted("park")
        await self.passes()
        if self.world.chance.random() < 0.5:
            await self.others.gate.unknown(limit=1)

    # What others do.

    async def rival(self) -> bool:
        before = self.row()
        everything = [
            *(self.sends, self.speaks, self.tells, self.passes),
            *(self.decides, self.asks, self.forgets),
        ]
        for act in self.world.chance.choices(everything, k=self.world.chance.randint(1, 3)):
            await act()
        return self.row() != before

    async def sends(self) -> None:
        """Another sender asks for it."""
        try:
            await self.others.gate.prepare(self.event, on_expiry=self.choice_of_expiry())
        except LeasekitError:
            assert self.row(), "nobody is refused what nobody has"

    async def speaks(self) -> None:
        """A sender says something late, or twice; or gives back what it never used."""
        if self.tokens:
            token = self.world.chance.choice(self.tokens)
            result = self.world.chance.choice(["succeeded", "failed", "blocked", "left"])
            await self.others.gate._complete(self.id, token, result, note_of(error="late"), None)

    async def tells(self) -> None:
        """An event without a receipt."""
        status = self.world.chance.choice(["succeeded", "failed", "blocked"])
        await self.others.gate.complete(self.completion(status, "told"))

    async def passes(self) -> None:
        """The time of the last grant is over."""
        row, raw = self.row(), self.world.server.raw
        if row.get("status") == "claimed":
            keys = self.commands.keys
            row["lease_end"] = row["claimed_at"]
            raw.hset(keys.gate_state, self.id, " ".join(row.values()))
            if row["on_expiry"] == "park":
                raw.zadd(keys.gate_expiring, {self.id: row["lease_end"]})

    async def decides(self) -> None:
        """An operator, of what nobody else can tell."""
        verdict = self.world.chance.choice(["sent", "failed", "not_sent"])
        await self.others.gate.resolve(self.id, verdict, actor="other", reason="seen")

    async def asks(self) -> None:
        """Somebody asks the destination, and may die of it."""
        chance = self.world.chance
        await asyncio.sleep(0.003)  # so that a question of a millisecond is over
        if chance.random() < 0.3:
            item = (self.id, new_token())
            pace = {"asks_max": ASKS_MAX, "first_ms": 0, "most_ms": 0}
            self.commands.run("gate/ask", item, now_ms="", lease_ms=LEASE_MS, settle_ms=0, **pace)
            return
        verdict = VERDICTS[chance.choice(list(VERDICTS))]

        async def answer(question: Question) -> Verdict:
            return verdict

        pause_ms = chance.choice([0, LEASE_MS])
        await self.others.gate.reconcile(
            {self.lane: answer}, settle_ms=0, asks_max=ASKS_MAX, backoff_ms=(pause_ms, pause_ms)
        )

    async def forgets(self) -> None:
        """What was sent or cancelled has been kept for long enough."""
        if self.row().get("status") in ("sent", "cancelled"):
            await forget(self.commands, self.id)


async def forget(commands: Commands, id: str) -> None:
    """Forget what is over, up to this intent."""
    await asyncio.sleep(0.003)  # so that it has been so for more than keep_ms
    while commands.intent(id):
        commands.run("gate/complete", ("none", "", "succeeded", "{}"), now_ms="", keep_ms=1)


def is_over(row: Row) -> bool:
    return int(row["lease_end"]) <= time.time() * 1_000


def status_of(row: Row) -> str:
    """What a row reads as."""
    parked = row["status"] == "claimed" and row["on_expiry"] == "park" and is_over(row)
    return "unknown" if parked else row["status"]


class PrepareNew(_Gated):
    """A grant counts until somebody else has one, or nobody remembers it."""

    command, word, variant = "gate/prepare", "granted", "new"

    async def prepare(self) -> None:
        await self.come_to_it()
        self.marker = new_token()
        self.tokens.append(self.marker)
        self.on_expiry = self.choice_of_expiry()
        self.attempts_before = int(self.row().get("attempts", 0))

    async def come_to_it(self) -> None: ...

    async def call(self, repeat: bool) -> str:
        try:
            receipt = await self.mine.gate.prepare(
                self.event, on_expiry=self.on_expiry, token=self.marker, repeat=repeat
            )
        except (Conflict, OutcomeUnknown, Unavailable) as refused:
            if refused.id is None:
                raise
            if isinstance(refused, Unavailable):
                return "data_lost"
            if isinstance(refused, OutcomeUnknown):
                return "taken unknown"
            return f"taken {refused.status}" if refused.status else "spent"
        assert receipt is not None
        row = self.row()
        stored = [row[name] for name in ("token", "fence", "attempts", "claimed_at", "lease_end")]
        assert stored == [
            *(self.marker, str(receipt.fence), str(receipt.attempts)),
            *(str(receipt.granted_at_ms), str(receipt.lease_expires_at_ms)),
        ]
        if self.found.get("token") == self.marker:
            assert row == self.found, "a repeat has changed what it asks for"
        return "granted"

    async def rival(self) -> bool:
        won = await super().rival()
        row = self.row()
        if row.get("token") != self.marker:
            self.attempts_before = int(row.get("attempts", 0))
        return won

    def applied(self) -> int:
        row = self.row()
        return int(row["attempts"]) - self.attempts_before if self.is_own(row) else 0

    def is_own(self, row: Row) -> bool:
        return row.get("token") == self.marker

    def expected(self, applied: bool, rival_won: bool) -> str:
        row = self.found
        if not row:
            return "granted"
        status = status_of(row)
        if self.is_own(row) and status == "cancelled":
            return "spent"
        if self.is_own(row) and row["status"] == "claimed":
            return "LeaseLost" if is_over(row) else "granted"
        is_free = status == "cancelled" or (status == "claimed" and is_over(row))
        return "granted" if is_free else f"taken {status}"

    def is_new_in_copy(self, rival_won: bool) -> bool:
        # Its token has gone with its grant: forgotten, or another's since, which is free again.
        return not self.is_own(self.found) and self.expected(False, rival_won) == "granted"


class PrepareCancelled(PrepareNew):
    variant = "cancelled"

    async def come_to_it(self) -> None:
        receipt = await self.granted()
        await self.others.gate.complete(self.completion("blocked", "not sent"), receipt=receipt)


class PrepareExpired(PrepareNew):
    variant = "expired"

    async def come_to_it(self) -> None:
        await self.granted("reclaim")
        await self.passes()


class PrepareLost(PrepareNew):
    """The process knows data that is lost, until an operator opens the gate for it."""

    variant = "data lost"

    async def come_to_it(self) -> None:
        self.lost = new_token()
        if self.world.chance.random() < 0.3:
            await self.opens()

    async def opens(self) -> None:
        await self.others.gate.open(self.lost, actor="other", reason="restored")

    async def call(self, repeat: bool) -> str:
        known = self.mine.gate._scope.shared.datasets
        known[self.mine.tag] = self.lost
        try:
            return await super().call(repeat)
        finally:
            del known[self.mine.tag]

    async def rival(self) -> bool:
        if self.world.chance.random() < 0.7:
            await self.opens()
        return await super().rival()

    def look(self) -> None:
        super().look()
        self.is_open = self.lost in openings(self)

    def expected(self, applied: bool, rival_won: bool) -> str:
        return super().expected(applied, rival_won) if self.is_open else "data_lost"


def openings(case: _Gated) -> list[str]:
    """The names of lost data for which the gate was opened."""
    stored = case.world.server.raw.get(case.commands.keys.gate_dataset) or b""
    return [line.split(" ")[0] for line in stored.decode().split("\n")[1:]]


class Succeeded(_Gated):
    """What a sender says with its receipt; applied is what stands among the facts as applied."""

    command, word, variant = "gate/complete", "recorded", "succeeded"

    async def prepare(self) -> None:
        self.receipt = await self.granted()
        self.marker = self.receipt.token
        self.fence = str(self.receipt.fence)
        self.facts_found: list[str] = []
        if self.world.chance.random() < 0.3:
            await self.passes()

    @property
    def note(self) -> str:
        return note_of(error=self.lane).decode()

    async def call(self, repeat: bool) -> str:
        return await self.mine.gate.complete(
            self.completion(self.variant, self.lane), receipt=self.receipt, repeat=repeat
        )

    def look(self) -> None:
        super().look()
        self.facts_found = self.facts()

    def applied(self) -> int:
        facts = self.facts()
        noted = [fact.split(" ")[:2] for fact in facts if fact.endswith(f" {self.note}")]
        assert noted.count([self.variant, self.fence]) <= 1, f"noted twice: {noted}"
        return facts.count(f"{self.variant} {self.fence} 1 {self.note}")

    def is_borne_out(self) -> bool:
        # Somebody else may have said the same.
        row = self.row()
        return self.applied() == 1 or status_of(row) == STATUS_OF[self.variant]

    def applies(self) -> bool:
        """Whether the word would change what was found."""
        row = self.found
        if row.get("token") != self.marker or row["cause"] == self.variant == "left":
            return False
        is_freed = row["status"] == "cancelled" and row["cause"] != "blocked"
        rank = RANK[STATUS_OF[self.variant]]
        return rank > RANK[row["status"]] and not (is_freed and self.variant == "failed")

    def expected(self, applied: bool, rival_won: bool) -> str:
        if not self.found:
            return "missing"
        if self.found["token"] != self.marker:
            return "lost"
        is_so = STATUS_OF[self.variant] == status_of(self.found)
        is_left = self.found["cause"] == self.variant == "left"
        applies = self.applies() and not self.was_told()
        return "recorded" if is_so or is_left or applies else "kept"

    def was_told(self) -> bool:
        return f"{self.variant} {self.fence} 1 {self.note}" in self.facts_found

    def undisturbed(self, state: dict[str, Any]) -> dict[str, Any]:
        """What did not count is kept beside, once."""
        facts = dict(state.get("gate:facts", {}))
        told = facts.pop(self.id, "").split("\n")
        beside = [fact.split(" ", 1)[1] for fact in told if fact.endswith(f" 0 {self.note}")]
        assert len(beside) == len(set(beside)), f"noted twice: {beside}"
        kept = [fact for fact in told if fact and not fact.endswith(f" 0 {self.note}")]
        return state | {"gate:facts": facts | ({self.id: "\n".join(kept)} if kept else {})}

    def is_new_in_copy(self, rival_won: bool) -> bool:
        # An event without a receipt has made less of it since.
        return self.applies()


class Failed(Succeeded):
    variant = "failed"


class Blocked(Succeeded):
    variant = "blocked"


class Left(Succeeded):
    variant = "left"

    async def call(self, repeat: bool) -> str:
        return await self.mine.gate._complete(
            self.id, self.marker, "left", self.note.encode(), None, repeat
        )

    def is_borne_out(self) -> bool:
        return self.row()["cause"] == "left" or super().is_borne_out()


class EventSucceeded(Succeeded):
    """The same without a receipt: nobody knows whose word it is."""

    async def prepare(self) -> None:
        await self.granted()
        if self.world.chance.random() < 0.3:
            await self.passes()
            await self.sends()
        self.marker, self.fence = self.id, "0"

    @property
    def name(self) -> str:
        return f"{self.command} {self.variant} event"

    async def call(self, repeat: bool) -> str:
        return await self.mine.gate.complete(
            self.completion(self.variant, self.lane), repeat=repeat
        )

    def applies(self) -> bool:
        row = self.found
        if self.variant != "blocked":
            return bool(row)
        wanted = {"status": "claimed", "cause": "granted", "attempts": "1", "on_expiry": "reclaim"}
        return wanted.items() <= row.items()

    def expected(self, applied: bool, rival_won: bool) -> str:
        return "recorded" if self.was_told() or self.applies() else "skipped"

    def is_new_in_copy(self, rival_won: bool) -> bool:
        # It is not marked as a repeat, and cannot be told from an event that says the same.
        return self.applies()


class EventFailed(EventSucceeded):
    variant = "failed"


class EventBlocked(EventSucceeded):
    variant = "blocked"


class Extend(_Gated):
    command, word = "gate/extend", "extended"

    async def prepare(self) -> None:
        self.receipt = await self.granted()
        self.marker = self.receipt.token
        self.was_extended = False
        if self.world.chance.random() < 0.2:
            await self.passes()

    async def call(self, repeat: bool) -> str:
        extended = await self.mine.gate.extend(self.receipt, lease_ms=900_000, repeat=repeat)
        if extended is None:
            return "lost"
        assert self.row()["lease_end"] == str(extended.lease_expires_at_ms)
        return "extended"

    def applied(self) -> int:
        row = self.row()
        if self.is_own(row) and int(row["lease_end"]) > self.receipt.lease_expires_at_ms:
            self.was_extended = True
        return int(self.was_extended)

    def is_own(self, row: Row) -> bool:
        return row.get("token") == self.marker and row["status"] == "claimed"

    def expected(self, applied: bool, rival_won: bool) -> str:
        return "extended" if self.is_own(self.found) and not is_over(self.found) else "lost"

    def undisturbed(self, state: dict[str, Any]) -> dict[str, Any]:
        """The end of its own lease may move on."""
        row = self.row()
        if not self.is_own(row) or is_over(row):
            return state
        assert int(row["lease_end"]) >= int(self.found["lease_end"])
        line = " ".join((row | {"lease_end": "?"}).values())
        expiring = dict(state.get("gate:expiring", {}))
        if self.id in expiring:
            assert expiring[self.id] == int(row["lease_end"])
            expiring[self.id] = 0
        return state | {
            "gate:state": state["gate:state"] | {self.id: line},
            "gate:expiring": expiring,
        }


class _Asking(_Gated):
    """A round of reconcile. It is quick where a question and the pause after it are over at once."""

    asks_max = ASKS_MAX

    async def prepare(self) -> None:
        await self.vanished()
        self.is_quick = self.world.chance.random() < 0.5
        self.lease_ms, self.pause_ms = (1, 0) if self.is_quick else (LEASE_MS, LEASE_MS)
        self.verdict = self.world.chance.choice(list(VERDICTS))
        self.put: list[tuple[Question, Row]] = []

    async def answer(self, question: Question) -> Verdict:
        self.put.append((question, self.row()))
        return VERDICTS[self.verdict]

    async def call(self, repeat: bool) -> str:
        await asyncio.sleep(0.003 if self.is_quick else 0)
        put_before = len(self.put)
        counts = await self.mine.gate.reconcile(
            {self.lane: self.answer},
            settle_ms=0,
            asks_max=self.asks_max,
            backoff_ms=(self.pause_ms, self.pause_ms),
            lease_ms=self.lease_ms,
        )
        assert len(self.put) - put_before == counts.asked <= 1
        for question, row in self.put:
            assert row["cause"] == "asked"
            assert int(row["ask_fence"]) == question.fence > int(row["fence"])
            assert row["asks"] == str(question.asks)
        if counts.errors:
            return UNKNOWN if self.requests else UNAVAILABLE
        words = ("lost", "dead_lettered", *VERDICTS, "waiting")
        return next((word for word in words if getattr(counts, word)), "none")

    def sent(self, position: int) -> str:
        """A field of the first request that a fault befell, counted from the intent's id; or none."""
        if not self.requests:
            return ""
        words = words_of(self.requests[0])
        return words[words.index(self.id.encode()) + position].decode()

    def reply_to(self, token: str) -> str:
        """What a question finds: again (it was put), asked, buried, wait, gone."""
        row = self.found
        is_own = bool(row) and row["ask_token"] == token
        if not row or status_of(row) != "unknown":
            return "buried" if is_own and row["cause"] == "undecidable" else "gone"
        if is_own and row["cause"] == "asked":
            return "again"
        if max(int(row["ask_end"]), int(row["ask_at"])) > time.time() * 1_000:
            return "wait"
        return "buried" if int(row["asks"]) >= self.asks_max else "asked"

    def outcome_of(self, token: str) -> str:
        """What a round counts that asks with this token."""
        reply = self.reply_to(token)
        if reply in ("again", "asked"):
            asks = int(self.found["asks"]) + (reply == "asked")
            is_last = self.verdict == "undecidable" and asks >= self.asks_max
            return "dead_lettered" if is_last else self.verdict
        return {"buried": "dead_lettered", "wait": "waiting", "gone": "waiting"}[reply]

    def expected_by_name(self, applied: bool, rival_won: bool) -> str:
        """A new round, which only asks about what is unknown."""
        is_listed = bool(self.found) and status_of(self.found) == "unknown"
        return self.outcome_of("") if is_listed else "none"


class Ask(_Asking):
    """The question itself; the answer comes through."""

    command = "gate/ask"

    async def prepare(self) -> None:
        await super().prepare()
        self.word = self.verdict
        self.asks_before = 0

    async def rival(self) -> bool:
        won = await super().rival()
        row = self.row()
        if row.get("ask_token") != self.sent(1):
            self.asks_before = int(row.get("asks", 0))
        return won

    def applied(self) -> int:
        row = self.row()
        is_own = bool(row) and row["ask_token"] == self.sent(1)
        return int(row["asks"]) - self.asks_before if is_own else 0

    def expected(self, applied: bool, rival_won: bool) -> str:
        return self.outcome_of(self.sent(1))

    def is_new_in_copy(self, rival_won: bool) -> bool:
        # Due again, after its own answer or another's question.
        token = self.sent(1)
        is_buried = self.found.get("status") == "dead_lettered"
        return self.reply_to(token) in ("asked", "buried") and not is_buried


class AskLast(Ask):
    """One question too many."""

    variant, asks_max = "last", 1

    async def prepare(self) -> None:
        await super().prepare()
        self.word = "dead_lettered"
        item, pace = (self.id, new_token()), {"asks_max": 1, "first_ms": 0, "most_ms": 0}
        self.commands.run("gate/ask", item, now_ms="", lease_ms=1, settle_ms=0, **pace)
        await asyncio.sleep(0.003)
        self.asks_before = 1

    def applied(self) -> int:
        # What buries is not counted as a question.
        row = self.row()
        is_own = bool(row) and row["ask_token"] == self.sent(1)
        return max(int(row["asks"]) - self.asks_before, 1) if is_own else 0


class AnswerApplied(_Asking):
    """What the destination said; counted by the fence of its question."""

    command, variant = "gate/answer", "applied"

    async def prepare(self) -> None:
        await super().prepare()
        self.word = self.verdict = self.variant

    def applied(self) -> int:
        if not self.requests:
            return 0
        fence = self.put[0][0].fence
        return sum(fact.startswith(f"{self.variant} {fence} 1 ") for fact in self.facts())

    def look(self) -> None:
        # What is there before the question is not what the answer finds.
        self.has_asked = bool(self.requests)
        super().look()

    def expected(self, applied: bool, rival_won: bool) -> str:
        if not self.has_asked:
            return self.word
        row, revision = self.found, int(self.sent(2))
        is_own = bool(row) and row["ask_token"] == self.sent(1)
        wanted = {("asked", revision), (self.variant, revision + 1)}
        if is_own and (row["cause"], int(row["revision"])) in wanted:
            return self.word
        return "lost"


class AnswerAbsent(AnswerApplied):
    variant = "absent"


class AnswerUndecidable(AnswerApplied):
    variant = "undecidable"


class ResolveSent(_Gated):
    command, word, variant = "gate/resolve", "resolved", "sent"

    async def prepare(self) -> None:
        await self.vanished()
        if self.world.chance.random() < 0.3:

            async def answer(question: Question) -> Verdict:
                return undecidable()

            await self.others.gate.reconcile({self.lane: answer}, settle_ms=0, asks_max=1)
        row = self.row()
        assert status_of(row) in ("unknown", "dead_lettered")
        self.revision = int(row["revision"])
        self.is_seen = self.world.chance.random() < 0.5

    async def call(self, repeat: bool) -> str:
        return await self.mine.gate.resolve(
            self.id,
            self.variant,
            actor="me",
            reason="seen",
            revision=self.revision if self.is_seen or repeat else None,
            repeat=repeat,
        )

    def applied(self) -> int:
        facts = self.facts()
        kind = f"resolved_{self.variant} "
        return sum(fact.startswith(kind) and '"actor":"me"' in fact for fact in facts)

    def is_borne_out(self) -> bool:
        # Another operator may have decided the same.
        row = self.row()
        return self.applied() == 1 or row["cause"] == "resolved"

    def is_done(self) -> bool:
        row, wanted = self.found, ("resolved", STATUS_OF[self.variant], str(self.revision + 1))
        return bool(row) and (row["cause"], row["status"], row["revision"]) == wanted

    def expected(self, applied: bool, rival_won: bool) -> str:
        if not self.found:
            return "missing"
        if self.is_done():
            return "resolved"
        if status_of(self.found) not in ("unknown", "dead_lettered"):
            return "not_unknown"
        return "resolved" if int(self.found["revision"]) == self.revision else "changed"

    def is_new_in_copy(self, rival_won: bool) -> bool:
        # Forgotten, and begun anew: revisions are counted from 1 again.
        return not self.is_done() and self.expected(False, rival_won) == "resolved"


class ResolveFailed(ResolveSent):
    variant = "failed"


class ResolveNotSent(ResolveSent):
    variant = "not_sent"


class Open(_Gated):
    """Others open the gate for the same loss, or for so many that it is forgotten."""

    command, word = "gate/open", "opened"

    async def prepare(self) -> None:
        self.marker = new_token()

    async def call(self, repeat: bool) -> str:
        return await self.mine.gate.open(self.marker, actor="me", reason="restored")

    async def rival(self) -> bool:
        lost = [new_token() for _ in range(OPENINGS_KEPT)]
        for one in self.world.chance.choice([[self.marker], lost]):
            await self.others.gate.open(one, actor="other", reason="restored")
        return True

    def look(self) -> None:
        self.is_open = self.marker in openings(self)

    def applied(self) -> int:
        return openings(self).count(self.marker)

    def expected(self, applied: bool, rival_won: bool) -> str:
        return "opened"

    def is_new_in_copy(self, rival_won: bool) -> bool:
        return not self.is_open


CASES: list[type[Case]] = [
    *(PrepareNew, PrepareCancelled, PrepareExpired, PrepareLost),
    *(Succeeded, Failed, Blocked, Left, EventSucceeded, EventFailed, EventBlocked),
    *(Extend, Ask, AskLast, AnswerApplied, AnswerAbsent, AnswerUndecidable),
    *(ResolveSent, ResolveFailed, ResolveNotSent, Open),
]


@pytest.mark.timeout(300)  # a busy machine is five times slower
@pytest.mark.parametrize("kind", ["valkey-9", "redis-6.2"])
async def test_every_command_of_the_gate_survives_every_fault(
    kind: str, running: Callable[[str], ServerProcess]
) -> None:
    """Applied at most once, told truly, and nothing is left amiss."""
    table = await run_seeds(running(kind), CASES, SMOKE_SEEDS)
    assert table.total("runs") == SMOKE_SEEDS * len(CASES)


@pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER, Fault.CUT_IN_REPLY])
async def test_a_dispatch_that_may_have_been_granted_is_withdrawn(
    fault: Fault, running: Callable[[str], ServerProcess], tenant_name: str
) -> None:
    """Where nobody can know whether there is a grant, it blocks nobody, though it parks."""
    server = running("valkey-9")
    async with proxied(server) as proxy, leasekit.connect(proxy.url) as kit:
        tenant = kit.tenant(tenant_name, "w")
        proxy.arm(Plan(is_call("gate/prepare"), fault, times=REPEATS_MAX + 1))
        with pytest.raises(OutcomeUnknown, match="may or may not have been applied"):
            async with tenant.gate.dispatch(EVENT):
                pytest.fail("it was granted without an answer")
        receipt = await tenant.gate.prepare(EVENT)
        state = dump(server.raw, "lk", tenant.tag)

    assert receipt is not None
    assert receipt.attempts == (1 if fault is Fault.CUT_BEFORE else 2)
    invariants(state)


@pytest.mark.parametrize("since", ["forgotten", "another's"])
async def test_a_copied_prepare_is_a_grant_to_nobody_once_its_token_is_gone(
    since: str, running: Callable[[str], ServerProcess], tenant_name: str
) -> None:
    """Nothing tells the copy from a new sender. It keeps others out until its lease ends, or for as long
    as nobody decides where it parks: the effect is never made twice by it."""
    server = running("valkey-9")
    plan = Plan(is_call("gate/prepare"), Fault.COPY)
    blocked = LedgerEvent(
        tool=EVENT.tool,
        source=EVENT.source,
        policy_outcome="allowed",
        status="blocked",
        dispatch_id=EVENT.dispatch_id,
    )
    async with proxied(server) as proxy, leasekit.connect(proxy.url) as kit:
        gate = kit.tenant(tenant_name, "w").gate
        proxy.arm(plan)
        receipt = await gate.prepare(EVENT, on_expiry="park")
        assert receipt is not None
        await gate.complete(blocked, receipt=receipt)
        await proxy.deliver_copy(plan.requests[0])
        given_back = await gate.get(receipt.outbox_id)
        if since == "forgotten":
            await forget(Commands(server, tenant_name), receipt.outbox_id)
        else:
            await gate.complete(blocked, receipt=await gate.prepare(EVENT))
        await proxy.deliver_copy(plan.requests[0])
        intent = await gate.get(receipt.outbox_id)
        with pytest.raises(InProgress):
            await gate.prepare(EVENT)

    assert given_back is not None
    assert (given_back.status, given_back.attempts) == ("cancelled", 1)
    assert intent is not None
    assert (intent.status, intent.on_expiry) == ("claimed", "park")
    assert intent.attempts == (1 if since == "forgotten" else 3)
    assert intent.fence is not None
    assert intent.fence > receipt.fence
