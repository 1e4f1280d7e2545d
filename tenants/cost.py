"""What a call of a model costs: a fixed part and a part for each row, learned from measured CPU time. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

DECAY = 0.9
"""Weight that each observation keeps when the next one comes: the last ten decide."""
SPREAD_MIN = 0.05
"""Below this relative spread of batch sizes a slope can't be told from noise, so only the scale is learned."""
GROWTH_MAX = 4
"""A batch is at most this many times the largest one seen: an unknown model is felt out, not flooded."""
ROWS_FIRST = 16
SECONDS_MIN = 1e-9


@dataclass(slots=True)
class CostEstimate:
    """`seconds_per_call` + `seconds_per_row` * rows, fitted by exponentially weighted least squares.

    The first values (from the trial, or a guess) hold until calls were measured. While all batches have about one
    size, the ratio of the two parts stays and only their scale follows the measurements.
    """

    seconds_per_call: float = 500e-6
    seconds_per_row: float = 10e-6
    rows_seen_max: int = 0
    calls: int = 0
    _weight: float = 0.0
    _rows: float = 0.0
    _seconds: float = 0.0
    _rows_squared: float = 0.0
    _rows_seconds: float = 0.0

    @classmethod
    def told(cls, seconds_per_call: float, seconds_per_row: float) -> CostEstimate:
        """By a worker's own figures: only where learning starts; batches grow from small ones in any case."""
        default = cls()
        return cls(
            seconds_per_call if 0 < seconds_per_call < math.inf else default.seconds_per_call,
            seconds_per_row if 0 < seconds_per_row < math.inf else default.seconds_per_row,
        )

    def seconds(self, rows: int) -> float:
        return self.seconds_per_call + self.seconds_per_row * rows

    def observe(self, rows: int, cpu_seconds: float) -> None:
        """Learn from one call of `rows` >= 1 rows that took `cpu_seconds` >= 0."""
        self._weight = self._weight * DECAY + 1
        self._rows = self._rows * DECAY + rows
        self._seconds = self._seconds * DECAY + cpu_seconds
        self._rows_squared = self._rows_squared * DECAY + rows * rows
        self._rows_seconds = self._rows_seconds * DECAY + rows * cpu_seconds
        self.calls += 1
        self.rows_seen_max = max(self.rows_seen_max, rows)
        self._fit()

    def _fit(self) -> None:
        rows_mean, seconds_mean = self._rows / self._weight, self._seconds / self._weight
        variance = self._rows_squared / self._weight - rows_mean * rows_mean
        if variance <= (SPREAD_MIN * rows_mean) ** 2:
            scale = seconds_mean / max(self.seconds_per_call + self.seconds_per_row * rows_mean, SECONDS_MIN)
            self.seconds_per_call = max(self.seconds_per_call * scale, SECONDS_MIN)
            self.seconds_per_row = max(self.seconds_per_row * scale, SECONDS_MIN)
            return
        slope = (self._rows_seconds / self._weight - rows_mean * seconds_mean) / variance
        slope = min(max(slope, SECONDS_MIN), max(seconds_mean / rows_mean, SECONDS_MIN))
        self.seconds_per_row = slope
        self.seconds_per_call = max(seconds_mean - slope * rows_mean, SECONDS_MIN)

    def rows_within(self, quantum_seconds: float, call_seconds_max: float, rows_max: int) -> int:
        """The batch size, 1 to `rows_max`, that costs about one quantum.

        Where the fixed part alone eats most of the quantum, the rows may cost as much as the fixed part does: such
        a batch is up to two fixed parts long, but half of it is work. Never beyond `call_seconds_max` if one
        row fits.
        """
        seconds = min(
            max(quantum_seconds - self.seconds_per_call, self.seconds_per_call),
            call_seconds_max - self.seconds_per_call,
        )
        rows = math.floor(min(seconds / self.seconds_per_row, float(rows_max)))
        felt_out = max(ROWS_FIRST, self.rows_seen_max * GROWTH_MAX)
        return max(1, min(rows, felt_out, rows_max))
