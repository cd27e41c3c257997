"""The outbox: rows, the lists they stand in, what speaks of them, and the counters.

Counters are compared only if nothing moved while they were recounted, which they themselves tell:
a row can come back to where it was only through a claim, which raises the fence.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from leasekit.doctor.finding import Finding, Problem
from leasekit.doctor.pages import LOOKS_MAX, Pages
from leasekit.keys import route_parts

__all__ = [
    "OutboxSweep",
    "RowLook",
    "is_route",
    "judge_claim",
    "judge_dedupe",
    "judge_named_row",
    "judge_row",
    "judge_tally",
    "read_state",
    "route_of_header",
]

TOKEN_LENGTH = 22

STATUS_LIST = {
    "pending": "due",
    "claimed": "due",
    "sent": "done",
    "cancelled": "done",
    "dead_lettered": "dead",
    "unknown": "unknown",
}
LISTS = ("due", "done", "dead", "unknown")
EVER_COUNTED = ("sent", "cancelled")

_HEADER = re.compile(rb"(\d+) (\d+) (\d+) (reclaim|park) (\S+:\S+) \S+ \S+(?=\n|\Z)")
_STATE = re.compile(
    rb"(\w+) (\w+) (\S+) (\d+) (\d+) (\d+) (\d+) (\d+) (\d+) (.*)\Z",
    re.DOTALL,
)


class RowLook(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one row at one moment.

    header: first line of its document, None where there is no document. scores: by list, of `due`
    only its own line's; a list that does not name it is not in there.
    """

    header: bytes | None
    size_bytes: int
    line: bytes | None
    scores: dict[str, float]
    is_lane_listed: bool = True


class _State(msgspec.Struct, frozen=True):
    status: str
    token: str
    at_ms: int
    size_bytes: int
    attempts: int
    claims: int
    fence: int
    claimed_at_ms: int


def read_state(line: bytes) -> _State | None:
    """The words of a state line that a sweep needs; None for what no command writes."""
    found = _STATE.match(line)
    if found is None or found[1].decode() not in STATUS_LIST:
        return None
    numbers = [int(found[i]) for i in range(4, 10)]
    return _State(found[1].decode(), found[3].decode("latin-1"), *numbers)


def route_of_header(header: bytes) -> str | None:
    """The route that a document names; None for a header that cannot be read."""
    found = _HEADER.match(header)
    if found is None:
        return None
    try:
        route = found[5].decode()
        route_parts(route)
    except ValueError:
        return None
    return route


def _state_of(look: RowLook) -> _State | None:
    """The state of a row that is there; of a fresh one, what its document says."""
    if look.line is not None:
        return read_state(look.line)
    created_at, available_at = (look.header or b"0 0").split(b" ")[:2]
    at_ms = int(available_at) or int(created_at)
    return _State("pending", "~", at_ms, look.size_bytes, 0, 0, 0, 0)


# --- judges: pure functions -----------------------------------------------------------------------


def judge_row(look: RowLook) -> list[Problem]:
    """What is wrong with a row; nothing, for one that is not there."""
    if look.header is None:
        return []
    if route_of_header(look.header) is None:
        return [Problem("unreadable_document", "docs", "its header cannot be read")]
    state = _state_of(look)
    if state is None:
        held = " (it was claimed)" if (look.line or b"").startswith(b"claimed ") else ""
        return [Problem("unreadable_state", "state", f"its state line cannot be read{held}")]
    problems = []
    home = STATUS_LIST[state.status]
    elsewhere = [noun for noun in LISTS if noun in look.scores and noun != home]
    if home not in look.scores and not elsewhere:
        what = f"it is {state.status} and in no list; it belongs at {state.at_ms}"
        problems.append(Problem("row_without_index", home, what))
    for noun in elsewhere:
        kind = "row_in_two_lists" if home in look.scores else "row_in_wrong_list"
        what = f"it is {state.status}, so it belongs in {home} alone, at {state.at_ms}"
        problems.append(Problem(kind, noun, what))
    if home in look.scores and look.scores[home] != state.at_ms:
        what = f"it stands at {look.scores[home]:.0f}, its state says {state.at_ms}"
        problems.append(Problem("wrong_place", home, what))
    if state.size_bytes != look.size_bytes:
        what = f"its state says {state.size_bytes} bytes, its document has {look.size_bytes}"
        problems.append(Problem("wrong_size", "state", what))
    if state.status == "claimed" and len(state.token) != TOKEN_LENGTH:
        problems.append(Problem("claimed_without_token", "state", "it is claimed by no token"))
    if not look.is_lane_listed:
        problems.append(Problem("lane_not_listed", "lanes", "its lane is not among the lanes"))
    return problems


def judge_claim(record: bytes | None, end: float | None) -> list[Problem]:
    """What is wrong with a claim record and its entry among the ends."""
    if record is None:
        if end is None:
            return []
        return [Problem("claim_end_without_record", "claims_end", "an end without a record")]
    told, _, ids = record.partition(b" ")
    rows = ids.decode("utf-8", "replace").replace(" ", ", ")
    if end is None:
        what = f"it is never forgotten: its end is not kept; it names {rows}"
        return [Problem("stale_claim_record", "claims", what)]
    if not told.isdigit() or int(told) != end:
        what = f"its end is kept as {end:.0f}, it says {told.decode('latin-1')}; it names {rows}"
        return [Problem("stale_claim_record", "claims", what)]
    return []


def judge_named_row(
    id: str, records: int, line: bytes | None, is_there: bool, horizon: str
) -> list[Problem]:
    """What is wrong with a row that `records` claim records name."""
    if not records:
        return []
    if not is_there:
        if id <= horizon:
            return []
        return [
            Problem("stale_claim_record", "claims", "a claim record names it, and it never was")
        ]
    state = None if line is None else read_state(line)
    if line is not None and state is None:
        return []  # told as what it is already
    claims = state.claims if state else 0
    if records <= claims:
        return []
    what = f"{records} claim records name it, and its claim count is {claims}"
    return [Problem("two_holders" if records > 1 else "stale_claim_record", "claims", what)]


def judge_dedupe(
    entry: bytes | None, end: float | None, is_there: bool, horizon: str
) -> list[Problem]:
    """What is wrong with a dedupe key, its end, and the row that it names."""
    if entry is None:
        if end is None:
            return []
        return [Problem("dedupe_end_without_entry", "dedupe_end", "an end without an entry")]
    if end is None:
        return [Problem("dedupe_without_end", "dedupe", "the end of its window is not kept")]
    id = entry.partition(b" ")[0].decode("utf-8", "replace")
    if not is_there and id > horizon:
        return [Problem("dedupe_of_nothing", "dedupe", f"it names row {id}, which never was")]
    return []


def judge_tally(told: dict[str, int], counted: Counter[str]) -> list[tuple[str, Problem]]:
    """Each counter that does not agree with a recount of rows and bytes."""
    problems = []
    for field in sorted(told.keys() | counted.keys()):
        ours, theirs = counted[field], told.get(field, 0)
        is_ever = field.partition(":")[0] in EVER_COUNTED
        if theirs < ours or (theirs != ours and not is_ever):
            most = "at least " if is_ever else ""
            what = f"it says {theirs}, there are {most}{ours}"
            problems.append((field, Problem("wrong_tally", "tally", what)))
    return problems


# --- the sweep ------------------------------------------------------------------------------------


class OutboxSweep:
    """Pages of rows, suspects, second looks."""

    def __init__(self, pages: Pages, keys_found: set[str]) -> None:
        self._pages = pages
        self._backend = pages.backend
        self._keys = pages.keys
        self._keys_found = keys_found
        self._routes: set[str] = set()
        self._unlisted: set[str] = set()
        self._blurred: set[str] = set()  # routes with other findings: their sums say nothing
        self._grants: dict[int, tuple[int, str]] = {}

    async def run(self) -> AsyncIterator[Finding]:
        await self._learn_routes()
        for check in (
            self._check_rows,
            self._check_states,
            self._check_errors,
            self._check_lists,
            self._check_claims,
            self._check_dedupe,
        ):
            async for finding in check():
                yield finding

    async def _learn_routes(self) -> None:
        line_start = self._keys.outbox_due("")
        for key in self._keys_found:
            if key.startswith(line_start) and is_route(key.removeprefix(line_start)):
                self._routes.add(key.removeprefix(line_start))
        async for page in self._pages.scan("ZSCAN", self._keys.outbox_lanes):
            self._routes.update(member.decode() for member, _ in page)

    # rows

    async def _check_rows(self) -> AsyncIterator[Finding]:
        before = await self._stamp()
        counted: Counter[str] = Counter()
        suspects: list[str] = []
        async for page in self._pages.scan("HSCAN", self._keys.outbox_docs, documents=True):
            headers = {id.decode("utf-8", "replace"): doc.partition(b"\n")[0] for id, doc in page}
            for id, look in (await self._look_at_rows(headers)).items():
                _count(look, counted)
                if judge_row(look):
                    suspects.append(id)
            for id in suspects:
                async for finding in self._confirm_row(id):
                    yield finding
            suspects.clear()
        after = await self._stamp()
        if before == after and after[1] is not None:
            async for finding in self._confirm_tally(counted, after):
                yield finding
        else:
            async for finding in self._check_sums():
                yield finding

    async def _look_at_rows(self, headers: dict[str, bytes]) -> dict[str, RowLook]:
        """The rows of a page at one moment; documents as they were read, for they never change."""
        keys, ids = self._keys, list(headers)
        if not ids:
            return {}
        by_route: dict[str, list[str]] = defaultdict(list)
        for id, header in headers.items():
            route = route_of_header(header)
            if route is not None:
                by_route[route].append(id)
        routes = list(by_route)
        commands: list[Sequence[str]] = [
            ("HMGET", keys.outbox_state, *ids),
            ("ZMSCORE", keys.outbox_done, *ids),
            ("ZMSCORE", keys.outbox_dead, *ids),
            ("ZMSCORE", keys.outbox_unknown, *ids),
            ("ZMSCORE", keys.outbox_lanes, *(routes or ["-"])),
            *[("ZMSCORE", keys.outbox_due(route), *by_route[route]) for route in routes],
            *[("HSTRLEN", keys.outbox_docs, id) for id in ids],
        ]
        lines, done, dead, unknown, lanes, *rest = await self._backend.look(*commands)
        scores: dict[str, dict[str, float]] = {id: {} for id in ids}
        for noun, found in (("done", done), ("dead", dead), ("unknown", unknown)):
            _note_scores(scores, noun, ids, found)
        for route, found in zip(routes, rest, strict=False):
            _note_scores(scores, "due", by_route[route], found)
        listed = {route for route, score in zip(routes, lanes, strict=False) if score is not None}
        sizes = rest[len(routes) :]
        return {
            id: RowLook(
                header=headers[id] if size else None,
                size_bytes=int(size),
                line=line,
                scores=scores[id],
                is_lane_listed=route_of_header(headers[id]) in listed,
            )
            for id, line, size in zip(ids, lines, sizes, strict=True)
        }

    async def _confirm_row(self, id: str) -> AsyncIterator[Finding]:
        """Look at a suspect alone; its document is read again, for it may be another row's by now."""
        for _ in range(LOOKS_MAX):
            doc = await self._backend.command("HGET", self._keys.outbox_docs, id)
            if doc is None:
                return
            look = (await self._look_at_rows({id: doc.partition(b"\n")[0]}))[id]
            if look.header is None:
                return
            if look.size_bytes == len(doc):
                break
        else:
            return
        route = route_of_header(look.header) or ""
        for problem in judge_row(look):
            if problem.kind == "lane_not_listed":
                if route in self._unlisted:
                    continue
                self._unlisted.add(route)
            self._blurred.add(route)
            yield self._pages.finding(problem, id, route)

    # what speaks of rows

    async def _check_states(self) -> AsyncIterator[Finding]:
        async for page in self._pages.scan("HSCAN", self._keys.outbox_state):
            missing = await self._without_document([id for id, _ in page])
            for name in missing:
                yield self._pages.finding(
                    Problem("state_without_row", "state", "a state line without a document"), name
                )
            for id, line in page:
                name = id.decode("utf-8", "replace")
                state = read_state(line)
                if state is None or name in missing:
                    continue
                self._pages.note_fence(state.fence)
                if state.status == "claimed" and state.fence:
                    other = self._note_grant(state.fence, state.claimed_at_ms, name)
                    if other and await self._share_a_fence(name, other):
                        what = f"it and {other} are held under one fence, granted at two moments"
                        yield self._pages.finding(Problem("two_holders", "state", what), name)

    def _note_grant(self, fence: int, granted_at_ms: int, name: str) -> str | None:
        """Who else has this fence from another moment: a fence is of one call."""
        known_at_ms, known = self._grants.setdefault(fence, (granted_at_ms, name))
        return known if known_at_ms != granted_at_ms else None

    async def _share_a_fence(self, one: str, other: str) -> bool:
        lines = await self._backend.command("HMGET", self._keys.outbox_state, one, other)
        first, second = [read_state(line) if line is not None else None for line in lines]
        if first is None or second is None:
            return False
        both_held = first.status == second.status == "claimed"
        same_call = first.claimed_at_ms == second.claimed_at_ms
        return both_held and first.fence == second.fence and not same_call

    async def _check_errors(self) -> AsyncIterator[Finding]:
        async for page in self._pages.scan("HSCAN", self._keys.outbox_errors, documents=True):
            for id in await self._without_document([id for id, _ in page], "outbox_errors"):
                yield self._pages.finding(
                    Problem("errors_without_row", "errors", "errors without a document"), id
                )

    async def _without_document(
        self, ids: Sequence[bytes], holder: str = "outbox_state"
    ) -> list[str]:
        """Those that a hash names and that have, at one moment, no document."""
        if not ids:
            return []
        keys = self._keys
        found = await self._backend.look(
            *[("HEXISTS", getattr(keys, holder), id) for id in ids],
            *[("HEXISTS", keys.outbox_docs, id) for id in ids],
        )
        named, stored = found[: len(ids)], found[len(ids) :]
        return [
            id.decode("utf-8", "replace")
            for id, is_named, is_stored in zip(ids, named, stored, strict=True)
            if is_named and not is_stored
        ]

    async def _check_lists(self) -> AsyncIterator[Finding]:
        for noun in ("done", "dead", "unknown"):
            async for finding in self._check_list(noun, None):
                yield finding
        for route in sorted(self._routes):
            async for finding in self._check_list("due", route):
                yield finding

    async def _check_list(self, noun: str, route: str | None) -> AsyncIterator[Finding]:
        keys = self._keys
        key = keys.named("outbox", noun, route or "")
        async for page in self._pages.scan("ZSCAN", key):
            for start in range(0, len(page), self._pages.pace.count):
                ids = [id for id, _ in page[start : start + self._pages.pace.count]]
                documents = [("HEXISTS", keys.outbox_docs, id) for id in ids]
                reading = [("HMGET", keys.outbox_docs, *ids)] if route else documents
                scores, *docs = await self._backend.look(("ZMSCORE", key, *ids), *reading)
                docs = docs[0] if route else docs
                self._pages.pace.learn(sum(len(doc) for doc in docs if doc) if route else 0)
                for raw, score, doc in zip(ids, scores, docs, strict=True):
                    id = raw.decode("utf-8", "replace")
                    if score is None:
                        continue
                    if not doc:
                        problem = Problem("index_without_row", noun, "an entry without a document")
                        yield self._pages.finding(problem, id, route or "")
                    elif route and route_of_header(doc.partition(b"\n")[0]) not in (route, None):
                        own = route_of_header(doc.partition(b"\n")[0])
                        problem = Problem("row_in_wrong_line", noun, f"its document says {own}")
                        yield self._pages.finding(problem, id, route)

    # counters

    async def _stamp(self) -> tuple[dict[str, int], bytes | None]:
        """Tally and fence. Two equal stamps: no row changed its status between them."""
        fence = await self._backend.command("GET", self._keys.fence)
        tally: dict[str, int] = {}
        async for page in self._pages.scan("HSCAN", self._keys.outbox_tally):
            for field, value in page:
                name = field.decode("utf-8", "replace")
                if _is_counted(name):
                    tally[name] = int(value) if value.isdigit() else -1
        if fence != await self._backend.command("GET", self._keys.fence):
            return tally, None
        return tally, fence or b"0"

    async def _confirm_tally(
        self, counted: Counter[str], stamp: tuple[dict[str, int], bytes | None]
    ) -> AsyncIterator[Finding]:
        """Count once more what does not agree: a scan may give a row twice while a hash grows."""
        if not judge_tally(stamp[0], counted):
            return
        again: Counter[str] = Counter()
        seen: set[bytes] = set()
        async for page in self._pages.scan("HSCAN", self._keys.outbox_docs, documents=True):
            fresh = {
                id.decode("utf-8", "replace"): doc.partition(b"\n")[0]
                for id, doc in page
                if id not in seen
            }
            seen.update(id for id, _ in page)
            for look in (await self._look_at_rows(fresh)).values():
                _count(look, again)
        if await self._stamp() == stamp:
            for field, problem in judge_tally(stamp[0], again):
                yield self._pages.finding(problem, field)

    async def _check_sums(self) -> AsyncIterator[Finding]:
        """While rows move: a line's counters against its length, read at one moment."""
        keys = self._keys
        for route in sorted(self._routes - self._blurred):
            length, counts = await self._backend.look(
                ("ZCARD", keys.outbox_due(route)),
                ("HMGET", keys.outbox_tally, f"pending:{route}", f"claimed:{route}"),
            )
            told = [int(count or 0) for count in counts]
            if sum(told) != length and await self._line_is_sound(route):
                what = f"{told[0]} pending and {told[1]} claimed, and {length} stand in line"
                yield self._pages.finding(Problem("wrong_tally", "tally", what), f"pending:{route}")

    async def _line_is_sound(self, route: str) -> bool:
        """Whether a line names rows only: else its length says nothing about the counters."""
        async for _ in self._check_list("due", route):
            return False
        return True

    # claims and dedupe keys

    async def _check_claims(self) -> AsyncIterator[Finding]:
        keys = self._keys
        naming: dict[str, set[bytes]] = defaultdict(set)
        async for page in self._pages.scan("HSCAN", keys.outbox_claims, documents=True):
            for token, record in page:
                for id in record.split(b" ")[1:]:
                    naming[id.decode("utf-8", "replace")].add(token)
            async for finding in self._judge_claims([token for token, _ in page]):
                yield finding
        async for page in self._pages.scan("ZSCAN", keys.outbox_claims_end):
            async for finding in self._judge_claims([token for token, _ in page], only_ends=True):
                yield finding
        for id, tokens in naming.items():
            found, line, is_there, horizon = await self._backend.look(
                ("HMGET", keys.outbox_claims, *tokens),
                ("HGET", keys.outbox_state, id),
                ("HEXISTS", keys.outbox_docs, id),
                ("HGET", keys.outbox_tally, "horizon"),
            )
            records = sum(id.encode() in (record or b"").split(b" ")[1:] for record in found)
            last = (horizon or b"").decode("utf-8", "replace")
            for problem in judge_named_row(id, records, line, bool(is_there), last):
                yield self._pages.finding(problem, id)

    async def _judge_claims(
        self, tokens: Sequence[bytes], *, only_ends: bool = False
    ) -> AsyncIterator[Finding]:
        if not tokens:
            return
        keys = self._keys
        records, ends = await self._backend.look(
            ("HMGET", keys.outbox_claims, *tokens), ("ZMSCORE", keys.outbox_claims_end, *tokens)
        )
        for record, end in zip(records, ends, strict=True):
            for problem in judge_claim(record, end):
                if (problem.kind == "claim_end_without_record") == only_ends:
                    yield self._pages.finding(problem, None)  # its field is a token

    async def _check_dedupe(self) -> AsyncIterator[Finding]:
        keys = self._keys
        async for page in self._pages.scan("HSCAN", keys.outbox_dedupe):
            async for finding in self._judge_dedupe(dict(page)):
                yield finding
        async for page in self._pages.scan("ZSCAN", keys.outbox_dedupe_end):
            async for finding in self._judge_dedupe(dict.fromkeys(dict(page), b"")):
                yield finding

    async def _judge_dedupe(self, page: dict[bytes, bytes]) -> AsyncIterator[Finding]:
        """A page of entries, or of ends: then the entries are empty, and only what lacks one counts."""
        if not page:
            return
        keys, digests = self._keys, list(page)
        ids = [entry.partition(b" ")[0] for entry in page.values()]
        entries, ends, horizon, *stored = await self._backend.look(
            ("HMGET", keys.outbox_dedupe, *digests),
            ("ZMSCORE", keys.outbox_dedupe_end, *digests),
            ("HGET", keys.outbox_tally, "horizon"),
            *[("HEXISTS", keys.outbox_docs, id) for id in ids],
        )
        last = (horizon or b"").decode("utf-8", "replace")
        for digest, read, entry, end, is_stored in zip(
            digests, page.values(), entries, ends, stored, strict=True
        ):
            # An entry that changed since it was read names another row, and is of this moment.
            is_there = bool(is_stored) or entry != read
            for problem in judge_dedupe(entry, end, is_there, last):
                if (problem.kind == "dedupe_end_without_entry") == (read == b""):
                    yield self._pages.finding(problem, digest.decode("utf-8", "replace"))


def is_route(text: str) -> bool:
    try:
        route_parts(text)
    except ValueError:
        return False
    return True


def _is_counted(field: str) -> bool:
    """Whether a field of the tally counts rows or bytes; it remembers other things too."""
    return field.partition(":")[0] in STATUS_LIST or field in ("done_bytes", "dead_bytes")


def _note_scores(
    scores: dict[str, dict[str, float]], noun: str, ids: Sequence[str], found: Sequence[Any]
) -> None:
    for id, score in zip(ids, found, strict=True):
        if score is not None:
            scores[id][noun] = float(score)


def _count(look: RowLook, counted: Counter[str]) -> None:
    """Add a row to what the tally should say."""
    if look.header is None:
        return
    route = route_of_header(look.header)
    state = _state_of(look) if route else None
    if state is None:
        return
    counted[f"{state.status}:{route}"] += 1
    home = STATUS_LIST[state.status]
    if home in ("done", "dead"):
        counted[f"{home}_bytes"] += look.size_bytes
