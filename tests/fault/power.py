"""A power cut, emulated: what a server had written and not synced is gone.

SIGKILL alone shows nothing of it, because what a process wrote is the kernel's by then. So the server
runs under strace, which notes each write and each fdatasync; after the kill, its append-only file is
cut to what had been written before the last completed fdatasync was begun (evidence/reliability 2.1).
Blocks that the disk wrote of its own accord are lost here as well: the worst that may happen.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from servers import ServerProcess

TRACE_SECONDS_MAX = 20
STEP_SECONDS = 0.01

# In this form strace is a grandchild, and the process that was started is the server itself.
STRACE = ("strace", "-D", "-f", "-y", "-s0", "--seccomp-bpf", "-etrace=write,fdatasync,fsync")

# `1 write(9</a.aof>, ""..., 50) = 50`; in two parts where another thread's call comes between.
_CALL = re.compile(r"(\d+) +(write|fdatasync|fsync)\(\d+<([^>]*)>.*?(?:\) += (-?\d+)|<unfinished)")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (?:write|fdatasync|fsync) resumed>.*\) += (-?\d+)")


def why_not() -> str | None:
    """Why strace cannot be used on this machine; None where it can."""
    try:
        tried = subprocess.run(
            [*STRACE, "-o", "/dev/null", "true"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "strace is not installed"
    return f"strace may not trace here: {tried.stderr.strip()}" if tried.returncode else None


class TracedServer:
    """A server that keeps an AOF, whose power can be cut once: `server.kill()`, then `come_back`.

    `config` as with ServerProcess.
    """

    def __init__(self, **config: str) -> None:
        self.server = ServerProcess(
            "valkey-9", appendonly="yes", auto_aof_rewrite_percentage="0", **config
        )
        self._trace = self.server.home / "trace"

    def start(self) -> None:
        self.server.under = [*STRACE, "-o", str(self._trace)]
        self.server.start()
        self._process_id = self.server.process_id

    def come_back(self) -> int:
        """Take from its file what was not synced when it was killed, and start it again, not traced.

        Gives the number of bytes that were lost.
        """
        lines = self._finished_trace()
        [path] = self.server.home.glob("appendonlydir/*.incr.aof")
        written, kept = path.stat().st_size, synced_bytes(lines, path)
        assert kept <= written, f"the trace has {kept} bytes synced, the file {written}"
        with path.open("r+b") as file:
            file.truncate(kept)
        self.server.under = []
        self.server.start()
        return written - kept

    def stop(self) -> None:
        self.server.stop()

    def _finished_trace(self) -> list[str]:
        """The lines of the trace, once strace has seen the end of the server."""
        # A short process id is padded.
        end = re.compile(rf"^{self._process_id} +\+\+\+ killed by SIGKILL", re.MULTILINE)
        give_up_at = time.monotonic() + TRACE_SECONDS_MAX
        while not end.search(trace := self._trace.read_text()):
            assert time.monotonic() < give_up_at, "strace did not see the end of the server"
            time.sleep(STEP_SECONDS)
        return trace.splitlines()


def synced_bytes(lines: Iterable[str], path: Path) -> int:
    """How many bytes of a file the trace shows to be synced, all of them written one after another."""
    name = str(path.resolve())
    written = synced = 0
    begun: dict[str, tuple[str, int]] = {}  # by thread: the call, and what was written before it
    for line in lines:
        if call := _CALL.match(line):
            thread, what, file, result = call.groups()
            if file != name:
                begun.pop(thread, None)
                continue
            before = written
        elif (resumed := _RESUMED.match(line)) and resumed[1] in begun:
            thread, result = resumed.groups()
            what, before = begun.pop(thread)
        else:
            continue
        if result is None:
            begun[thread] = what, before
        elif what == "write":
            written += max(int(result), 0)
        elif int(result) == 0:
            synced = max(synced, before)
    return synced
