"""(P) Models of one micro-batch that use each other's outputs: which can run now, and with what.

A model waits for those whose outputs it uses, of the same event, within its own deadline and the cycle's; for what has
not come by then, failed, or is of another event, it takes the output that was stored before the micro-batch. Which of
the two it was is kept with the trigger. What waits follows from the plan, which has no rings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from node.kernel.ports import FeatureBatch, FeaturePlan, Reads
from node.kernel.tables import TableSet
from node.kernel.types import (
    Aggregate,
    Bools,
    EventColumns,
    EventNames,
    FeatureRows,
    Floats,
    Ints,
    ModelName,
    ModelOutputs,
    ModelVersion,
    StagedVersion,
    StoredOutput,
    Triggers,
)

NO_VERSIONS: Final[Mapping[str, str]] = {}
INPUTS_TOLD_MAX: Final = 62
"""Bits of an int64 that say which inputs were fresh."""

Work = list[tuple[ModelVersion, Triggers]]
Shown = dict[ModelName, tuple[StagedVersion, FeatureRows]]
"""The rows of a model's triggers as its shadow is called with them."""


class FreshReads:
    """`Reads` with the outputs that models have given for these very events in place of stored ones."""

    def __init__(self, reads: Reads, selections: Mapping[ModelName, Bools], places: Mapping[StoredOutput, int]) -> None:
        self._reads = reads
        self._selections = selections
        self._places = places
        self._answers: dict[ModelName, ModelOutputs] = {}

    def take(self, name: ModelName, outputs: ModelOutputs) -> None:
        """One row for each event that the model's selection names."""
        self._answers[name] = outputs

    @property
    def tables(self) -> TableSet:
        return self._reads.tables

    def aggregate(self, aggregate: Aggregate) -> Floats:
        return self._reads.aggregate(aggregate)

    def stored(self, output: StoredOutput) -> Floats:
        values, answer = self._reads.stored(output), self._answers.get(output.name)
        if answer is None:
            return values
        fresh = self.fresh(output)
        values = values.copy()
        good = fresh[self._selections[output.name]]
        values[fresh] = answer.values[good, self._places[output]]
        return values

    def fresh(self, output: StoredOutput) -> Bools:
        """bool[events]: whether the output is of that very event."""
        answer = self._answers.get(output.name)
        if answer is None:
            return np.zeros(len(next(iter(self._selections.values()))), np.bool_)
        fresh = self._selections[output.name].copy()
        at = np.flatnonzero(fresh)
        fresh[at[list(answer.errors)]] = False
        return fresh


class Ordering:
    """What of one micro-batch is to run, and what waits for what. `selections` are masks over `events`.

    Versions that run beside live ones are selected by their keys. Models that use a model's outputs wait for its live
    version alone: where a canary answers, they take the stored output.
    """

    def __init__(
        self,
        plan: FeaturePlan,
        events: EventColumns,
        names: EventNames,
        selections: Mapping[ModelName, Bools],
        reads: Reads,
        warming: frozenset[ModelName] = frozenset(),
    ) -> None:
        self._plan = plan
        self._warming = warming
        self._events = events
        self._names = names
        self._selections = selections
        self._inputs = plan.inputs
        self._versions = {version.name: version for version in plan.models if version.name in selections}
        self._beside = {staged.key: staged for staged in plan.staged.values() if staged.key in selections}
        self._versions |= {key: staged.version for key, staged in self._beside.items()}
        self.shown: Shown = {}
        """Of the shadows that could begin so far."""
        places = {
            StoredOutput(version.name, output): place
            for version in plan.models
            for place, output in enumerate(version.outputs)
        }
        self._reads = FreshReads(reads, selections, places)
        self._batch: FeatureBatch | None = plan.batch(events, selections) if selections else None
        self._open = {
            name: {output.name for output in self._inputs.get(name, ()) if output.name in selections}
            for name in self._versions
        }
        """Models that have not begun -> those they wait for."""

    @property
    def waiting(self) -> bool:
        return bool(self._open)

    @property
    def awaited(self) -> frozenset[ModelName]:
        """Models that others wait for."""
        return frozenset[ModelName]().union(*self._open.values())

    def answered(self, name: ModelName, outputs: ModelOutputs) -> None:
        self._reads.take(name, outputs)
        self.given_up(name)

    def given_up(self, name: ModelName) -> None:
        """Its stored outputs will do."""
        for waits in self._open.values():
            waits.discard(name)

    def late(self, seconds: float) -> None:
        """So much of the cycle's time has passed: who may wait no longer takes what there is."""
        for name, waits in self._open.items():
            if seconds * 1000 >= self._versions[name].deadline_ms:
                waits.clear()

    def next_late(self) -> float:
        """When the first of those that wait may wait no longer, in seconds of the cycle's time; inf for none."""
        due = [self._versions[name].deadline_ms / 1000 for name, waits in self._open.items() if waits]
        return min(due, default=float("inf"))

    def ready(self) -> Work:
        """What waits for nothing, in the plan's order; it counts as begun."""
        names = [name for name, waits in self._open.items() if not waits]
        if not names or self._batch is None:
            return []
        for name in names:
            del self._open[name]
        rows = self._batch.rows(names, self._reads)
        for name, staged in self._beside.items():
            if staged.kind == "shadow" and name in rows:
                self.shown[staged.version.name] = staged, rows[name]
        return [
            (self._versions[name], self._triggers(name, rows[name]))
            for name in names
            if name not in self._beside or self._beside[name].kind == "canary"
        ]

    def _triggers(self, name: ModelName, rows: FeatureRows) -> Triggers:
        version, line = self._versions[name], self._versions[name].short_version if name in self._beside else ""
        return triggers_of(
            version,
            self._events,
            self._names,
            self._selections[name],
            rows,
            *self._told(name),
            tables=self._reads.tables.versions(self._plan.tables(name)),
            line=line,
            warming=name in self._warming,
        )

    def _told(self, name: ModelName) -> tuple[tuple[str, ...], Ints | None]:
        """The inputs of a model, and for each of its triggers which of them were fresh, a bit each."""
        inputs = self._inputs.get(name, ())[:INPUTS_TOLD_MAX]
        if not inputs:
            return (), None
        bits = np.zeros(len(self._events), np.int64)
        for place, output in enumerate(inputs):
            bits |= self._reads.fresh(output).astype(np.int64) << place
        return tuple(map(str, inputs)), bits[self._selections[name]]


def triggers_of(
    version: ModelVersion,
    events: EventColumns,
    names: EventNames,
    mask: Bools,
    rows: FeatureRows,
    inputs: tuple[str, ...] = (),
    fresh: Ints | None = None,
    tables: Mapping[str, str] = NO_VERSIONS,
    line: str = "",
    warming: bool = False,
) -> Triggers:
    """`tables` are the versions that `rows` were computed with."""
    at = np.flatnonzero(mask)
    customers = events.customers
    return Triggers(
        version.name,
        version.version,
        tuple([customers[row] for row in events.rows[at].tolist()]),
        events.topics[at],
        events.offsets[at],
        events.types[at],
        events.times_ms[at],
        rows,
        inputs=inputs,
        fresh=fresh,
        tables=tables,
        line=line,
        warming=warming,
        event_names=names,
    )
