"""Every command of outbox, leases and idempotency, its connection broken in every way.

The framework is fault.repeats; the gate's commands are in test_gate_repeats.py.

`PYTHONPATH=tests python -m fault.test_repeats --seeds 1000` runs many tenants through the commands of all
four concepts, and prints the table.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fault.proxy import Fault, Plan
from fault.repeats import (
    LEASE_MS,
    SMOKE_SEEDS,
    UNKNOWN,
    Case,
    is_call,
    proxied,
    run_seeds,
)
from lua.commands import invariants
from servers import NoServer, ServerProcess, dump

import leasekit
from leasekit.codec import new_id, new_token
from leasekit.errors import OutcomeUnknown


class _Queued(Case):
    """A case about rows of a lane of its own."""

    async def enqueued(self, **options: Any) -> str:
        enqueued = await self.others.outbox.enqueue(self.lane, "t", {"n": 1}, **options)
        return enqueued.row.id

    async def claimed(self, *, lease_ms: int = LEASE_MS) -> Any:
        rows = await self.others.outbox.claim(
            self.lane, "t", limit=1, lease_ms=lease_ms, consumer="other"
        )
        return rows[0] if rows else None


class Enqueue(_Queued):
    command, word = "outbox/enqueue", "created"

    async def prepare(self) -> None:
        self.id = self.marker = new_id()
        self.dedupe_key = self.world.chance.choice([None, self.lane])

    async def call(self, repeat: bool) -> str:
        enqueued = await self.mine.outbox.enqueue(
            self.lane, "t", {"n": 1}, id=self.id, dedupe_key=self.dedupe_key, repeat=repeat
        )
        return "created" if enqueued.created else "duplicate"

    async def rival(self) -> bool:
        claim = await self.claimed()
        return claim is not None and await claim.ack() == "acked"

    def applied(self) -> int:
        return sum(self.world.tally(status, self.lane) for status in ("pending", "claimed", "sent"))

    def expected(self, applied: bool, rival_won: bool) -> str:
        return UNKNOWN if rival_won and self.world.keeps_nothing else "created"

    def is_new_in_copy(self, rival_won: bool) -> bool:
        # Not marked as a repeat, without a dedupe key, of a row that nobody remembers.
        return rival_won and self.world.keeps_nothing and self.dedupe_key is None


class Claim(_Queued):
    command, word = "outbox/claim", "claimed"

    async def prepare(self) -> None:
        self.ids = [await self.enqueued() for _ in range(3)]
        self.marker = new_token()

    async def call(self, repeat: bool) -> str:
        rows = await self.mine.outbox.claim(
            self.lane, "t", limit=2, consumer="me", claim_id=self.marker, repeat=repeat
        )
        assert [claim.row.id for claim in rows] in ([], self.ids[:2])
        for claim in rows:
            words = self.world.line(claim.row.id)
            assert words[7:9] == [str(claim.fence), str(claim.row.claimed_at_ms)]
        return "claimed" if rows else "none"

    async def rival(self) -> bool:
        rows = await self.others.outbox.claim(self.lane, "t", limit=3, consumer="other")
        return len(rows) == 3

    def applied(self) -> int:
        mine = [line for line in map(self.world.line, self.ids) if line[2:3] == [self.marker]]
        assert len(mine) in (0, 2)
        return sum(int(line[6]) for line in mine) // 2

    def expected(self, applied: bool, rival_won: bool) -> str:
        return "none" if rival_won else "claimed"


class _Finish(_Queued):
    """What a holder says of its row, by the row's id and its token; a rival claims the row anew."""

    attempts: int | None = None

    async def prepare(self) -> None:
        await self.enqueued(max_attempts=self.attempts)
        claim = await self.claimed(lease_ms=self.lease_ms())
        self.id, self.marker = claim.row.id, claim.token
        await asyncio.sleep(0.002)  # so that a lease of a millisecond is over

    def lease_ms(self) -> int:
        return self.world.chance.choice([1, LEASE_MS])

    async def rival(self) -> bool:
        return await self.claimed() is not None


class Ack(_Finish):
    command, word = "outbox/ack", "acked"

    async def call(self, repeat: bool) -> str:
        return await self.mine.outbox.ack(self.id, self.marker, repeat=repeat)

    def applied(self) -> int:
        return self.world.tally("sent", self.lane)

    def expected(self, applied: bool, rival_won: bool) -> str:
        if applied:
            return "forgotten" if self.world.keeps_nothing else "acked"
        return "lost_claim" if rival_won else "acked"


class Nack(_Finish):
    command, word = "outbox/nack", "requeued"

    async def call(self, repeat: bool) -> str:
        return await self.mine.outbox.nack(self.id, self.marker, error="no", repeat=repeat)

    def applied(self) -> int:
        return len(self.world.errors(self.id))

    def expected(self, applied: bool, rival_won: bool) -> str:
        return "lost_claim" if rival_won else "requeued"


class Bury(_Finish):
    command, word = "outbox/nack", "dead_lettered"

    @property
    def name(self) -> str:
        return f"{self.command} permanent"

    async def call(self, repeat: bool) -> str:
        return await self.mine.outbox.nack(
            self.id, self.marker, error="no", permanent=True, repeat=repeat
        )

    def applied(self) -> int:
        gone = self.world.keeps_nothing and len(self.world.line(self.id)) < 2
        return 1 if gone else len(self.world.errors(self.id))

    def expected(self, applied: bool, rival_won: bool) -> str:
        if applied:
            return "forgotten" if self.world.keeps_nothing else "dead_lettered"
        return "lost_claim" if rival_won else "dead_lettered"


class Release(_Finish):
    command, word = "outbox/release", "released"

    async def call(self, repeat: bool) -> str:
        return await self.mine.outbox.release(self.id, self.marker, repeat=repeat)

    def applied(self) -> int:
        words = self.world.line(self.id)
        return int(words[6]) - int(words[5])  # claims, less the attempts that count

    def expected(self, applied: bool, rival_won: bool) -> str:
        return "lost_claim" if rival_won else "released"


class Extend(_Finish):
    command, word = "outbox/extend", "extended"

    async def prepare(self) -> None:
        await super().prepare()
        self.end = int(self.world.line(self.id)[3])
        self.was_extended = False

    def lease_ms(self) -> int:
        return LEASE_MS

    async def call(self, repeat: bool) -> str:
        return await self.mine.outbox.extend(
            self.id, self.marker, lease_ms=2 * LEASE_MS, repeat=repeat
        )

    async def rival(self) -> bool:
        await self.others.outbox.release(self.id, self.marker)
        return await self.claimed() is not None

    def applied(self) -> int:
        words = self.world.line(self.id)
        if words[2] == self.marker:
            self.was_extended = int(words[3]) > self.end
        return int(self.was_extended)

    def expected(self, applied: bool, rival_won: bool) -> str:
        return "lost_claim" if rival_won else "extended"

    def undisturbed(self, state: dict[str, Any]) -> dict[str, Any]:
        without = {key: dict(value) for key, value in state.items() if isinstance(value, dict)}
        for key in ("outbox:state", f"outbox:due:{self.lane}:t"):
            without[key].pop(self.id, None)
        return without


class Cancel(_Queued):
    command, word = "outbox/cancel", "cancelled"

    async def prepare(self) -> None:
        self.id = self.marker = await self.enqueued()

    async def call(self, repeat: bool) -> str:
        return await self.mine.outbox.cancel(self.id, repeat=repeat)

    async def rival(self) -> bool:
        return await self.claimed() is not None

    def applied(self) -> int:
        return self.world.tally("cancelled", self.lane)

    def expected(self, applied: bool, rival_won: bool) -> str:
        if applied:
            return "forgotten" if self.world.keeps_nothing else "cancelled"
        return "not_pending" if rival_won else "cancelled"


class Redrive(_Queued):
    """A rival claims the row and buries it again: the order was not about that."""

    command, word = "outbox/redrive", "redriven"

    async def prepare(self) -> None:
        self.id = self.marker = await self.enqueued()
        token = (await self.claimed()).token
        await self.world.keeper.outbox.nack(self.id, token, error="no", permanent=True)
        self.count = 0

    async def call(self, repeat: bool) -> str:
        return await self.mine.outbox.redrive(
            self.id, claim_count=1 if repeat else None, repeat=repeat
        )

    async def rival(self) -> bool:
        claim = await self.claimed()
        if claim is not None and self.world.chance.random() < 0.7:
            self.applied()
            await claim.nack(error="no", permanent=True)
        return claim is not None

    def applied(self) -> int:
        words = self.world.line(self.id)
        if len(words) > 1:  # else it is gone: what was counted before counts
            self.count = int(words[6]) - 1 + (words[1] == "redriven")
        return self.count

    def expected(self, applied: bool, rival_won: bool) -> str:
        if rival_won:
            return "not_dead" if len(self.world.line(self.id)) > 1 else "forgotten"
        return "redriven"


class Resolve(_Queued):
    """A rival claims the row that is sent again and vanishes too: the verdict was not about that."""

    command, word = "outbox/resolve", "resolved"

    async def prepare(self) -> None:
        self.verdict = self.world.chance.choice(["sent", "redrive", "dead"])
        self.id = self.marker = await self.enqueued(on_expiry="park")
        assert await self.vanished()

    async def vanished(self) -> bool:
        """A claimer takes the row and is not heard of again; a later claim notes it."""
        claim = await self.claimed(lease_ms=1)
        await asyncio.sleep(0.003)
        await self.claimed()
        return claim is not None

    async def call(self, repeat: bool) -> str:
        return await self.mine.outbox.resolve(
            self.id,
            self.verdict,
            actor="me",
            reason="seen",
            claim_count=1 if repeat else None,
            repeat=repeat,
        )

    async def rival(self) -> bool:
        return await self.vanished()

    def applied(self) -> int:
        if self.world.keeps_nothing and len(self.world.line(self.id)) < 2:
            return 1
        return sum(" resolved_" in line for line in self.world.errors(self.id))

    def expected(self, applied: bool, rival_won: bool) -> str:
        if rival_won:
            return "not_unknown"
        gone = applied and self.world.keeps_nothing and self.verdict != "redrive"
        return "forgotten" if gone else "resolved"


class Acquire(Case):
    command, word = "lease/acquire", "acquired"

    async def prepare(self) -> None:
        self.marker = new_token()

    async def call(self, repeat: bool) -> str:
        taken = await self.mine.leases.acquire(
            self.lane, ttl_ms=LEASE_MS, owner="me", token=self.marker, repeat=repeat
        )
        if taken.lease is not None:
            assert self.words()[2] == str(taken.lease.fence), "the answer is not the first grant"
        return taken.outcome

    def words(self) -> list[str]:
        return self.world.value("lease_docs", self.lane).split(" ")

    async def rival(self) -> bool:
        taken = await self.others.leases.acquire(self.lane, ttl_ms=LEASE_MS, owner="other")
        return taken.lease is not None

    def applied(self) -> int:
        return int(self.words()[1:2] == [self.marker])

    def expected(self, applied: bool, rival_won: bool) -> str:
        return "busy" if rival_won else "acquired"


class _Held(Acquire):
    """What the holder of a lease asks."""

    async def prepare(self) -> None:
        taken = await self.others.leases.acquire(self.lane, ttl_ms=LEASE_MS, owner="me")
        assert taken.lease is not None
        self.marker, self.end = taken.lease.token, taken.lease.expires_at_ms
        self.was_applied = False
        await asyncio.sleep(0.002)


class ExtendLease(_Held):
    command, word = "lease/extend", "extended"

    async def call(self, repeat: bool) -> str:
        return await self.mine.leases.extend(
            self.lane, self.marker, ttl_ms=2 * LEASE_MS, repeat=repeat
        )

    async def rival(self) -> bool:
        await self.others.leases.release(self.lane, self.marker)
        return await super().rival()

    def applied(self) -> int:
        words = self.words()
        if words[1] == self.marker:
            self.was_applied = int(words[4]) > self.end
        return int(self.was_applied)

    def expected(self, applied: bool, rival_won: bool) -> str:
        return "lost" if rival_won else "extended"

    def undisturbed(self, state: dict[str, Any]) -> dict[str, Any]:
        return {
            key: value for key, value in state.items() if key not in ("lease:docs", "lease:due")
        }


class ReleaseLease(_Held):
    command, word = "lease/release", "released"

    async def call(self, repeat: bool) -> str:
        return await self.mine.leases.release(self.lane, self.marker, repeat=repeat)

    def applied(self) -> int:
        words = self.words()
        return int(words[0] == "released" or words[1] != self.marker)

    def expected(self, applied: bool, rival_won: bool) -> str:
        return "lost" if rival_won else "released"


class Reserve(Case):
    command, word = "idempotency/reserve", "reserved"

    async def prepare(self) -> None:
        self.marker = new_token()

    async def call(self, repeat: bool) -> str:
        reservation = await self.mine.idempotency.reserve(
            "op", self.lane, owner="me", fingerprint="f", token=self.marker, repeat=repeat
        )
        return reservation.outcome

    async def reserved(self) -> Any:
        return await self.others.idempotency.reserve(
            "op", self.lane, owner="other", fingerprint="f"
        )

    async def rival(self) -> bool:
        return (await self.reserved()).token is not None

    def record(self) -> list[str]:
        """The record's words, and its outcome as the last of them."""
        name = self.mine.idempotency._record_id("op", self.lane)
        lines = self.world.value("idempotency_docs", name).split("\n")
        return [*lines[0].split(" "), lines[-1]]

    def applied(self) -> int:
        return int(self.record()[1] == self.marker)

    def expected(self, applied: bool, rival_won: bool) -> str:
        return "duplicate" if rival_won else "reserved"


class Complete(Reserve):
    command, word = "idempotency/complete", "completed"

    async def prepare(self) -> None:
        self.marker = (await self.reserved()).token

    async def call(self, repeat: bool) -> str:
        before = self.record()[-1]
        answer = await self.mine.idempotency.complete(
            "op", self.lane, {"n": 2 if repeat else 1}, token=self.marker, repeat=repeat
        )
        if repeat and before:
            assert self.record()[-1] == before, "a repeat replaced the first outcome"
        return answer

    async def rival(self) -> bool:
        await self.others.idempotency.reserve("op", self.lane, owner="other", fingerprint="g")
        return False

    def applied(self) -> int:
        return int('"n":' in self.record()[-1])

    def expected(self, applied: bool, rival_won: bool) -> str:
        return "completed"

    def undisturbed(self, state: dict[str, Any]) -> dict[str, Any]:
        # A second completion that is not marked as a repeat writes the same outcome, and when it came.
        return {key: value for key, value in state.items() if key != "idempotency:docs"}


class ReleaseKey(Reserve):
    command, word = "idempotency/release", "released"

    async def prepare(self) -> None:
        self.marker = (await self.reserved()).token

    async def call(self, repeat: bool) -> str:
        return await self.mine.idempotency.release(
            "op", self.lane, token=self.marker, repeat=repeat
        )

    def applied(self) -> int:
        words = self.record()
        return int(words[0] == "released" or words[1] != self.marker)

    def expected(self, applied: bool, rival_won: bool) -> str:
        return "lost" if rival_won else "released"


CASES: list[type[Case]] = [
    *(Enqueue, Claim, Ack, Nack, Bury, Extend, Release, Cancel, Redrive, Resolve),
    *(Acquire, ExtendLease, ReleaseLease, Reserve, Complete, ReleaseKey),
]


@pytest.mark.timeout(300)  # a busy machine is five times slower
@pytest.mark.parametrize("kind", ["valkey-9", "redis-6.2"])
async def test_every_command_survives_every_fault(
    kind: str, running: Callable[[str], ServerProcess]
) -> None:
    """Applied at most once, told truly, and nothing is left amiss."""
    table = await run_seeds(running(kind), CASES, SMOKE_SEEDS)
    assert table.total("runs") == SMOKE_SEEDS * len(CASES)


@pytest.mark.parametrize("fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER, Fault.CUT_IN_REPLY])
async def test_many_calls_of_several_flights_are_repeated(
    fault: Fault, running: Callable[[str], ServerProcess], tenant_name: str
) -> None:
    """A thousand callers lose two flights in a row: each row is there once, and acked once."""
    server = running("valkey-9")
    async with proxied(server) as proxy, leasekit.connect(proxy.url) as kit:
        tenant = kit.tenant(tenant_name, "w")
        await tenant.outbox._scope.register()
        proxy.arm(Plan(is_call("outbox/enqueue"), fault, times=2, keeps_upstream=True))
        rows = await asyncio.gather(*(tenant.outbox.enqueue("l", "t", n) for n in range(1_000)))
        claims = await tenant.outbox.claim("l", "t", limit=1_000, consumer="me")
        proxy.arm(Plan(is_call("outbox/ack"), fault, times=2))
        outcomes = await asyncio.gather(*(claim.ack() for claim in claims))
        state = dump(server.raw, "lk", tenant.tag)

    assert all(row.created for row in rows)
    assert sorted(claim.row.id for claim in claims) == sorted(row.row.id for row in rows)
    assert set(outcomes) == {"acked"}
    assert state["outbox:tally"]["sent:l:t"] == "1000"
    invariants(state)


async def test_a_user_without_the_right_to_end_connections_is_told(
    private_server: Callable[..., ServerProcess],
) -> None:
    """Nothing is repeated by itself then; asked by name the row is there once."""
    server = private_server("valkey-9")
    server.raw.execute_command("ACL", "SETUSER", "app", "on", ">pw", "~*", "&*", "+@all")
    server.raw.execute_command("ACL", "SETUSER", "app", "-client|kill")
    async with proxied(server) as proxy:
        url = proxy.url.replace("unix://", "unix://app:pw@")
        async with leasekit.connect(url) as kit:
            tenant = kit.tenant("o", "w")
            row_id = new_id()
            proxy.arm(Plan(is_call("outbox/enqueue"), Fault.CUT_AFTER))
            with pytest.raises(OutcomeUnknown, match=r"refuses CLIENT KILL \(NOPERM\)"):
                await tenant.outbox.enqueue("l", "t", 1, id=row_id)
            again = await tenant.outbox.enqueue("l", "t", 1, id=row_id, repeat=True)
            counts = await tenant.outbox.counts()

    assert again.created
    assert counts.pending == 1


async def test_calls_are_repeated_on_a_server_that_was_started_again(
    private_server: Callable[..., ServerProcess],
) -> None:
    """Its data is there again, the old connections are not; other clients' ids are left alone."""
    server = private_server("valkey-9", appendonly="yes", appendfsync="always")

    async def restart() -> None:
        server.kill()
        server.start()

    async with proxied(server) as proxy, leasekit.connect(proxy.url) as kit:
        tenant = kit.tenant("o", "w")
        [row_id] = [(await tenant.outbox.enqueue("l", "t", 1)).row.id]
        [claim] = await tenant.outbox.claim("l", "t", consumer="me")
        proxy.arm(Plan(is_call("outbox/ack"), Fault.CUT_AFTER, meanwhile=restart))
        assert await claim.ack() == "acked"
        row = await tenant.outbox.get(row_id)
        kills = server.raw.info("commandstats").get("cmdstat_client|kill")

    assert row is not None
    assert row.status == "sent"
    assert kills is None


def main() -> None:
    # Here, because pytest would load that file twice.
    from fault.test_gate_repeats import CASES as GATE_CASES

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--server", default="valkey-9")
    given = parser.parse_args()
    try:
        process = ServerProcess(given.server)
    except NoServer as error:
        parser.error(str(error))
    process.start()
    kinds = [*CASES, *GATE_CASES]
    try:
        print(asyncio.run(run_seeds(process, kinds, given.seeds, given.first)))  # noqa: T201
    finally:
        process.stop()


if __name__ == "__main__":
    main()
