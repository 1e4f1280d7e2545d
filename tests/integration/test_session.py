"""What opening a partition finds, and leaves behind when it fails, with a real broker and a store on disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import structlog.testing
from node_support import Kafka
from waiting import until

from node.config import parse_config
from node.counts import NodeCounts
from node.cycle import CycleSettings, Engine
from node.ingest.decode import EventDecoder
from node.ingest.history import TopicHistory
from node.ingest.source import Source
from node.kernel.clock import SystemClock
from node.kernel.errors import StoreUnavailable, TopicMissing
from node.kernel.limits import SOURCE_TOPICS_LEFT_MAX
from node.kernel.types import FeatureRows, Frame, ModelName, ModelOutputs, ModelVersion, SequenceChunk, Triggers
from node.outbox import Outbox, Outgoing, OutputTopics
from node.outgoing import Origin
from node.session import PartitionSession, Parts, open_session
from node.state.flushing import FlushTurns
from node.state.folder import StateFolder
from node.state.rocksdb import RocksEnvironment, RocksStore
from node.waiting import Bound
from replication.changelog import Changelog
from replication.frame import encode_frame
from tenants.features import compile_plan

CONFIG = parse_config('[events]\ntypes = ["buy"]\n', Path.cwd())
CLOCK = SystemClock()
KNOWN, UNKNOWN = ModelName("ads", "bid"), ModelName("mail", "bid")


class Asked:
    """A model runner that answers nobody."""

    def __init__(self) -> None:
        self.calls: list[asyncio.Future[ModelOutputs]] = []

    def submit(self, version: ModelVersion, rows: FeatureRows) -> asyncio.Future[ModelOutputs]:
        self.calls.append(asyncio.get_running_loop().create_future())
        return self.calls[-1]

    def rows_queued_max(self, name: ModelName) -> int:
        return 100


def waiting(name: ModelName) -> SequenceChunk:
    zeros = np.zeros(2, np.int64)
    rows = FeatureRows(("x",), np.zeros((2, 1)))
    return SequenceChunk(0, Triggers(name, "a" * 64, ("c0", "c1"), zeros, np.arange(2), zeros, zeros, rows), 0)


def opened(folder: Path) -> set[str]:
    """What this process has open: sockets, each with a number of its own, and files in the folder."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return {leads_to for leads_to in found if leads_to.startswith(("socket:", str(folder)))}


class Partition:
    """What opening it takes, and what was open when the model of a waiting trigger was asked for."""

    def __init__(self, kafka: str, topic_names: Callable[[str], str], folder: Path) -> None:
        self.options = {"bootstrap_servers": kafka}
        self.source = topic_names("source")
        self.topics = OutputTopics(*(topic_names(kind) for kind in ("inferences", "changelog", "letters")))
        for topic in (self.source, self.topics.inferences, self.topics.changelog, self.topics.dead_letters):
            Kafka(kafka).create(topic)
        self.folder, environment = folder, RocksEnvironment.of()
        self.state = StateFolder(0, folder / "0", lambda path: RocksStore(path, environment))
        self.runner = Asked()
        self.during: set[str] = set()

    def outbox(self) -> Outbox:
        return Outbox(self.options, self.topics, self.source, 0, "required", "none", encode_frame, CLOCK)

    def versions(self, name: ModelName, sha256: str) -> ModelVersion:
        if name == KNOWN:
            return ModelVersion(name, sha256, "b" * 64, ("buy",), ("x",), ("score",), "predict", 0, 1000)
        self.during = opened(self.folder)
        raise StoreUnavailable("models are still being tried")

    async def open(self) -> PartitionSession:
        names = (self.source,)
        decoder, plan = EventDecoder(CONFIG.events), compile_plan([], CONFIG.schema())
        parts = Parts(
            state=self.state,
            outbox=self.outbox,
            source=lambda: Source(self.options, names, 0, 1 << 20, "earliest", "wait", CLOCK),
            changelog=lambda: Changelog(self.options, self.topics.changelog, 0, CLOCK),
            history=lambda: TopicHistory(self.options, names, 0, decoder, CLOCK),
            versions=self.versions,
            bound=lambda _: Bound(100),
            cache_bytes=1 << 20,
            flushes=FlushTurns(1.0),
        )
        engine = Engine(decoder, lambda: plan, self.runner, CycleSettings(1, 1, 0.0))
        return await open_session(parts, engine, Origin("node", names, 0, CONFIG.schema()), NodeCounts(CLOCK), CLOCK)


@pytest.fixture
async def partition(kafka: str, topic_names: Callable[[str], str], tmp_path: Path) -> Partition:
    return await asyncio.to_thread(Partition, kafka, topic_names, tmp_path)


async def test_what_was_opened_is_closed_when_waiting_triggers_have_models_not_known_yet(partition: Partition) -> None:
    before = opened(partition.folder)
    outbox = partition.outbox()
    await outbox.open()
    appended = [waiting(KNOWN), waiting(UNKNOWN)]
    await outbox.send(Outgoing(Frame({partition.source: 0}, 0, [], np.zeros((0, 1)), appended=appended)))
    await outbox.close()
    await until(lambda: not opened(partition.folder) - before)

    with pytest.raises(StoreUnavailable, match="still being tried"):
        await partition.open()
    kinds = {leads_to.startswith("socket:") for leads_to in partition.during - before}
    assert kinds == {True, False}, "the clients' sockets and the store's files"
    await until(lambda: not opened(partition.folder) - before)
    (asked,) = partition.runner.calls
    assert asked.cancelled()


async def test_what_was_opened_is_closed_when_a_source_topic_is_not_there(partition: Partition) -> None:
    """Found while the changelog's reader is connected and has not read yet."""
    before = opened(partition.folder)
    partition.source += "-not-there"
    with pytest.raises(TopicMissing):
        await partition.open()
    await until(lambda: not opened(partition.folder) - before)


async def test_progress_of_topics_out_of_the_config_is_kept_apart_within_a_bound(partition: Partition) -> None:
    """Of too many, what left first is forgotten, and the log says so."""
    left = {f"left{number}": number for number in range(SOURCE_TOPICS_LEFT_MAX + 2)}
    store = await partition.state.open()
    store.apply(Frame({**left, partition.source: 0}, 0, [], np.zeros((0, 1))), 1)
    with structlog.testing.capture_logs() as told:
        session = await partition.open()
    assert session.state.progress == {partition.source: 0}
    assert list(session.state.progress_left.items()) == list(left.items())[2:]
    assert [line["topics"] for line in told if "topics" in line] == [["left0", "left1"]]
    await session.close()
