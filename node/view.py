"""This node as its HTTP interface sees it: `NodeView` over the partitions and the tenants' models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import msgspec

from node.backfill_view import backfills, with_backfill
from node.counts import NodeCounts
from node.kernel.clock import Clock
from node.kernel.ports import FeaturePlan, StateStore
from node.kernel.supervise import Supervisor
from node.kernel.tables import NO_TABLES, TableSet
from node.kernel.types import Aggregate, EventSchema, ModelName, ReplicaProgress
from node.lag import Lags
from node.partition import Condition, Role
from node.serving.reads import CustomerReads, OpenPartition
from node.serving.view import (
    AsOf,
    BacklogStatus,
    CacheStatus,
    CustomerFeatures,
    CustomerInferences,
    CustomerState,
    IntervalStatus,
    ModelDetail,
    ModelInfo,
    NodeStatus,
    PartitionStatus,
    QuotaChange,
    SandboxStatus,
    SharedFeatures,
    StageMove,
    TenantLog,
    TenantQuota,
    TenantShare,
    TenantStatus,
)
from node.session import PartitionSession
from node.state.layout import Layout


class PartitionView(Protocol):
    """What the view needs of one partition, owned or stood by for."""

    number: int
    condition: Condition

    @property
    def epoch(self) -> int: ...

    @property
    def role(self) -> Role: ...

    @property
    def session(self) -> PartitionSession | None: ...

    def readable(self) -> tuple[StateStore, Layout] | None: ...

    def progress(self) -> ReplicaProgress | None: ...


class PartitionsView(Protocol):
    """All partitions of this node: of one that is alone, or of one of a cluster."""

    @property
    def running(self) -> Mapping[int, PartitionView]: ...

    def unready(self) -> list[str]: ...


class TenantView(Protocol):
    """What the view needs of the tenants' side."""

    def plan(self) -> FeaturePlan: ...

    def models(self) -> Sequence[ModelInfo]: ...

    def model(self, name: ModelName) -> ModelDetail: ...

    async def move_stage(self, name: ModelName, move: StageMove) -> None: ...

    def shared_features(self) -> SharedFeatures: ...

    def tenants(self) -> Sequence[TenantStatus]: ...

    def sandbox(self) -> SandboxStatus: ...

    def printed(self, tenant: str, after: int) -> TenantLog: ...

    def share(self, tenant: str) -> TenantShare: ...

    def quota(self, tenant: str) -> TenantQuota: ...

    def event_features(self, name: ModelName) -> frozenset[str]: ...


class QuotaKeeper(Protocol):
    """Where operators' quotas are kept: on this node, or in the cluster's catalog."""

    async def change_quota(self, tenant: str, changes: Mapping[str, float | None], who: str) -> None: ...


class LocalView:
    def __init__(
        self,
        node: str,
        schema: EventSchema,
        profile: Mapping[str, Aggregate],
        partitions: PartitionsView,
        tenants: TenantView,
        quotas: QuotaKeeper,
        supervisor: Supervisor,
        clock: Clock,
        counts: NodeCounts,
        cluster: Callable[[], Mapping[str, object]] = dict,
        tables: Callable[[], TableSet] = lambda: NO_TABLES,
    ) -> None:
        """`cluster` gives the figures of its parts, by their names."""
        self._cluster = cluster
        self._node = node
        self._quotas = quotas
        self._partitions = partitions
        self._tenants = tenants
        self._supervisor = supervisor
        self._clock = clock
        self._counts = counts
        self._started_ms = clock.now_ms()
        self._reads = CustomerReads(self._open, tenants.plan, schema, profile, tenants.event_features, tables)

    def _open(self) -> Mapping[int, OpenPartition | None]:
        return {number: _open(partition) for number, partition in self._partitions.running.items()}

    def status(self) -> NodeStatus:
        now_ms = self._clock.now_ms()
        partitions = [_status(partition, now_ms) for _, partition in sorted(self._partitions.running.items())]
        lags = self._lags()
        weakest = any(partition.delivery == "at_least_once" for partition in partitions)
        return NodeStatus(
            node=self._node,
            started_ms=self._started_ms,
            now_ms=now_ms,
            delivery="at_least_once" if weakest else "exactly_once",
            partitions=partitions,
            counters=dict(self._counts.counters()),
            step_seconds=dict(self._counts.step_seconds()),
            tenants=[
                msgspec.structs.replace(tenant, waiting=lags.tenant(tenant.tenant))
                for tenant in self._tenants.tenants()
            ],
            sandbox=self._tenants.sandbox(),
            tasks=list(self._supervisor.statistics()["tasks"]),  # type: ignore[call-overload]
            cluster_parts=msgspec.to_builtins(dict(self._cluster()), str_keys=True),
        )

    def unready(self) -> Sequence[str]:
        return self._partitions.unready()

    def models(self) -> Sequence[ModelInfo]:
        lags, told, infos = self._lags(), set(), []
        for info in self._tenants.models():
            name = f"{info.tenant}/{info.model}"
            info = info if name in told else msgspec.structs.replace(info, waiting=lags.model(name))
            infos.append(with_backfill(info, self._sessions()))
            told.add(name)
        return infos

    def _lags(self) -> Lags:
        now_ms = self._clock.now_ms()
        return Lags((session.state.backlog.statistics(now_ms), session.state.committed) for session in self._sessions())

    def _sessions(self) -> list[PartitionSession]:
        sessions = [partition.session for partition in self._partitions.running.values()]
        return [session for session in sessions if session is not None]

    def shared_features(self) -> SharedFeatures:
        return self._tenants.shared_features()

    def printed(self, tenant: str, after: int) -> TenantLog:
        return self._tenants.printed(tenant, after)

    def share(self, tenant: str) -> TenantShare:
        waiting = self._lags().tenant(tenant)
        return msgspec.structs.replace(self._tenants.share(tenant), waiting=waiting)

    def model(self, name: ModelName) -> ModelDetail:
        detail = self._tenants.model(name)
        waiting = self._lags().model(str(name))
        first = [msgspec.structs.replace(one, waiting=waiting) for one in detail.versions[:1]]
        versions = [with_backfill(one, self._sessions()) for one in [*first, *detail.versions[1:]]]
        return msgspec.structs.replace(detail, versions=versions)

    async def move_stage(self, name: ModelName, move: StageMove) -> None:
        await self._tenants.move_stage(name, move)

    def quota(self, tenant: str) -> TenantQuota:
        return self._tenants.quota(tenant)

    async def change_quota(self, tenant: str, change: QuotaChange) -> None:
        await self._quotas.change_quota(tenant, change.changes(), change.who)

    async def customer(self, customer: str, at: AsOf) -> CustomerState:
        return await self._reads.customer(customer, at)

    async def features(self, customer: str, model: ModelName, at: AsOf) -> CustomerFeatures:
        return await self._reads.features(customer, model, at)

    async def inferences(self, customer: str, at: AsOf) -> CustomerInferences:
        return await self._reads.inferences(customer, at)


def _open(partition: PartitionView) -> OpenPartition | None:
    found = partition.readable()
    return None if found is None else OpenPartition(partition.number, *found)


def _status(partition: PartitionView, now_ms: int) -> PartitionStatus:
    condition, session, progress = partition.condition, partition.session, partition.progress()
    told: Callable[..., PartitionStatus] = PartitionStatus
    common: dict[str, Any] = {
        "number": partition.number,
        "phase": condition.phase,
        "reason": condition.reason or (session.state.refused if session else ""),
        "failures": condition.failures,
        "role": partition.role,
        "epoch": partition.epoch,
        "frames_behind": progress.frames_behind if progress else None,
        "ms_behind": progress.ms_behind if progress else None,
    }
    if session is None:
        return told(**common)
    cache, left = session.state.cache.statistics(), session.state.progress_left
    return told(
        **common,
        delivery="exactly_once" if session.outbox.transactional else "at_least_once",
        lag=session.source.lag(),
        progress={topic: offset for topic, offset in session.store.progress().items() if topic not in left},
        progress_left=dict(left),
        counters=dict(session.state.committed),
        step_seconds=session.steps.statistics(),
        row_bytes=session.state.layout.row_bytes,
        backlog={
            model: BacklogStatus(**figures) for model, figures in session.state.backlog.statistics(now_ms).items()
        },
        intervals={model: IntervalStatus(**figures) for model, figures in session.state.intervals.statistics().items()},
        backfills=backfills(session),
        cache=CacheStatus(**{name: cache[name] for name in ("hits", "misses", "rows", "bytes")}),
    )
