"""The gate of a tenant: a side effect is granted to one sender, and what became of it is recorded.

`prepare` and `complete` are the two ends; `dispatch` is both around a body, with the lease kept
meanwhile. What a sender that vanished has left behind is `unknown`, and is never granted again by
itself: `reconcile` asks the destination, or an operator decides with `resolve`.

Source: design 8; spec/reliability 3; lua/PROTOCOL.md, "Gate".
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from leasekit import codec
from leasekit.coalesce import Coalescer, Reply, Variant, local_clock_s
from leasekit.durability import Durability
from leasekit.errors import (
    Conflict,
    CorruptState,
    InProgress,
    InvalidInput,
    LeasekitError,
    LeaseLost,
    OutcomeUnknown,
    Unavailable,
)
from leasekit.gate import identity
from leasekit.gate.adapter import GuardedTool
from leasekit.gate.events import LedgerEvent, PreSendEvent, check_event, is_completion
from leasekit.gate.identity import ToolDescriptor
from leasekit.gate.intent import Intent, IntentStatus, note_of, read_intent
from leasekit.gate.permit import Dispatch
from leasekit.gate.reconcile import (
    ASK_LEASE_MS,
    ASKS_MAX,
    BACKOFF_MS,
    SETTLE_MS,
    Callback,
    ReconcileCounts,
    Reconciler,
)
from leasekit.model import Page, TenantContext
from leasekit.policy import OnExpiry, check_on_expiry
from leasekit.scope import (
    PAGE_LIMIT_DEFAULT,
    Scope,
    decode_cursor,
    encode_cursor,
    reader_of,
    word_of,
)
from leasekit.scripts import Argument, Script, script

if TYPE_CHECKING:
    from asyncio import Future

__all__ = ["Completion", "Gate", "Receipt", "Resolution"]

EXPIRE_ROWS = 250
HOST: Final = socket.gethostname()

_PREPARE = script(
    "gate/prepare",
    item=(
        *("id", "token", "key_digest", "arguments_digest", "lease_ms", "on_expiry", "run", "owner"),
        "intent",
    ),
)
_COMPLETE = script("gate/complete", item=("id", "token", "result", "note"))
_EXTEND = script("gate/extend", item=("id", "token", "lease_ms"))
_EXPIRE = script("gate/expire")
_RESOLVE = script("gate/resolve", item=("id", "revision", "verdict", "note"))
_OPEN = script("gate/open", item=("lost", "note"))
_GET = script("gate/get", item=("id",))
_LIST = script("gate/list")
_RUN = script("gate/run")


class Completion(StrEnum):
    """What became of a completion.

    recorded: it is what the intent says now. kept: the intent says something that weighs more; the
    word is kept beside it. lost: the token is not the last grant's; kept beside it as well. skipped:
    an event that completes nothing (spec/reliability 3.6). missing: no such intent.
    """

    RECORDED = "recorded"
    KEPT = "kept"
    LOST = "lost"
    SKIPPED = "skipped"
    MISSING = "missing"


class Resolution(StrEnum):
    """What became of an operator's order.

    changed: the intent is not as the operator saw it any more; look again. not_unknown: there is
    nothing to decide.
    """

    RESOLVED = "resolved"
    CHANGED = "changed"
    NOT_UNKNOWN = "not_unknown"
    MISSING = "missing"


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """A grant: what `complete` needs to be believed (spec/reliability 3.1, with a token and a fence).

    token: who may complete it; secret. fence: for a destination that refuses older ones.
    deadline_s: the lease's end on this machine's `local_clock_s`, never too late.
    """

    outbox_id: str
    idempotency_key: str
    token: str
    fence: int
    attempts: int
    granted_at_ms: int
    lease_expires_at_ms: int
    deadline_s: float
    durability: Durability | str | None = None

    def __repr__(self) -> str:
        return f"<Receipt {self.outbox_id} fence {self.fence}>"


_read_completion = reader_of(Completion)
_read_resolution = reader_of(Resolution)


class Gate:
    """`tenant.gate`. Every call may be made by thousands of coroutines at once."""

    __slots__ = ("_policy", "_scope")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._policy = scope.settings.gate

    @property
    def context(self) -> TenantContext:
        """The tenant whose gate it is."""
        return self._scope.context

    def is_gated(self, event: PreSendEvent) -> bool:
        """Whether a call needs a grant, by its tier and this client's policy (spec 3.2)."""
        return identity.is_gated(event, self._policy.tiers)

    # --- the two ends -----------------------------------------------------------------------------

    async def prepare(
        self,
        event: PreSendEvent,
        *,
        on_expiry: OnExpiry | None = None,
        durability: Durability | str | None = None,
        token: str | None = None,
        lease_ms: int | None = None,
        owner: str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> Receipt | None:
        """Record the intent and be granted it, alone; None for a call that is not gated.

        on_expiry: what the end of the lease means, `reclaim` (the default: the next `prepare` of the
        key is granted) or `park` (it becomes unknown); the policy may say otherwise. lease_ms:
        1..43 200 000, five minutes. token: 22 characters of `new_token()`, where the caller wants to
        be able to repeat: the token that has the grant gets the same answer again. owner: who sends,
        for people.

        A grant that its caller does not get, because it was cancelled or too few replicas have it, is
        withdrawn. Under a token that the caller brought it stands: it may be a repeat of one that was
        used, and is had by the same token, or given back by completing it as blocked.

        Raises InProgress (another sender has it), Conflict (it was sent, failed or buried; or the key
        was used with other arguments, or in another tenant), OutcomeUnknown (nobody knows whether it
        was sent, or whether this call was applied), NotDurable (too few replicas have it), Unavailable
        (the server cannot be reached, or has lost the data that this process knew), LeaseLost (the
        grant came when its lease was over). Whatever is raised: do not send.
        Source: spec/reliability 3.2-3.5.
        """
        return await self._prepare(
            event,
            on_expiry=on_expiry,
            durability=durability,
            token=codec.new_token() if token is None else codec.check_token(token),
            is_nobodys=token is None,
            lease_ms=lease_ms,
            owner=owner,
            repeat=repeat,
            now_ms=now_ms,
        )

    async def _prepare(
        self,
        event: PreSendEvent,
        *,
        on_expiry: OnExpiry | None,
        durability: Durability | str | None,
        token: str,
        is_nobodys: bool,
        lease_ms: int | None,
        owner: str | None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> Receipt | None:
        """What `prepare` does. is_nobodys: the token is new, and nobody asks by it again."""
        if not self._check(event):
            return None
        scope = self._scope
        tier = event.risk_tier
        chosen = on_expiry or self._policy.on_expiry_of(tier, "reclaim")
        check_on_expiry(chosen)
        length = self._policy.lease_ms if lease_ms is None else lease_ms
        codec.check_whole(length, "lease_ms", 1, codec.LEASE_MS_MAX)
        if owner is None:
            owner = f"{HOST}:{os.getpid()}"[: codec.ID_BYTES_MAX]  # asked each time: processes fork
        codec.check_text(owner, "owner")
        now = scope.now_argument(now_ms)
        wanted = self._policy.durability if durability is None else durability
        document = identity.intent_document(event, scope.context)
        id = identity.outbox_id(event.dispatch_id)
        coalescer = await scope.coalescer_for(wanted)
        if scope.must_register:
            await scope.register()
        known = scope.shared.datasets.get(scope.tag, "")

        def undo(_: tuple[Receipt, str]) -> None:
            self._withdraw(coalescer, id, token, now_ms)

        future = coalescer.submit(
            _PREPARE,
            scope.tag,
            (now, known),
            self._bind_prepare,
            (
                *(id, token, identity.key_digest(event.dispatch_id)),
                *(identity.arguments_digest(event), length, chosen),
                *(identity.run_word(event.source.run_id), owner, document),
            ),
            self._read_granted,
            context=(id, event.dispatch_id, token, wanted),
            size=len(document),
            head=2,
            # Withdrawing what a brought token was granted would take it from under a repeat, and would
            # call unsent what may have been sent.
            undo=undo if is_nobodys else None,
            repeat=repeat,
            lease_ms=length,
        )
        try:
            receipt, name = await future
        except asyncio.CancelledError:
            if is_nobodys:
                scope.undo_late(future, undo)
            raise
        scope.shared.datasets[scope.tag] = name
        if now_ms is None:
            is_over = receipt.deadline_s <= local_clock_s()
        else:
            is_over = receipt.lease_expires_at_ms <= now_ms
        if is_over:
            # Whoever brings a token may have used its grant before: what parks stays unknown.
            if is_nobodys:
                self._withdraw(coalescer, id, token, now_ms)
                state = "it was withdrawn where nobody else has it; prepare again, with a longer lease_ms"
            else:
                state = "nothing was withdrawn; see what the intent says before you prepare again"
            raise LeaseLost(
                f"the grant of {id} came after its lease was over: do not send; {state}",
                tenant=scope.tag,
                id=id,
            )
        granted: Receipt = receipt
        return granted

    def _check(self, event: PreSendEvent) -> bool:
        """Whether the event needs a grant; InvalidInput or Conflict for one that cannot have any."""
        if not isinstance(event, PreSendEvent):
            raise InvalidInput(
                f"event must be a PreSendEvent, not {type(event).__name__}", field="event"
            )
        check_event(event)
        scope = self._scope
        if event.tenant_context is not None and not identity.same_tenant(
            event.tenant_context, scope.context
        ):
            id = identity.outbox_id(event.dispatch_id)
            raise Conflict(
                f"pre-send outbox `{id}` belongs to a different tenant scope: nothing was written; "
                "prepare it in the tenant that its event names",
                tenant=scope.tag,
                id=id,
            )
        return self.is_gated(event)

    def _bind_prepare(self, one: Script, variant: Variant, repeat: bool) -> Sequence[Argument]:
        """Keys and arguments of a grant; a variant is now_ms and the data that is known."""
        now, known = variant
        return self._scope.bind(one, {"now_ms": now, "known": known, "fresh": codec.new_token()})

    def _read_granted(
        self, item: Any, context: tuple[str, str, str, Durability | str | None], reply: Reply
    ) -> tuple[Receipt, str] | LeasekitError:
        id, key, token, durability = context
        word = word_of(item)
        if word != "granted":
            if word != "data_lost" and (name := reply.head[1]):
                # Whoever was told of an intent knows its data as well, and must notice its loss.
                self._scope.shared.datasets[self._scope.tag] = name.decode()
            return self._refusal(word, item, id)
        _, fence, claimed_at, lease_end, attempts, _ = item
        receipt = Receipt(
            outbox_id=id,
            idempotency_key=key,
            token=token,
            fence=int(fence),
            attempts=attempts,
            granted_at_ms=int(claimed_at),
            lease_expires_at_ms=lease_end,
            deadline_s=reply.sent_at_s + (lease_end - reply.now_ms) / 1_000,
            durability=durability,
        )
        return receipt, reply.head[1].decode()

    def _refusal(self, word: str, item: Any, id: str) -> LeasekitError:
        """Why there is no grant; in the words of spec/reliability 3.4 where it has some."""
        tag = self._scope.tag
        if word == "taken":
            status = item[1].decode()
            owner = item[5].decode(errors="replace") or "a sender"
            what = f"pre-send outbox `{id}` is already `{status}`"
            if status == "claimed":
                return InProgress(
                    f"{what}, by {owner} until {item[2]} ms: nothing was granted; ask again later for "
                    "its outcome",
                    tenant=tag,
                    id=id,
                    status=status,
                )
            if status == "unknown":
                return OutcomeUnknown(
                    f"{what}: {owner} was granted it and has not been heard of, so that nobody knows "
                    "whether it was sent; nothing was granted; reconcile asks the destination, or an "
                    "operator decides (leasekit resolve)",
                    tenant=tag,
                    id=id,
                )
            if status == "dead_lettered":
                next_step = (
                    "its destination could not tell whether it was sent; an operator decides "
                    "(leasekit resolve)"
                )
            else:
                next_step = "what became of it is final, use another key for another effect"
            return Conflict(
                f"{what}: nothing was granted; {next_step}",
                tenant=tag,
                id=id,
                status=status,
            )
        if word == "data_lost":
            return Unavailable(
                f"data lost: tenant {tag} is not the data that this process knew "
                f"(`{self._scope.shared.datasets.get(tag)}`): the server was emptied, restored or "
                "swapped, so that what was sent before may be forgotten; nothing was granted; "
                "restore the data, or have an operator open the gate (leasekit gate open)",
                tenant=tag,
                id=id,
            )
        if word == "damaged":
            return CorruptState(
                f"what is stored of {id} cannot be read: nothing was granted; run `leasekit doctor`",
                tenant=tag,
                id=id,
            )
        texts = {
            "key_conflict": (
                f"pre-send outbox `{id}` has a conflicting idempotency key: another key leads to the "
                "same id; nothing was granted; use another dispatch id"
            ),
            "arguments_conflict": (
                f"pre-send outbox `{id}` was prepared with other arguments under the same key: nothing "
                "was granted; use another key for another effect"
            ),
            "spent": (
                f"this token's grant of `{id}` was withdrawn or decided before: nothing was granted; "
                "prepare with a new token"
            ),
        }
        return Conflict(texts[word], tenant=tag, id=id)

    async def complete(
        self,
        event: LedgerEvent,
        *,
        receipt: Receipt | None = None,
        result: Any = None,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> Completion:
        """Record what became of a call: succeeded (sent), failed, or blocked (cancelled: not sent).

        With the receipt it counts as long as nobody else was granted the intent, also after the
        lease; sent outweighs failed, failed cancelled, cancelled unknown. Without one, any event with
        this dispatch id counts (spec/reliability 3.6): succeeded and failed always, blocked only for
        a first attempt that does not park. result: a JSON value <= 52 KiB that came back.
        Events that complete nothing are `skipped`, and nothing is sent.
        """
        check_event(event)
        if not isinstance(event, LedgerEvent):
            raise InvalidInput(
                f"event must be a LedgerEvent, not {type(event).__name__}", field="event"
            )
        self._scope.now_argument(now_ms)
        context = event.tenant_context
        is_ours = context is None or identity.same_tenant(context, self._scope.context)
        if not is_completion(event) or not is_ours:
            return Completion.SKIPPED
        id = identity.outbox_id(event.dispatch_id or "")
        if receipt is not None and receipt.outbox_id != id:
            raise InvalidInput(
                f"receipt is of {receipt.outbox_id}, and the event of {id}: nothing was recorded",
                field="receipt",
            )
        note = note_of(error=event.error, result=result)
        if durability is None:
            durability = self._policy.durability if receipt is None else receipt.durability
        completed = await self._complete(
            id, receipt.token if receipt else "", event.status, note, durability, repeat, now_ms
        )
        if completed is Completion.MISSING and receipt is None:
            return Completion.SKIPPED
        return completed

    async def _complete(
        self,
        id: str,
        token: str,
        result: str,
        note: bytes,
        durability: Durability | str | None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> Completion:
        scope = self._scope
        coalescer = await scope.coalescer_for(durability)
        if scope.must_register:
            await scope.register()
        completed: Completion = await self._submit_completion(
            coalescer, id, token, result, note, repeat, now_ms
        )
        return completed

    def _submit_completion(
        self,
        coalescer: Coalescer,
        id: str,
        token: str,
        result: str,
        note: bytes,
        repeat: bool,
        now_ms: int | None,
    ) -> Future[Any]:
        return coalescer.submit(
            _COMPLETE,
            self._scope.tag,
            (self._scope.now_argument(now_ms),),
            self._bind,
            (id, token, result, note),
            _read_completion,
            size=len(note),
            repeat=repeat,
        )

    def _withdraw(self, coalescer: Coalescer, id: str, token: str, now_ms: int | None) -> None:
        """Give back a grant that nobody will use: its caller was cancelled, or must not have it."""
        note = note_of(reason="withdrawn before it was used")
        given_back = self._submit_completion(coalescer, id, token, "blocked", note, False, now_ms)
        self._scope.in_background(given_back)

    async def _withdraw_lost(
        self, event: PreSendEvent, token: str, durability: Durability | str | None
    ) -> None:
        """The same for a grant of which this process does not know whether there is one."""
        wanted = self._policy.durability if durability is None else durability
        coalescer = await self._scope.coalescer_for(wanted)
        self._withdraw(coalescer, identity.outbox_id(event.dispatch_id), token, None)

    def dispatch(
        self,
        event: PreSendEvent,
        *,
        on_expiry: OnExpiry | None = None,
        durability: Durability | str | None = None,
        lease_ms: int | None = None,
        owner: str | None = None,
    ) -> Dispatch:
        """Be granted an intent for a body: `async with tenant.gate.dispatch(event) as permit:`.

        In the body, `permit.begin()` right before the call, then one of `permit.sent(result)`,
        `permit.failed(error)`, `permit.not_sent(reason)`. Leaving before begin cancels the intent;
        leaving after it without a word, however, makes it unknown. The lease is extended meanwhile;
        where it cannot be, the body is cancelled and LeaseLost raised. on_expiry: `park` by default
        (the policy may say otherwise). A call that is not gated gets a permit without a fence.
        Raises what `prepare` raises. Needs a client on the server's clock. Source: design 8.
        """
        return Dispatch(
            self,
            event,
            on_expiry=on_expiry or self._policy.on_expiry_of(event.risk_tier, "park"),
            durability=durability,
            lease_ms=self._policy.lease_ms if lease_ms is None else lease_ms,
            owner=owner,
        )

    def guard(
        self,
        function: Callable[..., Awaitable[Any]],
        *,
        tool: str,
        canonical_tool: str | None = None,
        descriptor: ToolDescriptor | None = None,
        external_side_effect: bool = True,
        scope_allowlist: Sequence[str] = (),
        on_expiry: OnExpiry | None = None,
        durability: Durability | str | None = None,
        lease_ms: int | None = None,
    ) -> GuardedTool:
        """An async callable that goes through this gate: `await guarded(source, **arguments)`.

        The risk tier is the descriptor's, else it is inferred from the tool's name (spec 3.8); what has
        none is gated by external_side_effect. scope_allowlist: the tools that the caller may use; empty =
        all, `*` at the end of a name = whatever begins so. See GuardedTool.
        """
        return GuardedTool(
            self,
            function,
            tool=tool,
            canonical_tool=canonical_tool,
            descriptor=descriptor,
            external_side_effect=external_side_effect,
            scope_allowlist=scope_allowlist,
            on_expiry=on_expiry,
            durability=durability,
            lease_ms=lease_ms,
        )

    async def extend(
        self,
        receipt: Receipt,
        *,
        lease_ms: int,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> Receipt | None:
        """Have the lease for `lease_ms` from now, never for less than before; None: it is lost."""
        codec.check_whole(lease_ms, "lease_ms", 1, codec.LEASE_MS_MAX)
        scope = self._scope
        now = scope.now_argument(now_ms)
        coalescer = await scope.coalescer_for(
            receipt.durability if durability is None else durability
        )

        def read(item: Any, context: None, reply: Reply) -> Receipt | None:
            if word_of(item) == "lost":
                return None
            return msgspec.structs.replace(
                receipt,
                lease_expires_at_ms=item[1],
                deadline_s=reply.sent_at_s + (item[1] - reply.now_ms) / 1_000,
            )

        extended: Receipt | None = await coalescer.submit(
            _EXTEND,
            scope.tag,
            (now,),
            self._bind,
            (receipt.outbox_id, receipt.token, lease_ms),
            read,
            repeat=repeat,
            lease_ms=lease_ms,
        )
        return extended

    # --- what nobody knows ------------------------------------------------------------------------

    async def unknown(
        self,
        *,
        limit: int = PAGE_LIMIT_DEFAULT,
        cursor: str | None = None,
        now_ms: int | None = None,
    ) -> Page[Intent]:
        """A page of the intents of which nobody knows whether they were sent, in the order in which
        their destinations may be asked. What has just become unknown is written down first."""
        if cursor is None:
            await self._expire(now_ms)
        return await self._list("unknown", "", False, limit, cursor, now_ms)

    async def _expire(self, now_ms: int | None) -> int:
        """Write down as unknown what parks and whose lease has ended; gives how many."""
        now = self._scope.now_argument(now_ms)
        written = 0
        while True:
            reply = await self._scope.read(_EXPIRE, {"now_ms": now, "limit": EXPIRE_ROWS})
            written += int(reply[2])
            if not reply[1]:
                return written

    async def reconcile(
        self,
        callbacks: Mapping[str, Callback],
        *,
        settle_ms: int = SETTLE_MS,
        asks_max: int = ASKS_MAX,
        backoff_ms: tuple[int, int] = BACKOFF_MS,
        lease_ms: int = ASK_LEASE_MS,
        concurrency: int = 20,
        durability: Durability | str | None = None,
        now_ms: int | None = None,
    ) -> ReconcileCounts:
        """Ask the destinations once about every unknown intent that is due, and record the answers.

        callbacks: tool -> `async def ask(question) -> Verdict`; a name may end with `*`. Intents
        without a callback are left alone. settle_ms: not before this long after the end of the
        sender's lease, so that what was under way has arrived. asks_max: after so many questions
        without an answer the intent is dead_lettered (cause undecidable); a question is counted as it
        begins. backoff_ms: first and longest pause between two questions, doubling. lease_ms: how long
        one question may take. An exception of a callback counts as undecidable.
        Call it again and again; several may run side by side. Source: design 8.
        """
        reconciler = Reconciler(
            self._scope,
            callbacks,
            settle_ms=settle_ms,
            asks_max=asks_max,
            backoff_ms=backoff_ms,
            lease_ms=lease_ms,
            concurrency=concurrency,
            durability=self._policy.durability if durability is None else durability,
            now_ms=now_ms,
        )
        await self._expire(now_ms)
        return await reconciler.run(partial(self._list, "unknown", "", False, codec.BATCH_MAX))

    async def resolve(
        self,
        id: str,
        verdict: Literal["sent", "failed", "not_sent"],
        *,
        actor: str,
        reason: str,
        revision: int | None = None,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> Resolution:
        """An operator decides about an unknown or undecidable intent: sent, failed, or not_sent, which
        lets it be granted again. actor and reason are kept with it. revision: of the intent as the
        operator saw it; None = as it is now. A paused sender may still wake up: see that it cannot.
        """
        if verdict not in ("sent", "failed", "not_sent"):
            raise InvalidInput("verdict must be 'sent', 'failed' or 'not_sent'", field="verdict")
        codec.check_text(id, "id")
        codec.check_text(actor, "actor")
        codec.check_text(reason, "reason", bytes_max=codec.ERROR_TEXT_MAX)
        scope = self._scope
        now = scope.now_argument(now_ms)
        if revision is None:
            seen = await self.get(id, now_ms=now_ms)
            if seen is None:
                return Resolution.MISSING
            revision = seen.revision
        codec.check_whole(revision, "revision", 0, codec.INSTANT_MS_MAX)
        coalescer = await scope.coalescer_for(
            self._policy.durability if durability is None else durability
        )
        resolved: Resolution = await coalescer.submit(
            _RESOLVE,
            scope.tag,
            (now,),
            self._bind,
            (id, revision, verdict, note_of(actor=actor, reason=reason)),
            _read_resolution,
            repeat=repeat,
        )
        return resolved

    async def open(
        self, lost: str, *, actor: str, reason: str, now_ms: int | None = None
    ) -> Literal["opened", "known"]:
        """Let senders that know lost data be granted intents again, after a loss that was dealt with.

        lost: the name of the data that the error named. known: it is the data that is here, and
        nothing had to be opened. What was sent before the loss and is forgotten may be sent again.
        """
        codec.check_token(lost, "lost")
        codec.check_text(actor, "actor")
        codec.check_text(reason, "reason", bytes_max=codec.ERROR_TEXT_MAX)
        scope = self._scope
        now = scope.now_argument(now_ms)
        if scope.must_register:
            await scope.register()
        coalescer = await scope.coalescer_for(self._policy.durability)
        word: Literal["opened", "known"] = await coalescer.submit(
            _OPEN,
            scope.tag,
            (now,),
            self._bind,
            (lost, note_of(actor=actor, reason=reason)),
            lambda item, context, reply: word_of(item),
        )
        return word

    # --- looking ----------------------------------------------------------------------------------

    async def get(self, id: str, *, now_ms: int | None = None) -> Intent | None:
        """What is known of an intent, by its outbox id; None if nothing is."""
        codec.check_text(id, "id")
        scope = self._scope

        def read(item: Any, context: None, reply: Reply) -> Intent | CorruptState | None:
            if item == b"missing":
                return None
            return _read_one(scope.tag, id, item[1:], reply.now_ms)

        intent: Intent | None = await scope.coalescer.submit(
            _GET, scope.tag, (scope.now_argument(now_ms),), self._bind, (id,), read
        )
        return intent

    async def list(
        self,
        *,
        status: IntentStatus | str | None = None,
        run_id: str | None = None,
        limit: int = PAGE_LIMIT_DEFAULT,
        cursor: str | None = None,
        now_ms: int | None = None,
    ) -> Page[Intent]:
        """A page of intents, the last changed first, of one run or of all. limit: 1..1 000.

        A page looks at no more than 1 000 intents; a filtered one may be short and go on.
        """
        wanted = _status_word(status)
        if run_id is None:
            return await self._list("updated", wanted, True, limit, cursor, now_ms)
        codec.check_text(run_id, "run_id")
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        position = decode_cursor(cursor, (str,))
        scope = self._scope
        reply = await scope.read(
            _RUN,
            {
                "now_ms": scope.now_argument(now_ms),
                "limit": limit,
                "run": identity.run_word(run_id),
                "after": position[0] if position else "",
                "statuses": f" {wanted} " if wanted else "",
            },
        )
        intents = _read_page(scope.tag, reply[3:], reply[0])
        return Page(intents, encode_cursor(reply[2].decode()) if reply[1] else None)

    async def _list(
        self,
        members: str,
        status: str,
        newest: bool,
        limit: int,
        cursor: str | None,
        now_ms: int | None,
    ) -> Page[Intent]:
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        position = decode_cursor(cursor, (str, str)) or ["", ""]
        scope = self._scope
        reply = await scope.read(
            _LIST,
            {
                "now_ms": scope.now_argument(now_ms),
                "limit": limit,
                "after_score": position[0],
                "after_id": position[1],
                "statuses": f" {status} " if status else "",
                "newest": int(newest),
            },
            members=scope.keys.named("gate", members, ""),
        )
        more = encode_cursor(reply[2].decode(), reply[3].decode()) if reply[1] else None
        return Page(_read_page(scope.tag, reply[4:], reply[0]), more)

    def _bind(self, one: Script, variant: Variant, repeat: bool) -> Sequence[Argument]:
        """Keys and arguments of a call; a variant is now_ms."""
        given = {
            "now_ms": variant[0],
            "repeated": int(repeat),
            "keep_ms": self._policy.keep_ms,
        }
        return self._scope.bind(one, given)


def _status_word(status: IntentStatus | str | None) -> str:
    if status is None:
        return ""
    try:
        return IntentStatus(status).value
    except ValueError:
        raise InvalidInput(
            f"status must be one of {', '.join(IntentStatus)}", field="status"
        ) from None


def _read_page(tag: str, replies: Sequence[Any], now: int) -> list[Intent]:
    intents = []
    for id, *texts in replies:
        intent = _read_one(tag, id.decode("utf-8", "replace"), texts, int(now))
        if isinstance(intent, CorruptState):
            raise intent
        intents.append(intent)
    return intents


def _read_one(tag: str, id: str, texts: Sequence[bytes], now: int) -> Intent | CorruptState:
    """An intent of what is stored of it: document, state line, facts; or that it is damaged."""
    try:
        return read_intent(id, texts[0], texts[1], texts[2], now)
    except (ValueError, TypeError, AttributeError, msgspec.MsgspecError):
        return CorruptState(
            f"what is stored of {id} cannot be read: nothing was changed; `leasekit doctor --deep` "
            "says more",
            tenant=tag,
            id=id,
        )
