"""Reading customers from this node's open partitions.

Rows come from the stores, which hold committed frames only, and not from the caches: a cache has nothing newer, and
must not be filled by readers. Everything is a few look-ups of one key and some columns of one row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from node.columns import number_column, text_column
from node.kernel.errors import BoundExceeded, NotFound, StoreUnavailable
from node.kernel.ports import FeaturePlan, StateStore
from node.kernel.tables import NO_TABLES, TableSet
from node.kernel.types import (
    ANY_EVENT,
    EVENT_TIME,
    Aggregate,
    Column,
    EventColumns,
    EventSchema,
    Floats,
    Ints,
    ModelName,
    ModelVersion,
    StoredOutput,
)
from node.serving.view import AsOf, CustomerFeatures, CustomerInferences, CustomerState, Inference
from node.state.codec import unpack
from node.state.layout import Layout, ModelSlots
from node.state.outputs import read_output
from node.state.reads import read

LAST_SEEN = Aggregate("max", ANY_EVENT, EVENT_TIME)
"""Seconds since the Unix epoch; in every layout, since the built-in profile has it."""
_LOADS_AT_ONCE = 8
"""Stores looked into before other work gets its turn."""


@dataclass(frozen=True, slots=True)
class OpenPartition:
    number: int
    store: StateStore
    layout: Layout
    """Of the partition now; rows written under earlier ones are padded."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A customer's row, float64 [slots, 1], under `layout`."""

    number: int
    layout: Layout
    row: Floats
    changed_ms: int | None


class _RowReads:
    """`Reads` of one row as of one time. What is not filled from history yet is empty. Raises BoundExceeded for
    an aggregate that rows have no room for."""

    def __init__(self, found: _Found, at_ms: int, versions: Mapping[ModelName, ModelVersion], tables: TableSet) -> None:
        self.tables = tables
        self._found = found
        self._times_ms = np.array([at_ms], np.int64)
        self._versions = versions
        asked = [*{*found.layout.aggregates, *found.layout.awaiting}]
        self._values = read(found.layout, found.row, self._times_ms, asked)

    def aggregate(self, aggregate: Aggregate) -> Floats:
        if aggregate in self._values:
            return self._values[aggregate]
        raise BoundExceeded(
            f"rows of partition {self._found.number} have no room for {aggregate}, or not yet: /v1/status tells for "
            "which models; ask for fewer windowed aggregates"
        )

    def stored(self, output: StoredOutput) -> Floats:
        ttl_ms = self._versions[output.name].ttl_ms
        column: Ints = np.zeros(1, np.int64)
        return read_output(self._found.layout, self._found.row, output, ttl_ms, column, self._times_ms)


class CustomerReads:
    """The reading half of a `NodeView`.

    `partitions` gives each partition the node owns, None for one that is not open now. `plan` gives the present plan.
    `profile` is the aggregate behind each profile value. `event_features` names the features of a model that have no
    value without an event. `tables` gives the versions that are live.
    """

    def __init__(
        self,
        partitions: Callable[[], Mapping[int, OpenPartition | None]],
        plan: Callable[[], FeaturePlan],
        schema: EventSchema,
        profile: Mapping[str, Aggregate],
        event_features: Callable[[ModelName], frozenset[str]],
        tables: Callable[[], TableSet] = lambda: NO_TABLES,
    ) -> None:
        self._tables = tables
        self._partitions = partitions
        self._plan = plan
        self._schema = schema
        self._profile = dict(profile)
        self._event_features = event_features
        self._grown: dict[int, tuple[Layout, FeaturePlan, Layout]] = {}

    async def customer(self, customer: str, at: AsOf) -> CustomerState:
        """Raises NotFound, StoreUnavailable, StateCorrupt; so do the others."""
        found, *others = await self._find(customer, self._plan())
        at_ms = _resolved(at, found)
        values = read(found.layout, found.row, np.array([at_ms], np.int64))
        return CustomerState(
            customer=customer,
            partition=found.number,
            also_on=sorted(other.number for other in others),
            at_ms=at_ms,
            changed_ms=found.changed_ms,
            profile={name: float(values[aggregate][0]) for name, aggregate in self._profile.items()},
            aggregates={str(aggregate): float(column[0]) for aggregate, column in values.items()},
        )

    async def features(self, customer: str, model: ModelName, at: AsOf) -> CustomerFeatures:
        """Raises TableUnavailable too, as a cycle does."""
        plan = self._plan()
        versions = {version.name: version for version in plan.models}
        if model not in versions:
            raise NotFound(f"no version of model {model} is live here; /v1/models lists all with their state")
        found = (await self._find(customer, plan))[0]
        tables = self._tables()
        tables.require(plan.tables(model), f"model {model}")
        at_ms = _resolved(at, found)
        event = self._no_event(customer, versions[model], at_ms)
        rows = plan.rows(event, _RowReads(found, at_ms, versions, tables), {model: np.ones(1, np.bool_)})[model]
        values: dict[str, float | str | None] = dict(zip(rows.names, rows.numbers[0].tolist(), strict=True))
        values |= {name: column[0] for name, column in rows.texts.items()}
        needing = self._event_features(model)
        return CustomerFeatures(
            customer=customer,
            tenant=model.tenant,
            model=model.model,
            version=versions[model].short_version,
            partition=found.number,
            at_ms=at_ms,
            features={name: None if name in needing else value for name, value in values.items()},
            needs_event=[name for name in rows.names if name in needing],
        )

    async def inferences(self, customer: str, at: AsOf) -> CustomerInferences:
        plan = self._plan()
        found = (await self._find(customer, plan))[0]
        at_ms = _resolved(at, found)
        versions = {version.name: version for version in plan.models}
        inferences = [
            inference
            for name, slots in sorted(found.layout.outputs.items())
            for inference in _inference(name, slots, found.row[:, 0], versions.get(name), at_ms)
        ]
        return CustomerInferences(customer=customer, partition=found.number, at_ms=at_ms, inferences=inferences)

    async def _find(self, customer: str, plan: FeaturePlan) -> list[_Found]:
        """The customer's rows, that with the newest event first; more than one if its events are keyed differently."""
        key, found, closed = customer.encode(), [], []
        partitions = self._partitions()
        for turn, number in enumerate(list(partitions), 1):
            partition = partitions.get(number)
            if partition is None:
                closed.append(number)
                continue
            stored = partition.store.load([key])
            if stored[0] is not None:
                found.append(self._unpacked(partition, stored, plan))
            if turn % _LOADS_AT_ONCE == 0:
                await asyncio.sleep(0)
                partitions = self._partitions()  # one may have been closed, or its rows have grown
        if found:
            return sorted(found, key=lambda one: (-(one.changed_ms or 0), one.number))
        if closed:
            raise StoreUnavailable(f"partitions {closed} are not open now, and the customer is not on the others")
        raise NotFound("this customer is not known here: no event of it has been taken in")

    def _unpacked(self, partition: OpenPartition, stored: list[bytes | None], plan: FeaturePlan) -> _Found:
        layout = self._grown_layout(partition, plan)
        row = unpack(layout, stored)
        last_seen = float(read(layout, row, np.zeros(1, np.int64), [LAST_SEEN])[LAST_SEEN][0])
        changed_ms = None if np.isnan(last_seen) else round(last_seen * 1000)
        return _Found(partition.number, layout, row, changed_ms)

    def _grown_layout(self, partition: OpenPartition, plan: FeaturePlan) -> Layout:
        """The partition's layout, grown as its next cycle will grow it: a plan may have come since the last one. As it
        is, where there is no room for all of the plan."""
        held = self._grown.get(partition.number)
        if held is None or held[0] is not partition.layout or held[1] is not plan:
            filling = {one for one in partition.layout.awaiting if partition.layout.locate(one) is None}
            wanted = {*plan.aggregates, *self._profile.values(), LAST_SEEN} - filling
            try:
                grown = partition.layout.grown(sorted(wanted), plan.stored_models)
            except BoundExceeded:
                grown = partition.layout
            held = self._grown[partition.number] = (partition.layout, plan, grown)
        return held[2]

    def _no_event(self, customer: str, version: ModelVersion, at_ms: int) -> EventColumns:
        """One event of the model's first type, all fields missing."""
        fields: dict[str, Column] = {
            name: text_column([None]) if kind == "text" else number_column([None])
            for name, kind in self._schema.fields.items()
        }
        code = self._schema.types.index(version.events[0]) if version.events else 0
        zero = np.zeros(1, np.int64)
        return EventColumns(zero + code, zero + at_ms, zero, [customer], zero, zero, fields)


def _resolved(at: AsOf, found: _Found) -> int:
    return (found.changed_ms or 0) if at == "last" else at


def _inference(
    name: ModelName, slots: ModelSlots, row: Floats, live: ModelVersion | None, at_ms: int
) -> Iterator[Inference]:
    """The stored inference of one model, if there is one that has not expired. `row` is float64 [slots]."""
    time_ms = row[slots.time_slot]
    ttl_ms = live.ttl_ms if live is not None else 0
    if np.isnan(time_ms) or (ttl_ms and time_ms + ttl_ms < at_ms):
        return
    version = f"{int(row[slots.version_slot]):012x}"
    is_live = live is not None and live.short_version == version
    names = live.outputs if live is not None and is_live else tuple(slots.outputs)
    labels = live.labels if live is not None and is_live else ()
    values = {
        output: float(row[slots.outputs[output]]) if output in slots.outputs else float("nan") for output in names
    }
    yield Inference(
        tenant=name.tenant,
        model=name.model,
        version=version,
        live=is_live,
        outputs={
            output: labels[int(value)] if labels and value == value else value
            for output, value in values.items()
            if is_live or value == value
        },
        event_time_ms=int(time_ms),
        expires_ms=int(time_ms) + ttl_ms if ttl_ms else None,
    )
