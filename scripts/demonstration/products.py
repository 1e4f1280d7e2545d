"""The product catalogue as a table, in the two versions that the demo puts: prices as of the cut, and as of half-way.

A product's price is the median of what a piece of it cost until then, before discounts of the shelf were given.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from demonstration.data import TRANSACTION, Events, Frames
from node.kernel.tables import TableColumn, TableReader, TableSchema, TableSet
from node.tables.build import Order, build
from node.tables.version_file import VersionFile

TABLE = "products"
SCHEMA = TableSchema(
    "product",
    "number",
    {
        "department": TableColumn("text"),
        "brand": TableColumn("text"),
        "category": TableColumn("text"),
        "price": TableColumn("number"),
    },
)
_MEMORY_MB = 2048


def catalogue(frames: Frames, events: Events, before: int) -> pd.DataFrame:
    """Every product, with its price by the first `before` events."""
    lines = np.flatnonzero(events.kinds[:before] == TRANSACTION)
    pieces = events.numbers["quantity"][lines]
    paid = events.numbers["amount"][lines] + events.numbers["retail_discount"][lines]
    sold = pieces > 0
    prices = pd.Series(paid[sold] / pieces[sold]).groupby(events.numbers["product"][lines][sold]).median().round(2)
    products = frames.products.drop_duplicates("product_id")
    numbers = products["product_id"].to_numpy(np.float64)
    return pd.DataFrame(
        {
            "product": numbers,
            "department": products["department"].to_numpy(object, na_value=None),
            "brand": products["brand"].to_numpy(object, na_value=None),
            "category": products["product_category"].to_numpy(object, na_value=None),
            "price": prices.reindex(numbers).to_numpy(np.float64),
        }
    )


def write(products: pd.DataFrame, path: Path) -> Path:
    """As the file that is put: Parquet."""
    products.to_parquet(path, index=False)
    return path


def reader(path: Path) -> TableReader:
    """The version that a node makes of the file."""
    target = path.with_suffix(".built")
    build(Order(str(path), "parquet", str(target), str(path.parent), _MEMORY_MB, key=SCHEMA.key))
    return VersionFile(target, path.stem)


def table_set(version: TableReader) -> TableSet:
    return TableSet({TABLE: version})
