"""The gate around a tool: a call makes its effect once, and gives its result back (design 8)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from leasekit import (
    Conflict,
    GatePolicy,
    InProgress,
    InvalidInput,
    Leasekit,
    OutcomeUnknown,
    Tenant,
)
from leasekit.gate import Gate, Permit, Source, ToolDescriptor, applied, dispatch_id

Connect = Callable[..., Awaitable[Leasekit]]

SOURCE = Source(kind="engine_loop", session_id="session-1", message_id="message-1")
OTHER = Source(kind="engine_loop", session_id="session-1", message_id="message-2")
TOOL = "mcp.mail.send"


@pytest.fixture
async def kit(connected: Connect) -> Leasekit:
    """Guarded tools need the server's clock."""
    return await connected(clock="server")


@pytest.fixture
def gate(tenant: Tenant) -> Gate:
    return tenant.gate


class Mailer:
    """A destination: every call is an effect."""

    def __init__(self) -> None:
        self.effects: list[dict[str, Any]] = []
        self.error: BaseException | None = None

    async def send(self, **arguments: Any) -> Any:
        self.effects.append(arguments)
        if self.error is not None:
            raise self.error
        return {"number": len(self.effects)}


@pytest.fixture
def mailer() -> Mailer:
    return Mailer()


async def test_the_same_call_makes_its_effect_once(gate: Gate, mailer: Mailer) -> None:
    """And gives its result to whoever makes it again, in any order of arguments."""
    send = gate.guard(mailer.send, tool=TOOL)
    first = await send(SOURCE, to="a", body={"x": 1, "y": 2})
    assert first == {"number": 1}
    assert await send(SOURCE, body={"y": 2, "x": 1}, to="a") == first
    assert await gate.guard(mailer.send, tool=TOOL)(SOURCE, to="a", body={"x": 1, "y": 2}) == first
    assert mailer.effects == [{"to": "a", "body": {"x": 1, "y": 2}}]


async def test_another_call_is_another_effect(gate: Gate, mailer: Mailer) -> None:
    """By its arguments, its source, its tool."""
    send = gate.guard(mailer.send, tool=TOOL)
    await send(SOURCE, to="a")
    await send(SOURCE, to="b")
    await send(SOURCE, to="a", cc=None)
    await send(OTHER, to="a")
    await gate.guard(mailer.send, tool="mcp.mail.post")(SOURCE, to="a")
    await gate.guard(mailer.send, tool="send", canonical_tool=TOOL)(SOURCE, to="a")
    assert len(mailer.effects) == 6


async def test_another_tenants_call_is_another_effect(
    kit: Leasekit, mailer: Mailer, tenant_name: str
) -> None:
    """Whose gate it is, is a part of the name."""
    for workspace in ("one", "two"):
        await kit.tenant(tenant_name, workspace).gate.guard(mailer.send, tool=TOOL)(SOURCE, to="a")
    assert len(mailer.effects) == 2


async def test_a_call_has_the_name_of_the_spec(gate: Gate, mailer: Mailer) -> None:
    """spec/reliability 3.8; reserved keys of the arguments are no part of it."""
    await gate.guard(mailer.send, tool=TOOL)(SOURCE, to="a", __workflow_phase="x")
    name, digest = dispatch_id(TOOL, SOURCE, gate.context, {"to": "a"})
    (row,) = (await gate.list()).items
    assert (row.idempotency_key, row.payload_digest) == (name, digest)
    assert (row.status, row.tool, row.provider) == ("sent", TOOL, "mail")
    assert row.source_kind == "engine_loop"
    assert row.metadata["risk_tier"] == "external_send"


async def test_a_callers_key_names_the_call(gate: Gate, mailer: Mailer) -> None:
    """The same key with other arguments is a conflict, never a send."""
    send = gate.guard(mailer.send, tool=TOOL)
    first = await send(SOURCE, dispatch_key="order-7", to="a")
    assert await send(OTHER, dispatch_key="order-7", to="a") == first
    with pytest.raises(Conflict, match="with other arguments under the same key"):
        await send(SOURCE, dispatch_key="order-7", to="b")
    assert len(mailer.effects) == 1
    assert (await gate.list()).items[0].idempotency_key == "order-7"


async def test_while_a_call_runs_it_is_refused(gate: Gate) -> None:
    """The second one learns that the first is at it, and later its result."""
    is_running, release = asyncio.Event(), asyncio.Event()
    calls = 0

    async def slow() -> str:
        nonlocal calls
        calls += 1
        is_running.set()
        await release.wait()
        return "done"

    guarded = gate.guard(slow, tool=TOOL)
    first = asyncio.create_task(guarded(SOURCE))
    await is_running.wait()
    with pytest.raises(InProgress, match="already `claimed`"):
        await guarded(SOURCE)
    release.set()
    assert await first == await guarded(SOURCE) == "done"
    assert calls == 1


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("x"), Conflict("its own", id="x", status="sent")]
)
async def test_a_call_that_raises_is_unknown(
    gate: Gate, mailer: Mailer, error: BaseException
) -> None:
    """Its exception comes out, whatever it is; the call is not made again."""
    mailer.error = error
    send = gate.guard(mailer.send, tool=TOOL)
    with pytest.raises(type(error)) as raised:
        await send(SOURCE, to="a")
    assert raised.value is error
    with pytest.raises(OutcomeUnknown, match="already `unknown`"):
        await send(SOURCE, to="a")
    assert len(mailer.effects) == 1


async def test_a_refusal_from_inside_is_not_taken_for_its_own(gate: Gate, mailer: Mailer) -> None:
    """A function that is refused something by a gate itself: that is no result of this call."""
    await gate.guard(mailer.send, tool=TOOL)(SOURCE, to="a")
    (row,) = (await gate.list()).items
    mailer.error = Conflict("refused inside", id=row.outbox_id, status="sent")
    with pytest.raises(Conflict, match="refused inside"):
        await gate.guard(mailer.send, tool=TOOL)(SOURCE, to="b")


async def test_a_call_that_is_cancelled_is_unknown(gate: Gate) -> None:
    """It may have arrived."""
    is_running = asyncio.Event()

    async def slow() -> None:
        is_running.set()
        await asyncio.Event().wait()

    guarded = gate.guard(slow, tool=TOOL)
    task = asyncio.create_task(guarded(SOURCE))
    await is_running.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    with pytest.raises(OutcomeUnknown):
        await guarded(SOURCE)


async def test_what_the_destination_tells_later_is_the_result(gate: Gate, mailer: Mailer) -> None:
    """reconcile finds the tool by its name."""
    mailer.error = ZeroDivisionError()
    send = gate.guard(mailer.send, tool=TOOL)
    with pytest.raises(ZeroDivisionError):
        await send(SOURCE, to="a")

    async def ask(question: Any) -> Any:
        return applied({"number": "asked"})

    told = await gate.reconcile({TOOL: ask}, settle_ms=0)
    assert told.applied == 1
    assert await send(SOURCE, to="a") == {"number": "asked"}
    assert len(mailer.effects) == 1


async def test_a_tool_may_reclaim(gate: Gate, mailer: Mailer) -> None:
    """For a destination that honours the key: after a failure the next call is made at once."""
    mailer.error = ZeroDivisionError()
    send = gate.guard(mailer.send, tool=TOOL, on_expiry="reclaim")
    with pytest.raises(ZeroDivisionError):
        await send(SOURCE, to="a")
    mailer.error = None
    assert await send(SOURCE, to="a") == {"number": 2}


# --- the permit -----------------------------------------------------------------------------------


async def test_a_function_may_ask_for_its_permit(gate: Gate) -> None:
    """It has begun, and holds what the destination needs."""
    permits: list[Permit] = []

    async def tool(to: str, permit: Permit) -> str:
        permits.append(permit)
        return f"sent to {to}"

    assert await gate.guard(tool, tool=TOOL)(SOURCE, to="a") == "sent to a"
    (permit,) = permits
    assert permit.has_begun
    assert permit.fence
    assert permit.key == dispatch_id(TOOL, SOURCE, gate.context, {"to": "a"})[0]


async def test_a_function_may_say_that_it_failed(gate: Gate) -> None:
    """What it returns is this caller's alone; the key is used up."""
    calls = 0

    async def tool(permit: Permit) -> str:
        nonlocal calls
        calls += 1
        permit.failed("no such mailbox")
        return "refused"

    guarded = gate.guard(tool, tool=TOOL)
    assert await guarded(SOURCE) == "refused"
    with pytest.raises(Conflict, match="already `failed`"):
        await guarded(SOURCE)
    assert calls == 1
    assert (await gate.list()).items[0].metadata["dispatch_error"] == "no such mailbox"


async def test_a_function_may_say_that_nothing_was_sent(gate: Gate) -> None:
    """Then the next call is made, also if the first raised."""
    calls = 0

    async def tool(permit: Permit) -> int:
        nonlocal calls
        calls += 1
        if calls < 3:
            await permit.not_sent("no connection")
        if calls == 2:
            raise ConnectionRefusedError
        return calls

    guarded = gate.guard(tool, tool=TOOL)
    assert await guarded(SOURCE) == 1
    with pytest.raises(ConnectionRefusedError):
        await guarded(SOURCE)
    assert await guarded(SOURCE) == 3
    assert await guarded(SOURCE) == 3
    assert calls == 3


async def test_a_function_may_say_what_was_sent_itself(gate: Gate) -> None:
    """What it said is what others get."""

    async def tool(permit: Permit) -> str:
        await permit.sent("for others")
        return "for its caller"

    guarded = gate.guard(tool, tool=TOOL)
    assert await guarded(SOURCE) == "for its caller"
    assert await guarded(SOURCE) == "for others"


async def test_no_argument_can_be_called_permit(gate: Gate, mailer: Mailer) -> None:
    with pytest.raises(InvalidInput) as raised:
        await gate.guard(mailer.send, tool=TOOL)(SOURCE, permit=1)
    assert raised.value.field == "permit"
    assert mailer.effects == []


@pytest.mark.parametrize("arguments", [{}, {"to": "a", "cc": "c4nary"}])
async def test_arguments_that_do_not_fit_are_refused_before_a_grant(
    gate: Gate, arguments: dict[str, Any]
) -> None:
    """Nothing ran: it must not become unknown, and no value is shown."""

    async def tool(to: str, permit: Permit) -> None:
        pytest.fail("run")

    with pytest.raises(InvalidInput, match="nothing was granted and nothing was run") as raised:
        await gate.guard(tool, tool=TOOL)(SOURCE, **arguments)
    assert raised.value.field == "arguments"
    assert "c4nary" not in str(raised.value)
    assert (await gate.list()).items == []


@pytest.mark.parametrize("result", [None, 0, "", [], {"a": [1, None]}])
async def test_any_json_value_is_a_result(gate: Gate, result: Any) -> None:
    """Also nothing."""
    calls = 0

    async def tool() -> Any:
        nonlocal calls
        calls += 1
        return result

    guarded = gate.guard(tool, tool=TOOL)
    assert [await guarded(SOURCE), await guarded(SOURCE)] == [result, result]
    assert calls == 1


async def test_a_result_that_cannot_be_kept_makes_no_second_effect(gate: Gate) -> None:
    """The first caller is told; the effect is known to be made, and what came back is not."""
    calls = 0

    async def tool() -> Any:
        nonlocal calls
        calls += 1
        return object()

    guarded = gate.guard(tool, tool=TOOL)
    with pytest.raises(InvalidInput, match="do not send again"):
        await guarded(SOURCE)
    assert await guarded(SOURCE) is None
    assert calls == 1


async def test_a_nested_call_that_was_made_before_is_not_taken_for_its_own(
    gate: Gate, mailer: Mailer
) -> None:
    """A tool that uses another: the inner result stays the inner one's."""
    inner = gate.guard(mailer.send, tool=TOOL)
    await inner(SOURCE, to="a")

    async def tool() -> str:
        return f"outer around {await inner(SOURCE, to='a')}"

    outer = gate.guard(tool, tool="mcp.mail.post")
    assert await outer(SOURCE) == "outer around {'number': 1}"
    assert len(mailer.effects) == 1


# --- what is gated --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "is_gated"),
    [
        ({"tool": "mcp.mail.send"}, True),
        ({"tool": "delete_row"}, True),
        ({"tool": "transfer"}, True),
        ({"tool": "t", "canonical_tool": "mcp.x.rotate_key"}, True),
        ({"tool": "lookup"}, True),
        ({"tool": "lookup", "external_side_effect": False}, False),
        ({"tool": "send", "external_side_effect": False}, True),
        ({"tool": "send", "descriptor": ToolDescriptor(risk_tier="read_discover")}, False),
        ({"tool": "lookup", "descriptor": ToolDescriptor(risk_tier="external_send")}, True),
        ({"tool": "lookup", "descriptor": ToolDescriptor(data_classes=["regulated"])}, True),
        ({"tool": "lookup", "descriptor": ToolDescriptor(risk_tier="consequential_write")}, False),
    ],
)
async def test_the_tier_decides_what_is_gated(
    gate: Gate, mailer: Mailer, options: dict[str, Any], is_gated: bool
) -> None:
    """Declared, or inferred from the name; without one, the flag. What is not gated runs each time."""
    guarded = gate.guard(mailer.send, **options)
    results = [await guarded(SOURCE, to="a") for _ in range(2)]
    assert results == [{"number": 1}, {"number": 1 if is_gated else 2}]
    assert len((await gate.list()).items) == is_gated


async def test_the_gates_policy_decides_about_tiers(connected: Connect, tenant_name: str) -> None:
    """consequential_write, where it is configured."""
    policy = GatePolicy(tiers=frozenset({"consequential_write"}))
    gate = (await connected(clock="server", gate=policy)).tenant(tenant_name, "w").gate
    mailer = Mailer()
    writing = ToolDescriptor(risk_tier="consequential_write")
    guarded = gate.guard(mailer.send, tool="update", descriptor=writing)
    assert [await guarded(SOURCE), await guarded(SOURCE)] == [{"number": 1}] * 2
    sending = gate.guard(mailer.send, tool="send")
    assert await sending(SOURCE) != await sending(SOURCE)


def test_a_declared_tier_must_exist(gate: Gate, mailer: Mailer) -> None:
    """Taken as it is, a misspelt one would open the gate."""
    with pytest.raises(InvalidInput, match="risk_tier"):
        gate.guard(mailer.send, tool=TOOL, descriptor=ToolDescriptor(risk_tier="external-send"))


@pytest.mark.parametrize(
    ("allowlist", "is_allowed"),
    [([], True), (["mcp.mail.*"], True), (["MCP.mail.SEND"], True), (["mcp.chat.*"], False)],
)
async def test_an_allow_list_is_kept(
    gate: Gate, mailer: Mailer, allowlist: list[str], is_allowed: bool
) -> None:
    """A tool outside of it is not run, and nothing is granted."""
    guarded = gate.guard(mailer.send, tool=TOOL, scope_allowlist=allowlist)
    if is_allowed:
        await guarded(SOURCE)
        assert (await gate.list()).items[0].metadata["scope_allowlist"] == allowlist
    else:
        with pytest.raises(InvalidInput, match=r"ToolDenied { reason: ScopeAllowlist }"):
            await guarded(SOURCE)
        assert (await gate.list()).items == []
    assert len(mailer.effects) == is_allowed


# --- side by side ---------------------------------------------------------------------------------


async def test_a_hundred_at_once_make_one_effect(
    gate: Gate, connected: Connect, mailer: Mailer, tenant_name: str
) -> None:
    """On two clients: the others are refused while it runs, and get its result afterwards."""
    second = (await connected(clock="server")).tenant(tenant_name, "w").gate
    tools = [one.guard(mailer.send, tool=TOOL) for one in (gate, second)]
    results = await asyncio.gather(
        *(tools[number % 2](SOURCE, to="a") for number in range(100)), return_exceptions=True
    )
    assert mailer.effects == [{"to": "a"}]
    assert {type(one) for one in results} <= {dict, InProgress}
    assert {"number": 1} in results
    again = await asyncio.gather(*(tools[number % 2](SOURCE, to="a") for number in range(100)))
    assert again == [{"number": 1}] * 100
    assert len(mailer.effects) == 1
