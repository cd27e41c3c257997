"""The logs of runs: events in a sequence, each once, and snapshots of a run at its events.

Source: spec/reliability 7.1-7.5; lua/PROTOCOL.md, "Ledger".
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from leasekit import codec
from leasekit.coalesce import Reply, Variant
from leasekit.errors import InvalidInput
from leasekit.keys import encode_word
from leasekit.ledger.filing import SNAPSHOTS
from leasekit.ledger.records import RunEvent, RunSnapshot, StatefulRuntimeScope
from leasekit.ledger.store import Store, Transaction
from leasekit.scope import word_of
from leasekit.scripts import Argument, Script, script

__all__ = ["Appended", "EventWindow", "Events", "Snapshots"]

WINDOW_DEFAULT = 250
COMPACTED = "stateful_runtime.event_log_compacted"

_APPEND = script("ledger/append", item=("event_id", "seq", "occurred_at", "event"))
_EVENTS = script("ledger/events")
_COMPACT = script("ledger/compact", item=("event_id",))


class Appended(msgspec.Struct, frozen=True):
    """Whether an event was new, and its place in the log of its run."""

    is_new: bool
    seq: int


class EventWindow(msgspec.Struct, frozen=True):
    """Events in ascending order; more: there are further ones in the direction of the window.

    last_seq: the last place that the run's log ever gave, compacted events included.
    """

    events: list[RunEvent]
    more: bool
    last_seq: int


class Events:
    """`tenant.ledger.events`: one log a run."""

    __slots__ = ("_store",)

    def __init__(self, store: Store) -> None:
        self._store = store

    async def append(
        self, event: RunEvent, *, keep_seq: bool = False, now_ms: int | None = None
    ) -> Appended:
        """Add an event to the log of its run, once by its id: the same id again gets the first place.

        The log gives the place, one above the last; keep_seq: the event's own `seq` is its place.
        """
        codec.check_text(event.event_id, "event_id")
        codec.check_text(event.run_id, "run_id")
        codec.check_whole(event.occurred_at_ms, "occurred_at_ms", 0, codec.INSTANT_MS_MAX)
        codec.check_whole(event.seq, "seq", 0, codec.INSTANT_MS_MAX)
        scope = self._store.scope
        doc = codec.canonical_json(event, "event", bytes_max=codec.PAYLOAD_BYTES_DEFAULT)
        if scope.must_register:
            await scope.register()
        appended: Appended = await scope.coalescer.submit(
            _APPEND,
            scope.tag,
            (scope.now_argument(now_ms), encode_word(event.run_id)),
            self._bind,
            (event.event_id, event.seq if keep_seq else "", event.occurred_at_ms, doc),
            _read_appended,
            size=len(doc),
        )
        return appended

    async def list(
        self,
        run_id: str,
        *,
        after_seq: int | None = None,
        before_seq: int | None = None,
        limit: int = WINDOW_DEFAULT,
        tail: bool = False,
        now_ms: int | None = None,
    ) -> EventWindow:
        """A window of a run's log (spec 7.3), both bounds exclusive: the first events, or the last ones
        with `tail`. limit: 1..1 000; a window also ends at 4 MiB."""
        codec.check_text(run_id, "run_id")
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        for bound in (after_seq, before_seq):
            if bound is not None:
                codec.check_whole(bound, "seq", 0, codec.INSTANT_MS_MAX)
        scope = self._store.scope
        reply = await scope.read(
            _EVENTS,
            {
                "now_ms": scope.now_argument(now_ms),
                "after": "" if after_seq is None else after_seq,
                "before": "" if before_seq is None else before_seq,
                "limit": limit,
                "tail": int(tail),
            },
            **_keys(scope, encode_word(run_id)),
        )
        events = [_read_event(seq, doc) for _, seq, doc in reply[3:]]
        return EventWindow(events, bool(reply[1]), int(reply[2]))

    async def compact(self, run_id: str, *, retention_ms: int, now_ms: int | None = None) -> int:
        """Replace the events of a run that are older than `retention_ms`, and older than its newest
        snapshot, by one marker (spec 7.4); gives how many went. 0 = off. The sequence goes on, and no
        id is ever taken for new again. At most 1 000 events go at a time: call it again.
        """
        codec.check_whole(retention_ms, "retention_ms", 0, codec.DURATION_MS_MAX)
        if retention_ms == 0:
            return 0
        scope = self._store.scope
        now = await self._store.now_ms(now_ms)
        newest = await self._store.page(
            SNAPSHOTS.name, SNAPSHOTS.list_of(run_id), limit=1, now_ms=now_ms
        )
        kept_from = None
        if newest[0]:
            kept_from = SNAPSHOTS.decode(newest[0][0].doc).seq
        window = await self.list(run_id, before_seq=kept_from, limit=codec.BATCH_MAX, now_ms=now_ms)
        old = [
            event
            for event in window.events
            if event.occurred_at_ms < now - retention_ms or event.event_type == COMPACTED
        ]
        gone = [event for event in old if event.event_type != COMPACTED]
        if not gone:
            return 0
        marker = _marker(old, scope.context, now)
        doc = msgspec.json.encode(marker)
        await asyncio.gather(
            *[
                scope.coalescer.submit(
                    _COMPACT,
                    scope.tag,
                    (
                        scope.now_argument(now_ms),
                        encode_word(run_id),
                        marker.event_id,
                        marker.seq,
                        doc,
                    ),
                    self._bind,
                    (event.event_id,),
                    lambda item, context, reply: word_of(item),
                )
                for event in old
                if event.event_id != marker.event_id
            ]
        )
        return len(gone)

    def _bind(self, one: Script, variant: Variant, repeat: bool) -> Sequence[Argument]:
        """Keys and arguments of a call; a variant is now_ms, the run, and a marker with its place."""
        names = ("now_ms", "run", "marker", "place", "event")
        given = dict(zip(names, variant, strict=False))
        run = given.pop("run")
        scope = self._store.scope
        return scope.bind(one, given, **_keys(scope, run))


def _keys(scope: Any, run: str) -> dict[str, str]:
    return {noun: scope.keys.named("ledger", noun, run) for noun in ("log", "events")}


def _read_appended(item: Any, context: None, reply: Reply) -> Appended:
    return Appended(word_of(item) == "appended", int(item[1]))


def _read_event(seq: bytes, doc: bytes) -> RunEvent:
    event = msgspec.json.decode(doc, type=RunEvent)
    return msgspec.structs.replace(event, seq=int(seq))


def _marker(old: Sequence[RunEvent], context: Any, now: int) -> RunEvent:
    """What stands for the events that went (spec 7.4); older markers are folded into it."""
    last = old[-1]
    ids: list[dict[str, Any]] = []
    pruned, through = 0, 0
    for event in old:
        if event.event_type == COMPACTED:
            ids += event.payload["compacted_event_ids"]
            pruned += event.payload["pruned_events"]
            through = max(through, event.payload["compacted_through_ms"])
        else:
            ids.append({"event_id": event.event_id, "seq": event.seq})
            pruned += 1
            through = max(through, event.occurred_at_ms)
    parts = [
        *(context.org_id, context.workspace_id, context.deployment_id or ""),
        *(last.run_id, str(last.seq)),
    ]
    return RunEvent(
        event_id="stateful-compaction-" + codec.hash_terminated(parts),
        run_id=last.run_id,
        seq=last.seq,
        event_type=COMPACTED,
        occurred_at_ms=now,
        scope=StatefulRuntimeScope(tenant_context=context),
        payload={
            "compacted_through_seq": last.seq,
            "compacted_through_ms": through,
            "pruned_events": pruned,
            "compacted_event_ids": ids,
            "source": "stateful_event_log_compaction",
        },
    )


class Snapshots:
    """`tenant.ledger.snapshots`: runs as they were at their events."""

    __slots__ = ("_store",)

    def __init__(self, store: Store) -> None:
        self._store = store

    async def put(self, snapshot: RunSnapshot, *, now_ms: int | None = None) -> RunSnapshot:
        """Write a snapshot; one with the same run and id is replaced (spec 7.5)."""
        codec.check_text(snapshot.run_id, "run_id")
        codec.check_text(snapshot.snapshot_id, "snapshot_id")

        async def write(transaction: Transaction) -> RunSnapshot:
            name = SNAPSHOTS.name_for(snapshot)
            await transaction.get(name)
            transaction.put(name, SNAPSHOTS.listed(snapshot), SNAPSHOTS.encode(snapshot))
            return snapshot

        return await self._store.transact(write, now_ms=now_ms)

    async def get(
        self, run_id: str, snapshot_id: str, *, now_ms: int | None = None
    ) -> RunSnapshot | None:
        """A snapshot; None if there is none of that run and id."""
        name = SNAPSHOTS.name_of(run_id, snapshot_id)
        [found] = await self._store.get([name], now_ms=now_ms)
        return None if found is None else SNAPSHOTS.decode(found.doc)

    async def list(
        self, run_id: str, *, limit: int = WINDOW_DEFAULT, now_ms: int | None = None
    ) -> list[RunSnapshot]:
        """The newest snapshots of a run, in ascending order. limit: 1..1 000."""
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        found: list[RunSnapshot] = []
        after: str | None = ""
        while after is not None and len(found) < limit:
            page, after = await self._store.page(
                SNAPSHOTS.name,
                SNAPSHOTS.list_of(run_id),
                limit=limit,
                after=after,
                now_ms=now_ms,
            )
            # Lists know runs by their normalised names; a snapshot belongs to one run alone.
            decoded = [SNAPSHOTS.decode(one.doc) for one in page]
            found += [snapshot for snapshot in decoded if snapshot.run_id == run_id]
        return found[:limit][::-1]

    async def prune(
        self, run_id: str, *, retention_ms: int, keep: int = 3, now_ms: int | None = None
    ) -> int:
        """Delete a run's snapshots that are older than `retention_ms`, but the newest `keep` (>= 1);
        gives how many went. 0 = off."""
        codec.check_whole(retention_ms, "retention_ms", 0, codec.DURATION_MS_MAX)
        if keep < 1:
            raise InvalidInput("keep must be at least 1", field="keep", limit=1)
        if retention_ms == 0:
            return 0
        now = await self._store.now_ms(now_ms)
        newest = (await self.list(run_id, limit=codec.BATCH_MAX, now_ms=now_ms))[::-1]
        old = [one for one in newest[keep:] if one.created_at_ms < now - retention_ms]

        async def delete(transaction: Transaction) -> None:
            for snapshot in old:
                name = SNAPSHOTS.name_for(snapshot)
                if await transaction.get(name) is not None:
                    transaction.drop(name, SNAPSHOTS.run_of(snapshot))

        await self._store.transact(delete, now_ms=now_ms)
        return len(old)
