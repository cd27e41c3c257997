"""A producer: enqueues its share of the rows, as fast as it is allowed to."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from itertools import count
from typing import Any

import msgspec

from leasekit.client import Leasekit, connect
from leasekit.demo import messages
from leasekit.demo.child import say
from leasekit.demo.destination import digest_of
from leasekit.demo.messages import LANE, RETENTION, TARGET, Allow, Finish, Order, Setup
from leasekit.errors import InvalidInput, LeasekitError
from leasekit.model import Draft

__all__ = ["Producer", "bodies"]

GENERATED_BYTES_MOST = 1_500


class Producer:
    """Producer `number` of `of` enqueues each of-th batch of rows, numbered over all producers."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._allowed = 0
        self._news = asyncio.Event()

    def obey(self, order: Order) -> None:
        if isinstance(order, Allow):
            self._allowed = max(self._allowed, order.rows)
        elif isinstance(order, Finish):
            self._allowed = self._setup.rows
        self._news.set()

    async def run(self) -> None:
        setup = self._setup
        source = bodies(setup.input_path, setup.number)
        async with connect(setup.url, prefix=setup.prefix, retention=RETENTION) as kit:
            say(messages.Ready())
            for first in range(setup.number * setup.batch, setup.rows, setup.of * setup.batch):
                rows = min(setup.batch, setup.rows - first)
                await self._wait_until_allowed(first + rows)
                await self._enqueue(kit, [next(source) for _ in range(rows)])

    async def _wait_until_allowed(self, rows: int) -> None:
        while self._allowed < rows:
            self._news.clear()
            await self._news.wait()

    async def _enqueue(self, kit: Leasekit, payloads: list[Any]) -> None:
        setup = self._setup
        outbox = kit.tenant(setup.org, setup.workspace).outbox
        drafts = [
            Draft(lane=LANE, target=TARGET, payload=payload, max_attempts=None)
            for payload in payloads
        ]
        answers = await outbox.enqueue_many(drafts)
        rows = []
        for answer, payload in zip(answers, payloads, strict=True):
            if isinstance(answer, LeasekitError):
                raise answer
            rows.append((answer.row.id, digest_of(messages.body_of(payload))))
        say(messages.Enqueued(rows))


def bodies(input_path: str | None, number: int = 0) -> Iterator[Any]:
    """JSON values without end: the lines of a JSONL file again and again, or generated ones."""
    if input_path is None:
        yield from _generated(random.Random(number))
    while True:
        found = False
        with open(input_path or "", "rb") as lines:
            for line in lines:
                if line.strip():
                    found = True
                    yield msgspec.json.decode(line)
        if not found:
            raise InvalidInput("input holds no line with a JSON value", field="input")


def _generated(chance: random.Random) -> Iterator[dict[str, Any]]:
    """Something like webhook bodies, the same in each run."""
    for sequence in count(1):
        yield {
            "event": chance.choice(("order.paid", "order.shipped", "user.created", "build.done")),
            "sequence": sequence,
            "customer": {"id": chance.randrange(10**9), "name": chance.choice(("Zoë", "李", "Bo"))},
            "amount_cents": chance.randrange(10**6),
            "note": "lorem ipsum " * chance.randrange(GENERATED_BYTES_MOST // 12),
            "tags": [],
            "parent": None,
        }
