"""From a URL to a checked back end. Only this module builds redis clients and connections.

**Hidden retries are off.** redis-py by default sends a script again, up to ten times, when a reply
is lost: one increment, applied eleven times. So connections are made here alone, one way: no
retries, no health checks, no maintenance notifications, a deadline on everything, RESP3, hiredis.
URL options that would change any of that are refused by name instead of being overruled silently.

**A server is examined before it is used.** Too old a version, or an eviction policy that may
delete rows, breaks promises later and quietly; here it is one clear error at start.

**Passwords stay inside.** Errors and logs show an address built from host, port or path, never the
URL as given, and never a server's own words about a refused handshake (an old server repeats the
arguments of a HELLO that it does not know, the password among them).

A `Backend` makes wires. Today all of them lead to one server; where there are several nodes, a
back end will make one per node, and the rest of leasekit does not change.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast
from urllib.parse import parse_qsl, unquote, urlsplit
from weakref import WeakSet

from redis.asyncio import Redis
from redis.asyncio.connection import (
    AbstractConnection,
    Connection,
    RedisSSLContext,
    SSLConnection,
    UnixDomainSocketConnection,
    parse_url,
)
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig

from leasekit.errors import InvalidInput, Unavailable
from leasekit.listen import Ears, Listener
from leasekit.wire import (
    Command,
    ConnectionLost,
    MemoryEars,
    MemoryWire,
    OnPush,
    RedisWire,
    Wire,
)

if TYPE_CHECKING:
    from leasekit.embedded import EmbeddedServer

__all__ = ["Backend", "ConnectionLost", "ResponseError", "ServerInfo", "Wire", "open_backend"]

URL_VARIABLE: Final = "LEASEKIT_URL"
DEFAULT_URL: Final = "embedded://"
REDIS_VERSION_MIN: Final = (6, 2, 0)
SHEBANG_VERSION_MIN: Final = (7, 0, 0)
COMMAND_CONNECTION_COUNT_MAX: Final = 4
LOADING_POLL_MS: Final = 50

_URL_OPTIONS: Final = frozenset({"db", "username", "password", "client_name"})
_TLS_OPTIONS: Final = frozenset(
    {
        "ssl_ca_certs",
        "ssl_ca_data",
        "ssl_ca_path",
        "ssl_cert_reqs",
        "ssl_certfile",
        "ssl_check_hostname",
        "ssl_ciphers",
        "ssl_exclude_verify_flags",
        "ssl_include_verify_flags",
        "ssl_keyfile",
        "ssl_min_version",
        "ssl_password",
    }
)

T = TypeVar("T")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What the examination at start learnt.

    name: "redis", "valkey" or "memory".
    version: of the product; of Valkey its own, not the Redis version that it imitates.
    shebang: it knows scripts that begin with a `#!lua` line (Redis 7 and newer, every Valkey).
    persistence: "none", "rdb", "aof:no", "aof:everysec", "aof:always" or "memory"; "aof:unknown"
        or "unknown" where CONFIG GET is not allowed.
    url: where it is, without user name, password and options.
    """

    name: str
    version: tuple[int, int, int]
    shebang: bool
    persistence: str
    url: str


class Backend:
    """A server that was examined and found fit: makes wires to it, until it is closed."""

    def __init__(
        self,
        info: ServerInfo,
        make_wire: Callable[[], Wire],
        *,
        make_ears: Callable[[OnPush], Ears],
        timeout_ms: int,
        stop: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.info = info
        self._make_wire = make_wire
        self._make_ears = make_ears
        self.timeout_ms = timeout_ms
        self._stop = stop
        self._wires: set[Wire] = set()
        self._listeners: WeakSet[Listener] = WeakSet()
        self._idle: list[Wire] = []
        self._turns = asyncio.Semaphore(COMMAND_CONNECTION_COUNT_MAX)
        self._is_closed = False

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "open"
        return f"<Backend {self.info.url} {self.info.name} {state}>"

    def wire(self) -> Wire:
        """A new, unconnected wire."""
        if self._is_closed:
            raise Unavailable(f"the back end {self.info.url} was closed: nothing was sent")
        wire = self._make_wire()
        self._wires.add(wire)
        return wire

    def listen(
        self, on_message: Callable[[str, bytes], None], on_gap: Callable[[], None]
    ) -> Listener:
        """A subscription on a connection of its own, which hears nothing yet: see Listener.

        `on_message(channel, message)`; `on_gap()` whenever messages may have been missed.
        """
        if self._is_closed:
            raise Unavailable(f"the back end {self.info.url} was closed: nothing was sent")
        listener = Listener(self._make_ears, on_message, on_gap)
        self._listeners.add(listener)
        return listener

    async def command(self, *args: bytes | str | int) -> Any:
        """Run one command on a connection of a small pool beside the wires; gives the raw reply.

        For what would hold up a wire: long reads, INFO, SCAN. Raises ResponseError with the
        server's text for an error reply, and Unavailable for trouble with the connection; when
        that has a ConnectionLost with `sent` as its cause, the command may have been executed.
        """
        try:
            async with asyncio.timeout(self.timeout_ms / 1_000):
                await self._turns.acquire()
        except TimeoutError:
            raise Unavailable(
                f"all {COMMAND_CONNECTION_COUNT_MAX} connections for single commands to "
                f"{self.info.url} stayed busy for {self.timeout_ms} ms: nothing was sent; "
                "run fewer long reads at a time"
            ) from None
        try:
            reply = await self._command(args)
        finally:
            self._turns.release()
        if isinstance(reply, ResponseError):
            raise reply
        return reply

    async def ask(self, *args: bytes | str | int) -> Any:
        """What `command` gives; None where the server does not know or does not allow it."""
        try:
            return await self.command(*args)
        except ResponseError:
            return None

    async def look(self, *commands: Command) -> list[Any]:
        """What several reading commands find at one moment: nothing else runs between them.

        Gives their raw replies in order; raises as `command` does, for the first that was refused.
        """
        wrapped = [("MULTI",), *commands, ("EXEC",)]
        async with self._turns:
            *queued, replies = await self._send(wrapped)
        for reply in [*queued, replies, *(replies if isinstance(replies, list) else [])]:
            if isinstance(reply, ResponseError):
                raise reply
        return list(replies)

    async def _command(self, command: Command) -> Any:
        [reply] = await self._send([command])
        return reply

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        wire = self._idle.pop() if self._idle else self.wire()
        try:
            await wire.connect()
            replies = await wire.send(commands)
        except BaseException as error:
            # Also when the caller was cancelled: a reply that is long in coming must not hold up
            # the next command.
            await wire.close()
            self._wires.discard(wire)
            if isinstance(error, ConnectionLost):
                state = "the command may have been executed" if error.sent else "nothing was sent"
                raise Unavailable(f"lost {self.info.url}: {error}; {state}") from error
            raise
        self._idle.append(wire)
        return replies

    async def close(self) -> None:
        """Close all wires, and stop the use of an embedded server; closing twice is harmless."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            for listener in list(self._listeners):
                await listener.close()
            for wire in list(self._wires):
                await wire.close()
        finally:
            if self._stop is not None:
                await self._stop()


async def open_backend(
    url: str | None = None, *, timeout_ms: int = 5_000, allow_eviction: bool = False
) -> Backend:
    """Connect to the server that `url` names, examine it, and give the back end.

    url: `redis://`, `rediss://`, `unix://`, `embedded://[directory]`, `memory://[name]`; None is
    the environment's LEASEKIT_URL, else `embedded://`. timeout_ms bounds each connection attempt
    and each wait for replies. Raises InvalidInput for a URL that cannot be used and Unavailable
    for a server that cannot be reached or must not be used.
    """
    if timeout_ms < 1:
        raise InvalidInput("timeout_ms must be at least 1", field="timeout_ms", limit=1)
    if url is None:
        url = os.environ.get(URL_VARIABLE) or DEFAULT_URL
    scheme = _scheme(url)
    if scheme == "memory":
        return _open_memory(url, timeout_ms=timeout_ms)
    if scheme == "embedded":
        return await _open_embedded(url, timeout_ms=timeout_ms, allow_eviction=allow_eviction)
    server = _Server.from_url(url, scheme, timeout_ms=timeout_ms)
    return await _open_server(server, allow_eviction=allow_eviction)


def _scheme(url: str) -> str:
    match = re.match(r"([a-z][a-z0-9+.-]*)://", url, re.IGNORECASE)
    if match is None:
        raise _invalid("url.scheme", "must begin with a scheme, such as redis:// or embedded://")
    scheme = match[1].lower()
    if scheme in {"redis+sentinel", "redis+cluster"}:
        raise _invalid(
            "url.scheme",
            f"{scheme}:// is not spoken by this version of leasekit; name one server, redis://",
        )
    if scheme not in {"redis", "rediss", "unix", "embedded", "memory"}:
        raise _invalid(
            "url.scheme",
            f"{scheme}:// is unknown; known are redis, rediss, unix, embedded and memory",
        )
    return scheme


def _invalid(name: str, message: str, *, limit: object = None) -> InvalidInput:
    return InvalidInput(f"{name}: {message}", field=name, limit=limit)


@dataclass(frozen=True, slots=True)
class _Server:
    """One server's address and how to talk to it: makes connections and explains failures."""

    url: str
    timeout_ms: int
    connection_class: type[AbstractConnection]
    options: dict[str, Any] = field(repr=False)
    tls: RedisSSLContext | None = field(default=None, repr=False)

    @classmethod
    def from_url(cls, url: str, scheme: str, *, timeout_ms: int) -> _Server:
        options = _parse_server_url(url, scheme)
        options.pop("connection_class", None)
        database = options.setdefault("db", 0)
        tls = None
        connection_class: type[AbstractConnection]
        if scheme == "unix":
            connection_class = UnixDomainSocketConnection
            address = f"unix://{options['path']}" + (f"?db={database}" if database else "")
        else:
            host = options.setdefault("host", "localhost")
            port = options.setdefault("port", 6379)
            host = f"[{host}]" if ":" in host else host
            address = f"{scheme}://{host}:{port}/{database}"
            connection_class = SSLConnection if scheme == "rediss" else Connection
        if scheme == "rediss":
            options.setdefault("ssl_min_version", ssl.TLSVersion.TLSv1_2)
            tls = _load_tls(options)
        return cls(address, timeout_ms, connection_class, options, tls)

    def connection(self) -> AbstractConnection:
        timeout_s = self.timeout_ms / 1_000
        connection = self.connection_class(
            **self.options,
            protocol=3,
            decode_responses=False,
            retry=Retry(NoBackoff(), 0),
            retry_on_timeout=False,
            retry_on_error=[],
            health_check_interval=0,
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
            driver_info=None,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
        )
        if self.tls is not None:
            # Shared: reading the certificates again would cost each reconnect 10 ms.
            cast(SSLConnection, connection).ssl_context = self.tls
        return connection

    def wire(self, on_push: OnPush | None = None) -> RedisWire:
        return RedisWire(self.connection, self.explain, timeout_ms=self.timeout_ms, on_push=on_push)

    def explain(self, error: Exception) -> Unavailable:
        """Say why a connection attempt failed, quoting nothing that can hold a secret."""
        if isinstance(error, Unavailable):
            return error
        causes = _causes(error)
        for cause in causes:
            if isinstance(cause, RedisError) and (
                isinstance(cause, ResponseError) or cause.status_code
            ):
                return self._explain_refusal(cause)
        if any(isinstance(cause, TimeoutError) for cause in causes):
            reason = f"no answer within {self.timeout_ms} ms"
        else:
            known = [cause for cause in causes if isinstance(cause, OSError | RedisError)]
            reason = str(known[-1]) if known else f"redis-py failed with {type(error).__name__}"
        advice = "check that the server runs and that the address is right"
        if any(isinstance(cause, ssl.SSLError) for cause in causes):
            advice = (
                "check that the server speaks TLS there, and give its authority in ssl_ca_certs"
            )
        return Unavailable(
            f"cannot connect to {self.url}: {reason}. Nothing was sent; {advice}, then try again"
        )

    def _explain_refusal(self, error: RedisError) -> Unavailable:
        text = str(error)
        code = error.status_code or text.partition(" ")[0]
        if "unknown command" in text.lower() or code == "NOPROTO":
            reason = f"it does not speak RESP3 ({code}): leasekit needs Redis 6.2 or Valkey"
        elif code in {"WRONGPASS", "NOAUTH"} or "password" in text.lower():
            reason = f"it refuses the user name or password ({code}): correct them in the URL"
        elif "DB index" in text:
            reason = f"it has no database {self.options['db']} ({code}): correct it in the URL"
        elif code == "NOPERM":
            reason = (
                "its ACL forbids this user a command that leasekit cannot do without (NOPERM): "
                "allow hello, select, info, client|id and client|kill beside scripts and data"
            )
        elif "max number of clients" in text:
            reason = "it has as many clients as its maxclients allows: try again later"
        else:
            reason = f"it refuses connections ({code})"
        return Unavailable(f"{self.url} does not let leasekit in: {reason}. Nothing was sent")


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what caused it, outermost first."""
    causes: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in causes:
        causes.append(current)
        current = current.__cause__ or current.__context__
    return causes


def _parse_server_url(url: str, scheme: str) -> dict[str, Any]:
    """The URL's parts as redis-py's connection options, checked more strictly than it does."""
    parts = _unless_invalid(lambda: urlsplit(url))
    if parts is None:
        raise _invalid("url", "cannot be taken apart: check its brackets and letters")
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in _URL_OPTIONS | _TLS_OPTIONS:
            # An @ behind the question mark: what looks like an option is a part of a password.
            shown = f"has the option {name}" if "@" not in parts.query else "has an option"
            raise _invalid("url.query", f"{shown} that a leasekit URL does not take")
        if name in _TLS_OPTIONS and scheme != "rediss":
            raise _invalid(f"url.{name}", "TLS options need rediss://")
        if not value:
            raise _invalid(f"url.{name}", "is empty")
    if parts.fragment:
        raise _invalid("url.fragment", "a URL ends before #; write %23 inside a password")
    # No port is fine, and must look different from a port that is none.
    if not _unless_invalid(lambda: 1 if parts.port is None else parts.port):
        raise _invalid(
            "url.port",
            "must be a number from 1 to 65535; write / ? # @ inside a password as %2F %3F %23 %40",
            limit=65_535,
        )
    if scheme == "unix":
        if parts.hostname or len(parts.path) < 2:
            raise _invalid("url.path", "must be absolute: unix:///directory/name.sock")
    elif not re.fullmatch(r"/?[0-9]*", parts.path):
        raise _invalid("url.db", "must be a number: redis://host:port/0")
    options = cast("dict[str, Any] | None", _unless_invalid(lambda: parse_url(url)))
    if options is None:
        raise _invalid("url.query", "has an option whose value has the wrong form")
    if options.get("db", 0) < 0:
        raise _invalid("url.db", "must not be negative", limit=0)
    return options


def _unless_invalid(parse: Callable[[], T]) -> T | None:
    """What `parse` gives, or None for its ValueError, whose text may quote a part of a password."""
    try:
        return parse()
    except ValueError:
        return None


def _load_tls(options: dict[str, Any]) -> RedisSSLContext:
    """The TLS settings with certificates loaded, for all connections of a back end."""
    if options["ssl_min_version"] < ssl.TLSVersion.TLSv1_2:
        raise _invalid(
            "url.ssl_min_version",
            f"must be at least {ssl.TLSVersion.TLSv1_2:d} (TLS 1.2)",
            limit=ssl.TLSVersion.TLSv1_2,
        )
    try:
        connection = SSLConnection(**options)
        connection.ssl_context.get()
    except (OSError, ValueError, RedisError):
        raise _invalid(
            "url.ssl", "the TLS options cannot be used: check their values, files and password"
        ) from None
    if connection.cert_reqs == ssl.CERT_NONE or not connection.check_hostname:
        _logger.warning("the URL switches checks of the server's certificate off")
    return connection.ssl_context


async def _open_server(
    server: _Server,
    *,
    allow_eviction: bool,
    url: str | None = None,
    stop: Callable[[], Awaitable[None]] | None = None,
) -> Backend:
    wire = server.wire()
    try:
        await wire.connect()
        facts = await _read_info(wire, server)
        info = await _examine(wire, facts, url or server.url, allow_eviction=allow_eviction)
    except ConnectionLost as lost:
        raise Unavailable(
            f"lost {server.url} while examining it: {lost}. Nothing was written; try again"
        ) from lost
    finally:
        await wire.close()
    return Backend(
        info, server.wire, make_ears=server.wire, timeout_ms=server.timeout_ms, stop=stop
    )


async def _examine(
    wire: Wire, facts: dict[str, str], url: str, *, allow_eviction: bool
) -> ServerInfo:
    name = "valkey" if "valkey_version" in facts else "redis"
    text = facts.get("valkey_version") or facts.get("redis_version", "")
    version = _version(text)
    if name == "redis" and version < REDIS_VERSION_MIN:
        raise Unavailable(
            f"{url} runs Redis {text or 'of unknown version'}; leasekit needs 6.2 or newer, or "
            "Valkey. Nothing was written"
        )
    policy = facts.get("maxmemory_policy", "which it does not tell")
    if policy != "noeviction":
        danger = (
            f"{url} has the eviction policy {policy}: when its memory is full it may silently "
            "delete leases, rows and keys that leasekit promised to keep"
        )
        if not allow_eviction:
            raise Unavailable(
                f"{danger}. Nothing was written; run CONFIG SET maxmemory-policy noeviction there "
                "and write it into its configuration, or pass allow_eviction=True and do without "
                "the promises"
            )
        _logger.warning(danger)
    return ServerInfo(
        name=name,
        version=version,
        shebang=name == "valkey" or version >= SHEBANG_VERSION_MIN,
        persistence=await _persistence(wire, facts),
        url=url,
    )


async def _read_info(wire: Wire, server: _Server) -> dict[str, str]:
    """INFO as name -> value, once the server has loaded its data."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + server.timeout_ms / 1_000
    while True:
        [reply] = await wire.send([("INFO",)])
        if not isinstance(reply, bytes):
            code = str(reply).partition(" ")[0]
            raise Unavailable(
                f"{server.url} refuses INFO ({code}), which leasekit needs to see its version and "
                "eviction policy: allow this user +info. Nothing was written"
            )
        lines = reply.decode("utf-8", "replace").splitlines()
        facts = dict(line.split(":", 1) for line in lines if ":" in line)
        if facts.get("loading", "0") == "0":
            return facts
        if loop.time() >= deadline:
            raise Unavailable(
                f"{server.url} was still loading its data after {server.timeout_ms} ms. Nothing "
                "was written; try again later, or with a longer timeout_ms"
            )
        await asyncio.sleep(LOADING_POLL_MS / 1_000)


async def _persistence(wire: Wire, facts: dict[str, str]) -> str:
    appendfsync, save = await wire.send(
        [("CONFIG", "GET", "appendfsync"), ("CONFIG", "GET", "save")]
    )
    if facts.get("aof_enabled") == "1":
        if not isinstance(appendfsync, dict):
            return "aof:unknown"
        return f"aof:{appendfsync.get(b'appendfsync', b'unknown').decode()}"
    if not isinstance(save, dict):
        return "unknown"
    return "rdb" if save.get(b"save") else "none"


def _version(text: str) -> tuple[int, int, int]:
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else (0, 0, 0)


class _EmbeddedUse:
    """A client's use of the embedded server of a directory, which may die and be started again."""

    def __init__(self, server: EmbeddedServer) -> None:
        self._server = server
        self._joining: asyncio.Task[None] | None = None

    @property
    def path(self) -> str:
        return self._server.socket_path

    async def rejoin(self, path: str) -> None:
        """Join the server that is not at `path` any more, or start it anew."""
        if self._joining is None and path == self._server.socket_path:
            self._joining = asyncio.create_task(self._join())
        if self._joining is not None:
            # Loading may take longer than a connection attempt: the next one finds it going on.
            await asyncio.shield(self._joining)

    async def _join(self) -> None:
        from leasekit import embedded

        try:
            before = self._server
            self._server = await embedded.start(before.directory)
            await before.stop()
        finally:
            self._joining = None

    async def stop(self) -> None:
        if self._joining is not None:
            self._joining.cancel()
            await asyncio.wait([self._joining])
        await self._server.stop()


class _EmbeddedConnection(UnixDomainSocketConnection):
    """To a server that has another socket after each start."""

    def __init__(self, *, use: _EmbeddedUse, **options: Any) -> None:
        super().__init__(**options)
        self._use = use

    async def connect(self) -> None:
        self.path = self._use.path
        try:
            await cast(Any, super()).connect()
        except RedisConnectionError:
            await self._use.rejoin(self.path)
            self.path = self._use.path
            await cast(Any, super()).connect()


async def _open_embedded(url: str, *, timeout_ms: int, allow_eviction: bool) -> Backend:
    directory = unquote(_rest(url)) or None
    # Imported here: nobody else needs to be able to start servers.
    from leasekit import embedded

    embedded_server = await embedded.start(directory)
    use = _EmbeddedUse(embedded_server)
    options: dict[str, Any] = {"path": embedded_server.socket_path, "db": 0}
    connection_class: type[AbstractConnection] = UnixDomainSocketConnection
    if directory is not None:
        # The data of a temporary directory is gone with its server: an empty one must not follow.
        connection_class = _EmbeddedConnection
        options["use"] = use
    server = _Server(
        url=f"unix://{embedded_server.socket_path}",
        timeout_ms=timeout_ms,
        connection_class=connection_class,
        options=options,
    )
    try:
        return await _open_server(
            server,
            allow_eviction=allow_eviction,
            url=f"embedded://{embedded_server.directory}",
            stop=use.stop,
        )
    except BaseException:
        await use.stop()
        raise


def _rest(url: str) -> str:
    """What follows `scheme://`, which must be all there is."""
    rest = url.partition("://")[2]
    if "?" in rest or "#" in rest:
        raise _invalid("url.query", "this scheme takes no options; write %3F and %23 in a name")
    return rest


# The servers behind memory://name, for as long as this process lives.
_memory_servers: dict[str, Any] = {}


def _open_memory(url: str, *, timeout_ms: int) -> Backend:
    try:
        # Imported here: an extra that only tests need.
        import lupa  # noqa: F401
        from fakeredis import FakeServer
        from fakeredis.aioredis import AsyncFakeSocket
    except ImportError:
        raise Unavailable(
            "memory:// needs fakeredis and lupa, which are not installed: "
            "pip install 'leasekit[memory]'"
        ) from None

    name = _rest(url)
    if not re.fullmatch(r"[A-Za-z0-9_.-]{0,64}", name):
        raise _invalid("url.name", "memory://name takes letters, digits, _ . - only", limit=64)
    version = (7, 0, 0)
    fake = FakeServer(version=version)
    if name:
        fake = _memory_servers.setdefault(name, fake)

    def make_socket() -> Any:
        return AsyncFakeSocket(fake, 0, client_class=Redis, client_info={"resp": 3})

    _logger.warning(
        "memory:// keeps everything in this process: not durable, not shared; for tests only"
    )
    info = ServerInfo("memory", version, False, "memory", f"memory://{name}")
    return Backend(
        info,
        lambda: MemoryWire(make_socket),
        make_ears=lambda on_push: MemoryEars(make_socket, on_push),
        timeout_ms=timeout_ms,
    )
