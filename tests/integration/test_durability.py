"""Durability on real servers: a primary with replicas that stop, and one that syncs or does not.

A stopped replica stands for a network that brings nothing over any more. Where a test expects a
success under `replicated`, it waits for replicas generously: a slow machine is no failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
import redis
from replicas import Replicated, start_replicated
from servers import NoServer, ServerProcess, dump

import leasekit
from leasekit import Draft, Leasekit, LeaseLost, NotDurable, Tenant, replicated
from leasekit.cli import checkup
from leasekit.errors import InvalidInput, Unavailable
from leasekit.keys import Keys
from leasekit.scope import CLASSES_MAX
from leasekit.scripts import script

SOON = replicated(1, timeout_ms=30)  # where it is to fall short
KINDS = ("valkey-9", "redis-6.2", "redis-path")
TIMEOUT_MS = 60_000
OWNER: dict[str, Any] = {"owner": "o"}
RESERVE: dict[str, Any] = {"owner": "o", "fingerprint": "f"}

Group = Callable[[str], Replicated]
Connect = Callable[..., Awaitable[Leasekit]]


@pytest.fixture(scope="module")
def groups() -> Iterator[Group]:
    """The primary with one replica of a kind, started when first asked for."""
    started: dict[str, Replicated] = {}

    def give(kind: str) -> Replicated:
        if kind not in started:
            try:
                started[kind] = start_replicated(kind, replicas=1)
            except NoServer as error:
                pytest.skip(str(error))
        return started[kind]

    yield give
    for one in started.values():
        one.close()


@pytest.fixture(params=KINDS)
def group(request: pytest.FixtureRequest, groups: Group) -> Iterator[Replicated]:
    """A pair of each kind, running when the test begins."""
    pair = groups(request.param)
    yield pair
    pair.resume()
    pair.wait_until_in_step()


@pytest.fixture
def pair(groups: Group) -> Iterator[Replicated]:
    """A pair of the newest kind."""
    found = groups("valkey-9")
    yield found
    found.resume()
    found.wait_until_in_step()


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    async with AsyncExitStack() as stack:

        async def connect(server: ServerProcess, **options: Any) -> Leasekit:
            options = {"timeout_ms": TIMEOUT_MS} | options
            return await stack.enter_async_context(leasekit.connect(server.url, **options))

        yield connect


# --- the barrier ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_full", [False, True], ids=["", "full"])
async def test_a_call_that_wrote_nothing_waits_too(
    group: Replicated, connect: Connect, tenant_name: str, is_full: bool
) -> None:
    """The trap: a repeat that finds everything done, on a connection that wrote nothing, with the only
    replica stopped. It is not durable, also with full memory; and it is once the replica goes on."""
    raw = group.primary.raw
    first = (await connect(group.primary)).tenant(tenant_name, "w").outbox
    await first.enqueue("l", "t", 1)
    [claim] = await first.claim("l", "t", consumer="c")
    other = (await connect(group.primary, durability=SOON)).tenant(tenant_name, "w").outbox
    assert await other.cancel(claim.row.id, durability="none") == "not_pending"  # it is registered
    group.wait_until_in_step()
    group.pause()
    assert await first.ack(claim.row.id, claim.token) == "acked"
    before = dump(raw, "lk", f"{tenant_name}.w")
    if is_full:
        raw.config_set("maxmemory", 1)
    try:
        with pytest.raises(NotDurable, match="0 of the 1"):
            await other.ack(claim.row.id, claim.token, repeat=True)
        group.resume()
        again = await other.ack(
            claim.row.id, claim.token, repeat=True, durability=replicated(1, timeout_ms=20_000)
        )
    finally:
        raw.config_set("maxmemory", 0)
    assert again == "acked"
    assert dump(raw, "lk", f"{tenant_name}.w") == before


def test_without_the_barrier_it_would_pass(pair: Replicated) -> None:
    """Why there is one: on Valkey, WAIT on a connection that wrote nothing is content at once."""
    pair.pause()
    pair.primary.raw.set("other", "1")
    barrier = script("tenant/barrier").text(shebang=True)
    silent = redis.Redis(unix_socket_path=pair.primary.url.removeprefix("unix://"), protocol=2)
    with silent.client() as connection:
        assert connection.wait(1, 100) == 1
        connection.eval(barrier, 1, Keys("lk", "t.w").tenant_barrier, "")
        assert connection.wait(1, 100) == 0
    silent.close()
    pair.primary.raw.delete("other")


async def test_an_answer_means_that_the_replica_has_it(
    group: Replicated, connect: Connect, tenant_name: str
) -> None:
    """After each answer the replica keeps what the primary keeps."""
    kit = await connect(group.primary, durability=replicated(1, timeout_ms=20_000))
    tenant = kit.tenant(tenant_name, "w")

    def is_the_same() -> bool:
        servers = (group.primary, group.replicas[0])
        ours, theirs = (dump(one.raw, "lk", tenant.tag) for one in servers)
        return bool(ours) and ours == theirs

    await tenant.outbox.enqueue("l", "t", 1)
    assert is_the_same()
    [claim] = await tenant.outbox.claim("l", "t", consumer="c")
    assert is_the_same()
    assert await claim.extend(lease_ms=60_000) == "extended"
    assert is_the_same()
    assert await claim.ack() == "acked"
    assert is_the_same()
    assert (await tenant.leases.acquire("n", ttl_ms=60_000, owner="o")).lease is not None
    assert is_the_same()
    reserved = await tenant.idempotency.reserve("op", "k", **RESERVE)
    assert is_the_same()
    await tenant.idempotency.complete("op", "k", 1, token=reserved.token or "")
    assert is_the_same()


# --- short barriers -------------------------------------------------------------------------------


@pytest.fixture
async def tenant(pair: Replicated, connect: Connect, tenant_name: str) -> Tenant:
    """On a client of class none."""
    return (await connect(pair.primary)).tenant(tenant_name, "w")


async def test_rows_that_fall_short_stand_and_are_repeated(
    pair: Replicated, tenant: Tenant
) -> None:
    """enqueue, and each draft of many: the row is there, and its repeat says created."""
    id = leasekit.new_id()
    pair.pause()
    with pytest.raises(NotDurable, match="stands on this server"):
        await tenant.outbox.enqueue("l", "t", 1, id=id, durability=SOON)
    drafts = [Draft(lane="l", target="t", payload=n) for n in range(3)]
    answers = await tenant.outbox.enqueue_many(drafts, durability=SOON)
    assert [type(answer) for answer in answers] == [NotDurable] * 3
    assert (await tenant.outbox.counts()).pending == 4

    pair.resume()
    again = await tenant.outbox.enqueue(
        "l", "t", 1, id=id, repeat=True, durability=replicated(1, timeout_ms=20_000)
    )
    assert again.created
    assert (await tenant.outbox.counts()).pending == 4


async def test_grants_that_fall_short_are_given_back(pair: Replicated, tenant: Tenant) -> None:
    """claim, acquire, reserve: nobody holds anything, no attempt is charged, and it may be had anew."""
    await tenant.outbox.enqueue("l", "t", 1)
    await tenant.outbox.enqueue("l", "t", 2)
    pair.pause()
    for grant in (
        tenant.outbox.claim("l", "t", limit=2, consumer="c", durability=SOON),
        tenant.leases.acquire("n", ttl_ms=60_000, owner="o", durability=SOON),
        tenant.idempotency.reserve("op", "k", durability=SOON, **RESERVE),
    ):
        with pytest.raises(NotDurable, match="given back"):
            await grant

    pair.resume()
    sure = replicated(1, timeout_ms=20_000)
    # What gives back travels on the same connection, ahead of these.
    claims = await tenant.outbox.claim("l", "t", limit=2, consumer="c", durability=SOON)
    assert [claim.row.attempt_count for claim in claims] == [1, 1]
    assert (await tenant.leases.acquire("n", ttl_ms=60_000, durability=sure, **OWNER)).lease
    assert (await tenant.idempotency.reserve("op", "k", durability=sure, **RESERVE)).token


async def test_endings_that_fall_short_stand_and_are_repeated(
    pair: Replicated, tenant: Tenant
) -> None:
    """ack, nack, release, cancel, redrive, complete: each is done here, and its repeat says so."""
    outbox, keys = tenant.outbox, tenant.idempotency
    sure = replicated(1, timeout_ms=20_000)
    rows = [(await outbox.enqueue("l", "t", n)).row.id for n in range(4)]
    claims = {one.row.id: one for one in await outbox.claim("l", "t", limit=3, consumer="c")}
    acked, nacked, released = (claims[id] for id in rows[:3])
    [dead] = await _dead(tenant)
    reserved = await keys.reserve("op", "k", **RESERVE)
    token = reserved.token or ""
    lease = (await tenant.leases.acquire("n", ttl_ms=600_000, owner="o")).lease
    assert lease is not None
    calls: list[tuple[Callable[..., Awaitable[Any]], str]] = [
        (acked.ack, "acked"),
        (lambda **more: nacked.nack(error="e", permanent=True, **more), "dead_lettered"),
        (released.release, "released"),
        (lambda **more: outbox.cancel(rows[3], **more), "cancelled"),
        (lambda **more: outbox.redrive(dead, **more), "redriven"),
        (lambda **more: keys.complete("op", "k", 1, token=token, **more), "completed"),
        (lambda **more: tenant.leases.release("n", lease.token, **more), "released"),
    ]
    pair.pause()
    for call, _ in calls:
        with pytest.raises(NotDurable, match="repeat=True"):
            await call(durability=SOON)
    states = {id: (await outbox.get(id)) for id in (*rows, dead)}
    assert [row.status if row else None for row in states.values()] == [
        *("sent", "dead_lettered", "pending", "cancelled", "pending"),
    ]

    pair.resume()
    again = [await call(durability=sure, repeat=True) for call, _ in calls]
    assert [str(word) for word in again] == [word for _, word in calls]


async def _dead(tenant: Tenant) -> list[str]:
    await tenant.outbox.enqueue("dead", "t", 1)
    claims = await tenant.outbox.claim("dead", "t", consumer="c")
    for claim in claims:
        await claim.nack(error="e", permanent=True)
    return [claim.row.id for claim in claims]


async def test_extensions_that_fall_short_keep_the_old_end(
    pair: Replicated, tenant: Tenant
) -> None:
    """A holder counts on the end that replicas know."""
    await tenant.outbox.enqueue("l", "t", 1)
    sure = replicated(1, timeout_ms=20_000)
    [claim] = await tenant.outbox.claim("l", "t", lease_ms=600_000, consumer="c", durability=sure)
    end, left_ms = claim.lease_expires_at_ms, claim.remaining_ms()
    pair.pause()
    with pytest.raises(NotDurable):
        await claim.extend(lease_ms=6_000_000, durability=SOON)
    assert claim.lease_expires_at_ms == end
    assert claim.remaining_ms() <= left_ms

    pair.resume()
    assert await claim.extend(lease_ms=6_000_000) == "extended"
    assert claim.lease_expires_at_ms > end


async def test_what_follows_a_grant_has_its_class(pair: Replicated, tenant: Tenant) -> None:
    """A claim of a client of class none that was claimed under another: its ack waits, unless told."""
    await tenant.outbox.enqueue("l", "t", 1)
    claims: list[leasekit.outbox.Claim] = []
    while not claims:  # a slow machine may need more than one attempt within so short a time
        try:
            claims = await tenant.outbox.claim("l", "t", consumer="c", durability=SOON)
        except NotDurable:
            continue
    pair.pause()
    with pytest.raises(NotDurable):
        await claims[0].ack()
    assert await claims[0].ack(durability="none", repeat=True) == "acked"


async def test_calls_of_different_classes_share_nothing(pair: Replicated, tenant: Tenant) -> None:
    """Of many at once, those of class none are answered, and those that wait fall short."""
    pair.pause()
    asked = [
        tenant.outbox.enqueue("l", "t", n, durability=SOON if n % 2 else None) for n in range(200)
    ]
    answers = await asyncio.gather(*asked, return_exceptions=True)

    assert [isinstance(answer, NotDurable) for answer in answers] == [
        bool(n % 2) for n in range(200)
    ]
    assert (await tenant.outbox.counts()).pending == 200


# --- what holds and consumes ----------------------------------------------------------------------


async def test_a_held_lease_that_replicas_lack_is_lost(pair: Replicated, tenant: Tenant) -> None:
    """Its renewals reach nobody else: the body is cancelled before the end that replicas know."""
    held: list[tuple[leasekit.lease.Lease, int]] = []
    sure = replicated(1, timeout_ms=20_000)

    async def work() -> None:
        async with tenant.leases.hold("n", ttl_ms=2_000, owner="o", durability=sure) as lease:
            held.append((lease, lease.expires_at_ms))
            pair.pause()
            await asyncio.Event().wait()

    with pytest.raises(LeaseLost):
        await work()
    [(lease, end_ms)] = held
    assert lease.lost.is_set()
    assert lease.expires_at_ms == end_ms
    found = await tenant.leases.get("n")
    assert found is None or found.expires_at_ms > end_ms  # it was extended on this server alone


async def test_a_name_that_replicas_lack_is_not_held(pair: Replicated, tenant: Tenant) -> None:
    """The body does not run, and the name is free again."""
    pair.pause()
    ran: list[int] = []

    async def work() -> None:
        async with tenant.leases.hold("n", ttl_ms=600_000, owner="o", durability=SOON):
            ran.append(1)

    with pytest.raises(NotDurable, match="given back"):
        await work()
    assert ran == []
    with pytest.raises(NotDurable):  # behind what gives the name back
        await tenant.leases.release("m", "t" * 22, durability=SOON)
    assert await tenant.leases.get("n") is None


async def test_run_repeats_until_replicas_have_it(
    monkeypatch: pytest.MonkeyPatch, pair: Replicated, tenant: Tenant
) -> None:
    """An ack that falls short is asked again while the lease lasts, and counted once."""
    stop, fell_short = asyncio.Event(), asyncio.Event()
    plain = leasekit.outbox.Claim.ack

    async def ack(claim: leasekit.outbox.Claim, **options: Any) -> Any:
        try:
            return await plain(claim, **options)
        except NotDurable:
            fell_short.set()
            raise

    monkeypatch.setattr(leasekit.outbox.Claim, "ack", ack)
    counts = leasekit.RunCounts()
    await tenant.outbox.enqueue("l", "t", 1)
    raw = pair.primary.raw

    async def handler(claim: leasekit.outbox.Claim) -> None:
        pair.pause()
        stop.set()

    async def run() -> None:
        await tenant.outbox.run(
            "l",
            "t",
            handler,
            lease_ms=600_000,
            stop=stop,
            counts=counts,
            durability=replicated(1, timeout_ms=100),
        )

    running = asyncio.create_task(run())
    await stop.wait()
    await fell_short.wait()
    assert not running.done()
    assert [row.status for row in (await tenant.outbox.list()).items] == ["sent"]
    pair.resume()
    await running
    assert (counts.acked, counts.lost) == (1, 0)
    pair.wait_until_in_step()
    assert dump(pair.replicas[0].raw, "lk", tenant.tag) == dump(raw, "lk", tenant.tag)


async def test_once_gives_the_outcome_that_stands(pair: Replicated, tenant: Tenant) -> None:
    """The action ran and its outcome fell short: calling again gives it, and runs nothing."""
    ran: list[int] = []

    async def action() -> int:
        ran.append(1)
        pair.pause()
        return 7

    async def once(durability: leasekit.Durability) -> Any:
        return await tenant.idempotency.once(
            "op", "k", action, durability=durability, lease_ms=600_000, **RESERVE
        )

    while not ran:  # its reservation may fall short on a slow machine: then it has not run
        with pytest.raises(NotDurable):
            await once(replicated(1, timeout_ms=300))
    pair.resume()
    assert await once(replicated(1, timeout_ms=20_000)) == 7
    assert ran == [1]


# --- clients and connections ----------------------------------------------------------------------


async def test_a_class_connects_once_and_is_closed(
    private_server: Callable[..., ServerProcess], tenant_name: str
) -> None:
    """However many ask first at once, a class has one connection; closing leaves none."""
    server = private_server()
    before = server.raw.info("clients")["connected_clients"]
    kit = await leasekit.connect(server.url, timeout_ms=TIMEOUT_MS)
    outbox = kit.tenant(tenant_name, "w").outbox
    await outbox.enqueue("l", "t", 0)
    own = server.raw.info("clients")["connected_clients"]
    short = replicated(1, timeout_ms=1)
    asked = [outbox.enqueue("l", "t", n, durability=short) for n in range(50)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(answer) for answer in answers} == {NotDurable}
    assert server.raw.info("clients")["connected_clients"] == own + 1

    for n in range(2, CLASSES_MAX):
        with pytest.raises(NotDurable):
            await outbox.enqueue("l", "t", n, durability=replicated(n, timeout_ms=1))
    with pytest.raises(InvalidInput, match="classes"):
        await outbox.enqueue("l", "t", 0, durability=replicated(CLASSES_MAX, timeout_ms=1))

    await kit.close()
    for durability in (None, short):
        with pytest.raises(Unavailable, match="clos"):
            await outbox.enqueue("l", "t", 0, durability=durability)
    assert server.raw.info("clients")["connected_clients"] == before


async def test_a_replica_is_no_place_for_durable_writes(pair: Replicated, connect: Connect) -> None:
    """It refuses WAIT, and is told of at once."""
    with pytest.raises(Unavailable, match="primary"):
        await connect(pair.replicas[0], durability="replicated(1)")


async def test_a_user_who_may_not_wait_is_told_at_once(
    private_server: Callable[..., ServerProcess], tenant_name: str
) -> None:
    """And so is one who may not see the settings that `fsync` depends on."""
    server = private_server(appendonly="yes", appendfsync="always")
    rights = ("on", "nopass", "~*", "&*", "+@all", "-wait", "-config")
    server.raw.execute_command("ACL", "SETUSER", "u", *rights)
    url = server.url.replace("unix://", "unix://u:x@")
    with pytest.raises(Unavailable, match=r"\+wait"):
        await leasekit.connect(url, durability="replicated(1)")
    with pytest.raises(Unavailable, match=r"\+config\|get"):
        await leasekit.connect(url, durability="fsync")
    async with leasekit.connect(url) as kit:
        outbox = kit.tenant(tenant_name, "w").outbox
        with pytest.raises(Unavailable, match=r"\+wait"):
            await outbox.enqueue("l", "t", 1, durability="replicated(1)")
        assert (await outbox.counts()).pending == 0


# --- fsync ----------------------------------------------------------------------------------------

SYNCS = {"appendonly": "yes", "appendfsync": "always"}


@pytest.mark.parametrize("kind", KINDS)
async def test_fsync_is_verified(
    kind: str, private_server: Callable[..., ServerProcess], tenant_name: str
) -> None:
    """At the start, and anew with each connection: a server that syncs less is not written to."""
    server = private_server(kind, **SYNCS)
    async with leasekit.connect(server.url, durability="fsync", timeout_ms=1_000) as kit:
        outbox = kit.tenant(tenant_name, "w").outbox
        assert (await outbox.enqueue("l", "t", 1)).created
        server.raw.config_set("appendfsync", "everysec")
        server.raw.client_kill_filter(_type="normal", skipme=True)
        for call in (outbox.get(leasekit.new_id()), outbox.enqueue("l", "t", 2)):
            with pytest.raises(Unavailable, match="CONFIG SET appendfsync always"):
                await call
        server.raw.config_set("appendfsync", "always")
        assert (await outbox.enqueue("l", "t", 3)).created
        assert (await outbox.counts()).pending == 2
    for name, value in (
        ("appendfsync", "everysec"),
        ("no-appendfsync-on-rewrite", "yes"),
        ("appendonly", "no"),
    ):
        good = server.raw.config_get(name)[name]
        server.raw.config_set(name, value)
        with pytest.raises(Unavailable, match=f"{name} {value}"):
            await leasekit.connect(server.url, durability="fsync")
        if name != "appendonly":  # switched on again it writes its file anew, and cannot be stopped
            server.raw.config_set(name, good)


# --- doctor ---------------------------------------------------------------------------------------


async def lines(kit: Leasekit) -> dict[str, tuple[str, str]]:
    """What doctor says of durability and replication: level and text by name."""
    checks = await checkup.check_server(kit)
    return {
        one.name.removeprefix("durability of the "): (one.level, one.what)
        for one in checks
        if one.name.startswith(("durability", "replication"))
    }


async def test_doctor_shows_what_a_class_gives(
    monkeypatch: pytest.MonkeyPatch, private_server: Callable[..., ServerProcess], connect: Connect
) -> None:
    """none with the server's persistence, fsync verified, replicated with what is online."""
    monkeypatch.setattr(checkup, "DRIFT_SECONDS", 0.0)
    alone = private_server(**SYNCS)
    found = await lines(await connect(alone))
    assert found["client"] == (
        "ok",
        "none: an answered write is where this server keeps it (aof:always)",
    )
    kit = await connect(alone, durability="fsync")
    assert (await lines(kit))["gate"][0] == "ok"
    assert "verified" in (await lines(kit))["client"][1]
    alone.raw.config_set("appendfsync", "everysec")
    assert (await lines(kit))["client"] == (
        "fail",
        "fsync, which is not so: appendfsync everysec",
    )
    found = await lines(await connect(alone, durability="replicated(1)"))
    assert found["client"][0] == "fail"
    assert "0 replicas are online" in found["client"][1]


async def test_doctor_counts_replicas(monkeypatch: pytest.MonkeyPatch, connect: Connect) -> None:
    """n below their number is a warning, n above it a fail; each class has a line of its own."""
    monkeypatch.setattr(checkup, "DRIFT_SECONDS", 0.0)
    group = start_replicated(replicas=2)
    try:
        policy = leasekit.GatePolicy(durability=replicated(2))
        found = await lines(await connect(group.primary, durability="replicated(1)", gate=policy))
        assert found["replication"] == ("ok", "a primary with 2 replicas, 2 of them online")
        assert found["client"][0] == "warn"
        assert "a failover may promote one that lacks it" in found["client"][1]
        assert found["gate"][0] == "ok"
        assert "2 of the 2 replicas online" in found["gate"][1]
        assert (await lines(await connect(group.primary)))["client"][0] == "warn"
        assert (await lines(await connect(group.primary, durability="replicated(3)")))["client"][
            0
        ] == "fail"
    finally:
        group.close()
