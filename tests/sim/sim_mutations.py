"""Mistakes made on purpose, one at a time, in a core or in how a node uses it: each must break an invariant soon."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import sim_models
import sim_node
import sim_session
from sim_broker import PartitionLog, Transaction
from sim_checks import InvariantBroken
from sim_node import SimNode
from sim_session import Replica, Session
from sim_table_mutations import TABLE_MISTAKES
from sim_world import World, simulate

from replication import catalog as catalog_module
from replication import catalog_models, ownership
from replication import rollout as rollout_module
from replication.catalog import Assignment, Catalog, Version
from replication.catalog_machine import Ending
from replication.commands import CompleteMove, GoLive, RenewLease, StartMove, TakeOver
from replication.frame import FrameAssembler
from replication.ownership import Reports


@dataclass(frozen=True, slots=True)
class Mutation:
    """`mistakes` are (what has it, name, what it is instead)."""

    name: str
    what: str
    mistakes: tuple[tuple[Any, str, Any], ...]

    @contextmanager
    def made(self) -> Iterator[None]:
        right = [(where, name, _get(where, name)) for where, name, _ in self.mistakes]
        try:
            for where, name, wrong in self.mistakes:
                _set(where, name, wrong)
            yield
        finally:
            for where, name, value in right:
                _set(where, name, value)


def _get(where: Any, name: Any) -> Any:
    return where[name] if isinstance(where, dict) else getattr(where, name)


def _set(where: Any, name: Any, value: Any) -> None:
    if isinstance(where, dict):
        where[name] = value
    else:
        setattr(where, name, value)


def _always(value: Any) -> Callable[..., Any]:
    return lambda *_arguments, **_named: value


# the catalog


def _take_over_of_the_living(catalog: Catalog, command: TakeOver) -> Catalog | str:
    """Whatever the owner's lease."""
    named = TakeOver(
        revision=command.revision,
        partition=command.partition,
        epoch=command.epoch,
        to=command.to,
        lease=catalog.leases.get(catalog.partitions[command.partition].owner, 0),
    )
    return catalog_module._take_over(catalog, named)


_with_owner = catalog_module._with_owner


def _same_epoch(catalog: Catalog, partition: int, to: str) -> Catalog:
    after = _with_owner(catalog, partition, to)
    return catalog_module._assign(after, partition, epoch=catalog.partitions[partition].epoch)


def _owner_stays_standby(catalog: Catalog, partition: int, to: str) -> Catalog:
    standbys = catalog.partitions[partition].standbys
    return catalog_module._assign(_with_owner(catalog, partition, to), partition, standbys=standbys)


def _start_another_move(catalog: Catalog, command: StartMove) -> Catalog:
    held = catalog.partitions[command.partition]
    return catalog_module._assign(
        catalog, command.partition, move=catalog_module.Move(held.owner, command.to, command.why, command.at_ms)
    )


def _complete_any_move(catalog: Catalog, command: CompleteMove) -> Catalog | str:
    """Also one that was cancelled since, or is another."""
    if command.partition >= len(catalog.partitions) or catalog.partitions[command.partition].owner == command.to:
        return catalog
    return _with_owner(catalog, command.partition, command.to)


def _renew_by_any_number(catalog: Catalog, command: RenewLease) -> Catalog:
    return catalog_module.replace(catalog, leases={**catalog.leases, command.name: command.number})


# the plan


def _said_anything(progress: ownership.Progress | None, _settings: ownership.PlanSettings) -> bool:
    return progress is not None


def _complete_at_once(planner: ownership._Planner) -> None:
    """Before the owner has released."""
    for partition, held in planner.undecided():
        if held.move is not None:
            planner.commands[partition] = CompleteMove(
                revision=planner.catalog.revision, partition=partition, epoch=held.epoch, to=held.move.to
            )


_plan = ownership.plan


def _plan_again_and_again(
    catalog: Catalog, reports: Reports, now_ms: int, settings: ownership.PlanSettings
) -> list[Any]:
    many = catalog_module.replace(catalog, settings=catalog_module.replace(catalog.settings, moves_max=64))
    return _plan(many, reports, now_ms, settings)


# the lease


def _renewed_unheard(node: SimNode, name: str, number: int) -> None:
    """Only reports count as signs of life."""
    before = dict(node.heard)
    _renewed(node, name, number)
    node.heard = before


def _lease_from_its_return(node: SimNode, name: str, number: int) -> None:
    if name == node.name:
        node.pending[number] = node.local_ms
    _renewed(node, name, number)


_renewed = SimNode._renewed


def _lease_for_ever(_now_ms: float, last_quorum_ms: float | None, _lease_ms: int) -> bool:
    return last_quorum_ms is not None


# processes that end


def _ended_whoever_renewed_since(ending: Ending | None, *_of_what: object) -> bool:
    return ending is not None


def _ended_when_paused(world: World, what: str, *nodes: SimNode) -> None:
    _fault(world, what, *nodes)
    if what == "pause":
        for node in nodes:
            world._tell_near(node, lambda other, name=node.name: other.saw_end(name))


_fault = World._fault


# incarnations


def _hear_of_any_disk(node: SimNode, name: str, told: sim_node.Told) -> None:
    node.heard[name] = node.local_ms
    node.told[name] = sim_node.Told(node.disk.incarnation, told.number, told.partitions, told.verified, node.local_ms)


# the changelog


def _cut_behind_the_furthest(verified: Mapping[str, int], _needed: object, _holders_min: int) -> int:
    return max(verified.values(), default=0)


def _cut_behind_the_needed(verified: Mapping[str, int], needed: Any, _holders_min: int) -> int:
    return max(needed, default=0) if verified else 0


def _read_uncommitted(log: PartitionLog, position: int, frames_max: int) -> list[tuple[int, bytes]]:
    found = _read(log, position, frames_max)
    if log.open is not None and position <= log.open_at and (not found or found[-1][0] < log.open_at):
        found += [(log.open_at + place, record) for place, record in enumerate(log.open.records)]
    return found


_read = PartitionLog.read


def _add_and_forget(assembler: FrameAssembler, record: bytes | None) -> Any:
    """A frame of many parts loses its first rows."""
    frame = _add(assembler, record)
    if frame is None or len(frame.customers) < 3:
        return frame
    return sim_session.Frame(frame.progress, frame.layout_id, frame.customers[1:], frame.rows[1:])


_add = FrameAssembler.add


# promotion and fencing


def _commit_whoever(log: PartitionLog, _producer_epoch: int) -> int | None:
    return _commit(log, log.producer_epoch)


def _send_whoever(log: PartitionLog, _producer_epoch: int, transaction: Transaction) -> bool:
    return _send(log, log.producer_epoch, transaction)


_commit, _send = PartitionLog.commit, PartitionLog.send


def _serve_unfolded(replica: Replica, session: Session, producer_epoch: int) -> None:
    _inited(replica, session, producer_epoch)
    if session is replica.session and replica.store.changelog_offset() >= replica.log.start:
        session.step = "serve"


_inited = Replica._inited


def _serve_at_once(replica: Replica, session: Session, producer_epoch: int) -> None:
    _inited(replica, session, producer_epoch)
    if session is replica.session:
        session.step = "serve"


def _fold_then_fence(replica: Replica, session: Session) -> None:
    if session.asked_ms is not None or replica.fold(sim_session.FRAMES_PER_STEP):
        _start(replica, session)


_start = Replica._start


def _answered_is_committed(replica: Replica, session: Session, after: int | None) -> None:
    """An outcome that is not known, or a fence, taken for success."""
    if session is replica.session and after is None and session.pending is not None:
        after = replica.log.end
    _committed(replica, session, after)


_committed = Replica._committed


def _go_on_while_moving(node: SimNode, replica: Replica, held: Assignment) -> None:
    """The owner says that it has released, and goes on."""
    replica.released_revision = held.revision
    replica.own(held.epoch)


# models


def _live_whoever_has_it(catalog: Catalog, command: GoLive) -> Catalog | str:
    """Without a look at who has the file."""
    some = catalog_module.replace(catalog, holders=dict.fromkeys(catalog.holders, dict.fromkeys(command.holders, 0)))
    after = catalog_models._go_live(some, command)
    return after if isinstance(after, str) or after is some else catalog_module.replace(after, holders=catalog.holders)


def _live_though_stale(catalog: Catalog, command: GoLive) -> Catalog | str:
    """Also when another version was put since."""
    fresh = msgspec.structs.replace(command, revision=catalog.revision)
    return catalog_models._go_live(catalog, fresh)


def _keep_what_waits(versions: Mapping[str, Version], _who: str, _at_ms: int) -> dict[str, Version]:
    return dict(versions)


def _everything_newest(catalog: Catalog, members: tuple[str, ...]) -> Iterator[Any]:
    """Goes live wherever the file is, and whether or not it was taken back or replaced."""
    for model in catalog.models.values():
        for version in model.versions.values():
            if version.state != "live" and members and catalog.holders[version.blob].keys() >= set(members):
                yield rollout_module._begin(catalog, model, version, members)
                break


CATALOG = catalog_module._HANDLERS

MUTATIONS = (
    Mutation("epoch", "a new owner keeps the old epoch", ((catalog_module, "_with_owner", _same_epoch),)),
    Mutation(
        "lease not compared",
        "a takeover of an owner that has renewed since",
        ((CATALOG, TakeOver, _take_over_of_the_living),),
    ),
    Mutation(
        "owner twice", "the new owner stays its own standby", ((catalog_module, "_with_owner", _owner_stays_standby),)
    ),
    Mutation("two moves of one", "a move replaces another", ((CATALOG, StartMove, _start_another_move),)),
    Mutation("late completion", "a move completes that was cancelled", ((CATALOG, CompleteMove, _complete_any_move),)),
    Mutation(
        "stale commands",
        "a command decided on old facts counts",
        ((catalog_module, "_stale", _always("")), (catalog_models, "_stale", _always(""))),
    ),
    Mutation("lease runs back", "an old renewal counts again", ((CATALOG, RenewLease, _renew_by_any_number),)),
    Mutation("takeover too early", "half the lease is waited", ((ownership, "takeover_wait_ms", _always(500)),)),
    Mutation("renewals unheard", "only reports count as signs of life", ((SimNode, "_renewed", _renewed_unheard),)),
    Mutation("any standby", "every standby counts as caught up", ((ownership, "caught_up", _said_anything),)),
    Mutation(
        "untried models",
        "a partition moves to a node that can't open it yet",
        ((ownership._Planner, "ready", ownership._Planner.complete),),
    ),
    Mutation("moves without bound", "more moves than moves_max", ((sim_node, "plan", _plan_again_and_again),)),
    Mutation(
        "no release", "a move completes under its owner", ((ownership._Planner, "attend_moves", _complete_at_once),)
    ),
    Mutation("owner won't let go", "it says released and goes on", ((SimNode, "_release", _go_on_while_moving),)),
    Mutation(
        "lease from its return", "not from when it was proposed", ((SimNode, "_renewed", _lease_from_its_return),)
    ),
    Mutation("lease for ever", "an owner cut off goes on", ((sim_node, "may_own", _lease_for_ever),)),
    Mutation(
        "ended for ever",
        "an ending counts of the next process too",
        ((sim_node, "has_ended", _ended_whoever_renewed_since),),
    ),
    Mutation("ended when silent", "a stopped process counts as ended", ((World, "_fault", _ended_when_paused),)),
    Mutation("any disk", "what a lost disk had still counts", ((SimNode, "hear", _hear_of_any_disk),)),
    Mutation("cut too far", "behind the furthest snapshot", ((sim_node, "cut_offset", _cut_behind_the_furthest),)),
    Mutation("cut unverified", "behind what stores have", ((sim_node, "cut_offset", _cut_behind_the_needed),)),
    Mutation(
        "copy deleted early", "though the changelog was cut behind it", ((sim_node, "may_forget", _always(True)),)
    ),
    Mutation("read uncommitted", "a standby folds open frames", ((PartitionLog, "read", _read_uncommitted),)),
    Mutation("rows lost", "the assembler drops a row", ((FrameAssembler, "add", _add_and_forget),)),
    Mutation(
        "no fence",
        "the broker takes what a fenced producer sends",
        ((PartitionLog, "commit", _commit_whoever), (PartitionLog, "send", _send_whoever)),
    ),
    Mutation(
        "live without file",
        "the leader asks one node only, the catalog none",
        ((CATALOG, GoLive, _live_whoever_has_it), (sim_models, "living", lambda *_: frozenset("a"))),
    ),
    Mutation("live though replaced", "an older version goes live late", ((CATALOG, GoLive, _live_though_stale),)),
    Mutation(
        "many wait", "what waited stays when a newer is put", ((catalog_models, "_without_passed", _keep_what_waits),)
    ),
    Mutation("old versions too", "the leader takes any version", ((rollout_module, "_commands", _everything_newest),)),
    Mutation("no fold", "a new owner serves before the tail is folded", ((Replica, "_inited", _serve_unfolded),)),
    Mutation(
        "fold, then fence",
        "the tail is folded before the fence",
        ((Replica, "_start", _fold_then_fence), (Replica, "_inited", _serve_at_once)),
    ),
    Mutation("unknown is done", "a failed commit counts as done", ((Replica, "_committed", _answered_is_committed),)),
    *(Mutation(name, what, mistakes) for name, what, mistakes in TABLE_MISTAKES),
)


def seeds_until_caught(mutation: Mutation, steps: int, seeds_max: int) -> tuple[int, str] | None:
    """How many seeds it takes, and what breaks; None: nothing does. A mistake that can't be made raises."""
    with mutation.made():
        for seed in range(seeds_max):
            try:
                simulate(seed, steps)
            except InvariantBroken as broken:
                return seed + 1, str(broken).partition("\n")[0]
    return None
