"""What a client's gate holds to unless a call says otherwise.

Source: design 7, 8; spec/reliability 3.2, 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from leasekit.codec import DURATION_MS_MAX, LEASE_MS_MAX, check_whole
from leasekit.durability import Durability, durability_of
from leasekit.errors import InvalidInput

__all__ = ["SEED_TIERS", "GatePolicy", "OnExpiry"]

OnExpiry = Literal["reclaim", "park"]

SEED_TIERS = frozenset(
    {
        "external_send",
        "destructive_delete",
        "money_movement_contract",
        "financial_record_access",
        "credential_admin",
    }
)
KEEP_MS_MIN = 3_600_000  # a repeat of a call must find what the call led to


class GatePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """What a gate does where a call does not say.

    tiers: the risk tiers whose calls are gated; a call with an external side effect and no tier
        always is.
    on_expiry: what the end of a sender's lease means: `park` (nobody knows: unknown) or `reclaim`
        (the next sender may try). None: `prepare` reclaims, `dispatch` parks.
    on_expiry_by_tier: the same for single tiers, before `on_expiry`.
    lease_ms: how long a sender has, 1..43 200 000; five minutes.
    keep_ms: how long sent and cancelled intents are remembered, at least an hour: 30 days. A key
        that is used again after that is a new one.
    durability: what a grant must have survived before it is given; None = the client's.
    """

    tiers: frozenset[str] = SEED_TIERS
    on_expiry: OnExpiry | None = None
    on_expiry_by_tier: Mapping[str, OnExpiry] = {}
    lease_ms: int = 300_000
    keep_ms: int = 30 * 86_400_000
    durability: Durability | str | None = None

    def __post_init__(self) -> None:
        for choice in (self.on_expiry, *self.on_expiry_by_tier.values()):
            if choice is not None:
                check_on_expiry(choice)
        check_whole(self.lease_ms, "lease_ms", 1, LEASE_MS_MAX)
        check_whole(self.keep_ms, "keep_ms", KEEP_MS_MIN, DURATION_MS_MAX)
        if self.durability is not None:
            durability_of(self.durability)

    def on_expiry_of(self, tier: str | None, fallback: OnExpiry) -> OnExpiry:
        """What the end of a lease means for a call of this tier."""
        chosen = self.on_expiry_by_tier.get(tier) if tier is not None else None
        return chosen or self.on_expiry or fallback


def check_on_expiry(value: str) -> str:
    if value not in ("reclaim", "park"):
        raise InvalidInput("on_expiry must be 'reclaim' or 'park'", field="on_expiry")
    return value
