"""What a node has beside its partitions and tenants when it is one of several, joined together.

The catalog says who has what; this hands each change of it on, to the models and to the replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from node.cluster_models import CatalogModels
from node.cluster_tables import CatalogTables
from node.cluster_view import LocalClusterView
from node.config_sections import ClusterSection, Config
from node.ingest.topics import Topics, TopicSettings
from node.kernel.broker import ClientOptions
from node.kernel.clock import Clock
from node.kernel.limits import CLUSTER_REPORT_MS_MAX
from node.kernel.ports import StateStore
from node.kernel.supervise import Supervisor
from node.kernel.table_versions import Table
from node.kernel.types import AgreedModels
from node.replicas import Held, OpenSession, Replicas, Surroundings
from node.state.folder import StateFolders
from node.state.inspection import bucket_of, changelog_offset_of, digest_of
from replication.blob_exchange import BlobExchange
from replication.blobs import BlobStore
from replication.catalog import Assignment
from replication.catalog_tables import table_blobs
from replication.cluster import Cluster, ClusterSettings
from replication.commands import CompleteMove, GrowPartitions, Settings
from replication.cutter import Changelogs, Cutter
from replication.operators import Operators
from replication.ownership import Progress
from replication.peers import PeerCall, PeerClient, PeerReply, PeerRoute, PeerServer
from replication.raft_types import RaftSettings
from replication.snapshot_folder import SnapshotFolder
from replication.snapshots import Snapshots, Sources
from replication.standby import StandbyFolder
from replication.verification import Inspection, Verification

log = structlog.get_logger(__name__)

_REPORT_PATH = "/peer/report"


class CatalogOwnership:
    """`node.replicas.Ownership`, as the catalog has it."""

    def __init__(self, cluster: Cluster, snapshots: Snapshots) -> None:
        self._cluster = cluster
        self._snapshots = snapshots

    @property
    def leads(self) -> bool:
        return self._cluster.leads

    def held(self) -> Mapping[int, Held]:
        """Nothing while the catalog speaks of an earlier incarnation: what that one had is gone with its disk."""
        catalog, name = self._cluster.catalog, self._cluster.name
        member = catalog.nodes.get(name)
        if member is None or member.incarnation != self._cluster.incarnation:
            return {}
        return {
            number: _held(number, assignment, name)
            for number, assignment in enumerate(catalog.partitions)
            if name == assignment.owner or name in assignment.standbys
        }

    def may_own(self, partition: int, epoch: int) -> bool:
        return self._cluster.may_own(partition, epoch)

    def lease_left_ms(self) -> float:
        return self._cluster.lease_left_ms()

    async def may_forget(self, partition: int) -> bool:
        return await self._snapshots.may_forget(partition)

    def opened(self) -> None:
        self._cluster.report_now()

    async def released(self, partition: int, epoch: int, to: str, revision: int) -> None:
        """The leader is told too: it completes the move should this node fail before it has."""
        self._cluster.report_now()
        await self._cluster.propose(CompleteMove(revision=revision, partition=partition, epoch=epoch, to=to))

    async def grow(self, count: int) -> None:
        catalog = self._cluster.catalog
        if count > len(catalog.partitions):
            await self._cluster.propose(GrowPartitions(revision=catalog.revision, count=count))


def _held(number: int, assignment: Assignment, name: str) -> Held:
    owner = assignment.owner == name
    moving_to = assignment.move.to if owner and assignment.move is not None else ""
    return Held(number, owner, assignment.epoch, assignment.revision, moving_to)


class Clustering:
    """`changelog` is the topic. Raises ConfigError when the secret can't be read or the addresses are not to be had."""

    def __init__(
        self,
        config: Config,
        section: ClusterSection,
        options: ClientOptions,
        changelog: str,
        blobs: BlobStore,
        table_files: BlobStore,
        clock: Clock,
        supervisor: Supervisor,
    ) -> None:
        self._supervisor = supervisor
        name, secret = config.node.name, section.secret()
        self._client = PeerClient(name, secret, clock)
        settings = _settings(config, section, secret)
        self.cluster = Cluster(settings, clock, supervisor, self._send_report, self._progress, self._verified)
        self.cluster.tries_models = True
        self.models = CatalogModels(self.cluster, clock)
        self.view = LocalClusterView(self.cluster, self._client, settings.plan)
        self._blobs = BlobExchange(blobs, self._client, self.cluster, clock)
        self._table_files = BlobExchange(table_files, self._client, self.cluster, clock, table_blobs, "/peer/tables")
        self.tables = CatalogTables(self.cluster)
        self.follow_tables: Callable[[Mapping[str, Table]], None] = lambda tables: None
        """Hears of each change, before the models do."""
        self._standbys = StandbyFolder(options, changelog, clock, near=self.cluster.report_now)
        changelogs = Changelogs(options, changelog)
        sources = Sources(self._stores, changelog_offset_of, changelogs.bounds)
        self._snapshots = _snapshots(config, section, changelog, self.cluster, self._client, sources, clock)
        self._cutter = Cutter(changelogs, self.cluster, self._snapshots.stored, clock)
        self._verification = Verification(
            Path(config.node.data_dir) / "verification",
            self.cluster,
            self._client,
            self._stores,
            self._standbys,
            Inspection(digest_of, bucket_of),
            self._snapshots.verify_again,
            clock,
        )
        self._operators = Operators(
            self.cluster, self.view.encoded, self._snapshots.take_now, self._verification.verify
        )
        routes = [
            PeerRoute("POST", _REPORT_PATH, self._take_report),
            *self._blobs.routes(),
            *self._table_files.routes(),
            *self._snapshots.routes(),
            *self._verification.routes(),
            *self._operators.routes(),
        ]
        self._server = PeerServer(section.peer_listen, name, secret, clock, routes)
        self._clock = clock
        self._tasks: list[asyncio.Task[None]] = []
        self._replicas: Replicas | None = None
        self._agreed: Callable[[AgreedModels], None] = lambda models: None
        self.cluster.subscribe(self._changed)

    def replicas(
        self,
        folders: StateFolders,
        open_session: OpenSession,
        commit_interval_seconds: float,
        topics: Topics,
        sources: tuple[str, ...],
        outputs: Mapping[str, TopicSettings],
    ) -> Replicas:
        ownership = CatalogOwnership(self.cluster, self._snapshots)
        around = Surroundings(ownership, self._standbys, open_session, commit_interval_seconds, self._clock)
        self._replicas = Replicas(around, folders, topics, sources, outputs, self._supervisor)
        return self._replicas

    def leads(self) -> bool:
        return self.cluster.leads

    async def start(self) -> None:
        """Take part, and stand by for partitions, before there are models. Raises ConfigError, CatalogCorrupt,
        StoreUnavailable."""
        await self._snapshots.open()
        await self._verification.open()
        await self._client.start()
        await self._server.start()
        await self.cluster.start()
        work = {
            "model files": self._blobs.run(),
            "table files": self._table_files.run(),
            "snapshots": self._snapshots.run(),
            "changelog cuts": self._cutter.run(),
        }
        self._tasks = [self._supervisor.start(name, coroutine) for name, coroutine in work.items()]
        if self._replicas is not None:
            self._supervisor.start("partitions", self._replicas.run())
        log.info("cluster joined", node=self.cluster.name, peers=self._server.address)

    def serve(self, agreed: Callable[[AgreedModels], None]) -> None:
        """`agreed` hears at once, and then of each change, what the catalog says of models."""
        self._agreed = agreed
        self.follow_tables(self.cluster.catalog.tables)
        agreed(self.models.agreed())

    def own(self) -> None:
        """From now on what the catalog gives this node is owned, not only stood by for."""
        if self._replicas is not None:
            self._replicas.own()
        self.cluster.tries_models = False
        self.cluster.report_now()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._operators.stop()
        await self._verification.close()
        await self.cluster.stop()
        await self._server.stop()
        await self._client.stop()
        self._snapshots.close()

    def statistics(self) -> Mapping[str, object]:
        return {
            "agreement": self.cluster.statistics(),
            "standbys": self._standbys.statistics(),
            "snapshots": self._snapshots.statistics(),
            "changelog_cuts": self._cutter.statistics(),
            "model_files": self._blobs.statistics(),
            "table_files": self._table_files.statistics(),
            "peers_asked": self._client.statistics(),
            "peers_answered": self._server.statistics(),
        }

    async def restore(self, partition: int, folder: Path) -> bool:
        """`node.state.folder.Restore`: a snapshot in place of what is in the folder; False if there is none."""
        return await self._snapshots.restore(partition, folder)

    def _changed(self) -> None:
        self.follow_tables(self.cluster.catalog.tables)
        self._agreed(self.models.agreed())
        if self._replicas is not None:
            self._replicas.update()

    def _progress(self) -> Mapping[int, Progress]:
        told = {} if self._replicas is None else self._replicas.progress()
        return {
            number: Progress(one.offset, one.frames_behind, one.ms_behind, one.serving, one.released_revision)
            for number, one in told.items()
        }

    def _verified(self) -> Mapping[int, int]:
        return self._snapshots.verified()

    def _stores(self) -> Mapping[int, StateStore]:
        return {} if self._replicas is None else self._replicas.stores()

    async def _send_report(self, address: str, body: bytes) -> None:
        await self._client.ask(address, "POST", _REPORT_PATH, body, wait_ms_max=CLUSTER_REPORT_MS_MAX)

    async def _take_report(self, call: PeerCall) -> PeerReply:
        self.cluster.take_report(call.body)
        return PeerReply()


def _settings(config: Config, section: ClusterSection, secret: bytes | None) -> ClusterSettings:
    folder = Path(config.node.data_dir) / "cluster"
    return ClusterSettings(
        name=config.node.name,
        raft=RaftSettings(config.node.name, section.listen, section.peers, folder / "raft", secret),
        peer_address=section.peer_address or section.peer_listen,
        rack=section.rack,
        weight=section.weight,
        folder=folder,
        agreed=Settings(
            standby_count=section.standbys, lease_ms=section.lease_ms, snapshot_holders_min=section.snapshot_holders_min
        ),
    )


def _snapshots(
    config: Config,
    section: ClusterSection,
    changelog: str,
    cluster: Cluster,
    client: PeerClient,
    sources: Sources,
    clock: Clock,
) -> Snapshots:
    name = config.node.name
    folder = SnapshotFolder(Path(config.node.data_dir) / "snapshots", changelog, name, clock)
    store = None
    if section.snapshot_url:
        from replication.snapshot_store import SnapshotStore  # as fsspec is imported with it, which others do without

        store = SnapshotStore(section.snapshot_url, config.kafka.application, changelog, name, clock)
    return Snapshots(folder, cluster, client, sources, clock, section.snapshot_interval_s, store)
