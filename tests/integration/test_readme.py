"""The README's examples do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from servers import Server

README = Path(__file__).parents[2] / "README.md"


def printed(number: int, server: Server, tenant_name: str) -> list[str]:
    """The lines that an example prints, run as it stands but for the tenant's name."""
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 4
    example = examples[number]
    own_tenant = example.replace('"production"', f'"{tenant_name}"')

    done = subprocess.run(
        [sys.executable, "-c", own_tenant],
        env={**os.environ, "LEASEKIT_URL": server.url},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_consuming_runs_as_printed(real_server: Server, tenant_name: str) -> None:
    """The dispatcher buries one letter, delivers the other at its second attempt, and stops."""
    lines = printed(1, real_server, tenant_name)

    assert lines == ["delivered to somewhere", "1 delivered, 1 dead"]


def test_example_runs_as_printed(real_server: Server, tenant_name: str) -> None:
    """The example of the README runs as it stands and prints what its comments promise."""
    lines = printed(0, real_server, tenant_name)

    assert lines[0].startswith("delivering {'event': 'paid'} under fence ")
    assert lines[1] == "acked"
    assert lines[2].startswith("alone, under fence ")
    assert lines[3:] == ["{'receipt': 'r-1'}", "{'receipt': 'r-1'}"]


def test_the_gates_example_runs_as_printed(real_server: Server, tenant_name: str) -> None:
    """What was sent is refused, and a guarded tool gives its first result back."""
    lines = printed(2, real_server, tenant_name)

    assert lines == ["sent", "{'receipt': 'r-8'}", "{'receipt': 'r-8'}"]


def test_the_ledgers_example_runs_as_printed(real_server: Server, tenant_name: str) -> None:
    """A failed action leaves a dead letter and a compensation, whose execution settles both."""
    lines = printed(3, real_server, tenant_name)

    assert lines == [
        "{'outbox': 1, 'tool_effects': 1, 'dead_letters': 1, 'compensations': 1}",
        "completed ['linked_to_compensation']",
    ]
