"""Kafka as the simulator sees it: per partition a source, a changelog and one transactional id."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

Row = tuple[float, float, float]
"""Events seen, a sum over them, and a chain over their numbers that shows any one lost, doubled or swapped."""

CUSTOMERS = 5


def customer_of(event: int) -> bytes:
    return b"c%d" % (event * 7 % 11 % CUSTOMERS)


def row_after(row: Row, event: int) -> Row:
    return row[0] + 1, row[1] + event, (row[2] * 31 + event + 1) % 1_000_003


@dataclass(frozen=True, slots=True)
class Transaction:
    """What one commit holds. `session` and `epoch` (the catalog's) are who commits, for the checkers only."""

    records: tuple[bytes, ...]
    inferences: tuple[int, ...]
    first_event: int
    next_event: int
    session: int
    epoch: int
    table: tuple[str, int]
    """The version of the table that its inferences are of, and the revision at which that went live."""


@dataclass(slots=True)
class PartitionLog:
    """One partition. Offsets are those of Kafka: each record takes one, each end of a transaction one more."""

    source_end: int = 0
    producer_epoch: int = 0
    producer_session: int = 0
    started: list[int] = field(default_factory=list)
    """The fencing log: sessions in the order in which their producers started."""
    open: Transaction | None = None
    open_at: int = 0
    end: int = 0
    start: int = 0
    offsets: list[int] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)
    frame_ends: list[int] = field(default_factory=list)
    inferences: Counter[int] = field(default_factory=Counter)
    commits: list[tuple[int, Transaction]] = field(default_factory=list)
    """(offset after the frame's last record, the transaction)."""

    def init_producer(self, session: int) -> int:
        """Fences the producer before and aborts what it left open; the new producer epoch."""
        if self.open is not None:
            self._end()
        self.producer_epoch += 1
        self.producer_session = session
        self.started.append(session)
        return self.producer_epoch

    def send(self, producer_epoch: int, transaction: Transaction) -> bool:
        """False: fenced. The records take their offsets now and are seen by readers once committed."""
        if producer_epoch != self.producer_epoch or self.open is not None:
            return False
        self.open, self.open_at = transaction, self.end
        self.end += len(transaction.records)
        return True

    def commit(self, producer_epoch: int) -> int | None:
        """The offset after the frame's last record; None: fenced, or nothing is open."""
        if producer_epoch != self.producer_epoch or self.open is None:
            return None
        done, first = self.open, self.open_at
        self.offsets += range(first, first + len(done.records))
        self.records += done.records
        after = first + len(done.records)
        self.frame_ends.append(after)
        self.inferences.update(done.inferences)
        self.commits.append((after, done))
        self._end()
        return after

    def _end(self) -> None:
        self.open = None
        self.end += 1

    def read(self, position: int, frames_max: int) -> list[tuple[int, bytes]]:
        """Committed (offset, record) from `position` on, up to the end of `frames_max` frames."""
        first = bisect.bisect_left(self.offsets, position)
        frame = bisect.bisect_right(self.frame_ends, position) + frames_max - 1
        if frame < len(self.frame_ends):
            last = bisect.bisect_left(self.offsets, self.frame_ends[frame])
        else:
            last = len(self.offsets)
        return list(zip(self.offsets[first:last], self.records[first:last], strict=True))

    def frames_after(self, position: int) -> int:
        return len(self.frame_ends) - bisect.bisect_right(self.frame_ends, position)

    def cut(self, before: int) -> None:
        self.start = max(self.start, before)


def plain_fold(rows: Mapping[bytes, Row], first: int, end: int) -> dict[bytes, Row]:
    """Event after event, nothing shared with what nodes do."""
    after = dict(rows)
    for event in range(first, end):
        customer = customer_of(event)
        after[customer] = row_after(after.get(customer, (0.0, 0.0, 0.0)), event)
    return after
