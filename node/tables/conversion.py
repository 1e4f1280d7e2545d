"""Values of a table's file as columns of its schema, each mistake with its row. Runs in the building process only.

Rows count from 1, the header of a CSV file not among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from node.kernel.errors import TableRefused, shown
from node.kernel.limits import NUMBER_MAGNITUDE_MAX, TABLE_KEY_BYTES_MAX, TABLE_PROBLEMS_MAX, TEXT_BYTES_MAX
from node.kernel.types import FieldType

NUMBER: Final = pa.float64()
TEXT: Final = pa.large_string()
_TRUE: Final = ("true", "True", "TRUE", "1")
_FALSE: Final = ("false", "False", "FALSE", "0")


class Problems:
    """The mistakes found so far. Raises TableRefused as soon as there are more than anybody reads."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, line: str) -> None:
        self._lines.append(line)
        if len(self._lines) >= TABLE_PROBLEMS_MAX:
            raise TableRefused([*self._lines, "there may be more mistakes; mend these first"])

    def finish(self) -> None:
        if self._lines:
            raise TableRefused(self._lines)


def kind_of(kind: pa.DataType) -> FieldType | None:
    """The type that a column of an Arrow type has in a table; None: none."""
    if pa.types.is_dictionary(kind):
        return kind_of(kind.value_type)
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return "number"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "text"
    return None


def typed(values: pa.Array, wanted: FieldType, name: str, first_row: int, problems: Problems) -> pa.Array:
    """A typed column (Parquet's, or one made of JSON values): float64 or large_string, null where missing."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if wanted == "text":
        return _texts(_utf8(values.cast(TEXT), name, first_row, problems), name, first_row, problems)
    return _numbers(values.cast(NUMBER, safe=False), name, first_row, problems)


def parsed(values: pa.Array, wanted: FieldType, name: str, first_row: int, problems: Problems) -> pa.Array:
    """A column of CSV texts, as `typed`."""
    if wanted == "text":
        return _texts(values.cast(TEXT), name, first_row, problems)
    if wanted == "boolean":
        known = pc.is_in(values, pa.array([*_TRUE, *_FALSE], values.type))
        _tell(values, pc.and_(pc.is_valid(values), pc.invert(known)), name, first_row, "true or false", problems)
        return pc.if_else(pc.is_in(values, pa.array(_TRUE, values.type)), 1.0, pc.if_else(known, 0.0, None)).cast(
            NUMBER
        )
    trimmed = pc.utf8_trim_whitespace(values)
    try:
        numbers = trimmed.cast(NUMBER)
    except pa.ArrowInvalid:
        bad = pa.array([text is not None and not _is_number(text) for text in trimmed.to_pylist()])
        _tell(values, bad, name, first_row, "a number", problems)
        numbers = pc.if_else(bad, None, trimmed).cast(NUMBER)
    return _numbers(numbers, name, first_row, problems, nan_is_missing=False)


def _is_number(text: str) -> bool:
    try:
        pa.scalar(text).cast(NUMBER)
    except pa.ArrowInvalid:
        return False
    return True


def json_column(values: Sequence[Any], wanted: FieldType, name: str, first_row: int, problems: Problems) -> pa.Array:
    """A column of JSON values, as `typed`."""
    allowed: tuple[type, ...] = {"number": (int, float), "text": (str,), "boolean": (bool,)}[wanted]
    kinds = set(map(type, values)) - {type(None)}
    if kinds <= set(allowed):
        if wanted == "text":
            return typed(pa.array(values, TEXT), wanted, name, first_row, problems)
        column = np.array([None if value is None else float(value) for value in values], dtype=np.float64)
        return _numbers(pa.array(column, from_pandas=True), name, first_row, problems)
    words = {"number": "a number", "text": "a text", "boolean": "true or false"}[wanted]
    for row, value in enumerate(values, first_row):
        if value is not None and type(value) not in allowed:
            problems.add(f"row {row}: column {name} must be {words}, not {shown(value)}")
    problems.finish()
    raise AssertionError("a value of another kind was there")


def _numbers(values: pa.Array, name: str, first_row: int, problems: Problems, nan_is_missing: bool = True) -> pa.Array:
    if nan_is_missing:
        values = pc.if_else(pc.is_nan(values), None, values)
    good = pc.less_equal(pc.abs(values), NUMBER_MAGNITUDE_MAX)
    words = f"a number of at most {NUMBER_MAGNITUDE_MAX:g}"
    _tell(values, pc.invert(pc.fill_null(good, True)), name, first_row, words, problems)
    return values


def _utf8(values: pa.Array, name: str, first_row: int, problems: Problems) -> pa.Array:
    """The texts. Parquet promises UTF-8 and its reader takes any bytes. Raises TableRefused at once: others can't be
    looked at further."""
    coded = values.cast(pa.large_binary())
    try:
        return coded.cast(TEXT)
    except pa.ArrowInvalid:
        for row, text in enumerate(coded.to_pylist(), first_row):
            if text is not None and not _is_utf8(text):
                problems.add(f"row {row}: column {name} must be a text in UTF-8, not {shown(text)}")
    problems.finish()
    raise AssertionError("a text of another coding was there")


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _texts(values: pa.Array, name: str, first_row: int, problems: Problems) -> pa.Array:
    long = pc.fill_null(pc.greater(pc.binary_length(values), TEXT_BYTES_MAX), False)
    _tell(values, long, name, first_row, f"a text of at most {TEXT_BYTES_MAX} bytes", problems)
    return values


def check_keys(keys: pa.Array, name: str, first_row: int, problems: Problems) -> None:
    """A key must be there; a text must not be empty, too long or hold a NUL."""
    for row in _rows(pc.is_null(keys), first_row):
        problems.add(f"row {row}: the key {name} is missing")
    if pa.types.is_floating(keys.type):
        return
    size = pc.binary_length(keys)
    bad = pc.or_(pc.equal(size, 0), pc.or_(pc.greater(size, TABLE_KEY_BYTES_MAX), pc.match_substring(keys, "\0")))
    words = f"a text of 1 to {TABLE_KEY_BYTES_MAX} bytes without NUL"
    _tell(keys, pc.fill_null(bad, False), name, first_row, words, problems)


def _tell(values: pa.Array, bad: pa.Array, name: str, first_row: int, words: str, problems: Problems) -> None:
    for row in _rows(bad, first_row):
        problems.add(f"row {row}: column {name} must be {words}, not {shown(values[row - first_row].as_py())}")


def _rows(bad: pa.Array, first_row: int) -> Iterable[int]:
    if not pc.any(bad).as_py():
        return ()
    return (first_row + np.flatnonzero(bad.to_numpy(zero_copy_only=False))).tolist()


def csv_kind(values: Iterable[str | None]) -> FieldType:
    """What a sample of a CSV column looks like. A number with a leading zero, as codes have, is text."""
    seen = {text for text in values if text is not None}
    if not seen:
        return "text"
    if all(_looks_numeric(text) for text in seen):
        return "number"
    return "boolean" if seen <= {*_TRUE[:3], *_FALSE[:3]} else "text"


def _looks_numeric(text: str) -> bool:
    digits = text.strip().lstrip("+-")
    return (
        _is_number(text.strip())
        and digits[:1].isdigit()
        and not (len(digits) > 1 and digits[0] == "0" and digits[1] != ".")
    )


def json_kind(values: Iterable[Any]) -> FieldType | str:
    """As `csv_kind`, of JSON values; the name of a type that no column may have."""
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return "text"
    named: dict[type, FieldType] = {int: "number", float: "number", str: "text", bool: "boolean"}
    if kinds <= {int, float}:
        return "number"
    for kind in kinds:
        if kind not in named:
            return "list" if kind is list else "object"
    return named[kinds.pop()] if len(kinds) == 1 else "of several types"


Converter = Callable[[Any, FieldType, str, int, Problems], pa.Array]
