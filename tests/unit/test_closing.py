"""Closed sessions trigger once each, with what they held when they closed, whatever is killed between any two steps."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import UTC

import numpy as np
import pytest
from frame_support import as_sent
from hypothesis import given, settings
from hypothesis import strategies as st

import node.intervals
from node.backlog import Answer
from node.closing import Closed, RoundFold, close_idle, session_triggers
from node.inferences import encode_inferences
from node.intervals import Intervals, Ran
from node.kernel.chunks import decode_chunk, encode_chunk
from node.kernel.clock import ManualClock
from node.kernel.ports import FeaturePlan
from node.kernel.tables import NO_TABLES
from node.kernel.types import (
    Bools,
    EventColumns,
    EventSchema,
    FeatureRows,
    Floats,
    Frame,
    ModelName,
    ModelOutputs,
    ModelVersion,
    SequenceChunk,
)
from node.schedule import newest_interval
from node.state.codec import images, unpack
from node.state.fold import FoldResult, filters_of, fold
from node.state.layout import Layout
from node.state.memory import MemoryStore
from node.training.fed_rows import FedRows, decode, encode_rows, event_ids
from tenants.features import compile_plan
from tenants.manifest import parse_manifest

SCHEMA = EventSchema(("view", "buy"), {"amount": "number"})
MINUTE_MS = 60_000
START_MS = 30_000_000 * MINUTE_MS
GAPS = {"short": 3 * MINUTE_MS, "long": 10 * MINUTE_MS}
FEATURES = """
[features]
events = "count(any, session='{gap}m')"
spent = "sum(buy.amount, session='{gap}m')"
ever = "profile.events"
lasted = "max(any.time, session='{gap}m') - min(any.time, session='{gap}m')"
"""


class NoRunner:
    """Sessions wait in no queue of the runner before they have closed."""

    def submit(self, version: ModelVersion, rows: FeatureRows, priority: int = 0) -> asyncio.Future[ModelOutputs]:
        raise AssertionError(version)

    def rows_queued_max(self, name: ModelName) -> int:
        return 3


def plan(*models: str, head: str = "") -> FeaturePlan:
    compiled = []
    for model in models:
        gap = GAPS[model] // MINUTE_MS
        text = f"session = '{gap}m'\nevery = '2m'\n{head}{FEATURES.format(gap=gap)}"
        manifest = parse_manifest("m.toml", "shop", model, text.encode(), SCHEMA)
        compiled.append((manifest.version("0" * 64), manifest))
    return compile_plan(compiled, SCHEMA)


Seen = tuple[str, int, int]
"""Customer, minute (of START_MS) and amount of an event; none: a view."""


def columns(events: list[Seen]) -> EventColumns:
    names = list(dict.fromkeys(name for name, _, _ in events))
    zeros = np.zeros(len(events), np.int64)
    return EventColumns(
        np.array([amount > 0 for _, _, amount in events], np.int64),
        np.array([START_MS + minute * MINUTE_MS for _, minute, _ in events], np.int64),
        np.array([names.index(name) for name, _, _ in events], np.int64),
        names,
        zeros,
        np.arange(len(events)),
        {"amount": np.array([float(amount) for _, _, amount in events])},
    )


@dataclass
class Session:
    """Of the plain program: what a session holds."""

    began: int
    newest: int
    first: int
    events: int = 0
    spent: int = 0
    run: bool = False


@dataclass
class Program:
    """One customer's sessions of one gap, event by event."""

    gap: int
    ever: int = 0
    session: Session | None = None
    ended: list[tuple[Session, int]] = field(default_factory=list)
    """Those that an event of this batch has ended, and how many events there had been by then."""

    def see(self, minute: int, amount: int) -> None:
        held = self.session
        if held is None or minute > held.newest + self.gap:
            if held is not None:
                self.ended.append((held, self.ever))
            held = self.session = Session(minute, minute, minute)
        self.ever += 1
        if minute < held.began - self.gap:
            return
        held.newest, held.first = max(held.newest, minute), min(held.first, minute)
        held.events += 1
        held.spent += amount


class Partition:
    """What a cycle does with sessions, on a store that keeps only what was committed; and the plain program beside."""

    def __init__(self, feature_plan: FeaturePlan) -> None:
        self.plan = feature_plan
        self.models = feature_plan.models
        self.clock = ManualClock(START_MS + 10**9)
        self.store = MemoryStore()
        self.layout = Layout.empty().grown(feature_plan.aggregates, feature_plan.stored_models)
        self.programs: dict[tuple[str, str], Program] = {}
        self.triggered: Counter[tuple[str, str, int]] = Counter()
        self.newest, self.offset = 0, 0
        self.restart()

    def restart(self) -> None:
        """As after kill -9: only the store is left."""
        self.intervals = Intervals(NoRunner(), self.store, self.clock, 0)

    def cycle(self, seen: list[Seen], killed: bool = False) -> None:
        """One cycle; `killed`: just before its commit."""
        ran = self.intervals.settle()
        if seen or ran.due:
            self._fold_and_commit(seen, ran, killed)
        elif killed:
            self.restart()
        if not killed:
            self.clock.advance(100)
            self.intervals.pump(self.plan, self.layout)

    def _fold_and_commit(self, seen: list[Seen], ran: Ran, killed: bool) -> None:
        events = columns(seen)
        named = list(dict.fromkeys([*events.customers, *(name for one in ran.idle for name in one.customers)]))
        rows = unpack(self.layout, self.store.load([name.encode() for name in named]))
        whole = rows.copy()
        wanted = np.arange(len(events)) % 3 < 2
        found = self.intervals.closers(self.plan, self.layout)
        folding = RoundFold(found, rows, events, wanted, self._fold)
        for _ in folding.rounds():
            pass
        self._same_as_at_once(folding.result, rows, self._fold(whole, events, wanted), whole)
        idle = close_idle(found, ran.idle, rows, {name: at for at, name in enumerate(named)})
        runs, event_time_ms = self.intervals.committing(events, Counter())
        if killed:
            self.restart()
            return
        self._commit(Frame({}, self.layout.id, [name.encode() for name in named], images(rows), self.layout.encode(),
                           runs=runs, event_time_ms=event_time_ms))  # fmt: skip
        self._check(seen, folding.closed, idle)

    def _fold(self, rows: Floats, events: EventColumns, wanted: Bools) -> FoldResult:
        masks = self.plan.masks(events, filters_of(self.layout, events, SCHEMA.types))
        return fold(self.layout, rows, events, masks, wanted, SCHEMA.types)

    def _same_as_at_once(self, folded: FoldResult, rows: Floats, expected: FoldResult, whole: Floats) -> None:
        assert folded.late == expected.late
        assert {str(one): values.tobytes() for one, values in folded.values.items()} == {
            str(one): values.tobytes() for one, values in expected.values.items()
        }
        but_marks = np.setdiff1d(np.arange(len(rows)), list(self.layout.marks.values()))
        assert rows[but_marks].tobytes() == whole[but_marks].tobytes()

    def _commit(self, frame: Frame) -> None:
        self.offset += 1
        self.store.apply(as_sent(frame), self.offset)

    def _for(self, model: str, session: Session, gap: int) -> bool:
        """Whether it is the model's: it is seen, and the session had not ended by then."""
        run = self.store.runs().get(model)
        return run is not None and START_MS + (session.newest + gap) * MINUTE_MS > run.since_ms

    def left(self) -> list[tuple[str, str]]:
        """Sessions that have not triggered, but of the customer whose event is the newest."""
        return [
            key
            for key, one in self.programs.items()
            if key[1] != "zero" and one.session and not one.session.run and self._for(key[0], one.session, one.gap)
        ]

    def _check(self, seen: list[Seen], closed: list[Closed], idle: list[Closed]) -> None:
        found = self._found(closed)
        for version in self.models:
            gap = version.schedule.gap_ms // MINUTE_MS if version.schedule is not None else 0
            for customer, minute, amount in seen:
                self.programs.setdefault((str(version.name), customer), Program(gap)).see(minute, amount)
        expected = []
        for (name, customer), program in self.programs.items():
            for session, ever in program.ended:
                if not session.run and self._for(name, session, program.gap):
                    expected.append((name, customer, *values_of(session, ever)))
            program.ended.clear()
        assert sorted(found) == sorted(expected)
        self.newest = max([self.newest, *(minute for _, minute, _ in seen)])
        for name, customer, *values in self._found(idle):
            program = self.programs[name, customer]
            assert program.session is not None
            assert not program.session.run
            assert values == [*values_of(program.session, program.ever)]
            assert program.session.newest + program.gap < self.newest
            program.session.run = True

    def _found(self, closed: list[Closed]) -> list[tuple[str, str, int, int, tuple[float, ...]]]:
        found = []
        for _, triggers in session_triggers(self.plan, self.layout, closed, NO_TABLES):
            assert triggers.kind == "session"
            for at, customer in enumerate(triggers.customers):
                began = (int(triggers.offsets[at]) - START_MS) // MINUTE_MS
                newest = (int(triggers.times_ms[at]) - START_MS) // MINUTE_MS
                self.triggered[str(triggers.name), customer, began] += 1
                found.append((str(triggers.name), customer, began, newest, tuple(triggers.rows.numbers[at].tolist())))
        return found

    def look(self) -> None:
        """Until the runs that are due are through."""
        for _ in range(400):
            self.cycle([])
            runs, now_ms = self.store.runs(), self.store.event_time_ms()
            newest = [
                newest_interval(one.schedule, now_ms, UTC).number == runs[str(one.name)].number
                for one in self.plan.models
                if one.schedule is not None and str(one.name) in runs
            ]
            if len(newest) == len(self.plan.models) and all(newest) and all(run.finished for run in runs.values()):
                return
        raise AssertionError(f"never done: {self.store.runs()}")


def values_of(session: Session, ever: int) -> tuple[int, int, tuple[float, ...]]:
    lasted = (session.newest - session.first) * 60.0
    return session.began, session.newest, (session.events, session.spent, ever, lasted)


steps = st.lists(
    st.tuples(
        st.sampled_from(["cycle", "cycle", "look", "kill", "kill at commit"]),
        st.lists(
            st.tuples(st.sampled_from("abcdefg"), st.sampled_from([-14, -4, 0, 1, 1, 2, 3, 5, 11]), st.integers(0, 3)),
            max_size=12,
        ),
    ),
    max_size=25,
)


@pytest.mark.parametrize("models", [("long",), ("long", "short")])
def test_each_session_triggers_once_whatever_is_killed(models: tuple[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.intervals, "INTERVAL_SCAN_ROWS_MAX", 4)

    @settings(deadline=None, max_examples=60)
    @given(steps)
    def prove(taken: list[tuple[str, list[Seen]]]) -> None:
        partition, minute = Partition(plan(*models)), 20
        partition.cycle([("zero", minute, 0)])
        partition.look()
        for kind, moves in taken:
            if kind == "kill":
                partition.restart()
            if kind == "look":
                partition.look()
            seen = []
            for name, passed, amount in moves:
                seen.append((name, minute + passed, amount))
                minute = max(minute, minute + passed)
            killed = kind == "kill at commit"
            partition.cycle(seen, killed)
            if killed:
                partition.cycle(seen)
        # Long after, all that is left has closed.
        partition.cycle([("zero", minute + 100, 0)])
        partition.look()
        assert not [key for key, count in partition.triggered.items() if count > 1]
        assert not partition.left()

    prove()


def test_a_model_gets_no_session_that_had_ended_before_it_came() -> None:
    partition = Partition(plan("long"))
    held, partition.plan = partition.plan, compile_plan([], SCHEMA)
    partition.cycle([("a", 0, 1), ("b", 35, 1)])
    partition.plan = held
    partition.cycle([("c", 40, 1)])
    partition.look()
    partition.cycle([("a", 45, 1), ("c", 46, 1)])
    partition.cycle([("c", 100, 0)])
    partition.look()
    long = "shop/long"
    assert partition.triggered == {(long, "a", 45): 1, (long, "b", 35): 1, (long, "c", 40): 1}


@pytest.mark.parametrize("comes_later", [False, True])
def test_an_event_ahead_of_the_clock_ends_no_session_and_none_that_follows_is_lost(comes_later: bool) -> None:
    partition = Partition(plan("long"))
    partition.clock = ManualClock(START_MS + 4 * MINUTE_MS)
    partition.restart()
    held, nothing = partition.plan, compile_plan([], SCHEMA)
    partition.plan = nothing if comes_later else held
    partition.cycle([("a", 0, 1), ("b", 2, 1)])
    partition.cycle([("astray", 1440, 1)])
    partition.plan = held
    partition.cycle([("a", 4, 1)])
    partition.look()
    assert not partition.triggered
    for minute in (30, 60):
        partition.clock.advance(minute * MINUTE_MS + START_MS - partition.clock.now_ms())
        partition.cycle([("a", minute, 1)])
        partition.look()
    long = "shop/long"
    assert partition.triggered == {(long, "a", 0): 1, (long, "b", 2): 1, (long, "a", 30): 1}


def test_grace_keeps_a_session_open_for_events_that_come_late() -> None:
    partition = Partition(plan("long", head="grace = '20m'\n"))
    partition.cycle([("zero", 0, 0)])
    partition.look()
    partition.cycle([("a", 30, 1)])
    partition.cycle([("zero", 59, 0)])
    partition.look()
    assert not [key for key in partition.triggered if key[1] == "a"]
    partition.cycle([("a", 35, 1)])
    partition.cycle([("zero", 68, 0)])
    partition.look()
    assert ("shop/long", "a", 30) in partition.triggered


def test_a_session_is_named_by_when_it_began_in_inferences_chunks_and_training_rows() -> None:
    partition = Partition(plan("short"))
    partition.cycle([("zero", 0, 0)])
    partition.look()
    found = partition.intervals.closers(partition.plan, partition.layout)
    rows = unpack(partition.layout, [None, None])
    events = columns([("a", 9, 1), ("b", 9, 2), ("a", 10, 4), ("a", 20, 1)])
    folding = RoundFold(found, rows, events, np.zeros(4, np.bool_), partition._fold)
    assert list(folding.rounds()) == [1]
    ((version, triggers),) = session_triggers(partition.plan, partition.layout, folding.closed, NO_TABLES)
    outputs = ModelOutputs(np.ones((1, len(version.outputs))))
    began, newest = START_MS + 9 * MINUTE_MS, START_MS + 10 * MINUTE_MS
    ((key, record),) = encode_inferences(version, triggers, outputs, 7)
    assert key == b"a"
    named = f"shop/short/session/{began}/a"
    assert f'{{"id":"{named}",'.encode() in record
    assert f'"customer":"a","session":{began},"partition":7,"time":{newest},'.encode() in record
    assert b"answered_by" not in record
    ((_, record),) = encode_inferences(replace(version, version="cd" * 32), triggers, outputs, 7)
    assert f'"version":"{triggers.version}"'.encode() in record
    assert f'"answered_by":"{"cd" * 32}","outputs"'.encode() in record
    read = decode_chunk(encode_chunk(SequenceChunk(3, triggers))).triggers
    assert (read.kind, read.moments.tolist(), read.times_ms.tolist()) == ("session", [began], [newest])
    answer = Answer(version, triggers, outputs)
    fed = decode(encode_rows(FedRows(1, answer.triggers, version, outputs)))
    assert isinstance(fed, FedRows)
    assert event_ids(fed, 7) == [named]
