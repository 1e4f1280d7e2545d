"""When the state of an open partition goes to disk: at intervals, and for most of that time beside its cycles."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from node.kernel.clock import Clock
from node.kernel.ports import StateStore


@dataclass(frozen=True, slots=True)
class FlushTurns:
    """Shared by the partitions of a node, which flush one after another: the few rows that one has left to write would
    wait for another's many, and its cycles with them."""

    interval_seconds: float
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Flushing:
    """A flush of a large store takes as long as dozens of cycles, more while the processor is busy. So its rows are
    written in a thread while frames are applied; only the few that came meanwhile are written with none applied."""

    def __init__(self, store: StateStore, turns: FlushTurns, clock: Clock) -> None:
        self._store = store
        self._turns = turns
        self._clock = clock
        self._begun = clock.monotonic()
        self._rows: asyncio.Task[None] | None = None

    async def step(self, settled: Callable[[], Awaitable[None]]) -> bool:
        """Begin a flush that is due, or end one whose rows are written; whether one was ended. `settled` is waited for
        before: no frame is applied afterwards, until this returns. Raises what it and the store raise."""
        if self._rows is None:
            due = self._clock.monotonic() - self._begun > self._turns.interval_seconds
            if due and not self._turns.turn.locked():
                await self._turns.turn.acquire()
                self._begun = self._clock.monotonic()
                self._rows = asyncio.create_task(asyncio.to_thread(self._store.flush_rows))
            return False
        if not self._rows.done():
            return False
        try:
            self._rows.result()
            await settled()
            await asyncio.to_thread(self._store.flush)
        finally:
            self._end()
        return True

    def _end(self) -> None:
        self._rows = None
        self._turns.turn.release()

    async def close(self) -> None:
        """Wait for the thread: the store must not be closed under it. Its failure is not raised, nothing is lost."""
        if self._rows is not None:
            await asyncio.gather(self._rows, return_exceptions=True)
            self._end()
