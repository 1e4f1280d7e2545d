"""(P) What a window keeps of a customer's events: its accumulators, the tiles of each, and the slots they take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from node.kernel.types import ANY_EVENT, EVENT_TIME, Aggregate

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

TILES_MIN = 12
_SECOND, _MINUTE, _HOUR, _DAY = 1_000, 60_000, 3_600_000, 86_400_000
TILE_WIDTHS_MS = (
    *(_SECOND * n for n in (1, 5, 15)),
    *(_MINUTE * n for n in (1, 5, 15)),
    *(_HOUR * n for n in (1, 2, 6, 12)),
    *(_DAY * n for n in (1, 2, 4, 8, 16, 32)),
)
"""Each divides the next: events of one fine tile are of one tile of every coarser width too."""


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


def pivots_of(aggregate: Aggregate) -> tuple[Input, ...]:
    """What a standard deviation is reckoned from, once for all its windows."""
    if aggregate.function != "std":
        return ()
    return (Input(aggregate.event, aggregate.field, aggregate.where),)


def windows_of(aggregates: Iterable[Aggregate]) -> dict[int, set[Accumulator]]:
    """The accumulators of each window, by its ms."""
    windows: dict[int, set[Accumulator]] = {}
    for aggregate in aggregates:
        kept = windows.setdefault(aggregate.window_ms, {NEWEST} if aggregate.window_ms < 0 else set())
        kept.update(accumulators_of(aggregate))
    return windows


def window_slots(aggregates: Iterable[Aggregate]) -> int:
    """What all these take of a row that has nothing else."""
    wanted = set(aggregates)
    pivots = {source for aggregate in wanted for source in pivots_of(aggregate)}
    groups = windows_of(wanted).items()
    return len(pivots) + sum(
        1 + tiling(window_ms)[1] * sum(PLANES[part.kind] for part in parts) for window_ms, parts in groups
    )
