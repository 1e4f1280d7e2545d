"""(P) What the scheduler tells of its tenants and their models, since they came."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelShare:
    weight: float
    rows_queued: int
    rows_running: int
    rows_done: int
    calls: int
    cpu_seconds: float
    seconds_per_call: float
    seconds_per_row: float
    blocked: bool


@dataclass(frozen=True, slots=True)
class TenantShare:
    """`forgiven_seconds`: CPU time the tenant could have had but its one worker could not take."""

    weight: float
    virtual_time: float
    cpu_seconds: float
    forgiven_seconds: float
    calls: int
    running: bool
    blocked: bool
    models: dict[str, ModelShare]


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    parallel: int
    running: int
    virtual_time: float
    tenants: dict[str, TenantShare]
