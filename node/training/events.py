"""Reading a partition's events again, commit by commit, as the frames say which were whose."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiokafka import TopicPartition

from node.ingest.decode import EventDecoder
from node.ingest.source import in_order
from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.clock import Clock
from node.kernel.reading import committed_reader, polls_up_to
from node.kernel.types import EventColumns

_POLL_MS: Final = 200
_RECORDS_PER_POLL: Final = 4096


class EventReader:
    """Of one partition of every source topic, forwards."""

    def __init__(
        self, options: ClientOptions, topics: Sequence[str], partition: int, decoder: EventDecoder, clock: Clock
    ) -> None:
        self._topics = frozenset(topics)
        self._places = [TopicPartition(topic, partition) for topic in topics]
        self._decoder = decoder
        self._clock = clock
        self._held: dict[TopicPartition, deque[Any]] = {place: deque() for place in self._places}
        self._starts: Mapping[TopicPartition, int] = {}
        self._ends: Mapping[TopicPartition, int] = {}
        self._consumer = committed_reader(options)

    async def open(self) -> None:
        """Raises BrokerUnavailable, TopicMissing."""
        await broker_call("read events", self._consumer.start())
        self._starts = await broker_call("first events", self._consumer.beginning_offsets(self._places))
        self._ends = await broker_call("last events", self._consumer.end_offsets(self._places))
        self._consumer.assign(self._places)
        for place in self._places:
            self._consumer.seek(place, self._starts[place])

    async def close(self) -> None:
        await close_quietly("event reader", self._consumer.stop())

    async def between(self, before: Mapping[str, int], after: Mapping[str, int]) -> EventColumns | None:
        """The events from offset `before` up to `after` of each topic, as a cycle that polled them had them; None if
        some are not kept any more or of a topic that is not read here. A topic that is not in `before` begins at 0.
        Raises BrokerUnavailable."""
        runs: dict[int, list[Any]] = {}
        whole = all(after[topic] == before.get(topic, 0) for topic in after.keys() - self._topics)
        for number, place in enumerate(self._places):
            start, stop = before.get(place.topic, 0), after.get(place.topic, 0)
            whole &= start >= stop or (start >= self._starts[place] and stop <= self._ends[place])
            await self._fetch(place, min(stop, self._ends[place]))
            held, records = self._held[place], []
            while held and held[0].offset < stop:
                record = held.popleft()
                if record.offset >= start:
                    records.append(record)
            if records:
                runs[number] = records
        return self._decoder.records(*in_order(runs)).events if whole else None

    async def _fetch(self, place: TopicPartition, stop: int) -> None:
        """Until all before `stop` is held."""
        what = f"read {place.topic}[{place.partition}]"
        async for records, _ in polls_up_to(
            self._consumer, place, stop, what, self._clock, _POLL_MS, _RECORDS_PER_POLL
        ):
            self._held[place].extend(records)
