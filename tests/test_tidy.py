"""The rules of the house that a reader would otherwise have to remember.

A rule looks at one file and yields what breaks it, as (line, what was found). Its advice says what
to do instead. Every rule is shown to fail: VIOLATIONS holds a planted offence for each, FINE what
comes close and is allowed.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

import pytest
from lua_coverage import globals_of

ROOT = Path(__file__).parent.parent
ITSELF = "tests/test_tidy.py"  # the only file that must spell what it forbids

Found = Iterator[tuple[int, str]]

# Imports point down: a module imports only from floors that stand before its own.
FLOORS = (
    {"errors"},
    {"durability"},
    {"model", "keys"},
    {"codec"},
    {"policy"},
    {"scripts"},
    {"wire", "embedded"},
    {"listen"},
    {"connect"},
    {"coalesce", "hints"},
    {"scope"},
    {"consuming", "holding"},
    {"lease", "outbox", "idempotency", "gate"},  # the hot concepts never import each other
    {"ledger"},
    {"views"},
    {"client"},
    {"relay", "snapshot", "doctor"},
    {"service"},
    {"demo"},
    {"load"},  # its processes are started and heard as the demo's are
    {"cli"},
)
FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in floor}

TALK_TO_REDIS = {"connect", "wire"}
KNOW_REDIS_ERRORS = TALK_TO_REDIS | {
    "listen",
    "scripts",
    "coalesce",
    "scope",
}  # replies hold them as values
START_PROCESSES = {"embedded", "service", "demo", "cli"}

TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "uv.lock"),
    *("leasekit", "lua", "tests", "bench"),
}

# What a script may read beside redis, KEYS, ARGV and the prelude: the same on every server.
LUA_GLOBALS = {
    *("redis", "KEYS", "ARGV", "string", "table", "math"),
    *("ipairs", "pairs", "tonumber", "tostring", "type", "unpack"),
}

CONCEPTS = "outbox|lease|idempotency|gate|ledger|tenant"


@dataclass(frozen=True, slots=True)
class Rule:
    """`check(path, text)` yields offences in files whose path matches `files`."""

    name: str
    files: str
    check: Callable[[str, str], Found]
    advice: str

    def complaints(self, path: str, text: str) -> list[str]:
        if path == ITSELF or not re.fullmatch(self.files, path):
            return []
        return [f"{path}:{line}: {what}: {self.advice}" for line, what in self.check(path, text)]


def module_of(path: str) -> str:
    """`leasekit/outbox.py` and `leasekit/service/http.py` are the modules outbox and service."""
    return PurePosixPath(path).parts[1].removesuffix(".py")


def nodes(text: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(text))


def dotted(node: ast.AST) -> str:
    """`a.b.c` for the expression a.b.c, with "?" for what is no plain name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def imports(text: str) -> Found:
    """Every imported thing by its full name: `from a.b import c` is a.b.c."""
    for node in nodes(text):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}"


def texts(text: str) -> Found:
    """Every string literal, parts of f-strings included, docstrings not."""
    tree = ast.parse(text)
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in prose:
            if isinstance(node.value, str):
                yield node.lineno, node.value
            elif isinstance(node.value, bytes):
                yield node.lineno, node.value.decode("latin-1")


def lines_that_match(pattern: str, text: str, flags: int = 0) -> Found:
    for number, line in enumerate(text.splitlines(), 1):
        for match in re.finditer(pattern, line, flags):
            yield number, match[0].strip()


# ---------------------------------------------------------------------------------------- Python


def upward_imports(path: str, text: str) -> Found:
    own = module_of(path)
    if own in {"__init__", "__main__"}:
        return
    if own not in FLOOR_OF:
        yield 1, f"{own} has no floor"
        return
    for line, name in imports(text):
        if name.startswith("."):
            yield line, f"relative import {name}"
            continue
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package != "leasekit" or other == own:
            continue
        # `from leasekit import Leasekit`: the package itself stands above the client.
        floor = FLOOR_OF.get(other, FLOOR_OF["client"])
        if floor >= FLOOR_OF[own]:
            yield line, f"{own} imports {other or 'the package'}"


def redis_imports(path: str, text: str) -> Found:
    own = module_of(path)
    for line, name in imports(text):
        library = name.partition(".")[0]
        if library not in {"redis", "hiredis", "valkey", "fakeredis", "coredis"}:
            continue
        if own in TALK_TO_REDIS:
            continue
        if own in KNOW_REDIS_ERRORS and name.startswith("redis.exceptions."):
            continue
        yield line, f"import of {name}"


def script_calls(path: str, text: str) -> Found:
    if module_of(path) == "scripts":
        return
    for line, value in texts(text):
        if re.match(r"(EVAL|EVALSHA|EVAL_RO|EVALSHA_RO|FCALL|SCRIPT)(\s|$)", value):
            yield line, f"the command {value!r}"
    methods = {"eval", "eval_ro", "evalsha", "evalsha_ro", "fcall", "register_script"}
    for node in nodes(text):
        if isinstance(node, ast.Attribute) and node.attr in methods:
            yield node.lineno, f".{node.attr}"


def spelled_keys(path: str, text: str) -> Found:
    if module_of(path) == "keys":
        return
    for line, value in texts(text):
        if re.search(rf":({CONCEPTS})(:|$)|^({CONCEPTS}):[a-z_]|:\{{|\}}:", value):
            yield line, f"the key {value!r}"


def started_processes(path: str, text: str) -> Found:
    if module_of(path) in START_PROCESSES:
        return
    for line, name in imports(text):
        if re.match(r"(subprocess|multiprocessing|pty)\.?|concurrent\.futures\.Process", name):
            yield line, f"import of {name}"
    of_os = r"os\.(fork|forkpty|system|popen|posix_spawnp?|(exec|spawn)\w+)"
    of_asyncio = r".+\.(create_subprocess_\w+|subprocess_(exec|shell))"
    for node in nodes(text):
        if re.fullmatch(f"{of_os}|{of_asyncio}", dotted(node)):
            yield node.lineno, dotted(node)


def sleeps(path: str, text: str) -> Found:
    for line, name in imports(text):
        if re.fullmatch(r"(time|asyncio|anyio|trio)\.sleep", name):
            yield line, f"import of {name}"
    for node in nodes(text):
        if isinstance(node, ast.Call) and dotted(node.func).endswith(".sleep"):
            # asyncio.sleep(0) waits for nothing but the other tasks' turn.
            zero = [ast.dump(argument) for argument in node.args] == [ast.dump(ast.Constant(0))]
            if not (zero and dotted(node.func) == "asyncio.sleep"):
                yield node.lineno, ast.unparse(node)


# ------------------------------------------------------------------------------------------- Lua


def lua_code(text: str) -> str:
    """Lua without comments and with empty strings, line for line."""
    token = r"\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|--[^\n]*"
    return re.sub(token, lambda match: "" if match[0].startswith("--") else '""', text)


def header_names(text: str, field: str) -> list[str]:
    """The names that a header lists under KEYS or ARGV, in order; ITEM belongs to neither."""
    found, current = [], ""
    for line in text.splitlines():
        if not line.startswith("--"):
            break
        if match := re.match(r"-- (KEYS|ARGV|ITEM|REPLY|ERRORS|FLAGS|COST|WHY)\b", line):
            current = match[1]
        if current == field and (match := re.match(r"-- (?:KEYS|ARGV|    ) +\d+ (\w+)", line)):
            found.append(match[1])
    return found


def binding_block(text: str) -> tuple[str, int]:
    """The code between the header and the first blank line, and the line that it ends on."""
    lines = lua_code(text).splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    end = next((i for i in range(start, len(lines)) if not lines[i].strip()), len(lines))
    return "\n".join(lines[start:end]), end


def bindings(path: str, text: str) -> Found:
    block, _ = binding_block(text)
    bound: dict[str, list[str]] = {"KEYS": [], "ARGV": []}
    pattern = r"local ([\w,\s]+?)\s*=\s*((?:KEYS|ARGV)\[\d+\](?:\s*,\s*(?:KEYS|ARGV)\[\d+\])*)"
    for names, values in re.findall(pattern, block):
        names, values = re.findall(r"\w+", names), re.findall(r"(KEYS|ARGV)\[(\d+)\]", values)
        if len(names) != len(values):
            yield 1, f"{len(names)} names for {len(values)} values"
        for name, (field, number) in zip(names, values, strict=False):
            if int(number) != len(bound[field]) + 1:
                yield 1, f"{field}[{number}] is out of order"
            bound[field].append(name)
    for field, names in bound.items():
        if names != (wanted := header_names(text, field)):
            yield 1, f"{field} bound as {', '.join(names)}, in the header {', '.join(wanted)}"


def late_arguments(path: str, text: str) -> Found:
    _, end = binding_block(text)
    items = re.search(r"^-- ITEM\b", text, re.MULTILINE)
    for line, what in lines_that_match(r"\b(KEYS|ARGV)\s*\[[^\]]*\]?", lua_code(text)):
        computed = what.startswith("ARGV") and not re.fullmatch(r"ARGV\s*\[\s*\d+\s*\]", what)
        if line > end and not (items and computed):
            yield line, what


def built_keys(path: str, text: str) -> Found:
    code = lua_code(text)
    for name in header_names(text, "KEYS"):
        yield from lines_that_match(rf"(?<![\w.]){name}\s*\.\.|\.\.\s*{name}\b(?!\s*[.\[(])", code)
    for line, found in lines_that_match(r"redis\.p?call\(\s*\"\"\s*,\s*[^,)]+", code):
        key = found.rpartition(",")[2].strip()
        if not re.fullmatch(r"[A-Za-z_][\w.]*(\[\w+\])?", key):
            yield line, f"a key that is {key}"


def lua_globals(path: str, text: str) -> Found:
    before = "" if path == "lua/prelude.lua" else prelude()
    offset = before.count("\n")
    for line, name, is_written in globals_of(before + text):
        if is_written:
            yield line - offset, f"assignment to {name}"
        elif name not in LUA_GLOBALS:
            yield line - offset, f"use of {name}"


@cache
def prelude() -> str:
    path = ROOT / "lua/prelude.lua"
    return path.read_text() if path.exists() else ""


def unportable(path: str, text: str) -> Found:
    banned = r"\b(cjson|cmsgpack|struct|bit|math\.random|redis\.(log|sha1hex|breakpoint|setresp))\b"
    yield from lines_that_match(banned, lua_code(text))


def unbounded(path: str, text: str) -> Found:
    banned = r"(KEYS|SCAN|[HSZ]SCAN|SORT|RANDOMKEY|EVAL|HGETALL|HKEYS|HVALS|SMEMBERS|FLUSH\w+)"
    yield from lines_that_match(rf"redis\.p?call\(\s*[\"']{banned}[\"']", text, re.IGNORECASE)


def raised_errors(path: str, text: str) -> Found:
    yield from lines_that_match(r"(?<![\w.])(error|assert)\s*\(", lua_code(text))


# ------------------------------------------------------------------------------------ everything


def unfinished(path: str, text: str) -> Found:
    yield from lines_that_match(r"\b(TODO|FIXME|XXX|HACK)\b", text)


def this_machine(path: str, text: str) -> Found:
    # After a letter, a dot or another slash it is the end of a URL or of a relative path.
    yield from lines_that_match(r"(?<![\w.~/*-])/(home|root|Users|work|workspace|tmp)/\w+", text)


def other_registries(path: str, text: str) -> Found:
    options = r"(extra-)?index-url|find-links|trusted-host|default-index|registry\.npmjs\S*"
    yield from lines_that_match(rf"\b({options})\b", text)
    if path in {"uv.lock", "pyproject.toml"}:
        for line, url in lines_that_match(r"https?://[^/\s\"']+|file:[^\s\"']+", text):
            if url not in {"https://pypi.org", "https://files.pythonhosted.org"}:
                yield line, url


RULES = [
    Rule(
        "imports point down",
        r"leasekit/.*\.py",
        upward_imports,
        "import from a lower floor only (FLOORS in tests/test_tidy.py; a new module gets a floor "
        "there), with absolute names; what two concepts share moves down",
    ),
    Rule(
        "only connect and wire talk to redis",
        r"leasekit/.*\.py",
        redis_imports,
        "use Backend and Wire of connect.py; scripts and coalesce may import redis.exceptions",
    ),
    Rule(
        "only scripts runs scripts",
        r"leasekit/.*\.py",
        script_calls,
        "call the command by its name through leasekit.scripts",
    ),
    Rule(
        "only keys spells a key",
        r"leasekit/.*\.py",
        spelled_keys,
        "take it from leasekit.keys",
    ),
    Rule(
        "few start processes",
        r"leasekit/.*\.py",
        started_processes,
        f"leave processes to {', '.join(sorted(START_PROCESSES))}",
    ),
    Rule(
        "tests do not sleep",
        r"tests/(?!fault/).*\.py",
        sleeps,
        "pass now_ms, use time_machine or await an event; what needs real time is in tests/fault",
    ),
    Rule(
        "scripts bind what their header lists",
        r"lua/.+/.*\.lua",
        bindings,
        "begin the code with `local a, b = KEYS[1], KEYS[2]`: all of KEYS and of the fixed ARGV, "
        "in order, by the names of the header, then a blank line",
    ),
    Rule(
        "scripts name their arguments",
        r"lua/.*\.lua",
        late_arguments,
        "use the name bound in the first block; only items (header field ITEM) are read by number",
    ),
    Rule(
        "scripts build no keys",
        r"lua/.*\.lua",
        built_keys,
        "declare the key in KEYS and pass it from leasekit.keys",
    ),
    Rule(
        "scripts have no globals",
        r"lua/.*\.lua",
        lua_globals,
        "say `local`; beside redis, KEYS and ARGV there is the prelude and LUA_GLOBALS",
    ),
    Rule(
        "scripts are portable",
        r"lua/.*\.lua",
        unportable,
        "it differs between servers or is missing on some: move opaque bytes, words and integers",
    ),
    Rule(
        "scripts are bounded",
        r"lua/.*\.lua",
        unbounded,
        "read a range with a limit, or the members that are named",
    ),
    Rule(
        "scripts raise no errors",
        r"lua/.*\.lua",
        raised_errors,
        "return redis.error_reply with a code word (the prelude's refuse) before the first write; "
        "error() loses the code word",
    ),
    Rule(
        "nothing is left unfinished",
        r".*\.(py|lua|md|toml|yaml)|\.ci/run|\.luacheckrc",
        unfinished,
        "do it now, or say in an issue why not",
    ),
    Rule(
        "no machine's paths",
        r"(?!uv\.lock|LICENSE).*",
        this_machine,
        "use tempfile, tmp_path or a relative path",
    ),
    Rule(
        "no private registries",
        r"(?!LICENSE).*",
        other_registries,
        "the public index is the default and the only one; make the lock with `uv lock`",
    ),
]


@cache
def files() -> tuple[str, ...]:
    """The files of this repository: known to git, or new and not ignored."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others"]
    try:
        listed = subprocess.run(
            [*command, "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, or no git here: nothing says which files are ours")
    return tuple(path for path in listed.split("\0") if path and (ROOT / path).is_file())


def stray(paths: Iterator[str] | tuple[str, ...]) -> list[str]:
    """The paths whose first part has no place at the top."""
    return [path for path in paths if path[0] != "." and path.partition("/")[0] not in TOP_LEVEL]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule_holds(rule: Rule) -> None:
    """Every file of the repository keeps the rule."""
    complaints = [
        complaint
        for path in files()
        if re.fullmatch(rule.files, path)
        for complaint in rule.complaints(path, (ROOT / path).read_text(errors="replace"))
    ]
    assert not complaints, "\n" + "\n".join(complaints)


def test_top_level_is_closed() -> None:
    """The top level holds the names of TOP_LEVEL and dot files, and nothing else."""
    assert not stray(files()), "put it into leasekit, lua, tests or bench, or ignore it"
    assert stray(("README.md", ".ci/run", "lua/prelude.lua", "notes.md", "scripts/x.sh")) == [
        "notes.md",
        "scripts/x.sh",
    ]


HEADER = """-- outbox/ack: finish rows.
--
-- KEYS  1 docs  hash id -> document
--       2 state hash id -> state line
-- ARGV  1 now_ms "" for the server's clock
{item}-- REPLY now_ms
-- ERRORS none
-- FLAGS none
-- COST  O(1)
local docs, state = KEYS[1], KEYS[2]
local now_ms = ARGV[1]

"""
SCRIPT = HEADER.format(item="")
SCRIPT_OF_ITEMS = HEADER.format(item="-- ITEM  id: a row\n")

VIOLATIONS = [
    ("imports point down", "leasekit/keys.py", "from leasekit.outbox import Outbox"),
    ("imports point down", "leasekit/keys.py", "from leasekit import outbox"),
    ("imports point down", "leasekit/lease.py", "import leasekit.outbox"),
    ("imports point down", "leasekit/codec.py", "def f():\n    from leasekit import Leasekit"),
    ("imports point down", "leasekit/outbox.py", "from . import lease"),
    ("imports point down", "leasekit/helpers.py", "import re"),
    ("only connect and wire talk to redis", "leasekit/client.py", "import redis.asyncio"),
    ("only connect and wire talk to redis", "leasekit/scripts.py", "from redis import Redis"),
    ("only connect and wire talk to redis", "leasekit/codec.py", "import hiredis"),
    (
        "only connect and wire talk to redis",
        "leasekit/outbox.py",
        "from redis.exceptions import ResponseError",
    ),
    ("only scripts runs scripts", "leasekit/outbox.py", "send([('EVALSHA', sha)])"),
    ("only scripts runs scripts", "leasekit/outbox.py", "send([(b'SCRIPT', 'LOAD', text)])"),
    ("only scripts runs scripts", "leasekit/outbox.py", "client.register_script(text)"),
    ("only keys spells a key", "leasekit/outbox.py", "f'{prefix}:{{{tag}}}'"),
    ("only keys spells a key", "leasekit/outbox.py", "tenant + ':outbox:due'"),
    ("only keys spells a key", "leasekit/outbox.py", "tenant + b':lease'"),
    ("only keys spells a key", "leasekit/cli.py", "key('outbox:docs')"),
    ("few start processes", "leasekit/client.py", "import subprocess"),
    ("few start processes", "leasekit/client.py", "from multiprocessing import Process"),
    ("few start processes", "leasekit/client.py", "os.posix_spawn(path, [], {})"),
    ("few start processes", "leasekit/client.py", "asyncio.create_subprocess_exec('x')"),
    ("tests do not sleep", "tests/unit/test_x.py", "time.sleep(0.1)"),
    ("tests do not sleep", "tests/unit/test_x.py", "await_(asyncio.sleep(1))"),
    ("tests do not sleep", "tests/unit/test_x.py", "from time import sleep"),
    ("scripts bind what their header lists", "lua/a/b.lua", SCRIPT.replace("docs,", "rows,")),
    ("scripts bind what their header lists", "lua/a/b.lua", SCRIPT.replace("KEYS[2]", "KEYS[1]")),
    ("scripts bind what their header lists", "lua/a/b.lua", SCRIPT.replace(", KEYS[2]", "")),
    ("scripts bind what their header lists", "lua/a/b.lua", SCRIPT.replace("--       2", "--  ")),
    ("scripts name their arguments", "lua/a/b.lua", SCRIPT + "return KEYS[1]"),
    ("scripts name their arguments", "lua/a/b.lua", SCRIPT_OF_ITEMS + "return KEYS[#KEYS]"),
    ("scripts name their arguments", "lua/a/b.lua", SCRIPT_OF_ITEMS + "return ARGV[2]"),
    ("scripts name their arguments", "lua/a/b.lua", SCRIPT + "return ARGV[#ARGV]"),
    ("scripts build no keys", "lua/a/b.lua", SCRIPT + "return docs .. ':1'"),
    ("scripts build no keys", "lua/a/b.lua", SCRIPT + "return now_ms..state"),
    ("scripts build no keys", "lua/a/b.lua", SCRIPT + "return redis.call('GET', 'lk:1')"),
    ("scripts build no keys", "lua/a/b.lua", SCRIPT + "return redis.call('GET', key(1))"),
    ("scripts have no globals", "lua/a/b.lua", SCRIPT + "count = 1"),
    ("scripts have no globals", "lua/a/b.lua", SCRIPT + "return function() count = 1 end"),
    ("scripts have no globals", "lua/a/b.lua", SCRIPT + "function helper() end"),
    ("scripts have no globals", "lua/a/b.lua", SCRIPT + "return os.time()"),
    ("scripts are portable", "lua/a/b.lua", "return cjson.decode(payload)"),
    ("scripts are portable", "lua/a/b.lua", "return struct.pack('i', 1)"),
    ("scripts are portable", "lua/a/b.lua", "return bit.band(1, 2)"),
    ("scripts are portable", "lua/a/b.lua", "return cmsgpack.pack({})"),
    ("scripts are bounded", "lua/a/b.lua", 'redis.call("HGETALL", docs)'),
    ("scripts are bounded", "lua/a/b.lua", "redis.call('keys', docs)"),
    ("scripts raise no errors", "lua/a/b.lua", 'error("LK_ARGUMENT")'),
    ("scripts raise no errors", "lua/a/b.lua", "assert(now)"),
    ("nothing is left unfinished", "leasekit/a.py", "x = 1  # TODO: more"),
    ("nothing is left unfinished", "lua/a/b.lua", "-- FIXME later"),
    ("nothing is left unfinished", "README.md", "XXX"),
    ("no machine's paths", "README.md", "cd /home/somebody/leasekit"),
    ("no machine's paths", ".ci/run", "source '/root/venv/bin/activate'"),
    ("no machine's paths", "tests/unit/test_x.py", "open('/tmp/x')"),
    ("no private registries", ".ci/run", "pip install --extra-index-url https://x.example/"),
    ("no private registries", "uv.lock", 'registry = "https://mirror.example/simple"'),
    ("no private registries", "uv.lock", 'url = "file:///wheels/x.whl"'),
]

FINE = [
    ("imports point down", "leasekit/outbox.py", "from leasekit.keys import Keys"),
    ("imports point down", "leasekit/service/http.py", "from leasekit.service.page import page"),
    ("imports point down", "leasekit/cli.py", "from leasekit import Leasekit, demo"),
    ("imports point down", "leasekit/__init__.py", "from leasekit.client import Leasekit"),
    (
        "only connect and wire talk to redis",
        "leasekit/coalesce.py",
        "from redis.exceptions import ResponseError",
    ),
    ("only connect and wire talk to redis", "leasekit/wire.py", "import hiredis"),
    ("only scripts runs scripts", "leasekit/scripts.py", "('EVALSHA', sha)"),
    ("only scripts runs scripts", "leasekit/client.py", "raise ScriptFailed('script failed')"),
    ("only keys spells a key", "leasekit/outbox.py", '"""Rows lie in `lk:{t}:outbox:docs`."""'),
    ("only keys spells a key", "leasekit/outbox.py", "f'{lane}:{target}: lease: lost'"),
    ("few start processes", "leasekit/embedded.py", "import subprocess"),
    ("tests do not sleep", "tests/fault/test_x.py", "time.sleep(1)"),
    ("tests do not sleep", "tests/unit/test_x.py", "task(asyncio.sleep(0))"),
    ("scripts bind what their header lists", "lua/a/b.lua", SCRIPT),
    ("scripts bind what their header lists", "lua/prelude.lua", "local ITEMS_MAX = 1000"),
    ("scripts name their arguments", "lua/a/b.lua", SCRIPT_OF_ITEMS + "return ARGV[i + 1], #KEYS"),
    ("scripts build no keys", "lua/a/b.lua", SCRIPT + 'return row.state .. "state" .. now_ms'),
    ("scripts build no keys", "lua/a/b.lua", SCRIPT + "return redis.call('HGET', rows.docs, id)"),
    ("scripts have no globals", "lua/a/b.lua", SCRIPT + "local count = tonumber(now_ms)"),
    ("scripts are portable", "lua/a/b.lua", '-- no cjson\nreturn "bit"'),
    ("scripts are bounded", "lua/a/b.lua", 'redis.call("HMGET", docs, id)'),
    ("scripts raise no errors", "lua/a/b.lua", "return redis.error_reply('LK_ARGUMENT')"),
    ("nothing is left unfinished", "README.md", "what is left to do"),
    ("no machine's paths", "README.md", "unix:///tmp/redis.sock tests/work/x"),
    ("no private registries", "uv.lock", 'registry = "https://pypi.org/simple"'),
]


@pytest.mark.parametrize(("name", "path", "text"), VIOLATIONS)
def test_rule_fails_on_a_violation(name: str, path: str, text: str) -> None:
    """A planted offence is found, with its place and with what to do instead."""
    rule = next(rule for rule in RULES if rule.name == name)
    complaints = rule.complaints(path, text)
    assert complaints
    assert all(re.match(rf"{path}:\d+: .+: {re.escape(rule.advice)}", c) for c in complaints)


@pytest.mark.parametrize(("name", "path", "text"), FINE)
def test_rule_lets_the_rest_pass(name: str, path: str, text: str) -> None:
    """What only looks like an offence is none."""
    rule = next(rule for rule in RULES if rule.name == name)
    assert rule.complaints(path, text) == []


def test_every_rule_is_shown_to_fail() -> None:
    """A rule without a planted offence might check nothing."""
    assert {rule.name for rule in RULES} == {name for name, _, _ in VIOLATIONS}
