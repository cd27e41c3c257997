"""Never run: mypy checks here that the API has the types that users rely on."""

from __future__ import annotations

from asyncio import Future
from typing import Any, Literal, assert_type

import leasekit
from leasekit import (
    Draft,
    Durability,
    GatePolicy,
    Leasekit,
    LeasekitError,
    Outcome,
    Tenant,
    replicated,
)
from leasekit.gate import (
    Completion,
    GuardedTool,
    Intent,
    IntentStatus,
    LedgerEvent,
    Permit,
    PreSendEvent,
    Question,
    Receipt,
    ReconcileCounts,
    Resolution,
    Source,
    Verdict,
    applied,
)
from leasekit.lease import Acquisition, Lease
from leasekit.model import (
    AckOutcome,
    CancelOutcome,
    CompleteOutcome,
    Counts,
    Enqueued,
    ExtendOutcome,
    Holder,
    IdempotencyRecord,
    LeaseExtendOutcome,
    LeaseReleaseOutcome,
    NackOutcome,
    Page,
    RedriveOutcome,
    ReleaseOutcome,
    Reservation,
    ResolveOutcome,
    Row,
    WithdrawOutcome,
)
from leasekit.outbox import Claim, ClaimedRows


async def connecting() -> None:
    async with leasekit.connect("memory://") as kit:
        assert_type(kit, Leasekit)
        assert_type(kit.tenant("o", "w"), Tenant)
        assert_type(await kit.tenants(), Page[Tenant])
        assert_type(kit.durability, Durability)
    assert_type(await leasekit.connect(), Leasekit)
    await leasekit.connect(durability="fsync")
    assert_type(replicated(2, timeout_ms=10), Durability)


async def outbox(tenant: Tenant) -> None:
    enqueued = await tenant.outbox.enqueue("l", "t", {"any": ["json", 1, None]})
    assert_type(enqueued, Enqueued)
    assert_type(enqueued.row, Row)
    drafts = [Draft(lane="l", target="t", payload=1)]
    assert_type(await tenant.outbox.enqueue_many(drafts), list[Enqueued | LeasekitError])
    claims = await tenant.outbox.claim("l", "t", consumer="c")
    assert_type(claims, ClaimedRows)
    for claim in claims:
        assert_type(claim, Claim)
        assert_type(await claim.ack(), AckOutcome)
        assert_type(await claim.ack(durability=replicated()), AckOutcome)
        assert_type(await claim.nack(error="e"), NackOutcome)
        assert_type(await claim.extend(), ExtendOutcome)
        assert_type(await claim.release(), ReleaseOutcome)
    assert_type(await tenant.outbox.cancel("id"), CancelOutcome)
    assert_type(await tenant.outbox.redrive("id"), RedriveOutcome)
    assert_type(await tenant.outbox.resolve("id", "sent", actor="a", reason="r"), ResolveOutcome)
    assert_type(await tenant.outbox.get("id"), Row | None)
    assert_type(await tenant.outbox.list(), Page[Row])
    assert_type(await tenant.outbox.counts(), Counts)
    assert_type(await tenant.outbox.purge(before_ms=0), int)
    await tenant.outbox.resolve("id", "maybe", actor="a", reason="r")  # type: ignore[arg-type]
    await tenant.outbox.enqueue("l", "t", 1, on_expiry="stop")  # type: ignore[arg-type]


async def leases(tenant: Tenant) -> None:
    acquisition = await tenant.leases.acquire("n", ttl_ms=1, owner="o")
    assert_type(acquisition, Acquisition)
    assert_type(acquisition.lease, Lease | None)
    assert_type(acquisition.holder, Holder | None)
    assert_type(await tenant.leases.extend("n", "token", ttl_ms=1), LeaseExtendOutcome)
    assert_type(await tenant.leases.release("n", "token"), LeaseReleaseOutcome)
    assert_type(await tenant.leases.list(), Page[Holder])
    async with tenant.leases.hold("n", ttl_ms=1, owner="o") as lease:
        assert_type(lease, Lease)


async def keys(tenant: Tenant) -> None:
    reservation = await tenant.idempotency.reserve("op", "k", owner="o", fingerprint="f")
    assert_type(reservation, Reservation)
    assert_type(reservation.record, IdempotencyRecord)
    assert_type(reservation.token, str | None)
    outcome = Outcome(outcome_kind="k")
    completed = await tenant.idempotency.complete("op", "k", outcome, token="token")
    assert_type(completed, CompleteOutcome)
    assert_type(await tenant.idempotency.release("op", "k", token="token"), WithdrawOutcome)
    assert_type(await tenant.idempotency.get("op", "k"), IdempotencyRecord | None)
    assert_type(await tenant.idempotency.list(), Page[IdempotencyRecord])


async def gate(tenant: Tenant) -> None:
    source = Source(kind="k")
    call = PreSendEvent(dispatch_id="d", tool="t", source=source, args={"any": ["json", 1]})
    receipt = await tenant.gate.prepare(call)
    assert_type(receipt, Receipt | None)
    event = LedgerEvent(tool="t", source=source, policy_outcome="allowed", status="succeeded")
    assert_type(await tenant.gate.complete(event, receipt=receipt, result=[1]), Completion)
    if receipt is not None:
        assert_type(receipt.fence, int)
        assert_type(await tenant.gate.extend(receipt, lease_ms=1), Receipt | None)
    async with tenant.gate.dispatch(call, on_expiry="park") as permit:
        assert_type(permit, Permit)
        assert_type(permit.fence, int | None)
        permit.begin()
        assert_type(permit.sent({"any": "json"}), Future[None])
        assert_type(permit.failed(ValueError()), Future[None])
        await permit.not_sent("reason")

    async def ask(question: Question) -> Verdict:
        assert_type(question.intent, Intent)
        assert_type(question.fence, int)
        return applied({"any": "json"})

    assert_type(await tenant.gate.reconcile({"t": ask}), ReconcileCounts)
    assert_type(await tenant.gate.unknown(), Page[Intent])
    assert_type(await tenant.gate.list(status="sent"), Page[Intent])
    intent = await tenant.gate.get("id")
    assert_type(intent, Intent | None)
    if intent is not None:
        assert_type(intent.status, IntentStatus)
        assert_type(intent.result, Any)
    resolved = await tenant.gate.resolve("id", "not_sent", actor="a", reason="r")
    assert_type(resolved, Resolution)
    opened = await tenant.gate.open("lost", actor="a", reason="r")
    assert_type(opened, Literal["opened", "known"])

    async def send(to: str) -> int:
        return len(to)

    guarded = tenant.gate.guard(send, tool="t")
    assert_type(guarded, GuardedTool)
    await guarded(source, to="a")
    await tenant.gate.prepare(call, on_expiry="stop")  # type: ignore[arg-type]
    await tenant.gate.resolve("id", "maybe", actor="a", reason="r")  # type: ignore[arg-type]
    await tenant.gate.reconcile({"t": send})  # type: ignore[dict-item]
    assert_type(GatePolicy(tiers=frozenset({"t"}), on_expiry="park").lease_ms, int)
