"""(P) What a chunk of an interval run is fed: which of the customers scanned it takes, and their features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from node.kernel.ports import FeaturePlan
from node.kernel.tables import NO_TABLES, TableSet
from node.kernel.types import (
    ANY_EVENT,
    Aggregate,
    Bools,
    EventColumns,
    Floats,
    IntervalRun,
    Ints,
    ModelName,
    ModelVersion,
    StoredOutput,
    Triggers,
)
from node.kernel.windows import Accumulator, Input
from node.state.codec import unpack_images
from node.state.layout import Layout
from node.state.outputs import read_output
from node.state.reads import read

_EVENTS = Aggregate("count", ANY_EVENT)
"""Of a customer so far: in every layout, since the built-in profile has it. It rises with each event, late or not, and
with nothing else, so it tells whether there was one since it was last looked at."""
_COUNT = Accumulator("count", Input(ANY_EVENT, "", ""))


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """One piece of a run: what the model is called with, and the key that the run has come to with it."""

    triggers: Triggers
    marks: Floats
    """float64 [triggers]: how many events each of the customers had."""
    cursor: bytes
    last: bool
    """No customer comes after it."""

    def __len__(self) -> int:
        return len(self.triggers)


def chunk_rows(
    plan: FeaturePlan,
    layout: Layout,
    version: ModelVersion,
    run: IntervalRun,
    scanned: Sequence[tuple[bytes, bytes]],
    whole_scan: bool,
    rows_max: int,
    tables: TableSet = NO_TABLES,
) -> ChunkRows:
    """The next at most `rows_max` customers of the run among those `scanned` after its cursor, (customer, row) in key
    order; `whole_scan`: there are no more. Windows end with the interval; what has none holds all that the rows do, so
    also events that came after it.

    Raises StateCorrupt for rows that are not of the layout or of one it grew from.
    """
    images = unpack_images(layout, [row for _, row in scanned])
    events = images[:, _events_slot(layout)]
    wanted = np.flatnonzero(_wanted(layout, version.name, run, images, events))
    cut = len(wanted) > rows_max
    wanted = wanted[:rows_max]
    came_to = int(wanted[-1]) if cut else len(scanned) - 1
    customers = [scanned[row][0].decode() for row in wanted.tolist()]
    return ChunkRows(
        row_triggers(
            plan,
            layout,
            version,
            customers,
            np.ascontiguousarray(images[wanted].T),
            np.full(len(customers), run.due_ms),
            tables,
        ),
        events[wanted],
        scanned[came_to][0] if scanned else run.cursor,
        whole_scan and not cut,
    )


def write_marks(layout: Layout, rows: Floats, name: ModelName, at: np.ndarray, marks: Floats) -> None:
    """Note in columns `at` of `rows` [slots, customers] that the model ran when they had so many events."""
    slot = layout.marks.get(name)
    if slot is not None:
        rows[slot, at] = marks


def _events_slot(layout: Layout) -> int:
    group = layout.locate(_EVENTS)
    if group is None:
        raise KeyError(f"{_EVENTS} is not in the row layout; grow the layout to a plan first")
    return group.first_slot + group.planes[_COUNT]


def _wanted(layout: Layout, name: ModelName, run: IntervalRun, images: Floats, events: Floats) -> Bools:
    """bool [customers]"""
    slot = layout.marks.get(name)
    if run.whole or slot is None:
        return np.ones(len(images), np.bool_)
    return np.not_equal(images[:, slot], events)


def row_triggers(
    plan: FeaturePlan,
    layout: Layout,
    version: ModelVersion,
    customers: Sequence[str],
    rows: Floats,
    times_ms: Ints,
    tables: TableSet,
    begun_ms: Ints | None = None,
) -> Triggers:
    """Triggers without an event, of the customers whose `rows` [slots, customers] these are: of an interval that ended
    at `times_ms` [customers], or of sessions whose newest event was then and which one of `begun_ms` began."""
    count, of_interval = len(customers), begun_ms is None
    zeros = np.zeros(count, np.int64)
    # The fields of events are not there: a manifest whose features use them is refused.
    nobody = EventColumns(zeros, times_ms, np.arange(count), list(customers), zeros, zeros, {})
    reads = _Reads(plan, layout, rows, nobody, tables, of_interval)
    features = plan.rows(nobody, reads, {version.name: np.ones(count, np.bool_)})[version.name]
    return Triggers(
        version.name,
        version.version,
        tuple(customers),
        zeros,
        zeros if begun_ms is None else begun_ms,
        zeros,
        times_ms,
        features,
        "interval" if of_interval else "session",
        tables=tables.versions(plan.tables(version.name)),
    )


class _Reads:
    """`Reads` of rows [slots, customers] as of the times of `nobody`, or just before them: no event is at hand."""

    def __init__(
        self, plan: FeaturePlan, layout: Layout, rows: Floats, nobody: EventColumns, tables: TableSet, before: bool
    ) -> None:
        self.tables = tables
        self._before = before
        self._ttls = {version.name: version.ttl_ms for version in plan.stored_models}
        self._layout = layout
        self._rows = rows
        self._nobody = nobody
        self._aggregates = plan.aggregates
        self._values: Mapping[Aggregate, Floats] | None = None

    def aggregate(self, aggregate: Aggregate) -> Floats:
        if self._values is None:
            times_ms = self._nobody.times_ms
            self._values = read(self._layout, self._rows, times_ms, self._aggregates, ending_before=self._before)
        return self._values[aggregate]

    def stored(self, output: StoredOutput) -> Floats:
        nobody = self._nobody
        return read_output(self._layout, self._rows, output, self._ttls[output.name], nobody.rows, nobody.times_ms)
