"""(P) Which sessions close, each once, and what the models that are triggered by that are fed.

A customer's session closes when an event begins the next one, or when the partition's events are past its gap,
whichever is found first. For the first, a micro-batch in which a session ends is folded in rounds: before each, the
rows are those that the sessions end with. For the second, a run through the store tells whose session seems to have
ended, and the row that the cycle has decides. Either way the model is fed the row as of the session's newest event, and
the row's mark of the model becomes that event's time in the commit that has the trigger: so a session triggers once,
whatever is killed. Not the session's number: windows filled from history may know of an earlier event that began it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from node.columns import where
from node.interval_rows import row_triggers
from node.kernel.ports import FeaturePlan
from node.kernel.tables import TableSet
from node.kernel.types import (
    Aggregate,
    Bools,
    EventColumns,
    Floats,
    IntervalRun,
    Ints,
    ModelName,
    ModelVersion,
    Triggers,
    session_newest,
)
from node.state.codec import unpack_images
from node.state.fold import FoldResult
from node.state.layout import NO_TILE, Group, Layout
from node.state.segments import by_customer
from node.state.sessions import newest_ms, session_begins

Fold = Callable[[Floats, EventColumns, Bools], FoldResult]
"""Fold events into rows [slots, customers]; the mask says of which of them values are wanted."""


@dataclass(frozen=True, slots=True)
class Closer:
    """A model that closed sessions trigger, and where in the rows its sessions are."""

    version: ModelVersion
    group: Group
    mark_slot: int
    since_ms: int
    """Sessions that had ended by then were not for it."""

    def open(self, rows: Floats, at: Ints) -> Bools:
        """bool[len(at)]: whether columns `at` of `rows` [slots, customers] hold a session that it has not run for."""
        ends_ms = newest_ms(self.group, rows, at) + self.group.width_ms
        there: Bools = self.unmarked(rows, at) & (ends_ms > self.since_ms)
        return there

    def unmarked(self, rows: Floats, at: Ints) -> Bools:
        """Of those, also the ones that are not for it so far: further events may change that."""
        began = rows[self.group.head_slot, at]
        there: Bools = (began != NO_TILE) & ~(began <= rows[self.mark_slot, at])  # no mark yet is NaN
        return there

    def idle(self, rows: Floats, at: Ints, now_ms: int) -> Bools:
        """Of those, which no event after `now_ms` can go on with."""
        there: Bools = self.open(rows, at) & (newest_ms(self.group, rows, at) + self.group.width_ms < now_ms)
        return there

    def close(self, rows: Floats, at: Ints, customers: Sequence[str]) -> Closed:
        """Note in columns `at` of `rows` that it runs for their sessions. `customers` are of all columns."""
        began, newest = rows[self.group.head_slot, at], newest_ms(self.group, rows, at)
        rows[self.mark_slot, at] = newest
        names = [customers[row] for row in at.tolist()]
        return Closed(self, names, rows[:, at], began.astype(np.int64), newest.astype(np.int64))


@dataclass(frozen=True, slots=True)
class Closed:
    """Sessions that have ended, of customers with these `rows` [slots, sessions] at that time."""

    closer: Closer
    customers: list[str]
    rows: Floats
    begun_ms: Ints
    newest_ms: Ints


@dataclass(frozen=True, slots=True)
class Idle:
    """Customers whose sessions had ended by `due_ms`, by what the store said of them."""

    version: ModelVersion
    due_ms: int
    customers: Sequence[str]
    cursor: bytes
    """The key that the run has come to with them."""
    last: bool
    """No customer comes after it."""

    def __len__(self) -> int:
        return len(self.customers)


def closers(
    plan: FeaturePlan, layout: Layout, runs: Mapping[str, IntervalRun], held: frozenset[ModelName] = frozenset()
) -> list[Closer]:
    """The session models of the plan, but those not seen by `runs` yet, or held."""
    sessions = [one for one in plan.models if one.schedule is not None and one.schedule.gap_ms]
    there = [closer_of(layout, one, runs.get(str(one.name))) for one in sessions if one.name not in held]
    return [closer for closer in there if closer is not None]


def closer_of(layout: Layout, version: ModelVersion, run: IntervalRun | None) -> Closer | None:
    """None: sessions don't trigger it, or it is not seen yet, or they are not filled from history yet."""
    gap_ms = 0 if version.schedule is None else version.schedule.gap_ms
    if not gap_ms or run is None or run.schedule.gap_ms != gap_ms:
        return None
    group, mark = layout.locate(session_newest(gap_ms)), layout.marks.get(version.name)
    return None if group is None or mark is None else Closer(version, group, mark, run.since_ms)


def idle_customers(
    closer: Closer, layout: Layout, run: IntervalRun, scanned: Sequence[tuple[bytes, bytes]], whole_scan: bool,
    rows_max: int,
) -> Idle:  # fmt: skip
    """The next at most `rows_max` of the run among those `scanned` after its cursor, (customer, row) in key order;
    `whole_scan`: there are no more. Raises StateCorrupt for rows that are not of the layout or of one it grew from."""
    rows = unpack_images(layout, [row for _, row in scanned]).T
    wanted = np.flatnonzero(closer.idle(rows, np.arange(len(scanned)), run.due_ms))
    cut = len(wanted) > rows_max
    wanted = wanted[:rows_max]
    came_to = int(wanted[-1]) if cut else len(scanned) - 1
    return Idle(
        closer.version,
        run.due_ms,
        [scanned[row][0].decode() for row in wanted.tolist()],
        scanned[came_to][0] if scanned else run.cursor,
        whole_scan and not cut,
    )


def close_idle(
    found: Sequence[Closer], idle: Sequence[Idle], rows: Floats, positions: Mapping[str, int]
) -> list[Closed]:
    """The sessions of `idle` customers that have ended by what `rows` [slots, customers] say, whose columns are at
    `positions`. Those that went on are found again."""
    closed: list[Closed] = []
    customers = list(positions) if idle else []
    for one in idle:
        at = np.fromiter([positions[customer] for customer in one.customers], np.int64, len(one))
        for closer in found:
            if closer.version.name == one.version.name:
                ended = at[closer.idle(rows, at, one.due_ms)]
                closed += [closer.close(rows, ended, customers)] if len(ended) else []
    return closed


class RoundFold:
    """Folds a micro-batch, and closes the sessions that end in it; `result` is that of the fold, after `rounds`."""

    def __init__(self, found: Sequence[Closer], rows: Floats, events: EventColumns, wanted: Bools, fold: Fold) -> None:
        """`rows` [slots, customers] change; `found` says whose sessions are watched."""
        self._found, self._rows, self._events, self._wanted, self._fold = found, rows, events, wanted, fold
        self.closed: list[Closed] = []
        self.result = FoldResult({}, 0)

    def rounds(self) -> Iterator[int]:
        """Fold, with a stop before each further round: whoever goes through them may let others run there."""
        ends, rounds = _rounds(self._found, self._rows, self._events)
        if rounds is None:
            self.result = self._fold(self._rows, self._events, self._wanted)
            return
        order, cuts = rounds.argsort(kind="stable"), np.cumsum(np.bincount(rounds)).tolist()
        places = np.cumsum(self._wanted) - 1
        values: dict[Aggregate, Floats] = {}
        late = 0
        for number, (begin, end) in enumerate(itertools.pairwise([0, *cuts])):
            if number:
                yield number
            here = order[begin:end]
            self._close(here, ends)
            folded = self._folded(here)
            late += folded.late
            at = places[here[self._wanted[here]]]
            for aggregate, part in folded.values.items():
                values.setdefault(aggregate, np.empty(int(self._wanted.sum())))[at] = part
        self.result = FoldResult(values, late)

    def _close(self, here: Ints, ends: Sequence[Bools]) -> None:
        """Of the events `here`: the sessions that end before them."""
        for closer, mask in zip(self._found, ends, strict=True):
            at = self._events.rows[here[mask[here]]]
            at = at[closer.open(self._rows, at)]
            if len(at):
                self.closed.append(closer.close(self._rows, at, self._events.customers))

    def _folded(self, here: Ints) -> FoldResult:
        """On the columns of their customers alone: a fold costs something for each, and there may be many rounds."""
        at, columns = np.unique(self._events.rows[here], return_inverse=True)
        rows = np.ascontiguousarray(self._rows[:, at])
        customers = [self._events.customers[row] for row in at.tolist()]
        events = replace(where(self._events, here), rows=columns, customers=customers)
        folded = self._fold(rows, events, self._wanted[here])
        self._rows[:, at] = rows
        return folded


def _rounds(found: Sequence[Closer], rows: Floats, events: EventColumns) -> tuple[list[Bools], Ints | None]:
    """For each closer, bool [n]: which events come after the end of a session of its; and int64 [n]: the round in which
    each event is folded, one more after each such event of the customer. None: all in one."""
    if not found or not len(events):
        return [], None
    order, customers, segments = by_customer(events.rows, rows.shape[1])
    ends = []
    for closer in found:
        begins = session_begins(closer.group, rows, customers, segments, events.times_ms)
        ends.append(_ends(closer, rows, customers, begins, segments.starts, segments.numbers))
    some = np.logical_or.reduce(ends)
    if not some.any():
        return ends, None
    rounds = np.empty(len(order), np.int64)
    rounds[order] = _counted(some, segments.starts, segments.numbers)
    masks = [np.empty(len(order), np.bool_) for _ in ends]
    for mask, end in zip(masks, ends, strict=True):
        mask[order] = end
    return masks, rounds


def _ends(closer: Closer, rows: Floats, customers: Ints, begins: Bools, starts: Ints, numbers: Ints) -> Bools:
    """Which of the events that begin a session end one that the model has not run for. The customer's first ends what
    the row holds."""
    first = begins & (_counted(begins, starts, numbers) == 1)
    ends: Bools = begins & (~first | closer.unmarked(rows, customers)[numbers])
    return ends


def _counted(mask: Bools, starts: Ints, numbers: Ints) -> Ints:
    """[n]: how many of the mask's events there are up to each, in its segment."""
    total = np.cumsum(mask)
    counted: Ints = total - (total[starts] - mask[starts])[numbers]
    return counted


def session_triggers(
    plan: FeaturePlan, layout: Layout, closed: Sequence[Closed], tables: TableSet,
    warming: frozenset[ModelName] = frozenset(),
) -> list[tuple[ModelVersion, Triggers]]:  # fmt: skip
    """The triggers of each model, a customer's in order; of those `warming`, marked so."""
    by_model: dict[ModelName, list[Closed]] = {}
    for one in closed:
        by_model.setdefault(one.closer.version.name, []).append(one)
    work = []
    for parts in by_model.values():
        version = parts[0].closer.version
        triggers = row_triggers(
            plan,
            layout,
            version,
            [customer for part in parts for customer in part.customers],
            np.concatenate([part.rows for part in parts], axis=1),
            np.concatenate([part.newest_ms for part in parts]),
            tables,
            np.concatenate([part.begun_ms for part in parts]),
        )
        work.append((version, replace(triggers, warming=version.name in warming)))
    return work
