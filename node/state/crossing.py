"""(P) Folding the customers whose events of a micro-batch lie in several tiles of a group, or come late.

Each (customer, tile) is a segment of its own, so any mixture of tiles costs the same few whole-array steps. Which
event last touched each ring slot, as of each event, is a running maximum over [tiles, events].
"""

from __future__ import annotations

import numpy as np

from node.kernel.types import Bools, Floats, Ints
from node.state.contributions import Contributions
from node.state.planes import PlacedGroup
from node.state.segments import Segments


class Crossing:
    """One group's crossing customers. Made before the rows change; `write` and `read` come after."""

    def __init__(
        self, placed: PlacedGroup, rows: Floats, customers: Ints, heads: Ints, crossing: Bools, segments: Segments,
        order: Ints, tiles: Ints, contributions: Contributions,
    ) -> None:  # fmt: skip
        """`customers`, `heads` and `crossing` [c] are parallel to `segments`; `tiles` [n] to `order`."""
        group = placed.group
        self._placed, self._contributions = placed, contributions
        self._tiles_max = group.tiles
        self._columns = customers[crossing]
        self._heads = heads[crossing]
        block = rows[group.first_slot : group.last_slot].reshape(len(group.initial), group.tiles, -1)
        self._stored = block[:, :, self._columns]
        included = crossing[segments.numbers]
        self._local = np.where(included, np.cumsum(included) - 1, -1)
        self._events = order[included]
        self._owners = (np.cumsum(crossing) - 1)[segments.numbers[included]]
        lengths = np.bincount(self._owners, minlength=len(self._columns))
        self._starts = np.cumsum(lengths) - lengths
        self._ends = self._starts + lengths - 1
        self._tiles = tiles[included]
        self._reached = self._tiles_reached()
        self._dead = self._tiles <= self._reached - group.tiles
        self._run(contributions, len(order))
        self._touched = self._last_touches()

    def _tiles_reached(self) -> Ints:
        """[m]: the customer's newest tile as of each event, with it. One running maximum serves all customers,
        because each one's tiles are shifted above those of the customers before."""
        tiles = np.maximum(self._tiles, self._heads[self._owners])
        lowest = int(tiles.min())
        shift = self._owners * (int(tiles.max()) - lowest + 1)
        reached: Ints = np.maximum.accumulate(tiles - lowest + shift) - shift + lowest
        return reached

    def _run(self, contributions: Contributions, events: int) -> None:
        """Running values of each (customer, tile), by event; and the values the event found there."""
        tiles, planes = self._tiles, self._placed.planes
        lowest = int(tiles.min())
        keys = self._owners * (int(tiles.max()) - lowest + 1) + (tiles - lowest)
        order = keys.argsort(kind="stable")
        ascending = keys[order]
        starts = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
        segments = Segments(self._events[order], np.diff(np.append(starts, len(keys))))
        owners, own = self._owners[order[starts]], tiles[order[starts]]
        alive = (own <= self._heads[owners]) & (own > self._heads[owners] - self._tiles_max)
        base = np.where(alive, self._stored[:, own % self._tiles_max, owners], planes.initial[:, None])
        dead = np.zeros(events, np.bool_)
        dead[self._events] = self._dead
        running = contributions.running(planes, base, segments, dead)[:, segments.places]
        found = np.empty_like(running)
        found[:, 1:] = running[:, :-1]
        found[:, starts] = base
        self._running, self._found = np.empty_like(running), np.empty_like(running)
        self._running[:, order] = running
        self._found[:, order] = found

    def _last_touches(self) -> Ints:
        """[tiles, m]: the last event up to each event that put something in each ring slot; -1 for none."""
        count = len(self._tiles)
        touched = np.full((self._tiles_max, count), -1)
        alive = np.flatnonzero(~self._dead)
        touched[self._tiles[alive] % self._tiles_max, alive] = alive
        np.maximum.accumulate(touched, axis=1, out=touched)
        touched[touched < self._starts[self._owners]] = -1
        return touched

    def _as_of(self, at: Ints) -> tuple[Floats, Ints, Bools]:
        """What each ring slot holds after the events `at`: values [planes, tiles, n], its tile [tiles, n] and
        whether that is alive."""
        owners = self._owners[at]
        touched = self._touched[:, at]
        slots = np.arange(self._tiles_max)[:, None]
        heads = self._heads[owners]
        untouched = touched < 0
        tiles = np.where(untouched, heads - (heads - slots) % self._tiles_max, self._tiles[touched])
        values = np.where(untouched, self._stored[:, slots, owners], self._running[:, touched])
        return values, tiles, tiles > self._reached[at] - self._tiles_max

    def write(self, rows: Floats) -> None:
        """Put the customers' tiles and heads into `rows`."""
        group = self._placed.group
        values, _, alive = self._as_of(self._ends)
        block = rows[group.first_slot : group.last_slot].reshape(len(group.initial), group.tiles, -1)
        block[:, :, self._columns] = np.where(alive, values, group.initial[:, None, None])
        rows[group.head_slot, self._columns] = self._reached[self._ends]

    def read(self, wanted: Ints, values: Floats, before: Floats, highest: int) -> None:
        """Put the windows as of the wanted events into `values` [planes, w] and `before` [planes of kind max, w].

        Plane `highest` is the first of `before`; `wanted` [w] are positions in the batch's order. A late event's
        window ends with its own tile.
        """
        places = np.flatnonzero(self._local[wanted] >= 0)
        if not len(places):
            return
        at = self._local[wanted[places]]
        planes = self._placed.planes
        held, tiles, alive = self._as_of(at)
        blank = ~alive | (tiles >= self._tiles[at])
        held = np.where(blank, planes.initial[:, None, None], held)
        older = planes.reduced(held)
        dead = self._dead[at]
        own = np.where(dead, planes.initial[:, None], self._running[:, at])
        found = np.where(dead, planes.initial[:, None], self._found[:, at])[planes.highest]
        numbers = self._placed.numbers
        values[numbers[:, None], places] = planes.joined(older, own)
        before[(numbers[planes.highest] - highest)[:, None], places] = np.maximum(older[planes.highest], found)

    def late_events(self) -> Ints:
        """The events that would have counted for an accumulator of this group, had they not come too late."""
        late = self._events[self._dead]
        missed = np.zeros(len(late), np.bool_)
        for accumulator in self._placed.group.accumulators:
            missed |= self._contributions.contributing(accumulator.source)[late]
        return late[missed]
