"""All of tenants' models behind one object: what is kept of old versions, what is removed, what counts as deleted."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import joblib
import numpy as np
import pytest
import pytest_asyncio
from sklearn.linear_model import LogisticRegression
from waiting import until

from node.kernel.clock import SystemClock
from node.kernel.errors import StoreUnavailable, WorkerLost
from node.kernel.supervise import Supervisor
from node.kernel.types import Aggregate, EventSchema, FeatureRows, ModelName, StoredOutput
from replication.blobs import BlobStore
from tenants.sandbox import SandboxSettings
from tenants.service import ServiceSettings, TenantService
from tenants.watch import Blobs, WatchSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = EventSchema(("transaction",), {"amount": "number"})
X = np.random.default_rng(3).normal(size=(100, 1))
MANIFEST = b'on = ["transaction"]\n[features]\namount = "event.amount"\n'
BID = ModelName("ads", "bid")


def model_file(regularisation: float = 1.0) -> bytes:
    stream = io.BytesIO()
    joblib.dump(LogisticRegression(C=regularisation).fit(X, X[:, 0] > 0), stream)
    return stream.getvalue()


class Node:
    """One data folder and one watched directory; `start` again is a restart."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "watched"
        self.data = folder / "data"
        (self.root / "ads").mkdir(parents=True)
        self.data.mkdir()
        self.blobs = BlobStore(self.data / "blobs")
        self.service: TenantService | None = None

    async def start(self) -> TenantService:
        blobs, clock = self.blobs, SystemClock()
        self.supervisor = Supervisor()
        self.service = TenantService(
            ServiceSettings(
                WatchSettings(self.root, self.data / "registry.json", settle_ms=40, rescan_ms=100),
                SandboxSettings(required=frozenset()),
                self.data / "versions",
                parallel=1,
                quantum_seconds=0.01,
            ),
            SCHEMA,
            Blobs(blobs.put, blobs.get, blobs.names, blobs.delete),
            clock,
            self.supervisor,
        )
        await self.service.start()
        return self.service

    async def stop(self) -> None:
        if self.service is not None:
            assert self.supervisor.failure is None, "a background task died"
            await self.service.stop()
            await self.supervisor.stop()
            self.service = None

    def drop(self, name: ModelName = BID, model: bytes | None = None, manifest: bytes = MANIFEST) -> None:
        for suffix, content in ((".joblib", model or model_file()), (".toml", manifest)):
            temporary = self.root / name.tenant / f".{name.model}{suffix}"
            temporary.write_bytes(content)
            temporary.rename(self.root / name.tenant / f"{name.model}{suffix}")

    def live(self, name: ModelName = BID) -> str:
        assert self.service is not None
        return next((version.version for version in self.service.plan().models if version.name == name), "")

    def status(self) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.root / "ads" / "bid.status.json").read_text())
        return found

    def kept(self) -> set[str]:
        return {path.name for path in (self.data / "versions").iterdir()}


@pytest_asyncio.fixture(loop_scope="module")
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    node = Node(tmp_path)
    yield node
    await node.stop()


async def test_a_node_whose_workers_can_not_be_started_says_so_and_not_that_it_tries_again(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "joblib.py").write_text("raise ImportError('a file of it is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WorkerLost) as raised:
        await node.start()
    assert "a file of it is missing" in capfd.readouterr().err
    assert str(raised.value) == (
        "no model can run, so the node ends: the process that workers are forked from ended before it was ready;"
        " what it printed, above, says why; mend that and start the node again"
    )


async def test_a_model_not_tried_yet_is_not_a_deleted_one(node: Node) -> None:
    node.drop()
    service = await node.start()
    with pytest.raises(StoreUnavailable, match="still being tried"):
        service.version(BID, "0" * 64)
    await until(node.live)
    known = service.version(BID, node.live())
    assert known is not None
    assert known.name == BID
    await until(service.watcher.caught_up.is_set)
    assert service.version(ModelName("ads", "none"), "0" * 64) is None
    assert service.version(BID, "0" * 64) is None


async def test_versions_that_the_disk_refuses_to_read_are_not_deleted_ones(node: Node) -> None:
    node.drop()
    service = await node.start()
    await until(node.live)
    await until(service.watcher.caught_up.is_set)
    (node.data / "versions" / ("0" * 64)).mkdir()
    with pytest.raises(StoreUnavailable, match="repair the disk"):
        service.version(BID, "0" * 64)


async def test_a_folder_that_cannot_be_written_stops_nobody(node: Node) -> None:
    (node.data / "versions").write_text("in the way")
    node.drop()
    service = await node.start()
    await until(node.live)
    assert service.version(BID, node.live()) is not None
    (node.data / "versions").unlink()
    node.drop(ModelName("ads", "other"))
    await until(lambda: node.live(ModelName("ads", "other")))
    await until(lambda: node.kept() == {node.live(), node.live(ModelName("ads", "other"))})


async def test_what_no_model_needs_any_more_is_removed(node: Node) -> None:
    stray = node.blobs.put(b"of a pair that was never live")
    node.drop()
    service = await node.start()
    await until(node.live)
    first = node.live()
    await until(lambda: stray not in node.blobs.names())
    node.drop(model=model_file(0.01))
    await until(lambda: node.live() != first)
    old = service.version(BID, first)
    assert old is not None, "its triggers may still wait"
    assert node.blobs.get(old.blob) == model_file()
    await node.stop()

    service = await node.start()
    await until(service.watcher.caught_up.is_set)
    assert node.kept() == {first, node.live()}
    assert len(node.blobs.names()) == 2
    (node.root / "other").mkdir()
    shutil.rmtree(node.root / "ads")
    await until(lambda: node.blobs.names() == [])
    assert node.kept() == set()
    assert service.version(BID, first) is None


async def test_the_plan_needs_what_the_version_before_would(node: Node) -> None:
    def counting(days: int) -> bytes:
        text = b'on = ["transaction"]\noutput = "score%d"\n[features]\ncount = "count(transaction, \'%dd\')"\n'
        return text % (days, days)

    node.drop(manifest=counting(1))
    service = await node.start()
    windows = [Aggregate("count", "transaction", "", days * 86_400_000) for days in (1, 2, 3)]

    def needed() -> list[bool]:
        needs = service.plan().needs | service.plan().reserve
        return [window in needs.aggregates for window in windows]

    await until(lambda: needed() == [True, False, False])
    node.drop(manifest=counting(2))
    await until(lambda: needed() == [True, True, False])
    assert service.plan().reserve.outputs == {StoredOutput(BID, "score1")}
    other = ModelName("ads", "other")
    node.drop(other)
    await until(lambda: node.live(other))
    assert needed() == [True, True, False], "though another model changed"
    node.drop(manifest=counting(3))
    await until(lambda: needed() == [False, True, True])
    await node.stop()
    service = await node.start()
    assert needed() == [False, True, True]
    (node.root / "other").mkdir()
    shutil.rmtree(node.root / "ads")
    await until(lambda: needed() == [False, False, False])


async def test_a_failed_version_gives_way_and_the_one_before_runs_what_waits(node: Node) -> None:
    node.drop()
    service = await node.start()
    await until(node.live)
    first = node.live()
    node.drop(model=model_file(0.01))
    await until(lambda: node.live() not in ("", first))
    second = node.live()
    service.watcher.failing(BID, second, "rows kill it", True)
    await until(lambda: node.live() == first)
    await until(lambda: node.status()["state"] == "quarantined")
    running = node.status()["running"]
    assert isinstance(running, dict)
    assert running["version"] == first
    waiting = service.version(BID, second)
    assert waiting is not None
    assert waiting.version == first, "its columns and outputs are alike"
    rows = FeatureRows(("amount",), X[:5])
    assert not (await service.runner.submit(waiting, rows)).errors
    await node.stop()

    service = await node.start()
    await until(service.watcher.caught_up.is_set)
    assert node.live() == first
    assert service.statistics().watch.trials == 0, "the quarantined pair is not tried again"


async def test_the_same_files_under_several_names_are_models_of_their_own(node: Node) -> None:
    """Such as a copied example, or a model that is renamed: they make one version, by its number."""
    (node.root / "shop").mkdir()
    names = [BID, ModelName("ads", "copy"), ModelName("shop", "bid")]
    service = await node.start()
    for name in names:
        node.drop(name)
    await until(lambda: all(map(node.live, names)))
    found = [service.version(name, node.live(name)) for name in names]
    assert [version.name for version in found if version is not None] == names, "of what waits in a sequence log"
    rows = FeatureRows(("amount",), X[:5])
    for version in found:
        assert version is not None
        assert not (await service.runner.submit(version, rows)).errors

    def rows_run() -> dict[ModelName, int]:
        tenants = service.statistics().pool.tenants
        return {ModelName(one.tenant, known.model): known.rows for one in tenants for known in one.versions}

    assert rows_run() == dict.fromkeys(names, 5)
    for suffix in (".toml", ".joblib"):
        (node.root / "ads" / f"bid{suffix}").unlink()
    await until(lambda: rows_run() == dict.fromkeys(names[1:], 5))
    copy = service.version(names[1], node.live(names[1]))
    assert copy is not None
    assert not (await service.runner.submit(copy, rows)).errors
    assert rows_run()[names[1]] == 10
    await node.stop()

    service = await node.start()
    assert [version.name for version, _ in service.watcher.snapshot.live] == names[1:]
    again = [service.version(name, node.live(name)) for name in names[1:]]
    assert [version.name for version in again if version is not None] == names[1:]
