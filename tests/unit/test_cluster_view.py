"""What an operator is told of the cluster: by the leader all of it, by another node what the leader says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
from msgspec import structs

from node.cluster_view import LEADER_PATH, LocalClusterView
from node.kernel.errors import PeerRefused, PeerUnavailable
from node.serving.cluster import ClusterPartition, ClusterReplica
from replication.catalog import Assignment, Catalog, Model, Move, Node, Refusal, Version
from replication.commands import Settings
from replication.ownership import NodeReport, Progress, Reports

NOW_MS = 100_000


@dataclass
class Cluster:
    catalog: Catalog
    heard: Reports
    name: str = "n1"
    leader: str | None = "n1"
    ready: bool = True
    lease: bool = True
    snapshots: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    voters: Mapping[str, str] = field(default_factory=dict)

    @property
    def leads(self) -> bool:
        return self.leader == self.name

    def has_lease(self) -> bool:
        return self.lease

    def now_ms(self) -> int:
        return NOW_MS

    def reports(self) -> Reports:
        return self.heard

    def verified(self) -> Mapping[str, Mapping[int, int]]:
        return self.snapshots


@dataclass
class Peers:
    """Answers with `answer`, or raises it."""

    answer: bytes | Exception
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    async def ask(self, address: str, method: str, path: str, body: bytes = b"", wait_ms_max: int = 0) -> bytes:
        self.asked.append((address, method, path))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def member(name: str, draining: bool = False, incarnation: int = 1) -> Node:
    return Node(name, f"{name}:7100", f"{name}:7101", "r1", 1.0, incarnation, 0, draining)


VERSION = Version("a" * 64, "b" * 64, "", "passed", "", 0)
CATALOG = Catalog(
    revision=9,
    settings=Settings(lease_ms=1000),
    nodes={name: member(name) for name in ("n1", "n2", "n3")},
    leases={"n1": 5},
    partitions=(Assignment("n1", 3, ("n2",), revision=4), Assignment("n2", 1, ("n1", "n3"), revision=5)),
    models={"shop/bid": Model("shop", "bid", {VERSION.version: VERSION})},
    holders={VERSION.blob: {"n1": 1, "n3": 1}},
    refusals=(Refusal("live", "no", 2),),
)


def progress(behind: int = 0, serving: bool = False, released_revision: int = 0) -> Progress:
    return Progress(500 - behind, behind, behind * 10, serving, released_revision)


HEARD = Reports(
    0,
    {
        "n1": NodeReport(NOW_MS - 10, 1, {0: progress(serving=True), 1: progress(3)}),
        "n2": NodeReport(NOW_MS - 20, 1, {0: progress(1), 1: progress(serving=True)}),
        "n3": NodeReport(NOW_MS - 30, 1, {0: progress(9), 1: progress(400)}),
    },
)


def view(catalog: Catalog = CATALOG, heard: Reports = HEARD, **changes: object) -> LocalClusterView:
    cluster = replace(Cluster(catalog, heard), **changes)  # type: ignore[arg-type]
    return LocalClusterView(cluster, Peers(PeerUnavailable("gone")))


def test_a_leader_that_may_have_been_deposed_claims_no_more_than_it_can_know() -> None:
    """One that was paused takes itself for the leader until its Raft thread has heard of the other one."""
    found = view(lease=False, snapshots={"n2": {0: 450}}).local()
    other = found.members[1]
    assert (found.leader, found.complete, other.heard_ms, other.fresh) == ("n1", False, None, None)
    assert {copy.frames_behind for copy in found.partitions[0].replicas} == {None}


def partition(number: int, held: Assignment, heard: Reports = HEARD, **changes: object) -> ClusterPartition:
    """What is said of a partition assigned like this."""
    partitions = tuple(held if at == number else other for at, other in enumerate(CATALOG.partitions))
    catalog = structs.replace(CATALOG, partitions=partitions, **changes)
    return view(catalog, heard).local().partitions[number]


def test_the_leader_tells_all() -> None:
    found = view(snapshots={"n2": {0: 450}}).local()
    assert (found.node, found.leader, found.complete, found.ready, found.revision) == ("n1", "n1", True, True, 9)
    one, two, _ = found.members
    assert (one.name, one.leader, one.fresh, one.heard_ms, one.lease, one.owns, one.stands_by) == (
        *("n1", True, True, 10, 5),
        *(1, 1),
    )
    assert (two.leader, two.peer_address, two.owns, two.stands_by) == (False, "n2:7101", 1, 1)
    assert found.partitions[0].replicas == [
        ClusterReplica(node="n1", role="owner", offset=500, frames_behind=0, ms_behind=0, serving=True),
        ClusterReplica(
            node="n2", role="standby", offset=499, frames_behind=1, ms_behind=10, serving=False, snapshot_offset=450
        ),
        ClusterReplica(node="n3", role="left", offset=491, frames_behind=9, ms_behind=90),
    ]
    assert [one.reason for one in found.partitions] == ["", ""]
    (model,) = found.models
    assert (model.model, model.state, model.waits_for) == ("bid", "passed", ["n2"])
    assert found.refusals[0].reason == "no"


def test_who_may_join_and_has_not_come_is_told_by_all() -> None:
    """It counts for a majority: without a word of it, one more node that dies takes the cluster down by surprise."""
    voters = {name: f"{name}:7100" for name in ("n4", "n1", "n2", "n3")}
    for leader in ("n1", "n2"):
        assert view(leader=leader, voters=voters).local().awaited == {"n4": "n4:7100"}
    assert view(voters={"n1": "n1:7100"}).local().awaited == {}
    assert view(Catalog(), voters=voters).local().awaited == {}, "it has not taken the catalog in yet"


def test_a_node_that_does_not_lead_says_what_it_does_not_know() -> None:
    found = view(name="n2", leader="n1").local()
    assert (found.node, found.leader, found.complete) == ("n2", "n1", False)
    assert {(one.heard_ms, one.fresh) for one in found.members} == {(None, None)}
    assert [replica.offset for replica in found.partitions[1].replicas] == [None, None, None]
    assert [one.reason for one in found.partitions] == ["", ""]


@pytest.mark.parametrize("answer", [PeerUnavailable("gone"), PeerRefused("no"), b"{}", b"\xff"])
async def test_another_node_passes_the_leaders_answer_on(answer: bytes | Exception) -> None:
    told = view(snapshots={"n2": {0: 450}})
    cluster = Cluster(CATALOG, HEARD, name="n2")
    peers = Peers(told.encoded())
    asking = LocalClusterView(cluster, peers)
    assert await asking.cluster() == told.local()
    assert peers.asked == [("n1:7101", "GET", LEADER_PATH)]
    peers.answer = answer
    assert (await asking.cluster()).complete is False
    cluster.leader, peers.asked = None, []
    assert (await asking.cluster()).leader is None
    assert peers.asked == []


def test_a_node_that_is_no_part_of_it_says_so() -> None:
    assert view().unready() == []
    (reason,) = view(ready=False).unready()
    assert "no leader" in reason


def test_silent_nodes_and_earlier_incarnations_count_for_nothing() -> None:
    heard = Reports(0, {**HEARD.nodes, "n2": NodeReport(NOW_MS - 5_000, 1, {1: progress(serving=True)})})
    found = view(heard=heard).local()
    assert [(one.name, one.fresh) for one in found.members] == [("n1", True), ("n2", False), ("n3", True)]
    assert found.partitions[1].reason == "n2 is silent, and no other node can take over"
    heard = Reports(NOW_MS - 100, {"n1": HEARD.nodes["n1"]})
    assert [one.fresh for one in view(heard=heard).local().members] == [True, True, True]
    reborn = Reports(0, {**HEARD.nodes, "n2": NodeReport(NOW_MS - 5, 2, {1: progress(serving=True)})})
    assert view(heard=reborn).local().partitions[1].reason == "n2 has not opened it yet"


def test_each_move_says_why_and_what_it_waits_for() -> None:
    held = Assignment("n1", 3, ("n2",), Move("n1", "n2", "balance", NOW_MS - 40), 4)
    found = partition(0, held)
    assert found.move is not None
    assert (found.move.to, found.move.why, found.move.since_ms) == ("n2", "balance", 40)
    assert found.move.waits_for == "n1 to finish its cycle and close the partition"
    assert found.reason == "moves to n2: balance"
    released = {**HEARD.nodes, "n1": NodeReport(NOW_MS, 1, {0: progress(released_revision=4)})}
    found = partition(0, held, Reports(0, released))
    assert found.move is not None
    assert found.move.waits_for == "n2 to take over"
    silent = {**HEARD.nodes, "n1": NodeReport(NOW_MS - 9_000, 1)}
    found = partition(0, held, Reports(0, silent))
    assert found.move is not None
    assert found.move.waits_for == "n1 to be heard of again, or its lease to end"


def test_each_partition_that_is_not_as_it_should_be_says_why() -> None:
    assert partition(0, Assignment()).reason.startswith("no owner yet")
    opening = Reports(0, {**HEARD.nodes, "n1": NodeReport(NOW_MS, 1, {0: progress(7)})})
    assert partition(0, CATALOG.partitions[0], opening).reason == "n1 has not opened it yet, 7 frames behind"
    nodes = {**CATALOG.nodes, "n1": member("n1", draining=True)}
    for standbys, words in (
        ((), "it has no standby that could take over"),
        (("n3",), "waits for its turn, 0 of at most 2 moves are in progress"),
        (("n2",), "no standby has caught up yet"),
    ):
        heard = Reports(0, {**HEARD.nodes, "n2": NodeReport(NOW_MS, 1, {0: progress(400)})})
        found = partition(0, Assignment("n1", 3, standbys, revision=4), heard, nodes=nodes)
        assert found.reason == f"n1 is draining: {words}"
    started = replace(HEARD.nodes["n3"], tries_models=True)
    heard = Reports(0, {**HEARD.nodes, "n3": started})
    found = partition(0, Assignment("n1", 3, ("n3",), revision=4), heard, nodes=nodes)
    assert found.reason == "n1 is draining: n3 caught up, and must try the models first"
    assert [one.tries_models for one in view(heard=heard).local().members] == [False, False, True]
