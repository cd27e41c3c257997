"""outbox/purge: an operator deletes finished rows or dead letters, the oldest first."""

from __future__ import annotations

import pytest
from lua.commands import A, Tenant, row

MEGABYTE = 1 << 20


@pytest.fixture
def finished(tenant: Tenant) -> Tenant:
    """m1, m2, m3 sent at 11, 12, 13; m4, m5 buried at 11, 12; m6 pending."""
    tenant.enqueue("m1", "m2", "m3", "m4", "m5", "m6")
    tenant.claim(A, now_ms=10, limit=5)
    for id, now_ms in (("m1", 11), ("m2", 12), ("m3", 13)):
        tenant.run("outbox/ack", (id, A), now_ms=now_ms)
    for id, now_ms in (("m4", 11), ("m5", 12)):
        tenant.run("outbox/nack", (id, A, "", 1, '"x"'), now_ms=now_ms)
    return tenant


@pytest.mark.parametrize(
    ("before_ms", "limit", "deleted", "more", "left"),
    [
        (10, 10, 0, 0, ["m1", "m2", "m3"]),
        (11, 10, 1, 0, ["m2", "m3"]),
        (12, 10, 2, 0, ["m3"]),
        (12, 2, 2, 0, ["m3"]),
        (12, 1, 1, 1, ["m2", "m3"]),
        (2**53 - 1, 250, 3, 0, []),
    ],
)
def test_purge_deletes_up_to_an_instant(
    finished: Tenant, before_ms: int, limit: int, deleted: int, more: int, left: list[str]
) -> None:
    """What got there at or before before_ms goes, at most limit rows; more says whether any stayed."""
    reply = finished.run("outbox/purge", now_ms=20, noun="done", before_ms=before_ms, limit=limit)

    assert reply == [20, deleted, more]
    assert list(finished.dump().get("outbox:done", {})) == left


def test_purge_of_an_entry_without_a_row(tenant: Tenant) -> None:
    """An entry whose row is gone goes as well, and counts for no bytes."""
    tenant.is_damaged = True
    tenant.raw.zadd(tenant.keys.outbox_done, {"ghost": 5})

    reply = tenant.run("outbox/purge", now_ms=20, noun="done", before_ms=10, limit=10)

    assert reply == [20, 1, 0]
    assert tenant.dump() == {"outbox:tally": {"horizon": "ghost"}}


def test_purge_of_dead_letters(finished: Tenant) -> None:
    """A dead letter goes with document, state and errors, is counted off, and raises the horizon."""
    before = finished.dump()

    reply = finished.run("outbox/purge", now_ms=20, noun="dead", before_ms=11)

    assert reply == [20, 1, 0]
    assert finished.changes(before) == {
        "outbox:dead": {"m4": None},
        "outbox:docs": {"m4": None},
        "outbox:errors": {"m4": None},
        "outbox:state": {"m4": None},
        "outbox:tally": {"dead_bytes": "24", "dead_lettered:l:t": "1", "horizon": "m4"},
    }


def test_purge_of_nothing_writes_nothing(tenant: Tenant) -> None:
    """An empty list has nothing to delete."""
    tenant.enqueue("m1")
    before = tenant.dump()

    assert tenant.run("outbox/purge", now_ms=20, noun="done") == [20, 0, 0]
    assert tenant.dump() == before


def test_purge_of_dead_letters_stops_at_4_mib(tenant: Tenant) -> None:
    """Large dead letters are deleted a few a call: their documents are read for their routes."""
    tenant.enqueue(*(row(f"m{i}", payload="x" * MEGABYTE) for i in range(6)))
    tenant.claim(A, now_ms=10)
    tenant.claim("b" * 22, now_ms=10)
    tenant.run("outbox/nack", *((f"m{i}", A, "", 1, '"x"') for i in range(3)), now_ms=11)
    tenant.run("outbox/nack", *((f"m{i}", "b" * 22, "", 1, '"x"') for i in range(3, 6)), now_ms=11)

    assert tenant.run("outbox/purge", now_ms=20, noun="dead") == [20, 4, 1]
    assert tenant.run("outbox/purge", now_ms=20, noun="dead") == [20, 2, 0]


def test_purge_frees_bytes(finished: Tenant) -> None:
    """Deleted rows are taken off the bytes kept; what was sent stays counted."""
    finished.run("outbox/purge", now_ms=20, noun="done", before_ms=12)

    assert finished.tally() == {
        "sent:l:t": 3,
        "done_bytes": 24,
        "dead_lettered:l:t": 2,
        "dead_bytes": 48,
        "pending:l:t": 1,
    }
