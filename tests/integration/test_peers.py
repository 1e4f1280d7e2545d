"""Calls and files between nodes: real servers on loopback, real files."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from node.kernel.clock import SystemClock
from replication.peers import PeerCall, PeerClient, PeerReply, PeerRoute, PeerServer

SECRET = b"a secret of the cluster, long enough"


class Node:
    """A peer with a folder of files, and what it was called with."""

    def __init__(self, folder: Path, name: str = "two", secret: bytes | None = SECRET) -> None:
        self.folder = folder
        self.calls: list[PeerCall] = []
        routes = [
            PeerRoute("GET", "/peer/files/{name}", self.file),
            PeerRoute("POST", "/peer/echo/{word}", self.echo),
            PeerRoute("GET", "/peer/echo/{word}", self.echo),
        ]
        self.server = PeerServer("127.0.0.1:0", name, secret, SystemClock(), routes)

    async def file(self, call: PeerCall) -> PeerReply:
        return PeerReply(file=self.folder / call.variables["name"])

    async def echo(self, call: PeerCall) -> PeerReply:
        self.calls.append(call)
        return PeerReply(call.body + call.variables["word"].encode())


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path / "theirs")
    made.folder.mkdir()
    await made.server.start()
    yield made
    await made.server.stop()


@pytest.fixture
async def client() -> AsyncIterator[PeerClient]:
    made = PeerClient("one", SECRET, SystemClock())
    await made.start()
    yield made
    await made.stop()


async def test_a_call_is_answered_and_says_who_asks(node: Node, client: PeerClient) -> None:
    assert (
        await client.ask(node.server.address, "POST", "/peer/echo/caf%C3%A9?a=1&b=%20", b"body ")
        == "body café".encode()
    )
    assert node.calls == [PeerCall({"word": "café"}, {"a": "1", "b": " "}, b"body ", "one")]
    assert await client.ask(node.server.address, "GET", "/peer/echo/x") == b"x"


async def test_a_file_comes_whole_and_verified(node: Node, client: PeerClient, tmp_path: Path) -> None:
    content = secrets.token_bytes(3_000_001)
    (node.folder / "f").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    for number, size in enumerate((len(content), None)):
        target = tmp_path / "ours" / str(number)
        await client.fetch(node.server.address, "/peer/files/f", target, size, sha256)
        assert target.read_bytes() == content
        assert [entry.name for entry in target.parent.iterdir() if entry.name.startswith(".")] == []
