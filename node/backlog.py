"""One partition's unanswered triggers: the in-memory end of the sequence log.

Each model has its own line of chunks and its own cursor, so a slow or dead model delays nobody but itself; a canary has
a line of its own beside the live version's. Chunks are answered and committed in order; the triggers of chunks far from
the head stay on disk only.

A tenant's lines share what it may have waiting: over it, the longest of them gives up triggers by its model's policy,
each counted as shed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from node.answer_times import AnswerTimes
from node.kernel.chunks import with_names
from node.kernel.clock import Clock
from node.kernel.errors import BoundExceeded
from node.kernel.limits import CHUNKS_IN_FLIGHT_PER_MODEL_MAX, CYCLE_SLOTS_MAX, SETTLED_ROWS_MAX
from node.kernel.ports import ModelRunner, StateStore
from node.kernel.types import EventNames, Floats, ModelName, ModelOutputs, ModelVersion, SequenceChunk, Triggers
from node.waiting import Answering, Bound, Entry, Line, row_bytes

Versions = Callable[[ModelName, str], ModelVersion | None]
"""The version of a model by its sha256, None once it was deleted."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Triggers whose model has answered, ready to be committed."""

    version: ModelVersion
    triggers: Triggers
    outputs: ModelOutputs
    marks: Floats | None = None
    """Of an interval run, float64 [triggers]: how many events each customer had."""


@dataclass(slots=True)
class Settled:
    """What left the backlog and must be in the next frame."""

    answers: list[Answer] = field(default_factory=list)
    appended: list[SequenceChunk] = field(default_factory=list)
    """Of lines that were written anew."""
    cursors: dict[str, int] = field(default_factory=dict)
    shed: Counter[str] = field(default_factory=Counter)
    """Reason and model -> rows."""


class Backlog:
    def __init__(
        self,
        runner: ModelRunner,
        store: StateStore,
        versions: Versions,
        bound: Callable[[ModelName], Bound],
        names: EventNames,
        clock: Clock,
    ) -> None:
        """`names` are the config's: those of waiting triggers from before chunks had names."""
        self._runner = runner
        self._store = store
        self._versions = versions
        self._bound = bound
        self._names = names
        self._clock = clock
        self._lines: dict[str, Line] = {}
        """By `Triggers.line_name`."""
        self._tenants: dict[str, list[Line]] = {}
        self.times = AnswerTimes()
        self.changed = asyncio.Event()
        """Set when a chunk was answered; the cycle clears it."""

    def restore(self, chunks: Iterable[SequenceChunk]) -> None:
        """Take over the unanswered chunks that the store holds, in order within each model.

        Numbers of answered chunks are gone from the store, so they may be given again. Raises TopicMissing.
        """
        for stored in chunks:
            chunk = replace(stored, triggers=with_names(stored.triggers, self._names))
            line = self._line(chunk.triggers)
            held = len(line.entries) < CHUNKS_IN_FLIGHT_PER_MODEL_MAX
            entry = Entry.of(chunk, self._clock.now_ms(), held)
            self._add(line, entry, chunk.triggers)
            line.next_number = chunk.number + 1
        for lines in self._tenants.values():  # before any of it is handed out and can't be given up any more
            self._trim(lines)

    def _line(self, triggers: Triggers) -> Line:
        line = self._lines.get(triggers.line_name)
        if line is None:
            line = self._lines[triggers.line_name] = Line(triggers.line_name, triggers.name)
            self._tenants.setdefault(triggers.name.tenant, []).append(line)
        return line

    def _add(self, line: Line, entry: Entry, triggers: Triggers) -> None:
        latest = entry.answering is None and self._bound(triggers.name).policy == "latest_per_customer"
        line.add(entry, triggers.customers if latest else None)

    @property
    def empty(self) -> bool:
        return not any(line.entries for line in self._lines.values())

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

    def submit(self, version: ModelVersion, triggers: Triggers) -> Answering:
        """Hand them to the runner. Raises BoundExceeded."""
        call = asyncio.ensure_future(self._runner.submit(version, triggers.rows))
        call.add_done_callback(partial(self._answered, triggers.line_name, self._clock.monotonic()))
        return call

    def _answered(self, line: str, since: float, call: Answering) -> None:
        if not call.cancelled():
            self.times.observe(line, self._clock.monotonic() - since)

    def rows_max(self, triggers: Triggers) -> int:
        """How many of these, at least one, may wait together; by a rough size, as it is asked of all triggers."""
        bound = self._bound(triggers.name)
        return max(1, min(bound.rows_max, bound.bytes_max // (2 * 8 * (1 + len(triggers.rows.names)))))

    @property
    def rows(self) -> int:
        return sum(line.rows for line in self._lines.values())

    def append(
        self, version: ModelVersion, triggers: Triggers, answering: Answering | None, settled: Settled
    ) -> SequenceChunk | None:
        """Queue triggers as a new chunk, which the caller puts into the frame; None if they were shed.

        `answering` are the outputs of `version`, should they have been asked for already.
        """
        line = self._line(triggers)
        if not self._make_room(line, triggers, answering is None, settled):
            settled.shed[f"overload {triggers.name}"] += len(triggers)
            if answering is not None:
                answering.cancel()
            return None
        chunk = SequenceChunk(line.next_number, triggers, self._clock.now_ms())
        line.next_number += 1
        entry = Entry.of(chunk, chunk.queued_ms)
        if answering is not None:
            entry.answering, entry.runs_on = answering, version
            self._watch(answering)
        self._add(line, entry, triggers)
        self._drop_given_up(line, settled)
        return chunk

    def _make_room(self, line: Line, triggers: Triggers, waits: bool, settled: Settled) -> bool:
        """Shed until the triggers fit in what their tenant may have waiting; False when it is they that go."""
        bound, lines = self._bound(triggers.name), self._tenants[triggers.name.tenant]
        latest, each = waits and bound.policy == "latest_per_customer", row_bytes(triggers)
        while True:
            rows = line.added(triggers.customers) if latest else len(triggers)
            if bound.filled(rows + sum(one.rows for one in lines), rows * each + sum(one.bytes for one in lines)) <= 1:
                return True
            longest = max(lines, key=lambda one: bound.filled(one.rows, one.bytes) if one is not line else 0.0)
            if bound.filled(longest.rows, longest.bytes) <= bound.filled(line.rows + rows, line.bytes + rows * each):
                longest = line
            refused = longest is line and bound.policy == "shed_newest"
            oldest = None if refused else longest.oldest()
            if oldest is None:
                return False
            longest.give_up(oldest, "overload")
            self._drop_given_up(longest, settled)

    def _trim(self, lines: Sequence[Line]) -> None:
        """Give up what is over the bound: it was lowered, or a restart has forgotten what was given up before."""
        bound = self._bound(lines[0].model)
        while bound.filled(sum(line.rows for line in lines), sum(line.bytes for line in lines)) > 1:
            longest = max(lines, key=lambda line: bound.filled(line.rows, line.bytes))
            oldest = longest.oldest()
            if oldest is None:
                return
            longest.give_up(oldest, "overload")

    def _drop_given_up(self, line: Line, settled: Settled) -> None:
        """Take off the head what nothing of waits any more."""
        while line.entries and not line.entries[0].live:
            self._drop_head(line, settled)

    @staticmethod
    def _drop_head(line: Line, settled: Settled) -> None:
        entry = line.pop()
        for reason, rows in entry.shed():
            settled.shed[f"{reason} {line.model}"] += rows
        settled.cursors[line.name] = entry.number + 1

    def settle(self, row_slots: int = 1) -> Settled:
        """Take the answered chunks off the head of every line, and those whose model is gone or that are too old.

        As many as one frame may well hold, where a customer's row has `row_slots`: the rest is settled by the next
        cycle, that of lines which had their turn last.
        """
        self.changed.clear()
        self._forget_ended()
        settled = Settled()
        rows, rows_max = 0, max(1, min(SETTLED_ROWS_MAX, CYCLE_SLOTS_MAX // row_slots))
        served: dict[str, None] = {}
        for lines in self._tenants.values():
            self._trim(lines)
        for line in self._lines.values():
            self._expire(line, settled)
            self._drop_given_up(line, settled)
            while line.entries and rows < rows_max and self._settle_head(line.entries[0], settled):
                served[line.name] = None
                rows += line.entries[0].rows
                self._drop_head(line, settled)
                self._drop_given_up(line, settled)
            if line.sweep_due:
                self._sweep(line, settled)
        for name in served:
            self._lines[name] = self._lines.pop(name)
        return settled

    def _forget_ended(self) -> None:
        """Lines that nothing waits in, as each canary and each name of a model has one of its own. One that has just
        been emptied stays for the frame with its cursor: a chunk of that frame must have a number behind it."""
        for line in [line for line in self._lines.values() if not line.entries]:
            del self._lines[line.name]
            lines = self._tenants[line.model.tenant]
            lines.remove(line)
            if not lines:
                del self._tenants[line.model.tenant]

    def _expire(self, line: Line, settled: Settled) -> None:
        if not line.entries:
            return
        age_ms_max = self._bound(line.model).age_ms_max
        if age_ms_max:
            line.expire(self._clock.now_ms() - age_ms_max)

    def _settle_head(self, entry: Entry, settled: Settled) -> bool:
        if entry.triggers is None:
            return False
        version = self._versions(entry.triggers.name, entry.triggers.version)
        if version is None:
            settled.shed[f"deleted {entry.triggers.name}"] += entry.live
            return True
        if entry.answering is None or not entry.answering.done():
            return False
        settled.answers.append(Answer(entry.runs_on or version, entry.triggers, entry.answering.result()))
        return True

    def _sweep(self, line: Line, settled: Settled) -> None:
        """Take out of the line what was given up behind its head."""
        shed: Counter[str] = Counter()
        settled.appended += line.swept(lambda entry: self._triggers(line.name, entry), shed)
        settled.cursors[line.name] = line.entries[0].number if line.entries else line.next_number
        for reason, rows in shed.items():
            settled.shed[f"{reason} {line.model}"] += rows

    def stored(self, chunks: Iterable[SequenceChunk]) -> None:
        """The store holds these chunks now: their triggers need not stay in memory."""
        for chunk in chunks:
            line = self._line(chunk.triggers)
            entry = line.find(chunk.number)
            if entry is None or entry.triggers is not chunk.triggers:  # a sweep has given its number away
                continue
            near = entry.number - line.entries[0].number < CHUNKS_IN_FLIGHT_PER_MODEL_MAX
            if entry.answering is None and not near:
                entry.triggers = None

    def pump(self) -> None:
        """Submit the first chunks that nobody works on."""
        for line in self._lines.values():
            while len(line.working) < CHUNKS_IN_FLIGHT_PER_MODEL_MAX:
                entry = line.first_idle()
                if entry is None or not self._submit(line, entry):
                    break

    def _triggers(self, name: str, entry: Entry) -> Triggers:
        if entry.triggers is None:
            entry.triggers = with_names(self._store.chunk(name, entry.number).triggers, self._names)
        return entry.triggers

    def _submit(self, line: Line, entry: Entry) -> bool:
        triggers = self._triggers(line.name, entry)
        version = self._versions(triggers.name, triggers.version)
        if version is None:
            self.changed.set()
            return False
        triggers = entry.live_triggers(triggers)
        try:
            answer = self.submit(version, triggers)
        except BoundExceeded:
            return False
        entry.triggers = triggers
        line.hand_out(version, answer)
        self._watch(answer)
        return True

    def _watch(self, answering: Answering) -> None:
        answering.add_done_callback(lambda _: self.changed.set())

    def close(self) -> None:
        for line in self._lines.values():
            while line.entries:
                line.pop()

    def statistics(self, now_ms: int) -> dict[str, dict[str, int]]:
        """Line -> what waits in it, and the age of the oldest, by event time and since it was queued."""
        return {
            name: {
                "rows": line.rows,
                "bytes": line.bytes,
                "chunks": len(line.entries),
                "given_up": line.given_up,
                "oldest_ms": now_ms - line.entries[0].time_ms,
                "waiting_ms": max(0, now_ms - line.entries[0].queued_ms),
            }
            for name, line in self._lines.items()
            if line.entries
        }


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
        fresh=None if triggers.fresh is None else triggers.fresh[selection],
    )


async def finish_within(calls: Sequence[Answering], wait_seconds: float) -> None:
    """Wait for all of them at most so long; those not done go on."""
    if calls:
        await asyncio.wait(calls, timeout=wait_seconds)
