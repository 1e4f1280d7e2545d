"""Some of the hostile models of the benchmark `isolation`, each in a locked-down worker."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from worker_support import rows_of, stored, version_of, warm_server

from node.kernel import limits
from node.kernel.clock import SystemClock
from node.kernel.errors import CallFailed, ModelRefused, WorkerLost
from node.kernel.limits import MIB, TENANT_LOG_BYTES_MAX
from node.kernel.supervise import Supervisor
from tenants.pool import ModelPool
from tenants.sandbox import SandboxSettings
from tenants.tenant_log import TenantLog
from tenants.workers import WarmServer, WorkerProcess

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

import hostile
import hostile_watch
from hostile_making import ALLOW_GLOBALS, BLOCKED, MODEL, REACHED, TRIGGER, Case, linear

pytestmark = pytest.mark.asyncio(loop_scope="module")

FEATURES = ("amount",)
AMOUNTS = [[1.0], [TRIGGER], [3.0]]
CALL_SECONDS_MAX = 2.0
WAIT_SECONDS_MAX = 20.0
MEMORY_BYTES = 384 * MIB
SECRET_NAME = "HEADRACE_TEST_SECRET"
CASES = hostile.named(hostile.QUICK)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[WarmServer]:
    lines = tuple(f"{name.rpartition('.')[0]} {name.rpartition('.')[2]} call" for name in ALLOW_GLOBALS)
    os.environ[SECRET_NAME] = "x"
    async with warm_server(SandboxSettings(extra_globals=lines)) as started:
        yield started
    del os.environ[SECRET_NAME]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def other(server: WarmServer) -> AsyncIterator[WorkerProcess]:
    """Another tenant's worker."""
    worker = await server.spawn("other", MEMORY_BYTES)
    await worker.load(version_of(FEATURES, method="predict"), stored(linear(2.0, offset=1.0)))
    yield worker
    assert not worker.lost.is_set()
    await worker.close()


@pytest.fixture
def aims(tmp_path: Path) -> Iterator[hostile_watch.Aims]:
    with hostile_watch.aims(tmp_path / "aims") as made:
        yield made


async def attacked(worker: WorkerProcess, model: bytes) -> str:
    """Have the worker load and call the model; where it was told of: as the cases have it."""
    version = version_of(FEATURES, method="predict")
    try:
        await worker.load(version, model, deadline_seconds=10)
    except (ModelRefused, WorkerLost):
        return "refused"
    try:
        outputs = await worker.call(version.version, rows_of(FEATURES, AMOUNTS), CALL_SECONDS_MAX)
    except CallFailed:
        return "failed"
    except WorkerLost:
        return "lost"
    if outputs.errors:
        return "failed"
    try:  # one that answers more than it was asked is found out at the next request
        await worker.call(version.version, rows_of(FEATURES, AMOUNTS[:1]), CALL_SECONDS_MAX)
    except WorkerLost:
        return "lost"
    return "live"


async def ended(log: TenantLog, worker: WorkerProcess) -> None:
    """The worker has ended and was reaped, and what it printed was read."""
    await worker.close()
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while log.readers or os.path.exists(f"/proc/{worker.pid}"):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
async def test_is_contained(
    server: WarmServer, other: WorkerProcess, aims: hostile_watch.Aims, tmp_path: Path, case: Case
) -> None:
    case.write(tmp_path / "tenant", aims.target(os.getpid(), (other.pid,), SECRET_NAME))
    worker = await server.spawn("hostile", MEMORY_BYTES)
    log = server.logs.of("hostile")
    already = log.count
    told = await attacked(worker, (tmp_path / "tenant" / f"{MODEL}.joblib").read_bytes())
    await ended(log, worker)
    texts = [line.text for line in log.lines(already)]
    assert not [text for text in texts if REACHED in text]
    assert aims.reached() == []
    if case.told == "printed":
        assert [text for text in texts if BLOCKED in text], texts
    else:
        assert told == case.told, texts
    assert sum(len(text) for text in texts) <= TENANT_LOG_BYTES_MAX
    outputs = await other.call(version_of(FEATURES).version, rows_of(FEATURES, AMOUNTS), 10)
    assert outputs.values[:, 0].tolist() == [2 * amount + 1 for (amount,) in AMOUNTS]


async def test_a_worker_that_computes_unasked_is_ended_and_its_models_are_failing(
    server: WarmServer, aims: hostile_watch.Aims, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "WORKER_LOOK_MS", 100)
    monkeypatch.setattr(limits, "WORKER_UNASKED_MS_MAX", 30)
    (case,) = hostile.named(("computes when it is asked nothing",))
    case.write(tmp_path / "tenant", aims.target(os.getpid(), (), SECRET_NAME))
    model = (tmp_path / "tenant" / f"{MODEL}.joblib").read_bytes()
    supervisor, failing = Supervisor(), asyncio.Queue[str]()

    async def fetch(_: str) -> bytes:
        return model

    pool = ModelPool(
        server, fetch, SystemClock(), supervisor, parallel=1,
        on_failing=lambda _name, _version, reason, _at_fault: failing.put_nowait(reason),
    )  # fmt: skip
    watch = supervisor.start("watch", pool.keep_watch())
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        outputs = await pool.submit(version_of(FEATURES, method="predict"), rows_of(FEATURES, AMOUNTS))
        assert not outputs.errors
        assert "nothing was asked of it" in await failing.get()
    watch.cancel()
    await pool.stop()
    assert supervisor.failure is None
