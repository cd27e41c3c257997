"""What nobody knows: listing it, asking its destinations, deciding about it (design 8)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest
from fakeredis import FakeServer
from gate_events import FIVE_MINUTES, ID, KEY, TOOL, call, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import leasekit
from leasekit import (
    Conflict,
    InProgress,
    InvalidInput,
    Leasekit,
    LeasekitError,
    OutcomeUnknown,
    Tenant,
    new_token,
)
from leasekit.connect import _memory_servers
from leasekit.gate import (
    Gate,
    Intent,
    Question,
    Receipt,
    ReconcileCounts,
    Verdict,
    absent,
    applied,
    undecidable,
)
from leasekit.gate.intent import note_of

Connect = Callable[..., Awaitable[Leasekit]]
State = Callable[[], dict[str, Any]]

NOW = 1_000
SETTLE_MS = 30_000


@pytest.fixture
def gate(tenant: Tenant) -> Gate:
    return tenant.gate


async def park(gate: Gate, key: str = KEY, *, now_ms: int = NOW, **changes: Any) -> Receipt:
    """A grant whose lease ends in the next millisecond, and whose sender is not heard of."""
    receipt = await gate.prepare(call(key, **changes), on_expiry="park", lease_ms=1, now_ms=now_ms)
    assert receipt is not None
    return receipt


async def look(gate: Gate, now_ms: int, id: str = ID) -> Intent:
    intent = await gate.get(id, now_ms=now_ms)
    assert intent is not None
    return intent


class Destination:
    """A callback that answers the same to every question, and remembers them."""

    def __init__(self, verdict: Any = None) -> None:
        self.verdict = undecidable() if verdict is None else verdict
        self.questions: list[Question] = []

    async def __call__(self, question: Question) -> Any:
        self.questions.append(question)
        if isinstance(self.verdict, BaseException):
            raise self.verdict
        return self.verdict


async def reconcile(
    gate: Gate, verdict: Any = None, *, now_ms: int, **options: Any
) -> ReconcileCounts:
    """A round in which every destination gives that verdict, at once after the lease's end."""
    asked = verdict if callable(verdict) else Destination(verdict)
    return await gate.reconcile({"*": asked}, **({"settle_ms": 0} | options), now_ms=now_ms)


def counts(**expected: int) -> ReconcileCounts:
    return ReconcileCounts(**expected)


# --- the list of the unknown ----------------------------------------------------------------------


async def test_what_parks_is_unknown_from_its_leases_end_on(gate: Gate, state: State) -> None:
    """At once, for everybody who looks; the first listing writes it down."""
    await park(gate)
    before = state()
    assert (await look(gate, NOW)).status == "claimed"
    assert (await look(gate, NOW + 1)).status == "unknown"
    assert [one.status for one in (await gate.list(status="unknown", now_ms=NOW + 1)).items] == [
        "unknown"
    ]
    assert state() == before
    assert (await gate.unknown(now_ms=NOW)).items == []
    page = await gate.unknown(now_ms=NOW + 5)
    assert [(one.outbox_id, one.cause) for one in page.items] == [(ID, "parked")]
    assert (page.items[0].unknown_since_ms, page.items[0].ask_at_ms) == (NOW + 1, NOW + 1)
    written = state()
    assert list(written["gate:unknown"]) == [ID]
    assert "gate:expiring" not in written
    assert (await gate.unknown(now_ms=NOW + 6)).items[0].revision == page.items[0].revision
    assert state() == written


async def test_only_what_parks_becomes_unknown(gate: Gate) -> None:
    """What reclaims, what runs, and what is finished does not."""
    await gate.prepare(call("reclaims"), lease_ms=1, now_ms=NOW)
    await gate.prepare(call("runs"), on_expiry="park", now_ms=NOW)
    receipt = await park(gate, "finished")
    await gate.complete(outcome(dispatch_id="finished"), receipt=receipt, now_ms=NOW)
    await park(gate)
    assert [one.outbox_id for one in (await gate.unknown(now_ms=NOW + 9)).items] == [ID]


async def test_the_unknown_comes_in_pages(gate: Gate, state: State) -> None:
    """In the order in which it may be asked, however much became unknown at once."""
    await asyncio.gather(
        *(park(gate, f"key-{number}", now_ms=NOW + number) for number in range(300))
    )
    now_ms = NOW + 1_000
    found: list[Intent] = []
    cursor = None
    while True:
        page = await gate.unknown(limit=70, cursor=cursor, now_ms=now_ms)
        found += page.items
        assert len(page.items) <= 70
        if cursor is None:
            assert len(state()["gate:unknown"]) == 300
        if (cursor := page.next_cursor) is None:
            break
    assert [one.idempotency_key for one in found] == [f"key-{number}" for number in range(300)]
    with pytest.raises(InvalidInput, match="cursor"):
        await gate.unknown(cursor="x", now_ms=now_ms)


# --- late words -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_written", [True, False])
@pytest.mark.parametrize(
    ("said", "status"), [("succeeded", "sent"), ("failed", "failed"), ("blocked", "cancelled")]
)
async def test_a_late_true_word_ends_it(
    gate: Gate, state: State, said: str, status: str, is_written: bool
) -> None:
    """By its own token, written down as unknown or not."""
    receipt = await park(gate)
    if is_written:
        await gate.unknown(now_ms=NOW + 1)
    assert await gate.complete(outcome(said), receipt=receipt, now_ms=NOW + 9) == "recorded"
    assert (await look(gate, NOW + 9)).status == status
    assert (await gate.unknown(now_ms=NOW + 9)).items == []
    assert not {"gate:unknown", "gate:expiring"} & set(state())


@pytest.mark.parametrize(
    ("said", "status"), [("succeeded", "sent"), ("failed", "failed"), ("blocked", "unknown")]
)
async def test_a_late_event_without_a_receipt(gate: Gate, said: str, status: str) -> None:
    """spec/reliability 3.6 for succeeded and failed; blocked would let it be sent again."""
    await park(gate)
    await gate.unknown(now_ms=NOW + 1)
    await gate.complete(outcome(said), now_ms=NOW + 9)
    assert (await look(gate, NOW + 9)).status == status


# --- questions ------------------------------------------------------------------------------------


async def test_a_destination_that_has_it_ends_it(gate: Gate) -> None:
    """applied: sent, with what came back."""
    await park(gate)
    told = await reconcile(gate, applied({"number": 7}), now_ms=NOW + 1)
    assert told == counts(asked=1, applied=1)
    row = await look(gate, NOW + 1)
    assert (row.status, row.cause, row.result, row.asks) == ("sent", "applied", {"number": 7}, 1)
    with pytest.raises(Conflict, match="already `sent`"):
        await park(gate, now_ms=NOW + 2)
    assert await reconcile(gate, applied(), now_ms=NOW + 9) == counts()


@pytest.mark.parametrize(
    "verdict", [absent(fence_recorded=True), absent(key_honoured=True)], ids=["fence", "key"]
)
async def test_a_destination_that_guards_itself_may_say_absent(
    gate: Gate, verdict: Verdict
) -> None:
    """It refuses the first sender from now on, or takes two sends for one: grant it anew."""
    first = await park(gate)
    asked = Destination(verdict)
    assert await reconcile(gate, asked, now_ms=NOW + 1) == counts(asked=1, absent=1)
    row = await look(gate, NOW + 1)
    assert (row.status, row.cause) == ("cancelled", "absent")
    assert row.facts[-1].reason
    second = await park(gate, now_ms=NOW + 2)
    assert second.attempts == 2
    assert first.fence < asked.questions[0].fence < second.fence
    assert await gate.complete(outcome(), receipt=first, now_ms=NOW + 3) == "lost"


async def test_a_bare_absent_decides_nothing(gate: Gate) -> None:
    """A paused first sender may still make the effect: it counts as undecidable."""
    await park(gate)
    assert await reconcile(gate, absent(), now_ms=NOW + 1) == counts(asked=1, undecidable=1)
    row = await look(gate, NOW + 1)
    assert (row.status, row.cause) == ("unknown", "undecidable")
    assert "the first sender may still wake up" in str(row.facts[-1].reason)
    with pytest.raises(OutcomeUnknown):
        await park(gate, now_ms=NOW + 2)


async def test_the_first_sender_may_wake_up_after_absent(gate: Gate) -> None:
    """Before anybody else was granted it, its word counts: it is not sent again."""
    first = await park(gate)
    await reconcile(gate, absent(key_honoured=True), now_ms=NOW + 1)
    assert await gate.complete(outcome(), receipt=first, now_ms=NOW + 2) == "recorded"
    with pytest.raises(Conflict, match="already `sent`"):
        await park(gate, now_ms=NOW + 3)


async def test_a_question_holds_what_a_destination_needs(gate: Gate) -> None:
    """The intent, its key, a fence above its sender's, how often, how long."""
    receipt = await park(gate)
    asked = Destination()
    for number, now_ms in ((1, NOW + 1), (2, NOW + 100_000)):
        await reconcile(gate, asked, now_ms=now_ms, lease_ms=77)
        question = asked.questions[-1]
        assert question.intent.outbox_id == ID
        assert (question.intent.operation, question.intent.target) == (TOOL, "frumu-ai/tandem")
        assert (question.key, question.asks, question.ask_end_ms) == (KEY, number, now_ms + 77)
    assert receipt.fence < asked.questions[0].fence < asked.questions[1].fence
    row = await look(gate, NOW + 100_000)
    assert (row.asks, row.fence, row.attempts) == (2, receipt.fence, 1)
    assert [fact.fence for fact in row.facts] == [one.fence for one in asked.questions]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ({"mcp.github.create_issue", "mcp.github.*", "*"}, "mcp.github.create_issue"),
        ({"issue", "mcp.github.*", "*"}, "issue"),
        ({"mcp.github.create_issue", "issue"}, "mcp.github.create_issue"),
        ({"mcp.*", "mcp.github.*", "*"}, "mcp.github.*"),
        ({"iss*", "*"}, "iss*"),
        ({"*"}, "*"),
        ({"mcp.github", "github.*", "create_issue"}, None),
    ],
)
async def test_a_tool_finds_its_callback(gate: Gate, names: set[str], chosen: str | None) -> None:
    """By its full name, by the name it was called by, by the longest prefix; else it is left alone."""
    await park(gate, tool="issue", canonical_tool=TOOL)
    callbacks = {name: Destination(applied()) for name in sorted(names)}
    told = await gate.reconcile(callbacks, settle_ms=0, now_ms=NOW + 1)
    assert {name for name, one in callbacks.items() if one.questions} == ({chosen} - {None})
    if chosen is None:
        assert told == counts(without_callback=1)
        assert (await look(gate, NOW + 1)).asks == 0
    else:
        assert told == counts(asked=1, applied=1)


async def slow(question: Question) -> Verdict:
    await asyncio.Event().wait()
    return applied()


class TooLong:
    """An answer that no fact can hold."""


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (ZeroDivisionError("by zero"), "the question failed: ZeroDivisionError: by zero"),
        (TimeoutError("of its own"), "the question failed: TimeoutError: of its own"),
        (slow, "no answer within 1 ms"),
        (True, "the callback gave bool, which is no verdict"),
        ("applied", "the callback gave str, which is no verdict"),
        (undecidable("down for now"), "down for now"),
    ],
    ids=["exception", "its own timeout", "timeout", "bool", "text", "undecidable"],
)
async def test_what_is_no_answer_is_undecidable(gate: Gate, verdict: Any, reason: str) -> None:
    """Whatever a callback does, an intent is never decided by it."""
    await park(gate)
    told = await reconcile(gate, verdict, now_ms=NOW + 1, lease_ms=1 if verdict is slow else 60_000)
    assert told == counts(asked=1, undecidable=1)
    row = await look(gate, NOW + 1)
    assert (row.status, row.facts[-1].reason) == ("unknown", reason)


async def test_a_callback_that_gives_nothing_is_undecidable(gate: Gate) -> None:
    """None, as a function returns that forgot to."""

    async def forgets(question: Question) -> Any:
        return None

    await park(gate)
    assert (await reconcile(gate, forgets, now_ms=NOW + 1)).undecidable == 1
    assert "NoneType" in str((await look(gate, NOW + 1)).facts[-1].reason)


async def test_one_callbacks_failure_is_no_neighbours(gate: Gate) -> None:
    """An endless error text, a result that no fact can hold, a cancellation: each for itself."""
    answers: dict[str, Any] = {
        "endless": ZeroDivisionError("\x01" * 200_000),
        "unkeepable": applied(TooLong()),
        "too large": applied("x" * 100_000),
        "cancelled": asyncio.CancelledError(),
        "fine": applied(1),
    }
    for key in answers:
        await park(gate, key)

    async def ask(question: Question) -> Verdict:
        return await Destination(answers[question.key])(question)

    told = await reconcile(gate, ask, now_ms=NOW + 1)
    assert told == counts(asked=5, applied=3, undecidable=1)
    found = {one.idempotency_key: one for one in (await gate.list(now_ms=NOW + 1)).items}
    assert {key: (one.status, one.result) for key, one in found.items()} == {
        "endless": ("unknown", None),
        "unkeepable": ("sent", None),
        "too large": ("sent", None),
        "cancelled": ("unknown", None),
        "fine": ("sent", 1),
    }
    assert "was not kept" in str(found["too large"].facts[-1].reason)
    assert len(str(found["endless"].facts[-1].reason)) == 2_000


@pytest.mark.parametrize(("settle_ms", "first_ms"), [(None, SETTLE_MS), (500, 500), (0, 0)])
async def test_questions_wait_until_what_was_under_way_has_arrived(
    gate: Gate, settle_ms: int | None, first_ms: int
) -> None:
    """settle_ms after the end of the lease, half a minute unless said otherwise."""
    await park(gate)
    options = {} if settle_ms is None else {"settle_ms": settle_ms}
    asked = Destination(applied())
    if first_ms:
        early = await gate.reconcile({"*": asked}, **options, now_ms=NOW + first_ms)
        assert early == counts(waiting=1)
    told = await gate.reconcile({"*": asked}, **options, now_ms=NOW + 1 + first_ms)
    assert told == counts(asked=1, applied=1)


async def test_settling_counts_from_when_the_sender_left(gate: Gate) -> None:
    """Whoever said that it left will send nothing more; what it sent must still arrive."""
    receipt = await gate.prepare(call(), on_expiry="park", now_ms=NOW)
    assert receipt is not None
    await gate._complete(ID, receipt.token, "left", note_of(), None, False, NOW + 5)
    row = await look(gate, NOW + 5)
    assert (row.status, row.unknown_since_ms) == ("unknown", NOW + 5)
    assert (await reconcile(gate, now_ms=NOW + 504, settle_ms=500)).waiting == 1
    assert (await reconcile(gate, now_ms=NOW + 505, settle_ms=500)).asked == 1


async def test_pauses_double_up_to_the_longest(gate: Gate) -> None:
    """After each question that found nothing out."""
    await park(gate)
    now_ms = NOW + 1
    for pause_ms in (100, 200, 400, 450, 450):
        options: dict[str, Any] = {"backoff_ms": (100, 450), "asks_max": 9}
        assert (await reconcile(gate, now_ms=now_ms, **options)).asked == 1
        assert (await look(gate, now_ms)).ask_at_ms == now_ms + pause_ms
        assert await reconcile(gate, now_ms=now_ms + pause_ms - 1, **options) == counts(waiting=1)
        now_ms += pause_ms


async def test_asking_ends_in_a_dead_letter(gate: Gate) -> None:
    """Undecidable: nobody asks, nobody is granted it, an operator decides."""
    await park(gate)
    now_ms = NOW + 1
    options: dict[str, Any] = {"asks_max": 3, "backoff_ms": (0, 0)}
    for expected in (counts(asked=1, undecidable=1),) * 2 + (counts(asked=1, dead_lettered=1),):
        assert await reconcile(gate, now_ms=now_ms, **options) == expected
    row = await look(gate, now_ms)
    assert (row.status, row.cause, row.asks) == ("dead_lettered", "undecidable", 3)
    asked = Destination(absent(key_honoured=True))
    assert await reconcile(gate, asked, now_ms=now_ms + FIVE_MINUTES) == counts()
    assert asked.questions == []
    with pytest.raises(Conflict, match=r"already `dead_lettered`.*leasekit resolve"):
        await park(gate, now_ms=now_ms + FIVE_MINUTES)


@pytest.mark.parametrize("said", ["succeeded", "failed", "blocked"])
async def test_a_late_word_digs_a_dead_letter_up(gate: Gate, said: str) -> None:
    """The sender knows what no destination could tell."""
    receipt = await park(gate)
    await reconcile(gate, now_ms=NOW + 1, asks_max=1)
    assert await gate.complete(outcome(said), receipt=receipt, now_ms=NOW + 2) == "recorded"


async def ask_and_die(gate: Gate, now_ms: int, **options: Any) -> None:
    """A round whose process dies while the destination thinks."""
    is_asked = asyncio.Event()

    async def never(question: Question) -> Verdict:
        is_asked.set()
        await asyncio.Event().wait()
        return applied()

    task = asyncio.create_task(reconcile(gate, never, now_ms=now_ms, **options))
    await is_asked.wait()
    task.cancel()
    await asyncio.wait([task])


async def test_a_question_is_counted_as_it_begins(gate: Gate) -> None:
    """So asking ends also where every asker dies of it."""
    await park(gate)
    now_ms = NOW + 1
    options: dict[str, Any] = {"asks_max": 2, "lease_ms": 50, "backoff_ms": (7, 70)}
    for asks, pause_ms in ((1, 7), (2, 14)):
        await ask_and_die(gate, now_ms, **options)
        assert (await look(gate, now_ms)).asks == asks
        asked = Destination(applied())
        early = await reconcile(gate, asked, now_ms=now_ms + 49 + pause_ms, **options)
        assert early == counts(waiting=1)
        now_ms += 50 + pause_ms
    assert await reconcile(gate, asked, now_ms=now_ms, **options) == counts(dead_lettered=1)
    assert asked.questions == []
    assert (await look(gate, now_ms)).status == "dead_lettered"


async def test_a_new_grant_has_a_new_budget(gate: Gate) -> None:
    """Questions count since the last grant."""
    await park(gate)
    await reconcile(gate, absent(key_honoured=True), now_ms=NOW + 1, asks_max=1)
    await park(gate, now_ms=NOW + 2)
    assert (await look(gate, NOW + 2)).asks == 0
    assert (await reconcile(gate, applied(), now_ms=NOW + 9, asks_max=1)).applied == 1


@pytest.mark.parametrize(
    ("said", "status"), [("succeeded", "sent"), ("failed", "failed"), ("blocked", "cancelled")]
)
@pytest.mark.parametrize("verdict", [applied(), absent(key_honoured=True), undecidable()])
async def test_a_late_word_beats_the_destinations(
    gate: Gate, said: str, status: str, verdict: Verdict
) -> None:
    """It came between question and answer: the answer counts for nothing."""
    receipt = await park(gate)

    async def ask(question: Question) -> Verdict:
        await gate.complete(outcome(said), receipt=receipt, now_ms=NOW + 2)
        return verdict

    assert await reconcile(gate, ask, now_ms=NOW + 1) == counts(asked=1, lost=1)
    row = await look(gate, NOW + 2)
    assert (row.status, [fact.kind for fact in row.facts]) == (status, [said])


async def test_an_operator_beats_the_destination(gate: Gate) -> None:
    """The same with an order."""
    await park(gate)

    async def ask(question: Question) -> Verdict:
        resolved = await gate.resolve(ID, "failed", actor="a", reason="r", now_ms=NOW + 1)
        assert resolved == "resolved"
        return applied()

    assert await reconcile(gate, ask, now_ms=NOW + 1) == counts(asked=1, lost=1)
    assert (await look(gate, NOW + 2)).status == "failed"


async def test_an_asker_that_was_overtaken_decides_nothing(gate: Gate) -> None:
    """Its question's lease was over, and another one asked."""
    await park(gate)

    async def ask(question: Question) -> Verdict:
        second = await reconcile(
            gate, absent(), now_ms=NOW + 60, lease_ms=50, backoff_ms=(0, 0), asks_max=9
        )
        assert second == counts(asked=1, undecidable=1)
        return absent(key_honoured=True)

    first = await reconcile(gate, ask, now_ms=NOW + 1, lease_ms=50, backoff_ms=(0, 0))
    assert first == counts(asked=1, lost=1)
    assert (await look(gate, NOW + 60)).status == "unknown"


async def test_while_one_asks_others_wait(gate: Gate) -> None:
    """For as long as the question may take."""
    await park(gate)

    async def ask(question: Question) -> Verdict:
        assert await reconcile(gate, applied(), now_ms=NOW + 40, lease_ms=50) == counts(waiting=1)
        return applied("first")

    assert (await reconcile(gate, ask, now_ms=NOW + 1, lease_ms=50)).applied == 1
    assert (await look(gate, NOW + 40)).result == "first"


async def test_reconcilers_side_by_side_ask_each_once(
    gate: Gate, connected: Connect, tenant_name: str
) -> None:
    """Several processes, each going through everything."""
    keys = {f"key-{number}" for number in range(120)}
    await asyncio.gather(*(park(gate, key) for key in keys))
    others = [(await connected()).tenant(tenant_name, "w").gate for _ in range(2)]
    asked = Destination(applied())

    async def ask(question: Question) -> Any:
        await asyncio.sleep(0)
        return await asked(question)

    rounds = await asyncio.gather(
        *(reconcile(one, ask, now_ms=NOW + 9) for one in (gate, gate, *others))
    )
    assert sorted(one.key for one in asked.questions) == sorted(keys)
    assert sum(one.asked for one in rounds) == sum(one.applied for one in rounds) == len(keys)
    assert sum(one.lost + one.errors + one.undecidable for one in rounds) == 0
    assert (await gate.unknown(now_ms=NOW + 9)).items == []


async def test_what_is_not_unknown_any_more_is_not_asked_about(gate: Gate) -> None:
    """Since the round saw it, it was decided about, granted again, and is over, but not unknown."""
    await park(gate, "first", now_ms=NOW - 1)
    await park(gate)
    asked = Destination(undecidable())

    async def ask(question: Question) -> Any:
        order: dict[str, Any] = {"actor": "a", "reason": "r", "now_ms": NOW + 2}
        assert await gate.resolve(ID, "not_sent", **order) == "resolved"
        again = await gate.prepare(call(), on_expiry="reclaim", lease_ms=1, now_ms=NOW + 2)
        assert again is not None
        return await asked(question)

    told = await reconcile(gate, ask, now_ms=NOW + 9, concurrency=1)
    assert told == counts(asked=1, undecidable=1, waiting=1)
    assert [question.key for question in asked.questions] == ["first"]
    row = await look(gate, NOW + 9)
    assert (row.status, row.attempts, row.asks) == ("claimed", 2, 0)


async def test_no_more_questions_at_once_than_said(gate: Gate) -> None:
    """concurrency; and each is asked all the same."""
    await asyncio.gather(*(park(gate, f"key-{number}") for number in range(30)))
    running, most = 0, 0

    async def ask(question: Question) -> Verdict:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(5):
            await asyncio.sleep(0)
        running -= 1
        return applied()

    assert (await reconcile(gate, ask, now_ms=NOW + 1, concurrency=3)).applied == 30
    assert most == 3


async def test_a_round_goes_through_all_pages(gate: Gate) -> None:
    """Also through what moves behind the others because it was asked: each once."""
    await asyncio.gather(*(park(gate, f"key-{number}") for number in range(1_030)))
    asked = Destination()
    told = await reconcile(gate, asked, now_ms=NOW + 5, concurrency=500, backoff_ms=(0, 0))
    assert told == counts(asked=1_030, undecidable=1_030)
    assert len({question.key for question in asked.questions}) == 1_030


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"settle_ms": -1}, "settle_ms"),
        ({"asks_max": 0}, "asks_max"),
        ({"backoff_ms": (-1, 5)}, "backoff_ms"),
        ({"lease_ms": 0}, "lease_ms"),
        ({"concurrency": 0}, "concurrency"),
        ({"durability": "most"}, "durability"),
        ({"callbacks": {}}, "callbacks"),
    ],
)
async def test_bad_input_is_refused(gate: Gate, options: dict[str, Any], field: str) -> None:
    """Before anybody is asked."""
    given: dict[str, Any] = {"callbacks": {"*": Destination()}} | options
    with pytest.raises(InvalidInput) as raised:
        await gate.reconcile(**given, now_ms=NOW)
    assert raised.value.field == field


# --- an operator's word ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "status"), [("sent", "sent"), ("failed", "failed"), ("not_sent", "cancelled")]
)
@pytest.mark.parametrize("was_buried", [True, False])
async def test_an_operator_decides(gate: Gate, verdict: Any, status: str, was_buried: bool) -> None:
    """About the unknown and the undecidable; who and why is kept."""
    await park(gate)
    if was_buried:
        await reconcile(gate, now_ms=NOW + 1, asks_max=1)
    resolved = await gate.resolve(
        ID, verdict, actor="alice", reason="asked them by phone", now_ms=NOW + 2
    )
    assert resolved == "resolved"
    row = await look(gate, NOW + 2)
    assert (row.status, row.cause) == (status, "resolved")
    fact = row.facts[-1]
    assert (fact.kind, fact.actor, fact.reason, fact.applied, fact.at_ms) == (
        f"resolved_{verdict}",
        "alice",
        "asked them by phone",
        True,
        NOW + 2,
    )
    if verdict == "not_sent":
        assert (await park(gate, now_ms=NOW + 3)).attempts == 2
    else:
        with pytest.raises(Conflict, match=f"already `{status}`"):
            await park(gate, now_ms=NOW + 3)
    assert (await gate.unknown(now_ms=NOW + 9)).items == [] or verdict == "not_sent"


async def test_an_order_is_about_one_state(gate: Gate) -> None:
    """Of which the operator saw the revision: what has changed since is looked at again."""
    await park(gate)
    seen = (await gate.unknown(now_ms=NOW + 1)).items[0]
    await reconcile(gate, now_ms=NOW + 1)
    order: dict[str, Any] = {"actor": "a", "reason": "r", "revision": seen.revision}
    assert await gate.resolve(ID, "not_sent", **order, now_ms=NOW + 2) == "changed"
    row = await look(gate, NOW + 2)
    assert row.status == "unknown"
    order["revision"] = row.revision
    assert await gate.resolve(ID, "not_sent", **order, now_ms=NOW + 2) == "resolved"


async def test_an_order_that_comes_twice_counts_once(gate: Gate) -> None:
    """A repeat is told the same; a copy that comes after a new grant does nothing."""
    await park(gate)
    seen = (await gate.unknown(now_ms=NOW + 1)).items[0]
    order: dict[str, Any] = {"actor": "a", "reason": "r", "revision": seen.revision}
    for _ in range(2):
        assert (
            await gate.resolve(ID, "not_sent", **order, repeat=True, now_ms=NOW + 2) == "resolved"
        )
    assert len((await look(gate, NOW + 2)).facts) == 1
    assert await gate.resolve(ID, "sent", **order, now_ms=NOW + 2) == "not_unknown"
    await park(gate, now_ms=NOW + 3)
    for now_ms, word in ((NOW + 3, "not_unknown"), (NOW + 4, "changed")):
        assert await gate.resolve(ID, "not_sent", **order, repeat=True, now_ms=now_ms) == word
    assert (await look(gate, NOW + 4)).status == "unknown"


@pytest.mark.parametrize("said", [None, "succeeded", "failed", "blocked"])
async def test_there_is_nothing_to_decide_about_what_is_known(
    gate: Gate, state: State, said: str | None
) -> None:
    """Also not about what runs."""
    receipt = await gate.prepare(call(), on_expiry="park", now_ms=NOW)
    assert receipt is not None
    if said:
        await gate.complete(outcome(said), receipt=receipt, now_ms=NOW)
    before = state()
    for verdict in ("sent", "failed", "not_sent"):
        found = await gate.resolve(ID, verdict, actor="a", reason="r", now_ms=NOW + 1)
        assert found == "not_unknown"
    assert state() == before


async def test_an_order_about_nothing(gate: Gate) -> None:
    """With a revision or without."""
    for revision in (None, 1):
        found = await gate.resolve(ID, "sent", actor="a", reason="r", revision=revision, now_ms=NOW)
        assert found == "missing"


async def test_the_senders_word_after_the_operators(gate: Gate) -> None:
    """sent outweighs what an operator believed; less does not undo an order. Both are kept."""
    receipt = await park(gate)
    await gate.resolve(ID, "failed", actor="a", reason="r", now_ms=NOW + 1)
    assert await gate.complete(outcome("blocked"), receipt=receipt, now_ms=NOW + 2) == "kept"
    assert await gate.complete(outcome(), receipt=receipt, now_ms=NOW + 3) == "recorded"
    row = await look(gate, NOW + 3)
    assert (row.status, [fact.kind for fact in row.facts]) == (
        "sent",
        ["resolved_failed", "blocked", "succeeded"],
    )


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"verdict": "maybe"}, "verdict"),
        ({"id": ""}, "id"),
        ({"actor": " "}, "actor"),
        ({"actor": "x" * 201}, "actor"),
        ({"reason": " \n"}, "reason"),
        ({"reason": None}, "reason"),
        ({"reason": "x" * 2_001}, "reason"),
        ({"reason": "\ud800"}, "reason"),
        ({"revision": -1}, "revision"),
        ({"revision": True}, "revision"),
    ],
)
async def test_an_order_says_who_and_why(
    gate: Gate, state: State, changes: dict[str, Any], field: str
) -> None:
    """Nothing is written without."""
    await park(gate)
    before = state()
    order: dict[str, Any] = {"id": ID, "verdict": "sent", "actor": "a", "reason": "r"} | changes
    with pytest.raises(InvalidInput) as raised:
        await gate.resolve(order.pop("id"), order.pop("verdict"), **order, now_ms=NOW + 1)
    assert raised.value.field == field
    assert state() == before


# --- no way around --------------------------------------------------------------------------------

UNKNOWN = {"unknown", "dead_lettered"}
VERDICTS = {
    "applied": applied(),
    "absent": absent(),
    "absent, fence": absent(fence_recorded=True),
    "absent, key": absent(key_honoured=True),
    "undecidable": undecidable(),
}
STEPS = st.one_of(
    st.tuples(st.just("prepare"), st.sampled_from(["park", "park", "reclaim"])),
    st.tuples(st.just("repeat"), st.integers(0, 3)),
    st.tuples(
        st.just("complete"),
        st.tuples(st.integers(0, 3), st.sampled_from(["succeeded", "failed", "blocked", "left"])),
    ),
    st.tuples(st.just("event"), st.sampled_from(["succeeded", "failed", "blocked", "denial"])),
    st.tuples(st.just("extend"), st.integers(0, 3)),
    st.tuples(st.just("reconcile"), st.sampled_from(sorted(VERDICTS))),
    st.tuples(st.just("resolve"), st.sampled_from(["sent", "failed", "not_sent"])),
    st.tuples(st.just("wait"), st.sampled_from([1, 9, 10, 11, 500])),
    st.tuples(st.just("unknown"), st.none()),
)
_walks = itertools.count()


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEPS, min_size=5, max_size=40))
def test_only_absent_and_people_lead_from_unknown_to_a_grant(steps: list[Any]) -> None:
    """Whatever is called in whatever order: an unknown intent is granted again only after a guarded
    `absent`, an operator's `not_sent`, or its own sender's late word that nothing was sent."""
    name = f"walk-{next(_walks)}"
    _memory_servers[name] = FakeServer(version=(7, 0, 0))
    try:
        asyncio.run(Walk().run(name, steps))
    finally:
        del _memory_servers[name]


class Walk:
    """One intent, driven by steps; what it reads as is looked at after each."""

    def __init__(self) -> None:
        self.now_ms = NOW
        self.receipts: list[Receipt] = []
        self.status = "absent"

    async def run(self, name: str, steps: Iterable[Any]) -> None:
        async with leasekit.connect(f"memory://{name}", clock="caller") as kit:
            self.gate = kit.tenant("o", "w").gate
            for word, detail in steps:
                before = await self.read()
                fence = self.receipts[-1].fence if self.receipts else 0
                allows = await getattr(self, word)(detail)
                after = await self.read()
                trace = (word, detail, before, after)
                if len(self.receipts) and self.receipts[-1].fence != fence:
                    assert before in {"absent", "cancelled", "claimed"}, trace
                    assert self.receipts[-1].fence > fence, trace
                if before in UNKNOWN and after not in {*UNKNOWN, "sent", "failed"}:
                    assert after == "cancelled", trace
                    assert allows, trace
                if before in {"sent", "failed"}:
                    assert after in {"sent", "failed"}, trace

    async def read(self) -> str:
        intent = await self.gate.get(ID, now_ms=self.now_ms)
        return "absent" if intent is None else intent.status

    def receipt(self, number: int) -> Receipt | None:
        """One of the last grants; 0 is the last."""
        return self.receipts[-1 - number] if number < len(self.receipts) else None

    async def prepare(self, on_expiry: Any, token: str | None = None) -> bool:
        try:
            receipt = await self.gate.prepare(
                call(), on_expiry=on_expiry, lease_ms=10, token=token, now_ms=self.now_ms
            )
        except (Conflict, InProgress, OutcomeUnknown, LeasekitError):
            return False
        assert receipt is not None
        if token is None:
            self.receipts.append(receipt)
        return False

    async def repeat(self, number: int) -> bool:
        receipt = self.receipt(number)
        return await self.prepare("park", receipt.token if receipt else new_token())

    async def complete(self, detail: tuple[int, str]) -> bool:
        receipt = self.receipt(detail[0])
        if receipt is None:
            return False
        completed = await self.gate._complete(
            ID, receipt.token, detail[1], note_of(), None, False, self.now_ms
        )
        return detail == (0, "blocked") and completed == "recorded"

    async def event(self, said: str) -> bool:
        error = "ToolDenied { reason: OutboxGate }" if said == "denial" else None
        event = outcome("blocked" if said == "denial" else said, error=error)
        await self.gate.complete(event, now_ms=self.now_ms)
        return False

    async def extend(self, number: int) -> bool:
        receipt = self.receipt(number)
        if receipt is not None:
            await self.gate.extend(receipt, lease_ms=10, now_ms=self.now_ms)
        return False

    async def reconcile(self, word: str) -> bool:
        told = await reconcile(
            self.gate, VERDICTS[word], now_ms=self.now_ms, asks_max=2, backoff_ms=(0, 0)
        )
        return word in ("absent, fence", "absent, key") and told.absent == 1

    async def resolve(self, verdict: Any) -> bool:
        resolved = await self.gate.resolve(ID, verdict, actor="a", reason="r", now_ms=self.now_ms)
        return verdict == "not_sent" and resolved == "resolved"

    async def wait(self, pause_ms: int) -> bool:
        self.now_ms += pause_ms
        return False

    async def unknown(self, _: None) -> bool:
        await self.gate.unknown(now_ms=self.now_ms)
        return False
