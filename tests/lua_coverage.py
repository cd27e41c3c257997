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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    """Runs scripts against clients and remembers, by script name, which lines have run."""

    def __init__(self) -> None:
        self._sources: dict[str, bytes] = {}
        self._hits: dict[str, set[int]] = {}

    def run(
        self,
        client: redis.Redis,
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
        run = host(HOST.encode(), b"=host")(lambda *call: _send(lua, client, call), b"=" + chunk)
        reply = run(
            host(_without_shebang(text), b"=" + chunk),
            lua.table(*map(_argument, keys)),
            lua.table(*map(_argument, arguments)),
            lines,
        )
        self._hits.setdefault(name, set()).update(lines)
        result = _from_lua(reply)
        if isinstance(result, redis.ResponseError):
            raise result
        return result

    def missed(self) -> dict[str, list[int]]:
        """For each script that ran: the lines that could run and have not, in order."""
        return {
            name: sorted(active_lines(source) - self._hits[name])
            for name, source in sorted(self._sources.items())
        }

    def hits(self) -> dict[str, list[int]]:
        """For each script that ran: the lines that have run, in order."""
        return {name: sorted(lines) for name, lines in self._hits.items()}

    def add(self, hits: Mapping[str, Iterable[int]]) -> None:
        """Count the lines in that another process has run."""
        for name, lines in hits.items():
            self._hits.setdefault(name, set()).update(lines)


def _send(lua: Any, client: redis.Redis, call: Sequence[Any]) -> Any:
    """What `redis.pcall` gives the script for one call."""
    for argument in call:
        if isinstance(argument, bool) or not isinstance(argument, bytes | int | float):
            text = b"ERR Lua redis lib command arguments must be strings or integers"
            return lua.table_from({b"err": text})
    kind, value = client.eval(BRIDGE, 0, *map(_argument, call))
    if kind == b"value":
        return _to_lua(lua, value)
    return lua.table_from({b"ok" if kind == b"status" else b"err": value})


def active_lines(source: str | bytes) -> frozenset[int]:
    """The lines of a Lua 5.1 source that hold an instruction, in all its functions."""
    return frozenset(line for function in functions_of(source) for line in function.lines[:-1])


def globals_of(source: str | bytes) -> Iterator[tuple[int, str, bool]]:
    """Each use of a global in a Lua 5.1 source: line, name, and whether it is assigned to."""
    read, write = 5, 7  # GETGLOBAL and SETGLOBAL; the name is the constant that they point at
    for function in functions_of(source):
        for instruction, line in zip(function.instructions, function.lines, strict=True):
            if instruction & 0x3F in (read, write):
                name = function.constants[instruction >> 14].decode()
                yield line, name, instruction & 0x3F == write


@dataclass(frozen=True, slots=True)
class LuaFunction:
    """A compiled function: its instructions, the line of each, and its constants."""

    instructions: tuple[int, ...]
    constants: tuple[Any, ...]
    lines: tuple[int, ...]


def functions_of(source: str | bytes) -> Iterator[LuaFunction]:
    """All functions of a Lua 5.1 source, called or not; the source itself is the last."""
    text = source.encode() if isinstance(source, str) else source
    lua = lupa.lua51.LuaRuntime(encoding=None)
    compiled = lua.eval(b"function(text) return string.dump(assert(loadstring(text))) end")
    return _Bytecode(compiled(_without_shebang(text))).functions()


class _Bytecode:
    """Reads what string.dump gives: PUC Lua 5.1, 64 bit, little endian."""

    def __init__(self, dumped: bytes) -> None:
        if dumped[:12] != b"\x1bLua\x51\x00\x01\x04\x08\x04\x08\x00":
            raise ValueError("not the bytecode of PUC Lua 5.1 on a 64 bit, little endian machine")
        self._dumped, self._at = dumped, 12

    def functions(self) -> Iterator[LuaFunction]:
        self._string()  # source
        self._take("<ii4B")  # first line, last line; upvalues, parameters, variadic, stack
        instructions = self._take(f"<{self._count()}I")
        constants = tuple(self._constant() for _ in range(self._count()))
        for _ in range(self._count()):
            yield from self.functions()
        lines = self._take(f"<{self._count()}i")
        for _ in range(self._count()):  # local variables
            self._string()
            self._take("<ii")
        for _ in range(self._count()):  # upvalues
            self._string()
        yield LuaFunction(instructions, constants, lines)

    def _take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._dumped, self._at)
        self._at += struct.calcsize(form)
        return values

    def _count(self) -> int:
        return int(self._take("<i")[0])

    def _string(self) -> bytes:
        length = self._take("<Q")[0]
        return bytes(self._take(f"{length}s")[0][:-1])  # its last byte is a NUL

    def _constant(self) -> Any:
        kind = self._take("<B")[0]
        if kind == 1:
            return bool(self._take("<B")[0])
        if kind == 3:
            return self._take("<d")[0]
        return self._string() if kind == 4 else None


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
