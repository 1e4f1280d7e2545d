"""Rows of state in bulk, the same for both sides: made by a node from the standard workload, then copied.

A node folds the standard events, a month of them, so that windows are as full as they would be in production. The rows
it leaves in its changelog are copied under new customers' names until there are as many as asked for, and go into a
changelog of Headrace's as frames and into one of Kafka Streams' as records.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import harness
import numpy as np
import workload
from numpy.typing import NDArray

sys.path.insert(0, str(harness.ROOT))
from node.kernel.types import Frame
from replication.frame import FrameAssembler, encode_frame

BROKER_S_MAX = 120.0
FRAME_ROWS = 4096
"""As many as a cycle takes events by default."""
MONTH_MS = 30 * 24 * 3600 * 1000
REQUEST_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Rows:
    """`images` is float64 [customers, slots], rows under the layout of `frame`; `progress` is by partition."""

    customers: list[bytes]
    images: NDArray[np.float64]
    layout_id: int
    layout: bytes
    progress: Mapping[int, Mapping[str, int]]

    @property
    def row_bytes(self) -> int:
        return int(self.images.shape[1]) * self.images.itemsize


def month_of_events(count: int) -> Iterator[workload.Events]:
    """The standard events, uniform over the customers, their times spread over 30 days."""
    random = np.random.default_rng(workload.SEED)
    for first in range(0, count, workload.CHUNK_EVENTS):
        size = min(workload.CHUNK_EVENTS, count - first)
        numbers = np.arange(first, first + size)
        times_ms = workload.FIRST_TIME_MS + (numbers * (MONTH_MS / count)).astype(np.int64)
        yield workload.formatted(random, random.integers(0, workload.CUSTOMERS, size), times_ms)


def copied(customers: Sequence[bytes], copy: int, partitions: int) -> tuple[list[bytes], NDArray[np.int64]]:
    """The customers' names in this copy, and each one's partition.

    A copy's names sort together: no two copies of a row are near each other on disk, where compression would find them.
    """
    names = [b"%04d-%s" % (copy, customer) for customer in customers]
    return names, np.array([zlib.crc32(name) % partitions for name in names], np.int64)


async def read_rows(address: str, changelog: str, partitions: int) -> Rows:
    """Each customer's last row in a changelog, of those under its newest layout."""
    frames: list[tuple[int, Frame]] = []
    async for partition, value in _records(address, changelog, partitions):
        frames.append((partition, value))
    newest = max(frame.layout_id for _, frame in frames)
    layouts = {frame.layout_id: frame.layout for _, frame in frames if frame.layout}
    found: dict[bytes, NDArray[np.float64]] = {}
    progress: dict[int, Mapping[str, int]] = {}
    for partition, frame in frames:
        progress[partition] = {**progress.get(partition, {}), **frame.progress}
        if frame.layout_id == newest:
            found.update(zip(frame.customers, frame.rows, strict=True))
    return Rows(list(found), np.array(list(found.values())), newest, layouts[newest], progress)


async def _records(address: str, topic: str, partitions: int) -> AsyncIterator[tuple[int, Frame]]:
    from aiokafka import AIOKafkaConsumer, TopicPartition

    places = [TopicPartition(topic, number) for number in range(partitions)]
    consumer = AIOKafkaConsumer(
        bootstrap_servers=address, isolation_level="read_committed", auto_offset_reset="earliest"
    )
    async with asyncio.timeout(BROKER_S_MAX):
        await consumer.start()
        try:
            ends = await consumer.end_offsets(places)
            for place in places:
                consumer.assign([place])
                consumer.seek(place, 0)
                assembler = FrameAssembler()
                while await consumer.position(place) < ends[place]:
                    for record in (await consumer.getmany(place, timeout_ms=200)).get(place, ()):
                        frame = assembler.add(record.value)
                        if frame is not None:
                            yield place.partition, frame
        finally:
            await consumer.stop()


def frames_of(rows: Rows, copies: int, partitions: int) -> Iterator[tuple[int, Frame]]:
    """All copies as frames, with their partitions; a partition's first frame brings the layout."""
    empty = Frame({}, rows.layout_id, [], rows.images[:0], rows.layout)
    for partition in range(partitions):
        yield partition, replace(empty, progress=rows.progress.get(partition, {}))
    for copy in range(copies):
        names, owners = copied(rows.customers, copy, partitions)
        for partition in range(partitions):
            chosen = np.flatnonzero(owners == partition)
            for start in range(0, len(chosen), FRAME_ROWS):
                part = chosen[start : start + FRAME_ROWS]
                yield (
                    partition,
                    Frame({}, rows.layout_id, [names[index] for index in part.tolist()], rows.images[part]),
                )


async def write_frames(address: str, topic: str, rows: Rows, copies: int, partitions: int) -> int:
    """Fill Headrace's changelog, which must exist and be empty; the bytes of its records."""
    size = 0
    async with _producer(address) as producer:
        for partition, frame in frames_of(rows, copies, partitions):
            for record in encode_frame(frame):
                size += len(record)
                # One at a time keeps the parts of a frame adjacent, and bounds what waits.
                await producer.send_and_wait(topic, record, partition=partition)
    return size


async def write_records(address: str, topic: str, rows: Rows, copies: int, partitions: int) -> int:
    """Fill a changelog of Kafka Streams', which must exist: a record a row. Gives the bytes of keys and rows."""
    images = [image.tobytes() for image in rows.images]
    size = 0
    async with _producer(address) as producer:
        for copy in range(copies):
            names, owners = copied(rows.customers, copy, partitions)
            size += sum(map(len, names)) + len(names) * rows.row_bytes
            for partition in range(partitions):
                await _send(producer, topic, partition, np.flatnonzero(owners == partition).tolist(), names, images)
    return size


async def _send(
    producer: Any, topic: str, partition: int, chosen: Sequence[int], names: list[bytes], images: list[bytes]
) -> None:
    acknowledged = []
    batch = producer.create_batch()
    for index in chosen:
        record = {"key": names[index], "value": images[index], "timestamp": None}
        if batch.append(**record) is None:
            acknowledged.append(await producer.send_batch(batch, topic, partition=partition))
            batch = producer.create_batch()
            batch.append(**record)
    if batch.record_count():
        acknowledged.append(await producer.send_batch(batch, topic, partition=partition))
    async with asyncio.timeout(BROKER_S_MAX):
        await asyncio.gather(*acknowledged)


def _producer(address: str) -> Any:
    from aiokafka import AIOKafkaProducer

    return AIOKafkaProducer(
        bootstrap_servers=address,
        acks="all",
        max_request_size=REQUEST_BYTES_MAX,
        max_batch_size=workload.BATCH_BYTES_MAX,
    )
