"""The gate's commands: what nobody knows, what is decided about it, lost data, and the doctor."""

from __future__ import annotations

import asyncio
import getpass
import io
import json
import shlex
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from servers import Server, dump

import leasekit
from leasekit import Tenant, Unavailable
from leasekit.cli import app, checkup, intents, tables
from leasekit.codec import new_token
from leasekit.gate import Intent, IntentStatus, LedgerEvent, PreSendEvent, Source, undecidable
from leasekit.keys import Keys

SECRET = "result-of-somebody"
TOOL = "mcp.github.create_issue"
DAY_MS = 86_400_000
Run = Callable[..., SimpleNamespace]


def event(key: str, run: str = "run-1") -> PreSendEvent:
    return PreSendEvent(
        dispatch_id=key,
        tool=TOOL,
        source=Source(kind="agent", run_id=run),
        args={"repo": "acme/site", "title": key},
        external_side_effect=True,
    )


def word(key: str, status: str, error: str | None = None) -> LedgerEvent:
    return LedgerEvent(
        dispatch_id=key,
        tool=TOOL,
        source=Source(kind="agent"),
        policy_outcome="allowed",
        status=status,
        error=error,
    )


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
        document = json.loads(out) if "--json" in words and out else None
        return SimpleNamespace(code=code, out=out, err=err, document=document)

    return run_one


@pytest.fixture
def shop(server: Server, tenant_name: str) -> SimpleNamespace:
    """A tenant with an intent in each state and two parked rows; a second one with one unknown."""
    prefix = f"gate-{tenant_name}"
    made = SimpleNamespace(
        server=server,
        raw=server.raw,
        prefix=prefix,
        name=tenant_name,
        tag=f"{tenant_name}.prod",
        tenant=f"{tenant_name}/prod",
        other=f"{tenant_name}/test",
        keys=Keys(prefix, f"{tenant_name}.prod"),
        where=["--url", server.url, "--prefix", prefix],
        options=["--url", server.url, "--prefix", prefix, "--tenant", f"{tenant_name}/prod"],
    )

    async def populate() -> None:
        async with leasekit.connect(server.url, prefix=prefix) as kit:
            tenant, other = kit.tenant(tenant_name, "prod"), kit.tenant(tenant_name, "test")
            gate, outbox = tenant.gate, tenant.outbox
            ids: dict[str, str] = {}
            ids["buried"] = await parked(made, tenant, "buried")

            async def no_idea(_: Any) -> Any:
                return undecidable("HTTP 503")

            await gate.reconcile({"*": no_idea}, settle_ms=0, asks_max=1, backoff_ms=(0, 0))
            for key, status in (("sent", "succeeded"), ("failed", "failed"), ("off", "blocked")):
                receipt = await gate.prepare(event(key))
                assert receipt is not None
                result = {"secret": SECRET} if key == "sent" else None
                await gate.complete(word(key, status), receipt=receipt, result=result)
                ids[key] = receipt.outbox_id
            for key, on_expiry in (("held", "reclaim"), ("parking", "park")):
                receipt = await gate.prepare(event(key, "run-2"), on_expiry=on_expiry)
                assert receipt is not None
                ids[key] = receipt.outbox_id
            for key in ("lost-1", "lost-2", "lost-3"):
                ids[key.replace("-", "")] = await parked(made, tenant, key)
            await gate.unknown(limit=1)  # writes down that they are unknown
            ids["ended"] = await parked(made, tenant, "ended")
            made.ids = SimpleNamespace(**ids)
            made.rows = []
            for i in range(2):
                draft = await outbox.enqueue("pay", f"bank-{i}", {}, on_expiry="park")
                await outbox.claim("pay", f"bank-{i}", lease_ms=0, consumer="teller")
                made.rows.append(draft.row.id)
            await outbox.claim("pay", "bank-0", consumer="teller")  # writes that it is unknown
            made.known = (await outbox.enqueue("jobs", "a", {"secret": SECRET})).row.id
            made.elsewhere = await parked(made, other, "lost-9")
            made.tokens = [
                line.decode().split(" ")[2] for line in made.raw.hvals(made.keys.gate_state)
            ]

    asyncio.run(populate())
    return made


async def parked(made: SimpleNamespace, tenant: Tenant, key: str) -> str:
    """An intent that parks, and whose lease ended as it began; nobody has written that down."""
    receipt = await tenant.gate.prepare(event(key), on_expiry="park", owner="worker-1")
    assert receipt is not None
    keys = Keys(made.prefix, tenant.tag)
    change_state(made, keys, receipt.outbox_id, lease_end=receipt.granted_at_ms)
    made.raw.zadd(keys.gate_expiring, {receipt.outbox_id: receipt.granted_at_ms})
    return receipt.outbox_id


def change_state(made: SimpleNamespace, keys: Keys, id: str, **changes: int) -> None:
    """Change the lease's end or the revision in an intent's state line, and nothing else."""
    words = made.raw.hget(keys.gate_state, id).decode().split(" ", 19)
    for name, value in changes.items():
        words[{"lease_end": 3, "revision": 6}[name]] = str(value)
    made.raw.hset(keys.gate_state, id, " ".join(words))


def everything(shop: SimpleNamespace) -> dict[str, Any]:
    return dump(shop.raw, shop.prefix, shop.tag)


def shown(run: Run, shop: SimpleNamespace, id: str) -> dict[str, Any]:
    found = run("show", id, *shop.options, "--json")
    assert found.code == 0, found.err
    return dict(found.document)


def in_tenant(shop: SimpleNamespace, work: Callable[[Tenant], Any]) -> Any:
    async def do() -> Any:
        async with leasekit.connect(shop.server.url, prefix=shop.prefix) as kit:
            return await work(kit.tenant(shop.name, "prod"))

    return asyncio.run(do())


# --- what nobody knows ----------------------------------------------------------------------------


def test_unknown_lists_intents_and_parked_rows(run: Run, shop: SimpleNamespace) -> None:
    """Of a tenant: what it is, whose it was, since when, how often asked, under which fence."""
    found = run("unknown", *shop.options, "--json").document
    of_intents = [one for one in found["items"] if one["kind"] == "intent"]
    assert {one["id"] for one in of_intents} == {
        shop.ids.lost1, shop.ids.lost2, shop.ids.lost3, shop.ids.ended,
    }  # fmt: skip
    [first] = [one for one in of_intents if one["id"] == shop.ids.lost1]
    assert (first["tool"], first["operation"], first["target"]) == (TOOL, TOOL, "acme/site")
    assert (first["idempotency_key"], first["owner"]) == ("lost-1", "worker-1")
    assert (first["run_id"], first["asks"]) == ("run-1", 0)
    assert first["fence"] > 0
    assert first["ask_at_ms"] == first["unknown_since_ms"] <= found["now_ms"]
    rows = [one for one in found["items"] if one["kind"] == "row"]
    assert {one["id"] for one in rows} == set(shop.rows)
    [row] = [one for one in rows if one["id"] == shop.rows[0]]
    assert (row["lane"], row["target"]) == ("pay", "bank-0")
    assert (row["owner"], row["tenant"]) == ("teller", shop.tenant)
    out = run("unknown", *shop.options).out
    assert all(text in out for text in (shop.ids.lost1, "lost-1", "worker-1", "run-1", "bank-0"))


def test_unknown_of_all_tenants_pages_to_the_end(run: Run, shop: SimpleNamespace) -> None:
    """The command below each page shows the next one: intents, then rows, tenant by tenant."""
    found = run("unknown", *shop.where, "--limit", "2")
    lines: list[str] = []
    while found.out.splitlines()[-1].startswith("more: "):
        *shown_lines, more = found.out.splitlines()
        assert len(shown_lines) == 3
        lines += shown_lines[1:]
        found = run(*shlex.split(more.removeprefix("more: "))[1:])
    lines += found.out.splitlines()[1:]
    ids = [line.split()[0] for line in lines]
    lost = {shop.ids.lost1, shop.ids.lost2, shop.ids.lost3, shop.ids.ended}
    assert set(ids[:4]) == lost
    assert set(ids[4:6]) == set(shop.rows)
    assert ids[6:] == [shop.elsewhere]
    assert [line.split()[1] for line in lines] == [shop.tenant] * 6 + [shop.other]


@pytest.mark.parametrize("limit", ["1", "6", "7", "8"])
def test_a_full_page_goes_on_only_where_there_is_more(
    run: Run, shop: SimpleNamespace, limit: str
) -> None:
    """No page is empty, also where a page ends with a tenant, or with all."""
    found = run("unknown", *shop.where, "--limit", limit, "--json").document
    count = len(found["items"])
    while found["next_cursor"]:
        words = ["--limit", limit, "--cursor", found["next_cursor"]]
        found = run("unknown", *shop.where, *words, "--json").document
        assert found["items"]
        count += len(found["items"])
    assert count == 7


def test_a_parked_row_is_found_before_anybody_notes_it(
    run: Run, server: Server, tenant_name: str
) -> None:
    """Of all tenants, also one that has nothing else that is unknown."""

    async def populate() -> str:
        async with leasekit.connect(server.url, prefix=f"p-{tenant_name}") as kit:
            outbox = kit.tenant(tenant_name, "prod").outbox
            row = (await outbox.enqueue("pay", "bank", {}, on_expiry="park")).row
            await outbox.claim("pay", "bank", lease_ms=0, consumer="teller")
            return row.id

    id = asyncio.run(populate())
    found = run("unknown", "--url", server.url, "--prefix", f"p-{tenant_name}", "--json").document
    assert [one["id"] for one in found["items"]] == [id]


def test_nothing_unknown_is_said(run: Run, server: Server, tenant_name: str) -> None:
    """An empty answer is no empty table; a tenant that never was is exit code 3."""

    async def populate() -> None:
        async with leasekit.connect(server.url, prefix=f"e-{tenant_name}") as kit:
            await kit.tenant(tenant_name, "prod").gate.prepare(event("held"))

    asyncio.run(populate())
    where = ["--url", server.url, "--prefix", f"e-{tenant_name}"]
    for words in (where, [*where, "--tenant", f"{tenant_name}/prod"]):
        found = run("unknown", *words)
        assert (found.code, found.out) == (0, "nothing is unknown\n")
        assert run("unknown", *words, "--json").document["items"] == []
    assert run("unknown", *where, "--tenant", f"{tenant_name}/dev").code == 3


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "status"), [("sent", "sent"), ("failed", "failed"), ("not_sent", "cancelled")]
)
@pytest.mark.parametrize("key", ["lost1", "ended", "buried"])
def test_resolve_decides_about_an_intent(
    run: Run, shop: SimpleNamespace, key: str, verdict: str, status: str
) -> None:
    """Unknown, unknown and not written down, or undecidable: it is what the operator says."""
    id = getattr(shop.ids, key)
    words = ("resolve", id, verdict, "--reason", "asked them", "--actor", "ann", *shop.options)
    found = run(*words, "--yes")
    assert found.code == 0
    assert found.out.splitlines()[-1] == f"resolved: {verdict}; who decided and why is kept"
    assert f"id                  {id}" in found.out
    intent = shown(run, shop, id)
    assert (intent["status"], intent["cause"]) == (status, "resolved")
    fact = intent["facts"][-1]
    assert (fact["kind"], fact["actor"]) == (f"resolved_{verdict}", "ann")
    assert fact["reason"] == "asked them"


def test_not_sent_warns_and_lets_it_be_granted_again(run: Run, shop: SimpleNamespace) -> None:
    """The first sender may still wake up: that is said before, and the key is granted after."""
    words = ("resolve", shop.ids.lost1, "not_sent", "--reason", "r", *shop.options)
    dry = run(*words, "--dry-run")
    assert dry.code == 0
    assert "worker-1 may still wake up and make the effect" in dry.out
    assert "made twice, unless the destination refuses fence" in dry.out
    assert dry.out.splitlines()[-1] == "would_change: not_sent"
    assert shown(run, shop, shop.ids.lost1)["status"] == "unknown"
    assert "may still wake up" in run(*words, "--yes").out
    assert in_tenant(shop, lambda tenant: tenant.gate.prepare(event("lost-1"))) is not None
    final = run("resolve", shop.ids.lost2, "sent", "--reason", "r", *shop.options, "--dry-run").out
    assert "wake up" not in final


@pytest.mark.parametrize(
    ("verdict", "status"),
    [("sent", "sent"), ("redrive", "pending"), ("dead", "dead_lettered")],
)
@pytest.mark.parametrize("number", [0, 1])
def test_resolve_decides_about_a_parked_row(
    run: Run, shop: SimpleNamespace, number: int, verdict: str, status: str
) -> None:
    """Also where no claim has written yet that it is unknown; its errors keep who said so."""
    id = shop.rows[number]
    words = ("resolve", id, verdict, "--reason", "the bank says so", "--actor", "ann")
    found = run(*words, *shop.options, "--yes")
    assert found.code == 0, found.err
    assert ("teller may still wake up" in found.out) == (verdict == "redrive")
    row = shown(run, shop, id)
    assert (row["status"], row["cause"]) == (status, "resolved")
    assert row["last_error"] == "ann: the bank says so"


def test_who_decides_is_known_by_name_and_host(run: Run, shop: SimpleNamespace) -> None:
    """Where no actor is named."""
    run("resolve", shop.ids.lost1, "sent", "--reason", "r", *shop.options, "--yes")
    actor = shown(run, shop, shop.ids.lost1)["facts"][-1]["actor"]
    assert actor == f"{getpass.getuser()}@{socket.gethostname()}"


def test_a_user_without_a_name_must_give_one(
    run: Run, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that runs under a number alone."""

    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(getpass, "getuser", nobody)
    words = ("resolve", shop.ids.lost1, "sent", "--reason", "r", *shop.options, "--yes")
    found = run(*words)
    assert (found.code, "--actor is required" in found.err) == (2, True)
    assert run(*words, "--actor", "ann").code == 0


def test_resolve_refuses_what_nobody_has_to_decide(run: Run, shop: SimpleNamespace) -> None:
    """What is known or not there: 3. A wrong verdict, no reason, nobody to ask: 2. One line each."""
    before = everything(shop)
    reason = ("--reason", "r")
    for code, words in (
        (3, [shop.ids.sent, "not_sent", *reason, "--yes"]),
        (3, [shop.ids.failed, "sent", *reason, "--yes"]),
        (3, [shop.ids.held, "sent", *reason, "--yes"]),
        (3, [shop.ids.parking, "sent", *reason, "--dry-run"]),
        (3, ["outbox-0000000000000000", "sent", *reason, "--yes"]),
        (3, [shop.known, "sent", *reason, "--yes"]),
        (3, ["7zzzzzzzzzzzzzzzzzzzzzzzzz", "sent", *reason, "--yes"]),
        (2, [shop.ids.lost1, "redrive", *reason, "--yes"]),
        (2, [shop.rows[0], "not_sent", *reason, "--yes"]),
        (2, [shop.ids.lost1, "sent", "--yes"]),
        (2, [shop.ids.lost1, "sent", "--reason", " ", "--yes"]),
        (2, [shop.ids.lost1, "sent", *reason]),
        (2, [shop.ids.lost1, "--reason", "r", "--yes"]),
    ):
        found = run("resolve", *words, *shop.options)
        assert (found.code, found.out, found.err.count("\n")) == (code, "", 1), (words, found.err)
    assert everything(shop) == before


class Terminal(io.StringIO):
    """A person who reads the question, does something first, and answers."""

    def __init__(self, answer: str, first: Callable[[], None] = lambda: None) -> None:
        super().__init__(answer)
        self.first = first

    def isatty(self) -> bool:
        return True

    def readline(self, *size: Any) -> str:
        self.first()
        return super().readline(*size)


def test_a_person_sees_what_is_decided(
    run: Run, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal the story and the warning come before the question, and only yes does it."""
    words = ("resolve", shop.ids.lost1, "not_sent", "--reason", "r", *shop.options)
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    found = run(*words)
    assert (found.code, found.out) == (2, "")
    story, _, question = found.err.partition("decide that")
    assert all(text in story for text in ("lost-1", "worker-1", "unknown since", "wake up"))
    assert question.startswith(f" {shop.ids.lost1} is not_sent? [y/N] ")
    assert shown(run, shop, shop.ids.lost1)["status"] == "unknown"
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    found = run(*words, "--json")
    assert (found.code, found.document["outcome"]) == (0, "resolved")
    assert "wake up" in found.err


def test_what_changed_meanwhile_is_not_decided(
    run: Run, shop: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revision, or the claim count, of what was shown goes into the order."""

    def move_on() -> None:
        change_state(shop, shop.keys, shop.ids.lost1, revision=99)

    monkeypatch.setattr("sys.stdin", Terminal("y\n", move_on))
    found = run("resolve", shop.ids.lost1, "not_sent", "--reason", "r", *shop.options)
    assert (found.code, found.out) == (3, "")
    assert "has changed since it was shown (changed): nothing was changed" in found.err
    assert shown(run, shop, shop.ids.lost1)["status"] == "unknown"

    def claim_again() -> None:
        words = shop.raw.hget(shop.keys.outbox_state, shop.rows[0]).decode().split(" ", 9)
        words[6] = str(int(words[6]) + 1)
        shop.raw.hset(shop.keys.outbox_state, shop.rows[0], " ".join(words))

    monkeypatch.setattr("sys.stdin", Terminal("y\n", claim_again))
    found = run("resolve", shop.rows[0], "redrive", "--reason", "r", *shop.options)
    assert (found.code, found.out) == (3, "")
    assert shown(run, shop, shop.rows[0])["status"] == "unknown"


# --- one intent, and pages of them ----------------------------------------------------------------


def test_intents_are_listed_newest_first(run: Run, shop: SimpleNamespace) -> None:
    """All of a tenant, of one state, of one run, page by page."""
    found = run("intents", *shop.options, "--json").document["items"]
    assert len(found) == 10
    changed = [one["updated_at_ms"] for one in found]
    assert changed == sorted(changed, reverse=True)
    for status, ids in (
        ("sent", {shop.ids.sent}),
        ("failed", {shop.ids.failed}),
        ("cancelled", {shop.ids.off}),
        ("dead_lettered", {shop.ids.buried}),
        ("claimed", {shop.ids.held, shop.ids.parking}),
        ("unknown", {shop.ids.lost1, shop.ids.lost2, shop.ids.lost3, shop.ids.ended}),
    ):
        some = run("intents", "--status", status, *shop.options, "--json").document["items"]
        assert {one["id"] for one in some} == ids
    of_run = run("intents", "--run", "run-2", *shop.options, "--json").document["items"]
    assert {one["id"] for one in of_run} == {shop.ids.held, shop.ids.parking}
    page = run("intents", "--status", "unknown", "--limit", "3", *shop.options).out.splitlines()
    rest = run(*shlex.split(page[-1].removeprefix("more: "))[1:]).out.splitlines()
    assert len({line.split()[0] for line in [*page[1:-1], *rest[1:]]}) == 4
    assert run("intents", "--status", "lost", *shop.options).code == 2


def test_show_tells_an_intents_story(run: Run, shop: SimpleNamespace) -> None:
    """By its id or by the key of its call; what came back only where it is asked for."""
    by_id = run("show", shop.ids.sent, *shop.options)
    by_key = run("show", "--key", "sent", *shop.options)
    assert by_id.code == by_key.code == 0
    assert by_id.out.splitlines()[:4] == by_key.out.splitlines()[:4]
    assert "succeeded, fence" in by_id.out
    assert SECRET not in by_id.out + run("show", shop.ids.sent, *shop.options, "--json").out
    assert SECRET in run("show", shop.ids.sent, "--reveal", *shop.options).out
    revealed = run("show", shop.ids.sent, "--reveal", *shop.options, "--json").document
    assert revealed["facts"][0]["result"] == {"secret": SECRET}
    buried = run("show", shop.ids.buried, *shop.options).out
    assert "undecidable" in buried
    assert "HTTP 503" in buried
    row = run("show", shop.known, *shop.options)
    assert "payload size" in row.out
    assert SECRET not in row.out
    assert SECRET in run("show", shop.known, "--reveal", *shop.options).out
    for code, words in (
        (2, []), (2, [shop.ids.sent, "--key", "sent"]), (3, ["--key", "never"]),
        (3, ["outbox-0000000000000000"]),
    ):  # fmt: skip
        found = run("show", *words, *shop.options)
        assert (found.code, found.out, found.err.count("\n")) == (code, "", 1)


@pytest.mark.parametrize(
    ("key", "is_grantable", "text"),
    [
        ("sent", False, "its sender said so: its key is granted to nobody until it is forgotten"),
        ("failed", False, "its sender said so: its key is granted to nobody"),
        ("off", True, "its sender said that it was not sent"),
        ("held", False, "may be granted to the next sender: it reclaims"),
        ("parking", False, "becomes unknown: it parks"),
        ("lost-1", False, "nobody knows whether it was sent"),
        ("ended", False, "leasekit resolve outbox-"),
        ("buried", False, "its destination was asked once, and could not tell"),
    ],
)
def test_explain_says_why_an_intent_cannot_be_granted(
    run: Run, shop: SimpleNamespace, key: str, is_grantable: bool, text: str
) -> None:
    """Whether the next sender gets it, why not, and what follows."""
    found = run("explain", "--key", key, *shop.options)
    assert found.code == 0
    assert text in found.out
    assert found.out.startswith("yes" if is_grantable else "no")
    document = run("explain", "--key", key, *shop.options, "--json").document
    assert document["grantable"] is is_grantable
    assert run("explain", document["id"], *shop.options, "--json").document["id"] == document["id"]


def test_why_of_what_the_fixture_has_not() -> None:
    """An ended lease that reclaims, one that was left, an intent that nobody was granted."""

    def why(status: str, cause: str, **words: Any) -> tuple[bool, str]:
        intent = Intent(
            outbox_id="outbox-1", operation="t", status=IntentStatus(status), cause=cause,
            revision=1, created_at_ms=0, updated_at_ms=0, owner="w", **words,
        )  # fmt: skip
        is_grantable, reasons = intents.why(intent, 10_000)
        return is_grantable, " ".join(reasons)

    assert why("claimed", "granted", claim_expires_at_ms=5_000) == (
        True, "w had it until 5 s ago without a word, and it reclaims: the next sender gets it",
    )  # fmt: skip
    assert why("claimed", "left", claim_expires_at_ms=5_000)[1].startswith("w left it without")
    assert why("pending", "compensated")[0] is True
    asked = why("unknown", "undecidable", unknown_since_ms=0, asks=2, ask_at_ms=15_000)[1]
    assert "asked 2 times, and it is still not known; it may be asked in 5 s" in asked
    for cause, text in (("absent", "will not come"), ("resolved", "an operator decided")):
        assert text in why("cancelled", cause)[1]


def test_no_token_and_no_result_is_shown(run: Run, shop: SimpleNamespace) -> None:
    """Whatever is shown of intents: not what would let somebody complete them."""
    for words in (
        ["unknown"],
        ["intents"],
        ["gate", "status"],
        ["show", shop.ids.sent],
        ["explain", shop.ids.sent],
        ["resolve", shop.ids.lost1, "sent", "--reason", "r", "--yes"],
    ):
        for form in ([], ["--json"]):
            found = run(*words, *shop.options, *form)
            assert not any(token in found.out + found.err for token in shop.tokens), words
            assert SECRET not in found.out


def test_a_damaged_intent_is_one_line(run: Run, shop: SimpleNamespace) -> None:
    """Commands that meet damage say so, and that doctor says more; exit code 1."""
    shop.raw.hset(shop.keys.gate_docs, shop.ids.lost1, "nonsense")
    for words in (["unknown"], ["intents"], ["show", shop.ids.lost1], ["explain", shop.ids.lost1]):
        found = run(*words, *shop.options)
        assert (found.code, found.out, found.err.count("\n")) == (1, "", 1), found.err
        assert f"what is stored of {shop.ids.lost1} cannot be read" in found.err
        assert "leasekit doctor --deep" in found.err


# --- lost data ------------------------------------------------------------------------------------


def test_gate_open_lets_senders_of_lost_data_go_on(run: Run, shop: SimpleNamespace) -> None:
    """Refused by a server that was emptied, and granted there after an operator has said so."""

    async def lose_and_go_on() -> None:
        async with leasekit.connect(shop.server.url, prefix=shop.prefix) as kit:
            tenant = kit.tenant(shop.name, "prod")
            await tenant.gate.prepare(event("before"))
            lost = shop.raw.get(shop.keys.gate_dataset).decode()
            for key in shop.raw.keys(f"{shop.prefix}:*"):
                shop.raw.delete(key)
            with pytest.raises(Unavailable, match="data lost"):
                await tenant.gate.prepare(event("after"))
            words = ("gate", "open", "--dataset", lost, "--reason", "disk is gone", *shop.options)
            dry = await asyncio.to_thread(run, *words, "--dry-run")
            assert (dry.code, dry.err) == (0, "")
            assert dry.out.splitlines()[-1] == "would_change"
            assert "has no name: nothing was ever granted here" in dry.out
            assert "may then be sent once more" in dry.out
            assert not shop.raw.keys(f"{shop.prefix}:*")
            done = await asyncio.to_thread(run, *words, "--actor", "ann", "--yes")
            assert done.out.splitlines()[-1] == "opened; who decided and why is kept"
            assert await tenant.gate.prepare(event("after")) is not None
            again = await asyncio.to_thread(run, *words, "--yes", "--json")
            assert (again.document["outcome"], again.document["was_open"]) == ("opened", True)
            assert again.document["reason_recorded"] is False

    asyncio.run(lose_and_go_on())
    status = run("gate", "status", *shop.options)
    assert "by ann: disk is gone" in status.out


def test_gate_open_of_the_data_that_is_here_does_nothing(run: Run, shop: SimpleNamespace) -> None:
    """It says so; a name that is none, no reason, nobody to ask: exit code 2."""
    before = everything(shop)
    here = shop.raw.get(shop.keys.gate_dataset).decode()
    known = run("gate", "open", "--dataset", here, "--reason", "r", *shop.options, "--yes")
    assert (known.code, known.out.splitlines()[-1]) == (0, "known")
    assert "nothing has to be opened" in known.out
    dry = run("gate", "open", "--dataset", here, "--reason", "r", *shop.options, "--dry-run")
    assert dry.out.splitlines()[-1] == "known"
    # One name in 64 begins as an option does.
    hyphen = ("gate", "open", "--dataset", "-" * 22, "--reason", "r", *shop.options, "--dry-run")
    assert run(*hyphen).code == 0
    for words in (
        ["--dataset", "short", "--reason", "r", "--yes"],
        ["--dataset", new_token(), "--yes"],
        ["--dataset", new_token(), "--reason", "r"],
        ["--reason", "r", "--yes"],
    ):
        found = run("gate", "open", *words, *shop.options)
        assert (found.code, found.out, found.err.count("\n")) == (2, "", 1), words
    assert everything(shop) == before


def test_gate_status_counts(run: Run, shop: SimpleNamespace) -> None:
    """Each tenant by its lists, one by the states of all its intents; policy and durability."""
    before = everything(shop)
    found = run("gate", "status", *shop.where, "--json").document
    one, other = found["items"]
    assert (one["tenant"], other["tenant"]) == (shop.tenant, shop.other)
    assert one["dataset"] == shop.raw.get(shop.keys.gate_dataset).decode()
    names = ("intents", "unknown", "dead_lettered", "sent_or_cancelled", "others")
    assert [one[name] for name in names] == [10, 4, 1, 2, 3]
    assert [other[name] for name in names] == [1, 1, 0, 0, 0]
    assert found["policy"]["lease_ms"] == 300_000
    assert found["policy"]["durability"] == "none"
    assert "money_movement_contract" in found["policy"]["tiers"]
    of_one = run("gate", "status", *shop.options, "--json").document["items"][0]
    assert of_one["by_status"] == {
        "pending": 0, "claimed": 2, "sent": 1, "failed": 1, "dead_lettered": 1, "cancelled": 1,
        "unknown": 4,
    }  # fmt: skip
    assert everything(shop) == before
    page = run("gate", "status", *shop.where, "--limit", "1").out
    assert shop.tenant in page
    assert shop.other not in page
    [more] = [line for line in page.splitlines() if line.startswith("more: ")]
    assert shop.other in run(*shlex.split(more.removeprefix("more: "))[1:]).out
    shop.raw.hset(shop.keys.gate_state, shop.ids.sent, "nonsense")
    damaged = run("gate", "status", *shop.options, "--json").document["items"][0]
    assert damaged["by_status"]["unreadable"] == 1


# --- a narrow terminal ----------------------------------------------------------------------------


def test_a_narrow_terminal_gets_paragraphs() -> None:
    """Where a table does not fit, ids stay whole: one paragraph a line, wrapped between words."""
    table = Table(box=None)
    for title in ("id", "what", "key", "run"):
        table.add_column(title)
    words = ("outbox-aaa0fe414e3a3b91", "create", "k" * 20, "-")
    table.add_row(*[tables.Text(text) for text in words])
    assert tables.fitted(table, Console(width=80)) is table
    narrow = tables.fitted(table, Console(width=40))
    assert str(narrow).splitlines() == [
        "outbox-aaa0fe414e3a3b91",
        "  what create  key kkkkkkkkkkkkkkkkkkkk",
    ]
    narrower = tables.fitted(table, Console(width=30))
    assert str(narrower).splitlines()[1:] == ["  what create", f"  key {'k' * 20}"]


# --- doctor ---------------------------------------------------------------------------------------


def doctors_line(run: Run, *words: str) -> dict[str, str]:
    checks = run("doctor", *words, "--json").document["checks"]
    [line] = [check for check in checks if check["name"] == "unknown"]
    return dict(line)


def test_doctor_warns_of_what_is_long_unknown(run: Run, shop: SimpleNamespace) -> None:
    """Older than a day: intents, written down or not, and parked rows; and the undecidable ones."""
    young = doctors_line(run, *shop.where)
    assert young["level"] == "warn"
    assert "more than a day" not in young["what"]
    assert f"1 that no destination could tell of ({shop.tenant} 1)" in young["what"]
    long_ago = int(shop.raw.time()[0]) * 1_000 - DAY_MS - 60_000
    shop.raw.zadd(shop.keys.outbox_unknown, {shop.rows[0]: long_ago})
    assert (
        f"1 unknown for more than a day ({shop.tenant} 1)" in doctors_line(run, *shop.where)["what"]
    )
    for id in (shop.ids.lost1, shop.ids.ended):
        change_state(shop, shop.keys, id, lease_end=long_ago)
    shop.raw.zadd(shop.keys.gate_expiring, {shop.ids.ended: long_ago})
    other = Keys(shop.prefix, f"{shop.name}.test")
    shop.raw.zadd(other.gate_expiring, {shop.elsewhere: long_ago})
    old = doctors_line(run, *shop.where)
    assert old["level"] == "warn"
    told = f"4 unknown for more than a day ({shop.tenant} 3, {shop.other} 1)"
    assert told in old["what"]
    assert "leasekit unknown" in old["advice"]
    of_one = doctors_line(run, *shop.where, "--tenant", shop.other)
    assert f"1 unknown for more than a day ({shop.other} 1)" in of_one["what"]


def test_doctor_says_that_nothing_is_long_unknown(run: Run, shop: SimpleNamespace) -> None:
    """A tenant whose unknown intents are young, and that buried none, is well."""
    line = doctors_line(run, *shop.where, "--tenant", shop.other)
    assert (line["level"], line["advice"]) == ("ok", "")


def test_doctor_survives_a_list_of_another_type(run: Run, shop: SimpleNamespace) -> None:
    """What it cannot count is a fail, and the rest is told all the same."""
    shop.raw.delete(shop.keys.gate_dead)
    shop.raw.set(shop.keys.gate_dead, "x")
    line = doctors_line(run, *shop.where)
    assert (line["level"], "WRONGTYPE" in line["what"]) == ("fail", True)


def test_doctor_deep_tells_of_the_gate(run: Run, shop: SimpleNamespace) -> None:
    """A healthy gate is no finding, however much of it is unknown; damage names key and id."""
    deep = run("doctor", "--deep", *shop.options, "--json").document["checks"]
    assert [one["level"] for one in deep if one["name"].startswith("data of")] == ["ok"]
    shop.raw.zrem(shop.keys.gate_unknown, shop.ids.lost1)
    found = run("doctor", "--deep", *shop.options)
    assert found.code == 1
    [line] = [line for line in found.out.splitlines() if "data of" in line]
    assert line.startswith(f"fail  data of {shop.tenant}: intent_without_entry at ")
    assert f"{shop.keys.gate_unknown} {shop.ids.lost1}" in line
    assert "-> ZADD it there" in line
