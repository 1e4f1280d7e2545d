"""The topics a node needs: looked up, made where it may, and watched for added partitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import structlog
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic

from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.errors import BrokerUnavailable, TopicMissing

log = structlog.get_logger(__name__)

TopicSettings = Mapping[str, str]


class Topics:
    """Asks and changes the broker's topics; one short-lived admin client a call."""

    def __init__(self, options: ClientOptions, replication_factor: int, may_create: bool) -> None:
        self._options = options
        self._replication_factor = replication_factor
        self._may_create = may_create

    async def partitions(self, names: Iterable[str]) -> dict[str, int]:
        """Topic -> number of partitions, 0 where the topic does not exist."""
        wanted = sorted(set(names))
        client = AIOKafkaAdminClient(**self._options)
        try:
            await broker_call("connect to Kafka", client.start())
            # Asking for topics by name may create them; asking for all never does.
            found = await broker_call("list topics", client.describe_topics(None))
        finally:
            await close_quietly("admin client", client.close())
        counts = {entry["topic"]: len(entry["partitions"]) for entry in found if not entry["error_code"]}
        return {name: counts.get(name, 0) for name in wanted}

    async def source_partitions(self, names: Sequence[str]) -> int:
        """The number of partitions all source topics share. Raises TopicMissing if one is absent or differs."""
        counts = await self.partitions(names)
        missing = [name for name in names if not counts[name]]
        if missing:
            raise TopicMissing(
                f"source topic {', '.join(missing)} does not exist: create it, the node goes on by itself"
            )
        if len(set(counts.values())) > 1:
            raise TopicMissing(f"source topics must have equally many partitions, they have {counts}: add partitions")
        return counts[names[0]]

    async def ensure(self, partitions: int, settings: Mapping[str, TopicSettings]) -> None:
        """Make every topic of `settings` exist with at least `partitions`. Raises TopicMissing when it may not."""
        counts = await self.partitions(settings)
        missing = [name for name, count in counts.items() if count == 0]
        short = [name for name, count in counts.items() if 0 < count < partitions]
        if not missing and not short:
            return
        if not self._may_create:
            raise TopicMissing(
                f"topics {', '.join(missing + short)} need {partitions} partitions: create them, or set [kafka] "
                "create_topics = true"
            )
        client = AIOKafkaAdminClient(**self._options)
        try:
            await broker_call("connect to Kafka", client.start())
            await self._create(client, partitions, {name: settings[name] for name in missing})
            if short:
                grown = {name: NewPartitions(partitions) for name in short}
                await broker_call("add partitions", client.create_partitions(grown))
                log.info("partitions added", topics=short, partitions=partitions)
        finally:
            await close_quietly("admin client", client.close())

    async def _create(
        self, client: AIOKafkaAdminClient, partitions: int, settings: Mapping[str, TopicSettings]
    ) -> None:
        if not settings:
            return
        topics = [
            NewTopic(name, partitions, self._replication_factor, topic_configs=dict(options))
            for name, options in settings.items()
        ]
        response = await broker_call("create topics", client.create_topics(topics))
        already_exists = 36
        for name, code, *rest in response.topic_errors:
            if code not in (0, already_exists):
                raise BrokerUnavailable(f"topic {name} could not be created: Kafka error {code} {rest}")
        log.info("topics created", topics=sorted(settings), partitions=partitions)
