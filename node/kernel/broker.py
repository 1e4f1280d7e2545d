"""How every call of the Kafka client is made: bounded in time, its failures told in our own errors.

The client hangs or answers with odd exceptions when a broker is gone (a bare AssertionError after fencing,
CancelledError from stop), so nothing calls it without this.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

import structlog
from aiokafka import errors as kafka_errors

from node.kernel.errors import BrokerUnavailable, Fenced, ProgressLost, TopicMissing
from node.kernel.limits import BROKER_CALL_MS_MAX

log = structlog.get_logger(__name__)

Result = TypeVar("Result")
ClientOptions = Mapping[str, Any]
"""What every client of one cluster is made with: bootstrap servers and security."""

_FENCED = (kafka_errors.ProducerFenced, kafka_errors.InvalidProducerEpoch)


async def broker_call(what: str, call: Awaitable[Result], wait_ms_max: int = BROKER_CALL_MS_MAX) -> Result:
    """Await `call` for at most `wait_ms_max`.

    Raises Fenced, TopicMissing, ProgressLost or BrokerUnavailable; `what` names the call in the message.
    A cancelled inner task of the client surfaces as CancelledError although nobody cancelled us; ours is told
    apart by the task's own count of cancel requests.
    """
    try:
        async with asyncio.timeout(wait_ms_max / 1000):
            return await call
    except asyncio.CancelledError as failure:
        if _cancelled():
            raise
        raise BrokerUnavailable(f"{what}: the Kafka client gave the call up") from failure
    except TimeoutError as failure:
        raise BrokerUnavailable(f"{what}: Kafka did not answer within {wait_ms_max} ms") from failure
    except _FENCED as failure:
        raise Fenced(
            f"{what}: another producer took the partition over ({type(failure).__name__}); if two nodes run the same "
            "[kafka] application, stop one or give each its own partitions"
        ) from failure
    except kafka_errors.UnknownTopicOrPartitionError as failure:
        raise TopicMissing(f"{what}: the topic or partition does not exist") from failure
    except kafka_errors.OffsetOutOfRangeError as failure:
        raise ProgressLost(f"{what}: {failure}") from failure
    except (kafka_errors.KafkaError, kafka_errors.IllegalOperation, OSError, AssertionError) as failure:
        raise BrokerUnavailable(f"{what}: {type(failure).__name__}: {failure}") from failure


async def close_quietly(what: str, call: Awaitable[Any], wait_ms_max: int = 2_000) -> None:
    """Stop a client that is given up; a failure is logged, since there is nobody left to handle it.

    In a task of its own: the client awaits tasks that it has cancelled and drops what that raises, so it would also
    drop a cancellation of ours, and a caller that is cancelled meanwhile would go on for ever.
    """
    closing = asyncio.ensure_future(call)
    _closing.add(closing)
    closing.add_done_callback(lambda closed: _closed(what, closed))
    done, _ = await asyncio.wait({closing}, timeout=wait_ms_max / 1000)
    if not done:
        closing.cancel()


_closing: set[asyncio.Future[Any]] = set()
"""The loop itself does not keep tasks alive."""


def _closed(what: str, closed: asyncio.Future[Any]) -> None:
    _closing.discard(closed)
    if closed.cancelled():
        log.debug("client stopped with a cancelled task", what=what)
    elif closed.exception() is not None:  # the client raises whatever its inner tasks raised
        log.debug("client did not stop cleanly", what=what, error=repr(closed.exception()))


def _cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
