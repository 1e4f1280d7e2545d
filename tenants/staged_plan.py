"""(P) The feature plan of live models and of what runs beside them, compiled together: each distinct feature once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from node.kernel.ports import FeatureBatch, FeaturePlan, Reads
from node.kernel.types import (
    Aggregate,
    Backfill,
    Bools,
    EventColumns,
    EventSchema,
    FeatureRows,
    ModelName,
    ModelSource,
    ModelVersion,
    RowNeeds,
    StagedVersion,
    StoredOutput,
)
from tenants.definitions import Definitions
from tenants.features import CompiledFeatures, compile_plan
from tenants.manifest import Manifest
from tenants.registry import under_key
from tenants.row_needs import needs_of

NO_NEEDS = RowNeeds()


class StagedPlan:
    """A `FeaturePlan`: live models are its models, and rows can be had of staged ones too, by their keys."""

    def __init__(
        self,
        compiled: CompiledFeatures,
        live: Sequence[ModelVersion],
        beside: Sequence[StagedVersion],
        reserve: RowNeeds = NO_NEEDS,
    ) -> None:
        """`reserve` is for versions that are not in the plan and may come into it."""
        self.compiled = compiled
        self._reserve = reserve
        self._models = tuple(live)
        self._staged = {staged.version.name: staged for staged in beside}
        own = {staged.key: staged.version.name for staged in beside}
        self._inputs = {
            key: tuple(output for output in outputs if output.name != own.get(key))
            for key, outputs in compiled.inputs.items()
        }

    @property
    def models(self) -> tuple[ModelVersion, ...]:
        return self._models

    @property
    def stored_models(self) -> tuple[ModelVersion, ...]:
        """A canary's outputs are stored where the live version's are: they have the same names."""
        return self._models

    @property
    def aggregates(self) -> tuple[Aggregate, ...]:
        return self.compiled.aggregates

    @property
    def needs(self) -> RowNeeds:
        return needs_of(self._models, self.compiled.aggregates)

    @property
    def reserve(self) -> RowNeeds:
        return self._reserve

    def with_reserve(self, manifests: Sequence[Manifest], definitions: Definitions) -> StagedPlan:
        """The same plan, where these versions may come into it."""
        asked = frozenset[Aggregate]().union(*map(definitions.aggregates, manifests))
        return StagedPlan(self.compiled, self._models, [*self._staged.values()], needs_of(manifests, asked))

    @property
    def staged(self) -> Mapping[ModelName, StagedVersion]:
        return self._staged

    @property
    def inputs(self) -> Mapping[ModelName, tuple[StoredOutput, ...]]:
        """A staged version uses its own model's output of the event before, as it will once it is live."""
        return self._inputs

    @property
    def histories(self) -> Mapping[ModelName, tuple[Backfill, frozenset[Aggregate]]]:
        return self.compiled.histories

    @property
    def current(self) -> frozenset[Aggregate]:
        return self.compiled.current

    def only(self, names: Collection[ModelName], before: FeaturePlan | None = None) -> StagedPlan:
        earlier = before if isinstance(before, StagedPlan) else None
        compiled = self.compiled.only(names, None if earlier is None else earlier.compiled)
        beside = [staged for staged in self._staged.values() if staged.key in names]
        if earlier is not None and compiled is earlier.compiled and beside == [*earlier.staged.values()]:
            return earlier
        keys = {staged.key for staged in self._staged.values()}
        return StagedPlan(compiled, [version for version in compiled.models if version.name not in keys], beside)

    def source(self, version: str) -> ModelSource | None:
        return self.compiled.source(version)

    def tables(self, name: ModelName) -> tuple[str, ...]:
        return self.compiled.tables(name)

    def batch(self, events: EventColumns, selections: Mapping[ModelName, Bools]) -> FeatureBatch:
        return self.compiled.batch(events, selections)

    def computable(self, wheres: Iterable[str]) -> frozenset[str]:
        return self.compiled.computable(wheres)

    def masks(self, events: EventColumns, wheres: Iterable[str]) -> Mapping[str, Bools]:
        return self.compiled.masks(events, wheres)

    def rows(
        self, events: EventColumns, reads: Reads, selections: Mapping[ModelName, Bools]
    ) -> dict[ModelName, FeatureRows]:
        return self.compiled.rows(events, reads, selections)


def plan_of(
    live: Sequence[tuple[ModelVersion, Manifest]],
    beside: Sequence[tuple[StagedVersion, Manifest]],
    schema: EventSchema,
    definitions: Definitions,
    timer: Callable[[], float] | None = None,
) -> StagedPlan:
    """Raises ConfigError when the operator's profile is wrong."""
    compiled = compile_plan([*live, *(under_key(*one) for one in beside)], schema, definitions, timer)
    return StagedPlan(compiled, [version for version, _ in live], [staged for staged, _ in beside])
