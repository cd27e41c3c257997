"""What the coroutines of a process do, and how they insist on an answer.

A claim loop works on what is *warm*: lines in which this process has just put something, or has just
found more than it took. So nobody polls empty lines, except for a slow sweep over all of them, which
finds what others left behind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any, TypeVar

from leasekit.codec import new_id, new_token
from leasekit.errors import (
    Conflict,
    InvalidInput,
    LeasekitError,
    OutcomeUnknown,
    Overloaded,
    Unavailable,
)
from leasekit.load.notes import Book
from leasekit.load.plan import Plan, share_of
from leasekit.model import AcquireOutcome, CompleteOutcome, NackOutcome, ReserveOutcome
from leasekit.outbox import Claim, ClaimedRows

__all__ = ["TARGET", "Traffic", "clock_s", "lane_name"]

TARGET = "load"
OPERATION = "load"
CLAIM_ROWS = 100
CLAIMERS_MOST = 16
SWEEP_EVERY_S = 0.1
SWEEP_LINES, SWEEP_LINES_AT_END = 50, 1_000
INSIST_S = 60.0
PAUSE_FIRST_S, PAUSE_MOST_S = 0.01, 0.5
TICK_S = 0.001  # the finest that the event loop's timers know
LEASE_NAMES = 1_000
LATE_COMERS_MOST = 1_000_000
OUTCOME_KEEP_MS = 60_000

# What became of a call that never got its answer.
UNSETTLED = "unsettled"
NOT_APPLIED = "not_applied"

T = TypeVar("T")
clock_s = time.perf_counter


def lane_name(number: int) -> str:
    return f"lane-{number}"


class Traffic:
    """The work of process `number`. `tenants`: those of a client, in order; or stand-ins."""

    def __init__(
        self, plan: Plan, number: int, tenants: Sequence[Any], payloads: Sequence[Any], book: Book
    ) -> None:
        self._plan = plan
        self._tenants = tenants
        self._payloads = payloads
        self._book = book
        self._number = number
        self._consumer = f"load-{number}"
        self._chance = Random(f"{plan.seed} {number}")
        self._coroutines = share_of(plan.coroutines, number, plan.processes)
        self._left = None if plan.count is None else share_of(plan.count, number, plan.processes)
        self._lanes = [lane_name(number) for number in range(plan.lanes)]
        self._sent = 0
        self._set_mix(plan.mix)
        self._enqueue_s = book.seconds["enqueue"]
        self._claim_s = book.seconds["claim"]
        self._ack_s = book.seconds["ack"]
        self._warm: dict[int, None] = {}
        self._is_warm = asyncio.Event()
        self._under_way = 0
        self._has_room = asyncio.Event()
        self._has_ended_producing = False
        self._held_names: dict[tuple[int, str], int] = {}
        self.arrivals_not_begun = 0

    def _set_mix(self, mix: dict[str, float]) -> None:
        """Thresholds between 0 and 1: of the kinds of arrivals, and of what becomes of a claim."""
        rows = sum(mix.get(kind, 0) for kind in ("lifecycle", "nack", "extend"))
        total = rows + mix.get("lease", 0) + mix.get("idempotency", 0)
        self._rows_below = rows / total
        self._lease_below = (rows + mix.get("lease", 0)) / total
        self._nack_below = mix.get("nack", 0) / rows if rows else 0.0
        self._extend_below = self._nack_below + (mix.get("extend", 0) / rows if rows else 0.0)

    # --- phases -----------------------------------------------------------------------------------

    async def produce(self, end_s: float) -> None:
        """Enqueue and all the rest, until the end or until the count is reached."""
        if self._plan.rate is None:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._coroutines):
                    group.create_task(self._go_round(end_s))
        else:
            async with asyncio.TaskGroup() as group:
                await self._arrive(group, self._plan.rate / self._plan.processes, end_s)
        self._has_ended_producing = True

    async def consume(self) -> None:
        """Claim what is in line, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sweep())
            for _ in range(min(self._coroutines, CLAIMERS_MOST)):
                group.create_task(self._keep_claiming())

    async def _go_round(self, end_s: float) -> None:
        """Closed loop: one thing after the other."""
        while self._left != 0 and clock_s() < end_s:
            if self._left is not None:
                self._left -= 1
            await self._do_one(clock_s())

    async def _arrive(self, group: asyncio.TaskGroup, rate: float, end_s: float) -> None:
        """Open loop: begin what arrives when it arrives, or as soon as there is room for it."""
        late_s = self._book.seconds["begun_late"]
        arrives_s = clock_s() + self._chance.expovariate(rate)
        while self._left != 0 and arrives_s < end_s:
            now_s = clock_s()
            if now_s >= end_s:
                break
            if arrives_s > now_s:
                await asyncio.sleep(max(arrives_s - now_s, TICK_S))
                continue
            if self._under_way >= self._coroutines:
                self._has_room.clear()
                await self._has_room.wait()
                continue
            if self._left is not None:
                self._left -= 1
            late_s.append(now_s - arrives_s)
            self._under_way += 1
            group.create_task(self._do_arrived(arrives_s))
            arrives_s += self._chance.expovariate(rate)
        if self._left is None:
            self._count_late_comers(arrives_s, rate, end_s)

    def _count_late_comers(self, arrives_s: float, rate: float, end_s: float) -> None:
        """What arrived and could not begin by the end counts with the time that it has waited."""
        late_s = self._book.seconds["begun_late"]
        while arrives_s < end_s and self.arrivals_not_begun < LATE_COMERS_MOST:
            self.arrivals_not_begun += 1
            late_s.append(end_s - arrives_s)
            arrives_s += self._chance.expovariate(rate)

    async def _do_arrived(self, arrives_s: float) -> None:
        try:
            await self._do_one(arrives_s)
        finally:
            self._under_way -= 1
            self._has_room.set()

    async def _do_one(self, began_s: float) -> None:
        kind = self._chance.random() if self._rows_below < 1 else 0.0
        line = int(self._chance.random() * self._plan.routes) if self._plan.routes > 1 else 0
        if kind < self._rows_below:
            is_done = await self.lifecycle(line, began_s)
        elif kind < self._lease_below:
            is_done = await self._hold_name(line // self._plan.lanes, began_s)
        else:
            is_done = await self._use_key(line // self._plan.lanes, began_s)
        self._book.operations += is_done

    # --- rows -------------------------------------------------------------------------------------

    async def lifecycle(self, line: int, began_s: float) -> bool:
        """Enqueue a row; in a closed loop claim one from the same line, and end it."""
        outbox, lane = self._tenants[line // self._plan.lanes].outbox, self._lane(line)
        id = new_id()
        payload = self._payloads[self._sent % len(self._payloads)]
        self._sent += 1
        is_open_loop = self._plan.rate is not None
        if is_open_loop:
            self._book.expect(id, began_s)
        try:
            await outbox.enqueue(lane, TARGET, payload, id=id, max_attempts=None)
        except LeasekitError as error:

            def again(repeat: bool) -> Awaitable[object]:
                enqueued: Awaitable[object] = outbox.enqueue(
                    lane, TARGET, payload, id=id, max_attempts=None, repeat=repeat
                )
                return enqueued

            answer = await self._insist(error, again)
            if answer in (UNSETTLED, NOT_APPLIED):
                self._book.unsettled_enqueues += answer == UNSETTLED
                self._book.arrived_s.pop(id, None)
                return False
        self._enqueue_s.append(clock_s() - began_s)
        self._book.note_enqueued(id)
        if is_open_loop:
            self._heat(line)
            return True
        for claim in await self._claim(line, 1):
            if await self._end(claim):
                for second in await self._claim(line, 1):
                    await self._end(second)
        self._book.seconds["lifecycle"].append(clock_s() - began_s)
        return True

    def _lane(self, line: int) -> str:
        return self._lanes[line % self._plan.lanes]

    async def _claim(self, line: int, limit: int) -> Sequence[Claim]:
        outbox, lane = self._tenants[line // self._plan.lanes].outbox, self._lane(line)
        claim_id = new_token()
        began_s = clock_s()
        try:
            claims: ClaimedRows = await outbox.claim(
                lane,
                TARGET,
                limit=limit,
                lease_ms=self._plan.lease_ms,
                consumer=self._consumer,
                claim_id=claim_id,
            )
        except LeasekitError as error:

            def again(repeat: bool) -> Awaitable[ClaimedRows]:
                claimed: Awaitable[ClaimedRows] = outbox.claim(
                    lane,
                    TARGET,
                    limit=limit,
                    lease_ms=self._plan.lease_ms,
                    consumer=self._consumer,
                    claim_id=claim_id,
                    repeat=repeat,
                )
                return claimed

            answer = await self._insist(error, again)
            if isinstance(answer, str):
                return ()  # What was claimed all the same comes back when its lease ends.
            claims = answer
        self._claim_s.append(clock_s() - began_s)
        self._book.empty_claims += not claims
        if self._plan.rate is not None:
            for claim in claims:
                arrived_s = self._book.arrived_s.pop(claim.row.id, None)
                if arrived_s is not None:
                    self._book.seconds["arrival_to_claim"].append(clock_s() - arrived_s)
        return claims

    async def _end(self, claim: Claim) -> bool:
        """Nack a claim, or extend it, or do nothing, as the mix says; else ack. True: it waits again."""
        book = self._book
        book.open(claim)
        chance = self._chance.random() if self._extend_below else 1.0
        if chance < self._nack_below and claim.row.claim_count == 1:
            book.give_back(claim)
            outcome = await self._timed(
                "nack", lambda repeat: claim.nack(error="load test", repeat=repeat)
            )
            book.close(claim, outcome, was_given_back=True)
            return outcome is NackOutcome.REQUEUED
        if self._nack_below <= chance < self._extend_below:
            lease_ms = self._plan.lease_ms
            extended = await self._timed(
                "extend", lambda repeat: claim.extend(lease_ms=lease_ms, repeat=repeat)
            )
            book.outcomes[f"extend {extended}"] += 1
        began_s = clock_s()
        outcome = ""
        try:
            outcome = await claim.ack()
        except LeasekitError as error:
            outcome = await self._insist(error, lambda repeat: claim.ack(repeat=repeat))
        self._ack_s.append(clock_s() - began_s)
        book.close(claim, outcome)
        return False

    def _heat(self, line: int) -> None:
        self._warm[line] = None
        self._is_warm.set()

    async def _keep_claiming(self) -> None:
        while True:
            while not self._warm:
                self._is_warm.clear()
                await self._is_warm.wait()
            line, _ = self._warm.popitem()
            claims = await self._claim(line, CLAIM_ROWS)
            if len(claims) == CLAIM_ROWS:
                self._heat(line)
            if any(await asyncio.gather(*[self._end(claim) for claim in claims])):
                self._heat(line)

    async def _sweep(self) -> None:
        """Look into all lines in turn, some at a time."""
        lines, at = self._plan.routes, 0
        while True:
            some = SWEEP_LINES_AT_END if self._has_ended_producing else SWEEP_LINES
            for _ in range(min(some, lines)):
                self._heat(at)
                at = (at + 1) % lines
            await asyncio.sleep(SWEEP_EVERY_S)

    # --- leases and idempotency keys --------------------------------------------------------------

    async def _hold_name(self, tenant: int, began_s: float) -> bool:
        leases = self._tenants[tenant].leases
        name = f"name-{int(self._chance.random() * LEASE_NAMES)}"
        token, ttl_ms = new_token(), self._plan.lease_ms
        answer = await self._timed(
            "acquire",
            lambda repeat: leases.acquire(
                name, ttl_ms=ttl_ms, owner=self._consumer, token=token, repeat=repeat
            ),
            began_s,
        )
        if isinstance(answer, str):
            return False
        if answer.outcome is not AcquireOutcome.ACQUIRED:
            self._book.outcomes["acquire busy"] += 1
            return True
        held_until_ms = self._held_names.get((tenant, name), 0)
        if answer.lease.acquired_at_ms < held_until_ms:
            self._book.held_twice += 1
            self._book.note_broken(f"lease {name} was granted while another token held it")
        self._held_names[tenant, name] = answer.lease.expires_at_ms
        await asyncio.sleep(
            0
        )  # hold it for a turn, in which nobody else may be told that he has it
        # From the moment that the release is sent, others may have the name.
        self._held_names.pop((tenant, name), None)
        released = await self._timed(
            "release", lambda repeat: leases.release(name, token, repeat=repeat)
        )
        self._book.outcomes[f"release {released}"] += 1
        return True

    async def _use_key(self, tenant: int, began_s: float) -> bool:
        keys = self._tenants[tenant].idempotency
        key, token, lease_ms = new_id(), new_token(), self._plan.lease_ms
        answer = await self._timed(
            "reserve",
            lambda repeat: keys.reserve(
                OPERATION,
                key,
                owner=self._consumer,
                fingerprint=key,
                lease_ms=lease_ms,
                token=token,
                repeat=repeat,
            ),
            began_s,
        )
        if isinstance(answer, str):
            return False
        if answer.outcome is not ReserveOutcome.RESERVED:
            self._book.note_broken(f"a new idempotency key was answered {answer.outcome}")
            return True
        completed = await self._timed(
            "complete",
            lambda repeat: keys.complete(
                OPERATION, key, True, token=token, keep_ms=OUTCOME_KEEP_MS, repeat=repeat
            ),
        )
        if completed is not CompleteOutcome.COMPLETED:
            self._book.outcomes[f"complete {completed}"] += 1
        return True

    # --- answers ----------------------------------------------------------------------------------

    async def _timed(
        self, command: str, call: Callable[[bool], Awaitable[Any]], began_s: float | None = None
    ) -> Any:
        """The answer to a call, with its latency noted; UNSETTLED or NOT_APPLIED where there is none."""
        if began_s is None:
            began_s = clock_s()
        try:
            answer = await call(False)
        except LeasekitError as error:
            answer = await self._insist(error, call)
        self._book.seconds[command].append(clock_s() - began_s)
        return answer

    async def _insist(self, error: LeasekitError, again: Callable[[bool], Awaitable[T]]) -> T | str:
        """Ask again after a failure, until there is an answer; `again` takes `repeat`.

        What was not applied is called anew; what may have been is repeated by its name, from then on.
        """
        book = self._book
        may_be_applied = False
        give_up_at_s = clock_s() + INSIST_S
        pause_s = PAUSE_FIRST_S
        while True:
            book.errors[type(error).__name__] += 1
            if isinstance(error, Conflict | InvalidInput):
                book.note_broken(f"refused: {error}")
                return NOT_APPLIED
            if isinstance(error, OutcomeUnknown):
                may_be_applied = True
            if not isinstance(error, OutcomeUnknown | Unavailable | Overloaded):
                book.note_broken(str(error))
                return UNSETTLED
            # An id in an OutcomeUnknown: the row itself is forgotten, so no repeat will know more.
            is_forgotten = isinstance(error, OutcomeUnknown) and error.id is not None
            if is_forgotten or clock_s() >= give_up_at_s:
                return UNSETTLED if may_be_applied else NOT_APPLIED
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MOST_S)
            book.repeats += may_be_applied
            try:
                return await again(may_be_applied)
            except LeasekitError as next_error:
                error = next_error
