"""The Lua commands: read from `lua/`, checked, called by name, their errors translated.

A command's header is the only place that knows the order of its keys and arguments; Python names
them, and a wrong or missing name is a TypeError before anything is sent. The prelude, as far as a
command uses it, is put in front of it. Where the server knows `#!lua`, the first line carries the
command's flags, so that a write in a reading command, or a key in another slot, is refused by the
server itself.

Source: style 8; lua/PROTOCOL.md.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from leasekit.errors import (
    CorruptState,
    LeasekitError,
    Overloaded,
    ScriptFailed,
    Unavailable,
)

__all__ = ["Script", "lua_directory", "read_scripts", "script", "translate"]

Argument = str | bytes | int

_DEFINITION = re.compile(r"local (?:function )?(\w+)")
_FIELDS = ("KEYS", "ARGV", "ITEM", "REPLY", "ERRORS", "FLAGS", "COST", "WHY")
_REQUIRED = ("KEYS", "ARGV", "REPLY", "ERRORS", "FLAGS", "COST")
_KEY_TYPES = ("hash", "zset", "string")
_FLAGS = ("none", "no-writes", "allow-oom")


@dataclass(frozen=True, slots=True)
class Script:
    """One command: its names in order and its text.

    `keys` and `arguments` are in the order of the header, `item` the fields that repeat per item,
    `flag` one of `none`, `no-writes`, `allow-oom`.
    """

    name: str
    path: Path
    keys: tuple[str, ...]
    arguments: tuple[str, ...]
    item: tuple[str, ...]
    reply: str
    errors: tuple[str, ...]
    flag: str
    body: str
    prelude: str
    _texts: dict[bool, tuple[str, str]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def reads_only(self) -> bool:
        return self.flag == "no-writes"

    @property
    def source(self) -> str:
        """The text without a `#!lua` line, as servers before 7 get it."""
        return self.text(shebang=False)

    def text(self, *, shebang: bool) -> str:
        return self._text_and_sha(shebang)[0]

    def sha(self, *, shebang: bool) -> str:
        return self._text_and_sha(shebang)[1]

    def _text_and_sha(self, shebang: bool) -> tuple[str, str]:
        known = self._texts.get(shebang)
        if known is None:
            text = _only_needed(self.prelude, self.body) + self.body
            if shebang:
                flags = "" if self.flag == "none" else f" flags={self.flag}"
                text = f"#!lua{flags}\n{text}"
            digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
            known = self._texts[shebang] = (text, digest)
        return known

    def bind(
        self, keys: Mapping[str, str], arguments: Mapping[str, Argument]
    ) -> tuple[Argument, ...]:
        """Number of keys, keys and arguments in the header's order; TypeError for a wrong name."""
        self._check_names("key", self.keys, keys)
        self._check_names("argument", self.arguments, arguments)
        return (
            len(self.keys),
            *[keys[name] for name in self.keys],
            *[arguments[name] for name in self.arguments],
        )

    def _check_names(self, what: str, wanted: tuple[str, ...], given: Mapping[str, object]) -> None:
        if len(wanted) != len(given) or any(name not in given for name in wanted):
            missing = [name for name in wanted if name not in given]
            unknown = [name for name in given if name not in wanted]
            raise TypeError(f"{self.name}: {what} missing {missing}, unknown {unknown}")


def lua_directory() -> Path:
    """Where the commands are: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for directory in (package / "lua", package.parent / "lua"):
        if (directory / "prelude.lua").is_file():
            return directory
    raise ScriptFailed(f"the Lua commands are missing: no lua/prelude.lua in or beside {package}")


@lru_cache(maxsize=1)
def read_scripts() -> dict[str, Script]:
    """Every command by name (`outbox/claim`); ScriptFailed naming file and line for a bad header."""
    directory = lua_directory()
    prelude = (directory / "prelude.lua").read_text(encoding="utf-8")
    paths = sorted(path for path in directory.glob("*/*.lua"))
    return {read.name: read for read in (_read(path, directory, prelude) for path in paths)}


def script(name: str, *, item: Sequence[str] = ()) -> Script:
    """The command of that name; TypeError unless its items have exactly these fields."""
    found = read_scripts()[name]
    if found.item != tuple(item):
        raise TypeError(f"{name}: items are {found.item} in its header, {tuple(item)} in Python")
    return found


def _only_needed(prelude: str, body: str) -> str:
    """The prelude with the definitions that a body does not use left blank.

    A script makes the functions of its prelude anew each time it runs; leaving out those that it does
    not call saves the server about a microsecond a call. The lines stay where they are, so that line
    numbers mean the same in every command.
    """
    parts = re.split(r"(?m)^(?=local )", prelude)
    named = {found[1]: at for at, part in enumerate(parts) if (found := _DEFINITION.match(part))}
    needed: set[str] = set()
    unread = [body]
    while unread:
        for word in set(re.findall(r"[A-Za-z_]\w*", unread.pop())) & (named.keys() - needed):
            needed.add(word)
            unread.append(parts[named[word]])
    for name in named.keys() - needed:
        parts[named[name]] = "\n" * parts[named[name]].count("\n")
    return "".join(parts)


def _read(path: Path, directory: Path, prelude: str) -> Script:
    body = path.read_text(encoding="utf-8")
    name = path.relative_to(directory).with_suffix("").as_posix()
    lines = body.split("\n")

    def bad(line: int, problem: str) -> ScriptFailed:
        return ScriptFailed(f"{path}:{line}: {problem}")

    if not re.match(rf"-- {re.escape(name)}: \S.*\.$", lines[0]):
        raise bad(1, f"the first line must be `-- {name}: one sentence.`")
    if lines[1:2] != ["--"]:
        raise bad(2, "the second line must be `--`")
    found: dict[str, list[tuple[int, str]]] = {}
    current = ""
    for number, line in enumerate(lines[2:], start=3):
        if not line.startswith("--"):
            break
        start = re.match(r"-- ([A-Z]+) +(\S.*)$", line)
        if start and start[1] in _FIELDS:
            current = start[1]
            if current in found or _FIELDS.index(current) < max(
                map(_FIELDS.index, found), default=0
            ):
                raise bad(number, f"{current} stands twice or out of order ({' '.join(_FIELDS)})")
            found[current] = [(number, start[2])]
        elif current and re.match(r"--  +\S", line):
            found[current].append((number, line[2:].strip()))
        else:
            raise bad(number, "not a header line: `-- FIELD  text` or an indented continuation")
    for wanted in _REQUIRED:
        if wanted not in found:
            raise bad(1, f"the header has no {wanted}")

    def numbered(kind: str, form: str, is_good: Callable[[list[str]], bool]) -> tuple[str, ...]:
        """The names of KEYS or ARGV, in order."""
        names: list[str] = []
        for number, text in found[kind]:
            place, *words = text.split()
            if place.isdigit():
                if int(place) != len(names) + 1:
                    raise bad(number, f"{kind} {place} is out of order")
                if not is_good(words):
                    raise bad(number, f"{kind} lines are `{form}`")
                names.append(words[0])
        return tuple(names)

    flag = found["FLAGS"][0][1].strip()
    if flag not in _FLAGS:
        raise bad(found["FLAGS"][0][0], f"FLAGS is one of {', '.join(_FLAGS)}")
    errors = tuple(found["ERRORS"][0][1].split())
    item = found["ITEM"][0][1].split(":")[0].split() if "ITEM" in found else []
    return Script(
        name=name,
        path=path,
        keys=numbered(
            "KEYS", "n name type meaning", lambda row: len(row) > 2 and row[1] in _KEY_TYPES
        ),
        arguments=numbered("ARGV", "n name meaning", lambda row: len(row) > 1),
        item=tuple(item),
        reply=" ".join(text for _, text in found["REPLY"]),
        errors=() if errors == ("none",) else errors,
        flag=flag,
        body=body,
        prelude=prelude,
    )


def is_missing(error: Exception) -> bool:
    """Whether the server answered that it does not have the script: nothing was run."""
    return _code(error) == "NOSCRIPT"


def load_commands(*, shebang: bool) -> list[tuple[str, ...]]:
    """What a new connection sends first, so that no call meets a server without its script."""
    return [("SCRIPT", "LOAD", one.text(shebang=shebang)) for one in read_scripts().values()]


def load_command(one: Script, *, shebang: bool) -> tuple[str, ...]:
    return ("SCRIPT", "LOAD", one.text(shebang=shebang))


def exists_command(*, shebang: bool) -> tuple[str, ...]:
    """Asks which of all commands the server has, in the order of `read_scripts`."""
    return ("SCRIPT", "EXISTS", *[one.sha(shebang=shebang) for one in read_scripts().values()])


def call_command(
    one: Script, bound: Sequence[Argument], items: Sequence[Argument], *, shebang: bool
) -> tuple[Argument, ...]:
    """One call of a command whose names are bound; `items` are the fields of all items in a row."""
    return ("EVALSHA", one.sha(shebang=shebang), *bound, *items)


# Servers before 7 wrap the error of a call within a script; what the call was refused for, and so the
# first code word in it, is what counts.
_CODE_INSIDE = re.compile(r"@user_script: ?\d+: -?([A-Z]{3,}) ")
_ACL_INSIDE = re.compile(r"ACL failure in script|user executing the script can't run")
# Some servers show what an unknown command was sent with.
_ARGUMENTS = re.compile(r", with args beginning with: .*", re.DOTALL)
_REFUSES_WORK = {
    "LOADING",
    "MISCONF",
    "READONLY",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "BUSY",
    "NOREPLICAS",
}


def _code(error: Exception) -> str:
    words = str(error).split(None, 1)
    return words[0] if words else ""


def translate(error: Exception, command: str, *, tenant: str | None = None) -> LeasekitError:
    """The leasekit error that a server's error reply to a command stands for."""
    text = _ARGUMENTS.sub("", str(error))
    code = _code(error)
    if code == "ERR" and (inner := _CODE_INSIDE.search(text)):
        code = inner[1]
    if code == "LK_CORRUPT":
        return CorruptState(
            f"{command}: stored data is damaged ({text}); nothing was changed; "
            "run `leasekit doctor` before you go on",
            tenant=tenant,
        )
    if code == "WRONGTYPE":
        return CorruptState(
            f"{command}: a key of this tenant holds something that leasekit did not write; "
            "use a prefix of its own for leasekit, or remove the foreign key",
            tenant=tenant,
        )
    if code == "OOM":
        return Overloaded(
            f"{command}: the server's memory is full (maxmemory); nothing was written; ack, nack and "
            "release still work and free memory; raise maxmemory or keep fewer finished rows",
            tenant=tenant,
        )
    if code == "NOSCRIPT":
        return Unavailable(
            f"{command}: the server does not have the script and refuses to load it; nothing was "
            "applied; load the scripts as another user, or allow `script|load`",
            tenant=tenant,
        )
    if code in _REFUSES_WORK:
        return Unavailable(
            f"{command}: the server refuses work now ({text}); nothing was applied; "
            "it is safe to try again later",
            tenant=tenant,
        )
    if code in ("NOAUTH", "NOPERM", "WRONGPASS") or _ACL_INSIDE.search(text):
        return Unavailable(
            f"{command}: the server refuses this user ({code}); nothing was applied; "
            "give it the rights that the README lists",
            tenant=tenant,
        )
    if code == "LK_ARGUMENT":
        return ScriptFailed(
            f"{command}: the script refused an argument ({text}); nothing was written; "
            "this is a bug of leasekit: please report it",
            tenant=tenant,
        )
    return ScriptFailed(
        f"{command}: the script failed: {_with_file(text)}; this is a bug, or a server that leasekit "
        "does not fit; the state of what it touched is not known: check before you go on",
        tenant=tenant,
    )


def _with_file(text: str) -> str:
    """Turn the server's `user_script:LINE` into a line of the command's own file."""
    prelude_lines = next(iter(read_scripts().values())).prelude.count("\n")

    def place(found: re.Match[str]) -> str:
        line = int(found[1]) - prelude_lines
        return f"prelude.lua:{found[1]}" if line < 1 else f"line {line}"

    return re.sub(r"user_script:(\d+)", place, text)
