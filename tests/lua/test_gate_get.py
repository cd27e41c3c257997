"""gate/get: all that is stored of intents."""

from __future__ import annotations

from lua.commands import A, Tenant, intent, intent_line


def test_get_gives_intent_state_and_facts(tenant: Tenant) -> None:
    """What is stored comes back as it is, in the order of the items; facts are "" without any."""
    tenant.prepare(intent("i1", doc="[1]"), "i2")
    tenant.run("gate/complete", ("i1", A, "succeeded", "{}"), now_ms=11)
    before = tenant.dump()

    reply = tenant.run("gate/get", ("i2",), ("i3",), ("i1",), ("i2",), now_ms=12)

    sent = intent_line("sent", "succeeded", updated_at=11, revision=2)
    fresh = ["found", "{}", intent_line("claimed", "granted"), ""]
    told = "11 succeeded 10000 1 {}"
    assert reply == [12, fresh, "missing", ["found", "[1]", sent, told], fresh]
    assert tenant.dump() == before


def test_get_of_what_parks_shows_what_is_written(tenant: Tenant) -> None:
    """Reading writes nothing: an intent whose lease has ended is unknown to who reads its line."""
    tenant.prepare("i1")

    assert tenant.run("gate/get", ("i1",), now_ms=50)[1][2] == intent_line("claimed", "granted")


def test_get_of_damage_shows_what_there_is(tenant: Tenant) -> None:
    """A line that nobody can read is shown; an intent without its document has an empty one."""
    tenant.is_damaged = True
    tenant.raw.hset(tenant.keys.gate_state, "i1", "x")
    tenant.raw.hset(tenant.keys.gate_docs, "i2", "{}")

    assert tenant.run("gate/get", ("i1",), ("i2",), now_ms=5) == [
        5,
        ["found", "", "x", ""],
        "missing",
    ]
