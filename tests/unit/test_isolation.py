"""How failed batches are split, and how outputs find their way back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernel.types import FeatureRows, Ints, ModelOutputs
from tenants.batch import Batch, Piece, Submission
from tenants.isolation import Isolation, first_pieces, halves, patterns
from tenants.scheduler import Part

numbers = st.sampled_from([0.0, 1.0, float("nan"), float("inf")])
tables = st.lists(st.tuples(numbers, numbers, st.sampled_from(["north", "south", None])), min_size=2, max_size=60)


def rows_of(table: list[tuple[float, float, str | None]]) -> FeatureRows:
    matrix = np.array([[first, second, np.nan] for first, second, _ in table])
    return FeatureRows(("a", "b", "shop"), matrix, {"shop": [text for _, _, text in table]})


@given(tables)
def test_pieces_hold_each_row_once_and_complete_rows_are_apart(table: list[tuple[float, float, str | None]]) -> None:
    rows = rows_of(table)
    pieces = first_pieces(rows)
    assert len(pieces) > 1
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(rows)))
    incomplete = np.asarray(patterns(rows).any(axis=1))
    assert incomplete.tolist() == [
        not np.isfinite([first, second]).all() or text is None for first, second, text in table
    ]
    if incomplete.any() and not incomplete.all():
        assert all(not (incomplete[piece].any() and not incomplete[piece].all()) for piece in pieces)


@given(st.integers(1, 5000))
def test_halves_are_even(count: int) -> None:
    parts = halves(count)
    assert np.concatenate(parts).tolist() == list(range(count))
    assert len(parts) == min(count, 2)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_refused_row_speaks_only_for_rows_that_miss_the_same_and_only_of_that() -> None:
    nan = float("nan")
    rows = rows_of([(nan, 1, "north"), (nan, 2, "south"), (1, nan, "north"), (1, 1, "north")])
    isolation = Isolation()
    isolation.learn(rows.take(slice(0, 1)), "the model raised ValueError: shop is not open")
    isolation.learn(rows.take(slice(3, 4)), "Input X contains NaN.")
    assert isolation.refusals(rows) == {}
    isolation.learn(rows.take(slice(0, 1)), "Input X contains NaN.")
    assert sorted(isolation.refusals(rows)) == [0, 1]


def isolated(rows: FeatureRows, raises: Callable[[FeatureRows], str]) -> tuple[dict[int, str], int]:
    """What the pool does with a failed batch, without a pool: the rows found to fail, and the calls it took."""
    isolation, calls, found = Isolation(), 0, dict[int, str]()
    queue: list[Ints] = list(first_pieces(rows))
    while queue:
        at = queue.pop(0)
        part = FeatureRows(rows.names, rows.numbers[at], {"shop": [rows.texts["shop"][row] for row in at]})
        refused = isolation.refusals(part)
        found |= {int(at[row]): reason for row, reason in refused.items()}
        at = np.array([row for place, row in enumerate(at) if place not in refused], dtype=np.int64)
        if not len(at):
            continue
        part = FeatureRows(rows.names, rows.numbers[at], {"shop": [rows.texts["shop"][row] for row in at]})
        calls += 1
        reason = raises(part)
        if reason and len(at) == 1:
            isolation.learn(part, reason)
            found[int(at[0])] = reason
        elif reason:
            queue = [at[half] for half in halves(len(at))] + queue
    return found, calls


@settings(max_examples=60)
@given(tables)
def test_exactly_the_rows_a_model_refuses_are_found(table: list[tuple[float, float, str | None]]) -> None:
    """A model that takes a missing `b` but neither a missing `a` nor the shop 'south'."""
    rows = rows_of(table)

    def raises(part: FeatureRows) -> str:
        if "south" in part.texts["shop"]:
            return "unknown category 'south'"
        return "" if np.isfinite(part.numbers[:, 0]).all() else "Input X contains NaN."

    found, _ = isolated(rows, raises)
    assert set(found) == {
        row for row, (first, _, text) in enumerate(table) if not np.isfinite(first) or text == "south"
    }


def test_many_rows_that_miss_the_same_take_few_calls() -> None:
    rows = rows_of([(float("nan") if row % 3 else 1.0, 1.0, "north") for row in range(3000)])
    found, calls = isolated(rows, lambda part: "" if np.isfinite(part.numbers[:, :2]).all() else "contains NaN")
    assert len(found) == 2000
    assert calls <= 3


def of(first: int, count: int) -> FeatureRows:
    return FeatureRows(("value",), np.arange(first, first + count, dtype=np.float64).reshape(-1, 1))


def called(rows: FeatureRows) -> ModelOutputs:
    """Stands in for a model: ten times the value; every seventh value is an error."""
    errors = {row: f"error {value:g}" for row, (value,) in enumerate(rows.numbers.tolist()) if value % 7 == 0}
    return ModelOutputs(rows.numbers * 10, errors, 0.0)


@settings(max_examples=100)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.data())
def test_outputs_come_back_in_order_however_rows_were_cut_and_joined(sizes: list[int], data: st.DataObject) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        starts = np.cumsum([0, *sizes]).tolist()
        submissions = [
            Submission(of(start, size), loop.create_future(), 1, size)
            for start, size in zip(starts, sizes, strict=False)
        ]
        cuts = [sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=3))}) for size in sizes]
        parts = [
            Part(submission, start, stop)
            for submission, places in zip(submissions, cuts, strict=True)
            for start, stop in pairwise(places)
        ]
        while parts:
            count = data.draw(st.integers(1, len(parts)))
            batch, parts = Batch.of(parts[:count]), parts[count:]
            if data.draw(st.booleans()):
                batch.answer(called(batch.rows), 0.1)
                continue
            piece = batch.piece()
            assert isinstance(piece, Piece)
            order = np.array(data.draw(st.permutations(range(len(piece.rows)))))
            for at in (order[: len(order) // 2], order[len(order) // 2 :]):
                if len(at):
                    outputs = called(piece.take(at).rows)
                    piece.take(at).answer(outputs.values, outputs.errors, 0.1)
        for submission, start, size in zip(submissions, starts, sizes, strict=False):
            outputs = submission.future.result()
            np.testing.assert_array_equal(outputs.values[:, 0], np.arange(start, start + size) * 10.0)
            assert outputs.errors == {
                value - start: f"error {value}" for value in range(start, start + size) if value % 7 == 0
            }

    asyncio.run(run())
