"""(P) A quota of rows a second, as a bucket of tokens (Turner, "New Directions in Communications", 1986)."""

from __future__ import annotations

import math
from dataclasses import dataclass

BURST_SECONDS = 1.0
"""Rows of so much time may be had at once after a pause."""
TURN_SECONDS = 0.05
"""Once it is empty, rows of so much time are waited for, unless fewer are wanted: batches of one row cost too much."""
_ROUNDING = 1e-6


@dataclass(slots=True)
class RowBucket:
    """Full when made. In any time t it gives at most rows_s * (t + BURST_SECONDS) rows, or one if that is more, and
    what is taken beyond what it has: that is a debt, which has to be filled up first.

    Times are seconds of a clock that never goes back.
    """

    rows_s: float
    now: float
    tokens: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = self.burst

    @property
    def burst(self) -> float:
        return max(1.0, self.rows_s * BURST_SECONDS)

    def allowed(self, now: float) -> int:
        """Rows that may be taken now."""
        self._fill(now)
        return max(0, math.floor(self.tokens + _ROUNDING))

    def take(self, rows: int) -> None:
        """Of what `allowed` said just now, or more where rows can't be parted."""
        self.tokens -= rows

    def put_back(self, rows: int) -> None:
        """Of what was taken: they were not run."""
        self.tokens += rows

    def ready_at(self, rows: int, now: float) -> float:
        """When it is worth to ask again for `rows` rows; `now` if it is already."""
        self._fill(now)
        turn = max(1.0, min(float(rows), math.floor(self.rows_s * TURN_SECONDS)))
        missing = turn - self.tokens
        return now if missing <= _ROUNDING else now + missing / self.rows_s

    def change(self, rows_s: float, now: float) -> None:
        """Another quota from now on: what is in it stays, as far as there is room."""
        self._fill(now)
        self.rows_s = rows_s
        self.tokens = min(self.tokens, self.burst)

    def _fill(self, now: float) -> None:
        elapsed = max(0.0, now - self.now)
        self.tokens = min(self.tokens + elapsed * self.rows_s, self.burst)
        self.now = max(self.now, now)
