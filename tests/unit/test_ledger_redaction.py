"""Redaction, digests, merged metadata, and the ids that actions and compensations get."""

from __future__ import annotations

from typing import Any

import pytest
from ledger_records import RECEIPT, action, compensation, failed_action, scope_of

from leasekit import InvalidInput
from leasekit.ledger import PrincipalRef
from leasekit.ledger.bridge import (
    check_action,
    compensation_id_of,
    effect_status,
    run_of,
    suffix_of,
)
from leasekit.ledger.recovery import begun, is_superseded, outbox_row, receipt_of
from leasekit.ledger.redaction import digest, merged, redacted, short16
from leasekit.ledger.retrying import backoff_ms
from leasekit.model import TenantContext

SCOPE = scope_of(TenantContext.explicit("org-a", "workspace-a"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (RECEIPT, "48204035006dfd070cd0faf5525b9c429dcd845e47030924f1305b57bea257f7"),
        ({"status": "ok"}, "71385556c1a64cc48ed7d2e4337abeb943ac5f66c665376f62724ffec92767e8"),
        ({"message": "hello"}, "15d8299a23298dc302c91f30d5bca73ab1f5fe316178cbb9057cc702d8f1927a"),
    ],
)
def test_digests_are_those_of_the_specification(value: Any, expected: str) -> None:
    """Appendix A: DIG, over the value as it is."""
    assert digest(value) == f"sha256:{expected}"


@pytest.mark.parametrize(
    ("key", "suffix"),
    [
        ("idempotency-action-a", "adad354a36524a9b"),
        (" idempotency-action-a\n", "adad354a36524a9b"),
        ("idem-run-a-node-a-send", "18ab48006bed9a50"),
        ("idempotency-action-execute-compensation", "35b5e734e7652de3"),
        ("  ", "action-a"),
        (None, "action-a"),
    ],
)
def test_ids_end_with_the_digest_of_the_key(key: str | None, suffix: str) -> None:
    """4.5, Appendix A: of the trimmed key; where there is none, with the action's own id."""
    assert suffix_of(action("action-a", idempotency_key=key)) == suffix


def test_an_execution_has_its_ids() -> None:
    """Appendix A: attempt 1 of the fixture's compensation in run-a."""
    identity = "compensation-effect-35b5e734e7652de3"
    operator = PrincipalRef(kind="human_user", id="o")
    running = begun(compensation(identity, SCOPE), actor=operator, reason=None, now_ms=4)
    row = outbox_row(running, 4)

    assert compensation_id_of(failed_action("action-execute-compensation")) == identity
    assert row["outbox_id"] == "outbox-compensation-ee31f6fdad57d37f"
    receipt = receipt_of(running, row, actor=operator, reason=None, now_ms=4)
    assert receipt.effect_id == "effect-compensation-4b5165103f81e032"


@pytest.mark.parametrize(
    "key",
    [
        *("token", "access_token", "token_count", "Secret", "secretary", "PASSWORD", "x-api-key"),
        *("api_key", "apikey", "Authorization", "private-key", " Token "),
    ],
)
@pytest.mark.parametrize("value", ["s", 1, None, True, {"a": 1}, ["s"]])
def test_what_its_key_calls_secret_is_not_shown(key: str, value: Any) -> None:
    """4.6: by a part of the normalised name, whatever its type, on every level."""
    assert redacted({"a": [{key: value, "b": "kept"}]}) == {"a": [{key: "[redacted]", "b": "kept"}]}


@pytest.mark.parametrize("value", [None, 1, "token", ["token"], {"key": "token"}, {"pass_word": 1}])
def test_all_else_is_shown(value: Any) -> None:
    """4.6: values are never looked at."""
    assert redacted(value) == value


def test_redaction_leaves_the_original_as_it_is() -> None:
    """Digests are taken of it."""
    value = {"token": "s", "list": [{"secret": "s"}]}
    redacted(value)
    assert value == {"token": "s", "list": [{"secret": "s"}]}


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (None, {"b": 2}),
        ({}, {"b": 2}),
        ({"a": 1, "b": 1}, {"a": 1, "b": 2}),
        ("text", {"previous_metadata": "text", "b": 2}),
        ([1], {"previous_metadata": [1], "b": 2}),
        (0, {"previous_metadata": 0, "b": 2}),
        (False, {"previous_metadata": False, "b": 2}),
    ],
)
def test_metadata_is_merged_by_rule_m(metadata: Any, expected: Any) -> None:
    """0.2: what is no object is kept under a key of its own."""
    assert merged(metadata, {"b": 2}) == expected


def test_short16_takes_no_prefix() -> None:
    assert short16("sha256:" + "0123456789abcdef" * 4) == "0123456789abcdef"
    assert short16("0123456789abcdef" * 4) == "0123456789abcdef"


MARK = {"superseded_by_success": True, "superseded_by_effect_id": "e", "superseded_at_ms": 0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"superseded_by_success": "true"}, False),
        ({"superseded_by_success": 1}, False),
        ({"superseded_by_success": False}, False),
        ({"superseded_by_effect_id": " "}, False),
        ({"superseded_by_effect_id": 1}, False),
        ({"superseded_at_ms": -1}, False),
        ({"superseded_at_ms": 1.0}, False),
        ({"superseded_at_ms": True}, False),
        ({"superseded_at_ms": None}, False),
    ],
)
def test_a_mark_has_three_parts(change: dict[str, Any], expected: bool) -> None:
    """4.7: a lone flag does not count."""
    assert is_superseded(MARK | change) is expected
    for missing in MARK:
        assert not is_superseded({key: value for key, value in MARK.items() if key != missing})
    assert not is_superseded(None)
    assert not is_superseded([MARK])


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        *((word, "succeeded") for word in ("posted", "sent", "succeeded", "success", "completed")),
        *((word, "succeeded") for word in ("delivered", "matched", " Posted ", "SENT")),
        *((word, "pending") for word in ("pending", "queued", "claimed")),
        *((word, "failed") for word in ("failed", "error", "rejected", "denied", "cancelled")),
        *((word, "unknown") for word in ("", "unknown", "post", "in-progress")),
    ],
)
def test_the_status_of_an_action_says_what_its_effect_is(status: str, expected: str) -> None:
    """4.5, 1: an error that says anything always means that it failed."""
    assert effect_status(action("a", status)) == expected
    assert effect_status(action("a", status, error=" ")) == expected
    assert effect_status(action("a", status, error="timeout")) == "failed"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "run-a"),
        ({"metadata": {"automationRunID": " r "}}, "r"),
        ({"metadata": {"automationRunID": 7}}, "7"),
        ({"metadata": {"automationRunID": True}}, "true"),
        ({"metadata": {"automationRunID": " ", "workflow_run_id": "w"}}, "w"),
        ({"metadata": {"automationRunID": None}, "routine_run_id": " x "}, "x"),
        ({"metadata": {"automationRunID": {}}, "context_run_id": "workflow-1"}, "1"),
        ({"metadata": {"automationRunID": []}, "context_run_id": "routine-2"}, "2"),
        ({"metadata": {"automationRunID": ""}, "context_run_id": " other-3 "}, "other-3"),
        ({"metadata": {"automationRunID": ""}, "context_run_id": "automation-v2-"}, None),
        ({"metadata": {"automationRunID": ""}, "context_run_id": None}, None),
    ],
)
def test_the_run_of_an_action(fields: dict[str, Any], expected: str | None) -> None:
    """4.5, 3: the first that says one."""
    assert run_of(action("a", **fields)) == expected


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"action_id": " "}, "action_id"),
        ({"operation": "x" * 201}, "operation"),
        ({"status": ""}, "status"),
        ({"created_at_ms": -1}, "created_at_ms"),
        ({"updated_at_ms": 2**53}, "updated_at_ms"),
        ({"updated_at_ms": 1.5}, "updated_at_ms"),
        ({"idempotency_key": "k" * 201}, "idempotency_key"),
        ({"receipt": float("nan")}, "receipt"),
        ({"receipt": "x" * 1_048_577}, "receipt"),
    ],
)
def test_an_action_that_cannot_be_recorded_is_refused(changes: dict[str, Any], field: str) -> None:
    """Before anything is sent."""
    fields = {"action_id": "a", "status": "posted"} | changes
    with pytest.raises(InvalidInput) as refused:
        check_action(action(fields.pop("action_id"), fields.pop("status"), **fields))
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("count", "pause"),
    [(0, 1_000), (1, 2_000), (5, 32_000), (8, 256_000), (9, 300_000), (99, 300_000)],
)
def test_the_pause_before_a_retry_doubles(count: int, pause: int) -> None:
    """4.9: up to five minutes."""
    assert backoff_ms(count) == pause
