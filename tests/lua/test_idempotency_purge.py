"""idempotency/purge: an operator deletes records that were last seen long ago."""

from __future__ import annotations

import pytest
from lua.commands import A, B, Tenant


@pytest.fixture
def kept(tenant: Tenant) -> Tenant:
    """Last seen at 20: r1 reserved, r2 completed, r3 conflicted, r4 completed and conflicted,
    r5 released; last seen at 21: r6 completed."""
    reserve = [(f"r{i}", A, "f", "", 1_000, "reclaim", "{}") for i in range(1, 7)]
    tenant.run("idempotency/reserve", *reserve, now_ms=20)
    tenant.run("idempotency/complete", ("r2", A, 1, "{}"), ("r4", A, 1, "{}"), now_ms=20)
    other = [(id, B, "g", "", "", "reclaim", "{}") for id in ("r3", "r4")]
    tenant.run("idempotency/reserve", *other, now_ms=20)
    tenant.run("idempotency/release", ("r5", A, ""), now_ms=20)
    tenant.run("idempotency/complete", ("r6", A, 1, "{}"), now_ms=21)
    return tenant


@pytest.mark.parametrize(
    ("before_ms", "unfinished", "left"),
    [
        (19, 1, ["r1", "r2", "r3", "r4", "r5", "r6"]),
        (20, 0, ["r1", "r3", "r6"]),
        (20, 1, ["r6"]),
        (21, 0, ["r1", "r3"]),
        (21, 1, []),
    ],
)
def test_purge_deletes_what_was_last_seen_before(
    kept: Tenant, before_ms: int, unfinished: int, left: list[str]
) -> None:
    """What has an outcome or was released goes; a reservation without outcome only on request."""
    reply = kept.run("idempotency/purge", now_ms=30, before_ms=before_ms, unfinished=unfinished)

    assert reply[:2] == [30, 0]
    assert reply[4] == 6 - len(left)
    assert sorted(kept.dump().get("idempotency:docs", {})) == left


def test_purge_looks_at_limit_records_a_call(kept: Tenant) -> None:
    """A call goes on behind the last record looked at, also when that one was deleted."""
    found, after = [], {"after_score": "", "after_id": ""}
    for _ in range(3):
        reply = kept.run("idempotency/purge", now_ms=30, before_ms=20, limit=2, **after)
        found.append((reply[1], reply[3], reply[4]))
        after = {"after_score": reply[2], "after_id": reply[3]}

    assert found == [(1, "r2", 1), (1, "r4", 1), (0, "r5", 1)]


def test_purge_of_nothing(tenant: Tenant) -> None:
    """Without records there is nothing to delete."""
    assert tenant.run("idempotency/purge", now_ms=30) == [30, 0, "0", "", 0]


def test_purge_deletes_damaged_records(tenant: Tenant) -> None:
    """A record that cannot be read goes, whatever its age."""
    tenant.run("idempotency/reserve", ("r1", A, "f", "", "", "reclaim", "{}"), now_ms=20)
    tenant.raw.hset(tenant.keys.idempotency_docs, "r1", "reserved")

    assert tenant.run("idempotency/purge", now_ms=30, before_ms=0)[4] == 1
    assert tenant.dump() == {}
