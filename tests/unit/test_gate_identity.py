"""Who a call is, whether it is gated, and what is recorded of it."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import combinations, pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from leasekit import codec, keys
from leasekit.errors import InvalidInput
from leasekit.gate import identity
from leasekit.gate.events import PreSendEvent, Source
from leasekit.gate.identity import (
    SEED_TIERS,
    TIERS_ALL,
    ToolDescriptor,
    arguments_digest,
    dispatch_id,
    infer_risk_tier,
    intent_document,
    is_gated,
    key_digest,
    outbox_id,
    payload_digest,
    provider_of,
    run_word,
    same_tenant,
    sanitise_args,
    scope_allows,
    target_of,
)
from leasekit.model import TenantContext

texts = st.text(st.characters(codec="utf-8"))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(codec.INTEGER_MIN, codec.INTEGER_MAX)
    # Numbers that Python writes with an exponent have a test of their own.
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda one: "e" not in repr(one))
    | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)
argument_names = texts | st.sampled_from([*identity.TARGET_KEYS, *sorted(identity.RESERVED_KEYS)])
arguments = st.dictionaries(argument_names, json_values, max_size=6)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8).filter(str.strip)

TENANT = TenantContext.explicit("org-a", "workspace-a", "user-a")
SOURCE = Source(kind="automation_v2", run_id="run-1", node_id="node-1")


def event(**changed: Any) -> PreSendEvent:
    """The fixture of spec/reliability 3.10."""
    fields: dict[str, Any] = {
        "dispatch_id": "tool-dispatch-test",
        "tool": "mcp.github.create_issue",
        "args": {"owner_repo": "frumu-ai/tandem", "title": "hello"},
        "tenant_context": TENANT,
        "source": SOURCE,
        "policy_decision_id": "policy-1",
        "payload_digest": "sha256:payload",
        "external_side_effect": True,
        "risk_tier": "external_send",
    }
    return PreSendEvent(**(fields | changed))


# --- the gating rule ------------------------------------------------------------------------------


def test_the_tiers_are_those_of_the_spec() -> None:
    """Eleven exist, five are gated unless configured otherwise (spec/reliability 1.4, 3.2)."""
    assert len(set(TIERS_ALL)) == len(TIERS_ALL) == 11
    assert {
        *("external_send", "destructive_delete", "money_movement_contract"),
        *("financial_record_access", "credential_admin"),
    } == SEED_TIERS
    assert set(TIERS_ALL) > SEED_TIERS


@pytest.mark.parametrize("is_external", [True, False])
@pytest.mark.parametrize("tier", TIERS_ALL)
def test_a_tier_alone_decides(tier: str, is_external: bool) -> None:
    """With a tier the flag says nothing, neither for nor against."""
    call = event(risk_tier=tier, external_side_effect=is_external)
    assert is_gated(call, SEED_TIERS) is (tier in SEED_TIERS)


@pytest.mark.parametrize("is_external", [True, False])
def test_without_a_tier_the_flag_decides(is_external: bool) -> None:
    """[SEED] an external side effect of no tier is gated; a plain read is not."""
    call = event(risk_tier=None, external_side_effect=is_external)
    assert is_gated(call, SEED_TIERS) is is_external


def test_more_tiers_are_gated_by_configuration() -> None:
    """consequential_write, and any tier of one's own."""
    for tier in ("consequential_write", "of_our_own"):
        assert not is_gated(event(risk_tier=tier), SEED_TIERS)
        assert is_gated(event(risk_tier=tier, external_side_effect=False), SEED_TIERS | {tier})
    assert not is_gated(event(risk_tier="external_send"), frozenset())


# --- tiers of tools -------------------------------------------------------------------------------

TOKENS = {
    "credential_admin": "admin administrator credential credentials secret secrets token tokens oauth "
    "kms key keys",
    "money_movement_contract": "payment payout fund funds transfer wire ach transaction ledger refund "
    "reverse contract commitment invoice billing quote order",
    "destructive_delete": "delete remove destroy wipe purge drop",
    "external_send": "send deliver reply post publish submit",
}
PARTS = {
    "credential_admin": "accesstoken refreshtoken secretref",
    "external_send": "sendemail emailsend replyemail emailreply",
}


@pytest.mark.parametrize(
    ("tier", "token"), [(tier, token) for tier, row in TOKENS.items() for token in row.split()]
)
def test_every_token_tells_its_tier(tier: str, token: str) -> None:
    """A word of the name, whatever divides the words and in whatever case; not a part of a word."""
    for name in (token, f"do_{token}", f"{token}-it", f"x.{token}/y", f"a {token.upper()} b"):
        assert infer_risk_tier(name) == tier, name
    assert infer_risk_tier(f"mcp.server.{token}_it") == tier
    assert infer_risk_tier(f"x{token}x") is None


@pytest.mark.parametrize(
    ("tier", "part"), [(tier, part) for tier, row in PARTS.items() for part in row.split()]
)
def test_every_compact_part_tells_its_tier(tier: str, part: str) -> None:
    """Found inside of the name without its dividers, so camel case is seen too."""
    for name in (part, f"get{part.title()}Now", f"{part[:3]}_{part[3:]}", f"mcp.a.x{part}x"):
        assert infer_risk_tier(name) == tier, name


@pytest.mark.parametrize(
    "name",
    [
        "read",
        "",
        "mcp.",
        "mcp.send.list",
        "mcp.delete.payment.get",
        "payments",
        "sender",
        "...",
        "é",
    ],
)
def test_any_other_name_tells_nothing(name: str) -> None:
    """Of mcp names only the last part counts; words that the spec does not list are no tokens."""
    assert infer_risk_tier(name) is None


def test_only_mcp_names_are_cut() -> None:
    """Elsewhere each part of a name counts."""
    assert infer_risk_tier("mcpx.send.list") == "external_send"
    assert infer_risk_tier("mcp.delete.x.send") == "external_send"
    assert infer_risk_tier("mcp.github") is None
    assert infer_risk_tier("mcp.send") == "external_send"
    assert infer_risk_tier("mcp.accesstoken.read") is None


def test_the_canonical_name_counts() -> None:
    """An alias says nothing of what is called."""
    assert infer_risk_tier("helper", canonical_tool="mcp.mail.send") == "external_send"
    assert infer_risk_tier("send_mail", canonical_tool="mcp.mail.list") is None


@pytest.mark.parametrize(
    ("descriptor", "tier"),
    [
        (ToolDescriptor(admin_surface=True), "credential_admin"),
        (ToolDescriptor(credential_access=True), "credential_admin"),
        (ToolDescriptor(permissions=["view", "admin"]), "credential_admin"),
        (ToolDescriptor(data_classes=["credential"]), "credential_admin"),
        (ToolDescriptor(data_classes=["public", "financial_record"]), "financial_record_access"),
        (ToolDescriptor(data_classes=["regulated"]), "financial_record_access"),
        (ToolDescriptor(permissions=["view", "read", "edit", "execute", "delegate"]), None),
        (ToolDescriptor(data_classes=["public", "confidential", "customer_data"]), None),
        (ToolDescriptor(), None),
        (None, None),
    ],
)
def test_a_descriptor_tells_the_tier(descriptor: ToolDescriptor | None, tier: str | None) -> None:
    """By its flags, the admin permission, and the data classes that the spec lists."""
    assert infer_risk_tier("mcp.a.read", descriptor=descriptor) == tier


PRECEDENCE = [
    ("credential_admin", "token", {}),
    ("money_movement_contract", "refund", {}),
    ("destructive_delete", "delete", {}),
    ("financial_record_access", "", {"data_classes": ["regulated"]}),
    ("external_send", "send", {}),
]


@pytest.mark.parametrize(("first", "second"), list(combinations(PRECEDENCE, 2)))
def test_the_first_tier_that_fits_wins(first: Any, second: Any) -> None:
    """Credentials, money, deletion, financial records, sending; the order of words says nothing."""
    descriptor = ToolDescriptor(**first[2], **second[2])
    for name in (f"{first[1]}_{second[1]}", f"{second[1]}_{first[1]}"):
        assert infer_risk_tier(name, descriptor=descriptor) == first[0]


@pytest.mark.parametrize(
    "marks",
    [
        {"admin_surface": True},
        {"credential_access": True},
        {"permissions": ["admin"]},
        {"data_classes": ["credential", "regulated"]},
    ],
)
def test_credentials_win_by_descriptor_too(marks: dict[str, Any]) -> None:
    """Whatever the name and the other data classes say."""
    descriptor = ToolDescriptor(**marks)
    assert infer_risk_tier("refund_delete_send", descriptor=descriptor) == "credential_admin"


@pytest.mark.parametrize("tier", TIERS_ALL)
def test_a_declared_tier_wins(tier: str) -> None:
    """Over all that name and flags say."""
    descriptor = ToolDescriptor(risk_tier=tier, admin_surface=True, data_classes=["credential"])
    assert infer_risk_tier("send_payment", descriptor=descriptor) == tier


@pytest.mark.parametrize("tier", ["external_sent", "External_Send", "", " external_send"])
def test_a_declared_tier_must_exist(tier: str) -> None:
    """A misspelt one would open the gate."""
    with pytest.raises(InvalidInput, match="risk_tier must be one of read_discover") as raised:
        infer_risk_tier("send", descriptor=ToolDescriptor(risk_tier=tier))
    assert raised.value.field == "risk_tier"


# --- allow-lists and tenants ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowlist", "tool", "is_allowed"),
    [
        ([], "anything", True),
        (["read"], "read", True),
        (["read"], "write", False),
        (["read"], "reader", False),
        (["reader"], "read", False),
        (["write", "READ"], "read", True),
        (["read"], "Read", True),
        (["mcp.github.*"], "mcp.GitHub.create_issue", True),
        (["MCP.GITHUB.*"], "mcp.github.create_issue", True),
        (["mcp.github.*"], "mcp.github.", True),
        (["mcp.github.*"], "mcp.github", False),
        (["mcp.github.*"], "mcp.gitlab.create_issue", False),
        (["*"], "anything", True),
        (["*.send"], "mail.send", False),
        (["m*l"], "mail", False),
        (["m*l"], "m*x", False),
        (["mail.?end"], "mail.send", False),
        (["mcp.k*"], "mcp.\u212aey", False),
        (["é"], "É", False),
    ],
)
def test_an_allow_list_names_tools(allowlist: list[str], tool: str, is_allowed: bool) -> None:
    """Whole names, or what a trailing * leaves open; ASCII case apart; empty = all."""
    assert scope_allows(allowlist, tool) is is_allowed


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (TenantContext("o", "w", "d", "a"), True),
        (TenantContext("o", "w", "d"), True),
        (TenantContext("o", "w", "d", "b"), True),
        (TenantContext("x", "w", "d", "a"), False),
        (TenantContext("o", "x", "d", "a"), False),
        (TenantContext("o", "w", "x", "a"), False),
        (TenantContext("o", "w", None, "a"), False),
        (TenantContext("O", "w", "d", "a"), False),
        (TenantContext("w", "o", "d", "a"), False),
    ],
)
def test_tenants_compare_exactly(other: TenantContext, is_same: bool) -> None:
    """By org, workspace and deployment; the actor never counts."""
    own = TenantContext("o", "w", "d", "a")
    assert same_tenant(own, other) is same_tenant(other, own) is is_same


# --- ids and digests ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "identity_"),
    [
        ("tool-dispatch-test", "outbox-5b0a6f037273d4d4"),
        ("tool-dispatch-claimed", "outbox-ccdcacf91e20f94e"),
        ("idempotency-action-a", "outbox-adad354a36524a9b"),
        ("idem-run-a-node-a-send", "outbox-18ab48006bed9a50"),
    ],
)
def test_outbox_ids_have_their_golden_values(key: str, identity_: str) -> None:
    """spec/reliability 3.3 and appendix A; the bridge's suffix is made the same way."""
    assert outbox_id(key) == identity_


@pytest.mark.parametrize(
    ("value", "digest"),
    [
        (
            {"message": "hello"},
            "15d8299a23298dc302c91f30d5bca73ab1f5fe316178cbb9057cc702d8f1927a",
        ),
        ({"status": "ok"}, "71385556c1a64cc48ed7d2e4337abeb943ac5f66c665376f62724ffec92767e8"),
        ({"body": "same"}, "8eac791d8919fc9b1b6de1e11af9666f5db6d4017a66680117d713db4b25d176"),
    ],
)
def test_payload_digests_have_their_golden_values(value: object, digest: str) -> None:
    """DIG of spec/reliability 0.2 and appendix A."""
    assert payload_digest(value) == f"sha256:{digest}"


def digest_of(text: str) -> str:
    """DIG of a JSON text, without the code under test."""
    return "sha256:" + hashlib.sha256(text.encode() + b"\0").hexdigest()


@given(json_values)
def test_a_digest_is_that_of_pythons_own_json(value: object) -> None:
    """Byte for byte, but for numbers with an exponent: see the next test."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert payload_digest(value) == digest_of(text)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1e15, "1000000000000000.0"),
        (1e16, "1e16"),
        (1.5e300, "1.5e300"),
        (-2.5e-9, "-2.5e-9"),
        (1e-6, "1e-6"),
        (1e-5, "0.00001"),
        (-1.25e-5, "-0.0000125"),
        (0.0001, "0.0001"),
        (5e-324, "5e-324"),
        (-0.0, "-0.0"),
    ],
)
def test_numbers_are_written_as_serde_json_writes_them(number: float, text: str) -> None:
    """The exception of spec/reliability 0.2: neither `1e+16` nor `1e-05`."""
    assert payload_digest({"a": [number]}) == digest_of(f'{{"a":[{text}]}}')


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        ({}, "{}"),
        ({"\uffff": 1, "\U00010000": 2, "z": 3, "Z": 4, "é": 5}, '{"Z":4,"z":3,"é":5,"￿":1,"𐀀":2}'),
        ("".join(map(chr, range(32))) + '"\\/\x7f\u2028', None),
    ],
)
def test_hostile_texts_are_written_canonically(value: object, text: str | None) -> None:
    """Keys by their bytes, not as UTF-16 sorts them; escapes only where they must be, lower-case."""
    if text is None:
        escapes = {8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r"}
        controls = "".join(escapes.get(code, f"\\u{code:04x}") for code in range(32))
        text = f'"{controls}\\"\\\\/\x7f\u2028"'
    assert payload_digest(value) == digest_of(text)


@pytest.mark.parametrize("value", [float("nan"), {1: 2}, "\ud800", 2**64, b"bytes", object()])
def test_what_is_not_json_has_no_digest(value: object) -> None:
    """Nothing is coerced: two requests would look like one."""
    with pytest.raises(InvalidInput) as raised:
        payload_digest(value)
    assert raised.value.field == "args"


def test_arguments_are_limited() -> None:
    """1 MiB of canonical JSON passes, one byte more is refused."""
    longest = "x" * (codec.PAYLOAD_BYTES_MAX - 2)
    assert payload_digest(longest)
    with pytest.raises(InvalidInput, match="args is 1048577 bytes of JSON; at most 1048576"):
        payload_digest(longest + "x")


RESERVED = (
    *("__strict_tenant_context", "__verified_tenant_context", "__phase_tool_authority"),
    *("__phaseToolAuthority", "__workflow_phase", "__workflowPhase", "__dispatch_session_id"),
)


@pytest.mark.parametrize("name", RESERVED)
def test_reserved_arguments_are_dropped(name: str) -> None:
    """Only the dispatcher may say them; at the top, where it would."""
    given_args = {name: "forged", "a": {name: 1}, "__other": 2}
    assert sanitise_args(given_args) == {"a": {name: 1}, "__other": 2}
    assert name in given_args
    assert dispatch_id("t", SOURCE, TENANT, given_args) == dispatch_id(
        "t", SOURCE, TENANT, {"a": {name: 1}, "__other": 2}
    )


@given(arguments)
def test_sanitising_twice_changes_nothing_more(args: dict[str, Any]) -> None:
    """And what it keeps, it keeps as it was."""
    once = sanitise_args(args)
    assert once is not None
    assert sanitise_args(once) == once
    assert once == {name: value for name, value in args.items() if name not in RESERVED}


def test_no_arguments_are_none() -> None:
    """Not an empty object, which has another digest."""
    assert sanitise_args(None) is None
    assert dispatch_id("t", SOURCE, TENANT, None)[1] == digest_of("null")
    assert dispatch_id("t", SOURCE, TENANT, {})[1] == digest_of("{}")


@pytest.mark.parametrize(
    ("deployment", "name"),
    [
        ("deployment-a", "tool-dispatch-2549fc0d6dc16334a0fd6dd8"),
        ("deployment-b", "tool-dispatch-6527312060329df6b396deb2"),
        (None, "tool-dispatch-29f72358719111e53d3f272c"),
    ],
)
def test_dispatch_ids_have_their_golden_values(deployment: str | None, name: str) -> None:
    """spec/reliability 3.8 and appendix A; the actor does not count."""
    source = Source(kind="engine_loop", session_id="session-1", message_id="message-1")
    for actor in (None, "user-a"):
        tenant = TenantContext("org-a", "workspace-a", deployment, actor)
        assert dispatch_id("mcp.github.send", source, tenant, {"body": "same"}) == (
            name,
            "sha256:8eac791d8919fc9b1b6de1e11af9666f5db6d4017a66680117d713db4b25d176",
        )


PARTS_OF_IDENTITY = (
    *("tool", "canonical_tool", "kind", "session_id", "message_id", "run_id", "node_id"),
    *("request_id", "org_id", "workspace_id", "deployment_id"),
)
REQUIRED = ("tool", "kind", "org_id", "workspace_id")


def named(parts: dict[str, Any], args: dict[str, Any] | None = None, **trusted: Any) -> str:
    """The dispatch id of a call that is given part by part."""
    source: dict[str, Any] = {part: parts.get(part) for part in PARTS_OF_IDENTITY[2:8]}
    tenant: list[Any] = [parts.get(part) for part in PARTS_OF_IDENTITY[8:]]
    return dispatch_id(
        parts["tool"],
        Source(**source),
        TenantContext(*tenant),
        args,
        canonical_tool=parts.get("canonical_tool"),
        trusted=trusted or None,
    )[0]


@given(
    st.fixed_dictionaries(dict.fromkeys(PARTS_OF_IDENTITY, names)),
    st.sampled_from(PARTS_OF_IDENTITY),
    names,
)
def test_a_dispatch_id_depends_on_every_part(
    parts: dict[str, Any], changed: str, value: str
) -> None:
    """Another value, or none where none may be, is another call; the same parts are the same one."""
    assume(value != parts[changed])
    assert named(dict(parts)) == named(parts)
    assert named(parts | {changed: value}) != named(parts)
    if changed not in REQUIRED:
        assert named(parts | {changed: None}) != named(parts)


@given(st.fixed_dictionaries(dict.fromkeys(PARTS_OF_IDENTITY, names)))
def test_parts_do_not_change_places(parts: dict[str, str]) -> None:
    """What is said in one part is not said in the next."""
    for one, other in pairwise(PARTS_OF_IDENTITY):
        swapped = parts | {one: parts[other], other: parts[one]}
        assert (named(swapped) == named(parts)) is (parts[one] == parts[other])


@given(arguments, arguments)
def test_a_dispatch_id_depends_on_the_arguments(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal arguments, reserved ones apart, are the same call, and others another."""
    base = {"tool": "t", "kind": "k", "org_id": "o", "workspace_id": "w"}
    kept = [json.dumps(sanitise_args(args), sort_keys=True) for args in (one, other)]
    assert (named(base, one) == named(base, other)) is (kept[0] == kept[1])


def test_a_dispatch_id_is_made_as_the_spec_says() -> None:
    """H0 over twelve parts in their order, absent ones empty; its first 24 characters."""
    parts = ["t", "c", "k", "s", "m", "r", "n", "q", "o", "w", "d"]
    digest = digest_of('{"a":1}')
    whole = hashlib.sha256(b"".join(one.encode() + b"\0" for one in [*parts, digest])).hexdigest()
    call = dict(zip(PARTS_OF_IDENTITY, parts, strict=True))
    assert named(call, {"a": 1}) == f"tool-dispatch-{whole[:24]}"


@pytest.mark.parametrize("part", PARTS_OF_IDENTITY)
@pytest.mark.parametrize(
    ("value", "says"),
    [("a\0b", "zero byte"), ("\0", "zero byte"), (" ", "is required"), ("a" * 201, "at most 200")],
)
def test_a_part_that_could_be_taken_for_another_is_refused(
    part: str, value: str, says: str
) -> None:
    """The hash ends each part with a zero byte: `a\\0b`, `c` and `a`, `b\\0c` would be one call."""
    base = {"tool": "t", "kind": "k", "org_id": "o", "workspace_id": "w"}
    with pytest.raises(InvalidInput, match=says) as raised:
        named(base | {part: value})
    assert raised.value.field.endswith(part)


@pytest.mark.parametrize("part", REQUIRED)
def test_the_least_of_an_identity_is_required(part: str) -> None:
    """Tool, kind, org and workspace are never absent."""
    base: dict[str, Any] = {"tool": "t", "kind": "k", "org_id": "o", "workspace_id": "w"}
    with pytest.raises(InvalidInput, match="must be text, not NoneType"):
        named(base | {part: None})


def test_trusted_values_replace_what_was_passed() -> None:
    """They are part of the arguments' digest; what the caller said under their names is not."""
    base = {"tool": "t", "kind": "k", "org_id": "o", "workspace_id": "w"}
    trusted: dict[str, Any] = {
        "__dispatch_session_id": "session-1",
        "__verified_tenant_context": {"org_id": "org-a"},
        "__phase_tool_authority": ["read"],
    }
    forged = {"a": 1, "__dispatch_session_id": "session-2"}

    _, digest = dispatch_id("t", SOURCE, TENANT, forged, trusted=trusted)

    assert digest == payload_digest({"a": 1} | trusted)
    assert named(base, {"a": 1}, **trusted) != named(base, {"a": 1})
    assert named(base, None, __dispatch_session_id="s") == named(
        base, {}, __dispatch_session_id="s"
    )
    absent: dict[str, Any] = dict.fromkeys(trusted)
    assert named(base, {"a": 1}, **absent) == named(base, {"a": 1})
    assert named(base, None, **absent) == named(base, None) != named(base, {})


@pytest.mark.parametrize("name", ["a", "__workflow_phase", "__strict_tenant_context"])
def test_nothing_else_is_trusted(name: str) -> None:
    """A name that is only dropped, or that is an argument, cannot be put in."""
    with pytest.raises(InvalidInput, match="trusted may hold only __dispatch_session_id") as raised:
        dispatch_id("t", SOURCE, TENANT, {}, trusted={name: "value"})
    assert raised.value.field == "trusted"


def test_the_request_of_a_key_is_tool_and_arguments() -> None:
    """The canonical tool where there is one; a given digest stands for the arguments."""
    plain = event(payload_digest=None)
    told = arguments_digest(plain)
    assert re.fullmatch(r"[A-Za-z0-9_-]{22}", told)
    assert told == codec.short_digest(plain.tool.encode(), payload_digest(plain.args).encode())

    same = [
        event(payload_digest=None, dispatch_id="other", risk_tier=None, source=Source(kind="k")),
        event(payload_digest=None, tool="alias", canonical_tool=plain.tool),
        event(payload_digest=payload_digest(plain.args), args=None),
        event(payload_digest=payload_digest(plain.args), args={"a": 1}),
        event(payload_digest=None, args={**(plain.args or {}), "__workflow_phase": "p"}),
    ]
    other = [
        event(payload_digest=None, tool="mcp.github.close_issue"),
        event(payload_digest=None, canonical_tool="mcp.gitlab.create_issue"),
        event(payload_digest=None, args={"a": 1}),
        event(payload_digest=None, args={}),
        event(payload_digest=None, args=None),
        event(),
    ]
    assert [arguments_digest(one) for one in same] == [told] * len(same)
    assert len({told, *map(arguments_digest, other)}) == 1 + len(other)
    nothing = codec.short_digest(plain.tool.encode(), digest_of("null").encode())
    assert arguments_digest(event(payload_digest=None, args=None)) == nothing


def test_the_digest_of_a_dispatch_id_is_that_of_its_request() -> None:
    """An event with a name made here is the same request with its digest and without."""
    args = {"body": "same", "__workflow_phase": "p"}
    name, digest = dispatch_id("t", SOURCE, TENANT, args)
    with_digest, without = (
        event(dispatch_id=name, tool="t", args=args, payload_digest=one) for one in (digest, None)
    )
    assert arguments_digest(with_digest) == arguments_digest(without)


@given(texts, texts)
def test_a_key_is_22_characters(one: str, other: str) -> None:
    """Of any key, and another for another key."""
    assert re.fullmatch(r"[A-Za-z0-9_-]{22}", key_digest(one))
    assert key_digest(one) == codec.short_digest(one.encode())
    assert (key_digest(one) == key_digest(other)) is (one == other)


@pytest.mark.parametrize(
    ("run_id", "normal", "word"),
    [
        ("run-1", "run_1", "run_1"),
        (" Run-A-b\n", "run_a_b", "run_a_b"),
        ("RUN_1", "run_1", "run_1"),
        ("É-é", "É_é", "~c3~89_~c3~a9"),
        ("a b", "a b", "a~20b"),
        ("~", "~", "~7e"),
        ("ALL", "all", "all"),
        ("", "", "~"),
        (" ", "", "~"),
    ],
)
def test_a_run_is_one_word(run_id: str, normal: str, word: str) -> None:
    """nk of spec/reliability 0.2, encoded; ASCII letters only change their case."""
    assert codec.normalised(run_id) == normal
    assert run_word(run_id) == word


@given(texts)
def test_no_run_is_taken_for_none(run_id: str) -> None:
    """`~` alone is no encoded word, so runs and their absence stay apart."""
    assert run_word(None) == "~"
    if codec.normalised(run_id):
        assert keys.decode_word(run_word(run_id)) == codec.normalised(run_id)


# --- the intent's document ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "canonical", "provider"),
    [
        ("mcp.github.create_issue", None, "github"),
        ("alias", "mcp.github.create_issue", "github"),
        ("mcp.github.create_issue", "mcp.gitlab.create_issue", "gitlab"),
        ("mcp.github.create_issue", "create_issue", None),
        ("mcp.github", None, "github"),
        ("mcp. github .x", None, "github"),
        ("mcp. .x", None, None),
        ("mcp..x", None, None),
        ("mcp.", None, None),
        ("mcp", None, None),
        ("MCP.github.x", None, None),
        ("mcpx.github.x", None, None),
        ("a.mcp.github.x", None, None),
        ("read", None, None),
    ],
)
def test_the_provider_is_a_part_of_the_name(
    tool: str, canonical: str | None, provider: str | None
) -> None:
    """What stands after `mcp.` in the canonical name, else in the tool's (spec/reliability 3.5)."""
    assert provider_of(tool, canonical) == provider


TARGETS = (
    *("owner_repo", "repo", "repository", "channel", "channel_id", "thread_ts"),
    *("database_id", "page_id", "id"),
)


@pytest.mark.parametrize("number", range(len(TARGETS)))
def test_targets_are_found_in_their_order(number: int) -> None:
    """Each key before those after it, in whatever order they are passed."""
    later = dict.fromkeys(reversed(TARGETS[number:]), "later")
    assert target_of(later | {TARGETS[number]: " a b "}) == "a b"
    skipped = dict(
        zip(TARGETS[:number], [" ", 7, None, ["a"], {"id": "a"}, True, 1.5, ""], strict=False)
    )
    assert target_of(skipped | {TARGETS[number]: "a"}) == "a"


@pytest.mark.parametrize(
    "args",
    [None, {}, {"title": "a"}, {"id": 7}, {"id": " \n"}, {"a": {"id": "a"}}, {"ID": "a"}],
)
def test_there_may_be_no_target(args: dict[str, Any] | None) -> None:
    """Numbers, blanks, inner objects and other keys are none."""
    assert target_of(args) is None


@given(arguments)
def test_a_target_is_a_text(args: dict[str, Any]) -> None:
    """Never a number, never blank, and one of those that were passed."""
    target = target_of(args)
    usable = [args[key] for key in TARGETS if isinstance(args.get(key), str) and args[key].strip()]
    assert target == (usable[0].strip() if usable else None)


def test_an_intent_is_written_as_the_spec_says() -> None:
    """All of spec/reliability 3.5 that never changes, for the fixture with every field."""
    source = Source(
        kind="automation_v2",
        session_id="session-1",
        message_id="message-1",
        run_id="run-1",
        node_id="node-1",
        request_id="request-1",
    )
    call = event(source=source, tool="create", canonical_tool="mcp.github.create_issue")
    call = msgspec.structs.replace(call, scope_allowlist=["mcp.*"], policy_outcome="denied")

    document = intent_document(call, TenantContext("org-b", "workspace-b"))

    assert json.loads(document) == {
        "run_id": "run-1",
        "scope": {
            "schema_version": 1,
            "tenant_context": {
                "org_id": "org-a",
                "workspace_id": "workspace-a",
                "actor_id": "user-a",
                "source": "explicit",
            },
            "risk_tier": "external_send",
        },
        "operation": "mcp.github.create_issue",
        "source_kind": "automation_v2",
        "source_id": "tool-dispatch-test",
        "node_id": "node-1",
        "provider": "github",
        "tool": "create",
        "target": "frumu-ai/tandem",
        "idempotency_key": "tool-dispatch-test",
        "payload_digest": "sha256:payload",
        "policy_decision_id": "policy-1",
        "metadata": {
            "pre_send_dispatch_gate": True,
            "observed_before_execution": True,
            "dispatch_id": "tool-dispatch-test",
            "dispatch_source": {
                "kind": "automation_v2",
                "session_id": "session-1",
                "message_id": "message-1",
                "run_id": "run-1",
                "node_id": "node-1",
                "request_id": "request-1",
            },
            "scope_allowlist": ["mcp.*"],
            "policy_outcome": "denied",
            "risk_tier": "external_send",
        },
    }


def test_an_intent_leaves_out_what_is_absent() -> None:
    """No nulls but the metadata's risk_tier; the tenant is that of the gate; the bytes canonical."""
    call = PreSendEvent(dispatch_id="d", tool="post", source=Source(kind="k"), args={"x": "secret"})

    document = intent_document(call, TenantContext("o", "w", "d1", "a"))

    wanted = {
        "scope": {
            "schema_version": 1,
            "tenant_context": {
                "org_id": "o",
                "workspace_id": "w",
                "deployment_id": "d1",
                "actor_id": "a",
                "source": "local_implicit",
            },
        },
        "operation": "post",
        "source_kind": "k",
        "source_id": "d",
        "tool": "post",
        "idempotency_key": "d",
        "metadata": {
            "pre_send_dispatch_gate": True,
            "observed_before_execution": True,
            "dispatch_id": "d",
            "dispatch_source": {"kind": "k"},
            "scope_allowlist": [],
            "policy_outcome": "allowed",
            "risk_tier": None,
        },
    }
    assert document == json.dumps(wanted, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize("tier", ["of_our_own", "External_Send"])
def test_a_tier_that_does_not_exist_is_only_metadata(tier: str) -> None:
    """The scope holds tiers that parse; what was said is kept beside it."""
    document = json.loads(intent_document(event(risk_tier=tier), TENANT))
    assert "risk_tier" not in document["scope"]
    assert document["metadata"]["risk_tier"] == tier


def test_an_intent_is_limited() -> None:
    """64 KiB pass, one byte more is refused; its content is not shown."""
    room = codec.DOCUMENT_BYTES_MAX - len(intent_document(event(args={"id": "x"}), TENANT)) + 1
    largest = intent_document(event(args={"id": "x" * room}), TENANT)
    assert len(largest) == codec.DOCUMENT_BYTES_MAX
    with pytest.raises(
        InvalidInput, match="intent is 65537 bytes of JSON; at most 65536"
    ) as raised:
        intent_document(event(args={"id": "x" * (room + 1)}), TENANT)
    assert raised.value.field == "intent"
