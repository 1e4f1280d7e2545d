"""Model files travel to every node that the catalog says needs them: real servers, real files, the real reducer."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from peer_support import SECRET, relay_to
from waiting import until

from node.kernel import limits
from node.kernel.clock import SystemClock
from node.kernel.errors import ClusterUnavailable, NotFound, PeerRefused, PeerUnavailable
from replication.blob_exchange import BlobExchange
from replication.blobs import BlobStore
from replication.catalog import Catalog, apply, problem
from replication.commands import Command, ForgetVersion, HoldBlob, JoinNode, PutTenant, PutVersion, RetireVersion
from replication.peers import PeerClient, PeerServer, part_of


class Agreement:
    """The catalog of all nodes of a test: what Raft would make of it, at once."""

    def __init__(self) -> None:
        self.catalog = Catalog()
        self.commands: list[Command] = []
        self.subscribers: list[Callable[[], None]] = []
        self.cut = False
        """As without a quorum."""

    def agree(self, command: Command) -> None:
        assert problem(self.catalog, command) == ""
        self.catalog = apply(self.catalog, command)
        self.commands.append(command)
        for changed in self.subscribers:
            changed()

    def put_version(self, model: str, blob: str) -> None:
        if "ads" not in self.catalog.tenants:
            self.agree(PutTenant(revision=self.catalog.revision, name="ads", settings=""))
        self.agree(
            PutVersion(
                revision=self.catalog.revision, tenant="ads", model=model, version=blob, blob=blob, manifest=model
            )
        )

    def forget_version(self, model: str, version: str) -> None:
        for kind in (RetireVersion, ForgetVersion):
            self.agree(kind(revision=self.catalog.revision, tenant="ads", model=model, version=version))

    def holders(self, blob: str) -> set[str]:
        return set(self.catalog.holders[blob])

    def told(self, node: str, blob: str) -> list[bool]:
        return [
            command.held
            for command in self.commands
            if isinstance(command, HoldBlob) and (command.node, command.blob) == (node, blob)
        ]


class Member:
    """One node's view of the agreement."""

    def __init__(self, agreement: Agreement, name: str) -> None:
        self.name = name
        self.incarnation = 1
        self._agreement = agreement

    @property
    def catalog(self) -> Catalog:
        return self._agreement.catalog

    def subscribe(self, changed: Callable[[], None]) -> None:
        self._agreement.subscribers.append(changed)

    async def propose(self, command: Command, wait_seconds_max: float = 5.0) -> None:
        if self._agreement.cut:
            raise ClusterUnavailable("no quorum")
        reason = problem(self.catalog, command)
        if reason:
            raise PeerRefused(reason)
        self._agreement.agree(command)


class BlobNode:
    def __init__(self, agreement: Agreement, folder: Path, name: str) -> None:
        self.agreement = agreement
        self.name = name
        self.folder = folder / name
        self.member = Member(agreement, name)
        self.http_address = ""
        """What the catalog is told; the server's own unless set."""
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        clock = SystemClock()
        self.blobs = BlobStore(self.folder)
        self.client = PeerClient(self.name, SECRET, clock)
        self.exchange = BlobExchange(self.blobs, self.client, self.member, clock)
        self.server = PeerServer("127.0.0.1:0", self.name, SECRET, clock, self.exchange.routes())
        await self.server.start()
        await self.client.start()

    def join(self, incarnation: int = 1) -> None:
        address = self.http_address or self.server.address
        self.member.incarnation = incarnation
        self.agreement.agree(
            JoinNode(
                revision=self.agreement.catalog.revision,
                name=self.name,
                raft_address=f"raft-{self.name}:1",
                http_address=address,
                incarnation=incarnation,
            )
        )

    def run(self) -> None:
        self._running = asyncio.ensure_future(self.exchange.run())

    async def stop(self) -> None:
        if self._running is not None:
            assert not self._running.done(), self._running.exception()
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running
            self._running = None
        await self.server.stop()
        await self.client.stop()


class Nodes:
    def __init__(self, folder: Path) -> None:
        self.agreement = Agreement()
        self.folder = folder
        self.all: dict[str, BlobNode] = {}

    async def add(self, name: str, run: bool = True) -> BlobNode:
        node = self.all[name] = BlobNode(self.agreement, self.folder, name)
        await node.start()
        node.join()
        if run:
            node.run()
        return node

    async def everywhere(self, *blobs: str) -> None:
        await until(lambda: all(self.agreement.holders(blob) == set(self.all) for blob in blobs))


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    for node in made.all.values():
        await node.stop()


async def test_a_file_put_on_one_node_gets_to_all_and_the_catalog_says_so(nodes: Nodes) -> None:
    one, two, three = [await nodes.add(name) for name in ("one", "two", "three")]
    blob = one.blobs.put(b"a model")
    nodes.agreement.put_version("bid", blob)
    await nodes.everywhere(blob)
    assert two.blobs.get(blob) == three.blobs.get(blob) == b"a model"
    assert all(nodes.agreement.told(name, blob) == [True] for name in nodes.all)
    assert await two.exchange.fetch(blob) == b"a model"
    statistics = two.exchange.statistics()
    assert (statistics.wanted, statistics.held, statistics.lacking, statistics.fetched) == (1, 1, (), 1)


async def test_many_files_come_a_few_at_a_time(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = await nodes.add("one"), await nodes.add("two")
    at_once = []
    serve = one.blobs.path

    def path(sha256: str) -> Path:
        at_once.append(two.exchange.statistics().fetching)
        return serve(sha256)

    monkeypatch.setattr(one.blobs, "path", path)
    blobs = [one.blobs.put(f"model {number}".encode()) for number in range(30)]
    for number, blob in enumerate(blobs):
        nodes.agreement.put_version(f"m{number}", blob)
    await nodes.everywhere(*blobs)
    assert max(at_once) == limits.BLOB_FETCHES_MAX


async def test_a_holder_that_is_gone_or_has_other_bytes_is_passed_over(nodes: Nodes) -> None:
    """Files enough that each of three holders is asked first for some."""
    one, two, three = [await nodes.add(name) for name in ("one", "two", "three")]
    blobs = [one.blobs.put(f"model {number}".encode()) for number in range(12)]
    for number, blob in enumerate(blobs):
        nodes.agreement.put_version(f"m{number}", blob)
    await nodes.everywhere(*blobs)
    await two.stop()
    for blob in blobs:
        three.blobs.path(blob).write_bytes(b"damaged on the disk, and nobody saw it yet")
    four = await nodes.add("four")
    await until(lambda: all("four" in nodes.agreement.holders(blob) for blob in blobs))
    for number, blob in enumerate(blobs):
        assert four.blobs.get(blob) == f"model {number}".encode()
    assert four.exchange.statistics().failed == 0
    await two.start()


async def test_a_file_damaged_here_is_told_and_fetched_again(nodes: Nodes) -> None:
    one, two = await nodes.add("one"), await nodes.add("two")
    blob = one.blobs.put(b"a model")
    nodes.agreement.put_version("bid", blob)
    await nodes.everywhere(blob)
    two.blobs.path(blob).write_bytes(b"a mod3l")
    assert await two.exchange.fetch(blob) == b"a model"
    assert two.exchange.statistics().lost == 1
    await until(lambda: two.exchange.statistics().held == 1)
    await nodes.everywhere(blob)


async def test_a_file_lost_here_is_not_claimed_until_it_is_back(nodes: Nodes) -> None:
    one, two = await nodes.add("one"), await nodes.add("two")
    blob = one.blobs.put(b"a model")
    nodes.agreement.put_version("bid", blob)
    await nodes.everywhere(blob)
    await one.server.stop()
    two.blobs.delete(blob)
    nodes.agreement.put_version("other", one.blobs.put(b"another"))
    await until(lambda: nodes.agreement.holders(blob) == {"one"})
    await until(lambda: two.exchange.statistics().failed >= 2)
    with pytest.raises(PeerUnavailable):
        await two.exchange.fetch(blob)
    await one.stop()
    await one.start()
    one.run()
    one.join()
    await nodes.everywhere(blob)
    assert nodes.agreement.told("two", blob) == [True, False, True]


async def test_what_was_damaged_while_the_node_was_down_is_found_at_its_start(nodes: Nodes) -> None:
    one, two = await nodes.add("one"), await nodes.add("two")
    blob = one.blobs.put(b"a model")
    nodes.agreement.put_version("bid", blob)
    await nodes.everywhere(blob)
    await two.stop()
    (two.folder / blob).write_bytes(b"a mod3l")
    await two.start()
    two.join()
    two.run()
    await until(lambda: two.exchange.statistics().held == 1)
    assert two.blobs.get(blob) == b"a model"
    assert two.exchange.statistics().lost == 1
    await nodes.everywhere(blob)


async def test_a_start_with_all_files_right_tells_nothing(nodes: Nodes) -> None:
    one, two = await nodes.add("one"), await nodes.add("two")
    blob = one.blobs.put(b"a model")
    nodes.agreement.put_version("bid", blob)
    await nodes.everywhere(blob)
    await two.stop()
    await two.start()
    two.join()
    two.run()
    await until(lambda: two.exchange.statistics().held == 1)
    other = one.blobs.put(b"another")
    nodes.agreement.put_version("other", other)
    await nodes.everywhere(other)
    assert nodes.agreement.told("two", blob) == [True]


async def test_a_new_holder_is_asked_at_once(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BLOB_RETRY_MS_MIN", limits.BLOB_RETRY_MS_MAX)
    one, two = await nodes.add("one"), await nodes.add("two", run=False)
    blob = one.blobs.put(b"a model")
    nodes.agreement.put_version("bid", blob)
    await until(lambda: nodes.agreement.holders(blob) == {"one"})
    await one.server.stop()
    two.run()
    await until(lambda: two.exchange.statistics().failed == 1)
    three = await nodes.add("three", run=False)
    three.blobs.put(b"a model")
    three.run()
    await nodes.everywhere(blob)
    assert two.exchange.statistics().failed == 1


async def test_a_file_that_nobody_has_is_waited_for(nodes: Nodes) -> None:
    one, two = await nodes.add("one"), await nodes.add("two")
    blob = hashlib.sha256(b"a model").hexdigest()
    nodes.agreement.put_version("bid", blob)
    await until(lambda: two.exchange.statistics().lacking == (blob,))
    with pytest.raises(NotFound, match="no node that is known has"):
        await two.exchange.fetch(blob)
    assert nodes.agreement.holders(blob) == set()
    one.blobs.put(b"a model")
    nodes.agreement.put_version("again", blob)
    await nodes.everywhere(blob)


async def test_without_a_quorum_files_come_and_are_told_later(nodes: Nodes) -> None:
    one, two = await nodes.add("one"), await nodes.add("two", run=False)
    blob = one.blobs.put(b"a model")
    nodes.agreement.put_version("bid", blob)
    await until(lambda: nodes.agreement.holders(blob) == {"one"})
    nodes.agreement.cut = True
    two.run()
    await until(lambda: two.exchange.statistics().held == 1)
    assert nodes.agreement.holders(blob) == {"one"}
    nodes.agreement.cut = False
    await nodes.everywhere(blob)


async def test_a_node_that_has_not_joined_yet_says_nothing(nodes: Nodes) -> None:
    one, two = await nodes.add("one"), await nodes.add("two", run=False)
    blob = one.blobs.put(b"a model")
    nodes.agreement.put_version("bid", blob)
    two.member.incarnation = 2
    two.run()
    await until(lambda: two.exchange.statistics().held == 1)
    assert nodes.agreement.holders(blob) == {"one"}
    two.join(incarnation=2)
    await nodes.everywhere(blob)


async def test_a_disk_that_was_lost_is_filled_again(nodes: Nodes) -> None:
    one, two = await nodes.add("one"), await nodes.add("two")
    blob = one.blobs.put(b"a model")
    nodes.agreement.put_version("bid", blob)
    await nodes.everywhere(blob)
    await two.stop()
    two.blobs.delete(blob)
    await two.start()
    two.join(incarnation=2)
    assert nodes.agreement.holders(blob) == {"one"}
    two.run()
    await nodes.everywhere(blob)
    assert two.blobs.get(blob) == b"a model"


async def test_what_no_version_needs_is_neither_fetched_nor_removed(nodes: Nodes) -> None:
    one, two = await nodes.add("one"), await nodes.add("two")
    blob = one.blobs.put(b"a model")
    nodes.agreement.put_version("bid", blob)
    await nodes.everywhere(blob)
    part = part_of(two.blobs.path("1" * 64), "1" * 64)
    part.write_bytes(b"some of a file that was wanted once")
    nodes.agreement.forget_version("bid", blob)
    await until(lambda: not part.exists())
    assert two.exchange.wanted() == frozenset()
    assert two.blobs.names() == [blob]
    two.blobs.delete(blob)
    with pytest.raises(NotFound, match="nor does a model need it"):
        await two.exchange.fetch(blob)
    assert two.exchange.statistics().lost == 0


_FETCH = """
import asyncio, sys
from pathlib import Path
sys.path.append(".")
from node.kernel.clock import SystemClock
from replication.blobs import BlobStore
from replication.peers import PeerClient
async def fetch(address, folder, sha256):
    client = PeerClient("two", sys.stdin.buffer.readline().strip(), SystemClock())
    await client.start()
    await client.fetch(address, f"/peer/blobs/{sha256}", BlobStore(Path(folder)).path(sha256), None, sha256)
asyncio.run(fetch(*sys.argv[1:]))
"""


async def test_a_node_killed_in_the_middle_of_a_file_goes_on_from_there(nodes: Nodes) -> None:
    one, two = await nodes.add("one"), await nodes.add("two", run=False)
    content = os.urandom(8 * limits.MIB)
    blob = one.blobs.put(content)
    await two.stop()
    async with relay_to(one.server.address) as relay:
        relay.bytes_back, relay.then_hold = 2 * limits.MIB, True
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", _FETCH, relay.address, str(two.folder), blob], stdin=subprocess.PIPE
        )
        assert process.stdin is not None
        process.stdin.write(SECRET + b"\n")
        process.stdin.flush()
        part = part_of(two.blobs.path(blob), blob)
        await until(lambda: part.exists() and part.stat().st_size > limits.MIB)
        process.kill()
        process.wait(10)
        process.stdin.close()
    came = part.stat().st_size
    await two.start()
    two.join()
    two.run()
    nodes.agreement.put_version("bid", blob)
    await nodes.everywhere(blob)
    assert two.blobs.get(blob) == content
    statistics = two.client.statistics()
    assert (statistics.files_resumed, statistics.bytes_fetched) == (1, len(content) - came)


async def test_one_fetch_serves_all_who_wait_for_the_file(nodes: Nodes) -> None:
    one, two = await nodes.add("one"), await nodes.add("two", run=False)
    blob = one.blobs.put(b"a model")
    nodes.agreement.put_version("bid", blob)
    await until(lambda: nodes.agreement.holders(blob) == {"one"})
    assert await asyncio.gather(*(two.exchange.fetch(blob) for _ in range(10))) == [b"a model"] * 10
    assert two.client.statistics().files_fetched == 1
    two.run()


async def test_a_fault_of_ours_ends_the_run_loudly(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await nodes.add("one", run=False)

    def broken(sha256: str) -> bool:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(one.blobs, "check", broken)
    nodes.agreement.put_version("bid", one.blobs.put(b"a model"))
    async with asyncio.timeout(10):
        with pytest.raises(RuntimeError, match="a fault of ours"):
            await one.exchange.run()


async def test_a_disk_that_refuses_is_waited_out(nodes: Nodes) -> None:
    one, two = await nodes.add("one"), await nodes.add("two")
    two.folder.rename(two.folder.with_name("elsewhere"))
    two.folder.write_text("a file where the folder should be")
    blob = one.blobs.put(b"a model")
    nodes.agreement.put_version("bid", blob)
    await until(lambda: "can't be listed" in two.exchange.statistics().last_failure)
    two.folder.unlink()
    two.folder.with_name("elsewhere").rename(two.folder)
    nodes.agreement.put_version("other", one.blobs.put(b"another"))
    await nodes.everywhere(blob)
