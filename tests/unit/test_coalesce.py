"""Each rule of the coalescer, on a wire that the test plays: what is sent, and when, and answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from redis.exceptions import ResponseError

from leasekit import coalesce, scripts
from leasekit.coalesce import FLIGHT_BYTES, FLIGHT_ROWS, FLIGHTS_MAX, Coalescer, Reply
from leasekit.connect import ConnectionLost
from leasekit.errors import LeasekitError, OutcomeUnknown, ScriptFailed, Unavailable
from leasekit.scripts import script

ACK = script("outbox/ack", item=("id", "token"))
GET = script("outbox/get", item=("id",))
CLAIM = script("outbox/claim", item=("claim_id", "limit", "consumer"))
NAMES = {one.sha(shebang=True): name for name, one in scripts.read_scripts().items()}
NOW_MS = 10


class PlayedWire:
    """A wire that records flights; the test answers them, or breaks the connection."""

    client_id = None

    def __init__(self) -> None:
        self.is_connected = False
        self.is_closed = False
        self.refuses: list[Exception] = []
        self.connects = 0
        self.loads = 0
        self.flights: list[tuple[list[Sequence[Any]], asyncio.Future[list[Any]]]] = []

    async def connect(self) -> None:
        self.connects += 1
        if self.refuses:
            raise self.refuses.pop(0)
        self.is_connected = True

    def send(self, commands: Sequence[Sequence[Any]]) -> asyncio.Future[list[Any]]:
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if commands[0][:2] == ("SCRIPT", "LOAD"):
            self.loads += 1
            future.set_result([b"sha"] * len(commands))
        elif not self.is_connected:
            future.set_exception(ConnectionLost("there is no connection", sent=False))
        else:
            self.flights.append((list(commands), future))
        return future

    async def close(self) -> None:
        self.is_closed = True
        self.break_down(sent=True)

    def break_down(self, *, sent: bool) -> None:
        self.is_connected = False
        flights, self.flights = self.flights, []
        for _, future in flights:
            if not future.done():
                future.set_exception(ConnectionLost("the connection broke", sent=sent))

    # --- what a test looks at and does ---

    @property
    def waiting(self) -> list[list[list[str]]]:
        """What is unanswered, by flight and command: the items' first fields."""
        return [[names_of(command) for command in commands] for commands, _ in self.flights]

    def answer(self, *replies: Any) -> None:
        """Answer the oldest flight: by default each item with its own first field."""
        commands, future = self.flights.pop(0)
        future.set_result(list(replies) or [[NOW_MS, *names_of(one)] for one in commands])

    async def answer_all(self) -> None:
        while self.flights:
            self.answer()
            await turns(3)


def names_of(command: Sequence[Any]) -> list[str]:
    """The first field of each item of a call."""
    one = scripts.read_scripts()[NAMES[command[1]]]
    fields = command[3 + len(one.keys) + len(one.arguments) :]
    return list(fields[:: len(one.item)])


async def turns(count: int = 2) -> None:
    """Let the event loop run what is due."""
    for _ in range(count):
        await asyncio.sleep(0)


def bind(one: scripts.Script, variant: tuple[Any, ...], repeat: bool) -> Sequence[Any]:
    return one.bind(dict.fromkeys(one.keys, "k"), dict.fromkeys(one.arguments, "a"))


class Desk:
    """Submits for the tests: an item's answer is its own name, as PlayedWire gives it."""

    def __init__(self, wire: PlayedWire, coalescer: Coalescer) -> None:
        self.wire = wire
        self.coalescer = coalescer
        self.undone: list[Any] = []

    def ask(
        self,
        name: str,
        *,
        one: scripts.Script = ACK,
        tenant: str = "t",
        variant: tuple[Any, ...] = (),
        undo: Callable[[Any], None] | None = None,
        decode: Callable[[Any, Any, Reply], Any] = lambda item, context, reply: item,
        **options: Any,
    ) -> asyncio.Future[Any]:
        fields = [name, *["f"] * (len(one.item) - 1)]
        return self.coalescer.submit(
            one, tenant, variant, bind, fields, decode, undo=undo or self.undone.append, **options
        )

    def ask_many(self, names: str, **options: Any) -> list[asyncio.Future[Any]]:
        return [self.ask(name, **options) for name in names.split()]


@pytest.fixture
async def desk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A coalescer that has three flights under way at most; the rules hold for any number."""
    monkeypatch.setattr(coalesce, "FLIGHTS_MAX", 3)
    wire = PlayedWire()
    coalescer = Coalescer(wire, shebang=True, timeout_ms=1_000)
    await coalescer.start()
    yield Desk(wire, coalescer)
    wire.break_down(sent=True)
    await turns()


@pytest.fixture
def timers(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every timer that anybody starts from here on."""
    started: list[float] = []
    plain = asyncio.BaseEventLoop.call_at

    def call_at(loop: Any, when: float, *rest: Any, **named: Any) -> Any:
        started.append(when)
        return plain(loop, when, *rest, **named)

    monkeypatch.setattr(asyncio.BaseEventLoop, "call_at", call_at)
    return started


# --- order and gathering --------------------------------------------------------------------------


async def test_calls_of_one_turn_share_one_script_call(desk: Desk) -> None:
    """Same command, tenant and variant: one command on the wire, items in the order of asking."""
    asked = desk.ask_many("a b c")
    await turns()

    assert desk.wire.waiting == [[["a", "b", "c"]]]
    desk.wire.answer()
    assert await asyncio.gather(*asked) == ["a", "b", "c"]


async def test_different_groups_share_a_write_but_no_call(desk: Desk) -> None:
    """Another tenant, variant or command is another script call of the same write."""
    asked = [
        desk.ask("a"),
        desk.ask("b", tenant="u"),
        desk.ask("c", variant=(1,)),
        desk.ask("d", one=GET),
        desk.ask("e"),
    ]
    await turns()

    assert desk.wire.waiting == [[["a", "e"], ["b"], ["c"], ["d"]]]
    desk.wire.answer()
    assert await asyncio.gather(*asked) == ["a", "b", "c", "d", "e"]


async def test_a_lone_call_leaves_in_the_same_turn_without_a_timer(
    desk: Desk, timers: list[float]
) -> None:
    """Nothing is waited for: one turn of the loop, and no timer is ever started."""
    asked = desk.ask("a")
    await asyncio.sleep(0)
    assert desk.wire.waiting == [[["a"]]]

    desk.wire.answer()
    assert await asked == "a"
    assert timers == []


def test_some_flights_are_under_way_at_a_time() -> None:
    """One would make client and server wait for each other; too many gather too little (design 5)."""
    assert 2 <= FLIGHTS_MAX <= 4
    assert 100 <= FLIGHT_ROWS <= 200


async def test_what_arrives_while_flights_are_under_way_travels_together(desk: Desk) -> None:
    """Three flights at most are under way; meanwhile calls gather for the next one."""
    asked = []
    for name in "abcdefg":
        asked.append(desk.ask(name))
        await turns()

    assert desk.wire.waiting == [[["a"]], [["b"]], [["c"]]]
    assert desk.coalescer.flights == 3
    assert desk.coalescer.queued_rows == 4
    desk.wire.answer()
    await turns()
    assert desk.wire.waiting == [[["b"]], [["c"]], [["d", "e", "f", "g"]]]
    await desk.wire.answer_all()
    assert await asyncio.gather(*asked) == list("abcdefg")
    assert (desk.coalescer.flights, desk.coalescer.queued_rows) == (0, 0)


async def test_order_holds_across_batches(desk: Desk) -> None:
    """Calls of a group leave in the order of their asking, however many flights it takes."""
    names = [f"n{number}" for number in range(3 * FLIGHT_ROWS + 50)]
    asked = [desk.ask(name) for name in names]
    sent: list[str] = []
    await turns()
    while desk.wire.flights:
        sent += desk.wire.waiting[0][0]
        desk.wire.answer()
        await turns(3)

    assert sent == names
    assert await asyncio.gather(*asked) == names


async def test_callers_who_were_answered_join_the_next_flight(desk: Desk) -> None:
    """A consumer that acks what it just claimed does not miss the flight that its answer frees."""
    asked = []
    for name in "abc":
        asked.append(desk.ask(name))
        await turns()
    late = desk.ask("late")
    await turns()

    async def go_on() -> str:
        await asked[0]
        return str(await desk.ask("after-a"))

    task = asyncio.create_task(go_on())
    await turns()
    desk.wire.answer()
    await turns(3)
    assert desk.wire.waiting[-1] == [["late", "after-a"]]
    await desk.wire.answer_all()
    assert await task == "after-a"
    assert await late == "late"


# --- bounds ---------------------------------------------------------------------------------------


async def test_a_flight_is_bounded_in_rows(desk: Desk) -> None:
    """So many rows leave, the next ones wait for the next flight; a claim counts the rows it asks for."""
    for number in range(FLIGHT_ROWS + 1):
        desk.ask(f"n{number}")
    await turns()
    assert [len(flight[0]) for flight in desk.wire.waiting] == [FLIGHT_ROWS, 1]

    await desk.wire.answer_all()
    desk.ask("x", one=CLAIM, rows=FLIGHT_ROWS - 50)
    desk.ask("y", one=CLAIM, rows=50)
    desk.ask("z", one=CLAIM, rows=1)
    await turns()
    assert desk.wire.waiting == [[["x", "y"]], [["z"]]]


async def test_a_flight_is_bounded_in_bytes(desk: Desk) -> None:
    """128 kB leave, to the byte."""
    desk.ask("a", size=FLIGHT_BYTES - 10)
    desk.ask("b", size=10)
    desk.ask("c", size=1)
    await turns()
    assert desk.wire.waiting == [[["a", "b"]], [["c"]]]


@pytest.mark.parametrize("large", [{"size": 1024 * 1024}, {"rows": 1_000}], ids=["bytes", "rows"])
async def test_an_item_larger_than_a_flight_goes_alone(desk: Desk, large: dict[str, int]) -> None:
    """It neither takes others along nor is held back."""
    desk.ask("a")
    desk.ask("large", **large)
    desk.ask("b")
    await turns()
    assert desk.wire.waiting == [[["a"]], [["large"]], [["b"]]]


async def test_groups_take_turns(desk: Desk) -> None:
    """A tenant with a thousand calls in line does not hold up one with a single call."""
    for number in range(5 * FLIGHT_ROWS):
        desk.ask(f"n{number}", tenant="busy")
    desk.ask("quiet", tenant="quiet")
    await turns()

    assert [len(commands) for commands in desk.wire.waiting] == [1, 2, 1]
    assert desk.wire.waiting[1][0] == ["quiet"]


async def test_a_large_item_is_not_overtaken_for_ever(desk: Desk) -> None:
    """What needs a flight of its own leads the next one, however many small ones keep coming."""
    for name in "abc":  # three flights are under way
        desk.ask(name)
        await turns()
    desk.ask("small", tenant="u")
    desk.ask("large", one=CLAIM, rows=1_000)
    for number in range(10):
        desk.ask(f"n{number}", tenant=f"v{number}")
    desk.wire.answer()
    desk.wire.answer()
    await turns(3)

    assert desk.wire.waiting[1:] == [[["small"]], [["large"]]]


# --- back-pressure --------------------------------------------------------------------------------


@pytest.fixture
def small_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coalesce, "QUEUE_ROWS_MAX", 4)
    monkeypatch.setattr(coalesce, "QUEUE_BYTES_MAX", 100)
    monkeypatch.setattr(coalesce, "FLIGHT_ROWS", 2)


@pytest.mark.usefixtures("small_queue")
async def test_a_full_queue_makes_callers_wait_in_line(desk: Desk) -> None:
    """Nothing is raised and nothing is lost; who waited longest comes first."""
    names = [f"n{number}" for number in range(20)]
    asked = [desk.ask(name) for name in names]
    assert desk.coalescer.queued_rows == 4

    sent: list[str] = []
    await turns()
    while desk.wire.flights:
        sent += desk.wire.waiting[0][0]
        desk.wire.answer()
        await turns(3)
        assert desk.coalescer.queued_rows <= 4
    assert sent == names
    assert await asyncio.gather(*asked) == names


@pytest.mark.usefixtures("small_queue")
async def test_a_newcomer_does_not_overtake_those_who_wait(desk: Desk) -> None:
    """Also in the very turn in which there is room again."""
    asked = [desk.ask(f"n{number}") for number in range(12)]
    await turns()
    desk.wire.answer()
    desk.wire.answer()
    asked.append(desk.ask("newcomer"))
    await turns(1)
    asked.append(desk.ask("newcomer-2"))
    sent: list[str] = []
    await turns()
    while desk.wire.flights:
        sent += desk.wire.waiting[0][0]
        desk.wire.answer()
        await turns(3)
    assert sent[-2:] == ["newcomer", "newcomer-2"]
    assert len(await asyncio.gather(*asked)) == 14


@pytest.mark.usefixtures("small_queue")
async def test_bytes_fill_the_queue_as_well(desk: Desk) -> None:
    """A hundred bytes in line, and the next caller waits."""
    asked = [desk.ask(name, size=60) for name in "abcd"]
    assert desk.coalescer.queued_rows == 2
    await turns()
    await desk.wire.answer_all()
    assert await asyncio.gather(*asked) == list("abcd")


@pytest.mark.usefixtures("small_queue")
async def test_who_gives_up_waiting_is_never_sent(desk: Desk) -> None:
    """And holds up nobody behind."""
    asked = [desk.ask(f"n{number}") for number in range(14)]
    for number in (4, 5, 12):
        asked[number].cancel()
    sent: list[str] = []
    await turns()
    while desk.wire.flights:
        sent += desk.wire.waiting[0][0]
        desk.wire.answer()
        await turns(3)
    assert sent == [f"n{number}" for number in range(14) if number not in (4, 5, 12)]
    assert desk.undone == []


# --- failures -------------------------------------------------------------------------------------


async def test_an_answer_that_cannot_be_read_fails_only_its_caller(desk: Desk) -> None:
    """The others of the batch get theirs."""

    def decode(item: Any, context: Any, reply: Reply) -> Any:
        return item if item != "b" else [][1]

    asked = desk.ask_many("a b c", decode=decode)
    await turns()
    desk.wire.answer()
    a, b, c = await asyncio.gather(*asked, return_exceptions=True)

    assert (a, c) == ("a", "c")
    assert isinstance(b, ScriptFailed)
    assert "outbox/ack: an answer could not be read (IndexError); it was applied" in str(b)
    assert b.tenant == "t"


async def test_an_error_that_decode_returns_is_raised_to_its_caller(desk: Desk) -> None:
    """Per item: the neighbours' answers are answers."""
    error = LeasekitError("b is refused")
    asked = desk.ask_many(
        "a b c", decode=lambda item, context, reply: error if item == "b" else item
    )
    await turns()
    desk.wire.answer()

    assert await asyncio.gather(*asked, return_exceptions=True) == ["a", error, "c"]


async def test_an_error_reply_fails_its_command_and_no_other(desk: Desk) -> None:
    """All callers of the refused script call, each with an exception of its own."""
    asked = [*desk.ask_many("a b"), *desk.ask_many("c", tenant="u")]
    await turns()
    desk.wire.answer(ResponseError("READONLY You can't write"), [NOW_MS, "c"])
    a, b, c = await asyncio.gather(*asked, return_exceptions=True)

    assert isinstance(a, Unavailable)
    assert isinstance(b, Unavailable)
    assert a is not b
    assert c == "c"


@pytest.mark.parametrize("reply", [[NOW_MS, "a"], [NOW_MS, "a", "b", "c"], None, b"OK", []])
async def test_a_reply_of_a_wrong_shape_leaves_nobody_waiting(desk: Desk, reply: Any) -> None:
    """Whose answer is whose cannot be told, so nobody gets one."""
    asked = desk.ask_many("a b")
    await turns()
    desk.wire.answer(reply)
    for error in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(error, ScriptFailed)
        assert "it was applied" in str(error)


async def test_answers_carry_their_calls_head_and_sending_time(desk: Desk) -> None:
    """The first values of a reply are shared; the local clock was read before the request left."""
    before = coalesce.local_clock_s()
    seen: list[tuple[Any, Reply]] = []

    def decode(item: Any, context: Any, reply: Reply) -> None:
        seen.append((context, reply))

    asked = [desk.ask(name, decode=decode, context=name, head=2) for name in "ab"]
    await turns()
    sent_by = coalesce.local_clock_s()
    desk.wire.answer([NOW_MS, 77, "a", "b"])
    await asyncio.gather(*asked)

    assert [context for context, _ in seen] == ["a", "b"]
    assert all(reply.head == [NOW_MS, 77] and reply.now_ms == NOW_MS for _, reply in seen)
    assert all(before <= reply.sent_at_s <= sent_by for _, reply in seen)


# --- a server without the script ------------------------------------------------------------------

NOSCRIPT = ResponseError("NOSCRIPT No matching script.")


async def test_a_missing_script_is_sent_and_called_again(desk: Desk) -> None:
    """Nothing was run, so it is safe; callers notice nothing, other commands are not repeated."""
    asked = [*desk.ask_many("a b"), *desk.ask_many("c", one=GET)]
    await turns()
    loads = desk.wire.loads
    desk.wire.answer(NOSCRIPT, [NOW_MS, "c"])
    await turns()

    assert desk.wire.loads == loads + 1
    assert desk.wire.waiting == [[["a", "b"]]]
    desk.wire.answer()
    assert await asyncio.gather(*asked) == ["a", "b", "c"]


async def test_a_script_that_stays_missing_is_not_tried_for_ever(desk: Desk) -> None:
    """The second time it is an error."""
    asked = desk.ask("a")
    await turns()
    desk.wire.answer(NOSCRIPT)
    await turns()
    desk.wire.answer(NOSCRIPT)
    await turns()

    assert desk.wire.waiting == []
    with pytest.raises(Unavailable, match="refuses to load it"):
        await asked


# --- giving up ------------------------------------------------------------------------------------


async def test_who_gives_up_before_the_call_left_is_never_sent(desk: Desk) -> None:
    """Neither in the first turn nor while waiting for a flight."""
    a, b = desk.ask_many("a b")
    a.cancel()
    await turns()
    assert desk.wire.waiting == [[["b"]]]

    only = desk.ask("only")
    only.cancel()
    await turns()
    assert desk.wire.waiting == [[["b"]]]
    assert desk.coalescer.queued_rows == 0
    desk.wire.answer()
    assert await b == "b"
    assert desk.undone == []


async def test_what_was_granted_to_one_who_gave_up_is_undone(desk: Desk) -> None:
    """The call had left; when its answer arrives, undo gets it. The others are not disturbed."""
    a, b, c = desk.ask_many("a b c")
    await turns()
    b.cancel()
    desk.wire.answer()

    assert await asyncio.gather(a, c) == ["a", "c"]
    assert desk.undone == ["b"]


async def test_a_refusal_to_one_who_gave_up_is_nothing_to_undo(desk: Desk) -> None:
    """Nothing was granted."""
    asked = desk.ask("a", decode=lambda item, context, reply: LeasekitError("no"))
    await turns()
    asked.cancel()
    desk.wire.answer()
    await turns(3)
    assert desk.undone == []


async def test_a_broken_connection_is_nothing_to_undo(desk: Desk) -> None:
    """There is no answer; the lease ends by itself."""
    asked = desk.ask("a")
    await turns()
    asked.cancel()
    desk.wire.break_down(sent=True)
    await turns(3)
    assert desk.undone == []


# --- lost connections -----------------------------------------------------------------------------


async def test_a_write_that_may_have_arrived_is_unknown(desk: Desk) -> None:
    """It is not sent again: it might be applied twice."""
    asked = desk.ask_many("a b")
    await turns()
    desk.wire.break_down(sent=True)
    errors = await asyncio.gather(*asked, return_exceptions=True)
    await turns(5)

    assert all(isinstance(error, OutcomeUnknown) for error in errors)
    assert "the connection broke before the reply came" in str(errors[0])
    assert "repeat=True" in str(errors[0])
    assert desk.wire.waiting == []


async def test_a_read_is_asked_again(desk: Desk) -> None:
    """Reading twice harms nobody: the caller only waits longer."""
    asked = desk.ask("a", one=GET)
    await turns()
    desk.wire.break_down(sent=True)
    await turns(10)

    assert desk.wire.waiting == [[["a"]]]
    assert desk.wire.connects == 2
    desk.wire.answer()
    assert await asked == "a"


async def test_what_was_not_sent_goes_back_to_its_place(desk: Desk) -> None:
    """Over several flights and groups, ahead of what came later, in the old order."""
    asked = []
    for name in ("a b", "c", "d e"):
        asked += desk.ask_many(name)
        await turns()
    asked += desk.ask_many("f g")
    desk.wire.break_down(sent=False)
    await turns(10)

    assert desk.wire.waiting == [[list("abcdefg")]]
    await desk.wire.answer_all()
    assert await asyncio.gather(*asked) == list("abcdefg")
    assert desk.coalescer.queued_rows == 0


async def test_groups_that_were_not_sent_keep_their_order(desk: Desk) -> None:
    """The group that was first in line is first again."""
    asked = [desk.ask("a", tenant="u"), desk.ask("b", tenant="v")]
    await turns()
    asked += [desk.ask("c", tenant="w")]
    await turns()
    desk.wire.break_down(sent=False)
    await turns(10)

    assert desk.wire.waiting == [[["a"], ["b"], ["c"]]]
    await desk.wire.answer_all()
    assert await asyncio.gather(*asked) == list("abc")


async def test_calls_during_an_interruption_wait_for_the_connection(desk: Desk) -> None:
    """They were never sent, so they are simply late."""
    desk.wire.break_down(sent=True)
    desk.wire.refuses = [Unavailable("not yet"), Unavailable("not yet")]
    asked = desk.ask("a")
    assert await answered(desk, asked) == "a"
    assert desk.wire.connects == 4


async def answered(desk: Desk, asked: asyncio.Future[Any]) -> Any:
    """Answer whatever is sent until this one is settled."""
    while not asked.done():
        await asyncio.wait([asked], timeout=0.001)
        await desk.wire.answer_all()
    return asked.result()


async def test_a_connection_that_does_not_come_back_is_an_error(desk: Desk) -> None:
    """After the time limit: nothing was sent, and a later call tries anew."""
    desk.coalescer._timeout_s = 0.03
    desk.wire.break_down(sent=True)
    desk.wire.refuses = [Unavailable("host is down")] * 9
    asked = desk.ask_many("a b")
    errors = await asyncio.gather(*asked, return_exceptions=True)

    assert all(isinstance(error, Unavailable) for error in errors)
    assert "no connection for 0.03 s (host is down); nothing was applied" in str(errors[0])
    assert desk.coalescer.queued_rows == 0
    desk.wire.refuses = []
    assert await answered(desk, desk.ask("c")) == "c"


@pytest.mark.usefixtures("small_queue")
async def test_those_who_wait_for_room_are_told_as_well(desk: Desk) -> None:
    """A queue that is full of calls for a dead server lets nobody hang."""
    desk.coalescer._timeout_s = 0.02
    desk.wire.break_down(sent=True)
    desk.wire.refuses = [Unavailable("host is down")] * 99
    asked = [desk.ask(f"n{number}") for number in range(15)]
    errors = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(error, Unavailable) for error in errors)


# --- closing --------------------------------------------------------------------------------------


async def test_closing_refuses_new_calls_and_finishes_the_old(desk: Desk) -> None:
    """What was asked before is sent and answered; then the wire is closed."""
    asked = []
    for name in "abcde":
        asked.append(desk.ask(name))
        await turns()
    closing = asyncio.create_task(desk.coalescer.close())
    await turns()

    with pytest.raises(Unavailable, match=r"closing or closed: nothing was sent"):
        desk.ask("late")
    assert not desk.wire.is_closed
    await desk.wire.answer_all()
    await closing
    assert [future.result() for future in asked] == list("abcde")
    assert desk.wire.is_closed


async def test_closing_an_idle_client_waits_for_nothing(desk: Desk, timers: list[float]) -> None:
    """And may be done twice, also at the same time."""
    asked = desk.ask("a")
    await turns()
    closing = [asyncio.create_task(desk.coalescer.close()) for _ in range(2)]
    await turns()
    await desk.wire.answer_all()
    await asyncio.gather(*closing)
    assert await asked == "a"
    await desk.coalescer.close()


async def test_what_is_undone_while_closing_is_still_given_back(desk: Desk) -> None:
    """A claim whose caller gave up must not stay granted because the client goes."""
    given_back: list[asyncio.Future[Any]] = []
    undo = lambda result: given_back.append(desk.ask(f"undo-{result}"))  # noqa: E731
    a = desk.ask("a", undo=undo)
    b = desk.ask("b")
    await turns()
    a.cancel()
    closing = asyncio.create_task(desk.coalescer.close())
    await turns()
    desk.wire.answer()
    await turns(3)

    assert desk.wire.waiting == [[["undo-a"]]]
    assert b.result() == "b"
    await desk.wire.answer_all()
    await closing
    assert given_back[0].result() == "undo-a"


@pytest.mark.usefixtures("small_queue")
async def test_closing_does_not_wait_for_ever(desk: Desk) -> None:
    """After the time limit everybody is told what became of their call, and nobody hangs."""
    desk.coalescer._timeout_s = 0.02
    written = desk.ask("written")
    read = desk.ask("read", one=GET, tenant="u")
    await turns()
    for name in "bc":
        desk.ask(name)
        await turns()
    queued = [desk.ask(f"n{number}") for number in range(12)]
    await desk.coalescer.close()
    await turns(5)

    assert isinstance(written.exception(), OutcomeUnknown)
    for future in (read, *queued):
        error = future.exception()
        assert isinstance(error, Unavailable)
        assert "the client was closed; nothing was applied" in str(error)
    assert desk.wire.is_closed


async def test_closing_while_the_server_is_away_ends(desk: Desk) -> None:
    """A client that tries to reconnect can be closed."""
    desk.coalescer._timeout_s = 0.02
    desk.wire.break_down(sent=True)
    desk.wire.refuses = [Unavailable("host is down")] * 99
    asked = desk.ask("a")
    await turns()
    await desk.coalescer.close()
    assert isinstance(asked.exception(), Unavailable)


# --- connecting -----------------------------------------------------------------------------------


async def test_every_connection_is_given_the_scripts_first(desk: Desk) -> None:
    """So that no call has to meet a server without them."""
    assert desk.wire.loads == 1
    desk.wire.break_down(sent=True)
    assert await answered(desk, desk.ask("a")) == "a"
    assert desk.wire.loads == 2


class UnwillingWire(PlayedWire):
    def __init__(self, reply: Any) -> None:
        super().__init__()
        self._reply = reply

    def send(self, commands: Sequence[Sequence[Any]]) -> asyncio.Future[list[Any]]:
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if isinstance(self._reply, ConnectionLost):
            future.set_exception(self._reply)
        else:
            future.set_result([self._reply] * len(commands))
        return future


@pytest.mark.parametrize(
    ("reply", "kind", "says"),
    [
        (ConnectionLost("gone", sent=True), Unavailable, "scripts could not be loaded: gone"),
        (ResponseError("ERR Error compiling script"), ScriptFailed, "script load"),
        (ResponseError("READONLY You can't write"), Unavailable, "script load"),
    ],
)
async def test_a_start_that_fails_says_why(
    reply: Any, kind: type[LeasekitError], says: str
) -> None:
    """The first connection is waited for, and its trouble raised."""
    with pytest.raises(kind, match=says):
        await Coalescer(UnwillingWire(reply), shebang=True, timeout_ms=1_000).start()


async def test_a_user_who_may_not_load_scripts_can_start() -> None:
    """Another user may have loaded them; the calls will tell."""
    wire = UnwillingWire(ResponseError("NOPERM this user has no permissions"))
    await Coalescer(wire, shebang=True, timeout_ms=1_000).start()
