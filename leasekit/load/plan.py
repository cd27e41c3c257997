"""What is to be done: the settings of a run, and what is refused."""

from __future__ import annotations

import math

import msgspec

from leasekit import codec
from leasekit.errors import InvalidInput

__all__ = ["MIX_DEFAULT", "LoadFailed", "Plan", "parse_mix", "share_of"]

MIX_DEFAULT = "lifecycle=1"
KINDS = ("lifecycle", "nack", "extend", "lease", "idempotency")
DURATION_S_DEFAULT = 10.0

COROUTINES_MOST = 100_000
PROCESSES_MOST = 64
TENANTS_MOST = 10_000
LANES_MOST = 1_000
ROUTES_MOST = 100_000
RATE_MOST = 1_000_000.0
DURATION_S_LEAST, DURATION_S_MOST = 0.1, 24 * 3_600.0
COUNT_MOST = 1_000_000_000
PAYLOAD_BYTES_LEAST = 16  # {"body":"..."}
LEASE_MS_LEAST = 100
WEIGHT_MOST = 1_000_000.0


class LoadFailed(Exception):
    """The load test could not be carried out; `exit_code` is what the command ends with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The settings; `check` refuses what cannot be meant.

    rate: arrivals a second of all processes together, None = closed loop. coroutines: of all
    processes together; in an open loop, how many arrivals may be under way at a time. duration_s or
    count: how long, or how many things to do. mix: weight by kind of thing.
    """

    rate: float | None = None
    coroutines: int = 100
    processes: int = 1
    tenants: int = 1
    lanes: int = 1
    payload_bytes: int = 200
    input_path: str | None = None
    mix: dict[str, float] = msgspec.field(default_factory=lambda: {"lifecycle": 1.0})
    duration_s: float | None = None
    count: int | None = None
    lease_ms: int = 30_000
    seed: int = 0

    @property
    def routes(self) -> int:
        return self.tenants * self.lanes

    def check(self) -> None:
        """Raises InvalidInput, naming the option and its limits."""
        if self.duration_s is not None and self.count is not None:
            raise InvalidInput(
                "--duration and --count exclude each other: give the one that is to end the run",
                field="count",
            )
        for name, value, least, most in (
            ("coroutines", self.coroutines, 1, COROUTINES_MOST),
            ("processes", self.processes, 1, PROCESSES_MOST),
            ("tenants", self.tenants, 1, TENANTS_MOST),
            ("lanes", self.lanes, 1, LANES_MOST),
            ("payload-bytes", self.payload_bytes, PAYLOAD_BYTES_LEAST, codec.PAYLOAD_BYTES_DEFAULT),
            ("lease-ms", self.lease_ms, LEASE_MS_LEAST, codec.LEASE_MS_MAX),
            ("duration", self.duration_s, DURATION_S_LEAST, DURATION_S_MOST),
            ("count", self.count, 1, COUNT_MOST),
            ("seed", self.seed, 0, 2**63),
        ):
            # Not a number is in no range, so it is refused too.
            if value is not None and not least <= value <= most:
                raise InvalidInput(
                    f"--{name} must be {least:g} to {most:g}, not {value:g}", field=name, limit=most
                )
        if self.rate is not None and not 0 < self.rate <= RATE_MOST:
            raise InvalidInput(
                f"--rate must be above 0 and at most {RATE_MOST:g} a second, not {self.rate:g}",
                field="rate",
                limit=RATE_MOST,
            )
        if self.routes > ROUTES_MOST:
            raise InvalidInput(
                f"{self.tenants} tenants with {self.lanes} lanes each are {self.routes} lines; at "
                f"most {ROUTES_MOST}",
                field="lanes",
                limit=ROUTES_MOST,
            )
        if self.coroutines < self.processes:
            raise InvalidInput(
                f"{self.coroutines} coroutines cannot be shared by {self.processes} processes: "
                "give at least one to each",
                field="coroutines",
            )
        if self.count is not None and self.count < self.processes:
            raise InvalidInput(
                f"--count {self.count} cannot be shared by {self.processes} processes",
                field="count",
            )


def parse_mix(text: str) -> dict[str, float]:
    """`lifecycle=8,nack=1,lease=1` as weights by kind; InvalidInput for any other text."""
    mix: dict[str, float] = {}
    for part in text.split(","):
        kind, _, number = part.strip().partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if kind not in KINDS or kind in mix or not 0 <= weight <= WEIGHT_MOST:
            raise InvalidInput(
                f"--mix does not understand {part.strip()!r}: it takes weights such as "
                f"{MIX_DEFAULT},nack=0.1; kinds are {', '.join(KINDS)}, each at most once",
                field="mix",
            )
        mix[kind] = weight
    if not any(mix.values()):
        raise InvalidInput("--mix has no weight above 0: there is nothing to do", field="mix")
    return mix


def share_of(whole: int, number: int, of: int) -> int:
    """The share of process `number` (from 0) of `of`; all shares together are the whole."""
    return whole // of + (number < whole % of)
