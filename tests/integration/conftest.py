"""What several files of integration tests start alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_support import Cluster, running
from node_support import Kafka


@pytest.fixture
def cluster(
    request: pytest.FixtureRequest, kafka: str, tmp_path: Path, topic_names: Callable[[str], str]
) -> Iterator[Cluster]:
    """Three ready nodes on a topic of as many PARTITIONS as the test's module says."""
    broker, partitions = Kafka(kafka), request.module.PARTITIONS
    topic = broker.create(topic_names("events"), partitions)
    with running(tmp_path, broker, topic, partitions, topic_names("cluster")) as made:
        yield made
