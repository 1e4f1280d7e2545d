"""(P) Whether a model's rows are what the events make of them: rows that were kept against rows computed anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from node.columns import where
from node.kernel.limits import DIFFERENCES_TOLD_MAX
from node.kernel.ports import FeaturePlan
from node.kernel.tables import TableSet
from node.kernel.types import Aggregate, Bools, EventColumns, FeatureRows, Floats, Frame, Ints, ModelName, StoredOutput
from node.state.outputs import read_output
from node.training.fed_rows import Described, FedRows, event_ids
from node.training.logged import Event, Logged
from node.training.replay import Replay, Step, differing


class Difference(msgspec.Struct, frozen=True):
    """Of one value: what the model was fed, and what the events give. `column` "row" is the customer's state."""

    inference: str
    column: str
    fed: float | str | None
    computed: float | str | None


class Consistency(msgspec.Struct):
    """What one check found. `share` of the rows compared were the same, in every bit; None: none was compared."""

    model: str
    checked_at_ms: int = 0
    from_ms: int = 0
    to_ms: int = 0
    logged: int = 0
    compared: int = 0
    different: int = 0
    unchecked: dict[str, int] = {}
    """Reason -> rows."""
    state_rows: int = 0
    """Customers' rows compared, after each commit, with those in the changelog."""
    state_different: int = 0
    differences: list[Difference] = []
    """The first of them."""

    @property
    def share(self) -> float | None:
        return 1.0 - self.different / self.compared if self.compared else None

    @property
    def sound(self) -> bool:
        return not self.different and not self.state_different

    def tell(self, difference: Difference) -> None:
        if len(self.differences) < DIFFERENCES_TOLD_MAX:
            self.differences.append(difference)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a version's rows are computed: a plan with the version under `key`, and times to live of stored outputs."""

    plan: FeaturePlan
    key: ModelName
    ttls_ms: Mapping[ModelName, int]


Recipes = Callable[[Described, Mapping[str, str]], Recipe]
"""By what was said of a version, and the versions of the tables that it read."""
Tables = Callable[[Mapping[str, str]], TableSet]
"""Those versions of tables that are here."""
_Group = tuple[Described, dict[str, str]]


class Check:
    """Of one partition. Feed it all commits in order, then `finish`."""

    def __init__(
        self,
        partition: int,
        logged: Logged,
        replay: Replay,
        recipes: Recipes,
        tables: Tables,
        topics: Sequence[str],
        found: Consistency,
    ) -> None:
        self._partition = partition
        self._logged = logged
        self._replay = replay
        self._recipes = recipes
        self._tables = tables
        self._topics = tuple(topics)
        self._found = found

    def commit(self, frame: Frame, offset: int, events: EventColumns | None) -> None:
        """`events` are those of the commit in their order; None where they are gone. Raises StateCorrupt."""
        if events is not None and len(events):
            self._compute(frame, events)
        self._replay.take(frame, offset)

    def finish(self) -> None:
        if self._logged.rows:
            self._logged.leave("its event or the commit of it is not kept any more", len(self._logged.rows))
        self._found.logged += self._logged.count
        for reason, rows in self._logged.unchecked.items():
            self._found.unchecked[reason] = self._found.unchecked.get(reason, 0) + rows

    def _compute(self, frame: Frame, events: EventColumns) -> None:
        names: list[Event] = [
            (self._topics[topic], offset)
            for topic, offset in zip(events.topics.tolist(), events.offsets.tolist(), strict=True)
        ]
        wanted = np.array([name in self._logged.rows for name in names], np.bool_)
        groups = self._groups([names[place] for place in np.flatnonzero(wanted).tolist()])
        recipes = [self._recipes(*group) for group, _ in groups]
        masks: dict[str, Bools] = {}
        asked: set[Aggregate] = set()
        for recipe in recipes:
            masks |= recipe.plan.masks(events, {aggregate.where for aggregate in recipe.plan.aggregates})
            asked.update(recipe.plan.aggregates)
        step = self._replay.compute(frame, events, wanted, masks, sorted(asked))
        self._state(step, frame, events, masks)
        triggering = where(events, wanted)
        for recipe, (group, members) in zip(recipes, groups, strict=True):
            self._rows(recipe, group, members, step, triggering)

    def _groups(self, names: Sequence[Event]) -> list[tuple[_Group, dict[int, tuple[FedRows, int]]]]:
        """Rows that are computed alike: place among the wanted events -> record and place in it."""
        found: dict[tuple[object, ...], tuple[_Group, dict[int, tuple[FedRows, int]]]] = {}
        for at, name in enumerate(names):
            record, place, described = self._logged.rows.pop(name)
            if described is None:
                self._logged.leave("what its version's features mean is not kept any more")
                continue
            tables = dict(record.triggers.tables)
            key = (id(described), *sorted(tables.items()))
            found.setdefault(key, ((described, tables), {}))[1][at] = (record, place)
        return [entry for entry in found.values() if self._readable(*entry)]

    def _readable(self, group: _Group, members: Mapping[int, object]) -> bool:
        absent = ", ".join(sorted(self._tables(group[1]).absent))
        if absent:
            self._logged.leave(f"a version of table {absent} is not kept here any more", len(members))
        return not absent

    def _state(self, step: Step, frame: Frame, events: EventColumns, masks: Mapping[str, Bools]) -> None:
        self._found.state_rows += int(step.known.sum())
        for customer, slot in differing(step, frame, events.customers, masks):
            self._found.state_different += 1
            offset = int(events.offsets[np.flatnonzero(events.rows == events.customers.index(customer))[-1]])
            place = f"{customer}, partition {self._partition}, offset {offset}"
            self._found.tell(Difference(place, "row", f"slot {slot}", "another value"))

    def _rows(
        self,
        recipe: Recipe,
        group: _Group,
        members: Mapping[int, tuple[FedRows, int]],
        step: Step,
        triggering: EventColumns,
    ) -> None:
        tables = self._tables(group[1])
        at = np.array(list(members), np.int64)
        mask = np.zeros(len(triggering), np.bool_)
        mask[at] = True
        names = {
            place: (rec.triggers.event_names.topics[int(rec.triggers.topics[row])], int(rec.triggers.offsets[row]))
            for place, (rec, row) in members.items()
        }
        reads = _Reads(step, triggering, tables, recipe.ttls_ms, members, names, self._logged.given)
        try:
            rows = recipe.plan.rows(triggering, reads, {recipe.key: mask})[recipe.key]
        except KeyError:
            self._logged.leave("rows of state did not have all that its features need", len(members))
            return
        known = step.known[triggering.rows[at]]
        for computed, place in enumerate(members):
            record, row = members[place]
            if not known[computed]:
                self._logged.leave("what its customer had before is not kept any more")
            elif place in reads.lacking:
                self._logged.leave("fresh output of another model that keeps no rows of it")
            else:
                self._compare(record, row, rows, computed, triggering, place)

    def _compare(
        self, record: FedRows, row: int, computed: FeatureRows, at: int, triggering: EventColumns, place: int
    ) -> None:
        triggers, found = record.triggers, self._found
        found.compared += 1
        unlike: list[tuple[str, float | str | None, float | str | None]] = []
        customer = triggering.customers[int(triggering.rows[place])]
        if triggers.customers[row] != customer:
            unlike.append(("key.customer", triggers.customers[row], customer))
        if triggers.times_ms[row] != triggering.times_ms[place]:
            unlike.append(("key.time", float(triggers.times_ms[row]), float(triggering.times_ms[place])))
        fed = triggers.rows
        if fed.names != computed.names:
            unlike.append(("features", ", ".join(fed.names), ", ".join(computed.names)))
        else:
            bits = fed.numbers[row].view(np.uint64) != computed.numbers[at].view(np.uint64)
            for column in np.flatnonzero(bits).tolist():
                values = float(fed.numbers[row, column]), float(computed.numbers[at, column])
                unlike.append((f"features.{fed.names[column]}", *values))
            for name, words in fed.texts.items():
                if words[row] != computed.texts[name][at]:
                    unlike.append((f"features.{name}", words[row], computed.texts[name][at]))
        if unlike:
            found.different += 1
            inference = event_ids(record, self._partition)[row]
            for column_name, was, now in unlike:
                found.tell(Difference(inference, column_name, was, now))


class _Reads:
    """`Reads` of the wanted events of one commit: stored outputs as they were, fresh ones as their models gave them."""

    def __init__(
        self,
        step: Step,
        events: EventColumns,
        tables: TableSet,
        ttls_ms: Mapping[ModelName, int],
        members: Mapping[int, tuple[FedRows, int]],
        names: Mapping[int, Event],
        given: Mapping[StoredOutput, Mapping[Event, float]],
    ) -> None:
        self.tables = tables
        self.lacking: set[int] = set()
        """Events whose fresh output is not known."""
        self._step = step
        self._events = events
        self._ttls_ms = ttls_ms
        self._members = members
        self._names = names
        self._given = given

    def aggregate(self, aggregate: Aggregate) -> Floats:
        return self._step.values[aggregate]

    def stored(self, output: StoredOutput) -> Floats:
        events: Ints = self._events.rows
        ttl_ms = self._ttls_ms[output.name]
        values = read_output(self._step.layout, self._step.rows, output, ttl_ms, events, self._events.times_ms)
        given = self._given.get(output, {})
        for place, (record, row) in self._members.items():
            triggers = record.triggers
            if triggers.fresh is None or str(output) not in triggers.inputs:
                continue
            if triggers.fresh[row] >> triggers.inputs.index(str(output)) & 1:
                fresh = given.get(self._names[place])
                if fresh is None:
                    self.lacking.add(place)
                else:
                    values[place] = fresh
        return values
