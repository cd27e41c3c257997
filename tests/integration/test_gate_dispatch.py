"""`dispatch`: a grant around a body, left with a true record whatever happens in it (design 8)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from gate_events import ID, call
from servers import Server

import leasekit
from leasekit import (
    Conflict,
    GatePolicy,
    InProgress,
    InvalidInput,
    Leasekit,
    LeaseLost,
    OutcomeUnknown,
    Tenant,
    Unavailable,
    replicated,
)
from leasekit.gate import Gate, Intent, Permit
from leasekit.gate import gate as gate_module
from leasekit.scope import Scope

Connect = Callable[..., Awaitable[Leasekit]]

MINUTE = 60_000


@pytest.fixture
async def live_kit(connected: Connect) -> Leasekit:
    """A client on the server's clock: what dispatch needs."""
    return await connected(clock="server")


@pytest.fixture
def live(live_kit: Leasekit, tenant_name: str) -> Gate:
    return live_kit.tenant(tenant_name, "w").gate


@pytest.fixture
async def quick_kit(memory_server: Server) -> AsyncIterator[Leasekit]:
    """The same once and not on every server: for what takes its time."""
    async with leasekit.connect(memory_server.url) as kit:
        yield kit


@pytest.fixture
def quick(quick_kit: Leasekit, tenant_name: str) -> Gate:
    return quick_kit.tenant(tenant_name, "w").gate


async def look(gate: Gate, id: str = ID) -> Intent:
    """What is known of the fixture's intent, once all that was asked before has its answer."""
    await gate.get(id)
    intent = await gate.get(id)
    assert intent is not None
    return intent


async def granted_again(gate: Gate) -> int:
    """Attempts of the fixture's intent, after it was granted once more."""
    async with gate.dispatch(call()) as permit:
        return permit.attempts


# --- the words ------------------------------------------------------------------------------------


async def test_a_permit_is_a_grant(live: Gate) -> None:
    """Claimed while the body runs, and it parks."""
    async with live.dispatch(call(), lease_ms=MINUTE, owner="sender-1") as permit:
        assert (permit.key, permit.id, permit.attempts) == ("tool-dispatch-test", ID, 1)
        assert permit.is_gated
        assert not permit.has_begun
        assert not permit.has_spoken
        row = await look(live)
        assert (row.status, row.on_expiry, row.owner) == ("claimed", "park", "sender-1")
        assert row.fence == permit.fence
        assert row.claim_expires_at_ms is not None
        assert row.claimed_at_ms is not None
        assert row.claim_expires_at_ms - row.claimed_at_ms == MINUTE
        with pytest.raises(InProgress, match="by sender-1"):
            await granted_again(live)


@pytest.mark.parametrize("awaits", [True, False])
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize(
    ("word", "status"), [("sent", "sent"), ("failed", "failed"), ("not_sent", "cancelled")]
)
async def test_a_word_is_recorded(
    live: Gate, word: str, status: str, awaits: bool, begins: bool
) -> None:
    """At once where it is awaited, and at the latest on the way out."""
    async with live.dispatch(call()) as permit:
        if begins:
            permit.begin()
        said = getattr(permit, word)("what came back")
        assert permit.has_spoken
        if awaits:
            await said
            assert (await look(live)).status == status
    row = await look(live)
    assert row.status == status
    assert (row.facts[0].fence, row.facts[0].applied) == (permit.fence, True)
    if word == "sent":
        assert row.result == "what came back"
    else:
        assert row.metadata["dispatch_error"] == "what came back"
    if word == "not_sent":
        assert await granted_again(live) == 2
    else:
        with pytest.raises(Conflict, match=f"already `{status}`"):
            await granted_again(live)


async def test_one_word_a_grant(live: Gate) -> None:
    """The first one counts."""
    async with live.dispatch(call()) as permit:
        permit.begin()
        await permit.sent()
        for say in (permit.sent, lambda: permit.failed("e"), permit.not_sent):
            with pytest.raises(InvalidInput, match="one word a grant"):
                say()
    assert (await look(live)).status == "sent"


@pytest.mark.parametrize("word", ["sent", "failed"])
async def test_a_result_that_cannot_be_kept_does_not_hide_the_word(live: Gate, word: str) -> None:
    """The caller is told, and the intent does not become unknown for it."""

    async def body() -> None:
        async with live.dispatch(call()) as permit:
            permit.begin()
            if word == "sent":
                await permit.sent(object())
            else:
                await permit.failed("refused", result="x" * 100_000)

    with pytest.raises(InvalidInput, match="is being recorded without it; do not send again"):
        await body()
    row = await look(live)
    assert (row.status, row.result) == (word, None)


async def test_an_ungated_call_gets_a_permit_too(live: Gate) -> None:
    """Without a fence; nothing is written, and every word is fine."""
    for word in ("sent", "failed", "not_sent"):
        async with live.dispatch(call(risk_tier="read_discover")) as permit:
            assert not permit.is_gated
            assert (permit.fence, permit.id, permit.receipt, permit.attempts) == (None,) * 3 + (0,)
            permit.begin()
            await getattr(permit, word)("x")
    async with live.dispatch(call(risk_tier="read_discover")) as permit:
        permit.begin()
    assert await live.get(ID) is None


async def test_permits_show_no_token(live: Gate) -> None:
    async with live.dispatch(call()) as permit:
        assert permit.receipt is not None
        assert permit.receipt.token not in repr(permit) + str(permit) + repr(permit.receipt)


async def test_dispatch_needs_a_running_clock(tenant: Tenant) -> None:
    """On the caller's clock nobody can say when to renew."""
    with pytest.raises(InvalidInput, match="now_ms is required"):
        async with tenant.gate.dispatch(call()):
            pytest.fail("granted without a clock")


# --- leaving without a word -----------------------------------------------------------------------


async def leave(gate: Gate, how: str, *, begins: bool, **options: Any) -> None:
    """A dispatch whose body ends in some way, without a word."""

    async def body() -> None:
        async with gate.dispatch(call(), **options) as permit:
            if begins:
                permit.begin()
            if how == "exception":
                raise ZeroDivisionError
            if how == "cancelled":
                entered.set()
                await asyncio.Event().wait()

    entered = asyncio.Event()
    task = asyncio.create_task(body())
    if how == "cancelled":
        await entered.wait()
        task.cancel()
    await asyncio.wait([task])
    assert task.cancelled() == (how == "cancelled")
    if how == "exception":
        assert isinstance(task.exception(), ZeroDivisionError)
    elif how == "normal":
        assert task.exception() is None


@pytest.mark.parametrize("how", ["normal", "exception", "cancelled"])
async def test_leaving_before_begin_cancels(live: Gate, how: str) -> None:
    """Nothing was sent: the next one may."""
    await leave(live, how, begins=False)
    row = await look(live)
    assert (row.status, row.cause) == ("cancelled", "blocked")
    assert await granted_again(live) == 2


@pytest.mark.parametrize("how", ["normal", "exception", "cancelled"])
async def test_leaving_after_begin_is_unknown(
    live: Gate, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by a normal exit; at once, and no one is granted it again. The log says so."""
    with caplog.at_level(logging.WARNING, "leasekit.gate.permit"):
        await leave(live, how, begins=True, lease_ms=MINUTE)
    row = await look(live)
    assert (row.status, row.cause) == ("unknown", "left")
    assert (
        row.facts[0].error
        == {
            "normal": "left without a word",
            "exception": "ZeroDivisionError",
            "cancelled": "CancelledError",
        }[how]
    )
    assert "nobody knows" in caplog.text
    assert ID in caplog.text
    assert [one.outbox_id for one in (await live.unknown()).items] == [ID]
    with pytest.raises(OutcomeUnknown, match="already `unknown`"):
        await granted_again(live)


@pytest.mark.parametrize("how", ["normal", "exception", "cancelled"])
async def test_leaving_a_call_that_reclaims_gives_way_at_once(live: Gate, how: str) -> None:
    """on_expiry="reclaim": whoever lets others try again need not wait for the lease's end."""
    await leave(live, how, begins=True, on_expiry="reclaim", lease_ms=MINUTE)
    row = await look(live)
    assert (row.status, row.cause) == ("claimed", "left")
    assert await granted_again(live) == 2


async def test_the_policy_says_whether_a_dispatch_parks(
    connected: Connect, tenant_name: str
) -> None:
    """Unless the call does."""
    kit = await connected(clock="server", gate=GatePolicy(on_expiry="reclaim", lease_ms=MINUTE))
    gate = kit.tenant(tenant_name, "w").gate
    async with gate.dispatch(call()):
        row = await look(gate)
        assert row.on_expiry == "reclaim"
        assert row.claimed_at_ms is not None
        assert row.claim_expires_at_ms == row.claimed_at_ms + MINUTE
    async with gate.dispatch(call(), on_expiry="park"):
        assert (await look(gate)).on_expiry == "park"


async def test_the_sender_may_still_speak_after_it_left(live: Gate) -> None:
    """With its receipt: that is the late, true completion that design 8 allows."""
    async with live.dispatch(call()) as permit:
        permit.begin()
    assert (await look(live)).status == "unknown"
    assert permit.receipt is not None
    late = leasekit.gate.LedgerEvent(
        tool="t",
        source=call().source,
        policy_outcome="allowed",
        status="succeeded",
        dispatch_id=permit.key,
    )
    assert await live.complete(late, receipt=permit.receipt) == "recorded"
    assert (await look(live)).status == "sent"


# --- records that fail ----------------------------------------------------------------------------


@pytest.fixture
def no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every completion fails, as when the server is away."""

    async def complete(*arguments: Any) -> None:
        raise Unavailable("the server is away")

    monkeypatch.setattr(Gate, "_complete", complete)


@pytest.mark.usefixtures("no_record")
@pytest.mark.parametrize("speaks", [True, False])
async def test_a_record_that_fails_is_told_at_the_end(quick: Gate, speaks: bool) -> None:
    """Of a body that ended well."""

    async def body() -> None:
        async with quick.dispatch(call()) as permit:
            permit.begin()
            if speaks:
                permit.sent()

    with pytest.raises(Unavailable, match="the server is away"):
        await body()


@pytest.mark.usefixtures("no_record")
async def test_a_record_that_fails_is_told_where_it_is_awaited(quick: Gate) -> None:
    """In the body; and once is enough."""

    async def body() -> None:
        async with quick.dispatch(call()) as permit:
            permit.begin()
            await permit.sent()

    with pytest.raises(Unavailable) as raised:
        await body()
    assert not getattr(raised.value, "__notes__", [])


@pytest.mark.usefixtures("no_record")
@pytest.mark.parametrize("speaks", [True, False])
async def test_an_exception_of_the_body_is_kept(quick: Gate, speaks: bool) -> None:
    """The same one, with a note of what could not be recorded."""
    error = ZeroDivisionError()

    async def body() -> None:
        async with quick.dispatch(call()) as permit:
            permit.begin()
            if speaks:
                permit.sent()
            raise error

    with pytest.raises(ZeroDivisionError) as raised:
        await body()
    assert raised.value is error
    assert error.__notes__ == ["leasekit: the server is away"]


# --- cancellation at every point ------------------------------------------------------------------


async def cancelled_after(moments: int, body: Callable[[], Awaitable[None]], *more: int) -> bool:
    """Cancel a body that many turns after its start, and again so many turns later; whether it
    ended as cancelled."""
    task = asyncio.ensure_future(body())
    for pause in (moments, *more):
        for _ in range(pause):
            await asyncio.sleep(0)
        task.cancel()
    await asyncio.wait([task])
    return task.cancelled()


@pytest.mark.parametrize("twice", [(), (1,)], ids=["once", "twice"])
async def test_cancelled_before_it_begins(live: Gate, twice: tuple[int, ...]) -> None:
    """While the grant is asked for, in the body, on the way out: the next one is granted."""

    async def body() -> None:
        async with live.dispatch(call()):
            await asyncio.wait([asyncio.create_task(live.get(ID))])

    async with live.dispatch(call("registers the tenant")):
        pass
    for moment in range(16):
        await cancelled_after(moment, body, *twice)
        await live.get(ID)  # whatever was asked for before has its answer
        await live.get(ID)
        assert await granted_again(live) > 0, moment


@pytest.mark.parametrize("twice", [(), (1,), (3,)], ids=["once", "twice", "twice, later"])
async def test_cancelled_while_its_word_is_recorded(live: Gate, twice: tuple[int, ...]) -> None:
    """At whatever moment: who awaits the record is cancelled, the record is not."""
    said = asyncio.Event()
    for moment in range(8):
        event, said = call(f"key-{moment}"), asyncio.Event()
        ids: list[str] = []

        async def body() -> None:
            async with live.dispatch(event) as permit:  # noqa: B023
                ids.append(str(permit.id))  # noqa: B023
                permit.begin()
                recording = permit.sent("done")
                said.set()  # noqa: B023
                await recording
                await asyncio.Event().wait()

        task = asyncio.create_task(body())
        await said.wait()
        for pause in (moment, *twice):
            for _ in range(pause):
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        row = await look(live, ids[0])
        assert (row.status, row.result) == ("sent", "done"), moment


@pytest.mark.parametrize(("begins", "status"), [(True, "unknown"), (False, "cancelled")])
async def test_cancelled_on_the_way_out(live: Gate, begins: bool, status: str) -> None:
    """What became of it is recorded all the same."""
    for moment in range(8):
        leaves = asyncio.Event()
        event = call(f"key-{moment}")
        permits: list[Permit] = []

        async def body() -> None:
            async with live.dispatch(event) as permit:  # noqa: B023
                permits.append(permit)  # noqa: B023
                if begins:
                    permit.begin()
                await leaves.wait()  # noqa: B023

        task = asyncio.create_task(body())
        while not permits:
            await live.get(ID)
        leaves.set()
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        row = await look(live, str(permits[0].id))
        assert row.status == status, moment


async def test_a_closing_client_still_records(server: Server, tenant_name: str) -> None:
    """A task that is cancelled twice, on its way out of the dispatch and of the client."""
    entered = asyncio.Event()

    async def body() -> None:
        async with (
            leasekit.connect(server.url) as kit,
            kit.tenant(tenant_name, "w").gate.dispatch(call()) as permit,
        ):
            permit.begin()
            permit.sent()
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await entered.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    async with leasekit.connect(server.url) as kit:
        assert (await look(kit.tenant(tenant_name, "w").gate)).status == "sent"


async def test_a_grant_whose_answer_was_lost_is_withdrawn(
    live: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody will use it: the next one is granted."""
    plain = Gate._prepare

    async def prepare(self: Gate, *arguments: Any, **options: Any) -> None:
        await plain(self, *arguments, **options)
        raise OutcomeUnknown("the connection ended before the reply came")

    monkeypatch.setattr(Gate, "_prepare", prepare)
    with pytest.raises(OutcomeUnknown, match="the connection ended"):
        await granted_again(live)
    monkeypatch.undo()
    assert (await look(live)).status == "cancelled"
    assert await granted_again(live) == 2


async def test_a_grant_that_comes_too_late_is_withdrawn(
    live: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease was over when it arrived."""
    plain = gate_module.local_clock_s
    monkeypatch.setattr(gate_module, "local_clock_s", lambda: plain() + 3_600)
    for attempt in (live.prepare(call()), granted_again(live)):
        with pytest.raises(LeaseLost, match="after its lease was over: do not send"):
            await attempt
        assert (await look(live)).status == "cancelled"
    monkeypatch.undo()
    assert await granted_again(live) == 3


# --- the lease ------------------------------------------------------------------------------------


async def test_begin_refuses_with_too_little_left(live: Gate) -> None:
    """The call is not made, and its intent is free."""

    async def body() -> None:
        async with live.dispatch(call(), lease_ms=MINUTE) as permit:
            permit.begin(needs_ms=MINUTE // 2)
            assert permit.has_begun
        async with live.dispatch(call("other"), lease_ms=MINUTE) as permit:
            permit.begin(needs_ms=2 * MINUTE)
            pytest.fail("begun")

    with pytest.raises(LeaseLost, match="do not send; nothing was begun"):
        await body()
    row = (await live.list(status="cancelled")).items[0]
    assert row.idempotency_key == "other"


async def test_a_second_begin_tells_of_the_first(live: Gate) -> None:
    """Nothing is cancelled of a call that may have arrived."""

    async def body() -> None:
        async with live.dispatch(call(), lease_ms=MINUTE) as permit:
            permit.begin()
            permit.begin(needs_ms=2 * MINUTE)

    with pytest.raises(LeaseLost, match="it was begun before"):
        await body()
    assert (await look(live)).status == "unknown"


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ends of leases that were extended, as they are."""
    found: list[int] = []
    plain = Gate.extend

    async def extend(self: Gate, *arguments: Any, **options: Any) -> Any:
        extended = await plain(self, *arguments, **options)
        if extended is not None:
            found.append(extended.lease_expires_at_ms)
        return extended

    monkeypatch.setattr(Gate, "extend", extend)
    return found


async def test_a_dispatch_extends_its_lease_by_itself(quick: Gate, ends: list[int]) -> None:
    """Long before the end, with the same fence; the body notices nothing."""
    async with quick.dispatch(call(), lease_ms=600) as permit:
        fence = permit.fence
        while len(ends) < 3:
            await asyncio.wait([asyncio.create_task(permit.lost.wait())], timeout=0.01)
            assert not permit.lost.is_set()
        row = await look(quick)
        assert (row.fence, permit.fence) == (fence, fence)
        assert row.claim_expires_at_ms in ends
        assert permit.receipt is not None
        assert permit.receipt.lease_expires_at_ms in ends
        permit.begin(needs_ms=0)


async def test_after_the_word_no_lease_is_lost(
    quick_kit: Leasekit, quick: Gate, ends: list[int]
) -> None:
    """The effect is made and said: the body may go on for as long as it likes."""
    async with quick.dispatch(call(), lease_ms=600) as permit:
        permit.begin()
        await permit.sent()
        extended = len(ends)
        assert permit.receipt is not None
        while await quick_kit.now_ms() <= permit.receipt.lease_expires_at_ms + 50:
            assert not permit.lost.is_set()
    assert len(ends) == extended
    assert (await look(quick)).status == "sent"


def edit(server: Server, tenant_name: str, change: Callable[[list[bytes]], None]) -> None:
    """Change the words of the fixture's state line by hand."""
    key = f"lk:{{{tenant_name}.w}}:gate:state"
    words = server.raw.hget(key, ID).split(b" ")
    change(words)
    server.raw.hset(key, ID, b" ".join(words))


def end_lease(words: list[bytes]) -> None:
    words[3] = b"1"  # as when the server's clock jumps


def take_over(words: list[bytes]) -> None:
    words[2] = b"z" * 22  # as when another sender was granted it


async def lose(gate: Gate, by: Callable[[], object], *, begins: bool, **options: Any) -> Permit:
    """A dispatch whose lease is lost in its body, at its first renewal; the permit that it had."""
    permits: list[Permit] = []
    async with gate.dispatch(call(), lease_ms=900, **options) as permit:
        permits.append(permit)
        if begins:
            permit.begin()
        by()
        await asyncio.Event().wait()
    raise AssertionError("the body was not cancelled")


@pytest.mark.parametrize(
    ("begins", "status", "says"),
    [
        (True, "unknown", "whether the call arrived is not known, and it is recorded so"),
        (False, "cancelled", "the call was not begun, and it is cancelled; dispatch it again"),
    ],
)
async def test_a_lease_that_ended_cancels_the_body(
    live: Gate, server: Server, tenant_name: str, begins: bool, status: str, says: str
) -> None:
    """The server refuses to extend: body cancelled, LeaseLost, and the truth is recorded."""
    with pytest.raises(LeaseLost, match="was lost while its body ran") as raised:
        await lose(live, lambda: edit(server, tenant_name, end_lease), begins=begins)
    assert says in str(raised.value)
    assert raised.value.id == ID
    assert (await look(live)).status == status
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@pytest.mark.parametrize(
    ("begins", "says"),
    [
        (True, "another sender may be granted the intent; see what it says before you send again"),
        (False, "not begun, and the intent is not this sender's any more"),
    ],
)
@pytest.mark.parametrize("on_expiry", ["park", "reclaim"])
async def test_a_lease_that_was_taken_over_cancels_the_body(
    live: Gate, server: Server, tenant_name: str, on_expiry: Any, begins: bool, says: str
) -> None:
    """The other one's grant stays as it is; what this one said is kept beside it."""
    with pytest.raises(LeaseLost) as raised:
        await lose(
            live,
            lambda: edit(server, tenant_name, take_over),
            begins=begins,
            on_expiry=on_expiry,
        )
    assert says in str(raised.value)
    row = await look(live)
    assert row.cause == "granted"
    assert [(fact.kind, fact.applied) for fact in row.facts] == [
        ("left" if begins else "blocked", False)
    ]


async def test_an_intent_that_is_gone_cancels_the_body(
    live: Gate, server: Server, tenant_name: str
) -> None:
    """The server was emptied under it."""
    with pytest.raises(LeaseLost):
        await lose(
            live, lambda: server.raw.delete(f"lk:{{{tenant_name}.w}}:gate:state"), begins=True
        )
    assert await live.get(ID) is None


async def test_a_word_of_who_was_overtaken_says_so(
    live: Gate, server: Server, tenant_name: str
) -> None:
    """It is noted, changes nothing, and its sender is told to compare."""

    async def body() -> None:
        async with live.dispatch(call(), lease_ms=MINUTE) as permit:
            permit.begin()
            edit(server, tenant_name, take_over)
            await permit.sent()

    with pytest.raises(LeaseLost, match="compare what both did"):
        await body()
    row = await look(live)
    assert (row.status, [(one.kind, one.applied) for one in row.facts]) == (
        "claimed",
        [("succeeded", False)],
    )


async def test_a_word_that_finds_nothing_says_so(
    live: Gate, server: Server, tenant_name: str
) -> None:
    """It could not be noted; it is true all the same."""

    async def body() -> None:
        async with live.dispatch(call(), lease_ms=MINUTE) as permit:
            permit.begin()
            server.raw.delete(f"lk:{{{tenant_name}.w}}:gate:state")
            permit.sent()

    with pytest.raises(LeaseLost, match=r"could not be noted.*do not send it again"):
        await body()


@pytest.fixture
def no_renewal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every renewal fails, as when the server is away."""

    async def extend(*arguments: Any, **options: Any) -> None:
        raise Unavailable("the server is away")

    monkeypatch.setattr(Gate, "extend", extend)


@pytest.mark.usefixtures("no_renewal")
@pytest.mark.parametrize(("begins", "status"), [(True, "unknown"), (False, "cancelled")])
async def test_the_body_ends_before_a_lease_that_cannot_be_renewed(
    quick: Gate, begins: bool, status: str
) -> None:
    """By the local clock."""
    with pytest.raises(LeaseLost):
        await lose(quick, lambda: None, begins=begins)
    assert (await look(quick)).status == status


@pytest.mark.usefixtures("no_renewal")
async def test_a_late_word_is_stronger_than_the_loss(quick: Gate) -> None:
    """The body was cancelled in the midst of it, and knows that it was sent."""
    async with quick.dispatch(call(), lease_ms=600) as permit:
        permit.begin()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        assert permit.lost.is_set()
        await permit.sent()
    assert (await look(quick)).status == "sent"


@pytest.mark.usefixtures("no_renewal")
async def test_a_word_on_the_way_of_a_cancelled_body_counts(quick: Gate) -> None:
    """LeaseLost tells that it was said."""

    async def body() -> None:
        async with quick.dispatch(call(), lease_ms=600) as permit:
            permit.begin()
            try:
                await asyncio.Event().wait()
            finally:
                permit.sent()

    with pytest.raises(LeaseLost, match="was said all the same"):
        await body()
    assert (await look(quick)).status == "sent"


@pytest.mark.usefixtures("no_renewal")
async def test_a_body_that_swallows_its_cancellation_is_told_at_the_end(quick: Gate) -> None:
    """And begin refuses from then on."""

    async def body() -> None:
        async with quick.dispatch(call(), lease_ms=600) as permit:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            with pytest.raises(LeaseLost, match="too little is left"):
                permit.begin(needs_ms=0)

    with pytest.raises(LeaseLost, match="was lost while its body ran"):
        await body()
    assert (await look(quick)).status == "cancelled"


@pytest.mark.usefixtures("no_renewal")
async def test_an_error_of_the_body_is_stronger_than_the_loss(quick: Gate) -> None:
    """What went wrong first comes out; the intent is unknown."""

    async def body() -> None:
        async with quick.dispatch(call(), lease_ms=600) as permit:
            permit.begin()
            try:
                await asyncio.Event().wait()
            finally:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await body()
    assert (await look(quick)).status == "unknown"


@pytest.mark.usefixtures("no_renewal")
async def test_a_cancellation_from_outside_is_not_swallowed(quick: Gate) -> None:
    """Lost and cancelled by somebody else as well: the task ends as cancelled."""
    lost = asyncio.Event()

    async def body() -> None:
        async with quick.dispatch(call(), lease_ms=600) as permit:
            permit.begin()
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
    assert (await look(quick)).status == "unknown"


# --- side by side ---------------------------------------------------------------------------------


async def test_of_a_hundred_at_once_one_is_granted(live: Gate) -> None:
    """The others learn who has it."""
    release = asyncio.Event()
    permits: list[Permit] = []

    async def body() -> None:
        async with live.dispatch(call()) as permit:
            permits.append(permit)
            permit.begin()
            await release.wait()
            await permit.sent()

    tasks = [asyncio.create_task(body()) for _ in range(100)]
    _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    while len(pending) > 1:
        _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    release.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert len(permits) == 1
    assert [type(one) for one in results].count(InProgress) == 99
    assert (await look(live)).attempts == 1


async def test_bodies_side_by_side_and_inside_of_each_other(live: Gate) -> None:
    """Each intent on its own."""

    async def body(number: int) -> None:
        async with live.dispatch(call(f"outer-{number}")) as outer:
            outer.begin()
            async with live.dispatch(call(f"inner-{number}")) as inner:
                inner.begin()
                await inner.failed("e")
            await outer.sent()

    await asyncio.gather(*(body(number) for number in range(50)))
    assert len((await live.list(status="sent", limit=1_000)).items) == 50
    assert len((await live.list(status="failed", limit=1_000)).items) == 50


# --- durability -----------------------------------------------------------------------------------


@pytest.fixture
def classes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The classes of durability that calls ask for, one a call; all are made as the client's."""
    asked: list[Any] = []

    async def coalescer_for(self: Scope, durability: Any) -> Any:
        asked.append(durability)
        return self.coalescer

    monkeypatch.setattr(Scope, "coalescer_for", coalescer_for)
    return asked


@pytest.mark.parametrize("ending", ["sent", "left", "cancelled"])
async def test_a_grants_durability_is_that_of_all_that_follows(
    quick: Gate, classes: list[Any], ends: list[int], ending: str
) -> None:
    """Renewals, and the completion, by whatever way (design 7)."""
    wanted = replicated(2)
    async with quick.dispatch(call(), durability=wanted, lease_ms=600) as permit:
        while not ends:
            await asyncio.wait([asyncio.create_task(permit.lost.wait())], timeout=0.01)
        if ending != "cancelled":
            permit.begin()
        if ending == "sent":
            await permit.sent()
    assert len(classes) >= 3
    assert set(classes) == {wanted}


async def test_the_gates_durability_holds_where_a_call_names_none(
    memory_server: Server, tenant_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a receipt carries its own to `complete`."""
    async with leasekit.connect(memory_server.url, gate=GatePolicy(durability="none")) as kit:
        asked: list[Any] = []
        plain = Scope.coalescer_for

        async def coalescer_for(self: Scope, durability: Any) -> Any:
            asked.append(durability)
            return await plain(self, durability if durability == "none" else None)

        monkeypatch.setattr(Scope, "coalescer_for", coalescer_for)
        gate = kit.tenant(tenant_name, "w").gate
        receipt = await gate.prepare(call(), durability="fsync")
        assert receipt is not None
        event = leasekit.gate.LedgerEvent(
            tool="t",
            source=call().source,
            policy_outcome="allowed",
            status="succeeded",
            dispatch_id=receipt.idempotency_key,
        )
        await gate.extend(receipt, lease_ms=MINUTE)
        await gate.complete(event, receipt=receipt)
        await gate.complete(event)
        await gate.prepare(call("other"))
    assert asked == ["fsync", "fsync", "fsync", "none", "none"]


async def test_a_grant_that_is_not_durable_is_withdrawn(
    real_server: Server, tenant_name: str
) -> None:
    """No replica has it: nobody sends, and the next one may (design 7)."""
    async with leasekit.connect(real_server.url) as kit:
        gate = kit.tenant(tenant_name, "w").gate
        with pytest.raises(leasekit.NotDurable, match="given back") as raised:
            async with gate.dispatch(call(), durability="replicated(1, timeout_ms=20)"):
                pytest.fail("granted")
        assert (raised.value.reached, raised.value.wanted) == (0, 1)
        seen = "claimed"
        while seen == "claimed":  # It is given back on another connection.
            seen = (await look(gate)).status
        assert seen == "cancelled"
        assert await granted_again(gate) == 2
