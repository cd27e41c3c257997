"""Under whose authority a run acts (spec/reliability 1.5, 6.5): pure functions over a catalogue."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import view_records as records

from leasekit import InvalidInput
from leasekit.ledger import IngestionPolicy, PrincipalRef, ResourceRef, ResourceScope
from leasekit.model import TenantContext
from leasekit.views.authority import (
    Catalogue,
    applies_to,
    authorising_grants,
    check_authority,
    contains,
    eligible_bindings,
    enterprise_scope,
    ids_match,
    names_unit,
)

NOW = 1_000
A = TenantContext("org-a", "work-a", None, "operator-a", "explicit")
DEPLOYED = TenantContext("org-a", "work-a", "eu", None, "explicit")


def ref(kind: str = "repository", id: str = "r", **fields: Any) -> ResourceRef:
    return records.resource(A, id, resource_kind=kind, **fields)


@pytest.mark.parametrize(
    ("left", "right", "match"),
    [
        ("A ", " a", True),
        ("É", "é", True),
        ("", "  ", True),
        (None, " ", True),
        ("a", None, False),
        ("a-b", "a_b", False),
    ],
)
def test_ids_are_compared_canonically(left: str | None, right: str | None, match: bool) -> None:
    assert ids_match(left, right) is match


@pytest.mark.parametrize(
    ("one", "other", "applies"),
    [
        # Organisation and workspace come first.
        (ref(organization_id="ORG-A "), ref(), True),
        (ref(organization_id="org-b"), ref(), False),
        (ref(workspace_id="*"), ref(workspace_id="elsewhere"), True),
        (ref(workspace_id="work-b"), ref(), False),
        # The wide kinds.
        (ref("organization", "org-a"), ref(), True),
        (ref("organization", "org-b"), ref(), False),
        (ref("workspace", "work-a"), ref(), True),
        (ref("workspace", "*"), ref(), True),
        (ref("department", "R"), ref(id="r"), True),
        (ref("workspace", "other"), ref(), False),
        (ref("project", "p"), ref(project_id="P"), True),
        (ref("project", "r"), ref(id="R"), True),
        (ref("project", "p"), ref(), False),
        (ref("project", ""), ref(), False),  # no project is not the project of a blank name
        # All others: kind and id, a project where one is named, a prefix where one is named.
        (ref(), ref(), True),
        (ref(), ref("document"), False),
        (ref(), ref(id="s"), False),
        (ref(project_id="p"), ref(project_id="p"), True),
        (ref(project_id="p"), ref(project_id="q"), False),
        (ref(project_id="p"), ref(), False),
        (ref(), ref(project_id="p"), True),
        (ref(path_prefix="/a/"), ref(path_prefix="/a/b"), True),
        (ref(path_prefix="/a/"), ref(path_prefix="/b"), False),
        (ref(path_prefix="/a/"), ref(), False),
        (ref(), ref(path_prefix="/a"), True),
        (ref("directory", "d", path_prefix="/a/"), ref("file", "f", path_prefix="/a/f"), True),
        (ref("directory", "d"), ref("file", "f", path_prefix="/a/f"), False),
    ],
)
def test_what_a_resource_applies_to(one: ResourceRef, other: ResourceRef, applies: bool) -> None:
    assert applies_to(one, other) is applies


def test_what_is_denied_is_not_contained() -> None:
    scope = ResourceScope(
        root=ref(id="root"),
        allowed_resources=[ref(id="also"), ref(id="both")],
        denied_resources=[ref(id="both")],
    )
    found = {id: contains(scope, ref(id=id)) for id in ("root", "also", "both", "other")}
    assert found == {"root": True, "also": True, "both": False, "other": False}


@pytest.mark.parametrize(
    ("reference", "unit", "names"),
    [
        ("Finance ", "finance", True),
        ("organization_unit/finance", "FINANCE", True),
        ("organization_unit/xfinance", "finance", False),
        ("finance", "organization_unit/finance", False),
        ("organization_unit/finance", "organization_unit/finance", True),
        ("organization_unit/none", " ", False),
        ("organization_unit/", "", False),
        ("", "", False),
    ],
)
def test_what_names_a_unit(reference: str, unit: str, names: bool) -> None:
    assert names_unit(reference, unit) is names


# --- grants ---------------------------------------------------------------------------------------


def granted(scope: Any = None, **fields: Any) -> bool:
    """Whether a grant for finance's repository authorises, where this much of it is otherwise."""
    grant = records.grant(A, "grant-finance", "finance", "repo-finance")
    grant = msgspec.structs.replace(grant, **fields)
    wanted = records.scope(A) if scope is None else scope
    return [grant] == authorising_grants(wanted, Catalogue(grants=(grant,)), NOW)


@pytest.mark.parametrize(
    ("fields", "authorises"),
    [
        ({}, True),
        ({"tenant_context": TenantContext("org-a", "work-a", None, "bob")}, True),
        ({"tenant_context": DEPLOYED}, False),
        ({"tenant_context": TenantContext("ORG-A", "work-a")}, False),
        ({"effect": "deny"}, False),
        ({"state": "disabled"}, False),
        ({"expires_at_ms": NOW + 1}, True),
        ({"expires_at_ms": NOW}, False),
        ({"unit": PrincipalRef(kind="organization_unit", id="FINANCE")}, True),
        ({"unit": PrincipalRef(kind="organization_unit", id="platform")}, False),
        ({"grant_id": " GRANT_FINANCE"}, True),
        ({"grant_id": "grant-other"}, False),
        ({"resource": ref(id="repo-other")}, False),
        ({"resource": ref("workspace", "work-a")}, True),
        # Neither permissions nor data classes are asked for here.
        ({"permissions": [], "data_classes": []}, True),
    ],
)
def test_what_makes_a_grant_authorise(fields: dict[str, Any], authorises: bool) -> None:
    assert granted(**fields) is authorises


def test_a_scope_that_names_neither_unit_nor_grant_has_no_grants() -> None:
    assert not granted(records.scope(A, None, grants=[]))
    assert granted(records.scope(A, None))
    assert granted(records.scope(A, grants=[]))
    assert granted(records.scope(A, repository=None), resource=ref(id="anything"))


def test_grants_stand_by_id_and_missing_ones_are_named() -> None:
    grants = [records.grant(A, id, "finance", "repo-finance") for id in ("g-2", "g-1", "g-3")]
    scope = records.scope(A, grants=["G_1", "g-2", "g-9"])
    shown = enterprise_scope(scope, Catalogue(grants=tuple(grants)), NOW)
    assert [grant["grant_id"] for grant in shown["org_unit_grants"]] == ["g-1", "g-2"]
    assert shown["delegation_grant_authority"] == {
        "status": "invalid",
        "missing_grant_ids": ["g-9"],
    }
    nothing = enterprise_scope(records.scope(A, grants=[]), Catalogue(), NOW)
    assert nothing["delegation_grant_authority"] == {
        "status": "not_required",
        "missing_grant_ids": [],
    }


# --- sources --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "is_eligible"),
    [
        ({}, True),
        ({"tenant_context": DEPLOYED}, False),
        ({"state": "disabled"}, False),
        ({"state": "quarantined"}, False),
        ({"ingestion_policy": IngestionPolicy(allow_prompt_context=False)}, False),
        ({"ingestion_policy": IngestionPolicy(allow_indexing=False)}, True),
        ({"resource_ref": ref(id="repo-other")}, False),
        ({"resource_ref": ref("organization", "org-a")}, True),
    ],
)
def test_what_makes_a_source_eligible(fields: dict[str, Any], is_eligible: bool) -> None:
    binding = msgspec.structs.replace(records.binding(A, "b", "repo-finance"), **fields)
    found = eligible_bindings(records.scope(A), Catalogue(bindings=(binding,)))
    assert (found == [binding]) is is_eligible


def test_twelve_sources_are_shown() -> None:
    bindings = [records.binding(A, f"b{number:02d}", "repo-finance") for number in range(15, 0, -1)]
    catalogue = Catalogue(bindings=tuple(bindings))
    shown = enterprise_scope(records.scope(A), catalogue, NOW)
    ids = [source["binding_id"] for source in shown["visible_knowledge_sources"]]
    assert ids == [f"b{number:02d}" for number in range(1, 13)]
    assert shown["summary"]["knowledge_source_count"] == 12
    assert len(eligible_bindings(records.scope(A), catalogue)) == 15


# --- the summary ----------------------------------------------------------------------------------


def test_the_summary_has_these_keys() -> None:
    catalogue = Catalogue(
        units=(
            records.unit(DEPLOYED, "finance", display_name="Elsewhere"),
            records.unit(A, "finance", display_name="Finance!", labels=["l"]),
        ),
        grants=(records.grant(A, "grant-finance", "finance", "repo-finance"),),
        bindings=(records.binding(A, "b", "repo-finance"),),
    )
    scope = records.scope(A, "Organization_Unit/FINANCE", grants=[])
    shown = enterprise_scope(scope, catalogue, NOW)
    root = {
        "organization_id": "org-a",
        "workspace_id": "work-a",
        "resource_kind": "repository",
        "resource_id": "repo-finance",
    }
    assert shown == {
        "tenant_context": {
            "org_id": "org-a",
            "workspace_id": "work-a",
            "actor_id": "operator-a",
            "source": "explicit",
        },
        "owning_org_unit_id": "Organization_Unit/FINANCE",
        "owning_org_unit": {
            "unit_id": "finance",
            "taxonomy_id": "organization_unit",
            "display_name": "Finance!",
            "kind": "department",
            "parent_unit_id": None,
            "state": "active",
            "labels": ["l"],
        },
        "owner_principal": {"kind": "automation", "id": "automation-hardening"},
        "resource_scope": {"root": root},
        "resource_kind": "repository",
        "resource_id": "repo-finance",
        "data_classes": ["financial_record"],
        "risk_tier": "financial_record_access",
        "policy_version_id": "policy-Organization_Unit/FINANCE",
        "delegation_grant_ids": [],
        "delegation_grant_authority": {"status": "not_required", "missing_grant_ids": []},
        "org_unit_grants": [
            {
                "grant_id": "grant-finance",
                "unit": {"kind": "organization_unit", "id": "organization_unit/finance"},
                "resource": root,
                "effect": "allow",
                "permissions": ["execute"],
                "data_classes": ["financial_record"],
                "tool_patterns": [],
                "state": "active",
                "expires_at_ms": None,
            }
        ],
        "visible_knowledge_sources": [
            {
                "binding_id": "b",
                "connector_id": "connector-a",
                "source_type": "wiki",
                "native_source_id": "native-b",
                "source_root_label": None,
                "resource_ref": root,
                "data_class": "customer_data",
                "state": "enabled",
                "ingestion_policy": {
                    "allow_indexing": True,
                    "allow_prompt_context": True,
                    "require_review": False,
                },
            }
        ],
        "summary": {
            "org_unit": "Finance!",
            "resource": "repository:repo-finance",
            "knowledge_source_count": 1,
            "org_unit_grant_count": 1,
            "data_class_count": 1,
            "delegation_grant_count": 0,
        },
    }


def test_an_empty_scope_says_so() -> None:
    shown = enterprise_scope(records.StatefulRuntimeScope(tenant_context=A), Catalogue(), NOW)
    assert shown["summary"] == {
        "org_unit": None,
        "resource": None,
        "knowledge_source_count": 0,
        "org_unit_grant_count": 0,
        "data_class_count": 0,
        "delegation_grant_count": 0,
    }
    empty = ("owning_org_unit", "owner_principal", "resource_scope", "resource_kind", "resource_id")
    assert [shown[name] for name in empty] == [None] * 5
    # A unit that the catalogue does not know goes by its id.
    named = enterprise_scope(records.scope(A, "sales"), Catalogue(), NOW)
    assert named["summary"]["org_unit"] == "sales"
    assert named["owning_org_unit"] is None


# --- what a run may be made with ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "is_allowed"),
    [
        ({}, True),
        ({"permissions": ["view"]}, False),
        ({"data_classes": []}, False),
        ({"data_classes": ["financial_record", "public"]}, True),
        ({"resource": ref(id="repo-other")}, False),
        ({"resource": ref("workspace", "work-a")}, True),
        ({"unit": PrincipalRef(kind="organization_unit", id="platform")}, False),
        ({"state": "disabled"}, False),
        ({"expires_at_ms": NOW}, False),
        ({"tenant_context": DEPLOYED}, False),
        ({"effect": "deny"}, False),
        ({"grant_id": "GRANT_FINANCE"}, True),
    ],
)
def test_a_declared_grant_must_allow_it(fields: dict[str, Any], is_allowed: bool) -> None:
    grant = records.grant(A, "grant-finance", "finance", "repo-finance")
    catalogue = Catalogue(grants=(msgspec.structs.replace(grant, **fields),))
    if is_allowed:
        check_authority(records.scope(A), catalogue, NOW)
    else:
        with pytest.raises(InvalidInput, match="grant-finance"):
            check_authority(records.scope(A), catalogue, NOW)
    check_authority(records.scope(A, grants=[]), Catalogue(), NOW)  # what declares none needs none


def test_a_grant_must_allow_every_resource() -> None:
    limits = ResourceScope(root=ref(id="repo-finance"), allowed_resources=[ref(id="repo-b")])
    scope = msgspec.structs.replace(records.scope(A), resource_scope=limits)
    narrow = records.grant(A, "grant-finance", "finance", "repo-finance")
    with pytest.raises(InvalidInput, match="grant-finance"):
        check_authority(scope, Catalogue(grants=(narrow,)), NOW)
    wide = msgspec.structs.replace(narrow, resource=ref("workspace", "work-a"))
    check_authority(scope, Catalogue(grants=(wide,)), NOW)


@pytest.mark.parametrize(
    ("fields", "denies"),
    [
        ({}, True),
        ({"data_classes": []}, True),
        ({"data_classes": ["public"]}, False),
        ({"permissions": ["view"]}, False),
        ({"resource": ref(id="repo-other")}, False),
        ({"unit": PrincipalRef(kind="organization_unit", id="platform")}, False),
        ({"state": "disabled"}, False),
    ],
)
def test_a_grant_that_denies_wins(fields: dict[str, Any], denies: bool) -> None:
    allowing = records.grant(A, "grant-finance", "finance", "repo-finance")
    denying = records.grant(A, "grant-no", "finance", "repo-finance", effect="deny")
    catalogue = Catalogue(grants=(allowing, msgspec.structs.replace(denying, **fields)))
    if denies:
        with pytest.raises(InvalidInput, match="grant-no"):
            check_authority(records.scope(A), catalogue, NOW)
    else:
        check_authority(records.scope(A), catalogue, NOW)
