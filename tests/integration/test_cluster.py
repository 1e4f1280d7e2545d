"""Three real nodes on loopback: who is a member, who holds a lease, who owns what through kills, pauses, lost disks."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import signal
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

import msgspec
import pytest
from order_lines import Failed, OrderedProcess, free_address, until

from node.cluster_view import LocalClusterView
from node.kernel.clock import SystemClock
from node.kernel.errors import ConfigError
from node.kernel.limits import LEASE_MS_MAX
from node.kernel.supervise import Supervisor
from replication.cluster import Cluster, ClusterSettings
from replication.commands import Settings
from replication.ownership import Progress
from replication.peers import PeerClient
from replication.raft_types import RaftSettings
from replication.report import PeerReport, encode_report

SECRET = "a secret that no log may show"
NAMES = ("a", "b", "c")
PARTITIONS = 6


class Member(OrderedProcess):
    def __init__(self, settings: dict[str, Any], log: Path) -> None:
        super().__init__(Path(__file__).with_name("cluster_process.py"), settings, log)
        self.name = settings["name"]
        self.folder = Path(settings["folder"])
        self.served_before: list[list[float]] = []

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self.ask("status")
        assert status["failure"] == "None"
        return status

    async def propose(self, do: str, **fields: Any) -> Any:
        return await self.ask("propose", command={"do": do, **fields})

    async def kill(self) -> None:
        """What it served until then is remembered."""
        if self.process is not None and self.process.returncode is None:
            self.signal(signal.SIGCONT)
            self.served_before += await self.ask("served")
        await super().kill()


class Members:
    """A cluster of processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peers = {name: free_address() for name in NAMES}
        self.all: dict[str, Member] = {}

    def make(self, name: str, **settings: Any) -> Member:
        self.peers.setdefault(name, free_address())
        known = {"name": name, "peers": dict(self.peers), "peer_listen": free_address(), "secret": SECRET}
        member = self.all[name] = Member(
            known | {"folder": str(self.folder / name)} | settings, self.folder / f"{name}.log"
        )
        return member

    async def start(self, **settings: Any) -> list[Member]:
        """Every partition has an owner and a standby, every node a lease."""
        members = [self.make(name, **settings) for name in NAMES]
        await asyncio.gather(*(member.start() for member in members))
        await self.whole(members)
        await members[1].propose("grow", count=PARTITIONS)
        await self.owned_by(members, NAMES)
        return members

    async def whole(self, members: Collection[Member]) -> None:
        async def ready() -> bool:
            return all(s["ready"] and s["lease_left_ms"] > 0 for s in [await member.status() for member in members])

        await until("every node to be ready with a lease", ready)

    async def owned_by(self, asked: Collection[Member], names: Collection[str]) -> list[dict[str, Any]]:
        """Every partition is served by one of the named, each of them has one, and nothing is on the move."""

        async def settled() -> list[dict[str, Any]] | None:
            found = []
            for member in asked:
                partitions = (await member.status())["partitions"]
                owners = {held["owner"] for held in partitions}
                whole = [bool(held["standbys"]) and not held["move"] for held in partitions]
                if owners != set(names) or whole != [True] * PARTITIONS:
                    return None
                found = partitions
            return found

        try:
            return list(await until(f"the partitions to be with {', '.join(names)}", settled))
        except AssertionError as late:
            late.add_note("\n".join([str(await member.status()) for member in asked]))
            raise

    async def leader(self, among: Collection[Member]) -> Member:
        async def found() -> Member | None:
            for member in among:
                if (await member.status())["leads"]:
                    return member
            return None

        leader: Member = await until("a leader", found)
        return leader

    async def split(self, members: list[Member]) -> tuple[Member, list[Member]]:
        leader = await self.leader(members)
        return leader, [member for member in members if member is not leader]

    async def check_served(self) -> None:
        """No node served a partition at an epoch once another had begun to serve it at a later one."""
        served: list[tuple[int, int, float, float]] = []
        for member in self.all.values():
            running = member.process is not None and member.process.returncode is None
            served += [
                tuple(each) for each in [*member.served_before, *(await member.ask("served") if running else [])]
            ]
        served.sort()
        assert served
        for (partition, epoch, _, last_s), (other, later, first_s, _) in itertools.pairwise(served):
            if partition == other and epoch != later:
                assert last_s < first_s


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Members]:
    made = Members(tmp_path)
    yield made
    await asyncio.gather(*(OrderedProcess.kill(member) for member in made.all.values()))
    for member in made.all.values():
        assert SECRET not in member.log.read_text()


async def test_nodes_join_agree_and_lose_their_leases_without_a_quorum(cluster: Members) -> None:
    members = await cluster.start(agreed={"lease_ms": 900, "standby_count": 2})
    statuses = [await member.status() for member in members]
    assert [s["lease_ms"] for s in statuses] == [900, 900, 900]
    assert sorted(s["nodes"].keys() == set(NAMES) for s in statuses) == [True, True, True]
    assert [s["nodes"][s["name"]]["incarnation"] == s["incarnation"] > 0 for s in statuses] == [True, True, True]
    partitions = await cluster.owned_by(members, NAMES)
    assert sorted(p["owner"] for p in partitions) == ["a", "a", "b", "b", "c", "c"]

    async def all_serve() -> bool:
        owned = [partition for member in members for partition in (await member.status())["owned"]]
        return sorted(owned) == list(range(PARTITIONS))

    await until("every partition to be served", all_serve)
    leader, (one, other) = await cluster.split(members)
    assert (await leader.status())["verified"] == {name: {"0": 7} for name in NAMES}
    assert set((await leader.status())["heard_ms_ago"]) == set(NAMES)

    with pytest.raises(Failed, match=r"PeerRefused.*lease_ms can't change"):
        await one.propose("settings", settings={"lease_ms": 5000})
    with pytest.raises(Failed, match=r"PeerRefused.*owns or takes partition"):
        await one.ask("leave", name=other.name)
    with pytest.raises(Failed, match=r"BoundExceeded.*over its bound"):
        await one.propose("tenant", name="x" * 200, settings="")
    revision = await other.propose("tenant", name="team", settings="weight = 2")
    assert await one.ask("agreed") >= revision

    for status in [await member.status() for member in members]:
        assert SECRET not in status["repr"]
    other.signal(signal.SIGSTOP)
    one.signal(signal.SIGSTOP)

    async def lost() -> bool:
        status = await leader.status()
        return not (status["lease_left_ms"] or status["owned"] or status["ready"])

    await until("the lease to be over", lost)
    with pytest.raises(Failed, match="ClusterUnavailable"):
        await leader.ask("agreed", wait_s=0.3)
    with pytest.raises(Failed, match=r"ClusterUnavailable.*may or may not|ClusterUnavailable.*not applied"):
        await leader.ask("propose", command={"do": "tenant", "name": "other", "settings": ""}, wait_s=0.3)
    other.signal(signal.SIGCONT)
    one.signal(signal.SIGCONT)
    await cluster.whole(members)
    await until("every partition to be served again", all_serve)
    await cluster.check_served()
    assert (await leader.status())["leases_lost"] == 1


async def test_others_take_over_from_the_killed_the_paused_and_a_lost_disk(cluster: Members) -> None:
    members = await cluster.start()
    leader, (one, other) = await cluster.split(members)
    rest = [leader, other]
    incarnation = (await one.status())["incarnation"]

    await one.kill()
    taken = await cluster.owned_by(rest, [leader.name, other.name])
    assert max(held["epoch"] for held in taken) == 2
    await one.start()
    await cluster.owned_by(members, NAMES)
    assert (await one.status())["incarnation"] == incarnation

    one.signal(signal.SIGSTOP)
    await cluster.owned_by(rest, [leader.name, other.name])
    one.signal(signal.SIGCONT)
    assert (await one.status())["owned"] == []
    await cluster.owned_by(members, NAMES)

    await one.kill()
    shutil.rmtree(one.folder)
    await one.start()
    await cluster.whole([one])
    await cluster.owned_by(members, NAMES)
    assert (await one.status())["incarnation"] > incarnation

    await leader.kill()
    await cluster.owned_by([one, other], [one.name, other.name])
    await leader.start()
    await cluster.owned_by(members, NAMES)
    await cluster.check_served()


async def test_the_lease_of_a_process_that_has_ended_is_not_waited_for(cluster: Members) -> None:
    """Neither the leader's nor another's: it outlasts this test."""
    members = await cluster.start(agreed={"lease_ms": LEASE_MS_MAX})
    leader, (one, other) = await cluster.split(members)
    await one.kill()
    await cluster.owned_by([leader, other], [leader.name, other.name])
    await one.start()
    await cluster.owned_by(members, NAMES)

    leader, (one, other) = await cluster.split(members)
    await leader.kill()
    await cluster.owned_by([one, other], [one.name, other.name])
    await cluster.check_served()


async def test_a_drained_node_leaves_stays_out_and_may_join_again(cluster: Members) -> None:
    members = await cluster.start()
    leader, (one, other) = await cluster.split(members)
    rest = [leader, other]
    await one.propose("drain", name=one.name, draining=True)
    await cluster.owned_by(rest, [leader.name, other.name])
    await other.ask("leave", name=one.name)
    assert set((await other.status())["nodes"]) == set((await other.status())["members"]) == {leader.name, other.name}

    async def out() -> bool:
        status = await one.status()
        return not (status["ready"] or status["lease_left_ms"])

    await until("the lease of the node that left to be over", out)
    await one.kill()
    await one.start()
    await until("the node to stay out", out)
    with pytest.raises(Failed, match=r"ClusterUnavailable.*join it again"):
        await one.ask("agreed", wait_s=1.0)
    assert one.name not in (await leader.status())["nodes"]

    await leader.ask("join", name=one.name, address=cluster.peers[one.name])
    await cluster.whole(members)
    await cluster.owned_by(members, NAMES)
    fourth = cluster.make("d")
    await leader.ask("join", name="d", address=cluster.peers["d"])
    await fourth.start()
    await cluster.owned_by([*members, fourth], (*NAMES, "d"))
    await cluster.check_served()


async def test_a_node_that_never_came_is_taken_back(cluster: Members) -> None:
    members = await cluster.start()
    leader, (one, other) = await cluster.split(members)
    await one.ask("join", name="d", address=free_address())
    assert set((await one.status())["members"]) == {*NAMES, "d"}
    await one.ask("leave", name="d")
    assert set((await one.status())["members"]) == set(NAMES)
    await other.kill()
    await cluster.owned_by([leader, one], [leader.name, one.name])


async def test_all_killed_at_once_go_on_as_they_were(cluster: Members) -> None:
    members = await cluster.start()
    before = [await member.status() for member in members]
    for member in members:
        member.signal(signal.SIGKILL)
    await asyncio.gather(*(OrderedProcess.kill(member) for member in members))
    await asyncio.gather(*(member.start() for member in members))
    await cluster.whole(members)
    after = [await member.status() for member in members]
    assert [s["incarnation"] for s in after] == [s["incarnation"] for s in before]
    assert after[0]["nodes"] == before[0]["nodes"]
    await cluster.owned_by(members, NAMES)


async def test_a_node_that_comes_later_brings_no_settings(cluster: Members) -> None:
    """What its file says counts only when it founds a cluster, also where the founders' was the default."""
    members = await cluster.start(agreed=msgspec.to_builtins(Settings()))
    await members[0].kill()
    changed = cluster.make(members[0].name, agreed={"lease_ms": Settings().lease_ms - 500, "standby_count": 0})
    await changed.start()
    await cluster.whole([changed, *members[1:]])
    assert (await changed.status())["lease_ms"] == Settings().lease_ms
    await cluster.owned_by([changed, *members[1:]], NAMES)


async def test_a_report_that_comes_before_the_loop_knows_that_it_leads_counts(tmp_path: Path) -> None:
    """The Raft thread says so first: here the loop hears nothing until the report is taken."""

    async def nothing(address: str, body: bytes) -> None:
        raise AssertionError("there is nobody else")

    address = free_address()
    raft = RaftSettings("a", address, {"a": address}, tmp_path / "raft")
    settings = ClusterSettings("a", raft, free_address(), "", 1.0, tmp_path)

    async def started() -> Cluster:
        cluster = Cluster(settings, SystemClock(), Supervisor(), nothing, dict, dict)
        await cluster.start()
        return cluster

    async def has_lease() -> bool:
        return before.has_lease()

    before = await started()
    await until("a lease", has_lease)
    renewed = before.catalog.leases["a"]
    assert before.has_lease()
    await before.stop()
    assert not before.has_lease(), "another may own once the port is closed"

    cluster = await started()
    while not cluster.leads:
        pass  # the Raft thread goes on, the loop does not
    held = {0: Progress(5, 0, 0)}
    cluster.take_report(encode_report(PeerReport("a", before.incarnation, renewed + 1, held, {})))
    await asyncio.sleep(0)
    assert cluster.reports().nodes["a"].partitions == held
    await cluster.stop()


async def test_a_host_clock_that_is_set_makes_no_node_look_silent(tmp_path: Path) -> None:
    """`leave --dead` believes what is said of a node, and the plan goes by the monotonic clock."""

    class Set(SystemClock):
        ahead_ms = 0

        def now_ms(self) -> int:
            return super().now_ms() + self.ahead_ms

    async def nothing(address: str, body: bytes) -> None:
        raise AssertionError("there is nobody else")

    async def heard_of() -> bool:
        return cluster.has_lease() and "a" in cluster.reports().nodes

    address, clock = free_address(), Set()
    raft = RaftSettings("a", address, {"a": address}, tmp_path / "raft")
    settings = ClusterSettings("a", raft, free_address(), "", 1.0, tmp_path, Settings(lease_ms=LEASE_MS_MAX))
    cluster, peers = Cluster(settings, clock, Supervisor(), nothing, dict, dict), PeerClient("a", None, clock)
    view = LocalClusterView(cluster, peers)
    await cluster.start()
    await until("a lease", heard_of)
    for clock.ahead_ms in (0, 3_600_000):
        (found,) = view.local().members
        assert found.fresh
        assert found.heard_ms is not None
        assert found.heard_ms < LEASE_MS_MAX
    await cluster.stop()


async def test_a_cluster_that_others_reach_needs_a_secret(tmp_path: Path) -> None:
    async def nothing(address: str, body: bytes) -> None:
        raise AssertionError("nobody leads")

    for raft in (
        RaftSettings("a", "10.0.0.1:7000", {}, tmp_path),
        RaftSettings("a", "127.0.0.1:7000", {"b": "db.example:7000"}, tmp_path),
    ):
        settings = ClusterSettings("a", raft, "10.0.0.1:7001", "", 1.0, tmp_path)
        with pytest.raises(ConfigError, match="no cluster secret"):
            Cluster(settings, SystemClock(), Supervisor(), nothing, dict, dict)
