"""The books of all processes compared with each other and with the server: the result of a run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

import msgspec
from hdrh.histogram import HdrHistogram

from leasekit.load import messages
from leasekit.load.plan import Plan

__all__ = ["Latency", "Machine", "Outside", "Result", "Suspects", "judge", "latency_of"]

LATENCY_US_MOST = 24 * 3_600_000_000
LATENCY_DIGITS = 3
NAMED_MOST = 3

Claims = list[tuple[int, int, int, str]]


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where the client ran."""

    cores: int
    cpu: str
    system: str


class Latency(msgspec.Struct, frozen=True, kw_only=True, rename={"p99_9_ms": "p99.9_ms"}):
    """Percentiles of one command's latencies, in milliseconds with three digits."""

    count: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    p99_9_ms: float
    max_ms: float


class Outside(msgspec.Struct, kw_only=True):
    """What is known from elsewhere than the processes' own books.

    still_there: rows that the server has in line, held, unknown or dead. sent: that it has finished.
    """

    still_there: int
    sent: int
    server: str
    server_cpu_seconds: float
    server_restarts: int
    harness_us: float
    versions: dict[str, str]
    machine: Machine
    url: str
    prefix: str
    stalled: str = ""


class Result(msgspec.Struct, kw_only=True):
    """What `leasekit load` ends with: one line of JSON. Counts are rows unless the name says else.

    operations: things done in the measured phase, which lasted `seconds`; what was left in line at
    its end was claimed after it. unsettled_*: calls of which even a repeat could not tell whether
    they were applied. latencies: by command, from the call, in an open loop from the intended
    arrival (enqueue, acquire, reserve, arrival_to_claim); `begun_late` is how late arrivals began.
    redelivered: claims of rows that had been claimed before. errors: failed calls by kind, of which
    `repeats` were asked again by name; `client_repeats` the client had asked again by itself, unseen.
    """

    versions: dict[str, str]
    server: str
    machine: Machine
    url: str
    prefix: str
    settings: Plan
    seconds: float
    operations: int
    operations_per_second: float
    lifecycles_per_second: float
    latencies: dict[str, Latency]
    client_cpu_seconds: float
    server_cpu_seconds: float
    harness_us_per_lifecycle: float
    enqueued: int
    acked: int
    still_there: int
    lost: int
    unsettled_enqueues: int
    unsettled_acks: int
    redelivered: int
    held_twice: int
    claims_compared: int
    claims_not_compared: int
    empty_claims: int
    arrivals_not_begun: int
    outcomes: dict[str, int]
    errors: dict[str, int]
    repeats: int
    client_repeats: int
    reconnects: int
    server_restarts: int
    broken: list[str]
    """Each promise that was broken, or could not be proved; empty = all is well."""


class Suspects:
    """Claims of rows that were handed out more than once, or whose end was odd, by row."""

    def __init__(self) -> None:
        self.claims: defaultdict[str, Claims] = defaultdict(list)
        self.count = 0

    def add(self, report: messages.Suspects) -> None:
        for id, fence, claimed_at_ms, lease_end_ms, outcome in report.claims:
            self.claims[id].append((fence, claimed_at_ms, lease_end_ms, outcome))
            self.count += 1

    def held_twice(self) -> list[str]:
        """Rows whose later claim began while the earlier one's lease ran and was not given back."""
        return [
            f"row {id} was claimed under fence {after[0]} while fence {before[0]} held it"
            for id, claims in self.claims.items()
            for before, after in pairwise(sorted(claims))
            if before[3] not in ("acked", "requeued")
            and (after[1] < before[2] or after[0] == before[0])
        ]

    def handed_out_after_ack(self) -> list[str]:
        return [
            f"row {id} was claimed under fence {after[0]} although fence {before[0]} acked it"
            for id, claims in self.claims.items()
            for before, after in pairwise(sorted(claims))
            if before[3] == "acked"
        ]

    def lost_to_nobody(self) -> list[str]:
        """Rows whose holder was told lost_claim though nobody is known to have claimed them later."""
        return [
            f"row {id}: the holder of fence {last[0]} was told lost_claim, and nobody had it later"
            for id, claims in self.claims.items()
            if (last := max(claims))[3] == "lost_claim"
        ]


def judge(
    plan: Plan,
    notes: Iterable[messages.Notes],
    produced: Iterable[messages.Produced],
    suspects: Suspects,
    outside: Outside,
) -> Result:
    """Compare the accounts."""
    books, phases = list(notes), list(produced)
    seconds = max((phase.seconds for phase in phases), default=0.0) or 1e-9
    enqueued = sum(book.enqueued for book in books)
    acked = sum(book.acked for book in books)
    unsettled_enqueues = sum(book.unsettled_enqueues for book in books)
    missing = enqueued - acked - outside.still_there
    result = Result(
        versions=outside.versions,
        server=outside.server,
        machine=outside.machine,
        url=outside.url,
        prefix=outside.prefix,
        settings=plan,
        seconds=round(seconds, 3),
        operations=sum(phase.operations for phase in phases),
        operations_per_second=round(sum(phase.operations for phase in phases) / seconds, 1),
        lifecycles_per_second=round(sum(phase.acked for phase in phases) / seconds, 1),
        latencies=_latencies(books),
        client_cpu_seconds=round(sum(phase.cpu_seconds for phase in phases), 3),
        server_cpu_seconds=round(outside.server_cpu_seconds, 3),
        harness_us_per_lifecycle=round(outside.harness_us, 2),
        enqueued=enqueued,
        acked=acked,
        still_there=outside.still_there,
        lost=max(missing - sum(book.unsettled_acks for book in books), 0),
        unsettled_enqueues=unsettled_enqueues,
        unsettled_acks=sum(book.unsettled_acks for book in books),
        redelivered=sum(book.redelivered for book in books),
        held_twice=sum(book.held_twice for book in books) + len(suspects.held_twice()),
        claims_compared=suspects.count,
        claims_not_compared=sum(book.suspects_left_out for book in books),
        empty_claims=sum(book.empty_claims for book in books),
        arrivals_not_begun=sum(phase.arrivals_not_begun for phase in phases),
        outcomes=_sum(book.outcomes for book in books),
        errors=_sum(book.errors for book in books),
        repeats=sum(book.repeats for book in books),
        client_repeats=sum(book.client_repeats for book in books),
        reconnects=sum(book.reconnects for book in books),
        server_restarts=outside.server_restarts,
        broken=[],
    )
    result.broken += _broken(result, books, suspects, outside)
    return result


def _broken(
    result: Result, books: list[messages.Notes], suspects: Suspects, outside: Outside
) -> list[str]:
    missing = result.enqueued - result.acked - result.still_there
    is_exact = not (result.unsettled_enqueues or result.unsettled_acks or result.still_there)
    broken = [outside.stalled] if outside.stalled else []
    if result.lost:
        broken.append(f"{_rows(result.lost)} lost: enqueued, never acked, and not there any more")
    if missing < -result.unsettled_enqueues:
        broken.append(f"{_rows(-missing - result.unsettled_enqueues)} acked more than once")
    if is_exact and missing == 0 and _sum_of_ids(books, "enqueued") != _sum_of_ids(books, "acked"):
        broken.append("the rows that were acked are not those that were enqueued")
    if result.still_there:
        broken.append(f"{_rows(result.still_there)} not delivered by the end")
    if is_exact and outside.sent != result.acked:
        broken.append(f"the server counts {outside.sent} sent rows, {result.acked} were acked")
    if result.held_twice:
        broken.append(f"{result.held_twice} times a row or lease was held twice at once")
    broken += suspects.held_twice()[:NAMED_MOST] + suspects.handed_out_after_ack()[:NAMED_MOST]
    lost_to_nobody = suspects.lost_to_nobody()
    # A claim whose reply was lost has no line here, but it took the row all the same.
    if not (result.errors or result.reconnects or result.claims_not_compared):
        broken += lost_to_nobody[:NAMED_MOST]
    for book in books:
        broken += book.broken[:NAMED_MOST]
    return broken


def _latencies(books: list[messages.Notes]) -> dict[str, Latency]:
    merged: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for book in books:
        for command, counts in book.latencies_us.items():
            merged[command].update(counts)
    return {command: latency_of(counts) for command, counts in merged.items() if counts}


def latency_of(counts: Mapping[int, int]) -> Latency:
    """Percentiles of latencies given as microseconds -> how many."""
    histogram = HdrHistogram(1, LATENCY_US_MOST, LATENCY_DIGITS)
    for value_us, count in counts.items():
        histogram.record_value(min(max(value_us, 1), LATENCY_US_MOST), count)

    def at(percentile: float) -> float:
        value_us: int = histogram.get_value_at_percentile(percentile)
        return round(value_us / 1_000, 3)

    return Latency(
        count=histogram.get_total_count(),
        p50_ms=at(50),
        p90_ms=at(90),
        p99_ms=at(99),
        p99_9_ms=at(99.9),
        max_ms=round(histogram.get_max_value() / 1_000, 3),
    )


def _sum_of_ids(books: Iterable[messages.Notes], which: str) -> int:
    return sum(int(getattr(book, f"{which}_ids"), 16) for book in books)


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items()))


def _rows(count: int) -> str:
    return f"{count} row{'s' if count != 1 else ''}"
