"""One transcript through every command, the same on every server, and those of PROTOCOL.md.

golden.txt holds requests, replies and, at its end, all that is stored then. A change of a reply, of
a stored line or of a count shows there as a change of that file. To take over an intended change,
run this test once with LEASEKIT_WRITE_GOLDEN=1 and read the difference.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from lua.commands import Tenant, exchanges

from leasekit.scripts import lua_directory, read_scripts

GOLDEN = Path(__file__).with_name("golden.txt")


def transcript(tenant: Tenant, text: str) -> str:
    """The exchanges of a text as this server answers them, and what is stored at the end."""
    played = [exchange.text(exchange.run(tenant)) for exchange in exchanges(text)]
    stored = json.dumps(tenant.dump(), indent=1, ensure_ascii=False, sort_keys=True)
    return "\n".join([*played, f"stored at the end:\n{stored}\n"])


def test_golden_transcript_is_the_same_everywhere(tenant: Tenant) -> None:
    """Every server gives the same replies and keeps the same bytes."""
    golden = GOLDEN.read_text()

    found = transcript(tenant, golden)

    if os.environ.get("LEASEKIT_WRITE_GOLDEN"):
        GOLDEN.write_text(found)
    assert found == golden


def test_golden_transcript_calls_every_command() -> None:
    """No command is left out."""
    assert {exchange.name for exchange in exchanges(GOLDEN.read_text())} == read_scripts().keys()


def test_golden_transcript_names_every_argument() -> None:
    """The requests are whole, so that other clients can be held against the same file."""
    for exchange in exchanges(GOLDEN.read_text()):
        assert exchange.arguments.keys() | {"members", "route"} == {
            *read_scripts()[exchange.name].arguments,
            *("members", "route"),  # not always arguments: they name a key
        }


def test_transcripts_of_the_protocol_are_true(tenant: Tenant) -> None:
    """What PROTOCOL.md shows is what happens."""
    shown = list(exchanges((lua_directory() / "PROTOCOL.md").read_text()))

    answered = [exchange.run(tenant) for exchange in shown]

    assert answered == [exchange.reply for exchange in shown]
    assert len({exchange.name for exchange in shown}) >= 8
