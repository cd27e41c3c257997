"""The outbox of a tenant: rows that wait in line, are claimed for a time, and end.

Each method is: check, encode, one item of a coalesced script call, decode. What is decided about
state is decided in lua/outbox/.

Source: spec/outbox 1; lua/PROTOCOL.md, "Outbox".
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, TypeVar

import msgspec

from leasekit import codec
from leasekit.coalesce import Coalescer, Reply, Variant, local_clock_s
from leasekit.consuming import (
    BACKOFF_MS_DEFAULT,
    DRAIN_MS_DEFAULT,
    POLL_MS_DEFAULT,
    feed,
    make_feed,
    make_pump,
)
from leasekit.durability import Durability
from leasekit.errors import Conflict, CorruptState, InvalidInput, LeasekitError, OutcomeUnknown
from leasekit.keys import decode_word, encode_word, route_of, route_parts
from leasekit.model import (
    ATTEMPTS_DEFAULT,
    AckOutcome,
    AttemptError,
    CancelOutcome,
    Counts,
    Draft,
    Enqueued,
    ExtendOutcome,
    LaneCounts,
    NackOutcome,
    Page,
    RedriveOutcome,
    ReleaseOutcome,
    ResolveOutcome,
    Row,
    RowStatus,
    RunCounts,
)
from leasekit.scope import (
    PAGE_LIMIT_DEFAULT,
    Scope,
    decode_cursor,
    encode_cursor,
    reader_of,
    word_of,
)
from leasekit.scripts import Argument, Script, script

__all__ = ["Claim", "ClaimedRows", "Outbox"]

ATTEMPTS_MAX = 1_000_000
LEASE_MS_DEFAULT = 30_000
ROUTES_REMEMBERED = 10_000
PURGE_ROWS = 250

_ENQUEUE = script("outbox/enqueue", item=("id", "draft", "available_at", "dedupe"))
_CLAIM = script("outbox/claim", item=("claim_id", "limit", "consumer"))
_ACK = script("outbox/ack", item=("id", "token"))
_NACK = script("outbox/nack", item=("id", "token", "retry_at", "permanent", "error"))
_EXTEND = script("outbox/extend", item=("id", "token", "lease_ms"))
_RELEASE = script("outbox/release", item=("id", "token"))
_CANCEL = script("outbox/cancel", item=("id",))
_REDRIVE = script("outbox/redrive", item=("id",))
_RESOLVE = script("outbox/resolve", item=("id", "verdict", "note"))
_GET = script("outbox/get", item=("id",))
_LIST = script("outbox/list")
_COUNTS = script("outbox/counts")
_PURGE = script("outbox/purge")

_COUNTED = ("pending", "claimed", "unknown", "dead_lettered", "sent", "cancelled")
_NOWHERE = "~:~"  # no lane encodes to a bare "~"
_CLAIM_HEAD = 4  # now_ms, next_due, more, damaged
_ROW_WIDTH = 5  # id, doc, attempt_count, claim_count, errors

_Word = TypeVar("_Word")

_read_ack = reader_of(AckOutcome)
_read_nack = reader_of(NackOutcome)
_read_release = reader_of(ReleaseOutcome)
_read_cancel = reader_of(CancelOutcome)
_read_redrive = reader_of(RedriveOutcome)
_read_resolve = reader_of(ResolveOutcome)


@lru_cache(maxsize=4096)
def _good_route(lane: str, target: str) -> str:
    codec.check_text(lane, "lane")
    codec.check_text(target, "target")
    return route_of(lane, target)


def _check_route(lane: str, target: str) -> str:
    """The route of a lane and a target, checked; what was good once is remembered."""
    try:
        return _good_route(lane, target)
    except TypeError:  # A value that cannot even be looked up is no text.
        codec.check_text(lane, "lane")
        codec.check_text(target, "target")
        raise


def _check_consumer(consumer: str) -> None:
    """Refuse a bad consumer; a blank one in the words of spec/outbox 1.4."""
    if isinstance(consumer, str) and (not consumer or consumer.isspace()):
        raise InvalidInput("consumer_id is required", field="consumer")
    codec.check_text(consumer, "consumer")


class Claim:
    """A row that this caller holds until `lease_expires_at_ms`, and the proof of it.

    `fence` rises with every grant: a destination that keeps the highest fence per row id can refuse
    an older holder. `remaining_ms()` counts on the local clock from before the claim was sent, so it
    is never too optimistic. `lost` is set when `run` or `consume`, which hold the row, lose it.
    What is said of the row has the durability of the claim, unless told otherwise.
    """

    __slots__ = (
        *(
            "_deadline_s",
            "_lost",
            "_outbox",
            "_through",
            "fence",
            "lease_expires_at_ms",
            "on_end",
            "row",
        ),
        "token",
    )

    def __init__(
        self,
        outbox: Outbox,
        row: Row,
        token: str,
        fence: int,
        lease_expires_at_ms: int,
        deadline_s: float,
        through: Coalescer,
    ) -> None:
        self._outbox = outbox
        self._through = through  # of the class of durability of the grant
        self.row = row
        self.token = token
        self.fence = fence
        self.lease_expires_at_ms = lease_expires_at_ms
        self._deadline_s = deadline_s
        self._lost: asyncio.Event | None = None
        # Told the word that ended this claim; whoever keeps it extended lets go then.
        self.on_end: Callable[[str], None] | None = None

    def __repr__(self) -> str:
        return (
            f"<Claim {self.row.id} {self.row.lane}/{self.row.target} "
            f"attempt {self.row.attempt_count} fence {self.fence}>"
        )

    @property
    def tenant(self) -> str:
        """The encoded name of the row's tenant."""
        return self._outbox._scope.tag

    @property
    def lost(self) -> asyncio.Event:
        """Set when the lease was lost, or given back, while somebody else kept it extended."""
        if self._lost is None:
            self._lost = asyncio.Event()
        return self._lost

    def remaining_ms(self) -> int:
        """Milliseconds left of the lease by the local clock; negative once it is over."""
        return int((self._deadline_s - local_clock_s()) * 1_000)

    async def ack(
        self,
        *,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> AckOutcome:
        """See Outbox.ack."""
        through = self._through
        if durability is not None:
            through = await self._outbox._scope.coalescer_for(durability)
        outcome = await self._outbox._ack(
            self._route, self.row.id, self.token, repeat, now_ms, through
        )
        if self.on_end is not None:
            self.on_end(outcome)
        return outcome

    async def nack(
        self,
        *,
        error: str,
        retry_at_ms: int | None = None,
        permanent: bool = False,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> NackOutcome:
        """See Outbox.nack."""
        through = self._through
        if durability is not None:
            through = await self._outbox._scope.coalescer_for(durability)
        outcome = await self._outbox._nack(
            self._route,
            self.row.id,
            self.token,
            error,
            retry_at_ms,
            permanent,
            repeat,
            now_ms,
            through,
        )
        if self.on_end is not None:
            self.on_end(outcome)
        return outcome

    async def extend(
        self,
        *,
        lease_ms: int = LEASE_MS_DEFAULT,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> ExtendOutcome:
        """See Outbox.extend; a success moves `lease_expires_at_ms` as well."""
        through = self._through
        if durability is not None:
            through = await self._outbox._scope.coalescer_for(durability)
        outcome, lease_end_ms, deadline_s = await self._outbox._extend(
            self._route, self.row.id, self.token, lease_ms, repeat, now_ms, through
        )
        if outcome is ExtendOutcome.EXTENDED:
            self.lease_expires_at_ms, self._deadline_s = lease_end_ms, deadline_s
        return outcome

    async def release(
        self,
        *,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> ReleaseOutcome:
        """See Outbox.release."""
        through = self._through
        if durability is not None:
            through = await self._outbox._scope.coalescer_for(durability)
        outcome = await self._outbox._release(
            self._route, self.row.id, self.token, repeat, now_ms, through
        )
        if self.on_end is not None:
            self.on_end(outcome)
        return outcome

    @property
    def _route(self) -> str:
        return route_of(self.row.lane, self.row.target)


class ClaimedRows(list[Claim]):
    """The claims of one call. `more`: further rows are due now; `next_due_at_ms`: when one will be
    (0 = none is in line). Both are of the moment of the claim."""

    __slots__ = ("more", "next_due_at_ms", "now_ms")

    def __init__(self, now_ms: int, next_due_at_ms: int, more: bool) -> None:
        self.now_ms = now_ms
        self.next_due_at_ms = next_due_at_ms
        self.more = more


class Outbox:
    """`tenant.outbox`. Every call may be made by thousands of coroutines at once."""

    __slots__ = ("_routes", "_scope")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        # Which route an id has is written once and never changes, so remembering it is safe.
        self._routes: OrderedDict[str, str] = OrderedDict()

    # --- producing --------------------------------------------------------------------------------

    async def enqueue(
        self,
        lane: str,
        target: str,
        payload: Any,
        *,
        id: str | None = None,
        dedupe_key: str | None = None,
        available_at_ms: int = 0,
        max_attempts: int | None = ATTEMPTS_DEFAULT,
        on_expiry: Literal["reclaim", "park"] = "reclaim",
        run_id: str | None = None,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> Enqueued:
        """Store a row, pending; or find the one that is there under the same dedupe key.

        lane, target: <= 200 bytes each. payload: any JSON value, <= the client's payload_bytes_max.
        id: from `new_id()`, where the caller wants to be able to repeat. dedupe_key: unique per lane
        and target for `Retention.dedupe_ms`. available_at_ms: not before this instant, 0 = at once.
        max_attempts: None = without end. on_expiry: see Draft. durability: None = the client's.

        Raises NotDurable (the row is there, but on too few replicas: to repeat it takes its `id`),
        Conflict (key or id is taken by other content), OutcomeUnknown (a repeated row is not
        there any more: it was finished and forgotten), InvalidInput, Overloaded, Unavailable.
        Source: spec/outbox 1.5.1.
        """
        draft = Draft(
            lane=lane,
            target=target,
            payload=payload,
            id=id,
            dedupe_key=dedupe_key,
            available_at_ms=available_at_ms,
            max_attempts=max_attempts,
            on_expiry=on_expiry,
            run_id=run_id,
        )
        encoded = self._encode(draft)
        now = self._scope.now_argument(now_ms)
        if self._scope.must_register:
            await self._scope.register()
        through = self._scope.coalescer
        if durability is not None:
            through = await self._scope.coalescer_for(durability)
        result: Enqueued = await self._enqueue(draft, encoded, now, repeat, through)
        return result

    async def enqueue_many(
        self,
        drafts: Iterable[Draft],
        *,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> list[Enqueued | LeasekitError]:
        """Enqueue up to 1 000 drafts; the answers are in their order.

        A draft that failed has its error in its place, not raised: the others have landed. Bad input
        in any draft is raised before anything is sent. durability: None = the client's.
        """
        wanted = list(drafts)
        if len(wanted) > codec.BATCH_MAX:
            raise InvalidInput(
                f"{len(wanted)} drafts at once; at most {codec.BATCH_MAX}",
                field="drafts",
                limit=codec.BATCH_MAX,
            )
        encoded = [self._encode(draft) for draft in wanted]
        now = self._scope.now_argument(now_ms)
        if self._scope.must_register:
            await self._scope.register()
        through = await self._scope.coalescer_for(durability)
        sent = [
            self._enqueue(draft, parts, now, repeat, through)
            for draft, parts in zip(wanted, encoded, strict=True)
        ]
        answers = await asyncio.gather(*sent, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, LeasekitError):
                raise answer
        return answers  # type: ignore[return-value]  # whatever else there was has been raised

    def _encode(self, draft: Draft) -> tuple[str, str, bytes, str]:
        """Id, route, draft bytes and dedupe argument; InvalidInput in the order of the spec (1.4)."""
        route = _check_route(draft.lane, draft.target)
        dedupe_key = draft.dedupe_key
        if dedupe_key is not None:
            codec.check_text(dedupe_key, "dedupe_key")
        attempts = draft.max_attempts
        if attempts is not None:
            if attempts == 0 and not isinstance(attempts, bool):
                raise InvalidInput(
                    "max_attempts must be greater than zero",
                    field="max_attempts",
                    limit=1,
                )
            codec.check_whole(attempts, "max_attempts", 1, ATTEMPTS_MAX)
        available = codec.check_whole(
            draft.available_at_ms, "available_at_ms", 0, codec.INSTANT_MS_MAX
        )
        if draft.on_expiry not in ("reclaim", "park"):
            raise InvalidInput("on_expiry must be 'reclaim' or 'park'", field="on_expiry")
        run_id = draft.run_id
        if run_id is not None:
            codec.check_text(run_id, "run_id")
        row_id = codec.new_id() if draft.id is None else codec.check_id(draft.id)
        payload = codec.canonical_json(
            draft.payload, "payload", bytes_max=self._scope.settings.payload_bytes_max
        )
        body = (
            _draft_header(available, attempts, draft.on_expiry, route, dedupe_key, run_id) + payload
        )
        if dedupe_key is None:
            return row_id, route, body, ""
        digest = codec.short_digest(route.encode(), dedupe_key.encode())
        return row_id, route, body, f"{digest} {codec.short_digest(body)}"

    def _enqueue(
        self,
        draft: Draft,
        encoded: tuple[str, str, bytes, str],
        now: str | int,
        repeat: bool,
        through: Coalescer,
    ) -> asyncio.Future[Enqueued]:
        row_id, route, body, dedupe = encoded
        return through.submit(
            _ENQUEUE,
            self._scope.tag,
            (route, now),
            self._bind,
            (row_id, body, draft.available_at_ms, dedupe),
            self._read_enqueued,
            context=(draft, row_id),
            size=len(body),
            repeat=repeat,
        )

    def _read_enqueued(
        self, item: Any, context: tuple[Draft, str], reply: Reply
    ) -> Enqueued | LeasekitError:
        draft, row_id = context
        if item == b"created":
            return Enqueued(_fresh_row(draft, row_id, reply.now_ms), True)
        word = word_of(item)
        if word == "duplicate":
            held_by = item[1].decode()
            return Enqueued(_row_of_draft(draft, held_by, item[2], item[3], reply.now_ms), False)
        tenant = self._scope.tag
        if word == "forgotten":
            return OutcomeUnknown(
                f"row {row_id} is not there, and rows as old as it have been deleted: it may have "
                "been enqueued, finished and forgotten, or never enqueued; do not enqueue it again "
                "without asking the destination",
                tenant=tenant,
                id=row_id,
            )
        held_by = item[1].decode()
        if draft.dedupe_key is None or held_by == row_id:
            text = f"id {row_id} is taken by a row with other content"
        else:
            # The words of spec/outbox 1.5.1: a caller of that system sees the message it knows.
            text = f"outbox dedupe key reused with different input: {draft.dedupe_key}"
        return Conflict(
            f"{text}; nothing was written; send the same content under it, or take another one",
            tenant=tenant,
            id=held_by,
        )

    # --- consuming --------------------------------------------------------------------------------

    async def claim(
        self,
        lane: str,
        target: str,
        *,
        limit: int = 1,
        lease_ms: int = LEASE_MS_DEFAULT,
        consumer: str,
        claim_id: str | None = None,
        gives_back: bool | None = None,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> ClaimedRows:
        """Take up to `limit` due rows of a lane and target for `lease_ms`, the longest due first.

        limit: 0..1 000. lease_ms: 0..43 200 000 (12 h); 0 = over at once. consumer: who claims, for
        people to read. claim_id: 22 characters of `new_token()`, where the caller wants to be able to
        repeat: the same claim id gets the rows again that it still holds, and no others. durability:
        None = the client's; the claims carry it.

        Rows whose attempts are used up and whose lease expired are dead-lettered instead of being
        handed out; those that park become unknown. gives_back: whether rows are released that their
        caller does not get, because it was cancelled or too few replicas have the claim (NotDurable).
        None = if it brought no claim id: whoever repeats by one must not lose them to the release.
        Source: spec/outbox 1.5.2.
        """
        route = _check_route(lane, target)
        _check_consumer(consumer)
        codec.check_whole(limit, "limit", 0, codec.BATCH_MAX)
        codec.check_whole(lease_ms, "lease_ms", 0, codec.LEASE_MS_MAX)
        token = codec.new_token() if claim_id is None else codec.check_token(claim_id, "claim_id")
        scope = self._scope
        now = scope.now_argument(now_ms)
        if scope.is_new:
            await scope.register()

        through = scope.coalescer
        if durability is not None:
            through = await scope.coalescer_for(durability)

        def give_back(rows: ClaimedRows) -> None:
            self._give_back(rows, now_ms)

        undo = give_back if (claim_id is None if gives_back is None else gives_back) else None

        future = through.submit(
            _CLAIM,
            scope.tag,
            (route, now, lease_ms),
            self._bind,
            (token, limit, consumer),
            self._read_claimed,
            context=(lane, target, token, consumer, lease_ms, through),
            rows=max(limit, 1),
            head=_CLAIM_HEAD,
            undo=undo,
            lease_ms=lease_ms,
            repeat=repeat,
        )
        try:
            claimed: ClaimedRows = await future
        except asyncio.CancelledError:
            if undo is not None:
                scope.undo_late(future, undo)
            raise
        if claimed:
            scope.stay_registered()  # Not for a look that finds nothing: idle tenants stay idle.
        return claimed

    def _read_claimed(
        self, item: Any, context: tuple[str, str, str, str, int, Coalescer], reply: Reply
    ) -> ClaimedRows:
        lane, target, token, consumer, lease_ms, through = context
        now = reply.now_ms
        claimed = ClaimedRows(now, reply.head[1], bool(reply.head[2]))
        if len(item) == 1:
            return claimed
        fence, lease_end = int(item[1]), item[2]
        deadline_s = reply.sent_at_s + (lease_end - now) / 1_000
        for at in range(3, len(item), _ROW_WIDTH):
            header, _, payload = item[at + 1].partition(b"\n")
            created, _, words = header.partition(b" ")
            created_at = int(created)
            available_at, max_attempts, on_expiry, dedupe_key, run_id = _read_draft_words(words)
            errors = item[at + 4]
            row = Row(
                id=item[at].decode(),
                lane=lane,
                target=target,
                payload=codec.decode_json(payload),
                status=RowStatus.CLAIMED,
                cause="claimed",
                attempt_count=item[at + 2],
                claim_count=item[at + 3],
                max_attempts=max_attempts,
                on_expiry=on_expiry,
                created_at_ms=created_at,
                available_at_ms=available_at or created_at,
                dedupe_key=dedupe_key,
                run_id=run_id,
                consumer=consumer,
                fence=fence,
                claimed_at_ms=lease_end - lease_ms,  # not now: this may be a repeat
                lease_expires_at_ms=lease_end,
                errors=_read_errors(errors) if errors else (),
            )
            claimed.append(Claim(self, row, token, fence, lease_end, deadline_s, through))
        return claimed

    def _give_back(self, rows: ClaimedRows, now_ms: int | None) -> None:
        """The caller was cancelled after its claim had left, or too few replicas have the grant:
        nobody works on these rows."""
        for claim in rows:
            released = self._release(
                claim._route, claim.row.id, claim.token, False, now_ms, claim._through
            )
            self._scope.in_background(released)

    async def run(
        self,
        lane: str,
        target: str,
        handler: Callable[[Claim], Awaitable[Any]],
        *,
        consumer: str | None = None,
        concurrency: int = 100,
        lease_ms: int = LEASE_MS_DEFAULT,
        handler_timeout_ms: int | None = None,
        backoff_ms: tuple[int, int] = BACKOFF_MS_DEFAULT,
        stop: asyncio.Event | None = None,
        drain_ms: int = DRAIN_MS_DEFAULT,
        poll_ms: int = POLL_MS_DEFAULT,
        counts: RunCounts | None = None,
        durability: Durability | str | None = None,
    ) -> RunCounts:
        """Claim rows of a lane and target as they become due, and call `handler(claim)` for each.

        What the handler does decides: it returns = acked; it raises Permanent = dead-lettered at once;
        RetryAfter(delay_ms) = tried again then; anything else, and taking longer than
        handler_timeout_ms = tried again after backoff_ms = (first, most), doubled each attempt, with
        jitter. While it runs its lease is extended; if that is lost, the handler is cancelled, with
        `claim.lost` set, and nothing is said of the row.

        At most `concurrency` rows are held, all of them at work. `stop` or cancellation: nothing more
        is claimed, rows at work may finish for drain_ms, then they are released and their handlers
        cancelled. A lost connection or a restarted server is waited out. poll_ms: how often to look
        without having been woken. counts: filled in while running, where given; it is what returns.
        durability: of claims, and so of what follows them, None = the client's. What too few replicas
        have is asked again while the lease lasts.

        Raises InvalidInput, and Unavailable once the client is closed. Source: spec/outbox 3.
        """
        pump = make_pump(
            self._scope.shared,
            handler=handler,
            consumer=consumer,
            concurrency=concurrency,
            lease_ms=lease_ms,
            handler_timeout_ms=handler_timeout_ms,
            backoff_ms=backoff_ms,
            drain_ms=drain_ms,
            poll_ms=poll_ms,
            counts=counts,
            durability=durability,
        )
        _check_route(lane, target)
        pump.add(self, self._scope.tag, lane, target, turn=concurrency)
        return await pump.run(stop=stop, tags=[self._scope.tag])

    def consume(
        self,
        lane: str,
        target: str,
        *,
        consumer: str | None = None,
        concurrency: int = 1,
        lease_ms: int = LEASE_MS_DEFAULT,
        stop: asyncio.Event | None = None,
        drain_ms: int = DRAIN_MS_DEFAULT,
        poll_ms: int = POLL_MS_DEFAULT,
        counts: RunCounts | None = None,
        durability: Durability | str | None = None,
    ) -> AsyncGenerator[Claim, None]:
        """`async for claim in outbox.consume(lane, target)`: rows as they become due.

        The caller finishes each claim: ack, nack or release. Until then its lease is extended, and it
        counts against `concurrency`: with 1, the next row comes when this one is finished. A claim
        that is lost has `lost` set. Leaving the loop releases what is not finished (at once with
        `contextlib.aclosing`, else when the loop is collected); `stop` ends it after drain_ms at most.
        durability: of the claims, as in `run`.
        """
        pump_and_claims = make_feed(
            self._scope.shared,
            consumer=consumer,
            concurrency=concurrency,
            lease_ms=lease_ms,
            drain_ms=drain_ms,
            poll_ms=poll_ms,
            counts=counts,
            durability=durability,
        )
        _check_route(lane, target)
        pump_and_claims[0].add(self, self._scope.tag, lane, target, turn=concurrency)
        return feed(*pump_and_claims, stop=stop, tags=[self._scope.tag])

    async def ack(
        self,
        id: str,
        token: str,
        *,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> AckOutcome:
        """Say that a claimed row was delivered.

        acked: it is sent, by this token, now or before. lost_claim: this token does not hold it (any
        more): another one may have sent it as well; nothing changed. forgotten (only for a repeat):
        the row was finished, by whom is not known any more. A late ack is good as long as nobody else
        claimed the row. durability: None = the client's. Source: spec/outbox 1.5.3.
        """
        codec.check_token(token)
        route = await self._route_of(id, now_ms)
        through = await self._scope.coalescer_for(durability)
        return await self._ack(route, id, token, repeat, now_ms, through)

    def _ack(
        self,
        route: str,
        id: str,
        token: str,
        repeat: bool,
        now_ms: int | None,
        through: Coalescer,
    ) -> asyncio.Future[AckOutcome]:
        return self._finish(
            _ACK,
            route,
            (id, token),
            _read_ack,
            repeat,
            now_ms,
            through,
        )

    async def nack(
        self,
        id: str,
        token: str,
        *,
        error: str,
        retry_at_ms: int | None = None,
        permanent: bool = False,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> NackOutcome:
        """Say that a claimed row was not delivered: it waits again, or is dead-lettered.

        error: kept with the row, cut to 2 000 characters. retry_at_ms: when it may be claimed again,
        None = now, the past is allowed. permanent: dead-letter it whatever attempts are left.
        requeued | dead_lettered (attempts used up, or permanent) | lost_claim | forgotten as in
        `ack`. durability: None = the client's. Source: spec/outbox 1.5.4.
        """
        codec.check_token(token)
        _check_retry_at(retry_at_ms)
        route = await self._route_of(id, now_ms)
        through = await self._scope.coalescer_for(durability)
        return await self._nack(
            route, id, token, error, retry_at_ms, permanent, repeat, now_ms, through
        )

    def _nack(
        self,
        route: str,
        id: str,
        token: str,
        error: str,
        retry_at_ms: int | None,
        permanent: bool,
        repeat: bool,
        now_ms: int | None,
        through: Coalescer,
    ) -> asyncio.Future[NackOutcome]:
        retry_at = _check_retry_at(retry_at_ms)
        return self._finish(
            _NACK,
            route,
            (id, token, retry_at, int(bool(permanent)), codec.error_text(error)),
            _read_nack,
            repeat,
            now_ms,
            through,
        )

    async def extend(
        self,
        id: str,
        token: str,
        *,
        lease_ms: int = LEASE_MS_DEFAULT,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> ExtendOutcome:
        """Hold a claimed row for `lease_ms` from now, never for less than before.

        extended | lost_claim: the lease has ended or was never this token's; stop the work. NotDurable:
        it counts to the end that was known before. durability: None = the client's.
        """
        codec.check_token(token)
        codec.check_whole(lease_ms, "lease_ms", 1, codec.LEASE_MS_MAX)
        route = await self._route_of(id, now_ms)
        through = await self._scope.coalescer_for(durability)
        outcome, _, _ = await self._extend(route, id, token, lease_ms, repeat, now_ms, through)
        return outcome

    async def _extend(
        self,
        route: str,
        id: str,
        token: str,
        lease_ms: int,
        repeat: bool,
        now_ms: int | None,
        through: Coalescer,
    ) -> tuple[ExtendOutcome, int, float]:
        """Outcome, lease end on the server's clock, lease end on the local clock."""
        codec.check_whole(lease_ms, "lease_ms", 1, codec.LEASE_MS_MAX)
        scope = self._scope
        now = scope.now_argument(now_ms)

        def read(item: Any, context: None, reply: Reply) -> tuple[ExtendOutcome, int, float]:
            if word_of(item) != "extended":
                return ExtendOutcome.LOST_CLAIM, 0, 0.0
            deadline_s = reply.sent_at_s + (item[1] - reply.now_ms) / 1_000
            return ExtendOutcome.EXTENDED, item[1], deadline_s

        result: tuple[ExtendOutcome, int, float] = await through.submit(
            _EXTEND,
            scope.tag,
            (route, now),
            self._bind,
            (id, token, lease_ms),
            read,
            lease_ms=lease_ms,
            repeat=repeat,
        )
        return result

    async def release(
        self,
        id: str,
        token: str,
        *,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> ReleaseOutcome:
        """Give a claimed row back untouched: the attempt is not charged, and it may be claimed at
        once. released | lost_claim | forgotten as in `ack`. durability: None = the client's."""
        codec.check_token(token)
        route = await self._route_of(id, now_ms)
        through = await self._scope.coalescer_for(durability)
        return await self._release(route, id, token, repeat, now_ms, through)

    # --- operating --------------------------------------------------------------------------------

    async def cancel(
        self,
        id: str,
        *,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> CancelOutcome:
        """Take a pending row out of the line for good.

        cancelled | not_pending (claimed, unknown or finished: nothing changed) | missing | forgotten.
        durability: None = the client's.
        """
        outcome: CancelOutcome = await self._finish(
            _CANCEL,
            await self._route_of(id, now_ms),
            (id,),
            _read_cancel,
            repeat,
            now_ms,
            await self._scope.coalescer_for(durability),
        )
        return outcome

    async def redrive(
        self,
        id: str,
        *,
        claim_count: int | None = None,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> RedriveOutcome:
        """Put a dead letter back into the line, with all its attempts before it.

        claim_count: that of the row as the caller saw it, None = as it is now; a row that was claimed
        since, and may be dead for another reason, is left alone. redriven | not_dead (nothing changed)
        | missing | forgotten. durability: None = the client's.
        """
        route, seen = await self._seen(id, claim_count, now_ms)
        outcome: RedriveOutcome = await self._finish(
            _REDRIVE,
            route,
            (id,),
            _read_redrive,
            repeat,
            now_ms,
            await self._scope.coalescer_for(durability),
            claim_count=seen,
        )
        return outcome

    async def resolve(
        self,
        id: str,
        verdict: Literal["sent", "redrive", "dead"],
        *,
        actor: str,
        reason: str,
        claim_count: int | None = None,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> ResolveOutcome:
        """Decide what became of a row that is unknown: its holder vanished, and it parks.

        verdict: `sent` (it was delivered), `redrive` (it was not: send it again), `dead` (leave it).
        actor and reason are kept with the row. claim_count: that of the row as the caller saw it, None =
        as it is now: the verdict is about that attempt and no later one. resolved | not_unknown (nothing
        changed) | missing | forgotten. durability: None = the client's.
        """
        if verdict not in ("sent", "redrive", "dead"):
            raise InvalidInput("verdict must be 'sent', 'redrive' or 'dead'", field="verdict")
        codec.check_text(actor, "actor")
        codec.check_text(reason, "reason", bytes_max=codec.ERROR_TEXT_MAX)
        route, seen = await self._seen(id, claim_count, now_ms)
        outcome: ResolveOutcome = await self._finish(
            _RESOLVE,
            route,
            (id, verdict, codec.error_text(f"{actor}: {reason}")),
            _read_resolve,
            repeat,
            now_ms,
            await self._scope.coalescer_for(durability),
            claim_count=seen,
        )
        return outcome

    async def purge(
        self,
        *,
        before_ms: int,
        dead: bool = False,
        limit: int = PURGE_ROWS,
        now_ms: int | None = None,
    ) -> int:
        """Delete up to `limit` (1..250) finished rows, or dead letters, that ended at or before
        `before_ms`, the oldest first; gives how many went."""
        codec.check_whole(before_ms, "before_ms", 0, codec.INSTANT_MS_MAX)
        codec.check_whole(limit, "limit", 1, PURGE_ROWS)
        reply = await self._scope.read(
            _PURGE,
            {
                "now_ms": self._scope.now_argument(now_ms),
                "noun": "dead" if dead else "done",
                "before_ms": before_ms,
                "limit": limit,
            },
        )
        return int(reply[1])

    # --- reading ----------------------------------------------------------------------------------

    async def get(self, id: str, *, now_ms: int | None = None) -> Row | None:
        """The row as it is now, or None."""
        found: Row | None = await self._get(codec.check_id(id), now_ms)
        return found

    async def list(
        self,
        *,
        status: RowStatus | str | None = None,
        lane: str | None = None,
        target: str | None = None,
        limit: int = PAGE_LIMIT_DEFAULT,
        cursor: str | None = None,
        now_ms: int | None = None,
    ) -> Page[Row]:
        """A page of rows: those in line by lane and due time, then the unknown, the dead letters and
        the finished ones, each by the time they got there.

        limit: 1..1 000. A filtered page looks at no more than 1 000 rows; it may be short and go on.
        """
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        wanted = None if status is None else _check_status(status)
        if lane is not None:
            codec.check_text(lane, "lane")
        if target is not None:
            codec.check_text(target, "target")
            if lane is None:
                raise InvalidInput("target is given without a lane", field="lane")
        now = self._scope.now_argument(now_ms)
        routes = "" if lane is None else route_of(lane, target or "")
        position = decode_cursor(cursor, (str, str, str))
        sections = await self._sections(wanted, routes, target is None, now)
        if position and position[0] not in [name for name, _ in sections]:
            raise InvalidInput(
                "cursor is not one that this list gave: start again without it", field="cursor"
            )
        at, score, last_id = position or ["", "", ""]
        rows: list[Row] = []
        looked_at_before = position is None
        for section, key in sections:
            if not looked_at_before and section != at:
                continue
            looked_at_before = True
            if section != at:
                score, last_id = "", ""
            reply = await self._scope.read(
                _LIST,
                {
                    "now_ms": now,
                    "limit": limit - len(rows),
                    "after_score": score,
                    "after_id": last_id,
                    "statuses": f" {wanted} " if wanted else "",
                    "routes": routes,
                },
                members=key,
            )
            for i in range(4, len(reply), 4):
                try:
                    row = _read_row(reply[i], reply[i + 1], reply[i + 2], reply[i + 3], reply[0])
                except (ValueError, IndexError, msgspec.MsgspecError):
                    id = reply[i].decode("utf-8", "replace")
                    raise CorruptState(
                        f"what is stored of row {id} cannot be read; nothing was changed; "
                        "`leasekit doctor --deep` says more",
                        tenant=self._scope.tag,
                        id=id,
                    ) from None
                if row is not None:
                    rows.append(row)
            if reply[1]:
                return Page(rows, encode_cursor(section, reply[2].decode(), reply[3].decode()))
            if len(rows) >= limit:
                score = reply[2].decode() if reply[3] else score
                last_id = reply[3].decode() or last_id
                if section == sections[-1][0]:
                    break
                return Page(rows, encode_cursor(section, score, last_id))
        return Page(rows, None)

    async def counts(
        self, *, lane: str | None = None, target: str | None = None, now_ms: int | None = None
    ) -> Counts:
        """How many rows there are, in all and by lane and target."""
        lanes: list[LaneCounts] = []
        kept = [0, 0, 0, 0]
        score = route = ""
        while True:
            reply = await self._scope.read(
                _COUNTS,
                {
                    "now_ms": self._scope.now_argument(now_ms),
                    "limit": codec.BATCH_MAX,
                    "after_score": score,
                    "after_route": route,
                },
            )
            kept = reply[2:6]
            for one in reply[7:]:
                lane_found, target_found = route_parts(one[0].decode())
                if lane in (None, lane_found) and target in (None, target_found):
                    values = dict(zip(_COUNTED, one[2:], strict=True))
                    lanes.append(
                        LaneCounts(
                            lane=lane_found,
                            target=target_found,
                            last_enqueue_at_ms=one[1],
                            **values,
                        )
                    )
            if not reply[1]:
                break
            route, score = reply[-1][0].decode(), str(reply[-1][1])
        return Counts(
            **{name: sum(getattr(one, name) for one in lanes) for name in _COUNTED},
            finished_kept=kept[0],
            dead_kept=kept[1],
            unknown_kept=kept[2],
            finished_bytes_kept=kept[3],
            lanes=lanes,
        )

    # --- inside -----------------------------------------------------------------------------------

    def _bind(self, one: Script, variant: Variant, repeat: bool) -> Sequence[Argument]:
        """Keys and arguments of a call; a variant is route, now_ms and, as far as the command has them,
        lease_ms or claim_count."""
        route, now, number = (*variant, "")[:3]
        retention = self._scope.settings.retention
        arguments: dict[str, Argument] = {
            "now_ms": now,
            "route": route,
            "repeated": int(repeat),
            "lease_ms": number,
            "claim_count": number,
            "window_ms": retention.dedupe_ms,
            "keep_ms": retention.finished_ms,
            "keep_count": retention.finished_count,
            "keep_bytes": retention.finished_bytes,
            "dead_keep_ms": retention.dead_ms,
            "dead_keep_count": retention.dead_count,
            "hint": self._scope.keys.hint_channel,
        }
        return self._scope.bind(one, arguments, route=route)

    def _finish(
        self,
        one: Script,
        route: str,
        fields: Sequence[Argument],
        words: Callable[[Any, Any, Reply], _Word],
        repeat: bool,
        now_ms: int | None,
        through: Coalescer,
        *,
        claim_count: str = "",
    ) -> asyncio.Future[_Word]:
        """One item of a command that ends something: its outcome is a word."""
        scope = self._scope
        now = scope.now_argument(now_ms)
        return through.submit(
            one,
            scope.tag,
            (route, now, claim_count),
            self._bind,
            fields,
            words,
            repeat=repeat,
        )

    def _release(
        self,
        route: str,
        id: str,
        token: str,
        repeat: bool,
        now_ms: int | None,
        through: Coalescer,
    ) -> asyncio.Future[ReleaseOutcome]:
        scope = self._scope
        now = scope.now_argument(now_ms)
        return through.submit(
            _RELEASE,
            scope.tag,
            (route, now),
            self._bind,
            (id, token),
            _read_release,
            repeat=repeat,
        )

    def _get(self, id: str, now_ms: int | None) -> asyncio.Future[Row | None]:
        scope = self._scope
        now = scope.now_argument(now_ms)

        def read(item: Any, context: None, reply: Reply) -> Row | None:
            if word_of(item) == "missing":
                return None
            return _read_row(id.encode(), item[1], item[2], item[3], reply.now_ms)

        return scope.coalescer.submit(
            _GET,
            scope.tag,
            ("", now),
            self._bind,
            (id,),
            read,
        )

    async def _route_of(self, id: str, now_ms: int | None) -> str:
        """The route of a row, read once and remembered; a route that no row has for one that is not
        there, which the commands answer as what it is: missing."""
        codec.check_id(id)
        self._scope.now_argument(now_ms)
        if self._scope.must_register:
            await self._scope.register()
        route = self._routes.get(id)
        if route is not None:
            return route
        return (await self._look(id))[0]

    async def _seen(self, id: str, claim_count: int | None, now_ms: int | None) -> tuple[str, str]:
        """The route of a row and the claim_count that an order is about: the one that its caller saw,
        else that of now; "" for a row that is not there."""
        if claim_count is not None:
            codec.check_whole(claim_count, "claim_count", 0, codec.INSTANT_MS_MAX)
            return await self._route_of(id, now_ms), str(claim_count)
        codec.check_id(id)
        self._scope.now_argument(now_ms)
        if self._scope.must_register:
            await self._scope.register()
        return await self._look(id)

    async def _look(self, id: str) -> tuple[str, str]:
        """Route and claim_count of a row as it is stored now."""
        found: tuple[bytes, bytes] | None = await self._scope.coalescer.submit(
            _GET,
            self._scope.tag,
            ("", "" if self._scope.settings.clock == "server" else 0),
            self._bind,
            (id,),
            lambda item, context, reply: None if word_of(item) == "missing" else item[1:3],
        )
        if found is None:
            return _NOWHERE, ""
        doc, line = found
        route = _read_document(doc)[0][4]
        self._remember(id, route)
        words = line.split(b" ", 7)
        return route, words[6].decode() if len(words) == 8 else "0"  # no line: never claimed

    def _remember(self, id: str, route: str) -> None:
        self._routes[id] = route
        if len(self._routes) > ROUTES_REMEMBERED:
            self._routes.popitem(last=False)

    async def _sections(
        self, status: RowStatus | None, routes: str, any_target: bool, now: str | int
    ) -> Sequence[tuple[str, str]]:
        """The lists that a listing walks through, in order: name and key of each."""
        keys = self._scope.keys
        sections: list[tuple[str, str]] = []
        if status in (None, RowStatus.PENDING, RowStatus.CLAIMED, RowStatus.UNKNOWN):
            if routes and not any_target:
                in_line = [routes]
            else:
                in_line = [
                    route for route in await self._all_routes(now) if route.startswith(routes)
                ]
            sections += [(route, keys.outbox_due(route)) for route in sorted(in_line)]
        if status in (None, RowStatus.UNKNOWN):
            sections.append(("unknown", keys.outbox_unknown))
        if status in (None, RowStatus.DEAD_LETTERED):
            sections.append(("dead", keys.outbox_dead))
        if status in (None, RowStatus.SENT, RowStatus.CANCELLED):
            sections.append(("done", keys.outbox_done))
        return sections

    async def _all_routes(self, now: str | int) -> Sequence[str]:
        counts = await self.counts(now_ms=None if now == "" else int(now))
        return [route_of(one.lane, one.target) for one in counts.lanes]


def _check_retry_at(retry_at_ms: int | None) -> str | int:
    if retry_at_ms is None:
        return ""
    return codec.check_whole(retry_at_ms, "retry_at_ms", 0, codec.INSTANT_MS_MAX)


def _check_status(status: RowStatus | str) -> RowStatus:
    try:
        found = RowStatus(status)
    except ValueError:
        found = RowStatus.FORGOTTEN
    if found is RowStatus.FORGOTTEN:
        words = ", ".join(word for word in RowStatus if word is not RowStatus.FORGOTTEN)
        raise InvalidInput(f"status must be one of {words}", field="status")
    return found


@lru_cache(maxsize=4096)
def _draft_header(
    available_at: int,
    attempts: int | None,
    on_expiry: str,
    route: str,
    dedupe_key: str | None,
    run_id: str | None,
) -> bytes:
    """What stands before the payload; the reverse of `_read_draft_words`, and remembered as it is."""
    dedupe = "~" if dedupe_key is None else encode_word(dedupe_key)
    run = "~" if run_id is None else encode_word(run_id)
    return f"{available_at} {attempts or 0} {on_expiry} {route} {dedupe} {run}\n".encode()


@lru_cache(maxsize=4096)
def _read_draft_words(
    words: bytes,
) -> tuple[int, int | None, str, str | None, str | None]:
    """The header words that a row has from its draft: available_at, max_attempts, on_expiry, dedupe
    key and run id. Remembered, because most rows of a route have the same."""
    available_at, attempts, on_expiry, _, dedupe_key, run_id = words.decode().split(" ")
    return (
        int(available_at),
        int(attempts) or None,
        on_expiry,
        None if dedupe_key == "~" else decode_word(dedupe_key),
        None if run_id == "~" else decode_word(run_id),
    )


def _read_document(doc: bytes) -> tuple[Sequence[str], bytes]:
    """The seven header words and the payload of a document."""
    header, _, payload = doc.partition(b"\n")
    return header.decode().split(" "), payload


def _read_errors(lines: bytes) -> tuple[AttemptError, ...]:
    if not lines:
        return ()
    errors = []
    for line in lines.split(b"\n"):
        at, kind, attempt, fence, text = line.split(b" ", 4)
        errors.append(
            AttemptError(
                at_ms=int(at),
                kind=kind.decode(),
                attempt=int(attempt),
                fence=int(fence),
                text=codec.decode_json(text),
            )
        )
    return tuple(errors)


def _read_row(id: bytes, doc: bytes, line: bytes, errors: bytes, now: int) -> Row | None:
    """A row from what is stored of it; None for an index entry without a document (damage)."""
    if not doc:
        return None
    words, payload = _read_document(doc)
    lane, target = route_parts(words[4])
    draft = Draft(
        lane=lane,
        target=target,
        payload=codec.decode_json(payload),
        dedupe_key=None if words[5] == "~" else decode_word(words[5]),
        available_at_ms=int(words[1]),
        max_attempts=int(words[2]) or None,
        on_expiry=words[3],
        run_id=None if words[6] == "~" else decode_word(words[6]),
    )
    return _row_of_draft(draft, id.decode(), doc, line, now, errors)


def _fresh_row(draft: Draft, id: str, created_at_ms: int) -> Row:
    """A row that is pending and was never claimed."""
    return Row(
        id=id,
        lane=draft.lane,
        target=draft.target,
        payload=draft.payload,
        status=RowStatus.PENDING,
        cause="enqueued",
        attempt_count=0,
        claim_count=0,
        max_attempts=draft.max_attempts,
        on_expiry=draft.on_expiry,
        created_at_ms=created_at_ms,
        available_at_ms=draft.available_at_ms or created_at_ms,
        dedupe_key=draft.dedupe_key,
        run_id=draft.run_id,
    )


def _row_of_draft(
    draft: Draft, id: str, header: bytes, line: bytes, now: int, errors: bytes = b""
) -> Row:
    """A row from its draft, the first word of its header and its state line.

    No header: the row is gone and only its dedupe key remembers it.
    """
    if not header:
        gone = _fresh_row(draft, id, 0)
        return msgspec.structs.replace(gone, status=RowStatus.FORGOTTEN, cause="deleted")
    created_at = int(header.split(b" ", 1)[0])
    if not line:
        return _fresh_row(draft, id, created_at)
    words = line.decode().split(" ", 9)
    status, cause, consumer = RowStatus(words[0]), words[1], words[9]
    at, attempts, claims, fence, claimed_at = int(words[3]), *map(int, words[5:9])
    if status is RowStatus.CLAIMED and draft.on_expiry == "park" and at <= now:
        # It is unknown from the end of its lease on; a claim of its route will write it so.
        status, cause = RowStatus.UNKNOWN, "parked"
    held = status is RowStatus.CLAIMED
    ended = not held and status is not RowStatus.PENDING
    return Row(
        id=id,
        lane=draft.lane,
        target=draft.target,
        payload=draft.payload,
        status=status,
        cause=cause,
        attempt_count=attempts,
        claim_count=claims,
        max_attempts=draft.max_attempts,
        on_expiry=draft.on_expiry,
        created_at_ms=created_at,
        available_at_ms=at if status is RowStatus.PENDING else draft.available_at_ms or created_at,
        dedupe_key=draft.dedupe_key,
        run_id=draft.run_id,
        consumer=consumer if held or status is RowStatus.UNKNOWN else None,
        fence=fence or None,
        claimed_at_ms=claimed_at if claims else None,
        lease_expires_at_ms=at if held else None,
        finished_at_ms=at if ended else None,
        errors=_read_errors(errors),
    )
