"""Consumers go on: a claimer that is killed, hints that get lost, a server that starts anew, a bug.

Each runs in real time, with short leases. Polls are a minute apart where a hint must do it, so that
no poll can hide a hint that is missing.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from servers import Server, ServerProcess

import leasekit
from leasekit import Leasekit, RunCounts
from leasekit.consuming.keeper import Keeper
from leasekit.consuming.pump import Pump
from leasekit.consuming.schedule import Schedule
from leasekit.hints import Hub
from leasekit.listen import Listener
from leasekit.outbox import Claim

WAIT_S = 20
LEASE_MS = 1_000
MINUTE_MS = 60_000

# Claims one row, says until when by the server's clock, and does not finish it.
CLAIMER = """
import asyncio, sys
import leasekit

async def main():
    async with leasekit.connect(sys.argv[1], prefix=sys.argv[2]) as kit:
        async def handler(claim):
            print(claim.lease_expires_at_ms, flush=True)
            await asyncio.Event().wait()
        await kit.tenant("a", "w").outbox.run("mail", "alice", handler, lease_ms=int(sys.argv[3]))

asyncio.run(main())
"""


@pytest.fixture
async def kit(real_server: Server, tenant_name: str) -> AsyncIterator[Leasekit]:
    async with leasekit.connect(real_server.url, prefix=tenant_name) as kit:
        yield kit


class Running:
    """A run under way, cancelled at the end; `arrived` gives claim and server time of each row."""

    def __init__(
        self, run: Callable[..., Awaitable[RunCounts]], *what: Any, **options: Any
    ) -> None:
        self.counts = RunCounts()
        self.arrived: asyncio.Queue[tuple[Claim, float]] = asyncio.Queue()
        self.task = asyncio.ensure_future(run(*what, self._take, counts=self.counts, **options))

    async def _take(self, claim: Claim) -> None:
        self.arrived.put_nowait((claim, time.monotonic()))

    async def next(self) -> tuple[Claim, float]:
        async with asyncio.timeout(WAIT_S):
            return await self.arrived.get()

    async def __aenter__(self) -> Running:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.task.cancel()
        await asyncio.wait([self.task], timeout=WAIT_S)
        assert self.task.cancelled()


async def claimed_by_a_dead_process(server: Server, kit: Leasekit, prefix: str) -> int:
    """Enqueue a row, let a process claim it, kill that; gives the end of its lease."""
    claimer = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CLAIMER, server.url, prefix, str(LEASE_MS),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert claimer.stdout is not None
    await kit.tenant("a", "w").outbox.enqueue("mail", "alice", {})
    async with asyncio.timeout(WAIT_S):
        lease_end_ms = int(await claimer.stdout.readline())
    claimer.send_signal(signal.SIGKILL)
    await claimer.wait()
    return lease_end_ms


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  -- what it looks at has no event
            await asyncio.sleep(0.01)


async def heard(kit: Leasekit) -> None:
    """Until this client's subscription is there, and what it says at first has been acted on."""
    hub = kit._shared.hub
    await until(lambda: hub._listener is not None and hub._listener.is_subscribed)
    await asyncio.sleep(0.2)


async def test_a_killed_claimers_row_is_taken_over(
    real_server: Server, kit: Leasekit, tenant_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL: another process has the row within 2 s of the lease's end, woken by its hint alone."""
    on_hint = Pump.on_hint

    def deaf_to_new_rows(pump: Pump, tag: str, route: str, delay_ms: int) -> None:
        if delay_ms:  # what is told of a claim: its lease's end
            on_hint(pump, tag, route, delay_ms)

    monkeypatch.setattr(Pump, "on_hint", deaf_to_new_rows)
    options = {"lease_ms": LEASE_MS, "sweep_ms": MINUTE_MS}
    async with Running(kit.run, [("mail", "alice")], **options) as running:
        await heard(kit)
        lease_end_ms = await claimed_by_a_dead_process(real_server, kit, tenant_name)
        claim, _ = await running.next()
        late_ms = (claim.row.claimed_at_ms or 0) - lease_end_ms
        assert 0 <= late_ms <= 2_000
        assert claim.row.attempt_count == 2


async def test_a_lost_hint_delays_by_a_sweep_at_most(
    real_server: Server, kit: Leasekit, tenant_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same while no hint arrives at all: the row is there within a sweep of the lease's end."""
    monkeypatch.setattr(Hub, "_on_message", lambda *arguments: None)
    sweep_ms = 1_500
    async with leasekit.connect(real_server.url, prefix=tenant_name) as other:
        await kit.tenant("a", "w").outbox.counts()
        lease_end_ms = await claimed_by_a_dead_process(real_server, kit, tenant_name)
        async with Running(
            other.run, [("mail", "alice")], lease_ms=LEASE_MS, sweep_ms=sweep_ms
        ) as running:
            claim, _ = await running.next()
            late_ms = (claim.row.claimed_at_ms or 0) - lease_end_ms
            assert 0 <= late_ms <= sweep_ms + 500

            # Nobody says a word of this one, either: only the sweep finds it.
            began = time.monotonic()
            await kit.tenant("a", "w").outbox.enqueue("mail", "alice", {})
            _, at = await running.next()
            assert at - began <= (sweep_ms + 500) / 1_000


async def test_what_was_enqueued_while_deaf_is_found_when_heard_again(
    real_server: Server, kit: Leasekit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscription that was cut off comes back by itself, and its consumers look around."""
    outbox = kit.tenant("a", "w").outbox
    real_server.raw.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
    async with Running(outbox.run, "mail", "alice", poll_ms=MINUTE_MS) as running:
        await heard(kit)
        ears = kit._shared.hub._listener._ears  # type: ignore[union-attr]
        connect, may_connect = ears.connect, asyncio.Event()

        async def later() -> None:
            await may_connect.wait()
            await connect()

        monkeypatch.setattr(ears, "connect", later)
        assert real_server.raw.execute_command("CLIENT", "KILL", "TYPE", "pubsub") >= 1
        await until(lambda: not ears.is_connected)
        await outbox.enqueue("mail", "alice", 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await running.arrived.get()
        may_connect.set()
        assert (await running.next())[0].row.payload == 1
        await outbox.enqueue("mail", "alice", 2)
        assert (await running.next())[0].row.payload == 2
        assert running.counts.restarts == 0


@pytest.mark.parametrize("kind", ["valkey-9", "redis-6.2", "redis-path"])
async def test_consumers_go_on_after_the_server_was_killed(
    private_server: Callable[..., ServerProcess], kind: str
) -> None:
    """Within 2 s of the first PING rows are at work again, without help; nothing acked is lost."""
    server = private_server(kind, appendonly="yes", appendfsync="always")
    began, at_work = asyncio.Event(), 0

    async with leasekit.connect(server.url) as kit:
        outbox = kit.tenant("a", "w").outbox

        async def slow(claim: Claim) -> None:
            nonlocal at_work
            at_work += 1
            began.set()
            await asyncio.sleep(0.3)

        held = RunCounts()
        options = {"lease_ms": 5_000, "counts": held, "poll_ms": MINUTE_MS}
        work = asyncio.ensure_future(outbox.run("work", "slow", slow, **options))
        async with Running(
            kit.run, [("mail", "alice")], lease_ms=LEASE_MS, sweep_ms=MINUTE_MS
        ) as running:
            await outbox.enqueue("mail", "alice", 0)
            await running.next()
            for turn in range(1, 4):
                began.clear()
                await outbox.enqueue("work", "slow", turn)
                await began.wait()
                await asyncio.to_thread(server.kill)
                await asyncio.sleep(0.5)
                await asyncio.to_thread(server.start)  # returns when PING answers
                up = time.monotonic()
                await outbox.enqueue("mail", "alice", turn)
                while (await running.next())[0].row.payload != turn:
                    pass
                assert time.monotonic() - up <= 2
        await until(lambda: held.acked + held.lost >= 3)
        work.cancel()
        await asyncio.wait([work])
        counts = await outbox.counts(lane="work")
        assert (counts.sent, counts.pending, counts.claimed) == (3, 0, 0)
        assert (held.acked, at_work) == (3, 3)
        assert running.counts.restarts == held.restarts == 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Schedule, "advance"), (Schedule, "took"), (Keeper, "_look"), (Listener, "_ping")],
)
async def test_an_inner_task_that_dies_is_started_again(
    kit: Leasekit,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: type,
    name: str,
) -> None:
    """A bug's exception in a task inside is logged and counted, and the work goes on."""
    outbox, whole, broken = kit.tenant("a", "w").outbox, getattr(kind, name), []

    def breaks_once(*arguments: Any, **options: Any) -> Any:
        if not broken:
            broken.append(name)
            raise ZeroDivisionError("planted")
        return whole(*arguments, **options)

    monkeypatch.setattr(kind, name, breaks_once)
    async with Running(outbox.run, "mail", "alice", lease_ms=300, poll_ms=200) as running:
        for number in range(3):
            await outbox.enqueue("mail", "alice", number)
            await running.next()
            await asyncio.sleep(0.1)
    assert broken == [name]
    assert "planted" in caplog.text
    if kind is not Listener:  # it belongs to all runs of the client, and counts for none
        assert running.counts.restarts == 1
