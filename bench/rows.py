"""The rows of the goals' table: what each measures, and the figures that come of it.

A row measures a little in every round, its contestants in turn, so that what disturbs the machine
disturbs all of them; its figures are medians over the rounds, and ratios of what was taken in the same
round.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, ClassVar

import msgspec
import peers
import redis.asyncio as redis_asyncio
from barest import CONSUMER, LANE, LEASE_MS, PAYLOAD, TARGET, Barest, Ours
from rig import ByHand, Cost, Server, by_coroutines, measured

import leasekit
from leasekit import codec, gate, ledger

POOL_CONNECTIONS = 50
HANDS = 3  # batches under way when sent by hand, as many as the client has flights


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much one round measures."""

    coroutines: int = 1_000
    lifecycles: int = 20  # by each coroutine
    plain_lifecycles: int = 2  # the same one by one through redis-py, which is that much slower
    batches: int = 200  # of 100 rows a round; fewer rows where a batch is smaller
    kept_rows: int = leasekit.Retention().finished_count
    lone_calls: int = 2_000
    tenants: tuple[int, ...] = (1_000, 10_000)
    memory_rows: int = 200_000
    backlog: tuple[int, int] = (100_000, 1_000_000)
    records: tuple[int, int] = (1_000, 100_000)
    jobs: float = 1.0  # what each peer's own number is multiplied by


SMALL = Sizes(
    coroutines=50,
    lifecycles=2,
    plain_lifecycles=1,
    batches=4,
    kept_rows=1_000,
    lone_calls=50,
    tenants=(20, 50),
    memory_rows=2_000,
    backlog=(2_000, 4_000),
    records=(1_000, 2_000),
    jobs=0.02,
)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. `at_most` or `at_least` is the goal; neither: told for comparison."""

    name: str
    value: float
    unit: str = "x"
    at_most: float | None = None
    at_least: float | None = None

    @property
    def is_met(self) -> bool | None:
        if self.at_most is not None:
            return self.value <= self.at_most
        if self.at_least is not None:
            return self.value >= self.at_least
        return None

    @property
    def goal(self) -> str:
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return "" if self.at_least is None else f">= {self.at_least:g}"


class Rig:
    """What the rows share: server, client, commands by hand, redis-py, sizes."""

    def __init__(
        self, server: Server, kit: leasekit.Leasekit, by_hand: ByHand, sizes: Sizes
    ) -> None:
        self.server = server
        self.kit = kit
        self.by_hand = by_hand
        self.sizes = sizes
        pool = redis_asyncio.BlockingConnectionPool(
            connection_class=redis_asyncio.UnixDomainSocketConnection,
            path=server.socket_path,
            max_connections=POOL_CONNECTIONS,
            timeout=None,
        )
        self.redis_py = redis_asyncio.Redis(connection_pool=pool)

    async def close(self) -> None:
        await self.redis_py.aclose()
        await self.by_hand.close()

    async def lifecycle(self, tenant: leasekit.Tenant) -> None:
        await tenant.outbox.enqueue(LANE, TARGET, PAYLOAD)
        (claim,) = await tenant.outbox.claim(LANE, TARGET, lease_ms=LEASE_MS, consumer=CONSUMER)
        await claim.ack()

    async def raw_lifecycles(self, barest: Barest, batches: Sequence[Sequence[str]]) -> None:
        """Batches by hand: enqueue, claim, ack, a few batches side by side."""
        left = list(batches)

        async def hand() -> None:
            while left:
                ids, token = left.pop(), leasekit.new_token()
                await self.by_hand.one(barest.enqueue(ids))
                held = barest.claimed(await self.by_hand.one(barest.claim(token, len(ids))))
                await self.by_hand.one(barest.ack(held, token))

        await asyncio.gather(*[hand() for _ in range(HANDS)])


class Row:
    """A row of the table. `costs[contestant]` holds one Cost a unit of work and round."""

    name = ""
    about = ""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.costs: defaultdict[str, list[Cost]] = defaultdict(list)
        self.notes: list[str] = []

    async def round(self) -> None:
        raise NotImplementedError

    def figures(self) -> Iterable[Figure]:
        raise NotImplementedError

    async def close(self) -> None:
        """Give back what the row had for itself; nothing where it never began."""

    async def take(self, contestant: str, count: int, work: Callable[[], Awaitable[Any]]) -> Any:
        cost, result = await measured(self.rig.server, work)
        self.costs[contestant].append(cost.per(count))
        return result

    def ratio(self, above: str, below: str, what: str) -> float:
        """Median over the rounds of one contestant's cost divided by another one's."""
        pairs = zip(self.costs[above], self.costs[below], strict=True)
        return statistics.median(getattr(a, what) / getattr(b, what) for a, b in pairs)

    def medians(self) -> dict[str, dict[str, float]]:
        """What a unit of work cost each contestant, in microseconds, and units a second."""
        told = {}
        for contestant, costs in self.costs.items():
            middle = {
                what.removesuffix("_s").replace("seconds", "wall") + "_us": 1e6
                * statistics.median(getattr(cost, what) for cost in costs)
                for what in asdict(costs[0])
            }
            told[contestant] = middle | {"per_second": 1e6 / middle["wall_us"]}
        return told


class ServerTime(Row):
    name = "server"
    about = "server time per lifecycle (enqueue + claim + ack), by hand, against the barest scripts"
    GOALS: ClassVar = {100: 2.2, 10: 2.3, 1: 2.8}
    KEPT_BELOW = 10_000_000  # more than any run finishes

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig)
        self.kits: list[leasekit.Leasekit] = []

    async def round(self) -> None:
        rig = self.rig
        if not self.costs:
            barest = await Barest.open(rig.by_hand, "bench.server")
            self.contestants: dict[str, Barest | Ours] = {"barest": barest}
            bound = rig.sizes.kept_rows
            for name, kept in (("kept", self.KEPT_BELOW), ("forgetting", bound)):
                retention = leasekit.Retention(finished_count=kept, finished_bytes=1 << 40)
                kit = await leasekit.connect(rig.server.url, retention=retention)
                self.kits.append(kit)
                self.contestants[name] = Ours(kit.tenant("server", name))
            # From here on each ack of the one finds as many rows to forget as it finishes.
            calls = (bound + bound // 1_000) // 500 + 1
            await self.lifecycles(self.contestants["forgetting"], [500] * calls, None)
            self.notes.append(f"at the bound: {bound:,} finished rows are kept (the default)")
        for rows in self.GOALS:
            count = max(1, rig.sizes.batches * 100 // rows // {100: 1, 10: 4, 1: 10}[rows])
            for name, commands in self.contestants.items():
                await self.lifecycles(commands, [rows] * count, f"{name}, {rows} a call")

    async def lifecycles(
        self, commands: Barest | Ours, batches: Sequence[int], contestant: str | None
    ) -> None:
        """All enqueues, then all claims, then all acks; only the sum is kept."""
        by_hand, total = self.rig.by_hand, sum(batches)
        tokens = [leasekit.new_token() for _ in batches]
        stages: list[Cost] = []

        async def stage(sent: list[tuple[Any, ...]]) -> list[Any]:
            cost, replies = await measured(self.rig.server, lambda: by_hand.many(sent))
            stages.append(cost.per(total))
            return replies

        await stage(
            [commands.enqueue([leasekit.new_id() for _ in range(rows)]) for rows in batches]
        )
        replies = await stage(
            [commands.claim(token, rows) for token, rows in zip(tokens, batches, strict=True)]
        )
        held = [commands.claimed(reply) for reply in replies]
        assert [len(ids) for ids in held] == list(batches)
        await stage([commands.ack(ids, token) for ids, token in zip(held, tokens, strict=True)])
        if contestant is not None:
            for name, cost in zip(("enqueue", "claim", "ack"), stages, strict=True):
                self.costs[f"{contestant}: {name}"].append(cost)
            sums = [sum(parts) for parts in zip(*[astuple(cost) for cost in stages], strict=True)]
            self.costs[contestant].append(Cost(*sums))

    def figures(self) -> Iterable[Figure]:
        for name, told in (
            ("kept", "finished rows kept, below the bound"),
            ("forgetting", "at the bound: each ack forgets as many as it finishes"),
        ):
            for rows, goal in self.GOALS.items():
                ratio = self.ratio(
                    f"{name}, {rows} a call", f"barest, {rows} a call", "server_cpu_s"
                )
                yield Figure(f"{rows} rows a call, {told}", ratio, at_most=goal)

    async def close(self) -> None:
        for kit in self.kits:
            await kit.close()


class RedisCalls(Row):
    name = "calls"
    about = "redis calls that one script call makes (an ack's look for rows to forget included)"
    GOALS: ClassVar = {"claim": 14, "ack": 10}

    async def round(self) -> None:
        if self.notes:
            return  # a count, the same in every round
        outbox = self.rig.kit.tenant("bench", "calls").outbox
        draft = leasekit.Draft(lane=LANE, target=TARGET, payload=PAYLOAD)
        await outbox.enqueue_many([draft for _ in range(130)])
        self.made: dict[tuple[str, int], dict[str, int]] = {}
        for rows in (10, 100):
            before = self.rig.server.calls()
            claims = await outbox.claim(LANE, TARGET, limit=rows, consumer=CONSUMER)
            self.made["claim", rows] = self.since(before)
            before = self.rig.server.calls()
            await asyncio.gather(*[claim.ack() for claim in claims])
            self.made["ack", rows] = self.since(before)
        for (command, rows), made in self.made.items():
            listed = " ".join(f"{call}={count}" for call, count in sorted(made.items()))
            self.notes.append(f"{command} of {rows}: {listed}")

    def since(self, before: dict[str, int]) -> dict[str, int]:
        after = self.rig.server.calls()
        made = {call: count - before.get(call, 0) for call, count in after.items()}
        return {call: n for call, n in made.items() if n and call not in ("evalsha", "info")}

    def figures(self) -> Iterable[Figure]:
        for command, goal in self.GOALS.items():
            few, many = (sum(self.made[command, rows].values()) for rows in (10, 100))
            yield Figure(f"{command}, 100 rows", many, "calls", at_most=goal)
            yield Figure(f"{command}, more at 100 rows than at 10", many - few, "calls", at_most=0)


class SingleRow(Row):
    name = "api"
    about = "lifecycles by 1 000 coroutines, one row at a time, one tenant"

    async def round(self) -> None:
        rig, sizes = self.rig, self.rig.sizes
        if not self.costs:
            self.barest = await Barest.open(rig.by_hand, "bench.api")
            self.tenant = rig.kit.tenant("bench", "api")
            self.plain = Ours(rig.kit.tenant("plain", "api"))
            await rig.lifecycle(self.tenant)
        total = sizes.coroutines * sizes.lifecycles
        await self.take(
            "leasekit",
            total,
            lambda: by_coroutines(
                sizes.coroutines, sizes.lifecycles, lambda *_: rig.lifecycle(self.tenant)
            ),
        )
        batches = [[leasekit.new_id() for _ in range(100)] for _ in range(max(1, total // 100))]
        await self.take("raw", 100 * len(batches), lambda: rig.raw_lifecycles(self.barest, batches))
        await self.take(
            "redis-py",
            sizes.coroutines * sizes.plain_lifecycles,
            lambda: by_coroutines(
                sizes.coroutines, sizes.plain_lifecycles, lambda *_: self.plain_lifecycle()
            ),
        )

    async def plain_lifecycle(self) -> None:
        """The same commands as people send them: one EVALSHA a call over a pool of connections."""
        send, token = self.rig.redis_py.execute_command, leasekit.new_token()
        await send(*self.plain.enqueue([leasekit.new_id()]))
        ids = self.plain.claimed(await send(*self.plain.claim(token, 1)))
        await send(*self.plain.ack(ids, token))

    def figures(self) -> Iterable[Figure]:
        share = self.ratio("raw", "leasekit", "seconds")
        yield Figure("share of raw (batches of 100 by hand, barest)", share, at_least=0.3)
        gain = self.ratio("redis-py", "leasekit", "seconds")
        yield Figure("against redis-py without coalescing", gain, at_least=10)


class Tenants(Row):
    name = "tenants"
    about = "lifecycles by 1 000 coroutines, their rows spread over many tenants"

    async def round(self) -> None:
        rig, sizes = self.rig, self.rig.sizes
        for count in (1, *sizes.tenants):
            tenants = [rig.kit.tenant("bench", f"t{count}-{number}") for number in range(count)]
            if len(self.costs) <= len(sizes.tenants):  # the first round: enter them in the registry
                await asyncio.gather(*[rig.lifecycle(tenant) for tenant in tenants])

            async def one(number: int, turn: int, tenants: Sequence[Any] = tenants) -> None:
                at = (number + turn * sizes.coroutines) % len(tenants)
                await rig.lifecycle(tenants[at])

            await self.take(
                f"{count} tenants",
                sizes.coroutines * sizes.lifecycles,
                lambda one=one: by_coroutines(sizes.coroutines, sizes.lifecycles, one),
            )

    def figures(self) -> Iterable[Figure]:
        for count in self.rig.sizes.tenants:
            share = self.ratio("1 tenants", f"{count} tenants", "seconds")
            yield Figure(f"{count:,} tenants against one", share, at_least=0.3)


class LoneCall(Row):
    name = "lone"
    about = "latency of a lone call (ack of a row that is not there), p50"

    async def round(self) -> None:
        rig = self.rig
        tenant = rig.kit.tenant("bench", "lone")
        id, token = leasekit.new_id(), leasekit.new_token()
        tenant.outbox._remember(id, "bench:destination")
        command = Ours(tenant).ack([id.encode()], token)
        await self.latency("leasekit", lambda: tenant.outbox.ack(id, token))
        await self.latency("evalsha of redis-py", lambda: rig.redis_py.execute_command(*command))

    async def latency(self, contestant: str, call: Callable[[], Awaitable[object]]) -> None:
        taken = []

        async def calls() -> None:
            for _ in range(self.rig.sizes.lone_calls):
                began = time.perf_counter()
                await call()
                taken.append(time.perf_counter() - began)

        cost, _ = await measured(self.rig.server, calls)
        each = cost.per(len(taken))
        self.costs[contestant].append(
            Cost(statistics.median(taken), each.server_cpu_s, each.client_cpu_s)
        )

    def figures(self) -> Iterable[Figure]:
        ratio = self.ratio("leasekit", "evalsha of redis-py", "seconds")
        yield Figure("against `evalsha` of redis-py", ratio, at_most=1.3)


class Consume(Row):
    name = "consume"
    about = "jobs worked off by one process, no-op handler, over TCP, each queue at its fastest settings"

    def __init__(self, rig: Rig, only: Sequence[str] | None = None) -> None:
        super().__init__(rig)
        self.wanted = [p for p in peers.PEERS if only is None or p.name in only or p.is_ours]
        self.workers: dict[str, peers.Worker] = {}

    async def round(self) -> None:
        rig = self.rig
        if not self.workers:
            for peer in self.wanted:
                self.start(peer)
        for peer in self.wanted:
            if peer.name not in self.workers:
                continue
            worker, jobs = self.workers[peer.name], max(1, int(peer.jobs * rig.sizes.jobs))
            try:
                worker.ask("prepare", jobs)
                before = rig.server.cpu_s()
                answer = worker.ask("process", jobs)
                server_cpu_s = rig.server.cpu_s() - before
            except peers.Unusable as error:
                self.leave_out(peer, error)
                continue
            cost = Cost(answer["seconds"], server_cpu_s, answer["cpu_s"])
            self.costs[peer.name].append(cost.per(jobs))

    def start(self, peer: peers.Peer) -> None:
        try:
            worker = self.workers[peer.name] = peers.Worker(peer, self.rig.server.tcp_url)
            # Once unmeasured: connections, scripts, a warm interpreter.
            jobs = max(1, int(peer.jobs * self.rig.sizes.jobs) // 4)
            worker.ask("prepare", jobs)
            worker.ask("process", jobs)
            ack = "keeps ack state" if peer.keeps_ack else "may lose a job in a crash"
            self.notes.append(f"{peer.name} {worker.version}: {peer.settings}; {ack}")
        except peers.Unusable as error:
            self.leave_out(peer, error)

    def leave_out(self, peer: peers.Peer, error: Exception) -> None:
        self.notes.append(f"{peer.name} is left out: {error}")
        self.costs.pop(peer.name, None)
        worker = self.workers.pop(peer.name, None)
        if worker is not None:
            worker.close()

    def figures(self) -> Iterable[Figure]:
        gains = {
            peer: self.ratio(peer.name, "leasekit", "seconds")
            for peer in self.wanted
            if peer.name in self.costs and not peer.is_ours
        }
        of_node = [peer for peer in gains if peer.is_node]
        of_python = [peer for peer in gains if peer.keeps_ack and not peer.is_node]
        for peer in of_node:
            yield Figure("against BullMQ in node", gains[peer], at_least=2.5)
        if of_python:
            best = min(of_python, key=gains.__getitem__)
            told = f"against the fastest in Python that keeps ack state ({best.name})"
            yield Figure(told, gains[best], at_least=4)
            of_python.remove(best)
        for peer in gains:
            if peer in of_python or not peer.keeps_ack:
                yield Figure(f"against {peer.name}", gains[peer])

    async def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


class Memory(Row):
    name = "memory"
    about = "memory per row of 200 bytes of payload, on a server of its own"

    async def round(self) -> None:
        if self.notes:
            return  # the same in every round
        count, server = self.rig.sizes.memory_rows, Server()
        try:
            async with leasekit.connect(server.url) as kit:
                outbox = kit.tenant("bench", "memory").outbox
                await outbox.enqueue(LANE, "another", PAYLOAD)
                empty = server.memory_bytes()
                for _ in range(count // 1_000):
                    drafts = [
                        leasekit.Draft(lane=LANE, target=TARGET, payload=PAYLOAD)
                        for _ in range(1_000)
                    ]
                    await outbox.enqueue_many(drafts)
                self.queued = (server.memory_bytes() - empty) / count
                left = count
                while left:
                    claimed = await outbox.claim(
                        LANE, TARGET, limit=100, lease_ms=codec.LEASE_MS_MAX, consumer=CONSUMER
                    )
                    left -= len(claimed)
                self.leased = (server.memory_bytes() - empty) / count
        finally:
            server.stop()
        self.notes.append(f"{count:,} rows of one tenant, claimed by 100")

    def figures(self) -> Iterable[Figure]:
        yield Figure("queued", self.queued, "B", at_most=520)
        yield Figure("leased", self.leased, "B", at_most=680)


class Growth(Row):
    name = "growth"
    about = "server time per claimed row with a long line, on a server of its own"
    CLAIMED = 100  # calls a round, of 100 rows
    server: Server | None = None

    async def round(self) -> None:
        few, many = self.rig.sizes.backlog
        if self.server is None:
            self.server = Server()
            self.by_hand = await ByHand.open(self.server.url)
            self.kit = await leasekit.connect(self.server.url)
            self.of = {rows: Ours(self.kit.tenant("bench", f"b{rows}")) for rows in (few, many)}
            for rows, commands in self.of.items():
                for _ in range(0, rows, 8_000):
                    batches = [[leasekit.new_id() for _ in range(1_000)] for _ in range(8)]
                    await self.by_hand.many([commands.enqueue(ids) for ids in batches])
            self.notes.append(f"claims of 100 rows; {few:,} and {many:,} rows of one tenant")
        for rows, commands in self.of.items():
            calls = min(self.CLAIMED, rows // 1_000)
            tokens = [leasekit.new_token() for _ in range(calls)]
            sent = [commands.claim(token, 100) for token in tokens]
            cost, _ = await measured(self.server, lambda sent=sent: self.by_hand.many(sent))
            self.costs[f"{rows} rows"].append(cost.per(100 * calls))

    def figures(self) -> Iterable[Figure]:
        few, many = self.rig.sizes.backlog
        ratio = self.ratio(f"{many} rows", f"{few} rows", "server_cpu_s")
        yield Figure(f"{many:,} rows against {few:,}", ratio, at_most=2.2)

    async def close(self) -> None:
        if self.server is not None:
            await self.kit.close()
            await self.by_hand.close()
            self.server.stop()


class IdempotencyKeys(Row):
    name = "keys"
    about = "idempotency keys: reserve + complete by 1 000 coroutines"

    async def round(self) -> None:
        rig, sizes = self.rig, self.rig.sizes
        keys = rig.kit.tenant("bench", "keys").idempotency
        if not self.costs:
            self.round_number = 0
            self.mark = keys.fingerprint("the request")
        self.round_number += 1

        async def ours(number: int, turn: int) -> None:
            key = f"{self.round_number}-{number}-{turn}"
            reserved = await keys.reserve("charge", key, owner=CONSUMER, fingerprint=self.mark)
            assert reserved.token is not None
            await keys.complete("charge", key, {"receipt": key}, token=reserved.token)

        async def by_hand(number: int, turn: int) -> None:
            key = f"byhand:{self.round_number}-{number}-{turn}"
            if await rig.redis_py.set(key, "reserved", nx=True, px=86_400_000):
                await rig.redis_py.set(key, '{"receipt":"' + key + '"}', px=86_400_000)

        for contestant, turns, work in (
            ("leasekit", sizes.lifecycles, ours),
            ("SET NX PX + SET through redis-py", sizes.plain_lifecycles, by_hand),
        ):
            await self.take(
                contestant,
                sizes.coroutines * turns,
                lambda turns=turns, work=work: by_coroutines(sizes.coroutines, turns, work),
            )

    def figures(self) -> Iterable[Figure]:
        gain = self.ratio("SET NX PX + SET through redis-py", "leasekit", "seconds")
        yield Figure("pairs a second against SET NX by hand", gain, at_least=8)


class GrantedOnce(Row):
    name = "gate"
    about = (
        "gate: prepare + complete by 1 000 coroutines, and one pair alone, for each durability class; on "
        "servers of its own: one without persistence and with one replica, one that syncs every write"
    )
    PAIRS: ClassVar = {
        "none": ("plain", "none"),
        "replicated(1)": ("plain", "replicated(1)"),
        "fsync": ("synced", "fsync"),
    }
    kits: ClassVar[dict[str, leasekit.Leasekit]] = {}

    async def round(self) -> None:
        if not self.kits:
            plain, synced = Server(), Server(appendonly="yes", appendfsync="always")
            self.replica = Server(replicaof=f"127.0.0.1 {plain.port}")
            self.servers = {"plain": plain, "synced": synced}
            plain.wait_for_replicas(1)
            self.kits = {
                name: await leasekit.connect(server.url) for name, server in self.servers.items()
            }
            self.round_number = 0
        self.round_number += 1
        for durability, (place, given) in self.PAIRS.items():
            await self.pairs(place, f"gate, {durability}", self.granted, given)
            await self.pairs(place, f"reserve + complete, {durability}", self.reserved, given)

    async def pairs(
        self, place: str, contestant: str, pair: Callable[..., Awaitable[None]], durability: str
    ) -> None:
        tenant, sizes = self.kits[place].tenant("bench", "gate"), self.rig.sizes
        server, turns = self.servers[place], max(1, sizes.lifecycles // 4)
        run = f"{contestant}-{self.round_number}"

        async def one(number: int, turn: int) -> None:
            await pair(tenant, f"{run}-{number}-{turn}", durability)

        await one(-1, 0)  # the connection of its class
        cost, _ = await measured(server, lambda: by_coroutines(sizes.coroutines, turns, one))
        self.costs[contestant].append(cost.per(sizes.coroutines * turns))
        taken = []
        for turn in range(max(1, sizes.lone_calls // 10)):
            began = time.perf_counter()
            await one(-2, turn)
            taken.append(time.perf_counter() - began)
        self.costs[f"{contestant}, alone"].append(Cost(statistics.median(taken), 0, 0))

    async def granted(self, tenant: leasekit.Tenant, key: str, durability: str) -> None:
        source = gate.Source(kind="bench", run_id=CONSUMER)
        event = gate.PreSendEvent(
            dispatch_id=key,
            tool="mcp.mail.send",
            args={"to": key},
            source=source,
            external_side_effect=True,
        )
        receipt = await tenant.gate.prepare(event, on_expiry="park", durability=durability)
        done = gate.LedgerEvent(
            dispatch_id=key,
            tool="mcp.mail.send",
            source=source,
            policy_outcome="allowed",
            status="succeeded",
        )
        assert await tenant.gate.complete(done, receipt=receipt) == "recorded"

    async def reserved(self, tenant: leasekit.Tenant, key: str, durability: str) -> None:
        keys = tenant.idempotency
        held = await keys.reserve(
            "charge", key, owner=CONSUMER, fingerprint=key, durability=durability
        )
        assert held.token is not None
        await keys.complete("charge", key, None, token=held.token, durability=durability)

    def figures(self) -> Iterable[Figure]:
        for durability in self.PAIRS:
            ours, keys = f"gate, {durability}", f"reserve + complete, {durability}"
            rate = 1 / statistics.median(cost.seconds for cost in self.costs[ours])
            yield Figure(f"{durability}: grants a second", rate, "/s")
            yield Figure(
                f"{durability}: a pair's time against reserve + complete",
                self.ratio(ours, keys, "seconds"),
            )
            alone = statistics.median(cost.seconds for cost in self.costs[f"{ours}, alone"])
            yield Figure(f"{durability}: a pair alone, p50", 1e3 * alone, "ms")

    async def close(self) -> None:
        if self.kits:
            for kit in self.kits.values():
                await kit.close()
            for server in (self.replica, *self.servers.values()):
                server.stop()


class LedgerRecords(Row):
    name = "ledger"
    about = (
        "ledger: upserts of dead letters by 1 000 coroutines beside HSET + ZADD by hand, pages of 250 of "
        "runs with few and with many records, memory per record; on a server of its own"
    )
    PAGE = 250
    PAGES = 40
    server: Server | None = None

    async def round(self) -> None:
        few, many = self.rig.sizes.records
        if self.server is None:
            self.server = Server()
            self.kit = await leasekit.connect(self.server.url)
            self.by_hand = await ByHand.open(self.server.url)
            self.tenant = self.kit.tenant("bench", "ledger")
            await self.fill("few", few)
            empty = self.server.memory_bytes()
            await self.fill("many", many)
            self.per_record = (self.server.memory_bytes() - empty) / many
            size = len(msgspec.json.encode(self.record("many", 0)))
            self.notes.append(f"{many:,} records of {size} bytes of JSON in one run")
            self.turn = 0
        self.turn += 1
        server, sizes = self.server, self.rig.sizes
        turns = max(1, sizes.lifecycles // 2)
        count = sizes.coroutines * turns

        async def upsert(number: int, turn: int) -> None:
            at = self.turn * 10_000_000 + number * turns + turn
            await self.tenant.ledger.dead_letters.upsert(self.record(f"r{number}", at))

        cost, _ = await measured(server, lambda: by_coroutines(sizes.coroutines, turns, upsert))
        self.costs["upsert"].append(cost.per(count))
        doc = msgspec.json.encode(self.record("bare", 0))
        bare = [
            command
            for number in range(count)
            for command in (
                ("HSET", "bare:docs", f"dl-{self.turn}-{number}", doc),
                ("ZADD", "bare:updated", number, f"dl-{self.turn}-{number}"),
            )
        ]
        cost, _ = await measured(server, lambda: self.by_hand.many(bare))
        self.costs["HSET + ZADD"].append(cost.per(count))
        for run, name in (("few", f"page of {few:,}"), ("many", f"page of {many:,}")):

            async def pages(run: str = run) -> None:
                for _ in range(self.PAGES):
                    page = await self.tenant.ledger.dead_letters.list(run_id=run, limit=self.PAGE)
                    assert len(page.items) == min(self.PAGE, few if run == "few" else many)

            cost, _ = await measured(server, pages)
            self.costs[name].append(cost.per(self.PAGES))

    async def fill(self, run: str, count: int) -> None:
        letters = self.tenant.ledger.dead_letters
        for begin in range(0, count, 1_000):
            await asyncio.gather(
                *[letters.upsert(self.record(run, at)) for at in range(begin, begin + 1_000)]
            )

    def record(self, run: str, at: int) -> ledger.DeadLetter:
        return ledger.DeadLetter(
            dead_letter_id=f"dl-{run}-{at}",
            source_type="tool_effect",
            source_id=f"effect-{at}",
            run_id=run,
            scope=ledger.StatefulRuntimeScope(tenant_context=self.tenant.context),
            reason="provider timeout",
            status="open",
            recovery_options=["retry", "ignore", "compensate"],
            created_at_ms=1_000 + at,
            updated_at_ms=1_000 + at,
        )

    def figures(self) -> Iterable[Figure]:
        few, many = self.rig.sizes.records
        yield Figure(
            "an upsert's server time against HSET + ZADD",
            self.ratio("upsert", "HSET + ZADD", "server_cpu_s"),
            at_most=4,
        )
        yield Figure(
            f"a page of {self.PAGE} of {many:,} against one of {few:,}, server time",
            self.ratio(f"page of {many:,}", f"page of {few:,}", "server_cpu_s"),
            at_most=3,
        )
        yield Figure("memory per record", self.per_record, "B")

    async def close(self) -> None:
        if self.server is not None:
            await self.kit.close()
            await self.by_hand.close()
            self.server.stop()


ROWS: tuple[type[Row], ...] = (
    ServerTime,
    RedisCalls,
    SingleRow,
    Tenants,
    LoneCall,
    Consume,
    Memory,
    Growth,
    IdempotencyKeys,
    GrantedOnce,
    LedgerRecords,
)
