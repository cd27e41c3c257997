"""The client as a whole: connecting and closing, tenants, clocks, refusals, servers in trouble."""

from __future__ import annotations

import asyncio
import itertools
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from servers import Server, ServerProcess, dump

import leasekit
from leasekit import (
    Conflict,
    CorruptState,
    Draft,
    InvalidInput,
    Leasekit,
    LeasekitError,
    Overloaded,
    Retention,
    Tenant,
    Unavailable,
)

Connect = Callable[..., Awaitable[Leasekit]]
State = Callable[[], dict[str, Any]]
PrivateServer = Callable[..., ServerProcess]

TOKEN_A, TOKEN_B = "a" * 22, "b" * 22
M1, M2 = f"{1:026}", f"{2:026}"
SECRET = "correct-horse-battery"


@pytest.fixture
def prefix(tenant_name: str) -> str:
    """A prefix, and so a tenant registry, of the test's own."""
    return f"p-{tenant_name}"


# --- connecting and closing -----------------------------------------------------------------------


async def test_connect_can_be_awaited_or_entered(server: Server) -> None:
    """Both give a working client; the context manager closes it."""
    kit = await leasekit.connect(server.url)
    assert await kit.tenant("o", "w").leases.get("n") is None
    await kit.close()
    async with leasekit.connect(server.url) as kit:
        assert await kit.tenant("o", "w").leases.get("n") is None
    with pytest.raises(Unavailable, match="closing or closed: nothing was sent"):
        await kit.tenant("o", "w").leases.get("n")


async def test_a_connection_can_be_opened_again_but_not_twice_at_once(server: Server) -> None:
    """One connect() is one client at a time."""
    connecting = leasekit.connect(server.url)
    async with connecting:
        with pytest.raises(Unavailable, match="open already"):
            await connecting.__aenter__()
    async with connecting as kit:
        assert await kit.tenant("o", "w").leases.get("n") is None


async def test_closing_finishes_what_was_asked(server: Server, tenant_name: str) -> None:
    """Calls under way are answered, not dropped; later ones are refused; twice is once."""
    kit = await leasekit.connect(server.url)
    outbox = kit.tenant(tenant_name, "w").outbox
    await outbox.claim("mail", "alice", consumer="a")
    asked = [asyncio.create_task(outbox.enqueue("mail", "alice", n)) for n in range(500)]
    await asyncio.sleep(0)
    await kit.close()
    await kit.close()

    enqueued = await asyncio.gather(*asked)
    assert all(one.created for one in enqueued)
    async with leasekit.connect(server.url) as again:
        assert (await again.tenant(tenant_name, "w").outbox.counts()).pending == 500


async def test_a_claim_given_up_while_closing_is_given_back(
    server: Server, tenant_name: str
) -> None:
    """The rows do not stay taken until their lease ends."""
    kit = await leasekit.connect(server.url)
    outbox = kit.tenant(tenant_name, "w").outbox
    await outbox.enqueue("mail", "alice", 1)
    claiming = asyncio.create_task(outbox.claim("mail", "alice", consumer="a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    claiming.cancel()
    await kit.close()
    async with leasekit.connect(server.url) as again:
        counts = await again.tenant(tenant_name, "w").outbox.counts()
        assert (counts.pending, counts.claimed) == (1, 0)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"clock": "local"}, "clock"),
        ({"prefix": "a:b"}, "prefix"),
        ({"prefix": ""}, "prefix"),
        ({"timeout_ms": 0}, "timeout_ms"),
        ({"timeout_ms": True}, "timeout_ms"),
        ({"timeout_ms": 600_001}, "timeout_ms"),
        ({"payload_bytes_max": 0}, "payload_bytes_max"),
        ({"payload_bytes_max": 1024 * 1024 + 1}, "payload_bytes_max"),
        ({"retention": Retention(finished_ms=-1)}, "retention.finished_ms"),
        ({"retention": Retention(dedupe_ms=0)}, "retention.dedupe_ms"),
        ({"retention": Retention(dead_count=True)}, "retention.dead_count"),
        ({"retention": Retention(finished_bytes=2**53)}, "retention.finished_bytes"),
        ({"retention": Retention(dead_ms=1.0)}, "retention.dead_ms"),  # type: ignore[arg-type]
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], field: str) -> None:
    """Before anything is connected, naming the field."""
    with pytest.raises(InvalidInput, match=field) as raised:
        leasekit.connect("memory://", **options)
    assert raised.value.field == field


async def test_a_client_says_where_it_is_connected(kit: Leasekit, server: Server) -> None:
    """Server, queue and flights, for people; no secrets."""
    assert kit.server.url in repr(kit)
    assert "0 queued, 0 in flight" in repr(kit)
    assert kit.server.name in ("redis", "valkey", "memory")
    assert kit.server.shebang == server.knows_flags


# --- tenants --------------------------------------------------------------------------------------

HOSTILE = [
    "}",
    "{",
    "{}",
    "*",
    "t?",
    "t[12]",
    "t1}:x",
    "a b",
    "\x00",
    "\U0001f600",
    "\u00e9",
    "e\u0301",
]


async def test_hostile_tenants_stay_apart(connected: Connect, prefix: str) -> None:
    """Whatever they are called: the same row in each, each seen by its own tenant alone."""
    kit = await connected(prefix=prefix)
    names = [*HOSTILE, *[f"t1{odd}" for odd in HOSTILE], "t", "t1", "é" * 32]
    tenants = [kit.tenant(name, name) for name in names]
    await asyncio.gather(
        *[one.outbox.enqueue("l", "t", n, id=M1, now_ms=0) for n, one in enumerate(tenants)]
    )

    for number, tenant in enumerate(tenants):
        page = await tenant.outbox.list(now_ms=0)
        assert [row.payload for row in page.items] == [number]
        assert tenant.context.org_id == names[number]
    assert {one.tag for one in (await kit.tenants()).items} == {one.tag for one in tenants}


@pytest.mark.parametrize("name", ["", " ", "a" * 65, "\ud800", 7, None, True])
def test_a_tenant_that_cannot_be_is_refused(kit: Leasekit, name: Any) -> None:
    """Nothing is sent for it."""
    with pytest.raises(InvalidInput, match="tenant org"):
        kit.tenant(name, "w")


@pytest.mark.parametrize("actor", ["", " ", "a" * 201, "\ud800", 7, True])
def test_an_actor_that_cannot_be_is_refused(kit: Leasekit, actor: Any) -> None:
    """It goes into records, so it is text like theirs."""
    with pytest.raises(InvalidInput, match="actor"):
        kit.tenant("o", "w", actor=actor)


async def test_the_first_write_registers_a_tenant_and_a_read_does_not(
    connected: Connect, prefix: str
) -> None:
    """Looking at a tenant leaves no trace of it."""
    kit = await connected(prefix=prefix)
    seen = kit.tenant("seen", "w")
    await seen.outbox.get(M1, now_ms=0)
    await seen.outbox.list(now_ms=0)
    await seen.outbox.counts(now_ms=0)
    await seen.leases.get("n", now_ms=0)
    await seen.leases.list(now_ms=0)
    await seen.idempotency.get("op", "k", now_ms=0)
    await seen.idempotency.list(now_ms=0)
    assert (await kit.tenants()).items == []

    await seen.leases.acquire("n", ttl_ms=1, owner="a", now_ms=0)
    [found] = (await kit.tenants()).items
    assert found is seen


def writes(tenant: Tenant) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Every call that writes, with good arguments, at 10."""
    outbox, leases, keys = tenant.outbox, tenant.leases, tenant.idempotency
    at: dict[str, Any] = {"now_ms": 10}
    draft = Draft(lane="l", target="t", payload=1)
    said = {"actor": "ops", "reason": "r"}
    return {
        "enqueue": lambda: outbox.enqueue("l", "t", 1, **at),
        "enqueue_many": lambda: outbox.enqueue_many([draft], **at),
        "claim": lambda: outbox.claim("l", "t", consumer="a", **at),
        "ack": lambda: outbox.ack(M1, TOKEN_A, **at),
        "nack": lambda: outbox.nack(M1, TOKEN_A, error="e", **at),
        "extend": lambda: outbox.extend(M1, TOKEN_A, **at),
        "release": lambda: outbox.release(M1, TOKEN_A, **at),
        "cancel": lambda: outbox.cancel(M1, **at),
        "redrive": lambda: outbox.redrive(M1, **at),
        "resolve": lambda: outbox.resolve(M1, "sent", **said, **at),
        "lease acquire": lambda: leases.acquire("n", ttl_ms=1, owner="a", **at),
        "lease extend": lambda: leases.extend("n", TOKEN_A, ttl_ms=1, **at),
        "lease release": lambda: leases.release("n", TOKEN_A, **at),
        "reserve": lambda: keys.reserve("op", "k", owner="a", fingerprint="f", **at),
        "complete": lambda: keys.complete("op", "k", 1, token=TOKEN_A, **at),
        "withdraw": lambda: keys.release("op", "k", token=TOKEN_A, **at),
    }


async def test_a_tenant_is_kept_on_one_clock(
    connected: Connect, server: Server, prefix: str
) -> None:
    """Written on the server's clock, it refuses every write on a caller's, and keeps as it is."""
    live = await connected(prefix=prefix, clock="server")
    await live.tenant("o", "w").outbox.enqueue("l", "t", 1, id=M1)
    before = dump(server.raw, prefix, "o.w"), dump(server.raw, prefix, "tenants")
    other = (await connected(prefix=prefix)).tenant("o", "w")

    for name, write in writes(other).items():
        with pytest.raises(InvalidInput, match="is kept on the other clock") as raised:
            await write()
        assert raised.value.field == "clock", name
    assert before == (dump(server.raw, prefix, "o.w"), dump(server.raw, prefix, "tenants"))


async def test_a_callers_tenant_refuses_the_servers_clock(connected: Connect, prefix: str) -> None:
    """The other way round."""
    await (
        (await connected(prefix=prefix))
        .tenant("o", "w")
        .leases.acquire("n", ttl_ms=1, owner="a", now_ms=0)
    )
    live = await connected(prefix=prefix, clock="server")
    with pytest.raises(InvalidInput, match="kept on the other clock"):
        await live.tenant("o", "w").outbox.enqueue("l", "t", 1)
    assert (await live.tenant("o", "v").outbox.enqueue("l", "t", 1)).created


async def test_now_ms_belongs_to_the_callers_clock(connected: Connect, prefix: str) -> None:
    """Required there, refused here; for reads too."""
    tenant = (await connected(prefix=prefix, clock="server")).tenant("o", "w")
    for write in writes(tenant).values():
        with pytest.raises(InvalidInput, match="now_ms is refused: the server's clock counts"):
            await write()
    caller = (await connected(prefix=prefix)).tenant("o", "w")
    for read in (
        lambda: caller.outbox.get(M1),
        lambda: caller.outbox.list(),
        lambda: caller.outbox.counts(),
        lambda: caller.leases.get("n"),
        lambda: caller.leases.list(),
        lambda: caller.idempotency.get("op", "k"),
        lambda: caller.idempotency.list(),
    ):
        with pytest.raises(InvalidInput, match="now_ms is required"):
            await read()  # type: ignore[no-untyped-call]


async def test_tenants_come_in_pages(connected: Connect, prefix: str) -> None:
    """In the order of their encoded names, each once."""
    kit = await connected(prefix=prefix)
    names = ["b", "a", "é", "A", "a.b"]
    for name in names:
        await kit.tenant(name, "w", "d").leases.acquire("n", ttl_ms=1, owner="a", now_ms=0)
    whole = [one.tag for one in (await kit.tenants()).items]

    assert whole == sorted(kit.tenant(name, "w", "d").tag for name in names)
    for limit in (1, 2, 5):
        page = await kit.tenants(limit=limit)
        seen = [one.tag for one in page.items]
        while page.next_cursor:
            page = await kit.tenants(page.next_cursor, limit=limit)
            seen += [one.tag for one in page.items]
        assert seen == whole
    for bad in (
        {"limit": 0},
        {"limit": 1_001},
        {"limit": True},
        {"cursor": "x"},
        {"cursor": "7b7d"},
    ):
        with pytest.raises(InvalidInput):
            await kit.tenants(**bad)


# --- bad input ------------------------------------------------------------------------------------

TEXT = ["", " ", "\u2003\t", "x" * 201, "é" * 101, "\ud800", "a\udfffb", None, 7, True, b"x"]
WHOLE = [True, False, 1.0, float("nan"), "1", "1e3", b"1", -1, 2**53, 2**53 + 1, 2**64, [1]]
INSTANT = [*WHOLE]
LENGTH = [0, *WHOLE, 43_200_001, None]
LIMIT = [*WHOLE, 1_001, None]
TOKEN = [
    "",
    "a",
    TOKEN_A[:21],
    TOKEN_A + "a",
    "a" * 21 + "=",
    " " * 22,
    "é" * 22,
    "a" * 21 + "\ud800",
]
TOKEN += [None, 7, b"a" * 22]  # type: ignore[list-item]
ID = ["", "m1", M1[:25], M1 + "0", "8" + M1[1:], M1[:25] + "l", "\ud800" * 26, None, 7, b"0" * 26]
PAYLOAD = [float("nan"), {"a": [float("inf")]}, 2**64, b"x", "\ud800", object(), "x" * (256 * 1024)]
ON_EXPIRY = ["", "Park", None, True, 1]


def optional(values: list[Any]) -> list[Any]:
    """The bad ones for what may also be None."""
    return [value for value in values if value is not None]


def bad_calls(tenant: Tenant) -> list[tuple[str, str, list[Any], Callable[[Any], Awaitable[Any]]]]:
    """Each field of each method: name, the field in the error, bad values, the call with one."""
    outbox, leases, keys = tenant.outbox, tenant.leases, tenant.idempotency
    good: dict[str, tuple[Callable[..., Awaitable[Any]], dict[str, Any]]] = {
        "enqueue": (outbox.enqueue, {"lane": "l", "target": "t", "payload": 1}),
        "claim": (outbox.claim, {"lane": "l", "target": "t", "consumer": "a"}),
        "ack": (outbox.ack, {"id": M1, "token": TOKEN_A}),
        "nack": (outbox.nack, {"id": M1, "token": TOKEN_A, "error": "e"}),
        "extend": (outbox.extend, {"id": M1, "token": TOKEN_A}),
        "release": (outbox.release, {"id": M1, "token": TOKEN_A}),
        "cancel": (outbox.cancel, {"id": M1}),
        "redrive": (outbox.redrive, {"id": M1}),
        "resolve": (outbox.resolve, {"id": M1, "verdict": "sent", "actor": "o", "reason": "r"}),
        "get": (outbox.get, {"id": M1}),
        "list": (outbox.list, {"lane": "l"}),
        "purge": (outbox.purge, {"before_ms": 1}),
        "acquire": (leases.acquire, {"name": "n", "ttl_ms": 1, "owner": "a"}),
        "lease extend": (leases.extend, {"name": "n", "token": TOKEN_A, "ttl_ms": 1}),
        "lease release": (leases.release, {"name": "n", "token": TOKEN_A}),
        "lease get": (leases.get, {"name": "n"}),
        "lease list": (leases.list, {}),
        "reserve": (
            keys.reserve,
            {"operation": "op", "key": "k", "owner": "a", "fingerprint": "f"},
        ),
        "complete": (
            keys.complete,
            {"operation": "op", "key": "k", "outcome": 1, "token": TOKEN_A},
        ),
        "withdraw": (keys.release, {"operation": "op", "key": "k", "token": TOKEN_A}),
        "key get": (keys.get, {"operation": "op", "key": "k"}),
        "key list": (keys.list, {}),
        "key purge": (keys.purge, {"before_ms": 1}),
    }
    not_blank = [value for value in TEXT if not (isinstance(value, str) and not value.strip())]
    table: dict[str, dict[str, list[Any]]] = {
        "enqueue": {
            "lane": TEXT,
            "target": TEXT,
            "payload": PAYLOAD,
            "id": optional(ID),
            "dedupe_key": optional(TEXT),
            "available_at_ms": [*INSTANT, None],
            "max_attempts": [0, *WHOLE, 1_000_001],
            "on_expiry": ON_EXPIRY,
            "run_id": optional(TEXT),
        },
        "claim": {
            "lane": TEXT,
            "target": TEXT,
            "limit": LIMIT,
            "lease_ms": [*WHOLE, 43_200_001, None],
            "consumer": TEXT,
            "claim_id": optional(TOKEN),
        },
        "ack": {"id": ID, "token": TOKEN},
        "nack": {"id": ID, "token": TOKEN, "retry_at_ms": INSTANT},
        "extend": {"id": ID, "token": TOKEN, "lease_ms": LENGTH},
        "release": {"id": ID, "token": TOKEN},
        "cancel": {"id": ID},
        "redrive": {"id": ID},
        "resolve": {
            "id": ID,
            "verdict": ["", "Sent", None],
            "actor": TEXT,
            "reason": ["", " ", "x" * 2_001, "\ud800", None, 7],
        },
        "get": {"id": ID},
        "list": {
            "status": ["", "claimable", "forgotten", 7],
            "lane": optional(TEXT),
            "target": optional(TEXT),
            "limit": [0, *LIMIT],
            "cursor": ["", "x", "7b7d", 7],
        },
        "purge": {"before_ms": [*INSTANT, None], "limit": [0, *WHOLE, 251, None]},
        "acquire": {"name": TEXT, "ttl_ms": LENGTH, "owner": TEXT, "token": optional(TOKEN)},
        "lease extend": {"name": TEXT, "token": TOKEN, "ttl_ms": LENGTH},
        "lease release": {"name": TEXT, "token": TOKEN},
        "lease get": {"name": TEXT},
        "lease list": {
            "prefix": [" ", "x" * 201, "\ud800", 7],
            "limit": [0, *LIMIT],
            "cursor": ["", "x", "5b315d"],
        },
        "reserve": {
            "operation": TEXT,
            "key": TEXT,
            "owner": TEXT,
            "fingerprint": TEXT,
            "event_id": optional(TEXT),
            "lease_ms": optional(LENGTH),
            "expires_at_ms": [0, *INSTANT],
            "on_expiry": ON_EXPIRY,
            "token": optional(TOKEN),
        },
        "complete": {
            "operation": TEXT,
            "key": TEXT,
            "outcome": PAYLOAD,
            "token": TOKEN,
            "keep_ms": [0, *WHOLE, 3_155_760_000_001, None],
        },
        "withdraw": {
            "operation": TEXT,
            "key": TEXT,
            "token": TOKEN,
            "fingerprint": optional(TEXT),
        },
        "key get": {"operation": not_blank, "key": not_blank},
        "key list": {"limit": [0, *LIMIT], "cursor": ["", "x", "5b22615d"]},
        "key purge": {"before_ms": [*INSTANT, None]},
    }
    assert set(table) == set(good)
    now_ms = [True, 1.0, "1", -1, 4_102_444_800_001, 2**53 + 1, None]
    calls = []
    for name, fields in table.items():
        method, arguments = good[name]
        for field, values in (fields | {"now_ms": now_ms}).items():

            def call(
                value: Any, method: Any = method, arguments: Any = arguments, field: Any = field
            ) -> Any:
                return method(**({"now_ms": 0} | arguments | {field: value}))

            calls.append((name, field, values, call))
    return calls


async def test_bad_input_is_refused_before_anything_is_sent(
    memory_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field of every method: the error names the field, and nothing at all is sent."""
    async with leasekit.connect(memory_server.url, clock="caller") as kit:

        def send(*arguments: Any, **options: Any) -> None:
            raise AssertionError("something was sent")

        monkeypatch.setattr(kit._shared.coalescer, "submit", send)
        monkeypatch.setattr(kit._shared.backend, "command", send)
        tried, wrong = 0, []
        for name, field, values, call in bad_calls(kit.tenant("o", "w")):
            for value in values:
                error = None
                try:
                    await call(value)
                except Exception as raised:
                    error = raised
                tried += 1
                good = isinstance(error, InvalidInput) and error.field == field
                if not good or field.removesuffix("_ms") not in str(error):
                    wrong.append((name, field, value if len(repr(value)) < 99 else "...", error))
        assert wrong == []
        assert tried > 700


@pytest.mark.parametrize("value", [2, -1, "yes", [1], None])
async def test_a_flag_that_is_no_boolean_harms_nobody_else(tenant: Tenant, value: Any) -> None:
    """`repeat` and `permanent` are read as Python reads them; neighbours in the call do not fail."""
    outbox = tenant.outbox
    await outbox.enqueue("l", "t", 1, id=M1, now_ms=0)
    await outbox.enqueue("l", "t", 1, id=M2, now_ms=0)
    one, other = await outbox.claim("l", "t", limit=2, consumer="a", now_ms=0)
    outcomes = await asyncio.gather(
        one.nack(error="e", permanent=value, now_ms=1), other.nack(error="e", now_ms=1)
    )
    assert outcomes == ["dead_lettered" if value else "requeued", "requeued"]
    if value != [1]:
        assert await outbox.ack(M1, TOKEN_A, repeat=value, now_ms=2) == "lost_claim"


# --- secrets --------------------------------------------------------------------------------------


async def test_no_secret_is_shown(
    connected: Connect, tenant_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither payloads nor tokens are in any repr, error or log, and duplicates get no token."""
    caplog.set_level(logging.DEBUG)
    kit = await connected()
    tenant = kit.tenant(tenant_name, "w")
    token = f"{SECRET}x"
    assert len(token) == 22
    shown: list[Any] = []
    keyed: dict[str, Any] = {"dedupe_key": "k", "now_ms": 0}
    shown.append(await tenant.outbox.enqueue("l", "t", {"p": SECRET}, **keyed))
    claimed = await tenant.outbox.claim("l", "t", consumer="a", claim_id=token, now_ms=1)
    shown += [claimed, claimed[0], claimed[0].row]
    again = await tenant.outbox.enqueue("l", "t", {"p": SECRET}, **keyed)
    assert token not in str(again) + str(vars_of(again.row, but="payload"))
    lease = await tenant.leases.acquire("n", ttl_ms=9, owner="a", token=token, now_ms=1)
    shown += [lease, lease.lease, await tenant.leases.get("n", now_ms=1)]
    shown.append(await tenant.leases.acquire("n", ttl_ms=9, owner="b", now_ms=1))
    reserved = await tenant.idempotency.reserve(
        "op", "k", owner="a", fingerprint="f", token=token, now_ms=1
    )
    shown.append(reserved)
    assert token not in str(vars_of(reserved.record))
    await tenant.idempotency.complete("op", "k", {"p": SECRET}, token=token, now_ms=1)
    shown += [kit, tenant, tenant.outbox, await tenant.outbox.list(now_ms=1)]

    errors: list[Exception] = []
    for call in (
        lambda: tenant.outbox.enqueue("l", "t", {"q": SECRET}, **keyed),
        lambda: tenant.outbox.enqueue("l", "t", [SECRET, float("nan")], now_ms=1),
        lambda: tenant.outbox.enqueue("l", "t", [SECRET, object()], now_ms=1),
        lambda: tenant.outbox.ack(M1, f"{token}y", now_ms=1),
        lambda: tenant.idempotency.complete(
            "op", "k", {SECRET: {1}, "x": object()}, token=token, now_ms=1
        ),
    ):
        with pytest.raises(LeasekitError) as raised:
            await call()
        errors.append(raised.value)
    for thing in shown:
        assert SECRET not in repr(thing), type(thing)
    for error in errors:
        assert SECRET not in "".join(traceback.format_exception_only(error)) + repr(error)
        assert error.__cause__ is None
    assert SECRET not in caplog.text


def vars_of(record: Any, but: str = "") -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__struct_fields__ if name != but}


# --- servers in trouble ---------------------------------------------------------------------------


async def test_a_server_that_lost_its_scripts_is_healed(tenant: Tenant, server: Server) -> None:
    """SCRIPT FLUSH in the middle of the work: nobody notices, nothing is done twice."""
    outbox = tenant.outbox
    for round_number in range(5):
        asked = [
            asyncio.create_task(outbox.enqueue("l", "t", n, now_ms=round_number)) for n in range(50)
        ]
        server.raw.script_flush()
        enqueued = await asyncio.gather(*asked)
        assert all(one.created for one in enqueued)
        server.raw.script_flush()
        rows = await outbox.claim("l", "t", limit=50, consumer="a", now_ms=round_number)
        assert len(rows) == 50
        server.raw.script_flush()
        assert (
            await asyncio.gather(*[one.ack(now_ms=round_number) for one in rows]) == ["acked"] * 50
        )
        server.raw.script_flush()
        counts = await outbox.counts(now_ms=round_number)
        assert (counts.sent, counts.pending) == (50 * (round_number + 1), 0)


async def test_a_foreign_key_is_told(tenant: Tenant, server: Server, state: State) -> None:
    """A key that holds something else: CorruptState, and nothing is written."""
    server.raw.set(f"lk:{{{tenant.tag}}}:outbox:docs", "mine")
    before = state()
    with pytest.raises(CorruptState, match="outbox/enqueue: a key of this tenant holds something"):
        await tenant.outbox.enqueue("l", "t", 1, now_ms=0)
    with pytest.raises(CorruptState, match="outbox/get"):
        await tenant.outbox.get(M1, now_ms=0)
    assert state() == before


@pytest.mark.parametrize("kind", ["valkey-9", "redis-6.2", "redis-path"])
async def test_a_replica_refuses_writes_clearly(private_server: PrivateServer, kind: str) -> None:
    """After a failover to the wrong address: nothing was applied, safe to try again."""
    server = private_server(kind)
    async with leasekit.connect(server.url) as kit:
        tenant = kit.tenant("o", "w")
        await tenant.outbox.enqueue("l", "t", 1)
        server.raw.replicaof("127.0.0.1", "1")
        with pytest.raises(Unavailable, match=r"refuses work now .*nothing was applied"):
            await tenant.outbox.enqueue("l", "t", 1)
        server.raw.replicaof("NO", "ONE")
        assert (await tenant.outbox.enqueue("l", "t", 1)).created


@pytest.mark.parametrize("kind", ["valkey-9", "redis-6.2", "redis-path"])
async def test_a_user_without_rights_is_told(private_server: PrivateServer, kind: str) -> None:
    """Which user rights are missing is the operator's to fix; nothing was applied."""
    server = private_server(kind)
    async with leasekit.connect(server.url) as kit:
        tenant = kit.tenant("o", "w")
        await tenant.outbox.enqueue("l", "t", 1)
        server.raw.execute_command("ACL", "SETUSER", "default", "-zadd")
        with pytest.raises(Unavailable, match=r"refuses this user .*nothing was applied"):
            await tenant.leases.acquire("n", ttl_ms=1_000, owner="a")


@pytest.mark.parametrize("kind", ["valkey-9", "redis-6.2", "redis-path"])
async def test_a_full_server_lets_work_be_finished(
    private_server: PrivateServer, kind: str
) -> None:
    """At maxmemory what ends or gives back still works; from 7 on, what adds refuses and writes
    nothing. Once there is room, all goes on without a new connection."""
    server = private_server(kind, maxmemory="64mb")
    async with leasekit.connect(server.url, clock="caller", prefix="lk") as kit:
        tenant = kit.tenant("o", "w")
        outbox, leases, keys = tenant.outbox, tenant.leases, tenant.idempotency
        ids = [f"{number:026}" for number in range(8)]
        for one in ids:
            await outbox.enqueue("l", "t", "x" * 100, id=one, now_ms=0)
        rows = await outbox.claim("l", "t", limit=6, lease_ms=1_000, consumer="a", now_ms=0)
        for name in ("kept", "given-back"):
            await leases.acquire(name, ttl_ms=1_000, owner="a", token=TOKEN_A, now_ms=0)
        for key in ("done", "withdrawn"):
            await keys.reserve("op", key, owner="a", fingerprint="f", token=TOKEN_A, now_ms=0)
        server.raw.config_set("maxmemory", "1")
        before = dump(server.raw, "lk", "o.w")

        if server.knows_flags:
            for add in (
                lambda: outbox.enqueue("l", "t", 1, now_ms=1),
                lambda: outbox.claim("l", "t", consumer="b", now_ms=1),
                lambda: leases.acquire("new", ttl_ms=1, owner="a", now_ms=1),
                lambda: keys.reserve("op", "new", owner="a", fingerprint="f", now_ms=1),
            ):
                with pytest.raises(Overloaded, match="nothing was written; ack, nack and release"):
                    await add()
            assert dump(server.raw, "lk", "o.w") == before
        assert await rows[0].ack(now_ms=1) == "acked"
        assert await rows[1].nack(error="e" * 100, retry_at_ms=9, now_ms=1) == "requeued"
        assert await rows[2].nack(error="e", permanent=True, now_ms=1) == "dead_lettered"
        assert await rows[3].release(now_ms=1) == "released"
        assert await rows[4].extend(lease_ms=2_000, now_ms=1) == "extended"
        assert await outbox.cancel(ids[7], now_ms=1) == "cancelled"
        assert await leases.extend("kept", TOKEN_A, ttl_ms=2_000, now_ms=1) == "extended"
        assert await leases.release("given-back", TOKEN_A, now_ms=1) == "released"
        assert await keys.complete("op", "done", {"a": 1}, token=TOKEN_A, now_ms=1) == "completed"
        assert await keys.release("op", "withdrawn", token=TOKEN_A, now_ms=1) == "released"
        assert await outbox.purge(before_ms=1, now_ms=1) == 2
        counts = await outbox.counts(now_ms=1)
        assert (counts.pending, counts.claimed, counts.dead_lettered) == (3, 2, 1)

        server.raw.config_set("maxmemory", "0")
        assert (await outbox.enqueue("l", "t", 1, now_ms=2)).created
        assert len(await outbox.claim("l", "t", limit=9, consumer="b", now_ms=2)) == 3


async def test_a_thousand_coroutines_need_no_connections(tenant: Tenant) -> None:
    """They share one: nobody meets an empty pool, everybody gets an own row exactly once."""
    numbers = itertools.count()

    async def lifecycle() -> str:
        await tenant.outbox.enqueue("l", "t", next(numbers), now_ms=0)
        [held] = await tenant.outbox.claim("l", "t", consumer="a", now_ms=0)
        await held.ack(now_ms=0)
        return held.row.id

    done = await asyncio.gather(*[lifecycle() for _ in range(1_000)])
    assert len(set(done)) == 1_000
    assert (await tenant.outbox.counts(now_ms=0)).sent == 1_000


async def test_two_drafts_in_one_turn_meet_the_conflict_rule(tenant: Tenant) -> None:
    """Items of one script call see each other as if they had been sent one by one."""
    asked = [
        tenant.outbox.enqueue("l", "t", payload, dedupe_key="k", now_ms=0) for payload in (1, 1, 2)
    ]
    first, second, third = await asyncio.gather(*asked, return_exceptions=True)
    assert not isinstance(first, BaseException)
    assert not isinstance(second, BaseException)
    assert (first.created, second.created) == (True, False)
    assert first.row.id == second.row.id
    assert isinstance(third, Conflict)


@pytest.mark.parametrize(
    ("parts", "source"),
    [
        (("local", "local"), "local_implicit"),
        (("local", "local", "d"), "explicit"),
        (("local", "local", None, "a"), "explicit"),
        (("local", "default"), "explicit"),
        (("o", "w", "d", "a"), "explicit"),
    ],
)
async def test_tenant_knows_whether_it_was_named(
    kit: leasekit.Leasekit, parts: tuple[str, ...], source: str
) -> None:
    """spec/reliability 1.1: only local/local, without deployment and actor, stands for no name."""
    context = kit.tenant(*parts).context

    assert context.source == source
    assert context.is_local_implicit == (source == "local_implicit")
