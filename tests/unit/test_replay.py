"""Rows of state computed anew: the same as a node's over any stream and micro-batches, and a changed one is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from node.columns import customer_rows
from node.config import parse_config
from node.kernel.types import Aggregate, EventColumns, Frame
from node.state.codec import images, unpack
from node.state.fold import fold
from node.state.layout import Layout
from node.state.memory import MemoryStore
from node.training.replay import Replay, differing

TYPES = ("buy",)
FIRST = (Aggregate("sum", "buy", "amount", 60_000), Aggregate("count", "buy"))
LATER = (Aggregate("std", "buy", "amount", 3_600_000), Aggregate("max", "buy", "amount"))
CONFIG = parse_config('[events]\ntypes = ["buy"]\n[events.fields]\namount = "number"\n', Path.cwd())
EVENTS = st.tuples(st.integers(0, 3), st.integers(0, 400_000), st.floats(-1e6, 1e6))
BATCHES = st.lists(st.lists(EVENTS, min_size=1, max_size=8), min_size=2, max_size=5)


def columns(batch, offset: int) -> EventColumns:
    rows, customers = customer_rows([f"c{customer}" for customer, _, _ in batch])
    zeros = np.zeros(len(batch), np.int64)
    times_ms = np.array([10**12 + time_ms for _, time_ms, _ in batch], np.int64)
    amounts = np.array([amount for _, _, amount in batch])
    return EventColumns(zeros, times_ms, rows, customers, zeros, zeros + offset, {"amount": amounts})


def frames_of(batches) -> list[tuple[Frame, EventColumns]]:
    """As a node makes them; a model with more aggregates comes with the second batch."""
    store, layout, found = MemoryStore(), Layout.empty(), []
    for number, batch in enumerate(batches):
        grown = layout.grown(FIRST if not number else FIRST + LATER, ())
        events = columns(batch, number)
        rows = unpack(grown, store.load([one.encode() for one in events.customers]))
        fold(grown, rows, events, {}, np.ones(len(events), np.bool_), TYPES)
        customers = [one.encode() for one in events.customers]
        encoded = grown.encode() if grown is not layout else None
        frame = Frame(
            {"events": number + 1}, grown.id, customers, images(rows), encoded, counters={"commits": number + 1}
        )
        store.apply(frame, number + 1)
        layout = grown
        found.append((frame, events))
    return found


def differences(frames) -> list[tuple[int, str, int]]:
    replay, found = Replay(MemoryStore(), TYPES, whole=True), []
    for number, (frame, events) in enumerate(frames):
        step = replay.compute(frame, events, np.zeros(len(events), np.bool_), {}, ())
        found += [(number, *one) for one in differing(step, frame, events.customers, {})]
        replay.take(frame, number + 1)
    return found


@settings(max_examples=60, deadline=None)
@given(BATCHES, st.data())
def test_rows_are_the_same_and_one_bit_changed_is_named(batches, data) -> None:
    frames = frames_of(batches)
    assert differences(frames) == []
    number = data.draw(st.integers(0, len(frames) - 1))
    frame, events = frames[number]
    place = data.draw(st.integers(0, len(frame.customers) - 1))
    layout = Layout.empty().grown(FIRST, ())
    layout = layout if not number else layout.grown(FIRST + LATER, ())
    held = [slot for group in layout.groups for slot in range(group.head_slot, group.last_slot)]
    slot = data.draw(st.sampled_from(held))
    rows = frame.rows.copy()
    rows.view(np.uint64)[place, slot] ^= np.uint64(1)
    changed = Frame(frame.progress, frame.layout_id, frame.customers, rows, frame.layout, counters=frame.counters)
    before = frames[:number]
    assert (number, events.customers[place], slot) in differences([*before, (changed, events)])


def test_a_customer_from_before_the_first_frame_that_is_kept_is_not_judged() -> None:
    frames = frames_of([[(0, 0, 1.0)], [(0, 5, 2.0)], [(0, 9, 3.0)]])
    replay = Replay(MemoryStore(), TYPES, whole=False)
    replay.take(Frame({}, 0, [], np.empty((0, 1)), frames[1][0].layout or frames[0][0].layout), 0)
    known = []
    for number, (frame, events) in enumerate(frames[1:]):
        step = replay.compute(frame, events, np.zeros(1, np.bool_), {}, ())
        known.append(bool(step.known[0]))
        assert differing(step, frame, events.customers, {}) == []
        replay.take(frame, number + 1)
    assert known == [False, True]
