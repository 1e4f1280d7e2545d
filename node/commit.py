"""The one place where order matters more than speed: how a cycle becomes durable."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from node.kernel.ports import StateStore
from node.kernel.types import Floats
from node.outbox import Outbox, Outgoing
from node.state.cache import RowCache
from node.steps import StepTimes


class Committer:
    """Commits one partition's cycles in order, one at a time; the next cycle may already be computed meanwhile.

    After any error the outcome is unknown: nothing more is committed, and the partition is opened again.
    """

    def __init__(self, outbox: Outbox, store: StateStore, cache: RowCache, steps: StepTimes) -> None:
        self._outbox = outbox
        self._store = store
        self._cache = cache
        self._steps = steps
        self._committing: asyncio.Task[None] | None = None
        self.commits = 0
        """Done in this session."""

    @property
    def idle(self) -> bool:
        return self._committing is None

    def expect(self) -> None:
        """Say that a cycle which will be submitted has begun."""
        self._outbox.expect()

    async def submit(
        self,
        outgoing: Outgoing,
        customers: Sequence[str],
        rows: Floats,
        applied: Callable[[], None],
        lasting: int | None = None,
    ) -> None:
        """Start to commit a cycle once the one before it is done; `applied` is called when it is.

        `rows` is float64 [slots, customers], what the frame holds as images. The cache takes them at once, so
        that the next cycle goes on from them; if the commit fails, it goes with the rest of the session. Only the first
        `lasting` of them (None: all) may take the place of others in it.
        Raises what the commit before raised: see `commit`.
        """
        await self.drain()
        self._cache.store(customers, rows, lasting)
        self._committing = asyncio.get_running_loop().create_task(self._commit(outgoing, applied))

    async def drain(self) -> None:
        """Wait for the commit in progress. Raises what it raised."""
        if self._committing is not None:
            await self._committing
            self._committing = None

    def check(self) -> None:
        """Raise what the last commit raised, if it has ended so."""
        if self._committing is not None and self._committing.done():
            self._committing.result()
            self._committing = None

    async def _commit(self, outgoing: Outgoing, applied: Callable[[], None]) -> None:
        """1. One Kafka transaction takes the inferences, the dead letters and the frame, which holds the
           source's progress: from here on the cycle has happened, and the changelog says so.
        2. The store applies the frame and its changelog offset as one atomic batch. A crash before this
           loses nothing: the frame is folded again when the partition is opened.
        3. What waited for the store to hold the frame goes on.

        Raises what Outbox.send and StateStore.apply raise.
        """
        with self._steps.measure("commit"):
            changelog_offset = await self._outbox.send(outgoing)
        with self._steps.measure("apply"):
            self._store.apply(outgoing.frame, changelog_offset)
            self._cache.applied()
        self.commits += 1
        applied()

    async def close(self) -> None:
        """Give up on the commit in progress: its outcome will be found in the changelog."""
        if self._committing is not None:
            self._committing.cancel()
            await asyncio.gather(self._committing, return_exceptions=True)
            self._committing = None
