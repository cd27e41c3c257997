"""The gate: intents, the lists they stand in, what speaks of them, and the data's name.

An intent that parks and whose lease has ended reads as unknown before anybody has written so: where
it stands follows from its state line alone, and that is no damage.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping

import msgspec

from leasekit.doctor.finding import Finding, Problem
from leasekit.doctor.pages import PAGE_MOST, Pages
from leasekit.gate.intent import read_intent

__all__ = [
    "GateSweep",
    "IntentLook",
    "IntentState",
    "judge_dataset",
    "judge_intent",
    "judge_run_entry",
    "read_intent_state",
]

LISTS = ("expiring", "unknown", "dead", "done")
TOKEN_LENGTH = 22
NO_RUN = "~"

_STATE = re.compile(
    rb"(pending|claimed|sent|failed|dead_lettered|cancelled|unknown) (\S+) (\S+) (\d+) (\d+) (\d+) "
    rb"(\d+) (\d+) (\d+) (\d+) (reclaim|park) (\d+) (\S+) (\d+) (\d+) (\d+) ([A-Za-z0-9_~-]+) (\S+) "
    rb"(\S+) (.*)\Z",
    re.DOTALL,
)
_RUN_ENTRY = re.compile(rb"([A-Za-z0-9_~-]+):(\d{16}):(.+)\Z", re.DOTALL)
_DATASET = re.compile(rb"([\w-]{22})?(?:\n[\w-]{22} \d+ [^\n]+)*\Z")
_UNREADABLE = (msgspec.MsgspecError, ValueError, TypeError, AttributeError, KeyError)


class IntentState(msgspec.Struct, frozen=True):
    """The words of a state line that are judged."""

    status: str
    cause: str
    token: str
    lease_end_ms: int
    updated_at_ms: int
    fence: int
    on_expiry: str
    ask_fence: int
    ask_at_ms: int
    run: str

    @property
    def home(self) -> tuple[str, int] | None:
        """The list in which it must stand, and where there; None: in none, beside `updated`."""
        if self.status == "claimed":
            return ("expiring", self.lease_end_ms) if self.on_expiry == "park" else None
        homes = {
            "unknown": ("unknown", self.ask_at_ms),
            "dead_lettered": ("dead", self.updated_at_ms),
            "sent": ("done", self.updated_at_ms),
            "cancelled": ("done", self.updated_at_ms),
        }
        return homes.get(self.status)

    def run_entry(self, id: str) -> str | None:
        """Its entry in the index of runs; None where it has no run."""
        return None if self.run == NO_RUN else f"{self.run}:{self.updated_at_ms:016}:{id}"


class IntentLook(msgspec.Struct, frozen=True, kw_only=True):
    """All that is stored of one intent at one moment.

    scores: by list, `updated` included; a list that does not name it is not in there. is_under_run:
    whether the entry that `line` asks for is there; None where that was not looked at.
    """

    id: str
    line: bytes | None
    doc: bytes | None
    facts: bytes | None
    scores: dict[str, float]
    is_under_run: bool | None = None


def read_intent_state(line: bytes) -> IntentState | None:
    """The words of a state line; None for what no command writes."""
    found = _STATE.match(line)
    if found is None:
        return None
    status, cause, token, on_expiry, run = [found[i].decode("latin-1") for i in (1, 2, 3, 11, 17)]
    lease_end, updated_at, fence, ask_fence, ask_at = [int(found[i]) for i in (4, 5, 9, 14, 16)]
    return IntentState(
        status, cause, token, lease_end, updated_at, fence, on_expiry, ask_fence, ask_at, run
    )


# --- judges: pure functions -----------------------------------------------------------------------


def judge_intent(look: IntentLook) -> list[Problem]:
    """What is wrong with an intent; of one without a state line, what speaks of it all the same."""
    if look.line is None:
        return _judge_stray(look)
    state = read_intent_state(look.line)
    if state is None:
        return [Problem("unreadable_intent", "state", "its state line cannot be read")]
    problems = [*_judge_texts(look, look.line), *_judge_places(look, state)]
    if state.status == "claimed" and len(state.token) != TOKEN_LENGTH:
        problems.append(Problem("intent_without_token", "state", "it is claimed by no token"))
    return problems


def _judge_stray(look: IntentLook) -> list[Problem]:
    problems = [
        Problem("entry_without_intent", noun, "an entry without a state line")
        for noun in look.scores
    ]
    if look.facts is not None:
        problems.insert(0, Problem("facts_without_intent", "facts", "they are of no state line"))
    if look.doc is not None:
        problems.insert(0, Problem("document_without_intent", "docs", "it has no state line"))
    return problems


def _judge_texts(look: IntentLook, line: bytes) -> list[Problem]:
    """Its document and facts, by the reader that all who list intents use."""
    problems = []
    if look.doc is None:
        problems.append(Problem("intent_without_document", "docs", "it has no document"))
    elif not _can_be_read(look.id, look.doc, line, b""):
        problems.append(Problem("unreadable_intent_document", "docs", "it cannot be read"))
    if look.facts is not None and not _can_be_read(look.id, b"", line, look.facts):
        problems.append(Problem("unreadable_facts", "facts", "they cannot be read"))
    return problems


def _can_be_read(id: str, doc: bytes, line: bytes, facts: bytes) -> bool:
    try:
        read_intent(id, doc, line, facts, 0)
    except _UNREADABLE:
        return False
    return True


def _judge_places(look: IntentLook, state: IntentState) -> list[Problem]:
    problems = []
    wanted = {"updated": state.updated_at_ms}
    if state.home is not None:
        wanted[state.home[0]] = state.home[1]
    for noun, at_ms in wanted.items():
        if noun not in look.scores:
            what = f"it is {state.status} and not in there; it belongs at {at_ms}"
            problems.append(Problem("intent_without_entry", noun, what))
        elif look.scores[noun] != at_ms:
            what = f"it stands at {look.scores[noun]:.0f}, its state says {at_ms}"
            problems.append(Problem("intent_in_wrong_place", noun, what))
    for noun in LISTS:
        if noun in look.scores and noun not in wanted:
            kind = "intent_among_done" if noun == "done" else "intent_in_wrong_list"
            problems.append(Problem(kind, noun, f"it is {state.status}, and does not belong there"))
    if look.is_under_run is False:
        what = f"its run does not list it; the entry would be {state.run_entry(look.id)}"
        problems.append(Problem("intent_without_run_entry", "runs", what))
    return problems


def judge_run_entry(member: bytes, score: float, line: bytes | None) -> list[Problem]:
    """What is wrong with an entry of the index of runs, beside the state line that it names."""
    shown = member.decode("utf-8", "replace")
    found = _RUN_ENTRY.match(member)
    if found is None:
        return [Problem("stale_run_entry", "runs", f"{shown} names no intent")]
    state = None if line is None else read_intent_state(line)
    if line is not None and state is None:
        return []  # told as what it is already
    if state is None or state.run_entry(found[3].decode("utf-8", "replace")) != shown:
        return [Problem("stale_run_entry", "runs", f"{shown} is not what its state line asks for")]
    if score != 0:
        return [
            Problem("intent_in_wrong_place", "runs", f"{shown} stands at {score:.0f}, not at 0")
        ]
    return []


def judge_dataset(stored: bytes | None, intents: int) -> list[Problem]:
    """What is wrong with the data's name, and the openings after it."""
    found = _DATASET.match(stored or b"")
    if found is None:
        return [Problem("unreadable_dataset", "dataset", "it cannot be read")]
    if intents and found[1] is None:
        return [Problem("dataset_without_name", "dataset", f"no name, and {intents} intents")]
    return []


# --- the sweep ------------------------------------------------------------------------------------


class GateSweep:
    """Pages of intents, suspects, second looks."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._backend = pages.backend
        self._keys = pages.keys

    async def run(self) -> AsyncIterator[Finding]:
        for check in (
            self._check_intents,
            self._check_strays,
            self._check_runs,
            self._check_dataset,
        ):
            async for finding in check():
                yield finding

    async def _check_intents(self) -> AsyncIterator[Finding]:
        pages = self._pages
        async for page in pages.scan("HSCAN", self._keys.gate_state):
            lines = {id.decode("utf-8", "replace"): line for id, line in page}
            ids = list(lines)
            while ids:
                some, ids = ids[: pages.pace.count], ids[pages.pace.count :]
                for look in await self._look({id: lines[id] for id in some}):
                    state = None if look.line is None else read_intent_state(look.line)
                    if state is not None:
                        pages.note_fence(max(state.fence, state.ask_fence))
                    if look.line is not None and judge_intent(look):
                        async for finding in self._confirm(look.id):
                            yield finding

    async def _look(self, lines: Mapping[str, bytes | None]) -> list[IntentLook]:
        """Intents at one moment; `lines`: their state lines as they were read before, which say
        which entries of runs to look for."""
        keys, ids = self._keys, list(lines)
        states = {id: read_intent_state(line) for id, line in lines.items() if line is not None}
        entries = {
            id: entry
            for id, state in states.items()
            if state is not None and (entry := state.run_entry(id)) is not None
        }
        nouns = ("updated", *LISTS)
        now_lines, docs, facts, under, *scores = await self._backend.look(
            ("HMGET", keys.gate_state, *ids),
            ("HMGET", keys.gate_docs, *ids),
            ("HMGET", keys.gate_facts, *ids),
            ("ZMSCORE", keys.gate_runs, *(entries.values() or ["-"])),
            *[("ZMSCORE", keys.named("gate", noun, ""), *ids) for noun in nouns],
        )
        is_under = dict(zip(entries, [score is not None for score in under], strict=False))
        self._pages.pace.learn(sum(len(text) for text in (*docs, *facts) if text))
        return [
            IntentLook(
                id=id,
                line=now_lines[i],
                doc=docs[i],
                facts=facts[i],
                scores={
                    noun: float(found[i])
                    for noun, found in zip(nouns, scores, strict=True)
                    if found[i] is not None
                },
                is_under_run=is_under.get(id) if now_lines[i] == lines[id] else None,
            )
            for i, id in enumerate(ids)
        ]

    async def _confirm(self, id: str) -> AsyncIterator[Finding]:
        """Look at a suspect alone and at one moment; it may have moved on since."""
        line = await self._backend.command("HGET", self._keys.gate_state, id)
        [look] = await self._look({id: line})
        for problem in judge_intent(look):
            yield self._pages.finding(problem, id, concept="gate")

    async def _check_strays(self) -> AsyncIterator[Finding]:
        """What speaks of intents that have no state line."""
        told: set[bytes] = set()
        for command, noun in (
            ("HSCAN", "docs"),
            ("HSCAN", "facts"),
            *[("ZSCAN", noun) for noun in ("updated", *LISTS)],
        ):
            key = self._keys.named("gate", noun, "")
            async for page in self._pages.scan(command, key, documents=command == "HSCAN"):
                ids = [id for id, _ in page if id not in told]
                if not ids:
                    continue
                lines = await self._backend.command("HMGET", self._keys.gate_state, *ids)
                for id, line in zip(ids, lines, strict=True):
                    if line is None:
                        told.add(id)
                        name = id.decode("utf-8", "replace")
                        async for finding in self._confirm(name):
                            yield finding

    async def _check_runs(self) -> AsyncIterator[Finding]:
        keys = self._keys
        async for page in self._pages.scan("ZSCAN", keys.gate_runs):
            for start in range(0, len(page), PAGE_MOST):
                members = [member for member, _ in page[start : start + PAGE_MOST]]
                matches = [_RUN_ENTRY.match(member) for member in members]
                ids = [
                    found[3] if found else member
                    for found, member in zip(matches, members, strict=True)
                ]
                scores, lines = await self._backend.look(
                    ("ZMSCORE", keys.gate_runs, *members), ("HMGET", keys.gate_state, *ids)
                )
                for id, member, score, line in zip(ids, members, scores, lines, strict=True):
                    if score is None:
                        continue
                    for problem in judge_run_entry(member, float(score), line):
                        name = id.decode("utf-8", "replace")
                        yield self._pages.finding(problem, name, concept="gate")

    async def _check_dataset(self) -> AsyncIterator[Finding]:
        keys = self._keys
        stored, intents = await self._backend.look(
            ("GET", keys.gate_dataset), ("HLEN", keys.gate_state)
        )
        for problem in judge_dataset(stored, int(intents)):
            yield self._pages.finding(problem, None, concept="gate")
