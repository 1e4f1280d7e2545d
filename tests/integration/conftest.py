"""What several files of integration tests start alike."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import pytest
from cluster_support import Cluster, running
from http_support import MemoryView, client_session, serving
from node_support import Kafka, Node

from node.serving.server import HttpServer


@pytest.fixture
def cluster(
    request: pytest.FixtureRequest, kafka: str, tmp_path: Path, topic_names: Callable[[str], str]
) -> Iterator[Cluster]:
    """Three ready nodes on a topic of as many PARTITIONS as the test's module says."""
    broker, partitions = Kafka(kafka), request.module.PARTITIONS
    topic = broker.create(topic_names("events"), partitions)
    with running(tmp_path, broker, topic, partitions, topic_names("cluster")) as made:
        yield made


@pytest.fixture
def node(
    request: pytest.FixtureRequest, kafka: str, tmp_path: Path, topic_names: Callable[[str], str]
) -> Iterator[Node]:
    """Not started yet, on a topic of as many PARTITIONS as the test's module says, or one."""
    broker, partitions = Kafka(kafka), getattr(request.module, "PARTITIONS", 1)
    made = Node(tmp_path, broker, [broker.create(topic_names("events"), partitions)], topic_names("node"))
    yield made
    made.kill()


@pytest.fixture
def view() -> MemoryView:
    return MemoryView()


@pytest.fixture
async def server(view: MemoryView) -> AsyncIterator[HttpServer]:
    async with serving(view) as server:
        yield server


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    async with client_session() as session:
        yield session
