"""The reliability pages: what was sent, what it did, what failed, and how it is taken back.

Source: spec/reliability 6.7.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from leasekit import codec
from leasekit.views.pages import COLLECTIONS, Filters, Reader, clamped, id_of

__all__ = ["collection_named", "reliability_page"]

_NAMES = {
    "outbox": "outbox",
    "tool_effect": "tool_effects",
    "tool_effects": "tool_effects",
    "dead_letter": "dead_letters",
    "dead_letters": "dead_letters",
    "compensation": "compensations",
    "compensations": "compensations",
}


def collection_named(text: str | None) -> str | None:
    """The collection that a caller means, in any of its spellings; None for any other text."""
    return None if text is None else _NAMES.get(codec.normalised(text))


async def reliability_page(
    reader: Reader,
    filters: Filters,
    *,
    limit: int | None = None,
    after_id: str | None = None,
    after_collection: str | None = None,
    now_ms: int | None = None,
) -> dict[str, Any]:
    """One page of each collection, with counts and cursors: the body of 6.7 without what its route adds.

    The cursor moves its own collection on; the others show their first page again. A cursor whose
    collection cannot be told, or whose record is gone, shows nothing.
    """
    size = clamped(limit)
    anchor = (after_id or "").strip() or None
    collection = None
    if anchor is not None:
        collection = collection_named(after_collection)
        if collection is None:
            collection = await _inferred(reader, anchor, filters, now_ms)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in COLLECTIONS}
    if anchor is None or collection is not None:
        pages = await asyncio.gather(
            *[
                reader.page(
                    name,
                    filters,
                    limit=size,
                    after_id=anchor if name == collection else None,
                    now_ms=now_ms,
                )
                for name in COLLECTIONS
            ]
        )
        rows = dict(zip(COLLECTIONS, pages, strict=True))
    before = filters.before_created_at_ms
    return {
        **rows,
        "counts": {name: len(rows[name]) for name in COLLECTIONS},
        "limit": size,
        "pagination": {
            "after_id": after_id,
            "after_collection": collection,
            "before_created_at_ms": before,
            "next": {name: _next(name, rows[name], size, before) for name in COLLECTIONS},
        },
    }


async def _inferred(
    reader: Reader, anchor: str, filters: Filters, now_ms: int | None
) -> str | None:
    """The one collection that has a visible record of that id; None where none has, or several have."""
    anywhere = msgspec.structs.replace(filters, active_only=False, before_created_at_ms=None)
    has = await asyncio.gather(
        *[reader.shows(name, anchor, anywhere, now_ms) for name in COLLECTIONS]
    )
    found = [name for name, is_there in zip(COLLECTIONS, has, strict=True) if is_there]
    return found[0] if len(found) == 1 else None


def _next(
    collection: str, rows: list[dict[str, Any]], size: int, before: int | None
) -> dict[str, Any] | None:
    """The cursor behind a full page; None behind a short one."""
    if len(rows) < size:
        return None
    cursor: dict[str, Any] = {
        "after_id": id_of(collection, rows[-1]),
        "after_collection": collection,
    }
    if before is not None:
        cursor["before_created_at_ms"] = before
    return cursor
