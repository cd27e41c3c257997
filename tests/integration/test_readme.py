"""The README's example does what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from servers import Server

README = Path(__file__).parents[2] / "README.md"


def test_example_runs_as_printed(real_server: Server, tenant_name: str) -> None:
    """The example of the README runs as it stands and prints what its comments promise."""
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    own_tenant = example.replace('"production"', f'"{tenant_name}"')

    done = subprocess.run(
        [sys.executable, "-c", own_tenant],
        env={**os.environ, "LEASEKIT_URL": real_server.url},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("delivering {'event': 'paid'} under fence ")
    assert lines[1] == "acked"
    assert lines[2].startswith("alone, under fence ")
    assert lines[3:] == ["{'receipt': 'r-1'}", "{'receipt': 'r-1'}"]
