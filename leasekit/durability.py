"""Durability classes: what an acknowledged write survives.

`none`: what the server survives by its own settings; a failover may lose it. `replicated(n)`: it has
reached n replicas when the caller is answered. `fsync`: it was synced to the primary's disk, which a
server with `appendfsync always` does before it answers.

Source: design 7; evidence/reliability 2.1, 2.2.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from leasekit.errors import InvalidInput

__all__ = ["Durability", "durability_of", "replicated"]

REPLICAS_MAX = 100
TIMEOUT_MS_DEFAULT = 1_000
TIMEOUT_MS_MAX = 600_000

_TEXT = re.compile(r"replicated\(\s*([0-9]{1,9})\s*(?:,\s*timeout_ms\s*=\s*([0-9]{1,9})\s*)?\)\Z")


class Durability(msgspec.Struct, frozen=True):
    """A class of durability. Its text, `str()`, is what `durability_of` reads.

    kind: see the module. replicas: how many must have it, for `replicated` only. timeout_ms: how long
    they are waited for at most; a short lease or client timeout makes it less.
    """

    kind: Literal["none", "replicated", "fsync"]
    replicas: int = 0
    timeout_ms: int = TIMEOUT_MS_DEFAULT

    def __str__(self) -> str:
        if self.kind != "replicated":
            return self.kind
        waits = "" if self.timeout_ms == TIMEOUT_MS_DEFAULT else f", timeout_ms={self.timeout_ms}"
        return f"replicated({self.replicas}{waits})"


# What a server must say that syncs each write before it answers.
FSYNC_SETTINGS = {
    "appendonly": "yes",
    "appendfsync": "always",
    "no-appendfsync-on-rewrite": "no",
}

NONE = Durability("none")
FSYNC = Durability("fsync")


def replicated(n: int = 1, *, timeout_ms: int = TIMEOUT_MS_DEFAULT) -> Durability:
    """The class of writes that n replicas have, 1..100; they are waited for 1..600 000 ms at most.

    Raises InvalidInput.
    """
    _check(n, "replicas", REPLICAS_MAX)
    _check(timeout_ms, "timeout_ms", TIMEOUT_MS_MAX)
    return Durability("replicated", n, timeout_ms)


def durability_of(value: object) -> Durability:
    """The class that a caller named: a Durability, or the text `none`, `fsync`, `replicated(2)` or
    `replicated(2, timeout_ms=500)`. Raises InvalidInput."""
    if isinstance(value, Durability):
        if value.kind == "replicated":
            return replicated(value.replicas, timeout_ms=value.timeout_ms)
        value = value.kind
    if isinstance(value, str):
        if value == "none":
            return NONE
        if value == "fsync":
            return FSYNC
        if found := _TEXT.match(value):
            waits = TIMEOUT_MS_DEFAULT if found[2] is None else int(found[2])
            return replicated(int(found[1]), timeout_ms=waits)
    raise InvalidInput(
        "durability must be 'none', 'fsync', 'replicated(n)' or leasekit.replicated(n): nothing was "
        "sent",
        field="durability",
    )


def _check(value: object, field: str, most: int) -> None:
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not 1 <= value <= most:  # type: ignore[operator]  # a whole number by now
        raise InvalidInput(
            f"durability: {field} must be a whole number from 1 to {most}",
            field=field,
            limit=most,
        )
