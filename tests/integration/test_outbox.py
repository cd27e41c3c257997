"""The outbox as its users see it, on every server, with the time given: spec/outbox 1 and 5."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from servers import Server

from leasekit import (
    Conflict,
    Draft,
    InvalidInput,
    Leasekit,
    OutcomeUnknown,
    Retention,
    Tenant,
    new_token,
)
from leasekit.model import (
    LANE_CANONICAL,
    LANE_PROTOCOL_REPLAY,
    TARGET_A2A_WEBHOOK,
    TARGET_FANOUT,
    TARGET_PROJECTOR,
    AttemptError,
    RowStatus,
)
from leasekit.outbox import Claim, ClaimedRows, Outbox

Connect = Callable[..., Awaitable[Leasekit]]
State = Callable[[], dict[str, Any]]

TOKEN_A, TOKEN_B = "a" * 22, "b" * 22
NEVER = 9_007_199_254_740_991


def row_id(number: int) -> str:
    return f"{number:026}"


M1, M2, M3 = map(row_id, (1, 2, 3))


@pytest.fixture
def outbox(tenant: Tenant) -> Outbox:
    return tenant.outbox


async def claim(outbox: Outbox, now_ms: int, **options: Any) -> ClaimedRows:
    """Claim of (mail, alice) by a for 10 ms, unless said otherwise."""
    options = {"limit": 10, "lease_ms": 10, "consumer": "a"} | options
    return await outbox.claim("mail", "alice", now_ms=now_ms, **options)


async def claim_one(outbox: Outbox, now_ms: int, **options: Any) -> Claim:
    [only] = await claim(outbox, now_ms, **options)
    return only


async def enqueue(outbox: Outbox, *ids: str, now_ms: int = 0, **options: Any) -> None:
    for one in ids:
        await outbox.enqueue("mail", "alice", {"for": one}, id=one, now_ms=now_ms, **options)


def ids(rows: Any) -> list[str]:
    return [getattr(one, "row", one).id for one in rows]


# --- words and drafts [SEED] ----------------------------------------------------------------------


def test_lanes_and_targets_have_their_names() -> None:
    """spec/outbox 1.2."""
    assert (LANE_CANONICAL, LANE_PROTOCOL_REPLAY) == ("canonical", "protocol_replay")
    assert (TARGET_PROJECTOR, TARGET_FANOUT) == ("protocol_projector", "protocol_fanout")
    assert TARGET_A2A_WEBHOOK == "a2a_webhook"


def test_statuses_have_their_words() -> None:
    """Those of the protocol; the words of spec/outbox 1.3 are understood."""
    assert RowStatus("pending") is RowStatus.PENDING
    assert RowStatus("claimed") is RowStatus.CLAIMED
    assert RowStatus("delivered") is RowStatus("sent") is RowStatus.SENT
    assert RowStatus("dead_letter") is RowStatus("dead_lettered") is RowStatus.DEAD_LETTERED
    assert [one for one in RowStatus if one.is_final] == ["sent", "dead_lettered", "cancelled"]


def test_a_draft_has_its_defaults() -> None:
    """Available at once, five attempts, no dedupe key."""
    draft = Draft(lane="canonical", target="protocol_projector", payload={})
    assert (draft.available_at_ms, draft.max_attempts, draft.dedupe_key) == (0, 5, None)


async def test_a_new_row_is_pending(outbox: Outbox) -> None:
    """Stored at 42: created then, never claimed, no token, no lease."""
    enqueued = await outbox.enqueue("canonical", "protocol_projector", {}, id=M1, now_ms=42)

    assert enqueued.created
    row = enqueued.row
    assert row == await outbox.get(M1, now_ms=42)
    assert (row.id, row.lane, row.target) == (M1, "canonical", "protocol_projector")
    assert (row.status, row.cause, row.payload) == ("pending", "enqueued", {})
    assert (row.created_at_ms, row.available_at_ms) == (42, 42)
    assert (row.attempt_count, row.claim_count, row.max_attempts) == (0, 0, 5)
    assert (row.consumer, row.fence, row.claimed_at_ms) == (None, None, None)
    assert (row.lease_expires_at_ms, row.finished_at_ms, row.last_error) == (None, None, None)


@pytest.mark.parametrize(
    ("given", "field", "says"),
    [
        ({"lane": " "}, "lane", "lane is required"),
        ({"lane": " ", "target": " ", "dedupe_key": ""}, "lane", "lane is required"),
        ({"target": "\u2003", "dedupe_key": ""}, "target", "target is required"),
        ({"dedupe_key": "", "max_attempts": 0}, "dedupe_key", "dedupe_key is required"),
        ({"dedupe_key": "\t\n"}, "dedupe_key", "dedupe_key is required"),
        ({"max_attempts": 0}, "max_attempts", "max_attempts must be greater than zero"),
    ],
)
async def test_a_draft_is_checked_in_order(
    outbox: Outbox, given: dict[str, Any], field: str, says: str
) -> None:
    """spec/outbox 1.4: lane, target, dedupe key, attempts, in these words."""
    draft = {"lane": "l", "target": "t", "payload": {}} | given
    with pytest.raises(InvalidInput, match=says) as raised:
        await outbox.enqueue(**draft, now_ms=0)
    assert raised.value.field == field


@pytest.mark.parametrize(
    ("lane", "target", "consumer", "says"),
    [
        ("", "", "", "lane is required"),
        ("l", " ", "", "target is required"),
        ("l", "t", " ", "consumer_id is required"),
    ],
)
async def test_a_claim_is_checked_in_order(
    outbox: Outbox, lane: str, target: str, consumer: str, says: str
) -> None:
    """spec/outbox 1.4: lane, target, consumer, in these words."""
    with pytest.raises(InvalidInput, match=f"^{says}$"):
        await outbox.claim(lane, target, consumer=consumer, now_ms=0)


async def test_names_are_kept_untrimmed(outbox: Outbox) -> None:
    """Blanks, NUL, any script: what was given comes back, and routes by all of it."""
    lane, target = " mail\x00:", "\u202e\U0001f600\r\n"
    await outbox.enqueue(lane, target, None, dedupe_key=" k ", run_id="r\x00", id=M1, now_ms=0)
    [held] = await outbox.claim(lane, target, consumer=" a\n ", now_ms=0)

    row = held.row
    assert (row.lane, row.target, row.dedupe_key) == (lane, target, " k ")
    assert (row.run_id, row.consumer, row.payload) == ("r\x00", " a\n ", None)
    assert (await outbox.get(M1, now_ms=0)).consumer == " a\n "  # type: ignore[union-attr]
    assert await outbox.claim(lane.strip(), target, consumer="b", now_ms=0) == []


async def test_composed_and_decomposed_names_are_different(outbox: Outbox) -> None:
    """Names are bytes; nothing is normalised."""
    await outbox.enqueue("\u00e9", "t", 1, now_ms=0)
    assert await outbox.claim("e\u0301", "t", consumer="a", now_ms=0) == []
    assert len(await outbox.claim("\u00e9", "t", consumer="a", now_ms=0)) == 1


@pytest.mark.parametrize(
    "payload",
    [
        None,
        0,
        1.0,
        "",
        [],
        {},
        {"b": [1, {"a": None}], "a": "é\x00\n"},
        2**64 - 1,
        -(2**63),
        "]]%s",
    ],
)
async def test_a_payload_comes_back_as_it_went(outbox: Outbox, payload: Any) -> None:
    """Any JSON value, with number forms kept, through claim, get and list."""
    await outbox.enqueue("mail", "alice", payload, id=M1, now_ms=0)
    stored = (await outbox.list(now_ms=0)).items[0].payload
    assert stored == payload
    assert type(stored) is type(payload)
    assert (await claim_one(outbox, 0)).row.payload == payload


async def test_payloads_may_have_the_full_size(outbox: Outbox) -> None:
    """256 KiB of JSON pass, one byte more is refused before anything is sent."""
    largest = "x" * (256 * 1024 - 2)
    await outbox.enqueue("mail", "alice", largest, id=M1, now_ms=0)
    assert (await claim_one(outbox, 0)).row.payload == largest
    with pytest.raises(InvalidInput, match="payload is 262145 bytes of JSON; at most 262144"):
        await outbox.enqueue("mail", "alice", largest + "x", now_ms=0)


# --- dedupe ---------------------------------------------------------------------------------------

KEYED = {"dedupe_key": "k", "available_at_ms": 5, "max_attempts": 2}


async def keyed(outbox: Outbox, now_ms: int, payload: Any = None, **options: Any) -> Any:
    payload = {"a": 1, "b": 2} if payload is None else payload
    return await outbox.enqueue("mail", "alice", payload, now_ms=now_ms, **(KEYED | options))


async def test_a_duplicate_gives_the_row_that_is_there(outbox: Outbox, state: State) -> None:
    """Same key, same draft, the order of the payload's keys aside: nothing is written."""
    first = await keyed(outbox, 0, id=M1)
    before = state()
    second = await keyed(outbox, 9, {"b": 2, "a": 1}, id=M2)

    assert (first.created, second.created) == (True, False)
    assert second.row == first.row
    assert state() == before


@pytest.mark.parametrize(
    "other",
    [
        {"payload": {"a": 1, "b": 2.0}},
        {"payload": {"a": 1}},
        {"available_at_ms": 6},
        {"max_attempts": 3},
        {"on_expiry": "park"},
        {"run_id": "r"},
    ],
)
async def test_a_key_with_another_draft_conflicts(
    outbox: Outbox, state: State, other: dict[str, Any]
) -> None:
    """All of the draft counts, also when it may be sent; the error names the key and the row."""
    await keyed(outbox, 0, id=M1)
    before = state()
    says = "^outbox dedupe key reused with different input: k; nothing was written"
    with pytest.raises(Conflict, match=says) as raised:
        await keyed(outbox, 9, id=M2, **other)

    assert raised.value.id == M1
    assert state() == before


@pytest.mark.parametrize("route", [("mail", "bob"), ("sms", "alice")])
async def test_a_key_belongs_to_its_route(outbox: Outbox, route: tuple[str, str]) -> None:
    """The same key under another lane or target is unrelated."""
    await keyed(outbox, 0)
    other = await outbox.enqueue(*route, {"c": 3}, dedupe_key="k", now_ms=0)
    assert other.created


async def test_a_duplicate_is_told_the_state_of_the_row_and_no_token(outbox: Outbox) -> None:
    """In every status: nothing is sent again, nothing revived, and no holder's proof given away."""
    await keyed(outbox, 0, id=M1)
    held = await claim_one(outbox, 10)
    claimed = await keyed(outbox, 11)
    assert (claimed.created, claimed.row.status, claimed.row.attempt_count) == (False, "claimed", 1)
    assert held.token not in repr(claimed) + repr(claimed.row) + str(claimed.row.errors)

    await held.nack(error="busy", retry_at_ms=20, now_ms=12)
    assert (await keyed(outbox, 13)).row.available_at_ms == 20
    held = await claim_one(outbox, 20)
    await held.nack(error="busy", now_ms=21)
    assert (await keyed(outbox, 22)).row.status == "dead_lettered"
    await outbox.redrive(M1, now_ms=23)
    held = await claim_one(outbox, 23)
    await held.ack(now_ms=24)
    done = await keyed(outbox, 25)
    assert (done.created, done.row.status, done.row.finished_at_ms) == (False, "sent", 24)
    assert await claim(outbox, 1_000) == []


async def test_a_key_is_forgotten_when_its_window_is_over(
    connected: Connect, tenant_name: str
) -> None:
    """Counted from the enqueue, to the millisecond, once the row is finished."""
    kit = await connected(retention=Retention(dedupe_ms=100))
    outbox = kit.tenant(tenant_name, "w").outbox
    await keyed(outbox, 0, id=M1)
    await (await claim_one(outbox, 10)).ack(now_ms=11)

    assert not (await keyed(outbox, 99)).created
    assert (await keyed(outbox, 100, id=M2)).created


async def test_a_key_outlives_its_window_while_its_row_waits(
    connected: Connect, tenant_name: str
) -> None:
    """A row in line, however old, is never there twice."""
    kit = await connected(retention=Retention(dedupe_ms=100))
    outbox = kit.tenant(tenant_name, "w").outbox
    await keyed(outbox, 0, id=M1)
    assert (await keyed(outbox, 500)).row.id == M1
    await claim_one(outbox, 510)
    assert (await keyed(outbox, 700)).row.status == "claimed"


async def test_a_row_that_was_deleted_is_still_known_by_its_key(
    connected: Connect, tenant_name: str
) -> None:
    """Kept for no time, remembered for the window: status forgotten."""
    kit = await connected(retention=Retention(finished_ms=0))
    outbox = kit.tenant(tenant_name, "w").outbox
    await keyed(outbox, 0, id=M1)
    await (await claim_one(outbox, 10)).ack(now_ms=11)
    again = await keyed(outbox, 12, id=M2)

    assert await outbox.get(M1, now_ms=12) is None
    assert (again.created, again.row.id, again.row.status) == (False, M1, "forgotten")


async def test_sixteen_at_once_make_one_row(outbox: Outbox) -> None:
    """Concurrent identical enqueues meet on one row."""
    made = await asyncio.gather(*[keyed(outbox, 0) for _ in range(16)])

    assert [one.created for one in made].count(True) == 1
    assert len({one.row.id for one in made}) == 1
    assert len((await outbox.list(now_ms=0)).items) == 1


# --- ids and repeats ------------------------------------------------------------------------------


async def test_an_id_is_taken_once(outbox: Outbox) -> None:
    """The same draft is a duplicate, for a repeat it is what was created; another one conflicts."""
    await enqueue(outbox, M1)
    same = {"lane": "mail", "target": "alice", "payload": {"for": M1}, "id": M1, "now_ms": 9}

    assert not (await outbox.enqueue(**same)).created
    repeated = await outbox.enqueue(**same, repeat=True)
    assert (repeated.created, repeated.row.id) == (True, M1)
    for other in ({"payload": 2}, {"target": "bob"}, {"available_at_ms": 1}):
        with pytest.raises(Conflict, match=f"id {M1} is taken by a row with other content"):
            await outbox.enqueue(**(same | other))


async def test_a_repeated_enqueue_of_a_forgotten_row_is_unknown(
    connected: Connect, tenant_name: str
) -> None:
    """It must not be sent again; an id above all that was ever deleted is simply created."""
    kit = await connected(retention=Retention(finished_ms=0))
    outbox = kit.tenant(tenant_name, "w").outbox
    await enqueue(outbox, M2)
    await (await claim_one(outbox, 10)).ack(now_ms=11)

    for number in (1, 2):
        with pytest.raises(OutcomeUnknown, match="enqueued, finished and forgotten, or never"):
            await outbox.enqueue("mail", "alice", 1, id=row_id(number), repeat=True, now_ms=12)
    assert (await outbox.enqueue("mail", "alice", 1, id=M3, repeat=True, now_ms=12)).created
    assert (await outbox.enqueue("mail", "alice", 1, id=M1, now_ms=12)).created


async def test_many_drafts_land_in_one_call(outbox: Outbox) -> None:
    """Answers in their order; one that conflicts harms no other."""
    await enqueue(outbox, M2)
    drafts = [
        Draft(lane="mail", target="alice", payload=number, id=row_id(number))
        for number in (1, 2, 3)
    ]
    first, second, third = await outbox.enqueue_many(drafts, now_ms=5)

    assert [getattr(one, "created", None) for one in (first, second, third)] == [True, None, True]
    assert isinstance(second, Conflict)
    assert ids(await claim(outbox, 5)) == [M2, M1, M3]


async def test_many_drafts_are_checked_before_any_is_sent(outbox: Outbox, state: State) -> None:
    """One bad draft, one too many, and nothing is written."""
    good = Draft(lane="mail", target="alice", payload=1)
    with pytest.raises(InvalidInput, match="lane is required"):
        await outbox.enqueue_many([good, Draft(lane="", target="t", payload=1)], now_ms=0)
    with pytest.raises(InvalidInput, match="1001 drafts at once; at most 1000"):
        await outbox.enqueue_many([good] * 1_001, now_ms=0)
    with pytest.raises(InvalidInput, match="now_ms is required"):
        await outbox.enqueue_many([good])
    assert state() == {}
    assert await outbox.enqueue_many([], now_ms=0) == []


# --- claiming -------------------------------------------------------------------------------------


async def test_a_claim_gives_the_rows_and_the_proof(outbox: Outbox) -> None:
    """Token, fence and lease end; the row as it is now."""
    await enqueue(outbox, M1, now_ms=5)
    claimed = await claim(outbox, 10, consumer="b")
    [held] = claimed

    row = held.row
    assert (row.status, row.attempt_count, row.claim_count) == ("claimed", 1, 1)
    assert (row.consumer, row.claimed_at_ms, row.lease_expires_at_ms) == ("b", 10, 20)
    assert (held.lease_expires_at_ms, held.fence) == (20, row.fence)
    assert held.fence == 10_000
    assert len(held.token) == 22
    assert row == await outbox.get(M1, now_ms=10)
    assert (claimed.now_ms, claimed.more, claimed.next_due_at_ms) == (10, False, 20)


@pytest.mark.parametrize(("now_ms", "expected"), [(19, []), (20, [M1]), (21, [M1])])
async def test_a_row_is_due_at_its_instant(
    outbox: Outbox, now_ms: int, expected: list[str]
) -> None:
    """Inclusive: available at 20 is claimable at 20."""
    await enqueue(outbox, M1, available_at_ms=20)
    assert ids(await claim(outbox, now_ms)) == expected


@pytest.mark.parametrize(("now_ms", "expected"), [(19, []), (20, [M1])])
async def test_an_ended_lease_is_reclaimed_at_its_instant(
    outbox: Outbox, now_ms: int, expected: list[str]
) -> None:
    """Inclusive: a lease from 10 for 10 has ended at 20; the next claim counts one more attempt."""
    await enqueue(outbox, M1)
    await claim_one(outbox, 10)
    again = await claim(outbox, now_ms, consumer="b")

    assert ids(again) == expected
    assert [one.row.attempt_count for one in again] == [2] * len(expected)


async def test_the_longest_due_comes_first(outbox: Outbox) -> None:
    """By due time, then id; an ended lease lines up at its end, a nacked row at its retry."""
    await enqueue(outbox, row_id(4))
    await claim_one(outbox, 0, lease_ms=30)
    await enqueue(outbox, row_id(3), available_at_ms=20)
    await enqueue(outbox, row_id(2), available_at_ms=20)
    await enqueue(outbox, row_id(5), now_ms=10)
    await enqueue(outbox, row_id(1), available_at_ms=40)

    assert ids(await claim(outbox, 50)) == [row_id(number) for number in (5, 2, 3, 4, 1)]


async def test_a_claim_takes_no_more_than_it_asked_for(outbox: Outbox) -> None:
    """`more` says that further rows are due; a limit of 0 takes none."""
    await enqueue(outbox, M1, M2, M3)
    assert await claim(outbox, 0, limit=0) == []
    first = await claim(outbox, 0, limit=2)

    assert ids(first) == [M1, M2]
    assert first.more
    assert ids(await claim(outbox, 0, limit=2)) == [M3]


async def test_rows_of_one_claim_share_token_and_fence(outbox: Outbox) -> None:
    """And another claim has another of both."""
    await enqueue(outbox, M1, M2, M3)
    first = await claim(outbox, 0, limit=2)
    second = await claim(outbox, 0)

    assert len({(one.token, one.fence) for one in first}) == 1
    assert second[0].token != first[0].token
    assert second[0].fence > first[0].fence


async def test_claims_of_one_turn_get_different_rows(outbox: Outbox) -> None:
    """They travel in one call and still have tokens of their own."""
    await enqueue(outbox, M1, M2, M3)
    claims = await asyncio.gather(*[claim(outbox, 0, limit=1) for _ in range(4)])

    assert sorted(ids(one for rows in claims for one in rows)) == [M1, M2, M3]
    assert len({one.token for rows in claims for one in rows}) == 3


async def test_a_lease_of_zero_is_over_at_once(outbox: Outbox) -> None:
    """Legal, and claimable again at the same instant; the token still acks."""
    await enqueue(outbox, M1)
    held = await claim_one(outbox, 10, lease_ms=0)
    assert held.lease_expires_at_ms == 10
    assert await held.ack(now_ms=10) == "acked"

    await enqueue(outbox, M2)
    await claim_one(outbox, 10, lease_ms=0)
    assert (await claim_one(outbox, 10)).row.attempt_count == 2


async def test_a_repeated_claim_gets_its_own_rows_and_no_others(outbox: Outbox) -> None:
    """The claim id is the name of the claim, and the token of its rows."""
    await enqueue(outbox, M1, M2, M3)
    first = await claim(outbox, 0, limit=2, claim_id=TOKEN_A)
    await first[0].ack(now_ms=1)
    again = await claim(outbox, 2, limit=2, claim_id=TOKEN_A, repeat=True)

    assert ids(again) == [M2]
    assert (again[0].token, again[0].fence) == (TOKEN_A, first[0].fence)
    assert (again[0].lease_expires_at_ms, again[0].row.attempt_count) == (10, 1)
    assert await again[0].ack(now_ms=3) == "acked"


async def test_a_claim_counts_its_deadline_on_the_local_clock(outbox: Outbox) -> None:
    """From before the request was sent: never more than the lease."""
    await enqueue(outbox, M1)
    held = await claim_one(outbox, 0, lease_ms=60_000)
    assert 0 < held.remaining_ms() <= 60_000
    over = await claim_one(outbox, 60_000, lease_ms=0)
    assert over.remaining_ms() <= 0


# --- ack ------------------------------------------------------------------------------------------


async def test_an_ack_ends_the_row(outbox: Outbox) -> None:
    """Sent, at the time of the ack, with its attempts; nobody gets it again."""
    await enqueue(outbox, M1)
    held = await claim_one(outbox, 10)
    assert await held.ack(now_ms=12) == "acked"

    row = await outbox.get(M1, now_ms=13)
    assert row is not None
    assert (row.status, row.cause, row.finished_at_ms) == ("sent", "acked", 12)
    assert (row.attempt_count, row.consumer, row.lease_expires_at_ms) == (1, None, None)
    assert await claim(outbox, 1_000) == []


async def test_a_late_ack_is_good_until_somebody_else_claims(outbox: Outbox) -> None:
    """The token decides, not the clock."""
    await enqueue(outbox, M1, M2)
    late, later = await claim(outbox, 10)
    assert await late.ack(now_ms=20) == "acked"

    await claim_one(outbox, 20, consumer="b")
    assert await later.ack(now_ms=21) == "lost_claim"
    assert (await outbox.get(M2, now_ms=21)).consumer == "b"  # type: ignore[union-attr]


async def test_a_second_ack_answers_as_the_first(outbox: Outbox) -> None:
    """Marked as a repeat or not; a nack with the same token is refused."""
    await enqueue(outbox, M1)
    held = await claim_one(outbox, 10)
    await held.ack(now_ms=11)

    assert await held.ack(now_ms=12) == "acked"
    assert await held.ack(now_ms=12, repeat=True) == "acked"
    assert await held.nack(error="e", now_ms=12) == "lost_claim"
    assert await held.release(now_ms=12) == "lost_claim"
    assert await held.extend(now_ms=12) == "lost_claim"
    assert (await outbox.get(M1, now_ms=12)).finished_at_ms == 11  # type: ignore[union-attr]


@pytest.mark.parametrize("prepare", ["missing", "pending", "claimed", "dead", "cancelled"])
async def test_who_does_not_hold_a_row_cannot_end_it(
    outbox: Outbox, state: State, prepare: str
) -> None:
    """Whatever its status: lost_claim, and nothing changes."""
    if prepare != "missing":
        await enqueue(outbox, M1)
    if prepare == "cancelled":
        await outbox.cancel(M1, now_ms=1)
    if prepare in ("claimed", "dead"):
        held = await claim_one(outbox, 1, claim_id=TOKEN_A)
    if prepare == "dead":
        await held.nack(error="e", permanent=True, now_ms=2)
    before = state()

    assert await outbox.ack(M1, TOKEN_B, now_ms=5) == "lost_claim"
    assert await outbox.nack(M1, TOKEN_B, error="e", now_ms=5) == "lost_claim"
    assert await outbox.extend(M1, TOKEN_B, now_ms=5) == "lost_claim"
    assert await outbox.release(M1, TOKEN_B, now_ms=5) == "lost_claim"
    assert state() == before


async def test_a_consumer_named_like_a_token_proves_nothing(outbox: Outbox) -> None:
    """The token is compared as one field, not found anywhere in the row."""
    await enqueue(outbox, M1)
    await claim_one(outbox, 1, claim_id=TOKEN_A, consumer=f"claimed claimed {TOKEN_B} ")
    assert await outbox.ack(M1, TOKEN_B, now_ms=2) == "lost_claim"
    assert await outbox.ack(M1, TOKEN_A, now_ms=2) == "acked"


# --- nack -----------------------------------------------------------------------------------------


async def test_a_nack_puts_the_row_back_for_later(outbox: Outbox) -> None:
    """Claimable at its retry time, to the millisecond; the error is kept, also after a success."""
    await enqueue(outbox, M1)
    held = await claim_one(outbox, 10)
    assert await held.nack(error="busy", retry_at_ms=30, now_ms=12) == "requeued"

    row = await outbox.get(M1, now_ms=12)
    assert row is not None
    assert (row.status, row.cause, row.available_at_ms) == ("pending", "requeued", 30)
    assert (row.attempt_count, row.last_error, row.consumer) == (1, "busy", None)
    assert await claim(outbox, 29) == []
    await (await claim_one(outbox, 30)).ack(now_ms=31)
    row = await outbox.get(M1, now_ms=31)
    assert row is not None
    assert row.errors == (
        AttemptError(at_ms=12, kind="requeued", attempt=1, fence=held.fence, text="busy"),
    )


@pytest.mark.parametrize(("retry_at_ms", "due_at_ms"), [(None, 12), (0, 0), (12, 12)])
async def test_a_retry_may_be_now_or_in_the_past(
    outbox: Outbox, retry_at_ms: int | None, due_at_ms: int
) -> None:
    """None is now; the past is not clamped."""
    await enqueue(outbox, M1)
    held = await claim_one(outbox, 10)
    await held.nack(error="", retry_at_ms=retry_at_ms, now_ms=12)

    row = await outbox.get(M1, now_ms=12)
    assert row is not None
    assert (row.available_at_ms, row.last_error) == (due_at_ms, "")
    assert len(await claim(outbox, 12)) == 1


async def test_the_last_attempt_is_a_dead_letter(outbox: Outbox) -> None:
    """max_attempts of 1: buried by the first nack, with its reason."""
    await enqueue(outbox, M1, max_attempts=1)
    held = await claim_one(outbox, 10)
    assert await held.nack(error="gone", retry_at_ms=30, now_ms=12) == "dead_lettered"

    row = await outbox.get(M1, now_ms=12)
    assert row is not None
    assert (row.status, row.cause, row.finished_at_ms) == ("dead_lettered", "nacked", 12)
    assert row.last_error == "gone"
    assert await claim(outbox, 1_000) == []
    assert await held.nack(error="again", now_ms=13) == "dead_lettered"


async def test_ended_leases_use_up_attempts(outbox: Outbox) -> None:
    """max_attempts of 2: claim, let it end, claim, nack is a dead letter."""
    await enqueue(outbox, M1, max_attempts=2)
    await claim_one(outbox, 10)
    held = await claim_one(outbox, 20)
    assert await held.nack(error="e", now_ms=21) == "dead_lettered"


async def test_a_permanent_error_buries_at_once(outbox: Outbox) -> None:
    """Whatever attempts are left."""
    await enqueue(outbox, M1)
    held = await claim_one(outbox, 10)
    assert await held.nack(error="no such user", permanent=True, now_ms=12) == "dead_lettered"
    row = await outbox.get(M1, now_ms=12)
    assert row is not None
    assert (row.cause, row.errors[0].kind) == ("permanent", "permanent")


async def test_a_row_without_end_is_never_buried(outbox: Outbox) -> None:
    """max_attempts None."""
    await enqueue(outbox, M1, max_attempts=None)
    for now_ms in range(0, 120, 10):
        held = await claim_one(outbox, now_ms)
        assert held.row.max_attempts is None
        assert await held.nack(error=str(now_ms), now_ms=now_ms) == "requeued"
    row = await outbox.get(M1, now_ms=120)
    assert row is not None
    assert row.attempt_count == 12
    assert [error.text for error in row.errors] == [str(at) for at in range(20, 120, 10)]


async def test_a_long_error_is_cut_not_refused(outbox: Outbox) -> None:
    """2 000 characters are kept; what is not UTF-8 is replaced."""
    await enqueue(outbox, M1)
    held = await claim_one(outbox, 0)
    assert await held.nack(error="x" * 5_000, now_ms=0) == "requeued"
    held = await claim_one(outbox, 0)
    assert [error.text for error in held.row.errors] == ["x" * 1_999 + "…"]
    await held.nack(error="a\n\ud800 b", now_ms=0)
    assert (await claim_one(outbox, 0)).row.last_error == "a\n? b"


# --- extend and release ---------------------------------------------------------------------------


async def test_extend_moves_the_end_forward_only(outbox: Outbox) -> None:
    """From now on; a shorter one changes nothing; asking twice is harmless."""
    await enqueue(outbox, M1)
    held = await claim_one(outbox, 10)
    assert await held.extend(lease_ms=100, now_ms=15) == "extended"
    assert held.lease_expires_at_ms == 115
    assert await held.extend(lease_ms=1, now_ms=16) == "extended"
    assert held.lease_expires_at_ms == 115

    assert await claim(outbox, 114) == []
    assert len(await claim(outbox, 115)) == 1


@pytest.mark.parametrize(("now_ms", "outcome"), [(19, "extended"), (20, "lost_claim")])
async def test_extend_refuses_at_the_end(outbox: Outbox, now_ms: int, outcome: str) -> None:
    """What has ended may be promised to another already."""
    await enqueue(outbox, M1)
    held = await claim_one(outbox, 10)
    assert await held.extend(lease_ms=50, now_ms=now_ms) == outcome
    assert held.lease_expires_at_ms == (69 if outcome == "extended" else 20)


async def test_a_release_is_as_if_nothing_had_been(outbox: Outbox) -> None:
    """The attempt is not charged, and the row lines up where it was claimed."""
    await enqueue(outbox, M1, max_attempts=1)
    held = await claim_one(outbox, 10)
    await enqueue(outbox, M2, now_ms=11)
    assert await held.release(now_ms=12) == "released"
    assert await held.release(now_ms=13) == "released"

    again = await claim(outbox, 13)
    assert ids(again) == [M1, M2]
    assert (again[0].row.attempt_count, again[0].row.claim_count) == (1, 2)
    assert await held.ack(now_ms=14) == "lost_claim"
    assert await held.release(now_ms=14) == "lost_claim"


# --- what has no holder ---------------------------------------------------------------------------


async def test_a_row_that_kills_its_consumers_is_buried(outbox: Outbox) -> None:
    """Its attempts used up and its lease ended: the claim buries it, and its last holder may ack."""
    await enqueue(outbox, M1, max_attempts=1)
    held = await claim_one(outbox, 10)
    assert await claim(outbox, 20, consumer="b") == []

    row = await outbox.get(M1, now_ms=20)
    assert row is not None
    assert (row.status, row.cause) == ("dead_lettered", "expired")
    assert row.last_error == "lease expired; max attempts reached"
    assert await held.ack(now_ms=21) == "acked"
    assert (await outbox.get(M1, now_ms=21)).status == "sent"  # type: ignore[union-attr]


@pytest.mark.parametrize(("now_ms", "status"), [(19, "claimed"), (20, "unknown")])
async def test_a_row_that_parks_is_unknown_from_its_leases_end(
    outbox: Outbox, now_ms: int, status: str
) -> None:
    """At once for readers, and never handed out again by itself."""
    await enqueue(outbox, M1, on_expiry="park")
    await claim_one(outbox, 10)

    assert (await outbox.get(M1, now_ms=now_ms)).status == status  # type: ignore[union-attr]
    assert [row.status for row in (await outbox.list(now_ms=now_ms)).items] == [status]
    assert ids((await outbox.list(status=status, now_ms=now_ms)).items) == [M1]
    assert await claim(outbox, now_ms, consumer="b") == []
    assert (await outbox.get(M1, now_ms=now_ms)).status == status  # type: ignore[union-attr]


@pytest.mark.parametrize("written", [False, True])
async def test_an_unknown_row_is_ended_by_its_last_holder(outbox: Outbox, written: bool) -> None:
    """A late ack is the truth, whether or not a claim has written the row down as unknown."""
    await enqueue(outbox, M1, on_expiry="park")
    held = await claim_one(outbox, 10)
    if written:
        await claim(outbox, 20)
    assert await held.ack(now_ms=30) == "acked"
    assert (await outbox.get(M1, now_ms=30)).status == "sent"  # type: ignore[union-attr]
    assert (await outbox.counts(now_ms=30)).unknown == 0


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize(
    ("verdict", "status", "claimable"),
    [("sent", "sent", 0), ("redrive", "pending", 1), ("dead", "dead_lettered", 0)],
)
async def test_an_operator_resolves_an_unknown_row(
    outbox: Outbox, verdict: Any, status: str, claimable: int, written: bool
) -> None:
    """Who and why is kept; the last holder's token is worth nothing any more."""
    await enqueue(outbox, M1, on_expiry="park", max_attempts=1)
    held = await claim_one(outbox, 10)
    if written:
        await claim(outbox, 20)
    said = {"actor": "ops", "reason": "asked the bank", "now_ms": 30}
    assert await outbox.resolve(M1, verdict, **said) == "resolved"
    assert await outbox.resolve(M1, verdict, **said) == "resolved"

    row = await outbox.get(M1, now_ms=30)
    assert row is not None
    assert (row.status, row.cause) == (status, "resolved")
    assert (row.errors[-1].kind, row.last_error) == (f"resolved_{verdict}", "ops: asked the bank")
    assert await held.ack(now_ms=31) == "lost_claim"
    assert len(await claim(outbox, 31)) == claimable


async def test_only_the_unknown_is_resolved(outbox: Outbox) -> None:
    """A pending row, a live claim and a missing row are no mystery."""
    await enqueue(outbox, M1)
    said: dict[str, Any] = {"actor": "ops", "reason": "r", "now_ms": 5}
    assert await outbox.resolve(M1, "sent", **said) == "not_unknown"
    await claim_one(outbox, 5)
    assert await outbox.resolve(M1, "sent", **said) == "not_unknown"
    assert await outbox.resolve(M2, "sent", **said) == "missing"
    with pytest.raises(InvalidInput, match="verdict must be 'sent', 'redrive' or 'dead'"):
        await outbox.resolve(M1, "maybe", **said)  # type: ignore[arg-type]


async def test_a_dead_letter_is_redriven_with_all_its_attempts(outbox: Outbox) -> None:
    """It waits from now on; its history stays; the old token ends nothing."""
    await enqueue(outbox, M1, max_attempts=1)
    held = await claim_one(outbox, 10)
    await held.nack(error="gone", now_ms=11)
    assert await outbox.redrive(M1, now_ms=20) == "redriven"
    assert await outbox.redrive(M1, now_ms=21) == "redriven"

    assert await held.ack(now_ms=21) == "lost_claim"
    assert await claim(outbox, 19) == []
    again = await claim_one(outbox, 20)
    assert (again.row.attempt_count, again.row.claim_count) == (1, 2)
    assert again.row.last_error == "gone"
    assert await outbox.redrive(M1, now_ms=21) == "not_dead"
    assert await outbox.redrive(M2, now_ms=21) == "missing"


async def test_only_a_pending_row_is_cancelled(outbox: Outbox) -> None:
    """Before it is claimed; twice is once."""
    await enqueue(outbox, M1, M2)
    assert await outbox.cancel(M1, now_ms=5) == "cancelled"
    assert await outbox.cancel(M1, now_ms=6) == "cancelled"

    assert ids(await claim(outbox, 10)) == [M2]
    assert await outbox.cancel(M2, now_ms=11) == "not_pending"
    assert await outbox.cancel(M3, now_ms=11) == "missing"
    row = await outbox.get(M1, now_ms=11)
    assert row is not None
    assert (row.status, row.finished_at_ms) == ("cancelled", 5)


# --- forgetting -----------------------------------------------------------------------------------


async def finish(outbox: Outbox, one: str, now_ms: int) -> None:
    await enqueue(outbox, one, now_ms=now_ms)
    await (await claim_one(outbox, now_ms)).ack(now_ms=now_ms)


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [1, 2, 3, 4]),
        (Retention(finished_ms=20), [3, 4]),
        (Retention(finished_ms=21), [2, 3, 4]),
        (Retention(finished_count=1), [4]),
        (Retention(finished_bytes=150), [3, 4]),
        (Retention(finished_ms=0), []),
        (Retention(finished_count=0), []),
    ],
)
async def test_finished_rows_are_kept_within_bounds(
    connected: Connect, tenant_name: str, retention: Retention, kept: list[int]
) -> None:
    """By age, count and bytes, the oldest first; an age of exactly the bound is over."""
    kit = await connected(retention=retention)
    outbox = kit.tenant(tenant_name, "w").outbox
    for number in (1, 2, 3, 4):
        await finish(outbox, row_id(number), 10 * number)

    assert ids((await outbox.list(now_ms=40)).items) == [row_id(number) for number in kept]
    counts = await outbox.counts(now_ms=40)
    assert (counts.sent, counts.finished_kept) == (4, len(kept))
    assert (counts.finished_bytes_kept > 0) == bool(kept)


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [1, 2, 3]),
        (Retention(dead_ms=10), [3]),
        (Retention(dead_ms=11), [2, 3]),
        (Retention(dead_count=2), [2, 3]),
        (Retention(dead_count=0), []),
    ],
)
async def test_dead_letters_are_kept_within_bounds(
    connected: Connect, tenant_name: str, retention: Retention, kept: list[int]
) -> None:
    """By age and count."""
    kit = await connected(retention=retention)
    outbox = kit.tenant(tenant_name, "w").outbox
    for number in (1, 2, 3):
        await enqueue(outbox, row_id(number), now_ms=10 * number)
        held = await claim_one(outbox, 10 * number)
        await held.nack(error="e", permanent=True, now_ms=10 * number)

    assert ids((await outbox.list(now_ms=30)).items) == [row_id(number) for number in kept]
    counts = await outbox.counts(now_ms=30)
    assert counts.dead_lettered == counts.dead_kept == len(kept)


async def test_a_repeat_about_a_forgotten_row_is_told_so(
    connected: Connect, tenant_name: str
) -> None:
    """`forgotten`, where without repeat it would be lost or missing; above the horizon it is not."""
    kit = await connected(retention=Retention(finished_ms=0))
    outbox = kit.tenant(tenant_name, "w").outbox
    await enqueue(outbox, M2)
    held = await claim_one(outbox, 10)
    await held.ack(now_ms=11)

    repeated: dict[str, Any] = {"repeat": True, "now_ms": 12}
    said = {"actor": "ops", "reason": "r"}
    assert await held.ack(now_ms=12) == "lost_claim"
    assert await held.ack(**repeated) == "forgotten"
    assert await held.nack(error="e", **repeated) == "forgotten"
    assert await held.release(**repeated) == "forgotten"
    assert await outbox.ack(M1, TOKEN_A, **repeated) == "forgotten"
    assert await outbox.cancel(M2, **repeated) == "forgotten"
    assert await outbox.redrive(M2, **repeated) == "forgotten"
    assert await outbox.resolve(M2, "sent", **said, **repeated) == "forgotten"
    assert await outbox.cancel(M2, now_ms=12) == "missing"
    assert await outbox.ack(M3, TOKEN_A, **repeated) == "lost_claim"
    assert await outbox.cancel(M3, **repeated) == "missing"


async def test_a_purge_deletes_the_oldest(outbox: Outbox) -> None:
    """Up to and including an instant, no more than asked for, finished rows or dead letters."""
    for number in (1, 2, 3):
        await finish(outbox, row_id(number), 10 * number)
    await enqueue(outbox, row_id(4), now_ms=40)
    await (await claim_one(outbox, 40)).nack(error="e", permanent=True, now_ms=40)

    assert await outbox.purge(before_ms=9, now_ms=50) == 0
    assert await outbox.purge(before_ms=20, limit=1, now_ms=50) == 1
    assert await outbox.purge(before_ms=20, now_ms=50) == 1
    assert await outbox.purge(before_ms=39, dead=True, now_ms=50) == 0
    assert ids((await outbox.list(now_ms=50)).items) == [row_id(4), row_id(3)]
    assert await outbox.purge(before_ms=40, dead=True, now_ms=50) == 1
    assert await outbox.ack(M1, TOKEN_A, repeat=True, now_ms=50) == "forgotten"


# --- reading --------------------------------------------------------------------------------------


async def mixed(outbox: Outbox) -> dict[str, str]:
    """One row of each kind, by the word of its status; claimed at 100 for 100, parked at 100."""
    names = ["sent", "dead_lettered", "unknown", "cancelled", "claimed", "pending"]
    made = {name: row_id(number) for number, name in enumerate(names, 1)}
    await enqueue(outbox, made["sent"], now_ms=1)
    await (await claim_one(outbox, 1)).ack(now_ms=2)
    await enqueue(outbox, made["dead_lettered"], now_ms=3)
    await (await claim_one(outbox, 3)).nack(error="e", permanent=True, now_ms=4)
    await enqueue(outbox, made["unknown"], now_ms=5, on_expiry="park")
    await claim_one(outbox, 5)
    await claim(outbox, 15)
    await enqueue(outbox, made["cancelled"], now_ms=16)
    await outbox.cancel(made["cancelled"], now_ms=17)
    await enqueue(outbox, made["claimed"], now_ms=100)
    await claim_one(outbox, 100, lease_ms=100)
    await outbox.enqueue("sms", "bob", 1, id=made["pending"], available_at_ms=300, now_ms=100)
    return made


async def test_a_listing_has_an_order(outbox: Outbox) -> None:
    """Those in line by lane and due time, then unknown, dead letters, finished."""
    await mixed(outbox)
    page = await outbox.list(now_ms=101)

    words = [row.status for row in page.items]
    assert words == ["claimed", "pending", "unknown", "dead_lettered", "sent", "cancelled"]
    assert page.next_cursor is None


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6])
async def test_pages_make_up_the_listing(outbox: Outbox, limit: int) -> None:
    """However they are cut, each row comes once, in the same order."""
    await mixed(outbox)
    whole = ids((await outbox.list(now_ms=101)).items)
    seen: list[str] = []
    page = await outbox.list(limit=limit, now_ms=101)
    seen += ids(page.items)
    while page.next_cursor:
        assert len(page.items) <= limit
        page = await outbox.list(limit=limit, cursor=page.next_cursor, now_ms=101)
        seen += ids(page.items)
    assert seen == whole


@pytest.mark.parametrize(
    "status", ["pending", "claimed", "sent", "dead_lettered", "unknown", "cancelled"]
)
async def test_a_listing_can_be_of_one_status(outbox: Outbox, status: str) -> None:
    """The filter comes before the limit."""
    made = await mixed(outbox)
    assert ids((await outbox.list(status=status, limit=1, now_ms=101)).items) == [made[status]]


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ({"lane": "sms"}, ["pending"]),
        ({"lane": "sms", "target": "bob"}, ["pending"]),
        ({"lane": "sms", "target": "bo"}, []),
        ({"lane": "sm"}, []),
        ({"lane": "mail", "status": "delivered"}, ["sent"]),
        ({"lane": "mail", "target": "alice", "status": "claimed"}, ["claimed"]),
        ({"lane": "mail", "target": "bob", "status": "sent"}, []),
    ],
)
async def test_a_listing_can_be_of_one_lane(
    outbox: Outbox, filters: dict[str, Any], names: list[str]
) -> None:
    """Lane and target are whole words; a lane alone has all its targets."""
    made = await mixed(outbox)
    found = ids((await outbox.list(**filters, now_ms=101)).items)
    assert found == [made[name] for name in names]


async def test_pages_hold_while_rows_come_and_go(outbox: Outbox) -> None:
    """The row on which a page ended may be gone: the next page goes on behind its place."""
    await enqueue(outbox, *[row_id(number) for number in (1, 3, 5, 7)])
    page = await outbox.list(limit=2, now_ms=0)
    await outbox.cancel(row_id(3), now_ms=0)
    await enqueue(outbox, row_id(2), row_id(4))
    page = await outbox.list(limit=2, cursor=page.next_cursor, now_ms=0)
    assert ids(page.items) == [row_id(4), row_id(5)]


@pytest.mark.parametrize(
    "cursor", ["", "zz", "00", "5b5d", "5b312c322c335d", "7b7d", "5b22612231", "é", " "]
)
async def test_a_cursor_of_ones_own_is_refused(outbox: Outbox, cursor: str) -> None:
    """It must be one that the listing gave."""
    with pytest.raises(InvalidInput, match="cursor is not one that this list gave") as raised:
        await outbox.list(cursor=cursor, now_ms=0)
    assert raised.value.field == "cursor"


async def test_a_cursor_of_another_listing_is_refused(outbox: Outbox) -> None:
    """A page that goes on in a list which this listing does not have would silently be the end."""
    await enqueue(outbox, M1, M2)
    page = await outbox.list(limit=1, now_ms=0)
    with pytest.raises(InvalidInput, match="cursor is not one that this list gave"):
        await outbox.list(status="sent", cursor=page.next_cursor, now_ms=0)


async def test_counts_are_by_lane_and_in_all(outbox: Outbox) -> None:
    """What is there now, and what was ever sent and cancelled."""
    await mixed(outbox)
    counts = await outbox.counts(now_ms=101)

    kinds = ("pending", "claimed", "unknown", "dead_lettered", "sent", "cancelled")
    assert [getattr(counts, kind) for kind in kinds] == [1] * 6
    assert (counts.finished_kept, counts.dead_kept, counts.unknown_kept) == (2, 1, 1)
    by_lane = {(one.lane, one.target): one for one in counts.lanes}
    assert set(by_lane) == {("mail", "alice"), ("sms", "bob")}
    assert by_lane["sms", "bob"].pending == 1
    assert by_lane["sms", "bob"].last_enqueue_at_ms == 100
    assert by_lane["mail", "alice"].last_enqueue_at_ms == 100
    sms = await outbox.counts(lane="sms", now_ms=101)
    assert (sms.pending, sms.sent, len(sms.lanes)) == (1, 0, 1)
    assert (await outbox.counts(lane="mail", target="bob", now_ms=101)).lanes == []


async def test_an_empty_outbox_is_empty(outbox: Outbox) -> None:
    """Nothing to read, nothing to claim, no next due time."""
    assert await outbox.get(M1, now_ms=0) is None
    assert (await outbox.list(now_ms=0)).items == []
    assert (await outbox.counts(now_ms=0)).lanes == []
    claimed = await claim(outbox, 0)
    assert (claimed, claimed.more, claimed.next_due_at_ms) == ([], False, 0)


# --- tenants --------------------------------------------------------------------------------------


async def test_tenants_share_nothing(kit: Leasekit, tenant_name: str) -> None:
    """Same lane, target, dedupe key, ids and tokens: two rows, and nobody touches the other's."""
    one = kit.tenant(tenant_name, "a").outbox
    other = kit.tenant(tenant_name, "b").outbox
    for outbox in (one, other):
        enqueued = await outbox.enqueue("mail", "alice", 1, id=M1, dedupe_key="k", now_ms=0)
        assert enqueued.created
    await claim_one(one, 10, claim_id=TOKEN_A)

    assert await other.ack(M1, TOKEN_A, now_ms=11) == "lost_claim"
    assert await other.nack(M1, TOKEN_A, error="e", now_ms=11) == "lost_claim"
    assert await other.extend(M1, TOKEN_A, now_ms=11) == "lost_claim"
    assert (await other.get(M1, now_ms=11)).status == "pending"  # type: ignore[union-attr]
    assert [row.status for row in (await other.list(limit=1, now_ms=11)).items] == ["pending"]
    await claim_one(other, 11, claim_id=TOKEN_A)
    assert await other.ack(M1, TOKEN_A, now_ms=12) == "acked"
    assert (await one.get(M1, now_ms=12)).status == "claimed"  # type: ignore[union-attr]
    assert (await one.counts(now_ms=12)).claimed == 1


async def test_a_deployment_is_another_tenant_and_an_actor_is_none(
    kit: Leasekit, tenant_name: str
) -> None:
    """spec/reliability 1.2: org, workspace and deployment count, the actor never."""
    plain = kit.tenant(tenant_name, "w")
    acted = kit.tenant(tenant_name, "w", actor="ann")
    deployed = kit.tenant(tenant_name, "w", "d")
    await plain.outbox.enqueue("mail", "alice", 1, id=M1, now_ms=0)

    assert await acted.outbox.get(M1, now_ms=0) is not None
    assert acted.context.actor_id == "ann"
    assert await deployed.outbox.get(M1, now_ms=0) is None


# --- giving up ------------------------------------------------------------------------------------


async def test_a_cancelled_claim_gives_its_rows_back(
    outbox: Outbox, server: Server, state: State
) -> None:
    """Cancelled at any moment: the rows are pending, their attempts uncharged, or were never taken."""
    await enqueue(outbox, M1, M2)
    for moment in range(12):
        task = asyncio.create_task(claim(outbox, 10, limit=1))
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        [result] = await asyncio.gather(task, return_exceptions=True)
        if isinstance(result, ClaimedRows):
            await result[0].release(now_ms=10)
        # The release of what was given back travels before this on the same connection.
        await outbox.get(M1, now_ms=10)
        await outbox.get(M1, now_ms=10)
        counts = await outbox.counts(now_ms=10)
        assert (counts.pending, counts.claimed) == (2, 0), moment
    held = await claim(outbox, 20)
    assert [one.row.attempt_count for one in held] == [1, 1]


async def test_a_new_token_each(outbox: Outbox) -> None:
    """Claims that are given no id make their own."""
    await enqueue(outbox, M1)
    tokens = {(await claim_one(outbox, now_ms)).token for now_ms in range(0, 50, 10)}
    assert len(tokens) == 5
    assert new_token() not in tokens
