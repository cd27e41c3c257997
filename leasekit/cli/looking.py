"""What the operators' reading commands find out: tenants, lanes, why a row waits, what a lane does.

Nothing is written. What the library's calls do not tell (a line's oldest row, a place in it) is read
from the server by the keys of leasekit.keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from leasekit import codec
from leasekit.cli.failures import NotThere
from leasekit.cli.reading import Document, check_known, tenant_text
from leasekit.cli.tables import span
from leasekit.client import Leasekit, Tenant
from leasekit.errors import InvalidInput
from leasekit.keys import Keys, registry_keys, route_of
from leasekit.model import IdempotencyRecord, IdempotencyStatus, Row, RowStatus
from leasekit.scope import decode_cursor, encode_cursor

__all__ = ["explain_key", "explain_lease", "explain_row", "lanes", "tail", "tenants"]

TAIL_ROWS_MAX = 200
TAIL_OVERLAP_MS = 1_000
LIST_OF = {"done": "outbox_done", "dead": "outbox_dead", "unknown": "outbox_unknown"}


async def tenants(kit: Leasekit, *, limit: int, cursor: str | None) -> Document:
    """A page of the registry: each tenant, when it was last seen, and on which clock it is."""
    page = await kit.tenants(cursor, limit=limit)
    tags = [tenant.tag for tenant in page.items]
    seen, clocks = [], []
    if tags:
        keys = registry_keys(kit.prefix)
        seen = await kit.backend.command("ZMSCORE", keys["seen"], *tags)
        clocks = await kit.backend.command("HMGET", keys["clocks"], *tags)
    items = [
        {
            "tenant": tenant_text(tenant),
            "last_seen_at_ms": None if at is None else int(float(at)),
            "clock": None if clock is None else clock.decode(),
        }
        for tenant, at, clock in zip(page.items, seen, clocks, strict=True)
    ]
    return {"now_ms": await kit.now_ms(), "items": items, "next_cursor": page.next_cursor}


async def lanes(kit: Leasekit, tenant: Tenant, *, limit: int, cursor: str | None) -> Document:
    """A page of a tenant's lanes by name: what waits, what is held, and since when the oldest is due."""
    codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
    position = decode_cursor(cursor, (str, str))
    found = sorted((await tenant.outbox.counts()).lanes, key=lambda one: (one.lane, one.target))
    if not found and cursor is None:
        await check_known(kit, tenant)
    if position:
        found = [one for one in found if [one.lane, one.target] > position]
    page, keys = found[:limit], Keys(kit.prefix, tenant.tag)
    lines = [keys.outbox_due(route_of(one.lane, one.target)) for one in page]
    firsts = await kit.backend.look(*[("ZRANGE", line, 0, 0, "WITHSCORES") for line in lines])
    now_ms = await kit.now_ms()
    items = [
        {
            "lane": one.lane,
            "target": one.target,
            "depth": one.pending,
            "in_flight": one.claimed,
            "unknown": one.unknown,
            "dead_lettered": one.dead_lettered,
            "oldest_due_at_ms": _first_score(first),
            "last_enqueue_at_ms": one.last_enqueue_at_ms,
        }
        for one, first in zip(page, firsts, strict=True)
    ]
    more = encode_cursor(page[-1].lane, page[-1].target) if len(found) > limit else None
    return {"tenant": tenant_text(tenant), "now_ms": now_ms, "items": items, "next_cursor": more}


def _first_score(pairs: list[Any]) -> int | None:
    """The score of a page of one member, which is flat or in pairs as the server's protocol has it."""
    if not pairs:
        return None
    first = pairs[0]
    return int(float(first[1] if isinstance(first, list) else pairs[1]))


# --- explain --------------------------------------------------------------------------------------


async def explain_row(kit: Leasekit, tenant: Tenant, id: str) -> Document:
    """Why a row can be claimed now, or cannot, and what is before it."""
    row = await tenant.outbox.get(id)
    if row is None:
        await check_known(kit, tenant)
        raise NotThere(
            f"row {id} is not in tenant {tenant_text(tenant)}: it was never enqueued there, or it "
            "was finished and forgotten"
        )
    line = Keys(kit.prefix, tenant.tag).outbox_due(route_of(row.lane, row.target))
    rank = await kit.backend.command("ZRANK", line, id)
    now_ms = await kit.now_ms()
    due = await kit.backend.command("ZCOUNT", line, "-inf", now_ms)
    is_claimable, reasons = why(row, now_ms)
    ahead = None if rank is None else int(rank)
    if is_claimable and ahead:
        reasons.append(f"{ahead} rows stand before it in line; claims take those first")
    in_line = row.status in (RowStatus.PENDING, RowStatus.CLAIMED)
    if in_line and ahead is None:
        is_claimable = False
        reasons = ["it is in no line, which is damage: run leasekit doctor --deep"]
    return {
        "tenant": tenant_text(tenant),
        "now_ms": now_ms,
        "id": id,
        "lane": row.lane,
        "target": row.target,
        "status": row.status.value,
        "claimable": is_claimable,
        "why": reasons,
        "due_at_ms": row.lease_expires_at_ms or (row.available_at_ms if in_line else None),
        "holder": row.consumer,
        "lease_expires_at_ms": row.lease_expires_at_ms,
        "attempt_count": row.attempt_count,
        "max_attempts": row.max_attempts,
        "on_expiry": row.on_expiry,
        "rows_before_it": ahead,
        "due_in_its_lane": int(due),
        "last_error": row.last_error,
    }


def why(row: Row, now_ms: int) -> tuple[bool, list[str]]:
    """Whether a row can be claimed at an instant, and the reasons in words."""
    if row.status is RowStatus.PENDING:
        left_ms = row.available_at_ms - now_ms
        if left_ms <= 0:
            return True, [f"it waits in line and is due since {span(-left_ms)}"]
        cause = {"requeued": "it was nacked and is tried again", "enqueued": "it was enqueued for"}
        return False, [f"{cause.get(row.cause, 'it is due')} in {span(left_ms)}"]
    if row.status is RowStatus.CLAIMED:
        left_ms = (row.lease_expires_at_ms or 0) - now_ms
        used_up = row.max_attempts is not None and row.attempt_count >= row.max_attempts
        after = (
            "becomes unknown: it parks, because it may have been sent"
            if row.on_expiry == "park"
            else f"is dead-lettered: attempt {row.attempt_count} was its last"
            if used_up
            else "may be claimed by others"
        )
        if left_ms > 0:
            held = f"{row.consumer or 'somebody'} holds it for another {span(left_ms)}"
            return False, [held, f"if that lease ends without an ack, it {after}"]
        ended = f"the lease of {row.consumer or 'its holder'} ended {span(-left_ms)} ago"
        return not used_up, [ended, f"at the next claim on its lane it {after}"]
    if row.status is RowStatus.UNKNOWN:
        return False, [
            "its holder vanished and it parks: nobody can say whether it was sent",
            "it leaves by a late ack or nack with its token, or by a verdict:",
            f"leasekit resolve {row.id} sent|redrive|dead --reason ...",
        ]
    if row.status is RowStatus.DEAD_LETTERED:
        how = {
            "nacked": "its attempts are used up",
            "permanent": "its holder said that trying again is of no use",
            "expired": "the lease of its last attempt ended without an answer",
            "resolved": "an operator decided so",
        }
        return False, [
            f"it is a dead letter: {how.get(row.cause, row.cause)}",
            f"leasekit redrive {row.id} lets it wait again, with all its attempts",
        ]
    return False, [f"it is {row.status.value}: there is nothing left to do"]


async def explain_lease(kit: Leasekit, tenant: Tenant, name: str) -> Document:
    """Whether a name can be acquired now, and from whom not."""
    holder = await tenant.leases.get(name)
    if holder is None:
        await check_known(kit, tenant)
    now_ms = await kit.now_ms()
    reasons = ["nobody holds it: the next acquire gets it"]
    if holder is not None:
        reasons = [f"{holder.owner} holds it for another {span(holder.expires_at_ms - now_ms)}"]
    found: Document = {
        "tenant": tenant_text(tenant),
        "now_ms": now_ms,
        "name": name,
        "acquirable": holder is None,
        "why": reasons,
    }
    return found | ({} if holder is None else msgspec.to_builtins(holder))


async def explain_key(kit: Leasekit, tenant: Tenant, operation: str, key: str) -> Document:
    """Whether an idempotency key can be reserved now, and why not."""
    record = await tenant.idempotency.get(operation, key)
    if record is None:
        await check_known(kit, tenant)
    now_ms = await kit.now_ms()
    is_free, reasons = True, ["it was never reserved, or was released or forgotten"]
    if record is not None:
        is_free, reasons = _why_key(record, now_ms)
    return {
        "tenant": tenant_text(tenant),
        "now_ms": now_ms,
        "operation": operation,
        "key": key,
        "reservable": is_free,
        "why": reasons,
        "status": None if record is None else record.status.value,
        "owner": None if record is None else record.owner,
        "lease_expires_at_ms": None if record is None else record.lease_expires_at_ms,
        "expires_at_ms": None if record is None else record.expires_at_ms,
    }


def _why_key(record: IdempotencyRecord, now_ms: int) -> tuple[bool, list[str]]:
    if record.expires_at_ms and record.expires_at_ms <= now_ms:
        return True, ["the key's own end is reached: it is free again"]
    if record.outcome is not None:
        return False, ["its first use is complete: the same request gets that outcome again"]
    if record.status is IdempotencyStatus.UNKNOWN:
        return False, [
            f"its first use by {record.owner} vanished, and it parks: nobody knows what it did",
            "ask the destination, then complete it, or free it with leasekit release key",
        ]
    if record.lease_expires_at_ms is None:
        return False, [f"{record.owner} has reserved it without end and has not completed it"]
    left_ms = record.lease_expires_at_ms - now_ms
    if left_ms <= 0:
        return True, [f"the lease of {record.owner} ended {span(-left_ms)} ago: it is free again"]
    return False, [f"its first use by {record.owner} may run for another {span(left_ms)}"]


# --- tail -----------------------------------------------------------------------------------------


async def tail(
    kit: Leasekit, tenant: Tenant, lane: str, target: str, *, every_ms: int
) -> AsyncIterator[Document]:
    """What happens on a lane, for ever: first the rows that are in line, then each change of state.

    The first TAIL_ROWS_MAX rows in line are followed, and as many that leave it between two looks.
    What comes and goes between two looks is told by its end alone.
    """
    codec.check_text(lane, "lane")
    codec.check_text(target, "target")
    if not (await tenant.outbox.counts(lane=lane, target=target)).lanes:
        raise NotThere(
            f"nothing was ever enqueued on {lane} {target} of tenant {tenant_text(tenant)}; "
            "leasekit lanes lists what there is"
        )
    known: dict[str, tuple[str, int]] = {}
    ended: dict[str, int] = {}
    since_ms = await kit.now_ms()
    while True:
        now_ms = await kit.now_ms()
        changed: list[Row] = []
        in_line = await _in_line(tenant, lane, target)
        for row in in_line:
            if known.get(row.id) != _mark(row):
                changed.append(row)
                known[row.id] = _mark(row)
        gone = known.keys() - {row.id for row in in_line}
        finished = await _ended(kit, tenant, since_ms - TAIL_OVERLAP_MS)
        wanted = [*gone, *[id for id, at_ms in finished.items() if ended.get(id) != at_ms]]
        for id in sorted(set(wanted)):
            found = await tenant.outbox.get(id)
            if found is None:
                if known.pop(id, None):
                    yield {"at_ms": now_ms, "id": id, "status": "forgotten", "cause": "deleted"}
                continue
            if (found.lane, found.target) != (lane, target):
                continue
            if found.status in (RowStatus.PENDING, RowStatus.CLAIMED):
                if known.get(id) != _mark(found):
                    changed.append(found)
                    known[id] = _mark(found)
                continue
            known.pop(id, None)
            if ended.get(id) != found.finished_at_ms and (found.finished_at_ms or 0) >= since_ms:
                changed.append(found)
        # What ended longer ago than the overlap is not read again, and need not be remembered.
        ended = finished | {id: at for id, at in ended.items() if at >= since_ms}
        for row in sorted(changed, key=lambda one: one.id):
            yield _event(row, now_ms)
        since_ms = max(since_ms, now_ms - TAIL_OVERLAP_MS)
        await asyncio.sleep(every_ms / 1_000)


def _mark(row: Row) -> tuple[str, int]:
    """What makes a change worth a line; a claim that is extended is not one."""
    return f"{row.status.value} {row.cause}", row.claim_count


async def _in_line(tenant: Tenant, lane: str, target: str) -> list[Row]:
    page = await tenant.outbox.list(status=None, lane=lane, target=target, limit=TAIL_ROWS_MAX)
    return [row for row in page.items if row.status in (RowStatus.PENDING, RowStatus.CLAIMED)]


async def _ended(kit: Leasekit, tenant: Tenant, since_ms: int) -> dict[str, int]:
    """Ids and instants of the tenant's rows that became sent, cancelled, dead or unknown since."""
    keys = Keys(kit.prefix, tenant.tag)
    found: dict[str, int] = {}
    for noun in LIST_OF.values():
        pairs = await kit.backend.command(
            "ZRANGEBYSCORE", getattr(keys, noun), max(since_ms, 0), "+inf",
            "WITHSCORES", "LIMIT", 0, TAIL_ROWS_MAX,
        )  # fmt: skip
        flat = [part for pair in pairs for part in pair] if _is_paired(pairs) else pairs
        for id, score in zip(flat[::2], flat[1::2], strict=True):
            found[id.decode()] = int(float(score))
    return found


def _is_paired(pairs: list[Any]) -> bool:
    return bool(pairs) and isinstance(pairs[0], list)


def _event(row: Row, now_ms: int) -> Document:
    at_ms = row.finished_at_ms or (row.claimed_at_ms if row.status is RowStatus.CLAIMED else None)
    return {
        "at_ms": at_ms or (row.created_at_ms if row.cause == "enqueued" else now_ms),
        "id": row.id,
        "status": row.status.value,
        "cause": row.cause,
        "attempt_count": row.attempt_count,
        "holder": row.consumer,
        "due_at_ms": row.available_at_ms if row.status is RowStatus.PENDING else None,
        "last_error": row.last_error,
    }


def check_every(every_ms: int) -> int:
    """How often to look: not so often that looking is work for the server."""
    if every_ms < 100:
        raise InvalidInput("--every must be at least 100ms", field="every", limit=100)
    return every_ms
