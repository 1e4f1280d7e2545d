"""One partition's unanswered triggers: the in-memory end of the sequence log.

Each model has its own line of chunks and its own cursor, so a slow or dead model delays nobody but itself.
Chunks are answered and committed in order; the triggers of chunks far from the head stay on disk only.

A tenant's lines have bounds together. Over them the line that holds most gives way, by its model's policy, so that a
model that is late once in a while does not pay for another that is always late.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from node.kernel.clock import Clock
from node.kernel.errors import BoundExceeded
from node.kernel.limits import CHUNKS_IN_FLIGHT_PER_MODEL_MAX, SETTLED_ROWS_MAX
from node.kernel.ports import ModelRunner, StateStore
from node.kernel.types import ModelName, ModelOutputs, ModelVersion, OverloadPolicy, SequenceChunk, Triggers
from node.waiting import COMPACT_CHUNKS_MAX, Entry, Line, newest_only, size_bytes

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
    """How much a model's tenant may have waiting in one partition, and what goes of the model when it is more.

    `age_ms_max` counts from when a trigger came into the log; `policy` is the model's.
    """

    rows_max: int
    policy: OverloadPolicy = "shed_oldest"
    bytes_max: int = 1 << 40
    age_ms_max: int = 1 << 50


@dataclass(slots=True)
class _Call:
    answering: Answering
    runs_on: ModelVersion
    """What answers: another version than the triggers name, where that one was fallen back from."""


@dataclass(slots=True)
class Settled:
    """What left the backlog, or changed there, and must be in the next frame."""

    answers: list[Answer] = field(default_factory=list)
    cursors: dict[str, int] = field(default_factory=dict)
    shed: Counter[str] = field(default_factory=Counter)
    """Reason and model -> rows. Reasons: overload (too many rows), bytes, age, superseded, deleted."""
    appended: list[SequenceChunk] = field(default_factory=list)
    """Chunks that are stored again, without what was superseded."""
    removed: dict[str, list[int]] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return bool(self.cursors or self.appended or self.removed)


class Backlog:
    """`bound` is asked whenever it matters: settings change while triggers wait."""

    def __init__(
        self,
        runner: ModelRunner,
        store: StateStore,
        versions: Versions,
        bound: Callable[[ModelName], Bound],
        clock: Clock,
    ) -> None:
        self._runner = runner
        self._store = store
        self._versions = versions
        self._bound = bound
        self._clock = clock
        self._lines: dict[str, Line] = {}
        """By the text of the model's name."""
        self._tenants: dict[str, list[Line]] = {}
        self._calls: dict[tuple[str, int], _Call] = {}
        """By line and number of the chunk."""
        self.changed = asyncio.Event()
        """Set when a chunk was answered; the cycle clears it."""

    def restore(self, chunks: Iterable[SequenceChunk]) -> None:
        """Take over the unanswered chunks that the store holds, in order within each line.

        Numbers of answered chunks are gone from the store, so they may be given again.
        """
        now_ms = self._clock.now_ms()
        for chunk in chunks:
            line = self._line(chunk.triggers)
            entry = Entry.of(chunk)
            entry.appended_ms = entry.appended_ms or now_ms
            if len(line.entries) >= CHUNKS_IN_FLIGHT_PER_MODEL_MAX:
                entry.triggers = None
            line.add(entry)
            if self._bound(line.name).policy == "latest_per_customer":
                line.supersede(entry, chunk.triggers)

    def _line(self, triggers: Triggers) -> Line:
        key = str(triggers.name)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line(triggers.name, key)
            self._tenants.setdefault(triggers.name.tenant, []).append(line)
        return line

    def behind(self, name: str) -> bool:
        """Whether new triggers of the line have to queue behind older ones."""
        line = self._lines.get(name)
        return line is not None and bool(line.entries)

    def may_submit(self, name: str) -> bool:
        """Whether new triggers may go to the runner at once: nothing older waits, and few chunks are out already."""
        line = self._lines.get(name)
        if line is None or not line.entries:
            return True
        return len(line.entries) < CHUNKS_IN_FLIGHT_PER_MODEL_MAX and not line.entries[-1].waits

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
        line, bound = self._line(triggers), self._bound(triggers.name)
        latest = bound.policy == "latest_per_customer" and answering is None
        if latest:
            rows, triggers = len(triggers), newest_only(triggers)
            _count(settled, "superseded", triggers.name, rows - len(triggers))
        refused = self._make_room(line, bound, triggers, settled)
        if refused:
            _count(settled, refused, triggers.name, len(triggers))
            if answering is not None:
                answering.cancel()
            return None
        chunk = SequenceChunk(line.next_number, triggers, self._clock.now_ms())
        entry = Entry.of(chunk)
        entry.pending = 1
        line.add(entry)
        if answering is not None:
            self._watch(line, entry, version, answering, triggers)
        elif latest:
            line.supersede(entry, triggers)
        elif line.newest is not None:
            line.newest = None  # the policy has changed
        return chunk

    def _make_room(self, line: Line, bound: Bound, newer: Triggers, settled: Settled) -> str:
        """Shed what is over the tenant's bounds with `newer` added to the line; why `newer` can't be taken, or ''."""
        more, more_bytes = len(newer), size_bytes(newer)
        if more > bound.rows_max or more_bytes > bound.bytes_max:
            return "overload" if more > bound.rows_max else "bytes"
        others = self._tenants[newer.name.tenant]
        while True:
            if sum(one.rows for one in others) + more > bound.rows_max:
                reason, held = "overload", {one.key: one.rows + (more if one is line else 0) for one in others}
            elif sum(one.size_bytes for one in others) + more_bytes > bound.bytes_max:
                reason, held = "bytes", {one.key: one.size_bytes + (more_bytes if one is line else 0) for one in others}
            else:
                return ""
            fullest = max(others, key=lambda one: held[one.key])
            if fullest is line and bound.policy == "shed_newest":
                return reason
            victim = max((one for one in others if one.entries), key=lambda one: held[one.key])
            self._shed_chunk(victim, reason, settled)

    def _shed_chunk(self, line: Line, reason: str, settled: Settled) -> None:
        if self._bound(line.name).policy == "shed_newest":
            entry = line.entries.pop()
            settled.removed.setdefault(line.key, []).append(entry.number)
        else:
            entry = line.entries.popleft()
            settled.cursors[line.key] = entry.number + 1
        self._drop(line, entry)
        _count(settled, reason, line.name, entry.rows)
        _count(settled, "superseded", line.name, len(entry.superseded))

    def _drop(self, line: Line, entry: Entry) -> None:
        """Of an entry that was just taken off an end of the line."""
        line.drop(entry)
        call = self._calls.pop((line.key, entry.number), None)
        if call is not None and not call.answering.done():
            call.answering.cancel()

    def settle(self) -> Settled:
        """Take the answered chunks off the head of every line, and those that are too old or whose model is gone.

        As many as one frame may well hold: the rest is settled by the next cycle.
        """
        self.changed.clear()
        settled = Settled()
        rows = 0
        for line in self._lines.values():
            while line.entries and rows < SETTLED_ROWS_MAX and self._settle_head(line, line.entries[0], settled):
                entry = line.entries.popleft()
                rows += entry.rows + len(entry.superseded)
                settled.cursors[line.key] = entry.number + 1
                _count(settled, "superseded", line.name, len(entry.superseded))
                self._drop(line, entry)
            if line.to_compact:
                self._compact(line, settled)
        return settled

    def _settle_head(self, line: Line, entry: Entry, settled: Settled) -> bool:
        call = self._calls.get((line.key, entry.number))
        if call is None or not call.answering.done():
            if self._clock.now_ms() - entry.appended_ms > self._bound(line.name).age_ms_max:
                _count(settled, "age", line.name, entry.rows)
                return True
            if not entry.rows:
                return True
        if entry.triggers is None:
            return False
        version = self._versions(entry.triggers.name, entry.triggers.version)
        if version is None:
            _count(settled, "deleted", line.name, entry.rows)
            return True
        if call is None or not call.answering.done():
            return False
        settled.answers.append(Answer(call.runs_on, entry.triggers, call.answering.result()))
        return True

    def _compact(self, line: Line, settled: Settled) -> None:
        """Remove chunks of which no row waits, and write some of those again of which few do."""
        wanted = [entry for entry in line.entries if entry.mostly_superseded]
        empty = [entry for entry in wanted if not entry.rows]
        for entry in [entry for entry in wanted if entry.rows][:COMPACT_CHUNKS_MAX]:
            _count(settled, "superseded", line.name, len(entry.superseded))
            self._load(line, entry)
            live = entry.live
            assert live is not None
            settled.appended.append(line.rewritten(entry, live))
        if empty:
            for entry in empty:
                _count(settled, "superseded", line.name, len(entry.superseded))
            settled.removed.setdefault(line.key, []).extend(entry.number for entry in empty)
            line.remove({entry.number for entry in empty})

    def stored(self, chunks: Iterable[SequenceChunk]) -> None:
        """The store holds these chunks now: their triggers need not stay in memory."""
        for chunk in chunks:
            self._line(chunk.triggers).stored(chunk.number)

    def pump(self) -> None:
        """Submit chunks near the head that nobody works on."""
        for line in self._lines.values():
            for entry in line.head:
                if entry.waits and entry.rows and not self._submit(line, entry):
                    break
            line.forget_tail()

    def _load(self, line: Line, entry: Entry) -> None:
        if entry.triggers is None:
            entry.triggers = self._store.chunks(1, line.key, entry.number)[0].triggers
            line.held[entry.number] = entry

    def _submit(self, line: Line, entry: Entry) -> bool:
        self._load(line, entry)
        live = entry.live
        assert live is not None
        version = self._versions(live.name, live.version)
        if version is None:
            self.changed.set()
            return False
        try:
            answer = self._runner.submit(version, live.rows)
        except BoundExceeded:
            return False
        self._watch(line, entry, version, asyncio.ensure_future(answer), live)
        return True

    def _watch(self, line: Line, entry: Entry, version: ModelVersion, answering: Answering, triggers: Triggers) -> None:
        line.in_flight(entry, triggers)
        self._calls[line.key, entry.number] = _Call(answering, version)
        answering.add_done_callback(lambda _: self.changed.set())

    def close(self) -> None:
        for line in self._lines.values():
            while line.entries:
                self._drop(line, line.entries.popleft())

    def statistics(self, now_ms: int) -> dict[str, dict[str, int]]:
        """Line -> rows, chunks and bytes behind; age of the oldest by event time, and since it came into the log."""
        return {
            key: {
                "rows": line.rows,
                "chunks": len(line.entries),
                "bytes": line.size_bytes,
                "oldest_ms": now_ms - line.entries[0].time_ms,
                "waited_ms": max(0, now_ms - line.entries[0].appended_ms),
            }
            for key, line in self._lines.items()
            if line.entries
        }


def _count(settled: Settled, reason: str, name: ModelName, rows: int) -> None:
    if rows:
        settled.shed[f"{reason} {name}"] += rows


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
