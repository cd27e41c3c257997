"""The child processes as the parent sees them: started, told, heard, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO, Any

import msgspec

from leasekit.demo import messages
from leasekit.demo.messages import Finish, Trouble

__all__ = ["Crew", "DemoFailed", "Member", "Stalled"]

STALL_S = 20.0
END_S = 5.0
LINE_BYTES_MOST = 4 * 2**20
LAST_WORDS_BYTES = 2_000

EXIT_BROKEN = 1


class DemoFailed(Exception):
    """The demo could not be carried out; `exit_code` is what the command ends with."""

    def __init__(self, message: str, exit_code: int = EXIT_BROKEN) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Stalled(DemoFailed):
    """Nothing moved for STALL_S."""


class Member:
    """One child process, of `module`. state: starting, running, holding, stopped, killed, ended."""

    def __init__(self, module: str, role: str, name: str, setup: msgspec.Struct) -> None:
        self.role = role
        self.name = name
        self.state = "starting"
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  -- closed by bury
        # The import path exactly as it is here: a child must not run another leasekit.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, role, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | {"PYTHONPATH": path},
            process_group=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._orders = self.process.stdin
        self.reports = self.process.stdout
        self.tell(setup)

    def __repr__(self) -> str:
        return f"<{self.name} pid {self.process.pid} {self.state}>"

    @property
    def is_over(self) -> bool:
        return self.state in ("killed", "ended")

    def tell(self, message: msgspec.Struct) -> None:
        """Write to the child; one that is gone is not told."""
        if self._orders.closed:
            return
        with contextlib.suppress(BrokenPipeError):
            self._orders.write(messages.encode(message))
            self._orders.flush()

    def stop(self) -> None:
        self.state = "stopped"
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.state = "running"
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.state = "killed"
        self.process.kill()

    def leave(self) -> None:
        """Let go of the child: it ends by itself, or by SIGKILL where it is stopped."""
        if self.state == "stopped":
            self.kill()
        with contextlib.suppress(BrokenPipeError):
            self._orders.close()

    def bury(self) -> tuple[int, str]:
        """Collect a process that has ended, or is made to: return code and last words."""
        try:
            code = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._orders.close()
        with self._errors as errors:
            size = errors.seek(0, os.SEEK_END)
            errors.seek(max(size - LAST_WORDS_BYTES, 0))
            words = errors.read().decode(errors="replace").strip()
        return code, words.rpartition("\n")[2]


class Crew:
    """All members. `note` is called with every report; `progress` gives a value that grows.

    module: what the processes run; `decode` reads a line of what they report.
    """

    def __init__(
        self,
        note: Callable[[Member, Any], None],
        progress: Callable[[], object],
        *,
        module: str = "leasekit.demo",
        decode: Callable[[bytes], Any] = messages.decode_report,
    ) -> None:
        self._note = note
        self._progress = progress
        self._module = module
        self._decode = decode
        self._changed = asyncio.Event()
        self._failure: DemoFailed | None = None
        self._listening: dict[Member, asyncio.Task[None]] = {}

    @property
    def members(self) -> list[Member]:
        return list(self._listening)

    def start(self, role: str, name: str, setup: msgspec.Struct) -> Member:
        member = Member(self._module, role, name, setup)
        self._listening[member] = asyncio.create_task(self._listen(member))
        return member

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Return when `condition` holds; asked after every report.

        Raises DemoFailed for a member that reported trouble or ended by itself, Stalled where
        `progress` stands still.
        """
        loop = asyncio.get_running_loop()
        before, since_s = self._progress(), loop.time()
        while True:
            if self._failure is not None:
                raise self._failure
            if condition():
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(since_s + STALL_S):
                    await self._changed.wait()
            if (now := self._progress()) != before:
                before, since_s = now, loop.time()
            elif loop.time() >= since_s + STALL_S:
                raise Stalled(f"nothing moved for {STALL_S:.0f} s while waiting for {what}")

    async def dismiss(self, *members: Member) -> None:
        """Tell members to end, and wait until they have; stopped ones cannot listen, and are killed."""
        for member in members:
            if member.state == "stopped":
                member.kill()
            member.tell(Finish())
        await self.until(
            lambda: all(member.is_over for member in members),
            f"the end of {', '.join(member.name for member in members)}",
        )

    async def close(self) -> None:
        """Leave no process behind, whatever state they are in."""
        for member in self.members:
            member.leave()
        if self._listening:
            await asyncio.wait(self._listening.values(), timeout=END_S)
        for member, listening in self._listening.items():
            if not listening.done():
                member.kill()
            await asyncio.wait([listening])

    async def _listen(self, member: Member) -> None:
        reader = asyncio.StreamReader(limit=LINE_BYTES_MOST)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), member.reports
        )
        try:
            while line := await reader.readline():
                self._hear(member, line)
                self._changed.set()
            self._see_end(member)
            self._changed.set()
        finally:
            transport.close()

    def _hear(self, member: Member, line: bytes) -> None:
        try:
            report = self._decode(line)
        except msgspec.MsgspecError:
            return  # Cut off by a kill; what it was about shows in the accounts.
        if isinstance(report, Trouble):
            self._fail(f"{member.name}: {report.message}", report.exit_code)
        elif member.state == "starting":
            member.state = "running"
        self._note(member, report)

    def _see_end(self, member: Member) -> None:
        code, last_words = member.bury()
        if member.state == "killed":
            return
        member.state = "ended"
        if code != 0:
            why = last_words or "it said nothing"
            self._fail(f"{member.name} ended by itself (return code {code}): {why}", EXIT_BROKEN)

    def _fail(self, message: str, exit_code: int) -> None:
        self._failure = self._failure or DemoFailed(message, exit_code)
