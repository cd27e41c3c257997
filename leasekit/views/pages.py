"""Pages of the four collections that the reliability views show, filtered and with their cursors.

A cursor is the id of a record: the page goes on behind it. A filtered page reads on until it is full, or
until it has looked at SCAN_ROWS records; then it is short, and its cursor says where it goes on.

Source: spec/reliability 4.11, 6.7.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from leasekit import codec
from leasekit.gate import Gate, Intent, IntentStatus
from leasekit.ledger.filing import COMPENSATIONS, DEAD_LETTERS, EFFECTS, Collection, run_word, word
from leasekit.ledger.store import Store
from leasekit.scope import encode_cursor

__all__ = ["COLLECTIONS", "LIMIT_DEFAULT", "Filters", "Reader", "clamped", "is_off"]

LIMIT_DEFAULT = 250
LIMIT_MAX = 1_000
SCAN_ROWS = 200_000

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
    """A limit brought within its bounds, as these views do instead of refusing it."""
    return default if limit is None else min(max(limit, 1), most)


def is_off(text: str | None) -> bool:
    """Whether a filter does not filter: absent, blank, or `all`."""
    return text is None or codec.normalised(text) in ("", "all")


class Filters(msgspec.Struct, frozen=True, kw_only=True):
    """What a page is to show; `active_only`: what still waits for somebody."""

    run_id: str | None = None
    status: str | None = None
    source_type: str | None = None
    active_only: bool = False
    before_created_at_ms: int | None = None


class Reader:
    """Reads pages of one tenant's records."""

    def __init__(self, store: Store, gate: Gate) -> None:
        self._store = store
        self._gate = gate

    async def page(
        self,
        collection: str,
        filters: Filters,
        *,
        limit: int,
        after_id: str | None = None,
        now_ms: int | None = None,
    ) -> list[dict[str, Any]]:
        """Records of a collection as JSON objects, the last changed first; none behind an id that the
        filters do not show (spec 4.11)."""
        if after_id is not None and not await self.shows(collection, after_id, filters, now_ms):
            return []
        if collection == "outbox":
            return await self._intents(filters, limit, after_id, now_ms)
        return await self._records(collection, filters, limit, after_id, now_ms)

    async def shows(
        self, collection: str, id: str, filters: Filters, now_ms: int | None = None
    ) -> bool:
        """Whether there is a record of that id that run, status, source and activity let through."""
        if collection == "outbox":
            intent = await self._gate.get(id, now_ms=now_ms)
            return intent is not None and self._lets_through(intent, filters)
        stored = _STORED[collection]
        [found] = await self._store.get([stored.name_of(id)], now_ms=now_ms)
        if found is None:
            return False
        listed = stored.listed(stored.decode(found.doc))
        by_source = collection in _BY_SOURCE
        return (
            (is_off(filters.run_id) or listed.run == run_word(filters.run_id))
            and (is_off(filters.status) or listed.status == word(filters.status))
            and (
                not by_source
                or is_off(filters.source_type)
                or listed.source == word(filters.source_type)
            )
            and (listed.is_active or not filters.active_only)
        )

    @staticmethod
    def _lets_through(intent: Intent, filters: Filters) -> bool:
        return (is_off(filters.run_id) or run_word(intent.run_id) == run_word(filters.run_id)) and (
            is_off(filters.status) or word(intent.status) == word(filters.status)
        )

    async def _records(
        self,
        collection: str,
        filters: Filters,
        limit: int,
        after_id: str | None,
        now_ms: int | None,
    ) -> list[dict[str, Any]]:
        stored = _STORED[collection]
        run_id = None if is_off(filters.run_id) else filters.run_id
        listed = stored.list_of(run_id)
        after: str | None = ""
        if after_id is not None:
            [anchor] = await self._store.get([stored.name_of(after_id)], now_ms=now_ms)
            if anchor is None:
                return []
            after = _tail_in(stored.listed(stored.decode(anchor.doc)).places, listed)
        by_source = collection in _BY_SOURCE and not is_off(filters.source_type)
        found: list[dict[str, Any]] = []
        for _ in range(SCAN_ROWS // codec.BATCH_MAX):
            if after is None or len(found) >= limit:
                break
            page, after = await self._store.page(
                stored.name,
                listed,
                limit=limit - len(found),
                after=after,
                statuses=() if is_off(filters.status) else (word(filters.status),),
                source=word(filters.source_type) if by_source else "",
                active_only=filters.active_only,
                created_before_ms=filters.before_created_at_ms,
                now_ms=now_ms,
            )
            found += [msgspec.json.decode(one.doc) for one in page]
        return found

    async def _intents(
        self, filters: Filters, limit: int, after_id: str | None, now_ms: int | None
    ) -> list[dict[str, Any]]:
        run_id = None if is_off(filters.run_id) else filters.run_id
        status = None if is_off(filters.status) else _intent_status(filters.status)
        if status is None and not is_off(filters.status):
            return []
        cursor = None
        if after_id is not None:
            anchor = await self._gate.get(after_id, now_ms=now_ms)
            if anchor is None:
                return []
            cursor = _cursor_at(anchor, run_id)
        found: list[dict[str, Any]] = []
        for _ in range(SCAN_ROWS // codec.BATCH_MAX):
            page = await self._gate.list(
                status=status,
                run_id=run_id,
                limit=limit - len(found),
                cursor=cursor,
                now_ms=now_ms,
            )
            before = filters.before_created_at_ms
            found += [
                outbox_fields(intent)
                for intent in page.items
                if before is None or intent.created_at_ms < before
            ]
            if (cursor := page.next_cursor) is None or len(found) >= limit:
                break
        return found


def outbox_fields(intent: Intent) -> dict[str, Any]:
    """An intent as other systems know it (spec 4.2): without what only leasekit keeps of it."""
    fields: dict[str, Any] = msgspec.to_builtins(intent)
    shown = {name: value for name, value in fields.items() if name not in _OURS}
    return {"schema_version": intent.schema_version, "attempts": intent.attempts} | shown


def id_of(collection: str, row: dict[str, Any]) -> str:
    identity: str = row[_ID_FIELD[collection]]
    return identity


def _intent_status(text: str | None) -> IntentStatus | None:
    try:
        return IntentStatus(codec.normalised(text or ""))
    except ValueError:
        return None


def _tail_in(places: tuple[str, ...], listed: str) -> str:
    """Where a record stands in one of its lists."""
    for one in places:
        name, _, tail = one.partition("|")
        if name == listed:
            return tail
    raise KeyError(listed)


def _cursor_at(intent: Intent, run_id: str | None) -> str:
    """The cursor of a gate's list behind an intent."""
    if run_id is None:
        return encode_cursor(str(intent.updated_at_ms), intent.outbox_id)
    return encode_cursor(f"{run_word(run_id)}:{intent.updated_at_ms:016d}:{intent.outbox_id}")
