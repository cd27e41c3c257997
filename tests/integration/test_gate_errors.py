"""Each error of the gate says what happened, what state things are in, and what is safe to do next;
none shows a token or what a call carries (design 11)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from gate_events import ID, call, outcome
from servers import Server, ServerProcess

import leasekit
from leasekit import (
    Conflict,
    InProgress,
    Leasekit,
    LeasekitError,
    LeaseLost,
    NotDurable,
    OutcomeUnknown,
    Overloaded,
    Tenant,
    Unavailable,
)
from leasekit.gate import Gate, PreSendEvent, Receipt, undecidable

Connect = Callable[..., Awaitable[Leasekit]]

NOW = 1_000
CANARY = "c4nary"
TOKEN = f"{CANARY}-token-000000000"


def carrying(key: str = "tool-dispatch-test", **changes: Any) -> PreSendEvent:
    """A call whose arguments must not be seen."""
    fields: dict[str, Any] = {"args": {"body": CANARY}, "payload_digest": None} | changes
    return call(key, **fields)


async def prepare(gate: Gate, **options: Any) -> Receipt:
    event = options.pop("event", None) or carrying()
    receipt = await gate.prepare(event, **({"now_ms": NOW, "token": TOKEN} | options))
    assert receipt is not None
    return receipt


async def told(awaitable: Awaitable[Any], kind: type[LeasekitError], *parts: str) -> LeasekitError:
    """The error that comes, which must say all this, and nothing that nobody may see."""
    with pytest.raises(kind) as raised:
        await awaitable
    error = raised.value
    assert type(error) is kind
    shown = [str(error), repr(error), *getattr(error, "__notes__", [])]
    for part in parts:
        assert part in shown[0], (part, shown[0])
    assert CANARY not in " ".join(shown)
    return error


@pytest.fixture
def gate(tenant: Tenant) -> Gate:
    return tenant.gate


async def another(gate: Gate, now_ms: int = NOW) -> Receipt:
    """The fixture's call, by another sender."""
    return await prepare(gate, token=None, now_ms=now_ms)


async def test_in_progress(gate: Gate) -> None:
    """Who has it, until when; ask later."""
    await prepare(gate, owner="sender-1", lease_ms=5)
    error = await told(
        another(gate),
        InProgress,
        f"pre-send outbox `{ID}` is already `claimed`",
        "by sender-1 until 1005 ms",
        "nothing was granted",
        "ask again later for its outcome",
    )
    assert (error.id, error.status) == (ID, "claimed")  # type: ignore[attr-defined]


@pytest.mark.parametrize(("said", "status"), [("succeeded", "sent"), ("failed", "failed")])
async def test_conflict_with_what_is_final(gate: Gate, said: str, status: str) -> None:
    """Neither result nor error text are shown."""
    receipt = await prepare(gate)
    await gate.complete(outcome(said, error=CANARY), receipt=receipt, result=CANARY, now_ms=NOW)
    await told(
        another(gate),
        Conflict,
        f"is already `{status}`",
        "nothing was granted",
        "use another key for another effect",
    )


async def test_conflict_with_what_nobody_can_tell(gate: Gate) -> None:
    """It is not final: an operator decides."""
    await prepare(gate, on_expiry="park", lease_ms=1)

    async def ask(question: Any) -> Any:
        return undecidable(CANARY)

    await gate.reconcile({"*": ask}, settle_ms=0, asks_max=1, now_ms=NOW + 1)
    await told(
        another(gate, NOW + 2),
        Conflict,
        "is already `dead_lettered`",
        "nothing was granted",
        "could not tell whether it was sent",
        "an operator decides (leasekit resolve)",
    )


async def test_conflict_over_a_key(gate: Gate, tenant_name: str) -> None:
    """Other arguments, another tenant, a token whose grant was given back."""
    receipt = await prepare(gate)
    await told(
        prepare(gate, event=carrying(args={"body": f"{CANARY}-2"}), token=None),
        Conflict,
        "was prepared with other arguments under the same key",
        "nothing was granted",
        "use another key",
    )
    elsewhere = carrying(tenant_context=leasekit.model.TenantContext(tenant_name, "elsewhere"))
    await told(
        prepare(gate, event=elsewhere),
        Conflict,
        "belongs to a different tenant scope",
        "nothing was written",
        "prepare it in the tenant that its event names",
    )
    await gate.complete(outcome("blocked"), receipt=receipt, now_ms=NOW)
    await told(
        prepare(gate, repeat=True),
        Conflict,
        "this token's grant",
        "nothing was granted",
        "prepare with a new token",
    )


async def test_outcome_unknown(gate: Gate) -> None:
    """Who had it; how it can be found out."""
    await prepare(gate, on_expiry="park", lease_ms=1, owner="sender-1")
    error = await told(
        another(gate, NOW + 1),
        OutcomeUnknown,
        "is already `unknown`",
        "sender-1 was granted it and has not been heard of",
        "nobody knows whether it was sent",
        "nothing was granted",
        "reconcile asks the destination, or an operator decides (leasekit resolve)",
    )
    assert error.id == ID


async def test_data_that_was_lost(gate: Gate, server: Server) -> None:
    """The name of the data is no secret: the operator needs it."""
    await prepare(gate)
    server.raw.flushall()
    error = await told(
        another(gate),
        Unavailable,
        "data lost",
        "what was sent before may be forgotten",
        "nothing was granted",
        "restore the data, or have an operator open the gate (leasekit gate open)",
    )
    assert error.id == ID


async def test_lease_lost(connected: Connect, server: Server, tenant_name: str) -> None:
    """At begin, in the body, at the word, at a repeat."""
    gate = (await connected(clock="server")).tenant(tenant_name, "w").gate

    async def late() -> None:
        async with gate.dispatch(carrying("late"), lease_ms=60_000) as permit:
            permit.begin(needs_ms=120_000)

    await told(late(), LeaseLost, "do not send", "it is cancelled", "dispatch it again")

    async def lost(key: str, *, begins: bool) -> None:
        async with gate.dispatch(carrying(key), lease_ms=600) as permit:
            if begins:
                permit.begin()
            server.raw.hdel(f"lk:{{{tenant_name}.w}}:gate:state", str(permit.id))
            await asyncio.Event().wait()

    await told(
        lost("begun", begins=True),
        LeaseLost,
        "was lost while its body ran",
        "whether the call arrived is not known",
        "see what it says before you send again",
    )
    await told(
        lost("not begun", begins=False),
        LeaseLost,
        "the call was not begun",
        "see what it says before you send",
    )

    async def gone() -> None:
        async with gate.dispatch(carrying("gone")) as permit:
            permit.begin()
            server.raw.hdel(f"lk:{{{tenant_name}.w}}:gate:state", str(permit.id))
            await permit.sent(CANARY)

    await told(gone(), LeaseLost, "could not be noted", "do not send it again")


async def test_a_grant_that_is_over(gate: Gate) -> None:
    """What was done about it depends on whose token it is."""
    await prepare(gate, lease_ms=1)
    await told(
        prepare(gate, lease_ms=1, now_ms=NOW + 1, repeat=True),
        LeaseLost,
        "came after its lease was over: do not send",
        "nothing was withdrawn",
        "see what the intent says before you prepare again",
    )


async def test_not_durable(real_server: Server, tenant_name: str) -> None:
    """A grant is given back, unless its token was brought; a completion stands."""
    async with leasekit.connect(real_server.url) as kit:
        gate = kit.tenant(tenant_name, "w").gate
        short = "replicated(1, timeout_ms=20)"
        error = await told(
            prepare(gate, token=None, now_ms=None, durability=short),
            NotDurable,
            "0 of the 1 replicas had it in time",
            "being given back by its token",
            "ask anew, without that token",
        )
        assert (error.reached, error.wanted) == (0, 1)  # type: ignore[attr-defined]
        await told(
            prepare(gate, event=carrying("brought"), now_ms=None, durability=short),
            NotDurable,
            "it stands on this server",
            "ask again by the same name with repeat=True, which is safe",
        )
        again = await prepare(gate, event=carrying("brought"), now_ms=None, repeat=True)
        assert again.attempts == 1
        receipt = await prepare(gate, event=carrying("other"), now_ms=None)
        event = outcome(dispatch_id="other", error=CANARY)
        await told(
            gate.complete(event, receipt=receipt, durability=short),
            NotDurable,
            "it stands on this server",
            "ask again by the same name with repeat=True, which is safe",
        )
        assert await gate.complete(event, receipt=receipt, repeat=True) == "recorded"


@pytest.mark.parametrize("kind", ["valkey-9", "redis-6.2"])
async def test_overloaded(
    private_server: Callable[..., ServerProcess], tenant_name: str, kind: str
) -> None:
    """A full server grants nothing; what was granted can be completed, extended and looked at."""
    server = private_server(kind)
    async with leasekit.connect(server.url, clock="caller") as kit:
        gate = kit.tenant(tenant_name, "w").gate
        receipt = await prepare(gate, on_expiry="park")
        server.raw.config_set("maxmemory", 1)
        await told(
            prepare(gate, event=carrying("other"), token=None),
            Overloaded,
            "memory is full",
            "nothing was written",
            "raise maxmemory",
        )
        extended = await gate.extend(receipt, lease_ms=600_000, now_ms=NOW)
        assert extended is not None
        assert await gate.complete(outcome(), receipt=receipt, now_ms=NOW) == "recorded"
        found = await gate.get(ID, now_ms=NOW)
        assert found is not None
        assert found.status == "sent"
        assert len((await gate.list(now_ms=NOW)).items) == 1


async def test_unavailable(private_server: Callable[..., ServerProcess], tenant_name: str) -> None:
    """A server that is gone, and a client that is closed: nothing was applied."""
    server = private_server()
    kit = await leasekit.connect(server.url, clock="caller", timeout_ms=500)
    gate = kit.tenant(tenant_name, "w").gate
    receipt = await prepare(gate)
    server.kill()
    await told(gate.get(ID, now_ms=NOW), Unavailable, "try again")
    await told(another(gate), Unavailable, "nothing was applied", "safe to try again")
    await told(
        gate.complete(outcome(error=CANARY), receipt=receipt, now_ms=NOW),
        Unavailable,
        "nothing was applied",
    )
    await kit.close()
    await told(another(gate), Unavailable, "closing or closed", "nothing was sent", "connect anew")


async def test_a_reply_that_was_lost(
    private_server: Callable[..., ServerProcess], tenant_name: str
) -> None:
    """The server hangs: nobody knows whether it granted anything; the same token finds out."""
    server = private_server()
    async with leasekit.connect(server.url, clock="caller", timeout_ms=500) as kit:
        gate = kit.tenant(tenant_name, "w").gate
        await gate.prepare(carrying("registers the tenant"), now_ms=NOW)
        os.kill(server.process_id, signal.SIGSTOP)
        try:
            await told(
                prepare(gate),
                OutcomeUnknown,
                "gate/prepare",
                "may or may not have been applied",
                "ask again by the same name with repeat=True",
            )
        finally:
            os.kill(server.process_id, signal.SIGCONT)
    async with leasekit.connect(server.url, clock="caller") as kit:
        receipt = await prepare(kit.tenant(tenant_name, "w").gate, repeat=True)
        assert (receipt.token, receipt.attempts) == (TOKEN, 1)
