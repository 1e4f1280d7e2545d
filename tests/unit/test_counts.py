"""What a node has counted never falls while it lives, and is what its partitions counted since they were opened."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cycle import Parts

from node.counts import NodeCounts, Opening
from node.cycle import PartitionState
from node.kernel.clock import ManualClock
from node.kernel.limits import COUNTERS_FORMER_MAX
from node.kernel.types import ModelName
from node.outgoing import add_up_former

NAMES = ("events", "inferences ads/bid", "shed overload ads/bid")
actions = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(("open", "close", *NAMES)), st.integers(1, 9)))


def state(committed: dict[str, int]) -> PartitionState:
    made = Parts().state
    made.committed = committed
    return made


@given(actions)
def test_it_is_what_was_committed_here_over_openings_and_closings(actions: list[tuple[int, str, int]]) -> None:
    counts, due = NodeCounts(ManualClock()), Counter[str]()
    stored = [dict.fromkeys(NAMES, 100 * number) for number in range(3)]
    open_now: dict[int, tuple[PartitionState, Opening]] = {}
    for number, action, by in actions:
        if action == "open" and number not in open_now:
            opened = state(dict(stored[number]))
            open_now[number] = opened, counts.opened(opened)
        elif action == "close" and number in open_now:
            counts.closed(open_now.pop(number)[1])
        elif action in NAMES and number in open_now:
            stored[number] = {**stored[number], action: stored[number][action] + by}
            open_now[number][0].committed = stored[number]
            due[action] += by
        elif action in NAMES:
            stored[number][action] += by  # by another node
        assert counts.counters() == due


def test_what_was_counted_of_models_that_are_gone_is_added_up() -> None:
    counts = NodeCounts(ManualClock(), lambda: [ModelName("ads", "bid")])
    for number in range(COUNTERS_FORMER_MAX + 1):
        opened = state({})
        opening = counts.opened(opened)
        opened.committed = {f"inferences ads/old{number}": 2, "inferences ads/bid": 1}
        counts.closed(opening)
    total = COUNTERS_FORMER_MAX + 1
    assert counts.counters() == {"inferences ads/bid": total, "inferences ads/_other": 2 * total}


@pytest.mark.parametrize("tenants", [("ads",), ("gone",), ("gone", "shop", "ads")])
def test_adding_up_what_an_open_partition_counted_before_it_was_opened_counts_nothing(tenants: tuple[str, ...]) -> None:
    there = [ModelName("ads", "bid")]
    names = [f"inferences {tenant}/old{number}" for tenant in tenants for number in range(COUNTERS_FORMER_MAX)]
    counts, opened = NodeCounts(ManualClock(), lambda: there), state({**dict.fromkeys(names, 50), "events": 7})
    opening = counts.opened(opened)
    rising = Counter(opened.committed) + Counter({names[0]: 3, f"inferences {tenants[0]}/new": 2})
    opened.committed = dict(rising)
    assert sum(counts.counters().values()) == 5
    add_up_former(rising, there)
    assert len(rising) < COUNTERS_FORMER_MAX
    opened.committed = dict(rising)
    assert sum(counts.counters().values()) == 5
    counts.closed(opening)
    assert sum(counts.counters().values()) == 5


def test_a_partition_s_steps_go_on_when_it_is_opened_again() -> None:
    clock = ManualClock()
    counts = NodeCounts(clock)
    for partition in (0, 1, 0):
        with counts.steps(partition).measure("fold"):
            clock.advance(1500)
    assert counts.step_seconds()["fold"] == 4.5
