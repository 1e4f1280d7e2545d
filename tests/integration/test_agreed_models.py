"""Models of two nodes with one catalog: real trials, real workers and real model files; Raft and HTTP are stood in for
by the real catalog's reducer in this process, and by copying files."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import joblib
import numpy as np
import pytest
import pytest_asyncio
from sklearn.linear_model import LogisticRegression
from waiting import until

from node.app import row_refusal
from node.cluster_models import CatalogModels, agreed_models
from node.kernel.clock import SystemClock
from node.kernel.errors import ClusterUnavailable, PeerRefused, StoreUnavailable
from node.kernel.ports import FeaturePlan
from node.kernel.supervise import Supervisor
from node.kernel.types import AgreedModels, EventSchema, FeatureRows, ModelName, ModelVersion
from replication import catalog as catalogs
from replication.blobs import BlobStore
from replication.catalog import Catalog
from replication.commands import Command, HoldBlob, JoinNode, PutVersion
from replication.rollout import rollout
from tenants.registry import NOT_HERE
from tenants.sandbox import SandboxSettings
from tenants.service import ServiceSettings, TenantService
from tenants.watch import Blobs, WatchSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

SCHEMA = EventSchema(("transaction",), {"amount": "number", "age": "number"})
NARROW = EventSchema(("transaction",), {"age": "number"})
X = np.random.default_rng(3).normal(size=(100, 1))
MANIFEST = b'on = ["transaction"]\n[features]\namount = "event.amount"\n'
BID, OTHER = ModelName("ads", "bid"), ModelName("ads", "other")
ROWS = FeatureRows(("amount",), X[:4])


def model_file(regularisation: float = 1.0) -> bytes:
    stream = io.BytesIO()
    joblib.dump(LogisticRegression(C=regularisation).fit(X, X[:, 0] > 0), stream)
    return stream.getvalue()


class Cluster:
    """The catalog and its leader; every change is told to every member at once."""

    def __init__(self) -> None:
        self.catalog = Catalog()
        self.members: list[Member] = []
        self.unavailable = False
        self.refused: set[str] = set()

    @property
    def revision(self) -> int:
        return self.catalog.revision

    def join(self, member: Member) -> None:
        address = f"{member.name}:1"
        self.members.append(member)
        self.propose(JoinNode(revision=self.revision, name=member.name, raft_address=address, http_address=address))

    def propose(self, command: Command) -> None:
        if self.unavailable:
            raise ClusterUnavailable("no quorum answered; ask again")
        problem = catalogs.problem(self.catalog, command)
        if isinstance(command, PutVersion) and command.model in self.refused:
            problem = f"{command.model} is not taken at revision {self.revision}"
        if problem:
            raise PeerRefused(problem)
        before = self.catalog
        self.catalog = catalogs.apply(before, command)
        if self.catalog is not before:
            for member in self.members:
                member.tell()

    def exchange(self) -> None:
        """What the blob exchange and the leader do: files to who lacks them, then what all hold goes live."""
        for digest, held in self.catalog.holders.items():
            having = [member for member in self.members if member.blobs.has(digest)]
            for member in self.members:
                if member.gets_files and having and member.name not in held:
                    member.blobs.put(having[0].blobs.get(digest))
                    self.propose(
                        HoldBlob(revision=self.revision, node=member.name, incarnation=1, blob=digest, held=True)
                    )
        reached = [member.name for member in self.members if member.gets_files]
        for command in rollout(self.catalog, reached):
            self.propose(command)


class Seat:
    """One member's view of the cluster."""

    leads = False

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.name = name
        self.observed: Mapping[str, bytes] = {}
        self._cluster = cluster

    @property
    def catalog(self) -> Catalog:
        return self._cluster.catalog

    def observations(self) -> Sequence[Mapping[str, bytes]]:
        return [self.observed]

    async def propose(self, command: Command) -> None:
        self._cluster.propose(command)

    async def agreed(self) -> Catalog:
        if self._cluster.unavailable:
            raise ClusterUnavailable("no quorum answered; ask again")
        return self.catalog


class Member:
    """A node: its data folder, its watched directory, its service; `start` again is a restart."""

    def __init__(self, folder: Path, name: str, cluster: Cluster, schema: EventSchema = SCHEMA) -> None:
        self.name, self.cluster, self.schema = name, cluster, schema
        self.root, self.data = folder / name / "watched", folder / name / "data"
        self.root.mkdir(parents=True)
        self.data.mkdir()
        self.blobs = BlobStore(self.data / "blobs")
        self.gets_files = True
        self.gets = 0
        self.check_state: Callable[[FeaturePlan], str] = row_refusal
        self.service: TenantService | None = None
        cluster.join(self)

    async def start(self, told: bool = True) -> TenantService:
        blobs = self.blobs
        self.supervisor = Supervisor()
        watch = WatchSettings(self.root, self.data / "registry.json", settle_ms=40, rescan_ms=100)
        service = TenantService(
            ServiceSettings(
                replace(watch, check_state=lambda plan: self.check_state(plan)),
                SandboxSettings(required=frozenset()),
                self.data / "versions",
                parallel=1,
                quantum_seconds=0.01,
            ),
            self.schema,
            Blobs(blobs.put, self.get, blobs.names, blobs.delete),
            SystemClock(),
            self.supervisor,
            CatalogModels(Seat(self.cluster, self.name), SystemClock()),
        )
        await service.start()
        self.service = service
        if told:
            self.tell()
        return service

    def get(self, sha256: str) -> bytes:
        self.gets += 1
        return self.blobs.get(sha256)

    async def stop(self) -> None:
        if self.service is not None:
            assert self.supervisor.failure is None, "a background task died"
            service, self.service = self.service, None
            await service.stop()
            await self.supervisor.stop()

    def tell(self) -> None:
        if self.service is not None:
            self.service.agreed(self.agreed())

    def agreed(self) -> AgreedModels:
        return agreed_models(self.cluster.catalog, self.name)

    def drop(self, name: ModelName = BID, model: bytes | None = None, manifest: bytes = MANIFEST) -> None:
        (self.root / name.tenant).mkdir(exist_ok=True)
        for suffix, content in ((".joblib", model or model_file()), (".toml", manifest)):
            temporary = self.root / name.tenant / f".{name.model}{suffix}"
            temporary.write_bytes(content)
            temporary.rename(self.root / name.tenant / f"{name.model}{suffix}")

    def remove(self, name: ModelName = BID) -> None:
        for suffix in (".joblib", ".toml"):
            (self.root / name.tenant / f"{name.model}{suffix}").unlink()

    def status(self, name: ModelName = BID) -> dict[str, object]:
        with contextlib.suppress(FileNotFoundError):
            told = json.loads((self.root / name.tenant / f"{name.model}.status.json").read_bytes())
            assert isinstance(told, dict)
            return told
        return {}

    def live(self, name: ModelName = BID) -> ModelVersion | None:
        assert self.service is not None
        return next((version for version in self.service.plan().models if version.name == name), None)

    def version(self, name: ModelName = BID) -> str:
        live = self.live(name)
        return live.version if live is not None else ""


@pytest_asyncio.fixture(loop_scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    yield cluster
    for member in cluster.members:
        await member.stop()


async def two_members(folder: Path, cluster: Cluster) -> tuple[Member, Member]:
    one, two = Member(folder, "one", cluster), Member(folder, "two", cluster)
    await asyncio.gather(one.start(), two.start())
    return one, two


async def live_on(cluster: Cluster, members: tuple[Member, ...], name: ModelName, version: str) -> None:
    def agreed() -> bool:
        cluster.exchange()
        return all(member.version(name) not in ("", version) for member in members)

    await until(agreed)


async def test_a_model_dropped_on_one_node_runs_on_both(tmp_path: Path, cluster: Cluster) -> None:
    one, two = await two_members(tmp_path, cluster)
    for member in (one, two):
        (member.root / "ads").mkdir()
    (one.root / "ads" / "tenant.toml").write_text("weight = 2.0\n")
    one.drop(manifest=b'method = "predict"\n' + MANIFEST)
    await until(lambda: one.status().get("state") == "rolling out")
    assert one.live() is None
    assert two.live() is None
    await live_on(cluster, (one, two), BID, "")
    assert one.live() == two.live()
    version = two.live()
    assert version is not None
    assert two.service is not None
    outputs = await two.service.runner.submit(version, ROWS)
    assert outputs.values.shape == (4, 1)
    assert not outputs.errors
    service = two.service

    def weighted() -> bool:
        """Settings are agreed by themselves, not with the model."""
        cluster.exchange()
        return service.settings("ads").weight == 2.0

    await until(weighted, "the tenant's settings on the other node")
    await until(lambda: one.status().get("state") == "live")
    assert two.status() == {}, "the status is told where the files are"
    assert two.service.statistics().watch.trials == 0


async def test_an_old_version_runs_on_a_node_that_never_had_it_live(tmp_path: Path, cluster: Cluster) -> None:
    one, two = Member(tmp_path, "one", cluster), Member(tmp_path, "two", cluster)
    await one.start()
    one.drop()
    await live_on(cluster, (one,), BID, "")
    first = one.version()
    one.drop(model=model_file(0.01))
    await live_on(cluster, (one,), BID, first)
    service = await two.start()
    await until(service.watcher.caught_up.is_set)
    scans = service.statistics().watch.scans
    await until(lambda: service.statistics().watch.scans >= scans + 3)
    old = service.version(BID, first)
    assert old is not None
    assert two.blobs.has(old.blob), "what the catalog names is not collected"
    outputs = await service.runner.submit(old, ROWS)
    assert not outputs.errors
    assert service.version(BID, "0" * 64) is None

    before = two.version()
    two.drop(model=model_file(0.1))
    await live_on(cluster, (one, two), BID, before)
    await until(lambda: one.status().get("state") == "retired")
    running = one.status()["running"]
    assert isinstance(running, dict)
    assert running["version"] == two.version()


async def test_a_file_that_comes_late_is_waited_for(
    tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenants.pool.FETCH_SECONDS_MAX", 0.0)  # of a file that nobody has, not of this one
    one, two = await two_members(tmp_path, cluster)
    two.gets_files = False
    one.drop()
    await live_on(cluster, (one, two), BID, "")
    assert two.service is not None
    entry = two.service.watcher.snapshot.models[BID]
    assert entry.live is not None
    assert entry.live.failing == NOT_HERE
    version = two.live()
    assert version is not None
    await until(lambda: two.gets)
    scans = two.service.statistics().watch.scans
    await until(lambda: two.service is not None and two.service.statistics().watch.scans >= scans + 2)
    answer = asyncio.ensure_future(two.service.runner.submit(version, ROWS))
    rows = two.service.statistics().pool.tenants[0].versions[0]
    assert (rows.state, rows.rows_queued) == ("fetching", 4)
    two.gets_files = True
    cluster.exchange()
    async with asyncio.timeout(20):
        outputs = await answer
    assert not outputs.errors
    entry = two.service.watcher.snapshot.models[BID]
    assert entry.live is not None
    assert entry.live.failing == ""


async def test_what_the_cluster_does_not_take_is_told_and_tried_again(tmp_path: Path, cluster: Cluster) -> None:
    one, two = await two_members(tmp_path, cluster)
    service = one.service
    assert service is not None
    await until(lambda: service.statistics().watch.scans)
    cluster.unavailable = True
    one.drop()
    await until(lambda: "no quorum" in service.statistics().watch.last_error)
    assert service.statistics().watch.to_publish > 0
    await until(lambda: one.status().get("state") == "passed" and one.status().get("problems"))
    assert "no quorum" in str(one.status()["problems"])
    cluster.refused = {"bid"}
    cluster.unavailable = False
    one.drop(OTHER)
    await live_on(cluster, (one, two), OTHER, "")
    await until(lambda: "not taken" in str(one.status()["problems"]))
    cluster.refused = set()
    await live_on(cluster, (one, two), BID, "")
    await until(lambda: one.status().get("state") == "live")


async def test_deletion_withdraws_a_model_and_an_empty_directory_does_not(tmp_path: Path, cluster: Cluster) -> None:
    one, two = await two_members(tmp_path, cluster)
    one.drop()
    one.drop(OTHER)
    await live_on(cluster, (one, two), BID, "")
    await live_on(cluster, (one, two), OTHER, "")
    blob = one.agreed().versions[0].blob
    await one.stop()
    one.remove(BID)
    service = await one.start()
    await until(lambda: not two.live(BID))
    assert two.live(OTHER)
    assert service.statistics().watch.trials == 0, "what is agreed needs no trial at a restart"
    assert two.blobs.has(blob), "the other model has the same file"

    shutil.move(one.root / "ads", tmp_path / "away")
    scans = service.statistics().watch.scans
    await until(lambda: service.statistics().watch.scans >= scans + 6)
    assert two.live(OTHER)
    assert "is empty" in service.statistics().watch.last_error
    shutil.move(tmp_path / "away", one.root / "ads")
    one.remove(OTHER)
    await until(lambda: not two.live(OTHER))
    await until(lambda: not one.blobs.names() and not two.blobs.names())


async def test_nothing_is_decided_on_a_catalog_of_before_the_restart(tmp_path: Path, cluster: Cluster) -> None:
    one, two = await two_members(tmp_path, cluster)
    one.drop()
    one.drop(OTHER)
    await live_on(cluster, (one, two), BID, "")
    await live_on(cluster, (one, two), OTHER, "")
    await one.stop()
    one.remove()
    cluster.unavailable = True
    service = await one.start(told=False)
    service.agreed(AgreedModels(1))
    await until(lambda: "can't be asked yet" in service.statistics().watch.last_error)
    assert service.statistics().watch.scans == 0
    one.tell()
    assert one.version(OTHER) == two.version(OTHER)
    cluster.unavailable = False
    await until(lambda: not two.live(BID))
    assert two.live(OTHER)
    assert service.statistics().watch.trials == 0
    service.agreed(AgreedModels(1))
    assert one.live(OTHER), "what was told later holds"


async def test_a_version_that_this_node_cannot_read_is_told_and_not_run(tmp_path: Path, cluster: Cluster) -> None:
    one, two = Member(tmp_path, "one", cluster), Member(tmp_path, "two", cluster, NARROW)
    await one.start()
    service = await two.start(told=False)
    with pytest.raises(StoreUnavailable, match="not known here yet"):
        service.version(BID, "0" * 64)
    two.tell()
    assert service.version(BID, "0" * 64) is None
    one.drop()
    await live_on(cluster, (one,), BID, "")
    unserved = service.watcher.snapshot.models[BID].unserved
    assert unserved is not None
    assert "amount" in unserved.problems[0]
    assert two.live() is None
    with pytest.raises(StoreUnavailable, match="can't be run on this node"):
        service.version(BID, one.version())


async def test_models_that_fit_alone_and_not_together_are_left_out_alike(tmp_path: Path, cluster: Cluster) -> None:
    one, two = await two_members(tmp_path, cluster)
    for member in (one, two):
        member.check_state = lambda plan: "there is room for one" if len(plan.models) > 1 else ""
    one.drop(BID)
    two.drop(OTHER)
    await until(lambda: len(cluster.catalog.models) == 2)
    await live_on(cluster, (one, two), BID, "")
    cluster.exchange()
    assert {version.state for version in one.agreed().versions} == {"live"}
    assert one.service is not None
    assert two.service is not None
    assert [version.name for version in one.service.plan().models] == [BID]
    assert one.service.plan().models == two.service.plan().models
    await until(lambda: two.status(OTHER).get("state") == "failing")
    assert "room for one" in str(two.status(OTHER)["problems"])
    one.remove(BID)
    await until(lambda: one.live(OTHER) and two.live(OTHER))
    await until(lambda: two.status(OTHER).get("state") == "live")


async def test_a_quota_holds_on_all_nodes_at_once_and_lets_in_what_it_refused(tmp_path: Path, cluster: Cluster) -> None:
    one, two = await two_members(tmp_path, cluster)
    quotas = CatalogModels(Seat(cluster, "two"), SystemClock())
    (one.root / "ads").mkdir()
    (one.root / "ads" / "tenant.toml").write_text("weight = 3.0\nrows_s_max = 10.0\n")
    await quotas.change_quota("ads", {"models_max": 0, "weight": 8.0, "rows_s_max": 5.0}, "eve")
    one.drop()
    await until(lambda: one.status().get("state") == "refused")
    assert "its quota models_max is 0" in str(one.status()["problems"])
    assert one.service is not None
    assert one.service.quota("ads").refused == {"models_max": 1}
    await quotas.change_quota("ads", {"models_max": None, "rows_s_max": 50.0}, "eve")
    await live_on(cluster, (one, two), BID, "")
    for member in (one, two):
        assert member.service is not None
        settings = member.service.settings("ads")
        assert (settings.weight, settings.rows_s_max, settings.models_max) == (3.0, 10.0, 64)
        quota = member.service.quota("ads").quota
        assert (quota.limits(), quota.who) == ({"weight": 8.0, "rows_s_max": 50.0}, "eve by two")
