"""What the pool knows of each tenant and of each version that it runs."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from node.kernel import limits
from node.kernel.types import ModelName, ModelVersion
from tenants.failure_rate import FailureRate
from tenants.manifest import TenantSettings
from tenants.pool_statistics import VersionState
from tenants.workers import WorkerProcess


def key_of(version: ModelVersion) -> str:
    """Among those of its tenant: the same files under two names make the same version, and are two models."""
    return f"{version.name.model} {version.version}"


@dataclass(slots=True, eq=False)
class PooledVersion:
    """A version that the pool runs, or is to unload."""

    version: ModelVersion
    text_features: tuple[str, ...]
    state: VersionState = "fetching"
    model: bytes | None = None
    """The file, from when it was fetched until it is loaded; of a tenant's versions one has it at a time."""
    fetch: asyncio.Task[None] | None = None
    losses: int = 0
    beside: bool = False  # its model's live version: what waits for the one must not fill the queue of the other
    retired: bool = False
    failed_at: float = 0.0
    reason: str = ""
    last_error: str = ""
    rows_failed: int = 0
    fatal_rows: deque[float] = field(default_factory=lambda: deque(maxlen=limits.FATAL_ROWS_MAX))
    """When single rows were given up that took workers along; of a version beside the live one, when any did."""
    rate: FailureRate = field(default_factory=FailureRate)
    parked: bool = False
    """It is failing, and what is queued waits for the version that takes over."""

    @property
    def key(self) -> str:
        return key_of(self.version)


@dataclass(slots=True, eq=False)
class PooledTenant:
    """A tenant, its worker and its versions."""

    settings: TenantSettings
    versions: dict[str, PooledVersion] = field(default_factory=dict)
    """By `key_of`."""
    admitted: dict[str, tuple[ModelName, bool]] = field(default_factory=dict)
    """By `key_of`, what is to run, whether it is in `versions` or not: its model, and whether beside the live one."""
    worker: WorkerProcess | None = None
    keeper: asyncio.Task[None] | None = None
    batch: asyncio.Task[None] | None = None
    memory_mb: int = 0
    """Of the worker."""
    lost: bool = False
    """The worker is known to be dying; its `lost` follows."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    backoff_ms: int = 0
    restarts: int = 0
    last_error: str = ""

    @property
    def name(self) -> str:
        return self.settings.tenant
