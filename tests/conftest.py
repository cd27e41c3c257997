"""Fixtures: the server matrix, a tenant of one's own for each test, servers of a test's own.

A test that takes `server` runs once for each kind of KINDS. Real servers are started when first
asked for, once a session (under xdist: a session is a worker), and keep their data from test to
test: each test has a tenant of its own instead. A memory server is new for each test.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from fakeredis import FakeRedis, FakeServer
from hypothesis import settings
from servers import NoServer, Server, ServerProcess

from leasekit import connect

KINDS_REAL = ("valkey-9", "redis-6.2", "redis-path")
KINDS = (*KINDS_REAL, "memory")

# A shared machine is sometimes slow; in CI the same examples every time, so that a failure is one.
settings.register_profile("home", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") == "true" else "home")

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
    fake = connect._memory_servers.setdefault(name, FakeServer(version=(7, 0, 0)))
    raw = FakeRedis(server=fake, protocol=2)
    yield Server("memory", f"memory://{name}", raw)
    raw.close()
    del connect._memory_servers[name]


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
def tenant_name() -> str:
    """A name that no other test of this session uses; it is spelled the same in keys."""
    return f"t{next(_tenant_numbers)}"
