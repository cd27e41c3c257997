"""What the reading commands ask of the server, as values that are shown as JSON or as a table.

They go through the library's reading calls, which write nothing: not even the tenant into the
registry. Payloads and outcomes are left out here, so that nothing further up can show them by
mistake; `reveal` is the one way around.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote, unquote

import msgspec

from leasekit.cli.failures import NotThere
from leasekit.client import Leasekit, Tenant, connect
from leasekit.errors import InvalidInput
from leasekit.model import Counts, IdempotencyRecord, Row
from leasekit.policy import GatePolicy

__all__ = [
    "GATE",
    "Document",
    "counts_of_all",
    "counts_of_one",
    "keys",
    "leases",
    "open_kit",
    "parse_tenant",
    "rows",
    "show_key",
    "show_lease",
    "show_row",
    "shown_row",
    "tenant_text",
]

Document = dict[str, Any]

URL_VARIABLE = "LEASEKIT_URL"
TENANTS_NAMED = 5
GATE = GatePolicy()  # of this client alone: programs bring their own
TENANTS_A_PAGE = 1_000


def parse_tenant(text: str) -> tuple[str, str, str | None]:
    """`org/workspace[/deployment]`; a slash inside a part is written %2F."""
    parts = [unquote(part) for part in text.split("/")]
    if len(parts) not in (2, 3) or not all(parts):
        raise InvalidInput(
            f"--tenant must be org/workspace or org/workspace/deployment, not {text!r}; a slash "
            "inside a part is written %2F",
            field="tenant",
        )
    return parts[0], parts[1], parts[2] if len(parts) == 3 else None


def tenant_text(tenant: Tenant) -> str:
    context = tenant.context
    parts = (context.org_id, context.workspace_id, context.deployment_id)
    return "/".join(quote(part, safe="") for part in parts if part is not None)


@asynccontextmanager
async def open_kit(
    url: str | None, prefix: str, *, allow_eviction: bool = False
) -> AsyncIterator[Leasekit]:
    """A client of the server that the options name; never a new, empty one."""
    where = url or os.environ.get(URL_VARIABLE)
    if not where:
        raise InvalidInput(f"no server is named: give --url, or set {URL_VARIABLE}", field="url")
    _check_directory(where)
    async with connect(where, prefix=prefix, gate=GATE, allow_eviction=allow_eviction) as kit:
        yield kit


def _check_directory(url: str) -> None:
    scheme, _, rest = url.partition("://")
    if scheme.lower() != "embedded":
        return
    if not rest:
        raise InvalidInput(
            "embedded:// alone is a new, empty server: name the directory that holds the data, "
            "embedded://DIRECTORY",
            field="url",
        )
    if not os.path.isdir(os.path.expanduser(unquote(rest))):
        raise NotThere(f"there is no directory {unquote(rest)} with the data of an embedded server")


async def tenant_named(kit: Leasekit, text: str | None) -> Tenant:
    """The tenant of --tenant; InvalidInput that names some where none was given."""
    if text is not None:
        return kit.tenant(*parse_tenant(text))
    page = await kit.tenants(limit=TENANTS_NAMED)
    known = ", ".join(tenant_text(tenant) for tenant in page.items)
    more = ", ..." if page.next_cursor else ""
    there = f"there are {known}{more}" if known else "there are none on this server and prefix"
    raise InvalidInput(f"say which tenant with --tenant org/workspace: {there}", field="tenant")


async def check_known(kit: Leasekit, tenant: Tenant) -> None:
    """NotThere for a tenant that nothing was ever written to: most likely it is misspelt."""
    cursor: str | None = None
    while True:
        page = await kit.tenants(cursor, limit=TENANTS_A_PAGE)
        if any(one.tag == tenant.tag for one in page.items):
            return
        cursor = page.next_cursor
        if cursor is None:
            raise NotThere(
                f"nothing was ever written to tenant {tenant_text(tenant)} on this server and "
                "prefix; `leasekit counts` lists the tenants that there are"
            )


# --- counts ---------------------------------------------------------------------------------------


async def counts_of_one(
    kit: Leasekit, tenant: Tenant, *, lane: str | None, target: str | None
) -> Document:
    counts = await tenant.outbox.counts(lane=lane, target=target)
    if not counts.lanes:
        await check_known(kit, tenant)
    return _named(tenant, counts)


async def counts_of_all(kit: Leasekit, *, limit: int, cursor: str | None) -> Document:
    page = await kit.tenants(cursor, limit=limit)
    return {
        "items": [_summary(tenant, await tenant.outbox.counts()) for tenant in page.items],
        "next_cursor": page.next_cursor,
    }


def _summary(tenant: Tenant, counts: Counts) -> Document:
    return _named(tenant, counts) | {"lanes": len(counts.lanes)}


def _named(tenant: Tenant, counts: Counts) -> Document:
    found: Document = msgspec.to_builtins(counts)
    return {"tenant": tenant_text(tenant)} | found


# --- lists ----------------------------------------------------------------------------------------


async def rows(
    kit: Leasekit,
    tenant: Tenant,
    *,
    status: str | None,
    lane: str | None,
    target: str | None,
    limit: int,
    cursor: str | None,
) -> Document:
    page = await tenant.outbox.list(
        status=status, lane=lane, target=target, limit=limit, cursor=cursor
    )
    return await _page(
        kit, tenant, [shown_row(row, reveal=False) for row in page.items], cursor, page.next_cursor
    )


async def leases(
    kit: Leasekit, tenant: Tenant, *, starts_with: str, limit: int, cursor: str | None
) -> Document:
    page = await tenant.leases.list(prefix=starts_with, limit=limit, cursor=cursor)
    items = [msgspec.to_builtins(holder) for holder in page.items]
    return await _page(kit, tenant, items, cursor, page.next_cursor)


async def keys(kit: Leasekit, tenant: Tenant, *, limit: int, cursor: str | None) -> Document:
    page = await tenant.idempotency.list(limit=limit, cursor=cursor)
    items = [_record(record, reveal=False) for record in page.items]
    return await _page(kit, tenant, items, cursor, page.next_cursor)


async def _page(
    kit: Leasekit, tenant: Tenant, items: list[Document], cursor: str | None, following: str | None
) -> Document:
    if not items and cursor is None:
        await check_known(kit, tenant)
    return {
        "tenant": tenant_text(tenant),
        "now_ms": await kit.now_ms(),
        "items": items,
        "next_cursor": following,
    }


# --- one thing ------------------------------------------------------------------------------------


async def show_row(kit: Leasekit, tenant: Tenant, id: str, *, reveal: bool) -> Document:
    row = await tenant.outbox.get(id)
    if row is None:
        await check_known(kit, tenant)
        raise NotThere(
            f"row {id} is not in tenant {tenant_text(tenant)}: it was never enqueued there, or it "
            "was finished and forgotten"
        )
    return await _one(kit, tenant, shown_row(row, reveal=reveal))


async def show_key(
    kit: Leasekit, tenant: Tenant, operation: str, key: str, *, reveal: bool
) -> Document:
    record = await tenant.idempotency.get(operation, key)
    if record is None:
        await check_known(kit, tenant)
        raise NotThere(
            f"tenant {tenant_text(tenant)} knows no key {key} of operation {operation}: it was "
            "never reserved there, or was released or forgotten"
        )
    return await _one(kit, tenant, _record(record, reveal=reveal))


async def show_lease(kit: Leasekit, tenant: Tenant, name: str) -> Document:
    holder = await tenant.leases.get(name)
    if holder is None:
        await check_known(kit, tenant)
        raise NotThere(f"nobody holds lease {name} of tenant {tenant_text(tenant)}")
    return await _one(kit, tenant, msgspec.to_builtins(holder))


async def _one(kit: Leasekit, tenant: Tenant, found: Document) -> Document:
    return {"tenant": tenant_text(tenant), "now_ms": await kit.now_ms()} | found


def shown_row(row: Row, *, reveal: bool) -> Document:
    """All of a row, its payload by its size unless it is revealed."""
    shown: Document = msgspec.to_builtins(row)
    payload = shown.pop("payload")
    shown["payload_bytes"] = len(msgspec.json.encode(payload))
    shown["last_error"] = row.last_error
    if reveal:
        shown["payload"] = payload
    return shown


def _record(record: IdempotencyRecord, *, reveal: bool) -> Document:
    shown: Document = msgspec.to_builtins(record)
    outcome = shown.get("outcome")
    if outcome is not None:
        details = outcome.pop("details")
        outcome["details_bytes"] = len(msgspec.json.encode(details))
        if reveal:
            outcome["details"] = details
    return shown
