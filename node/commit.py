"""The one place where order matters more than speed: how a cycle becomes durable."""

from __future__ import annotations

from collections.abc import Sequence

from node.kernel.ports import StateStore
from node.kernel.types import Floats
from node.outbox import Outbox, Outgoing
from node.state.cache import RowCache
from node.steps import StepTimes


class Committer:
    """Commits one partition's cycles. After any error the outcome is unknown: open the partition again."""

    def __init__(self, outbox: Outbox, store: StateStore, cache: RowCache, steps: StepTimes) -> None:
        self._outbox = outbox
        self._store = store
        self._cache = cache
        self._steps = steps

    async def commit(self, outgoing: Outgoing, customers: Sequence[str], rows: Floats) -> None:
        """`rows` is float64 [slots, customers], what the frame holds as images.

        1. One Kafka transaction takes the inferences, the dead letters and the frame, which holds the
           source's progress: from here on the cycle has happened, and the changelog says so.
        2. The store applies the frame and its changelog offset as one atomic batch. A crash before this
           loses nothing: the frame is folded again when the partition is opened.
        3. The cache takes the rows; it only ever holds what is committed.

        Raises what Outbox.send and StateStore.apply raise.
        """
        with self._steps.measure("commit"):
            changelog_offset = await self._outbox.send(outgoing)
        with self._steps.measure("apply"):
            self._store.apply(outgoing.frame, changelog_offset)
            self._cache.store(customers, rows)
