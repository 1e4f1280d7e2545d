"""(P) Record values to columns: JSON events become `EventColumns`, what can't be used a refusal with a reason.

msgspec decodes each value into a struct that holds the configured fields only and skips the rest. Values are
decoded one by one, not joined: `decode_lines` saves 0.015 µs an event, but it also takes `{}{}` for two events,
so one record could pose as its neighbour. Everything after that is done by column.

What JSON leaves open: of a repeated key the last value counts; a number in a field that is not configured is not
read, so 1e999 does no harm there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias, cast

import msgspec
import numpy as np

from node.columns import customer_rows, number_column, text_column
from node.config_sections import EventsSection
from node.ingest.dead_letter import Reason
from node.kernel import limits
from node.kernel.types import Bools, Column, EventColumns, FieldType, Floats, Ints

TIME_MS_MIN = 0
TIME_MS_MAX = int(datetime(2200, 1, 1, tzinfo=UTC).timestamp() * 1000)
"""No event time or Kafka timestamp outside 1970 to 2200 is believed."""

_FIELD_TYPES: Mapping[FieldType, Any] = {"number": float, "text": str, "boolean": bool}
_TIME_TYPES: Mapping[str, Any] = {"ms": float, "s": float, "iso8601": datetime}
_TIME_SCALES = {"ms": 1.0, "s": 1000.0, "iso8601": 1000.0}
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A JSON string, closed or not; possessive, so that a value full of quotes costs linear time."""
_SYNTAX = msgspec.json.Decoder(msgspec.Raw)
"""Reads a value to its end and keeps nothing: tells bad JSON from JSON of the wrong types."""

Mistake: TypeAlias = tuple[Reason, str]
Reader: TypeAlias = Callable[[Sequence[Any]], list[Any]]
"""Structs -> the values at one path, None where missing."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A record that is no event; `index` is its position among the values given."""

    index: int
    reason: Reason
    detail: str


class Decoded(NamedTuple):
    """The good events as columns; `indexes[i]` (int64, ascending) is event i's position among the values given.

    `ignored` counts events of a type that is not configured, while `unknown_types` is "ignore". Events,
    refusals and ignored together are all the values given.
    """

    events: EventColumns
    indexes: Ints
    refusals: list[Refusal]
    ignored: int


class EventDecoder:
    """Decodes the events of one configuration. Holds no state between calls."""

    def __init__(self, events: EventsSection) -> None:
        self._config = events
        self._codes = {events.type_texts.get(name, name): code for code, name in enumerate(events.types)}
        fields = {field.path: _FIELD_TYPES[field.type] for field in events.fields.values()}
        kinds = {events.type: str, events.time: _TIME_TYPES[events.time_unit], events.customer: str | int, **fields}
        struct, self._readers = _struct_of(kinds)
        self._decode = msgspec.json.Decoder(struct).decode
        head, head_readers = _struct_of({events.type: str})
        self._decode_head = msgspec.json.Decoder(head).decode
        self._head_type = head_readers[events.type]

    def records(self, records: Sequence[Any], topics: Sequence[int]) -> Decoded:
        """`decode` of the client's records; `topics` is parallel to them."""
        count = len(records)
        return self.decode(
            [record.value for record in records],
            np.fromiter([record.timestamp for record in records], np.int64, count),
            np.fromiter(topics, np.int64, count),
            np.fromiter([record.offset for record in records], np.int64, count),
        )

    def decode(self, values: Sequence[bytes | None], timestamps_ms: Ints, topics: Ints, offsets: Ints) -> Decoded:
        """Decode one micro-batch; the arrays are int64 and parallel to `values`. Raises on nothing they hold.

        `timestamps_ms` are Kafka's; below 0 means none. `topics` and `offsets` are only passed on.
        """
        objects, indexes, mistakes = self._objects(values)
        objects, indexes, types = self._typed(objects, indexes, mistakes)
        has_long_text = max((len(value) for value in values if value), default=0) > limits.TEXT_BYTES_MAX
        events, wrong = self._columns(objects, timestamps_ms[indexes], has_long_text)
        if wrong:  # Rare: leave these out and make the columns again, which numbers the customers anew.
            mistakes.update((int(indexes[position]), mistake) for position, mistake in wrong.items())
            good = np.array([position for position in range(len(objects)) if position not in wrong], np.int64)
            objects, indexes, types = [objects[position] for position in good], indexes[good], types[good]
            events, _ = self._columns(objects, timestamps_ms[indexes], has_long_text)
        events.types, events.topics, events.offsets = types, topics[indexes], offsets[indexes]
        ignored = len(values) - len(indexes) - len(mistakes)
        return Decoded(events, indexes, [Refusal(index, *mistakes[index]) for index in sorted(mistakes)], ignored)

    def _objects(self, values: Sequence[bytes | None]) -> tuple[list[Any], Ints, dict[int, Mistake]]:
        """The structs of the values that are events, their indexes, and what is wrong with the others."""
        try:
            if _is_plausible(given := cast("Sequence[bytes]", values)):
                return list(map(self._decode, given)), np.arange(len(given)), {}
        except (TypeError, ValueError, RecursionError):
            pass  # One of them is bad: find it by going one by one, which costs this batch only.
        objects: list[Any] = []
        indexes: list[int] = []
        mistakes: dict[int, Mistake] = {}
        for index, value in enumerate(values):
            taken, mistake = self._object(value)
            if taken is not None:
                objects.append(taken)
                indexes.append(index)
            elif mistake is not None:
                mistakes[index] = mistake
        return objects, np.array(indexes, np.int64), mistakes

    def _object(self, value: bytes | None) -> tuple[Any, Mistake | None]:
        """The struct, or what is wrong; neither, if the type alone tells that the event is to be ignored."""
        if value is None:
            return None, (Reason.NO_VALUE, "the record has no value")
        mistake = _implausible(value)
        if mistake is not None:
            return None, mistake
        try:
            return self._decode(value), None
        except (ValueError, RecursionError) as error:
            detail = str(error)
        try:
            _SYNTAX.decode(value)
            head = self._decode_head(value)
        except msgspec.ValidationError as error:
            reason = Reason.WRONG_TYPE if "`$." in str(error) else Reason.NOT_AN_OBJECT
            return None, (reason, str(error))
        except (ValueError, RecursionError) as error:
            return None, (Reason.NOT_JSON, str(error))
        name = self._head_type([head])[0]
        if name in self._codes:
            return None, (Reason.NUMBER_TOO_LARGE if "out of range" in detail else Reason.WRONG_TYPE, detail)
        return None, self._type_mistake(name)

    def _typed(self, objects: list[Any], indexes: Ints, mistakes: dict[int, Mistake]) -> tuple[list[Any], Ints, Ints]:
        """Those of a configured type, their indexes and type codes; adds to `mistakes`."""
        code_of = self._codes.get
        names = self._readers[self._config.type](objects)
        codes = np.array([code_of(name, -1) for name in names], np.int64)
        known = codes >= 0
        if known.all():
            return objects, indexes, codes
        for position in np.flatnonzero(~known).tolist():
            mistake = self._type_mistake(names[position])
            if mistake is not None:
                mistakes[int(indexes[position])] = mistake
        return [objects[position] for position in np.flatnonzero(known).tolist()], indexes[known], codes[known]

    def _type_mistake(self, name: str | None) -> Mistake | None:
        if not name:
            return Reason.MISSING_TYPE, f"`{self._config.type}` is missing or empty"
        if self._config.unknown_types == "ignore":
            return None
        return Reason.UNKNOWN_TYPE, f"`{self._config.type}` is {_quoted(name)}"

    def _columns(
        self, objects: Sequence[Any], timestamps_ms: Ints, has_long_text: bool
    ) -> tuple[EventColumns, dict[int, Mistake]]:
        """All columns but types, topics and offsets, and the positions of events that must be left out."""
        wrong: dict[int, Mistake] = {}
        path = self._config.customer
        rows, customers = _customers(self._readers[path](objects), path, wrong)
        times_ms = self._times_ms(objects, timestamps_ms, wrong)
        fields: dict[str, Column] = {}
        for name, field in self._config.fields.items():
            values = self._readers[field.path](objects)
            if field.type == "text":
                fields[name] = text_column(values)
                if has_long_text:
                    _check_texts(values, field.path, wrong)
            else:
                fields[name] = numbers = number_column(values)
                _check_numbers(numbers, field.path, wrong)
        none = np.empty(0, np.int64)
        return EventColumns(none, times_ms, rows, customers, none, none, fields), wrong

    def _times_ms(self, objects: Sequence[Any], timestamps_ms: Ints, wrong: dict[int, Mistake]) -> Ints:
        values = self._readers[self._config.time](objects)
        if self._config.time_unit == "iso8601":
            values = [None if value is None else _epoch_seconds(value) for value in values]
        with np.errstate(over="ignore"):
            times = np.rint(number_column(values) * _TIME_SCALES[self._config.time_unit])
        believed = _are_believed(timestamps_ms)
        missing = np.isnan(times)
        times[missing] = np.where(believed, timestamps_ms, -1)[missing]
        low = np.where(believed, timestamps_ms - limits.EVENT_TIME_AGE_MS_MAX, TIME_MS_MIN)
        high = np.where(believed, timestamps_ms + limits.EVENT_TIME_AHEAD_MS_MAX, TIME_MS_MAX)
        good = (times >= low) & (times <= high) & (times >= TIME_MS_MIN) & (times <= TIME_MS_MAX)
        for position in np.flatnonzero(~good).tolist():
            wrong.setdefault(position, (Reason.BAD_TIME, self._time_detail(values[position], timestamps_ms[position])))
        times[~good] = 0
        return times.astype(np.int64)

    def _time_detail(self, value: float | None, timestamp_ms: int) -> str:
        path = self._config.time
        if value is None:
            return f"`{path}` is missing and the Kafka timestamp is {timestamp_ms}"
        seconds_or_ms = "ms" if self._config.time_unit == "ms" else "s"
        return f"`{path}` is {value:.15g} {seconds_or_ms} since 1970, the Kafka timestamp {timestamp_ms} ms"


def _struct_of(kinds: Mapping[str, Any]) -> tuple[type[msgspec.Struct], dict[str, Reader]]:
    """A struct type that holds the values at the dotted paths, each optional, and a reader for each path."""
    nested: dict[str, dict[str, Any]] = {}
    for path, kind in kinds.items():
        key, _, rest = path.partition(".")
        nested.setdefault(key, {})[rest] = kind
    fields: list[Any] = []
    readers: dict[str, Reader] = {}
    for number, (key, inner) in enumerate(nested.items()):
        name = f"value_{number}"  # Keys may be anything; attributes may not.
        if "" in inner:
            kind = inner[""]
            readers[key] = _reader(name)
        else:
            kind, inner_readers = _struct_of(inner)
            readers.update({f"{key}.{rest}": _nested_reader(name, read) for rest, read in inner_readers.items()})
        fields.append((name, kind | None, msgspec.field(default=None, name=key)))
    return msgspec.defstruct("Event", fields, gc=False, kw_only=True), readers


def _reader(name: str) -> Reader:
    get = attrgetter(name)
    return lambda objects: list(map(get, objects))


def _nested_reader(name: str, inner: Reader) -> Reader:
    get = attrgetter(name)

    def read(objects: Sequence[Any]) -> list[Any]:
        parents = list(map(get, objects))
        if None not in parents:
            return inner(parents)
        values = iter(inner([parent for parent in parents if parent is not None]))
        return [None if parent is None else next(values) for parent in parents]

    return read


def _is_plausible(values: Sequence[bytes]) -> bool:
    """Whether size, encoding and depth of all values allow decoding; raises TypeError or ValueError if not.

    Encoding is checked on the values joined: one that ends inside a character is no JSON and fails later. A
    value too deep shows in the count of brackets, because each of the others has at least one.
    """
    joined = b"".join(values)
    if not joined.isascii():
        joined.decode()
    if max(map(len, values), default=0) > limits.EVENT_BYTES_MAX:
        return False
    if joined.count(b"{") + joined.count(b"[") < len(values) + limits.EVENT_DEPTH_MAX:
        return True
    return not any(map(_is_too_deep, values))


def _implausible(value: bytes) -> Mistake | None:
    """What `_is_plausible` checks, for one value, with the reason."""
    if len(value) > limits.EVENT_BYTES_MAX:
        return Reason.TOO_LARGE, f"{len(value)} bytes; at most {limits.EVENT_BYTES_MAX} are read"
    try:
        value.decode()
    except UnicodeDecodeError as error:
        return Reason.NOT_UTF8, f"{error.reason} at byte {error.start}"
    if value.startswith(b"\xef\xbb\xbf"):
        return Reason.NOT_UTF8, "begins with a byte order mark"
    if _is_too_deep(value):
        return Reason.TOO_DEEP, f"nested deeper than {limits.EVENT_DEPTH_MAX}"
    return None


def _is_too_deep(value: bytes) -> bool:
    if value.count(b"{") + value.count(b"[") <= limits.EVENT_DEPTH_MAX:
        return False
    characters = np.frombuffer(_STRING.sub(b"", value), np.uint8)
    steps = np.zeros(len(characters), np.int32)
    steps[(characters == ord("{")) | (characters == ord("["))] = 1
    steps[(characters == ord("}")) | (characters == ord("]"))] = -1
    return int(np.cumsum(steps).max(initial=0)) > limits.EVENT_DEPTH_MAX


def _customers(values: Sequence[Any], path: str, wrong: dict[int, Mistake]) -> tuple[Ints, list[str]]:
    """Rows and customers as in `customer_rows`, integers as text; "" and an entry in `wrong` for what is neither."""
    rows, customers = customer_rows(values)
    unusual = [customer for customer in customers if not _is_plain_name(customer)]
    if not unusual:
        return rows, customers
    mistakes = {customer: _name_mistake(customer, path) for customer in unusual}
    for position, value in enumerate(values):
        mistake = mistakes.get(value)
        if mistake is not None:
            wrong[position] = mistake
    return customer_rows(["" if value is None else str(value) for value in values])


def _is_plain_name(value: str | int | None) -> bool:
    return (
        type(value) is str and value.isascii() and value.isprintable() and 0 < len(value) <= limits.CUSTOMER_BYTES_MAX
    )


def _name_mistake(value: str | int | None, path: str) -> Mistake | None:
    if value is None or value == "":
        return Reason.MISSING_CUSTOMER, f"`{path}` is missing or empty"
    text = str(value)
    size = len(text.encode())
    if size > limits.CUSTOMER_BYTES_MAX:
        return Reason.BAD_CUSTOMER, f"`{path}` has {size} bytes; at most {limits.CUSTOMER_BYTES_MAX} are allowed"
    if _CONTROL_CHARACTERS.search(text):
        return Reason.BAD_CUSTOMER, f"`{path}` has control characters: {_quoted(text)}"
    return None


def _epoch_seconds(value: datetime) -> float:
    return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()


def _are_believed(timestamps_ms: Ints) -> Bools:
    return (timestamps_ms >= TIME_MS_MIN) & (timestamps_ms <= TIME_MS_MAX)


def _check_numbers(numbers: Floats, path: str, wrong: dict[int, Mistake]) -> None:
    for position in np.flatnonzero(np.abs(numbers) > limits.NUMBER_MAGNITUDE_MAX).tolist():
        detail = f"`{path}` is {numbers[position]:g}; at most {limits.NUMBER_MAGNITUDE_MAX:g} is exact"
        wrong.setdefault(position, (Reason.NUMBER_TOO_LARGE, detail))


def _check_texts(texts: Sequence[str | None], path: str, wrong: dict[int, Mistake]) -> None:
    for position, text in enumerate(texts):
        if text is not None and len(text) * 4 > limits.TEXT_BYTES_MAX:
            size = len(text.encode())
            if size > limits.TEXT_BYTES_MAX:
                detail = f"`{path}` has {size} bytes; at most {limits.TEXT_BYTES_MAX} are allowed"
                wrong.setdefault(position, (Reason.TEXT_TOO_LONG, detail))


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:99] + "…")
