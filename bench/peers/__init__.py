"""The peers: other queues on Redis, each in an environment of its own and in a process of its own.

A peer is a worker file beside this one that speaks the protocol of `protocol.py` over its standard
input and output. Its packages are installed once, into a directory under the user's cache, by the
ordinary clients of PyPI and npm; one that does not install or run is left out with a line that says why.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import leasekit

FOLDER = Path(__file__).parent
INSTALL_SECONDS_MAX = 600
ANSWER_SECONDS_MAX = 60


class Unusable(Exception):
    """This peer does not install or does not run here; the message is one line."""


@dataclass(frozen=True, slots=True)
class Peer:
    """packages: the first one gives the version. keeps_ack: a crash of its worker loses no job, as it
    runs here. settings: what is not its default. jobs: a round takes it about half a second."""

    name: str
    packages: tuple[str, ...]
    keeps_ack: bool
    jobs: int
    settings: str

    @property
    def is_ours(self) -> bool:
        return not self.packages

    @property
    def is_node(self) -> bool:
        return self.name == "bullmq"

    @property
    def worker(self) -> Path:
        return FOLDER / (f"{self.name}_peer.cjs" if self.is_node else f"{self.name}_peer.py")


PEERS = (
    Peer("leasekit", (), True, 50_000, "four outbox.run of concurrency 400"),
    Peer("bullmq", ("bullmq", "ioredis"), True, 10_000, "node, concurrency 200, removeOnComplete"),
    Peer(
        "saq",
        ("saq[redis,hiredis]", "typing-extensions", "uvloop"),
        True,
        2_000,
        "concurrency 100, ttl -1",
    ),
    Peer(
        "arq", ("arq", "hiredis", "uvloop"), True, 2_000, "max_jobs 100, keep_result 0, poll 1 ms"
    ),
    Peer("streaq", ("streaq", "uvloop"), True, 1_000, "concurrency 100, ttl 0"),
    Peer("dramatiq", ("dramatiq[redis]", "hiredis"), True, 6_000, "8 threads, prefetch 1000"),
    Peer("rq", ("rq", "hiredis"), True, 200, "SimpleWorker, result_ttl 0"),
    Peer(
        "taskiq",
        ("taskiq-redis", "hiredis", "uvloop"),
        False,
        2_000,
        "stream, 100 tasks, untrimmed",
    ),
    Peer("celery", ("celery[redis]", "hiredis"), False, 1_000, "solo, prefetch 64, early ack"),
    Peer("huey", ("huey[redis]", "hiredis"), False, 3_000, "8 threads, no results"),
)


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "leasekit-bench"


def install(peer: Peer) -> tuple[Path, str]:
    """The interpreter that runs the peer's worker, and the version of its package."""
    if peer.is_ours:
        return Path(sys.executable), leasekit.__version__
    directory = cache_directory() / peer.name
    marker = directory / "installed.json"
    wanted = {"packages": list(peer.packages)}
    if not marker.exists() or json.loads(marker.read_text())["packages"] != wanted["packages"]:
        directory.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
        if peer.is_node:
            _run("npm", "install", "--no-audit", "--no-fund", "--prefix", directory, *peer.packages)
        else:
            _run(sys.executable, "-m", "venv", directory)
            python = directory / "bin" / "python"
            _run(python, "-m", "pip", "install", "--quiet", *peer.packages)
        marker.write_text(json.dumps(wanted | {"version": _version(peer, directory)}))
    interpreter = "node" if peer.is_node else directory / "bin" / "python"
    return Path(interpreter), json.loads(marker.read_text())["version"]


def _version(peer: Peer, directory: Path) -> str:
    package = peer.packages[0].partition("[")[0]
    if peer.is_node:
        described = directory / "node_modules" / package / "package.json"
        return (
            f"{json.loads(described.read_text())['version']}, node {_run('node', '--version')[1:]}"
        )
    ask = f"import importlib.metadata as m; print(m.version({package!r}))"
    return _run(directory / "bin" / "python", "-c", ask)


def _run(*command: str | Path) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=INSTALL_SECONDS_MAX, check=True
        )
    except FileNotFoundError:
        raise Unusable(f"no {command[0]} on this machine") from None
    except subprocess.TimeoutExpired:
        raise Unusable(f"{Path(command[0]).name} took more than {INSTALL_SECONDS_MAX} s") from None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout).strip().splitlines() or ["no output"]
        raise Unusable(f"{Path(command[0]).name}: {lines[-1][:120]}") from None
    return done.stdout.strip()


class Worker:
    """The process of a peer, from here. It blocks: nothing else shall run beside it."""

    def __init__(self, peer: Peer, url: str) -> None:
        interpreter, self.version = install(peer)
        environment = os.environ | {
            "BENCH_REDIS_URL": url,
            "NODE_PATH": str(cache_directory() / peer.name / "node_modules"),
            # Ours is the leasekit that is measured, wherever it was imported from.
            "PYTHONPATH": str(Path(leasekit.__file__).parent.parent) if peer.is_ours else "",
        }
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed by close()
        self._process = subprocess.Popen(
            [str(interpreter), str(peer.worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )

    def ask(self, order: str, count: int) -> dict[str, Any]:
        """`prepare` enqueues so many jobs, `process` works them off and says `seconds`, `cpu_s`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{order} {count}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Unusable(self._last_error()) from None
        said, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS_MAX)
        if not said:
            raise Unusable(f"{order} {count}: no answer for {ANSWER_SECONDS_MAX} s")
        line = self._process.stdout.readline()
        if not line:
            raise Unusable(self._last_error())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def _last_error(self) -> str:
        self._process.wait(10)
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or ["ended without a word"])[-1][:120]
