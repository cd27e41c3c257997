"""Who waits for rows is woken: one subscription a client, however many wait.

A hint says that rows of a tenant's route may be claimed in so many milliseconds. It is no promise:
`on_gap` tells every hearer that hints may have been missed, and each looks slowly for itself beside.

Source: design 5, "Waking"; lua/PROTOCOL.md, "Hints".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from leasekit.connect import Backend
from leasekit.keys import Keys, hint_pattern, hint_tenant
from leasekit.listen import Listener

__all__ = ["Hearer", "Hub"]


class Hearer(Protocol):
    """Who waits. Both are called in the event loop and must return soon."""

    def on_hint(self, tag: str, route: str, delay_ms: int) -> None:
        """A row of the tenant's route may be claimed in `delay_ms` milliseconds, 0 = now."""

    def on_gap(self) -> None:
        """Hints may have been missed until now; from now on they are heard."""


class Hub:
    """Hands hints to hearers. The subscription is there while somebody listens."""

    def __init__(self, backend: Backend, prefix: str) -> None:
        self._backend = backend
        self._prefix = prefix
        self._listener: Listener | None = None
        self._of_tenant: dict[str, set[Hearer]] = {}
        self._of_all: set[Hearer] = set()

    def add(self, hearer: Hearer, tags: Iterable[str] | None) -> None:
        """Let somebody hear the hints of these tenants, None = of all; `on_gap` follows."""
        if self._listener is None:
            self._listener = self._backend.listen(self._on_message, self.wake_all)
        if tags is None:
            self._of_all.add(hearer)
            self._listener.subscribe_pattern(hint_pattern(self._prefix), then=hearer.on_gap)
            return
        channels = []
        for tag in tags:
            self._of_tenant.setdefault(tag, set()).add(hearer)
            channels.append(Keys(self._prefix, tag).hint_channel)
        self._listener.subscribe(*channels, then=hearer.on_gap)

    async def remove(self, hearer: Hearer) -> None:
        """Let somebody hear nothing any more; the last one ends the connection."""
        listener = self._listener
        if listener is None:
            return
        if hearer in self._of_all:
            self._of_all.discard(hearer)
            if not self._of_all:
                listener.unsubscribe_pattern(hint_pattern(self._prefix))
        deserted = []
        for tag in [tag for tag, hearers in self._of_tenant.items() if hearer in hearers]:
            self._of_tenant[tag].discard(hearer)
            if not self._of_tenant[tag]:
                del self._of_tenant[tag]
                deserted.append(Keys(self._prefix, tag).hint_channel)
        listener.unsubscribe(*deserted)
        if not self._of_all and not self._of_tenant:
            self._listener = None
            await listener.close()

    def _on_message(self, channel: str, message: bytes) -> None:
        tag = hint_tenant(self._prefix, channel)
        route, _, delay = message.decode("ascii", "replace").partition(" ")
        if tag is None or not delay.isascii() or not delay.isdigit():
            return  # Not ours: anybody may publish there.
        for hearer in (*self._of_tenant.get(tag, ()), *self._of_all):
            hearer.on_hint(tag, route, int(delay))

    def wake_all(self) -> None:
        """Let all hearers look for themselves: hints may have been missed, or the client closes."""
        hearers = set(self._of_all).union(*self._of_tenant.values())
        for hearer in hearers:
            hearer.on_gap()
