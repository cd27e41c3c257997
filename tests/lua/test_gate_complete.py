"""gate/complete: what became of what was granted, by the sender's word or by an event."""

from __future__ import annotations

from typing import Any

import pytest
from lua.commands import A, B, C, Field, Item, Tenant, intent, intent_line

NOTE = '{"result":1}'


def complete(tenant: Tenant, *items: Item, now_ms: Field = 30, **arguments: Field) -> list[Any]:
    return tenant.run("gate/complete", *items, now_ms=now_ms, **arguments)


def bring(tenant: Tenant, status: str, on_expiry: str = "park") -> str:
    """i1 to a status, granted to A at 10 until 20, before 30; gives its state line."""
    tenant.prepare(intent("i1", on_expiry=on_expiry, lease_ms=90 if status == "claimed" else 10))
    if status in ("sent", "failed", "cancelled"):
        result = {"sent": "succeeded", "failed": "failed", "cancelled": "blocked"}[status]
        complete(tenant, ("i1", A, result, "{}"), now_ms=15)
    elif status == "left":
        complete(tenant, ("i1", A, "left", "{}"), now_ms=15)
    elif status == "parked":
        tenant.run("gate/expire", now_ms=20)
    elif status in ("asked", "dead_lettered", "absent", "applied"):
        tenant.run("gate/ask", ("i1", C), now_ms=25)
        if status != "asked":
            verdict = status.replace("dead_lettered", "undecidable")
            tenant.run("gate/answer", ("i1", C, 2, verdict, "{}"), now_ms=26, asks_max=1)
    elif status in ("said sent", "said failed", "said not_sent"):
        tenant.run("gate/resolve", ("i1", 1, status.removeprefix("said "), "{}"), now_ms=25)
    return tenant.intent("i1")


# --- by the sender --------------------------------------------------------------------------------


@pytest.mark.parametrize("on_expiry", ["park", "reclaim"])
@pytest.mark.parametrize(
    ("result", "status"), [("succeeded", "sent"), ("failed", "failed"), ("blocked", "cancelled")]
)
def test_complete_records_the_senders_word(
    tenant: Tenant, result: str, status: str, on_expiry: str
) -> None:
    """The intent gets the status of the result, under the fence of the grant, with the note."""
    tenant.prepare(intent("i1", on_expiry=on_expiry, run="r"))
    before = tenant.dump()

    assert complete(tenant, ("i1", A, result, NOTE), now_ms=15) == [15, ["recorded", status]]

    line = intent_line(status, result, updated_at=15, revision=2, on_expiry=on_expiry, run="r")
    changes: dict[str, Any] = {
        "gate:facts": {"i1": f"15 {result} 10000 1 {NOTE}"},
        "gate:runs": {"r:0000000000000010:i1": None, "r:0000000000000015:i1": 0},
        "gate:state": {"i1": line},
        "gate:updated": {"i1": 15},
    }
    if on_expiry == "park":
        changes["gate:expiring"] = {"i1": None}
    if status != "failed":
        changes["gate:done"] = {"i1": 15}
    assert tenant.changes(before) == changes


@pytest.mark.parametrize(("now_ms", "lease_end"), [(15, 15), (25, 20)])
def test_left_makes_unknown_what_parks(tenant: Tenant, now_ms: int, lease_end: int) -> None:
    """A sender that leaves without a word ends its lease; the destination may be asked since."""
    tenant.prepare("i1")
    before = tenant.dump()

    assert complete(tenant, ("i1", A, "left", NOTE), now_ms=now_ms)[1] == ["recorded", "unknown"]

    changed = {"lease_end": lease_end, "ask_at": lease_end, "updated_at": now_ms}
    assert tenant.changes(before) == {
        "gate:expiring": {"i1": None},
        "gate:facts": {"i1": f"{now_ms} left 10000 1 {NOTE}"},
        "gate:state": {"i1": intent_line("unknown", "left", revision=2, **changed)},
        "gate:unknown": {"i1": lease_end},
        "gate:updated": {"i1": now_ms},
    }


@pytest.mark.parametrize(("now_ms", "lease_end"), [(15, 15), (25, 20)])
def test_left_frees_what_reclaims(tenant: Tenant, now_ms: int, lease_end: int) -> None:
    """Where the next sender may try, it may at once."""
    tenant.prepare(intent("i1", on_expiry="reclaim"))

    assert complete(tenant, ("i1", A, "left", NOTE), now_ms=now_ms)[1] == ["recorded", "claimed"]

    changed = {"lease_end": lease_end, "updated_at": now_ms, "on_expiry": "reclaim"}
    assert tenant.intent("i1") == intent_line("claimed", "left", revision=2, **changed)
    assert tenant.prepare(intent("i1", B), now_ms=now_ms)[2][0] == "granted"


RESULTS = ("succeeded", "failed", "blocked", "left")
WANTED = {"succeeded": "sent", "failed": "failed", "blocked": "cancelled", "left": "unknown"}

# What a sender's word makes of an intent: what is written, "=" nothing but it is what is written
# already, "-" nothing because more is known.
RANKS = {
    "claimed": ("sent", "failed", "cancelled", "unknown"),
    "over": ("sent", "failed", "cancelled", "unknown"),
    "parked": ("sent", "failed", "cancelled", "="),
    "left": ("sent", "failed", "cancelled", "="),
    "asked": ("sent", "failed", "cancelled", "="),
    "dead_lettered": ("sent", "failed", "cancelled", "-"),
    "cancelled": ("sent", "failed", "=", "-"),
    "absent": ("sent", "-", "=", "-"),
    "said not_sent": ("sent", "-", "=", "-"),
    "failed": ("sent", "=", "-", "-"),
    "said failed": ("sent", "=", "-", "-"),
    "sent": ("=", "-", "-", "-"),
    "applied": ("=", "-", "-", "-"),
    "said sent": ("=", "-", "-", "-"),
}
READS_AS = {
    **dict.fromkeys(("over", "parked", "left", "asked"), "unknown"),
    **dict.fromkeys(("absent", "said not_sent"), "cancelled"),
    **{"said failed": "failed", "applied": "sent", "said sent": "sent"},
}


@pytest.mark.parametrize(
    ("status", "result", "effect"),
    [
        (status, result, effect)
        for status, effects in RANKS.items()
        for result, effect in zip(RESULTS, effects, strict=True)
    ],
)
def test_the_weightiest_word_of_a_sender_counts(
    tenant: Tenant, status: str, result: str, effect: str
) -> None:
    """sent beats failed beats cancelled beats unknown, whoever said the other, however late; but what
    a destination or an operator freed cannot fail any more, it can only turn out to be sent."""
    line = bring(tenant, status)
    facts = tenant.facts("i1")

    answer = complete(tenant, ("i1", A, result, NOTE))[1]

    read = READS_AS.get(status, status)
    if effect == "=":
        assert answer == ["recorded", read]
        assert (tenant.intent("i1"), tenant.facts("i1")) == (line, facts)
    elif effect == "-":
        assert answer == ["kept", read]
        assert tenant.intent("i1") == line
        assert tenant.facts("i1") == [*facts, f"30 {result} 10000 0 {NOTE}"]
    else:
        assert answer == ["recorded", effect]
        assert tenant.intent("i1").split(" ")[:2] == [effect, result]
        revision = int(tenant.intent("i1").split(" ")[6])
        assert revision == int(line.split(" ")[6]) + 1
        assert tenant.facts("i1") == [*facts, f"30 {result} 10000 1 {NOTE}"]


@pytest.mark.parametrize("repeated", [0, 1])
@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("on_expiry", ["park", "reclaim"])
def test_a_sender_may_say_it_twice(
    tenant: Tenant, result: str, repeated: int, on_expiry: str
) -> None:
    """The same word again has the same answer, and changes nothing, whatever its note."""
    tenant.prepare(intent("i1", on_expiry=on_expiry))
    first = complete(tenant, ("i1", A, result, NOTE), now_ms=15)
    before = tenant.dump()

    for note in (NOTE, "{}"):
        item = ("i1", A, result, note)
        assert complete(tenant, item, now_ms=16, repeated=repeated)[1:] == first[1:]
    assert tenant.dump() == before


def test_a_repeated_word_does_not_overrule_what_was_said_since(tenant: Tenant) -> None:
    """A repeat finds its own fact: it is neither applied again nor noted; a new word is both."""
    tenant.prepare("i1")
    items = (("i1", A, "blocked", "1"), ("i1", A, "succeeded", "2"), ("i1", "", "failed", "3"))
    complete(tenant, *items, now_ms=15)
    before = tenant.dump()

    reply = complete(tenant, *items[:2], now_ms=16, repeated=1)
    assert reply == [16, ["kept", "failed"], ["kept", "failed"]]
    assert tenant.dump() == before

    assert complete(tenant, items[1], now_ms=17)[1] == ["recorded", "sent"]
    assert tenant.facts("i1")[3:] == ["17 succeeded 10000 1 2"]


def test_a_repeated_word_is_nobody_elses(tenant: Tenant) -> None:
    """What an event said does not stand for the same word of a sender that was overtaken."""
    tenant.prepare("i1")
    complete(tenant, ("i1", "", "failed", NOTE), now_ms=15)

    assert complete(tenant, ("i1", B, "failed", NOTE), now_ms=16, repeated=1)[1][0] == "lost"
    assert tenant.facts("i1")[1:] == [f"16 failed 0 0 {NOTE}"]


def test_a_repeated_word_is_new_after_a_newer_grant(tenant: Tenant) -> None:
    """The same word under another fence is another word."""
    tenant.prepare("i1")
    complete(tenant, ("i1", A, "blocked", NOTE), now_ms=15)
    tenant.prepare(intent("i1", B), now_ms=16)

    reply = complete(tenant, ("i1", B, "blocked", NOTE), now_ms=17, repeated=1)

    assert reply[1] == ["recorded", "cancelled"]
    assert tenant.facts("i1")[1:] == [f"17 blocked 16000 1 {NOTE}"]


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("status", ["claimed", "parked", "cancelled", "sent"])
def test_a_word_by_another_token_is_lost(tenant: Tenant, status: str, result: str) -> None:
    """Whoever has not the last grant changes nothing; what it said is kept beside."""
    line = bring(tenant, status)
    facts = tenant.facts("i1")

    answer = complete(tenant, ("i1", B, result, NOTE))[1]

    assert answer == ["lost", READS_AS.get(status, status)]
    assert tenant.intent("i1") == line
    assert tenant.facts("i1") == [*facts, f"30 {result} 0 0 {NOTE}"]


def test_a_sender_that_was_overtaken_is_lost(tenant: Tenant) -> None:
    """After a newer grant the word of the older one counts for nothing, and the newer one's does."""
    tenant.prepare(intent("i1", on_expiry="reclaim"))
    tenant.prepare(intent("i1", B, on_expiry="reclaim"), now_ms=20)

    items = (("i1", A, "succeeded", "1"), ("i1", B, "failed", "2"), ("i1", A, "succeeded", "3"))
    assert complete(tenant, *items) == [
        *(30, ["lost", "claimed"], ["recorded", "failed"], ["lost", "failed"])
    ]
    assert tenant.facts("i1") == ["30 succeeded 0 0 1", "30 failed 20000 1 2", "30 succeeded 0 0 3"]


# --- by an event without a receipt ----------------------------------------------------------------


@pytest.mark.parametrize("status", RANKS)
@pytest.mark.parametrize("result", ["succeeded", "failed"])
def test_success_and_failure_of_anybody_end_an_intent(
    tenant: Tenant, status: str, result: str
) -> None:
    """An event without a receipt overwrites every status, for neither leads to a new grant."""
    line = bring(tenant, status)
    facts = tenant.facts("i1")

    assert complete(tenant, ("i1", "", result, NOTE))[1] == ["recorded", WANTED[result]]

    words = tenant.intent("i1").split(" ")
    assert words[:3] == [WANTED[result], result, A]
    assert int(words[6]) == int(line.split(" ")[6]) + 1
    assert tenant.facts("i1") == [*facts, f"30 {result} 0 1 {NOTE}"]
    assert tenant.prepare(intent("i1", B), now_ms=99)[2][:2] == ["taken", WANTED[result]]


@pytest.mark.parametrize("now_ms", [15, 20, 30])
def test_blocked_by_anybody_cancels_a_first_attempt(tenant: Tenant, now_ms: int) -> None:
    """It cannot have been another attempt's, and the lease is not asked."""
    tenant.prepare(intent("i1", on_expiry="reclaim"))

    answer = complete(tenant, ("i1", "", "blocked", NOTE), now_ms=now_ms)[1]

    assert answer == ["recorded", "cancelled"]
    line = intent_line("cancelled", "blocked", updated_at=now_ms, revision=2, on_expiry="reclaim")
    assert tenant.intent("i1") == line
    assert tenant.facts("i1") == [f"{now_ms} blocked 0 1 {NOTE}"]


@pytest.mark.parametrize("status", [status for status in RANKS if status != "claimed"])
@pytest.mark.parametrize("on_expiry", ["park", "reclaim"])
def test_blocked_by_anybody_ends_nothing_else(tenant: Tenant, status: str, on_expiry: str) -> None:
    """What is not under way is not cancelled by it; the word is kept beside."""
    if on_expiry == "reclaim" and status not in ("left", "cancelled", "failed", "sent"):
        on_expiry = "park"  # only what parks gets there
    line = bring(tenant, status, on_expiry)
    facts = tenant.facts("i1")

    answer, read = complete(tenant, ("i1", "", "blocked", NOTE))[1]

    assert answer == "skipped"
    assert read == ("claimed" if (status, on_expiry) == ("left", "reclaim") else
                    READS_AS.get(status, status))  # fmt: skip
    assert tenant.intent("i1") == line
    assert tenant.facts("i1") == [*facts, f"30 blocked 0 0 {NOTE}"]


def test_blocked_by_anybody_does_not_cancel_what_parks(tenant: Tenant) -> None:
    """Only its sender can say that a call was not made where nobody else is let in."""
    line = bring(tenant, "claimed")

    assert complete(tenant, ("i1", "", "blocked", NOTE))[1] == ["skipped", "claimed"]
    assert tenant.intent("i1") == line


@pytest.mark.parametrize("given_back", [True, False])
def test_blocked_by_anybody_does_not_cancel_a_second_attempt(
    tenant: Tenant, given_back: bool
) -> None:
    """It may be a late word about the first one, whose end the second must not become."""
    tenant.prepare(intent("i1", on_expiry="reclaim"))
    if given_back:
        complete(tenant, ("i1", A, "blocked", "{}"), now_ms=15)
    tenant.prepare(intent("i1", B, on_expiry="reclaim"), now_ms=25)
    line = tenant.intent("i1")

    assert complete(tenant, ("i1", "", "blocked", NOTE))[1] == ["skipped", "claimed"]
    assert tenant.intent("i1") == line


@pytest.mark.parametrize("result", ["succeeded", "failed"])
def test_repeated_event_is_recorded_once(tenant: Tenant, result: str) -> None:
    """A repeat finds its own fact and changes nothing; without the word it is an event of its own."""
    tenant.prepare("i1")
    complete(tenant, ("i1", "", result, NOTE), now_ms=15)
    before = tenant.dump()

    answer = complete(tenant, ("i1", "", result, NOTE), now_ms=16, repeated=1)
    assert answer == [16, ["recorded", WANTED[result]]]
    assert tenant.dump() == before

    complete(tenant, ("i1", "", result, "2"), now_ms=17, repeated=1)
    complete(tenant, ("i1", "", result, NOTE), now_ms=18)
    assert tenant.facts("i1") == [
        f"15 {result} 0 1 {NOTE}",
        f"17 {result} 0 1 2",
        f"18 {result} 0 1 {NOTE}",
    ]
    assert tenant.intent("i1").split(" ")[6] == "4"


def test_repeated_blocked_event_is_recorded_once(tenant: Tenant) -> None:
    """What was cancelled by it is not skipped the second time; other words about it are."""
    tenant.prepare(intent("i1", on_expiry="reclaim"))
    item = ("i1", "", "blocked", NOTE)
    complete(tenant, item, now_ms=15)
    before = tenant.dump()

    assert complete(tenant, item, now_ms=16, repeated=1)[1] == ["recorded", "cancelled"]
    assert tenant.dump() == before
    assert complete(tenant, item, now_ms=17)[1] == ["skipped", "cancelled"]
    assert complete(tenant, ("i1", "", "blocked", "2"), now_ms=17, repeated=1)[1][0] == "skipped"


def test_repeated_event_leaves_a_later_word_alone(tenant: Tenant) -> None:
    """A late repeat of a failure does not overwrite the success that was recorded since."""
    tenant.prepare("i1")
    complete(tenant, ("i1", "", "failed", NOTE), now_ms=15)
    complete(tenant, ("i1", "", "succeeded", NOTE), now_ms=16)
    before = tenant.dump()

    answer = complete(tenant, ("i1", "", "failed", NOTE), now_ms=17, repeated=1)

    assert answer == [17, ["recorded", "sent"]]
    assert tenant.dump() == before


def test_repeated_event_was_applied_only_if_its_fact_says_so(tenant: Tenant) -> None:
    """A fact of a sender, or one that counted for nothing, is not the event's."""
    tenant.prepare("i1")
    items = (("i1", B, "failed", NOTE), ("i1", A, "failed", NOTE))
    complete(tenant, *items, now_ms=15)

    complete(tenant, ("i1", "", "failed", NOTE), now_ms=16, repeated=1)

    assert tenant.facts("i1")[-1] == f"16 failed 0 1 {NOTE}"


def test_only_a_sender_can_leave(tenant: Tenant) -> None:
    """An event without a receipt never says that nobody knows."""
    tenant.prepare("i1")

    item = ("i1", "", "left", "{}")
    assert tenant.refusal("gate/complete", item, now_ms=15) == "LK_ARGUMENT result"


def test_an_event_of_an_unknown_intent_is_missing(tenant: Tenant) -> None:
    """Nothing is made of what was never granted; nor of what cannot be read."""
    tenant.is_damaged = True
    tenant.raw.hset(tenant.keys.gate_state, "i2", "x")
    before = tenant.dump()

    items = [(id, token, "succeeded", "{}") for id in ("i1", "i2") for token in ("", A)]

    assert complete(tenant, *items) == [30, *["missing"] * 4]
    assert tenant.dump() == before


# --- several at once ------------------------------------------------------------------------------


def test_items_are_completed_one_after_the_other(tenant: Tenant) -> None:
    """Several words of one call count in their order, and one refused item harms no other."""
    tenant.prepare("i1", intent("i2", B), "i3")

    reply = complete(
        tenant,
        *(("i1", A, "left", "1"), ("i2", A, "succeeded", "2"), ("i1", A, "succeeded", "3")),
        *(("i1", A, "failed", "4"), ("i3", A, "blocked", "5"), ("i9", A, "failed", "6")),
        now_ms=15,
    )

    assert reply == [
        *(15, ["recorded", "unknown"], ["lost", "claimed"], ["recorded", "sent"]),
        *(["kept", "sent"], ["recorded", "cancelled"], "missing"),
    ]
    assert tenant.facts("i1") == [
        *("15 left 10000 1 1", "15 succeeded 10000 1 3", "15 failed 10000 0 4")
    ]
    state = tenant.dump()
    assert state["gate:done"] == {"i1": 15, "i3": 15}
    assert "gate:unknown" not in state


# --- what is kept beside --------------------------------------------------------------------------


def test_a_fact_keeps_its_bytes(tenant: Tenant) -> None:
    """A note is bytes without a newline: what is not UTF-8 comes back as it was."""
    tenant.prepare("i1")

    complete(tenant, ("i1", A, "succeeded", "\0 %d\r{é\udcff"), now_ms=15)

    assert tenant.facts("i1") == ["15 succeeded 10000 1 \0 %d\r{é\udcff"]


def test_a_note_may_be_64_kib(tenant: Tenant) -> None:
    """One byte more refuses the call."""
    tenant.prepare("i1")

    long = "x" * 65_537
    assert tenant.refusal("gate/complete", ("i1", A, "failed", long), now_ms=15) == (
        "LK_ARGUMENT note"
    )
    assert complete(tenant, ("i1", A, "failed", long[1:]), now_ms=15)[1] == ["recorded", "failed"]


def test_what_counted_for_nothing_is_noted_once(tenant: Tenant) -> None:
    """The same lost word again, however often and however late, is no second fact."""
    tenant.prepare("i1")
    for now_ms in (15, 16):
        complete(tenant, *[("i1", B, "failed", NOTE)] * 2, now_ms=now_ms)
    complete(tenant, ("i1", C, "failed", NOTE), ("i1", B, "failed", NOTE[:-1]), now_ms=17)

    assert tenant.facts("i1") == [f"15 failed 0 0 {NOTE}", f"17 failed 0 0 {NOTE[:-1]}"]


def test_16_facts_are_kept(tenant: Tenant) -> None:
    """What counted for nothing stops at sixteen; what counted pushes the oldest out."""
    tenant.prepare("i1")
    complete(tenant, *(("i1", B, "failed", f"{i}") for i in range(15)), now_ms=15)
    assert len(tenant.facts("i1")) == 15

    complete(tenant, *(("i1", B, "failed", f"{i}") for i in range(15, 20)), now_ms=16)
    assert [fact.split(" ")[4] for fact in tenant.facts("i1")] == [f"{i}" for i in range(16)]

    complete(tenant, ("i1", A, "failed", "a"), ("i1", A, "succeeded", "b"), now_ms=17)
    noted = [fact.split(" ")[4] for fact in tenant.facts("i1")]
    assert noted == [*(f"{i}" for i in range(2, 16)), "a", "b"]


# --- forgetting -----------------------------------------------------------------------------------


def finish(tenant: Tenant, count: int, *, run: str = "r") -> None:
    """That many intents, sent or cancelled at 20, each in turn."""
    ids = [f"d{i:02}" for i in range(count)]
    tenant.prepare(*(intent(id, run=run) for id in ids))
    results = ("succeeded", "blocked")
    complete(tenant, *((id, A, results[i % 2], "{}") for i, id in enumerate(ids)), now_ms=20)


@pytest.mark.parametrize(("now_ms", "is_kept"), [(1_019, True), (1_020, False), (1_021, False)])
@pytest.mark.parametrize("run", ["r", "~"])
def test_complete_forgets_what_is_keep_ms_old(
    tenant: Tenant, now_ms: int, is_kept: bool, run: str
) -> None:
    """At keep_ms, to the millisecond, sent and cancelled intents go with all that is kept of them."""
    finish(tenant, 2, run=run)
    before = tenant.dump()

    assert complete(tenant, ("x", A, "failed", "{}"), now_ms=now_ms)[1] == "missing"

    if is_kept:
        assert tenant.dump() == before
    else:
        assert tenant.dump() == {"fence": "10000", "gate:dataset": "f" * 22}


def test_a_forgotten_key_is_a_new_one(tenant: Tenant) -> None:
    """After forgetting, the same key is granted as if it had never been, its digests included."""
    finish(tenant, 1)
    complete(tenant, ("x", A, "failed", "{}"), now_ms=1_020)

    reply = tenant.prepare(intent("d00", B, sent="y" * 22), now_ms=1_020)

    assert reply[2] == ["granted", "1020000", "1020", 1_030, 1, "1020"]


def test_failed_unknown_and_buried_intents_are_kept(tenant: Tenant) -> None:
    """Only what is sent or cancelled is forgotten."""
    tenant.prepare(*(intent(id) for id in ("i1", "i2", "i3", "i4")))
    items = (("i1", A, "failed", "{}"), ("i2", A, "left", "{}"))
    complete(tenant, *items, now_ms=11)
    tenant.run("gate/ask", ("i3", C), now_ms=30)
    tenant.run("gate/answer", ("i3", C, 2, "undecidable", "{}"), now_ms=30, asks_max=1)
    before = tenant.dump()

    complete(tenant, ("x", A, "failed", "{}"), now_ms=1_000_000)

    assert tenant.dump() == before


@pytest.mark.parametrize(("items", "gone"), [(1, 12), (2, 14), (3, 16)])
def test_complete_forgets_2n_plus_10(tenant: Tenant, items: int, gone: int) -> None:
    """The oldest go first, up to 2n + 10 a call of n items."""
    finish(tenant, 20)
    tenant.prepare(intent("d99"), now_ms=21)
    complete(tenant, ("d99", A, "succeeded", "{}"), now_ms=21)

    complete(tenant, *(("x", A, "failed", "{}") for _ in range(items)), now_ms=2_000)

    left = [*(f"d{i:02}" for i in range(gone, 20)), "d99"]
    assert list(tenant.dump()["gate:done"]) == left


def test_complete_forgets_250_at_most(tenant: Tenant) -> None:
    """Whatever the number of items."""
    ids = [f"d{i:03}" for i in range(300)]
    tenant.prepare(*ids)
    complete(tenant, *((id, A, "succeeded", "{}") for id in ids), now_ms=20)

    complete(tenant, *(("x", A, "failed", "{}") for _ in range(200)), now_ms=2_000)

    assert len(tenant.dump()["gate:done"]) == 50


@pytest.mark.parametrize("token", [A, B, ""])
@pytest.mark.parametrize("result", ["succeeded", "failed", "blocked"])
def test_complete_forgets_nothing_that_it_is_about(tenant: Tenant, token: str, result: str) -> None:
    """An intent whose time is over is still there for the word of this call; the next call forgets."""
    finish(tenant, 2)

    complete(tenant, ("d00", token, result, NOTE), now_ms=2_000)

    state = tenant.dump()
    assert set(state["gate:docs"]) == {"d00"}
    complete(tenant, ("x", A, "failed", "{}"), now_ms=4_000)
    left = {"d00"} if state["gate:state"]["d00"].startswith("failed") else set()
    assert tenant.dump().get("gate:docs", {}).keys() == left
    assert tenant.dump().get("gate:facts", {}).keys() == left


def test_a_damaged_intent_is_not_forgotten(tenant: Tenant) -> None:
    """Nobody can say that its key is free: it only leaves the list. What has no state line goes."""
    tenant.is_damaged = True
    finish(tenant, 2, run="~")
    tenant.raw.hset(tenant.keys.gate_state, "d00", "x")
    tenant.raw.hdel(tenant.keys.gate_state, "d01")

    complete(tenant, ("x", A, "failed", "{}"), now_ms=2_000)

    state = tenant.dump()
    assert state["gate:state"] == {"d00": "x"}
    assert state["gate:docs"].keys() == {"d00"}
    assert "gate:done" not in state


def test_only_what_is_over_is_forgotten(tenant: Tenant) -> None:
    """An entry among the finished ones that does not belong there leaves the list, and frees no key."""
    tenant.prepare(intent("live", A), intent("other", B))
    tenant.raw.zadd(tenant.keys.gate_done, {"live": 10, "nothing": 10})
    complete(tenant, ("other", B, "succeeded", "{}"), now_ms=5_000, keep_ms=1_000)

    assert tenant.intent("live")
    assert tenant.raw.zrange(tenant.keys.gate_done, 0, -1) == [b"other"]


def test_a_repeat_does_not_overrule_what_overruled_it(tenant: Tenant) -> None:
    """The sender's own word, an event that ended it otherwise, and the sender's repeat: nothing new."""
    tenant.prepare(intent("i1", A))
    complete(tenant, ("i1", A, "succeeded", "{}"), now_ms=11)
    complete(tenant, ("i1", "", "failed", "{}"), now_ms=12)
    before = tenant.dump()

    again = complete(tenant, ("i1", A, "succeeded", "{}"), now_ms=13, repeated=1)

    assert again == [13, ["kept", "failed"]]
    assert tenant.dump() == before


def test_the_facts_of_an_intent_are_bounded_in_bytes(tenant: Tenant) -> None:
    """The oldest go for what is applied; what is not is not noted any more."""
    tenant.prepare(intent("i1", A))
    long = '"' + "x" * 60_000 + '"'
    complete(tenant, ("i1", "", "failed", '"a"'), now_ms=11)
    complete(tenant, ("i1", "", "succeeded", long), now_ms=12)
    complete(tenant, ("i1", "", "failed", long), now_ms=13)
    assert [fact[:11] for fact in tenant.facts("i1")] == [
        "11 failed 0",
        "12 succeede",
        "13 failed 0",
    ]

    complete(tenant, ("i1", B, "succeeded", long), now_ms=14)
    assert len(tenant.facts("i1")) == 3

    complete(tenant, ("i1", "", "succeeded", long), now_ms=15)
    assert [fact[:2] for fact in tenant.facts("i1")] == ["13", "15"]


def test_two_facts_of_the_longest_kind_do_not_fit(tenant: Tenant) -> None:
    """What is said last is kept, whatever was there."""
    tenant.prepare(intent("i1", A))
    longest = '"' + "x" * 65_534 + '"'
    complete(tenant, ("i1", "", "failed", longest), now_ms=11)
    complete(tenant, ("i1", "", "succeeded", longest), now_ms=12)

    assert [fact[:12] for fact in tenant.facts("i1")] == ["12 succeeded"]
