"""Idempotency keys of a tenant: the first use reserves, the others get its outcome.

Two durations, and they are not the same: `lease_ms` while the first attempt runs, `keep_ms` for its
outcome. What becomes of a key whose first attempt vanished is the caller's choice: `reclaim` frees it
when the lease ends, `park` keeps it taken and says `unknown`, because nobody knows whether the effect
has happened. `once` parks.

Source: spec/reliability 2; lua/PROTOCOL.md, "Idempotency keys".
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from leasekit import codec
from leasekit.coalesce import Coalescer, Reply, Variant
from leasekit.durability import Durability
from leasekit.errors import Conflict, InvalidInput, LeasekitError, LeaseLost, OutcomeUnknown
from leasekit.keys import decode_word, encode_word
from leasekit.model import (
    DAY_MS,
    CompleteOutcome,
    IdempotencyRecord,
    IdempotencyStatus,
    Outcome,
    Page,
    Reservation,
    ReserveOutcome,
    WithdrawOutcome,
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

__all__ = ["Idempotency", "record_id"]

OUTCOME_KIND_DEFAULT = "completed"
ONCE_LEASE_MS = 60_000
PURGE_RECORDS = 250

_RESERVE = script(
    "idempotency/reserve",
    item=(
        "record_id",
        "token",
        "fingerprint",
        "lease_ms",
        "expires_at",
        "on_expiry",
        "reservation",
    ),
)
_COMPLETE = script("idempotency/complete", item=("record_id", "token", "keep_ms", "outcome"))
_RELEASE = script("idempotency/release", item=("record_id", "token", "fingerprint"))
_GET = script("idempotency/get", item=("record_id",))
_LIST = script("idempotency/list")
_PURGE = script("idempotency/purge")

_read_completed = reader_of(CompleteOutcome)
_read_release = reader_of(WithdrawOutcome)


class _Stored(msgspec.Struct, frozen=True, omit_defaults=True):
    """The part of a record that its reservation writes once."""

    operation: str
    key: str
    owner: str
    event_id: str | None = None


def record_id(org: str, workspace: str, deployment: str | None, operation: str, key: str) -> str:
    """The id of a record (spec/reliability 2.2); operation and key are trimmed."""
    parts = [org, workspace, deployment or "", operation.strip(), key.strip()]
    return "idem_" + codec.hash_length_prefixed(parts)


class Idempotency:
    """`tenant.idempotency`. Every call may be made by thousands of coroutines at once."""

    __slots__ = ("_scope",)

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    @staticmethod
    def fingerprint(*parts: str) -> str:
        """What tells one request from another under the same key: `sha256:` and 64 hex digits."""
        return codec.fingerprint(*parts)

    async def reserve(
        self,
        operation: str,
        key: str,
        *,
        owner: str,
        fingerprint: str,
        event_id: str | None = None,
        lease_ms: int | None = None,
        expires_at_ms: int | None = None,
        on_expiry: Literal["reclaim", "park"] = "reclaim",
        token: str | None = None,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> Reservation:
        """Use a key for the first time, or learn what became of its first use.

        operation, key, owner, fingerprint: trimmed, <= 200 bytes each. lease_ms: 1..43 200 000, how
        long the first attempt may take, None = without end; what its end means is `on_expiry`'s.
        expires_at_ms: the instant from which the key is free again, whatever its state; None = as
        `complete` says. token: 22 characters of `new_token()`, where the caller wants to be able to
        repeat. durability: None = the client's.

        A reservation that its caller does not get, because it was cancelled or too few replicas have it
        (NotDurable), is released. Under a token that the caller brought it stands: whoever repeats by
        that token must not lose it to the release.

        reserved: go on, then `complete` or `release` with the token. duplicate: the record says what
        is known. conflict: the key is taken by a request with another fingerprint.
        Raises Conflict if this token's reservation was released already. Source: spec 2.3.
        """
        scope = self._scope
        wanted = self._check_key(operation, key)
        owner = _trimmed(owner, "owner")
        mark = _trimmed(fingerprint, "fingerprint")
        if event_id is not None:
            codec.check_text(event_id, "event_id")
        if lease_ms is not None:
            codec.check_whole(lease_ms, "lease_ms", 1, codec.LEASE_MS_MAX)
        if expires_at_ms is not None:
            codec.check_whole(expires_at_ms, "expires_at_ms", 1, codec.INSTANT_MS_MAX)
        if on_expiry not in ("reclaim", "park"):
            raise InvalidInput("on_expiry must be 'reclaim' or 'park'", field="on_expiry")
        is_nobodys = token is None
        token = codec.new_token() if token is None else codec.check_token(token)
        stored = _Stored(wanted[0], wanted[1], owner, event_id)
        now = scope.now_argument(now_ms)
        if scope.must_register:
            await scope.register()
        identity = self._record_id(*wanted)

        through = scope.coalescer
        if durability is not None:
            through = await scope.coalescer_for(durability)

        def give_back(result: Reservation) -> None:
            self._give_back(result, identity, through, now_ms)

        undo = give_back if is_nobodys else None

        future = through.submit(
            _RESERVE,
            scope.tag,
            (now,),
            self._bind,
            (
                identity,
                token,
                encode_word(mark),
                "" if lease_ms is None else lease_ms,
                "" if expires_at_ms is None else expires_at_ms,
                on_expiry,
                msgspec.json.encode(stored),
            ),
            self._read_reserved,
            context=(identity, token),
            undo=undo,
            lease_ms=lease_ms,
            repeat=repeat,
        )
        try:
            reservation: Reservation = await future
        except asyncio.CancelledError:
            if undo is not None:
                scope.undo_late(future, undo)
            raise
        return reservation

    def _read_reserved(
        self, item: Any, context: tuple[str, str], reply: Reply
    ) -> Reservation | LeasekitError:
        identity, token = context
        word = word_of(item)
        if word == "spent":
            return Conflict(
                "this token's reservation was released before: nothing was written; reserve with a "
                "new token",
                tenant=self._scope.tag,
                id=identity,
            )
        outcome = ReserveOutcome(word)
        record = self._read_record(identity, item[1], reply.now_ms)
        return Reservation(outcome, record, token if outcome is ReserveOutcome.RESERVED else None)

    def _give_back(
        self, reservation: Reservation, identity: str, through: Coalescer, now_ms: int | None
    ) -> None:
        """The caller was cancelled after its request had left, or too few replicas have the grant:
        nobody relies on this token."""
        if reservation.token is not None:
            released = self._release(identity, reservation.token, "", False, now_ms, through)
            self._scope.in_background(released)

    async def complete(
        self,
        operation: str,
        key: str,
        outcome: Outcome | Any,
        *,
        token: str,
        keep_ms: int = DAY_MS,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> CompleteOutcome:
        """Record what the first use led to; duplicates get it for `keep_ms` (or until the
        reservation's own expires_at_ms, where it has one).

        outcome: an Outcome, a mapping with its fields, or any other JSON value, which becomes the
        details of an outcome of kind `completed`. <= 64 KiB of JSON.

        completed | lost (the token is not the reservation's; nothing changed) | missing. A repeat
        leaves an outcome that is there as it is. durability: None = the client's. Source: spec 2.4.
        """
        codec.check_token(token)
        codec.check_whole(keep_ms, "keep_ms", 1, codec.DURATION_MS_MAX)
        scope = self._scope
        now = scope.now_argument(now_ms)
        identity = self._record_id(*self._check_key(operation, key))
        encoded = _encode_outcome(outcome)
        if scope.must_register:
            await scope.register()
        through = scope.coalescer
        if durability is not None:
            through = await scope.coalescer_for(durability)
        completed: CompleteOutcome = await through.submit(
            _COMPLETE,
            scope.tag,
            (now,),
            self._bind,
            (identity, token, keep_ms, encoded),
            _read_completed,
            size=len(encoded),
            repeat=repeat,
        )
        return completed

    async def release(
        self,
        operation: str,
        key: str,
        *,
        token: str | None = None,
        fingerprint: str | None = None,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> WithdrawOutcome:
        """Withdraw a reservation that is not completed, so that the key is free again.

        Shown by its token, or (spec 2.5, for operators) by its fingerprint. released | lost (another
        one's) | kept (completed or conflicted: it stays) | missing | forgotten (only for a repeat).
        durability: None = the client's.
        """
        if token is None and fingerprint is None:
            raise InvalidInput("token is required, or the reservation's fingerprint", field="token")
        if token is not None:
            codec.check_token(token)
        mark = "" if fingerprint is None else encode_word(_trimmed(fingerprint, "fingerprint"))
        identity = self._record_id(*self._check_key(operation, key))
        self._scope.now_argument(now_ms)
        if self._scope.must_register:
            await self._scope.register()
        through = self._scope.coalescer
        if durability is not None:
            through = await self._scope.coalescer_for(durability)
        outcome: WithdrawOutcome = await self._release(
            identity, token or "", mark, repeat, now_ms, through
        )
        return outcome

    def _release(
        self,
        identity: str,
        token: str,
        mark: str,
        repeat: bool,
        now_ms: int | None,
        through: Coalescer,
    ) -> asyncio.Future[WithdrawOutcome]:
        scope = self._scope
        now = scope.now_argument(now_ms)
        return through.submit(
            _RELEASE,
            scope.tag,
            (now,),
            self._bind,
            (identity, token, mark),
            _read_release,
            repeat=repeat,
        )

    async def get(
        self, operation: str, key: str, *, now_ms: int | None = None
    ) -> IdempotencyRecord | None:
        """What is stored of a key, whatever its age; None for a blank one. Source: spec 2.6."""
        if any(isinstance(name, str) and not name.strip() for name in (operation, key)):
            return None
        identity = self._record_id(*self._check_key(operation, key))
        scope = self._scope
        now = scope.now_argument(now_ms)
        record: IdempotencyRecord | None = await scope.coalescer.submit(
            _GET,
            scope.tag,
            (now,),
            self._bind,
            (identity,),
            lambda item, context, reply: (
                None if item == b"missing" else self._read_record(identity, item[1], reply.now_ms)
            ),
        )
        return record

    async def list(
        self,
        *,
        limit: int = PAGE_LIMIT_DEFAULT,
        cursor: str | None = None,
        now_ms: int | None = None,
    ) -> Page[IdempotencyRecord]:
        """A page of records, in the order in which they may be forgotten. limit: 1..1 000."""
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        position = decode_cursor(cursor, (str, str)) or ["", ""]
        reply = await self._scope.read(
            _LIST,
            {
                "now_ms": self._scope.now_argument(now_ms),
                "limit": limit,
                "after_score": position[0],
                "after_id": position[1],
            },
        )
        records = [self._read_record(one[0].decode(), one[1], reply[0]) for one in reply[4:]]
        more = encode_cursor(reply[2].decode(), reply[3].decode()) if reply[1] else None
        return Page(records, more)

    async def purge(
        self, *, before_ms: int, unfinished: bool = False, now_ms: int | None = None
    ) -> int:
        """Delete records that were last seen at or before `before_ms`; gives how many went.

        Reservations stay unless `unfinished`: their effect may be under way.
        """
        codec.check_whole(before_ms, "before_ms", 0, codec.INSTANT_MS_MAX)
        deleted = 0
        score = last = ""
        while True:
            reply = await self._scope.read(
                _PURGE,
                {
                    "now_ms": self._scope.now_argument(now_ms),
                    "limit": PURGE_RECORDS,
                    "after_score": score,
                    "after_id": last,
                    "before_ms": before_ms,
                    "unfinished": int(unfinished),
                },
            )
            deleted += int(reply[4])
            if not reply[1]:
                return deleted
            score, last = reply[2].decode(), reply[3].decode()

    async def once(
        self,
        operation: str,
        key: str,
        action: Callable[[], Awaitable[Any]],
        *,
        owner: str,
        fingerprint: str,
        lease_ms: int = ONCE_LEASE_MS,
        keep_ms: int = DAY_MS,
        on_expiry: Literal["reclaim", "park"] = "park",
        durability: Durability | str | None = None,
    ) -> Any:
        """Run `action` once for a key and give its result (a JSON value) to every caller.

        The first caller runs it; the others get the stored result. Raises Conflict (the key is used
        by another request, or the first use is still running: ask again later), OutcomeUnknown (the
        first use vanished: ask the destination, then `complete` or `release` the key), LeaseLost
        (the action ran longer than its lease and the key went to another). An exception of `action`
        leaves the key reserved until its lease ends: whether the effect happened is not known.

        durability: of reservation and outcome, None = the client's. NotDurable: too few replicas have
        the reservation, and the action has not run; or they lack the outcome of an action that ran.
        Calling again is right after both: it runs what has not run, and gives the outcome that is there.
        """
        reservation = await self.reserve(
            operation,
            key,
            owner=owner,
            fingerprint=fingerprint,
            lease_ms=lease_ms,
            on_expiry=on_expiry,
            durability=durability,
        )
        record = reservation.record
        name = f"{operation} {key}"
        if reservation.outcome is ReserveOutcome.CONFLICT:
            raise Conflict(
                f"idempotency key {name} was used by a request with another fingerprint: nothing was "
                "run; use another key for another request",
                tenant=self._scope.tag,
                id=record.record_id,
            )
        if reservation.token is None:
            if record.outcome is not None:
                return record.outcome.details
            if record.status is IdempotencyStatus.UNKNOWN:
                raise OutcomeUnknown(
                    f"the first use of {name} by {record.owner} vanished: whether its effect happened "
                    "is not known, and nothing was run; ask the destination, then complete or "
                    "release the key",
                    tenant=self._scope.tag,
                    id=record.record_id,
                )
            raise Conflict(
                f"the first use of {name} by {record.owner} is still running: nothing was run; ask "
                "again later for its result",
                tenant=self._scope.tag,
                id=record.record_id,
            )
        result = await action()
        completed = await self.complete(
            operation,
            key,
            Outcome(outcome_kind=OUTCOME_KIND_DEFAULT, details=result),
            token=reservation.token,
            keep_ms=keep_ms,
            durability=durability,
        )
        if completed is not CompleteOutcome.COMPLETED:
            raise LeaseLost(
                f"{name} ran, but its reservation was {completed}: another use may have run as well; "
                "compare what both did",
                tenant=self._scope.tag,
                id=record.record_id,
            )
        return result

    def _check_key(self, operation: str, key: str) -> tuple[str, str]:
        """Operation and key, trimmed; refused in the order and words of spec 2.3."""
        trimmed_key = _trimmed(key, "key")
        return _trimmed(operation, "operation"), trimmed_key

    def _record_id(self, operation: str, key: str) -> str:
        context = self._scope.context
        return record_id(
            context.org_id, context.workspace_id, context.deployment_id, operation, key
        )

    def _bind(self, one: Script, variant: Variant, repeat: bool) -> Sequence[Argument]:
        """Keys and arguments of a call; a variant is now_ms."""
        return self._scope.bind(one, {"now_ms": variant[0], "repeated": int(repeat)})

    def _read_record(self, identity: str, doc: bytes, now: int) -> IdempotencyRecord:
        head, marks, reservation, outcome_json = doc.split(b"\n", 3)
        words = head.decode().split(" ")
        stored = msgspec.json.decode(reservation, type=_Stored)
        fingerprints = [decode_word(word) for word in marks.decode().split(" ")]
        lease_end, expires_at = int(words[4]) or None, int(words[5]) or None
        status = IdempotencyStatus(words[0])
        finished = words[8] != "~"
        vanished = lease_end is not None and lease_end <= now and words[7] == "park"
        if status is IdempotencyStatus.RESERVED and vanished:
            status = IdempotencyStatus.UNKNOWN
        outcome = None
        if finished:
            outcome = msgspec.json.decode(outcome_json, type=Outcome)
            if outcome.completed_at_ms is None:
                outcome.completed_at_ms = int(words[8])
        return IdempotencyRecord(
            schema_version=1,
            record_id=identity,
            tenant_context=self._scope.context,
            operation=stored.operation,
            key=stored.key,
            owner=stored.owner,
            request_fingerprint=fingerprints[0],
            status=status,
            first_seen_at_ms=int(words[2]),
            last_seen_at_ms=int(words[3]),
            first_seen_event_id=stored.event_id,
            lease_expires_at_ms=None if finished else lease_end,
            expires_at_ms=expires_at,
            on_expiry=words[7],
            outcome=outcome,
            conflict_count=int(words[6]),
            conflict_fingerprints=fingerprints[1:],
        )


def _trimmed(value: str, field: str) -> str:
    """A text without surrounding blanks; refused in the words of spec/reliability 2.3."""
    if isinstance(value, str) and not value.strip():
        raise InvalidInput(f"idempotency {field} cannot be empty", field=field)
    if isinstance(value, str):
        value = value.strip()
    return codec.check_text(value, field, bytes_max=codec.NAME_BYTES_MAX)


def _encode_outcome(outcome: Outcome | Any) -> bytes:
    if isinstance(outcome, Mapping) and "outcome_kind" in outcome:
        try:
            outcome = msgspec.convert(outcome, type=Outcome)
        except msgspec.ValidationError as error:
            raise InvalidInput(f"outcome is not one: {error}", field="outcome") from None
    elif not isinstance(outcome, Outcome):
        outcome = Outcome(outcome_kind=OUTCOME_KIND_DEFAULT, details=outcome)
    codec.refuse_bytes(outcome.details, "outcome")
    return codec.canonical_json(outcome, "outcome", bytes_max=codec.DOCUMENT_BYTES_MAX)
