"""(P) The layout of a customer's row: which float64 slot holds what.

A row is a header slot and then, generation by generation, what each growth of the layout added: *groups* of
windowed accumulators, pivots, stored model outputs, and marks of interval models. As long as slots are only appended, a
row written under an older layout is a prefix of a newer one, and `initial` is what to pad it with. When rows have no
room left, the layout is *reduced* to what is still needed: its generations give way to one base, and of the layouts
before it stays what is needed to read rows written under them.

A window is tiled by event time. It is the tile of the event read at, still filling, and the full tiles before it.
A group is one head slot (the newest tile the customer has reached) and, for each *plane* of each accumulator, a
ring of tiles: tile `i` is in ring slot `i mod tiles`. For ever is one tile, so the same rules hold. So is a session,
whose number is the time of the event that began it (`node.state.sessions`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TypeAlias

import msgspec
import numpy as np

from node.kernel.errors import BoundExceeded, StateCorrupt
from node.kernel.limits import LAYOUTS_CARRIED_MAX, ROW_REDUCTION_MS_MIN, ROW_SLOTS_MAX, WINDOW_MS_MAX
from node.kernel.types import Aggregate, Floats, Ints, ModelName, ModelVersion
from node.kernel.windows import INITIAL, NEWEST, PLANES, Accumulator, Input, accumulators_of, pivots_of, tiling
from node.state.generations import (
    Base,
    Encoded,
    Generation,
    MarkAdded,
    OutputsAdded,
    Past,
    WindowAdded,
    aggregate_of,
    aggregates_added,
    windows_added,
)

_Carried: TypeAlias = tuple[Ints, Ints]
"""Slots of a layout, and which of an earlier one's each of them was."""

NO_TILE = -(2.0**50)
"""Head of a group that has seen nothing: older than the tile of any event."""

_DAY_MS = 86_400_000

_MAGIC = 0x4852
_FORMAT = 1
_FORMAT_REDUCED = 2
"""Of a stored layout that was reduced: a node that knows only the first would take its slots for others."""


@dataclass(frozen=True, eq=False)
class Group:
    """The accumulators of one window that one growth added; they share a head, so they saw the same tiles."""

    window_ms: int
    width_ms: int
    """Of a tile; 0: one tile holds for ever; of a session: its gap."""
    tiles: int
    head_slot: int
    accumulators: tuple[Accumulator, ...]

    @property
    def session(self) -> bool:
        return self.window_ms < 0

    @property
    def newest_slot(self) -> int:
        """Of a session: where the time of its newest event is, in seconds."""
        return self.first_slot + self.planes[NEWEST]

    @property
    def first_slot(self) -> int:
        return self.head_slot + 1

    @property
    def last_slot(self) -> int:
        return self.first_slot + self.tiles * len(self.initial)

    @cached_property
    def planes(self) -> dict[Accumulator, int]:
        """Number of the accumulator's first plane in the group."""
        found, plane = {}, 0
        for accumulator in self.accumulators:
            found[accumulator] = plane
            plane += PLANES[accumulator.kind]
        return found

    @cached_property
    def initial(self) -> Floats:
        """float64 [planes]: a plane's value in an empty tile."""
        return np.array([value for part in self.accumulators for value in INITIAL[part.kind]])


@dataclass(frozen=True)
class ModelSlots:
    """Where the latest inference of one model is kept."""

    outputs: dict[str, int]
    time_slot: int
    """Event time of the trigger, ms; NaN where there is no inference."""
    version_slot: int
    """`int(ModelVersion.short_version, 16)`."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Immutable; compared by identity. `id` counts the layouts before it: 0 is the empty layout. `generations` are
    those since the last reduction, if there was one, to `base`."""

    generations: tuple[Generation, ...] = ()
    base: Base | None = None
    past: tuple[Past, ...] = ()

    @staticmethod
    def empty() -> Layout:
        return Layout()

    @property
    def id(self) -> int:
        return self.base_id + len(self.generations)

    @cached_property
    def base_id(self) -> int:
        """That of the layout which the last reduction gave; 0 without one."""
        return sum(len(past.sizes) for past in self.past)

    @cached_property
    def _placed(self) -> _Placed:
        return _Placed(self.base, self.generations)

    @property
    def slots(self) -> int:
        return self._placed.sizes[-1]

    @property
    def row_bytes(self) -> int:
        return self.slots * 8

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Slots of a row under each layout from the empty one to this, by id."""
        return (*(size for past in self.past for size in past.sizes), *self._placed.sizes)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Those that events are folded into."""
        pending = self._placed.pending
        return tuple(group for number, group in self._placed.groups.items() if number not in pending)

    @property
    def numbered(self) -> Mapping[int, Group]:
        """All groups, pending or not."""
        return self._placed.groups

    @property
    def number_next(self) -> int:
        """That of the next group."""
        return self._placed.number_next

    @property
    def pending(self) -> dict[int, Group]:
        """Those that are being filled from history, by number among all groups."""
        return {number: self._placed.groups[number] for number in sorted(self._placed.pending)}

    @property
    def awaiting(self) -> dict[Aggregate, int]:
        """The number of the newest group that was made to hold the aggregate's history."""
        return self._placed.awaiting

    @property
    def pivots(self) -> dict[Input, int]:
        return self._placed.pivots

    @property
    def outputs(self) -> dict[ModelName, ModelSlots]:
        return self._placed.outputs

    @property
    def marks(self) -> dict[ModelName, int]:
        """Where it is kept, for each interval model that wants only customers with new events, how many events the
        customer had when the model ran over it last; NaN: it never did."""
        return self._placed.marks

    @cached_property
    def aggregates(self) -> tuple[Aggregate, ...]:
        """Every aggregate that was ever asked for and can be read, sorted."""
        return tuple(sorted(self._placed.located))

    @cached_property
    def filtered(self) -> frozenset[Input]:
        """What events are folded in under a filter, also for models that are gone."""
        return frozenset(part.source for group in self.groups for part in group.accumulators if part.source.where)

    @cached_property
    def initial(self) -> Floats:
        """float64 [slots]: a row that has seen nothing."""
        placed = self._placed
        row = np.full(self.slots, np.nan)
        row[:1] = header(self.id)
        for group in placed.groups.values():
            row[group.head_slot] = NO_TILE if group.width_ms else 0.0
            row[group.first_slot : group.last_slot] = np.repeat(group.initial, group.tiles)
        return row

    def locate(self, aggregate: Aggregate) -> Group | None:
        """The oldest group that holds all accumulators of `aggregate`, so that they saw the same events."""
        number = self._placed.located.get(aggregate)
        return None if number is None else self._placed.groups[number]

    @property
    def located(self) -> Mapping[Aggregate, int]:
        """The number of the group where each is read."""
        return self._placed.located

    def grown(self, aggregates: Iterable[Aggregate], models: Iterable[ModelVersion]) -> Layout:
        """A layout that also holds `aggregates` and the outputs of `models`; this very object if it does already.

        Raises BoundExceeded for a row over ROW_SLOTS_MAX or a window over WINDOW_MS_MAX.
        """
        missing = sorted({aggregate for aggregate in aggregates if aggregate not in self._placed.located})
        versions = tuple(models)
        outputs, marks = self._outputs_missing(versions), self._marks_missing(versions)
        if not missing and not outputs and not marks:
            return self
        for aggregate in missing:
            if abs(aggregate.window_ms) > WINDOW_MS_MAX:
                raise BoundExceeded(f"{aggregate}: windows are at most {WINDOW_MS_MAX // _DAY_MS} days (WINDOW_MS_MAX)")
        generation = Generation(
            aggregates_added(missing),
            self._windows_missing(missing),
            tuple(sorted({source for a in missing for source in pivots_of(a)} - set(self.pivots))),
            outputs,
            marks,
        )
        return self._with(generation)

    def awaiting_history(self, aggregates: Iterable[Aggregate]) -> Layout:
        """A layout that also has groups of their own for `aggregates`, pending. Raises BoundExceeded as `grown`."""
        wanted = sorted(set(aggregates))
        return self._with(
            Generation(
                aggregates_added(wanted),
                windows_added(wanted),
                tuple(sorted({source for a in wanted for source in pivots_of(a)} - set(self.pivots))),
                (),
                pending=True,
            )
        )

    def with_history(self, groups: Sequence[int], lapsed: Collection[str] = ()) -> Layout:
        """The layout in which events go into the pending `groups` too, and their aggregates are read there, but those
        with a filter of `lapsed`."""
        there = [a for a, number in self.awaiting.items() if number in groups and a.where not in lapsed]
        held = tuple(number for number in groups if number in self._placed.groups)
        generation = Generation(aggregates_added(sorted(there)), (), (), (), filled=held)
        return replace(self, generations=(*self.generations, generation))

    def filling(self, groups: Sequence[int]) -> Layout:
        """The same rows, but only those groups, pending or not, are folded into."""
        return _Filling(self.generations, self.base, self.past, tuple(groups))

    def carry(self, layout_id: int, written: Floats, into: Floats, at: Ints) -> None:
        """Take rows [customers, slots then] of this or an earlier layout into rows `at` [customers] of `into`
        [any, slots], which are `initial` there."""
        if layout_id >= self.base_id:
            into[at, 1 : written.shape[1]] = written[:, 1:]
            return
        here, there = self._carried(layout_id)
        into[at[:, None], here] = written[:, there]

    def _carried(self, layout_id: int) -> _Carried:
        """Where the slots of a row of a layout before the base are now."""
        number = bisect_right(self._firsts, layout_id) - 1
        here, there = self._carried_from(number)
        held = there < self.past[number].sizes[layout_id - self._firsts[number]]
        return here[held], there[held]

    def _carried_from(self, number: int) -> _Carried:
        """The same of the last layout before that reduction."""
        known = self._known
        nearest = next((at for at in range(number, len(self.past)) if at in known), len(self.past))
        here, there = known.get(nearest, (np.arange(self._placed.sizes[0]),) * 2)
        for at in range(nearest - 1, number - 1, -1):
            past, base_slots = self.past[at], self.past[at + 1].sizes[0] if at + 1 < len(self.past) else len(here)
            moved = np.concatenate([[0], *(np.arange(slot, slot + count) for slot, count in past.runs)])
            there = moved[np.where(there < base_slots, there, 0)]
            here, there = here[there > 0], there[there > 0]
            if len(known) >= LAYOUTS_CARRIED_MAX:
                del known[next(iter(known))]
            known[at] = here, there
        return here, there

    @cached_property
    def _known(self) -> dict[int, _Carried]:
        return {}

    @cached_property
    def _firsts(self) -> list[int]:
        """The id of the first layout after each reduction, from the empty one on."""
        return list(accumulate((len(past.sizes) for past in self.past[:-1]), initial=0))

    def _with(self, generation: Generation) -> Layout:
        placed = self._placed.grown(generation)
        slots = placed.sizes[-1]
        if slots > ROW_SLOTS_MAX:
            raise BoundExceeded(
                f"a customer's row would need {slots} slots, over ROW_SLOTS_MAX ({ROW_SLOTS_MAX}); "
                "ask for fewer windowed aggregates, or delete models that nobody needs: their slots are taken back, "
                f"every {ROW_REDUCTION_MS_MIN // 60_000} minutes at most"
            )
        layout = replace(self, generations=(*self.generations, generation))
        layout.__dict__["_placed"] = placed  # what is cached would be all generations' placed anew
        return layout

    def _windows_missing(self, aggregates: list[Aggregate]) -> tuple[WindowAdded, ...]:
        there: dict[int, list[set[Accumulator]]] = {}
        for group in self.groups:
            there.setdefault(group.window_ms, []).append(set(group.accumulators))

        def held(aggregate: Aggregate) -> bool:
            return any(accumulators_of(aggregate) <= parts for parts in there.get(aggregate.window_ms, ()))

        return windows_added([aggregate for aggregate in aggregates if not held(aggregate)])

    def _outputs_missing(self, models: Iterable[ModelVersion]) -> tuple[OutputsAdded, ...]:
        missing: dict[ModelName, list[str]] = {}
        for version in sorted(models, key=lambda version: (version.name, version.version)):
            slots = self.outputs.get(version.name)
            for output in version.outputs:
                new = missing.setdefault(version.name, [])
                if output not in new and (slots is None or output not in slots.outputs):
                    new.append(output)
        return tuple(
            OutputsAdded(name.tenant, name.model, tuple(outputs)) for name, outputs in missing.items() if outputs
        )

    def _marks_missing(self, models: Iterable[ModelVersion]) -> tuple[MarkAdded, ...]:
        wanted = {one.name for one in models if one.schedule is not None and not one.schedule.whole}
        return tuple(MarkAdded(name.tenant, name.model) for name in sorted(wanted - self.marks.keys()))

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(
            Encoded(_FORMAT if self.base is None else _FORMAT_REDUCED, self.generations, self.base, self.past)
        )

    @staticmethod
    def decode(encoded: bytes) -> Layout:
        """Raises StateCorrupt when the bytes are not a layout of this format."""
        try:
            decoded = msgspec.msgpack.decode(encoded, type=Encoded)
        except msgspec.MsgspecError as failure:
            raise StateCorrupt(
                f"a stored row layout of {len(encoded)} bytes can't be read ({failure}); "
                "delete the partition's folder, it is rebuilt from the changelog"
            ) from failure
        if decoded.format not in (_FORMAT, _FORMAT_REDUCED):
            raise StateCorrupt(
                f"a stored row layout is of format {decoded.format}, this node reads formats {_FORMAT} and "
                f"{_FORMAT_REDUCED}; run the newer version"
            )
        layout = Layout(decoded.generations, decoded.base, decoded.past)
        if layout.slots > ROW_SLOTS_MAX:
            raise StateCorrupt(f"a stored row layout has {layout.slots} slots, over ROW_SLOTS_MAX ({ROW_SLOTS_MAX})")
        return layout


@dataclass(frozen=True, eq=False)
class _Filling(Layout):
    numbers: tuple[int, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(group for number, group in self._placed.groups.items() if number in self.numbers)


class _Placed:
    """Where each part of the generations lies; derived, never encoded."""

    def __init__(self, base: Base | None, generations: tuple[Generation, ...]) -> None:
        self.groups: dict[int, Group] = {}
        """By number; numbers are never given anew."""
        self.number_next = 0
        self.pivots: dict[Input, int] = {}
        self.outputs: dict[ModelName, ModelSlots] = {}
        self.marks: dict[ModelName, int] = {}
        self.located: dict[Aggregate, int] = {}
        self.pending: set[int] = set()
        self.awaiting: dict[Aggregate, int] = {}
        self.sizes = [1 if base is None else self._begin(base)]
        """Of the base, and after each generation."""
        for generation in generations:
            self._append(generation)

    def grown(self, generation: Generation) -> _Placed:
        """With one more; this one stays as it is."""
        grown = copy(self)
        for name, held in vars(self).items():
            setattr(grown, name, copy(held))
        grown._append(generation)
        return grown

    def _begin(self, base: Base) -> int:
        slot = 1
        for number, added in zip(base.numbers, base.windows, strict=True):
            slot = self._place_window(number, added, slot)
        self.number_next = base.number_next
        self.pending = set(base.pending)
        self.located = {aggregate_of(added): number for added, number in base.located}
        self.awaiting = {aggregate_of(added): number for added, number in base.awaiting}
        return self._place_single(base.pivots, base.outputs, base.marks, slot)

    def _append(self, generation: Generation) -> None:
        slot, first = self.sizes[-1], self.number_next
        for added in generation.windows:
            slot = self._place_window(self.number_next, added, slot)
            self.number_next += 1
        self.sizes.append(self._place_single(generation.pivots, generation.outputs, generation.marks, slot))
        if generation.pending:
            self.pending.update(range(first, self.number_next))
        self.pending.difference_update(generation.filled)
        found = self.awaiting if generation.pending else self.located
        if generation.pending:
            numbers: Iterable[int] = range(first, self.number_next)
        else:
            numbers = generation.filled or [number for number in self.groups if number not in self.pending]
        there: dict[int, list[int]] = {}
        for number in numbers:
            there.setdefault(self.groups[number].window_ms, []).append(number)
        for aggregate in map(aggregate_of, generation.aggregates):
            found[aggregate] = self._group_of(aggregate, there.get(aggregate.window_ms, ()))

    def _place_window(self, number: int, added: WindowAdded, slot: int) -> int:
        """The slot after it."""
        width_ms, tiles = tiling(added.window_ms)
        self.groups[number] = group = Group(added.window_ms, width_ms, tiles, slot, added.accumulators)
        return group.last_slot

    def _place_single(
        self, pivots: Iterable[Input], outputs: Iterable[OutputsAdded], marks: Iterable[MarkAdded], slot: int
    ) -> int:
        """All that is one slot each, from `slot` on; the slot after them."""
        for source in pivots:
            self.pivots[source] = slot
            slot += 1
        for added in outputs:
            slot = self._place_outputs(added, slot)
        for mark in marks:
            self.marks[ModelName(mark.tenant, mark.model)] = slot
            slot += 1
        return slot

    def _place_outputs(self, added: OutputsAdded, slot: int) -> int:
        name = ModelName(added.tenant, added.model)
        held = self.outputs.get(name)
        if held is None:
            held, slot = ModelSlots({}, slot, slot + 1), slot + 2
        outputs = held.outputs | {output: slot + place for place, output in enumerate(added.outputs)}
        self.outputs[name] = ModelSlots(outputs, held.time_slot, held.version_slot)
        return slot + len(added.outputs)

    def _group_of(self, aggregate: Aggregate, numbers: Iterable[int]) -> int:
        """The first of these of its window that has all its parts."""
        parts = accumulators_of(aggregate)
        for number in numbers:
            if parts <= set(self.groups[number].accumulators):
                return number
        raise StateCorrupt(f"a stored row layout names {aggregate} but has no slots for it")


def header(layout_id: int) -> Floats:
    """float64 [1]: slot 0 of a row under the layout, a bit pattern and not a number to reckon with."""
    return np.array([_MAGIC << 48 | _FORMAT << 32 | layout_id], dtype="<u8").view("<f8")
