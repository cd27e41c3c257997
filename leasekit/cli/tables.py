"""Answers for people: tables as wide as they need to be, instants as dates with their distance.

Names and errors come from strangers, so control characters are made visible and nothing is taken
for markup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, cast

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
    "fact_text",
    "fitted",
    "gate_text",
    "gates_table",
    "intent_text",
    "intents_table",
    "keys_table",
    "leases_table",
    "make_console",
    "one_thing",
    "policy_text",
    "rows_table",
    "unknown_table",
]

PIPE_COLUMNS = 1_000
ERROR_CHARACTERS_SHOWN = 60
INTENT_FIELDS = (
    *(
        "tenant",
        "id",
        "status",
        "cause",
        "operation",
        "tool",
        "target",
        "idempotency_key",
        "run_id",
    ),
    *("source_kind", "node_id", "owner", "attempts", "fence", "on_expiry", "created_at_ms"),
    *("updated_at_ms", "claimed_at_ms", "claim_expires_at_ms", "unknown_since_ms", "asks"),
    *("ask_at_ms", "revision"),
)
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


def fitted(table: Table, console: Console) -> Table | Text:
    """The table where it fits; on a narrower terminal each of its lines as a paragraph.

    Folded into narrow columns, ids come in pieces that nobody can copy.
    """
    unbounded = console.options.update(max_width=PIPE_COLUMNS)
    if table.__rich_measure__(console, unbounded).maximum <= console.width:
        return table
    titles = [str(column.header) for column in table.columns]
    cells = [[cast(Text, cell) for cell in column.cells] for column in table.columns]
    lines: list[Text] = []
    for head, *rest in zip(*cells, strict=True):
        lines.append(Text(head.plain, "bold"))
        line = Text(" ")
        for title, cell in zip(titles[1:], rest, strict=True):
            if cell.plain in ("", "-"):
                continue
            word = Text.assemble((f"{title} ", "dim"), cell)
            if len(line) > 1 and len(line) + 2 + len(word) > console.width:
                lines.append(line)
                line = Text(" ")
            line = Text.assemble(line, " " if len(line) == 1 else "  ", word)
        lines.append(line)
    return Text("\n").join(lines)


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
            lines.append(_line(_title(name), _field(name, value, now_ms)))
    return Text("\n").join(lines)


def intent_text(document: Document) -> Text:
    """What is known of an intent, and what was said of it, one after the other."""
    now_ms = document["now_ms"]
    lines = []
    for name in INTENT_FIELDS:
        value = document.get(name)
        if value is not None:
            lines.append(_line(_title(name), _field(name, value, now_ms)))
    lines += [
        _line("said", f"{when(fact['at_ms'], now_ms)}  {fact_text(fact)}")
        for fact in document["facts"]
    ]
    return Text("\n").join(lines)


def fact_text(fact: Document) -> str:
    """`left, fence 7`, with who said it and why, and whether it only was noted."""
    words = [fact["kind"]]
    words += [f"fence {fact['fence']}"] if fact["fence"] else []
    words += [f"by {fact['actor']}"] if fact["actor"] else []
    words += [] if fact["applied"] else ["which changed nothing"]
    words += [f"result of {size_text(fact['result_bytes'])}"] if fact["result_bytes"] else []
    if "result" in fact and fact["result_bytes"]:
        words[-1] += f" {msgspec.json.encode(fact['result']).decode()}"
    text = fact["error"] or fact["reason"]
    return clean(", ".join(words) + (f": {text}" if text else ""))


def unknown_table(document: Document) -> Table:
    """What nobody knows; its tenant only where there may be several."""
    now_ms = document["now_ms"]
    columns = [
        ("id", lambda one: one["id"]),
        ("kind", lambda one: one["kind"]),
        ("what", lambda one: one.get("operation") or one.get("lane") or "-"),
        ("target", lambda one: one["target"] or "-"),
        ("key", lambda one: one.get("idempotency_key") or one.get("dedupe_key") or "-"),
        ("owner", lambda one: one["owner"] or "-"),
        ("unknown since", lambda one: when(one["unknown_since_ms"], now_ms)),
        ("asks", lambda one: one.get("asks", "-")),
        ("ask at", lambda one: when(one.get("ask_at_ms"), now_ms)),
        ("fence", lambda one: one["fence"] or "-"),
        ("run", lambda one: one["run_id"] or "-"),
    ]
    if document["tenant"] is None:
        columns.insert(1, ("tenant", lambda one: one["tenant"]))
    return _table(columns, document["items"])


def intents_table(document: Document) -> Table:
    now_ms = document["now_ms"]
    return _table(
        [
            ("id", lambda one: one["id"]),
            ("status", lambda one: one["status"]),
            ("cause", lambda one: one["cause"]),
            ("operation", lambda one: one["operation"]),
            ("target", lambda one: one["target"] or "-"),
            ("key", lambda one: one["idempotency_key"] or "-"),
            ("owner", lambda one: one["owner"] or "-"),
            ("attempts", lambda one: one["attempts"]),
            ("changed", lambda one: when(one["updated_at_ms"], now_ms)),
            ("run", lambda one: one["run_id"] or "-"),
        ],
        document["items"],
    )


def gates_table(document: Document) -> Table:
    """By tenant: the data, and how many intents there are."""
    return _table(
        [
            ("tenant", lambda one: one["tenant"]),
            ("data", lambda one: one["dataset"] or "-"),
            ("openings", lambda one: len(one["openings"])),
            ("intents", lambda one: one["intents"]),
            ("unknown", lambda one: one["unknown"]),
            ("dead", lambda one: one["dead_lettered"]),
            ("sent, cancelled", lambda one: one["sent_or_cancelled"]),
            ("others", lambda one: one["others"]),
        ],
        document["items"],
    )


def gate_text(document: Document) -> Text:
    """One tenant's gate: its data, the openings, the number of intents in each state."""
    now_ms = document["now_ms"]
    [one] = document["items"]
    lines = [_line("tenant", clean(one["tenant"])), _line("data", clean(one["dataset"] or "-"))]
    for opening in one["openings"]:
        told = f"{opening['lost']}, by {opening['actor']}: {opening['reason']}"
        lines.append(_line("opened", f"{when(opening['at_ms'], now_ms)}  {clean(told)}"))
    lines += [_line(status, str(count)) for status, count in one["by_status"].items()]
    return Text("\n").join(lines)


def policy_text(document: Document) -> str:
    policy = document["policy"]
    tiers = "".join(f"\n  {tier}" for tier in policy["tiers"])
    return (
        f"policy of this client, programs bring their own: lease {span(policy['lease_ms'])}, kept "
        f"{span(policy['keep_ms'])},\ndurability {policy['durability']}; gated are{tiers}"
    )


def _title(name: str) -> str:
    if name == "ask_at_ms":
        return "may be asked"
    title = name.removesuffix("_at_ms")
    title = title.removesuffix("_ms") if title.endswith("_since_ms") else title
    return title.replace("_bytes", "_size").replace("_", " ")


def _line(title: str, text: str) -> Text:
    return Text.assemble((f"{title:<20}", "bold"), text)


def _field(name: str, value: Any, now_ms: int) -> str:
    if name.endswith(("_at_ms", "_since_ms")):
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
