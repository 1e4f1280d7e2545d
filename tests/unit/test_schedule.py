"""Intervals: what number a time has, and which run follows which, whatever the clock does and whatever is late."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.kernel.errors import NotFound
from node.kernel.types import IntervalRun, ModelName, ModelVersion, Schedule
from node.kernel.zones import time_zone
from node.schedule import Interval, decide, newest_interval, went_on

NAME = ModelName("shop", "reorder")
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
times = st.integers(0, 4_000_000_000_000)
schedules = st.one_of(
    st.builds(Schedule, every_ms=st.integers(1000, 400 * DAY_MS)),
    st.builds(
        Schedule,
        at_ms=st.integers(0, 24 * 60 - 1).map(lambda minute: minute * 60_000),
        zone=st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Pacific/Kiritimati", "Pacific/Pago_Pago"]),
    ),
)


def version(schedule: Schedule, sha: str = "a" * 64) -> ModelVersion:
    return ModelVersion(NAME, sha, "b" * 64, (), ("x",), ("score",), "predict", 0, 1000, schedule=schedule)


def newest(schedule: Schedule, now_ms: int) -> Interval:
    return newest_interval(schedule, now_ms, time_zone(schedule.zone))


@given(schedules, times)
def test_the_newest_interval_is_the_last_that_has_ended(schedule: Schedule, now_ms: int) -> None:
    found = newest(schedule, now_ms)
    assert found.due_ms <= now_ms
    assert newest(schedule, found.due_ms) == found
    before = newest(schedule, found.due_ms - 1)
    assert before.number == found.number - 1
    assert before.due_ms < found.due_ms
    longest = schedule.every_ms or 49 * HOUR_MS  # Kiritimati once left out a day
    assert newest(schedule, now_ms + longest).number > found.number


def at(zone: str, text: str) -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


@pytest.mark.parametrize(
    ("now", "due"),
    [
        ("2026-03-28T05:59", "2026-03-27T06:00"),
        ("2026-03-28T06:00", "2026-03-28T06:00"),
        ("2026-03-29T06:00", "2026-03-29T06:00"),  # the day that has 23 hours
        ("2026-10-25T23:59", "2026-10-25T06:00"),  # the day that has 25
    ],
)
def test_a_time_of_day_is_that_of_its_zone(now: str, due: str) -> None:
    schedule = Schedule(at_ms=6 * HOUR_MS, zone="Europe/Berlin")
    assert newest(schedule, at("Europe/Berlin", now)).due_ms == at("Europe/Berlin", due)


def test_a_time_that_summer_time_leaves_out_comes_an_hour_later_and_one_that_comes_twice_the_first_time() -> None:
    schedule = Schedule(at_ms=2 * HOUR_MS + HOUR_MS // 2, zone="Europe/Berlin")
    spring = datetime(2026, 3, 29, 1, 30, tzinfo=UTC)
    autumn = datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    for moment in (spring, autumn):
        due_ms = round(moment.timestamp() * 1000)
        assert newest(schedule, due_ms).due_ms == due_ms
        assert newest(schedule, due_ms - 1).due_ms < due_ms
        later = round((moment + timedelta(hours=20)).timestamp() * 1000)
        assert newest(schedule, later).due_ms == due_ms


def test_by_events_an_interval_ends_once_they_are_past_it_by_the_grace() -> None:
    schedule = Schedule(every_ms=7 * DAY_MS, by_event=True, grace_ms=HOUR_MS)
    end_ms = 3000 * 7 * DAY_MS
    assert newest(schedule, end_ms + HOUR_MS - 1).due_ms == end_ms - 7 * DAY_MS
    assert newest(schedule, end_ms + HOUR_MS) == Interval(3000, end_ms)


@pytest.mark.parametrize("name", ["", "Europe", "../etc/passwd", "/etc/passwd", "Nowhere/Atall", "x" * 300, "a\0b"])
def test_a_zone_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(NotFound):
        time_zone(name)


@given(
    schedules,
    st.lists(st.tuples(st.sampled_from(["look", "chunk", "last"]), st.integers(-DAY_MS, 3 * DAY_MS)), max_size=40),
    times,
)
def test_runs_never_pile_up_and_none_comes_twice(schedule: Schedule, steps: list[tuple[str, int]], now_ms: int) -> None:
    run: IntervalRun | None = None
    begun: list[int] = []
    skipped = 0
    for kind, elapsed_ms in steps:
        now_ms = max(0, now_ms + elapsed_ms)  # clocks go back too
        if kind != "look" and run is not None and not run.finished:
            run = went_on(run, run.cursor + b"x", 1, kind == "last")
        last = newest(schedule, now_ms)
        before, decision = run, decide(version(schedule), run, last)
        run = decision.run
        skipped += decision.skipped
        if before is None:
            assert (run.finished, run.number) == (True, last.number)
            first = run.number
        elif not before.finished:
            assert not decision.begins
            assert replace(run, late=before.late) == before
            assert run.late == (before.late or last.number > run.number)
        elif last.number > before.number:
            assert decision.begins
            assert (run.number, run.cursor, run.rows, run.finished) == (last.number, b"", 0, False)
            begun.append(run.number)
        else:
            assert run is before
    assert begun == sorted(set(begun))
    if run is not None:
        assert len(begun) + skipped == run.number - first


def test_another_version_first_runs_over_all_and_another_schedule_waits_for_its_next_end() -> None:
    hourly = Schedule(every_ms=HOUR_MS)
    run = IntervalRun(hourly, 5, 5 * HOUR_MS, "a" * 64, whole=False)
    same = decide(version(hourly), run, Interval(6, 6 * HOUR_MS)).run
    assert (same.whole, same.version) == (False, "a" * 64)
    other = decide(version(hourly, "c" * 64), run, Interval(6, 6 * HOUR_MS)).run
    assert (other.whole, other.version) == (True, "c" * 64)
    swapped = decide(version(hourly, "c" * 64), same, Interval(6, 6 * HOUR_MS)).run
    assert swapped is same
    daily = Schedule(every_ms=DAY_MS)
    first = decide(version(daily), same, Interval(1, DAY_MS))
    assert (first.begins, first.run.finished, first.run.due_ms) == (False, True, DAY_MS)
