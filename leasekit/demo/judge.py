"""The accounts compared: the demo's figures, and which promises they show to be broken."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from leasekit.demo.book import Book
from leasekit.model import Counts

__all__ = ["Outside", "Report", "judge"]


class Outside(msgspec.Struct, kw_only=True):
    """What is known from elsewhere than the processes' own words.

    counts: the outbox's tallies. rows_kept_checked: finished rows that were read back, of which
    `rows_kept_wrong` are held by another fence than the one whose ack was accepted.
    held_rows_kept: rows of the stopped dispatcher that were still there when it went on.
    """

    counts: Counts
    rows_kept_checked: int
    rows_kept_wrong: int
    held_rows_kept: int
    seconds: float
    server: str
    tenant: str
    url: str
    server_cpu_seconds: float
    server_memory_peak_bytes: int
    parent_memory_peak_bytes: int
    processes: int


class Report(msgspec.Struct, kw_only=True):
    """What `leasekit demo` ends with. Counts are rows unless the name says otherwise.

    delivered: applied at the destination at least once. redelivered_*: applied by the dispatcher
    that was killed or stopped, and again by another. late_acks_*: what holders were answered whose
    rows others had taken over. refused_as_stale: deliveries that the destination refused.
    """

    enqueued: int
    delivered: int
    redelivered_after_kill: int
    redelivered_after_stop: int
    late_acks_refused: int
    late_acks_accepted: int
    refused_as_stale: int
    lost: int
    stale_applied: int
    altered: int
    not_acked: int
    rows_kept_checked: int
    rows_per_second: float
    enqueue_to_applied_p50_ms: int
    enqueue_to_applied_p99_ms: int
    seconds: float
    processes: int
    server: str
    server_cpu_seconds: float
    server_memory_peak_bytes: int
    parent_memory_peak_bytes: int
    url: str
    tenant: str
    broken: list[str]
    """Each promise that was broken, or could not be proved; empty = all is well."""


def judge(book: Book, outside: Outside) -> Report:
    """Compare the accounts."""
    counts, ledger = outside.counts, book.latencies
    lost = sum(not row.is_applied for row in book.rows.values() if row.digest is not None)
    in_line = counts.pending + counts.claimed + counts.unknown + counts.dead_lettered
    report = Report(
        enqueued=book.enqueued,
        delivered=sum(row.is_applied for row in book.rows.values()),
        redelivered_after_kill=book.applied_twice_by[book.killed],
        redelivered_after_stop=book.applied_twice_by[book.stopped],
        late_acks_refused=book.late_acks_refused,
        late_acks_accepted=book.late_acks_accepted + outside.rows_kept_wrong,
        refused_as_stale=ledger.refused_as_stale if ledger else 0,
        lost=lost,
        stale_applied=book.stale_applied,
        altered=book.altered + (ledger.altered if ledger else 0),
        not_acked=in_line,
        rows_kept_checked=outside.rows_kept_checked,
        rows_per_second=round(book.acked / outside.seconds, 1),
        enqueue_to_applied_p50_ms=percentile(ledger.rows_by_ms if ledger else {}, 50),
        enqueue_to_applied_p99_ms=percentile(ledger.rows_by_ms if ledger else {}, 99),
        seconds=round(outside.seconds, 2),
        processes=outside.processes,
        server=outside.server,
        server_cpu_seconds=round(outside.server_cpu_seconds, 2),
        server_memory_peak_bytes=outside.server_memory_peak_bytes,
        parent_memory_peak_bytes=outside.parent_memory_peak_bytes,
        url=outside.url,
        tenant=outside.tenant,
        broken=[],
    )
    report.broken += _broken(report, book, outside)
    return report


def _broken(report: Report, book: Book, outside: Outside) -> list[str]:
    ledger = book.latencies
    shared = ledger.shared_fences if ledger else 0
    refused = ledger.refused_as_stale if ledger else 0
    checks = [
        (
            report.late_acks_accepted > 0,
            f"{_acks(report.late_acks_accepted)} of an older holder accepted",
        ),
        (report.lost > 0, f"{_rows(report.lost)} lost: enqueued, and never applied"),
        (
            report.stale_applied > 0,
            f"{_rows(report.stale_applied)} had an older fence applied after a newer",
        ),
        (shared > 0, f"{_rows(shared)} had two holders with one fence"),
        (
            report.altered > 0,
            f"{_rows(report.altered)} arrived with another body than was enqueued",
        ),
        (book.unknown > 0, f"{_rows(book.unknown)} arrived that nobody enqueued"),
        (report.not_acked > 0, f"{_rows(report.not_acked)} not acked at the end"),
        (
            outside.counts.sent != book.enqueued,
            f"the outbox counts {outside.counts.sent} sent rows, {book.enqueued} were enqueued",
        ),
        (ledger is None, "not proved: the destination did not show its ledger"),
        (
            report.late_acks_refused == 0,
            "not proved: no late ack of the stopped dispatcher was refused",
        ),
        (
            outside.held_rows_kept == 0,
            "not proved: the stopped dispatcher's rows were forgotten before its late acks",
        ),
        (refused == 0, "not proved: the destination refused no stale delivery"),
        (
            refused < book.refused_as_stale,
            f"dispatchers heard of {book.refused_as_stale} refusals, the destination made {refused}",
        ),
    ]
    return [what for is_broken, what in checks if is_broken]


def percentile(rows_by_ms: Mapping[int, int], percent: float) -> int:
    """The milliseconds within which that share of the rows was; 0 for no rows."""
    left = sum(rows_by_ms.values()) * percent / 100
    for ms in sorted(rows_by_ms):
        left -= rows_by_ms[ms]
        if left <= 0:
            return ms
    return 0


def _rows(count: int) -> str:
    return f"{count} row{'s' if count != 1 else ''}"


def _acks(count: int) -> str:
    return f"{count} ack{'s' if count != 1 else ''}"
