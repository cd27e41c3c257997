"""What every child process of the demo does: take orders, report, and end when the parent is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from leasekit.demo import messages
from leasekit.errors import LeasekitError, Unavailable

__all__ = ["Role", "live", "say"]

EXIT_TROUBLE = 1
EXIT_UNAVAILABLE = 4


class Role(Protocol):
    """A producer, dispatcher or destination: `run` until done, `obey` orders meanwhile."""

    def obey(self, order: Any) -> None: ...

    async def run(self) -> None: ...


def say(report: msgspec.Struct) -> None:
    """Report to the parent; waits where it does not read, and tells nobody where it is gone: then
    the orders end as well, and the process with them, after it has tidied up."""
    try:
        sys.stdout.buffer.write(messages.encode(report))
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def live(
    role_of: Callable[[Any], Role],
    decode_setup: Callable[[bytes], Any] = messages.decode_setup,
    decode_order: Callable[[bytes], Any] = messages.decode_order,
) -> None:
    """Read the Setup, run the role; end with it, or with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a ctrl-C is for the parent
    orders = asyncio.StreamReader(limit=2**20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(orders), sys.stdin
    )
    role = role_of(decode_setup(await orders.readline()))
    running = asyncio.ensure_future(role.run())
    listening = asyncio.ensure_future(_listen(role, orders, decode_order))
    try:
        await asyncio.wait({running, listening}, return_when=asyncio.FIRST_COMPLETED)
        running.cancel()
        await running
    except asyncio.CancelledError:
        pass
    except LeasekitError as error:
        code = EXIT_UNAVAILABLE if isinstance(error, Unavailable) else EXIT_TROUBLE
        say(messages.Trouble(str(error), code))
    finally:
        listening.cancel()


async def _listen(
    role: Role, orders: asyncio.StreamReader, decode_order: Callable[[bytes], Any]
) -> None:
    """Pass orders on; returns when the parent has closed the pipe, or is gone."""
    while line := await orders.readline():
        role.obey(decode_order(line))
