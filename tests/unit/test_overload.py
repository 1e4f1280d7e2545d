"""Models that fall behind their bounds: what is shed, by which policy, and that each trigger ends exactly once."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node import waiting as waiting_module
from node.backlog import Backlog, Settled
from node.kernel.chunks import decode_chunk, encode_chunk
from node.kernel.clock import ManualClock
from node.kernel.errors import BoundExceeded
from node.kernel.types import (
    EventNames,
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
from node.waiting import Bound, row_bytes
from replication.frame import FrameAssembler, encode_frame

EVENTS = EventNames.of(["events"], ["buy"])
NAMES = (ModelName("ads", "bid"), ModelName("ads", "rank"), ModelName("risk", "score"))
SWEPT_ROWS_MIN, SWEPT_CHUNKS, PASSED_CHUNKS_MAX = 3, 4, 2
PIECE_MAX = 8
Sizes = tuple[int, int, int]


class ManualRunner:
    """Answers when the test says so; takes at most `room` submissions at once."""

    def __init__(self, room: int = 100) -> None:
        self.room = room
        self.open: deque[tuple[ModelName, FeatureRows, asyncio.Future[ModelOutputs]]] = deque()

    def submit(self, version: ModelVersion, rows: FeatureRows) -> asyncio.Future[ModelOutputs]:
        self.open = deque(call for call in self.open if not call[2].cancelled())
        if sum(name == version.name for name, _, _ in self.open) >= self.room:
            raise BoundExceeded("full")
        future = asyncio.get_running_loop().create_future()
        self.open.append((version.name, rows, future))
        return future

    def rows_queued_max(self, name: ModelName) -> int:
        return self.room

    def answer(self, position: int) -> None:
        _, rows, future = self.open[position]
        del self.open[position]
        if not future.cancelled():
            future.set_result(ModelOutputs(rows.numbers[:, :1].copy()))


def version(name: ModelName) -> ModelVersion:
    return ModelVersion(name, "a" * 64, "b" * 64, ("buy",), ("x",), ("score",), "predict", 0, 1000)


def customer(offset: int, customers: int) -> str:
    return f"c{offset * offset % customers}"


def triggers(name: ModelName, first: int, count: int, customers: int = 1_000_000) -> Triggers:
    numbers = np.arange(first, first + count, dtype=np.int64)
    rows = FeatureRows(("x", "t"), np.stack([numbers, numbers], 1).astype(np.float64), {"t": [f"{n}" for n in numbers]})
    zeros = np.zeros(count, np.int64)
    named = tuple(customer(int(n), customers) for n in numbers)
    return Triggers(name, "a" * 64, named, zeros, numbers, zeros, numbers, rows)


@dataclass
class Scene:
    """A partition with its runner, store and a standby; what a reader of its commits has seen is kept beside it."""

    policies: tuple[OverloadPolicy, ...]
    rows_max: int
    age_ms_max: int
    customers: int
    room: int
    clock: ManualClock = field(default_factory=lambda: ManualClock(1_000_000))
    store: MemoryStore = field(default_factory=MemoryStore)
    standby: MemoryStore = field(default_factory=MemoryStore)
    submitted: dict[ModelName, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))
    answered: dict[ModelName, list[int]] = field(default_factory=lambda: {name: [] for name in NAMES})
    shed: Counter[str] = field(default_factory=Counter)
    offset: int = 0
    put: int = 0
    """Chunks in the newest commit."""

    def __post_init__(self) -> None:
        self.runner = ManualRunner(self.room)
        self.restart()

    def bound(self, name: ModelName) -> Bound:
        return Bound(self.rows_max, self.policies[NAMES.index(name)], 1 << 40, self.age_ms_max)

    def restart(self) -> None:
        if self.offset:
            self.backlog.close()
        self.runner.open.clear()
        self.backlog = Backlog(self.runner, self.store, lambda name, _: version(name), self.bound, EVENTS, self.clock)
        self.backlog.restore(self.store.chunks(100_000))
        self.backlog.pump()

    async def cycle(self, sizes: Sizes = (0, 0, 0), *, lost: bool = False) -> None:
        """One cycle; its commit is `lost` with the process if asked for, and the source gives its events again."""
        await asyncio.sleep(0)
        self.clock.advance(10)
        settled = self.backlog.settle()
        work = [
            (version(name), triggers(name, self.submitted[name], size, self.customers))
            for name, size in zip(NAMES, sizes, strict=True)
            if size
        ]
        outcome = await run_triggers(self.backlog, work, settled, 0.0)
        if lost:
            self.restart()
            return
        self.offset += 1
        frame = Frame(
            {"events": self.offset}, 0, [], np.zeros((0, 1)), appended=outcome.appended, cursors=outcome.cursors
        )
        self._commit(frame)
        self.put = len(frame.appended)
        self.shed.update(outcome.shed)
        for name, size in zip(NAMES, sizes, strict=True):
            self.submitted[name] += size
        for answer in outcome.answers:
            assert answer.outputs.values[:, 0].tolist() == answer.triggers.offsets.tolist(), "the answer to this"
            self.answered[answer.triggers.name] += answer.triggers.offsets.tolist()
        self.backlog.stored(outcome.appended)
        self.backlog.pump()
        self.check_bounds()

    def _commit(self, frame: Frame) -> None:
        self.store.apply(frame, self.offset)
        assembler = FrameAssembler()
        decoded = [assembler.add(record) for record in encode_frame(frame)][-1]
        assert decoded is not None
        for _ in range(2):  # folding a frame twice changes nothing
            self.standby.apply(decoded, self.offset)
        assert list(self.standby.entries()) == list(self.store.entries())

    def check_bounds(self) -> None:
        waiting: Counter[str] = Counter()
        stored: Counter[str] = Counter()
        for line, figures in self.backlog.statistics(self.clock.now_ms()).items():
            waiting[line.split("/")[0]] += figures["rows"]
        for chunk in self.store.chunks(100_000):
            stored[chunk.triggers.name.tenant] += len(chunk.triggers)
        for tenant in ("ads", "risk"):
            lines = sum(name.tenant == tenant for name in NAMES)
            assert waiting[tenant] <= self.rows_max
            # Given up and not swept: as many as wait and a few, and what a cycle's arrivals have pushed out since.
            assert stored[tenant] <= 2 * self.rows_max + lines * (SWEPT_ROWS_MIN + 2 * PIECE_MAX)
        assert self.backlog.rows == sum(waiting.values())
        for kept in self.backlog._lines.values():
            entries = list(kept.entries)
            assert [one.number for one in entries] == list(range(kept.next_number - len(entries), kept.next_number))
            assert [one for one in kept.idle if one.live] == [one for one in entries if not one.answering and one.live]
            assert kept.working == [one for one in entries if one.answering and one.live]

    async def drain(self) -> None:
        for _ in range(500):
            if not self.store.chunks(1) and not self.backlog.rows:
                return
            while self.runner.open:
                self.runner.answer(len(self.runner.open) - 1)
            await self.cycle()
        raise AssertionError("it never caught up")

    def check_end(self) -> None:
        for name, policy in zip(NAMES, self.policies, strict=True):
            shed = {what: rows for what, rows in self.shed.items() if what.endswith(f" {name}")}
            answered = self.answered[name]
            assert len(answered) == len(set(answered)), "no trigger is answered twice"
            assert len(answered) + sum(shed.values()) == self.submitted[name], "each is answered or counted"
            assert set(answered) <= set(range(self.submitted[name]))
            of_customer: defaultdict[str, list[int]] = defaultdict(list)
            for offset in answered:
                of_customer[customer(offset, self.customers)].append(offset)
            assert all(offsets == sorted(offsets) for offsets in of_customer.values()), "in each customer's order"
            if set(shed) <= {f"superseded {name}"}:
                newest = {customer(offset, self.customers): offset for offset in range(self.submitted[name])}
                assert set(newest.values()) <= set(answered), "only what a newer one of its customer replaced went"
            if policy != "latest_per_customer":
                assert f"superseded {name}" not in shed
            if not self.age_ms_max:
                assert f"age {name}" not in shed


@contextlib.contextmanager
def small_sweeps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waiting_module, "WAITING_SWEPT_ROWS_MIN", SWEPT_ROWS_MIN)
        patch.setattr(waiting_module, "WAITING_PASSED_CHUNKS_MAX", PASSED_CHUNKS_MAX)
        patch.setattr(waiting_module, "WAITING_SWEPT_CHUNKS", SWEPT_CHUNKS)
        yield


sizes = st.tuples(*(st.integers(0, PIECE_MAX) for _ in NAMES))
steps = st.one_of(
    st.tuples(st.just("work"), sizes),
    st.tuples(st.just("work"), sizes),
    st.tuples(st.just("lost"), sizes),
    st.tuples(st.just("answer"), st.integers(0, 20)),
    st.tuples(st.just("wait"), st.integers(1, 300)),
    st.tuples(st.just("restart"), st.just(0)),
)
policies = st.tuples(*(st.sampled_from(["shed_oldest", "shed_newest", "latest_per_customer"]) for _ in NAMES))


@settings(deadline=None, max_examples=300)
@given(
    st.lists(steps, max_size=50), policies, st.integers(PIECE_MAX, 40), st.sampled_from([0, 200]), st.integers(1, 9),
    st.integers(0, 4),
)  # fmt: skip
def test_each_trigger_ends_once_within_bounds_and_in_order(
    run: list[tuple[str, object]],
    chosen: tuple[OverloadPolicy, ...],
    rows_max: int,
    age_ms_max: int,
    customers: int,
    room: int,
) -> None:
    asyncio.run(_each_trigger(run, Scene, chosen, rows_max, age_ms_max, customers, room))


async def _each_trigger(run: list[tuple[str, object]], scene_of: type[Scene], *figures: object) -> None:
    with small_sweeps():
        scene = scene_of(*figures)  # type: ignore[arg-type]
        for step in run:
            match step:
                case ("work", (int(one), int(two), int(three))):
                    await scene.cycle((one, two, three))
                case ("lost", (int(one), int(two), int(three))):
                    await scene.cycle((one, two, three), lost=True)
                case ("answer", int(position)) if scene.runner.open:
                    scene.runner.answer(position % len(scene.runner.open))
                case ("wait", int(elapsed_ms)):
                    scene.clock.advance(elapsed_ms)
                case ("restart", _):
                    scene.restart()
        scene.runner.room = max(1, scene.runner.room)
        await scene.drain()
        scene.check_end()


def backlog_of(*bounds: Bound, clock: ManualClock | None = None, room: int = 0) -> tuple[Backlog, MemoryStore]:
    store = MemoryStore()
    found = dict(zip(NAMES, bounds, strict=False))
    runner = ManualRunner(room)
    clock = clock or ManualClock()
    return Backlog(runner, store, lambda name, _: version(name), lambda name: found[name], EVENTS, clock), store


def append(backlog: Backlog, store: MemoryStore, settled: Settled, *wanted: Triggers) -> None:
    chunks = [backlog.append(version(one.name), one, None, settled) for one in wanted]
    appended = [*settled.appended, *(chunk for chunk in chunks if chunk is not None)]
    offset = store.changelog_offset() + 1
    store.apply(Frame({}, 0, [], np.zeros((0, 1)), appended=appended, cursors=settled.cursors), offset)
    backlog.stored(appended)


def waiting(store: MemoryStore) -> dict[str, list[int]]:
    found: defaultdict[str, list[int]] = defaultdict(list)
    for chunk in store.chunks(1000):
        found[str(chunk.triggers.name)] += chunk.triggers.offsets.tolist()
    return dict(found)


async def test_the_line_that_is_longest_makes_room_for_its_tenants_others() -> None:
    backlog, store = backlog_of(Bound(10), Bound(10, "shed_newest"))
    settled = Settled()
    append(backlog, store, settled, *(triggers(NAMES[0], first, 2) for first in range(0, 10, 2)))
    append(backlog, store, settled, triggers(NAMES[1], 0, 4))
    assert waiting(store) == {"ads/bid": [4, 5, 6, 7, 8, 9], "ads/rank": [0, 1, 2, 3]}
    append(backlog, store, settled, triggers(NAMES[1], 4, 4))
    assert waiting(store) == {"ads/bid": [4, 5, 6, 7, 8, 9], "ads/rank": [0, 1, 2, 3]}, "its newest, once it is longest"
    assert settled.shed == {"overload ads/bid": 4, "overload ads/rank": 4}


async def test_bytes_are_bounded_too() -> None:
    size = 4 * row_bytes(triggers(NAMES[0], 10, 4))
    backlog, store = backlog_of(Bound(1000, bytes_max=2 * size))
    settled = Settled()
    append(backlog, store, settled, *(triggers(NAMES[0], first, 4) for first in range(10, 22, 4)))
    assert waiting(store) == {"ads/bid": list(range(14, 22))}
    assert backlog.statistics(0)["ads/bid"]["bytes"] == 2 * size


async def test_triggers_that_have_waited_too_long_are_shed_and_counted() -> None:
    clock = ManualClock(5_000)
    backlog, store = backlog_of(Bound(1000, age_ms_max=1000), clock=clock)
    append(backlog, store, Settled(), triggers(NAMES[0], 0, 4))
    clock.advance(900)
    append(backlog, store, Settled(), triggers(NAMES[0], 4, 4))
    assert backlog.statistics(clock.now_ms())["ads/bid"]["waiting_ms"] == 900
    clock.advance(200)
    restarted, _ = backlog_of(Bound(1000, age_ms_max=1000), clock=clock)
    restarted.restore(store.chunks(10))
    for one in (backlog, restarted):
        settled = one.settle()
        assert settled.shed == {"age ads/bid": 4}
        assert settled.cursors == {"ads/bid": 1}
        assert one.rows == 4


async def test_a_call_that_takes_longer_than_the_line_takes_to_fill_still_ends() -> None:
    """The oldest are shed, but not what is being worked on: else nothing would ever be answered."""
    scene = Scene(("shed_oldest",) * 3, 16, 0, 1000, 4)
    for _ in range(5):
        await scene.cycle((8, 0, 0))
    first = scene.runner.open[0]
    assert not first[2].cancelled()
    scene.runner.answer(0)
    await scene.cycle((8, 0, 0))
    assert scene.answered[NAMES[0]] == list(range(8))
    await scene.drain()
    scene.check_end()


async def test_a_stuck_models_hot_customer_does_not_fill_the_log() -> None:
    with small_sweeps():
        scene = Scene(("latest_per_customer",) * 3, 40, 0, 3, 100)
        for _ in range(60):
            await scene.cycle((8, 0, 0))
        assert 0 < len(scene.runner.open) <= 4, "calls that never end, none made twice"
        await scene.drain()
        scene.check_end()
        assert not scene.shed[f"overload {NAMES[0]}"]


async def test_behind_a_call_that_never_ends_what_is_given_up_goes_and_little_is_put_again() -> None:
    """A model that is triggered once a commit, so that each row is a chunk of its own."""
    scene = Scene(("shed_oldest",) * 3, 50, 0, 1000, 4)
    with small_sweeps():
        for _ in range(200):
            await scene.cycle((1, 0, 0))
            assert len(scene.store.chunks(1000)) <= 50 + PASSED_CHUNKS_MAX + 1
            assert scene.put <= 4 + 1, "what is worked on, and the new one"
        await scene.drain()
        scene.check_end()


def test_a_chunk_written_before_it_had_a_time_is_read() -> None:
    chunk = SequenceChunk(3, triggers(NAMES[0], 0, 2), 77)
    assert decode_chunk(encode_chunk(chunk)).queued_ms == 77
    shorter = msgspec.msgpack.encode(msgspec.msgpack.decode(encode_chunk(chunk))[:12])
    assert decode_chunk(shorter).queued_ms == 0
