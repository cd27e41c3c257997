"""The loader of Lua commands: headers, names, flags, and what the server's errors mean."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from redis.exceptions import ResponseError

from leasekit import scripts
from leasekit.errors import (
    CorruptState,
    LeasekitError,
    Overloaded,
    ScriptFailed,
    Unavailable,
)
from leasekit.scripts import Script, read_scripts, script, translate

HEADER = """\
-- outbox/ack: rows were delivered.
--
-- KEYS  1 docs  hash id -> document
--       2 state hash id -> state line
-- ARGV  1 now_ms "" for the server's clock
--       2 route  lane and target
-- ITEM  id token: a row
-- REPLY now_ms, per item: acked |
--       lost_claim
-- ERRORS LK_ARGUMENT
-- FLAGS allow-oom
-- COST  O(1)
-- WHY   Because.
local docs, state = KEYS[1], KEYS[2]
return { 1 }
"""
PRELUDE = "local function refuse() end\n"

Read = Callable[[str], Script]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads a text as the file outbox/ack.lua of an otherwise empty directory."""

    def read_text(text: str) -> Script:
        path = tmp_path / "outbox" / "ack.lua"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return scripts._read(path, tmp_path, PRELUDE)

    return read_text


# --- headers --------------------------------------------------------------------------------------


def test_a_header_says_all_that_a_call_needs(read: Read) -> None:
    """Names in order, fields of an item, reply, errors and flag."""
    found = read(HEADER)

    assert found.name == "outbox/ack"
    assert found.keys == ("docs", "state")
    assert found.arguments == ("now_ms", "route")
    assert found.item == ("id", "token")
    assert found.reply == "now_ms, per item: acked | lost_claim"
    assert found.errors == ("LK_ARGUMENT",)
    assert found.flag == "allow-oom"
    assert not found.reads_only


@pytest.mark.parametrize(
    ("old", "new", "line", "problem"),
    [
        ("-- outbox/ack: rows", "-- outbox/nack: rows", 1, "the first line must be"),
        ("delivered.", "delivered", 1, "the first line must be"),
        ("-- outbox/ack: rows were delivered.", "", 1, "the first line must be"),
        ("delivered.\n--\n", "delivered.\n", 2, "the second line must be `--`"),
        ("delivered.\n--\n", "delivered.\n-- more\n", 2, "the second line must be `--`"),
        ("-- WHY   Because.", "-- WHAT  Because.", 13, "not a header line"),
        ("-- WHY   Because.", "-- and so on", 13, "not a header line"),
        ("-- WHY   Because.", "--WHY Because.", 13, "not a header line"),
        ("-- WHY   Because.", "--", 13, "not a header line"),
        ("-- WHY   Because.", "-- COST  O(2)", 13, "COST stands twice or out of order"),
        ("-- FLAGS allow-oom\n-- COST  O(1)", "-- COST  O(1)\n-- FLAGS none", 12, "FLAGS stands"),
        ("-- REPLY now_ms, per", "-- BODY  now_ms, per", 8, "not a header line"),
        ("-- FLAGS allow-oom\n", "", 1, "the header has no FLAGS"),
        ("-- COST  O(1)\n", "", 1, "the header has no COST"),
        ("-- ERRORS LK_ARGUMENT\n", "", 1, "the header has no ERRORS"),
        ("--       2 state", "--       3 state", 4, "KEYS 3 is out of order"),
        ("-- KEYS  1 docs", "-- KEYS  2 docs", 3, "KEYS 2 is out of order"),
        ("--       2 route", "--       1 route", 6, "ARGV 1 is out of order"),
        ("state hash id", "state list id", 4, "KEYS lines are `n name type meaning`"),
        ("state hash id -> state line", "state hash", 4, "KEYS lines are `n name type meaning`"),
        ("2 route  lane and target", "2", 6, "ARGV lines are `n name meaning`"),
        ("-- FLAGS allow-oom", "-- FLAGS no-cluster", 11, "FLAGS is one of none, no-writes"),
        ("-- FLAGS allow-oom", "-- FLAGS none no-writes", 11, "FLAGS is one of none, no-writes"),
    ],
)
def test_a_malformed_header_is_refused(
    read: Read, old: str, new: str, line: int, problem: str
) -> None:
    """The error names file and line, so that an editor can jump there."""
    assert old in HEADER
    with pytest.raises(ScriptFailed, match=rf"outbox/ack\.lua:{line}: {re.escape(problem)}"):
        read(HEADER.replace(old, new, 1))


@pytest.mark.parametrize("text", ["", "-- outbox/ack: rows were delivered.", "return 1"])
def test_a_file_without_a_header_is_refused(read: Read, text: str) -> None:
    """Also one that ends before its second line."""
    with pytest.raises(ScriptFailed, match=r"outbox/ack\.lua:[12]: the (first|second) line"):
        read(text)


def test_a_command_may_have_no_items_and_no_errors(read: Read) -> None:
    """ITEM and WHY may be left out; ERRORS may be none."""
    text = HEADER.replace("-- ITEM  id token: a row\n", "").replace("-- WHY   Because.\n", "")
    found = read(text.replace("LK_ARGUMENT", "none"))
    assert found.item == ()
    assert found.errors == ()


def test_every_command_of_the_library_is_read() -> None:
    """The shipped commands have good headers, and each starts with the one prelude."""
    commands = read_scripts()
    assert {"outbox/claim", "lease/acquire", "idempotency/reserve", "tenant/touch"} <= set(commands)
    assert len({command.prelude for command in commands.values()}) == 1


def test_a_missing_lua_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation says what is missing and where it was looked for."""
    monkeypatch.setattr(scripts, "__file__", str(tmp_path / "leasekit" / "scripts.py"))
    with pytest.raises(ScriptFailed, match=r"no lua/prelude\.lua in or beside .*leasekit"):
        scripts.lua_directory()


# --- calls ----------------------------------------------------------------------------------------


def test_names_are_put_in_the_order_of_the_header(read: Read) -> None:
    """Callers name keys and arguments; only the header knows their places."""
    bound = read(HEADER).bind({"state": "s", "docs": "d"}, {"route": "r", "now_ms": 7})
    assert bound == (2, "d", "s", 7, "r")


@pytest.mark.parametrize(
    ("keys", "arguments", "says"),
    [
        ({"docs": "d"}, {"now_ms": 7, "route": "r"}, r"key missing \['state'\], unknown \[\]"),
        ({}, {}, r"key missing \['docs', 'state'\]"),
        (
            {"docs": "d", "state": "s", "due": "x"},
            {"now_ms": 7, "route": "r"},
            r"key missing \[\], unknown \['due'\]",
        ),
        (
            {"docs": "d", "state": "s"},
            {"now_ms": 7, "lane": "r"},
            r"argument missing \['route'\], unknown \['lane'\]",
        ),
        ({"docs": "d", "state": "s"}, {"now_ms": 7}, r"argument missing \['route'\]"),
    ],
)
def test_a_wrong_name_is_a_type_error(
    read: Read, keys: dict[str, str], arguments: dict[str, str | int], says: str
) -> None:
    """Before anything is sent, naming the command and the names."""
    with pytest.raises(TypeError, match=f"outbox/ack: {says}"):
        read(HEADER).bind(keys, arguments)


def test_items_are_checked_against_the_header() -> None:
    """Python and Lua must agree on the fields of an item and their order."""
    assert script("outbox/ack", item=("id", "token")).name == "outbox/ack"
    with pytest.raises(TypeError, match=r"outbox/ack: items are \('id', 'token'\) in its header"):
        script("outbox/ack", item=("token", "id"))
    with pytest.raises(KeyError):
        script("outbox/no-such-command")


@pytest.mark.parametrize(
    ("flag", "first_line"),
    [
        ("none", "#!lua"),
        ("no-writes", "#!lua flags=no-writes"),
        ("allow-oom", "#!lua flags=allow-oom"),
    ],
)
def test_flags_stand_in_the_first_line_where_the_server_knows_them(
    read: Read, flag: str, first_line: str
) -> None:
    """Servers before 7 get the same text without that line, and so another digest."""
    found = read(HEADER.replace("FLAGS allow-oom", f"FLAGS {flag}"))

    assert found.text(shebang=False) == found.source
    assert found.source.endswith(found.body)
    assert found.text(shebang=True) == f"{first_line}\n{found.source}"
    assert found.reads_only == (flag == "no-writes")
    assert found.sha(shebang=True) == hashlib.sha1(found.text(shebang=True).encode()).hexdigest()
    assert found.sha(shebang=True) != found.sha(shebang=False)


def test_a_command_carries_only_what_it_uses_of_the_prelude() -> None:
    """What a command does not use, directly or through another, is blank; lines stay in place."""
    prelude = (
        "local LEAST = 1\n\nlocal function a()\n  return LEAST\nend\n\nlocal function b()\nend\n"
    )
    body = HEADER.replace("return { 1 }", "return { a() }")

    found = scripts._only_needed(prelude, body)

    assert found == "local LEAST = 1\n\nlocal function a()\n  return LEAST\nend\n\n\n\n"


def test_a_call_is_an_evalsha_of_the_right_text(read: Read) -> None:
    """Items follow keys and arguments, all fields in a row."""
    found = read(HEADER)
    bound = found.bind({"docs": "d", "state": "s"}, {"now_ms": "", "route": "r"})

    call = scripts.call_command(found, bound, ["i1", "t1", "i2", "t2"], shebang=True)

    sha = found.sha(shebang=True)
    assert call == ("EVALSHA", sha, 2, "d", "s", "", "r", "i1", "t1", "i2", "t2")
    assert scripts.load_command(found, shebang=False) == ("SCRIPT", "LOAD", found.source)
    assert len(scripts.load_commands(shebang=True)) == len(read_scripts())


# --- errors ---------------------------------------------------------------------------------------

IN_CALL = "ERR Error running script (call to f_1b2c): @user_script:27: "
IN_SCRIPT = IN_CALL + "@user_script: 27: "


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'.", Overloaded, "nothing was w"),
        (IN_SCRIPT + "-OOM command not allowed when used", Overloaded, "raise maxmemory"),
        ("WRONGTYPE Operation against a key", CorruptState, "did not write; use a prefix"),
        (IN_CALL + "WRONGTYPE Operation against a key", CorruptState, "did not write"),
        ("LK_CORRUPT state of m1", CorruptState, "nothing was changed; run `leasekit doctor`"),
        ("LOADING Redis is loading the dataset in memory", Unavailable, "safe to try again"),
        ("MISCONF Redis is configured to save RDB snapshots", Unavailable, "nothing was applied"),
        (IN_SCRIPT + "-MISCONF Errors writing to the AOF file", Unavailable, "nothing was applied"),
        ("READONLY You can't write against a read only replica.", Unavailable, "safe to try again"),
        (IN_SCRIPT + "-READONLY You can't write against", Unavailable, "safe to try again"),
        ("MASTERDOWN Link with MASTER is down", Unavailable, "safe to try again"),
        ("CLUSTERDOWN The cluster is down", Unavailable, "safe to try again"),
        ("BUSY Redis is busy running a script.", Unavailable, "safe to try again"),
        ("NOREPLICAS Not enough good replicas to write.", Unavailable, "safe to try again"),
        ("NOPERM this user has no permissions to run", Unavailable, "give it the rights"),
        ("ERR ACL failure in script: User app has no permissions", Unavailable, "the rights"),
        (IN_SCRIPT + "The user executing the script can't run this", Unavailable, "the rights"),
        ("NOAUTH Authentication required.", Unavailable, "refuses this user"),
        ("NOSCRIPT No matching script.", Unavailable, "allow `script|load`"),
        ("LK_ARGUMENT route", ScriptFailed, "nothing was written"),
        ("ERR something new", ScriptFailed, "state of what it touched is not known"),
        ("", ScriptFailed, "state of what it touched is not known"),
    ],
)
def test_a_servers_error_becomes_one_of_ours(
    text: str, kind: type[LeasekitError], says: str
) -> None:
    """Each says what happened, what state things are in, and what is safe to do next."""
    error = translate(ResponseError(text), "outbox/claim", tenant="acme.prod")

    assert type(error) is kind
    assert error.tenant == "acme.prod"
    assert str(error).startswith("outbox/claim: ")
    assert says in str(error)


def test_an_error_shows_the_line_of_the_file() -> None:
    """The server counts lines from the prelude's first; people look into the command's file."""
    prelude_lines = read_scripts()["outbox/claim"].prelude.count("\n")
    late = ResponseError(f"ERR user_script:{prelude_lines + 12}: attempt to index a nil value")
    early = ResponseError("ERR user_script:12: attempt to index a nil value")

    assert "line 12: attempt" in str(translate(late, "outbox/claim"))
    assert "prelude.lua:12: attempt" in str(translate(early, "outbox/claim"))


@pytest.mark.parametrize("quote", ["'", "`"])
def test_an_error_never_repeats_arguments(quote: str) -> None:
    """A server that does not know a command shows what it was sent with."""
    text = f"ERR unknown command {quote}EVALSHA{quote}, with args beginning with: {quote}secret"
    error = translate(ResponseError(text + quote), "outbox/claim")

    assert "unknown command" in str(error)
    assert "secret" not in str(error)


def test_only_a_missing_script_is_missing() -> None:
    """Healing re-sends; that is safe only where nothing was run."""
    assert scripts.is_missing(ResponseError("NOSCRIPT No matching script. Please use EVAL."))
    assert not scripts.is_missing(ResponseError("ERR NOSCRIPT in the middle"))
    assert not scripts.is_missing(ResponseError(""))
