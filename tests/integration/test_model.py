"""Random commands at random times, on every server, beside a model in plain Python.

Every outcome must be the model's. After every step the stored data must hold together; looked at
through the API it must be what the model says. LEASEKIT_MODEL_EXAMPLES asks for a longer search.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference import Draft, Lease, Record, Reference
from servers import Server, dump

import leasekit
from leasekit import Conflict, Leasekit, OutcomeUnknown, Retention, Tenant
from leasekit.keys import route_of

T = TypeVar("T")

EXAMPLES = int(os.environ.get("LEASEKIT_MODEL_EXAMPLES", "40"))
STEPS = 50

RETENTION = Retention(finished_ms=40, finished_count=3, dead_ms=60, dead_count=2, dedupe_ms=50)
LANES = ("a", "b")
IDS = [f"{number:026}" for number in range(8)]
TOKENS = [letter * 22 for letter in "abc"]
TARGET = "t"

whose = st.sampled_from([0, 0, 0, 1])  # most happens to one of the two, so that much happens to it
picks = st.integers(0, 99)
names = st.sampled_from(["x", "y"])
lengths = st.sampled_from([1, 10, 30])
flags = st.booleans()
rarely = st.sampled_from([False, False, False, True])
numbers = itertools.count()


def lane_of(id: str) -> str:
    return LANES[int(id) % 2]


class Machine(RuleBasedStateMachine):
    """Two tenants on one server, and what must hold there; connected once for all examples."""

    server: ClassVar[Server]
    kit: ClassVar[Leasekit]
    loop: ClassVar[asyncio.AbstractEventLoop]

    @initialize()
    def begin(self) -> None:
        number = next(numbers)
        self.now = 100
        self.touched = 0
        self.fences: list[list[int]] = [[], []]
        self.grants: list[list[tuple[str, str]]] = [[], []]
        self.tenants = [self.kit.tenant(f"model-{os.getpid()}-{number}", side) for side in "ab"]
        self.references = [
            Reference(
                finished_ms=RETENTION.finished_ms,
                finished_count=RETENTION.finished_count,
                dead_ms=RETENTION.dead_ms,
                dead_count=RETENTION.dead_count,
                dedupe_ms=RETENTION.dedupe_ms,
            )
            for _ in self.tenants
        ]

    def run(self, awaitable: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(awaitable)

    def at(self, side: int) -> tuple[Tenant, Reference]:
        self.touched = side
        return self.tenants[side], self.references[side]

    def choose(self, pick: int, wanted: Sequence[T], otherwise: Sequence[T]) -> T:
        """One of those that make something happen, mostly; now and then any of the others."""
        some = otherwise if pick % 5 == 4 or not wanted else wanted
        return some[pick % len(some)]

    # --- time ---

    @rule(step_ms=st.sampled_from([1, 10, 10, 30, 30, 60, -10]))
    def time_passes(self, step_ms: int) -> None:
        self.now = max(0, self.now + step_ms)

    @rule(side=whose, just=st.sampled_from([-1, 0, 0, 0, 1]))
    def something_ends(self, side: int, just: int) -> None:
        """To the next instant at which a row, a lease or a record changes, or one beside it."""
        reference = self.references[side]
        ends = [row.at for row in reference.rows.values() if row.status in ("pending", "claimed")]
        ends += [lease.end for lease in reference.leases.values()]
        for record in reference.records.values():
            ends += [end for end in (record.lease_end, record.expires_at) if end]
        self.now = min([end for end in ends if end > self.now], default=self.now) + just

    # --- what must hold ---

    @rule(side=whose)
    def look(self, side: int) -> None:
        """Through the API, all that there is, is the model's."""
        tenant, reference = self.at(side)
        self.run(self._compare(tenant, reference))

    async def _compare(self, tenant: Tenant, reference: Reference) -> None:
        now = self.now
        page = await tenant.outbox.list(now_ms=now)
        sections = [*[reference.line(lane) for lane in LANES]]
        unknown = [one for one in reference.rows.values() if one.status == "unknown"]
        sections.append(sorted(unknown, key=lambda one: (one.at, one.id)))
        sections += [reference.ended("dead"), reference.ended("done")]
        expected = [row for section in sections for row in section]
        assert [(row.id, row.status, row.cause, row.payload) for row in page.items] == [
            (row.id, row.seen_at(now), self._cause(row), row.draft.payload) for row in expected
        ]
        for row, model in zip(page.items, expected, strict=True):
            assert (row.attempt_count, row.claim_count) == (model.attempts, model.claims)
            assert [error.kind for error in row.errors] == model.errors
        counts = await tenant.outbox.counts(now_ms=now)
        by_status = Counter(row.status for row in reference.rows.values())
        for word in ("pending", "claimed", "unknown", "dead_lettered"):
            assert getattr(counts, word) == by_status[word], word
        assert (counts.sent, counts.cancelled) == tuple(reference.ever.values())
        leases = (await tenant.leases.list(now_ms=now)).items
        held = {name: reference.holder(now, name) for name in ("x", "y")}
        assert {one.name: (one.fence, one.expires_at_ms) for one in leases} == {
            name: (one.fence, one.end) for name, one in held.items() if one
        }
        records = (await tenant.idempotency.list(now_ms=now)).items
        expected_records = {}
        for key, one in reference.records.items():
            vanished = one.lease_end is not None and one.lease_end <= now and one.parks
            status = "unknown" if one.status == "reserved" and vanished else one.status
            if status != "released":
                expected_records[key] = (status, one.conflicts, one.outcome, one.expires_at)
        assert {
            one.key: (
                one.status,
                one.conflict_count,
                one.outcome and one.outcome.details,
                one.expires_at_ms,
            )
            for one in records
        } == expected_records

    def _cause(self, row: Any) -> str:
        return "parked" if row.seen_at(self.now) == "unknown" else row.cause

    @invariant()
    def data_holds_together(self) -> None:
        """Every row in exactly one list, tallies as counted anew, one live token a row."""
        tenant, reference = self.tenants[self.touched], self.references[self.touched]
        kept = dump(self.server.raw, "lk", tenant.tag)
        docs, states = kept.get("outbox:docs", {}), kept.get("outbox:state", {})
        assert set(docs) == set(reference.rows)
        assert set(states) <= set(docs)
        assert set(kept.get("outbox:errors", {})) <= set(docs)
        lists = {
            "done": ("sent", "cancelled"),
            "dead": ("dead_lettered",),
            "unknown": ("unknown",),
        } | {f"due:{route_of(lane, TARGET)}": ("pending", "claimed") for lane in LANES}
        places = [
            (id, at, name) for name in lists for id, at in kept.get(f"outbox:{name}", {}).items()
        ]
        assert sorted(id for id, _, _ in places) == sorted(docs)
        recount: Counter[str] = Counter()
        for id, at, name in places:
            model = reference.rows[id]
            words = states.get(id, f"pending enqueued ~ {at} 0 0 0 0 0 ").split(" ", 9)
            status, token, attempts, claims = words[0], words[2], int(words[5]), int(words[6])
            assert status in lists[name]
            assert (status, token) == (model.status, model.token or "~")
            assert (at, attempts, claims) == (model.at, model.attempts, model.claims)
            assert int(words[3]) == at
            assert attempts <= claims
            recount[f"{status}:{route_of(model.draft.lane, TARGET)}"] += 1
            if name in ("done", "dead"):
                recount[f"{name}_bytes"] += len(docs[id].encode())
        tally = {
            field: value
            for field, value in kept.get("outbox:tally", {}).items()
            if not field.startswith("hinted:")  # when a claim last told others: no count
        }
        assert tally.pop("horizon", "") == reference.horizon
        for word in ("sent", "cancelled"):
            ever = [int(tally.pop(f"{word}:{route_of(lane, TARGET)}", 0)) for lane in LANES]
            assert sum(ever) == reference.ever[word]
            for lane in LANES:
                recount.pop(f"{word}:{route_of(lane, TARGET)}", None)
        assert {name: int(n) for name, n in tally.items() if int(n)} == dict(recount)
        assert set(kept.get("outbox:claims", {})) == set(reference.claims)
        assert set(kept.get("outbox:dedupe", {})) == set(kept.get("outbox:dedupe_end", {}))
        assert set(kept.get("lease:docs", {})) == set(reference.leases)
        assert (
            set(kept.get("lease:due", {}))
            == set(kept.get("lease:names", {}))
            == set(reference.leases)
        )
        assert set(kept.get("idempotency:docs", {})) == set(kept.get("idempotency:due", {}))
        assert len(kept.get("idempotency:docs", {})) == len(reference.records)
        assert int(kept.get("fence", 0)) == reference.fence
        fences = self.fences[self.touched]
        assert fences == sorted(set(fences))

    def teardown(self) -> None:
        if hasattr(self, "tenants"):
            for tenant, reference in zip(self.tenants, self.references, strict=True):
                self.run(self._compare(tenant, reference))


class OutboxMachine(Machine):
    """Rows from enqueue to their end. A rule that needs a row of some kind makes one, mostly."""

    def new_row(self, side: int, pick: int, *, parks: bool = False) -> Draft:
        """Enqueue a row that is due now, under an id that is free."""
        rows = self.references[side].rows
        id = self.choose(pick // 5 * 5, [one for one in IDS if one not in rows], IDS)
        draft = Draft(lane_of(id), 1, None, 0, [None, 1, 2][pick % 3], parks)
        self._enqueue(side, id, draft, False)
        return draft

    def held(self, side: int, pick: int) -> tuple[str, str]:
        """A grant, id and token: mostly one whose token is still the row's."""
        rows, grants = self.references[side].rows, self.grants[side]
        live = [one for one in grants if one[0] in rows and rows[one[0]].token == one[1]]
        if not live and (pick % 5 < 4 or not grants):
            draft = self.new_row(side, pick, parks=pick % 4 == 0)
            self._claim(side, draft.lane, leasekit.new_token(), 9, 10)
        live = [one for one in grants if one[0] in rows and rows[one[0]].token == one[1]]
        everybodys = [*grants, *self.grants[1 - side], (IDS[0], TOKENS[0])]
        return self.choose(pick, live[::-1], everybodys)

    def row_with(self, side: int, pick: int, status: str) -> str:
        """A row's id: mostly of a row that readers see in this status."""
        rows = self.references[side].rows

        def fit() -> list[str]:
            return [one.id for one in rows.values() if one.seen_at(self.now) == status]

        if not fit() and pick % 5 < 4:
            draft = self.new_row(side, pick, parks=status == "unknown")
            if status != "pending":
                self._claim(side, draft.lane, leasekit.new_token(), 9, 10)
                self.now += 10
                self._claim(side, draft.lane, leasekit.new_token(), 9 * (pick % 2), 10)
        return self.choose(pick, fit(), IDS)

    @rule(
        side=whose,
        pick=picks,
        dedupe_key=st.sampled_from([None, None, "x", "y"]),
        delay=st.sampled_from([None, None, 0, 15]),
        attempts_max=st.sampled_from([None, 1, 2]),
        parks=flags,
        repeat=rarely,
    )
    def enqueue(
        self,
        side: int,
        pick: int,
        dedupe_key: str | None,
        delay: int | None,
        attempts_max: int | None,
        parks: bool,
        repeat: bool,
    ) -> None:
        rows = self.references[side].rows
        id = self.choose(pick, [one for one in IDS if one not in rows], IDS)
        available_at = 0 if delay is None else self.now + delay
        draft = Draft(lane_of(id), 1, dedupe_key, available_at, attempts_max, parks)
        self._enqueue(side, id, draft, repeat)

    @precondition(lambda self: any(one.rows for one in self.references))
    @rule(
        side=whose,
        pick=picks,
        payload=st.sampled_from([1, 1, 2]),
        is_same_id=flags,
        repeat=flags,
    )
    def enqueue_again(
        self, side: int, pick: int, payload: int, is_same_id: bool, repeat: bool
    ) -> None:
        """What is there, or was, once more: by its id, or under another one by its key."""
        rows = [*self.references[side].rows.values(), *self.references[1 - side].rows.values()]
        row = rows[pick % len(rows)]
        others = [id for id in IDS if lane_of(id) == row.draft.lane and id != row.id]
        id = row.id if is_same_id else others[pick % len(others)]
        self._enqueue(side, id, replace(row.draft, payload=payload), repeat)

    def _enqueue(self, side: int, id: str, draft: Draft, repeat: bool) -> None:
        tenant, reference = self.at(side)
        expected = reference.enqueue(self.now, id, draft, repeat)

        async def ask() -> tuple[str, str]:
            try:
                enqueued = await tenant.outbox.enqueue(
                    draft.lane,
                    TARGET,
                    draft.payload,
                    id=id,
                    dedupe_key=draft.dedupe_key,
                    available_at_ms=draft.available_at,
                    max_attempts=draft.attempts_max,
                    on_expiry="park" if draft.parks else "reclaim",
                    repeat=repeat,
                    now_ms=self.now,
                )
            except Conflict as error:
                return "conflict", str(error.id)
            except OutcomeUnknown as error:
                return "forgotten", str(error.id)
            row = reference.rows.get(enqueued.row.id)
            seen = row.seen_at(self.now) if row else "forgotten"
            if not repeat:
                assert enqueued.row.status == seen
            return "created" if enqueued.created else "duplicate", enqueued.row.id

        assert self.run(ask()) == expected

    @rule(
        side=whose,
        pick=picks,
        is_again=rarely,
        limit=st.sampled_from([0, 1, 2, 5, 5]),
        lease_ms=st.sampled_from([0, 10, 10, 30]),
    )
    def claim(self, side: int, pick: int, is_again: bool, limit: int, lease_ms: int) -> None:
        reference = self.references[side]
        due = [lane for lane in LANES if any(one.at <= self.now for one in reference.line(lane))]
        if not due and pick % 5 < 4:
            due = [self.new_row(side, pick, parks=pick % 4 == 0).lane]
        lane = self.choose(pick, due, LANES)
        made = [token for _, token in self.grants[side]]
        token = made[pick % len(made)] if is_again and made else leasekit.new_token()
        self._claim(side, lane, token, limit, lease_ms)

    def _claim(self, side: int, lane: str, token: str, limit: int, lease_ms: int) -> None:
        tenant, reference = self.at(side)
        was_made_before = token in reference.claims
        expected = reference.claim(self.now, lane, token, limit, lease_ms)
        claimed = self.run(
            tenant.outbox.claim(
                lane,
                TARGET,
                limit=limit,
                lease_ms=lease_ms,
                consumer="c",
                claim_id=token,
                now_ms=self.now,
            )
        )
        assert [one.row.id for one in claimed] == expected
        for one in claimed:
            row = reference.rows[one.row.id]
            assert one.token == token
            assert (one.row.attempt_count, one.row.claim_count) == (row.attempts, row.claims)
            self.grants[side].append((one.row.id, token))
        if claimed and not was_made_before:
            assert claimed[0].fence == reference.fence
            self.fences[side].append(claimed[0].fence)

    @rule(side=whose, pick=picks, repeat=flags)
    def ack(self, side: int, pick: int, repeat: bool) -> None:
        tenant, reference = self.at(side)
        id, token = self.held(side, pick)
        expected = reference.ack(self.now, id, token, repeat)
        assert self.run(tenant.outbox.ack(id, token, repeat=repeat, now_ms=self.now)) == expected

    @rule(
        side=whose,
        pick=picks,
        retry_in=st.sampled_from([None, -20, 0, 20]),
        permanent=flags,
        repeat=flags,
    )
    def nack(
        self, side: int, pick: int, retry_in: int | None, permanent: bool, repeat: bool
    ) -> None:
        tenant, reference = self.at(side)
        id, token = self.held(side, pick)
        retry_at = None if retry_in is None else max(0, self.now + retry_in)
        expected = reference.nack(self.now, id, token, retry_at, permanent, repeat)
        given = {"retry_at_ms": retry_at, "permanent": permanent, "repeat": repeat}
        asked = tenant.outbox.nack(id, token, error="e", now_ms=self.now, **given)
        assert self.run(asked) == expected

    @rule(side=whose, pick=picks, lease_ms=lengths)
    def extend(self, side: int, pick: int, lease_ms: int) -> None:
        tenant, reference = self.at(side)
        id, token = self.held(side, pick)
        expected = reference.extend(self.now, id, token, lease_ms)
        asked = tenant.outbox.extend(id, token, lease_ms=lease_ms, now_ms=self.now)
        assert self.run(asked) == expected

    @rule(side=whose, pick=picks, repeat=flags)
    def release(self, side: int, pick: int, repeat: bool) -> None:
        tenant, reference = self.at(side)
        id, token = self.held(side, pick)
        expected = reference.release(id, token, repeat)
        asked = tenant.outbox.release(id, token, repeat=repeat, now_ms=self.now)
        assert self.run(asked) == expected

    @rule(side=whose, pick=picks, repeat=flags)
    def cancel(self, side: int, pick: int, repeat: bool) -> None:
        tenant, reference = self.at(side)
        id = self.row_with(side, pick, "pending")
        expected = reference.cancel(self.now, id, repeat)
        asked = tenant.outbox.cancel(id, repeat=repeat, now_ms=self.now)
        assert self.run(asked) == expected

    @rule(side=whose, pick=picks, repeat=flags)
    def redrive(self, side: int, pick: int, repeat: bool) -> None:
        tenant, reference = self.at(side)
        id = self.row_with(side, pick, "dead_lettered")
        expected = reference.redrive(self.now, id, repeat)
        asked = tenant.outbox.redrive(id, repeat=repeat, now_ms=self.now)
        assert self.run(asked) == expected

    @rule(
        side=whose,
        pick=picks,
        verdict=st.sampled_from(["sent", "redrive", "dead"]),
        repeat=flags,
    )
    def resolve(self, side: int, pick: int, verdict: Any, repeat: bool) -> None:
        tenant, reference = self.at(side)
        id = self.row_with(side, pick, "unknown")
        expected = reference.resolve(self.now, id, verdict, repeat)
        asked = tenant.outbox.resolve(
            id, verdict, actor="o", reason="r", repeat=repeat, now_ms=self.now
        )
        assert self.run(asked) == expected


class NamesMachine(Machine):
    """Leases and idempotency keys."""

    def token_of(self, held: Mapping[str, Lease | Record], name: str, pick: int) -> str:
        """Mostly the token that has it."""
        return self.choose(pick, [held[name].token] if name in held else [], TOKENS)

    @rule(step_ms=st.sampled_from([300_000, 86_400_000]))
    def much_time_passes(self, step_ms: int) -> None:
        self.now += step_ms

    # --- leases ---

    @rule(side=whose, name=names, pick=picks, ttl_ms=lengths)
    def acquire(self, side: int, name: str, pick: int, ttl_ms: int) -> None:
        token = TOKENS[pick % len(TOKENS)]
        self._acquire(side, name, token, ttl_ms)

    def _acquire(self, side: int, name: str, token: str, ttl_ms: int) -> None:
        tenant, reference = self.at(side)
        fence_before = reference.fence
        expected = reference.acquire(self.now, name, token, ttl_ms)
        acquisition = self.run(
            tenant.leases.acquire(name, ttl_ms=ttl_ms, owner="o", token=token, now_ms=self.now)
        )
        assert acquisition.outcome == expected
        holder = reference.holder(self.now, name)
        shown = acquisition.lease or acquisition.holder
        assert (shown and (shown.fence, shown.expires_at_ms)) == (
            holder and (holder.fence, holder.end)
        )
        if reference.fence > fence_before:
            self.fences[side].append(acquisition.lease.fence)

    @rule(side=whose, name=names, pick=picks, ttl_ms=lengths)
    def extend_lease(self, side: int, name: str, pick: int, ttl_ms: int) -> None:
        tenant, reference = self.at(side)
        if not reference.holder(self.now, name) and pick % 5 < 4:
            self._acquire(side, name, TOKENS[pick % 3], 20)
        token = self.token_of(reference.leases, name, pick)
        expected = reference.extend_lease(self.now, name, token, ttl_ms)
        asked = tenant.leases.extend(name, token, ttl_ms=ttl_ms, now_ms=self.now)
        assert self.run(asked) == expected

    @rule(side=whose, name=names, pick=picks, repeat=flags)
    def release_lease(self, side: int, name: str, pick: int, repeat: bool) -> None:
        tenant, reference = self.at(side)
        if not reference.holder(self.now, name) and pick % 5 < 4:
            self._acquire(side, name, TOKENS[pick % 3], 20)
        token = self.token_of(reference.leases, name, pick)
        expected = reference.release_lease(self.now, name, token, repeat)
        asked = tenant.leases.release(name, token, repeat=repeat, now_ms=self.now)
        assert self.run(asked) == expected

    # --- idempotency ---

    @rule(
        side=whose,
        key=names,
        pick=picks,
        fingerprint=st.sampled_from("fffg"),
        lease_ms=st.none() | lengths,
        expires_in=st.sampled_from([None, None, -5, 20]),
        parks=flags,
    )
    def reserve(
        self,
        side: int,
        key: str,
        pick: int,
        fingerprint: str,
        lease_ms: int | None,
        expires_in: int | None,
        parks: bool,
    ) -> None:
        reference = self.references[side]
        token = self.token_of(reference.records, key, pick) if pick % 3 == 0 else TOKENS[pick % 3]
        self._reserve(side, key, token, fingerprint, lease_ms, expires_in, parks)

    def _reserve(
        self,
        side: int,
        key: str,
        token: str,
        fingerprint: str,
        lease_ms: int | None,
        expires_in: int | None,
        parks: bool,
    ) -> None:
        tenant, reference = self.at(side)
        expires_at = None if expires_in is None else max(1, self.now + expires_in)
        expected = reference.reserve(
            self.now,
            key,
            token=token,
            fingerprint=fingerprint,
            lease_ms=lease_ms,
            expires_at=expires_at,
            parks=parks,
        )

        async def ask() -> str:
            try:
                reservation = await tenant.idempotency.reserve(
                    "op",
                    key,
                    owner="o",
                    fingerprint=fingerprint,
                    lease_ms=lease_ms,
                    expires_at_ms=expires_at,
                    on_expiry="park" if parks else "reclaim",
                    token=token,
                    now_ms=self.now,
                )
            except Conflict:
                return "spent"
            assert (reservation.token == token) == (reservation.outcome == "reserved")
            return reservation.outcome

        assert self.run(ask()) == expected

    @rule(
        side=whose,
        key=names,
        pick=picks,
        outcome=st.integers(1, 3),
        keep_ms=lengths,
        repeat=flags,
    )
    def complete(
        self, side: int, key: str, pick: int, outcome: int, keep_ms: int, repeat: bool
    ) -> None:
        tenant, reference = self.at(side)
        if key not in reference.records and pick % 5 < 4:
            self._reserve(
                side, key, TOKENS[pick % 3], "f", [None, 10][pick % 2], None, pick % 4 == 0
            )
        token = self.token_of(reference.records, key, pick)
        expected = reference.complete(self.now, key, token, outcome, keep_ms, repeat)
        given: dict[str, Any] = {"keep_ms": keep_ms, "repeat": repeat, "now_ms": self.now}
        asked = tenant.idempotency.complete("op", key, outcome, token=token, **given)
        assert self.run(asked) == expected

    @rule(side=whose, key=names, pick=picks, repeat=flags)
    def withdraw(self, side: int, key: str, pick: int, repeat: bool) -> None:
        tenant, reference = self.at(side)
        if key not in reference.records and pick % 5 < 4:
            self._reserve(
                side, key, TOKENS[pick % 3], "f", [None, 10][pick % 2], None, pick % 4 == 0
            )
        token = self.token_of(reference.records, key, pick)
        expected = reference.withdraw(self.now, key, token, repeat)
        asked = tenant.idempotency.release("op", key, token=token, repeat=repeat, now_ms=self.now)
        assert self.run(asked) == expected


@pytest.mark.timeout(600)  # finding a failure is quick, making it small may take minutes
@pytest.mark.parametrize("kind", [OutboxMachine, NamesMachine])
def test_the_real_thing_behaves_as_the_model(server: Server, kind: type[Machine]) -> None:
    """Outbox, leases and idempotency keys of two tenants, on the caller's clock."""
    with asyncio.Runner() as runner:
        kit = runner.run(_connect(server.url))
        try:
            machine = type(
                kind.__name__,
                (kind,),
                {"server": server, "kit": kit, "loop": runner.get_loop()},
            )
            run_state_machine_as_test(
                machine,
                settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS),
            )
        finally:
            runner.run(kit.close())


async def _connect(url: str) -> Leasekit:
    return await leasekit.connect(url, clock="caller", retention=RETENTION)
