"""Whatever a record holds, it becomes columns or a refusal with the right reason, and nothing raises."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import tzset
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from node.columns import no_events, take
from node.config import Config, parse_config
from node.ingest.dead_letter import Reason
from node.ingest.decode import TIME_MS_MAX, Decoded, EventDecoder
from node.kernel import limits

NOW_MS = 1_770_000_000_000

CONFIG = """
[events]
types = ["search", "transaction"]
time = "meta.time"
TIME_UNIT
UNKNOWN
[events.fields]
amount = { path = "basket.amount", type = "number" }
items = { path = "basket.items", type = "number" }
sku = "text"
first = "boolean"
"""


def configured(time_unit: str = "ms", unknown: str = "ignore") -> Config:
    text = CONFIG.replace("TIME_UNIT", f'time_unit = "{time_unit}"').replace("UNKNOWN", f'unknown_types = "{unknown}"')
    return parse_config(text, Path("/nowhere"))


DECODER = EventDecoder(configured("ms").events)
STRICT = EventDecoder(configured("ms", "dead_letter").events)


def decode(values: Sequence[bytes | None], decoder: EventDecoder = DECODER, timestamp_ms: int = NOW_MS) -> Decoded:
    count = len(values)
    decoded = decoder.decode(
        values, np.full(count, timestamp_ms), np.arange(count) % 3, np.arange(count, dtype=np.int64) + 1000
    )
    assert len(decoded.events) + len(decoded.refusals) + decoded.ignored == count
    assert decoded.events.offsets.tolist() == [index + 1000 for index in decoded.indexes.tolist()]
    assert decoded.events.topics.tolist() == [index % 3 for index in decoded.indexes.tolist()]
    return decoded


def event(**changes: Any) -> bytes:
    """A good event; a change to `...` leaves the key out."""
    fields = {"type": "search", "customer": "ann", "meta": {"time": NOW_MS}, "sku": "a-1"} | changes
    return orjson.dumps({key: value for key, value in fields.items() if value is not ...})


def refused(value: bytes | None, decoder: EventDecoder = DECODER, timestamp_ms: int = NOW_MS) -> tuple[Reason, str]:
    """The refusal of one value, which must not depend on whether good events surround it."""
    alone = decode([value], decoder, timestamp_ms)
    among = decode([event(), value, event(customer="bob")], decoder, timestamp_ms)
    (refusal,) = alone.refusals
    assert [(r.index, r.reason, r.detail) for r in among.refusals] == [(1, refusal.reason, refusal.detail)]
    assert among.events.customers == ["ann", "bob"]
    assert among.events.rows.tolist() == [0, 1]
    return refusal.reason, refusal.detail


def taken(value: bytes, decoder: EventDecoder = DECODER, timestamp_ms: int = NOW_MS) -> dict[str, Any]:
    events = decode([value], decoder, timestamp_ms).events
    assert len(events) == 1
    columns = {name: column.tolist()[0] for name, column in events.fields.items()}
    return columns | {"customer": events.customers[events.rows[0]], "time_ms": int(events.times_ms[0])}


def test_columns_have_the_types_of_the_contract() -> None:
    values = [
        event(basket={"amount": 3, "items": 2.5}, first=True),
        event(customer="bob", type="transaction", sku=None, first=False, meta={"time": NOW_MS - 5}),
        event(customer=7, sku=..., basket=None),
        event(basket={"amount": None}),
    ]
    decoded = decode(values)
    events = decoded.events
    for column in (events.types, events.times_ms, events.rows, events.topics, events.offsets, decoded.indexes):
        assert column.dtype == np.int64
    assert events.types.tolist() == [0, 1, 0, 0]
    assert events.times_ms.tolist() == [NOW_MS, NOW_MS - 5, NOW_MS, NOW_MS]
    assert events.customers == ["ann", "bob", "7"]
    assert events.rows.tolist() == [0, 1, 2, 0]
    assert list(events.fields) == ["amount", "items", "sku", "first"]
    np.testing.assert_array_equal(events.fields["amount"], [3.0, math.nan, math.nan, math.nan])
    np.testing.assert_array_equal(events.fields["items"], [2.5, math.nan, math.nan, math.nan])
    np.testing.assert_array_equal(events.fields["first"], [1.0, 0.0, math.nan, math.nan])
    assert events.fields["amount"].dtype == events.fields["first"].dtype == np.float64
    assert events.fields["sku"].dtype == np.object_
    assert events.fields["sku"].tolist() == ["a-1", None, None, "a-1"]


def test_no_events_have_all_columns() -> None:
    events = decode([]).events
    empty = no_events(configured().schema())
    assert len(events) == len(empty) == 0
    for name, column in empty.fields.items():
        assert events.fields[name].dtype == column.dtype
        assert events.fields[name].shape == (0,)


def test_take_numbers_the_customers_anew() -> None:
    events = decode([event(customer=name) for name in ("ann", "bob", "eve", "bob")]).events
    part = take(events, np.array([3, 2]))
    assert (part.customers, part.rows.tolist(), part.offsets.tolist()) == (["bob", "eve"], [0, 1], [1003, 1002])
    assert take(events, events.rows == 1).customers == ["bob"]


DEEP = limits.EVENT_DEPTH_MAX

REFUSALS: list[tuple[Reason, bytes | None]] = [
    (Reason.NO_VALUE, None),
    (Reason.TOO_LARGE, event(note="x" * 5_000_000)),
    (Reason.TOO_LARGE, b" " * (limits.EVENT_BYTES_MAX + 1)),
    (Reason.TOO_DEEP, b'{"type":"search","customer":"ann","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    (Reason.TOO_DEEP, b'{"type":"search","customer":"ann","x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001),
    (Reason.TOO_DEEP, b"[" * 100_000),
    (Reason.TOO_DEEP, b'{"x":' + b"[" * DEEP + b"]" * DEEP + b"}"),
    (Reason.NOT_UTF8, event().decode().encode("utf-16")),
    (Reason.NOT_UTF8, b"\xef\xbb\xbf" + event()),
    (Reason.NOT_UTF8, b'{"type":"search","customer":"Z\xfcrich"}'),
    (Reason.NOT_UTF8, b'{"type":"search","customer":"ann","skipped":"\xff"}'),
    (Reason.NOT_UTF8, b'{"type":"search","customer":"ann","\xff":1}'),
    (Reason.NOT_UTF8, b'{"type":"search","customer":"ann","skipped":"\xed\xa0\x80"}'),
    (Reason.NOT_UTF8, b"\x1f\x8b\x08\x00"),
    (Reason.NOT_JSON, event().decode().encode("utf-16-le")),
    (Reason.NOT_JSON, b""),
    (Reason.NOT_JSON, b" \n"),
    (Reason.NOT_JSON, b"\x00"),
    (Reason.NOT_JSON, event()[:-1]),
    (Reason.NOT_JSON, event() + event()),
    (Reason.NOT_JSON, event() + b"\n" + event()),
    (Reason.NOT_JSON, event() + b","),
    (Reason.NOT_JSON, event() + b"\x00"),
    (Reason.NOT_JSON, b'{"type":"search","customer":"ann","basket":{"amount":NaN}}'),
    (Reason.NOT_JSON, b'{"type":"search","customer":"ann","basket":{"amount":-Infinity}}'),
    (Reason.NOT_JSON, b'{"type":"search","customer":"ann","skipped":NaN}'),
    (Reason.NOT_JSON, b'{"type":"search","customer":"ann","sku":"\\ud800"}'),
    (Reason.NOT_JSON, b'{"type":"search","customer":"ann","skipped":"\\ud800"}'),
    (Reason.NOT_JSON, b'{"type":"search","customer":"ann","sku":"a\nb"}'),
    (Reason.NOT_JSON, b'{"type":"search","customer":5,"amount":"x",]}'),
    (Reason.NOT_JSON, b'"' + b'\\"' * 200_000),
    (Reason.NOT_AN_OBJECT, b"null"),
    (Reason.NOT_AN_OBJECT, b"[]"),
    (Reason.NOT_AN_OBJECT, b"[" + event() + b"]"),
    (Reason.NOT_AN_OBJECT, b"17"),
    (Reason.NOT_AN_OBJECT, orjson.dumps(event().decode())),
    (Reason.MISSING_TYPE, b"{}"),
    (Reason.MISSING_TYPE, event(type=...)),
    (Reason.MISSING_TYPE, event(type=None)),
    (Reason.MISSING_TYPE, event(type="")),
    (Reason.MISSING_CUSTOMER, event(customer=...)),
    (Reason.MISSING_CUSTOMER, event(customer=None)),
    (Reason.MISSING_CUSTOMER, event(customer="")),
    (Reason.BAD_CUSTOMER, event(customer="a" * (limits.CUSTOMER_BYTES_MAX + 1))),
    (Reason.BAD_CUSTOMER, event(customer="é" * (limits.CUSTOMER_BYTES_MAX // 2 + 1))),
    (Reason.BAD_CUSTOMER, event(customer="a\x00b")),
    (Reason.BAD_CUSTOMER, event(customer="a\nb")),
    (Reason.BAD_CUSTOMER, event(customer="a\x85b")),
    (Reason.BAD_CUSTOMER, b'{"type":"search","customer":' + b"9" * 300 + b"}"),
    (Reason.WRONG_TYPE, event(type=5)),
    (Reason.WRONG_TYPE, event(customer=1.5)),
    (Reason.WRONG_TYPE, event(customer=True)),
    (Reason.WRONG_TYPE, event(customer=["ann"])),
    (Reason.WRONG_TYPE, event(basket={"amount": "3"})),
    (Reason.WRONG_TYPE, event(basket={"amount": True})),
    (Reason.WRONG_TYPE, event(basket=5)),
    (Reason.WRONG_TYPE, event(sku=5)),
    (Reason.WRONG_TYPE, event(first=1)),
    (Reason.WRONG_TYPE, event(meta={"time": "2026-01-01T00:00:00Z"})),
    (Reason.NUMBER_TOO_LARGE, b'{"type":"search","customer":"ann","basket":{"amount":1e999}}'),
    (Reason.NUMBER_TOO_LARGE, b'{"type":"search","customer":"ann","basket":{"amount":1' + b"0" * 400 + b"}}"),
    (Reason.NUMBER_TOO_LARGE, event(basket={"amount": 1.1e15})),
    (Reason.NUMBER_TOO_LARGE, event(basket={"amount": -1.1e15})),
    (Reason.NUMBER_TOO_LARGE, b'{"type":"search","customer":"ann","basket":{"items":18446744073709551617}}'),
    (Reason.TEXT_TOO_LONG, event(sku="x" * (limits.TEXT_BYTES_MAX + 1))),
    (Reason.TEXT_TOO_LONG, event(sku="é" * (limits.TEXT_BYTES_MAX // 2 + 1))),
    (Reason.BAD_TIME, event(meta={"time": NOW_MS - limits.EVENT_TIME_AGE_MS_MAX - 1})),
    (Reason.BAD_TIME, event(meta={"time": NOW_MS + limits.EVENT_TIME_AHEAD_MS_MAX + 1})),
    (Reason.BAD_TIME, event(meta={"time": NOW_MS // 1000})),
    (Reason.BAD_TIME, event(meta={"time": NOW_MS * 1000})),
    (Reason.BAD_TIME, event(meta={"time": -1})),
    (Reason.BAD_TIME, event(meta={"time": 1e308})),
]


@pytest.mark.parametrize(("reason", "value"), REFUSALS, ids=[f"{r}-{i}" for i, (r, _) in enumerate(REFUSALS)])
def test_refusals(reason: Reason, value: bytes | None) -> None:
    assert refused(value)[0] == reason
    assert refused(value, STRICT)[0] == reason


def test_a_batch_of_refusals_leaves_the_good_ones() -> None:
    values = [value for refusal in REFUSALS for value in (refusal[1], event(customer=f"c{len(refusal[0])}"))]
    decoded = decode(values)
    assert [refusal.reason for refusal in decoded.refusals] == [reason for reason, _ in REFUSALS]
    assert decoded.indexes.tolist() == list(range(1, len(values), 2))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (event(basket={"amount": "3"}), ["`$.basket.amount`", "float", "str"]),
        (event(customer=...), ["`customer`"]),
        (event(meta={"time": -1}), ["`meta.time`", "-1", str(NOW_MS)]),
        (event(customer="a\nb"), ["`customer`", "control", r"a\nb"]),
        (event(basket={"amount": 2e15}), ["`basket.amount`", "2e+15", "1e+15"]),
        (event()[:-1], ["truncated"]),
    ],
)
def test_a_detail_names_the_place(value: bytes, words: list[str]) -> None:
    detail = refused(value)[1]
    for word in words:
        assert word in detail


def test_neighbours_cannot_pose_as_each_other() -> None:
    good = event()
    for values in (
        [good + good, b" "],
        [good + b"\n" + good, b""],
        [good[:-1], b"}" + good],
        [good[:-1] + b',"x":[', b"1]}", good + good],
    ):
        decoded = decode(values)
        assert [refusal.reason for refusal in decoded.refusals] == [Reason.NOT_JSON] * len(values)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (event(meta=...), {"time_ms": NOW_MS}),
        (event(meta={"time": None}), {"time_ms": NOW_MS}),
        (event(meta={"time": NOW_MS - 0.4}), {"time_ms": NOW_MS}),
        (event(meta={"time": NOW_MS - limits.EVENT_TIME_AGE_MS_MAX}), {"time_ms": NOW_MS - 632_448_000_000}),
        (event(meta={"time": NOW_MS + limits.EVENT_TIME_AHEAD_MS_MAX}), {"time_ms": NOW_MS + 86_400_000}),
        (event(customer=-5), {"customer": "-5"}),
        (b'{"type":"search","customer":18446744073709551617}', {"customer": "18446744073709551617"}),
        (event(customer="日本 é"), {"customer": "日本 é"}),
        (event(customer="c" * limits.CUSTOMER_BYTES_MAX), {"customer": "c" * limits.CUSTOMER_BYTES_MAX}),
        (event(sku="x" * limits.TEXT_BYTES_MAX), {"sku": "x" * limits.TEXT_BYTES_MAX}),
        (event(sku="a\x00\n\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")), {"sku": "a\x00\n😀"}),
        (event(basket={"amount": 1e15, "items": -1e15}), {"amount": 1e15, "items": -1e15}),
        (event(note="[" * 1000), {"sku": "a-1"}),
        (event(note=[[]] * 1000), {"sku": "a-1"}),
        (b'{"type":"search","customer":"ann","sku":"a","sku":"b"}', {"sku": "b"}),
        (b'{"type":"search","customer":"ann","skipped":1e999}', {"customer": "ann"}),
        (b' \r\n\t{"type":"search",\n"customer":"ann"}\n', {"customer": "ann"}),
        (b'{"type":"search","customer":"ann","x":' + b"[" * (DEEP - 1) + b"]" * (DEEP - 1) + b"}", {"customer": "ann"}),
    ],
)
def test_what_is_taken(value: bytes, expected: dict[str, Any]) -> None:
    assert taken(value).items() >= expected.items()


def test_integer_and_text_of_the_same_digits_are_one_customer() -> None:
    events = decode([event(customer=7), event(customer="7"), event(customer=8)]).events
    assert (events.customers, events.rows.tolist()) == (["7", "8"], [0, 0, 1])


@pytest.mark.parametrize("value", [event(type="click"), event(type="click", customer=[], basket={"amount": "3"})])
def test_unknown_types_are_ignored_or_refused_whatever_else_they_hold(value: bytes) -> None:
    decoded = decode([value, event()])
    assert (decoded.ignored, decoded.refusals, decoded.indexes.tolist()) == (1, [], [1])
    assert refused(value, STRICT) == (Reason.UNKNOWN_TYPE, "`type` is 'click'")


@pytest.mark.parametrize("timestamp_ms", [-1, NOW_MS * 1000])
def test_without_a_believable_kafka_timestamp_only_the_century_counts(timestamp_ms: int) -> None:
    assert taken(event(meta={"time": 5}), timestamp_ms=timestamp_ms)["time_ms"] == 5
    assert taken(event(meta={"time": TIME_MS_MAX}), timestamp_ms=timestamp_ms)["time_ms"] == TIME_MS_MAX
    for meta in ({"time": TIME_MS_MAX + 1}, {"time": -1}, ...):
        alone = decode([event(meta=meta)], timestamp_ms=timestamp_ms)
        assert [refusal.reason for refusal in alone.refusals] == [Reason.BAD_TIME]


@pytest.mark.parametrize(("timestamp_ms", "time"), [(1000, -5), (TIME_MS_MAX - 5, TIME_MS_MAX + 5)])
def test_near_a_kafka_timestamp_the_century_counts_too(timestamp_ms: int, time: int) -> None:
    decoded = decode([event(meta={"time": time}), event(meta={"time": timestamp_ms})], timestamp_ms=timestamp_ms)
    assert [refusal.index for refusal in decoded.refusals] == [0]


def test_times_without_an_offset_are_utc_wherever_the_node_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "XYZ-5")
    tzset()
    try:
        decoder = EventDecoder(configured("iso8601").events)
        assert taken(event(meta={"time": "2026-01-31T12:00:00"}), decoder)["time_ms"] == 1_769_860_800_000
    finally:
        monkeypatch.undo()
        tzset()


def test_times_in_seconds() -> None:
    decoder = EventDecoder(configured("s").events)
    assert taken(event(meta={"time": NOW_MS / 1000 + 0.123}), decoder)["time_ms"] == NOW_MS + 123
    assert decode([event(meta={"time": NOW_MS})], decoder).refusals[0].reason == Reason.BAD_TIME


@given(st.datetimes(datetime(2010, 1, 1), datetime(2026, 1, 1)), st.integers(-14 * 60, 14 * 60) | st.none())
def test_times_as_texts(time: datetime, offset_minutes: int | None) -> None:
    decoder = EventDecoder(configured("iso8601").events)
    naive = time.isoformat()
    sign = "-" if (offset_minutes or 0) < 0 else "+"
    hours, minutes = divmod(abs(offset_minutes or 0), 60)
    text = naive if offset_minutes is None else f"{naive}{sign}{hours:02}:{minutes:02}"
    exact = (time.replace(tzinfo=UTC) - timedelta(minutes=offset_minutes or 0)).timestamp() * 1000
    assert abs(taken(event(meta={"time": text}), decoder)["time_ms"] - exact) <= 0.5001


@pytest.mark.parametrize("text", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_the_first_and_last_times_there_are_do_not_raise(text: str) -> None:
    decoder = EventDecoder(configured("iso8601").events)
    assert decode([event(meta={"time": text})], decoder).refusals[0].reason == Reason.BAD_TIME


def test_keys_that_are_no_names() -> None:
    text = '[events]\ntypes = ["search"]\ntype = "event type"\ncustomer = "user-id.$oid"\n[events.fields]\n'
    decoder = EventDecoder(parse_config(text + 'f = { path = "class.0", type = "number" }\n', Path("/x")).events)
    value = orjson.dumps({"event type": "search", "user-id": {"$oid": "ann"}, "class": {"0": 4}})
    assert taken(value, decoder) == {"f": 4.0, "customer": "ann", "time_ms": NOW_MS}


def test_types_whose_text_is_not_their_name() -> None:
    text = '[events]\ntypes = ["search", "order_placed"]\ntype_texts = { order_placed = "order.placed" }\n'
    decoder = EventDecoder(parse_config(text, Path("/x")).events)
    decoded = decode([event(type="order.placed"), event(type="order_placed"), event()], decoder)
    assert (decoded.events.types.tolist(), decoded.ignored) == ([1, 0], 1)


# An independent decoder, plain and one event at a time: what columns must agree with.


def reference(value: bytes) -> dict[str, Any] | str | None:
    """The event, "refused", "ignored", or None where the two may differ."""
    if len(value) > limits.EVENT_BYTES_MAX or depth_of(value) > limits.EVENT_DEPTH_MAX:
        return "refused"
    try:
        orjson.loads(value)
    except orjson.JSONDecodeError as error:
        return None if "infinity" in str(error) else "refused"
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend({"x"} if len(dict(items)) < len(items) else ())
        return dict(items)

    document = json.loads(value, object_pairs_hook=pairs)
    if repeated:
        return None
    return reference_event(document)


def depth_of(value: bytes) -> int:
    depth = deepest = 0
    in_text = escaped = False
    for character in value.decode("latin-1"):
        if in_text:
            in_text = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_text = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def reference_event(document: Any) -> dict[str, Any] | str:
    if not isinstance(document, dict):
        return "refused"
    name = document.get("type")
    if not name or not isinstance(name, str):
        return "refused"
    if name not in ("search", "transaction"):
        return "ignored"
    basket, meta = document.get("basket"), document.get("meta")
    if not isinstance(basket, dict | None) or not isinstance(meta, dict | None):
        return "refused"
    customer = document.get("customer")
    time = (meta or {}).get("time")
    row = {
        "amount": (basket or {}).get("amount"),
        "items": (basket or {}).get("items"),
        "sku": document.get("sku"),
        "first": document.get("first"),
    }
    numbers = [row["amount"], row["items"], time]
    if type(customer) not in (str, int) or any(type(number) not in (int, float, type(None)) for number in numbers):
        return "refused"
    if not isinstance(row["sku"], str | None) or type(row["first"]) not in (bool, type(None)):
        return "refused"
    text = str(customer)
    has_controls = any(ord(character) < 32 or 127 <= ord(character) < 160 for character in text)
    if not 1 <= len(text.encode()) <= limits.CUSTOMER_BYTES_MAX or has_controls:
        return "refused"
    if len((row["sku"] or "").encode()) > limits.TEXT_BYTES_MAX or any(abs(number or 0) > 1e15 for number in numbers):
        return "refused"
    time_ms = NOW_MS if time is None else round(time)
    earliest, latest = max(0, NOW_MS - limits.EVENT_TIME_AGE_MS_MAX), NOW_MS + limits.EVENT_TIME_AHEAD_MS_MAX
    if not earliest <= time_ms <= latest:
        return "refused"
    return row | {"type": name, "customer": text, "time_ms": time_ms}


def assert_agrees(values: Sequence[bytes]) -> None:
    decoded = decode(values)
    events, refusals = decoded.events, {refusal.index for refusal in decoded.refusals}
    positions = {index: position for position, index in enumerate(decoded.indexes.tolist())}
    for index, value in enumerate(values):
        expected = reference(value)
        if expected is None:
            continue
        if isinstance(expected, str):
            assert index not in positions
            assert (index in refusals) == (expected == "refused"), value
            continue
        position = positions[index]
        for name, column in events.fields.items():
            found = column[position]
            if expected[name] is None:
                assert found is None or math.isnan(found)
            else:
                assert found == expected[name]
        assert events.customers[events.rows[position]] == expected["customer"]
        assert events.times_ms[position] == expected["time_ms"]
        assert configured().events.types[events.types[position]] == expected["type"]
    named = [events.customers[row] for row in events.rows]
    assert list(dict.fromkeys(named)) == events.customers


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**66), 2**66)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
documents = st.fixed_dictionaries(
    {"type": st.sampled_from(["search", "transaction", "click"]), "customer": st.sampled_from(["ann", "bob", 7])},
    optional={
        "meta": st.fixed_dictionaries({}, optional={"time": st.integers(NOW_MS - 10**9, NOW_MS + 10**7) | st.none()}),
        "basket": st.none() | st.fixed_dictionaries({}, optional={"amount": scalars, "items": st.floats(-1e16, 1e16)}),
        "sku": st.text() | st.none(),
        "first": st.booleans() | st.none(),
        "other": anything,
    },
)
broken = st.tuples(documents, st.dictionaries(st.sampled_from(["type", "customer", "meta", "sku"]), anything)).map(
    lambda parts: parts[0] | parts[1]
)

unusable = st.tuples(
    documents,
    st.sampled_from(
        [
            {"customer": ""}, {"customer": None}, {"customer": "a\x00"}, {"customer": "é" * 200}, {"meta": {"time": 1}},
            {"meta": {"time": 1e300}}, {"basket": {"amount": -2e15}}, {"sku": "é" * 4000}, {"type": None},
            {"type": "x"},
        ]
    ),
).map(lambda parts: parts[0] | parts[1])  # fmt: skip
"""Right in every type, and still no event: what only the columns show."""


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """An event, as such or with some bytes cut out, put in or changed."""
    value = bytearray(json.dumps(draw(documents | broken), ensure_ascii=draw(st.booleans())).encode(errors="replace"))
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, len(value)))
        end = min(len(value), start + draw(st.integers(0, 6)))
        value[start:end] = draw(st.binary(max_size=3) | st.sampled_from([b'"', b"{", b"}", b",", b"[", b"9", b"\n"]))
    return bytes(value)


@settings(max_examples=300, deadline=None)
@given(st.lists(mutations() | st.binary(max_size=40), max_size=8))
@example([b'{"type":"search","customer":"ann","type":"click"}', b'{"type":"search","customer":"ann","x":1e999}'])
def test_columns_agree_with_a_plain_decoder(values: list[bytes]) -> None:
    assert_agrees(values)


@settings(max_examples=200, deadline=None)
@given(st.lists((documents | unusable | broken).map(json.dumps).map(str.encode), min_size=1, max_size=8))
def test_whole_batches_agree_with_a_plain_decoder(values: list[bytes]) -> None:
    assert_agrees(values)


@given(st.lists(st.none() | st.binary(), max_size=6), st.integers(-(2**63), 2**63 - 1))
def test_nothing_raises(values: list[bytes | None], timestamp_ms: int) -> None:
    decode([*values, event()], timestamp_ms=timestamp_ms)
