"""The catalog's reducer: safe to repeat, never raising, and refusing what would break an invariant."""

from __future__ import annotations

import functools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from node.kernel import limits
from node.kernel.errors import BoundExceeded, CatalogCorrupt
from replication.catalog import Catalog, Model, apply, decode_catalog, encode_catalog, problem
from replication.catalog_tables import table_blobs, table_rollout
from replication.commands import (
    CancelMove,
    Command,
    CompleteMove,
    DrainNode,
    FlipTable,
    ForgetTable,
    ForgetVersion,
    GoLive,
    GrowPartitions,
    HoldBlob,
    JoinNode,
    LeaveNode,
    PutFeatures,
    PutTable,
    PutTenant,
    PutVersion,
    QuarantineVersion,
    QuotaLimits,
    RenewLease,
    RetireVersion,
    SetQuota,
    SetSettings,
    SetStandbys,
    Settings,
    StageVersion,
    StartMove,
    TakeOver,
    decode_command,
    encode_command,
)
from tests.unit.table_commands_support import SCHEMAS, TABLE_SHAS, before_the_live, check_tables, table_commands

SHAS = ("a" * 64, "b" * 64, "c" * 64)
nodes = st.sampled_from("nmo")
tenants = st.sampled_from(("t", "u"))
shas = st.sampled_from(SHAS)
partitions = st.integers(0, 2)
epochs = st.integers(0, 3)
standbys = st.lists(nodes, max_size=3).map(tuple)
VERSION: dict[str, st.SearchStrategy[object]] = {"tenant": tenants, "model": st.just("m"), "version": shas}
PARTITION = {"partition": partitions, "epoch": epochs}


@functools.cache
def any_command(revision: int) -> st.SearchStrategy[Command]:
    at = st.sampled_from((revision, revision, revision, max(0, revision - 1), max(0, revision - 3)))
    made: dict[type[Command], dict[str, st.SearchStrategy[object]]] = {
        JoinNode: {"name": nodes, "raft_address": st.just("r"), "http_address": st.just("h"), "rack": st.just("")}
        | {"incarnation": st.integers(1, 2), "at_ms": st.integers(0, 9)},
        LeaveNode: {"name": nodes},
        RenewLease: {"name": nodes, "incarnation": st.integers(1, 2), "number": st.integers(0, 4)},
        DrainNode: {"name": nodes, "draining": st.booleans()},
        PutFeatures: {"tenant": tenants, "text": st.sampled_from(("", "[features]"))},
        PutTenant: {"name": tenants, "settings": st.sampled_from(("", "weight = 2"))},
        PutVersion: {**VERSION, "blob": shas, "manifest": st.just("on = []"), "report": st.sampled_from(("", "{}"))}
        | {"stages": st.sampled_from(((), ("shadow", "canary 0.1")))},
        StageVersion: {**VERSION, "stage": st.integers(0, 2), "who": st.just("auto")}
        | {"holders": st.lists(nodes, min_size=1, max_size=2).map(tuple)},
        GoLive: {**VERSION, "holders": st.lists(nodes, min_size=1, max_size=2).map(tuple)},
        QuarantineVersion: {**VERSION, "fall_back_to": st.sampled_from(("", *SHAS)), "reason": st.just("it crashes")},
        RetireVersion: VERSION,
        ForgetVersion: VERSION,
        HoldBlob: {"node": nodes, "incarnation": st.integers(1, 2), "blob": shas, "held": st.booleans()},
        SetSettings: {"settings": st.builds(Settings, standby_count=st.integers(0, 2), moves_max=st.integers(1, 2))},
        SetQuota: {
            "tenant": tenants,
            "limits": st.builds(
                QuotaLimits,
                weight=st.sampled_from((None, 1.0, 4.0)),
                models_max=st.sampled_from((None, 0, 1)),
                rows_s_max=st.sampled_from((None, 5.0)),
            ),
        },
        GrowPartitions: {"count": st.integers(1, 3)},
        TakeOver: {**PARTITION, "to": nodes, "lease": st.integers(0, 4)},
        SetStandbys: {**PARTITION, "standbys": standbys},
        StartMove: {**PARTITION, "to": nodes},
        CancelMove: {**PARTITION, "to": nodes},
        CompleteMove: {**PARTITION, "to": nodes},
    }
    return st.one_of([st.builds(kind, revision=at, **fields) for kind, fields in made.items()])


def whole() -> Catalog:
    """Two nodes, three partitions of `n` with standby `m`, one live model and one live table."""
    catalog = Catalog()
    commands: list[Command] = [join(0, "n"), join(0, "m"), GrowPartitions(revision=0, count=3)]
    commands += [PutTenant(revision=9, name="t", settings=""), version(9, SHAS[0])]
    commands += [TakeOver(revision=9, partition=p, epoch=0, to="n") for p in range(3)]
    commands += [SetStandbys(revision=99, partition=p, epoch=1, standbys=("m",)) for p in range(3)]
    commands += [HoldBlob(revision=99, node="n", incarnation=1, blob=SHAS[0], held=True)]
    commands += [GoLive(revision=99, tenant="t", model="m", version=SHAS[0], holders=("n",))]
    commands += [put_table(99, TABLE_SHAS[0])]
    commands += [HoldBlob(revision=99, node="n", incarnation=1, blob=TABLE_SHAS[0], held=True)]
    commands += [FlipTable(revision=99, name="prices", version=TABLE_SHAS[0], holders=("n",))]
    for command in commands:
        assert problem(catalog, command) == ""
        catalog = apply(catalog, command)
    return catalog


def join(revision: int, name: str, incarnation: int = 1) -> JoinNode:
    return JoinNode(revision=revision, name=name, raft_address="r", http_address="h", incarnation=incarnation)


def version(revision: int, sha: str) -> PutVersion:
    return PutVersion(revision=revision, tenant="t", model="m", version=sha, blob=sha, manifest="x")


def put_table(revision: int, sha: str) -> PutTable:
    return PutTable(revision=revision, name="prices", version=sha, schema=SCHEMAS[0], rows=1, bytes=1)


WHOLE = whole()


@st.composite
def histories(draw: st.DrawFn) -> tuple[Catalog, list[Command]]:
    """Either of everything but tables, or mostly of tables: drawn alike they would make each other rare."""
    catalog, commands, tables = WHOLE, [], draw(st.booleans())
    for _ in range(draw(st.integers(8, 20) if tables else st.integers(1, 12))):
        of_tables = tables and draw(st.integers(0, 4))
        more = table_commands(draw, catalog) if of_tables else [draw(any_command(catalog.revision))]
        catalog = functools.reduce(apply, more, catalog)
        commands += more
    return catalog, commands


def bare(catalog: Catalog) -> Catalog:
    return replace(catalog, refusals=())


@given(histories())
@settings(max_examples=600, deadline=None)
def test_every_late_repetition_changes_nothing_but_refusals(history: tuple[Catalog, list[Command]]) -> None:
    end, commands = history
    for command in commands:
        assert bare(apply(end, command)) == bare(end) or not was_applied(commands, command)


def was_applied(commands: list[Command], wanted: Command) -> bool:
    """Whether the command took effect where it stood; one refused there may well be right later on."""
    catalog = WHOLE
    for command in commands:
        after = apply(catalog, command)
        if command is wanted:
            return bare(after) != bare(catalog)
        catalog = after
    raise AssertionError("not among the commands")


@given(histories())
@settings(max_examples=600, deadline=None)
def test_invariants_of_every_step(history: tuple[Catalog, list[Command]]) -> None:
    before = WHOLE
    for command in history[1]:
        reason = problem(before, command)
        after = apply(before, command)
        assert apply(after, command) is after, "at once again: the same catalog"
        if reason:
            assert bare(after) == bare(before)
            assert any(refusal.reason == reason for refusal in after.refusals)
        check_step(before, after)
        check_tables(before, command, after)
        before = after


def check_step(before: Catalog, after: Catalog) -> None:
    assert after.revision - before.revision in (0, 1)
    assert sum(held.move is not None for held in after.partitions) <= max(
        after.settings.moves_max, sum(held.move is not None for held in before.partitions)
    )
    for old, new in zip(before.partitions, after.partitions, strict=False):
        assert new.epoch == old.epoch + (new.owner != old.owner)
        assert new.owner in after.nodes
        assert set(new.standbys) <= after.nodes.keys() - {new.owner}
        assert new.move is None or (new.move.to in new.standbys and new.move.source == new.owner)
        assert old.move is None or new.move is None or old.move == new.move
    for model in after.models.values():
        live = [version.version for version in model.versions.values() if version.state == "live"]
        assert live == ([model.live] if model.live else [])
        waiting = [version.revision for version in model.versions.values() if version.state == "passed"]
        assert len(waiting) <= 1
        assert not live or not waiting or waiting[0] > model.versions[model.live].revision
        staged = [version for version in model.versions.values() if version.state == "staged"]
        assert len(staged) <= (1 if model.live else 0)
        assert all(one.stage < len(one.stages) for one in staged)
        _check_history(before.models.get(f"{model.tenant}/{model.model}"), model)
        put = [version.revision for version in model.versions.values()]
        assert len(set(put)) == len(put)
    texts = [t.settings + t.features for t in after.tenants.values()]
    texts += [v.manifest + v.report for m in after.models.values() for v in m.versions.values()]
    assert after.text_bytes == sum(map(len, texts))
    files = {v.blob for m in after.models.values() for v in m.versions.values()}
    assert files | {version for table in after.tables.values() for version in table.versions} == set(after.holders)
    assert all(set(held) <= after.nodes.keys() for held in after.holders.values())
    assert len(after.refusals) <= limits.REFUSALS_KEPT_MAX


@given(histories())
@settings(max_examples=200, deadline=None)
def test_bytes_give_the_same_catalog_and_commands(history: tuple[Catalog, list[Command]]) -> None:
    end, commands = history
    assert decode_catalog(encode_catalog(end)) == end
    assert encode_catalog(decode_catalog(encode_catalog(end))) == encode_catalog(end)
    assert [decode_command(encode_command(command)) for command in commands] == commands


@given(histories(), st.integers(0, 20))
@settings(max_examples=200, deadline=None)
def test_a_node_that_got_a_dump_comes_to_the_same_catalog(history: tuple[Catalog, list[Command]], at: int) -> None:
    end, commands = history
    catalog = WHOLE
    for place, command in enumerate(commands):
        if place == at:
            catalog = decode_catalog(encode_catalog(catalog))
        catalog = apply(catalog, decode_command(encode_command(command)))
    assert catalog == end


def test_a_quota_names_only_what_it_limits_so_that_a_node_with_fewer_limits_can_read_it() -> None:
    command = SetQuota(revision=1, tenant="t", limits=QuotaLimits(weight=2.0), who="eve", at_ms=7)
    assert msgspec.msgpack.decode(encode_command(command))["limits"] == {"weight": 2.0}
    assert decode_command(encode_command(command)) == command


def test_of_several_versions_that_wait_to_be_the_first_the_same_one_counts_after_a_dump() -> None:
    catalog = WHOLE
    for sha, schema in zip(("e" * 64, "d" * 64), SCHEMAS, strict=True):
        catalog = apply(catalog, replace(put_table(catalog.revision, sha), name="shops", schema=schema))
    assert not catalog.tables["shops"].live
    dumped = decode_catalog(encode_catalog(catalog))
    for schema in SCHEMAS:
        third = replace(put_table(catalog.revision, "f" * 64), name="shops", schema=schema)
        assert apply(catalog, third) == apply(dumped, third)


@given(histories(), st.sets(nodes))
@settings(max_examples=400, deadline=None)
def test_what_a_leader_proposes_for_tables_is_valid_and_comes_to_an_end(
    history: tuple[Catalog, list[Command]], alive: set[str]
) -> None:
    """Whatever has happened, and whichever nodes live: what they all have flips, and nothing is left to be done."""
    catalog, members = history[0], tuple(sorted(alive & history[0].nodes.keys()))
    for name in members:
        for blob in sorted(table_blobs(catalog)):
            incarnation = catalog.nodes[name].incarnation
            held = HoldBlob(revision=catalog.revision, node=name, incarnation=incarnation, blob=blob, held=True)
            catalog = apply(catalog, held)
    wishes = {name: table.passed.version for name, table in catalog.tables.items() if table.passed is not None}
    for _ in range(16):
        for command in table_rollout(catalog, members):
            assert problem(catalog, command) == ""
            if isinstance(command, ForgetTable):
                assert command.version != before_the_live(catalog.tables[command.name]), "it stays for a rollback"
            after = apply(catalog, command)
            check_step(catalog, after)
            check_tables(catalog, command, after)
            catalog = after
    assert table_rollout(catalog, members) == []
    for name, table in catalog.tables.items():
        assert not members or name not in wishes or table.live == wishes[name]
        assert len(table.versions) <= limits.TABLE_VERSIONS_RETIRED_MAX + 2


@given(histories(), st.sets(nodes, min_size=1))
@settings(max_examples=200, deadline=None)
def test_nothing_flips_that_a_living_node_lacks(history: tuple[Catalog, list[Command]], alive: set[str]) -> None:
    catalog, members = history[0], tuple(sorted(alive & history[0].nodes.keys()))
    for command in table_rollout(catalog, members):
        if isinstance(command, FlipTable):
            assert members
            assert all(name in catalog.holders[command.version] for name in members)
            assert catalog.tables[command.name].versions[command.version].state == "passed"


def test_the_version_before_stays_though_a_wish_for_it_was_replaced() -> None:
    catalog = apply(WHOLE, put_table(WHOLE.revision, TABLE_SHAS[1]))
    held = HoldBlob(revision=catalog.revision, node="n", incarnation=1, blob=TABLE_SHAS[1], held=True)
    catalog = apply(catalog, held)
    catalog = functools.reduce(apply, table_rollout(catalog, ("n",)), catalog)
    for sha in (TABLE_SHAS[0], TABLE_SHAS[2]):
        catalog = apply(catalog, put_table(catalog.revision, sha))
    table = catalog.tables["prices"]
    assert (table.live, before_the_live(table)) == (TABLE_SHAS[1], TABLE_SHAS[0])
    assert table_rollout(catalog, ("n",)) == []


def test_a_takeover_is_refused_once_the_silent_owner_was_heard_of() -> None:
    catalog = apply(WHOLE, RenewLease(revision=WHOLE.revision, name="n", incarnation=1, number=7))
    late = TakeOver(revision=catalog.revision, partition=0, epoch=1, to="m", lease=0)
    assert "renewed" in problem(catalog, late)
    assert apply(catalog, late).partitions == WHOLE.partitions
    assert apply(catalog, replace(late, lease=7)).partitions[0].owner == "m"


def test_a_lease_renewed_before_its_node_left_is_not_set_again_when_it_is_back() -> None:
    late = RenewLease(revision=WHOLE.revision, name="m", incarnation=1, number=7)
    catalog = apply(WHOLE, late)
    for partition in range(3):
        standbys = SetStandbys(revision=catalog.revision, partition=partition, epoch=1, standbys=())
        catalog = apply(catalog, standbys)
    catalog = apply(catalog, LeaveNode(revision=catalog.revision, name="m"))
    assert "m" not in catalog.nodes
    catalog = apply(catalog, join(catalog.revision, "m"))
    assert "m" not in apply(catalog, late).leases
    drained = apply(catalog, DrainNode(revision=catalog.revision, name="m", draining=True))
    assert apply(drained, replace(late, revision=catalog.revision)).leases["m"] == 7, "it stayed, whatever else changed"


def test_the_old_owner_becomes_the_standby() -> None:
    catalog = apply(WHOLE, StartMove(revision=WHOLE.revision, partition=1, epoch=1, to="m"))
    moved = apply(catalog, CompleteMove(revision=catalog.revision, partition=1, epoch=1, to="m")).partitions[1]
    assert (moved.owner, moved.epoch, moved.standbys, moved.move) == ("m", 2, ("n",), None)


def test_a_release_for_a_cancelled_move_does_not_complete_the_next() -> None:
    first = apply(WHOLE, StartMove(revision=WHOLE.revision, partition=1, epoch=1, to="m"))
    release = CompleteMove(revision=first.revision, partition=1, epoch=1, to="m")
    again = apply(first, CancelMove(revision=first.revision, partition=1, epoch=1, to="m"))
    again = apply(again, StartMove(revision=again.revision, partition=1, epoch=1, to="m"))
    assert apply(again, release).partitions[1].owner == "n"


def test_a_version_goes_live_only_where_the_holders_have_it() -> None:
    catalog = apply(WHOLE, version(WHOLE.revision, SHAS[1]))
    live = GoLive(revision=catalog.revision, tenant="t", model="m", version=SHAS[1], holders=("n", "m"))
    assert "lack" in problem(catalog, live)
    for name in "nm":
        held = HoldBlob(revision=catalog.revision, node=name, incarnation=1, blob=SHAS[1], held=True)
        catalog = apply(catalog, held)
    model = apply(catalog, live).models["t/m"]
    assert (model.live, model.versions[SHAS[0]].state) == (SHAS[1], "retired")
    assert model.live_revision == catalog.revision + 1


def test_a_version_put_again_is_the_newest_wish() -> None:
    put = [version(WHOLE.revision, SHAS[0]), version(WHOLE.revision, SHAS[1])]
    assert apply(WHOLE, put[0]) is WHOLE, "it is live already"
    catalog = apply(WHOLE, put[1])
    assert "decide anew" in problem(catalog, put[0]), "an old wish repeated late"
    back = apply(catalog, replace(put[0], revision=catalog.revision, report="{}"))
    assert states(back) == ["live", "retired"]
    assert back.models["t/m"].versions[SHAS[0]].report == "{}"
    again = apply(back, replace(put[1], revision=back.revision))
    assert states(again) == ["live", "passed"]
    assert states(apply(again, version(again.revision, SHAS[2]))) == ["live", "retired", "passed"]


def live(catalog: Catalog, sha: str) -> GoLive:
    return GoLive(revision=catalog.revision, tenant="t", model="m", version=sha, holders=("n",), who="eve")


def quarantine(catalog: Catalog, sha: str, fall_back_to: str = "") -> QuarantineVersion:
    return QuarantineVersion(revision=catalog.revision, tenant="t", model="m", version=sha, fall_back_to=fall_back_to)


def test_a_quarantined_live_version_gives_way_to_the_one_before() -> None:
    catalog = apply(WHOLE, version(WHOLE.revision, SHAS[1]))
    catalog = apply(catalog, HoldBlob(revision=catalog.revision, node="n", incarnation=1, blob=SHAS[1], held=True))
    second = apply(catalog, live(catalog, SHAS[1]))
    assert (states(second), second.models["t/m"].versions[SHAS[1]].who) == (["retired", "live"], "eve")
    assert "never live" in problem(second, quarantine(second, SHAS[1], SHAS[2]))
    back = apply(second, quarantine(second, SHAS[1], SHAS[0]))
    assert (states(back), back.models["t/m"].live) == (["live", "quarantined"], SHAS[0])
    assert back.models["t/m"].fallback is None, "a quarantined version is never fallen back to"
    assert "decide anew" in problem(back, quarantine(second, SHAS[0])), "what it was decided on has changed"
    none = apply(back, quarantine(back, SHAS[0]))
    assert (states(none), none.models["t/m"].live) == (["quarantined", "quarantined"], "")
    wished = apply(none, version(none.revision, SHAS[1]))
    assert states(wished) == ["quarantined", "passed"], "a new wish may try it again"


def _check_history(before: Model | None, after: Model) -> None:
    """Whatever begins to run, or to be staged, is told, with who did it."""
    was = {} if before is None else before.versions
    told = [(one.version, one.to) for one in after.history]
    assert len(told) <= limits.STAGE_HISTORY_MAX
    for version in after.versions.values():
        old = was.get(version.version)
        if version.state == "live" and (old is None or old.state != "live"):
            assert told[-1] == (version.version, "live")
        if version.state == "staged" and (old is None or (old.state, old.stage) != ("staged", version.stage)):
            assert told[-1] == (version.version, version.stages[version.stage])
        if version.state == "quarantined" and old is not None and old.state in ("live", "staged"):
            assert (version.version, "quarantined") in told[-2:]


def staged() -> Catalog:
    """The first version live, the second in the first of two stages beside it; node n has both files."""
    put = replace(version(WHOLE.revision, SHAS[1]), stages=("shadow", "canary 0.1"))
    catalog = apply(WHOLE, put)
    catalog = apply(catalog, HoldBlob(revision=catalog.revision, node="n", incarnation=1, blob=SHAS[1], held=True))
    return apply(catalog, stage(catalog, SHAS[1], 0))


def stage(catalog: Catalog, sha: str, number: int) -> StageVersion:
    return StageVersion(
        revision=catalog.revision, tenant="t", model="m", version=sha, stage=number, holders=("n",), who="auto"
    )


def test_a_version_is_staged_beside_the_live_one_and_promoted() -> None:
    shadow = staged()
    assert states(shadow) == ["live", "staged"]
    assert shadow.models["t/m"].live_revision == WHOLE.models["t/m"].live_revision, "what is live did not change"
    canary = apply(shadow, stage(shadow, SHAS[1], 1))
    assert canary.models["t/m"].versions[SHAS[1]].stage == 1
    assert apply(canary, stage(shadow, SHAS[1], 0)).models == canary.models, "late and repeated: no way back"
    assert apply(canary, stage(canary, SHAS[1], 0)).models == canary.models, "nor by who knows the newest"
    assert "2 stages" in problem(canary, stage(canary, SHAS[1], 2))
    newer = apply(canary, version(canary.revision, SHAS[2]))
    promoted = apply(newer, live(newer, SHAS[1]))
    assert states(promoted) == ["retired", "live", "passed"], "a newer wish waits on"
    assert [(one.to, one.who) for one in promoted.models["t/m"].history[1:]] == [
        ("shadow", "auto"),
        ("canary 0.1", "auto"),
        ("live", "eve"),
    ]


def test_a_version_can_be_staged_only_beside_a_live_one_of_which_nodes_have_the_file() -> None:
    shadow = staged()
    assert "beside another" in problem(shadow, stage(shadow, SHAS[0], 0))
    lost = apply(shadow, HoldBlob(revision=shadow.revision, node="n", incarnation=1, blob=SHAS[1], held=False))
    assert "lack" in problem(lost, stage(lost, SHAS[1], 1))
    third = apply(shadow, replace(version(shadow.revision, SHAS[2]), stages=("shadow",)))
    third = apply(third, HoldBlob(revision=third.revision, node="n", incarnation=1, blob=SHAS[2], held=True))
    assert states(apply(third, stage(third, SHAS[2], 0))) == ["live", "retired", "staged"], "one at a time"


def test_a_staged_version_is_rolled_back_and_the_live_one_never_stops() -> None:
    shadow = staged()
    back = apply(shadow, quarantine(shadow, SHAS[1]))
    assert states(back) == ["live", "quarantined"]
    assert back.models["t/m"].live_revision == WHOLE.models["t/m"].live_revision
    assert back.models["t/m"].history[-1].to == "quarantined"


def states(catalog: Catalog) -> list[str]:
    versions = catalog.models["t/m"].versions
    return [versions[sha].state for sha in SHAS if sha in versions]


def test_a_lost_disk_no_longer_holds_a_file() -> None:
    catalog = apply(WHOLE, join(WHOLE.revision, "n", incarnation=2))
    assert catalog.holders == {SHAS[0]: {}, TABLE_SHAS[0]: {}}
    late = HoldBlob(revision=WHOLE.revision, node="n", incarnation=1, blob=SHAS[0], held=True)
    assert apply(catalog, late).holders[SHAS[0]] == {}


def test_a_node_that_left_does_not_come_back_by_a_late_command() -> None:
    catalog = WHOLE
    for command in (join(WHOLE.revision, "o"), LeaveNode(revision=WHOLE.revision + 1, name="o")):
        catalog = apply(catalog, command)
    assert "o" not in apply(catalog, join(WHOLE.revision, "o")).nodes
    assert "o" in apply(catalog, join(catalog.revision, "o")).nodes


def test_an_owner_may_not_leave_and_the_lease_may_not_change_under_it() -> None:
    assert "drain" in problem(WHOLE, LeaveNode(revision=WHOLE.revision, name="n"))
    changed = SetSettings(revision=WHOLE.revision, settings=Settings(lease_ms=9000))
    assert "lease_ms" in problem(WHOLE, changed)


def test_the_first_settings_count_as_agreed_though_they_are_the_defaults() -> None:
    founded = apply(Catalog(), SetSettings(revision=0, settings=Settings()))
    assert founded.settings_revision > 0
    assert apply(founded, SetSettings(revision=founded.revision, settings=Settings())) is founded
    assert problem(founded, SetSettings(revision=0, settings=Settings(standby_count=0)))


@pytest.mark.parametrize("encoded", [b"", b"\xc1", msgspec.msgpack.encode({"do": "nothing"}), b"\x93\x01\x02\x03"])
def test_damaged_bytes_are_told(encoded: bytes) -> None:
    with pytest.raises(CatalogCorrupt):
        decode_command(encoded)
    with pytest.raises(CatalogCorrupt):
        decode_catalog(encoded or b"\xc1")


def test_bounds_of_commands_are_kept() -> None:
    with pytest.raises(BoundExceeded):
        encode_command(PutTenant(revision=0, name="t", settings="x" * limits.COMMAND_BYTES_MAX))
    long = encode_command(LeaveNode(revision=0, name="n" * (limits.NAME_BYTES_MAX + 1)))
    with pytest.raises(CatalogCorrupt):
        decode_command(long)
    with pytest.raises(CatalogCorrupt):
        decode_catalog(encode_catalog(Catalog(format=2)))


def test_refusals_are_bounded() -> None:
    catalog = Catalog()
    for place in range(limits.REFUSALS_KEPT_MAX + 9):
        catalog = apply(catalog, DrainNode(revision=0, name=f"n{place}", draining=True))
    assert len(catalog.refusals) == limits.REFUSALS_KEPT_MAX
    assert "n72" in catalog.refusals[-1].command


def quota(catalog: Catalog, revision: int, **limits_set: float) -> Catalog:
    return apply(catalog, SetQuota(revision=revision, tenant="t", limits=QuotaLimits(**limits_set), who="eve", at_ms=7))


def test_a_quota_is_set_changed_and_dropped_and_a_late_command_does_not_bring_it_back() -> None:
    start = WHOLE.revision
    one = quota(WHOLE, start, weight=4.0)
    assert (one.quotas["t"].limits.weight, one.quotas["t"].who) == (4.0, "eve")
    assert quota(one, start, weight=4.0) is one
    assert quota(one, start, weight=2.0).quotas == one.quotas, "decided on an older catalog"
    other = quota(one, one.revision, weight=2.0)
    dropped = quota(other, other.revision)
    assert dropped.quotas == {}
    assert quota(dropped, start, weight=4.0).quotas == {}, "older than the last removal"


def test_a_model_over_the_quota_is_refused_and_a_new_version_is_not() -> None:
    full = quota(WHOLE, WHOLE.revision, models_max=1)
    more = PutVersion(revision=full.revision, tenant="t", model="late", version=SHAS[1], blob=SHAS[1], manifest="x")
    assert "has 1 models and its quota models_max is 1" in problem(full, more)
    assert problem(full, version(full.revision, SHAS[1])) == ""
    assert problem(quota(full, full.revision, models_max=2), more) == ""
