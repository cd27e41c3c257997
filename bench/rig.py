"""What every row of the bench stands on: a private server, a clock for its CPU time, commands by hand.

The server keeps nothing on disk, so that its CPU time is that of the commands. It listens on a unix
socket (leasekit and redis-py) and on a TCP port (leasekit and its peers, when they are compared).
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from leasekit import embedded
from leasekit.connect import Backend, Wire, open_backend

STARTS_WITHIN_S = 10
COMMANDS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Cost:
    """What one stretch of work took: wall time, and CPU time of the server and of the client."""

    seconds: float
    server_cpu_s: float
    client_cpu_s: float

    def per(self, count: int) -> Cost:
        return Cost(self.seconds / count, self.server_cpu_s / count, self.client_cpu_s / count)


class Server:
    """A server process of the bench's own, gone with everything in it after `stop`."""

    core: int | None = None  # where servers run; `pin` decides
    binary: str | None = None

    def __init__(self, **more: str) -> None:
        """`more` settings by name, with `_` for `-`; they replace the usual ones."""
        binary, _ = embedded._find_binary(self.binary or shutil.which("redis-server"))
        self.directory = tempfile.mkdtemp(prefix="lkb")
        self.socket_path = f"{self.directory}/s"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        settings = {
            "port": self.port,
            "bind": "127.0.0.1",
            "unixsocket": self.socket_path,
            "dir": self.directory,
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
            "logfile": f"{self.directory}/log",
        } | {name.replace("_", "-"): value for name, value in more.items()}
        self._process = subprocess.Popen(
            [
                binary,
                *(
                    word
                    for name, value in settings.items()
                    for word in (f"--{name}", *str(value).split(" "))
                ),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if self.core is not None:
            os.sched_setaffinity(self._process.pid, {self.core})
        self._client = redis.Redis(unix_socket_path=self.socket_path)
        give_up_at = time.monotonic() + STARTS_WITHIN_S
        while not self._answers():
            if time.monotonic() > give_up_at or self._process.poll() is not None:
                raise SystemExit(f"{binary} did not start; see {self.directory}/log")
            time.sleep(0.01)
        info = self._client.info("server")
        name, version = ("Valkey", info.get("valkey_version")), ("Redis", info["redis_version"])
        self.name = " ".join(name if name[1] else version)

    @property
    def url(self) -> str:
        return f"unix://{self.socket_path}"

    @property
    def tcp_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def _answers(self) -> bool:
        try:
            return bool(self._client.ping())
        except redis.ConnectionError:
            return False

    def cpu_s(self) -> float:
        """CPU seconds so far. (Their sum is exact, the split into user and system is an estimate.)"""
        info = self._client.info("cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    def wait_for_replicas(self, count: int) -> None:
        """Until so many replicas have caught up."""
        give_up_at = time.monotonic() + STARTS_WITHIN_S
        while int(self._client.execute_command("WAIT", count, 100)) < count:
            if time.monotonic() > give_up_at:
                raise SystemExit(f"the replicas of {self.url} did not catch up")

    def memory_bytes(self) -> int:
        return int(self._client.info("memory")["used_memory"])

    def calls(self) -> dict[str, int]:
        """How often each command was called so far, those by scripts included."""
        info = self._client.info("commandstats")
        return {name.removeprefix("cmdstat_"): value["calls"] for name, value in info.items()}

    def clear(self) -> None:
        self._client.flushall()

    def stop(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(Path(self.directory), ignore_errors=True)


def pin() -> None:
    """Servers on one core, this process and the peers on another, so that they work side by side."""
    if not hasattr(os, "sched_setaffinity") or len(cores := sorted(os.sched_getaffinity(0))) < 2:
        raise SystemExit("--pin needs Linux and two cores")
    Server.core = cores[0]
    os.sched_setaffinity(0, {cores[1]})


class ByHand:
    """Commands sent without the client: straight through hiredis, several at a time."""

    def __init__(self, backend: Backend, wire: Wire) -> None:
        self.backend = backend
        self._wire = wire

    @classmethod
    async def open(cls, url: str) -> ByHand:
        backend = await open_backend(url)
        wire = backend.wire()
        await wire.connect()
        return cls(backend, wire)

    async def one(self, command: Sequence[Any]) -> Any:
        return (await self.many([command]))[0]

    async def many(self, commands: Sequence[Sequence[Any]]) -> list[Any]:
        """The replies; an error reply is raised."""
        replies: list[Any] = []
        for start in range(0, len(commands), COMMANDS_AT_ONCE):
            replies += await self._wire.send(commands[start : start + COMMANDS_AT_ONCE])
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    async def close(self) -> None:
        await self._wire.close()
        await self.backend.close()


async def measured(server: Server, work: Callable[[], Awaitable[Any]]) -> tuple[Cost, Any]:
    """What the work cost, and what it gave."""
    gc.collect()
    server_before, client_before = server.cpu_s(), time.process_time()
    began = time.perf_counter()
    result = await work()
    seconds = time.perf_counter() - began
    client_cpu_s = time.process_time() - client_before
    return Cost(seconds, server.cpu_s() - server_before, client_cpu_s), result


async def by_coroutines(
    count: int, repeats: int, work: Callable[[int, int], Awaitable[object]]
) -> None:
    """So many coroutines, each awaiting `work(its number, its turn)` one after the other."""

    async def worker(number: int) -> None:
        for turn in range(repeats):
            await work(number, turn)

    await asyncio.gather(*[worker(number) for number in range(count)])
