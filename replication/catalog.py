"""(P) The cluster's agreed record, and the commands that change it.

The catalog is a value; `apply` gives the next one. It is the same on every node at the same place of the Raft log,
never raises, and a command that is invalid there changes nothing but the list of refusals.

A command may arrive late, twice, or after its outcome was taken for lost. So each names the catalog `revision`
that it was decided on, and one rule makes every command safe to repeat: what already is as the command wants it is
left alone; otherwise nothing that it touches may have changed since that revision (`_stale`). An object that
is not there has no revision of its own: nothing may be added by a command older than the last removal of anything.
Whoever gets such a refusal reads the catalog again and decides anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from node.kernel import limits
from node.kernel.errors import CatalogCorrupt
from replication.commands import (
    CancelMove,
    Command,
    CompleteMove,
    DrainNode,
    ForgetVersion,
    GoLive,
    GrowPartitions,
    HoldBlob,
    JoinNode,
    LeaveNode,
    PartitionCommand,
    PutTenant,
    PutVersion,
    QuarantineVersion,
    RenewLease,
    RetireVersion,
    SetSettings,
    SetStandbys,
    Settings,
    Stage,
    StageVersion,
    StartMove,
    TakeOver,
    bounded,
    encoder,
)

VersionState: TypeAlias = Literal["passed", "shadow", "canary", "live", "retired", "quarantined"]
STAGED: Final = ("shadow", "canary")
ENDED: Final = ("retired", "quarantined")

FORMAT: Final = 1


# --- what is agreed -------------------------------------------------------------------------------------------------


class Node(Struct, frozen=True):
    """A member. `incarnation` rises each time the node starts with an empty disk."""

    name: str
    raft_address: str
    http_address: str
    rack: str
    weight: float
    incarnation: int
    joined_ms: int
    draining: bool = False
    revision: int = 0


class Tenant(Struct, frozen=True):
    name: str
    settings: str
    who: str
    at_ms: int
    revision: int = 0


class Version(Struct, frozen=True):
    """A model version. `version` is the sha256 of file and manifest together, `blob` that of the file.

    One that passed waits to go live, or to be staged; there is one such of a model at most, put after the live one.
    A staged one runs beside the live one; there is one such at most too.
    """

    version: str
    blob: str
    manifest: str
    state: VersionState
    who: str
    at_ms: int
    """Who brought it to its state, and when by the proposer's clock."""
    report: str = ""
    revision: int = 0
    """When it was last put: of two versions of a model, the one with the higher revision is the newer."""
    stages: tuple[Stage, ...] = ()
    share: float = 0.0
    reason: str = ""
    """Why it was brought to its state, as whoever did it said."""
    served_revision: int = 0
    """When it last went live; 0: never. What is fallen back to is the retired one with the highest."""


class Model(Struct, frozen=True):
    """A tenant's model: at most one version is live; `live_revision` is where it went live, on every node alike."""

    tenant: str
    model: str
    versions: dict[str, Version]
    live: str = ""
    live_revision: int = 0
    revision: int = 0

    @property
    def staged(self) -> Version | None:
        return next((version for version in self.versions.values() if version.state in STAGED), None)

    @property
    def fallback(self) -> Version | None:
        """The version that was live last, of those that may be again."""
        served = (one for one in self.versions.values() if one.state == "retired" and one.served_revision)
        return max(served, key=lambda version: version.served_revision, default=None)


class Move(Struct, frozen=True):
    """A planned change of owner: `to` takes over once the owner has released the partition."""

    source: str
    to: str
    why: str
    at_ms: int


class Assignment(Struct, frozen=True):
    """Who has a partition. `epoch` rises with each change of owner; an owner of '' is: nobody yet."""

    owner: str = ""
    epoch: int = 0
    standbys: tuple[str, ...] = ()
    move: Move | None = None
    revision: int = 0


class Refusal(Struct, frozen=True):
    command: str
    reason: str
    revision: int


class Catalog(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole record; treat the mappings as frozen too, `apply` never changes one in place."""

    format: int = FORMAT
    revision: int = 0
    """Rises by one with each command that changed something."""
    removed_revision: int = 0
    """When something was last removed."""
    settings: Settings = Settings()
    settings_revision: int = 0
    nodes: dict[str, Node] = {}
    leases: dict[str, int] = {}
    """Node -> number of its last renewal; not counted in revisions."""
    tenants: dict[str, Tenant] = {}
    models: dict[str, Model] = {}
    """By `model_key`."""
    holders: dict[str, dict[str, int]] = {}
    """Blob sha256 -> node that has and has verified it -> revision since when."""
    partitions: tuple[Assignment, ...] = ()
    text_bytes: int = 0
    """Of all manifests, reports and tenants' settings."""
    refusals: tuple[Refusal, ...] = ()
    """The last ones."""

    def version(self, tenant: str, model: str, version: str) -> Version | None:
        found = self.models.get(model_key(tenant, model))
        return None if found is None else found.versions.get(version)


def model_key(tenant: str, model: str) -> str:
    return f"{tenant}/{model}"


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


# --- the reducer ----------------------------------------------------------------------------------------------------


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


def _stale(what: str, changed: int, command: Command) -> str:
    if changed <= command.revision:
        return ""
    return f"{what} changed at revision {changed}, after {command.revision}; read the catalog and decide anew"


def _addition_stale(catalog: Catalog, command: Command) -> str:
    return _stale("what may be added", catalog.removed_revision, command)


_Kept = TypeVar("_Kept", Node, Tenant, Model)


def _put(kept: Mapping[str, _Kept], key: str, new: _Kept) -> dict[str, _Kept]:
    return {**kept, key: new}


def _next(catalog: Catalog, **changes: Any) -> Catalog:
    return replace(catalog, revision=catalog.revision + 1, **changes)


Outcome: TypeAlias = Catalog | str
"""The next catalog, or why not."""


# nodes


def _join(catalog: Catalog, command: JoinNode) -> Outcome:
    before = catalog.nodes.get(command.name)
    node = Node(
        command.name,
        command.raft_address,
        command.http_address,
        command.rack,
        command.weight,
        command.incarnation,
        before.joined_ms if before and before.incarnation == command.incarnation else command.at_ms,
        before.draining if before else False,
        catalog.revision + 1,
    )
    if before is None:
        if len(catalog.nodes) >= limits.NODES_MAX:
            return f"the cluster has {len(catalog.nodes)} nodes, the most it may; let one leave first"
        stale = _addition_stale(catalog, command)
        return stale or _next(catalog, nodes=_put(catalog.nodes, node.name, node))
    if replace(node, revision=before.revision) == before:
        return catalog
    if node.incarnation < before.incarnation:
        return f"node {node.name} has joined as incarnation {before.incarnation}; give the new one a higher number"
    stale = _stale(f"node {node.name}", before.revision, command)
    if stale:
        return stale
    nodes = _put(catalog.nodes, node.name, node)
    if node.incarnation == before.incarnation:
        return _next(catalog, nodes=nodes)
    return _next(_without_holder(catalog, node.name), nodes=nodes)


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
    return _next(fewer, nodes=nodes, leases=leases, partitions=partitions, removed_revision=revision)


def _without_holder(catalog: Catalog, node: str) -> Catalog:
    """Its claims on blobs are gone with its disk; what it said before must not come back by a late command."""
    holders = {blob: {name: at for name, at in held.items() if name != node} for blob, held in catalog.holders.items()}
    return replace(catalog, holders=holders, removed_revision=catalog.revision + 1)


def _renew(catalog: Catalog, command: RenewLease) -> Outcome:
    node = catalog.nodes.get(command.name)
    if node is None or node.incarnation != command.incarnation:
        return f"node {command.name} is no member as incarnation {command.incarnation}; join first"
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
    return stale or _next(catalog, nodes=_put(catalog.nodes, node.name, changed))


# tenants and models


def _put_tenant(catalog: Catalog, command: PutTenant) -> Outcome:
    before = catalog.tenants.get(command.name)
    if before is not None and before.settings == command.settings:
        return catalog
    if before is None and len(catalog.tenants) >= limits.TENANTS_MAX:
        return f"there are {len(catalog.tenants)} tenants, the most there may be"
    text_bytes = catalog.text_bytes + _size(command.settings) - (_size(before.settings) if before else 0)
    reason = _text_problem(text_bytes)
    if before is None:
        reason = reason or _addition_stale(catalog, command)
    else:
        reason = reason or _stale(f"tenant {command.name}", before.revision, command)
    tenant = Tenant(command.name, command.settings, command.who, command.at_ms, catalog.revision + 1)
    return reason or _next(catalog, tenants=_put(catalog.tenants, tenant.name, tenant), text_bytes=text_bytes)


def _size(text: str) -> int:
    return len(text.encode())


def _text_problem(text_bytes: int) -> str:
    if text_bytes <= limits.CATALOG_MANIFEST_BYTES_MAX:
        return ""
    return f"texts would be {text_bytes} bytes together, over CATALOG_MANIFEST_BYTES_MAX; forget old versions"


def _put_version(catalog: Catalog, command: PutVersion) -> Outcome:
    key = model_key(command.tenant, command.model)
    before = catalog.models.get(key)
    if before is not None and command.version in before.versions:
        return _put_again(catalog, before, command)
    versions = before.versions if before else {}
    text_bytes = catalog.text_bytes + _size(command.manifest) + _size(command.report)
    reason = _addition_stale(catalog, command) or _version_problem(catalog, command, len(versions))
    reason = reason or _text_problem(text_bytes)
    if reason:
        return reason
    base = before or Model(command.tenant, command.model, {})
    versions = _without_passed(versions, command.who, command.at_ms) | {command.version: _passed(catalog, command)}
    model = replace(base, versions=versions, revision=catalog.revision + 1)
    holders = catalog.holders if command.blob in catalog.holders else {**catalog.holders, command.blob: {}}
    return _next(catalog, models=_put(catalog.models, key, model), holders=holders, text_bytes=text_bytes)


def _passed(catalog: Catalog, put: PutVersion) -> Version:
    return Version(
        put.version,
        put.blob,
        put.manifest,
        "passed",
        put.who,
        put.at_ms,
        put.report,
        catalog.revision + 1,
        put.stages,
        put.share,
    )


def _without(states: tuple[str, ...], versions: Mapping[str, Version], who: str, at_ms: int) -> dict[str, Version]:
    """What waited, or was staged, does so no longer: a newer wish takes its place."""
    return {
        name: replace(version, state="retired", who=who, at_ms=at_ms, reason="") if version.state in states else version
        for name, version in versions.items()
    }


def _without_passed(versions: Mapping[str, Version], who: str, at_ms: int) -> dict[str, Version]:
    return _without(("passed",), versions, who, at_ms)


def _put_again(catalog: Catalog, model: Model, command: PutVersion) -> Outcome:
    """Of a version that is known; only a wish that is newer than all that became of the model since counts."""
    key, known = model_key(model.tenant, model.model), model.versions[command.version]
    if (known.blob, known.manifest) != (command.blob, command.manifest):
        return f"version {command.version[:12]} of {key} is known with other contents"
    waiting = any(version.state == "passed" for version in model.versions.values())
    if known.state == "passed" or (known.state in ("live", *STAGED) and not waiting):
        return catalog
    text_bytes = catalog.text_bytes + _size(command.report) - _size(known.report)
    reason = _stale(f"model {key}", model.revision, command) or _text_problem(text_bytes)
    if reason:
        return reason
    state: VersionState = "passed" if known.state in ENDED else known.state
    renewed = replace(_passed(catalog, command), state=state, served_revision=known.served_revision)
    versions = _without_passed(model.versions, command.who, command.at_ms) | {known.version: renewed}
    changed = replace(model, versions=versions, revision=catalog.revision + 1)
    return _next(catalog, models=_put(catalog.models, key, changed), text_bytes=text_bytes)


def _version_problem(catalog: Catalog, command: PutVersion, versions: int) -> str:
    if command.tenant not in catalog.tenants:
        return f"there is no tenant {command.tenant}; put the tenant first"
    if versions >= limits.VERSIONS_PER_MODEL_MAX:
        return f"model {model_key(command.tenant, command.model)} has {versions} versions; forget retired ones first"
    mine = sum(model.tenant == command.tenant for model in catalog.models.values())
    if not versions and mine >= limits.MODELS_PER_TENANT_MAX:
        return f"tenant {command.tenant} has {mine} models, the most it may; forget one first"
    if command.blob not in catalog.holders and len(catalog.holders) >= limits.BLOBS_MAX:
        return f"there are {len(catalog.holders)} model files, the most there may be; forget old versions"
    return ""


def _found(catalog: Catalog, tenant: str, model: str, version: str) -> tuple[Model, Version] | str:
    found = catalog.models.get(model_key(tenant, model))
    if found is None or version not in found.versions:
        return f"there is no version {version[:12]} of {model_key(tenant, model)}; put it first"
    return found, found.versions[version]


def _lacking(catalog: Catalog, version: Version, holders: tuple[str, ...]) -> str:
    missing = [name for name in holders if name not in catalog.holders.get(version.blob, {})]
    if not missing:
        return ""
    return f"nodes {', '.join(sorted(missing))} lack the file of version {version.version[:12]}; fetch it first"


def _go_live(catalog: Catalog, command: GoLive) -> Outcome:
    found = _found(catalog, command.tenant, command.model, command.version)
    if isinstance(found, str):
        return found
    model, version = found
    if model.live == version.version:
        return catalog
    stale = _stale(f"model {model_key(model.tenant, model.model)}", model.revision, command)
    reason = _lacking(catalog, version, command.holders) or stale
    if reason:
        return reason
    others = STAGED if version.state in STAGED else ("passed", *STAGED)
    versions = _without(others, model.versions, command.who, command.at_ms)
    if model.live:
        versions[model.live] = replace(versions[model.live], state="retired", who=command.who, at_ms=command.at_ms)
    return _with_live(catalog, model, versions, version, command)


def _with_live(
    catalog: Catalog, model: Model, versions: dict[str, Version], version: Version, command: GoLive | QuarantineVersion
) -> Catalog:
    versions[version.version] = replace(
        version,
        state="live",
        who=command.who,
        at_ms=command.at_ms,
        reason=command.reason,
        served_revision=catalog.revision + 1,
    )
    return _with_model(catalog, model, versions, version.version, catalog.revision + 1)


def _stage(catalog: Catalog, command: StageVersion) -> Outcome:
    found = _found(catalog, command.tenant, command.model, command.version)
    if isinstance(found, str):
        return found
    model, version = found
    if version.state == command.stage:
        return catalog
    if not model.live or version.state == "live":
        return f"version {version.version[:12]} can be staged only beside another one that is live"
    stale = _stale(f"model {model_key(model.tenant, model.model)}", model.revision, command)
    reason = _lacking(catalog, version, command.holders) or stale
    if reason:
        return reason
    versions = _without(STAGED, model.versions, command.who, command.at_ms)
    staged = replace(version, state=command.stage, who=command.who, at_ms=command.at_ms, reason=command.reason)
    return _with_model(catalog, model, versions | {version.version: staged}, model.live, model.live_revision)


def _quarantine(catalog: Catalog, command: QuarantineVersion) -> Outcome:
    found = _found(catalog, command.tenant, command.model, command.version)
    if isinstance(found, str):
        return found
    model, version = found
    if version.state == "quarantined":
        return catalog
    stale = _stale(f"model {model_key(model.tenant, model.model)}", model.revision, command)
    if stale:
        return stale
    ended = replace(version, state="quarantined", who=command.who, at_ms=command.at_ms, reason=command.reason)
    versions = {**model.versions, version.version: ended}
    if model.live != version.version:
        return _with_model(catalog, model, versions, model.live, model.live_revision)
    if not command.fall_back_to:
        return _with_model(catalog, model, versions, "", catalog.revision + 1)
    again = versions.get(command.fall_back_to)
    if again is None or again.state != "retired" or not again.served_revision:
        return f"version {command.fall_back_to[:12]} was never live, or may not be again; name another, or none"
    return _lacking(catalog, again, command.holders) or _with_live(catalog, model, versions, again, command)


def _with_model(catalog: Catalog, model: Model, versions: dict[str, Version], live: str, live_revision: int) -> Catalog:
    changed = replace(model, versions=versions, live=live, live_revision=live_revision, revision=catalog.revision + 1)
    return _next(catalog, models=_put(catalog.models, model_key(model.tenant, model.model), changed))


def _retire(catalog: Catalog, command: RetireVersion) -> Outcome:
    found = _found(catalog, command.tenant, command.model, command.version)
    if isinstance(found, str):
        return found
    model, version = found
    if version.state in ENDED:
        return catalog
    stale = _stale(f"model {model_key(model.tenant, model.model)}", model.revision, command)
    if stale:
        return stale
    retired = replace(version, state="retired", who=command.who, at_ms=command.at_ms)
    versions = {**model.versions, version.version: retired}
    was_live = model.live == version.version
    live, live_revision = ("", catalog.revision + 1) if was_live else (model.live, model.live_revision)
    return _with_model(catalog, model, versions, live, live_revision)


def _forget(catalog: Catalog, command: ForgetVersion) -> Outcome:
    key = model_key(command.tenant, command.model)
    model = catalog.models.get(key)
    if model is None or command.version not in model.versions:
        return catalog
    version = model.versions[command.version]
    if version.state not in ENDED:
        return f"version {version.version[:12]} of {key} is {version.state}; retire it first"
    stale = _stale(f"model {key}", model.revision, command)
    if stale:
        return stale
    revision = catalog.revision + 1
    kept = {name: other for name, other in model.versions.items() if name != version.version}
    models = {name: other for name, other in catalog.models.items() if name != key}
    if kept:
        models[key] = replace(model, versions=kept, revision=revision)
    used = any(other.blob == version.blob for each in models.values() for other in each.versions.values())
    holders = catalog.holders if used else {b: held for b, held in catalog.holders.items() if b != version.blob}
    text_bytes = catalog.text_bytes - _size(version.manifest) - _size(version.report)
    return _next(catalog, models=models, holders=holders, text_bytes=text_bytes, removed_revision=revision)


def _hold(catalog: Catalog, command: HoldBlob) -> Outcome:
    node, held = catalog.nodes.get(command.node), catalog.holders.get(command.blob)
    if held is None:
        return f"no version has the file {command.blob[:12]}; it may be deleted" if command.held else catalog
    if node is None or node.incarnation != command.incarnation:
        return f"node {command.node} is no member as incarnation {command.incarnation}; join first"
    if (command.node in held) == command.held:
        return catalog
    revision = catalog.revision + 1
    if command.held:
        stale = _addition_stale(catalog, command)
        return stale or _next(catalog, holders={**catalog.holders, command.blob: {**held, command.node: revision}})
    stale = _stale(f"the file {command.blob[:12]} on {command.node}", held[command.node], command)
    fewer = {name: at for name, at in held.items() if name != command.node}
    return stale or _next(catalog, holders={**catalog.holders, command.blob: fewer}, removed_revision=revision)


# settings and ownership


def _set_settings(catalog: Catalog, command: SetSettings) -> Outcome:
    if catalog.settings == command.settings:
        return catalog
    owned = any(assignment.owner for assignment in catalog.partitions)
    if owned and command.settings.lease_ms != catalog.settings.lease_ms:
        return "lease_ms can't change while partitions have owners: they and the leader must count the same lease"
    stale = _stale("the settings", catalog.settings_revision, command)
    return stale or _next(catalog, settings=command.settings, settings_revision=catalog.revision + 1)


def _grow(catalog: Catalog, command: GrowPartitions) -> Outcome:
    """A count that is reached already is no mistake: several nodes see a topic grow."""
    more = command.count - len(catalog.partitions)
    if more <= 0:
        return catalog
    fresh = (Assignment(revision=catalog.revision + 1),) * more
    return _next(catalog, partitions=(*catalog.partitions, *fresh))


def _less(names: tuple[str, ...], name: str) -> tuple[str, ...]:
    return tuple(other for other in names if other != name)


def _assign(catalog: Catalog, partition: int, **changes: Any) -> Catalog:
    changed = replace(catalog.partitions[partition], revision=catalog.revision + 1, **changes)
    partitions = (*catalog.partitions[:partition], changed, *catalog.partitions[partition + 1 :])
    return _next(catalog, partitions=partitions)


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
    JoinNode: _join,
    LeaveNode: _leave,
    RenewLease: _renew,
    DrainNode: _drain,
    PutTenant: _put_tenant,
    PutVersion: _put_version,
    GoLive: _go_live,
    StageVersion: _stage,
    QuarantineVersion: _quarantine,
    RetireVersion: _retire,
    ForgetVersion: _forget,
    HoldBlob: _hold,
    SetSettings: _set_settings,
    GrowPartitions: _grow,
    TakeOver: _take_over,
    SetStandbys: _set_standbys,
    StartMove: _start_move,
    CancelMove: _cancel_move,
    CompleteMove: _complete_move,
}
