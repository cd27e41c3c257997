"""outbox/claim: due rows go to one holder at a time, in order, within bounds."""

from __future__ import annotations

import pytest
from lua.commands import A, B, C, D, Tenant, ids_of, row

HEADER = "0 0 2 reclaim l:t ~ ~"
DOC = f"{HEADER}\n{{}}"
BURIED = '20 expired 1 10000 "lease expired; max attempts reached"'
MEGABYTE = 1 << 20


def test_claim_takes_a_due_row(tenant: Tenant) -> None:
    """A claimed row has the claim's token, a fence, one attempt more, and stands at its lease end."""
    tenant.enqueue("m1")
    before = tenant.dump()

    reply = tenant.run("outbox/claim", (A, 5, "worker 1"), now_ms=10, lease_ms=20)

    assert reply == [10, 30, 0, [], ["claimed", "10000", 30, "m1", DOC, 1, 1, ""]]
    assert tenant.changes(before) == {
        "fence": "10000",
        "outbox:claims": {A: "30 m1"},
        "outbox:claims_end": {A: 30},
        "outbox:due:l:t": {"m1": 30},
        "outbox:state": {"m1": f"claimed claimed {A} 30 24 1 1 10000 10 worker 1"},
        "outbox:tally": {"pending:l:t": "0", "claimed:l:t": "1"},
    }


def test_claim_of_nothing_writes_nothing(tenant: Tenant) -> None:
    """A claim that takes no row leaves no trace: no record, no fence."""
    assert tenant.claim(A, now_ms=10) == [10, 0, 0, [], ["none"]]
    assert tenant.dump() == {}


@pytest.mark.parametrize(("now_ms", "ids"), [(29, []), (30, ["m1"]), (31, ["m1"])])
def test_claim_takes_a_row_from_its_available_at_on(
    tenant: Tenant, now_ms: int, ids: list[str]
) -> None:
    """A row may be claimed at available_at itself, and not a millisecond before."""
    tenant.enqueue(row("m1", available_at=30))

    reply = tenant.claim(A, now_ms=now_ms)

    assert ids_of(reply[4]) == ids
    assert reply[1] == (now_ms + 10 if ids else 30)


@pytest.mark.parametrize(("now_ms", "ids"), [(19, []), (20, ["m1"]), (21, ["m1"])])
def test_claim_takes_a_row_from_its_lease_end_on(
    tenant: Tenant, now_ms: int, ids: list[str]
) -> None:
    """A claimed row may be claimed anew at its lease end itself, and not a millisecond before."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=10)

    assert tenant.ids_claimed(B, now_ms=now_ms) == ids
    assert tenant.row("m1").split()[2] == (B if ids else A)


def test_claim_of_an_expired_row_counts_another_attempt(tenant: Tenant) -> None:
    """A reclaimed row has the new token, a higher fence and one attempt and one claim more."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=10)

    reply = tenant.claim(B, now_ms=20, consumer="b")

    assert reply == [20, 30, 0, [], ["claimed", "20000", 30, "m1", DOC, 2, 2, ""]]
    assert tenant.row("m1") == f"claimed claimed {B} 30 24 2 2 20000 20 b"
    assert tenant.tally() == {"claimed:l:t": 1}


def test_claim_goes_by_due_time_then_id(tenant: Tenant) -> None:
    """Rows stand by the moment at which they became due, then by id; an expired one by its end."""
    tenant.enqueue("m9", row("m3", available_at=20), row("m2", available_at=20), "m0")
    assert tenant.ids_claimed(A, now_ms=10, limit=1) == ["m0"]
    tenant.enqueue(row("m1", available_at=19))

    assert tenant.ids_claimed(B, now_ms=30) == ["m9", "m1", "m0", "m2", "m3"]


def test_claim_leaves_other_routes_alone(tenant: Tenant) -> None:
    """A claim takes rows of its own route only."""
    tenant.enqueue("m1")
    tenant.enqueue(row("m2", route="l:u"), route="l:u")

    assert tenant.ids_claimed(A, now_ms=10, route="l:u") == ["m2"]
    assert tenant.tally() == {"pending:l:t": 1, "claimed:l:u": 1}


def test_claims_of_one_call_share_the_rows_in_order(tenant: Tenant) -> None:
    """Several claims of a call get the due rows one after the other, under one fence."""
    tenant.enqueue("m1", "m2", "m3", "m4")

    reply = tenant.run(
        "outbox/claim", (A, 2, "a"), (B, 0, "b"), (C, 1, "c"), (D, 5, "d"), now_ms=10
    )

    assert [ids_of(answer) for answer in reply[4:]] == [["m1", "m2"], [], ["m3"], ["m4"]]
    assert reply[5] == ["none"]
    assert {answer[1] for answer in (reply[4], reply[6], reply[7])} == {"10000"}
    assert tenant.dump()["outbox:claims"] == {A: "20 m1 m2", C: "20 m3", D: "20 m4"}
    assert tenant.row("m3") == f"claimed claimed {C} 20 24 1 1 10000 10 c"


@pytest.mark.parametrize(
    ("limit", "more", "next_due"), [(0, 0, 0), (1, 1, 0), (2, 0, 20), (3, 0, 20), (1000, 0, 20)]
)
def test_claim_says_whether_more_is_due_and_when(
    tenant: Tenant, limit: int, more: int, next_due: int
) -> None:
    """`more` is 1 if further rows are due now; else next_due is the first instant in the line."""
    tenant.enqueue("m1", "m2")
    expected = [10, next_due, more]

    assert tenant.claim(A, now_ms=10, limit=limit)[:3] == expected


def test_claim_takes_no_more_than_1000_rows_in_sum(tenant: Tenant) -> None:
    """The limits of all claims of a call sum up to 1 000 rows at most."""
    assert tenant.run("outbox/claim", (A, 999, "a"), (B, 1, "b"), now_ms=10)[4:] == [["none"]] * 2
    error = tenant.refusal("outbox/claim", (A, 1_000, "a"), (B, 1, "b"), now_ms=10)
    assert error == "LK_ARGUMENT limit"


def test_claim_for_no_time_is_over_at_once(tenant: Tenant) -> None:
    """A lease of 0 ms is legal: the row may be claimed anew at the same instant."""
    tenant.enqueue(row("m1", attempts_max=0))

    assert tenant.ids_claimed(A, now_ms=10, lease_ms=0) == ["m1"]
    assert tenant.ids_claimed(B, now_ms=10, lease_ms=0) == ["m1"]


def test_claim_hands_out_the_errors_of_a_row(tenant: Tenant) -> None:
    """A row that was tried before comes with its error lines."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/nack", ("m1", A, 15, 0, '"busy"'), now_ms=12)

    assert tenant.claim(B, now_ms=15)[4][3:] == ["m1", DOC, 2, 2, '12 requeued 1 10000 "busy"']


# --- a claim that was made before -----------------------------------------------------------------


def test_claim_delivered_twice_takes_nothing_more(tenant: Tenant) -> None:
    """A claim id on record gets the rows that it still holds, in the first order, and no others."""
    tenant.enqueue("m1", "m2", "m3", "m4")
    first = tenant.claim(A, now_ms=10, limit=3)
    tenant.run("outbox/ack", ("m2", A), now_ms=11)
    before = tenant.dump()

    again = tenant.claim(A, now_ms=12, limit=3)

    assert ids_of(first[4]) == ["m1", "m2", "m3"]
    assert again[4] == ["claimed", "10000", 20, "m1", DOC, 1, 1, "", "m3", DOC, 1, 1, ""]
    assert tenant.dump() == before


@pytest.mark.parametrize("id", ["m1", "m2"])
def test_claim_delivered_twice_tells_the_earliest_lease_end(tenant: Tenant, id: str) -> None:
    """A repeated claim is told the end that holds for all of its rows."""
    tenant.enqueue("m1", "m2")
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/extend", (id, A, 20), now_ms=11)

    assert tenant.claim(A, now_ms=12)[4][:3] == ["claimed", "10000", 20]


def test_claim_delivered_twice_after_all_rows_ended_gets_none(tenant: Tenant) -> None:
    """A claim on record that holds nothing any more gets none, although rows are due."""
    tenant.enqueue("m1", "m2")
    tenant.claim(A, now_ms=10, limit=1)
    tenant.run("outbox/ack", ("m1", A), now_ms=11)

    assert tenant.claim(A, now_ms=12)[4] == ["none"]
    assert tenant.tally()["pending:l:t"] == 1


def test_one_claim_id_twice_in_a_call_takes_once(tenant: Tenant) -> None:
    """The second of two items with one claim id takes nothing."""
    tenant.enqueue("m1", "m2")

    reply = tenant.run("outbox/claim", (A, 1, "a"), (A, 1, "a"), now_ms=10)

    assert [ids_of(answer) for answer in reply[4:]] == [["m1"], []]


def test_repeated_claim_does_not_hold_what_its_call_hands_out(tenant: Tenant) -> None:
    """A repeat that shares a call with the claim that takes its expired rows does not get them."""
    tenant.enqueue("m1", "m2")
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/extend", ("m2", A, 30), now_ms=11)

    reply = tenant.run("outbox/claim", (A, 2, "a"), (B, 2, "b"), now_ms=20)

    assert [ids_of(answer) for answer in reply[4:]] == [["m2"], ["m1"]]


def test_claim_record_goes_after_its_lease_end(tenant: Tenant) -> None:
    """A claim deletes the records whose lease end has come, not those that run."""
    tenant.enqueue("m1", "m2")
    tenant.claim(A, now_ms=10, limit=1)
    tenant.claim(B, now_ms=11, limit=1)

    tenant.claim(C, now_ms=20, limit=0)

    assert tenant.dump()["outbox:claims"] == {B: "21 m2"}


def test_claim_deletes_2n_plus_10_records(tenant: Tenant) -> None:
    """A call of n claims deletes up to 2n + 10 records."""
    tenant.enqueue(*(f"m{i:02}" for i in range(20)))
    tenant.run("outbox/claim", *((f"{i:022}", 1, "a") for i in range(20)), now_ms=10)

    tenant.claim(A, now_ms=20, limit=0)

    assert len(tenant.dump()["outbox:claims"]) == 20 - 12


# --- leases that ended ----------------------------------------------------------------------------


def test_claim_buries_a_row_whose_attempts_are_used_up(tenant: Tenant) -> None:
    """An expired row on its last attempt is dead-lettered with an error; it keeps its last token."""
    tenant.enqueue(row("m1", attempts_max=1))
    tenant.claim(A, now_ms=10)
    before = tenant.dump()

    reply = tenant.claim(B, now_ms=20)

    assert reply == [20, 0, 0, [], ["none"]]
    assert tenant.changes(before) == {
        "outbox:claims": {A: None},
        "outbox:claims_end": {A: None},
        "outbox:dead": {"m1": 20},
        "outbox:due:l:t": {"m1": None},
        "outbox:errors": {"m1": BURIED},
        "outbox:state": {"m1": f"dead_lettered expired {A} 20 24 1 1 10000 10 a"},
        "outbox:tally": {"claimed:l:t": "0", "dead_lettered:l:t": "1", "dead_bytes": "24"},
    }


@pytest.mark.parametrize(("attempts_max", "ids"), [(1, []), (2, ["m1"]), (0, ["m1"])])
def test_claim_hands_out_a_row_with_attempts_left(
    tenant: Tenant, attempts_max: int, ids: list[str]
) -> None:
    """An expired row is handed out while attempts are left; attempts_max 0 is without end."""
    tenant.enqueue(row("m1", attempts_max=attempts_max))
    tenant.claim(A, now_ms=10)

    assert tenant.ids_claimed(B, now_ms=20) == ids


def test_claim_hands_out_a_pending_row_beyond_its_attempts(tenant: Tenant) -> None:
    """Only an expired lease buries: a row that waits is handed out, whatever its attempts."""
    tenant.enqueue(row("m1", attempts_max=2))
    for token, now_ms in ((A, 10), (B, 20)):
        tenant.claim(token, now_ms=now_ms)
    tenant.run("outbox/release", ("m1", B), now_ms=21)

    assert tenant.ids_claimed(C, now_ms=22) == ["m1"]


def test_claim_parks_a_row_that_says_so(tenant: Tenant) -> None:
    """An expired row that parks becomes unknown, keeps its last token, and is not handed out."""
    tenant.enqueue(row("m1", on_expiry="park"))
    tenant.claim(A, now_ms=10)
    before = tenant.dump()

    reply = tenant.claim(B, now_ms=20)

    assert reply == [20, 0, 0, [], ["none"]]
    assert tenant.changes(before) == {
        "outbox:claims": {A: None},
        "outbox:claims_end": {A: None},
        "outbox:due:l:t": {"m1": None},
        "outbox:state": {"m1": f"unknown parked {A} 20 21 1 1 10000 10 a"},
        "outbox:tally": {"claimed:l:t": "0", "unknown:l:t": "1"},
        "outbox:unknown": {"m1": 20},
    }


def test_parking_beats_burying(tenant: Tenant) -> None:
    """A row that parks is unknown also on its last attempt: nobody can say that it failed."""
    tenant.enqueue(row("m1", on_expiry="park", attempts_max=1))
    tenant.claim(A, now_ms=10)
    tenant.claim(B, now_ms=20)

    assert tenant.row("m1").startswith("unknown parked ")


def test_rows_that_end_count_against_the_limit(tenant: Tenant) -> None:
    """A claim looks at no more rows than it wants: with a buried one first it says more."""
    tenant.enqueue(row("m1", attempts_max=1))
    tenant.claim(A, now_ms=10)
    tenant.enqueue(row("m2", available_at=20))

    assert tenant.claim(B, now_ms=20, limit=1) == [20, 0, 1, [], ["none"]]
    assert tenant.ids_claimed(C, now_ms=20, limit=1) == ["m2"]


def test_claim_forgets_dead_letters_beyond_their_count(tenant: Tenant) -> None:
    """A claim that buries keeps dead_keep_count dead letters, the newest."""
    tenant.enqueue(*(row(f"m{i}", attempts_max=1) for i in range(3)))
    for i, token in enumerate((A, B, C)):
        tenant.claim(token, now_ms=10 + i, limit=1)

    for now_ms in (20, 21, 22):
        tenant.claim(D, now_ms=now_ms, limit=1, dead_keep_count=2)

    state = tenant.dump()
    assert state["outbox:dead"] == {"m1": 21, "m2": 22}
    assert state["outbox:tally"]["horizon"] == "m0"
    assert tenant.tally() == {"dead_lettered:l:t": 2, "dead_bytes": 48}


# --- bounds, damage, clocks -----------------------------------------------------------------------


def test_claim_stops_at_4_mib(tenant: Tenant) -> None:
    """A claim hands out no more than 4 MiB, says more, and always the first row."""
    payload = "x" * (MEGABYTE - 22)  # with its header each document is 1 MiB
    tenant.enqueue(*(row(f"m{i}", payload=payload) for i in range(6)))

    first = tenant.claim(A, now_ms=10)
    second = tenant.claim(B, now_ms=10)

    assert (ids_of(first[4]), first[2]) == (["m0", "m1", "m2", "m3"], 1)
    assert (ids_of(second[4]), second[2]) == (["m4", "m5"], 0)
    assert sum(map(len, first[4][4::5])) == 4 * MEGABYTE


def test_claim_counts_errors_against_4_mib(tenant: Tenant) -> None:
    """Error lines are part of what a claim hands out, and count."""
    tenant.enqueue("m1", "m2", "m3")
    tenant.claim(A, now_ms=10)
    error = '"' + "x" * 3 * MEGABYTE + '"'
    tenant.run("outbox/nack", *((f"m{i}", A, 11, 0, error) for i in (1, 2, 3)), now_ms=11)

    reply = tenant.claim(B, now_ms=12)

    assert (ids_of(reply[4]), reply[2]) == (["m1"], 1)


def test_claim_always_hands_out_the_first_row(tenant: Tenant) -> None:
    """A single row beyond 4 MiB is handed out alone."""
    tenant.enqueue(row("m1", payload="x" * 5 * MEGABYTE), "m2")

    assert tenant.ids_claimed(A, now_ms=10) == ["m1"]
    assert tenant.ids_claimed(B, now_ms=10) == ["m2"]


def test_claim_reads_no_more_than_a_chunk_beyond_4_mib(tenant: Tenant) -> None:
    """Documents are read a hundred at a time until 4 MiB, also those of rows that are not taken."""
    large = [row(f"m{i:03}", payload="x" * 50_000, on_expiry="park") for i in range(100)]
    tenant.enqueue(*large)
    tenant.claim(A, now_ms=10, limit=1_000)
    tenant.claim(B, now_ms=10, limit=1_000)
    tenant.enqueue(row("n1", available_at=30))

    first = tenant.claim(C, now_ms=30, limit=200)
    second = tenant.claim(D, now_ms=30, limit=200)

    assert (first[4], first[2]) == (["none"], 1)
    assert ids_of(second[4]) == ["n1"]
    assert tenant.tally() == {"unknown:l:t": 100, "claimed:l:t": 1}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "claimed",
        f"claimed claimed {A} 20 24 1 1 10000 10",
        f"claimed claimed {A} soon 24 1 1 10000 10 a",
        f"sent acked {A} 10 24 1 1 10000 10 a",
        f"mislaid {A} 10 24 1 1 10000 10 a b",
    ],
)
def test_damaged_entry_leaves_the_line(tenant: Tenant, line: str) -> None:
    """An entry without a readable, waiting row is named and leaves the line; others are handed out."""
    tenant.is_damaged = True
    tenant.enqueue("m1", "m2")
    tenant.raw.hset(tenant.keys.outbox_state, "m1", line)

    reply = tenant.claim(A, now_ms=10)

    assert (reply[3], ids_of(reply[4])) == (["m1"], ["m2"])
    assert tenant.dump()["outbox:due:l:t"] == {"m2": 20}
    assert tenant.row("m1") == line


@pytest.mark.parametrize("doc", [None, "", "{}", "0 0 x reclaim l:t ~ ~\n{}"])
def test_entry_without_a_readable_document_leaves_the_line(tenant: Tenant, doc: str | None) -> None:
    """A claimed row whose document is gone or has no readable header blocks nobody."""
    tenant.is_damaged = True
    tenant.enqueue("m1", row("m2", available_at=20))
    tenant.claim(A, now_ms=10)
    tenant.raw.hdel(tenant.keys.outbox_docs, "m1")
    if doc is not None:
        tenant.raw.hset(tenant.keys.outbox_docs, "m1", doc)

    reply = tenant.claim(B, now_ms=20)

    assert (reply[3], ids_of(reply[4])) == (["m1"], ["m2"])


def test_fence_rises_also_when_the_clock_steps_back(tenant: Tenant) -> None:
    """Each grant has a higher fence than the one before, whatever the clock does."""
    tenant.enqueue("m1", "m2", "m3")

    fences = [
        tenant.claim(token, now_ms=now_ms, limit=1)[4][1]
        for token, now_ms in ((A, 100), (B, 50), (C, 100))
    ]

    assert fences == ["100000", "100001", "100002"]


@pytest.mark.parametrize("consumer", ["", f"{A} 1 2", "two words\nnew line", "nul\0", "é\udcff", B])
def test_consumer_is_free_text(tenant: Tenant, consumer: str) -> None:
    """A consumer of any bytes is stored as it is and confuses no later command."""
    tenant.enqueue("m1")

    tenant.claim(A, now_ms=10, consumer=consumer)

    assert tenant.row("m1") == f"claimed claimed {A} 20 24 1 1 10000 10 {consumer}"
    assert tenant.run("outbox/ack", ("m1", B), now_ms=11) == [11, "lost_claim"]
    assert tenant.run("outbox/ack", ("m1", A), now_ms=11) == [11, "acked"]
    assert tenant.row("m1") == f"sent acked {A} 11 24 1 1 10000 10 {consumer}"
