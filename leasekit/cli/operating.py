"""The operators' commands: what they look at, and what they change on their order.

What changes something asks on a terminal, or takes --yes; --dry-run only says what it would do. What
overrules a holder wants a reason. Long ones stop at --limit, show their progress on a terminal, and
print the command that goes on where they stopped.
"""

from __future__ import annotations

import asyncio
import getpass
import logging
import os
import shlex
import socket
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cyclopts import App, Group, Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from leasekit.cli import changing, checkup, intents, looking, tables
from leasekit.cli.app import (
    COMMON,
    PAGE,
    Common,
    PageOptions,
    _answer,
    _options,
    _run,
    _write_json,
    app,
)
from leasekit.cli.changing import Filter, duration_ms
from leasekit.cli.failures import EXIT_BROKEN
from leasekit.cli.reading import Document, check_known, open_kit, tenant_named
from leasekit.client import Leasekit, Tenant
from leasekit.errors import InvalidInput

__all__: list[str] = []

CHANGES_DEFAULT = 1_000
PURGE_DEFAULT = 100_000

explain_app = App(name="explain", help="Say why an intent, row, lease or key cannot be had now.")
release_app = App(name="release", help="Take a row, lease or key from its holder, for a reason.")
app.command(explain_app)
app.command(release_app)


@Parameter(name="*", group=Group("Changing"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Options of what changes something."""

    yes: bool = False
    "Do it without asking."
    dry_run: bool = False
    "Say what would be done, and do nothing."


@Parameter(name="*", group=Group("Which rows"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Which:
    """Options that choose rows."""

    lane: str | None = None
    "Only rows of this lane."
    target: str | None = None
    "Only rows for this target; needs --lane."
    older_than: str | None = None
    "Only what is older: 90s, 15m, 2h, 7d."
    limit: int = CHANGES_DEFAULT
    "Change about so many at most, then print how to go on."
    cursor: str | None = None
    "Go on where an earlier run ended."


@Parameter(name="*", group=Group("Overruling"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Overrule:
    """Options of what overrules a holder."""

    reason: str | None = None
    "Why; required. Rows and intents keep it."
    actor: str | None = None
    "Who says so; your user name and this host's by default."


CHANGE = Change()
WHICH = Which()
OVERRULE = Overrule()


# --- looking --------------------------------------------------------------------------------------


@app.command
def tenants(*, page: PageOptions = PAGE, common: Common = COMMON) -> None:
    """List the tenants, and when each was last seen."""

    async def ask(kit: Leasekit) -> Document:
        return await looking.tenants(kit, limit=page.limit, cursor=page.cursor)

    _answer(common, ask, _tenants_table, ["tenants"], page)


@app.command
def lanes(*, page: PageOptions = PAGE, common: Common = COMMON) -> None:
    """List a tenant's lanes: depth, in flight, the oldest due."""

    async def ask(kit: Leasekit) -> Document:
        tenant = await tenant_named(kit, common.tenant)
        return await looking.lanes(kit, tenant, limit=page.limit, cursor=page.cursor)

    _answer(common, ask, _lanes_table, ["lanes"], page)


@explain_app.default
def explain(id: str | None = None, /, *, key: str | None = None, common: Common = COMMON) -> None:
    """Say whether a row can be claimed now, or an intent be granted, and why not.

    Parameters
    ----------
    id
        The id, as `leasekit rows`, `intents` or `unknown` list it.
    key
        Instead of an id: the dispatch id of a call.
    """
    wanted = intents.named(id, key)
    find = intents.explain if intents.is_intent(wanted) else looking.explain_row
    _explain(common, lambda kit, tenant: find(kit, tenant, wanted))


@explain_app.command(name="lease")
def explain_lease(name: str, /, *, common: Common = COMMON) -> None:
    """Say whether a lease can be acquired now, and why not.

    Parameters
    ----------
    name
        The lease's name.
    """
    _explain(common, lambda kit, tenant: looking.explain_lease(kit, tenant, name))


@explain_app.command(name="key")
def explain_key(operation: str, key: str, /, *, common: Common = COMMON) -> None:
    """Say whether an idempotency key can be reserved now, and why not.

    Parameters
    ----------
    operation
        What the key is used for.
    key
        The key.
    """
    _explain(common, lambda kit, tenant: looking.explain_key(kit, tenant, operation, key))


@app.command
def tail(
    lane: str,
    target: str,
    /,
    *,
    count: int | None = None,
    every: str = "1s",
    common: Common = COMMON,
) -> None:
    """Follow a lane: its first rows in line, then each change.

    It looks once a second and so may miss what a row was in between. Ctrl-C
    ends it. With --json each line is one JSON document.

    Parameters
    ----------
    lane
        The lane.
    target
        The target.
    count
        End after so many lines.
    every
        How often to look: 500ms, 1s, 5s.
    """
    every_ms = looking.check_every(duration_ms(every, "every"))
    console = tables.make_console()

    async def follow() -> None:
        left = count
        async with open_kit(common.url, common.prefix) as kit:
            tenant = await tenant_named(kit, common.tenant)
            async for event in looking.tail(kit, tenant, lane, target, every_ms=every_ms):
                if common.json:
                    _write_json(event)
                else:
                    _say(console, _event_line(event))
                sys.stdout.flush()
                left = None if left is None else left - 1
                if left is not None and left <= 0:
                    return

    if count is not None and count < 1:
        raise InvalidInput("--count must be at least 1", field="count", limit=1)
    _run(follow())


@app.command
def doctor(*, deep: bool = False, common: Common = COMMON) -> int:
    """Examine the server; with --deep, the data of all tenants.

    Each line is ok, warn or fail, with what to do. It writes nothing. The exit
    code is 1 if anything failed. --deep reads all that is stored, page by page,
    also while others write; with --tenant, of that tenant alone.

    Parameters
    ----------
    deep
        Look through all data for what does not agree.
    """
    console = tables.make_console()
    # It says itself, in one line, what the client warns of while it connects.
    logger = logging.getLogger("leasekit")
    level = logger.level
    logger.setLevel(logging.ERROR)

    async def examine() -> Document:
        async with open_kit(common.url, common.prefix, allow_eviction=True) as kit:
            tenant = await tenant_named(kit, common.tenant) if common.tenant else None
            checks = [*await checkup.check_server(kit), await checkup.look_for_unknown(kit, tenant)]
            if deep:
                if tenant is not None:
                    await check_known(kit, tenant)
                looked_at = 0
                with _progress(common, "entries") as progress:

                    def look_on(count: int) -> None:
                        nonlocal looked_at
                        looked_at += count
                        progress(looked_at, None)

                    checks += [one async for one in checkup.check_data(kit, tenant, look_on)]
            return checkup.as_document(kit, checks)

    try:
        document = _run(examine())
    finally:
        logger.setLevel(level)
    if common.json:
        _write_json(document)
    else:
        for check in document["checks"]:
            line = f"{check['level']:<5} {check['name']}: {tables.clean(check['what'])}"
            _say(console, line + (f" -> {check['advice']}" if check["advice"] else ""))
    return 0 if document["healthy"] else EXIT_BROKEN


# --- changing -------------------------------------------------------------------------------------


@app.command
def redrive(
    id: str | None = None,
    /,
    *,
    cause: str | None = None,
    error: str | None = None,
    which: Which = WHICH,
    change: Change = CHANGE,
    common: Common = COMMON,
) -> None:
    """Let dead letters wait again, with all attempts before them.

    One by its id, or those that the options choose, the oldest first.

    Parameters
    ----------
    id
        One row's id; else the options choose.
    cause
        Only those dead by this: nacked, permanent, expired or resolved.
    error
        Only those whose last error holds this text.
    """
    wanted = _filter(id, which, cause, error)
    what = f"row {id}" if id else f"dead letters ({wanted})"

    async def act(kit: Leasekit, tenant: Tenant, progress: changing.Progress) -> Document:
        return await changing.redrive(
            kit, tenant, id=id, wanted=wanted, limit=which.limit, cursor=which.cursor,
            dry_run=change.dry_run, progress=progress,
        )  # fmt: skip

    asked = _options(cause=cause, error=error, **_chosen(which))
    _change(common, change, f"redrive {what}", act, ["redrive", *asked])


@app.command
def cancel(
    id: str | None = None,
    /,
    *,
    which: Which = WHICH,
    change: Change = CHANGE,
    common: Common = COMMON,
) -> None:
    """Take pending rows out of the line for good.

    One by its id, or those that the options choose. Rows that are held are left.

    Parameters
    ----------
    id
        One row's id; else the options choose, --lane at least.
    """
    wanted = _filter(id, which, None, None)
    if id is None and which.lane is None:
        raise InvalidInput("say which rows: an id, or at least --lane", field="lane")
    what = f"row {id}" if id else f"pending rows ({wanted})"

    async def act(kit: Leasekit, tenant: Tenant, progress: changing.Progress) -> Document:
        return await changing.cancel(
            kit, tenant, id=id, wanted=wanted, limit=which.limit, cursor=which.cursor,
            dry_run=change.dry_run, progress=progress,
        )  # fmt: skip

    _change(common, change, f"cancel {what}", act, ["cancel", *_options(**_chosen(which))])


@app.command
def purge(
    what: str,
    /,
    *,
    older_than: str,
    unfinished: bool = False,
    limit: int = PURGE_DEFAULT,
    change: Change = CHANGE,
    common: Common = COMMON,
) -> None:
    """Delete finished rows, dead letters or keys, the oldest first.

    What is deleted cannot be had back. Stopped half-way, the same command goes on.

    Parameters
    ----------
    what
        finished, dead or keys.
    older_than
        Only what ended, or was last seen, longer ago: 90s, 15m, 2h, 7d.
    unfinished
        Keys: reservations without an outcome as well; their effect may be under way.
    limit
        Delete so many rows at most, then print how to go on. Keys: no limit.
    """
    age_ms = duration_ms(older_than, "older-than")

    async def act(kit: Leasekit, tenant: Tenant, progress: changing.Progress) -> Document:
        return await changing.purge(
            kit, tenant, what, older_than_ms=age_ms, unfinished=unfinished, limit=limit,
            dry_run=change.dry_run, progress=progress,
        )  # fmt: skip

    order = f"delete {what} older than {older_than}"
    asked = _options(older_than=older_than, limit=None if limit == PURGE_DEFAULT else limit)
    _change(common, change, order, act, ["purge", what, *asked])


@release_app.command(name="row")
def release_row(
    id: str,
    /,
    *,
    overrule: Overrule = OVERRULE,
    change: Change = CHANGE,
    common: Common = COMMON,
) -> None:
    """Take a claimed row from its holder; it waits again.

    The attempt counts: a row without attempts left becomes a dead letter. Its
    holder's ack answers lost_claim, but what it has sent is sent. Rows that
    park are refused.

    Parameters
    ----------
    id
        The row's id.
    """
    actor, reason = _who_and_why(overrule)

    async def act(kit: Leasekit, tenant: Tenant, progress: changing.Progress) -> Document:
        return await changing.release_row(
            kit, tenant, id, actor=actor, reason=reason, dry_run=change.dry_run
        )

    _change(common, change, f"take row {id} from its holder", act)


@release_app.command(name="lease")
def release_lease(
    name: str,
    /,
    *,
    overrule: Overrule = OVERRULE,
    change: Change = CHANGE,
    common: Common = COMMON,
) -> None:
    """Free a lease that somebody holds.

    Its holder learns so at its next renewal and works on till then: stop it
    first. The reason is printed, and kept nowhere.

    Parameters
    ----------
    name
        The lease's name.
    """
    actor, reason = _who_and_why(overrule)

    async def act(kit: Leasekit, tenant: Tenant, progress: changing.Progress) -> Document:
        return await changing.release_lease(
            kit, tenant, name, actor=actor, reason=reason, dry_run=change.dry_run
        )

    _change(common, change, f"free lease {name}", act)


@release_app.command(name="key")
def release_key(
    operation: str,
    key: str,
    /,
    *,
    overrule: Overrule = OVERRULE,
    change: Change = CHANGE,
    common: Common = COMMON,
) -> None:
    """Free an idempotency key that is reserved, not completed.

    The next use runs again: ask the destination first whether the first one
    happened. The reason is printed, and kept nowhere.

    Parameters
    ----------
    operation
        What the key is used for.
    key
        The key.
    """
    actor, reason = _who_and_why(overrule)

    async def act(kit: Leasekit, tenant: Tenant, progress: changing.Progress) -> Document:
        return await changing.release_key(
            kit, tenant, operation, key, actor=actor, reason=reason, dry_run=change.dry_run
        )

    _change(common, change, f"free key {key} of operation {operation}", act)


# --- inside ---------------------------------------------------------------------------------------


def _explain(
    common: Common, find: Callable[[Leasekit, Tenant], Coroutine[Any, Any, Document]]
) -> None:
    async def ask(kit: Leasekit) -> Document:
        return await find(kit, await tenant_named(kit, common.tenant))

    async def open_and_ask() -> Document:
        async with open_kit(common.url, common.prefix) as kit:
            return await ask(kit)

    document = _run(open_and_ask())
    if common.json:
        _write_json(document)
        return
    console = tables.make_console()
    is_free = next(
        document[word]
        for word in ("claimable", "grantable", "acquirable", "reservable")
        if word in document
    )
    _say(console, "yes, it can be had now:" if is_free else "no, it cannot be had now:")
    for reason in document["why"]:
        _say(console, f"  {tables.clean(reason)}")
    rest = {name: value for name, value in document.items() if name != "why"}
    console.print(tables.one_thing(rest), soft_wrap=True)


def _filter(id: str | None, which: Which, cause: str | None, error: str | None) -> Filter:
    """The filter of the options; refused beside an id, which needs none."""
    older = None if which.older_than is None else duration_ms(which.older_than, "older-than")
    chosen = (which.lane, which.target, which.older_than, which.cursor, cause, error)
    if id is not None and any(one is not None for one in chosen):
        raise InvalidInput("give an id, or options that choose rows, not both", field="id")
    return Filter(
        lane=which.lane, target=which.target, cause=cause, error=error, older_than_ms=older
    )


def _chosen(which: Which) -> dict[str, object]:
    limit = None if which.limit == CHANGES_DEFAULT else which.limit
    return {
        "lane": which.lane, "target": which.target, "older_than": which.older_than, "limit": limit,
    }  # fmt: skip


def _who_and_why(overrule: Overrule) -> tuple[str, str]:
    if not overrule.reason or not overrule.reason.strip():
        raise InvalidInput(
            "--reason is required: nobody else decides this, say why", field="reason"
        )
    return overrule.actor or _who(), overrule.reason


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # A user without a name, as in some containers.
        raise InvalidInput("--actor is required: this user has no name", field="actor") from None
    return f"{user}@{socket.gethostname()}"


def _change(
    common: Common,
    change: Change,
    order: str,
    act: Callable[[Leasekit, Tenant, changing.Progress], Coroutine[Any, Any, Document]],
    command: list[str] | None = None,
) -> None:
    """Ask where a person can answer, act, and say what was done and how to go on."""
    console = tables.make_console()

    async def open_and_act() -> Document:
        async with open_kit(common.url, common.prefix) as kit:
            tenant = await tenant_named(kit, common.tenant)
            if not change.dry_run and not change.yes:
                await _ask(f"{order} of tenant {common.tenant}?")
            with _progress(common, "looked at") as progress:
                return await act(kit, tenant, progress)

    document = _run(open_and_act())
    if common.json:
        _write_json(document)
        return
    _say(console, _outcome_line(document))
    following = document.get("next_cursor")
    if command and (following or document.get("left")) and not document["dry_run"]:
        _say(console, f"more: {_going_on(common, command, change, following)}")


async def _ask(question: str) -> None:
    """InvalidInput unless a person says yes; nobody is asked where nobody can answer."""
    _check_can_ask()
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    answer = await asyncio.to_thread(sys.stdin.readline)
    if answer.strip().lower() not in ("y", "yes"):
        raise InvalidInput("not confirmed: nothing was changed", field="yes")


def _check_can_ask() -> None:
    if not sys.stdin.isatty():
        raise InvalidInput(
            "this changes data: say --yes, or --dry-run to see what it would do; nothing was changed",
            field="yes",
        )


def _going_on(common: Common, command: list[str], change: Change, cursor: str | None) -> str:
    words = ["leasekit", *command]
    has_secret = bool(common.url and "@" in common.url)
    words += _options(
        url=None if has_secret or common.url == os.environ.get("LEASEKIT_URL") else common.url,
        prefix=None if common.prefix == COMMON.prefix else common.prefix,
        tenant=common.tenant,
        cursor=cursor,
    )
    words += ["--yes"] if change.yes else []
    return shlex.join(words) + (" (and the same --url)" if has_secret else "")


def _outcome_line(document: Document) -> str:
    if "deleted" in document:
        return f"deleted {document['deleted']}, {document['left']} left"
    if "outcome" in document:
        holder = tables.clean(document["holder"] or "nobody")
        kept = "; the reason is kept with it" if document["reason_recorded"] else ""
        return f"{document['outcome']}: it was held by {holder}{kept}"
    outcomes = document["outcomes"] or {"nothing to do": 0}
    line = ", ".join(f"{word} {count}" for word, count in outcomes.items())
    ids = document["first_ids"]
    if document["dry_run"] and ids:
        line += f": {', '.join(ids)}" + (", ..." if sum(outcomes.values()) > len(ids) else "")
    return line


@contextmanager
def _progress(common: Common, title: str) -> Iterator[changing.Progress]:
    """A bar on a terminal; silence elsewhere."""
    shown = Console(stderr=True)
    if common.json or not shown.is_terminal:
        yield lambda done, total: None
        return
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        console=shown, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def _event_line(event: Document) -> str:
    words = [tables.when(event["at_ms"], event["at_ms"]).partition(" (")[0], event["id"]]
    words += [f"{event['status']:<13}", event["cause"]]
    if event.get("holder"):
        words.append(f"by {event['holder']}")
    if event.get("attempt_count"):
        words.append(f"attempt {event['attempt_count']}")
    if event.get("last_error"):
        words.append(f"last error: {event['last_error'][: tables.ERROR_CHARACTERS_SHOWN]}")
    return tables.clean(" ".join(words))


def _tenants_table(document: Document) -> Any:
    now_ms = document["now_ms"]
    return tables._table(
        [
            ("tenant", lambda one: one["tenant"]),
            ("last seen", lambda one: tables.when(one["last_seen_at_ms"], now_ms)),
            ("clock", lambda one: one["clock"] or "-"),
        ],
        document["items"],
    )


def _lanes_table(document: Document) -> Any:
    now_ms = document["now_ms"]
    return tables._table(
        [
            ("lane", lambda one: one["lane"]),
            ("target", lambda one: one["target"]),
            ("depth", lambda one: one["depth"]),
            ("in flight", lambda one: one["in_flight"]),
            ("unknown", lambda one: one["unknown"]),
            ("dead", lambda one: one["dead_lettered"]),
            ("oldest due", lambda one: tables.when(one["oldest_due_at_ms"], now_ms)),
            ("last enqueue", lambda one: tables.when(one["last_enqueue_at_ms"], now_ms)),
        ],
        document["items"],
    )
