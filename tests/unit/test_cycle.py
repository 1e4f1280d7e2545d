"""What a cycle decides by itself: which plan it runs on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import structlog.testing

import node.backfilling
from node.backfilling import Backfilling
from node.backlog import Backlog
from node.commit import Committer
from node.config import Config, parse_config
from node.cycle import Cycle, CycleSettings, Engine, PartitionState
from node.ingest.decode import EventDecoder
from node.ingest.history import TopicHistory
from node.ingest.source import Source
from node.intervals import Intervals
from node.kernel.clock import Clock, ManualClock, SystemClock
from node.kernel.limits import (
    COUNTERS_FORMER_MAX,
    CYCLE_SLOTS_MAX,
    POLL_EVENTS_MAX,
    ROW_REDUCTION_MS_MIN,
    ROW_UNNEEDED_MS_MIN,
)
from node.kernel.ports import FeaturePlan
from node.kernel.supervise import Supervisor
from node.kernel.types import ModelName, ModelVersion, StagedVersion
from node.outbox import Outbox, OutputTopics
from node.outgoing import Origin
from node.room import room_problem
from node.state.cache import RowCache
from node.state.layout import Layout
from node.state.memory import MemoryStore
from node.steps import StepTimes
from node.waiting import Bound
from replication.frame import encode_frame
from tenants.agreement import TrialReport
from tenants.definitions import NOTHING_SHARED
from tenants.features import compile_plan
from tenants.fitting import Fitting
from tenants.manifest import Manifest, parse_manifest
from tenants.pool import ModelPool
from tenants.registry import PairSeen, Snapshot, TrialPassed, status
from tenants.sandbox import SandboxSettings
from tenants.staged_plan import StagedPlan, plan_of
from tenants.workers import WarmServer

CONFIG = parse_config('[events]\ntypes = ["buy"]\n[events.fields]\namount = "number"\n', Path.cwd())


def plan(windows: int) -> FeaturePlan:
    """Three windowed aggregates for each of `windows` days."""
    features = [
        f"{name}{day} = \"{name}(buy.amount, '{day}d')\""
        for day in range(1, windows + 1)
        for name in ("sum", "min", "max")
    ]
    return compile_plan([pair_of("a", features)], CONFIG.schema())


def pair_of(tenant: str, features: Sequence[str], blob: str = "0") -> tuple[ModelVersion, Manifest]:
    """Model m of the tenant."""
    return made_of(tenant, "\n".join(['on = ["buy"]', "[features]", *features]), blob)


def made_of(tenant: str, text: str, blob: str) -> tuple[ModelVersion, Manifest]:
    manifest = parse_manifest(f"{tenant}/m.toml", tenant, "m", text.encode(), CONFIG.schema())
    return manifest.version(blob * 64), manifest


def sums(first: int, last: int) -> list[str]:
    """The sum over each number of days."""
    return [f"sum{day} = \"sum(buy.amount, '{day}d')\"" for day in range(first, last + 1)]


V1, V2 = pair_of("a", sums(20, 199), "1"), pair_of("a", sums(200, 379), "2")
"""Rows have room for one of them, not for both."""
OTHER, OTHERS_NEXT = pair_of("b", sums(1, 1), "3"), pair_of("b", sums(2, 2), "4")


def staged_plan(
    *live: tuple[ModelVersion, Manifest], beside: Sequence[tuple[StagedVersion, Manifest]] = ()
) -> StagedPlan:
    return plan_of(live, beside, CONFIG.schema(), NOTHING_SHARED)


def layout_of(*live: tuple[ModelVersion, Manifest]) -> Layout:
    """Of rows that have grown for all of them."""
    parts = Parts()
    return parts.state.backfilling.grown(staged_plan(*live), Layout.empty())


class Parts:
    """A cycle whose clients are never opened."""

    def __init__(
        self, layout: Layout | None = None, config: Config = CONFIG, clock: Clock | None = None, events_max: int = 1
    ) -> None:
        clock, store = clock or SystemClock(), MemoryStore()
        self.newest = plan(1)
        steps = StepTimes(clock)

        async def fetch(sha256: str) -> bytes:
            raise AssertionError(sha256)

        pool = ModelPool(WarmServer(SandboxSettings(), clock), fetch, clock, Supervisor(), parallel=1)
        layout = layout or Layout.empty()
        cache = RowCache(store, layout, 1 << 20)
        origin = Origin("node", ("events",), 0, config.schema())
        backlog = Backlog(pool, store, lambda *_: None, lambda _: Bound(1), origin.names, clock)
        history = TopicHistory({}, ("events",), 0, EventDecoder(config.events), clock)
        backfilling = Backfilling(history, store.backfill(), clock, 0)
        intervals = Intervals(pool, store, clock, 0)
        self.state = PartitionState(layout, cache, backlog, intervals, backfilling, Counter(), {})
        topics = OutputTopics("inferences", "changelog", "letters")
        outbox = Outbox({}, topics, "test", 0, "off", "none", encode_frame, clock)
        source = Source({}, ("events",), 0, 1 << 20, "earliest", "wait", clock)
        self.unfit: list[tuple[ModelVersion, str]] = []
        decoder, settings = EventDecoder(config.events), CycleSettings(events_max, 1, 0.0)
        engine = Engine(
            decoder,
            lambda: self.newest,
            pool,
            settings,
            unfit=lambda version, reason: self.unfit.append((version, reason)),
        )
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


async def test_where_rows_are_wide_a_cycle_takes_fewer_events() -> None:
    parts = Parts(events_max=POLL_EVENTS_MAX)
    asked = []
    for windows in (1, 60, 100):
        parts.newest, parts.state.plan = plan(windows), None
        parts.cycle._plan()
        asked.append((parts.cycle._events_max * parts.state.layout.slots, parts.cycle._events_max))
    assert asked[0][1] == POLL_EVENTS_MAX
    assert all(CYCLE_SLOTS_MAX * 0.99 < slots <= CYCLE_SLOTS_MAX for slots, _ in asked[1:])


async def test_a_new_plan_adds_up_the_counters_of_models_that_are_in_none_any_more() -> None:
    parts = Parts()
    counters = parts.state.counters
    counters.update({f"inferences a/old{number}": 2 for number in range(COUNTERS_FORMER_MAX + 1)})
    counters["inferences a/m"] = 1
    parts.cycle._plan()
    assert counters == {"inferences a/m": 1, "inferences a/_other": 2 * (COUNTERS_FORMER_MAX + 1)}


async def test_without_a_plan_before_it_a_model_without_room_is_left_out_and_the_partition_says_so() -> None:
    parts = Parts()
    parts.newest = plan(110)
    assert parts.cycle._plan().models == ()
    assert "model a/m is not taken: a customer's row would need" in parts.state.refused
    assert "ROW_SLOTS_MAX" in parts.state.refused


async def test_an_update_that_rows_have_no_room_for_keeps_no_other_tenants_change_out() -> None:
    parts = Parts()
    parts.newest = staged_plan(V1, OTHER)
    assert parts.cycle._plan() is parts.newest
    slots = parts.state.layout.slots
    for newest in (staged_plan(V2, OTHERS_NEXT), staged_plan(V2, OTHERS_NEXT)):
        parts.newest = newest
        assert parts.cycle._plan().models == (V1[0], OTHERS_NEXT[0]), "the version before goes on"
        assert parts.state.refused.startswith("model a/m is not taken: ")
        assert parts.cycle._plan() is parts.cycle._plan()
    assert slots < parts.state.layout.slots < slots + 100, "of the other tenant's new window"
    parts.newest = staged_plan(V2, OTHER)
    assert parts.cycle._plan().models == (V1[0], OTHER[0])
    parts.newest = staged_plan(OTHER)
    assert parts.cycle._plan() is parts.newest
    assert parts.state.refused == ""


async def test_a_partition_opened_again_runs_the_models_that_its_rows_have_room_for() -> None:
    before = Parts()
    before.newest = staged_plan(V1, OTHER)
    before.cycle._plan()
    parts = Parts(before.state.layout)
    parts.newest = staged_plan(V2, OTHERS_NEXT).with_reserve([V1[1]], NOTHING_SHARED)
    with structlog.testing.capture_logs() as told:
        for _ in range(3):
            assert parts.cycle._plan().models == (OTHERS_NEXT[0],)
    assert "model a/m is not taken: " in parts.state.refused
    assert [line["event"] for line in told] == ["models not taken"]
    ((version, reason),) = parts.unfit
    assert version == V2[0]
    assert reason.startswith("in partition 0, a customer's row would need ")


async def test_slots_that_nothing_needs_are_taken_back_when_rows_have_no_room() -> None:
    before = Parts()
    before.newest = staged_plan(V1, OTHER)
    before.cycle._plan()
    parts = Parts(before.state.layout)
    parts.newest = staged_plan(V2, OTHER)
    assert parts.cycle._plan() is parts.newest, "nothing goes back to the version before any more"
    assert parts.state.refused == ""
    taken = parts.state.layout
    assert taken.locate(OTHER[1].aggregates[0]) is not None
    assert not any(taken.locate(aggregate) for aggregate in V1[1].aggregates)
    parts.state.cache.load(["customer"])


async def test_where_the_marks_of_a_session_model_are_taken_back_its_run_goes_with_them() -> None:
    parts = Parts(clock=ManualClock(10**12))
    visits = made_of("b", "session = '30m'\n[features]\nbuys = \"count(buy, session='30m')\"\n", "5")
    parts.newest = staged_plan(V1, visits)
    intervals, nothing = parts.state.intervals, EventDecoder(CONFIG.events).records([], []).events
    intervals.pump(parts.cycle._plan(), parts.state.layout)
    assert intervals.committing(nothing, Counter())[0].keys() == {"b/m"}
    parts.newest, parts.state.plan = staged_plan(V2), None
    parts.cycle._plan()
    assert parts.state.layout.marks == {}
    assert intervals.committing(nothing, Counter())[0] == {"b/m": None}


async def test_slots_are_not_taken_back_for_each_trial_but_for_what_is_to_run() -> None:
    clock = ManualClock(10**12)
    parts = Parts(clock=clock)

    def problem(pair: tuple[ModelVersion, Manifest], at: Parts = parts) -> str:
        now, fills = staged_plan(OTHER), at.state.backfilling
        return room_problem(staged_plan(pair), parts.state.layout, fills.previewed, fills.reduced_rarely, now)

    for newest in (V1, V2):
        assert problem(newest) == ""
        parts.newest, parts.state.plan = staged_plan(newest), None
        assert parts.cycle._plan() is parts.newest
    assert "ROW_SLOTS_MAX" in problem(V1), "a second time within ten minutes"
    assert problem(V1, Parts(clock=ManualClock())) == "", "by a clock that was set back"
    clock.advance(ROW_REDUCTION_MS_MIN)
    assert problem(V1) == ""
    parts.newest, parts.state.plan = staged_plan(V1), None
    assert parts.cycle._plan() is parts.newest
    parts.newest, parts.state.plan = staged_plan(V2), None
    assert parts.cycle._plan() is parts.newest, "what was tried on another node waits for nothing"


async def test_slots_that_nothing_has_needed_for_long_are_taken_back_though_there_is_room() -> None:
    clock = ManualClock(10**12)
    parts = Parts(layout_of(OTHER, V1), clock=clock)

    def held(pair: tuple[ModelVersion, Manifest]) -> bool:
        parts.cycle._plan()
        return parts.state.layout.locate(pair[1].aggregates[0]) is not None

    parts.newest = staged_plan(OTHER)
    assert held(V1)
    clock.advance(ROW_UNNEEDED_MS_MIN - 1)
    assert held(V1), "its model may come back"
    parts.newest = staged_plan(OTHER).with_reserve([V1[1]], NOTHING_SHARED)
    parts.cycle._plan()
    parts.newest = staged_plan(OTHER)
    for _ in range(2):
        assert held(V1), "it was needed a moment ago"
        clock.advance(ROW_UNNEEDED_MS_MIN - 1)
    assert held(V1)
    slots = parts.state.layout.slots
    clock.advance(2)
    assert not held(V1)
    assert held(OTHER)
    assert parts.state.layout.slots < slots / 10
    parts.state.cache.load(["customer"])


async def test_a_few_slots_that_nothing_needs_stay_until_their_room_is_needed() -> None:
    clock = ManualClock(10**12)
    parts = Parts(layout_of(V1, OTHER), clock=clock)
    parts.newest = staged_plan(V1)
    for _ in range(3):
        parts.cycle._plan()
        assert parts.state.layout.locate(OTHER[1].aggregates[0]) is not None
        clock.advance(ROW_UNNEEDED_MS_MIN)


async def test_slots_are_not_taken_back_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.backfilling, "ROW_REDUCTIONS_MAX", 1)
    parts = Parts()
    for newest, fits in ((V1, True), (V2, True), (V1, False)):
        parts.newest, parts.state.plan = staged_plan(newest), None
        assert (parts.cycle._plan() is parts.newest) == fits


async def test_what_only_the_plan_before_would_fall_back_to_goes_for_what_is_to_run() -> None:
    parts = Parts()
    parts.newest = staged_plan(OTHER).with_reserve([V1[1]], NOTHING_SHARED)
    parts.state.layout = parts.state.backfilling.grown(staged_plan(V1, OTHER), parts.state.layout)
    parts.cycle._plan()
    parts.newest = staged_plan(V2, OTHER)
    assert parts.cycle._plan() is parts.newest


async def test_what_runs_already_has_room_before_what_is_new_whatever_its_name() -> None:
    parts = Parts()
    parts.newest = staged_plan(V1, OTHER)
    parts.cycle._plan()
    first = pair_of("0", sums(200, 379))
    parts.newest = staged_plan(first, V1, OTHER)
    assert parts.cycle._plan().models == (V1[0], OTHER[0])


async def test_a_staged_version_without_room_is_left_out_and_its_model_goes_on() -> None:
    parts = Parts()
    canary = StagedVersion(V2[0], "canary", 0.5)
    parts.newest = staged_plan(V1, OTHER, beside=[(canary, V2[1])])
    plan = parts.cycle._plan()
    assert (plan.models, plan.staged) == ((V1[0], OTHER[0]), {})
    assert f"model {canary.key} is not taken: " in parts.state.refused
    assert [version for version, _ in parts.unfit] == [V2[0]]


async def test_no_staged_version_runs_beside_a_model_that_has_no_room() -> None:
    before = Parts()
    before.newest = staged_plan(V1)
    before.cycle._plan()
    parts = Parts(before.state.layout)
    parts.newest = staged_plan(V2, OTHER, beside=[(StagedVersion(V1[0], "shadow"), V1[1])])
    plan = parts.cycle._plan()
    assert (plan.models, plan.staged) == ((OTHER[0],), {})


async def test_a_partition_tells_whether_it_has_room_for_a_candidate() -> None:
    parts = Parts()
    parts.newest = staged_plan(V1, OTHER)
    parts.cycle._plan()
    layout, fills = parts.state.layout, parts.state.backfilling

    def problem(pair: tuple[ModelVersion, Manifest], now: FeaturePlan) -> str:
        return room_problem(staged_plan(pair), layout, fills.previewed, fills.reduced_rarely, now)

    now = parts.newest
    assert "ROW_SLOTS_MAX" in problem(V2, now)
    assert problem(OTHERS_NEXT, now) == problem(V1, now) == ""
    assert "ROW_SLOTS_MAX" in problem(V2, staged_plan(OTHER).with_reserve([V1[1]], NOTHING_SHARED))
    assert problem(V2, staged_plan(OTHER)) == "", "once its model is gone its slots are taken back"
    assert parts.state.layout is layout


def test_a_candidate_that_an_open_partition_has_no_room_for_is_refused() -> None:
    asked: list[FeaturePlan] = []

    def no_room(plan: FeaturePlan) -> str:
        asked.append(plan)
        return "in partition 3, the rows are full" if ModelName("a", "m") in {one.name for one in plan.models} else ""

    fitting, snapshot = Fitting(CONFIG.schema(), lambda plan: "", no_room), Snapshot()
    report = TrialReport(300e-6, 1e-6, 1000, "LogisticRegression", ())
    states = {}
    for name, (_, manifest) in ((ModelName("b", "m"), OTHER), (ModelName("a", "m"), V2)):
        snapshot, _ = fitting.next(snapshot, PairSeen(name, manifest.text, "5" * 64, 1))
        newest = snapshot.models[name].newest
        assert newest is not None
        snapshot, _ = fitting.next(snapshot, TrialPassed(name, newest.version, report, 2))
        states[name.tenant] = status(snapshot, name)["state"]
    assert states == {"b": "live", "a": "refused"}
    assert "in partition 3, the rows are full" in str(status(snapshot, ModelName("a", "m")))
    assert [[version.name.tenant for version in plan.models] for plan in asked] == [["b"], ["a"]]
