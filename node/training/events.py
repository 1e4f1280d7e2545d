"""Reading a partition's events again, commit by commit, as the frames say which were whose."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from aiokafka import AIOKafkaConsumer, TopicPartition

from node.ingest.decode import EventDecoder
from node.ingest.source import in_order
from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.clock import Clock
from node.kernel.errors import BrokerUnavailable
from node.kernel.limits import BROKER_CALL_MS_MAX, MIB
from node.kernel.types import EventColumns

_POLL_MS: Final = 200
_RECORDS_PER_POLL: Final = 4096


class EventReader:
    """Of one partition of every source topic, forwards."""

    def __init__(
        self, options: ClientOptions, topics: Sequence[str], partition: int, decoder: EventDecoder, clock: Clock
    ) -> None:
        self._places = [TopicPartition(topic, partition) for topic in topics]
        self._decoder = decoder
        self._clock = clock
        self._held: dict[TopicPartition, deque[Any]] = {place: deque() for place in self._places}
        self._starts: Mapping[TopicPartition, int] = {}
        self._ends: Mapping[TopicPartition, int] = {}
        self._consumer = AIOKafkaConsumer(
            **options,
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="none",
            fetch_max_bytes=32 * MIB,
            max_partition_fetch_bytes=8 * MIB,
        )

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
        some are not kept any more. A topic that is not in `before` begins at 0. Raises BrokerUnavailable."""
        runs: dict[int, list[Any]] = {}
        whole = True
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
        return self._decoded(runs) if whole else None

    async def _fetch(self, place: TopicPartition, stop: int) -> None:
        """Until all before `stop` is held."""
        what, heard = f"read {place.topic}[{place.partition}]", self._clock.monotonic()
        position = await broker_call(what, self._consumer.position(place))
        while position < stop:
            call = self._consumer.getmany(place, timeout_ms=_POLL_MS, max_records=_RECORDS_PER_POLL)
            for records in (await broker_call(what, call)).values():
                self._held[place].extend(records)
            reached = await broker_call(what, self._consumer.position(place))
            if reached > position:
                position, heard = reached, self._clock.monotonic()
            elif self._clock.monotonic() - heard > BROKER_CALL_MS_MAX / 1000:
                raise BrokerUnavailable(f"{what}: nothing came for {BROKER_CALL_MS_MAX} ms, {stop - position} to go")

    def _decoded(self, runs: dict[int, list[Any]]) -> EventColumns:
        records, topics = in_order(runs)
        count = len(records)
        return self._decoder.decode(
            [record.value for record in records],
            np.fromiter([record.timestamp for record in records], np.int64, count),
            np.fromiter(topics, np.int64, count),
            np.fromiter([record.offset for record in records], np.int64, count),
        ).events
