"""The bench still runs: every row at tiny size, without peers; its figures mean nothing here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench" / "run.py"


def test_bench_measures_every_row() -> None:
    """`bench/run.py --quick` prints a figure for each row of the goals' table."""
    done = subprocess.run(
        [sys.executable, str(BENCH), "--quick", "--no-peers"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    for row in ("server", "calls", "api", "tenants", "lone", "memory", "growth", "keys"):
        assert f"\n| {row} | " in done.stdout, done.stdout + done.stderr
    assert "\n| leasekit | " in done.stdout.partition("**consume**")[2]
