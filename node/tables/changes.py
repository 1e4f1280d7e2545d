"""(P) Records of a topic that a table follows, as lines of changes for the building process.

The record's key is the row's key: UTF-8 text, or a number in decimal. Its value is a JSON object of columns; one that
the table does not have is left out, and the key column may be there or not. A record without a value deletes the row.
What is wrong with one record does not concern the others, so each is checked here, by the rules that hold for files
(`node.tables.conversion`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from node.kernel.errors import HeadraceError, shown
from node.kernel.limits import EVENT_BYTES_MAX, NUMBER_MAGNITUDE_MAX, TABLE_KEY_BYTES_MAX, TEXT_BYTES_MAX
from node.kernel.tables import TableColumn, TableSchema
from node.kernel.types import FieldType

DELETED: Final = "(deleted)"
"""The column of a line that says whether it deletes; no table has one of that name."""


class RecordRefused(HeadraceError):
    """A record of a table's topic that is no row; the row of its key stays as it was."""


class Changes:
    """Makes lines for a table of that schema."""

    def __init__(self, schema: TableSchema) -> None:
        self._schema = schema
        self._checks = {name: _CHECKS[column.type] for name, column in schema.columns.items()}
        self.columns = (*schema.columns, DELETED)
        self.types: dict[str, FieldType] = {
            schema.key: schema.key_type,
            **{name: column.type for name, column in schema.columns.items()},
            DELETED: "boolean",
        }

    def line(self, key: bytes | None, value: bytes | None) -> bytes:
        """NDJSON, with its line break. Raises RecordRefused."""
        schema = self._schema
        row: dict[str, Any] = {schema.key: self._key(key), **dict.fromkeys(schema.columns), DELETED: value is None}
        if value is not None:
            given = _object(value)
            if given.get(schema.key, row[schema.key]) != row[schema.key]:
                raise RecordRefused(f"its {schema.key} is {shown(given[schema.key])}, its key {shown(row[schema.key])}")
            for name, check in self._checks.items():
                column = given.get(name)
                if column is not None:
                    problem = check(column)
                    if problem:
                        raise RecordRefused(f"column {name} must be {problem}, not {shown(column)}")
                    row[name] = column
        return orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)

    def _key(self, key: bytes | None) -> str | float:
        try:
            text = (key or b"").decode()
            if self._schema.key_type == "text":
                if not text or len(key or b"") > TABLE_KEY_BYTES_MAX or "\0" in text:
                    raise RecordRefused(f"its key must be a text of 1 to {TABLE_KEY_BYTES_MAX} bytes without NUL")
                return text
            number = float(text)
        except ValueError:
            raise RecordRefused(f"its key must be a {self._schema.key_type}, not {shown(key)}") from None
        problem = number_problem(number)
        if problem:
            raise RecordRefused(f"its key must be {problem}, not {shown(key)}")
        return number


def without_deleted(columns: Mapping[str, TableColumn]) -> dict[str, TableColumn]:
    return {name: column for name, column in columns.items() if name != DELETED}


def _object(value: bytes) -> dict[str, Any]:
    if len(value) > EVENT_BYTES_MAX // 2:  # so that the line with every name is below what a file's line may be
        raise RecordRefused(f"its value is longer than {EVENT_BYTES_MAX // 2} bytes")
    try:
        given = orjson.loads(value)
    except ValueError as failure:
        raise RecordRefused(f"its value is no JSON: {failure}") from None
    if not isinstance(given, dict):
        raise RecordRefused(f"its value must be an object, not {shown(given)}")
    return given


def number_problem(value: object) -> str:
    """What the value must be and is not, '' if it is."""
    good = type(value) in (int, float) and math.isfinite(value) and abs(value) <= NUMBER_MAGNITUDE_MAX  # type: ignore[arg-type]
    return "" if good else f"a number of at most {NUMBER_MAGNITUDE_MAX:g}"


def _text_problem(value: object) -> str:
    good = isinstance(value, str) and len(value.encode("utf-8", "replace")) <= TEXT_BYTES_MAX
    return "" if good else f"a text of at most {TEXT_BYTES_MAX} bytes"


def _boolean_problem(value: object) -> str:
    return "" if isinstance(value, bool) else "true or false"


_CHECKS: Final[Mapping[FieldType, Callable[[object], str]]] = {
    "number": number_problem,
    "text": _text_problem,
    "boolean": _boolean_problem,
}
