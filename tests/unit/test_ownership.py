"""The ownership plan and placement: balanced, rack-aware, settled in bounded steps, and never a move too early."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replication.catalog import Catalog, apply, problem
from replication.commands import (
    CancelMove,
    Command,
    CompleteMove,
    DrainNode,
    GrowPartitions,
    JoinNode,
    SetSettings,
    SetStandbys,
    Settings,
    StartMove,
    TakeOver,
)
from replication.ownership import (
    NodeReport,
    PlanSettings,
    Progress,
    Reports,
    caught_up,
    may_own,
    plan,
    takeover_wait_ms,
)
from replication.placement import Member, target_owners, target_standbys
from replication.retention import cut_offset, may_forget

NOW_MS = 1_000_000
PLAN = PlanSettings()
ROUNDS_MAX = 200


def make(racks: dict[str, str], partitions: int, standby_count: int = 1, moves_max: int = 2) -> Catalog:
    catalog = apply(Catalog(), SetSettings(revision=0, settings=Settings(standby_count, moves_max)))
    catalog = apply(catalog, GrowPartitions(revision=1, count=partitions))
    for name, rack in racks.items():
        catalog = join(catalog, name, rack)
    return catalog


def join(catalog: Catalog, name: str, rack: str = "") -> Catalog:
    command = JoinNode(revision=catalog.revision, name=name, raft_address="r", http_address="h", rack=rack)
    return apply(catalog, command)


def drain(catalog: Catalog, name: str) -> Catalog:
    return apply(catalog, DrainNode(revision=catalog.revision, name=name, draining=True))


class Cluster:
    """Nodes that do what the catalog says: standbys catch up after `catch_up_rounds`, owners release at once."""

    def __init__(self, catalog: Catalog, catch_up_rounds: int = 1, seed: int = 0) -> None:
        self.catalog = catalog
        self.catch_up_rounds = catch_up_rounds
        self.random = random.Random(seed)
        self.since: dict[tuple[int, str], int] = {}
        self.dead: dict[str, int] = {}
        self.trying: set[str] = set()
        """Nodes that try their models."""
        self.round = 0
        self.commands: list[Command] = []

    def reports(self) -> Reports:
        nodes = {}
        for name in self.catalog.nodes:
            held = {p: self.progress(p, name) for p in range(len(self.catalog.partitions)) if self.replica(p, name)}
            heard_ms = NOW_MS - self.dead.get(name, 0)
            incarnation = self.catalog.nodes[name].incarnation
            nodes[name] = NodeReport(heard_ms, incarnation, held, heard_ms, name in self.trying)
        return Reports(0, nodes)

    def replica(self, partition: int, name: str) -> bool:
        held = self.catalog.partitions[partition]
        return name == held.owner or name in held.standbys

    def progress(self, partition: int, name: str) -> Progress:
        held = self.catalog.partitions[partition]
        since = self.since.setdefault((partition, name), self.round)
        complete = name == held.owner or self.round - since >= self.catch_up_rounds
        released = held.revision if name == held.owner and held.move is not None else 0
        return Progress(100 if complete else 10, 0 if complete else 90, 0, name == held.owner, released)

    def step(self) -> list[Command]:
        self.round += 1
        commands = list(plan(self.catalog, self.reports(), NOW_MS, PLAN))
        assert len({command.partition for command in commands}) == len(commands)  # type: ignore[union-attr]
        for command in commands:
            self.check(command)
            assert problem(self.catalog, command) == ""
            self.catalog = apply(self.catalog, command)
        self.commands += commands
        return commands

    def check(self, command: Command) -> None:
        if isinstance(command, StartMove):
            held = self.catalog.partitions[command.partition]
            assert command.to in held.standbys
            assert caught_up(self.progress(command.partition, command.to), PLAN)
            assert command.to not in self.dead
            assert command.to not in self.trying

    def settle(self) -> int:
        """Until nothing is planned any more; how many commands that took."""
        before, quiet = len(self.commands), 0
        for _ in range(ROUNDS_MAX):
            quiet = 0 if self.step() else quiet + 1
            if quiet > self.catch_up_rounds + 1:
                return len(self.commands) - before
        raise AssertionError(f"not settled: {self.commands[-5:]}")

    def owners(self) -> Counter[str]:
        return Counter(held.owner for held in self.catalog.partitions)

    def standbys(self) -> Counter[str]:
        return Counter(name for held in self.catalog.partitions for name in held.standbys)


def spread(counts: Counter[str], names: list[str]) -> int:
    found = [counts[name] for name in names]
    return max(found) - min(found)


names = st.integers(2, 6).map(lambda count: list("abcdef"[:count]))


@given(names, st.integers(1, 24), st.integers(1, 2), st.integers(1, 4))
@settings(max_examples=80, deadline=None)
def test_equal_nodes_have_equal_counts(
    members: list[str], partitions: int, standby_count: int, catch_up_rounds: int
) -> None:
    cluster = Cluster(make(dict.fromkeys(members, ""), partitions, standby_count), catch_up_rounds)
    cluster.settle()
    assert spread(cluster.owners(), members) <= 1
    assert spread(cluster.standbys(), members) <= 1
    wanted = min(standby_count, len(members) - 1)
    assert all(len(held.standbys) == wanted for held in cluster.catalog.partitions)


@given(names, st.integers(1, 24), st.data())
@settings(max_examples=80, deadline=None)
def test_a_change_of_members_settles_balanced(members: list[str], partitions: int, data: st.DataObject) -> None:
    cluster = Cluster(make(dict.fromkeys(members, ""), partitions), catch_up_rounds=2)
    cluster.settle()
    what = data.draw(st.sampled_from(("join", "drain", "die")))
    gone = data.draw(st.sampled_from(members))
    left = [name for name in members if name != gone]
    if what == "join":
        cluster.catalog, left = join(cluster.catalog, "z"), [*members, "z"]
    elif what == "drain":
        cluster.catalog = drain(cluster.catalog, gone)
    else:
        cluster.dead[gone] = 10 * PLAN.standby_replace_ms
    cluster.settle()
    assert spread(cluster.owners(), left) <= 1
    assert spread(cluster.standbys(), left) <= 1
    assert set(cluster.owners()) <= set(left)
    assert set(cluster.standbys()) <= set(left) or len(left) == 1, "the last other copy stays"


@given(st.integers(1, 24), st.integers(2, 4), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_standbys_are_in_other_racks(partitions: int, racks: int, standby_count: int) -> None:
    members = {name: f"r{place % racks}" for place, name in enumerate("abcdefgh"[: 2 * racks])}
    cluster = Cluster(make(members, partitions, standby_count))
    cluster.settle()
    for held in cluster.catalog.partitions:
        assert all(members[name] != members[held.owner] for name in held.standbys)
    assert spread(cluster.owners(), list(members)) <= 1
    if standby_count == 1:  # with more, racks that own a partition more than others leave no even choice
        assert spread(cluster.standbys(), list(members)) <= 1


def test_nothing_moves_onto_a_node_that_tries_its_models() -> None:
    cluster = Cluster(make(dict.fromkeys("abc", ""), 6))
    cluster.settle()
    cluster.catalog = drain(cluster.catalog, "a")
    before = cluster.owners()
    cluster.trying = {"b", "c"}
    cluster.settle()
    assert cluster.owners() == before, "they caught up, but the partitions would stand still there"
    cluster.trying = {"c"}
    cluster.settle()
    assert cluster.owners()["c"] == before["c"]
    assert cluster.owners()["b"] > before["b"]
    cluster.trying = set()
    cluster.settle()
    assert cluster.owners()["a"] == 0


def test_a_copy_counts_though_its_node_tries_its_models() -> None:
    cluster = Cluster(make(dict.fromkeys("abc", ""), 6))
    cluster.settle()
    cluster.trying = {"a", "b", "c"}
    assert cluster.settle() == 0, "no standby is looked for in its place"


def test_a_dead_owner_is_followed_by_who_can_go_on_at_once() -> None:
    cluster = Cluster(make(dict.fromkeys("abc", ""), 1, standby_count=2))
    cluster.settle()
    owner, (first, second) = cluster.catalog.partitions[0].owner, cluster.catalog.partitions[0].standbys
    cluster.dead[owner] = 5_000
    for trying, heir in (({first}, second), ({second}, first)):
        cluster.trying = trying
        (command,) = plan(cluster.catalog, cluster.reports(), NOW_MS, PLAN)
        assert isinstance(command, TakeOver)
        assert command.to == heir
    cluster.trying = {first, second}
    (command,) = plan(cluster.catalog, cluster.reports(), NOW_MS, PLAN)
    assert isinstance(command, TakeOver), "sooner than nobody"


def test_a_move_is_given_up_when_its_target_tries_its_models_for_too_long() -> None:
    cluster = Cluster(make(dict.fromkeys("ab", ""), 1))
    cluster.settle()
    held = cluster.catalog.partitions[0]
    (to,) = held.standbys
    long_ago_ms = NOW_MS - PLAN.move_ms_max - 1
    start = StartMove(
        revision=cluster.catalog.revision, partition=0, epoch=held.epoch, to=to, why="balance", at_ms=long_ago_ms
    )
    cluster.catalog = apply(cluster.catalog, start)
    cluster.trying = {to}
    (command,) = plan(cluster.catalog, cluster.reports(), NOW_MS, PLAN)
    assert isinstance(command, CancelMove)
    assert command.why == f"{to} tries its models"


def test_a_settled_cluster_stays_as_it_is() -> None:
    cluster = Cluster(make(dict.fromkeys("abc", ""), 8))
    cluster.settle()
    before = cluster.catalog
    assert cluster.settle() == 0
    assert cluster.catalog == before


def test_a_new_node_gets_standbys_first_and_only_its_share_moves() -> None:
    cluster = Cluster(make(dict.fromkeys("abc", ""), 12), catch_up_rounds=3)
    cluster.settle()
    owners = [held.owner for held in cluster.catalog.partitions]
    cluster.catalog = join(cluster.catalog, "d")
    assert all(isinstance(command, SetStandbys) for command in cluster.step())
    cluster.settle()
    moved = [p for p, held in enumerate(cluster.catalog.partitions) if held.owner != owners[p]]
    assert len(moved) == 3
    assert all(cluster.catalog.partitions[p].owner == "d" for p in moved)


def test_a_dead_owner_is_replaced_by_the_furthest_standby_at_once() -> None:
    cluster = Cluster(make(dict.fromkeys("abcd", ""), 4, standby_count=2))
    cluster.settle()
    held = cluster.catalog.partitions[0]
    slow, fast = held.standbys
    reports = cluster.reports()
    nodes = dict(reports.nodes)
    nodes[slow] = replace(nodes[slow], partitions={0: Progress(50, 9, 0)})
    nodes[fast] = replace(nodes[fast], partitions={0: Progress(51, 8, 0)})
    wait_ms = takeover_wait_ms(cluster.catalog.settings.lease_ms, PLAN)
    nodes[held.owner] = replace(nodes[held.owner], heard_ms=int(NOW_MS - wait_ms + 1))

    def take_overs(reports: Reports) -> list[Command]:
        commands = plan(cluster.catalog, reports, NOW_MS, PLAN)
        return [command for command in commands if isinstance(command, TakeOver)]

    assert not take_overs(Reports(0, nodes))
    nodes[held.owner] = replace(nodes[held.owner], heard_ms=int(NOW_MS - wait_ms - 1))
    taken = take_overs(Reports(0, nodes))
    assert [command.to for command in taken if command.partition == 0] == [fast]
    assert take_overs(Reports(NOW_MS - PLAN.leader_wait_ms, nodes)) == taken, "a new leader has heard of it before"
    assert not take_overs(Reports(NOW_MS - PLAN.leader_wait_ms + 1, nodes)), "others may not have renewed yet"
    never = {name: report for name, report in nodes.items() if name != held.owner}
    assert not take_overs(Reports(int(NOW_MS - wait_ms + 1), never)), "by its own lease, when it never heard of it"
    assert take_overs(Reports(int(NOW_MS - wait_ms - 1), never)) == taken


def test_what_an_ended_process_owned_goes_on_at_once() -> None:
    """Of a leader that has just begun once all others have said how far they are, or it has waited for them."""
    cluster = Cluster(make(dict.fromkeys("abc", ""), 6))
    cluster.settle()
    nodes = dict(cluster.reports().nodes)
    nodes["a"] = replace(nodes["a"], ended=True)
    owned = {p for p, held in enumerate(cluster.catalog.partitions) if held.owner == "a"}

    def taken(since_ms: int, told: dict[str, NodeReport]) -> set[int]:
        commands = plan(cluster.catalog, Reports(since_ms, told), NOW_MS, PLAN)
        found = [command for command in commands if isinstance(command, TakeOver)]
        assert {command.why for command in found} <= {"a has ended"}
        return {command.partition for command in found}

    assert owned
    assert taken(NOW_MS, nodes) == owned
    unsaid = nodes | {"b": NodeReport(NOW_MS, nodes["b"].incarnation)}
    assert not taken(NOW_MS, unsaid)
    assert taken(NOW_MS - PLAN.leader_wait_ms, unsaid) == owned


def test_without_a_standby_any_live_node_takes_over() -> None:
    cluster = Cluster(make(dict.fromkeys("ab", ""), 2, standby_count=0))
    cluster.settle()
    gone = cluster.catalog.partitions[0].owner
    cluster.dead[gone] = 10 * PLAN.standby_replace_ms
    cluster.settle()
    assert set(cluster.owners()) == set("ab") - {gone}


def test_a_report_from_before_the_disk_was_lost_is_not_believed() -> None:
    catalog = make(dict.fromkeys("ab", ""), 1)
    lost = NodeReport(NOW_MS, 2, {0: Progress(999, 0, 0)}, NOW_MS)
    (command,) = plan(catalog, Reports(0, {"a": lost, "b": NodeReport(NOW_MS, 1)}), NOW_MS, PLAN)
    assert isinstance(command, TakeOver)
    assert command.to == "b"


def test_a_report_from_before_a_crash_is_not_believed_of_a_node_that_is_back() -> None:
    cluster = Cluster(make(dict.fromkeys("abc", ""), 1))
    cluster.settle()
    (held,) = cluster.catalog.partitions
    cluster.catalog = drain(cluster.catalog, held.owner)
    reports = cluster.reports()
    assert StartMove in [type(command) for command in plan(cluster.catalog, reports, NOW_MS, PLAN)]
    standby = held.standbys[0]
    old_ms = int(NOW_MS - takeover_wait_ms(cluster.catalog.settings.lease_ms, PLAN) - 1)
    back = {**reports.nodes, standby: replace(reports.nodes[standby], reported_ms=old_ms)}
    assert StartMove not in [type(command) for command in plan(cluster.catalog, Reports(0, back), NOW_MS, PLAN)]


def test_a_node_that_rejoined_is_not_silent_before_its_first_report() -> None:
    cluster = Cluster(make(dict.fromkeys("ab", ""), 1))
    cluster.settle()
    owner = cluster.catalog.partitions[0].owner
    rejoin = JoinNode(revision=cluster.catalog.revision, name=owner, raft_address="r", http_address="h", incarnation=2)
    reports = cluster.reports()
    cluster.catalog = apply(cluster.catalog, rejoin)
    assert not any(isinstance(command, TakeOver) for command in plan(cluster.catalog, reports, NOW_MS, PLAN))


def test_moves_end_or_are_given_up() -> None:
    cluster = Cluster(make(dict.fromkeys("ab", ""), 1))
    cluster.settle()
    (held,) = cluster.catalog.partitions
    move = StartMove(revision=cluster.catalog.revision, partition=0, epoch=1, to=held.standbys[0], at_ms=NOW_MS)
    cluster.catalog = apply(cluster.catalog, move)
    assert [type(command) for command in plan(cluster.catalog, cluster.reports(), NOW_MS, PLAN)] == [CompleteMove]
    nodes = {name: replace(report, partitions={}) for name, report in cluster.reports().nodes.items()}
    assert plan(cluster.catalog, Reports(0, nodes), NOW_MS, PLAN) == []
    late_ms = NOW_MS + PLAN.move_ms_max + 1
    nodes = {name: replace(report, heard_ms=late_ms, reported_ms=late_ms) for name, report in nodes.items()}
    assert [type(c) for c in plan(cluster.catalog, Reports(0, nodes), late_ms, PLAN)] == [CancelMove]
    drained = drain(cluster.catalog, held.standbys[0])
    assert CancelMove in [type(command) for command in plan(drained, cluster.reports(), NOW_MS, PLAN)]


@given(names, st.integers(1, 30), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_moves_at_once_are_bounded(members: list[str], partitions: int, moves_max: int) -> None:
    cluster = Cluster(make(dict.fromkeys(members[:1], ""), partitions, moves_max=moves_max))
    cluster.settle()
    for name in members[1:]:
        cluster.catalog = join(cluster.catalog, name)
    for _ in range(60):
        cluster.step()
        assert sum(held.move is not None for held in cluster.catalog.partitions) <= moves_max


def test_weights_share_partitions() -> None:
    members = [Member("a", "", 2.0), Member("b", "", 1.0)]
    owners = target_owners(members, ["b"] * 9, [()] * 9, lambda _: ())
    assert Counter(owners) == {"a": 6, "b": 3}


def test_even_standbys_need_chains_of_shifts() -> None:
    members = [Member(name, "", 1.0) for name in "abc"]
    owners = ["c", "c", "c", "c", "a", "a"]
    before: list[tuple[str, ...]] = [("a",), ("a",), ("a",), ("a",), ("b",), ("b",)]
    after = target_standbys(members, frozenset("abc"), owners, before, 1)
    assert Counter(name for mine in after for name in mine) == {"a": 2, "b": 2, "c": 2}
    assert all(owner not in mine for owner, mine in zip(owners, after, strict=True))


@given(st.floats(-0.05, 0.05), st.floats(-0.05, 0.05), st.integers(200, 60_000), st.floats(0, 1e6))
def test_an_owner_stops_before_another_starts(owner: float, leader: float, lease_ms: int, heard_ms: float) -> None:
    """In real time: the owner proposed at 0, the leader heard it at `heard_ms` or later."""
    limits = PlanSettings(clock_drift=0.05)
    waited_ms = takeover_wait_ms(lease_ms, limits)
    starts_ms = heard_ms + waited_ms / (1 + leader)
    assert not may_own(starts_ms * (1 + owner), 0.0, lease_ms)


def test_no_lease_no_ownership() -> None:
    assert not may_own(0, None, 1000)
    assert may_own(999, 0, 1000)
    assert not may_own(1000, 0, 1000)


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 99)), st.lists(st.integers(0, 99)), st.integers(1, 4))
def test_the_changelog_is_cut_only_behind_enough_snapshots(
    verified: dict[str, int], needed: list[int], holders_min: int
) -> None:
    cut = cut_offset(verified, needed, holders_min)
    assert cut == 0 or sum(offset >= cut for offset in verified.values()) >= holders_min
    assert cut == 0 or all(cut <= offset for offset in needed)
    higher = cut + 1
    enough = sum(offset >= higher for offset in verified.values()) >= holders_min
    assert not (enough and all(higher <= offset for offset in needed)), "as far as may be"


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(0, 9)), st.integers(1, 3), st.sampled_from("abcd"))
def test_whoever_forgets_leaves_enough_snapshots(verified: dict[str, int], holders_min: int, leaver: str) -> None:
    """The changelog is cut as far as may be, and then one of those that it was cut behind is no replica any more."""
    start = cut_offset(verified, [], holders_min)
    left = {name: offset for name, offset in verified.items() if name != leaver}
    enough = sum(offset >= start for offset in left.values()) >= holders_min
    assert may_forget(left, start, holders_min) is (enough or start == 0)


@pytest.mark.parametrize("partitions", [1, 7, 64])
def test_a_drained_node_ends_with_nothing(partitions: int) -> None:
    cluster = Cluster(make({"a": "x", "b": "y", "c": "x"}, partitions))
    cluster.settle()
    cluster.catalog = drain(cluster.catalog, "b")
    cluster.settle()
    assert "b" not in cluster.owners()
    assert "b" not in cluster.standbys()


def copies(before: Catalog, after: Catalog) -> list[tuple[int, str]]:
    """(partition, node) that has it now and did not before."""
    return [
        (partition, name)
        for partition, (old, new) in enumerate(zip(before.partitions, after.partitions, strict=True))
        for name in (new.owner, *new.standbys)
        if name not in (old.owner, *old.standbys)
    ]


@pytest.mark.parametrize("racks", [1, 3])
@pytest.mark.parametrize("standby_count", [1, 2])
def test_a_rolling_restart_copies_nothing(racks: int, standby_count: int) -> None:
    members = {name: f"r{place % racks}" for place, name in enumerate("abcdef")}
    cluster = Cluster(make(members, 30, standby_count))
    cluster.settle()
    for name in members:
        before = cluster.catalog
        cluster.dead[name] = PLAN.standby_replace_ms // 2
        cluster.settle()
        assert cluster.owners()[name] == 0, "its partitions go on elsewhere"
        assert copies(before, cluster.catalog) == []
        del cluster.dead[name]
        cluster.settle()
        assert copies(before, cluster.catalog) == []
        assert spread(cluster.owners(), list(members)) == 0


def test_a_rolling_restart_by_draining_copies_nothing_either() -> None:
    members = dict.fromkeys("abcdef", "")
    cluster = Cluster(make(members, 30))
    cluster.settle()
    for name in members:
        before = cluster.catalog
        cluster.catalog = drain(cluster.catalog, name)
        while cluster.owners()[name]:
            assert any(isinstance(command, StartMove | CompleteMove) for command in cluster.step())
        assert copies(before, cluster.catalog) == []
        cluster.dead[name] = PLAN.standby_replace_ms // 2
        cluster.settle()
        assert copies(before, cluster.catalog) == []
        del cluster.dead[name]
        undrained = DrainNode(revision=cluster.catalog.revision, name=name, draining=False)
        cluster.catalog = apply(cluster.catalog, undrained)
        cluster.settle()
        assert copies(before, cluster.catalog) == []


def test_a_node_that_stays_away_is_replaced() -> None:
    cluster = Cluster(make(dict.fromkeys("abcd", ""), 12))
    cluster.settle()
    cluster.dead["a"] = PLAN.standby_replace_ms - 1
    cluster.settle()
    assert cluster.standbys()["a"] == 6, "of what it owned and what it stood by for"
    cluster.dead["a"] = PLAN.standby_replace_ms
    cluster.settle()
    assert cluster.standbys()["a"] == 0
    assert spread(cluster.standbys(), ["b", "c", "d"]) == 0
