"""What the operators' changing commands do: page by page, so that ctrl-C stops them between two pages.

Each change is one command of the protocol that decides by itself, so a row that has moved on since it
was listed is left alone and counted as such. A filtered run gives the cursor at which it stopped.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from leasekit import codec
from leasekit.cli.failures import NotThere
from leasekit.cli.reading import Document, check_known, tenant_text
from leasekit.client import Leasekit, Tenant
from leasekit.doctor import read_state
from leasekit.errors import InvalidInput
from leasekit.keys import Keys
from leasekit.model import Page, RedriveOutcome, Row, RowStatus

__all__ = [
    "Filter",
    "cancel",
    "duration_ms",
    "purge",
    "redrive",
    "release_key",
    "release_lease",
    "release_row",
]

PAGE_ROWS = 250
SHOWN_MAX = 10
CAUSES = ("nacked", "permanent", "expired", "resolved")
PURGED = ("finished", "dead", "keys")
UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}

# Called with how many were done so far, and of how many; None: that is not known.
Progress = Callable[[int, int | None], None]
Changing = Callable[[Row], Awaitable[Any]]


def duration_ms(text: str, field: str) -> int:
    """`90s`, `15m`, `2h`, `7d` or `250ms` in milliseconds."""
    found = re.fullmatch(r"(\d{1,12})(ms|s|min|m|h|d)", text.strip())
    if found is None:
        raise InvalidInput(
            f"--{field} must be a number and a unit, such as 90s, 15m, 2h or 7d, not {text!r}",
            field=field,
        )
    return int(found[1]) * UNITS_MS[found[2]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which rows of a list are meant; None: any."""

    lane: str | None = None
    target: str | None = None
    cause: str | None = None
    error: str | None = None
    older_than_ms: int | None = None

    def __post_init__(self) -> None:
        if self.cause is not None and self.cause not in CAUSES:
            raise InvalidInput(f"--cause must be one of {', '.join(CAUSES)}", field="cause")

    def takes(self, row: Row, now_ms: int) -> bool:
        since_ms = row.finished_at_ms or row.created_at_ms
        return (
            self.cause in (None, row.cause)
            and (self.error is None or self.error in (row.last_error or ""))
            and (self.older_than_ms is None or since_ms <= now_ms - self.older_than_ms)
        )

    def __str__(self) -> str:
        words = {"lane": self.lane, "target": self.target, "cause": self.cause, "error": self.error}
        said = [f"{name} {value}" for name, value in words.items() if value is not None]
        if self.older_than_ms is not None:
            said.append(f"older than {self.older_than_ms} ms")
        return ", ".join(said) or "all"


async def redrive(
    kit: Leasekit,
    tenant: Tenant,
    *,
    id: str | None,
    wanted: Filter,
    limit: int,
    cursor: str | None,
    dry_run: bool,
    progress: Progress,
) -> Document:
    """Dead letters wait again: one, or those that a filter takes, at most `limit` of them."""

    def again(row: Row) -> Awaitable[RedriveOutcome]:
        """Of the row as it was listed: what died anew since, maybe of something else, is left."""
        return tenant.outbox.redrive(row.id, claim_count=row.claim_count)

    change = None if dry_run else again
    if id is not None:
        return await _one(kit, tenant, id, change, RowStatus.DEAD_LETTERED)
    return await _many(
        kit, tenant, RowStatus.DEAD_LETTERED, wanted, limit, cursor, change, progress
    )


async def cancel(
    kit: Leasekit,
    tenant: Tenant,
    *,
    id: str | None,
    wanted: Filter,
    limit: int,
    cursor: str | None,
    dry_run: bool,
    progress: Progress,
) -> Document:
    """Pending rows leave the line for good: one, or those that a filter takes."""
    change: Changing | None = None if dry_run else lambda row: tenant.outbox.cancel(row.id)
    if id is not None:
        return await _one(kit, tenant, id, change, RowStatus.PENDING)
    return await _many(kit, tenant, RowStatus.PENDING, wanted, limit, cursor, change, progress)


async def _row(kit: Leasekit, tenant: Tenant, id: str) -> Row:
    row = await tenant.outbox.get(id)
    if row is None:
        await check_known(kit, tenant)
        raise NotThere(
            f"row {id} is not in tenant {tenant_text(tenant)}: it was never enqueued there, or it "
            "was finished and forgotten; nothing was changed"
        )
    return row


async def _one(
    kit: Leasekit, tenant: Tenant, id: str, change: Changing | None, status: RowStatus
) -> Document:
    row = await _row(kit, tenant, id)
    if row.status is not status:
        raise NotThere(f"row {id} is {row.status.value}, not {status.value}: nothing was changed")
    outcome = "would_change" if change is None else (await change(row)).value
    if outcome in ("missing", "forgotten", "not_dead", "not_pending"):
        raise NotThere(f"row {id} has moved on meanwhile ({outcome}): nothing was changed")
    return _result(tenant, change is None, Counter({outcome: 1}), [id], None)


async def _many(
    kit: Leasekit,
    tenant: Tenant,
    status: RowStatus,
    wanted: Filter,
    limit: int,
    cursor: str | None,
    change: Changing | None,
    progress: Progress,
) -> Document:
    codec.check_whole(limit, "limit", 1, 1_000_000)
    counts = await tenant.outbox.counts(lane=wanted.lane, target=wanted.target)
    if not counts.lanes:
        await check_known(kit, tenant)
    total = counts.pending if status is RowStatus.PENDING else counts.dead_lettered
    looked_at = 0
    outcomes: Counter[str] = Counter()
    shown: list[str] = []
    now_ms = await kit.now_ms()
    while True:
        page = await _page(tenant, status, wanted, PAGE_ROWS, cursor)
        taken = [at for at, row in enumerate(page.items, 1) if wanted.takes(row, now_ms)]
        left = limit - outcomes.total()
        if len(taken) > left:
            # Once more, and no further than the last row that is wanted: its cursor goes on there.
            page = await _page(tenant, status, wanted, taken[left - 1], cursor)
        rows = [row for row in page.items if wanted.takes(row, now_ms)]
        if change is None:
            outcomes["would_change"] += len(rows)
        else:
            for outcome in await asyncio.gather(*[change(row) for row in rows]):
                outcomes[outcome.value] += 1
        shown += [row.id for row in rows[: SHOWN_MAX - len(shown)]]
        looked_at += len(page.items)
        progress(looked_at, max(total, looked_at))
        cursor = page.next_cursor
        if cursor is None or outcomes.total() >= limit:
            return _result(tenant, change is None, outcomes, shown, cursor)


async def _page(
    tenant: Tenant, status: RowStatus, wanted: Filter, limit: int, cursor: str | None
) -> Page[Row]:
    return await tenant.outbox.list(
        status=status, lane=wanted.lane, target=wanted.target, limit=limit, cursor=cursor
    )


def _result(
    tenant: Tenant, dry_run: bool, outcomes: Counter[str], ids: list[str], cursor: str | None
) -> Document:
    return {
        "tenant": tenant_text(tenant),
        "dry_run": dry_run,
        "outcomes": {word: count for word, count in outcomes.items() if count},
        "first_ids": ids,
        "next_cursor": cursor,
    }


# --- overruling a holder --------------------------------------------------------------------------


async def release_row(
    kit: Leasekit, tenant: Tenant, id: str, *, actor: str, reason: str, dry_run: bool
) -> Document:
    """Take a claimed row from its holder by nacking it under the holder's own token.

    So the reason is kept with the row, the attempt counts, and the holder is told lost_claim.
    """
    note = _note(actor, reason)
    row = await _row(kit, tenant, id)
    if row.status is not RowStatus.CLAIMED:
        raise NotThere(f"row {id} is {row.status.value}, nobody holds it: nothing was changed")
    if row.on_expiry == "park":
        raise InvalidInput(
            f"row {id} parks: its holder may have sent it, so it must not wait again unasked; "
            "nothing was changed; when its lease has ended, say what became of it with "
            "leasekit resolve",
            field="id",
        )
    outcome = "would_change"
    if not dry_run:
        line = await kit.backend.command("HGET", Keys(kit.prefix, tenant.tag).outbox_state, id)
        state = None if line is None else read_state(line)
        if state is None or state.status != "claimed" or state.fence != row.fence:
            raise NotThere(f"row {id} has moved on meanwhile: nothing was changed")
        outcome = (await tenant.outbox.nack(id, state.token, error=note)).value
    return _overruled(tenant, outcome, row.consumer, dry_run, is_recorded=True) | {"id": id}


async def release_lease(
    kit: Leasekit, tenant: Tenant, name: str, *, actor: str, reason: str, dry_run: bool
) -> Document:
    """Free a name under its holder's own token; the holder learns it at its next renewal."""
    _note(actor, reason)
    holder = await tenant.leases.get(name)
    if holder is None:
        await check_known(kit, tenant)
        raise NotThere(f"nobody holds lease {name} of tenant {tenant_text(tenant)}")
    outcome = "would_change"
    if not dry_run:
        line = await kit.backend.command("HGET", Keys(kit.prefix, tenant.tag).lease_docs, name)
        words = (line or b"").decode("utf-8", "replace").split(" ", 3)
        if len(words) < 4 or words[0] != "held" or words[2] != str(holder.fence):
            raise NotThere(f"lease {name} has moved on meanwhile: nothing was changed")
        outcome = (await tenant.leases.release(name, words[1])).value
    return _overruled(tenant, outcome, holder.owner, dry_run, is_recorded=False) | {"name": name}


async def release_key(
    kit: Leasekit,
    tenant: Tenant,
    operation: str,
    key: str,
    *,
    actor: str,
    reason: str,
    dry_run: bool,
) -> Document:
    """Free a reservation that is not completed, shown by its fingerprint."""
    _note(actor, reason)
    record = await tenant.idempotency.get(operation, key)
    if record is None:
        await check_known(kit, tenant)
        raise NotThere(
            f"tenant {tenant_text(tenant)} knows no key {key} of operation {operation}: nothing was "
            "changed"
        )
    outcome = "would_change"
    if not dry_run:
        released = await tenant.idempotency.release(
            operation, key, fingerprint=record.request_fingerprint
        )
        outcome = released.value
        if outcome != "released":
            why = "it is completed or in conflict and stays" if outcome == "kept" else outcome
            raise NotThere(f"key {key} of operation {operation}: {why}; nothing was changed")
    told = _overruled(tenant, outcome, record.owner, dry_run, is_recorded=False)
    return told | {"operation": operation, "key": key}


def _note(actor: str, reason: str) -> str:
    codec.check_text(actor, "actor")
    codec.check_text(reason, "reason", bytes_max=codec.ERROR_TEXT_MAX)
    return f"taken from its holder by {actor}: {reason}"


def _overruled(
    tenant: Tenant, outcome: str, holder: str | None, dry_run: bool, *, is_recorded: bool
) -> Document:
    if outcome in ("lost_claim", "lost", "forgotten", "missing"):
        raise NotThere(f"it has moved on meanwhile ({outcome}): nothing was changed")
    return {
        "tenant": tenant_text(tenant),
        "dry_run": dry_run,
        "outcome": outcome,
        "holder": holder,
        "reason_recorded": is_recorded and not dry_run,
    }


# --- purge ----------------------------------------------------------------------------------------


async def purge(
    kit: Leasekit,
    tenant: Tenant,
    what: str,
    *,
    older_than_ms: int,
    unfinished: bool,
    limit: int,
    dry_run: bool,
    progress: Progress,
) -> Document:
    """Delete finished rows, dead letters or idempotency records, the oldest first."""
    if what not in PURGED:
        raise InvalidInput(f"purge takes one of {', '.join(PURGED)}, not {what!r}", field="what")
    codec.check_whole(limit, "limit", 1, 100_000_000)
    await check_known(kit, tenant)
    before_ms = max(await kit.now_ms() - older_than_ms, 0)
    if what == "keys":
        deleted, left = await _purge_keys(tenant, before_ms, unfinished, dry_run)
    else:
        keys = Keys(kit.prefix, tenant.tag)
        line = keys.outbox_dead if what == "dead" else keys.outbox_done
        due = int(await kit.backend.command("ZCOUNT", line, "-inf", before_ms))
        deleted = 0
        while not dry_run and deleted < min(due, limit):
            gone = await tenant.outbox.purge(
                before_ms=before_ms, dead=what == "dead", limit=min(PAGE_ROWS, limit - deleted)
            )
            deleted += gone
            progress(deleted, min(due, limit))
            if not gone:
                break
        left = max(due - deleted, 0)
    return {
        "tenant": tenant_text(tenant),
        "dry_run": dry_run,
        "what": what,
        "before_at_ms": before_ms,
        "deleted": deleted,
        "left": left,
    }


async def _purge_keys(
    tenant: Tenant, before_ms: int, unfinished: bool, dry_run: bool
) -> tuple[int, int]:
    if not dry_run:
        deleted = await tenant.idempotency.purge(before_ms=before_ms, unfinished=unfinished)
        return deleted, 0
    count, cursor = 0, None
    while True:
        page = await tenant.idempotency.list(limit=PAGE_ROWS, cursor=cursor)
        for record in page.items:
            if record.last_seen_at_ms <= before_ms:
                count += unfinished or record.outcome is not None
        cursor = page.next_cursor
        if cursor is None:
            return 0, count
