"""Calls and files between nodes: real servers on loopback, real files, raw sockets where a client would not do it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import structlog
import uvloop
from peer_support import (
    SECRET,
    FilePeer,
    PeerProcess,
    file_of,
    raw_call,
    relay_to,
    running_client,
    running_peer,
    signed,
)
from waiting import until

from node.kernel import limits
from node.kernel.clock import SystemClock
from node.kernel.errors import ConfigError, HeadraceError, NotFound, PeerRefused, PeerUnavailable, StoreUnavailable
from replication.peers import PeerCall, PeerClient, PeerServer, part_of

OTHER_SECRET = b"another secret, just as long as the first"
LARGE = 8 * limits.MIB


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[FilePeer]:
    async with running_peer(tmp_path / "theirs") as made:
        yield made


@pytest.fixture
async def client() -> AsyncIterator[PeerClient]:
    async with running_client() as made:
        yield made


# --- calls


async def test_a_call_is_answered_and_says_who_asks(peer: FilePeer, client: PeerClient) -> None:
    echoed = await client.ask(peer.address, "POST", "/peer/echo/caf%C3%A9?a=1&b=%20", b"body ")
    assert echoed == "body café".encode()
    assert peer.calls == [PeerCall({"word": "café"}, {"a": "1", "b": " "}, b"body ", "one")]
    assert await client.ask(peer.address, "GET", "/peer/echo/x") == b"x"


async def test_many_calls_at_once_each_get_their_own_answer(peer: FilePeer, client: PeerClient) -> None:
    words = [f"w{number}" for number in range(100)]
    assert await asyncio.gather(*(client.ask(peer.address, "GET", f"/peer/echo/{word}") for word in words)) == [
        word.encode() for word in words
    ]
    assert client.statistics().in_progress == 0
    assert peer.server.statistics().in_progress == 0


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("missing", NotFound, "no such thing here"),
        ("bound", PeerRefused, "over THINGS_MAX"),
        ("disk", PeerUnavailable, "the disk is full"),
        ("fault", PeerUnavailable, "two failed on this"),
    ],
)
async def test_an_error_there_is_an_error_here(
    peer: FilePeer, client: PeerClient, kind: str, error: type[HeadraceError], said: str
) -> None:
    with pytest.raises(error, match=said) as raised:
        await client.ask(peer.address, "GET", f"/peer/errors/{kind}")
    assert "private" not in str(raised.value)


async def test_an_answer_to_a_wrong_call_is_a_problem_document(peer: FilePeer) -> None:
    status, headers, body = await raw_call(peer.address, "GET", "/peer/nowhere", signed("GET", "/peer/nowhere"))
    assert (status, headers["content-type"]) == (404, "application/problem+json")
    problem = json.loads(body)
    assert problem["type"] == "urn:headrace:problem:not-found"
    assert problem["status"] == 404
    assert "two has nothing at this path" in problem["detail"]


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "OPTIONS"])
async def test_other_methods_are_refused(peer: FilePeer, method: str) -> None:
    status, _, _ = await raw_call(peer.address, method, "/peer/echo/x", signed(method, "/peer/echo/x"))
    assert status == 405
    assert peer.calls == []


async def test_no_peer_listening_is_unavailable(client: PeerClient, tmp_path: Path) -> None:
    async with running_peer(tmp_path / "gone") as gone:
        address = gone.address
    for wrong in (address, "nonsense", "127.0.0.1:99999", "[::1"):
        with pytest.raises(PeerUnavailable):
            await client.ask(wrong, "GET", "/peer/echo/x")
        with pytest.raises(PeerUnavailable):
            await client.fetch(wrong, "/peer/files/f", tmp_path / "f", None, "0" * 64)
    with pytest.raises(PeerRefused, match="percent-encoded"):
        await client.ask(address, "GET", "/a b\r\nX: y")


# --- who may call


async def test_another_secret_gets_nothing(peer: FilePeer) -> None:
    for secret in (OTHER_SECRET, None):
        async with running_client(secret=secret) as stranger:
            with pytest.raises(PeerRefused, match="same cluster secret"):
                await stranger.ask(peer.address, "POST", "/peer/echo/x", b"body")
            with pytest.raises(PeerRefused, match="same cluster secret"):
                await stranger.fetch(peer.address, "/peer/files/f", peer.folder / "g", None, "0" * 64)
    assert peer.calls == []
    assert peer.server.statistics().refused["unauthenticated"] == 4


async def test_a_call_without_the_header_gets_nothing_also_without_a_secret(tmp_path: Path) -> None:
    async with running_peer(tmp_path / "open", secret=None) as peer, running_client(secret=None) as client:
        assert await client.ask(peer.address, "GET", "/peer/echo/x") == b"x"
        status, headers, body = await raw_call(peer.address, "GET", "/peer/echo/x", None)
        assert (status, json.loads(body)["type"]) == (401, "urn:headrace:problem:unauthenticated")
        assert "headrace-proof" not in headers
        assert len(peer.calls) == 1


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/peer/echo/x?a=1", b"other"),
        ("POST", "/peer/echo/y?a=1", b"body"),
        ("POST", "/peer/echo/x?a=2", b"body"),
        ("POST", "/peer/echo/x", b"body"),
        ("GET", "/peer/echo/x?a=1", b"body"),
        ("POST", "/peer/echo/x?a=1", b""),
    ],
)
async def test_a_call_altered_on_its_way_is_refused(peer: FilePeer, method: str, path: str, body: bytes) -> None:
    header = signed("POST", "/peer/echo/x?a=1", b"body")
    status, _, _ = await raw_call(peer.address, method, path, header, body)
    assert status == 401
    assert peer.calls == []


async def test_a_call_is_taken_once(peer: FilePeer) -> None:
    header = signed("POST", "/peer/echo/x", b"body")
    answers = [await raw_call(peer.address, "POST", "/peer/echo/x", header, b"body") for _ in range(2)]
    assert [status for status, _, _ in answers] == [200, 409]
    assert len(peer.calls) == 1


@pytest.mark.parametrize("off_ms", [-limits.PEER_CLOCK_SKEW_MS_MAX - 2000, limits.PEER_CLOCK_SKEW_MS_MAX + 2000])
async def test_a_call_of_another_time_is_refused(peer: FilePeer, off_ms: int) -> None:
    header = signed("GET", "/peer/echo/x", off_ms=off_ms)
    status, _, body = await raw_call(peer.address, "GET", "/peer/echo/x", header)
    assert (status, json.loads(body)["type"]) == (401, "urn:headrace:problem:clock")
    assert peer.calls == []


async def test_a_call_for_another_node_is_refused(peer: FilePeer) -> None:
    header = signed("GET", "/peer/echo/x", target="three")
    status, headers, _ = await raw_call(peer.address, "GET", "/peer/echo/x", header)
    assert (status, headers["headrace-node"]) == (421, "two")
    assert peer.calls == []


async def test_another_node_at_the_same_address_is_found_out(client: PeerClient, tmp_path: Path) -> None:
    async with running_peer(tmp_path / "a", "two") as first:
        address = first.address
        await client.ask(address, "GET", "/peer/echo/x")
    content, sha256 = file_of(tmp_path / "a", "f", 1000)
    async with running_peer(tmp_path / "a", "three", listen=address) as second:
        await client.fetch(address, "/peer/files/f", tmp_path / "f", 1000, sha256)
        assert await client.ask(address, "GET", "/peer/echo/x") == b"x"
        assert second.server.statistics().refused == {"misdirected": 1}
    assert (tmp_path / "f").read_bytes() == content


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "421 Misdirected Request", "503 Unavailable"])
async def test_what_listens_there_without_the_secret_is_not_believed(
    client: PeerClient, tmp_path: Path, status: str
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = b'{"type":"urn:headrace:problem:not-found","title":"","status":404,"detail":"believe me"}'
        writer.write(f"HTTP/1.1 {status}\r\nHeadrace-Node: two\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        writer.close()

    impostor = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = f"127.0.0.1:{impostor.sockets[0].getsockname()[1]}"
    with pytest.raises(PeerUnavailable, match="without proof"):
        await client.ask(address, "GET", "/peer/echo/x")
    with pytest.raises(PeerUnavailable, match="without proof"):
        await client.fetch(address, "/peer/files/f", tmp_path / "f", None, "0" * 64)
    assert not (tmp_path / "f").exists()
    impostor.close()
    await impostor.wait_closed()


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "10.0.0.1:7000", "some.host:7000"])
def test_off_loopback_a_secret_is_needed(listen: str) -> None:
    with pytest.raises(ConfigError, match="not loopback"):
        PeerServer(listen, "two", None, SystemClock(), [])
    PeerServer(listen, "two", SECRET, SystemClock(), [])
    with pytest.raises(ConfigError, match="16 bytes"):
        PeerServer(listen, "two", b"short", SystemClock(), [])


async def test_an_address_that_is_taken_is_a_mistake_of_the_config(peer: FilePeer) -> None:
    with pytest.raises(ConfigError, match="can't listen"):
        await PeerServer(peer.address, "three", SECRET, SystemClock(), []).start()


async def test_the_secret_is_in_no_log_and_no_repr(peer: FilePeer) -> None:
    with structlog.testing.capture_logs() as logs:
        async with running_client() as client, running_client(secret=OTHER_SECRET) as stranger:
            await client.ask(peer.address, "GET", "/peer/echo/x")
            for kind in ("missing", "fault"):
                with pytest.raises(HeadraceError):
                    await client.ask(peer.address, "GET", f"/peer/errors/{kind}")
            with pytest.raises(PeerRefused) as refused:
                await stranger.ask(peer.address, "GET", "/peer/echo/x")
            said = f"{logs} {refused.value} {client!r} {vars(client)} {peer.server!r} {vars(peer.server)}"
    assert logs
    for secret in (SECRET, OTHER_SECRET):
        assert secret.decode() not in said
        assert secret.hex() not in said


# --- bounds


async def test_a_body_over_the_bound_is_refused(peer: FilePeer, client: PeerClient) -> None:
    at_bound = bytes(limits.PEER_BODY_BYTES_MAX)
    assert len(await client.ask(peer.address, "POST", "/peer/echo/x", at_bound)) == len(at_bound) + 1
    with pytest.raises(PeerRefused, match="PEER_BODY_BYTES_MAX"):
        await client.ask(peer.address, "POST", "/peer/echo/x", at_bound + b"1")
    chunked = f"{len(at_bound) + 1:x}\r\n".encode() + at_bound + b"1\r\n0\r\n\r\n"
    header = signed("POST", "/peer/echo/x", at_bound + b"1")
    status, _, body = await raw_call(peer.address, "POST", "/peer/echo/x", header, at_bound + b"1")
    assert (status, b"PEER_BODY_BYTES_MAX" in body) == (413, True)
    header = signed("POST", "/peer/echo/x", at_bound + b"1")
    status, body = await raw_chunked(peer.address, "/peer/echo/x", header, chunked)
    assert status == 413
    assert b"PEER_BODY_BYTES_MAX" in body
    assert len(peer.calls) == 1


async def raw_chunked(address: str, path: str, header: str, chunked: bytes) -> tuple[int, bytes]:
    """A body that does not say how long it is."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nHeadrace-Call: {header}\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(head.encode() + chunked)
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    answer = await reader.readuntil(b"\r\n\r\n")
    body = await reader.read()
    writer.close()
    return int(answer.split(b" ")[1]), body


async def test_a_reply_over_the_bound_is_not_taken(peer: FilePeer, client: PeerClient) -> None:
    assert len(await client.ask(peer.address, "GET", f"/peer/large?bytes={limits.PEER_REPLY_BYTES_MAX}")) > 0
    with pytest.raises(PeerUnavailable, match="answers with over"):
        await client.ask(peer.address, "GET", f"/peer/large?bytes={limits.PEER_REPLY_BYTES_MAX + 1}")


async def test_a_caller_waits_as_long_as_it_says(peer: FilePeer, client: PeerClient) -> None:
    with pytest.raises(PeerUnavailable, match="within 50 ms"):
        await client.ask(peer.address, "GET", "/peer/wait", wait_ms_max=50)
    peer.gate.set()
    assert await client.ask(peer.address, "GET", "/peer/wait") == b"waited"


async def test_a_handler_that_takes_too_long_is_given_up(tmp_path: Path, client: PeerClient) -> None:
    slow = FilePeer(tmp_path)
    slow.server = PeerServer("127.0.0.1:0", "two", SECRET, SystemClock(), slow.routes, request_ms_max=50)
    await slow.server.start()
    with pytest.raises(PeerUnavailable, match="PEER_REQUEST_MS_MAX"):
        await client.ask(slow.address, "GET", "/peer/wait")
    await slow.server.stop()


async def test_more_calls_than_may_be_in_progress_are_refused(
    peer: FilePeer, client: PeerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "PEER_REQUESTS_MAX", 3)
    waiting = [asyncio.ensure_future(client.ask(peer.address, "GET", "/peer/wait")) for _ in range(3)]
    await until(lambda: peer.waiting == 3)
    with pytest.raises(PeerUnavailable, match="PEER_REQUESTS_MAX"):
        await client.ask(peer.address, "GET", "/peer/echo/x")
    monkeypatch.setattr(limits, "PEER_ASKS_MAX", 3)
    with pytest.raises(PeerUnavailable, match="PEER_ASKS_MAX"):
        await client.ask(peer.address, "GET", "/peer/echo/x")
    peer.gate.set()
    assert await asyncio.gather(*waiting) == [b"waited"] * 3


async def test_more_connections_than_there_may_be_are_closed(peer: FilePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PEER_CONNECTIONS_MAX", 2)
    host, _, port = peer.address.rpartition(":")
    opened = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
    await until(lambda: peer.server.statistics().connections == 2)
    reader, writer = await asyncio.open_connection(host, int(port))
    assert await reader.read() == b""
    assert peer.server.statistics().refused["connections"] == 1
    for _, each in [*opened, (reader, writer)]:
        each.close()
    await until(lambda: peer.server.statistics().connections == 0)


# --- files


async def test_a_file_comes_whole_and_verified(peer: FilePeer, client: PeerClient, tmp_path: Path) -> None:
    for length in (0, 1, 3_000_001):
        content, sha256 = file_of(peer.folder, "f", length)
        for size in (length, None):
            target = tmp_path / "ours" / f"{length}-{size}"
            await client.fetch(peer.address, "/peer/files/f", target, size, sha256)
            assert target.read_bytes() == content
    assert [entry.name for entry in (tmp_path / "ours").iterdir() if entry.name.startswith(".")] == []
    statistics = client.statistics()
    assert (statistics.files_fetched, statistics.files_resumed) == (6, 0)
    assert statistics.bytes_fetched == 2 * 3_000_002


async def test_many_files_at_once(peer: FilePeer, client: PeerClient, tmp_path: Path) -> None:
    files = {f"f{number}": file_of(peer.folder, f"f{number}", 200_000 + number) for number in range(40)}
    await asyncio.gather(
        *(
            client.fetch(peer.address, f"/peer/files/{name}", tmp_path / name, len(content), sha256, sync=False)
            for name, (content, sha256) in files.items()
        )
    )
    for name, (content, _) in files.items():
        assert (tmp_path / name).read_bytes() == content
    await until(lambda: peer.server.statistics().files_in_progress == 0)


def test_the_same_on_the_loop_that_nodes_run_on(tmp_path: Path) -> None:
    async def fetch() -> None:
        async with running_peer(tmp_path / "theirs") as peer, running_client() as client:
            content, sha256 = file_of(peer.folder, "f", LARGE)
            async with relay_to(peer.address) as relay:
                assert await client.ask(relay.address, "POST", "/peer/echo/x", bytes(limits.MIB))
                relay.bytes_back = 3 * limits.MIB
                await client.fetch(relay.address, "/peer/files/f", tmp_path / "f", None, sha256)
            assert (tmp_path / "f").read_bytes() == content
            await until(lambda: peer.server.statistics().files_in_progress == 0)

    uvloop.run(fetch())


async def test_two_fetches_of_one_target_do_not_mix(peer: FilePeer, client: PeerClient, tmp_path: Path) -> None:
    content, sha256 = file_of(peer.folder, "f", LARGE)
    outcomes = await asyncio.gather(
        *(client.fetch(peer.address, "/peer/files/f", tmp_path / "f", LARGE, sha256) for _ in range(2)),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), PeerUnavailable]
    assert (tmp_path / "f").read_bytes() == content


@pytest.mark.parametrize(
    "name", ["..", "%2e%2e", "..%2Fsecret", "..%5Csecret", "a%00b", "%2Fetc%2Fpasswd", "", "secret%0a", "none"]
)
async def test_no_path_leads_out(peer: FilePeer, client: PeerClient, tmp_path: Path, name: str) -> None:
    (peer.folder.parent / "secret").write_text("s")
    with pytest.raises(NotFound):
        await client.fetch(peer.address, f"/peer/files/{name}", tmp_path / "f", None, "0" * 64)
    assert not (tmp_path / "f").exists()


async def test_only_regular_files_are_sent(peer: FilePeer, client: PeerClient, tmp_path: Path) -> None:
    (peer.folder.parent / "secret").write_text("s")
    (peer.folder / "link").symlink_to(peer.folder.parent / "secret")
    (peer.folder / "folder").mkdir()
    file_of(peer.folder, "f.gz", 100)
    (peer.folder / "f").write_bytes(b"plain")
    for name in ("link", "folder"):
        with pytest.raises(NotFound):
            await client.fetch(peer.address, f"/peer/files/{name}", tmp_path / "f", None, "0" * 64)
    _, headers, body = await raw_call(
        peer.address, "GET", "/peer/files/f", signed("GET", "/peer/files/f"), more="Accept-Encoding: gzip, br\r\n"
    )
    assert body == b"plain"
    assert "content-encoding" not in headers


@pytest.mark.parametrize(
    ("wanted", "status", "sent"),
    [
        ("bytes=4-", 206, b"456789"),
        ("bytes=0-", 206, b"0123456789"),
        ("bytes=10-", 416, None),
        ("bytes=-3", 416, None),
        ("bytes=1-2,4-5", 416, None),
        ("lines=1-", 416, None),
    ],
)
async def test_ranges(peer: FilePeer, wanted: str, status: int, sent: bytes | None) -> None:
    (peer.folder / "f").write_bytes(b"0123456789")
    header = signed("GET", "/peer/files/f")
    got, headers, body = await raw_call(peer.address, "GET", "/peer/files/f", header, more=f"Range: {wanted}\r\n")
    assert got == status
    if sent is None:
        assert headers["content-range"] == "bytes */10"
    else:
        assert (body, headers["content-range"]) == (sent, f"bytes {10 - len(sent)}-9/10")


async def test_a_cut_download_goes_on_where_it_was(peer: FilePeer, client: PeerClient, tmp_path: Path) -> None:
    content, sha256 = file_of(peer.folder, "f", LARGE)
    async with relay_to(peer.address) as relay:
        await client.ask(relay.address, "GET", "/peer/echo/x")
        relay.bytes_back = 3 * limits.MIB
        await client.fetch(relay.address, "/peer/files/f", tmp_path / "f", LARGE, sha256)
        assert relay.connections == 1 + 3
    assert (tmp_path / "f").read_bytes() == content
    assert client.statistics().bytes_fetched == LARGE


async def test_the_server_killed_in_the_middle(client: PeerClient, tmp_path: Path) -> None:
    """The part stays, another node is no help without it, and the node that comes back goes on from there."""
    content, sha256 = file_of(tmp_path / "theirs", "f", LARGE)
    first = PeerProcess(tmp_path / "theirs")
    async with relay_to(first.address) as relay:
        await client.ask(relay.address, "GET", "/peer/echo/x")
        relay.bytes_back, relay.then_hold = 2 * limits.MIB, True
        fetching = asyncio.ensure_future(client.fetch(relay.address, "/peer/files/f", tmp_path / "f", LARGE, sha256))
        await relay.held.wait()
        first.kill()
    with pytest.raises(PeerUnavailable, match="resumed when asked again"):
        await fetching
    part = part_of(tmp_path / "f", sha256)
    came = part.stat().st_size
    assert limits.MIB < came < LARGE
    second = PeerProcess(tmp_path / "theirs", first.address)
    await client.fetch(second.address, "/peer/files/f", tmp_path / "f", None, sha256)
    second.kill()
    assert (tmp_path / "f").read_bytes() == content
    assert not part.exists()
    assert client.statistics().files_resumed == 1
    assert client.statistics().bytes_fetched == LARGE


async def test_a_cancelled_fetch_stops_and_can_be_resumed(peer: FilePeer, client: PeerClient, tmp_path: Path) -> None:
    content, sha256 = file_of(peer.folder, "f", LARGE)
    async with relay_to(peer.address) as relay:
        await client.ask(relay.address, "GET", "/peer/echo/x")
        relay.bytes_back, relay.then_hold = 2 * limits.MIB, True
        fetching = asyncio.ensure_future(client.fetch(relay.address, "/peer/files/f", tmp_path / "f", LARGE, sha256))
        await relay.held.wait()
        fetching.cancel()
        async with asyncio.timeout(limits.PEER_STALL_MS_MAX / 2000):  # it does not wait for the peer
            with pytest.raises(asyncio.CancelledError):
                await fetching
        assert client.statistics().fetching == 0
    before = client.statistics().bytes_fetched
    async with running_client("again") as again:
        await again.fetch(peer.address, "/peer/files/f", tmp_path / "f", LARGE, sha256)
        assert again.statistics().bytes_fetched == LARGE - before
    assert (tmp_path / "f").read_bytes() == content


async def test_a_part_that_is_whole_needs_no_peer(client: PeerClient, tmp_path: Path) -> None:
    """The process ended between the last byte and the rename."""
    content, sha256 = file_of(tmp_path, "g", 1000)
    part_of(tmp_path / "f", sha256).write_bytes(content)
    await client.fetch("127.0.0.1:1", "/peer/files/f", tmp_path / "f", 1000, sha256)
    assert (tmp_path / "f").read_bytes() == content


async def test_a_whole_part_of_a_file_of_unknown_size(peer: FilePeer, client: PeerClient, tmp_path: Path) -> None:
    content, sha256 = file_of(peer.folder, "f", 1000)
    part_of(tmp_path / "f", sha256).write_bytes(content)
    await client.fetch(peer.address, "/peer/files/f", tmp_path / "f", None, sha256)
    assert (tmp_path / "f").read_bytes() == content


@pytest.mark.parametrize("left", [b"x" * 500, b"x" * 5000])
@pytest.mark.parametrize("size", [1000, None])
async def test_a_part_of_wrong_bytes_is_removed_and_then_it_works(
    peer: FilePeer, client: PeerClient, tmp_path: Path, left: bytes, size: int | None
) -> None:
    content, sha256 = file_of(peer.folder, "f", 1000)
    part = part_of(tmp_path / "f", sha256)
    part.write_bytes(left)
    with contextlib.suppress(PeerUnavailable):
        await client.fetch(peer.address, "/peer/files/f", tmp_path / "f", size, sha256)
    assert not (tmp_path / "f").exists() or (tmp_path / "f").read_bytes() == content
    await client.fetch(peer.address, "/peer/files/f", tmp_path / "f", size, sha256)
    assert (tmp_path / "f").read_bytes() == content
    assert not part.exists()


async def test_wrong_bytes_are_never_given_a_name(peer: FilePeer, client: PeerClient, tmp_path: Path) -> None:
    content, sha256 = file_of(peer.folder, "f", 1000)
    (peer.folder / "f").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(PeerUnavailable, match="other bytes than its sha256"):
        await client.fetch(peer.address, "/peer/files/f", tmp_path / "f", 1000, sha256)
    assert os.listdir(tmp_path) == ["theirs"]


async def test_a_file_of_another_size_is_not_even_taken(peer: FilePeer, client: PeerClient, tmp_path: Path) -> None:
    _, sha256 = file_of(peer.folder, "f", 1000)
    with pytest.raises(PeerUnavailable, match="1000 bytes, not 999"):
        await client.fetch(peer.address, "/peer/files/f", tmp_path / "f", 999, sha256)
    with pytest.raises(PeerUnavailable, match="over 999"):
        await client.fetch(peer.address, "/peer/files/f", tmp_path / "f", None, sha256, bytes_max=999)
    assert client.statistics().bytes_fetched == 0


async def test_a_full_disk_is_told_as_such(peer: FilePeer, client: PeerClient, tmp_path: Path) -> None:
    content, sha256 = file_of(peer.folder, "f", 3 * limits.MIB)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits.MIB, before[1]))
    try:
        with pytest.raises(StoreUnavailable, match="free or repair the disk"):
            await client.fetch(peer.address, "/peer/files/f", tmp_path / "f", len(content), sha256)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    await client.fetch(peer.address, "/peer/files/f", tmp_path / "f", len(content), sha256)
    assert (tmp_path / "f").read_bytes() == content
    assert client.statistics().files_resumed == 1


async def test_a_folder_that_can_not_be_is_told_as_such(peer: FilePeer, client: PeerClient, tmp_path: Path) -> None:
    _, sha256 = file_of(peer.folder, "f", 10)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreUnavailable):
        await client.fetch(peer.address, "/peer/files/f", tmp_path / "file" / "f", 10, sha256)


async def test_a_peer_that_falls_silent_is_given_up(
    peer: FilePeer, client: PeerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sha256 = file_of(peer.folder, "f", LARGE)
    async with relay_to(peer.address) as relay:
        await client.ask(relay.address, "GET", "/peer/echo/x")
        monkeypatch.setattr(limits, "PEER_STALL_MS_MAX", 200)
        relay.bytes_back, relay.then_hold = 100, True  # not even the headers
        with pytest.raises(PeerUnavailable):
            await client.fetch(relay.address, "/peer/files/f", tmp_path / "f", LARGE, sha256)
        relay.bytes_back = limits.MIB
        with pytest.raises(PeerUnavailable):
            await client.fetch(relay.address, "/peer/files/f", tmp_path / "f", LARGE, sha256)
    assert part_of(tmp_path / "f", sha256).stat().st_size > 0


async def test_a_peer_that_sends_too_slowly_is_given_up(
    peer: FilePeer, client: PeerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never silent for long."""
    _, sha256 = file_of(peer.folder, "f", LARGE)
    async with relay_to(peer.address) as relay:
        await client.ask(relay.address, "GET", "/peer/echo/x")
        relay.piece, relay.delay_s = 1000, 0.02
        monkeypatch.setattr(limits, "PEER_STALL_MS_MAX", 300)
        monkeypatch.setattr(limits, "PEER_BYTES_PER_SECOND_MIN", 1 << 40)
        with pytest.raises(PeerUnavailable):
            await client.fetch(relay.address, "/peer/files/f", tmp_path / "f", LARGE, sha256)


async def test_a_long_transfer_may_take_as_long_as_its_bytes_need(
    peer: FilePeer, client: PeerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, sha256 = file_of(peer.folder, "f", 3 * limits.MIB)
    async with relay_to(peer.address) as relay:
        await client.ask(relay.address, "GET", "/peer/echo/x")
        relay.piece, relay.delay_s = 1 << 16, 0.05
        monkeypatch.setattr(limits, "PEER_CONNECT_MS_MAX", 500)
        monkeypatch.setattr(limits, "PEER_STALL_MS_MAX", 500)
        monkeypatch.setattr(limits, "PEER_BYTES_PER_SECOND_MIN", 1 << 16)
        await client.fetch(relay.address, "/peer/files/f", tmp_path / "f", None, sha256)
        assert relay.connections == 1 + 1
    assert (tmp_path / "f").read_bytes() == content


async def test_a_peer_that_does_not_read_holds_no_thread(peer: FilePeer, monkeypatch: pytest.MonkeyPatch) -> None:
    file_of(peer.folder, "f", 4 * LARGE)
    monkeypatch.setattr(limits, "PEER_STALL_MS_MAX", 200)
    host, _, port = peer.address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port), limit=1024)
    header = signed("GET", "/peer/files/f")
    writer.write(f"GET /peer/files/f HTTP/1.1\r\nHost: x\r\nHeadrace-Call: {header}\r\n\r\n".encode())
    await until(lambda: peer.server.statistics().files_in_progress == 1)
    await until(lambda: peer.server.statistics().files_in_progress == 0)
    assert peer.server.statistics().bytes_sent == 0
    writer.transport.abort()


async def test_more_files_than_may_be_sent_are_refused(
    peer: FilePeer, client: PeerClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, sha256 = file_of(peer.folder, "f", 4 * LARGE)
    monkeypatch.setattr(limits, "PEER_FILES_MAX", 1)
    async with relay_to(peer.address) as relay:
        await client.ask(relay.address, "GET", "/peer/echo/x")
        relay.bytes_back, relay.then_hold = limits.MIB, True
        fetching = asyncio.ensure_future(client.fetch(relay.address, "/peer/files/f", tmp_path / "f", None, sha256))
        await relay.held.wait()
        with pytest.raises(PeerUnavailable, match="PEER_FILES_MAX"):
            await client.fetch(peer.address, "/peer/files/f", tmp_path / "g", None, sha256)
        fetching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await fetching
    await until(lambda: peer.server.statistics().files_in_progress == 0)
    await client.fetch(peer.address, "/peer/files/f", tmp_path / "g", None, sha256)
    assert (tmp_path / "g").read_bytes() == content


async def test_a_server_that_stops_cuts_its_files_at_once(client: PeerClient, tmp_path: Path) -> None:
    async with running_peer(tmp_path / "theirs") as peer:
        _, sha256 = file_of(peer.folder, "f", 4 * LARGE)
        async with relay_to(peer.address) as relay:
            await client.ask(relay.address, "GET", "/peer/echo/x")
            relay.bytes_back, relay.then_hold = limits.MIB, True
            fetching = asyncio.ensure_future(client.fetch(relay.address, "/peer/files/f", tmp_path / "f", None, sha256))
            await relay.held.wait()
            async with asyncio.timeout(3):
                await peer.server.stop()
    with pytest.raises(PeerUnavailable):
        await fetching


async def test_a_client_that_stops_ends_its_fetches(peer: FilePeer, tmp_path: Path) -> None:
    _, sha256 = file_of(peer.folder, "f", LARGE)
    async with relay_to(peer.address) as relay:
        async with running_client() as client:
            await client.ask(relay.address, "GET", "/peer/echo/x")
            relay.bytes_back, relay.then_hold = limits.MIB, True
            fetching = asyncio.ensure_future(
                client.fetch(relay.address, "/peer/files/f", tmp_path / "f", LARGE, sha256)
            )
            await relay.held.wait()
        async with asyncio.timeout(limits.PEER_STALL_MS_MAX / 2000):
            with pytest.raises(PeerUnavailable):
                await fetching
    with pytest.raises(PeerUnavailable, match="the node stops"):
        await client.ask(peer.address, "GET", "/peer/echo/x")
