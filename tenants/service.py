"""All of tenants' models behind one object: the watched directory, the registry, the plan and the pool."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import structlog

from node.kernel.clock import Clock
from node.kernel.errors import StoreUnavailable
from node.kernel.ports import FeaturePlan
from node.kernel.supervise import Supervisor
from node.kernel.types import AgreedModels, EventSchema, ModelName, ModelVersion
from tenants.agreement import ModelPublisher
from tenants.features import compile_plan
from tenants.manifest import TenantSettings
from tenants.pool import ModelPool, PoolStatistics
from tenants.registry import Snapshot
from tenants.sandbox import SandboxSettings
from tenants.versions import VersionFolder
from tenants.watch import Blobs, ModelWatcher, WatchSettings, WatchStatistics
from tenants.workers import WarmServer

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """`versions` is a folder that keeps what every live version was, so that old triggers still run after a restart."""

    watch: WatchSettings
    sandbox: SandboxSettings
    versions: Path
    parallel: int
    quantum_seconds: float


@dataclass(frozen=True, slots=True)
class ServiceStatistics:
    watch: WatchStatistics
    pool: PoolStatistics


class TenantService:
    """Raises ConfigError when the operator's profile in `schema` is wrong."""

    def __init__(
        self,
        settings: ServiceSettings,
        schema: EventSchema,
        blobs: Blobs,
        clock: Clock,
        supervisor: Supervisor,
        publish: ModelPublisher | None = None,
    ) -> None:
        self._publish = publish
        self._agreed = AgreedModels(0)
        self._settings = settings
        self._schema = schema
        self._blobs = blobs
        self._plan: FeaturePlan = compile_plan((), schema)
        self._versions = VersionFolder(settings.versions)
        self._server = WarmServer(settings.sandbox, clock)
        self.watcher = ModelWatcher(
            settings.watch,
            schema,
            self._server,
            blobs,
            clock,
            supervisor,
            self._changed,
            lambda action: self.runner.act(action),
            self._collect,
        )
        self.runner = ModelPool(
            self._server,
            self._fetch,
            clock,
            supervisor,
            settings.parallel,
            settings.quantum_seconds,
            on_failing=self.watcher.failing,
        )

    async def start(self) -> None:
        """Models that were live before are live when this returns.

        Raises WorkerLost, ManifestError, SandboxUnavailable.
        """
        await self._server.start()
        await self.watcher.start()

    async def caught_up(self, seconds_max: float) -> None:
        """Wait until what is in the directory has been tried, so that a fresh node's first events find their models."""
        try:
            async with asyncio.timeout(seconds_max):
                await self.watcher.caught_up.wait()
        except TimeoutError:
            log.warning("models are still on trial; events go on without them", seconds=seconds_max)

    async def stop(self) -> None:
        await self.runner.stop()
        await self._server.stop()

    def plan(self) -> FeaturePlan:
        """The plan of the models that are live now; a new object whenever they change."""
        return self._plan

    def version(self, name: ModelName, version: str) -> ModelVersion | None:
        """What a trigger of an earlier cycle has to run on; None once its model was deleted.

        Raises StoreUnavailable while that can't be told: the disk refuses, or models are still being tried.
        """
        known = self._versions.recall(version) if name in self.watcher.snapshot.models else None
        if known is None and not self.watcher.caught_up.is_set():
            raise StoreUnavailable(
                f"models are still being tried, {name} may be one of them: its waiting triggers wait on; if this lasts,"
                " look whether the watched directory can be read"
            )
        return known

    def agreed(self, models: AgreedModels) -> None:
        """What the cluster's catalog says now: from here on it alone is live. Called on the loop, after each change.

        Must have been called once before a partition is opened; an older revision than before is ignored.
        """
        if models.revision >= self._agreed.revision:
            self._agreed = models

    def settings(self, tenant: str) -> TenantSettings:
        return self.watcher.snapshot.tenants.get(tenant) or TenantSettings(tenant)

    def statistics(self) -> ServiceStatistics:
        return ServiceStatistics(self.watcher.statistics(), self.runner.statistics())

    async def _fetch(self, sha256: str) -> bytes:
        return await asyncio.to_thread(self._blobs.get, sha256)

    def _changed(self, snapshot: Snapshot) -> None:
        self._plan = compile_plan(snapshot.live, self._schema)
        self._versions.keep(version for version, _ in snapshot.live)
        log.info("models changed", snapshot=snapshot.number, live=[str(version.name) for version, _ in snapshot.live])

    def _collect(self, snapshot: Snapshot) -> None:
        """Remove what no model needs any more. Blocking. Raises StoreUnavailable."""
        newest = [entry.newest for entry in snapshot.models.values() if entry.newest is not None]
        versions = {version.version for version, _ in snapshot.live} | {one.version for one in newest}
        blobs = {version.blob for version, _ in snapshot.live} | {one.blob for one in newest}
        kept = self._versions.collect(snapshot.models.keys(), versions)
        self._versions.forget(kept.dropped)
        unneeded = set(self._blobs.names()) - kept.blobs - blobs
        for sha256 in unneeded:
            self._blobs.delete(sha256)
        if kept.dropped or unneeded:
            log.info("unneeded models removed", versions=len(kept.dropped), files=len(unneeded))
