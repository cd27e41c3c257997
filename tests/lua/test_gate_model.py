"""The scripts of the gate do what the model of them does that tests/gate_model.py searches through.

Random walks on a few keys at once: each command on the server and on the model, and after each its
answer and the whole state line. LEASEKIT_GATE_WALKS asks for more of them.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
from gate_model import Gate, Row
from lua.commands import Tenant, intent

WALKS = int(os.environ.get("LEASEKIT_GATE_WALKS", "100"))
STEPS = 30

TOKENS = [letter * 22 for letter in "abc"]
QUESTIONS = [letter * 22 for letter in "qrs"]
SETTLE, PAUSE = 3, 4

# What was answered at least once in the walks of one seed.
ANSWERS = {
    "prepare": "granted spent claimed unknown dead_lettered failed sent",
    "complete": "recorded kept lost missing",
    "extend": "extended lost",
    "ask": "asked wait buried missing claimed cancelled failed sent",
    "answer": "recorded lost missing",
    "resolve": "resolved changed missing claimed cancelled failed sent",
}


class Walk:
    """One key on both sides; `told` is what was done to it, for who has to read a failure."""

    def __init__(self, tenant: Tenant, chance: random.Random, id: str) -> None:
        self.tenant, self.chance, self.id = tenant, chance, id
        self.row = Row()
        self.told: list[str] = []
        self.heard: set[tuple[str, str]] = set()
        self.asks_max = chance.choice([1, 2])
        self.pace = {"asks_max": self.asks_max, "first_ms": PAUSE, "most_ms": PAUSE}

    def step(self, now: int, fence: int) -> int:
        """Do something at random; the last fence given afterwards."""
        does = self.chance.choice(
            [self.prepare, self.complete, self.ask, self.answer] * 2 + [self.extend, self.resolve]
        )
        following = max(fence + 1, now * 1_000)
        self.row, expected, answered = does(now, following)
        self.told.append(f"{now} {does.__name__}: {answered}")
        self.heard.add((does.__name__, answered))
        assert answered == expected, "\n".join(self.told)
        self.compare()
        return max(fence, self.row.fence, self.row.ask_fence)

    def mostly(self, own: str, others: list[str]) -> str:
        """The row's own token more often than not, so that walks get somewhere."""
        return own if own and self.chance.random() < 0.6 else self.chance.choice(others)

    def revision(self) -> int:
        return max(self.row.revision - self.chance.choice([0, 0, 0, 1]), 0)

    def run(self, name: str, *item: Any, now: int, **arguments: Any) -> list[Any]:
        """What a command answered for the one key, as words."""
        item = (self.id, *item)
        answer = self.tenant.run(name, item, now_ms=now, **arguments)[-1]
        return answer if isinstance(answer, list) else [answer]

    def prepare(self, now: int, fence: int) -> tuple[Row, str, str]:
        token = self.mostly(self.row.token, TOKENS)
        lease, on_expiry = self.chance.randint(1, 20), self.chance.choice(["park", "reclaim"])
        item = intent(self.id, token, lease_ms=lease, on_expiry=on_expiry)
        answer = self.tenant.prepare(item, now_ms=now)[-1]
        words = answer if isinstance(answer, list) else [answer]
        row, expected = Gate().prepare(
            self.row, token, now=now, lease=lease, parks=on_expiry == "park", fence=fence
        )
        return row, expected, words[1] if words[0] == "taken" else words[0]

    def complete(self, now: int, fence: int) -> tuple[Row, str, str]:
        token = self.mostly(self.row.token, TOKENS)
        # What ends a key is rare, so that much happens before.
        result = self.chance.choice(["left", "blocked"] * 4 + ["failed", "succeeded"])
        again = self.chance.choice([0, 1])  # that it may be a repeat makes no difference to it
        item = (token, result, "{}")
        words = self.run("gate/complete", *item, now=now, keep_ms=10**9, repeated=again)
        return *Gate().complete(self.row, token, result, now=now), words[0]

    def extend(self, now: int, fence: int) -> tuple[Row, str, str]:
        token, lease = self.mostly(self.row.token, TOKENS), self.chance.randint(1, 20)
        words = self.run("gate/extend", token, lease, now=now)
        return *Gate().extend(self.row, token, now=now, lease=lease), words[0]

    def ask(self, now: int, fence: int) -> tuple[Row, str, str]:
        token, lease = self.chance.choice(QUESTIONS), self.chance.randint(1, 10)
        words = self.run("gate/ask", token, now=now, lease_ms=lease, settle_ms=SETTLE, **self.pace)
        row, expected = Gate().ask(
            self.row, token,
            now=now, lease=lease, settle=SETTLE, asks_max=self.asks_max, pause=PAUSE, fence=fence,
        )  # fmt: skip
        answered = words[1] if words[0] == "not_unknown" else words[0]
        return row, "missing" if expected == "absent" else expected, answered

    def answer(self, now: int, fence: int) -> tuple[Row, str, str]:
        token, revision = self.mostly(self.row.ask_token, QUESTIONS), self.revision()
        verdict = self.chance.choice(["absent", "undecidable"] * 4 + ["applied"])
        words = self.run("gate/answer", token, revision, verdict, "{}", now=now, **self.pace)
        row, expected = Gate().answer(
            self.row, token, revision, verdict, now=now, asks_max=self.asks_max, pause=PAUSE
        )
        return row, expected, words[0]

    def resolve(self, now: int, fence: int) -> tuple[Row, str, str]:
        verdict = self.chance.choice(["not_sent"] * 6 + ["sent", "failed"])
        revision = self.revision()
        words = self.run("gate/resolve", revision, verdict, "{}", now=now)
        row, expected = Gate().resolve(self.row, revision, verdict, now=now)
        return row, expected, words[1] if words[0] == "not_unknown" else words[0]

    def compare(self) -> None:
        """The state line is the model's row, word by word."""
        line, row = self.tenant.intent(self.id), self.row
        if row.status == "absent":
            assert line == ""
            return
        words = line.split(" ")
        stored = [*words[:4], *words[6:9], *words[10:16]]
        on_expiry = "park" if row.parks else "reclaim"
        expected: list[Any] = [row.status, row.cause, row.token, row.end]
        expected += [row.revision, row.attempts, row.fence, on_expiry]
        expected += [row.asks, row.ask_token or "~", row.ask_fence, row.ask_end, row.ask_at]
        assert stored == [str(word) for word in expected], "\n".join(self.told)


@pytest.mark.parametrize("seed", range(2))
def test_the_scripts_do_what_the_model_does(tenant: Tenant, seed: int) -> None:
    """Answers, refusals and state lines, also where walks cross each other's ends."""
    chance = random.Random(seed)
    now, fence, open_walks = 10, 0, []
    walked: list[Walk] = []
    for number in range(WALKS):
        open_walks = [*open_walks[-2:], Walk(tenant, chance, f"walk-{number}")]
        walked.append(open_walks[-1])
        for _ in range(STEPS):
            now += chance.choice([0, 0, 1, 2, 4, 9])
            if chance.random() < 0.1:
                expire(tenant, walked, now)
            fence = chance.choice(open_walks).step(now, fence)
    heard = set().union(*(walk.heard for walk in walked))
    assert {(name, word) for name, words in ANSWERS.items() for word in words.split()} <= heard


def expire(tenant: Tenant, walks: list[Walk], now: int) -> None:
    """Write down what parks and has ended, on both sides."""
    written = 0
    for walk in walks:
        walk.row, word = Gate().expire(walk.row, now=now)
        written += word == "written"
    assert tenant.run("gate/expire", now_ms=now, limit=250) == [now, 0, written]
    for walk in walks[-3:]:
        walk.compare()
