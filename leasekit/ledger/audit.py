"""`tenant.ledger.audit` and `.decisions`: what was decided, and a chain that shows if it was changed.

Each tenant has a chain of its own: every event holds the hash of the one before. An event is added only
behind a head that fits, and a chain that does not fit is never added to.

Source: spec/reliability 6.12; design 9.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from leasekit import codec
from leasekit.errors import CorruptState, InvalidInput
from leasekit.ledger.filing import AUDIT, DECISIONS, check_scope
from leasekit.ledger.records import AuditEvent, PolicyDecision
from leasekit.ledger.store import Listed, Store, Transaction, name_of
from leasekit.model import Page
from leasekit.scope import PAGE_LIMIT_DEFAULT, decode_cursor, encode_cursor

__all__ = ["Audit", "Decisions", "record_hash"]

HEAD = name_of("audit_head", "head")
DECISIONS_MAX = 500
DURABILITIES = ("best_effort", "durable_required")
DECISION_WORDS = ("allow", "deny", "approval_required")


class _Head(msgspec.Struct, frozen=True):
    """Where a chain ends: place, id and hash of its last event; 0 and blank for none."""

    seq: int = 0
    event_id: str = ""
    record_hash: str = ""


def record_hash(event: AuditEvent) -> str:
    """SHA-256 over the event's JSON in the order of its fields, without the hash itself."""
    fields: dict[str, Any] = msgspec.to_builtins(event)
    fields.pop("record_hash", None)
    return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()


class Audit:
    """The audit chain of one tenant."""

    __slots__ = ("_store",)

    def __init__(self, store: Store) -> None:
        self._store = store

    async def append(
        self,
        event_type: str,
        payload: Any,
        *,
        actor: str | None = None,
        durability: Literal["best_effort", "durable_required"] = "durable_required",
        requester_context: Any = None,
        event_id: str | None = None,
        now_ms: int | None = None,
    ) -> AuditEvent:
        """Add an event to the chain; the same event_id again gives the first one back.

        Raises CorruptState where the chain's last event does not fit its head: run `verify`.
        """
        codec.check_text(event_type, "event_type")
        _check_word(durability, "durability", DURABILITIES)
        if actor is not None:
            codec.check_text(actor, "actor")
        for field, value in (("payload", payload), ("requester_context", requester_context)):
            codec.canonical_json(value, field, bytes_max=codec.DOCUMENT_BYTES_MAX)
        identity = str(uuid.uuid4()) if event_id is None else codec.check_text(event_id, "event_id")
        context = self._store.scope.context

        async def add(transaction: Transaction) -> AuditEvent:
            # The head first: whoever adds this very event meanwhile changes it as well.
            head = _head(await transaction.get(HEAD))
            name = AUDIT.name_of(identity)
            if (known := await transaction.get(name)) is not None:
                return AUDIT.decode(known)
            if head.seq and not _is_end(await transaction.get(AUDIT.name_of(head.event_id)), head):
                raise self._broken(
                    f"does not end with the event {head.event_id} (place {head.seq}) as it was added: "
                    "nothing was added",
                    head.event_id,
                )
            event = AuditEvent(
                event_id=identity,
                durability=durability,
                event_type=event_type,
                tenant_context=context,
                requester_context=requester_context,
                actor=actor if actor is not None else context.actor_id,
                payload=payload,
                created_at_ms=transaction.now_ms,
                seq=head.seq + 1,
                prev_hash=head.record_hash or None,
            )
            event = msgspec.structs.replace(event, record_hash=record_hash(event))
            transaction.put(name, AUDIT.listed(event), AUDIT.encode(event))
            end = msgspec.json.encode(_Head(event.seq, event.event_id, event.record_hash))
            transaction.put(HEAD, Listed((), event.created_at_ms, "head", "~"), end)
            return event

        return await self._store.transact(add, line=HEAD, now_ms=now_ms)

    async def list(
        self,
        *,
        limit: int = PAGE_LIMIT_DEFAULT,
        cursor: str | None = None,
        newest: bool = False,
        now_ms: int | None = None,
    ) -> Page[AuditEvent]:
        """A page of the chain, in its order or from its end. limit: 1..1 000."""
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        position = decode_cursor(cursor, (str,))
        found, after = await self._store.page(
            AUDIT.name,
            AUDIT.name,
            limit=limit,
            after=position[0] if position else "",
            newest=newest,
            now_ms=now_ms,
        )
        items = [AUDIT.decode(one.doc) for one in found]
        return Page(items, None if after is None else encode_cursor(after))

    async def verify(self, *, now_ms: int | None = None) -> int:
        """Walk the whole chain; gives the number of events. Raises CorruptState naming the first that
        does not fit: it, or one before it, was changed, added or taken out. Others may add meanwhile.
        """
        head = await self._head(now_ms)
        count = 0
        last: AuditEvent | None = None
        cursor: str | None = None
        while True:
            page = await self.list(limit=codec.BATCH_MAX, cursor=cursor, now_ms=now_ms)
            for event in page.items:
                fits = (
                    event.seq == (1 if last is None else last.seq + 1)
                    and event.prev_hash == (None if last is None else last.record_hash)
                    and event.record_hash == record_hash(event)
                )
                if not fits or (event.seq == head.seq and not _is_last(event, head)):
                    raise self._broken(
                        f"does not fit at event {event.event_id} (place {event.seq}): it, or one before "
                        "it, was changed, added or taken out",
                        event.event_id,
                    )
                last, count = event, count + 1
            if (cursor := page.next_cursor) is None:
                break
        if count < head.seq:
            raise self._broken(
                f"ends at place {count}, before its last event {head.event_id} (place {head.seq}), "
                "which was taken out",
                head.event_id,
            )
        if last is not None and count > (await self._head(now_ms)).seq:
            raise self._broken(
                f"goes on to event {last.event_id} (place {count}), which was added behind its end",
                last.event_id,
            )
        return count

    async def _head(self, now_ms: int | None) -> _Head:
        [found] = await self._store.get([HEAD], now_ms=now_ms)
        return _head(None if found is None else found.doc)

    def _broken(self, what: str, event_id: str) -> CorruptState:
        return CorruptState(
            f"the audit chain {what}; run `verify` and compare with a snapshot",
            tenant=self._store.scope.tag,
            id=event_id,
        )


def _head(doc: bytes | None) -> _Head:
    return _Head() if doc is None else msgspec.json.decode(doc, type=_Head)


def _is_end(doc: bytes | None, head: _Head) -> bool:
    """Whether the last event is there, as it was when it became the last."""
    event = None if doc is None else AUDIT.decode(doc)
    return event is not None and _is_last(event, head) and record_hash(event) == head.record_hash


def _is_last(event: AuditEvent, head: _Head) -> bool:
    ours = (event.seq, event.event_id, event.record_hash)
    return ours == (head.seq, head.event_id, head.record_hash)


def _check_word(given: str, field: str, words: Sequence[str]) -> None:
    if given not in words:
        raise InvalidInput(
            f"{field} must be one of {', '.join(words)}, not {given}: nothing was written",
            field=field,
        )


class Decisions:
    """What policies said of calls."""

    __slots__ = ("_store",)

    def __init__(self, store: Store) -> None:
        self._store = store

    async def record(
        self, decision: PolicyDecision, *, now_ms: int | None = None
    ) -> PolicyDecision:
        """Write a decision; one with the same id is replaced."""
        codec.check_text(decision.decision_id, "decision_id")
        codec.check_whole(decision.created_at_ms, "created_at_ms", 0, codec.INSTANT_MS_MAX)
        _check_word(decision.decision, "decision", DECISION_WORDS)
        check_scope(self._store.scope, decision)

        async def write(transaction: Transaction) -> PolicyDecision:
            name = DECISIONS.name_for(decision)
            await transaction.get(name)
            transaction.put(name, DECISIONS.listed(decision), DECISIONS.encode(decision))
            return decision

        return await self._store.transact(write, now_ms=now_ms)

    async def get(self, decision_id: str, *, now_ms: int | None = None) -> PolicyDecision | None:
        """A decision by its id; None if there is none."""
        codec.check_text(decision_id, "decision_id")
        [found] = await self._store.get([DECISIONS.name_of(decision_id)], now_ms=now_ms)
        return None if found is None else DECISIONS.decode(found.doc)

    async def of_run(
        self, run_id: str, *, limit: int = PAGE_LIMIT_DEFAULT, now_ms: int | None = None
    ) -> list[PolicyDecision]:
        """The decisions about a run, the newest first. limit: brought within 1 and 500."""
        wanted = min(max(limit, 1), DECISIONS_MAX)
        found: list[PolicyDecision] = []
        after: str | None = ""
        while after is not None and len(found) < wanted:
            page, after = await self._store.page(
                DECISIONS.name,
                DECISIONS.list_of(run_id),
                limit=codec.BATCH_MAX,
                after=after,
                now_ms=now_ms,
            )
            # Lists know runs by their normalised names; decisions are of one run exactly.
            decoded = [DECISIONS.decode(one.doc) for one in page]
            found += [decision for decision in decoded if decision.run_id == run_id]
        return found[:wanted]
