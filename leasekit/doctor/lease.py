"""Leases: a line a name, its end, and its place among the names."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from leasekit.doctor.finding import Finding, Problem
from leasekit.doctor.pages import Pages

__all__ = ["check_leases", "judge_lease"]

_LEASE = re.compile(rb"(held|released) (\S+) (\d+) (\d+) (\d+) (.*)\Z", re.DOTALL)


def judge_lease(line: bytes | None, end: float | None, is_named: bool) -> list[Problem]:
    """What is wrong with a name: its line, its end among the ends, whether it is listed."""
    if line is None:
        problems = []
        if end is not None:
            problems.append(Problem("lease_end_without_lease", "due", "an end without a lease"))
        if is_named:
            problems.append(Problem("lease_name_without_lease", "names", "a name without a lease"))
        return problems
    found = _LEASE.match(line)
    if found is None:
        return [Problem("unreadable_lease", "docs", "its line cannot be read")]
    problems = []
    told = int(found[5])
    if end is None:
        problems.append(
            Problem("lease_without_end", "due", f"it ends at {told}, which is not kept")
        )
    elif end != told:
        what = f"its end is kept as {end:.0f}, its line says {told}"
        problems.append(Problem("lease_end_disagrees", "due", what))
    if not is_named:
        problems.append(Problem("lease_without_name", "names", "it is not among the names"))
    return problems


async def check_leases(pages: Pages) -> AsyncIterator[Finding]:
    keys = pages.keys
    judged: set[bytes] = set()
    for command, key in (
        ("HSCAN", keys.lease_docs),
        ("ZSCAN", keys.lease_due),
        ("ZSCAN", keys.lease_names),
    ):
        async for page in pages.scan(command, key):
            names = [name for name, _ in page if name not in judged]
            if not names:
                continue
            lines, ends, places = await pages.backend.look(
                ("HMGET", keys.lease_docs, *names),
                ("ZMSCORE", keys.lease_due, *names),
                ("ZMSCORE", keys.lease_names, *names),
            )
            for name, line, end, place in zip(names, lines, ends, places, strict=True):
                if found := _LEASE.match(line or b""):
                    pages.note_fence(int(found[3]))
                for problem in judge_lease(line, end, place is not None):
                    judged.add(name)
                    yield pages.finding(problem, name.decode("utf-8", "replace"), concept="lease")
