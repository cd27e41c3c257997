"""A primary with replicas, each a server process of the test's own, and what can happen to them.

Replicas follow over 127.0.0.1, on a port that was free when the primary took it; clients go by unix
sockets. `pause` stops a process as it is (SIGSTOP): nobody notices at first, and what is sent to it
waits. `cut` ends a replica's link, and it goes on alone; `promote` makes it a primary.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from servers import ServerProcess

LINK_SECONDS_MAX = 30.0
LOOK_SECONDS = "0.02"
PORT_ATTEMPTS = 5

# Without the pause that gathers replicas for one transfer, and without a disk.
REPLICATION = {"repl_diskless_sync": "yes", "repl_diskless_sync_delay": "0"}


@dataclass(slots=True)
class Replicated:
    """A primary and its replicas. `close` stops all of them, paused or not."""

    primary: ServerProcess
    replicas: list[ServerProcess]

    def pause(self, *servers: ServerProcess) -> None:
        """Stop these processes where they are; without a name, all replicas."""
        for one in servers or self.replicas:
            os.kill(one.process_id, signal.SIGSTOP)

    def resume(self, *servers: ServerProcess) -> None:
        """Let these processes go on; without a name, all replicas."""
        for one in servers or self.replicas:
            os.kill(one.process_id, signal.SIGCONT)

    def cut(self, replica: ServerProcess) -> None:
        """End a replica's link for good: what it does not have now it never gets."""
        replica.raw.replicaof("127.0.0.1", "1")

    def promote(self, replica: ServerProcess) -> None:
        """Make a replica a primary with what it has; the old primary is not told."""
        replica.raw.replicaof("NO", "ONE")

    def wait_until_linked(self, count: int | None = None) -> None:
        """Until so many replicas are online, by the primary's word; None = all."""
        wanted = len(self.replicas) if count is None else count
        self._wait(lambda: self.online() >= wanted, f"{wanted} replicas to be online")

    def wait_until_in_step(self, *replicas: ServerProcess) -> None:
        """Until these replicas have all that the primary has; without a name, all."""
        wanted = int(self.primary.raw.info("replication")["master_repl_offset"])
        followers = [one.raw for one in replicas or self.replicas]

        def are_in_step() -> bool:
            found = [one.info("replication").get("slave_repl_offset", 0) for one in followers]
            return min(found) >= wanted

        self._wait(are_in_step, f"replicas to come to offset {wanted}")

    def online(self) -> int:
        """How many replicas the primary calls online."""
        facts = self.primary.raw.info("replication")
        links = [facts.get(f"slave{i}", {}) for i in range(facts["connected_slaves"])]
        return sum(link.get("state") == "online" for link in links)

    def close(self) -> None:
        for one in (*self.replicas, self.primary):
            with suppress(AssertionError):  # It was stopped by the test.
                os.kill(one.process_id, signal.SIGCONT)
            one.stop()

    def _wait(self, is_so: Callable[[], bool], what: str) -> None:
        give_up_at = time.monotonic() + LINK_SECONDS_MAX
        while not is_so():
            assert time.monotonic() < give_up_at, f"waited {LINK_SECONDS_MAX:g} s for {what}"
            # The server's own pause: nobody pushes there.
            self.primary.raw.blpop("nobody", LOOK_SECONDS)


def start_replicated(kind: str = "valkey-9", replicas: int = 2, **config: str) -> Replicated:
    """A primary of a kind with so many replicas, all online; NoServer where there is none.

    `config` names settings of all of them, as with ServerProcess.
    """
    primary = _start_primary(kind, REPLICATION | config)
    group = Replicated(primary, [])
    try:
        port = primary.raw.config_get("port")["port"]
        for _ in range(replicas):
            follow = REPLICATION | config | {"replicaof": f"127.0.0.1 {port}"}
            if "requirepass" in config:
                follow["masterauth"] = config["requirepass"]
            one = ServerProcess(kind, **follow)
            group.replicas.append(one)
            one.start()
        group.wait_until_linked()
    except BaseException:
        group.close()
        raise
    return group


def _start_primary(kind: str, config: dict[str, str]) -> ServerProcess:
    """On a free port: one that somebody else took meanwhile is not free, and another is tried."""
    for attempt in range(PORT_ATTEMPTS):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        primary = ServerProcess(kind, **config, port=str(port), bind="127.0.0.1")
        try:
            primary.start()
            return primary
        except AssertionError:
            if attempt == PORT_ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")
