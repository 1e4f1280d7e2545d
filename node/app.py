"""Wiring: the only module that sees node, replication and tenants together, and starts and stops them."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import sdnotify
import structlog
import uvloop

from node.clustering import Clustering
from node.config_sections import Config, KafkaSection
from node.counts import NodeCounts
from node.cycle import CycleSettings, Engine
from node.data_lock import locked
from node.ingest.decode import EventDecoder
from node.ingest.history import TopicHistory
from node.ingest.source import Source
from node.ingest.topics import KEPT_WHOLE, Topics, TopicSettings
from node.kernel.broker import ClientOptions
from node.kernel.clock import Clock, SystemClock
from node.kernel.errors import BoundExceeded, NotFound, printable
from node.kernel.limits import MIB, TABLE_FILE_BYTES_MAX
from node.kernel.ports import FeaturePlan
from node.kernel.supervise import Supervisor
from node.kernel.table_versions import Table
from node.kernel.types import QUOTAS, EventSchema, ModelName, ModelVersion
from node.outbox import BrokerTraits, Outbox, OutputTopics
from node.outgoing import Origin
from node.partition import Partition, unguarded
from node.partitions import Partitions
from node.replicas import Replicas
from node.serving.operator_token import make_token
from node.serving.server import HttpServer
from node.serving.tables import TableEndpoints
from node.serving.view import (
    ConsistencyStatus,
    MemoryStatus,
    ModelCost,
    ModelDetail,
    ModelInfo,
    PrintedLine,
    SandboxStatus,
    SharedFeatureInfo,
    SharedFeatures,
    StageMove,
    StageStatus,
    TenantLog,
    TenantQuota,
    TenantShare,
    TenantStatus,
)
from node.session import ChangelogReader, PartitionSession, Parts, open_session
from node.stage_view import Checked, Judged, consistency_status, detail, infos, stage_status
from node.staging import running, table_readers
from node.state.flushing import FlushTurns
from node.state.folder import StateFolder, StateFolders
from node.state.layout import Layout
from node.state.rocksdb import RocksEnvironment, RocksStore
from node.tables.feeds import TableFeeds
from node.tables.library import TableLibrary
from node.tables.local import LocalTables
from node.tables.service import Files, TableLedger, TableService
from node.training.verdicts import Verdicts
from node.view import LocalView, PartitionsView
from node.waiting import Bound
from node.warming import sandbox_settings
from replication.blobs import BlobStore
from replication.changelog import Changelog
from replication.frame import encode_frame
from tenants.agreement import ModelPublisher
from tenants.cgroups import ControlGroups
from tenants.expression import evaluate_profile
from tenants.feature_listing import SharedFeatureStatus
from tenants.lineage import event_features
from tenants.manifest import TenantCaps
from tenants.pool_statistics import VersionStatistics
from tenants.sandbox import SandboxReport, SandboxSettings
from tenants.service import ServiceSettings, TenantService
from tenants.warm_process import WarmProcess
from tenants.watch import Blobs, WatchSettings
from tenants.workers import WarmServer, WorkerStatistics

log = structlog.get_logger(__name__)


_MODELS_SECONDS_MAX = 120.0
"""How long a starting node waits for the trials of models it finds, before it takes events without them."""


NO_ROOM = "customers' rows have no room for its windows beside those of others and of what they would fall back to"
_GARBAGE_THRESHOLDS = (50_000, 20, 50)


class Node:
    """One node: partitions, tenants and HTTP, over one event loop; with a [cluster], one of several."""

    def __init__(self, config: Config, clock: Clock, warm: WarmProcess | None = None) -> None:
        self._config = config
        self._clock = clock
        self._supervisor = Supervisor()
        self._traits: dict[int, BrokerTraits] = {}
        self._counts = NodeCounts(clock, lambda: running(self._tenants.plan()))
        self._options = client_options(config.kafka, config.node.name)
        self._data = Path(config.node.data_dir)
        self._environment = RocksEnvironment.of(config.state.block_cache_mb * MIB, config.state.write_buffer_mb * MIB)
        kafka = config.kafka
        self._flushes = FlushTurns(config.state.flush_interval_s)
        self._outputs = OutputTopics(
            kafka.inferences_topic, kafka.changelog_topic, kafka.dead_letters_topic, kafka.rows_topic
        )
        blobs = BlobStore(self._data / "blobs")
        table_files = BlobStore(self._data / "tables" / "files", TABLE_FILE_BYTES_MAX)
        self._clustering = self._cluster(blobs, table_files)
        publish = None if self._clustering is None else self._clustering.models
        self._library = TableLibrary(table_files.path, self._supervisor)
        schema = replace(config.schema(), tables=self._library.schemas)
        self._tenants = _tenant_service(
            config, schema, self._data, blobs, clock, self._supervisor, publish, warm, self._room_problem
        )
        self._tables = self._table_service(table_files)
        self._engine = Engine(
            EventDecoder(config.events),
            self._tenants.plan,
            self._tenants.runner,
            CycleSettings(config.cycle.events_max, config.cycle.wait_ms, config.cycle.inference_deadline_ms / 1000),
            self._library.current,
            self._tenants.runner,
            self._unfit,
        )
        self._partitions = self._all_partitions()
        view = LocalView(
            config.node.name,
            schema,
            evaluate_profile(schema),
            self._partitions,
            Tenants(self._tenants, Verdicts(self._data).get),
            self._tenants if self._clustering is None else self._clustering.models,
            self._supervisor,
            clock,
            self._counts,
            dict if self._clustering is None else self._clustering.statistics,
            self._library.current,
        )
        cluster_view = None if self._clustering is None else self._clustering.view
        leads = (lambda: True) if self._clustering is None else self._clustering.leads
        self._feeds = TableFeeds(self._tables, self._options, clock, leads)
        token, tables = make_token(self._data), TableEndpoints(self._tables, self._feeds, clock)
        self._http = HttpServer(view, config.http, clock, cluster=cluster_view, token=token, more=tables.routes())

    async def run(self, stopping: asyncio.Event) -> int:
        """Run until `stopping` is set or a background task dies; gives the exit code.

        HTTP comes first, so that a node that waits for Kafka or its cluster can say so. A clustered node fetches state
        while it tries its models, and owns partitions after that.
        """
        await self._http.start()
        if self._clustering is not None:
            await self._clustering.start()
        await self._tenants.start()
        if self._clustering is not None:
            self._clustering.serve(self._tenants.agreed)
        await _first(self._tenants.caught_up(_MODELS_SECONDS_MAX), stopping.wait(), self._supervisor.failed.wait())
        if self._clustering is not None:
            self._clustering.own()
        else:
            self._supervisor.start("partitions", self._partitions.run())
        self._supervisor.start("table feeds", self._feeds.run())
        sdnotify.SystemdNotifier().notify("READY=1")
        _settle_garbage_collector()
        log.info("node started", address=self._http.address, data_dir=str(self._data))
        await _first(stopping.wait(), self._supervisor.failed.wait())
        sdnotify.SystemdNotifier().notify("STOPPING=1")
        await self._partitions.stop()
        if self._clustering is not None:
            await self._clustering.stop()
        await self._tenants.stop()
        await self._http.stop()
        await self._supervisor.stop()
        if self._supervisor.failure is not None:
            log.error("node stopped because a task died", error=repr(self._supervisor.failure))
            return 1
        log.info("node stopped")
        return 0

    def _table_service(self, files: BlobStore) -> TableService:
        config, folder = self._config, self._data / "tables"
        for left in folder.glob(".upload-*"):
            shutil.rmtree(left, ignore_errors=True)
        ledger: TableLedger
        if self._clustering is None:
            local = ledger = LocalTables(folder / "tables.json", self._library)
            local.start()
        else:
            ledger = self._clustering.tables
        service = TableService(
            config.node.name,
            folder,
            Files(files.put, files.path, files.names, files.delete),
            self._library,
            ledger,
            lambda table: table_readers(self._tenants.plan(), table),
            config.tables.upload_mb_max * MIB,
            config.tables.build_memory_mb,
            self._clock,
        )
        if self._clustering is not None:
            self._clustering.follow_tables = lambda tables: self._follow_tables(service, tables)
        self._library.changed = self._tenants.watcher.look_again
        return service

    def _follow_tables(self, service: TableService, tables: Mapping[str, Table]) -> None:
        """What the catalog says; the files of versions that it has forgotten go."""
        dropped = _versions(self._library.tables) - _versions(tables)
        self._library.agreed(tables)
        if dropped:
            self._supervisor.start("table files collected", service.collect())

    def _room_problem(self, plan: FeaturePlan) -> str:
        """Why a partition that is open here has no room for what the plan needs; '' when all have."""
        partitions: PartitionsView = self._partitions
        for number, partition in sorted(partitions.running.items()):
            problem = "" if partition.session is None else partition.session.room_problem(plan)
            if problem:
                return f"{NO_ROOM}: in partition {number}, {problem}"
        return ""

    def _unfit(self, version: ModelVersion, reason: str) -> None:
        """It gives way to the version before it: a trial can't tell while no partition is open, or of other nodes'."""
        self._tenants.watcher.failing(version.name, version.version, f"{NO_ROOM}: {reason}", at_fault=True)

    def _cluster(self, blobs: BlobStore, table_files: BlobStore) -> Clustering | None:
        config = self._config
        if config.cluster is None:
            return None
        return Clustering(
            config,
            config.cluster,
            self._options,
            self._outputs.changelog,
            blobs,
            table_files,
            self._clock,
            self._supervisor,
        )

    def _all_partitions(self) -> Partitions | Replicas:
        """Those the config gives a node that is alone; those the catalog gives one of a cluster."""
        config, clustering = self._config, self._clustering
        topics = Topics(self._options, config.kafka.replication_factor, config.kafka.create_topics)
        restore = None if clustering is None else clustering.restore
        folders = StateFolders(self._data / "partitions", lambda folder: RocksStore(folder, self._environment), restore)
        outputs: dict[str, TopicSettings] = {
            self._outputs.inferences: {},
            self._outputs.dead_letters: {},
            self._outputs.changelog: KEPT_WHOLE,
            self._outputs.rows: {
                "cleanup.policy": "delete",
                "retention.ms": str(config.kafka.rows_retention_h * 3_600_000),
                "retention.bytes": str(config.kafka.rows_retention_mb * MIB),
                "segment.bytes": str(min(256, config.kafka.rows_retention_mb // 4) * MIB),
            },
        }
        interval_seconds = config.cycle.commit_interval_ms / 1000
        if clustering is not None:
            return clustering.replicas(folders, self._open, interval_seconds, topics, config.kafka.topics, outputs)

        def partition(number: int) -> Partition:
            state = folders.of(number)
            return Partition(number, lambda: self._open(number, state), state, interval_seconds, self._clock)

        return Partitions(topics, config.kafka.topics, outputs, config.kafka.partitions, partition, self._supervisor)

    async def _open(
        self,
        number: int,
        state: StateFolder,
        guard: Callable[[], None] = unguarded,
        changelog: ChangelogReader | None = None,
    ) -> PartitionSession:
        origin = Origin(self._config.node.name, self._config.kafka.topics, number, self._config.schema())
        parts = self._parts(number, state, guard, changelog)
        return await open_session(parts, self._engine, origin, self._counts, self._clock)

    def _parts(
        self, number: int, state: StateFolder, guard: Callable[[], None], changelog: ChangelogReader | None
    ) -> Parts:
        config, clock = self._config, self._clock
        traits = self._traits.setdefault(number, BrokerTraits())
        return Parts(
            state=state,
            outbox=lambda: Outbox(
                self._options,
                self._outputs,
                config.kafka.application,
                number,
                config.transactions,
                config.kafka.compression,
                encode_frame,
                clock,
                traits,
                guard,
            ),
            source=lambda: Source(
                self._options,
                config.kafka.topics,
                number,
                config.cycle.bytes_max,
                config.cycle.start_from,
                config.kafka.on_source_reset,
                clock,
            ),
            changelog=lambda: changelog or Changelog(self._options, self._outputs.changelog, number, clock),
            history=lambda: TopicHistory(self._options, config.kafka.topics, number, self._engine.decoder, clock),
            versions=self._tenants.version,
            bound=self._bound,
            cache_bytes=config.state.row_cache_mb * MIB,
            flushes=self._flushes,
            keep_store=self._clustering is not None,
        )

    def _bound(self, name: ModelName) -> Bound:
        settings = self._tenants.settings(name.tenant)
        policy = self._tenants.overload(name)
        return Bound(settings.rows_waiting_max, policy, settings.mb_waiting_max * MIB, settings.age_waiting_max)


class Tenants:
    """The tenants' side in the words of the HTTP interface."""

    def __init__(self, service: TenantService, checked: Checked) -> None:
        self._service = service
        self._checked = checked

    def plan(self) -> FeaturePlan:
        return self._service.plan()

    def event_features(self, name: ModelName) -> frozenset[str]:
        entry = self._service.watcher.snapshot.models.get(name)
        return frozenset() if entry is None or entry.live is None else event_features(entry.live.manifest)

    def models(self) -> list[ModelInfo]:
        costs, judged, models = self._costs(), self._judged(), self._service.watcher.snapshot.models
        return [info for _, entry in sorted(models.items()) for info in infos(entry, costs, judged, self._checked)]

    def model(self, name: ModelName) -> ModelDetail:
        entry = self._service.watcher.snapshot.models.get(name)
        if entry is None:
            raise NotFound(f"there is no model {printable(str(name))}; /v1/models lists those that are")
        return detail(entry, self._costs(), self._judged(), self._checked)

    async def move_stage(self, name: ModelName, move: StageMove) -> None:
        judging = self._service.judging
        if move.move == "promote":
            await judging.promote(name, move.version, move.live, move.who, move.reason)
        else:
            await judging.roll_back(name, move.version, move.who, move.reason)

    def _costs(self) -> dict[str, ModelCost]:
        tenants = self._service.statistics().pool.tenants
        return {version.version: _cost(version) for tenant in tenants for version in tenant.versions}

    def _judged(self) -> Judged:
        return self._service.runner.figures(), self._service.judging.verdicts

    def shared_features(self) -> SharedFeatures:
        refused = self._service.watcher.snapshot.refused_features
        return SharedFeatures(
            features=[_shared_feature(status) for status in self._service.shared_features()],
            refused={tenant: list(problems) for tenant, problems in sorted(refused.items())},
        )

    def sandbox(self) -> SandboxStatus:
        return sandbox_status(self._service.sandbox)

    def printed(self, tenant: str, after: int) -> TenantLog:
        found = self._service.printed(tenant, after)
        lines = [
            PrintedLine(number=line.number, time_ms=line.time_ms, pid=line.pid, text=line.text) for line in found.lines
        ]
        return TenantLog(tenant=tenant, lines=lines, dropped=found.dropped)

    def share(self, tenant: str) -> TenantShare:
        return msgspec.convert(self._service.share(tenant), TenantShare, from_attributes=True)

    def quota(self, tenant: str) -> TenantQuota:
        found = self._service.quota(tenant)
        return TenantQuota(
            tenant=tenant,
            quota=found.quota.limits(),
            who=found.quota.who,
            at_ms=found.quota.at_ms,
            limits={name: getattr(found.settings, name) for name in QUOTAS},
            asked={name: value for name, value in found.settings.asked.items() if name in QUOTAS},
            models=found.models,
            stored_bytes=found.stored_bytes,
            window_bytes=found.window_bytes,
            refused=dict(found.refused),
        )

    def tenants(self) -> list[TenantStatus]:
        pool, refusals = self._service.statistics().pool, self._service.watcher.refusals
        total = sum(tenant.cpu_seconds for tenant in pool.tenants)
        stages: dict[str, list[StageStatus]] = {}
        checked: dict[str, list[ConsistencyStatus]] = {}
        for _, entry in sorted(self._service.watcher.snapshot.models.items()):
            found = consistency_status(entry.name, self._checked) if entry.live is not None else None
            if found is not None:
                checked.setdefault(entry.name.tenant, []).append(found)
            if entry.staged is not None:
                stages.setdefault(entry.name.tenant, []).append(stage_status(entry.staged, self._judged()))
        return [
            TenantStatus(
                tenant=tenant.tenant,
                weight=tenant.weight,
                cpu_seconds=tenant.cpu_seconds,
                cpu_share=tenant.cpu_seconds / total if total else None,
                calls=tenant.calls,
                rows_queued=sum(version.rows_queued for version in tenant.versions),
                restarts=tenant.restarts,
                worker="running" if tenant.worker else tenant.last_error or "starting",
                memory=_memory(tenant.worker),
                sandbox=None if tenant.worker is None else sandbox_status(tenant.worker.sandbox),
                refused=refusals(tenant.tenant),
                stages=stages.get(tenant.tenant, []),
                consistency=checked.get(tenant.tenant, []),
            )
            for tenant in pool.tenants
        ]


def _shared_feature(status: SharedFeatureStatus) -> SharedFeatureInfo:
    feature, offer, cost = status.feature, status.feature.offer, status.cost
    return SharedFeatureInfo(
        name=str(feature.name),
        owner=offer.owner,
        version=feature.name.version,
        newest=feature.is_newest,
        type=feature.expression.type,
        definition=offer.texts[feature.name.version],
        description=offer.description,
        shared_with=None if offer.shared_with is None else list(offer.shared_with),
        users=list(status.users),
        inputs=list(map(str, status.inputs)),
        aggregates=list(status.aggregates),
        values=cost.values,
        us_per_value=cost.seconds / cost.values * 1e6 if cost.values else None,
    )


def _memory(worker: WorkerStatistics | None) -> MemoryStatus | None:
    if worker is None or worker.memory is None:
        return None
    use = worker.memory
    return MemoryStatus(
        own_bytes=use.own_bytes, shared_bytes=use.shared_bytes, proportional_bytes=use.proportional_bytes
    )


def sandbox_status(report: SandboxReport) -> SandboxStatus:
    return SandboxStatus(layers=list(report.layers), missing=dict(report.missing))


def _cost(version: VersionStatistics) -> ModelCost:
    learned = version.calls > 0  # else it is what the scheduler assumes of any model
    return ModelCost(
        ms_per_call=version.seconds_per_call * 1000 if learned else None,
        ms_per_row=version.seconds_per_row * 1000 if learned else None,
        cpu_seconds=version.cpu_seconds,
        calls=version.calls,
        rows=version.rows,
        rows_queued=version.rows_queued,
    )


def _versions(tables: Mapping[str, Table]) -> set[str]:
    return {version for table in tables.values() for version in table.versions}


def _tenant_service(
    config: Config,
    schema: EventSchema,
    data: Path,
    blobs: BlobStore,
    clock: Clock,
    supervisor: Supervisor,
    publish: ModelPublisher | None,
    warm: WarmProcess | None,
    check_room: Callable[[FeaturePlan], str],
) -> TenantService:
    tenants = config.tenants
    caps = TenantCaps(
        tenants.weight_max,
        tenants.memory_mb_max,
        tenants.rows_queued_max,
        tenants.rows_waiting_max,
        tenants.mb_waiting_max,
        tenants.age_waiting_s_max * 1000,
        tenants.rows_s_max,
        tenants.models_max,
        tenants.stored_bytes_max,
        tenants.window_bytes_max,
    )
    settings = ServiceSettings(
        watch=WatchSettings(
            Path(tenants.directory),
            data / "registry.json",
            caps,
            tenants.settle_ms,
            tenants.rescan_s * 1000,
            row_refusal,
            check_room,
        ),
        sandbox=sandbox_settings(tenants),
        versions=data / "versions",
        parallel=tenants.workers_parallel or max(1, (os.cpu_count() or 2) - 1),
        quantum_seconds=tenants.quantum_ms / 1000,
    )
    kept = Blobs(blobs.put, blobs.get, blobs.names, blobs.delete)
    return TenantService(settings, schema, kept, clock, supervisor, publish, warm)


async def sandbox_report(config: Config) -> dict[str, object]:
    """The sandbox of a worker started from this process: `layers`, `missing` with reasons, `required`, and `lacking`:
    what is required and missing. Raises WorkerLost."""
    settings = SandboxSettings(required=frozenset())
    server = WarmServer(settings, SystemClock(), ControlGroups.of_this_process())
    try:
        await server.start()
        report = await server.probe()
    finally:
        await server.stop()
    required = sorted(set(config.tenants.sandbox_required))
    lacking = [layer for layer in required if layer not in report.layers]
    return {"layers": report.layers, "missing": report.missing, "required": required, "lacking": lacking}


def row_refusal(plan: FeaturePlan) -> str:
    """Why a customer's row can't hold what the plan needs; '' when it can."""
    try:
        Layout.empty().grown(plan.aggregates, plan.stored_models)
    except BoundExceeded as refusal:
        return str(refusal)
    return ""


def client_options(kafka: KafkaSection, client_id: str) -> ClientOptions:
    """What every Kafka client of the node is made with. Raises ConfigError when its files can't be read."""
    options: dict[str, object] = {
        "bootstrap_servers": list(kafka.bootstrap),
        "client_id": client_id,
        "security_protocol": kafka.security_protocol,
        "request_timeout_ms": 30_000,
    }
    if kafka.security_protocol.endswith("SSL"):
        options["ssl_context"] = kafka.ssl_context()
    password = kafka.sasl_password()
    if password is not None:
        options["sasl_mechanism"] = kafka.sasl_mechanism
        options["sasl_plain_username"] = kafka.sasl_username
        options["sasl_plain_password"] = password
    return options


def _settle_garbage_collector() -> None:
    """Leave what start-up made out of every later collection, and collect rarely.

    A full collection over all that is imported stops the loop for 50 ms and more, and the hot path makes few cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE_THRESHOLDS)


async def _first(*waits: Awaitable[object]) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def run(config: Config, warm: WarmProcess) -> int:
    """Run a node until SIGTERM or SIGINT; gives the exit code. Raises ConfigError."""

    async def main() -> int:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        return await Node(config, SystemClock(), warm).run(stopping)

    with locked(Path(config.node.data_dir)):
        return uvloop.run(main())
