"""Models of a cluster: what is live follows from what was agreed alone, and directories only make wishes.

The catalog here is the real reducer, the nodes are real registries; how they hear of each other is up to chance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from agreement_support import (
    BID,
    FRAUD,
    NARROW,
    NODES,
    REPORT,
    SCHEMA,
    Cluster,
    Node,
    agreed_version,
    blob,
    manifest,
    plan_of,
    settle,
    started,
    version_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernel.errors import ManifestError
from node.kernel.types import AgreedModels, AgreedVersion, ModelName, ModelVersion
from replication.commands import PutFeatures, PutVersion, RetireVersion
from tenants import registry
from tenants.agreement import decode_report, encode_report, read_version
from tenants.features import compile_plan
from tenants.manifest import TenantSettings
from tenants.registry import (
    NOT_HERE,
    Agreed,
    GoLive,
    NotPublished,
    PairGone,
    PairSeen,
    Quarantine,
    Retire,
    Shared,
    Snapshot,
    StartTrial,
    TenantGone,
    TrialFailed,
    TrialPassed,
    VersionFailing,
    WriteStatus,
    features_status,
    publications,
    status,
)
from tenants.reserve import reserve_of
from tenants.shared_names import nothing_shared
from tenants.transitions import apply

# --- one after another ----------------------------------------------------------------------------------------------


def test_a_pair_that_passed_is_published_and_live_once_it_is_agreed() -> None:
    cluster, nodes = started()
    one, two, _ = nodes
    one.directory[BID] = manifest(), 1
    one.look()
    assert one.state(BID) == "candidate"
    one.try_all()
    assert one.state(BID) == "passed"
    assert one.pool == {}, "what one node found good is not live yet"
    assert [type(what).__name__ for what in publications(one.snapshot)] == ["PutTenant", "PutVersion"]
    one.publish()
    assert one.state(BID) == "rolling out"
    assert one.pool == {}
    cluster.roll_out()
    two.hear()
    assert two.pool == {BID: version_of(BID, (manifest(), 1))}
    assert two.snapshot.live[0][0].labels == REPORT.labels
    assert BID not in two.snapshot.watched, "its status file is the other node's to write"
    one.hear()
    assert one.state(BID) == "live"
    assert plan_of(one) == plan_of(two)


def test_what_the_cluster_refuses_is_told_and_tried_again() -> None:
    _, nodes = started()
    one = nodes[0]
    one.directory[BID] = manifest(), 1
    one.look()
    one.try_all()
    wanted = publications(one.snapshot)
    put = wanted[-1]
    one(NotPublished(put, "there is no quorum"))
    assert "there is no quorum" in str(status(one.snapshot, BID)["problems"])
    assert publications(one.snapshot) == wanted
    assert one(NotPublished(put, "there is no quorum")) == ()


def test_a_pair_that_failed_its_trial_is_tried_again_with_more_memory_or_once_dropped_anew() -> None:
    _, nodes = started()
    one = nodes[0]
    version = version_of(BID, (manifest(), 1))

    def fail() -> None:
        assert one.state(BID) == "candidate"
        one(TrialFailed(BID, version, "it needs more memory", 1))
        assert one.state(BID) == "refused"

    one.tenant_files["ads"] = "memory_mb = 128\n"
    one.directory[BID] = manifest(), 1
    one.look()
    fail()
    one.publish()
    one.look()
    assert one.state(BID) == "refused", "nobody did anything about it"
    one.tenant_files["ads"] = "memory_mb = 256\n"
    one.look()
    fail()
    one.publish()
    assert one.tenants["ads"].memory_mb == 256
    assert one.state(BID) == "refused", "it was tried with that before the cluster agreed to it"
    one(PairSeen(BID, manifest(), blob(1), 1, files=((1,), (2,))))
    fail()
    one(PairSeen(BID, manifest(), blob(1), 1, files=((1,), (2,))))
    assert one.state(BID) == "refused"


def test_the_same_directory_on_all_nodes_is_one_wish() -> None:
    cluster, nodes = started()
    for node in nodes:
        node.directory[BID] = manifest(), 1
        node.tenant_files["ads"] = "weight = 2.0\n"
    settle(cluster, nodes)
    revision = cluster.revision
    assert all(node.state(BID) == "live" for node in nodes)
    assert all(node.tenants["ads"].weight == 2.0 for node in nodes)
    settle(cluster, nodes)
    assert cluster.revision == revision
    for node in nodes:
        del node.directory[BID]
        node.directory[FRAUD] = manifest(), 2
    settle(cluster, nodes)
    assert all(node.pool.keys() == {FRAUD} for node in nodes)
    assert str(BID) not in cluster.catalog.models


def test_a_newer_version_of_another_node_wins_and_its_deletion_withdraws_the_model() -> None:
    cluster, nodes = started()
    one, two, _ = nodes
    one.directory[BID] = manifest(), 1
    settle(cluster, nodes)
    two.directory[BID] = manifest(), 2
    settle(cluster, nodes)
    assert all(node.pool == {BID: version_of(BID, (manifest(), 2))} for node in nodes)
    assert one.state(BID) == "retired"
    assert two.state(BID) == "live"
    one.restart()
    settle(cluster, nodes)
    assert two.pool == {BID: version_of(BID, (manifest(), 2))}, "an old pair that still lies there is no wish"
    one.directory = {FRAUD: (manifest(), 3)}
    settle(cluster, nodes)
    assert BID in two.pool, "tidying an old pair away is not deleting the model"
    two.directory = {FRAUD: (manifest(), 3)}
    settle(cluster, nodes)
    assert [list(node.pool) for node in nodes] == [[FRAUD]] * 3


def test_a_pair_dropped_again_after_it_was_removed_is_put_again_without_a_trial() -> None:
    cluster, nodes = started()
    one, two, _ = nodes
    one.directory[BID] = one.directory[FRAUD] = manifest(), 1
    settle(cluster, nodes)
    two.directory[BID] = manifest(), 2
    settle(cluster, nodes)
    first = one.directory.pop(BID)
    settle(cluster, nodes)
    one.directory[BID] = first
    one.look()
    assert one.state(BID) == "passed"
    settle(cluster, nodes)
    assert all(node.pool[BID] == version_of(BID, first) for node in nodes)
    assert two.state(BID) == "retired"


def test_a_node_that_lost_its_disk_or_its_directory_withdraws_nothing() -> None:
    cluster, nodes = started()
    one, two, _ = nodes
    one.directory[BID] = manifest(), 1
    one.tenant_files["ads"] = "weight = 2.0\n"
    settle(cluster, nodes)
    two.directory[BID] = manifest(), 2
    settle(cluster, nodes)
    one.restart(disk_lost=True)
    settle(cluster, nodes)
    assert one.state(BID) == "retired", "what it finds when it starts may be old"
    assert two.pool[BID] == version_of(BID, (manifest(), 2))
    two.directory.clear()
    two.restart()
    settle(cluster, nodes)
    two.directory[FRAUD] = manifest(), 3
    two.restart(disk_lost=True)
    settle(cluster, nodes)
    assert all(node.pool.keys() == {BID, FRAUD} for node in nodes)


def test_a_pair_deleted_while_its_node_was_down_is_withdrawn_when_it_is_back() -> None:
    cluster, nodes = started()
    one = nodes[0]
    one.directory[BID] = one.directory[FRAUD] = manifest(), 1
    settle(cluster, nodes)
    del one.directory[BID]
    one.restart()
    settle(cluster, nodes)
    assert all(node.pool.keys() == {FRAUD} for node in nodes)


def test_a_model_waits_for_the_models_it_uses_wherever_they_come_from() -> None:
    cluster, nodes = started()
    one, two, _ = nodes
    one.directory[FRAUD] = manifest("models.ads.bid.score"), 1
    settle(cluster, nodes)
    assert one.state(FRAUD) == "waiting"
    two.directory[BID] = manifest(), 2
    two.look()
    two.try_all()
    two.publish()
    one.hear()
    assert one.state(FRAUD) == "waiting", "what is not live yet gives no outputs"
    cluster.roll_out()
    told = cluster.told("one")
    actions = one(Agreed(told, one.tenants | {"ads": TenantSettings("ads")}, 9))
    assert [type(action) for action in actions if isinstance(action, StartTrial)] == [StartTrial]
    settle(cluster, nodes)
    assert all(node.pool.keys() == {BID, FRAUD} for node in nodes)


def test_a_file_that_is_not_here_is_said_and_the_plan_is_the_same() -> None:
    cluster, nodes = started()
    one = nodes[0]
    lacking = AgreedModels(100, (agreed_version(BID, (manifest(), 1), here=False),), {"ads": ""})
    actions = one(Agreed(lacking, {"ads": TenantSettings("ads")}, 1))
    assert any(isinstance(action, GoLive) for action in actions)
    assert status(one.snapshot, BID)["problems"] == [NOT_HERE]
    assert one.state(BID) == "failing"
    held = AgreedModels(101, (agreed_version(BID, (manifest(), 1)),), {"ads": ""})
    actions = one(Agreed(held, {"ads": TenantSettings("ads")}, 2))
    assert [type(action) for action in actions] == [WriteStatus], "the pool has it already, and waits for the file"
    assert one.state(BID) == "live"
    one(VersionFailing(BID, version_of(BID, (manifest(), 1)), "can't load"))
    one(
        Agreed(
            AgreedModels(102, held.versions, {"ads": "", "other": ""}),
            {"ads": TenantSettings("ads"), "other": TenantSettings("other")},
            3,
        )
    )
    assert one.state(BID) == "failing", "what the pool found is not forgotten when something else changes"
    assert cluster.revision < 100


def test_a_version_that_fails_on_one_node_gives_way_on_all() -> None:
    cluster, nodes = started()
    one, two = nodes[:2]
    for number in (1, 2):
        one.directory[BID] = (manifest(), number)
        settle(cluster, nodes)
    first, second = (version_of(BID, (manifest(), number)) for number in (1, 2))
    assert two.pool[BID] == second
    two(VersionFailing(BID, second, "rows kill it", 9))
    assert not [what for what in publications(two.snapshot) if isinstance(what, Quarantine)], "not by its own fault"
    two(VersionFailing(BID, second, "5 rows killed it", 9, at_fault=True))
    settle(cluster, nodes)
    assert all(node.pool[BID] == first for node in nodes)
    assert (one.state(BID), "5 rows killed it" in str(status(one.snapshot, BID)["problems"])) == ("quarantined", True)
    two(VersionFailing(BID, first, "and this too", 10, at_fault=True))
    settle(cluster, nodes)
    assert all(node.pool[BID] == first for node in nodes), "there is none before it"
    one.directory[BID] = (manifest(), 3)
    settle(cluster, nodes)
    assert all(node.pool[BID] == version_of(BID, (manifest(), 3)) for node in nodes)


@pytest.mark.parametrize("rollout", [b"", b'[rollout]\nstages = [{ stage = "canary", share = 0.5 }]\n'])
def test_deleting_the_pair_of_a_quarantined_version_withdraws_what_was_not_put_since(rollout: bytes) -> None:
    cluster, nodes = started()
    one, two, three = nodes
    one.tenant_files["ads"] = two.tenant_files["ads"] = ""
    for name in (BID, FRAUD):
        for number, text in ((1, manifest()), (2, manifest() + rollout)):
            one.directory[name] = text, number
            settle(cluster, nodes)
        two(VersionFailing(name, version_of(name, (manifest() + rollout, 2)), "5 rows killed it", 9, at_fault=True))
        settle(cluster, nodes)
        assert (one.state(name), three.pool[name]) == ("quarantined", version_of(name, (manifest(), 1)))
    two.directory[FRAUD] = manifest(), 3
    settle(cluster, nodes)
    one.directory = {}
    settle(cluster, nodes)
    assert all(node.pool == {FRAUD: version_of(FRAUD, (manifest(), 3))} for node in nodes)
    assert BID not in three.snapshot.models


def test_a_node_keeps_for_what_may_come_to_run_in_place_of_what_does() -> None:
    cluster, nodes = started()
    texts = [manifest(feature) for feature in ("event.amount", "count(transaction)", "count(search)")]
    for number, text in enumerate(texts):
        nodes[0].directory[BID] = (text, number)
        settle(cluster, nodes)
    assert all([one.text for one in reserve_of(node.snapshot, SCHEMA)] == [texts[1]] for node in nodes)
    nodes[1](VersionFailing(BID, nodes[1].pool[BID], "rows kill it", 9, at_fault=True))
    settle(cluster, nodes)
    assert all([one.text for one in reserve_of(node.snapshot, SCHEMA)] == [texts[0]] for node in nodes)
    nodes[0].restart()
    assert [one.text for one in reserve_of(nodes[0].snapshot, SCHEMA)] == [texts[0]]
    nodes[0].directory[BID] = (texts[2], 9)
    settle(cluster, nodes)
    assert all([one.text for one in reserve_of(node.snapshot, SCHEMA)] == [texts[1]] for node in nodes)
    nodes[0].directory = {FRAUD: (manifest(), 9)}
    settle(cluster, nodes)
    assert all(reserve_of(node.snapshot, SCHEMA) == () for node in nodes)


def test_a_node_keeps_for_what_is_to_go_live_and_for_nothing_without_a_live_version() -> None:
    def heard(*versions: AgreedVersion) -> Snapshot:
        return apply(Snapshot(shared=Shared()), Agreed(AgreedModels(1, versions, {}), {}, 1), SCHEMA)[0]

    live, passed = agreed_version(BID, (manifest(), 1)), agreed_version(BID, (manifest("event.shop"), 2), "passed")
    before = dataclasses.replace(agreed_version(BID, (manifest("count(search)"), 3), "retired"), fallback=True)
    assert [one.text for one in reserve_of(heard(live, passed, before), SCHEMA)] == [
        passed.manifest.encode(),
        before.manifest.encode(),
    ]
    unlike = agreed_version(BID, (b'output = "other"\n' + manifest(), 4), "staged")
    assert [one.text for one in reserve_of(heard(live, unlike), SCHEMA)] == [unlike.manifest.encode()]
    assert heard(before).models == {}


def test_a_node_keeps_for_a_live_version_that_it_can_not_run() -> None:
    unfit = {BID: "a row is too long"}
    version = agreed_version(BID, (manifest(), 1))
    snapshot, _ = apply(Snapshot(shared=Shared()), Agreed(AgreedModels(1, (version,), {}), {}, 1, unfit), SCHEMA)
    assert snapshot.live == ()
    assert [one.name for one in reserve_of(snapshot, SCHEMA)] == [BID]
    assert snapshot.shared is not None
    assert snapshot.shared.coming == {BID: reserve_of(snapshot, SCHEMA)}, "it counts as one that runs"


def test_a_version_that_cannot_be_read_here_is_told_and_in_no_plan() -> None:
    agreed = AgreedModels(
        1, (agreed_version(BID, (manifest("event.shop"), 1)), agreed_version(FRAUD, (manifest(), 1))), {}
    )
    snapshot, actions = apply(Snapshot(shared=Shared()), Agreed(agreed, {}, 1), NARROW)
    assert [version.name for version, _ in snapshot.live] == [FRAUD]
    told = status(snapshot, BID)
    assert told["state"] == "failing"
    assert "shop" in str(told["problems"])
    assert WriteStatus(BID) in actions
    damaged = dataclasses.replace(agreed.versions[1], report="{}")
    snapshot, _ = apply(Snapshot(shared=Shared()), Agreed(AgreedModels(1, (damaged,), {}), {}, 1), SCHEMA)
    assert snapshot.live == ()
    assert "upgrade" in str(status(snapshot, FRAUD)["problems"])


def test_a_live_model_that_does_not_fit_is_left_out_and_comes_back() -> None:
    agreed = AgreedModels(1, (agreed_version(BID, (manifest(), 1)), agreed_version(FRAUD, (manifest(), 1))), {})
    snapshot, _ = apply(Snapshot(shared=Shared()), Agreed(agreed, {}, 1), SCHEMA)
    snapshot, actions = apply(snapshot, Agreed(agreed, {}, 1, {FRAUD: "a row is too long"}), SCHEMA)
    assert [type(action) for action in actions] == [Retire, WriteStatus]
    assert "a row is too long" in str(status(snapshot, FRAUD)["problems"])
    snapshot, actions = apply(snapshot, Agreed(agreed, {}, 1), SCHEMA)
    assert [type(action) for action in actions] == [GoLive, WriteStatus]


def test_a_report_travels_whole_and_a_version_is_what_its_name_says() -> None:
    assert decode_report(encode_report(REPORT)) == REPORT
    agreed = agreed_version(BID, (manifest(), 1))
    read = read_version(agreed, SCHEMA, nothing_shared)
    assert (read.version.version, read.version.labels, read.report) == (agreed.version, REPORT.labels, REPORT)
    with pytest.raises(ManifestError, match="put it again"):
        read_version(dataclasses.replace(agreed, blob=blob(2)), SCHEMA, nothing_shared)


def test_settings_of_the_cluster_hold_until_a_tenant_toml_changes() -> None:
    cluster, nodes = started()
    one, two, _ = nodes
    one.tenant_files["ads"] = "weight = 2.0\n"
    settle(cluster, nodes)
    two.directory[BID] = manifest(), 1  # a folder without a tenant.toml
    settle(cluster, nodes)
    assert two.tenants["ads"].weight == 2.0
    two.tenant_files["ads"] = "weight = 3.0\n"
    settle(cluster, nodes)
    one.restart()
    settle(cluster, nodes)
    assert all(node.tenants["ads"].weight == 3.0 for node in nodes)
    del two.tenant_files["ads"]
    settle(cluster, nodes)
    assert all(node.tenants["ads"].weight == 1.0 for node in nodes), "a tenant.toml that is removed gives the defaults"


def test_what_another_node_put_meanwhile_counts_as_put_and_can_be_deleted_here() -> None:
    _, nodes = started()
    one, two, _ = nodes
    for node in (one, two):
        node.directory[BID] = manifest(), 1
        node.look()
    one.try_all()
    one.publish()
    two.hear()
    assert two.state(BID) == "rolling out", "it needs no trial any more"
    assert publications(two.snapshot) == ()
    two.directory = {FRAUD: (manifest(), 2)}
    two.look()
    assert registry.Withdraw(BID, version_of(BID, (manifest(), 1))) in publications(two.snapshot)


def test_a_wish_for_the_live_version_holds_against_one_that_waits_to_go_live() -> None:
    cluster, nodes = started()
    one, two, three = nodes
    one.directory[BID] = manifest(), 1
    settle(cluster, nodes)
    two.directory[BID] = manifest(), 2
    two.look()
    two.try_all()
    two.publish()
    three.hear()
    three.directory[BID] = manifest(), 1
    three.look()
    cluster.publish(registry.PutTenant("other", ""))
    three.hear()
    assert three.state(BID) == "passed"
    three.publish()
    assert three.state(BID) == "live"
    cluster.roll_out()
    for node in nodes:
        node.hear()
    assert all(node.pool[BID] == version_of(BID, (manifest(), 1)) for node in nodes)
    assert (one.state(BID), two.state(BID)) == ("live", "retired")


def test_a_deletion_counts_once_it_is_agreed_and_not_against_a_newer_version() -> None:
    cluster, nodes = started()
    one, two, _ = nodes
    one.directory[BID] = one.directory[FRAUD] = manifest(), 1
    settle(cluster, nodes)
    pair = one.directory.pop(BID)
    one.look()
    assert publications(one.snapshot) == (registry.Withdraw(BID, version_of(BID, (manifest(), 1))),)
    assert BID in one.pool, "until the cluster has taken it"
    one.directory[BID] = pair
    one.look()
    assert publications(one.snapshot) == (), "the files are there again"
    two.directory[BID] = manifest(), 2
    two.look()
    two.try_all()
    two.publish()
    one.hear()
    del one.directory[BID]
    one.look()
    assert publications(one.snapshot) == (), "another version waits to go live"
    settle(cluster, nodes)
    two.directory = {FRAUD: (manifest(), 1)}
    two.look()
    two.publish()
    assert BID not in two.snapshot.models


def test_a_withdrawal_that_was_overtaken_or_cut_off_ends_as_the_cluster_wants() -> None:
    cluster, nodes = started()
    one, two, three = nodes
    one.directory[BID] = one.directory[FRAUD] = manifest(), 1
    settle(cluster, nodes)
    first = one.directory.pop(BID)
    one.look()
    two.directory[BID] = manifest(), 2
    two.look()
    two.try_all()
    two.publish()
    one.hear()
    assert publications(one.snapshot) == (), "it is the other node's model now"
    del two.directory[BID]
    two.directory[FRAUD] = manifest(), 1
    settle(cluster, nodes)
    assert str(BID) not in cluster.catalog.models

    three.directory = {BID: first, FRAUD: (manifest(), 1)}
    settle(cluster, nodes)
    version, key = three.pool[BID], BID
    cluster.propose(RetireVersion(revision=cluster.revision, tenant=key.tenant, model=key.model, version=version))
    del three.directory[BID]
    three.restart()
    settle(cluster, nodes)
    assert str(BID) not in cluster.catalog.models, "a withdrawal that was half done is done"


def test_a_retired_pair_is_live_again_when_another_node_puts_it() -> None:
    cluster, nodes = started()
    one, two, three = nodes
    one.directory[BID] = manifest(), 1
    settle(cluster, nodes)
    two.directory[BID] = manifest(), 2
    settle(cluster, nodes)
    assert one.state(BID) == "retired"
    three.directory[BID] = manifest(), 1
    three.look()
    three.publish()
    one.hear()
    assert one.state(BID) == "rolling out"
    settle(cluster, nodes)
    assert (one.state(BID), two.state(BID), three.state(BID)) == ("live", "retired", "live")


def test_an_old_tenant_toml_of_a_node_that_lost_its_disk_is_no_wish() -> None:
    cluster, nodes = started()
    one, two, _ = nodes
    one.tenant_files["ads"] = "weight = 2.0\n"
    settle(cluster, nodes)
    two.tenant_files["ads"] = "weight = 3.0\n"
    settle(cluster, nodes)
    one.restart(disk_lost=True)
    settle(cluster, nodes)
    assert all(node.tenants["ads"].weight == 3.0 for node in nodes)


# --- any order ------------------------------------------------------------------------------------------------------

names = st.sampled_from([BID, FRAUD])
texts = st.sampled_from([manifest(), manifest("event.shop"), manifest("models.ads.bid.score"), manifest("nonsense(")])
valid_texts = st.sampled_from([manifest(), manifest("event.shop"), manifest("models.ads.bid.score")])
which = st.sampled_from(range(len(NODES)))
happenings = st.one_of(
    st.tuples(st.just("drop"), which, names, texts, st.integers(0, 2)),
    st.tuples(st.just("drop"), which, names, texts, st.integers(0, 2)),
    st.tuples(st.just("remove"), which, names),
    st.tuples(st.just("settings"), which, st.sampled_from(["", "weight = 2.0\n", "weight = 3.0\n"])),
    st.tuples(st.sampled_from(["look", "try", "fail", "publish", "hear", "restart", "lose", "unmount"]), which),
    st.tuples(st.sampled_from(["look", "try", "publish", "hear"]), which),
    st.tuples(st.just("roll out")),
)


def happen(cluster: Cluster, nodes: list[Node], happening: tuple[object, ...]) -> None:
    match happening:
        case ("drop", int(at), ModelName() as name, bytes(text), int(number)):
            nodes[at].directory[name] = text, number
        case ("remove", int(at), ModelName() as name):
            nodes[at].directory.pop(name, None)
        case ("settings", int(at), str(text)):
            nodes[at].tenant_files["ads"] = text
        case ("look", int(at)):
            nodes[at].look()
        case ("try", int(at)):
            nodes[at].try_all()
        case ("fail", int(at)):
            for name, entry in sorted(nodes[at].snapshot.models.items()):
                if entry.newest is not None:
                    nodes[at](TrialFailed(name, entry.newest.version, "no", 1))
        case ("publish", int(at)):
            nodes[at].publish()
        case ("hear", int(at)):
            nodes[at].hear()
        case ("restart", int(at)):
            nodes[at].restart()
        case ("lose", int(at)):
            nodes[at].restart(disk_lost=True)
        case ("unmount", int(at)):
            nodes[at].directory, nodes[at].tenant_files = {}, {}
        case ("roll out",):
            cluster.roll_out()


@settings(max_examples=300, deadline=None)
@given(st.lists(happenings, min_size=12, max_size=50))
def test_nodes_that_were_told_the_same_run_the_same_and_come_to_rest(run: list[tuple[object, ...]]) -> None:
    cluster, nodes = started()
    plans: dict[int, list[tuple[ModelVersion, bytes]]] = {}
    for happening in run:
        happen(cluster, nodes, happening)
        for node in nodes:
            if node.told >= 0:
                assert plans.setdefault(node.told, plan_of(node)) == plan_of(node)
    settle(cluster, nodes)
    for node in nodes:
        assert plan_of(node) == plan_of(nodes[0])
        assert node.tenants == nodes[0].tenants
        for name, entry in node.snapshot.models.items():
            assert entry.newest is None or entry.newest.state in ("refused", "waiting", "retired"), str(name)
    revision = cluster.revision
    settle(cluster, nodes)
    assert cluster.revision == revision


@st.composite
def agreements(draw: st.DrawFn) -> AgreedModels:
    versions: list[AgreedVersion] = []
    for name in (BID, FRAUD):
        pairs = draw(st.lists(st.tuples(valid_texts, st.integers(0, 2)), max_size=3, unique=True))
        live = draw(st.integers(0, 3))
        for at, pair in enumerate(pairs):
            state = "live" if at == live else draw(st.sampled_from(["retired", "retired", "passed", "quarantined"]))
            versions.append(agreed_version(name, pair, state, draw(st.booleans())))
    return AgreedModels(draw(st.integers(0, 9)), tuple(versions), {"ads": "", "grocery": ""})


def histories() -> Iterator[st.SearchStrategy[registry.Event]]:
    version = st.builds(version_of, names, st.tuples(valid_texts, st.integers(0, 2)))
    digests = st.integers(0, 2).map(blob)
    yield st.builds(PairSeen, names, texts, digests, st.just(1), st.booleans())
    yield st.builds(PairGone, names)
    yield st.builds(TrialPassed, names, version, st.just(REPORT), st.just(2))
    yield st.builds(TrialFailed, names, version, st.just("no"), st.just(2))
    yield st.builds(VersionFailing, names, version, st.sampled_from(["why", ""]), st.just(3), st.booleans())
    yield st.builds(TenantGone, st.sampled_from(["ads", "grocery"]))
    yield st.builds(Agreed, agreements(), st.just({}), st.just(3), st.sampled_from([{}, {BID: "too long"}]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(*histories()), max_size=15), agreements(), st.randoms(use_true_random=False))
def test_equal_agreements_give_equal_plans_whatever_a_node_went_through(
    history: list[registry.Event], agreed: AgreedModels, chance: object
) -> None:
    node, fresh = Snapshot(shared=Shared()), Snapshot(shared=Shared())
    for event in history:
        node, _ = apply(node, event, SCHEMA)
    last = Agreed(agreed, {}, 10)
    node, _ = apply(node, last, SCHEMA)
    fresh, _ = apply(fresh, last, SCHEMA)
    assert node.live == fresh.live
    ours, theirs = compile_plan(node.live, SCHEMA), compile_plan(fresh.live, SCHEMA)
    assert (ours.models, ours.aggregates, ours.stored_models) == (
        theirs.models,
        theirs.aggregates,
        theirs.stored_models,
    )
    live = {version.name: version.version for version in agreed.versions if version.state == "live"}
    assert {version.name: version.version for version, _ in node.live} == live


SHARED = '[features.x]\nversion = 1\nexpression = "event.amount + 1"\ndescription = "x"\n'


def test_shared_features_are_the_clusters_and_what_is_used_stays_whoever_uses_it() -> None:
    cluster, nodes = started()
    one, two, three = nodes
    one.tenant_files["ads"] = ""
    one.feature_files["ads"] = SHARED
    settle(cluster, nodes)
    for node in nodes:
        assert [str(name) for name in node.snapshot.definitions.features] == ["features.ads.x.v1"]
    two.tenant_files["grocery"] = ""
    two.directory[FRAUD] = (manifest("features.ads.x"), 1)
    settle(cluster, nodes)
    assert two.state(FRAUD) == "live"
    del one.feature_files["ads"]
    settle(cluster, nodes)
    told = features_status(one.snapshot, "ads")
    assert told["state"] == "refused"
    assert "used by grocery/fraud" in str(told["problems"])
    assert features_status(three.snapshot, "ads")["in_force"] == ["features.ads.x.v1"]
    del two.directory[FRAUD]
    settle(cluster, nodes)
    assert one.snapshot.definitions.features == two.snapshot.definitions.features == {}


def test_features_decided_on_what_was_before_a_model_are_refused_by_the_catalog() -> None:
    cluster, nodes = started()
    one, two, _ = nodes
    one.tenant_files["ads"] = ""
    one.feature_files["ads"] = SHARED
    settle(cluster, nodes)
    before = cluster.revision
    two.tenant_files["grocery"] = ""
    two.directory[FRAUD] = (manifest("features.ads.x"), 1)
    settle(cluster, nodes)
    assert "a model changed" in cluster.propose(PutFeatures(revision=before, tenant="ads", text=""))
    after = cluster.revision
    assert cluster.propose(PutFeatures(revision=after, tenant="ads", text="")) == ""
    late = PutVersion(
        revision=after, tenant="ads", model="bid", version="ab" * 32, blob="cd" * 32, manifest="", report=""
    )
    assert "shared features changed" in cluster.propose(late)
    two.hear()
    assert "features.ads.x" in str(status(two.snapshot, FRAUD)["problems"]), "agreed by force: all nodes leave it out"
    assert two.snapshot.live == ()
