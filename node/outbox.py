"""Where a cycle's outputs go: one Kafka transaction a commit, or plain sends where a broker has none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import structlog
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka import errors as kafka_errors
from aiokafka.producer import sender as kafka_sender

from node.batches import Compression, Headers, RecordBatch, record_batches
from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.clock import Clock
from node.kernel.errors import BrokerUnavailable
from node.kernel.types import Frame

log = structlog.get_logger(__name__)

Transactions = Literal["auto", "required", "off"]
_GROUP_OFFSETS_SECONDS = 1.0
"""The group's offsets are for lag tools only (progress is in the frame), and cost two round trips."""
_RETRY_MS = 10
"""A broker still writing the last transaction's markers asks for a retry; the default would cost it 100 ms."""
_MARKERS_RETRY_SECONDS = 0.002
"""The client waits 20 ms, fixed, when the markers of the last transaction are still being written: a commit takes 3."""
kafka_sender.BACKOFF_OVERRIDE = _MARKERS_RETRY_SECONDS
_FRAME_KEY = b"frame"
Record = tuple[bytes | None, bytes | None, Headers]
Delivery = tuple["asyncio.Future[Any]", RecordBatch]


@dataclass(frozen=True, slots=True)
class OutputTopics:
    inferences: str
    changelog: str
    dead_letters: str


@dataclass(slots=True)
class Outgoing:
    """All that one commit sends."""

    frame: Frame
    inferences: list[tuple[bytes, bytes]] = field(default_factory=list)
    dead_letters: list[tuple[bytes | None, bytes | None, Headers]] = field(default_factory=list)


class Outbox:
    """The producer of one partition; its transactional id is the partition's, so the newest one fences the rest."""

    def __init__(
        self,
        options: ClientOptions,
        topics: OutputTopics,
        application: str,
        partition: int,
        transactions: Transactions,
        compression: Compression,
        encode: Callable[[Frame], list[bytes]],
        clock: Clock,
    ) -> None:
        self._options = options
        self._topics = topics
        self._application = application
        self._partition = partition
        self._wanted = transactions
        self._compression = compression
        self._encode = encode
        self._clock = clock
        self._producer: AIOKafkaProducer | None = None
        self._offsets_sent = 0.0
        self.transactional = transactions != "off"

    async def open(self) -> None:
        """Start the producer; with transactions this fences the partition's earlier producer and ends its transaction.

        A broker that refuses transactional ids is used without (`transactional` turns False) when the
        setting is "auto"; raises BrokerUnavailable otherwise.
        """
        await self.close()
        if self.transactional:
            try:
                await self._start(f"{self._application}-{self._partition}")
                return
            except BrokerUnavailable as failure:
                if self._wanted == "required" or not _refuses_transactions(failure):
                    raise
                log.warning(
                    "broker without transactions: at least once from here on, drop duplicates by inference id",
                    partition=self._partition,
                )
                await self.close()
                self.transactional = False
        await self._start(None)

    async def _start(self, transactional_id: str | None) -> None:
        what = f"producer of partition {self._partition}"
        self._producer = AIOKafkaProducer(
            **self._options, transactional_id=transactional_id, acks="all", retry_backoff_ms=_RETRY_MS
        )
        await broker_call(f"start {what}", self._producer.start())
        if transactional_id is not None:
            await broker_call(f"fence by {what}", self._producer.begin_transaction())

    async def send(self, outgoing: Outgoing) -> int:
        """Make `outgoing` durable, all of it or nothing; gives the changelog offset after its frame.

        After any error the outcome is unknown: the caller discards this outbox and reads the changelog.
        Raises BrokerUnavailable, Fenced, TopicMissing.
        """
        what = f"commit of partition {self._partition}"
        if self._producer is None:
            raise BrokerUnavailable(f"{what}: the producer is not open")
        return await broker_call(what, self._send(self._producer, outgoing))

    async def _send(self, producer: AIOKafkaProducer, outgoing: Outgoing) -> int:
        parts: Iterable[Record] = ((_FRAME_KEY, part, []) for part in self._encode(outgoing.frame))
        inferences: Iterable[Record] = ((key, value, []) for key, value in outgoing.inferences)
        sent = await self._enqueue(producer, self._topics.inferences, inferences)
        sent += await self._enqueue(producer, self._topics.dead_letters, outgoing.dead_letters)
        if not self.transactional:  # the frame says that the rest is out: it must not overtake it
            await _delivered(sent)
        sent += await self._enqueue(producer, self._topics.changelog, parts)
        if self.transactional:
            await self._send_group_offsets(producer, outgoing.frame)
            await producer.commit_transaction()
        frame_end = (await _delivered(sent))[-1]
        if self.transactional:
            await producer.begin_transaction()
        return frame_end

    async def _enqueue(self, producer: AIOKafkaProducer, topic: str, records: Iterable[Record]) -> list[Delivery]:
        sent = []
        for batch in record_batches(records, self._compression, self.transactional):
            future = await producer.send_batch(batch, topic, partition=self._partition)
            future.add_done_callback(_mark_seen)
            sent.append((future, batch))
        return sent

    async def _send_group_offsets(self, producer: AIOKafkaProducer, frame: Frame) -> None:
        now = self._clock.monotonic()
        if now - self._offsets_sent < _GROUP_OFFSETS_SECONDS or not frame.progress:
            return
        self._offsets_sent = now
        offsets = {TopicPartition(topic, self._partition): offset for topic, offset in frame.progress.items()}
        await producer.send_offsets_to_transaction(offsets, self._application)

    async def close(self) -> None:
        if self._producer is not None:
            producer, self._producer = self._producer, None
            await close_quietly(f"producer of partition {self._partition}", producer.stop())


def _mark_seen(future: asyncio.Future[Any]) -> None:
    """The commit reports the failure; without this each batch would be reported again as never retrieved."""
    if not future.cancelled():
        future.exception()


async def _delivered(sent: Sequence[Delivery]) -> list[int]:
    """The offset after each batch, once the broker has it."""
    return [int((await future).offset) + batch.record_count() for future, batch in sent]


def _refuses_transactions(failure: BrokerUnavailable) -> bool:
    refusals: Sequence[type[BaseException]] = (kafka_errors.UnknownError, kafka_errors.UnsupportedVersionError)
    cause = failure.__cause__
    while cause is not None:
        if isinstance(cause, tuple(refusals)):
            return True
        cause = cause.__cause__
    return False
