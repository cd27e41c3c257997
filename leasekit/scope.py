"""What the concepts of one tenant share: its keys, the way to the server, and the clock's rule.

A tenant enters the registry before a process's first write to it, and again each minute while it is
in use; the registry remembers under which clock its data is kept, because leases counted on two
clocks mean nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

import msgspec
from redis.exceptions import ResponseError

from leasekit import scripts
from leasekit.coalesce import Coalescer, Reply
from leasekit.codec import NOW_MS_MAX, PAYLOAD_BYTES_DEFAULT, check_whole
from leasekit.connect import Backend
from leasekit.durability import Durability, durability_of
from leasekit.errors import InvalidInput, LeasekitError, NotDurable, Unavailable
from leasekit.hints import Hub
from leasekit.keys import Keys, barrier_key, registry_keys
from leasekit.model import Retention, TenantContext
from leasekit.policy import GatePolicy
from leasekit.scripts import Argument, Script

__all__ = ["Scope", "Settings", "Shared", "decode_cursor", "encode_cursor", "make_coalescer"]

CLASSES_MAX = 8
TOUCH_EVERY_S = 60.0
PAGE_LIMIT_DEFAULT = 100

_TOUCH = scripts.script("tenant/touch", item=("tenant",))


@dataclass(frozen=True, slots=True)
class Settings:
    """What `connect` was told."""

    prefix: str = "lk"
    clock: str = "server"
    retention: Retention = field(default_factory=Retention)
    payload_bytes_max: int = PAYLOAD_BYTES_DEFAULT
    gate: GatePolicy = field(default_factory=GatePolicy)


@dataclass(slots=True)
class Shared:
    """What all tenants of a client share; `background` keeps its tasks from being collected.

    coalescer: of the client's own class of durability. coalescers: one by class, each made when it is
    first asked for, because it has a connection of its own. datasets: by tenant, the name of the data
    that this process was granted intents in.
    """

    settings: Settings
    backend: Backend
    coalescer: Coalescer
    hub: Hub
    touch_due_at_s: dict[str, float] = field(default_factory=dict)
    background: set[asyncio.Task[Any]] = field(default_factory=set)
    coalescers: dict[Durability, Coalescer] = field(default_factory=dict)
    opening: dict[Durability, asyncio.Task[Coalescer]] = field(default_factory=dict)
    datasets: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.coalescers[self.coalescer.durability] = self.coalescer

    async def coalescer_for(self, durability: Durability | str) -> Coalescer:
        """The coalescer of a class, connected; all who ask first share one attempt.

        Raises InvalidInput for what is no class, and Unavailable for a server that cannot keep it.
        """
        wanted = durability_of(durability)
        if (found := self.coalescers.get(wanted)) is not None:
            return found
        opening = self.opening.get(wanted)
        if opening is None:
            if len(self.coalescers) + len(self.opening) >= CLASSES_MAX:
                raise InvalidInput(
                    f"durability {wanted} would be one more than the {CLASSES_MAX} classes that a "
                    "client may use, each on a connection of its own: nothing was sent; use fewer "
                    "different replicas and timeout_ms",
                    field="durability",
                    limit=CLASSES_MAX,
                )
            opening = asyncio.get_running_loop().create_task(self._open(wanted))
            self.opening[wanted] = opening
            opening.add_done_callback(lambda task: self._opened(wanted, task))
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            if opening.cancelled():
                raise Unavailable(
                    "this client was closed: nothing was sent; connect anew"
                ) from None
            raise

    async def _open(self, durability: Durability) -> Coalescer:
        if self.coalescer.is_closing:
            raise Unavailable("this client is closing or closed: nothing was sent; connect anew")
        coalescer = make_coalescer(self.settings, self.backend, durability)
        try:
            await coalescer.start()
        except BaseException:
            await coalescer.close()
            raise
        self.coalescers[durability] = coalescer
        return coalescer

    def _opened(self, durability: Durability, task: asyncio.Task[Coalescer]) -> None:
        del self.opening[durability]
        if not task.cancelled():
            task.exception()  # So that it does not complain where nobody waits any more.

    async def close(self) -> None:
        """Let the calls of every class finish, and close their connections."""
        for task in list(self.opening.values()):
            task.cancel()
        if self.opening:
            await asyncio.wait(list(self.opening.values()))
        await asyncio.gather(*(one.close() for one in self.coalescers.values()))


def make_coalescer(settings: Settings, backend: Backend, durability: Durability) -> Coalescer:
    """A coalescer of a class, not connected yet; Unavailable where the server can never keep it."""
    if backend.info.name == "memory" and durability.kind != "none":
        raise Unavailable(
            f"durability {durability}: memory:// keeps everything in this process and has no copies and "
            "no disk; nothing was sent; use durability 'none' in tests, or a real server"
        )
    return Coalescer(
        backend.wire(),
        shebang=backend.info.shebang,
        timeout_ms=backend.timeout_ms,
        durability=durability,
        barrier_key=partial(barrier_key, settings.prefix),
    )


Word = TypeVar("Word", bound=StrEnum)
Grant = TypeVar("Grant")


class Scope:
    """One tenant's share of a client."""

    __slots__ = ("coalescer", "context", "keys", "settings", "shared", "tag")

    def __init__(self, shared: Shared, tag: str, context: TenantContext) -> None:
        self.shared = shared
        self.settings = shared.settings
        self.coalescer = shared.coalescer
        self.tag = tag
        self.context = context
        self.keys = Keys(shared.settings.prefix, tag)

    async def coalescer_for(self, durability: Durability | str | None) -> Coalescer:
        """The coalescer of a class of durability, None = the client's; it connects on its first use."""
        return self.coalescer if durability is None else await self.shared.coalescer_for(durability)

    def now_argument(self, now_ms: int | None) -> str | int:
        """What scripts get as now_ms: the caller's instant, or "" for the server's clock."""
        if self.settings.clock == "caller":
            if now_ms is None:
                raise InvalidInput(
                    "now_ms is required: this client was connected with clock='caller'",
                    field="now_ms",
                )
            return check_whole(now_ms, "now_ms", 0, NOW_MS_MAX)
        if now_ms is not None:
            raise InvalidInput(
                "now_ms is refused: the server's clock counts; connect with clock='caller' to give "
                "the time yourself",
                field="now_ms",
            )
        return ""

    @property
    def is_new(self) -> bool:
        """Whether this process has not registered the tenant yet."""
        return self.tag not in self.shared.touch_due_at_s

    @property
    def must_register(self) -> bool:
        """Whether a write has to wait for `register` first (cheap: asked before every write)."""
        due_at_s = self.shared.touch_due_at_s.get(self.tag)
        if due_at_s is None:
            return True
        if time.monotonic() >= due_at_s:
            self.stay_registered()
        return False

    def stay_registered(self) -> None:
        """The tenant is in use: touch it again, beside, if the last time is a while ago."""
        if time.monotonic() >= self.shared.touch_due_at_s.get(self.tag, 0):
            self.shared.touch_due_at_s[self.tag] = time.monotonic() + TOUCH_EVERY_S
            task = asyncio.get_running_loop().create_task(self._refresh())
            self.shared.background.add(task)
            task.add_done_callback(self.shared.background.discard)

    async def register(self) -> None:
        """Enter the tenant into the registry; InvalidInput if its data is on the other clock."""
        mark = self.settings.clock
        keys = registry_keys(self.settings.prefix)

        def read(item: Any, context: None, reply: Reply) -> InvalidInput | None:
            if word_of(item) != "other_clock":
                return None
            return InvalidInput(
                f"tenant {self.tag} is kept on the other clock: its data was written by a client "
                f"with {'a server' if mark == 'caller' else 'a caller'}'s clock; nothing was written; "
                "use another tenant or prefix",
                field="clock",
            )

        # The registry is a list, which each use of the tenant mends: how many copies have it is no
        # reason to refuse a write, which tells its own caller of trouble.
        with suppress(NotDurable):
            await self.coalescer.submit(
                _TOUCH,
                "",
                (mark,),
                lambda script, variant, repeat: script.bind(keys, {"now_ms": "", "mark": mark}),
                (self.tag,),
                read,
            )
        self.shared.touch_due_at_s[self.tag] = time.monotonic() + TOUCH_EVERY_S

    async def _refresh(self) -> None:
        try:
            await self.register()
        except LeasekitError:
            # Only the registry's `seen` is late; the write itself tells its caller of trouble.
            self.shared.touch_due_at_s.pop(self.tag, None)

    def bind(
        self, one: Script, arguments: Mapping[str, Argument], *, route: str = "", **keys: str
    ) -> Sequence[Argument]:
        """Keys and arguments of a call, those that the command names; `keys` beside the tenant's."""
        concept = one.name.partition("/")[0]
        return one.bind(
            {name: keys.get(name) or self.keys.named(concept, name, route) for name in one.keys},
            {name: arguments[name] for name in one.arguments},
        )

    async def read(
        self, script: Script, arguments: Mapping[str, Argument], **keys: str
    ) -> list[Any]:
        """One call beside the coalescer, for long reads and operators' orders."""
        shebang = self.shared.backend.info.shebang
        bound = self.bind(script, arguments, **keys)
        command = scripts.call_command(script, bound, (), shebang=shebang)
        try:
            reply: list[Any] = await self.shared.backend.command(*command)
        except ResponseError as error:
            if not scripts.is_missing(error):
                raise scripts.translate(error, script.name, tenant=self.tag) from None
            try:
                load = scripts.load_command(script, shebang=shebang)
                await self.shared.backend.command(*load)
                reply = await self.shared.backend.command(*command)
            except ResponseError as second:
                raise scripts.translate(second, script.name, tenant=self.tag) from None
        return reply

    def undo_late(self, future: asyncio.Future[Grant], undo: Callable[[Grant], None]) -> None:
        """Undo what was granted to a caller who was cancelled as the answer arrived.

        Until then the coalescer undoes; between the answer and its caller's next turn nobody would.
        """
        if future.done() and not future.cancelled() and future.exception() is None:
            with suppress(LeasekitError):  # Closed meanwhile: the lease ends by itself.
                undo(future.result())

    def in_background(self, awaitable: asyncio.Future[Any]) -> None:
        """Let something finish that nobody waits for; its failure is nobody's loss."""
        awaitable.add_done_callback(lambda future: future.cancelled() or future.exception())


def reader_of(words: type[Word]) -> Callable[[Any, Any, Reply], Word]:
    """What turns an item's reply into its word; for commands whose answer is just that."""
    by_text = {word.value.encode(): word for word in words}

    def read(item: Any, context: object, reply: Reply) -> Word:
        return by_text[item[0] if type(item) is list else item]

    return read


def word_of(item: Any) -> str:
    """The word of an item's reply, which is a word or a list that begins with one."""
    word: bytes = item[0] if isinstance(item, list) else item
    return word.decode()


def encode_cursor(*parts: str | int) -> str:
    """Where a page ended, as text for the next call; opaque to callers."""
    return msgspec.json.encode(parts).hex()


def decode_cursor(cursor: str | None, kinds: Sequence[type]) -> list[Any] | None:
    """The parts of a cursor; None for none; InvalidInput for what `encode_cursor` did not make."""
    if cursor is None:
        return None
    try:
        parts = msgspec.json.decode(bytes.fromhex(cursor), type=list[str | int])
        if [type(part) for part in parts] == list(kinds):
            return list(parts)
    except (ValueError, TypeError, msgspec.MsgspecError):
        pass
    raise InvalidInput(
        "cursor is not one that this list gave: start again without it", field="cursor"
    )
