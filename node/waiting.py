"""(P) One model's line in the sequence log: its chunks in order, and which of their rows still wait.

A row that a newer one of its customer has superseded stays in its chunk until the chunk is answered, written again
without it, or removed. Only then is it counted as shed, in the frame that does so: until then a restart finds all
rows waiting, and decides the same anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from node.kernel.limits import CHUNK_OVERHEAD_BYTES, CHUNKS_IN_FLIGHT_PER_MODEL_MAX
from node.kernel.types import FeatureRows, ModelName, SequenceChunk, Triggers

COMPACT_ROWS_MIN = 1024
"""Superseded rows from which on chunks that are mostly such are written again."""
COMPACT_CHUNKS_MIN = 64
"""Chunks of nothing else from which on they are removed, should they be an eighth of all."""
COMPACT_CHUNKS_MAX = 8
"""Written again in one go: the next cycle goes on."""


@dataclass(slots=True, eq=False)
class Entry:
    """A chunk. `rows` are those that wait: `superseded` ones (their places) are left out."""

    number: int
    rows: int
    size_bytes: int
    time_ms: int
    appended_ms: int
    triggers: Triggers | None
    """None: in the store only."""
    waits: bool = True
    """Not in flight, and not dropped."""
    pending: int = 0
    """Frames that hold the chunk and are not applied yet; meanwhile the store's is not this one."""
    superseded: set[int] = field(default_factory=set)

    @staticmethod
    def of(chunk: SequenceChunk) -> Entry:
        triggers = chunk.triggers
        return Entry(
            chunk.number, len(triggers), size_bytes(triggers), int(triggers.times_ms.min()), chunk.appended_ms, triggers
        )

    @property
    def live(self) -> Triggers | None:
        """The triggers that wait; None when they are in the store only."""
        if self.triggers is None or not self.superseded:
            return self.triggers
        return picked(self.triggers, [at for at in range(len(self.triggers)) if at not in self.superseded])

    @property
    def mostly_superseded(self) -> bool:
        return self.waits and len(self.superseded) >= max(1, self.rows)


@dataclass(slots=True, eq=False)
class Line:
    """`newest` is where each customer's newest trigger is, while only that one is kept."""

    name: ModelName
    key: str
    entries: deque[Entry] = field(default_factory=deque)
    held: dict[int, Entry] = field(default_factory=dict)
    """Those whose triggers are in memory, by number."""
    next_number: int = 0
    rows: int = 0
    size_bytes: int = 0
    newest: dict[str, tuple[Entry, int]] | None = None
    rows_superseded: int = 0
    chunks_superseded: int = 0
    """Those of which no row waits."""

    @property
    def head(self) -> Iterator[Entry]:
        """The chunks that may be in flight."""
        return (self.entries[at] for at in range(min(len(self.entries), CHUNKS_IN_FLIGHT_PER_MODEL_MAX)))

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        if entry.triggers is not None:
            self.held[entry.number] = entry
        self.next_number = entry.number + 1
        self.rows += entry.rows
        self.size_bytes += entry.size_bytes

    def supersede(self, entry: Entry, triggers: Triggers) -> None:
        """`entry`, just added with these `triggers`, takes the place of its customers' older rows that wait."""
        if self.newest is None:
            self.newest = {}
        for at, customer in enumerate(triggers.customers):
            older = self.newest.get(customer)
            if older is not None and older[0].waits:
                self._mark(*older)
            self.newest[customer] = entry, at
        if len(self.newest) > 2 * self.rows + COMPACT_ROWS_MIN:
            self.newest = {customer: place for customer, place in self.newest.items() if place[0].waits}

    def _mark(self, entry: Entry, at: int) -> None:
        entry.superseded.add(at)
        entry.rows -= 1
        self.rows -= 1
        self.rows_superseded += 1
        self.chunks_superseded += not entry.rows

    def in_flight(self, entry: Entry, live: Triggers) -> None:
        """What is handed to a worker is answered, whatever comes after it."""
        entry.triggers = live
        self._leaves(entry)

    def _leaves(self, entry: Entry) -> None:
        if entry.waits:
            entry.waits = False
            self.rows_superseded -= len(entry.superseded)
            self.chunks_superseded -= not entry.rows

    def drop(self, entry: Entry) -> None:
        """Take out the accounts of an entry that was just taken off an end."""
        self._leaves(entry)
        self.held.pop(entry.number, None)
        entry.triggers = None
        self.rows -= entry.rows
        self.size_bytes -= entry.size_bytes
        if self.newest and not self.entries:
            self.newest = {}

    @property
    def to_compact(self) -> bool:
        """Whether superseded rows take more room than those that wait; each is then looked at a few times at most."""
        chunks = max(COMPACT_CHUNKS_MIN, len(self.entries) // 8)
        return self.rows_superseded >= max(COMPACT_ROWS_MIN, self.rows) or self.chunks_superseded >= chunks

    def rewritten(self, entry: Entry, live: Triggers) -> SequenceChunk:
        """The entry with nothing but `live`, its rows that wait: the chunk to store in place of the one before."""
        size = size_bytes(live)
        self.size_bytes += size - entry.size_bytes
        self.rows_superseded -= len(entry.superseded)
        entry.size_bytes, entry.triggers, entry.superseded = size, live, set()
        entry.pending += 1
        self.held[entry.number] = entry
        for at, customer in enumerate(live.customers if self.newest is not None else ()):
            if self.newest is not None and self.newest.get(customer, (None, 0))[0] is entry:
                self.newest[customer] = entry, at
        return SequenceChunk(entry.number, live, entry.appended_ms)

    def remove(self, numbers: set[int]) -> None:
        """Take chunks out wherever they are."""
        gone = [entry for entry in self.entries if entry.number in numbers]
        self.entries = deque(entry for entry in self.entries if entry.number not in numbers)
        for entry in gone:
            self.drop(entry)

    def stored(self, number: int) -> None:
        """One frame more that holds the chunk is applied."""
        entry = self.held.get(number)
        if entry is not None and entry.pending:
            entry.pending -= 1

    def forget_tail(self) -> None:
        """Leave to the store what is in it and not near the head."""
        if len(self.held) <= CHUNKS_IN_FLIGHT_PER_MODEL_MAX:
            return
        near = {entry.number for entry in self.head}
        for number, entry in list(self.held.items()):
            if entry.waits and not entry.pending and number not in near:
                entry.triggers = None
                del self.held[number]


def newest_only(triggers: Triggers) -> Triggers:
    """The last trigger of each customer, in order; the same object when that is all of them."""
    last = {customer: at for at, customer in enumerate(triggers.customers)}
    return triggers if len(last) == len(triggers) else picked(triggers, sorted(last.values()))


def picked(triggers: Triggers, places: list[int]) -> Triggers:
    """The triggers at `places`, in that order."""
    at = np.array(places, np.int64)
    rows, customers = triggers.rows, triggers.customers
    texts = {name: [column[place] for place in places] for name, column in rows.texts.items()}
    return replace(
        triggers,
        customers=tuple([customers[place] for place in places]),
        topics=triggers.topics[at],
        offsets=triggers.offsets[at],
        types=triggers.types[at],
        times_ms=triggers.times_ms[at],
        rows=FeatureRows(rows.names, rows.numbers[at], texts),
    )


def size_bytes(triggers: Triggers) -> int:
    """About what the chunk takes in the store, and what is kept of it in memory."""
    texts = sum(len(text) for column in triggers.rows.texts.values() for text in column if text is not None)
    keys = sum(map(len, triggers.customers))
    return CHUNK_OVERHEAD_BYTES + triggers.rows.numbers.nbytes + 4 * triggers.times_ms.nbytes + keys + texts
