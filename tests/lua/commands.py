"""Call commands by name, as the tests' specification of them does, and see what they left.

`Tenant.run` orders keys and arguments by the command's own header and fills in small defaults, so
that a test names only what it is about. `invariants` recounts a tenant's whole state; the fixture
`tenant` does that after every test.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from lua_coverage import LuaCoverage
from servers import Server, dump

from leasekit.keys import Keys, registry_keys, tenant_tag
from leasekit.scripts import Script, read_scripts

A, B, C, D = "a" * 22, "b" * 22, "c" * 22, "d" * 22

ROUTE = "l:t"

# What a test need not say. A route has room for 100 finished rows and 100 dead letters, for 1 s.
DEFAULTS: dict[str, str | int] = {
    "repeated": 0,
    "window_ms": 1_000,
    "keep_ms": 1_000,
    "keep_count": 100,
    "keep_bytes": 1_000_000,
    "dead_keep_ms": 1_000,
    "dead_keep_count": 100,
    "lease_ms": 10,
    "limit": 10,
    "after": "",
    "after_score": "",
    "after_id": "",
    "after_route": "",
    "before": "",
    "tail": 0,
    "statuses": "",
    "routes": "",
    "prefix": "",
    "claim_count": "",
    "before_ms": 1_000,
    "unfinished": 0,
    "mark": "caller",
    "hint": "",
    "known": "",
    "fresh": "f" * 22,
    "newest": 0,
    "settle_ms": 5,
    "asks_max": 2,
    "first_ms": 10,
    "most_ms": 15,
    "upto": "",
    "source": "",
    "active": 0,
    "created_before": "",
}

Field = str | int
Item = Sequence[Field]
State = dict[str, Any]


def draft(
    *, available_at: int = 0, attempts_max: int = 2, on_expiry: str = "reclaim",
    route: str = ROUTE, payload: str = "{}",
) -> str:  # fmt: skip
    """What enqueue stores behind created_at: header words, a newline, the payload."""
    return f"{available_at} {attempts_max} {on_expiry} {route} ~ ~\n{payload}"


def row(id: str, *, dedupe: str = "", available_at: int = 0, **words: Any) -> Item:
    """An item of enqueue."""
    return (id, draft(available_at=available_at, **words), available_at, dedupe)


def intent(
    id: str, token: str = A, *, key: str = "k" * 22, sent: str = "x" * 22, lease_ms: Field = 10,
    on_expiry: str = "park", run: str = "~", owner: str = "s", doc: str = "{}",
) -> Item:  # fmt: skip
    """An item of gate/prepare; `key` and `sent` stand for the digests of key and arguments."""
    return (id, token, key, sent, lease_ms, on_expiry, run, owner, doc)


def intent_line(
    status: str, cause: str, *, token: str = A, lease_end: int = 20, updated_at: int = 10,
    created_at: int = 10, revision: int = 1, attempts: int = 1, fence: int = 10_000,
    claimed_at: int = 10, on_expiry: str = "park", asks: int = 0, ask_token: str = "~",
    ask_fence: int = 0, ask_end: int = 0, ask_at: int = 0, run: str = "~", key: str = "k" * 22,
    sent: str = "x" * 22, owner: str = "s",
) -> str:  # fmt: skip
    """An intent's state line; what is not said is as gate/prepare leaves it at 10."""
    words = (
        *(status, cause, token, lease_end, updated_at, created_at, revision, attempts, fence),
        *(claimed_at, on_expiry, asks, ask_token, ask_fence, ask_end, ask_at, run, key, sent),
        owner,
    )
    return " ".join(map(str, words))


def stands(listed: str, order: int, tail: str) -> str:
    """A place of a record of the ledger."""
    return f"{listed}|{order:016}|{tail}"


def filed(
    *, created_at: int = 1, status: str = "open", source: str = "~", active: int = 1, run: str = "~"
) -> str:  # fmt: skip
    """The words that pages filter a record by."""
    return f"{created_at} {status} {source} {active} {run}"


def record(name: str, token: str = A, *, order: int = 1, doc: str = "{}", **words: Any) -> Item:
    """An item of ledger/put: it stands in the list of its collection, and in that of its run."""
    collection, tail = name.split("/")
    places = [stands(collection, order, tail)]
    if "run" in words:
        places.append(stands(f"{collection}:{words['run']}", order, tail))
    return (name, token, filed(**words), " ".join(places), doc)


def change(name: str, revision: Field = 0, **words: Any) -> Item:
    """An item of ledger/commit that writes a record."""
    _, _, told, places, doc = record(name, **words)
    return ("put", name, revision, told, places, doc)


def intent_change(
    id: str, revision: Field = 0, *, status: str = "sent", attempts: int = 1, created_at: int = 5,
    changed_at: int = 6, claimed_at: int = 0, run: str = "~", key: str = "~", owner: str = "",
    doc: str = "{}",
) -> Item:  # fmt: skip
    """An item of ledger/commit that writes an intent."""
    words = f"{status} {attempts} {created_at} {changed_at} {claimed_at} {run} {key} {owner}"
    return ("intent", id, revision, words, "", doc)


class Tenant:
    """One tenant on one server: its commands, its keys, its whole state."""

    def __init__(self, server: Server, name: str, counter: LuaCoverage | None = None) -> None:
        self.server = server
        self.raw = server.raw
        self.tag = tenant_tag(name, "w")
        self.keys = Keys("lk", self.tag)
        self.registry_prefix = name  # a registry of its own, for the tests of tenant/touch
        self.is_damaged = False
        self._shebang = server.knows_flags
        self._counter = counter

    def run(
        self,
        name: str,
        *items: Item,
        route: str = ROUTE,
        members: str = "",
        **arguments: Field,
    ) -> list[Any]:
        """The reply, bytes as text.

        `route` also says which line is meant, and of which run a log is; `members` is the list that
        outbox/list or gate/list reads: else the line of the route, and the intents by their last change.
        """
        script = read_scripts()[name]
        if "route" in script.arguments:
            arguments["route"] = route
        given = {word: arguments.pop(word, DEFAULTS.get(word)) for word in script.arguments}
        assert not arguments, f"{name} has no {sorted(arguments)}"
        keys = {word: self.key(script, word, route, members) for word in script.keys}
        bound = script.bind(keys, given)  # type: ignore[arg-type]  # None: a missing argument
        fields = [field for item in items for field in item]
        return self.send(script, bound, fields)

    def send(self, script: Script, bound: Sequence[Field], fields: Sequence[Field]) -> list[Any]:
        """One call of a script with these very arguments."""
        parts = [_bytes(part) for part in (*bound, *fields)]
        if self._counter is not None:
            first = 1 + len(script.keys)
            reply = self._counter.run(
                self.raw, script.name, script.source, parts[1:first], parts[first:]
            )
            return _text(reply)
        sha = script.sha(shebang=self._shebang)
        try:
            reply = self.raw.execute_command("EVALSHA", sha, *parts)
        except redis.exceptions.NoScriptError:
            self.raw.script_load(script.text(shebang=self._shebang))
            reply = self.raw.execute_command("EVALSHA", sha, *parts)
        return _text(reply)

    def refusal(self, name: str, *items: Item, **arguments: Field) -> str:
        """The error that a call is refused with; the refusal must have written nothing."""
        before = self.dump()
        try:
            reply = self.run(name, *items, **arguments)
        except redis.ResponseError as error:
            assert self.dump() == before
            return str(error)
        raise AssertionError(f"{name} answered {reply}")

    def key(self, script: Script, word: str, route: str = ROUTE, members: str = "") -> str:
        concept = script.name.partition("/")[0]
        if concept == "tenant" and word != "barrier":
            return registry_keys(self.registry_prefix)[word]
        if word == "fence":
            return self.keys.fence
        if concept == "ledger":
            return self.keys.named(concept, word, route)
        if word == "members":
            word = members or ("updated" if concept == "gate" else "due")
        return self.keys.named(concept, word, route)

    # Shorthand for what most tests begin with.

    def enqueue(self, *rows: str | Item, now_ms: int = 0, **arguments: Field) -> list[Any]:
        items = [row(one) if isinstance(one, str) else one for one in rows]
        return self.run("outbox/enqueue", *items, now_ms=now_ms, **arguments)

    def claim(
        self, token: str, *, now_ms: int, limit: int = 10, consumer: str = "a", **arguments: Field
    ) -> list[Any]:
        return self.run("outbox/claim", (token, limit, consumer), now_ms=now_ms, **arguments)

    def ids_claimed(self, token: str, **arguments: Any) -> list[str]:
        """Claim, and give only the ids of the rows, in their order."""
        return ids_of(self.claim(token, **arguments)[4])

    def prepare(self, *items: str | Item, now_ms: Field = 10, **arguments: Field) -> list[Any]:
        given = [intent(one) if isinstance(one, str) else one for one in items]
        return self.run("gate/prepare", *given, now_ms=now_ms, **arguments)

    # Its state.

    def dump(self) -> State:
        """All that is stored of the tenant, its registry included where it has one."""
        state = dump(self.raw, "lk", self.tag)
        return state | dump(self.raw, self.registry_prefix, "tenants")

    def row(self, id: str) -> str:
        """The state line of a row; "" while it is fresh or missing."""
        line = self.raw.hget(self.keys.outbox_state, id)
        return (line or b"").decode("utf-8", "surrogateescape")

    def intent(self, id: str) -> str:
        """The state line of an intent; "" while it is missing."""
        line = self.raw.hget(self.keys.gate_state, id)
        return (line or b"").decode("utf-8", "surrogateescape")

    def record(self, name: str) -> list[str]:
        """Head, places and JSON of a record of the ledger; [""] while it is missing."""
        doc = self.raw.hget(self.keys.ledger_docs, name)
        return (doc or b"").decode("utf-8", "surrogateescape").split("\n", 2)

    def facts(self, id: str) -> list[str]:
        """What was said of an intent, the oldest first."""
        lines = self.raw.hget(self.keys.gate_facts, id)
        return lines.decode("utf-8", "surrogateescape").split("\n") if lines else []

    def tally(self) -> dict[str, int]:
        """Counts and bytes that are not 0."""
        fields = self.raw.hgetall(self.keys.outbox_tally)
        counts = {field.decode(): value for field, value in fields.items() if field != b"horizon"}
        return {field: int(value) for field, value in counts.items() if int(value)}

    def changes(self, before: State) -> State:
        """What differs from an earlier dump: key -> {member: value now, None where it is gone}."""
        return differences(before, self.dump())


def ids_of(answer: list[Any]) -> list[str]:
    """The row ids of a claim's answer."""
    return answer[3::5]


def differences(before: State, after: State) -> State:
    found: State = {}
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key, {}), after.get(key, {})
        if isinstance(old, str) or isinstance(new, str):
            if old != new:
                found[key] = new or None
            continue
        members = [member for member in {**old, **new} if old.get(member) != new.get(member)]
        if members:
            found[key] = {member: new.get(member) for member in members}
    return found


def _bytes(value: Field) -> bytes:
    return str(value).encode("utf-8", "surrogateescape")


def _text(value: Any) -> Any:
    if isinstance(value, list):
        return [_text(part) for part in value]
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


# --- what holds after every command ---------------------------------------------------------------

LISTS = {
    "sent": "outbox:done",
    "cancelled": "outbox:done",
    "dead_lettered": "outbox:dead",
    "unknown": "outbox:unknown",
}


def invariants(state: State) -> None:
    """Recount a tenant from its documents and state lines: every list, count and sum must agree."""
    _check_rows(state)
    _check_pairs(state)
    _check_intents(state)
    _check_logs(state)
    fences = [int(line.split()[7]) for line in state.get("outbox:state", {}).values()]
    fences += [int(line.split()[2]) for line in state.get("lease:docs", {}).values()]
    intents = [line.split(" ") for line in state.get("gate:state", {}).values()]
    fences += [int(words[at]) for words in intents for at in (8, 13)]  # of grants and of questions
    assert max(fences, default=0) <= int(state.get("fence", "0"))


def _check_rows(state: State) -> None:
    docs, lines = state.get("outbox:docs", {}), state.get("outbox:state", {})
    assert lines.keys() <= docs.keys()
    assert state.get("outbox:errors", {}).keys() <= docs.keys()
    counted: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    lists: dict[str, dict[str, int]] = {}
    for id, doc in docs.items():
        created_at, available_at, _, _, route = doc.split("\n")[0].split(" ")[:5]
        size = len(_bytes(doc))
        fresh = f"pending enqueued ~ {int(available_at) or created_at} {size} 0 0 0 0 "
        status, _, token, at, told_size, attempts, claims, _, _, _ = lines.get(id, fresh).split(
            " ", 9
        )
        assert int(told_size) == size
        assert int(attempts) <= int(claims)
        assert token == "~" or len(token) == 22
        counted[f"{status}:{route}"] += 1
        place = LISTS.get(status, f"outbox:due:{route}")
        lists.setdefault(place, {})[id] = int(at)
        if place in ("outbox:done", "outbox:dead"):
            sizes[f"{place.removeprefix('outbox:')}_bytes"] += size
    assert {key: members for key, members in state.items() if _is_list(key)} == lists
    tally = dict(state.get("outbox:tally", {}))
    tally.pop("horizon", None)
    for field, value in tally.items():
        if field.startswith("hinted:"):  # the lease end that listeners were told last
            continue
        if field.startswith(("sent:", "cancelled:")):  # ever, not now
            assert int(value) >= counted.pop(field, 0)
        else:
            assert int(value) == counted.pop(field, 0) + sizes.pop(field, 0), field
    assert not counted
    assert not +sizes


def _is_list(key: str) -> bool:
    return key in LISTS.values() or key.startswith("outbox:due:")


def _check_pairs(state: State) -> None:
    """What is kept in two structures is kept in both."""
    claims = state.get("outbox:claims", {})
    ends = {claim_id: int(record.split(" ")[0]) for claim_id, record in claims.items()}
    assert ends == state.get("outbox:claims_end", {})
    assert state.get("outbox:dedupe", {}).keys() == state.get("outbox:dedupe_end", {}).keys()
    leases = state.get("lease:docs", {})
    ends = {name: int(line.split(" ")[4]) for name, line in leases.items()}
    assert ends == state.get("lease:due", {})
    assert dict.fromkeys(leases, 0) == state.get("lease:names", {})
    assert state.get("idempotency:docs", {}).keys() == state.get("idempotency:due", {}).keys()


# Where an intent stands by its status and cause, and by which of its times; a claimed one that parks
# stands in gate:expiring by the end of its lease.
CAUSES = {
    "pending": {"ledger"},
    "claimed": {"granted", "left"},
    "unknown": {"left", "parked", "asked", "undecidable"},
    "sent": {"succeeded", "applied", "resolved", "ledger"},
    "failed": {"failed", "resolved", "ledger"},
    "cancelled": {"blocked", "absent", "resolved"},
    "dead_lettered": {"undecidable"},
}
INTENT_LISTS = {"sent": "done", "cancelled": "done", "dead_lettered": "dead", "unknown": "unknown"}
FACT_KINDS = {
    *("succeeded", "failed", "blocked", "left", "applied", "absent", "undecidable"),
    *("resolved_sent", "resolved_failed", "resolved_not_sent"),
}


def _check_intents(state: State) -> None:
    """Every intent stands in the lists of its state line and nowhere else, with its facts."""
    lines = state.get("gate:state", {})
    assert state.get("gate:docs", {}).keys() == lines.keys()
    lists: dict[str, dict[str, int]] = {}
    for id, line in lines.items():
        words = line.split(" ", 19)
        status, cause, token, lease_end, updated_at, _, revision, attempts = words[:8]
        _, _, on_expiry, asks, ask_token, ask_fence, ask_end, ask_at, run, *digests = words[8:19]
        assert cause in CAUSES[status], line
        assert len(token) == 22
        assert on_expiry in ("reclaim", "park")
        assert all(digest == "~" or len(digest) == 22 for digest in digests)
        # Attempts that the ledger was told of are those of others.
        is_told = cause == "ledger" or "ledger:docs" in state
        assert 1 <= int(attempts) <= int(revision) or is_told
        assert (int(asks) == 0) == (ask_token == "~") == (ask_fence == "0") == (ask_end == "0")
        place, at = INTENT_LISTS.get(status), int(updated_at)
        if status == "claimed" and on_expiry == "park":
            place, at = "expiring", int(lease_end)
        elif status == "unknown":
            at = int(ask_at)
        if place:
            lists.setdefault(f"gate:{place}", {})[id] = at
        lists.setdefault("gate:updated", {})[id] = int(updated_at)
        if run != "~":
            lists.setdefault("gate:runs", {})[f"{run}:{int(updated_at):016}:{id}"] = 0
    places = {f"gate:{noun}" for noun in ("expiring", "unknown", "dead", "done", "updated", "runs")}
    assert {key: members for key, members in state.items() if key in places} == lists
    assert state.get("gate:facts", {}).keys() <= lines.keys()
    for told in state.get("gate:facts", {}).values():
        facts = [fact.split(" ", 4) for fact in told.split("\n")]
        assert len(facts) <= 16
        for _, kind, fence, applied, _ in facts:
            assert kind in FACT_KINDS
            assert fence.isdigit()
            assert applied in ("0", "1")
    name, *openings = state.get("gate:dataset", "").split("\n")
    granted = [line for line in lines.values() if line.split(" ")[8] != "0"]
    assert len(name) == 22 or not granted
    assert len({opening.split(" ")[0] for opening in openings}) == len(openings) <= 16


def _check_logs(state: State) -> None:
    """The events of a run stand in its log at their places, each place given once; compacted ones are
    known by their places alone. The last place ever given is kept under the empty id."""
    for key, events in state.items():
        if not key.startswith("ledger:events:"):
            continue
        log = state.get(key.replace(":events:", ":log:"), {})
        last, *lines = events[""], *(line for id, line in events.items() if id)
        kept = {id: int(line.split()[0]) for id, line in events.items() if "\n" in line}
        assert kept == log
        assert len(set(log.values())) == len(log)
        assert int(last) == max(int(line.split()[0]) for line in lines)


def _check_records(state: State) -> None:
    """Every record of the ledger stands in its own places, and every place is one of a record."""
    places: dict[str, int] = {}
    for name, doc in state.get("ledger:docs", {}).items():
        head, stands_in, _ = doc.split("\n", 2)
        revision, token, created_at, _, _, active, run = head.split(" ")
        assert int(revision) >= 1
        assert len(token) == 22
        assert created_at.isdigit()
        assert active in ("0", "1")
        assert int(state["ledger:guards"][run]) >= 1, name
        for one in stands_in.split():
            _, order, tail = one.split("|")
            assert len(order) == 16
            assert name.split("/")[1] == tail
            places[one] = 0
    assert state.get("ledger:index", {}) == places
    for key, log in state.items():
        if key.startswith("ledger:log:"):
            events = state[key.replace(":log:", ":events:")]
            assert log == {id: int(events[id].split("\n")[0].split(" ")[0]) for id in log}, key


# --- transcripts ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exchange:
    """One command with its items and what was answered, as PROTOCOL.md and golden.txt write it."""

    name: str
    arguments: dict[str, Field]
    items: tuple[Item, ...]
    reply: Any

    def run(self, tenant: Tenant) -> Any:
        return tenant.run(self.name, *self.items, **self.arguments)  # type: ignore[arg-type]

    def text(self, reply: Any) -> str:
        lines = [f"> {self.name} {json.dumps(self.arguments)}"]
        lines += [f"  {json.dumps(item, ensure_ascii=False)}" for item in self.items]
        return "\n".join([*lines, f"< {json.dumps(reply, ensure_ascii=False)}"]) + "\n"


def exchanges(text: str) -> Iterator[Exchange]:
    """The exchanges of a text; lines that are none are passed over."""
    name, arguments, items = "", {}, []
    for line in text.splitlines():
        if line.startswith("> ") and "/" in line.split(" ")[1]:
            _, name, words = line.split(" ", 2)
            arguments, items = json.loads(words), []
        elif name and line.startswith("  ["):
            items.append(json.loads(line))
        elif name and line.startswith("< "):
            yield Exchange(name, arguments, tuple(items), json.loads(line[2:]))
            name = ""
