"""What README says of sessions, told event by event; `test_fold.py` holds the fold to a plain program."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.kernel.types import Aggregate, EventColumns
from node.state.fold import fold
from node.state.layout import Layout
from node.state.reads import read

sys.path.insert(0, str(Path(__file__).parent.parent))
from reference import MINUTE, SECOND

START_MS = 1_700_000_000_000
GAP_MS = 30 * MINUTE
COUNT = Aggregate("count", "*", "", -GAP_MS)
BEGAN, NEWEST = Aggregate("min", "*", "time", -GAP_MS), Aggregate("max", "*", "time", -GAP_MS)
SPENT = Aggregate("sum", "buy", "amount", -GAP_MS)
TYPES = ("view", "buy")


class Customer:
    """One customer's row, and what was late."""

    def __init__(self, *asked: Aggregate) -> None:
        self.layout = Layout.empty().grown(asked or (COUNT, BEGAN, NEWEST, SPENT), ())
        self.rows = self.layout.initial[:, None].copy()
        self.late = 0

    def see(self, *minutes: float, types: tuple[int, ...] = ()) -> dict[Aggregate, list[float]]:
        """A micro-batch of events at so many minutes; each is of 1.0."""
        count = len(minutes)
        events = EventColumns(
            np.array(types or [0] * count, np.int64),
            np.array([START_MS + round(one * MINUTE) for one in minutes], np.int64),
            np.zeros(count, np.int64),
            ["c"],
            np.zeros(count, np.int64),
            np.arange(count),
            {"amount": np.ones(count)},
        )
        found = fold(self.layout, self.rows, events, {}, np.ones(count, np.bool_), TYPES)
        self.late += found.late
        return {aggregate: values.tolist() for aggregate, values in found.values.items()}

    def count_at(self, minute: float) -> float:
        times_ms = np.array([START_MS + round(minute * MINUTE)])
        return float(read(self.layout, self.rows, times_ms, [COUNT])[COUNT][0])


def test_a_session_is_of_events_at_most_the_gap_apart() -> None:
    customer = Customer()
    assert customer.see(0, 30, 60, 60 + 30 + 1 / 60_000, 91)[COUNT] == [1, 2, 3, 1, 2]
    assert customer.late == 0


def test_events_of_every_type_go_on_with_a_session() -> None:
    values = Customer().see(0, 20, 40, 60, types=(1, 0, 0, 1))
    assert values[SPENT] == [1, 1, 1, 2]
    assert values[COUNT] == [1, 2, 3, 4]


def test_it_tells_when_it_began_and_its_newest_event() -> None:
    values = Customer().see(0, 20, 15, 100)
    lasted = [newest - began for newest, began in zip(values[NEWEST], values[BEGAN], strict=True)]
    assert lasted == [0, 20 * 60, 20 * 60, 0]


def test_an_event_out_of_order_belongs_to_it_up_to_the_gap_before_its_first() -> None:
    customer = Customer()
    assert customer.see(100, 70, 69, 68, 101)[COUNT] == [1, 2, 0, 0, 3]
    assert customer.late == 2


def test_a_late_event_does_not_join_two_sessions() -> None:
    customer = Customer()
    assert customer.see(0, 10, 45)[COUNT] == [1, 2, 1]
    assert customer.see(25)[COUNT] == [2], "of the newer one, although the older one ended at 10"
    assert customer.see(14, 46)[COUNT] == [0, 3]
    assert customer.late == 1


def test_read_without_an_event_it_is_what_an_event_of_that_time_would_belong_to() -> None:
    customer = Customer()
    assert customer.count_at(0) == 0
    customer.see(0, 20)
    assert [customer.count_at(minute) for minute in (-31, -30, 0, 20, 50, 51)] == [0, 2, 2, 2, 2, 0]


def test_sessions_of_two_gaps_are_apart() -> None:
    short = Aggregate("count", "*", "", -5 * SECOND)
    values = Customer(COUNT, short).see(0, 0.05, 1, 31, 62)
    assert values[COUNT] == [1, 2, 3, 4, 1]
    assert values[short] == [1, 2, 1, 1, 1]


def test_a_session_asked_for_later_begins_then() -> None:
    customer = Customer(COUNT)
    customer.see(0, 1)
    grown = customer.layout.grown([SPENT], ())
    customer.rows = np.concatenate([grown.initial[:1], customer.rows[1:, 0], grown.initial[customer.layout.slots :]])[
        :, None
    ].copy()
    customer.layout = Layout.decode(grown.encode())
    values = customer.see(2, 3, types=(1, 1))
    assert values[COUNT] == [3, 4]
    assert values[SPENT] == [1, 2]


@given(st.lists(st.integers(-90, 90), min_size=1, max_size=40), st.lists(st.integers(1, 7), min_size=1))
@pytest.mark.parametrize("asked", [(COUNT,), (COUNT, Aggregate("count", "*", "", MINUTE))])
def test_batches_may_be_cut_anywhere(asked: tuple[Aggregate, ...], steps: list[int], cuts: list[int]) -> None:
    minutes = np.cumsum(steps).tolist()
    whole, piece = Customer(*asked), Customer(*asked)
    expected, found, at = whole.see(*minutes), [], 0
    while at < len(minutes):
        size = cuts[at % len(cuts)]
        found += piece.see(*minutes[at : at + size])[COUNT]
        at += size
    assert found == expected[COUNT]
    assert piece.late == whole.late
    assert piece.rows.tobytes() == whole.rows.tobytes()
