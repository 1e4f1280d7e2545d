"""(P) Whether a version fails on so many rows that it is to blame, and not they.

A row that misses a column does not count: that a model refuses what is missing says nothing against it. Rows of one
batch count together, once each is cleared or to blame, as a search begins where the bad ones are.
"""

from __future__ import annotations

from dataclasses import dataclass

from node.kernel.limits import BESIDE_LOSSES_MAX, FAILED_ROWS_MIN, FATAL_ROWS_MAX, FATAL_ROWS_MS


@dataclass(slots=True)
class FailureRate:
    """Of the last rows: FAILED_ROWS_MIN to twice that, or the last batch if that was larger."""

    rows: float = 0.0
    failed: float = 0.0

    def add(self, rows: int, failed: int) -> None:
        while self.rows > FAILED_ROWS_MIN:
            self.rows, self.failed = self.rows / 2, self.failed / 2
        self.rows += rows
        self.failed += failed

    @property
    def most(self) -> bool:
        return self.rows >= FAILED_ROWS_MIN and 2 * self.failed > self.rows


@dataclass(slots=True)
class BatchVerdict:
    """Of a batch that is taken apart: `rows_open` have neither an output nor the blame yet."""

    rows_open: int = 0
    rows: int = 0
    failed: int = 0

    def close(self, rate: FailureRate, rows: int, counted: int, failed: int) -> None:
        """`rows` more are settled, of which `counted` say something and `failed` are to the version's blame."""
        self.rows_open -= rows
        self.rows += counted
        self.failed += failed
        if self.rows_open <= 0:
            rate.add(self.rows, self.failed)


def fatal_max(beside: bool) -> int:
    """How many rows, or of a version beside the live one how many batches, may take workers along in FATAL_ROWS_MS."""
    return BESIDE_LOSSES_MAX if beside else FATAL_ROWS_MAX


def fatal_reason(beside: bool, last: str) -> str:
    minutes = f"within {FATAL_ROWS_MS / 60_000:g} minutes; the last time: {last}"
    if beside:
        return f"beside the live version it took their common worker along {fatal_max(beside)} times {minutes}"
    return f"{fatal_max(beside)} rows each took their worker along twice {minutes}"
