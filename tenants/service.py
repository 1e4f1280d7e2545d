"""All of tenants' models behind one object: the watched directory, the registry, the plan and the pool."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from node.kernel.clock import Clock
from node.kernel.limits import MODELS_PER_TENANT_MAX, TENANTS_MAX
from node.kernel.ports import FeaturePlan
from node.kernel.supervise import Supervisor
from node.kernel.types import EventSchema, ModelName, ModelVersion
from tenants.features import compile_plan
from tenants.folder import replace_file
from tenants.manifest import TenantSettings
from tenants.pool import ModelPool, PoolStatistics
from tenants.registry import Snapshot
from tenants.sandbox import SandboxSettings
from tenants.watch import Blobs, ModelWatcher, WatchSettings, WatchStatistics
from tenants.workers import WarmServer

log = structlog.get_logger(__name__)

_VERSIONS_REMEMBERED_MAX = 4 * TENANTS_MAX * MODELS_PER_TENANT_MAX


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
        self, settings: ServiceSettings, schema: EventSchema, blobs: Blobs, clock: Clock, supervisor: Supervisor
    ) -> None:
        self._settings = settings
        self._schema = schema
        self._blobs = blobs
        self._plan: FeaturePlan = compile_plan((), schema)
        self._versions: dict[str, ModelVersion] = {}
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
        """What a trigger of an earlier cycle has to run on; None once its model was deleted."""
        entry = self.watcher.snapshot.models.get(name)
        if entry is None or (entry.live is None and entry.newest is None):
            return None
        return self._versions.get(version) or self._recall(version)

    def settings(self, tenant: str) -> TenantSettings:
        return self.watcher.snapshot.tenants.get(tenant) or TenantSettings(tenant)

    def statistics(self) -> ServiceStatistics:
        return ServiceStatistics(self.watcher.statistics(), self.runner.statistics())

    async def _fetch(self, sha256: str) -> bytes:
        return await asyncio.to_thread(self._blobs.get, sha256)

    def _changed(self, snapshot: Snapshot) -> None:
        self._plan = compile_plan(snapshot.live, self._schema)
        for version, _ in snapshot.live:
            self._remember(version)
        log.info("models changed", snapshot=snapshot.number, live=[str(version.name) for version, _ in snapshot.live])

    def _remember(self, version: ModelVersion) -> None:
        if version.version in self._versions:
            return
        if len(self._versions) >= _VERSIONS_REMEMBERED_MAX:
            self._versions.pop(next(iter(self._versions)))
        self._versions[version.version] = version
        self._settings.versions.mkdir(parents=True, exist_ok=True)
        replace_file(self._settings.versions / version.version, msgspec.json.encode(version))

    def _recall(self, version: str) -> ModelVersion | None:
        try:
            content = (self._settings.versions / version).read_bytes()
            recalled = msgspec.json.decode(content, type=ModelVersion)
        except (OSError, msgspec.MsgspecError) as failure:
            log.error("a version that triggers wait for is not known any more", version=version, error=str(failure))
            return None
        self._versions[version] = recalled
        return recalled
