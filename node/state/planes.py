"""(P) Sets of planes and what is done alike to all planes of a kind: join two values, reduce a ring of tiles.

Arrays of plane values are [planes, …] with planes in the order of `KINDS`, so each kind is one slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np

from node.kernel.types import Floats, Ints
from node.kernel.windows import INITIAL, KINDS, PLANES, Accumulator, Kind
from node.state.layout import Group, Layout

_indexes: WeakKeyDictionary[Layout, PlaneIndex] = WeakKeyDictionary()
"""Each partition has a layout of its own; its index lives as long as it."""
_SUMMED: tuple[Kind, ...] = ("count", "sum", "shifted", "squared")


@dataclass(frozen=True, eq=False)
class PlaneSet:
    """Planes of several accumulators, which must be sorted by kind."""

    accumulators: tuple[Accumulator, ...]
    initial: Floats
    """float64 [planes]"""
    summed: slice
    lowest: slice
    highest: slice
    sketched: slice
    first: slice
    """Pairs of planes: time, value."""
    last: slice

    @staticmethod
    def of(accumulators: Sequence[Accumulator]) -> PlaneSet:
        numbers: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        for accumulator in accumulators:
            numbers[accumulator.kind] += PLANES[accumulator.kind]
        slices, start = {}, 0
        for kind, number in numbers.items():
            slices[kind] = slice(start, start + number)
            start += number
        initial = np.array([value for part in accumulators for value in INITIAL[part.kind]])
        summed = slice(0, slices["squared"].stop)
        return PlaneSet(
            tuple(accumulators), initial, summed, *(slices[kind] for kind in ("min", "max", "sketch", "first", "last"))
        )

    def __len__(self) -> int:
        return len(self.initial)

    def sources(self, *kinds: Kind) -> list[Accumulator]:
        return [accumulator for accumulator in self.accumulators if accumulator.kind in kinds]

    def joined(self, older: Floats, own: Floats) -> Floats:
        """[planes, n]: the value of `older` tiles joined with that of the event's own, newer one."""
        joined = np.empty_like(own)
        np.add(older[self.summed], own[self.summed], out=joined[self.summed])
        np.minimum(older[self.lowest], own[self.lowest], out=joined[self.lowest])
        np.maximum(older[self.highest], own[self.highest], out=joined[self.highest])
        if self.sketched.stop > self.sketched.start:
            words = joined.view(np.uint64)[self.sketched]
            np.bitwise_or(older.view(np.uint64)[self.sketched], own.view(np.uint64)[self.sketched], out=words)
        for part, earlier in ((self.first, True), (self.last, False)):
            if part.stop > part.start:
                times, own_times = older[part][0::2], own[part][0::2]
                taken = own_times < times if earlier else own_times >= times
                joined[part][0::2] = np.where(taken, own_times, times)
                joined[part][1::2] = np.where(taken, own[part][1::2], older[part][1::2])
        return joined

    def reduced(self, tiles: Floats) -> Floats:
        """[planes, n] of `tiles` [planes, tiles, n]: tiles joined in the order of ring slots."""
        reduced = np.empty((tiles.shape[0], tiles.shape[2]))
        reduced[self.summed] = _summed(tiles[self.summed])
        if self.lowest.stop > self.lowest.start:
            np.min(tiles[self.lowest], axis=1, out=reduced[self.lowest])
        if self.highest.stop > self.highest.start:
            np.max(tiles[self.highest], axis=1, out=reduced[self.highest])
        if self.sketched.stop > self.sketched.start:
            words = tiles.view(np.uint64)[self.sketched]
            np.bitwise_or.reduce(words, axis=1, out=reduced.view(np.uint64)[self.sketched])
        for part, earlier in ((self.first, True), (self.last, False)):
            if part.stop > part.start:
                times = tiles[part][0::2]
                chosen = (times.argmin(axis=1) if earlier else times.argmax(axis=1))[:, None]
                reduced[part][0::2] = np.take_along_axis(times, chosen, axis=1)[:, 0]
                reduced[part][1::2] = np.take_along_axis(tiles[part][1::2], chosen, axis=1)[:, 0]
        return reduced


def _summed(tiles: Floats) -> Floats:
    """Sum over axis 1 of [planes, tiles, n], one tile after the other.

    `add.reduce` does that too while columns lie side by side; a single column it would sum pairwise.
    """
    if tiles.shape[2] == 1:
        summed: Floats = np.add.accumulate(tiles, axis=1)[:, -1]
        return summed
    reduced: Floats = np.add.reduce(tiles, axis=1)
    return reduced


@dataclass(frozen=True, eq=False)
class PlacedGroup:
    """A group, and where its planes are among all planes of the layout."""

    group: Group
    planes: PlaneSet
    numbers: Ints
    """[planes of the group]: their numbers among all planes."""


@dataclass(frozen=True, eq=False)
class PlaneIndex:
    """All planes of a layout's groups, by kind and then by group, as index arrays for whole-matrix steps."""

    planes: PlaneSet
    groups: tuple[PlacedGroup, ...]
    group_of: Ints
    """[planes]: number of the plane's group."""
    first_slots: Ints
    """[planes]: slot of the plane's ring slot 0."""
    head_slots: Ints
    """[groups]"""
    tiles: Ints
    """[groups]"""
    deciding: Ints
    """Numbers of the group with the narrowest tiles and of those of sessions: events that are of one tile in these are
    of one tile in all."""
    located: dict[tuple[Group, Accumulator], int]
    """First plane of each accumulator of each group."""

    @staticmethod
    def of(layout: Layout) -> PlaneIndex:
        groups = layout.groups
        placed = sorted(
            (KINDS.index(accumulator.kind), number, group.planes[accumulator], accumulator)
            for number, group in enumerate(groups)
            for accumulator in group.accumulators
        )
        located: dict[tuple[Group, Accumulator], int] = {}
        group_of: list[int] = []
        first_slots: list[int] = []
        members: list[list[int]] = [[] for _ in groups]
        for _, number, plane, accumulator in placed:
            group = groups[number]
            located[group, accumulator] = len(group_of)
            for part in range(PLANES[accumulator.kind]):
                members[number].append(len(group_of))
                group_of.append(number)
                first_slots.append(group.first_slot + (plane + part) * group.tiles)
        return PlaneIndex(
            PlaneSet.of([accumulator for *_, accumulator in placed]),
            tuple(
                PlacedGroup(group, PlaneSet.of(group.accumulators), np.array(numbers, np.int64))
                for group, numbers in zip(groups, members, strict=True)
            ),
            np.array(group_of, np.int64),
            np.array(first_slots, np.int64),
            np.array([group.head_slot for group in groups], np.int64),
            np.array([group.tiles for group in groups], np.int64),
            _deciding(groups),
            located,
        )


def _deciding(groups: Sequence[Group]) -> Ints:
    windows = [number for number, group in enumerate(groups) if not group.session]
    finest = sorted(windows, key=lambda number: groups[number].width_ms or np.inf)[:1]
    return np.array([*finest, *(number for number, group in enumerate(groups) if group.session)], np.int64)


def plane_index(layout: Layout) -> PlaneIndex:
    index = _indexes.get(layout)
    if index is None:
        index = _indexes[layout] = PlaneIndex.of(layout)
    return index
