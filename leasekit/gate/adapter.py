"""For a tool-calling loop: an async callable that goes through the gate each time it is called.

Source: design 8; spec/reliability 3.8; evidence/ecosystem 3.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from leasekit.errors import Conflict, InvalidInput
from leasekit.gate import identity
from leasekit.gate.events import PreSendEvent, Source
from leasekit.gate.identity import ToolDescriptor

if TYPE_CHECKING:
    from leasekit.durability import Durability
    from leasekit.gate.gate import Gate
    from leasekit.gate.permit import Permit
    from leasekit.policy import OnExpiry

__all__ = ["GuardedTool"]

DENIED = "ToolDenied { reason: ScopeAllowlist }"  # the word of spec/reliability 3.8


class GuardedTool:
    """A tool whose calls are granted once: `await tool(source, **arguments)`.

    The call's name is made of the tool, where the call comes from (`source`: run, step, request), the
    tenant and the arguments, or is the caller's `dispatch_key`. The first call makes the effect; the
    same call again gives its result back; while it runs, or where nobody knows, it is refused.
    """

    def __init__(
        self,
        gate: Gate,
        function: Callable[..., Awaitable[Any]],
        *,
        tool: str,
        canonical_tool: str | None,
        descriptor: ToolDescriptor | None,
        external_side_effect: bool,
        scope_allowlist: Sequence[str],
        on_expiry: OnExpiry | None,
        durability: Durability | str | None,
        lease_ms: int | None,
    ) -> None:
        self._gate = gate
        self._function = function
        self._tool = tool
        self._canonical_tool = canonical_tool
        self._risk_tier = identity.infer_risk_tier(
            tool, canonical_tool=canonical_tool, descriptor=descriptor
        )
        self._external_side_effect = external_side_effect
        self._scope_allowlist = list(scope_allowlist)
        self._on_expiry = on_expiry
        self._durability = durability
        self._lease_ms = lease_ms
        self._signature = inspect.signature(function)
        self._takes_permit = "permit" in self._signature.parameters

    def event(
        self, source: Source, arguments: dict[str, Any], dispatch_key: str | None
    ) -> PreSendEvent:
        """What the gate is told of a call."""
        name, digest = identity.dispatch_id(
            self._tool,
            source,
            self._gate.context,
            arguments,
            canonical_tool=self._canonical_tool,
        )
        return PreSendEvent(
            dispatch_id=name if dispatch_key is None else dispatch_key,
            tool=self._tool,
            canonical_tool=self._canonical_tool,
            args=arguments,
            source=source,
            scope_allowlist=self._scope_allowlist,
            payload_digest=digest,
            external_side_effect=self._external_side_effect,
            risk_tier=self._risk_tier,
        )

    async def __call__(
        self, source: Source, /, *, dispatch_key: str | None = None, **arguments: Any
    ) -> Any:
        """Make the call, or give back what it led to before.

        The function gets the arguments, and the permit where it takes one: by it, it may say `failed`
        or `not_sent`, and then its return value is given to this caller alone. What it returns is the
        result, a JSON value. An exception of it leaves the intent unknown, unless it said otherwise.
        Raises what `Gate.prepare` raises, and InvalidInput for a tool outside of the allow-list, and
        for arguments that the function does not take.
        """
        if "permit" in arguments:
            raise InvalidInput("an argument cannot be called permit", field="permit")
        name = self._canonical_tool or self._tool
        if not identity.scope_allows(self._scope_allowlist, name):
            raise InvalidInput(
                f"{DENIED}: {name} is not among the tools that this "
                "caller may use: nothing was granted and nothing was run",
                field="scope_allowlist",
            )
        try:
            self._signature.bind(**arguments, **({"permit": None} if self._takes_permit else {}))
        except TypeError as wrong:
            # Found out now: after begin it would leave unknown what never ran.
            raise InvalidInput(
                f"{name} does not take these arguments ({wrong}): nothing was granted and nothing was "
                "run",
                field="arguments",
            ) from None
        event = self.event(source, arguments, dispatch_key)
        permit: Permit | None = None
        try:
            async with self._gate.dispatch(
                event,
                on_expiry=self._on_expiry,
                durability=self._durability,
                lease_ms=self._lease_ms,
            ) as permit:
                given = {**arguments, "permit": permit} if self._takes_permit else arguments
                permit.begin()
                result = await self._function(**given)
                if not permit.has_spoken:
                    await permit.sent(result)
                return result
        except Conflict as refused:
            # With a permit it is none of this gate's: the function raised it.
            if permit is not None or refused.status != "sent" or refused.id is None:
                raise
            intent = await self._gate.get(refused.id)
            if intent is None:
                raise
            return intent.result
