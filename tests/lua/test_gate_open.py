"""gate/open: an operator lets senders in who know data that was lost."""

from __future__ import annotations

from lua.commands import Tenant

DATA, OTHER = "f" * 22, "e" * 22


def name(number: int) -> str:
    return f"{number:022}"


def test_open_notes_what_was_lost(tenant: Tenant) -> None:
    """Name, instant and note of each opening stand behind the name of the data, oldest first."""
    tenant.prepare("i1")

    reply = tenant.run("gate/open", (OTHER, '{"actor":"ann"}'), (name(1), "{}"), now_ms=20)

    assert reply == [20, "opened", "opened"]
    openings = f'\n{OTHER} 20 {{"actor":"ann"}}\n{name(1)} 20 {{}}'
    assert tenant.dump()["gate:dataset"] == DATA + openings


def test_open_of_an_empty_server(tenant: Tenant) -> None:
    """Data that has no name yet can be opened: it gets one with its first grant."""
    assert tenant.run("gate/open", (OTHER, "{}"), now_ms=20) == [20, "opened"]
    assert tenant.dump() == {"gate:dataset": f"\n{OTHER} 20 {{}}"}

    tenant.prepare("i1", known=OTHER)
    assert tenant.dump()["gate:dataset"] == f"{DATA}\n{OTHER} 20 {{}}"


def test_open_of_the_data_that_is_here(tenant: Tenant) -> None:
    """Who knows the data that is here needs no opening."""
    tenant.prepare("i1")
    before = tenant.dump()

    assert tenant.run("gate/open", (DATA, "{}"), now_ms=20) == [20, "known"]
    assert tenant.dump() == before


def test_second_open_changes_nothing(tenant: Tenant) -> None:
    """What is open stays as it was opened first, in another call as in the same one."""
    tenant.prepare("i1")
    first = tenant.run("gate/open", (OTHER, "{}"), (OTHER, "[]"), now_ms=20)
    before = tenant.dump()

    second = tenant.run("gate/open", (OTHER, "[]"), now_ms=21)

    assert (first, second) == ([20, "opened", "opened"], [21, "opened"])
    assert before["gate:dataset"] == f"{DATA}\n{OTHER} 20 {{}}"
    assert tenant.dump() == before


def test_open_keeps_16_openings(tenant: Tenant) -> None:
    """The oldest beyond sixteen is closed again; the name of the data stays."""
    tenant.prepare("i1")
    tenant.run("gate/open", *((name(i), "{}") for i in range(16)), now_ms=20)

    assert tenant.prepare("i2", known=name(0))[2][0] == "granted"
    tenant.run("gate/open", (OTHER, "{}"), now_ms=21)

    refused = tenant.refusal("gate/open", *((name(i), "{}") for i in range(17)), now_ms=22)
    assert refused == "LK_ARGUMENT items"
    found, *openings = tenant.dump()["gate:dataset"].split("\n")
    assert found == DATA
    assert openings == [*(f"{name(i)} 20 {{}}" for i in range(1, 16)), f"{OTHER} 21 {{}}"]
    assert tenant.prepare("i3", known=name(0))[2] == "data_lost"
    assert tenant.prepare("i3", known=name(1))[2][0] == "granted"


def test_open_says_nothing_of_names_within_notes(tenant: Tenant) -> None:
    """A name that only stands in a note is not open."""
    tenant.run("gate/open", (OTHER, f'"{name(1)} "'), now_ms=20)

    assert tenant.prepare("i1", known=name(1))[2] == "data_lost"
