"""Scripts, keys.py, these tests and PROTOCOL.md name the same things."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from leasekit import codec
from leasekit.keys import Keys, registry_keys
from leasekit.scripts import Script, lua_directory, read_scripts

PROTOCOL = (lua_directory() / "PROTOCOL.md").read_text()
TESTS = Path(__file__).parent
SCRIPTS = read_scripts()
SECTION = re.compile(r"^### ([a-z]+/[a-z]+)\n(.*?)(?=^##|\Z)", re.DOTALL | re.MULTILINE)
SECTIONS: dict[str, str] = dict(SECTION.findall(PROTOCOL))


def reply_words(script: Script) -> list[str]:
    """The words that an item may be answered with, by the command's header."""
    found = re.search(r"(?:per item|for all items together): (.*)", script.reply)
    answers = found[1].partition(";")[0] if found else ""
    return [answer.split()[0].rstrip(":") for answer in answers.split(" | ") if answer]


def test_every_command_has_a_section_and_a_test() -> None:
    """One command: one script, one section of PROTOCOL.md, one file of tests."""
    assert SECTIONS.keys() == SCRIPTS.keys()
    for name in SCRIPTS:
        assert (TESTS / f"test_{name.replace('/', '_')}.py").exists(), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_body_binds_the_names_of_the_header(name: str) -> None:
    """The locals that a script begins with are its header's, in the header's order."""
    script = SCRIPTS[name]
    bound = {"KEYS": [], "ARGV": []}
    pattern = r"^local ([\w, ]+) = ((?:KEYS|ARGV)\[.*)$"
    for names, values in re.findall(pattern, script.body, re.MULTILINE):
        for word, value in zip(names.split(", "), values.split(", "), strict=True):
            field = value.partition("[")[0]
            assert value == f"{field}[{len(bound[field]) + 1}]"
            bound[field].append(word)

    assert bound == {"KEYS": list(script.keys), "ARGV": list(script.arguments)}
    assert script.arguments[0] == "now_ms"


@pytest.mark.parametrize("name", SCRIPTS)
def test_reply_words_are_written_and_tested(name: str) -> None:
    """Each word of a header's REPLY is returned, explained and expected by a test of its command."""
    script = SCRIPTS[name]
    tests = (TESTS / f"test_{name.replace('/', '_')}.py").read_text()

    for word in reply_words(script):
        assert f'"{word}"' in script.body, word
        assert f"`{word}`" in SECTIONS[name], word
        assert f'"{word}"' in tests, word
    if script.item:
        assert reply_words(script)


@pytest.mark.parametrize("name", SCRIPTS)
def test_section_names_arguments_and_fields(name: str) -> None:
    """PROTOCOL.md names each argument and each field of an item in the command's section."""
    script = SCRIPTS[name]

    for word in (*script.arguments, *script.item):
        assert f"`{word}`" in SECTIONS[name], word


@pytest.mark.parametrize("name", SCRIPTS)
def test_errors_are_those_of_the_header(name: str) -> None:
    """A script's error replies are the code words of its header, and of PROTOCOL.md."""
    script = SCRIPTS[name]
    raised = set(re.findall(r"LK_[A-Z]+", script.body.partition("\nlocal ")[2]))
    if "refuse(" in script.body:
        raised.add("LK_ARGUMENT")

    assert raised == set(script.errors)
    assert all(f"`{word} " in PROTOCOL for word in raised)


def test_constants_are_those_of_the_prelude() -> None:
    """The table of limits has the names and values of prelude.lua, all of them."""
    prelude = SCRIPTS["outbox/ack"].prelude
    defined = re.findall(r"^local ([A-Z_]+) = (\d+)$", prelude, re.MULTILINE)
    written = re.findall(r"^\| `([A-Z_]+)` \| (\d+) \|", PROTOCOL, re.MULTILINE)

    assert sorted(written) == sorted(defined)


def test_limits_of_the_client_are_those_of_the_scripts() -> None:
    """What Python refuses and what scripts refuse are the same numbers."""
    prelude = SCRIPTS["outbox/ack"].prelude
    value = {
        name: int(digits)
        for name, digits in re.findall(r"^local ([A-Z_]+) = (\d+)$", prelude, re.MULTILINE)
    }

    assert value["NOW_MS_MAX"] == codec.NOW_MS_MAX
    assert value["LEASE_MS_MAX"] == codec.LEASE_MS_MAX
    assert value["DURATION_MS_MAX"] == codec.DURATION_MS_MAX
    assert value["NEVER_MS"] == codec.INSTANT_MS_MAX
    assert value["ITEMS_MAX"] == codec.BATCH_MAX
    assert value["ID_BYTES_MAX"] == codec.ID_BYTES_MAX
    assert value["TOKEN_LENGTH"] == codec.TOKEN_LENGTH


def test_keys_are_those_of_the_key_table() -> None:
    """Every key of PROTOCOL.md exists in keys.py, and the other way round."""
    table = PROTOCOL.partition("\n## Keys\n")[2].partition("\n## ")[0]
    written = re.findall(r"^\| `([^`]+)` \| (hash|zset|string) \|", table, re.MULTILINE)
    keys = Keys("lk", "tag")
    own = {getattr(keys, word).removeprefix("lk:{tag}:") for word in Keys.__slots__}
    own -= {"lk:{tag}"}
    line = keys.outbox_due("<lane>:<target>").removeprefix("lk:{tag}:")
    logs = {f"ledger:{noun}:<run>" for noun in ("log", "events")}
    registry = {key.replace("lk:", "<prefix>:", 1) for key in registry_keys("lk").values()}

    assert {name for name, _ in written} == own | {line} | logs | registry


def test_key_types_are_those_of_the_headers() -> None:
    """A key has the type of the table in every header that declares it."""
    table = dict(re.findall(r"^\| `([^`]+)` \| (hash|zset|string) \|", PROTOCOL, re.MULTILINE))
    types = {name.removeprefix("<prefix>:{tenants}:"): kind for name, kind in table.items()}

    for script in SCRIPTS.values():
        concept = script.name.partition("/")[0]
        lines = re.findall(r"^-- (?:KEYS|    ) *\d+ (\w+) +(hash|zset|string) ", script.body, re.M)
        assert [word for word, _ in lines] == list(script.keys)
        for word, kind in lines:
            name = {"fence": "fence", "members": "outbox:done"}.get(word, f"{concept}:{word}")
            name = f"{name}:<lane>:<target>" if name == "outbox:due" else name
            name = f"{name}:<run>" if name in ("ledger:log", "ledger:events") else name
            if concept == "ledger" and name not in types:  # an intent, which the gate keeps
                name = f"gate:{'docs' if word == 'intents' else word}"
            assert types[name] == kind, (script.name, word)
