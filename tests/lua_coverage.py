"""Which lines of a script have run: the script in Lua 5.1 in this process, its data on a server.

The source runs inside lupa with a line hook. Each `redis.call` of it goes to a real server as an
EVAL of its own, whose few lines say what kind of reply it was; so the server itself converts the
types (nil to false, a status to a table), and this file knows no protocol. What is *not* as on a
server: the calls are not atomic together, TIME moves on between them, and flags are not enforced.

Lines that could run are read from the compiled bytecode, which also knows the functions that nobody
called. The last instruction of a function is left out: the compiler adds it, and it never runs
where a `return` stands before it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lupa.lua51
import redis

# A reply as {kind, value}. Kinds: status, error, value.
BRIDGE = """
local reply = redis.pcall(unpack(ARGV))
if type(reply) == "table" and reply.ok then return {"status", reply.ok} end
if type(reply) == "table" and reply.err then return {"error", reply.err} end
return {"value", reply}
"""

# What a script sees as `redis`, and the call that counts its lines.
HOST = """
local send, chunk = ...
local failed = {}
redis = {
  error_reply = function(text) return {err = text} end,
  status_reply = function(text) return {ok = text} end,
  pcall = function(...) return send(...) end,
  call = function(...)
    local reply = send(...)
    if type(reply) == "table" and reply.err then error(reply, 0) end
    return reply
  end,
}
setmetatable(_G, {
  __newindex = function(_, name) error("assignment to the global " .. name, 2) end,
  __index = function(_, name) error("no such global: " .. tostring(name), 2) end,
})
return function(script, keys, arguments, lines)
  rawset(_G, "KEYS", keys)
  rawset(_G, "ARGV", arguments)
  debug.sethook(function(_, line)
    if debug.getinfo(2, "S").source == chunk then lines[line] = true end
  end, "l")
  local passed, reply = pcall(script)
  debug.sethook()
  if passed then return reply end
  if type(reply) == "table" then return reply end
  return {err = "ERR " .. tostring(reply)}
end
"""


class LuaCoverage:
    """Runs scripts against `client` and remembers, by script name, which lines have run."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._sources: dict[str, bytes] = {}
        self._hit: dict[str, set[int]] = {}

    def run(
        self,
        name: str,
        source: str | bytes,
        keys: Sequence[str | bytes],
        arguments: Sequence[str | bytes | int],
    ) -> Any:
        """Run a whole script; the reply is what `client.eval` gives, errors are raised alike.

        `source` is the text as the server would get it; a first line `#!lua` is passed over.
        """
        text = source.encode() if isinstance(source, str) else source
        if self._sources.setdefault(name, text) != text:
            raise ValueError(f"{name} was run before with another source")
        lua = lupa.lua51.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        chunk = name.encode()
        host = lua.eval(b"function(text, name) return assert(loadstring(text, name)) end")
        lines = lua.table()
        run = host(HOST.encode(), b"=host")(lambda *call: self._send(lua, call), b"=" + chunk)
        reply = run(
            host(_without_shebang(text), b"=" + chunk),
            lua.table(*map(_argument, keys)),
            lua.table(*map(_argument, arguments)),
            lines,
        )
        self._hit.setdefault(name, set()).update(lines)
        result = _from_lua(reply)
        if isinstance(result, redis.ResponseError):
            raise result
        return result

    def missed(self) -> dict[str, list[int]]:
        """For each script that ran: the lines that could run and have not, in order."""
        return {
            name: sorted(active_lines(source) - self._hit[name])
            for name, source in sorted(self._sources.items())
        }

    def hit(self) -> Mapping[str, frozenset[int]]:
        """For each script that ran: the lines that have run."""
        return {name: frozenset(lines) for name, lines in self._hit.items()}

    def _send(self, lua: Any, call: Sequence[Any]) -> Any:
        for argument in call:
            if isinstance(argument, bool) or not isinstance(argument, bytes | int | float):
                text = b"ERR Lua redis lib command arguments must be strings or integers"
                return lua.table_from({b"err": text})
        kind, value = self._client.eval(BRIDGE, 0, *map(_argument, call))
        if kind == b"value":
            return _to_lua(lua, value)
        return lua.table_from({b"ok" if kind == b"status" else b"err": value})


def active_lines(source: str | bytes) -> frozenset[int]:
    """The lines of a Lua 5.1 source that hold an instruction, in all its functions."""
    text = source.encode() if isinstance(source, str) else source
    lua = lupa.lua51.LuaRuntime(encoding=None)
    compiled = lua.eval(b"function(text) return string.dump(assert(loadstring(text)), false) end")
    return frozenset(_Bytecode(compiled(_without_shebang(text))).lines())


class _Bytecode:
    """Reads the line numbers out of what string.dump gives: PUC Lua 5.1, 64 bit, this machine."""

    def __init__(self, dumped: bytes) -> None:
        if dumped[:6] != b"\x1bLua\x51\x00":
            raise ValueError("not the bytecode of PUC Lua 5.1")
        self._dumped, self._at = dumped, 12

    def lines(self) -> Iterator[int]:
        """The lines of the function that starts here, then of the functions inside it."""
        self._string()  # source
        self._take("<ii4B")  # first line, last line; upvalues, parameters, variadic, stack
        instructions = self._count()
        self._at += 4 * instructions
        for _ in range(self._count()):
            self._constant()
        for _ in range(self._count()):
            yield from self.lines()
        lines = self._take(f"<{self._count()}i")
        yield from lines[:-1]
        for _ in range(self._count()):  # local variables
            self._string()
            self._take("<ii")
        for _ in range(self._count()):  # upvalues
            self._string()

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._dumped, self._at)
        self._at += struct.calcsize(form)
        return values

    def _count(self) -> int:
        return int(self._take("<i")[0])

    def _string(self) -> None:
        length = int(self._take("<Q")[0])
        self._at += length

    def _constant(self) -> None:
        kind = self._take("<B")[0]
        if kind == 1:  # boolean
            self._take("<B")
        elif kind == 3:  # number
            self._take("<d")
        elif kind == 4:
            self._string()


def _without_shebang(source: bytes) -> bytes:
    return b"--" + source if source.startswith(b"#!") else source


def _argument(value: str | bytes | int | float) -> bytes:
    """A value as the bytes that a server makes of it."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, float):
        return b"%.17g" % value
    return str(value).encode()


def _to_lua(lua: Any, value: Any) -> Any:
    if value is None:
        return False
    if isinstance(value, list):
        return lua.table(*[_to_lua(lua, item) for item in value])
    return value


def _from_lua(value: Any) -> Any:
    """A script's reply as a client sees it: no nil, fraction or map gets through."""
    if value is None or value is False:
        return None
    if value is True:
        return 1
    if isinstance(value, float):
        return int(value)
    if lupa.lua51.lua_type(value) != "table":
        return value
    if value[b"err"] is not None:
        return redis.ResponseError(value[b"err"].decode(errors="replace"))
    if value[b"ok"] is not None:
        return value[b"ok"]
    items = []
    while value[len(items) + 1] is not None:
        items.append(_from_lua(value[len(items) + 1]))
    return items
