"""The gate, looked at from every side: sound as it is, and every rule of it needed.

`PYTHONPATH=tests python -m gate_model --depth 24` looks further, and prints what goes wrong without
each rule.
"""

from __future__ import annotations

import pytest
from gate_model import LESS_DEEP, PROMISES, RULES, SETTINGS, break_rule, main, search

# As deep as ten seconds in all allow; the settings of LESS_DEEP so many steps less.
DEPTH = 16


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_order_of_steps_breaks_a_promise(setting: str) -> None:
    """Whatever two senders, reconcile, an operator, the clock and the servers do, and when."""
    found = search(setting, DEPTH)

    assert not found.promise, (PROMISES[found.promise], *found.trace)
    assert found.is_all or found.depth == DEPTH - LESS_DEEP.get(setting, 0)
    assert found.states > 300


@pytest.mark.parametrize("name", RULES)
def test_no_rule_can_be_left_out(name: str) -> None:
    """Without it its promise falls, in no more steps than the sound gate was looked at for."""
    rule = RULES[name]
    found = break_rule(name, DEPTH - LESS_DEEP.get(rule.setting, 0))

    assert found.promise == rule.promise
    assert len(found.trace) == found.depth > 0


def test_every_promise_can_be_broken() -> None:
    """A promise that no broken rule breaks might not be looked at."""
    assert {rule.promise for rule in RULES.values()} == set(PROMISES)


def test_a_shortest_trace_is_told_step_by_step() -> None:
    """A parked lease that is free at its end: the first sender sleeps, and both send."""
    assert break_rule("parked", DEPTH).trace == (
        "A sends prepare(a1)",
        "server does prepare(a1): granted",
        "A has its grant a1",
        "A passes begin with a1",
        "clock ticks",
        "B sends prepare(b1)",
        "server does prepare(b1): granted",
        "B has its grant b1",
        "B passes begin with b1",
    )


def test_the_command_line_tells_what_it_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    """Settings with their states, rules with their traces; not to be trusted below a rule's depth."""
    assert main(["--depth", "5"]) == 1

    told = capsys.readouterr().out
    assert "plain" in told
    assert "begin: begin looks at the deadline. If not (it does not)" in told
