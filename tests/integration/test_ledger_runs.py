"""Runs, their execution claims and epochs on every server: spec/reliability 5.7, 6.2."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from leasekit import Conflict, InvalidInput, Leasekit, Tenant
from leasekit.ledger import Ledger, phases
from leasekit.ledger.records import ExecutionClaim, Run, RunEvent, StatefulRuntimeScope
from leasekit.ledger.runs import Runs
from leasekit.model import TenantContext

Connect = Callable[..., Awaitable[Leasekit]]
Make = Callable[..., Run]
LIFECYCLE = "stateful_runtime.automation_v2."
LEASE = 5_000


@pytest.fixture
def ledger(tenant: Tenant) -> Ledger:
    return tenant.ledger


@pytest.fixture
def runs(ledger: Ledger) -> Runs:
    return ledger.runs


@pytest.fixture
def make(tenant: Tenant) -> Make:
    """A queued run of the test's tenant, as the ledger keeps it."""

    def run(run_id: str = "run-a", status: str = "queued", **fields: Any) -> Run:
        given: dict[str, Any] = {
            "kind": "automation_v2",
            "scope": StatefulRuntimeScope(tenant_context=tenant.context),
            "created_at_ms": 10,
            "updated_at_ms": 20,
        }
        bare = Run(run_id=run_id, status=status, **(given | fields))
        return phases.filled(bare, bare.updated_at_ms)

    return run


async def put(runs: Runs, *many: Run) -> None:
    for run in many:
        assert await runs.upsert(run, now_ms=20) == run


async def claim(runs: Runs, now: int = 100, run_id: str = "run-a", who: str = "w") -> Run:
    run = await runs.claim(run_id, claimant=who, lease_ms=LEASE, now_ms=now)
    assert run is not None
    return run


async def log(ledger: Ledger, run_id: str = "run-a") -> list[str]:
    window = await ledger.events.list(run_id, limit=1_000, now_ms=0)
    return [event.event_type.removeprefix(LIFECYCLE) for event in window.events]


async def tell(ledger: Ledger, run: Run, kind: str, at: int, id: str = "") -> None:
    """Somebody adds an event to the run's log."""
    event = RunEvent(
        event_id=id or f"{kind} {at}", run_id=run.run_id, event_type=kind, occurred_at_ms=at,
        scope=run.scope,
    )  # fmt: skip
    await ledger.events.append(event, now_ms=at)


# --- kept -----------------------------------------------------------------------------------------


async def test_run_is_kept_whole(runs: Runs, make: Make) -> None:
    run = make(
        workflow_id="w", automation_id="a", automation_run_id="r", trigger_type="t",
        trigger_event="e", source_event_id="s", task_id="k", current_phase_id="p",
        active_wait_kind="timer", active_wait_id="w", workflow_definition_version="v",
        workflow_definition_snapshot_hash="h", started_at_ms=1, finished_at_ms=2,
        latest_snapshot_id="l", related_context_run_ids=["c"], metadata={"é": 1}, checkpoint=[1],
    )  # fmt: skip
    await put(runs, run)

    assert await runs.get("run-a", now_ms=1) == run
    assert await runs.get("RUN_A", now_ms=1) is None


async def test_run_gets_the_phase_of_its_status(runs: Runs, make: Make) -> None:
    """What is left out, or says something else."""
    bare = msgspec.structs.replace(
        make(), phase="created", phase_history=[], allowed_next_phases=[]
    )
    kept = await runs.upsert(bare, now_ms=20)

    assert kept == make()
    assert kept.phase_history == [phases.observed("run-a", "queued", 20)]
    assert await runs.get("run-a", now_ms=20) == kept


async def test_run_that_is_none_is_refused(
    runs: Runs, make: Make, state: Callable[[], dict[str, Any]]
) -> None:
    elsewhere = StatefulRuntimeScope(tenant_context=TenantContext.explicit("elsewhere", "w"))
    wrong = {
        "run_id": {"run_id": " "},
        "status": {"status": "gone"},
        "created_at_ms": {"created_at_ms": -1},
        "updated_at_ms": {"updated_at_ms": 2**53},
        "execution_claim_epoch": {"execution_claim_epoch": -1},
        "scope.tenant_context": {"scope": elsewhere},
    }
    for field, change in wrong.items():
        with pytest.raises(InvalidInput) as refused:
            await runs.upsert(msgspec.structs.replace(make(), **change), now_ms=20)
        assert refused.value.field == field
    assert state() == {}


async def test_runs_are_listed_by_their_last_change(runs: Runs, make: Make) -> None:
    for n in (2, 5, 1, 4, 3):
        await put(runs, make(f"r{n}", updated_at_ms=n, status="failed" if n % 2 else "queued"))
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = await runs.list(limit=2, cursor=cursor, now_ms=20)
        seen += [run.run_id for run in page.items]
        if (cursor := page.next_cursor) is None:
            break

    assert seen == ["r5", "r4", "r3", "r2", "r1"]
    failed = await runs.with_status("failed", now_ms=20)
    assert [run.run_id for run in failed] == ["r5", "r3", "r1"]


async def test_status_and_phase_move_together(runs: Runs, make: Make) -> None:
    await put(runs, make(status="running"))
    slept = await runs.set_status("run-a", "sleeping", reason="tired", now_ms=30)

    assert slept is not None
    assert (slept.status, slept.phase, slept.updated_at_ms) == ("sleeping", "sleeping", 30)
    assert slept.phase_history[-1].reason == "tired"
    with pytest.raises(Conflict, match="from sleeping to failed is not allowed"):
        await runs.set_status("run-a", "failed", now_ms=31)
    assert await runs.get("run-a", now_ms=31) == slept
    assert await runs.set_status("run-b", "failed", now_ms=31) is None
    with pytest.raises(InvalidInput):
        await runs.set_status("run-a", "gone", now_ms=31)


# --- claims ---------------------------------------------------------------------------------------


async def test_claim(runs: Runs, ledger: Ledger, make: Make) -> None:
    """A queued run runs under the next epoch, which its log tells; there is no second claim."""
    await put(runs, make())
    run = await claim(runs)

    assert (run.status, run.phase, run.execution_claim_epoch) == ("running", "running_phase", 1)
    held = run.execution_claim
    assert held is not None
    assert held.claim_id.startswith("run-claim-")
    assert msgspec.structs.replace(held, claim_id="") == ExecutionClaim(
        claim_id="", claimant_id="w", claimed_at_ms=100, lease_expires_at_ms=5_100, lease_epoch=1
    )
    assert await runs.get("run-a", now_ms=100) == run
    assert await log(ledger) == ["run_execution_claimed"]
    assert await runs.claim("run-a", claimant="v", now_ms=9_999_999) is None
    assert await runs.claim("run-b", claimant="v", now_ms=100) is None


@pytest.mark.parametrize("status", [one for one in phases.PHASE_OF if one != "queued"])
async def test_only_a_queued_run_is_claimed(runs: Runs, make: Make, status: str) -> None:
    await put(runs, make(status=status))

    assert await runs.claim("run-a", claimant="w", now_ms=100) is None
    assert await runs.claim_next(claimant="w", now_ms=100) is None


@pytest.mark.parametrize(
    ("lease", "kept"),
    [
        *((0, 5_000), (4_999, 5_000), (5_001, 5_001)),
        *((21_599_999, 21_599_999), (21_600_001, 21_600_000)),
    ],
)
async def test_lease_is_brought_within_its_bounds(
    runs: Runs, make: Make, lease: int, kept: int
) -> None:
    await put(runs, make())
    run = await runs.claim("run-a", claimant="w", lease_ms=lease, now_ms=100)

    assert run is not None
    assert run.execution_claim is not None
    assert run.execution_claim.lease_expires_at_ms == 100 + kept


async def test_default_lease_is_half_an_hour(runs: Runs, make: Make) -> None:
    await put(runs, make())
    run = await runs.claim_next(claimant="w", now_ms=100)

    assert run is not None
    assert run.execution_claim is not None
    assert run.execution_claim.lease_expires_at_ms == 1_800_100


async def test_oldest_run_comes_first(runs: Runs, make: Make) -> None:
    """By creation, then by id; runs whose pause is over stand in their place, the others do not."""

    def pause(until: int) -> dict[str, Any]:
        return {"scheduler": {"queue_reason": "retry_backoff", "retry_after_ms": until}}

    await put(
        runs,
        make("c", created_at_ms=3),
        make("b", created_at_ms=2, metadata=pause(100)),
        make("z", created_at_ms=1, metadata=pause(101)),
        make("e", created_at_ms=5),
        make("d", created_at_ms=3, metadata=pause(50)),
        make("f", created_at_ms=9, metadata=pause(1)),
        make("other", created_at_ms=6, metadata={"scheduler": {"queue_reason": "x"}}),
        make("running", "running", created_at_ms=0),
    )
    taken = []
    for now in [100] * 7 + [101]:
        run = await runs.claim_next(claimant="w", now_ms=now)
        taken.append(run and run.run_id)

    assert taken == ["b", "c", "d", "e", "other", "f", None, "z"]


async def test_run_that_pauses_is_not_looked_at(
    runs: Runs, make: Make, state: Callable[[], dict[str, Any]]
) -> None:
    """Until then it stands apart from those that are in line."""
    pause = {"scheduler": {"queue_reason": "retry_backoff", "retry_after_ms": 50}}
    await put(runs, make(metadata=pause))
    assert not any("runs:~queued|" in place for place in state()["ledger:index"])
    await put(runs, make())
    assert any("runs:~queued|" in place for place in state()["ledger:index"])
    assert not any("runs:~later|" in place for place in state()["ledger:index"])


async def test_long_lines_are_taken_in_order(runs: Runs, make: Make) -> None:
    """Also where more runs are in line than a page shows."""
    many = [make(f"r{n}", created_at_ms=1_000 - n) for n in range(130)]
    await asyncio.gather(*(runs.upsert(run, now_ms=20) for run in many))
    pause = {"scheduler": {"queue_reason": "retry_backoff", "retry_after_ms": 50}}
    await put(runs, make("paused", created_at_ms=873, metadata=pause))
    taken = []
    for _ in range(4):
        run = await runs.claim_next(claimant="w", now_ms=100)
        taken.append(run and run.run_id)

    assert taken == ["r129", "r128", "paused", "r127"]


async def test_one_of_many_wins_a_claim(
    connected: Connect, tenant: Tenant, runs: Runs, make: Make
) -> None:
    """Two clients with five workers each take seven runs: each run once, under one epoch."""
    other = (await connected()).tenant(tenant.context.org_id, "w").ledger.runs
    await put(runs, *(make(f"r{n}") for n in range(7)))

    won = await asyncio.gather(
        *(side.claim_next(claimant=f"w{n}", now_ms=100) for n in range(5) for side in (runs, other))
    )
    taken = [run for run in won if run is not None]
    assert sorted(run.run_id for run in taken) == [f"r{n}" for n in range(7)]
    assert {run.execution_claim_epoch for run in taken} == {1}


# --- reclaim --------------------------------------------------------------------------------------


async def test_vanished_executor(runs: Runs, ledger: Ledger, make: Make) -> None:
    """Its run is queued again at the claim's end, and taken under a higher epoch."""
    await put(runs, make())
    first = await claim(runs)
    assert await runs.claim_next(claimant="v", now_ms=5_099) is None
    second = await runs.claim_next(claimant="v", now_ms=5_100)

    assert second is not None
    assert second.execution_claim is not None
    assert second.execution_claim_epoch == second.execution_claim.lease_epoch == 2
    assert second.execution_claim.claimant_id == "v"
    assert second.metadata == {"resume_reason": "abandoned_execution_claim"}
    claimed, requeued = "run_execution_claimed", "run_execution_claim_expired_requeued"
    assert await log(ledger) == [claimed, requeued, claimed]
    assert first.execution_claim is not None
    window = await ledger.events.list("run-a", now_ms=0)
    assert window.events[1].event_id == f"{requeued}:{first.execution_claim.claim_id}"


@pytest.mark.parametrize(
    ("kind", "at", "is_heard"),
    [
        (LIFECYCLE + "node_completed", 100, True),
        (LIFECYCLE + "node_completed", 99, False),
        (LIFECYCLE + "run_execution_claimed", 4_000, False),
        (LIFECYCLE + "run_execution_claim_expired_requeued", 4_000, False),
        ("stateful_runtime.wait.timer_woken", 4_000, False),
    ],
)
@pytest.mark.parametrize("noise", [0, 250])
async def test_run_that_was_heard_of(
    runs: Runs, ledger: Ledger, make: Make, kind: str, at: int, is_heard: bool, noise: int
) -> None:
    """Only a lifecycle event since the claim keeps the run, however much was added behind it."""
    await put(runs, make())
    run = await claim(runs)
    await tell(ledger, run, kind, at)
    await asyncio.gather(*(tell(ledger, run, "other", 4_500, f"n{n}") for n in range(noise)))

    requeued = await runs.reclaim_expired(now_ms=5_100)
    assert [run.run_id for run in requeued] == ([] if is_heard else ["run-a"])


async def test_what_was_heard_before_an_earlier_claim(
    runs: Runs, ledger: Ledger, make: Make
) -> None:
    """Each claim looks back no further than to its own beginning."""
    await put(runs, make())
    run = await claim(runs)
    await tell(ledger, run, LIFECYCLE + "node_completed", 200)
    await runs.retry_later("run-a", epoch=1, retry_after_ms=300, now_ms=250)
    await claim(runs, 300)

    assert len(await runs.reclaim_expired(now_ms=5_300)) == 1


@pytest.mark.parametrize(
    "change", [{"metadata": {"active_session_ids": ["s"]}}, {"related_context_run_ids": ["c"]}]
)
async def test_run_in_session_stays(runs: Runs, make: Make, change: dict[str, Any]) -> None:
    await put(runs, make())
    run = await claim(runs)
    kept = await runs.upsert(msgspec.structs.replace(run, **change), now_ms=200)

    assert kept.execution_claim == run.execution_claim
    assert await runs.reclaim_expired(now_ms=99_999) == []
    none = {"metadata": {"active_session_ids": []}, "related_context_run_ids": []}
    await runs.upsert(msgspec.structs.replace(kept, **none), now_ms=200)
    assert len(await runs.reclaim_expired(now_ms=99_999)) == 1


async def test_runs_that_stay_do_not_hide_the_others(
    runs: Runs, ledger: Ledger, make: Make
) -> None:
    """More than a page of runs that go on working after their lease's end."""
    many = [make(f"r{n:03}", created_at_ms=n) for n in range(110)]
    await asyncio.gather(*(runs.upsert(run, now_ms=20) for run in many))
    for n in range(110):
        run = await claim(runs, 100 + n, f"r{n:03}")
        if n < 105:
            await tell(ledger, run, LIFECYCLE + "node_completed", 1_000)

    assert len(await runs.reclaim_expired(limit=2, now_ms=9_999)) == 2
    rest = await runs.reclaim_expired(now_ms=9_999)
    assert [run.run_id for run in rest] == ["r107", "r108", "r109"]


async def test_reclaim_by_many_at_once(
    connected: Connect, tenant: Tenant, runs: Runs, ledger: Ledger, make: Make
) -> None:
    """One queues it, one takes it: one epoch more, one event of each."""
    await put(runs, make())
    await claim(runs)
    other = (await connected()).tenant(tenant.context.org_id, "w").ledger.runs

    won = await asyncio.gather(
        *(side.claim_next(claimant="v", now_ms=5_100) for side in (runs, other) * 5)
    )
    assert [run.execution_claim_epoch for run in won if run is not None] == [2]
    assert len(await log(ledger)) == 3


# --- epochs ---------------------------------------------------------------------------------------


async def test_retry_later_is_fenced_by_the_epoch(runs: Runs, make: Make) -> None:
    """A worker that was overtaken queues nothing; the right one pauses its run."""
    await put(runs, make())
    await claim(runs)
    await runs.claim_next(claimant="v", now_ms=5_100)

    for epoch in (0, 1, 3):
        late = await runs.retry_later("run-a", epoch=epoch, retry_after_ms=9_000, now_ms=5_200)
        assert late is None
    queued = await runs.retry_later("run-a", epoch=2, retry_after_ms=9_000, now_ms=5_200)
    assert queued is not None
    assert (queued.status, queued.execution_claim, queued.execution_claim_epoch) == (
        *("queued", None, 2),
    )
    assert queued.metadata["scheduler"] == {
        "queue_reason": "retry_backoff",
        "retry_after_ms": 9_000,
    }
    again = await runs.retry_later("run-a", epoch=2, retry_after_ms=9_000, now_ms=5_201)
    assert again is None
    assert await runs.claim("run-a", claimant="u", now_ms=8_999) is None
    assert await runs.claim_next(claimant="u", now_ms=8_999) is None
    assert (await claim(runs, 9_000)).execution_claim_epoch == 3


async def test_epoch_is_never_lowered(runs: Runs, make: Make) -> None:
    """Neither by a pause, nor by a requeue, nor by an older copy that is written."""
    await put(runs, make())
    old = await claim(runs)
    await runs.set_status("run-a", "paused", now_ms=200)
    paused = await runs.get("run-a", now_ms=200)
    assert paused is not None
    assert (paused.execution_claim, paused.execution_claim_epoch) == (None, 1)
    await runs.requeue("run-a", "again", now_ms=300)
    new = await claim(runs, 400)
    assert new.execution_claim_epoch == 2

    kept = await runs.upsert(old, now_ms=500)
    assert (kept.execution_claim_epoch, kept.execution_claim) == (2, new.execution_claim)
    kept = await runs.upsert(make(status="paused"), now_ms=500)
    assert (kept.execution_claim_epoch, kept.execution_claim) == (2, None)
    kept = await runs.upsert(old, now_ms=500)
    assert (kept.status, kept.execution_claim_epoch, kept.execution_claim) == ("running", 2, None)


async def test_newer_claim_is_taken_over(runs: Runs, make: Make) -> None:
    """A run that comes from elsewhere brings its claim and epoch along."""
    held = ExecutionClaim(
        claim_id="c", claimant_id="w", claimed_at_ms=1, lease_expires_at_ms=90, lease_epoch=7
    )
    run = make(status="running", execution_claim=held, execution_claim_epoch=7)
    await put(runs, make(), run)

    [requeued] = await runs.reclaim_expired(now_ms=90)
    assert (requeued.execution_claim_epoch, requeued.execution_claim) == (7, None)


@pytest.mark.parametrize("status", list(phases.PHASE_OF))
async def test_requeue(runs: Runs, make: Make, status: str) -> None:
    """What waits, pauses or failed is queued; what is over, or in line, stays."""
    before = make(status=status, metadata={"pause_reason": "p"})
    await put(runs, before)
    queued = await runs.requeue("run-a", "so", now_ms=50)

    if status in ("completed", "cancelled", "dry_run", "queued", "running"):
        assert queued is None
        assert await runs.get("run-a", now_ms=50) == before
    else:
        assert queued is not None
        assert (queued.status, queued.metadata) == ("queued", {"resume_reason": "so"})


async def test_requeue_of_what_was_seen(runs: Runs, make: Make) -> None:
    """Only a run that has not changed since."""
    seen = make(status="paused")
    await put(runs, seen, make(status="paused", updated_at_ms=21))

    assert await runs.requeue("run-a", "so", seen=seen, now_ms=50) is None
    assert await runs.requeue("run-b", "so", now_ms=50) is None
    now = await runs.get("run-a", now_ms=50)
    assert await runs.requeue("run-a", "so", seen=now, now_ms=50) is not None
