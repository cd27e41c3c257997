"""What the parent and its processes say to each other: JSON, one message a line, as in the demo."""

from __future__ import annotations

import msgspec

from leasekit.demo.messages import Finish, Trouble
from leasekit.load.plan import Plan

__all__ = [
    "Begin",
    "Finish",
    "Joined",
    "Notes",
    "Order",
    "Produced",
    "Progress",
    "Report",
    "Setup",
    "Suspects",
    "decode_order",
    "decode_report",
    "decode_setup",
]


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is told first; number: which one it is, from 0."""

    number: int
    url: str
    prefix: str
    plan: Plan


class Begin(msgspec.Struct, frozen=True, tag_field="order", tag="begin"):
    """All are connected: begin now."""


Order = Begin | Finish


class Joined(msgspec.Struct, frozen=True, tag_field="report", tag="joined"):
    """Connected, and waiting for Begin. harness_us: what one lifecycle costs the harness itself."""

    harness_us: float


class Progress(msgspec.Struct, frozen=True, tag_field="report", tag="progress"):
    """How things stand, so far; four times a second."""

    operations: int
    enqueued: int
    acked: int
    unsettled: int
    failed_calls: int
    reconnects: int


class Produced(msgspec.Struct, frozen=True, tag_field="report", tag="produced"):
    """Nothing more is enqueued; what is in line is being claimed until Finish."""

    seconds: float
    cpu_seconds: float
    operations: int
    acked: int
    arrivals_not_begun: int


class Suspects(msgspec.Struct, frozen=True, tag_field="report", tag="suspects"):
    """Claims to be held against each other: (row id, fence, claimed at, lease end, outcome)."""

    claims: list[tuple[str, int, int, int, str]]


class Notes(msgspec.Struct, frozen=True, kw_only=True, tag_field="report", tag="notes"):
    """The last word: a process's books. Sums of ids are hexadecimal; latencies are us -> count."""

    operations: int
    enqueued: int
    acked: int
    enqueued_ids: str
    acked_ids: str
    unsettled_enqueues: int
    unsettled_acks: int
    latencies_us: dict[str, dict[int, int]]
    outcomes: dict[str, int]
    errors: dict[str, int]
    repeats: int
    client_repeats: int
    reconnects: int
    empty_claims: int
    redelivered: int
    held_twice: int
    suspects_left_out: int
    broken: list[str]


Report = Joined | Progress | Produced | Suspects | Notes | Trouble

_SETUPS: msgspec.json.Decoder[Setup] = msgspec.json.Decoder(Setup)
_ORDERS: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order)
_REPORTS: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)


def decode_setup(line: bytes) -> Setup:
    return _SETUPS.decode(line)


def decode_order(line: bytes) -> Order:
    return _ORDERS.decode(line)


def decode_report(line: bytes) -> Report:
    """The report of a line; msgspec.MsgspecError for what is none."""
    return _REPORTS.decode(line)
