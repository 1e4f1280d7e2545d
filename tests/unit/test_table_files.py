"""Files that are no table are refused whole, each mistake with its row; schemas are declared, kept or inferred."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pyarrow as pa
import pytest

from node.kernel.errors import TableRefused, shown
from node.kernel.limits import TABLE_BUILD_NICENESS, WORKER_NICENESS
from node.kernel.tables import TableColumn, TableSchema
from tests.unit.table_support import built, file_of

BEFORE = TableSchema("sku", "text", {"price": TableColumn("number")})


def problems(folder: Path, content: bytes | str, file_format: str = "csv", **wishes: object) -> list[str]:
    with pytest.raises(TableRefused) as refused:
        built(folder, content, file_format, **wishes)
    assert not (folder / "built").exists()
    return list(refused.value.problems)


REFUSED = [
    ("sku,price\na,1\nb\nc,2\n", {}, ["row 2: 1 values for 2 columns: 'b'"]),
    (
        "sku,price\na,1\na,2\nb,3\nb,4\n",
        {},
        ["rows 1 and 2: the key 'a' is there twice", "rows 3 and 4: the key 'b' is there twice"],
    ),
    ("sku,price\na,1\n,2\n", {}, ["row 2: the key sku is missing"]),
    ("sku,price\na,1\nb,2", {}, ["the last line has no end, so the file looks cut off; end it with a line break"]),
    ("sku,cost\na,1\n", {"before": BEFORE}, ["column price is missing; the table has it, and features may use it"]),
    ("sku,price\na,1\n", {"key": "id"}, ["there is no column 'id' in the file; it has 'sku', 'price'"]),
    ("sku,price\na,1\n", {"key": ""}, ["which column is the key? say --key with one of sku, price"]),
    ("sku,sku\na,1\n", {}, ["column 'sku' is there twice"]),
    ("sku,price\n", {}, ["the file has no rows"]),
    ("", {}, ["the first line must name every column, and does not"]),
    (
        "sku,price\na,1\nb,dear\nc,nan\nd,1e99\n",
        {"types": {"price": "number"}},
        [
            "row 2: column price must be a number, not 'dear'",
            "row 3: column price must be a number of at most 1e+15, not nan",
            "row 4: column price must be a number of at most 1e+15, not 1e+99",
        ],
    ),
    (
        "sku,fresh\na,true\nb,yes\n",
        {"types": {"fresh": "boolean"}},
        ["row 2: column fresh must be true or false, not 'yes'"],
    ),
    (
        "sku,price\na,1\n",
        {"types": {"price": "number"}, "defaults": {"price": "dear"}},
        ["the default of column 'price' must be a number, not 'dear'"],
    ),
]


@pytest.mark.parametrize(("content", "wishes", "expected"), REFUSED)
def test_a_wrong_csv_is_refused(tmp_path: Path, content: str, wishes: dict[str, object], expected: list[str]) -> None:
    assert problems(tmp_path, content, **wishes) == expected


def test_a_wrong_row_far_down_is_named(tmp_path: Path) -> None:
    rows = [f"k{number},{number}.5" for number in range(300_000)]
    rows[250_000] = "k250000,dear"
    told = problems(tmp_path, "sku,price\n" + "\n".join(rows) + "\n")
    assert told == ["row 250001: column price must be a number, not 'dear'"]
    rows[250_000] = "k250000"
    assert problems(tmp_path, "sku,price\n" + "\n".join(rows) + "\n")[0].startswith("row 250001: 1 values for 2")
    rows[250_000] = "k77,1"
    told = problems(tmp_path, "sku,price\n" + "\n".join(rows) + "\n")
    assert told == ["rows 78 and 250001: the key 'k77' is there twice"]


def test_only_so_many_mistakes_are_told(tmp_path: Path) -> None:
    told = problems(tmp_path, "sku,price\n" + "x,1\n" * 5000)
    assert len(told) == 21
    assert told[-1] == "there may be more mistakes; mend these first"


NDJSON = [
    (
        '{"sku":"a","price":1}\n{"sku":"b","price":"2"}\n',
        "column 'price' is of several types, none of number, text, boolean; convert it, or say --column for others",
    ),
    ('{"sku":"a","price":1}\n{"sku":"b"\n', "row 2: no JSON: unexpected end of data: line 2 column 1 (char 11)"),
    ('{"sku":"a","price":1}\n[1]\n', "row 2: must be an object, not [1]"),
    (
        '{"sku":"a","tags":[1]}\n',
        "column 'tags' is list, none of number, text, boolean; convert it, or say --column for others",
    ),
    ('{"sku":"a"}\n{"price":2}\n', "row 2: the key sku is missing"),
    ('{"sku":"a\\u0000"}\n', "row 1: column sku must be a text of 1 to 128 bytes without NUL, not 'a\\x00'"),
]


@pytest.mark.parametrize(("content", "expected"), NDJSON)
def test_a_wrong_ndjson_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    assert problems(tmp_path, content, "ndjson") == [expected]


@pytest.mark.parametrize("depth", [60, 300, 700, 900, 950, 1000, 1023])
def test_ndjson_nested_however_deep_is_refused_with_its_row(tmp_path: Path, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    content = f'{{"sku":"a","price":1}}\n{{"sku":"b","price":{deep}}}\n{deep}\n'
    told = problems(tmp_path, content, "ndjson", types={"price": "number"})
    assert told[0].startswith("row 3: must be an object, not ")
    told = problems(tmp_path, content.replace(f"\n{deep}", ""), "ndjson", types={"price": "number"})
    assert told[0].startswith("row 2: column price must be a number, not ")


def test_declared_types_name_the_rows_of_ndjson(tmp_path: Path) -> None:
    content = '{"sku":"a","price":1}\n{"sku":"b","price":true}\n'
    told = problems(tmp_path, content, "ndjson", types={"price": "number"})
    assert told == ["row 2: column price must be a number, not True"]


def test_a_parquet_file_must_be_whole_and_of_the_tables_types(tmp_path: Path) -> None:
    whole = file_of("parquet", {"sku": ["a", "b"], "price": ["1", "2"]})
    assert problems(tmp_path, whole[:-9], "parquet")[0].startswith("this is no Parquet file, or it is cut off: ")
    assert problems(tmp_path, whole, "parquet", before=BEFORE) == [
        "column 'price' is text in the file; it must be number"
    ]
    dated = file_of("parquet", {"sku": ["a"], "day": pa.array([1], pa.date32())})
    assert "date32" in problems(tmp_path, dated, "parquet")[0]
    assert built(tmp_path, dated, "parquet", columns=("sku",)).schema.columns == {}


def texts_of_bytes(values: list[bytes], kind: pa.DataType) -> pa.Array:
    """A column that says it is text, whatever the bytes are: Parquet's writer and reader don't look."""
    return pa.Array.from_buffers(kind, len(values), pa.array(values, pa.large_binary()).cast(_BYTES[kind]).buffers())


_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


@pytest.mark.parametrize("bad", [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xff" * 5000])
@pytest.mark.parametrize("kind", list(_BYTES), ids=str)
def test_texts_of_a_parquet_file_must_be_utf_8(tmp_path: Path, kind: pa.DataType, bad: bytes) -> None:
    keys = [f"k{number}" for number in range(5000)]
    expected = f"row 3001: column {{}} must be a text in UTF-8, not {shown(bad)}"
    many, few = [key.encode() for key in keys], [b"one", b"two"] * 2500
    for values in (many, few):
        values[3000] = bad
        content = file_of("parquet", {"sku": keys, "name": texts_of_bytes(values, kind)})
        assert problems(tmp_path, content, "parquet") == [expected.format("name")]
    assert problems(tmp_path, file_of("parquet", {"sku": texts_of_bytes(many, kind)}), "parquet") == [
        expected.format("sku")
    ]


def test_the_columns_of_a_parquet_file_must_have_names_in_utf_8(tmp_path: Path) -> None:
    content = file_of("parquet", {"sku": ["a"], "price": [1.0]}).replace(b"price", b"pric\xff")
    (told,) = problems(tmp_path, content, "parquet")
    assert told.startswith("this is no Parquet file, or it is cut off: 'utf-8' codec can't decode")


def test_types_are_inferred(tmp_path: Path) -> None:
    content = "sku,price,code,fresh,name,none\n1,1.5,007,true,x,\n2,-3e2,100,False,7,\n"
    schema = built(tmp_path, content).schema
    assert schema.key_type == "number"
    kinds = {name: column.type for name, column in schema.columns.items()}
    assert kinds == {"price": "number", "code": "text", "fresh": "boolean", "name": "text", "none": "text"}
    again = built(
        tmp_path,
        '{"sku":1,"price":2,"code":"x","fresh":true,"name":null,"none":"","more":1}\n',
        "ndjson",
        before=schema,
        key="",
    )
    assert {**kinds, "more": "number"} == {name: column.type for name, column in again.schema.columns.items()}


def test_a_schema_may_grow_and_its_types_stay() -> None:
    grown = TableSchema("sku", "text", {"price": TableColumn("number", 1.0), "name": TableColumn("text")})
    assert grown.problems_after(BEFORE) == []
    assert len(BEFORE.problems_after(grown)) == 1
    assert TableSchema("sku", "number", {}).problems_after(BEFORE)
    assert TableSchema("sku", "text", {"price": TableColumn("text")}).problems_after(BEFORE)
    assert TableSchema.decode(grown.encode()) == grown


def test_a_version_is_built_by_a_process_that_goes_behind_all_others(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("sku,price\na,1\n")
    order = {"source": str(tmp_path / "source"), "format": "csv", "target": str(tmp_path / "built")}
    order |= {"scratch": str(tmp_path)}
    building = subprocess.Popen([sys.executable, "-m", "node.tables"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    deadline = time.monotonic() + 30
    while os.getpriority(os.PRIO_PROCESS, building.pid) != min(own + TABLE_BUILD_NICENESS, 19):
        assert building.poll() is None
        assert time.monotonic() < deadline
    said, _ = building.communicate(msgspec.json.encode({**order, "memory_mb": 1000, "key": "sku"}), timeout=30)
    assert b'"rows":1' in said.splitlines()[-1]
    assert building.returncode == 0
    assert TABLE_BUILD_NICENESS > WORKER_NICENESS, "answers of models go before a version that somebody waits for"
