"""Tenants do not see each other: a view of one tenant is what it is where that tenant is alone.

Three tenants have records with the same ids, runs and keys. Whatever they hold, every read of every view
for one of them gives the same in the common store as in a store of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import view_records as records
from fakeredis import FakeServer
from hypothesis import given, settings
from hypothesis import strategies as st

import leasekit
from leasekit import Tenant
from leasekit.connect import _memory_servers
from leasekit.ledger.store import Store
from leasekit.views import Catalogue, Filters, Missing, RunFilters

NOW = 10_000
# Names that would run into one another if a part of them were dropped, joined or spelled alike.
TENANTS = (("a", "b", None), ("a", "b", "c"), ("A", "b", None))
RUNS = ("run-a", "RUN_A", "run-b")
IDS = ("x", "y")
KINDS = (
    *("run", "wait", "event", "snapshot", "effect", "letter", "compensation", "decision"),
    *("audit", "outbox"),
)
STATUSES = {
    "run": ("failed", "queued", "paused"),
    "wait": ("waiting", "escalated", "woken"),
    "effect": ("failed", "succeeded", "unknown"),
    "letter": ("open", "ignored"),
    "compensation": ("proposed", "completed", "awaiting_approval"),
    "outbox": ("failed", "sent"),
}

_numbers = itertools.count(1)

Spec = tuple[str, int, str, str, int, int, bool]
specs = st.tuples(
    st.sampled_from(KINDS),
    st.integers(0, len(TENANTS) - 1),
    st.sampled_from(RUNS),
    st.sampled_from(IDS),
    st.integers(0, 2),
    st.integers(1, 3),
    st.booleans(),
)


def url_of(names: list[str]) -> str:
    name = f"isolation-{next(_numbers)}"
    _memory_servers[name] = FakeServer(version=(7, 0, 0))
    names.append(name)
    return f"memory://{name}"


async def write(tenant: Tenant, spec: Spec) -> None:
    """One record; what no other tenant must see says whose it is."""
    kind, number, run_id, id, status, at, is_marked = spec
    context, ledger = tenant.context, tenant.ledger
    fields: dict[str, Any] = {"created_at_ms": at, "updated_at_ms": at}
    if kind in STATUSES:
        fields["status"] = STATUSES[kind][status % len(STATUSES[kind])]
    whose = {"metadata": {"whose": number} | (records.MARK if is_marked else {})}
    if kind == "run":
        scope = records.scope(context, "finance", grants=["g"] if is_marked else [])
        run = records.run(context, run_id, scope=scope, **fields, **whose)
        await ledger.runs.upsert(run, now_ms=NOW)
    elif kind == "wait":
        await ledger.waits.upsert(
            records.wait(context, run_id, id, wake_at_ms=at, **fields, **whose), now_ms=NOW
        )
    elif kind == "event":
        event = records.event(context, run_id, f"{id}{at}", 1, payload={"whose": number})
        await ledger.events.append(event, now_ms=NOW)
    elif kind == "snapshot":
        await ledger.snapshots.put(records.snapshot(context, run_id, id, at, **whose), now_ms=NOW)
    elif kind == "effect":
        await ledger.effects.upsert(
            records.effect(context, run_id, id, **fields, **whose), now_ms=NOW
        )
    elif kind == "letter":
        await ledger.dead_letters.upsert(
            records.letter(context, run_id, id, **fields, **whose), now_ms=NOW
        )
    elif kind == "compensation":
        await ledger.compensations.upsert(
            records.compensation(context, run_id, id, **fields, **whose), now_ms=NOW
        )
    elif kind == "decision":
        await ledger.decisions.record(
            records.decision(context, run_id, id, created_at_ms=at, **whose), now_ms=NOW
        )
    elif kind == "audit":
        payload = {"run_id": run_id, "whose": number}
        await ledger.audit.append("audit", payload, event_id=f"{id}{at}", now_ms=NOW)
    else:
        # An intent is written whole once; a second one of the same id is another tenant's affair.
        row = records.outbox_row(context, run_id, id, **fields, metadata={"whose": number})
        store = Store(tenant.views._reader.store.scope)
        if await store.intent(id, now_ms=NOW) is None:
            await records.write_outbox(store, row, now_ms=NOW)


async def everything(tenant: Tenant) -> list[tuple[str, Any]]:
    """Every read of every view, with the cursors that they give followed."""
    views = tenant.views
    seen: list[tuple[str, Any]] = []

    async def see(name: str, read: Any) -> Any:
        body = await read
        seen.append((name, body))
        return body

    for filters in (
        RunFilters(),
        RunFilters(status="failed", delegation_grant_id="g", source_binding_id="source"),
        RunFilters(org_id="a", org_unit_id="finance", data_class="customer_data"),
    ):
        await see("runs", views.runs(filters, limit=2, now_ms=NOW))
    for filters in (
        *(Filters(), Filters(active_only=True), Filters(run_id="run-a", status="open")),
        Filters(source_type="tool_effect", before_created_at_ms=3),
    ):
        body = await see("reliability", views.reliability(filters, limit=1, now_ms=NOW))
        for cursor in body["pagination"]["next"].values():
            if cursor is not None:
                place = {name: cursor[name] for name in ("after_id", "after_collection")}
                await see("followed", views.reliability(filters, limit=1, **place, now_ms=NOW))
    for id in IDS:
        await see("inferred", views.reliability(limit=1, after_id=id, now_ms=NOW))
    for run_id in RUNS:
        await see("run", views.run(run_id, now_ms=NOW))
        await see("run_reliability", views.run_reliability(run_id, now_ms=NOW))
        await see("observability", views.observability(run_id, now_ms=NOW))
        await see("plan", views.resume_plan(run_id, now_ms=NOW))
        await see("events", views.events(run_id, now_ms=NOW))
        await see("tail", views.events(run_id, tail=1, now_ms=NOW))
        await see("snapshots", views.snapshots(run_id, now_ms=NOW))
        for id in IDS:
            await see("snapshot", views.snapshot(run_id, id, now_ms=NOW))
    return seen


async def choices(tenant: Tenant) -> list[Any]:
    """What becomes of the choices that may be made; these write."""
    made: list[Any] = []
    for at, (run_id, id) in enumerate(itertools.product(RUNS, IDS)):
        for named in ({"dead_letter_id": id}, {"compensation_id": id}):
            at += 100
            try:
                made.append(
                    await tenant.views.choose(
                        run_id, "compensate", **named, now_ms=NOW + at, reason="r"
                    )
                )
            except (Missing, leasekit.Conflict) as refused:
                made.append(str(refused).replace(tenant.tag, ""))
    return made


def catalogue() -> Catalogue:
    """Units, grants and sources of all three, under the same names."""
    contexts = [records.TenantContext(*names, None, "explicit") for names in TENANTS]
    return Catalogue(
        units=tuple(
            records.unit(one, "finance", display_name=f"Finance {number}")
            for number, one in enumerate(contexts)
        ),
        grants=tuple(
            records.grant(one, "g", "finance", "repo-finance", expires_at_ms=NOW + 1 + number)
            for number, one in enumerate(contexts)
        ),
        bindings=tuple(
            records.binding(one, "source", "repo-finance", connector_id=f"connector-{number}")
            for number, one in enumerate(contexts)
        ),
    )


async def seen_by(
    url: str, rows: Sequence[Spec], number: int, *, writes: bool
) -> tuple[list[tuple[str, Any]], list[Any]]:
    """What a tenant sees where these rows were written, in this order."""
    async with leasekit.connect(url, clock="caller", catalogue=catalogue()) as kit:
        if writes:
            for row in rows:
                await write(kit.tenant(*TENANTS[row[1]]), row)
        tenant = kit.tenant(*TENANTS[number])
        return await everything(tenant), await choices(tenant) if number == 0 else []


@settings(max_examples=10)
@given(st.lists(specs, min_size=10, max_size=60))
async def test_a_tenant_sees_what_it_would_see_alone(rows: list[Spec]) -> None:
    names: list[str] = []
    try:
        common = url_of(names)
        for number in (2, 1, 0):  # the one that also writes comes last
            shared = await seen_by(common, rows, number, writes=number == 2)
            own = [row for row in rows if row[1] == number]
            alone = await seen_by(url_of(names), own, number, writes=True)
            assert shared == alone
    finally:
        for name in names:
            _memory_servers.pop(name, None)
