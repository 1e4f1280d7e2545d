"""What operators ask of a cluster over its peer port, by the command line as they run it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from test_cli import GOOD, headrace

from node.kernel.clock import SystemClock
from node.kernel.errors import ConfigError, HeadraceError, NotFound, PeerRefused
from node.kernel.limits import OPERATOR_JOBS_MAX
from node.serving.cluster import ClusterAgreement, ClusterMember, ClusterPartition, ClusterReplica, ClusterStatus
from replication.catalog import Assignment, Catalog, Node, apply, problem
from replication.commands import Command
from replication.operators import OPERATORS_PATH, Job, Operators, PartitionBody
from replication.peers import PeerClient, PeerServer

SECRET = b"sixteen bytes or more"


@dataclass
class Cluster:
    """A catalog that takes commands at once, and moves what a draining node owns as soon as it is looked at."""

    catalog: Catalog = field(
        default_factory=lambda: Catalog(
            nodes={name: Node(name, f"{name}:1", "", "", 1.0, 1, 0) for name in ("n1", "n2", "n3")},
            partitions=(Assignment("n1", 1, ("n2",)), Assignment("n2", 1, ("n1",)), Assignment("n1", 1, ("n2",))),
            revision=3,
        )
    )
    silent: set[str] = field(default_factory=set)
    stale: int = 0
    """So many commands to come are refused as decided on an old catalog."""
    joined: dict[str, str] = field(default_factory=dict)
    awaited: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    async def agreed(self) -> Catalog:
        return self.catalog

    async def propose(self, command: Command) -> None:
        if self.stale:
            self.stale -= 1
            raise PeerRefused("node n1 changed at revision 9, after 3; read the catalog and decide anew")
        reason = problem(self.catalog, command)
        if reason:
            raise PeerRefused(reason)
        self.catalog = apply(self.catalog, command)

    async def join(self, name: str, raft_address: str) -> None:
        if name in self.catalog.nodes:
            raise ConfigError([f"the name {name} belongs to another member; remove that one first"])
        self.joined[name] = raft_address
        added = Node(name, raft_address, "", "", 1.0, 1, 0)
        self.catalog = replace(self.catalog, nodes={**self.catalog.nodes, name: added})

    async def leave(self, name: str) -> None:
        self.left.append(name)

    def move_one(self) -> None:
        gone = {name for name, node in self.catalog.nodes.items() if node.draining} | self.silent
        for number, held in enumerate(self.catalog.partitions):
            if held.owner in gone:
                moved = replace(held, owner=next(name for name in held.standbys if name not in gone))
                partitions = (*self.catalog.partitions[:number], moved, *self.catalog.partitions[number + 1 :])
                self.catalog = replace(self.catalog, partitions=partitions)
                return

    def status(self, address: str) -> bytes:
        """As the leader n2 gives it; every node is at one address here."""
        catalog = self.catalog
        self.move_one()
        members = [
            ClusterMember(
                name=name, raft_address=node.raft_address, peer_address=address, draining=node.draining,
                leader=name == "n2", fresh=name not in self.silent, heard_ms=5,
            )
            for name, node in catalog.nodes.items()
        ]  # fmt: skip
        partitions = [
            ClusterPartition(
                number=number,
                owner=held.owner,
                epoch=1,
                reason="it stays",
                replicas=[ClusterReplica(node=held.owner, role="owner")],
            )
            for number, held in enumerate(catalog.partitions)
        ]
        agreed = self.catalog.settings
        agreement = ClusterAgreement(
            standbys=agreed.standby_count,
            lease_ms=agreed.lease_ms,
            moves_max=agreed.moves_max,
            builds_max=agreed.builds_max,
            snapshot_holders_min=agreed.snapshot_holders_min,
        )
        return msgspec.json.encode(
            ClusterStatus(
                node="n2", leader="n2", complete=True, ready=True, revision=1, now_ms=0, settings=agreement,
                members=members, partitions=partitions, models=[], refusals=[], awaited=self.awaited,
            )
        )  # fmt: skip


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


class Jobs:
    """What a node does with its partitions: held until `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.closed: set[int] = set()

    async def snapshot(self, partition: int) -> Mapping[str, Any]:
        await self.go.wait()
        if partition in self.closed:
            raise NotFound(f"partition {partition} is not open on this node")
        return {"partition": partition, "changelog_offset": 40, "files": 3, "bytes": 1_234_567}

    async def verify(self, partition: int) -> Mapping[str, Any]:
        if partition == 7:
            raise NotFound("partition 7 is not held here")
        if partition == 8:
            raise ZeroDivisionError
        standbys = {
            0: {"n2": {"equal": True, "differences": [], "first": []}},
            1: {"n1": {"equal": False, "differences": ["1 of 1024 buckets of rows"], "first": ["customer bob"]}},
            2: {"n2": {"equal": None, "reason": "n2 lags"}},
        }
        damaged = ["the file 000012.sst is damaged"] if partition == 1 else []
        snapshots = [{"node": "n1", "right": [30, 20], "damaged": damaged}]
        return {"partition": partition, "changelog_offset": 50, "rows": 2_000, "standbys": standbys[partition],
                "snapshots": snapshots}  # fmt: skip


@pytest.fixture
async def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
async def address(cluster: Cluster, jobs: Jobs) -> AsyncIterator[str]:
    told: list[str] = []
    operators = Operators(cluster, lambda: cluster.status(told[0]), jobs.snapshot, jobs.verify)
    server = PeerServer("127.0.0.1:0", "n1", SECRET, SystemClock(), operators.routes())
    await server.start()
    told.append(server.address)
    yield server.address
    await operators.stop()
    await server.stop()


@pytest.fixture
def config(tmp_path: Path, address: str) -> Callable[..., str]:
    """A config of node n1 whose peers' port is the server's."""

    def write(secret: bytes = SECRET, table: bool = True, peer_listen: str = "") -> str:
        (tmp_path / "secret").write_bytes(secret)
        cluster = (
            f'[node]\nname = "n1"\n[cluster]\nlisten = "127.0.0.1:1"\npeers = {{ n1 = "127.0.0.1:1" }}\n'
            f'peer_listen = "{peer_listen or address}"\nsecret_file = "secret"\n'
        )
        path = tmp_path / "n1.toml"
        path.write_text(GOOD + (cluster if table else ""))
        return str(path)

    return write


async def test_drain_and_undrain(cluster: Cluster, config: Callable[..., str]) -> None:
    cluster.stale = 2
    ran = await headrace("drain", "n1", "--wait", "--config", config())
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("n1 is draining")
    assert "waiting: partition 2 (it stays)" in lines
    assert lines[-1] == "n1 owns nothing and can be stopped"
    assert {held.owner for held in cluster.catalog.partitions} == {"n2"}
    ran = await headrace("undrain", "n1", "--config", config())
    assert (ran.code, ran.err) == (0, "")
    assert not cluster.catalog.nodes["n1"].draining


async def test_settings_of_the_cluster(cluster: Cluster, config: Callable[..., str]) -> None:
    before = cluster.catalog.settings
    ran = await headrace("settings", "--config", config())
    assert (ran.code, ran.err) == (0, "")
    assert f"standbys = {before.standby_count}\n" in ran.out
    assert cluster.catalog.settings == before
    cluster.stale = 1
    ran = await headrace("settings", "--standbys", "2", "--moves-max", "5", "--config", config())
    assert (ran.code, ran.err) == (0, "")
    assert "standbys = 2\n" in ran.out
    assert cluster.catalog.settings == msgspec.structs.replace(before, standby_count=2, moves_max=5)
    before = cluster.catalog.settings
    for option, value in (
        ("--standbys", "99"), ("--standbys", "-1"), ("--snapshot-holders-min", "0"), ("--moves-max", "0"),
        ("--builds-max", "1000"),
    ):  # fmt: skip
        ran = await headrace("settings", option, value, "--config", config())
        assert (ran.code, ran.out) == (2, "")
        assert f"Invalid value for '{option}'" in ran.err
    assert cluster.catalog.settings == before


async def test_drain_gives_up_waiting_in_time(cluster: Cluster, config: Callable[..., str], monkeypatch: Any) -> None:
    monkeypatch.setattr(Cluster, "move_one", lambda self: None)
    ran = await headrace("drain", "n1", "--wait", "--wait-s", "1", "--config", config())
    assert ran.code == 1
    assert ran.err.startswith("not done within 1 s: partition 0 (it stays); partition 2 (it stays)")
    assert cluster.catalog.nodes["n1"].draining


async def test_join_and_leave(cluster: Cluster, config: Callable[..., str]) -> None:
    ran = await headrace("join", "n4", "127.0.0.1:7400", "--wait", "--config", config())
    assert (ran.code, ran.err, ran.out.splitlines()[-1]) == (0, "", "n4 has joined")
    assert cluster.joined == {"n4": "127.0.0.1:7400"}
    ran = await headrace("join", "n4", "127.0.0.1:7500", "--config", config())
    assert (ran.code, ran.out, ran.err) == (1, "", "the name n4 belongs to another member; remove that one first\n")
    ran = await headrace("join", "n5", "nowhere", "--config", config())
    assert (ran.code, "HOST:PORT" in ran.err) == (1, True)
    ran = await headrace("leave", "n2", "--config", config())
    assert (ran.code, ran.err) == (0, "")
    assert cluster.left == ["n2"]
    assert all(held.owner == "n1" for held in cluster.catalog.partitions), "it was drained first"


async def test_a_node_that_was_let_join_and_has_not_come_may_leave(
    cluster: Cluster, config: Callable[..., str]
) -> None:
    """It votes from when it was let join: else a mistyped name or address could never be taken back."""
    cluster.awaited = {"n9": "127.0.0.1:7900"}
    for more in ((), ("--dead",)):
        ran = await headrace("leave", "n9", *more, "--config", config())
        assert (ran.code, ran.out, ran.err) == (0, "n9 may not join any more\n", "")
    assert cluster.left == ["n9", "n9"]


@pytest.mark.parametrize("name", ["n 9", "", "-n9", "n" * 101])
async def test_a_name_that_no_node_can_have_is_not_let_join(
    cluster: Cluster, config: Callable[..., str], name: str
) -> None:
    ran = await headrace("join", "--config", config(), "--", name, "127.0.0.1:7900")
    assert (ran.code, ran.out, cluster.joined) == (1, "", {})
    assert ran.err == f"{name} is no name of a node; allowed: letters, digits, '.', '_' and '-', at most 100\n"


async def test_only_a_dead_node_leaves_as_one(cluster: Cluster, config: Callable[..., str]) -> None:
    ran = await headrace("leave", "n1", "--dead", "--config", config())
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "n1 is not known to be dead, it was heard of 5 ms ago; stop it first, or leave out --dead\n"
    cluster.silent = {"n1"}
    ran = await headrace("leave", "n1", "--dead", "--config", config())
    assert (ran.code, ran.err) == (0, "")
    assert cluster.left == ["n1"]
    assert not cluster.catalog.nodes["n1"].draining
    assert {held.owner for held in cluster.catalog.partitions} == {"n2"}


@pytest.mark.parametrize("command", ["drain", "undrain", "leave"])
async def test_a_node_that_is_not_there_is_named(config: Callable[..., str], command: str) -> None:
    ran = await headrace(command, "n9", "--config", config())
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "there is no node n9 in the cluster; its nodes are n1, n2, n3\n"


async def test_what_can_not_be_asked_is_one_line(cluster: Cluster, config: Callable[..., str]) -> None:
    mistakes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"table": False}, "[cluster] is missing: this node is on its own"),
        ({"peer_listen": "127.0.0.1:9"}, "127.0.0.1:9 can't be reached: [Errno 111] Connect call failed"),
        ({"secret": b"another one of sixteen"}, "give all nodes the same cluster secret"),
        ({"secret": b"short"}, "holds 5 bytes; allowed: a secret of 16"),
    )
    for mistake, words in mistakes:
        ran = await headrace("drain", "n1", "--config", config(**mistake))
        assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
        assert words in ran.err
    assert not cluster.catalog.nodes["n1"].draining


async def test_verify(config: Callable[..., str]) -> None:
    ran = await headrace("verify", "0", "--config", config())
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == "partition 0: 2,000 rows as of 50, the same on 1 standbys; 2 snapshots right\n"
    ran = await headrace("verify", "--config", config())
    assert (ran.code, ran.err) == (1, "")
    assert ran.out.splitlines()[1:] == [
        "partition 1: n1 differs from the owner: 1 of 1024 buckets of rows, first customer bob",
        "partition 1: n1: the file 000012.sst is damaged",
        "partition 2: n2 was not compared: n2 lags",
    ]
    ran = await headrace("verify", "--json", "--config", config())
    found = msgspec.json.decode(ran.out)
    assert (ran.code, found["right"]) == (1, False)
    assert (found["differ"], found["unknown"], found["damaged"], len(found["partitions"])) == (1, 1, 1, 3)
    ran = await headrace("verify", "9", "--config", config())
    assert (ran.code, ran.out, ran.err) == (1, "", "there is no partition 9; there are 3\n")


async def test_snapshot(config: Callable[..., str], jobs: Jobs) -> None:
    jobs.go.set()
    ran = await headrace("snapshot", "1", "0", "--config", config())
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        "partition 0 on n1: 3 files, 1,234,567 bytes, as of 40",
        "partition 1 on n2: 3 files, 1,234,567 bytes, as of 40",
    ]


async def test_a_replica_without_a_snapshot_keeps_no_other_from_one(config: Callable[..., str], jobs: Jobs) -> None:
    """A node that is down is a reason to take snapshots on those that are not."""
    jobs.go.set()
    jobs.closed.add(0)
    ran = await headrace("snapshot", "--config", config())
    assert ran.code == 1
    lines = ran.out.splitlines()
    assert lines[0] == "partition 0 on n1: not taken: partition 0 is not open on this node"
    assert lines[1] == "partition 1 on n2: 3 files, 1,234,567 bytes, as of 40"
    assert lines[2].startswith("partition 2 on ")
    assert ran.err == "1 of 3 snapshots were not taken; see above, and take them again\n"


# --- the routes -----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def asking(address: str, secret: bytes | None = SECRET) -> AsyncIterator[Callable[..., Any]]:
    client = PeerClient("operator", secret, SystemClock())
    await client.start()

    async def ask(method: str, what: str, body: bytes = b"") -> Any:
        return await client.ask(address, method, f"{OPERATORS_PATH}/{what}", body)

    try:
        yield ask
    finally:
        await client.stop()


@pytest.mark.parametrize("secret", [b"another one of sixteen", None])
async def test_nobody_without_the_secret_changes_anything(address: str, cluster: Cluster, secret: bytes | None) -> None:
    async with asking(address, secret) as ask:
        for what in ("drain", "leave"):
            with pytest.raises(HeadraceError):
                await ask("POST", what, b'{"node": "n1"}')
    assert (cluster.catalog.revision, cluster.left) == (3, [])


@pytest.mark.parametrize("body", [b"", b"[]", b'{"node": 5}', b'{"node": ""}', b'{"node": "n1", "x": 1}', b"\xff"])
async def test_a_body_that_is_none_is_refused(address: str, cluster: Cluster, body: bytes) -> None:
    async with asking(address) as ask:
        with pytest.raises(PeerRefused, match="what an operator asked can't be read"):
            await ask("POST", "drain", body)
    assert cluster.catalog.revision == 3


async def test_the_catalogs_reason_is_told(address: str, cluster: Cluster) -> None:
    cluster.stale = 3
    async with asking(address) as ask:
        with pytest.raises(PeerRefused, match="decide anew"):
            await ask("POST", "drain", b'{"node": "n1"}')
        with pytest.raises(PeerRefused, match="there is no node n9"):
            await ask("POST", "drain", b'{"node": "n9"}')


async def test_jobs(address: str, jobs: Jobs) -> None:
    async with asking(address) as ask:

        async def start(what: str, partition: int) -> Job:
            return msgspec.json.decode(await ask("POST", what, msgspec.json.encode(PartitionBody(partition))), type=Job)

        async def ended(job: Job) -> Job:
            async with asyncio.timeout(20):
                while job.state == "running":
                    job = msgspec.json.decode(await ask("GET", f"jobs/{job.job}"), type=Job)
            return job

        running = [await start("snapshot", 7) for _ in range(OPERATOR_JOBS_MAX)]
        with pytest.raises(PeerRefused, match="OPERATOR_JOBS_MAX"):
            await start("snapshot", 7)
        assert msgspec.json.decode(await ask("GET", f"jobs/{running[0].job}"), type=Job).state == "running"
        jobs.go.set()
        found = [await ended(job) for job in running]
        assert {(job.state, job.detail["changelog_offset"]) for job in found} == {("done", 40)}
        failed = await ended(await start("verify", 7))
        assert (failed.state, failed.reason) == ("failed", "partition 7 is not held here")
        failed = await ended(await start("verify", 8))
        assert (failed.state, "ZeroDivisionError" in failed.reason) == ("failed", True)
        for number in ("0", "99", "x", "9" * 5000):
            with pytest.raises(HeadraceError):
                await ask("GET", f"jobs/{number}")
