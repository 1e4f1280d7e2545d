"""What the fairness benchmarks compute: Jain's index over windows, and ratios of percentiles over rounds. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray


def jain(shares: Sequence[float]) -> float:
    """Jain's index of shares that should be equal: 1 when they are, 1/n when one has all (Jain, Chiu and Hawe, 1984).

    NaN when there is none, or nobody got anything.
    """
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares > 0 else math.nan


def jain_by_window(
    times_s: Sequence[float], totals: NDArray[np.float64], weights: Sequence[float], window_s: float
) -> list[float]:
    """Jain's index of service / weight over every window that starts at a sample, the last whole one included.

    `totals` is float64 [samples, tenants]: what each tenant had had at each of `times_s`, which ascend. A window ends
    at the first sample that is at least `window_s` later.
    """
    per_weight = totals / np.asarray(weights, np.float64)
    times = np.asarray(times_s, np.float64)
    ends = np.searchsorted(times, times + window_s)
    return [jain((per_weight[end] - per_weight[at]).tolist()) for at, end in enumerate(ends) if end < len(times)]


def percentile(values: Sequence[float] | NDArray[np.float64], percent: float) -> float:
    """By linear interpolation; NaN of nothing, so that an arm without an answer meets no aim."""
    return float(np.percentile(values, percent)) if len(values) else math.nan


def ratios(loaded: Sequence[float], alone: Sequence[float]) -> list[float]:
    """Round by round: both ran within the same minute, so what the machine did meanwhile cancels out."""
    return [one / other for one, other in zip(loaded, alone, strict=True)]


def median_ratios(rounds: Mapping[str, Sequence[float]], base: str) -> dict[str, float]:
    """Arm -> the median over the rounds of its ratio to arm `base`."""
    return {name: statistics.median(ratios(values, rounds[base])) for name, values in rounds.items() if name != base}


def worst(values: Mapping[str, float]) -> float:
    """The largest; NaN when one of them is, since the largest is not known then."""
    return math.nan if any(math.isnan(value) for value in values.values()) else max(values.values())


def rows_for(seconds: float, weights: Mapping[str, float], seconds_per_row: Mapping[str, float]) -> dict[str, int]:
    """Rows of each tenant that take its weighted share of `seconds`, at least one: so that all end together."""
    total = sum(weights.values())
    return {name: max(1, round(seconds * weight / total / seconds_per_row[name])) for name, weight in weights.items()}
