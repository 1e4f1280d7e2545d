"""One partition's unanswered triggers: the in-memory end of the sequence log.

Each model has its own line of chunks and its own cursor, so a slow or dead model delays nobody but itself.
Chunks are answered and committed in order; the triggers of chunks far from the head stay on disk only.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from node.kernel.errors import BoundExceeded
from node.kernel.limits import CHUNKS_IN_FLIGHT_PER_MODEL_MAX, SETTLED_ROWS_MAX
from node.kernel.ports import ModelRunner, StateStore
from node.kernel.types import ModelName, ModelOutputs, ModelVersion, OverloadPolicy, SequenceChunk, Triggers

Versions = Callable[[ModelName, str], ModelVersion | None]
"""The version of a model by its sha256, None once it was deleted."""
Answering = asyncio.Future[ModelOutputs]


@dataclass(frozen=True, slots=True)
class Answer:
    """Triggers whose model has answered, ready to be committed."""

    version: ModelVersion
    triggers: Triggers
    outputs: ModelOutputs


@dataclass(frozen=True, slots=True)
class Bound:
    """How much one model may fall behind in one partition, and what goes when it is more."""

    rows_max: int
    policy: OverloadPolicy = "shed_oldest"


@dataclass(slots=True)
class _Entry:
    number: int
    rows: int
    time_ms: int
    triggers: Triggers | None
    """None: in the store only."""
    answering: Answering | None = None
    runs_on: ModelVersion | None = None
    """What answers: another version than the triggers name, where that one was fallen back from."""
    stored: bool = False


@dataclass(slots=True)
class _Line:
    entries: deque[_Entry] = field(default_factory=deque)
    next_number: int = 0
    rows: int = 0


@dataclass(slots=True)
class Settled:
    """What left the backlog and must be in the next frame."""

    answers: list[Answer] = field(default_factory=list)
    cursors: dict[str, int] = field(default_factory=dict)
    shed: Counter[str] = field(default_factory=Counter)
    """Reason and model -> rows."""


class Backlog:
    def __init__(
        self, runner: ModelRunner, store: StateStore, versions: Versions, bound: Callable[[ModelName], Bound]
    ) -> None:
        self._runner = runner
        self._store = store
        self._versions = versions
        self._bound = bound
        self._lines: dict[str, _Line] = {}
        """By the text of the model's name."""
        self.changed = asyncio.Event()
        """Set when a chunk was answered; the cycle clears it."""

    def restore(self, chunks: Iterable[SequenceChunk]) -> None:
        """Take over the unanswered chunks that the store holds, in order within each model.

        Numbers of answered chunks are gone from the store, so they may be given again.
        """
        for chunk in chunks:
            line = self._line(str(chunk.triggers.name))
            held = len(line.entries) < CHUNKS_IN_FLIGHT_PER_MODEL_MAX
            line.entries.append(entry := _entry(chunk, chunk.triggers if held else None))
            entry.stored = True
            line.rows += len(chunk.triggers)
            line.next_number = chunk.number + 1

    def _line(self, name: str) -> _Line:
        return self._lines.setdefault(name, _Line())

    def behind(self, name: str) -> bool:
        """Whether new triggers of the line have to queue behind older ones."""
        line = self._lines.get(name)
        return line is not None and bool(line.entries)

    def may_submit(self, name: str) -> bool:
        """Whether new triggers may go to the runner at once: nothing older waits, and few chunks are out already."""
        line = self._lines.get(name)
        if line is None or not line.entries:
            return True
        return len(line.entries) < CHUNKS_IN_FLIGHT_PER_MODEL_MAX and line.entries[-1].answering is not None

    def rows_max(self, name: ModelName) -> int:
        return self._bound(name).rows_max

    @property
    def rows(self) -> int:
        return sum(line.rows for line in self._lines.values())

    def append(
        self, version: ModelVersion, triggers: Triggers, answering: Answering | None, settled: Settled
    ) -> SequenceChunk | None:
        """Queue triggers as a new chunk, which the caller puts into the frame; None if they were shed.

        `answering` are the outputs of `version`, should they have been asked for already.
        """
        line, bound = self._line(str(triggers.name)), self._bound(triggers.name)
        if line.rows + len(triggers) > bound.rows_max:
            if bound.policy == "shed_newest" or len(triggers) > bound.rows_max:
                settled.shed[f"overload {triggers.name}"] += len(triggers)
                if answering is not None:
                    answering.cancel()
                return None
            self._shed_oldest(triggers, bound.rows_max - len(triggers), settled)
        chunk = SequenceChunk(line.next_number, triggers)
        line.next_number += 1
        line.entries.append(entry := _entry(chunk, triggers))
        line.rows += entry.rows
        if answering is not None:
            self._watch(entry, version, answering)
        return chunk

    def _shed_oldest(self, newer: Triggers, rows_max: int, settled: Settled) -> None:
        line = self._lines[str(newer.name)]
        while line.entries and line.rows > rows_max:
            entry = self._drop_head(line)
            settled.shed[f"overload {newer.name}"] += entry.rows
        settled.cursors[str(newer.name)] = line.entries[0].number if line.entries else line.next_number

    def _drop_head(self, line: _Line) -> _Entry:
        entry = line.entries.popleft()
        line.rows -= entry.rows
        if entry.answering is not None and not entry.answering.done():
            entry.answering.cancel()
        return entry

    def settle(self) -> Settled:
        """Take the answered chunks off the head of every line, and those whose model is gone.

        As many as one frame may well hold: the rest is settled by the next cycle.
        """
        self.changed.clear()
        settled = Settled()
        rows = 0
        for name, line in self._lines.items():
            while line.entries and rows < SETTLED_ROWS_MAX and self._settle_head(line.entries[0], settled):
                rows += line.entries[0].rows
                settled.cursors[name] = self._drop_head(line).number + 1
        return settled

    def _settle_head(self, entry: _Entry, settled: Settled) -> bool:
        if entry.triggers is None:
            return False
        version = self._versions(entry.triggers.name, entry.triggers.version)
        if version is None:
            settled.shed[f"deleted {entry.triggers.name}"] += entry.rows
            return True
        if entry.answering is None or not entry.answering.done():
            return False
        settled.answers.append(Answer(entry.runs_on or version, entry.triggers, entry.answering.result()))
        return True

    def stored(self, chunks: Iterable[SequenceChunk]) -> None:
        """The store holds these chunks now: their triggers need not stay in memory."""
        for chunk in chunks:
            line = self._line(str(chunk.triggers.name))
            for entry in reversed(line.entries):
                if entry.number == chunk.number:
                    entry.stored = True
                if entry.number <= chunk.number:
                    break

    def pump(self) -> None:
        """Submit chunks near the head that nobody works on."""
        for name, line in self._lines.items():
            head = [line.entries[at] for at in range(min(len(line.entries), CHUNKS_IN_FLIGHT_PER_MODEL_MAX))]
            for entry in head:
                if entry.answering is None and not self._submit(name, entry):
                    break
            self._forget_tail(line)

    def _submit(self, name: str, entry: _Entry) -> bool:
        if entry.triggers is None:
            chunks = self._store.chunks(1, name, entry.number)
            entry.triggers = chunks[0].triggers
        version = self._versions(entry.triggers.name, entry.triggers.version)
        if version is None:
            self.changed.set()
            return False
        try:
            answer = self._runner.submit(version, entry.triggers.rows)
        except BoundExceeded:
            return False
        self._watch(entry, version, asyncio.ensure_future(answer))
        return True

    def _watch(self, entry: _Entry, version: ModelVersion, answering: Answering) -> None:
        entry.answering, entry.runs_on = answering, version
        answering.add_done_callback(lambda _: self.changed.set())

    def _forget_tail(self, line: _Line) -> None:
        for at in range(CHUNKS_IN_FLIGHT_PER_MODEL_MAX, len(line.entries)):
            entry = line.entries[-at + CHUNKS_IN_FLIGHT_PER_MODEL_MAX - 1]
            if entry.triggers is None:
                return
            if entry.answering is None and entry.stored:
                entry.triggers = None

    def close(self) -> None:
        for line in self._lines.values():
            while line.entries:
                self._drop_head(line)

    def statistics(self, now_ms: int) -> dict[str, dict[str, int]]:
        """Line -> rows and chunks behind, and the age of the oldest by event time."""
        return {
            name: {"rows": line.rows, "chunks": len(line.entries), "oldest_ms": now_ms - line.entries[0].time_ms}
            for name, line in self._lines.items()
            if line.entries
        }


def _entry(chunk: SequenceChunk, triggers: Triggers | None) -> _Entry:
    return _Entry(chunk.number, len(chunk.triggers), int(chunk.triggers.times_ms[0]), triggers)


def split(triggers: Triggers, rows_max: int) -> list[Triggers]:
    """The triggers in pieces of at most `rows_max`, in order."""
    return [take(triggers, slice(start, start + rows_max)) for start in range(0, len(triggers), rows_max)]


def take(triggers: Triggers, selection: slice) -> Triggers:
    return replace(
        triggers,
        customers=triggers.customers[selection],
        topics=triggers.topics[selection],
        offsets=triggers.offsets[selection],
        types=triggers.types[selection],
        times_ms=triggers.times_ms[selection],
        rows=triggers.rows.take(selection),
    )


async def finish_within(calls: Sequence[Answering], wait_seconds: float) -> None:
    """Wait for all of them at most so long; those not done go on."""
    if calls:
        await asyncio.wait(calls, timeout=wait_seconds)
