"""Pages of the four collections that the reliability views show, filtered and with their cursors.

A cursor is the id of a record: the page goes on behind it. A filtered page reads on until it is full, or
until it has looked at CALLS_MAX times 1 000 records; then it is short, and says where it stopped.

Source: spec/reliability 4.11, 6.7.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from leasekit import codec
from leasekit.errors import InvalidInput
from leasekit.gate import Gate, Intent, IntentStatus
from leasekit.keys import decode_word
from leasekit.ledger.filing import (
    COMPENSATIONS,
    DEAD_LETTERS,
    EFFECTS,
    Collection,
    is_off,
    run_word,
    word,
)
from leasekit.ledger.store import RECORD_ID_BYTES_MAX, Store
from leasekit.scope import decode_cursor, encode_cursor

__all__ = ["COLLECTIONS", "LIMIT_DEFAULT", "Filters", "Found", "Reader", "clamped"]

LIMIT_DEFAULT = 250
LIMIT_MAX = 1_000
CALLS_MAX = 100

COLLECTIONS: Final = ("outbox", "tool_effects", "dead_letters", "compensations")
_STORED: dict[str, Collection[Any]] = {
    "tool_effects": EFFECTS,
    "dead_letters": DEAD_LETTERS,
    "compensations": COMPENSATIONS,
}
_ID_FIELD = {
    "outbox": "outbox_id",
    "tool_effects": "effect_id",
    "dead_letters": "dead_letter_id",
    "compensations": "compensation_id",
}
_BY_SOURCE = frozenset({"tool_effects", "dead_letters"})
_OURS = frozenset(
    {
        *("cause", "revision", "fence", "on_expiry", "owner", "unknown_since_ms", "asks"),
        *("ask_at_ms", "facts"),
    }
)


def clamped(limit: int | None, *, default: int = LIMIT_DEFAULT, most: int = LIMIT_MAX) -> int:
    """A limit brought within its bounds, as these views do instead of refusing it.

    InvalidInput for what is no whole number.
    """
    if limit is None:
        return default
    if type(limit) is not int:
        raise InvalidInput(
            f"limit must be a whole number, not {type(limit).__name__}", field="limit"
        )
    return min(max(limit, 1), most)


class Filters(msgspec.Struct, frozen=True, kw_only=True):
    """What a page is to show; `active_only`: what is neither superseded nor at its end.

    All are compared normalised (spec 0.2); blank and `all` are off. Outbox and compensations have no
    source, outbox and effects are always active: there these filters let everything through.
    """

    run_id: str | None = None
    status: str | None = None
    source_type: str | None = None
    active_only: bool = False
    before_created_at_ms: int | None = None

    def check(self) -> None:
        """InvalidInput, naming the field, for what cannot be compared with."""
        for field in ("run_id", "status", "source_type"):
            text = getattr(self, field)
            if text is not None and not (isinstance(text, str) and is_off(text)):
                codec.check_text(text, field)
        if self.before_created_at_ms is not None:
            codec.check_whole(
                self.before_created_at_ms, "before_created_at_ms", 0, codec.INSTANT_MS_MAX
            )


class Found(msgspec.Struct, frozen=True):
    """Records as JSON objects. stopped_at: the id of the last record looked at, where the search was
    broken off before the page was full and the list at its end; else None."""

    rows: list[dict[str, Any]]
    stopped_at: str | None = None


class Reader:
    """Reads pages of one tenant's records."""

    def __init__(self, store: Store, gate: Gate) -> None:
        self.store = store
        self._gate = gate

    async def page(
        self,
        collection: str,
        filters: Filters,
        *,
        limit: int,
        after_id: str | None = None,
        after_scan: bool = False,
        now_ms: int | None = None,
    ) -> Found:
        """Records of a collection, the last changed first; none behind an id that run, status, source
        and activity do not let through (spec 4.11), but with `after_scan`: behind any id.

        Looks at the records of the run only, or at all; at no more than are wanted where only a run
        is asked for, else at CALLS_MAX times 1 000.
        """
        filters.check()
        after = ""
        if after_id is not None:
            place = await self._place(collection, after_id, filters, after_scan, now_ms)
            if place is None:
                return Found([])
            after = place
        if collection == "outbox":
            return await self._intents(filters, limit, after or None, now_ms)
        return await self._records(collection, filters, limit, after, now_ms)

    async def shows(
        self, collection: str, id: str, filters: Filters, now_ms: int | None = None
    ) -> bool:
        """Whether there is a record of that id that run, status, source and activity let through."""
        return await self._place(collection, id, filters, False, now_ms) is not None

    async def _place(
        self, collection: str, id: str, filters: Filters, is_any: bool, now_ms: int | None
    ) -> str | None:
        """Where a record stands in the list that these filters read; None for one that they do not
        let through (is_any: that is not in the list), or that is not there."""
        run_id = None if is_off(filters.run_id) else filters.run_id
        if collection == "outbox":
            intent = await self._intent(id, now_ms)
            if intent is None or not (is_any or _lets_through(intent, filters)):
                return None
            return _cursor_at(intent, run_id)
        stored = _STORED[collection]
        [found] = await self.store.get([stored.name_of(id)], now_ms=now_ms)
        if found is None:
            return None
        listed = stored.listed(stored.decode(found.doc))
        by_source = collection in _BY_SOURCE and not is_off(filters.source_type)
        if not is_any and not (
            (is_off(filters.status) or listed.status == word(filters.status))
            and (not by_source or listed.source == word(filters.source_type))
            and (listed.is_active or not filters.active_only)
        ):
            return None
        return _tail_in(listed.places, stored.list_of(run_id))

    async def _intent(self, id: str, now_ms: int | None) -> Intent | None:
        # Records of the ledger may have longer names than intents of the gate.
        if len(id.encode()) > codec.NAME_BYTES_MAX:
            return None
        return await self._gate.get(id, now_ms=now_ms)

    async def _records(
        self, collection: str, filters: Filters, limit: int, after: str, now_ms: int | None
    ) -> Found:
        stored = _STORED[collection]
        by_source = collection in _BY_SOURCE and not is_off(filters.source_type)
        rows: list[dict[str, Any]] = []
        for _ in range(CALLS_MAX):
            page, goes_on = await self.store.page(
                stored.name,
                stored.list_of(None if is_off(filters.run_id) else filters.run_id),
                limit=limit - len(rows),
                after=after,
                statuses=() if is_off(filters.status) else (word(filters.status),),
                source=word(filters.source_type) if by_source else "",
                active_only=filters.active_only,
                created_before_ms=filters.before_created_at_ms,
                now_ms=now_ms,
            )
            rows += [msgspec.json.decode(one.doc) for one in page]
            if goes_on is None or len(rows) >= limit:
                return Found(rows)
            after = goes_on
        return Found(rows, decode_word(after.partition("|")[2]))

    async def _intents(
        self, filters: Filters, limit: int, cursor: str | None, now_ms: int | None
    ) -> Found:
        run_id = None if is_off(filters.run_id) else filters.run_id
        status = None if is_off(filters.status) else _intent_status(filters.status)
        if status is None and not is_off(filters.status):
            return Found([])
        before = filters.before_created_at_ms
        rows: list[dict[str, Any]] = []
        for _ in range(CALLS_MAX):
            page = await self._gate.list(
                status=status,
                run_id=run_id,
                # The gate knows no bound on creation: what it gives is thinned out here.
                limit=limit - len(rows) if before is None else codec.BATCH_MAX,
                cursor=cursor,
                now_ms=now_ms,
            )
            rows += [
                outbox_fields(intent)
                for intent in page.items
                if before is None or intent.created_at_ms < before
            ]
            cursor = page.next_cursor
            if cursor is None or len(rows) >= limit:
                return Found(rows[:limit])
        return Found(rows, None if cursor is None else _id_at(cursor, run_id))


def outbox_fields(intent: Intent) -> dict[str, Any]:
    """An intent as other systems know it (spec 4.2): without what only leasekit keeps of it.

    status: also `unknown`, which that specification has no word for.
    """
    fields: dict[str, Any] = msgspec.to_builtins(intent)
    shown = {name: value for name, value in fields.items() if name not in _OURS}
    return {"schema_version": intent.schema_version, "attempts": intent.attempts} | shown


def id_of(collection: str, row: dict[str, Any]) -> str:
    identity: str = row[_ID_FIELD[collection]]
    return identity


def check_anchor(text: str | None) -> str | None:
    """The id that a page is to go on behind, trimmed; None for none or a blank one."""
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    return codec.check_text(text, "after_id", bytes_max=RECORD_ID_BYTES_MAX).strip()


def _lets_through(intent: Intent, filters: Filters) -> bool:
    return (is_off(filters.run_id) or run_word(intent.run_id) == run_word(filters.run_id)) and (
        is_off(filters.status) or word(intent.status) == word(filters.status)
    )


def _intent_status(text: str | None) -> IntentStatus | None:
    try:
        return IntentStatus(codec.normalised(text or ""))
    except ValueError:
        return None


def _tail_in(places: tuple[str, ...], listed: str) -> str | None:
    """Where a record stands in one of its lists; None where it does not."""
    for one in places:
        name, _, tail = one.partition("|")
        if name == listed:
            return tail
    return None


def _cursor_at(intent: Intent, run_id: str | None) -> str:
    """The cursor of a gate's list behind an intent."""
    if run_id is None:
        return encode_cursor(str(intent.updated_at_ms), intent.outbox_id)
    return encode_cursor(f"{run_word(run_id)}:{intent.updated_at_ms:016d}:{intent.outbox_id}")


def _id_at(cursor: str, run_id: str | None) -> str:
    """The intent that a cursor of a gate's list stands behind."""
    if run_id is None:
        _, identity = decode_cursor(cursor, (str, str)) or ("", "")
        return str(identity)
    [member] = decode_cursor(cursor, (str,)) or [""]
    return str(member).split(":", 2)[2]


_LISTS = frozenset({"labels", "permissions", "data_classes", "tool_patterns"})


def picked(record: msgspec.Struct, *names: str) -> dict[str, Any]:
    """Some fields of a record as JSON; absent ones as null, absent lists as empty ones."""
    fields: dict[str, Any] = msgspec.to_builtins(record)
    return {name: fields.get(name, [] if name in _LISTS else None) for name in names}
