"""Sessions trigger once when what they follow from changes: windows filled from history, gaps, grace, first events."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from frame_support import as_sent
from test_backfilling import SCHEMA, START_MS, Log, events_of
from test_closing import NoRunner

from node.backfilling import Backfilling
from node.closing import RoundFold, close_idle, session_triggers
from node.columns import take
from node.intervals import Intervals
from node.kernel.clock import ManualClock
from node.kernel.ports import FeaturePlan
from node.kernel.tables import NO_TABLES
from node.kernel.types import Bools, EventColumns, Floats, Frame
from node.state.codec import images, unpack
from node.state.fold import FoldResult, filters_of, fold
from node.state.layout import Layout
from node.state.memory import MemoryStore
from node.state.reduction import reduced
from tenants.features import compile_plan
from tenants.manifest import parse_manifest

NOTHING = compile_plan([], SCHEMA)
HISTORY = "[backfill]\nfrom = 'all'\n"


def plan(head: str = "", *, models: Sequence[str] = ("visit",)) -> FeaturePlan:
    keys, _, tables = head.partition("[")
    features = "[features]\nevents = \"count(any, session='30m')\"\n"
    text = f"session = '30m'\n{keys}\n{features}{'[' + tables if tables else ''}"
    manifests = [parse_manifest("m.toml", "shop", model, text.encode(), SCHEMA) for model in models]
    return compile_plan([(manifest.version("0" * 64), manifest) for manifest in manifests], SCHEMA)


class Partition:
    """What a cycle does with sessions and history, in its order, on events (customer, minute) that come as told."""

    def __init__(self, *seen: tuple[str, int]) -> None:
        self.log = Log(events_of([(customer, minute * 60, 1.0, "a") for customer, minute in seen]))
        self.store, self.clock = MemoryStore(), ManualClock(START_MS + 10**9)
        self.at = self.frames = 0
        self.layout, self.plan = Layout.empty(), NOTHING
        self.fills = Backfilling(self.log, self.store.backfill(), self.clock, 0)
        self.intervals = Intervals(NoRunner(), self.store, self.clock, 0)
        self.triggered: list[tuple[str, int, int, float]] = []
        """Customer, minutes of the first event and the newest, events."""
        self._use(NOTHING)

    def _use(self, wanted: FeaturePlan) -> None:
        if self.fills.behind:
            self.layout = self.fills.opened(self.layout)
        if wanted is not self.plan:
            self.layout, self.plan = self.fills.grown(wanted, self.layout), wanted

    def reduce(self) -> None:
        """What the plan does not need is taken from the rows."""
        before, self.layout = self.layout, reduced(self.layout, self.plan.needs, self.clock.now_ms())
        self.intervals.forget(before.marks.keys() - self.layout.marks.keys())

    def _fold(self, rows: Floats, events: EventColumns, wanted: Bools) -> FoldResult:
        masks = self.plan.masks(events, filters_of(self.layout, events, SCHEMA.types))
        return fold(self.layout, rows, events, masks, wanted, SCHEMA.types)

    async def cycle(self, wanted: FeaturePlan, count: int = 0) -> None:
        """The next so many events."""
        ran = self.intervals.settle()
        self._use(wanted)
        events = take(self.log.events, np.arange(self.at, self.at + count))
        self.at += len(events)
        warming = self.fills.warming
        taken = self.fills.take(events, {"t": self.at})
        named = [*events.customers, *(name for one in ran.idle for name in one.customers)]
        names = list(dict.fromkeys([*named, *(name for batch in taken.batches for name in batch.customers)]))
        positions = {name: place for place, name in enumerate(names)}
        rows = unpack(self.layout, self.store.load([name.encode() for name in names]))
        held = frozenset(name for name in warming if self.plan.histories[name][0].hold)
        ending = self.intervals.closers(self.plan, self.layout, held)
        folding = RoundFold(ending, rows, events, np.zeros(len(events), np.bool_), self._fold)
        for _ in folding.rounds():
            pass
        closed = [*folding.closed, *close_idle(ending, ran.idle, rows, positions)]
        self.fills.fold(taken, self.layout, rows, positions, self.plan, SCHEMA.types)
        for version, triggers in session_triggers(self.plan, self.layout, closed, NO_TABLES, warming):
            for place, customer in enumerate(triggers.customers if version.name.model == "visit" else ()):
                times = (int(triggers.offsets[place]), int(triggers.times_ms[place]))
                began, newest = ((time - START_MS) // 60_000 for time in times)
                self.triggered.append((customer, began, newest, float(triggers.rows.numbers[place, 0])))
        runs, event_time_ms = self.intervals.committing(events, Counter())
        frame = Frame(
            {"t": self.at}, self.layout.id, [name.encode() for name in names], images(rows), self.layout.encode(),
            runs=runs, event_time_ms=event_time_ms, backfill=self.fills.committing(),
        )  # fmt: skip
        self.frames += 1
        self.store.apply(as_sent(frame), self.frames)
        self._use(wanted)
        self.fills.pump({"t": self.at})
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self._use(wanted)
        self.intervals.pump(self.plan, self.layout, NO_TABLES, self.fills.warming)
        self.clock.advance(60)

    async def take(self, wanted: FeaturePlan, *counts: int) -> None:
        """So many events at a time, each time until all that follows has come."""
        for count in counts:
            await self.cycle(wanted, count)
            for _ in range(20):
                await self.cycle(wanted)

    def of(self, customer: str) -> list[tuple[int, int, float]]:
        return [(began, newest, events) for name, began, newest, events in self.triggered if name == customer]


async def test_history_that_knows_an_earlier_begin_triggers_no_session_again() -> None:
    seen = [
        ("ann", 0),
        ("ann", 10),
        ("zero", 11),
        ("ann", 20),
        ("ann", 30),
        ("zero", 200),
        ("zero", 400),
        ("zero", 600),
    ]
    partition = Partition(*seen)
    await partition.take(NOTHING, 3)
    await partition.take(plan(), 0, 3)
    assert partition.of("ann") == [(20, 30, 2)]
    await partition.take(plan(HISTORY), 0, 1, 1)
    assert len(partition.of("ann")) == 1


async def test_history_that_begins_amid_a_session_triggers_it_no_second_time() -> None:
    partition = Partition(
        ("zero", 0), ("ann", 40), ("ann", 50), ("ann", 60), ("zero", 200), ("zero", 400), ("zero", 600)
    )
    await partition.take(plan(), 1, 4)
    assert partition.of("ann") == [(40, 60, 3)]
    partition.log.first = 2
    await partition.take(plan(HISTORY), 0, 1, 1)
    assert len(partition.of("ann")) == 1


async def test_a_marked_model_gets_the_sessions_that_close_while_its_windows_are_filled() -> None:
    visits = [("ann", 60 + 60 * number) for number in range(6)]
    partition = Partition(("zero", 0), *visits, ("zero", 1000), ("zero", 2000))
    await partition.take(NOTHING, 1)
    partition.log.events_max = 0  # it takes long
    marked = plan(HISTORY + "until = 'marked'\n")
    await partition.take(marked, 0, *[1] * 6)
    assert [(began, newest) for began, newest, _ in partition.of("ann")] == [
        (minute, minute) for _, minute in visits[:5]
    ]
    partition.log.events_max = 1000
    await partition.take(marked, 0, 1, 1)
    assert [(began, newest) for began, newest, _ in partition.of("ann")] == [(minute, minute) for _, minute in visits]


async def test_a_model_that_comes_back_after_its_marks_were_taken_from_the_rows_gets_no_session_again() -> None:
    partition = Partition(("ann", 100), ("bob", 500), ("zero", 900), ("ann", 1000), ("zero", 2000))
    await partition.take(plan(models=["visit", "other"]), 0, 2)
    assert (partition.of("ann"), partition.of("bob")) == ([(100, 100, 1)], [])
    await partition.take(plan(models=["other"]), 0)
    partition.reduce()
    await partition.take(plan(models=["visit", "other"]), 0, 2, 1)
    assert (partition.of("ann"), partition.of("bob")) == ([(100, 100, 1), (1000, 1000, 1)], [(500, 500, 1)])


async def test_less_grace_loses_no_session_that_had_ended() -> None:
    seen = [
        ("zero", 0),
        ("zero", 30),
        ("zero", 60),
        ("ann", 65),
        ("zero", 85),
        ("zero", 124),
        ("zero", 200),
        ("zero", 400),
    ]
    partition = Partition(*seen)
    before = plan("grace = '10m'\n")
    await partition.take(before, 1, 4, 1)
    assert partition.of("ann") == []
    await partition.take(plan("grace = '1m'\n"), 0, 1, 1)
    assert partition.of("ann") == [(65, 65, 1)]


async def test_a_changed_schedule_loses_no_session_that_ends_before_it_is_seen() -> None:
    partition = Partition(("zero", 0), ("ann", 65), ("ann", 100), ("zero", 200), ("zero", 400))
    await partition.take(plan("every = '2h'\n"), 1, 1)
    after = plan("every = '2h'\ngrace = '1m'\n")
    await partition.cycle(after, 1)  # ends ann's first session
    await partition.take(after, 0, 1, 1)
    assert partition.of("ann") == [(65, 65, 1), (100, 100, 1)]


async def test_the_first_events_of_a_partition_are_of_sessions_too() -> None:
    partition = Partition(("ann", 100), ("ann", 200), ("zero", 300), ("zero", 2400))
    always = plan()
    await partition.take(always, 0, 3, 1)
    assert partition.of("ann") == [(100, 100, 1), (200, 200, 1)]
