"""(P) The registry of shared features: what each is, who uses it, how fresh it is and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from node.kernel.types import StoredOutput
from tenants.definitions import Definitions, SharedFeature
from tenants.expression import AggregateValue, StoredValue, walk
from tenants.registry import Snapshot
from tenants.shared_names import SharedName, SharedValue
from tenants.step_costs import SharedCost


@dataclass(slots=True)
class FeatureCosts:
    """What was measured by the plans before the present one."""

    before: dict[SharedName, SharedCost] = field(default_factory=dict)

    def add(self, costs: Mapping[SharedName, SharedCost]) -> None:
        self.before = self.with_more(costs)

    def with_more(self, costs: Mapping[SharedName, SharedCost]) -> dict[SharedName, SharedCost]:
        return {**self.before, **{name: self._sum(name, cost) for name, cost in costs.items()}}

    def _sum(self, name: SharedName, cost: SharedCost) -> SharedCost:
        held = self.before.get(name, SharedCost(0.0, 0))
        return SharedCost(held.seconds + cost.seconds, held.values + cost.values)


@dataclass(frozen=True, slots=True)
class SharedFeatureStatus:
    feature: SharedFeature
    users: tuple[str, ...]
    """Models, and shared features, that name this version, themselves or as the newest."""
    inputs: tuple[StoredOutput, ...]
    """Models' outputs that it depends on; names as in expressions."""
    aggregates: tuple[str, ...]
    """What it needs of the customer's row."""
    cost: SharedCost


def listing(snapshot: Snapshot, costs: Mapping[SharedName, SharedCost]) -> list[SharedFeatureStatus]:
    """All that is in force, by name and version."""
    definitions = snapshot.definitions
    users: dict[SharedName, set[str]] = {}
    for use in definitions.uses(manifest for _, manifest in snapshot.live):
        feature = definitions.find(use.value.feature)
        if feature is not None:
            users.setdefault(feature.name, set()).add(use.by)
    return [
        _status(definitions, feature, users.get(name, set()), costs.get(name, SharedCost(0.0, 0)))
        for name, feature in sorted(definitions.features.items())
    ]


def _status(definitions: Definitions, feature: SharedFeature, users: set[str], cost: SharedCost) -> SharedFeatureStatus:
    below = definitions.below([SharedValue(feature.name, feature.expression.type)])
    nodes = [node for each in below for node in walk(each.expression)]
    inputs = {node.output for node in nodes if isinstance(node, StoredValue)}
    aggregates = {str(node.aggregate) for node in nodes if isinstance(node, AggregateValue)}
    return SharedFeatureStatus(feature, tuple(sorted(users)), tuple(sorted(inputs)), tuple(sorted(aggregates)), cost)
