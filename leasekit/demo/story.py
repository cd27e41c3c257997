"""The demo, phase by phase, as the parent process runs it."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from urllib.parse import quote

from leasekit.client import Leasekit, connect
from leasekit.codec import new_id
from leasekit.connect import Backend, open_backend
from leasekit.demo import messages
from leasekit.demo.book import Book
from leasekit.demo.crew import Crew, Member, Stalled
from leasekit.demo.judge import Outside, Report, judge
from leasekit.demo.messages import RETENTION, Allow, Go, Hold, Pause, Setup
from leasekit.demo.producer import bodies
from leasekit.demo.screen import Screen
from leasekit.errors import InvalidInput
from leasekit.model import RowStatus
from leasekit.outbox import Outbox

__all__ = ["Options", "run"]

# A new tenant for each run: the demo must not deliver rows that are somebody's.
TENANT_ORG = "demo"
ROWS_LEAST, ROWS_MOST = 20, 10_000_000
# One is killed and one stopped: a third has to go on.
DISPATCHERS_LEAST, PROCESSES_MOST = 3, 64
WAITING_ROWS_MOST = 1_000
BATCH_ROWS_MOST = 100
# A dispatcher that holds needs rows to claim: so many batches at least are kept back for the two.
BATCHES = 20
LEASE_MS = 1_500
KEPT_ROWS_CHECKED_MOST = 2_000
KEPT_ROWS_A_PAGE = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the demo is told; `check` refuses what cannot be meant.

    url: None = an embedded server, with its data in `keep` (stays) or a temporary directory (does
    not). input_path: a file of JSON values, one a line; None = generated bodies.
    """

    url: str | None = None
    keep: str | None = None
    prefix: str = "lk"
    input_path: str | None = None
    rows: int = 5_000
    producers: int = 2
    dispatchers: int = 4

    @property
    def server_url(self) -> str:
        if self.url is not None:
            return self.url
        return f"embedded://{quote(os.path.realpath(self.keep)) if self.keep else ''}"

    def check(self) -> None:
        for name, value, least, most in (
            ("rows", self.rows, ROWS_LEAST, ROWS_MOST),
            ("producers", self.producers, 1, PROCESSES_MOST),
            ("dispatchers", self.dispatchers, DISPATCHERS_LEAST, PROCESSES_MOST),
        ):
            if not least <= value <= most:
                raise InvalidInput(
                    f"{name} must be {least} to {most}, not {value}", field=name, limit=most
                )
        if self.url and self.keep:
            raise InvalidInput(
                "--keep names a directory for the embedded server; it has no meaning with --url",
                field="keep",
            )
        if self.url and self.url.lower().startswith("memory:"):
            raise InvalidInput(
                "memory:// lives inside one process and the demo has several: leave --url out for "
                "an embedded server",
                field="url",
            )
        self._check_input()

    def _check_input(self) -> None:
        if self.input_path is None:
            return
        try:
            next(bodies(self.input_path))
        except OSError as error:
            raise InvalidInput(
                f"cannot read {self.input_path}: {error.strerror}", field="input"
            ) from None
        except ValueError as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(
                f"{self.input_path} is not JSON Lines: its first line is no JSON value",
                field="input",
            ) from None


async def run(options: Options, screen: Screen) -> Report:
    """Run the whole demo. Raises InvalidInput, DemoFailed and what `connect` raises."""
    options.check()
    if sys.platform == "win32":
        raise InvalidInput("the demo stops processes by POSIX signals: run it in WSL", field="demo")
    async with AsyncExitStack() as stack:
        demo = await Demo.open(options, screen, stack)
        try:
            await demo.start()
            await demo.reach_half()
            killed, stopped = await demo.hold_two()
            await demo.hurt(killed, stopped)
            await demo.wait_for_takeover(killed, stopped)
            await demo.wake(stopped)
            await demo.reach_end()
        except Stalled as stalled:
            # What the accounts say is worth more than that something hung.
            report = await demo.judge()
            report.broken.insert(0, str(stalled))
            return report
        return await demo.judge()


class Demo:
    """One run: the server, the crew and the book."""

    def __init__(
        self, options: Options, screen: Screen, kit: Leasekit, backend: Backend, url: str
    ) -> None:
        self._options = options
        self._screen = screen
        self._kit = kit
        self._backend = backend
        self._url = url
        self._tenant = (TENANT_ORG, new_id())
        self._book = Book()
        self._crew = Crew(
            self._note, lambda: (self._book.enqueued, self._book.applied, self._book.acked)
        )
        self._rows_released = 0
        self._dispatchers: list[Member] = []
        self._producers: list[Member] = []
        self._held_rows_kept = 0
        self._started_at_s = self._ended_at_s = self._cpu_before_s = 0.0

    @classmethod
    async def open(cls, options: Options, screen: Screen, stack: AsyncExitStack) -> Demo:
        stack.enter_context(screen)
        url = options.server_url
        kit = await stack.enter_async_context(
            connect(url, prefix=options.prefix, retention=RETENTION)
        )
        if url == "embedded://":
            url = kit.server.url  # names the temporary directory, so that children can join
        backend = await open_backend(url)
        stack.push_async_callback(backend.close)
        demo = cls(options, screen, kit, backend, url)
        stack.push_async_callback(demo._crew.close)
        return demo

    # --- the phases -------------------------------------------------------------------------------

    async def start(self) -> None:
        """The destination first, then those who deliver to it, then those who enqueue."""
        options = self._options
        self._screen.say(f"server: {self._server_name()} at {self._kit.server.url}")
        destination = self._crew.start("destination", "destination", Setup(name="destination"))
        await self._crew.until(lambda: bool(self._book.socket_path), "the destination's socket")
        self._dispatchers = self._start_all("dispatcher", options.dispatchers)
        self._producers = self._start_all("producer", options.producers)
        working = [destination, *self._dispatchers, *self._producers]
        await self._crew.until(
            lambda: all(member.state != "starting" for member in working), "all processes to start"
        )
        self._screen.say(
            f"started {options.producers} producers, {options.dispatchers} dispatchers and a "
            f"destination: {options.rows:,} rows to go"
        )
        self._cpu_before_s = (await self._server_facts())[0]
        self._started_at_s = time.monotonic()
        self._release(options.rows * 3 // 4)

    async def reach_half(self) -> None:
        half = self._options.rows // 2
        await self._crew.until(lambda: self._book.applied >= half, "half of the rows")

    async def hold_two(self) -> tuple[Member, Member]:
        """Bring two dispatchers to where they have delivered rows and not acked them yet.

        The others pause meanwhile, so that there is something left to deliver for these two.
        """
        killed, stopped, *others = self._dispatchers
        for member in others:
            member.tell(Pause())
        for member in (killed, stopped):
            member.tell(Hold())
        self._release(self._options.rows)
        held = self._book.held
        await self._crew.until(
            lambda: {killed.name, stopped.name} <= held.keys(), "two dispatchers to deliver"
        )
        for member in others:
            member.tell(Go())
        return killed, stopped

    async def hurt(self, killed: Member, stopped: Member) -> None:
        self._book.killed, self._book.stopped = killed.name, stopped.name
        killed.kill()
        stopped.stop()
        for member, what in ((killed, "killed (SIGKILL)"), (stopped, "stopped (SIGSTOP)")):
            count = len(self._book.held[member.name])
            self._screen.say(f"{member.name} {what}, {count} rows delivered and not acked")

    async def wait_for_takeover(self, killed: Member, stopped: Member) -> None:
        """Others claim, deliver and ack what the two had, once its leases have ended."""
        for member in (killed, stopped):
            await self._crew.until(
                lambda name=member.name: self._book.is_taken_over(name),  # type: ignore[misc]
                f"others to take over the rows of {member.name}",
            )
        self._screen.say("their rows were claimed, delivered and acked by others")

    async def wake(self, stopped: Member) -> None:
        """Let the stopped dispatcher go on: it tries one delivery again, and acks all it had."""
        held = self._book.held[stopped.name]
        rows = await asyncio.gather(*[self._outbox().get(id) for id, _ in held])
        self._held_rows_kept = sum(row is not None for row in rows)
        answers_before = self._book.reports_of[stopped.name]
        stopped.tell(Go())
        stopped.go_on()
        await self._crew.until(
            lambda: self._book.reports_of[stopped.name] > answers_before,
            f"the late acks of {stopped.name}",
        )
        self._screen.say(
            f"{stopped.name} went on (SIGCONT): {self._book.late_acks_refused} late acks refused, "
            f"{self._book.late_acks_accepted} accepted, "
            f"{self._book.refused_as_stale} deliveries refused as stale"
        )

    async def reach_end(self) -> None:
        rows = self._options.rows
        await self._crew.until(lambda: self._book.enqueued >= rows, "all rows to be enqueued")
        await self._crew.until(lambda: self._book.applied >= rows, "all rows to be delivered")
        await self._crew.until(lambda: self._book.acked >= rows, "all rows to be acked")

    async def judge(self) -> Report:
        """End the processes and compare the accounts."""
        self._ended_at_s = time.monotonic()
        cpu_after_s, memory_bytes = await self._server_facts()
        busy = [one for one in (*self._producers, *self._dispatchers) if not one.is_over]
        await self._crew.dismiss(*busy)
        [destination] = [one for one in self._crew.members if one.role == "destination"]
        destination.tell(messages.TellLedger())
        await self._crew.until(lambda: self._book.latencies is not None, "the ledger")
        await self._crew.dismiss(destination)
        checked, wrong = await self._check_kept_rows()
        counts = await self._outbox().counts()
        if self._options.url is not None:
            await self._leave_no_rows()
        return judge(
            self._book,
            Outside(
                counts=counts,
                rows_kept_checked=checked,
                rows_kept_wrong=wrong,
                held_rows_kept=self._held_rows_kept,
                seconds=self._ended_at_s - self._started_at_s,
                server=self._server_name(),
                tenant="/".join(self._tenant),
                url=self._url if self._options.url is None else self._kit.server.url,
                server_cpu_seconds=cpu_after_s - self._cpu_before_s,
                server_memory_peak_bytes=memory_bytes,
                parent_memory_peak_bytes=_memory_peak_bytes(),
                processes=len(self._crew.members) + 1,
            ),
        )

    # --- inside -----------------------------------------------------------------------------------

    def _note(self, member: Member, report: messages.Report) -> None:
        if isinstance(report, messages.Delivered):
            member.state = "holding"
        self._book.note(member.name, report)
        if isinstance(report, messages.Applied):
            self._allow()
        self._screen.show(self._book, self._crew.members, self._options.rows)

    def _release(self, rows: int) -> None:
        """Let so many rows be enqueued in all, as soon as there is room for them."""
        self._rows_released = rows
        self._allow()

    def _allow(self) -> None:
        order = Allow(min(self._book.applied + WAITING_ROWS_MOST, self._rows_released))
        for member in self._producers:
            member.tell(order)

    def _start_all(self, role: str, count: int) -> list[Member]:
        options = self._options
        org, workspace = self._tenant
        batch = max(1, min(options.rows // BATCHES, BATCH_ROWS_MOST))
        return [
            self._crew.start(
                role,
                f"{role}-{number + 1}",
                Setup(
                    name=f"{role}-{number + 1}",
                    number=number,
                    of=count,
                    url=self._url,
                    prefix=options.prefix,
                    org=org,
                    workspace=workspace,
                    input_path=options.input_path,
                    rows=options.rows,
                    batch=batch,
                    lease_ms=LEASE_MS,
                    destination=self._book.socket_path,
                ),
            )
            for number in range(count)
        ]

    def _outbox(self) -> Outbox:
        return self._kit.tenant(*self._tenant).outbox

    def _server_name(self) -> str:
        server = self._kit.server
        return f"{server.name} {'.'.join(map(str, server.version))} ({server.persistence})"

    async def _server_facts(self) -> tuple[float, int]:
        """The server's CPU seconds so far, and the most memory that its data ever took."""
        text: bytes = await self._backend.command("INFO")
        lines = text.decode(errors="replace").splitlines()
        facts = dict(line.split(":", 1) for line in lines if ":" in line)
        cpu_s = float(facts.get("used_cpu_sys", 0)) + float(facts.get("used_cpu_user", 0))
        return cpu_s, int(facts.get("used_memory_peak", 0))

    async def _check_kept_rows(self) -> tuple[int, int]:
        """Read finished rows back: how many, and how many another fence holds than was acked."""
        checked = wrong = 0
        cursor: str | None = None
        while checked < KEPT_ROWS_CHECKED_MOST:
            page = await self._outbox().list(
                status=RowStatus.SENT, limit=KEPT_ROWS_A_PAGE, cursor=cursor
            )
            for row in page.items:
                notes = self._book.rows.get(row.id)
                checked += 1
                wrong += notes is None or row.fence != notes.acked_fence
            cursor = page.next_cursor
            if cursor is None:
                break
        return checked, wrong

    async def _leave_no_rows(self) -> None:
        """On a server of the user's: delete what the demo finished there."""
        now_ms = time.time_ns() // 1_000_000 + RETENTION.finished_ms
        while await self._outbox().purge(before_ms=now_ms):
            pass


def _memory_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
