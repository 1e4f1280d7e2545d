"""Training features by the node's own code: the same plan, fold and expressions, without a broker.

What the node will compute online is thereby what the models are fitted on, to the bit. Another model's stored
output is seen as a node sees it too: as it stood before the micro-batch of the event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demonstration.data import FIELDS, TEXT_FIELDS, TYPES, Array, Events
from node.columns import customer_rows
from node.kernel.tables import NO_TABLES, TableSet
from node.kernel.types import Aggregate, EventColumns, EventSchema, FeatureRows, ModelName, StoredOutput
from node.state.fold import fold
from node.state.layout import Layout
from tenants.features import CompiledFeatures, compile_plan
from tenants.manifest import Manifest, parse_manifest

MANIFESTS = Path(__file__).parent / "manifests"
SCHEMA = EventSchema(TYPES, FIELDS)  # type: ignore[arg-type]


def read_manifests() -> dict[ModelName, Manifest]:
    """The manifests beside this file, by model: `<tenant>/<model>.toml`."""
    return {
        ModelName(path.parent.name, path.stem): parse_manifest(
            str(path), path.parent.name, path.stem, path.read_bytes(), SCHEMA
        )
        for path in sorted(MANIFESTS.glob("*/*.toml"))
        if path.name != "tenant.toml"
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

    @property
    def tables(self) -> TableSet:
        return NO_TABLES

    def aggregate(self, aggregate: Aggregate) -> Array:
        return self.aggregates[aggregate]

    def stored(self, output: StoredOutput) -> Array:
        return self.outputs.get(output, np.full(len(self.places), np.nan))

    def with_output(self, output: StoredOutput, values: Array) -> Observed:
        return Observed(self.places, self.events, self.aggregates, {**self.outputs, output: values})


def plan_of(manifests: Sequence[Manifest]) -> CompiledFeatures:
    """A plan as the node will have it; the models' files are not there yet and do not matter to it."""
    return compile_plan([(manifest.version("0" * 64), manifest) for manifest in manifests], SCHEMA)


def observe(
    plan: CompiledFeatures, events: Events, wanted: Array, batch_events: int, progress: Callable[[int], None]
) -> Observed:
    """Fold all events, in micro-batches, and keep every aggregate as of the `wanted` ones (bool [events]).

    `progress` is told the number of events after each micro-batch.
    """
    columns = as_columns(events)
    layout = Layout.empty().grown(plan.aggregates, plan.stored_models)
    rows = np.repeat(layout.initial[:, None], len(columns.customers), axis=1)
    masks = plan.masks(columns)
    found: list[Mapping[Aggregate, Array]] = []
    for part in _slices(len(events), batch_events):
        batch = _part(columns, part)
        batch_masks = {where: mask[part] for where, mask in masks.items()}
        folded = fold(layout, rows, batch, batch_masks, wanted[part], TYPES, plan.aggregates)
        found.append(folded.values)
        progress(part.stop - part.start)
    places = np.flatnonzero(wanted)
    aggregates = {name: np.concatenate([values[name] for values in found]) for name in plan.aggregates}
    return Observed(places, _part(columns, places), aggregates, {})


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


def _slices(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


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
