"""Waits on every server: claimed for a time, completed once, due in order; spec/reliability 5.1-5.3, 5.8."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from leasekit import InvalidInput, Leasekit, Tenant
from leasekit.ledger.records import StatefulRuntimeScope, TimeoutPolicy, Wait
from leasekit.ledger.store import Transaction
from leasekit.ledger.waiting import WebhookEvent
from leasekit.ledger.waits import Waits, read, write_wait
from leasekit.model import TenantContext

Connect = Callable[..., Awaitable[Leasekit]]
EVENT = WebhookEvent(trigger_id="t", provider="p", body_digest="b")


@pytest.fixture
def waits(tenant: Tenant) -> Waits:
    return tenant.ledger.waits


@pytest.fixture
def make(tenant: Tenant) -> Callable[..., Wait]:
    """A wait of the test's tenant: a timer of run-a that is due at 50."""

    def wait(wait_id: str = "wait-a", status: str = "waiting", **fields: Any) -> Wait:
        given: dict[str, Any] = {
            "run_id": "run-a",
            "wait_kind": "timer",
            "scope": StatefulRuntimeScope(tenant_context=tenant.context),
            "created_at_ms": 10,
            "updated_at_ms": 20,
            "wake_at_ms": 50,
        }
        return Wait(wait_id=wait_id, status=status, **(given | fields))

    return wait


Make = Callable[..., Wait]


async def put(waits: Waits, *many: Wait) -> None:
    for wait in many:
        assert await waits.upsert(wait, now_ms=20) == wait


def ids(found: Any) -> list[str]:
    return [wait.wait_id for wait in found]


async def claimed(waits: Waits, make: Make, **fields: Any) -> Wait:
    """wait-a, claimed by c from 100 to 200."""
    await put(waits, make(**fields))
    wait = await waits.claim_due("run-a", "wait-a", claimant="c", lease_ms=100, now_ms=100)
    assert wait is not None
    return wait


# --- kept and listed ------------------------------------------------------------------------------


async def test_wait_is_kept_whole(waits: Waits, make: Make) -> None:
    """Every field of it; it is known by run and id, exactly."""
    policy = TimeoutPolicy(
        timeout_at_ms=70, on_timeout="remind", escalate_to="boss", remind_every_ms=5, metadata=[1]
    )
    wait = make(
        phase_id="p", reason="r", timeout_policy=policy, event_seq=3, wake_idempotency_key="k",
        claimed_by="c", claimed_at_ms=1, claim_expires_at_ms=2, completed_at_ms=3, metadata={"é": 1},
    )  # fmt: skip
    await put(waits, wait, make(run_id="RUN_A", reason="other"))

    assert await waits.get("run-a", "wait-a", now_ms=1) == wait
    other = await waits.get("RUN_A", "wait-a", now_ms=1)
    assert other is not None
    assert other.reason == "other"
    assert await waits.get("run-a", "wait-b", now_ms=1) is None


async def test_terminal_wait_stays(waits: Waits, make: Make) -> None:
    """An upsert over it gives it back; an approval that was given up on is decided after all."""
    ended = make(status="cancelled")
    await put(waits, ended)
    assert await waits.upsert(make(reason="again"), now_ms=30) == ended
    assert await waits.get("run-a", "wait-a", now_ms=30) == ended

    await put(waits, make("wait-b", "timed_out", wait_kind="approval"))
    late = make("wait-b", "woken", wait_kind="approval")
    assert await waits.upsert(late, now_ms=30) == late
    assert await waits.get("run-a", "wait-b", now_ms=30) == late


async def test_wait_of_another_tenant_is_refused(
    waits: Waits, make: Make, state: Callable[[], dict[str, Any]]
) -> None:
    scope = StatefulRuntimeScope(tenant_context=TenantContext.explicit("elsewhere", "w"))

    with pytest.raises(InvalidInput, match="another tenant"):
        await waits.upsert(make(scope=scope), now_ms=20)
    assert state() == {}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"status": "sleeping"}, "status"),
        ({"wake_at_ms": -1}, "wake_at_ms"),
        ({"timeout_policy": TimeoutPolicy(timeout_at_ms=1, on_timeout="explode")}, "on_timeout"),
    ],
)
async def test_wait_that_no_step_knows_is_refused(
    waits: Waits,
    make: Make,
    state: Callable[[], dict[str, Any]],
    fields: dict[str, Any],
    field: str,
) -> None:
    with pytest.raises(InvalidInput) as refused:
        await waits.upsert(make(**fields), now_ms=20)
    assert refused.value.field == field
    assert state() == {}


async def test_waits_are_listed_by_due_time(waits: Waits, make: Make) -> None:
    """The earlier of waking and timeout counts, those without stand at the end; then creation, then id."""
    late = TimeoutPolicy(timeout_at_ms=45, on_timeout="cancel")
    await put(
        waits,
        make("never-b", wake_at_ms=None),
        make("never-a", wake_at_ms=None, created_at_ms=11),
        make("b", wake_at_ms=50, created_at_ms=9),
        make("a", wake_at_ms=50),
        make("c", wake_at_ms=50),
        make("early", wake_at_ms=70, timeout_policy=late),
        make("timeout", wake_at_ms=None, timeout_policy=late, created_at_ms=12),
        make("ended", "woken", wake_at_ms=40),
        make("other", run_id="run-b", wake_at_ms=41),
        make("like", run_id="RUN_A", wake_at_ms=42),
    )
    order = ["ended", "early", "timeout", "b", "a", "c", "never-b", "never-a"]

    assert ids(await waits.list(run_id="run-a", now_ms=1)) == order
    assert ids(await waits.list(now_ms=1))[:4] == ["ended", "other", "like", "early"]
    for limit in range(1, 9):
        assert ids(await waits.list(run_id="run-a", limit=limit, now_ms=1)) == order[:limit]
    assert ids(await waits.list(run_id="run-a", limit=0, now_ms=1)) == order


async def test_waits_are_filtered(waits: Waits, make: Make) -> None:
    await put(
        waits,
        make("a"),
        make("b", "woken"),
        make("c", wait_kind="external_condition"),
        make("d", "woken", wait_kind="external_condition"),
    )

    assert ids(await waits.list(kind="external_condition", now_ms=1)) == ["c", "d"]
    assert ids(await waits.list(status="woken", now_ms=1)) == ["b", "d"]
    assert ids(await waits.list(kind="timer", status="waiting", now_ms=1)) == ["a"]
    assert await waits.list(run_id="run-b", now_ms=1) == []


async def test_list_reads_on_through_those_due_together(
    waits: Waits, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more waits than a page shows, due at one instant, those made first come first."""
    monkeypatch.setattr("leasekit.ledger.waits.codec.BATCH_MAX", 20)
    many = [make(f"w{i:04}", created_at_ms=2_000 - i, wake_at_ms=50) for i in range(55)]
    await asyncio.gather(*(waits.upsert(wait, now_ms=20) for wait in many))
    await put(waits, make("later", wake_at_ms=51, created_at_ms=0))

    assert ids(await waits.list(limit=3, now_ms=1)) == ["w0054", "w0053", "w0052"]
    assert len(await waits.list(now_ms=1)) == 56


async def test_due_waits(waits: Waits, make: Make) -> None:
    """Due, and nobody works on them: in order, at most so many."""
    claim = {"claimed_by": "c", "claimed_at_ms": 1}
    await put(
        waits,
        make("c", wake_at_ms=100),
        make("a", wake_at_ms=90),
        make("b", wake_at_ms=90, created_at_ms=5),
        make("not yet", wake_at_ms=101),
        make("never", wake_at_ms=None),
        make("ended", "woken", wake_at_ms=50),
        make("taken", "claimed", wake_at_ms=50, claim_expires_at_ms=101, **claim),
        make("left", "claimed", wake_at_ms=60, claim_expires_at_ms=100, **claim),
    )
    order = ["left", "b", "a", "c"]

    assert ids(await waits.due(now_ms=100)) == order
    assert ids(await waits.due(limit=2, now_ms=100)) == order[:2]
    assert ids(await waits.due(now_ms=59)) == []
    with pytest.raises(InvalidInput):
        await waits.due(limit=0, now_ms=100)


async def test_run_of_the_name_due_has_a_list_of_its_own(waits: Waits, make: Make) -> None:
    """A run's waits are not taken for those that are due, nor for those that have ended."""
    for run in ("due", "ended", "~due", "~ended"):
        await put(waits, make(f"of {run}", "woken", run_id=run, wake_at_ms=1, completed_at_ms=99))

    assert await waits.due(now_ms=100) == []
    for run in ("due", "ended", "~due", "~ended"):
        assert ids(await waits.list(run_id=run, now_ms=100)) == [f"of {run}"]
        await put(waits, make("old", "woken", run_id=run, wake_at_ms=None, completed_at_ms=5))
    assert await waits.prune(retention_ms=1, now_ms=100) == 4


# --- claims ---------------------------------------------------------------------------------------


async def test_claim(waits: Waits, make: Make) -> None:
    wait = await claimed(waits, make)

    assert wait == make(
        status="claimed", claimed_by="c", claimed_at_ms=100, claim_expires_at_ms=200,
        updated_at_ms=100,
    )  # fmt: skip
    assert await waits.get("run-a", "wait-a", now_ms=100) == wait


@pytest.mark.parametrize(
    ("status", "now", "taken"),
    [
        ("waiting", 49, False),
        ("waiting", 50, True),
        ("claimed", 99, False),
        ("claimed", 100, True),
        ("woken", 100, False),
        ("timed_out", 100, False),
        ("escalated", 100, False),
        ("cancelled", 100, False),
    ],
)
async def test_claim_needs_a_due_wait_that_is_free(
    waits: Waits, make: Make, status: str, now: int, taken: bool
) -> None:
    """A claim ends at its end."""
    claim = {"claimed_by": "c", "claimed_at_ms": 1, "claim_expires_at_ms": 100}
    await put(waits, make(status=status, **(claim if status == "claimed" else {})))

    wait = await waits.claim_due("run-a", "wait-a", claimant="d", lease_ms=0, now_ms=now)

    assert (wait is not None) is taken
    if wait is not None:
        assert (wait.claimed_by, wait.claim_expires_at_ms) == ("d", now + 1)


async def test_claim_of_no_wait(waits: Waits) -> None:
    assert await waits.claim_due("run-a", "x", claimant="d", lease_ms=1, now_ms=1) is None


@pytest.mark.parametrize("change", [{}, {"created_at_ms": 11}, {"updated_at_ms": 21}])
async def test_claim_of_what_was_seen(waits: Waits, make: Make, change: dict[str, int]) -> None:
    """Creation and last change must be those that were seen."""
    await put(waits, make())
    seen = msgspec.structs.replace(make(), **change)

    wait = await waits.claim_due("run-a", "wait-a", claimant="c", lease_ms=9, seen=seen, now_ms=60)

    assert (wait is not None) is (not change)


@pytest.mark.parametrize(("due_at", "now", "taken"), [(50, 30, True), (49, 60, False)])
async def test_claim_by_another_clock(
    waits: Waits, make: Make, due_at: int, now: int, taken: bool
) -> None:
    """Whether it is due goes by one instant, the lease by the other."""
    await put(waits, make())

    wait = await waits.claim_due(
        "run-a", "wait-a", claimant="c", lease_ms=9, due_at_ms=due_at, now_ms=now
    )
    assert (wait is not None) is taken
    if wait is not None:
        assert (wait.claimed_at_ms, wait.claim_expires_at_ms) == (now, now + 9)


async def test_one_of_many_wins_a_claim(
    connected: Connect, tenant: Tenant, waits: Waits, make: Make
) -> None:
    """Two clients with ten claimants each, at once, 20 times."""
    other = (await connected()).tenant(tenant.context.org_id, "w").ledger.waits
    for turn in range(20):
        await put(waits, make(f"w{turn}"))
        won = await asyncio.gather(
            *(
                side.claim_due("run-a", f"w{turn}", claimant=f"c{n}", lease_ms=9, now_ms=60)
                for n in range(10)
                for side in (waits, other)
            )
        )
        assert len([wait for wait in won if wait is not None]) == 1


async def test_claims_after_each_other_clear_what_was_begun(waits: Waits, make: Make) -> None:
    """The key of a claimant that vanished is gone with its claim."""
    first = await claimed(waits, make)
    await waits.begin_completion(first, "k", now_ms=110)

    second = await waits.claim_due("run-a", "wait-a", claimant="d", lease_ms=9, now_ms=200)

    assert second is not None
    assert second.wake_idempotency_key is None
    assert await waits.finish_completion(first, "k", seq=1, status="woken", now_ms=201) is None


# --- completion -----------------------------------------------------------------------------------


async def test_wait_is_completed_once(waits: Waits, make: Make) -> None:
    """Begun and finished by its claimant; replays of both get the same, another key nothing."""
    claim = await claimed(waits, make)
    begun = await waits.begin_completion(claim, "k", now_ms=150)
    assert begun is not None
    done = await waits.finish_completion(begun, "k", seq=7, status="woken", now_ms=500)

    assert done == make(
        status="woken", wake_idempotency_key="k", event_seq=7, completed_at_ms=500,
        updated_at_ms=500,
    )  # fmt: skip
    assert await waits.begin_completion(claim, "k", now_ms=600) == done
    assert await waits.begin_completion(claim, "other", now_ms=600) is None
    again = await waits.finish_completion(begun, "k", seq=7, status="woken", now_ms=600)
    assert again == done
    for key, seq, status in (("k", 8, "woken"), ("o", 7, "woken"), ("k", 7, "cancelled")):
        refused = await waits.finish_completion(begun, key, seq=seq, status=status, now_ms=600)
        assert refused is None
    assert await waits.get("run-a", "wait-a", now_ms=600) == done


@pytest.mark.parametrize(
    "other", [{"claimed_by": "d"}, {"claimed_at_ms": 99}, {"claim_expires_at_ms": 201}]
)
async def test_steps_are_fenced_by_the_whole_claim(
    waits: Waits, make: Make, other: dict[str, Any]
) -> None:
    """Claimant, start and end must all be those of the claim."""
    claim = await claimed(waits, make)
    begun = await waits.begin_completion(claim, "k", now_ms=110)
    wrong = msgspec.structs.replace(claim, **other)

    assert await waits.begin_completion(wrong, "k", now_ms=120) is None
    assert await waits.finish_completion(wrong, "k", seq=1, status="woken", now_ms=120) is None
    assert await waits.finish_reminder(wrong, "k", seq=1, next_at_ms=9, now_ms=120) is None
    assert await waits.release(wrong, now_ms=120) is None
    assert await waits.cancel_by_guard(wrong, "no", now_ms=120) is None
    assert await waits.get("run-a", "wait-a", now_ms=120) == begun


async def test_begin_needs_an_active_claim_and_finish_does_not(waits: Waits, make: Make) -> None:
    """Who is late may finish what it has begun, as long as nobody else took the wait."""
    claim = await claimed(waits, make)
    assert await waits.begin_completion(claim, "k", now_ms=200) is None
    await waits.begin_completion(claim, "k", now_ms=199)

    done = await waits.finish_completion(claim, "k", seq=1, status="woken", now_ms=9_000)
    assert done is not None


async def test_release(waits: Waits, make: Make) -> None:
    """Given back, it may be claimed at once."""
    claim = await claimed(waits, make)

    assert await waits.release(claim, now_ms=120) == make(updated_at_ms=120)
    assert await waits.release(claim, now_ms=121) is None
    again = await waits.claim_due("run-a", "wait-a", claimant="d", lease_ms=9, now_ms=122)
    assert again is not None


async def test_reminder(waits: Waits, make: Make) -> None:
    """The wait goes on; a reminder that is told again changes nothing; the next one counts on."""
    policy = TimeoutPolicy(timeout_at_ms=50, on_timeout="remind", remind_every_ms=40)
    claim = await claimed(waits, make, wake_at_ms=None, timeout_policy=policy)
    await waits.begin_completion(claim, "k", now_ms=110)
    first = await waits.finish_reminder(claim, "k", seq=1, next_at_ms=150, now_ms=111)

    assert first is not None
    assert first.status == "waiting"
    assert first.timeout_policy is not None
    assert first.timeout_policy.timeout_at_ms == 150
    assert first.timeout_policy.metadata["reminder_count"] == 1
    assert await waits.finish_reminder(claim, "k", seq=1, next_at_ms=150, now_ms=112) == first
    assert await waits.due(now_ms=149) == []
    assert await waits.due(now_ms=150) == [first]


async def test_mark_without_a_claim(waits: Waits, make: Make) -> None:
    """Once by its key, whatever place a replay names; not while somebody works on it."""
    await put(waits, make(), make("wait-b"))
    done = await waits.mark_woken("run-a", "wait-a", "k", seq=3, now_ms=30)

    assert done is not None
    assert await waits.mark_woken("run-a", "wait-a", "k", seq=4, now_ms=31) == done
    assert await waits.mark_woken("run-a", "wait-a", "other", seq=3, now_ms=31) is None
    gone = await waits.mark_timed_out("run-a", "wait-b", "k", seq=3, status="escalated", now_ms=30)
    assert gone is not None
    assert gone.status == "escalated"
    assert await waits.mark_woken("run-a", "wait-b", "k", seq=3, now_ms=31) is None

    await put(waits, make("wait-c"))
    await waits.claim_due("run-a", "wait-c", claimant="c", lease_ms=10, now_ms=60)
    assert await waits.mark_woken("run-a", "wait-c", "k", seq=3, now_ms=69) is None
    assert await waits.mark_woken("run-a", "wait-c", "k", seq=3, now_ms=70) is not None
    assert await waits.mark_woken("run-a", "missing", "k", seq=3, now_ms=70) is None


async def test_wake_by_many_at_once(waits: Waits, make: Make) -> None:
    """One key wins; the others of that key get what it led to, those of other keys nothing."""
    await put(waits, make())
    woken = await asyncio.gather(
        *(waits.mark_woken("run-a", "wait-a", f"k{n % 2}", seq=n, now_ms=30 + n) for n in range(20))
    )

    told = [wait for wait in woken if wait is not None]
    assert len(told) == 10
    assert all(wait == told[0] for wait in told)


async def test_completed_waits_are_due_no_more(
    waits: Waits, make: Make, state: Callable[[], dict[str, Any]]
) -> None:
    """They leave the list that schedulers walk."""
    await put(waits, make())
    assert any("~due|" in place for place in state()["ledger:index"])
    await waits.mark_woken("run-a", "wait-a", "k", seq=1, now_ms=60)

    assert not any("~due|" in place for place in state()["ledger:index"])


async def test_change_between_two_reads_spoils_the_attempt(waits: Waits, make: Make) -> None:
    """A decision that saw two versions of a record does not land; the next attempt sees one."""
    await put(waits, make())
    attempts: list[int] = []

    async def decide(transaction: Transaction) -> None:
        first = await read(transaction, "run-a", "wait-a")
        if not attempts:
            await waits.mark_woken("run-a", "wait-a", "k", seq=1, now_ms=60)
        second = await read(transaction, "run-a", "wait-a")
        attempts.append(int(first == second))
        assert second is not None
        write_wait(transaction, msgspec.structs.replace(second, reason=str(len(attempts))))

    await waits.transact(decide, now_ms=60)
    wait = await waits.get("run-a", "wait-a", now_ms=60)
    assert attempts == [0, 1]
    assert wait is not None
    assert (wait.status, wait.reason) == ("woken", "2")


# --- webhooks and resolutions ---------------------------------------------------------------------


def hook(make: Make, wait_id: str, rules: dict[str, str], **fields: Any) -> Wait:
    given = {"wait_kind": "webhook", "wake_at_ms": None} | fields
    return make(wait_id, metadata={"webhook_match": rules}, **given)


async def test_webhook_takes_the_first_wait_in_order(waits: Waits, make: Make) -> None:
    """Due or not; an expired claim stands where it stood, an active one is passed over."""
    rules = {"trigger_id": "t"}
    claim = {"status": "claimed", "claimed_by": "x", "claimed_at_ms": 1}
    await put(
        waits,
        hook(make, "other", {"trigger_id": "u"}, wake_at_ms=1),
        hook(make, "no rule", {}, wake_at_ms=1),
        hook(make, "taken", rules, wake_at_ms=1, claim_expires_at_ms=101, **claim),
        hook(make, "left", rules, wake_at_ms=400, claim_expires_at_ms=100, **claim),
        hook(make, "third", rules, created_at_ms=8),
        hook(make, "second", rules, created_at_ms=7, run_id="run-b"),
        hook(make, "ended", rules, status="woken", wake_at_ms=1),
        make("timer", metadata={"webhook_match": rules}),
    )

    taken = []
    for _ in range(4):
        wait = await waits.claim_webhook(EVENT, claimant="r", lease_ms=30_000, now_ms=100)
        taken.append(wait and wait.wait_id)
    assert taken == ["left", "second", "third", None]
    wait = await waits.get("run-b", "second", now_ms=100)
    assert wait is not None
    assert (wait.claimed_by, wait.claim_expires_at_ms) == ("r", 30_100)


async def test_webhook_by_many_at_once(waits: Waits, make: Make) -> None:
    """Three events of a kind wake three different waits."""
    await put(waits, *(hook(make, f"h{n}", {"provider": "p"}) for n in range(3)))

    won = await asyncio.gather(
        *(waits.claim_webhook(EVENT, claimant=f"c{n}", lease_ms=9, now_ms=60) for n in range(6))
    )
    assert sorted(wait.wait_id for wait in won if wait is not None) == ["h0", "h1", "h2"]


@pytest.mark.parametrize("run", [None, "run-b"])
async def test_resolution(waits: Waits, make: Make, run: str | None) -> None:
    """By id and kind, due or not; with its run, or the first of that id in order."""
    kind = "external_condition"
    await put(
        waits,
        make("w", wait_kind=kind, run_id="run-c", wake_at_ms=900),
        make("w", wait_kind=kind, run_id="run-b", wake_at_ms=800),
        make("v", wait_kind=kind, run_id="run-b", wake_at_ms=1),
        make("w", wait_kind="approval", run_id="run-d", wake_at_ms=1),
        make("u", wait_kind="approval", run_id="run-b"),
    )
    claim = {"claimant": "c", "lease_ms": 60_000, "run_id": run, "now_ms": 100}

    first = await waits.claim_for_resolution("w", kind, **claim)
    second = await waits.claim_for_resolution("w", kind, **claim)
    assert first is not None
    assert (first.run_id, first.status) == ("run-b", "claimed")
    assert (second and second.run_id) == (None if run else "run-c")
    assert await waits.claim_for_resolution("w", "timer", **claim) is None
    assert await waits.claim_for_resolution("u", kind, **claim) is None
    assert await waits.claim_for_resolution("x", kind, **claim) is None


# --- retention ------------------------------------------------------------------------------------


async def test_prune(waits: Waits, make: Make, state: Callable[[], dict[str, Any]]) -> None:
    """Only what is over, and was so before the cutoff; by its completion, else its last change."""
    await put(
        waits,
        make("old", "woken", completed_at_ms=99, updated_at_ms=500),
        make("at the cutoff", "woken", completed_at_ms=100),
        make("changed", "cancelled", updated_at_ms=99),
        make("changed later", "cancelled", updated_at_ms=100),
        make("open"),
        *(make(f"many {n}", "timed_out", completed_at_ms=50) for n in range(120)),
    )

    assert await waits.prune(retention_ms=0, now_ms=10_000) == 0
    assert await waits.prune(retention_ms=500, now_ms=499) == 0
    assert await waits.prune(retention_ms=500, now_ms=600) == 122
    assert sorted(ids(await waits.list(now_ms=600))) == ["at the cutoff", "changed later", "open"]
    assert len(state()["ledger:docs"]) == 3


async def test_prune_by_two_at_once(waits: Waits, make: Make) -> None:
    """Each wait is counted by one of them."""
    await put(waits, *(make(f"w{n}", "woken", completed_at_ms=5) for n in range(30)))

    deleted = await asyncio.gather(*(waits.prune(retention_ms=1, now_ms=100) for _ in range(3)))

    assert sum(deleted) == 30


async def test_waits_of_tenants_are_apart(kit: Leasekit, waits: Waits, make: Make) -> None:
    """The same run and id in another tenant is another wait."""
    await put(waits, make())
    other = kit.tenant("another", "w").ledger.waits

    assert await other.list(now_ms=60) == []
    assert await other.claim_due("run-a", "wait-a", claimant="c", lease_ms=9, now_ms=60) is None
