"""How names become keys: nothing that a caller names leaves its tenant, or meets another's."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from redis.crc import key_slot

from leasekit.errors import InvalidInput
from leasekit.keys import (
    TENANT_PART_BYTES_MAX,
    Keys,
    decode_word,
    encode_word,
    hint_pattern,
    hint_tenant,
    registry_keys,
    route_of,
    route_parts,
    tenant_parts,
    tenant_tag,
)

HOSTILE = [
    *(
        "}",
        "{",
        "{}",
        "*",
        "t?",
        "t[12]",
        "t1}:x",
        "a}b",
        "a b",
        "a\x00b",
        "a\r\nb",
        "\\",
        ":",
        ".",
    ),
    *("~", "~7d", "~~", "\U0001f600", "\u00e9", "e\u0301", "\u202eabc", "\u05d0\u05d1", "A", "a"),
    *("-", "_", "\xa0x", "\U0010ffff", "\ufffd", "tenants", "../..", "%s", "]]"),
]

# Any text that is a tenant part: not blank, at most 64 bytes of UTF-8.
parts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=64).filter(
    lambda text: text.strip() and len(text.encode()) <= TENANT_PART_BYTES_MAX
)
tenants = st.tuples(parts, parts, st.none() | parts)


def every_key(keys: Keys) -> list[str]:
    """All keys of a tenant, with the line of one route."""
    nouns = [name for name in Keys.__slots__ if name != "tenant"]
    return [*(getattr(keys, name) for name in nouns), keys.outbox_due(route_of("a:}", "{b"))]


@given(st.text(st.characters(codec="utf-8")))
def test_a_word_gives_its_text_back(text: str) -> None:
    """Encoding loses nothing, and leaves nothing but letters, digits, _, - and ~."""
    word = encode_word(text)

    assert decode_word(word) == text
    assert re.fullmatch(r"[a-z0-9_~-]*", word)


@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")))
def test_two_texts_are_two_words(one: str, other: str) -> None:
    """Encoding is injective."""
    assume(one != other)
    assert encode_word(one) != encode_word(other)


@pytest.mark.parametrize(
    "word", ["A", "~", "~6", "~6G", "~7D", "~61", "a b", "é", "~c3", "~ff", "a\n", "{", "."]
)
def test_what_the_encoder_never_makes_is_refused(word: str) -> None:
    """A word has one spelling: ~61 for a plain a, capital hex and broken UTF-8 are no words."""
    with pytest.raises(ValueError, match=r"not an encoded word|can't decode"):
        decode_word(word)


@pytest.mark.parametrize(
    ("text", "word"),
    [("Mail", "~4dail"), ("é", "~c3~a9"), ("a.b", "a~2eb"), ("t1}:x", "t1~7d~3ax"), ("~", "~7e")],
)
def test_words_are_spelled_as_the_protocol_says(text: str, word: str) -> None:
    """The encoding is fixed by the data on disk."""
    assert encode_word(text) == word


@given(tenants)
def test_a_tag_gives_its_tenant_back(tenant: tuple[str, str, str | None]) -> None:
    """Org, workspace and deployment come back; a missing deployment is not an empty one."""
    assert tenant_parts(tenant_tag(*tenant)) == tenant


@given(tenants, tenants)
def test_two_tenants_are_two_tags(
    one: tuple[str, str, str | None], other: tuple[str, str, str | None]
) -> None:
    """No way to split names makes two tenants one."""
    assume(one != other)
    assert tenant_tag(*one) != tenant_tag(*other)


def test_parts_do_not_run_together() -> None:
    """A dot inside a part is not the dot between parts."""
    assert tenant_tag("a.b", "c") != tenant_tag("a", "b.c")
    assert tenant_tag("a", "b", "c") != tenant_tag("a.b", "c")
    assert tenant_tag("a", "b.c") != tenant_tag("a", "b", "c")


@pytest.mark.parametrize("tag", ["a", "", "a.b.c.d", "A.b", "a.~", "a:b.c"])
def test_no_tag_no_tenant(tag: str) -> None:
    """Text that no tenant has is refused, not guessed at."""
    with pytest.raises(ValueError, match="not an encoded"):
        tenant_parts(tag)


@pytest.mark.parametrize("name", HOSTILE)
def test_all_keys_of_a_tenant_are_in_one_slot(name: str) -> None:
    """Whatever its name holds, a tenant has one hash tag, whole and not empty."""
    tag = tenant_tag(name, "w", name)
    keys = every_key(Keys("lk", tag))

    assert {key_slot(key.encode()) for key in keys} == {key_slot(tag.encode())}
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"lk:\{[a-z0-9_~.-]+\}:[a-z0-9_~:-]+", key) for key in keys)


@given(tenants)
def test_any_tenant_is_in_one_slot(tenant: tuple[str, str, str | None]) -> None:
    """The slot is that of the tag, for every tenant that there can be."""
    tag = tenant_tag(*tenant)
    assert {key_slot(key.encode()) for key in every_key(Keys("lk", tag))} == {
        key_slot(tag.encode())
    }


def test_hostile_tenants_share_nothing() -> None:
    """Twins of form (composed and decomposed), of case and of escape are different tenants."""
    keys = [key for name in HOSTILE for key in every_key(Keys("lk", tenant_tag(name, "w")))]
    assert len(set(keys)) == len(keys)


def test_the_registry_is_no_tenant() -> None:
    """Its tag holds no dot, so no tenant can be named like it."""
    registry = registry_keys("lk")

    assert registry["names"] == "lk:{tenants}:tenant:names"
    with pytest.raises(ValueError, match="not an encoded tenant"):
        tenant_parts("tenants")


@pytest.mark.parametrize("field", ["org", "workspace", "deployment"])
@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "empty or blank"),
        (" \t\n", "empty or blank"),
        ("\u2003", "empty or blank"),
        ("a" * 65, "is 65 bytes long; at most 64"),
        ("é" * 33, "is 66 bytes long; at most 64"),
        ("\ud800", "lone surrogate"),
        (b"a", "must be text, not bytes"),
        (7, "must be text, not int"),
        (True, "must be text, not bool"),
    ],
)
def test_a_bad_part_is_refused_by_name(field: str, value: object, says: str) -> None:
    """Each part of a tenant is checked, and the error names it."""
    named: dict[str, object] = {"org": "o", "workspace": "w", "deployment": "d"} | {field: value}
    with pytest.raises(InvalidInput, match=f"tenant {field} .*{says}") as raised:
        tenant_tag(**named)  # type: ignore[arg-type]
    assert raised.value.field == field


@pytest.mark.parametrize("part", ["a" * 64, "é" * 32, "\U0001f600" * 16, " a "])
def test_the_longest_part_is_kept_whole(part: str) -> None:
    """64 bytes are allowed, and blanks around a name belong to it."""
    assert tenant_parts(tenant_tag(part, "w")) == (part, "w", None)


@pytest.mark.parametrize("missing", ["org", "workspace"])
def test_org_and_workspace_are_required(missing: str) -> None:
    """None is no name."""
    with pytest.raises(InvalidInput, match=f"tenant {missing} must be text, not NoneType"):
        tenant_tag(**({"org": "o", "workspace": "w"} | {missing: None}))


@pytest.mark.parametrize("prefix", ["", "a:b", "a{", "a}", "a b", "é", "a" * 33, "a\n", "*"])
def test_a_prefix_cannot_move_a_key(prefix: str) -> None:
    """A prefix cannot bring a hash tag of its own, or match another's."""
    with pytest.raises(InvalidInput, match="prefix must be 1 to 32 characters"):
        Keys(prefix, "o.w")
    with pytest.raises(InvalidInput, match="prefix must be 1 to 32 characters"):
        registry_keys(prefix)


@given(
    st.text(st.characters(codec="utf-8"), min_size=1),
    st.text(st.characters(codec="utf-8"), min_size=1),
)
def test_a_route_gives_lane_and_target_back(lane: str, target: str) -> None:
    """A colon inside a name is not the colon between them."""
    assert route_parts(route_of(lane, target)) == (lane, target)


def test_routes_do_not_run_together() -> None:
    """(a:b, c) and (a, b:c) are two routes."""
    assert route_of("a:b", "c") != route_of("a", "b:c")
    assert route_of("mail", "alice") == "mail:alice"


@given(tenants)
def test_a_hint_channel_gives_its_tenant_back(tenant: tuple[str, str, str | None]) -> None:
    """The channel of a tenant names it, under its own prefix only, and matches the pattern."""
    tag = tenant_tag(*tenant)
    channel = Keys("lk", tag).hint_channel

    assert hint_tenant("lk", channel) == tag
    assert hint_tenant("l", channel) is None
    assert hint_tenant("lk", channel + "s") is None
    start, _, end = hint_pattern("lk").partition("*")
    assert channel.startswith(start)
    assert channel.endswith(end)
