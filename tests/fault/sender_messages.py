"""What test_senders and its processes say to each other: JSON, one message a line, as in the demo."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from leasekit.demo.messages import Finish, Trouble
from leasekit.policy import OnExpiry

__all__ = [
    "Book",
    "BookEnds",
    "Finish",
    "Held",
    "Hold",
    "Listening",
    "Mode",
    "Notes",
    "Order",
    "Plan",
    "Ready",
    "Report",
    "Setup",
    "TellBook",
    "Trouble",
    "Walked",
    "Where",
    "Woke",
    "decode_order",
    "decode_report",
    "decode_setup",
]


class Mode(StrEnum):
    """What a destination honours."""

    FENCE = "fence"
    KEY = "key"
    NOTHING = "nothing"


class Where(StrEnum):
    """At which point a sender holds."""

    GRANTED = "granted"  # the permit is there, begin() was not called
    BEGUN = "begun"  # begin() has returned, the destination was not called
    ASKED = "asked"  # the destination has said `absent`, and nobody was told


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One scenario.

    claims: why an `absent` of the destination is said to be safe, true or not. walk_ms: a sender takes
    so long for its walk at least.
    """

    name: str
    on_expiry: OnExpiry
    mode: Mode
    claims: str = ""  # fence_recorded, key_honoured or nothing
    calls: int = 0
    senders: int = 0
    seed: int = 0
    lease_ms: int = 0
    walk_ms: int = 0
    asks_max: int = 1_000


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is told first. number: which sender it is. first: its predecessor's place."""

    plan: Plan
    name: str
    url: str = ""
    destination: str = ""
    number: int = 0
    first: int = 0


# --- orders: from the parent ----------------------------------------------------------------------


class Hold(msgspec.Struct, frozen=True, tag_field="order", tag="hold"):
    """Sender: at this point of the next call or question report it, and stop."""

    where: Where


class TellBook(msgspec.Struct, frozen=True, tag_field="order", tag="tellbook"):
    """Destination: when nothing is under way any more, say all that you know."""


Order = Hold | TellBook | Finish


# --- reports: to the parent -----------------------------------------------------------------------


class _Report(msgspec.Struct, frozen=True, tag_field="report", tag=str.lower):
    pass


class Ready(_Report, frozen=True):
    """Sender: connected, and begins at once."""


class Listening(_Report, frozen=True):
    """Destination: effects and questions are taken at this socket."""

    path: str


class Held(_Report, frozen=True):
    """Sender: it stands at this point, and stops itself by SIGSTOP now. fence: of the last grant."""

    where: Where
    key: int
    fence: int


class Woke(_Report, frozen=True):
    """Sender: it goes on."""


class Notes(_Report, frozen=True, kw_only=True):
    """Sender: what it has seen since its last notes.

    low: every key of its walk below this one is done with. grants: (key, attempts, fence).
    told: (key, final status) that leasekit answered to its own word or to a later call.
    late_begins: begin() returned when the lease was over. stray_cancels: a call ended as cancelled,
    and nobody had cancelled it. others: everything else, counted.
    """

    low: int
    dispatches: int = 0
    grants: list[tuple[int, int, int]] = []
    told: list[tuple[int, str]] = []
    late_begins: list[int] = []
    stray_cancels: list[int] = []
    others: dict[str, int] = {}


class Walked(_Report, frozen=True):
    """Sender: it has walked through all of its keys."""


class Book(_Report, frozen=True):
    """Destination: a part of its ledger, see destination.Entry: (key, effects, questions, refused,
    recognised)."""

    rows: list[tuple[int, list[tuple[int, int]], list[tuple[int, int]], int, int]]


class BookEnds(_Report, frozen=True):
    """Destination: that was all."""


Report = Ready | Listening | Held | Woke | Notes | Walked | Book | BookEnds | Trouble

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
