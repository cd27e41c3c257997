"""The parent's account: what each process reported, row by row, and nothing of the bodies.

A few hundred bytes a row. Every number here is a count of rows unless its name says otherwise.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from leasekit.demo import messages
from leasekit.demo.messages import Report

__all__ = ["Book", "RowNotes"]


class RowNotes:
    """What is known of one row."""

    __slots__ = ("acked_fence", "digest", "is_applied")

    def __init__(self) -> None:
        self.digest: int | None = None
        """Of the body, as its producer has it; None until the producer has reported."""
        self.acked_fence = 0
        """The highest fence whose ack was accepted; 0 = none."""
        self.is_applied = False
        """The destination says so."""


class Book:
    """`note` takes the reports; the fields are for all to read."""

    def __init__(self) -> None:
        self.rows: dict[str, RowNotes] = {}
        self.enqueued = 0
        self.acked = 0
        self.applied = 0
        self.late_acks_refused = 0
        self.late_acks_accepted = 0
        self.refused_as_stale = 0
        self.socket_path = ""
        self.killed = ""
        self.stopped = ""
        self.held: dict[str, list[tuple[str, int]]] = {}
        """By dispatcher: (id, fence) of what it had delivered and not acked when it was hit."""
        self.reports_of: Counter[str] = Counter()
        """By dispatcher: how many batches it has reported as acked."""
        self.acked_by: Counter[str] = Counter()
        # From the destination's ledger, at the end:
        self.latencies: messages.Latencies | None = None
        self.unknown = 0
        self.altered = 0
        self.stale_applied = 0
        self.applied_twice_by: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        return self.enqueued - self.applied

    def note(self, name: str, report: Report) -> None:
        """Take down one report of the process of that name."""
        if isinstance(report, messages.Listening):
            self.socket_path = report.path
        elif isinstance(report, messages.Enqueued):
            self._note_enqueued(report)
        elif isinstance(report, messages.Delivered):
            self.held[name] = report.rows
        elif isinstance(report, messages.Acked):
            self._note_acked(name, report)
        elif isinstance(report, messages.Applied):
            self.applied = report.rows
        elif isinstance(report, messages.LedgerRows):
            for id, digest, applied in report.rows:
                self._compare(id, digest, applied)
        elif isinstance(report, messages.Latencies):
            self.latencies = report

    def is_taken_over(self, name: str) -> bool:
        """Whether all that `name` held was acked by others, who had newer fences."""
        return all(self._row(id).acked_fence > fence for id, fence in self.held[name])

    def _row(self, id: str) -> RowNotes:
        # An ack can be heard of before the enqueue is: they come through different pipes.
        return self.rows.get(id) or self.rows.setdefault(id, RowNotes())

    def _note_enqueued(self, report: messages.Enqueued) -> None:
        for id, digest in report.rows:
            row = self._row(id)
            self.enqueued += row.digest is None
            row.digest = digest

    def _note_acked(self, name: str, report: messages.Acked) -> None:
        for id, fence in report.accepted:
            row = self._row(id)
            if row.acked_fence == 0:
                self.acked += 1
            elif row.acked_fence != fence:
                # Two holders were both told that the row is theirs to finish.
                self.late_acks_accepted += 1
            row.acked_fence = max(row.acked_fence, fence)
        self.reports_of[name] += 1
        self.acked_by[name] += len(report.accepted)
        self.late_acks_refused += len(report.refused)
        self.refused_as_stale += report.refused_as_stale

    def _compare(self, id: str, digest: int, applied: list[tuple[int, str]]) -> None:
        """Hold one row of the destination's ledger against what is known of it here."""
        row = self.rows.get(id)
        if row is None or row.digest is None:
            self.unknown += 1
            return
        row.is_applied = True
        self.altered += digest != row.digest
        self.stale_applied += any(after[0] < before[0] for before, after in pairwise(applied))
        # The destination saw a newer holder than the one whose ack was accepted.
        self.late_acks_accepted += 0 < row.acked_fence < applied[-1][0]
        for holder in {holder for _, holder in applied[:-1]} - {applied[-1][1]}:
            self.applied_twice_by[holder] += 1
