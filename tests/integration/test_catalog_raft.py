"""Raft with real processes on loopback: elections, kills, pauses, lost disks, members, strangers, damaged files."""

from __future__ import annotations

import asyncio
import dataclasses
import pickle
import shutil
import signal
import struct
import time
import zlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from order_lines import WAIT_S, Failed, OrderedProcess, free_address, until

from node.kernel.errors import BoundExceeded, CatalogCorrupt, ClusterUnavailable, ConfigError, StoreUnavailable
from replication.catalog_raft import CatalogRaft
from replication.raft_journal import accept_loss, wipe
from replication.raft_types import RaftSettings, is_loopback

SECRET = "a secret that no log may show"
NAMES = ("a", "b", "c")
PATIENT = {
    "heartbeat_ms": 2000,
    "election_ms_min": 6100,
    "election_ms_max": 6200,
    "reconnect_ms": 50,
    "connection_lost_ms": 6500,
    "quorum_lost_ms": 6100,
}
"""With these times only what does not wait for them happens within a heartbeat."""


class Node(OrderedProcess):
    def __init__(self, settings: dict[str, Any], log: Path) -> None:
        super().__init__(Path(__file__).with_name("raft_process.py"), settings, log)
        self.name = settings["name"]
        self.folder = Path(settings["folder"])

    async def put(self, key: str, value: Any, identity: str = "", wait_s: float = 10.0) -> Any:
        command = {"id": identity or f"{key}={value}", "key": key, "value": value}
        return await self.ask("propose", command=command, wait_s=wait_s)

    async def get(self, key: str) -> Any:
        """As of now, wherever it was written."""
        await self.ask("barrier", wait_s=10)
        return await self.ask("get", key=key)

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self.ask("status")
        return status


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peers = {name: free_address() for name in NAMES}
        self.nodes: dict[str, Node] = {}

    def make(self, name: str, /, **settings: Any) -> Node:
        address = self.peers.setdefault(name, free_address())
        known = {"name": name, "listen": address, "peers": self.peers, "folder": str(self.folder / name)}
        node = self.nodes[name] = Node(known | {"secret": SECRET} | settings, self.folder / f"{name}.log")
        return node

    async def start(self, **settings: Any) -> list[Node]:
        nodes = [self.make(name, **settings) for name in NAMES]
        await asyncio.gather(*(node.start() for node in nodes))
        await asyncio.gather(*(node.ask("ready", wait_s=WAIT_S) for node in nodes))
        return nodes

    async def leader(self, among: list[Node]) -> Node:
        async def found() -> Node | None:
            for node in among:
                if (await node.status())["is_leader"]:
                    return node
            return None

        leader: Node = await until("a leader", found)
        return leader


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    await asyncio.gather(*(node.kill() for node in made.nodes.values()))
    for node in made.nodes.values():
        assert SECRET not in node.log.read_text()


async def split(cluster: Cluster, nodes: list[Node]) -> tuple[Node, list[Node]]:
    leader = await cluster.leader(nodes)
    return leader, [node for node in nodes if node is not leader]


async def test_three_nodes_elect_agree_and_pass_a_killed_leader(cluster: Cluster) -> None:
    nodes = await cluster.start()
    leader, (follower, other) = await split(cluster, nodes)
    first = await leader.put("x", 1)
    assert await follower.put("y", 2) > first
    assert [await node.get("y") for node in nodes] == [2, 2, 2]

    large = "\N{LATIN SMALL LETTER Y WITH DIAERESIS}" * 250_000
    await follower.put("large", large, identity="large")
    assert await other.get("large") == large

    before = await follower.put("z", 3, identity="once")
    assert await leader.put("z", 4, identity="once") > before
    assert [await node.get("z") for node in nodes] == [3, 3, 3]
    assert [(await node.status())["duplicates"] for node in nodes] == [1, 1, 1]
    status = await leader.status()
    assert status["leader"] == leader.name
    assert status["members"] == cluster.peers
    assert status["changes"] > 0
    assert SECRET not in status["repr"]

    waiting = asyncio.create_task(follower.put("during", 5))
    await leader.kill()
    await waiting
    survivor = await cluster.leader([follower, other])
    assert survivor.name != leader.name
    assert await other.get("during") == 5
    await leader.start()
    assert await leader.get("during") == 5


async def test_all_killed_at_once_lose_nothing_through_compactions(cluster: Cluster) -> None:
    """6,001 keys, and a log that is cut every 200 entries while commands keep coming."""
    nodes = await cluster.start(compaction_entries=200, sync=False)
    done = await asyncio.gather(*(node.ask("bulk", prefix=node.name, count=2000, wait_s=20) for node in nodes))
    await nodes[0].put("last", "one")
    assert done == [2000, 2000, 2000]
    assert min([(await node.status())["compactions"] for node in nodes]) > 5
    for node in nodes:
        node.signal(signal.SIGKILL)
    await asyncio.gather(*(node.kill() for node in nodes))

    await asyncio.gather(*(node.start() for node in nodes))
    for node in nodes:
        assert await node.get("last") == "one"
        assert await node.ask("count", prefix="") == 6001
        assert (await node.status())["log_entries"] < 1000


async def test_a_minority_cannot_commit(cluster: Cluster) -> None:
    nodes = await cluster.start()
    leader, others = await split(cluster, nodes)
    for node in others:
        node.signal(signal.SIGSTOP)
    with pytest.raises(Failed) as refused:
        await leader.put("cut off", 1, wait_s=1.5)
    assert refused.value.name == "ClusterUnavailable"
    assert "may or may not" in str(refused.value)
    assert (await leader.status())["leader"] is None
    with pytest.raises(Failed, match=r"ClusterUnavailable.*no leader"):
        await leader.ask("barrier", wait_s=0.2)

    for node in others:
        node.signal(signal.SIGCONT)
    assert await leader.put("mended", 2)
    assert [await node.get("mended") for node in nodes] == [2, 2, 2]


async def test_a_paused_leader_learns_that_it_was_replaced(cluster: Cluster) -> None:
    nodes = await cluster.start()
    leader, others = await split(cluster, nodes)
    leader.signal(signal.SIGSTOP)
    successor = await cluster.leader(others)
    await successor.put("new", 1)
    leader.signal(signal.SIGCONT)
    assert await leader.get("new") == 1


async def test_a_lost_disk_rejoins_empty_and_does_not_vote_before_it_caught_up(cluster: Cluster) -> None:
    nodes = await cluster.start(compaction_entries=50)
    leader, (behind, wiped) = await split(cluster, nodes)
    await behind.kill()
    for number in range(120):
        await leader.put(f"key{number}", number)
    await leader.kill()
    await wiped.kill()
    shutil.rmtree(wiped.folder)

    # What the leader and the lost disk had acknowledged, the node that was away does not have.
    await asyncio.gather(behind.start(), wiped.start())
    with pytest.raises(Failed, match="ClusterUnavailable"):
        await behind.put("lost", 1, wait_s=2)
    await leader.start()
    assert [await node.get("key119") for node in nodes] == [119, 119, 119]
    assert await wiped.ask("count", prefix="key") == 120

    await leader.kill()
    assert await wiped.put("after", 1)


async def test_a_node_that_starts_has_the_log_before_the_next_heartbeat(cluster: Cluster) -> None:
    nodes = await cluster.start(**PATIENT)
    leader, (follower, _) = await split(cluster, nodes)
    await leader.put("x", 1)
    await follower.kill()
    shutil.rmtree(follower.folder)
    await follower.start()
    started = time.monotonic()
    await follower.ask("ready", wait_s=WAIT_S)
    assert (time.monotonic() - started) * 1000 < PATIENT["heartbeat_ms"]
    assert await follower.get("x") == 1


async def test_a_leader_whose_process_is_gone_is_followed_at_once_by_the_first_to_stand(cluster: Cluster) -> None:
    """Before heartbeats are missed, and though the followers had nothing to say to each other for a long time."""
    nodes = await cluster.start(**PATIENT)
    leader, followers = await split(cluster, nodes)
    term = (await leader.status())["term"]
    silent_until = time.monotonic() + 1.2 * PATIENT["connection_lost_ms"] / 1000
    while time.monotonic() < silent_until:
        await followers[0].put("x", 1)
    killed = time.monotonic()
    await leader.kill()
    successor = await cluster.leader(followers)
    assert await followers[1].put("y", 2)
    assert (time.monotonic() - killed) * 1000 < PATIENT["heartbeat_ms"]
    assert (await successor.status())["term"] == term + 1


async def test_members_join_and_leave_and_are_remembered(cluster: Cluster) -> None:
    nodes = await cluster.start(compaction_entries=30)
    leader, (follower, _) = await split(cluster, nodes)
    for number in range(40):
        await leader.put(f"key{number}", number)
    fourth = cluster.make("d")
    await follower.ask("join", name="d", address=cluster.peers["d"])
    await follower.ask("join", name="d", address=cluster.peers["d"])
    with pytest.raises(Failed, match=r"ConfigError.*another member"):
        await follower.ask("join", name="d", address=free_address())
    with pytest.raises(Failed, match=r"ConfigError.*no cluster secret|ConfigError.*not HOST:PORT"):
        await follower.ask("join", name="e", address="nowhere")
    await fourth.start()
    await fourth.ask("ready", wait_s=WAIT_S)
    assert await fourth.get("key39") == 39
    with pytest.raises(Failed, match=r"ConfigError.*itself"):
        await leader.ask("leave", name=leader.name)

    await follower.ask("leave", name=leader.name)
    remaining = [node for node in (*nodes, fourth) if node is not leader]
    members = {name: cluster.peers[name] for name in "abcd" if name != leader.name}
    await follower.put("gone", leader.name)
    for node in remaining:
        assert await node.get("gone") == leader.name
        assert (await node.status())["members"] == members
    await leader.kill()

    # The recorded members count, not those the nodes were first told of.
    await asyncio.gather(*(node.kill() for node in remaining))
    for node in remaining:
        await node.start()
        assert (await node.status())["members"] == members
    assert await fourth.get("gone") == leader.name
    assert "recorded" in follower.log.read_text()


def frame(message: Any) -> bytes:
    data = zlib.compress(pickle.dumps(message))
    return struct.pack("i", len(data)) + data


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


async def test_strangers_are_refused_and_nothing_they_send_is_run(cluster: Cluster, tmp_path: Path) -> None:
    nodes = await cluster.start()
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(Touch(marker)))
    assert marker.exists()
    marker.unlink()

    host, _, port = cluster.peers["a"].rpartition(":")
    for sent in (frame(Touch(marker)), frame("readonly"), frame(["status"]), struct.pack("i", -9) + b"x" * 50):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent)
        assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
        writer.close()
    assert not marker.exists()

    impostor = cluster.make("b2", name="b", listen=cluster.peers["b"], secret="another secret than theirs")
    impostor.settings["peers"] = {name: cluster.peers[name] for name in NAMES}
    await nodes[1].kill()
    await impostor.start()
    with pytest.raises(Failed, match="ClusterUnavailable"):
        await impostor.put("forged", 1, wait_s=2)
    assert await nodes[0].get("forged") is None


async def flood(host: str, port: int) -> None:
    _, writer = await asyncio.open_connection(host, port)
    writer.write(struct.pack("i", 1 << 30))
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def test_a_flood_from_a_stranger_is_cut_off(cluster: Cluster) -> None:
    node = cluster.make("a")
    node.settings["peers"] = {"a": cluster.peers["a"]}
    await node.start()
    await node.ask("ready", wait_s=WAIT_S)
    host, _, port = cluster.peers["a"].rpartition(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(40)]
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(flood(host, int(port)), WAIT_S)
    for quiet_reader, quiet_writer in silent:
        assert await asyncio.wait_for(quiet_reader.read(), WAIT_S) == b""
        quiet_writer.close()
    assert await node.put("still", "here")
    assert (await node.status())["strangers_refused"] >= 41


class Nothing:
    def apply(self, command: bytes) -> str:
        if command == b"bad":
            raise ValueError("a fault of the program")
        return command.decode()

    def dump(self) -> bytes:
        return b""

    def restore(self, data: bytes) -> None:
        pass

    def ended(self, member: str) -> None:
        pass

    def connected(self, member: str) -> None:
        pass


def alone(folder: Path, **changes: Any) -> RaftSettings:
    return RaftSettings(**{"name": "a", "listen": free_address(), "peers": {}, "folder": folder} | changes)


async def test_one_node_is_a_cluster_with_bounds_and_stops_loudly_on_a_fault(tmp_path: Path) -> None:
    settings = alone(tmp_path, command_bytes_max=100, commands_per_second_max=3)
    raft = CatalogRaft(settings, Nothing())
    with pytest.raises(ClusterUnavailable, match="not started"):
        await raft.propose(b"early", 1)
    await raft.start()
    await raft.wait_ready(WAIT_S)
    assert raft.is_leader
    with pytest.raises(BoundExceeded, match="over 100"):
        await raft.propose(b"x" * 101, 1)
    with pytest.raises(ConfigError, match="in use"):
        await CatalogRaft(alone(tmp_path), Nothing()).start()
    with pytest.raises(ConfigError, match="listened on"):
        await CatalogRaft(alone(tmp_path / "other", listen=settings.listen), Nothing()).start()
    with pytest.raises(BoundExceeded, match="3 catalog commands a second"):
        await asyncio.gather(*(raft.propose(b"x", 5) for _ in range(10)))
    await until("tokens", lambda: proposes(raft, b"good"))
    await until("tokens", lambda: proposes(raft, b"bad"))
    with pytest.raises(CatalogCorrupt, match="a fault of the program"):
        await asyncio.wait_for(raft.watch(), WAIT_S)
    await raft.stop()


async def proposes(raft: CatalogRaft, command: bytes) -> bool:
    try:
        return await raft.propose(command, 5) == command.decode()
    except BoundExceeded:
        return False
    except CatalogCorrupt:
        return True


class Counting(Nothing):
    applied = told = 0

    def apply(self, command: bytes) -> str:
        self.applied += 1
        return super().apply(command)

    def changed(self) -> None:
        self.told = self.applied


async def test_who_hears_of_changes_has_heard_before_the_proposer_is_answered(tmp_path: Path) -> None:
    """At the leader and at others: else an operator was shown what was so before the answer."""
    peers = {name: free_address() for name in NAMES}
    machines = {name: Counting() for name in NAMES}
    rafts = [
        CatalogRaft(
            alone(tmp_path / name, name=name, listen=peers[name], peers=peers, secret=SECRET), machine, machine.changed
        )
        for name, machine in machines.items()
    ]
    await asyncio.gather(*(raft.start() for raft in rafts))
    try:
        await asyncio.gather(*(raft.wait_ready(WAIT_S) for raft in rafts))
        for proposed, raft in enumerate(rafts * 50, 1):
            await raft.propose(b"x", WAIT_S)
            assert machines[raft.settings.name].told >= proposed
    finally:
        await asyncio.gather(*(raft.stop() for raft in rafts))


def places_listened_on() -> list[str]:
    return [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line]


async def test_only_the_given_address_is_listened_on(tmp_path: Path) -> None:
    raft = CatalogRaft(alone(tmp_path, listen=free_address()), Nothing())
    await raft.start()
    port = int(raft.settings.listen.rpartition(":")[2])
    listening = places_listened_on()
    await raft.stop()
    assert [place.split(":")[0] for place in listening if place.endswith(f":{port:04X}")] == ["0100007F"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> RaftSettings:
    """A node that ran, compacted its log and was stopped."""
    settings = alone(tmp_path_factory.mktemp("stopped"), compaction_entries=10)

    async def run() -> None:
        raft = CatalogRaft(settings, Nothing())
        await raft.start()
        await raft.wait_ready(WAIT_S)
        for _ in range(25):
            await raft.propose(b"x", 5)
        assert raft.statistics().compactions > 0
        await raft.stop()

    asyncio.run(run())
    return settings


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("journal", lambda data: data[:60] + b"!" + data[61:], "damaged"),
        ("journal", lambda data: b"not one of ours" + data, "not a journal"),
        ("journal", lambda data: data[:-60], "that was committed"),
        ("journal", None, "missing"),
        ("vote", lambda data: data[:5], "can't be read"),
        ("vote", None, "missing"),
        ("dump", lambda data: data[:-1] + b"!", "checksum"),
        ("dump", None, "missing"),
        ("node", lambda data: b"{", "can't be read"),
    ],
)
async def test_damaged_files_are_refused(
    stopped: RaftSettings, tmp_path: Path, name: str, damage: Callable[[bytes], bytes] | None, says: str
) -> None:
    settings = dataclasses.replace(stopped, folder=tmp_path / "copy")
    shutil.copytree(stopped.folder, settings.folder)
    path = settings.folder / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CatalogCorrupt, match=says) as refused:
        await CatalogRaft(settings, Nothing()).start()
    assert "delete the folder" in str(refused.value)


async def test_a_torn_last_record_is_cut_off(tmp_path: Path) -> None:
    settings = alone(tmp_path)
    raft = CatalogRaft(settings, Nothing())
    await raft.start()
    await raft.wait_ready(WAIT_S)
    await raft.propose(b"kept", 5)
    index = raft.index
    await raft.stop()
    journal = tmp_path / "journal"
    journal.write_bytes(journal.read_bytes() + b"\x50\x00\x00\x00torn")
    again = CatalogRaft(settings, Nothing())
    await again.start()
    await again.wait_ready(WAIT_S)
    await again.read_barrier()
    assert again.index > index
    await again.stop()


def test_a_port_others_reach_needs_a_secret(tmp_path: Path) -> None:
    for changes in (
        {"listen": "0.0.0.0:7000"},
        {"peers": {"b": "10.0.0.2:7000"}},
        {"peers": {"b": "node-b.example:7000"}},
        {"secret": b"too short", "listen": "10.0.0.1:7000"},
    ):
        with pytest.raises(ConfigError, match="secret"):
            alone(tmp_path, **changes).check()
    good = alone(tmp_path, listen="10.0.0.1:7000", peers={"b": "10.0.0.2:7000"}, secret=SECRET.encode())
    good.check()
    assert SECRET not in repr(good)
    assert [is_loopback(a) for a in ("127.0.0.9:1", "[::1]:1", "localhost:1", "0.0.0.0:1", "[::]:1")] == [
        *(True, True, True, False, False)
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"listen": "localhost"}, "HOST:PORT"),
        ({"peers": {"b": "127.0.0.1:1", "c": "127.0.0.1:1"}}, "one address"),
        ({"heartbeat_ms": 200}, "election_ms_min"),
        ({"quorum_lost_ms": 100}, "quorum_lost_ms"),
        ({"compaction_entries": 1}, "compaction_entries"),
        ({"command_bytes_max": 1 << 30}, "command_bytes_max"),
        ({"peers": {str(n): f"127.0.0.1:{n + 1}" for n in range(20)}}, "at most"),
    ],
)
def test_mistaken_settings_are_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        alone(tmp_path, **changes).check()


async def test_a_wiped_node_fetches_all_again_and_an_accepted_loss_lets_a_lone_log_go_on(cluster: Cluster) -> None:
    nodes = await cluster.start(compaction_entries=20)
    leader, (one, other) = await split(cluster, nodes)
    for number in range(50):
        await leader.put(f"key{number}", number)
    assert await one.get("key49") == 49

    await one.kill()
    (one.folder / "journal").write_bytes(b"damaged")
    with pytest.raises(Failed, match=r"CatalogCorrupt.*delete the folder"):
        await one.start()
    wipe(one.folder)
    wipe(one.folder)
    assert sorted(path.name for path in one.folder.iterdir()) == ["lock"]
    await one.start()
    assert await one.get("key49") == 49
    assert await one.ask("count", prefix="key") == 50

    # Two of three disks are gone for good. What is left is a log that may lack what the others had acknowledged.
    assert await other.get("key49") == 49
    await asyncio.gather(*(node.kill() for node in nodes))
    for lost in (leader, other):
        shutil.rmtree(lost.folder)
    await asyncio.gather(*(node.start() for node in nodes))
    with pytest.raises(Failed, match="ClusterUnavailable"):
        await one.put("without a quorum", 1, wait_s=2)
    await asyncio.gather(*(node.kill() for node in nodes))
    accept_loss(other.folder)
    await asyncio.gather(*(node.start() for node in nodes))
    assert [await node.get("key49") for node in nodes] == [49, 49, 49]
    assert await leader.put("after", 1)


async def test_a_cluster_is_founded_by_all_its_members(cluster: Cluster) -> None:
    early, late = [cluster.make(name) for name in "ab"], cluster.make("c")
    await asyncio.gather(*(node.start() for node in early))
    with pytest.raises(Failed, match="ClusterUnavailable"):
        await early[0].put("early", 1, wait_s=2)
    await late.start()
    assert await late.put("all here", 1)
    await early[1].kill()
    assert await late.put("a majority", 1)


async def test_an_accepted_loss_needs_a_folder_that_was_used(tmp_path: Path) -> None:
    wipe(tmp_path / "never used")
    with pytest.raises(StoreUnavailable, match="node"):
        accept_loss(tmp_path)
    (tmp_path / "node").write_text("{")
    with pytest.raises(CatalogCorrupt, match="can't be read"):
        accept_loss(tmp_path)
