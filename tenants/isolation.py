"""Finds the rows on which a batch fails: which pieces of it to try next. Pure.

Plain bisection, but for one thing: most models that raise do so for a missing number, and often many rows have one. So
the complete rows are tried by themselves first, then one row of each pattern of missing columns; a row that the model
refuses for what is missing speaks for the rows that miss the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from node.kernel.limits import ISOLATION_CALLS_MAX
from node.kernel.types import Bools, FeatureRows, Ints
from tenants.failure_rate import BatchVerdict, FailureRate

PATTERNS_MAX = 16
"""Patterns of missing columns that get a row tried by itself, of one batch."""
_SPEAKS_OF_MISSING = re.compile(r"\bNaN\b|\binfinity\b|\bmissing value|\bNoneType\b|\bNone\b", re.IGNORECASE)


@dataclass(slots=True)
class Isolation:
    """What is known of one failed batch, shared by all its pieces."""

    calls_left: int = ISOLATION_CALLS_MAX
    refused: dict[bytes, str] = field(default_factory=dict)
    """Pattern of missing columns -> what the model said to a single row that has it."""
    verdict: BatchVerdict = field(default_factory=BatchVerdict)

    def learn(self, rows: FeatureRows, reason: str) -> None:
        """The model raised `reason` on the single row of `rows`."""
        pattern = patterns(rows)[0]
        if any(pattern) and _SPEAKS_OF_MISSING.search(reason):
            self.refused[pattern.tobytes()] = reason

    def refusals(self, rows: FeatureRows) -> dict[int, str]:
        """The rows that need no call, each with its reason."""
        if not self.refused:
            return {}
        found = ((row, self.refused.get(pattern.tobytes())) for row, pattern in enumerate(patterns(rows)))
        return {row: reason for row, reason in found if reason is not None}


def patterns(rows: FeatureRows) -> NDArray[np.uint8]:
    """uint8[rows, bytes]: the columns of each row that are missing or infinite, one bit a column; 0 where complete."""
    columns = [~np.isfinite(column) for column in rows.numbers.T]
    for index, name in enumerate(rows.names):
        if name in rows.texts:
            columns[index] = np.array([text is None for text in rows.texts[name]], dtype=np.bool_)
    return np.packbits(np.column_stack(columns), axis=1)


def halves(count: int) -> list[Ints]:
    """Positions 0 to `count` - 1 in two parts; one part when there is one row."""
    middle = count // 2
    return [part for part in (np.arange(middle), np.arange(middle, count)) if len(part)]


def first_pieces(rows: FeatureRows) -> list[Ints]:
    """How to split a batch of at least two rows on which the model raised, as positions: at least two pieces."""
    found = patterns(rows)
    missing: Bools = np.asarray(found.any(axis=1))
    if not missing.any():
        return halves(len(rows))
    kinds, firsts, which = np.unique(found, axis=0, return_index=True, return_inverse=True)
    alone = np.array([first for kind, first in zip(kinds, firsts, strict=True) if kind.any()][:PATTERNS_MAX])
    rest = missing.copy()
    rest[alone] = False
    # Rows that miss the same lie together, so that halving soon parts one kind from another.
    sorted_rest = np.flatnonzero(rest)[np.argsort(which.reshape(-1)[rest], kind="stable")]
    pieces = [np.flatnonzero(~missing), *(np.array([row]) for row in alone), sorted_rest]
    pieces = [piece for piece in pieces if len(piece)]
    return pieces if len(pieces) > 1 else halves(len(rows))


def judge(rate: FailureRate, isolation: Isolation | None, rows: FeatureRows, errors: Collection[int]) -> int:
    """Count rows that were answered, those in `errors` with an error; how many of these miss nothing."""
    failed = 0
    if errors:
        complete = ~np.asarray(patterns(rows).any(axis=1))
        failed = int(complete[list(errors)].sum())
    counted = len(rows) - len(errors) + failed
    if isolation is None:
        rate.add(counted, failed)
    else:
        isolation.verdict.close(rate, len(rows), counted, failed)
    return failed
