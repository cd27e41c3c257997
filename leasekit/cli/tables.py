"""Answers for people: tables as wide as they need to be, instants as dates with their distance.

Names and errors come from strangers, so control characters are made visible and nothing is taken
for markup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leasekit.cli.reading import Document
from leasekit.demo.judge import Report

__all__ = [
    "clean",
    "counts_table",
    "demo_table",
    "keys_table",
    "leases_table",
    "make_console",
    "one_thing",
    "rows_table",
]

PIPE_COLUMNS = 1_000
ERROR_CHARACTERS_SHOWN = 60
STATES = ("pending", "claimed", "unknown", "dead_lettered", "sent", "cancelled")


class _Console(Console):
    def on_broken_pipe(self) -> None:
        # Not SystemExit(1), which means something else here.
        raise BrokenPipeError


def make_console() -> Console:
    """Standard output; where it is no terminal, lines are never broken."""
    console = _Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_COLUMNS
    return console


def clean(value: object) -> str:
    """Text of anyone's, safe to show: control characters as escapes."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(value)
    )


def when(at_ms: int | None, now_ms: int) -> str:
    """An instant as date and distance; a dash for none."""
    if not at_ms:
        return "-"
    try:
        date = datetime.fromtimestamp(at_ms / 1_000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError):
        date = f"{at_ms} ms"  # beyond the calendar
    left_ms = at_ms - now_ms
    return f"{date} ({'in ' if left_ms > 0 else ''}{span(abs(left_ms))}{'' if left_ms > 0 else ' ago'})"


def span(milliseconds: int) -> str:
    """A duration in its largest fitting unit."""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1_000)):
        if milliseconds >= 2 * size:
            return f"{milliseconds // size} {unit}"
    return f"{milliseconds} ms"


def size_text(size_bytes: int) -> str:
    return f"{size_bytes} B" if size_bytes < 10_000 else f"{size_bytes / 1_000:.1f} kB"


def _table(
    columns: Sequence[tuple[str, Callable[[Document], object]]], items: list[Document]
) -> Table:
    """One line an item; numbers to the right. A column is its title and what it shows of an item."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title, show in columns:
        is_number = bool(items) and isinstance(show(items[0]), int)
        table.add_column(title, justify="right" if is_number else "left", overflow="fold")
    for item in items:
        table.add_row(*[Text(clean(show(item))) for _, show in columns])
    return table


def counts_table(document: Document) -> Table:
    """By lane and target for one tenant, else by tenant."""
    states = [(state, lambda one, state=state: one[state]) for state in STATES]
    if "items" in document:
        return _table(
            [("tenant", lambda one: one["tenant"]), ("lanes", lambda one: one["lanes"]), *states],
            document["items"],
        )
    lanes = document["lanes"]
    total = document | {"lane": "all", "target": ""}
    return _table(
        [("lane", lambda one: one["lane"]), ("target", lambda one: one["target"]), *states],
        [*lanes, total] if len(lanes) != 1 else lanes,
    )


def rows_table(document: Document) -> Table:
    now_ms = document["now_ms"]
    return _table(
        [
            ("id", lambda row: row["id"]),
            ("status", lambda row: row["status"]),
            ("lane", lambda row: row["lane"]),
            ("target", lambda row: row["target"]),
            ("attempts", _attempts),
            ("holder", lambda row: row["consumer"] or "-"),
            ("at", lambda row: when(_moment(row), now_ms)),
            ("size", lambda row: size_text(row["payload_bytes"])),
            ("last error", lambda row: (row["last_error"] or "-")[:ERROR_CHARACTERS_SHOWN]),
        ],
        document["items"],
    )


def leases_table(document: Document) -> Table:
    now_ms = document["now_ms"]
    return _table(
        [
            ("name", lambda one: one["name"]),
            ("owner", lambda one: one["owner"]),
            ("fence", lambda one: one["fence"]),
            ("since", lambda one: when(one["acquired_at_ms"], now_ms)),
            ("until", lambda one: when(one["expires_at_ms"], now_ms)),
        ],
        document["items"],
    )


def keys_table(document: Document) -> Table:
    now_ms = document["now_ms"]
    return _table(
        [
            ("operation", lambda one: one["operation"]),
            ("key", lambda one: one["key"]),
            ("status", lambda one: one["status"]),
            ("owner", lambda one: one["owner"]),
            ("first seen", lambda one: when(one["first_seen_at_ms"], now_ms)),
            ("lease until", lambda one: when(one.get("lease_expires_at_ms"), now_ms)),
            ("kept until", lambda one: when(one.get("expires_at_ms"), now_ms)),
            ("conflicts", lambda one: one.get("conflict_count", 0)),
        ],
        document["items"],
    )


def one_thing(document: Document) -> Text:
    """Every field on a line of its own; the errors of a row's attempts one after the other."""
    now_ms = document["now_ms"]
    lines = []
    for name, value in document.items():
        if name == "errors":
            for error in value:
                story = f"{error['kind']}, attempt {error['attempt']}: {error['text']}"
                lines.append(_line("error", f"{when(error['at_ms'], now_ms)}  {clean(story)}"))
        elif name not in ("now_ms", "last_error"):
            title = name.removesuffix("_at_ms").replace("_bytes", "_size").replace("_", " ")
            lines.append(_line(title, _field(name, value, now_ms)))
    return Text("\n").join(lines)


def _line(title: str, text: str) -> Text:
    return Text.assemble((f"{title:<20}", "bold"), text)


def _field(name: str, value: Any, now_ms: int) -> str:
    if name.endswith("_at_ms"):
        return when(value, now_ms)
    if name.endswith("_bytes"):
        return size_text(value)
    if isinstance(value, dict | list):
        return clean(msgspec.json.encode(value).decode())
    if value is None:
        return "without end" if name == "max_attempts" else "-"
    return clean(value)


def _attempts(row: Document) -> str:
    return f"{row['attempt_count']}/{row['max_attempts'] or 'no end'}"


def _moment(row: Document) -> int | None:
    """The instant that matters most: when it ended, when its lease ends, or when it may be claimed."""
    moment: int | None = (
        row["finished_at_ms"] or row["lease_expires_at_ms"] or row["available_at_ms"]
    )
    return moment


def demo_table(report: Report) -> Table:
    """The figures, with what they must be."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("must be")
    for title, value, wanted, is_well in (
        ("enqueued", report.enqueued, "", True),
        ("delivered", report.delivered, "all", report.delivered == report.enqueued),
        ("redelivered after the kill", report.redelivered_after_kill, "", True),
        ("redelivered after the stop", report.redelivered_after_stop, "", True),
        (
            "late acks refused (lost_claim)",
            report.late_acks_refused,
            "at least 1",
            report.late_acks_refused > 0,
        ),
        ("late acks accepted", report.late_acks_accepted, "0", report.late_acks_accepted == 0),
        (
            "refused by the destination as stale",
            report.refused_as_stale,
            "at least 1",
            report.refused_as_stale > 0,
        ),
        ("older fence applied after a newer", report.stale_applied, "0", report.stale_applied == 0),
        ("lost", report.lost, "0", report.lost == 0),
        ("arrived altered", report.altered, "0", report.altered == 0),
        ("not acked at the end", report.not_acked, "0", report.not_acked == 0),
    ):
        style = "" if is_well else "bold red"
        table.add_row(Text(title, style), Text(f"{value:,}", style), Text(wanted, style))
    for title, text in (
        ("rows a second", f"{report.rows_per_second:,.0f}"),
        ("enqueued to applied, p50", f"{report.enqueue_to_applied_p50_ms} ms"),
        ("enqueued to applied, p99", f"{report.enqueue_to_applied_p99_ms} ms"),
        ("time", f"{report.seconds:.1f} s"),
        ("finished rows read back", f"{report.rows_kept_checked:,}"),
        ("processes", str(report.processes)),
        ("server", report.server),
        ("server's processor time", f"{report.server_cpu_seconds:.1f} s"),
        ("server's most memory", f"{report.server_memory_peak_bytes / 2**20:.0f} MiB"),
        ("parent's most memory", f"{report.parent_memory_peak_bytes / 2**20:.0f} MiB"),
    ):
        table.add_row(title, text, "")
    return table
