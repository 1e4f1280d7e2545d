"""Models that use each other's outputs run after one another within a micro-batch, and say which output they had."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from node.backlog import Backlog, Settled
from node.inferences import encode_inferences
from node.kernel.chunks import decode_chunk, encode_chunk
from node.kernel.clock import ManualClock
from node.kernel.tables import NO_TABLES
from node.kernel.types import (
    Aggregate,
    EventColumns,
    EventNames,
    EventSchema,
    FeatureRows,
    ModelName,
    ModelOutputs,
    ModelVersion,
    SequenceChunk,
    StagedVersion,
    StageKind,
    StoredOutput,
)
from node.ordering import Ordering
from node.staging import divided, of_canary
from node.state.memory import MemoryStore
from node.triggers import Outcome, run_triggers
from node.waiting import Bound
from tenants.definitions import NOTHING_SHARED
from tenants.features import CompiledFeatures, compile_plan
from tenants.manifest import parse_manifest
from tenants.staged_plan import StagedPlan
from tenants.staged_plan import plan_of as staged_plan_of

SCHEMA = EventSchema(("buy", "view"), {"amount": "number"})
EVENTS = EventNames.of(["events"], SCHEMA.types)
A, B, C = ModelName("t", "a"), ModelName("t", "b"), ModelName("t", "c")
STORED, COUNT = -1.0, 5


class Runner:
    """Answers at once with the first feature plus one, but for the models named: never, or with errors on some rows."""

    def __init__(self, never: set[ModelName], errors: Mapping[ModelName, set[int]]) -> None:
        self.never, self.errors = never, errors
        self.begun: list[ModelName] = []

    def submit(self, version: ModelVersion, rows: FeatureRows) -> asyncio.Future[ModelOutputs]:
        future: asyncio.Future[ModelOutputs] = asyncio.get_running_loop().create_future()
        self.begun.append(version.name)
        failed = {row: "bad" for row in self.errors.get(version.name, ()) if row < len(rows)}
        if version.name not in self.never:
            future.get_loop().call_soon(future.set_result, ModelOutputs(rows.numbers[:, :1] + 1, failed))
        return future

    def rows_queued_max(self, name: ModelName) -> int:
        return 1000


class Reads:
    tables = NO_TABLES

    def aggregate(self, aggregate: Aggregate) -> np.ndarray:
        raise AssertionError(aggregate)

    def stored(self, output: StoredOutput) -> np.ndarray:
        return np.full(COUNT, STORED)


def plan_of(deadline: str = "10s", **features: str) -> CompiledFeatures:
    models = []
    for name, feature in features.items():
        text = f'on = ["buy"]\ndeadline = "{deadline}"\n[features]\nx = "{feature}"\n'
        manifest = parse_manifest("m.toml", "t", name, text.encode(), SCHEMA)
        models.append((manifest.version("ab" * 32), manifest))
    return compile_plan(models, SCHEMA)


def events() -> EventColumns:
    zeros, numbers = np.zeros(COUNT, np.int64), np.arange(COUNT)
    customers = [f"c{number}" for number in range(COUNT)]
    return EventColumns(zeros, numbers, numbers, customers, zeros, numbers, {"amount": np.arange(COUNT, dtype=float)})


def run(
    plan: CompiledFeatures, runner: Runner, masks: Mapping[ModelName, np.ndarray] | None = None, seconds: float = 5.0
) -> Outcome:
    versions = {version.name: version for version in plan.models}

    async def cycle() -> Outcome:
        selections = {name: np.ones(COUNT, np.bool_) for name in versions} if masks is None else masks
        ordering = Ordering(plan, events(), EVENTS, selections, Reads())
        bound = Bound(10_000)
        backlog = Backlog(runner, MemoryStore(), lambda name, _: versions[name], lambda _: bound, EVENTS, ManualClock())
        return await run_triggers(backlog, ordering.ready(), Settled(), seconds, ordering)

    return asyncio.run(cycle())


def test_each_takes_what_the_one_before_gave_for_the_same_event() -> None:
    plan = plan_of(c="models.t.b.score + 100", b="models.t.a.score + 10", a="event.amount")
    runner = Runner(set(), {})
    outcome = run(plan, runner)
    assert runner.begun == [A, B, C]
    found = {answer.version.name: answer for answer in outcome.answers}
    amounts = np.arange(COUNT)
    assert found[B].triggers.rows.numbers[:, 0].tolist() == (amounts + 1 + 10).tolist()
    assert found[C].triggers.rows.numbers[:, 0].tolist() == (amounts + 1 + 10 + 1 + 100).tolist()
    assert found[A].triggers.fresh is None
    assert found[B].triggers.inputs == ("models.t.a.score",)
    assert found[C].triggers.fresh is not None
    assert found[C].triggers.fresh.tolist() == [1] * COUNT
    record = encode_inferences(found[B].version, found[B].triggers, found[B].outputs, 0)[0][1]
    assert json.loads(record)["inputs"] == {"models.t.a.score": "fresh"}


def test_what_fails_or_is_of_another_event_is_the_stored_one_and_the_inference_says_so() -> None:
    plan = plan_of(a="event.amount", b="models.t.a.score")
    odd = np.arange(COUNT) % 2 == 1
    outcome = run(plan, Runner(set(), {A: {0}}), {A: odd, B: np.ones(COUNT, np.bool_)})
    answer = next(answer for answer in outcome.answers if answer.version.name == B)
    # Of A's two events, 1 and 3, the first failed.
    assert answer.triggers.rows.numbers[:, 0].tolist() == [STORED, STORED, STORED, 4.0, STORED]
    records = encode_inferences(answer.version, answer.triggers, answer.outputs, 0)
    told = [json.loads(value)["inputs"]["models.t.a.score"] for _, value in records]
    assert told == ["stored", "stored", "stored", "fresh", "stored"]
    again = decode_chunk(encode_chunk(SequenceChunk(0, answer.triggers))).triggers
    assert again.inputs == answer.triggers.inputs
    assert again.fresh is not None
    assert again.fresh.tolist() == [0, 0, 0, 1, 0]


def test_a_model_waits_for_another_within_its_own_deadline_only() -> None:
    plan = plan_of("50ms", a="event.amount", b="models.t.a.score", c="event.amount")
    runner = Runner({A}, {})
    # B may wait for 50 ms of a cycle's long time; the cycle itself waits for A to its end.
    outcome = run(plan, runner, seconds=0.3)
    answered = {answer.version.name: answer for answer in outcome.answers}
    assert set(answered) == {B, C}
    assert answered[B].triggers.rows.numbers[:, 0].tolist() == [STORED] * COUNT
    assert [chunk.triggers.name for chunk in outcome.appended] == [A]


def test_without_time_nothing_is_waited_for_and_nothing_is_lost() -> None:
    plan = plan_of(a="event.amount", b="models.t.a.score", c="models.t.b.score")
    runner = Runner({A, B}, {})
    outcome = run(plan, runner, seconds=0.0)
    named = [answer.version.name for answer in outcome.answers]
    named += [chunk.triggers.name for chunk in outcome.appended]
    assert sorted(named) == [A, B, C]


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.sets(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    st.one_of(st.just(set()), st.sets(st.integers(0, 5))),
)
def test_every_model_begins_once_and_after_those_it_uses(graph: list[set[int]], silent: set[int]) -> None:
    uses = {number: {used for used in below if used < number} for number, below in enumerate(graph)}
    features = {
        f"m{number}": " + ".join(["event.amount", *(f"models.t.m{used}.score" for used in sorted(uses[number]))])
        for number in reversed(uses)
    }
    runner = Runner({ModelName("t", f"m{number}") for number in silent}, {})
    outcome = run(plan_of(**features), runner, seconds=0.02 if silent else 5.0)
    assert sorted(name.model for name in runner.begun) == sorted(features)
    places = {name.model: place for place, name in enumerate(runner.begun)}
    for number, below in uses.items():
        assert silent or all(places[f"m{used}"] < places[f"m{number}"] for used in below)
    assert len(outcome.answers) + len(outcome.appended) == len(features)


# --- versions beside live ones --------------------------------------------------------------------------------------


class Shadows:
    def __init__(self) -> None:
        self.shown: list[tuple[StagedVersion, list[float], bool]] = []

    def follow(self, staged: StagedVersion, rows: FeatureRows, live: asyncio.Future[ModelOutputs] | None) -> None:
        self.shown.append((staged, rows.numbers[:, 0].tolist(), live is not None))


def beside(
    kind: StageKind, share: float = 0.0, slow: bool = False
) -> tuple[StagedPlan, StagedVersion, Outcome, Shadows]:
    """One cycle of model a with a staged version that doubles its feature, and of b, which uses the output of a."""
    models = []
    for name, feature in (("a", "event.amount"), ("b", "models.t.a.score"), ("a", "event.amount * 2")):
        text = f'on = ["buy"]\n[features]\nx = "{feature}"\n'
        manifest = parse_manifest("m.toml", "t", name, text.encode(), SCHEMA)
        models.append((manifest.version("ab" * 32), manifest))
    staged = StagedVersion(models[2][0], kind, share)
    plan = staged_plan_of(models[:2], [(staged, models[2][1])], SCHEMA, NOTHING_SHARED)
    versions = {version.name: version for version in plan.models}
    shadows, runner = Shadows(), Runner({A} if slow else set(), {})

    async def cycle() -> Outcome:
        selections = divided(plan, events(), {name: np.ones(COUNT, np.bool_) for name in versions})
        ordering = Ordering(plan, events(), EVENTS, selections, Reads())
        bound = Bound(2 if kind == "shadow" else 10_000)  # chunks are no larger
        backlog = Backlog(runner, MemoryStore(), lambda name, _: versions[name], lambda _: bound, EVENTS, ManualClock())
        return await run_triggers(backlog, ordering.ready(), Settled(), 0.2, ordering, shadows)

    return plan, staged, asyncio.run(cycle()), shadows


def rows_of(outcome: Outcome, version: str) -> dict[str, float]:
    found = [one.triggers for one in outcome.answers if one.triggers.version == version]
    return {
        customer: row
        for triggers in found
        for customer, row in zip(triggers.customers, triggers.rows.numbers[:, 0].tolist(), strict=True)
    }


def test_what_a_held_canary_would_answer_stays_with_the_live_version() -> None:
    plan, staged, _, _ = beside("canary", 0.5)
    every = np.ones(COUNT, np.bool_)
    found = divided(plan, events(), {A: every}, frozenset({staged.key}))
    assert found.keys() == {A}
    assert found[A].all()
    served = of_canary([f"c{number}" for number in range(COUNT)], A, 0.5)
    found = divided(plan, events(), {A: every}, frozenset({A}))
    assert found.keys() == {staged.key}
    assert found[staged.key].tolist() == served.tolist()


def test_a_canary_answers_its_customers_in_place_of_the_live_version() -> None:
    plan, staged, outcome, shadows = beside("canary", 0.5)
    customers = [f"c{number}" for number in range(COUNT)]
    served = of_canary(customers, A, 0.5)
    assert 0 < served.sum() < COUNT
    live = next(version for version in plan.models if version.name == A)
    amounts = dict(zip(customers, map(float, range(COUNT)), strict=True))
    expected = {one: 2 * amounts[one] for one, canary in zip(customers, served, strict=True) if canary}
    assert rows_of(outcome, staged.version.version) == expected
    assert rows_of(outcome, live.version).keys() == amounts.keys() - expected.keys()
    users = next(one.triggers for one in outcome.answers if one.triggers.name == B)
    fresh = [users.fresh[place] for place in range(len(users))] if users.fresh is not None else []
    assert [bool(bit) for bit in fresh] == [one not in expected for one in users.customers]
    assert shadows.shown == []


def test_a_canary_that_does_not_answer_waits_in_a_line_of_its_own() -> None:
    _, staged, outcome, _ = beside("canary", 0.5, slow=True)
    lines = {chunk.triggers.line_name for chunk in outcome.appended}
    assert lines == {"t/a", f"t/a@{staged.version.short_version}"}
    for chunk in outcome.appended:
        assert decode_chunk(encode_chunk(chunk)).triggers.line_name == chunk.triggers.line_name


def test_a_shadow_is_shown_every_row_of_the_live_version_and_adds_nothing() -> None:
    plan, staged, outcome, shadows = beside("shadow")
    live = next(version for version in plan.models if version.name == A)
    assert {one.triggers.version for one in outcome.answers if one.triggers.name == A} == {live.version}
    assert len(rows_of(outcome, live.version)) == COUNT
    assert [row for _, rows, _ in shadows.shown for row in rows] == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert all(asked for _, _, asked in shadows.shown)
    assert {one.version.version for one, _, _ in shadows.shown} == {staged.version.version}
    assert len(shadows.shown) == 3, "as the live version's rows were cut into pieces"
