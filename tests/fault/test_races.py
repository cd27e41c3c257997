"""Processes that race, callers that give up, a server that is killed: real time, but little of it."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fault.calls import intent_of, success_of
from servers import Server, ServerProcess

import leasekit
from leasekit import InProgress, LeasekitError, OutcomeUnknown, Unavailable, new_id, new_token
from leasekit.outbox import Outbox

PrivateServer = Callable[..., ServerProcess]

ROWS = 300
ROWS_HELD = 7  # what a racer takes at once
RACE_SECONDS_MAX = 30

# Claims until all rows are sent, and says of each row what came of its ack. Its first claim it holds
# until it is told to go on. argv: url, tenant, lease_ms, and for how long it holds every other claim
# before it acks.
RACER = """
import asyncio, json, sys
import leasekit

async def told():
    assert await asyncio.to_thread(sys.stdin.readline) == "go\\n"

async def main(url, tenant, lease_ms, held_ms):
    async with leasekit.connect(url) as kit:
        outbox = kit.tenant(tenant, "w").outbox
        await outbox.counts()
        print("ready", flush=True)
        await told()
        is_first = True
        while True:
            claims = await outbox.claim("mail", "alice", limit=7, lease_ms=lease_ms, consumer="c")
            if claims and is_first:
                print("holding", flush=True)
                await told()
                is_first = False
            elif claims:
                await asyncio.sleep(held_ms / 1_000)
            outcomes = await asyncio.gather(*[claim.ack() for claim in claims])
            for claim, outcome in zip(claims, outcomes):
                print(json.dumps([claim.row.id, claim.fence, outcome]))
            if not claims:
                counts = await outbox.counts()
                if not is_first and not counts.pending and not counts.claimed:
                    return
                await asyncio.sleep(0.01)

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
"""


class Racer:
    """A process that runs RACER, told what to do over a pipe."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._in, self._out = process, process.stdin, process.stdout

    async def says(self, word: str) -> None:
        async with asyncio.timeout(RACE_SECONDS_MAX):
            assert await self._out.readline() == f"{word}\n".encode()

    def go(self) -> None:
        self._in.write(b"go\n")

    async def seen(self) -> list[Any]:
        """All that it saw, (id, fence, outcome) each, once it has ended."""
        async with asyncio.timeout(RACE_SECONDS_MAX):
            lines = (await self._out.read()).splitlines()
            assert await self._process.wait() == 0
        return [json.loads(line) for line in lines]

    async def end(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.communicate()


@asynccontextmanager
async def racers(
    url: str, tenant: str, *, lease_ms: int, held_ms: tuple[int, int]
) -> AsyncIterator[list[Racer]]:
    """Two racers that are connected and wait to be told to claim."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started: list[Racer] = []
    try:
        for held in held_ms:
            arguments = [sys.executable, "-c", RACER, url, tenant, str(lease_ms), str(held)]
            process = await asyncio.create_subprocess_exec(
                *arguments,
                env=environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            started.append(Racer(process))
        for racer in started:
            await racer.says("ready")
        yield started
    finally:
        for racer in started:
            await racer.end()


async def fill(outbox: Outbox, count: int) -> list[str]:
    enqueued = await asyncio.gather(
        *[outbox.enqueue("mail", "alice", number, max_attempts=None) for number in range(count)]
    )
    return [one.row.id for one in enqueued]


async def test_two_processes_never_hold_one_row_at_once(
    real_server: Server, tenant_name: str
) -> None:
    """While leases live: every row is claimed once, by one of them, and acked once."""
    async with leasekit.connect(real_server.url) as kit:
        outbox = kit.tenant(tenant_name, "w").outbox
        ids = await fill(outbox, ROWS)
        async with racers(real_server.url, tenant_name, lease_ms=20_000, held_ms=(3, 3)) as both:
            for racer in both:
                racer.go()
            for racer in both:
                await racer.says("holding")
            for racer in both:
                racer.go()
            seen = [await racer.seen() for racer in both]
        counts = await outbox.counts()

    assert all(seen)
    assert sorted(id for one in seen for id, _, _ in one) == sorted(ids)
    assert {outcome for one in seen for _, _, outcome in one} == {"acked"}
    assert (counts.sent, counts.pending, counts.claimed) == (ROWS, 0, 0)


async def test_of_many_holders_one_ends_the_row(real_server: Server, tenant_name: str) -> None:
    """One racer holds everything for longer than the lease: each row is acked by exactly one
    holder, none is lost, and the ack that counts is that of the row's last fence.

    At first there is only what the slow one holds, so that the other's first claim takes it over.
    """
    async with leasekit.connect(real_server.url) as kit:
        outbox = kit.tenant(tenant_name, "w").outbox
        ids = await fill(outbox, ROWS_HELD)
        async with racers(real_server.url, tenant_name, lease_ms=20, held_ms=(60, 2)) as both:
            for racer in both:
                racer.go()
                await racer.says("holding")
            ids += await fill(outbox, ROWS - ROWS_HELD)
            for racer in both:
                racer.go()
            seen = [await racer.seen() for racer in both]
        rows = {id: await outbox.get(id) for id in ids}

    held = [entry for one in seen for entry in one]
    acked = {id: fence for id, fence, outcome in held if outcome == "acked"}
    assert Counter(id for id, _, outcome in held if outcome == "acked") == Counter(ids)
    assert {outcome for _, _, outcome in held} == {"acked", "lost_claim"}
    for id, fence, outcome in held:
        assert fence <= acked[id]
        assert (fence == acked[id]) == (outcome == "acked")
    assert all(row is not None and row.fence == acked[id] for id, row in rows.items())


@pytest.mark.parametrize("kind", ["valkey-9", "redis-6.2", "redis-path"])
async def test_a_killed_server_keeps_what_it_acknowledged(
    private_server: PrivateServer, kind: str
) -> None:
    """With an AOF that is written always: SIGKILL under load loses no acknowledged row and no
    acknowledged ack, and the same client goes on when the server is back."""
    server = private_server(kind, appendonly="yes", appendfsync="always")
    enqueued: list[str] = []
    acked: list[str] = []
    failures: list[LeasekitError] = []
    under_load, is_over, goes_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    before_the_kill = sys.maxsize

    async def produce(outbox: Outbox) -> None:
        while not is_over.is_set():
            id = new_id()
            await outbox.enqueue("mail", "alice", {"n": 1}, id=id)
            enqueued.append(id)

    async def consume(outbox: Outbox) -> None:
        while not is_over.is_set():
            for claim in await outbox.claim("mail", "alice", limit=3, consumer="c"):
                assert await claim.ack() == "acked"
                acked.append(claim.row.id)
            if len(acked) > 100:
                under_load.set()
            if len(acked) > before_the_kill + 100:
                goes_on.set()

    async def until_it_fails(work: Any) -> None:
        try:
            await work
        except LeasekitError as error:
            failures.append(error)

    async with leasekit.connect(server.url, timeout_ms=2_000) as kit:
        outbox = kit.tenant("o", "w").outbox
        workers = [
            asyncio.create_task(until_it_fails(work(outbox)))
            for work in (produce, consume)
            for _ in range(10)
        ]
        await under_load.wait()
        await asyncio.to_thread(server.kill)
        before_the_kill = len(acked)
        await asyncio.to_thread(server.start)
        await asyncio.wait_for(goes_on.wait(), timeout=20)
        is_over.set()
        await asyncio.wait(workers, timeout=20)
        assert all(worker.done() and not worker.exception() for worker in workers)
        assert all(isinstance(error, OutcomeUnknown | Unavailable) for error in failures)

        rows = dict(zip(enqueued, await asyncio.gather(*map(outbox.get, enqueued)), strict=True))
        assert [id for id, row in rows.items() if row is None] == []
        sent = await asyncio.gather(*map(outbox.get, acked))
        assert {row.status for row in sent if row is not None} == {"sent"}
        assert len(set(acked)) == len(acked) == len([row for row in sent if row is not None])


async def test_callers_who_give_up_lose_nothing(real_server: Server, tenant_name: str) -> None:
    """Half of all calls cancelled at random: every row is still there, nothing stays taken, and
    the others' answers are their own."""
    rng = random.Random(7)
    async with leasekit.connect(real_server.url) as kit:
        outbox = kit.tenant(tenant_name, "w").outbox
        ids = await fill(outbox, 200)
        finished: list[str] = []

        async def claim_and_ack() -> None:
            for claim in await outbox.claim("mail", "alice", limit=2, consumer="c"):
                assert await claim.ack() == "acked"
                finished.append(claim.row.id)

        async def look(id: str) -> None:
            row = await outbox.get(id)
            assert row is not None
            assert row.id == id

        for _ in range(20):
            tasks = [asyncio.create_task(claim_and_ack()) for _ in range(6)]
            tasks += [asyncio.create_task(look(rng.choice(ids))) for _ in range(20)]
            for _ in range(rng.randrange(6)):
                await asyncio.sleep(0)
            for task in rng.sample(tasks, len(tasks) // 2):
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert {type(one) for one in results} <= {type(None), asyncio.CancelledError}

        found = await asyncio.gather(*map(outbox.get, ids))
        assert all(row is not None for row in found)
        status = {row.id: row.status for row in found if row is not None}
        assert len(set(finished)) == len(finished)
        assert all(status[id] == "sent" for id in finished)
        # A caller cancelled between its claim and its ack holds the row on purpose; no other does.
        assert set(status.values()) <= {"pending", "sent", "claimed"}


@pytest.mark.parametrize("turns", range(5))
async def test_a_caller_who_gave_up_may_ask_again_by_its_token(
    turns: int, real_server: Server, tenant_name: str
) -> None:
    """Wherever the first call was when it was cancelled: what the second is granted, it keeps."""
    async with leasekit.connect(real_server.url) as kit, leasekit.connect(real_server.url) as other:
        gate, others = kit.tenant(tenant_name, "w").gate, other.tenant(tenant_name, "w").gate
        await gate.prepare(intent_of("first"))
        token = new_token()
        given_up = asyncio.create_task(gate.prepare(intent_of("key"), token=token))
        for _ in range(turns):
            await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        receipt = await gate.prepare(intent_of("key"), token=token, repeat=True)
        await gate.prepare(intent_of("last"))  # behind whatever the first call may have led to
        with pytest.raises(InProgress):
            await others.prepare(intent_of("key"))
        assert await gate.complete(success_of("key"), receipt=receipt) == "recorded"
