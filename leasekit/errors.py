"""Every exception that leasekit raises on purpose, in one tree.

Losing a race is an outcome (a word in a result), never an exception. An exception means that a
promise to the caller could not be kept, and its message says three things: what happened, what
state things are in now, and what is safe to do next. No message carries a payload, a token or a
password.
"""

from __future__ import annotations

__all__ = [
    "Conflict",
    "CorruptState",
    "InProgress",
    "InvalidInput",
    "LeaseLost",
    "LeasekitError",
    "NotDurable",
    "OutcomeUnknown",
    "Overloaded",
    "Permanent",
    "RetryAfter",
    "ScriptFailed",
    "Unavailable",
]


class LeasekitError(Exception):
    """The base of all leasekit errors; `tenant` and `id` name what it is about, where known."""

    def __init__(self, message: str, *, tenant: str | None = None, id: str | None = None) -> None:
        super().__init__(message)
        self.tenant = tenant
        self.id = id


class InvalidInput(LeasekitError, ValueError):
    """A value was refused before anything was sent: nothing changed; call again, corrected."""

    def __init__(self, message: str, *, field: str, limit: object = None) -> None:
        super().__init__(message)
        self.field = field
        self.limit = limit


class Conflict(LeasekitError):
    """A name is already taken by different content: nothing was written; do not retry as it is.

    status: what the intent that has the name has become, where it is the gate that refuses.
    """

    def __init__(
        self,
        message: str,
        *,
        tenant: str | None = None,
        id: str | None = None,
        status: str | None = None,
    ) -> None:
        super().__init__(message, tenant=tenant, id=id)
        self.status = status


class InProgress(Conflict):
    """Somebody else is at it, under a lease: nothing was written; ask again later for the outcome."""


class LeaseLost(LeasekitError):
    """The lease is no longer held: stop the work it protected; another holder may be at it."""


class NotDurable(LeasekitError):
    """The server applied the command, but fewer copies than asked for have it: a failover may lose it.

    reached, wanted: numbers of replicas. The message says whether what was granted was given back (ask
    anew) or stands on this server (ask again by the same name, `repeat=True`).
    """

    def __init__(
        self,
        message: str,
        *,
        reached: int,
        wanted: int,
        tenant: str | None = None,
        id: str | None = None,
    ) -> None:
        super().__init__(message, tenant=tenant, id=id)
        self.reached = reached
        self.wanted = wanted


class OutcomeUnknown(LeasekitError):
    """The command may or may not have been applied: ask again by the same name, `repeat=True`."""


class Unavailable(LeasekitError):
    """The server could not be reached or refuses work: nothing was applied; try again later."""


class Overloaded(LeasekitError):
    """The server is out of memory: nothing was written; finish or delete rows, or raise maxmemory."""


class CorruptState(LeasekitError):
    """Stored data is damaged: nothing was changed; run `leasekit doctor`."""


class ScriptFailed(LeasekitError):
    """A script failed in a way that leasekit does not know: a bug, or a server it does not fit."""


class Permanent(LeasekitError):
    """Raised by a handler: this row cannot be delivered, now or later; dead-letter it at once."""


class RetryAfter(LeasekitError):
    """Raised by a handler: try this row again in `delay_ms`, instead of after the usual pause."""

    def __init__(self, delay_ms: int, reason: str = "the destination asked for a pause") -> None:
        super().__init__(reason)
        if isinstance(delay_ms, bool) or not isinstance(delay_ms, int) or delay_ms < 0:
            raise InvalidInput("delay_ms must be a whole number, at least 0", field="delay_ms")
        self.delay_ms = delay_ms
