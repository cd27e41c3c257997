"""outbox/ack: who has the token ends the row, late or not; finished rows are kept within bounds."""

from __future__ import annotations

import pytest
from lua.commands import A, B, C, Tenant, row

MEGABYTE = 1 << 20

MISS = {
    "empty": "",
    "none": "~",
    "prefix": A[:-1],
    "suffix": A[1:],
    "longer": A + "a",
    "with text": f"{A} 20",
    "other": B,
    "other case": A.upper(),
    "newline": A + "\n",
    "pattern": "." * 22,
}


def finish(tenant: Tenant, ids: list[str], *, now_ms: int, **keep: int) -> None:
    """Enqueue, claim and ack each row in a call of its own."""
    for id in ids:
        tenant.enqueue(id)
        token = f"{id:a>22}"
        tenant.claim(token, now_ms=now_ms, lease_ms=0)
        tenant.run("outbox/ack", (id, token), now_ms=now_ms, **keep)


def test_ack_ends_a_claimed_row(tenant: Tenant) -> None:
    """An acked row is sent: out of the line, among the finished, with its bytes counted."""
    tenant.enqueue("m1", "m2")
    tenant.claim(A, now_ms=10, consumer="worker 1")
    before = tenant.dump()

    reply = tenant.run("outbox/ack", ("m1", A), now_ms=12)

    assert reply == [12, "acked"]
    assert tenant.changes(before) == {
        "outbox:done": {"m1": 12},
        "outbox:due:l:t": {"m1": None},
        "outbox:state": {"m1": f"sent acked {A} 12 24 1 1 10000 10 worker 1"},
        "outbox:tally": {"claimed:l:t": "1", "sent:l:t": "1", "done_bytes": "24"},
    }


@pytest.mark.parametrize("token", MISS.values(), ids=MISS.keys())
@pytest.mark.parametrize("repeated", [0, 1])
def test_ack_needs_exactly_the_token(tenant: Tenant, token: str, repeated: int) -> None:
    """Anything but the very token is lost_claim and writes nothing."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=10)
    before = tenant.dump()

    reply = tenant.run("outbox/ack", ("m1", token), now_ms=12, repeated=repeated)

    assert reply == [12, "lost_claim"]
    assert tenant.dump() == before


@pytest.mark.parametrize("now_ms", [19, 20, 1_000])
def test_late_ack_is_good(tenant: Tenant, now_ms: int) -> None:
    """An ack asks no clock: after the lease's end it is good as long as nobody reclaimed the row."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=10)

    assert tenant.run("outbox/ack", ("m1", A), now_ms=now_ms) == [now_ms, "acked"]


def test_ack_after_a_newer_claim_is_lost(tenant: Tenant) -> None:
    """Once another claim has the row, the first token ends nothing; the second does."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=10)
    tenant.claim(B, now_ms=20)
    before = tenant.dump()

    assert tenant.run("outbox/ack", ("m1", A), now_ms=21) == [21, "lost_claim"]
    assert tenant.dump() == before
    assert tenant.run("outbox/ack", ("m1", B), now_ms=21) == [21, "acked"]


def test_ack_after_burial_by_expiry_is_good(tenant: Tenant) -> None:
    """The last holder may ack a row that was buried because its lease had ended."""
    tenant.enqueue(row("m1", attempts_max=1))
    tenant.claim(A, now_ms=10)
    tenant.claim(B, now_ms=20)
    before = tenant.dump()

    assert tenant.run("outbox/ack", ("m1", A), now_ms=21) == [21, "acked"]
    assert tenant.changes(before) == {
        "outbox:dead": {"m1": None},
        "outbox:done": {"m1": 21},
        "outbox:state": {"m1": f"sent acked {A} 21 24 1 1 10000 10 a"},
        "outbox:tally": {
            "dead_bytes": "0",
            "dead_lettered:l:t": "0",
            "done_bytes": "24",
            "sent:l:t": "1",
        },
    }


def test_ack_of_a_parked_row_is_good(tenant: Tenant) -> None:
    """The last holder may ack a row that became unknown."""
    tenant.enqueue(row("m1", on_expiry="park"))
    tenant.claim(A, now_ms=10)
    tenant.claim(B, now_ms=20)

    assert tenant.run("outbox/ack", ("m1", A), now_ms=21) == [21, "acked"]
    assert tenant.row("m1") == f"sent acked {A} 21 21 1 1 10000 10 a"
    assert tenant.tally() == {"sent:l:t": 1, "done_bytes": 21}


@pytest.mark.parametrize("repeated", [0, 1])
def test_second_ack_answers_as_the_first(tenant: Tenant, repeated: int) -> None:
    """With the token that finished it an ack is acked again, asked as a repeat or not."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/ack", ("m1", A), now_ms=12)
    before = tenant.dump()

    assert tenant.run("outbox/ack", ("m1", A), now_ms=13, repeated=repeated) == [13, "acked"]
    assert tenant.dump() == before


@pytest.mark.parametrize("repeated", [0, 1])
@pytest.mark.parametrize(
    ("name", "item"),
    [
        ("outbox/nack", ("m1", A, "", 0, '"x"')),
        ("outbox/nack", ("m1", A, 50, 0, '"x"')),
        ("outbox/release", ("m1", A)),
    ],
)
def test_ack_after_another_end_is_lost(
    tenant: Tenant, name: str, item: tuple[str], repeated: int
) -> None:
    """The token that gave a row back by nack or release cannot ack it afterwards."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=10)
    tenant.run(name, item, now_ms=12)
    before = tenant.dump()

    reply = tenant.run("outbox/ack", ("m1", A), now_ms=13, repeated=repeated)

    assert reply == [13, "lost_claim"]
    assert tenant.dump() == before


@pytest.mark.parametrize(("permanent", "attempts_max"), [(1, 5), (0, 1)])
def test_ack_after_burial_by_nack_is_lost(
    tenant: Tenant, permanent: int, attempts_max: int
) -> None:
    """Who said that a row failed cannot say later that it was delivered."""
    tenant.enqueue(row("m1", attempts_max=attempts_max))
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/nack", ("m1", A, "", permanent, '"x"'), now_ms=12)

    assert tenant.run("outbox/ack", ("m1", A), now_ms=13) == [13, "lost_claim"]


def test_ack_of_what_is_not_claimed_is_lost(tenant: Tenant) -> None:
    """Fresh, missing and cancelled rows cannot be acked."""
    tenant.enqueue("m1", "m2")
    tenant.run("outbox/cancel", ("m2",), now_ms=10)
    before = tenant.dump()

    reply = tenant.run("outbox/ack", ("m1", A), ("m2", A), ("m3", A), ("", A), now_ms=12)

    assert reply == [12, *["lost_claim"] * 4]
    assert tenant.dump() == before


@pytest.mark.parametrize(
    ("id", "repeated", "answer"),
    [
        ("m5", 0, "lost_claim"),
        ("m5", 1, "forgotten"),
        ("m4", 1, "forgotten"),
        ("m51", 1, "lost_claim"),
        ("m6", 1, "lost_claim"),
    ],
)
def test_ack_of_a_deleted_row_is_forgotten_for_a_repeat(
    tenant: Tenant, id: str, repeated: int, answer: str
) -> None:
    """A repeat of a missing row is forgotten up to the largest id deleted; all else is lost_claim."""
    finish(tenant, ["m5"], now_ms=10, keep_ms=0)
    before = tenant.dump()

    assert tenant.run("outbox/ack", (id, A), now_ms=12, repeated=repeated) == [12, answer]
    assert tenant.dump() == before


def test_repeated_ack_of_a_fresh_row_is_lost(tenant: Tenant) -> None:
    """A row that is there, if fresh, is not forgotten, although its id is below the horizon."""
    finish(tenant, ["m5"], now_ms=10, keep_ms=0)
    tenant.enqueue("m4", now_ms=11)

    assert tenant.run("outbox/ack", ("m4", A), now_ms=12, repeated=1) == [12, "lost_claim"]


def test_one_bad_item_harms_no_other(tenant: Tenant) -> None:
    """Items are decided one after the other: refused ones between good ones change nothing."""
    tenant.enqueue("m1", "m2")
    tenant.claim(A, now_ms=10)

    reply = tenant.run(
        "outbox/ack", ("m3", A), ("m1", A), ("m2", B), ("m1", A), ("m1", B), ("m2", A), now_ms=12
    )

    assert reply == [12, "lost_claim", "acked", "lost_claim", "acked", "lost_claim", "acked"]
    assert tenant.tally() == {"sent:l:t": 2, "done_bytes": 48}


@pytest.mark.parametrize("line", ["", "claimed", f"claimed claimed {A} 20", f"sent acked {A}"])
def test_ack_of_a_damaged_row_is_lost(tenant: Tenant, line: str) -> None:
    """A row whose state line cannot be read is not acked, and its neighbours are, and counted."""
    tenant.is_damaged = True
    tenant.enqueue("m1", "m2")
    tenant.claim(A, now_ms=10)
    tenant.raw.hset(tenant.keys.outbox_state, "m1", line)

    assert tenant.run("outbox/ack", ("m1", A), ("m2", A), now_ms=12) == [12, "lost_claim", "acked"]
    assert tenant.row("m1") == line
    assert tenant.tally() == {"claimed:l:t": 1, "sent:l:t": 1, "done_bytes": 24}


# --- retention ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [{"keep_ms": 0}, {"keep_count": 0}, {"keep_bytes": 0}])
def test_retention_0_deletes_at_once(tenant: Tenant, keep: dict[str, int]) -> None:
    """With any bound 0 an acked row is deleted; its id is the horizon, and it counts as sent."""
    finish(tenant, ["m1"], now_ms=10, **keep)

    state = tenant.dump()
    assert state.pop("outbox:tally")["horizon"] == "m1"
    assert state == {
        "fence": "10000",
        "outbox:claims": {"m1".rjust(22, "a"): "10 m1"},
        "outbox:claims_end": {"m1".rjust(22, "a"): 10},
        "outbox:lanes": {"l:t": 0},
    }
    assert tenant.tally() == {"sent:l:t": 1}


@pytest.mark.parametrize(("now_ms", "kept"), [(1_009, ["m1", "m2"]), (1_010, ["m2"])])
def test_retention_by_age(tenant: Tenant, now_ms: int, kept: list[str]) -> None:
    """A finished row goes once it is keep_ms old, to the millisecond."""
    finish(tenant, ["m1"], now_ms=10, keep_ms=1_000)

    finish(tenant, ["m2"], now_ms=now_ms, keep_ms=1_000)

    state = tenant.dump()
    assert list(state["outbox:done"]) == kept
    assert sorted(state["outbox:docs"]) == kept
    assert state["outbox:tally"].get("horizon") == (None if "m1" in kept else "m1")


@pytest.mark.parametrize(("now_ms", "kept"), [(7_202_009, 3), (7_202_010, 1)])
def test_retention_by_age_begins_a_second_an_hour_late(
    tenant: Tenant, now_ms: int, kept: int
) -> None:
    """A little gathers first; then all rows that are keep_ms old go."""
    finish(tenant, ["m1"], now_ms=10, keep_ms=7_200_000)
    finish(tenant, ["m2"], now_ms=1_000, keep_ms=7_200_000)

    finish(tenant, ["m3"], now_ms=now_ms, keep_ms=7_200_000)

    assert len(tenant.dump()["outbox:done"]) == kept


@pytest.mark.parametrize(("first", "kept"), [(1_000, 1_001), (1_001, 1_000)])
def test_retention_by_count_begins_a_row_in_a_thousand_late(
    tenant: Tenant, first: int, kept: int
) -> None:
    """One row more than 1 000 is let be; two are more, and both go."""
    ids = [f"m{i:04}" for i in range(first)]
    tenant.enqueue(*ids[:1_000])
    tenant.enqueue(*ids[1_000:], "n1")
    tenant.run("outbox/cancel", *((id,) for id in ids[:1_000]), now_ms=10, keep_count=2_000)
    tenant.run("outbox/cancel", *((id,) for id in ids[1_000:]), ("x",), now_ms=10, keep_count=2_000)
    tenant.claim(A, now_ms=10)

    tenant.run("outbox/ack", ("n1", A), now_ms=11, keep_count=1_000)

    assert len(tenant.dump()["outbox:done"]) == kept


@pytest.mark.parametrize(("size", "kept"), [(16_384, ["m1", "m2"]), (16_385, ["m2"])])
def test_retention_by_bytes_begins_a_64th_late(tenant: Tenant, size: int, kept: list[str]) -> None:
    """A 64th of 1 MiB more is let be; a byte more, and the oldest rows go."""
    tenant.enqueue(row("m1", payload="x" * (size - 22)))
    tenant.enqueue(row("m2", payload="x" * (MEGABYTE - 22)))
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/ack", ("m1", A), now_ms=10, keep_bytes=10 * MEGABYTE)

    tenant.run("outbox/ack", ("m2", A), now_ms=11, keep_bytes=MEGABYTE)

    assert list(tenant.dump()["outbox:done"]) == kept


@pytest.mark.parametrize(("keep_count", "kept"), [(3, 3), (2, 2), (1, 1)])
def test_retention_by_count(tenant: Tenant, keep_count: int, kept: int) -> None:
    """No more than keep_count finished rows are kept, the newest."""
    finish(tenant, ["m1"], now_ms=10)
    finish(tenant, ["m2"], now_ms=11)
    finish(tenant, ["m3"], now_ms=12, keep_count=keep_count)

    assert list(tenant.dump()["outbox:done"]) == ["m1", "m2", "m3"][-kept:]


@pytest.mark.parametrize(("keep_bytes", "kept"), [(72, 3), (71, 2), (48, 2), (47, 1), (23, 0)])
def test_retention_by_bytes(tenant: Tenant, keep_bytes: int, kept: int) -> None:
    """Finished rows of no more than keep_bytes bytes are kept, the newest."""
    finish(tenant, ["m1"], now_ms=10)
    finish(tenant, ["m2"], now_ms=11)
    finish(tenant, ["m3"], now_ms=12, keep_bytes=keep_bytes)

    assert list(tenant.dump().get("outbox:done", {})) == ["m1", "m2", "m3"][3 - kept :]
    assert tenant.tally().get("done_bytes", 0) == 24 * kept


@pytest.mark.parametrize("keep", [{"keep_ms": 0}, {"keep_count": 0}, {"keep_bytes": 0}])
def test_retention_0_deletes_all_rows_of_a_call(tenant: Tenant, keep: dict[str, int]) -> None:
    """Deleting at once has no bound but that of the call: none of 600 acked rows stays."""
    ids = [f"m{i:03}" for i in range(600)]
    tenant.enqueue(*ids)
    tenant.claim(A, now_ms=10, limit=600)

    tenant.run("outbox/ack", *((id, A) for id in ids), now_ms=11, **keep)

    assert not tenant.dump().keys() & {"outbox:docs", "outbox:state", "outbox:done"}
    assert tenant.tally() == {"sent:l:t": 600}


def test_retention_counts_rows_of_all_routes(tenant: Tenant) -> None:
    """Bounds are the tenant's: an ack on one route forgets rows of another."""
    finish(tenant, ["m1"], now_ms=10)
    tenant.enqueue(row("m2", route="l:u"), route="l:u")
    tenant.claim(B, now_ms=11, route="l:u")

    tenant.run("outbox/ack", ("m2", B), now_ms=12, route="l:u", keep_count=1)

    assert tenant.dump()["outbox:done"] == {"m2": 12}
    assert tenant.tally() == {"sent:l:t": 1, "sent:l:u": 1, "done_bytes": 24}


@pytest.mark.parametrize(("items", "left"), [(1, 40 + 1 - 12), (3, 40 + 3 - 16)])
def test_ack_forgets_2n_plus_10_rows(tenant: Tenant, items: int, left: int) -> None:
    """A call of n acks forgets up to 2n + 10 rows."""
    tenant.enqueue(*(f"m{i:02}" for i in range(40)))
    tenant.claim(A, now_ms=10, limit=40)
    tenant.run("outbox/ack", *((f"m{i:02}", A) for i in range(40)), now_ms=10)
    tenant.enqueue(*(f"n{i}" for i in range(items)))
    tenant.claim(B, now_ms=20, limit=items)

    tenant.run("outbox/ack", *((f"n{i}", B) for i in range(items)), now_ms=1_010)

    assert len(tenant.dump()["outbox:done"]) == left


def test_ack_forgets_no_more_than_250_rows(tenant: Tenant) -> None:
    """However many items a call has, it forgets up to 250 rows."""
    ids = [f"m{i:04}" for i in range(900)]
    tenant.enqueue(*ids)
    tenant.claim(A, now_ms=10, limit=600)
    tenant.run("outbox/ack", *((id, A) for id in ids[:600]), now_ms=10, keep_count=1_000)
    tenant.claim(B, now_ms=11, limit=300)

    tenant.run("outbox/ack", *((id, B) for id in ids[600:]), now_ms=2_000, keep_count=1_000)

    assert len(tenant.dump()["outbox:done"]) == 900 - 250


def test_horizon_is_the_largest_id_deleted(tenant: Tenant) -> None:
    """The horizon never falls: a smaller id deleted later leaves it."""
    finish(tenant, ["m5", "m3"], now_ms=10, keep_ms=0)
    assert tenant.dump()["outbox:tally"]["horizon"] == "m5"

    finish(tenant, ["m6", "m50"], now_ms=10, keep_ms=0)
    assert tenant.dump()["outbox:tally"]["horizon"] == "m6"


def test_only_acked_calls_forget(tenant: Tenant) -> None:
    """An ack that finishes nothing forgets nothing."""
    finish(tenant, ["m1"], now_ms=10)

    tenant.run("outbox/ack", ("m2", C), now_ms=5_000)

    assert tenant.dump()["outbox:done"] == {"m1": 10}
