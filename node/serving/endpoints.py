"""The routes of the API, each answered from a `NodeView`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from http import HTTPStatus
from operator import itemgetter

import msgspec

from node.kernel.clock import Clock
from node.kernel.limits import HTTP_MODELS_MAX
from node.kernel.types import ModelName
from node.serving.cluster import ClusterStatus, ClusterView
from node.serving.metrics import METRICS_TYPE, NodeMetrics
from node.serving.openapi import openapi_document
from node.serving.problems import bad_request, not_found, unavailable
from node.serving.routes import NAME, AtQuery, Call, Change, FeaturesQuery, LogQuery, ModelsQuery, Reply, Route
from node.serving.view import (
    AsOf,
    Body,
    CustomerFeatures,
    CustomerInferences,
    CustomerState,
    HttpStatus,
    ModelDetail,
    ModelInfo,
    Models,
    NodeStatus,
    NodeView,
    QuotaChange,
    SharedFeatures,
    StageMove,
    TenantLog,
    TenantQuota,
    TenantShare,
)

API_VERSION = "1"
_READS = (HTTPStatus.NOT_FOUND,)
_CHANGES = (HTTPStatus.UNAUTHORIZED, HTTPStatus.CONFLICT)


class Health(Body, frozen=True):
    """The process lives: its event loop answers."""

    alive: bool


class Readiness(Body, frozen=True):
    ready: bool


class Endpoints:
    """`http` gives the server's own figures; `cluster` is None on a node on its own; `more` are other routes."""

    def __init__(
        self,
        view: NodeView,
        clock: Clock,
        http: Callable[[], HttpStatus],
        cluster: ClusterView | None = None,
        more: Sequence[Route] = (),
    ) -> None:
        self._more = more
        self._view = view
        self._cluster = cluster
        self._clock = clock
        self._http = http
        self._metrics = NodeMetrics(self.node_status)
        self._routes: tuple[Route, ...] = ()
        self._openapi = b""
        """Made when it is first asked for: a start need not wait for that."""

    def routes(self) -> tuple[Route, ...]:
        routes = (
            Route("/healthz", "Whether the process lives", self._health, Health),
            Route("/readyz", "Whether the node does its work; else why not", self._readiness, Readiness),
            Route("/metrics", "Figures for Prometheus", self._metrics_text, None, content_type="text/plain"),
            Route("/v1/status", "The node, its partitions and tenants", self._status, NodeStatus),
            Route(
                "/v1/cluster",
                "Members, leader, and each partition's owner, standbys and moves",
                self._cluster_status,
                ClusterStatus,
                statuses=_READS,
            ),
            Route(
                "/v1/models", "All versions of all models, with state and reasons", self._models, Models, ModelsQuery
            ),
            Route(
                "/v1/models/{tenant}/{model}",
                "A model's versions, what is seen of one in stages, and what became of them",
                self._model,
                ModelDetail,
                statuses=_READS,
                change=Change(
                    "Promote a version that is in stages, or roll back",
                    self._move_stage,
                    StageMove,
                    (*_READS, *_CHANGES),
                ),
            ),
            Route("/v1/features", "The features that tenants share", self._shared_features, SharedFeatures),
            Route("/v1/tenants/{tenant}/log", "What a tenant's models printed", self._log, TenantLog, LogQuery, _READS),
            Route(
                "/v1/tenants/{tenant}/share",
                "What a tenant asked for and got of late, and what held it back",
                self._share,
                TenantShare,
                statuses=_READS,
            ),
            Route(
                "/v1/tenants/{tenant}/quota",
                "What a tenant may have, has, and was refused",
                self._quota,
                TenantQuota,
                change=Change("Change what an operator allows it", self._change_quota, QuotaChange, _CHANGES),
            ),
            Route("/v1/customers/{customer}", "Profile and aggregates", self._customer, CustomerState, AtQuery, _READS),
            Route(
                "/v1/customers/{customer}/features",
                "A model's features as they would be computed now",
                self._features,
                CustomerFeatures,
                FeaturesQuery,
                _READS,
            ),
            Route(
                "/v1/customers/{customer}/inferences",
                "The latest inference of each model",
                self._inferences,
                CustomerInferences,
                AtQuery,
                _READS,
            ),
            *self._more,
            Route("/v1/openapi.json", "This description", self._openapi_json, None),
        )
        self._routes = routes
        return routes

    def node_status(self) -> NodeStatus:
        reasons = self._unready()
        status = self._view.status()
        return msgspec.structs.replace(status, ready=not reasons, reasons=reasons, http=self._http())

    def _unready(self) -> list[str]:
        return [*(() if self._cluster is None else self._cluster.unready()), *self._view.unready()]

    async def _health(self, call: Call) -> Reply:
        return _reply(Health(alive=True))

    async def _readiness(self, call: Call) -> Reply:
        reasons = self._unready()
        if reasons:
            raise unavailable("not-ready", "the node does not do all of its work now", reasons=reasons)
        return _reply(Readiness(ready=True))

    async def _metrics_text(self, call: Call) -> Reply:
        return Reply(self._metrics.text(), METRICS_TYPE)

    async def _openapi_json(self, call: Call) -> Reply:
        if not self._openapi:
            self._openapi = msgspec.json.encode(openapi_document(self._routes, "Headrace", API_VERSION))
        return Reply(self._openapi)

    async def _status(self, call: Call) -> Reply:
        return _reply(self.node_status())

    async def _cluster_status(self, call: Call) -> Reply:
        if self._cluster is None:
            raise not_found("not-clustered", "not clustered: this node is on its own; its config has no [cluster]")
        return _reply(await self._cluster.cluster())

    async def _models(self, call: Call) -> Reply:
        query = call.query
        after = tuple(query.after.split("/"))
        models = [(_order(model), model) for model in self._view.models() if query.tenant in ("", model.tenant)]
        wanted = sorted((entry for entry in models if not query.after or entry[0] > after), key=itemgetter(0))
        page = wanted[:HTTP_MODELS_MAX]
        following = "/".join(page[-1][0]) if len(wanted) > len(page) else None
        return _reply(Models(models=[model for _, model in page], next=following))

    async def _model(self, call: Call) -> Reply:
        return _reply(self._view.model(ModelName(call.variables["tenant"], call.variables["model"])))

    async def _move_stage(self, call: Call) -> Reply:
        name = ModelName(call.variables["tenant"], call.variables["model"])
        await self._view.move_stage(name, call.body)
        return _reply(self._view.model(name))

    async def _shared_features(self, call: Call) -> Reply:
        return _reply(self._view.shared_features())

    async def _log(self, call: Call) -> Reply:
        return _reply(self._view.printed(call.variables["tenant"], int(call.query.after)))

    async def _share(self, call: Call) -> Reply:
        return _reply(self._view.share(call.variables["tenant"]))

    async def _quota(self, call: Call) -> Reply:
        return _reply(self._view.quota(call.variables["tenant"]))

    async def _change_quota(self, call: Call) -> Reply:
        tenant = call.variables["tenant"]
        if not re.fullmatch(NAME, tenant):
            raise bad_request("no tenant can be called so: 1 to 63 of a-z, 0-9, '_' and '-', first a letter or digit")
        await self._view.change_quota(tenant, call.body)
        return _reply(self._view.quota(tenant))

    async def _customer(self, call: Call) -> Reply:
        return _reply(await self._view.customer(call.variables["customer"], self._at(call)))

    async def _features(self, call: Call) -> Reply:
        model = ModelName(*call.query.model.split("/"))
        return _reply(await self._view.features(call.variables["customer"], model, self._at(call)))

    async def _inferences(self, call: Call) -> Reply:
        return _reply(await self._view.inferences(call.variables["customer"], self._at(call)))

    def _at(self, call: Call) -> AsOf:
        text = call.query.at
        if text == "last":
            return "last"
        return int(text) if text else self._clock.now_ms()


def _order(model: ModelInfo) -> tuple[str, ...]:
    return model.tenant, model.model, model.sha256


def _reply(body: Body) -> Reply:
    return Reply(msgspec.json.encode(body))
