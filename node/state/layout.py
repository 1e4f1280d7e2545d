"""(P) The layout of a customer's row: which float64 slot holds what.

A row is a header slot and then, generation by generation, what each growth of the layout added: *groups* of
windowed accumulators, pivots, stored model outputs, and marks of interval models. Slots are only ever appended, so a
row written under an older layout is a prefix of a newer one, and `initial` is what to pad it with.

A window is tiled by event time. It is the tile of the event read at, still filling, and the full tiles before it.
A group is one head slot (the newest tile the customer has reached) and, for each *plane* of each accumulator, a
ring of tiles: tile `i` is in ring slot `i mod tiles`. For ever is one tile, so the same rules hold. So is a session,
whose number is the time of the event that began it (`node.state.sessions`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from node.kernel.errors import BoundExceeded, StateCorrupt
from node.kernel.limits import ROW_SLOTS_MAX, WINDOW_MS_MAX
from node.kernel.types import ANY_EVENT, EVENT_TIME, Aggregate, Floats, ModelName, ModelVersion

Kind: TypeAlias = Literal["count", "sum", "shifted", "squared", "min", "max", "sketch", "first", "last"]
"""What an accumulator keeps. `shifted` and `squared` are the sums of (x - pivot) and of its square."""

KINDS: tuple[Kind, ...] = ("count", "sum", "shifted", "squared", "min", "max", "sketch", "first", "last")
"""In the order of their planes within a group, so that kinds combined alike lie side by side."""

SKETCH_WORDS = 4
"""A sketch is 256 bits: four uint64, kept as the bit patterns of four float64 slots."""

PLANES: dict[Kind, int] = dict.fromkeys(KINDS, 1) | {"sketch": SKETCH_WORDS, "first": 2, "last": 2}
"""Planes of one accumulator; those of first and last are its time (ms) and its value."""

INITIAL: dict[Kind, tuple[float, ...]] = {
    "count": (0.0,),
    "sum": (0.0,),
    "shifted": (0.0,),
    "squared": (0.0,),
    "min": (np.inf,),
    "max": (-np.inf,),
    "sketch": (0.0,) * SKETCH_WORDS,
    "first": (np.inf, np.nan),
    "last": (-np.inf, np.nan),
}
"""A plane's value in a tile that has seen nothing."""

NO_TILE = -(2.0**50)
"""Head of a group that has seen nothing: older than the tile of any event."""

TILES_MIN = 12
_SECOND, _MINUTE, _HOUR, _DAY = 1_000, 60_000, 3_600_000, 86_400_000
TILE_WIDTHS_MS = (
    *(_SECOND * n for n in (1, 5, 15)),
    *(_MINUTE * n for n in (1, 5, 15)),
    *(_HOUR * n for n in (1, 2, 6, 12)),
    *(_DAY * n for n in (1, 2, 4, 8, 16, 32)),
)
"""Each divides the next: events of one fine tile are of one tile of every coarser width too."""

_MAGIC = 0x4852
_FORMAT = 1


class Input(msgspec.Struct, frozen=True, order=True, array_like=True):
    """Which events, and which of their fields, an accumulator takes in; the field is '' for the event itself."""

    event: str
    field: str
    where: str


class Accumulator(msgspec.Struct, frozen=True, order=True, array_like=True):
    kind: Kind
    source: Input


NEWEST = Accumulator("max", Input(ANY_EVENT, EVENT_TIME, ""))
"""What every group of a session keeps: whether an event still belongs to it follows from its newest event's time."""


class _WindowAdded(msgspec.Struct, frozen=True, array_like=True):
    window_ms: int
    accumulators: tuple[Accumulator, ...]


class _OutputsAdded(msgspec.Struct, frozen=True, array_like=True):
    tenant: str
    model: str
    outputs: tuple[str, ...]


class _AggregateAdded(msgspec.Struct, frozen=True, array_like=True):
    function: str
    event: str
    field: str
    window_ms: int
    where: str


class _MarkAdded(msgspec.Struct, frozen=True, array_like=True):
    tenant: str
    model: str


class Generation(msgspec.Struct, frozen=True, array_like=True):
    """What one growth appended, in slot order."""

    aggregates: tuple[_AggregateAdded, ...]
    windows: tuple[_WindowAdded, ...]
    pivots: tuple[Input, ...]
    outputs: tuple[_OutputsAdded, ...]
    marks: tuple[_MarkAdded, ...] = ()
    pending: bool = False
    """Its windows are filled from history first: no event goes into them, and none of its aggregates is read there."""
    filled: tuple[int, ...] = ()
    """Groups that are pending no more, by number; the aggregates named are read there from now on."""


class _Encoded(msgspec.Struct, frozen=True):
    format: int
    generations: tuple[Generation, ...]


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
    """Immutable; compared by identity. `id` counts the generations: 0 is the empty layout."""

    generations: tuple[Generation, ...] = ()

    @staticmethod
    def empty() -> Layout:
        return Layout()

    @property
    def id(self) -> int:
        return len(self.generations)

    @cached_property
    def _placed(self) -> _Placed:
        return _Placed(self.generations)

    @property
    def slots(self) -> int:
        return self._placed.sizes[-1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Slots of a row under each layout from the empty one to this, by id."""
        return tuple(self._placed.sizes)

    @property
    def groups(self) -> tuple[Group, ...]:
        """Those that events are folded into."""
        pending = self._placed.pending
        return tuple(group for number, group in enumerate(self._placed.groups) if number not in pending)

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
        for group in placed.groups:
            row[group.head_slot] = NO_TILE if group.width_ms else 0.0
            row[group.first_slot : group.last_slot] = np.repeat(group.initial, group.tiles)
        return row

    def locate(self, aggregate: Aggregate) -> Group | None:
        """The oldest group that holds all accumulators of `aggregate`, so that they saw the same events."""
        return self._placed.located.get(aggregate)

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
                raise BoundExceeded(f"{aggregate}: windows are at most {WINDOW_MS_MAX // _DAY} days (WINDOW_MS_MAX)")
        generation = Generation(
            _added(missing),
            self._windows_missing(missing),
            tuple(sorted({source for a in missing for source in _pivots_of(a)} - set(self.pivots))),
            outputs,
            marks,
        )
        return self._with(generation)

    def awaiting_history(self, aggregates: Iterable[Aggregate]) -> Layout:
        """A layout that also has groups of their own for `aggregates`, pending. Raises BoundExceeded as `grown`."""
        wanted = sorted(set(aggregates))
        return self._with(
            Generation(
                _added(wanted),
                _windows_of(wanted),
                tuple(sorted({source for a in wanted for source in _pivots_of(a)} - set(self.pivots))),
                (),
                pending=True,
            )
        )

    def with_history(self, groups: Sequence[int], lapsed: Collection[str] = ()) -> Layout:
        """The layout in which events go into the pending `groups` too, and their aggregates are read there, but those
        with a filter of `lapsed`."""
        there = [a for a, number in self.awaiting.items() if number in groups and a.where not in lapsed]
        return Layout((*self.generations, Generation(_added(sorted(there)), (), (), (), filled=tuple(groups))))

    def filling(self, groups: Sequence[int]) -> Layout:
        """The same rows, but only those groups, pending or not, are folded into."""
        return _Filling(self.generations, tuple(groups))

    def _with(self, generation: Generation) -> Layout:
        layout = Layout((*self.generations, generation))
        if layout.slots > ROW_SLOTS_MAX:
            raise BoundExceeded(
                f"a customer's row would need {layout.slots} slots, over ROW_SLOTS_MAX ({ROW_SLOTS_MAX}); "
                "ask for fewer windowed aggregates"
            )
        return layout

    def _windows_missing(self, aggregates: list[Aggregate]) -> tuple[_WindowAdded, ...]:
        def held(aggregate: Aggregate) -> bool:
            groups = [group for group in self.groups if group.window_ms == aggregate.window_ms]
            return any(accumulators_of(aggregate) <= set(group.accumulators) for group in groups)

        return _windows_of([aggregate for aggregate in aggregates if not held(aggregate)])

    def _outputs_missing(self, models: Iterable[ModelVersion]) -> tuple[_OutputsAdded, ...]:
        missing: dict[ModelName, list[str]] = {}
        for version in sorted(models, key=lambda version: (version.name, version.version)):
            slots = self.outputs.get(version.name)
            for output in version.outputs:
                new = missing.setdefault(version.name, [])
                if output not in new and (slots is None or output not in slots.outputs):
                    new.append(output)
        return tuple(
            _OutputsAdded(name.tenant, name.model, tuple(outputs)) for name, outputs in missing.items() if outputs
        )

    def _marks_missing(self, models: Iterable[ModelVersion]) -> tuple[_MarkAdded, ...]:
        wanted = {one.name for one in models if one.schedule is not None and not one.schedule.whole}
        return tuple(_MarkAdded(name.tenant, name.model) for name in sorted(wanted - self.marks.keys()))

    def encode(self) -> bytes:
        return msgspec.msgpack.encode(_Encoded(_FORMAT, self.generations))

    @staticmethod
    def decode(encoded: bytes) -> Layout:
        """Raises StateCorrupt when the bytes are not a layout of this format."""
        try:
            decoded = msgspec.msgpack.decode(encoded, type=_Encoded)
        except msgspec.MsgspecError as failure:
            raise StateCorrupt(
                f"a stored row layout of {len(encoded)} bytes can't be read ({failure}); "
                "delete the partition's folder, it is rebuilt from the changelog"
            ) from failure
        if decoded.format != _FORMAT:
            raise StateCorrupt(f"a stored row layout is of format {decoded.format}, this node reads format {_FORMAT}")
        layout = Layout(decoded.generations)
        if layout.slots > ROW_SLOTS_MAX:
            raise StateCorrupt(f"a stored row layout has {layout.slots} slots, over ROW_SLOTS_MAX ({ROW_SLOTS_MAX})")
        return layout


@dataclass(frozen=True, eq=False)
class _Filling(Layout):
    numbers: tuple[int, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        return tuple(self._placed.groups[number] for number in self.numbers)


def _added(aggregates: Iterable[Aggregate]) -> tuple[_AggregateAdded, ...]:
    return tuple(_AggregateAdded(a.function, a.event, a.field, a.window_ms, a.where) for a in aggregates)


def _windows_of(aggregates: Iterable[Aggregate]) -> tuple[_WindowAdded, ...]:
    windows: dict[int, set[Accumulator]] = {}
    for aggregate in aggregates:
        kept = windows.setdefault(aggregate.window_ms, {NEWEST} if aggregate.window_ms < 0 else set())
        kept.update(accumulators_of(aggregate))
    return tuple(
        _WindowAdded(window, tuple(sorted(parts, key=_plane_order))) for window, parts in sorted(windows.items())
    )


class _Placed:
    """Where each part of the generations lies; derived, never encoded."""

    def __init__(self, generations: tuple[Generation, ...]) -> None:
        self.sizes = [1]
        self.groups: list[Group] = []
        self.pivots: dict[Input, int] = {}
        self.outputs: dict[ModelName, ModelSlots] = {}
        self.marks: dict[ModelName, int] = {}
        self.located: dict[Aggregate, Group] = {}
        self.pending: set[int] = set()
        self.awaiting: dict[Aggregate, int] = {}
        for generation in generations:
            slot, first = self.sizes[-1], len(self.groups)
            for added in generation.windows:
                width_ms, tiles = tiling(added.window_ms)
                group = Group(added.window_ms, width_ms, tiles, slot, added.accumulators)
                self.groups.append(group)
                slot = group.last_slot
            for source in generation.pivots:
                self.pivots[source] = slot
                slot += 1
            for outputs in generation.outputs:
                slot = self._place_outputs(outputs, slot)
            for mark in generation.marks:
                self.marks[ModelName(mark.tenant, mark.model)] = slot
                slot += 1
            self.sizes.append(slot)
            if generation.pending:
                self.pending.update(range(first, len(self.groups)))
            self.pending.difference_update(generation.filled)
            for added_aggregate in generation.aggregates:
                aggregate = Aggregate(*_fields_of(added_aggregate))  # type: ignore[arg-type]
                if generation.pending:
                    self.awaiting[aggregate] = self._group_of(aggregate, range(first, len(self.groups)))
                elif generation.filled:
                    self.located[aggregate] = self.groups[self._group_of(aggregate, generation.filled)]
                else:
                    ready = [number for number in range(len(self.groups)) if number not in self.pending]
                    self.located[aggregate] = self.groups[self._group_of(aggregate, ready)]

    def _place_outputs(self, added: _OutputsAdded, slot: int) -> int:
        name = ModelName(added.tenant, added.model)
        held = self.outputs.get(name)
        if held is None:
            held, slot = ModelSlots({}, slot, slot + 1), slot + 2
        outputs = held.outputs | {output: slot + place for place, output in enumerate(added.outputs)}
        self.outputs[name] = ModelSlots(outputs, held.time_slot, held.version_slot)
        return slot + len(added.outputs)

    def _group_of(self, aggregate: Aggregate, numbers: Iterable[int]) -> int:
        """The first of them that has all its parts."""
        parts = accumulators_of(aggregate)
        for number in numbers:
            group = self.groups[number]
            if group.window_ms == aggregate.window_ms and parts <= set(group.accumulators):
                return number
        raise StateCorrupt(f"a stored row layout names {aggregate} but has no slots for it")


def _fields_of(added: _AggregateAdded) -> Iterator[str | int]:
    return (getattr(added, name) for name in added.__struct_fields__)


def _plane_order(accumulator: Accumulator) -> tuple[int, Input]:
    return KINDS.index(accumulator.kind), accumulator.source


def header(layout_id: int) -> Floats:
    """float64 [1]: slot 0 of a row under the layout, a bit pattern and not a number to reckon with."""
    return np.array([_MAGIC << 48 | _FORMAT << 32 | layout_id], dtype="<u8").view("<f8")


def tiling(window_ms: int) -> tuple[int, int]:
    """(width of a tile in ms, tiles) of a window; (0, 1) for ever (0), (gap, 1) of a session (-gap).

    The widest width that gives at least TILES_MIN tiles; one second for the shortest windows.
    """
    if window_ms <= 0:
        return -window_ms, 1
    fitting = [width for width in TILE_WIDTHS_MS if -(-window_ms // width) >= TILES_MIN]
    width = fitting[-1] if fitting else TILE_WIDTHS_MS[0]
    return width, -(-window_ms // width)


def accumulators_of(aggregate: Aggregate) -> frozenset[Accumulator]:
    """What must be kept to answer `aggregate`, so that aggregates share it: a mean is a sum and a count."""
    kinds: dict[str, tuple[Kind, ...]] = {
        "mean": ("count", "sum"),
        "std": ("count", "shifted", "squared"),
        "distinct": ("sketch",),
        "since": ("max",),
    }
    field = EVENT_TIME if aggregate.function == "since" else aggregate.field
    source = Input(aggregate.event, field, aggregate.where)
    return frozenset(Accumulator(kind, source) for kind in kinds.get(aggregate.function, (aggregate.function,)))  # type: ignore[arg-type]


def _pivots_of(aggregate: Aggregate) -> tuple[Input, ...]:
    if aggregate.function != "std":
        return ()
    return (Input(aggregate.event, aggregate.field, aggregate.where),)
