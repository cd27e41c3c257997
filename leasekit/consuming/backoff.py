"""How long a row that failed waits for its next attempt. Source: spec/outbox 3.2."""

from __future__ import annotations

import random

__all__ = ["backoff_ms", "jittered_ms"]

DOUBLINGS_MAX = 31


def backoff_ms(attempt: int, base_ms: int, max_ms: int) -> int:
    """The delay after the so-manieth attempt, counted from 1: doubled each time, bounded."""
    return min(base_ms << min(max(attempt, 1) - 1, DOUBLINGS_MAX), max_ms)


def jittered_ms(delay_ms: int) -> int:
    """Between half of a delay and all of it, so that what failed together does not come together."""
    return random.randint(delay_ms // 2, delay_ms)
