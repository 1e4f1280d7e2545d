"""A line of the sequence log as it is kept in memory: what waits in it, what was given up, and how much that is.

Rows that were given up stay in their chunk until it is at the head of its line, or until the line is swept: a frame
can only move a line's head and put chunks. They are counted as shed in the frame that takes them out, so that each
trigger is answered or counted once, whatever is killed; which rows a restarted node gives up follows from the chunks.

A line of a rarely triggered model is of many chunks of one row each, and behind a call that never ends there may be as
many that were given up: nothing here may walk over the line for each chunk or cycle.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeAlias

import numpy as np

from node.kernel.limits import WAITING_PASSED_CHUNKS_MAX, WAITING_SWEPT_CHUNKS, WAITING_SWEPT_ROWS_MIN
from node.kernel.types import Ints, ModelName, ModelOutputs, ModelVersion, OverloadPolicy, SequenceChunk, Triggers

Answering: TypeAlias = asyncio.Future[ModelOutputs]

_ROW_BYTES_MIN = 48
"""Of one trigger beside its customer and features: four integers and what the encoding adds."""


@dataclass(frozen=True, slots=True)
class Bound:
    """How much one tenant may have waiting in one partition, over all its lines, and what goes when it is more.

    `policy` is of the model that was asked for. `age_ms_max`: triggers that have waited for longer are shed; 0: none.
    """

    rows_max: int
    policy: OverloadPolicy = "shed_oldest"
    bytes_max: int = 1 << 62
    age_ms_max: int = 0

    def filled(self, rows: int, size: int) -> float:
        """How full so many rows and bytes make it: over 1, too much."""
        return max(rows / self.rows_max, size / self.bytes_max)


@dataclass(slots=True, eq=False)
class Entry:
    """One chunk. `rows` counts all of it; `triggers`, once it was handed out, are those that were not given up."""

    number: int
    rows: int
    row_bytes: int
    time_ms: int
    queued_ms: int
    triggers: Triggers | None
    """None: in the store only."""
    answering: Answering | None = None
    runs_on: ModelVersion | None = None
    """What answers: another version than the triggers name, where that one was fallen back from."""
    superseded: set[int] = field(default_factory=set)
    given_up: str = ""
    """Why all of it was given up."""
    customers: tuple[str, ...] | None = None
    """Where each customer's newest is looked for, until it is handed out."""

    @staticmethod
    def of(chunk: SequenceChunk, now_ms: int, held: bool = True) -> Entry:
        triggers = chunk.triggers
        return Entry(
            chunk.number,
            len(triggers),
            row_bytes(triggers),
            int(triggers.times_ms[0]),
            chunk.queued_ms or now_ms,
            triggers if held else None,
        )

    @property
    def live(self) -> int:
        """Rows that wait for their answer."""
        return 0 if self.given_up else self.rows - len(self.superseded)

    @property
    def answered(self) -> bool:
        return self.answering is not None and self.answering.done()

    def shed(self) -> Iterator[tuple[str, int]]:
        """Reason and rows of what was given up."""
        if self.superseded:
            yield "superseded", len(self.superseded)
        if self.given_up:
            yield self.given_up, self.rows - len(self.superseded)

    def live_triggers(self, triggers: Triggers) -> Triggers:
        """Of the whole chunk's triggers, those that were not superseded."""
        if not self.superseded:
            return triggers
        return taken(triggers, np.array([row for row in range(self.rows) if row not in self.superseded]))


@dataclass(slots=True, eq=False)
class Line:
    """The chunks of one model, or of its canary, in order."""

    name: str
    model: ModelName
    entries: deque[Entry] = field(default_factory=deque)
    idle: deque[Entry] = field(default_factory=deque)
    """Those that nobody works on yet, in order; some that were given up may be among them."""
    working: list[Entry] = field(default_factory=list)
    """Those that were handed out and not given up, in order: a few."""
    next_number: int = 0
    rows: int = 0
    """That wait, as do `bytes`."""
    bytes: int = 0
    given_up: int = 0
    """Rows that don't, but are still in their chunk."""
    newest: dict[str, tuple[Entry, int]] = field(default_factory=dict)
    """Where the policy is latest_per_customer: each customer's row among those not handed out."""

    def add(self, entry: Entry, customers: tuple[str, ...] | None) -> None:
        """At the end; with `customers`, older rows of theirs that were not handed out are superseded."""
        self.entries.append(entry)
        if entry.answering is None:
            self.idle.append(entry)
        else:
            self.working.append(entry)
        self.rows += entry.rows
        self.bytes += entry.rows * entry.row_bytes
        entry.customers = customers
        for row, customer in enumerate(customers or ()):
            older = self.newest.get(customer)
            if older is not None:
                self._supersede(*older)
            self.newest[customer] = entry, row

    def added(self, customers: tuple[str, ...]) -> int:
        """How many more rows wait once the newest rows of these are added."""
        return len(set(customers).difference(self.newest))

    def _supersede(self, entry: Entry, row: int) -> None:
        entry.superseded.add(row)
        self.rows -= 1
        self.bytes -= entry.row_bytes
        self.given_up += 1

    def give_up(self, entry: Entry, reason: str) -> None:
        """All of it that still waits; if it is being answered, that is called off."""
        live = entry.live
        self.rows -= live
        self.bytes -= live * entry.row_bytes
        self.given_up += live
        entry.given_up = reason
        if entry.answering is not None:
            self.working.remove(entry)
            entry.answering.cancel()
        self._settle(entry)

    def hand_out(self, version: ModelVersion, answering: Answering) -> None:
        """What `first_idle` gave is answered by `version` from here on."""
        entry = self.idle.popleft()
        entry.answering, entry.runs_on = answering, version
        self.working.append(entry)
        self._settle(entry)

    def _settle(self, entry: Entry) -> None:
        """Nothing of it is superseded from here on."""
        for row, customer in enumerate(entry.customers or ()):
            found = self.newest.get(customer)
            if found is not None and found[0] is entry and found[1] == row:
                del self.newest[customer]
        entry.customers = None

    def pop(self) -> Entry:
        """Take out the head, whatever of it waits."""
        entry = self.entries.popleft()
        live = entry.live
        self.rows -= live
        self.bytes -= live * entry.row_bytes
        self.given_up -= entry.rows - live
        self._settle(entry)
        if self.idle and self.idle[0] is entry:
            self.idle.popleft()
        elif live and entry.answering is not None:
            self.working.remove(entry)
        if entry.answering is not None and not entry.answering.done():
            entry.answering.cancel()
        return entry

    def first_idle(self) -> Entry | None:
        """The oldest of what waits that nobody works on."""
        while self.idle and not self.idle[0].live:
            self.idle.popleft()
        return self.idle[0] if self.idle else None

    def oldest(self) -> Entry | None:
        """What goes first when the oldest has to: nothing that is being worked on while something else is left, and
        never the head of what is, or a model that is slower than its events would never end a call."""
        idle = self.first_idle()
        if idle is not None:
            return idle
        return next((one for one in self.working if one is not self.entries[0] and not one.answered), None)

    def expire(self, since_ms: int) -> None:
        """Give up what was queued before then and is not answered."""
        for entry in [one for one in self.working if one.queued_ms < since_ms and not one.answered]:
            self.give_up(entry, "age")
        while (idle := self.first_idle()) is not None and idle.queued_ms < since_ms:
            self.give_up(idle, "age")

    def find(self, number: int) -> Entry | None:
        """The entry of that chunk, if it is here still; numbers have no gaps."""
        place = number - self.entries[0].number if self.entries else -1
        return self.entries[place] if 0 <= place < len(self.entries) else None

    @property
    def sweep_due(self) -> bool:
        """Whether so much was given up behind the head that it is to be taken out."""
        return self.given_up > self.rows + WAITING_SWEPT_ROWS_MIN or self.passed > WAITING_PASSED_CHUNKS_MAX

    @property
    def passed(self) -> int:
        """Chunks given up that lie between the head and the first that nobody works on."""
        idle = self.first_idle()
        end = self.next_number if idle is None else idle.number
        return end - self.entries[0].number - len(self.working) if self.entries else 0

    def swept(self, load: Callable[[Entry], Triggers], shed: Counter[str]) -> list[SequenceChunk]:
        """Put what waits near the head anew, without what was given up there; its chunks, and what was shed by reason.

        They get the numbers just before what follows, so that nothing of that is put again. What is being answered
        goes on being answered. Afterwards the line begins with the first of these chunks.
        """
        front = list(islice(self.entries, self._swept_count()))
        kept = [(entry, load(entry)) for entry in front if entry.live]
        for entry in front:
            shed.update(dict(entry.shed()))
            self.given_up -= entry.rows - entry.live
            self.entries.popleft()
        end = self.entries[0].number if self.entries else self.next_number
        while self.idle and self.idle[0].number < end:
            self.idle.popleft()
        renewed = [self._renewed(*one, number) for number, one in enumerate(kept, end - len(kept))]
        fresh = [entry for entry, _ in renewed]
        self.entries.extendleft(reversed(fresh))
        self.idle.extendleft(one for one in reversed(fresh) if one.answering is None)
        self.working = [*(one for one in fresh if one.answering), *(one for one in self.working if one.number >= end)]
        return [chunk for _, chunk in renewed]

    def _swept_count(self) -> int:
        """Of the first entries: those up to the first that nobody works on, or else as many as hold more rows that
        were given up than that wait, so that on the whole a row is put twice at most, and need few chunks."""
        if self.passed > WAITING_PASSED_CHUNKS_MAX:
            return self.passed + len(self.working)
        rows = given_up = chunks = found = 0
        for count, entry in enumerate(self.entries, 1):
            rows, given_up, chunks = rows + entry.live, given_up + entry.rows - entry.live, chunks + bool(entry.live)
            found = count if given_up > rows else found
            if found and chunks >= WAITING_SWEPT_CHUNKS:
                break
        return found

    def _renewed(self, entry: Entry, whole: Triggers, number: int) -> tuple[Entry, SequenceChunk]:
        """What waits of the entry as another one in its place, and its chunk."""
        triggers = whole if len(whole) == entry.live else entry.live_triggers(whole)
        chunk = SequenceChunk(number, triggers, entry.queued_ms)
        fresh = Entry.of(chunk, entry.queued_ms)
        fresh.answering, fresh.runs_on = entry.answering, entry.runs_on
        self.bytes += fresh.rows * (fresh.row_bytes - entry.row_bytes)
        if entry.customers is not None:
            fresh.customers = triggers.customers
            self.newest.update((customer, (fresh, row)) for row, customer in enumerate(triggers.customers))
        return fresh, chunk


def row_bytes(triggers: Triggers) -> int:
    """Bytes of one of the triggers, on average and as they are stored, before compression."""
    texts = sum(len(text or "") for column in triggers.rows.texts.values() for text in column)
    size = triggers.rows.numbers.nbytes + texts + sum(map(len, triggers.customers))
    return _ROW_BYTES_MIN + -(-size // max(1, len(triggers)))


def taken(triggers: Triggers, at: Ints) -> Triggers:
    """Those at the positions `at`, in that order."""
    rows, places = triggers.rows, at.tolist()
    return replace(
        triggers,
        customers=tuple([triggers.customers[place] for place in places]),
        topics=triggers.topics[at],
        offsets=triggers.offsets[at],
        types=triggers.types[at],
        times_ms=triggers.times_ms[at],
        fresh=None if triggers.fresh is None else triggers.fresh[at],
        rows=replace(
            rows,
            numbers=rows.numbers[at],
            texts={name: [column[place] for place in places] for name, column in rows.texts.items()},
        ),
    )
