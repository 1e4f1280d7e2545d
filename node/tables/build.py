"""The program that checks a table's file and writes it as a version: `python -m node.tables`, an order on stdin.

A process of its own: parsing what somebody uploaded is C++ at work on foreign bytes, takes memory that should be given
back, and must not hold up the node's loop. Memory needed: the largest column, and the keys' width and 24 bytes a row.

stdout has JSON lines: `{"rows": n}` while it reads, then `{"built": …}`, `{"problems": […]}` or `{"disk": "…"}`.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from node.kernel.errors import HeadraceError, TableRefused, shown
from node.kernel.limits import MIB, TABLE_ROWS_MAX
from node.kernel.tables import TableSchema
from node.kernel.types import Bools, FieldType, Ints
from node.tables.changes import DELETED, without_deleted
from node.tables.conversion import Problems
from node.tables.keys import Words, byte_words, hashed, key_width, number_words
from node.tables.reading import Format, Wish, read_table
from node.tables.version_file import VersionFile, VersionWriter

_SEEDS: Final = 8
"""Two of n keys share a hash with a chance of n²/2⁶⁵; another seed parts them."""
_PIECE_ROWS: Final = 262_144
_CODED_VALUES_MAX: Final = 65_536


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to build from which file. `key` and so on are as in `reading.Wish`."""

    source: str
    format: Format
    target: str
    scratch: str
    """A folder for what is read so far."""
    memory_mb: int
    key: str = ""
    columns: tuple[str, ...] = ()
    types: dict[str, FieldType] = {}
    defaults: dict[str, str] = {}
    before: TableSchema | None = None
    changes_to: str | None = None
    """The file has changes, as `node.tables.changes` makes them, to the version in this one; '': to an empty table."""


class Built(msgspec.Struct, frozen=True):
    schema: TableSchema
    rows: int
    bytes: int


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the program's output."""

    rows: int = 0
    built: Built | None = None
    problems: tuple[str, ...] = ()
    disk: str = ""
    """Why the disk refused."""


def build(order: Order, say: Callable[[int], None] = lambda rows: None) -> Built:
    """Write the version; `say` hears how many rows are read. Raises TableRefused, OSError from the disk."""
    wish = Wish(order.key, order.columns, order.types, order.defaults, order.before)
    read = read_table(Path(order.source), order.format, wish)
    batches, schema = read.batches, read.schema
    if order.changes_to is not None:
        batches = chain(_rows_before(order.changes_to, schema), batches)
    with tempfile.NamedTemporaryFile(dir=order.scratch, prefix=".rows-") as staged:
        _stage(batches, schema, staged.name, say)
        with pa.memory_map(staged.name) as mapped:
            return _write(pa.ipc.open_file(mapped).read_all(), schema, Path(order.target), order.changes_to is not None)


def _rows_before(path: str, schema: TableSchema) -> Iterator[pa.RecordBatch]:
    """The rows of a version, as if they came first in the file of changes."""
    if not path:
        return
    version, wanted = VersionFile(Path(path), "", defaults=False), _arrow_schema(schema)
    for start in range(0, version.row_count, _PIECE_ROWS):
        rows = np.arange(start, min(start + _PIECE_ROWS, version.row_count))
        kept = [np.zeros(len(rows)) if name == DELETED else version.column(name, rows) for name in schema.columns]
        columns = [version.keys(slice(start, start + len(rows))), *kept]
        yield pa.RecordBatch.from_arrays(
            [pa.array(column, field.type, from_pandas=True) for column, field in zip(columns, wanted, strict=True)],
            schema=wanted,
        )


def _arrow_schema(schema: TableSchema) -> pa.Schema:
    types = {schema.key: schema.key_type, **{name: column.type for name, column in schema.columns.items()}}
    return pa.schema([(name, pa.large_string() if kind == "text" else pa.float64()) for name, kind in types.items()])


def _stage(batches: Iterator[pa.RecordBatch], schema: TableSchema, path: str, say: Callable[[int], None]) -> None:
    rows = 0
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, _arrow_schema(schema)) as writer:
        for batch in batches:
            writer.write_batch(batch)
            rows += batch.num_rows
            if rows > TABLE_ROWS_MAX:
                raise TableRefused([f"the file has more than {TABLE_ROWS_MAX} rows (TABLE_ROWS_MAX)"])
            say(rows)
    if not rows:
        raise TableRefused(["the file has no rows"])


def _write(table: pa.Table, schema: TableSchema, target: Path, changes: bool) -> Built:
    words = _words(table.column(schema.key))
    if changes:
        seed, hashes, order = _newest(words, table.column(DELETED).to_numpy() != 0)
        schema = msgspec.structs.replace(schema, columns=without_deleted(schema.columns))
        if not len(order):
            raise TableRefused(["all rows of the topic are deleted; a table can't be empty, the version before stays"])
    else:
        seed, hashes, order = _ordered(words, table.column(schema.key))
    with target.open("wb") as file:
        writer = VersionWriter(file)
        writer.section("hashes", [hashes.data])
        writer.section("keys", (words[order[at : at + _PIECE_ROWS]].data for at in range(0, len(order), _PIECE_ROWS)))
        del hashes
        for number, (name, column) in enumerate(schema.columns.items()):
            if column.type == "text":
                _write_texts(writer, number, table.column(name), order)
            else:
                values = table.column(name).to_numpy()[order]
                writer.section(f"{number}.values", [values.data])
        writer.finish(schema, len(order), words.shape[1], seed)
        file.flush()
        os.fsync(file.fileno())
        return Built(schema, len(order), file.tell())


def _words(keys: pa.ChunkedArray) -> Words:
    if pa.types.is_floating(keys.type):
        return number_words(keys.to_numpy())
    width = key_width(pc.max(pc.binary_length(keys)).as_py())
    words = np.empty((len(keys), width), np.uint64)
    at = 0
    for chunk in keys.chunks:
        encoded = chunk.cast(pa.large_binary()).to_pylist()
        words[at : at + len(encoded)] = byte_words(encoded, width)
        at += len(encoded)
    return words


def _ordered(words: Words, keys: pa.ChunkedArray) -> tuple[int, Words, Ints]:
    """A seed that gives every key a hash of its own, the hashes in order, and the row of each. Raises TableRefused."""
    for seed in range(_SEEDS):
        found = hashed(words, seed)
        order = np.argsort(found, kind="stable")
        found = found[order]
        alike = np.flatnonzero(found[1:] == found[:-1])
        if not len(alike):
            return seed, found, order
        _refuse_duplicates(alike, words, order, keys)
    raise TableRefused([f"two different keys have the same hash under each of {_SEEDS} seeds"])


def _newest(words: Words, deleted: Bools) -> tuple[int, Words, Ints]:
    """As `_ordered`, of rows of which the last with a key counts, and none if that one deletes it."""
    for seed in range(_SEEDS):
        found = hashed(words, seed)
        order = np.argsort(found, kind="stable")
        found = found[order]
        again = found[1:] == found[:-1]
        alike = np.flatnonzero(again)
        if (words[order[alike]] == words[order[alike + 1]]).all():
            kept = np.append(~again, True) & ~deleted[order]
            return seed, found[kept], order[kept]
    raise TableRefused([f"two different keys have the same hash under each of {_SEEDS} seeds"])


def _refuse_duplicates(alike: Ints, words: Words, order: Ints, keys: pa.ChunkedArray) -> None:
    problems = Problems()
    first, second = order[alike], order[alike + 1]
    same = (words[first] == words[second]).all(axis=1)
    for one, other in sorted(zip(first[same].tolist(), second[same].tolist(), strict=True)):
        problems.add(f"rows {one + 1} and {other + 1}: the key {shown(keys[one].as_py())} is there twice")
    problems.finish()


def _write_texts(writer: VersionWriter, number: int, column: pa.ChunkedArray, order: Ints) -> None:
    if pc.count_distinct(column).as_py() <= min(_CODED_VALUES_MAX, len(order) // 2 + 1):
        coded = column.dictionary_encode().unify_dictionaries()
        codes = [pc.fill_null(chunk.indices, -1).to_numpy(zero_copy_only=False) for chunk in coded.chunks]
        values = [text.encode() for text in coded.chunk(0).dictionary.to_pylist()]
        writer.section(f"{number}.codes", [np.concatenate(codes)[order].astype(np.int32).data])
        writer.section(f"{number}.starts", [np.cumsum([0, *map(len, values)]).astype(np.int64).data])
        writer.section(f"{number}.bytes", values)
        return
    taken = column.combine_chunks().take(pa.array(order))
    lengths = pc.fill_null(pc.binary_length(taken), -1).to_numpy(zero_copy_only=False)
    offsets = np.frombuffer(taken.buffers()[1], np.int64, len(taken) + 1, taken.offset * 8)
    writer.section(f"{number}.starts", [(offsets[:-1] - offsets[0]).data])
    writer.section(f"{number}.lengths", [lengths.astype(np.int32).data])
    writer.section(f"{number}.bytes", [memoryview(taken.buffers()[2])[offsets[0] : offsets[-1]]])


def main() -> int:
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    resource.setrlimit(resource.RLIMIT_DATA, (order.memory_mb * MIB, order.memory_mb * MIB))
    pa.set_cpu_count(1)
    try:
        report = Report(built=build(order, lambda rows: _say(Report(rows=rows))))
    except TableRefused as refusal:
        report = Report(problems=refusal.problems)
    except HeadraceError as failure:  # such as the version before, of changes, that is not here yet
        report = Report(problems=(str(failure),))
    except (MemoryError, pa.ArrowMemoryError):
        memory = f"the table needs more than the {order.memory_mb} MB of [tables] build_memory_mb to be built"
        report = Report(problems=(f"{memory}; raise it, or take fewer columns",))
    except OSError as failure:
        report = Report(disk=str(failure))
    _say(report)
    return 0


def _say(report: Report) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()
