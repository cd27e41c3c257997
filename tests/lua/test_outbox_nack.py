"""outbox/nack: a row that was not delivered waits for its next attempt, or is buried."""

from __future__ import annotations

import pytest
from lua.commands import A, B, C, Tenant, row

MISS = ["", "~", A[:-1], A[1:], A + "a", f"{A} 20", B, A + "\n"]


def nack(
    id: str, token: str, retry_at: str | int = "", *, permanent: int = 0
) -> tuple[object, ...]:
    return (id, token, retry_at, permanent, '"busy"')


@pytest.fixture
def claimed(tenant: Tenant) -> Tenant:
    """m1 with two attempts and m2 with one, claimed by A at 10 until 20."""
    tenant.enqueue("m1", row("m2", attempts_max=1))
    tenant.claim(A, now_ms=10)
    return tenant


def test_nack_lets_a_row_wait_for_its_next_attempt(claimed: Tenant) -> None:
    """With attempts left a nacked row is pending until retry_at, with one error line more."""
    before = claimed.dump()

    reply = claimed.run("outbox/nack", nack("m1", A, 50), now_ms=12)

    assert reply == [12, ["requeued", 50]]
    assert claimed.changes(before) == {
        "outbox:due:l:t": {"m1": 50},
        "outbox:errors": {"m1": '12 requeued 1 10000 "busy"'},
        "outbox:state": {"m1": f"pending requeued {A} 50 24 1 1 10000 10 a"},
        "outbox:tally": {"pending:l:t": "1", "claimed:l:t": "1"},
    }


@pytest.mark.parametrize(("retry_at", "due_at"), [("", 12), (0, 0), (5, 5), (2**53 - 1, 2**53 - 1)])
def test_nack_takes_any_instant(claimed: Tenant, retry_at: str | int, due_at: int) -> None:
    """Without retry_at a row is due at once; the past and the farthest future are allowed."""
    reply = claimed.run("outbox/nack", nack("m1", A, retry_at), now_ms=12)

    assert reply == [12, ["requeued", due_at]]
    assert claimed.dump()["outbox:due:l:t"]["m1"] == due_at


def test_nack_buries_a_row_whose_attempts_are_used_up(claimed: Tenant) -> None:
    """On its last attempt a nacked row is dead-lettered, whatever retry_at says."""
    before = claimed.dump()

    reply = claimed.run("outbox/nack", nack("m2", A, 50), now_ms=12)

    assert reply == [12, "dead_lettered"]
    assert claimed.changes(before) == {
        "outbox:dead": {"m2": 12},
        "outbox:due:l:t": {"m2": None},
        "outbox:errors": {"m2": '12 nacked 1 10000 "busy"'},
        "outbox:state": {"m2": f"dead_lettered nacked {A} 12 24 1 1 10000 10 a"},
        "outbox:tally": {"claimed:l:t": "1", "dead_lettered:l:t": "1", "dead_bytes": "24"},
    }


@pytest.mark.parametrize("id", ["m1", "m2"])
def test_permanent_nack_buries_at_once(claimed: Tenant, id: str) -> None:
    """A permanent nack dead-letters whatever attempts are left."""
    reply = claimed.run("outbox/nack", nack(id, A, 50, permanent=1), now_ms=12)

    assert reply == [12, "dead_lettered"]
    assert claimed.row(id) == f"dead_lettered permanent {A} 12 24 1 1 10000 10 a"
    assert claimed.dump()["outbox:errors"] == {id: '12 permanent 1 10000 "busy"'}


@pytest.mark.parametrize(
    ("attempts_max", "status"), [(1, "dead_lettered"), (2, "pending"), (0, "pending")]
)
def test_nack_counts_attempts_against_their_maximum(
    tenant: Tenant, attempts_max: int, status: str
) -> None:
    """attempts_max N allows N claims; 0 is without end."""
    tenant.enqueue(row("m1", attempts_max=attempts_max))
    tenant.claim(A, now_ms=10)

    tenant.run("outbox/nack", nack("m1", A), now_ms=12)

    assert tenant.row("m1").split()[0] == status


def test_expired_leases_use_up_attempts(tenant: Tenant) -> None:
    """A claim that expired counts: two attempts, one expired, one nacked, and the row is buried."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=10)
    tenant.claim(B, now_ms=20)

    assert tenant.run("outbox/nack", nack("m1", B), now_ms=21) == [21, "dead_lettered"]


@pytest.mark.parametrize("token", MISS)
@pytest.mark.parametrize("repeated", [0, 1])
def test_nack_needs_exactly_the_token(claimed: Tenant, token: str, repeated: int) -> None:
    """Anything but the very token is lost_claim and writes nothing."""
    before = claimed.dump()

    reply = claimed.run("outbox/nack", nack("m1", token), now_ms=12, repeated=repeated)

    assert reply == [12, "lost_claim"]
    assert claimed.dump() == before


@pytest.mark.parametrize("now_ms", [19, 20, 1_000])
def test_late_nack_is_good(claimed: Tenant, now_ms: int) -> None:
    """A nack asks no clock, as long as nobody reclaimed the row."""
    reply = claimed.run("outbox/nack", nack("m1", A, 50), now_ms=now_ms)

    assert reply == [now_ms, ["requeued", 50]]


def test_nack_after_a_newer_claim_is_lost(claimed: Tenant) -> None:
    """Once another claim has the row, the first token cannot give it back."""
    claimed.claim(B, now_ms=20)
    before = claimed.dump()

    assert claimed.run("outbox/nack", nack("m1", A), now_ms=21) == [21, "lost_claim"]
    assert claimed.dump() == before


@pytest.mark.parametrize("repeated", [0, 1])
@pytest.mark.parametrize(
    ("id", "permanent", "answer"),
    [("m1", 0, ["requeued", 50]), ("m1", 1, "dead_lettered"), ("m2", 0, "dead_lettered")],
)
def test_second_nack_answers_as_the_first(
    claimed: Tenant, id: str, permanent: int, answer: object, repeated: int
) -> None:
    """A nack by the token that ended the claim gives the first answer, and the first retry_at."""
    claimed.run("outbox/nack", nack(id, A, 50, permanent=permanent), now_ms=12)
    before = claimed.dump()

    reply = claimed.run("outbox/nack", nack(id, A, 70), now_ms=13, repeated=repeated)

    assert reply == [13, answer]
    assert claimed.dump() == before


@pytest.mark.parametrize("name", ["outbox/ack", "outbox/release"])
@pytest.mark.parametrize("repeated", [0, 1])
def test_nack_after_another_end_is_lost(claimed: Tenant, name: str, repeated: int) -> None:
    """The token that acked or released a row cannot nack it afterwards."""
    claimed.run(name, ("m1", A), now_ms=12)
    before = claimed.dump()

    reply = claimed.run("outbox/nack", nack("m1", A), now_ms=13, repeated=repeated)

    assert reply == [13, "lost_claim"]
    assert claimed.dump() == before


def test_repeated_nack_after_a_newer_claim_is_lost(claimed: Tenant) -> None:
    """Once the row that was given back is claimed anew, the first token is lost_claim."""
    claimed.run("outbox/nack", nack("m1", A), now_ms=12)
    claimed.claim(B, now_ms=13)

    reply = claimed.run("outbox/nack", nack("m1", A), now_ms=14, repeated=1)

    assert reply == [14, "lost_claim"]


@pytest.mark.parametrize(
    ("id", "repeated", "answer"),
    [("m5", 0, "lost_claim"), ("m5", 1, "forgotten"), ("m6", 1, "lost_claim")],
)
def test_nack_of_a_deleted_row_is_forgotten_for_a_repeat(
    tenant: Tenant, id: str, repeated: int, answer: str
) -> None:
    """A repeat of a missing row is forgotten up to the horizon, lost_claim above it."""
    tenant.enqueue("m5")
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/nack", nack("m5", A, permanent=1), now_ms=11, dead_keep_count=0)

    reply = tenant.run("outbox/nack", nack(id, A), now_ms=12, repeated=repeated)

    assert reply == [12, answer]


def test_nack_of_a_parked_row_is_good(tenant: Tenant) -> None:
    """The last holder of an unknown row may say that it was not delivered."""
    tenant.enqueue(row("m1", on_expiry="park"), row("m2", on_expiry="park", attempts_max=1))
    tenant.claim(A, now_ms=10)
    tenant.claim(B, now_ms=20)

    reply = tenant.run("outbox/nack", nack("m1", A, 50), nack("m2", A), now_ms=21)

    assert reply == [21, ["requeued", 50], "dead_lettered"]
    assert tenant.tally() == {"pending:l:t": 1, "dead_lettered:l:t": 1, "dead_bytes": 21}


def test_nack_of_a_row_buried_by_expiry_is_dead_lettered(tenant: Tenant) -> None:
    """The last holder of a row that was buried at its lease's end hears so, and nothing changes."""
    tenant.enqueue(row("m1", attempts_max=1))
    tenant.claim(A, now_ms=10)
    tenant.claim(B, now_ms=20)
    before = tenant.dump()

    assert tenant.run("outbox/nack", nack("m1", A), now_ms=21) == [21, "dead_lettered"]
    assert tenant.dump() == before


def test_two_items_for_one_row_end_it_once(claimed: Tenant) -> None:
    """The second of two items for a row gets the answer of the first; other tokens are lost."""
    reply = claimed.run(
        "outbox/nack", nack("m3", A), nack("m1", B), nack("m1", A, 50), nack("m1", A, 60), now_ms=12
    )

    assert reply == [12, "lost_claim", "lost_claim", ["requeued", 50], ["requeued", 50]]
    assert claimed.dump()["outbox:errors"] == {"m1": '12 requeued 1 10000 "busy"'}


def test_errors_are_kept_up_to_10(tenant: Tenant) -> None:
    """A row keeps its ten latest errors, the oldest first."""
    tenant.enqueue(row("m1", attempts_max=0))
    for attempt in range(1, 13):
        tenant.claim(f"{attempt:022}", now_ms=attempt)
        item = ("m1", f"{attempt:022}", "", 0, f'"error {attempt}"')
        tenant.run("outbox/nack", item, now_ms=attempt)

    assert tenant.dump()["outbox:errors"]["m1"].split("\n") == [
        f'{attempt} requeued {attempt} {attempt}000 "error {attempt}"' for attempt in range(3, 13)
    ]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({"dead_keep_count": 0}, []),
        ({"dead_keep_count": 1}, ["m2"]),
        ({"dead_keep_count": 2}, ["m1", "m2"]),
        ({"dead_keep_ms": 0}, []),
        ({"dead_keep_ms": 1}, ["m2"]),
        ({"dead_keep_ms": 2}, ["m1", "m2"]),
    ],
)
def test_dead_letters_are_kept_by_age_and_count(
    tenant: Tenant, keep: dict[str, int], kept: list[str]
) -> None:
    """Dead letters go at dead_keep_ms, to the millisecond, and beyond dead_keep_count; 0 keeps none."""
    tenant.enqueue("m1", "m2")
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/nack", nack("m1", A, permanent=1), now_ms=11)

    tenant.run("outbox/nack", nack("m2", A, permanent=1), now_ms=12, **keep)

    assert list(tenant.dump().get("outbox:dead", {})) == kept
    assert tenant.tally().get("dead_lettered:l:t", 0) == len(kept)


def test_dead_letters_of_all_routes_share_the_bounds(tenant: Tenant) -> None:
    """Forgetting a dead letter of another route is counted for that route."""
    tenant.enqueue(row("m1", route="l:u"), route="l:u")
    tenant.enqueue("m2")
    tenant.claim(A, now_ms=10, route="l:u")
    tenant.claim(B, now_ms=10)
    tenant.run("outbox/nack", nack("m1", A, permanent=1), now_ms=11, route="l:u")

    tenant.run("outbox/nack", nack("m2", B, permanent=1), now_ms=12, dead_keep_count=1)

    assert tenant.dump()["outbox:dead"] == {"m2": 12}
    assert tenant.tally() == {"dead_lettered:l:t": 1, "dead_bytes": 24}


def test_nack_forgets_2n_plus_10_dead_letters(tenant: Tenant) -> None:
    """A call of n nacks forgets up to 2n + 10 dead letters."""
    ids = [f"m{i:02}" for i in range(20)]
    tenant.enqueue(*ids, "n1")
    tenant.claim(A, now_ms=10, limit=20)
    tenant.run("outbox/nack", *(nack(id, A, permanent=1) for id in ids), now_ms=11)
    tenant.claim(B, now_ms=12)

    tenant.run("outbox/nack", nack("n1", B, permanent=1), now_ms=2_000)

    assert len(tenant.dump()["outbox:dead"]) == 20 + 1 - 12


def test_nack_of_a_damaged_row_is_lost(claimed: Tenant) -> None:
    """A row whose state line cannot be read is not nacked, and its neighbours are."""
    claimed.is_damaged = True
    claimed.raw.hset(claimed.keys.outbox_state, "m1", f"claimed claimed {A} 20")

    reply = claimed.run("outbox/nack", nack("m1", A), nack("m2", A), now_ms=12)

    assert reply == [12, "lost_claim", "dead_lettered"]


def test_nack_after_redrive_is_lost(claimed: Tenant) -> None:
    """A redriven row has no token: its last holder cannot bury it again."""
    claimed.run("outbox/nack", nack("m1", A, permanent=1), now_ms=12)
    claimed.run("outbox/redrive", ("m1",), now_ms=13)

    assert claimed.run("outbox/nack", nack("m1", A), now_ms=14) == [14, "lost_claim"]
    assert claimed.ids_claimed(C, now_ms=14) == ["m1"]
