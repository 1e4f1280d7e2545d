"""(P) Taking slots back from rows: a layout without what nobody needs any more."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from node.kernel.types import Aggregate, ModelName, RowNeeds, StoredOutput
from node.kernel.windows import NEWEST, PLANES, Accumulator, Input, accumulators_of
from node.state.generations import (
    AggregateAdded,
    Base,
    MarkAdded,
    OutputsAdded,
    Past,
    WindowAdded,
    aggregate_added,
    in_plane_order,
)
from node.state.layout import Group, Layout


def reduced(layout: Layout, needs: RowNeeds, at_ms: int) -> Layout:
    """The layout with what is needed, and little else; this very object if that is all of it.

    What goes has forgotten its events, should it be asked for again.
    """
    kept = _kept(layout, needs.aggregates)
    groups = [(layout.numbered[number], in_plane_order(kept[number])) for number in sorted(kept)]
    pivots = _pivots(layout, kept.values())
    outputs, marks = _outputs(layout, needs), [name for name in layout.marks if name in needs.models]
    base = Base(
        windows=tuple(WindowAdded(group.window_ms, parts) for group, parts in groups),
        numbers=tuple(sorted(kept)),
        number_next=layout.number_next,
        pivots=tuple(pivots),
        outputs=tuple(outputs),
        marks=tuple(MarkAdded(name.tenant, name.model) for name in marks),
        located=_places(layout.located, kept),
        awaiting=_places(layout.awaiting, kept),
        pending=tuple(number for number in sorted(kept) if number in layout.pending),
        at_ms=at_ms,
    )
    slots = [slot for group, parts in groups for slot in _slots_of(group, parts)]
    slots += [layout.pivots[source] for source in pivots]
    for added in outputs:
        held = layout.outputs[ModelName(added.tenant, added.model)]
        slots += [held.time_slot, held.version_slot, *(held.outputs[output] for output in added.outputs)]
    slots += [layout.marks[name] for name in marks]
    if len(slots) + 1 == layout.slots:
        return layout
    past = Past(layout.sizes[layout.base_id :], _runs(slots))
    return replace(layout, generations=(), base=base, past=(*layout.past, past))


def _kept(layout: Layout, aggregates: Collection[Aggregate]) -> dict[int, set[Accumulator]]:
    """What of each group is needed to read these, by number."""
    found: dict[int, set[Accumulator]] = {}
    for aggregate in aggregates:
        located, awaited = layout.located.get(aggregate), layout.awaiting.get(aggregate)
        for number in {located, awaited} - {None}:
            assert number is not None
            kept = found.setdefault(number, {NEWEST} if layout.numbered[number].session else set())
            kept.update(accumulators_of(aggregate))
    return found


def _pivots(layout: Layout, kept: Iterable[Collection[Accumulator]]) -> list[Input]:
    shifted = {part.source for parts in kept for part in parts if part.kind in ("shifted", "squared")}
    return [source for source in layout.pivots if source in shifted]


def _outputs(layout: Layout, needs: RowNeeds) -> list[OutputsAdded]:
    wanted = {
        name: tuple(output for output in slots.outputs if StoredOutput(name, output) in needs.outputs)
        for name, slots in layout.outputs.items()
    }
    return [OutputsAdded(name.tenant, name.model, outputs) for name, outputs in wanted.items() if outputs]


def _places(
    numbers: Mapping[Aggregate, int], kept: Mapping[int, Collection[Accumulator]]
) -> tuple[tuple[AggregateAdded, int], ...]:
    """Where each aggregate is that the groups still have all parts of."""
    there = [a for a, number in numbers.items() if accumulators_of(a) <= set(kept.get(number, ()))]
    return tuple((aggregate_added(aggregate), numbers[aggregate]) for aggregate in sorted(there))


def _slots_of(group: Group, accumulators: Iterable[Accumulator]) -> Iterator[int]:
    """Of the group with these accumulators alone, in order."""
    yield group.head_slot
    for part in accumulators:
        first = group.first_slot + group.planes[part] * group.tiles
        yield from range(first, first + PLANES[part.kind] * group.tiles)


def _runs(slots: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """(first, how many) of those that follow each other."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        first, count = runs[-1] if runs else (slot, 0)
        if slot == first + count and count:
            runs[-1] = (first, count + 1)
        else:
            runs.append((slot, 1))
    return tuple(runs)
