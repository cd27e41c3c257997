"""outbox/get: what is stored of rows, as it is."""

from __future__ import annotations

from lua.commands import A, Tenant

DOC = "0 0 2 reclaim l:t ~ ~\n{}"


def test_get_gives_document_state_and_errors(tenant: Tenant) -> None:
    """A row comes as it is stored; what it has not is empty; reading writes nothing."""
    tenant.enqueue("m1", "m2")
    tenant.claim(A, now_ms=10, limit=1)
    tenant.run("outbox/nack", ("m1", A, 50, 0, '"busy"'), now_ms=12)
    before = tenant.dump()

    reply = tenant.run("outbox/get", ("m1",), ("m3",), ("m2",), ("m1",), now_ms=13)

    first = [
        "found",
        DOC,
        f"pending requeued {A} 50 24 1 1 10000 10 a",
        '12 requeued 1 10000 "busy"',
    ]
    assert reply == [13, first, "missing", ["found", DOC, "", ""], first]
    assert tenant.dump() == before


def test_get_shows_a_lease_that_ended_as_it_is_stored(tenant: Tenant) -> None:
    """An expired claim reads as claimed until another claim takes it: the reader knows the time."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=10)

    reply = tenant.run("outbox/get", ("m1",), now_ms=1_000)

    assert reply == [1_000, ["found", DOC, f"claimed claimed {A} 20 24 1 1 10000 10 a", ""]]


def test_get_of_a_row_without_document_is_missing(tenant: Tenant) -> None:
    """A state line alone is no row."""
    tenant.is_damaged = True
    tenant.raw.hset(tenant.keys.outbox_state, "m1", f"sent acked {A} 20 24 1 1 10000 10 a")

    assert tenant.run("outbox/get", ("m1",), now_ms=13) == [13, "missing"]
