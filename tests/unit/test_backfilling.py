"""Windows filled from history are those of a model that was there from the start, whatever the seams and kills."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from frame_support import as_sent
from hypothesis import given, settings
from hypothesis import strategies as st

import node.backfilling
import node.ingest.history
from node.backfilling import Backfilling, History
from node.columns import take
from node.config import parse_config
from node.ingest.decode import EventDecoder
from node.ingest.history import TopicHistory
from node.kernel.backfills import BackfillState, Fill
from node.kernel.clock import ManualClock
from node.kernel.ports import FeaturePlan
from node.kernel.types import EventColumns, EventSchema, Frame, ModelName
from node.kernel.windows import PLANES, accumulators_of
from node.state.codec import images, unpack
from node.state.fold import filters_of, fold
from node.state.layout import Layout
from node.state.memory import MemoryStore
from node.state.reduction import reduced
from tenants.features import compile_plan
from tenants.manifest import parse_manifest

SCHEMA = EventSchema(("buy", "look"), {"amount": "number", "shop": "text"})
NEW = ModelName("shop", "new")
START_MS = 1_800_000_000_000
NO_HISTORY = ""
ALL = '[backfill]\nfrom = "all"\n'
COLUMNS = {
    "spent": "sum(buy.amount, '1h')",
    "ever": "mean(buy.amount)",
    "spread": "std(buy.amount, '1h')",
    "most": "max(buy.amount, '5m')",
    "last": "last(buy.amount, '1h')",
    "shops": "distinct(buy.shop, '1h')",
    "here": "count(buy, '1h', where=event.shop == 'a')",
}


def plan(*models: tuple[str, str, Sequence[str]]) -> FeaturePlan:
    """Of (name, backfill, columns)."""
    parsed = []
    for name, backfill, columns in models:
        lines = "\n".join(f'{column} = "{COLUMNS[column]}"' for column in columns)
        text = f'on = ["look"]\n{backfill}\n[features]\n{lines}\n'
        manifest = parse_manifest("m.toml", "shop", name, text.encode(), SCHEMA)
        parsed.append((manifest.version("0" * 64), manifest))
    return compile_plan(parsed, SCHEMA)


def events_of(rows: Sequence[tuple[str, int, float, str]]) -> EventColumns:
    """(customer, seconds, amount, shop) as buys, at offsets from 0."""
    count = len(rows)
    names = list(dict.fromkeys(row[0] for row in rows))
    zeros = np.zeros(count, np.int64)
    return EventColumns(
        zeros,
        np.array([START_MS + 1000 * row[1] for row in rows], np.int64),
        np.array([names.index(row[0]) for row in rows], np.int64),
        names,
        zeros,
        np.arange(count),
        {"amount": np.array([row[2] for row in rows]), "shop": np.array([row[3] for row in rows], object)},
    )


@dataclass
class Log:
    """A partition whose history is read as a reader of Kafka would give it: up to the target, so many at once."""

    events: EventColumns
    first: int = 0
    events_max: int = 1000
    reads: list[tuple[int, int]] = field(default_factory=list)

    async def read(self, fill: Fill, target: Mapping[str, int], events_max: int) -> History:
        start = fill.progress.get("t", self.first)
        stop = min(start + min(events_max, self.events_max), target["t"])
        self.reads.append((start, stop))
        part = take(self.events, np.arange(start, max(start, stop)))
        return History(part, {**fill.starts} or {"t": start}, {"t": max(start, stop)}, floor_ms=7 if self.first else 0)

    async def close(self) -> None:
        pass


class Node:
    """What a cycle does with history, on the real fold, frames and store; `kill` leaves the store alone."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.store = MemoryStore()
        self.clock = ManualClock()
        self.at = self.frames = 0
        self.open()

    def open(self) -> None:
        encoded = self.store.layout()
        self.layout = Layout.empty() if encoded is None else Layout.decode(encoded)
        self.at = self.store.progress().get("t", 0)
        self.fills = Backfilling(self.log, self.store.backfill(), self.clock, 0)
        self.plan: FeaturePlan | None = None

    async def cycle(self, wanted: FeaturePlan, count: int, *, lost: bool = False, reduce: bool = False) -> None:
        """`lost`: killed before the commit. `reduce`: what the plan does not need is taken from the rows."""
        fills = self.fills
        if self.plan is None or fills.behind:
            self.layout = fills.opened(self.layout)
        if wanted is not self.plan or reduce:
            layout = reduced(self.layout, wanted.needs, 1) if reduce else self.layout
            self.layout, self.plan = fills.grown(wanted, layout), wanted
        events = take(self.log.events, np.arange(self.at, min(self.at + count, len(self.log.events))))
        self.at += len(events)
        taken = fills.take(events, {"t": self.at})
        names = list(dict.fromkeys([*events.customers, *(name for batch in taken.batches for name in batch.customers)]))
        rows = unpack(self.layout, self.store.load([name.encode() for name in names]))
        masks = wanted.masks(events, filters_of(self.layout, events, SCHEMA.types))
        fold(self.layout, rows, events, masks, np.zeros(len(events), np.bool_), SCHEMA.types, ())
        fills.fold(taken, self.layout, rows, {name: at for at, name in enumerate(names)}, wanted, SCHEMA.types)
        frame = Frame(
            {"t": self.at}, self.layout.id, [name.encode() for name in names], images(rows), self.layout.encode(),
            backfill=fills.committing(),
        )  # fmt: skip
        if lost:
            await fills.close()
            self.open()
            return
        self.store.apply(as_sent(frame), self.frames)
        self.frames += 1
        fills.pump({"t": self.at})
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.clock.advance(60_000)

    async def finish(self, wanted: FeaturePlan) -> None:
        for _ in range(400):
            await self.cycle(wanted, 3)
            if not self.fills.warming and self.at == len(self.log.events):
                break
        else:
            pytest.fail("the fill never ends")
        await self.cycle(wanted, 0)  # the layout is opened before the next events
        await self.fills.close()

    def tiles(self, wanted: FeaturePlan) -> dict[str, bytes]:
        """Each customer -> the bits of all windows that the plan reads, as they are located."""
        found = {}
        for key, row in self.store.scan(None, 1000):
            unpacked = unpack(self.layout, [row])
            parts = []
            for aggregate in sorted(wanted.aggregates):
                group = self.layout.locate(aggregate)
                assert group is not None, aggregate
                parts.append(unpacked[group.head_slot].tobytes())
                for part in sorted(accumulators_of(aggregate)):
                    first = group.first_slot + group.planes[part] * group.tiles
                    parts.append(unpacked[first : first + PLANES[part.kind] * group.tiles].tobytes())
            found[key.decode()] = b"".join(parts)
        return found


amounts = st.floats(-1e6, 1e6, allow_nan=False)
rows_of = st.lists(
    st.tuples(st.sampled_from(["ann", "bob", "cyd"]), st.integers(0, 9000), amounts, st.sampled_from(["a", "b"])),
    min_size=1,
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(
    rows_of,
    st.integers(0, 60),
    st.lists(st.tuples(st.integers(0, 6), st.booleans(), st.sampled_from(["", "", "other", "reduced"])), max_size=25),
    st.integers(1, 9),
    st.lists(st.sampled_from(sorted(COLUMNS)), min_size=1, unique=True),
    st.lists(st.sampled_from(sorted(COLUMNS)), min_size=1, unique=True),
)
def test_filled_windows_are_those_of_a_model_there_from_the_start(
    rows: list[tuple[str, int, float, str]],
    before: int,
    cycles: list[tuple[int, bool, str]],
    events_max: int,
    columns: list[str],
    others: list[str],
) -> None:
    """To the bit: late events, kills before commits, cycles and chunks of any size, other models that come and go and
    whose slots are taken back."""
    with_history, without = plan(("new", ALL, columns)), plan(("new", NO_HISTORY, columns))
    beside = plan(("new", ALL, columns), ("other", ALL, others))
    nothing = plan()

    async def run() -> tuple[dict[str, bytes], dict[str, bytes]]:
        filled = Node(Log(events_of(rows), events_max=events_max))
        await filled.cycle(nothing, before)
        for count, lost, what in cycles:
            wanted = beside if what == "other" else with_history
            await filled.cycle(wanted, count, lost=lost, reduce=what == "reduced")
        await filled.finish(with_history)
        always = Node(Log(events_of(rows)))
        await always.cycle(without, len(rows))
        return filled.tiles(with_history), always.tiles(without)

    filled, always = asyncio.run(run())
    assert filled == always


ROWS = [
    (name, 100 * number, float(number), shop) for number in range(40) for name, shop in (("ann", "a"), ("bob", "b"))
]
EVERY = sorted(COLUMNS)


async def always(columns: Sequence[str], rows: Sequence[tuple[str, int, float, str]] = ROWS) -> dict[str, bytes]:
    """The windows of a model that was there from the start."""
    one, wanted = Node(Log(events_of(rows))), plan(("new", NO_HISTORY, columns))
    await one.cycle(wanted, len(rows))
    return one.tiles(wanted)


async def finished(node: Node, wanted: FeaturePlan) -> dict[str, bytes]:
    await node.finish(wanted)
    return node.tiles(wanted)


def test_a_fill_whose_model_goes_away_rests_and_goes_on_where_it_was() -> None:
    wanted, nothing = plan(("new", ALL, EVERY)), plan()

    async def run() -> tuple[dict[str, bytes], list[tuple[int, int]]]:
        node = Node(Log(events_of(ROWS), events_max=5))
        await node.cycle(nothing, 50)
        for _ in range(4):
            await node.cycle(wanted, 1)
        read = len(node.log.reads)
        for _ in range(3):
            await node.cycle(nothing, 2)
        assert node.fills.warming == frozenset()
        assert len(node.log.reads) <= read + 1
        await node.fills.close()
        node.open()
        return await finished(node, wanted), node.log.reads

    filled, reads = asyncio.run(run())
    assert filled == asyncio.run(always(EVERY))
    starts = [start for start, _ in reads]
    assert starts.count(0) == 1, "it began anew"


def test_a_fill_whose_windows_were_taken_back_is_forgotten_and_made_anew() -> None:
    one, other, both = plan(("new", ALL, ["spent"])), plan(("two", ALL, ["shops"])), ["spent", "shops"]

    async def run() -> dict[str, bytes]:
        node = Node(Log(events_of(ROWS), events_max=5))
        await node.cycle(plan(), 50)
        for _ in range(4):
            await node.cycle(one, 1)
        await node.cycle(other, 1, reduce=True)
        assert [fill.groups for fill in node.store.backfill().fills] == [tuple(node.layout.pending)]
        assert node.fills.warming == {ModelName("shop", "two")}
        return await finished(node, plan(("new", ALL, both)))

    assert asyncio.run(run()) == asyncio.run(always(both))


def test_what_was_read_for_one_fill_goes_to_no_other_when_one_before_them_is_forgotten() -> None:
    models = [("a", ALL, ["spent"]), ("b", ALL, ["shops"]), ("c", ALL, ["ever"])]

    async def run() -> dict[str, bytes]:
        node = Node(Log(events_of(ROWS), events_max=5))
        await node.cycle(plan(), 50)
        for number in range(3):
            await node.cycle(plan(*models[: number + 1]), 0)
        for _ in range(3):
            await node.cycle(plan(*models[1:]), 1)
        assert node.log.reads[-1] == (10, 15), "the fill of b has come further than that of c"
        node.layout = reduced(node.layout, plan(*models[1:]).needs, 1)
        return await finished(node, plan(models[2]))

    assert asyncio.run(run()) == asyncio.run(always(["ever"]))


def test_a_filter_whose_field_was_undeclared_while_events_came_is_filled_anew_and_one_no_model_had_is_not() -> None:
    wanted, nothing = plan(("new", ALL, ["here"])), plan()
    undeclared = compile_plan([], EventSchema(SCHEMA.types, {"amount": "number"}))

    async def run() -> dict[str, bytes]:
        node = Node(Log(events_of(ROWS)))
        await node.cycle(nothing, 10)
        while node.fills.warming or node.plan is not wanted:
            await node.cycle(wanted, 1)
        await node.cycle(nothing, 3)
        await node.cycle(wanted, 1)
        await node.cycle(undeclared, 0)
        await node.cycle(wanted, 1)
        assert node.fills.warming == frozenset()
        assert node.tiles(wanted) == await always(["here"], ROWS[: node.at])
        await node.cycle(undeclared, 3)
        await node.cycle(wanted, 1)
        assert node.fills.warming == {NEW}
        return await finished(node, wanted)

    assert asyncio.run(run()) == asyncio.run(always(["here"]))


def test_a_model_that_asks_for_no_history_reads_its_own_windows_until_longer_ones_are_there() -> None:
    old, both = plan(("old", NO_HISTORY, ["spent"])), plan(("old", NO_HISTORY, ["spent"]), ("new", ALL, ["spent"]))
    (spent,) = [one for one in old.aggregates if one.function == "sum"]

    async def run() -> None:
        node = Node(Log(events_of(ROWS), events_max=4))
        await node.cycle(plan(), 30)
        await node.cycle(old, 10)
        before = node.layout.locate(spent)
        await node.cycle(both, 3)
        assert node.fills.warming == {NEW}
        assert before is not None
        own = node.layout.locate(spent)
        assert own is not None
        assert own.head_slot == before.head_slot
        assert await finished(node, both) == await always(["spent"])
        now = node.layout.locate(spent)
        assert now is not None
        assert now.head_slot != before.head_slot

    asyncio.run(run())


def test_history_from_earlier_on_is_read_anew_and_from_later_on_is_there() -> None:
    since = {"week": '[backfill]\nfrom = "7d"\n', "day": '[backfill]\nfrom = "1d"\n', "all": ALL}

    async def run() -> None:
        node = Node(Log(events_of(ROWS)))
        await node.finish(plan(("new", since["week"], ["spent"])))
        await node.cycle(plan(("new", since["day"], ["spent"])), 0)
        assert node.fills.warming == frozenset()
        await node.cycle(plan(("new", since["all"], ["spent"])), 0)
        assert node.fills.warming == {NEW}
        await node.fills.close()

    asyncio.run(run())


def test_a_tail_that_grows_too_long_is_dropped_and_kept_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.backfilling, "BACKFILL_TAIL_EVENTS_MAX", 4)
    wanted = plan(("new", ALL, EVERY))

    async def run() -> dict[str, bytes]:
        one = Node(Log(events_of(ROWS), events_max=2))
        await one.cycle(plan(), 20)
        for _ in range(15):
            await one.cycle(wanted, 3)
        return await finished(one, wanted)

    assert asyncio.run(run()) == asyncio.run(always(EVERY))


def test_what_is_left_of_a_tail_is_taken_faster_than_events_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.backfilling, "BACKFILL_CHUNK_EVENTS", 1)
    wanted, rows = plan(("new", ALL, EVERY)), ROWS * 4

    async def run() -> dict[str, bytes]:
        one = Node(Log(events_of(rows)))
        await one.cycle(plan(), 30)
        while one.at < len(rows):
            await one.cycle(wanted, 2)
        assert one.fills.warming == frozenset()
        return await finished(one, wanted)

    assert asyncio.run(run()) == asyncio.run(always(EVERY, rows))


class TwoTopics(Log):
    """Of a second topic the history is known to have been taken; then it leaves the config."""

    async def read(self, fill: Fill, target: Mapping[str, int], events_max: int) -> History:
        found = await super().read(fill, target, events_max)
        return found if fill.progress else replace(found, progress={**found.progress, "left": 7})


def test_what_was_taken_of_a_topic_that_leaves_the_config_is_not_forgotten() -> None:
    """Should it come back, it is not taken again."""

    async def run() -> Mapping[str, int]:
        one = Node(TwoTopics(events_of(ROWS), events_max=5))
        await one.cycle(plan(), 50)
        await one.finish(plan(("new", ALL, ["spent"])))
        (fill,) = one.store.backfill().fills
        assert fill.done
        return fill.progress

    assert asyncio.run(run()) == {"t": len(ROWS), "left": 7}


def test_history_that_is_gone_is_told() -> None:
    async def run() -> None:
        one = Node(Log(events_of(ROWS), first=5))
        await one.cycle(plan(), len(ROWS))
        await one.finish(plan(("new", ALL, ["spent"])))
        (told,) = one.fills.statistics(one.layout).values()
        assert told == {"warming": False, "events": 75, "percent": 100.0, "lost": 0, "floor_ms": 7}

    asyncio.run(run())


class Consumer:
    """What `TopicHistory` asks of Kafka's client, of an empty topic, each answer a few turns of the loop away."""

    def __init__(self) -> None:
        self.started = self.stopped = 0

    async def start(self) -> None:
        self.started += 1

    async def stop(self) -> None:
        self.stopped += 1
        await self._answer()

    def assign(self, places: Sequence[object]) -> None:
        pass

    def seek(self, place: object, offset: int) -> None:
        pass

    async def _answer(self) -> None:
        await asyncio.gather(*(asyncio.gather(asyncio.sleep(0), asyncio.sleep(0)) for _ in range(3)))

    async def beginning_offsets(self, places: Sequence[object]) -> dict[object, int]:
        await self._answer()
        return dict.fromkeys(places, 0)

    async def offsets_for_times(self, times: Mapping[object, int]) -> dict[object, None]:
        await self._answer()
        return dict.fromkeys(times)


@pytest.mark.parametrize("turns", range(1, 12))
def test_a_read_that_is_given_up_ends_before_the_next_one_begins(monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    consumers: list[Consumer] = []

    def connected(_: object) -> Consumer:
        consumers.append(Consumer())
        return consumers[-1]

    monkeypatch.setattr(node.ingest.history, "committed_reader", connected)
    decoder = EventDecoder(parse_config('[events]\ntypes = ["buy", "look"]\n', Path.cwd()).events)

    async def run() -> None:
        clock = ManualClock()
        fills = Backfilling(TopicHistory({}, ("t",), 0, decoder, clock), BackfillState(), clock, 0)
        layout, nothing = Layout.empty(), events_of([])
        for columns in (["spent"], ["most"], ["last"], ["shops"]) * 3:
            layout = fills.grown(plan(("new", ALL, columns)), fills.opened(layout))
            for _ in range(3):
                fills.take(nothing, {"t": 7})
                fills.pump({"t": 7})
                for _ in range(turns):
                    await asyncio.sleep(0)
                clock.advance(60_000)
        await fills.close()
        assert consumers
        assert [one.stopped for one in consumers] == [one.started for one in consumers]

    asyncio.run(run())


def test_windows_read_as_empty_until_they_are_filled() -> None:
    layout = Layout.empty().awaiting_history(plan(("new", ALL, EVERY)).histories[NEW][1])
    layout = layout.grown(plan().current, ())
    events = events_of(ROWS)
    rows = unpack(layout, [None] * len(events.customers))
    asked = sorted(layout.awaiting)
    wanted = np.ones(len(events), np.bool_)
    masks = plan(("new", ALL, EVERY)).masks(events, {aggregate.where for aggregate in asked})
    values = fold(layout, rows, events, masks, wanted, SCHEMA.types, asked).values
    for aggregate in asked:
        empty = 0.0 if aggregate.function in ("count", "sum", "distinct") else np.nan
        assert np.array_equal(values[aggregate], np.full(len(events), empty), equal_nan=True)
    for group in layout.pending.values():
        part = rows[group.first_slot : group.last_slot].reshape(len(group.initial), group.tiles, -1)
        assert np.array_equal(part, np.broadcast_to(group.initial[:, None, None], part.shape), equal_nan=True)
