"""Frames survive the trip through changelog records, whatever their size; damage is told, never decoded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.kernel.errors import FrameCorrupt
from node.kernel.types import FeatureRows, Frame, IntervalRun, ModelName, Schedule, SequenceChunk, Triggers
from replication.frame import FrameAssembler, encode_frame

names = st.text(min_size=1, max_size=12)
runs = st.builds(
    IntervalRun,
    st.builds(Schedule, st.integers(0, 2**40), zone=names, whole=st.booleans()),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    finished=st.booleans(),
    cursor=st.binary(max_size=20),
)
floats = st.floats(allow_nan=False)


@st.composite
def chunks(draw: st.DrawFn) -> SequenceChunk:
    count = draw(st.integers(0, 5))
    columns = [
        np.array(draw(st.lists(st.integers(0, 2**60), min_size=count, max_size=count)), np.int64) for _ in "1234"
    ]
    customers = tuple(draw(st.lists(names, min_size=count, max_size=count)))
    rows = FeatureRows(("a", "b"), np.arange(count * 2, dtype=np.float64).reshape(count, 2), {"b": [None] * count})
    return SequenceChunk(draw(st.integers(0, 2**40)), Triggers(ModelName("t", "m"), "ff", customers, *columns, rows))


@st.composite
def whole_frames(draw: st.DrawFn) -> Frame:
    customers = draw(st.lists(st.binary(min_size=1, max_size=20), max_size=20))
    slots = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**32))
    rows = np.random.default_rng(seed).normal(size=(len(customers), slots))
    return Frame(
        progress=draw(st.dictionaries(names, st.integers(0, 2**60), max_size=3)),
        layout_id=draw(st.integers(0, 1000)),
        customers=customers,
        rows=rows,
        layout=draw(st.none() | st.binary(max_size=50)),
        appended=draw(st.lists(chunks(), max_size=3)),
        cursors=draw(st.dictionaries(names, st.integers(0, 2**40), max_size=3)),
        counters=draw(st.dictionaries(names, st.integers(0, 2**40), max_size=3)),
        runs=draw(st.dictionaries(names, st.none() | runs, max_size=2)),
        event_time_ms=draw(st.integers(0, 2**40)),
    )


def assert_same(left: Frame, right: Frame) -> None:
    assert left.progress == right.progress
    assert (left.layout_id, left.layout) == (right.layout_id, right.layout)
    assert list(left.customers) == list(right.customers)
    assert left.rows.tobytes() == right.rows.tobytes()
    assert left.cursors == right.cursors
    assert left.counters == right.counters
    assert (left.runs, left.event_time_ms) == (right.runs, right.event_time_ms)
    assert len(left.appended) == len(right.appended)
    for one, other in zip(left.appended, right.appended, strict=True):
        assert one.number == other.number
        assert one.triggers.customers == other.triggers.customers
        assert one.triggers.offsets.tolist() == other.triggers.offsets.tolist()
        assert one.triggers.rows.numbers.tobytes() == other.triggers.rows.numbers.tobytes()
        assert one.triggers.rows.texts == other.triggers.rows.texts


@given(whole_frames(), st.integers(40, 2000))
def test_a_frame_survives_being_split(frame: Frame, record_bytes_max: int) -> None:
    records = encode_frame(frame, record_bytes_max)
    assert all(len(record) <= record_bytes_max for record in records)
    assembler = FrameAssembler()
    results = [assembler.add(record) for record in records]
    assert results[:-1] == [None] * (len(records) - 1)
    assert results[-1] is not None
    assert_same(results[-1], frame)


@given(whole_frames(), whole_frames())
def test_an_unfinished_frame_is_dropped_when_the_next_begins(torn: Frame, whole: Frame) -> None:
    torn_records = encode_frame(torn, 60)
    assembler = FrameAssembler()
    for record in torn_records[:-1]:
        assert assembler.add(record) is None
    (record,) = encode_frame(whole)
    result = assembler.add(record)
    assert result is not None
    assert_same(result, whole)


@given(st.binary(max_size=80))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(FrameCorrupt):
        FrameAssembler().add(garbage)


@given(whole_frames(), st.data())
def test_a_missing_part_is_refused(frame: Frame, data: st.DataObject) -> None:
    records = encode_frame(frame, 48)
    if len(records) < 3:
        return
    missing = data.draw(st.integers(1, len(records) - 2))
    assembler = FrameAssembler()
    for record in records[:missing]:
        assembler.add(record)
    with pytest.raises(FrameCorrupt):
        assembler.add(records[missing + 1])
