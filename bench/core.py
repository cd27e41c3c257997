"""The two figures that say whether coalescing works, as ratios in one interleaved run.

    python bench/core.py [--url URL] [--rounds 5] [--coroutines 1000] [--lifecycles 20]

1. Throughput: so many coroutines, each enqueueing, claiming and acknowledging one row at a time through
   leasekit, against redis-py sending the very same scripts one by one over a pool of 50 connections.
2. A lone call: leasekit's ack by one coroutine against `evalsha` of redis-py with the same script and
   arguments on one connection, p50.

It also counts the redis calls that a claim and an ack make at 10 and at 100 rows (INFO commandstats).
CPU seconds are the server's and the client's own; on two cores wall time has both in it.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import platform
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import redis.asyncio as redis_asyncio
import uvloop

import leasekit
from leasekit import scripts
from leasekit.keys import Keys, route_of
from leasekit.scripts import read_scripts

LANE, TARGET, CONSUMER = "bench", "destination", "bench"
PAYLOAD = {"body": "x" * 189}  # 200 bytes of JSON
LEASE_MS = 60_000
LONE_CALLS = 2_000


@dataclass(slots=True)
class Run:
    """What one round of one design cost."""

    seconds: float
    server_cpu_s: float
    client_cpu_s: float


class Plain:
    """redis-py as people use it: one EVALSHA a call, the same scripts, the same arguments."""

    def __init__(self, client: redis_asyncio.Redis, keys: Keys, *, shebang: bool) -> None:
        self._client = client
        self._shebang = shebang
        self._route = route_of(LANE, TARGET)
        retention = leasekit.Retention()
        dead = {"dead_keep_ms": retention.dead_ms, "dead_keep_count": retention.dead_count}
        self._enqueue = self._bound(
            keys, "outbox/enqueue", repeated=0, route=self._route, window_ms=retention.dedupe_ms
        )
        self._claim = self._bound(
            keys, "outbox/claim", route=self._route, lease_ms=LEASE_MS, **dead
        )
        self._ack = self._bound(
            keys,
            "outbox/ack",
            route=self._route,
            repeated=0,
            keep_ms=retention.finished_ms,
            keep_count=retention.finished_count,
            keep_bytes=retention.finished_bytes,
        )

    def _bound(self, keys: Keys, name: str, **arguments: str | int) -> tuple[object, ...]:
        one = read_scripts()[name]
        named = {
            key: keys.outbox_due(self._route)
            if key == "due"
            else keys.fence
            if key == "fence"
            else getattr(keys, f"outbox_{key}")
            for key in one.keys
        }
        bound = one.bind(named, {"now_ms": "", **arguments})
        return scripts.call_command(one, bound, (), shebang=self._shebang)[1:]

    async def enqueue(self) -> None:
        draft = f"0 5 reclaim {self._route} ~ ~\n".encode() + b'{"body":"' + b"x" * 189 + b'"}'
        await self._client.evalsha(*self._enqueue, leasekit.new_id(), draft, 0, "")

    async def claim(self) -> tuple[bytes, str]:
        token = leasekit.new_token()
        reply = await self._client.evalsha(*self._claim, token, 1, CONSUMER)
        return reply[4][3], token

    async def ack(self, id: bytes, token: str) -> None:
        reply = await self._client.evalsha(*self._ack, id, token)
        assert reply[1] == b"acked"

    async def lifecycle(self) -> None:
        await self.enqueue()
        await self.ack(*await self.claim())


async def measure(
    kit: leasekit.Leasekit, work: Callable[[], Awaitable[object]], coroutines: int, repeats: int
) -> Run:
    async def worker() -> None:
        for _ in range(repeats):
            await work()

    gc.collect()
    server_before = await server_cpu_s(kit)
    client_before, began = time.process_time(), time.perf_counter()
    await asyncio.gather(*[worker() for _ in range(coroutines)])
    seconds = time.perf_counter() - began
    client_cpu_s = time.process_time() - client_before
    return Run(seconds, await server_cpu_s(kit) - server_before, client_cpu_s)


async def server_info(kit: leasekit.Leasekit, section: str) -> dict[str, str]:
    text: bytes = await kit._shared.backend.command("INFO", section)
    lines = [line.split(":", 1) for line in text.decode().splitlines() if ":" in line]
    return {line[0]: line[1] for line in lines}


async def server_cpu_s(kit: leasekit.Leasekit) -> float:
    info = await server_info(kit, "cpu")
    return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


async def latencies_us(call: Callable[[], Awaitable[object]], count: int) -> list[float]:
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        await call()
        taken.append((time.perf_counter() - began) * 1e6)
    return taken


async def redis_calls(
    kit: leasekit.Leasekit, action: Callable[[], Awaitable[object]]
) -> dict[str, int]:
    """Which redis calls one script call made, its own EVALSHA apart."""

    async def counted() -> dict[str, int]:
        info = await server_info(kit, "commandstats")
        return {
            name.removeprefix("cmdstat_"): int(value.split(",")[0].removeprefix("calls="))
            for name, value in info.items()
        }

    before = await counted()
    await action()
    after = await counted()
    made = {name: after[name] - before.get(name, 0) for name in after}
    return {name: n for name, n in made.items() if n and name not in ("evalsha", "info")}


async def print_redis_calls(kit: leasekit.Leasekit) -> None:
    outbox = kit.tenant("bench", "calls").outbox
    drafts = [leasekit.Draft(lane=LANE, target=TARGET, payload=PAYLOAD) for _ in range(130)]
    await outbox.enqueue_many(drafts)
    print("redis calls of one script call (the last of an ack are its look for rows to forget)")
    for rows in (10, 100):
        claims: list[leasekit.outbox.Claim] = []

        async def claim(rows: int = rows, claims: list[leasekit.outbox.Claim] = claims) -> None:
            claims += await outbox.claim(LANE, TARGET, limit=rows, consumer=CONSUMER)

        async def ack(claims: list[leasekit.outbox.Claim] = claims) -> None:
            await asyncio.gather(*[claim.ack() for claim in claims])

        for name, action in (("claim", claim), ("ack", ack)):
            made = await redis_calls(kit, action)
            listed = " ".join(f"{call}={n}" for call, n in sorted(made.items()))
            print(f"  {name:5} of {rows:3} rows: {sum(made.values()):2} calls: {listed}")


async def main(url: str, rounds: int, coroutines: int, lifecycles: int) -> None:
    async with leasekit.connect(url) as kit:
        server = kit.server
        print(
            f"leasekit {leasekit.__version__}, {server.name} {'.'.join(map(str, server.version))} "
            f"({server.persistence}), Python {platform.python_version()}, uvloop, "
            f"{platform.machine()}, {rounds} interleaved rounds"
        )
        await print_redis_calls(kit)
        outbox = kit.tenant("bench", "ours").outbox
        socket_path = kit._shared.backend.info.url.removeprefix("unix://")
        if kit._shared.backend.info.url.startswith("embedded://"):
            socket_path = kit._shared.backend.socket_path
        pool = redis_asyncio.BlockingConnectionPool(
            connection_class=redis_asyncio.UnixDomainSocketConnection,
            path=socket_path,
            max_connections=50,
            timeout=None,
        )
        client = redis_asyncio.Redis(connection_pool=pool)
        plain = Plain(client, Keys("plain", "bench.plain"), shebang=server.shebang)

        async def ours() -> None:
            await outbox.enqueue(LANE, TARGET, PAYLOAD)
            (claim,) = await outbox.claim(LANE, TARGET, lease_ms=LEASE_MS, consumer=CONSUMER)
            await claim.ack()

        designs: dict[str, list[Run]] = {"leasekit": [], "redis-py, one by one": []}
        for _ in range(rounds):
            designs["leasekit"].append(await measure(kit, ours, coroutines, lifecycles))
            few = max(1, lifecycles // 10)
            run = await measure(kit, plain.lifecycle, coroutines, few)
            scale = lifecycles / few
            designs["redis-py, one by one"].append(
                Run(run.seconds * scale, run.server_cpu_s * scale, run.client_cpu_s * scale)
            )
        total = coroutines * lifecycles
        print(f"\nlifecycles (enqueue + claim + ack, 200-byte payload) by {coroutines} coroutines")
        for name, runs in designs.items():
            seconds = statistics.median(run.seconds for run in runs)
            server_us = statistics.median(run.server_cpu_s for run in runs) / total * 1e6
            client_us = statistics.median(run.client_cpu_s for run in runs) / total * 1e6
            print(
                f"  {name:22} {total / seconds:9,.0f}/s   "
                f"server {server_us:5.1f} us, client {client_us:5.1f} us of CPU each"
            )
        ratios = [
            slow.seconds / fast.seconds
            for fast, slow in zip(designs["leasekit"], designs["redis-py, one by one"], strict=True)
        ]
        print(f"  ratio, median of the rounds: {statistics.median(ratios):.1f} x  (goal: >= 10 x)")

        ack_ours = outbox.ack
        missing, token = leasekit.new_id(), leasekit.new_token()
        outbox._remember(missing, route_of(LANE, TARGET))
        ours_us: list[float] = []
        plain_us: list[float] = []
        for _ in range(rounds):
            ours_us += await latencies_us(lambda: ack_ours(missing, token), LONE_CALLS)
            plain_us += await latencies_us(
                lambda: client.evalsha(*plain._ack, missing, token), LONE_CALLS
            )
        ours_p50, plain_p50 = statistics.median(ours_us), statistics.median(plain_us)
        print("\na lone call (ack of a row that is not there), p50")
        print(f"  leasekit {ours_p50:.0f} us, evalsha of redis-py {plain_p50:.0f} us")
        print(f"  ratio: {ours_p50 / plain_p50:.2f} x  (goal: <= 1.3 x)")
        await client.aclose()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="embedded://")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--coroutines", type=int, default=1_000)
    parser.add_argument("--lifecycles", type=int, default=20)
    given = parser.parse_args()
    uvloop.run(main(given.url, given.rounds, given.coroutines, given.lifecycles))
