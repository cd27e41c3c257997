"""The gate's commands: intents, what nobody knows and what becomes of it, and lost data.

What decides something shows first what it is about. That goes to standard output, with --json into
the document; a question, and then what it is about as well, to standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.text import Text

from leasekit.cli import intents as asks
from leasekit.cli import operating, tables
from leasekit.cli.app import (
    COMMON,
    PAGE,
    Common,
    PageOptions,
    _answer,
    _options,
    _run,
    _say,
    _write_json,
    app,
)
from leasekit.cli.operating import CHANGE, OVERRULE, Change, Overrule
from leasekit.cli.reading import Document, open_kit, tenant_named
from leasekit.client import Leasekit, Tenant

__all__: list[str] = []

gate_app = App(name="gate", help="Look at the gates, and open one after data was lost.")
app.command(gate_app)


# --- looking --------------------------------------------------------------------------------------


@app.command
def intents(
    *,
    status: str | None = None,
    run: str | None = None,
    page: PageOptions = PAGE,
    common: Common = COMMON,
) -> None:
    """List the intents of the gate, the last changed first.

    A page looks at 1000 intents at most: with --status it may be short and go on.

    Parameters
    ----------
    status
        Only those pending, claimed, unknown, dead_lettered, sent, failed or cancelled.
    run
        Only those of this run.
    """

    async def ask(kit: Leasekit) -> Document:
        tenant = await tenant_named(kit, common.tenant)
        return await asks.intents(
            kit, tenant, status=status, run_id=run, limit=page.limit, cursor=page.cursor
        )

    asked = _options(status=status, run=run)
    _answer(common, ask, tables.intents_table, ["intents", *asked], page)


@app.command
def unknown(*, page: PageOptions = PAGE, common: Common = COMMON) -> None:
    """List the intents and rows of which nobody knows.

    Their holders vanished, and they park. Of one tenant, or of all. Intents come in
    the order in which their destinations may be asked. What has just become unknown
    is written down by this.
    """

    async def ask(kit: Leasekit) -> Document:
        tenant = await tenant_named(kit, common.tenant) if common.tenant else None
        return await asks.unknown(kit, tenant, limit=page.limit, cursor=page.cursor)

    empty = "nothing is unknown" if page.cursor is None else "nothing else is unknown"
    _answer(common, ask, tables.unknown_table, ["unknown"], page, empty=empty)


@gate_app.command(name="status")
def gate_status(*, page: PageOptions = PAGE, common: Common = COMMON) -> None:
    """Count the intents of each tenant, or of one by their states.

    With the name of the data that senders know, and who opened the gate after which
    loss. Of one tenant all intents are counted, so that it takes a while for many.
    """

    async def ask(kit: Leasekit) -> Document:
        tenant = await tenant_named(kit, common.tenant) if common.tenant else None
        return await asks.gate_status(kit, tenant, limit=page.limit, cursor=page.cursor)

    policy: list[str] = []

    def show(document: Document) -> Any:
        policy.append(tables.policy_text(document))
        return tables.gate_text(document) if common.tenant else tables.gates_table(document)

    _answer(common, ask, show, ["gate", "status"], page)
    for line in policy:
        _say(tables.make_console(), line)


# --- deciding -------------------------------------------------------------------------------------


@app.command
def resolve(
    id: str,
    verdict: str,
    /,
    *,
    overrule: Overrule = OVERRULE,
    change: Change = CHANGE,
    common: Common = COMMON,
) -> None:
    """Say what became of an intent or a parked row that nobody knows of.

    It shows what that is first. Whoever says not_sent or redrive lets it be sent
    again: if its first sender is only asleep, it may then be sent twice.

    Parameters
    ----------
    id
        The id, as `leasekit unknown` lists it.
    verdict
        Of an intent: sent, failed or not_sent. Of a row: sent, redrive or dead.
    """
    actor, reason = operating._who_and_why(overrule)

    async def look(kit: Leasekit, tenant: Tenant) -> Document:
        return await asks.to_decide(kit, tenant, id, verdict)

    async def act(tenant: Tenant, seen: Document) -> Document:
        return await asks.decide(
            tenant, seen, verdict, actor=actor, reason=reason, dry_run=change.dry_run
        )

    def tell(seen: Document) -> tuple[Text | None, list[str]]:
        show = tables.intent_text if seen["kind"] == "intent" else tables.one_thing
        return show(seen), [f"{verdict}: {one}" for one in asks.consequences(seen, verdict)]

    _decide(common, change, f"decide that {id} is {verdict}?", look, tell, act)


@gate_app.command(name="open")
def gate_open(
    *,
    dataset: Annotated[str, Parameter(allow_leading_hyphen=True)],
    overrule: Overrule = OVERRULE,
    change: Change = CHANGE,
    common: Common = COMMON,
) -> None:
    """Grant intents again to senders that know data which is lost.

    They are refused where the server was emptied, restored or swapped: what they sent
    before may be forgotten there, and be sent again. Restore what can be restored first.

    Parameters
    ----------
    dataset
        The name of the lost data, as the senders' error tells it.
    """
    actor, reason = operating._who_and_why(overrule)

    async def look(kit: Leasekit, tenant: Tenant) -> Document:
        return await asks.lost_data(kit, tenant, dataset)

    async def act(tenant: Tenant, seen: Document) -> Document:
        return await asks.open_gate(
            tenant, seen, actor=actor, reason=reason, dry_run=change.dry_run
        )

    _decide(
        common,
        change,
        f"let senders that know {dataset} be granted intents again?",
        look,
        lambda seen: (None, _meaning(seen)),
        act,
    )


def _meaning(seen: Document) -> list[str]:
    """What opening a gate means, for who is about to do it."""
    here = f"is {seen['dataset']}, with {seen['intents']} intents"
    if seen["dataset"] is None:
        here = "has no name: nothing was ever granted here"
    lines = [f"tenant {seen['tenant']}: the data that is here {here}"]
    if seen["lost"] == seen["dataset"]:
        return [*lines, "that is the data which was named: nothing has to be opened"]
    lines += [
        f"senders that know {seen['lost']} are refused: that data was lost, restored or swapped",
        "opening lets them be granted intents here again, from now on",
        "what was sent before, and is not recorded here, may then be sent once more",
        "restore what can be restored first, and ask the destinations what they got",
    ]
    for opening in seen["openings"]:
        if opening["lost"] == seen["lost"]:
            at = tables.when(opening["at_ms"], seen["now_ms"])
            lines.append(f"it was opened before, {at}, by {opening['actor']}")
    return lines


def _decide(
    common: Common,
    change: Change,
    question: str,
    look: Callable[[Leasekit, Tenant], Coroutine[Any, Any, Document]],
    tell: Callable[[Document], tuple[Text | None, list[str]]],
    act: Callable[[Tenant, Document], Coroutine[Any, Any, Document]],
) -> None:
    """Show what a decision is about, ask where a person can answer, and record it."""
    must_ask = not change.dry_run and not change.yes
    if must_ask:
        operating._check_can_ask()
    console = tables.make_console()

    async def open_and_decide() -> Document:
        async with open_kit(common.url, common.prefix) as kit:
            tenant = await tenant_named(kit, common.tenant)
            seen = await look(kit, tenant)
            if must_ask:
                _show(Console(stderr=True, highlight=False), *tell(seen))
                await operating._ask(question)
            elif not common.json:
                _show(console, *tell(seen))
            return await act(tenant, seen)

    document = _run(open_and_decide())
    if common.json:
        _write_json(document)
        return
    verdict = f": {document['verdict']}" if "verdict" in document else ""
    kept = "; who decided and why is kept" if document["reason_recorded"] else ""
    _say(console, f"{document['outcome']}{verdict}{kept}")


def _show(console: Console, story: Text | None, notes: list[str]) -> None:
    """What a decision is about, and what it leads to: that is prose, and broken between words."""
    if story is not None:
        console.print(story, soft_wrap=True)
    for note in notes:
        console.print(Text(tables.clean(note)))
