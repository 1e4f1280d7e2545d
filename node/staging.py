"""(P) Which triggers of a micro-batch a canary answers in place of the live version, and which a shadow is shown.

A canary's customers are chosen by the model's name (`node.sampling`): the same on every node and for every version.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

from node.kernel.ports import FeaturePlan, Shadows
from node.kernel.tables import TableSet
from node.kernel.types import Bools, EventColumns, ModelName, ModelVersion, Triggers
from node.ordering import Shown
from node.sampling import sampled
from node.waiting import Answering

Selections: TypeAlias = Mapping[ModelName, Bools]


def running(plan: FeaturePlan) -> dict[ModelName, ModelVersion]:
    """The plan's live versions by model, and what runs beside them by its keys."""
    live = {version.name: version for version in plan.models}
    return live | {staged.key: staged.version for staged in plan.staged.values()}


def table_readers(plan: FeaturePlan, table: str) -> list[str]:
    """Those of `running` that read the table."""
    return [str(name) for name in running(plan) if table in plan.tables(name)]


def blind_shadows(plan: FeaturePlan, tables: TableSet) -> frozenset[ModelName]:
    """Keys of shadows that read a table whose live version is not here: neither shown anything nor waited for."""
    shadows = [staged.key for staged in plan.staged.values() if staged.kind == "shadow"] if tables.absent else ()
    return frozenset(key for key in shadows if not tables.absent.keys().isdisjoint(plan.tables(key)))


def of_canary(customers: Sequence[str], model: ModelName, share: float) -> Bools:
    """bool[len(customers)]: whether a canary of the model with that share serves each of them."""
    return sampled(customers, str(model), share)


def divided(
    plan: FeaturePlan, events: EventColumns, selections: Selections, held: Collection[ModelName] = ()
) -> Selections:
    """With what runs beside live models, each by its key; a canary's events are no longer the live version's. Those
    `held` are left out: what a canary would have answered stays with the live version."""
    found = {name: mask for name, mask in selections.items() if name not in held} if held else dict(selections)
    for name, staged in plan.staged.items():
        mask = selections.get(name)
        if mask is None or staged.key in held:
            continue
        if staged.kind == "shadow":
            found[staged.key] = mask
            continue
        served = mask & of_canary(events.customers, name, staged.share)[events.rows]
        for key, part in ((staged.key, served), (name, mask & ~served)):
            found.pop(key, None)
            if part.any() and key not in held:
                found[key] = part
    return found


def follow(shadows: Shadows, shown: Shown, pieces: Sequence[tuple[ModelVersion, Triggers, Answering | None]]) -> None:
    """Show shadows what live versions were asked in one cycle: `pieces`, of each model in order, with their calls."""
    done: dict[ModelName, int] = {}
    for _, triggers, call in pieces if shown else ():
        staged, rows = shown.get(triggers.name, (None, None))
        if staged is None or rows is None or triggers.line:
            continue
        start = done.get(triggers.name, 0)
        done[triggers.name] = stop = start + len(triggers)
        shadows.follow(staged, rows.take(slice(start, stop)), call)
