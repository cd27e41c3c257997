"""ledger/get: records as they are stored, and guards of runs."""

from __future__ import annotations

import pytest
from lua.commands import A, Tenant, record


def test_get_gives_records_and_guards(tenant: Tenant) -> None:
    """In the order of the items, each as often as it is asked for; nothing is written."""
    tenant.run("ledger/put", record("effects/e1", run="r", doc='{"a":"ü"}'), now_ms=10)
    before = tenant.dump()
    asked = (
        ("record", "effects/e1"),
        ("guard", "r"),
        ("record", "effects/e2"),
        ("guard", "unheard"),
        ("record", "effects/e1"),
    )

    reply = tenant.run("ledger/get", *asked, now_ms=11)

    head, places = (
        f"1 {A} 1 open ~ 1 r",
        "effects|0000000000000001|e1 effects:r|0000000000000001|e1",
    )
    found = ["found", f'{head}\n{places}\n{{"a":"ü"}}']
    assert reply == [11, found, ["guard", "1"], "missing", ["guard", "0"], found]
    assert tenant.dump() == before


def test_get_shows_damage_as_it_is(tenant: Tenant) -> None:
    """Who reads it may judge it."""
    tenant.is_damaged = True
    tenant.raw.hset(tenant.keys.ledger_docs, "effects/e1", "x")

    assert tenant.run("ledger/get", ("record", "effects/e1"), now_ms=5) == [5, ["found", "x"]]


@pytest.mark.parametrize("kind", ["", "Record", "records", "record "])
def test_other_kinds_are_refused(tenant: Tenant, kind: str) -> None:
    refusal = tenant.refusal("ledger/get", ("guard", "r"), (kind, "effects/e1"), now_ms=5)
    assert refusal == "LK_ARGUMENT kind"
