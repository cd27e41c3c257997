"""The command line: `leasekit demo`, commands that read, and commands of operators that change.

    app       the commands, their options and help         reading   what is asked of the server
    operating the operators' commands                      looking   what they ask of the server
    checkup   what `leasekit doctor` looks at              changing  what they change there
    gating    the gate's commands                          intents   what they ask and decide
    tables    answers for people                           failures  errors as one line and an exit code

Exit codes: 0 all is well; 1 a promise was broken, or data is damaged; 2 the command or its input is
wrong; 3 what was asked for is not there; 4 the server cannot be reached or refuses; 130 interrupted;
141 whoever read the output went away.
With --json there is one JSON document on standard output and nothing else; errors are one line on
standard error. No payload is shown without --reveal, no token and no password ever.
"""

from __future__ import annotations

import sys

__all__ = ["main"]

EXIT_USAGE = 2
EXTRA = frozenset({"cyclopts", "rich"})


def main() -> int:
    """Run the command that sys.argv holds; gives the exit code."""
    try:
        # Imported here: they belong to an extra, which a program that links leasekit can do without.
        import cyclopts  # noqa: F401
        import rich  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.stderr.write(
            f"leasekit: the command line needs {error.name}: pip install 'leasekit[cli]'\n"
        )
        return EXIT_USAGE
    from leasekit.cli.app import run

    return run(sys.argv[1:])
