"""The HTTP server: every request is bounded in bytes and time, every error a problem document.

Built on aiohttp's low-level server, since its applications answer their own errors as text or HTML.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from http import HTTPStatus
from typing import cast

import structlog
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from node.config_sections import HttpSection
from node.kernel.clock import Clock
from node.kernel.errors import ConfigError, HeadraceError
from node.kernel.limits import (
    HTTP_BODY_BYTES_MAX,
    HTTP_CONNECTIONS_MAX,
    HTTP_HEADER_BYTES_MAX,
    HTTP_LINE_BYTES_MAX,
    HTTP_REQUEST_MS_MAX,
    HTTP_REQUESTS_MAX,
    MIB,
    TABLE_UPLOAD_MS_MAX,
)
from node.serving.cluster import ClusterView
from node.serving.endpoints import Endpoints
from node.serving.operator_token import check_operator
from node.serving.problems import PROBLEM_TYPE, Refusal, refusal_of, unavailable
from node.serving.routes import CHANGE_METHOD, Reply, Route, Router
from node.serving.view import HttpStatus, NodeView

log = structlog.get_logger(__name__)

_ALWAYS_ANSWERED = "/healthz"
"""Costs nothing, and a busy node is not a dead one."""
_LONG_METHODS = ("PUT", "POST", "DELETE")
_ROUTE = web.RequestKey("route", str)
"""Where a request remembers the template of its route, once that is known."""
_UNMATCHED = "(none)"
_LINGER_SECONDS = 2.0
"""How long what a refused client still sends is read, so that it gets to see the answer."""
_STOP_SECONDS_MAX = 5.0
_HEADERS = {"Server": "headrace", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class HttpServer:
    """Serves `view` at the address configured. `request_ms_max` is there for tests.

    Changes are taken from whoever has `token`; from nobody if it is ''.
    """

    def __init__(
        self,
        view: NodeView,
        settings: HttpSection,
        clock: Clock,
        request_ms_max: int = HTTP_REQUEST_MS_MAX,
        cluster: ClusterView | None = None,
        token: str = "",
        more: Sequence[Route] = (),
    ) -> None:
        self._settings = settings
        self._token = token
        self._clock = clock
        self._request_seconds_max = request_ms_max / 1000
        self._router = Router(Endpoints(view, clock, self.statistics, cluster, more).routes())
        self._answered: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._in_progress = 0
        self._seconds = 0.0
        self._server: _Server | None = None
        self._runner: web.ServerRunner | None = None

    @property
    def address(self) -> str:
        """HOST:PORT it listens on, once started; an IPv6 host in brackets."""
        if self._runner is None:
            return ""
        host, port = self._runner.addresses[0][:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self) -> None:
        """Raises ConfigError when the address can't be had."""
        host, port = self._settings.host, self._settings.port
        self._server = _Server(self)
        self._runner = web.ServerRunner(self._server, shutdown_timeout=_STOP_SECONDS_MAX)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port, backlog=HTTP_REQUESTS_MAX).start()
        except OSError as failure:
            await self.stop()
            raise ConfigError(
                [f"http: can't listen on {host} port {port} ({failure}); free it, or set another host or port"]
            ) from failure
        log.info("http listens", address=self.address)

    async def stop(self) -> None:
        """Take no more requests; those in progress have a moment to end."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def statistics(self) -> HttpStatus:
        return HttpStatus(
            in_progress=self._in_progress,
            connections=len(self._server.connections) if self._server is not None else 0,
            answered=dict(self._answered),
            refused=dict(self._refused),
            seconds=round(self._seconds, 6),
        )

    @property
    def request_seconds_max(self) -> float:
        return self._request_seconds_max

    def refuse_connection(self) -> bool:
        """Whether one more is too many; counts it."""
        assert self._server is not None
        if len(self._server.connections) < HTTP_CONNECTIONS_MAX:
            return False
        self._refused["connections"] += 1
        return True

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, up to the last byte sent: a client that reads slowly counts as in progress."""
        path = request.rel_url.raw_path
        if self._in_progress >= HTTP_REQUESTS_MAX and path != _ALWAYS_ANSWERED:
            self._refused["requests"] += 1
            detail = f"{HTTP_REQUESTS_MAX} requests are in progress (HTTP_REQUESTS_MAX); try again in a second"
            return problem_response(unavailable("too-many-requests", detail), path)
        started = self._clock.monotonic()
        self._in_progress += 1
        response: web.StreamResponse | None = None
        try:
            async with asyncio.timeout(self._seconds_max(request)):
                response = await self._respond(request, path)
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            self._refused["time"] += 1
            response = self._too_slow(request, response, path)
        finally:
            self._in_progress -= 1
            self._count(request, response, self._clock.monotonic() - started)
        return response

    def _seconds_max(self, request: web.BaseRequest) -> float:
        """A file may be put for longer; whoever may not put one is refused before it is read."""
        return TABLE_UPLOAD_MS_MAX / 1000 if request.method in _LONG_METHODS else self._request_seconds_max

    def _count(self, request: web.BaseRequest, response: web.StreamResponse | None, seconds: float) -> None:
        route, status = request.get(_ROUTE, _UNMATCHED), response.status if response is not None else 0
        self._seconds += seconds
        self._answered[f"{route} {status}"] += 1
        log.debug("http request", method=request.method, route=route, status=status, seconds=round(seconds, 6))

    def _too_slow(self, request: web.BaseRequest, response: web.StreamResponse | None, path: str) -> web.StreamResponse:
        if response is not None and response.prepared:
            if request.transport is not None:
                request.transport.abort()
            return response
        detail = f"this took over {self._request_seconds_max:g} s (HTTP_REQUEST_MS_MAX) and was given up; try again"
        return problem_response(unavailable("timeout", detail, close=True), path)

    async def _respond(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        try:
            reply = await self._reply(request, path)
        except Refusal as refusal:
            return problem_response(refusal, path)
        except HeadraceError as failure:
            return problem_response(refusal_of(failure) or _fault(request, path, failure), path)
        except web.RequestPayloadError:
            malformed = Refusal(HTTPStatus.BAD_REQUEST, "bad-request", "the body is malformed", close=True)
            return problem_response(malformed, path)
        except ConnectionError:
            raise
        except Exception as failure:
            return problem_response(_fault(request, path, failure), path)
        return web.Response(body=reply.body, headers={"Content-Type": reply.content_type, **_HEADERS})

    async def _reply(self, request: web.BaseRequest, path: str) -> Reply:
        route, variables = self._router.find(path, request.method)
        request[_ROUTE] = route.template
        if request.method not in route.methods:
            methods = self._router.methods(route.template)
            raise Refusal(
                HTTPStatus.METHOD_NOT_ALLOWED,
                "method-not-allowed",
                f"this path takes {' and '.join(methods)} only",
                headers={"Allow": ", ".join(methods)},
                close=request.can_read_body,
            )
        if route.method != "GET":
            check_operator(request.headers.get("Authorization", ""), self._token, close=request.can_read_body)
            call = self._router.call(route, variables, request.rel_url.raw_query_string)
            return await route.handler(replace(call, body=request.content.iter_chunked(MIB)))
        if route.change is not None and request.method == CHANGE_METHOD:
            check_operator(request.headers.get("Authorization", ""), self._token, close=request.can_read_body)
            body = await _read_body(request)
            return await route.change.handler(self._router.change(route.change, variables, body))
        await _read_body(request)
        call = self._router.call(route, variables, request.rel_url.raw_query_string)
        return await route.handler(call)


async def _read_body(request: web.BaseRequest) -> bytes:
    """Only a change takes one; it is read in any case, so that the connection can be used again, unless too large."""
    size = request.content_length or 0
    body = bytearray()
    if size <= HTTP_BODY_BYTES_MAX and request.can_read_body:
        size = 0
        async for chunk in request.content.iter_any():
            size += len(chunk)
            if size > HTTP_BODY_BYTES_MAX:
                break
            body += chunk
    if size > HTTP_BODY_BYTES_MAX:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "body-too-large",
            f"the body is over {HTTP_BODY_BYTES_MAX} bytes (HTTP_BODY_BYTES_MAX)",
            close=True,
        )
    return bytes(body)


def _fault(request: web.BaseRequest, path: str, failure: Exception) -> Refusal:
    log.error("http request failed", method=request.method, path=path, exc_info=failure)
    return Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "fault", "the node failed on this request; its log has the reason")


def problem_response(refusal: Refusal, path: str) -> web.Response:
    response = web.Response(
        status=refusal.status.value,
        body=refusal.document(path),
        headers={"Content-Type": PROBLEM_TYPE, **_HEADERS, **refusal.headers},
    )
    if refusal.close:
        response.force_close()
    return response


class _Server(web.Server):
    """Makes connections whose parser is bounded and whose errors are problem documents."""

    def __init__(self, http: HttpServer) -> None:
        super().__init__(http.handle)
        self._http = http

    def __call__(self) -> web.RequestHandler:
        return _Connection(self._http, self)


class _Connection(web.RequestHandler):
    def __init__(self, http: HttpServer, server: _Server) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=http.request_seconds_max,  # also closes one that is slow with its headers
            access_log=None,  # type: ignore[arg-type]  # None is how aiohttp spells "off"
            max_line_size=HTTP_LINE_BYTES_MAX,
            max_field_size=HTTP_HEADER_BYTES_MAX,
            lingering_time=_LINGER_SECONDS,
            auto_decompress=False,
        )
        self._http = http

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._http.refuse_connection():
            stream = cast("asyncio.Transport", transport)  # uvloop's is one in all but name
            detail = f"{HTTP_CONNECTIONS_MAX} connections are open (HTTP_CONNECTIONS_MAX); try again in a second"
            stream.write(_raw_response(unavailable("too-many-connections", detail)))
            stream.close()
            return
        super().connection_made(transport)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What the parser refused, and what failed outside `HttpServer.handle`."""
        if request.writer.output_size > 0:
            raise ConnectionError("part of an answer is sent already")
        if status == HTTPStatus.BAD_REQUEST:
            log.debug("http request malformed", error=repr(exc))
            return problem_response(_malformed(exc), request.rel_url.raw_path)
        return problem_response(_fault(request, request.rel_url.raw_path, Exception(repr(exc))), "/")


def _malformed(failure: BaseException | None) -> Refusal:
    if not isinstance(failure, LineTooLong):
        return Refusal(HTTPStatus.BAD_REQUEST, "bad-request", "this is not an HTTP request as it should be", close=True)
    limit = failure.args[1]
    if limit == HTTP_LINE_BYTES_MAX:
        detail = f"the request line is over {limit} bytes (HTTP_LINE_BYTES_MAX)"
        return Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, "path-too-long", detail, close=True)
    detail = f"a header is over {limit} bytes (HTTP_HEADER_BYTES_MAX)"
    return Refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "header-too-large", detail, close=True)


def _raw_response(refusal: Refusal) -> bytes:
    body = refusal.document("/")
    head = f"HTTP/1.1 {refusal.status.value} {refusal.status.phrase}\r\nContent-Type: {PROBLEM_TYPE}\r\n"
    return f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body
