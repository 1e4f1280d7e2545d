"""Reading the rows topic, whatever nodes do meanwhile: what was committed when the reading began, and no more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Final

from aiokafka import TopicPartition

from node.ingest.topics import Topics
from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.clock import Clock
from node.kernel.errors import TopicMissing
from node.kernel.reading import committed_reader, polls_up_to
from node.kernel.types import ModelName
from node.training.fed_rows import Described, FedRows, decode

_POLL_MS: Final = 200
_RECORDS_PER_POLL: Final = 256


class RowReader:
    """One consumer over a topic; use it as an async context."""

    def __init__(self, options: ClientOptions, topic: str, clock: Clock) -> None:
        self._options = options
        self._topic = topic
        self._clock = clock
        self._consumer = committed_reader(options, auto_offset_reset="earliest")

    async def __aenter__(self) -> RowReader:
        """Raises BrokerUnavailable."""
        try:
            await broker_call(f"open topic {self._topic}", self._consumer.start())
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        await close_quietly(f"reader of {self._topic}", self._consumer.stop())

    async def partitions(self) -> Sequence[int]:
        """Raises TopicMissing, BrokerUnavailable."""
        count = (await Topics(self._options, 1, may_create=False).partitions([self._topic]))[self._topic]
        if not count:
            raise TopicMissing(f"topic {self._topic} does not exist: no node of this application has run yet")
        return range(count)

    async def records(
        self, partition: int, model: ModelName, passed: Callable[[int, int], None] = lambda done, total: None
    ) -> AsyncIterator[FedRows | Described]:
        """The model's records of one partition, in order. `passed` hears of offsets: how many are done, of how many.

        Raises StateCorrupt, BrokerUnavailable.
        """
        at, what, key = TopicPartition(self._topic, partition), f"read {self._topic}[{partition}]", str(model).encode()
        start = (await broker_call(what, self._consumer.beginning_offsets([at])))[at]
        end = (await broker_call(what, self._consumer.end_offsets([at])))[at]
        self._consumer.assign([at])
        self._consumer.seek(at, start)
        async for records, reached in polls_up_to(
            self._consumer, at, end, what, self._clock, _POLL_MS, _RECORDS_PER_POLL
        ):
            for record in records:
                if record.key == key and record.offset < end:
                    yield decode(record.value or b"")
            passed(min(reached, end) - start, end - start)
