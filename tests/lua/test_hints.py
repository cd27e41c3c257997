"""What publishes hints, when, and what they say; PROTOCOL.md, "Hints"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from lua.commands import A, B, C, Tenant, row
from servers import Server, ServerProcess

Heard = Callable[[], list[str]]


@pytest.fixture
def heard(tenant: Tenant) -> Iterator[Heard]:
    """Gives what was published on the tenant's channel since it was asked last."""
    listener = tenant.raw.pubsub()
    listener.subscribe(tenant.keys.hint_channel)
    assert listener.get_message(timeout=5)["type"] == "subscribe"

    def messages() -> list[str]:
        # What comes after a marker was published after it.
        tenant.raw.publish(tenant.keys.hint_channel, "end")
        found = []
        while (text := listener.get_message(timeout=5)["data"].decode()) != "end":
            found.append(text)
        return found

    yield messages
    listener.close()


def told(tenant: Tenant, name: str, *items: Any, **arguments: Any) -> list[Any]:
    return tenant.run(name, *items, hint=tenant.keys.hint_channel, **arguments)


def test_enqueue_tells_of_the_row_that_is_due_first(tenant: Tenant, heard: Heard) -> None:
    """One message a call: the smallest delay of the rows it created; none if it created none."""
    rows = (row("m1", available_at=70), row("m2", available_at=40), row("m3", available_at=90))
    told(tenant, "outbox/enqueue", *rows, now_ms=10)
    told(tenant, "outbox/enqueue", row("m4"), row("m5", available_at=40), now_ms=10)
    told(tenant, "outbox/enqueue", row("m4"), now_ms=11)
    told(tenant, "outbox/enqueue", row("m6", available_at=5), now_ms=11)

    assert heard() == ["l:t 30", "l:t 0", "l:t 0"]


def test_without_a_channel_nobody_is_told(tenant: Tenant, heard: Heard) -> None:
    """hint = "" publishes nothing and remembers nothing."""
    tenant.enqueue("m1")
    tenant.claim(A, now_ms=1)
    tenant.run("outbox/release", ("m1", A), now_ms=2)

    assert heard() == []
    assert "hinted:l:t" not in tenant.dump()["outbox:tally"]


def test_nack_tells_of_requeued_rows_only(tenant: Tenant, heard: Heard) -> None:
    """The smallest delay of what waits again; a retry in the past is now; a buried row is silent."""
    tenant.enqueue("m1", "m2", "m3", "m4")
    tenant.claim(A, now_ms=10)

    told(tenant, "outbox/nack", ("m1", A, 50, 0, '"x"'), ("m2", A, 30, 0, '"x"'), now_ms=11)
    told(tenant, "outbox/nack", ("m3", A, 5, 0, '"x"'), now_ms=11)
    told(tenant, "outbox/nack", ("m4", A, "", 1, '"x"'), now_ms=11)
    told(tenant, "outbox/nack", ("m1", A, 90, 0, '"x"'), now_ms=12)  # the first answer again

    assert heard() == ["l:t 19", "l:t 0"]


def test_what_waits_again_is_told_at_once(tenant: Tenant, heard: Heard) -> None:
    """release, redrive and resolve redrive publish 0; losing and other verdicts publish nothing."""
    tenant.enqueue("m1", "m2", row("p1", on_expiry="park"), row("p2", on_expiry="park"))
    tenant.claim(A, now_ms=10)
    told(tenant, "outbox/release", ("m1", A), ("m1", B), now_ms=11)
    assert heard() == ["l:t 0"]

    tenant.run("outbox/nack", ("m2", A, "", 1, '"x"'), now_ms=11)
    told(tenant, "outbox/redrive", ("m2",), now_ms=12)
    told(tenant, "outbox/redrive", ("m2",), ("m1",), now_ms=12)
    assert heard() == ["l:t 0"]

    told(tenant, "outbox/resolve", ("p1", "sent", '"x"'), now_ms=30)
    told(tenant, "outbox/resolve", ("p2", "redrive", '"x"'), now_ms=30)
    told(tenant, "outbox/release", ("m2", B), now_ms=31)
    assert heard() == ["l:t 0"]


def test_claim_tells_its_lease_end_once_a_lease(tenant: Tenant, heard: Heard) -> None:
    """An end is published if none that was published lies between now and it; no rows, no hint."""

    def claim(token: str, *, now_ms: int, lease_ms: int) -> None:
        told(tenant, "outbox/claim", (token, 1, "a"), now_ms=now_ms, lease_ms=lease_ms)

    tenant.enqueue(*(f"m{i}" for i in range(9)))
    claim("1" * 22, now_ms=100, lease_ms=40)
    claim("2" * 22, now_ms=139, lease_ms=40)  # 140 lies ahead
    assert heard() == ["l:t 40"]

    claim("3" * 22, now_ms=140, lease_ms=40)  # 140 has come
    assert heard() == ["l:t 40"]
    claim("4" * 22, now_ms=150, lease_ms=10)  # sooner than 180
    claim("5" * 22, now_ms=151, lease_ms=90)  # 160 leads to it
    assert heard() == ["l:t 10"]
    assert tenant.dump()["outbox:tally"]["hinted:l:t"] == "160"

    told(tenant, "outbox/claim", ("6" * 22, 0, "a"), now_ms=200)
    assert heard() == []


@pytest.mark.parametrize("kind", ["valkey-9", "redis-6.2", "redis-path"])
def test_no_right_to_the_channel_fails_no_command(
    private_server: Callable[..., ServerProcess], kind: str
) -> None:
    """A user who may not publish there gets the same answers, and everything is written."""
    process = private_server(kind)
    process.raw.execute_command(
        "ACL", "SETUSER", "mute", "on", ">x", "~*", "+@all", "resetchannels"
    )
    url = process.url.removeprefix("unix://")
    mute = redis.Redis(unix_socket_path=url, username="mute", password="x", protocol=2)
    tenant = Tenant(Server(kind, process.url, mute), "t")
    with mute:
        told(tenant, "outbox/enqueue", row("m1"), row("m2"), now_ms=1)
        claimed = told(tenant, "outbox/claim", (C, 5, "a"), now_ms=2)
        released = told(tenant, "outbox/release", ("m1", C), now_ms=3)

        assert claimed[4][3::5] == ["m1", "m2"]
        assert released == [3, "released"]
        assert tenant.tally()["pending:l:t"] == 1
