"""(P) What models need customers' rows to hold."""

from __future__ import annotations

from collections.abc import Iterable

from node.kernel.types import Aggregate, ModelVersion, RowNeeds, StoredOutput
from tenants.manifest import Manifest


def needs_of(models: Iterable[ModelVersion | Manifest], aggregates: Iterable[Aggregate]) -> RowNeeds:
    """Of models that use these aggregates."""
    outputs = frozenset(StoredOutput(model.name, output) for model in models for output in model.outputs)
    return RowNeeds(frozenset(aggregates), outputs)
