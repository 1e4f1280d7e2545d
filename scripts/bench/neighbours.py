"""Tenants' models for the fairness benchmark: scikit-learn models of a wanted cost per row, and broken ones.

The cheapest are a few boosted trees. The dearer ones look for the nearest
of N rows by brute force and by the Manhattan distance: their cost is N times a few nanoseconds, with little on top
for a call. Classes here are named in `[tenants] allow_globals` of the benchmark's node, and in no other.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

TREES_SECONDS_MAX = 2e-6
"""Up to this a row is boosted trees', at so much for each."""
SECONDS_PER_TREE = 0.06e-6
ROWS_MIN = 64
CALIBRATION_ROWS = 100_000
COLUMNS = ("amount", "count", "price")
TRIGGER = 1000.0
"""Broken models break on rows whose first column is at least this; the made-up rows of a trial are below."""


def seconds_per_neighbour() -> float:
    """CPU seconds for one row of a batch against one row learned, on this machine now."""
    model = _nearest(CALIBRATION_ROWS)
    rows = np.random.default_rng(1).random((64, len(COLUMNS)))
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        model.predict(rows)
        best = min(best, time.process_time() - started)
    return best / len(rows) / CALIBRATION_ROWS


def of_cost(seconds_per_row: float, per_neighbour: float) -> Any:
    """A model with three columns and `predict` that costs about that much CPU a row in a batch."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    if seconds_per_row < TREES_SECONDS_MAX:
        rows = np.random.default_rng(2).random((1000, len(COLUMNS)))
        trees = max(1, round(seconds_per_row / SECONDS_PER_TREE))
        with threadpool_limits(1):
            return HistGradientBoostingRegressor(max_iter=trees, early_stopping=False).fit(rows, rows.sum(axis=1))
    return _nearest(max(ROWS_MIN, round(seconds_per_row / per_neighbour)))


def _nearest(count: int) -> Any:
    from sklearn.neighbors import KNeighborsRegressor

    rows = np.random.default_rng(3).random((count, len(COLUMNS)))
    return KNeighborsRegressor(5, algorithm="brute", metric="manhattan").fit(rows, rows.sum(axis=1))


class Broken:
    """Harmless on rows below TRIGGER. `number` makes one version of it differ from another."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def predict(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        if (np.asarray(rows)[:, 0] >= TRIGGER).any():
            self.misbehave()
        return np.zeros(len(rows))

    def misbehave(self) -> None:
        raise NotImplementedError


class Crasher(Broken):
    def misbehave(self) -> None:
        ctypes.string_at(0)


class Sleeper(Broken):
    """Uses no CPU and never answers: until its deadline, it holds what it was given."""

    def misbehave(self) -> None:
        time.sleep(3600)


class Bomber(Broken):
    """Takes all memory it can get, touches it, and starts again when there is no more."""

    def misbehave(self) -> None:
        while True:
            held = []
            try:
                while True:
                    held.append(np.ones(1 << 20))
            except MemoryError:
                del held


BROKEN = {"crash": Crasher, "sleep": Sleeper, "bomb": Bomber}
