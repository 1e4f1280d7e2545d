"""The HTTP API over real sockets: what it answers, and that none of its bounds gives way."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import structlog
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs
from yarl import URL

from node.config_sections import HttpSection
from node.kernel.clock import ManualClock, SystemClock
from node.kernel.errors import ConfigError, NotFound, StateCorrupt, StoreUnavailable
from node.kernel.limits import (
    CUSTOMER_BYTES_MAX,
    HTTP_BODY_BYTES_MAX,
    HTTP_CONNECTIONS_MAX,
    HTTP_HEADER_BYTES_MAX,
    HTTP_LINE_BYTES_MAX,
    HTTP_MODELS_MAX,
    HTTP_PATH_BYTES_MAX,
    HTTP_QUERY_BYTES_MAX,
    HTTP_REQUESTS_MAX,
    METRIC_SERIES_MAX,
)
from node.kernel.types import ModelName
from node.serving.server import HttpServer
from node.serving.view import (
    AsOf,
    BacklogStatus,
    CacheStatus,
    CustomerFeatures,
    CustomerInferences,
    CustomerState,
    Inference,
    ModelInfo,
    NodeStatus,
    PartitionStatus,
    TenantStatus,
)

NOW_MS = 1_700_000_000_000
PATHS = ("/healthz", "/readyz", "/metrics", "/v1/status", "/v1/models", "/v1/openapi.json")


@dataclass
class MemoryView:
    """A node of two partitions that knows the customers it was given."""

    customers: dict[str, float] = field(default_factory=lambda: {"ann": 3.0})
    reasons: list[str] = field(default_factory=list)
    models_known: list[ModelInfo] = field(default_factory=list)
    partitions: list[PartitionStatus] = field(default_factory=list)
    failure: Exception | None = None
    held: asyncio.Event | None = None
    waiting: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    arrivals_wanted: int = 0
    body: int = 0

    def status(self) -> NodeStatus:
        tenants = [TenantStatus(tenant="ads", weight=2.0, cpu_seconds=1.5, restarts=1, rows_queued=7)]
        return NodeStatus(node="one", started_ms=1, now_ms=2, partitions=self.partitions, tenants=tenants)

    def unready(self) -> Sequence[str]:
        return self.reasons

    def models(self) -> Sequence[ModelInfo]:
        return self.models_known

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


ON_BOTH_LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
"""The node runs on uvloop, whose transports are not quite asyncio's."""
Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture
def view() -> MemoryView:
    return MemoryView()


@contextlib.asynccontextmanager
async def serving(view: MemoryView, request_ms_max: int = 10_000) -> AsyncIterator[HttpServer]:
    server = HttpServer(view, HttpSection(port=0), ManualClock(NOW_MS), request_ms_max)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@pytest.fixture
async def server(view: MemoryView) -> AsyncIterator[HttpServer]:
    async with serving(view) as server:
        yield server


@pytest.fixture
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(30)) as session:
        yield session


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


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.01)


# --- what is answered -----------------------------------------------------------------------------------------------


async def test_customer_profile_has_null_for_missing_numbers(client: aiohttp.ClientSession, server: HttpServer) -> None:
    answer = await ask(client, server, "/v1/customers/ann")
    assert answer.status == 200
    assert answer.content_type == "application/json"
    assert answer.json()["profile"] == {"events": 3.0, "spend": None, "big": None}
    assert answer.json()["at_ms"] == NOW_MS, "without `at`, the clock's time"


@pytest.mark.parametrize(("at", "expected"), [("12", 12), ("last", NOW_MS), ("0", 0)])
async def test_at_is_taken(client: aiohttp.ClientSession, server: HttpServer, at: str, expected: int) -> None:
    for what in ("?", "/inferences?", "/features?model=ads/bid&"):
        answer = await ask(client, server, f"/v1/customers/ann{what}at={at}")
        assert answer.json()["at_ms"] == expected


async def test_features_mark_those_that_need_an_event(client: aiohttp.ClientSession, server: HttpServer) -> None:
    body = (await ask(client, server, "/v1/customers/ann/features?model=ads%2Fbid")).json()
    assert body["features"] == {"amount": None, "events": 3.0, "channel": "web"}
    assert body["needs_event"] == ["amount"]
    assert list(body["features"]) == ["amount", "events", "channel"], "columns stay in order"


async def test_inferences_are_given_by_output(client: aiohttp.ClientSession, server: HttpServer) -> None:
    (inference,) = (await ask(client, server, "/v1/customers/ann/inferences")).json()["inferences"]
    assert inference["outputs"] == {"score": 0.25}
    assert inference["version"] == "0123456789ab"
    assert inference["expires_ms"] is None


async def test_models_and_status(client: aiohttp.ClientSession, server: HttpServer, view: MemoryView) -> None:
    refused = ModelInfo(tenant="ads", model="bid", version="", sha256="", state="refused", reasons=["no such field"])
    view.models_known.append(refused)
    (model,) = (await ask(client, server, "/v1/models")).json()["models"]
    assert (model["state"], model["reasons"]) == ("refused", ["no such field"])
    view.reasons = ["partition 1: BrokerUnavailable"]
    status = (await ask(client, server, "/v1/status")).json()
    assert (status["ready"], status["reasons"]) == (False, ["partition 1: BrokerUnavailable"])
    assert status["http"]["answered"] == {"/v1/models 200": 1}


async def test_models_come_in_pages(client: aiohttp.ClientSession, server: HttpServer, view: MemoryView) -> None:
    names = [("ads", f"m{number:05d}", f"{number:064x}") for number in range(HTTP_MODELS_MAX * 2)]
    names += [("shop", "refused", ""), ("shop", "refused", "f" * 64)]
    view.models_known = [
        ModelInfo(tenant=tenant, model=model, version=sha256[:12], sha256=sha256, state="live")
        for tenant, model, sha256 in reversed(names)
    ]
    found, path = [], "/v1/models?"
    while path:
        page = (await ask(client, server, path)).json()
        assert len(page["models"]) <= HTTP_MODELS_MAX
        found += [(model["tenant"], model["model"], model["sha256"]) for model in page["models"]]
        path = f"/v1/models?after={page['next']}" if page["next"] else ""
    assert found == names
    of_shop = (await ask(client, server, "/v1/models?tenant=shop")).json()
    assert ([model["tenant"] for model in of_shop["models"]], of_shop["next"]) == (["shop", "shop"], None)
    for query in ("tenant=", "tenant=A", "after=", "after=a/b", "after=a/b/xyz"):
        assert_problem(await ask(client, server, f"/v1/models?{query}"), 400, "bad-request")


async def test_ready_and_alive_are_not_the_same(
    client: aiohttp.ClientSession, server: HttpServer, view: MemoryView
) -> None:
    assert (await ask(client, server, "/readyz")).json() == {"ready": True}
    view.reasons = ["partition 0 waits", "the broker is gone"]
    problem = assert_problem(await ask(client, server, "/readyz"), 503, "not-ready", "/readyz")
    assert problem["reasons"] == ["partition 0 waits", "the broker is gone"]
    assert (await ask(client, server, "/healthz")).json() == {"alive": True}


async def test_head_answers_without_a_body(client: aiohttp.ClientSession, server: HttpServer) -> None:
    whole = await ask(client, server, "/v1/customers/ann")
    head = await ask(client, server, "/v1/customers/ann", "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["Content-Length"] == str(len(whole.body))


@pytest.mark.parametrize(
    "customer", ["a/b", "a b", "100%", "?#", "ünï", "日本", "..%", "a+b", "'\"<>", "a%2Fb", "x" * 256]
)
async def test_any_customer_can_be_named(
    client: aiohttp.ClientSession, server: HttpServer, view: MemoryView, customer: str
) -> None:
    view.customers[customer] = 1.0
    answer = await ask(client, server, f"/v1/customers/{quote(customer, safe='')}")
    assert answer.json()["customer"] == customer


async def test_openapi_describes_every_path_and_body(client: aiohttp.ClientSession, server: HttpServer) -> None:
    answer = await ask(client, server, "/v1/openapi.json")
    document = answer.json()
    assert document["openapi"].startswith("3.1")
    assert set(PATHS) < document["paths"].keys()
    features = document["paths"]["/v1/customers/{customer}/features"]["get"]
    parameters = {(one["name"], one["in"]): one["required"] for one in features["parameters"]}
    assert parameters == {("customer", "path"): True, ("model", "query"): True, ("at", "query"): False}
    assert features["responses"]["503"]["content"].keys() == {"application/problem+json"}
    schemas = document["components"]["schemas"]
    references = {one.rpartition("/")[2] for one in _references(document)}
    assert references <= schemas.keys()
    body = (await ask(client, server, "/v1/customers/ann")).json()
    assert schemas["CustomerState"]["properties"].keys() == body.keys()
    operations = [path["get"]["operationId"] for path in document["paths"].values()]
    assert len(set(operations)) == len(operations)


def _references(part: Any) -> set[str]:
    if isinstance(part, dict):
        own = {part["$ref"]} if isinstance(part.get("$ref"), str) else set()
        return own.union(*(_references(value) for value in part.values()))
    return set().union(*(_references(value) for value in part)) if isinstance(part, list) else set()


# --- metrics --------------------------------------------------------------------------------------------------------


async def samples(client: aiohttp.ClientSession, server: HttpServer) -> dict[tuple[str, tuple[str, ...]], float]:
    answer = await ask(client, server, "/metrics")
    assert answer.content_type == "text/plain"
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
    }


async def test_metrics_follow_from_the_status(
    client: aiohttp.ClientSession, server: HttpServer, view: MemoryView
) -> None:
    counters = {
        "events": 10,
        "late": 2,
        "dead_letters not_json": 3,
        "inferences ads/bid": 4,
        "shed overload ads/bid": 5,
    }
    for number, phase in enumerate(("running", "waiting")):
        view.partitions.append(
            PartitionStatus(
                number=number,
                phase=phase,
                lag=None if number else 6,
                counters=counters,
                step_seconds={"fold": 0.5},
                backlog={"ads/bid": BacklogStatus(rows=8, chunks=1, oldest_ms=1000 * (number + 1))},
                cache=CacheStatus(hits=9),
            )
        )
    found = await samples(client, server)
    assert found["headrace_events_total", ("1",)] == 10
    assert found["headrace_late_total", ("0",)] == 2
    assert found["headrace_dead_letters_total", ("not_json",)] == 6
    assert found["headrace_inferences_total", ("bid", "ads")] == 8
    assert found["headrace_sheds_total", ("bid", "overload", "ads")] == 10
    assert found["headrace_lag_events", ("0",)] == 6
    assert ("headrace_lag_events", ("1",)) not in found
    assert found["headrace_step_seconds_total", ("fold",)] == 1.0
    assert found["headrace_backlog_rows", ("bid", "ads")] == 16
    assert found["headrace_backlog_oldest_seconds", ("bid", "ads")] == 2.0
    assert found["headrace_cache_hits_total", ("0",)] == 9
    assert found["headrace_partition_running", ("0",)] == 1
    assert found["headrace_partition_running", ("1",)] == 0
    assert found["headrace_worker_cpu_seconds_total", ("ads",)] == 1.5
    assert found["headrace_worker_restarts_total", ("ads",)] == 1
    assert found["headrace_rows_queued", ("ads",)] == 7
    assert found["process_cpu_seconds_total", ()] > 0


async def test_series_of_a_metric_are_bounded(
    client: aiohttp.ClientSession, server: HttpServer, view: MemoryView
) -> None:
    counters = {f"inferences t{number:05d}/m": 1 for number in range(METRIC_SERIES_MAX * 3)}
    view.partitions.append(PartitionStatus(number=0, phase="running", counters=counters))
    found = {labels: value for (name, labels), value in (await samples(client, server)).items() if "inferences" in name}
    assert len(found) == METRIC_SERIES_MAX
    assert sum(found.values()) == len(counters)
    assert found["_other", "_other"] == METRIC_SERIES_MAX * 2 + 1


async def test_unknown_paths_make_no_new_series(client: aiohttp.ClientSession, server: HttpServer) -> None:
    for number in range(20):
        await ask(client, server, f"/nothing/{number}")
        await ask(client, server, f"/v1/customers/c{number}")
    assert server.statistics().answered == {"(none) 404": 20, "/v1/customers/{customer} 404": 20}


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v1/customers", "/v1/customers/", "/v1/customers/a/b", "/v1/status/", "//v1/status", "/V1/status"],
)
async def test_unknown_path(client: aiohttp.ClientSession, server: HttpServer, path: str) -> None:
    assert_problem(await ask(client, server, path), 404, "unknown-path", path)


async def test_unknown_customer_and_model(client: aiohttp.ClientSession, server: HttpServer) -> None:
    assert_problem(await ask(client, server, "/v1/customers/bob"), 404, "not-found", "/v1/customers/bob")
    answer = await ask(client, server, "/v1/customers/ann/features?model=ads/other")
    assert "ads/other" in assert_problem(answer, 404, "not-found")["detail"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
async def test_other_methods(client: aiohttp.ClientSession, server: HttpServer, method: str) -> None:
    answer = await ask(client, server, "/v1/status", method)
    assert_problem(answer, 405, "method-not-allowed")
    assert answer.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "query",
    ["at=-1", "at=1.5", "at=x", "at=", "at=12345678901234", "at=1&at=2", "attt=1", "at", "at=%", "at=%zz", "at=%FF"],
)
async def test_bad_query(client: aiohttp.ClientSession, server: HttpServer, query: str) -> None:
    answer = await ask(client, server, f"/v1/customers/ann?{query}")
    assert_problem(answer, 400, "bad-request", "/v1/customers/ann")


@pytest.mark.parametrize(
    "query", ["", "model=", "model=bid", "model=ads/bid/x", "model=Ads/bid", "model=../x", "model=a/b%00"]
)
async def test_bad_model(client: aiohttp.ClientSession, server: HttpServer, query: str) -> None:
    assert_problem(await ask(client, server, f"/v1/customers/ann/features?{query}"), 400, "bad-request")


@pytest.mark.parametrize("customer", ["%FF", "%", "a%0", "%00", "a%0Ab", "%C2%85", "%ED%A0%80"])
async def test_bad_customer(client: aiohttp.ClientSession, server: HttpServer, customer: str) -> None:
    assert_problem(await ask(client, server, f"/v1/customers/{customer}"), 400, "bad-request")


async def test_a_fault_of_ours_is_logged_and_not_shown(
    client: aiohttp.ClientSession, server: HttpServer, view: MemoryView
) -> None:
    view.failure = ZeroDivisionError("secret detail")
    with capture_logs() as logs:
        answer = await ask(client, server, "/v1/customers/ann")
    assert "secret" not in json.dumps(assert_problem(answer, 500, "fault"))
    assert [entry["exc_info"] for entry in logs if entry["log_level"] == "error"] == [view.failure]
    view.failure = None
    assert (await ask(client, server, "/v1/customers/ann")).status == 200


@pytest.mark.parametrize("failure", [StoreUnavailable("/var/lib/x: disk full"), StateCorrupt("/var/lib/x: bad row")])
async def test_a_store_that_fails_is_503(
    client: aiohttp.ClientSession, server: HttpServer, view: MemoryView, failure: Exception
) -> None:
    view.failure = failure
    problem = assert_problem(await ask(client, server, "/v1/customers/ann"), 503, "state-unavailable")
    assert "/var/lib" not in json.dumps(problem)


async def test_what_is_not_http_is_told_so(server: HttpServer) -> None:
    for data in (
        b"hello\r\n\r\n",
        b"BREW /healthz HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
    ):
        answer = await raw(server, data)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b" 400 " in head.splitlines()[0]
        assert b"application/problem+json" in head
        assert json.loads(body)["type"] == "urn:headrace:problem:bad-request"


async def test_malformed_chunks_are_told_so(server: HttpServer) -> None:
    answer = await raw(server, b"GET /healthz HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n")
    assert b" 400 " in answer.splitlines()[0]
    assert b"application/problem+json" in answer


# --- bounds ---------------------------------------------------------------------------------------------------------


async def test_customer_bound_counts_bytes(client: aiohttp.ClientSession, server: HttpServer) -> None:
    fits = quote("ü" * (CUSTOMER_BYTES_MAX // 2))
    assert_problem(await ask(client, server, f"/v1/customers/{fits}"), 404, "not-found")
    assert_problem(await ask(client, server, f"/v1/customers/{fits}x"), 414, "customer-too-long")


async def test_path_bound(client: aiohttp.ClientSession, server: HttpServer) -> None:
    longest = "/" + "x" * (HTTP_PATH_BYTES_MAX - 1)
    assert_problem(await ask(client, server, longest), 404, "unknown-path")
    assert_problem(await ask(client, server, longest + "x"), 414, "path-too-long")


async def test_query_bound(client: aiohttp.ClientSession, server: HttpServer) -> None:
    longest = "at=" + "1" * (HTTP_QUERY_BYTES_MAX - 3)
    assert_problem(await ask(client, server, f"/v1/customers/ann?{longest}"), 400, "bad-request")
    assert_problem(await ask(client, server, f"/v1/customers/ann?{longest}1"), 414, "query-too-long")


async def test_request_line_and_header_bounds(server: HttpServer) -> None:
    line = await raw(server, b"GET /%s HTTP/1.1\r\nHost: a\r\n\r\n" % (b"x" * HTTP_LINE_BYTES_MAX))
    assert b" 414 " in line.splitlines()[0]
    assert b"urn:headrace:problem:path-too-long" in line
    header = await raw(server, b"GET / HTTP/1.1\r\nHost: a\r\nX: %s\r\n\r\n" % (b"x" * (HTTP_HEADER_BYTES_MAX + 1)))
    assert b" 431 " in header.splitlines()[0]
    assert b"urn:headrace:problem:header-too-large" in header


async def test_number_of_headers_is_bounded(server: HttpServer) -> None:
    lines = b"".join(b"X-%d: 1\r\n" % number for number in range(1000))
    answer = await raw(server, b"GET /healthz HTTP/1.1\r\nHost: a\r\n%s\r\n" % lines)
    assert b" 400 " in answer.splitlines()[0]
    assert b"application/problem+json" in answer


async def test_body_bound(client: aiohttp.ClientSession, server: HttpServer) -> None:
    async def chunks(size: int) -> AsyncIterator[bytes]:
        for start in range(0, size, 65_536):
            yield b"x" * min(65_536, size - start)

    for body in (b"x" * HTTP_BODY_BYTES_MAX, chunks(HTTP_BODY_BYTES_MAX)):
        assert (await ask(client, server, "/healthz", data=body)).status == 200
    for body in (b"x" * (HTTP_BODY_BYTES_MAX + 1), chunks(HTTP_BODY_BYTES_MAX + 1)):
        assert_problem(await ask(client, server, "/healthz", data=body), 413, "body-too-large")


async def test_declared_size_is_enough_to_refuse_a_body(server: HttpServer) -> None:
    head = b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (10 * HTTP_BODY_BYTES_MAX)
    answer = await raw(server, head)
    assert b" 413 " in answer.splitlines()[0]


async def test_compressed_body_is_not_unpacked(client: aiohttp.ClientSession, server: HttpServer) -> None:
    answer = await ask(client, server, "/healthz", data=b"not gzip", headers={"Content-Encoding": "gzip"})
    assert answer.status == 200


async def test_requests_in_progress_are_bounded(
    client: aiohttp.ClientSession, server: HttpServer, view: MemoryView
) -> None:
    view.held, view.arrivals_wanted = asyncio.Event(), HTTP_REQUESTS_MAX
    waiting = [asyncio.create_task(ask(client, server, "/v1/customers/ann")) for _ in range(HTTP_REQUESTS_MAX)]
    await view.arrived.wait()
    over = await ask(client, server, "/v1/status")
    assert_problem(over, 503, "too-many-requests")
    assert over.headers["Retry-After"] == "1"
    assert (await ask(client, server, "/healthz")).status == 200, "a busy node is not a dead one"
    assert server.statistics().in_progress == HTTP_REQUESTS_MAX
    view.held.set()
    assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}
    assert server.statistics().in_progress == 0
    assert server.statistics().refused == {"requests": 1}
    assert (await ask(client, server, "/v1/status")).status == 200


async def test_a_request_that_takes_too_long_is_given_up(client: aiohttp.ClientSession, view: MemoryView) -> None:
    view.held = asyncio.Event()
    async with serving(view, request_ms_max=50) as server:
        assert_problem(await ask(client, server, "/v1/customers/ann"), 503, "timeout")
        assert server.statistics().refused == {"time": 1}
        assert server.statistics().in_progress == 0
        assert server.statistics().answered == {"/v1/customers/{customer} 503": 1}


@ON_BOTH_LOOPS
def test_a_client_slow_with_its_headers_is_closed(run: Run, view: MemoryView) -> None:
    run(_dawdle(view))


async def _dawdle(view: MemoryView) -> None:
    async with serving(view, request_ms_max=50) as server:
        for data in (b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: "):
            assert await raw(server, data) == b""


async def test_a_client_slow_with_its_body_is_given_up(view: MemoryView) -> None:
    async with serving(view, request_ms_max=50) as server:
        answer = await raw(server, b"GET /healthz HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx")
        assert b" 503 " in answer.splitlines()[0]


@ON_BOTH_LOOPS
def test_a_client_that_does_not_read_is_given_up(run: Run, view: MemoryView) -> None:
    run(_read_nothing(view))


async def _read_nothing(view: MemoryView) -> None:
    view.body = 1_000_000
    async with serving(view, request_ms_max=2_000) as server:
        host, _, port = server.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(b"GET /v1/customers/ann HTTP/1.1\r\nHost: a\r\n\r\n")
        async with asyncio.timeout(20):
            await until(lambda: server.statistics().refused)
            with contextlib.suppress(ConnectionError):
                while await reader.read(65_536):
                    pass
        writer.close()
        assert server.statistics().refused == {"time": 1}
        assert server.statistics().in_progress == 0


@ON_BOTH_LOOPS
def test_connections_are_bounded(run: Run, view: MemoryView) -> None:
    run(_connect_too_often(view))


async def _connect_too_often(view: MemoryView) -> None:
    async with serving(view) as server:
        host, _, port = server.address.rpartition(":")
        writers: list[asyncio.StreamWriter] = []
        try:
            writers = [(await asyncio.open_connection(host, int(port)))[1] for _ in range(HTTP_CONNECTIONS_MAX)]
            await until(lambda: server.statistics().connections == HTTP_CONNECTIONS_MAX)
            assert b"urn:headrace:problem:too-many-connections" in await raw(server, b"")
            assert server.statistics().refused == {"connections": 1}
        finally:
            for writer in writers:
                writer.close()
        await until(lambda: not server.statistics().connections)
        assert b" 200 " in await raw(server, b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")


async def test_stop_lets_go_of_the_address(view: MemoryView) -> None:
    async with serving(view) as server:
        port = int(server.address.rpartition(":")[2])
    again = HttpServer(view, HttpSection(port=port), SystemClock())
    await again.start()
    assert again.address == f"127.0.0.1:{port}"
    await again.stop()


async def test_an_address_in_use_is_an_error_at_start(server: HttpServer, view: MemoryView) -> None:
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"port {port} .*address already in use"):
        await HttpServer(view, HttpSection(port=port), SystemClock()).start()


# --- anything at all ------------------------------------------------------------------------------------------------

TARGETS = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda text: quote(text, safe="").encode(), st.text(max_size=300)),
    st.text(alphabet="%/?&=+#.;:@ab0\x00\xff", max_size=60).map(lambda text: text.encode("latin-1")),
)
PREFIXES = st.sampled_from([b"/", b"/v1/customers/", b"/v1/customers/ann/features?model=", b"/v1/customers/ann?", b""])


@pytest.fixture(scope="module")
def fuzzed() -> Any:
    """One server for all examples, on a loop of its own."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    loop = uvloop.new_event_loop()
    server = HttpServer(MemoryView(), HttpSection(port=0), ManualClock(NOW_MS))
    loop.run_until_complete(server.start())
    yield lambda data: loop.run_until_complete(raw(server, data))
    loop.run_until_complete(server.stop())
    loop.close()
    structlog.reset_defaults()


@settings(max_examples=300, deadline=None)
@given(prefix=PREFIXES, target=TARGETS)
def test_no_target_gives_a_500(fuzzed: Any, prefix: bytes, target: bytes) -> None:
    answer: bytes = fuzzed(b"GET %s%s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % (prefix, target))
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    assert status in (200, 400, 404, 414), answer
    assert json.loads(body)
    if status != 200:
        assert b"application/problem+json" in head


@settings(max_examples=100, deadline=None)
@given(customer=st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=80))
def test_customer_in_the_answer_is_the_one_asked_for(fuzzed: Any, customer: str) -> None:
    path = f"/v1/customers/{quote(customer, safe='')}/inferences"
    answer: bytes = fuzzed(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    body = json.loads(answer.partition(b"\r\n\r\n")[2])
    if len(customer.encode()) > CUSTOMER_BYTES_MAX:
        assert body["status"] == 414
    elif customer == "ann":
        assert body["customer"] == customer
    else:
        assert body["detail"] == f"customer {customer!r} is not known here"
