"""gate/extend: a sender keeps its intent for longer; nothing else changes."""

from __future__ import annotations

import pytest
from lua.commands import A, B, Tenant, intent, intent_line


@pytest.mark.parametrize("on_expiry", ["park", "reclaim"])
def test_extend_counts_from_now(tenant: Tenant, on_expiry: str) -> None:
    """The end is now + lease_ms; revision, times and fence stay, so nobody's view of it is stale."""
    tenant.prepare(intent("i1", on_expiry=on_expiry, run="r"))
    before = tenant.dump()

    assert tenant.run("gate/extend", ("i1", A, 30), now_ms=15) == [15, ["extended", 45]]

    line = intent_line("claimed", "granted", lease_end=45, on_expiry=on_expiry, run="r")
    assert tenant.changes(before) == {
        **({"gate:expiring": {"i1": 45}} if on_expiry == "park" else {}),
        "gate:state": {"i1": line},
    }


@pytest.mark.parametrize(("lease_ms", "lease_end"), [(1, 20), (5, 20), (6, 21)])
def test_extend_never_shortens(tenant: Tenant, lease_ms: int, lease_end: int) -> None:
    """A shorter lease than what is left changes nothing: a late copy of a request is harmless."""
    tenant.prepare("i1")

    reply = tenant.run("gate/extend", ("i1", A, lease_ms), now_ms=15)

    assert reply == [15, ["extended", lease_end]]
    assert tenant.dump()["gate:expiring"] == {"i1": lease_end}


@pytest.mark.parametrize("on_expiry", ["park", "reclaim"])
@pytest.mark.parametrize(("now_ms", "is_kept"), [(19, True), (20, False), (21, False)])
def test_extend_ends_with_the_lease(
    tenant: Tenant, now_ms: int, is_kept: bool, on_expiry: str
) -> None:
    """At its end, to the millisecond, a lease is over, though nobody else has the intent yet."""
    tenant.prepare(intent("i1", on_expiry=on_expiry))
    before = tenant.dump()

    reply = tenant.run("gate/extend", ("i1", A, 30), now_ms=now_ms)

    assert reply == [now_ms, ["extended", now_ms + 30] if is_kept else "lost"]
    assert (tenant.dump() != before) == is_kept


@pytest.mark.parametrize("token", [B, A[:-1], A + "a", "", "~", f"{A} 20"])
def test_extend_is_by_token(tenant: Tenant, token: str) -> None:
    """Only the last grant's token extends it."""
    tenant.prepare("i1")
    before = tenant.dump()

    assert tenant.run("gate/extend", ("i1", token, 30), now_ms=15) == [15, "lost"]
    assert tenant.dump() == before


def test_a_sender_that_was_overtaken_cannot_extend(tenant: Tenant) -> None:
    """After a newer grant the old token holds nothing, and the new one does."""
    tenant.prepare(intent("i1", on_expiry="reclaim"))
    tenant.prepare(intent("i1", B, on_expiry="reclaim"), now_ms=20)

    reply = tenant.run("gate/extend", ("i1", A, 30), ("i1", B, 30), now_ms=21)

    assert reply == [21, "lost", ["extended", 51]]


@pytest.mark.parametrize("result", ["succeeded", "failed", "blocked", "left"])
@pytest.mark.parametrize("on_expiry", ["park", "reclaim"])
def test_what_was_completed_is_not_extended(tenant: Tenant, result: str, on_expiry: str) -> None:
    """After its sender's word there is no lease, also where the word was that it knows nothing."""
    tenant.prepare(intent("i1", on_expiry=on_expiry))
    tenant.run("gate/complete", ("i1", A, result, "{}"), now_ms=11)
    before = tenant.dump()

    assert tenant.run("gate/extend", ("i1", A, 30), now_ms=11) == [11, "lost"]
    assert tenant.dump() == before


def test_items_are_extended_one_after_the_other(tenant: Tenant) -> None:
    """Several share a call; the later of two for one intent sees the earlier's end."""
    tenant.prepare("i1", intent("i2", on_expiry="reclaim"))

    reply = tenant.run(
        "gate/extend", *(("i1", A, 30), ("i3", A, 30), ("i2", A, 40), ("i1", A, 20)), now_ms=15
    )

    assert reply == [15, ["extended", 45], "lost", ["extended", 55], ["extended", 45]]
    assert tenant.dump()["gate:expiring"] == {"i1": 45}


def test_a_damaged_intent_is_not_extended(tenant: Tenant) -> None:
    """A line that nobody can read is nobody's, and stays."""
    tenant.is_damaged = True
    tenant.raw.hset(tenant.keys.gate_state, "i1", f"claimed granted {A} 20")

    assert tenant.run("gate/extend", ("i1", A, 30), now_ms=15) == [15, "lost"]
    assert tenant.intent("i1") == f"claimed granted {A} 20"
