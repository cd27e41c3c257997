"""What is not shown, and what stands for it: redaction, digests and merged metadata.

Source: spec/reliability 0.2, 4.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leasekit import codec

__all__ = ["REDACTED", "digest", "merged", "redacted", "short16"]

REDACTED = "[redacted]"
SECRET_PARTS = (
    *("token", "secret", "password", "authorization", "api_key", "apikey", "private_key"),
)


def redacted(value: Any) -> Any:
    """A JSON value without what its keys say is secret, whatever its type, on every level."""
    if isinstance(value, Mapping):
        return {
            key: REDACTED if _is_secret(key) else redacted(inner) for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted(inner) for inner in value]
    return value


def _is_secret(key: str) -> bool:
    name = codec.normalised(key)
    return any(part in name for part in SECRET_PARTS)


def digest(value: Any) -> str:
    """DIG of a JSON value, of the value as it is, not redacted."""
    return codec.digest(value, "value")


def short16(text: str) -> str:
    """The first 16 characters of a digest, without its prefix."""
    return text.removeprefix("sha256:")[:16]


def merged(metadata: Any, more: Mapping[str, Any], *, wrapped_as: str = "previous_metadata") -> Any:
    """Metadata with more in it (rule M); what is no object is kept under a key of its own."""
    if metadata is None:
        base: dict[str, Any] = {}
    elif isinstance(metadata, Mapping):
        base = dict(metadata)
    else:
        base = {wrapped_as: metadata}
    return base | dict(more)
