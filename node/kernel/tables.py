"""What all parts know of a table: its schema, its versions, and how a cycle reads the versions it has pinned.

A table is global data with one key column, whole on every node. A version of it is immutable; which one is live is
agreed. Types are those of event fields: a number or boolean is float64 (missing NaN), a text str (missing None).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal, Protocol

import msgspec
import numpy as np

from node.kernel.errors import TableUnavailable
from node.kernel.types import Column, FieldType, Ints


class TableColumn(msgspec.Struct, frozen=True):
    """`default` is what a key without a row gives, and a row without a value; None: missing."""

    type: FieldType
    default: float | str | None = None


class TableSchema(msgspec.Struct, frozen=True):
    """The key column's name and type, and every other column by name."""

    key: str
    key_type: Literal["number", "text"]
    columns: dict[str, TableColumn]

    def encode(self) -> str:
        """As JSON; equal schemas give equal texts."""
        return msgspec.json.encode(self, order="deterministic").decode()

    @staticmethod
    def decode(text: str | bytes) -> TableSchema:
        """Raises msgspec.MsgspecError."""
        return msgspec.json.decode(text, type=TableSchema)

    def problems_after(self, before: TableSchema) -> list[str]:
        """Why features that use a table of the schema `before` can't use one of this: one line each."""
        if (self.key, self.key_type) != (before.key, before.key_type):
            return [
                f"the key is {self.key} ({self.key_type}); it must stay {before.key} ({before.key_type}), or drop the"
                " table first"
            ]
        problems = []
        for name, column in before.columns.items():
            found = self.columns.get(name)
            if found is None:
                problems.append(f"column {name} is missing; the table has it, and features may use it")
            elif found.type != column.type:
                problems.append(f"column {name} is {found.type}; it must stay {column.type}, or drop the table first")
        return problems


class TableReader(Protocol):
    """One version of a table, or the present state of one that is fed by a topic."""

    @property
    def version(self) -> str:
        """As inferences name it."""
        ...

    def rows(self, keys: Column) -> Ints:
        """int64 [len(keys)]: the position of each key's row, -1 where the table has none. A missing key has none."""
        ...

    def column(self, name: str, rows: Ints) -> Column | None:
        """The column's value at each of the positions that `rows` gave; the default where there is none. None when this
        version has no such column."""
        ...


class TableSet:
    """The versions that one micro-batch reads; replaced as a whole, so that no cycle sees a mixture."""

    def __init__(self, readers: Mapping[str, TableReader], absent: Mapping[str, str] | None = None) -> None:
        self._readers = dict(readers)
        self.absent = dict(absent or {})
        """Tables whose live version can't be read on this node now -> why."""

    def table(self, name: str) -> TableReader | None:
        return self._readers.get(name)

    def versions(self, names: Iterable[str]) -> dict[str, str]:
        """Of those tables that there are."""
        return {name: self._readers[name].version for name in names if name in self._readers}

    def require(self, names: Iterable[str], reader: str) -> None:
        """Raises TableUnavailable when one of these tables is absent: what reads it must not be fed without it."""
        for name in names if self.absent else ():
            if name in self.absent:
                raise TableUnavailable(f"{reader} waits for table {name}: {self.absent[name]}")


NO_TABLES: Final = TableSet({})


def no_values(size: int, kind: FieldType, default: float | str | None) -> Column:
    """A column of `size` rows that a table has not."""
    column: Column = np.empty(size, dtype=object if kind == "text" else np.float64)
    column.fill(np.nan if default is None and kind != "text" else default)
    return column
