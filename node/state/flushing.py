"""When the state of an open partition goes to disk: at intervals, and for most of that time beside its cycles."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from node.kernel.clock import Clock
from node.kernel.ports import StateStore


class Flushing:
    """A flush of a large store takes as long as dozens of cycles, more while the processor is busy. So its rows are
    written in a thread while frames are applied; only the few that came meanwhile are written with none applied."""

    def __init__(self, store: StateStore, interval_seconds: float, clock: Clock) -> None:
        self._store = store
        self._interval = interval_seconds
        self._clock = clock
        self._begun = clock.monotonic()
        self._rows: asyncio.Task[None] | None = None

    async def step(self, settled: Callable[[], Awaitable[None]]) -> bool:
        """Begin a flush that is due, or end one whose rows are written; whether one was ended. `settled` is waited for
        before: no frame is applied afterwards, until this returns. Raises what it and the store raise."""
        if self._rows is None:
            if self._clock.monotonic() - self._begun > self._interval:
                self._begun = self._clock.monotonic()
                self._rows = asyncio.create_task(asyncio.to_thread(self._store.flush_rows))
            return False
        if not self._rows.done():
            return False
        rows, self._rows = self._rows, None
        rows.result()
        await settled()
        await asyncio.to_thread(self._store.flush)
        return True

    async def close(self) -> None:
        """Wait for the thread: the store must not be closed under it. Its failure is not raised, nothing is lost."""
        if self._rows is not None:
            await asyncio.gather(self._rows, return_exceptions=True)
            self._rows = None
