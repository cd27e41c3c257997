"""The reading commands: what they show as JSON and as tables, what they hide, and how they fail."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from servers import Server, dump

import leasekit
from leasekit import cli
from leasekit.cli import app, reading

SECRET = "payload-of-somebody"
PASSWORD = "swordfish-9"
Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one command line: `run("rows", "--json")` gives code, out, err, and the JSON document."""
    for name in ("LEASEKIT_URL", "LEASEKIT_TENANT", "LEASEKIT_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)

    def run_one(*words: str) -> SimpleNamespace:
        capsys.readouterr()
        code = app.run(words)
        out, err = capsys.readouterr()
        document = json.loads(out) if "--json" in words and out else None
        return SimpleNamespace(code=code, out=out, err=err, document=document)

    return run_one


@pytest.fixture
def shop(server: Server, tenant_name: str) -> SimpleNamespace:
    """A tenant with a row in most states, leases and idempotency keys; `options` lead to it."""
    prefix = f"cli-{tenant_name}"
    made = SimpleNamespace(
        server=server,
        prefix=prefix,
        tag=f"{tenant_name}.prod",
        tenant=f"{tenant_name}/prod",
        options=["--url", server.url, "--prefix", prefix, "--tenant", f"{tenant_name}/prod"],
    )

    async def populate() -> None:
        async with leasekit.connect(server.url, prefix=prefix) as kit:
            tenant = kit.tenant(tenant_name, "prod")
            outbox = tenant.outbox
            made.rows = [
                (await outbox.enqueue("hooks", f"to-{i % 2}", {"n": i, "secret": SECRET})).row.id
                for i in range(7)
            ]
            dead, sent, *_ = await outbox.claim("hooks", "to-0", limit=2, consumer="worker-1")
            await dead.nack(error="HTTP 410 gone", permanent=True)
            await sent.ack()
            [held] = await outbox.claim("hooks", "to-1", consumer="worker-\x1b[31m2")
            made.dead, made.sent, made.held = dead.row.id, sent.row.id, held.row.id
            made.tokens = [dead.token, sent.token, held.token]
            for name in ("import/a", "import/b", "nightly"):
                taken = await tenant.leases.acquire(name, ttl_ms=60_000, owner="cron-1")
                assert taken.lease is not None
                made.tokens.append(taken.lease.token)
            keys = tenant.idempotency
            reserved = await keys.reserve("charge", "order-1", owner="api", fingerprint="f1")
            assert reserved.token is not None
            made.tokens.append(reserved.token)
            await keys.complete("charge", "order-1", {"secret": SECRET}, token=reserved.token)
            await keys.reserve("charge", "order-1", owner="api", fingerprint="f2")
            await keys.reserve("charge", "order-2", owner="api", fingerprint="f3", lease_ms=60_000)

    asyncio.run(populate())
    return made


def every_reading_command(shop: SimpleNamespace) -> list[list[str]]:
    commands = [
        ["counts"],
        ["counts", "--lane", "hooks", "--target", "to-0"],
        ["rows"],
        ["rows", "--status", "sent"],
        ["rows", "--lane", "hooks", "--target", "to-1"],
        ["leases", "--starts-with", "import/"],
        ["keys"],
        ["show", "row", shop.dead],
        ["show", "key", "charge", "order-1"],
        ["show", "lease", "nightly"],
    ]
    return [[*command, *shop.options] for command in commands]


def test_counts_gives_states_by_lane(run: Run, shop: SimpleNamespace) -> None:
    """The counts of a tenant are those of the library, with each lane and target."""
    found = run("counts", *shop.options, "--json").document
    assert found["tenant"] == shop.tenant
    states = ("pending", "claimed", "sent", "dead_lettered", "unknown", "cancelled")
    assert [found[state] for state in states] == [4, 1, 1, 1, 0, 0]
    lanes = {(lane["lane"], lane["target"]): lane["pending"] for lane in found["lanes"]}
    assert lanes == {("hooks", "to-0"): 2, ("hooks", "to-1"): 2}
    only = run("counts", *shop.options, "--target", "to-1", "--json").document
    assert (only["pending"], only["sent"]) == (2, 0)


def test_counts_without_a_tenant_lists_all(run: Run, shop: SimpleNamespace) -> None:
    """Without --tenant, each tenant of the registry is one line."""
    found = run("counts", *shop.options[:4], "--json").document
    [one] = found["items"]
    assert (one["tenant"], one["lanes"], one["pending"]) == (shop.tenant, 2, 4)
    assert shop.tenant in run("counts", *shop.options[:4]).out


def test_rows_tells_where_each_row_is(run: Run, shop: SimpleNamespace) -> None:
    """A row comes with its state, attempts and holder, and with its payload's size only."""
    found = run("rows", *shop.options, "--json").document
    by_id = {row["id"]: row for row in found["items"]}
    assert set(by_id) == set(shop.rows)
    assert found["next_cursor"] is None
    held = by_id[shop.held]
    assert (held["status"], held["attempt_count"]) == ("claimed", 1)
    assert held["lease_expires_at_ms"] > found["now_ms"]
    assert by_id[shop.dead]["last_error"] == "HTTP 410 gone"
    assert by_id[shop.sent]["payload_bytes"] == len(f'{{"n":0,"secret":"{SECRET}"}}')
    assert not any("payload" in row for row in found["items"])


def test_rows_can_be_filtered(run: Run, shop: SimpleNamespace) -> None:
    """--status, --lane and --target leave only the rows that match."""
    dead = run("rows", *shop.options, "--status", "dead_lettered", "--json").document
    assert [row["id"] for row in dead["items"]] == [shop.dead]
    one = run("rows", *shop.options, "--lane", "hooks", "--target", "to-1", "--json").document
    assert {row["target"] for row in one["items"]} == {"to-1"}
    assert run("rows", *shop.options, "--lane", "nothing").out == "nothing to show\n"


def test_leases_and_keys_are_listed(run: Run, shop: SimpleNamespace) -> None:
    """Leases come by name, keys with the status and conflicts of their use."""
    leases = run("leases", *shop.options, "--starts-with", "import/", "--json").document
    assert [one["name"] for one in leases["items"]] == ["import/a", "import/b"]
    assert {one["owner"] for one in leases["items"]} == {"cron-1"}
    keys = run("keys", *shop.options, "--json").document
    by_key = {one["key"]: one for one in keys["items"]}
    assert set(by_key) == {"order-1", "order-2"}
    assert by_key["order-2"]["status"] == "reserved"
    assert by_key["order-1"]["conflict_count"] == 1


def test_show_tells_the_story_of_a_row(run: Run, shop: SimpleNamespace) -> None:
    """One row: its cause, its errors one after the other, its payload with --reveal alone."""
    dead = run("show", "row", shop.dead, *shop.options, "--json").document
    assert (dead["status"], dead["cause"]) == ("dead_lettered", "permanent")
    assert [error["text"] for error in dead["errors"]] == ["HTTP 410 gone"]
    table = run("show", "row", shop.dead, *shop.options).out
    assert "attempt 1: HTTP 410 gone" in table
    revealed = run("show", "row", shop.dead, *shop.options, "--reveal", "--json").document
    assert revealed["payload"]["secret"] == SECRET
    assert SECRET in run("show", "row", shop.dead, *shop.options, "--reveal").out


def test_show_tells_of_a_key_and_a_lease(run: Run, shop: SimpleNamespace) -> None:
    """A key comes with its outcome but for the details; a lease with its holder and end."""
    key = run("show", "key", "charge", "order-1", *shop.options, "--json").document
    assert key["outcome"]["details_bytes"] == len(f'{{"secret":"{SECRET}"}}')
    assert "details" not in key["outcome"]
    words = ("show", "key", "charge", "order-1", *shop.options, "--reveal", "--json")
    assert run(*words).document["outcome"]["details"] == {"secret": SECRET}
    lease = run("show", "lease", "nightly", *shop.options, "--json").document
    assert lease["owner"] == "cron-1"
    assert lease["expires_at_ms"] > lease["now_ms"]


def test_nothing_secret_is_shown(run: Run, shop: SimpleNamespace) -> None:
    """No command shows a payload, an outcome's details or a token; control characters are inert."""
    for command in every_reading_command(shop):
        for form in ([], ["--json"]):
            found = run(*command, *form)
            assert found.code == 0, found.err
            assert not any(secret in found.out for secret in (SECRET, *shop.tokens))
            assert "\x1b" not in found.out


def test_reading_writes_nothing(run: Run, shop: SimpleNamespace) -> None:
    """All that the tenant keeps, and the registry, is the same after every reading command."""

    def everything() -> list[dict[str, Any]]:
        return [dump(shop.server.raw, shop.prefix, tag) for tag in (shop.tag, "tenants")]

    before = everything()
    for command in every_reading_command(shop):
        run(*command)
    run("rows", *shop.options[:4], "--tenant", "never/seen")
    run("counts", *shop.options[:4])
    assert everything() == before


@pytest.mark.parametrize("what", ["rows", "leases", "keys"])
def test_pages_follow_one_another(run: Run, shop: SimpleNamespace, what: str) -> None:
    """The command printed below a page shows the next one; all pages together are the whole list."""
    whole = [line.split()[0] for line in run(what, *shop.options).out.splitlines()[1:]]
    found = run(what, *shop.options, "--limit", "2")
    firsts: list[str] = []
    for _ in whole:
        *lines, last = found.out.splitlines()[1:]
        more = last.startswith("more: ")
        firsts += [line.split()[0] for line in (lines if more else [*lines, last])]
        if not more:
            break
        command = shlex.split(last.removeprefix("more: "))
        assert command[0] == "leasekit"
        found = run(*command[1:])
        if found.out == "nothing to show\n":
            break
    assert firsts == whole


def test_the_next_page_repeats_no_password(
    run: Run, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A URL with a password, or one that comes from the environment, is not printed."""
    page, common = app.PageOptions(), app.Common(url=f"redis://u:{PASSWORD}@h", tenant="a/b")
    line = app._next_command(common, ["rows"], page, "ff")
    assert line == "leasekit rows --tenant a/b --cursor ff (and the same --url)"
    monkeypatch.setenv("LEASEKIT_URL", shop.server.url)
    found = run("rows", *shop.options[2:], "--limit", "1")
    assert found.code == 0
    assert shop.server.url not in found.out


def test_what_is_not_there_ends_with_3(run: Run, shop: SimpleNamespace) -> None:
    """An unknown row, key, lease or tenant is one line on standard error, and exit code 3."""
    for words in (
        ["show", "row", leasekit.new_id(), *shop.options],
        ["show", "key", "charge", "order-9", *shop.options],
        ["show", "lease", "nobody", *shop.options],
        ["rows", *shop.options[:4], "--tenant", "never/seen"],
        ["counts", *shop.options[:4], "--tenant", "never/seen"],
    ):
        for form in ([], ["--json"]):
            found = run(*words, *form)
            assert (found.code, found.out, found.err.count("\n")) == (3, "", 1), words


def test_wrong_input_ends_with_2(run: Run, shop: SimpleNamespace) -> None:
    """What cannot be meant is one line on standard error, and exit code 2."""
    where = shop.options[:4]
    for words in (
        ["rows", *where],
        ["rows", *where, "--tenant", "alone"],
        ["rows", *shop.options, "--status", "odd"],
        ["rows", *shop.options, "--target", "to-1"],
        ["rows", *shop.options, "--cursor", "zz"],
        ["rows", *shop.options, "--limit", "0"],
        ["rows", *shop.options, "--limit", "many"],
        ["rows", *shop.options, "--colour", "red"],
        ["show", "row", "17", *shop.options],
        ["show", "row"],
        ["dance"],
        ["rows", "--tenant", "a/b"],
        ["rows", "--tenant", "a/b", "--url", "nowhere"],
        ["rows", "--tenant", "a/b", "--url", "embedded://"],
        ["demo", "--rows", "3"],
        ["demo", "--url", "memory://"],
        ["demo", "--input", "no/such/file"],
    ):
        found = run(*words)
        assert (found.code, found.out, found.err.count("\n")) == (2, "", 1), (words, found.err)


def test_a_tenant_left_out_is_named(run: Run, shop: SimpleNamespace) -> None:
    """Who forgets --tenant is told which tenants there are."""
    assert shop.tenant in run("rows", *shop.options[:4]).err


def test_an_unreachable_server_ends_with_4(run: Run, tmp_path: Path) -> None:
    """A server that does not answer is one line without the password, and exit code 4."""
    for url in (f"redis://u:{PASSWORD}@localhost:1", f"unix://{tmp_path}/no.sock"):
        found = run("counts", "--url", url)
        assert (found.code, found.out, found.err.count("\n")) == (4, "", 1)
        assert PASSWORD not in found.err


def test_a_password_in_the_wrong_place_is_not_repeated(run: Run) -> None:
    """A URL where no URL belongs is refused without its password."""
    found = run("counts", f"redis://u:{PASSWORD}@localhost:1")
    assert found.code == 2
    assert PASSWORD not in found.err


def test_reading_starts_no_new_server(run: Run, tmp_path: Path) -> None:
    """A directory that is not there is not made."""
    found = run("counts", "--url", f"embedded://{tmp_path}/new")
    assert found.code == 3
    assert not (tmp_path / "new").exists()


def test_an_unforeseen_error_shows_only_its_kind(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is one line that quotes nothing; LEASEKIT_TRACEBACK=1 shows where it is."""

    def fail(*arguments: object) -> None:
        raise KeyError(SECRET)

    monkeypatch.setattr(reading, "connect", fail)
    found = run("counts", "--url", "redis://h")
    assert (found.code, found.err.count("\n")) == (1, 1)
    assert SECRET not in found.err
    monkeypatch.setenv("LEASEKIT_TRACEBACK", "1")
    assert "Traceback" in run("counts", "--url", "redis://h").err


def test_alone_it_explains_itself(run: Run) -> None:
    """`leasekit` alone names every command and the exit codes, without boxes or colours."""
    found = run()
    assert found.code == 0
    for word in ("demo", "counts", "rows", "leases", "keys", "show", "Exit codes:"):
        assert word in found.out
    assert found.out.isascii()
    assert "\x1b" not in found.out


def test_without_its_extra_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where cyclopts or rich is missing, one line names the extra."""
    monkeypatch.setitem(sys.modules, "cyclopts", None)
    assert cli.main() == 2
    assert capsys.readouterr().err == (
        "leasekit: the command line needs cyclopts: pip install 'leasekit[cli]'\n"
    )
