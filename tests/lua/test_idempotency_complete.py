"""idempotency/complete: who reserved the key says what the first use led to."""

from __future__ import annotations

import pytest
from lua.commands import A, B, Tenant

MISS = ["", "~", A[:-1], A[1:], A + "a", f"{A} 10", B, A + "\n"]


@pytest.fixture
def reserved(tenant: Tenant) -> Tenant:
    """r1, reserved by A at 10, its first attempt until 30."""
    tenant.run("idempotency/reserve", ("r1", A, "f", 20, "", "reclaim", "{}"), now_ms=10)
    return tenant


def test_complete_stores_the_outcome(reserved: Tenant) -> None:
    """A completed record has the outcome and is kept for keep_ms."""
    before = reserved.dump()

    reply = reserved.run("idempotency/complete", ("r1", A, 1_000, '{"ok":1}'), now_ms=12)

    record = f'completed {A} 10 12 30 1012 0 reclaim 12\nf\n{{}}\n{{"ok":1}}'
    assert reply == [12, ["completed", record]]
    assert reserved.changes(before) == {
        "idempotency:docs": {"r1": record},
        "idempotency:due": {"r1": 1_012},
    }


@pytest.mark.parametrize("token", MISS)
@pytest.mark.parametrize("repeated", [0, 1])
def test_complete_needs_exactly_the_token(reserved: Tenant, token: str, repeated: int) -> None:
    """Anything but the very token is lost and writes nothing."""
    before = reserved.dump()

    item = ("r1", token, 1_000, "{}")
    reply = reserved.run("idempotency/complete", item, now_ms=12, repeated=repeated)

    assert reply == [12, "lost"]
    assert reserved.dump() == before


@pytest.mark.parametrize("now_ms", [29, 30, 1_000])
def test_late_complete_is_good(reserved: Tenant, now_ms: int) -> None:
    """No clock is asked: as long as nobody reserved the key anew, the outcome is the truth."""
    reply = reserved.run("idempotency/complete", ("r1", A, 1_000, "{}"), now_ms=now_ms)

    assert reply[1][0] == "completed"


def test_complete_after_another_reservation_is_lost(reserved: Tenant) -> None:
    """A first attempt that was overtaken does not overwrite the second one's record."""
    reserved.run("idempotency/reserve", ("r1", B, "f", 20, "", "reclaim", "{}"), now_ms=30)
    before = reserved.dump()

    assert reserved.run("idempotency/complete", ("r1", A, 1_000, "{}"), now_ms=31) == [31, "lost"]
    assert reserved.dump() == before


@pytest.mark.parametrize(("repeated", "outcome"), [(0, "[2]"), (1, "[1]")])
def test_second_complete(reserved: Tenant, repeated: int, outcome: str) -> None:
    """A repeat keeps the first outcome; a second completion replaces it. The end stays."""
    reserved.run("idempotency/complete", ("r1", A, 1_000, "[1]"), now_ms=12)
    before = reserved.dump()

    item = ("r1", A, 2_000, "[2]")
    reply = reserved.run("idempotency/complete", item, now_ms=13, repeated=repeated)

    assert reply[1][0] == "completed"
    assert reply[1][1].split("\n")[3] == outcome
    assert reserved.dump()["idempotency:due"] == {"r1": 1_012}
    assert (reserved.dump() == before) == (repeated == 1)


def test_repeated_complete_that_never_arrived_is_applied(reserved: Tenant) -> None:
    """A repeat of a key without outcome completes it."""
    item = ("r1", A, 1_000, "[1]")
    reply = reserved.run("idempotency/complete", item, now_ms=12, repeated=1)

    assert reply[1][1].endswith("\n[1]")


def test_complete_of_a_conflicted_key(reserved: Tenant) -> None:
    """A conflicted key is completed; what conflicted stays noted."""
    reserved.run("idempotency/reserve", ("r1", B, "g", "", "", "reclaim", "{}"), now_ms=11)

    reply = reserved.run("idempotency/complete", ("r1", A, 1_000, "[1]"), now_ms=12)

    assert reply == [12, ["completed", f"completed {A} 10 12 30 1012 1 reclaim 12\nf g\n{{}}\n[1]"]]


def test_complete_keeps_the_keys_own_end(tenant: Tenant) -> None:
    """A key with an end of its own keeps it, whatever keep_ms says."""
    tenant.run("idempotency/reserve", ("r1", A, "f", "", 100, "reclaim", "{}"), now_ms=10)

    tenant.run("idempotency/complete", ("r1", A, 1_000, "{}"), now_ms=12)

    assert tenant.dump()["idempotency:due"] == {"r1": 100}


@pytest.mark.parametrize("repeated", [0, 1])
def test_complete_of_a_missing_key(tenant: Tenant, repeated: int) -> None:
    """Without a record there is nothing to complete."""
    item = ("r1", A, 1_000, "{}")
    reply = tenant.run("idempotency/complete", item, now_ms=12, repeated=repeated)

    assert reply == [12, "missing"]
    assert tenant.dump() == {}


def test_complete_of_a_released_key_is_missing(reserved: Tenant) -> None:
    """What was released is not completed afterwards."""
    reserved.run("idempotency/release", ("r1", A, ""), now_ms=11)
    before = reserved.dump()

    assert reserved.run("idempotency/complete", ("r1", A, 1_000, "{}"), now_ms=12) == [
        12,
        "missing",
    ]
    assert reserved.dump() == before


@pytest.mark.parametrize("outcome", ["", "two\nlines\n", "nul\0", "é\udcff"])
def test_outcome_is_any_bytes(reserved: Tenant, outcome: str) -> None:
    """An outcome of any bytes comes back as it was."""
    reserved.run("idempotency/complete", ("r1", A, 1_000, outcome), now_ms=12)

    reply = reserved.run("idempotency/get", ("r1",), now_ms=13)
    assert reply[1][1].split("\n", 3)[3] == outcome


def test_items_are_completed_one_after_the_other(reserved: Tenant) -> None:
    """The later item of a call sees the earlier; refused ones between good ones harm nobody."""
    reply = reserved.run(
        "idempotency/complete",
        *(("r1", B, 1, "0"), ("r1", A, 1_000, "[1]"), ("r2", A, 1, "0"), ("r1", A, 5, "[2]")),
        now_ms=12,
        repeated=1,
    )

    record = f"completed {A} 10 12 30 1012 0 reclaim 12\nf\n{{}}\n[1]"
    assert reply == [12, "lost", ["completed", record], "missing", ["completed", record]]


@pytest.mark.parametrize("now_ms", [1_011, 1_012])
def test_complete_deletes_records_that_are_over_but_its_own(reserved: Tenant, now_ms: int) -> None:
    """Records that may be forgotten are deleted, never those that the call is about."""
    reserved.run("idempotency/complete", ("r1", A, 1_000, "{}"), now_ms=12)
    reserved.run("idempotency/reserve", ("r2", A, "f", "", "", "reclaim", "{}"), now_ms=12)

    reserved.run("idempotency/complete", ("r1", B, 1, "{}"), ("r2", A, 1, "{}"), now_ms=now_ms)
    assert sorted(reserved.dump()["idempotency:docs"]) == ["r1", "r2"]

    reserved.run("idempotency/complete", ("r3", A, 1, "{}"), now_ms=now_ms)
    assert ("r1" in reserved.dump()["idempotency:docs"]) == (now_ms < 1_012)
