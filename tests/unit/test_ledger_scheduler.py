"""What is to be done about a due wait, and under which key: the table of spec/reliability 5.5."""

from __future__ import annotations

from typing import Any

import pytest

from leasekit.ledger.records import StatefulRuntimeScope, TimeoutPolicy, Wait
from leasekit.ledger.scheduler import action_of, key_of
from leasekit.model import TenantContext

SCOPE = StatefulRuntimeScope(tenant_context=TenantContext.explicit("org-a", "workspace-a"))
PREFIX = "stateful wait timeout "


def wait(
    wake: int | None = None,
    timeout: int | None = None,
    on: str = "cancel",
    every: int | None = None,
) -> Wait:
    policy = None
    if timeout is not None:
        policy = TimeoutPolicy(timeout_at_ms=timeout, on_timeout=on, remind_every_ms=every)
    return Wait(
        wait_id="wait-a", run_id="run-a", wait_kind="timer", status="waiting", scope=SCOPE,
        created_at_ms=1, updated_at_ms=1, wake_at_ms=wake, timeout_policy=policy,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "row", "key"),
    [
        (wait(wake=50), ("timer_woken", "woken", "running", None), "timer:run-a:wait-a:50"),
        (
            wait(timeout=50, on="cancel"),
            ("timeout_cancelled", "cancelled", "cancelled", PREFIX + "cancelled the run"),
            "timeout:Cancel:run-a:wait-a:50",
        ),
        (
            wait(timeout=50, on="escalate"),
            ("timeout_escalated", "escalated", "paused", PREFIX + "escalated for operator review"),
            "timeout:Escalate:run-a:wait-a:50",
        ),
        *(
            (
                wait(timeout=50, on="remind", every=every),
                (
                    *("timeout_reminded", "timed_out", "paused"),
                    PREFIX + "reminder requires operator review",
                ),
                "timeout:Remind:run-a:wait-a:50",
            )
            for every in (None, 0)
        ),
        (
            wait(timeout=50, on="remind", every=1),
            ("timeout_reminded", None, "paused", None),
            "timeout:Remind:run-a:wait-a:50",
        ),
        (
            wait(timeout=50, on="resume"),
            ("timeout_resumed", "woken", "running", None),
            "timeout:Resume:run-a:wait-a:50",
        ),
    ],
)
def test_action(given: Wait, row: tuple[Any, ...], key: str) -> None:
    """Event, the wait's and the run's next status, how the dead letter's reason begins; the key."""
    told = action_of(given, 50)

    assert told is not None
    action, due_ms = told
    assert (action.event, action.wait_status, action.run_status, action.reason) == row
    assert key_of(given, action, due_ms) == key


@pytest.mark.parametrize(
    ("wake", "timeout", "event", "due"),
    [
        (50, 50, "timeout_cancelled", 50),
        (50, 49, "timeout_cancelled", 49),
        (49, 50, "timer_woken", 49),
        (50, 51, "timer_woken", 50),
        (51, 50, "timeout_cancelled", 50),
    ],
)
def test_action_where_waking_and_timeout_are_set(
    wake: int, timeout: int, event: str, due: int
) -> None:
    """The one that is due first; at the same instant the timeout."""
    told = action_of(wait(wake=wake, timeout=timeout), 50)

    assert told is not None
    assert (told[0].event, told[1]) == (event, due)


@pytest.mark.parametrize("given", [wait(), wait(wake=51), wait(timeout=51), wait(51, 51)])
def test_nothing_is_due(given: Wait) -> None:
    assert action_of(given, 50) is None


@pytest.mark.parametrize("wake", range(45, 56))
@pytest.mark.parametrize("timeout", range(45, 56))
def test_action_stays_the_same_later(wake: int, timeout: int) -> None:
    """Whoever takes the wait up later does what the first one had begun, under the same key."""
    given = wait(wake, timeout, "escalate")
    told = [action_of(given, at) for at in range(min(wake, timeout), 60)]

    assert len({None if one is None else (one[0].name, one[1]) for one in told}) == 1
