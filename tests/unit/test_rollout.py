"""Rollout: a version goes live once all that are there have its file, the newest wish wins, and old ones go."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernel import limits
from replication.catalog import Catalog, Version, apply, problem
from replication.cluster import next_commands
from replication.commands import (
    Command,
    GoLive,
    GrowPartitions,
    HoldBlob,
    JoinNode,
    LeaveNode,
    PutTenant,
    PutVersion,
    RetireVersion,
    SetStandbys,
    TakeOver,
)
from replication.ownership import NodeReport, PlanSettings, Progress, Reports
from replication.rollout import rollout

NODES = ("a", "b", "c")
MODELS = ("m", "n")
sha = st.integers(0, 11).map(lambda number: f"{number:064x}")


def start(models: tuple[str, ...] = MODELS) -> Catalog:
    catalog = Catalog()
    for name in NODES:
        catalog = apply(catalog, JoinNode(revision=0, name=name, raft_address="r", http_address="h"))
    catalog = apply(catalog, PutTenant(revision=9, name="t", settings=""))
    for model in models:
        catalog = apply(catalog, put(catalog, model, f"{0:064x}"))
    return catalog


def put(catalog: Catalog, model: str, version: str) -> PutVersion:
    return PutVersion(
        revision=catalog.revision, tenant="t", model=model, version=version, blob=version, manifest="x", report="{}"
    )


def hold(catalog: Catalog, node: str, blob: str, held: bool = True) -> HoldBlob:
    return HoldBlob(revision=catalog.revision, node=node, incarnation=1, blob=blob, held=held)


def step(draw: st.DrawFn, catalog: Catalog) -> Command:
    model, version, node = draw(st.sampled_from(MODELS)), draw(sha), draw(st.sampled_from(NODES))
    retire = RetireVersion(revision=catalog.revision, tenant="t", model=model, version=version)
    held = hold(catalog, node, version, draw(st.integers(0, 4)) > 0)
    choices: tuple[Command, ...] = (put(catalog, model, version), held, held, retire)
    return draw(st.sampled_from(choices))


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[Catalog, frozenset[str]]]:
    """Catalogs as commands and the leader's rollouts change them, with who is there at each."""
    catalog, found = start(), []
    for _ in range(draw(st.integers(1, 25))):
        catalog = apply(catalog, step(draw, catalog))
        fresh = frozenset(draw(st.sets(st.sampled_from((*NODES, "stranger")))))
        found.append((catalog, fresh))
        if draw(st.booleans()):
            for command in rollout(catalog, fresh):
                catalog = apply(catalog, command)
    return found


def newest(catalog: Catalog, model: str) -> Version:
    return max(catalog.models[f"t/{model}"].versions.values(), key=lambda version: version.revision)


@given(histories())
@settings(max_examples=150, deadline=None)
def test_what_is_proposed_is_right(history: list[tuple[Catalog, frozenset[str]]]) -> None:
    for catalog, fresh in history:
        commands = rollout(catalog, fresh)
        assert len({(command.tenant, command.model) for command in commands}) == len(commands)
        after = catalog
        for command in commands:
            assert problem(after, command) == "", "all are valid together"
            after = apply(after, command)
            if isinstance(command, GoLive):
                version = catalog.version("t", command.model, command.version)
                assert version is not None
                assert version == newest(catalog, command.model)
                assert set(command.holders) == fresh & catalog.nodes.keys() <= catalog.holders[version.blob].keys()
                assert after.models[f"t/{command.model}"].live == command.version
            else:
                assert catalog.models[f"t/{command.model}"].live != command.version


@given(histories())
@settings(max_examples=60, deadline=None)
def test_the_newest_version_goes_live_once_all_hold_it(history: list[tuple[Catalog, frozenset[str]]]) -> None:
    """However the history went: whoever is there fetches what is listed, and the leader looks until it is content."""
    catalog, _ = history[-1]
    wishes = {model: newest(catalog, model) for model in MODELS if f"t/{model}" in catalog.models}
    for blob in catalog.holders:
        for node in ("a", "b"):
            catalog = apply(catalog, hold(catalog, node, blob))
    rounds = 0
    while commands := rollout(catalog, {"a", "b"}):
        rounds += 1
        for command in commands:
            catalog = apply(catalog, command)
        assert rounds < 50
    for name, wish in wishes.items():
        model = catalog.models[f"t/{name}"]
        assert wish.state == "retired" or model.live == wish.version
        assert not any(version.state == "passed" for version in model.versions.values())
        retired = sum(version.state == "retired" for version in model.versions.values())
        assert retired <= limits.VERSIONS_RETIRED_MAX


def test_no_more_versions_are_kept_than_may_be_with_the_one_that_would_be_fallen_back_to() -> None:
    catalog = start(("m",))
    for number in range(1, 12):
        catalog = apply(catalog, put(catalog, "m", f"{number:064x}"))
        for blob in list(catalog.holders):
            for node in NODES:
                catalog = apply(catalog, hold(catalog, node, blob))
        while commands := rollout(catalog, NODES):
            for command in commands:
                catalog = apply(catalog, command)
        model = catalog.models["t/m"]
        retired = [one for one in model.versions.values() if one.state == "retired"]
        assert len(retired) == min(number, limits.VERSIONS_RETIRED_MAX)
        assert number == 1 or model.fallback in retired


def test_a_node_that_is_there_without_the_file_holds_it_up_and_one_that_left_does_not() -> None:
    catalog = start(("m",))
    for node in ("a", "b"):
        catalog = apply(catalog, hold(catalog, node, f"{0:064x}"))
    assert rollout(catalog, NODES) == []
    assert rollout(catalog, ()) == []
    left = apply(catalog, LeaveNode(revision=catalog.revision, name="c"))
    (command,) = rollout(left, NODES)
    assert isinstance(command, GoLive)
    assert command.holders == ("a", "b")
    assert rollout(apply(left, command), NODES) == []


def many_versions() -> Catalog:
    """More than one rollout may make live, all in the same file."""
    catalog = start(tuple(f"m{place}" for place in range(limits.MODELS_PER_TENANT_MAX)))
    catalog = apply(catalog, PutTenant(revision=catalog.revision, name="u", settings=""))
    for place in range(9):
        more = PutVersion(
            revision=catalog.revision,
            tenant="u",
            model=f"m{place}",
            version=f"{0:064x}",
            blob=f"{0:064x}",
            manifest="x",
        )
        catalog = apply(catalog, more)
    return apply(catalog, hold(catalog, "a", f"{0:064x}"))


def test_a_rollout_is_bounded() -> None:
    assert len(rollout(many_versions(), {"a"})) == limits.ROLLOUT_COMMANDS_MAX


def test_a_dead_nodes_partitions_go_before_the_versions_that_waited_for_it() -> None:
    catalog = apply(many_versions(), GrowPartitions(revision=0, count=2))
    for partition in (0, 1):
        for command in (
            TakeOver(revision=catalog.revision, partition=partition, epoch=0, to="c"),
            SetStandbys(revision=catalog.revision + 1, partition=partition, epoch=1, standbys=("a",)),
        ):
            assert not problem(catalog, command)
            catalog = apply(catalog, command)
    dead_ms, now_ms = 0, 10_000
    held = {partition: Progress(5, 0, 0) for partition in (0, 1)}
    told = {"a": NodeReport(now_ms, 1, held, now_ms), "c": NodeReport(dead_ms, 1)}
    commands = next_commands(catalog, Reports(dead_ms, told), frozenset({"a"}), now_ms, PlanSettings())
    assert [type(command) for command in commands[:2]] == [TakeOver, TakeOver]
    assert len(commands) == limits.CLUSTER_PLAN_COMMANDS_MAX
    assert GoLive in {type(command) for command in commands}
