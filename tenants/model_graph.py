"""(P) The graph of models that use each other's outputs: who comes after whom, and rings, which nothing can run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TypeAlias

from node.kernel.types import ModelName
from tenants.definitions import Definitions
from tenants.expression import expression_name
from tenants.manifest import Manifest

Uses: TypeAlias = Mapping[ModelName, Collection[ModelName]]
"""Model -> those whose outputs it uses."""


def uses_of(manifests: Iterable[Manifest], definitions: Definitions) -> dict[ModelName, tuple[ModelName, ...]]:
    """Of each of the models, those among them whose outputs it uses, also through shared features.

    Its own outputs are not meant: those are of the event before.
    """
    manifests = list(manifests)
    named = {expression_name(manifest.name): manifest.name for manifest in manifests}
    return {
        manifest.name: tuple(
            sorted(
                {named[output.name] for output in definitions.stored_outputs(manifest) if output.name in named}
                - {manifest.name}
            )
        )
        for manifest in manifests
    }


def order(uses: Uses) -> list[ModelName]:
    """Every model after those it uses; the same for equal graphs. Raises ValueError where there is a ring."""
    graph = {name: sorted(uses[name]) for name in sorted(uses)}
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise ValueError(f"these models use each other: {error.args[1]}") from None


def ring(uses: Uses) -> Sequence[ModelName]:
    """A ring, its first model repeated at its end, each using the next; () where there is none."""
    sorter = TopologicalSorter({name: sorted(uses[name]) for name in sorted(uses)})
    try:
        sorter.prepare()
    except CycleError as error:
        found: list[ModelName] = error.args[1]
        return tuple(reversed(found))
    return ()


def ring_problem(manifests: Iterable[Manifest], definitions: Definitions) -> str:
    """Why the models can't run together; '' when they can."""
    found = ring(uses_of(manifests, definitions))
    return f"models would use each other in a ring: {' -> '.join(map(str, found))}" if found else ""
