"""outbox/enqueue: rows are stored once, by id and by dedupe key."""

from __future__ import annotations

import pytest
from lua.commands import A, B, Tenant, draft, row

KEEP_NONE = {"keep_ms": 0, "keep_count": 0}


def test_enqueue_stores_document_place_and_count(tenant: Tenant) -> None:
    """A new row is a document behind its time of enqueue, a place in line and one more pending."""
    reply = tenant.run("outbox/enqueue", row("m1"), row("m2", available_at=30), now_ms=10)

    assert reply == [10, "created", "created"]
    assert tenant.dump() == {
        "outbox:docs": {
            "m1": "10 0 2 reclaim l:t ~ ~\n{}",
            "m2": "10 30 2 reclaim l:t ~ ~\n{}",
        },
        "outbox:due:l:t": {"m1": 10, "m2": 30},
        "outbox:lanes": {"l:t": 10},
        "outbox:tally": {"pending:l:t": "2"},
    }


def test_enqueue_takes_the_servers_clock(tenant: Tenant) -> None:
    """Without now_ms the server's own clock says when a row was enqueued."""
    reply = tenant.run("outbox/enqueue", row("m1"), now_ms="")

    seconds = tenant.raw.time()[0]
    assert 0 <= seconds * 1_000 - reply[0] + 1_000 < 60_000
    assert tenant.dump()["outbox:due:l:t"] == {"m1": reply[0]}


def test_enqueue_of_any_payload_keeps_its_bytes(tenant: Tenant) -> None:
    """A payload is bytes: NUL, newlines and what is not UTF-8 come back as they were."""
    payload = "\0\r\n\n{é\udcff}"

    tenant.enqueue(row("m1", payload=payload))

    assert tenant.dump()["outbox:docs"]["m1"] == "0 " + draft(payload=payload)


def test_enqueue_notes_the_last_enqueue_of_a_route(tenant: Tenant) -> None:
    """A route is listed under its last enqueue; a duplicate is none."""
    tenant.enqueue("m1", now_ms=10)
    tenant.enqueue("m2", now_ms=20)
    tenant.enqueue("m2", now_ms=30)

    assert tenant.dump()["outbox:lanes"] == {"l:t": 20}


# --- by id ----------------------------------------------------------------------------------------


def test_enqueue_of_a_known_id_is_a_duplicate(tenant: Tenant) -> None:
    """The same id and draft again answers duplicate with header and state, and writes nothing."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=10)
    before = tenant.dump()

    reply = tenant.run("outbox/enqueue", row("m1"), now_ms=12)

    state = f"claimed claimed {A} 20 24 1 1 10000 10 a"
    assert reply == [12, ["duplicate", "m1", "0 0 2 reclaim l:t ~ ~", state]]
    assert tenant.dump() == before


def test_enqueue_of_a_known_id_with_another_draft_is_a_conflict(tenant: Tenant) -> None:
    """The same id with another draft answers conflict, repeated or not, and writes nothing."""
    tenant.enqueue("m1")
    before = tenant.dump()

    for repeated in (0, 1):
        reply = tenant.run("outbox/enqueue", row("m1", payload="[]"), now_ms=10, repeated=repeated)
        assert reply == [10, ["conflict", "m1"]]
    assert tenant.dump() == before


def test_repeated_enqueue_of_a_known_row_is_created(tenant: Tenant) -> None:
    """A repeat whose first copy was applied answers created again, and writes nothing."""
    tenant.enqueue("m1")
    before = tenant.dump()

    assert tenant.run("outbox/enqueue", row("m1"), now_ms=10, repeated=1) == [10, "created"]
    assert tenant.dump() == before


def test_repeated_enqueue_of_an_unknown_row_creates_it(tenant: Tenant) -> None:
    """A repeat whose first copy never arrived creates the row."""
    assert tenant.run("outbox/enqueue", row("m1"), now_ms=10, repeated=1) == [10, "created"]
    assert tenant.tally() == {"pending:l:t": 1}


@pytest.mark.parametrize(
    ("id", "repeated", "answer"),
    [
        ("m4", 1, "forgotten"),
        ("m5", 1, "forgotten"),
        ("m5", 0, "created"),
        ("m51", 1, "created"),
        ("m6", 1, "created"),
    ],
)
def test_repeated_enqueue_up_to_the_horizon_is_forgotten(
    tenant: Tenant, id: str, repeated: int, answer: str
) -> None:
    """A repeat of a missing row answers forgotten up to the largest id deleted, created above it."""
    tenant.enqueue("m5")
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/ack", ("m5", A), now_ms=11, **KEEP_NONE)
    before = tenant.dump()

    assert tenant.run("outbox/enqueue", row(id), now_ms=12, repeated=repeated) == [12, answer]
    assert (tenant.dump() == before) == (answer == "forgotten")


def test_two_items_with_one_id_make_one_row(tenant: Tenant) -> None:
    """The later of two items of a call sees the earlier: same draft duplicate, other one conflict."""
    reply = tenant.run("outbox/enqueue", row("m1"), row("m1"), row("m1", payload="[]"), now_ms=10)

    duplicate = ["duplicate", "m1", "10 0 2 reclaim l:t ~ ~", ""]
    assert reply == [10, "created", duplicate, ["conflict", "m1"]]
    assert tenant.tally() == {"pending:l:t": 1}


# --- by dedupe key --------------------------------------------------------------------------------


def test_enqueue_of_a_known_dedupe_key_writes_nothing(tenant: Tenant) -> None:
    """Same digest and fingerprint: duplicate of the row that has it; other fingerprint: conflict."""
    tenant.enqueue(row("m1", dedupe="d f"))
    before = tenant.dump()

    reply = tenant.run(
        "outbox/enqueue", row("m2", dedupe="d f"), row("m3", dedupe="d g"), now_ms=10
    )

    assert reply == [10, ["duplicate", "m1", "0 0 2 reclaim l:t ~ ~", ""], ["conflict", "m1"]]
    assert tenant.dump() == before
    assert before["outbox:dedupe"] == {"d": "m1 f"}
    assert before["outbox:dedupe_end"] == {"d": 1_000}


def test_two_items_with_one_dedupe_key_make_one_row(tenant: Tenant) -> None:
    """The later of two items of a call sees the dedupe key of the earlier."""
    reply = tenant.run(
        "outbox/enqueue", row("m1", dedupe="d f"), row("m2", dedupe="d f"), now_ms=10
    )

    assert reply == [10, "created", ["duplicate", "m1", "10 0 2 reclaim l:t ~ ~", ""]]
    assert tenant.dump()["outbox:dedupe"] == {"d": "m1 f"}


@pytest.mark.parametrize("status", ["pending", "claimed", "unknown"])
def test_dedupe_key_of_an_unfinished_row_outlives_its_window(tenant: Tenant, status: str) -> None:
    """While its row is unfinished a dedupe key counts, and a look at it gives it a new window."""
    tenant.enqueue(row("m1", dedupe="d f", on_expiry="park"))
    if status != "pending":
        tenant.claim(A, now_ms=10)
    if status == "unknown":
        tenant.claim(B, now_ms=20)

    reply = tenant.run("outbox/enqueue", row("m2", dedupe="d f"), now_ms=1_000)

    assert reply[1][:2] == ["duplicate", "m1"]
    assert tenant.dump()["outbox:dedupe_end"] == {"d": 2_000}


@pytest.mark.parametrize("finish", ["ack", "cancel", "bury"])
@pytest.mark.parametrize(("now_ms", "answer"), [(999, "duplicate"), (1_000, "created")])
def test_dedupe_key_of_a_finished_row_ends_with_its_window(
    tenant: Tenant, finish: str, now_ms: int, answer: str
) -> None:
    """At the end of its window, to the millisecond, the dedupe key of a finished row is free."""
    tenant.enqueue(row("m1", dedupe="d f"))
    if finish == "cancel":
        tenant.run("outbox/cancel", ("m1",), now_ms=10)
    else:
        tenant.claim(A, now_ms=10)
        if finish == "ack":
            tenant.run("outbox/ack", ("m1", A), now_ms=10)
        else:
            tenant.run("outbox/nack", ("m1", A, "", 1, '"x"'), now_ms=10)

    reply = tenant.run("outbox/enqueue", row("m2", dedupe="d f"), now_ms=now_ms)

    assert (reply[1] if answer == "created" else reply[1][0]) == answer
    entry = "m2 f" if answer == "created" else "m1 f"
    assert tenant.dump()["outbox:dedupe"] == {"d": entry}


def test_dedupe_key_outlives_its_row(tenant: Tenant) -> None:
    """A dedupe key whose row was deleted still answers: without header and state, to its own id
    forgotten."""
    tenant.enqueue(row("m1", dedupe="d f"))
    tenant.claim(A, now_ms=10)
    tenant.run("outbox/ack", ("m1", A), now_ms=11, **KEEP_NONE)
    before = tenant.dump()

    reply = tenant.run(
        "outbox/enqueue",
        *(row("m2", dedupe="d f"), row("m3", dedupe="d g"), row("m1", dedupe="d f")),
        now_ms=12,
    )

    assert reply == [12, ["duplicate", "m1", "", ""], ["conflict", "m1"], "forgotten"]
    assert tenant.dump() == before


def test_enqueue_deletes_dedupe_keys_whose_window_is_over(tenant: Tenant) -> None:
    """An enqueue with a dedupe key deletes up to 2n + 10 keys whose window is over."""
    tenant.enqueue(*(row(f"m{i}", dedupe=f"d{i} f") for i in range(20)))
    tenant.run("outbox/cancel", *((f"m{i}",) for i in range(20)), now_ms=10)

    tenant.run("outbox/enqueue", row("n1", dedupe="e f"), now_ms=1_000)

    assert len(tenant.dump()["outbox:dedupe"]) == 20 - 12 + 1


def test_enqueue_without_dedupe_keys_looks_at_none(tenant: Tenant) -> None:
    """An enqueue without dedupe keys does not touch those of others."""
    tenant.enqueue(row("m1", dedupe="d f"))
    tenant.run("outbox/cancel", ("m1",), now_ms=10)

    tenant.run("outbox/enqueue", row("m2"), now_ms=2_000)

    assert tenant.dump()["outbox:dedupe"] == {"d": "m1 f"}
