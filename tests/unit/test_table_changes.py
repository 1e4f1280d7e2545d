"""A table that follows a topic holds each key's last row, however its records are cut into versions."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.kernel.errors import TableRefused
from node.kernel.tables import TableColumn, TableSchema
from node.kernel.types import FieldType
from node.tables.build import Order, build
from node.tables.changes import DELETED, Changes, RecordRefused
from node.tables.declaration import declared
from node.tables.version_file import VersionFile

SCHEMA = TableSchema(
    "sku",
    "text",
    {"price": TableColumn("number", 9.5), "name": TableColumn("text", "none"), "fresh": TableColumn("boolean")},
)
NUMBERED = TableSchema("sku", "number", {"price": TableColumn("number")})
ROWS = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "price": st.none() | st.floats(-1e6, 1e6) | st.integers(-9, 9),
        "name": st.none() | st.text(max_size=5),
        "fresh": st.none() | st.booleans(),
        "other": st.integers(-9, 9),
    },
)
RECORDS = st.lists(st.tuples(st.sampled_from(["a", "b", "c", "ä long key", "e" * 30]), ROWS), min_size=1, max_size=30)


class Follower:
    """What a feed does with records, version upon version, without a broker."""

    def __init__(self, folder: Path, schema: TableSchema = SCHEMA) -> None:
        self._folder = folder
        self._schema = schema
        self._changes = Changes(schema)
        self.version = ""

    def take(self, records: Sequence[tuple[str, dict[str, Any] | None]]) -> None:
        lines = [self._changes.line(key.encode(), None if row is None else orjson.dumps(row)) for key, row in records]
        source, target = self._folder / "changes", self._folder / "built"
        source.write_bytes(b"".join(lines))
        order = Order(
            str(source), "ndjson", str(target), str(self._folder), 1000, before=self._schema, changes_to=self.version
        )
        built = build(order)
        assert built.schema == self._schema
        self.version = str(self._folder / "version")
        shutil.copyfile(target, self.version)

    def rows(self, keys: Sequence[str]) -> list[dict[str, Any] | None]:
        """Of each key; None for none. What a row has not is None."""
        version = VersionFile(Path(self.version), "v", defaults=False)
        at = version.rows(np.array(keys, dtype=object))
        columns = {name: version.column(name, at).tolist() for name in self._schema.columns}
        found = []
        for place, row in enumerate(at.tolist()):
            values = {name: column[place] for name, column in columns.items()}
            found.append(
                None
                if row < 0
                else {n: None if isinstance(v, float) and math.isnan(v) else v for n, v in values.items()}
            )
        return found


def last_rows(records: Sequence[tuple[str, dict[str, Any] | None]]) -> dict[str, dict[str, Any]]:
    """The reference: one record after another into a dictionary."""
    held: dict[str, dict[str, Any]] = {}
    for key, row in records:
        if row is None:
            held.pop(key, None)
        else:
            held[key] = {name: row.get(name) for name in SCHEMA.columns}
    return held


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=RECORDS, cuts=st.lists(st.integers(0, 30), max_size=3))
def test_versions_upon_versions_hold_the_last_row_of_each_key(tmp_path: Path, records, cuts) -> None:
    follower, taken = Follower(tmp_path), 0
    for end in sorted({*(cut for cut in cuts if cut < len(records)), len(records)}):
        part = records[taken:end]
        expected = last_rows(records[:end])
        if not part:
            continue
        if not expected:
            with pytest.raises(TableRefused, match="all rows of the topic are deleted"):
                follower.take(part)
            continue  # the version stays, and the records are taken with the next ones
        follower.take(part)
        taken = end
        keys = ["a", "b", "c", "ä long key", "e" * 30, "none"]
        assert follower.rows(keys) == [expected.get(key) for key in keys]


def test_what_a_row_has_not_stays_missing_in_later_versions_and_gives_the_default(tmp_path: Path) -> None:
    follower = Follower(tmp_path)
    follower.take([("a", {"name": "first"}), ("b", {"price": 2})])
    follower.take([("c", {"price": 3})])
    assert follower.rows(["a", "b"]) == [
        {"price": None, "name": "first", "fresh": None},
        {"price": 2.0, "name": None, "fresh": None},
    ]
    version = VersionFile(Path(follower.version), "v")
    at = version.rows(np.array(["a", "b"], dtype=object))
    assert version.column("price", at).tolist() == [9.5, 2.0]
    assert version.column("name", at).tolist() == ["first", "none"]


def test_numbers_are_keys_too_and_go_over_from_version_to_version(tmp_path: Path) -> None:
    follower = Follower(tmp_path, NUMBERED)
    follower.take([("1", {"price": 1}), ("-2.5", {"price": 2, "sku": -2.5}), ("3", {"price": 3})])
    follower.take([("1.0", {"price": 4}), ("3", None)])
    version = VersionFile(Path(follower.version), "v")
    assert version.column("price", version.rows(np.array([1.0, -2.5]))).tolist() == [4.0, 2.0]
    assert version.rows(np.array([3.0])).tolist() == [-1]


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (None, b"{}", "its key must be a text"),
        (b"", b"{}", "its key must be a text"),
        (b"a\0", b"{}", "its key must be a text"),
        (b"k" * 129, b"{}", "its key must be a text"),
        (b"\xff", None, "its key must be a text"),
        (b"a", b"{", "no JSON"),
        (b"a", b"[]", "must be an object"),
        (b"a", b'{"sku":"b"}', "its sku is 'b', its key 'a'"),
        (b"a", b'{"price":"1"}', "column price must be a number"),
        (b"a", b'{"price":true}', "column price must be a number"),
        (b"a", b'{"price":1e16}', "column price must be a number"),
        (b"a", b'{"name":1}', "column name must be a text"),
        (b"a", orjson.dumps({"name": "n" * 4097}), "column name must be a text"),
        (b"a", b'{"fresh":1}', "column fresh must be true or false"),
        (b"a", orjson.dumps({"other": "n" * (1 << 19)}), "longer than"),
    ],
)
def test_a_record_that_is_no_row_is_refused_by_itself(key: bytes | None, value: bytes | None, reason: str) -> None:
    with pytest.raises(RecordRefused, match=reason):
        Changes(SCHEMA).line(key, value)


@pytest.mark.parametrize("depth", [60, 300, 700, 900, 950, 1000, 1023])
def test_a_record_nested_however_deep_is_refused_by_itself(depth: int) -> None:
    deep = b"[" * depth + b"]" * depth
    for column in (b"price", b"sku"):
        with pytest.raises(RecordRefused, match=r"not (\[|a list nested)|is (\[|a list nested)"):
            Changes(SCHEMA).line(b"a", b'{"%s":%s}' % (column, deep))
    with pytest.raises(RecordRefused, match="its value must be an object, not"):
        Changes(SCHEMA).line(b"a", deep)


@pytest.mark.parametrize("key", [b"x", b"nan", b"inf", b"1e300", None])
def test_a_key_that_is_no_number_is_refused(key: bytes | None) -> None:
    with pytest.raises(RecordRefused, match="its key must be a number"):
        Changes(NUMBERED).line(key, b"{}")


def test_a_schema_is_declared_whole_or_taken_over() -> None:
    types = {"sku": "text", "price": "number", "name": "text", "fresh": "boolean"}
    assert declared("sku", types, {"price": "9.5", "name": "none"}, None) == SCHEMA
    assert declared("", {}, {}, SCHEMA) == SCHEMA
    for key, given_types, defaults, reason in (
        ("", {}, {}, "which column is the key"),
        ("fresh", types, {}, "boolean"),
        ("sku", types, {"cost": "1"}, "no column cost"),
        ("sku", types, {"price": "x"}, "must be a number"),
        ("sku", {**types, DELETED: "boolean"}, {}, "none of them named"),
        ("sku", {"sku": "text", "price": "number"}, {}, ""),
    ):
        before = None if reason else SCHEMA
        with pytest.raises(TableRefused, match=reason or "column name is missing"):
            declared(key, given_types, defaults, before)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("column", "text", "value"),
    [
        ("price", "9.5", 9.5),
        ("price", "-1e15", -1e15),
        ("name", "inf", "inf"),
        ("fresh", "true", 1.0),
        ("fresh", "1", 1.0),
        ("fresh", "false", 0.0),
        ("fresh", "0", 0.0),
    ],
)
def test_a_default_is_kept_as_it_was_declared(column: str, text: str, value: float | str) -> None:
    types: dict[str, FieldType] = {"sku": "text", "price": "number", "name": "text", "fresh": "boolean"}
    schema = declared("sku", types, {column: text}, None)
    assert TableSchema.decode(schema.encode()).columns[column].default == value
    assert declared("", {}, {}, schema) == schema


@pytest.mark.parametrize(
    ("column", "text", "reason"),
    [
        ("price", "dear", "must be a number, not 'dear'"),
        ("price", "inf", "must be a number of at most 1e+15, not 'inf'"),
        ("price", "1e400", "must be a number of at most 1e+15, not '1e400'"),
        ("price", "nan", "must be a number of at most 1e+15, not 'nan'"),
        ("price", "-1e16", "must be a number of at most 1e+15, not '-1e16'"),
        ("fresh", "7", "must be true, false, 1 or 0, not '7'"),
        ("fresh", "0.5", "must be true, false, 1 or 0, not '0.5'"),
        ("fresh", "yes", "must be true, false, 1 or 0, not 'yes'"),
    ],
)
def test_a_default_that_a_column_could_not_hold_is_refused(column: str, text: str, reason: str) -> None:
    types: dict[str, FieldType] = {"sku": "text", "price": "number", "name": "text", "fresh": "boolean"}
    with pytest.raises(TableRefused) as refused:
        declared("sku", types, {column: text}, None)
    assert list(refused.value.problems) == [f"the default of column {column!r} {reason}"]
