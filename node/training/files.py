"""Training data as Parquet: one file for each version of the model, since versions may differ in columns.

Columns: `key.*` say which trigger a row is of, `features.*` are what the model was fed, `outputs.*` what it gave (NaN
where it failed, see `error`), `inputs.*` whether another model's output was of the same event, `tables.*` which version
of each table was read. Numbers are the same bits as the model's: missing ones stay NaN, and no dictionary is made of
them, since one would make a single NaN of all. A missing text is null.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from node.kernel.errors import ExportFailed
from node.kernel.limits import EXPORT_GROUP_BYTES, EXPORT_VERSIONS_MAX
from node.training.fed_rows import FedRows, event_ids
from node.waiting import row_bytes

_COMPRESSION: Final = "zstd"


@dataclass(slots=True)
class _Open:
    file: str
    writer: pq.ParquetWriter
    held: list[pa.RecordBatch] = field(default_factory=list)
    held_bytes: int = 0
    rows: int = 0


class TrainingFiles:
    """Writes `<version>.parquet` files into a folder that is there, whole, once `finish` has been called, and not
    before; without rows there is none. Raises ExportFailed, also for a folder that is there already."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._made = self._folder.parent / f".{self._folder.name}.part"
        self._open: dict[tuple[str, ...], _Open] = {}
        """By version and columns: a model that comes later may turn into an input of one that is there."""

    def __enter__(self) -> TrainingFiles:
        if self._folder.exists():
            raise ExportFailed(f"{self._folder} is there already; name another --out, or move it away")
        try:
            shutil.rmtree(self._made, ignore_errors=True)
            self._made.mkdir(parents=True)
        except OSError as failure:
            raise ExportFailed(f"{self._made} can't be made: {failure.strerror}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._open.values():
            one.writer.close()
        shutil.rmtree(self._made, ignore_errors=True)

    def add(self, rows: FedRows, partition: int) -> None:
        batch = record_batch(rows, partition)
        key = (rows.triggers.version, *batch.schema.names)
        one = self._open.get(key)
        if one is None:
            one = self._open[key] = self._opened(rows.triggers.version, batch.schema)
        one.held.append(batch)
        one.held_bytes += row_bytes(rows.triggers) * len(rows)
        one.rows += len(rows)
        if one.held_bytes >= EXPORT_GROUP_BYTES:
            self._write(one)

    def finish(self) -> dict[str, int]:
        """File -> rows."""
        for one in self._open.values():
            self._write(one)
            one.writer.close()
        told = {one.file: one.rows for one in self._open.values()}
        self._open = {}
        if told:
            try:
                self._made.rename(self._folder)
            except OSError as failure:
                raise ExportFailed(f"{self._folder} can't be made: {failure.strerror}") from None
        return told

    def _opened(self, version: str, schema: pa.Schema) -> _Open:
        if len(self._open) >= EXPORT_VERSIONS_MAX:
            raise ExportFailed(f"there are rows of more than {EXPORT_VERSIONS_MAX} versions; name one by --version")
        earlier = sum(key[0] == version for key in self._open)
        file = f"{version[:12]}{f'.{earlier}' if earlier else ''}.parquet"
        texts = [entry.name for entry in schema if pa.types.is_string(entry.type)]
        return _Open(file, pq.ParquetWriter(self._made / file, schema, compression=_COMPRESSION, use_dictionary=texts))

    def _write(self, one: _Open) -> None:
        if not one.held:
            return
        try:
            one.writer.write_table(pa.Table.from_batches(one.held, one.held[0].schema))
        except OSError as failure:
            raise ExportFailed(f"{self._made} can't be written: {failure.strerror or failure}") from None
        one.held, one.held_bytes = [], 0


def record_batch(rows: FedRows, partition: int) -> pa.RecordBatch:
    """The rows as Arrow columns, with what is the same for all in the schema's metadata."""
    triggers, outputs, count = rows.triggers, rows.outputs, len(rows)
    text, number = pa.string(), pa.float64()
    columns: list[tuple[str, pa.DataType, Any]] = [
        ("key.inference", text, event_ids(rows, partition)),
        ("key.customer", text, list(triggers.customers)),
        ("key.topic", text, _words(rows, triggers.topics, triggers.event_names.topics)),
        ("key.partition", pa.int32(), np.full(count, partition, np.int32)),
        ("key.offset", pa.int64(), triggers.offsets.tolist() if triggers.kind == "event" else [None] * count),
        ("key.type", text, _words(rows, triggers.types, triggers.event_names.types)),
        ("key.time", pa.timestamp("ms", tz="UTC"), triggers.times_ms),
        ("key.commit", pa.int64(), np.full(count, rows.commit)),
        ("key.answered_by", text, [rows.version.version] * count),
    ]
    for place, name in enumerate(triggers.rows.names):
        words = triggers.rows.texts.get(name)
        values = triggers.rows.numbers[:, place] if words is None else words
        columns.append((f"features.{name}", number if words is None else text, values))
    columns += [(f"outputs.{name}", number, outputs.values[:, at]) for at, name in enumerate(rows.version.outputs)]
    columns.append(("error", text, [outputs.errors.get(row) for row in range(count)]))
    for place, told in enumerate(triggers.inputs if triggers.fresh is not None else ()):
        assert triggers.fresh is not None
        columns.append((f"inputs.{told}", pa.bool_(), (triggers.fresh >> place & 1).astype(np.bool_)))
    columns += [(f"tables.{name}", text, [version] * count) for name, version in sorted(triggers.tables.items())]
    schema = pa.schema([(name, kind) for name, kind, _ in columns], _metadata(rows))
    return pa.record_batch([_array(values, kind) for _, kind, values in columns], schema=schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, np.ndarray):
        return pa.array(np.ascontiguousarray(values), from_pandas=False).cast(kind)
    return pa.array(values, kind)


def _words(rows: FedRows, codes: np.ndarray, names: Mapping[int, str]) -> list[str | None]:
    """An interval and a session have no event."""
    return [names[code] for code in codes.tolist()] if rows.triggers.kind == "event" else [None] * len(rows)


def _metadata(rows: FedRows) -> Mapping[str, str]:
    version = rows.version
    return {
        "headrace.model": str(version.name),
        "headrace.version": rows.triggers.version,
        "headrace.labels": ",".join(version.labels),
    }
