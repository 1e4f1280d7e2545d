"""Reading a partition's changelog: fold the committed frames that a store has not seen."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition

from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.clock import Clock
from node.kernel.errors import BrokerUnavailable, ProgressLost
from node.kernel.limits import BROKER_CALL_MS_MAX, MIB
from node.kernel.ports import StateStore
from replication.frame import FrameAssembler

log = structlog.get_logger(__name__)

_POLL_MS = 100
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

    async def fold_into(self, store: StateStore) -> FoldReport:
        """Apply every committed frame from the store's offset to the end, in order.

        To be called after the partition's producer has started (that ends a transaction left open, so the
        end is final) or on a standby. Raises ProgressLost when the changelog no longer reaches back to the
        store's offset, FrameCorrupt, BrokerUnavailable.
        """
        consumer = AIOKafkaConsumer(
            **self._options,
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="none",
            fetch_max_bytes=32 * MIB,
            max_partition_fetch_bytes=8 * MIB,
        )
        try:
            await broker_call(f"open changelog {self._name}", consumer.start())
            return await self._fold(consumer, store)
        finally:
            await close_quietly(f"changelog {self._name}", consumer.stop())

    @property
    def _name(self) -> str:
        return f"{self._at.topic}[{self._at.partition}]"

    async def _fold(self, consumer: AIOKafkaConsumer, store: StateStore) -> FoldReport:
        started = self._clock.monotonic()
        position = store.changelog_offset()
        end = await self._check_bounds(consumer, position)
        consumer.assign([self._at])
        consumer.seek(self._at, position)
        assembler = FrameAssembler()
        frames = rows = size = 0
        heard = self._clock.monotonic()
        while position < end:
            what = f"read changelog {self._name}"
            polled = await broker_call(
                what, consumer.getmany(self._at, timeout_ms=_POLL_MS, max_records=_RECORDS_PER_POLL)
            )
            for record in polled.get(self._at, ()):
                size += len(record.value or b"")
                frame = assembler.add(record.value)
                if frame is not None:
                    store.apply(frame, record.offset + 1)
                    frames, rows = frames + 1, rows + len(frame.customers)
                    await asyncio.sleep(0)
            reached = await broker_call(what, consumer.position(self._at))
            if reached > position:
                position, heard = reached, self._clock.monotonic()
            elif self._clock.monotonic() - heard > BROKER_CALL_MS_MAX / 1000:
                raise BrokerUnavailable(f"{what}: nothing came for {BROKER_CALL_MS_MAX} ms, {end - position} to go")
        return FoldReport(frames, rows, size, self._clock.monotonic() - started)

    async def _check_bounds(self, consumer: AIOKafkaConsumer, position: int) -> int:
        what = f"bounds of changelog {self._name}"
        start = (await broker_call(what, consumer.beginning_offsets([self._at])))[self._at]
        end = (await broker_call(what, consumer.end_offsets([self._at])))[self._at]
        if position < start:
            raise ProgressLost(
                f"changelog {self._name} starts at {start}, the store needs {position}: restore a snapshot, or "
                "delete the partition's folder if the changelog is whole"
            )
        if position > end:
            raise ProgressLost(
                f"changelog {self._name} ends at {end}, the store has {position}: the topic was cut or made "
                "again; delete the partition's folder to take the changelog as the truth"
            )
        return int(end)
