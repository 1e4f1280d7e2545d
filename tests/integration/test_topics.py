"""The topics a node needs, on a real broker: made as they must be, and refused where others made them otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from order_lines import until

from node.ingest.topics import KEPT_WHOLE, Topics
from node.kernel.errors import TopicMissing, TopicUnfit


@pytest.fixture
def topics_of(kafka: str) -> Callable[[bool], Topics]:
    return lambda may_create: Topics({"bootstrap_servers": kafka}, 1, may_create)


async def listed(topics: Topics, name: str) -> None:
    """A topic that was made a moment ago may not be told of yet."""

    async def found() -> int:
        return (await topics.partitions([name]))[name]

    await until(f"the broker lists {name}", found)


async def test_a_changelog_that_the_node_makes_is_one_that_it_takes(
    topics_of: Callable[[bool], Topics], topic_names: Callable[[str], str]
) -> None:
    name = topic_names("changelog")
    await topics_of(True).ensure(2, {name: KEPT_WHOLE})
    await listed(topics_of(False), name)
    await topics_of(False).ensure(2, {name: KEPT_WHOLE})
    with pytest.raises(TopicMissing, match="need 3 partitions"):
        await topics_of(False).ensure(3, {name: KEPT_WHOLE})


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"retention.ms": "604800000"}, "retention.ms=604800000"),
        ({"retention.ms": "-1", "retention.bytes": "1000000"}, "retention.bytes=1000000"),
        ({"retention.ms": "-1", "cleanup.policy": "compact"}, "cleanup.policy=compact"),
        ({"retention.ms": "-1", "cleanup.policy": "compact,delete"}, "cleanup.policy="),
    ],
)
async def test_a_changelog_that_would_lose_frames_is_refused_until_it_is_set_right(
    topics: Any, topics_of: Callable[[bool], Topics], kafka: str, settings: dict[str, str], fault: str
) -> None:
    name = await topics.create("changelog", settings=settings)
    await listed(topics_of(False), name)
    with pytest.raises(TopicUnfit, match=f"{name} has {fault}"):
        await topics_of(True).ensure(1, {name: KEPT_WHOLE})
    await topics_of(True).ensure(1, {name: {}})
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        await admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, name, dict(KEPT_WHOLE))])
    finally:
        await admin.close()
    await topics_of(True).ensure(1, {name: KEPT_WHOLE})
