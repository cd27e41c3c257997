"""Leases as their users see them, on every server: single calls with the time given, and hold()."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from servers import Server

import leasekit
from leasekit import Conflict, InvalidInput, Leasekit, LeaseLost, Tenant, Unavailable
from leasekit.lease import Acquisition, Leases

Connect = Callable[..., Awaitable[Leasekit]]
State = Callable[[], dict[str, Any]]

TOKEN_A, TOKEN_B = "a" * 22, "b" * 22
FIVE_MINUTES_MS = 300_000


@pytest.fixture
def leases(tenant: Tenant) -> Leases:
    return tenant.leases


async def acquire(leases: Leases, now_ms: int, **options: Any) -> Acquisition:
    """Acquisition of `leader` by a for 10 ms, unless said otherwise."""
    options = {"name": "leader", "ttl_ms": 10, "owner": "a", "token": TOKEN_A} | options
    return await leases.acquire(now_ms=now_ms, **options)


# --- single calls ---------------------------------------------------------------------------------


async def test_a_free_name_is_acquired(leases: Leases) -> None:
    """With token, fence and end; everybody sees the holder, nobody the token."""
    acquisition = await acquire(leases, 10)

    assert (acquisition.outcome, acquisition.holder) == ("acquired", None)
    lease = acquisition.lease
    assert lease is not None
    assert (lease.name, lease.owner, lease.token, lease.fence) == ("leader", "a", TOKEN_A, 10_000)
    assert (lease.acquired_at_ms, lease.expires_at_ms) == (10, 20)
    holder = await leases.get("leader", now_ms=19)
    assert holder is not None
    assert (holder.name, holder.owner, holder.fence) == ("leader", "a", 10_000)
    assert (holder.acquired_at_ms, holder.expires_at_ms) == (10, 20)


@pytest.mark.parametrize(("now_ms", "outcome"), [(19, "busy"), (20, "acquired")])
async def test_a_name_is_free_again_at_its_leases_end(
    leases: Leases, now_ms: int, outcome: str
) -> None:
    """Inclusive: a lease from 10 for 10 has ended at 20; until then the holder is named."""
    await acquire(leases, 10)
    other = await acquire(leases, now_ms, owner="b", token=TOKEN_B)

    assert other.outcome == outcome
    assert (other.holder is not None and other.holder.owner == "a") == (outcome == "busy")
    holder = await leases.get("leader", now_ms=now_ms)
    assert holder is not None
    assert holder.owner == ("a" if outcome == "busy" else "b")


async def test_fences_rise_over_all_names_of_a_tenant(leases: Leases) -> None:
    """With every grant, also when the clock steps back."""
    fences = []
    for now_ms, name in ((10, "a"), (10, "b"), (5, "c"), (20, "a"), (0, "d")):
        lease = (await acquire(leases, now_ms, name=name, token=None)).lease
        assert lease is not None
        fences.append(lease.fence)
    assert fences == sorted(set(fences))


async def test_the_token_that_holds_gets_the_same_answer_again(leases: Leases) -> None:
    """A repeat changes nothing, also not the end."""
    first = await acquire(leases, 10)
    again = await acquire(leases, 15, ttl_ms=1_000, repeat=True)

    assert again.lease is not None
    assert first.lease is not None
    assert (again.lease.fence, again.lease.expires_at_ms) == (first.lease.fence, 20)


async def test_a_late_copy_of_a_finished_acquisition_takes_nothing(leases: Leases) -> None:
    """Its token had the lease and gave it back: not acquired, and nobody holds it."""
    await acquire(leases, 10)
    await leases.release("leader", TOKEN_A, now_ms=11)
    late = await acquire(leases, 12)

    assert (late.outcome, late.lease, late.holder) == ("busy", None, None)
    assert await leases.get("leader", now_ms=12) is None
    assert (await acquire(leases, 12, token=TOKEN_B)).outcome == "acquired"


@pytest.mark.parametrize(("now_ms", "outcome", "end"), [(19, "extended", 119), (20, "lost", None)])
async def test_extend_counts_from_now_and_refuses_at_the_end(
    leases: Leases, now_ms: int, outcome: str, end: int | None
) -> None:
    """Only the holder, only before the end."""
    await acquire(leases, 10)
    assert await leases.extend("leader", TOKEN_B, ttl_ms=100, now_ms=now_ms) == "lost"
    assert await leases.extend("leader", TOKEN_A, ttl_ms=100, now_ms=now_ms) == outcome
    holder = await leases.get("leader", now_ms=now_ms)
    assert (holder and holder.expires_at_ms) == end


async def test_extend_never_shortens(leases: Leases) -> None:
    """Asked twice, or late, it harms nothing."""
    await acquire(leases, 10, ttl_ms=100)
    assert await leases.extend("leader", TOKEN_A, ttl_ms=1, now_ms=11) == "extended"
    holder = await leases.get("leader", now_ms=11)
    assert holder is not None
    assert holder.expires_at_ms == 110


async def test_release_frees_the_name_at_once(leases: Leases) -> None:
    """For others; the holder may ask twice, for five minutes."""
    await acquire(leases, 10)
    assert await leases.release("leader", TOKEN_B, now_ms=11) == "lost"
    assert await leases.release("leader", TOKEN_A, now_ms=11) == "released"
    assert await leases.release("leader", TOKEN_A, now_ms=12) == "released"
    assert await leases.get("leader", now_ms=12) is None
    assert (await acquire(leases, 12, token=TOKEN_B)).outcome == "acquired"
    assert await leases.release("leader", TOKEN_A, now_ms=13) == "lost"


@pytest.mark.parametrize(("now_ms", "outcome"), [(19, "released"), (20, "lost")])
async def test_release_after_the_end_is_lost(leases: Leases, now_ms: int, outcome: str) -> None:
    """The holder learns that it had not been protected to the end."""
    await acquire(leases, 10)
    assert await leases.release("leader", TOKEN_A, now_ms=now_ms) == outcome


async def test_a_repeated_release_of_the_unknown_is_forgotten(leases: Leases) -> None:
    """After five minutes nobody remembers."""
    assert await leases.release("leader", TOKEN_A, now_ms=1) == "lost"
    assert await leases.release("leader", TOKEN_A, repeat=True, now_ms=1) == "forgotten"
    await acquire(leases, 10)
    await leases.release("leader", TOKEN_A, now_ms=11)
    later_ms = 11 + FIVE_MINUTES_MS
    await acquire(leases, later_ms, name="other", token=TOKEN_B)
    assert await leases.release("leader", TOKEN_A, repeat=True, now_ms=later_ms) == "forgotten"


async def test_ended_leases_leave_no_trace(leases: Leases, state: State) -> None:
    """Memory stays flat: after five minutes other acquisitions forget them."""
    for number in range(5):
        await acquire(leases, 10, name=f"n{number}", token=None)
    await acquire(leases, 20 + FIVE_MINUTES_MS, name="last", token=None)
    kept = state()
    assert list(kept["lease:docs"]) == list(kept["lease:due"]) == list(kept["lease:names"])
    assert list(kept["lease:docs"]) == ["last"]


async def test_a_hundred_at_once_have_one_winner(leases: Leases) -> None:
    """All others are told who it is."""
    asked = [acquire(leases, 10, owner=f"o{number}", token=None) for number in range(100)]
    results = await asyncio.gather(*asked)

    [won] = [one.lease for one in results if one.lease]
    assert {one.holder.owner for one in results if one.holder} == {won.owner}
    assert len({one.holder for one in results if one.holder}) == 1


async def test_names_are_kept_as_they_are(leases: Leases) -> None:
    """NUL, line ends, any script; composed and decomposed forms are two names."""
    for name in (" a\x00", "a\r\nb", "\U0001f600", "\u00e9", "e\u0301", "n" * 200):
        acquisition = await acquire(leases, 10, name=name, owner=f" {name[:9]} b ")
        assert acquisition.outcome == "acquired", name
        holder = await leases.get(name, now_ms=10)
        assert holder is not None
        assert (holder.name, holder.owner) == (name, f" {name[:9]} b ")
    assert len((await leases.list(now_ms=10)).items) == 6


async def test_a_listing_is_in_the_order_of_names(leases: Leases) -> None:
    """Bytes of names, only what is held now, in pages."""
    for name in ("b", "a", "ab", "é", "B", "ended"):
        ttl_ms = 1 if name == "ended" else 10
        await acquire(leases, 10, name=name, ttl_ms=ttl_ms, token=None)
    await acquire(leases, 10, name="given-back")
    await leases.release("given-back", TOKEN_A, now_ms=11)
    whole = ["B", "a", "ab", "b", "é"]

    assert [one.name for one in (await leases.list(now_ms=11)).items] == whole
    for limit in (1, 2, 3, 5):
        page = await leases.list(limit=limit, now_ms=11)
        seen = [one.name for one in page.items]
        while page.next_cursor:
            page = await leases.list(limit=limit, cursor=page.next_cursor, now_ms=11)
            seen += [one.name for one in page.items]
        assert seen == whole
    assert [one.name for one in (await leases.list(prefix="a", now_ms=11)).items] == ["a", "ab"]
    assert (await leases.list(prefix="zz", now_ms=11)).items == []
    with pytest.raises(InvalidInput, match="cursor is not one that this list gave"):
        await leases.list(cursor="00", now_ms=11)


async def test_tenants_share_no_names(kit: Leasekit, tenant_name: str) -> None:
    """Same name, same token: two leases."""
    one = kit.tenant(tenant_name, "a").leases
    other = kit.tenant(tenant_name, "b").leases
    await acquire(one, 10)

    assert await other.get("leader", now_ms=10) is None
    assert await other.release("leader", TOKEN_A, now_ms=10) == "lost"
    assert (await acquire(other, 10)).outcome == "acquired"
    assert await other.release("leader", TOKEN_A, now_ms=11) == "released"
    assert await one.get("leader", now_ms=11) is not None


async def test_a_cancelled_acquisition_is_released(leases: Leases) -> None:
    """Cancelled at any moment, nobody is left holding the name."""
    for moment in range(12):
        task = asyncio.create_task(acquire(leases, 10 + moment, token=None, ttl_ms=10_000))
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        [result] = await asyncio.gather(task, return_exceptions=True)
        if isinstance(result, Acquisition):
            assert result.lease is not None
            await leases.release("leader", result.lease.token, now_ms=10 + moment)
        await leases.get("leader", now_ms=10 + moment)
        assert await leases.get("leader", now_ms=10 + moment) is None, moment


# --- hold -----------------------------------------------------------------------------------------


@pytest.fixture
async def live(connected: Connect, tenant_name: str) -> Leases:
    """Leases on the server's clock."""
    return (await connected(clock="server")).tenant(tenant_name, "w").leases


@pytest.fixture
async def in_memory(memory_server: Server) -> Any:
    """Leases on the server's clock, once and not on every server: for what takes its time."""
    async with leasekit.connect(memory_server.url) as kit:
        yield kit.tenant("o", "w").leases


async def test_hold_holds_and_gives_back(live: Leases) -> None:
    """Held while the body runs, free right after it."""
    async with live.hold("leader", ttl_ms=60_000, owner="a") as lease:
        holder = await live.get("leader")
        assert holder is not None
        assert (holder.owner, holder.fence) == ("a", lease.fence)
        assert not lease.lost.is_set()
        assert 0 < lease.remaining_ms() <= 60_000
    assert await live.get("leader") is None
    assert not lease.lost.is_set()


async def test_hold_passes_exceptions_on(live: Leases) -> None:
    """The body's own error comes out, and the name is free."""
    with pytest.raises(ZeroDivisionError):
        async with live.hold("leader", ttl_ms=60_000, owner="a"):
            raise ZeroDivisionError
    assert await live.get("leader") is None


async def test_hold_of_a_busy_name_is_a_conflict(live: Leases) -> None:
    """Without waiting it asks once; the error names the holder, not its token."""
    async with live.hold("leader", ttl_ms=60_000, owner="a") as held:
        with pytest.raises(Conflict, match="lease leader is held by a until") as raised:
            async with live.hold("leader", ttl_ms=60_000, owner="b"):
                pytest.fail("two holders")
        assert held.token not in str(raised.value)
        assert raised.value.id == "leader"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The owner of each acquisition, as they are asked for."""
    owners: list[str] = []
    plain = Leases.acquire

    async def acquire(self: Leases, name: str, **options: Any) -> Acquisition:
        owners.append(options["owner"])
        return await plain(self, name, **options)

    monkeypatch.setattr(Leases, "acquire", acquire)
    return owners


async def test_hold_waits_for_a_busy_name(live: Leases, asked: list[str]) -> None:
    """It gets the name soon after it is free."""
    entered = asyncio.Event()

    async def second() -> int:
        async with live.hold("leader", ttl_ms=60_000, owner="b", wait_ms=10_000) as lease:
            entered.set()
            return lease.fence

    async with live.hold("leader", ttl_ms=60_000, owner="a") as first:
        waiting = asyncio.create_task(second())
        while asked.count("b") < 2:
            await asyncio.wait([waiting], timeout=0.005)
        assert not entered.is_set()
    assert await waiting > first.fence


async def test_waiting_does_not_hammer(in_memory: Leases, asked: list[str]) -> None:
    """In 300 ms a waiter asks a handful of times, in growing steps, and then says who holds it."""
    async with in_memory.hold("leader", ttl_ms=60_000, owner="a"):
        with pytest.raises(Conflict, match="held by a"):
            async with in_memory.hold("leader", ttl_ms=60_000, owner="b", wait_ms=300):
                pytest.fail("two holders")
    assert 4 <= asked.count("b") <= 15


async def test_hold_renews_by_itself(in_memory: Leases) -> None:
    """Long before the end, with the same fence; the body notices nothing."""
    async with in_memory.hold("leader", ttl_ms=150, owner="a") as lease:
        first_end_ms = lease.expires_at_ms
        renewals = 0
        last_end_ms = first_end_ms
        while renewals < 3:
            await asyncio.wait([asyncio.create_task(lease.lost.wait())], timeout=0.01)
            renewals += lease.expires_at_ms > last_end_ms
            last_end_ms = lease.expires_at_ms
        assert not lease.lost.is_set()
        holder = await in_memory.get("leader")
        assert holder is not None
        assert (holder.fence, holder.expires_at_ms) == (lease.fence, lease.expires_at_ms)
        assert lease.expires_at_ms > first_end_ms


async def test_a_lease_that_was_taken_cancels_the_body(
    live: Leases, server: Server, tenant_name: str
) -> None:
    """The next renewal finds out: event, cancellation, LeaseLost."""
    seen: list[bool] = []

    async def body() -> None:
        async with live.hold("leader", ttl_ms=90, owner="a") as lease:
            server.raw.delete(f"lk:{{{tenant_name}.w}}:lease:docs")
            try:
                await asyncio.Event().wait()
            finally:
                seen.append(lease.lost.is_set())

    with pytest.raises(LeaseLost, match="lease leader was lost while its body ran") as raised:
        await body()
    assert seen == [True]
    assert (raised.value.id, raised.value.tenant) == ("leader", f"{tenant_name}.w")
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@pytest.fixture
def no_renewal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every renewal fails, as when the server is away."""

    async def extend(*arguments: Any) -> None:
        raise Unavailable("the server is away")

    monkeypatch.setattr(Leases, "_extend", extend)


@pytest.mark.usefixtures("no_renewal")
async def test_the_body_ends_before_a_lease_that_cannot_be_renewed(in_memory: Leases) -> None:
    """By the local clock, while the lease is still there: nobody else can be at work yet."""
    left_ms: list[int] = []

    async def body() -> None:
        async with in_memory.hold("leader", ttl_ms=1_000, owner="a") as lease:
            try:
                await asyncio.Event().wait()
            finally:
                left_ms.append(lease.remaining_ms())

    with pytest.raises(LeaseLost):
        await body()
    assert 0 < left_ms[0] <= 50


@pytest.mark.usefixtures("no_renewal")
async def test_a_body_that_swallows_its_cancellation_is_told_at_the_end(in_memory: Leases) -> None:
    """LeaseLost is raised even if the body ends as if nothing had been."""

    async def body() -> None:
        async with in_memory.hold("leader", ttl_ms=60, owner="a"):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    with pytest.raises(LeaseLost):
        await body()


@pytest.mark.usefixtures("no_renewal")
async def test_an_error_of_the_body_is_stronger_than_the_loss(in_memory: Leases) -> None:
    """What went wrong first comes out."""

    async def body() -> None:
        async with in_memory.hold("leader", ttl_ms=60, owner="a"):
            try:
                await asyncio.Event().wait()
            finally:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body()


@pytest.mark.usefixtures("no_renewal")
async def test_a_cancellation_from_outside_is_not_swallowed(in_memory: Leases) -> None:
    """Lost and cancelled by somebody else as well: the task ends as cancelled."""
    lost = asyncio.Event()

    async def body() -> None:
        async with in_memory.hold("leader", ttl_ms=60, owner="a"):
            try:
                await asyncio.Event().wait()
            finally:
                lost.set()
                await asyncio.shield(asyncio.Event().wait())

    task = asyncio.create_task(body())
    await lost.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


async def test_a_cancelled_body_gives_the_name_back(live: Leases) -> None:
    """Cancelled from outside: the task is cancelled, the name is free."""
    entered = asyncio.Event()

    async def body() -> None:
        async with live.hold("leader", ttl_ms=60_000, owner="a"):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await entered.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert await live.get("leader") is None


async def test_a_name_is_given_back_also_when_the_way_out_is_cancelled(live: Leases) -> None:
    """At whatever moment."""
    for moment in range(6):
        leave = asyncio.Event()
        entered = asyncio.Event()
        task = asyncio.create_task(_hold_until(live, entered, leave))
        await entered.wait()
        leave.set()
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await live.get("leader")
        assert await live.get("leader") is None, moment


async def _hold_until(leases: Leases, entered: asyncio.Event, leave: asyncio.Event) -> None:
    async with leases.hold("leader", ttl_ms=60_000, owner="a"):
        entered.set()
        await leave.wait()


@pytest.mark.usefixtures("no_renewal")
async def test_a_timeout_inside_of_a_cancelled_task_still_ends_in_a_loss(in_memory: Leases) -> None:
    """Cleaning up in a task that was cancelled before: the loss is raised, not passed off."""

    async def body() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            async with in_memory.hold("leader", ttl_ms=60, owner="a"):
                await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert isinstance(task.exception(), LeaseLost)


async def test_a_release_that_fails_does_not_hide_the_bodys_end(
    live: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease ends by itself, and it protected the body to the end."""

    def release(*arguments: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_exception(Unavailable("the server is away"))
        return future

    monkeypatch.setattr(Leases, "_release", release)
    async with live.hold("leader", ttl_ms=60_000, owner="a"):
        pass
    with pytest.raises(ZeroDivisionError):
        async with live.hold("other", ttl_ms=60_000, owner="a"):
            raise ZeroDivisionError


async def test_hold_needs_a_running_clock(leases: Leases) -> None:
    """On the caller's clock nobody can say when to renew."""
    with pytest.raises(InvalidInput, match="now_ms is required"):
        async with leases.hold("leader", ttl_ms=10, owner="a"):
            pytest.fail("held without a clock")
