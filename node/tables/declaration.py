"""(P) A table's schema as somebody declares it, for rows that come without a file to tell it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, cast

from node.kernel.errors import TableRefused, printable
from node.kernel.limits import TABLE_COLUMNS_MAX
from node.kernel.tables import TableColumn, TableSchema
from node.kernel.types import FieldType
from node.tables.changes import DELETED, number_problem

_BOOLEANS: Final = {"true": 1.0, "1": 1.0, "false": 0.0, "0": 0.0}


def declared(
    key: str, types: Mapping[str, FieldType], defaults: Mapping[str, str], before: TableSchema | None
) -> TableSchema:
    """`types` are of all columns, the key among them; without any, the table stays as `before`. Raises TableRefused."""
    if not types and before is not None:
        types = {before.key: before.key_type, **{name: column.type for name, column in before.columns.items()}}
        defaults = {**_texts(before), **defaults}
    key = key or (before.key if before is not None else "")
    problems = []
    if key not in types:
        problems.append(
            "say which column is the key, and the type of each: --key sku --type sku=text --type price=number"
        )
    elif types[key] == "boolean":
        problems.append(f"the key {key} is boolean; it must be a number or a text")
    problems += [f"there is no column {printable(name)} to have a default" for name in defaults if name not in types]
    if len(types) > TABLE_COLUMNS_MAX or DELETED in types:
        problems.append(f"at most {TABLE_COLUMNS_MAX} columns, none of them named {DELETED}")
    if problems:
        raise TableRefused(problems)
    columns = {
        name: TableColumn(kind, default_value(name, defaults[name], kind) if name in defaults else None)
        for name, kind in types.items()
        if name != key
    }
    schema = TableSchema(key, cast("Literal['number', 'text']", types[key]), columns)
    found = schema.problems_after(before) if before is not None else []
    if found:
        raise TableRefused(found)
    return schema


def default_value(name: str, text: str, kind: FieldType) -> float | str:
    """Raises TableRefused."""
    if kind == "text":
        return text
    if kind == "boolean":
        if text not in _BOOLEANS:
            raise TableRefused([f"the default of column {name!r} must be true, false, 1 or 0, not {text!r}"])
        return _BOOLEANS[text]
    try:
        value = float(text)
    except ValueError:
        raise TableRefused([f"the default of column {name!r} must be a number, not {text!r}"]) from None
    problem = number_problem(value)
    if problem:
        raise TableRefused([f"the default of column {name!r} must be {problem}, not {text!r}"])
    return value


def _texts(schema: TableSchema) -> dict[str, str]:
    return {name: _text(column) for name, column in schema.columns.items() if column.default is not None}


def _text(column: TableColumn) -> str:
    """The column's default as one says it."""
    if column.type == "boolean":
        return "true" if column.default else "false"
    return str(column.default)
