"""ledger/commit: a set of changes lands whole, on what it was decided on, or not at all."""

from __future__ import annotations

import pytest
from lua.commands import (
    A,
    B,
    C,
    Item,
    Tenant,
    change,
    filed,
    intent,
    intent_change,
    intent_line,
    record,
    stands,
)

E1, E2, L1 = "effects/e1", "effects/e2", "dead_letters/l1"


def commit(tenant: Tenant, token: str, *items: Item, now_ms: int = 10) -> list[object]:
    return tenant.run("ledger/commit", *items, now_ms=now_ms, commit=token)


def test_records_are_written_with_their_places(tenant: Tenant) -> None:
    """A head of revision, commit and words; a line of places, each in the index; the JSON."""
    reply = commit(tenant, A, change(E1, run="r", doc='{"a":1}'), change(L1, status="ignored"))

    assert reply == [10, "committed"]
    words = filed(run="r")
    places = "effects|0000000000000001|e1 effects:r|0000000000000001|e1"
    assert tenant.dump() == {
        "ledger:docs": {
            E1: f'1 {A} {words}\n{places}\n{{"a":1}}',
            L1: f"1 {A} 1 ignored ~ 1 ~\ndead_letters|0000000000000001|l1\n{{}}",
        },
        "ledger:index": dict.fromkeys([*places.split(), stands("dead_letters", 1, "l1")], 0),
        "ledger:guards": {"r": "1", "~": "1"},
    }


def test_a_record_moves_with_what_it_is_sorted_by(tenant: Tenant) -> None:
    """A change takes it out of its old places; its revision rises; its new text replaces the old."""
    commit(tenant, A, change(E1, run="r", order=1))

    assert commit(tenant, B, change(E1, 1, run="r", order=7, doc='"x"')) == [10, "committed"]

    assert tenant.record(E1)[0] == f"2 {B} {filed(run='r')}"
    assert tenant.record(E1)[2] == '"x"'
    places = [stands("effects", 7, "e1"), stands("effects:r", 7, "e1")]
    assert tenant.dump()["ledger:index"] == dict.fromkeys(places, 0)


def test_a_record_that_changes_its_run_counts_for_both(tenant: Tenant) -> None:
    """Whoever read all records of either run is told."""
    commit(tenant, A, change(E1, run="r"))

    commit(tenant, B, change(E1, 1, run="s"))

    assert tenant.dump()["ledger:guards"] == {"r": "2", "s": "1"}
    assert stands("effects:r", 1, "e1") not in tenant.dump()["ledger:index"]


def test_a_record_is_dropped_with_its_places(tenant: Tenant) -> None:
    """Nothing is left of it but the count of its run."""
    commit(tenant, A, change(E1, run="r"), change(E2))

    assert commit(tenant, B, ("drop", E1, 1, "", "", "")) == [10, "committed"]

    assert tenant.record(E1) == [""]
    assert tenant.dump()["ledger:index"] == {stands("effects", 1, "e2"): 0}
    assert tenant.dump()["ledger:guards"] == {"r": "2", "~": "1"}


@pytest.mark.parametrize("kind", ["put", "drop", "check", "guard", "intent"])
def test_nothing_lands_where_one_thing_has_changed(tenant: Tenant, kind: str) -> None:
    """Each kind of item, also the last of many, keeps the whole set from landing."""
    commit(tenant, A, change(E1, run="r"), change(E2), intent_change("i1"))
    stale: dict[str, tuple[Item, str]] = {
        "put": (change(E1, 0, run="r"), E1),
        "drop": (("drop", E1, 2, "", "", ""), E1),
        "check": (("check", E1, 0, "", "", ""), E1),
        "guard": (("guard", "r", 0, "", "", ""), "r"),
        "intent": (intent_change("i1", 2), "i1"),
    }
    item, name = stale[kind]
    before = tenant.dump()

    reply = commit(tenant, B, change(E2, 1, order=9), change("effects/new"), item)

    assert reply == [10, ["conflict", name]]
    assert tenant.dump() == before


@pytest.mark.parametrize(
    "item",
    [
        ("check", E1, 1, "", "", ""),
        ("check", "effects/missing", 0, "", "", ""),
        ("guard", "r", 1, "", "", ""),
        ("guard", "unheard", 0, "", "", ""),
    ],
)
def test_what_is_as_it_was_read_lets_it_land(tenant: Tenant, item: Item) -> None:
    """Also what was not there, and is not."""
    commit(tenant, A, change(E1, run="r"))

    assert commit(tenant, B, change(E2), item) == [10, "committed"]


def test_what_is_only_checked_stays(tenant: Tenant) -> None:
    """A check writes nothing, and raises nothing."""
    commit(tenant, A, change(E1, run="r"))
    before = tenant.dump()

    assert commit(tenant, B, ("check", E1, 1, "", "", ""), ("guard", "r", 1, "", "", ""))

    assert tenant.dump() == before


def test_a_repeat_is_told_that_it_landed(tenant: Tenant) -> None:
    """The name of the commit decides; nothing is written twice."""
    items = (change(E1, run="r"), ("guard", "r", 0, "", "", ""), intent_change("i1"))
    commit(tenant, A, *items)
    before = tenant.dump()

    assert commit(tenant, A, *items, now_ms=20) == [20, "committed"]
    assert tenant.dump() == before
    assert commit(tenant, B, *items) == [10, ["conflict", E1]]


def test_a_record_that_cannot_be_read_is_not_written_over(tenant: Tenant) -> None:
    """No revision equals that of damage."""
    tenant.is_damaged = True
    tenant.raw.hset(tenant.keys.ledger_docs, E1, "x")
    tenant.raw.hset(tenant.keys.gate_state, "i1", "x")

    assert commit(tenant, A, change(E1, 0)) == [10, ["conflict", E1]]
    assert commit(tenant, A, change(E1, 1)) == [10, ["conflict", E1]]
    assert commit(tenant, A, intent_change("i1", 0)) == [10, ["conflict", "i1"]]


def test_500_records_land_at_once(tenant: Tenant) -> None:
    """Their places are more than fit on the stack of a script at once."""
    places = " ".join(stands(f"effects:~x{i}.", 1, "{}") for i in range(9))
    items = [
        ("put", f"effects/e{i}", 0, filed(), places.replace("{}", f"e{i}"), "{}")
        for i in range(500)
    ]

    assert commit(tenant, A, *items) == [10, "committed"]
    assert len(tenant.dump()["ledger:index"]) == 4_500
    again = [("put", name, 1, words, "", doc) for _, name, _, words, _, doc in items]
    assert commit(tenant, B, *again) == [10, "committed"]
    assert "ledger:index" not in tenant.dump()


# --- intents --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "listed"), [("sent", "gate:done"), ("failed", None), ("pending", None)]
)
def test_an_intent_is_made(tenant: Tenant, status: str, listed: str | None) -> None:
    """One that nobody was granted: without fence, lease and arguments, in the lists of its status."""
    item = intent_change(
        "i1", status=status, attempts=2, run="r", key="k" * 22, claimed_at=4, owner="o w"
    )

    assert commit(tenant, A, item) == [10, "committed"]

    assert tenant.intent("i1") == intent_line(
        status, "ledger", lease_end=0, updated_at=6, created_at=5, revision=1, attempts=2, fence=0,
        claimed_at=4, on_expiry="reclaim", run="r", sent="~", owner="o w",
    )  # fmt: skip
    state = tenant.dump()
    assert state["gate:docs"] == {"i1": "{}"}
    assert state["gate:updated"] == {"i1": 6}
    assert state["gate:runs"] == {"r:0000000000000006:i1": 0}
    assert {key for key in ("gate:done", "gate:dead", "gate:unknown") if key in state} == {
        *([listed] if listed else [])
    }


@pytest.mark.parametrize("status", ["sent", "failed"])
@pytest.mark.parametrize("on_expiry", ["park", "reclaim"])
def test_what_is_learned_of_a_granted_intent_leaves_its_sender_the_token(
    tenant: Tenant, status: str, on_expiry: str
) -> None:
    """The lease is over, and its sender may still say more, as it could without the ledger."""
    tenant.prepare(intent("i1", on_expiry=on_expiry, run="r"))

    item = intent_change("i1", 1, status=status, attempts=3, run="r", key="z" * 22, doc='"new"')
    assert commit(tenant, B, item, now_ms=12) == [12, "committed"]

    assert tenant.intent("i1") == intent_line(
        status, "ledger", lease_end=0, updated_at=6, created_at=5, revision=2, attempts=3,
        claimed_at=0, on_expiry=on_expiry, run="r", owner="",
    )  # fmt: skip
    assert tenant.dump()["gate:docs"] == {"i1": '"new"'}
    assert "gate:expiring" not in tenant.dump()
    assert tenant.run("gate/complete", ("i1", A, "succeeded", "{}"), now_ms=13) == [
        13,
        ["recorded", "sent"],
    ]


@pytest.mark.parametrize("on_expiry", ["park", "reclaim"])
def test_what_is_kept_takes_no_grant(tenant: Tenant, on_expiry: str) -> None:
    """`kept`: status, cause, token, lease and owner stay; what is known of the intent changes."""
    tenant.prepare(intent("i1", on_expiry=on_expiry, run="r"))

    item = intent_change("i1", 1, status="kept", run="r", claimed_at=99, owner="x", doc='"n"')
    assert commit(tenant, B, item, now_ms=12) == [12, "committed"]

    assert tenant.intent("i1") == intent_line(
        "claimed", "granted", updated_at=6, created_at=5, revision=2, on_expiry=on_expiry, run="r"
    )
    assert tenant.run("gate/extend", ("i1", A, 30), now_ms=13) == [13, ["extended", 43]]


def test_what_nobody_knows_stays_unknown_where_it_is_kept(tenant: Tenant) -> None:
    """Its destination may still be asked, from when on it could be before."""
    tenant.prepare("i1")
    tenant.run("gate/complete", ("i1", A, "left", "{}"), now_ms=12)
    before = tenant.dump()["gate:unknown"]

    commit(tenant, B, intent_change("i1", 2, status="kept"), now_ms=13)

    assert tenant.intent("i1").startswith("unknown left ")
    assert tenant.dump()["gate:unknown"] == before


def test_an_intent_moves_to_its_new_run(tenant: Tenant) -> None:
    """It is found by the run that it is of, and by no other."""
    tenant.prepare(intent("i1", run="r"), intent("i2", B))
    commit(tenant, C, intent_change("i1", 1, run="s"), intent_change("i2", 1, run="s"))

    assert list(tenant.dump()["gate:runs"]) == ["s:0000000000000006:i1", "s:0000000000000006:i2"]


def test_an_intent_keeps_its_key(tenant: Tenant) -> None:
    """A key is that of the grant; an intent without one is given it."""
    tenant.prepare("i1")
    commit(tenant, B, intent_change("i1", 1, key="z" * 22), intent_change("i2"))
    commit(tenant, C, intent_change("i2", 1, key="z" * 22))

    assert tenant.intent("i1").split(" ")[17] == "k" * 22
    assert tenant.intent("i2").split(" ")[17] == "z" * 22


@pytest.mark.parametrize(
    "words",
    [
        "claimed 1 5 6 0 ~ ~ ",
        "cancelled 1 5 6 0 ~ ~ ",
        "SENT 1 5 6 0 ~ ~ ",
        "sent x 5 6 0 ~ ~ ",
        "sent 1 5 6 0 r:s ~ ",
        "sent 1 9007199254740992 6 0 ~ ~ ",
        "sent 1 5 9007199254740992 0 ~ ~ ",
        "sent 9007199254740992 5 6 0 ~ ~ ",
        "sent 1 5 6 9007199254740992 ~ ~ ",
        "sent 1 5 6 0 ~ ~",
        "kept 1 5 6 0 ~ ~ ",
        "",
    ],
)
def test_words_that_would_break_a_state_line_are_refused(tenant: Tenant, words: str) -> None:
    """Nor does the ledger claim, cancel, or keep what is not there."""
    refusal = tenant.refusal(
        "ledger/commit", change(E1), ("intent", "i1", 0, words, "", "{}"), now_ms=10, commit=A
    )
    assert refusal == "LK_ARGUMENT words"


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (("put", "effects", 0, filed(), "", "{}"), "name"),
        (("put", "effects/", 0, filed(), "", "{}"), "name"),
        (("put", "Effects/e", 0, filed(), "", "{}"), "name"),
        (("put", "effects/a b", 0, filed(), "", "{}"), "name"),
        (("put", "effects/e\n", 0, filed(), "", "{}"), "name"),
        (("drop", "effects", 0, "", "", ""), "name"),
        (("intent", "", 0, "sent 1 5 6 0 ~ ~ ", "", "{}"), "name"),
        (("put", E1, 0, "x open ~ 1 ~", "", "{}"), "words"),
        (("put", E1, 0, "1 open ~ 2 ~", "", "{}"), "words"),
        (("put", E1, 0, "1 open ~ 1 ", "", "{}"), "words"),
        (("put", E1, 0, "1 op en ~ 1 ~", "", "{}"), "words"),
        (("put", E1, 0, "1 open ~ 1 ~\n", "", "{}"), "words"),
        (("put", E1, 0, filed(), stands("effects", 1, "e2"), "{}"), "places"),
        (("put", E1, 0, filed(), stands("effects", 1, "e1") + "\n", "{}"), "places"),
        (("put", E1, 0, filed(), "effects|1|e1", "{}"), "places"),
        (("put", E1, 0, filed(), "|0000000000000001|e1", "{}"), "places"),
        (change(E2), "twice"),
        (("drop", E2, 1, "", "", ""), "twice"),
    ],
)
def test_what_would_not_be_found_again_is_refused(tenant: Tenant, item: Item, problem: str) -> None:
    """A name, words or a place that the others could not read; and the same record twice."""
    refusal = tenant.refusal("ledger/commit", change(E2), item, now_ms=10, commit=A)

    assert refusal == f"LK_ARGUMENT {problem}"


def test_a_record_that_was_put_is_changed(tenant: Tenant) -> None:
    """What ledger/put wrote has a revision and places as any other."""
    tenant.run("ledger/put", record(E1, run="r", order=3), now_ms=9)

    assert commit(tenant, B, change(E1, 1, run="r", order=4)) == [10, "committed"]
    assert tenant.dump()["ledger:guards"] == {"r": "2"}
