"""A process of the load test: `python -m leasekit.load worker NAME`; see leasekit.demo.__main__."""

from __future__ import annotations

import asyncio

from leasekit.demo.child import live
from leasekit.demo.loop import loop_factory
from leasekit.load.messages import decode_order, decode_setup
from leasekit.load.worker import Worker


def main() -> None:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(live(Worker, decode_setup, decode_order))


if __name__ == "__main__":
    main()
