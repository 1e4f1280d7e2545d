"""Ten tenants that always have work, in a real pool with sandboxed workers: their shares, and all they get done."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import first_come
import neighbours
import numpy as np
import shares

from node.kernel.clock import SystemClock
from node.kernel.supervise import Supervisor
from node.kernel.types import FeatureRows, ModelName, ModelOutputs, ModelVersion
from tenants import pool as pools
from tenants.manifest import TenantSettings
from tenants.sandbox import SandboxSettings
from tenants.scheduler import Scheduler
from tenants.workers import WarmServer

COSTS_S = (1e-6, 2.6e-6, 6.6e-6, 17e-6, 44e-6, 113e-6, 290e-6, 740e-6, 1.9e-3, 5e-3)
WEIGHTS = (1.0, 4.0, 2.0, 5.0, 3.0, 3.0, 5.0, 2.0, 4.0, 1.0)
WINDOW_S = 10.0
SAMPLE_S = 0.25
TICKET_SECONDS = 0.1
"""CPU time that one submission asks for, up to TICKET_ROWS_MAX rows."""
TICKET_ROWS_MAX = 4096
TICKETS_HELD = 3
"""Of each tenant, waiting or running: it is never without work."""
LOAD_S_MAX = 120.0
DEADLINE_MS = 60_000
"""Of a call: no batch may be lost here, however slow the machine is."""


@dataclass(frozen=True, slots=True)
class Tenant:
    name: str
    weight: float
    version: ModelVersion
    model: bytes
    cost_wanted_s: float


def made(per_neighbour: float) -> list[Tenant]:
    import joblib

    tenants = []
    for number, (cost, weight) in enumerate(zip(COSTS_S, WEIGHTS, strict=True)):
        stream = io.BytesIO()
        joblib.dump(neighbours.of_cost(cost, per_neighbour), stream)
        blob = hashlib.sha256(stream.getvalue()).hexdigest()
        name = ModelName(f"t{number}", "score")
        version = hashlib.sha256(f"{blob} {name}".encode()).hexdigest()
        columns = neighbours.COLUMNS
        known = ModelVersion(name, version, blob, ("any",), columns, ("score",), "predict", 0, DEADLINE_MS)
        tenants.append(Tenant(name.tenant, weight, known, stream.getvalue(), cost))
    return tenants


@contextlib.asynccontextmanager
async def running(
    tenants: Sequence[Tenant], scheduler: Callable[..., Scheduler] = Scheduler, parallel: int = 1
) -> AsyncIterator[pools.ModelPool]:
    """A pool with every tenant's model loaded, under the scheduler of that class."""
    clock, supervisor = SystemClock(), Supervisor()
    server = WarmServer(SandboxSettings(), clock)
    await server.start()
    files = {tenant.version.blob: tenant.model for tenant in tenants}

    async def fetch(blob: str) -> bytes:
        return files[blob]

    before, pools.Scheduler = pools.Scheduler, scheduler  # type: ignore[misc]
    try:
        pool = pools.ModelPool(server, fetch, clock, supervisor, parallel)
    finally:
        pools.Scheduler = before  # type: ignore[misc]
    try:
        for tenant in tenants:
            pool.configure(TenantSettings(tenant.name, weight=tenant.weight, rows_queued_max=65_536))
            pool.admit(tenant.version)
        async with asyncio.timeout(LOAD_S_MAX):
            await asyncio.gather(*(_felt_out(pool, tenant) for tenant in tenants))
        yield pool
    finally:
        await pool.stop()
        await server.stop()
        await supervisor.stop()


async def _felt_out(pool: pools.ModelPool, tenant: Tenant) -> None:
    """Until its cost is known: the first batches are small."""
    for rows in (16, 64, 256, 1024, 4096):
        await answered(pool, tenant, min(rows, ticket_rows(tenant.cost_wanted_s)))


def ticket_rows(seconds_per_row: float) -> int:
    return int(max(1, min(TICKET_ROWS_MAX, TICKET_SECONDS / seconds_per_row)))


async def answered(pool: pools.ModelPool, tenant: Tenant, count: int) -> ModelOutputs:
    rows = np.random.default_rng(count).random((count, len(neighbours.COLUMNS)))
    outputs = await pool.submit(tenant.version, FeatureRows(neighbours.COLUMNS, rows))
    if outputs.errors:
        raise RuntimeError(f"rows of {tenant.name} failed: {next(iter(outputs.errors.values()))}")
    return outputs


class Service:
    """CPU seconds and rows that each tenant has had: the kernel's own count of its worker, not the scheduler's."""

    def __init__(self, pool: pools.ModelPool, tenants: Sequence[Tenant]) -> None:
        self._pool = pool
        found = {known.tenant: known.worker for known in pool.statistics().tenants}
        self._workers = [found[tenant.name] for tenant in tenants]

    def cpu_s(self) -> list[float]:
        # The clock's id is made as glibc's clock_getcpuclockid(3) makes it.
        return [time.clock_gettime((~worker.pid << 3) | 2) for worker in self._workers if worker is not None]

    def rows(self) -> dict[str, int]:
        return {
            known.tenant: sum(version.rows for version in known.versions) for known in self._pool.statistics().tenants
        }


async def measured(
    tenants: Sequence[Tenant], shares_s: float, goodput_s: float, rounds: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shares and goodput. Both pools are loaded once and stay: one that has nothing to do costs nothing."""
    async with running(tenants) as fair, running(tenants, first_come.FirstCome) as unfair:
        found = await fair_shares(fair, tenants, shares_s)
        costs_s = {name: tenant["us_per_row"] / 1e6 for name, tenant in found["tenants"].items()}
        return found, await goodput({"fair": fair, "first_come": unfair}, tenants, costs_s, goodput_s, rounds)


async def fair_shares(pool: pools.ModelPool, tenants: Sequence[Tenant], seconds: float) -> dict[str, Any]:
    """All of them backlogged for so long: Jain's index of every window, and what each had."""
    feeders = [asyncio.ensure_future(_feed(pool, tenant)) for tenant in tenants for _ in range(TICKETS_HELD)]
    try:
        service = Service(pool, tenants)
        await asyncio.sleep(1.0)
        rows_before, times, totals = service.rows(), [time.monotonic()], [service.cpu_s()]
        while times[-1] - times[0] < seconds:
            await asyncio.sleep(SAMPLE_S)
            for feeder in feeders:
                if feeder.done():
                    feeder.result()
            times.append(time.monotonic())
            totals.append(service.cpu_s())
        rows_after = service.rows()
    finally:
        for feeder in feeders:
            feeder.cancel()
        await asyncio.gather(*feeders, return_exceptions=True)
    window = min(WINDOW_S, seconds / 2)
    weights = [tenant.weight for tenant in tenants]
    indexes = shares.jain_by_window(times, np.array(totals), weights, window)
    used = np.array(totals[-1]) - np.array(totals[0])
    return {
        "jain_min": round(min(indexes), 5),
        "jain_median": round(statistics.median(indexes), 5),
        "window_s": window,
        "windows": len(indexes),
        "slot_used": round(float(used.sum()) / (times[-1] - times[0]), 3),
        "tenants": {
            tenant.name: {
                "weight": tenant.weight,
                "us_per_row_wanted": tenant.cost_wanted_s * 1e6,
                "us_per_row": round(float(cpu) * 1e6 / max(1, rows_after[tenant.name] - rows_before[tenant.name]), 2),
                "cpu_share_of_fair": round(float(cpu / used.sum()) / (tenant.weight / sum(weights)), 4),
            }
            for tenant, cpu in zip(tenants, used, strict=True)
        },
    }


async def _feed(pool: pools.ModelPool, tenant: Tenant) -> None:
    while True:
        await answered(pool, tenant, ticket_rows(tenant.cost_wanted_s))


async def makespan_s(pool: pools.ModelPool, tenants: Sequence[Tenant], work: Mapping[str, int]) -> dict[str, float]:
    """Seconds until each tenant's rows of `work` are answered, all handed in as quickly as their queues take them."""
    service = Service(pool, tenants)
    before, started = sum(service.cpu_s()), time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for tenant in tenants:
            tickets = _tickets(work[tenant.name], ticket_rows(tenant.cost_wanted_s))
            for _ in range(TICKETS_HELD):
                tasks.create_task(_work_off(pool, tenant, tickets))
    return {"seconds": time.monotonic() - started, "cpu_s": sum(service.cpu_s()) - before}


def _tickets(rows: int, size: int) -> list[int]:
    whole, rest = divmod(rows, size)
    return [size] * whole + [rest] * bool(rest)


async def _work_off(pool: pools.ModelPool, tenant: Tenant, tickets: list[int]) -> None:
    while tickets:
        await answered(pool, tenant, tickets.pop())


async def goodput(
    arms: Mapping[str, pools.ModelPool],
    tenants: Sequence[Tenant],
    seconds_per_row: Mapping[str, float],
    seconds: float,
    rounds: int,
) -> dict[str, Any]:
    """The same rows, of each tenant for its share of `seconds`, with the scheduler and first come first served."""
    work = shares.rows_for(seconds, {tenant.name: tenant.weight for tenant in tenants}, seconds_per_row)
    total = sum(work.values())
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms) if number % 2 == 0 else reversed(arms):
            found[name].append(await makespan_s(arms[name], tenants, work))
            print(f"goodput, {name}: {found[name][-1]}", file=sys.stderr)
    rates = {name: [total / run["seconds"] for run in runs] for name, runs in found.items()}
    return {
        "ratio": round(statistics.median(shares.ratios(rates["fair"], rates["first_come"])), 4),
        "rows": total,
        "rows_per_s": {name: [round(rate) for rate in values] for name, values in rates.items()},
        "cpu_s": {name: [round(run["cpu_s"], 2) for run in runs] for name, runs in found.items()},
    }
