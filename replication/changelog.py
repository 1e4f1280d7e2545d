"""Reading a partition's changelog: fold the committed frames that a store has not seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition

from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.clock import Clock
from node.kernel.errors import ChangelogCut, ProgressLost
from node.kernel.ports import StateStore
from node.kernel.reading import committed_reader, polls_up_to
from node.kernel.types import Frame
from replication.frame import FrameAssembler

log = structlog.get_logger(__name__)

_POLL_MS = 10
"""A poll that finds only markers of transactions waits it out, and every fold ends with some."""
_RETRY_MS = 10
_RECORDS_PER_POLL = 64


@dataclass(frozen=True, slots=True)
class FoldReport:
    frames: int
    rows: int
    bytes: int
    seconds: float

    def statistics(self) -> Mapping[str, float]:
        return {"frames": self.frames, "rows": self.rows, "bytes": self.bytes, "seconds": round(self.seconds, 3)}


class Changelog:
    """The changelog of one partition, as a reader."""

    def __init__(self, options: ClientOptions, topic: str, partition: int, clock: Clock) -> None:
        self._options = options
        self._at = TopicPartition(topic, partition)
        self._clock = clock
        self._consumer: AIOKafkaConsumer | None = None

    async def connect(self) -> AIOKafkaConsumer:
        """Connect without reading yet, so that a fold need not wait for it. Raises BrokerUnavailable, TopicMissing."""
        if self._consumer is None:
            self._consumer = committed_reader(self._options, retry_backoff_ms=_RETRY_MS)
            await broker_call(f"open changelog {self._name}", self._consumer.start())
            await self._bounds(self._consumer)
        return self._consumer

    async def close(self) -> None:
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            await close_quietly(f"changelog {self._name}", consumer.stop())

    async def fold_into(self, store: StateStore) -> FoldReport:
        """Apply every committed frame from the store's offset to the end, in order; the reader is closed then.

        To be called after the partition's producer has started: that ends a transaction left open, so the end is
        final. Raises ChangelogCut when the changelog no longer reaches back to the store's offset, ProgressLost when
        it ends before it, FrameCorrupt, BrokerUnavailable, TopicMissing.
        """
        try:
            return await self._fold(await self.connect(), store)
        finally:
            await self.close()

    async def frames(self) -> AsyncIterator[tuple[Frame, int, float]]:
        """Each frame that is kept, up to the end as it is when this begins, the changelog offset after it, and the
        share of the changelog that is read; the reader is closed then. Raises FrameCorrupt, BrokerUnavailable,
        TopicMissing."""
        try:
            consumer = await self.connect()
            start, end = await self._bounds(consumer)
            async for frame, offset, _ in self._frames(consumer, start, end):
                yield frame, offset, (offset - start) / (end - start)
        finally:
            await self.close()

    async def bounds(self) -> tuple[int, int]:
        """The first offset that is kept, and the end of what is committed. Raises BrokerUnavailable, TopicMissing."""
        try:
            return await self._bounds(await self.connect())
        finally:
            await self.close()

    @property
    def _name(self) -> str:
        return f"{self._at.topic}[{self._at.partition}]"

    async def _fold(self, consumer: AIOKafkaConsumer, store: StateStore) -> FoldReport:
        started = self._clock.monotonic()
        position = store.changelog_offset()
        start, end = await self._bounds(consumer)
        lost = progress_lost(self._at, position, start, end)
        if lost is not None:
            raise lost
        frames = rows = size = 0
        async for frame, offset, read in self._frames(consumer, position, end):
            store.apply(frame, offset)
            frames, rows, size = frames + 1, rows + len(frame.customers), read
            await asyncio.sleep(0)
        return FoldReport(frames, rows, size, self._clock.monotonic() - started)

    async def _frames(
        self, consumer: AIOKafkaConsumer, position: int, end: int
    ) -> AsyncIterator[tuple[Frame, int, int]]:
        """The frames between, the changelog offset after each, and the bytes read until then."""
        consumer.assign([self._at])
        consumer.seek(self._at, position)
        assembler, size, what = FrameAssembler(), 0, f"read changelog {self._name}"
        async for records, _ in polls_up_to(consumer, self._at, end, what, self._clock, _POLL_MS, _RECORDS_PER_POLL):
            for record in records:
                size += len(record.value or b"")
                frame = assembler.add(record.value) if record.offset < end else None
                if frame is not None:
                    yield frame, record.offset + 1, size

    async def _bounds(self, consumer: AIOKafkaConsumer) -> tuple[int, int]:
        what, at = f"bounds of changelog {self._name}", [self._at]
        start, end = await asyncio.gather(
            broker_call(what, consumer.beginning_offsets(at)), broker_call(what, consumer.end_offsets(at))
        )
        return start[self._at], end[self._at]


def progress_lost(at: TopicPartition, position: int, start: int, end: int) -> ProgressLost | None:
    """Why a store that has folded up to `position` can't go on from a changelog of these bounds; None if it can."""
    name = f"{at.topic}[{at.partition}]"
    if position < start:
        return ChangelogCut(
            f"changelog {name} starts at {start}, the store needs {position}: restore a snapshot, or "
            "delete the partition's folder if the changelog is whole"
        )
    if position > end:
        return ProgressLost(
            f"changelog {name} ends at {end}, the store has {position}: the topic was cut or made "
            "again; delete the partition's folder to take the changelog as the truth"
        )
    return None
