"""Produces the events, each household's in order, no faster than asked or than the models answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

import numpy as np
import orjson
from aiokafka import AIOKafkaProducer
from aiokafka.partitioner import murmur2

from demonstration.data import FIELDS_OF, TEXT_FIELDS, TYPES, Array, Events
from demonstration.processes import DemoError
from demonstration.settings import PARTITIONS
from node.batches import record_batches
from node.kernel.broker import broker_call

CHUNK_EVENTS = 8192
UNANSWERED_MAX = 49_152
"""Triggers sent and not yet answered: enough to keep the node busy, and less than its queues hold, so none is shed."""
CHUNKS_PER_SECOND = 20
"""With a rate, so that the stream flows instead of coming in jerks."""
_WHOLE = frozenset({"basket", "store", "product", "quantity", "lines", "coupon", "campaign"})


def encode(events: Events) -> list[tuple[bytes, bytes]]:
    """(key, JSON) of each event: its type, time, household and those fields that it has."""
    records: list[tuple[bytes, bytes]] = [(b"", b"")] * len(events)
    for kind, names in enumerate(FIELDS_OF):
        places = np.flatnonzero(events.kinds == kind)
        part = events.take(places)
        households = [str(household) for household in part.households.tolist()]
        columns = [_values(part, name) for name in names]
        heads = zip(places.tolist(), households, part.times_ms.tolist(), zip(*columns, strict=True), strict=True)
        for place, household, time_ms, values in heads:
            event = {"type": TYPES[kind], "time": time_ms, "household": household}
            event.update({name: value for name, value in zip(names, values, strict=True) if value is not None})
            records[place] = household.encode(), orjson.dumps(event)
    return records


def _values(events: Events, name: str) -> list[object]:
    if name in TEXT_FIELDS:
        texts: list[object] = events.text(name).tolist()
        return texts
    numbers = events.numbers[name]
    values: list[object] = (numbers.astype(np.int64) if name in _WHOLE else numbers.round(2)).tolist()
    return values


def partitions_of(households: Array) -> Array:
    """int64: the partition of each household, by Kafka's own hash of the key."""
    distinct, places = np.unique(households, return_inverse=True)
    hashes = [murmur2(str(household).encode()) & 0x7FFFFFFF for household in distinct.tolist()]
    return np.array(hashes, dtype=np.int64)[places] % PARTITIONS


class Stream:
    """Sends `events` to `topic`, which nobody else writes to: event i has offset `offsets[i]` in `partitions[i]`."""

    def __init__(
        self, producer: AIOKafkaProducer, topic: str, events: Events, triggers: Array, rate: float | None
    ) -> None:
        """`triggers` int64 [events]: how many answers each event asks for."""
        self._producer = producer
        self._topic = topic
        self._events = events
        self._rate = rate
        self.partitions = partitions_of(events.households)
        self.places = [np.flatnonzero(self.partitions == number) for number in range(PARTITIONS)]
        """Of each partition: position in `events` by offset."""
        self._sent = [0] * PARTITIONS
        self.produced = 0
        self._asked = np.concatenate([[0], np.cumsum(triggers)])
        self._answered = 0
        self._told = asyncio.Event()
        self.started: float | None = None

    @property
    def expected(self) -> int:
        """Answers to all events, produced or not."""
        return int(self._asked[-1])

    def tell_answered(self, triggers: int) -> None:
        """How many were so far."""
        self._answered = triggers
        self._told.set()

    async def run(self) -> None:
        """Send all. Raises DemoError, BrokerUnavailable."""
        self.started = time.monotonic()
        size = CHUNK_EVENTS
        if self._rate is not None:
            size = max(1, min(size, int(self._rate / CHUNKS_PER_SECOND)))
        for start in range(0, len(self._events), size):
            await self._wait_for_room()
            await self._wait_for_rate()
            await self._send(slice(start, min(start + size, len(self._events))))

    async def _wait_for_room(self) -> None:
        while self._asked[self.produced] - self._answered > UNANSWERED_MAX:
            self._told.clear()
            await self._told.wait()

    async def _wait_for_rate(self) -> None:
        if self._rate is not None and self.started is not None:
            due = self.started + self.produced / self._rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _send(self, part: slice) -> None:
        records = encode(self._events.take(part))
        numbers = self.partitions[part]
        deliveries = []
        for number in np.unique(numbers).tolist():
            chosen = np.flatnonzero(numbers == number).tolist()
            deliveries.append(self._send_partition(number, [records[place] for place in chosen]))
        await asyncio.gather(*deliveries)
        self.produced += part.stop - part.start

    async def _send_partition(self, number: int, records: Sequence[tuple[bytes, bytes]]) -> None:
        what = f"send to {self._topic}[{number}]"
        for batch in record_batches(_without_headers(records), "lz4", transactional=False):
            sending = self._producer.send_batch(batch, self._topic, partition=number)
            delivered = await broker_call(what, await broker_call(what, sending))
            if delivered.offset != self._sent[number]:
                raise DemoError(
                    f"{what}: offset {delivered.offset} instead of {self._sent[number]}: a record was doubled, or "
                    "somebody else writes to the demo's topic; run the demo again"
                )
            self._sent[number] += batch.record_count()


def _without_headers(records: Sequence[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes, list[tuple[str, bytes]]]]:
    for key, value in records:
        yield key, value, []
