"""Which models of a plan run in one partition: its rows never get shorter, and may have no room for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from node.kernel.errors import BoundExceeded
from node.kernel.ports import FeaturePlan
from node.kernel.types import ModelName
from node.staging import running
from node.state.layout import Layout

Grown: TypeAlias = Callable[[FeaturePlan, Layout], Layout]
"""The layout with what a plan needs, that very one if it has all of it. Raises BoundExceeded."""


def room_problem(plan: FeaturePlan, layout: Layout, grown: Grown) -> str:
    """Why rows have no room for what the plan needs; '' when they have."""
    return _tried(plan, layout, grown)[1]


def _tried(plan: FeaturePlan, layout: Layout, grown: Grown) -> tuple[Layout, str]:
    try:
        return grown(plan, layout), ""
    except BoundExceeded as failure:
        return layout, str(failure)


def with_room(
    plan: FeaturePlan, layout: Layout, grown: Grown, before: FeaturePlan | None
) -> tuple[FeaturePlan, dict[ModelName, str]]:
    """The plan of those of its models that there is room for, and why there is none for each of the others.

    Models whose state rows hold already come first. In place of a live model without room goes on what `before` has of
    it, and no staged version of a model that does not run at all.
    """
    names = running(plan)
    alone = {name: plan.only([name]) for name in names}
    unfit: dict[ModelName, str] = {}
    first = layout
    for name in sorted(names, key=lambda name: _tried(alone[name], first, grown) != (first, "")):
        layout, reason = _tried(alone[name], layout, grown)
        if reason:
            unfit[name] = reason
    going_on = set() if before is None else {version.name for version in before.models}
    ended = unfit.keys() - going_on
    kept = {name for name in names if name not in unfit}
    kept -= {staged.key for name, staged in plan.staged.items() if name in ended}
    return plan.only(kept, before), unfit
