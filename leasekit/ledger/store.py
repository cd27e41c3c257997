"""Where the ledger's records are kept: JSON documents with revisions, in lists that pages walk.

A change of several records is decided here, in Python, on what was read, and lands whole: `transact`
reads, decides and commits, and begins again where something that the decision stood on has changed.

Source: design 9; lua/PROTOCOL.md, "Ledger".
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec

from leasekit import codec
from leasekit.coalesce import Reply, Variant
from leasekit.errors import Conflict, CorruptState, InvalidInput, LeasekitError
from leasekit.gate import Gate, Intent
from leasekit.keys import encode_word
from leasekit.scope import Scope, word_of
from leasekit.scripts import Argument, Script, script

__all__ = ["Listed", "Store", "Stored", "Transaction", "place"]

RECORD_ID_BYTES_MAX = 400  # A caller's id of 200 bytes, and what is put around it.
COMMIT_BYTES_MAX = 4 * 1024 * 1024
ATTEMPTS_MAX = 20
PAUSE_FIRST_MS = 2
PAUSE_MOST_MS = 100
NO_SOURCE = "~"

_COMMIT = script("ledger/commit", item=("kind", "name", "revision", "words", "places", "doc"))
_GET = script("ledger/get", item=("kind", "name"))
_PUT = script("ledger/put", item=("name", "token", "words", "places", "doc"))
_PAGE = script("ledger/page")

Result = TypeVar("Result")


def place(listed: str, order: int, name: str) -> str:
    """Where a record stands in a list: the list, 16 digits of what it is sorted by, its name."""
    return f"{listed}|{order:016d}|{name}"


class Stored(msgspec.Struct, frozen=True):
    """A record as it is stored. name: `collection/encoded id`. doc: its JSON."""

    name: str
    revision: int
    doc: bytes


class Listed(msgspec.Struct, frozen=True):
    """How a record is filed: the lists it stands in (see `place`), and what pages filter by."""

    places: tuple[str, ...]
    created_at_ms: int
    status: str
    run: str
    source: str = NO_SOURCE
    is_active: bool = True

    @property
    def words(self) -> str:
        return f"{self.created_at_ms} {self.status} {self.source} {int(self.is_active)} {self.run}"


class IntentChange(msgspec.Struct, frozen=True):
    """What a commit makes of an intent: its state's words (lua/PROTOCOL.md, "ledger/commit") and its
    document."""

    words: str
    doc: bytes


class Transaction:
    """One attempt at a change: remembers what was read, and gathers what is to be written."""

    def __init__(self, store: Store, now_ms: int, given_ms: int | None) -> None:
        self._store = store
        self.now_ms = now_ms
        self.given_ms = given_ms
        self._read: dict[str, int] = {}
        self._guards: dict[str, int] = {}
        self._puts: dict[str, tuple[Listed, bytes]] = {}
        self._drops: set[str] = set()
        self._intents: dict[str, tuple[int, IntentChange]] = {}

    async def get(self, name: str) -> bytes | None:
        """The JSON of a record, which then must not change until the commit; None if there is none."""
        [doc] = await self.get_many([name])
        return doc

    async def get_many(self, names: Sequence[str]) -> list[bytes | None]:
        """The same of several records, in that order."""
        found = await self._store.get(names, now_ms=self.given_ms)
        for name, one in zip(names, found, strict=True):
            # What changed between two reads fails at the commit: the first one was decided on too.
            self._read.setdefault(name, one.revision if one else 0)
        return [one.doc if one else None for one in found]

    async def guard(self, run: str) -> None:
        """From now until the commit no record of this run may be changed, added or removed."""
        self._guards[run] = await self._store.guard(run, now_ms=self.given_ms)

    def has_read(self, name: str) -> bool:
        return name in self._read

    def put(self, name: str, listed: Listed, doc: bytes) -> None:
        """Write a record that was read in this transaction, or is known not to be there."""
        self._puts[name] = (listed, doc)

    def drop(self, name: str) -> None:
        """Delete a record that was read in this transaction."""
        self._drops.add(name)

    def put_intent(self, id: str, revision: int, change: IntentChange) -> None:
        """Write an intent that was read at this revision; 0 = there was none."""
        self._intents[id] = (revision, change)

    @property
    def is_empty(self) -> bool:
        return not (self._puts or self._drops or self._intents)

    def fields(self) -> list[Argument]:
        """What the commit is sent."""
        items: list[tuple[Argument, ...]] = []
        for name, (listed, doc) in self._puts.items():
            words, places = listed.words, " ".join(listed.places)
            items.append(("put", name, self._read.get(name, 0), words, places, doc))
        items += [("drop", name, self._read[name], "", "", b"") for name in self._drops]
        for id, (revision, change) in self._intents.items():
            items.append(("intent", id, revision, change.words, "", change.doc))
        for name, revision in self._read.items():
            if name not in self._puts and name not in self._drops:
                items.append(("check", name, revision, "", "", b""))
        for run, count in self._guards.items():
            items.append(("guard", run, count, "", "", b""))
        size = sum(len(field) for item in items for field in item if isinstance(field, bytes))
        if len(items) > codec.BATCH_MAX or size > COMMIT_BYTES_MAX:
            raise InvalidInput(
                f"a change of {len(items)} records with {size} bytes of JSON is too large to land whole: "
                f"at most {codec.BATCH_MAX} records and {COMMIT_BYTES_MAX} bytes; nothing was written",
                field="records",
                limit=codec.BATCH_MAX,
            )
        return [field for item in items for field in item]


class Store:
    """The records of one tenant."""

    __slots__ = ("_lines", "_scope")

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._lines: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @property
    def scope(self) -> Scope:
        return self._scope

    async def get(self, names: Sequence[str], *, now_ms: int | None = None) -> list[Stored | None]:
        """Records by their names, in that order; None for what is not there."""
        scope = self._scope
        now = scope.now_argument(now_ms)
        futures = [
            scope.coalescer.submit(
                _GET, scope.tag, (now,), self._bind, ("record", name), _read_record, context=name
            )
            for name in names
        ]
        return list(await asyncio.gather(*futures))

    async def guard(self, run: str, *, now_ms: int | None = None) -> int:
        """How many commits have changed records of a run."""
        scope = self._scope
        count: int = await scope.coalescer.submit(
            _GET,
            scope.tag,
            (scope.now_argument(now_ms),),
            self._bind,
            ("guard", run),
            lambda item, context, reply: int(item[1]),
        )
        return count

    async def intent(self, id: str, *, now_ms: int | None = None) -> Intent | None:
        """An intent of the gate, by its id."""
        return await Gate(self._scope).get(id, now_ms=now_ms)

    async def page(
        self,
        collection: str,
        listed: str,
        *,
        limit: int,
        after: str = "",
        newest: bool = True,
        upto: int | None = None,
        statuses: Sequence[str] = (),
        source: str = "",
        active_only: bool = False,
        created_before_ms: int | None = None,
        now_ms: int | None = None,
    ) -> tuple[list[Stored], str | None]:
        """Records of one list and where it goes on, None at its end. limit: 1..1 000.

        A page looks at no more than 1 000 records: a filtered one may be short, even empty.
        """
        reply = await self._scope.read(
            _PAGE,
            {
                "now_ms": self._scope.now_argument(now_ms),
                "limit": limit,
                "collection": collection,
                "list": listed,
                "after": after,
                "newest": int(newest),
                "upto": "" if upto is None else upto,
                "statuses": f" {' '.join(statuses)} " if statuses else "",
                "source": source,
                "active": int(active_only),
                "created_before": "" if created_before_ms is None else created_before_ms,
            },
        )
        found = [_stored(name.decode(), doc) for name, doc in reply[3:]]
        return found, reply[2].decode() if reply[1] else None

    async def transact(
        self,
        decide: Callable[[Transaction], Awaitable[Result]],
        *,
        line: str | None = None,
        now_ms: int | None = None,
    ) -> Result:
        """Run `decide` on a fresh transaction and commit what it wrote; its result, once that landed.

        `decide` may run several times, each time on what is there then: it must have no other
        effects. line: transactions of this process that name the same line wait for each other,
        instead of spoiling each other's attempts. Raises Conflict when others were faster
        ATTEMPTS_MAX times in a row, InvalidInput for more than 1 000 records or 4 MiB.
        """
        scope = self._scope
        if scope.must_register:
            await scope.register()
        pause_ms = float(PAUSE_FIRST_MS)
        async with self._wait_in(line):
            for _ in range(ATTEMPTS_MAX):
                transaction = Transaction(self, await self.now_ms(now_ms), now_ms)
                result = await decide(transaction)
                if transaction.is_empty or await self._commit(transaction, now_ms):
                    return result
                await asyncio.sleep(random.uniform(0, pause_ms) / 1_000)
                pause_ms = min(2 * pause_ms, PAUSE_MOST_MS)
        raise Conflict(
            f"others changed the same records {ATTEMPTS_MAX} times in a row: nothing was written; try "
            "again when there is less going on",
            tenant=scope.tag,
        )

    def _wait_in(self, line: str | None) -> AbstractAsyncContextManager[object]:
        if line is None:
            return nullcontext()
        # Whoever holds or awaits a lock keeps it in the dictionary.
        return self._lines.setdefault(line, asyncio.Lock())

    async def put(
        self, name: str, listed: Listed, doc: bytes, *, now_ms: int | None = None
    ) -> None:
        """Write one record over whatever is there; many such calls travel as one."""
        scope = self._scope
        if scope.must_register:
            await scope.register()
        await scope.coalescer.submit(
            _PUT,
            scope.tag,
            (scope.now_argument(now_ms),),
            self._bind,
            (name, codec.new_token(), listed.words, " ".join(listed.places), doc),
            lambda item, context, reply: None,
            size=len(doc),
        )

    async def now_ms(self, now_ms: int | None) -> int:
        """The server's clock, or the caller's."""
        if self._scope.settings.clock == "caller":
            return int(self._scope.now_argument(now_ms))
        self._scope.now_argument(now_ms)
        now: int = await self._scope.coalescer.submit(
            _GET,
            self._scope.tag,
            ("",),
            self._bind,
            ("guard", ""),
            lambda item, context, reply: reply.now_ms,
        )
        return now

    async def _commit(self, transaction: Transaction, now_ms: int | None) -> bool:
        scope = self._scope
        fields = transaction.fields()
        # A commit is a call of its own: its name makes it one, and lets it be repeated.
        committed: bool = await scope.coalescer.submit(
            _COMMIT,
            scope.tag,
            (scope.now_argument(now_ms), codec.new_token()),
            self._bind,
            fields,
            lambda item, context, reply: word_of(item) == "committed",
            size=sum(len(field) for field in fields if isinstance(field, bytes)),
        )
        return committed

    def _bind(self, one: Script, variant: Variant, repeat: bool) -> Sequence[Argument]:
        """Keys and arguments of a call; a variant is now_ms and the name of a commit."""
        given: Mapping[str, Argument] = dict(zip(("now_ms", "commit"), variant, strict=False))
        return self._scope.bind(one, given)


def name_of(collection: str, *parts: str) -> str:
    """The name of a record: its collection, and its encoded id; several parts joined by dots.

    InvalidInput for an id that is blank or longer than 400 bytes.
    """
    for part in parts:
        codec.check_text(part, "id", bytes_max=RECORD_ID_BYTES_MAX)
    return f"{collection}/{'.'.join(encode_word(part) for part in parts)}"


def _stored(name: str, doc: bytes) -> Stored:
    head, *rest = doc.split(b"\n", 2)
    revision = head.partition(b" ")[0]
    if len(rest) != 2 or not revision.isdigit():
        raise CorruptState(
            f"the record {name} cannot be read: nothing was changed; run `leasekit doctor`", id=name
        )
    return Stored(name, int(revision), rest[1])


def _read_record(item: Any, name: str, reply: Reply) -> Stored | LeasekitError | None:
    if item == b"missing":
        return None
    try:
        found: Stored = _stored(name, item[1])
    except CorruptState as error:
        return error
    return found
