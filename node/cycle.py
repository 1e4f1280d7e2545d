"""The heart of the node: one cycle of one partition.

A cycle takes a micro-batch of events from the source and hands all its consequences to the committer, as one. If the
micro-batch was full, the next cycle is computed while they are committed. After an error the partition is opened again
from what was committed. Everything between is columns.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import structlog

from node.backfilling import Backfilling, Taken
from node.backlog import Answer, Backlog
from node.closing import Idle, RoundFold, close_idle, session_triggers
from node.columns import where
from node.commit import Committer
from node.ingest.decode import Decoded, EventDecoder
from node.ingest.source import Polled, Source
from node.interval_rows import write_marks
from node.intervals import Intervals
from node.kernel.clock import Clock
from node.kernel.limits import CYCLE_SLOTS_MAX, IDLE_POLL_MS, ROW_UNNEEDED_SHARE_MIN
from node.kernel.ports import FeaturePlan, ModelRunner, Shadows
from node.kernel.tables import NO_TABLES, TableSet
from node.kernel.types import Aggregate, Bools, EventColumns, Floats, Frame, Ints, ModelName, ModelVersion, StoredOutput
from node.ordering import Ordering
from node.outbox import Outgoing
from node.outgoing import Origin, add_up_former, answered_records, counts, failed_letters, refused_letters
from node.room import NeededLately, with_room
from node.staging import blind_shadows, divided, running
from node.state.cache import RowCache
from node.state.codec import images
from node.state.fold import FoldResult, filters_of, fold
from node.state.layout import Layout
from node.state.outputs import read_output, write_outputs
from node.steps import StepTimes
from node.training.row_log import RowLog
from node.triggers import Outcome, run_triggers, select

log = structlog.get_logger(__name__)

_PROGRESS_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class CycleSettings:
    events_max: int
    wait_ms: int
    deadline_seconds: float
    """How long a cycle waits for models before it commits without them."""


@dataclass(slots=True)
class PartitionState:
    """What one partition holds in memory between cycles; made anew from the store whenever it is opened."""

    layout: Layout
    cache: RowCache
    backlog: Backlog
    intervals: Intervals
    backfilling: Backfilling
    counters: Counter[str]
    """As of the newest cycle."""
    committed: Mapping[str, int]
    """The counters as of the last commit."""
    progress: Mapping[str, int] = field(default_factory=dict)
    """Of the topics that are read, in the newest frame submitted."""
    progress_left: Mapping[str, int] = field(default_factory=dict)
    """Of topics that were read before; frames hold it too."""
    submitted: float = 0.0
    layout_committed: int = -1
    """Id of the newest layout that a frame of this session carried."""
    newest: FeaturePlan | None = None
    plan: FeaturePlan | None = None
    """As much of the newest one as rows have room for."""
    refused: str = ""
    """Why models of the newest plan are left out, '' if none is."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What all partitions of a node share."""

    decoder: EventDecoder
    plans: Callable[[], FeaturePlan]
    runner: ModelRunner
    settings: CycleSettings
    tables: Callable[[], TableSet] = lambda: NO_TABLES
    """The versions that are live now; a cycle asks once."""
    shadows: Shadows | None = None
    unfit: Callable[[ModelVersion, str], object] = lambda version, reason: None
    """Hears of a version, live or staged, that the rows of a partition have no room for."""


class Cycle:
    def __init__(
        self,
        engine: Engine,
        origin: Origin,
        source: Source,
        committer: Committer,
        state: PartitionState,
        steps: StepTimes,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._origin = origin
        self._source = source
        self._committer = committer
        self._state = state
        self._steps = steps
        self._clock = clock
        self._names = origin.names
        self._row_log = RowLog()
        self._needed = NeededLately(clock.monotonic())
        self._idle = False
        """Nothing but an event, or the end of an interval, which may wait, can make work for the next cycle."""

    async def run(self) -> bool:
        """One cycle; True if the source gave as many events as were asked for, so that more are likely waiting."""
        engine, state, steps = self._engine, self._state, self._steps
        with steps.measure("poll"):  # 1. Poll a micro-batch.
            wait_ms = max(engine.settings.wait_ms, IDLE_POLL_MS) if self._idle else engine.settings.wait_ms
            events_max = self._events_max
            polled = await self._source.poll(events_max, wait_ms)
        settled, ran = state.backlog.settle(state.layout.slots), state.intervals.settle()
        fills = state.backfilling
        if not (polled.records or settled.cursors or ran.due or fills.due or self._progress_due(polled)):
            self._committer.check()
            state.backlog.pump()
            self._run_aside()
            waits = state.intervals.running or fills.running
            self._idle = self._committer.idle and state.backlog.empty and not waits
            return False
        self._idle = False
        self._committer.expect()
        settled.answers += ran.answers
        with steps.measure("decode"):  # 2. Decode it into columns; what can't be is a dead letter.
            decoded = self._engine.decoder.records(polled.records, polled.topics)
        with steps.measure("load"):  # 3, 4. One row for each customer seen, in one matrix.
            plan = self._plan()
            tables = _pinned(engine.tables(), plan)
            warming = fills.warming
            taken = fills.take(decoded.events, polled.progress)
            customers, positions, lasting = _customers(decoded.events, settled.answers, taken, ran.idle)
            rows = state.cache.load(customers)
        with steps.measure("fold"):  # 5. Fold the events into the matrix, each as of itself.
            held = frozenset(name for name in warming if plan.histories[name][0].hold)
            selected, blind = select(plan, decoded.events, self._origin.schema), blind_shadows(plan, tables)
            selections = divided(plan, decoded.events, selected, held | blind)
            wanted = _union(selections, len(decoded.events))
            ending = state.intervals.closers(plan, state.layout, held)
            folding = RoundFold(ending, rows, decoded.events, wanted, partial(self._fold, plan))
            for _ in folding.rounds():
                await asyncio.sleep(0)
            folded, closed = folding.result, [*folding.closed, *close_idle(ending, ran.idle, rows, positions)]
            fills.fold(taken, state.layout, rows, positions, plan, self._origin.schema.types)
        with steps.measure("features"):  # 6. Each distinct feature once, then each model's rows.
            triggering = where(decoded.events, wanted)
            reads = _Reads(plan, state.layout, rows, triggering.rows, triggering.times_ms, folded.values, tables)
            masks = {name: mask[wanted] for name, mask in selections.items()}
            ordering = Ordering(plan, triggering, self._names, masks, reads, warming)
            work = [*ordering.ready(), *session_triggers(plan, state.layout, closed, tables, warming)]
        with steps.measure("trigger"):  # 7. Models answer, or their triggers go to the sequence log.
            seconds = engine.settings.deadline_seconds
            outcome = await run_triggers(state.backlog, work, settled, seconds, ordering, engine.shadows)
        with steps.measure("encode"):
            _store_answers(state.layout, rows, outcome.answers, positions)
            outgoing = self._outgoing(polled, decoded, customers, rows, outcome, folded.late)
        state.progress, state.submitted = polled.progress, self._clock.monotonic()
        await self._committer.submit(outgoing, customers, rows, lambda: self._applied(outgoing), lasting)  # 8. Commit.
        self._run_aside()
        return len(polled.records) >= events_max

    @property
    def _events_max(self) -> int:
        """Of the next micro-batch: where rows are wide, fewer."""
        return max(1, min(self._engine.settings.events_max, CYCLE_SLOTS_MAX // self._state.layout.slots))

    def _progress_due(self, polled: Polled) -> bool:
        """Whether progress alone is worth a commit: where to go on is not durable yet, or has moved over transaction
        markers and nothing else for a while."""
        state = self._state
        if not polled.progress.keys() <= state.progress.keys():
            return True
        return polled.progress != state.progress and self._clock.monotonic() - state.submitted > _PROGRESS_SECONDS

    def _run_aside(self) -> None:
        """Read on for interval models, from the store, which has what is committed, and of history."""
        fills = self._state.backfilling
        if self._engine.plans().histories or fills.behind or self._engine.plans() is not self._state.newest:
            self._plan()  # also while no event comes: who has no room for a model says so before it is needed
        fills.pump(self._state.progress)
        if self._state.intervals.running or any(version.schedule for version in self._engine.plans().models):
            plan = self._plan()
            tables = _pinned(self._engine.tables(), plan)
            self._state.intervals.pump(plan, self._state.layout, tables, fills.warming)

    def _applied(self, outgoing: Outgoing) -> None:
        self._state.layout_committed = max(self._state.layout_committed, outgoing.frame.layout_id)
        self._state.committed = outgoing.frame.counters
        self._state.backlog.stored(outgoing.frame.appended)
        self._state.backlog.pump()

    def _plan(self) -> FeaturePlan:
        """The plan for this cycle; one that asks for more state than rows hold grows the layout first.

        Of one that asks for more than a row may hold, the models are left out that rows have no room for.
        """
        plan, state = self._engine.plans(), self._state
        if state.plan is None or state.backfilling.behind:
            self._grow(state.backfilling.opened(state.layout))
        if state.plan is not None and plan is state.newest:
            self._take_back(state.plan)
            return state.plan
        state.newest = plan
        add_up_former(state.counters, running(plan))
        fills = state.backfilling
        room = with_room(plan, state.layout, fills.previewed, fills.reduced, state.plan)
        grown = fills.grown(room.plan, room.layout)
        refused = self._tell_unfit(room.unfit) if room.unfit else ""
        state.plan, state.refused = room.plan, refused
        self._needed.planned(plan, room.plan)
        self._grow(grown)
        return room.plan

    def _take_back(self, plan: FeaturePlan) -> None:
        """The slots of what nothing has needed for long, where they are much of a row: they are folded into as others.

        Where they are less, they go once their room is needed.
        """
        needs = self._needed.due(self._clock.monotonic())
        if needs is None:
            return
        layout, fills = self._state.layout, self._state.backfilling
        least = fills.reduced(layout, needs)
        if least.slots <= (1 - ROW_UNNEEDED_SHARE_MIN) * layout.slots:
            log.info("slots taken back", partition=self._origin.partition, slots=layout.slots, needed=least.slots)
            self._grow(fills.grown(plan, least))

    def _tell_unfit(self, unfit: Mapping[ModelName, str]) -> str:
        """What the partition says of models without room; those who look after them hear it too."""
        told = "; ".join(f"model {name} is not taken: {reason}" for name, reason in unfit.items())
        if told != self._state.refused:
            log.error("models not taken", partition=self._origin.partition, reason=told)
        versions = running(self._engine.plans())
        for name, reason in unfit.items():
            self._engine.unfit(versions[name], f"in partition {self._origin.partition}, {reason}")
        return told

    def _grow(self, grown: Layout) -> None:
        if grown is not self._state.layout:
            self._state.intervals.forget(self._state.layout.marks.keys() - grown.marks.keys())
            self._state.layout = grown
            self._state.cache.grow(grown)

    def _fold(self, plan: FeaturePlan, rows: Floats, events: EventColumns, wanted: Bools) -> FoldResult:
        layout, types = self._state.layout, self._origin.schema.types
        masks = plan.masks(events, filters_of(layout, events, types))
        return fold(layout, rows, events, masks, wanted, types, plan.aggregates)

    def _outgoing(
        self, polled: Polled, decoded: Decoded, customers: Sequence[str], rows: Floats, outcome: Outcome, late: int
    ) -> Outgoing:
        state, origin = self._state, self._origin
        state.counters.update(counts(decoded, outcome.answers, outcome.shed, late))
        letters = refused_letters(origin, polled.records, polled.topics, decoded)
        inferences = []
        for answer in outcome.answers:
            letters += failed_letters(origin, answer)
            inferences += answered_records(origin, answer)
        rows_fed = self._row_log.records(outcome.answers, state.plan or self._engine.plans(), state.counters)
        runs, event_time_ms = state.intervals.committing(decoded.events, state.counters)
        frame = Frame(
            progress={**state.progress_left, **polled.progress},
            layout_id=state.layout.id,
            customers=[customer.encode() for customer in customers],
            rows=images(rows),
            layout=state.layout.encode() if state.layout.id != state.layout_committed else None,
            appended=outcome.appended,
            cursors=outcome.cursors,
            counters=dict(state.counters),
            runs=runs,
            event_time_ms=event_time_ms,
            backfill=state.backfilling.committing(),
        )
        return Outgoing(frame, inferences, letters, rows_fed, state.progress_left.keys())


class _Reads:
    """`Reads` of one micro-batch's triggering events."""

    def __init__(
        self,
        plan: FeaturePlan,
        layout: Layout,
        rows: Floats,
        at: Ints,
        times_ms: Ints,
        aggregates: Mapping[Aggregate, Floats],
        tables: TableSet,
    ) -> None:
        self.tables = tables
        self._ttls = {version.name: version.ttl_ms for version in plan.stored_models}
        self._layout = layout
        self._rows = rows
        self._at = at
        self._times_ms = times_ms
        self._aggregates = aggregates

    def aggregate(self, aggregate: Aggregate) -> Floats:
        return self._aggregates[aggregate]

    def stored(self, output: StoredOutput) -> Floats:
        return read_output(self._layout, self._rows, output, self._ttls[output.name], self._at, self._times_ms)


def _pinned(tables: TableSet, plan: FeaturePlan) -> TableSet:
    """Raises TableUnavailable when what answers triggers needs a version that is not here: it must not be fed from
    another one."""
    if tables.absent:
        blind = blind_shadows(plan, tables)
        for model in running(plan):
            if model not in blind:
                tables.require(plan.tables(model), f"model {model}")
    return tables


def _customers(
    events: EventColumns, answers: Sequence[Answer], taken: Taken, idle: Sequence[Idle]
) -> tuple[list[str], dict[str, int], int]:
    """All customers of this commit, those of the events first, the position of each, and how many come before those
    that only an interval run, the end of a session or history concerns; answers of such runs must be the last."""
    positions = dict.fromkeys(events.customers, 0)
    lasting = len(positions)
    for answer in answers:
        positions.update(dict.fromkeys(answer.triggers.customers, 0))
        if answer.triggers.kind != "interval":
            lasting = len(positions)
    for one in idle:
        positions.update(dict.fromkeys(one.customers, 0))
    for batch in taken.batches:
        positions.update(dict.fromkeys(batch.customers, 0))
    customers = list(positions)
    return customers, dict(zip(customers, range(len(customers)), strict=True)), lasting


def _union(selections: Mapping[ModelName, Bools], count: int) -> Bools:
    union = np.zeros(count, np.bool_)
    for mask in selections.values():
        union |= mask
    return union


def _store_answers(layout: Layout, rows: Floats, answers: Sequence[Answer], positions: Mapping[str, int]) -> None:
    """Each customer's newest inference by event time into the row: it costs no write of its own."""
    for answer in answers:
        at = np.fromiter(
            [positions[customer] for customer in answer.triggers.customers], np.int64, len(answer.triggers)
        )
        if answer.marks is not None:
            write_marks(layout, rows, answer.version.name, at, answer.marks)
        good = np.ones(len(at), np.bool_)
        good[list(answer.outputs.errors)] = False
        write_outputs(
            layout, rows, answer.version, at[good], answer.triggers.times_ms[good], answer.outputs.values[good]
        )
