"""Reading what is committed of a partition, up to an offset: a consumer made for it, and the one loop that does it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition

from node.kernel.broker import ClientOptions, broker_call
from node.kernel.clock import Clock
from node.kernel.errors import BrokerUnavailable
from node.kernel.limits import BROKER_CALL_MS_MAX, MIB


def committed_reader(options: ClientOptions, *, auto_offset_reset: str = "none", **settings: Any) -> AIOKafkaConsumer:
    """Not started yet. `settings` are further ones of the client."""
    return AIOKafkaConsumer(
        **options,
        enable_auto_commit=False,
        isolation_level="read_committed",
        auto_offset_reset=auto_offset_reset,
        fetch_max_bytes=32 * MIB,
        max_partition_fetch_bytes=8 * MIB,
        **settings,
    )


async def polls_up_to(
    consumer: AIOKafkaConsumer, at: TopicPartition, end: int, what: str, clock: Clock, poll_ms: int, records_max: int
) -> AsyncIterator[tuple[list[Any], int]]:
    """The records of each poll and the position after them, from where the consumer stands until that is `end`.

    The last poll may have records from `end` on; one over markers of transactions has none. Raises BrokerUnavailable,
    also when the position has not moved for BROKER_CALL_MS_MAX; TopicMissing, ProgressLost.
    """
    position, heard = await broker_call(what, consumer.position(at)), clock.monotonic()
    while position < end:
        polled = await broker_call(what, consumer.getmany(at, timeout_ms=poll_ms, max_records=records_max))
        reached = await broker_call(what, consumer.position(at))
        yield polled.get(at, []), reached
        if reached > position:
            position, heard = reached, clock.monotonic()
        elif clock.monotonic() - heard > BROKER_CALL_MS_MAX / 1000:
            raise BrokerUnavailable(f"{what}: nothing came for {BROKER_CALL_MS_MAX} ms, {end - position} to go")
