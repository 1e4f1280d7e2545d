"""A partition's committed frames, one after another, for somebody who has no store to fold them into."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiokafka import AIOKafkaConsumer, TopicPartition

from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.clock import Clock
from node.kernel.errors import BrokerUnavailable
from node.kernel.limits import BROKER_CALL_MS_MAX, MIB
from node.kernel.types import Frame
from replication.frame import FrameAssembler

_POLL_MS = 50
_RECORDS_PER_POLL = 64


async def frames(
    options: ClientOptions, topic: str, partition: int, clock: Clock
) -> AsyncIterator[tuple[Frame, int, float]]:
    """Each frame that is kept, up to the end as it was when this began; the changelog offset after it, and the share
    of the changelog that is read. Raises FrameCorrupt, BrokerUnavailable, TopicMissing."""
    at, what = TopicPartition(topic, partition), f"read changelog {topic}[{partition}]"
    consumer = AIOKafkaConsumer(
        **options,
        enable_auto_commit=False,
        isolation_level="read_committed",
        auto_offset_reset="none",
        fetch_max_bytes=32 * MIB,
        max_partition_fetch_bytes=8 * MIB,
    )
    try:
        await broker_call(what, consumer.start())
        start = (await broker_call(what, consumer.beginning_offsets([at])))[at]
        end = (await broker_call(what, consumer.end_offsets([at])))[at]
        consumer.assign([at])
        consumer.seek(at, start)
        assembler, position, heard = FrameAssembler(), start, clock.monotonic()
        while position < end:
            polled = await broker_call(what, consumer.getmany(at, timeout_ms=_POLL_MS, max_records=_RECORDS_PER_POLL))
            for record in polled.get(at, ()):
                frame = assembler.add(record.value) if record.offset < end else None
                if frame is not None:
                    yield frame, record.offset + 1, (record.offset + 1 - start) / (end - start)
            reached = await broker_call(what, consumer.position(at))
            if reached > position:
                position, heard = reached, clock.monotonic()
            elif clock.monotonic() - heard > BROKER_CALL_MS_MAX / 1000:
                raise BrokerUnavailable(f"{what}: nothing came for {BROKER_CALL_MS_MAX} ms, {end - position} to go")
    finally:
        await close_quietly(f"changelog {topic}[{partition}]", consumer.stop())
