"""Pages of the four collections: their filters, their order, their cursors (spec/reliability 4.11, 6.7)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import view_records as records
from servers import Server

import leasekit
from leasekit import InvalidInput, Tenant
from leasekit.ledger.store import Store
from leasekit.views import Filters, pages

NOW = 5_000
RUN = "run-a"
NAMES = ("outbox", "tool_effects", "dead_letters", "compensations")
ID_OF = {
    "outbox": "outbox_id",
    "tool_effects": "effect_id",
    "dead_letters": "dead_letter_id",
    "compensations": "compensation_id",
}


OTHER = {
    "outbox": "sent",
    "tool_effects": "unknown",
    "dead_letters": "ignored",
    "compensations": "cancelled",
}
"""A status of each that is not `failed`."""


async def write(tenant: Tenant, collection: str, id: str, at: int = 1, **fields: Any) -> None:
    """One record, created and changed at one instant."""
    context, ledger = tenant.context, tenant.ledger
    given = {"created_at_ms": at, "updated_at_ms": at} | fields
    run_id = given.pop("run_id", RUN)
    if collection == "outbox":
        store: Store = tenant.views._reader.store
        row = records.outbox_row(context, run_id, id, **given)
        await records.write_outbox(store, row, now_ms=NOW)
    elif collection == "tool_effects":
        await ledger.effects.upsert(records.effect(context, run_id, id, **given), now_ms=NOW)
    elif collection == "dead_letters":
        await ledger.dead_letters.upsert(records.letter(context, run_id, id, **given), now_ms=NOW)
    else:
        await ledger.compensations.upsert(
            records.compensation(context, run_id, id, **given), now_ms=NOW
        )


async def fill(tenant: Tenant, collection: str) -> None:
    """A thousand and more records that changed one after the other, from 100 to 1 149."""
    if collection != "outbox":
        await asyncio.gather(
            *[write(tenant, collection, f"F:{at}", at) for at in range(100, 1_150)]
        )
        return
    for start in (100, 625):
        rows = [
            records.outbox_row(tenant.context, RUN, f"F:{at}", created_at_ms=at, updated_at_ms=at)
            for at in range(start, start + 525)
        ]
        await records.write_outbox(tenant.views._reader.store, *rows, now_ms=NOW)


def ids(body: dict[str, Any], collection: str) -> list[str]:
    return [row[ID_OF[collection]] for row in body[collection]]


async def walk(tenant: Tenant, collection: str, filters: Filters, limit: int) -> list[str]:
    """All ids of a collection, page by page as a client would."""
    found: list[str] = []
    cursor: dict[str, Any] = {}
    while True:
        body = await tenant.views.reliability(filters, limit=limit, now_ms=NOW, **cursor)
        found += ids(body, collection)
        following = body["pagination"]["next"][collection]
        if following is None:
            return found
        following.pop("before_created_at_ms", None)
        cursor = following


@pytest.mark.parametrize("collection", NAMES)
async def test_the_last_changed_comes_first(tenant: Tenant, collection: str) -> None:
    """By the last change, whatever the order of writing and of creation; of one run, or of all."""
    for id, created, updated in (("a", 3, 20), ("b", 1, 30), ("c", 2, 10)):
        await write(tenant, collection, id, created_at_ms=created, updated_at_ms=updated)
    for filters in (Filters(), Filters(run_id=RUN), Filters(run_id="all")):
        for limit in (1, 2, 3, 4):
            assert await walk(tenant, collection, filters, limit) == ["b", "a", "c"]


@pytest.mark.parametrize("collection", NAMES)
async def test_filters_compare_normalised_words(tenant: Tenant, collection: str) -> None:
    """Case, `-` and surrounding blanks do not count; blank and `all` filter nothing; what has no run
    passes no filter for one."""
    await write(tenant, collection, "one", 3, run_id="Run-A", status="failed")
    await write(tenant, collection, "two", 2, run_id="run_a", status=OTHER[collection])
    await write(tenant, collection, "other", 1, run_id=None, status="failed")

    async def shown(**filters: Any) -> list[str]:
        return ids(await tenant.views.reliability(Filters(**filters), now_ms=NOW), collection)

    assert await shown(run_id=" RUN-a ") == ["one", "two"]
    assert await shown(status=" FAILED ") == ["one", "other"]
    assert await shown(run_id="run_a", status="failed") == ["one"]
    assert await shown(status="no-such-status") == []
    assert await shown(run_id="run-b") == []
    for off in ("", "  ", "all", "ALL "):
        assert await shown(run_id=off, status=off, source_type=off) == ["one", "two", "other"]


async def test_a_source_filters_effects_and_dead_letters_alone(tenant: Tenant) -> None:
    await write(tenant, "outbox", "o", source_kind="automation_v2")
    await write(tenant, "compensations", "c")
    for collection, field in (("tool_effects", "source_kind"), ("dead_letters", "source_type")):
        await write(tenant, collection, "wanted", 3, **{field: "Stateful-Wait"})
        await write(tenant, collection, "other", 2, **{field: "tool_effect"})
    await write(tenant, "tool_effects", "bare", 1, source_kind=None)
    body = await tenant.views.reliability(Filters(source_type="stateful_wait"), now_ms=NOW)
    assert {name: ids(body, name) for name in NAMES} == {
        "outbox": ["o"],
        "tool_effects": ["wanted"],
        "dead_letters": ["wanted"],
        "compensations": ["c"],
    }


async def test_activity_filters_what_can_be_recovered_alone(tenant: Tenant) -> None:
    """Superseded letters and compensations go, and compensations at their end; letters that were
    ignored stay, and a lone flag of a caller hides nothing."""
    lone = {"superseded_by_success": True}
    for collection in NAMES:
        await write(tenant, collection, "superseded", 9, metadata=records.MARK)
        await write(tenant, collection, "flagged", 8, metadata=lone)
    for at, status in enumerate(("ignored", "resolved", "linked_to_compensation")):
        await write(tenant, "dead_letters", status, at, status=status)
    for at, status in enumerate(("completed", "cancelled", "failed")):
        await write(tenant, "compensations", status, at, status=status)
    body = await tenant.views.reliability(Filters(active_only=True), now_ms=NOW)
    assert {name: ids(body, name) for name in NAMES} == {
        "outbox": ["superseded", "flagged"],
        "tool_effects": ["superseded", "flagged"],
        "dead_letters": ["flagged", "linked_to_compensation", "resolved", "ignored"],
        "compensations": ["flagged", "failed"],
    }


@pytest.mark.parametrize("collection", NAMES)
async def test_a_bound_on_creation_leaves_its_instant_out(
    tenant: Tenant, collection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strictly before; the anchor may lie outside, and rows outside take no room on a page, nor a
    call of the server each."""
    monkeypatch.setattr(pages, "CALLS_MAX", 1)
    for at in range(1, 8):
        await write(tenant, collection, f"{at}", created_at_ms=at, updated_at_ms=at)
    await write(tenant, collection, "late", created_at_ms=9, updated_at_ms=0)
    before = Filters(before_created_at_ms=4)
    assert await walk(tenant, collection, before, 1) == ["3", "2", "1"]
    body = await tenant.views.reliability(before, limit=2, after_id="6", now_ms=NOW)
    assert ids(body, collection) == ["3", "2"]


@pytest.mark.parametrize("collection", NAMES)
@pytest.mark.parametrize("spelling", ["-", "singular", "upper"])
async def test_a_collection_has_several_spellings(
    tenant: Tenant, collection: str, spelling: str
) -> None:
    named = {
        "-": collection.replace("_", "-"),
        "singular": collection.removesuffix("s"),
        "upper": f" {collection.upper()} ",
    }[spelling]
    for name in NAMES:  # in all of them, so that the collection cannot be inferred
        for at in (1, 2):
            await write(tenant, name, f"{at}", at)
    body = await tenant.views.reliability(after_id=" 2 ", after_collection=named, now_ms=NOW)
    found = {name: ids(body, name) for name in NAMES}
    assert found == {name: ["2", "1"] for name in NAMES} | {collection: ["1"]}
    assert body["pagination"]["after_collection"] == collection
    assert body["pagination"]["after_id"] == " 2 "  # as it was given


async def test_an_explicit_collection_goes_stale_alone(tenant: Tenant) -> None:
    for collection in NAMES:
        await write(tenant, collection, "a")
    body = await tenant.views.reliability(
        after_id="missing", after_collection="tool_effects", now_ms=NOW
    )
    assert body["counts"] == dict.fromkeys(NAMES, 1) | {"tool_effects": 0}
    assert body["pagination"]["next"] == dict.fromkeys(NAMES)
    assert body["pagination"]["after_collection"] == "tool_effects"


async def test_an_unknown_collection_is_inferred(tenant: Tenant) -> None:
    """What is no collection's name counts as none; an id that two of them have shows nothing."""
    await write(tenant, "compensations", "a", 2)
    await write(tenant, "compensations", "b", 1)
    await write(tenant, "tool_effects", "both", 1)
    await write(tenant, "dead_letters", "both", 1)
    body = await tenant.views.reliability(after_id="a", after_collection="runs", now_ms=NOW)
    assert ids(body, "compensations") == ["b"]
    ambiguous = await tenant.views.reliability(after_id="both", now_ms=NOW)
    assert ambiguous["counts"] == dict.fromkeys(NAMES, 0)
    assert ambiguous["pagination"]["after_collection"] is None
    # A filter that lets one of the two through tells them apart.
    told = await tenant.views.reliability(Filters(status="open"), after_id="both", now_ms=NOW)
    assert told["pagination"]["after_collection"] == "dead_letters"


async def test_inference_ignores_activity_and_creation(tenant: Tenant) -> None:
    """An id outside of both still names its collection; the page behind it is what 4.11 says."""
    await write(tenant, "dead_letters", "idle", 3, metadata=records.MARK)
    await write(tenant, "dead_letters", "open", 2)
    body = await tenant.views.reliability(Filters(active_only=True), after_id="idle", now_ms=NOW)
    assert body["pagination"]["after_collection"] == "dead_letters"
    assert body["dead_letters"] == []  # not among what is shown: nothing is behind it
    bound = Filters(before_created_at_ms=3)
    body = await tenant.views.reliability(bound, after_id="idle", now_ms=NOW)
    assert ids(body, "dead_letters") == ["open"]


@pytest.mark.parametrize("collection", NAMES)
async def test_inference_holds_to_run_status_and_source(tenant: Tenant, collection: str) -> None:
    """As does a cursor of a named collection: behind what the filters do not show there is nothing."""
    await write(tenant, collection, "a", 2)
    await write(tenant, collection, "b", 1)
    wanted = [Filters(run_id="run-b"), Filters(status=OTHER[collection])]
    if collection in ("tool_effects", "dead_letters"):
        wanted.append(Filters(source_type="stateful_wait"))
    for filters in wanted:
        body = await tenant.views.reliability(filters, after_id="a", now_ms=NOW)
        assert body["pagination"]["after_collection"] is None
    await write(tenant, collection, "c", 0, status=OTHER[collection])
    shown = Filters(status=OTHER[collection])
    for after_id, found in (("c", []), ("a", [])):
        body = await tenant.views.reliability(
            shown, after_id=after_id, after_collection=collection, now_ms=NOW
        )
        assert ids(body, collection) == found


@pytest.mark.parametrize("blank", [None, "", "  "])
async def test_a_blank_cursor_is_none(tenant: Tenant, blank: str | None) -> None:
    await write(tenant, "outbox", "a")
    body = await tenant.views.reliability(
        after_id=blank, after_collection="tool_effects", now_ms=NOW
    )
    assert body["counts"]["outbox"] == 1
    assert body["pagination"]["after_id"] == blank
    assert body["pagination"]["after_collection"] is None


async def test_a_full_last_page_leads_to_an_empty_one(tenant: Tenant) -> None:
    await write(tenant, "outbox", "a")
    body = await tenant.views.reliability(limit=1, now_ms=NOW)
    cursor = body["pagination"]["next"]["outbox"]
    assert cursor == {"after_id": "a", "after_collection": "outbox"}
    last = await tenant.views.reliability(limit=1, **cursor, now_ms=NOW)
    assert last["outbox"] == []
    assert last["pagination"]["next"]["outbox"] is None


@pytest.mark.parametrize(
    ("given", "used"), [(None, 250), (0, 1), (-5, 1), (1, 1), (1_000, 1_000), (10**9, 1_000)]
)
async def test_limits_are_brought_within_their_bounds(
    tenant: Tenant, given: int | None, used: int
) -> None:
    assert (await tenant.views.reliability(limit=given, now_ms=NOW))["limit"] == used


async def test_a_page_has_these_keys(tenant: Tenant) -> None:
    await tenant.ledger.runs.upsert(records.run(tenant.context, RUN), now_ms=NOW)
    await write(tenant, "tool_effects", "ours")
    await write(tenant, "tool_effects", "theirs", run_id="run-b")
    body = await tenant.views.reliability(now_ms=NOW)
    common = {*NAMES, "counts", "limit", "pagination"}
    assert set(body) == common | {"source"}
    assert body["source"] == "stateful_runtime_reliability"
    assert set(body["counts"]) == set(body["pagination"]["next"]) == set(NAMES)
    assert set(body["pagination"]) == {
        "after_id",
        "after_collection",
        "before_created_at_ms",
        "next",
    }
    assert body["counts"]["tool_effects"] == 2
    # Of one run: its own name counts, whatever the filters say.
    of_run = await tenant.views.run_reliability(RUN, Filters(run_id="run-b"), now_ms=NOW)
    assert of_run is not None
    assert set(of_run) == common | {"run_id", "run"}
    assert (of_run["run_id"], of_run["run"]["run_id"]) == (RUN, RUN)
    assert ids(of_run, "tool_effects") == ["ours"]


async def test_an_intent_shows_what_others_know_of_it(server: Server, tenant_name: str) -> None:
    """Fields of the specification, without what only leasekit keeps; a sender who was not heard of is
    `unknown`."""
    policy = leasekit.GatePolicy(on_expiry="park")
    async with leasekit.connect(server.url, clock="caller", gate=policy) as kit:
        tenant = kit.tenant(tenant_name, "w")
        receipt = await tenant.gate.prepare(records.gate_event(RUN, "dispatch-1"), now_ms=1_000)
        assert receipt is not None
        for now, status in ((1_001, "claimed"), (codec_far(), "unknown")):
            body = await tenant.views.reliability(Filters(run_id=RUN), now_ms=now)
            [row] = body["outbox"]
            assert row["status"] == status
            assert row["schema_version"] == 1
            assert row["attempts"] == 1
            assert not {"revision", "fence", "facts", "cause", "owner", "asks"} & set(row)
            found = await tenant.views.reliability(Filters(status=status), now_ms=now)
            assert found["counts"]["outbox"] == 1


def codec_far() -> int:
    """An instant at which every lease of the tests has ended."""
    return 1_000 + 13 * 3_600_000


@pytest.mark.parametrize("collection", NAMES)
@pytest.mark.parametrize("run_id", [None, RUN])
async def test_a_search_that_stops_says_where(
    tenant: Tenant, collection: str, run_id: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost behind the bound of a search: the short page has a cursor, which needs not be a
    record that the filters show."""
    monkeypatch.setattr(pages, "CALLS_MAX", 1)
    rare = OTHER[collection]
    await write(tenant, collection, "rare-2", 1, status=rare)
    await write(tenant, collection, "Rare-1:|", 5_000, status=rare)
    await fill(tenant, collection)
    filters = Filters(status=rare, run_id=run_id)
    first = await tenant.views.reliability(filters, limit=2, now_ms=NOW)
    assert ids(first, collection) == ["Rare-1:|"]
    cursor = first["pagination"]["next"][collection]
    assert set(cursor) == {"after_id", "after_collection", "after_scan"}
    second = await tenant.views.reliability(filters, limit=2, **cursor, now_ms=NOW)
    assert ids(second, collection) == ["rare-2"]
    assert second["pagination"]["next"][collection] is None
    assert await walk(tenant, collection, filters, 1) == ["Rare-1:|", "rare-2"]


@pytest.mark.parametrize("collection", NAMES)
async def test_a_page_gathered_in_pieces_is_no_longer_than_asked(
    tenant: Tenant, collection: str
) -> None:
    """What fits stands before and behind a thousand that do not."""
    rare = OTHER[collection]
    await fill(tenant, collection)
    for id, at in (("first", 5_000), ("second", 30), ("third", 20), ("fourth", 10)):
        await write(tenant, collection, id, at, status=rare)
    body = await tenant.views.reliability(Filters(status=rare), limit=2, now_ms=NOW)
    assert ids(body, collection) == ["first", "second"]
    assert await walk(tenant, collection, Filters(status=rare), 2) == [
        *("first", "second", "third", "fourth")
    ]


async def test_names_that_are_no_words_are_cursors_too(tenant: Tenant) -> None:
    """Letters, signs and lengths of any kind: a record's id, a name of 400 bytes included."""
    names = ["Dead-Ä|:.~", "x" * 400, "全", "a b", "~7c"]
    for at, name in enumerate(names):
        await write(tenant, "dead_letters", name, 100 - at)
    assert await walk(tenant, "dead_letters", Filters(run_id=RUN), 1) == names
    for at, name in enumerate(names[:-1]):
        body = await tenant.views.reliability(limit=1, after_id=name, now_ms=NOW)
        assert ids(body, "dead_letters") == [names[at + 1]]


@pytest.mark.parametrize(
    ("field", "filters", "more"),
    [
        ("run_id", Filters(run_id="r" * 201), {}),
        ("status", Filters(status=5), {}),
        ("source_type", Filters(source_type="\ud800"), {}),
        ("before_created_at_ms", Filters(before_created_at_ms=-1), {}),
        ("before_created_at_ms", Filters(before_created_at_ms=True), {}),
        ("limit", Filters(), {"limit": "10"}),
        ("limit", Filters(), {"limit": True}),
        ("after_id", Filters(), {"after_id": "x" * 401}),
        ("after_id", Filters(), {"after_id": 7}),
    ],
)
async def test_what_is_no_filter_is_refused_by_name(
    tenant: Tenant, field: str, filters: Filters, more: dict[str, Any]
) -> None:
    with pytest.raises(InvalidInput) as refused:
        await tenant.views.reliability(filters, **more, now_ms=NOW)
    assert refused.value.field == field
