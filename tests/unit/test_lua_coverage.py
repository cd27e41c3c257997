"""The bridge between a script in this process and its data on a server answers as a server does."""

from __future__ import annotations

import pytest
from lua_coverage import LuaCoverage, active_lines, globals_of
from redis import Redis, ResponseError
from servers import Server

REPLIES = {
    "nil reply of a command is false": "return {tostring(redis.call('GET', KEYS[1]))}",
    "missing members are false": "return redis.call('HMGET', KEYS[1], 'a', 'b')",
    "nested replies": "return {1, {'two', {3}}, {}}",
    "a list ends at nil": "return {1, nil, 3}",
    "false in a list": "return {1, false, 3}",
    "false, nil and true": "return {tostring(nil), false, true}",
    "fractions are cut off": "return {1.9, -1.9}",
    "maps are empty": "return {a = 1}",
    "no reply": "local nothing = 1",
    "status of a command": "return redis.call('SET', KEYS[1], 'x')",
    "status in Lua": "return {redis.call('SET', KEYS[1], 'x').ok}",
    "status of the script": "return redis.status_reply('FINE')",
    "bytes": "return {ARGV[2], redis.call('SET', KEYS[1], ARGV[2]).ok, redis.call('GET', KEYS[1])}",
    "numbers as arguments": "redis.call('SET', KEYS[1], 2^53 - 1)"
    " return redis.call('GET', KEYS[1])",
    "scores are text": "redis.call('ZADD', KEYS[1], '1.5', 'm')"
    " return {redis.call('ZSCORE', KEYS[1], 'm')}",
    "pairs of a range": "redis.call('ZADD', KEYS[1], '7', 'm')"
    " return redis.call('ZRANGE', KEYS[1], '0', '-1', 'WITHSCORES')",
    "caught error": "return {tostring(redis.pcall('HGET', KEYS[1]).err ~= nil)}",
    "arguments": "return {#KEYS, #ARGV, ARGV[1]}",
}

ERRORS = {
    "refusal of the script": ("return redis.error_reply('LK_ARGUMENT limit')", "LK_ARGUMENT limit"),
    "error of a command": (
        "redis.call('SET', KEYS[1], 'x') redis.call('HGET', KEYS[1], 'f')",
        "WRONGTYPE",
    ),
    "assignment to a global": ("count = 1", "global|readonly"),
    "reading a global": ("return {count}", "global"),
    "argument that is a table": (
        "return redis.call('SET', KEYS[1], {})",
        "must be strings or integers",
    ),
}

BRANCHES = """local function helper(flag)
  if flag == "yes" then
    return {1}
  else
    return {2}
  end
end

local function unused()
  local a = 1
  return a
end

return helper(ARGV[1])
"""


@pytest.fixture
def key(tenant_name: str) -> str:
    return f"lk:{{{tenant_name}.main}}:fence"


@pytest.mark.parametrize("script", REPLIES.values(), ids=REPLIES.keys())
def test_reply_is_the_servers(server: Server, key: str, script: str) -> None:
    """A script gives the same reply through the bridge as run by the server."""
    arguments = [b"1", b"\x00\xff\r\n"]
    theirs = server.raw.eval(script, 1, key, *arguments)
    server.raw.delete(key)

    assert LuaCoverage().run(server.raw, "script", script, [key], arguments) == theirs


@pytest.mark.parametrize(("script", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_error_is_raised(real_server: Server, key: str, script: str, text: str) -> None:
    """A script that fails raises ResponseError through the bridge as it does on the server."""
    with pytest.raises(ResponseError, match=text):
        real_server.raw.eval(script, 1, key)
    real_server.raw.delete(key)

    with pytest.raises(ResponseError, match=text):
        LuaCoverage().run(real_server.raw, "script", script, [key], [])


def test_missed_lines(memory_server: Server) -> None:
    """Lines never run are missed, in functions never called too; the rest adds up over runs."""
    coverage = LuaCoverage()
    assert coverage.run(memory_server.raw, "branches", BRANCHES, [], ["yes"]) == [1]
    assert coverage.missed() == {"branches": [5, 10, 11]}

    assert coverage.run(memory_server.raw, "branches", BRANCHES, [], ["no"]) == [2]
    assert coverage.missed() == {"branches": [10, 11]}


def test_lines_before_an_error_count(memory_server: Server) -> None:
    """A run that ends in an error has hit the lines up to it."""
    coverage = LuaCoverage()
    with pytest.raises(ResponseError):
        coverage.run(memory_server.raw, "fails", "local a = 1\nnosuch()\nreturn a\n", [], [])

    assert coverage.hits() == {"fails": [1, 2]}
    assert coverage.missed() == {"fails": [3]}


def test_lines_of_another_process_count() -> None:
    """What a second process has run is added to what this one has."""
    coverage = LuaCoverage()
    coverage.add({"script": [1, 2]})
    coverage.add({"script": [2, 5], "other": []})

    assert coverage.hits() == {"script": [1, 2, 5], "other": []}


def test_shebang_keeps_line_numbers() -> None:
    """A first line for the server is no line of Lua, and the others keep their numbers."""
    assert active_lines("#!lua flags=no-writes\n\nreturn 1\n") == {3}


def test_constants_of_every_type_are_read() -> None:
    """Strings, numbers, booleans and nil in a script do not confuse the reading of its lines."""
    source = 'local a = {"text", 1.5, true, false, nil, [""] = 2}\n\nlocal b = a == nil\nreturn b\n'
    assert active_lines(source) == {1, 3, 4}


def test_globals_are_found() -> None:
    """Every use of a global is found, in functions never called too; locals are none."""
    source = "local a = 1\nlocal function f()\n  count = a\nend\nreturn {f, KEYS}\n"
    assert sorted(globals_of(source)) == [(3, "count", True), (5, "KEYS", False)]


def test_another_source_under_a_name_is_refused(memory_server: Server) -> None:
    """Hits of different texts under one name would be added up wrongly, so that is refused."""
    coverage = LuaCoverage()
    coverage.run(memory_server.raw, "script", "return 1", [], [])
    with pytest.raises(ValueError, match="another source"):
        coverage.run(memory_server.raw, "script", "return 2", [], [])


def test_data_is_the_servers(server: Server, key: str) -> None:
    """What a script writes through the bridge is there for everybody else."""
    LuaCoverage().run(server.raw, "set", "return redis.call('SET', KEYS[1], ARGV[1])", [key], [7])
    assert server.raw.get(key) == b"7"
    assert isinstance(server.raw, Redis)
