"""The table of spec/reliability 5.3 and the predicates of 5.2 and 5.8, as pure functions."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from leasekit import InvalidInput
from leasekit.ledger import waiting
from leasekit.ledger.records import StatefulRuntimeScope, TimeoutPolicy, Wait
from leasekit.ledger.waiting import TERMINAL, WebhookEvent
from leasekit.model import TenantContext

STATUSES = ("waiting", "claimed", "woken", "timed_out", "escalated", "cancelled")
TIMED_OUT = ("timed_out", "escalated", "cancelled")
SCOPE = StatefulRuntimeScope(tenant_context=TenantContext.explicit("org-a", "workspace-a"))
CLAIM = {"claimed_by": "c", "claimed_at_ms": 100, "claim_expires_at_ms": 200}
NO_CLAIM = {"claimed_by": None, "claimed_at_ms": None, "claim_expires_at_ms": None}


def wait(status: str = "waiting", **fields: Any) -> Wait:
    """A timer that is due at 50; a claimed one by c, from 100 to 200."""
    given: dict[str, Any] = {
        "wait_id": "wait-a",
        "run_id": "run-a",
        "wait_kind": "timer",
        "scope": SCOPE,
        "created_at_ms": 10,
        "updated_at_ms": 20,
        "wake_at_ms": 50,
    }
    if status == "claimed":
        given |= CLAIM
    return Wait(status=status, **(given | fields))


def changed(before: Wait, after: Wait | None) -> dict[str, Any]:
    """The fields that a step changed, and what they are now."""
    assert after is not None
    return {
        name: getattr(after, name)
        for name in Wait.__struct_fields__
        if getattr(after, name) != getattr(before, name)
    }


def policy(at: int = 50, on: str = "remind", **fields: Any) -> TimeoutPolicy:
    return TimeoutPolicy(timeout_at_ms=at, on_timeout=on, **fields)


# --- predicates (5.2) -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "end", "active"),
    [
        ("claimed", 201, True),
        ("claimed", 200, False),  # the end itself is not within the claim
        ("claimed", 199, False),
        ("claimed", None, False),
        ("waiting", 201, False),
        ("woken", 201, False),
    ],
)
def test_active_claim(status: str, end: int | None, active: bool) -> None:
    """Only a claimed wait whose claim ends later."""
    given = wait(status, claim_expires_at_ms=end)

    assert waiting.is_claim_active(given, 200) is active


@pytest.mark.parametrize("wake", [None, 100, 101])
@pytest.mark.parametrize("timeout", [None, 100, 101])
def test_due(wake: int | None, timeout: int | None) -> None:
    """At the instant of waking or of the timeout, whichever comes first; never without either."""
    given = wait(wake_at_ms=wake, timeout_policy=timeout and policy(timeout))

    assert waiting.is_due(given, 100) is (wake == 100 or timeout == 100)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("at", [199, 200])
def test_claimable(status: str, at: int) -> None:
    """A waiting one always, a claimed one once its claim has ended, no other."""
    wanted = status == "waiting" or (status == "claimed" and at == 200)

    assert waiting.is_claimable(wait(status), at) is wanted


@pytest.mark.parametrize("stored", STATUSES)
@pytest.mark.parametrize("presented", STATUSES)
def test_only_two_claimed_waits_match(stored: str, presented: str) -> None:
    """Both are claimed, with the same three values."""
    wanted = stored == presented == "claimed"

    assert waiting.holds(wait(stored, **CLAIM), wait(presented, **CLAIM)) is wanted


@pytest.mark.parametrize(
    "other", [{"claimed_by": "d"}, {"claimed_at_ms": 101}, {"claim_expires_at_ms": 201}]
)
def test_each_value_of_the_claim_counts(other: dict[str, Any]) -> None:
    """Claimant, start and end: one that differs is another claim."""
    assert not waiting.holds(wait("claimed"), wait("claimed", **other))


# --- upsert ---------------------------------------------------------------------------------------


KINDS = [
    *(("timer", "timer"), ("approval", "approval"), ("approval", "timer"), ("timer", "approval")),
]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("before", STATUSES)
@pytest.mark.parametrize("after", STATUSES)
def test_upsert(before: str, after: str, kinds: tuple[str, str]) -> None:
    """A terminal wait stays, but an approval that was given up may be woken or cancelled after all."""
    stored, given = wait(before, wait_kind=kinds[0]), wait(after, wait_kind=kinds[1], reason="new")
    is_late = (
        kinds == ("approval", "approval")
        and before in ("timed_out", "escalated")
        and after in ("woken", "cancelled")
    )

    wanted = given if before in ("waiting", "claimed") or is_late else stored
    assert waiting.replaced(stored, given) is wanted


def test_upsert_of_a_new_wait() -> None:
    """It is taken as it is."""
    given = wait("woken")

    assert waiting.replaced(None, given) is given


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"wait_id": ""}, "wait_id"),
        ({"run_id": " "}, "run_id"),
        ({"wait_kind": "sleep"}, "wait_kind"),
        ({"status": "done"}, "status"),
        ({"timeout_policy": policy(on="explode")}, "on_timeout"),
        ({"timeout_policy": policy(-1)}, "timeout_at_ms"),
        ({"timeout_policy": policy(remind_every_ms=-1)}, "remind_every_ms"),
        ({"created_at_ms": -1}, "created_at_ms"),
        ({"updated_at_ms": True}, "updated_at_ms"),
        ({"wake_at_ms": 2**53}, "wake_at_ms"),
        ({"claimed_at_ms": 1.5}, "claimed_at_ms"),
        ({"claim_expires_at_ms": -5}, "claim_expires_at_ms"),
        ({"completed_at_ms": "1"}, "completed_at_ms"),
    ],
)
def test_check_names_what_is_wrong(fields: dict[str, Any], field: str) -> None:
    """No wait comes in that no step would know how to go on with."""
    with pytest.raises(InvalidInput) as refused:
        waiting.check(msgspec.structs.replace(wait(), **fields))

    assert refused.value.field == field


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("on", ["cancel", "escalate", "remind", "resume"])
def test_check_lets_the_words_of_the_specification_pass(status: str, on: str) -> None:
    """Every status, every reaction to a timeout."""
    waiting.check(wait(status, timeout_policy=policy(on=on)))


def test_check_wants_a_wait() -> None:
    """Anything else is refused by its type."""
    with pytest.raises(InvalidInput, match="not dict"):
        waiting.check({})  # type: ignore[arg-type]


# --- claim and release ----------------------------------------------------------------------------


@pytest.mark.parametrize(("lease", "end"), [(30, 330), (1, 301), (0, 301)])
def test_claim(lease: int, end: int) -> None:
    """For at least a millisecond; what an earlier attempt left is gone."""
    before = wait(wake_idempotency_key="k", event_seq=3, completed_at_ms=9)

    assert changed(before, waiting.claim(before, "d", 300, lease)) == {
        "status": "claimed",
        "claimed_by": "d",
        "claimed_at_ms": 300,
        "claim_expires_at_ms": end,
        "updated_at_ms": 300,
        "wake_idempotency_key": None,
        "event_seq": None,
        "completed_at_ms": None,
    }


def test_release() -> None:
    """The wait waits again, as if it had never been claimed."""
    before = wait("claimed", wake_idempotency_key="k", event_seq=3, completed_at_ms=9)

    assert changed(before, waiting.release(before, wait("claimed"), 150)) == {
        "status": "waiting",
        "updated_at_ms": 150,
        "wake_idempotency_key": None,
        "event_seq": None,
        "completed_at_ms": None,
        **NO_CLAIM,
    }


def test_release_after_the_claims_end() -> None:
    """Late, but nobody took it meanwhile."""
    assert waiting.release(wait("claimed"), wait("claimed"), 10_000) is not None


@pytest.mark.parametrize("status", ["waiting", *sorted(TERMINAL)])
def test_release_of_what_is_not_claimed(status: str) -> None:
    assert waiting.release(wait(status, **CLAIM), wait("claimed"), 150) is None


def test_release_of_somebody_elses_claim() -> None:
    assert waiting.release(wait("claimed"), wait("claimed", claimed_at_ms=99), 150) is None


# --- begin and finish -----------------------------------------------------------------------------


@pytest.mark.parametrize("timeout_status", [None, *TIMED_OUT])
def test_begin(timeout_status: str | None) -> None:
    """It stays claimed, under the key of what is about to be done."""
    before = wait("claimed", event_seq=3, completed_at_ms=9)

    after = waiting.begin_completion(
        before, wait("claimed"), "k", 199, timeout_status=timeout_status
    )
    assert changed(before, after) == {
        "wake_idempotency_key": "k",
        "event_seq": None,
        "completed_at_ms": None,
        "updated_at_ms": 199,
    }


def test_begin_at_the_claims_end() -> None:
    """The claim must be active."""
    assert waiting.begin_completion(wait("claimed"), wait("claimed"), "k", 200) is None


def test_begin_under_another_claim() -> None:
    stored = wait("claimed", claimed_by="d")

    assert waiting.begin_completion(stored, wait("claimed"), "k", 150) is None


def test_begin_unclaimed() -> None:
    assert waiting.begin_completion(wait(), wait("claimed"), "k", 150) is None


@pytest.mark.parametrize("status", sorted(TERMINAL))
@pytest.mark.parametrize(("key", "known"), [("k", True), ("other", False), ("", False)])
def test_begin_of_what_is_over(status: str, key: str, known: bool) -> None:
    """The same key gets the wait as it ended, another one nothing."""
    stored = wait(status, wake_idempotency_key="k", completed_at_ms=40)

    begun = waiting.begin_completion(stored, wait("claimed"), key, 150)
    assert begun is (stored if known else None)


@pytest.mark.parametrize("status", ["woken", "waiting", "claimed", "done"])
def test_begin_of_a_timeout_wants_its_status(status: str) -> None:
    with pytest.raises(InvalidInput, match="timed_out") as refused:
        waiting.begin_completion(wait("claimed"), wait("claimed"), "k", 150, timeout_status=status)
    assert refused.value.field == "timeout_status"


@pytest.mark.parametrize("status", sorted(TERMINAL))
@pytest.mark.parametrize("now", [150, 200, 10_000])
def test_finish(status: str, now: int) -> None:
    """Also after the claim's end, as long as nobody claimed it anew."""
    before = wait("claimed", wake_idempotency_key="k")

    after = waiting.finish_completion(before, wait("claimed"), "k", 7, status, now)
    assert changed(before, after) == {
        "status": status,
        "event_seq": 7,
        "completed_at_ms": now,
        "updated_at_ms": now,
        **NO_CLAIM,
    }


@pytest.mark.parametrize("stored_status", sorted(TERMINAL))
@pytest.mark.parametrize("status", sorted(TERMINAL))
@pytest.mark.parametrize(("key", "seq"), [("k", 7), ("k", 8), ("other", 7)])
def test_finish_again(stored_status: str, status: str, key: str, seq: int) -> None:
    """The same status, key and place get the wait unchanged; anything else nothing."""
    stored = wait(stored_status, wake_idempotency_key="k", event_seq=7, completed_at_ms=40)

    again = waiting.finish_completion(stored, wait("claimed"), key, seq, status, 300)
    is_same = stored_status == status and (key, seq) == ("k", 7)
    assert again is (stored if is_same else None)


@pytest.mark.parametrize(
    ("stored", "key"),
    [
        (wait("claimed", wake_idempotency_key="k"), "other"),
        (wait("claimed"), "k"),
        (wait("claimed", wake_idempotency_key="k", claimed_by="d"), "k"),
        (wait("waiting", wake_idempotency_key="k"), "k"),
    ],
)
def test_finish_of_what_was_not_begun(stored: Wait, key: str) -> None:
    """Claim and key must be those it was begun with."""
    assert waiting.finish_completion(stored, wait("claimed"), key, 7, "woken", 150) is None


@pytest.mark.parametrize("status", ["waiting", "claimed", "done"])
def test_finish_wants_a_terminal_status(status: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        waiting.finish_completion(wait("claimed"), wait("claimed"), "k", 7, status, 150)
    assert refused.value.field == "status"


# --- reminders ------------------------------------------------------------------------------------


def remind(stored: Wait, key: str = "k", seq: int = 7) -> Wait | None:
    return waiting.finish_reminder(stored, wait("claimed"), key, seq, 900, 150)


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (None, {"reminder_count": 1}),
        ({"x": 1, "reminder_count": 4}, {"x": 1, "reminder_count": 5}),
        ({"reminder_count": "4"}, {"reminder_count": 1}),
        ([1], {"previous_metadata": [1], "reminder_count": 1}),
    ],
)
def test_reminder(before: Any, kept: dict[str, Any]) -> None:
    """It waits on until the next one; the key of this one stays."""
    given = policy(50, remind_every_ms=100, metadata=before, escalate_to="boss")
    stored = wait("claimed", wake_idempotency_key="k", timeout_policy=given, completed_at_ms=9)

    after = remind(stored)
    told = {"last_reminded_at_ms": 150, "next_reminder_at_ms": 900}
    assert changed(stored, after) == {
        "status": "waiting",
        "timeout_policy": msgspec.structs.replace(given, timeout_at_ms=900, metadata=kept | told),
        "event_seq": 7,
        "completed_at_ms": None,
        "updated_at_ms": 150,
        **NO_CLAIM,
    }
    assert after is not None
    assert after.wake_idempotency_key == "k"


@pytest.mark.parametrize(
    ("key", "seq", "known"), [("k", 7, True), ("k", 8, False), ("other", 7, False)]
)
def test_reminder_again(key: str, seq: int, known: bool) -> None:
    """A wait that waits on knows its last reminder."""
    stored = wait(wake_idempotency_key="k", event_seq=7, timeout_policy=policy())

    assert remind(stored, key, seq) is (stored if known else None)


@pytest.mark.parametrize(
    "stored",
    [
        wait("claimed", wake_idempotency_key="k"),
        wait("claimed", wake_idempotency_key="other", timeout_policy=policy()),
        wait("claimed", wake_idempotency_key="k", timeout_policy=policy(), claimed_by="d"),
        *(wait(status, wake_idempotency_key="k", event_seq=7, timeout_policy=policy())
          for status in sorted(TERMINAL)),
    ],
)  # fmt: skip
def test_reminder_refused(stored: Wait) -> None:
    """Without a timeout, under another key or claim, or once it is over."""
    assert remind(stored) is None


# --- without a claim ------------------------------------------------------------------------------


def mark(status: str, stored: Wait, key: str = "k", seq: int = 7, now: int = 150) -> Wait | None:
    if status == "woken":
        return waiting.mark_woken(stored, key, seq, now)
    return waiting.mark_timed_out(stored, key, seq, status, now)


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_mark(status: str) -> None:
    """Due or not."""
    before = wait(wake_at_ms=10_000)

    assert changed(before, mark(status, before)) == {
        "status": status,
        "wake_idempotency_key": "k",
        "event_seq": 7,
        "completed_at_ms": 150,
        "updated_at_ms": 150,
    }


@pytest.mark.parametrize("status", sorted(TERMINAL))
@pytest.mark.parametrize(("now", "refused"), [(199, True), (200, False)])
def test_mark_of_a_claimed_wait(status: str, now: int, refused: bool) -> None:
    """Only once the claim has ended, which then is gone."""
    before = wait("claimed")
    after = mark(status, before, now=now)

    assert (after is None) is refused
    if after is not None:
        assert changed(before, after).items() >= NO_CLAIM.items()


@pytest.mark.parametrize("stored_status", sorted(TERMINAL))
@pytest.mark.parametrize("status", sorted(TERMINAL))
@pytest.mark.parametrize(("key", "seq"), [("k", 7), ("k", 8), ("other", 7)])
def test_mark_again(stored_status: str, status: str, key: str, seq: int) -> None:
    """The same key gets the wait with its first completion, whatever place it names; others nothing."""
    stored = wait(stored_status, wake_idempotency_key="k", event_seq=7, completed_at_ms=40)

    is_same = stored_status == status and key == "k"
    assert mark(status, stored, key, seq) is (stored if is_same else None)


@pytest.mark.parametrize("status", ["woken", "waiting", "claimed", "done"])
def test_mark_timed_out_wants_its_status(status: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        waiting.mark_timed_out(wait(), "k", 7, status, 150)
    assert refused.value.field == "status"


# --- phase guard and retention --------------------------------------------------------------------


@pytest.mark.parametrize("status", ["waiting", "claimed"])
@pytest.mark.parametrize(
    ("metadata", "kept"), [(None, {}), ({"x": 1}, {"x": 1}), (5, {"previous_metadata": 5})]
)
def test_cancel_by_guard(status: str, metadata: Any, kept: dict[str, Any]) -> None:
    """Cancelled with the reason, claimed by oneself or by nobody."""
    before = wait(status, metadata=metadata, event_seq=3)

    after = waiting.cancel_by_guard(before, before, "no way", 150)
    assert changed(before, after) == {
        "status": "cancelled",
        "wake_idempotency_key": "phase-guard-denied:wait-a",
        "event_seq": None,
        "completed_at_ms": 150,
        "updated_at_ms": 150,
        "metadata": kept | {"phase_guard_denied": True, "phase_guard_denial_reason": "no way"},
        **(NO_CLAIM if status == "claimed" else {}),
    }


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_cancel_by_guard_of_what_is_over(status: str) -> None:
    assert waiting.cancel_by_guard(wait(status), wait(status), "no way", 150) is None


@pytest.mark.parametrize("presented", [wait(), wait("claimed", claimed_by="d")])
def test_cancel_by_guard_of_somebody_elses_claim(presented: Wait) -> None:
    assert waiting.cancel_by_guard(wait("claimed"), presented, "no way", 150) is None


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize(
    ("completed", "updated", "ended"),
    [(99, 500, True), (100, 20, False), (None, 99, True), (None, 100, False)],
)
def test_ended_before(status: str, completed: int | None, updated: int, ended: bool) -> None:
    """By the instant of completion, else of the last change; the cutoff itself is kept."""
    given = wait(status, completed_at_ms=completed, updated_at_ms=updated)

    assert waiting.ended_before(given, 100) is (ended and status in TERMINAL)


# --- webhooks (5.8) -------------------------------------------------------------------------------

EVENT = WebhookEvent(
    trigger_id="t",
    provider="github",
    provider_event_kind="push",
    provider_event_id="evt-1",
    body_digest="sha256:b",
)
RULES = {
    "trigger_id": "t",
    "provider": "github",
    "provider_event_kind": "push",
    "provider_event_id": "evt-1",
    "body_digest": "sha256:b",
    "idempotency_key": "github:evt-1",
}


def hook(rules: Any, **fields: Any) -> Wait:
    return wait(wait_kind="webhook", metadata={"webhook_match": rules}, **fields)


@pytest.mark.parametrize("name", RULES)
def test_webhook_rule(name: str) -> None:
    """Each rule alone decides: equal or not, also by case and blanks."""
    assert waiting.matches(hook({name: RULES[name]}), EVENT)
    assert not waiting.matches(hook({name: RULES[name].upper()}), EVENT)
    assert not waiting.matches(hook({name: ""}), EVENT)
    assert not waiting.matches(hook(RULES | {name: "other"}), EVENT)


def test_webhook_with_all_rules() -> None:
    assert waiting.matches(hook(RULES), EVENT)


@pytest.mark.parametrize(
    "rules", [{}, None, [], "t", {"trigger_id": None}, {"unknown": "t"}, {"trigger_id": 5}]
)
def test_webhook_without_a_rule_matches_nothing(rules: Any) -> None:
    assert not waiting.matches(hook(rules), EVENT)


@pytest.mark.parametrize("metadata", [None, 5, [], {}, {"trigger_id": "t"}])
def test_wait_without_rules_matches_nothing(metadata: Any) -> None:
    assert not waiting.matches(wait(wait_kind="webhook", metadata=metadata), EVENT)


@pytest.mark.parametrize("kind", ["timer", "approval", "external_condition", "retry_backoff"])
def test_only_webhook_waits_match(kind: str) -> None:
    assert not waiting.matches(msgspec.structs.replace(hook(RULES), wait_kind=kind), EVENT)


def test_rule_about_what_the_event_has_not() -> None:
    """An absent value is equal to none."""
    bare = WebhookEvent(trigger_id="t", provider="github", body_digest="sha256:b")

    assert bare.idempotency_key == "sha256:b"
    assert not waiting.matches(hook({"provider_event_kind": "push"}), bare)
    assert not waiting.matches(hook({"provider_event_id": "evt-1"}), bare)
    assert waiting.matches(hook({"idempotency_key": "sha256:b"}), bare)


@pytest.mark.parametrize(
    ("extra", "kept"),
    [(None, {}), ({"a": 1}, {"a": 1}), (5, {"extra": 5}), ([1], {"extra": [1]})],
)
def test_metadata_of_a_webhook_wait(extra: Any, kept: dict[str, Any]) -> None:
    """An object gets the rules beside what it has, any other value goes under `extra`."""
    wanted = kept | {"webhook_match": {"trigger_id": "t"}}

    assert waiting.match_metadata({"trigger_id": "t"}, extra) == wanted
