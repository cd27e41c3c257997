"""The words and records that callers get back."""

from __future__ import annotations

import msgspec
import pytest

from leasekit.errors import InvalidInput, LeasekitError, OutcomeUnknown
from leasekit.model import (
    AttemptError,
    Draft,
    IdempotencyRecord,
    IdempotencyStatus,
    Outcome,
    Retention,
    Row,
    RowStatus,
    TenantContext,
)

ROW = Row(
    id="0" * 26,
    lane="l",
    target="t",
    payload=None,
    status=RowStatus.PENDING,
    cause="enqueued",
    attempt_count=0,
    claim_count=0,
    max_attempts=5,
    on_expiry="reclaim",
    created_at_ms=42,
    available_at_ms=42,
)


def test_unknown_words_are_refused() -> None:
    """Only the protocol's words and the two synonyms of spec/outbox 1.3."""
    for word in ("Pending", "delivered ", "", "dead"):
        with pytest.raises(ValueError, match="not a valid RowStatus"):
            RowStatus(word)


def test_the_last_error_is_the_latest() -> None:
    """None for a row without errors."""
    errors = tuple(
        AttemptError(at_ms=at, kind="requeued", attempt=1, fence=1, text=text)
        for at, text in ((1, "first"), (2, "second"))
    )
    assert ROW.last_error is None
    assert msgspec.structs.replace(ROW, errors=errors).last_error == "second"


def test_records_cannot_be_changed() -> None:
    """What was read is what was there."""
    with pytest.raises(AttributeError):
        ROW.status = RowStatus.SENT  # type: ignore[misc]


def test_retention_has_its_defaults() -> None:
    """24 h, 100 000 rows and 64 MiB; dead letters 30 days and 10 000; dedupe keys 7 days."""
    kept = Retention()
    assert (kept.finished_ms, kept.finished_count, kept.finished_bytes) == (
        86_400_000,
        100_000,
        67_108_864,
    )
    assert (kept.dead_ms, kept.dead_count, kept.dedupe_ms) == (2_592_000_000, 10_000, 604_800_000)


def test_an_idempotency_record_is_written_as_the_spec_says() -> None:
    """spec/reliability 2.1: field names as they are, what is absent left out."""
    record = IdempotencyRecord(
        schema_version=1,
        record_id="idem_x",
        tenant_context=TenantContext.explicit("o", "w"),
        operation="op",
        key="k",
        owner="o",
        request_fingerprint="f",
        status=IdempotencyStatus.RESERVED,
        first_seen_at_ms=1,
        last_seen_at_ms=2,
    )
    assert msgspec.to_builtins(record) == {
        "schema_version": 1,
        "record_id": "idem_x",
        "tenant_context": {"org_id": "o", "workspace_id": "w", "source": "explicit"},
        "operation": "op",
        "key": "k",
        "owner": "o",
        "request_fingerprint": "f",
        "status": "reserved",
        "first_seen_at_ms": 1,
        "last_seen_at_ms": 2,
    }


@pytest.mark.parametrize(
    ("context", "written"),
    [
        (
            TenantContext.local_implicit(),
            {"org_id": "local", "workspace_id": "local", "source": "local_implicit"},
        ),
        (
            TenantContext.explicit("o", "w"),
            {"org_id": "o", "workspace_id": "w", "source": "explicit"},
        ),
        (
            TenantContext.explicit("o", "w", "a"),
            {"org_id": "o", "workspace_id": "w", "actor_id": "a", "source": "explicit"},
        ),
        (
            TenantContext.explicit_user_workspace("o", "w", "d", "a"),
            {
                "org_id": "o",
                "workspace_id": "w",
                "deployment_id": "d",
                "actor_id": "a",
                "source": "explicit",
            },
        ),
    ],
)
def test_a_context_says_who_named_it(context: TenantContext, written: dict[str, str]) -> None:
    """spec/reliability 1.1: the source is always written."""
    assert msgspec.to_builtins(context) == written
    assert msgspec.convert(written, TenantContext) == context


def test_a_context_that_does_not_say_is_local_implicit() -> None:
    """spec/reliability 1.1: what is assumed on reading, whatever the tenant is."""
    for org in ("local", "o"):
        read = msgspec.json.decode(
            f'{{"org_id":"{org}","workspace_id":"local"}}', type=TenantContext
        )
        assert read.source == "local_implicit"
        assert read.is_local_implicit == (org == "local")


@pytest.mark.parametrize(
    "context",
    [
        TenantContext.explicit("local", "local"),
        TenantContext("local", "default"),
        TenantContext("org", "local"),
        TenantContext("local", "local", "d"),
        TenantContext("local", "local", None, "a"),
    ],
)
def test_only_who_names_nothing_is_local_implicit(context: TenantContext) -> None:
    """spec/reliability 1.1: source, org and workspace, and neither deployment nor actor."""
    assert not context.is_local_implicit


def test_drafts_and_outcomes_do_not_share_state() -> None:
    """Defaults are made anew for each."""
    assert Draft(lane="l", target="t", payload={}).payload is not Outcome(outcome_kind="k").details


def test_an_error_names_what_it_is_about() -> None:
    """Tenant and id, field and limit."""
    error = OutcomeUnknown("text", tenant="o.w", id="m1")
    assert (str(error), error.tenant, error.id) == ("text", "o.w", "m1")
    refused = InvalidInput("text", field="lane", limit=200)
    assert isinstance(refused, LeasekitError)
    assert isinstance(refused, ValueError)
    assert (refused.field, refused.limit, refused.tenant) == ("lane", 200, None)
