"""Values in and out: ids, tokens, canonical JSON, hashes with their golden vectors, and checks."""

from __future__ import annotations

import json
import os
import re
import threading
from typing import Any

import msgspec
import pytest
import time_machine
from hypothesis import given
from hypothesis import strategies as st

from leasekit import codec
from leasekit.errors import InvalidInput
from leasekit.idempotency import record_id

TWO_POW_53 = 2**53
CANARY = "correct-horse-battery-staple"

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(codec.INTEGER_MIN, codec.INTEGER_MAX)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=20,
)


def canonical(value: object, bytes_max: int = 1_000_000) -> bytes:
    return codec.canonical_json(value, "payload", bytes_max=bytes_max)


# --- ids and tokens -------------------------------------------------------------------------------


def test_ids_rise_strictly() -> None:
    """Each id is above the one before, also many within one millisecond."""
    ids = [codec.new_id() for _ in range(5_000)]
    assert ids == sorted(set(ids))


def test_ids_rise_while_the_clock_steps_back() -> None:
    """The order of ids is the order of their making, whatever the clock does."""
    with time_machine.travel(2_000, tick=False):
        later = codec.new_id()
    with time_machine.travel(1_000, tick=False):
        assert codec.new_id() > later


def test_ids_sort_by_time() -> None:
    """An id of a later millisecond is above all of an earlier one."""
    sources = [codec._IdSource() for _ in range(2)]
    with time_machine.travel(1_000, tick=False):
        early = [sources[0].next() for _ in range(100)]
    with time_machine.travel(1_000.001, tick=False):
        late = [sources[1].next() for _ in range(100)]
    assert max(early) < min(late)


def test_ids_of_threads_are_all_different() -> None:
    """Threads share one source without taking the same id twice."""
    made: list[list[str]] = [[] for _ in range(4)]

    def make(place: list[str]) -> None:
        place.extend(codec.new_id() for _ in range(1_000))

    threads = [threading.Thread(target=make, args=[place]) for place in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({one for place in made for one in place}) == 4_000
    assert all(place == sorted(place) for place in made)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_makes_ids_and_tokens_of_its_own() -> None:
    """After a fork, parent and child make nothing twice, although both have the same past."""
    with time_machine.travel(4_000_000_000, tick=False):
        codec.new_id()  # far ahead: from here on the source counts on from its last id
        codec.new_token()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        made = [make() for make in (codec.new_id, codec.new_token) for _ in range(200)]
        os.write(writing, " ".join(made).encode())
        os._exit(0)
    os.close(writing)
    own = {make() for make in (codec.new_id, codec.new_token) for _ in range(200)}
    with os.fdopen(reading) as pipe:
        theirs = set(pipe.read().split())
    os.waitpid(child, 0)

    assert len(theirs) == 400
    assert not own & theirs
    codec._ids._start_anew()


def test_ids_have_one_form() -> None:
    """26 characters of the base-32 alphabet, the first below 8; new_id passes its own check."""
    assert re.fullmatch("[0-7][0-9a-hjkmnp-tv-z]{25}", codec.new_id())
    assert codec.check_id(last := "7" + "z" * 25) == last


@pytest.mark.parametrize(
    "value",
    [
        *("", "m1", "0" * 25, "0" * 27, "8" + "0" * 25, "0" * 25 + "i", "0" * 25 + "A", " " * 26),
        *("0" * 25 + "\n", "0" * 25 + "é", "0" * 25 + "\x00", b"0" * 26, 7, True, None),
    ],
)
def test_any_other_id_is_refused(value: object) -> None:
    """A caller's own names go into dedupe_key; the message says so."""
    with pytest.raises(InvalidInput, match=r"leasekit\.new_id\(\).*dedupe_key") as raised:
        codec.check_id(value)
    assert raised.value.field == "id"


def test_tokens_are_random_and_of_one_form() -> None:
    """22 base64url characters that no two calls share."""
    tokens = {codec.new_token() for _ in range(1_000)}
    assert len(tokens) == 1_000
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{22}", token) for token in tokens)


@pytest.mark.parametrize(
    "value",
    ["", CANARY[:21], CANARY[:23], "a" * 21 + "=", "a" * 21 + " ", "a" * 21 + "é", b"a" * 22, None],
)
def test_any_other_token_is_refused_and_not_shown(value: object) -> None:
    """The error names the field and the length, never the value."""
    with pytest.raises(InvalidInput, match="claim_id must be 22 base64url characters") as raised:
        codec.check_token(value, "claim_id")
    assert raised.value.field == "claim_id"
    assert CANARY[:12] not in str(raised.value)


# --- JSON -----------------------------------------------------------------------------------------


@given(json_values)
def test_json_comes_back_as_it_went(value: Any) -> None:
    """What is accepted is kept: the same value, with 1 still 1 and 1.0 still 1.0."""
    back = codec.decode_json(canonical(value))
    assert back == value
    assert json.dumps(back, sort_keys=True) == json.dumps(value, sort_keys=True)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), st.integers(0, 9), max_size=6))
def test_the_order_of_keys_does_not_matter(value: dict[str, int]) -> None:
    """Equal objects are equal bytes, however they were built."""
    assert canonical(dict(reversed(value.items()))) == canonical(value)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (None, "null"),
        (True, "true"),
        ("", '""'),
        ({"b": 1, "a": [1, 1.0, "é/\n\x00"]}, '{"a":[1,1.0,"é/\\n\\u0000"],"b":1}'),
        ({"a": {"z": None, "y": {}}}, '{"a":{"y":{},"z":null}}'),
        (2**64 - 1, "18446744073709551615"),
        (-(2**63), "-9223372036854775808"),
        (1e100, "1e100"),
    ],
)
def test_json_is_compact_and_sorted(value: object, encoded: str) -> None:
    """Sorted keys, no blanks, UTF-8 as it is."""
    assert canonical(value) == encoded.encode()


@pytest.mark.parametrize(
    ("one", "other"), [(1, 1.0), (1, True), (0, None), ("1", 1), ([1, 2], [2, 1]), ({}, [])]
)
def test_different_values_are_different_bytes(one: object, other: object) -> None:
    """Number form and array order count, as in spec/outbox 1.5.1."""
    assert canonical(one) != canonical(other)


class Thing(msgspec.Struct):
    value: Any


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (float("nan"), "NaN or an infinity"),
        ([1, {"a": float("inf")}], "NaN or an infinity"),
        ({"a": None, "b": (-float("inf"),)}, "NaN or an infinity"),
        (Thing(float("nan")), "NaN or an infinity"),
        (2**64, "an integer beyond 64 bits"),
        ([-(2**63) - 1], "an integer beyond 64 bits"),
        ({"a": [{2**70}]}, "an integer beyond 64 bits"),
        (b"bytes", "not bytes"),
        (bytearray(b"bytes"), "not bytes"),
        ("\ud800", "payload is not a JSON value"),
        ({"\udfff": 1}, "payload is not a JSON value"),
        (object(), "payload is not a JSON value"),
        ({1: 2}, "payload is not a JSON value"),
        ({2**64: 1}, "payload is not a JSON value"),
        ({(1, 2): 1}, "payload is not a JSON value"),
    ],
)
def test_what_json_cannot_carry_is_refused(value: object, says: str) -> None:
    """Nothing is rounded, dropped or turned into null silently."""
    with pytest.raises(InvalidInput, match=says) as raised:
        canonical(value)
    assert raised.value.field == "payload"


def test_what_only_looks_like_trouble_is_kept() -> None:
    """A null and a long number inside of texts are no NaN and no big integer."""
    value = ["null", "12345678901234567890123", None, 1234567890.1234567890123]
    assert codec.decode_json(canonical(value)) == value


def nested(levels: int, core: object) -> object:
    for level in range(levels):
        core = [core] if level % 2 else {"a": core}
    return core


@pytest.mark.parametrize("core", [None, 1, "[" * 999])
def test_the_depth_limit_is_exact(core: object) -> None:
    """100 levels pass, one more is refused, whether or not the value is suspect otherwise."""
    deepest = nested(codec.DEPTH_MAX, core)

    assert codec.decode_json(canonical(deepest)) == deepest
    with pytest.raises(InvalidInput, match="payload holds more than 100 levels"):
        canonical([deepest])


def test_nesting_without_end_is_refused() -> None:
    """A value that is nested far too deep, or in itself, is refused and not a crash."""
    ring: list[Any] = []
    ring.append(ring)
    for value in (nested(500, None), nested(900, 1), nested(100_000, 1), ring):
        with pytest.raises(InvalidInput, match=r"payload (holds more than|is not a JSON value)"):
            canonical(value)


def test_many_brackets_are_not_depth() -> None:
    """A wide value is as good as a narrow one."""
    value = [[{}] for _ in range(1_000)]
    assert codec.decode_json(canonical(value)) == value


def test_the_size_limit_is_exact() -> None:
    """bytes_max bytes of JSON pass, one more is refused with both numbers; bytes, not characters."""
    assert len(canonical("é" * 4, 10)) == 10
    with pytest.raises(InvalidInput, match="payload is 10 bytes of JSON; at most 9") as raised:
        canonical("é" * 4, 9)
    assert raised.value.limit == 9


def test_a_refused_value_is_not_shown() -> None:
    """A payload is a secret, also in the error that refuses it."""
    for value in ([CANARY, float("nan")], {CANARY: 2**64}, [CANARY, object()], CANARY * 9):
        with pytest.raises(InvalidInput) as raised:
            canonical(value, 100)
        assert CANARY not in f"{raised.value!r} {raised.value.__cause__} {raised.value.limit}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("busy", "busy"),
        ("", ""),
        ("a\nb\x00", "a\nb\x00"),
        ("x" * 2_000, "x" * 2_000),
        ("x" * 2_001, "x" * 1_999 + "…"),
        ("\ud800", "?"),
        (ValueError("v"), "v"),
    ],
)
def test_an_error_text_always_fits(value: object, text: str) -> None:
    """A nack must not fail for its text: long ones are cut, what is not UTF-8 is replaced."""
    encoded = codec.error_text(value)
    assert codec.decode_json(encoded) == text
    assert b"\n" not in encoded


# --- hashes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "digest"),
    [
        (["a", "b"], "8fb20ef63ced4145fc2e983ffe597d1dcff39154c3bf21f0fa9dde6a0c50fdc9"),
        ([], "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        ([""], "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"),
    ],
)
def test_the_terminated_hash_has_its_golden_values(parts: list[str], digest: str) -> None:
    """H0 of spec/reliability, appendix A."""
    assert codec.hash_terminated(parts) == digest


def test_the_length_prefixed_hash_has_its_golden_value() -> None:
    """HL of spec/reliability, appendix A; where a part ends matters."""
    assert (
        codec.hash_length_prefixed(["a", "b"])
        == "3c9d591045bc8876f9d0399bbfb05c6a412096e906f73278f98406cd5dca86df"
    )
    assert codec.hash_length_prefixed(["ab", "c"]) != codec.hash_length_prefixed(["a", "bc"])


@pytest.mark.parametrize(
    ("identity", "digest"),
    [
        (
            ("org-a", "workspace-a", None, "webhook.provider_event", "evt-1"),
            "65a39849b41fa4917decb395692869e5b9f8fa6c9797020c046188371bbdee50",
        ),
        (
            ("org-a", "workspace-a", None, " webhook.provider_event\n", "\tevt-1 "),
            "65a39849b41fa4917decb395692869e5b9f8fa6c9797020c046188371bbdee50",
        ),
        (
            ("org-a", "workspace-a", None, "wait.wake", "wake-1"),
            "0dba23cf0d71c53f22003530215aa581a59eddf82f8b0938862eda5905061325",
        ),
        (
            ("org-b", "workspace-a", None, "wait.wake", "wake-1"),
            "021627e58beabd5c3fde8f66feb9153a6f3876534239998b68ae81680a94bbea",
        ),
        (
            ("örg", "w", None, "op", "k"),
            "f11768111ea30961117dfddd2bb3ba60375d0c97cc205dd34df95e9170ddd235",
        ),
    ],
)
def test_record_ids_have_their_golden_values(
    identity: tuple[str, str, str | None, str, str], digest: str
) -> None:
    """spec/reliability 2.2 and appendix A: operation and key are trimmed, tenants are not."""
    assert record_id(*identity) == f"idem_{digest}"


@pytest.mark.parametrize(
    ("parts", "digest"),
    [
        (
            ("trigger-a", "body_digest", "sha256:body"),
            "2be9b9c1eda407f6cd14eb07a7fd03dada2ff64e19676319adc173f94e31a1f0",
        ),
        (
            ("trigger-a", "provider_event_id", "evt-a", "sha256:body"),
            "9186fa6ac6abbc789da16cb34dc41b96db6614d7d5122f8e695d35a300e294e7",
        ),
    ],
)
def test_fingerprints_have_their_golden_values(parts: tuple[str, ...], digest: str) -> None:
    """spec/reliability, appendix A."""
    assert codec.fingerprint(*parts) == f"sha256:{digest}"


# --- checks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [True, False, 1.0, float("nan"), float("inf"), "1", "1e3", b"1", None, [1], 1 + 0j],
)
def test_a_whole_number_is_an_int_and_no_boolean(value: object) -> None:
    """Python's True == 1 and 1.0 == 1 are no numbers here."""
    says = f"lease_ms must be a whole number, not {type(value).__name__}"
    with pytest.raises(InvalidInput, match=says) as raised:
        codec.check_whole(value, "lease_ms", 0, 10)
    assert raised.value.field == "lease_ms"


@pytest.mark.parametrize("value", [0, 10, 5])
def test_bounds_are_inclusive(value: int) -> None:
    """Least and most are allowed."""
    assert codec.check_whole(value, "limit", 0, 10) == value


@pytest.mark.parametrize(
    ("value", "limit"),
    [(-1, 0), (TWO_POW_53, TWO_POW_53 - 1), (TWO_POW_53 + 1, TWO_POW_53 - 1), (2**64, 2**53 - 1)],
)
def test_beyond_the_bounds_is_refused(value: int, limit: int) -> None:
    """The error carries the bound that was passed; 2**53 - 1 is the last whole number of a script."""
    assert codec.check_whole(TWO_POW_53 - 1, "at", 0, codec.INSTANT_MS_MAX) == TWO_POW_53 - 1
    with pytest.raises(InvalidInput, match=f"at must be between .*, not {value}$") as raised:
        codec.check_whole(value, "at", 0, codec.INSTANT_MS_MAX)
    assert raised.value.limit == limit


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "lane is required"),
        ("  \t\u2003", "lane is required"),
        (None, "lane must be text, not NoneType"),
        (b"a", "lane must be text, not bytes"),
        (True, "lane must be text, not bool"),
        ("a" * 201, "lane is 201 bytes long; at most 200"),
        ("é" * 101, "lane is 202 bytes long; at most 200"),
        ("a\ud800", "lane holds a lone surrogate"),
    ],
)
def test_bad_text_is_refused(value: object, says: str) -> None:
    """Blank, too long in bytes, not text, or not UTF-8."""
    with pytest.raises(InvalidInput, match=says) as raised:
        codec.check_text(value, "lane")
    assert raised.value.field == "lane"


@pytest.mark.parametrize(
    "value", ["a" * 200, "é" * 100, " a ", "a\x00b", "a\r\nb", "\U0001f600", "\u202e", "%s]]"]
)
def test_any_other_text_is_kept_as_it_is(value: str) -> None:
    """Blanks around a text, control characters and any script belong to it."""
    assert codec.check_text(value, "lane") == value
