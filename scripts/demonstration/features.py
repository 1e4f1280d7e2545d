"""Training features by the node's own code: the same plan, fold and expressions, without a broker.

What the node will compute online is thereby what the models are fitted on, to the bit. Another model's stored
output is seen as a node sees it too: as it stood before the micro-batch of the event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC
from itertools import pairwise, starmap
from pathlib import Path

import numpy as np

from demonstration import products
from demonstration.data import FIELDS, TEXT_FIELDS, TYPES, Array, Events
from node.columns import customer_rows
from node.interval_rows import chunk_rows
from node.kernel.tables import NO_TABLES, TableSet
from node.kernel.types import (
    Aggregate,
    EventColumns,
    EventSchema,
    FeatureRows,
    IntervalRun,
    ModelName,
    ModelVersion,
    StoredOutput,
)
from node.schedule import newest_interval
from node.state.codec import images, split
from node.state.fold import fold
from node.state.layout import Layout
from tenants.definitions import Definitions, compile_definitions
from tenants.features import CompiledFeatures, compile_plan
from tenants.manifest import Manifest, parse_manifest
from tenants.shared_names import FEATURES_FILE

MANIFESTS = Path(__file__).parent / "manifests"
SCHEMA = EventSchema(TYPES, FIELDS, tables={products.TABLE: products.SCHEMA})  # type: ignore[arg-type]
_OTHER_FILES = ("tenant.toml", FEATURES_FILE)


def shared_features() -> Definitions:
    """What the tenants share: `<tenant>/features.toml`."""
    texts = {path.parent.name: path.read_text() for path in sorted(MANIFESTS.glob(f"*/{FEATURES_FILE}"))}
    return compile_definitions(texts, SCHEMA)


def read_manifests() -> dict[ModelName, Manifest]:
    """The manifests beside this file, by model: `<tenant>/<model>.toml`."""
    shared = shared_features()
    return {
        ModelName(path.parent.name, path.stem): parse_manifest(
            str(path), path.parent.name, path.stem, path.read_bytes(), SCHEMA, shared.resolver(path.parent.name)
        )
        for path in sorted(MANIFESTS.glob("*/*.toml"))
        if path.name not in _OTHER_FILES
    }


def as_columns(events: Events) -> EventColumns:
    """What the node's decoder makes of the events."""
    rows, customers = customer_rows([str(household) for household in events.households.tolist()])
    texts = {name: events.text(name) for name in TEXT_FIELDS}
    return EventColumns(
        types=events.kinds.astype(np.int64),
        times_ms=events.times_ms,
        rows=rows,
        customers=customers,
        topics=np.zeros(len(events), np.int64),
        offsets=np.arange(len(events)),
        fields={**events.numbers, **texts},
    )


@dataclass(frozen=True)
class Observed:
    """The aggregates as of some events: `places` are their positions; it is the `Reads` of a feature plan."""

    places: Array
    events: EventColumns
    aggregates: Mapping[Aggregate, Array]
    outputs: Mapping[StoredOutput, Array]
    tables: TableSet = NO_TABLES

    def aggregate(self, aggregate: Aggregate) -> Array:
        return self.aggregates[aggregate]

    def stored(self, output: StoredOutput) -> Array:
        return self.outputs.get(output, np.full(len(self.places), np.nan))

    def with_output(self, output: StoredOutput, values: Array) -> Observed:
        return replace(self, outputs={**self.outputs, output: values})


def plan_of(manifests: Sequence[Manifest]) -> CompiledFeatures:
    """A plan as the node will have it; the models' files are not there yet and do not matter to it."""
    pairs = [(manifest.version("0" * 64), manifest) for manifest in manifests]
    return compile_plan(pairs, SCHEMA, shared_features())


@dataclass(frozen=True)
class IntervalRows:
    """What an interval model is fed at the end of one interval: a row of each household that has had an event."""

    end_ms: int
    households: Array
    rows: FeatureRows


def observe(
    plan: CompiledFeatures,
    events: Events,
    wanted: Array,
    batch_events: int,
    progress: Callable[[int], None],
    tables: TableSet = NO_TABLES,
    at_ends: Callable[[CompiledFeatures, Layout, EventColumns, Array, int], None] | None = None,
    ends_ms: Sequence[int] = (),
) -> Observed:
    """Fold all events, in micro-batches, and keep every aggregate as of the `wanted` ones (bool [events]).

    `progress` is told the number of events after each micro-batch. `at_ends` is called with the rows as of each of
    `ends_ms`, float64 [slots, customers].
    """
    columns = as_columns(events)
    layout = Layout.empty().grown(plan.aggregates, plan.stored_models)
    rows = np.repeat(layout.initial[:, None], len(columns.customers), axis=1)
    masks = plan.masks(columns, {aggregate.where for aggregate in plan.aggregates})
    found: list[Mapping[Aggregate, Array]] = []
    ends = np.array(ends_ms, np.int64)
    stops = np.searchsorted(events.times_ms, ends)
    for part in _slices(len(events), batch_events, stops.tolist()):
        if at_ends is not None:
            for end_ms in ends[stops == part.start].tolist():
                at_ends(plan, layout, columns, rows, end_ms)
        batch = _part(columns, part)
        batch_masks = {where: mask[part] for where, mask in masks.items()}
        folded = fold(layout, rows, batch, batch_masks, wanted[part], TYPES, plan.aggregates)
        found.append(folded.values)
        progress(part.stop - part.start)
    places = np.flatnonzero(wanted)
    aggregates = {name: np.concatenate([values[name] for values in found]) for name in plan.aggregates}
    return Observed(places, _part(columns, places), aggregates, {}, tables)


class Ends:
    """Collects the rows of one interval model: to be called by `observe`."""

    def __init__(self, version: ModelVersion) -> None:
        assert version.schedule is not None
        self._version = version
        self._schedule = version.schedule
        self.found: list[IntervalRows] = []

    def ends_ms(self, first_ms: int, last_ms: int) -> list[int]:
        """Of the intervals that end in between."""
        ends, every_ms = [], self._schedule.every_ms
        end_ms = newest_interval(self._schedule, first_ms, UTC).due_ms + every_ms
        while end_ms <= last_ms:
            ends.append(end_ms)
            end_ms += every_ms
        return ends

    def __call__(self, plan: CompiledFeatures, layout: Layout, columns: EventColumns, rows: Array, end_ms: int) -> None:
        run = IntervalRun(self._schedule, 0, end_ms)
        untouched = layout.initial.view(np.uint64)[:, None]  # bits, as what is missing equals nothing
        known = np.flatnonzero((rows.view(np.uint64) != untouched).any(axis=0))
        names = [columns.customers[place].encode() for place in known.tolist()]
        scanned = list(zip(names, split(images(rows[:, known])), strict=True))
        chunk = chunk_rows(plan, layout, self._version, run, scanned, True, len(scanned) or 1)
        households = np.array([int(name) for name in chunk.triggers.customers], np.int64)
        self.found.append(IntervalRows(end_ms, households, chunk.triggers.rows))


def rows_of(plan: CompiledFeatures, name: ModelName, observed: Observed, places: Array) -> FeatureRows:
    """The model's feature rows for the events at `places`, which must be among those observed."""
    return plan.rows(observed.events, observed, {name: np.isin(observed.places, places)})[name]


def stored_before(households: Array, places: Array, scores: Array, asked: Array, batch_events: int) -> Array:
    """float64 [asked]: the household's last score from a micro-batch before that of each asked event; NaN if none.

    `households` is of all events; `scores` are those of the events at `places`, ascending.
    """
    # One sorted key of household and micro-batch; the sort is stable, so the last of a batch comes last.
    batches = len(households) // batch_events + 2
    keys = households[places] * batches + places // batch_events
    order = np.argsort(keys, kind="stable")
    found = np.searchsorted(keys[order], households[asked] * batches + asked // batch_events, side="left") - 1
    stored = np.full(len(asked), np.nan)
    if not len(places):
        return stored
    last = order[np.maximum(found, 0)]
    same = (found >= 0) & (households[places[last]] == households[asked])
    stored[same] = scores[last[same]]
    return stored


def _slices(total: int, size: int, stops: Iterable[int]) -> Iterator[slice]:
    """Of `size`, cut at the stops too."""
    yield from starmap(
        slice, pairwise(sorted({*range(0, total, size), *(stop for stop in stops if stop < total), total}))
    )


def _part(columns: EventColumns, selection: slice | Array) -> EventColumns:
    """The events of `selection`, customers numbered as before."""
    return EventColumns(
        columns.types[selection],
        columns.times_ms[selection],
        columns.rows[selection],
        columns.customers,
        columns.topics[selection],
        columns.offsets[selection],
        {name: column[selection] for name, column in columns.fields.items()},
    )
