"""Ids and routes are ordered by their bytes, whatever the locale that a server runs under."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from lua.commands import A, Tenant, intent, invariants, row
from servers import ServerProcess

pytestmark = pytest.mark.xdist_group("locale")  # a locale takes a second to make

# In Danish "aa" stands behind "z"; in English "-" and "~" count for nothing at first.
LOCALES = {"da_DK": ("r1aa", "r1b"), "en_US": ("r-z", "ra")}


@pytest.fixture(scope="module", params=LOCALES)
def locale(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A locale made here: few machines have these installed."""
    name: str = request.param
    made = tmp_path_factory.mktemp("locale") / f"{name}.UTF-8"
    if not shutil.which("localedef"):
        pytest.skip("no localedef here to make a locale with")
    command = ["localedef", "-i", name, "-f", "UTF-8", str(made)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"no source of the locale {name} here")
    return made


@pytest.fixture
def foreign(
    locale: Path,
    monkeypatch: pytest.MonkeyPatch,
    private_server: Callable[..., ServerProcess],
) -> tuple[Tenant, str, str]:
    """A tenant on a server with another order of letters, and two ids in the order of bytes."""
    monkeypatch.setenv("LOCPATH", str(locale.parent))
    monkeypatch.setenv("LC_ALL", locale.name)
    tenant = Tenant(private_server(), "t")
    first, second = LOCALES[locale.stem]
    assert first < second
    script = "return ARGV[1] < ARGV[2] and 1 or 0"
    assert tenant.raw.eval(script, 0, first, second) == 0, "the server goes by bytes anyway"
    return tenant, first, second


def test_horizon_follows_bytes(foreign: tuple[Tenant, str, str]) -> None:
    """A repeat is forgotten up to the horizon by bytes; above it, it is created."""
    tenant, first, second = foreign
    tenant.enqueue(first, second)
    tenant.run("outbox/cancel", (first,), (second,), now_ms=10, keep_ms=0)

    assert tenant.dump()["outbox:tally"]["horizon"] == second
    assert tenant.enqueue(first, now_ms=11, repeated=1) == [11, "forgotten"]
    assert tenant.enqueue(second + "0", now_ms=11, repeated=1) == [11, "created"]


def test_pages_follow_bytes(foreign: tuple[Tenant, str, str]) -> None:
    """A page goes on behind its last row, by bytes, as the structures of the server do."""
    tenant, first, second = foreign
    tenant.enqueue(first, second)

    assert tenant.run("outbox/list", now_ms=5, limit=1)[3] == first
    reply = tenant.run("outbox/list", now_ms=5, limit=1, after_score=0, after_id=first)
    assert reply[3:5] == [second, second]
    assert reply[1] == 0


def test_rows_are_claimed_by_bytes(foreign: tuple[Tenant, str, str]) -> None:
    """Rows of one due time are handed out by bytes."""
    tenant, first, second = foreign
    tenant.enqueue(row(second), row(first))

    assert tenant.ids_claimed(A, now_ms=10) == [first, second]
    invariants(tenant.dump())


@pytest.mark.parametrize("newest", [0, 1])
def test_pages_of_intents_follow_bytes(foreign: tuple[Tenant, str, str], newest: int) -> None:
    """From either end a page of intents goes on behind its last one, by bytes."""
    tenant, first, second = foreign
    tenant.prepare(intent(first, run="r"), intent(second, run="r"))
    order = [second, first] if newest else [first, second]

    for after, more in (("", 1), (order[0], 0)):
        place = {"after_score": 10 if after else "", "after_id": after}
        reply = tenant.run("gate/list", now_ms=15, limit=1, newest=newest, **place)
        assert reply[1:4] == [more, "10", order[1 - more]]
    assert [found[0] for found in tenant.run("gate/run", now_ms=15, run="r")[3:]] == [second, first]


def test_intents_have_one_key_a_word(foreign: tuple[Tenant, str, str]) -> None:
    """What the order of letters takes for equal is not the same token, digest or run."""
    tenant, _, _ = foreign
    tenant.prepare(intent("i1", A, run="-r"))

    other = "-" + A[1:]
    assert tenant.prepare(intent("i1", other))[2][0] == "taken"
    assert tenant.prepare(intent("i1", A, key="-" + "k" * 21))[2] == "key_conflict"
    assert tenant.run("gate/extend", ("i1", other, 99), now_ms=15) == [15, "lost"]
    assert tenant.run("gate/run", now_ms=15, run="r") == [15, 0, ""]
    invariants(tenant.dump())
