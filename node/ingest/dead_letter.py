"""(P) Dead letters: why a record could not be used, and the Kafka record that keeps it.

The record's key is the original key; its value the original bytes, cut to DEAD_LETTER_BYTES_MAX; its headers
say why, and where the original is.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from node.kernel import limits
from node.kernel.types import DeadLetter

Headers = list[tuple[str, bytes]]


class Reason(StrEnum):
    """Why a record became a dead letter: the closed set that dashboards and alerts may rely on."""

    NO_VALUE = "no_value"
    """The record has no value (a tombstone); source topics hold events only."""
    TOO_LARGE = "too_large"
    """Over EVENT_BYTES_MAX; it was not read."""
    TOO_DEEP = "too_deep"
    """Arrays and objects nested over EVENT_DEPTH_MAX."""
    NOT_UTF8 = "not_utf8"
    """JSON is UTF-8: this is UTF-16, Latin-1, compressed or binary data, or begins with a byte order mark."""
    NOT_JSON = "not_json"
    """Not one JSON value: cut off, trailing data, NaN or Infinity, a lone surrogate…"""
    NOT_AN_OBJECT = "not_an_object"
    """JSON, but an array, a number, a text, a boolean or null."""
    MISSING_TYPE = "missing_type"
    """The event's type is missing, null or empty."""
    UNKNOWN_TYPE = "unknown_type"
    """The type is not in `[events] types`, and `unknown_types` is "dead_letter"."""
    MISSING_CUSTOMER = "missing_customer"
    """The customer is missing, null or empty."""
    BAD_CUSTOMER = "bad_customer"
    """The customer is over CUSTOMER_BYTES_MAX or has control characters."""
    BAD_TIME = "bad_time"
    """The time is absurd beside the Kafka timestamp, outside 1970 to 2200, or there is none at all."""
    WRONG_TYPE = "wrong_type"
    """A configured field holds another type than declared: a text where a number is due, and so on."""
    NUMBER_TOO_LARGE = "number_too_large"
    """A number is beyond NUMBER_MAGNITUDE_MAX, where sums are no longer exact."""
    TEXT_TOO_LONG = "text_too_long"
    """A text field is over TEXT_BYTES_MAX."""
    MODEL_FAILED = "model_failed"
    """The event was good, and a model raised, crashed or ran past its deadline on it; `model` says which."""


def dead_letter_record(letter: DeadLetter, node: str) -> tuple[bytes | None, bytes | None, Headers]:
    """Key, value and headers of the record for the dead-letter topic, at most some KiB over DEAD_LETTER_BYTES_MAX.

    Header values are UTF-8; numbers are decimal digits. `truncated`, present only on a value that was cut,
    is its original length in bytes; `key_truncated` the same of the key.
    """
    headers: Headers = [
        ("reason", letter.reason.encode()),
        ("detail", bounded_text(letter.detail).encode()),
        ("source_topic", letter.topic.encode()),
        ("source_partition", b"%d" % letter.partition),
        ("source_offset", b"%d" % letter.offset),
        ("source_timestamp", b"%d" % letter.timestamp_ms),
        ("node", node.encode()),
    ]
    if letter.model:
        headers.append(("model", letter.model.encode()))
    key, value = letter.key, letter.value
    if value is not None and len(value) > limits.DEAD_LETTER_BYTES_MAX:
        headers.append(("truncated", b"%d" % len(value)))
        value = value[: limits.DEAD_LETTER_BYTES_MAX]
    if key is not None and len(key) > limits.DEAD_LETTER_KEY_BYTES_MAX:
        headers.append(("key_truncated", b"%d" % len(key)))
        key = key[: limits.DEAD_LETTER_KEY_BYTES_MAX]
    return key, value, headers


def model_failure_value(customer: str, features: Mapping[str, float | str | None]) -> bytes:
    """What stands for the event in the dead letter of a failed model when its bytes are gone: JSON, NaN as null."""
    return msgspec.json.encode({"customer": customer, "features": dict(features)})


def bounded_text(detail: str) -> str:
    """At most DEAD_LETTER_DETAIL_BYTES_MAX bytes of UTF-8, cut between characters; lone surrogates become '?'."""
    data = detail.encode(errors="replace")
    if len(data) <= limits.DEAD_LETTER_DETAIL_BYTES_MAX:
        return data.decode()
    return data[: limits.DEAD_LETTER_DETAIL_BYTES_MAX - len("…".encode())].decode(errors="ignore") + "…"
