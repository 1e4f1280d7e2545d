"""A version of a table: what was in the file is found by key, whatever the format; what was not is not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.kernel.errors import StoreUnavailable
from node.tables import build as build_module
from node.tables.keys import hashed, text_words
from node.tables.version_file import VersionFile
from tests.unit.table_support import built, file_of, version_of

KEYS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=40).filter(
    lambda text: len(text.encode()) <= 128
)
NUMBERS = st.floats(-1e15, 1e15) | st.integers(-(10**6), 10**6).map(float)
VALUES = st.one_of(st.none(), NUMBERS)


def texts(*values: str | None) -> np.ndarray:
    return np.array(values, dtype=object)


def same(found: np.ndarray, expected: list[object]) -> bool:
    shown = [None if isinstance(value, float) and math.isnan(value) else value for value in found.tolist()]
    return shown == expected


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.dictionaries(
        KEYS, st.tuples(VALUES, st.none() | st.text(max_size=20), st.none() | st.booleans()), min_size=1
    ),
    others=st.lists(KEYS | st.none(), max_size=20),
    file_format=st.sampled_from(["parquet", "ndjson"]),
)
def test_every_row_is_found_by_its_key_and_no_other(tmp_path: Path, rows, others, file_format) -> None:
    columns = {"sku": list(rows), "price": [row[0] for row in rows.values()]}
    columns |= {"name": [row[1] for row in rows.values()], "fresh": [row[2] for row in rows.values()]}
    types = {"sku": "text", "price": "number", "name": "text", "fresh": "boolean"} if file_format == "ndjson" else {}
    if file_format == "parquet":
        import pyarrow as pa

        columns["name"] = pa.array(columns["name"], pa.string())
        columns["price"] = pa.array(columns["price"], pa.float64())
        columns["fresh"] = pa.array(columns["fresh"], pa.bool_())
    version = version_of(tmp_path, file_of(file_format, columns), file_format, types=types)
    asked = [*rows, *others, *rows]
    found = version.rows(texts(*asked))
    missing = (None, None, None)
    assert same(version.column("price", found), [rows.get(key, missing)[0] for key in asked])
    assert version.column("name", found).tolist() == [rows.get(key, missing)[1] for key in asked]
    assert same(version.column("fresh", found), [rows.get(key, missing)[2] for key in asked])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.sets(NUMBERS, min_size=1), others=st.lists(NUMBERS | st.just(math.nan), max_size=20))
def test_numbers_are_keys_too(tmp_path: Path, keys, others) -> None:
    listed = sorted(keys)
    version = version_of(tmp_path, file_of("parquet", {"sku": listed, "place": [*range(len(listed))]}), "parquet")
    asked = np.array([*listed, *others])
    found = version.column("place", version.rows(asked))
    assert same(found, [float(listed.index(key)) if key in keys else None for key in asked.tolist()])


def test_a_key_without_a_row_gives_the_default(tmp_path: Path) -> None:
    content = "sku,price,name\na,1.5,first\nb,,\n"
    version = version_of(tmp_path, content, defaults={"price": "9.5", "name": "none"})
    rows = version.rows(texts("a", "b", "c", None))
    assert version.column("price", rows).tolist() == [1.5, 9.5, 9.5, 9.5]
    assert version.column("name", rows).tolist() == ["first", "none", "none", "none"]
    assert version.column("colour", rows) is None


@pytest.mark.parametrize("distinct", [10, 200_000])
def test_many_texts_are_kept_by_value_or_by_row(tmp_path: Path, distinct: int) -> None:
    names = [f"name {number % distinct}" for number in range(140_000)]
    content = file_of("csv", {"sku": [f"k{number}" for number in range(140_000)], "name": names})
    version = version_of(tmp_path, content, types={"sku": "text"})
    asked = [7, 139_999, 0, 65_536, 7]
    found = version.column("name", version.rows(texts(*(f"k{number}" for number in asked))))
    assert found.tolist() == [names[number] for number in asked]


def test_keys_too_long_or_with_nul_are_in_no_table(tmp_path: Path) -> None:
    version = version_of(tmp_path, "sku,price\na,1\nbbbbbbbb,2\n")
    assert version.rows(texts("a\0", "a", "bbbbbbbbb", "bbbbbbbb\0", "\0")).tolist()[0::2] == [-1, -1, -1]
    assert (version.rows(texts("a", "bbbbbbbb")) >= 0).all()


def test_keys_that_share_a_hash_get_another_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def weak(words: np.ndarray, seed: int) -> np.ndarray:
        return hashed(words, seed) % np.uint64(2) if seed == 0 else hashed(words, seed)

    monkeypatch.setattr(build_module, "hashed", weak)
    version = version_of(tmp_path, "sku,price\na,1\nb,2\nc,3\n")
    assert version.column("price", version.rows(texts("a", "b", "c"))).tolist() == [1.0, 2.0, 3.0]


def test_a_hash_that_is_not_the_key_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = version_of(tmp_path, "sku,price\na,1\nb,2\n")
    words, _ = text_words(["a"], 1)
    monkeypatch.setattr(
        "node.tables.version_file.hashed", lambda asked, seed: np.full(len(asked), hashed(words, seed)[0])
    )
    assert version.rows(texts("zz")).tolist() == [-1]


def test_equal_files_give_equal_versions(tmp_path: Path) -> None:
    content = "sku,price\na,1\nb,2\n"
    built(tmp_path, content)
    first = (tmp_path / "built").read_bytes()
    built(tmp_path, content)
    assert (tmp_path / "built").read_bytes() == first


@pytest.mark.parametrize("size", [0, 3, 40, -1])
def test_a_file_that_is_cut_off_is_not_opened(tmp_path: Path, size: int) -> None:
    built(tmp_path, "sku,price\na,1\n")
    whole = (tmp_path / "built").read_bytes()
    (tmp_path / "built").write_bytes(whole[:size])
    with pytest.raises(StoreUnavailable, match=r"file built can't be read: .*; another node of the cluster gives it"):
        VersionFile(tmp_path / "built", "v1")
