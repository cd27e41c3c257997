"""outbox/redrive: dead letters wait again, with all their attempts before them."""

from __future__ import annotations

import pytest
from lua.commands import A, B, Tenant, row


@pytest.fixture
def buried(tenant: Tenant) -> Tenant:
    """m1, buried by a permanent nack at 11; m2, claimed by A."""
    tenant.enqueue("m1", "m2")
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/nack", ("m1", A, "", 1, '"x"'), now_ms=11)
    return tenant


def test_redrive_lets_a_dead_letter_wait_again(buried: Tenant) -> None:
    """A redriven row is due now, without token, with no attempts used; its history stays."""
    before = buried.dump()

    reply = buried.run("outbox/redrive", ("m1",), now_ms=12)

    assert reply == [12, "redriven"]
    assert buried.changes(before) == {
        "outbox:dead": {"m1": None},
        "outbox:due:l:t": {"m1": 12},
        "outbox:state": {"m1": "pending redriven ~ 12 24 0 1 10000 10 a"},
        "outbox:tally": {"pending:l:t": "1", "dead_lettered:l:t": "0", "dead_bytes": "0"},
    }


def test_redriven_row_has_all_its_attempts(buried: Tenant) -> None:
    """A redriven row may be tried attempts_max times again; its claim count goes on."""
    buried.run("outbox/redrive", ("m1",), now_ms=12)

    reply = buried.claim(B, now_ms=12)

    assert reply[4][3:] == ["m1", "0 0 2 reclaim l:t ~ ~\n{}", 1, 2, '11 permanent 1 10000 "x"']


def test_last_holder_cannot_end_a_redriven_row(tenant: Tenant) -> None:
    """An ack that was good for a row buried by expiry is lost after its redrive."""
    tenant.enqueue(row("m1", attempts_max=1))
    tenant.claim(A, now_ms=10)
    tenant.claim(B, now_ms=20)
    tenant.run("outbox/redrive", ("m1",), now_ms=21)
    before = tenant.dump()

    assert tenant.run("outbox/ack", ("m1", A), now_ms=22) == [22, "lost_claim"]
    assert tenant.run("outbox/ack", ("m1", "~"), now_ms=22) == [22, "lost_claim"]
    assert tenant.dump() == before


@pytest.mark.parametrize("repeated", [0, 1])
def test_second_redrive_answers_as_the_first(buried: Tenant, repeated: int) -> None:
    """While the row still waits since a redrive, another one is redriven and changes nothing."""
    buried.run("outbox/redrive", ("m1",), now_ms=12)
    before = buried.dump()

    reply = buried.run("outbox/redrive", ("m1",), now_ms=13, repeated=repeated)

    assert reply == [13, "redriven"]
    assert buried.dump() == before


def test_redrive_of_another_status_says_which(buried: Tenant) -> None:
    """What is no dead letter is not redriven: the answer names the status, and nothing changes."""
    buried.enqueue("m3", "m4", "m5")
    buried.run("outbox/cancel", ("m4",), now_ms=12)
    buried.claim(B, now_ms=12, limit=1)
    buried.run("outbox/release", ("m3", B), now_ms=12)
    before = buried.dump()

    reply = buried.run("outbox/redrive", *((f"m{i}",) for i in (2, 3, 4, 5)), now_ms=13)

    statuses = ["claimed", "pending", "cancelled", "pending"]
    assert reply == [13, *(["not_dead", status] for status in statuses)]
    assert buried.dump() == before


@pytest.mark.parametrize(
    ("id", "repeated", "answer"),
    [("m5", 0, "missing"), ("m5", 1, "forgotten"), ("m6", 1, "missing"), ("", 0, "missing")],
)
def test_redrive_of_a_missing_row(tenant: Tenant, id: str, repeated: int, answer: str) -> None:
    """A repeat of a missing row is forgotten up to the horizon; all else is missing."""
    tenant.enqueue("m5")
    tenant.run("outbox/cancel", ("m5",), now_ms=10, keep_ms=0)
    before = tenant.dump()

    assert tenant.run("outbox/redrive", (id,), now_ms=12, repeated=repeated) == [12, answer]
    assert tenant.dump() == before


def test_items_are_redriven_one_after_the_other(buried: Tenant) -> None:
    """A row named twice is redriven once; refused ones between good ones harm nobody."""
    reply = buried.run("outbox/redrive", ("m1",), ("m9",), ("m1",), now_ms=12)

    assert reply == [12, "redriven", "missing", "redriven"]
    assert buried.tally() == {"pending:l:t": 1, "claimed:l:t": 1}


def test_a_redrive_that_names_the_claim_count_applies_once(buried: Tenant) -> None:
    """An order about what was seen does nothing to the row once it has been claimed and buried again."""
    order = {"claim_count": 1}
    assert buried.run("outbox/redrive", ("m1",), now_ms=12, **order) == [12, "redriven"]
    assert buried.run("outbox/redrive", ("m1",), now_ms=12, **order) == [12, "redriven"]
    buried.claim(B, now_ms=12)
    answer = ["not_dead", "claimed"]
    assert buried.run("outbox/redrive", ("m1",), now_ms=13, **order) == [13, answer]
    buried.run("outbox/nack", ("m1", B, "", 1, '"x"'), now_ms=14)
    before = buried.dump()

    reply = buried.run("outbox/redrive", ("m1",), ("m9",), now_ms=15, repeated=1, **order)

    assert reply == [15, ["not_dead", "dead_lettered"], "missing"]
    assert buried.dump() == before
    assert buried.run("outbox/redrive", ("m1",), now_ms=16, claim_count=2) == [16, "redriven"]
