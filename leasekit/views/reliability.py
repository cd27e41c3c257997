"""The reliability pages: what was sent, what it did, what failed, and how it is taken back.

Source: spec/reliability 6.7.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from leasekit import codec
from leasekit.views.pages import (
    COLLECTIONS,
    Filters,
    Found,
    Reader,
    check_anchor,
    clamped,
    id_of,
)

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
    after_scan: bool = False,
    now_ms: int | None = None,
) -> dict[str, Any]:
    """One page of each collection, with counts and cursors: the body of 6.7 without what its route adds.

    The cursor moves its own collection on; the others show their first page again. A cursor whose
    collection cannot be told shows nothing; one whose record is gone, nothing of its collection.

    A page for which too much would have to be looked at (see Reader) is short, and has a cursor with
    `after_scan`: its record need not be one that the filters show. Only such a page does.
    """
    filters.check()
    size = clamped(limit)
    anchor = check_anchor(after_id)
    collection = None
    if anchor is not None:
        collection = collection_named(after_collection)
        if collection is None:
            collection = await _inferred(reader, anchor, filters, now_ms)
    pages = {name: Found([]) for name in COLLECTIONS}
    if anchor is None or collection is not None:
        found = await asyncio.gather(
            *[
                reader.page(
                    name,
                    filters,
                    limit=size,
                    after_id=anchor if name == collection else None,
                    after_scan=after_scan,
                    now_ms=now_ms,
                )
                for name in COLLECTIONS
            ]
        )
        pages = dict(zip(COLLECTIONS, found, strict=True))
    before = filters.before_created_at_ms
    return {
        **{name: page.rows for name, page in pages.items()},
        "counts": {name: len(page.rows) for name, page in pages.items()},
        "limit": size,
        "pagination": {
            "after_id": after_id,
            "after_collection": collection,
            "before_created_at_ms": before,
            "next": {name: _next(name, page, size, before) for name, page in pages.items()},
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


def _next(collection: str, page: Found, size: int, before: int | None) -> dict[str, Any] | None:
    """The cursor behind a full page, or where the search stopped; None at the end."""
    if len(page.rows) < size and page.stopped_at is None:
        return None
    is_full = len(page.rows) >= size
    cursor: dict[str, Any] = {
        "after_id": id_of(collection, page.rows[-1]) if is_full else page.stopped_at,
        "after_collection": collection,
    }
    if before is not None:
        cursor["before_created_at_ms"] = before
    if not is_full:
        cursor["after_scan"] = True
    return cursor
