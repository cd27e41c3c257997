"""The leases of a tenant: a name, held by one at a time, with a fence.

`acquire`, `extend` and `release` are one script call each. `hold` is what most want: it waits for a
busy name without hammering, renews by itself, and tells its body the moment the lease is lost, by the
local clock, before anyone else can have it.

Source: design 6, 14; lua/PROTOCOL.md, "Leases".
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any

from leasekit import codec
from leasekit.coalesce import Coalescer, Reply, Variant, local_clock_s
from leasekit.durability import Durability, durability_of
from leasekit.errors import Conflict, LeasekitError, LeaseLost
from leasekit.holding import Upkeep
from leasekit.model import (
    AcquireOutcome,
    Holder,
    LeaseExtendOutcome,
    LeaseReleaseOutcome,
    Page,
)
from leasekit.scope import (
    PAGE_LIMIT_DEFAULT,
    Scope,
    decode_cursor,
    encode_cursor,
    reader_of,
    word_of,
)
from leasekit.scripts import Argument, Script, script

__all__ = ["Acquisition", "Lease", "Leases"]

WAIT_FIRST_MS = 10
WAIT_MOST_MS = 500
WAIT_MS_MAX = 24 * 3_600_000

_ACQUIRE = script("lease/acquire", item=("name", "token", "ttl_ms", "owner"))
_EXTEND = script("lease/extend", item=("name", "token", "ttl_ms"))
_RELEASE = script("lease/release", item=("name", "token"))
_GET = script("lease/get", item=("name",))
_LIST = script("lease/list")

_read_release = reader_of(LeaseReleaseOutcome)


class Lease:
    """A lease that this caller holds, or held: `lost` is set once it must not be relied on.

    `fence` rises with every grant of the tenant: a destination that keeps the highest fence per name
    can refuse an older holder. `remaining_ms()` counts on the local clock from before the request was
    sent, so it is never too optimistic.
    """

    __slots__ = (
        "_deadline_s",
        "_lost",
        "acquired_at_ms",
        "expires_at_ms",
        "fence",
        "name",
        "owner",
        "token",
    )

    def __init__(
        self,
        name: str,
        owner: str,
        token: str,
        fence: int,
        acquired_at_ms: int,
        expires_at_ms: int,
        deadline_s: float,
    ) -> None:
        self.name = name
        self.owner = owner
        self.token = token
        self.fence = fence
        self.acquired_at_ms = acquired_at_ms
        self.expires_at_ms = expires_at_ms
        self._deadline_s = deadline_s
        self._lost: asyncio.Event | None = None

    @property
    def lost(self) -> asyncio.Event:
        """Set by `hold` when the lease has ended, was taken or could not be renewed in time."""
        if self._lost is None:
            self._lost = asyncio.Event()
        return self._lost

    def remaining_ms(self) -> int:
        """Milliseconds left by the local clock; negative once it is over."""
        return int((self._deadline_s - local_clock_s()) * 1_000)

    def __repr__(self) -> str:
        state = "lost" if self._lost is not None and self._lost.is_set() else "held"
        return f"<Lease {self.name} {state} by {self.owner} fence {self.fence}>"


class Acquisition:
    """acquired: `lease` is ours. busy: `holder` has it; None if our token already gave it back."""

    __slots__ = ("holder", "lease", "outcome")

    def __init__(self, outcome: AcquireOutcome, lease: Lease | None, holder: Holder | None) -> None:
        self.outcome = outcome
        self.lease = lease
        self.holder = holder

    def __repr__(self) -> str:
        return f"<Acquisition {self.outcome} {self.lease or self.holder}>"


class Leases:
    """`tenant.leases`. Every call may be made by thousands of coroutines at once."""

    __slots__ = ("_scope",)

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    async def acquire(
        self,
        name: str,
        *,
        ttl_ms: int,
        owner: str,
        token: str | None = None,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> Acquisition:
        """Take a name for `ttl_ms` if nobody holds it.

        name, owner: <= 200 bytes. ttl_ms: 1..43 200 000 (12 h). token: 22 characters of
        `new_token()`, one per acquisition, where the caller wants to be able to repeat: a token that
        holds the lease gets the same answer again. durability: None = the client's.

        A lease that its caller does not get, because it was cancelled or too few replicas have it
        (NotDurable), is released. Under a token that the caller brought it stands: whoever repeats by
        that token must not lose it to the release.
        """
        codec.check_text(name, "name")
        codec.check_whole(ttl_ms, "ttl_ms", 1, codec.LEASE_MS_MAX)
        codec.check_text(owner, "owner")
        is_nobodys = token is None
        token = codec.new_token() if token is None else codec.check_token(token)
        scope = self._scope
        now = scope.now_argument(now_ms)
        if scope.must_register:
            await scope.register()

        through = scope.coalescer
        if durability is not None:
            through = await scope.coalescer_for(durability)

        def give_back(result: Acquisition) -> None:
            self._give_back(result, through, now_ms)

        undo = give_back if is_nobodys else None

        future = through.submit(
            _ACQUIRE,
            scope.tag,
            (now,),
            self._bind,
            (name, token, ttl_ms, owner),
            _read_acquired,
            context=(name, token, owner),
            undo=undo,
            lease_ms=ttl_ms,
            repeat=repeat,
        )
        try:
            acquisition: Acquisition = await future
        except asyncio.CancelledError:
            if undo is not None:
                scope.undo_late(future, undo)
            raise
        return acquisition

    def _give_back(self, acquisition: Acquisition, through: Coalescer, now_ms: int | None) -> None:
        """The caller was cancelled after its request had left, or too few replicas have the grant:
        nobody relies on this lease."""
        if acquisition.lease is not None:
            name, token = acquisition.lease.name, acquisition.lease.token
            self._scope.in_background(self._release(name, token, False, now_ms, through))

    async def extend(
        self,
        name: str,
        token: str,
        *,
        ttl_ms: int,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> LeaseExtendOutcome:
        """Hold a name for `ttl_ms` from now, never for less than before.

        extended | lost: the lease has ended or was never this token's; stop the work. NotDurable: the
        lease counts to the end that was known before. durability: None = the client's.
        """
        through = self._scope.coalescer
        if durability is not None:
            through = await self._scope.coalescer_for(durability)
        extended = await self._extend(name, token, ttl_ms, now_ms, through, repeat=repeat)
        return LeaseExtendOutcome.LOST if extended is None else LeaseExtendOutcome.EXTENDED

    async def _extend(
        self,
        name: str,
        token: str,
        ttl_ms: int,
        now_ms: int | None,
        through: Coalescer,
        *,
        repeat: bool = False,
    ) -> tuple[int, float] | None:
        """The new end on the server's and on the local clock; None if the lease is lost."""
        codec.check_text(name, "name")
        codec.check_token(token)
        codec.check_whole(ttl_ms, "ttl_ms", 1, codec.LEASE_MS_MAX)
        scope = self._scope
        now = scope.now_argument(now_ms)
        if scope.must_register:
            await scope.register()

        def read(item: Any, context: None, reply: Reply) -> tuple[int, float] | None:
            if word_of(item) == "lost":
                return None
            return item[3], reply.sent_at_s + (item[3] - reply.now_ms) / 1_000

        extended: tuple[int, float] | None = await through.submit(
            _EXTEND,
            scope.tag,
            (now,),
            self._bind,
            (name, token, ttl_ms),
            read,
            lease_ms=ttl_ms,
            repeat=repeat,
        )
        return extended

    async def release(
        self,
        name: str,
        token: str,
        *,
        durability: Durability | str | None = None,
        repeat: bool = False,
        now_ms: int | None = None,
    ) -> LeaseReleaseOutcome:
        """Give a name back before its lease ends.

        released: it is free, by this token, now or up to five minutes ago. lost: the lease had ended
        or was never this token's. forgotten (only for a repeat): nothing is known of the name.
        durability: None = the client's.
        """
        codec.check_text(name, "name")
        codec.check_token(token)
        self._scope.now_argument(now_ms)
        if self._scope.must_register:
            await self._scope.register()
        through = self._scope.coalescer
        if durability is not None:
            through = await self._scope.coalescer_for(durability)
        outcome: LeaseReleaseOutcome = await self._release(name, token, repeat, now_ms, through)
        return outcome

    def _release(
        self, name: str, token: str, repeat: bool, now_ms: int | None, through: Coalescer
    ) -> asyncio.Future[LeaseReleaseOutcome]:
        scope = self._scope
        now = scope.now_argument(now_ms)
        return through.submit(
            _RELEASE,
            scope.tag,
            (now,),
            self._bind,
            (name, token),
            _read_release,
            repeat=repeat,
        )

    async def get(self, name: str, *, now_ms: int | None = None) -> Holder | None:
        """Who holds a name now, or None."""
        codec.check_text(name, "name")
        scope = self._scope
        now = scope.now_argument(now_ms)
        holder: Holder | None = await scope.coalescer.submit(
            _GET,
            scope.tag,
            (now,),
            self._bind,
            (name,),
            lambda item, context, reply: None if item == b"free" else _read_holder(name, item[1:]),
        )
        return holder

    async def list(
        self,
        *,
        prefix: str = "",
        limit: int = PAGE_LIMIT_DEFAULT,
        cursor: str | None = None,
        now_ms: int | None = None,
    ) -> Page[Holder]:
        """A page of the leases held now, in the order of their names' bytes.

        limit: 1..1 000. A page looks at no more than 1 000 names; it may be short and go on.
        """
        if prefix:
            codec.check_text(prefix, "prefix")
        codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
        position = decode_cursor(cursor, (str,))
        scope = self._scope
        reply = await scope.read(
            _LIST,
            {
                "now_ms": scope.now_argument(now_ms),
                "limit": limit,
                "prefix": prefix,
                "after": position[0] if position else "",
            },
        )
        holders = [_read_holder(one[0].decode(), one[1:]) for one in reply[3:]]
        return Page(holders, encode_cursor(reply[2].decode()) if reply[1] else None)

    def _bind(self, one: Script, variant: Variant, repeat: bool) -> Sequence[Argument]:
        """Keys and arguments of a call; a variant is now_ms."""
        return self._scope.bind(one, {"now_ms": variant[0], "repeated": int(repeat)})

    def hold(
        self,
        name: str,
        *,
        ttl_ms: int,
        owner: str,
        wait_ms: int = 0,
        durability: Durability | str | None = None,
    ) -> AbstractAsyncContextManager[Lease]:
        """Hold a name while a body runs: `async with tenant.leases.hold(...) as lease:`.

        Waits up to `wait_ms` for a busy name, then raises Conflict naming the holder. Renews at a
        third of the lease. If the lease cannot be kept, `lease.lost` is set, the body is cancelled
        before the lease's end by the local clock, and LeaseLost is raised; also if it turns out lost
        only at the end. Releases on the way out. Needs a client on the server's clock.

        durability: of the lease, its renewals and its release, None = the client's. NotDurable: too few
        replicas had it, and it was given back; a renewal that they do not have in time loses it.
        """
        codec.check_whole(wait_ms, "wait_ms", 0, WAIT_MS_MAX)
        wanted = None if durability is None else durability_of(durability)
        return _Hold(self, name, ttl_ms, owner, wait_ms, wanted)


class _Hold(AbstractAsyncContextManager[Lease]):
    def __init__(
        self,
        leases: Leases,
        name: str,
        ttl_ms: int,
        owner: str,
        wait_ms: int,
        durability: Durability | None,
    ) -> None:
        self._leases = leases
        self._through = leases._scope.coalescer
        self._durability = durability
        self._name = name
        self._ttl_ms = ttl_ms
        self._owner = owner
        self._wait_ms = wait_ms
        self._lease: Lease | None = None
        self._upkeep: Upkeep | None = None

    async def __aenter__(self) -> Lease:
        self._through = await self._leases._scope.coalescer_for(self._durability)
        self._lease = lease = await self._wait_for_lease()
        self._upkeep = Upkeep(self._extend, self._ttl_ms, lease._deadline_s, lease.lost)
        self._upkeep.start()
        return lease

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        lease, upkeep = self._lease, self._upkeep
        if lease is None or upkeep is None:
            raise RuntimeError("left without having been entered")
        is_ours = upkeep.stop()
        if lease.lost.is_set():
            if not is_ours:
                # Someone else cancelled the body as well: that is not ours to swallow.
                return
            if error is None or isinstance(error, asyncio.CancelledError):
                raise self._lost() from error
            return
        try:
            # Shielded: whoever cancels the way out must not keep the name from others.
            outcome = await asyncio.shield(
                self._leases._release(lease.name, lease.token, False, None, self._through)
            )
            is_lost = outcome is not LeaseReleaseOutcome.RELEASED
        except LeasekitError:
            # It ends by itself; it protected the body if it has not ended yet.
            is_lost = lease.remaining_ms() <= 0
        if is_lost:
            lease.lost.set()
            if error is None:
                raise self._lost()

    async def _wait_for_lease(self) -> Lease:
        """Ask, and while the name is busy ask again, in growing steps of random length."""
        give_up_at_s = local_clock_s() + self._wait_ms / 1_000
        step_ms = float(WAIT_FIRST_MS)
        while True:
            acquisition = await self._leases.acquire(
                self._name,
                ttl_ms=self._ttl_ms,
                owner=self._owner,
                durability=self._durability,
            )
            if acquisition.lease is not None:
                return acquisition.lease
            holder = acquisition.holder
            left_ms = (give_up_at_s - local_clock_s()) * 1_000
            if left_ms <= 0:
                until = f" until {holder.expires_at_ms} ms" if holder else ""
                by = f" by {holder.owner}" if holder else ""
                raise Conflict(
                    f"lease {self._name} is held{by}{until}: nothing was changed; wait longer "
                    "(wait_ms), or let its holder finish",
                    tenant=self._leases._scope.tag,
                    id=self._name,
                )
            await asyncio.sleep(min(step_ms * random.uniform(0.5, 1.0), left_ms) / 1_000)
            step_ms = min(2 * step_ms, WAIT_MOST_MS)

    async def _extend(self) -> float | None:
        """Renew the lease, and give its new end on the local clock; None: it is lost."""
        lease = self._lease
        if lease is None:
            return None
        extended = await self._leases._extend(
            lease.name, lease.token, self._ttl_ms, None, self._through
        )
        if extended is None:
            return None
        lease.expires_at_ms, lease._deadline_s = extended
        return lease._deadline_s

    def _lost(self) -> LeaseLost:
        return LeaseLost(
            f"lease {self._name} was lost while its body ran: another holder may be at work since; "
            "what the body did after that is not protected; check before you do it again",
            tenant=self._leases._scope.tag,
            id=self._name,
        )


def _read_acquired(item: Any, context: tuple[str, str, str], reply: Reply) -> Acquisition:
    name, token, owner = context
    word = word_of(item)
    if word == "acquired":
        deadline_s = reply.sent_at_s + (item[3] - reply.now_ms) / 1_000
        lease = Lease(name, owner, token, int(item[1]), item[2], item[3], deadline_s)
        return Acquisition(AcquireOutcome.ACQUIRED, lease, None)
    holder = _read_holder(name, item[1:]) if word == "busy" else None
    return Acquisition(AcquireOutcome.BUSY, None, holder)


def _read_holder(name: str, values: Any) -> Holder:
    fence, acquired_at_ms, expires_at_ms, owner = values
    return Holder(
        name=name,
        owner=owner.decode(),
        fence=int(fence),
        acquired_at_ms=acquired_at_ms,
        expires_at_ms=expires_at_ms,
    )
