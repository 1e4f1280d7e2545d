"""(P) What was seen of a staged version beside the live one, in memory that does not grow: counts and histograms.

Drift is the Kolmogorov-Smirnov distance of the two versions' outputs, the largest difference of their distribution
functions, here at the histogram's edges: 0 for equal outputs, 1 for outputs that have nothing in common.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np

from node.kernel.limits import STAGE_OUTPUTS_MAX
from node.kernel.types import Bools, Floats, Ints, ModelOutputs

_STEPS_PER_OCTAVE: Final = 8
_GRID: Final = 2.0 ** (np.arange(-20 * _STEPS_PER_OCTAVE, 30 * _STEPS_PER_OCTAVE + 1) / _STEPS_PER_OCTAVE)
_EDGES: Final = np.concatenate((-_GRID[::-1], [0.0], _GRID))
"""An upper edge is at most 9% above what it counts, from 1e-6 to 1e9, on either side of 0."""
_P99_ROWS_MIN: Final = 100
"""Of fewer rows, the 99th percentile is the slowest call."""
_CHANCE: Final = 1.95
"""Kolmogorov-Smirnov test (Smirnov 1948): equal distributions differ by more than this once in a thousand times."""


class Figures(msgspec.Struct, frozen=True, array_like=True):
    """What one node, or `merged` several, saw of a version in its stage number `stage`. CPU seconds; ms a call."""

    stage: int
    rows: int = 0
    """That the staged version was called with."""
    errors: int = 0
    """Of these."""
    live_rows: int = 0
    live_errors: int = 0
    compared: int = 0
    """Rows that the live version has answered, and the shadow was called with."""
    agreed: int = 0
    dropped: int = 0
    """Rows not given to the shadow: the tenant had no share to spare, or they were never answered."""
    cpu_seconds: float = 0.0
    live_cpu_seconds: float = 0.0
    drift: float = 0.0
    p99_ms: float = 0.0
    live_p99_ms: float = 0.0

    @property
    def error_rate(self) -> float:
        return self.errors / self.rows if self.rows else 0.0

    @property
    def agreement(self) -> float | None:
        return self.agreed / self.compared if self.compared else None

    @property
    def drift_chance(self) -> float:
        """How much drift two equal versions may show, when each answers other customers."""
        if not self.rows or not self.live_rows:
            return 1.0
        return _CHANCE * math.sqrt(1 / self.rows + 1 / self.live_rows)

    @property
    def cost_ratio(self) -> float | None:
        """CPU time a row, in that of the live version; None while either is not known."""
        if not self.rows or not self.live_rows or self.live_cpu_seconds <= 0.0:
            return None
        return (self.cpu_seconds / self.rows) / (self.live_cpu_seconds / self.live_rows)


def merged(figures: Sequence[Figures], stage: int) -> Figures:
    """Of several nodes: counts and times added up; p99 of the node where it is worst, among those that saw enough rows
    to have one; drift weighted by rows, which is not below that of all rows together while nodes split them alike."""
    found = [one for one in figures if one.stage == stage]
    if not found:
        return Figures(stage)
    apart = {"stage", "drift", "p99_ms", "live_p99_ms"}
    sums = {name: sum(getattr(one, name) for one in found) for name in Figures.__struct_fields__ if name not in apart}
    drift = sum(one.drift * one.rows for one in found) / max(1, sums["rows"])
    p99_ms = _worst((one.rows, one.p99_ms) for one in found)
    live_p99_ms = _worst((one.live_rows, one.live_p99_ms) for one in found)
    return Figures(stage, **sums, drift=drift, p99_ms=p99_ms, live_p99_ms=live_p99_ms)


def _worst(found: Iterable[tuple[int, float]]) -> float:
    """Of rows and p99 by node; where no node saw enough rows, of all."""
    told = list(found)
    return max(p99 for rows, p99 in told if rows >= _P99_ROWS_MIN or all(other < _P99_ROWS_MIN for other, _ in told))


class Sketch:
    """A histogram of numbers over fixed edges; what is not finite has a place of its own."""

    def __init__(self) -> None:
        self._counts: Ints = np.zeros(len(_EDGES) + 2, np.int64)

    def add(self, values: Floats, times: int = 1) -> None:
        places = np.where(np.isfinite(values), np.searchsorted(_EDGES, values), len(_EDGES) + 1)
        self._counts += times * np.bincount(places, minlength=len(self._counts))

    @property
    def total(self) -> int:
        return int(self._counts.sum())

    def quantile(self, share: float) -> float:
        """Not below the quantile, and at most 9% above it; 0 without numbers."""
        if not self.total:
            return 0.0
        place = int(np.searchsorted(np.cumsum(self._counts), share * self.total))
        return float(_EDGES[min(place, len(_EDGES) - 1)])

    def distance(self, other: Sketch) -> float:
        """The largest difference of the two distribution functions; 0 while either is empty."""
        if not self.total or not other.total:
            return 0.0
        mine, others = np.cumsum(self._counts) / self.total, np.cumsum(other._counts) / other.total
        return float(np.abs(mine - others).max())


@dataclass(slots=True)
class _Side:
    rows: int = 0
    errors: int = 0
    cpu_seconds: float = 0.0
    calls_ms: Sketch = field(default_factory=Sketch)
    outputs: list[Sketch] = field(default_factory=list)

    def add(self, given: ModelOutputs) -> None:
        count, width = len(given.values), min(given.values.shape[1], STAGE_OUTPUTS_MAX)
        self.rows += count
        self.errors += len(given.errors)
        self.cpu_seconds += given.cpu_seconds
        self.calls_ms.add(np.array([given.call_seconds * 1000]), count)
        self.outputs += [Sketch() for _ in range(width - len(self.outputs))]
        good = answered(given)
        for output in range(width):
            self.outputs[output].add(given.values[good, output])


class Comparison:
    """Of one version in one stage. `tolerance` as of `Stage`; 0 for outputs that are class numbers."""

    def __init__(self, stage: int, tolerance: float = 0.0) -> None:
        self.stage = stage
        self._tolerance = tolerance
        self._live, self._staged = _Side(), _Side()
        self._compared = self._agreed = self._dropped = 0

    def live_gave(self, outputs: ModelOutputs) -> None:
        self._live.add(outputs)

    def staged_gave(self, outputs: ModelOutputs) -> None:
        self._staged.add(outputs)

    def both_gave(self, live: ModelOutputs, staged: ModelOutputs) -> None:
        """Of the very same triggers, in the same order."""
        self._live.add(live)
        self._staged.add(staged)
        known = answered(live)
        self._compared += int(known.sum())
        self._agreed += int((known & answered(staged) & self._alike(live.values, staged.values)).sum())

    def dropped(self, rows: int) -> None:
        self._dropped += rows

    def _alike(self, live: Floats, staged: Floats) -> Bools:
        near = np.abs(live - staged) <= self._tolerance * np.maximum(1.0, np.abs(live))
        alike: Bools = (near | (live == staged) | (np.isnan(live) & np.isnan(staged))).all(axis=1)
        return alike

    def figures(self) -> Figures:
        live, staged = self._live, self._staged
        drifts = [one.distance(other) for one, other in zip(live.outputs, staged.outputs, strict=False)]
        return Figures(
            self.stage,
            rows=staged.rows,
            errors=staged.errors,
            live_rows=live.rows,
            live_errors=live.errors,
            compared=self._compared,
            agreed=self._agreed,
            dropped=self._dropped,
            cpu_seconds=staged.cpu_seconds,
            live_cpu_seconds=live.cpu_seconds,
            drift=max(drifts, default=0.0),
            p99_ms=staged.calls_ms.quantile(0.99),
            live_p99_ms=live.calls_ms.quantile(0.99),
        )


def answered(given: ModelOutputs) -> Bools:
    """The rows that have an output."""
    good = np.ones(len(given.values), np.bool_)
    good[list(given.errors)] = False
    return good
