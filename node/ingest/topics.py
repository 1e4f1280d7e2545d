"""The topics a node needs: looked up, made where it may, and watched for added partitions."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, Final

import structlog
from aiokafka import errors as kafka_errors
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.errors import BrokerUnavailable, TopicMissing, TopicUnfit

log = structlog.get_logger(__name__)

TopicSettings = Mapping[str, str]
KEPT_WHOLE: Final[TopicSettings] = {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}
"""Of a changelog: nobody but the node deletes from it, behind snapshots that enough nodes have."""


class Topics:
    """Asks and changes the broker's topics; one short-lived admin client a call."""

    def __init__(self, options: ClientOptions, replication_factor: int, may_create: bool) -> None:
        self._options = options
        self._replication_factor = replication_factor
        self._may_create = may_create

    @contextlib.asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        client = AIOKafkaAdminClient(**self._options)
        try:
            await broker_call("connect to Kafka", client.start())
            yield client
        finally:
            await close_quietly("admin client", client.close())

    async def partitions(self, names: Iterable[str]) -> dict[str, int]:
        """Topic -> number of partitions, 0 where the topic does not exist."""
        wanted = sorted(set(names))
        async with self._admin() as client:
            # Asking for topics by name may create them; asking for all never does.
            found = await broker_call("list topics", client.describe_topics(None))
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
        """Make every topic of `settings` exist with at least `partitions`. Raises TopicMissing when it may not, and
        TopicUnfit when one that is to be KEPT_WHOLE exists and would not be."""
        counts = await self.partitions(settings)
        await self._check([name for name, wanted in settings.items() if counts[name] and wanted == KEPT_WHOLE])
        missing = [name for name, count in counts.items() if count == 0]
        short = [name for name, count in counts.items() if 0 < count < partitions]
        if not missing and not short:
            return
        if not self._may_create:
            raise TopicMissing(
                f"topics {', '.join(missing + short)} need {partitions} partitions: create them, or set [kafka] "
                "create_topics = true"
            )
        async with self._admin() as client:
            await self._create(client, partitions, {name: settings[name] for name in missing})
            if short:
                grown = {name: NewPartitions(partitions) for name in short}
                await broker_call("add partitions", client.create_partitions(grown))
                log.info("partitions added", topics=short, partitions=partitions)

    async def _check(self, names: Sequence[str]) -> None:
        """Raises TopicUnfit. A broker that does not tell its topics' settings is taken at its word."""
        if not names:
            return
        wanted = [ConfigResource(ConfigResourceType.TOPIC, name, dict(KEPT_WHOLE)) for name in names]
        async with self._admin() as client:
            answers = await broker_call("read topic settings", _told(client, wanted))
        faults = []
        for code, reason, _, name, entries in (topic for answer in answers for topic in answer.resources):
            if code:
                log.debug("topic settings not told", topic=name, error=code, reason=reason)
                continue
            differing = lossy({entry[0]: entry[1] for entry in entries})
            if differing:
                faults.append(f"{name} has {', '.join(f'{key}={value}' for key, value in differing.items())}")
        if faults:
            right = ",".join(f"{key}={value}" for key, value in KEPT_WHOLE.items())
            raise TopicUnfit(
                f"the broker would delete frames that state is rebuilt from: {'; '.join(faults)}. Set {right} (kafka-"
                "configs --alter --entity-type topics --add-config), the node goes on by itself"
            )

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


def lossy(settings: TopicSettings) -> dict[str, str]:
    """Those of a topic's settings that would have it lose records which it is to keep whole."""
    return {key: settings[key] for key, value in KEPT_WHOLE.items() if settings.get(key, value) != value}


async def _told(client: AIOKafkaAdminClient, wanted: Sequence[ConfigResource]) -> Sequence[Any]:
    try:
        answers: Sequence[Any] = await client.describe_configs(list(wanted))
        return answers
    except kafka_errors.IncompatibleBrokerVersion:
        return ()
