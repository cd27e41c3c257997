"""Waking what is due: one tick of the scheduler of waits.

A tick claims each due wait, notes the event, writes a snapshot, completes the wait and moves the run. It
may die between any two of these: every step is known by the wait's completion key, and the next tick goes
on with it.

**A clock that goes back** must neither hold up waits that were due already nor end leases early: the
highest instant that was seen stands in for now for the waits that were there then, and leases always go by
the real one.

Source: spec/reliability 5.4-5.6.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import msgspec

from leasekit import codec
from leasekit.errors import Conflict, LeasekitError
from leasekit.ledger import phases, waiting
from leasekit.ledger.records import DeadLetter, Run, RunEvent, RunSnapshot, Wait

if TYPE_CHECKING:
    from leasekit.ledger.ledger import Ledger

__all__ = ["Outcome", "Scheduler", "TickResult", "action_of"]

CLAIMANT: Final = f"leasekit:stateful-wait-scheduler:{os.getpid()}"
LEASE_MS = 60_000
TICK_WAITS = 100
EVENT_PREFIX = "stateful_runtime.wait."


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
    """What one tick did; waits, and milliseconds between the instant they were due and their events."""

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
        """Do what is due. One wait that fails does not keep the others from being woken."""
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        ledger, result = self._ledger, TickResult()
        now = await ledger.now_ms(now_ms)
        waits = [
            wait
            for wait in await ledger.waits.list(now_ms=now_ms)
            if wait.status not in waiting.TERMINAL
        ]
        if now < self._highest_ms:
            result.clock_regressions = 1
            result.max_clock_regression_ms = self._highest_ms - now
        else:
            self._highest_ms = now
            self._seen = frozenset(_identity(wait) for wait in waits)
        due = [
            (wait, at)
            for wait in waits
            if waiting.is_due(wait, at := self._now_for(wait, now))
            and not waiting.is_claim_active(wait, now)
        ]
        for wait, at in due[:limit]:
            result.checked += 1
            try:
                await self._do(wait, at, result, now_ms)
            except LeasekitError as error:
                result.failed += 1
                result.errors.append(f"{wait.run_id}/{wait.wait_id}: {error}")
        return result

    def _now_for(self, wait: Wait, now: int) -> int:
        """The instant by which a wait is judged: the highest seen, where it was there at that time."""
        return self._highest_ms if _identity(wait) in self._seen else now

    async def _do(self, wait: Wait, at: int, result: TickResult, now_ms: int | None) -> None:
        ledger = self._ledger
        told = action_of(wait, at)
        if told is None:
            return
        action, due_ms = told
        if (why := await self._denied(wait, action, now_ms)) is not None:
            await ledger.waits.cancel_by_guard(wait, why, now_ms=now_ms)
            result.failed += 1
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
        if begun is None:
            return
        if (why := await self._denied(begun, action, now_ms)) is not None:
            await ledger.waits.cancel_by_guard(begun, why, now_ms=now_ms)
            result.failed += 1
            return
        event = await self._note(begun, action, key, due_ms, now_ms)
        if not await self._finish(begun, action, key, event, now_ms):
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
        await self._move_run(wait.run_id, action, now_ms)

    async def _denied(self, wait: Wait, action: Action, now_ms: int | None) -> str | None:
        """Why the phase of the run does not allow what the wait would do; None where it does."""
        newest = await self._ledger.snapshots.list(wait.run_id, limit=1, now_ms=now_ms)
        if not newest:
            return None
        before = newest[-1].phase
        try:
            phases.derived(
                wait.run_id,
                action.run_status,
                newest[-1].created_at_ms,
                before=before,
                history=newest[-1].phase_history,
            )
        except Conflict as refused:
            return str(refused).partition(":")[0]
        return None

    async def _note(
        self, wait: Wait, action: Action, key: str, due_ms: int, now_ms: int | None
    ) -> RunEvent:
        """The event of a completion and the snapshot at it, each once."""
        ledger, now = self._ledger, await self._ledger.now_ms(now_ms)
        event = RunEvent(
            event_id=f"stateful-wait-{key}",
            run_id=wait.run_id,
            event_type=EVENT_PREFIX + action.event,
            occurred_at_ms=now,
            scope=wait.scope,
            phase_id=wait.phase_id,
            wait_kind=wait.wait_kind,
            causation_id=wait.wait_id,
            payload={"wait_id": wait.wait_id, "due_at_ms": due_ms, "completion_key": key},
        )
        appended = await ledger.events.append(event, now_ms=now_ms)
        event = msgspec.structs.replace(event, seq=appended.seq)
        known = await ledger.snapshots.get(wait.run_id, event.event_id, now_ms=now_ms)
        if known is None:
            newest = await ledger.snapshots.list(wait.run_id, limit=1, now_ms=now_ms)
            before = newest[-1] if newest else None
            phase, history, allowed = phases.derived(
                wait.run_id,
                action.run_status,
                now,
                before=before.phase if before else None,
                history=before.phase_history if before else [],
                phase_id=wait.phase_id,
            )
            snapshot = RunSnapshot(
                snapshot_id=event.event_id,
                run_id=wait.run_id,
                seq=event.seq,
                created_at_ms=now,
                scope=wait.scope,
                status=action.run_status,
                phase=phase,
                phase_history=history,
                allowed_next_phases=allowed,
                phase_id=wait.phase_id,
                source_record_kind="stateful_wait",
            )
            await ledger.snapshots.put(snapshot, now_ms=now_ms)
        return event

    async def _finish(
        self, wait: Wait, action: Action, key: str, event: RunEvent, now_ms: int | None
    ) -> bool:
        ledger = self._ledger
        if action.wait_status is None:
            policy = wait.timeout_policy
            every = 1 if policy is None else max(policy.remind_every_ms or 0, 1)
            finished = await ledger.waits.finish_reminder(
                wait,
                key,
                seq=event.seq,
                next_at_ms=event.occurred_at_ms + every,
                now_ms=now_ms,
            )
        else:
            finished = await ledger.waits.finish_completion(
                wait, key, seq=event.seq, status=action.wait_status, now_ms=now_ms
            )
        if finished is not None and action.reason is not None:
            await ledger.dead_letters.upsert(
                _dead_letter(wait, action.reason, event), now_ms=now_ms
            )
        return finished is not None

    async def _move_run(self, run_id: str, action: Action, now_ms: int | None) -> None:
        """Bring the run where its wait has led it; a run that is not kept here is its owner's to move."""
        run = await self._ledger.runs.get(run_id, now_ms=now_ms)
        if run is None or _stays(run, action.run_status):
            return
        try:
            if action.run_status == "running":
                await self._ledger.runs.requeue(run_id, "stateful_wait_woken", now_ms=now_ms)
            else:
                await self._ledger.runs.set_status(run_id, action.run_status, now_ms=now_ms)
        except Conflict:
            return  # Its phase has moved on meanwhile: what the wait wanted is past.


def _stays(run: Run, status: str) -> bool:
    if run.status in ("completed", "failed", "cancelled", "dead_lettered", "dry_run"):
        return True
    if status == "running":
        return run.status in ("queued", "running")
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
