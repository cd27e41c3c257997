"""Many records: pages show each once while others are written, and cost what they show.

As a command, with a size of its own: `PYTHONPATH=tests python tests/integration/test_views_volume.py 100000`
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections import Counter
from typing import Any

import view_records as records
from servers import Server, ServerProcess

import leasekit
from leasekit import Tenant
from leasekit.views import Filters

RUN = "run-a"
LATER_MS = 10**9
AT_A_TIME = 2_000
PAGES_TIMED = 60


async def fill(tenant: Tenant, count: int) -> None:
    """Dead letters of one run, changed one after the other."""
    for start in range(0, count, AT_A_TIME):
        await asyncio.gather(
            *[
                tenant.ledger.dead_letters.upsert(
                    records.letter(
                        tenant.context, RUN, f"dead-{at}", created_at_ms=at, updated_at_ms=at
                    )
                )
                for at in range(start, min(start + AT_A_TIME, count))
            ]
        )


async def add(tenant: Tenant, stop: asyncio.Event) -> int:
    """Writes newer ones until it is stopped; gives how many."""
    added = 0
    while not stop.is_set():
        id, at = f"later-{added}", LATER_MS + added
        row = records.letter(tenant.context, RUN, id, created_at_ms=at, updated_at_ms=at)
        await tenant.ledger.dead_letters.upsert(row)
        added += 1
    return added


async def page_through(tenant: Tenant, filters: Filters, limit: int | None = None) -> Counter[str]:
    """How often each record is shown, page by page to the end."""
    shown: Counter[str] = Counter()
    cursor: dict[str, Any] = {}
    while True:
        body = await tenant.views.reliability(filters, limit=limit, **cursor)
        shown.update(row["dead_letter_id"] for row in body["dead_letters"])
        following = body["pagination"]["next"]["dead_letters"]
        if following is None:
            return shown
        following.pop("before_created_at_ms", None)
        cursor = following


async def walk_while_others_write(
    tenant: Tenant, count: int, filters: Filters, limit: int | None = None
) -> int:
    """Every record that was there at the start is shown once, none twice; gives how many were added."""
    stop = asyncio.Event()
    writers = [asyncio.create_task(add(tenant, stop))]
    try:
        shown = await page_through(tenant, filters, limit)
    finally:
        stop.set()
        [added] = await asyncio.gather(*writers)
    assert {name for name in shown if name.startswith("dead-")} == {
        f"dead-{at}" for at in range(count)
    }
    assert set(shown.values()) == {1}
    return added


async def test_pages_show_each_record_once_while_others_write(
    server: Server, tenant_name: str
) -> None:
    """On all ways: of all runs, of one, and filtered."""
    async with leasekit.connect(server.url) as kit:
        tenant = kit.tenant(tenant_name, "w")
        await fill(tenant, 1_500)
        for number, filters in enumerate(
            (
                Filters(),
                Filters(run_id=RUN),
                Filters(status="open", active_only=True, before_created_at_ms=LATER_MS),
            )
        ):
            added = await walk_while_others_write(tenant, 1_500, filters, limit=200)
            assert added > 0, number


# --- as a command ---------------------------------------------------------------------------------


async def milliseconds(tenant: Tenant, count: int) -> dict[str, float]:
    """What a page of 250 of a run costs from here: the median of many, at different places."""
    found: dict[str, float] = {}
    places = {"first": None, "middle": f"dead-{count // 2}", "last": "dead-300"}
    for name, after_id in places.items():
        took: list[float] = []
        for _ in range(PAGES_TIMED):
            start = time.perf_counter()
            body = await tenant.views.reliability(
                Filters(run_id=RUN),
                limit=250,
                after_id=after_id,
                after_collection="dead_letters",
            )
            took.append(1_000 * (time.perf_counter() - start))
            assert body["counts"]["dead_letters"] == 250
        found[name] = round(statistics.median(took), 2)
    return found


async def measure(url: str, count: int) -> None:
    say = sys.stdout.write
    async with leasekit.connect(url) as kit:
        small, large = kit.tenant("small", "w"), kit.tenant("large", "w")
        await fill(small, 1_000)
        start = time.perf_counter()
        await fill(large, count)
        say(f"{count} written in {time.perf_counter() - start:.1f} s\n")
        say(f"page of 250 out of 1000, ms: {await milliseconds(small, 1_000)}\n")
        say(f"page of 250 out of {count}, ms: {await milliseconds(large, count)}\n")
        start = time.perf_counter()
        added = await walk_while_others_write(large, count, Filters(run_id=RUN))
        took = time.perf_counter() - start
        say(f"{count} paged through in {took:.1f} s, each once, while {added} were added\n")


if __name__ == "__main__":
    process = ServerProcess("valkey-9")
    process.start()
    try:
        asyncio.run(measure(process.url, int(sys.argv[1])))
    finally:
        process.stop()
