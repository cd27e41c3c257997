"""outbox/resolve: an operator says what became of rows of which nobody knows."""

from __future__ import annotations

import pytest
from lua.commands import A, B, C, D, Tenant, row

NOTE = '"asked the bank"'


@pytest.fixture
def parked(tenant: Tenant) -> Tenant:
    """m1, which parks, claimed by A at 10 until 20, found unknown at 20."""
    tenant.enqueue(row("m1", on_expiry="park"))
    tenant.claim(A, now_ms=10)
    tenant.claim(B, now_ms=20)
    return tenant


def test_resolve_as_sent(parked: Tenant) -> None:
    """A row resolved as sent is among the finished, without token, with the note as an error."""
    before = parked.dump()

    reply = parked.run("outbox/resolve", ("m1", "sent", NOTE), now_ms=30)

    assert reply == [30, "resolved"]
    assert parked.changes(before) == {
        "outbox:done": {"m1": 30},
        "outbox:errors": {"m1": f"30 resolved_sent 1 10000 {NOTE}"},
        "outbox:state": {"m1": "sent resolved ~ 30 21 1 1 10000 10 a"},
        "outbox:tally": {"unknown:l:t": "0", "sent:l:t": "1", "done_bytes": "21"},
        "outbox:unknown": {"m1": None},
    }


def test_resolve_as_redrive_where_nothing_finished_is_kept(parked: Tenant) -> None:
    """Where finished rows are deleted at once, a row that goes on waiting is none of them."""
    reply = parked.run("outbox/resolve", ("m1", "redrive", NOTE), now_ms=30, keep_ms=0)

    assert reply == [30, "resolved"]
    assert parked.dump()["outbox:due:l:t"] == {"m1": 30}
    assert "m1" in parked.dump()["outbox:docs"]


def test_resolve_as_redrive(parked: Tenant) -> None:
    """A row resolved to be redriven is due now, with no attempts used."""
    before = parked.dump()

    reply = parked.run("outbox/resolve", ("m1", "redrive", NOTE), now_ms=30)

    assert reply == [30, "resolved"]
    assert parked.changes(before) == {
        "outbox:due:l:t": {"m1": 30},
        "outbox:errors": {"m1": f"30 resolved_redrive 1 10000 {NOTE}"},
        "outbox:state": {"m1": "pending resolved ~ 30 21 0 1 10000 10 a"},
        "outbox:tally": {"unknown:l:t": "0", "pending:l:t": "1"},
        "outbox:unknown": {"m1": None},
    }


def test_resolve_as_dead(parked: Tenant) -> None:
    """A row resolved as dead is a dead letter."""
    before = parked.dump()

    reply = parked.run("outbox/resolve", ("m1", "dead", NOTE), now_ms=30)

    assert reply == [30, "resolved"]
    assert parked.changes(before) == {
        "outbox:dead": {"m1": 30},
        "outbox:errors": {"m1": f"30 resolved_dead 1 10000 {NOTE}"},
        "outbox:state": {"m1": "dead_lettered resolved ~ 30 21 1 1 10000 10 a"},
        "outbox:tally": {"unknown:l:t": "0", "dead_lettered:l:t": "1", "dead_bytes": "21"},
        "outbox:unknown": {"m1": None},
    }


@pytest.mark.parametrize(
    ("now_ms", "answer"), [(19, ["not_unknown", "claimed"]), (20, "resolved"), (21, "resolved")]
)
@pytest.mark.parametrize("verdict", ["sent", "redrive", "dead"])
def test_row_that_parks_is_unknown_from_its_lease_end_on(
    tenant: Tenant, verdict: str, now_ms: int, answer: object
) -> None:
    """A row that parks may be resolved from its lease end on, before a claim has written it."""
    tenant.enqueue(row("m1", on_expiry="park"))
    tenant.claim(A, now_ms=10)

    reply = tenant.run("outbox/resolve", ("m1", verdict, NOTE), now_ms=now_ms)

    assert reply == [now_ms, answer]


def test_row_that_is_reclaimed_is_never_unknown(tenant: Tenant) -> None:
    """An expired row that does not park is claimed, not unknown."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=10)
    before = tenant.dump()

    reply = tenant.run("outbox/resolve", ("m1", "sent", NOTE), now_ms=30)

    assert reply == [30, ["not_unknown", "claimed"]]
    assert tenant.dump() == before


@pytest.mark.parametrize("repeated", [0, 1])
@pytest.mark.parametrize("verdict", ["sent", "redrive", "dead"])
def test_second_resolve_answers_as_the_first(parked: Tenant, verdict: str, repeated: int) -> None:
    """The same verdict again is resolved, and changes nothing."""
    parked.run("outbox/resolve", ("m1", verdict, NOTE), now_ms=30)
    before = parked.dump()

    reply = parked.run("outbox/resolve", ("m1", verdict, NOTE), now_ms=31, repeated=repeated)

    assert reply == [31, "resolved"]
    assert parked.dump() == before


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        ("sent", "dead", "sent"),
        ("dead", "redrive", "dead_lettered"),
        ("redrive", "sent", "pending"),
    ],
)
def test_another_verdict_comes_too_late(
    parked: Tenant, first: str, second: str, status: str
) -> None:
    """A resolved row is not unknown any more: another verdict changes nothing."""
    parked.run("outbox/resolve", ("m1", first, NOTE), now_ms=30)
    before = parked.dump()

    reply = parked.run("outbox/resolve", ("m1", second, NOTE), now_ms=31)

    assert reply == [31, ["not_unknown", status]]
    assert parked.dump() == before


@pytest.mark.parametrize("verdict", ["sent", "redrive", "dead"])
@pytest.mark.parametrize("name", ["outbox/ack", "outbox/nack", "outbox/release"])
@pytest.mark.parametrize("token", [A, "~", ""])
def test_last_holder_comes_too_late(parked: Tenant, verdict: str, name: str, token: str) -> None:
    """After an operator's word the vanished holder's token ends nothing, nor does that of nobody."""
    parked.run("outbox/resolve", ("m1", verdict, NOTE), now_ms=30)
    before = parked.dump()

    item = ("m1", token, "", 0, '"x"') if name == "outbox/nack" else ("m1", token)
    assert parked.run(name, item, now_ms=31) == [31, "lost_claim"]
    assert parked.dump() == before


@pytest.mark.parametrize(
    ("id", "repeated", "answer"),
    [
        ("m2", 0, ["not_unknown", "pending"]),
        ("m5", 0, "missing"),
        ("m5", 1, "forgotten"),
        ("m6", 1, "missing"),
        ("", 0, "missing"),
    ],
)
def test_resolve_of_a_row_that_is_not_unknown(
    tenant: Tenant, id: str, repeated: int, answer: object
) -> None:
    """A fresh row is pending; a missing one forgotten for a repeat up to the horizon."""
    tenant.enqueue("m2", "m5")
    tenant.run("outbox/cancel", ("m5",), now_ms=10, keep_ms=0)
    before = tenant.dump()

    item = (id, "sent", NOTE)
    assert tenant.run("outbox/resolve", item, now_ms=12, repeated=repeated) == [12, answer]
    assert tenant.dump() == before


@pytest.mark.parametrize(
    ("verdict", "keep"),
    [
        ("sent", {"keep_ms": 0}),
        ("sent", {"keep_count": 0}),
        ("sent", {"keep_bytes": 0}),
        ("dead", {"dead_keep_ms": 0}),
        ("dead", {"dead_keep_count": 0}),
    ],
)
def test_retention_0_deletes_a_resolved_row_at_once(
    parked: Tenant, verdict: str, keep: dict[str, int]
) -> None:
    """With a bound of its list 0 a resolved row is deleted, errors included."""
    parked.run("outbox/resolve", ("m1", verdict, NOTE), now_ms=30, **keep)

    state = parked.dump()
    assert state["outbox:tally"]["horizon"] == "m1"
    assert set(state) == {"fence", "outbox:lanes", "outbox:tally"}


def test_items_are_resolved_one_after_the_other(tenant: Tenant) -> None:
    """Several verdicts share a call: each row goes where its own says."""
    tenant.enqueue(*(row(f"m{i}", on_expiry="park") for i in range(1, 5)))
    tenant.claim(A, now_ms=10)
    tenant.claim(B, now_ms=20, limit=2)

    reply = tenant.run(
        "outbox/resolve",
        *(("m1", "sent", NOTE), ("m2", "dead", NOTE), ("m3", "redrive", NOTE)),
        *(("m1", "sent", NOTE), ("m4", "sent", NOTE), ("m1", "dead", NOTE)),
        now_ms=30,
    )

    assert reply == [30, *["resolved"] * 5, ["not_unknown", "sent"]]
    assert tenant.tally() == {
        "sent:l:t": 2,
        "dead_lettered:l:t": 1,
        "pending:l:t": 1,
        "done_bytes": 42,
        "dead_bytes": 21,
    }


@pytest.mark.parametrize("verdict", ["sent", "redrive", "dead"])
def test_a_verdict_that_names_the_claim_count_is_about_that_attempt(
    parked: Tenant, verdict: str
) -> None:
    """A late copy of an old verdict says nothing about the attempt that is unknown now."""
    order = {"claim_count": 1}
    redrive = ("m1", "redrive", NOTE)
    assert parked.run("outbox/resolve", redrive, now_ms=30, **order) == [30, "resolved"]
    assert parked.run("outbox/resolve", redrive, now_ms=30, **order) == [30, "resolved"]
    parked.claim(C, now_ms=30)
    parked.claim(D, now_ms=40)
    before = parked.dump()

    item = ("m1", verdict, NOTE)
    reply = parked.run("outbox/resolve", item, now_ms=41, repeated=1, **order)

    assert reply == [41, ["not_unknown", "unknown"]]
    assert parked.dump() == before
    assert parked.run("outbox/resolve", item, now_ms=42, claim_count=2) == [42, "resolved"]
