"""The peer port: signed calls of other nodes, answered by routes, with bytes, time and numbers bounded."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec
import structlog
from aiohttp import web

from node.kernel import limits
from node.kernel.clock import Clock
from node.kernel.errors import (
    BrokerUnavailable,
    ClusterUnavailable,
    ConfigError,
    HeadraceError,
    NotFound,
    PeerUnavailable,
    StoreUnavailable,
)
from replication.peer_auth import CallGuard, Claims, NotAuthentic, PeerKey
from replication.peer_files import Sending, open_file, seconds_max
from replication.peer_messages import (
    CALL_HEADER,
    NODE_HEADER,
    PROBLEM_PREFIX,
    PROBLEM_TYPE,
    PROOF_HEADER,
    PeerCall,
    PeerReply,
    PeerRoute,
    Problem,
    file_content,
    settled,
)
from replication.raft_types import is_loopback

log = structlog.get_logger(__name__)

_RANGE = re.compile(r"bytes=([0-9]{1,15})-")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f/\\]")
_KEPT_ALIVE_SECONDS = 30.0
_STOP_SECONDS_MAX = 5.0
_SILENT_SECONDS = 60.0
_HEADERS_PROBE_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class PeerServerStatistics:
    connections: int
    in_progress: int
    files_in_progress: int
    nonces: int
    bytes_sent: int
    answered: Mapping[str, int]
    """ "METHOD template status" -> how often."""
    refused: Mapping[str, int]
    """Why, before a route was looked for -> how often."""


class _Refusal(Exception):
    def __init__(self, status: HTTPStatus, kind: str, detail: str, close: bool = False) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.close = close

    def document(self) -> bytes:
        detail = self.detail[: 4 * limits.KIB]
        return msgspec.json.encode(Problem(PROBLEM_PREFIX + self.kind, self.status.phrase, self.status.value, detail))


_PASSING = (StoreUnavailable, BrokerUnavailable, ClusterUnavailable, PeerUnavailable)


def _refusal_of(failure: HeadraceError) -> _Refusal:
    if isinstance(failure, NotFound):
        return _Refusal(HTTPStatus.NOT_FOUND, "not-found", str(failure))
    if isinstance(failure, _PASSING):
        return _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", str(failure))
    return _Refusal(HTTPStatus.UNPROCESSABLE_ENTITY, "refused", str(failure))


_AUTHENTICATION_STATUS = {
    "misdirected": HTTPStatus.MISDIRECTED_REQUEST,
    "repeated": HTTPStatus.CONFLICT,
    "too-many-calls": HTTPStatus.SERVICE_UNAVAILABLE,
}


class PeerServer:
    """Answers calls of other nodes at `listen` (HOST:PORT). `request_ms_max` is there for tests.

    Raises ConfigError without a secret where `listen` is not loopback, and for a secret that is too short.
    """

    def __init__(
        self,
        listen: str,
        node: str,
        secret: bytes | None,
        clock: Clock,
        routes: Sequence[PeerRoute],
        request_ms_max: int = limits.PEER_REQUEST_MS_MAX,
    ) -> None:
        self._host, self._port = _checked_address(listen, secret)
        self._node = node
        self._key = PeerKey(secret)
        self._guard = CallGuard(self._key, node, clock.now_ms())
        self._clock = clock
        self._routes = tuple((route, tuple(route.template.split("/")[1:])) for route in routes)
        self._request_seconds_max = request_ms_max / 1000
        self._threads = ThreadPoolExecutor(limits.PEER_FILES_MAX, thread_name_prefix="peer-send")
        self._sendings: set[Sending] = set()
        self._files = 0
        self._in_progress = 0
        self._bytes_sent = 0
        self._answered: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._silent_until_s: dict[str, float] = {}
        self._server: _Server | None = None
        self._runner: web.ServerRunner | None = None

    @property
    def address(self) -> str:
        """HOST:PORT it listens on, once started; an IPv6 host in brackets."""
        if self._runner is None or not self._runner.addresses:
            return ""
        host, port = self._runner.addresses[0][:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def start(self) -> None:
        """Raises ConfigError when the address can't be had."""
        self._server = _Server(self)
        self._runner = web.ServerRunner(self._server, shutdown_timeout=_STOP_SECONDS_MAX)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port, backlog=limits.PEER_CONNECTIONS_MAX).start()
        except OSError as failure:
            await self.stop()
            reason = f"cluster: can't listen on {self._host} port {self._port} for peers ({failure}); free or change it"
            raise ConfigError([reason]) from failure
        log.info("peers may call", address=self.address)

    async def stop(self) -> None:
        """Take no more calls; files on their way are cut, other calls have a moment to end."""
        for sending in self._sendings:
            sending.abort()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        self._threads.shutdown(wait=False, cancel_futures=True)

    def statistics(self) -> PeerServerStatistics:
        return PeerServerStatistics(
            connections=len(self._server.connections) if self._server is not None else 0,
            in_progress=self._in_progress,
            files_in_progress=self._files,
            nonces=self._guard.nonces,
            bytes_sent=self._bytes_sent,
            answered=dict(self._answered),
            refused=dict(self._refused),
        )

    def refuse_connection(self) -> bool:
        assert self._server is not None
        if len(self._server.connections) < limits.PEER_CONNECTIONS_MAX:
            return False
        self._refused["connections"] += 1
        return True

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one call, up to the last byte sent."""
        try:
            claims = self._guard.admit(
                request.method, request.raw_path, request.headers.get(CALL_HEADER, ""), self._clock.now_ms()
            )
        except NotAuthentic as failure:
            return await self._turned_away(request, failure)
        if self._in_progress >= limits.PEER_REQUESTS_MAX:
            self._refused["requests"] += 1
            reason = f"{limits.PEER_REQUESTS_MAX} calls are in progress (PEER_REQUESTS_MAX); try again in a moment"
            busy = _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "busy", reason, close=True)
            return self._problem(busy, claims.nonce)
        self._in_progress += 1
        try:
            reply = await self._bounded(request, claims)
        finally:
            self._in_progress -= 1
        if isinstance(reply, Path):
            return await self._send_file(request, reply, claims)
        return reply

    async def _turned_away(self, request: web.BaseRequest, failure: NotAuthentic) -> web.StreamResponse:
        """Its body is not read. A stranger is told why, without proof that this node has the secret."""
        self._refused[failure.kind] += 1
        self._say(failure, request.remote)
        status = _AUTHENTICATION_STATUS.get(failure.kind, HTTPStatus.UNAUTHORIZED)
        return self._problem(_Refusal(status, failure.kind, str(failure), close=request.can_read_body), failure.nonce)

    def _say(self, failure: NotAuthentic, remote: str | None) -> None:
        """Each kind once a minute: whoever reaches the port can have calls refused, and must not fill the disk."""
        now_s = self._clock.monotonic()
        if failure.kind != "misdirected" and now_s >= self._silent_until_s.get(failure.kind, now_s):
            self._silent_until_s[failure.kind] = now_s + _SILENT_SECONDS
            log.warning("peer call refused", kind=failure.kind, reason=str(failure), remote=remote)

    async def _bounded(self, request: web.BaseRequest, claims: Claims) -> web.StreamResponse | Path:
        """The reply, sent unless it is a file."""
        response: web.StreamResponse | None = None
        try:
            async with asyncio.timeout(self._request_seconds_max):
                reply = await self._respond(request, claims)
                if isinstance(reply, Path):
                    return reply
                response = reply
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            self._refused["time"] += 1
            if response is not None and response.prepared:
                raise ConnectionError("the peer reads too slowly") from None
            reason = f"this took over {self._request_seconds_max:g} s (PEER_REQUEST_MS_MAX); try again"
            response = self._problem(
                _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "timeout", reason, close=True), claims.nonce
            )
        return response

    async def _respond(self, request: web.BaseRequest, claims: Claims) -> web.StreamResponse | Path:
        template = "(none)"
        reply: PeerReply | _Refusal
        try:
            route, call = await self._call(request, claims)
            template = route.template
            reply = await route.handler(call)
        except _Refusal as refusal:
            reply = refusal
        except HeadraceError as failure:
            reply = _refusal_of(failure)
        except ConnectionError:
            raise
        except Exception as failure:
            log.error("peer call failed", method=request.method, route=template, peer=claims.sender, exc_info=failure)
            reply = _Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "fault", f"{self._node} failed on this; see its log")
        status = reply.status.value if isinstance(reply, _Refusal) else 200
        self._answered[f"{request.method if template != '(none)' else '*'} {template} {status}"] += 1
        if isinstance(reply, _Refusal):
            return self._problem(reply, claims.nonce)
        if reply.file is not None:
            return reply.file
        headers = {"Content-Type": "application/octet-stream"}
        return web.Response(body=reply.body, headers={**headers, **self._signed(claims.nonce, 200, reply.body)})

    async def _call(self, request: web.BaseRequest, claims: Claims) -> tuple[PeerRoute, PeerCall]:
        raw_path, _, raw_query = request.raw_path.partition("?")
        route, variables = self._find(request.method, raw_path)
        body = await _read_body(request)
        if hashlib.sha256(body).hexdigest() != claims.body_sha256:
            self._refused["unauthenticated"] += 1
            raise _Refusal(HTTPStatus.UNAUTHORIZED, "unauthenticated", "the body is not the one that was signed")
        return route, PeerCall(variables, _parsed_query(raw_query), body, claims.sender)

    def _find(self, method: str, raw_path: str) -> tuple[PeerRoute, dict[str, str]]:
        segments = raw_path.split("/")[1:]
        known = False
        for route, template in self._routes:
            variables = _match(template, segments)
            if variables is not None:
                known = True
                if route.method == method:
                    return route, variables
        if known:
            reason = f"{self._node} does not take {method} here; upgrade the nodes"
            raise _Refusal(HTTPStatus.METHOD_NOT_ALLOWED, "refused", reason, close=True)
        raise _Refusal(HTTPStatus.NOT_FOUND, "not-found", f"{self._node} has nothing at this path", close=True)

    def _problem(self, refusal: _Refusal, nonce: str) -> web.Response:
        body = refusal.document()
        proof = self._signed(nonce, refusal.status.value, body) if nonce else {}
        response = web.Response(status=refusal.status.value, body=body, headers={"Content-Type": PROBLEM_TYPE, **proof})
        if refusal.close:
            response.force_close()
        return response

    def _signed(self, nonce: str, status: int, content: bytes) -> dict[str, str]:
        proof = self._key.proof(nonce, status, self._node, content)
        return {NODE_HEADER: self._node, PROOF_HEADER: proof, "Server": "headrace", "Cache-Control": "no-store"}

    async def _send_file(self, request: web.BaseRequest, path: Path, claims: Claims) -> web.StreamResponse:
        if self._files >= limits.PEER_FILES_MAX:
            self._refused["files"] += 1
            reason = f"{limits.PEER_FILES_MAX} files are being sent (PEER_FILES_MAX); try again, or another node"
            return self._problem(_Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "busy", reason), claims.nonce)
        self._files += 1
        try:
            return await self._send_open_file(request, path, claims)
        except HeadraceError as failure:
            return self._problem(_refusal_of(failure), claims.nonce)
        finally:
            self._files -= 1

    async def _send_open_file(self, request: web.BaseRequest, path: Path, claims: Claims) -> web.StreamResponse:
        loop = asyncio.get_running_loop()
        file, size = await loop.run_in_executor(self._threads, open_file, path)
        with file:
            wanted = request.headers.get("Range")
            match = None if wanted is None else _RANGE.fullmatch(wanted)
            offset = int(match[1]) if match else 0
            if wanted is not None and (match is None or offset >= size):
                status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
                problem = self._problem(_Refusal(status, "range", f"the file has {size} bytes"), claims.nonce)
                problem.headers["Content-Range"] = f"bytes */{size}"
                return problem
            status = HTTPStatus.OK if wanted is None else HTTPStatus.PARTIAL_CONTENT
            response = web.StreamResponse(status=status.value, headers=self._file_headers(claims, status, offset, size))
            response.content_length = size - offset
            response.force_close()
            await response.prepare(request)
            await self._pass_to_kernel(request, file, offset, size - offset)
            await response.write_eof()
        return response

    def _file_headers(self, claims: Claims, status: HTTPStatus, offset: int, size: int) -> dict[str, str]:
        headers = self._signed(claims.nonce, status.value, file_content(size))
        headers["Content-Type"] = "application/octet-stream"
        if status == HTTPStatus.PARTIAL_CONTENT:
            headers["Content-Range"] = f"bytes {offset}-{size - 1}/{size}"
        return headers

    async def _pass_to_kernel(self, request: web.BaseRequest, file: Any, offset: int, count: int) -> None:
        """Raises ConnectionError when the peer is gone or too slow; the connection is cut then."""
        transport = request.transport
        if transport is None:
            raise ConnectionError("the peer is gone")
        async with asyncio.timeout(seconds_max(0)):
            while transport.get_write_buffer_size():  # noqa: ASYNC110 - of the headers; aiohttp tells nobody
                await asyncio.sleep(_HEADERS_PROBE_SECONDS)
        descriptor = transport.get_extra_info("socket").fileno()
        if descriptor < 0 or transport.is_closing():
            raise ConnectionError("the peer is gone")
        sending = Sending(file, offset, count, descriptor, self._clock)
        self._sendings.add(sending)
        work = asyncio.get_running_loop().run_in_executor(self._threads, sending.run)
        try:
            self._bytes_sent += await settled(work, sending.abort)
        except OSError as failure:
            transport.abort()
            raise ConnectionError(str(failure)) from failure
        finally:
            self._sendings.discard(sending)


def _checked_address(listen: str, secret: bytes | None) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigError([f"cluster.peer_listen {listen!r} is not HOST:PORT"])
    host = host.strip("[]")
    if secret is None and not is_loopback(listen):
        reason = "is not loopback and there is no cluster secret: anybody could call; give every node the same secret"
        raise ConfigError([f"cluster.peer_listen {listen!r} {reason}"])
    if secret is not None and len(secret) < limits.CLUSTER_SECRET_BYTES_MIN:
        raise ConfigError([f"the cluster's secret has under {limits.CLUSTER_SECRET_BYTES_MIN} bytes; make it longer"])
    return host, int(port)


async def _read_body(request: web.BaseRequest) -> bytes:
    chunks, size = [], request.content_length or 0
    if size <= limits.PEER_BODY_BYTES_MAX and request.can_read_body:
        size = 0
        async for chunk in request.content.iter_any():
            size += len(chunk)
            if size > limits.PEER_BODY_BYTES_MAX:
                break
            chunks.append(chunk)
    if size > limits.PEER_BODY_BYTES_MAX:
        reason = f"the body is over {limits.PEER_BODY_BYTES_MAX} bytes (PEER_BODY_BYTES_MAX); send less"
        raise _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "refused", reason, close=True)
    return b"".join(chunks)


def _match(template: Sequence[str], segments: Sequence[str]) -> dict[str, str] | None:
    if len(template) != len(segments):
        return None
    variables = {}
    for expected, given in zip(template, segments, strict=True):
        if expected.startswith("{"):
            text = unquote_to_bytes(given).decode("utf-8", "replace")
            if not text or text in (".", "..") or _UNSAFE.search(text):
                return None
            variables[expected[1:-1]] = text
        elif expected != given:
            return None
    return variables


def _parsed_query(raw_query: str) -> dict[str, str]:
    try:
        pairs = parse_qsl(raw_query, keep_blank_values=True, strict_parsing=bool(raw_query), max_num_fields=16)
    except ValueError as failure:
        raise _Refusal(HTTPStatus.BAD_REQUEST, "refused", f"the query can't be read: {failure}") from None
    query = dict(pairs)
    if len(query) != len(pairs):
        raise _Refusal(HTTPStatus.BAD_REQUEST, "refused", "the query gives a name twice")
    return query


class _Server(web.Server):
    def __init__(self, peers: PeerServer) -> None:
        super().__init__(peers.handle)
        self._peers = peers

    def __call__(self) -> web.RequestHandler:
        return _Connection(self._peers, self)


class _Connection(web.RequestHandler):
    """A connection whose parser is bounded; aiohttp's own errors say nothing."""

    def __init__(self, peers: PeerServer, server: _Server) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=_KEPT_ALIVE_SECONDS,  # also closes one that is slow with its headers
            access_log=None,  # type: ignore[arg-type]  # None is how aiohttp spells "off"
            max_line_size=limits.HTTP_LINE_BYTES_MAX,
            max_field_size=limits.HTTP_HEADER_BYTES_MAX,
            lingering_time=1.0,
            auto_decompress=False,
        )
        self._peers = peers

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._peers.refuse_connection():
            transport.close()
            return
        super().connection_made(transport)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("part of an answer is sent already")
        log.debug("peer call malformed", error=repr(exc), remote=request.remote)
        refusal = _Refusal(HTTPStatus.BAD_REQUEST, "refused", "this is not a call as nodes make them", close=True)
        response = web.Response(status=400, body=refusal.document(), headers={"Content-Type": PROBLEM_TYPE})
        response.force_close()
        return response
