"""(P) Rows as bytes, and the keys of what is stored beside them.

A stored row is its slots, little endian, nothing else: the header in slot 0 names the layout it was written under.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np

from node.kernel.errors import StateCorrupt
from node.kernel.types import Floats, Ints
from node.state.layout import Layout, header

_SLOT_BYTES = 8
_Written: TypeAlias = tuple[int, Floats, Ints]
"""Id of a layout, rows [customers, slots then] under it, and which customers' they are."""
_ADVICE = "delete the partition's folder, it is rebuilt from the changelog"


def images(rows: Floats) -> Floats:
    """float64 [customers, slots], C order, of `rows` [slots, customers]: what a frame holds."""
    return np.ascontiguousarray(rows.T)


def split(images: Floats) -> list[bytes]:
    """One bytes object for each row of `images` [customers, slots]."""
    count, slots = images.shape
    if not count:
        return []
    contiguous = np.ascontiguousarray(images, dtype="<f8")
    pieces: list[bytes] = contiguous.view(f"V{slots * _SLOT_BYTES}").reshape(count).tolist()
    return pieces


def pack(rows: Floats) -> list[bytes]:
    """One bytes object for each column of `rows` [slots, customers]."""
    return split(images(rows))


def unpack(layout: Layout, stored: Sequence[bytes | None]) -> Floats:
    """float64 [slots, customers], C order, under `layout`; None gives the row of a customer never seen.

    Raises StateCorrupt for bytes that are not a row of this layout or of one that it grew from.
    """
    return np.ascontiguousarray(unpack_images(layout, stored).T)


def unpack_images(layout: Layout, stored: Sequence[bytes | None]) -> Floats:
    """As `unpack`, but one row of slots for each customer: float64 [customers, slots]."""
    size = layout.slots * _SLOT_BYTES
    if stored and {None if row is None else len(row) for row in stored} == {size}:
        found = np.frombuffer(b"".join(stored), "<f8").reshape(len(stored), layout.slots)  # type: ignore[arg-type]
        if (found[:, 0].view("<u8") == header(layout.id).view("<u8")[0]).all():
            return found.copy()
    rows = np.tile(layout.initial, (len(stored), 1))
    places: dict[int, list[int]] = {}
    for place, row in enumerate(stored):
        if row is not None:
            places.setdefault(len(row), []).append(place)
    written: list[_Written] = []
    for length, at in places.items():
        written += _written(layout, np.array(at), b"".join(stored[place] for place in at), length)  # type: ignore[misc]
    # The newest first: where slots went from a layout follows from where they went from the next one.
    for layout_id, found, these in sorted(written, key=lambda part: part[0], reverse=True):
        layout.carry(layout_id, found, rows, these)
    return rows


def _written(layout: Layout, at: Ints, joined: bytes, length: int) -> Iterator[_Written]:
    """Rows of one length, which may be of several layouts, by layout."""
    slots, rest = divmod(length, _SLOT_BYTES)
    if rest or slots not in layout.sizes:
        raise StateCorrupt(
            f"a stored row of {length} bytes is not one of layout {layout.id} or of an earlier one; {_ADVICE}"
        )
    found = np.frombuffer(joined, "<f8").reshape(len(at), slots)
    headers = found[:, 0].view("<u8")
    for written in np.unique(headers):
        layout_id = int(written) & 0xFFFFFFFF
        known = layout_id <= layout.id and header(layout_id).view("<u8")[0] == written
        if not known or layout.sizes[layout_id] != slots:
            raise StateCorrupt(f"a stored row's header does not name a layout of its length; {_ADVICE}")
        these = headers == written
        yield layout_id, found[these], at[these]


def converted(layout: Layout, layout_id: int, written: Floats) -> Floats:
    """float64 [customers, slots] of rows [customers, slots then] of an earlier layout."""
    rows = np.tile(layout.initial, (len(written), 1))
    layout.carry(layout_id, written, rows, np.arange(len(written)))
    return rows


def sequence_key(line: str, number: int) -> bytes:
    """Of a chunk of a line (the text of its model's name); in the order of (line, number)."""
    return line.encode() + b"\0" + number.to_bytes(8, "big")
