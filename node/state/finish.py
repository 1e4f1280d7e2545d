"""(P) From the values of accumulators to the value of an aggregate."""

from __future__ import annotations

import math

import numpy as np

from node.kernel.types import EVENT_TIME, Aggregate, Floats
from node.kernel.windows import PLANES, SKETCH_WORDS, Accumulator, Input, Kind
from node.state.layout import Layout
from node.state.planes import PlaneIndex

_BITS = 64 * SKETCH_WORDS
_DISTINCT = np.array([_BITS * math.log(_BITS / max(1, _BITS - ones)) for ones in range(_BITS + 1)])
"""Linear counting (Whang, Vander-Zanden, Taylor 1990): the estimate for a number of ones in the bitmap. A full
bitmap, like one with a single zero, reads as some 1,420: more than that can't be told apart."""


def finished(
    index: PlaneIndex, layout: Layout, aggregate: Aggregate, values: Floats, before: Floats, seconds: Floats
) -> Floats:
    """float64 [n]: the aggregate as of each event.

    `values` [planes, n] are windows with the event; `before` [planes of kind max, n] without it; `seconds` [n] the
    times of the events. Nothing seen, or not filled from history yet: 0 for count, sum and distinct, NaN for the rest.
    """
    group = layout.locate(aggregate)
    if group is None and aggregate in layout.awaiting:
        empty = 0.0 if aggregate.function in ("count", "sum", "distinct") else np.nan
        return np.full(len(seconds), empty)
    if group is None:
        raise KeyError(f"{aggregate} is not in the row layout; grow the layout before folding")
    source = Input(aggregate.event, aggregate.field, aggregate.where)

    def plane(kind: Kind, of: Input = source) -> Floats:
        first = index.located[group, Accumulator(kind, of)]
        taken: Floats = values[first + PLANES[kind] - 1]
        return taken

    match aggregate.function:
        case "count" | "sum" | "first" | "last":
            return plane(aggregate.function)
        case "min" | "max":
            found = plane(aggregate.function)
            return np.where(np.isinf(found), np.nan, found)
        case "mean":
            with np.errstate(invalid="ignore"):
                return plane("sum") / plane("count")
        case "std":
            return _deviation(plane("count"), plane("shifted"), plane("squared"))
        case "distinct":
            last = index.located[group, Accumulator("sketch", source)]
            words = values.view(np.uint64)[last : last + SKETCH_WORDS]
            estimated: Floats = _DISTINCT[np.bitwise_count(words).sum(axis=0)]
            return estimated
        case "since":
            first = index.located[group, Accumulator("max", Input(aggregate.event, EVENT_TIME, aggregate.where))]
            previous = before[first - index.planes.highest.start]
            return np.where(np.isinf(previous), np.nan, np.maximum(seconds - previous, 0.0))


def _deviation(count: Floats, shifted: Floats, squared: Floats) -> Floats:
    """Standard deviation of the population from sums of (x - pivot) and its square (Chan, Golub, LeVeque 1983)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = (squared - shifted * shifted / count) / count
        deviation: Floats = np.sqrt(np.maximum(variance, 0.0))
    return deviation
