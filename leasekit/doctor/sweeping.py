"""All of one tenant, concept by concept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from typing import Any

from leasekit.connect import Backend
from leasekit.doctor.finding import Finding, Problem
from leasekit.doctor.gate import GateSweep
from leasekit.doctor.idempotency import check_records
from leasekit.doctor.lease import check_leases
from leasekit.doctor.outbox import OutboxSweep, is_route
from leasekit.doctor.pages import PAGE_MOST, Pages
from leasekit.keys import Keys, key_pattern, tenant_of_key

__all__ = ["scan_keys", "sweep"]

SCAN_COUNT = 1_000

_STRINGS = ("fence", "gate_dataset")
_HASHES = ("docs", "state", "errors", "tally", "dedupe", "claims", "facts", "barrier")


async def scan_keys(backend: Backend, prefix: str, tag: str | None = None) -> dict[str, set[str]]:
    """By encoded tenant, all keys under a prefix, by bounded SCANs of the whole server."""
    found: dict[str, set[str]] = defaultdict(set)
    cursor: Any = 0
    while True:
        cursor, keys = await backend.command(
            "SCAN", cursor, "MATCH", key_pattern(prefix, tag), "COUNT", SCAN_COUNT
        )
        for raw in keys:
            key = raw.decode("utf-8", "replace")
            owner = tenant_of_key(prefix, key)
            if owner is not None:
                found[owner].add(key)
        if not int(cursor):
            return found


async def sweep(
    backend: Backend,
    prefix: str,
    tag: str,
    *,
    keys_found: set[str] | None = None,
    on_progress: Callable[[int], None] = lambda looked_at: None,
) -> AsyncIterator[Finding]:
    """All damage of one tenant, as it is found. `keys_found`: what `scan_keys` gave for it.

    on_progress is told how many entries were looked at since it was told last.
    """
    if keys_found is None:
        keys_found = (await scan_keys(backend, prefix, tag)).get(tag, set())
    pages = Pages(backend, Keys(prefix, tag), on_progress)
    async for finding in _check_types(pages, keys_found):
        yield finding
        if finding.kind == "wrong_type":
            return
    for check in (
        OutboxSweep(pages, keys_found).run(),
        check_leases(pages),
        check_records(pages),
        GateSweep(pages).run(),
        _check_fence(pages),
    ):
        async for finding in check:
            yield finding


async def _check_types(pages: Pages, keys_found: set[str]) -> AsyncIterator[Finding]:
    keys = pages.keys
    wanted = {getattr(keys, slot): _type_of(slot) for slot in keys.__slots__ if slot != "tenant"}
    line_start = keys.outbox_due("")
    kinds: dict[str, str] = {}
    for key in sorted(keys_found):
        is_line = key.startswith(line_start) and is_route(key.removeprefix(line_start))
        if key in wanted or is_line:
            kinds[key] = wanted.get(key, "zset")
        else:
            yield pages.finding_at(key, None, Problem("foreign_key", "", "no key of leasekit"))
    ours = list(kinds)
    for start in range(0, len(ours), PAGE_MOST):
        some = ours[start : start + PAGE_MOST]
        told = await pages.backend.look(*[("TYPE", key) for key in some])
        for key, found in zip(some, told, strict=True):
            if found.decode() not in (kinds[key], "none"):
                what = f"it is a {found.decode()}; it must be a {kinds[key]}"
                yield pages.finding_at(key, None, Problem("wrong_type", "", what))


async def _check_fence(pages: Pages) -> AsyncIterator[Finding]:
    """A fence only rises: read last, it is above all that were seen."""
    last = await pages.backend.command("GET", pages.keys.fence)
    told = int(last) if last and last.isdigit() else 0
    if told < pages.fence_most:
        what = f"the last fence given is kept as {told}, and {pages.fence_most} was given"
        yield pages.finding_at(pages.keys.fence, None, Problem("fence_behind", "", what))


def _type_of(slot: str) -> str:
    if slot in _STRINGS:
        return "string"
    return "hash" if slot.partition("_")[2] in _HASHES else "zset"
