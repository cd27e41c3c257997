"""outbox/cancel: pending rows, and only those, are not to be sent any more."""

from __future__ import annotations

import pytest
from lua.commands import A, B, Tenant, row


def test_cancel_finishes_a_fresh_row(tenant: Tenant) -> None:
    """A cancelled row is out of the line and among the finished, with its bytes counted."""
    tenant.enqueue("m1", "m2")
    before = tenant.dump()

    reply = tenant.run("outbox/cancel", ("m1",), now_ms=12)

    assert reply == [12, "cancelled"]
    assert tenant.changes(before) == {
        "outbox:done": {"m1": 12},
        "outbox:due:l:t": {"m1": None},
        "outbox:state": {"m1": "cancelled cancelled ~ 12 24 0 0 0 0 "},
        "outbox:tally": {"pending:l:t": "1", "cancelled:l:t": "1", "done_bytes": "24"},
    }


@pytest.mark.parametrize("name", ["outbox/release", "outbox/nack"])
def test_cancel_finishes_a_row_that_waits_again(tenant: Tenant, name: str) -> None:
    """A released or requeued row is pending, too; what its claims left is kept."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=10)
    tenant.run(name, ("m1", A, 50, 0, '"x"') if "nack" in name else ("m1", A), now_ms=11)

    assert tenant.run("outbox/cancel", ("m1",), now_ms=12) == [12, "cancelled"]
    assert tenant.row("m1").startswith(f"cancelled cancelled {A} 12 24 ")


@pytest.mark.parametrize("status", ["claimed", "unknown", "sent", "dead_lettered"])
def test_cancel_of_another_status_says_which(tenant: Tenant, status: str) -> None:
    """What is not pending is not cancelled: the answer names the status, and nothing changes."""
    tenant.enqueue(row("m1", on_expiry="park"))
    tenant.claim(A, now_ms=10)
    if status == "unknown":
        tenant.claim(B, now_ms=20)
    elif status == "sent":
        tenant.run("outbox/ack", ("m1", A), now_ms=11)
    elif status == "dead_lettered":
        tenant.run("outbox/nack", ("m1", A, "", 1, '"x"'), now_ms=11)
    before = tenant.dump()

    assert tenant.run("outbox/cancel", ("m1",), now_ms=21) == [21, ["not_pending", status]]
    assert tenant.dump() == before


@pytest.mark.parametrize("repeated", [0, 1])
def test_second_cancel_answers_as_the_first(tenant: Tenant, repeated: int) -> None:
    """A cancelled row is cancelled again, asked as a repeat or not."""
    tenant.enqueue("m1")
    tenant.run("outbox/cancel", ("m1",), now_ms=12)
    before = tenant.dump()

    reply = tenant.run("outbox/cancel", ("m1",), now_ms=13, repeated=repeated)

    assert reply == [13, "cancelled"]
    assert tenant.dump() == before


@pytest.mark.parametrize(
    ("id", "repeated", "answer"),
    [
        ("m5", 0, "missing"),
        ("m5", 1, "forgotten"),
        ("m4", 1, "forgotten"),
        ("m6", 1, "missing"),
        ("", 0, "missing"),
    ],
)
def test_cancel_of_a_missing_row(tenant: Tenant, id: str, repeated: int, answer: str) -> None:
    """A repeat of a missing row is forgotten up to the horizon; all else is missing."""
    tenant.enqueue("m5")
    tenant.run("outbox/cancel", ("m5",), now_ms=10, keep_ms=0)
    before = tenant.dump()

    assert tenant.run("outbox/cancel", (id,), now_ms=12, repeated=repeated) == [12, answer]
    assert tenant.dump() == before


@pytest.mark.parametrize("keep", [{"keep_ms": 0}, {"keep_count": 0}, {"keep_bytes": 0}])
def test_retention_0_deletes_a_cancelled_row_at_once(tenant: Tenant, keep: dict[str, int]) -> None:
    """With any bound 0 a cancelled row is deleted, and counts as cancelled."""
    tenant.enqueue("m1")

    tenant.run("outbox/cancel", ("m1",), now_ms=12, **keep)

    assert "outbox:docs" not in tenant.dump()
    assert tenant.tally() == {"cancelled:l:t": 1}


@pytest.mark.parametrize(("now_ms", "kept"), [(1_011, ["m1", "m2"]), (1_012, ["m2"])])
def test_cancel_forgets_as_ack_does(tenant: Tenant, now_ms: int, kept: list[str]) -> None:
    """A cancel forgets finished rows that are keep_ms old, to the millisecond."""
    tenant.enqueue("m1", "m2")
    tenant.run("outbox/cancel", ("m1",), now_ms=12)

    tenant.run("outbox/cancel", ("m2",), now_ms=now_ms)

    assert list(tenant.dump()["outbox:done"]) == kept


def test_cancelled_row_is_not_claimed(tenant: Tenant) -> None:
    """A cancelled row is never handed out."""
    tenant.enqueue("m1", "m2")
    tenant.run("outbox/cancel", ("m1",), now_ms=12)

    assert tenant.ids_claimed(A, now_ms=13) == ["m2"]


def test_items_are_cancelled_one_after_the_other(tenant: Tenant) -> None:
    """A row named twice is cancelled once; missing ones between good ones harm nobody."""
    tenant.enqueue("m1", "m2")

    reply = tenant.run("outbox/cancel", ("m1",), ("m3",), ("m1",), ("m2",), now_ms=12)

    assert reply == [12, "cancelled", "missing", "cancelled", "cancelled"]
    assert tenant.tally() == {"cancelled:l:t": 2, "done_bytes": 48}


def test_cancel_of_a_damaged_row_harms_no_other(tenant: Tenant) -> None:
    """A row whose state line cannot be read is missing, and its neighbours are cancelled."""
    tenant.is_damaged = True
    tenant.enqueue("m1", "m2", "m3")
    tenant.raw.hset(tenant.keys.outbox_docs, "m1", "{}")
    tenant.raw.hset(tenant.keys.outbox_state, "m2", "pending")

    reply = tenant.run("outbox/cancel", ("m1",), ("m2",), ("m3",), now_ms=12)

    assert reply == [12, "cancelled", "missing", "cancelled"]
