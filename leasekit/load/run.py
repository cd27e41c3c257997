"""A load test as its parent process runs it: start the processes, watch the server, end, clean up."""

from __future__ import annotations

import asyncio
import os
import platform
import secrets
import sys
import time
from collections.abc import Iterable
from contextlib import AsyncExitStack, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from leasekit import codec
from leasekit.client import Leasekit, Tenant, connect
from leasekit.connect import Backend, open_backend
from leasekit.demo.crew import Crew, DemoFailed, Member, Stalled
from leasekit.errors import InvalidInput, LeasekitError, Unavailable
from leasekit.keys import Keys, registry_keys, route_of
from leasekit.load import messages
from leasekit.load.judge import Machine, Outside, Result, Suspects, judge
from leasekit.load.plan import LoadFailed, Plan
from leasekit.load.screen import Screen
from leasekit.load.traffic import TARGET, lane_name
from leasekit.load.worker import ORG, payloads_of

__all__ = ["run"]

EMBEDDED_URL = "embedded://"
LOOK_EVERY_S = 0.5
DRAIN_EXTRA_S = 10.0
SETTLE_S = 3.0
COUNT_EVERY_S = 1.0
TENANTS_AT_A_TIME = 100
AWAY_MOST_S = 30.0
AWAY_PAUSE_S = 0.25


async def run(plan: Plan, url: str | None, screen: Screen, *, keep: bool = False) -> Result:
    """Run a load test. url: None = an embedded server in a temporary directory.

    keep: leave what was written, else every key of its own prefix is deleted. Raises InvalidInput,
    Unavailable and LoadFailed.
    """
    plan.check()
    _check_input(plan)
    where = url or EMBEDDED_URL
    if sys.platform == "win32":
        raise InvalidInput("the load test needs POSIX pipes: run it in WSL", field="load")
    if where.lower().startswith("memory:"):
        raise InvalidInput(
            "memory:// lives inside one process and the load test has several: leave --url out "
            "for an embedded server",
            field="url",
        )
    if keep and where == EMBEDDED_URL:
        raise InvalidInput(
            "--keep has no meaning for the embedded server of its own, whose data goes with it: "
            "name a server with --url, such as embedded://DIRECTORY",
            field="keep",
        )
    try:
        async with AsyncExitStack() as stack:
            stack.enter_context(screen)
            load = await _Load.open(plan, where, screen, stack, keep=keep)
            return await load.run()
    except DemoFailed as failed:
        raise LoadFailed(str(failed), failed.exit_code) from failed


def _check_input(plan: Plan) -> None:
    if plan.input_path is None:
        return
    try:
        for value in payloads_of(plan):
            codec.canonical_json(value, "input", bytes_max=codec.PAYLOAD_BYTES_DEFAULT)
    except OSError as error:
        raise InvalidInput(
            f"cannot read {plan.input_path}: {error.strerror}", field="input"
        ) from None
    except ValueError as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(
            f"{plan.input_path} is not JSON Lines: one of its first lines is no JSON value",
            field="input",
        ) from None


class _Load:
    """One run."""

    def __init__(
        self, plan: Plan, screen: Screen, kit: Leasekit, backend: Backend, url: str, prefix: str
    ) -> None:
        self._plan = plan
        self._screen = screen
        self._kit = kit
        self._server = _ServerWatch(backend)
        self._backend = backend
        self._url = url
        self._prefix = prefix
        self._reports = 0
        self._harness_us: list[float] = []
        self._progress: dict[str, messages.Progress] = {}
        self._produced: dict[str, messages.Produced] = {}
        self._notes: dict[str, messages.Notes] = {}
        self._suspects = Suspects()
        self._crew = Crew(
            self._note,
            lambda: self._reports,
            module="leasekit.load",
            decode=messages.decode_report,
        )

    @classmethod
    async def open(
        cls, plan: Plan, url: str, screen: Screen, stack: AsyncExitStack, *, keep: bool
    ) -> _Load:
        prefix = f"load-{secrets.token_hex(4)}"
        kit = await stack.enter_async_context(connect(url, prefix=prefix))
        if url == EMBEDDED_URL:
            url = kit.server.url  # names the temporary directory, so that the processes can join
        backend = await open_backend(url)
        stack.push_async_callback(backend.close)
        load = cls(plan, screen, kit, backend, url, prefix)
        if not keep:
            stack.push_async_callback(load._clean_up)
        stack.push_async_callback(load._crew.close)
        return load

    async def run(self) -> Result:
        plan = self._plan
        server = self._kit.server
        self._screen.say(
            f"server: {server.name} {'.'.join(map(str, server.version))} ({server.persistence}) at "
            f"{server.url}, prefix {self._prefix}"
        )
        members = [self._start(number) for number in range(plan.processes)]
        await self._crew.until(
            lambda: len(self._harness_us) == len(members), "all processes to connect"
        )
        watching = asyncio.create_task(self._server.keep_looking())
        try:
            stalled = await self._work(members)
        finally:
            watching.cancel()
        self._screen.begin("checking")
        still_there, sent = await self._count_rows()
        return judge(
            plan,
            self._notes.values(),
            self._produced.values(),
            self._suspects,
            Outside(
                still_there=still_there,
                sent=sent,
                server=f"{server.name} {'.'.join(map(str, server.version))} ({server.persistence})",
                server_cpu_seconds=self._server.cpu_s,
                server_restarts=self._server.restarts,
                harness_us=sum(self._harness_us) / len(self._harness_us),
                versions=_versions(),
                machine=_machine(),
                url=server.url,
                prefix=self._prefix,
                stalled=stalled,
            ),
        )

    # --- inside -----------------------------------------------------------------------------------

    def _start(self, number: int) -> Member:
        setup = messages.Setup(number=number, url=self._url, prefix=self._prefix, plan=self._plan)
        return self._crew.start("worker", f"load-{number + 1}", setup)

    async def _work(self, members: list[Member]) -> str:
        """Let the processes produce, then wait until all is acked; gives what hung, if anything."""
        stalled = ""
        await self._server.look()
        self._server.begin()
        self._screen.begin("running")
        for member in members:
            member.tell(messages.Begin())
        try:
            await self._crew.until(
                lambda: len(self._produced) == len(members), "all processes to end their work"
            )
            with suppress(Unavailable):
                await self._server.look()
            self._server.end()
            self._screen.begin("draining")
            await self._drain(len(members))
        except Stalled as error:
            # What the books say is worth more than that something hung.
            stalled = str(error)
        await self._crew.dismiss(*[member for member in members if not member.is_over])
        if len(self._notes) < len(members):
            raise LoadFailed("not all processes showed their books: nothing is proved", 1)
        return stalled

    async def _drain(self, processes: int) -> None:
        """Wait until every row is acked and the processes know it, for a lease's length at most."""
        give_up_at_s = time.monotonic() + self._plan.lease_ms / 1_000 + DRAIN_EXTRA_S
        settled_by_s = give_up_at_s
        while time.monotonic() < give_up_at_s:
            look_at_s = time.monotonic() + COUNT_EVERY_S
            await self._crew.until(
                lambda: self._is_drained(processes) or time.monotonic() > look_at_s,  # noqa: B023
                "what is left in line to be acked",
            )
            still_there, _ = await self._count_rows()
            if still_there:
                settled_by_s = give_up_at_s
            elif self._is_drained(processes) or time.monotonic() > settled_by_s:
                return
            else:
                settled_by_s = min(settled_by_s, time.monotonic() + SETTLE_S)
            await asyncio.sleep(AWAY_PAUSE_S)

    def _is_drained(self, processes: int) -> bool:
        """All have reported since they ended their work, and have acked what was enqueued."""
        if len(self._progress) < processes:
            return False
        total = _total(self._progress.values())
        return total.acked >= total.enqueued

    def _note(self, member: Member, report: messages.Report) -> None:
        self._reports += 1
        if isinstance(report, messages.Joined):
            self._harness_us.append(report.harness_us)
        elif isinstance(report, messages.Progress):
            self._progress[member.name] = report
            self._screen.show(_total(self._progress.values()))
        elif isinstance(report, messages.Produced):
            self._produced[member.name] = report
            self._progress.pop(member.name, None)  # what counts now is what it says after this
        elif isinstance(report, messages.Suspects):
            self._suspects.add(report)
        elif isinstance(report, messages.Notes):
            self._notes[member.name] = report

    async def _count_rows(self) -> tuple[int, int]:
        """Rows that are still there and rows that were sent, by the server's own tallies."""
        give_up_at_s = time.monotonic() + AWAY_MOST_S
        while True:
            try:
                still_there = sent = 0
                for at in range(0, self._plan.tenants, TENANTS_AT_A_TIME):
                    for one in await asyncio.gather(
                        *[tenant.outbox.counts() for tenant in self._tenants(at)]
                    ):
                        still_there += one.pending + one.claimed + one.unknown + one.dead_lettered
                        sent += one.sent
                return still_there, sent
            except Unavailable:
                if time.monotonic() > give_up_at_s:
                    raise
                await asyncio.sleep(AWAY_PAUSE_S)

    def _tenants(self, start: int) -> list[Tenant]:
        """Some of the tenants that the processes use, from number `start` on."""
        end = min(start + TENANTS_AT_A_TIME, self._plan.tenants)
        return [self._kit.tenant(ORG, f"tenant-{number}") for number in range(start, end)]

    async def _clean_up(self) -> None:
        """Delete every key that the run can have made; they all begin with its own prefix."""
        plan = self._plan
        try:
            await self._backend.command("UNLINK", *registry_keys(self._prefix).values())
            for at in range(0, plan.tenants, TENANTS_AT_A_TIME):
                deletions = []
                for tenant in self._tenants(at):
                    keys = Keys(self._prefix, tenant.tag)
                    nouns = [
                        str(getattr(keys, noun)) for noun in keys.__slots__ if noun != "tenant"
                    ]
                    lines = [
                        keys.outbox_due(route_of(lane_name(lane), TARGET))
                        for lane in range(plan.lanes)
                    ]
                    deletions.append(self._backend.command("UNLINK", *nouns, *lines))
                await asyncio.gather(*deletions)
        except LeasekitError:
            self._screen.say(f"not cleaned up: the server is away; delete {self._prefix}:* there")


class _ServerWatch:
    """The server's processor time and restarts, looked at twice a second.

    What a server used between the last look and its end is not seen.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._run_id = ""
        self._last_s = 0.0
        self._is_measuring = False
        self.cpu_s = 0.0
        self.restarts = 0

    def begin(self) -> None:
        self._is_measuring = True

    def end(self) -> None:
        self._is_measuring = False

    async def keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            with suppress(Unavailable):
                await self.look()

    async def look(self) -> None:
        text: bytes = await self._backend.command("INFO")
        lines = text.decode(errors="replace").splitlines()
        facts = dict(line.split(":", 1) for line in lines if ":" in line)
        used_s = float(facts.get("used_cpu_sys", 0)) + float(facts.get("used_cpu_user", 0))
        run_id = facts.get("run_id", "")
        if run_id != self._run_id:
            self.restarts += bool(self._run_id)
            self._last_s = 0.0 if self._run_id else used_s
            self._run_id = run_id
        if self._is_measuring:
            self.cpu_s += used_s - self._last_s
        self._last_s = used_s


def _total(reports: Iterable[messages.Progress]) -> messages.Progress:
    """The sum of what the processes report."""
    rows = [msgspec.structs.astuple(report) for report in reports]
    return messages.Progress(*[sum(column) for column in zip(*rows, strict=True)])


def _versions() -> dict[str, str]:
    found = {"leasekit": version("leasekit"), "python": platform.python_version()}
    for package in ("redis", "hiredis", "msgspec", "uvloop"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _machine() -> Machine:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return Machine(cores=cores or 1, cpu=cpu, system=f"{platform.system()} {platform.release()}")
