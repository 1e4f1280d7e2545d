"""Slots are taken back from rows, and what is still needed reads the same, bit for bit, then and ever after."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from types import FrameType

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import Event
from test_fold import FILTERS, START_MS, STEPS_MS, TYPES, aggregates, columns
from test_layout import FRAUD, model

import node.state.layout
from node.interval_rows import write_marks
from node.kernel.errors import StateCorrupt
from node.kernel.limits import LAYOUTS_CARRIED_MAX
from node.kernel.types import Aggregate, Floats, Frame, ModelName, RowNeeds, Schedule, StoredOutput
from node.kernel.windows import window_slots
from node.state.cache import RowCache
from node.state.codec import images, pack, unpack
from node.state.fold import fold
from node.state.layout import Layout
from node.state.memory import MemoryStore
from node.state.outputs import read_output, write_outputs
from node.state.reads import read
from node.state.reduction import reduced

HOUR = 3_600_000
CUSTOMERS = ["ann", "bob", "eve"]
OTHER = ModelName("b", "other")
OUTPUTS = [StoredOutput(name, output) for name in (FRAUD, OTHER) for output in "pqr"]
NOBODY = np.zeros(0, np.bool_)


def events_of(chance: random.Random, count: int) -> list[Event]:
    time_ms, found = START_MS, []
    for _ in range(count):
        time_ms += chance.choice(STEPS_MS)
        fields = {"amount": chance.choice([0.1, 7.0, -3.3, 1e15]), "channel": chance.choice(["web", "app"])}
        found.append(Event(chance.choice(CUSTOMERS), chance.choice(TYPES), time_ms, fields))
    return found


def folded(layout: Layout, rows: Floats, events: list[Event]) -> None:
    batch = columns(events)
    batch.rows = np.array([CUSTOMERS.index(event.customer) for event in events], np.int64)
    batch.customers = CUSTOMERS
    masks = {where: np.array([keep(event) for event in events], bool) for where, keep in FILTERS.items()}
    fold(layout, rows, batch, masks, np.zeros(len(events), np.bool_), TYPES, ())


def values(layout: Layout, rows: Floats, needs: RowNeeds) -> dict[str, bytes]:
    """All that is needed, as of some moments."""
    found = {f"mark {name}": rows[layout.marks[name]].tobytes() for name in sorted(needs.models & layout.marks.keys())}
    for moment in (START_MS, START_MS + HOUR, START_MS + 50 * 24 * HOUR):
        times_ms = np.full(len(CUSTOMERS), moment)
        there = [aggregate for aggregate in sorted(needs.aggregates) if layout.locate(aggregate) is not None]
        read_now = read(layout, rows, times_ms, there)
        found |= {f"{moment} {aggregate}": value.tobytes() for aggregate, value in read_now.items()}
        for output in needs.outputs:
            value = read_output(layout, rows, output, 0, np.arange(len(CUSTOMERS)), times_ms)
            found[f"{moment} {output}"] = value.tobytes()
    return found


def fresh(aggregate: Aggregate, number: int) -> Aggregate:
    """One of a window and with a pivot that no layout has had yet, so that it begins empty everywhere."""
    function = "mean" if aggregate.function == "std" else aggregate.function
    return replace(aggregate, function=function, window_ms=2 * HOUR + 1000 * number)


asked = st.lists(aggregates(), max_size=5)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("grow"), asked),
        st.tuples(st.just("history"), asked),
        st.tuples(st.just("reduce"), st.lists(st.sampled_from(OUTPUTS), max_size=4)),
        st.tuples(st.just("filled"), st.none()),
    ),
    max_size=8,
)


def derived(layout: Layout) -> tuple[object, ...]:
    """Where everything is."""
    places = (dict(layout.located), dict(layout.awaiting), [*layout.pending], dict(layout.pivots), dict(layout.marks))
    return (layout.initial.tobytes(), layout.sizes, layout.number_next, *places, dict(layout.outputs))


@settings(deadline=None)
@given(steps, st.integers(0, 2**32))
def test_what_is_needed_reads_as_if_nothing_had_been_taken_back(steps: list[tuple[str, list]], seed: int) -> None:
    chance = random.Random(seed)
    versions = [model(("p", "q")), replace(model(("r",), name=OTHER), schedule=Schedule(900_000))]
    layout = whole = Layout.empty().grown([], versions)
    rows, whole_rows = (np.ascontiguousarray(np.tile(layout.initial[:, None], len(CUSTOMERS))) for _ in range(2))
    needs = RowNeeds(outputs=frozenset(OUTPUTS))
    for kind, given_now in steps:
        before, was = layout, derived(layout)
        if kind in ("grow", "history") and layout.base is not None:
            given_now = [fresh(aggregate, layout.id) for aggregate in given_now]
        if kind == "grow":
            layout, whole = layout.grown(given_now, versions), whole.grown(given_now, versions)
            needs |= RowNeeds(frozenset(given_now))
        elif kind == "history" and given_now:
            layout, whole = layout.awaiting_history(given_now), whole.awaiting_history(given_now)
            needs |= RowNeeds(frozenset(given_now))
        elif kind == "filled" and layout.pending:
            groups = chance.sample(sorted(layout.pending), 1)
            layout, whole = layout.with_history(groups), whole.with_history(groups)
        elif kind == "reduce":
            kept = [aggregate for aggregate in sorted(needs.aggregates) if chance.random() < 0.6]
            needs = RowNeeds(frozenset(kept), needs.outputs & frozenset(given_now))
            layout = reduced(layout, needs, 5)
            assert layout.slots <= before.slots
            assert reduced(layout, needs, 6) is layout, "there is nothing left to take"
        assert derived(before) == was, "what came after it changes nothing of a layout"
        came, layout = layout, Layout.decode(layout.encode())
        assert derived(layout) == derived(came), "as if it had been read from a store"
        rows, whole_rows = unpack(layout, pack(rows)), unpack(whole, pack(whole_rows))
        assert needs.models & whole.marks.keys() <= layout.marks.keys()
        assert (rows[0].view("<u8") == layout.initial[:1].view("<u8")).all()
        assert values(layout, rows, needs) == values(whole, whole_rows, needs), kind
        events = events_of(chance, chance.randrange(12))
        if events:
            folded(layout, rows, events)
            folded(whole, whole_rows, events)
            history = layout.pending.keys() & whole.pending.keys()
            folded(layout.filling(sorted(history)), rows, events)
            folded(whole.filling(sorted(history)), whole_rows, events)
        for version in versions:
            at, times_ms = np.array([chance.randrange(3)]), np.array([START_MS + chance.randrange(9)])
            row = np.array([[chance.random() for _ in version.outputs]])
            write_outputs(layout, rows, version, at, times_ms, row)
            write_outputs(whole, whole_rows, version, at, times_ms, row)
            for under, written in ((layout, rows), (whole, whole_rows)):
                write_marks(under, written, version.name, at, row[0, :1])
        there = RowNeeds(
            frozenset(aggregate for aggregate in needs.aggregates if layout.locate(aggregate) is not None),
            frozenset(
                output
                for output in needs.outputs
                if output.name in layout.outputs and output.output in layout.outputs[output.name].outputs
            ),
        )
        assert values(layout, rows, there) == values(whole, whole_rows, there), kind


def random_rows(layout: Layout, seed: int) -> Floats:
    rows = np.random.default_rng(seed).integers(0, 2**63, (layout.slots, 2), np.uint64).view(np.float64)
    rows[0] = layout.initial[0]
    return np.ascontiguousarray(rows)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), asked), min_size=1, max_size=6), st.integers(0, 2**32))
def test_a_row_of_any_earlier_layout_is_read_as_step_by_step(steps: list[tuple[bool, list]], seed: int) -> None:
    chance, layouts = random.Random(seed), [Layout.empty()]
    for reduce, given_now in steps:
        kept = [a for a in layouts[-1].aggregates if chance.random() < 0.5]
        after = reduced(layouts[-1], RowNeeds(frozenset(kept)), 5) if reduce else layouts[-1].grown(given_now, ())
        if after is not layouts[-1]:
            layouts.append(after)
    assert [layout.id for layout in layouts] == list(range(len(layouts)))
    assert list(layouts[-1].sizes) == [layout.slots for layout in layouts]
    for place, layout in enumerate(layouts):
        rows = random_rows(layout, seed % 1000)
        step_by_step = rows
        for after in layouts[place + 1 :]:
            step_by_step = unpack(after, pack(step_by_step))
        assert unpack(layouts[-1], pack(rows)).tobytes() == step_by_step.tobytes()


@given(st.lists(aggregates(), max_size=8))
def test_the_slots_of_windows_are_those_that_a_layout_gives_them(asked: list[Aggregate]) -> None:
    assert window_slots(asked) == Layout.empty().grown(asked, ()).slots - 1


COUNT, SUM, SESSION = (
    Aggregate("count", "search", "", HOUR),
    Aggregate("sum", "search", "amount", 24 * HOUR),
    Aggregate("mean", "search", "amount", -HOUR),
)


def test_a_reduced_layout_goes_on_where_events_were_folded_all_along() -> None:
    layout = Layout.empty().grown([COUNT, Aggregate("mean", "search", "amount", HOUR), SUM], ())
    least = reduced(layout, RowNeeds(frozenset({COUNT})), 7)
    assert least.aggregates == (COUNT,)
    again = least.grown([Aggregate("mean", "search", "amount", HOUR)], ())
    assert len(again.groups) == 2, "the kept count has seen other events than the new sum will"
    assert again.grown([COUNT], ()) is again


def test_numbers_of_groups_are_never_given_anew() -> None:
    layout = Layout.empty().grown([COUNT], ()).awaiting_history([SUM]).awaiting_history([SESSION])
    assert sorted(layout.pending) == [1, 2]
    least = reduced(layout, RowNeeds(frozenset({SESSION})), 7)
    assert sorted(least.numbered) == sorted(least.pending) == [2]
    assert sorted(least.grown([COUNT], ()).numbered) == [2, 3]
    assert least.with_history([1, 2]).locate(SESSION) is not None, "a fill of which a part is left"


def test_a_header_says_of_which_layout_a_row_is_when_several_have_its_length() -> None:
    one, other = (Aggregate("count", event, "", HOUR) for event in ("search", "add_to_cart"))
    first = Layout.empty().grown([one], ())
    layout = reduced(first.grown([other], ()), RowNeeds(frozenset({other})), 1)
    assert layout.slots == first.slots
    old, new = random_rows(first, 1), random_rows(layout, 2)
    rows = unpack(layout, [pack(old)[0], pack(new)[1]])
    assert rows[1:, 0].tobytes() == layout.initial[1:].tobytes(), "of what was counted first nothing is left"
    assert rows[:, 1].tobytes() == new[:, 1].tobytes()
    unknown = new.copy()
    unknown[0] = layout.grown([SUM], ()).initial[0]
    with pytest.raises(StateCorrupt, match="header"):
        unpack(layout, pack(unknown))


def test_cached_rows_are_converted_also_those_that_the_store_has_not_yet() -> None:
    layout = Layout.empty().grown([COUNT, SUM], ())
    least = reduced(layout, RowNeeds(frozenset({SUM})), 1)
    store, rows = MemoryStore(), random_rows(layout, 3)
    for cache_bytes in (1 << 20, layout.slots * 8):
        cache = RowCache(store, layout, cache_bytes)
        cache.store(["ann", "bob"], rows)
        cache.grow(least)
        assert cache.load(["ann", "bob"]).tobytes() == unpack(least, pack(rows)).tobytes()


def work_of(doing: Callable[[], object]) -> int:
    """How many functions of the layout it calls or goes on with."""
    calls = 0

    def heard(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename == node.state.layout.__file__

    sys.setprofile(heard)
    try:
        doing()
    finally:
        sys.setprofile(None)
    return calls


def test_rows_of_more_layouts_than_are_remembered_take_a_step_for_each_layout_and_not_for_each_row_of_it() -> None:
    layout, stored = Layout.empty().grown([SUM], ()), []
    for number in range(3 * LAYOUTS_CARRIED_MAX):
        layout = layout.grown([Aggregate("count", "search", "", 0, str(one)) for one in range(1 + number % 60)], ())
        stored += pack(random_rows(layout, number))
        layout = reduced(layout, RowNeeds(frozenset({SUM})), number)
    random.Random(1).shuffle(stored)
    for _ in range(2):
        assert work_of(lambda: unpack(layout, stored)) < 20 * len(layout.past)


def test_a_store_with_rows_of_many_layouts_is_read_whole() -> None:
    layout, store, due = Layout.empty().grown([SUM], ()), MemoryStore(), []
    for number in range(LAYOUTS_CARRIED_MAX + 2):
        rows = random_rows(layout, number)
        frame = Frame({}, layout.id, [b"%d" % number], images(rows[:, :1]), layout.encode(), [], {}, {})
        store.apply(frame, number + 1)
        group = layout.locate(SUM)
        assert group is not None
        due.append(rows[group.head_slot : group.last_slot, 0].tobytes())
        extra = Aggregate("count", "search", "", (number + 1) * HOUR)
        layout = reduced(layout.grown([extra], ()), RowNeeds(frozenset({SUM})), number)
    found = unpack(layout, store.load([b"%d" % number for number in range(len(due))]))
    group = layout.locate(SUM)
    assert group is not None
    assert [found[group.head_slot : group.last_slot, place].tobytes() for place in range(len(due))] == due
    assert msgspec.msgpack.decode(layout.encode())["format"] == 2, "a release that can't read it must not"
    assert len(layout.encode()) < 200 * len(due), "what stays of each layout before is little"
