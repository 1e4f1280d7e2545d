"""A node of made-up customers behind the real HTTP server, and how tests talk to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from yarl import URL

from node.config_sections import HttpSection
from node.kernel.clock import ManualClock
from node.kernel.errors import NotFound
from node.kernel.types import ModelName
from node.serving.server import HttpServer
from node.serving.view import (
    AsOf,
    CustomerFeatures,
    CustomerInferences,
    CustomerState,
    Inference,
    ModelDetail,
    ModelInfo,
    NodeStatus,
    PartitionStatus,
    PrintedLine,
    QuotaChange,
    SharedFeatures,
    StageMove,
    TenantLog,
    TenantQuota,
    TenantShare,
    TenantStatus,
    VersionChange,
    WindowShare,
)

NOW_MS = 1_700_000_000_000
CLUSTER = {"snapshots": {"taken": 3, "partitions": {"0": {"bytes": 7, "reason": "none"}}}}
TOKEN = "the operator's, in tests"


@dataclass
class MemoryView:
    """A node of two partitions that knows the customers it was given."""

    customers: dict[str, float] = field(default_factory=lambda: {"ann": 3.0})
    reasons: list[str] = field(default_factory=list)
    models_known: list[ModelInfo] = field(default_factory=list)
    partitions: list[PartitionStatus] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    step_seconds: dict[str, float] = field(default_factory=dict)
    failure: Exception | None = None
    held: asyncio.Event | None = None
    waiting: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    arrivals_wanted: int = 0
    body: int = 0
    quota_limits: dict[str, float] = field(default_factory=dict)
    quota_failure: Exception | None = None
    history: list[VersionChange] = field(default_factory=list)

    def status(self) -> NodeStatus:
        tenants = [TenantStatus(tenant="ads", weight=2.0, cpu_seconds=1.5, restarts=1, rows_queued=7)]
        return NodeStatus(
            node="one",
            started_ms=1,
            now_ms=2,
            partitions=self.partitions,
            counters=self.counters,
            step_seconds=self.step_seconds,
            tenants=tenants,
            cluster_parts=CLUSTER,
        )

    def unready(self) -> Sequence[str]:
        return self.reasons

    def shared_features(self) -> SharedFeatures:
        return SharedFeatures(features=[], refused={})

    def models(self) -> Sequence[ModelInfo]:
        return self.models_known

    def printed(self, tenant: str, after: int) -> TenantLog:
        if tenant != "ads":
            raise NotFound(f"no tenant {tenant} is known here")
        lines = [PrintedLine(number=number, time_ms=NOW_MS, pid=7, text="a\x1b[2J") for number in (1, 2)]
        return TenantLog(tenant=tenant, lines=[line for line in lines if line.number > after], dropped=3)

    def share(self, tenant: str) -> TenantShare:
        if tenant != "ads":
            raise NotFound(f"no tenant {tenant} is known here")
        window = WindowShare(
            seconds=10.0,
            rows_waited=10,
            rows_asked=1290,
            rows_got=800,
            rows_dropped=0,
            rows_running=0,
            rows_waiting=500,
            cpu_asked_seconds=3.25,
            cpu_got_seconds=2.0,
            cpu_held_back_seconds=1.25,
            cpu_all_seconds=8.0,
            share_got=0.25,
            share_due=0.3,
            held_seconds={"idle": 2.0, "turn": 8.0},
            held_back_by="turn",
            competitors=[],
            says=["8.0 s: rows waited while others had the 1 CPU slots"],
        )
        return TenantShare(tenant=tenant, weight=2.0, rows_s_max=0.0, slots=1, windows=[window], notes=["a\x1b[2J"])

    def quota(self, tenant: str) -> TenantQuota:
        return TenantQuota(
            tenant=tenant,
            quota=self.quota_limits,
            who="eve" if self.quota_limits else "",
            at_ms=NOW_MS,
            limits={
                "weight": 1.0,
                "memory_mb": 1024.0,
                "rows_s_max": 0.0,
                "models_max": 64.0,
                "stored_bytes_max": 4096.0,
                "window_bytes_max": 8192.0,
            }
            | self.quota_limits,
            asked={"weight": 9.0},
            models=3,
            stored_bytes=72,
            window_bytes=128,
            refused={"models_max": 2},
        )

    def model(self, name: ModelName) -> ModelDetail:
        versions = [one for one in self.models() if (one.tenant, one.model) == (name.tenant, name.model)]
        if not versions:
            raise NotFound(f"there is no model {name}")
        return ModelDetail(tenant=name.tenant, model=name.model, versions=versions, history=self.history)

    async def move_stage(self, name: ModelName, move: StageMove) -> None:
        self.model(name)
        to = "live" if move.live else move.move
        self.history.append(VersionChange(at_ms=NOW_MS, version=move.version, to=to, who=move.who, reason=move.reason))

    async def change_quota(self, tenant: str, change: QuotaChange) -> None:
        if self.quota_failure is not None:
            raise self.quota_failure
        for name, value in change.changes().items():
            self.quota_limits.pop(name, None)
            if value is not None:
                self.quota_limits[name] = value

    async def _find(self, customer: str) -> float:
        if self.held is not None:
            self.waiting += 1
            if self.waiting == self.arrivals_wanted:
                self.arrived.set()
            await self.held.wait()
        if self.failure is not None:
            raise self.failure
        if customer not in self.customers:
            raise NotFound(f"customer {customer!r} is not known here")
        return self.customers[customer]

    async def customer(self, customer: str, at: AsOf) -> CustomerState:
        events = await self._find(customer)
        return CustomerState(
            customer=customer,
            partition=1,
            also_on=[],
            at_ms=NOW_MS if at == "last" else at,
            changed_ms=NOW_MS,
            profile={"events": events, "spend": float("nan"), "big": float("inf")},
            aggregates={f"a{number}": 0.5 for number in range(self.body)},
        )

    async def features(self, customer: str, model: ModelName, at: AsOf) -> CustomerFeatures:
        events = await self._find(customer)
        if model != ModelName("ads", "bid"):
            raise NotFound(f"model {model} is not live here")
        return CustomerFeatures(
            customer=customer,
            tenant=model.tenant,
            model=model.model,
            version="0123456789ab",
            partition=1,
            at_ms=NOW_MS if at == "last" else at,
            features={"amount": None, "events": events, "channel": "web"},
            needs_event=["amount"],
        )

    async def inferences(self, customer: str, at: AsOf) -> CustomerInferences:
        await self._find(customer)
        inference = Inference(
            tenant="ads",
            model="bid",
            version="0123456789ab",
            live=True,
            outputs={"score": 0.25},
            event_time_ms=NOW_MS - 5,
            expires_ms=None,
        )
        return CustomerInferences(
            customer=customer, partition=1, at_ms=NOW_MS if at == "last" else at, inferences=[inference]
        )


@contextlib.asynccontextmanager
async def serving(view: MemoryView, request_ms_max: int = 10_000) -> AsyncIterator[HttpServer]:
    server = HttpServer(view, HttpSection(port=0), ManualClock(NOW_MS), request_ms_max, token=TOKEN)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def client_session() -> aiohttp.ClientSession:
    """As many connections as are asked for."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(30))


@dataclass
class Answer:
    status: int
    content_type: str
    headers: Any
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


async def ask(
    client: aiohttp.ClientSession, server: HttpServer, path: str, method: str = "GET", **options: Any
) -> Answer:
    url = URL(f"http://{server.address}{path}", encoded=True)
    async with client.request(method, url, **options) as response:
        return Answer(response.status, response.content_type, response.headers, await response.read())


def assert_problem(answer: Answer, status: int, kind: str, instance: str | None = None) -> dict[str, Any]:
    assert answer.status == status
    assert answer.content_type == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert problem["type"] == f"urn:headrace:problem:{kind}"
    assert problem["status"] == status
    assert {"title", "detail", "instance"} <= problem.keys()
    assert "Traceback" not in answer.body.decode()
    if instance is not None:
        assert problem["instance"] == instance
    return problem


async def raw(server: HttpServer, data: bytes) -> bytes:
    """All that the server sends on a connection that sends `data`, until it closes it."""
    host, _, port = server.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(20):
            return await reader.read()
    finally:
        writer.close()
