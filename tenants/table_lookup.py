"""(P) `tables.<table>[key].<column>` as it stands in an expression's `ast` tree: which table, key and column is meant.

A column with an odd name is quoted: tables.products[event.sku]['unit price'].
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass

from node.kernel.errors import HeadraceError
from node.kernel.tables import TableSchema
from tenants.wording import shown, suggestion

_FORM = "a table's value is tables.<table>[key].<column>, such as tables.products[event.sku].price"


class LookupMistake(HeadraceError):
    """What is wrong with a look-up, and at which node."""

    def __init__(self, node: ast.expr, message: str) -> None:
        super().__init__(message)
        self.node = node


@dataclass(frozen=True, slots=True)
class Lookup:
    table: str
    column: str
    key: ast.expr
    schema: TableSchema


def names_table(node: ast.expr) -> bool:
    """Whether an attribute or subscript starts at `tables`."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "tables"


def lookup_of(node: ast.expr, tables: Mapping[str, TableSchema]) -> Lookup:
    """Raises LookupMistake for another form, and for a table or column that is not there."""
    column, row = _name_and_base(node)
    if not isinstance(row, ast.Subscript) or column is None:
        raise LookupMistake(node, _FORM)
    table, root = _name_and_base(row.value)
    if table is None or not isinstance(root, ast.Name) or isinstance(row.slice, ast.Slice | ast.Tuple):
        raise LookupMistake(node, _FORM)
    schema = tables.get(table)
    if schema is None:
        raise LookupMistake(node, f"there is no table {shown(table)}; put it first" + suggestion(table, tables))
    if column == schema.key:
        raise LookupMistake(node, f"{shown(column)} is the key of table {table}; take one of its other columns")
    if column not in schema.columns:
        raise LookupMistake(node, f"table {table} has no column {shown(column)}" + suggestion(column, schema.columns))
    return Lookup(table, column, row.slice, schema)


def _name_and_base(node: ast.expr) -> tuple[str | None, ast.expr | None]:
    """`base.name` or `base['name']`; None, None for anything else."""
    if isinstance(node, ast.Attribute):
        return node.attr, node.value
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        return node.slice.value, node.value
    return None, None
