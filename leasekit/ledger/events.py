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
from leasekit.errors import Conflict, CorruptState, InvalidInput, LeasekitError
from leasekit.keys import encode_word
from leasekit.ledger import phases
from leasekit.ledger.filing import SNAPSHOTS, check_scope
from leasekit.ledger.records import RunEvent, RunSnapshot, StatefulRuntimeScope
from leasekit.ledger.store import Store, Transaction
from leasekit.model import TenantContext
from leasekit.scope import word_of
from leasekit.scripts import Argument, Script, script

__all__ = ["Appended", "EventWindow", "Events", "Snapshots"]

WINDOW_DEFAULT = 250
COMPACTED = "stateful_runtime.event_log_compacted"
# A marker lists what it stands for: one that has grown to this stays, and the next one begins.
MARKER_EVENTS_MAX = 10_000
# Places above it could be counted on no further (lua/ledger/append.lua).
SEQ_MAX = 10**15
PRUNE_ROWS = 100
VARIANT = ("now_ms", "run", "marker", "place", "token", "event")

_APPEND = script("ledger/append", item=("event_id", "seq", "event"))
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
        """Add an event to the log of its run, once by its id: the same id again gets the first place,
        whatever else the event says, also long after it was compacted.

        The log gives the place, one above the last; the event's own `seq` counts only with `keep_seq`:
        Conflict where another event has that place. `is_new` may be False for an event of this very
        call, where its reply was lost and the client sent it again.
        """
        _check_event(event, keep_seq=keep_seq)
        check_scope(self._store.scope, event)
        scope = self._store.scope
        doc = codec.canonical_json(event, "event", bytes_max=codec.PAYLOAD_BYTES_DEFAULT)
        if scope.must_register:
            await scope.register()
        appended: Appended = await scope.coalescer.submit(
            _APPEND,
            scope.tag,
            (scope.now_argument(now_ms), encode_word(event.run_id)),
            self._bind,
            (event.event_id, event.seq if keep_seq else "", doc),
            _read_appended,
            context=event,
            size=len(doc),
        )
        return appended

    async def append_and_read(self, event: RunEvent, *, now_ms: int | None = None) -> RunEvent:
        """Add an event, and give it as it stands in the log: where its id was known, as it was first
        added (as given, but for its place, once that one was compacted)."""
        appended = await self.append(event, now_ms=now_ms)
        if not appended.is_new:
            first = await self.list(
                event.run_id, after_seq=appended.seq - 1, limit=1, now_ms=now_ms
            )
            if first.events and first.events[0].event_id == event.event_id:
                return first.events[0]
        return msgspec.structs.replace(event, seq=appended.seq)

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
        events = [_read_event(*found) for found in reply[3:]]
        return EventWindow(events, bool(reply[1]), int(reply[2]))

    async def compact(self, run_id: str, *, retention_ms: int, now_ms: int | None = None) -> int:
        """Replace the events of a run that are older than `retention_ms`, and stand before its newest
        snapshot, by one marker (spec 7.4); gives how many went. 0 = off.

        The sequence goes on, and no id is ever taken for new again. At most 1 000 events go at a time,
        from the start of the log, and none where others compacted it in the same moment: call it again
        until it gives 0. It ends at the first 1 000 events of which none is old.
        """
        codec.check_text(run_id, "run_id")
        codec.check_whole(retention_ms, "retention_ms", 0, codec.DURATION_MS_MAX)
        if retention_ms == 0:
            return 0
        scope = self._store.scope
        now = await self._store.now_ms(now_ms)
        newest = await Snapshots(self._store).list(run_id, limit=1, now_ms=now_ms)
        window = await self._oldest(run_id, newest[0].seq if newest else None, now_ms)
        gone = [
            event
            for event in window
            if event.event_type != COMPACTED and event.occurred_at_ms < now - retention_ms
        ]
        if not gone:
            return 0
        old = [*_foldable(window, len(gone)), *gone]
        marker = _marker(old, scope.context, now)
        # Its name makes it a call of its own, and lets it be repeated.
        variant = (
            *(scope.now_argument(now_ms), encode_word(run_id), marker.event_id, marker.seq),
            *(codec.new_token(), msgspec.json.encode(marker)),
        )
        is_compacted: bool = await scope.coalescer.submit(
            _COMPACT,
            scope.tag,
            variant,
            self._bind,
            [event.event_id for event in old],
            lambda item, context, reply: word_of(item) == "compacted",
        )
        return len(gone) if is_compacted else 0

    async def _oldest(
        self, run_id: str, before_seq: int | None, now_ms: int | None
    ) -> Sequence[RunEvent]:
        """The first events of a log; markers before them only where they share the last window."""
        after_seq: int | None = None
        while True:
            window = await self.list(
                run_id,
                after_seq=after_seq,
                before_seq=before_seq,
                limit=codec.BATCH_MAX,
                now_ms=now_ms,
            )
            has_events = any(event.event_type != COMPACTED for event in window.events)
            if has_events or not window.more:
                return window.events
            after_seq = window.events[-1].seq

    def _bind(self, one: Script, variant: Variant, repeat: bool) -> Sequence[Argument]:
        """Keys and arguments of a call."""
        given = dict(zip(VARIANT, variant, strict=False))
        run = given.pop("run")
        scope = self._store.scope
        return scope.bind(one, given, **_keys(scope, run))


def _keys(scope: Any, run: str) -> dict[str, str]:
    return {noun: scope.keys.named("ledger", noun, run) for noun in ("log", "events")}


def _check_event(event: RunEvent, *, keep_seq: bool) -> None:
    if not isinstance(event, RunEvent):
        raise InvalidInput(f"event must be a RunEvent, not {type(event).__name__}", field="event")
    codec.check_text(event.event_id, "event_id")
    codec.check_text(event.run_id, "run_id")
    codec.check_text(event.event_type, "event_type")
    codec.check_whole(event.occurred_at_ms, "occurred_at_ms", 0, codec.INSTANT_MS_MAX)
    if keep_seq:
        codec.check_whole(event.seq, "seq", 1, SEQ_MAX)
    if event.event_type == COMPACTED:
        raise InvalidInput(
            f"an event of type {COMPACTED} stands for events that went: nothing was added; only "
            "`compact` writes it",
            field="event_type",
        )


def _read_appended(item: Any, event: RunEvent, reply: Reply) -> Appended | LeasekitError:
    outcome = word_of(item)
    if outcome == "taken":
        return Conflict(
            f"place {event.seq} in the log of run {event.run_id} is another event's: nothing was "
            "added; leave out keep_seq to get the next place",
            id=event.event_id,
        )
    return Appended(outcome == "appended", int(item[1]))


def _read_event(id: bytes, seq: bytes, doc: bytes) -> RunEvent:
    if not doc:
        raise CorruptState(
            f"the event {id.decode()} stands in the log of its run at place {seq.decode()} but is not "
            "there: compare with a snapshot",
            id=id.decode(),
        )
    event = msgspec.json.decode(doc, type=RunEvent)
    return msgspec.structs.replace(event, seq=int(seq))


def _foldable(window: Sequence[RunEvent], room_for: int) -> list[RunEvent]:
    """The markers of a window that one marker can take up beside so many events, in their order."""
    room = MARKER_EVENTS_MAX - room_for
    folded: list[RunEvent] = []
    for event in reversed(window):
        if event.event_type == COMPACTED and len(event.payload["compacted_event_ids"]) <= room:
            room -= len(event.payload["compacted_event_ids"])
            folded.append(event)
    return folded[::-1]


def _marker(old: Sequence[RunEvent], context: TenantContext, now: int) -> RunEvent:
    """What stands for the events that went (spec 7.4); older markers are folded into it."""
    last = max(old, key=lambda event: event.seq)
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
            "compacted_event_ids": sorted(ids, key=lambda one: one["seq"]),
            "source": "stateful_event_log_compaction",
        },
    )


class Snapshots:
    """`tenant.ledger.snapshots`: runs as they were at their events."""

    __slots__ = ("_store",)

    def __init__(self, store: Store) -> None:
        self._store = store

    async def put(self, snapshot: RunSnapshot, *, now_ms: int | None = None) -> RunSnapshot:
        """Write a snapshot; one with the same run and id is replaced (spec 7.5). Phase, history and
        next phases that it leaves out are those of its status. Gives it as it is kept."""
        codec.check_text(snapshot.run_id, "run_id")
        codec.check_text(snapshot.snapshot_id, "snapshot_id")
        codec.check_whole(snapshot.seq, "seq", 0, codec.INSTANT_MS_MAX)
        codec.check_whole(snapshot.created_at_ms, "created_at_ms", 0, codec.INSTANT_MS_MAX)
        check_scope(self._store.scope, snapshot)
        kept = phases.filled(snapshot, snapshot.created_at_ms)

        async def write(transaction: Transaction) -> RunSnapshot:
            name = SNAPSHOTS.name_for(kept)
            await transaction.get(name)
            transaction.put(name, SNAPSHOTS.listed(kept), SNAPSHOTS.encode(kept))
            return kept

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
        """Delete a run's snapshots that are older than `retention_ms`, but the newest `keep` (1..1 000);
        gives how many went. 0 = off. Walks the run's snapshots, 100 at a time."""
        codec.check_text(run_id, "run_id")
        codec.check_whole(retention_ms, "retention_ms", 0, codec.DURATION_MS_MAX)
        codec.check_whole(keep, "keep", 1, codec.BATCH_MAX)
        if retention_ms == 0:
            return 0
        cutoff = await self._store.now_ms(now_ms) - retention_ms
        # A snapshot that is put meanwhile is newer, or as new: those kept are at least so many.
        newest = await self.list(run_id, limit=keep, now_ms=now_ms)
        kept = {snapshot.snapshot_id for snapshot in newest}
        deleted = 0
        after: str | None = ""
        while after is not None:
            page, after = await self._store.page(
                SNAPSHOTS.name,
                SNAPSHOTS.list_of(run_id),
                limit=PRUNE_ROWS,
                after=after,
                newest=False,
                now_ms=now_ms,
            )
            old = [
                one.name
                for one in page
                if (snapshot := SNAPSHOTS.decode(one.doc)).run_id == run_id
                and snapshot.snapshot_id not in kept
                and snapshot.created_at_ms < cutoff
            ]
            deleted += await self._delete(old, cutoff, now_ms)
        return deleted

    async def _delete(self, names: Sequence[str], cutoff: int, now_ms: int | None) -> int:
        """Delete those snapshots that are still as old."""

        async def delete(transaction: Transaction) -> int:
            docs = await asyncio.gather(*(transaction.get(name) for name in names))
            deleted = 0
            for name, doc in zip(names, docs, strict=True):
                if doc is None or SNAPSHOTS.decode(doc).created_at_ms >= cutoff:
                    continue
                transaction.drop(name)
                deleted += 1
            return deleted

        return await self._store.transact(delete, now_ms=now_ms)
