"""idempotency/get: what is stored of keys, whatever their age."""

from __future__ import annotations

from lua.commands import A, Tenant


def test_get_gives_records_as_they_are_stored(tenant: Tenant) -> None:
    """A record comes as it is, also after its end; reading writes nothing."""
    tenant.run("idempotency/reserve", ("r1", A, "f", 20, 100, "reclaim", "{}"), now_ms=10)
    before = tenant.dump()

    reply = tenant.run("idempotency/get", ("r1",), ("r2",), now_ms=1_000)

    assert reply == [
        1_000,
        ["found", f"reserved {A} 10 10 30 100 0 reclaim ~\nf\n{{}}\n"],
        "missing",
    ]
    assert tenant.dump() == before


def test_released_record_reads_as_missing(tenant: Tenant) -> None:
    """A released reservation is no record to a reader."""
    tenant.run("idempotency/reserve", ("r1", A, "f", "", "", "reclaim", "{}"), now_ms=10)
    tenant.run("idempotency/release", ("r1", A, ""), now_ms=11)

    assert tenant.run("idempotency/get", ("r1",), now_ms=12) == [12, "missing"]
