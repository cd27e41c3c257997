"""Fixtures: the server matrix, a tenant of one's own for each test, servers of a test's own.

A test that takes `server` runs once for each kind of KINDS. Real servers are started when first
asked for, once a session (under xdist: a session is a worker), and keep their data from test to
test: each test has a tenant of its own instead. A memory server is new for each test.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from fakeredis import FakeRedis, FakeServer
from hypothesis import settings
from lua_coverage import LuaCoverage, active_lines
from servers import NoServer, Server, ServerProcess

from leasekit.connect import _memory_servers
from leasekit.scripts import lua_directory, read_scripts

KINDS_REAL = ("valkey-9", "redis-6.2", "redis-path")
KINDS = (*KINDS_REAL, "memory")

# A shared machine is sometimes slow; in CI the same examples every time, so that a failure is one.
settings.register_profile("home", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "home")

# With --lua-coverage: counts the lines that run_script runs, for the report at the end.
COUNTER = pytest.StashKey[LuaCoverage]()

_tenant_numbers = itertools.count(1)
_memory_numbers = itertools.count(1)


def _start(kind: str, **config: str) -> ServerProcess:
    try:
        process = ServerProcess(kind, **config)
    except NoServer as error:
        if kind == "redis-path" and os.environ.get("CI") == "true" and os.geteuid() == 0:
            pytest.fail(f"in CI, as root, this server must be installed: {error}")
        pytest.skip(str(error))
    process.start()
    return process


@pytest.fixture(scope="session")
def running() -> Iterator[Callable[[str], ServerProcess]]:
    """Gives the session's server of a kind, started when first asked for."""
    processes: dict[str, ServerProcess] = {}

    def give(kind: str) -> ServerProcess:
        if kind not in processes:
            processes[kind] = _start(kind)
        return processes[kind]

    yield give
    for process in processes.values():
        process.stop()


@pytest.fixture
def memory_server() -> Iterator[Server]:
    """A server in memory, new for each test; `raw` and every client of the URL share its data."""
    name = f"test-{next(_memory_numbers)}"
    fake = _memory_servers.setdefault(name, FakeServer(version=(7, 0, 0)))
    raw = FakeRedis(server=fake, protocol=2)
    yield Server("memory", f"memory://{name}", raw)
    raw.close()
    del _memory_servers[name]


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> Server:
    """Each server of the matrix in turn."""
    if request.param == "memory":
        return request.getfixturevalue("memory_server")
    return request.getfixturevalue("running")(request.param)


@pytest.fixture(params=KINDS_REAL)
def real_server(request: pytest.FixtureRequest, running: Callable[[str], ServerProcess]) -> Server:
    """Each server process of the matrix in turn: for what only a real server does."""
    return running(request.param)


@pytest.fixture
def private_server() -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers of the test's own: `private_server("valkey-9", maxmemory="16mb")`."""
    with ExitStack() as stack:

        def start(kind: str = "valkey-9", **config: str) -> ServerProcess:
            process = _start(kind, **config)
            stack.callback(process.stop)
            return process

        yield start


@pytest.fixture
def lua_counter(request: pytest.FixtureRequest) -> LuaCoverage | None:
    """What scripts are to be run through with --lua-coverage, else None."""
    return request.config.stash.get(COUNTER, None)


@pytest.fixture
def tenant_name() -> str:
    """A name that no other test of this session uses; it is spelled the same in keys."""
    return f"t{next(_tenant_numbers)}"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--lua-coverage",
        action="store_true",
        help="run scripts through a line counter; fail if a line of lua/ has not run",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--lua-coverage"):
        config.stash[COUNTER] = LuaCoverage()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist hands its count to the session that started it; that one judges."""
    counter = session.config.stash.get(COUNTER, None)
    if counter is None:
        return
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["lua_hits"] = counter.hits()
    elif missed_lines(counter) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    counter = node.config.stash.get(COUNTER, None)
    if counter is not None:
        counter.add(getattr(node, "workeroutput", {}).get("lua_hits", {}))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    counter = config.stash.get(COUNTER, None)
    if counter is not None:
        terminalreporter.section("lines of Lua that have not run")
        for path, lines in missed_lines(counter).items():
            terminalreporter.line(f"{path}: {', '.join(map(str, lines))}")


def missed_lines(counter: LuaCoverage) -> dict[str, Iterable[int]]:
    """By file of lua/: the lines that could run and have not, in any script where they stand.

    A line with nothing but `end` is no loss: whether it counts as run is the compiler's affair. And
    is_behind is left to tests/lua/test_locale.py: the counter's Lua has no foreign locale.
    """
    hits, commands = counter.hits(), read_scripts()
    prelude = next(iter(commands.values())).prelude
    offset = prelude.count("\n")
    missed: dict[str, Iterable[int]] = {
        "prelude.lua": active_lines(prelude).difference(*hits.values())
    }
    for name, command in commands.items():
        lines = active_lines(command.source).difference(hits.get(name, ()))
        missed[f"{name}.lua"] = frozenset(line - offset for line in lines if line > offset)
    texts = {path: (lua_directory() / path).read_text().split("\n") for path in missed}
    start = texts["prelude.lua"].index("local function is_behind(left, right)") + 1
    end = texts["prelude.lua"].index("end", start) + 1
    missed["prelude.lua"] = set(missed["prelude.lua"]).difference(range(start, end))
    missed = {
        path: [line for line in sorted(lines) if texts[path][line - 1].strip() != "end"]
        for path, lines in missed.items()
    }
    return {path: lines for path, lines in missed.items() if lines}
