"""Making tables' files and versions for tests."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from node.tables.build import Built, Order, build
from node.tables.version_file import VersionFile


def file_of(file_format: str, columns: Mapping[str, Sequence[Any]]) -> bytes:
    """The columns as a file of that format."""
    if file_format == "ndjson":
        rows = zip(*columns.values(), strict=True)
        return b"".join(orjson.dumps(dict(zip(columns, row, strict=True))) + b"\n" for row in rows)
    sink = io.BytesIO()
    if file_format == "parquet":
        pyarrow.parquet.write_table(pa.table(dict(columns)), sink)
    else:
        pyarrow.csv.write_csv(pa.table(dict(columns)), sink)
    return sink.getvalue()


def built(folder: Path, content: bytes | str, file_format: str = "csv", **wishes: Any) -> Built:
    """Raises TableRefused."""
    source = folder / f"source.{file_format}"
    source.write_bytes(content.encode() if isinstance(content, str) else content)
    order = Order(str(source), file_format, str(folder / "built"), str(folder), 1000, **{"key": "sku", **wishes})  # type: ignore[arg-type]
    return build(order)


def version_of(
    folder: Path, content: bytes | str, file_format: str = "csv", name: str = "v1", **wishes: Any
) -> VersionFile:
    built(folder, content, file_format, **wishes)
    return VersionFile(folder / "built", name)
