"""Whatever is wrong with an argument, a command refuses it by name and writes nothing.

Each command has here one good call. A test takes it, spoils one argument or one field of its last
item, and expects either an LK_ARGUMENT that refuses the call, or, where a script only compares a
field with what is stored, an answer that says that nothing was done.
"""

from __future__ import annotations

import pytest
import redis
from lua.commands import (
    DEFAULTS,
    A,
    B,
    C,
    Field,
    Item,
    Tenant,
    change,
    draft,
    intent,
    intent_change,
    record,
    row,
)

from leasekit.scripts import read_scripts

NOT_NUMBERS = [
    *("x", "-1", "+1", "1e3", "1.5", "0x10", " 1", "1 ", "1\0", "1\r\n", "nan", "inf", "1,000"),
    *("٣", str(2**53), str(2**53 + 1), "10000000000000000", "00000000000000001"),
]
NOT_FLAGS = ["", "2", "01", "true", "1\0", " 1", "-0"]
NOT_ROUTES = ["", "l", "l:", ":t", "l:t:u", "l t", "l:t\n", "l:t\0", "l:{t}", "l:*", "é:t"]
NOT_WORDS = ["", "x", "RECLAIM", "reclaim ", "park\n", "done\0"]
NOT_TOKENS = ["", "~", A[:-1], A[1:], A + "a", f"{A} 20", A[:-1] + " ", A[:-1] + "\n", A[:-1] + "\0",
              A[:-1] + "~", A[:-1] + "é"]  # fmt: skip
NOT_IDS = ["", " ", "a b", "a\n", "a\0", "a\r", "é", "a:b", "x" * 201]

NOT_NOTES = ["{}\n", "\n", "x" * 65_537]
NOT_RUNS = ["", " ", "a b", "a:", "a\n", "a\0", "é", "{a}", "*"]

# What each number may be beside "x" and the like: "" stands for a default in some places.
BOUNDS = {
    "now_ms": (0, 4_102_444_800_000),
    "window_ms": (1, 3_155_760_000_000),
    "keep_ms": (0, 3_155_760_000_000),
    "dead_keep_ms": (0, 3_155_760_000_000),
    "keep_count": (0, 2**53 - 1),
    "keep_bytes": (0, 2**53 - 1),
    "dead_keep_count": (0, 2**53 - 1),
    "lease_ms": (0, 43_200_000),
    "limit": (1, 1_000),
    "before_ms": (0, 2**53 - 1),
    "after_score": (0, 2**53 - 1),
    "claim_count": (0, 2**53 - 1),
    "settle_ms": (0, 3_155_760_000_000),
    "asks_max": (1, 2**53 - 1),
    "first_ms": (0, 3_155_760_000_000),
    "most_ms": (0, 3_155_760_000_000),
    "upto": (0, 2**53 - 1),
    "created_before": (0, 2**53 - 1),
    "place": (1, 2**53 - 1),
}
MAY_BE_EMPTY = ("after_score", "claim_count", "upto", "created_before")
# Where a command keeps to others.
BOUNDS_OF = {
    ("outbox/purge", "limit"): (1, 250),
    ("idempotency/purge", "limit"): (1, 250),
    ("gate/expire", "limit"): (1, 250),
    ("gate/ask", "lease_ms"): (1, 43_200_000),
    ("gate/complete", "keep_ms"): (1, 3_155_760_000_000),
}
TEXTS = {
    *("after", "after_id", "after_route", "hint", "prefix", "statuses", "routes", "source"),
    *("collection", "list", "event"),
}
# Texts in most places, and bounds of the sequence in this one.
NUMBERS = {("ledger/events", "after"), ("ledger/events", "before")}

GOOD: dict[str, list[Item]] = {
    "outbox/enqueue": [row("n1"), row("n2", dedupe="d f")],
    "outbox/claim": [(B, 1, "b"), ("c" * 22, 1, "c")],
    "outbox/ack": [("m1", A), ("m2", A)],
    "outbox/nack": [("m1", A, 50, 0, '"x"'), ("m2", A, 50, 0, '"x"')],
    "outbox/extend": [("m1", A, 2_000), ("m2", A, 2_000)],
    "outbox/release": [("m1", A), ("m2", A)],
    "outbox/cancel": [("m5",), ("m6",)],
    "outbox/redrive": [("m3",), ("m4",)],
    "outbox/resolve": [("p1", "sent", '"x"'), ("p2", "redrive", '"x"')],
    "outbox/get": [("m1",), ("m2",)],
    "outbox/list": [],
    "outbox/counts": [],
    "outbox/purge": [],
    "lease/acquire": [("n2", B, 10, "b"), ("n3", B, 10, "b")],
    "lease/extend": [("n1", A, 2_000), ("n0", A, 2_000)],
    "lease/release": [("n1", A), ("n0", A)],
    "lease/get": [("n1",), ("n0",)],
    "lease/list": [],
    "idempotency/reserve": [
        ("r2", B, "f", 20, 100, "reclaim", "{}"),
        ("r3", B, "f", 20, 100, "park", "{}"),
    ],
    "idempotency/complete": [("r0", A, 1_000, "{}"), ("r1", A, 1_000, "{}")],
    "idempotency/release": [("r0", A, ""), ("r1", A, "f")],
    "idempotency/get": [("r0",), ("r1",)],
    "idempotency/list": [],
    "idempotency/purge": [],
    "gate/prepare": [intent("g5", B), intent("g6", B, on_expiry="reclaim", run="r")],
    "gate/complete": [("g0", A, "succeeded", "{}"), ("g1", A, "failed", "{}")],
    "gate/extend": [("g0", A, 2_000), ("g1", A, 2_000)],
    "gate/expire": [],
    "gate/ask": [("g2", C), ("g3", C)],
    "gate/answer": [("g4", B, 2, "applied", "{}"), ("g7", B, 2, "absent", "{}")],
    "gate/resolve": [("g2", 1, "sent", "{}"), ("g3", 1, "not_sent", "{}")],
    "gate/open": [("d" * 22, "{}"), ("e" * 22, "{}")],
    "gate/get": [("g0",), ("g1",)],
    "gate/list": [],
    "gate/run": [],
    "ledger/put": [record("effects/e1", B), record("effects/e9", B)],
    "ledger/get": [("record", "effects/e1"), ("guard", "~")],
    "ledger/commit": [intent_change("g9"), change("effects/e1", 1)],
    "ledger/page": [],
    "ledger/append": [("v2", "", "{}"), ("v3", 9, "{}")],
    "ledger/events": [],
    "ledger/compact": [("v0",), ("v1",)],
    "tenant/barrier": [],
    "tenant/touch": [("o.w",), ("o.x",)],
}
WORDS_OF_NOTHING = {
    *("lost_claim", "lost", "missing", "none", "not_pending", "not_dead", "not_unknown"),
    *("busy", "free", "taken", "kept", "skipped", "wait", "changed", "conflict", "known"),
}


@pytest.fixture
def tenant(tenant: Tenant) -> Tenant:
    """Something for every command: m1, m2 claimed; m3, m4 dead; m5, m6 pending; p1, p2 unknown;
    g0, g1 granted to A; g2, g3 unknown; g4, g7 asked about by B."""
    tenant.enqueue("m1", "m2", "m3", "m4", row("p1", on_expiry="park"), row("p2", on_expiry="park"))
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/nack", *((id, A, "", 1, '"x"') for id in ("m3", "m4")), now_ms=11)
    tenant.run("outbox/extend", ("m1", A, 1_000), ("m2", A, 1_000), now_ms=11)
    tenant.claim(B[:-1] + "x", now_ms=20)
    tenant.enqueue("m5", "m6")
    tenant.run("lease/acquire", ("n0", A, 1_000, "a"), ("n1", A, 1_000, "a"), now_ms=10)
    items = [(id, A, "f", "", "", "reclaim", "{}") for id in ("r0", "r1")]
    tenant.run("idempotency/reserve", *items, now_ms=10)
    tenant.prepare(*(intent(id, lease_ms=1_000) for id in ("g0", "g1")))
    tenant.prepare(*(intent(id, lease_ms=1) for id in ("g2", "g3", "g4", "g7")))
    tenant.run("gate/ask", ("g4", B), ("g7", B), now_ms=16)
    tenant.run("ledger/put", record("effects/e1"), now_ms=10)
    tenant.run("ledger/append", ("v0", "", "{}"), ("v1", "", "{}"), now_ms=10)
    return tenant


def good_arguments(name: str) -> dict[str, Field]:
    given = {word: DEFAULTS[word] for word in read_scripts()[name].arguments if word in DEFAULTS}
    more: dict[str, dict[str, Field]] = {
        "outbox/purge": {"noun": "done"},
        "gate/run": {"run": "r"},
        "ledger/commit": {"commit": C},
        "ledger/page": {"collection": "effects", "list": "effects"},
        "ledger/compact": {"marker": "m", "place": 2, "token": C, "event": "{}"},
    }
    return given | {"now_ms": 21} | more.get(name, {})


def bad_values(name: str, word: str) -> list[str]:
    """What a fixed argument must not be."""
    if word in TEXTS and (name, word) not in NUMBERS:
        return []
    if word == "marker":
        return [""]
    if (name, word) in NUMBERS:
        return [*NOT_NUMBERS, "-0"]
    if word == "route":
        return NOT_ROUTES
    if word in ("repeated", "unfinished", "newest", "active", "tail"):
        return NOT_FLAGS
    if word in ("noun", "mark"):
        return NOT_WORDS
    if word in ("known", "fresh", "commit", "token"):
        return [value for value in NOT_TOKENS if value or word != "known"]
    if word == "run":
        return NOT_RUNS
    least, most = BOUNDS_OF.get((name, word), BOUNDS[word])
    empty = [] if word in (*MAY_BE_EMPTY, "now_ms") else [""]
    below = [str(least - 1)] if least else []
    return [*NOT_NUMBERS, *empty, *below, str(most + 1)]


ARGUMENTS = [
    (name, word)
    for name in GOOD
    for word in read_scripts()[name].arguments
    if word not in TEXTS or (name, word) in NUMBERS
]

# Fields of items that a script refuses, by the command's header.
FIELDS: dict[str, dict[str, list[str]]] = {
    "outbox/enqueue": {
        "id": NOT_IDS,
        "available_at": [*NOT_NUMBERS, ""],
        "dedupe": ["d", "d ", " f", "d f g", "d\0", "\n", "d  f"],
    },
    "outbox/claim": {"claim_id": NOT_TOKENS, "limit": [*NOT_NUMBERS, "", "1001"]},
    "outbox/nack": {
        "retry_at": NOT_NUMBERS,
        "permanent": NOT_FLAGS,
        "error": ['"x\n"', "\n"],
    },
    "outbox/extend": {"lease_ms": [*NOT_NUMBERS, "", "0", "43200001"]},
    "outbox/resolve": {
        "verdict": ["", "send", "SENT", "sent ", "sent\0", "pending"],
        "note": ['"x\n"', "\n"],
    },
    "lease/acquire": {"token": NOT_TOKENS, "ttl_ms": [*NOT_NUMBERS, "", "0", "43200001"]},
    "lease/extend": {"ttl_ms": [*NOT_NUMBERS, "", "0", "43200001"]},
    "idempotency/reserve": {
        "token": NOT_TOKENS,
        "fingerprint": ["", " ", "f g", "f\n", "f\0", "é"],
        "lease_ms": [*NOT_NUMBERS, "0", "43200001"],
        "expires_at": [*NOT_NUMBERS, "0"],
        "on_expiry": ["", "Park", "park ", "park\0", "none"],
        "reservation": ["{}\n", "\n"],
    },
    "idempotency/complete": {"keep_ms": [*NOT_NUMBERS, "", "0", "3155760000001"]},
    "gate/prepare": {
        "token": NOT_TOKENS,
        "key_digest": NOT_TOKENS,
        "arguments_digest": NOT_TOKENS,
        "lease_ms": [*NOT_NUMBERS, "", "0", "43200001"],
        "on_expiry": ["", "Park", "park ", "park\0", "none"],
        "run": NOT_RUNS,
    },
    "gate/complete": {
        "token": NOT_TOKENS[1:],  # "" is nobody's
        "result": ["", "Failed", "failed ", "failed\0", "sent", "unknown"],
        "note": NOT_NOTES,
    },
    "gate/extend": {"lease_ms": [*NOT_NUMBERS, "", "0", "43200001"]},
    "gate/ask": {"token": NOT_TOKENS},
    "gate/answer": {
        "revision": [*NOT_NUMBERS, ""],
        "verdict": ["", "Absent", "absent ", "absent\0", "sent", "left"],
        "note": NOT_NOTES,
    },
    "gate/resolve": {
        "revision": [*NOT_NUMBERS, ""],
        "verdict": ["", "Sent", "sent ", "sent\0", "succeeded", "cancelled"],
        "note": NOT_NOTES,
    },
    "gate/open": {"lost": NOT_TOKENS, "note": ["{}\n", "\n"]},
    "ledger/put": {
        "name": ["", "effects", "effects/", "/e1", "effects/e 1", "effects/e1\n", "effects/é"],
        "token": NOT_TOKENS,
        "words": [
            "",
            "1 open ~ 1",
            "1 open ~ 2 ~",
            "-1 open ~ 1 ~",
            "1 open ~ 1 ~\n",
            "1 o n ~ 1 ~",
        ],
        "places": [
            "effects|0000000000000001|e9\n",
            "effects|1|e9",
            "x",
            "effects|0000000000000001|e1",
        ],
    },
    "ledger/get": {"kind": ["", "Record", "guard ", "record\0"]},
    "ledger/commit": {
        "kind": ["", "Put", "put ", "put\0", "gate"],
        "name": ["", "effects", "effects/", "/e1", "effects/e 1", "effects/e1\n", "effects/é"],
        "revision": [*NOT_NUMBERS, "", "~"],
        "words": [
            "",
            "1 open ~ 1",
            "1 open ~ 2 ~",
            "-1 open ~ 1 ~",
            "1 open ~ 1 ~\n",
            "1 o n ~ 1 ~",
        ],
        "places": [
            "effects|0000000000000001|e1\n",
            "effects|1|e1",
            "x",
            "effects|0000000000000001|e2",
        ],
    },
    "ledger/append": {"event_id": [""], "seq": [*NOT_NUMBERS, "0"]},
}
REFUSED_FIELDS = [(name, field) for name, fields in FIELDS.items() for field in fields]

# Fields of items that are only compared with what is stored: nothing equals these.
COMPARED = [
    (name, field)
    for name in GOOD
    for field in read_scripts()[name].item
    if field in ("id", "token", "name", "record_id")
    and field not in FIELDS.get(name, {})
    and name not in ("lease/acquire", "idempotency/reserve", "gate/prepare", "ledger/get")
]
NOT_STORED = ["", " ", "m1 m2", "m1\n", "m1\0", "\0", "\r\n", "é\udcff", "x" * 300]


def spoilt(name: str, field: str, value: str) -> list[Item]:
    """The good items with one field of the last one changed."""
    *others, last = GOOD[name]
    at = read_scripts()[name].item.index(field)
    return [*others, (*last[:at], value, *last[at + 1 :])]


def refusals(
    tenant: Tenant, name: str, calls: dict[str, tuple[list[Item], dict[str, Field]]]
) -> dict[str, str]:
    """The first word of each call's error, or its whole answer; together they wrote nothing."""
    before, found = tenant.dump(), {}
    for value, (items, arguments) in calls.items():
        try:
            found[value] = f"{value!r}: {tenant.run(name, *items, **arguments)}"
        except redis.ResponseError as error:
            found[value] = str(error).split()[0]
    assert tenant.dump() == before
    return found


def test_every_command_has_a_good_call() -> None:
    """No command is left out here."""
    assert GOOD.keys() == read_scripts().keys()


@pytest.mark.parametrize("name", GOOD)
def test_good_call_is_good(tenant: Tenant, name: str) -> None:
    """The calls that the others spoil do what they say, so that a refusal means something."""
    before = tenant.dump()

    reply = tenant.run(name, *GOOD[name], **good_arguments(name))

    answers = reply[1:][-len(GOOD[name]) or 99 :]
    words = {item if isinstance(item, str) else item[0] for item in answers}
    assert not words & WORDS_OF_NOTHING
    leaves_nothing = read_scripts()[name].reads_only or name == "tenant/barrier"
    assert (tenant.dump() == before) == leaves_nothing or name.endswith("/purge")


@pytest.mark.parametrize(("name", "word"), ARGUMENTS)
def test_bad_argument_is_refused(tenant: Tenant, name: str, word: str) -> None:
    """A fixed argument that is malformed or out of bounds refuses the whole call."""
    good = good_arguments(name)
    calls = {value: (GOOD[name], good | {word: value}) for value in bad_values(name, word)}

    assert calls
    assert set(refusals(tenant, name, calls).values()) == {"LK_ARGUMENT"}


@pytest.mark.parametrize(("name", "field"), REFUSED_FIELDS)
def test_bad_item_is_refused(tenant: Tenant, name: str, field: str) -> None:
    """A field that would be stored or counted with refuses the whole call, good items included."""
    good = good_arguments(name)
    calls = {value: (spoilt(name, field, value), good) for value in FIELDS[name][field]}

    assert set(refusals(tenant, name, calls).values()) == {"LK_ARGUMENT"}


@pytest.mark.parametrize(("name", "field"), COMPARED)
def test_bad_item_equals_nothing(tenant: Tenant, name: str, field: str) -> None:
    """A field that is only compared refuses its own item, and writes nothing."""
    values = NOT_TOKENS if field == "token" else NOT_STORED
    if name == "idempotency/release" and field == "token":
        values = values[1:]  # an empty token is not given at all: the fingerprint decides
    before = tenant.dump()

    items = [spoilt(name, field, value)[-1] for value in values]
    reply = tenant.run(name, *items, **good_arguments(name))

    words = {item if isinstance(item, str) else item[0] for item in reply[-len(items) :]}
    assert words <= WORDS_OF_NOTHING
    assert tenant.dump() == before


@pytest.mark.parametrize("name", [name for name in GOOD if read_scripts()[name].item])
def test_wrong_number_of_items_is_refused(tenant: Tenant, name: str) -> None:
    """A call has 1 to 1 000 whole items; an item of one field cannot be broken."""
    first, *_ = GOOD[name]
    good = good_arguments(name)
    calls = {"none": ([], good), "1001": ([first] * 1_001, good)}
    if len(first) > 1:
        calls["field less"] = ([first, first[:-1]], good)
        calls["field more"] = ([first, (*first, "x")], good)

    assert set(refusals(tenant, name, calls).values()) == {"LK_ARGUMENT"}


@pytest.mark.parametrize("name", GOOD)
def test_missing_arguments_are_an_error(tenant: Tenant, name: str) -> None:
    """A call that is cut off after its keys, or after its first argument, writes nothing."""
    script = read_scripts()[name]
    keys = [tenant.key(script, word) for word in script.keys]
    before = tenant.dump()

    for arguments in ([], ["21"]):
        if arguments and len(script.arguments) == 1 and not script.item:
            continue
        with pytest.raises(redis.ResponseError):
            tenant.send(script, (len(keys), *keys, *arguments), ())
    assert tenant.dump() == before


@pytest.mark.parametrize("name", ["outbox/enqueue"])
def test_1000_items_are_good(tenant: Tenant, name: str) -> None:
    """The largest call passes."""
    reply = tenant.run(name, *(row(f"x{i}") for i in range(1_000)), now_ms=21)

    assert reply[1:] == ["created"] * 1_000


def test_longest_id_is_good(tenant: Tenant) -> None:
    """An id of 200 bytes passes."""
    item = ("x" * 200, draft(), 0, "")

    assert tenant.run("outbox/enqueue", item, now_ms=21) == [21, "created"]


@pytest.mark.parametrize("now_ms", [0, "0", "007", 4_102_444_800_000])
def test_any_instant_up_to_2100_is_good(tenant: Tenant, now_ms: str | int) -> None:
    """The bounds of now_ms themselves pass."""
    assert tenant.run("outbox/get", ("m1",), now_ms=now_ms)[0] == int(now_ms)
