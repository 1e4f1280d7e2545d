"""Dead letters keep the original, say why and where from, and always fit into a Kafka record."""

from __future__ import annotations

import inspect

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.ingest import dead_letter
from node.ingest.dead_letter import Reason, bounded_text, dead_letter_record, model_failure_value
from node.kernel import limits
from node.kernel.types import DeadLetter


def letter(**changes: object) -> DeadLetter:
    known = {"reason": Reason.NOT_JSON, "detail": "cut off", "topic": "events", "partition": 3, "offset": 17}
    rest = {"timestamp_ms": -1, "key": b"k", "value": b"{"}
    return DeadLetter(**{**known, **rest, **changes})  # type: ignore[arg-type]


def test_a_record_says_why_and_where_from() -> None:
    key, value, headers = dead_letter_record(letter(), "node-1")
    assert (key, value) == (b"k", b"{")
    assert dict(headers) == {
        "reason": b"not_json",
        "detail": b"cut off",
        "source_topic": b"events",
        "source_partition": b"3",
        "source_offset": b"17",
        "source_timestamp": b"-1",
        "node": b"node-1",
    }


def test_the_model_is_named_when_a_model_failed() -> None:
    _, _, headers = dead_letter_record(letter(reason=Reason.MODEL_FAILED, model="shop/bid"), "n")
    assert dict(headers)["model"] == b"shop/bid"


@pytest.mark.parametrize("key", [None, b"", b"k" * limits.DEAD_LETTER_KEY_BYTES_MAX])
@pytest.mark.parametrize("value", [None, b"", b"\xff\x00", b"v" * limits.DEAD_LETTER_BYTES_MAX])
def test_originals_within_the_bounds_are_kept_whole(key: bytes | None, value: bytes | None) -> None:
    kept_key, kept_value, headers = dead_letter_record(letter(key=key, value=value), "n")
    assert (kept_key, kept_value) == (key, value)
    assert not {"truncated", "key_truncated"} & set(dict(headers))


def test_larger_originals_are_cut_and_say_how_long_they_were() -> None:
    long_key, long_value = b"k" * (limits.DEAD_LETTER_KEY_BYTES_MAX + 1), b"v" * 5_000_000
    key, value, headers = dead_letter_record(letter(key=long_key, value=long_value), "n")
    assert key == long_key[:-1]
    assert value == long_value[: limits.DEAD_LETTER_BYTES_MAX]
    assert dict(headers)["truncated"] == b"5000000"
    assert dict(headers)["key_truncated"] == b"%d" % len(long_key)


@given(
    detail=st.text() | st.text(min_size=1).map(lambda text: text * 3000) | st.just("\ud800x"),
    key=st.none() | st.integers(0, 200_000).map(bytes),
    value=st.none() | st.integers(0, 3_000_000).map(bytes),
)
def test_every_record_fits_a_broker(detail: str, key: bytes | None, value: bytes | None) -> None:
    letters = letter(detail=detail, topic="t" * 249, model="m" * 300, key=key, value=value)
    kept_key, kept_value, headers = dead_letter_record(letters, "n" * 100)
    size = len(kept_key or b"") + len(kept_value or b"") + sum(len(name) + len(text) for name, text in headers)
    assert size < limits.MIB - 16 * limits.KIB
    assert len(dict(headers)["detail"]) <= limits.DEAD_LETTER_DETAIL_BYTES_MAX
    assert dict(headers)["detail"].decode() == bounded_text(detail)


@given(st.text(alphabet="aé日😀", max_size=2000))
def test_details_are_cut_between_characters(text: str) -> None:
    cut = bounded_text(text)
    assert cut == text or text.startswith(cut.removesuffix("…"))
    assert len(cut.encode()) >= min(len(text.encode()), limits.DEAD_LETTER_DETAIL_BYTES_MAX - 6)


def test_features_stand_for_an_event_whose_bytes_are_gone() -> None:
    value = model_failure_value("ann", {"amount": 1.5, "price": float("nan"), "sku": None, "name": "é"})
    assert msgspec.json.decode(value) == {
        "customer": "ann",
        "features": {"amount": 1.5, "price": None, "sku": None, "name": "é"},
    }


def test_every_reason_is_documented() -> None:
    source = inspect.getsource(dead_letter.Reason)
    for reason in Reason:
        assert reason.value == reason.name.lower()
        assert f'{reason.name} = "{reason.value}"\n    """' in source
