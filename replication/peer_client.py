"""Calls to other nodes, and files fetched from them: bounded, resumable, verified."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import aiohttp
import msgspec
from yarl import URL

from node.kernel import limits
from node.kernel.clock import Clock
from node.kernel.errors import NotFound, PeerRefused, PeerUnavailable
from replication.peer_auth import Claims, PeerKey
from replication.peer_files import Answer, Download
from replication.peer_messages import (
    CALL_HEADER,
    NODE_HEADER,
    PROBLEM_PREFIX,
    PROOF_HEADER,
    Problem,
    Result,
    file_content,
    settled,
)

_PATH = re.compile(r"/[!$%&'()*+,\-./0-9:;=?@A-Z_a-z~]*")
_IDLE_SECONDS = 10.0
"""The connection is let go well before the server does, or calls would meet a closed one."""
_WATCH_SECONDS = 0.5
_ADDRESSES_MAX = 4 * limits.NODES_MAX
_ADDRESS_PROBES = 2
"""A node whose name was not known says it; the second call is signed for that name."""


@dataclass(frozen=True, slots=True)
class PeerClientStatistics:
    in_progress: int
    fetching: int
    asked: int
    failed: int
    files_fetched: int
    files_resumed: int
    bytes_fetched: int


class PeerClient:
    """Calls other nodes, by address. One for a node; `start` before, `stop` after."""

    def __init__(self, node: str, secret: bytes | None, clock: Clock) -> None:
        self._node = node
        self._key = PeerKey(secret)
        self._clock = clock
        self._names: dict[str, str] = {}
        self._session: aiohttp.ClientSession | None = None
        self._threads = ThreadPoolExecutor(limits.PEER_FETCHES_MAX, thread_name_prefix="peer-fetch")
        self._slots = asyncio.Semaphore(limits.PEER_FETCHES_MAX)
        self._parts: set[Path] = set()
        self._downloads: set[Download] = set()
        self._counts: Counter[str] = Counter()
        self._in_progress = 0

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=limits.PEER_ASKS_MAX, keepalive_timeout=_IDLE_SECONDS, ttl_dns_cache=60
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=limits.PEER_CONNECT_MS_MAX / 1000),
            skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept", "Content-Type"),
            auto_decompress=False,
            trust_env=False,
        )

    async def stop(self) -> None:
        """Calls in progress fail; parts of files stay, to be resumed."""
        for download in self._downloads:
            download.abort()
        if self._session is not None:
            await self._session.close()
            self._session = None
        self._threads.shutdown(wait=False, cancel_futures=True)

    def statistics(self) -> PeerClientStatistics:
        counts = self._counts
        return PeerClientStatistics(
            in_progress=self._in_progress,
            fetching=len(self._downloads),
            asked=counts["asked"],
            failed=counts["failed"],
            files_fetched=counts["files"],
            files_resumed=counts["resumed"],
            bytes_fetched=counts["bytes"],
        )

    async def ask(
        self, address: str, method: str, path: str, body: bytes = b"", wait_ms_max: int = limits.PEER_ASK_MS_MAX
    ) -> bytes:
        """The reply's body. `path` is percent-encoded, with its query.

        Raises NotFound, PeerRefused, and PeerUnavailable, after which the call may or may not have had its effect.
        """
        if len(body) > limits.PEER_BODY_BYTES_MAX:
            raise PeerRefused(f"a call of {len(body)} bytes is over PEER_BODY_BYTES_MAX; {address} is not asked")
        with self._counted(address):
            try:
                async with asyncio.timeout(wait_ms_max / 1000):
                    return await self._ask(address, method, path, body)
            except TimeoutError:
                raise PeerUnavailable(f"{address} did not answer {method} {path} within {wait_ms_max} ms") from None
            except (aiohttp.ClientError, OSError, ValueError) as failure:
                raise _unreachable(address, failure) from failure

    @contextlib.contextmanager
    def _counted(self, address: str) -> Iterator[None]:
        if self._in_progress >= limits.PEER_ASKS_MAX:
            raise PeerUnavailable(
                f"{limits.PEER_ASKS_MAX} calls wait for peers (PEER_ASKS_MAX); {address} is not asked"
            )
        self._in_progress += 1
        self._counts["asked"] += 1
        try:
            yield
        except BaseException:
            self._counts["failed"] += 1
            raise
        finally:
            self._in_progress -= 1

    async def _ask(self, address: str, method: str, path: str, body: bytes) -> bytes:
        if self._session is None:
            raise PeerUnavailable("the node stops, it asks its peers no more")
        url = URL(f"http://{address}{_checked_path(path)}", encoded=True)
        for _ in range(_ADDRESS_PROBES):
            header, nonce = self._call_header(address, method, path, body)
            async with self._session.request(
                method, url, data=body or None, headers={CALL_HEADER: header}, allow_redirects=False
            ) as response:
                headers = {name.lower(): value for name, value in response.headers.items()}
                answer = Answer(response.status, headers, await _read_reply(address, response))
            if not self._renamed(address, nonce, answer):
                return self._outcome(address, nonce, answer)
        raise PeerUnavailable(f"the node at {address} changes its name; look at the addresses of the cluster's nodes")

    def _call_header(self, address: str, method: str, path: str, body: bytes) -> tuple[str, str]:
        nonce = secrets.token_hex(16)
        digest = hashlib.sha256(body).hexdigest()
        claims = Claims(self._node, self._names.get(address, ""), self._clock.now_ms(), nonce, digest)
        return self._key.header(method, path, claims), nonce

    def _proven(self, nonce: str, answer: Answer, content: bytes) -> bool:
        node, proof = answer.headers.get(NODE_HEADER.lower(), ""), answer.headers.get(PROOF_HEADER.lower(), "")
        return self._key.proves(proof, nonce, answer.status, node, content)

    def _renamed(self, address: str, nonce: str, answer: Answer) -> bool:
        """Whether the call reached another node than it was signed for, which is known now."""
        if answer.status != HTTPStatus.MISDIRECTED_REQUEST or not self._proven(nonce, answer, answer.body):
            return False
        if len(self._names) >= _ADDRESSES_MAX:
            self._names.clear()
        self._names[address] = answer.headers[NODE_HEADER.lower()]
        return True

    def _outcome(self, address: str, nonce: str, answer: Answer) -> bytes:
        proven = self._proven(nonce, answer, answer.body)
        if proven and answer.status == HTTPStatus.OK:
            return answer.body
        kind, detail = _read_problem(answer)
        if not proven and kind != "unauthenticated":
            reason = f"{address} answered {answer.status} without proof that it is of this cluster"
            raise PeerUnavailable(f"{reason}; give all nodes the same cluster secret, and look what listens there")
        if kind == "not-found":
            raise NotFound(detail)
        if kind in ("refused", "unauthenticated", "clock"):
            raise PeerRefused(f"{address} refused: {detail}" if kind != "refused" else detail)
        raise PeerUnavailable(f"{address}: {detail}")

    async def fetch(
        self,
        address: str,
        path: str,
        target: Path,
        size: int | None,
        sha256: str,
        *,
        bytes_max: int = limits.PEER_FILE_BYTES_MAX,
        sync: bool = True,
    ) -> None:
        """Bring the file at a peer's `path` to `target`, whole and with that sha256 (hex), or not at all.

        What comes before it is cut stays in a part beside `target` (`part_of`), and a later call resumes it, from any
        peer. With `sync` it is on the disk when this returns. One call at a time for one target. Raises NotFound,
        PeerRefused, PeerUnavailable (also when the bytes are wrong; they are removed), StoreUnavailable.
        """
        part = part_of(target, sha256)
        if part in self._parts or len(self._parts) >= limits.PEER_FETCHES_WAITING_MAX:
            why = "is being fetched already" if part in self._parts else "has to wait (PEER_FETCHES_WAITING_MAX)"
            raise PeerUnavailable(f"{target.name} {why}; ask again")
        self._parts.add(part)
        try:
            async with self._slots:
                await self._fetch(
                    address, _checked_path(path), target, Download(part, size, bytes_max, self._clock), sha256, sync
                )
        finally:
            self._parts.discard(part)

    async def _fetch(self, address: str, path: str, target: Path, download: Download, sha256: str, sync: bool) -> None:
        self._downloads.add(download)
        try:
            await self._in_thread(download, download.open)
            before = download.offset
            await self._bring(address, path, download)
            await self._in_thread(download, functools.partial(download.finish, target, sha256, sync))
            self._counts["files"] += 1
            self._counts["resumed"] += before > 0
        finally:
            self._downloads.discard(download)
            download.close()

    async def _bring(self, address: str, path: str, download: Download) -> None:
        """Attempts until the file is whole, or one brought nothing."""
        failures = probes = 0
        while not download.complete:
            before = download.offset
            header, nonce = self._call_header(address, "GET", path, b"")

            def proven(answer: Answer, size: int, nonce: str = nonce) -> bool:
                return self._proven(nonce, answer, file_content(size))

            attempt = functools.partial(download.attempt, address, path, {CALL_HEADER: header}, proven)
            try:
                answer = await self._in_thread(download, attempt)
            except PeerUnavailable:
                failures += 1
                if download.offset == before or failures == limits.PEER_FETCH_ATTEMPTS_MAX:
                    raise
                continue
            finally:
                self._counts["bytes"] += download.offset - before
            if answer.file or download.complete:
                continue
            probes += 1
            if probes == _ADDRESS_PROBES or not self._renamed(address, nonce, answer):
                self._outcome(address, nonce, answer)
                raise PeerUnavailable(f"{address} answered {answer.status}, which no node does; upgrade the nodes")

    async def _in_thread(self, download: Download, work: Callable[[], Result]) -> Result:
        """The result of what blocks, watched: an attempt past its deadline is given up."""
        if self._session is None:
            raise PeerUnavailable("the node stops, it fetches no more files")
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        return await settled(asyncio.ensure_future(self._watched(download, future)), download.abort)

    async def _watched(self, download: Download, future: asyncio.Future[Result]) -> Result:
        while not (await asyncio.wait({future}, timeout=_WATCH_SECONDS))[0]:
            if self._clock.monotonic() > download.deadline:
                download.abort()
        return future.result()


def part_of(target: Path, sha256: str) -> Path:
    """Where what has come of a file is kept until it is whole."""
    return target.with_name(f".{target.name}.{sha256[:16]}.part")


def _checked_path(path: str) -> str:
    if len(path) > limits.HTTP_PATH_BYTES_MAX or not _PATH.fullmatch(path):
        raise PeerRefused(f"{path[:100]!r} can't be asked for: it is no percent-encoded path, or too long")
    return path


async def _read_reply(address: str, response: aiohttp.ClientResponse) -> bytes:
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        size += len(chunk)
        if size > limits.PEER_REPLY_BYTES_MAX:
            response.close()
            raise PeerUnavailable(f"{address} answers with over {limits.PEER_REPLY_BYTES_MAX} bytes; upgrade the nodes")
        chunks.append(chunk)
    return b"".join(chunks)


def _read_problem(answer: Answer) -> tuple[str, str]:
    """Its kind and detail; of what is no problem document, nothing that would be believed."""
    try:
        problem = msgspec.json.decode(answer.body, type=Problem)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return "", f"answered {answer.status}, not as nodes do"
    return problem.type.removeprefix(PROBLEM_PREFIX), problem.detail


def _unreachable(address: str, failure: Exception) -> PeerUnavailable:
    """A failed connection in the system's words: the client's own are its settings, `ssl=True` for plain HTTP too."""
    reason = str(failure.os_error) if isinstance(failure, aiohttp.ClientConnectorError) else repr(failure)
    return PeerUnavailable(f"{address} can't be reached: {reason}; look whether it runs")
