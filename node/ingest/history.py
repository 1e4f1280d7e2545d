"""Reading one partition's records of the source topics again, from a time on, beside the cycle's own reading."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaConsumer, TopicPartition

from node.backfilling import History
from node.ingest.decode import EventDecoder
from node.kernel.backfills import Fill
from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.clock import Clock
from node.kernel.errors import BrokerUnavailable, ProgressLost
from node.kernel.limits import BROKER_CALL_MS_MAX
from node.kernel.reading import committed_reader

_POLL_MS: Final = 200


class TopicHistory:
    """A `HistoryReader` of one partition of every source topic.

    Records of several topics come by Kafka timestamp, each topic's in the order of offsets; those of equal time in the
    order of the topics: as in a micro-batch of the cycle, over the whole of history. Connects when first asked.
    """

    def __init__(
        self, options: ClientOptions, topics: Sequence[str], partition: int, decoder: EventDecoder, clock: Clock
    ) -> None:
        self._options = options
        self._places = [TopicPartition(topic, partition) for topic in topics]
        self._decoder = decoder
        self._clock = clock
        self._consumer: AIOKafkaConsumer | None = None
        self._held: list[deque[Any]] = [deque() for _ in topics]
        self._next: dict[str, int] = {}
        self._floor_ms = self._lost = 0

    async def read(self, fill: Fill, target: Mapping[str, int], events_max: int) -> History:
        """See `HistoryReader`. Raises BrokerUnavailable, TopicMissing; what it held is given up then."""
        self._floor_ms = self._lost = 0
        try:
            starts = await self._go_to(fill, target)
            records, topics = await self._records(target, events_max)
        except BaseException:
            await self.close()
            raise
        began = self._clock.monotonic()
        events = self._decoder.records(records, topics).events
        seconds = self._clock.monotonic() - began
        return History(events, starts, dict(self._next), self._floor_ms, self._lost, seconds)

    async def _go_to(self, fill: Fill, target: Mapping[str, int]) -> Mapping[str, int]:
        if self._consumer is None:
            self._consumer = committed_reader(self._options)
            await broker_call("read history", self._consumer.start())
            self._consumer.assign(self._places)
        starts = dict(fill.starts)
        wanted = {place.topic: fill.progress.get(place.topic, -1) for place in self._places}
        for place in self._places:
            if wanted[place.topic] < 0:
                starts[place.topic] = wanted[place.topic] = await self._first(place, fill.since_ms, target)
        if wanted != self._next:
            self._next = wanted
            for place, held in zip(self._places, self._held, strict=True):
                held.clear()
                self._consumer.seek(place, wanted[place.topic])
        return starts

    async def _first(self, place: TopicPartition, since_ms: int, target: Mapping[str, int]) -> int:
        """The first offset of that time or later; notes when older records are gone."""
        assert self._consumer is not None
        starts = await broker_call("first of history", self._consumer.beginning_offsets([place]))
        times = await broker_call("time of history", self._consumer.offsets_for_times({place: since_ms}))
        end = target.get(place.topic, 0)
        if times[place] is None:
            return end
        if times[place].offset <= starts[place] and starts[place] > 0:
            self._floor_ms = max(self._floor_ms, times[place].timestamp)
        first: int = times[place].offset
        return min(end, first)

    async def _records(self, target: Mapping[str, int], events_max: int) -> tuple[list[Any], list[int]]:
        records: list[Any] = []
        topics: list[int] = []
        open_topics = list(range(len(self._places)))
        while len(records) < events_max:
            for number in list(open_topics):
                if not await self._filled(number, target.get(self._places[number].topic, 0)):
                    open_topics.remove(number)
            if not open_topics:
                break
            self._take(open_topics, target, events_max, records, topics)
        return records, topics

    def _take(
        self,
        open_topics: Sequence[int],
        target: Mapping[str, int],
        events_max: int,
        records: list[Any],
        topics: list[int],
    ) -> None:
        """What is held of the topics that go on, in order, until one of them has nothing more."""
        while len(records) < events_max:
            number = min(open_topics, key=lambda one: (self._held[one][0].timestamp, one))
            held, topic = self._held[number], self._places[number].topic
            record = held.popleft()
            records.append(record)
            topics.append(number)
            self._next[topic] = record.offset + 1
            if not held or held[0].offset >= target[topic]:
                return

    async def _filled(self, number: int, end: int) -> bool:
        """Whether a record before `end` is held; else there is none, and the topic is done."""
        consumer, place, held = self._consumer, self._places[number], self._held[number]
        assert consumer is not None
        heard = self._clock.monotonic()
        while self._next[place.topic] < end and not held:
            try:
                polled = await broker_call("read history", consumer.getmany(place, timeout_ms=_POLL_MS))
            except ProgressLost:
                await self._skip_lost(place, end)
                continue
            held.extend(polled.get(place, []))
            position = await broker_call("position of history", consumer.position(place))
            if not held and position > self._next[place.topic]:
                self._next[place.topic] = min(end, position)  # markers of transactions only
                heard = self._clock.monotonic()
            elif self._clock.monotonic() - heard > BROKER_CALL_MS_MAX / 1000:
                raise BrokerUnavailable(f"history of {place.topic}[{place.partition}]: nothing came")
        if held and held[0].offset >= end:
            self._next[place.topic] = max(self._next[place.topic], end)
        return self._next[place.topic] < end

    async def _skip_lost(self, place: TopicPartition, end: int) -> None:
        """Retention was faster: go on with what there is."""
        assert self._consumer is not None
        starts = await broker_call("first of history", self._consumer.beginning_offsets([place]))
        kept = starts[place] > self._next[place.topic]  # else the topic was made again: what was there is gone
        first = min(end, starts[place]) if kept else end
        self._lost += first - self._next[place.topic]
        self._next[place.topic] = first
        self._consumer.seek(place, first)
        times = await broker_call("time of history", self._consumer.offsets_for_times({place: 0}))
        if times[place] is not None:
            self._floor_ms = max(self._floor_ms, times[place].timestamp)

    async def close(self) -> None:
        self._next = {}
        for held in self._held:
            held.clear()
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            await close_quietly("history reader", consumer.stop())
