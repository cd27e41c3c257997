"""ledger/put: records whole, whatever was there."""

from __future__ import annotations

import pytest
from lua.commands import A, B, C, Item, Tenant, filed, record, stands

E1, E2 = "effects/e1", "effects/e2"


def test_records_are_written_over_what_was_there(tenant: Tenant) -> None:
    """Each stands in its places, old ones left behind; the revision rises with every write."""
    assert tenant.run("ledger/put", record(E1, run="r"), record(E2), now_ms=10) == [
        10,
        ["put", "1"],
        ["put", "1"],
    ]

    assert tenant.run("ledger/put", record(E1, B, run="r", order=7), now_ms=11) == [
        11,
        ["put", "2"],
    ]

    assert tenant.record(E1)[0] == f"2 {B} {filed(run='r')}"
    assert tenant.dump()["ledger:index"] == dict.fromkeys(
        [stands("effects", 1, "e2"), stands("effects", 7, "e1"), stands("effects:r", 7, "e1")], 0
    )
    assert tenant.dump()["ledger:guards"] == {"r": "2", "~": "1"}


def test_a_record_in_its_old_places_stays_there(tenant: Tenant) -> None:
    """Only its text and its count change."""
    tenant.run("ledger/put", record(E1), now_ms=10)
    before = tenant.dump()

    tenant.run("ledger/put", record(E1, B, doc="[]"), now_ms=11)

    assert tenant.changes(before).keys() == {"ledger:docs", "ledger:guards"}
    assert tenant.record(E1)[2] == "[]"


def test_a_record_that_changes_its_run_counts_for_both(tenant: Tenant) -> None:
    tenant.run("ledger/put", record(E1, run="r"), now_ms=10)

    tenant.run("ledger/put", record(E1, B, run="s"), now_ms=11)

    assert tenant.dump()["ledger:guards"] == {"r": "2", "s": "1"}


def test_the_same_record_twice_in_a_call(tenant: Tenant) -> None:
    """The later one stands, as if they had come one after the other."""
    items = (record(E1, A, order=1), record(E1, B, order=2), record(E1, C, order=3))
    reply = tenant.run("ledger/put", *items, now_ms=10)

    assert reply == [10, ["put", "1"], ["put", "2"], ["put", "3"]]
    assert tenant.dump()["ledger:index"] == {stands("effects", 3, "e1"): 0}


def test_a_repeat_writes_nothing(tenant: Tenant) -> None:
    """The write's own name tells, until another write comes."""
    tenant.run("ledger/put", record(E1), now_ms=10)
    before = tenant.dump()

    assert tenant.run("ledger/put", record(E1), record(E1), now_ms=11) == [
        11,
        ["put", "1"],
        ["put", "1"],
    ]
    assert tenant.dump() == before


def test_damage_is_written_over(tenant: Tenant) -> None:
    """What cannot be read is replaced; where it stood is not known."""
    tenant.raw.hset(tenant.keys.ledger_docs, E1, "x")

    assert tenant.run("ledger/put", record(E1), now_ms=10) == [10, ["put", "1"]]


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        (("effects", A, filed(), "", "{}"), "name"),
        (("effects/a b", A, filed(), "", "{}"), "name"),
        ((E1, "x", filed(), "", "{}"), "token"),
        ((E1, A, "1 open", "", "{}"), "words"),
        ((E1, A, filed(), "a\nb", "{}"), "places"),
        ((E1, A, filed(), stands("effects", 1, "e2"), "{}"), "places"),
        ((E1, A, filed(), "effects|1|e1", "{}"), "places"),
    ],
)
def test_what_would_not_be_found_again_is_refused(tenant: Tenant, item: Item, problem: str) -> None:
    """Good items of the call are refused with it."""
    assert tenant.refusal("ledger/put", record(E2), item, now_ms=10) == f"LK_ARGUMENT {problem}"
