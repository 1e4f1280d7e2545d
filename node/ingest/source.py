"""The events of one partition, from one or several topics: assigned and sought, never a consumer group."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import OffsetOutOfRangeError

from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.clock import Clock
from node.kernel.errors import ProgressLost, TopicMissing
from node.kernel.limits import MIB, SOURCE_TOPICS_LEFT_MAX

log = structlog.get_logger(__name__)

SourceReset = Literal["wait", "earliest", "latest"]
_SILENT_SECONDS = 5.0
"""After so long without a record the broker is asked for its offsets: polling alone can't tell silence from absence."""
_PROBE_MS_MAX = 5_000
_TRIAL_MS = 1_000
_AT_ONCE_SECONDS = 0.0005
_FRESH_MS_MIN, _FRESH_MS_MAX = 3, 12
"""A fetch of what the broker has takes one or two milliseconds, and on a busy machine some more."""


@dataclass(slots=True)
class Polled:
    """Records in arrival order; `topics[i]` is the position of record i's topic in the source's topics."""

    records: list[Any]
    topics: list[int]
    progress: dict[str, int]
    """Topic -> next offset, of every topic, after these records."""


class Source:
    """Reads partition `partition` of every topic."""

    def __init__(
        self,
        options: ClientOptions,
        topics: Sequence[str],
        partition: int,
        bytes_max: int,
        start_from: Literal["earliest", "latest"],
        on_reset: SourceReset,
        clock: Clock,
    ) -> None:
        self._options = options
        self._topics = tuple(topics)
        self._places = [TopicPartition(topic, partition) for topic in topics]
        self._bytes_max = bytes_max
        self._start_from = start_from
        self._on_reset = on_reset
        self._clock = clock
        self._consumer: AIOKafkaConsumer | None = None
        self._fresh_ms = _FRESH_MS_MIN
        self._heard = 0.0
        self.progress: dict[str, int] = {}
        self.ends: dict[str, int] = {}
        """Topic -> end offset, as last asked for; for lag."""

    async def connect(self) -> None:
        """Connect without reading yet, so that `open` need not wait for it. Raises BrokerUnavailable, TopicMissing."""
        await self.close()
        self._consumer = AIOKafkaConsumer(
            **self._options,
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="none",
            fetch_max_wait_ms=500,
            fetch_max_bytes=max(self._bytes_max, MIB),
            max_partition_fetch_bytes=max(self._bytes_max // len(self._places), MIB),
        )
        await broker_call("start source", self._consumer.start())
        self._check_topics(await broker_call("look up source topics", self._consumer.topics()))

    async def open(self, progress: Mapping[str, int]) -> None:
        """Start reading at `progress` (topic -> next offset); a topic not in it starts as configured.

        Raises ProgressLost when the topic does not reach that offset and the operator has not said how
        to go on, BrokerUnavailable, TopicMissing.
        """
        if self._consumer is None or self.progress:
            await self.connect()
        assert self._consumer is not None
        self._consumer.assign(self._places)
        starts = await broker_call("source start offsets", self._consumer.beginning_offsets(self._places))
        ends = await broker_call("source end offsets", self._consumer.end_offsets(self._places))
        for place in self._places:
            self.ends[place.topic] = ends[place]
            self._go_to(
                place, progress.get(place.topic, starts[place] if self._start_from == "earliest" else ends[place])
            )
        for place in self._places:
            wanted = self.progress[place.topic]
            if not starts[place] <= wanted <= ends[place] and not await self._holds(place, wanted):
                self._go_to(place, self._reset_offset(place, wanted, starts[place], ends[place]))
        self._heard = self._clock.monotonic()

    def _go_to(self, place: TopicPartition, offset: int) -> None:
        assert self._consumer is not None
        self._consumer.seek(place, offset)
        self.progress[place.topic] = offset

    async def _holds(self, place: TopicPartition, offset: int) -> bool:
        """Whether the broker serves the offset. Only fetching tells: Tansu says an end that is too low."""
        assert self._consumer is not None
        try:
            await broker_call("try source", self._consumer.getmany(place, timeout_ms=_TRIAL_MS, max_records=1))
        except ProgressLost:
            return False
        self._go_to(place, offset)
        return True

    def _reset_offset(self, place: TopicPartition, wanted: int, start: int, end: int) -> int:
        if self._on_reset == "wait":
            raise ProgressLost(
                f"{place.topic}[{place.partition}] holds offsets {start} to {end}, but {wanted} is next: events are "
                "gone or the topic was made again. Set [kafka] on_source_reset to earliest or latest to go on"
            )
        offset = start if self._on_reset == "earliest" else end
        log.warning("source reset", topic=place.topic, partition=place.partition, lost=wanted, next=offset)
        return offset

    def _check_topics(self, known: Collection[str]) -> None:
        """Raises TopicMissing. The client asks for a topic that is gone thousands of times a second, so it must not."""
        missing = [topic for topic in self._topics if topic not in known]
        if missing:
            raise TopicMissing(
                f"source topic {', '.join(missing)} does not exist: create it, the node goes on by itself"
            )

    async def poll(self, events_max: int, wait_ms: int) -> Polled:
        """Up to `events_max` records, waiting at most `wait_ms` for the first.

        The client fetches ahead: what it holds at once is what came right after the last poll, and what has come
        since is still at the broker. So records that were there without waiting are followed by one more look, a
        longer one while such looks find something: events that just miss a cycle wait for the whole of it.
        """
        started = self._clock.monotonic()
        runs = await self._take(events_max, wait_ms)
        count = sum(map(len, runs.values()))
        if count:
            self._heard = self._clock.monotonic()
            if self._heard - started < _AT_ONCE_SECONDS and count < events_max:
                more = await self._take(events_max - count, self._fresh_ms)
                self._fresh_ms = _FRESH_MS_MAX if more else _FRESH_MS_MIN
                for place, records in more.items():
                    runs[place] = runs.get(place, []) + records
        elif self._clock.monotonic() - self._heard > _SILENT_SECONDS:
            await self._probe()
        return Polled(*in_order(runs), dict(self.progress))

    async def _take(self, records_max: int, wait_ms: int) -> dict[int, list[Any]]:
        """By position of the topic, each in the order of offsets."""
        assert self._consumer is not None
        call = self._consumer.getmany(timeout_ms=wait_ms, max_records=records_max)
        try:
            polled = await broker_call("poll source", call)
        except ProgressLost as lost:
            gone = lost.__cause__.args[0] if isinstance(lost.__cause__, OffsetOutOfRangeError) else self._places
            await self._reset(list(gone))
            polled = {}
        for place in self._places:  # it also moves over transaction markers, which are no records
            self.progress[place.topic] = await broker_call("source position", self._consumer.position(place))
        if not polled:
            self._check_topics([topic for topic in self._topics if self._consumer.partitions_for_topic(topic)])
        return {self._topics.index(place.topic): records for place, records in polled.items() if records}

    async def _reset(self, places: Sequence[TopicPartition]) -> None:
        """Go on as the operator has said where the next offset is gone. Raises ProgressLost if that is to wait."""
        assert self._consumer is not None
        starts = await broker_call("source start offsets", self._consumer.beginning_offsets(places))
        ends = await broker_call("source end offsets", self._consumer.end_offsets(places))
        for place in places:
            self._go_to(place, self._reset_offset(place, self.progress[place.topic], starts[place], ends[place]))

    async def _probe(self) -> None:
        assert self._consumer is not None
        ends = await broker_call("probe source", self._consumer.end_offsets(self._places), _PROBE_MS_MAX)
        self.ends = {place.topic: end for place, end in ends.items()}
        for place in self._places:
            wanted = self.progress[place.topic]
            if ends[place] < wanted and not await self._holds(place, wanted):
                await self._reset([place])
        self._heard = self._clock.monotonic()

    def lag(self) -> int:
        """Records between here and the newest end offset known, summed over the topics."""
        assert self._consumer is not None
        total = 0
        for place in self._places:
            stable = self._consumer.last_stable_offset(place)
            end = stable if stable and stable > 0 else self._consumer.highwater(place) or self.ends.get(place.topic, 0)
            total += max(0, end - self.progress.get(place.topic, 0))
        return total

    async def close(self) -> None:
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            await close_quietly("source", consumer.stop())


def progress_left(progress: Mapping[str, int], topics: Collection[str]) -> dict[str, int]:
    """The progress of topics that are not read any more, by which they go on should they come back.

    SOURCE_TOPICS_LEFT_MAX of them at most. Frames hold these first, in this order, so that what left last is the last.
    """
    left = [entry for entry in progress.items() if entry[0] not in topics]
    forgotten = [topic for topic, _ in left[:-SOURCE_TOPICS_LEFT_MAX]]
    if forgotten:
        log.warning("progress of former source topics forgotten", topics=forgotten, kept_max=SOURCE_TOPICS_LEFT_MAX)
    return dict(left[-SOURCE_TOPICS_LEFT_MAX:])


def in_order(runs: Mapping[int, list[Any]]) -> tuple[list[Any], list[int]]:
    """Records of one micro-batch and the position of each one's topic: by Kafka timestamp where there are several.

    `runs` are by topic, in the order of offsets. It follows from the records alone, whatever came of them first, so
    that who reads them again has them in the same order.
    """
    if len(runs) == 1:
        ((position, records),) = runs.items()
        return records, [position] * len(records)
    tagged = [(record.timestamp, position, record) for position, records in runs.items() for record in records]
    tagged.sort(key=lambda entry: entry[:2])
    return [entry[2] for entry in tagged], [entry[1] for entry in tagged]
