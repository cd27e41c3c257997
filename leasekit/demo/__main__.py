"""A child process of the demo: `python -m leasekit.demo producer|dispatcher|destination NAME`.

The name is there for those who look at the list of processes; all else comes by standard input.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

from leasekit.demo.child import Role, live
from leasekit.demo.destination import Destination
from leasekit.demo.dispatcher import Dispatcher
from leasekit.demo.loop import loop_factory
from leasekit.demo.messages import Setup
from leasekit.demo.producer import Producer

ROLES: dict[str, Callable[[Setup], Role]] = {
    "producer": Producer,
    "dispatcher": Dispatcher,
    "destination": Destination,
}


def main() -> None:
    role_of = ROLES[sys.argv[1]]
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(live(role_of))


if __name__ == "__main__":
    main()
