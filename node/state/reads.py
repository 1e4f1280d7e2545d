"""(P) Reading aggregates from rows as of a time, without an event: for the API and for models that run by interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from node.kernel.types import Aggregate, Floats, Ints
from node.state.finish import finished
from node.state.layout import Layout
from node.state.planes import PlacedGroup, plane_index
from node.state.sessions import going_on


def read(
    layout: Layout,
    rows: Floats,
    times_ms: Ints,
    aggregates: Sequence[Aggregate] | None = None,
    ending_before: bool = False,
) -> dict[Aggregate, Floats]:
    """float64 [customers] for each of `aggregates` (all of the layout's by default).

    `rows` is float64 [slots, customers], `times_ms` [customers] the time to read each row at. A window ends with the
    tile of that time, so events that are newer than the tile do not count; `ending_before`: with the tile of the moment
    before, which is another one where the time begins a tile. A session counts if an event of that time would belong to
    it, with all of its events, and is empty otherwise. What has no window holds all events of the row, also those after
    that time; `since` counts from the last of them, and is 0 if that is after it.
    """
    index = plane_index(layout)
    last_ms = times_ms - 1 if ending_before else times_ms
    values = np.empty((len(index.planes), rows.shape[1]))
    for placed in index.groups:
        values[placed.numbers] = _window_values(placed, rows, last_ms)
    before, seconds = values[index.planes.highest], times_ms / 1000.0
    asked = layout.aggregates if aggregates is None else aggregates
    return {aggregate: finished(index, layout, aggregate, values, before, seconds) for aggregate in asked}


def _window_values(placed: PlacedGroup, rows: Floats, times_ms: Ints) -> Floats:
    """float64 [planes of the group, customers]"""
    group, planes = placed.group, placed.planes
    block = rows[group.first_slot : group.last_slot].reshape(len(group.initial), group.tiles, -1)
    if group.session:
        return np.where(going_on(group, rows, times_ms), block[:, 0], group.initial[:, None])
    heads = rows[group.head_slot].astype(np.int64)
    last = times_ms // group.width_ms if group.width_ms else np.zeros_like(times_ms)
    slots = np.arange(group.tiles)[:, None]
    tiles = heads - (heads - slots) % group.tiles
    older = np.where((tiles > last - group.tiles) & (tiles < last), block, group.initial[:, None, None])
    own = np.where((tiles == last).any(axis=0), _own_tile(block, last % group.tiles), group.initial[:, None])
    return planes.joined(planes.reduced(older), own)


def _own_tile(block: Floats, slots: Ints) -> Floats:
    own: Floats = block[:, slots, np.arange(block.shape[2])]
    return own
