"""Which models of a plan run in one partition: its rows may have no room for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from node.kernel.errors import BoundExceeded
from node.kernel.limits import ROW_UNNEEDED_MS_MIN
from node.kernel.ports import FeaturePlan
from node.kernel.types import ModelName, RowNeeds
from node.staging import running
from node.state.layout import Layout

Grown: TypeAlias = Callable[[FeaturePlan, Layout], Layout]
"""The layout with what a plan needs, that very one if it has all of it. Raises BoundExceeded."""
Reduced: TypeAlias = Callable[[Layout, RowNeeds], Layout]
"""The layout without what is not needed; that very one if nothing may go now."""


@dataclass(frozen=True, slots=True)
class Room:
    """`unfit` says of models why rows have no room for them; `plan` is that of the others, and `layout` what they are
    to be given their slots in."""

    plan: FeaturePlan
    layout: Layout
    unfit: Mapping[ModelName, str]


class NeededLately:
    """What the plans of a partition have needed of its rows, so that what none has for long can be taken back."""

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s
        self._now = self._lately = RowNeeds()

    def planned(self, newest: FeaturePlan, plan: FeaturePlan) -> None:
        """`plan` is as much of the newest one as there is room for."""
        self._now = newest.needs | newest.reserve | plan.needs
        self._lately |= self._now

    def due(self, now_s: float) -> RowNeeds | None:
        """Once in ROW_UNNEEDED_MS_MIN what was needed since the time before; None otherwise."""
        if (now_s - self._since_s) * 1000 < ROW_UNNEEDED_MS_MIN:
            return None
        found, self._lately, self._since_s = self._lately, self._now, now_s
        return found


def room_problem(plan: FeaturePlan, layout: Layout, grown: Grown, reduce: Reduced, now: FeaturePlan | None) -> str:
    """Why rows have no room for what the plan needs beside the one that is there `now`; '' when they have."""
    reason = _tried(plan, layout, grown)[1]
    if not reason:
        return ""
    least = reduce(layout, plan.needs if now is None else plan.needs | now.needs | now.reserve)
    return reason if least is layout else _tried(plan, least, grown)[1]


def _tried(plan: FeaturePlan, layout: Layout, grown: Grown) -> tuple[Layout, str]:
    try:
        return grown(plan, layout), ""
    except BoundExceeded as failure:
        return layout, str(failure)


def with_room(plan: FeaturePlan, layout: Layout, grown: Grown, reduce: Reduced, before: FeaturePlan | None) -> Room:
    """Those of the plan's models that there is room for. Where it is short, slots of what nothing needs any more are
    taken back first.

    Models whose state rows hold already come first. In place of a live model without room goes on what `before` has of
    it, and no staged version of a model that does not run at all.
    """
    if not _tried(plan, layout, grown)[1]:
        return Room(plan, layout, {})
    needs = plan.needs | plan.reserve
    layout = reduce(layout, needs if before is None else needs | before.needs)
    if not _tried(plan, layout, grown)[1]:
        return Room(plan, layout, {})
    names = running(plan)
    alone = {name: plan.only([name]) for name in names}
    unfit: dict[ModelName, str] = {}
    held = tried = layout
    for name in sorted(names, key=lambda name: _tried(alone[name], held, grown) != (held, "")):
        tried, reason = _tried(alone[name], tried, grown)
        if reason:
            unfit[name] = reason
    going_on = set() if before is None else {version.name for version in before.models}
    ended = unfit.keys() - going_on
    kept = {name for name in names if name not in unfit}
    kept -= {staged.key for name, staged in plan.staged.items() if name in ended}
    return Room(plan.only(kept, before), layout, unfit)
