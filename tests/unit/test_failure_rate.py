"""When a version is to blame for rows that fail, and when they are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from node.kernel.limits import FAILED_ROWS_MIN
from tenants.failure_rate import BatchVerdict, FailureRate


@given(st.lists(st.tuples(st.integers(1, 3000), st.floats(0, 0.5)), min_size=1, max_size=50))
def test_a_version_that_fails_on_half_of_each_batch_at_most_is_never_to_blame(batches: list[tuple[int, float]]) -> None:
    rate = FailureRate()
    for rows, share in batches:
        rate.add(rows, int(rows * share))
        assert not rate.most


@given(st.integers(0, 5000), st.integers(1, 600))
def test_one_that_fails_always_from_some_time_on_is_found_soon(fine: int, size: int) -> None:
    rate, failed = FailureRate(), 0
    for _ in range(fine // size):
        rate.add(size, 0)
    while not rate.most:
        rate.add(size, size)
        failed += size
    assert failed <= 3 * FAILED_ROWS_MIN + 3 * size


def test_a_batch_counts_once_all_its_rows_are_settled() -> None:
    """The search finds the bad rows of a batch first."""
    rate, verdict = FailureRate(), BatchVerdict(rows_open=1000)
    for _ in range(300):
        verdict.close(rate, 1, 1, 1)
    assert rate.rows == 0
    verdict.close(rate, 100, 0, 0)
    verdict.close(rate, 600, 600, 0)
    assert (rate.rows, rate.failed) == (900, 300)
    assert not rate.most
