"""Peers for tests: a server of files, a relay that misbehaves, raw calls, and a node in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from node.kernel.clock import SystemClock
from node.kernel.errors import BoundExceeded, NotFound, StoreUnavailable
from replication.peer_auth import Claims, PeerKey
from replication.peers import PeerCall, PeerClient, PeerReply, PeerRoute, PeerServer

SECRET = b"a secret of the cluster, long enough"
WAIT_S_MAX = 15.0


def file_of(folder: Path, name: str, size: int) -> tuple[bytes, str]:
    """Makes it; its content and sha256."""
    content = secrets.token_bytes(size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return content, hashlib.sha256(content).hexdigest()


class FilePeer:
    """A peer with a folder of files, handlers that fail, and one that waits for `gate`."""

    def __init__(self, folder: Path, name: str = "two", secret: bytes | None = SECRET, listen: str = "127.0.0.1:0"):
        self.folder = folder
        self.calls: list[PeerCall] = []
        self.waiting = 0
        self.gate = asyncio.Event()
        self.routes = [
            PeerRoute("GET", "/peer/files/{name}", self.file),
            PeerRoute("POST", "/peer/echo/{word}", self.echo),
            PeerRoute("GET", "/peer/echo/{word}", self.echo),
            PeerRoute("GET", "/peer/errors/{kind}", self.error),
            PeerRoute("GET", "/peer/wait", self.wait),
            PeerRoute("GET", "/peer/large", self.large),
        ]
        self.server = PeerServer(listen, name, secret, SystemClock(), self.routes)

    @property
    def address(self) -> str:
        return self.server.address

    async def file(self, call: PeerCall) -> PeerReply:
        self.calls.append(call)
        return PeerReply(file=self.folder / call.variables["name"])

    async def echo(self, call: PeerCall) -> PeerReply:
        self.calls.append(call)
        return PeerReply(call.body + call.variables["word"].encode())

    async def error(self, call: PeerCall) -> PeerReply:
        raise {
            "missing": NotFound("no such thing here"),
            "bound": BoundExceeded("over THINGS_MAX"),
            "disk": StoreUnavailable("the disk is full"),
            "fault": RuntimeError("something private"),
        }[call.variables["kind"]]

    async def wait(self, call: PeerCall) -> PeerReply:
        self.waiting += 1
        await self.gate.wait()
        return PeerReply(b"waited")

    async def large(self, call: PeerCall) -> PeerReply:
        return PeerReply(bytes(int(call.query["bytes"])))


@contextlib.asynccontextmanager
async def running_peer(
    folder: Path, name: str = "two", secret: bytes | None = SECRET, listen: str = "127.0.0.1:0"
) -> AsyncIterator[FilePeer]:
    folder.mkdir(exist_ok=True)  # noqa: ASYNC240
    peer = FilePeer(folder, name, secret, listen)
    await peer.server.start()
    try:
        yield peer
    finally:
        await peer.server.stop()


@contextlib.asynccontextmanager
async def running_client(name: str = "one", secret: bytes | None = SECRET) -> AsyncIterator[PeerClient]:
    client = PeerClient(name, secret, SystemClock())
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


class Relay:
    """Passes bytes on to `target`, so many back on each connection: then it cuts it, or holds it open in silence.

    `bytes_back` is taken for connections from now on; None for no end. `piece` bytes at most go back at once.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.bytes_back: int | None = None
        self.then_hold = False
        self.piece = 1 << 16
        self.delay_s = 0.0
        self.connections = 0
        self.held = asyncio.Event()
        self._release = asyncio.Event()
        self._server: asyncio.Server | None = None
        self.address = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        assert self._server is not None
        self._release.set()
        self._server.close()
        await self._server.wait_closed()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        host, _, port = self.target.rpartition(":")
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection(host, int(port))
            forth = asyncio.ensure_future(self._forward(reader, back))
            with contextlib.suppress(OSError):
                await self._back(there, writer, self.bytes_back)
            forth.cancel()
            back.close()
        writer.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int | None) -> None:
        while data := await reader.read(self.piece if left is None else min(self.piece, left)):
            writer.write(data)
            await writer.drain()
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if left is not None:
                left -= len(data)
                if left == 0:
                    break
        if left == 0 and self.then_hold:
            self.held.set()
            await self._release.wait()


@contextlib.asynccontextmanager
async def relay_to(target: str) -> AsyncIterator[Relay]:
    relay = Relay(target)
    await relay.start()
    try:
        yield relay
    finally:
        await relay.stop()


def signed(
    method: str,
    raw_path: str,
    body: bytes = b"",
    *,
    target: str = "two",
    secret: bytes | None = SECRET,
    off_ms: int = 0,
    nonce: str = "",
) -> str:
    """The header of a call, as a client would make it."""
    digest = hashlib.sha256(body).hexdigest()
    claims = Claims("one", target, SystemClock().now_ms() + off_ms, nonce or secrets.token_hex(16), digest)
    return PeerKey(secret).header(method, raw_path, claims)


async def raw_call(
    address: str, method: str, raw_path: str, header: str | None, body: bytes = b"", more: str = ""
) -> tuple[int, dict[str, str], bytes]:
    """Exactly these bytes on a connection of its own: status, headers in small letters, body."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    call = f"Headrace-Call: {header}\r\n" if header is not None else ""
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    head = f"{method} {raw_path} HTTP/1.1\r\nHost: x\r\n{call}{length}{more}Connection: close\r\n\r\n"
    try:
        async with asyncio.timeout(WAIT_S_MAX):
            writer.write(head.encode("latin-1") + body)
            answer = await reader.read()
    finally:
        writer.close()
    head_bytes, _, content = answer.partition(b"\r\n\r\n")
    status, *lines = head_bytes.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status.split(" ")[1]), headers, content


_SERVE = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = sys.argv[4:]
from peer_support import FilePeer
async def serve():
    peer = FilePeer(Path(sys.argv[1]), sys.argv[2], listen=sys.argv[3])
    await peer.server.start()
    print("listens", peer.address, flush=True)
    await asyncio.Event().wait()
asyncio.run(serve())
"""


class PeerProcess:
    """A FilePeer in a process of its own, which can be killed."""

    def __init__(self, folder: Path, listen: str = "127.0.0.1:0") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(folder), "two", listen, str(Path(__file__).parent), "."],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("listens"):
                self.address = line.split()[1]
                break

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(WAIT_S_MAX)
        assert self._process.stdout is not None
        self._process.stdout.close()
