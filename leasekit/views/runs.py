"""Runs as lists and pages show them, and the windows of their logs and snapshots.

Source: spec/reliability 6.3, 6.4, 6.6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from leasekit import codec
from leasekit.errors import InvalidInput
from leasekit.ledger.filing import is_off
from leasekit.ledger.records import Run, RunEvent, RunSnapshot, Wait
from leasekit.views.authority import (
    Catalogue,
    authorising_grants,
    eligible_bindings,
    enterprise_scope,
)
from leasekit.views.pages import picked

__all__ = [
    "RunFilters",
    "events_page",
    "filters_shown",
    "run_fields",
    "run_view",
    "shows",
    "snapshots_page",
]

EVENT_SOURCE = "stateful_runtime"
AUTHORITY = "authoritative_runtime_log"
# What kinds are also called, beside their own words.
_KINDS = {"automation": "automation_v2", "context": "context_run"}


class RunFilters(msgspec.Struct, frozen=True, kw_only=True):
    """What a list of runs is to show; all are compared normalised, blank and `all` are off."""

    status: str | None = None
    phase: str | None = None
    trigger: str | None = None
    kind: str | None = None
    org_id: str | None = None
    workspace_id: str | None = None
    deployment_id: str | None = None
    workflow_id: str | None = None
    automation_id: str | None = None
    org_unit_id: str | None = None
    owner_id: str | None = None
    owner_kind: str | None = None
    resource_kind: str | None = None
    resource_id: str | None = None
    policy_version_id: str | None = None
    data_class: str | None = None
    risk_tier: str | None = None
    delegation_grant_id: str | None = None
    source_binding_id: str | None = None

    def check(self) -> None:
        """InvalidInput, naming the field, for what is no text."""
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if value is not None and not isinstance(value, str):
                raise InvalidInput(f"{field} must be text, not {type(value).__name__}", field=field)


def filters_shown(filters: RunFilters) -> dict[str, Any]:
    """The filters as they were given, absent ones as null."""
    return {name: getattr(filters, name) for name in filters.__struct_fields__}


def _equal(wanted: str | None, found: str | None) -> bool:
    if is_off(wanted):
        return True
    return found is not None and codec.normalised(found) == codec.normalised(wanted or "")


def shows(run: Run, filters: RunFilters, catalogue: Catalogue, now_ms: int) -> bool:
    """Whether a run passes all filters; one that lacks a field fails the filter for it."""
    scope, tenant = run.scope, run.scope.tenant_context
    owner = scope.owner_principal
    root = None if scope.resource_scope is None else scope.resource_scope.root
    pairs = (
        (filters.status, run.status),
        (filters.phase, run.phase),
        (filters.org_id, tenant.org_id),
        (filters.workspace_id, tenant.workspace_id),
        (filters.deployment_id, tenant.deployment_id),
        (filters.workflow_id, run.workflow_id),
        (filters.automation_id, run.automation_id),
        (filters.owner_id, None if owner is None else owner.id),
        (filters.owner_kind, None if owner is None else owner.kind),
        (filters.resource_kind, None if root is None else root.resource_kind),
        (filters.resource_id, None if root is None else root.resource_id),
        (filters.policy_version_id, scope.policy_version_id),
        (filters.risk_tier, scope.risk_tier),
    )
    if not all(_equal(wanted, found) for wanted, found in pairs):
        return False
    return (
        _is_of_kind(run, filters.kind)
        and _was_triggered(run, filters.trigger)
        and _is_of_unit(run, filters.org_unit_id)
        and _has_data(run, filters, catalogue)
        and _has_grant(run, filters.delegation_grant_id, catalogue, now_ms)
    )


def _is_of_kind(run: Run, wanted: str | None) -> bool:
    also = _KINDS.get(codec.normalised(wanted or ""))
    return _equal(wanted, run.kind) or (also is not None and _equal(also, run.kind))


def _was_triggered(run: Run, wanted: str | None) -> bool:
    if is_off(wanted):
        return True
    part = codec.normalised(wanted or "")
    found = (run.trigger_type, run.trigger_event, run.source_event_id)
    return any(part in codec.normalised(text) for text in found if text is not None)


def _is_of_unit(run: Run, wanted: str | None) -> bool:
    if is_off(wanted):
        return True
    unit = run.scope.owning_org_unit_id
    return unit is not None and (_equal(wanted, unit) or _equal(wanted, unit.rpartition("/")[2]))


def _has_data(run: Run, filters: RunFilters, catalogue: Catalogue) -> bool:
    wanted_class, wanted_binding = filters.data_class, filters.source_binding_id
    if is_off(wanted_class) and is_off(wanted_binding):
        return True
    bindings = eligible_bindings(run.scope, catalogue)
    classes = [*run.scope.data_classes, *[binding.data_class for binding in bindings]]
    return (is_off(wanted_class) or any(_equal(wanted_class, one) for one in classes)) and (
        is_off(wanted_binding) or any(_equal(wanted_binding, one.binding_id) for one in bindings)
    )


def _has_grant(run: Run, wanted: str | None, catalogue: Catalogue, now_ms: int) -> bool:
    if is_off(wanted):
        return True
    declared = any(_equal(wanted, one) for one in run.scope.delegation_grant_ids)
    return declared and any(
        _equal(wanted, grant.grant_id) for grant in authorising_grants(run.scope, catalogue, now_ms)
    )


def run_fields(run: Run, snapshots: Sequence[RunSnapshot]) -> dict[str, Any]:
    """A run as JSON, with its newest snapshot; what only its executor needs is left out."""
    if run.latest_snapshot_id is None and snapshots:
        run = msgspec.structs.replace(run, latest_snapshot_id=snapshots[-1].snapshot_id)
    fields: dict[str, Any] = msgspec.to_builtins(run)
    for name in ("execution_claim", "execution_claim_epoch", "checkpoint"):
        fields.pop(name, None)
    return fields


def run_view(
    run: Run,
    *,
    wait: Wait | None,
    events: Sequence[RunEvent],
    earliest: RunEvent | None,
    snapshots: Sequence[RunSnapshot],
    catalogue: Catalogue,
    now_ms: int,
    is_detail: bool,
) -> dict[str, Any]:
    """A run as a list shows it, or with its events and snapshots (spec 6.4).

    wait: its current one. events, snapshots: the last ones, in ascending order.
    """
    latest = events[-1] if events else None
    newest = snapshots[-1] if snapshots else None
    view: dict[str, Any] = {
        "run": run_fields(run, snapshots),
        "current_wait": None
        if wait is None
        else picked(
            wait,
            *("wait_id", "wait_kind", "status", "phase_id", "reason", "wake_at_ms"),
            *("timeout_policy", "event_seq"),
        ),
        "latest_event": None
        if latest is None
        else picked(
            latest,
            *("event_id", "seq", "event_type", "occurred_at_ms", "phase_id", "wait_kind"),
        )
        | {"authoritative": True},
        "latest_snapshot": None
        if newest is None
        else picked(
            newest,
            *("snapshot_id", "seq", "created_at_ms", "status", "phase", "phase_id"),
            *("payload_digest", "workflow_definition_version"),
            "workflow_definition_snapshot_hash",
        ),
        "enterprise_scope": enterprise_scope(run.scope, catalogue, now_ms),
        "replay_boundaries": {
            "earliest_event_seq": None if earliest is None else earliest.seq,
            "latest_event_seq": None if latest is None else latest.seq,
            "latest_snapshot_id": None if newest is None else newest.snapshot_id,
            "latest_snapshot_seq": None if newest is None else newest.seq,
            "can_replay_from_event_log": latest is not None,
            "can_replay_from_snapshot": newest is not None,
        },
        "event_source": EVENT_SOURCE,
        "event_authority": AUTHORITY,
        "detail_level": "detail" if is_detail else "list",
    }
    if is_detail:
        view["events"] = msgspec.to_builtins(list(events))
        view["snapshots"] = msgspec.to_builtins(list(snapshots))
    return view


def events_page(run_id: str, events: Sequence[RunEvent], size: int) -> dict[str, Any]:
    """A window of a run's log (spec 6.6)."""
    return {
        "run_id": run_id,
        "events": msgspec.to_builtins(list(events)),
        "count": len(events),
        "last_seq": events[-1].seq if events else None,
        "limit": size,
        "sequence_scope": EVENT_SOURCE,
        "event_source": EVENT_SOURCE,
        "event_authority": AUTHORITY,
    }


def snapshots_page(run_id: str, snapshots: Sequence[RunSnapshot], size: int) -> dict[str, Any]:
    """The newest snapshots of a run (spec 6.6)."""
    return {
        "run_id": run_id,
        "snapshots": msgspec.to_builtins(list(snapshots)),
        "count": len(snapshots),
        "latest_seq": snapshots[-1].seq if snapshots else None,
        "limit": size,
    }
