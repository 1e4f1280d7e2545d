"""(P) What a row layout is made of, as frames and stores hold it: what growths appended and what a reduction left."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from node.kernel.types import Aggregate
from node.kernel.windows import KINDS, Accumulator, Input, windows_of


class WindowAdded(msgspec.Struct, frozen=True, array_like=True):
    window_ms: int
    accumulators: tuple[Accumulator, ...]


class OutputsAdded(msgspec.Struct, frozen=True, array_like=True):
    tenant: str
    model: str
    outputs: tuple[str, ...]


class AggregateAdded(msgspec.Struct, frozen=True, array_like=True):
    function: str
    event: str
    field: str
    window_ms: int
    where: str


class MarkAdded(msgspec.Struct, frozen=True, array_like=True):
    tenant: str
    model: str


class Base(msgspec.Struct, frozen=True, array_like=True):
    """All that a reduction left, in slot order."""

    windows: tuple[WindowAdded, ...]
    numbers: tuple[int, ...]
    """Of the groups of these windows: those that they have always had."""
    number_next: int
    pivots: tuple[Input, ...]
    outputs: tuple[OutputsAdded, ...]
    marks: tuple[MarkAdded, ...]
    located: tuple[tuple[AggregateAdded, int], ...]
    """Where aggregates are read: the number of a group."""
    awaiting: tuple[tuple[AggregateAdded, int], ...]
    pending: tuple[int, ...]
    at_ms: int
    """When it was reduced."""


class Past(msgspec.Struct, frozen=True, array_like=True):
    """What is left of the layouts between two reductions."""

    sizes: tuple[int, ...]
    """Slots of a row under each of them."""
    runs: tuple[tuple[int, int], ...]
    """(slot under the last of them, how many): what fills the slots of the base after them, from slot 1 on."""


class Generation(msgspec.Struct, frozen=True, array_like=True):
    """What one growth appended, in slot order."""

    aggregates: tuple[AggregateAdded, ...]
    windows: tuple[WindowAdded, ...]
    pivots: tuple[Input, ...]
    outputs: tuple[OutputsAdded, ...]
    marks: tuple[MarkAdded, ...] = ()
    pending: bool = False
    """Its windows are filled from history first: no event goes into them, and none of its aggregates is read there."""
    filled: tuple[int, ...] = ()
    """Groups that are pending no more, by number; the aggregates named are read there from now on."""


class Encoded(msgspec.Struct, frozen=True, omit_defaults=True):
    format: int
    generations: tuple[Generation, ...]
    base: Base | None = None
    past: tuple[Past, ...] = ()


def aggregate_added(aggregate: Aggregate) -> AggregateAdded:
    return AggregateAdded(aggregate.function, aggregate.event, aggregate.field, aggregate.window_ms, aggregate.where)


def aggregates_added(aggregates: Iterable[Aggregate]) -> tuple[AggregateAdded, ...]:
    return tuple(map(aggregate_added, aggregates))


def aggregate_of(added: AggregateAdded) -> Aggregate:
    return Aggregate(*(getattr(added, name) for name in added.__struct_fields__))


def windows_added(aggregates: Iterable[Aggregate]) -> tuple[WindowAdded, ...]:
    return tuple(WindowAdded(window, in_plane_order(parts)) for window, parts in sorted(windows_of(aggregates).items()))


def in_plane_order(accumulators: Iterable[Accumulator]) -> tuple[Accumulator, ...]:
    """As they lie in a group."""
    return tuple(sorted(accumulators, key=lambda one: (KINDS.index(one.kind), one.source)))
