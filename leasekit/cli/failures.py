"""Whatever goes wrong becomes one line on standard error and a documented exit code."""

from __future__ import annotations

import os
import re
import sys
import traceback

from cyclopts import CycloptsError

from leasekit.connect import ResponseError
from leasekit.demo.crew import DemoFailed
from leasekit.errors import InvalidInput, LeasekitError, Overloaded, Unavailable
from leasekit.load.plan import LoadFailed
from leasekit.scripts import translate

__all__ = ["NotThere", "report"]

EXIT_BROKEN = 1
EXIT_USAGE = 2
EXIT_NOT_THERE = 3
EXIT_UNAVAILABLE = 4
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141  # as of a process that SIGPIPE ended

TRACEBACK_VARIABLE = "LEASEKIT_TRACEBACK"


class NotThere(Exception):
    """What was asked for by name does not exist."""


def report(error: BaseException) -> int:
    """Say what went wrong; gives the exit code. LEASEKIT_TRACEBACK=1 shows where, too."""
    if os.environ.get(TRACEBACK_VARIABLE) == "1":
        traceback.print_exception(error)
    message, code = _explain(error)
    # The line may quote a name that somebody else chose: let no control character through.
    line = "".join(one if one.isprintable() else " " for one in message)
    # A URL in the wrong place is quoted by who parses the command: without its password.
    line = re.sub(r"://\S*@", "://***@", line)
    sys.stderr.write(f"leasekit: {' '.join(line.split())}\n")
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; everything that was started has been stopped", EXIT_INTERRUPTED
    if isinstance(error, NotThere):
        return str(error), EXIT_NOT_THERE
    if isinstance(error, CycloptsError):
        return f"{error} (leasekit --help)", EXIT_USAGE
    if isinstance(error, InvalidInput):
        return str(error), EXIT_USAGE
    if isinstance(error, Unavailable | Overloaded):
        return str(error), EXIT_UNAVAILABLE
    if isinstance(error, DemoFailed):
        return f"the demo failed: {error}", error.exit_code
    if isinstance(error, LoadFailed):
        return f"the load test failed: {error}", error.exit_code
    if isinstance(error, LeasekitError):
        return str(error), EXIT_BROKEN
    if isinstance(error, ResponseError):
        return _explain(translate(error, "leasekit"))
    # Only its kind: the text of an unforeseen error may quote anything.
    kind = type(error).__name__
    message = f"unforeseen {kind}, which is a bug of leasekit; {TRACEBACK_VARIABLE}=1 shows where"
    return message, EXIT_BROKEN
