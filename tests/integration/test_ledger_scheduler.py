"""The scheduler of waits on every server: spec/reliability 5.4-5.6."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from leasekit import InvalidInput, Leasekit, Tenant
from leasekit.errors import Unavailable
from leasekit.ledger import Ledger, phases
from leasekit.ledger.records import (
    Run,
    RunEvent,
    RunSnapshot,
    StatefulRuntimeScope,
    TimeoutPolicy,
    Wait,
)
from leasekit.ledger.scheduler import Scheduler, TickResult, action_of, key_of

Connect = Callable[..., Awaitable[Leasekit]]
DEAD_LETTER = "dead-letter-wait-fbb956ad06e1a281"  # of run-a and wait-a: spec, appendix A
PREFIX = "stateful_runtime.wait."


@pytest.fixture
def ledger(tenant: Tenant) -> Ledger:
    return tenant.ledger


class World:
    """A ledger with records of one tenant in it."""

    def __init__(self, tenant: Tenant) -> None:
        self.ledger = tenant.ledger
        self.scope = StatefulRuntimeScope(tenant_context=tenant.context)

    async def wait(self, wait_id: str = "wait-a", **fields: Any) -> Wait:
        """A timer of run-a that is due at 50."""
        given: dict[str, Any] = {
            "run_id": "run-a",
            "wait_kind": "timer",
            "status": "waiting",
            "scope": self.scope,
            "created_at_ms": 10,
            "updated_at_ms": 20,
            "wake_at_ms": 50,
        }
        wait = Wait(wait_id=wait_id, **(given | fields))
        return await self.ledger.waits.upsert(wait, now_ms=20)

    async def timeout(self, on: str, every: int | None = None, **fields: Any) -> Wait:
        """wait-a, which times out at 50."""
        policy = TimeoutPolicy(timeout_at_ms=50, on_timeout=on, remind_every_ms=every)
        return await self.wait(**({"wake_at_ms": None, "timeout_policy": policy} | fields))

    async def run(self, status: str = "sleeping", run_id: str = "run-a", **fields: Any) -> Run:
        run = Run(
            run_id=run_id, kind="workflow", scope=self.scope, status=status,
            **({"created_at_ms": 1, "updated_at_ms": 5} | fields),
        )  # fmt: skip
        return await self.ledger.runs.upsert(run, now_ms=20)

    async def snapshot(self, status: str, seq: int = 0) -> None:
        snapshot = RunSnapshot(
            snapshot_id=f"s{seq}", run_id="run-a", seq=seq, created_at_ms=5, scope=self.scope,
            status=status,
        )  # fmt: skip
        await self.ledger.snapshots.put(snapshot, now_ms=20)

    async def look(self, wait_id: str = "wait-a", run_id: str = "run-a") -> Wait:
        wait = await self.ledger.waits.get(run_id, wait_id, now_ms=0)
        assert wait is not None
        return wait

    async def status(self, run_id: str = "run-a") -> str:
        run = await self.ledger.runs.get(run_id, now_ms=0)
        assert run is not None
        return run.status

    async def log(self) -> list[RunEvent]:
        return (await self.ledger.events.list("run-a", limit=1_000, now_ms=0)).events


@pytest.fixture
def world(tenant: Tenant) -> World:
    return World(tenant)


def told(result: TickResult) -> tuple[int, int, int, int]:
    return result.checked, result.claimed, result.completed, result.failed


# --- the table ------------------------------------------------------------------------------------

CANCELLED = "stateful wait timeout cancelled the run"
ESCALATED = "stateful wait timeout escalated for operator review"
UNANSWERED = "stateful wait timeout reminder requires operator review"
TABLE = [
    (None, None, "timer_woken", "woken", "queued", None),
    ("cancel", None, "timeout_cancelled", "cancelled", "cancelled", CANCELLED),
    ("escalate", None, "timeout_escalated", "escalated", "paused", ESCALATED),
    ("remind", None, "timeout_reminded", "timed_out", "paused", UNANSWERED),
    ("remind", 0, "timeout_reminded", "timed_out", "paused", UNANSWERED),
    ("remind", 25, "timeout_reminded", "waiting", "paused", None),
    ("resume", None, "timeout_resumed", "woken", "queued", None),
]


@pytest.mark.parametrize(("on", "every", "event", "status", "run", "reason"), TABLE)
@pytest.mark.parametrize("why", [None, "  ", "too slow"])
async def test_action(
    world: World, on: str | None, every: int | None, event: str, status: str, run: str,
    reason: str | None, why: str | None,
) -> None:  # fmt: skip
    """Event, snapshot, wait, dead letter and run, as the table of the specification has them."""
    await (world.timeout(on, every, reason=why) if on else world.wait(reason=why))
    await world.run()
    result = await Scheduler(world.ledger, claimant="s", lease_ms=30).tick(now_ms=60)

    assert told(result) == (1, 1, 1, 0)
    assert result.max_lag_ms == 10
    name = f"timeout:{on.capitalize()}" if on else "timer"
    key = f"{name}:run-a:wait-a:50"
    [added] = await world.log()
    assert (added.event_id, added.event_type) == (f"stateful-wait-{key}", PREFIX + event)
    assert (added.occurred_at_ms, added.wait_kind) == (60, "timer")
    wait = await world.look()
    assert (wait.status, wait.event_seq, wait.wake_idempotency_key) == (status, 1, key)
    assert wait.claimed_by is None
    [snapshot] = await world.ledger.snapshots.list("run-a", now_ms=60)
    run_status = {"queued": "running"}.get(run, run)
    assert (snapshot.snapshot_id, snapshot.seq) == (added.event_id, 1)
    assert (snapshot.status, snapshot.phase) == (run_status, phases.PHASE_OF[run_status])
    assert await world.status() == run
    [outcome] = result.outcomes
    assert (outcome.wait_id, outcome.event_seq, outcome.run_status) == ("wait-a", 1, run_status)
    letters = (await world.ledger.dead_letters.list(now_ms=60)).items
    if reason is None:
        assert letters == []
        return
    [letter] = letters
    assert letter.dead_letter_id == DEAD_LETTER
    assert letter.reason == (f"{reason}: too slow" if why == "too slow" else reason)
    assert (letter.source_type, letter.source_id) == ("stateful_wait", "wait-a")
    assert letter.recovery_options == ["ignore", "compensate"]
    assert letter.payload_pointer == "stateful-wait://run-a/wait-a"
    assert (letter.status, letter.attempts, letter.run_id) == ("open", 1, "run-a")


async def test_nothing_to_do(world: World) -> None:
    """Before it is due, and once it is done."""
    await world.wait()
    scheduler = Scheduler(world.ledger)

    assert told(await scheduler.tick(now_ms=49)) == (0, 0, 0, 0)
    assert told(await scheduler.tick(now_ms=50)) == (1, 1, 1, 0)
    assert told(await scheduler.tick(now_ms=50)) == (0, 0, 0, 0)


async def test_reminders_follow_each_other(world: World) -> None:
    """Each from the event of the one before, each with an event and a snapshot of its own."""
    await world.timeout("remind", 25)
    scheduler = Scheduler(world.ledger)
    for now, done in ((60, 1), (84, 0), (85, 1), (200, 1), (224, 0), (225, 1)):
        assert (await scheduler.tick(now_ms=now)).completed == done

    wait = await world.look()
    assert wait.timeout_policy is not None
    assert wait.timeout_policy.timeout_at_ms == 250
    assert wait.timeout_policy.metadata["reminder_count"] == 4
    due = [50, 85, 110, 225]
    assert [event.event_id for event in await world.log()] == [
        f"stateful-wait-timeout:Remind:run-a:wait-a:{at}" for at in due
    ]
    assert len(await world.ledger.snapshots.list("run-a", now_ms=0)) == 4


async def test_reminded_wait_is_still_woken(world: World) -> None:
    """Waking comes after the reminders, from the phase that they brought the run into."""
    await world.timeout("remind", 1_000, wake_at_ms=70)
    await world.run()
    scheduler = Scheduler(world.ledger)
    await scheduler.tick(now_ms=60)
    assert await world.status() == "paused"
    await scheduler.tick(now_ms=70)

    assert (await world.look()).status == "woken"
    assert await world.status() == "queued"


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_tick_does_the_first_in_order(world: World, limit: int) -> None:
    for n in (3, 1, 2):
        await world.wait(f"w{n}", wake_at_ms=40 + n, run_id=f"r{n}")
    scheduler = Scheduler(world.ledger)

    result = await scheduler.tick(limit=limit, now_ms=60)
    assert [one.wait_id for one in result.outcomes] == ["w1", "w2", "w3"][:limit]
    rest = await scheduler.tick(limit=5, now_ms=60)
    assert result.completed + rest.completed == 3


async def test_active_claims_do_not_count_against_the_limit(world: World) -> None:
    """What somebody works on is passed over before the limit."""
    claim = {"status": "claimed", "claimed_by": "x", "claimed_at_ms": 1}
    for n in range(3):
        await world.wait(f"taken {n}", wake_at_ms=40, claim_expires_at_ms=61, **claim)
    await world.wait("free")
    await world.wait("left", wake_at_ms=51, claim_expires_at_ms=60, **claim)

    result = await Scheduler(world.ledger).tick(limit=2, now_ms=60)
    assert [one.wait_id for one in result.outcomes] == ["free", "left"]


@pytest.mark.parametrize("limit", [0, 1_001])
async def test_limit_of_a_tick(ledger: Ledger, limit: int) -> None:
    with pytest.raises(InvalidInput):
        await Scheduler(ledger).tick(limit=limit, now_ms=60)


async def test_schedulers_side_by_side(connected: Connect, tenant: Tenant, world: World) -> None:
    """Four at once in two clients: each wait has one event, one snapshot, one completion."""
    for n in range(20):
        await world.wait(f"w{n}", run_id="run-a" if n % 2 else f"r{n}")
    other = (await connected()).tenant(tenant.context.org_id, "w").ledger
    sides = [Scheduler(one, claimant=f"s{n}") for n, one in enumerate([world.ledger, other] * 2)]

    results = await asyncio.gather(*(side.tick(now_ms=60) for side in sides))
    assert sum(result.completed for result in results) == 20
    assert [error for result in results for error in result.errors] == []
    assert len(await world.log()) == 10
    assert len(await world.ledger.snapshots.list("run-a", now_ms=60)) == 10


# --- phases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_phase_that_allows_no_wake(world: World, status: str) -> None:
    """The wait is cancelled with the reason, without event; the tick counts it as failed."""
    await world.wait()
    await world.snapshot(status)
    await world.run(status)
    result = await Scheduler(world.ledger).tick(now_ms=60)

    why = f"workflow phase transition from terminal phase {status} to running_phase is not allowed"
    assert told(result) == (1, 0, 0, 1)
    assert why in result.errors[0]
    wait = await world.look()
    assert (wait.status, wait.wake_idempotency_key) == ("cancelled", "phase-guard-denied:wait-a")
    assert wait.metadata == {"phase_guard_denied": True, "phase_guard_denial_reason": why}
    assert await world.log() == []
    assert await world.status() == status


async def test_newest_snapshot_decides(world: World) -> None:
    """An older one, of a phase that would not allow it, does not count."""
    await world.wait()
    await world.snapshot("completed", 1)
    await world.snapshot("sleeping", 2)

    assert (await Scheduler(world.ledger).tick(now_ms=60)).completed == 1


async def test_phase_that_moves_on_after_the_claim(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard asks again once the completion was begun."""
    await world.wait()
    begin = world.ledger.waits.begin_completion

    async def begin_late(*arguments: Any, **options: Any) -> Wait | None:
        await world.snapshot("completed")
        return await begin(*arguments, **options)

    waits = type(world.ledger.waits)
    monkeypatch.setattr(waits, "begin_completion", lambda self, *a, **o: begin_late(*a, **o))
    result = await Scheduler(world.ledger).tick(now_ms=60)

    assert told(result) == (1, 1, 0, 1)
    assert (await world.look()).status == "cancelled"
    assert await world.log() == []


@pytest.mark.parametrize(
    ("status", "on", "after"),
    [
        ("completed", "cancel", "completed"),
        ("failed", None, "failed"),
        ("dead_lettered", None, "dead_lettered"),
        ("dry_run", None, "dry_run"),
        ("running", None, "running"),
        ("queued", None, "queued"),
        ("blocked", None, "queued"),
        ("awaiting_approval", "escalate", "awaiting_approval"),
        ("awaiting_approval", "cancel", "cancelled"),
        ("running", "escalate", "paused"),
        ("paused", "escalate", "paused"),
    ],
)
async def test_what_becomes_of_the_run(
    world: World, status: str, on: str | None, after: str
) -> None:
    """A run that is over, or in line, stays; one that awaits an approval is not paused."""
    await (world.timeout(on) if on else world.wait())
    before = await world.run(status)
    assert (await Scheduler(world.ledger).tick(now_ms=60)).completed == 1

    run = await world.ledger.runs.get("run-a", now_ms=60)
    assert run is not None
    assert run.status == after
    assert (run == before) is (status == after)


async def test_wait_of_a_run_that_is_not_kept(world: World) -> None:
    """Its owner moves it."""
    await world.wait()

    assert (await Scheduler(world.ledger).tick(now_ms=60)).completed == 1
    assert await world.ledger.runs.get("run-a", now_ms=60) is None


# --- crashes --------------------------------------------------------------------------------------


class Crash(Exception):
    """The process ends here."""


STEPS = ["claim_due", "begin_completion", "append_and_read", "transact"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("on", [None, "cancel", "remind"])
async def test_crash_between_two_steps(
    world: World, monkeypatch: pytest.MonkeyPatch, step: str, is_done: bool, on: str | None
) -> None:
    """One event, one snapshot, one completion, one dead letter, whichever step was the last one."""
    await (world.timeout(on, 1_000 if on == "remind" else None) if on else world.wait())
    await world.run()
    owner = type(world.ledger.events if step == "append_and_read" else world.ledger.waits)
    real = getattr(owner, step)

    async def crash(self: Any, *arguments: Any, **options: Any) -> None:
        if is_done:
            await real(self, *arguments, **options)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, crash)
        with pytest.raises(Crash):
            await Scheduler(world.ledger, claimant="first", lease_ms=30).tick(now_ms=60)
    second = Scheduler(world.ledger, claimant="second", lease_ms=30)
    if step != "claim_due" and not (step == "transact" and is_done):
        assert (await second.tick(now_ms=89)).claimed == 0  # the first one's claim still counts
    await second.tick(now_ms=90)
    await Scheduler(world.ledger, claimant="third").tick(now_ms=95)

    [event] = await world.log()
    assert event.occurred_at_ms == (60 if _is_noted(step, is_done) else 90)
    [snapshot] = await world.ledger.snapshots.list("run-a", now_ms=95)
    assert (snapshot.snapshot_id, snapshot.seq) == (event.event_id, 1)
    assert snapshot.created_at_ms == event.occurred_at_ms
    wait = await world.look()
    assert wait.status == {None: "woken", "cancel": "cancelled", "remind": "waiting"}[on]
    assert wait.event_seq == 1
    if on == "remind":
        assert wait.timeout_policy is not None
        assert wait.timeout_policy.timeout_at_ms == event.occurred_at_ms + 1_000
        assert wait.timeout_policy.metadata["reminder_count"] == 1
    letters = (await world.ledger.dead_letters.list(now_ms=95)).items
    assert len(letters) == (on == "cancel")
    assert await world.status() == {None: "queued", "cancel": "cancelled", "remind": "paused"}[on]


def _is_noted(step: str, is_done: bool) -> bool:
    return step == "transact" or (step == "append_and_read" and is_done)


async def test_steps_by_hand_up_to_a_snapshot(world: World) -> None:
    """A snapshot that another scheduler wrote by itself is not written again."""
    wait = await world.wait()
    told = action_of(wait, 60)
    assert told is not None
    key = key_of(wait, *told)
    claimed = await world.ledger.waits.claim_due(
        "run-a", "wait-a", claimant="x", lease_ms=30, now_ms=60
    )
    assert claimed is not None
    begun = await world.ledger.waits.begin_completion(claimed, key, now_ms=60)
    event = RunEvent(
        event_id=f"stateful-wait-{key}", run_id="run-a", event_type=PREFIX + "timer_woken",
        occurred_at_ms=60, scope=world.scope,
    )  # fmt: skip
    await world.ledger.events.append(event, now_ms=60)
    snapshot = RunSnapshot(
        snapshot_id=event.event_id, run_id="run-a", seq=1, created_at_ms=60, scope=world.scope,
        status="running",
    )  # fmt: skip
    kept = await world.ledger.snapshots.put(snapshot, now_ms=60)

    assert (await Scheduler(world.ledger).tick(now_ms=90)).completed == 1
    assert await world.ledger.snapshots.list("run-a", now_ms=90) == [kept]
    assert begun is not None
    late = await world.ledger.waits.finish_completion(begun, key, seq=1, status="woken", now_ms=91)
    assert late == await world.look()


async def test_wait_that_changes_before_its_claim_is_passed_over(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be done was decided on what was read: a wait that says something else by now is left
    to the next tick."""
    wait = await world.timeout("cancel")
    waits = type(world.ledger.waits)
    real = waits.claim_due

    async def late(self: Any, *arguments: Any, **options: Any) -> Wait | None:
        policy = TimeoutPolicy(timeout_at_ms=50, on_timeout="resume")
        changed = msgspec.structs.replace(wait, timeout_policy=policy, updated_at_ms=59)
        await world.ledger.waits.upsert(changed, now_ms=59)
        return await real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(waits, "claim_due", late)
        result = await Scheduler(world.ledger).tick(now_ms=60)
    assert told(result) == (1, 0, 0, 0)
    assert (await Scheduler(world.ledger).tick(now_ms=60)).outcomes[0].run_status == "running"


async def test_overtaken_scheduler_lands_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that slept through the end of its claim finds the wait done, and changes nothing."""
    await world.timeout("cancel")
    await world.run()
    waits = type(world.ledger.waits)
    real = waits.transact
    results: list[TickResult] = []

    async def slow(self: Any, *arguments: Any, **options: Any) -> Any:
        if not results:
            results.append(TickResult())
            results.append(await Scheduler(world.ledger, claimant="fast").tick(now_ms=90))
        return await real(self, *arguments, **options)

    monkeypatch.setattr(waits, "transact", slow)
    result = await Scheduler(world.ledger, claimant="slow", lease_ms=30).tick(now_ms=60)

    assert (result.claimed, result.completed, result.failed) == (1, 0, 0)
    assert results[1].completed == 1
    assert (await world.look()).completed_at_ms == 90
    assert len(await world.log()) == 1


async def test_one_that_fails_does_not_keep_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3):
        await world.wait(f"w{n}", run_id=f"r{n}")
    events = type(world.ledger.events)
    real = events.append_and_read

    async def fail(self: Any, event: RunEvent, **options: Any) -> RunEvent:
        if event.run_id == "r1":
            raise Unavailable("gone")
        return await real(self, event, **options)

    monkeypatch.setattr(events, "append_and_read", fail)
    result = await Scheduler(world.ledger).tick(now_ms=60)

    assert told(result) == (3, 3, 2, 1)
    assert result.errors == ["r1/w1: gone"]


# --- clocks ---------------------------------------------------------------------------------------


async def test_clock_that_goes_back_holds_up_nothing_that_was_due(world: World) -> None:
    """What was there and due at the highest instant is woken; what came later waits for the real one."""
    for n in range(3):
        await world.wait(f"was due {n}", wake_at_ms=900)
    await world.wait("was not due", wake_at_ms=1_001)
    scheduler = Scheduler(world.ledger, lease_ms=30)
    assert (await scheduler.tick(limit=1, now_ms=1_000)).completed == 1
    await world.wait("came later", wake_at_ms=900)

    result = await scheduler.tick(now_ms=500)
    assert (result.clock_regressions, result.max_clock_regression_ms) == (1, 500)
    assert [one.wait_id for one in result.outcomes] == ["was due 1", "was due 2"]
    assert (await world.look("was due 1")).completed_at_ms == 500
    assert (await scheduler.tick(now_ms=899)).completed == 0
    late = await scheduler.tick(now_ms=900)
    assert [one.wait_id for one in late.outcomes] == ["came later"]
    assert late.max_clock_regression_ms == 100  # the highest instant is not lowered
    normal = await scheduler.tick(now_ms=1_001)
    assert [one.wait_id for one in normal.outcomes] == ["was not due"]
    assert normal.clock_regressions == 0


async def test_wait_that_changed_is_another_one(world: World) -> None:
    """A wait that was written anew since is judged by the real clock."""
    await world.wait("a", wake_at_ms=800)
    before = await world.wait("b", wake_at_ms=900)
    scheduler = Scheduler(world.ledger)
    await scheduler.tick(limit=1, now_ms=1_000)
    await world.ledger.waits.upsert(msgspec.structs.replace(before, updated_at_ms=21), now_ms=400)

    assert (await scheduler.tick(now_ms=500)).checked == 0
    assert (await scheduler.tick(now_ms=900)).completed == 1


async def test_leases_go_by_the_real_clock(world: World) -> None:
    """A claim that had ended at the highest instant counts again, and so before the limit."""
    claim = {"status": "claimed", "claimed_by": "x", "claimed_at_ms": 1, "claim_expires_at_ms": 600}
    await world.wait("first", wake_at_ms=30)
    await world.wait("taken", wake_at_ms=40, **claim)
    await world.wait("free", wake_at_ms=50)
    scheduler = Scheduler(world.ledger, lease_ms=30)
    await scheduler.tick(limit=1, now_ms=1_000)

    result = await scheduler.tick(limit=1, now_ms=500)
    assert [one.wait_id for one in result.outcomes] == ["free"]
    assert (await scheduler.tick(now_ms=599)).checked == 0
    assert (await scheduler.tick(now_ms=600)).completed == 1


async def test_tick_reads_only_what_is_due(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what is over nor what is due later is looked at."""
    read: list[str] = []
    pages = type(world.ledger.waits).due_pages

    async def counted(self: Any, upto_ms: int, **options: Any) -> Any:
        async for page in pages(self, upto_ms, **options):
            read.extend(wait.wait_id for wait in page)
            yield page

    monkeypatch.setattr(type(world.ledger.waits), "due_pages", counted)
    await world.wait("over", status="woken")
    await world.wait("later", wake_at_ms=61)
    await world.wait("never", wake_at_ms=None)
    await world.wait("now", wake_at_ms=60)

    await Scheduler(world.ledger).tick(now_ms=60)
    assert read == ["now"]

    read.clear()
    monkeypatch.setattr("leasekit.ledger.waits.codec.BATCH_MAX", 20)
    for n in range(45):
        await world.wait(f"w{n:02}")
    assert (await Scheduler(world.ledger).tick(limit=1, now_ms=60)).completed == 1
    assert read == [f"w{n:02}" for n in range(20)]
    read.clear()
    assert len(await world.ledger.waits.due(limit=20, now_ms=60)) == 20
    assert len(read) == 20


async def test_server_clock(connected: Connect, tenant_name: str) -> None:
    """Without an instant of one's own."""
    kit = await connected(clock="server")
    world = World(kit.tenant(tenant_name, "w"))
    scope = world.scope
    wait = Wait(
        wait_id="w", run_id="r", wait_kind="timer", status="waiting", scope=scope, created_at_ms=1,
        updated_at_ms=1, wake_at_ms=1,
    )  # fmt: skip
    await world.ledger.waits.upsert(wait)
    result = await Scheduler(world.ledger).tick()

    assert told(result) == (1, 1, 1, 0)


# --- lost wakes (5.6) -----------------------------------------------------------------------------


async def recover(world: World) -> list[str]:
    found = await Scheduler(world.ledger).recover_lost_wakes(now_ms=100)
    return [run.run_id for run in found]


async def test_lost_wake_is_recovered(world: World) -> None:
    """A run that paused, was woken, and was not moved, is queued again with the reason; once."""
    await world.run("paused", updated_at_ms=60, metadata={"pause_reason": "p", "x": 1})
    await world.wait()
    await world.ledger.waits.mark_woken("run-a", "wait-a", "k", seq=1, now_ms=60)

    assert await recover(world) == ["run-a"]
    run = await world.ledger.runs.get("run-a", now_ms=100)
    assert run is not None
    assert run.status == "queued"
    assert run.metadata == {
        "x": 1,
        "resume_reason": "stateful_wait_wake_recovered_on_restart",
    }
    assert await recover(world) == []


@pytest.mark.parametrize(
    ("run", "fields"),
    [
        ({"updated_at_ms": 61}, {"status": "woken", "event_seq": 1}),
        ({}, {"status": "woken"}),
        ({}, {"status": "timed_out", "event_seq": 1}),
        ({}, {"status": "waiting", "event_seq": 1}),
        ({}, {"status": "woken", "event_seq": 1, "run_id": "RUN_A"}),
        *(({"status": other}, {"status": "woken", "event_seq": 1})
          for other in ("blocked", "sleeping", "pausing", "failed", "running")),
    ],
)  # fmt: skip
async def test_no_lost_wake(world: World, run: dict[str, Any], fields: dict[str, Any]) -> None:
    """Only paused runs, woken with an event at or after their last change, in this very run."""
    before = await world.run(**({"status": "paused", "updated_at_ms": 60} | run))
    await world.wait(**({"updated_at_ms": 60} | fields))

    assert await recover(world) == []
    assert await world.ledger.runs.get("run-a", now_ms=0) == before


@pytest.mark.parametrize("status", ["waiting", "claimed"])
async def test_open_wait_leaves_the_run(world: World, status: str) -> None:
    """As long as the run waits for something else, it stays paused."""
    await world.run("paused", updated_at_ms=60)
    await world.wait("woken", status="woken", event_seq=1, updated_at_ms=60)
    await world.wait("open", status=status)

    assert await recover(world) == []


async def test_recovery_of_many(world: World) -> None:
    """Every paused run is looked at."""
    for n in range(30):
        await world.run("paused" if n % 3 else "blocked", f"r{n}", updated_at_ms=60)
        await world.wait(run_id=f"r{n}", status="woken", event_seq=1, updated_at_ms=60)

    assert len(await recover(world)) == 20


async def test_dead_letter_id_is_the_golden_one(world: World) -> None:
    await world.timeout("escalate")
    await Scheduler(world.ledger).tick(now_ms=60)

    letter = await world.ledger.dead_letters.get(DEAD_LETTER, now_ms=60)
    assert letter is not None
    assert letter.metadata == {
        "event_id": "stateful-wait-timeout:Escalate:run-a:wait-a:50",
        "event_seq": 1,
    }
