"""A process's own books: small, whatever the run's length (see the package's docstring)."""

from __future__ import annotations

from collections import Counter, defaultdict

from leasekit.load import messages
from leasekit.model import AckOutcome
from leasekit.outbox import Claim

__all__ = ["Book", "id_number"]

SUSPECTS_MOST = 200_000
BROKEN_NAMED = 5
OPEN_ARRIVALS_MOST = 100_000
# HDR's own scheme: 2 048 values are told apart in each power of two, which is three digits.
SIGNIFICANT_BITS = 11


def id_number(id: str) -> int:
    return int.from_bytes(id.encode(), "big")


class Book:
    """What happened in this process. Lists of seconds are folded into counts by `fold`."""

    def __init__(self) -> None:
        self.operations = 0
        self.enqueued = 0
        self.acked = 0
        self.unsettled_enqueues = 0
        self.unsettled_acks = 0
        self.repeats = 0
        self.client_repeats = 0
        self.reconnects = 0
        self.empty_claims = 0
        self.redelivered = 0
        self.held_twice = 0
        self.suspects_left_out = 0
        self.outcomes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.broken: list[str] = []
        self.suspects: list[tuple[str, int, int, int, str]] = []
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)
        """By command: latencies since the last fold."""
        self.arrived_s: dict[str, float] = {}
        """Row id -> when it was to be enqueued: rows of this process that it has not claimed yet."""
        self._latencies_us: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self._enqueued_ids = 0
        self._acked_ids = 0
        self._open: dict[str, tuple[int, int]] = {}
        """Row id -> fence and lease end of the claims that are being worked on here."""

    # --- rows -------------------------------------------------------------------------------------

    def note_enqueued(self, id: str) -> None:
        self.enqueued += 1
        self._enqueued_ids += id_number(id)

    def expect(self, id: str, arrived_s: float) -> None:
        """Remember when a row was to be enqueued, until it is claimed here."""
        self.arrived_s[id] = arrived_s
        if len(self.arrived_s) > OPEN_ARRIVALS_MOST:
            # Claimed by other processes, most likely: the oldest are forgotten.
            self.arrived_s.pop(next(iter(self.arrived_s)))

    def open(self, claim: Claim) -> None:
        """A claim begins; the row must not be held here under another lease that still runs."""
        row = claim.row
        before = self._open.get(row.id)
        if before is not None and (row.claimed_at_ms or 0) < before[1]:
            self.held_twice += 1
            self.note_broken(
                f"row {row.id} was handed out under fence {claim.fence} while fence {before[0]} "
                "held it"
            )
        self._open[row.id] = (claim.fence, claim.lease_expires_at_ms)
        self.redelivered += row.claim_count > 1

    def give_back(self, claim: Claim) -> None:
        """The claim is about to be given back: from now on others may have the row."""
        self._open.pop(claim.row.id, None)

    def close(self, claim: Claim, outcome: str, *, was_given_back: bool = False) -> None:
        """A claim has ended; outcome: the last word on it, `unsettled` where there is none.

        was_given_back: by a nack, whose reply may have been lost: others may have had the row before
        it was repeated, and `lost_claim` then says nothing of two holders.
        """
        row = claim.row
        self._open.pop(row.id, None)
        if outcome is AckOutcome.ACKED:
            self.acked += 1
            self._acked_ids += id_number(row.id)
            if row.claim_count == 1:
                return
        else:
            self.outcomes[outcome] += 1
            if outcome == "requeued" and row.claim_count == 1:
                return  # Whoever has it next may have it.
            self.unsettled_acks += outcome in ("unsettled", "forgotten")
        if len(self.suspects) >= SUSPECTS_MOST:
            self.suspects_left_out += 1
            return
        word = "requeued" if was_given_back and outcome == "lost_claim" else str(outcome)
        self.suspects.append(
            (row.id, claim.fence, row.claimed_at_ms or 0, claim.lease_expires_at_ms, word)
        )

    def note_broken(self, what: str) -> None:
        if len(self.broken) < BROKEN_NAMED:
            self.broken.append(what)

    # --- reports ----------------------------------------------------------------------------------

    def fold(self) -> None:
        """Count the latencies that have gathered: by microsecond, three digits kept."""
        for command, seconds in self.seconds.items():
            counts = self._latencies_us[command]
            for one_s in seconds:
                value = int(one_s * 1e6)
                shift = value.bit_length() - SIGNIFICANT_BITS
                counts[value if shift <= 0 else value >> shift << shift] += 1
            seconds.clear()

    def latencies_us(self) -> dict[str, dict[int, int]]:
        self.fold()
        return {command: dict(counts) for command, counts in self._latencies_us.items()}

    def progress(self) -> messages.Progress:
        return messages.Progress(
            operations=self.operations,
            enqueued=self.enqueued,
            acked=self.acked,
            unsettled=self.unsettled_enqueues + self.unsettled_acks,
            failed_calls=self.errors.total(),
            reconnects=self.reconnects,
        )

    def notes(self, operations: int, latencies_us: dict[str, dict[int, int]]) -> messages.Notes:
        """The last word; operations and latencies are those of the measured phase."""
        return messages.Notes(
            operations=operations,
            enqueued=self.enqueued,
            acked=self.acked,
            enqueued_ids=f"{self._enqueued_ids:x}",
            acked_ids=f"{self._acked_ids:x}",
            unsettled_enqueues=self.unsettled_enqueues,
            # Whether those were acked that are still open was not heard.
            unsettled_acks=self.unsettled_acks + len(self._open),
            latencies_us=latencies_us,
            outcomes=dict(self.outcomes),
            errors=dict(self.errors),
            repeats=self.repeats,
            client_repeats=self.client_repeats,
            reconnects=self.reconnects,
            empty_claims=self.empty_claims,
            redelivered=self.redelivered,
            held_twice=self.held_twice,
            suspects_left_out=self.suspects_left_out,
            broken=self.broken,
        )
