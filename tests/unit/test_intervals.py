"""Interval runs of one partition: each customer once an interval, whatever is killed between any two steps."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

import numpy as np
import pytest
from frame_support import as_sent
from hypothesis import given, settings
from hypothesis import strategies as st

import node.intervals
from node.cycle import _store_answers
from node.intervals import Intervals
from node.kernel.clock import ManualClock
from node.kernel.errors import BoundExceeded
from node.kernel.limits import EVENT_TIME_SKEW_MS_MAX
from node.kernel.ports import FeaturePlan
from node.kernel.types import (
    BACKGROUND,
    EventColumns,
    EventSchema,
    FeatureRows,
    Frame,
    ModelName,
    ModelOutputs,
    ModelVersion,
)
from node.state.codec import images, unpack
from node.state.fold import fold
from node.state.layout import Layout
from node.state.memory import MemoryStore
from tenants.features import compile_plan
from tenants.manifest import parse_manifest

SCHEMA = EventSchema(("buy",), {"amount": "number"})
NAME = ModelName("shop", "reorder")
HOUR_MS = 3_600_000
START_MS = 1_000_000 * HOUR_MS + 1


class ManualRunner:
    """Answers when the test says so, with the first column of each row; takes `room` submissions at once."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.open: deque[tuple[FeatureRows, asyncio.Future[ModelOutputs]]] = deque()

    def submit(self, version: ModelVersion, rows: FeatureRows, priority: int = 0) -> asyncio.Future[ModelOutputs]:
        assert priority == BACKGROUND
        if len(self.open) >= self.room:
            raise BoundExceeded("full")
        future = asyncio.get_running_loop().create_future()
        self.open.append((rows, future))
        return future

    def rows_queued_max(self, name: ModelName) -> int:
        return 3

    def answer(self) -> None:
        rows, future = self.open.popleft()
        if not future.cancelled():
            # Of every row whose total is 7, an error.
            errors = {int(row): "seven" for row in np.flatnonzero(rows.numbers[:, 0] == 7.0)}
            future.set_result(ModelOutputs(rows.numbers[:, :1].copy(), errors))


def plan(head: str) -> FeaturePlan:
    text = f'{head}\n[features]\ntotal = "sum(buy.amount)"\nrecent = "count(buy, \'1h\')"\n'
    manifest = parse_manifest("m.toml", NAME.tenant, NAME.model, text.encode(), SCHEMA)
    return compile_plan([(manifest.version("0" * 64), manifest)], SCHEMA)


def buys(customers: list[str], times_ms: int) -> EventColumns:
    count = len(customers)
    zeros = np.zeros(count, np.int64)
    return EventColumns(zeros, zeros + times_ms, np.arange(count), customers, zeros, zeros, {"amount": np.ones(count)})


class Partition:
    """What a cycle does with interval runs, on a store that keeps only what was committed."""

    def __init__(self, head: str, room: int = 100) -> None:
        self.plan = plan(head)
        self.clock = ManualClock(START_MS)
        self.store = MemoryStore()
        self.runner = ManualRunner(room)
        self.layout = Layout.empty().grown(self.plan.aggregates, self.plan.stored_models)
        self.offset = 0
        self.committed: list[tuple[int, str]] = []
        """(end of the interval, customer) of each inference and each dead letter."""
        self.events: Counter[str] = Counter()
        self.restart()

    def restart(self) -> None:
        """As after kill -9: only the store is left."""
        self.runner.open.clear()
        self.counters = Counter(self.store.counters())
        self.intervals = Intervals(self.runner, self.store, self.clock, 0)

    async def cycle(self, customers: list[str], killed: bool = False, time_ms: int | None = None) -> None:
        """One cycle; `killed`: just before its commit."""
        await asyncio.sleep(0)
        ran = self.intervals.settle()
        events = buys(customers, self.clock.now_ms() if time_ms is None else time_ms)
        if customers or ran.due:
            named = list(dict.fromkeys([*customers, *(c for a in ran.answers for c in a.triggers.customers)]))
            rows = unpack(self.layout, self.store.load([name.encode() for name in named]))
            fold(self.layout, rows, events, {}, np.zeros(len(events), np.bool_), SCHEMA.types)
            _store_answers(self.layout, rows, ran.answers, dict(zip(named, range(len(named)), strict=True)))
            runs, event_time_ms = self.intervals.committing(events, self.counters)
            if killed:
                self.restart()
                return
            encoded = [name.encode() for name in named]
            frame = Frame(
                {}, self.layout.id, encoded, images(rows), self.layout.encode(), counters=dict(self.counters),
                runs=runs, event_time_ms=event_time_ms,
            )  # fmt: skip
            self.offset += 1
            self.store.apply(as_sent(frame), self.offset)
            self.events.update(customers)
            for answer in ran.answers:
                self.committed += [(int(answer.triggers.times_ms[0]), name) for name in answer.triggers.customers]
        elif killed:
            self.restart()
            return
        self.clock.advance(100)
        self.intervals.pump(self.plan, self.layout)

    async def settle(self) -> None:
        """Until nothing is left to run."""
        for _ in range(400):
            await self.cycle([])
            while self.runner.open:
                self.runner.answer()
            runs = self.store.runs()
            if runs and all(run.finished for run in runs.values()) and not self.intervals.running:
                return
        raise AssertionError(f"never done: {self.store.runs()}")

    def of_interval(self, end_ms: int) -> list[str]:
        return sorted(name for end, name in self.committed if end == end_ms)


steps = st.lists(
    st.tuples(
        st.sampled_from(["cycle", "answer", "hour", "kill", "kill at commit"]),
        st.lists(st.integers(0, 11).map(lambda number: f"c{number:02}"), max_size=4, unique=True),
    ),
    max_size=60,
)


@pytest.mark.parametrize("whole", [False, True])
def test_each_customer_once_an_interval_whatever_is_killed(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.intervals, "INTERVAL_SCAN_ROWS_MAX", 4)

    @settings(deadline=None, max_examples=60)
    @given(steps, st.integers(0, 2))
    def prove(taken: list[tuple[str, list[str]]], room: int) -> None:
        asyncio.run(_once_an_interval(taken, room, whole))

    prove()


async def _once_an_interval(taken: list[tuple[str, list[str]]], room: int, whole: bool) -> None:
    partition = Partition('every = "1h"' + ("\nall = true" if whole else ""), room)
    await partition.cycle([])
    await partition.cycle([])  # the model is known, and that is committed
    for kind, customers in taken:
        if kind == "answer" and partition.runner.open:
            partition.runner.answer()
        elif kind == "hour":
            partition.clock.advance(HOUR_MS)
        elif kind == "kill":
            partition.restart()
        await partition.cycle(customers, killed=kind == "kill at commit")
    partition.runner.room = 100
    await partition.settle()
    doubled = {place: count for place, count in Counter(partition.committed).items() if count > 1}
    assert not doubled
    # An interval in which nothing else happens is run over all, or over those with events since they were run over.
    before = Counter(name for _, name in partition.committed)
    partition.clock.advance(HOUR_MS)
    await partition.settle()
    partition.clock.advance(HOUR_MS)
    await partition.settle()
    last = partition.store.runs()[str(NAME)].due_ms
    everybody = sorted(partition.events)
    assert partition.of_interval(last) == (everybody if whole else [])
    assert {name for name, _ in before.items()} <= set(everybody)
    assert {name for _, name in partition.committed} == set(everybody)
    inferred = partition.counters[f"intervals {NAME}"]
    assert inferred + partition.counters[f"intervals_skipped {NAME}"] == last // HOUR_MS - START_MS // HOUR_MS


async def test_only_customers_with_new_events_are_run_over_and_failures_count_as_run() -> None:
    partition = Partition('every = "1h"')
    await partition.cycle(["a", "b"])
    for _ in range(7):
        await partition.cycle(["seven"])  # the model fails on it
    await partition.settle()
    assert partition.committed == []
    partition.clock.advance(HOUR_MS)
    await partition.settle()
    first = partition.store.runs()[str(NAME)].due_ms
    assert partition.of_interval(first) == ["a", "b", "seven"]
    await partition.cycle(["b"])
    partition.clock.advance(HOUR_MS)
    await partition.settle()
    assert partition.of_interval(first + HOUR_MS) == ["b"]


async def test_a_run_that_outlasts_its_interval_says_so_and_none_piles_up() -> None:
    partition = Partition('every = "1h"')
    await partition.cycle(["a", "b", "c", "d", "e"])
    await partition.settle()
    for _ in range(4):  # nobody answers
        partition.clock.advance(HOUR_MS)
        await partition.cycle([])
    assert len(partition.runner.open) == 1
    await partition.settle()
    assert partition.counters[f"intervals_late {NAME}"] == 1
    assert partition.counters[f"intervals_skipped {NAME}"] == 2
    assert len({end for end, _ in partition.committed}) == 1, "the second run has nobody to run over"
    assert partition.counters[f"intervals {NAME}"] == 2


async def test_by_events_a_window_closes_when_they_are_past_its_end_by_the_grace() -> None:
    partition = Partition('every = "1h"\nby = "event"\ngrace = "10m"')
    end = 500_000 * HOUR_MS
    await partition.cycle(["a"], time_ms=end - HOUR_MS // 2)
    await partition.settle()
    await partition.cycle(["b"], time_ms=end - 1)
    await partition.cycle(["c"], time_ms=end + HOUR_MS // 6 - 1)
    partition.clock.advance(100 * HOUR_MS)
    await partition.settle()
    assert partition.committed == []
    partition.restart()
    await partition.cycle(["c"], time_ms=end + HOUR_MS // 6)
    await partition.cycle([])
    rows = partition.runner.open[0][0]
    assert partition.intervals.statistics()[str(NAME)]["due_ms"] == end
    # Of the hour that ended: one event of a and of b, none of c, whose events are later.
    assert rows.names == ("total", "recent")
    assert rows.numbers.tolist() == [[1.0, 1.0], [1.0, 1.0], [2.0, 0.0]]
    await partition.settle()
    assert partition.of_interval(end) == ["a", "b", "c"]


MINUTE_MS = 60_000
DAY_MS = 24 * HOUR_MS
YEAR_2160_MS = 6_000_000_000_000


@pytest.mark.parametrize("ahead_ms", [EVENT_TIME_SKEW_MS_MAX + 1, DAY_MS, YEAR_2160_MS - START_MS])
async def test_an_event_ahead_of_the_clock_neither_closes_a_window_early_nor_stops_those_that_follow(
    ahead_ms: int,
) -> None:
    partition = Partition('every = "1h"\nby = "event"\nall = true')
    await partition.cycle(["a"])
    await partition.settle()
    half = HOUR_MS // 2
    partition.clock.advance(half)
    await partition.cycle(["a", "astray"], time_ms=partition.clock.now_ms() + ahead_ms)
    await partition.cycle(["a"])
    await partition.settle()
    assert partition.committed == []
    partition.clock.advance(half)
    first = START_MS // HOUR_MS * HOUR_MS + HOUR_MS
    for hour in range(5):
        await partition.cycle(["a"])
        partition.restart()
        await partition.settle()
        partition.clock.advance(HOUR_MS)
        assert partition.of_interval(first + hour * HOUR_MS) == ["a", "astray"]
    assert len(partition.committed) == 10
    assert partition.counters["ahead"] == 2


async def test_a_source_whose_time_is_ahead_of_the_clock_has_its_windows_closed_by_the_clock() -> None:
    partition = Partition('every = "1h"\nby = "event"')
    first = START_MS // HOUR_MS * HOUR_MS
    for hour in range(6):
        await partition.cycle([f"c{hour}"], time_ms=partition.clock.now_ms() + 90 * MINUTE_MS)
        await partition.settle()
        partition.clock.advance(HOUR_MS)
    # A run begins with the event that closes its interval, so it finds that customer too.
    assert partition.committed == [(first + max(hour, 1) * HOUR_MS, f"c{hour}") for hour in range(6)]


async def test_an_event_little_ahead_of_the_clock_closes_a_window_at_once_whatever_came_with_it() -> None:
    partition = Partition('every = "1h"\nby = "event"')
    end = START_MS // HOUR_MS * HOUR_MS + HOUR_MS
    await partition.cycle(["a"])
    await partition.settle()
    partition.clock.advance(end - EVENT_TIME_SKEW_MS_MAX - partition.clock.now_ms())
    events = buys(["a", "b"], end)
    events.times_ms[1] += DAY_MS
    assert partition.intervals.committing(events, partition.counters)[1] == end
    assert partition.counters["ahead"] == 1


async def test_a_store_whose_time_is_ahead_of_the_clock_goes_by_the_clock_and_what_comes() -> None:
    partition = Partition('every = "1h"\nby = "event"')
    await partition.cycle(["a"])
    frame = Frame({}, partition.layout.id, [], np.zeros((0, partition.layout.slots)), event_time_ms=YEAR_2160_MS)
    partition.store.apply(as_sent(frame), 2)
    partition.offset = 2
    partition.restart()
    await partition.settle()
    partition.clock.advance(HOUR_MS)
    await partition.cycle(["b"])
    await partition.settle()
    assert partition.of_interval(START_MS // HOUR_MS * HOUR_MS + HOUR_MS) == ["a", "b"]


async def test_a_deleted_model_stops_and_one_that_comes_back_goes_on_where_it_was() -> None:
    partition = Partition('every = "1h"')
    await partition.cycle([f"c{number}" for number in range(9)])
    await partition.settle()
    partition.clock.advance(HOUR_MS)
    await partition.cycle([])
    partition.runner.answer()
    await partition.cycle([])
    held = partition.plan
    partition.plan = compile_plan([], SCHEMA)
    await partition.cycle([])
    assert not partition.intervals.running
    assert len(partition.committed) == 3
    partition.plan = held
    await partition.settle()
    assert sorted(name for _, name in partition.committed) == [f"c{number}" for number in range(9)]


class SlowStore(MemoryStore):
    """Every read of a chunk takes 10 ms."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__()
        self._clock = clock
        self.read_at: list[float] = []

    def scan(self, after: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
        self.read_at.append(self._clock.monotonic())
        self._clock.advance(10)
        return super().scan(after, limit)


@pytest.mark.parametrize(("events", "rested_ms"), [(False, 400), (True, 1200)])
async def test_a_run_rests_longer_where_events_come_meanwhile(events: bool, rested_ms: int) -> None:
    partition = Partition('every = "1h"')
    store = partition.store = SlowStore(partition.clock)
    partition.restart()
    await partition.cycle([f"c{number}" for number in range(9)])
    await partition.settle()
    partition.clock.advance(HOUR_MS)
    store.read_at.clear()
    while len(store.read_at) < 3:
        await partition.cycle(["c1"] if events else [])
        while partition.runner.open:
            partition.runner.answer()
    (_, second, third) = store.read_at
    # Cycles are 100 ms apart.
    assert rested_ms - 1 <= (third - second) * 1000 - 10 <= rested_ms + 110
