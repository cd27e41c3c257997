"""All goals for speed, measured as ratios in one run.

    python bench/run.py [--only server,api,...] [--rounds 3] [--quick] [--no-peers | --peers saq,arq]
                        [--backlog 5000000] [--server BINARY] [--pin] [--write NAME]

In every round each row measures a little, its contestants in turn; figures are medians of the rounds.
Rows: server calls api tenants lone consume memory growth keys (rows.py says what they are).
--quick: tiny sizes, to see that everything works; its figures mean nothing. --write: also write
results/NAME.json, results/NAME.png and the figures in README.md.

The exit code is 0, or 1 where a row that has a goal could not be measured at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import time

import report
import rows as all_rows
import uvloop
from rig import ByHand, Server, pin

import leasekit
from leasekit import Retention

FILES_WANTED = 4_096


def arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [row.name for row in all_rows.ROWS]
    parser.add_argument("--only", metavar="ROW,...", help=", ".join(names))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--peers", metavar="PEER,...", help="only these beside leasekit")
    chosen.add_argument("--no-peers", action="store_true", help="install and start none")
    parser.add_argument("--backlog", type=int, metavar="ROWS", help="the long line of `growth`")
    parser.add_argument(
        "--server", metavar="BINARY", help="default: redis-server, or the embedded one"
    )
    parser.add_argument("--write", metavar="NAME", help="write results/NAME.* and README.md")
    parser.add_argument(
        "--pin", action="store_true", help="servers on one core, clients on another"
    )
    given = parser.parse_args()
    given.only = names if given.only is None else given.only.split(",")
    for name in given.only:
        if name not in names:
            parser.error(f"no row {name!r}; there are {', '.join(names)}")
    return given


async def main(given: argparse.Namespace) -> int:
    sizes = all_rows.SMALL if given.quick else all_rows.Sizes()
    if given.backlog:
        sizes = dataclasses.replace(sizes, backlog=(sizes.backlog[0], given.backlog))
    rounds = 1 if given.quick else given.rounds
    Server.binary = given.server
    if given.pin:
        pin()
    server = Server()
    try:
        # Finished rows are kept, and none is old or many enough to be forgotten.
        retention = Retention(finished_count=10_000_000, finished_bytes=1 << 40)
        async with leasekit.connect(server.url, retention=retention) as kit:
            rig = all_rows.Rig(server, kit, await ByHand.open(server.url), sizes)
            peers = [] if given.no_peers else given.peers and given.peers.split(",")
            rows = [
                row(rig, peers) if row is all_rows.Consume else row(rig)
                for row in all_rows.ROWS
                if row.name in given.only
            ]
            try:
                for number in range(1, rounds + 1):
                    for row in rows:
                        began = time.perf_counter()
                        await row.round()
                        took = time.perf_counter() - began
                        print(f"round {number}: {row.name} {took:.1f} s", file=sys.stderr)
            finally:
                for row in rows:
                    await row.close()
                await rig.close()
            about = report.circumstances(server.name, rounds, is_pinned=given.pin)
            told = [(row, list(row.figures())) for row in rows]
    finally:
        server.stop()
    lines = ", ".join(f"{what} {value}" for what, value in about.items())
    text = f"{lines}\n\n{report.table(told)}\n{report.details(told)}"
    print(text)
    if given.write:
        print(f"\nwrote {report.write_json(told, about, given.write)}")
        picture = report.plot(told, about, given.write)
        print(f"wrote {picture}" if picture else "no plot: matplotlib is not installed")
        report.update_readme(text)
    missing = [row.name for row, figures in told if not figures]
    return 0 if not missing or (given.no_peers and missing == ["consume"]) else 1


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < FILES_WANTED:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES_WANTED, hard), hard))
    sys.exit(uvloop.run(main(arguments())))
