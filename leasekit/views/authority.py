"""Under whose authority a run acts: org unit, delegation grants, sources of knowledge.

Pure functions over a run's scope and a catalogue of units, grants and bindings.

Source: spec/reliability 1.5, 6.5.
"""

from __future__ import annotations

from typing import Any

import msgspec

from leasekit import codec
from leasekit.errors import InvalidInput
from leasekit.gate.identity import same_tenant
from leasekit.ledger.records import (
    OrganizationUnit,
    OrganizationUnitAccessGrant,
    ResourceRef,
    ResourceScope,
    SourceBinding,
    StatefulRuntimeScope,
)
from leasekit.views.pages import picked

__all__ = [
    "Catalogue",
    "authorising_grants",
    "check_authority",
    "eligible_bindings",
    "enterprise_scope",
]

SOURCES_SHOWN = 12


class Catalogue(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a tenant's units, grants and sources; given by whoever keeps them."""

    units: tuple[OrganizationUnit, ...] = ()
    grants: tuple[OrganizationUnitAccessGrant, ...] = ()
    bindings: tuple[SourceBinding, ...] = ()


def canonical_id(text: str | None) -> str | None:
    """An id as scopes compare it: trimmed, in lower case; None for a blank one."""
    return (text or "").strip().lower() or None


def ids_match(left: str | None, right: str | None) -> bool:
    return canonical_id(left) == canonical_id(right)


def applies_to(one: ResourceRef, other: ResourceRef) -> bool:
    """Whether what is said of `one` holds for `other` (spec 1.5)."""
    if not ids_match(one.organization_id, other.organization_id):
        return False
    if one.workspace_id.strip() != "*" and not ids_match(one.workspace_id, other.workspace_id):
        return False
    kind = one.resource_kind
    if kind == "organization":
        return ids_match(one.resource_id, other.organization_id)
    if kind in ("workspace", "department"):
        return (
            ids_match(one.resource_id, other.workspace_id)
            or one.resource_id.strip() == "*"
            or ids_match(one.resource_id, other.resource_id)
        )
    if kind == "project":
        by_project = other.project_id is not None and ids_match(one.resource_id, other.project_id)
        return by_project or ids_match(one.resource_id, other.resource_id)
    if one.project_id is not None and not ids_match(one.project_id, other.project_id):
        return False
    begins = (
        one.path_prefix is not None
        and other.path_prefix is not None
        and other.path_prefix.startswith(one.path_prefix)
    )
    if kind == other.resource_kind and ids_match(one.resource_id, other.resource_id):
        return one.path_prefix is None or begins
    return begins


def contains(scope: ResourceScope, resource: ResourceRef) -> bool:
    """Whether a resource lies within a scope."""
    if any(applies_to(denied, resource) for denied in scope.denied_resources):
        return False
    return applies_to(scope.root, resource) or any(
        applies_to(allowed, resource) for allowed in scope.allowed_resources
    )


def _is_within(scope: StatefulRuntimeScope, resource: ResourceRef) -> bool:
    limits = scope.resource_scope
    if limits is None:
        return True
    return contains(limits, resource) or applies_to(resource, limits.root)


def names_unit(reference: str, unit_id: str) -> bool:
    """Whether a principal's id names a unit: itself, or the last part of a path."""
    wanted, found = canonical_id(unit_id), canonical_id(reference)
    if wanted is None or found is None:
        return False
    return found == wanted or found.endswith(f"/{wanted}")


def authorising_grants(
    scope: StatefulRuntimeScope, catalogue: Catalogue, now_ms: int
) -> list[OrganizationUnitAccessGrant]:
    """The grants that a run's authority rests on, by id (spec 6.5)."""
    unit, wanted = scope.owning_org_unit_id, scope.delegation_grant_ids
    if unit is None and not wanted:
        return []
    names = {codec.normalised(one) for one in wanted}
    found = [
        grant
        for grant in catalogue.grants
        if same_tenant(grant.tenant_context, scope.tenant_context)
        and grant.effect == "allow"
        and (unit is None or names_unit(grant.unit.id, unit))
        and grant.is_active(now_ms)
        and (not names or codec.normalised(grant.grant_id) in names)
        and _is_within(scope, grant.resource)
    ]
    return sorted(found, key=lambda grant: grant.grant_id)


def check_authority(scope: StatefulRuntimeScope, catalogue: Catalogue, now_ms: int) -> None:
    """Whether a run may be made with this scope (spec 6.5): InvalidInput, naming the grant, where one
    that it declares does not allow it, or another one denies it.

    A grant allows it that is active, of the same tenant and org unit, for the scope's root and every
    allowed resource, for all its data classes, and with the permission `execute`. One that denies
    needs less: it touches one of the resources, and one of the data classes where it names any.
    """
    if not scope.delegation_grant_ids:
        return
    limits = scope.resource_scope
    resources = [] if limits is None else [limits.root, *limits.allowed_resources]
    classes = frozenset(scope.data_classes)
    near = [
        grant
        for grant in catalogue.grants
        if same_tenant(grant.tenant_context, scope.tenant_context)
        and grant.is_active(now_ms)
        and (
            scope.owning_org_unit_id is None or names_unit(grant.unit.id, scope.owning_org_unit_id)
        )
        and "execute" in grant.permissions
    ]
    for grant in near:
        touches = not resources or any(applies_to(grant.resource, one) for one in resources)
        is_about = not grant.data_classes or not classes or classes & frozenset(grant.data_classes)
        if grant.effect == "deny" and touches and is_about:
            raise _refused(f"grant {grant.grant_id} denies it")
    allowing = {
        codec.normalised(grant.grant_id)
        for grant in near
        if grant.effect == "allow"
        and all(applies_to(grant.resource, one) for one in resources)
        and classes <= frozenset(grant.data_classes)
    }
    for wanted in scope.delegation_grant_ids:
        if codec.normalised(wanted) not in allowing:
            raise _refused(
                f"grant {wanted} does not allow it: it is not there, not active, or not for this org "
                "unit, these resources and data classes, with the permission `execute`"
            )


def _refused(why: str) -> InvalidInput:
    return InvalidInput(
        f"a run may not be made with this scope: {why}; nothing was written",
        field="scope.delegation_grant_ids",
    )


def eligible_bindings(scope: StatefulRuntimeScope, catalogue: Catalogue) -> list[SourceBinding]:
    """The sources of knowledge that a run may read, by id (spec 6.5)."""
    found = [
        binding
        for binding in catalogue.bindings
        if same_tenant(binding.tenant_context, scope.tenant_context)
        and binding.state == "enabled"
        and binding.ingestion_policy.allow_prompt_context
        and _is_within(scope, binding.resource_ref)
    ]
    return sorted(found, key=lambda binding: binding.binding_id)


def enterprise_scope(
    scope: StatefulRuntimeScope, catalogue: Catalogue, now_ms: int
) -> dict[str, Any]:
    """The summary of a run's authority (spec 6.5)."""
    unit = next(
        (
            one
            for one in catalogue.units
            if same_tenant(one.tenant_context, scope.tenant_context)
            and scope.owning_org_unit_id is not None
            and (
                ids_match(one.unit_id, scope.owning_org_unit_id)
                or ids_match(f"{one.taxonomy_id}/{one.unit_id}", scope.owning_org_unit_id)
            )
        ),
        None,
    )
    grants = authorising_grants(scope, catalogue, now_ms)
    bindings = eligible_bindings(scope, catalogue)[:SOURCES_SHOWN]
    granted = {codec.normalised(grant.grant_id) for grant in grants}
    ids = scope.delegation_grant_ids
    missing = [one for one in ids if codec.normalised(one) not in granted]
    status = "not_required" if not ids else "invalid" if missing else "active"
    root = None if scope.resource_scope is None else scope.resource_scope.root
    fields: dict[str, Any] = msgspec.to_builtins(scope)
    return {
        "tenant_context": fields["tenant_context"],
        "owning_org_unit_id": scope.owning_org_unit_id,
        "owning_org_unit": None
        if unit is None
        else picked(
            unit,
            *("unit_id", "taxonomy_id", "display_name", "kind", "parent_unit_id", "state"),
            "labels",
        ),
        "owner_principal": fields.get("owner_principal"),
        "resource_scope": fields.get("resource_scope"),
        "resource_kind": None if root is None else root.resource_kind,
        "resource_id": None if root is None else root.resource_id,
        "data_classes": scope.data_classes,
        "risk_tier": scope.risk_tier,
        "policy_version_id": scope.policy_version_id,
        "delegation_grant_ids": ids,
        "delegation_grant_authority": {"status": status, "missing_grant_ids": missing},
        "org_unit_grants": [
            picked(
                grant,
                *("grant_id", "unit", "resource", "effect", "permissions", "data_classes"),
                *("tool_patterns", "state", "expires_at_ms"),
            )
            for grant in grants
        ],
        "visible_knowledge_sources": [
            picked(
                binding,
                *("binding_id", "connector_id", "source_type", "native_source_id"),
                *("source_root_label", "resource_ref", "data_class", "state", "ingestion_policy"),
            )
            for binding in bindings
        ],
        "summary": {
            "org_unit": unit.display_name if unit is not None else scope.owning_org_unit_id,
            "resource": None if root is None else f"{root.resource_kind}:{root.resource_id}",
            "knowledge_source_count": len(bindings),
            "org_unit_grant_count": len(grants),
            "data_class_count": len(scope.data_classes),
            "delegation_grant_count": len(ids),
        },
    }
