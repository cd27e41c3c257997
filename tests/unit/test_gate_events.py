"""What the gate is told: events, what completes an intent, and what is refused before it is sent."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from leasekit import codec
from leasekit.errors import InvalidInput
from leasekit.gate import events
from leasekit.gate.events import (
    LedgerEvent,
    PreSendEvent,
    Source,
    check_event,
    is_completion,
    is_gate_denial,
)
from leasekit.model import TenantContext

CANARY = "correct-horse-battery-staple"
DENIAL = "ToolDenied { reason: OutboxGate }: pre-send outbox `outbox-1` is already `claimed`"

SOURCE = Source(kind="automation_v2", run_id="run-1", node_id="node-1")


def before(**changed: Any) -> PreSendEvent:
    """The fixture of spec/reliability 3.10, about to be sent."""
    fields: dict[str, Any] = {
        "dispatch_id": "tool-dispatch-test",
        "tool": "mcp.github.create_issue",
        "args": {"owner_repo": "frumu-ai/tandem", "title": "hello"},
        "tenant_context": TenantContext("org-a", "workspace-a", actor_id="user-a"),
        "source": SOURCE,
        "policy_decision_id": "policy-1",
        "payload_digest": "sha256:payload",
        "external_side_effect": True,
        "risk_tier": "external_send",
    }
    return PreSendEvent(**(fields | changed))


def after(**changed: Any) -> LedgerEvent:
    """The same call, having succeeded."""
    fields: dict[str, Any] = {
        "dispatch_id": "tool-dispatch-test",
        "tool": "mcp.github.create_issue",
        "source": SOURCE,
        "policy_outcome": "allowed",
        "status": "succeeded",
    }
    return LedgerEvent(**(fields | changed))


# --- what completes an intent ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "is_denial"),
    [
        ("blocked", DENIAL, True),
        ("blocked", f"call refused: {DENIAL}", True),
        ("blocked", "ToolDenied { reason: OutboxGate }", True),
        ("blocked", "ToolDenied { reason: PolicyDenied }", False),
        ("blocked", "ToolDenied {reason: OutboxGate}", False),
        ("blocked", "tooldenied { reason: outboxgate }", False),
        ("blocked", "ToolDenied { reason: OutboxGate", False),
        ("blocked", None, False),
        ("failed", DENIAL, False),
        ("succeeded", DENIAL, False),
    ],
)
def test_a_gate_denial_is_told_by_its_literal(
    status: str, error: str | None, is_denial: bool
) -> None:
    """Blocked, and the error holds the words of spec/reliability 3.6, as they are."""
    event = after(status=status, error=error)
    assert is_gate_denial(event) is is_denial
    assert is_completion(event) is not is_denial


@pytest.mark.parametrize(
    ("phase", "completes"),
    [
        (None, True),
        ("policy_decision", False),
        ("execution_started", False),
        ("execution_completed", True),
        ("execution_failed", True),
    ],
)
@pytest.mark.parametrize("status", events.STATUSES)
def test_terminal_phases_complete(phase: str | None, completes: bool, status: str) -> None:
    """Without a phase every event completes, as at the seed; with one only the terminal ones."""
    assert is_completion(after(receipt_phase=phase, status=status)) is completes


def test_a_completion_names_its_call() -> None:
    """Without a dispatch id there is no intent to complete."""
    assert not is_completion(after(dispatch_id=None))


# --- checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        before(),
        after(),
        PreSendEvent(dispatch_id="d", tool="read", source=Source(kind="k")),
        LedgerEvent(
            tool="read", source=Source(kind="k"), policy_outcome="denied", status="blocked"
        ),
        before(dispatch_id="d" * 200, tool="é" * 100, risk_tier="of_our_own", args={}),
        before(scope_allowlist=["mcp.*"] * 1_000, external_side_effect=False),
        before(args={"a": "x" * (codec.PAYLOAD_BYTES_MAX - len('{"a":""}'))}),
        before(tenant_context=TenantContext("o" * 64, "w" * 64, "d" * 64, "a" * 200)),
        before(source=Source(kind="k", session_id="s", message_id="m", request_id="r")),
        after(error="", receipt_phase="policy_decision", approval_requirement={"policy_id": "p"}),
        after(error="x" * 100_000),
        *(before(policy_outcome=word) for word in ("allowed", "denied", "approval_required")),
    ],
    ids=repr,
)
def test_what_is_right_passes(event: PreSendEvent | LedgerEvent) -> None:
    """Up to every limit; a tier of one's own is a text like any other (spec/reliability 3.5)."""
    check_event(event)


TEXTS = [
    ("", "{field} is required"),
    (" \t", "{field} is required"),
    ("a" * 201, "{field} is 201 bytes long; at most 200"),
    ("é" * 101, "{field} is 202 bytes long; at most 200"),
    (7, "{field} must be text, not int"),
    (b"a", "{field} must be text, not bytes"),
    ("\ud800", "{field} holds a lone surrogate"),
]
SHARED = ("tool", "canonical_tool", "policy_decision_id", "payload_digest")


@pytest.mark.parametrize(("value", "says"), TEXTS)
@pytest.mark.parametrize(
    ("make", "field"),
    [(before, field) for field in ("dispatch_id", *SHARED, "risk_tier")]
    + [(after, field) for field in ("dispatch_id", *SHARED)],
)
def test_a_wrong_text_is_refused(make: Any, field: str, value: object, says: str) -> None:
    """Every name and id of both events, in the words of codec.check_text."""
    with pytest.raises(InvalidInput, match=says.format(field=field)) as raised:
        check_event(make(**{field: value}))
    assert raised.value.field == field


@pytest.mark.parametrize(("value", "says"), TEXTS)
@pytest.mark.parametrize("make", [before, after])
@pytest.mark.parametrize(
    "field", ["kind", "session_id", "message_id", "run_id", "node_id", "request_id"]
)
def test_a_wrong_source_is_refused(make: Any, field: str, value: object, says: str) -> None:
    """Each of its ids is checked, and named with the source that it belongs to."""
    source = msgspec.structs.replace(SOURCE, **{field: value})
    with pytest.raises(InvalidInput, match=says.format(field=f"source.{field}")) as raised:
        check_event(make(source=source))
    assert raised.value.field == f"source.{field}"


@pytest.mark.parametrize("field", ["dispatch_id", "tool"])
def test_what_is_required_is_no_none(field: str) -> None:
    """A call has a name and a tool."""
    with pytest.raises(InvalidInput, match=f"{field} must be text, not NoneType"):
        check_event(before(**{field: None}))


@pytest.mark.parametrize(
    ("event", "field", "says"),
    [
        (before(policy_outcome="Allowed"), "policy_outcome", "must be one of allowed, denied"),
        (after(policy_outcome=None), "policy_outcome", "must be text, not NoneType"),
        (after(status="sent"), "status", "must be one of succeeded, failed, blocked"),
        (after(status=None), "status", "must be text, not NoneType"),
        (after(receipt_phase="done"), "receipt_phase", "must be one of policy_decision"),
        (after(receipt_phase=""), "receipt_phase", "must be one of policy_decision"),
        (after(error=ValueError("v")), "error", "must be text, not ValueError"),
        (after(approval_requirement=[]), "approval_requirement", "must be a JSON object, not list"),
        (
            after(approval_requirement={"a": "x" * codec.DOCUMENT_BYTES_MAX}),
            "approval_requirement",
            "at most 65536",
        ),
        (before(args=["a"]), "args", "must be a JSON object, not list"),
        (before(args='{"a":1}'), "args", "must be a JSON object, not str"),
        (before(args={"a": float("nan")}), "args", "NaN or an infinity"),
        (before(args={1: 2}), "args", "is not a JSON value"),
        (before(args={"a": "x" * codec.PAYLOAD_BYTES_MAX}), "args", "at most 1048576"),
        (before(external_side_effect="no"), "external_side_effect", "must be True or False"),
        (before(external_side_effect=None), "external_side_effect", "must be True or False"),
        (before(scope_allowlist="mcp.*"), "scope_allowlist", "must be a list of text, not str"),
        (after(scope_allowlist=None), "scope_allowlist", "must be a list of text, not NoneType"),
        (before(scope_allowlist=["a", " "]), "scope_allowlist[1]", "is required"),
        (before(scope_allowlist=["a" * 201]), "scope_allowlist[0]", "at most 200"),
        (
            before(scope_allowlist=["a"] * 1_001),
            "scope_allowlist",
            "names 1001 tools; at most 1000",
        ),
        (before(source={"kind": "k"}), "source", "must be a Source, not dict"),
        (before(tenant_context={"org_id": "o"}), "tenant_context", "must be a TenantContext"),
        (after(tenant_context=TenantContext("o", " ")), "workspace", "is required"),
        (before(tenant_context=TenantContext("o" * 65, "w")), "org", "at most 64"),
        (before(tenant_context=TenantContext("o", "w", "")), "deployment", "is required"),
        (
            before(tenant_context=TenantContext("o", "w", None, "")),
            "tenant_context.actor_id",
            "is required",
        ),
        ({"dispatch_id": "d"}, "event", "must be a PreSendEvent or a LedgerEvent, not dict"),
    ],
)
def test_any_other_wrong_value_is_refused(event: Any, field: str, says: str) -> None:
    """Unknown words, wrong kinds, what is too large: named by the field, with the limit."""
    with pytest.raises(InvalidInput, match=says) as raised:
        check_event(event)
    assert raised.value.field == field
    assert field in str(raised.value)


@pytest.mark.parametrize(
    ("event", "limit"),
    [
        (before(dispatch_id="a" * 201), 200),
        (before(scope_allowlist=["a"] * 1_001), 1_000),
        (before(args={"a": "x" * codec.PAYLOAD_BYTES_MAX}), codec.PAYLOAD_BYTES_MAX),
        (before(tenant_context=TenantContext("o" * 65, "w")), 64),
    ],
)
def test_an_error_carries_its_limit(event: PreSendEvent, limit: int) -> None:
    """The bound that was passed, as a number."""
    with pytest.raises(InvalidInput) as raised:
        check_event(event)
    assert raised.value.limit == limit


def test_the_size_limit_of_arguments_is_exact() -> None:
    """1 MiB of canonical JSON passes (above), one byte more is refused."""
    with pytest.raises(InvalidInput, match="args is 1048577 bytes of JSON; at most 1048576"):
        check_event(before(args={"a": "x" * (codec.PAYLOAD_BYTES_MAX - len('{"a":""}') + 1)}))


# --- what is shown and written --------------------------------------------------------------------


def test_no_event_shows_its_payload() -> None:
    """Neither arguments nor error texts are in a repr, nor in what a check says of them."""
    secret = {"body": CANARY}
    shown = [
        before(args=secret),
        before(args=secret, source=SOURCE),
        after(error=CANARY, approval_requirement=secret),
        after(error=CANARY, receipt_phase="execution_failed", status="failed"),
    ]
    assert CANARY not in f"{shown!r} {shown[0]} {shown[2]}"
    assert repr(shown[3]) == (
        "<LedgerEvent tool-dispatch-test mcp.github.create_issue execution_failed failed>"
    )
    for event in (
        before(args={CANARY: float("nan")}),
        before(args=[CANARY]),
        before(policy_outcome=CANARY),
        after(status=CANARY),
        after(error=[CANARY]),
    ):
        with pytest.raises(InvalidInput) as raised:
            check_event(event)
        assert CANARY not in f"{raised.value!r} {raised.value.limit}"


def test_absent_fields_are_not_written() -> None:
    """As JSON an event has what it was given, in the names of spec/reliability 3.1."""
    least = PreSendEvent(dispatch_id="d", tool="read", source=Source(kind="k"))
    assert msgspec.to_builtins(least) == {
        "dispatch_id": "d",
        "tool": "read",
        "source": {"kind": "k"},
    }
    for event in (before(), after(receipt_phase="execution_failed")):
        assert msgspec.json.decode(msgspec.json.encode(event), type=type(event)) == event


def test_events_do_not_change() -> None:
    """Nor do two of them share an allow-list that was not given."""
    with pytest.raises(AttributeError):
        before().tool = "other"  # type: ignore[misc]
    assert before().scope_allowlist is not before().scope_allowlist
