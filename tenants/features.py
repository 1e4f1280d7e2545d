"""Every live model's features, compiled together into one list of steps over columns.

Compiling numbers the values (local value numbering, Cocke 1969): a feature's name is replaced by the number of
its expression, and two equal (operation, argument numbers) get one number, across features and models. So
each distinct value is computed once per micro-batch, and an argument's number is always below its user's.

All columns are float64 (booleans 0.0 and 1.0, missing NaN) or object arrays of str (missing None).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Final, TypeAlias, cast

import numpy as np

from node.kernel.errors import NotFound
from node.kernel.ports import FeaturePlan, Reads
from node.kernel.tables import NO_TABLES, TableSet, no_values
from node.kernel.types import (
    EVENT_TIME,
    Aggregate,
    Backfill,
    Bools,
    Column,
    EventColumns,
    EventSchema,
    FeatureRows,
    Floats,
    Ints,
    ModelName,
    ModelSource,
    ModelVersion,
    RowNeeds,
    StagedVersion,
    StoredOutput,
    Texts,
    session_newest,
)
from tenants.definitions import NOTHING_SHARED, Definitions
from tenants.expression import (
    EVENT_TYPE,
    AggregateValue,
    EventField,
    ExpressionError,
    FeatureValue,
    Literal,
    Membership,
    Node,
    Operation,
    StoredValue,
    TableValue,
    children,
    evaluate_profile,
    expression_name,
    parse_filter,
)
from tenants.manifest import Manifest
from tenants.model_graph import ring_problem
from tenants.row_needs import needs_of
from tenants.shared_names import SharedName, SharedValue
from tenants.step_costs import SharedCost, StepMeter

__all__ = ["CompiledFeatures", "compile_plan", "evaluate_profile"]

_GATHER_SHARE_MAX: Final = 0.75
"""Above this share of events selected, gathering every leaf costs more than computing the rest of the rows."""

_DAY_SECONDS: Final = 86_400.0
_EPOCH_WEEKDAY: Final = 3.0
"""1 January 1970 was a Thursday; Monday is 0."""


_NONE: Final = np.array(None, dtype=object)


def _finite(values: Floats) -> Floats:
    """What is not a finite number is missing. Changes `values`, which must be the caller's own."""
    values[~np.isfinite(values)] = np.nan
    return values


def _power(base: Floats, exponent: Floats) -> Floats:
    # numpy says nan ** 0 == 1 ** nan == 1; here, arithmetic with a missing operand is missing.
    result = _finite(base**exponent)
    result[np.isnan(base) | np.isnan(exponent)] = np.nan
    return result


def _equal(left: Column, right: Column) -> Bools:
    if left.dtype == object:
        pairs = zip(left.tolist(), right.tolist(), strict=True)
        return np.array([a == b and a is not None for a, b in pairs], dtype=np.bool_)
    return np.equal(left, right)


def _different(left: Column, right: Column) -> Bools:
    """False, not True, where either is missing."""
    return ~(_equal(left, right) | _missing(left) | _missing(right))


def _missing(values: Column) -> Bools:
    found: Bools = np.isnan(values) if values.dtype != object else np.equal(values, _NONE)
    return found


def _choose(condition: Floats, then: Column, otherwise: Column) -> Column:
    return np.where(condition == 1.0, then, otherwise)


def _coalesce(*columns: Column) -> Column:
    return reduce(lambda first, second: np.where(_missing(first), second, first), columns)


def _all(*conditions: Floats) -> Bools:
    return reduce(np.logical_and, [condition == 1.0 for condition in conditions])


def _any(*conditions: Floats) -> Bools:
    return reduce(np.logical_or, [condition == 1.0 for condition in conditions])


_OPERATIONS: Final[Mapping[str, Callable[..., Column | Bools]]] = {
    "+": lambda a, b: _finite(a + b),
    "-": lambda a, b: _finite(a - b),
    "*": lambda a, b: _finite(a * b),
    "/": lambda a, b: _finite(a / b),
    "//": lambda a, b: _finite(a // b),
    "%": lambda a, b: _finite(a % b),
    "**": _power,
    "negate": np.negative,
    "==": _equal,
    "!=": _different,
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
    "and": _all,
    "or": _any,
    "not": lambda a: a != 1.0,
    "if": _choose,
    "abs": np.abs,
    "min": lambda *columns: reduce(np.minimum, columns),
    "max": lambda *columns: reduce(np.maximum, columns),
    "log": lambda a: _finite(np.log(a)),
    "log1p": lambda a: _finite(np.log1p(a)),
    "exp": lambda a: _finite(np.exp(a)),
    "sqrt": np.sqrt,
    "round": np.rint,
    "floor": np.floor,
    "ceil": np.ceil,
    "clip": lambda a, low, high: np.minimum(np.maximum(a, low), high),
    "coalesce": _coalesce,
    "is_missing": _missing,
    "hour": lambda a: np.floor(a / 3600.0) % 24.0,
    "weekday": lambda a: (np.floor(a / _DAY_SECONDS) + _EPOCH_WEEKDAY) % 7.0,
}


def _member(item: Column, values: frozenset[float] | frozenset[str], negated: bool) -> Bools:
    found: Bools
    if item.dtype != object:
        found = np.isin(item, [float(value) for value in values])
    elif len(values) == 1:
        # As an object: numpy's own strings lose trailing NULs.
        found = np.equal(item, np.array(next(iter(values)), dtype=object))
    else:
        found = np.fromiter(map(values.__contains__, item.tolist()), np.bool_, len(item))
    return ~(found | _missing(item)) if negated else found


_Leaf: TypeAlias = Literal | EventField | AggregateValue | StoredValue
_Head: TypeAlias = _Leaf | TableValue | Membership | str
"""What a step does apart from its arguments: a leaf, a membership or table value with its item or key taken out, or an
operation."""

_ITEM: Final = Literal(0.0, "number")
_NO_NUMBER: Final = Literal(np.nan, "number")
_NO_TEXT: Final = Literal(cast("str", None), "text")


@dataclass(frozen=True, slots=True)
class _Step:
    head: _Head
    arguments: tuple[int, ...] = ()


class _Numbering:
    """Gives equal values one number; `steps[number]` says how to compute it."""

    def __init__(self, definitions: Definitions = NOTHING_SHARED) -> None:
        self.steps: list[_Step] = []
        self._numbers: dict[_Step, int] = {}
        self._definitions = definitions
        self.shared: dict[SharedName, int] = {}
        """The shared features that were numbered, by name with version."""

    def number(self, node: Node, features: Mapping[str, int]) -> int:
        """`features` gives the number of each feature name that `node` may use."""
        if isinstance(node, FeatureValue):
            return features[node.name]
        if isinstance(node, SharedValue):
            return self._number_shared(node)
        arguments = tuple(self.number(child, features) for child in children(node))
        head: _Head = node if not isinstance(node, Operation) else node.name
        if isinstance(node, Membership):
            head = Membership(_ITEM, node.values, node.negated)
        elif isinstance(node, TableValue):
            head = TableValue(node.table, node.column, _ITEM, node.type)
        return self._intern(_Step(head, arguments))

    def _number_shared(self, value: SharedValue) -> int:
        """Missing, where a version is fallen back to that uses what is not shared any more."""
        feature = self._definitions.find(value.feature)
        if feature is None:
            return self._intern(_Step(_NO_TEXT if value.type == "text" else _NO_NUMBER))
        if feature.name not in self.shared:
            self.shared[feature.name] = self.number(feature.expression, {})
        return self.shared[feature.name]

    def _intern(self, step: _Step) -> int:
        number = self._numbers.setdefault(step, len(self.steps))
        if number == len(self.steps):
            self.steps.append(step)
        return number

    def below(self, numbers: Iterable[int]) -> frozenset[int]:
        """The numbers given and all they are computed from."""
        found: set[int] = set()
        waiting = list(numbers)
        while waiting:
            number = waiting.pop()
            if number not in found:
                found.add(number)
                waiting += self.steps[number].arguments
        return frozenset(found)


class _Filters:
    """Filters of aggregates, each compiled when it is first asked for: rows hold windows of models that are gone too,
    and no plan knows which."""

    def __init__(self, schema: EventSchema) -> None:
        self.numbering = _Numbering()
        self._schema = schema
        self._numbers: dict[str, int | None] = {}

    def numbers(self, wheres: Iterable[str]) -> dict[str, int]:
        """Of those that the schema has the fields for."""
        found: dict[str, int] = {}
        for where in wheres:
            if where not in self._numbers:
                self._numbers[where] = self._compiled(where)
            number = self._numbers[where]
            if number is not None:
                found[where] = number
        return found

    def _compiled(self, where: str) -> int | None:
        try:
            return self.numbering.number(parse_filter(where, self._schema), {})
        except ExpressionError:
            return None


class _NoReads:
    """A filter reads nothing but its event; the parser has seen to it."""

    def aggregate(self, aggregate: Aggregate) -> Floats:
        raise NotFound(f"a filter can't read {aggregate}")

    def stored(self, output: StoredOutput) -> Floats:
        raise NotFound(f"a filter can't read {output}")

    @property
    def tables(self) -> TableSet:
        return NO_TABLES


@dataclass(frozen=True, slots=True)
class _Batch:
    """The events at hand; `picked` is the positions to compute, None for all."""

    events: EventColumns
    reads: Reads
    type_names: Texts
    outputs: Mapping[StoredOutput, StoredOutput]
    picked: Ints | None
    size: int

    def run(
        self,
        steps: Sequence[_Step],
        numbers: Iterable[int],
        known: Mapping[int, Column],
        meter: StepMeter | None = None,
    ) -> dict[int, Column]:
        """Each number -> its column of `size` rows; `numbers` must hold what they are computed from.

        What is `known` is not computed again.
        """
        values = dict(known)
        found: dict[tuple[str, int], Ints] = {}
        with np.errstate(all="ignore"):
            for number in sorted(numbers):
                if number in values:
                    continue
                step = steps[number]
                if isinstance(step.head, TableValue):
                    values[number] = self._table_value(step.head, step.arguments[0], values, found)
                else:
                    values[number] = self._compute(step.head, [values[argument] for argument in step.arguments])
                if meter is not None:
                    meter.note(number, self.size)
        return values

    def _table_value(
        self, head: TableValue, key: int, values: Mapping[int, Column], found: dict[tuple[str, int], Ints]
    ) -> Column:
        """`found` remembers the rows of each table and key: several columns of them are one look-up."""
        reader = self.reads.tables.table(head.table)
        if reader is None:
            return no_values(self.size, head.type, None)
        rows = found.get((head.table, key))
        if rows is None:
            rows = found[head.table, key] = reader.rows(values[key])
        column = reader.column(head.column, rows)
        if column is None or (column.dtype == object) != (head.type == "text"):
            return no_values(self.size, head.type, None)
        return column

    def _compute(self, head: _Leaf | Membership | str, arguments: list[Column]) -> Column:
        if isinstance(head, str):
            result = _OPERATIONS[head](*arguments)
        elif isinstance(head, Membership):
            result = _member(arguments[0], head.values, head.negated)
        elif isinstance(head, Literal):
            column: Column = np.empty(self.size, dtype=object if head.type == "text" else np.float64)
            column.fill(head.value)
            return column
        else:
            result = self._leaf(head)
            return result if self.picked is None else result[self.picked]
        return cast("Column", result.astype(np.float64) if result.dtype == np.bool_ else result)

    def _leaf(self, head: EventField | AggregateValue | StoredValue) -> Column:
        if isinstance(head, AggregateValue):
            return self.reads.aggregate(head.aggregate)
        if isinstance(head, StoredValue):
            output = self.outputs.get(head.output)
            return self.reads.stored(output) if output is not None else np.full(len(self.events), np.nan)
        if head.field == EVENT_TIME:
            return self.events.times_ms / 1000.0
        if head.field == EVENT_TYPE:
            return self.type_names[self.events.types]
        return self.events.fields[head.field]


@dataclass(frozen=True, slots=True)
class _Columns:
    """One model's features: `numbers[i]` is the value of column i; `needed` all that must be computed."""

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    texts: frozenset[str]
    needed: frozenset[int]
    tables: tuple[str, ...]
    """Those it reads, sorted."""

    def empty(self) -> FeatureRows:
        return FeatureRows(self.names, np.empty((0, len(self.names))), {name: [] for name in sorted(self.texts)})


class _Gathering:
    """Rows of one micro-batch: models with columns alike share a matrix, or pick theirs from one.

    Picking columns from a matrix takes half the time of filling one column by column (43 and 93 µs, 2,730 rows of 20).
    """

    def __init__(self, values: Mapping[int, Column], wanted: Sequence[tuple[_Columns, Bools]]) -> None:
        self._values = values
        self._wanted: dict[bytes, list[_Columns]] = {}
        for columns, within in wanted:
            self._wanted.setdefault(within.tobytes(), []).append(columns)
        self._common: dict[bytes, tuple[dict[int, int], Floats] | None] = {}
        self._whole: dict[tuple[bytes, tuple[int, ...]], Floats] = {}

    def rows(self, columns: _Columns, within: Bools) -> FeatureRows:
        """Of the events that `within`, parallel to the computed columns, names."""
        if not within.any():
            return columns.empty()
        key = within.tobytes()
        picked = slice(None) if within.all() else np.flatnonzero(within)
        texts = {
            name: self._values[number][picked].tolist()
            for name, number in zip(columns.names, columns.numbers, strict=True)
            if name in columns.texts
        }
        if texts:
            return FeatureRows(columns.names, self._filled(columns, picked), texts)
        known = self._whole.get((key, columns.numbers))
        if known is None:
            known = self._whole[key, columns.numbers] = self._picked(key, columns, picked)
            known.flags.writeable = False  # several models may have it
        return FeatureRows(columns.names, known, texts)

    def _picked(self, key: bytes, columns: _Columns, picked: slice | Ints) -> Floats:
        """float64 [rows, columns], C order."""
        if key not in self._common:
            alike = {columns.numbers for columns in self._wanted[key] if not columns.texts}
            union = sorted(set().union(*alike))
            worth = len(alike) > 1 and 2 * len(union) <= sum(map(len, alike))
            places = {number: place for place, number in enumerate(union)}
            self._common[key] = (places, self._matrix(union, picked)) if worth else None
        common = self._common[key]
        if common is None:
            return self._matrix(columns.numbers, picked)
        places, matrix = common
        return np.take(matrix, [places[number] for number in columns.numbers], axis=1, mode="clip")

    def _matrix(self, numbers: Sequence[int], picked: slice | Ints) -> Floats:
        first = self._values[numbers[0]][picked]
        matrix = np.empty((len(first), len(numbers)))
        for place, number in enumerate(numbers):
            matrix[:, place] = self._values[number][picked]
        return matrix

    def _filled(self, columns: _Columns, picked: slice | Ints) -> Floats:
        """With NaN where texts are."""
        matrix = np.full((len(self._values[columns.numbers[0]][picked]), len(columns.names)), np.nan)
        for place, (name, number) in enumerate(zip(columns.names, columns.numbers, strict=True)):
            if name not in columns.texts:
                matrix[:, place] = self._values[number][picked]
        return matrix


class _Program:
    """Every distinct value of the models' features, in the order in which they are computed."""

    def __init__(
        self,
        pairs: Iterable[tuple[ModelVersion, Manifest]],
        definitions: Definitions,
        timer: Callable[[], float] | None,
    ) -> None:
        numbering = _Numbering(definitions)
        self.columns = {version.name: _columns(manifest, numbering) for version, manifest in pairs}
        self.steps = tuple(numbering.steps)
        self.of_outputs = _of_outputs(self.steps)
        self.shared = {name: (number, numbering.below([number])) for name, number in numbering.shared.items()}
        self.meter = StepMeter(timer, len(self.steps)) if timer is not None and self.shared else None


class CompiledFeatures:
    """The `FeaturePlan` of some models. Immutable; make it with `compile_plan`."""

    def __init__(
        self,
        models: Sequence[tuple[ModelVersion, Manifest]],
        schema: EventSchema,
        definitions: Definitions = NOTHING_SHARED,
        timer: Callable[[], float] | None = None,
    ) -> None:
        self._models = tuple(version for version, _ in models)
        self._manifests = {version.version: (version.name, manifest) for version, manifest in models}
        self.pairs = tuple(models)
        self._schema, self._definitions, self._timer = schema, definitions, timer
        profile = set(evaluate_profile(schema).values())
        used = [(version, definitions.aggregates(manifest)) for version, manifest in models]
        self._aggregates = tuple(sorted(profile.union(*(asked for _, asked in used))))
        self._histories = {one.name: (one.backfill, asked) for one, asked in used if one.backfill and asked}
        current = [asked for version, asked in used if version.backfill is None]
        self._current = frozenset(profile.union(*current, _closing(self._models)))
        self._type_names = np.array(schema.types, dtype=object)
        self._outputs, self._unresolved, self._inputs = _resolve(models, definitions)
        self._filters = _Filters(schema)

    @cached_property
    def _program(self) -> _Program:
        """Made when it is first computed with: to see whether rows have room for a plan takes none."""
        return _Program(self.pairs, self._definitions, self._timer)

    @property
    def models(self) -> tuple[ModelVersion, ...]:
        return self._models

    @property
    def aggregates(self) -> tuple[Aggregate, ...]:
        return self._aggregates

    @property
    def stored_models(self) -> tuple[ModelVersion, ...]:
        return self._models

    @property
    def needs(self) -> RowNeeds:
        return needs_of(self._models, self._aggregates)

    @property
    def reserve(self) -> RowNeeds:
        """Nothing; see `tenants.staged_plan`."""
        return RowNeeds()

    @property
    def staged(self) -> Mapping[ModelName, StagedVersion]:
        """None; see `tenants.staged_plan`."""
        return {}

    @property
    def histories(self) -> Mapping[ModelName, tuple[Backfill, frozenset[Aggregate]]]:
        return self._histories

    @property
    def current(self) -> frozenset[Aggregate]:
        return self._current

    @property
    def unresolved(self) -> tuple[StoredOutput, ...]:
        """Outputs that features use and no live model gives (names as in expressions): missing for now."""
        return self._unresolved

    @property
    def inputs(self) -> Mapping[ModelName, tuple[StoredOutput, ...]]:
        """The outputs of other models here that each model uses, sorted; models that use none are not there."""
        return self._inputs

    def only(self, names: Collection[ModelName], before: FeaturePlan | None = None) -> CompiledFeatures:
        earlier = before if isinstance(before, CompiledFeatures) else None
        instead = {} if earlier is None else {pair[0].name: pair for pair in earlier.pairs}
        own = [pair for pair in self.pairs if pair[0].name in names]
        going_on = [pair if pair[0].name in names else instead.get(pair[0].name) for pair in self.pairs]
        pairs = [pair for pair in going_on if pair is not None]
        if ring_problem([manifest for _, manifest in pairs], self._definitions):
            pairs = own
        if earlier is not None and pairs == [*earlier.pairs] and self._definitions == earlier._definitions:
            return earlier
        return CompiledFeatures(pairs, self._schema, self._definitions)

    def source(self, version: str) -> ModelSource | None:
        found = self._manifests.get(version)
        if found is None:
            return None
        key, manifest = found
        used = {output.name for output in self._inputs.get(key, ())}
        inputs = {str(one.name): (one.outputs, one.ttl_ms) for one in self._models if one.name in used}
        return ModelSource(manifest.text.decode(), self._definitions.files, inputs)

    def tables(self, name: ModelName) -> tuple[str, ...]:
        """The tables that the model's features read, sorted."""
        return self._program.columns[name].tables

    def shared_costs(self) -> Mapping[SharedName, SharedCost]:
        """Of each shared feature that a model here uses; nothing where there is no timer."""
        meter = self._program.meter
        if meter is None:
            return {}
        return {
            name: SharedCost(sum(meter.seconds[step] for step in below), meter.values[number])
            for name, (number, below) in self._program.shared.items()
        }

    def statistics(self) -> Mapping[str, int]:
        """`values` is how many distinct columns the plan computes when every model is selected."""
        program = self._program
        features = sum(len(columns.names) for columns in program.columns.values())
        return {"models": len(self._models), "features": features, "values": len(program.steps)}

    def computable(self, wheres: Iterable[str]) -> frozenset[str]:
        return frozenset(self._filters.numbers(wheres))

    def masks(self, events: EventColumns, wheres: Iterable[str]) -> Mapping[str, Bools]:
        """bool[len(events)] for each of the filters that can be evaluated."""
        numbers = self._filters.numbers(wheres)
        if not numbers:
            return {}
        batch = _Batch(events, _NoReads(), self._type_names, {}, None, len(events))
        numbering = self._filters.numbering
        values = batch.run(numbering.steps, numbering.below(numbers.values()), {})
        return {where: values[number] == 1.0 for where, number in numbers.items()}

    def rows(
        self, events: EventColumns, reads: Reads, selections: Mapping[ModelName, Bools]
    ) -> dict[ModelName, FeatureRows]:
        """Each selected model's rows, in the order of the events. Each aggregate is read at most once.

        The columns of `reads` must be parallel to `events`. Raises NotFound for a model not in the plan.
        """
        return self.batch(events, selections).rows(list(selections), reads)

    def batch(self, events: EventColumns, selections: Mapping[ModelName, Bools]) -> FeatureBatch:
        """To compute the selected models' rows one after another. Raises NotFound for a model not in the plan."""
        for name in selections:
            if name not in self._program.columns:
                raise NotFound(f"model {name} is not in this feature plan; select among its own models")
        return FeatureBatch(self, events, selections)


class FeatureBatch:
    """The features of one micro-batch. What does not depend on models' outputs is computed once."""

    def __init__(self, plan: CompiledFeatures, events: EventColumns, selections: Mapping[ModelName, Bools]) -> None:
        self._plan = plan
        self._events = events
        self._selections = selections
        active = [selection for selection in selections.values() if selection.any()]
        self._picked = _union(active, len(events))
        self._known: dict[int, Column] = {}

    def rows(self, names: Collection[ModelName], reads: Reads) -> dict[ModelName, FeatureRows]:
        """The rows of some of the selected models, with the outputs that `reads` has now."""
        plan, program, picked = self._plan, self._plan._program, self._picked
        active = [name for name in names if self._selections[name].any()]
        numbers: set[int] = set().union(*(program.columns[name].needed for name in active))
        size = len(self._events) if picked is None else len(picked)
        batch = _Batch(self._events, reads, plan._type_names, plan._outputs, picked, size)
        if program.meter is not None:
            program.meter.start()
        values = batch.run(program.steps, numbers, self._known, program.meter)
        self._known = {number: values[number] for number in values.keys() - program.of_outputs}
        wanted = {
            name: (program.columns[name], self._selections[name] if picked is None else self._selections[name][picked])
            for name in names
        }
        gathering = _Gathering(values, list(wanted.values()))
        return {name: gathering.rows(columns, within) for name, (columns, within) in wanted.items()}


def _closing(models: Iterable[ModelVersion]) -> set[Aggregate]:
    """What tells when sessions close, which trigger models: also while the windows that these read are filled."""
    gaps_ms = {version.schedule.gap_ms for version in models if version.schedule is not None}
    return {session_newest(gap_ms) for gap_ms in gaps_ms if gap_ms}


def _of_outputs(steps: Sequence[_Step]) -> frozenset[int]:
    """The numbers of what depends on models' outputs."""
    found: set[int] = set()
    for number, step in enumerate(steps):
        if isinstance(step.head, StoredValue) or not found.isdisjoint(step.arguments):
            found.add(number)
    return frozenset(found)


def _union(selections: Sequence[Bools], size: int) -> Ints | None:
    """Positions that any selection names; None when that is most of them."""
    if not selections:
        return np.empty(0, dtype=np.int64)
    positions = np.flatnonzero(np.logical_or.reduce(selections))
    return positions if len(positions) <= _GATHER_SHARE_MAX * size else None


def _columns(manifest: Manifest, numbering: _Numbering) -> _Columns:
    features: dict[str, int] = {}
    for feature in manifest.features:
        features[feature.name] = numbering.number(feature.expression, features)
    needed = numbering.below(features.values())
    heads = (numbering.steps[number].head for number in needed)
    return _Columns(
        names=tuple(features),
        numbers=tuple(features.values()),
        texts=frozenset(feature.name for feature in manifest.features if feature.expression.type == "text"),
        needed=needed,
        tables=tuple(sorted({head.table for head in heads if isinstance(head, TableValue)})),
    )


def _resolve(
    models: Sequence[tuple[ModelVersion, Manifest]], definitions: Definitions
) -> tuple[dict[StoredOutput, StoredOutput], tuple[StoredOutput, ...], dict[ModelName, tuple[StoredOutput, ...]]]:
    """Outputs as expressions name them -> as the models do; those that no model here gives; and by each model, those
    of other models that it uses."""
    given = {
        StoredOutput(expression_name(version.name), output): StoredOutput(version.name, output)
        for version, _ in models
        for output in version.outputs
    }
    used = {version.name: definitions.stored_outputs(manifest) for version, manifest in models}
    every = frozenset[StoredOutput]().union(*used.values())
    inputs = {
        name: tuple(sorted(given[output] for output in outputs & given.keys() if given[output].name != name))
        for name, outputs in used.items()
    }
    resolved = {output: given[output] for output in every & given.keys()}
    return resolved, tuple(sorted(every - given.keys())), {name: found for name, found in inputs.items() if found}


def compile_plan(
    models: Iterable[tuple[ModelVersion, Manifest]],
    schema: EventSchema,
    definitions: Definitions = NOTHING_SHARED,
    timer: Callable[[], float] | None = None,
) -> CompiledFeatures:
    """The plan of the live models, in their order. Their manifests must have been parsed with `schema`.

    Its aggregates include those of the profile, so that the row always holds them. `timer` gives the seconds that
    `shared_costs` are measured by. Raises ConfigError when the operator's profile is wrong.
    """
    return CompiledFeatures(list(models), schema, definitions, timer)
