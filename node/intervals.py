"""The interval models of one partition: what runs, chunk by chunk, beside the cycle and never in its way.

A run goes through the store's rows in key order. Each chunk of it is read from the store, handed to the runner as
background work and, once it is answered, committed by the next cycle together with the place that the run has come to.
So whatever is killed, the run goes on behind its last committed chunk: no customer is run over twice in an interval,
and none is left out. Nothing of a run waits in the sequence log: a chunk that is lost is read again, as it is then.

A model has one chunk on its way at a time. A cycle reads one, then rests from it, and commits INTERVAL_ROWS_SETTLED_MAX
rows at most.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import structlog

from node.backlog import Answer
from node.closing import Closer, Idle, closer_of, closers, idle_customers
from node.interval_rows import ChunkRows, chunk_rows
from node.kernel.clock import Clock
from node.kernel.errors import BoundExceeded
from node.kernel.limits import (
    EVENT_TIME_SKEW_MS_MAX,
    INTERVAL_CHUNK_ROWS_MAX,
    INTERVAL_LOOK_MS,
    INTERVAL_REST_BESIDE_EVENTS_FACTOR,
    INTERVAL_REST_FACTOR,
    INTERVAL_ROWS_SETTLED_MAX,
    INTERVAL_RUNS_KEPT_MAX,
    INTERVAL_SCAN_ROWS_MAX,
)
from node.kernel.ports import FeaturePlan, ModelRunner, StateStore
from node.kernel.tables import NO_TABLES, TableSet
from node.kernel.types import BACKGROUND, EventColumns, IntervalRun, Ints, ModelName, ModelVersion, Statistics
from node.kernel.zones import time_zone
from node.schedule import decide, newest_interval, went_on
from node.state.layout import Layout
from node.waiting import Answering

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Chunk:
    version: ModelVersion
    rows: ChunkRows | Idle
    answering: Answering | None = None
    """None: nothing to ask, or the runner has no room yet."""

    @property
    def done(self) -> bool:
        asks = isinstance(self.rows, ChunkRows) and len(self.rows)
        return not asks or (self.answering is not None and self.answering.done())


@dataclass(slots=True)
class Ran:
    """What runs add to a commit."""

    answers: list[Answer] = field(default_factory=list)
    idle: list[Idle] = field(default_factory=list)
    """Customers whose sessions seem to have ended."""
    due: bool = False
    """Worth a commit of its own."""


class Intervals:
    def __init__(self, runner: ModelRunner, store: StateStore, clock: Clock, partition: int) -> None:
        self._runner = runner
        self._store = store
        self._clock = clock
        self._partition = partition
        self._runs = dict(store.runs())
        self._event_time_ms = int(_as_come(np.array([store.event_time_ms()]), clock.now_ms())[0])
        self._chunks: dict[str, _Chunk] = {}
        """By the text of the model's name."""
        self._turns: deque[str] = deque()
        self._changed: dict[str, IntervalRun | None] = {}
        """To be in the next frame."""
        self._counted: Counter[str] = Counter()
        self._due = self._beside_events = False
        self._looked = self._rested = -math.inf

    def settle(self) -> Ran:
        """Take the chunks that are answered, those of other models first next time."""
        ran, rows = Ran(due=self._due), 0
        for name in list(self._turns):
            chunk = self._chunks.get(name)
            if chunk is None or not chunk.done:
                continue
            if rows and rows + len(chunk.rows) > INTERVAL_ROWS_SETTLED_MAX:
                break
            del self._chunks[name]
            if chunk.answering is not None and chunk.answering.cancelled():
                continue  # the runner stops: the chunk is read again
            rows += len(chunk.rows)
            self._came_to(name, chunk)
            found = chunk.rows
            if isinstance(found, Idle):
                ran.idle += [found] if len(found) else []
            elif chunk.answering is not None:
                ran.answers.append(Answer(chunk.version, found.triggers, chunk.answering.result(), found.marks))
        ran.due = self._due = self._due or bool(ran.answers or ran.idle)
        return ran

    def _came_to(self, name: str, chunk: _Chunk) -> None:
        run = went_on(self._runs[name], chunk.rows.cursor, len(chunk.rows), chunk.rows.last)
        self._record(name, run, due=run.finished)
        if run.finished:
            self._counted[f"intervals {name}"] += 1
            log.info("interval run finished", model=name, partition=self._partition, due_ms=run.due_ms, rows=run.rows)

    def _record(self, name: str, run: IntervalRun | None, due: bool) -> None:
        if run is not None:
            self._runs[name] = run
        else:
            del self._runs[name]
        self._changed[name] = run
        self._due |= due

    def committing(self, events: EventColumns, counters: Counter[str]) -> tuple[Mapping[str, IntervalRun | None], int]:
        """What the frame that is made now says of runs, and the time by its events; `counters` are added to."""
        if len(events):
            self._beside_events = True
            as_come = _as_come(events.times_ms, self._clock.now_ms())
            self._event_time_ms = max(self._event_time_ms, int(as_come.max()))
            self._counted["ahead"] += int((as_come != events.times_ms).sum())
        changed, self._changed, self._due = self._changed, {}, False
        counters.update(+self._counted)
        self._counted.clear()
        return changed, self._event_time_ms

    def pump(
        self,
        plan: FeaturePlan,
        layout: Layout,
        tables: TableSet = NO_TABLES,
        warming: frozenset[ModelName] = frozenset(),
    ) -> None:
        """Begin the runs that are due, and read and hand out a chunk of one of those that have none on its way. Models
        that are `warming`, and held until they are not, don't run."""
        held = {name for name in warming if plan.histories[name][0].hold}
        versions = {str(one.name): one for one in plan.models if one.schedule is not None and one.name not in held}
        if not versions and not self._chunks:
            return
        self._drop_deleted(versions)
        if (now := self._clock.monotonic()) - self._looked >= INTERVAL_LOOK_MS / 1000:
            self._looked = now
            for name, version in versions.items():
                self._advance(name, version)
        for chunk in self._chunks.values():
            if not chunk.done and chunk.answering is None:
                self._submit(chunk)
        if now < self._rested:
            return
        for _ in range(len(self._turns)):
            name = self._turns[0]
            self._turns.rotate(-1)
            run = self._runs.get(name)
            if name not in self._chunks and run is not None and not run.finished:
                self._read(versions[name], plan, layout, tables, versions[name].name in warming)
                ended = self._clock.monotonic()
                factor = INTERVAL_REST_BESIDE_EVENTS_FACTOR if self._beside_events else INTERVAL_REST_FACTOR
                self._rested, self._beside_events = ended + factor * (ended - now), False
                return

    def _drop_deleted(self, versions: Mapping[str, ModelVersion]) -> None:
        """A model that is gone runs no more; where it was is remembered, for it may only be away for a moment."""
        if versions.keys() != set(self._turns):
            self._turns = deque(versions)
        for name in [name for name in self._chunks if name not in versions]:
            self._drop_chunk(name)
        spare = len(self._runs) - INTERVAL_RUNS_KEPT_MAX
        if spare > 0:
            gone = sorted(self._runs.keys() - versions.keys(), key=lambda name: (self._runs[name].due_ms, name))
            for name in gone[:spare]:
                self._record(name, None, due=False)

    def forget(self, models: Iterable[ModelName]) -> None:
        """Of those, rows do not tell any more which sessions each has run for: should one come back, it is seen first,
        and gets none that has ended before."""
        for name in sorted(map(str, models)):
            run = self._runs.get(name)
            if run is not None and run.schedule.gap_ms:
                if name in self._chunks:
                    self._drop_chunk(name)
                self._record(name, None, due=False)

    def _drop_chunk(self, name: str) -> None:
        chunk = self._chunks.pop(name)
        if chunk.answering is not None:
            chunk.answering.cancel()

    def _advance(self, name: str, version: ModelVersion) -> None:
        schedule, run = version.schedule, self._runs.get(name)
        assert schedule is not None
        # Of events that the store has: a run must see all that came before those which closed its interval. When it was
        # opened, its time may have been ahead of the clock.
        event_time_ms = min(self._event_time_ms, self._store.event_time_ms())
        now_ms = event_time_ms if schedule.by_event else self._clock.now_ms()
        if not now_ms and not schedule.gap_ms:
            return  # the first events tell which interval is the first; of sessions there is none before them
        decision = decide(version, run, newest_interval(schedule, now_ms, time_zone(schedule.zone)))
        if decision.run is run:
            return
        if name in self._chunks and run is not None and run.schedule != schedule:
            self._drop_chunk(name)
        if decision.run.late:
            self._counted[f"intervals_late {name}"] += 1
            log.warning(
                "interval run outlasts its interval; those that pass meanwhile are skipped",
                model=name, partition=self._partition, due_ms=decision.run.due_ms, rows=decision.run.rows,
            )  # fmt: skip
        if decision.skipped:
            self._counted[f"intervals_skipped {name}"] += decision.skipped
        self._record(name, decision.run, due=True)

    def _read(self, version: ModelVersion, plan: FeaturePlan, layout: Layout, tables: TableSet, warming: bool) -> None:
        name = str(version.name)
        run = self._runs[name]
        rows_max = max(1, min(INTERVAL_CHUNK_ROWS_MAX, self._runner.rows_queued_max(version.name)))
        assert version.schedule is not None
        closer, sessions = closer_of(layout, version, run), version.schedule.gap_ms > 0
        if sessions and closer is None:
            return
        limit = rows_max if run.whole and not sessions else INTERVAL_SCAN_ROWS_MAX
        scanned = self._store.scan(run.cursor or None, limit)
        last = len(scanned) < limit
        if closer is not None:
            self._chunks[name] = _Chunk(version, idle_customers(closer, layout, run, scanned, last, rows_max))
            return
        rows = chunk_rows(plan, layout, version, run, scanned, last, rows_max, tables)
        chunk = _Chunk(version, replace(rows, triggers=replace(rows.triggers, warming=warming)))
        self._chunks[name] = chunk
        if len(chunk.rows):
            self._submit(chunk)

    def _submit(self, chunk: _Chunk) -> None:
        assert isinstance(chunk.rows, ChunkRows)
        try:
            answer = self._runner.submit(chunk.version, chunk.rows.triggers.rows, BACKGROUND)
        except BoundExceeded:
            return
        chunk.answering = asyncio.ensure_future(answer)

    def closers(self, plan: FeaturePlan, layout: Layout, held: frozenset[ModelName] = frozenset()) -> list[Closer]:
        """The models that closed sessions trigger now; those `held` are not."""
        return closers(plan, layout, self._runs, held)

    @property
    def running(self) -> bool:
        """Whether a chunk is on its way."""
        return bool(self._chunks)

    def close(self) -> None:
        for name in list(self._chunks):
            self._drop_chunk(name)

    def statistics(self) -> dict[str, Statistics]:
        """Model -> how far it has come."""
        return {
            name: {"due_ms": run.due_ms, "running": not run.finished, "late": run.late, "rows": run.rows}
            for name, run in self._runs.items()
        }


def _as_come(times_ms: Ints, now_ms: int) -> Ints:
    """Event times, but `now_ms`, the clock's, for those that are further ahead of it than clocks differ: they are still
    the event's own, but say nothing of how far the others have come."""
    return np.where(times_ms > now_ms + EVENT_TIME_SKEW_MS_MAX, now_ms, times_ms)
