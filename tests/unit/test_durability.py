"""Classes of durability: their text, and what a coalescer of each sends and makes of the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from redis.exceptions import ResponseError

import leasekit
from leasekit import Durability, NotDurable, coalesce, replicated, scripts
from leasekit.coalesce import Coalescer, Reply
from leasekit.connect import ConnectionLost
from leasekit.durability import FSYNC_SETTINGS, durability_of
from leasekit.errors import Conflict, InvalidInput, LeasekitError, Unavailable
from leasekit.scripts import script

ACK = script("outbox/ack", item=("id", "token"))
GET = script("outbox/get", item=("id",))
CLAIM = script("outbox/claim", item=("claim_id", "limit", "consumer"))
NAMES = {one.sha(shebang=True): name for name, one in scripts.read_scripts().items()}
NOW_MS = 10
SYNCED = [{name.encode(): value.encode()} for name, value in FSYNC_SETTINGS.items()]


# --- the classes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("none", "none"),
        ("fsync", "fsync"),
        ("replicated(2)", "replicated(2)"),
        ("replicated( 1 , timeout_ms = 20 )", "replicated(1, timeout_ms=20)"),
        (replicated(), "replicated(1)"),
        (replicated(3, timeout_ms=1_000), "replicated(3)"),
        (Durability("fsync", 3, 7), "fsync"),
        (Durability("none", 1), "none"),
        (Durability("replicated", 100, 600_000), "replicated(100, timeout_ms=600000)"),
    ],
)
def test_a_class_is_read_from_its_text(value: Any, text: str) -> None:
    """Text and class are two forms of the same; one class is one value, whoever wrote it."""
    found = durability_of(value)

    assert str(found) == text
    assert durability_of(text) == found
    assert {found: 1}[durability_of(found)] == 1


@pytest.mark.parametrize(
    "value",
    [
        *("", "None", "aof", "replicated", "replicated()", "replicated(0)", "replicated(101)"),
        *(
            "replicated(-1)",
            "replicated(1",
            "replicated(1)x",
            "replicated(1, 5)",
            "replicated(1.0)",
        ),
        *("replicated(1, timeout_ms=0)", "replicated(1, timeout_ms=600001)", "fsync "),
        *(None, 1, True, ["none"], b"none"),
        *(Durability("replicated"), Durability("replicated", 1, 0), Durability("replicated", True)),
        Durability("both"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_class_is_refused(value: Any) -> None:
    """Before anything is sent, in words that say what is one."""
    with pytest.raises(InvalidInput, match="durability"):
        durability_of(value)


@pytest.mark.parametrize("number", [0, 101, True, "1", 1.0])
def test_replicated_takes_a_number_of_replicas(number: Any) -> None:
    """1..100 whole ones, and a time to wait for them that is one."""
    with pytest.raises(InvalidInput, match="replicas"):
        replicated(number)
    if number != 101:
        with pytest.raises(InvalidInput, match="timeout_ms"):
            replicated(1, timeout_ms=number)


# --- flights --------------------------------------------------------------------------------------


class PlayedWire:
    """Records flights; the test answers them. `told` is what the server says when it is asked for the
    class at a connection."""

    client_id = 1

    def __init__(self, told: Sequence[Any]) -> None:
        self.told = list(told)
        self.is_connected = False
        self.asked: list[list[Sequence[Any]]] = []
        self.loaded: list[str] = []
        self.flights: list[tuple[list[Sequence[Any]], asyncio.Future[list[Any]]]] = []

    async def connect(self) -> None:
        self.is_connected = True

    def send(self, commands: Sequence[Sequence[Any]]) -> asyncio.Future[list[Any]]:
        future: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        loads = [one for one in commands if one[:2] == ("SCRIPT", "LOAD")]
        rest = list(commands[len(loads) :])
        if not self.is_connected:
            future.set_exception(ConnectionLost("there is no connection", sent=False))
        elif rest and rest[0][0] == "EVALSHA":
            self.flights.append((rest, future))
        elif rest and rest[0][0] == "CLIENT":
            future.set_result([1] * len(rest))
        else:
            self.loaded += [str(one[2]) for one in loads]
            self.asked.append(rest[1:])
            future.set_result([b"sha"] * len(loads) + [b"run_id:1"] * bool(rest) + self.told)
        return future

    async def close(self) -> None:
        self.is_connected = False

    def lose(self) -> None:
        """The connection ends, whatever is under way."""
        self.is_connected = False
        flights, self.flights = self.flights, []
        for _, future in flights:
            future.set_exception(ConnectionLost("the connection broke", sent=True))

    @property
    def sent(self) -> list[list[str]]:
        """The commands of each flight under way: scripts by name, others as they are."""
        return [
            [NAMES.get(one[1]) or " ".join(map(str, one)) for one in commands]
            for commands, _ in self.flights
        ]

    async def answer(self, *end: Any, **of_script: Any) -> None:
        """Answer the oldest flight: each item with its first field, a script as named, then `end`."""
        commands, future = self.flights.pop(0)
        replies: list[Any] = []
        for command in commands[: len(commands) - len(end)]:
            one = scripts.read_scripts()[NAMES[command[1]]]
            fields = command[3 + len(one.keys) + len(one.arguments) :]
            plain = [NOW_MS, *fields[:: len(one.item)]]
            replies.append(of_script.get(one.name.partition("/")[2], plain))
        future.set_result([*replies, *end])
        await turns()


async def turns(count: int = 4) -> None:
    """Let the event loop run what is due."""
    for _ in range(count):
        await asyncio.sleep(0)


def bind(one: scripts.Script, variant: tuple[Any, ...], repeat: bool) -> Sequence[Any]:
    return one.bind(dict.fromkeys(one.keys, "k"), dict.fromkeys(one.arguments, "a"))


class Desk:
    """A coalescer of a class, and what its calls undid."""

    def __init__(self, durability: Durability, told: Sequence[Any], timeout_ms: int) -> None:
        self.wire = PlayedWire(told)
        self.undone: list[Any] = []
        self.coalescer = Coalescer(
            self.wire,
            shebang=True,
            timeout_ms=timeout_ms,
            durability=durability,
            barrier_key=lambda tenant: f"barrier of {tenant}",
        )

    async def ask(
        self,
        name: str,
        one: scripts.Script = ACK,
        *,
        tenant: str = "t",
        decode: Callable[[Any, Any, Reply], Any] = lambda item, context, reply: item,
        **options: Any,
    ) -> asyncio.Future[Any]:
        fields = [name, *["f"] * (len(one.item) - 1)]
        asked = self.coalescer.submit(one, tenant, (), bind, fields, decode, **options)
        asked.add_done_callback(lambda future: future.cancelled() or future.exception())
        await asyncio.sleep(0)
        return asked


async def desk_of(
    durability: Durability, *, told: Sequence[Any] = (0,), timeout_ms: int = 60_000
) -> Desk:
    desk = Desk(durability, told, timeout_ms)
    await desk.coalescer.start()
    return desk


@pytest.fixture
async def desk() -> Desk:
    """One of replicated(2)."""
    return await desk_of(replicated(2))


async def test_none_sends_what_it_always_sent() -> None:
    """No command beside the calls, and no question at a connection."""
    desk = await desk_of(durability_of("none"), told=())
    await desk.ask("a", CLAIM, lease_ms=8)

    assert desk.wire.sent == [["outbox/claim"]]
    assert desk.wire.asked == [[]]


async def test_fsync_sends_what_none_sends() -> None:
    """The server syncs before it answers; nothing is asked of it but its settings, once."""
    desk = await desk_of(durability_of("fsync"), told=SYNCED)
    await desk.ask("a", CLAIM, lease_ms=8)

    assert desk.wire.sent == [["outbox/claim"]]
    assert [command[:2] for command in desk.wire.asked[0]] == [("CONFIG", "GET")] * 3


async def test_a_flight_ends_with_a_write_and_a_wait(desk: Desk) -> None:
    """One of each, behind all its calls, and the write in the slot of its first tenant."""
    calls = [
        desk.ask("a"),
        desk.ask("b", tenant="u"),
        desk.ask("c", CLAIM),
    ]
    asked = [asyncio.ensure_future(call) for call in calls]
    await turns()

    assert desk.wire.sent == [
        ["outbox/ack", "outbox/ack", "outbox/claim", "tenant/barrier", "WAIT 2 1000"]
    ]
    barrier = desk.wire.flights[0][0][-2]
    assert barrier[2:] == (1, "barrier of t", "")
    await desk.wire.answer([NOW_MS], 2)
    assert [await (await one) for one in asked] == ["a", "b", "c"]


async def test_more_replicas_than_asked_for_are_enough(desk: Desk) -> None:
    """WAIT answers how many have it, which may be more."""
    asked = await desk.ask("a")
    await desk.wire.answer([NOW_MS], 3)

    assert await asked == "a"


@pytest.mark.parametrize(
    ("options", "leases", "waits_ms"),
    [
        ({}, [], 1_000),
        ({}, [None, 30_000], 1_000),
        ({}, [4_000, 400, 40_000], 100),
        ({}, [3], 1),
        ({}, [0], 1),
        ({"timeout_ms": 1_000}, [], 250),  # two flights wait one after the other: half in all
        ({"timeout_ms": 1}, [], 1),
    ],
)
async def test_a_wait_is_no_longer_than_lease_and_timeout_allow(
    options: Any, leases: list[int | None], waits_ms: int
) -> None:
    """A quarter of the shortest lease, half the client's timeout, and never without end (0)."""
    desk = await desk_of(replicated(1), **options)
    calls = [asyncio.ensure_future(desk.ask("a", CLAIM, lease_ms=one)) for one in leases or [None]]
    await turns()

    assert desk.wire.sent == [["outbox/claim", "tenant/barrier", f"WAIT 1 {waits_ms}"]]
    assert len(calls) == max(len(leases), 1)


async def test_two_flights_are_under_way() -> None:
    """The server works on none while it waits: more would only wait longer than their timeout."""
    desk = await desk_of(replicated(1))
    for name in "abcd":
        await desk.ask(name)

    assert len(desk.wire.sent) == 2
    await desk.wire.answer([NOW_MS], 1)
    assert [names[0] for names in desk.wire.sent] == ["outbox/ack"] * 2


async def test_a_flight_that_only_reads_waits_for_nobody(desk: Desk) -> None:
    """What it tells is on this server, as with any class."""
    asked = await desk.ask("a", GET)

    assert desk.wire.sent == [["outbox/get"]]
    await desk.wire.answer()
    assert await asked == "a"


# --- short barriers -------------------------------------------------------------------------------


async def test_too_few_replicas_is_not_durable(desk: Desk) -> None:
    """The caller learns how many have it, that it stands here, and what is safe."""
    asked = await desk.ask("a")
    await desk.wire.answer([NOW_MS], 1)

    with pytest.raises(
        NotDurable, match=r"outbox/ack: 1 of the 2 .* stands .* repeat=True"
    ) as told:
        await asked
    assert (told.value.reached, told.value.wanted, told.value.tenant) == (1, 2, "t")


async def test_a_grant_that_falls_short_is_undone(desk: Desk) -> None:
    """By what was granted, once; its caller is told that it is given back."""
    asked = await desk.ask("a", CLAIM, undo=desk.undone.append)
    await desk.wire.answer([NOW_MS], 0)

    with pytest.raises(NotDurable, match="given back"):
        await asked
    assert desk.undone == ["a"]


async def test_a_cancelled_grant_that_falls_short_is_undone_once(desk: Desk) -> None:
    """As with every class."""
    asked = await desk.ask("a", CLAIM, undo=desk.undone.append)
    asked.cancel()
    await desk.wire.answer([NOW_MS], 0)

    assert desk.undone == ["a"]


async def test_a_refusal_stays_what_it_is(desk: Desk) -> None:
    """Errors of a call are told, whether or not replicas have what was not written."""
    conflict = Conflict("taken")
    one = await desk.ask("a", undo=desk.undone.append, decode=lambda *_: conflict)
    await desk.wire.answer([NOW_MS], 0)
    with pytest.raises(Conflict, match="taken"):
        await one
    other = await desk.ask("b", undo=desk.undone.append)
    await desk.wire.answer([NOW_MS], 0, ack=ResponseError("READONLY no"))
    with pytest.raises(Unavailable, match="READONLY"):
        await other
    assert desk.undone == []


async def test_reading_beside_writing_is_answered(desk: Desk) -> None:
    """Only the calls that may have written fall short."""
    read = asyncio.ensure_future(desk.ask("a", GET))
    write = asyncio.ensure_future(desk.ask("b"))
    await turns()
    assert desk.wire.sent[0][:2] == ["outbox/get", "outbox/ack"]
    await desk.wire.answer([NOW_MS], 1)

    assert await (await read) == "a"
    with pytest.raises(NotDurable):
        await (await write)


@pytest.mark.parametrize(
    ("moved", "reached", "says"),
    [
        ([NOW_MS], ResponseError("NOPERM no wait"), r"refused the WAIT \(NOPERM\)"),
        ([NOW_MS], ResponseError("ERR unknown command 'WAIT'"), r"refused the WAIT \(ERR\)"),
        (ResponseError("NOPERM no hset"), 2, r"refused the barrier's write \(NOPERM\)"),
        (ResponseError("READONLY no"), ResponseError("ERR a replica"), "barrier's write"),
        ([NOW_MS], None, "0 of the 2"),
        ([NOW_MS], b"2", "0 of the 2"),
        ([NOW_MS], True, "0 of the 2"),
    ],
)
async def test_no_odd_answer_passes(desk: Desk, moved: Any, reached: Any, says: str) -> None:
    """Whatever is not a number of replicas, and enough of them behind a write, falls short."""
    asked = await desk.ask("a")
    await desk.wire.answer(moved, reached)

    with pytest.raises(NotDurable, match=says):
        await asked


async def test_scripts_that_were_lost_are_loaded_with_their_barrier(desk: Desk) -> None:
    """Nothing was run: it is sent again, and waits again."""
    asked = await desk.ask("a")
    gone = ResponseError("NOSCRIPT no matching script")
    desk.wire.loaded.clear()
    await desk.wire.answer(gone, 2, ack=gone)

    assert any("tenant/barrier" in text for text in desk.wire.loaded)
    assert desk.wire.sent == [["outbox/ack", "tenant/barrier", "WAIT 2 1000"]]
    await desk.wire.answer([NOW_MS], 1)
    with pytest.raises(NotDurable):
        await asked


async def test_a_lost_barrier_alone_falls_short_and_is_loaded(desk: Desk) -> None:
    """The calls were run and nothing was written behind them: WAIT's answer means nothing."""
    asked = await desk.ask("a")
    desk.wire.loaded.clear()
    await desk.wire.answer(ResponseError("NOSCRIPT no matching script"), 2)

    with pytest.raises(NotDurable, match="NOSCRIPT"):
        await asked
    assert any("tenant/barrier" in text for text in desk.wire.loaded)


async def test_a_repeat_waits_as_well(desk: Desk) -> None:
    """It may write nothing, which is why the barrier always does."""
    asked = await desk.ask("a")
    desk.wire.lose()
    await turns(20)

    assert desk.wire.sent == [["outbox/ack", "tenant/barrier", "WAIT 2 1000"]]
    await desk.wire.answer([NOW_MS], 1)
    with pytest.raises(NotDurable):
        await asked


# --- connections ----------------------------------------------------------------------------------


def wrong(name: str, value: bytes) -> list[Any]:
    return [{name.encode(): value} if name.encode() in one else one for one in SYNCED]


REFUSED = ResponseError("NOPERM no")


@pytest.mark.parametrize(
    ("durability", "told", "says"),
    [
        ("replicated(1)", [ResponseError("ERR a replica")], r"refuses WAIT \(ERR\)"),
        ("replicated(1)", [REFUSED], r"\+wait"),
        ("fsync", wrong("appendonly", b"no"), "CONFIG SET appendonly yes"),
        ("fsync", wrong("appendfsync", b"everysec"), "CONFIG SET appendfsync always"),
        ("fsync", wrong("no-appendfsync-on-rewrite", b"yes"), "on-rewrite no"),
        ("fsync", [REFUSED] * 3, r"\+config\|get"),
        ("fsync", [SYNCED[0], REFUSED, SYNCED[2]], r"\+config\|get"),
        ("fsync", [{}] * 3, "appendonly missing"),
    ],
)
async def test_a_server_that_cannot_keep_a_class_is_refused(
    durability: str, told: Sequence[Any], says: str
) -> None:
    """At the first connection, and at each later one: what is to be sent then fails in time."""
    with pytest.raises(Unavailable, match=says):
        await desk_of(durability_of(durability), told=told)

    good = SYNCED if durability == "fsync" else [0]
    desk = await desk_of(durability_of(durability), told=good, timeout_ms=1)
    desk.wire.lose()
    desk.wire.told = list(told)
    for name in "ab":  # the second one finds an open connection, and it is none that will do
        asked = await desk.ask(name)
        with pytest.raises(Unavailable, match=says):
            await asked
    assert desk.wire.flights == []
    desk.wire.told = list(good)
    await desk.ask("c")
    await turns(20)
    assert len(desk.wire.flights) == 1


def test_replicated_needs_a_barrier() -> None:
    """Without one it would pass in silence."""
    with pytest.raises(TypeError, match="barrier"):
        Coalescer(PlayedWire([]), shebang=True, timeout_ms=1, durability=replicated())


@pytest.mark.parametrize("durability", ["replicated(1)", "fsync"])
async def test_memory_is_refused(durability: str) -> None:
    """It has neither copies nor a disk; for the client, and for a single call."""
    with pytest.raises(Unavailable, match="memory://"):
        await leasekit.connect("memory://", durability=durability)
    async with leasekit.connect("memory://") as kit:
        outbox = kit.tenant("o", "w").outbox
        with pytest.raises(Unavailable, match="memory://"):
            await outbox.enqueue("l", "t", 1, durability=durability)
        assert (await outbox.enqueue("l", "t", 1, durability="none")).created


async def test_the_environment_names_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """LEASEKIT_DURABILITY, where the client is told none; what it says is checked as well."""
    monkeypatch.setenv("LEASEKIT_DURABILITY", "fsync")
    with pytest.raises(Unavailable, match="durability fsync"):
        await leasekit.connect("memory://")
    async with leasekit.connect("memory://", durability="none") as kit:
        assert str(kit.durability) == "none"
    monkeypatch.setenv("LEASEKIT_DURABILITY", "always")
    with pytest.raises(InvalidInput):
        leasekit.connect("memory://")


def test_a_short_barrier_is_a_leasekit_error() -> None:
    """With the numbers that a caller decides by."""
    error = NotDurable("x", reached=1, wanted=2, tenant="t", id="i")
    assert isinstance(error, LeasekitError)
    assert (error.reached, error.wanted, error.tenant, error.id) == (1, 2, "t", "i")
    assert coalesce.FLIGHTS_MAX_WAITING <= coalesce.FLIGHTS_MAX
