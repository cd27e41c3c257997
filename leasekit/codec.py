"""Values in and out: ids and tokens, canonical JSON, hashes, and the checks that refuse bad input.

Everything a caller passes is checked here, before anything is sent, and named in the error: field,
limit, value (never a payload or a token). JSON is written canonically (keys sorted, compact, UTF-8),
so that equal values are equal bytes. The hashes are those of spec/reliability 0.2.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from leasekit.errors import InvalidInput

__all__ = [
    "canonical_json",
    "fingerprint",
    "hash_length_prefixed",
    "hash_terminated",
    "new_id",
    "new_token",
]

ID_BYTES_MAX = 200
NAME_BYTES_MAX = 200
TOKEN_LENGTH = 22
TOKENS_AT_A_TIME = 64
PAYLOAD_BYTES_DEFAULT = 256 * 1024
PAYLOAD_BYTES_MAX = 1024 * 1024
DOCUMENT_BYTES_MAX = 64 * 1024
DEPTH_MAX = 100
ERROR_TEXT_MAX = 2_000
BATCH_MAX = 1_000
LEASE_MS_MAX = 12 * 3_600_000
NOW_MS_MAX = 4_102_444_800_000
INSTANT_MS_MAX = 9_007_199_254_740_991
DURATION_MS_MAX = 3_155_760_000_000

# The same keys in the same order: for what was checked part by part.
sorted_json = msgspec.json.Encoder(order="sorted").encode

INTEGER_MIN = -(2**63)
INTEGER_MAX = 2**64 - 1

_DIGITS_TO_ZERO = bytes(48 if 48 <= byte <= 57 else 32 for byte in range(256))
_LONG_NUMBER = b"0" * 19
_BASE32 = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [first + second for first in _BASE32 for second in _BASE32]
_COUNTER_MAX = 2**40 - 1
_ID_CHARACTERS = frozenset(_BASE32)
_TOKEN_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")
_ID_LENGTH = 26
_TO_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


class _IdSource:
    """Time-ordered ids, strictly rising within a process, also within a millisecond.

    48 bits of milliseconds, 40 random bits chosen anew each millisecond, and a counter of 40 bits that
    starts at a random place: most ids cost only the encoding of the counter. A child process starts
    anew, so that two processes never count on from one number.
    """

    def __init__(self) -> None:
        self._start_anew()
        os.register_at_fork(after_in_child=self._start_anew)

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._at_ms = 0
        self._counter = 0
        self._prefix = ""

    def next(self) -> str:
        now_ms = time.time_ns() // 1_000_000
        with self._lock:
            self._counter += 1
            if now_ms > self._at_ms or self._counter > _COUNTER_MAX:
                # A clock that steps back changes nothing: the last millisecond goes on.
                self._at_ms = max(now_ms, self._at_ms + 1)
                noise = int.from_bytes(os.urandom(10))
                self._prefix = _base32((self._at_ms << 40) | (noise >> 40), 18)
                self._counter = noise & (_COUNTER_MAX >> 1)
            number = self._counter
            return (
                self._prefix
                + _PAIRS[number >> 30]
                + _PAIRS[number >> 20 & 1023]
                + _PAIRS[number >> 10 & 1023]
                + _PAIRS[number & 1023]
            )


def _base32(number: int, length: int) -> str:
    """A number in `length` (even) characters that sort as the number does."""
    shifts = range(5 * (length - 2), -1, -10)
    return "".join([_PAIRS[number >> shift & 1023] for shift in shifts])


_ids = _IdSource()


def new_id() -> str:
    """A new row id: 26 characters that sort by time; strictly rising within a process."""
    return _ids.next()


class _TokenSource:
    """Tokens of 128 random bits; the system is asked for many at a time, a child process anew."""

    def __init__(self) -> None:
        self._ready: list[str] = []
        os.register_at_fork(after_in_child=self._ready.clear)

    def next(self) -> str:
        try:
            return self._ready.pop()
        except IndexError:
            noise = os.urandom(16 * TOKENS_AT_A_TIME)
            self._ready += [
                urlsafe_b64encode(noise[at : at + 16])[:TOKEN_LENGTH].decode()
                for at in range(0, len(noise), 16)
            ]
            return self._ready.pop()


_tokens = _TokenSource()


def new_token() -> str:
    """A new token: 128 random bits as 22 base64url characters."""
    return _tokens.next()


def check_id(value: object) -> str:
    """A row id of `new_id`'s form; InvalidInput for any other."""
    if (
        isinstance(value, str)
        and len(value) == _ID_LENGTH
        and value[0] < "8"
        and _ID_CHARACTERS.issuperset(value)
    ):
        return value
    raise InvalidInput(
        "id must come from leasekit.new_id() (26 characters that sort by time); "
        "a name of your own belongs into dedupe_key",
        field="id",
    )


def check_token(value: object, field: str = "token") -> str:
    """A token of `new_token`'s form; InvalidInput for any other. The value is never shown."""
    if (
        isinstance(value, str)
        and len(value) == TOKEN_LENGTH
        and _TOKEN_CHARACTERS.issuperset(value)
    ):
        return value
    raise InvalidInput(
        f"{field} must be 22 base64url characters, as leasekit.new_token() makes them",
        field=field,
        limit=TOKEN_LENGTH,
    )


def check_text(value: object, field: str, *, bytes_max: int = NAME_BYTES_MAX) -> str:
    """A text that is not blank and not too long; InvalidInput naming the field."""
    if not isinstance(value, str):
        raise InvalidInput(f"{field} must be text, not {type(value).__name__}", field=field)
    # The words of spec/outbox 1.4: a caller of that system sees the message it knows.
    if not value or value.isspace():
        raise InvalidInput(f"{field} is required", field=field)
    if value.isascii():
        length = len(value)
    else:
        try:
            length = len(value.encode())
        except UnicodeEncodeError:
            message = f"{field} holds a lone surrogate, which is not text in UTF-8"
            raise InvalidInput(message, field=field) from None
    if length > bytes_max:
        raise InvalidInput(
            f"{field} is {length} bytes long; at most {bytes_max}", field=field, limit=bytes_max
        )
    return value


def check_whole(value: object, field: str, least: int, most: int) -> int:
    """A whole number within bounds, no boolean; InvalidInput naming field, bounds and value."""
    if type(value) is int and least <= value <= most:
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidInput(
            f"{field} must be a whole number, not {type(value).__name__}", field=field
        )
    if not least <= value <= most:
        raise InvalidInput(
            f"{field} must be between {least} and {most}, not {value}",
            field=field,
            limit=least if value < least else most,
        )
    return value


def refuse_bytes(value: object, field: str) -> None:
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise InvalidInput(
            f"{field} must be a JSON value, not bytes: decode it, or send base64 text", field=field
        )


def canonical_json(value: object, field: str, *, bytes_max: int) -> bytes:
    """Canonical JSON of a value; InvalidInput for what JSON cannot carry or is too large.

    Keys sorted, compact, UTF-8; 1 and 1.0 differ. NaN, infinities, integers beyond 64 bits, lone
    surrogates, more than DEPTH_MAX levels, keys that are no text, and bytes as the whole value are
    refused. Inside of a value, what has a usual form in JSON (dates, UUIDs; bytes as base64) gets it.
    """
    refuse_bytes(value, field)
    try:
        encoded = sorted_json(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidInput(f"{field} is not a JSON value: {error}", field=field) from None
    # The encoder writes NaN as null, any integer in full, and nests as deep as this stack allows,
    # which may be deeper than the reader's. Looking is cheap, walking is not.
    is_suspect = (
        b"null" in encoded
        or _LONG_NUMBER in encoded.translate(_DIGITS_TO_ZERO)
        or encoded.count(b"[") + encoded.count(b"{") > DEPTH_MAX
    )
    if is_suspect and (problem := _find_problem(value)):
        raise InvalidInput(f"{field} holds {problem}", field=field)
    if len(encoded) > bytes_max:
        raise InvalidInput(
            f"{field} is {len(encoded)} bytes of JSON; at most {bytes_max}",
            field=field,
            limit=bytes_max,
        )
    return encoded


def _find_problem(value: object) -> str | None:
    """What in a value JSON cannot carry faithfully, or None; level by level, without recursion."""
    level = [value]
    for _ in range(DEPTH_MAX + 1):
        inner: list[object] = []
        for part in level:
            if isinstance(part, float) and not math.isfinite(part):
                return "NaN or an infinity, which JSON has not"
            if isinstance(part, int) and not INTEGER_MIN <= part <= INTEGER_MAX:
                return "an integer beyond 64 bits"
            if isinstance(part, msgspec.Struct):
                inner += msgspec.structs.astuple(part)
            elif isinstance(part, dict):
                inner += part.values()
            elif isinstance(part, (list, tuple, set, frozenset)):
                inner += part
        if not inner:
            return None
        level = inner
    return f"more than {DEPTH_MAX} levels of lists and objects"


decode_json: Callable[[bytes], Any] = msgspec.json.Decoder().decode


def error_text(value: object) -> bytes:
    """An error text as a JSON string, cut to ERROR_TEXT_MAX: a nack must not fail for its text."""
    text = value if isinstance(value, str) else str(value)
    if len(text) > ERROR_TEXT_MAX:
        text = text[: ERROR_TEXT_MAX - 1] + "…"
    return msgspec.json.encode(text.encode(errors="replace").decode())


def normalised(text: str) -> str:
    """nk of spec/reliability 0.2: trimmed, `-` as `_`, ASCII letters in lower case."""
    return ascii_lower(text.strip().replace("-", "_"))


def ascii_lower(text: str) -> str:
    """ASCII letters in lower case, all others as they are."""
    return text.translate(_TO_LOWER)


def hash_terminated(parts: list[str]) -> str:
    """H0 of spec/reliability 0.2: SHA-256 over each part's UTF-8 bytes and one zero byte; hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


def digest(value: object, field: str) -> str:
    """DIG of spec/reliability 0.2: H0 of the canonical JSON of a value <= 1 MiB, with its prefix."""
    encoded = canonical_json(value, field, bytes_max=PAYLOAD_BYTES_MAX)
    return "sha256:" + hash_terminated([encoded.decode()])


def hash_length_prefixed(parts: list[str]) -> str:
    """HL of spec/reliability 0.2: SHA-256 over each part's length (8 bytes) and UTF-8 bytes; hex."""
    return _length_prefixed([part.encode() for part in parts]).hex()


def fingerprint(*parts: str) -> str:
    """What tells one request from another under the same key (spec/reliability 2.2)."""
    return "sha256:" + hash_length_prefixed(list(parts))


def short_digest(*parts: bytes) -> str:
    """128 bits of a length-prefixed SHA-256 as 22 base64url characters."""
    return urlsafe_b64encode(_length_prefixed(parts)[:16])[:TOKEN_LENGTH].decode()


def _length_prefixed(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8))
        digest.update(part)
    return digest.digest()
