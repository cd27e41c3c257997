"""A grant around a body: begun, spoken of, and never left without a record.

Source: design 8.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from leasekit import codec
from leasekit.coalesce import local_clock_s
from leasekit.durability import Durability
from leasekit.errors import InvalidInput, LeasekitError, LeaseLost, OutcomeUnknown
from leasekit.gate.events import PreSendEvent
from leasekit.gate.intent import note_of
from leasekit.holding import Upkeep, margin_s

if TYPE_CHECKING:
    from leasekit.gate.gate import Gate, Receipt
    from leasekit.policy import OnExpiry

__all__ = ["Dispatch", "Permit"]

_logger = logging.getLogger(__name__)


class Permit:
    """The right to make one call now, and the duty to say what became of it.

    key: the idempotency key, for a destination that honours one. fence: for one that refuses older
    ones; None where the call is not gated. attempts: grants of this intent so far. id: of the intent.
    """

    def __init__(self, gate: Gate, event: PreSendEvent, receipt: Receipt | None) -> None:
        self.key = event.dispatch_id
        self.receipt = receipt
        self.fence = None if receipt is None else receipt.fence
        self.id = None if receipt is None else receipt.outbox_id
        self.attempts = 0 if receipt is None else receipt.attempts
        self.has_begun = False
        self._gate = gate
        self.lost = asyncio.Event()
        """Set when the lease has ended, was taken or could not be renewed in time."""
        self._upkeep: Upkeep | None = None
        self._lease_ms = 0
        self._said: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Permit {self.key} fence {self.fence}>"

    @property
    def is_gated(self) -> bool:
        """Whether the call needed a grant at all."""
        return self.receipt is not None

    @property
    def has_spoken(self) -> bool:
        """Whether it was said what became of the call."""
        return self._said is not None

    def begin(self, *, needs_ms: int | None = None) -> None:
        """Say that the call is about to be made: the last moment at which it can be left undone.

        Local, and cheap. Raises LeaseLost when less is left of the lease than `needs_ms` (a 20th of
        the lease by default): do not make the call then; the intent is cancelled on the way out.
        """
        if self._upkeep is not None:
            needs_s = margin_s(self._lease_ms) if needs_ms is None else needs_ms / 1_000
            left_s = self._upkeep.deadline_s - local_clock_s()
            if self.lost.is_set() or left_s <= needs_s:
                state = "nothing was begun, and it is cancelled on the way out; dispatch it again"
                if self.has_begun:
                    state = (
                        "it was begun before, and unless you say what came of that, nobody knows"
                    )
                raise LeaseLost(
                    f"too little is left of the lease of {self.id} ({max(left_s, 0):.3f} s): do not "
                    f"send; {state}",
                    id=self.id,
                )
        self.has_begun = True

    def sent(self, result: Any = None) -> asyncio.Future[None]:
        """The call was made, and worked. result: a JSON value <= 52 KiB, kept and given to whoever
        asks for the outcome; InvalidInput for one that cannot be kept, and the word counts without
        it. Recorded also where nobody awaits it, or who does is cancelled; awaiting it tells whether
        it was. From now on the lease is not renewed any more, and cannot be lost.
        """
        return self._say("succeeded", None, result)

    def failed(self, error: object, *, result: Any = None) -> asyncio.Future[None]:
        """The call was made, and the destination refused it for good: its key is never used again."""
        return self._say("failed", error, result)

    def not_sent(self, reason: object = None) -> asyncio.Future[None]:
        """The call did certainly not reach the destination: the intent may be granted again."""
        return self._say("blocked", reason, None)

    def _say(self, word: str, error: object, result: Any) -> asyncio.Future[None]:
        if self._said is not None:
            raise InvalidInput(
                "this permit was spoken of already: one word a grant", field="permit"
            )
        self.has_begun = True
        refused: InvalidInput | None = None
        try:
            note = note_of(error=error, result=result)
        except InvalidInput as problem:
            refused, note = problem, note_of(error=error, reason=f"not kept: {problem}")
        if self._upkeep is not None:
            self._upkeep.rest()
        self._said = asyncio.create_task(self._record(word, note))
        if refused is not None:
            raise InvalidInput(
                f"{refused}: the word `{word}` is being recorded without it; do not send again",
                field=refused.field,
                limit=refused.limit,
            )
        # Shielded: whoever is cancelled while awaiting it must not keep it from being recorded.
        told = asyncio.shield(self._said)
        told.add_done_callback(lambda future: future.cancelled() or future.exception())
        return told

    async def _record(self, result: str, note: bytes) -> None:
        receipt = self.receipt
        if receipt is None:
            return
        completed = await self._gate._complete(
            receipt.outbox_id, receipt.token, result, note, receipt.durability
        )
        if completed == "missing":
            raise LeaseLost(
                f"what became of {self.id} could not be noted, because nothing is known of it here any "
                f"more: the server lost data, or forgot it; `{result}` is true all the same, so do not "
                "send it again",
                id=self.id,
            )
        if completed == "lost":
            raise LeaseLost(
                f"what became of {self.id} was noted, but the intent is not this sender's any more: "
                "another sender may have been granted it since; compare what both did",
                id=self.id,
            )


class Dispatch(AbstractAsyncContextManager[Permit]):
    """What `Gate.dispatch` gives: enters with a grant, leaves with a record of what became of it."""

    def __init__(
        self,
        gate: Gate,
        event: PreSendEvent,
        *,
        on_expiry: OnExpiry,
        durability: Durability | str | None,
        lease_ms: int,
        owner: str | None,
    ) -> None:
        self._gate = gate
        self._event = event
        self._on_expiry = on_expiry
        self._durability = durability
        self._lease_ms = lease_ms
        self._owner = owner
        self._permit: Permit | None = None

    async def __aenter__(self) -> Permit:
        gate, token = self._gate, codec.new_token()
        try:
            receipt = await gate._prepare(
                self._event,
                on_expiry=self._on_expiry,
                durability=self._durability,
                token=token,
                is_nobodys=True,
                lease_ms=self._lease_ms,
                owner=self._owner,
            )
        except OutcomeUnknown as error:
            if error.id is None:
                # The request was lost on the way: it may have been granted, and nobody will use it.
                with suppress(LeasekitError):
                    await gate._withdraw_lost(self._event, token, self._durability)
            raise
        self._permit = permit = Permit(gate, self._event, receipt)
        if receipt is not None:
            permit._lease_ms = self._lease_ms
            permit._upkeep = Upkeep(self._extend, self._lease_ms, receipt.deadline_s, permit.lost)
            permit._upkeep.start()
        return permit

    async def _extend(self) -> float | None:
        permit = self._permit
        if permit is None or permit.receipt is None:
            return None
        extended = await self._gate.extend(permit.receipt, lease_ms=self._lease_ms)
        if extended is None:
            return None
        permit.receipt = extended
        return extended.deadline_s

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        permit = self._permit
        if permit is None or permit.receipt is None or permit._upkeep is None:
            return
        is_ours = permit._upkeep.stop()
        was_lost = permit.lost.is_set() and is_ours
        recording: asyncio.Task[Any] = permit._said or asyncio.create_task(
            self._leave(permit, error)
        )
        left: str | None = None
        try:
            # Shielded: whoever cancels the way out must not keep it from being recorded.
            left = await asyncio.shield(recording)
        except LeasekitError as failure:
            if error is None:
                raise
            if failure is not error:
                error.add_note(f"leasekit: {failure}")
        except asyncio.CancelledError:
            recording.add_done_callback(lambda task: task.cancelled() or task.exception())
            raise
        if was_lost and (error is None or isinstance(error, asyncio.CancelledError)):
            if permit._said is not None and error is None:
                return  # What became of it is recorded under its own token.
            raise self._lost(permit, left) from error

    async def _leave(self, permit: Permit, error: BaseException | None) -> str | None:
        """Record a body that ended without a word; gives what became of that record."""
        receipt = permit.receipt
        if receipt is None:
            return None
        why = type(error).__name__ if error is not None else "left without a word"
        if permit.has_begun:
            _logger.warning(
                "%s was begun and nobody said what became of it (%s): nobody knows", permit.id, why
            )
            result, note = "left", note_of(error=why)
        else:
            result, note = "blocked", note_of(reason="left before it was begun")
        return await self._gate._complete(
            receipt.outbox_id, receipt.token, result, note, receipt.durability
        )

    def _lost(self, permit: Permit, left: str | None) -> LeaseLost:
        if permit.has_spoken:
            state = (
                "what became of the call was said all the same; see the intent, do not send again"
            )
        elif permit.has_begun and left == "recorded" and self._on_expiry == "park":
            state = (
                "whether the call arrived is not known, and it is recorded so; reconcile asks the "
                "destination"
            )
        elif permit.has_begun:
            state = (
                "whether the call arrived is not known, and another sender may be granted the intent; "
                "see what it says before you send again"
            )
        elif left == "recorded":
            state = "the call was not begun, and it is cancelled; dispatch it again"
        else:
            state = (
                "the call was not begun, and the intent is not this sender's any more; see what it "
                "says before you send"
            )
        return LeaseLost(
            f"the lease of {permit.id} was lost while its body ran: {state}", id=permit.id
        )
