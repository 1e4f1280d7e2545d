"""The sequence log's in-memory end: order within a model, bounds, and nothing lost or settled twice."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.backlog import Backlog, Settled
from node.kernel.clock import ManualClock
from node.kernel.errors import BoundExceeded
from node.kernel.limits import ROW_SLOTS_MAX
from node.kernel.types import (
    EventNames,
    FeatureRows,
    Frame,
    ModelName,
    ModelOutputs,
    ModelVersion,
    SequenceChunk,
    Triggers,
)
from node.state.memory import MemoryStore
from node.triggers import Outcome, run_triggers
from node.waiting import Bound

EVENTS = EventNames.of(["events"], ["buy"])
NAMES = (ModelName("ads", "bid"), ModelName("risk", "score"))


class ManualRunner:
    """Answers when the test says so; takes at most `room` submissions at once."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.open: deque[tuple[FeatureRows, asyncio.Future[ModelOutputs]]] = deque()

    def submit(self, version: ModelVersion, rows: FeatureRows) -> asyncio.Future[ModelOutputs]:
        if len(self.open) >= self.room:
            raise BoundExceeded("full")
        future = asyncio.get_running_loop().create_future()
        self.open.append((rows, future))
        return future

    def rows_queued_max(self, name: ModelName) -> int:
        return self.room

    def answer(self, position: int) -> None:
        rows, future = self.open[position]
        del self.open[position]
        if not future.cancelled():
            future.set_result(ModelOutputs(rows.numbers[:, :1].copy()))


def version(name: ModelName, sha: str = "a" * 64) -> ModelVersion:
    return ModelVersion(name, sha, "b" * 64, ("buy",), ("x",), ("score",), "predict", 0, 1000)


def backlog_of(runner: ManualRunner, store: MemoryStore, clock: ManualClock | None = None) -> Backlog:
    return Backlog(
        runner, store, lambda name, sha: version(name, sha), lambda _: Bound(10_000), EVENTS, clock or ManualClock()
    )


def triggers(name: ModelName, first: int, count: int, sha: str = "a" * 64) -> Triggers:
    numbers = np.arange(first, first + count, dtype=np.int64)
    rows = FeatureRows(("x",), numbers.astype(np.float64).reshape(-1, 1))
    zeros = np.zeros(count, np.int64)
    return Triggers(name, sha, tuple(f"c{n}" for n in numbers), zeros, numbers, zeros, numbers, rows)


def commit(store: MemoryStore, outcome: Outcome | Settled, offset: int, appended: list[SequenceChunk]) -> None:
    frame = Frame({"events": offset}, 0, [], np.zeros((0, 1)), appended=appended, cursors=outcome.cursors)
    store.apply(frame, offset)


@st.composite
def plans(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    step = st.tuples(st.sampled_from(["work", "answer", "restart"]), st.integers(0, 1), st.integers(0, 7))
    return draw(st.lists(step, max_size=40))


@settings(deadline=None)
@given(plans(), st.integers(1, 4))
def test_every_trigger_is_answered_once_and_in_order(steps: list[tuple[str, int, int]], room: int) -> None:
    asyncio.run(_every_trigger(steps, room))


async def _every_trigger(steps: list[tuple[str, int, int]], room: int) -> None:
    store, runner = MemoryStore(), ManualRunner(room)
    answered: dict[ModelName, list[int]] = {name: [] for name in NAMES}
    submitted = dict.fromkeys(NAMES, 0)
    offset = 0

    def fresh() -> Backlog:
        made = backlog_of(runner, store)
        made.restore(store.chunks(10_000))
        made.pump()
        return made

    async def cycle(work: list[tuple[ModelVersion, Triggers]]) -> None:
        nonlocal offset
        await asyncio.sleep(0)
        settled = backlog.settle()
        outcome = await run_triggers(backlog, work, settled, 0.0)
        offset += 1
        commit(store, outcome, offset, outcome.appended)
        for answer in outcome.answers:
            answered[answer.triggers.name] += answer.triggers.offsets.tolist()
        backlog.stored(outcome.appended)
        backlog.pump()

    backlog = fresh()
    for kind, which, amount in steps:
        name = NAMES[which]
        if kind == "work" and amount:
            await cycle([(version(name), triggers(name, submitted[name], amount))])
            submitted[name] += amount
        elif kind == "answer" and runner.open:
            runner.answer(amount % len(runner.open))
            await cycle([])
        elif kind == "restart":
            backlog.close()
            runner.open.clear()
            backlog = fresh()
    for _ in range(1000):
        if not backlog.rows:
            break
        while runner.open:
            runner.answer(len(runner.open) - 1)
        await cycle([])
    for name in NAMES:
        assert answered[name] == list(range(submitted[name]))
    assert store.chunks(10) == []


@pytest.mark.parametrize(("policy", "left"), [("shed_oldest", [4, 5, 6, 7]), ("shed_newest", [0, 1, 2, 3])])
async def test_over_its_bound_a_line_sheds_by_policy_and_counts(policy: str, left: list[int]) -> None:
    store, name = MemoryStore(), NAMES[0]
    bound = Bound(4, policy)  # type: ignore[arg-type]
    backlog = Backlog(ManualRunner(0), store, lambda *_: version(name), lambda _: bound, EVENTS, ManualClock())
    settled = Settled()
    chunks = [backlog.append(version(name), triggers(name, first, 4), None, settled) for first in (0, 4)]
    commit(store, settled, 1, [chunk for chunk in chunks if chunk is not None])
    assert settled.shed == {f"overload {name}": 4}
    assert [offset for chunk in store.chunks(9) for offset in chunk.triggers.offsets.tolist()] == left
    assert backlog.rows == 4


async def test_of_wide_rows_few_late_answers_are_settled_at_once_and_each_model_s_in_its_turn() -> None:
    store, runner = MemoryStore(), ManualRunner()
    backlog, outcome = backlog_of(runner, store), Outcome()
    for name in NAMES:
        for first in range(0, 4000, 1000):
            chunk = backlog.append(version(name), triggers(name, first, 1000), None, outcome)
            assert chunk is not None
            outcome.appended.append(chunk)
    commit(store, outcome, 1, outcome.appended)
    backlog.pump()
    while runner.open:
        runner.answer(0)
    turns = [backlog.settle(ROW_SLOTS_MAX).answers for _ in range(4)]
    assert [[(answer.triggers.name, len(answer.triggers)) for answer in turn] for turn in turns] == [
        [(name, 1000), (name, 1000)] for name in (*NAMES, *NAMES)
    ]
    assert backlog.empty


async def test_a_line_that_nothing_waits_in_is_forgotten_once_its_cursor_is_in_a_frame() -> None:
    store, runner, name = MemoryStore(), ManualRunner(), NAMES[0]
    backlog, answered = backlog_of(runner, store), []
    canary = replace(triggers(name, 0, 2), line="c" * 12)
    for offset, work in enumerate([canary, triggers(name, 5, 1), None, triggers(name, 6, 1), None, None, None]):
        settled = backlog.settle()
        outcome = await run_triggers(backlog, [] if work is None else [(version(name), work)], settled, 0.0)
        answered += [number for answer in outcome.answers for number in answer.triggers.offsets.tolist()]
        commit(store, outcome, offset + 1, outcome.appended)
        backlog.stored(outcome.appended)
        backlog.pump()
        if runner.open:
            runner.answer(0)
    assert answered == [0, 1, 5, 6]
    assert store.chunks(10) == []
    assert (backlog._lines, backlog._tenants) == ({}, {})


async def test_triggers_of_a_deleted_model_are_shed_and_counted() -> None:
    store, name = MemoryStore(), NAMES[0]
    backlog = Backlog(ManualRunner(), store, lambda *_: None, lambda _: Bound(100), EVENTS, ManualClock())
    appended = Settled()
    chunk = backlog.append(version(name), triggers(name, 0, 3), None, appended)
    assert chunk is not None
    commit(store, appended, 1, [chunk])
    backlog.pump()
    assert backlog.changed.is_set()
    settled = backlog.settle()
    assert settled.shed == {f"deleted {name}": 3}
    commit(store, settled, 2, [])
    assert store.chunks(9) == []


async def test_a_commit_waits_for_no_model_that_is_behind() -> None:
    runner, (slow, quick) = ManualRunner(), NAMES
    backlog = backlog_of(runner, MemoryStore())
    await run_triggers(backlog, [(version(slow), triggers(slow, 0, 1))], Settled(), 0.0)
    work = [(version(name), triggers(name, 1, 1)) for name in NAMES]
    cycle = asyncio.ensure_future(run_triggers(backlog, work, backlog.settle(), 3600.0))
    await asyncio.sleep(0)  # all are handed in before it waits for any
    runner.answer(2)
    outcome = await asyncio.wait_for(cycle, 10)
    assert [answer.triggers.name for answer in outcome.answers] == [quick]
    assert [chunk.triggers.name for chunk in outcome.appended] == [slow]


async def test_a_commit_waits_for_no_slow_model_while_quick_ones_of_another_tenant_wait_with_it() -> None:
    clock, runner, (slow, quick) = ManualClock(), ManualRunner(), NAMES
    backlog = backlog_of(runner, MemoryStore(), clock)

    async def cycle(names: tuple[ModelName, ...], answered: ModelName, after: float) -> list[ModelName]:
        work = [(version(name), triggers(name, 0, 1)) for name in names]
        running = asyncio.ensure_future(run_triggers(backlog, work, backlog.settle(), 1.0))
        await asyncio.sleep(0)
        clock.advance(after)
        runner.answer(names.index(answered))
        outcome = await asyncio.wait_for(running, 10)
        while runner.open:
            runner.answer(0)
        await asyncio.sleep(0)
        return [answer.triggers.name for answer in outcome.answers]

    assert await cycle((slow,), slow, 0.5) == [slow], "alone, it is waited for"
    assert await cycle((slow,), slow, 0.5) == [slow], "and again"
    assert await cycle((slow, quick), quick, 0.0) == [quick]
