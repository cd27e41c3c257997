"""Operators who execute at once, bridges that contradict each other, connections cut at the commit.

The same rounds, many more of them: `python -m fault.test_ledger_races operators|bridges --rounds N`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fault.proxy import Fault, Plan, Proxy
from ledger_records import compensation, failed_action, letter, scope_of
from servers import Server, ServerProcess, dump

import leasekit
from leasekit import LeasekitError, Tenant
from leasekit.scripts import read_scripts

ROUND_SECONDS_MAX = 30
ROUNDS = 10
KEY = "idempotency-action"

# Does what each line of its input says, as soon as it has read it, and says what came of it.
# argv: url, tenant. A line: ["execute", id] or ["told", id, status].
ACTOR = """
import asyncio, json, sys
import leasekit
from leasekit.ledger import ExternalAction, StatefulRuntimeScope

async def main(url, name):
    async with leasekit.connect(url) as kit:
        tenant = kit.tenant(name, "w")
        ledger, scope = tenant.ledger, StatefulRuntimeScope(tenant_context=tenant.context)
        await ledger.effects.list()
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            what, id, *more = json.loads(line)
            if what == "execute":
                done = await ledger.execute_compensation(id)
                receipt = done.receipt_effect
                said = [done.already_completed, receipt and receipt.effect_id]
            else:
                [status] = more
                metadata = {"automationRunID": "run-a", "compensation": {"type": "refund"}}
                action = ExternalAction(
                    action_id=id, operation="send", status=status, idempotency_key=id,
                    metadata=metadata, created_at_ms=1, updated_at_ms=2,
                )
                said = (await ledger.record_external_action(scope, action)).status
            print(json.dumps(said), flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


class Actor:
    """A process that runs ACTOR."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._in, self._out = process, process.stdin, process.stdout

    def tell(self, *words: str) -> None:
        self._in.write(json.dumps(words).encode() + b"\n")

    async def says(self) -> Any:
        async with asyncio.timeout(ROUND_SECONDS_MAX):
            return json.loads(await self._out.readline())

    async def ready(self) -> None:
        async with asyncio.timeout(ROUND_SECONDS_MAX):
            assert await self._out.readline() == b"ready\n"

    async def end(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


@asynccontextmanager
async def two_actors(url: str, tenant_name: str) -> AsyncIterator[tuple[Actor, Actor, Tenant]]:
    """Two processes, and a client of the test's own, on one tenant."""
    async with AsyncExitStack() as stack:
        actors = []
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", ACTOR, url, tenant_name),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            actors.append(Actor(process))
            stack.push_async_callback(actors[-1].end)
        for actor in actors:
            await actor.ready()
        kit = await stack.enter_async_context(leasekit.connect(url))
        yield actors[0], actors[1], kit.tenant(tenant_name, "w")


async def operators(url: str, tenant_name: str, rounds: int) -> None:
    """Two operators execute each compensation at once: one execution, one receipt, one told so."""
    async with two_actors(url, tenant_name) as (one, other, tenant):
        ledger, scope = tenant.ledger, scope_of(tenant.context)
        for number in range(rounds):
            id, run = f"c{number}", f"run-{number}"
            await ledger.compensations.upsert(compensation(id, scope, run_id=run))
            await ledger.dead_letters.upsert(
                letter(f"l{number}", scope, run_id=run, compensation_id=id)
            )
            for actor in (one, other):
                actor.tell("execute", id)
            found = [await one.says(), await other.says()]

            assert sorted(already for already, _ in found) == [False, True], found
            receipts = (await ledger.effects.list(run_id=run)).items
            assert {receipt for _, receipt in found} == {one.effect_id for one in receipts}
            assert len(receipts) == 1
            done = await ledger.compensations.get(id)
            assert done is not None
            assert (done.status, done.attempts) == ("completed", 1)
            [linked] = (await ledger.dead_letters.list(run_id=run)).items
            assert linked.status == "linked_to_compensation"
            rows = (await tenant.gate.list(run_id=run)).items
            assert [row.status for row in rows] == ["sent"]


async def bridges(url: str, tenant_name: str, rounds: int) -> None:
    """A failing and a succeeding bridge of one effect at once: what is active fits the effect."""
    async with two_actors(url, tenant_name) as (one, other, tenant):
        ledger, ends = tenant.ledger, Counter[str]()
        for number in range(rounds):
            key = f"{KEY}-{number}"
            if number % 3 == 0:  # an older failure is there, of which an operator knows
                one.tell("told", key, "failed")
                await one.says()
            if number % 6 == 0:
                [known] = await _active(ledger.dead_letters, key)
                await ledger.dispose(known.dead_letter_id, "retrying", "retrying")
            one.tell("told", key, "failed")
            other.tell("told", key, "posted")
            assert [await one.says(), await other.says()] == ["failed", "succeeded"]

            [effect] = [
                one
                for one in (await ledger.effects.list(limit=1_000)).items
                if one.action_id == key
            ]
            letters = await _active(ledger.dead_letters, effect.effect_id)
            proposed = await _active(ledger.compensations, effect.effect_id)
            is_failed = effect.status == "failed"
            assert len(letters) == len(proposed) == is_failed, (effect, letters, proposed)
            row = await tenant.gate.get(effect.outbox_id or "")
            assert row is not None
            assert row.status == ("failed" if is_failed else "sent")
            ends[effect.status] += 1
        ended = ", ".join(f"{count} {status}" for status, count in sorted(ends.items()))
        sys.stdout.write(f"effects ended as: {ended}\n")


async def _active(records: Any, about: str) -> list[Any]:
    """The active ones about an effect, or about the action with that key."""
    page = await records.list(active_only=True, limit=1_000)
    return [
        one
        for one in page.items
        if about in (getattr(one, "source_id", None), getattr(one, "target_effect_id", None))
        or about == ((one.metadata or {}).get("idempotency_key"))
    ]


@pytest.mark.parametrize("race", [operators, bridges])
async def test_two_processes_at_once(
    real_server: Server, tenant_name: str, race: Callable[[str, str, int], Any]
) -> None:
    """One execution each; never something active and stale beside a success."""
    await race(real_server.url, tenant_name, ROUNDS)


# --- cut at the commit ----------------------------------------------------------------------------


@asynccontextmanager
async def proxied(server: Server) -> AsyncIterator[Proxy]:
    with tempfile.TemporaryDirectory(prefix="lk-") as directory:
        path = str(Path(directory, "p"))
        async with Proxy(path, server.url.removeprefix("unix://")) as proxy:
            yield proxy


def is_commit(words: list[bytes]) -> bool:
    script = read_scripts()["ledger/commit"]
    return words[0] == b"EVALSHA" and words[1] == script.sha(shebang=True).encode()


def stored(server: Server, tenant_name: str) -> dict[str, Any]:
    return dump(server.raw, "lk", f"{tenant_name}.w")


@pytest.mark.parametrize("times", [1, 99])
@pytest.mark.parametrize(
    "fault", [Fault.CUT_BEFORE, Fault.CUT_AFTER, Fault.CUT_IN_REPLY, Fault.CUT_AFTER_REPLY]
)
@pytest.mark.parametrize("act", ["execute", "bridge"])
async def test_a_commit_is_there_whole_or_not_at_all(
    running: Callable[[str], ServerProcess], tenant_name: str, fault: Fault, times: int, act: str
) -> None:
    """Whatever the client was told, and however often it was cut off: nothing of it, or all of it."""
    server = running("valkey-9")
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(proxied(server))
        direct = await stack.enter_async_context(leasekit.connect(server.url))
        cut_off = await stack.enter_async_context(leasekit.connect(proxy.url, timeout_ms=500))
        tenant = direct.tenant(tenant_name, "w")
        scope = scope_of(tenant.context)
        await tenant.ledger.compensations.upsert(compensation("c", scope))
        await tenant.ledger.dead_letters.upsert(letter("l", scope, compensation_id="c"))
        ledger = cut_off.tenant(tenant_name, "w").ledger
        await ledger.effects.list()
        # A first commit, so that the script is known to the server.
        await ledger.dispose("l", "open", "reviewed")
        before = stored(server, tenant_name)

        plan = Plan(is_commit, fault, times=times)
        proxy.arm(plan)
        was_told = True
        try:
            if act == "execute":
                await ledger.execute_compensation("c")
            else:
                await ledger.record_external_action(scope, failed_action("a"))
        except LeasekitError:
            was_told = False
        proxy.arm(None)

        assert plan.struck
        after = stored(server, tenant_name)
        # An execution changes two records and adds its receipt; a failure adds three.
        names = {"execute": 3, "bridge": 5}
        docs = after["ledger:docs"]
        is_there = after != before
        assert is_there or not was_told
        if is_there:
            assert len(docs) == names[act]
            assert len(after["gate:state"]) == 1
            old = before["ledger:docs"]
            commits = {doc.split(" ")[1] for name, doc in docs.items() if old.get(name) != doc}
            assert len(commits) == 1
        # Whoever does it again finds it done, or does it now.
        if act == "execute":
            again = await tenant.ledger.execute_compensation("c")
            assert again is not None
            assert again.already_completed == is_there
            assert len((await tenant.ledger.effects.list()).items) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("race", choices=["operators", "bridges"])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--kind", default="valkey-9")
    given = parser.parse_args()
    server = ServerProcess(given.kind)
    server.start()
    try:
        race = {"operators": operators, "bridges": bridges}[given.race]
        asyncio.run(race(server.url, "t", given.rounds))
    finally:
        server.stop()
    sys.stdout.write(f"{given.race}: {given.rounds} rounds, nothing found\n")


if __name__ == "__main__":
    main()
