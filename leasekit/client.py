"""The client: `connect` gives a Leasekit, a Leasekit gives tenants, a tenant gives the concepts."""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, Literal

from msgspec.structs import replace

from leasekit import codec
from leasekit.connect import Backend, ServerInfo, open_backend
from leasekit.consuming import (
    BACKOFF_MS_DEFAULT,
    DRAIN_MS_DEFAULT,
    SWEEP_MS_DEFAULT,
    TURN_ROWS,
    Pump,
    make_pump,
)
from leasekit.durability import Durability, durability_of
from leasekit.errors import InvalidInput, Unavailable
from leasekit.gate import Gate
from leasekit.hints import Hub
from leasekit.idempotency import Idempotency
from leasekit.keys import registry_keys, tenant_parts, tenant_tag
from leasekit.lease import Leases
from leasekit.ledger import Ledger
from leasekit.ledger.store import Store
from leasekit.model import Page, Retention, RunCounts, TenantContext
from leasekit.outbox import LEASE_MS_DEFAULT, Claim, Outbox
from leasekit.policy import GatePolicy
from leasekit.scope import (
    PAGE_LIMIT_DEFAULT,
    Scope,
    Settings,
    Shared,
    decode_cursor,
    encode_cursor,
    make_coalescer,
)
from leasekit.views import Catalogue, CatalogueOf, Reader, Views

__all__ = ["Leasekit", "Tenant", "connect"]

DURABILITY_VARIABLE = "LEASEKIT_DURABILITY"
TIMEOUT_MS_DEFAULT = 5_000
TIMEOUT_MS_MAX = 600_000
TENANTS_REMEMBERED = 10_000
TENANTS_LISTED_EVERY_S = 60.0


def _context(org: str, workspace: str, deployment: str | None, actor: str | None) -> TenantContext:
    """The context of a tenant's records: explicit, but for the one that stands for no name at all."""
    context = TenantContext(org, workspace, deployment, actor)
    return context if context.is_local_implicit else replace(context, source="explicit")


class Tenant:
    """One tenant: nothing of it can be seen or touched from another one.

    `actor` says who acts, for records; it never makes another tenant.
    """

    __slots__ = ("context", "gate", "idempotency", "leases", "ledger", "outbox", "tag", "views")

    def __init__(self, scope: Scope, catalogue: Catalogue | CatalogueOf) -> None:
        self.tag = scope.tag
        self.context = scope.context
        self.leases = Leases(scope)
        self.outbox = Outbox(scope)
        self.idempotency = Idempotency(scope)
        self.gate = Gate(scope)
        self.ledger = Ledger(scope, self.gate)
        self.views = Views(self.ledger, Reader(Store(scope), self.gate), scope.context, catalogue)

    def __repr__(self) -> str:
        return f"<Tenant {self.tag}>"


class Leasekit:
    """A connected client, for one event loop. Made by `connect`."""

    def __init__(self, shared: Shared, catalogue: Catalogue | CatalogueOf) -> None:
        self._shared = shared
        self._catalogue = catalogue
        self._tenants: OrderedDict[tuple[str, str | None], Tenant] = OrderedDict()

    def __repr__(self) -> str:
        coalescer = self._shared.coalescer
        return (
            f"<Leasekit {self._shared.backend.info.url} "
            f"{coalescer.queued_rows} queued, {coalescer.flights} in flight>"
        )

    @property
    def server(self) -> ServerInfo:
        """What the server is, as it was found at the start."""
        return self._shared.backend.info

    @property
    def backend(self) -> Backend:
        """The server itself, for tools that look beneath the concepts and write nothing."""
        return self._shared.backend

    @property
    def durability(self) -> Durability:
        """The class of durability of calls that name none."""
        return self._shared.coalescer.durability

    @property
    def gate_durability(self) -> Durability:
        """The class of durability of what the gates grant and record."""
        wanted = self._shared.settings.gate.durability
        return self.durability if wanted is None else durability_of(wanted)

    @property
    def prefix(self) -> str:
        """What all keys begin with."""
        return self._shared.settings.prefix

    def tenant(
        self, org: str, workspace: str, deployment: str | None = None, actor: str | None = None
    ) -> Tenant:
        """The tenant of that name; parts are 1..64 bytes of any text. Nothing is sent."""
        tag = tenant_tag(org, workspace, deployment)
        if actor is not None:
            codec.check_text(actor, "actor")
        tenant = self._tenants.get((tag, actor))
        if tenant is None:
            context = _context(org, workspace, deployment, actor)
            tenant = Tenant(Scope(self._shared, tag, context), self._catalogue)
            self._tenants[tag, actor] = tenant
            if len(self._tenants) > TENANTS_REMEMBERED:
                self._tenants.popitem(last=False)
        return tenant

    async def tenants(
        self, cursor: str | None = None, *, limit: int = PAGE_LIMIT_DEFAULT
    ) -> Page[Tenant]:
        """A page of the tenants that were ever written to, in the order of their encoded names."""
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        position = decode_cursor(cursor, (str,))
        names = registry_keys(self._shared.settings.prefix)["names"]
        start = f"({position[0]}" if position else "-"
        tags: list[bytes] = await self._shared.backend.command(
            "ZRANGEBYLEX", names, start, "+", "LIMIT", 0, limit + 1
        )
        found = [tag.decode() for tag in tags[:limit]]
        page = [self.tenant(*tenant_parts(tag)) for tag in found]
        return Page(page, encode_cursor(found[-1]) if len(tags) > limit else None)

    async def now_ms(self) -> int:
        """The server's clock: milliseconds since 1970."""
        seconds, microseconds = await self._shared.backend.command("TIME")
        return int(seconds) * 1_000 + int(microseconds) // 1_000

    async def run(
        self,
        lanes: Iterable[tuple[str, str]],
        handler: Callable[[Claim], Awaitable[Any]],
        *,
        tenants: Iterable[Tenant] | None = None,
        consumer: str | None = None,
        concurrency: int = 100,
        per_tenant: int | None = None,
        weights: Mapping[str, int] | Callable[[Tenant], int] | None = None,
        lease_ms: int = LEASE_MS_DEFAULT,
        handler_timeout_ms: int | None = None,
        backoff_ms: tuple[int, int] = BACKOFF_MS_DEFAULT,
        stop: asyncio.Event | None = None,
        drain_ms: int = DRAIN_MS_DEFAULT,
        sweep_ms: int = SWEEP_MS_DEFAULT,
        counts: RunCounts | None = None,
        durability: Durability | str | None = None,
    ) -> RunCounts:
        """`Outbox.run` for these lanes, (lane, target) each, of many tenants: None = of all, those
        that are yet to come included. `claim.tenant` is the encoded name of a row's tenant.

        Only tenants that were hinted at or have rows due are asked, in turn. No tenant has more than
        per_tenant rows in flight (default: an eighth of concurrency), so that none starves the others.
        weights: tenant's encoded name -> how many times the usual rows it may take in a turn, or a
        function of the Tenant; 1 where it says nothing. sweep_ms: each tenant is asked so often even
        if nobody said anything, in case hints were lost. The rest is as with `Outbox.run`.
        """
        routes = list(lanes)
        for lane, target in routes:
            codec.check_text(lane, "lane")
            codec.check_text(target, "target")
        if not routes:
            raise InvalidInput("lanes is empty: name at least one (lane, target)", field="lanes")
        given = None if tenants is None else list(tenants)

        def turn_of(tenant: Tenant) -> int:
            weight = weights(tenant) if callable(weights) else (weights or {}).get(tenant.tag, 1)
            return TURN_ROWS * codec.check_whole(weight, "weights", 1, codec.BATCH_MAX)

        def add(tenant: Tenant) -> None:
            if not pump.has_tenant(tenant.tag):
                turn = turn_of(tenant)
                for lane, target in routes:
                    pump.add(tenant.outbox, tenant.tag, lane, target, turn=turn)

        pump: Pump = make_pump(
            self._shared,
            handler=handler,
            consumer=consumer,
            concurrency=concurrency,
            per_tenant=max(concurrency // 8, 1) if per_tenant is None else per_tenant,
            lease_ms=lease_ms,
            handler_timeout_ms=handler_timeout_ms,
            backoff_ms=backoff_ms,
            drain_ms=drain_ms,
            poll_ms=sweep_ms,
            counts=counts,
            durability=durability,
            new_tenant=(lambda tag: add(self.tenant(*tenant_parts(tag))))
            if given is None
            else None,
        )

        async def look_for_tenants() -> None:
            while True:
                cursor: str | None = None
                while True:
                    page = await self.tenants(cursor, limit=codec.BATCH_MAX)
                    for tenant in page.items:
                        add(tenant)
                    if (cursor := page.next_cursor) is None:
                        break
                await asyncio.sleep(TENANTS_LISTED_EVERY_S)

        if given is None:
            return await pump.run(stop=stop, tags=None, feed=look_for_tenants)
        for tenant in given:
            add(tenant)
        return await pump.run(stop=stop, tags=[tenant.tag for tenant in given])

    async def close(self) -> None:
        """Refuse new calls, let those under way finish, and close all connections."""
        await self._shared.close()
        self._shared.hub.wake_all()  # whoever consumes finds the client closed, and ends
        for task in list(self._shared.background):
            task.cancel()
        await self._shared.backend.close()


class connect(AbstractAsyncContextManager[Leasekit]):  # reads as a function
    """Connect to a server: `async with leasekit.connect(url) as kit:`, or `kit = await connect(url)`.

    url: redis://, rediss://, unix://, embedded://[dir] (a private real server) or memory:// (for
    tests, not durable); None = the environment's LEASEKIT_URL, else embedded://. prefix: what all keys
    begin with. retention: how long finished things are kept. clock: `server`, or `caller` for tests and
    replays, which makes every call take now_ms. timeout_ms: how long a reply may take, and how long a
    call waits for a lost connection to come back; one whose reply was lost is repeated within twice
    that. allow_eviction: accept a server that may drop rows. payload_bytes_max: at most 1 MiB.
    durability: what an answered write survives, where a call names nothing else: `none`, `fsync`,
    `replicated(2)`; None = the environment's LEASEKIT_DURABILITY, else `none`. gate: what the gates of
    its tenants hold to.

    Raises InvalidInput and Unavailable. After `await`, close it: `await kit.close()`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        prefix: str = "lk",
        retention: Retention | None = None,
        durability: Durability | str | None = None,
        gate: GatePolicy | None = None,
        catalogue: Catalogue | CatalogueOf | None = None,
        clock: Literal["server", "caller"] = "server",
        timeout_ms: int = TIMEOUT_MS_DEFAULT,
        allow_eviction: bool = False,
        payload_bytes_max: int = codec.PAYLOAD_BYTES_DEFAULT,
    ) -> None:
        if clock not in ("server", "caller"):
            raise InvalidInput("clock must be 'server' or 'caller'", field="clock")
        registry_keys(prefix)
        codec.check_whole(timeout_ms, "timeout_ms", 1, TIMEOUT_MS_MAX)
        codec.check_whole(payload_bytes_max, "payload_bytes_max", 1, codec.PAYLOAD_BYTES_MAX)
        kept = retention or Retention()
        for field in kept.__struct_fields__:
            least = 1 if field == "dedupe_ms" else 0
            most = codec.DURATION_MS_MAX if field.endswith("_ms") else codec.INSTANT_MS_MAX
            codec.check_whole(getattr(kept, field), f"retention.{field}", least, most)
        if durability is None:
            durability = os.environ.get(DURABILITY_VARIABLE) or "none"
        self._durability = durability_of(durability)
        self._catalogue = Catalogue() if catalogue is None else catalogue
        self._url = url
        self._timeout_ms = timeout_ms
        self._allow_eviction = allow_eviction
        self._settings = Settings(prefix, clock, kept, payload_bytes_max, gate or GatePolicy())
        self._kit: Leasekit | None = None

    async def _open(self) -> Leasekit:
        backend = await open_backend(
            self._url, timeout_ms=self._timeout_ms, allow_eviction=self._allow_eviction
        )
        try:
            return await self._open_on(backend)
        except BaseException:
            await backend.close()
            raise

    async def _open_on(self, backend: Backend) -> Leasekit:
        coalescer = make_coalescer(self._settings, backend, self._durability)
        await coalescer.start()
        hub = Hub(backend, self._settings.prefix)
        shared = Shared(self._settings, backend, coalescer, hub)
        gate = self._settings.gate.durability
        if gate is not None:
            # At once, so that a server that cannot keep the gate's class is told of now.
            await shared.coalescer_for(gate)
        return Leasekit(shared, self._catalogue)

    def __await__(self) -> Generator[Any, None, Leasekit]:
        return self._open().__await__()

    async def __aenter__(self) -> Leasekit:
        if self._kit is not None:
            raise Unavailable("this connect() is open already: call connect() again for another")
        self._kit = await self._open()
        return self._kit

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        kit, self._kit = self._kit, None
        if kit is not None:
            await kit.close()
