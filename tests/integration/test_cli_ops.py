"""The operators' commands: what they show, what they change, what they refuse, how they go on."""

from __future__ import annotations

import asyncio
import io
import json
import shlex
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from servers import Server, ServerProcess, dump

import leasekit
from leasekit.cli import app, changing, checkup, looking, operating
from leasekit.connect import ServerInfo

SECRET = "payload-of-somebody"
Run = Callable[..., SimpleNamespace]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one command line; gives code, out, err and, with --json, the document."""
    for name in ("LEASEKIT_URL", "LEASEKIT_TENANT", "LEASEKIT_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(checkup, "DRIFT_SECONDS", 0.001)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # no terminal: nobody can answer

    def run_one(*words: str) -> SimpleNamespace:
        capsys.readouterr()
        code = app.run(words)
        out, err = capsys.readouterr()
        document = json.loads(out) if "--json" in words and out and "\n{" not in out else None
        return SimpleNamespace(code=code, out=out, err=err, document=document)

    return run_one


@pytest.fixture
def shop(server: Server, tenant_name: str) -> SimpleNamespace:
    """A tenant with six dead letters, four pending rows, a held and a parked one, leases and keys."""
    prefix = f"ops-{tenant_name}"
    made = SimpleNamespace(
        server=server,
        prefix=prefix,
        tag=f"{tenant_name}.prod",
        tenant=f"{tenant_name}/prod",
        where=["--url", server.url, "--prefix", prefix],
        options=["--url", server.url, "--prefix", prefix, "--tenant", f"{tenant_name}/prod"],
    )

    async def populate() -> None:
        async with leasekit.connect(server.url, prefix=prefix) as kit:
            tenant = kit.tenant(tenant_name, "prod")
            outbox = tenant.outbox
            for i in range(6):
                await outbox.enqueue("hooks", "old", {"n": i, "secret": SECRET})
            claims = await outbox.claim("hooks", "old", limit=6, consumer="worker-1")
            for i, claim in enumerate(claims):
                await claim.nack(error="HTTP 410 gone" if i < 4 else "timeout", permanent=True)
            made.dead = [claim.row.id for claim in claims]
            made.pending = [
                (await outbox.enqueue("hooks", "new", {"n": i})).row.id for i in range(4)
            ]
            made.held = (await outbox.enqueue("jobs", "a", {}, max_attempts=3)).row.id
            [held] = await outbox.claim("jobs", "a", consumer="worker-2")
            made.parking = (await outbox.enqueue("pay", "bank", {}, on_expiry="park")).row.id
            [paying] = await outbox.claim("pay", "bank", consumer="worker-3")
            made.sent = (await outbox.enqueue("jobs", "b", {})).row.id
            [sent] = await outbox.claim("jobs", "b", consumer="worker-2")
            await sent.ack()
            lease = (await tenant.leases.acquire("nightly", ttl_ms=60_000, owner="cron-1")).lease
            assert lease is not None
            keys = tenant.idempotency
            done = await keys.reserve("charge", "order-1", owner="api", fingerprint="f1")
            assert done.token is not None
            await keys.complete("charge", "order-1", {"secret": SECRET}, token=done.token)
            open_ = await keys.reserve(
                "charge", "order-2", owner="api", fingerprint="f2", lease_ms=60_000
            )
            made.tokens = [held.token, paying.token, lease.token, done.token, open_.token]

    asyncio.run(populate())
    return made


def everything(shop: SimpleNamespace) -> list[dict[str, Any]]:
    return [dump(shop.server.raw, shop.prefix, tag) for tag in (shop.tag, "tenants")]


def statuses(run: Run, shop: SimpleNamespace) -> dict[str, str]:
    items = run("rows", *shop.options, "--limit", "1000", "--json").document["items"]
    return {row["id"]: row["status"] for row in items}


# --- looking --------------------------------------------------------------------------------------


def test_tenants_are_listed_with_when_they_were_seen(run: Run, shop: SimpleNamespace) -> None:
    """Each tenant of the registry is a line with its last use and its clock."""
    found = run("tenants", *shop.where, "--json").document
    [one] = found["items"]
    assert (one["tenant"], one["clock"]) == (shop.tenant, "server")
    assert 0 <= found["now_ms"] - one["last_seen_at_ms"] < 60_000
    assert shop.tenant in run("tenants", *shop.where).out


def test_lanes_tell_depth_and_age(run: Run, shop: SimpleNamespace) -> None:
    """Each lane with what waits, is held, unknown and dead, and since when its oldest row is due."""
    found = run("lanes", *shop.options, "--json").document
    lanes = {(one["lane"], one["target"]): one for one in found["items"]}
    assert list(lanes) == [
        ("hooks", "new"), ("hooks", "old"), ("jobs", "a"), ("jobs", "b"), ("pay", "bank"),
    ]  # fmt: skip
    new, old = lanes["hooks", "new"], lanes["hooks", "old"]
    assert (new["depth"], new["in_flight"], new["dead_lettered"]) == (4, 0, 0)
    assert new["oldest_due_at_ms"] <= found["now_ms"]
    assert (old["depth"], old["dead_lettered"], old["oldest_due_at_ms"]) == (0, 6, None)
    assert lanes["jobs", "a"]["in_flight"] == 1
    assert "oldest due" in run("lanes", *shop.options).out


def test_lanes_page_by_name(run: Run, shop: SimpleNamespace) -> None:
    """The command printed below a page shows the next one, until all lanes were shown."""
    names: list[str] = []
    out = run("lanes", *shop.options, "--limit", "2").out
    while True:
        *lines, last = out.splitlines()[1:]
        more = last.startswith("more: ")
        names += [" ".join(line.split()[:2]) for line in (lines if more else [*lines, last])]
        if not more:
            break
        out = run(*shlex.split(last.removeprefix("more: "))[1:]).out
    assert names == ["hooks new", "hooks old", "jobs a", "jobs b", "pay bank"]


def test_explain_says_why_a_row_cannot_be_claimed(run: Run, shop: SimpleNamespace) -> None:
    """Due with rows before it; held, by whom and what follows; dead, and what to do; finished."""

    def why(id: str) -> tuple[bool, str]:
        found = run("explain", id, *shop.options, "--json").document
        return found["claimable"], " / ".join(found["why"])

    assert why(shop.pending[0])[0] is True
    assert why(shop.pending[2])[0] is True
    assert "2 rows stand before it" in why(shop.pending[2])[1]
    is_claimable, reasons = why(shop.held)
    assert not is_claimable
    assert "worker-2 holds it for another" in reasons
    assert "may be claimed by others" in reasons
    assert "becomes unknown" in why(shop.parking)[1]
    assert f"leasekit redrive {shop.dead[0]}" in why(shop.dead[0])[1]
    assert why(shop.sent) == (False, "it is sent: there is nothing left to do")
    text = run("explain", shop.held, *shop.options).out
    assert text.startswith("no, it cannot be had now:\n  worker-2 holds it")


def test_explain_says_when_a_row_will_be_due(run: Run, shop: SimpleNamespace) -> None:
    """A row that is not due yet says in how long; one that stands in no line says damage."""

    async def enqueue() -> str:
        async with leasekit.connect(shop.server.url, prefix=shop.prefix) as kit:
            tenant = kit.tenant(shop.tag.partition(".")[0], "prod")
            at_ms = await kit.now_ms() + 3_600_000
            return (await tenant.outbox.enqueue("a", "b", 1, available_at_ms=at_ms)).row.id

    found = run("explain", asyncio.run(enqueue()), *shop.options, "--json").document
    assert not found["claimable"]
    assert "it was enqueued for in 59 min" in found["why"][0]
    shop.server.raw.zrem(f"{shop.prefix}:{{{shop.tag}}}:outbox:due:hooks:new", shop.pending[3])
    found = run("explain", shop.pending[3], *shop.options, "--json").document
    assert "damage" in found["why"][0]


def test_explain_knows_leases_and_keys(run: Run, shop: SimpleNamespace) -> None:
    """A name or key is free, or held by somebody for a time, or settled."""
    lease = run("explain", "lease", "nightly", *shop.options, "--json").document
    assert not lease["acquirable"]
    assert lease["why"][0].startswith("cron-1 holds it for another")
    assert run("explain", "lease", "free", *shop.options, "--json").document["acquirable"]
    keys = {
        key: run("explain", "key", "charge", key, *shop.options, "--json").document
        for key in ("order-1", "order-2", "order-3")
    }
    assert [keys[key]["reservable"] for key in keys] == [False, False, True]
    assert "complete" in keys["order-1"]["why"][0]
    assert "may run for another" in keys["order-2"]["why"][0]


def test_tail_shows_what_is_in_line(run: Run, shop: SimpleNamespace) -> None:
    """It begins with the rows in line, one line each, and ends after --count."""
    found = run("tail", "hooks", "new", *shop.options, "--count", "4")
    assert found.code == 0, found.err
    assert [line.split()[3] for line in found.out.splitlines()] == shop.pending
    lines = run("tail", "hooks", "new", *shop.options, "--count", "2", "--json").out.splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["pending", "pending"]


async def test_tail_follows_what_happens(server: Server, tenant_name: str) -> None:
    """Enqueued, claimed, requeued, claimed again, sent: each change is one line, and no other is."""
    async with leasekit.connect(server.url) as kit:
        tenant = kit.tenant(tenant_name, "w")
        first = (await tenant.outbox.enqueue("l", "t", 1)).row.id
        await tenant.outbox.enqueue("l", "other", 1)
        events = looking.tail(kit, tenant, "l", "t", every_ms=1)
        seen = [await anext(events)]
        [claim] = await tenant.outbox.claim("l", "t", consumer="c")
        seen.append(await anext(events))
        await claim.nack(error="later")
        seen.append(await anext(events))
        [claim] = await tenant.outbox.claim("l", "t", consumer="c")
        seen.append(await anext(events))
        await claim.ack()
        seen.append(await anext(events))
        second = (await tenant.outbox.enqueue("l", "t", 2)).row.id
        seen.append(await anext(events))
        await events.aclose()
    told = [(event["id"], event["status"], event["cause"]) for event in seen]
    assert told == [
        (first, "pending", "enqueued"),
        (first, "claimed", "claimed"),
        (first, "pending", "requeued"),
        (first, "claimed", "claimed"),
        (first, "sent", "acked"),
        (second, "pending", "enqueued"),
    ]


def test_looking_writes_nothing_and_hides_secrets(run: Run, shop: SimpleNamespace) -> None:
    """No command that only looks changes anything; none shows a token or a payload."""
    if shop.server.kind != "memory":
        shop.server.raw.config_resetstat()  # other tests' refused arguments are no finding here
    before = everything(shop)
    for command in (
        ["tenants"], ["lanes"], ["explain", shop.held], ["explain", shop.dead[0]],
        ["explain", "lease", "nightly"], ["explain", "key", "charge", "order-2"],
        ["tail", "hooks", "new", "--count", "1"], ["doctor"], ["doctor", "--deep"],
        ["redrive", "--dry-run"], ["cancel", "--lane", "hooks", "--dry-run"],
        ["purge", "dead", "--older-than", "0s", "--dry-run"],
        ["purge", "finished", "--older-than", "0s", "--dry-run"],
        ["purge", "keys", "--older-than", "0s", "--dry-run"],
        ["release", "row", shop.held, "--reason", "r", "--dry-run"],
        ["release", "lease", "nightly", "--reason", "r", "--dry-run"],
        ["release", "key", "charge", "order-2", "--reason", "r", "--dry-run"],
    ):  # fmt: skip
        for form in ([], ["--json"]):
            options = shop.where if command == ["tenants"] else shop.options
            found = run(*command, *options, *form)
            assert found.code == 0, (command, found.err, found.out)
            assert not any(secret in found.out for secret in (SECRET, *shop.tokens))
    assert everything(shop) == before


# --- changing -------------------------------------------------------------------------------------


def test_redrive_lets_one_row_wait_again(run: Run, shop: SimpleNamespace) -> None:
    """One dead letter by its id is pending again; the others stay."""
    found = run("redrive", shop.dead[0], *shop.options, "--yes")
    assert (found.code, found.out) == (0, "redriven 1\n")
    after = statuses(run, shop)
    assert [after[id] for id in shop.dead] == ["pending"] + 5 * ["dead_lettered"]


def test_redrive_takes_what_the_filter_takes(run: Run, shop: SimpleNamespace) -> None:
    """Lane, target, cause, error and age choose; what they leave stays dead."""

    def would(*words: str) -> int:
        found = run("redrive", *shop.options, *words, "--dry-run", "--json").document
        return found["outcomes"].get("would_change", 0)

    assert would() == 6
    assert would("--lane", "hooks", "--target", "old") == 6
    assert would("--lane", "jobs") == 0
    assert would("--error", "410") == 4
    assert would("--cause", "permanent") == 6
    assert would("--cause", "expired") == 0
    assert would("--older-than", "1h") == 0
    found = run("redrive", *shop.options, "--error", "410", "--yes", "--json").document
    assert found["outcomes"] == {"redriven": 4}
    after = statuses(run, shop)
    assert [after[id] for id in shop.dead] == 4 * ["pending"] + 2 * ["dead_lettered"]


def test_redrive_goes_on_where_it_stopped(run: Run, shop: SimpleNamespace) -> None:
    """--limit bounds a run; the command that it prints goes on, until nothing is dead."""
    out = run("redrive", *shop.options, "--limit", "2", "--yes").out
    runs = 1
    while "more: " in out:
        assert out.startswith("redriven 2\n")
        out = run(*shlex.split(out.splitlines()[-1].removeprefix("more: "))[1:]).out
        runs += 1
    assert runs in (3, 4)
    assert "dead_lettered" not in statuses(run, shop).values()


async def test_long_changes_tell_how_far_they_are(server: Server, tenant_name: str) -> None:
    """After each page: how many were looked at or deleted, of how many."""
    async with leasekit.connect(server.url) as kit:
        tenant = kit.tenant(tenant_name, "w")
        drafts = [leasekit.Draft(lane="l", target="t", payload=i) for i in range(300)]
        await tenant.outbox.enqueue_many(drafts)
        told: list[tuple[int, int | None]] = []
        document = await changing.cancel(
            kit, tenant, id=None, wanted=changing.Filter(lane="l"), limit=1_000, cursor=None,
            dry_run=False, progress=lambda done, total: told.append((done, total)),
        )  # fmt: skip
        assert document["outcomes"] == {"cancelled": 300}
        assert told == [(250, 300), (300, 300)]
        told.clear()
        await changing.purge(
            kit, tenant, "finished", older_than_ms=0, unfinished=False, limit=260,
            dry_run=False, progress=lambda done, total: told.append((done, total)),
        )  # fmt: skip
        assert told == [(250, 260), (260, 260)]


def test_a_filter_that_takes_few_is_bounded_too(run: Run, shop: SimpleNamespace) -> None:
    """--limit counts what is changed, not what is looked at; the cursor stands behind the last."""
    words = ("redrive", *shop.options, "--error", "timeout", "--limit", "1", "--yes", "--json")
    first = run(*words).document
    assert (first["outcomes"], first["first_ids"]) == ({"redriven": 1}, [shop.dead[4]])
    second = run(*words, "--cursor", first["next_cursor"]).document
    assert (second["outcomes"], second["first_ids"]) == ({"redriven": 1}, [shop.dead[5]])


async def test_redrive_leaves_what_died_anew(
    server: Server, tenant_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that was redriven and died again after it was listed stays dead: it was not meant."""
    async with leasekit.connect(server.url) as kit:
        tenant = kit.tenant(tenant_name, "w")
        outbox = tenant.outbox
        id = (await outbox.enqueue("l", "t", 1)).row.id

        async def die() -> None:
            [claim] = await outbox.claim("l", "t", consumer="c")
            await claim.nack(error="no", permanent=True)

        await die()
        list_page = changing._page

        async def list_and_let_die(*arguments: Any) -> Any:
            page = await list_page(*arguments)
            await outbox.redrive(id)
            await die()
            return page

        monkeypatch.setattr(changing, "_page", list_and_let_die)
        document = await changing.redrive(
            kit, tenant, id=None, wanted=changing.Filter(), limit=9, cursor=None, dry_run=False,
            progress=lambda done, total: None,
        )  # fmt: skip
        assert document["outcomes"] == {"not_dead": 1}
        row = await outbox.get(id)
        assert row is not None
        assert row.status == "dead_lettered"


def test_a_user_without_rights_is_told_so(
    run: Run, private_server: Callable[..., ServerProcess]
) -> None:
    """What the ACL forbids is one line and exit code 4; doctor names the commands."""
    server = private_server()
    server.raw.execute_command(
        *[
            "ACL",
            "SETUSER",
            "ops",
            "on",
            ">pw",
            "~*",
            "&*",
            "+@all",
            "-scan",
            "-hscan",
            "-zscan",
            "-client|kill",
        ]
    )
    url = server.url.replace("unix://", "unix://ops:pw@")
    found = run("doctor", "--deep", "--url", url)
    assert (found.code, found.out, found.err.count("\n")) == (4, "", 1), found.err
    assert "refuses this user (NOPERM)" in found.err
    shallow = run("doctor", "--url", url)
    assert shallow.code == 1
    assert "fail  rights: this user may not: client" in shallow.out


def test_cancel_takes_pending_rows_out(run: Run, shop: SimpleNamespace) -> None:
    """One by id, then the rest of a lane; what is held stays."""
    assert run("cancel", shop.pending[1], *shop.options, "--yes").out == "cancelled 1\n"
    found = run("cancel", "--lane", "hooks", *shop.options, "--yes", "--json").document
    assert found["outcomes"] == {"cancelled": 3}
    after = statuses(run, shop)
    assert {after[id] for id in shop.pending} == {"cancelled"}
    assert after[shop.held] == "claimed"


def test_purge_deletes_what_is_old_enough(run: Run, shop: SimpleNamespace) -> None:
    """Dead letters, finished rows and keys, by age and at most --limit; reservations stay."""
    assert run("purge", "dead", "--older-than", "1h", *shop.options, "--yes").out == (
        "deleted 0, 0 left\n"
    )
    words = ("purge", "dead", "--older-than", "0s", *shop.options)
    dry = run(*words, "--dry-run", "--json").document
    assert (dry["deleted"], dry["left"]) == (0, 6)
    found = run(*words, "--yes", "--limit", "4")
    assert found.out.startswith(
        "deleted 4, 2 left\nmore: leasekit purge dead --older-than 0s --limit 4"
    )
    again = run(*shlex.split(found.out.splitlines()[1].removeprefix("more: "))[1:])
    assert again.out == "deleted 2, 0 left\n"
    done = run("purge", "finished", "--older-than", "0s", *shop.options, "--yes", "--json")
    assert done.document["deleted"] == 1
    assert set(statuses(run, shop)) == {*shop.pending, shop.held, shop.parking}
    keys = run("purge", "keys", "--older-than", "0s", *shop.options, "--yes", "--json").document
    assert keys["deleted"] == 1
    left = run("keys", *shop.options, "--json").document["items"]
    assert [one["key"] for one in left] == ["order-2"]


def test_release_takes_a_row_and_keeps_the_reason(run: Run, shop: SimpleNamespace) -> None:
    """The row waits again, its errors say who took it and why, and its holder is told lost_claim."""
    words = ("release", "row", shop.held, "--reason", "host is gone", "--actor", "ann")
    found = run(*words, *shop.options, "--yes")
    assert found.out == "requeued: it was held by worker-2; the reason is kept with it\n"
    row = run("show", "row", shop.held, *shop.options, "--json").document
    assert row["status"] == "pending"
    assert row["last_error"] == "taken from its holder by ann: host is gone"

    async def late_ack() -> str:
        async with leasekit.connect(shop.server.url, prefix=shop.prefix) as kit:
            tenant = kit.tenant(shop.tag.partition(".")[0], "prod")
            return await tenant.outbox.ack(shop.held, shop.tokens[0])

    assert asyncio.run(late_ack()) == "lost_claim"
    assert run(*words, *shop.options, "--yes").code == 3


def test_release_frees_a_lease_and_a_key(run: Run, shop: SimpleNamespace) -> None:
    """The next one can have them; a completed key stays."""
    lease = run("release", "lease", "nightly", "--reason", "r", *shop.options, "--yes", "--json")
    assert lease.document["outcome"] == "released"
    assert lease.document["reason_recorded"] is False
    assert run("show", "lease", "nightly", *shop.options).code == 3
    words = ("release", "key", "charge", "order-2", "--reason", "r", *shop.options, "--yes")
    assert run(*words).out == "released: it was held by api\n"
    kept = run("release", "key", "charge", "order-1", "--reason", "r", *shop.options, "--yes")
    assert kept.code == 3
    assert "stays; nothing was changed" in kept.err


def test_a_damaged_row_is_one_line(run: Run, shop: SimpleNamespace) -> None:
    """Commands that meet damage say so, and that doctor says more; exit code 1."""
    key = f"{shop.prefix}:{{{shop.tag}}}:outbox:state"
    shop.server.raw.hset(key, shop.dead[0], "dead_lettered nonsense")
    for words in (["explain", shop.dead[0]], ["rows"]):
        found = run(*words, *shop.options)
        assert (found.code, found.out, found.err.count("\n")) == (1, "", 1), found.err
        assert "leasekit doctor" in found.err


def test_what_changes_wants_a_yes_and_a_reason(run: Run, shop: SimpleNamespace) -> None:
    """Without --yes where nobody can be asked, without a reason, with nonsense: exit code 2."""
    before = everything(shop)
    for words in (
        ["redrive"],
        ["redrive", shop.dead[0]],
        ["redrive", shop.dead[0], "--lane", "hooks", "--yes"],
        ["redrive", "--cause", "bad luck", "--yes"],
        ["redrive", "--target", "old", "--yes"],
        ["redrive", "--older-than", "yesterday", "--yes"],
        ["redrive", "--limit", "0", "--yes"],
        ["cancel", "--yes"],
        ["purge", "dead", "--yes"],
        ["purge", "all", "--older-than", "1h", "--yes"],
        ["purge", "dead", "--older-than", "0s"],
        ["release", "row", shop.held, "--yes"],
        ["release", "row", shop.held, "--reason", " ", "--yes"],
        ["release", "row", shop.parking, "--reason", "r", "--yes"],
        ["release", "lease", "nightly", "--reason", "r"],
        ["tail", "hooks", "new", "--every", "1ms"],
        ["tail", "hooks", "new", "--count", "0"],
    ):
        found = run(*words, *shop.options)
        assert (found.code, found.out, found.err.count("\n")) == (2, "", 1), (words, found.err)
    assert everything(shop) == before


def test_a_person_is_asked(
    run: Run, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal the question names what is done, and only yes does it."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer, code in (("\n", 2), ("no\n", 2), ("y\n", 0)):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        found = run("redrive", shop.dead[0], *shop.options)
        assert found.code == code
        assert f"redrive row {shop.dead[0]} of tenant {shop.tenant}? [y/N]" in found.err


def test_what_is_not_there_ends_with_3(run: Run, shop: SimpleNamespace) -> None:
    """An unknown row, lease, key, lane or tenant, and a row in another state, are one line each."""
    never = leasekit.new_id()
    strange = [*shop.where, "--tenant", "never/seen"]
    for words in (
        ["explain", never, *shop.options],
        ["explain", never, *strange],
        ["explain", "lease", "x", *strange],
        ["explain", "key", "o", "k", *strange],
        ["lanes", *strange],
        ["tail", "no", "lane", *shop.options],
        ["redrive", never, "--yes", *shop.options],
        ["redrive", shop.pending[0], "--yes", *shop.options],
        ["redrive", "--yes", *strange],
        ["cancel", shop.held, "--yes", *shop.options],
        ["purge", "dead", "--older-than", "0s", "--yes", *strange],
        ["release", "row", shop.pending[0], "--reason", "r", "--yes", *shop.options],
        ["release", "row", never, "--reason", "r", "--yes", *shop.options],
        ["release", "lease", "x", "--reason", "r", "--yes", *shop.options],
        ["release", "key", "o", "k", "--reason", "r", "--yes", *shop.options],
        ["doctor", "--deep", *strange],
    ):
        found = run(*words)
        assert (found.code, found.out, found.err.count("\n")) == (3, "", 1), (words, found.err)


def test_an_unreachable_server_ends_with_4(run: Run) -> None:
    """One line without the password, whatever the command."""
    url = ("--url", "redis://u:swordfish@localhost:1", "--tenant", "a/b")
    for words in (["doctor"], ["lanes"], ["tenants"], ["redrive", "--yes"], ["tail", "a", "b"]):
        found = run(*words, *(url[:2] if words == ["tenants"] else url))
        assert (found.code, found.out, found.err.count("\n")) == (4, "", 1), found.err
        assert "swordfish" not in found.err


def test_the_next_command_repeats_no_password() -> None:
    """A URL with a password is left out of what is printed."""
    common = app.Common(url="redis://u:swordfish@h", tenant="a/b")
    line = operating._going_on(common, ["redrive"], operating.Change(yes=True), "ff")
    assert line == "leasekit redrive --tenant a/b --cursor ff --yes (and the same --url)"


# --- doctor: the server ---------------------------------------------------------------------------


def test_doctor_finds_a_healthy_server_healthy(run: Run, shop: SimpleNamespace) -> None:
    """No check fails, and each is one line that begins with its level."""
    shop.server.raw.config_resetstat() if shop.server.kind != "memory" else None
    found = run("doctor", *shop.options)
    assert found.code == 0, found.out
    levels = [line.split()[0] for line in found.out.splitlines()]
    assert set(levels) <= {"ok", "warn"}
    document = run("doctor", *shop.where, "--deep", "--json").document
    assert document["healthy"] is True
    names = [check["name"] for check in document["checks"]]
    for name in ("server", "persistence", "memory", "clock", "scripts", "errors", "registry"):
        assert name in names
    assert f"data of {shop.tenant}" in names


def test_doctor_fails_on_a_server_that_evicts(
    run: Run, private_server: Callable[..., ServerProcess]
) -> None:
    """Where no other command goes on, doctor says what is wrong, and exits with 1."""
    server = private_server(maxmemory_policy="allkeys-lru")
    found = run("doctor", "--url", server.url)
    assert found.code == 1
    assert "fail  eviction: policy allkeys-lru -> CONFIG SET maxmemory-policy" in found.out
    assert found.err == ""


def test_doctor_counts_errors_of_scripts(
    run: Run, private_server: Callable[..., ServerProcess]
) -> None:
    """An LK_ error in the server's statistics is a bug or damage, and fails."""
    server = private_server()

    async def provoke() -> None:
        async with leasekit.connect(server.url) as kit:
            claim = leasekit.scripts.read_scripts()["lease/get"]
            await kit.backend.ask("EVALSHA", claim.sha(shebang=True), 1, "lk:{a.b}:x", "not a time")

    asyncio.run(provoke())
    found = run("doctor", "--url", server.url)
    assert found.code == 1
    assert "fail  errors: LK_ARGUMENT 1" in found.out


def test_doctor_finds_registry_and_data_apart(run: Run, shop: SimpleNamespace) -> None:
    """Data without a registry entry fails, an entry without data warns."""
    raw, tenants = shop.server.raw, f"{shop.prefix}:{{tenants}}:tenant:names"
    raw.zadd(tenants, {"ghost.w": 0})
    raw.zrem(tenants, shop.tag)
    found = run("doctor", *shop.where, "--deep", "--json")
    assert found.code == 1
    checks = [one for one in found.document["checks"] if one["name"] == "registry"]
    assert [(one["level"], one["what"].split(": ")[1]) for one in checks] == [
        ("warn", "ghost/w"),
        ("fail", shop.tenant),
    ]


def test_each_check_knows_good_from_bad() -> None:
    """Version, eviction, persistence, replication, memory, clock, scripts, errors and rights."""
    old = ServerInfo("redis", (6, 2, 0), False, "none", "redis://h")
    new = ServerInfo("valkey", (9, 1, 0), True, "aof:always", "redis://h")
    gib = str(2**30)
    for check, level in (
        (checkup.check_version(old), "warn"),
        (checkup.check_version(new), "ok"),
        (checkup.check_eviction({"maxmemory_policy": "noeviction"}), "ok"),
        (checkup.check_eviction({"maxmemory_policy": "volatile-lru"}), "fail"),
        (
            checkup.check_eviction({"maxmemory_policy": "noeviction", "evicted_keys": "3"}),
            "fail",
        ),
        (checkup.check_persistence("aof:always", {}), "ok"),
        (checkup.check_persistence("aof:everysec", {}), "warn"),
        (checkup.check_persistence("none", {}), "warn"),
        (checkup.check_persistence("aof:always", {"aof_last_write_status": "err"}), "fail"),
        (checkup.check_replication({"role": "master", "connected_slaves": "0"}), "ok"),
        (checkup.check_replication({"connected_slaves": "1", "slave0": "state=online"}), "ok"),
        (
            checkup.check_replication({"connected_slaves": "1", "slave0": "state=wait_bgsave"}),
            "warn",
        ),
        (checkup.check_replication({"role": "slave"}), "fail"),
        (checkup.check_memory({"used_memory": "1000", "maxmemory": gib}), "ok"),
        (checkup.check_memory({"used_memory": str(2**30 * 85 // 100), "maxmemory": gib}), "warn"),
        (checkup.check_memory({"used_memory": gib, "maxmemory": gib}), "fail"),
        (checkup.check_clock(3, 1), "ok"),
        (checkup.check_clock(-5_000, 0), "warn"),
        (checkup.check_clock(0, 200), "warn"),
        (checkup.check_scripts({"a/b": True}), "ok"),
        (checkup.check_scripts({"a/b": True, "a/c": False}), "fail"),
        (checkup.check_errors({"errorstat_ERR": "count=4"}), "ok"),
        (checkup.check_errors({"errorstat_OOM": "count=4"}), "warn"),
        (checkup.check_errors({"errorstat_LK_CORRUPT": "count=1"}), "fail"),
        (checkup.check_rights(None), "ok"),
        (checkup.check_rights([]), "ok"),
        (checkup.check_rights(["evalsha"]), "fail"),
    ):
        assert check.level == level, check
        assert bool(check.advice) == (level != "ok"), check
