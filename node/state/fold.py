"""(P) Folding a micro-batch of events into its customers' rows, vectorised, and reading aggregates as of each event.

Tiles do not depend on each other: what a tile holds after an event follows from the customer's earlier events of
that tile alone, and whether it is still alive from the newest tile reached. So there are no rounds of one event per
customer, which a hot customer would make long: events are cut into segments by customer (and tile), and a
scan gives the running value of each segment's tile at each of its events (`node.state.segments`).

Nearly every customer's events of a batch lie in one tile, the newest; the `_fold_newest` pass treats all customers
so. Customers for whom that is wrong in some group (late events, a tile boundary within the batch) are folded anew
for that group by `node.state.crossing`, from what the rows held before.

Float results are exactly those of a plain program that takes one event after the other: an aggregate's value is
the older tiles joined in the order of ring slots, starting from an empty tile's value where the event's own tile is,
then joined with the event's own tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from node.kernel.types import ANY_EVENT, Aggregate, Bools, EventColumns, Floats, Ints
from node.state.contributions import Contributions
from node.state.crossing import Crossing
from node.state.finish import finished
from node.state.layout import NO_TILE, Layout
from node.state.planes import PlacedGroup, PlaneIndex, plane_index
from node.state.segments import Segments, by_customer
from node.state.sessions import session_tiles


@dataclass(frozen=True, slots=True)
class FoldResult:
    values: Mapping[Aggregate, Floats]
    """float64 [wanted events], in arrival order, as of each event."""
    late: int
    """Events that some aggregate no longer counts, because their tile was gone when they came."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """The events by customer, in order of arrival within each; customers without events are left out."""

    order: Ints
    """[n]: the events in that order."""
    customers: Ints
    """[c]: column of the customer in the rows."""
    segments: Segments
    """One for each of `customers`."""
    tiles: Ints
    """[groups, n]: tile of each event, by `order`."""
    wanted: Ints
    """[w]: positions in `order` of the wanted events, in order of arrival."""

    @staticmethod
    def of(index: PlaneIndex, rows_before: Floats, events: EventColumns, wanted: Bools) -> _Batch:
        order, present, segments = by_customer(events.rows, rows_before.shape[1])
        times_ms = events.times_ms[order]
        tiles = np.zeros((len(index.groups), len(order)), np.int64)
        for number, placed in enumerate(index.groups):
            if placed.group.session:
                tiles[number] = session_tiles(placed.group, rows_before, present, segments, events.times_ms)
            elif placed.group.width_ms:
                np.floor_divide(times_ms, placed.group.width_ms, out=tiles[number])
        positions = np.empty(len(order), np.int64)
        positions[order] = np.arange(len(order))
        return _Batch(order, present, segments, tiles, positions[wanted])


def fold(
    layout: Layout,
    rows: Floats,
    events: EventColumns,
    masks: Mapping[str, Bools],
    wanted: Bools,
    types: Sequence[str],
    aggregates: Sequence[Aggregate] | None = None,
) -> FoldResult:
    """Fold `events` into `rows` and read `aggregates` (all of the layout's by default) as of the wanted events.

    `rows`: float64 [slots, customers], C order, changed in place; `EventColumns.rows` are its columns. `masks`: those
    of `FeaturePlan.masks` for `filters_of` the events, bool [n]. `wanted`: bool [n]. `types`: `EventSchema.types`.
    """
    if rows.shape[0] != layout.slots or not rows.flags.c_contiguous:
        raise ValueError(f"rows must be a C-ordered matrix of {layout.slots} slots, not {rows.shape}")
    asked = layout.aggregates if aggregates is None else aggregates
    if not len(events) or not layout.groups:
        return FoldResult({aggregate: np.full(int(wanted.sum()), np.nan) for aggregate in asked}, 0)
    index = plane_index(layout)
    contributions = Contributions(layout, types, rows, events, masks)
    batch = _Batch.of(index, rows, events, wanted)
    heads = rows[index.head_slots][:, batch.customers].astype(np.int64)
    newest, crossing = _newest_tiles(batch, heads, index.deciding)
    crossings = [
        Crossing(
            placed, rows, batch.customers, heads[number], crossing[number], batch.segments, batch.order,
            batch.tiles[number], contributions,
        )
        for number, placed in enumerate(index.groups)
        if crossing[number].any()
    ]  # fmt: skip
    values, before = _fold_newest(index, rows, batch, heads, newest, contributions)
    late = np.zeros(len(events), np.bool_)
    for part in crossings:
        part.write(rows)
        part.read(batch.wanted, values, before, index.planes.highest.start)
        late[part.late_events()] = True
    seconds = contributions.seconds[batch.order[batch.wanted]]
    results = {aggregate: finished(index, layout, aggregate, values, before, seconds) for aggregate in asked}
    return FoldResult(results, int(np.count_nonzero(late)))


def filters_of(layout: Layout, events: EventColumns, types: Sequence[str]) -> set[str]:
    """The filters (`Aggregate.where`) whose masks it takes to fold these events; none of event types that did not
    come."""
    if not layout.filtered or not len(events):
        return set()
    there = {ANY_EVENT, *(types[code] for code in np.unique(events.types).tolist())}
    return {source.where for source in layout.filtered if source.event in there}


def _newest_tiles(batch: _Batch, heads: Ints, deciding: Ints) -> tuple[Ints, Bools]:
    """Each customer's newest tile in each group after the batch, and whether its events are not all in that tile;
    both [groups, customers]. Events of one tile of the `deciding` groups are of one tile of every group."""
    segments = batch.segments
    newest = batch.tiles[:, segments.starts]
    crossing = newest < heads
    if any((batch.tiles[one] != newest[one][segments.numbers]).any() for one in deciding.tolist()):
        oldest = np.minimum.reduceat(batch.tiles, segments.starts, axis=1)
        newest = np.maximum.reduceat(batch.tiles, segments.starts, axis=1)
        crossing = (newest < heads) | (oldest < newest)
    return np.maximum(newest, heads), crossing


def _fold_newest(
    index: PlaneIndex, rows: Floats, batch: _Batch, heads: Ints, newest: Ints, contributions: Contributions
) -> tuple[Floats, Floats]:
    """Fold each customer's events as if all were of its newest tile.

    Returns the planes' values over their windows as of each wanted event, float64 [planes, w], and those of kind max
    without the event itself, float64 [planes of kind max, w].
    """
    planes, segments, customers = index.planes, batch.segments, batch.customers
    for number, placed in enumerate(index.groups):
        _clear_passed(placed, rows, customers, heads[number], newest[number])
    cells = rows.reshape(-1)
    own = (index.first_slots[:, None] + (newest % index.tiles[:, None])[index.group_of]) * rows.shape[1] + customers
    base = cells[own]
    cells[own] = planes.initial[:, None]
    older = _older_tiles(index, rows, customers)
    running = contributions.running(planes, base, segments)
    cells[own] = running[:, segments.last_places()]
    rows[index.head_slots[:, None], customers] = newest
    owners = segments.numbers[batch.wanted]
    older = older[:, owners]
    values = planes.joined(older, running[:, segments.places[batch.wanted]])
    first = batch.wanted == segments.starts[owners]
    previous = running[planes.highest][:, segments.places[batch.wanted - 1]]
    before = np.maximum(older[planes.highest], np.where(first, base[planes.highest][:, owners], previous))
    return values, before


def _clear_passed(placed: PlacedGroup, rows: Floats, customers: Ints, heads: Ints, newest: Ints) -> None:
    """Empty the ring slots of the tiles that come between a customer's old head and its new one, that included."""
    moved = np.flatnonzero((newest > heads) & (heads != NO_TILE))
    if not len(moved):
        return
    group = placed.group
    steps = newest[moved] - heads[moved]
    ahead = np.arange(group.tiles)[:, None] - (heads[moved] + 1) % group.tiles
    ahead[ahead < 0] += group.tiles
    slots, columns = np.nonzero(ahead < steps)
    block = rows[group.first_slot : group.last_slot].reshape(len(group.initial), group.tiles, -1)
    block[:, slots, customers[moved[columns]]] = group.initial[:, None]


def _older_tiles(index: PlaneIndex, rows: Floats, customers: Ints) -> Floats:
    """float64 [planes, customers]: each ring of tiles joined, while the own tile is empty."""
    older = np.empty((len(index.planes), len(customers)))
    for placed in index.groups:
        group = placed.group
        if group.tiles == 1:
            older[placed.numbers] = group.initial[:, None]
            continue
        block = rows[group.first_slot : group.last_slot].reshape(len(group.initial), group.tiles, -1)
        reduced = placed.planes.reduced(block)
        older[placed.numbers] = reduced if len(customers) == rows.shape[1] else reduced[:, customers]
    return older
