"""`leasekit demo` ends well, finds planted faults, and leaves no process behind.

Each run has a mark in its environment, which every process that it starts inherits; so the kernel
itself says who is left. Faults are planted in a copy of the package and its scripts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from leasekit import scripts
from leasekit.connect import URL_VARIABLE

PACKAGE = Path(scripts.__file__).parent
END_SECONDS_MAX = 40
GONE_SECONDS_MAX = 15
STEP_SECONDS = 0.05
MARK = "LEASEKIT_TEST_MARK"

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="there it is refused"),
    pytest.mark.timeout(2 * END_SECONDS_MAX),
]


class Demo:
    """One run of the demo. Its temporary directories are in `home`."""

    def __init__(self, *words: str, rows: int = 400, package_root: Path | None = None) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="lk-"))
        self.mark = uuid.uuid4().hex
        environment = os.environ | {MARK: self.mark, "TMPDIR": str(self.home)}
        environment.pop(URL_VARIABLE, None)
        if package_root is not None:
            environment["PYTHONPATH"] = str(package_root)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "leasekit.cli", "demo", f"--rows={rows}", *words],
            cwd=package_root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def finish(self) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        out, err = self.process.communicate(timeout=END_SECONDS_MAX)
        return self.process.returncode, out, err

    def report(self) -> dict[str, Any]:
        """The JSON document of a run that came to its end, with its exit code."""
        code, out, err = self.finish()
        assert out, err
        report: dict[str, Any] = json.loads(out)
        return report | {"exit_code": code, "err": err}

    def wait_for_line(self, part: str) -> None:
        """Read what it says until a line holds `part`."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if part in line:
                return
        pytest.fail(f"it never said {part!r}: {self.finish()}")

    def marked(self) -> list[str]:
        """The command lines of all processes that carry the mark; zombies have none."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found.append(f"{folder.name} {command}")
            except OSError:
                continue  # It has ended meanwhile, or is somebody else's.
        return found

    def check_all_gone(self) -> None:
        """No process and no file of the run is left, at once or soon."""
        deadline = time.monotonic() + GONE_SECONDS_MAX
        while (left := [*self.marked(), *self.files()]) and time.monotonic() < deadline:
            time.sleep(STEP_SECONDS)
        assert left == []

    def files(self) -> list[str]:
        return sorted(path.name for path in self.home.iterdir())

    def clean_up(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        for line in self.marked():
            os.kill(int(line.split()[0]), signal.SIGKILL)
        shutil.rmtree(self.home, ignore_errors=True)


@pytest.fixture
def demo() -> Iterator[Callable[..., Demo]]:
    """Starts runs of the demo: `demo("--json", package_root=copy)`."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("without /proc nobody can say which processes are left")
    runs: list[Demo] = []

    def start(*words: str, rows: int = 400, package_root: Path | None = None) -> Demo:
        runs.append(Demo(*words, rows=rows, package_root=package_root))
        return runs[-1]

    yield start
    for run in runs:
        run.clean_up()


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """A directory that holds copies of `leasekit` and of its scripts, to plant faults in."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "leasekit", ignore=ignored)
    target = tmp_path / "leasekit" / "lua"
    if not target.exists():
        shutil.copytree(scripts.lua_directory(), target, ignore=ignored)
    return tmp_path


def plant(path: Path, pattern: str, replacement: str) -> None:
    """Change the one place that matches; a test whose place has moved must say so."""
    text, count = re.subn(pattern, replacement, path.read_text(), flags=re.MULTILINE)
    assert count == 1, f"{path.name} has {count} places like {pattern!r}: plant the fault anew"
    path.write_text(text)


def test_it_ends_well(demo: Callable[..., Demo]) -> None:
    """All rows arrive, the stopped dispatcher is refused everywhere, nothing stays behind."""
    run = demo("--json")
    report = run.report()
    assert (report["exit_code"], report["broken"], report["err"]) == (0, [], "")
    assert report["enqueued"] == report["delivered"] == 400
    zeros = ("late_acks_accepted", "lost", "stale_applied", "altered", "not_acked")
    assert {name: report[name] for name in zeros} == dict.fromkeys(zeros, 0)
    for name in ("late_acks_refused", "refused_as_stale", "redelivered_after_kill"):
        assert report[name] >= 1, name
    run.check_all_gone()


def test_real_bodies_and_kept_data(demo: Callable[..., Demo], tmp_path: Path) -> None:
    """A file of bodies is taken again and again; --keep leaves the data and says how to look."""
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text('{"a": [null, 1.5, "\\ud83d\\ude00"]}\n\n"text"\n[]\n')
    run = demo("--input", str(bodies), "--keep", str(tmp_path / "kept data"))
    code, out, err = run.finish()
    assert (code, err) == (0, "")
    assert "look at it: leasekit rows --url" in out
    assert (tmp_path / "kept data" / "appendonlydir").is_dir()
    run.check_all_gone()


def test_a_late_ack_that_is_accepted_is_found(
    demo: Callable[..., Demo], package_copy: Path
) -> None:
    """With the token check taken out of the ack, the demo ends with 1 and names the promise."""
    plant(
        package_copy / "leasekit/lua/outbox/ack.lua",
        r"^(  local line = handled\[id\] or lines\[i\])$",
        r'\1\n  token = line and string.match(line, "^%S+ %S+ (%S+)") or token',
    )
    run = demo("--json", package_root=package_copy)
    report = run.report()
    assert report["exit_code"] == 1
    assert report["late_acks_accepted"] >= 1
    assert "of an older holder accepted" in report["err"]
    run.check_all_gone()


def test_a_fence_that_does_not_rise_is_found(demo: Callable[..., Demo], package_copy: Path) -> None:
    """With one fence for all, the destination cannot tell holders apart, and the demo says so."""
    plant(
        package_copy / "leasekit/demo/dispatcher.py",
        r"\{claim\.row\.id\} \{claim\.fence\}",
        "{claim.row.id} 7",
    )
    report = demo("--json", package_root=package_copy).report()
    assert report["exit_code"] == 1
    assert any("two holders with one fence" in promise for promise in report["broken"])


def test_a_lost_row_is_counted(demo: Callable[..., Demo], package_copy: Path) -> None:
    """Rows that are acked and were never delivered are missing at the destination: lost."""
    shorten_patience(package_copy, 8)  # on a busy machine three seconds may pass without an ack
    plant(
        package_copy / "leasekit/demo/dispatcher.py",
        r"^        answers = await destination\.deliver\(claims\)$",
        "        answers = await destination.deliver(claims[1:])",
    )
    report = demo("--json", package_root=package_copy).report()
    assert report["exit_code"] == 1
    assert report["lost"] >= 1
    assert report["not_acked"] == 0
    assert any("lost: enqueued, and never applied" in promise for promise in report["broken"])


def test_a_hang_is_a_failure(demo: Callable[..., Demo], package_copy: Path) -> None:
    """Where every ack is refused nothing gets done: the demo ends, with what it waited for."""
    shorten_patience(package_copy)
    plant(
        package_copy / "leasekit/lua/outbox/ack.lua",
        r"^  if line and #token == 22 then$",
        "  if line and #token == 23 then",
    )
    run = demo("--json", package_root=package_copy)
    report = run.report()
    assert report["exit_code"] == 1
    assert report["broken"][0].startswith("nothing moved for 3 s while waiting for ")
    assert report["not_acked"] > 0
    run.check_all_gone()


def test_trouble_of_a_child_is_told(demo: Callable[..., Demo], package_copy: Path) -> None:
    """A child that ends by itself ends the demo with one line that names it and its reason."""
    plant(
        package_copy / "leasekit/demo/destination.py",
        r"^        home = tempfile\.mkdtemp",
        '        raise RuntimeError("planted")\n        home = tempfile.mkdtemp',
    )
    run = demo("--json", package_root=package_copy)
    code, out, err = run.finish()
    assert (code, out) == (1, "")
    assert err == (
        "leasekit: the demo failed: destination ended by itself (return code 1): "
        "RuntimeError: planted\n"
    )
    run.check_all_gone()


@pytest.mark.parametrize("moment", ["started ", "stopped (SIGSTOP)", "went on (SIGCONT)"])
def test_a_killed_parent_leaves_nothing(demo: Callable[..., Demo], moment: str) -> None:
    """SIGKILL of the parent ends all processes, a stopped one too, and the server."""
    run = demo(rows=2_000)
    run.wait_for_line(moment)
    run.process.kill()
    run.check_all_gone()


def test_without_a_reader_it_stops_everything(demo: Callable[..., Demo]) -> None:
    """Where nobody reads its output any more it ends with 141, and nothing is left."""
    run = demo(rows=2_000)
    run.wait_for_line("started ")
    assert run.process.stdout is not None
    run.process.stdout.close()
    assert run.process.wait(END_SECONDS_MAX) == 141
    run.check_all_gone()


@pytest.mark.parametrize("moment", ["started ", "stopped (SIGSTOP)"])
def test_interrupted_it_stops_everything(demo: Callable[..., Demo], moment: str) -> None:
    """A ctrl-C ends it with 130, one line, and nothing left."""
    run = demo(rows=2_000)
    run.wait_for_line(moment)
    os.killpg(run.process.pid, signal.SIGINT)
    code, _, err = run.finish()
    assert (code, err) == (
        130,
        "leasekit: interrupted; everything that was started has been stopped\n",
    )
    run.check_all_gone()


def shorten_patience(package_copy: Path, seconds: int = 3) -> None:
    plant(package_copy / "leasekit/demo/crew.py", r"^STALL_S = 20\.0$", f"STALL_S = {seconds}.0")
