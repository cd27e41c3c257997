"""The demo's accounts: what the destination lets in, and what the comparison makes of reports."""

from __future__ import annotations

from typing import Any

import pytest

from leasekit.codec import new_id
from leasekit.demo import messages
from leasekit.demo.book import Book
from leasekit.demo.destination import Ledger, made_at_ms
from leasekit.demo.judge import Outside, Report, judge, percentile
from leasekit.demo.messages import Acked, Enqueued, Latencies, LedgerRows
from leasekit.model import Counts

ID, OTHER = new_id(), new_id()


def judged(*reports: messages.Report, sent: int = 1, **outside: Any) -> Report:
    """The report on what dispatchers a and b said, of an outbox that says all is sent."""
    book = Book()
    book.killed, book.stopped = "a", "b"
    for report in reports:
        book.note("a", report)
    states = dict.fromkeys(Counts.__struct_fields__, 0) | {"sent": sent, "lanes": []}
    known: dict[str, Any] = {
        "counts": Counts(**states),
        "rows_kept_checked": sent,
        "rows_kept_wrong": 0,
        "held_rows_kept": 1,
        "seconds": 2.0,
        "server": "",
        "tenant": "",
        "url": "",
        "server_cpu_seconds": 0.0,
        "server_memory_peak_bytes": 0,
        "parent_memory_peak_bytes": 0,
        "processes": 1,
    }
    return judge(book, Outside(**known | outside))


ENQUEUED = Enqueued([(ID, 5)])
ACKED = Acked(accepted=[(ID, 9)], refused=[(ID, 8)], refused_as_stale=1)
SEEN = LedgerRows([(ID, 5, [(8, "a"), (9, "b")])])
END = Latencies({1: 1}, refused_as_stale=1, altered=0, shared_fences=0)


def test_accounts_that_agree_break_nothing() -> None:
    """A row delivered twice, acked by its newer holder, refused to the older, is as it should be."""
    report = judged(ENQUEUED, ACKED, SEEN, END)
    assert report.broken == []
    assert (report.delivered, report.redelivered_after_kill) == (1, 1)
    assert (report.late_acks_refused, report.refused_as_stale, report.lost) == (1, 1, 0)


@pytest.mark.parametrize(
    ("reports", "outside", "promise"),
    [
        ([ENQUEUED, ACKED, Acked([(ID, 8)], []), SEEN, END], {}, "1 ack of an older holder"),
        ([ENQUEUED, ACKED, LedgerRows([(ID, 5, [(10, "b")])]), END], {}, "1 ack of an older holder"),
        ([ENQUEUED, ACKED, SEEN, END], {"rows_kept_wrong": 2}, "2 acks of an older holder"),
        ([ENQUEUED, Enqueued([(OTHER, 6)]), ACKED, SEEN, END], {"sent": 2}, "1 row lost"),
        ([ENQUEUED, ACKED, LedgerRows([(ID, 5, [(9, "b"), (8, "a"), (9, "b")])]), END], {}, "older fence"),
        ([ENQUEUED, ACKED, LedgerRows([(ID, 6, [(9, "b")])]), END], {}, "another body"),
        ([ENQUEUED, ACKED, SEEN, LedgerRows([(OTHER, 5, [(9, "b")])]), END], {}, "nobody enqueued"),
        ([ENQUEUED, ACKED, SEEN, Latencies({}, 1, 0, 1)], {}, "two holders with one fence"),
        ([ENQUEUED, ACKED, SEEN, Latencies({}, 1, 1, 0)], {}, "another body"),
        ([ENQUEUED, ACKED, SEEN, END], {"sent": 3}, "the outbox counts 3 sent rows, 1 were"),
        ([ENQUEUED, ACKED, SEEN], {}, "not proved: the destination did not show"),
        ([ENQUEUED, Acked([(ID, 9)], []), SEEN, END], {}, "not proved: no late ack"),
        ([ENQUEUED, ACKED, SEEN, END], {"held_rows_kept": 0}, "not proved: the stopped"),
        ([ENQUEUED, ACKED, SEEN, Latencies({}, 0, 0, 0)], {}, "not proved: the destination refused"),
    ],
)  # fmt: skip
def test_each_broken_promise_is_named(
    reports: list[messages.Report], outside: dict[str, Any], promise: str
) -> None:
    """Whichever account differs, the report names the promise."""
    assert any(promise in broken for broken in judged(*reports, **outside).broken)


def test_an_ack_may_be_heard_of_before_its_enqueue() -> None:
    """Reports of different processes come in any order."""
    assert judged(ACKED, ENQUEUED, SEEN, END).broken == []


def test_the_destination_refuses_an_older_fence() -> None:
    """A newer fence is applied, the same delivery again does nothing, an older fence is stale."""
    ledger = Ledger()
    steps = [("a", 8), ("a", 8), ("b", 9), ("a", 8)]
    words = [ledger.take(ID, fence, 5, holder, made_at_ms(ID) + 3) for holder, fence in steps]
    assert words == ["applied", "again", "applied", "stale"]
    assert ledger.entries[ID].applied == ((8, "a"), (9, "b"))
    assert (ledger.refused_as_stale, dict(ledger.latency_ms)) == (1, {3: 1})


def test_percentiles_count_rows() -> None:
    """Half of the rows are within p50; no rows have no percentile."""
    assert percentile({1: 50, 7: 49, 90: 1}, 50) == 1
    assert percentile({1: 50, 7: 49, 90: 1}, 99) == 7
    assert percentile({1: 50, 7: 49, 90: 1}, 100) == 90
    assert percentile({}, 50) == 0
