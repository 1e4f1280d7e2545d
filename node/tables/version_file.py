"""A version of a table as one immutable file, read by memory map: the kernel keeps of it what is used.

    magic, sections, footer as JSON, length of the footer as u64 little endian, magic

Rows are in the order of their keys' hashes. Sections are numpy arrays: `hashes` uint64 [rows], `keys` uint64 [rows,
words], and of column i either `i.values` float64 [rows] (booleans too, missing NaN); or, of a text with few distinct
values, `i.codes` int32 [rows] (-1 missing) with `i.starts` int64 [values + 1] and `i.bytes`; or, of any other text,
`i.starts` int64 [rows], `i.lengths` int32 [rows] (-1 missing) and `i.bytes`.

A look-up hashes each distinct key, finds it by binary search, and compares the key itself. So it costs as much as a
sort of the distinct keys, whatever the table holds, and two pages of the disk for a key whose page is not in memory.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from node.kernel.errors import StoreUnavailable
from node.kernel.tables import TableSchema
from node.kernel.types import Column, Floats, Ints, Texts
from node.tables.keys import Words, distinct_texts, hashed, number_words, text_words, texts_of

MAGIC: Final = b"HRTABLE1"
MENDED: Final = "another node of the cluster gives it, if one has it; else put the table anew"
"""What to do about a version's file that is gone or damaged."""
_LENGTH: Final = struct.Struct("<Q")
_ALIGNMENT: Final = 64


class Footer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    schema: TableSchema
    rows: int
    width: int
    """Words of a key."""
    seed: int
    sections: dict[str, tuple[int, int]]
    """Name -> offset and bytes."""


class VersionWriter:
    """Writes the sections of a file one after another; `finish` makes it whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sections: dict[str, tuple[int, int]] = {}
        self._at = file.write(MAGIC)

    def section(self, name: str, pieces: Iterable[bytes | memoryview]) -> None:
        """The pieces together are the section."""
        padding = -self._at % _ALIGNMENT
        self._at += self._file.write(b"\0" * padding)
        start = self._at
        for piece in pieces:
            self._at += self._file.write(piece)
        self._sections[name] = (start, self._at - start)

    def finish(self, schema: TableSchema, rows: int, width: int, seed: int) -> None:
        footer = msgspec.json.encode(Footer(schema, rows, width, seed, self._sections))
        self._file.write(footer + _LENGTH.pack(len(footer)) + MAGIC)


class VersionFile:
    """A `TableReader` of one file. `version` is what inferences call it. Without `defaults`, what a row has not is
    missing.

    Raises StoreUnavailable for a file that can't be read or is none.
    """

    def __init__(self, path: Path, version: str, defaults: bool = True) -> None:
        self.version = version
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._footer = _footer(self._map)
        except (OSError, ValueError, msgspec.MsgspecError) as failure:
            raise StoreUnavailable(f"a table's file {path.name} can't be read: {failure}; {MENDED}") from None
        self.schema = self._footer.schema
        self.row_count = self._footer.rows
        self.bytes = len(self._map)
        self._hashes: Words = self._section("hashes", np.uint64)
        self._keys: Words = self._section("keys", np.uint64).reshape(self.row_count, self._footer.width)
        self._columns = {
            name: self._opened(number, column.type == "text", column.default if defaults else None)
            for number, (name, column) in enumerate(self.schema.columns.items())
        }

    def rows(self, keys: Column) -> Ints:
        """int64 [len(keys)]: where each key's row is, -1 for a key that has none."""
        if self.schema.key_type == "text":
            if keys.dtype != object:
                return np.full(len(keys), -1)
            distinct, at = distinct_texts(cast("Texts", keys))
            words, fits = text_words(distinct, self._footer.width)
            found = np.append(np.where(fits, self._find(words), -1), -1)
        else:
            numbers, at = np.unique(cast("Floats", keys), return_inverse=True)
            found = np.where(np.isnan(numbers), -1, self._find(number_words(numbers)))
        rows: Ints = found[at]
        return rows

    def _find(self, words: Words) -> Ints:
        if not self.row_count:
            return np.full(len(words), -1)
        asked = hashed(words, self._footer.seed)
        order = np.argsort(asked)  # neighbours on disk are looked at together
        places = np.empty(len(asked), np.int64)
        places[order] = np.searchsorted(self._hashes, asked[order])
        places[places == self.row_count] = 0
        return np.where((self._keys[places] == words).all(axis=1), places, -1)

    def keys(self, rows: slice) -> Column:
        """The keys of those rows, in the order of the file."""
        words = self._keys[rows]
        if self.schema.key_type == "number":
            return words.view(np.float64).reshape(-1)
        return np.array([key.decode() for key in texts_of(words)], dtype=object)

    def column(self, name: str, rows: Ints) -> Column | None:
        column = self._columns.get(name)
        return None if column is None else column.take(rows)

    def _opened(self, number: int, text: bool, default: float | str | None) -> _Numbers | _Coded | _Texts:
        if not text:
            values = self._section(f"{number}.values", np.float64)
            return _Numbers(values, np.nan if default is None else float(default))
        shown = None if default is None else str(default)
        data = self._section(f"{number}.bytes", np.uint8)
        if f"{number}.codes" in self._footer.sections:
            starts = self._section(f"{number}.starts", np.int64)
            return _Coded(self._section(f"{number}.codes", np.int32), starts, data, shown)
        starts, lengths = self._section(f"{number}.starts", np.int64), self._section(f"{number}.lengths", np.int32)
        return _Texts(starts, lengths, data, shown)

    def _section(self, name: str, kind: type[np.generic]) -> NDArray[Any]:
        offset, size = self._footer.sections[name]
        if not size:
            return np.empty(0, kind)
        return np.frombuffer(self._map, kind, size // np.dtype(kind).itemsize, offset)


class _Numbers:
    def __init__(self, values: Floats, default: float) -> None:
        self._values = values
        self._default = default

    def take(self, rows: Ints) -> Column:
        if not len(self._values):
            return np.full(len(rows), self._default)
        found = self._values[rows]
        found[(rows < 0) | np.isnan(found)] = self._default
        return found


class _Coded:
    """The few values are texts in memory, the default the last of them."""

    def __init__(self, codes: NDArray[np.int32], starts: Ints, data: NDArray[np.uint8], default: str | None) -> None:
        self._codes = codes
        whole, places = data.tobytes(), starts.tolist()
        values = [whole[start:end].decode() for start, end in pairwise(places)]
        self._values: Texts = np.array([*values, default], dtype=object)

    def take(self, rows: Ints) -> Column:
        codes = np.where(rows < 0, -1, self._codes[rows]) if len(self._codes) else np.full(len(rows), -1)
        column: Texts = self._values[codes]
        return column


class _Texts:
    def __init__(self, starts: Ints, lengths: NDArray[np.int32], data: NDArray[np.uint8], default: str | None) -> None:
        self._starts = starts
        self._lengths = lengths
        self._data = data
        self._default = default

    def take(self, rows: Ints) -> Column:
        wanted, at = np.unique(rows, return_inverse=True)
        values = np.empty(len(wanted), dtype=object)
        for place, row in enumerate(wanted.tolist()):
            length = -1 if row < 0 else int(self._lengths[row])
            start = int(self._starts[row]) if length >= 0 else 0
            values[place] = self._default if length < 0 else self._data[start : start + length].tobytes().decode()
        column: Texts = values[at]
        return column


def _footer(content: mmap.mmap) -> Footer:
    """Raises ValueError, MsgspecError for what is no whole file of this format."""
    tail = len(MAGIC) + _LENGTH.size
    if len(content) < len(MAGIC) + tail or content[: len(MAGIC)] != MAGIC or content[-len(MAGIC) :] != MAGIC:
        raise ValueError("it is cut off, or no table of this format")
    (size,) = _LENGTH.unpack(content[-tail : -len(MAGIC)])
    return msgspec.json.decode(content[-tail - size : -tail], type=Footer)
