"""Asking the destinations what became of what nobody knows.

A question is claimed like everything else: with a token, for a time, and under a fence that is above
every sender's. It is counted as it begins, so that asking ends also where those who ask die of it. Its
answer is written only if the intent is still as it was claimed: a late word of the sender wins.

**When `absent` is believed.** That an effect is not there now does not say that it will not come: the
first sender may be paused, and wake up. So `absent` leads to a new grant only if the destination
refuses the first sender from now on (it recorded the question's fence), or recognises the second send
as the same one (it honours the key). Else it counts as undecidable.

Source: design 8; evidence/ecosystem 3.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from leasekit import codec
from leasekit.coalesce import Reply, Variant
from leasekit.durability import Durability
from leasekit.errors import InvalidInput, LeasekitError
from leasekit.gate.intent import Intent, note_of
from leasekit.model import Page
from leasekit.scope import Scope, word_of
from leasekit.scripts import Argument, Script, script

__all__ = [
    "Callback",
    "Question",
    "ReconcileCounts",
    "Reconciler",
    "Verdict",
    "absent",
    "applied",
    "undecidable",
]

SETTLE_MS = 30_000
ASKS_MAX = 8
BACKOFF_MS = (5_000, 600_000)
ASK_LEASE_MS = 60_000
ASKS_LIMIT = 1_000_000
CONCURRENCY_MAX = 1_000

_ASK = script("gate/ask", item=("id", "token"))
_ANSWER = script("gate/answer", item=("id", "token", "revision", "verdict", "note"))


class Verdict(msgspec.Struct, frozen=True):
    """What a destination says; made by `applied`, `absent` and `undecidable`."""

    word: Literal["applied", "absent", "undecidable"]
    result: Any = None
    reason: str | None = None

    def __repr__(self) -> str:
        return f"<Verdict {self.word}>"


def applied(result: Any = None) -> Verdict:
    """The effect is there. result: a JSON value <= 52 KiB that the destination gave back."""
    return Verdict("applied", result)


def absent(*, fence_recorded: bool = False, key_honoured: bool = False) -> Verdict:
    """The effect is not there, and it is safe to make it again, for one of two reasons.

    fence_recorded: the destination wrote down `question.fence` with this question, and refuses every
    lower one from now on. key_honoured: it takes two sends under `question.key` for one. Without
    either, a paused first sender may still make the effect: it counts as undecidable.
    """
    if fence_recorded or key_honoured:
        why = "the destination recorded the fence" if fence_recorded else "it honours the key"
        return Verdict("absent", None, why)
    return Verdict(
        "undecidable",
        None,
        "absent, but the destination neither recorded the fence nor honours the key: the first "
        "sender may still wake up",
    )


def undecidable(reason: str = "the destination cannot tell") -> Verdict:
    """Nobody can say yet: it is asked again later, as long as there are questions left."""
    return Verdict("undecidable", None, reason)


class Question(msgspec.Struct, frozen=True):
    """What a callback gets: the intent, its key, and a fence above every sender's.

    asks: how many questions there were, this one included. The answer must come before ask_end_ms.
    """

    intent: Intent
    key: str
    fence: int
    asks: int
    ask_end_ms: int


class ReconcileCounts(msgspec.Struct, kw_only=True):
    """What one round of `reconcile` did; intents.

    asked: questions put. applied, absent, undecidable: answers recorded. dead_lettered: intents whose
    questions are used up. lost: answers that came too late, because the intent had changed. waiting:
    not due yet, or asked by somebody else. without_callback: nobody to ask. errors: questions and
    answers that the server did not take.
    """

    asked: int = 0
    applied: int = 0
    absent: int = 0
    undecidable: int = 0
    dead_lettered: int = 0
    lost: int = 0
    waiting: int = 0
    without_callback: int = 0
    errors: int = 0


Callback = Callable[[Question], Awaitable[Verdict]]


class NextPage(Protocol):
    def __call__(self, cursor: str | None, now_ms: int | None) -> Awaitable[Page[Intent]]: ...


class Reconciler:
    """One round of questions."""

    def __init__(
        self,
        scope: Scope,
        callbacks: Mapping[str, Callback],
        *,
        settle_ms: int,
        asks_max: int,
        backoff_ms: tuple[int, int],
        lease_ms: int,
        concurrency: int,
        durability: Durability | str | None,
        now_ms: int | None,
    ) -> None:
        if not callbacks:
            raise InvalidInput("callbacks is empty: name at least one tool", field="callbacks")
        codec.check_whole(settle_ms, "settle_ms", 0, codec.DURATION_MS_MAX)
        codec.check_whole(asks_max, "asks_max", 1, ASKS_LIMIT)
        for bound in backoff_ms:
            codec.check_whole(bound, "backoff_ms", 0, codec.DURATION_MS_MAX)
        codec.check_whole(lease_ms, "lease_ms", 1, codec.LEASE_MS_MAX)
        codec.check_whole(concurrency, "concurrency", 1, CONCURRENCY_MAX)
        self._scope = scope
        self._callbacks = callbacks
        self._settle_ms = settle_ms
        self._asks_max = asks_max
        self._backoff_ms = backoff_ms
        self._lease_ms = lease_ms
        self._turns = asyncio.Semaphore(concurrency)
        self._durability = durability
        self._now_ms = now_ms
        self._counts = ReconcileCounts()

    async def run(self, next_page: NextPage) -> ReconcileCounts:
        """Go through all that is unknown, once."""
        # At once, so that a class that cannot be had is an error of the round and not of each intent.
        self._coalescer = await self._scope.coalescer_for(self._durability)
        cursor: str | None = None
        seen: set[str] = set()
        while True:
            page = await next_page(cursor, self._now_ms)
            # An intent that was asked moves behind the others, and may come again on a later page.
            new = [intent for intent in page.items if intent.outbox_id not in seen]
            seen.update(intent.outbox_id for intent in new)
            async with asyncio.TaskGroup() as group:
                for intent in new:
                    group.create_task(self._settle(intent))
            if (cursor := page.next_cursor) is None:
                return self._counts

    def _callback_of(self, intent: Intent) -> Callback | None:
        """The callback of a tool: by its full name, by the name it was called by, by a prefix."""
        names = [name for name in (intent.operation, intent.tool) if name]
        for name in names:
            if name in self._callbacks:
                return self._callbacks[name]
        fitting = [
            pattern
            for pattern in self._callbacks
            if pattern.endswith("*") and any(name.startswith(pattern[:-1]) for name in names)
        ]
        return self._callbacks[max(fitting, key=len)] if fitting else None

    async def _settle(self, intent: Intent) -> None:
        callback = self._callback_of(intent)
        if callback is None:
            self._counts.without_callback += 1
            return
        async with self._turns:
            try:
                await self._ask(intent, callback)
            except LeasekitError:
                # What was asked is counted, and is asked again; what was answered is kept or lost.
                self._counts.errors += 1

    async def _ask(self, intent: Intent, callback: Callback) -> None:
        scope, counts = self._scope, self._counts
        token = codec.new_token()
        coalescer = self._coalescer
        answer = await coalescer.submit(
            _ASK,
            scope.tag,
            (scope.now_argument(self._now_ms),),
            self._bind,
            (intent.outbox_id, token),
            lambda item, context, reply: item,
            lease_ms=self._lease_ms,
        )
        word = word_of(answer)
        if word == "buried":
            counts.dead_lettered += 1
        elif word != "asked":
            counts.waiting += 1
        if word != "asked":
            return
        counts.asked += 1
        _, fence, ask_end, revision, asks = answer
        key = intent.idempotency_key or ""
        question = Question(intent, key, int(fence), int(asks), int(ask_end))
        verdict = await self._put(question, callback)
        recorded = await coalescer.submit(
            _ANSWER,
            scope.tag,
            (scope.now_argument(self._now_ms),),
            self._bind,
            (intent.outbox_id, token, revision, verdict.word, _note_of(verdict)),
            _read_recorded,
        )
        if recorded is None:
            counts.lost += 1
        elif recorded == "dead_lettered":
            counts.dead_lettered += 1
        else:
            setattr(counts, verdict.word, getattr(counts, verdict.word) + 1)

    async def _put(self, question: Question, callback: Callback) -> Verdict:
        """The callback's verdict; undecidable where it fails, takes too long or gives no verdict."""
        in_time = asyncio.timeout(self._lease_ms / 1_000)
        try:
            async with in_time:
                verdict = await callback(question)
        except Exception as error:  # A destination that fails is one that cannot tell.
            if in_time.expired():
                return undecidable(f"no answer within {self._lease_ms} ms")
            return undecidable(f"the question failed: {type(error).__name__}: {error}")
        if not isinstance(verdict, Verdict):
            return undecidable(f"the callback gave {type(verdict).__name__}, which is no verdict")
        return verdict

    def _bind(self, one: Script, variant: Variant, repeat: bool) -> Sequence[Argument]:
        """Keys and arguments of a call; a variant is now_ms."""
        return self._scope.bind(
            one,
            {
                "now_ms": variant[0],
                "lease_ms": self._lease_ms,
                "settle_ms": self._settle_ms,
                "asks_max": self._asks_max,
                "first_ms": self._backoff_ms[0],
                "most_ms": self._backoff_ms[1],
            },
        )


def _note_of(verdict: Verdict) -> bytes:
    """A verdict counts also where what the destination gave back cannot be kept."""
    try:
        return note_of(result=verdict.result, reason=verdict.reason)
    except InvalidInput as refused:
        return note_of(reason=f"applied; what came back was not kept: {refused}")


def _read_recorded(item: Any, context: None, reply: Reply) -> str | None:
    """The intent's status after an answer; None where the answer was lost."""
    if word_of(item) != "recorded":
        return None
    status: bytes = item[1]
    return status.decode()
