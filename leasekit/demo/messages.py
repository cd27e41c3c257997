"""What the parent and its child processes say to each other: JSON, one message a line.

Downwards (a child's standard input): first its Setup, then Orders. Upwards (its standard output):
Reports. The union types make a line of another form an error where it is read.
"""

from __future__ import annotations

from typing import Any

import msgspec

from leasekit.model import Retention

__all__ = [
    "Acked",
    "Allow",
    "Applied",
    "Delivered",
    "Enqueued",
    "Finish",
    "Go",
    "Hold",
    "Latencies",
    "LedgerRows",
    "Listening",
    "Order",
    "Pause",
    "Ready",
    "Report",
    "Setup",
    "TellLedger",
    "Trouble",
    "body_of",
    "decode_order",
    "decode_report",
    "decode_setup",
    "encode",
]

LANE = "webhooks"
TARGET = "destination"

# How long finished rows stay: enough to look at them during a demo, and bounded.
RETENTION = Retention(
    finished_ms=3_600_000, finished_count=20_000, finished_bytes=128 * 1024 * 1024
)


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a child is told first. `url` may hold a password, so it travels here, not in arguments.

    number, of: which of the producers or dispatchers this is, from 0. destination: socket path.
    """

    name: str
    number: int = 0
    of: int = 1
    url: str = ""
    prefix: str = "lk"
    org: str = ""
    workspace: str = ""
    input_path: str | None = None
    rows: int = 0
    batch: int = 1
    lease_ms: int = 0
    destination: str = ""


# --- orders: from the parent ----------------------------------------------------------------------


class _Order(msgspec.Struct, frozen=True, tag_field="order", tag=str.lower):
    pass


class Allow(_Order, frozen=True):
    """Producer: `rows` of all producers together may have been enqueued."""

    rows: int


class Hold(_Order, frozen=True):
    """Dispatcher: after the next delivery report it, and wait before the acks for Go."""


class Pause(_Order, frozen=True):
    """Dispatcher: claim nothing until Go."""


class Go(_Order, frozen=True):
    """Dispatcher: go on."""


class TellLedger(_Order, frozen=True):
    """Destination: say all that you know."""


class Finish(_Order, frozen=True):
    """Everybody: end."""


Order = Allow | Hold | Pause | Go | TellLedger | Finish


# --- reports: to the parent -----------------------------------------------------------------------


class _Report(msgspec.Struct, frozen=True, tag_field="report", tag=str.lower):
    pass


class Ready(_Report, frozen=True):
    """Connected; a producer or dispatcher begins at once."""


class Listening(_Report, frozen=True):
    """Destination: deliveries are taken at this socket."""

    path: str


class Enqueued(_Report, frozen=True):
    """Producer: (id, digest of the body) of rows that were created."""

    rows: list[tuple[str, int]]


class Delivered(_Report, frozen=True):
    """Dispatcher on Hold: (id, fence) of rows that the destination took and that are not acked."""

    rows: list[tuple[str, int]]


class Acked(_Report, frozen=True):
    """Dispatcher: (id, fence) by the outbox's answer, and how many deliveries were refused as stale."""

    accepted: list[tuple[str, int]]
    refused: list[tuple[str, int]]
    refused_as_stale: int = 0


class Applied(_Report, frozen=True):
    """Destination: so many rows were applied at least once."""

    rows: int


class LedgerRows(_Report, frozen=True):
    """Destination: a part of its ledger: (id, digest of the body, (fence, holder) as applied)."""

    rows: list[tuple[str, int, list[tuple[int, str]]]]


class Latencies(_Report, frozen=True):
    """Destination: the end of the ledger. Milliseconds from enqueue to the first application -> rows."""

    rows_by_ms: dict[int, int]
    refused_as_stale: int
    altered: int
    shared_fences: int


class Trouble(_Report, frozen=True):
    """Anybody: cannot go on. exit_code: what the command should end with."""

    message: str
    exit_code: int


Report = (
    Ready | Listening | Enqueued | Delivered | Acked | Applied | LedgerRows | Latencies | Trouble
)

_SETUPS: msgspec.json.Decoder[Setup] = msgspec.json.Decoder(Setup)
_ORDERS: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order)
_REPORTS: msgspec.json.Decoder[Report] = msgspec.json.Decoder(Report)


def encode(message: msgspec.Struct) -> bytes:
    """One line."""
    return msgspec.json.encode(message) + b"\n"


def decode_setup(line: bytes) -> Setup:
    return _SETUPS.decode(line)


def decode_order(line: bytes) -> Order:
    return _ORDERS.decode(line)


def decode_report(line: bytes) -> Report:
    """The report of a line; msgspec.MsgspecError for what is none."""
    return _REPORTS.decode(line)


def body_of(payload: Any) -> bytes:
    """A payload as it travels to the destination: equal values are equal bytes."""
    return msgspec.json.encode(payload, order="deterministic")
