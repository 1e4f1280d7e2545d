"""Row layouts grow without moving anything; rows survive bytes, growth and the cache."""

from __future__ import annotations

import itertools
import random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernel.errors import BoundExceeded, StateCorrupt
from node.kernel.limits import ROW_SLOTS_MAX, WINDOW_MS_MAX
from node.kernel.types import Aggregate, Frame, ModelName, ModelVersion, StoredOutput
from node.kernel.windows import TILE_WIDTHS_MS, TILES_MIN, tiling
from node.state.cache import RowCache
from node.state.codec import images, pack, unpack
from node.state.layout import Layout
from node.state.memory import MemoryStore
from node.state.outputs import read_output, write_outputs

HOUR = 3_600_000
FRAUD = ModelName("grocery", "fraud")

aggregates = st.lists(
    st.builds(
        Aggregate,
        st.sampled_from(("count", "sum", "mean", "min", "max", "std", "last", "first", "distinct", "since")),
        st.sampled_from(("a", "b", "*")),
        st.sampled_from(("x", "y")),
        st.sampled_from((0, HOUR, 5 * HOUR)),
    ),
    max_size=6,
)


def model(outputs: tuple[str, ...], version: str = "0123456789abcdef" * 4, name: ModelName = FRAUD) -> ModelVersion:
    return ModelVersion(name, version, version, ("a",), ("f",), outputs, "predict", 0, 1000)


models = st.lists(
    st.sets(st.sampled_from("pqr"), min_size=1).map(lambda names: model(tuple(sorted(names)))), max_size=2
)


@settings(deadline=None)
@given(st.lists(st.tuples(aggregates, models), max_size=4))
def test_growth_appends_and_survives_encoding(steps: list[tuple[list[Aggregate], list[ModelVersion]]]) -> None:
    layout = Layout.empty()
    for asked, versions in steps:
        grown = layout.grown(asked, versions)
        assert grown.grown(asked, versions) is grown
        assert grown.id - layout.id in (0, 1)
        assert (grown is layout) == (grown.id == layout.id)
        assert grown.sizes[: len(layout.sizes)] == layout.sizes
        assert grown.initial[1 : layout.slots].tobytes() == layout.initial[1:].tobytes()
        assert [group.head_slot for group in grown.groups][: len(layout.groups)] == [g.head_slot for g in layout.groups]
        layout = grown
    decoded = Layout.decode(layout.encode())
    assert decoded.initial.tobytes() == layout.initial.tobytes()
    assert decoded.aggregates == layout.aggregates == tuple(sorted({a for asked, _ in steps for a in asked}))
    assert decoded.grown(layout.aggregates, ()) is decoded
    taken = [
        slot
        for slots in layout.outputs.values()
        for slot in (*slots.outputs.values(), slots.time_slot, slots.version_slot)
    ]
    taken += layout.pivots.values()
    for group in layout.groups:
        taken += range(group.head_slot, group.last_slot)
    assert sorted(taken) == list(range(1, layout.slots))


def test_aggregates_share_accumulators_only_when_they_saw_the_same_events() -> None:
    mean = Layout.empty().grown([Aggregate("mean", "a", "x", HOUR)], ())
    assert mean.grown([Aggregate("sum", "a", "x", HOUR), Aggregate("count", "a", "x", HOUR)], ()).slots == mean.slots
    total = Layout.empty().grown([Aggregate("sum", "a", "x", HOUR)], ())
    both = total.grown([Aggregate("mean", "a", "x", HOUR)], ())
    assert len(both.groups) == 2
    assert both.locate(Aggregate("mean", "a", "x", HOUR)) is both.groups[1]
    assert both.locate(Aggregate("sum", "a", "x", HOUR)) is both.groups[0]


@given(st.integers(1, WINDOW_MS_MAX))
def test_tiles_cover_the_window(window_ms: int) -> None:
    width, tiles = tiling(window_ms)
    assert (tiles - 1) * width < window_ms <= tiles * width
    assert width == TILE_WIDTHS_MS[0] or tiles >= TILES_MIN
    assert tiles < 5 * TILES_MIN


def test_tile_widths_divide_each_other() -> None:
    assert all(wide % narrow == 0 for narrow, wide in itertools.pairwise(TILE_WIDTHS_MS))


def test_a_layout_that_only_grew_is_read_by_releases_before_there_were_reductions() -> None:
    layout = Layout.empty().grown([Aggregate("count", "a", "", HOUR)], ())
    assert msgspec.msgpack.decode(layout.encode()).keys() == {"format", "generations"}
    assert msgspec.msgpack.decode(layout.encode())["format"] == 1


def test_bounds_are_named() -> None:
    with pytest.raises(BoundExceeded, match="WINDOW_MS_MAX"):
        Layout.empty().grown([Aggregate("count", "a", "", WINDOW_MS_MAX + 1)], ())
    many = [Aggregate("distinct", f"type{n}", "x", 59_000) for n in range(ROW_SLOTS_MAX // 40)]
    with pytest.raises(BoundExceeded, match="ROW_SLOTS_MAX"):
        Layout.empty().grown(many, ())


@given(st.binary(max_size=60))
def test_garbage_is_no_layout(data: bytes) -> None:
    with pytest.raises(StateCorrupt):
        Layout.decode(data)


SMALL = Layout.empty().grown([Aggregate("count", "a", "", HOUR)], ())
LARGE = SMALL.grown([Aggregate("last", "a", "x"), Aggregate("std", "b", "x", HOUR)], [model(("score",))])


def random_rows(layout: Layout, customers: int, seed: int = 1) -> np.ndarray:
    rows = np.random.default_rng(seed).integers(0, 2**64, (layout.slots, customers), np.uint64).view(np.float64)
    rows[0] = layout.initial[0]
    return np.ascontiguousarray(rows)


def test_rows_survive_bytes_whatever_their_bits() -> None:
    rows = random_rows(LARGE, 7)
    assert unpack(LARGE, pack(rows)).tobytes() == rows.tobytes()
    assert images(rows).tobytes() == b"".join(pack(rows))
    assert unpack(LARGE, []).shape == (LARGE.slots, 0)


def test_older_rows_and_new_customers_are_padded() -> None:
    old, new = random_rows(SMALL, 2), random_rows(LARGE, 1)
    rows = unpack(LARGE, [pack(old)[1], None, pack(new)[0], pack(old)[0]])
    assert rows.flags.c_contiguous
    assert rows[:, 2].tobytes() == new[:, 0].tobytes()
    assert rows[:, 1].tobytes() == LARGE.initial.tobytes()
    for column, source in ((0, 1), (3, 0)):
        assert rows[1 : SMALL.slots, column].tobytes() == old[1:, source].tobytes()
        assert rows[SMALL.slots :, column].tobytes() == LARGE.initial[SMALL.slots :].tobytes()
    assert rows[0].tobytes() == np.full(4, LARGE.initial[0]).tobytes()


@pytest.mark.parametrize("spoil", [
    lambda row: row[:-8], lambda row: row[:-1], lambda row: b"", lambda row: b"\0" * len(row),
    lambda row: row[:4] + b"\xff" + row[5:], lambda row: pack(random_rows(SMALL, 1))[0][:8] + row[8:],
])  # fmt: skip
def test_garbage_is_no_row(spoil) -> None:  # type: ignore[no-untyped-def]
    good = pack(random_rows(LARGE, 1))[0]
    for others in ([], [good], [None]):
        with pytest.raises(StateCorrupt, match="rebuilt from the changelog"):
            unpack(LARGE, [*others, spoil(good)])


def test_a_newer_layouts_row_is_refused() -> None:
    with pytest.raises(StateCorrupt):
        unpack(SMALL, pack(random_rows(LARGE, 1)))


# --- stored outputs -------------------------------------------------------------------------------------------------


def test_the_newest_inference_by_event_time_stays() -> None:
    version = model(("score", "margin"))
    layout = Layout.empty().grown([], [version])
    rows = unpack(layout, [None] * 3)
    score = StoredOutput(FRAUD, "score")
    at, times = np.array([0, 1, 0, 1, 0]), np.array([50, 70, 40, 70, 50])
    write_outputs(layout, rows, version, at, times, np.arange(10.0).reshape(5, 2))
    assert read_output(layout, rows, score, 0, np.arange(3), np.full(3, 10**12)).tolist()[:2] == [8.0, 6.0]
    write_outputs(layout, rows, version, np.array([0, 1]), np.array([49, 71]), np.full((2, 2), -1.0))
    found = read_output(layout, rows, score, 0, np.arange(3), np.full(3, 100))
    assert found[:2].tolist() == [8.0, -1.0]
    assert np.isnan(found[2])
    assert rows[layout.outputs[FRAUD].version_slot, 0] == int(version.short_version, 16)


def test_a_stored_output_ends_with_its_ttl() -> None:
    version = model(("score",))
    layout = Layout.empty().grown([], [version])
    rows = unpack(layout, [None])
    write_outputs(layout, rows, version, np.array([0]), np.array([1000]), np.array([[0.5]]))
    found = read_output(layout, rows, StoredOutput(FRAUD, "score"), 10, np.zeros(2, int), np.array([1010, 1011]))
    assert found[0] == 0.5
    assert np.isnan(found[1])
    assert rows[layout.outputs[FRAUD].outputs["score"], 0] == 0.5
    assert np.isnan(read_output(layout, rows, StoredOutput(FRAUD, "other"), 0, np.zeros(1, int), np.array([0]))).all()


def test_a_version_with_other_outputs_gets_slots_and_ends_the_old_ones() -> None:
    first, second = model(("score", "margin")), model(("score", "risk"), "f" * 64)
    layout = Layout.empty().grown([], [first])
    grown = layout.grown([], [second])
    assert grown.slots == layout.slots + 1
    rows = unpack(grown, [None])
    at, now = np.array([0]), np.array([5])
    write_outputs(grown, rows, first, at, now, np.array([[1.0, 2.0]]))
    write_outputs(grown, rows, second, at, now, np.array([[3.0, 4.0]]))
    found = {
        name: read_output(grown, rows, StoredOutput(FRAUD, name), 0, at, now)[0] for name in ("score", "margin", "risk")
    }
    assert (found["score"], found["risk"]) == (3.0, 4.0)
    assert np.isnan(found["margin"])


# --- the cache ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 40))
def test_the_cache_gives_what_the_store_holds(seed: int, rows_max: int) -> None:
    chance = random.Random(seed)
    store, layout = MemoryStore(), SMALL
    cache = RowCache(store, layout, rows_max * layout.slots * 8)
    for step in range(30):
        if step == 15:
            layout = LARGE
            cache.grow(layout)
        customers = chance.sample([f"c{n}é" for n in range(60)], chance.randrange(1, 30))
        rows = cache.load(customers)
        encoded = [customer.encode() for customer in customers]
        assert rows.tobytes() == unpack(layout, store.load(encoded)).tobytes()
        assert rows.flags.c_contiguous
        if chance.random() < 0.2:
            cache.clear()
            continue
        rows[1:] = random_rows(layout, len(customers), chance.randrange(2**32))[1:]
        store.apply(Frame({}, layout.id, encoded, images(rows)), step)
        cache.store(customers, rows, chance.choice([None, chance.randrange(len(customers) + 1)]))
        held = cache.statistics()
        assert held["rows"] <= held["rows_max"]
        assert held["bytes"] <= held["bytes_max"] or held["rows_max"] == 1


def test_what_only_a_run_over_all_touches_drives_nobody_out_of_the_cache() -> None:
    store, hot = MemoryStore(), [f"hot{n}" for n in range(20)]
    cache = RowCache(store, SMALL, 20 * SMALL.slots * 8)
    cache.store(hot, cache.load(hot))
    for number in range(10):
        passing = [f"c{number}-{n}" for n in range(20)]
        customers = [*hot[:5], *passing, *hot[5:10]]
        rows = cache.load(customers)
        rows[1] = number
        cache.store(customers, rows, 5)
        assert cache.load(["c0-1", f"c{number}-1"])[1, 1] == number, "not applied yet, but not forgotten"
    assert cache.statistics()["evictions"] == 0
    assert cache.load(hot[:10])[1].tolist() == [9.0] * 10


def test_the_cache_keeps_what_is_used() -> None:
    cache = RowCache(MemoryStore(), SMALL, 100 * SMALL.slots * 8)
    hot = [f"hot{n}" for n in range(20)]
    for number in range(50):
        customers = hot + [f"c{number}-{n}" for n in range(20)]
        cache.store(customers, cache.load(customers))
    held = cache.statistics()
    assert held["hits"] == 49 * 20
    assert held["evictions"] == 20 + 50 * 20 - 100


def test_rows_are_read_under_a_layout_that_added_no_slot() -> None:
    mean, count = Aggregate("mean", "buy", "amount", 0, ""), Aggregate("count", "buy", "amount", 0, "")
    before = Layout.empty().grown([mean], ())
    after = before.grown([mean, count], ())
    assert after.slots == before.slots
    assert after.id != before.id
    (stored,) = pack(unpack(before, [None]))
    read = unpack(after, [stored])
    assert pack(read) == pack(unpack(after, [None]))
