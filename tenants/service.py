"""All of tenants' models behind one object: the watched directory, the registry, the plan and the pool."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from node.kernel.clock import Clock
from node.kernel.errors import BoundExceeded, ManifestError, NotFound, StoreUnavailable, WorkerLost, printable
from node.kernel.limits import TENANTS_MAX
from node.kernel.ports import FeaturePlan
from node.kernel.supervise import Supervisor
from node.kernel.types import AgreedModels, EventSchema, ModelName, ModelVersion, OverloadPolicy, Quota, StagedVersion
from tenants.agreement import ModelPublisher, read_version
from tenants.cgroups import ControlGroups
from tenants.definitions import NOTHING_SHARED
from tenants.explanation import ShareExplained, TenantFacts, explain
from tenants.feature_listing import FeatureCosts, SharedFeatureStatus, listing
from tenants.judging import Judging
from tenants.manifest import Manifest, TenantSettings
from tenants.pool import ModelPool
from tenants.pool_statistics import PoolStatistics
from tenants.quotas import models_of, window_bytes_of
from tenants.registry import Shared, Snapshot
from tenants.reserve import reserve_of
from tenants.sandbox import SandboxReport, SandboxSettings
from tenants.shared_names import taken_as_number
from tenants.staged_plan import plan_of
from tenants.staged_runner import StagedRunner
from tenants.tenant_log import LogLine
from tenants.versions import VersionFolder, alike
from tenants.warm_process import WarmProcess
from tenants.watch import Blobs, ModelWatcher, WatchSettings, WatchStatistics
from tenants.workers import WarmServer

log = structlog.get_logger(__name__)

_FETCH_SECONDS = 5.0
"""A file that is awaited may come unannounced, when it was lost on this disk and fetched again."""


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """`versions` is a folder that keeps what every live version was, so that old triggers still run after a restart."""

    watch: WatchSettings
    sandbox: SandboxSettings
    versions: Path
    parallel: int
    quantum_seconds: float


@dataclass(frozen=True, slots=True)
class TenantPrinted:
    """`dropped` lines were there before, and went for newer ones."""

    lines: tuple[LogLine, ...]
    dropped: int


@dataclass(frozen=True, slots=True)
class QuotaReport:
    """`settings` hold now; `models` count, their outputs take `stored_bytes` of each customer's row, and the windows it
    asks for `window_bytes`."""

    quota: Quota
    settings: TenantSettings
    models: int
    stored_bytes: int
    window_bytes: int
    refused: Mapping[str, int]
    """Quota -> pairs refused because of it, since the node started."""


@dataclass(frozen=True, slots=True)
class ServiceStatistics:
    watch: WatchStatistics
    pool: PoolStatistics


class TenantService:
    """Without `publish` a node by itself: a pair that passes its trial is live. With it a node of a cluster: it is
    published, and what is live is what `agreed` says.

    `warm` is the process of its workers where that was started ahead of the node, with `settings.sandbox`. Raises
    ConfigError when the operator's profile in `schema` is wrong.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        schema: EventSchema,
        blobs: Blobs,
        clock: Clock,
        supervisor: Supervisor,
        publish: ModelPublisher | None = None,
        warm: WarmProcess | None = None,
    ) -> None:
        self._agreed_blobs: frozenset[str] = frozenset()
        self._blobs_changed = asyncio.Event()
        self._settings = settings
        self._schema = schema
        self._blobs = blobs
        self._live: tuple[tuple[ModelVersion, Manifest], ...] = ()
        self._beside: tuple[tuple[StagedVersion, Manifest], ...] = ()
        self._reserve: tuple[Manifest, ...] = ()
        self._definitions = NOTHING_SHARED
        self._timer = clock.monotonic
        self._plan = plan_of((), (), schema, NOTHING_SHARED)
        self.feature_costs = FeatureCosts()
        self._versions = VersionFolder(settings.versions)
        self._supervisor = supervisor
        self._clock = clock
        self.sandbox = SandboxReport(())
        """Of all workers here; empty before the start."""
        groups = ControlGroups.of_this_process() if warm is None else warm.groups
        self._server = WarmServer(settings.sandbox, clock, groups, warm)
        self.watcher = ModelWatcher(
            settings.watch,
            schema,
            self._server,
            blobs,
            clock,
            supervisor,
            self._changed,
            lambda action: self.pool.act(action),
            self._collect,
            publish,
        )
        self.pool = ModelPool(
            self._server,
            self._fetch,
            clock,
            supervisor,
            settings.parallel,
            settings.quantum_seconds,
            on_failing=self.watcher.failing,
        )
        self.runner = StagedRunner(self.pool)
        self.judging = Judging(lambda: self.watcher.snapshot, self.runner.figures, clock, self.watcher.decide, publish)

    async def start(self) -> None:
        """Models that were live before are live when this returns.

        Raises WorkerLost, ManifestError, SandboxUnavailable.
        """
        try:
            await self._server.start()
        except WorkerLost as lost:
            raise WorkerLost(
                f"no model can run, so the node ends: {lost}; mend that and start the node again"
            ) from lost
        self.sandbox = await self._server.probe()
        log.info("sandbox of workers", layers=self.sandbox.layers)
        for layer, reason in self.sandbox.missing.items():
            log.warning("a layer of the sandbox is missing", layer=layer, reason=reason)
        await self.watcher.start()
        self._supervisor.start("watch of workers", self.pool.keep_watch())
        self._supervisor.start("judge of stages", self.judging.run())

    async def caught_up(self, seconds_max: float) -> None:
        """Wait until what is in the directory has been tried, so that a fresh node's first events find their models."""
        try:
            async with asyncio.timeout(seconds_max):
                await self.watcher.caught_up.wait()
        except TimeoutError:
            log.warning("models are still on trial; events go on without them", seconds=seconds_max)

    async def stop(self) -> None:
        await self.pool.stop()
        await self._server.stop()

    def plan(self) -> FeaturePlan:
        """The plan of the models that are live now; a new object whenever they change."""
        return self._plan

    def version(self, name: ModelName, version: str) -> ModelVersion | None:
        """What a trigger of an earlier cycle has to run on; None once its model was deleted.

        Raises StoreUnavailable while that can't be told: the disk refuses, models are still being tried, or nothing of
        the cluster's is known yet.
        """
        shared = self.watcher.snapshot.shared
        if shared is not None:
            known = self._agreed_version(shared, name, version)
            return self._instead(name, known, shared.standing(name, version) == "quarantined")
        known = self._versions.recall(name, version) if name in self.watcher.snapshot.models else None
        if known is None and not self.watcher.caught_up.is_set():
            raise StoreUnavailable(
                f"models are still being tried, {name} may be one of them: its waiting triggers wait on; if this lasts,"
                " look whether the watched directory can be read"
            )
        entry = self.watcher.snapshot.models.get(name)
        return self._instead(name, known, entry is not None and version in entry.quarantined)

    def _instead(self, name: ModelName, known: ModelVersion | None, quarantined: bool) -> ModelVersion | None:
        """The live version in place of a quarantined one whose rows and outputs are like its own."""
        entry = self.watcher.snapshot.models.get(name)
        if not quarantined or known is None or entry is None or entry.live is None:
            return known
        live = entry.live.version
        return live if alike(live, known) else known

    def _agreed_version(self, shared: Shared, name: ModelName, version: str) -> ModelVersion | None:
        """By the catalog; what it has forgotten already, this node may still have on disk."""
        if not self.watcher.heard:
            raise StoreUnavailable(f"the cluster's catalog is not known here yet, {name} may be in it; wait")
        agreed = shared.version(name, version)
        known = self._versions.recall(name, version) if name in shared.versions else None
        if known is not None or agreed is None:
            return known
        try:
            read = read_version(agreed, self._schema, taken_as_number)
        except ManifestError as error:
            raise StoreUnavailable(f"version {version[:12]} of {name} can't be run on this node: {error}") from error
        self._versions.remember(read.version)
        return read.version

    def agreed(self, models: AgreedModels) -> None:
        """What the cluster's catalog says now: from here on it alone is live. Called on the loop, after each change.

        Must have been called once before a partition is opened; an older revision than before is ignored.
        """
        if not self.watcher.agreed(models):
            return
        self._agreed_blobs = frozenset(version.blob for version in models.versions)
        self._blobs_changed.set()
        self._blobs_changed = asyncio.Event()

    def printed(self, tenant: str, after: int = 0) -> TenantPrinted:
        """What the tenant's models printed, the lines after number `after`. Raises NotFound."""
        found = self._server.logs.find(tenant)
        if found is not None:
            return TenantPrinted(tuple(found.lines(after)), found.dropped)
        if tenant not in self.watcher.snapshot.tenants:
            raise NotFound(f"no tenant {printable(tenant)} is known here; /v1/status lists those that are")
        return TenantPrinted((), 0)

    def share(self, tenant: str) -> ShareExplained:
        """What the tenant asked of its worker of late, what it got, and what held it back. Raises NotFound."""
        known = {one.tenant: one for one in self.pool.statistics().tenants}
        if tenant not in known:
            raise NotFound(f"no tenant {printable(tenant)} is known here; /v1/status lists those that are")
        settings, figures = self.settings(tenant), known[tenant]
        broken = [
            f"{one.model} {one.version[:12]} can't run: {one.last_error}"
            for one in figures.versions
            if one.state == "failing"
        ]
        lost = [f"its worker was lost {figures.restarts} times, the last: {figures.last_error}"]
        facts = TenantFacts(
            tenant,
            figures.weight,
            settings.rows_s_max,
            settings.memory_mb,
            self._settings.parallel,
            frozenset(settings.asked),
            "" if figures.worker is not None else figures.last_error or "it is starting, as soon as it has a model",
            (*(lost if figures.restarts else ()), *broken),
        )
        return explain(self.pool.windows(tenant), facts)

    def settings(self, tenant: str) -> TenantSettings:
        return self.watcher.snapshot.settings(tenant)

    async def change_quota(self, tenant: str, changes: Mapping[str, float | None], who: str) -> None:
        """What an operator allows the tenant from now on, on a node by itself; None: what holds for all tenants.

        Raises BoundExceeded when there are too many quotas.
        """
        quotas = self.watcher.snapshot.quotas
        if tenant not in quotas and len(quotas) >= TENANTS_MAX:
            raise BoundExceeded(f"{len(quotas)} tenants have quotas, the most that may (TENANTS_MAX); clear one first")
        quota = quotas.get(tenant, Quota()).changed(changes, who, self._clock.now_ms())
        await self.watcher.set_quota(tenant, quota)
        log.info("an operator has set a quota", tenant=tenant, who=who, **changes)

    def quota(self, tenant: str) -> QuotaReport:
        """What the tenant may have, by whom, and what it has; also of one that is to come."""
        snapshot = self.watcher.snapshot
        models = models_of(snapshot, tenant)
        quota, settings = snapshot.quotas.get(tenant, Quota()), self.watcher.settings(tenant)
        windows = window_bytes_of(snapshot, tenant, self._schema)
        refused = self.watcher.refusals(tenant)
        return QuotaReport(quota, settings, len(models), sum(models.values()), windows, refused)

    def overload(self, name: ModelName) -> OverloadPolicy:
        """What of the model's waiting triggers goes when it falls behind: as its live version's manifest says, or else
        its tenant's settings."""
        entry = self.watcher.snapshot.models.get(name)
        own = entry.live.manifest.overload if entry is not None and entry.live is not None else None
        return own or self.settings(name.tenant).overload

    def shared_features(self) -> list[SharedFeatureStatus]:
        """Every shared feature in force, by name and version."""
        costs = self.feature_costs.with_more(self._plan.compiled.shared_costs())
        return listing(self.watcher.snapshot, costs)

    def statistics(self) -> ServiceStatistics:
        return ServiceStatistics(self.watcher.statistics(), self.pool.statistics())

    async def _fetch(self, sha256: str) -> bytes:
        """A file that the catalog names comes here sooner or later, so it is waited for."""
        while True:
            changed = self._blobs_changed
            try:
                return await asyncio.to_thread(self._blobs.get, sha256)
            except NotFound:
                if sha256 not in self._agreed_blobs:
                    raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FETCH_SECONDS):
                    await changed.wait()

    def _changed(self, snapshot: Snapshot) -> None:
        running = self._live, self._beside
        if (snapshot.live, snapshot.beside) != running or snapshot.definitions is not self._definitions:
            self._live, self._beside, self._definitions = snapshot.live, snapshot.beside, snapshot.definitions
            self.feature_costs.add(self._plan.compiled.shared_costs())
            self._plan = plan_of(self._live, self._beside, self._schema, self._definitions, self._timer)
            self._reserve = ()
        reserve = reserve_of(snapshot, self._schema)
        if reserve != self._reserve:
            self._reserve = reserve
            self._plan = self._plan.with_reserve(self._reserve, self._definitions)
        self._versions.keep(self._running(snapshot))
        self.runner.observe(snapshot)
        self.judging.changed.set()
        log.info("models changed", snapshot=snapshot.number, live=[str(version.name) for version, _ in snapshot.live])

    @staticmethod
    def _running(snapshot: Snapshot) -> list[ModelVersion]:
        return [*(version for version, _ in snapshot.live), *(staged.version for staged, _ in snapshot.beside)]

    def _collect(self, snapshot: Snapshot) -> None:
        """Remove what no model needs any more. Blocking. Raises StoreUnavailable."""
        newest = [entry.newest for entry in snapshot.models.values() if entry.newest is not None]
        kept_live = self._running(snapshot)
        kept_live += [entry.previous.version for entry in snapshot.models.values() if entry.previous is not None]
        versions = {version.version for version in kept_live} | {one.version for one in newest}
        blobs = {version.blob for version in kept_live} | {one.blob for one in newest}
        models = snapshot.models.keys() | (snapshot.shared.versions.keys() if snapshot.shared is not None else set())
        kept = self._versions.collect(models, versions)
        self._versions.forget(kept.dropped)
        unneeded = set(self._blobs.names()) - kept.blobs - blobs
        unneeded -= self._agreed_blobs  # as of now: what came after the snapshot must not go
        for sha256 in unneeded:
            self._blobs.delete(sha256)
        if kept.dropped or unneeded:
            log.info("unneeded models removed", versions=len(kept.dropped), files=len(unneeded))
