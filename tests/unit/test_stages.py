"""How versions go through stages: on a node by itself, over restarts, and on all nodes of a cluster alike."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import agreement_support as cluster
import msgspec
import pytest
from agreement_support import BID
from test_registry import SCHEMA, Run, manifest

from node.cluster_models import CatalogModels
from node.kernel.clock import ManualClock
from node.kernel.types import ModelName
from replication.catalog import Catalog
from replication.commands import Command, GrowPartitions, HoldBlob, PutTenant, QuotaLimits, RetireVersion, SetQuota
from tenants.comparison import Figures
from tenants.judging import Judging
from tenants.registry import GoLive, PairGone, Retire, RunBeside, VersionFailing, WriteStatus, status
from tenants.registry_file import decode, encode
from tenants.stage import Promote, RollBack

STAGED = """[rollout]
stages = [{ stage = "shadow", rows_min = 10 }, { stage = "canary", share = 0.2, rows_min = 20 }]"""


def kinds(actions: Sequence[object]) -> list[type]:
    return [type(action) for action in actions]


def shadowed() -> tuple[Run, str, str]:
    """A live version and a newer one in the first of its stages."""
    run = Run()
    run.seen(BID, manifest(), 1)
    run.passed(BID)
    run.seen(BID, manifest(extra=STAGED), 2)
    second = run.on_trial(BID)
    assert kinds(run.passed(BID)) == [RunBeside, WriteStatus]
    return run, run.live[BID], second


def promote(run: Run, version: str, stage: int, to_live: bool = False) -> list[type]:
    return kinds(run(Promote(BID, version, stage, "eve", "it is good", 9, to_live)))


def changes(run: Run) -> list[tuple[str, str]]:
    return [(one.to, one.who) for one in run.snapshot.models[BID].history]


def test_the_first_version_of_a_model_has_none_to_stand_beside_and_goes_live_at_once() -> None:
    run = Run()
    run.seen(BID, manifest(extra=STAGED), 1)
    assert kinds(run.passed(BID)) == [GoLive, WriteStatus]
    assert run.snapshot.beside == ()


def test_a_version_goes_from_stage_to_stage_and_then_live() -> None:
    run, first, second = shadowed()
    assert run.live[BID] == first
    ((beside, _),) = run.snapshot.beside
    assert (beside.version.version, beside.kind) == (second, "shadow")
    told = status(run.snapshot, BID)
    assert (told["state"], told["version"]) == ("shadow", second)
    assert run.seen(BID, manifest(extra=STAGED), 2) == [], "the same bytes are no news"
    assert promote(run, second, 1) == [], "it is not in that stage"
    assert promote(run, second, 0) == [WriteStatus]
    ((beside, _),) = run.snapshot.beside
    assert (beside.kind, beside.share) == ("canary", 0.2)
    assert promote(run, second, 0) == [], "said twice"
    assert promote(run, second, 1) == [GoLive, Retire, WriteStatus]
    assert (run.live[BID], run.snapshot.beside, run.state(BID)) == (second, (), "live")
    previous = run.snapshot.models[BID].previous
    assert previous is not None
    assert previous.version.version == first
    assert changes(run) == [("live", "tenant"), ("shadow", "tenant"), ("canary 0.2", "eve"), ("live", "eve")]


def test_an_operator_may_leave_stages_out() -> None:
    run, _, second = shadowed()
    promote(run, second, 0, to_live=True)
    assert run.live[BID] == second


def test_a_staged_version_that_is_rolled_back_is_not_tried_again_and_the_live_one_never_stops() -> None:
    run, first, second = shadowed()
    actions = run(RollBack(BID, second, "auto", "it disagrees", 9))
    assert kinds(actions) == [GoLive, Retire, WriteStatus], "the live one takes over what the other had queued"
    assert (run.live[BID], run.state(BID), run.snapshot.beside) == (first, "quarantined", ())
    assert "it disagrees" in str(status(run.snapshot, BID)["problems"])
    assert run.seen(BID, manifest(extra=STAGED), 2) == []
    assert changes(run)[-1] == ("quarantined", "auto")


def test_a_version_that_is_rolled_back_without_a_reason_says_that_an_operator_did_it() -> None:
    run, _, second = shadowed()
    run(RollBack(BID, second, "eve", "", 9))
    assert status(run.snapshot, BID)["problems"] == [
        "bid.joblib: quarantined, and the version before it runs: an operator has rolled it back and gave no reason;"
        " drop a mended pair, which is another version"
    ]


def test_a_staged_version_that_fails_by_its_own_fault_is_rolled_back() -> None:
    run, first, second = shadowed()
    run(VersionFailing(BID, second, "its file is not here", 7))
    assert run.snapshot.beside
    run(VersionFailing(BID, second, "it crashes", 8, at_fault=True))
    assert (run.live[BID], run.state(BID), run.snapshot.beside) == (first, "quarantined", ())
    assert "in stage shadow: it crashes" in str(status(run.snapshot, BID)["problems"])


def test_a_newer_pair_takes_the_place_of_a_staged_one_once_it_passes() -> None:
    run, first, _ = shadowed()
    run.seen(BID, manifest(extra=STAGED), 3)
    assert run.snapshot.beside, "the staged one goes on during the trial"
    assert kinds(run.passed(BID)) == [RunBeside, Retire, WriteStatus]
    assert run.live[BID] == first
    run.seen(BID, manifest(), 4)
    assert kinds(run.passed(BID)) == [GoLive, Retire, Retire, WriteStatus]
    assert run.snapshot.beside == ()


def test_a_deleted_model_takes_its_staged_version_along() -> None:
    run, _, _ = shadowed()
    assert kinds(run(PairGone(BID))) == [Retire, Retire]


def test_outputs_that_mean_something_else_can_not_stand_beside_the_live_ones() -> None:
    run = Run()
    run.seen(BID, manifest(), 1)
    run.passed(BID)
    run.seen(BID, manifest(extra=f'output = "risk"\n{STAGED}'), 2)
    assert kinds(run.passed(BID)) == [WriteStatus]
    assert run.state(BID) == "refused"
    assert "its output differ from the live version's" in str(status(run.snapshot, BID)["problems"])


def test_putting_back_the_live_pair_takes_the_staged_version_back() -> None:
    run, first, second = shadowed()
    assert kinds(run.seen(BID, manifest(), 1)) == [GoLive, Retire, WriteStatus]
    assert (run.live[BID], run.state(BID), run.snapshot.beside) == (first, "live", ())
    assert changes(run)[-1] == ("retired", "tenant")
    assert promote(run, second, 0) == []
    run.seen(BID, manifest(extra=STAGED), 2)
    assert run.state(BID) == "candidate", "without blame: it may be tried again"


def test_a_live_version_that_gives_way_to_one_of_other_outputs_takes_the_staged_one_along() -> None:
    run = Run()
    run.seen(BID, manifest(), 1)
    run.passed(BID)
    first = run.live[BID]
    run.seen(BID, manifest(extra='output = "risk"'), 2)
    run.passed(BID)
    live = run.live[BID]
    run.seen(BID, manifest(extra=f'output = "risk"\n{STAGED}'), 3)
    run.passed(BID)
    assert run.snapshot.beside
    assert kinds(run(RollBack(BID, live, "eve", "sales fell", 9))) == [GoLive, Retire, WriteStatus, Retire]
    assert (run.live[BID], run.snapshot.beside, run.state(BID)) == (first, (), "refused")
    assert "its output differ from the live version's" in str(status(run.snapshot, BID)["problems"])
    assert changes(run)[-2:] == [("live", "eve"), ("retired", "auto")]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_restart_goes_on_with_the_stage_it_was_in(stage: int) -> None:
    run, first, second = shadowed()
    for number in range(stage):
        promote(run, second, number)
    before = run.snapshot
    run.snapshot, problems = decode(encode(before), SCHEMA)
    assert problems == ()
    assert run.snapshot.beside == before.beside
    assert run.snapshot.models[BID].history == before.models[BID].history
    assert kinds(run.seen(BID, manifest(extra=STAGED), 2)) == [WriteStatus]
    assert run.state(BID) == ("shadow", "canary")[stage]
    assert run.live[BID] == first
    promote(run, second, stage, to_live=True)
    assert run.live[BID] == second


# --- a cluster ------------------------------------------------------------------------------------------------------


class Cluster:
    """What `CatalogModels` needs of a cluster of one, whose leader it is or is not."""

    name, leads = "one", True

    def __init__(self, made: cluster.Cluster) -> None:
        self.made = made
        self.observed: Mapping[str, bytes] = {}
        self.others: list[Mapping[str, bytes]] = []

    @property
    def catalog(self) -> Catalog:
        return self.made.catalog

    def observations(self) -> Sequence[Mapping[str, bytes]]:
        return [self.observed, *self.others]

    async def propose(self, command: Command) -> None:
        assert self.made.propose(command) == ""

    async def agreed(self) -> Catalog:
        return self.catalog


def staged_pair(name: ModelName = BID) -> cluster.Pair:
    return manifest(extra=STAGED), 2


def clustered() -> tuple[cluster.Cluster, cluster.Node, cluster.Node, str]:
    """Two nodes of a cluster; on the first a staged pair was dropped after a plain one."""
    made = cluster.Cluster()
    one, two = cluster.Node("one", made), cluster.Node("two", made)
    for pair in ((manifest(), 1), staged_pair()):
        one.directory[BID] = pair
        one.look()
        one.try_all()
        one.publish()
        made.roll_out()
        one.hear()
        two.hear()
    return made, one, two, cluster.version_of(BID, staged_pair())


def test_all_nodes_run_the_staged_version_beside_the_live_one() -> None:
    made, one, two, second = clustered()
    for node in (one, two):
        ((beside, _),) = node.snapshot.beside
        assert (beside.version.version, beside.kind) == (second, "shadow")
        assert node.pool[BID] == cluster.version_of(BID, (manifest(), 1))
    assert status(one.snapshot, BID)["state"] == "shadow"
    models = CatalogModels(Cluster(made), ManualClock())
    asyncio.run(models.promote(Promote(BID, second, 0, "auto", "it held", 5)))
    one.hear()
    assert one.snapshot.beside[0][0].kind == "canary"
    assert status(one.snapshot, BID)["state"] == "canary"
    asyncio.run(models.promote(Promote(BID, second, 0, "auto", "it held", 5)))
    assert made.catalog.models[str(BID)].staged is not None, "said twice, done once"
    asyncio.run(models.promote(Promote(BID, second, 1, "eve", "", 6)))
    for node in (one, two):
        node.hear()
        assert (node.pool[BID], node.snapshot.beside) == (second, ())
        assert [(change.to, change.who) for change in node.snapshot.models[BID].history[1:]] == [
            ("shadow", ""),
            ("canary 0.2", "auto"),
            ("live", "eve"),
        ]


def test_models_are_told_anew_only_where_something_of_them_changed() -> None:
    """A takeover changes owners many times in a row: the node that takes over has no time for 2,000 models each."""
    made, _, _, second = clustered()
    models = CatalogModels(Cluster(made), ManualClock())
    told = models.agreed()
    assert made.propose(GrowPartitions(revision=made.revision, count=3)) == ""
    again = models.agreed()
    assert (again.revision, models.told_revision) == (made.revision, made.revision)
    assert again.versions is told.versions
    limits = QuotaLimits(models_max=3)
    held = {"node": "one", "incarnation": 1, "blob": made.catalog.models[str(BID)].versions[second].blob}
    for command in (
        PutTenant(revision=made.revision, name="shop", settings="weight = 2"),
        SetQuota(revision=made.revision + 1, tenant="shop", limits=limits),
        HoldBlob(revision=made.revision + 2, held=False, **held),
        RetireVersion(revision=made.revision + 3, tenant=BID.tenant, model=BID.model, version=second),
    ):
        assert made.propose(command) == ""
        assert models.agreed() == cluster.agreed_models(made.catalog, "one")


def test_a_staged_version_is_rolled_back_on_all_nodes() -> None:
    made, one, two, second = clustered()
    asyncio.run(CatalogModels(Cluster(made), ManualClock()).roll_back(RollBack(BID, second, "eve", "too slow", 5)))
    for node in (one, two):
        node.hear()
        assert node.snapshot.beside == ()
        assert node.pool[BID] == cluster.version_of(BID, (manifest(), 1))
    assert "too slow" in str(status(one.snapshot, BID)["problems"])


def test_putting_back_the_live_pair_at_any_node_takes_the_staged_version_back_on_all() -> None:
    made, one, two, _ = clustered()
    first = cluster.version_of(BID, (manifest(), 1))
    one.directory[BID] = (manifest(), 1)
    cluster.settle(made, [one, two])
    for node in (one, two):
        assert (node.pool[BID], node.snapshot.beside) == (first, ())
        assert node.snapshot.models[BID].history[-1].to == "retired"
    assert status(one.snapshot, BID)["state"] == "live"


def test_a_node_that_can_not_run_a_staged_version_says_so_and_it_is_rolled_back() -> None:
    made, one, _, second = clustered()
    one(VersionFailing(BID, second, "it crashes", 7, at_fault=True))
    one.publish()
    assert one.snapshot.beside == ()
    assert made.catalog.models[str(BID)].versions[second].state == "quarantined"


def test_deleting_the_staged_pair_deletes_the_model_and_not_a_newer_one_of_another_node() -> None:
    made, _, _, second = clustered()
    models = CatalogModels(Cluster(made), ManualClock())
    asyncio.run(models.withdraw(BID, cluster.version_of(BID, (manifest(), 1))))
    assert made.catalog.models[str(BID)].staged is not None, "that version is not the newest"
    asyncio.run(models.withdraw(BID, second))
    assert made.catalog.models == {}


@pytest.mark.parametrize(("others", "state"), [(9, "staged"), (10, "staged"), (15, "quarantined")])
def test_the_leader_judges_by_what_all_nodes_have_seen_and_others_only_tell(others: int, state: str) -> None:
    made, one, two, second = clustered()
    leader, follower = Cluster(made), Cluster(made)
    follower.leads = False
    failed = others if state == "quarantined" else 0

    def judging(at: Cluster, node: cluster.Node, rows: int) -> Judging:
        async def decide(wish: Promote | RollBack) -> None:
            raise AssertionError(wish)

        models = CatalogModels(at, ManualClock())
        return Judging(lambda: node.snapshot, lambda: {second: Figures(0, rows=rows)}, ManualClock(), decide, models)

    asyncio.run(judging(follower, two, others).look())
    assert made.catalog.models[str(BID)].versions[second].stage == 0
    assert follower.observed.keys() == {second}
    leader.others = [{second: msgspec.msgpack.encode(Figures(0, rows=others, errors=failed))}, {second: b"\xc1"}]
    asyncio.run(judging(leader, one, 0).look())
    found = made.catalog.models[str(BID)].versions[second]
    assert (found.state, found.stage) == (state, 1 if others == 10 else 0)
