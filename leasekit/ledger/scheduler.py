"""Waking what is due: one tick of the scheduler of waits.

A tick claims each due wait, says under which key it is about to complete it, and adds the event to the
run's log; then the snapshot, the wait's end, the dead letter and the run's new status land whole or not at
all. It may die between any two of these: the event is known by the completion key, and the tick after the
claim's end goes on with it.

**A clock that goes back** must neither hold up waits that were due already nor end leases early: the
highest instant that was seen stands in for now for the waits that were there then, and leases always go by
the real one.

**Bounded.** A tick reads the waits that are due, 1 000 at a time, until it has as many as it may wake that
nobody works on; what it has read is all that it remembers. So after a clock went back, what was due beyond
that is judged by the real clock.

Source: spec/reliability 5.4-5.6.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from leasekit import codec
from leasekit.errors import Conflict, LeasekitError
from leasekit.ledger import phases, waiting
from leasekit.ledger.filing import DEAD_LETTERS, RUNS, SNAPSHOTS
from leasekit.ledger.records import DeadLetter, Run, RunEvent, RunSnapshot, Wait
from leasekit.ledger.store import Transaction
from leasekit.ledger.waits import in_order, read, write_wait

if TYPE_CHECKING:
    from leasekit.ledger.ledger import Ledger

__all__ = ["Action", "Outcome", "Scheduler", "TickResult", "action_of", "key_of"]

CLAIMANT: Final = f"leasekit:stateful-wait-scheduler:{os.getpid()}"
LEASE_MS = 60_000
TICK_WAITS = 100
EVENT_PREFIX = "stateful_runtime.wait."
WOKEN = "stateful_wait_woken"
RECOVERED = "stateful_wait_wake_recovered_on_restart"
OVER = frozenset({"completed", "failed", "cancelled", "dead_lettered", "dry_run"})


class Action(msgspec.Struct, frozen=True):
    """What is to be done about a due wait (spec 5.5).

    name: as the completion key spells it. event: how the event's type ends. wait_status: None = it
    waits on. run_status: what becomes of the run. reason: how the dead letter's reason begins; None =
    there is none.
    """

    name: str
    event: str
    wait_status: str | None
    run_status: str
    reason: str | None = None


WAKE = Action("", "timer_woken", "woken", "running")
ON_TIMEOUT = {
    "cancel": Action(
        *("Cancel", "timeout_cancelled", "cancelled", "cancelled"),
        "stateful wait timeout cancelled the run",
    ),
    "escalate": Action(
        *("Escalate", "timeout_escalated", "escalated", "paused"),
        "stateful wait timeout escalated for operator review",
    ),
    "remind": Action(
        *("Remind", "timeout_reminded", "timed_out", "paused"),
        "stateful wait timeout reminder requires operator review",
    ),
    "resume": Action("Resume", "timeout_resumed", "woken", "running"),
}
REMINDER = Action("Remind", "timeout_reminded", None, "paused")


def action_of(wait: Wait, at_ms: int) -> tuple[Action, int] | None:
    """What is to be done at an instant, and since when it is due; None while nothing is. Where both are
    due, the timeout counts unless waking was due before it."""
    policy = wait.timeout_policy
    wake_at_ms = wait.wake_at_ms
    if wake_at_ms is not None and wake_at_ms > at_ms:
        wake_at_ms = None
    if policy is None or policy.timeout_at_ms > at_ms:
        return None if wake_at_ms is None else (WAKE, wake_at_ms)
    if wake_at_ms is not None and wake_at_ms < policy.timeout_at_ms:
        return WAKE, wake_at_ms
    if policy.on_timeout == "remind" and (policy.remind_every_ms or 0) > 0:
        return REMINDER, policy.timeout_at_ms
    return ON_TIMEOUT[policy.on_timeout], policy.timeout_at_ms


def key_of(wait: Wait, action: Action, due_ms: int) -> str:
    """What the completion of a wait is known by."""
    if action is WAKE:
        return f"timer:{wait.run_id}:{wait.wait_id}:{due_ms}"
    return f"timeout:{action.name}:{wait.run_id}:{wait.wait_id}:{due_ms}"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one wait. run_status: what its run is to become."""

    run_id: str
    wait_id: str
    event: str
    event_seq: int
    run_status: str


class TickResult(msgspec.Struct, kw_only=True):
    """What one tick did.

    checked, claimed, completed, failed: waits. clock_regressions: 1 where the clock had gone back, by
    max_clock_regression_ms. max_lag_ms: at most so long passed between the instant at which a wait was
    due and its event. errors: why waits failed, a run's phase that did not allow what they would do
    included.
    """

    checked: int = 0
    claimed: int = 0
    completed: int = 0
    failed: int = 0
    clock_regressions: int = 0
    max_clock_regression_ms: int = 0
    max_lag_ms: int = 0
    outcomes: list[Outcome] = []
    errors: list[str] = []


_Identity = tuple[str, str, int, int]


def _identity(wait: Wait) -> _Identity:
    return wait.run_id, wait.wait_id, wait.created_at_ms, wait.updated_at_ms


class Scheduler:
    """Wakes the waits of one tenant, one `tick` after the other; several may run side by side."""

    def __init__(
        self, ledger: Ledger, *, claimant: str = CLAIMANT, lease_ms: int = LEASE_MS
    ) -> None:
        self._ledger = ledger
        self._claimant = codec.check_text(claimant, "claimant")
        self._lease_ms = codec.check_whole(lease_ms, "lease_ms", 1, codec.LEASE_MS_MAX)
        self._highest_ms = 0
        self._seen: frozenset[_Identity] = frozenset()

    async def tick(self, *, limit: int = TICK_WAITS, now_ms: int | None = None) -> TickResult:
        """Do what is due, at most `limit` (1..1 000) waits. One that fails does not keep the others from
        being woken; one that somebody else takes meanwhile is passed over."""
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        ledger, result = self._ledger, TickResult()
        now = await ledger.now_ms(now_ms)
        is_back = now < self._highest_ms
        if is_back:
            result.clock_regressions = 1
            result.max_clock_regression_ms = self._highest_ms - now
        read: set[_Identity] = set()
        due: dict[_Identity, tuple[Wait, int]] = {}
        async for page in ledger.waits.due_pages(max(now, self._highest_ms), now_ms=now_ms):
            for wait in page:
                read.add(identity := _identity(wait))
                at = self._now_for(identity, now) if is_back else now
                if waiting.is_due(wait, at) and not waiting.is_claim_active(wait, now):
                    due[identity] = wait, at
            if len(due) >= limit:
                break
        if not is_back:
            self._highest_ms, self._seen = now, frozenset(read)
        for wait in in_order([wait for wait, _ in due.values()])[:limit]:
            _, at = due[_identity(wait)]
            result.checked += 1
            try:
                await self._do(wait, at, result, now_ms)
            except LeasekitError as error:
                result.failed += 1
                result.errors.append(f"{wait.run_id}/{wait.wait_id}: {error}")
        return result

    async def recover_lost_wakes(self, *, now_ms: int | None = None) -> Sequence[Run]:
        """Queue again the paused runs whose wait was woken after they had paused, though nobody moved
        them (spec 5.6); to be called once when a process starts. Gives those runs. Walks all runs, and
        the waits of those that are paused."""
        ledger = self._ledger
        recovered: list[Run] = []
        for run in await ledger.runs.with_status("paused", now_ms=now_ms):
            waits = await ledger.waits.list(run_id=run.run_id, now_ms=now_ms)
            is_open = any(wait.status not in waiting.TERMINAL for wait in waits)
            is_woken = any(
                wait.status == "woken"
                and wait.event_seq is not None
                and wait.updated_at_ms >= run.updated_at_ms
                for wait in waits
            )
            if is_open or not is_woken:
                continue
            queued = await ledger.runs.requeue(run.run_id, RECOVERED, seen=run, now_ms=now_ms)
            if queued is not None:
                recovered.append(queued)
        return recovered

    def _now_for(self, identity: _Identity, now: int) -> int:
        """The instant by which a wait is judged: the highest seen, where it was there at that time."""
        return self._highest_ms if identity in self._seen else now

    async def _do(self, wait: Wait, at: int, result: TickResult, now_ms: int | None) -> None:
        ledger = self._ledger
        told = action_of(wait, at)
        assert told is not None, "the wait is due"
        action, due_ms = told
        if await self._is_denied(wait, action, result, now_ms):
            return
        claimed = await ledger.waits.claim_due(
            wait.run_id,
            wait.wait_id,
            claimant=self._claimant,
            lease_ms=self._lease_ms,
            seen=wait,
            due_at_ms=at,
            now_ms=now_ms,
        )
        if claimed is None:
            return  # Somebody else was faster.
        result.claimed += 1
        key = key_of(wait, action, due_ms)
        is_timeout = action.wait_status in waiting.TIMED_OUT
        begun = await ledger.waits.begin_completion(
            claimed,
            key,
            timeout_status=action.wait_status if is_timeout else None,
            now_ms=now_ms,
        )
        if begun is None or await self._is_denied(begun, action, result, now_ms):
            return
        event = await ledger.events.append_and_read(
            _event(begun, action, key, due_ms, await ledger.now_ms(now_ms)), now_ms=now_ms
        )
        if not await self._land(begun, action, key, event, now_ms):
            return
        result.completed += 1
        result.max_lag_ms = max(result.max_lag_ms, event.occurred_at_ms - due_ms)
        result.outcomes.append(
            Outcome(
                run_id=wait.run_id,
                wait_id=wait.wait_id,
                event=event.event_type,
                event_seq=event.seq,
                run_status=action.run_status,
            )
        )

    async def _is_denied(
        self, wait: Wait, action: Action, result: TickResult, now_ms: int | None
    ) -> bool:
        """Whether the phase of the run does not allow what the wait would do; then it is cancelled."""
        newest = await self._newest(wait.run_id, now_ms)
        after = phases.PHASE_OF[action.run_status]
        if newest is None or newest.phase == after:
            return False
        why = phases.refusal(newest.phase, after)
        if why is None:
            return False
        if await self._ledger.waits.cancel_by_guard(wait, why, now_ms=now_ms) is not None:
            result.failed += 1
            result.errors.append(f"{wait.run_id}/{wait.wait_id}: {why}; the wait was cancelled")
        return True

    async def _newest(self, run_id: str, now_ms: int | None) -> RunSnapshot | None:
        newest = await self._ledger.snapshots.list(run_id, limit=1, now_ms=now_ms)
        return newest[0] if newest else None

    async def _land(
        self, begun: Wait, action: Action, key: str, event: RunEvent, now_ms: int | None
    ) -> bool:
        """What follows from the event, whole or not at all; False where another one completed the wait."""

        async def land(transaction: Transaction) -> bool:
            wait = await read(transaction, begun.run_id, begun.wait_id)
            ended = None if wait is None else _ended(wait, begun, action, key, event, transaction)
            if ended is None or ended is wait:
                return False
            write_wait(transaction, ended)
            await self._put_snapshot(transaction, begun, action, event)
            if action.reason is not None:
                letter = _dead_letter(begun, action.reason, event)
                name = DEAD_LETTERS.name_for(letter)
                await transaction.get(name)
                transaction.put(name, DEAD_LETTERS.listed(letter), DEAD_LETTERS.encode(letter))
            await _move_run(transaction, begun.run_id, action)
            return True

        return await self._ledger.waits.transact(land, now_ms=now_ms)

    async def _put_snapshot(
        self, transaction: Transaction, wait: Wait, action: Action, event: RunEvent
    ) -> None:
        """The run as it is after the event, once."""
        name = SNAPSHOTS.name_of(wait.run_id, event.event_id)
        if await transaction.get(name) is not None:
            return
        before = await self._newest(wait.run_id, transaction.given_ms)
        phase, history, allowed = phases.derived(
            wait.run_id,
            action.run_status,
            event.occurred_at_ms,
            before=before.phase if before else None,
            history=before.phase_history if before else [],
            phase_id=wait.phase_id,
        )
        snapshot = RunSnapshot(
            snapshot_id=event.event_id,
            run_id=wait.run_id,
            seq=event.seq,
            created_at_ms=event.occurred_at_ms,
            scope=wait.scope,
            status=action.run_status,
            phase=phase,
            phase_history=history,
            allowed_next_phases=allowed,
            phase_id=wait.phase_id,
            source_record_kind="stateful_wait",
        )
        transaction.put(name, SNAPSHOTS.listed(snapshot), SNAPSHOTS.encode(snapshot))


def _event(wait: Wait, action: Action, key: str, due_ms: int, at_ms: int) -> RunEvent:
    return RunEvent(
        event_id=f"stateful-wait-{key}",
        run_id=wait.run_id,
        event_type=EVENT_PREFIX + action.event,
        occurred_at_ms=at_ms,
        scope=wait.scope,
        phase_id=wait.phase_id,
        wait_kind=wait.wait_kind,
        causation_id=wait.wait_id,
        payload={"wait_id": wait.wait_id, "due_at_ms": due_ms, "completion_key": key},
    )


def _ended(
    wait: Wait, begun: Wait, action: Action, key: str, event: RunEvent, transaction: Transaction
) -> Wait | None:
    """The wait after its event: completed, or reminded and waiting on."""
    now = transaction.now_ms
    if action.wait_status is not None:
        return waiting.finish_completion(wait, begun, key, event.seq, action.wait_status, now)
    every = max((wait.timeout_policy.remind_every_ms or 0) if wait.timeout_policy else 0, 1)
    return waiting.finish_reminder(wait, begun, key, event.seq, event.occurred_at_ms + every, now)


async def _move_run(transaction: Transaction, run_id: str, action: Action) -> None:
    """Bring the run where its wait has led it; a run that is not kept here is its owner's to move."""
    name, now = RUNS.name_of(run_id), transaction.now_ms
    doc = await transaction.get(name)
    run = None if doc is None else RUNS.decode(doc)
    if run is None or _stays(run, action.run_status):
        return
    try:
        moved = (
            phases.requeued(run, now, {"resume_reason": WOKEN})
            if action.run_status == "running"
            else phases.with_status(run, action.run_status, now)
        )
    except Conflict:
        return  # Its phase has moved on meanwhile: what the wait wanted is past.
    transaction.put(name, RUNS.listed(moved), RUNS.encode(moved))


def _stays(run: Run, status: str) -> bool:
    """Whether a run is left as it is by a wait that would bring it into a status."""
    if run.status in OVER or run.status == status:
        return True
    if status == "running":
        return run.status == "queued"
    return status == "paused" and run.status == "awaiting_approval"


def _dead_letter(wait: Wait, prefix: str, event: RunEvent) -> DeadLetter:
    """What an operator gets of a wait that was given up (spec 5.5)."""
    digest = codec.hash_terminated(["stateful_wait", wait.run_id, wait.wait_id])
    because = f"{prefix}: {wait.reason}" if (wait.reason or "").strip() else prefix
    more: dict[str, Any] = {"event_id": event.event_id, "event_seq": event.seq}
    return DeadLetter(
        dead_letter_id=f"dead-letter-wait-{digest[:16]}",
        source_type="stateful_wait",
        source_id=wait.wait_id,
        run_id=wait.run_id,
        scope=wait.scope,
        reason=because,
        status="open",
        recovery_options=["ignore", "compensate"],
        payload_pointer=f"stateful-wait://{wait.run_id}/{wait.wait_id}",
        attempts=1,
        created_at_ms=event.occurred_at_ms,
        updated_at_ms=event.occurred_at_ms,
        metadata=more,
    )
