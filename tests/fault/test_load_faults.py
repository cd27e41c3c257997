"""`leasekit load` goes on under a server that is killed, and finds planted faults.

The embedded server of a directory is killed LEASEKIT_TEST_RESTARTS times, 2 unless told otherwise;
its clients start it again. The run of ten: `LEASEKIT_TEST_RESTARTS=10 pytest -k killed_server
tests/fault/test_load_faults.py`. Faults are planted in a copy of the package and its scripts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from servers import ServerProcess

from leasekit import embedded, scripts
from leasekit.connect import URL_VARIABLE
from leasekit.embedded import LOCK_FILE, SERVER_SOCKET

PACKAGE = Path(scripts.__file__).parent
RESTARTS = int(os.environ.get("LEASEKIT_TEST_RESTARTS", "2"))
WORK_SECONDS = 0.7  # after each restart
CYCLE_SECONDS_MAX = 2.5  # a kill, the restart and the work after it, on a slow machine
AT_WORK_AGAIN_SECONDS_MAX = 2
END_SECONDS_MAX = 50
WAIT_SECONDS_MAX = 15
STEP_SECONDS = 0.005

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="there it is refused"),
    pytest.mark.timeout(60 + 5 * RESTARTS),
]


class Load:
    """One run of the load test, as JSON."""

    def __init__(self, *words: str, package_root: Path | None = None) -> None:
        environment = dict(os.environ)
        environment.pop(URL_VARIABLE, None)
        if package_root is not None:
            environment["PYTHONPATH"] = str(package_root)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "leasekit.cli", "load", "--json", *words],
            cwd=package_root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def result(self) -> dict[str, Any]:
        """The result of a run that came to its end, with its exit code."""
        out, err = self.process.communicate(timeout=END_SECONDS_MAX)
        assert out, err
        result: dict[str, Any] = json.loads(out)
        return result | {"exit_code": self.process.returncode, "err": err}

    def clean_up(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def load() -> Iterator[Callable[..., Load]]:
    """Starts load tests: `load("--count", "100", package_root=copy)`."""
    runs: list[Load] = []

    def start(*words: str, package_root: Path | None = None) -> Load:
        runs.append(Load(*words, package_root=package_root))
        return runs[-1]

    yield start
    for run in runs:
        run.clean_up()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path for an embedded server's data."""
    path = Path(tempfile.mkdtemp(prefix="lk-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A directory that holds copies of `leasekit` and of its scripts, to plant faults in."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "leasekit", ignore=ignored)
    target = tmp_path / "leasekit" / "lua"
    if not target.exists():
        shutil.copytree(scripts.lua_directory(), target, ignore=ignored)
    # A fault may leave rows that nobody will ever get: wait less long for them.
    plant(tmp_path / "leasekit/load/run.py", r"^DRAIN_EXTRA_S = 10\.0$", "DRAIN_EXTRA_S = 0.5")
    return tmp_path


def plant(path: Path, pattern: str, replacement: str) -> None:
    """Change the one place that matches; a test whose place has moved must say so."""
    text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
    assert count == 1, f"{path.name} has {count} places like {pattern!r}: plant the fault anew"
    path.write_text(text)


def wait_for(what: Callable[[], Any]) -> Any:
    """The first true value of `what`, asked again and again."""
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, redis.RedisError):
            if found := what():
                return found
        time.sleep(STEP_SECONDS)
    raise AssertionError(f"{what} did not come true within {WAIT_SECONDS_MAX} s")


def server_of(directory: Path, other_than: int) -> tuple[int, redis.Redis]:
    """Process id and a client of the server that runs in the directory; OSError or ValueError."""
    pid, _, runtime = (directory / LOCK_FILE).read_bytes().split(b"\n", 2)
    if int(pid) == other_than:
        raise ValueError("that is still the one before")
    path = Path(os.fsdecode(runtime), SERVER_SOCKET)
    client = redis.Redis(unix_socket_path=str(path), protocol=2)
    client.ping()
    return int(pid), client


def sent(client: redis.Redis) -> int:
    """Rows that all load tests of a server have finished."""
    tallies = [client.hgetall(key) for key in client.scan_iter("load-*:outbox:tally")]
    return sum(
        int(value)
        for tally in tallies
        for field, value in tally.items()
        if field.startswith(b"sent:")
    )


def test_it_goes_on_after_a_killed_server(load: Callable[..., Load], directory: Path) -> None:
    """Nothing acknowledged is lost, nothing is held twice, and all are soon at work again."""
    run = load(
        *("--url", f"embedded://{directory}", "--lease-ms", "1500", "--processes", "2"),
        *("--duration", str(RESTARTS * CYCLE_SECONDS_MAX + 3), "--coroutines", "200"),
        *("--mix", "lifecycle=8,nack=1,extend=1,lease=1,idempotency=1"),
    )
    pid, client = wait_for(lambda: server_of(directory, 0))
    wait_for(lambda: sent(client) > 0)
    slowest_s = 0.0
    for _ in range(RESTARTS):
        time.sleep(WORK_SECONDS)
        client.close()
        os.kill(pid, signal.SIGKILL)
        pid, client = wait_for(lambda before=pid: server_of(directory, before))
        answered_s, before = time.monotonic(), sent(client)
        wait_for(lambda client=client, before=before: sent(client) > before)
        slowest_s = max(slowest_s, time.monotonic() - answered_s)
    client.close()
    result = run.result()
    print(json.dumps(result), f"\nslowest to be at work again: {slowest_s:.2f} s")  # noqa: T201
    assert (result["broken"], result["exit_code"]) == ([], 0)
    assert result["enqueued"] == result["acked"] > 0
    assert (result["lost"], result["held_twice"], result["still_there"]) == (0, 0, 0)
    assert (result["unsettled_enqueues"], result["unsettled_acks"]) == (0, 0)
    assert result["server_restarts"] == RESTARTS
    assert result["reconnects"] >= RESTARTS
    assert slowest_s < AT_WORK_AGAIN_SECONDS_MAX


def test_rows_lost_with_a_server_are_found(
    load: Callable[..., Load], private_server: Callable[..., ServerProcess], package_copy: Path
) -> None:
    """A server that keeps nothing loses what it acknowledged, and the load test says so."""
    server = private_server("valkey-9")  # no append-only file
    # Processes and kinds that are out of step: some rows are between their calls at any moment.
    words = ("--duration", "3", "--lease-ms", "500", "--processes", "3")
    run = load(
        "--url",
        server.url,
        *words,
        "--mix",
        "lifecycle=1,nack=1,extend=1",
        package_root=package_copy,
    )
    wait_for(lambda: sent(server.raw) > 100)
    server.kill()
    server.start()
    result = run.result()
    assert result["exit_code"] == 1
    assert result["lost"] > 0
    assert any("lost: enqueued, never acked" in promise for promise in result["broken"])


def test_a_server_that_stays_away_is_told(
    load: Callable[..., Load], private_server: Callable[..., ServerProcess], package_copy: Path
) -> None:
    """Where the server does not come back the run ends by itself, with 4."""
    plant(package_copy / "leasekit/load/run.py", r"^AWAY_MOST_S = 30\.0$", "AWAY_MOST_S = 1.0")
    plant(package_copy / "leasekit/load/traffic.py", r"^INSIST_S = 60\.0$", "INSIST_S = 0.5")
    plant(
        package_copy / "leasekit/client.py",
        r"^TIMEOUT_MS_DEFAULT = 5_000$",
        "TIMEOUT_MS_DEFAULT = 500",
    )
    server = private_server("valkey-9")
    run = load("--url", server.url, "--duration", "2", package_root=package_copy)
    wait_for(lambda: sent(server.raw) > 100)
    server.kill()
    out, err = run.process.communicate(timeout=END_SECONDS_MAX)
    assert (run.process.returncode, out) == (4, "")
    assert err.startswith("leasekit: cannot connect to ")


def test_two_holders_are_found(load: Callable[..., Load], package_copy: Path) -> None:
    """With rows that stay due while they are claimed, the run ends with 1 and names the promise."""
    plant(package_copy / "leasekit/lua/outbox/claim.lua", r'^write\("ZADD", due, due_pairs\)$', "")
    # Two processes, because one alone may send its claims and acks in step.
    words = ("--count", "1000", "--lease-ms=500", "--processes=2")
    result = load(*words, package_root=package_copy).result()
    assert result["exit_code"] == 1
    assert result["held_twice"] > 0
    assert any("held twice at once" in promise for promise in result["broken"])
    assert "leasekit: broken: " in result["err"]


def test_a_row_that_is_never_in_line_is_found(
    load: Callable[..., Load], package_copy: Path
) -> None:
    """Rows that are acknowledged and never handed out are counted: not delivered."""
    plant(
        package_copy / "leasekit/lua/outbox/enqueue.lua",
        r'^  write\("ZADD", due, due_pairs\)$',
        '  if created > 3 then due_pairs = {} end\n  write("ZADD", due, due_pairs)',
    )
    result = load("--count", "50", "--lease-ms=500", package_root=package_copy).result()
    assert result["exit_code"] == 1
    assert result["still_there"] > 0
    assert any("not delivered by the end" in promise for promise in result["broken"])


def test_interrupted_it_cleans_up(load: Callable[..., Load], directory: Path) -> None:
    """A ctrl-C ends it with 130 and one line, its server stopped and its keys deleted."""
    run = load("--url", f"embedded://{directory}", "--duration", "30")
    _, client = wait_for(lambda: server_of(directory, 0))
    wait_for(lambda: sent(client) > 0)
    client.close()
    run.process.send_signal(signal.SIGINT)
    _, err = run.process.communicate(timeout=END_SECONDS_MAX)
    assert run.process.returncode == 130
    assert err == "leasekit: interrupted; everything that was started has been stopped\n"
    assert not (directory / LOCK_FILE).read_bytes()
    assert asyncio.run(keys_in(directory)) == []


async def keys_in(directory: Path) -> list[bytes]:
    server = await embedded.start(str(directory))
    with redis.Redis(unix_socket_path=server.socket_path) as client:
        keys: list[bytes] = client.keys()
    await server.stop()
    return keys
