"""(P) The cluster's agreed record, and the commands that change it.

The catalog is a value; `apply` gives the next one. It is the same on every node at the same place of the Raft log,
never raises, and a command that is invalid there changes nothing but the list of refusals.

A command may arrive late, twice, or after its outcome was taken for lost. So each names the catalog `revision`
that it was decided on, and one rule makes every command safe to repeat: what already is as the command wants it is
left alone; otherwise nothing that it touches may have changed since that revision (`stale`). An object that
is not there has no revision of its own: nothing may be added by a command older than the last removal of anything.
Whoever gets such a refusal reads the catalog again and decides anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from msgspec.structs import replace

from node.kernel import limits
from node.kernel.errors import CatalogCorrupt
from replication import catalog_models, catalog_quotas, catalog_tables
from replication.catalog_values import (
    ENDED,
    FORMAT,
    Assignment,
    Catalog,
    Model,
    Move,
    Node,
    Outcome,
    Refusal,
    Tenant,
    Version,
    VersionState,
    advanced,
    model_key,
    put,
)
from replication.catalog_values import addition_stale as _addition_stale
from replication.catalog_values import stale as _stale
from replication.commands import (
    CancelMove,
    Command,
    CompleteMove,
    DrainNode,
    GrowPartitions,
    JoinNode,
    LeaveNode,
    PartitionCommand,
    RenewLease,
    SetSettings,
    SetStandbys,
    StartMove,
    TakeOver,
    bounded,
    encoder,
)

__all__ = [
    "ENDED",
    "Assignment",
    "Catalog",
    "Model",
    "Move",
    "Node",
    "Refusal",
    "Tenant",
    "Version",
    "VersionState",
    "apply",
    "decode_catalog",
    "encode_catalog",
    "model_key",
    "problem",
]

# --- bytes --------------------------------------------------------------------------------------------------------

_catalogs = msgspec.msgpack.Decoder(Catalog)


def encode_catalog(catalog: Catalog) -> bytes:
    """Equal catalogs give equal bytes. Raises BoundExceeded over CATALOG_BYTES_MAX."""
    return bounded(encoder.encode(catalog), limits.CATALOG_BYTES_MAX, "the catalog", "forget retired versions")


def decode_catalog(encoded: bytes) -> Catalog:
    """Raises CatalogCorrupt for bytes that are no catalog of this format."""
    if len(encoded) > limits.CATALOG_BYTES_MAX:
        raise CatalogCorrupt(f"a catalog of {len(encoded)} bytes is over CATALOG_BYTES_MAX; wipe the node and rejoin")
    try:
        catalog = _catalogs.decode(encoded)
    except (msgspec.MsgspecError, UnicodeDecodeError) as failure:
        raise CatalogCorrupt(f"the catalog can't be read: {failure}; wipe the node's journal and rejoin") from failure
    if catalog.format != FORMAT:
        raise CatalogCorrupt(f"the catalog has format {catalog.format}, this release reads {FORMAT}; upgrade the node")
    return catalog


def apply(catalog: Catalog, command: Command) -> Catalog:
    """The next catalog; the same object when the command finds all as it wants it."""
    outcome = _HANDLERS[type(command)](catalog, command)
    return _refuse(catalog, command, outcome) if isinstance(outcome, str) else outcome


def problem(catalog: Catalog, command: Command) -> str:
    """Why `apply` would refuse the command; '' when it would not. To be asked before proposing."""
    outcome = _HANDLERS[type(command)](catalog, command)
    return outcome if isinstance(outcome, str) else ""


def _refuse(catalog: Catalog, command: Command, reason: str) -> Catalog:
    """Recorded once however often it is repeated; beside the list nothing changes."""
    refusal = Refusal(_summary(command), reason[: limits.REASON_BYTES_MAX], command.revision)
    if refusal in catalog.refusals:
        return catalog
    return replace(catalog, refusals=(*catalog.refusals, refusal)[-limits.REFUSALS_KEPT_MAX :])


def _summary(command: Command) -> str:
    fields = ("name", "node", "partition", "epoch", "to", "tenant", "model", "version", "blob", "count", "number")
    said = [f"{field}={getattr(command, field)}" for field in fields if hasattr(command, field)]
    return " ".join([str(command.__struct_config__.tag), *said])[: limits.REASON_BYTES_MAX]


# nodes


def _join(catalog: Catalog, command: JoinNode) -> Outcome:
    before = catalog.nodes.get(command.name)
    stays = before if before is not None and before.incarnation == command.incarnation else None
    node = Node(
        command.name,
        command.raft_address,
        command.http_address,
        command.rack,
        command.weight,
        command.incarnation,
        stays.joined_ms if stays else command.at_ms,
        before.draining if before else False,
        catalog.revision + 1,
        stays.joined_revision if stays else catalog.revision + 1,
    )
    if before is None:
        if len(catalog.nodes) >= limits.NODES_MAX:
            return f"the cluster has {len(catalog.nodes)} nodes, the most it may; let one leave first"
        stale = _addition_stale(catalog, command)
        return stale or advanced(catalog, nodes=put(catalog.nodes, node.name, node))
    if replace(node, revision=before.revision) == before:
        return catalog
    if node.incarnation < before.incarnation:
        return f"node {node.name} has joined as incarnation {before.incarnation}; give the new one a higher number"
    stale = _stale(f"node {node.name}", before.revision, command)
    if stale:
        return stale
    nodes = put(catalog.nodes, node.name, node)
    if stays:
        return advanced(catalog, nodes=nodes)
    return advanced(_without_holder(catalog, node.name), nodes=nodes)


def _leave(catalog: Catalog, command: LeaveNode) -> Outcome:
    node = catalog.nodes.get(command.name)
    if node is None:
        return catalog
    stale = _stale(f"node {node.name}", node.revision, command)
    if stale:
        return stale
    for partition, held in enumerate(catalog.partitions):
        if held.owner == node.name or (held.move is not None and held.move.to == node.name):
            return f"node {node.name} owns or takes partition {partition}; drain it, or stop it and wait for takeover"
    revision = catalog.revision + 1
    partitions = tuple(
        replace(held, standbys=_less(held.standbys, node.name), revision=revision)
        if node.name in held.standbys
        else held
        for held in catalog.partitions
    )
    nodes = {name: kept for name, kept in catalog.nodes.items() if name != node.name}
    leases = {name: number for name, number in catalog.leases.items() if name != node.name}
    fewer = _without_holder(catalog, node.name)
    return advanced(fewer, nodes=nodes, leases=leases, partitions=partitions, removed_revision=revision)


def _without_holder(catalog: Catalog, node: str) -> Catalog:
    """Its claims on blobs are gone with its disk; what it said before must not come back by a late command."""
    holders = {blob: {name: at for name, at in held.items() if name != node} for blob, held in catalog.holders.items()}
    return replace(catalog, holders=holders, removed_revision=catalog.revision + 1)


def _renew(catalog: Catalog, command: RenewLease) -> Outcome:
    node = catalog.nodes.get(command.name)
    if node is None or node.incarnation != command.incarnation:
        return f"node {command.name} is no member as incarnation {command.incarnation}; join first"
    if command.revision < node.joined_revision:
        return f"node {command.name} has left and joined since it renewed this lease; it renews it again"
    if command.number <= catalog.leases.get(command.name, 0):
        return catalog
    return replace(catalog, leases={**catalog.leases, command.name: command.number})


def _drain(catalog: Catalog, command: DrainNode) -> Outcome:
    node = catalog.nodes.get(command.name)
    if node is None:
        return f"there is no node {command.name}; look at the members"
    if node.draining == command.draining:
        return catalog
    stale = _stale(f"node {node.name}", node.revision, command)
    changed = replace(node, draining=command.draining, revision=catalog.revision + 1)
    return stale or advanced(catalog, nodes=put(catalog.nodes, node.name, changed))


# settings and ownership


def _set_settings(catalog: Catalog, command: SetSettings) -> Outcome:
    """The first count as agreed though they are the defaults: a node that comes later may have others in its file."""
    if catalog.settings == command.settings and catalog.settings_revision > 0:
        return catalog
    owned = any(assignment.owner for assignment in catalog.partitions)
    if owned and command.settings.lease_ms != catalog.settings.lease_ms:
        return "lease_ms can't change while partitions have owners: they and the leader must count the same lease"
    stale = _stale("the settings", catalog.settings_revision, command)
    return stale or advanced(catalog, settings=command.settings, settings_revision=catalog.revision + 1)


def _grow(catalog: Catalog, command: GrowPartitions) -> Outcome:
    """A count that is reached already is no mistake: several nodes see a topic grow."""
    more = command.count - len(catalog.partitions)
    if more <= 0:
        return catalog
    fresh = (Assignment(revision=catalog.revision + 1),) * more
    return advanced(catalog, partitions=(*catalog.partitions, *fresh))


def _less(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(other for other in names if other != name)


def _assign(catalog: Catalog, partition: int, **changes: Any) -> Catalog:
    changed = replace(catalog.partitions[partition], revision=catalog.revision + 1, **changes)
    partitions = (*catalog.partitions[:partition], changed, *catalog.partitions[partition + 1 :])
    return advanced(catalog, partitions=partitions)


def _partition_problem(catalog: Catalog, command: PartitionCommand) -> str:
    if command.partition >= len(catalog.partitions):
        return f"there is no partition {command.partition}; grow the partitions first"
    held = catalog.partitions[command.partition]
    if held.epoch != command.epoch:
        return f"partition {command.partition} is at epoch {held.epoch}, not {command.epoch}; decide anew"
    return _stale(f"partition {command.partition}", held.revision, command)


def _owned_already(catalog: Catalog, command: TakeOver | CompleteMove) -> bool:
    """The change of owner that the command wants has happened."""
    if command.partition >= len(catalog.partitions):
        return False
    held = catalog.partitions[command.partition]
    return (held.owner, held.epoch) == (command.to, command.epoch + 1)


def _with_owner(catalog: Catalog, partition: int, to: str) -> Catalog:
    """The roles are swapped: the old owner has the state, so it is the cheapest standby."""
    held = catalog.partitions[partition]
    standbys = _less(held.standbys, to)
    if held.owner in catalog.nodes:
        standbys = (*standbys, held.owner)[-limits.STANDBYS_MAX :]
    return _assign(catalog, partition, owner=to, epoch=held.epoch + 1, standbys=standbys, move=None)


def _take_over(catalog: Catalog, command: TakeOver) -> Outcome:
    if _owned_already(catalog, command):
        return catalog
    reason = _partition_problem(catalog, command)
    if reason:
        return reason
    if command.to not in catalog.nodes:
        return f"there is no node {command.to}; look at the members"
    owner = catalog.partitions[command.partition].owner
    if owner == command.to:
        return f"node {command.to} owns partition {command.partition} already"
    if owner and catalog.leases.get(owner, 0) != command.lease:
        return f"node {owner} has renewed its lease since; it is not silent"
    return _with_owner(catalog, command.partition, command.to)


def _set_standbys(catalog: Catalog, command: SetStandbys) -> Outcome:
    known = command.partition < len(catalog.partitions)
    if known and catalog.partitions[command.partition].standbys == command.standbys:
        return catalog
    reason = _partition_problem(catalog, command)
    if reason:
        return reason
    held = catalog.partitions[command.partition]
    if held.move is not None:
        return f"partition {command.partition} moves to {held.move.to}; wait until it has, or cancel the move"
    unknown = [name for name in command.standbys if name not in catalog.nodes]
    if unknown or held.owner in command.standbys or len(set(command.standbys)) < len(command.standbys):
        return f"standbys {command.standbys} of partition {command.partition}: each a member, once, and not the owner"
    return _assign(catalog, command.partition, standbys=command.standbys)


def _start_move(catalog: Catalog, command: StartMove) -> Outcome:
    known = command.partition < len(catalog.partitions)
    running = catalog.partitions[command.partition].move if known else None
    same = running is not None and running.to == command.to
    if same and catalog.partitions[command.partition].epoch == command.epoch:
        return catalog
    reason = _partition_problem(catalog, command)
    if reason:
        return reason
    held = catalog.partitions[command.partition]
    if running is not None:
        return f"partition {command.partition} already moves to {running.to}; wait, or cancel that move"
    if command.to not in held.standbys or catalog.nodes[command.to].draining:
        return f"node {command.to} can't take partition {command.partition}: it must be its standby, and not draining"
    if sum(other.move is not None for other in catalog.partitions) >= catalog.settings.moves_max:
        return f"{catalog.settings.moves_max} moves are in progress, the most there may be; wait"
    return _assign(catalog, command.partition, move=Move(held.owner, command.to, command.why, command.at_ms))


def _cancel_move(catalog: Catalog, command: CancelMove) -> Outcome:
    if command.partition < len(catalog.partitions):
        held = catalog.partitions[command.partition]
        if held.move is None and held.epoch == command.epoch:
            return catalog
    reason = _partition_problem(catalog, command)
    return reason or _assign(catalog, command.partition, move=None)


def _complete_move(catalog: Catalog, command: CompleteMove) -> Outcome:
    if _owned_already(catalog, command):
        return catalog
    reason = _partition_problem(catalog, command)
    if reason:
        return reason
    move = catalog.partitions[command.partition].move
    if move is None or move.to != command.to:
        return f"partition {command.partition} is not moving to {command.to}; the move was cancelled"
    return _with_owner(catalog, command.partition, command.to)


_HANDLERS: Final[Mapping[type, Callable[[Catalog, Any], Outcome]]] = {
    **catalog_models.HANDLERS,
    **catalog_quotas.HANDLERS,
    **catalog_tables.HANDLERS,
    JoinNode: _join,
    LeaveNode: _leave,
    RenewLease: _renew,
    DrainNode: _drain,
    SetSettings: _set_settings,
    GrowPartitions: _grow,
    TakeOver: _take_over,
    SetStandbys: _set_standbys,
    StartMove: _start_move,
    CancelMove: _cancel_move,
    CompleteMove: _complete_move,
}
