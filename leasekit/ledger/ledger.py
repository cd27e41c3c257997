"""`tenant.ledger`: the records of one tenant, and what may be done with them.

What several records depend on is read in one transaction and lands whole. Transactions about the same
effect, or the same compensation, all write it: the later one begins again on what the other left.

Source: design 9; spec/reliability 3.7, 4.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from leasekit import codec
from leasekit.errors import Conflict, InvalidInput
from leasekit.gate import Gate, Intent, LedgerEvent, Permit, PreSendEvent, Receipt, Source
from leasekit.gate.events import check_event, is_completion
from leasekit.gate.identity import key_digest, outbox_id
from leasekit.ledger import bridge as bridging
from leasekit.ledger import recovery
from leasekit.ledger.audit import Audit, Decisions
from leasekit.ledger.events import Events, Snapshots
from leasekit.ledger.filing import (
    COMPENSATIONS,
    DEAD_LETTERS,
    EFFECTS,
    Collection,
    check_scope,
    is_off,
    list_about,
    run_word,
    word,
)
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
from leasekit.ledger.retrying import retry_dead_letters
from leasekit.ledger.runs import Runs
from leasekit.ledger.store import RECORD_ID_BYTES_MAX, IntentChange, Store, Transaction
from leasekit.ledger.waits import Waits
from leasekit.model import Page
from leasekit.scope import PAGE_LIMIT_DEFAULT, Scope, decode_cursor, encode_cursor

__all__ = ["Ledger", "Records"]

WALK_ROWS = 1_000
PRUNE_ROWS = 250
UNAPPROVED = ("proposed", "awaiting_approval")
SETTLED: tuple[tuple[Collection[Any], tuple[str, ...]], ...] = (
    (EFFECTS, ("succeeded",)),
    (DEAD_LETTERS, ("ignored", "resolved")),
    (COMPENSATIONS, ("completed", "cancelled")),
)

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
        collection = self._collection
        collection.check(record)
        check_scope(self._store.scope, record)
        name, listed = collection.name_for(record), collection.listed(record)
        await self._store.put(name, listed, collection.encode(record), now_ms=now_ms)
        return record

    async def get(self, id: str, *, now_ms: int | None = None) -> Record | None:
        """A record by its id; None if there is none."""
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
        at no more than 1 000 records; it may be short and go on. Filters compare normalised words; blank
        ones and `all` let everything through. created_before_ms: only what was made before it."""
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        position = decode_cursor(cursor, (str,))
        found, after = await self._store.page(
            self._collection.name,
            self._collection.list_of(None if is_off(run_id) else run_id),
            limit=limit,
            after=position[0] if position else "",
            statuses=() if status is None or is_off(status) else (word(status),),
            source=""
            if source is None or is_off(source) or not self._collection.has_source
            else word(source),
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
        letter and compensation, whole or not at all. A success makes earlier failures idle.

        Raises InvalidInput, and Conflict where others write the same effect all the time.
        """
        check_scope(self._scope, scope)
        bridging.check_action(action)
        suffix = bridging.suffix_of(action)
        intent_id, effect_id = f"outbox-{suffix}", f"effect-{suffix}"
        compensation_id = bridging.compensation_id_of(action)

        async def record(transaction: Transaction) -> ToolEffect:
            # These first: every bridge of the effect writes both, so that one that lands while the
            # rest is read is noticed.
            await get(transaction, EFFECTS, effect_id)
            intent = await self._store.intent(intent_id, now_ms=now_ms)
            letters = await self._about(
                transaction,
                DEAD_LETTERS,
                {"source": effect_id},
                also=f"dead-letter-{effect_id}",
            )
            compensations = await self._about(
                transaction,
                COMPENSATIONS,
                {"effect": effect_id, "outbox": intent_id},
                also=compensation_id,
            )
            bridged = bridging.bridge(
                scope,
                action,
                existing=None if intent is None else fields_of(intent),
                dead_letters=letters,
                compensations=compensations,
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

        return await self._store.transact(record, line=effect_id, now_ms=now_ms)

    async def record_dispatch(
        self, event: LedgerEvent, *, receipt: Receipt | None = None, now_ms: int | None = None
    ) -> ToolEffect:
        """Record what a dispatcher tells of a call (spec 3.7): complete its intent where the event is a
        completion, then write the receipt of this phase as an effect, over an earlier one.

        receipt: the grant, without which a completion is believed less (`Gate.complete`). Whatever is
        raised, the call must not go on; the same event may be recorded again.
        """
        check_event(event)
        scope = StatefulRuntimeScope(tenant_context=event.tenant_context or self._scope.context)
        check_scope(self._scope, scope)
        if is_completion(event):
            await self._gate.complete(event, receipt=receipt, now_ms=now_ms)
        at_ms = await self._store.now_ms(now_ms)
        effect = bridging.dispatch_receipt(event, scope, at_ms)
        return await self.effects.upsert(effect, now_ms=now_ms)

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
        """Say what is to become of a dead letter (spec 4.8); None if there is none of that id.

        status `retry_requested` asks `retry_dead_letters` to try again. Any status may follow any.
        """

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
        it, InvalidInput for what is no status; None if there is none of that id."""

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

        executor: makes the compensating call, through the gate under one key an attempt, and may say
        what became of it (`permit.failed`, `permit.not_sent`); returning means that it was sent.
        Needs the server's clock. Without it the execution is only recorded, as operators do who have
        acted by hand. require_approval: refuse what requires an approval and has none.

        Raises Conflict (cancelled; not approved), and with an executor what it and `Gate.dispatch`
        raise; the compensation then stays `running`, and executing it again goes on under the same
        key. A call that failed for good makes it `failed`: executing it again is another attempt.
        """
        codec.check_text(compensation_id, "compensation_id", bytes_max=RECORD_ID_BYTES_MAX)
        if executor is not None and self._scope.settings.clock == "caller":
            raise InvalidInput(
                "an executor needs the server's clock, by which its lease counts: nothing was begun; "
                "connect without clock='caller'",
                field="executor",
            )
        who = actor or operator_principal(self._scope.context.actor_id)
        called: Compensation | None = None

        async def finish(transaction: Transaction) -> Execution | None:
            found = await self._executable(transaction, compensation_id, require_approval)
            if found is None or isinstance(found, Execution):
                return found
            now = transaction.now_ms
            if called is None:
                running = recovery.begun(found, actor=who, reason=reason, now_ms=now)
            else:
                running = self._still_running(found, called)
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
            for before, letter in zip(letters, linked, strict=True):
                if letter is not before:
                    await put(transaction, DEAD_LETTERS, letter)
            return Execution(compensation=done, receipt_effect=receipt, linked_dead_letters=linked)

        if executor is not None:
            begun = await self._begin(compensation_id, who, reason, require_approval, now_ms)
            if begun is None or isinstance(begun, Execution):
                return begun
            made = await self._make(begun, executor)
            if made is not None:
                return await self._unmade(begun, made, now_ms)
            called = begun
        return await self._store.transact(finish, line=compensation_id, now_ms=now_ms)

    def _still_running(self, found: Compensation, called: Compensation) -> Compensation:
        """The compensation whose call was made; Conflict where it was taken from under its executor."""
        if found.status in ("running", "failed") and found.attempts == called.attempts:
            return msgspec.structs.replace(found, status="running")
        raise Conflict(
            f"stateful compensation `{found.compensation_id}` became `{found.status}` while it was "
            f"executed: its call was made (attempt {called.attempts}), and the gate knows its outcome, but "
            "no receipt was written; compare both",
            tenant=self._scope.tag,
            id=found.compensation_id,
            status=found.status,
        )

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

        return await self._store.transact(begin, line=compensation_id, now_ms=now_ms)

    async def _make(self, running: Compensation, executor: Executor) -> Intent | None:
        """Make the compensating call of an attempt, once; one that was made before is not repeated.

        None where it was sent, else its intent.
        """
        row = recovery.outbox_row(running, running.updated_at_ms)
        event = PreSendEvent(
            dispatch_id=row["idempotency_key"],
            tool=row["tool"],
            canonical_tool=row["operation"],
            source=Source(kind="stateful_compensation", run_id=running.run_id),
            external_side_effect=True,
        )
        id = outbox_id(event.dispatch_id)
        try:
            async with self._gate.dispatch(event) as permit:
                permit.begin()
                result = await executor(running, permit)
                if not permit.has_spoken:
                    await permit.sent(result)
        except Conflict as refused:
            if refused.id != id or refused.status not in ("sent", "failed"):
                raise
        intent = await self._store.intent(id)
        return None if intent is None or intent.status == "sent" else intent

    async def _unmade(
        self, called: Compensation, intent: Intent, now_ms: int | None
    ) -> Execution | None:
        """What an execution led to whose call failed, or was certainly not made."""

        async def note(transaction: Transaction) -> Execution | None:
            found = await get(transaction, COMPENSATIONS, called.compensation_id)
            if found is None:
                return None
            if intent.status == "failed" and found.status == "running":
                error = next((fact.error for fact in reversed(intent.facts) if fact.error), None)
                found = recovery.failed(found, error, transaction.now_ms)
                await put(transaction, COMPENSATIONS, found)
            return Execution(compensation=found)

        return await self._store.transact(note, line=called.compensation_id, now_ms=now_ms)

    async def _letters_of(
        self, transaction: Transaction, compensation: Compensation
    ) -> list[DeadLetter]:
        """The dead letters that a compensation settles."""
        about = {"settled_by": compensation.compensation_id}
        return await self._about(transaction, DEAD_LETTERS, about)

    async def _about(
        self,
        transaction: Transaction,
        collection: Collection[Record],
        about: Mapping[str, str],
        *,
        also: str | None = None,
    ) -> list[Record]:
        """The records that are about others, and one more by its id, read for this transaction."""
        names: dict[str, None] = {}
        for what, id in about.items():
            after: str | None = ""
            while after is not None:
                found, after = await self._store.page(
                    collection.name,
                    list_about(collection, what, id),
                    limit=WALK_ROWS,
                    after=after,
                    now_ms=transaction.given_ms,
                )
                names |= dict.fromkeys(one.name for one in found)
        if also is not None:
            names[collection.name_of(also)] = None
        docs = await transaction.get_many(list(names))
        return [collection.decode(doc) for doc in docs if doc is not None]

    # --- what time does (4.9, 4.10) ---------------------------------------------------------------

    async def retry_dead_letters(self, *, now_ms: int | None = None) -> int:
        """Try again what operators asked for: `retrying.retry_dead_letters`."""
        return await retry_dead_letters(self._store, now_ms=now_ms)

    async def prune(self, retention_ms: int, *, now_ms: int | None = None) -> int:
        """Delete what is settled and was not touched for so long (spec 4.10); gives how many records.

        Effects that succeeded, dead letters ignored or resolved, compensations completed or cancelled;
        all else is kept for ever. 0 = nothing. Intents are forgotten by the gate itself.
        """
        codec.check_whole(retention_ms, "retention_ms", 0, codec.DURATION_MS_MAX)
        cutoff = await self._store.now_ms(now_ms) - retention_ms
        if retention_ms == 0 or cutoff <= 0:
            return 0
        gone = 0
        for collection, statuses in SETTLED:
            after: str | None = ""
            while after is not None:
                found, after = await self._store.page(
                    collection.name,
                    collection.name,
                    limit=PRUNE_ROWS,
                    after=after,
                    newest=False,
                    upto=cutoff - 1,
                    statuses=statuses,
                    now_ms=now_ms,
                )
                names = [one.name for one in found]
                gone += await self._drop_settled(collection, statuses, names, cutoff, now_ms)
        return gone

    async def _drop_settled(
        self,
        collection: Collection[Any],
        statuses: tuple[str, ...],
        names: list[str],
        cutoff: int,
        now_ms: int | None,
    ) -> int:
        async def delete(transaction: Transaction) -> int:
            count = 0
            docs = await transaction.get_many(names) if names else []
            for doc in docs:
                record = None if doc is None else collection.decode(doc)
                # Touched since the page was read: not settled any more, or not for long enough.
                if record and record.status in statuses and record.updated_at_ms < cutoff:
                    await drop(transaction, collection, record)
                    count += 1
            return count

        return await self._store.transact(delete, now_ms=now_ms)


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
    transaction.drop(name)


# --- intents as the ledger writes them ------------------------------------------------------------

_STATE_FIELDS = frozenset(
    {
        *("outbox_id", "status", "attempts", "created_at_ms", "updated_at_ms", "claimed_at_ms"),
        *("claim_expires_at_ms", "owner"),
    }
)


def fields_of(intent: Intent) -> dict[str, Any]:
    """An intent's fields as the specification has them (spec 4.2), and its owner."""
    fields: dict[str, Any] = msgspec.to_builtins(intent)
    return fields


def put_intent(transaction: Transaction, row: Mapping[str, Any], revision: int) -> None:
    """Write an intent from its fields; what its state line holds is not in its document."""
    key = row.get("idempotency_key")
    words = " ".join(
        [
            row["status"],
            str(row["attempts"]),
            str(row["created_at_ms"]),
            str(row["updated_at_ms"]),
            str(row.get("claimed_at_ms") or 0),
            run_word(row.get("run_id")),
            key_digest(key) if key else "~",
            row.get("owner") or row.get("claimed_by") or "",
        ]
    )
    document = {name: value for name, value in row.items() if name not in _STATE_FIELDS}
    codec.canonical_json(document, "intent", bytes_max=codec.PAYLOAD_BYTES_DEFAULT)
    transaction.put_intent(
        row["outbox_id"], revision, IntentChange(words, msgspec.json.encode(document))
    )
