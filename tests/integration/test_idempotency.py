"""Idempotency keys as their users see them, on every server: spec/reliability 2."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from leasekit import (
    Conflict,
    InvalidInput,
    Leasekit,
    LeaseLost,
    Outcome,
    OutcomeUnknown,
    Tenant,
    Unavailable,
)
from leasekit.idempotency import Idempotency
from leasekit.model import IdempotencyRecord, Reservation

Connect = Callable[..., Awaitable[Leasekit]]
State = Callable[[], dict[str, Any]]

TOKEN_A, TOKEN_B = "a" * 22, "b" * 22
DAY_MS = 86_400_000


@pytest.fixture
def keys(tenant: Tenant) -> Idempotency:
    return tenant.idempotency


async def reserve(keys: Idempotency, now_ms: int, **options: Any) -> Reservation:
    """Reservation of (outbox.send, send-1) by a with fingerprint-a, unless said otherwise."""
    options = {
        "operation": "outbox.send",
        "key": "send-1",
        "owner": "a",
        "fingerprint": "fingerprint-a",
    } | options
    return await keys.reserve(now_ms=now_ms, **options)


async def complete(keys: Idempotency, now_ms: int, token: str, outcome: Any, **more: Any) -> str:
    return await keys.complete("outbox.send", "send-1", outcome, token=token, now_ms=now_ms, **more)


async def get(keys: Idempotency, now_ms: int) -> IdempotencyRecord:
    record = await keys.get("outbox.send", "send-1", now_ms=now_ms)
    assert record is not None
    return record


# --- the tested behaviours [SEED] -----------------------------------------------------------------


async def test_a_duplicate_gets_the_outcome_of_the_first(kit: Leasekit, tenant_name: str) -> None:
    """spec/reliability 2.9, first, with its literal values."""
    keys = kit.tenant(f"org-{tenant_name}", "workspace-a").idempotency
    asked: dict[str, Any] = {
        "operation": "webhook.provider_event",
        "key": "evt-1",
        "owner": "automation_webhook:trigger-a",
        "fingerprint": "fingerprint-a",
        "event_id": "event-a",
    }
    first = await keys.reserve(**asked, now_ms=1_000)
    assert first.outcome == "reserved"
    assert first.token is not None
    assert (first.record.schema_version, first.record.status) == (1, "reserved")
    assert (first.record.first_seen_at_ms, first.record.last_seen_at_ms) == (1_000, 1_000)
    assert (first.record.first_seen_event_id, first.record.outcome) == ("event-a", None)
    outcome = Outcome(
        outcome_kind="accepted",
        completed_at_ms=1_100,
        primary_ref_kind="delivery",
        primary_ref_id="delivery-a",
        secondary_ref_kind="run",
        secondary_ref_id="run-a",
        details={"dedupe_result": "accepted"},
    )
    completed = await keys.complete(
        "webhook.provider_event", "evt-1", outcome, token=first.token, now_ms=1_100
    )
    assert completed == "completed"

    second = await keys.reserve(**asked, now_ms=1_200)
    assert (second.outcome, second.token) == ("duplicate", None)
    assert second.record.record_id == first.record.record_id
    assert (second.record.status, second.record.outcome) == ("completed", outcome)
    assert second.record.last_seen_at_ms == 1_200


async def test_the_same_key_of_another_tenant_is_another_key(
    kit: Leasekit, tenant_name: str
) -> None:
    """spec/reliability 2.9, second: wait.wake / wake-1 in two orgs."""
    reserved = [
        await kit.tenant(f"org-{letter}-{tenant_name}", "workspace-a").idempotency.reserve(
            "wait.wake", "wake-1", owner="o", fingerprint=f"fingerprint-{letter}", now_ms=1_000
        )
        for letter in "ab"
    ]
    assert [one.outcome for one in reserved] == ["reserved", "reserved"]
    assert len({one.record.record_id for one in reserved}) == 2


async def test_another_fingerprint_conflicts(keys: Idempotency) -> None:
    """spec/reliability 2.9, third: outbox.send / send-1."""
    await reserve(keys, 1_000)
    other = await reserve(keys, 1_001, fingerprint="fingerprint-b")

    assert (other.outcome, other.token) == ("conflict", None)
    assert (other.record.status, other.record.conflict_count) == ("conflicted", 1)
    assert other.record.conflict_fingerprints == ["fingerprint-b"]
    assert other.record.request_fingerprint == "fingerprint-a"
    assert (await get(keys, 1_001)).status == "conflicted"


async def test_a_repeated_conflict_counts_twice_and_lists_once(keys: Idempotency) -> None:
    """And the first fingerprint is still a duplicate, shown as conflicted."""
    await reserve(keys, 10)
    for now_ms in (11, 12):
        await reserve(keys, now_ms, fingerprint="fingerprint-b")
    await reserve(keys, 13, fingerprint="fingerprint-c")
    again = await reserve(keys, 14)

    assert (again.outcome, again.record.status) == ("duplicate", "conflicted")
    assert again.record.conflict_count == 3
    assert again.record.conflict_fingerprints == ["fingerprint-b", "fingerprint-c"]


async def test_conflicting_fingerprints_are_bounded(keys: Idempotency) -> None:
    """32 are listed, all are counted."""
    await reserve(keys, 10)
    for number in range(40):
        await reserve(keys, 11, fingerprint=f"other-{number}")
    record = await get(keys, 11)
    assert record.conflict_count == 40
    assert record.conflict_fingerprints == [f"other-{number}" for number in range(32)]


async def test_a_conflict_keeps_the_outcome(keys: Idempotency) -> None:
    """It is still replayed to the first request."""
    first = await reserve(keys, 10)
    assert first.token is not None
    await complete(keys, 11, first.token, {"sent": 1})
    await reserve(keys, 12, fingerprint="fingerprint-b")
    again = await reserve(keys, 13)
    assert (again.outcome, again.record.status) == ("duplicate", "conflicted")
    assert again.record.outcome is not None
    assert again.record.outcome.details == {"sent": 1}


# --- the order and words of checks ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("blank", "says"),
    [
        (("key", "operation", "owner", "fingerprint"), "idempotency key cannot be empty"),
        (("operation", "owner", "fingerprint"), "idempotency operation cannot be empty"),
        (("owner", "fingerprint"), "idempotency owner cannot be empty"),
        (("fingerprint",), "idempotency fingerprint cannot be empty"),
    ],
)
async def test_a_reservation_is_checked_in_order(
    keys: Idempotency, blank: tuple[str, ...], says: str
) -> None:
    """spec/reliability 2.3: key, operation, owner, fingerprint, in these words."""
    with pytest.raises(InvalidInput, match=f"^{says}$") as raised:
        await reserve(keys, 10, **dict.fromkeys(blank, " \t"))
    assert raised.value.field == blank[0]


async def test_names_are_trimmed(keys: Idempotency) -> None:
    """Everywhere: the same key with blanks around it is the same key."""
    await reserve(keys, 10, operation=" outbox.send\n", key="\tsend-1 ", owner=" a ")
    again = await reserve(keys, 11, fingerprint=" fingerprint-a ")

    assert again.outcome == "duplicate"
    assert (again.record.operation, again.record.key) == ("outbox.send", "send-1")
    assert again.record.owner == "a"
    found = await keys.get(" outbox.send", "send-1\n", now_ms=11)
    assert found is not None
    assert found.record_id == again.record.record_id


async def test_a_blank_key_is_found_nowhere(keys: Idempotency) -> None:
    """get: none, no error; complete and release: an error."""
    assert await keys.get(" ", "k", now_ms=10) is None
    assert await keys.get("op", "", now_ms=10) is None
    with pytest.raises(InvalidInput, match="idempotency key cannot be empty"):
        await keys.complete("op", " ", 1, token=TOKEN_A, now_ms=10)
    with pytest.raises(InvalidInput, match="idempotency operation cannot be empty"):
        await keys.release(" ", "k", token=TOKEN_A, now_ms=10)


async def test_names_may_hold_anything_else(keys: Idempotency) -> None:
    """NUL, line ends within, any script; fingerprints too."""
    odd: dict[str, Any] = {
        "operation": "a\x00\nb",
        "key": "\U0001f600 é",
        "owner": "o\r\no",
        "fingerprint": "f f\n~",
        "event_id": "\x00",
    }
    await keys.reserve(**odd, now_ms=10)
    again = await keys.reserve(**odd, now_ms=11)
    record = again.record
    assert again.outcome == "duplicate"
    assert (record.operation, record.key, record.owner) == ("a\x00\nb", "\U0001f600 é", "o\r\no")
    assert (record.request_fingerprint, record.first_seen_event_id) == ("f f\n~", "\x00")


def test_fingerprints_have_a_helper(keys: Idempotency) -> None:
    """spec/reliability, appendix A."""
    assert keys.fingerprint("trigger-a", "body_digest", "sha256:body") == (
        "sha256:2be9b9c1eda407f6cd14eb07a7fd03dada2ff64e19676319adc173f94e31a1f0"
    )


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("now_ms", "outcome"), [(19, "duplicate"), (20, "reserved")])
@pytest.mark.parametrize("completed", [False, True])
async def test_a_keys_own_end_frees_it_whatever_its_status(
    keys: Idempotency, now_ms: int, outcome: str, completed: bool
) -> None:
    """Inclusive, and checked first: outcome, conflicts and first_seen are gone."""
    first = await reserve(keys, 10, expires_at_ms=20)
    assert first.token is not None
    if completed:
        await complete(keys, 11, first.token, 1)
    second = await reserve(keys, now_ms)

    assert second.outcome == outcome
    assert second.record.first_seen_at_ms == (10 if outcome == "duplicate" else 20)
    assert (second.record.outcome is not None) == (completed and outcome == "duplicate")


async def test_an_expired_record_can_still_be_read(keys: Idempotency) -> None:
    """get asks no clock."""
    await reserve(keys, 10, expires_at_ms=20)
    assert (await get(keys, 1_000)).expires_at_ms == 20


async def test_a_reservation_without_ends_stays(keys: Idempotency) -> None:
    """A crash blocks such a key until somebody releases it."""
    await reserve(keys, 10)
    assert (await reserve(keys, 10 * DAY_MS)).outcome == "duplicate"


@pytest.mark.parametrize(("now_ms", "outcome"), [(19, "duplicate"), (20, "reserved")])
async def test_the_end_of_a_first_attempt_frees_the_key(
    keys: Idempotency, now_ms: int, outcome: str
) -> None:
    """With reclaim; the one that was overtaken cannot complete any more."""
    first = await reserve(keys, 10, lease_ms=10)
    assert first.token is not None
    assert first.record.lease_expires_at_ms == 20
    second = await reserve(keys, now_ms, owner="b")

    assert second.outcome == outcome
    expected = "completed" if outcome == "duplicate" else "lost"
    assert await complete(keys, 30, first.token, 1) == expected


@pytest.mark.parametrize(("now_ms", "status"), [(19, "reserved"), (20, "unknown")])
async def test_a_parked_first_attempt_is_unknown_at_its_end(
    keys: Idempotency, now_ms: int, status: str
) -> None:
    """It stays taken: nobody knows whether the effect happened. A late completion is the truth."""
    first = await reserve(keys, 10, lease_ms=10, on_expiry="park")
    assert first.token is not None
    second = await reserve(keys, now_ms)

    assert (second.outcome, second.record.status) == ("duplicate", status)
    assert (await get(keys, now_ms)).status == status
    assert await complete(keys, 30, first.token, {"late": True}) == "completed"
    assert (await get(keys, 30)).status == "completed"


# --- complete and release -------------------------------------------------------------------------


async def test_completing_needs_the_token(keys: Idempotency) -> None:
    """Another token is lost, no record is missing; nothing changes."""
    assert await complete(keys, 10, TOKEN_A, 1) == "missing"
    await reserve(keys, 10, token=TOKEN_A)
    assert await complete(keys, 11, TOKEN_B, 1) == "lost"
    assert (await get(keys, 11)).status == "reserved"
    assert await complete(keys, 12, TOKEN_A, 1) == "completed"


@pytest.mark.parametrize(
    ("outcome", "kind", "details"),
    [
        (Outcome(outcome_kind="woken", details=[1]), "woken", [1]),
        ({"outcome_kind": "woken", "details": None}, "woken", None),
        ({"ok": 1.0}, "completed", {"ok": 1.0}),
        ("text", "completed", "text"),
        (None, "completed", None),
    ],
)
async def test_an_outcome_may_be_any_json(
    keys: Idempotency, outcome: Any, kind: str, details: Any
) -> None:
    """An Outcome, its fields, or a value that becomes the details; time is the completion's."""
    await reserve(keys, 10, token=TOKEN_A)
    await complete(keys, 15, TOKEN_A, outcome)
    stored = (await get(keys, 15)).outcome
    assert stored is not None
    assert (stored.outcome_kind, stored.details, stored.completed_at_ms) == (kind, details, 15)


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        ({"outcome_kind": 7}, "outcome is not one"),
        ({"outcome_kind": "k", "completed_at_ms": "x"}, "outcome is not one"),
        (float("nan"), "outcome holds NaN"),
        ("x" * 65_536, "of JSON; at most 65536"),
        (object(), "outcome is not a JSON value"),
    ],
)
async def test_a_bad_outcome_is_refused(
    keys: Idempotency, state: State, outcome: Any, says: str
) -> None:
    """Before anything is sent."""
    await reserve(keys, 10, token=TOKEN_A)
    before = state()
    with pytest.raises(InvalidInput, match=says) as raised:
        await complete(keys, 11, TOKEN_A, outcome)
    assert raised.value.field == "outcome"
    assert state() == before


async def test_a_repeat_keeps_the_first_outcome_and_a_second_completion_replaces_it(
    keys: Idempotency,
) -> None:
    """Whoever says that it repeats gets what was stored."""
    await reserve(keys, 10, token=TOKEN_A)
    await complete(keys, 11, TOKEN_A, 1)
    assert await complete(keys, 12, TOKEN_A, 2, repeat=True) == "completed"
    first = (await get(keys, 12)).outcome
    assert await complete(keys, 13, TOKEN_A, 3) == "completed"
    second = (await get(keys, 13)).outcome
    assert (first and first.details, second and second.details) == (1, 3)


@pytest.mark.parametrize(("expires_at_ms", "ends_at_ms"), [(None, 11 + 100), (5_000, 5_000)])
async def test_an_outcome_is_kept_for_its_time(
    keys: Idempotency, expires_at_ms: int | None, ends_at_ms: int
) -> None:
    """keep_ms from the completion on, unless the key has an end of its own; then it is free."""
    await reserve(keys, 10, token=TOKEN_A, expires_at_ms=expires_at_ms)
    await complete(keys, 11, TOKEN_A, 1, keep_ms=100)
    assert (await get(keys, 11)).expires_at_ms == ends_at_ms
    assert (await reserve(keys, ends_at_ms - 1)).outcome == "duplicate"
    assert (await reserve(keys, ends_at_ms)).outcome == "reserved"


async def test_a_release_frees_the_key(keys: Idempotency) -> None:
    """By its token; twice is once; a late copy of the reservation takes nothing."""
    await reserve(keys, 10, token=TOKEN_A)
    release: dict[str, Any] = {"operation": "outbox.send", "key": "send-1"}
    assert await keys.release(**release, token=TOKEN_B, now_ms=11) == "lost"
    assert await keys.release(**release, token=TOKEN_A, now_ms=11) == "released"
    assert await keys.release(**release, token=TOKEN_A, now_ms=12) == "released"
    assert await keys.get(**release, now_ms=12) is None
    with pytest.raises(Conflict, match="this token's reservation was released before"):
        await reserve(keys, 12, token=TOKEN_A)
    assert (await reserve(keys, 12, token=TOKEN_B)).outcome == "reserved"
    assert await keys.release(**release, token=TOKEN_A, now_ms=13) == "lost"


async def test_a_release_by_fingerprint(keys: Idempotency) -> None:
    """spec/reliability 2.5, for operators: the fingerprint must be the reservation's."""
    await reserve(keys, 10)
    release: dict[str, Any] = {"operation": "outbox.send", "key": "send-1"}
    assert await keys.release(**release, fingerprint="fingerprint-b", now_ms=11) == "lost"
    assert await keys.release(**release, fingerprint=" fingerprint-a", now_ms=11) == "released"
    assert (await reserve(keys, 12)).outcome == "reserved"
    with pytest.raises(InvalidInput, match="token is required, or the reservation's fingerprint"):
        await keys.release(**release, now_ms=13)


async def test_what_is_completed_or_conflicted_is_kept(keys: Idempotency) -> None:
    """Only a reservation can be withdrawn."""
    release: dict[str, Any] = {"operation": "outbox.send", "key": "send-1", "token": TOKEN_A}
    assert await keys.release(**release, now_ms=9) == "missing"
    assert await keys.release(**release, repeat=True, now_ms=9) == "forgotten"
    await reserve(keys, 10, token=TOKEN_A)
    await reserve(keys, 11, fingerprint="fingerprint-b")
    assert await keys.release(**release, now_ms=12) == "kept"
    await complete(keys, 12, TOKEN_A, 1)
    assert await keys.release(**release, now_ms=13) == "kept"


async def test_the_same_token_reserves_again(keys: Idempotency) -> None:
    """A repeat is not a duplicate of itself."""
    first = await reserve(keys, 10, token=TOKEN_A)
    again = await reserve(keys, 11, token=TOKEN_A, repeat=True)
    assert (again.outcome, again.token, again.record) == ("reserved", TOKEN_A, first.record)


async def test_a_hundred_at_once_have_one_first(keys: Idempotency) -> None:
    """The others are duplicates of it."""
    asked = [reserve(keys, 10, owner=f"o{number}") for number in range(100)]
    results = await asyncio.gather(*asked)
    assert [one.outcome for one in results].count("reserved") == 1  # type: ignore[comparison-overlap]
    assert len({one.record.owner for one in results}) == 1


async def test_a_cancelled_reservation_is_released(keys: Idempotency) -> None:
    """Cancelled at any moment, the key is free."""
    for moment in range(12):
        task = asyncio.create_task(reserve(keys, 10))
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        [result] = await asyncio.gather(task, return_exceptions=True)
        if isinstance(result, Reservation):
            await keys.release("outbox.send", "send-1", token=result.token, now_ms=10)
        await keys.get("outbox.send", "send-1", now_ms=10)
        assert await keys.get("outbox.send", "send-1", now_ms=10) is None, moment


# --- lists and purges -----------------------------------------------------------------------------


async def test_a_listing_is_in_the_order_of_forgetting(keys: Idempotency) -> None:
    """Soonest first, in pages; released ones are passed over."""
    for number, expires_at_ms in enumerate((400, 200, None, 300, 200)):
        await reserve(keys, 10, key=f"k{number}", expires_at_ms=expires_at_ms)
    await reserve(keys, 10, key="gone", token=TOKEN_A)
    await keys.release("outbox.send", "gone", token=TOKEN_A, now_ms=10)
    whole = [one.key for one in (await keys.list(now_ms=11)).items]

    assert set(whole[:2]) == {"k1", "k4"}
    assert whole[2:] == ["k3", "k0", "k2"]
    for limit in (1, 2, 5):
        page = await keys.list(limit=limit, now_ms=11)
        seen = [one.key for one in page.items]
        while page.next_cursor:
            page = await keys.list(limit=limit, cursor=page.next_cursor, now_ms=11)
            seen += [one.key for one in page.items]
        assert seen == whole
    with pytest.raises(InvalidInput, match="cursor is not one that this list gave"):
        await keys.list(cursor="5b5d", now_ms=11)


async def test_a_purge_spares_what_may_be_under_way(keys: Idempotency) -> None:
    """By when it was last seen; reservations only on demand."""
    for number in range(3):
        held = await reserve(keys, 10 * number, key=f"k{number}")
        assert held.token is not None
        if number < 2:
            await keys.complete(
                "outbox.send", f"k{number}", 1, token=held.token, now_ms=10 * number
            )
    assert await keys.purge(before_ms=9, now_ms=50) == 1
    assert await keys.purge(before_ms=50, now_ms=50) == 1
    assert [one.key for one in (await keys.list(now_ms=50)).items] == ["k2"]
    assert await keys.purge(before_ms=50, unfinished=True, now_ms=50) == 1


async def test_a_purge_of_many_goes_on_to_the_end(keys: Idempotency) -> None:
    """However many calls it takes."""
    await asyncio.gather(*[reserve(keys, 10, key=f"k{number}") for number in range(600)])
    assert await keys.purge(before_ms=10, unfinished=True, now_ms=11) == 600
    assert (await keys.list(now_ms=11)).items == []


# --- once -----------------------------------------------------------------------------------------


@pytest.fixture
async def live(connected: Connect, tenant_name: str) -> Idempotency:
    """Keys on the server's clock."""
    return (await connected(clock="server")).tenant(tenant_name, "w").idempotency


class Action:
    """Counts how often it ran; runs until it is let go, if it is to be held."""

    def __init__(self, result: Any = None, *, held: bool = False) -> None:
        self.result = result
        self.runs = 0
        self.started = asyncio.Event()
        self.may_go = asyncio.Event()
        if not held:
            self.may_go.set()

    async def __call__(self) -> Any:
        self.runs += 1
        self.started.set()
        await self.may_go.wait()
        return self.result


async def once(keys: Idempotency, action: Action, **options: Any) -> Any:
    options = {"owner": "a", "fingerprint": "f"} | options
    return await keys.once("charge", "order-1", action, **options)


async def test_once_runs_once_and_replays(live: Idempotency) -> None:
    """The result of the first run goes to every later caller."""
    action = Action({"charge": "c-1"})
    assert await once(live, action) == {"charge": "c-1"}
    assert await once(live, action, owner="b") == {"charge": "c-1"}
    assert action.runs == 1


async def test_a_hundred_callers_run_it_once(live: Idempotency) -> None:
    """Who comes while it runs is told so; who comes later gets the result."""
    action = Action(7, held=True)
    tasks = [asyncio.create_task(once(live, action, owner=f"o{n}")) for n in range(100)]
    await action.started.wait()
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    action.may_go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert action.runs == 1
    assert results.count(7) >= 1
    assert all(one == 7 or isinstance(one, Conflict) for one in results)
    assert "is still running: nothing was run" in str(
        next(one for one in results if isinstance(one, Conflict))
    )
    assert await once(live, action) == 7


async def test_once_with_another_fingerprint_conflicts(live: Idempotency) -> None:
    """Nothing is run for a request that is another one."""
    action = Action(7)
    await once(live, action)
    with pytest.raises(Conflict, match="was used by a request with another fingerprint"):
        await once(live, action, fingerprint="g")
    assert action.runs == 1


async def test_a_first_use_that_vanished_is_unknown(live: Idempotency) -> None:
    """It parks: nothing is run again until somebody has asked the destination and said so."""

    async def crash() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await live.once("charge", "order-1", crash, owner="a", fingerprint="f", lease_ms=1)
    record = None
    async with asyncio.timeout(5):
        while record is None or record.status != "unknown":
            record = await live.get("charge", "order-1")
    action = Action(7)
    with pytest.raises(OutcomeUnknown, match="first use of charge order-1 by a vanished"):
        await once(live, action)
    assert action.runs == 0
    assert await live.release("charge", "order-1", fingerprint="f") == "released"
    assert await once(live, action) == 7


async def test_a_run_that_was_overtaken_is_told_so(live: Idempotency) -> None:
    """With reclaim the key goes to another when the lease ends; the first run is no success."""
    slow, fast = Action(1, held=True), Action(2)
    first = asyncio.create_task(once(live, slow, lease_ms=1, on_expiry="reclaim"))
    await slow.started.wait()
    async with asyncio.timeout(5):
        while fast.runs == 0:
            try:
                assert await once(live, fast, on_expiry="reclaim") == 2
            except Conflict:
                await asyncio.sleep(0)
    slow.may_go.set()
    with pytest.raises(LeaseLost, match="charge order-1 ran, but its reservation was lost"):
        await first


async def test_an_exception_leaves_the_key_reserved(live: Idempotency) -> None:
    """Whether the effect happened is not known; nobody runs it again by accident."""

    async def fail() -> None:
        raise Unavailable("the destination is away")

    with pytest.raises(Unavailable, match="the destination is away"):
        await live.once("charge", "order-1", fail, owner="a", fingerprint="f")
    action = Action(7)
    with pytest.raises(Conflict, match="still running"):
        await once(live, action)
    assert action.runs == 0
