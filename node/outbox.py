"""Where a cycle's outputs go: one Kafka transaction a commit, or plain sends where a broker has none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
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
_GROUP_OFFSETS_SECONDS = 5.0
"""The group's offsets are for lag tools only (progress is in the frame), and cost two round trips."""
_GROUP_OFFSETS_SECONDS_MAX = 5.0
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
    rows: str = ""
    """Where the rows that models were fed go as training data; '': nowhere."""

    @property
    def all(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.inferences, self.dead_letters, self.rows, self.changelog)))


@dataclass(slots=True)
class BrokerTraits:
    """What was learned about the broker; outlives the outboxes of a partition."""

    has_transactions: bool = False
    """A transactional producer has started once: a refusal is a fault now, not a trait."""
    takes_group_offsets: bool = True


@dataclass(slots=True)
class Outgoing:
    """All that one commit sends."""

    frame: Frame
    inferences: list[tuple[bytes, bytes]] = field(default_factory=list)
    dead_letters: list[tuple[bytes | None, bytes | None, Headers]] = field(default_factory=list)
    rows: Sequence[tuple[bytes, bytes]] = ()
    topics_left: Collection[str] = ()
    """Of the frame's progress, topics that are not read any more: the group is told nothing of them."""


class Outbox:
    """The producer of one partition; its transactional id is the partition's, so the newest one fences the rest.

    `guard` raises LeaseLost when this node may not own the partition now; it is asked before every step that others
    can see.
    """

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
        traits: BrokerTraits | None = None,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        self._options = options
        self._topics = topics
        self._application = application
        self._partition = partition
        self._wanted = transactions
        self._compression = compression
        self._encode = encode
        self._clock = clock
        self._traits = traits or BrokerTraits()
        self._guard = guard
        self._producer: AIOKafkaProducer | None = None
        self._offsets_sent = 0.0
        self._expected = self._infers = False
        self.transactional = transactions != "off"

    async def open(self) -> None:
        """Start the producer; with transactions this fences the partition's earlier producer and ends its transaction.

        A broker that refuses transactional ids is used without (`transactional` turns False) when the
        setting is "auto"; raises BrokerUnavailable otherwise.
        """
        await self.close()
        if self.transactional:
            try:
                await self._start_transactional()
                return
            except BrokerUnavailable as failure:
                if self._wanted == "required" or self._traits.has_transactions or not _refuses_transactions(failure):
                    raise
                log.warning(
                    "broker without transactions: at least once from here on, drop duplicates by inference id",
                    partition=self._partition,
                )
                await self.close()
                self.transactional = False
        await self._start(None)

    async def _start_transactional(self) -> None:
        """A refusal is believed when it is repeated: any broker may fail once with the same error."""
        for last in (False, False, True):
            try:
                await self._start(f"{self._application}-{self._partition}")
            except BrokerUnavailable as failure:
                if last or not _refuses_transactions(failure):
                    raise
                await self.close()
            else:
                self._traits.has_transactions = True
                return

    async def _start(self, transactional_id: str | None) -> None:
        what = f"producer of partition {self._partition}"
        self._producer = AIOKafkaProducer(
            **self._options, transactional_id=transactional_id, acks="all", retry_backoff_ms=_RETRY_MS
        )
        await broker_call(f"start {what}", self._producer.start())
        if transactional_id is not None:
            await broker_call(f"fence by {what}", self._end_earlier_transactions(self._producer))
            await broker_call(f"begin by {what}", self._producer.begin_transaction())

    async def _end_earlier_transactions(self, producer: AIOKafkaProducer) -> None:
        """Write a commit marker into every output partition, behind whatever an earlier producer left there.

        A broker (4.3.1) that is killed after it acknowledged a commit may come back without having written the
        markers, and never write them: the frame is then behind the end that read_committed readers see, until
        the next transaction of the same producer in that partition ends. Twice, because a second transaction
        begins only when the markers of the first are written; so a fold that starts after this sees all.
        """
        for _ in range(2):
            await producer.begin_transaction()
            for topic in self._topics.all:
                # Adding a partition without a record to it is what no public call of the client does.
                producer._txn_manager.maybe_add_partition_to_txn(TopicPartition(topic, self._partition))
            await producer.commit_transaction()

    def expect(self) -> None:
        """Say that a commit is coming: its topics join the transaction meanwhile, as soon as there is one, and the
        commit need not wait for that round trip, nor for the markers of the transaction before."""
        self._expected = True
        producer = self._producer
        if producer is not None and self.transactional and producer._txn_manager.is_in_transaction():
            # Each topic gets a marker of the commit, records or not: so inferences only if there were some last time.
            for topic in (self._topics.changelog, *([self._topics.inferences] if self._infers else [])):
                producer._txn_manager.maybe_add_partition_to_txn(TopicPartition(topic, self._partition))

    async def send(self, outgoing: Outgoing) -> int:
        """Make `outgoing` durable, all of it or nothing; gives the changelog offset after its frame.

        After any error the outcome is unknown: the caller discards this outbox and reads the changelog.
        Raises BrokerUnavailable, Fenced, LeaseLost, TopicMissing.
        """
        what = f"commit of partition {self._partition}"
        if self._producer is None:
            raise BrokerUnavailable(f"{what}: the producer is not open")
        return await broker_call(what, self._send(self._producer, outgoing))

    async def _send(self, producer: AIOKafkaProducer, outgoing: Outgoing) -> int:
        self._guard()
        self._expected, self._infers = False, bool(outgoing.inferences)
        parts: Iterable[Record] = ((_FRAME_KEY, part, []) for part in self._encode(outgoing.frame))
        inferences: Iterable[Record] = ((key, value, []) for key, value in outgoing.inferences)
        sent = await self._enqueue(producer, self._topics.inferences, inferences)
        sent += await self._enqueue(producer, self._topics.dead_letters, outgoing.dead_letters)
        if outgoing.rows:
            fed: Iterable[Record] = ((key, value, []) for key, value in outgoing.rows)
            sent += await self._enqueue(producer, self._topics.rows, fed)
        if not self.transactional:  # the frame says that the rest is out: it must not overtake it
            await _delivered(sent)
        sent += await self._enqueue(producer, self._topics.changelog, parts)
        if self.transactional:
            await self._send_group_offsets(producer, outgoing)
        # The client commits a transaction whose batches a broker refused: so all must be there first.
        frame_end = (await _delivered(sent))[-1]
        if self.transactional:
            self._guard()
            await producer.commit_transaction()
            await producer.begin_transaction()
            if self._expected:
                self.expect()
        return frame_end

    async def _enqueue(self, producer: AIOKafkaProducer, topic: str, records: Iterable[Record]) -> list[Delivery]:
        sent = []
        for batch in record_batches(records, self._compression, self.transactional):
            try:
                future = await producer.send_batch(batch, topic, partition=self._partition)
            except kafka_errors.IllegalOperation:  # the transaction is over already, since `expect`: raise why
                await producer._txn_manager.wait_for_transaction_end()
                raise
            future.add_done_callback(_mark_seen)
            sent.append((future, batch))
        return sent

    async def _send_group_offsets(self, producer: AIOKafkaProducer, outgoing: Outgoing) -> None:
        now = self._clock.monotonic()
        if not self._traits.takes_group_offsets or now - self._offsets_sent < _GROUP_OFFSETS_SECONDS:
            return
        offsets = {
            TopicPartition(topic, self._partition): offset
            for topic, offset in outgoing.frame.progress.items()
            if topic not in outgoing.topics_left
        }
        if not offsets:
            return
        self._offsets_sent = now
        try:
            async with asyncio.timeout(_GROUP_OFFSETS_SECONDS_MAX):
                await producer.send_offsets_to_transaction(offsets, self._application)
        except (TimeoutError, kafka_errors.KafkaError) as failure:
            self._traits.takes_group_offsets = False
            raise BrokerUnavailable(
                f"the offsets of group {self._application} were refused ({type(failure).__name__}); commits go on "
                "without them, so lag tools will not see this node"
            ) from failure

    async def close(self) -> None:
        """End the producer without waiting for what it still has: that belongs to a commit that is given up.

        The client's own stop would go on sending it behind our back, after the next session's frames.
        """
        if self._producer is not None:
            producer, self._producer = self._producer, None
            producer._closed = True
            await close_quietly(f"sender of partition {self._partition}", producer._sender.close())
            await close_quietly(f"producer of partition {self._partition}", producer.client.close())
            ended = producer._txn_manager and producer._txn_manager._transaction_waiter
            if ended is not None and ended.done():
                _mark_seen(ended)


def _mark_seen(future: asyncio.Future[Any]) -> None:
    """The commit reports the failure, if there is one; without this it would be reported as never retrieved, too."""
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
