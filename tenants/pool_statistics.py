"""What the model pool tells of its tenants and their versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from tenants.scheduler import SchedulerStatistics
from tenants.workers import WorkerStatistics

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
    tenant: str
    weight: float
    cpu_seconds: float
    restarts: int
    backoff_ms: int
    last_error: str
    worker: WorkerStatistics | None
    versions: tuple[VersionStatistics, ...]


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    tenants: tuple[TenantStatistics, ...]
    scheduler: SchedulerStatistics
