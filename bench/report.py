"""What the bench tells: a table, a JSON file, a plot, and the figures in README.md."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows import Figure, Row

import leasekit

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
README = FOLDER / "README.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

Table = Sequence[tuple[Row, Sequence[Figure]]]


def circumstances(server: str, rounds: int, *, is_pinned: bool) -> dict[str, Any]:
    return {
        "leasekit": leasekit.__version__,
        "server": server,
        "python": platform.python_version(),
        "machine": f"{_processor()}, {platform.system()} {platform.release()}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rounds": rounds,
        "load": _load(is_pinned),
    }


def _load(is_pinned: bool) -> str:
    """How busy the machine was, the bench included: two is what the bench alone makes of it."""
    pinned = "server and client pinned to a core each" if is_pinned else "not pinned"
    return f"{os.getloadavg()[0]:.1f} at the end, {pinned}" if hasattr(os, "getloadavg") else pinned


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def table(rows: Table) -> str:
    """Markdown that also reads as plain text."""
    lines = ["| row | figure | value | goal | |", "|---|---|---:|---:|---|"]
    for row, figures in rows:
        for figure in figures:
            verdict = {None: "", True: "met", False: "**not met**"}[figure.is_met]
            value = f"{number(figure.value)} {figure.unit}"
            lines.append(f"| {row.name} | {figure.name} | {value} | {figure.goal} | {verdict} |")
    return "\n".join(lines)


def details(rows: Table) -> str:
    """What a unit of work cost each contestant, and each row's notes."""
    lines = []
    for row, _ in rows:
        lines.append(f"\n**{row.name}**: {row.about}\n")
        if row.costs:
            lines += ["| | a second | server us | client us |", "|---|---:|---:|---:|"]
        for contestant, told in row.medians().items():
            cells = [told["per_second"], told["server_cpu_us"], told["client_cpu_us"]]
            lines.append(f"| {contestant} | " + " | ".join(map(number, cells)) + " |")
        lines += ["", *[f"- {note}" for note in row.notes]] if row.notes else []
    return "\n".join(lines)


def write_json(rows: Table, about: dict[str, Any], name: str) -> Path:
    RESULTS.mkdir(exist_ok=True)
    told = about | {
        "rows": {
            row.name: {
                "about": row.about,
                "figures": [
                    {
                        "name": figure.name,
                        "value": round(figure.value, 4),
                        "unit": figure.unit,
                        "goal": figure.goal,
                        "met": figure.is_met,
                    }
                    for figure in figures
                ],
                "medians": {
                    contestant: {what: round(value, 3) for what, value in medians.items()}
                    for contestant, medians in row.medians().items()
                },
                "notes": row.notes,
            }
            for row, figures in rows
        }
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(told, indent=1) + "\n")
    return path


def plot(rows: Table, about: dict[str, Any], name: str) -> Path | None:
    """How far each figure is on the good side of its goal, and how fast each queue works."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    goals = []
    for row, figures in rows:
        for figure in figures:
            if figure.at_most and figure.value:
                goals.append((f"{row.name}: {figure.name}", figure.at_most / figure.value))
            elif figure.at_least:
                goals.append((f"{row.name}: {figure.name}", figure.value / figure.at_least))
    speeds = [
        (contestant, told["per_second"])
        for row, _ in rows
        if row.name == "consume"
        for contestant, told in row.medians().items()
    ]
    speeds.sort(key=lambda item: item[1])
    figure, axes = pyplot.subplots(
        2 if speeds else 1,
        1,
        figsize=(10, 1.5 + 0.3 * (len(goals) + len(speeds))),
        height_ratios=[max(1, len(goals)), len(speeds)] if speeds else None,
        squeeze=False,
        layout="constrained",
    )
    top = axes[0][0]
    goals.reverse()
    names, reached = [item[0] for item in goals], [item[1] for item in goals]
    top.barh(names, reached, color=["#2a7f62" if one >= 1 else "#b3402a" for one in reached])
    top.axvline(1, color="black", linewidth=1)
    top.set_xscale("log")
    top.set_title("times better than the goal (1 = the goal)")
    if speeds:
        bottom = axes[1][0]
        bars = bottom.barh([item[0] for item in speeds], [item[1] for item in speeds])
        bottom.bar_label(bars, [f" {item[1]:,.0f}" for item in speeds])
        bottom.set_xscale("log")
        bottom.margins(x=0.15)
        bottom.set_title("jobs a second, one worker process, no-op handler")
    figure.suptitle(
        f"leasekit {about['leasekit']}, {about['server']}, Python {about['python']}, {about['date']}"
    )
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return path


def update_readme(text: str) -> None:
    """Put the figures between the markers of README.md."""
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
