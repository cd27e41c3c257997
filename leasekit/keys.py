"""Every Redis key, spelled once, and the encoding that keeps tenants apart.

A key is `<prefix>:{<tenant>}:<concept>:<noun>`. The braces are Redis Cluster's hash tag: all of a
tenant lies in one slot, so that all of a tenant is atomic. The text between them is *encoded*:
nothing that a caller names can hold `{ } * ? [ ] \\ :`, a blank, or be empty, so no name can leave
its tenant, match another one's ACL pattern or split a key.

Source: design 3; lua/PROTOCOL.md, "Keys".
"""

from __future__ import annotations

import re
from functools import lru_cache

from leasekit.errors import InvalidInput

__all__ = [
    "Keys",
    "barrier_key",
    "decode_word",
    "encode_word",
    "hint_pattern",
    "hint_tenant",
    "key_pattern",
    "registry_keys",
    "route_of",
    "route_parts",
    "tenant_of_key",
    "tenant_parts",
    "tenant_tag",
]

TENANT_PART_BYTES_MAX = 64
PREFIX_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,32}\Z")

_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-")
_WORD = {byte: chr(byte) if byte in _PLAIN else f"~{byte:02x}" for byte in range(256)}
_ENCODED = re.compile(r"(?:[a-z0-9_-]|~[0-9a-f]{2})*\Z")
_ESCAPE = re.compile(r"~([0-9a-f]{2})")


def encode_word(text: str) -> str:
    """Encode any text as one word of `[a-z0-9_-]` and `~hex`; injective, see `decode_word`."""
    return "".join([_WORD[byte] for byte in text.encode()])


def decode_word(word: str) -> str:
    """Give back the text that `encode_word` was given; ValueError for any other word."""
    if not _ENCODED.match(word):
        raise ValueError(f"not an encoded word: {word!r}")
    raw = _ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), word).encode("latin-1")
    text = raw.decode()
    if encode_word(text) != word:
        raise ValueError(f"not an encoded word: {word!r}")
    return text


def tenant_tag(org: str, workspace: str, deployment: str | None = None) -> str:
    """The text between the braces: the encoded parts joined by `.`; reversed by `tenant_parts`."""
    parts = [("org", org), ("workspace", workspace)]
    if deployment is not None:
        parts.append(("deployment", deployment))
    for field, part in parts:
        if not isinstance(part, str):
            raise InvalidInput(
                f"tenant {field} must be text, not {type(part).__name__}", field=field
            )
        if not part.strip():
            raise InvalidInput(f"tenant {field} is required: it is empty or blank", field=field)
        try:
            length = len(part.encode())
        except UnicodeEncodeError:
            message = f"tenant {field} holds a lone surrogate, which is not text in UTF-8"
            raise InvalidInput(message, field=field) from None
        if length > TENANT_PART_BYTES_MAX:
            raise InvalidInput(
                f"tenant {field} is {length} bytes long; at most {TENANT_PART_BYTES_MAX}",
                field=field,
                limit=TENANT_PART_BYTES_MAX,
            )
    return ".".join([encode_word(part) for _, part in parts])


def tenant_parts(tag: str) -> tuple[str, str, str | None]:
    """Org, workspace and deployment of an encoded tenant; ValueError for any other text."""
    parts = [decode_word(word) for word in tag.split(".")]
    if len(parts) == 2:
        return parts[0], parts[1], None
    if len(parts) == 3:
        return parts[0], parts[1], parts[2]
    raise ValueError(f"not an encoded tenant: {tag!r}")


def _check_prefix(prefix: str) -> str:
    if not isinstance(prefix, str) or not PREFIX_PATTERN.match(prefix):
        raise InvalidInput(
            "prefix must be 1 to 32 characters of A-Z a-z 0-9 _ -", field="prefix", limit=32
        )
    return prefix


class Keys:
    """The keys of one tenant."""

    __slots__ = (
        "fence",
        "gate_dataset",
        "gate_dead",
        "gate_docs",
        "gate_done",
        "gate_expiring",
        "gate_facts",
        "gate_runs",
        "gate_state",
        "gate_unknown",
        "gate_updated",
        "idempotency_docs",
        "idempotency_due",
        "lease_docs",
        "lease_due",
        "lease_names",
        "ledger_docs",
        "ledger_guards",
        "ledger_index",
        "outbox_claims",
        "outbox_claims_end",
        "outbox_dead",
        "outbox_dedupe",
        "outbox_dedupe_end",
        "outbox_docs",
        "outbox_done",
        "outbox_errors",
        "outbox_lanes",
        "outbox_state",
        "outbox_tally",
        "outbox_unknown",
        "tenant",
        "tenant_barrier",
    )

    def __init__(self, prefix: str, tag: str) -> None:
        self.tenant = f"{_check_prefix(prefix)}:{{{tag}}}"
        self.fence = f"{self.tenant}:fence"
        for concept, nouns in (
            ("lease", "docs due names"),
            ("idempotency", "docs due"),
            ("ledger", "docs index guards"),
            ("gate", "docs state facts expiring unknown dead done updated runs dataset"),
            ("tenant", "barrier"),
            (
                "outbox",
                "docs state lanes done dead unknown errors tally dedupe dedupe_end claims claims_end",
            ),
        ):
            for noun in nouns.split():
                setattr(self, f"{concept}_{noun}", f"{self.tenant}:{concept}:{noun}")

    # Annotated for readers and type checkers; the values are set in one loop above.
    fence: str
    tenant: str
    gate_dataset: str
    gate_dead: str
    gate_docs: str
    gate_done: str
    gate_expiring: str
    gate_facts: str
    gate_runs: str
    gate_state: str
    gate_unknown: str
    gate_updated: str
    idempotency_docs: str
    idempotency_due: str
    ledger_docs: str
    ledger_guards: str
    ledger_index: str
    lease_docs: str
    lease_due: str
    lease_names: str
    outbox_claims: str
    outbox_claims_end: str
    outbox_dead: str
    outbox_dedupe: str
    outbox_dedupe_end: str
    outbox_docs: str
    outbox_done: str
    outbox_errors: str
    outbox_lanes: str
    outbox_state: str
    outbox_tally: str
    outbox_unknown: str
    tenant_barrier: str

    def named(self, concept: str, noun: str, route: str) -> str:
        """The key that a command of a concept calls by this noun."""
        if noun == "fence":
            return self.fence
        if noun == "due" and concept == "outbox":
            return self.outbox_due(route)
        if concept == "ledger" and noun in ("log", "events"):
            return f"{self.tenant}:ledger:{noun}:{route}"
        if concept == "ledger" and not hasattr(self, f"ledger_{noun}"):
            # An intent is a record of the ledger, kept by the gate.
            concept, noun = "gate", "docs" if noun == "intents" else noun
        key: str = getattr(self, f"{concept}_{noun}")
        return key

    def outbox_due(self, route: str) -> str:
        """The line of one route; a route is `encode_word(lane):encode_word(target)`."""
        return f"{self.tenant}:outbox:due:{route}"

    @property
    def hint_channel(self) -> str:
        """Where hints are published: a channel, which holds nothing."""
        return f"{self.tenant}:outbox:hint"


@lru_cache(maxsize=4096)
def route_of(lane: str, target: str) -> str:
    """Lane and target as the one word that keys, rows and tallies hold."""
    return f"{encode_word(lane)}:{encode_word(target)}"


def route_parts(route: str) -> tuple[str, str]:
    """Lane and target of a route word."""
    lane, target = route.split(":")
    return decode_word(lane), decode_word(target)


def registry_keys(prefix: str) -> dict[str, str]:
    """The tenant registry, in a slot of its own: a tenant's tag always holds a `.`, this none."""
    base = f"{_check_prefix(prefix)}:{{tenants}}:tenant"
    return {noun: f"{base}:{noun}" for noun in ("names", "seen", "clocks")}


@lru_cache(maxsize=4096)
def barrier_key(prefix: str, tag: str) -> str:
    """What `tenant/barrier` writes to and leaves empty; tag "" = beside the registry."""
    return Keys(prefix, tag or "tenants").tenant_barrier


def hint_pattern(prefix: str) -> str:
    """What matches the hint channels of all tenants; a prefix holds nothing that globs."""
    return f"{_check_prefix(prefix)}:{{*}}:outbox:hint"


def hint_tenant(prefix: str, channel: str) -> str | None:
    """The encoded tenant of a hint channel; None for any other channel."""
    start, end = f"{prefix}:{{", "}:outbox:hint"
    if not (channel.startswith(start) and channel.endswith(end)):
        return None
    return channel[len(start) : -len(end)]


def key_pattern(prefix: str, tag: str | None = None) -> str:
    """What matches all keys of one tenant, or of all; neither holds anything that globs."""
    return f"{_check_prefix(prefix)}:{{{'*' if tag is None else tag}}}:*"


def tenant_of_key(prefix: str, key: str) -> str | None:
    """The encoded tenant of a key; None for the registry's keys and for any other key."""
    start = f"{prefix}:{{"
    tag = key.removeprefix(start).partition("}")[0] if key.startswith(start) else ""
    return tag if "." in tag else None
