"""`leasekit load` from its command line: loops, mixes, limits, the result, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from servers import ServerProcess

from leasekit.cli import app
from leasekit.connect import URL_VARIABLE
from leasekit.load.judge import Result

Run = Callable[..., SimpleNamespace]
KINDS = "lifecycle=4,nack=2,extend=2,lease=2,idempotency=2"


@pytest.fixture
def target(running: Callable[[str], ServerProcess]) -> ServerProcess:
    return running("valkey-9")


@pytest.fixture
def run(
    target: ServerProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Runs `leasekit load` with these words: exit code, out, err, and the result where it is JSON."""
    monkeypatch.delenv(URL_VARIABLE, raising=False)

    def run_one(*words: str, url: str = target.url) -> SimpleNamespace:
        capsys.readouterr()
        code = app.run(["load", "--url", url, *words])
        out, err = capsys.readouterr()
        result = json.loads(out) if "--json" in words and out else None
        return SimpleNamespace(code=code, out=out, err=err, result=result)

    return run_one


def test_closed_loop_by_count(run: Run, target: ServerProcess) -> None:
    """So many things are done, all rows arrive, the numbers agree, and no key is left."""
    done = run("--count", "300", "--coroutines", "20", "--processes", "2", "--tenants=2", "--json")
    result = done.result
    assert (done.code, result["broken"], done.err) == (0, [], "")
    assert result["operations"] == result["enqueued"] == result["acked"] == 300
    assert (result["still_there"], result["lost"], result["held_twice"]) == (0, 0, 0)
    assert set(result["latencies"]) == {"enqueue", "claim", "ack", "lifecycle"}
    for latency in result["latencies"].values():
        percentiles = [latency[f"{name}_ms"] for name in ("p50", "p90", "p99", "p99.9", "max")]
        assert percentiles[0] > 0
        assert percentiles == sorted(percentiles)
    assert result["latencies"]["lifecycle"]["count"] == 300
    assert target.raw.keys("load-*") == []


def test_open_loop_by_duration(run: Run) -> None:
    """Arrivals come at the rate asked for, and count from when they were to come."""
    result = run("--rate", "400", "--duration", "1", "--lanes", "3", "--json").result
    assert result["broken"] == []
    assert 300 <= result["operations"] + result["arrivals_not_begun"] <= 500
    assert result["seconds"] < 2
    assert {"arrival_to_claim", "begun_late"} <= set(result["latencies"])
    assert result["acked"] == result["enqueued"]


def test_one_line_says_all(run: Run) -> None:
    """The JSON is one line with settings, versions, machine and costs, and is a Result as written."""
    done = run("--count", "50", "--seed", "7", "--payload-bytes", "1000", "--json")
    assert done.out.count("\n") == 1
    result = msgspec.json.decode(done.out, type=Result)
    assert (result.settings.seed, result.settings.payload_bytes) == (7, 1000)
    assert {"leasekit", "python", "redis"} <= set(result.versions)
    assert result.machine.cores >= 1
    assert result.server.startswith("valkey 9")
    assert result.client_cpu_seconds > 0
    assert 0 < result.harness_us_per_lifecycle < 1_000


def test_a_mix_of_all(run: Run) -> None:
    """Every kind is done: nacked rows are claimed again, extended ones acked, names and keys held."""
    result = run("--count", "400", "--mix", KINDS, "--coroutines", "10", "--json").result
    assert result["broken"] == []
    assert result["operations"] == 400
    wanted = {"nack", "extend", "acquire", "release", "reserve", "complete"}
    assert wanted <= set(result["latencies"])
    assert result["redelivered"] == result["outcomes"]["requeued"] > 0
    assert result["outcomes"]["extend extended"] > 0
    assert result["acked"] == result["enqueued"] < 400


def test_it_can_leave_what_it_wrote(run: Run, target: ServerProcess, tmp_path: Path) -> None:
    """With --keep the rows stay under the prefix that the result names; bodies are the file's."""
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text('{"a": 1}\n\n"text"\n')
    done = run("--count", "6", "--coroutines=1", "--input", str(bodies), "--keep", "--json")
    assert done.result["broken"] == []
    keys = target.raw.keys(f"{done.result['prefix']}:*")
    [docs] = [key for key in keys if key.endswith(b":outbox:docs")]
    payloads = [doc.partition(b"\n")[2] for doc in target.raw.hvals(docs)]
    assert sorted(payloads) == [b'"text"'] * 3 + [b'{"a":1}'] * 3
    target.raw.unlink(*keys)


def test_people_see_lines_and_a_table(run: Run) -> None:
    """Without --json it says where it works, and ends with percentiles and figures."""
    done = run("--count", "50")
    assert done.code == 0
    assert "prefix load-" in done.out
    for title in ("p99.9", "rows acked a second", "not delivered"):
        assert title in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--coroutines", "0"), "--coroutines must be 1 to 100000"),
        (("--processes", "65"), "--processes must be 1 to 64"),
        (("--coroutines", "2", "--processes", "3"), "cannot be shared"),
        (("--tenants", "10000", "--lanes", "1000"), "at most 100000"),
        (("--payload-bytes", "3"), "--payload-bytes must be 16 to"),
        (("--lease-ms", "1"), "--lease-ms must be 100 to"),
        (("--duration", "0"), "--duration must be 0.1 to"),
        (("--duration", "nan"), "--duration must be"),
        (("--duration", "1", "--count", "1"), "exclude each other"),
        (("--rate", "0"), "--rate must be above 0"),
        (("--rate", "inf"), "--rate must be above 0"),
        (("--mix", "poll=1"), "--mix does not understand"),
        (("--input", "nowhere.jsonl"), "cannot read nowhere.jsonl"),
    ],
)
def test_nonsense_is_refused(run: Run, words: tuple[str, ...], message: str) -> None:
    """Settings that cannot be meant end with 2 and a line that names the limit; nothing is sent."""
    done = run(*words)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_a_server_of_its_own_cannot_be_kept(run: Run) -> None:
    """Its data goes with it, so --keep is refused there, with what to do instead."""
    done = run("--keep", url="embedded://")
    assert (done.code, done.out) == (2, "")
    assert "embedded://DIRECTORY" in done.err


def test_servers_that_will_not_do(run: Run, tmp_path: Path) -> None:
    """Memory is refused with 2; a server that is not there is 4."""
    refused = run("--count", "5", url="memory://")
    assert (refused.code, refused.out) == (2, "")
    assert "one process" in refused.err
    away = run("--count", "5", url=f"unix://{tmp_path}/nobody")
    assert (away.code, away.out) == (4, "")
    assert "cannot connect" in away.err
