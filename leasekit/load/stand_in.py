"""A server that costs nothing: what the harness needs for itself shows where nothing else is done."""

from __future__ import annotations

from typing import Any

from leasekit.model import AckOutcome, Enqueued, Row, RowStatus

__all__ = ["StandIn"]


class _Claim:
    __slots__ = ("fence", "lease_expires_at_ms", "row")

    def __init__(self, row: Row) -> None:
        self.row = row
        self.fence = 1
        self.lease_expires_at_ms = 2

    async def ack(self, *, repeat: bool = False) -> AckOutcome:
        return AckOutcome.ACKED


class StandIn:
    """Answers a tenant's and its outbox's calls at once, always the same."""

    def __init__(self, payload: Any) -> None:
        self.outbox = self
        self._row = Row(
            id="0" * 26,
            lane="lane-0",
            target="load",
            payload=payload,
            status=RowStatus.CLAIMED,
            cause="claimed",
            attempt_count=1,
            claim_count=1,
            max_attempts=None,
            on_expiry="reclaim",
            created_at_ms=1,
            available_at_ms=1,
            claimed_at_ms=1,
        )
        self._enqueued = Enqueued(self._row, True)

    async def enqueue(self, lane: str, target: str, payload: Any, **options: Any) -> Enqueued:
        return self._enqueued

    async def claim(self, lane: str, target: str, **options: Any) -> list[_Claim]:
        return [_Claim(self._row)]
