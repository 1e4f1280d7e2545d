"""None of the bounds of the HTTP API gives way, whatever is sent."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest
import structlog
import uvloop
from http_support import NOW_MS, MemoryView, ask, assert_problem, raw, serving
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import until

from node.config_sections import HttpSection
from node.kernel.clock import ManualClock, SystemClock
from node.kernel.errors import ConfigError
from node.kernel.limits import (
    CUSTOMER_BYTES_MAX,
    HTTP_BODY_BYTES_MAX,
    HTTP_CONNECTIONS_MAX,
    HTTP_HEADER_BYTES_MAX,
    HTTP_LINE_BYTES_MAX,
    HTTP_PATH_BYTES_MAX,
    HTTP_QUERY_BYTES_MAX,
    HTTP_REQUESTS_MAX,
)
from node.serving.server import HttpServer

ON_BOTH_LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
"""The node runs on uvloop, whose transports are not quite asyncio's."""
Run = Callable[[Coroutine[Any, Any, None]], None]


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
