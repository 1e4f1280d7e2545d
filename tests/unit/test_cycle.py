"""What a cycle decides by itself: which plan it runs on."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from node.backfilling import Backfilling
from node.backlog import Backlog
from node.commit import Committer
from node.config import parse_config
from node.cycle import Cycle, CycleSettings, Engine, PartitionState
from node.ingest.decode import EventDecoder
from node.ingest.history import TopicHistory
from node.ingest.source import Source
from node.intervals import Intervals
from node.kernel.clock import SystemClock
from node.kernel.errors import BoundExceeded
from node.kernel.ports import FeaturePlan
from node.kernel.supervise import Supervisor
from node.outbox import Outbox, OutputTopics
from node.outgoing import Origin
from node.state.cache import RowCache
from node.state.layout import Layout
from node.state.memory import MemoryStore
from node.steps import StepTimes
from node.waiting import Bound
from replication.frame import encode_frame
from tenants.features import compile_plan
from tenants.manifest import parse_manifest
from tenants.pool import ModelPool
from tenants.sandbox import SandboxSettings
from tenants.workers import WarmServer

CONFIG = parse_config('[events]\ntypes = ["buy"]\n[events.fields]\namount = "number"\n', Path.cwd())


def plan(windows: int) -> FeaturePlan:
    """Three windowed aggregates for each of `windows` days."""
    features = [
        f"{name}{day} = \"{name}(buy.amount, '{day}d')\""
        for day in range(1, windows + 1)
        for name in ("sum", "min", "max")
    ]
    text = "\n".join(['on = ["buy"]', "[features]", *features])
    manifest = parse_manifest("a/m.toml", "a", "m", text.encode(), CONFIG.schema())
    return compile_plan([(manifest.version("0" * 64), manifest)], CONFIG.schema())


class Parts:
    """A cycle whose clients are never opened."""

    def __init__(self) -> None:
        clock, store = SystemClock(), MemoryStore()
        self.newest = plan(1)
        steps = StepTimes(clock)

        async def fetch(sha256: str) -> bytes:
            raise AssertionError(sha256)

        pool = ModelPool(WarmServer(SandboxSettings(), clock), fetch, clock, Supervisor(), parallel=1)
        layout = Layout.empty()
        cache = RowCache(store, layout, 1 << 20)
        backlog = Backlog(pool, store, lambda *_: None, lambda _: Bound(1), clock)
        history = TopicHistory({}, ("events",), 0, EventDecoder(CONFIG.events), clock)
        backfilling = Backfilling(history, store.backfill(), clock, 0)
        intervals = Intervals(pool, store, clock, 0)
        self.state = PartitionState(layout, cache, backlog, intervals, backfilling, Counter(), {})
        topics = OutputTopics("inferences", "changelog", "letters")
        outbox = Outbox({}, topics, "test", 0, "off", "none", encode_frame, clock)
        source = Source({}, ("events",), 0, 1 << 20, "earliest", "wait", clock)
        engine = Engine(EventDecoder(CONFIG.events), lambda: self.newest, pool, CycleSettings(1, 1, 0.0))
        origin = Origin("node", ("events",), 0, CONFIG.schema())
        self.cycle = Cycle(engine, origin, source, Committer(outbox, store, cache, steps), self.state, steps, clock)


async def test_a_plan_whose_rows_would_be_too_long_leaves_the_one_before_in_force() -> None:
    parts = Parts()
    first = parts.newest
    assert parts.cycle._plan() is first
    slots = parts.state.layout.slots
    parts.newest = plan(110)
    assert parts.cycle._plan() is first
    assert "ROW_SLOTS_MAX" in parts.state.refused
    assert parts.state.layout.slots == slots
    parts.newest = plan(2)
    assert parts.cycle._plan() is parts.newest
    assert parts.state.refused == ""
    assert parts.state.layout.slots > slots


async def test_without_a_plan_before_it_the_partition_says_so() -> None:
    parts = Parts()
    parts.newest = plan(110)
    with pytest.raises(BoundExceeded, match="ROW_SLOTS_MAX"):
        parts.cycle._plan()
