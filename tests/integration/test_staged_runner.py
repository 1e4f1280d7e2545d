"""Shadows and canaries on real workers: what nobody waits for, within bounds, and what is kept of it."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path

import joblib
import numpy as np
import pytest
import pytest_asyncio
from sklearn.linear_model import LinearRegression
from waiting import until

from node.kernel.clock import SystemClock
from node.kernel.limits import SHADOW_ROWS_MAX
from node.kernel.supervise import Supervisor
from node.kernel.types import EventSchema, FeatureRows, ModelName, ModelOutputs, StagedVersion
from tenants.agreement import TrialReport
from tenants.manifest import Manifest, parse_manifest
from tenants.pool import ModelPool
from tenants.registry import Entry, Live, Snapshot, Staged
from tenants.sandbox import SandboxSettings
from tenants.staged_runner import StagedRunner
from tenants.workers import WarmServer

SCHEMA = EventSchema(("transaction",), {"amount": "number"})
NAME = ModelName("shop", "spend")
REPORT = TrialReport(1e-4, 1e-6, 1000, "LinearRegression")
TEXT = 'on = ["transaction"]\nmethod = "predict"\n{}\n[features]\namount = "event.amount"\n'
ROWS = FeatureRows(("amount",), np.arange(8, dtype=float).reshape(-1, 1))


def model_file(weight: float) -> bytes:
    model = LinearRegression()
    model.coef_, model.intercept_, model.n_features_in_ = np.array([weight]), 0.0, 1
    stream = io.BytesIO()
    joblib.dump(model, stream)
    return stream.getvalue()


FILES = {"a" * 64: model_file(1.0), "b" * 64: model_file(1.5)}


def manifest(stage: str = "") -> Manifest:
    head = f"[rollout]\nstages = [{stage}]" if stage else ""
    return parse_manifest("spend.toml", *("shop", "spend"), TEXT.format(head).encode(), SCHEMA)


def running(stage: str) -> tuple[Snapshot, Live, Staged]:
    live_manifest, staged_manifest = manifest(), manifest(stage)
    live = Live(live_manifest, live_manifest.version("a" * 64), REPORT, 0)
    staged = Staged(staged_manifest, staged_manifest.version("b" * 64), REPORT, 0, 0, "tenant")
    return Snapshot(1, {NAME: Entry(NAME, live, staged=staged)}), live, staged


@pytest_asyncio.fixture
async def runner(tmp_path: Path) -> AsyncIterator[StagedRunner]:
    clock, supervisor = SystemClock(), Supervisor()
    server = WarmServer(SandboxSettings(required=frozenset()), clock)
    await server.start()

    async def fetch(sha256: str) -> bytes:
        return FILES[sha256]

    pool = ModelPool(server, fetch, clock, supervisor, parallel=1)
    yield StagedRunner(pool)
    await pool.stop()
    await server.stop()
    await supervisor.stop()


@pytest.mark.asyncio
async def test_a_shadow_is_called_after_the_live_version_and_compared(runner: StagedRunner) -> None:
    snapshot, live, staged = running('{ stage = "shadow" }')
    runner.observe(snapshot)
    answering = runner.submit(live.version, ROWS)
    runner.follow(staged.beside, ROWS, answering)
    runner.follow(staged.beside, ROWS, None)
    assert (await answering).values[:, 0].tolist() == list(range(8))
    await until(lambda: runner.figures()[staged.version.version].rows == 8)
    seen = runner.figures()[staged.version.version]
    assert (seen.compared, seen.agreed, seen.dropped, seen.errors) == (8, 1, 8, 0), "only 0 gives the same"
    assert seen.p99_ms > 0
    assert seen.live_p99_ms > 0
    assert seen.drift > 0


@pytest.mark.asyncio
async def test_shadows_that_are_not_answered_are_bounded_and_those_of_nobody_dropped(runner: StagedRunner) -> None:
    snapshot, _, staged = running('{ stage = "shadow" }')
    runner.observe(snapshot)
    never: asyncio.Future[ModelOutputs] = asyncio.get_running_loop().create_future()
    for _ in range(SHADOW_ROWS_MAX // len(ROWS) + 3):
        runner.follow(staged.beside, ROWS, never)
    seen = runner.figures()[staged.version.version]
    assert (seen.rows, seen.dropped) == (0, 3 * len(ROWS))
    never.cancel()
    await until(lambda: runner.figures()[staged.version.version].dropped == SHADOW_ROWS_MAX + 3 * len(ROWS))
    stranger = StagedVersion(manifest().version("c" * 64), "shadow")
    runner.follow(stranger, ROWS, None)
    assert runner.figures().keys() == {staged.version.version}
    runner.observe(Snapshot(2))
    assert runner.figures() == {}


@pytest.mark.asyncio
async def test_what_canary_and_live_version_give_is_kept_apart_and_begins_anew_with_a_stage(
    runner: StagedRunner,
) -> None:
    snapshot, live, staged = running('{ stage = "canary", share = 0.5 }, { stage = "canary", share = 0.9 }')
    runner.observe(snapshot)
    for version in (live.version, live.version, staged.version):
        await runner.submit(version, ROWS)
    await until(lambda: runner.figures()[staged.version.version].rows == 8)
    assert runner.figures()[staged.version.version].live_rows == 16
    onwards = Staged(staged.manifest, staged.version, REPORT, 1, 5, "auto")
    runner.observe(Snapshot(2, {NAME: Entry(NAME, live, staged=onwards)}))
    assert (runner.figures()[staged.version.version].stage, runner.figures()[staged.version.version].rows) == (1, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("onwards", [False, True], ids=["rolled back", "in its next stage"])
async def test_what_waits_for_a_shadow_that_is_over_is_not_run(runner: StagedRunner, onwards: bool) -> None:
    snapshot, live, staged = running('{ stage = "shadow" }, { stage = "canary", share = 0.5 }')
    runner.observe(snapshot)
    answering: asyncio.Future[ModelOutputs] = asyncio.get_running_loop().create_future()
    for _ in range(4):
        runner.follow(staged.beside, ROWS, answering)
    answering.set_result(ModelOutputs(np.zeros((len(ROWS), 1))))
    await asyncio.sleep(0)
    assert rows_of(runner, staged) == (4 * len(ROWS), 0), "they wait for the worker to load it"
    after = Staged(staged.manifest, staged.version, REPORT, 1, 5, "auto") if onwards else None
    runner.observe(Snapshot(2, {NAME: Entry(NAME, live, staged=after)}))
    await asyncio.sleep(0)
    assert rows_of(runner, staged) == (0, 0)
    assert (await runner.submit(live.version, ROWS)).values[:, 0].tolist() == list(range(8))
    assert rows_of(runner, staged) == (0, 0)


def rows_of(runner: StagedRunner, staged: Staged) -> tuple[int, int]:
    """That wait for a version, and that it has done."""
    versions = [one for tenant in runner._pool.statistics().tenants for one in tenant.versions]
    ((queued, done),) = [(one.rows_queued, one.rows) for one in versions if one.version == staged.version.version]
    return queued, done
