"""The sweep: each planted damage is found and named, and a healthy tenant has none, however busy."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from servers import Server, dump

import leasekit
from leasekit import Leasekit, Retention, Tenant, doctor
from leasekit.cli import app, checkup
from leasekit.doctor.outbox import OutboxSweep
from leasekit.doctor.pages import Pace
from leasekit.errors import Conflict, OutcomeUnknown
from leasekit.keys import Keys

ROUTE = "l:t"
TOKEN = "T" * 22
NEVER = "7zzzzzzzzzzzzzzzzzzzzzzzzz"  # above every id that can have been deleted

Ward = SimpleNamespace


@pytest.fixture
async def ward(server: Server, tenant_name: str) -> AsyncIterator[Ward]:
    """A tenant with a row in each status, leases, keys, claims on record and dedupe entries."""
    async with leasekit.connect(server.url) as kit:
        tenant = kit.tenant(tenant_name, "w")
        keys = Keys("lk", tenant.tag)
        outbox = tenant.outbox
        made = SimpleNamespace(
            server=server, raw=server.raw, kit=kit, tenant=tenant, keys=keys, tag=tenant.tag
        )
        for i in range(8):
            key = f"k{i}" if i < 3 else None
            await outbox.enqueue("l", "t", {"n": i}, dedupe_key=key)
        made.dead, made.sent, made.held, made.other = [
            claim.row.id for claim in await _end_two(tenant)
        ]
        await outbox.enqueue("p", "t", 1, on_expiry="park")
        await outbox.claim("p", "t", lease_ms=0, consumer="c")
        await outbox.claim("p", "t", consumer="c")  # writes down that it is unknown
        rows = (await outbox.list(status="pending", lane="l", target="t")).items
        made.pending, made.later = rows[0].id, rows[-1].id
        await tenant.leases.acquire("nightly", ttl_ms=600_000, owner="cron")
        await tenant.leases.acquire("hourly", ttl_ms=600_000, owner="cron")
        await tenant.idempotency.reserve("op", "k", owner="o", fingerprint="f")
        yield made


async def _end_two(tenant: Tenant) -> list[Any]:
    claims = await tenant.outbox.claim("l", "t", limit=3, consumer="c")
    await claims[0].nack(error="no", permanent=True)
    await claims[1].ack()
    return [*claims, *await tenant.outbox.claim("l", "t", limit=1, consumer="c")]


async def swept(kit: Leasekit, tag: str) -> list[doctor.Finding]:
    return [finding async for finding in doctor.sweep(kit.backend, "lk", tag)]


async def found(ward: Ward) -> list[tuple[str, str, str | None]]:
    """What a sweep finds: kind, key after the tenant, id; it must have written nothing."""
    before = dump(ward.raw, "lk", ward.tag)
    findings = await swept(ward.kit, ward.tag)
    assert dump(ward.raw, "lk", ward.tag) == before
    for finding in findings:
        assert finding.what
        assert finding.advice
        assert TOKEN not in str(finding)
    start = f"{ward.keys.tenant}:"
    return [(one.kind, one.key.removeprefix(start), one.id) for one in findings]


def state_words(ward: Ward, id: str, **changes: object) -> bytes:
    """A row's state line with some words changed."""
    names = ("status", "cause", "token", "at", "size", "attempts", "claims", "fence", "claimed_at")
    line = ward.raw.hget(ward.keys.outbox_state, id).decode()
    words = line.split(" ", 9)
    for name, value in changes.items():
        words[names.index(name)] = str(value)
    return " ".join(words).encode()


async def test_a_healthy_tenant_has_no_damage(ward: Ward) -> None:
    """Rows in each status, leases and keys: nothing is found."""
    assert await found(ward) == []


# --- rows and lists -------------------------------------------------------------------------------


async def test_a_row_without_index_is_found(ward: Ward) -> None:
    """A pending row that stands in no line is named, with the line it belongs to."""
    ward.raw.zrem(ward.keys.outbox_due(ROUTE), ward.pending)
    assert await found(ward) == [("row_without_index", "outbox:due:l:t", ward.pending)]


async def test_a_finished_row_without_index_is_found(ward: Ward) -> None:
    """So is a dead letter that is not in the list of dead letters."""
    ward.raw.zrem(ward.keys.outbox_dead, ward.dead)
    assert await found(ward) == [("row_without_index", "outbox:dead", ward.dead)]


@pytest.mark.parametrize("noun", ["due:l:t", "done", "dead", "unknown"])
async def test_an_index_without_row_is_found(ward: Ward, noun: str) -> None:
    """An entry of any list without a document is named with its list."""
    ward.raw.zadd(f"{ward.keys.tenant}:outbox:{noun}", {"ghost": 5})
    assert await found(ward) == [("index_without_row", f"outbox:{noun}", "ghost")]


async def test_a_row_in_two_lists_is_found(ward: Ward) -> None:
    """A sent row that also stands in line would be sent again."""
    ward.raw.zadd(ward.keys.outbox_due(ROUTE), {ward.sent: 5})
    assert await found(ward) == [("row_in_two_lists", "outbox:due:l:t", ward.sent)]


@pytest.mark.parametrize("noun", ["done", "dead", "unknown"])
async def test_a_list_entry_whose_state_says_otherwise_is_found(ward: Ward, noun: str) -> None:
    """A pending row among the finished, dead or unknown ones, instead of in line."""
    ward.raw.zrem(ward.keys.outbox_due(ROUTE), ward.pending)
    ward.raw.zadd(f"{ward.keys.tenant}:outbox:{noun}", {ward.pending: 5})
    assert await found(ward) == [("row_in_wrong_list", f"outbox:{noun}", ward.pending)]


async def test_a_row_in_the_line_of_another_lane_is_found(ward: Ward) -> None:
    """It would be handed to who does not know what to do with it."""
    ward.raw.zadd(ward.keys.outbox_due("p:t"), {ward.pending: 5})
    assert await found(ward) == [("row_in_wrong_line", "outbox:due:p:t", ward.pending)]


async def test_a_wrong_place_in_line_is_found(ward: Ward) -> None:
    """A line that has another instant than the state line."""
    ward.raw.zadd(ward.keys.outbox_due(ROUTE), {ward.pending: 5})
    assert await found(ward) == [("wrong_place", "outbox:due:l:t", ward.pending)]


async def test_a_claimed_row_with_unreadable_state_is_found(ward: Ward) -> None:
    """A state line that no command writes; the counters that it was part of cannot agree."""
    ward.raw.hset(ward.keys.outbox_state, ward.held, "claimed claimed nonsense")
    findings = await swept(ward.kit, ward.tag)
    assert [one.what for one in findings if one.kind == "unreadable_state"] == [
        "its state line cannot be read (it was claimed)"
    ]
    assert {one.kind for one in findings} <= {"unreadable_state", "wrong_tally", "two_holders"}


async def test_an_unreadable_document_is_found(ward: Ward) -> None:
    """A document that begins with no header."""
    ward.raw.hset(ward.keys.outbox_docs, ward.pending, "nonsense")
    assert ("unreadable_document", "outbox:docs", ward.pending) in await found(ward)


async def test_a_claim_by_no_token_is_found(ward: Ward) -> None:
    """A claimed row that nobody can ack."""
    line = state_words(ward, ward.held, token="~")
    ward.raw.hset(ward.keys.outbox_state, ward.held, line)
    assert await found(ward) == [("claimed_without_token", "outbox:state", ward.held)]


async def test_a_wrong_size_is_found(ward: Ward) -> None:
    """A size that is not the document's."""
    ward.raw.hset(ward.keys.outbox_state, ward.held, state_words(ward, ward.held, size=9))
    assert await found(ward) == [("wrong_size", "outbox:state", ward.held)]


async def test_state_and_errors_of_no_row_are_found(ward: Ward) -> None:
    """What speaks of a row that is not there."""
    ward.raw.hset(ward.keys.outbox_state, "ghost", state_words(ward, ward.held))
    ward.raw.hset(ward.keys.outbox_errors, "ghost2", '1 nacked 1 1 "x"')
    assert await found(ward) == [
        ("state_without_row", "outbox:state", "ghost"),
        ("errors_without_row", "outbox:errors", "ghost2"),
    ]


async def test_a_lane_that_is_not_listed_is_found(ward: Ward) -> None:
    """Once, however many rows it has."""
    ward.raw.zrem(ward.keys.outbox_lanes, ROUTE)
    [finding] = await found(ward)
    assert finding[:2] == ("lane_not_listed", "outbox:lanes")


# --- counters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    ["pending:l:t", "claimed:l:t", "dead_lettered:l:t", "unknown:p:t", "done_bytes", "dead_bytes"],
)
async def test_a_wrong_tally_is_found(ward: Ward, field: str) -> None:
    """Each counter by itself, too high or too low."""
    for change in (1, -2):
        ward.raw.hincrby(ward.keys.outbox_tally, field, change)
        assert await found(ward) == [("wrong_tally", "outbox:tally", field)]


async def test_a_tally_of_ever_is_at_least_what_is_kept(ward: Ward) -> None:
    """Sent rows may have been forgotten, but not more be kept than there ever were."""
    ward.raw.hincrby(ward.keys.outbox_tally, "sent:l:t", 7)
    assert await found(ward) == []
    ward.raw.hset(ward.keys.outbox_tally, "sent:l:t", 0)
    assert await found(ward) == [("wrong_tally", "outbox:tally", "sent:l:t")]


async def test_a_wrong_sum_is_found_while_others_write(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where counters move, the line's length still tells."""
    stamp = OutboxSweep._stamp
    marks = iter(range(100))

    async def moving(self: Any) -> Any:
        tally, _ = await stamp(self)
        return tally, str(next(marks)).encode()

    monkeypatch.setattr(OutboxSweep, "_stamp", moving)
    assert await found(ward) == []
    ward.raw.hincrby(ward.keys.outbox_tally, "claimed:l:t", 3)
    assert await found(ward) == [("wrong_tally", "outbox:tally", "pending:l:t")]


# --- claims, fences, dedupe -----------------------------------------------------------------------


async def test_two_holders_are_found(ward: Ward) -> None:
    """A row that was claimed once, and two claims that say they took it."""
    ward.raw.hset(ward.keys.outbox_claims, TOKEN, f"99999999999999 {ward.held}")
    ward.raw.zadd(ward.keys.outbox_claims_end, {TOKEN: 99999999999999})
    assert await found(ward) == [("two_holders", "outbox:claims", ward.held)]


async def test_two_holders_under_one_fence_are_found(ward: Ward) -> None:
    """Two rows held under one fence that was granted at two moments."""
    fence = state_words(ward, ward.held).split(b" ")[7].decode()
    line = state_words(ward, ward.other, fence=fence, claimed_at=1)
    ward.raw.hset(ward.keys.outbox_state, ward.other, line)
    [finding] = await found(ward)
    assert finding[:2] == ("two_holders", "outbox:state")


@pytest.mark.parametrize("end", [None, 5])
async def test_a_stale_claim_record_is_found(ward: Ward, end: int | None) -> None:
    """A record that no end will ever remove, or whose end is another."""
    [token] = [
        token
        for token, record in ward.raw.hgetall(ward.keys.outbox_claims).items()
        if ward.other.encode() in record
    ]
    if end is None:
        ward.raw.zrem(ward.keys.outbox_claims_end, token)
    else:
        ward.raw.zadd(ward.keys.outbox_claims_end, {token: end})
    assert await found(ward) == [("stale_claim_record", "outbox:claims", None)]
    [finding] = await swept(ward.kit, ward.tag)
    assert ward.other in finding.what
    assert token.decode() not in str(finding)


async def test_a_claim_record_of_nothing_is_found(ward: Ward) -> None:
    """A record of a row that never was, or of one that was never claimed; an end without record."""
    ward.raw.hset(ward.keys.outbox_claims, TOKEN, f"99999999999999 {NEVER} {ward.pending}")
    ward.raw.zadd(ward.keys.outbox_claims_end, {TOKEN: 99999999999999, "y" * 22: 99999999999999})
    assert sorted(await found(ward), key=str) == [
        ("claim_end_without_record", "outbox:claims_end", None),
        ("stale_claim_record", "outbox:claims", ward.pending),
        ("stale_claim_record", "outbox:claims", NEVER),
    ]


async def test_a_fence_that_fell_back_is_found(ward: Ward) -> None:
    """The last fence given is below one that a row has."""
    ward.raw.set(ward.keys.fence, 5)
    assert await found(ward) == [("fence_behind", "fence", None)]


async def test_dedupe_entries_that_point_nowhere_are_found(ward: Ward) -> None:
    """An entry of a row that never was, an entry without end, an end without entry."""
    ward.raw.hset(ward.keys.outbox_dedupe, "digest1", f"{NEVER} fingerprint")
    ward.raw.hset(ward.keys.outbox_dedupe, "digest2", f"{ward.pending} fingerprint")
    ward.raw.zadd(ward.keys.outbox_dedupe_end, {"digest1": 5, "digest3": 5})
    assert sorted(await found(ward)) == [
        ("dedupe_end_without_entry", "outbox:dedupe_end", "digest3"),
        ("dedupe_of_nothing", "outbox:dedupe", "digest1"),
        ("dedupe_without_end", "outbox:dedupe", "digest2"),
    ]


# --- leases and keys ------------------------------------------------------------------------------


async def test_a_lease_in_pieces_is_found(ward: Ward) -> None:
    """A line without its end or its name, and each of those without a line."""
    ward.raw.zrem(ward.keys.lease_due, "nightly")
    ward.raw.zrem(ward.keys.lease_names, "hourly")
    ward.raw.zadd(ward.keys.lease_due, {"ghost": 5})
    ward.raw.zadd(ward.keys.lease_names, {"ghoul": 0})
    assert sorted(await found(ward)) == [
        ("lease_end_without_lease", "lease:due", "ghost"),
        ("lease_name_without_lease", "lease:names", "ghoul"),
        ("lease_without_end", "lease:due", "nightly"),
        ("lease_without_name", "lease:names", "hourly"),
    ]


async def test_a_lease_that_cannot_be_right_is_found(ward: Ward) -> None:
    """A line that no command writes, and one whose end is kept as another."""
    ward.raw.hset(ward.keys.lease_docs, "nightly", "nonsense")
    ward.raw.zadd(ward.keys.lease_due, {"hourly": 5})
    assert sorted(await found(ward)) == [
        ("lease_end_disagrees", "lease:due", "hourly"),
        ("unreadable_lease", "lease:docs", "nightly"),
    ]


async def test_an_idempotency_key_in_pieces_is_found(ward: Ward) -> None:
    """A record that is never forgotten, an end of none, one that cannot be read."""
    [record] = [name.decode() for name in ward.raw.hkeys(ward.keys.idempotency_docs)]
    ward.raw.zrem(ward.keys.idempotency_due, record)
    ward.raw.zadd(ward.keys.idempotency_due, {"ghost": 5, "ghoul": 5})
    ward.raw.hset(ward.keys.idempotency_docs, "ghoul", "nonsense")
    assert sorted(await found(ward)) == [
        ("key_end_without_record", "idempotency:due", "ghost"),
        ("key_without_end", "idempotency:due", record),
        ("unreadable_record", "idempotency:docs", "ghoul"),
    ]


async def test_foreign_keys_are_found(ward: Ward) -> None:
    """A key that leasekit has no name for; one of another type ends the sweep."""
    ward.raw.set(f"{ward.keys.tenant}:outbox:notes", "x")
    assert await found(ward) == [("foreign_key", "outbox:notes", None)]
    ward.raw.delete(f"{ward.keys.tenant}:outbox:notes")
    ward.raw.delete(ward.keys.outbox_dead)
    ward.raw.set(ward.keys.outbox_dead, "x")
    assert await found(ward) == [("wrong_type", "outbox:dead", None)]


def test_every_kind_has_advice_and_a_test() -> None:
    """A kind that no test plants, here or in test_doctor_gate.py, might never be found."""
    files = Path(__file__).parent.glob("test_doctor*.py")
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert [kind for kind in doctor.ADVICE if f'"{kind}"' not in text] == []


# --- while others write ---------------------------------------------------------------------------


async def traffic(tenant: Tenant, seed: int, steps: int | None, stop: asyncio.Event) -> int:
    """Random calls of all three concepts, until `steps` are done or `stop` is set."""
    chance = random.Random(seed)
    outbox, done = tenant.outbox, 0
    while not stop.is_set() and done != steps:
        done += 1
        lane = chance.choice(("a", "b"))
        what = chance.random()
        if what < 0.4:
            key = chance.choice((None, None, f"k{chance.randrange(20)}"))
            with suppress(Conflict, OutcomeUnknown):
                await outbox.enqueue(
                    lane, "t", chance.randrange(3), dedupe_key=key,
                    max_attempts=2, on_expiry=chance.choice(("reclaim", "park")),
                )  # fmt: skip
        elif what < 0.8:
            lease_ms = chance.choice((1, 60_000))
            for claim in await outbox.claim(lane, "t", limit=5, lease_ms=lease_ms, consumer="c"):
                ending = chance.randrange(6)
                if ending == 0:
                    await claim.nack(error="no", permanent=chance.random() < 0.5)
                elif ending == 1:
                    await claim.release()
                elif ending == 2:
                    await claim.extend(lease_ms=60_000)
                elif ending != 3:
                    await claim.ack()
        elif what < 0.9:
            name = f"n{chance.randrange(5)}"
            lease = (await tenant.leases.acquire(name, ttl_ms=60_000, owner="o")).lease
            if lease is not None and chance.random() < 0.7:
                await tenant.leases.release(name, lease.token)
        elif what < 0.95:
            for row in (await outbox.list(limit=5, status="dead_lettered")).items:
                await outbox.redrive(row.id)
            for row in (await outbox.list(limit=2, status="pending")).items:
                await outbox.cancel(row.id)
            for row in (await outbox.list(limit=2, status="unknown")).items:
                verdict = chance.choice(("sent", "redrive", "dead"))
                await outbox.resolve(row.id, verdict, actor="a", reason="r")
        else:
            key = f"k{chance.randrange(9)}"
            held = await tenant.idempotency.reserve("op", key, owner="o", fingerprint="f")
            if held.token is not None:
                await tenant.idempotency.complete("op", key, 1, token=held.token, keep_ms=5)
    return done


RETENTIONS = [
    Retention(finished_count=20, dead_count=5, dedupe_ms=5),
    Retention(finished_count=0, dead_count=0, dedupe_ms=5),
]


@pytest.mark.parametrize("retention", RETENTIONS, ids=["few kept", "none kept"])
async def test_a_busy_tenant_has_no_damage(
    server: Server, tenant_name: str, retention: Retention
) -> None:
    """After much traffic, and while more goes on: every sweep finds nothing."""
    async with leasekit.connect(server.url, retention=retention) as kit:
        tenant, stop = kit.tenant(tenant_name, "w"), asyncio.Event()
        await asyncio.gather(*[traffic(tenant, seed, 40, stop) for seed in range(4)])
        assert await swept(kit, tenant.tag) == []
        writers = [asyncio.create_task(traffic(tenant, seed, None, stop)) for seed in range(4, 8)]
        try:
            for _ in range(3 if server.kind == "memory" else 5):
                assert await swept(kit, tenant.tag) == []
        finally:
            stop.set()
            done = await asyncio.gather(*writers)
        assert min(done) > 3, "the writers came not to write while the sweeps went on"
        assert await swept(kit, tenant.tag) == []


async def test_damage_is_found_while_others_write(ward: Ward) -> None:
    """Traffic on other lanes neither hides damage nor adds any."""
    ward.raw.zrem(ward.keys.outbox_due(ROUTE), ward.pending)
    stop = asyncio.Event()
    writer = asyncio.create_task(traffic(ward.tenant, 1, None, stop))
    try:
        for _ in range(3):
            findings = await swept(ward.kit, ward.tag)
            assert [(one.kind, one.id) for one in findings] == [("row_without_index", ward.pending)]
    finally:
        stop.set()
        await writer


async def test_pages_stay_small_where_documents_are_large(ward: Ward) -> None:
    """Large documents are read few at a time, and all of them are looked at."""
    for _ in range(40):
        await ward.tenant.outbox.enqueue("big", "t", "x" * 200_000)
    pace = Pace()
    for size_bytes, count in ((100, 32), (2_000_000, 16), (2_000_000, 8), (500_000, 8)):
        pace.learn(size_bytes)
        assert pace.count == count
    looked_at: list[int] = []
    assert [
        finding
        async for finding in doctor.sweep(
            ward.kit.backend, "lk", ward.tag, on_progress=looked_at.append
        )
    ] == []
    assert sum(looked_at) > 100


# --- the command ----------------------------------------------------------------------------------


def test_the_command_names_each_damage(
    server: Server,
    tenant_name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`doctor --deep --tenant T`: one line a finding with key, id and what to do, exit code 1."""
    monkeypatch.setattr(checkup, "DRIFT_SECONDS", 0.001)
    prefix = f"doc-{tenant_name}"
    words = ["doctor", "--deep", "--url", server.url, "--prefix", prefix]
    words += ["--tenant", f"{tenant_name}/w"]

    async def enqueue() -> str:
        async with leasekit.connect(server.url, prefix=prefix) as kit:
            return (await kit.tenant(tenant_name, "w").outbox.enqueue("l", "t", 1)).row.id

    id = asyncio.run(enqueue())
    keys = Keys(prefix, f"{tenant_name}.w")
    server.raw.zrem(keys.outbox_due(ROUTE), id)
    capsys.readouterr()
    assert app.run(words) == 1
    line = f"fail  data of {tenant_name}/w: row_without_index at {keys.outbox_due(ROUTE)} {id}: "
    assert line in capsys.readouterr().out
    assert app.run([*words, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    [failed] = [check for check in document["checks"] if check["name"].startswith("data of ")]
    assert "ZADD it to the named list" in failed["advice"]


def test_judges_are_pure() -> None:
    """A judge needs a look and nothing else: what is not there is not wrong."""
    nothing = doctor.RowLook(header=None, size_bytes=0, line=None, scores={})
    assert doctor.judge_row(nothing) == []
    assert doctor.judge_lease(None, None, False) == []
    assert doctor.judge_record(None, None) == []
    fresh = doctor.RowLook(
        header=b"5 0 2 reclaim l:t ~ ~", size_bytes=24, line=None, scores={"due": 5.0}
    )
    assert doctor.judge_row(fresh) == []
    late: Callable[..., list[doctor.Problem]] = doctor.judge_named_row
    assert late("b", 1, None, False, "a")[0].kind == "stale_claim_record"
    assert late("a", 1, None, False, "a") == []
