"""(P) What a partition's events made of its rows, computed anew from the events, commit after commit.

Frames say which events each commit had (its progress), which layout rows had from then on, and what other models'
outputs were stored; none of it follows from the events. All else does, and is computed by the cycle's own code: the
rows before a commit and its events give the rows after it, which must be those of the frame, bit for bit. So by
induction the rows before any commit are what the events gave since the changelog begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from node.kernel.ports import StateStore
from node.kernel.types import Aggregate, Bools, EventColumns, Floats, Frame
from node.kernel.windows import PLANES
from node.state.codec import unpack
from node.state.fold import fold
from node.state.layout import Layout


@dataclass(frozen=True, slots=True)
class Step:
    """One commit computed anew, before its frame is taken.

    `values` as of the wanted events; `rows` float64 [slots, customers], after all events; `known` bool [customers]:
    what came before is there, or there was nothing before.
    """

    layout: Layout
    values: Mapping[Aggregate, Floats]
    rows: Floats
    known: Bools


class Replay:
    """`store` is empty and is filled. `whole`: the first frame given is the partition's first, so a customer who is
    not there has had no events."""

    def __init__(self, store: StateStore, types: Sequence[str], whole: bool) -> None:
        self._store = store
        self._types = tuple(types)
        self._whole = whole
        self._layout = Layout.empty()

    def compute(
        self, frame: Frame, events: EventColumns, wanted: Bools, masks: Mapping[str, Bools], asked: Sequence[Aggregate]
    ) -> Step:
        """`events` are the frame's, in their order; `wanted` bool [n]; `masks` as of `FeaturePlan.masks`. Of `asked`
        what the layout has is in the values. Raises StateCorrupt."""
        layout = self._layout_of(frame)
        stored = self._store.load([customer.encode() for customer in events.customers])
        rows = unpack(layout, stored)
        known = np.array([self._whole or row is not None for row in stored], np.bool_)
        held = [aggregate for aggregate in asked if layout.locate(aggregate) is not None]
        folded = fold(layout, rows, events, masks, wanted, self._types, held)
        return Step(layout, folded.values, rows, known)

    def take(self, frame: Frame, offset: int) -> None:
        """Go on from what the frame says."""
        self._layout = self._layout_of(frame)
        self._store.apply(frame, offset)

    def _layout_of(self, frame: Frame) -> Layout:
        return self._layout if frame.layout is None else Layout.decode(frame.layout)


def differing(step: Step, frame: Frame, customers: Sequence[str], wheres: Mapping[str, Bools]) -> list[tuple[str, int]]:
    """Customers whose rows in the frame are others than those computed, with the first slot that differs.

    Compared are heads of windows and all that is folded without a filter, or with one of `wheres`.
    """
    slots = _folded_slots(step.layout, wheres)
    places = {customer.decode(): place for place, customer in enumerate(frame.customers)}
    found = []
    for column, customer in enumerate(customers):
        place = places.get(customer)
        if not step.known[column] or place is None or frame.rows.shape[1] != step.layout.slots:
            continue
        computed = np.ascontiguousarray(step.rows[slots, column]).view(np.uint64)
        said = np.ascontiguousarray(frame.rows[place, slots]).view(np.uint64)
        unequal = np.flatnonzero(computed != said)
        if len(unequal):
            found.append((customer, int(slots[unequal[0]])))
    return found


def _folded_slots(layout: Layout, wheres: Mapping[str, Bools]) -> np.ndarray:
    slots: list[int] = []
    for group in layout.groups:
        slots.append(group.head_slot)
        for accumulator, plane in group.planes.items():
            if not accumulator.source.where or accumulator.source.where in wheres:
                first = group.first_slot + plane * group.tiles
                slots += range(first, first + PLANES[accumulator.kind] * group.tiles)
    return np.array(slots, np.int64)
