"""The commands. Each one: open the server, ask, show; all that can go wrong is `failures`' business."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any, TypeVar

import msgspec
from cyclopts import App, Group, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leasekit.cli import intents, reading, tables
from leasekit.cli.failures import EXIT_BROKEN, EXIT_NO_READER, report
from leasekit.cli.reading import Document, open_kit, tenant_named
from leasekit.client import Leasekit
from leasekit.demo import story
from leasekit.demo.loop import loop_factory
from leasekit.demo.screen import SilentScreen, screen_for
from leasekit.errors import InvalidInput
from leasekit.load.plan import MIX_DEFAULT, Plan, parse_mix

__all__ = ["run"]

LIMIT_DEFAULT = 20

# Paragraphs are one line each: they are wrapped where they are shown.
HELP = (
    "Claims, leases and idempotency keys on Redis or Valkey.\n\n"
    "To see it work: leasekit demo. To look at a server: leasekit counts --url redis://localhost. "
    "What changes something asks first, or takes --yes. Payloads are hidden unless told otherwise."
)
EPILOGUE = (
    "Exit codes: 0 all is well. 1 a promise was broken, or data is damaged. 2 the command or its "
    "input is wrong. 3 what was asked for is not there. 4 the server cannot be reached. "
    "130 interrupted."
)

T = TypeVar("T")

app = App(
    name="leasekit",
    help=HELP,
    help_epilogue=EPILOGUE,
    help_format="plaintext",
    help_formatter="plain",
    version=version("leasekit"),
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
)
show_app = App(name="show", help="Show all that is known of one intent, row, key or lease.")
app.command(show_app)


@Parameter(name="*", group=Group("Server and form"))
@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """Options of all commands."""

    url: Annotated[str | None, Parameter(env_var="LEASEKIT_URL")] = None
    "The server: redis://, rediss://, unix:// or embedded://DIRECTORY."
    prefix: str = "lk"
    "What all keys begin with."
    tenant: Annotated[str | None, Parameter(env_var="LEASEKIT_TENANT")] = None
    "Whose: org/workspace or org/workspace/deployment."
    json: bool = False
    "Give one JSON document instead of a table."


@Parameter(name="*", group=Group("Page"))
@dataclass(frozen=True, slots=True, kw_only=True)
class PageOptions:
    """Options of lists."""

    limit: int = LIMIT_DEFAULT
    "At most so many, from 1 to 1000."
    cursor: str | None = None
    "Go on where an earlier page ended."


COMMON = Common()
PAGE = PageOptions()


def run(arguments: Sequence[str]) -> int:
    """Run one command; gives the exit code."""
    try:
        code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has read enough; the interpreter must not complain about it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_NO_READER
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
    return code if isinstance(code, int) else 0


# --- the commands ---------------------------------------------------------------------------------


@app.command
def demo(
    *,
    input: str | None = None,
    rows: int = 5_000,
    producers: int = 2,
    dispatchers: int = 4,
    keep: str | None = None,
    url: str | None = None,
    prefix: str = COMMON.prefix,
    json: bool = False,
) -> int:
    """Do the real job, hurt two processes, prove that nothing is lost.

    Producers enqueue; dispatchers claim, deliver and ack; a destination keeps
    its own ledger. Half-way one dispatcher is killed and one is stopped, each
    after a delivery and before its acks. At the end all accounts are compared.
    Finished rows are kept for an hour, at most 20 000 rows or 128 MiB of them.

    Parameters
    ----------
    input
        A file of JSON values to enqueue, one a line. Else they are made up.
    rows
        How many rows to enqueue, at least 20.
    producers
        How many processes enqueue.
    dispatchers
        How many processes claim, deliver and ack, at least 3.
    keep
        A directory for the data, which stays there to be looked at.
    url
        A server to use, always in a new tenant. Else it starts one.
    prefix
        What all keys begin with.
    json
        Give one JSON document instead of progress and a table.
    """
    options = story.Options(
        url=url,
        keep=keep,
        prefix=prefix,
        input_path=input,
        rows=rows,
        producers=producers,
        dispatchers=dispatchers,
    )
    console = tables.make_console()
    screen = SilentScreen() if json else screen_for(console)
    result = _run(story.run(options, screen))
    if json:
        _write_json(msgspec.to_builtins(result))
    else:
        console.print(tables.demo_table(result))
    if keep and not json:
        look = _options(url=result.url, prefix=_unless(prefix, COMMON.prefix), tenant=result.tenant)
        _say(console, f"look at it: {shlex.join(['leasekit', 'rows', *look])}")
    for promise in result.broken:
        sys.stderr.write(f"leasekit: broken: {promise}\n")
    return EXIT_BROKEN if result.broken else 0


@app.command
def load(
    *,
    url: str | None = None,
    rate: float | None = None,
    coroutines: int = 100,
    processes: int = 1,
    tenants: int = 1,
    lanes: int = 1,
    payload_bytes: int = 200,
    input: str | None = None,
    mix: str = MIX_DEFAULT,
    duration: float | None = None,
    count: int | None = None,
    lease_ms: int = 30_000,
    seed: int = 0,
    keep: bool = False,
    json: bool = False,
) -> int:
    """Put a server under load, measure, prove that nothing is lost.

    Closed loop: so many coroutines, each doing one thing after the other. Open
    loop (--rate): things arrive at random whether or not the server keeps up,
    and their latencies count from then. It goes on while the server is killed
    and started again. It works in a prefix of its own, load-RANDOM, and deletes
    it at the end.

    Parameters
    ----------
    url
        The server. Else it starts one.
    rate
        Arrivals a second, of all processes together: an open loop.
    coroutines
        Of all processes together; with --rate, how many things at a time.
    processes
        How many processes work.
    tenants
        How many tenants the work is spread over.
    lanes
        How many lanes each tenant has.
    payload_bytes
        The size of a row's payload, as JSON.
    input
        A file of JSON values to enqueue, one a line; its first 1000 are used.
    mix
        Weights: lifecycle (enqueue, claim, ack), nack and extend (the same with
        a nack or an extend), lease (acquire, release), idempotency (reserve,
        complete). Such as lifecycle=8,nack=1,lease=1.
    duration
        Seconds; 10 if there is no --count either.
    count
        How many things to do, instead of a duration.
    lease_ms
        How long a claim or lease is held at most, in milliseconds.
    seed
        Another number: other choices and arrivals.
    keep
        Leave everything that was written on the server.
    json
        Give one line of JSON instead of progress and a table.
    """
    try:
        # Imported here: of all commands only this one needs hdrhistogram.
        from leasekit.load import run as load_run
        from leasekit.load import screen as load_screen
        from leasekit.load.tables import figures_table, latencies_table
    except ModuleNotFoundError as error:
        if error.name != "hdrh":
            raise
        raise InvalidInput(
            "the load test needs hdrhistogram: pip install 'leasekit[cli]'", field="load"
        ) from None
    plan = Plan(
        rate=rate,
        coroutines=coroutines,
        processes=processes,
        tenants=tenants,
        lanes=lanes,
        payload_bytes=payload_bytes,
        input_path=input,
        mix=parse_mix(mix),
        duration_s=duration,
        count=count,
        lease_ms=lease_ms,
        seed=seed,
    )
    console = tables.make_console()
    screen = load_screen.SilentScreen() if json else load_screen.screen_for(console)
    result = _run(load_run.run(plan, url, screen, keep=keep))
    if json:
        _write_json(msgspec.to_builtins(result))
    else:
        console.print(latencies_table(result))
        console.print(figures_table(result))
    for promise in result.broken:
        sys.stderr.write(f"leasekit: broken: {promise}\n")
    return EXIT_BROKEN if result.broken else 0


@app.command
def counts(
    *,
    lane: str | None = None,
    target: str | None = None,
    page: PageOptions = PAGE,
    common: Common = COMMON,
) -> None:
    """Count the rows in each state, by lane or by tenant.

    By lane where a tenant is given. Pending, claimed, unknown, dead_lettered:
    how many there are now. Sent, cancelled: how many there ever were.

    Parameters
    ----------
    lane
        Only rows of this lane.
    target
        Only rows for this target.
    """

    async def ask(kit: Leasekit) -> Document:
        if common.tenant is None:
            if lane is not None or target is not None:
                await tenant_named(kit, None)
            return await reading.counts_of_all(kit, limit=page.limit, cursor=page.cursor)
        tenant = await tenant_named(kit, common.tenant)
        return await reading.counts_of_one(kit, tenant, lane=lane, target=target)

    _answer(common, ask, tables.counts_table, ["counts"], page)


@app.command
def rows(
    *,
    status: str | None = None,
    lane: str | None = None,
    target: str | None = None,
    page: PageOptions = PAGE,
    common: Common = COMMON,
) -> None:
    """List the rows of the outbox: those in line first.

    After them the unknown, the dead-lettered and the finished, the oldest first.

    Parameters
    ----------
    status
        Only rows that are pending, claimed, unknown, dead_lettered, sent or cancelled.
    lane
        Only rows of this lane.
    target
        Only rows for this target; needs --lane.
    """

    async def ask(kit: Leasekit) -> Document:
        tenant = await tenant_named(kit, common.tenant)
        return await reading.rows(
            kit,
            tenant,
            status=status,
            lane=lane,
            target=target,
            limit=page.limit,
            cursor=page.cursor,
        )

    asked = _options(status=status, lane=lane, target=target)
    _answer(common, ask, tables.rows_table, ["rows", *asked], page)


@app.command
def leases(*, starts_with: str = "", page: PageOptions = PAGE, common: Common = COMMON) -> None:
    """List the leases that are held now, by name.

    Parameters
    ----------
    starts_with
        Only names that begin so.
    """

    async def ask(kit: Leasekit) -> Document:
        tenant = await tenant_named(kit, common.tenant)
        return await reading.leases(
            kit, tenant, starts_with=starts_with, limit=page.limit, cursor=page.cursor
        )

    asked = _options(starts_with=starts_with or None)
    _answer(common, ask, tables.leases_table, ["leases", *asked], page)


@app.command
def keys(*, page: PageOptions = PAGE, common: Common = COMMON) -> None:
    """List the idempotency keys, the soonest forgotten first."""

    async def ask(kit: Leasekit) -> Document:
        tenant = await tenant_named(kit, common.tenant)
        return await reading.keys(kit, tenant, limit=page.limit, cursor=page.cursor)

    _answer(common, ask, tables.keys_table, ["keys"], page)


@show_app.default
def show(
    id: str | None = None,
    /,
    *,
    key: str | None = None,
    reveal: bool = False,
    common: Common = COMMON,
) -> None:
    """Show one intent or row, by its id; an intent also by the key of its call.

    Parameters
    ----------
    id
        The id, as `leasekit intents`, `unknown` or `rows` list it.
    key
        Instead of an id: the dispatch id of a call.
    reveal
        Show the payload, or the results of calls, too.
    """
    wanted = intents.named(id, key)
    if not intents.is_intent(wanted):
        show_row(wanted, reveal=reveal, common=common)
        return

    async def ask(kit: Leasekit) -> Document:
        tenant = await tenant_named(kit, common.tenant)
        return await intents.show(kit, tenant, wanted, reveal=reveal)

    _answer(common, ask, tables.intent_text)


@show_app.command(name="row")
def show_row(id: str, /, *, reveal: bool = False, common: Common = COMMON) -> None:
    """Show one row: its state and why, its attempts and errors.

    Parameters
    ----------
    id
        The row's id, as `leasekit rows` lists it.
    reveal
        Show the payload too.
    """

    async def ask(kit: Leasekit) -> Document:
        tenant = await tenant_named(kit, common.tenant)
        return await reading.show_row(kit, tenant, id, reveal=reveal)

    _answer(common, ask, tables.one_thing)


@show_app.command(name="key")
def show_key(operation: str, key: str, /, *, reveal: bool = False, common: Common = COMMON) -> None:
    """Show one idempotency key and what its first use led to.

    Parameters
    ----------
    operation
        What the key is used for.
    key
        The key.
    reveal
        Show the details of the outcome too.
    """

    async def ask(kit: Leasekit) -> Document:
        tenant = await tenant_named(kit, common.tenant)
        return await reading.show_key(kit, tenant, operation, key, reveal=reveal)

    _answer(common, ask, tables.one_thing)


@show_app.command(name="lease")
def show_lease(name: str, /, *, common: Common = COMMON) -> None:
    """Show who holds a lease, since when and until when.

    Parameters
    ----------
    name
        The lease's name.
    """

    async def ask(kit: Leasekit) -> Document:
        tenant = await tenant_named(kit, common.tenant)
        return await reading.show_lease(kit, tenant, name)

    _answer(common, ask, tables.one_thing)


# --- inside ---------------------------------------------------------------------------------------


def _run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(work)


def _answer(
    common: Common,
    ask: Callable[[Leasekit], Coroutine[Any, Any, Document]],
    show: Callable[[Document], Table | Text],
    command: Sequence[str] = (),
    page: PageOptions = PAGE,
    *,
    empty: str = "nothing to show",
) -> None:
    """Ask the server and show the answer; `command` is what leads to the next page."""

    async def open_and_ask() -> Document:
        async with open_kit(common.url, common.prefix) as kit:
            return await ask(kit)

    document = _run(open_and_ask())
    if common.json:
        _write_json(document)
        return
    console = tables.make_console()
    if "items" in document and not document["items"]:
        _say(console, empty)
    else:
        shown = show(document)
        shown = tables.fitted(shown, console) if isinstance(shown, Table) else shown
        console.print(shown, soft_wrap=isinstance(shown, Text))
    if document.get("next_cursor"):
        _say(console, f"more: {_next_command(common, command, page, document['next_cursor'])}")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def _next_command(common: Common, command: Sequence[str], page: PageOptions, cursor: str) -> str:
    """The command that shows the next page, ready to be pasted."""
    words = ["leasekit", *command]
    if common.url and common.url != os.environ.get("LEASEKIT_URL"):
        # What may hold a password is not repeated.
        words += ["--url", common.url] if "@" not in common.url else []
    words += _options(
        prefix=_unless(common.prefix, COMMON.prefix),
        tenant=common.tenant,
        limit=_unless(page.limit, PAGE.limit),
        cursor=cursor,
    )
    hidden = " (and the same --url)" if common.url and "@" in common.url else ""
    return shlex.join(words) + hidden


def _unless(value: T, default: T) -> T | None:
    return None if value == default else value


def _options(**values: object) -> list[str]:
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def _write_json(document: Document) -> None:
    sys.stdout.write(msgspec.json.encode(document).decode() + "\n")


# Registers the gate's and the operators' commands, which take their options and their form from above.
from leasekit.cli import gating, operating  # noqa: E402, F401
