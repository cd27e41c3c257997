"""`tenant.ledger`: the records of one tenant, and what may be done with them.

Source: design 9; spec/reliability 4.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from leasekit import codec
from leasekit.errors import Conflict
from leasekit.gate import Gate, Intent, Permit, PreSendEvent, Source
from leasekit.gate.identity import key_digest
from leasekit.ledger import bridge as bridging
from leasekit.ledger import recovery
from leasekit.ledger.audit import Audit, Decisions
from leasekit.ledger.events import Events, Snapshots
from leasekit.ledger.filing import COMPENSATIONS, DEAD_LETTERS, EFFECTS, Collection, run_word, word
from leasekit.ledger.records import (
    Compensation,
    DeadLetter,
    ExternalAction,
    PrincipalRef,
    StatefulRuntimeScope,
    ToolEffect,
    operator_principal,
)
from leasekit.ledger.recovery import Execution
from leasekit.ledger.runs import Runs
from leasekit.ledger.store import IntentChange, Store, Transaction, check_scope
from leasekit.ledger.waits import Waits
from leasekit.model import Page
from leasekit.scope import PAGE_LIMIT_DEFAULT, Scope, decode_cursor, encode_cursor

__all__ = ["Ledger", "Records"]

WALK_ROWS = 1_000
UNAPPROVED = ("proposed", "awaiting_approval")

Record = TypeVar("Record", bound=msgspec.Struct)
Executor = Callable[[Compensation, Permit], Awaitable[Any]]


class Records(Generic[Record]):
    """One kind of record of a tenant: `tenant.ledger.dead_letters` and its kind."""

    __slots__ = ("_collection", "_store")

    def __init__(self, store: Store, collection: Collection[Record]) -> None:
        self._store = store
        self._collection = collection

    async def upsert(self, record: Record, *, now_ms: int | None = None) -> Record:
        """Write a record whole, in the place of one with the same id (spec 4.3)."""
        check_scope(self._store.scope, record)

        async def write(transaction: Transaction) -> Record:
            await put(transaction, self._collection, record)
            return record

        return await self._store.transact(write, now_ms=now_ms)

    async def get(self, id: str, *, now_ms: int | None = None) -> Record | None:
        """A record by its id; None if there is none."""
        codec.check_text(id, "id")
        [found] = await self._store.get([self._collection.name_of(id)], now_ms=now_ms)
        return None if found is None else self._collection.decode(found.doc)

    async def list(
        self,
        *,
        run_id: str | None = None,
        status: str | None = None,
        source: str | None = None,
        active_only: bool = False,
        created_before_ms: int | None = None,
        limit: int = PAGE_LIMIT_DEFAULT,
        cursor: str | None = None,
        now_ms: int | None = None,
    ) -> Page[Record]:
        """A page, the last changed first, of one run or of all. limit: 1..1 000. A filtered page looks
        at no more than 1 000 records; it may be short and go on. Filters compare normalised words."""
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        position = decode_cursor(cursor, (str,))
        found, after = await self._store.page(
            self._collection.name,
            self._collection.list_of(run_id),
            limit=limit,
            after=position[0] if position else "",
            statuses=() if status is None else (word(status),),
            source="" if source is None else word(source),
            active_only=active_only,
            created_before_ms=created_before_ms,
            now_ms=now_ms,
        )
        items = [self._collection.decode(one.doc) for one in found]
        return Page(items, None if after is None else encode_cursor(after))


class Ledger:
    """What happened in a tenant, what is uncertain, and what an operator may do about it."""

    def __init__(self, scope: Scope, gate: Gate) -> None:
        self._scope = scope
        self._gate = gate
        self._store = store = Store(scope)
        self.effects = Records(store, EFFECTS)
        self.dead_letters = Records(store, DEAD_LETTERS)
        self.compensations = Records(store, COMPENSATIONS)
        self.waits = Waits(store)
        self.events = Events(store)
        self.runs = Runs(store, self.events)
        self.snapshots = Snapshots(store)
        self.decisions = Decisions(store)
        self.audit = Audit(store)

    async def now_ms(self, now_ms: int | None = None) -> int:
        """The server's clock, or the caller's."""
        return await self._store.now_ms(now_ms)

    async def record_external_action(
        self, scope: StatefulRuntimeScope, action: ExternalAction, *, now_ms: int | None = None
    ) -> ToolEffect:
        """Take over what another system says it did (spec 4.5): intent, effect and, for a failure, dead
        letter and compensation, whole or not at all. A success makes earlier failures idle."""

        async def record(transaction: Transaction) -> ToolEffect:
            run = bridging.run_of(action)
            await transaction.guard(run_word(run))
            id = f"outbox-{bridging.suffix_of(action)}"
            intent = await self._store.intent(id, now_ms=now_ms)
            bridged = bridging.bridge(
                scope,
                action,
                existing=None if intent is None else fields_of(intent),
                dead_letters=await self._walk(DEAD_LETTERS, run, now_ms),
                compensations=await self._walk(COMPENSATIONS, run, now_ms),
            )
            put_intent(transaction, bridged.outbox, 0 if intent is None else intent.revision)
            await put(transaction, EFFECTS, bridged.effect)
            if bridged.compensation is not None:
                await put(transaction, COMPENSATIONS, bridged.compensation)
            if bridged.dead_letter is not None:
                await put(transaction, DEAD_LETTERS, bridged.dead_letter)
            for letter in bridged.changed_dead_letters:
                await put(transaction, DEAD_LETTERS, letter)
            for compensation in bridged.changed_compensations:
                await put(transaction, COMPENSATIONS, compensation)
            for letter in bridged.removed_dead_letters:
                await drop(transaction, DEAD_LETTERS, letter)
            for compensation in bridged.removed_compensations:
                await drop(transaction, COMPENSATIONS, compensation)
            return bridged.effect

        check_scope(self._scope, scope)
        return await self._store.transact(record, now_ms=now_ms)

    async def dispose(
        self,
        dead_letter_id: str,
        status: str,
        disposition: str,
        *,
        reason: str | None = None,
        actor: PrincipalRef | None = None,
        now_ms: int | None = None,
    ) -> DeadLetter | None:
        """Say what is to become of a dead letter (spec 4.8); None if there is none of that id."""

        async def change(transaction: Transaction) -> DeadLetter | None:
            letter = await get(transaction, DEAD_LETTERS, dead_letter_id)
            if letter is None:
                return None
            changed = recovery.disposed(
                letter,
                status,
                disposition,
                reason=reason,
                actor=actor,
                now_ms=transaction.now_ms,
            )
            await put(transaction, DEAD_LETTERS, changed)
            return changed

        return await self._store.transact(change, now_ms=now_ms)

    async def move_compensation(
        self, compensation_id: str, status: str, *, now_ms: int | None = None
    ) -> Compensation | None:
        """Bring a compensation into another status; Conflict where the table of spec 4.8 does not allow
        it; None if there is none of that id."""

        async def change(transaction: Transaction) -> Compensation | None:
            compensation = await get(transaction, COMPENSATIONS, compensation_id)
            if compensation is None:
                return None
            changed = recovery.moved(compensation, status, transaction.now_ms)
            await put(transaction, COMPENSATIONS, changed)
            return changed

        return await self._store.transact(change, now_ms=now_ms)

    async def execute_compensation(
        self,
        compensation_id: str,
        *,
        actor: PrincipalRef | None = None,
        reason: str | None = None,
        require_approval: bool = False,
        executor: Executor | None = None,
        now_ms: int | None = None,
    ) -> Execution | None:
        """Execute a compensation once (spec 4.8): its receipt, its intent and the dead letters that it
        settles land whole or not at all. A second execution gets the first one's receipt
        (`already_completed`). None if there is none of that id.

        executor: makes the compensating call, through the gate under one key an attempt; without it
        the execution is only recorded, as operators do who have acted by hand. require_approval: refuse
        what requires an approval and has none. Raises Conflict (cancelled; not approved), and with an
        executor what `Gate.dispatch` raises; the compensation then stays `running`, and executing it
        again goes on under the same key.
        """
        who = actor or operator_principal(self._scope.context.actor_id)

        async def finish(transaction: Transaction) -> Execution | None:
            found = await self._executable(transaction, compensation_id, require_approval)
            if found is None or isinstance(found, Execution):
                return found
            now = transaction.now_ms
            running = recovery.begun(found, actor=who, reason=reason, now_ms=now)
            if found.status == "running" and executor is not None:
                running = found
            row = recovery.outbox_row(running, now)
            receipt = recovery.receipt_of(running, row, actor=who, reason=reason, now_ms=now)
            done = recovery.ended(running, receipt, now)
            letters = await self._letters_of(transaction, done)
            linked = recovery.linked(letters, done, actor=who, reason=reason, now_ms=now)
            intent = await self._store.intent(row["outbox_id"], now_ms=now_ms)
            revision = 0 if intent is None else intent.revision
            put_intent(transaction, recovery.sent(row, receipt, now), revision)
            await put(transaction, EFFECTS, receipt)
            await put(transaction, COMPENSATIONS, done)
            for letter in linked:
                await put(transaction, DEAD_LETTERS, letter)
            return Execution(compensation=done, receipt_effect=receipt, linked_dead_letters=linked)

        if executor is not None:
            begun = await self._begin(compensation_id, who, reason, require_approval, now_ms)
            if begun is None or isinstance(begun, Execution):
                return begun
            await self._make(begun, executor, now_ms)
        return await self._store.transact(finish, now_ms=now_ms)

    async def _executable(
        self, transaction: Transaction, compensation_id: str, require_approval: bool
    ) -> Compensation | Execution | None:
        """What is to be executed; an Execution where that was done before."""
        compensation = await get(transaction, COMPENSATIONS, compensation_id)
        if compensation is None:
            return None
        await transaction.guard(run_word(compensation.run_id))
        if compensation.status == "completed":
            receipt = None
            if compensation.receipt_effect_id is not None:
                receipt = await get(transaction, EFFECTS, compensation.receipt_effect_id)
            return Execution(
                compensation=compensation,
                receipt_effect=receipt,
                linked_dead_letters=await self._letters_of(transaction, compensation),
                already_completed=True,
            )
        lacks_approval = compensation.approval_required and compensation.status in UNAPPROVED
        if require_approval and lacks_approval:
            raise Conflict(
                f"compensation {compensation_id} is `{compensation.status}` and requires an approval: "
                "nothing was executed; have it approved first",
                tenant=self._scope.tag,
                id=compensation_id,
                status=compensation.status,
            )
        return compensation

    async def _begin(
        self,
        compensation_id: str,
        actor: PrincipalRef,
        reason: str | None,
        require_approval: bool,
        now_ms: int | None,
    ) -> Compensation | Execution | None:
        """Note that the compensating call is about to be made; one attempt has one key."""

        async def begin(transaction: Transaction) -> Compensation | Execution | None:
            found = await self._executable(transaction, compensation_id, require_approval)
            if found is None or isinstance(found, Execution) or found.status == "running":
                return found
            running = recovery.begun(found, actor=actor, reason=reason, now_ms=transaction.now_ms)
            await put(transaction, COMPENSATIONS, running)
            return running

        return await self._store.transact(begin, now_ms=now_ms)

    async def _make(self, running: Compensation, executor: Executor, now_ms: int | None) -> None:
        """Make the compensating call of an attempt, once; a call that was made before is not repeated."""
        row = recovery.outbox_row(running, running.updated_at_ms)
        event = PreSendEvent(
            dispatch_id=row["idempotency_key"],
            tool=row["tool"],
            canonical_tool=row["operation"],
            source=Source(kind="stateful_compensation", run_id=running.run_id),
            external_side_effect=True,
        )
        try:
            async with self._gate.dispatch(event) as permit:
                permit.begin()
                result = await executor(running, permit)
                if not permit.has_spoken:
                    await permit.sent(result)
        except Conflict as refused:
            if refused.status != "sent":
                raise

    async def _letters_of(
        self, transaction: Transaction, compensation: Compensation
    ) -> list[DeadLetter]:
        """The dead letters that a compensation settles."""
        letters = await self._walk(DEAD_LETTERS, compensation.run_id, transaction.given_ms)
        return [
            letter for letter in letters if letter.compensation_id == compensation.compensation_id
        ]

    async def _walk(
        self, collection: Collection[Record], run_id: str | None, now_ms: int | None
    ) -> list[Record]:
        """All records of a run; only under a guard of that run are they all that there are."""
        records: list[Record] = []
        after: str | None = ""
        while after is not None:
            found, after = await self._store.page(
                collection.name,
                collection.list_of(run_id),
                limit=WALK_ROWS,
                after=after,
                now_ms=now_ms,
            )
            records += [collection.decode(one.doc) for one in found]
        return records


# --- records in a transaction ---------------------------------------------------------------------


async def get(transaction: Transaction, collection: Collection[Record], id: str) -> Record | None:
    """A record by its id, which then must not change until the commit."""
    doc = await transaction.get(collection.name_of(id))
    return None if doc is None else collection.decode(doc)


async def put(transaction: Transaction, collection: Collection[Record], record: Record) -> None:
    """Write a record in the place of what is there now."""
    name = collection.name_for(record)
    if not transaction.has_read(name):
        await transaction.get(name)
    transaction.put(name, collection.listed(record), collection.encode(record))


async def drop(transaction: Transaction, collection: Collection[Record], record: Record) -> None:
    """Delete a record."""
    name = collection.name_for(record)
    if not transaction.has_read(name):
        await transaction.get(name)
    transaction.drop(name, collection.run_of(record))


# --- intents as the ledger writes them ------------------------------------------------------------

_STATE_FIELDS = frozenset(
    {"outbox_id", "status", "attempts", "created_at_ms", "updated_at_ms", "claim_expires_at_ms"}
)


def fields_of(intent: Intent) -> dict[str, Any]:
    """An intent's fields as the specification has them (spec 4.2)."""
    fields: dict[str, Any] = msgspec.to_builtins(intent)
    return fields


def put_intent(transaction: Transaction, row: Mapping[str, Any], revision: int) -> None:
    """Write an intent from its fields; what its state line holds is not in its document."""
    key = row.get("idempotency_key")
    words = " ".join(
        [
            row["status"],
            "reclaim",
            str(row["attempts"]),
            str(row["created_at_ms"]),
            str(row["updated_at_ms"]),
            str(row.get("claimed_at_ms") or 0),
            str(row.get("claim_expires_at_ms") or 0),
            run_word(row.get("run_id")),
            key_digest(key) if key else "~",
            row.get("claimed_by") or "",
        ]
    )
    document = {name: value for name, value in row.items() if name not in _STATE_FIELDS}
    transaction.put_intent(
        row["outbox_id"], revision, IntentChange(words, msgspec.json.encode(document))
    )
