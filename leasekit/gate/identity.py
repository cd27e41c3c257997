"""Who a call is, whether it is gated, and what is recorded of it: pure functions over events.

Ids and digests are those of spec/reliability, byte for byte: other systems make the same ones. The
canonical JSON behind them is codec's. Its numbers are written as serde_json writes them (`1e16`,
`0.00001`), which is where Python's json.dumps differs (`1e+16`, `1e-05`; spec/reliability 0.2).

Source: spec/reliability 0.2, 3.2, 3.3, 3.5, 3.8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import msgspec

from leasekit import codec
from leasekit.errors import InvalidInput
from leasekit.gate.events import PreSendEvent, Source
from leasekit.keys import encode_word
from leasekit.model import TenantContext
from leasekit.policy import SEED_TIERS

__all__ = [
    "SEED_TIERS",
    "TIERS_ALL",
    "ToolDescriptor",
    "arguments_digest",
    "dispatch_id",
    "infer_risk_tier",
    "intent_document",
    "is_gated",
    "key_digest",
    "outbox_id",
    "payload_digest",
    "provider_of",
    "run_word",
    "same_tenant",
    "sanitise_args",
    "scope_allows",
    "target_of",
]

TIERS_ALL = (
    "read_discover",
    "internal_write",
    "consequential_write",
    "external_draft",
    "external_send",
    "customer_data_access",
    "source_code_mutation",
    "financial_record_access",
    "credential_admin",
    "destructive_delete",
    "money_movement_contract",
)
"""Every ToolRiskTier (spec/reliability 1.4)."""

TARGET_KEYS = (
    *("owner_repo", "repo", "repository", "channel", "channel_id"),
    *("thread_ts", "database_id", "page_id", "id"),
)
TRUSTED_KEYS = frozenset(
    {"__dispatch_session_id", "__verified_tenant_context", "__phase_tool_authority"}
)
RESERVED_KEYS = TRUSTED_KEYS | {
    *("__strict_tenant_context", "__phaseToolAuthority", "__workflow_phase", "__workflowPhase"),
}
NO_RUN = "~"


_CREDENTIAL_WORDS = frozenset(
    {
        *("admin", "administrator", "credential", "credentials", "secret", "secrets"),
        *("token", "tokens", "oauth", "kms", "key", "keys"),
    }
)
_CREDENTIAL_PARTS = ("accesstoken", "refreshtoken", "secretref")
_MONEY_WORDS = frozenset(
    {
        *("payment", "payout", "fund", "funds", "transfer", "wire", "ach", "transaction"),
        *("ledger", "refund", "reverse", "contract", "commitment", "invoice", "billing"),
        *("quote", "order"),
    }
)
_DELETE_WORDS = frozenset({"delete", "remove", "destroy", "wipe", "purge", "drop"})
_FINANCIAL_CLASSES = frozenset({"financial_record", "regulated"})
_SEND_WORDS = frozenset({"send", "deliver", "reply", "post", "publish", "submit"})
_SEND_PARTS = ("sendemail", "emailsend", "replyemail", "emailreply")


# --- the gating rule ------------------------------------------------------------------------------


def is_gated(event: PreSendEvent, tiers: AbstractSet[str]) -> bool:
    """Whether a call needs a grant (spec/reliability 3.2): its tier decides.

    Only a call without a tier is judged by `external_side_effect`; so an external side effect of a
    tier that is not gated passes, and a gated tier without the flag does not.
    """
    if event.risk_tier is None:
        return event.external_side_effect
    return event.risk_tier in tiers


class ToolDescriptor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of a tool beside its name (spec/reliability 3.8).

    risk_tier: the tier that its schema declares; one of TIERS_ALL. permissions: of
    AccessPermission, data_classes: of DataClass (spec/reliability 1.4).
    """

    risk_tier: str | None = None
    admin_surface: bool = False
    credential_access: bool = False
    permissions: list[str] = []
    data_classes: list[str] = []


_UNDESCRIBED = ToolDescriptor()


def infer_risk_tier(
    name: str, *, canonical_tool: str | None = None, descriptor: ToolDescriptor | None = None
) -> str | None:
    """The tier of a tool (spec/reliability 3.8): declared, else by descriptor and name, else None.

    The name is the canonical one where there is one; of `mcp.server.tool` only the last part counts.
    The first tier that fits wins, in the order of the function. InvalidInput for a declared tier
    that does not exist: taken as it is, it would open the gate.
    """
    known = descriptor or _UNDESCRIBED
    if known.risk_tier is not None:
        if known.risk_tier not in TIERS_ALL:
            raise InvalidInput(
                f"the declared risk_tier must be one of {', '.join(TIERS_ALL)}",
                field="risk_tier",
                limit=len(TIERS_ALL),
            )
        return known.risk_tier
    full_name = canonical_tool or name
    if full_name.startswith("mcp."):
        full_name = full_name.rpartition(".")[2]
    parts = re.findall("[a-z0-9]+", full_name.lower())
    words, compact = set(parts), "".join(parts)
    if (
        known.admin_surface
        or known.credential_access
        or "admin" in known.permissions
        or "credential" in known.data_classes
        or words & _CREDENTIAL_WORDS
        or any(part in compact for part in _CREDENTIAL_PARTS)
    ):
        return "credential_admin"
    if words & _MONEY_WORDS:
        return "money_movement_contract"
    if words & _DELETE_WORDS:
        return "destructive_delete"
    if not _FINANCIAL_CLASSES.isdisjoint(known.data_classes):
        return "financial_record_access"
    if words & _SEND_WORDS or any(part in compact for part in _SEND_PARTS):
        return "external_send"
    return None


def scope_allows(allowlist: Sequence[str], tool: str) -> bool:
    """Whether an allow-list names a tool (spec/reliability 3.8): empty = all; `mail.*` = by prefix.

    ASCII letters compare without case; look-alikes of other alphabets are other letters.
    """
    wanted = codec.ascii_lower(tool)
    patterns = [codec.ascii_lower(pattern) for pattern in allowlist]
    return not patterns or any(
        wanted.startswith(pattern[:-1]) if pattern.endswith("*") else wanted == pattern
        for pattern in patterns
    )


def same_tenant(one: TenantContext, other: TenantContext) -> bool:
    """Equal org, workspace and deployment (spec/reliability 1.2); the actor never counts."""
    return (one.org_id, one.workspace_id, one.deployment_id) == (
        other.org_id,
        other.workspace_id,
        other.deployment_id,
    )


# --- ids and digests ------------------------------------------------------------------------------


def outbox_id(idempotency_key: str) -> str:
    """The id of the intent of a key (spec/reliability 3.3); the tenant is not in it."""
    return "outbox-" + codec.hash_terminated([idempotency_key])[:16]


def payload_digest(args: object) -> str:
    """DIG of spec/reliability 0.2 of any JSON value <= 1 MiB, as it is: nothing is dropped from it."""
    return codec.digest(args, "args")


def sanitise_args(args: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Arguments without the reserved keys, which only the dispatcher may set (spec/reliability 3.8)."""
    if args is None:
        return None
    return {key: value for key, value in args.items() if key not in RESERVED_KEYS}


def dispatch_id(
    tool: str,
    source: Source,
    tenant_context: TenantContext,
    args: Mapping[str, Any] | None,
    *,
    canonical_tool: str | None = None,
    trusted: Mapping[str, Any] | None = None,
) -> tuple[str, str]:
    """The name of a call, and the digest of its arguments (spec/reliability 3.8).

    Equal calls of the same source have the same name. args: their reserved keys are dropped, and
    `trusted` (of TRUSTED_KEYS; None = not available) is put in. An event with this name must carry
    this digest, for without it the gate hashes the arguments without what was trusted. The actor
    does not count. InvalidInput for a part that is blank, longer than 200 bytes, or holds a zero
    byte: two calls would get one name.
    """
    carried = {key: value for key, value in (trusted or {}).items() if value is not None}
    if not TRUSTED_KEYS.issuperset(carried):
        raise InvalidInput(
            f"trusted may hold only {', '.join(sorted(TRUSTED_KEYS))}",
            field="trusted",
            limit=len(TRUSTED_KEYS),
        )
    sanitised = sanitise_args(args)
    digest = payload_digest({**(sanitised or {}), **carried} if carried else sanitised)
    parts = [
        _part(tool, "tool"),
        _optional_part(canonical_tool, "canonical_tool"),
        _part(source.kind, "source.kind"),
        _optional_part(source.session_id, "source.session_id"),
        _optional_part(source.message_id, "source.message_id"),
        _optional_part(source.run_id, "source.run_id"),
        _optional_part(source.node_id, "source.node_id"),
        _optional_part(source.request_id, "source.request_id"),
        _part(tenant_context.org_id, "org_id"),
        _part(tenant_context.workspace_id, "workspace_id"),
        _optional_part(tenant_context.deployment_id, "deployment_id"),
        digest,
    ]
    return "tool-dispatch-" + codec.hash_terminated(parts)[:24], digest


def _part(value: str, field: str) -> str:
    if "\0" in codec.check_text(value, field):
        raise InvalidInput(
            f"{field} holds a zero byte, which ends a part of the identity", field=field
        )
    return value


def _optional_part(value: str | None, field: str) -> str:
    """An absent part is empty (spec/reliability 3.8), which no given one can be."""
    return "" if value is None else _part(value, field)


def arguments_digest(event: PreSendEvent) -> str:
    """What tells one request from another under the same key, in 22 characters: tool and arguments.

    The arguments are those that the digest names, where there is one; else as they are, sanitised.
    """
    digest = event.payload_digest or payload_digest(sanitise_args(event.args))
    return codec.short_digest(_operation(event).encode(), digest.encode())


def key_digest(idempotency_key: str) -> str:
    """An idempotency key in 22 characters."""
    return codec.short_digest(idempotency_key.encode())


def run_word(run_id: str | None) -> str:
    """A run as one word of keys and rows; `~` for none, which no encoded word is."""
    return encode_word(codec.normalised(run_id or "")) or NO_RUN


# --- the intent's document ------------------------------------------------------------------------


def provider_of(tool: str, canonical_tool: str | None = None) -> str | None:
    """Who offers a tool: `github` of `mcp.github.create_issue` (spec/reliability 3.5); else None."""
    full_name = canonical_tool or tool
    if not full_name.startswith("mcp."):
        return None
    return full_name.split(".")[1].strip() or None


def target_of(args: Mapping[str, Any] | None) -> str | None:
    """What a call acts on: the first text that is not blank among TARGET_KEYS, trimmed; never a number.

    Source: spec/reliability 3.5.
    """
    for key in TARGET_KEYS:
        value = (args or {}).get(key)
        if isinstance(value, str) and (trimmed := value.strip()):
            return trimmed
    return None


def _operation(event: PreSendEvent) -> str:
    return event.canonical_tool or event.tool


def intent_document(event: PreSendEvent, context: TenantContext) -> bytes:
    """What is written once of an intent (spec/reliability 3.5), as canonical JSON <= 64 KiB.

    context: the tenant it is prepared in, which stands in for an event's own. Absent fields are
    left out, but for metadata.risk_tier, which is null. Status, times and attempts are no part of it.
    """
    scope: dict[str, Any] = {
        "schema_version": 1,
        "tenant_context": event.tenant_context or context,
    }
    if event.risk_tier in TIERS_ALL:
        scope["risk_tier"] = event.risk_tier
    fields: dict[str, Any] = {
        "run_id": event.source.run_id,
        "scope": scope,
        "operation": _operation(event),
        "source_kind": event.source.kind,
        "source_id": event.dispatch_id,
        "node_id": event.source.node_id,
        "provider": provider_of(event.tool, event.canonical_tool),
        "tool": event.tool,
        "target": target_of(event.args),
        "idempotency_key": event.dispatch_id,
        "payload_digest": event.payload_digest,
        "policy_decision_id": event.policy_decision_id,
        "metadata": {
            "pre_send_dispatch_gate": True,
            "observed_before_execution": True,
            "dispatch_id": event.dispatch_id,
            "dispatch_source": event.source,
            "scope_allowlist": event.scope_allowlist,
            "policy_outcome": event.policy_outcome,
            "risk_tier": event.risk_tier,
        },
    }
    present = {name: value for name, value in fields.items() if value is not None}
    document = codec.sorted_json(present)  # Of parts that were checked: no look at each is needed.
    if len(document) > codec.DOCUMENT_BYTES_MAX:
        raise InvalidInput(
            f"intent is {len(document)} bytes of JSON; at most {codec.DOCUMENT_BYTES_MAX}",
            field="intent",
            limit=codec.DOCUMENT_BYTES_MAX,
        )
    return document
