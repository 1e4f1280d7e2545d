"""A table's file as batches of typed columns: Parquet, CSV (UTF-8, comma, a header) or NDJSON.

Every format goes through one mill: column names, then types (declared, else as the table has them, else inferred),
then batch after batch, each mistake with its row. Runs in the building process only. Raises TableRefused.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast

import orjson
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from node.kernel.errors import TableRefused, shown
from node.kernel.limits import EVENT_BYTES_MAX, MIB, TABLE_COLUMNS_MAX, TABLE_SAMPLE_ROWS
from node.kernel.tables import TableColumn, TableSchema
from node.kernel.types import FieldType
from node.tables.conversion import (
    Converter,
    Problems,
    check_keys,
    csv_kind,
    json_column,
    json_kind,
    kind_of,
    parsed,
    typed,
)
from node.tables.declaration import default_value

Format: TypeAlias = Literal["parquet", "csv", "ndjson"]
FORMATS: Final = ("parquet", "csv", "ndjson")
KINDS: Final = ("number", "text", "boolean")
_BATCH_ROWS: Final = 65_536
_BLOCK_BYTES: Final = 4 * MIB

Columns: TypeAlias = Mapping[str, Any]
"""Name -> raw values of one batch, all equally many."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of a file. `before` is the schema that the table has; '' of `key`: the one before's.

    `columns` are those to take, all when empty. `types` and `defaults` are declared by name.
    """

    key: str = ""
    columns: tuple[str, ...] = ()
    types: Mapping[str, FieldType] | None = None
    defaults: Mapping[str, str] | None = None
    before: TableSchema | None = None


@dataclass(frozen=True, slots=True)
class _Raw:
    """A file opened: its columns, how a sample of a column tells its type, and its batches."""

    names: tuple[str, ...]
    kind: Callable[[str], str]
    batches: Iterator[tuple[int, Columns]]
    """Rows and raw columns."""
    convert: Converter
    given: bool = False
    """Whether the file itself says its types, so that another is a mistake of the whole column."""


@dataclass(frozen=True, slots=True)
class Read:
    schema: TableSchema
    batches: Iterator[pa.RecordBatch]
    """float64 and large_string columns, the key first, then those of the schema in its order."""


def read_table(path: Path, file_format: Format, wish: Wish) -> Read:
    """Raises TableRefused, now for what is wrong with the whole, and from `batches` for what is wrong with rows."""
    problems = Problems()
    raw = _OPENERS[file_format](path, problems)
    schema = _schema(raw, wish)
    return Read(schema, _typed_batches(raw, schema, problems))


def _typed_batches(raw: _Raw, schema: TableSchema, problems: Problems) -> Iterator[pa.RecordBatch]:
    types: dict[str, FieldType] = {schema.key: schema.key_type}
    types |= {name: column.type for name, column in schema.columns.items()}
    row = 1
    for count, columns in raw.batches:
        arrays = []
        for name, wanted in types.items():
            arrays.append(raw.convert(columns[name], wanted, name, row, problems))
        check_keys(arrays[0], schema.key, row, problems)
        row += count
        yield pa.RecordBatch.from_arrays(arrays, names=list(types))
    problems.finish()


# --- the schema -----------------------------------------------------------------------------------------------------


def _schema(raw: _Raw, wish: Wish) -> TableSchema:
    names, before = raw.names, wish.before
    problems = Problems()
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TableRefused([f"column {shown(name)} is there twice" for name in twice])
    key = wish.key or (before.key if before is not None else "")
    if not key:
        raise TableRefused([f"which column is the key? say --key with one of {', '.join(names)}"])
    taken = [name for name in names if not wish.columns or name in wish.columns or name == key]
    for name in (key, *wish.columns, *(wish.types or {}), *(wish.defaults or {})):
        if name not in taken:
            problems.add(f"there is no column {shown(name)} in the file; it has {', '.join(map(shown, names))}")
    problems.finish()
    if len(taken) > TABLE_COLUMNS_MAX:
        raise TableRefused([f"the file has {len(taken)} columns, the most is {TABLE_COLUMNS_MAX}; say --column"])
    kinds = {name: _kind(raw, wish, name, problems) for name in taken}
    problems.finish()
    if kinds[key] == "boolean":
        raise TableRefused([f"the key {shown(key)} is boolean; it must be a number or a text"])
    columns = {name: TableColumn(kinds[name], _default(wish, name, kinds[name])) for name in taken if name != key}
    schema = TableSchema(key, cast("Literal['number', 'text']", kinds[key]), columns)
    if before is not None and (found := schema.problems_after(before)):
        raise TableRefused(found)
    return schema


def _kind(raw: _Raw, wish: Wish, name: str, problems: Problems) -> FieldType:
    wanted = (wish.types or {}).get(name) or _kind_before(wish, name)
    if wanted is not None and not raw.given:
        return wanted
    kind = raw.kind(name)
    if kind not in KINDS:
        problems.add(
            f"column {shown(name)} is {kind}, none of {', '.join(KINDS)}; convert it, or say --column for others"
        )
    elif wanted is not None and kind != wanted:
        problems.add(f"column {shown(name)} is {kind} in the file; it must be {wanted}")
    return wanted or cast("FieldType", kind)


def _kind_before(wish: Wish, name: str) -> FieldType | None:
    before = wish.before
    if before is None:
        return None
    if name == before.key:
        return before.key_type
    return before.columns[name].type if name in before.columns else None


def _default(wish: Wish, name: str, kind: FieldType) -> float | str | None:
    text = (wish.defaults or {}).get(name)
    if text is None:
        known = wish.before.columns.get(name) if wish.before is not None else None
        return known.default if known is not None else None
    return default_value(name, text, kind)


# --- formats --------------------------------------------------------------------------------------------------------


def _parquet(path: Path, problems: Problems) -> _Raw:
    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as failure:
        raise TableRefused([f"this is no Parquet file, or it is cut off: {_first_line(failure)}"]) from None
    schema = file.schema_arrow

    def kind(name: str) -> str:
        found = schema.field(name).type
        return kind_of(found) or str(found)

    usable = [field.name for field in schema if kind_of(field.type) is not None]

    def batches() -> Iterator[tuple[int, Columns]]:
        try:
            for batch in file.iter_batches(_BATCH_ROWS, columns=usable):
                yield batch.num_rows, dict(zip(batch.schema.names, batch.columns, strict=True))
        except (pa.ArrowInvalid, OSError) as failure:
            raise TableRefused([f"the Parquet file is damaged: {_first_line(failure)}"]) from None

    return _Raw(tuple(schema.names), kind, batches(), typed, given=True)


def _csv(path: Path, problems: Problems) -> _Raw:
    names = _csv_header(path)
    _check_end(path)
    pieces = _csv_batches(path, names, problems)
    sample, batches = _sampled(pieces)

    def kind(name: str) -> str:
        values = chain.from_iterable(columns[name].to_pylist() for _, columns in sample)
        return csv_kind(islice(values, TABLE_SAMPLE_ROWS))

    return _Raw(names, kind, batches, parsed)


def _csv_header(path: Path) -> tuple[str, ...]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            names = next(csv.reader(io.StringIO(file.readline(EVENT_BYTES_MAX))), [])
    except (UnicodeDecodeError, csv.Error) as failure:
        raise TableRefused([f"the header is no line of CSV in UTF-8: {failure}"]) from None
    if not names or not all(name.strip() for name in names):
        raise TableRefused(["the first line must name every column, and does not"])
    return tuple(names)


def _check_end(path: Path) -> None:
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read(1) != b"\n":
            raise TableRefused(["the last line has no end, so the file looks cut off; end it with a line break"])


def _csv_batches(path: Path, names: Sequence[str], problems: Problems) -> Iterator[tuple[int, Columns]]:
    def wrong(row: pyarrow.csv.InvalidRow) -> str:
        at = "a row" if row.number is None else f"row {row.number - 1}"
        problems.add(f"{at}: {row.actual_columns} values for {row.expected_columns} columns: {shown(row.text)}")
        return "skip"

    try:
        # One thread: only so does it know the numbers of rows.
        reader = pyarrow.csv.open_csv(
            path,
            pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES, column_names=list(names), skip_rows=1),
            pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=wrong),
            pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
        for batch in reader:
            problems.finish()  # rows are numbered by what is there, so none may have been skipped
            yield batch.num_rows, dict(zip(batch.schema.names, batch.columns, strict=True))
        problems.finish()
    except (pa.ArrowInvalid, OSError) as failure:
        problems.finish()
        if "Empty CSV" in str(failure):
            return
        raise TableRefused([f"the CSV file can't be read: {_first_line(failure)}"]) from None


def _ndjson(path: Path, problems: Problems) -> _Raw:
    _check_end(path)
    lines = _json_rows(path, problems)
    names: dict[str, None] = {}
    first: list[dict[str, Any]] = []
    for rows in lines:
        first += rows
        if len(first) >= TABLE_SAMPLE_ROWS:
            break
    problems.finish()
    sample = first[:TABLE_SAMPLE_ROWS]
    for row in sample:
        names.update(dict.fromkeys(row))

    def kind(name: str) -> str:
        return json_kind(row.get(name) for row in sample)

    return _Raw(tuple(names), kind, _json_batches(chain([first], lines), names, problems), json_column)


def _json_rows(path: Path, problems: Problems) -> Iterator[list[dict[str, Any]]]:
    """Up to a batch of rows at a time; blank lines are none."""
    rows: list[dict[str, Any]] = []
    number = 0
    with path.open("rb") as file:
        while line := file.readline(EVENT_BYTES_MAX + 1):
            if not line.strip():
                continue
            number += 1
            rows.append(_json_row(line, number, problems))
            if len(rows) == _BATCH_ROWS:
                yield rows
                rows = []
    problems.finish()
    if rows:
        yield rows


def _json_row(line: bytes, number: int, problems: Problems) -> dict[str, Any]:
    if len(line) > EVENT_BYTES_MAX:
        raise TableRefused([f"row {number}: longer than {EVENT_BYTES_MAX} bytes"])
    try:
        row = orjson.loads(line)
    except ValueError as failure:
        problems.add(f"row {number}: no JSON: {_first_line(failure)}")
        return {}
    if not isinstance(row, dict):
        problems.add(f"row {number}: must be an object, not {shown(row)}")
        return {}
    return row


def _json_batches(
    pieces: Iterable[list[dict[str, Any]]], names: Mapping[str, None], problems: Problems
) -> Iterator[tuple[int, Columns]]:
    number = 1
    for rows in pieces:
        for row in rows:
            if not row.keys() <= names.keys():
                new = next(name for name in row if name not in names)
                problems.add(f"row {number}: column {shown(new)} is in none of the first {TABLE_SAMPLE_ROWS} rows")
            number += 1
        yield len(rows), {name: [row.get(name) for row in rows] for name in names}


def _sampled(batches: Iterator[tuple[int, Columns]]) -> tuple[list[tuple[int, Columns]], Iterator[tuple[int, Columns]]]:
    """The first batches, and all of them."""
    first: list[tuple[int, Columns]] = []
    rows = 0
    for count, columns in batches:
        first.append((count, columns))
        rows += count
        if rows >= TABLE_SAMPLE_ROWS:
            break
    return first, chain(first, batches)


def _first_line(failure: Exception) -> str:
    return str(failure).splitlines()[0][:200] if str(failure) else type(failure).__name__


_OPENERS: Final[Mapping[str, Callable[[Path, Problems], _Raw]]] = {"parquet": _parquet, "csv": _csv, "ndjson": _ndjson}
