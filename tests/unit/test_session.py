"""What opening a partition leaves behind when it fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import structlog.testing
from test_backlog import NAMES, ManualRunner, triggers, version

from node.backlog import Versions
from node.config import parse_config
from node.cycle import CycleSettings, Engine
from node.ingest.decode import EventDecoder
from node.ingest.history import TopicHistory
from node.ingest.source import Source
from node.kernel.clock import ManualClock
from node.kernel.errors import StoreUnavailable
from node.kernel.limits import SOURCE_TOPICS_LEFT_MAX
from node.kernel.ports import StateStore
from node.kernel.types import Frame, ModelName, ModelVersion, SequenceChunk, Statistics
from node.outbox import Outbox, OutputTopics
from node.outgoing import Origin
from node.session import PartitionSession, Parts, open_session
from node.state.flushing import FlushTurns
from node.state.folder import StateFolder
from node.state.memory import MemoryStore
from node.steps import StepTimes
from node.waiting import Bound
from replication.frame import encode_frame
from tenants.features import compile_plan

CONFIG = parse_config('[events]\ntypes = ["buy"]\n', Path.cwd())
CLOCK = ManualClock()
TOPICS = ("events",)
OPEN: Counter[str] = Counter()
"""What is open, by its name; as many times."""


class CountedOutbox(Outbox):
    async def open(self) -> None:
        OPEN["outbox"] += 1

    async def close(self) -> None:
        OPEN["outbox"] -= 1


class CountedSource(Source):
    async def connect(self) -> None:
        OPEN["source"] += 1

    async def open(self, progress: Mapping[str, int]) -> None:
        pass

    async def close(self) -> None:
        OPEN["source"] -= 1


class NothingMissed:
    """A changelog whose frames the store has all seen."""

    async def connect(self) -> None:
        OPEN["changelog"] += 1

    async def fold_into(self, store: StateStore) -> NothingMissed:
        return self

    def statistics(self) -> Statistics:
        return {}

    async def close(self) -> None:
        OPEN["changelog"] -= 1


class CountedStore(MemoryStore):
    def close(self) -> None:
        OPEN["store"] -= 1


def parts_of(path: Path, store: CountedStore, versions: Versions) -> Parts:
    def opened(_: Path) -> MemoryStore:
        OPEN["store"] += 1
        return store

    topics, decoder = OutputTopics("inferences", "changelog", "letters"), EventDecoder(CONFIG.events)
    return Parts(
        state=StateFolder(0, path, opened),
        outbox=lambda: CountedOutbox({}, topics, "test", 0, "off", "none", encode_frame, CLOCK),
        source=lambda: CountedSource({}, TOPICS, 0, 1 << 20, "earliest", "wait", CLOCK),
        changelog=NothingMissed,
        history=lambda: TopicHistory({}, TOPICS, 0, decoder, CLOCK),
        versions=versions,
        bound=lambda _: Bound(100),
        cache_bytes=1 << 20,
        flushes=FlushTurns(1.0),
    )


async def opened(parts: Parts, runner: ManualRunner) -> PartitionSession:
    plan = compile_plan([], CONFIG.schema())
    engine = Engine(EventDecoder(CONFIG.events), lambda: plan, runner, CycleSettings(1, 1, 0.0))
    origin = Origin("node", TOPICS, 0, CONFIG.schema())
    return await open_session(parts, engine, origin, StepTimes(CLOCK), CLOCK)


async def test_what_was_opened_is_closed_when_waiting_triggers_have_models_not_known_yet(tmp_path: Path) -> None:
    store, runner = CountedStore(), ManualRunner()
    appended = [SequenceChunk(0, triggers(name, 0, 2), 0) for name in NAMES]
    store.apply(Frame({"events": 2}, 0, [], np.zeros((0, 1)), appended=appended), 1)

    def versions(name: ModelName, sha256: str) -> ModelVersion:
        if name == NAMES[1]:
            raise StoreUnavailable("models are still being tried")
        return version(name)

    with pytest.raises(StoreUnavailable):
        await opened(parts_of(tmp_path, store, versions), runner)
    assert OPEN.keys() == {"outbox", "source", "changelog", "store"}
    assert not any(OPEN.values())
    ((_, asked),) = runner.open
    assert asked.cancelled()


async def test_progress_of_topics_out_of_the_config_is_kept_apart_within_a_bound(tmp_path: Path) -> None:
    """Of too many, what left first is forgotten, and the log says so."""
    left = {f"left{number}": number for number in range(SOURCE_TOPICS_LEFT_MAX + 2)}
    store = CountedStore()
    store.apply(Frame({**left, "events": 2}, 0, [], np.zeros((0, 1))), 1)
    with structlog.testing.capture_logs() as told:
        session = await opened(parts_of(tmp_path, store, lambda *_: None), ManualRunner())
    assert session.state.progress == {"events": 2}
    assert list(session.state.progress_left.items()) == list(left.items())[2:]
    assert [line["topics"] for line in told if "topics" in line] == [["left0", "left1"]]
    await session.close()
