"""What the HTTP API answers over real sockets, errors too."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
from http_support import NOW_MS, MemoryView, ask, assert_problem, raw
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from node.kernel.errors import StateCorrupt, StoreUnavailable
from node.kernel.limits import HTTP_MODELS_MAX, METRIC_SERIES_MAX
from node.serving.server import HttpServer
from node.serving.view import BacklogStatus, CacheStatus, ModelInfo, PartitionStatus

PATHS = ("/healthz", "/readyz", "/metrics", "/v1/status", "/v1/models", "/v1/openapi.json")


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


async def test_a_node_on_its_own_has_no_cluster(client: aiohttp.ClientSession, server: HttpServer) -> None:
    problem = assert_problem(await ask(client, server, "/v1/cluster"), 404, "not-clustered", "/v1/cluster")
    assert "not clustered" in problem["detail"]


async def test_models_and_status(client: aiohttp.ClientSession, server: HttpServer, view: MemoryView) -> None:
    refused = ModelInfo(tenant="ads", model="bid", version="", sha256="", state="refused", reasons=["no such field"])
    view.models_known.append(refused)
    (model,) = (await ask(client, server, "/v1/models")).json()["models"]
    assert (model["state"], model["reasons"]) == ("refused", ["no such field"])
    view.reasons = ["partition 1: BrokerUnavailable"]
    status = (await ask(client, server, "/v1/status")).json()
    assert (status["ready"], status["reasons"]) == (False, ["partition 1: BrokerUnavailable"])
    assert status["http"]["answered"] == {"/v1/models 200": 1}


async def test_a_tenant_s_share_is_explained(client: aiohttp.ClientSession, server: HttpServer) -> None:
    answer = (await ask(client, server, "/v1/tenants/ads/share")).json()
    (window,) = answer["windows"]
    assert window["cpu_asked_seconds"] == window["cpu_got_seconds"] + window["cpu_held_back_seconds"]
    assert (answer["weight"], window["held_back_by"], window["share_got"]) == (2.0, "turn", 0.25)
    path = "/v1/tenants/nobody/share"
    assert_problem(await ask(client, server, path), 404, "not-found", path)


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


@pytest.mark.parametrize("path", PATHS)
async def test_openapi_says_of_what_type_an_answer_is(
    client: aiohttp.ClientSession, server: HttpServer, path: str
) -> None:
    document = (await ask(client, server, "/v1/openapi.json")).json()
    answer = await ask(client, server, path)
    assert document["paths"][path]["get"]["responses"]["200"]["content"].keys() == {answer.content_type}


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
        "ahead": 6,
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
                row_bytes=None if number else 4096,
                counters=counters,
                backlog={"ads/bid": BacklogStatus(rows=8, chunks=1, oldest_ms=1000 * (number + 1), waiting_ms=500)},
                cache=CacheStatus(hits=9),
            )
        )
    view.counters, view.step_seconds = {name: 2 * count for name, count in counters.items()}, {"fold": 1.0}
    found = await samples(client, server)
    assert found["headrace_events_total", ("1",)] == 10
    assert found["headrace_late_total", ("0",)] == 2
    assert found["headrace_ahead_total", ("0",)] == 6
    assert found["headrace_dead_letters_total", ("not_json",)] == 6
    assert found["headrace_inferences_total", ("bid", "ads")] == 8
    assert found["headrace_sheds_total", ("bid", "overload", "ads")] == 10
    assert found["headrace_lag_events", ("0",)] == 6
    assert ("headrace_lag_events", ("1",)) not in found
    assert found["headrace_row_bytes", ("0",)] == 4096
    assert ("headrace_row_bytes", ("1",)) not in found
    assert found["headrace_step_seconds_total", ("fold",)] == 1.0
    assert found["headrace_backlog_rows", ("bid", "ads")] == 16
    assert found["headrace_backlog_oldest_seconds", ("bid", "ads")] == 2.0
    assert found["headrace_backlog_waiting_seconds", ("bid", "ads")] == 0.5
    assert found["headrace_cache_hits_total", ("0",)] == 9
    assert found["headrace_partition_running", ("0",)] == 1
    assert found["headrace_partition_running", ("1",)] == 0
    assert found["headrace_worker_cpu_seconds_total", ("ads",)] == 1.5
    assert found["headrace_worker_restarts_total", ("ads",)] == 1
    assert found["headrace_rows_queued", ("ads",)] == 7
    assert found["headrace_cluster", ("taken", "snapshots")] == 3
    assert found["headrace_cluster", ("partitions.0.bytes", "snapshots")] == 7
    assert found["process_cpu_seconds_total", ()] > 0


async def test_a_partition_that_is_not_open_gives_no_totals(
    client: aiohttp.ClientSession, server: HttpServer, view: MemoryView
) -> None:
    view.partitions.append(PartitionStatus(number=0, phase="waiting"))
    view.partitions.append(PartitionStatus(number=1, phase="running", counters={"commits": 1}))
    found = await samples(client, server)
    for name in ("events", "ignored", "late"):
        assert (f"headrace_{name}_total", ("0",)) not in found, "a 0 would make a burst of what comes next"
        assert found[f"headrace_{name}_total", ("1",)] == 0


async def test_series_of_a_metric_are_bounded(
    client: aiohttp.ClientSession, server: HttpServer, view: MemoryView
) -> None:
    view.counters = {f"inferences t{number:05d}/m": 1 for number in range(METRIC_SERIES_MAX * 3)}
    found = {labels: value for (name, labels), value in (await samples(client, server)).items() if "inferences" in name}
    assert len(found) == METRIC_SERIES_MAX
    assert sum(found.values()) == len(view.counters)
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
