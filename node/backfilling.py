"""The windows of one partition that are filled from history: which, from where, and how they catch up with the cycle.

What a model asks history for gets groups of windows of its own in the row, *pending*: the cycle's events pass them by.
The partition's records are read again from the time asked for, in their order, and folded into those groups alone, a
chunk in a commit, so that rows and the place come to are durable together. Once little is missing, the cycle's own
micro-batches are kept as well (the *tail*) from where the reader will stop; when that is reached they are taken from
there, and when none is left the pending groups have had exactly the events that the cycle has had. From the next cycle
on they are groups like any other. No event is counted twice or left out at that seam, whatever is killed: what counts
is the one `progress` of the fill in the frame.

One fill runs at a time. One that no model asks for any more rests where it is, and goes on from there if one does.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import structlog

from node.kernel.backfills import BackfillState, Fill
from node.kernel.clock import Clock
from node.kernel.errors import HeadraceError
from node.kernel.limits import (
    BACKFILL_CHUNK_EVENTS,
    BACKFILL_CHUNK_SLOTS,
    BACKFILL_REST_FACTOR,
    BACKFILL_RETRY_MS,
    BACKFILL_TAIL_BEGINS,
    BACKFILL_TAIL_EVENTS_MAX,
    ROW_REDUCTION_MS_MIN,
    ROW_REDUCTIONS_MAX,
)
from node.kernel.ports import FeaturePlan
from node.kernel.types import Aggregate, EventColumns, Floats, ModelName, RowNeeds, Statistics
from node.state.fold import filters_of, fold
from node.state.layout import Layout
from node.state.reduction import reduced

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class History:
    """The next of a partition's records: their events, and where to go on."""

    events: EventColumns
    starts: Mapping[str, int]
    progress: Mapping[str, int]
    floor_ms: int = 0
    """Kafka time of the oldest record there is, where older ones were wanted and are gone; else 0."""
    lost: int = 0
    seconds: float = 0.0
    """That decoding them took."""


class HistoryReader(Protocol):
    async def read(self, fill: Fill, target: Mapping[str, int], events_max: int) -> History:
        """From the fill's progress on, up to offset `target` of each topic. Raises BrokerUnavailable, TopicMissing."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Taken:
    """What one commit adds to the windows of `groups`."""

    groups: tuple[int, ...] = ()
    batches: Sequence[EventColumns] = ()


@dataclass(slots=True)
class _Tail:
    start: Mapping[str, int]
    batches: deque[tuple[EventColumns, Mapping[str, int]]] = field(default_factory=deque)
    """Events of a cycle, and its progress after them."""
    events: int = 0


class Backfilling:
    def __init__(self, reader: HistoryReader, state: BackfillState, clock: Clock, partition: int) -> None:
        self._reader = reader
        self._fills = list(state.fills)
        self._clock = clock
        self._partition = partition
        self._reading: asyncio.Task[History] | None = None
        self._of = -1
        """Number of the fill that is read for."""
        self._tail: _Tail | None = None
        self._wanted: dict[ModelName, dict[Aggregate, int]] = {}
        self._rested = -math.inf
        self._layout = Layout.empty()
        self._view: tuple[Layout, tuple[int, ...], Layout] | None = None
        self._passed_by: frozenset[str] = frozenset()
        """Filters that no event passes, as their fields are not declared any more."""
        self._unlooked = self._opening = self._connected = False
        self._ending: asyncio.Task[Any] | None = None
        """A read that was given up, or the reader's end: nothing is read until that is over, as they share a client."""
        self._changed = False
        self._target: Mapping[str, int] = {}
        self.warming: frozenset[ModelName] = frozenset()
        """Models, staged ones by their keys, that read windows which are not filled yet."""

    def grown(self, plan: FeaturePlan, layout: Layout) -> Layout:
        """The layout for a plan: with what it asks for and is not there, and with what is filled by now.

        Raises BoundExceeded, and nothing has changed then.
        """
        wanted = self._wanted_of(plan)
        layout, added = self._planned(plan, layout, wanted)
        self._forget(layout)
        self._fills += added
        self._changed |= bool(added)
        self._wanted = wanted
        wheres = frozenset(aggregate.where for aggregate in layout.awaiting) - {""}
        self._passed_by = wheres - plan.computable(wheres)
        self._unlooked = True
        self._look(layout)
        return layout

    def previewed(self, plan: FeaturePlan, layout: Layout) -> Layout:
        """What `grown` gives, while nothing changes. Raises BoundExceeded."""
        return self._planned(plan, layout, self._wanted_of(plan))[0]

    def reduced(self, layout: Layout, needs: RowNeeds) -> Layout:
        """The layout without what is not needed, while nothing changes."""
        return layout if len(layout.past) >= ROW_REDUCTIONS_MAX else reduced(layout, needs, self._clock.now_ms())

    def reduced_rarely(self, layout: Layout, needs: RowNeeds) -> Layout:
        """As `reduced`, unless that was done a short while ago: for what is only tried, and may be refused."""
        last = layout.base
        if last is not None and 0 <= self._clock.now_ms() - last.at_ms < ROW_REDUCTION_MS_MIN:
            return layout
        return self.reduced(layout, needs)

    def _forget(self, layout: Layout) -> None:
        """Fills of windows that are gone."""
        kept = [number for number, fill in enumerate(self._fills) if not layout.numbered.keys().isdisjoint(fill.groups)]
        if len(kept) == len(self._fills):
            return
        self._fills = [self._fills[number] for number in kept]
        self._changed = True
        if self._of in kept:
            self._of = kept.index(self._of)
        else:
            self._read_for(-1)

    def _wanted_of(self, plan: FeaturePlan) -> dict[ModelName, dict[Aggregate, int]]:
        now_ms = self._clock.now_ms()
        return {
            name: {aggregate: backfill.wanted_ms(now_ms) for aggregate in aggregates}
            for name, (backfill, aggregates) in plan.histories.items()
        }

    def _planned(
        self, plan: FeaturePlan, layout: Layout, wanted: Mapping[ModelName, Mapping[Aggregate, int]]
    ) -> tuple[Layout, list[Fill]]:
        layout = layout.grown(sorted(plan.current), plan.stored_models)
        since: dict[Aggregate, int] = {}
        for asked in wanted.values():
            for aggregate, since_ms in asked.items():
                if not self._has(layout, aggregate, since_ms):
                    since[aggregate] = min(since_ms, since.get(aggregate, since_ms))
        added: list[Fill] = []
        for since_ms in sorted(set(since.values())):
            before = set(layout.pending)
            layout = layout.awaiting_history([a for a, at_ms in since.items() if at_ms == since_ms])
            added.append(Fill(tuple(sorted(layout.pending.keys() - before)), since_ms))
        return layout, added

    def opened(self, layout: Layout) -> Layout:
        """The layout in which events go into what is filled by now. To be asked before events are folded: no later, or
        they would be missed."""
        self._opening = False
        for fill in self._fills:
            if fill.done and not layout.pending.keys().isdisjoint(fill.groups):
                layout = layout.with_history(fill.groups, fill.lapsed)
        self._layout = layout
        return layout

    def _has(self, layout: Layout, aggregate: Aggregate, since_ms: int) -> bool:
        """Whether it is filled from so early on, or is being."""
        fill = self._fill_of(layout, aggregate)
        return fill is not None and fill.since_ms <= since_ms

    def _fill_of(self, layout: Layout, aggregate: Aggregate) -> Fill | None:
        group = layout.awaiting.get(aggregate)
        for fill in self._fills:
            if group in fill.groups and aggregate.where not in fill.lapsed:
                return fill
        return None

    def _lapse(self) -> None:
        """Events pass by filters that can't be evaluated now. A fill that rests misses nothing."""
        self._unlooked, layout = False, self._layout
        for number, fill in enumerate(self._fills):
            if not fill.done and not self._active(fill, layout):
                continue
            held = {a.where for a, group in layout.awaiting.items() if group in fill.groups}
            lapsed = tuple(sorted({*fill.lapsed, *(held & self._passed_by)}))
            if lapsed != fill.lapsed:
                self._fills[number] = replace(fill, lapsed=lapsed)
                self._changed = True

    def _active(self, fill: Fill, layout: Layout) -> bool:
        return any(
            layout.awaiting.get(aggregate) in fill.groups for asked in self._wanted.values() for aggregate in asked
        )

    def _look(self, layout: Layout) -> None:
        """Which fill goes on, and who waits."""
        self._layout = layout
        of = next((n for n, fill in enumerate(self._fills) if not fill.done and self._active(fill, layout)), -1)
        if of != self._of:
            self._read_for(of)
        self.warming = frozenset(name for name in self._wanted if self._waits(name, layout))

    def _read_for(self, of: int) -> None:
        self._of, self._tail = of, None
        if self._reading is not None:
            self._reading.cancel()
            self._ending, self._reading = self._reading, None

    def _waits(self, name: ModelName, layout: Layout) -> bool:
        for aggregate in self._wanted[name]:
            fill = self._fill_of(layout, aggregate)
            if fill is None or not fill.done:
                return True
        return False

    @property
    def behind(self) -> bool:
        """Whether the layout lacks what is filled by now."""
        return self._opening

    @property
    def running(self) -> bool:
        return self._of >= 0

    @property
    def due(self) -> bool:
        """Whether there is something to commit."""
        return self._changed or self._at_tail or (self._reading is not None and self._reading.done())

    @property
    def _at_tail(self) -> bool:
        return self._tail is not None and _reached(self._fills[self._of].progress, self._tail.start)

    def take(self, events: EventColumns, progress: Mapping[str, int]) -> Taken:
        """What goes into the commit of a cycle that has these events and comes to `progress`."""
        if self._tail is not None:
            self._keep(self._tail, events, progress)
        if self._unlooked and (len(events) or self.due):
            self._lapse()
        if self._of < 0:
            return Taken()
        fill = self._fills[self._of]
        if self._at_tail:
            return self._take_tail(fill, len(events), progress)
        if self._reading is None or not self._reading.done():
            return Taken()
        reading, self._reading = self._reading, None
        try:
            history = reading.result()
        except HeadraceError as failure:
            log.warning(
                "history not read yet", partition=self._partition, reason=f"{type(failure).__name__}: {failure}"
            )
            self._rested = self._clock.monotonic() + BACKFILL_RETRY_MS / 1000
            return Taken()
        self._rested = self._clock.monotonic() + BACKFILL_REST_FACTOR * history.seconds
        self._come_to(
            replace(
                fill,
                floor_ms=history.floor_ms or fill.floor_ms,
                starts=history.starts,
                progress={**fill.progress, **history.progress},
                events=fill.events + len(history.events),
                lost=fill.lost + history.lost,
            )
        )
        return Taken(fill.groups, [history.events])

    def _keep(self, tail: _Tail, events: EventColumns, progress: Mapping[str, int]) -> None:
        if len(events):
            tail.batches.append((events, progress))
            tail.events += len(events)
        if tail.events > BACKFILL_TAIL_EVENTS_MAX:
            self._tail = None  # the reader goes on, and it begins anew later

    def _take_tail(self, fill: Fill, live: int, progress: Mapping[str, int]) -> Taken:
        """At least one micro-batch more than came, so that it comes to an end."""
        tail = self._tail
        assert tail is not None
        taken: list[EventColumns] = []
        room, reached = 2 * live + BACKFILL_CHUNK_EVENTS, fill.progress
        while tail.batches and (not taken or len(tail.batches[0][0]) <= room):
            events, reached = tail.batches.popleft()
            taken.append(events)
            room -= len(events)
            tail.events -= len(events)
        done = not tail.batches
        if done:
            self._tail, reached = None, progress
            log.info("windows filled from history", partition=self._partition, events=fill.events, lost=fill.lost)
        else:
            tail.start = reached
        count = fill.events + sum(map(len, taken))
        self._come_to(replace(fill, progress={**fill.progress, **reached}, events=count, done=done))
        return Taken(fill.groups, taken)

    def _come_to(self, fill: Fill) -> None:
        self._fills[self._of] = fill
        self._changed = True
        if fill.done:
            self._opening = True
            self._look(self._layout)

    def fold(
        self, taken: Taken, layout: Layout, rows: Floats, positions: Mapping[str, int], plan: FeaturePlan,
        types: Sequence[str],
    ) -> None:  # fmt: skip
        """Add what was taken to `rows` [slots, customers], whose columns `positions` gives; then rest from it."""
        began = self._clock.monotonic()
        if self._view is None or self._view[0] is not layout or self._view[1] != taken.groups:
            self._view = (layout, taken.groups, layout.filling(taken.groups))
        for batch in taken.batches:
            at = np.fromiter([positions[customer] for customer in batch.customers], np.int64, len(batch.customers))
            events = replace(batch, rows=at[batch.rows])
            masks = plan.masks(events, filters_of(self._view[2], events, types))
            fold(self._view[2], rows, events, masks, np.zeros(len(events), np.bool_), types, ())
        ended = self._clock.monotonic()
        self._rested = max(self._rested, ended) + BACKFILL_REST_FACTOR * (ended - began)

    def committing(self) -> BackfillState | None:
        """What the frame that is made now says; None: nothing new."""
        changed, self._changed = self._changed, False
        return BackfillState(tuple(self._fills)) if changed else None

    def pump(self, progress: Mapping[str, int]) -> None:
        """Read on, once it has rested; `progress` is that of the newest commit."""
        if self._ending is not None:
            if not self._ending.done():
                return
            ended, self._ending = self._ending, None
            if not ended.cancelled():
                ended.exception()  # nobody waits for what it gave
        if self._of < 0 and self._connected:
            self._connected = False
            self._ending = asyncio.get_running_loop().create_task(self._reader.close())
        if self._of < 0 or self._reading is not None or self._at_tail or not progress:
            return
        if self._clock.monotonic() < self._rested:
            return
        fill = self._fills[self._of]
        self._target = dict(progress)
        if self._tail is not None:
            self._target = self._tail.start
        elif fill.progress and _missing(fill.progress, progress) <= BACKFILL_TAIL_BEGINS:
            self._tail = _Tail(self._target)
            if self._at_tail:
                return
        events_max = max(1, min(BACKFILL_CHUNK_EVENTS, BACKFILL_CHUNK_SLOTS // self._layout.slots))
        self._connected = True
        reading = self._reader.read(fill, self._target, events_max)
        self._reading = asyncio.get_running_loop().create_task(reading)

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        left = [task for task in (self._reading, self._ending) if task is not None]
        self._reading = self._ending = None
        await asyncio.gather(*left, return_exceptions=True)
        await self._reader.close()

    def statistics(self, layout: Layout) -> dict[str, Statistics]:
        """Model -> how far its windows are; staged ones by their keys."""
        found: dict[str, Statistics] = {}
        for name, asked in self._wanted.items():
            fills = {id(fill): fill for a in asked if (fill := self._fill_of(layout, a)) is not None}.values()
            found[str(name)] = {
                "warming": name in self.warming,
                "events": sum(fill.events for fill in fills),
                "percent": min((self._percent(fill) for fill in fills), default=0.0),
                "lost": sum(fill.lost for fill in fills),
                "floor_ms": max((fill.floor_ms for fill in fills), default=0),
            }
        return found

    def _percent(self, fill: Fill) -> float:
        if fill.done or not fill.progress:
            return 100.0 if fill.done else 0.0
        whole, left = _missing(fill.starts, self._target), _missing(fill.progress, self._target)
        return min(99.9, 100.0 * (whole - left) / whole) if whole else 99.9


def _reached(progress: Mapping[str, int], target: Mapping[str, int]) -> bool:
    return all(topic in progress and progress[topic] >= offset for topic, offset in target.items())


def _missing(progress: Mapping[str, int], target: Mapping[str, int]) -> int:
    return sum(max(0, offset - progress.get(topic, 0)) for topic, offset in target.items())
