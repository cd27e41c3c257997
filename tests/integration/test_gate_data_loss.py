"""An emptied or swapped server under running senders grants nothing (design 8, `gate:dataset`)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from gate_events import ID, call, outcome
from servers import Server, ServerProcess

import leasekit
from leasekit import (
    InProgress,
    InvalidInput,
    Leasekit,
    LeasekitError,
    LeaseLost,
    NotDurable,
    Tenant,
    Unavailable,
    new_token,
)
from leasekit.gate import Gate, Receipt, applied

Connect = Callable[..., Awaitable[Leasekit]]

NOW = 1_000
ORDER: dict[str, Any] = {"actor": "alice", "reason": "restored by hand"}


@pytest.fixture
def gate(tenant: Tenant) -> Gate:
    return tenant.gate


@pytest.fixture
async def other(connected: Connect, tenant_name: str) -> Gate:
    """The same tenant's gate in another process."""
    return (await connected()).tenant(tenant_name, "w").gate


async def prepare(gate: Gate, key: str = "tool-dispatch-test", **options: Any) -> Receipt:
    receipt = await gate.prepare(call(key), **({"now_ms": NOW} | options))
    assert receipt is not None
    return receipt


async def refused(gate: Gate, key: str = "another", **options: Any) -> str:
    """The text of a refusal for lost data."""
    with pytest.raises(Unavailable, match="data lost") as raised:
        await prepare(gate, key, **options)
    return str(raised.value)


@pytest.fixture
def name(server: Server, tenant_name: str) -> Callable[[], str]:
    """The name of the tenant's data; "" where there is none."""
    key = f"lk:{{{tenant_name}.w}}:gate:dataset"
    return lambda: (server.raw.get(key) or b"").decode().split("\n")[0]


def lose(server: Server, tenant_name: str, how: str) -> None:
    """Lose the tenant's data in some way."""
    if how == "flushed":
        server.raw.flushall()
    elif how == "deleted":
        server.raw.delete(*server.raw.keys(f"lk:{{{tenant_name}.w}}:*"))
    elif how == "its name deleted":
        server.raw.delete(f"lk:{{{tenant_name}.w}}:gate:dataset")
    else:
        server.raw.set(f"lk:{{{tenant_name}.w}}:gate:dataset", new_token())


LOSSES = ("flushed", "deleted", "its name deleted", "swapped")


# --- nothing is granted ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", LOSSES)
async def test_a_sender_that_knew_lost_data_is_granted_nothing(
    gate: Gate, server: Server, tenant_name: str, name: Callable[[], str], how: str
) -> None:
    """Neither what it sent before nor anything new; the error names the data, and the way out."""
    receipt = await prepare(gate)
    await gate.complete(outcome(), receipt=receipt, now_ms=NOW)
    lost = name()
    lose(server, tenant_name, how)
    left = name()
    for key in ("tool-dispatch-test", "another"):
        text = await refused(gate, key)
        assert f"`{lost}`" in text
        assert "nothing was granted" in text
        assert "what was sent before may be forgotten" in text
        assert "restore the data, or have an operator open the gate" in text
    assert name() == left


@pytest.mark.parametrize("how", ["flushed", "swapped"])
async def test_running_senders_stop(
    connected: Connect, server: Server, tenant_name: str, how: str
) -> None:
    """Of several processes; those in the midst of a call are told that nothing could be noted."""
    gates = [(await connected(clock="server")).tenant(tenant_name, "w").gate for _ in range(3)]
    for gate in gates:
        async with gate.dispatch(call(f"warms {id(gate)}")) as permit:
            permit.begin()
            await permit.sent()
    effects: list[str] = []
    is_lost = asyncio.Event()
    begun = 0

    async def send(gate: Gate, key: str) -> None:
        nonlocal begun
        async with gate.dispatch(call(key)) as permit:
            permit.begin()
            effects.append(key)
            begun += 1
            await is_lost.wait()
            await permit.sent()

    tasks = [
        asyncio.create_task(send(gate, f"key-{number}-{place}"))
        for number in range(20)
        for place, gate in enumerate(gates)
    ]
    while begun < len(tasks):
        await gates[0].get(ID)
    lose(server, tenant_name, how)
    is_lost.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    if how == "flushed":
        assert {type(one) for one in results} == {LeaseLost}
        assert all("could not be noted" in str(one) for one in results)
    else:
        assert set(results) == {None}
    again = await asyncio.gather(
        *(send(gate, key) for gate in gates for key in ("new", *effects[:5])),
        return_exceptions=True,
    )
    assert {type(one) for one in again} == {Unavailable}
    assert all("data lost" in str(one) for one in again)
    assert len(effects) == 60


async def test_who_was_only_told_of_an_intent_notices_too(
    gate: Gate, other: Gate, server: Server, tenant_name: str
) -> None:
    """It waits for another sender's outcome, and must not become the second one."""
    await prepare(gate)
    with pytest.raises(InProgress):
        await prepare(other)
    lose(server, tenant_name, "flushed")
    await refused(other, "tool-dispatch-test")


async def test_what_is_left_answers_truthfully(
    gate: Gate, server: Server, tenant_name: str
) -> None:
    """Completions and reads need no permission: nothing is here, and nothing is made up."""
    receipt = await prepare(gate, on_expiry="park", lease_ms=5)
    lose(server, tenant_name, "flushed")
    assert await gate.complete(outcome(), receipt=receipt, now_ms=NOW) == "missing"
    assert await gate.complete(outcome(), now_ms=NOW) == "skipped"
    assert await gate.extend(receipt, lease_ms=5, now_ms=NOW) is None
    assert await gate.get(ID, now_ms=NOW) is None
    assert (await gate.list(now_ms=NOW)).items == []
    assert (await gate.unknown(now_ms=NOW + 9)).items == []
    assert await gate.resolve(ID, "sent", **ORDER, now_ms=NOW + 9) == "missing"

    async def ask(question: Any) -> Any:
        return applied()

    told = await gate.reconcile({"*": ask}, settle_ms=0, now_ms=NOW + 9)
    assert told.asked == 0
    await refused(gate)
    assert server.raw.keys(f"lk:{{{tenant_name}.w}}:*") == []


async def test_what_is_still_here_can_be_completed(
    gate: Gate, server: Server, tenant_name: str
) -> None:
    """Other data than is known: what stands in it is spoken of all the same."""
    receipt = await prepare(gate)
    lose(server, tenant_name, "swapped")
    assert await gate.complete(outcome(), receipt=receipt, now_ms=NOW) == "recorded"
    found = await gate.get(ID, now_ms=NOW)
    assert found is not None
    assert found.status == "sent"


async def test_a_new_process_cannot_know(
    gate: Gate, other: Gate, server: Server, tenant_name: str, name: Callable[[], str]
) -> None:
    """It is granted intents in an emptied server (README), and gives the data its name; the old one
    stays refused."""
    await prepare(gate)
    lost = name()
    lose(server, tenant_name, "flushed")
    await prepare(other)
    assert name() not in ("", lost)
    assert lost in await refused(gate)
    await prepare(other, "another")


async def test_one_tenants_loss_is_no_others(
    kit: Leasekit, server: Server, tenant_name: str
) -> None:
    """Names are kept a tenant each."""
    gates = [kit.tenant(tenant_name, workspace).gate for workspace in ("w", "v")]
    for gate in gates:
        await prepare(gate)
    lose(server, tenant_name, "deleted")
    await refused(gates[0])
    await prepare(gates[1], "another")


async def test_a_restored_server_goes_on(
    gate: Gate, server: Server, tenant_name: str, name: Callable[[], str]
) -> None:
    """The same data is back: nothing has to be opened."""
    await prepare(gate)
    lost = name()
    lose(server, tenant_name, "swapped")
    await refused(gate)
    server.raw.set(f"lk:{{{tenant_name}.w}}:gate:dataset", lost)
    await prepare(gate, "another")


async def test_another_server_behind_the_same_path(
    private_server: Callable[..., ServerProcess], tmp_path: Path, tenant_name: str
) -> None:
    """Found out with the first call after it, though the client connects anew by itself."""
    first, second = private_server(), private_server()
    link = tmp_path / "s"
    link.symlink_to(first.url.removeprefix("unix://"))
    async with leasekit.connect(f"unix://{link}", clock="caller") as kit:
        gate = kit.tenant(tenant_name, "w").gate
        receipt = await prepare(gate)
        await gate.complete(outcome(), receipt=receipt, now_ms=NOW)
        moved = tmp_path / "new"
        moved.symlink_to(second.url.removeprefix("unix://"))
        os.replace(moved, link)
        first.stop()
        await refused(gate, "tool-dispatch-test")
        assert second.raw.keys(f"lk:{{{tenant_name}.w}}:*") == []


# --- opening --------------------------------------------------------------------------------------


async def test_an_opening_lets_in_who_knew_that_data(
    gate: Gate, connected: Connect, server: Server, tenant_name: str, name: Callable[[], str]
) -> None:
    """And nobody who knew other data; whoever was let in knows the new one from then on."""

    async def process() -> Gate:
        return (await connected()).tenant(tenant_name, "w").gate

    names, gates = [], [gate, await process(), await process()]
    for one in gates[:2]:
        await prepare(one)
        names.append(name())
        lose(server, tenant_name, "flushed")
    await prepare(gates[2])
    here = name()
    assert len({*names, here}) == 3

    assert await gates[2].open(names[0], **ORDER, now_ms=NOW) == "opened"
    await prepare(gates[0], "let in")
    await refused(gates[1])
    assert name() == here
    assert await gates[2].open(here, **ORDER, now_ms=NOW) == "known"

    lose(server, tenant_name, "flushed")
    assert f"`{here}`" in await refused(gates[0])
    assert f"`{names[1]}`" in await refused(gates[1])


async def test_an_emptied_server_can_be_opened_before_anybody_is_granted(
    gate: Gate, server: Server, tenant_name: str, name: Callable[[], str]
) -> None:
    """The first grant then names the data; the opening stays for the others."""
    await prepare(gate)
    lost = name()
    lose(server, tenant_name, "flushed")
    await refused(gate)
    for _ in range(2):
        assert await gate.open(lost, **ORDER, now_ms=NOW) == "opened"
    assert name() == ""
    await prepare(gate)
    stored = server.raw.get(f"lk:{{{tenant_name}.w}}:gate:dataset").decode().split("\n")
    assert stored[0] not in ("", lost)
    assert len(stored) == 2
    assert stored[1].startswith(f"{lost} {NOW} ")
    assert "alice" in stored[1]
    assert "restored by hand" in stored[1]


async def test_the_last_openings_are_kept(gate: Gate, server: Server, tenant_name: str) -> None:
    """Sixteen: the newest."""
    await prepare(gate)
    lost = [new_token() for _ in range(20)]
    for one in lost:
        assert await gate.open(one, **ORDER, now_ms=NOW) == "opened"
    stored = server.raw.get(f"lk:{{{tenant_name}.w}}:gate:dataset").decode().split("\n")
    assert [line.split(" ")[0] for line in stored[1:]] == lost[-16:]
    await prepare(gate, "another")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"lost": "short"}, "lost"),
        ({"actor": ""}, "actor"),
        ({"reason": " "}, "reason"),
        ({"reason": "x" * 2_001}, "reason"),
    ],
)
async def test_an_opening_says_who_and_why(
    gate: Gate, changes: dict[str, Any], field: str, name: Callable[[], str]
) -> None:
    """Of what: the name that the error told."""
    order = {"lost": new_token()} | ORDER | changes
    with pytest.raises(InvalidInput) as raised:
        await gate.open(order.pop("lost"), **order, now_ms=NOW)
    assert raised.value.field == field
    assert name() == ""


# --- what is remembered ---------------------------------------------------------------------------


async def test_a_grant_that_was_not_durable_is_not_remembered(
    real_server: Server, tenant_name: str
) -> None:
    """A failover may have lost the name with it, and then nothing was lost that anybody used."""
    async with leasekit.connect(real_server.url) as kit:
        gate = kit.tenant(tenant_name, "w").gate
        with pytest.raises(NotDurable):
            await gate.prepare(call(), durability="replicated(1, timeout_ms=20)")
        while (found := await gate.get(ID)) is not None and found.status == "claimed":
            pass  # It is being given back, on another connection.
        real_server.raw.delete(*real_server.raw.keys(f"lk:{{{tenant_name}.w}}:*"))
        assert await gate.prepare(call()) is not None


async def test_a_refusal_teaches_no_data_that_is_not_here(
    gate: Gate, other: Gate, server: Server, tenant_name: str, name: Callable[[], str]
) -> None:
    """However often it is refused, a sender remembers what it knew."""
    await prepare(gate)
    lost = name()
    lose(server, tenant_name, "flushed")
    await prepare(other)
    for _ in range(3):
        assert f"`{lost}`" in await refused(gate)


async def test_many_at_once_are_all_refused(gate: Gate, server: Server, tenant_name: str) -> None:
    """Also those that travel together with the first."""
    await prepare(gate)
    lose(server, tenant_name, "flushed")
    results: list[Any] = await asyncio.gather(
        *(prepare(gate, f"key-{number}") for number in range(300)), return_exceptions=True
    )
    assert {type(one) for one in results} == {Unavailable}
    assert all(isinstance(one, LeasekitError) and one.id for one in results)
    assert server.raw.keys(f"lk:{{{tenant_name}.w}}:gate:*") == []
