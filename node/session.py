"""Opening a partition: fence, recover, position. What is opened here is closed here."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from node.backfilling import Backfilling, HistoryReader
from node.backlog import Backlog, Versions
from node.commit import Committer
from node.counts import NodeCounts
from node.cycle import Cycle, Engine, PartitionState
from node.ingest.source import Source, progress_left
from node.intervals import Intervals
from node.kernel.clock import Clock
from node.kernel.errors import ChangelogCut, StateCorrupt
from node.kernel.ports import FeaturePlan, StateStore
from node.kernel.types import ModelName, Statistics
from node.outbox import Outbox
from node.outgoing import Origin
from node.room import room_problem
from node.state.cache import RowCache
from node.state.flushing import Flushing, FlushTurns
from node.state.folder import StateFolder
from node.state.layout import Layout
from node.steps import StepTimes
from node.waiting import Bound

log = structlog.get_logger(__name__)

_CHUNKS_AT_ONCE = 16
"""Of the sequence log, decoded when a partition is opened; a full log of many models is hundreds of megabytes."""


class Recovered(Protocol):
    def statistics(self) -> Statistics: ...


class ChangelogReader(Protocol):
    """The reader of one partition's changelog."""

    async def connect(self) -> object: ...

    async def fold_into(self, store: StateStore) -> Recovered:
        """Apply what the store has not seen, and close. Raises ChangelogCut and others."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What a session is made of; everything is made anew for each, so nothing stale outlives a failure.

    But for the store where `keep_store` is set: it holds committed frames only, and goes on as a standby's.
    """

    state: StateFolder
    outbox: Callable[[], Outbox]
    source: Callable[[], Source]
    changelog: Callable[[], ChangelogReader]
    history: Callable[[], HistoryReader]
    versions: Versions
    bound: Callable[[ModelName], Bound]
    cache_bytes: int
    flushes: FlushTurns
    keep_store: bool = False


class PartitionSession:
    """An open partition. `node.partition` runs its cycles and closes it."""

    def __init__(
        self,
        cycle: Cycle,
        committer: Committer,
        source: Source,
        outbox: Outbox,
        store: StateStore,
        state: PartitionState,
        steps: StepTimes,
        flushing: Flushing,
        close_store: Callable[[], Awaitable[None]],
        counts: NodeCounts,
    ) -> None:
        self.source = source
        self.outbox = outbox
        self.store = store
        self.state = state
        self.steps = steps
        self._cycle = cycle
        self._committer = committer
        self._flushing = flushing
        self._close_store = close_store
        self._counts, self._opening = counts, counts.opened(state)

    async def cycle(self) -> bool:
        more = await self._cycle.run()
        await self._flushing.step(self._committer.drain)
        return more

    @property
    def proven(self) -> bool:
        """Whether cycles work: one was committed, or there was nothing to commit. Opening alone proves nothing."""
        return self._committer.commits > 0 or self._committer.idle

    def room_problem(self, plan: FeaturePlan) -> str:
        """Why the partition's rows have no room for what the plan needs; '' when they have."""
        state, fills = self.state, self.state.backfilling
        return room_problem(plan, state.layout, fills.previewed, fills.reduced_rarely, state.newest)

    async def finish(self) -> None:
        """Let the last commit end. Raises what it raised."""
        await self._committer.drain()

    async def close(self) -> None:
        """Clients first, then the state; nothing is flushed that was not committed, since nothing such exists."""
        try:
            await self._committer.close()
        finally:
            self._counts.closed(self._opening)
        self.state.backlog.close()
        self.state.intervals.close()
        await self.state.backfilling.close()
        await self.source.close()
        await self.outbox.close()
        await self._flushing.close()
        await self._close_store()


async def open_session(
    parts: Parts, engine: Engine, origin: Origin, counts: NodeCounts, clock: Clock
) -> PartitionSession:
    """Open partition `origin.partition`.

    1. The producer starts: from now on an earlier owner cannot commit, and the changelog has an end.
    2. The store folds every committed frame it has not seen.
    3. The source goes on where the last frame says.

    The readers of 2 and 3 connect meanwhile. Raises what these raise; nothing but a kept store stays open then.
    """
    store = await parts.state.open()
    outbox, source, changelog = parts.outbox(), parts.source(), parts.changelog()
    close_store = _leave_open if parts.keep_store else parts.state.close
    steps = counts.steps(origin.partition)
    state: PartitionState | None = None
    try:
        await _together(outbox.open(), changelog.connect(), source.connect())
        store, recovered = await _folded(parts.state, store, changelog)
        log.info("partition recovered", partition=origin.partition, **recovered.statistics())
        state = await _state(store, parts, engine, origin, clock)
        await source.open(store.progress())
        committer = Committer(outbox, store, state.cache, steps)
        cycle = Cycle(engine, origin, source, committer, state, steps, clock)
        flushing = Flushing(store, parts.flushes, clock)
        state.backlog.pump()
    except BaseException:
        if state is not None:
            state.backlog.close()
        await changelog.close()
        await source.close()
        await outbox.close()
        await close_store()
        raise
    return PartitionSession(cycle, committer, source, outbox, store, state, steps, flushing, close_store, counts)


async def _leave_open() -> None:
    """The store belongs to the replica, which is a standby next."""


async def _together(*calls: Awaitable[object]) -> None:
    """All of them at once. Raises the first one's failure in their order, once all have ended."""
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


async def _folded(state: StateFolder, store: StateStore, changelog: ChangelogReader) -> tuple[StateStore, Recovered]:
    """The store with all that is committed; another one if it had to come from a snapshot."""
    try:
        return store, await changelog.fold_into(store)
    except ChangelogCut:
        if not await state.restore():
            raise
    store = await state.open()
    return store, await changelog.fold_into(store)


async def _state(store: StateStore, parts: Parts, engine: Engine, origin: Origin, clock: Clock) -> PartitionState:
    encoded = store.layout()
    layout = Layout.empty() if encoded is None else Layout.decode(encoded)
    backlog = Backlog(engine.runner, store, parts.versions, parts.bound, origin.names, clock)
    await _restore(backlog, store)
    counters, progress, partition = store.counters(), store.progress(), origin.partition
    return PartitionState(
        layout,
        RowCache(store, layout, parts.cache_bytes),
        backlog,
        Intervals(engine.runner, store, clock, partition),
        Backfilling(parts.history(), store.backfill(), clock, partition),
        Counter(counters),
        counters,
        {topic: offset for topic, offset in progress.items() if topic in origin.topics},
        progress_left(progress, origin.topics),
    )


async def _restore(backlog: Backlog, store: StateStore) -> None:
    """Take over the sequence log, a few chunks at a time: only each model's first ones stay in memory."""
    after: tuple[str, int] | None = None
    try:
        while chunks := store.chunks(_CHUNKS_AT_ONCE, after=after):
            backlog.restore(chunks)
            after = (chunks[-1].triggers.line_name, chunks[-1].number)
            await asyncio.sleep(0)
    except ValueError as failure:
        raise StateCorrupt(f"the sequence log can't be read: {failure}") from failure
