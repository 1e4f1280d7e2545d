"""(P) What a commit adds to the rows topic: the rows it has answers for, of models that ask for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from node.backlog import Answer
from node.kernel.limits import RECORD_BYTES_MAX, ROW_LOG_COMMITS_MAX
from node.kernel.ports import FeaturePlan
from node.kernel.types import Ints, ModelOutputs
from node.sampling import sampled
from node.training.fed_rows import Described, FedRows, encode_described, encode_rows
from node.waiting import taken

Record = tuple[bytes, bytes]
_PURPOSE: Final = "rows of "


class RowLog:
    """Of one partition's session. It says what a version's rows follow from before the first of them, whenever that
    may have changed, and now and then, as the topic forgets what is old."""

    def __init__(self) -> None:
        self._described: dict[str, int] = {}
        """Version -> the commit in which it was described last."""
        self._plan: FeaturePlan | None = None

    def records(self, answers: Sequence[Answer], plan: FeaturePlan, counters: Counter[str]) -> list[Record]:
        """In order. Rows that are kept, and those that no record can hold, are counted as `logged` and `unlogged`."""
        found: list[Record] = []
        for answer in answers:
            if answer.version.log_rows:
                found += self._records(answer, plan, counters)
        return found

    def _records(self, answer: Answer, plan: FeaturePlan, counters: Counter[str]) -> Iterator[Record]:
        name, commit = answer.version.name, counters["commits"]
        at = _chosen(answer)
        if at is not None and not len(at):
            return
        key = str(name).encode()
        yield from self._description(answer, plan, commit, key)
        rows = FedRows(commit, answer.triggers, answer.version, answer.outputs, answer.marks)
        if at is not None:
            rows = picked(rows, at)
        kept = 0
        for count, record in _pieces(rows):
            kept += count
            yield key, record
        counters[f"logged {name}"] += kept
        if kept < len(rows):
            counters[f"unlogged {name}"] += len(rows) - kept

    def _description(self, answer: Answer, plan: FeaturePlan, commit: int, key: bytes) -> Iterator[Record]:
        version = answer.triggers.version
        if plan is not self._plan:
            self._plan, self._described = plan, {}
        if commit - self._described.get(version, -ROW_LOG_COMMITS_MAX) < ROW_LOG_COMMITS_MAX:
            return
        self._described[version] = commit
        source = plan.source(version)
        if source is not None:
            yield key, encode_described(Described(answer.version.name, version, source))


def _chosen(answer: Answer) -> Ints | None:
    """The rows of the customers that are sampled; None: all."""
    share, name = answer.version.log_rows, answer.version.name
    if share >= 1.0:
        return None
    return np.flatnonzero(sampled(answer.triggers.customers, f"{_PURPOSE}{name}", share))


def picked(rows: FedRows, at: Ints) -> FedRows:
    """The rows at the positions `at`, in that order."""
    new = {old: place for place, old in enumerate(at.tolist())}
    errors = {new[row]: reason for row, reason in rows.outputs.errors.items() if row in new}
    return FedRows(
        rows.commit,
        taken(rows.triggers, at),
        rows.version,
        ModelOutputs(rows.outputs.values[at], errors),
        None if rows.marks is None else rows.marks[at],
    )


def _pieces(rows: FedRows) -> Iterator[tuple[int, bytes]]:
    """Records no larger than a broker takes, with the number of their rows; a row that alone is larger is left out."""
    most = max(1, RECORD_BYTES_MAX // (8 * (8 + len(rows.triggers.rows.names))))
    if len(rows) <= most:
        record = encode_rows(rows)
        if len(record) <= RECORD_BYTES_MAX:
            yield len(rows), record
            return
        if len(rows) == 1:
            return
    half = len(rows) // 2
    yield from _pieces(picked(rows, np.arange(half)))
    yield from _pieces(picked(rows, np.arange(half, len(rows))))
