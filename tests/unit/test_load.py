"""The load test's own books: what they take for broken, and what they let pass."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest

from leasekit.errors import InvalidInput, LeasekitError, OutcomeUnknown, Unavailable
from leasekit.load import messages
from leasekit.load.judge import Machine, Outside, Result, Suspects, judge, latency_of
from leasekit.load.notes import Book
from leasekit.load.plan import Plan, parse_mix, share_of
from leasekit.load.stand_in import StandIn
from leasekit.load.traffic import Traffic
from leasekit.model import AckOutcome

IDS = [f"{number:026}" for number in range(10)]


def claim(id: str, fence: int, at_ms: int, *, lease_ms: int = 1_000, count: int = 1) -> Any:
    row = SimpleNamespace(id=id, claimed_at_ms=at_ms, claim_count=count)
    return SimpleNamespace(row=row, fence=fence, lease_expires_at_ms=at_ms + lease_ms)


def verdict(books: Iterable[Book], *, still_there: int = 0, sent: int | None = None) -> Result:
    """What the judge says of these books, with a server that agrees unless told otherwise."""
    notes = [book.notes(1, {}) for book in books]
    suspects = Suspects()
    for book in books:
        suspects.add(messages.Suspects(book.suspects))
    phase = messages.Produced(seconds=1, cpu_seconds=1, operations=1, acked=1, arrivals_not_begun=0)
    outside = Outside(
        still_there=still_there,
        sent=sum(one.acked for one in notes) if sent is None else sent,
        server="valkey",
        server_cpu_seconds=1,
        server_restarts=0,
        harness_us=1,
        versions={},
        machine=Machine(cores=1, cpu="", system=""),
        url="",
        prefix="",
    )
    return judge(Plan(), notes, [phase], suspects, outside)


def done(book: Book, one: Any, outcome: str = "acked") -> None:
    book.open(one)
    book.close(one, AckOutcome.ACKED if outcome == "acked" else outcome)


def test_all_is_well() -> None:
    """Rows that one process enqueues and another acks are all accounted for."""
    producer, consumer = Book(), Book()
    for number, id in enumerate(IDS):
        producer.note_enqueued(id)
        done(consumer, claim(id, number, 1_000))
    result = verdict([producer, consumer])
    assert result.broken == []
    assert (result.enqueued, result.acked, result.lost) == (10, 10, 0)


def test_a_row_that_is_nowhere_is_lost() -> None:
    """What was enqueued must be acked or still there."""
    book = Book()
    for id in IDS[:3]:
        book.note_enqueued(id)
    done(book, claim(IDS[0], 1, 1_000))
    result = verdict([book], still_there=1)
    assert result.lost == 1
    assert any("1 row lost" in promise for promise in result.broken)
    assert any("1 row not delivered" in promise for promise in result.broken)


def test_an_unsettled_ack_is_no_loss() -> None:
    """A row whose ack nobody knows of may be finished: that is said, and is not a broken promise."""
    book = Book()
    book.note_enqueued(IDS[0])
    done(book, claim(IDS[0], 1, 1_000), "unsettled")
    result = verdict([book])
    assert (result.lost, result.unsettled_acks, result.broken) == (0, 1, [])


def test_a_row_acked_twice_is_found() -> None:
    """More acks than rows is a broken promise, whoever made them."""
    one, other = Book(), Book()
    one.note_enqueued(IDS[0])
    done(one, claim(IDS[0], 1, 1_000))
    done(other, claim(IDS[0], 2, 5_000, count=2))
    assert "1 row acked more than once" in verdict([one, other]).broken


def test_one_lost_and_one_doubled_do_not_cancel_out() -> None:
    """Equal numbers of other rows are not the same rows."""
    book = Book()
    for id in IDS[:2]:
        book.note_enqueued(id)
    done(book, claim(IDS[0], 1, 1_000))
    done(book, claim(IDS[0], 2, 5_000))
    assert verdict([book]).broken == ["the rows that were acked are not those that were enqueued"]


def test_two_holders_at_once_are_found_between_processes() -> None:
    """A later claim must not begin before the earlier's lease has ended."""
    one, other = Book(), Book()
    one.note_enqueued(IDS[0])
    done(one, claim(IDS[0], 1, 1_000), "lost_claim")
    done(other, claim(IDS[0], 2, 1_999, count=2))
    result = verdict([one, other])
    assert result.held_twice == 1
    assert f"row {IDS[0]} was claimed under fence 2 while fence 1 held it" in result.broken


def test_two_holders_at_once_are_found_in_a_process() -> None:
    """Also where the second claim says that it is the first."""
    book = Book()
    book.open(claim(IDS[0], 1, 1_000))
    book.open(claim(IDS[0], 2, 1_999))
    assert book.held_twice == 1


@pytest.mark.parametrize(("at_ms", "outcome"), [(2_000, "lost_claim"), (1_001, "requeued")])
def test_one_after_the_other_is_fine(at_ms: int, outcome: str) -> None:
    """A row may be claimed again when its lease has ended, and at once when it was given back."""
    one, other = Book(), Book()
    one.note_enqueued(IDS[0])
    done(one, claim(IDS[0], 1, 1_000), outcome)
    done(other, claim(IDS[0], 2, at_ms, count=2))
    result = verdict([one, other])
    assert (result.broken, result.held_twice) == ([], 0)


def test_a_claim_lost_to_nobody_is_found() -> None:
    """Who is told lost_claim has lost it to somebody."""
    book = Book()
    book.note_enqueued(IDS[0])
    done(book, claim(IDS[0], 1, 1_000), "lost_claim")
    assert any("nobody had it later" in promise for promise in verdict([book]).broken)


def test_the_server_must_count_the_same() -> None:
    """The server's tally of sent rows is compared with the acks."""
    book = Book()
    book.note_enqueued(IDS[0])
    done(book, claim(IDS[0], 1, 1_000))
    assert verdict([book], sent=2).broken == ["the server counts 2 sent rows, 1 were acked"]


class Forgetful(StandIn):
    """An outbox that fails with these errors before it answers, and notes what it was asked."""

    def __init__(self, *errors: LeasekitError) -> None:
        super().__init__({})
        self.errors = list(errors)
        self.asked: list[tuple[str, bool]] = []

    async def enqueue(self, lane: str, target: str, payload: Any, **options: Any) -> Any:
        self.asked.append((options["id"], options.get("repeat", False)))
        if self.errors:
            raise self.errors.pop(0)
        return await super().enqueue(lane, target, payload, **options)


async def test_an_unknown_outcome_is_asked_again_by_name() -> None:
    """The same id, said to be a repeat from then on; what was not applied is simply called again."""
    outbox, book = (
        Forgetful(Unavailable("away"), OutcomeUnknown("lost"), Unavailable("away")),
        Book(),
    )
    traffic = Traffic(Plan(), 0, [outbox], [{}], book)
    assert await traffic.lifecycle(0, 0.0)
    assert [repeat for _, repeat in outbox.asked] == [False, False, True, True]
    assert len({id for id, _ in outbox.asked}) == 1
    assert (book.errors, book.repeats) == ({"Unavailable": 2, "OutcomeUnknown": 1}, 2)
    assert (book.enqueued, book.unsettled_enqueues) == (1, 0)


async def test_what_even_a_repeat_cannot_tell_is_unsettled() -> None:
    """A row that is forgotten may have been enqueued: it is counted apart, and not as enqueued."""
    outbox, book = Forgetful(OutcomeUnknown("lost"), OutcomeUnknown("forgotten", id=IDS[0])), Book()
    traffic = Traffic(Plan(), 0, [outbox], [{}], book)
    assert not await traffic.lifecycle(0, 0.0)
    assert (book.enqueued, book.unsettled_enqueues) == (0, 1)


def test_latencies_keep_three_digits() -> None:
    """Percentiles of a known distribution come back within a thousandth."""
    book = Book()
    book.seconds["ack"] += [number / 1_000 for number in range(1, 10_001)]
    latency = latency_of(book.latencies_us()["ack"])
    assert latency.count == 10_000
    for found, wanted in (
        (latency.p50_ms, 5_000),
        (latency.p90_ms, 9_000),
        (latency.p99_ms, 9_900),
        (latency.p99_9_ms, 9_990),
        (latency.max_ms, 10_000),
    ):
        assert found == pytest.approx(wanted, rel=0.001)


def test_a_mix_is_weights_by_kind() -> None:
    """Each kind at most once, none below 0, at least one above."""
    assert parse_mix("lifecycle=8, nack=1,lease=0.5") == {"lifecycle": 8, "nack": 1, "lease": 0.5}
    for text in ("", "lifecycle", "poll=1", "nack=-1", "nack=nan", "nack=1,nack=2", "nack=0"):
        with pytest.raises(InvalidInput, match="--mix"):
            parse_mix(text)


def test_shares_are_the_whole() -> None:
    """What processes share is neither lost nor doubled by dividing."""
    assert [share_of(10, number, 4) for number in range(4)] == [3, 3, 2, 2]
