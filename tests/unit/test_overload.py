"""Models that fall behind their bounds: every trigger ends once, in order, within bounds, whatever happens when."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np
from hypothesis import event, given, settings
from hypothesis import strategies as st

from node.backlog import Answer, Backlog, Bound, Settled
from node.kernel.clock import ManualClock
from node.kernel.errors import BoundExceeded
from node.kernel.limits import CHUNKS_IN_FLIGHT_PER_MODEL_MAX
from node.kernel.types import (
    FeatureRows,
    Frame,
    ModelName,
    ModelOutputs,
    ModelVersion,
    OverloadPolicy,
    SequenceChunk,
    Triggers,
)
from node.state.memory import MemoryStore
from node.triggers import run_triggers
from node.waiting import COMPACT_CHUNKS_MAX, COMPACT_ROWS_MIN
from replication.frame import FrameAssembler, encode_frame

NAMES = (ModelName("ads", "bid"), ModelName("ads", "slow"), ModelName("risk", "score"))
SHA = "a" * 64


class Runner:
    """Answers when the test says so; takes at most `room` submissions at once."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.open: deque[tuple[FeatureRows, asyncio.Future[ModelOutputs]]] = deque()

    def submit(self, version: ModelVersion, rows: FeatureRows) -> asyncio.Future[ModelOutputs]:
        self.open = deque(one for one in self.open if not one[1].cancelled())
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


def version(name: ModelName) -> ModelVersion:
    return ModelVersion(name, SHA, "b" * 64, ("buy",), ("x",), ("score",), "predict", 0, 1000)


def triggers(name: ModelName, first: int, customers: list[int]) -> Triggers:
    offsets = np.arange(first, first + len(customers), dtype=np.int64)
    rows = FeatureRows(("x",), offsets.astype(np.float64).reshape(-1, 1), {})
    zeros = np.zeros(len(customers), np.int64)
    return Triggers(name, SHA, tuple(f"c{one}" for one in customers), zeros, offsets, zeros, offsets, rows)


@dataclass
class Partition:
    """An owner with its store, the standby that folds its frames, and what came of every trigger."""

    bounds: dict[ModelName, Bound]
    room: int = 2
    clock: ManualClock = field(default_factory=lambda: ManualClock(1_000_000))
    store: MemoryStore = field(default_factory=MemoryStore)
    standby: MemoryStore = field(default_factory=MemoryStore)
    answered: dict[ModelName, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
    shed: Counter[str] = field(default_factory=Counter)
    sent: Counter[ModelName] = field(default_factory=Counter)
    commits: int = 0
    overlapping: bool = False
    """A commit ends only once the next cycle has been computed."""
    committing: Frame | None = None

    def __post_init__(self) -> None:
        self.runner = Runner(self.room)
        self.start()

    def start(self) -> None:
        self.runner.open.clear()
        self.backlog = Backlog(
            self.runner, self.store, lambda name, sha: version(name), self.bounds.__getitem__, self.clock
        )
        self.backlog.restore(self.store.chunks(100_000))
        self.backlog.pump()

    def restart(self) -> None:
        """What is committed is found in the changelog, though the store had not got it yet."""
        self.backlog.close()
        self._applied()
        self.start()

    async def cycle(self, work: list[tuple[ModelName, list[int]]], *, lost: bool = False) -> None:
        """One cycle; `lost`: it is killed before it commits, so that its events come again."""
        await asyncio.sleep(0)
        settled = self.backlog.settle()
        sent, asked = self.sent.copy(), []
        for name, customers in work:
            asked.append((version(name), triggers(name, sent[name], customers)))
            sent[name] += len(customers)
        outcome = await run_triggers(self.runner, self.backlog, asked, settled, 0.0)
        self._applied()
        if lost:
            self.restart()
            return
        self.committing = Frame(
            {"e": 1}, 0, [], np.zeros((0, 1)), None, outcome.appended, outcome.cursors, {}, outcome.removed
        )
        self._note(outcome.answers, outcome.shed)
        self.sent = sent
        if not self.overlapping:
            self._applied()

    def _applied(self) -> None:
        frame, self.committing = self.committing, None
        if frame is None:
            return
        self.commits += 1
        self.store.apply(frame, self.commits)
        (record,) = encode_frame(frame)
        folded = FrameAssembler().add(record)
        assert folded is not None
        self.standby.apply(folded, self.commits)
        self.backlog.stored(frame.appended)
        self.backlog.pump()

    def _note(self, answers: list[Answer], shed: Counter[str]) -> None:
        self.shed.update(shed)
        for answer in answers:
            offsets = answer.triggers.offsets.tolist()
            assert answer.outputs.values[:, 0].tolist() == offsets, "each answer is that of its own trigger"
            self.answered[answer.triggers.name] += zip(answer.triggers.customers, offsets, strict=True)

    async def drain(self) -> None:
        for _ in range(2000):
            if not any(line.entries for line in self.backlog._lines.values()):
                self._applied()
                return
            while self.runner.open:
                self.runner.answer(len(self.runner.open) - 1)
            await self.cycle([])
        raise AssertionError("the backlog does not get empty")

    def waiting(self, tenant: str) -> tuple[int, int]:
        lines = [line for line in self.backlog._lines.values() if line.name.tenant == tenant]
        return sum(line.rows for line in lines), sum(line.size_bytes for line in lines)

    def check(self) -> None:
        assert list(self.store.entries()) == list(self.standby.entries()), "owner = standby, row for row"
        for tenant in {name.tenant for name in NAMES}:
            bound = self.bounds[next(name for name in NAMES if name.tenant == tenant)]
            rows, size = self.waiting(tenant)
            assert rows <= bound.rows_max
            assert size <= bound.bytes_max
        for line in self.backlog._lines.values():
            waits = [entry for entry in line.entries if entry.waits]
            assert line.rows == sum(entry.rows for entry in line.entries)
            assert line.rows_superseded == sum(len(entry.superseded) for entry in waits)
            assert line.chunks_superseded == sum(not entry.rows for entry in waits)
            assert line.size_bytes == sum(entry.size_bytes for entry in line.entries)
            held = sum(entry.triggers is not None for entry in waits)
            assert held <= CHUNKS_IN_FLIGHT_PER_MODEL_MAX + (self.overlapping and 2 + COMPACT_CHUNKS_MAX)
            assert set(line.held) == {entry.number for entry in line.entries if entry.triggers is not None}
            if self.bounds[line.name].policy == "latest_per_customer":
                assert len(line.newest or ()) <= 2 * line.rows + COMPACT_ROWS_MIN


customers = st.lists(st.integers(0, 5), min_size=1, max_size=7)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("work"), st.integers(0, 2), customers),
        st.tuples(st.just("work"), st.integers(0, 2), customers),
        st.tuples(st.just("lost"), st.integers(0, 2), customers),
        st.tuples(st.just("answer"), st.integers(0, 9), st.just([])),
        st.tuples(st.just("restart"), st.just(0), st.just([])),
        st.tuples(st.just("time"), st.integers(0, 900), st.just([])),
    ),
    max_size=40,
)
policies = st.sampled_from(get_args(OverloadPolicy))


@settings(deadline=None, max_examples=300)
@given(
    steps, st.tuples(policies, policies, policies), st.integers(0, 3), st.integers(4, 40), st.integers(1000, 9000),
    st.sampled_from([500, 1 << 40]), st.booleans(),
)  # fmt: skip
def test_every_trigger_ends_once_in_order_and_within_bounds(
    run: list[tuple[str, int, list[int]]],
    chosen: tuple[OverloadPolicy, ...],
    room: int,
    rows_max: int,
    bytes_max: int,
    age_ms_max: int,
    overlapping: bool,
) -> None:
    bounds = {name: Bound(rows_max, policy, bytes_max, age_ms_max) for name, policy in zip(NAMES, chosen, strict=True)}
    asyncio.run(_every_trigger_ends(run, Partition(bounds, room, overlapping=overlapping)))


async def _every_trigger_ends(run: list[tuple[str, int, list[int]]], partition: Partition) -> None:
    for kind, number, some in run:
        match kind:
            case "work" | "lost":
                await partition.cycle([(NAMES[number], some)], lost=kind == "lost")
            case "answer" if partition.runner.open:
                partition.runner.answer(number % len(partition.runner.open))
                await partition.cycle([])
            case "restart":
                partition.restart()
            case "time":
                partition.clock.advance(number)
        partition.check()
    partition.runner.room = max(1, partition.runner.room)
    await partition.drain()
    partition.check()
    assert partition.store.chunks(10) == []
    for reason in {key.partition(" ")[0] for key in partition.shed}:
        event(f"shed: {reason}")
    for name in NAMES:
        answered = [offset for _, offset in partition.answered[name]]
        shed = sum(rows for key, rows in partition.shed.items() if key.endswith(f" {name}"))
        assert len(set(answered)) == len(answered), "none is answered twice"
        assert len(answered) + shed == partition.sent[name], "each is answered or counted as shed"
        if partition.bounds[name].policy != "latest_per_customer":
            assert answered == sorted(answered), "in order"
        of_customer: dict[str, list[int]] = defaultdict(list)
        for customer, offset in partition.answered[name]:
            of_customer[customer].append(offset)
        assert all(offsets == sorted(offsets) for offsets in of_customer.values()), "in order for each customer"


async def behind(policy: OverloadPolicy, rows_max: int = 100_000, **bound: int) -> Partition:
    """A partition whose first model has as many chunks in flight as it may, of customer 9."""
    partition = Partition(dict.fromkeys(NAMES, replace(Bound(rows_max, policy), **bound)), room=100)
    for _ in range(CHUNKS_IN_FLIGHT_PER_MODEL_MAX):
        await partition.cycle([(NAMES[0], [9])])
    return partition


def answers(partition: Partition, name: ModelName = NAMES[0]) -> list[int]:
    return [offset for _, offset in partition.answered[name]]


async def test_the_newest_trigger_of_each_customer_is_what_waits() -> None:
    partition = await behind("latest_per_customer")
    await partition.cycle([(NAMES[0], [1, 2, 1, 9])])  # 4 to 7; 4 is superseded at once
    await partition.cycle([(NAMES[0], [2, 3])])  # 8 and 9; 5 is superseded
    assert partition.backlog.rows == 4 + 4
    await partition.drain()
    assert answers(partition) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert partition.shed == {f"superseded {NAMES[0]}": 2}


async def test_after_a_restart_the_same_triggers_are_superseded() -> None:
    partition = await behind("latest_per_customer")
    await partition.cycle([(NAMES[0], [1, 2])])
    await partition.cycle([(NAMES[0], [2, 9])])
    partition.runner.room = 0
    partition.restart()
    partition.check()
    assert partition.backlog.rows == 3, "what was in flight waits again, so of customer 9 too only the newest stays"
    partition.runner.room = 100
    await partition.drain()
    assert answers(partition) == [4, 6, 7]
    assert partition.shed == {f"superseded {NAMES[0]}": 5}


async def test_a_dead_model_keeps_no_more_than_its_customers_need() -> None:
    partition = await behind("latest_per_customer")
    several = list(range(50))
    await partition.cycle([(NAMES[0], [*several, *range(100, 2100)])])
    for turn in range(400):
        await partition.cycle([(NAMES[0], several if turn % 2 else [turn % 50])])
        partition.check()
        stored = partition.store.chunks(10_000)
        kept = sum(len(chunk.triggers) for chunk in stored)
        assert kept <= 4 + 2 * 2050 + COMPACT_ROWS_MIN + 50
        assert len(stored) <= 4 + 64 + 51 + COMPACT_CHUNKS_MAX
    await partition.drain()
    assert len(answers(partition)) == 4 + 2050
    assert sum(partition.shed.values()) == partition.sent[NAMES[0]] - 2054


async def test_chunks_of_many_superseded_rows_are_written_again_without_them() -> None:
    partition = await behind("latest_per_customer")
    await partition.cycle([(NAMES[0], list(range(100, 2100)))])
    for _ in range(2):
        await partition.cycle([(NAMES[0], list(range(100, 1800)))])
    await partition.cycle([])
    sizes = [len(chunk.triggers) for chunk in partition.store.chunks(100)][CHUNKS_IN_FLIGHT_PER_MODEL_MAX:]
    assert sizes == [300, 1700]
    partition.check()
    await partition.cycle([(NAMES[0], [2000, 2001])])
    partition.restart()
    await partition.drain()
    assert partition.shed == {f"superseded {NAMES[0]}": 3402 + 3}
    newest = dict(partition.answered[NAMES[0]])
    assert newest["c2000"] == partition.sent[NAMES[0]] - 2
    assert newest["c100"] == 2004 + 1700


async def test_a_chunk_that_is_being_committed_stays_in_memory() -> None:
    partition = await behind("latest_per_customer")
    partition.overlapping = True
    await partition.cycle([(NAMES[0], list(range(100, 2100)))])
    await partition.cycle([(NAMES[0], list(range(100, stop))) for stop in (2100, 2000)])
    await partition.cycle([])
    await partition.cycle([])
    await partition.drain()
    assert len(answers(partition)) == 4 + 2000


async def test_who_has_most_waiting_makes_room_for_the_others_of_its_tenant() -> None:
    partition = await behind("shed_oldest", rows_max=20)
    await partition.cycle([(NAMES[0], [1] * 16)])
    partition.runner.room = 0
    await partition.cycle([(NAMES[1], [2, 3])])
    await partition.cycle([(NAMES[2], [2, 3])])
    assert partition.shed == {f"overload {NAMES[0]}": 2}
    for one, policy in enumerate(("shed_newest", "shed_oldest")):
        partition.bounds[NAMES[one]] = Bound(20, policy)  # type: ignore[arg-type]
    await partition.cycle([(NAMES[1], [2, 3])])
    assert partition.shed == {f"overload {NAMES[0]}": 18}, "the newest of the one that wants to keep its oldest"
    partition.check()


async def test_what_waits_too_long_is_shed() -> None:
    partition = await behind("shed_oldest", age_ms_max=1000)
    partition.clock.advance(600)
    await partition.cycle([(NAMES[0], [1, 2])])
    partition.clock.advance(500)
    await partition.cycle([])
    assert partition.shed == {f"age {NAMES[0]}": 4}
    statistics = partition.backlog.statistics(partition.clock.now_ms())[str(NAMES[0])]
    assert (statistics["rows"], statistics["waited_ms"]) == (2, 500)
    partition.restart()
    partition.clock.advance(501)
    await partition.cycle([])
    assert partition.shed == {f"age {NAMES[0]}": 6}
    assert partition.store.chunks(9) == []


async def test_bytes_are_bounded_and_a_chunk_that_is_over_alone_is_refused() -> None:
    partition = await behind("shed_oldest", bytes_max=3500)
    await partition.cycle([(NAMES[0], [1, 2])])
    await partition.cycle([(NAMES[0], list(range(10)))])
    assert partition.shed[f"bytes {NAMES[0]}"] > 0
    before = partition.shed[f"bytes {NAMES[0]}"]
    await partition.cycle([(NAMES[0], list(range(200)))])
    assert partition.shed[f"bytes {NAMES[0]}"] == before + 200
    partition.check()


async def test_a_policy_that_changes_while_triggers_wait_loses_none() -> None:
    partition = await behind("latest_per_customer")
    await partition.cycle([(NAMES[0], [1, 2])])
    await partition.cycle([(NAMES[0], [1])])
    partition.bounds[NAMES[0]] = Bound(100, "shed_oldest")
    await partition.cycle([(NAMES[0], [1, 1])])
    partition.bounds[NAMES[0]] = Bound(100, "latest_per_customer")
    await partition.cycle([(NAMES[0], [1, 2])])
    partition.check()
    await partition.drain()
    assert len(answers(partition)) + partition.shed[f"superseded {NAMES[0]}"] == partition.sent[NAMES[0]]
    assert sorted(answers(partition)) == answers(partition)


def test_a_chunk_of_an_earlier_release_counts_from_now() -> None:
    store, clock = MemoryStore(), ManualClock(5_000)
    chunk = SequenceChunk(3, triggers(NAMES[0], 0, [1]))
    store.apply(Frame({}, 0, [], np.zeros((0, 1)), appended=[chunk]), 1)
    backlog = Backlog(Runner(0), store, lambda name, sha: version(name), lambda name: Bound(10, age_ms_max=100), clock)
    backlog.restore(store.chunks(9))
    assert backlog.settle() == Settled()
    clock.advance(101)
    assert backlog.settle().shed == {f"age {NAMES[0]}": 1}
