"""What the gate's commands find out and decide: intents, what nobody knows, and lost data.

A verdict is about what was shown: its revision (of a row, its claim count) goes into the order, so
that what has changed meanwhile is not decided blindly. Results of calls are left out here, so that
nothing further up can show them by mistake; `reveal` is the one way around.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal, cast

import msgspec

from leasekit import codec
from leasekit.cli.failures import NotThere
from leasekit.cli.reading import GATE, Document, check_known, shown_row, tenant_text
from leasekit.cli.tables import span
from leasekit.client import Leasekit, Tenant
from leasekit.doctor import read_intent_state
from leasekit.errors import InvalidInput
from leasekit.gate import Intent, IntentStatus, Resolution
from leasekit.gate.identity import outbox_id
from leasekit.keys import Keys, tenant_parts
from leasekit.model import ResolveOutcome, Row, RowStatus
from leasekit.scope import decode_cursor, encode_cursor

__all__ = [
    "decide",
    "explain",
    "gate_status",
    "intents",
    "lost_data",
    "named",
    "open_gate",
    "show",
    "to_decide",
    "unknown",
    "unknown_of",
]

Verdict = Literal["sent", "failed", "not_sent"]
RowVerdict = Literal["sent", "redrive", "dead"]

INTENT_START = "outbox-"
INTENT_VERDICTS = ("sent", "failed", "not_sent")
ROW_VERDICTS = ("sent", "redrive", "dead")
TENANTS_A_LOOK = 100
LINES_A_PAGE = 500


def named(id: str | None, key: str | None) -> str:
    """The id that is meant: given, or made of a dispatch id."""
    if (id is None) == (key is None):
        raise InvalidInput("give an id, or --key with a dispatch id", field="id")
    if key is None:
        return id or ""
    return outbox_id(codec.check_text(key, "key"))


def is_intent(id: str) -> bool:
    """Whether an id is an intent's; rows have ids of another form."""
    return id.startswith(INTENT_START)


async def _intent(kit: Leasekit, tenant: Tenant, id: str, state: str = "") -> Intent:
    intent = await tenant.gate.get(id)
    if intent is None:
        await check_known(kit, tenant)
        raise NotThere(
            f"intent {id} is not in tenant {tenant_text(tenant)}: it was never prepared there, or it "
            f"was sent or cancelled and forgotten{state}"
        )
    return intent


def _shown(intent: Intent, *, reveal: bool) -> Document:
    """All of an intent, the results that came back by their size unless they are revealed."""
    shown = msgspec.structs.asdict(intent)
    id = shown.pop("outbox_id")
    shown = {"kind": "intent", "id": id, **shown, "status": intent.status.value}
    shown["facts"] = []
    for fact in intent.facts:
        one = msgspec.structs.asdict(fact)
        result = one.pop("result")
        one["result_bytes"] = 0 if result is None else len(msgspec.json.encode(result))
        if reveal:
            one["result"] = result
        shown["facts"].append(one)
    return shown


def _brief(tenant: Tenant, intent: Intent) -> Document:
    """An intent as a line of a list."""
    return {
        "tenant": tenant_text(tenant),
        "kind": "intent",
        "id": intent.outbox_id,
        "status": intent.status.value,
        "cause": intent.cause,
        "operation": intent.operation,
        "tool": intent.tool,
        "target": intent.target,
        "idempotency_key": intent.idempotency_key,
        "run_id": intent.run_id,
        "owner": intent.owner,
        "attempts": intent.attempts,
        "fence": intent.fence,
        "updated_at_ms": intent.updated_at_ms,
        "claim_expires_at_ms": intent.claim_expires_at_ms,
        "unknown_since_ms": intent.unknown_since_ms,
        "asks": intent.asks,
        "ask_at_ms": intent.ask_at_ms,
        "revision": intent.revision,
    }


def _brief_row(tenant: Tenant, row: Row) -> Document:
    """A parked row in the same list."""
    return {
        "tenant": tenant_text(tenant),
        "kind": "row",
        "id": row.id,
        "status": row.status.value,
        "cause": row.cause,
        "lane": row.lane,
        "target": row.target,
        "dedupe_key": row.dedupe_key,
        "run_id": row.run_id,
        "owner": row.consumer,
        "attempts": row.attempt_count,
        "fence": row.fence,
        "unknown_since_ms": row.finished_at_ms,
        "claim_count": row.claim_count,
    }


# --- lists ----------------------------------------------------------------------------------------


async def intents(
    kit: Leasekit,
    tenant: Tenant,
    *,
    status: str | None,
    run_id: str | None,
    limit: int,
    cursor: str | None,
) -> Document:
    """A page of a tenant's intents, the last changed first."""
    if status is not None and status not in [one.value for one in IntentStatus]:
        words = ", ".join(one.value for one in IntentStatus)
        raise InvalidInput(f"--status must be one of {words}", field="status")
    page = await tenant.gate.list(status=status, run_id=run_id, limit=limit, cursor=cursor)
    if not page.items and cursor is None:
        await check_known(kit, tenant)
    return {
        "tenant": tenant_text(tenant),
        "now_ms": await kit.now_ms(),
        "items": [_brief(tenant, intent) for intent in page.items],
        "next_cursor": page.next_cursor,
    }


async def unknown(
    kit: Leasekit, tenant: Tenant | None, *, limit: int, cursor: str | None
) -> Document:
    """A page of what nobody knows, of one tenant or of all: of each its intents, then its rows."""
    codec.check_whole(limit, "limit", 1, codec.BATCH_MAX)
    tag, part, inside = decode_cursor(cursor, (str, str, str)) or ["", "intents", ""]
    items: list[Document] = []
    following = None
    async for one in _with_unknown(kit, tenant, tag):
        if one.tag != tag:
            tag, part, inside = one.tag, "intents", ""
        while part and following is None:
            left = limit - len(items)
            found, more = await _unknown_part(one, part, max(left, 1), inside or None)
            if found and not left:
                # The page is full, and there is more: it goes on with what was just seen.
                following = encode_cursor(tag, part, inside)
                break
            items += found
            inside = more or ""
            part = part if more else {"intents": "rows"}.get(part, "")
        if following is not None:
            break
    if tenant is not None and not items and cursor is None:
        await check_known(kit, tenant)
    return {
        "tenant": None if tenant is None else tenant_text(tenant),
        "now_ms": await kit.now_ms(),
        "items": items,
        "next_cursor": following,
    }


async def _unknown_part(
    tenant: Tenant, part: str, limit: int, cursor: str | None
) -> tuple[list[Document], str | None]:
    if part == "intents":
        page = await tenant.gate.unknown(limit=limit, cursor=cursor)
        return [_brief(tenant, intent) for intent in page.items], page.next_cursor
    if cursor is None:
        counts = await tenant.outbox.counts()
        if not counts.claimed + counts.unknown:
            return [], None  # Else all that wait in line would be looked through.
    rows = await tenant.outbox.list(status=RowStatus.UNKNOWN, limit=limit, cursor=cursor)
    return [_brief_row(tenant, row) for row in rows.items], rows.next_cursor


async def _with_unknown(kit: Leasekit, tenant: Tenant | None, first: str) -> AsyncIterator[Tenant]:
    """The tenant itself; else all that may have something unknown, from the encoded name `first` on.

    Rows that park are unknown before anybody has written so: only their lanes tell.
    """
    if tenant is not None:
        yield tenant
        return
    cursor: str | None = None
    if first:
        try:
            yield kit.tenant(*tenant_parts(first))
        except ValueError:
            raise InvalidInput(
                "cursor is not one that this list gave: start again without it", field="cursor"
            ) from None
        cursor = encode_cursor(first)
    while True:
        page = await kit.tenants(cursor, limit=TENANTS_A_LOOK)
        counts = await unknown_of(kit, page.items)
        lanes = [("ZCARD", Keys(kit.prefix, one.tag).outbox_lanes) for one in page.items]
        for one, found, has_rows in zip(
            page.items, counts, await kit.backend.look(*lanes), strict=True
        ):
            if found or has_rows:
                yield one
        cursor = page.next_cursor
        if cursor is None:
            return


async def unknown_of(kit: Leasekit, tenants: Sequence[Tenant]) -> list[int]:
    """Of each tenant, how many intents are unknown now; nothing is written."""
    now_ms = await kit.now_ms()
    named = [Keys(kit.prefix, tenant.tag) for tenant in tenants]
    found = await kit.backend.look(
        *[("ZCARD", keys.gate_unknown) for keys in named],
        *[("ZCOUNT", keys.gate_expiring, "-inf", now_ms) for keys in named],
    )
    written, ended = found[: len(named)], found[len(named) :]
    return [int(one) + int(other) for one, other in zip(written, ended, strict=True)]


# --- one intent -----------------------------------------------------------------------------------


async def show(kit: Leasekit, tenant: Tenant, id: str, *, reveal: bool) -> Document:
    intent = await _intent(kit, tenant, id)
    return {"tenant": tenant_text(tenant), "now_ms": await kit.now_ms()} | _shown(
        intent, reveal=reveal
    )


async def explain(kit: Leasekit, tenant: Tenant, id: str) -> Document:
    """Whether an intent can be granted now, why not, and what follows."""
    intent = await _intent(kit, tenant, id)
    now_ms = await kit.now_ms()
    is_grantable, reasons = why(intent, now_ms)
    return {
        "tenant": tenant_text(tenant),
        "now_ms": now_ms,
        "id": id,
        "operation": intent.operation,
        "idempotency_key": intent.idempotency_key,
        "status": intent.status.value,
        "cause": intent.cause,
        "grantable": is_grantable,
        "why": reasons,
        "owner": intent.owner,
        "fence": intent.fence,
        "attempts": intent.attempts,
        "on_expiry": intent.on_expiry,
        "claim_expires_at_ms": intent.claim_expires_at_ms,
        "unknown_since_ms": intent.unknown_since_ms,
        "asks": intent.asks,
        "ask_at_ms": intent.ask_at_ms,
    }


CANCELLED_BY = {
    "blocked": "its sender said that it was not sent",
    "absent": "its destination said that the effect is not there and will not come",
    "resolved": "an operator decided that it was not sent",
}
ENDED_BY = {
    "succeeded": "its sender said so",
    "failed": "its sender said so",
    "applied": "its destination said so",
    "resolved": "an operator decided so",
}


def why(intent: Intent, now_ms: int) -> tuple[bool, list[str]]:
    """Whether the next `prepare` of an intent's key is granted at an instant, and why, in words."""
    status = intent.status
    if status is IntentStatus.CLAIMED:
        return _why_claimed(intent, now_ms)
    if status is IntentStatus.UNKNOWN:
        return False, _why_unknown(intent, now_ms)
    if status is IntentStatus.DEAD_LETTERED:
        return False, [
            f"its destination was asked {_times(intent.asks)}, and could not tell what became of it",
            "it is not asked again; it leaves by a late word of its sender, or by a verdict:",
            _verdict_command(intent),
        ]
    if status is IntentStatus.CANCELLED:
        said = CANCELLED_BY.get(intent.cause, intent.cause)
        return True, [f"{said}: the next sender with the same arguments gets it"]
    if status is IntentStatus.PENDING:
        return True, ["nobody was granted it yet: the next sender gets it"]
    said = ENDED_BY.get(intent.cause, intent.cause)
    until = " until it is forgotten" if status is IntentStatus.SENT else ""
    return False, [
        f"it is {status.value}, {said}: its key is granted to nobody{until}",
        "use another key for another effect",
    ]


def _why_claimed(intent: Intent, now_ms: int) -> tuple[bool, list[str]]:
    owner = intent.owner or "a sender"
    left_ms = (intent.claim_expires_at_ms or 0) - now_ms
    if left_ms <= 0:
        how = "left it" if intent.cause == "left" else f"had it until {span(-left_ms)} ago"
        return True, [f"{owner} {how} without a word, and it reclaims: the next sender gets it"]
    after = "may be granted to the next sender: it reclaims"
    if intent.on_expiry == "park":
        after = "becomes unknown: it parks, because it may have been sent"
    return False, [
        f"{owner} has it for another {span(left_ms)}, unless it extends its lease",
        f"if that ends without a word, it {after}",
    ]


def _why_unknown(intent: Intent, now_ms: int) -> list[str]:
    since_ms = now_ms - (intent.unknown_since_ms or now_ms)
    asked = "its destination was not asked yet"
    if intent.asks:
        asked = f"its destination was asked {_times(intent.asks)}, and it is still not known"
    again_ms = (intent.ask_at_ms or now_ms) - now_ms
    may = f"it may be asked in {span(again_ms)}" if again_ms > 0 else "it may be asked now"
    owner = intent.owner or "a sender"
    return [
        f"{owner} had it until {span(since_ms)} ago; nobody knows whether it was sent",
        f"{asked}; {may} (tenant.gate.reconcile)",
        "it leaves by a late word of its sender, by its destination's answer, or by a verdict:",
        _verdict_command(intent),
    ]


def _verdict_command(intent: Intent) -> str:
    return f"leasekit resolve {intent.outbox_id} sent|failed|not_sent --reason ..."


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


# --- a verdict ------------------------------------------------------------------------------------


async def to_decide(kit: Leasekit, tenant: Tenant, id: str, verdict: str) -> Document:
    """What a verdict would be about, as it is now; refuses what nobody has to decide about."""
    words = INTENT_VERDICTS if is_intent(id) else ROW_VERDICTS
    if verdict not in words:
        noun = "an intent" if is_intent(id) else "a row"
        raise InvalidInput(
            f"the verdict about {noun} is one of {', '.join(words)}, not {verdict!r}: nothing was "
            "changed",
            field="verdict",
        )
    head = {"tenant": tenant_text(tenant), "now_ms": await kit.now_ms()}
    if is_intent(id):
        intent = await _intent(kit, tenant, id, "; nothing was changed")
        if intent.status not in (IntentStatus.UNKNOWN, IntentStatus.DEAD_LETTERED):
            raise NotThere(
                f"intent {id} is {intent.status.value}, there is nothing to decide: nothing was changed"
            )
        return head | _shown(intent, reveal=False)
    row = await tenant.outbox.get(id)
    if row is None:
        await check_known(kit, tenant)
        raise NotThere(
            f"row {id} is not in tenant {tenant_text(tenant)}: it was never enqueued there, or it "
            "was finished and forgotten; nothing was changed"
        )
    if row.status is not RowStatus.UNKNOWN:
        raise NotThere(
            f"row {id} is {row.status.value}, there is nothing to decide: nothing was changed"
        )
    return head | {"kind": "row"} | shown_row(row, reveal=False)


def consequences(seen: Document, verdict: str) -> list[str]:
    """What a verdict leads to, in words, for who is about to give it."""
    owner = seen.get("owner") or seen.get("consumer") or "its first sender"
    twice = (
        f"{owner} may still wake up and make the effect: with the next grant it is then made twice, "
        f"unless the destination refuses fence {seen['fence']} or takes two sends under one key "
        "for one; see that it is stopped"
    )
    late = "a late word of its sender that it was sent still counts"
    return {
        ("intent", "sent"): ["its key is granted to nobody until it is forgotten"],
        ("intent", "failed"): ["its key is granted to nobody", late],
        ("intent", "not_sent"): ["the next sender of its key is granted it", late, twice],
        ("row", "sent"): ["it is finished, and not delivered again"],
        ("row", "redrive"): ["it waits in line again, with all its attempts", twice],
        ("row", "dead"): ["it is a dead letter: leasekit redrive lets it wait again"],
    }[seen["kind"], verdict]


async def decide(
    tenant: Tenant, seen: Document, verdict: str, *, actor: str, reason: str, dry_run: bool
) -> Document:
    """Record a verdict about what was seen, unless that has changed since."""
    codec.check_text(actor, "actor")
    codec.check_text(reason, "reason", bytes_max=codec.ERROR_TEXT_MAX)
    id, kind = seen["id"], seen["kind"]
    mark = "revision" if kind == "intent" else "claim_count"
    outcome = "would_change"
    if not dry_run and kind == "intent":
        resolved = await tenant.gate.resolve(
            id, cast(Verdict, verdict), actor=actor, reason=reason, revision=seen[mark]
        )
        outcome, is_done = resolved.value, resolved is Resolution.RESOLVED
    elif not dry_run:
        redone = await tenant.outbox.resolve(
            id, cast(RowVerdict, verdict), actor=actor, reason=reason, claim_count=seen[mark]
        )
        outcome, is_done = redone.value, redone is ResolveOutcome.RESOLVED
    if not dry_run and not is_done:
        raise NotThere(
            f"{kind} {id} has changed since it was shown ({outcome}): nothing was changed; look again"
        )
    return {
        "tenant": tenant_text(tenant),
        "kind": kind,
        "id": id,
        "verdict": verdict,
        "dry_run": dry_run,
        "outcome": outcome,
        mark: seen[mark],
        "actor": actor,
        "reason_recorded": not dry_run,
        "consequences": consequences(seen, verdict),
        "seen": seen,
    }


# --- the gate as a whole --------------------------------------------------------------------------


def _read_dataset(stored: bytes | None) -> tuple[str | None, list[Document]]:
    """The name of a tenant's data, and the openings after losses."""
    name, *lines = (stored or b"").decode("utf-8", "replace").split("\n")
    openings = []
    for line in lines:
        lost, _, rest = line.partition(" ")
        at, _, note = rest.partition(" ")
        try:
            said = msgspec.json.decode(note, type=dict[str, Any])
            at_ms = int(at)
        except (msgspec.MsgspecError, ValueError):
            said, at_ms = {}, 0
        openings.append(
            {
                "lost": lost,
                "at_ms": at_ms,
                "actor": said.get("actor"),
                "reason": said.get("reason"),
            }
        )
    return name or None, openings


async def gate_status(
    kit: Leasekit, tenant: Tenant | None, *, limit: int, cursor: str | None
) -> Document:
    """Data, openings and numbers of each tenant; of one, also the exact number in each state."""
    if tenant is not None:
        await check_known(kit, tenant)
        tenants, following = [tenant], None
    else:
        page = await kit.tenants(cursor, limit=limit)
        tenants, following = page.items, page.next_cursor
    items = []
    for start in range(0, len(tenants), TENANTS_A_LOOK):
        items += await _numbers(kit, tenants[start : start + TENANTS_A_LOOK])
    if tenant is not None:
        items[0]["by_status"] = await _count_by_status(kit, tenant)
    return {
        "now_ms": await kit.now_ms(),
        "policy": {
            "tiers": sorted(GATE.tiers),
            "on_expiry": GATE.on_expiry,
            "lease_ms": GATE.lease_ms,
            "keep_ms": GATE.keep_ms,
            "durability": str(kit.gate_durability),
        },
        "items": items,
        "next_cursor": following,
    }


async def _numbers(kit: Leasekit, tenants: Sequence[Tenant]) -> list[Document]:
    named = [Keys(kit.prefix, tenant.tag) for tenant in tenants]
    found = await kit.backend.look(
        *[("GET", keys.gate_dataset) for keys in named],
        *[("ZCARD", keys.gate_updated) for keys in named],
        *[("ZCARD", keys.gate_dead) for keys in named],
        *[("ZCARD", keys.gate_done) for keys in named],
    )
    items = []
    for i, unknown in enumerate(await unknown_of(kit, tenants)):
        stored, every, dead, done = found[i :: len(named)]
        dataset, openings = _read_dataset(stored)
        items.append(
            {
                "tenant": tenant_text(tenants[i]),
                "dataset": dataset,
                "openings": openings,
                "intents": int(every),
                "unknown": unknown,
                "dead_lettered": int(dead),
                "sent_or_cancelled": int(done),
                # In no list of their own; while others write, the numbers may be a few apart.
                "others": max(int(every) - unknown - int(dead) - int(done), 0),
            }
        )
    return items


async def _count_by_status(kit: Leasekit, tenant: Tenant) -> dict[str, int]:
    counted: Counter[str] = Counter({status.value: 0 for status in IntentStatus})
    key, now_ms = Keys(kit.prefix, tenant.tag).gate_state, await kit.now_ms()
    cursor: Any = 0
    while True:
        cursor, flat = await kit.backend.command("HSCAN", key, cursor, "COUNT", LINES_A_PAGE)
        for line in flat[1::2]:
            state = read_intent_state(line)
            if state is None:
                counted["unreadable"] += 1
                continue
            is_over = state.on_expiry == "park" and state.lease_end_ms <= now_ms
            counted["unknown" if state.status == "claimed" and is_over else state.status] += 1
        if not int(cursor):
            return dict(counted)


async def lost_data(kit: Leasekit, tenant: Tenant, lost: str) -> Document:
    """What opening a gate would be about: the data that is here, and the data that is lost."""
    codec.check_token(lost, "dataset")
    keys = Keys(kit.prefix, tenant.tag)
    stored, count = await kit.backend.look(("GET", keys.gate_dataset), ("ZCARD", keys.gate_updated))
    dataset, openings = _read_dataset(stored)
    return {
        "tenant": tenant_text(tenant),
        "now_ms": await kit.now_ms(),
        "lost": lost,
        "dataset": dataset,
        "intents": int(count),
        "openings": openings,
    }


async def open_gate(
    tenant: Tenant, seen: Document, *, actor: str, reason: str, dry_run: bool
) -> Document:
    """Let senders that know lost data be granted intents again."""
    codec.check_text(actor, "actor")
    codec.check_text(reason, "reason", bytes_max=codec.ERROR_TEXT_MAX)
    is_open = any(opening["lost"] == seen["lost"] for opening in seen["openings"])
    outcome = "known" if seen["lost"] == seen["dataset"] else "would_change"
    if outcome != "known" and not dry_run:
        outcome = await tenant.gate.open(seen["lost"], actor=actor, reason=reason)
    return {
        "tenant": tenant_text(tenant),
        "dry_run": dry_run,
        "outcome": outcome,
        "was_open": is_open,
        "actor": actor,
        "reason_recorded": outcome == "opened" and not is_open,
        "seen": seen,
    }
