"""leasekit: claims, leases and idempotency keys on Redis, for dispatchers that must not send twice.

async with leasekit.connect("redis://localhost") as kit:
    outbox = kit.tenant("acme", "production").outbox
    await outbox.enqueue("webhooks", "billing", {"event": "paid"})
    for claim in await outbox.claim("webhooks", "billing", consumer="dispatcher-1"):
        await claim.ack()
"""

from importlib.metadata import version

from leasekit.client import Leasekit, Tenant, connect
from leasekit.codec import new_id, new_token
from leasekit.durability import Durability, replicated
from leasekit.errors import (
    Conflict,
    CorruptState,
    InProgress,
    InvalidInput,
    LeasekitError,
    LeaseLost,
    NotDurable,
    OutcomeUnknown,
    Overloaded,
    Permanent,
    RetryAfter,
    ScriptFailed,
    Unavailable,
)
from leasekit.model import Draft, Outcome, Retention, RunCounts
from leasekit.policy import GatePolicy

__all__ = [
    "Conflict",
    "CorruptState",
    "Draft",
    "Durability",
    "GatePolicy",
    "InProgress",
    "InvalidInput",
    "LeaseLost",
    "Leasekit",
    "LeasekitError",
    "NotDurable",
    "Outcome",
    "OutcomeUnknown",
    "Overloaded",
    "Permanent",
    "Retention",
    "RetryAfter",
    "RunCounts",
    "ScriptFailed",
    "Tenant",
    "Unavailable",
    "connect",
    "new_id",
    "new_token",
    "replicated",
]

__version__ = version("leasekit")
