"""Whom a commit waits for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.answer_times import SLOW_SHARE, AnswerTimes

WAIT = 0.05
QUICK, SLOW = WAIT * SLOW_SHARE * 0.5, WAIT * SLOW_SHARE * 2
lines = st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=8, unique_by=lambda line: line)


def waited_for(asked: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Of lines named by their tenant and whether they are slow."""
    times = AnswerTimes()
    for line in asked:
        times.observe(str(line), SLOW if line[1] else QUICK)
    return times.worth_waiting(asked, str, lambda line: line[0], WAIT)


@given(lines)
def test_whoever_is_quick_is_waited_for_and_nobody_slow_beside_another_tenant_that_is_quick(
    asked: list[tuple[str, bool]],
) -> None:
    found = waited_for(asked)
    for line in asked:
        tenant, slow = line
        others = any(other != tenant and not other_slow for other, other_slow in asked)
        assert (line in found) == (not (slow and others))


def test_one_slow_answer_is_remembered_for_some_quick_ones_and_then_forgotten() -> None:
    times = AnswerTimes()
    assert not times.slow("line", WAIT), "nothing is known yet"
    times.observe("line", WAIT)
    after = []
    for _ in range(20):
        times.observe("line", QUICK)
        after.append(times.slow("line", WAIT))
    assert after == sorted(after, reverse=True)
    assert 4 <= sum(after) <= 10
