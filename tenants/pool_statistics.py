"""What the model pool tells of its tenants and their versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from node.kernel.types import ModelVersion
from tenants.scheduler_statistics import SchedulerStatistics
from tenants.workers import WorkerProcess, WorkerStatistics

VersionState: TypeAlias = Literal["fetching", "fetched", "loaded", "failing"]


@dataclass(frozen=True, slots=True)
class VersionStatistics:
    """Times in CPU seconds; `rows` and `calls` since the version came here."""

    model: str
    version: str
    state: VersionState
    rows: int
    calls: int
    cpu_seconds: float
    rows_queued: int
    seconds_per_call: float
    seconds_per_row: float
    rows_failed: int
    last_error: str


@dataclass(frozen=True, slots=True)
class TenantStatistics:
    """`calls` and `cpu_seconds` are of all its versions, also of those that are gone."""

    tenant: str
    weight: float
    cpu_seconds: float
    calls: int
    restarts: int
    backoff_ms: int
    last_error: str
    worker: WorkerStatistics | None
    versions: tuple[VersionStatistics, ...]


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    tenants: tuple[TenantStatistics, ...]
    scheduler: SchedulerStatistics


class PoolVersion(Protocol):
    """What is told of a version as the pool has it."""

    @property
    def version(self) -> ModelVersion: ...
    @property
    def key(self) -> str: ...
    @property
    def state(self) -> VersionState: ...
    @property
    def rows_failed(self) -> int: ...
    @property
    def last_error(self) -> str: ...


class PoolTenant(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def versions(self) -> Mapping[str, PoolVersion]: ...
    @property
    def worker(self) -> WorkerProcess | None: ...
    @property
    def restarts(self) -> int: ...
    @property
    def backoff_ms(self) -> int: ...
    @property
    def last_error(self) -> str: ...


def tenant_statistics(tenant: PoolTenant, shares: SchedulerStatistics) -> TenantStatistics:
    share = shares.tenants[tenant.name]
    versions = []
    for known in tenant.versions.values():
        model = share.models[known.key]
        versions.append(
            VersionStatistics(
                model=known.version.name.model,
                version=known.version.version,
                state=known.state,
                rows=model.rows_done,
                calls=model.calls,
                cpu_seconds=model.cpu_seconds,
                rows_queued=model.rows_queued,
                seconds_per_call=model.seconds_per_call,
                seconds_per_row=model.seconds_per_row,
                rows_failed=known.rows_failed,
                last_error=known.last_error,
            )
        )
    return TenantStatistics(
        tenant=tenant.name,
        weight=share.weight,
        cpu_seconds=share.cpu_seconds,
        calls=share.calls,
        restarts=tenant.restarts,
        backoff_ms=tenant.backoff_ms,
        last_error=tenant.last_error,
        worker=tenant.worker.statistics() if tenant.worker else None,
        versions=tuple(versions),
    )
