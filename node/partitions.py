"""The partitions this node owns: found from the source topics, each run by its own task."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import structlog

from node.ingest.topics import Topics, TopicSettings
from node.kernel.errors import BrokerUnavailable, TopicMissing, TopicUnfit
from node.kernel.limits import BROKER_RETRY_MS_MAX, BROKER_RETRY_MS_MIN, STOP_MS_MAX
from node.kernel.supervise import Supervisor
from node.partition import Partition

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 15.0
"""How often the source topics are looked at for added partitions."""


class Partitions:
    def __init__(
        self,
        topics: Topics,
        sources: Sequence[str],
        outputs: Mapping[str, TopicSettings],
        owned: Literal["all"] | tuple[int, ...],
        make: Callable[[int], Partition],
        supervisor: Supervisor,
    ) -> None:
        self._topics = topics
        self._sources = tuple(sources)
        self._outputs = outputs
        self._owned = owned
        self._make = make
        self._supervisor = supervisor
        self._stopping = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.running: dict[int, Partition] = {}
        self.reason = "source topics have not been looked up yet"
        """Why partitions could not be found, '' once they were."""

    async def run(self) -> None:
        """Find partitions and start their tasks, now and whenever some are added, until stopped."""
        wait_ms: float = BROKER_RETRY_MS_MIN
        while not self._stopping.is_set():
            try:
                await self._look()
            except (BrokerUnavailable, TopicMissing, TopicUnfit) as failure:
                reason = f"{type(failure).__name__}: {failure}"
                if reason != self.reason:
                    log.warning("topics not ready", reason=reason)
                self.reason = reason
                wait_ms = min(wait_ms * 2, BROKER_RETRY_MS_MAX)
            else:
                wait_ms = _LOOK_SECONDS * 1000
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_ms / 1000):
                    await self._stopping.wait()

    async def _look(self) -> None:
        count = await self._topics.source_partitions(self._sources)
        wanted = range(count) if self._owned == "all" else [number for number in self._owned if number < count]
        fresh = [number for number in wanted if number not in self.running]
        if fresh:
            await self._start(count, fresh)
        absent = [] if self._owned == "all" else [number for number in self._owned if number >= count]
        self.reason = f"[kafka] partitions names {absent}, the source topics have {count}" if absent else ""

    async def _start(self, count: int, fresh: Sequence[int]) -> None:
        await self._topics.ensure(count, self._outputs)
        for number in fresh:
            partition = self._make(number)
            self.running[number] = partition
            self._tasks.append(self._supervisor.start(f"partition {number}", partition.run()))
        log.info("partitions owned", partitions=sorted(self.running))

    def unready(self) -> list[str]:
        """Why this node can't do all its work now, a line each."""
        reasons = [self.reason] if self.reason else []
        for number, partition in sorted(self.running.items()):
            condition = partition.condition
            if condition.phase != "running":
                reasons.append(f"partition {number} is {condition.phase}: {condition.reason or 'recovering'}")
        return reasons

    async def stop(self) -> None:
        """Let every partition finish and commit its cycle, for at most STOP_MS_MAX."""
        self._stopping.set()
        for partition in self.running.values():
            partition.stop()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=STOP_MS_MAX / 1000)
            if late:
                log.warning("partitions did not stop in time", late=len(late))
