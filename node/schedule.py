"""(P) Which interval a time lies in, and what run of an interval model follows.

An interval has a number and an end; the run of an interval takes place once that end has passed. Runs are recorded in
frames, so numbers only rise whatever clocks say, and an interval is never run twice. Of those that passed while nothing
could run, the newest is run and the others are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta, tzinfo

from node.kernel.types import IntervalRun, ModelVersion, Schedule

_EPOCH_DAY = date(1970, 1, 1).toordinal()


@dataclass(frozen=True, slots=True)
class Interval:
    number: int
    due_ms: int
    """When it ended, ms since the Unix epoch."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The run to go on with; `skipped` intervals before it have no run, `begins` it now."""

    run: IntervalRun
    begins: bool = False
    skipped: int = 0


def newest_interval(schedule: Schedule, now_ms: int, zone: tzinfo) -> Interval:
    """The last interval that had ended by `now_ms`: by the clock, or by the newest event's time.

    `zone` is the schedule's. A time of day that a change to summer time leaves out is taken an hour later, one that
    comes twice is taken the first time.
    """
    if schedule.by_event:
        now_ms -= schedule.grace_ms
    if schedule.every_ms:
        number = now_ms // schedule.every_ms
        return Interval(number, number * schedule.every_ms)
    day = (datetime(1970, 1, 1) + timedelta(milliseconds=now_ms)).date().toordinal() + 1
    while (due_ms := _due_ms(schedule, day, zone)) > now_ms:
        day -= 1
    return Interval(day - _EPOCH_DAY, due_ms)


def _due_ms(schedule: Schedule, day: int, zone: tzinfo) -> int:
    local = datetime.combine(date.fromordinal(day), datetime.min.time(), zone) + timedelta(milliseconds=schedule.at_ms)
    return round(local.timestamp() * 1000)


def decide(version: ModelVersion, run: IntervalRun | None, newest: Interval) -> Decision:
    """What follows `run`, the last one that is recorded of the model; `newest` is the last interval that has ended.

    A run goes on until it is finished, also by another version, and is late once another interval has ended. The next
    one is then of the newest interval. A model that is seen first, or whose schedule changed, waits for the next end.
    """
    schedule = version.schedule
    assert schedule is not None
    if run is None or run.schedule != schedule:
        same_sessions = run is not None and 0 < schedule.gap_ms == run.schedule.gap_ms
        since_ms = run.since_ms if run is not None and same_sessions else newest.due_ms
        return Decision(IntervalRun(schedule, newest.number, newest.due_ms, since_ms=since_ms))
    if not run.finished:
        late = newest.number > run.number
        return Decision(replace(run, late=True) if late and not run.late else run)
    if newest.number <= run.number:
        return Decision(run)
    whole = schedule.whole or run.version != version.version
    begun = IntervalRun(
        schedule, newest.number, newest.due_ms, version.version, whole, finished=False, since_ms=run.since_ms
    )
    # Of sessions none is skipped: those that no run has found are still in the rows.
    return Decision(begun, True, 0 if schedule.gap_ms else newest.number - run.number - 1)


def went_on(run: IntervalRun, cursor: bytes, rows: int, finished: bool) -> IntervalRun:
    """The run once all customers up to `cursor` are done, `rows` of them run over now."""
    return replace(run, cursor=cursor, rows=run.rows + rows, finished=finished)
