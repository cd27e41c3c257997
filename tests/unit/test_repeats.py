"""What the coalescer sends again by itself after a lost connection: when, in which order, how often."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from redis.exceptions import ResponseError

from leasekit import coalesce, scripts
from leasekit.coalesce import FLIGHT_ROWS, REPEATS_MAX, Coalescer, Reply
from leasekit.connect import ConnectionLost
from leasekit.errors import OutcomeUnknown, Unavailable
from leasekit.scripts import script

ACK = script("outbox/ack", item=("id", "token"))
CLAIM = script("outbox/claim", item=("claim_id", "limit", "consumer"))
ENQUEUE = script("outbox/enqueue", item=("id", "draft", "available_at", "dedupe"))
GET = script("outbox/get", item=("id",))
NAMES = {one.sha(shebang=True): name for name, one in scripts.read_scripts().items()}
NOW_MS = 10
NOPERM = ResponseError("NOPERM this user has no permissions to run 'client|kill'")


class ServedWire:
    """A wire to a server that the test plays: each connection has an id, each process a run id."""

    def __init__(self) -> None:
        self.client_id: int | None = None
        self.is_connected = False
        self.process = "one"
        self.knows_ids = True
        self.kill_answer: Any = 1
        self.log: list[str] = []
        self.flights: list[tuple[list[Sequence[Any]], asyncio.Future[list[Any]]]] = []
        self.kills: list[asyncio.Future[list[Any]]] = []
        self.holds_kills = False

    async def connect(self) -> None:
        if not self.is_connected:
            self.client_id = (self.client_id or 6) + 1 if self.knows_ids else None
            self.is_connected = True
            self.log.append(f"connect {self.client_id}")

    def send(self, commands: Sequence[Sequence[Any]]) -> asyncio.Future[list[Any]]:
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        if not self.is_connected:
            future.set_exception(ConnectionLost("there is no connection", sent=False))
        elif commands and commands[0][0] == "SCRIPT":
            facts = f"# Server\r\nrun_id:{self.process}\r\n".encode()
            future.set_result([b"sha"] * (len(commands) - 1) + [facts])
        elif commands and commands[0][0] == "CLIENT":
            self.log += [" ".join(map(str, command)) for command in commands]
            if self.holds_kills:
                self.kills.append(future)
            else:
                future.set_result([self.kill_answer] * len(commands))
        elif not commands:
            future.set_result([])
        else:
            self.log += [said(command) for command in commands]
            self.flights.append((list(commands), future))
        return future

    async def close(self) -> None:
        self.break_down()

    def break_down(self, *, sent: bool = True) -> None:
        self.is_connected = False
        flights, self.flights = self.flights, []
        kills, self.kills = self.kills, []
        for future in [*(future for _, future in flights), *kills]:
            if not future.done():
                future.set_exception(ConnectionLost("the connection broke", sent=sent))

    def answer(self) -> None:
        commands, future = self.flights.pop(0)
        future.set_result([[NOW_MS, *items_of(command)] for command in commands])


def items_of(command: Sequence[Any]) -> list[str]:
    """The first field of each item of a call."""
    one = scripts.read_scripts()[NAMES[command[1]]]
    return list(command[3 + len(one.keys) + len(one.arguments) :: len(one.item)])


def said(command: Sequence[Any]) -> str:
    """`outbox/ack again a b` for a repeat of an ack of a and b."""
    one = scripts.read_scripts()[NAMES[command[1]]]
    arguments = dict(zip(one.arguments, command[3 + len(one.keys) :], strict=False))
    mark = ["again"] if arguments.get("repeated") == 1 else []
    return " ".join([one.name, *mark, *items_of(command)])


def bind(one: scripts.Script, variant: tuple[Any, ...], repeat: bool) -> Sequence[Any]:
    arguments = dict.fromkeys(one.arguments, "a") | {"repeated": int(repeat)}
    return one.bind(dict.fromkeys(one.keys, "k"), {name: arguments[name] for name in one.arguments})


class Desk:
    """Submits for the tests: an item's answer is its own name."""

    def __init__(self, wire: ServedWire, coalescer: Coalescer) -> None:
        self.wire = wire
        self.coalescer = coalescer
        self.undone: list[Any] = []

    def ask(
        self,
        name: str,
        *,
        one: scripts.Script = ACK,
        undo: Callable[[Any], None] | None = None,
        decode: Callable[[Any, Any, Reply], Any] = lambda item, context, reply: item,
        **options: Any,
    ) -> asyncio.Future[Any]:
        fields = [name, *["f"] * (len(one.item) - 1)]
        return self.coalescer.submit(one, "t", (), bind, fields, decode, undo=undo, **options)

    def ask_many(self, names: str, **options: Any) -> list[asyncio.Future[Any]]:
        return [self.ask(name, **options) for name in names.split()]

    async def lose(self) -> list[str]:
        """Break the connection; what was sent on the next one."""
        await turns()
        self.wire.log.clear()
        self.wire.break_down()
        await turns(10)
        return self.wire.log


async def turns(count: int = 2) -> None:
    """Let the event loop run what is due."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.fixture
async def desk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A coalescer that has three flights under way at most; the rules hold for any number."""
    monkeypatch.setattr(coalesce, "FLIGHTS_MAX", 3)
    wire = ServedWire()
    coalescer = Coalescer(wire, shebang=True, timeout_ms=1_000)
    await coalescer.start()
    yield Desk(wire, coalescer)
    coalescer._is_closed = True
    wire.break_down()
    await turns()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The local clock, in seconds, in the only place of a list."""
    now = [100.0]
    monkeypatch.setattr(coalesce, "local_clock_s", lambda: now[0])
    return now


# --- what is sent again ---------------------------------------------------------------------------


async def test_a_lost_call_is_sent_again_as_a_repeat(desk: Desk) -> None:
    """Once the server has dropped the old connection; its caller only waits longer."""
    asked = desk.ask_many("a b")

    assert await desk.lose() == ["connect 8", "CLIENT KILL ID 7", "outbox/ack again a b"]
    desk.wire.answer()
    assert await asyncio.gather(*asked) == ["a", "b"]
    assert desk.coalescer.queued_rows == 0


async def test_a_command_that_takes_no_mark_is_sent_as_it_was(desk: Desk) -> None:
    """A claim's id is all that a repeat of it needs."""
    asked = desk.ask("a", one=CLAIM, head=1)
    assert await desk.lose() == ["connect 8", "CLIENT KILL ID 7", "outbox/claim a"]
    desk.wire.answer()
    assert await asked == "a"


async def test_a_read_is_only_asked_again(desk: Desk) -> None:
    """It changes nothing, so any number of times within the time limit."""
    asked = desk.ask("a", one=GET)
    for _ in range(REPEATS_MAX + 2):
        log = await desk.lose()
    assert log[-1] == "outbox/get a"
    desk.wire.answer()
    assert await asked == "a"


async def test_what_was_not_sent_is_no_repeat(desk: Desk) -> None:
    """Nothing of it can have been applied."""
    desk.ask("a")
    await turns()
    desk.wire.log.clear()
    desk.wire.break_down(sent=False)
    await turns(10)
    assert desk.wire.log == ["connect 8", "outbox/ack a"]


async def test_a_repeat_that_was_not_sent_stays_one(desk: Desk) -> None:
    """Its first sending may have been applied all the same."""
    desk.ask("a")
    await desk.lose()
    desk.wire.log.clear()
    desk.wire.break_down(sent=False)
    await turns(10)
    assert desk.wire.log == ["connect 9", "outbox/ack again a"]


async def test_a_callers_own_repeat_is_marked_from_the_start(desk: Desk) -> None:
    """It shares a call with other repeats, not with first sendings."""
    desk.ask("a")
    desk.ask("b", repeat=True)
    desk.ask("c", repeat=True)
    await turns()
    assert desk.wire.log[1:] == ["outbox/ack a", "outbox/ack again b c"]


async def test_the_answer_to_a_repeat_counts_from_its_own_sending(
    desk: Desk, clock: list[float]
) -> None:
    """A lease that is counted from before the loss would seem to end too early, never too late."""
    seen: list[float] = []
    asked = desk.ask("a", decode=lambda item, context, reply: seen.append(reply.sent_at_s))
    await turns()
    clock[0] += 0.5
    await desk.lose()
    desk.wire.answer()
    await asked
    assert seen == [100.5]


# --- order ----------------------------------------------------------------------------------------


async def test_repeats_go_first_and_in_their_old_order(desk: Desk) -> None:
    """Over several flights, ahead of calls of the same kind that came later."""
    asked = []
    for names in ("a b", "c", "d e"):
        asked += desk.ask_many(names, one=ENQUEUE)
        await turns()
    asked += desk.ask_many("f g", one=ENQUEUE)

    log = await desk.lose()
    assert log[2:] == ["outbox/enqueue again a b c d e", "outbox/enqueue f g"]
    desk.wire.answer()
    assert await asyncio.gather(*asked) == list("abcdefg")


async def test_commands_keep_their_order_as_well(desk: Desk) -> None:
    """The command whose flight left first is repeated first, and unsent ones follow."""
    desk.ask("a", one=ENQUEUE)
    desk.ask("b", one=CLAIM)
    await turns()
    desk.ask("c")
    await turns()
    desk.ask("d", one=ENQUEUE)
    await turns()
    desk.ask("e", one=GET)

    log = await desk.lose()
    assert log[2:] == [
        *("outbox/enqueue again a d", "outbox/claim b", "outbox/ack again c"),
        "outbox/get e",
    ]


async def test_more_repeats_than_a_flight_holds_are_not_overtaken(desk: Desk) -> None:
    """Three full flights come back; a call that came later leaves after the last of them."""
    names = [f"n{number}" for number in range(3 * FLIGHT_ROWS)]
    asked = [desk.ask(name, one=ENQUEUE) for name in names]
    await turns()
    asked.append(desk.ask("late", one=ENQUEUE))
    asked.append(desk.ask("later", one=ACK))
    log = await desk.lose()
    while desk.wire.flights:
        desk.wire.answer()
        await turns(3)

    sent = [name for line in log[2:] for name in line.split() if name[0] in "nl"]
    assert sent == [*names, "late", "later"]
    assert log[-2:] == ["outbox/enqueue late", "outbox/ack later"]
    assert await asyncio.gather(*asked) == [*names, "late", "later"]


async def test_callers_repeats_have_no_precedence_of_their_own(desk: Desk) -> None:
    """Only what came back from a flight goes first; a stream of repeats starves nobody."""
    for number in range(3):  # three flights are under way
        desk.ask(f"x{number}")
        await turns()
    for number in range(2 * FLIGHT_ROWS):
        desk.ask(f"n{number}", repeat=True)
    desk.ask("quiet", one=GET)
    desk.wire.log.clear()
    desk.wire.answer()
    desk.wire.answer()
    await turns(3)
    assert desk.wire.log[1].split()[:2] == ["outbox/get", "quiet"]


# --- the old connection ---------------------------------------------------------------------------


async def test_nothing_leaves_before_the_old_connection_is_gone(desk: Desk) -> None:
    """Neither repeats nor new calls, though the new connection is open."""
    asked = desk.ask("a")
    desk.wire.holds_kills = True
    assert await desk.lose() == ["connect 8", "CLIENT KILL ID 7"]
    late = desk.ask("b")
    await turns(10)
    assert desk.wire.flights == []

    desk.wire.kills.pop().set_result([1])
    await turns(5)
    assert desk.wire.log[2:] == ["outbox/ack again a", "outbox/ack b"]
    desk.wire.answer()
    assert await asyncio.gather(asked, late) == ["a", "b"]


async def test_a_connection_that_ends_before_the_old_one_is_gone(desk: Desk) -> None:
    """The next one asks for it again; nothing was sent on the one between."""
    desk.ask("a")
    desk.wire.holds_kills = True
    await desk.lose()
    desk.wire.holds_kills = False
    desk.wire.break_down()
    await asyncio.wait([desk.coalescer._reconnecting], timeout=1)
    await turns(5)
    assert desk.wire.log[2:] == ["connect 9", "CLIENT KILL ID 7", "outbox/ack again a"]


async def test_an_old_connection_is_ended_though_nobody_waits(desk: Desk) -> None:
    """Its caller may ask again by name, and must not be overtaken by its own first request."""
    desk.ask("a").cancel()
    asked = desk.ask("b")
    await turns()
    asked.cancel()
    desk.wire.log.clear()
    desk.wire.break_down()
    await turns()
    desk.ask("c")
    await turns(10)
    assert desk.wire.log == ["connect 8", "CLIENT KILL ID 7", "outbox/ack c"]


async def test_a_connection_that_carried_nothing_is_left_alone(desk: Desk) -> None:
    """Nothing can be stuck there."""
    await turns()
    desk.wire.log.clear()
    desk.wire.break_down()
    desk.ask("a")
    await turns(10)
    assert desk.wire.log == ["connect 8", "outbox/ack a"]


async def test_a_server_that_was_started_again_has_no_old_connection(desk: Desk) -> None:
    """The id would be another client's there: it is not ended, and the call is repeated."""
    desk.ask("a")
    desk.wire.process = "two"
    assert await desk.lose() == ["connect 8", "outbox/ack again a"]


@pytest.mark.parametrize("answer", [0, 1])
async def test_an_old_connection_that_is_gone_already_is_fine(desk: Desk, answer: int) -> None:
    """The server answers how many it ended."""
    desk.wire.kill_answer = answer
    desk.ask("a")
    assert (await desk.lose())[-1] == "outbox/ack again a"


async def test_without_the_right_to_end_it_nothing_is_repeated(desk: Desk) -> None:
    """The caller is told why, and that the name is safe; reads and unsent calls go on."""
    lost = desk.ask_many("a b")
    read = desk.ask("c", one=GET)
    desk.wire.holds_kills = True
    log = await desk.lose()
    unsent = desk.ask("d")
    desk.wire.kills.pop().set_result([NOPERM])
    await turns(5)

    assert log == ["connect 8", "CLIENT KILL ID 7", "outbox/get c", "outbox/ack d"]
    for asked in lost:
        with pytest.raises(OutcomeUnknown, match=r"refuses CLIENT KILL \(NOPERM\).*repeat=True"):
            await asked
    desk.wire.answer()
    assert await asyncio.gather(read, unsent) == ["c", "d"]
    assert desk.coalescer.queued_rows == 0


async def test_without_an_id_nothing_is_repeated(desk: Desk) -> None:
    """In memory, or where the server does not tell: nobody can say which one to end."""
    desk.wire.knows_ids = False
    desk.wire.break_down()
    read = desk.ask("r", one=GET)
    await turns(10)
    lost = desk.ask("a")
    assert await desk.lose() == ["connect None", "outbox/get r"]
    with pytest.raises(OutcomeUnknown, match="may or may not have been applied"):
        await lost
    desk.wire.answer()
    assert await read == "r"


# --- bounds ---------------------------------------------------------------------------------------


async def test_repeats_are_bounded_in_number(desk: Desk) -> None:
    """Sent three times in all, then the caller decides."""
    asked = desk.ask("a")
    for number in range(REPEATS_MAX):
        assert (await desk.lose())[-1] == "outbox/ack again a", number
    assert (await desk.lose())[1:] == []

    with pytest.raises(OutcomeUnknown, match=r"the connection broke .*\(asked 3 times\)"):
        await asked
    assert desk.coalescer.queued_rows == 0


async def test_repeats_are_bounded_in_time(desk: Desk, clock: list[float]) -> None:
    """Two time limits after the first sending it is too late, however few repeats there were."""
    asked = desk.ask("a")
    await turns()
    clock[0] += 1.9
    assert (await desk.lose())[-1] == "outbox/ack again a"
    clock[0] += 0.2
    assert await desk.lose() == []
    with pytest.raises(OutcomeUnknown):
        await asked


async def test_a_connection_that_comes_back_too_late(desk: Desk, clock: list[float]) -> None:
    """What waited for it is not sent any more; what was never sent is."""
    asked = desk.ask("a")
    desk.wire.holds_kills = True
    await desk.lose()
    unsent = desk.ask("b")
    clock[0] += 2.1
    desk.wire.kills.pop().set_result([1])
    await turns(5)

    assert desk.wire.log[2:] == ["outbox/ack b"]
    with pytest.raises(OutcomeUnknown, match="came back too late"):
        await asked
    desk.wire.answer()
    assert await unsent == "b"


async def test_a_read_is_not_asked_for_ever(desk: Desk, clock: list[float]) -> None:
    """After the same time its caller learns that nothing was changed."""
    asked = desk.ask("a", one=GET)
    await desk.lose()
    clock[0] += 2.1
    await desk.lose()
    with pytest.raises(Unavailable, match="nothing was changed; try again"):
        await asked


async def test_a_connection_that_does_not_come_back(desk: Desk) -> None:
    """The caller of a lost call does not hear that nothing was applied; that of an unsent one does."""
    desk.coalescer._timeout_s = 0.02
    lost = desk.ask("a")
    await turns()

    async def refuse() -> None:
        raise Unavailable("host is down")

    desk.wire.connect = refuse  # type: ignore[method-assign]
    await desk.lose()
    unsent = desk.ask("b")
    await asyncio.wait([lost, unsent])

    assert isinstance(lost.exception(), OutcomeUnknown)
    assert isinstance(unsent.exception(), Unavailable)
    assert desk.coalescer.queued_rows == 0


async def test_closing_waits_for_repeats_but_not_for_ever(desk: Desk) -> None:
    """A repeat under way is answered; what is lost by the closing itself is unknown."""
    asked = desk.ask("a")
    await desk.lose()
    closing = asyncio.create_task(desk.coalescer.close())
    await turns()
    desk.wire.answer()
    await closing
    assert await asked == "a"


async def test_a_call_that_closing_cuts_off_is_unknown(desk: Desk) -> None:
    """Nothing is repeated on a closed client."""
    desk.coalescer._timeout_s = 0.02
    asked = desk.ask("a")
    await desk.lose()
    await desk.coalescer.close()
    await turns(5)
    assert isinstance(asked.exception(), OutcomeUnknown)
    assert not desk.wire.is_connected


# --- callers who gave up --------------------------------------------------------------------------


async def test_a_lost_call_that_nobody_waits_for_is_not_repeated(desk: Desk) -> None:
    """Neither if its caller gave up before the loss, nor after it."""
    before, after, waits = desk.ask_many("a b c")
    await turns()
    before.cancel()
    desk.wire.break_down()
    await turns(1)
    after.cancel()
    await turns(10)
    assert desk.wire.log[-1] == "outbox/ack again c"
    desk.wire.answer()
    assert await waits == "c"
    assert desk.coalescer.queued_rows == 0


async def test_a_grant_that_nobody_waits_for_is_repeated_to_be_undone(desk: Desk) -> None:
    """Whether it was granted only the repeat can tell; then it is given back."""
    asked = desk.ask("a", one=CLAIM, undo=desk.undone.append)
    await turns()
    asked.cancel()
    assert (await desk.lose())[-1] == "outbox/claim a"
    desk.wire.answer()
    await turns()
    assert desk.undone == ["a"]
    assert desk.coalescer.queued_rows == 0
