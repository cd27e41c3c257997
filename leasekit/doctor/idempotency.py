"""Idempotency records, and when each may be forgotten."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from leasekit.doctor.finding import Finding, Problem
from leasekit.doctor.pages import Pages

__all__ = ["check_records", "judge_record"]

_RECORD = re.compile(
    rb"(reserved|completed|conflicted|released) (\S+) \d+ \d+ \d+ \d+ \d+ (?:reclaim|park) \S+\n"
    rb"[^\n]*\n[^\n]*\n",
)


def judge_record(doc: bytes | None, end: float | None) -> list[Problem]:
    """What is wrong with an idempotency record and its entry among those to be forgotten."""
    if doc is None:
        if end is None:
            return []
        return [Problem("key_end_without_record", "due", "an end without a record")]
    if _RECORD.match(doc) is None:
        return [Problem("unreadable_record", "docs", "it cannot be read")]
    if end is None:
        return [Problem("key_without_end", "due", "when it may be forgotten is not kept")]
    return []


async def check_records(pages: Pages) -> AsyncIterator[Finding]:
    keys = pages.keys
    judged: set[bytes] = set()
    for command, key in (
        ("HSCAN", keys.idempotency_docs),
        ("ZSCAN", keys.idempotency_due),
    ):
        async for page in pages.scan(command, key, documents=True):
            names = [name for name, _ in page if name not in judged]
            for start in range(0, len(names), pages.pace.count):
                some = names[start : start + pages.pace.count]
                docs, ends = await pages.backend.look(
                    ("HMGET", keys.idempotency_docs, *some),
                    ("ZMSCORE", keys.idempotency_due, *some),
                )
                for name, doc, end in zip(some, docs, ends, strict=True):
                    for problem in judge_record(doc, end):
                        judged.add(name)
                        yield pages.finding(
                            problem, name.decode("utf-8", "replace"), concept="idempotency"
                        )
