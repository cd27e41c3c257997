"""The result of a load test for people."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from leasekit.load.judge import Result

__all__ = ["figures_table", "latencies_table"]


def latencies_table(result: Result) -> Table:
    """Percentiles by command, in milliseconds."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("ms")
    for title in ("count", "p50", "p90", "p99", "p99.9", "max"):
        table.add_column(title, justify="right")
    for command, one in result.latencies.items():
        values = (one.p50_ms, one.p90_ms, one.p99_ms, one.p99_9_ms, one.max_ms)
        table.add_row(
            command.replace("_", " "), f"{one.count:,}", *[f"{value:,.2f}" for value in values]
        )
    return table


def figures_table(result: Result) -> Table:
    """The figures, with what they must be."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("must be")
    for title, value in (
        ("operations a second", f"{result.operations_per_second:,.0f}"),
        ("rows acked a second", f"{result.lifecycles_per_second:,.0f}"),
        ("seconds", f"{result.seconds:,.1f}"),
        ("clients' processor time", f"{result.client_cpu_seconds:.2f} s"),
        ("server's processor time", f"{result.server_cpu_seconds:.2f} s"),
        ("the harness itself, a lifecycle", f"{result.harness_us_per_lifecycle:.1f} us"),
        ("enqueued", f"{result.enqueued:,}"),
        ("acked", f"{result.acked:,}"),
        ("claimed again", f"{result.redelivered:,}"),
        ("arrivals that could not begin", f"{result.arrivals_not_begun:,}"),
        ("failed calls", f"{sum(result.errors.values()):,}"),
        (
            "repeats, by the client and by the test",
            f"{result.client_repeats:,} + {result.repeats:,}",
        ),
        ("reconnects", f"{result.reconnects:,}"),
        ("restarts of the server", f"{result.server_restarts:,}"),
        ("unsettled", f"{result.unsettled_enqueues + result.unsettled_acks:,}"),
    ):
        table.add_row(title, value, "")
    for title, count in (
        ("lost", result.lost),
        ("not delivered", result.still_there),
        ("held twice", result.held_twice),
    ):
        style = "bold red" if count else ""
        table.add_row(Text(title, style), Text(f"{count:,}", style), Text("0", style))
    table.add_row("server", result.server, "")
    table.add_row("machine", f"{result.machine.cores} x {result.machine.cpu}", "")
    return table
