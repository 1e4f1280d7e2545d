"""(P) What may be proposed to the cluster: the commands that change the catalog, and their bytes.

A command may arrive late, twice, or after its outcome was taken for lost; `replication.catalog` says what makes
that safe. Fields have bounds, checked when a command is decoded.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from node.kernel import limits
from node.kernel.errors import BoundExceeded, CatalogCorrupt

Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=limits.NAME_BYTES_MAX)]
Text: TypeAlias = Annotated[str, Meta(max_length=limits.NAME_BYTES_MAX)]
Reason: TypeAlias = Annotated[str, Meta(max_length=limits.REASON_BYTES_MAX)]
Manifest: TypeAlias = Annotated[str, Meta(max_length=limits.MANIFEST_BYTES_MAX)]
Report: TypeAlias = Annotated[str, Meta(max_length=limits.REPORT_BYTES_MAX)]
Sha256: TypeAlias = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Names: TypeAlias = Annotated[tuple[Name, ...], Meta(max_length=limits.NODES_MAX)]
Number: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Holders: TypeAlias = Annotated[tuple[Name, ...], Meta(min_length=1, max_length=limits.NODES_MAX)]


class Settings(Struct, frozen=True):
    """Of the whole cluster. `lease_ms` is settled before the first partition has an owner (see `ownership`)."""

    standby_count: Annotated[int, Meta(ge=0, le=limits.STANDBY_COUNT_MAX)] = 1
    moves_max: Annotated[int, Meta(ge=1, le=limits.MOVES_MAX)] = 2
    """Planned moves at once."""
    builds_max: Annotated[int, Meta(ge=1, le=limits.MOVES_MAX)] = 4
    """Standbys at once that have yet to catch up; each costs a copy of a partition."""
    snapshot_holders_min: Annotated[int, Meta(ge=1, le=limits.NODES_MAX)] = 2
    """Nodes that must have and have verified a snapshot before the changelog is cut behind it."""
    lease_ms: Annotated[int, Meta(ge=limits.LEASE_MS_MIN, le=limits.LEASE_MS_MAX)] = 1500


class _Command(Struct, frozen=True, kw_only=True, tag_field="do", forbid_unknown_fields=True):
    revision: Number
    """The catalog's revision that this was decided on."""


class JoinNode(_Command, frozen=True, kw_only=True, tag="join"):
    name: Name
    raft_address: Name
    http_address: Name
    rack: Text = ""
    weight: Annotated[float, Meta(ge=limits.WEIGHT_MIN, le=limits.WEIGHT_MAX)] = 1.0
    incarnation: Annotated[int, Meta(ge=1, le=2**63 - 1)] = 1
    at_ms: Number = 0


class LeaveNode(_Command, frozen=True, kw_only=True, tag="leave"):
    name: Name


class RenewLease(_Command, frozen=True, kw_only=True, tag="renew"):
    """The no-op that a node's lease counts from; `number` rises with each, over restarts of the node too."""

    name: Name
    incarnation: Number
    number: Number


class DrainNode(_Command, frozen=True, kw_only=True, tag="drain"):
    name: Name
    draining: bool


class PutTenant(_Command, frozen=True, kw_only=True, tag="tenant"):
    name: Name
    settings: Manifest
    who: Text = ""
    at_ms: Number = 0


class PutFeatures(_Command, frozen=True, kw_only=True, tag="features"):
    """A tenant's shared features, '' for none, checked beside all models and features as of `revision`."""

    tenant: Name
    text: Manifest
    who: Text = ""
    at_ms: Number = 0


class PutVersion(_Command, frozen=True, kw_only=True, tag="version"):
    """A version that passed its trial: from now on the tenant's wish, in place of one that waits to go live.

    A version that is known already is put again the same way: one that retired waits to go live once more, and one
    that is live stays so. Two puts of one model count in the order in which they are agreed.
    """

    tenant: Name
    model: Name
    version: Sha256
    blob: Sha256
    manifest: Manifest
    report: Report = ""
    """What the trial found, as its trier wrote it; the catalog keeps it and never looks inside."""
    stages: Annotated[tuple[Name, ...], Meta(max_length=limits.STAGES_MAX)] = ()
    """What it goes through beside the live version before it is live itself, as its manifest calls them."""
    who: Text = ""
    at_ms: Number = 0


class GoLive(_Command, frozen=True, kw_only=True, tag="live"):
    """Make a version live on all nodes; the one before retires.

    So does one that is staged, and one that waits, unless this version was staged itself: then a newer wish waits on.
    `holders` must have its bytes already.
    """

    tenant: Name
    model: Name
    version: Sha256
    holders: Holders
    reason: Reason = ""
    who: Text = ""
    at_ms: Number = 0


class StageVersion(_Command, frozen=True, kw_only=True, tag="stage"):
    """Run a version beside the live one on all nodes, in its stage number `stage`; another staged one retires."""

    tenant: Name
    model: Name
    version: Sha256
    stage: Annotated[int, Meta(ge=0, lt=limits.STAGES_MAX)]
    holders: Holders
    reason: Reason = ""
    who: Text = ""
    at_ms: Number = 0


class QuarantineVersion(_Command, frozen=True, kw_only=True, tag="quarantine"):
    """A version that must not run any more. If it was live, `fall_back_to` is from here on, also where its file has
    to be fetched; '': none is."""

    tenant: Name
    model: Name
    version: Sha256
    fall_back_to: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")] = ""
    reason: Reason = ""
    who: Text = ""
    at_ms: Number = 0


class RetireVersion(_Command, frozen=True, kw_only=True, tag="retire"):
    """Take a version back. To withdraw a model, retire what waits first, then what is live, then forget all."""

    tenant: Name
    model: Name
    version: Sha256
    who: Text = ""
    at_ms: Number = 0


class ForgetVersion(_Command, frozen=True, kw_only=True, tag="forget"):
    """Drop a retired version, and with the last version the model."""

    tenant: Name
    model: Name
    version: Sha256


class PutTable(_Command, frozen=True, kw_only=True, tag="put_table"):
    """A table's version, named by the sha256 of its file, that is to go live once every node has it. Also one that was
    live before: that is a rollback."""

    name: Name
    version: Sha256
    schema: Annotated[str, Meta(max_length=limits.TABLE_SCHEMA_BYTES_MAX)]
    rows: Number
    bytes: Number
    who: Text = ""
    at_ms: Number = 0
    feed: Number = 0
    offsets: Annotated[tuple[Number, ...], Meta(max_length=limits.TABLE_FEED_PARTITIONS_MAX)] = ()


class FollowTopic(_Command, frozen=True, kw_only=True, tag="follow_topic"):
    """Have a table follow a topic of rows, in place of files and of any other topic."""

    name: Name
    topic: Annotated[str, Meta(min_length=1, max_length=249)]
    schema: Annotated[str, Meta(max_length=limits.TABLE_SCHEMA_BYTES_MAX)]
    every_ms: Number
    who: Text = ""
    at_ms: Number = 0


class UnfollowTopic(_Command, frozen=True, kw_only=True, tag="unfollow_topic"):
    """Leave a table as it is from now on; one that has no version yet goes."""

    name: Name


class FlipTable(_Command, frozen=True, kw_only=True, tag="flip_table"):
    """Make a table's version live on all nodes; `holders` must have its file already."""

    name: Name
    version: Sha256
    holders: Holders


class ForgetTable(_Command, frozen=True, kw_only=True, tag="forget_table"):
    """Drop a retired version of a table."""

    name: Name
    version: Sha256


class DropTable(_Command, frozen=True, kw_only=True, tag="drop_table"):
    """Drop a table with all its versions."""

    name: Name


class HoldBlob(_Command, frozen=True, kw_only=True, tag="hold"):
    """A node has a blob and has verified it, or (`held` false) has it no longer."""

    node: Name
    incarnation: Number
    blob: Sha256
    held: bool


class SetSettings(_Command, frozen=True, kw_only=True, tag="settings"):
    settings: Settings


class QuotaLimits(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one tenant may have in place of what each node's config allows all; None: that holds. What is not set is not
    written, so that a node of a release that has fewer limits can read it."""

    weight: Annotated[float, Meta(ge=limits.WEIGHT_MIN, le=limits.WEIGHT_MAX)] | None = None
    memory_mb: Annotated[int, Meta(ge=limits.MEMORY_MB_MIN, le=limits.MEMORY_MB_MAX)] | None = None
    rows_s_max: Annotated[float, Meta(ge=0, le=limits.ROWS_PER_SECOND_MAX)] | None = None
    models_max: Annotated[int, Meta(ge=0, le=limits.MODELS_PER_TENANT_MAX)] | None = None
    stored_bytes_max: Annotated[int, Meta(ge=0, le=limits.STORED_BYTES_MAX)] | None = None
    window_bytes_max: Annotated[int, Meta(ge=0, le=limits.WINDOW_BYTES_MAX)] | None = None


class SetQuota(_Command, frozen=True, kw_only=True, tag="quota"):
    """Of a tenant, known or not; without any limit its quota is dropped."""

    tenant: Name
    limits: QuotaLimits
    who: Text = ""
    at_ms: Number = 0


class GrowPartitions(_Command, frozen=True, kw_only=True, tag="grow"):
    count: Annotated[int, Meta(ge=1, le=limits.PARTITIONS_MAX)]


class _PartitionCommand(_Command, frozen=True, kw_only=True):
    partition: Annotated[int, Meta(ge=0, lt=limits.PARTITIONS_MAX)]
    epoch: Number
    """The partition's epoch as it was seen."""


class TakeOver(_PartitionCommand, frozen=True, kw_only=True, tag="take"):
    """Give a silent owner's partition to another. `lease` is the number of the owner's last renewal that was seen."""

    to: Name
    lease: Number = 0
    why: Reason = ""


class SetStandbys(_PartitionCommand, frozen=True, kw_only=True, tag="standbys"):
    standbys: Annotated[tuple[Name, ...], Meta(max_length=limits.STANDBYS_MAX)]


class StartMove(_PartitionCommand, frozen=True, kw_only=True, tag="move"):
    to: Name
    why: Reason = ""
    at_ms: Number = 0


class CancelMove(_PartitionCommand, frozen=True, kw_only=True, tag="cancel"):
    to: Name
    why: Reason = ""


class CompleteMove(_PartitionCommand, frozen=True, kw_only=True, tag="complete"):
    """Proposed by the owner once it has closed the partition, and by the leader when the owner reports so."""

    to: Name


Command: TypeAlias = (
    JoinNode
    | LeaveNode
    | RenewLease
    | DrainNode
    | PutTenant
    | PutFeatures
    | PutVersion
    | GoLive
    | StageVersion
    | QuarantineVersion
    | RetireVersion
    | ForgetVersion
    | PutTable
    | FollowTopic
    | UnfollowTopic
    | FlipTable
    | ForgetTable
    | DropTable
    | HoldBlob
    | SetSettings
    | SetQuota
    | GrowPartitions
    | TakeOver
    | SetStandbys
    | StartMove
    | CancelMove
    | CompleteMove
)
PartitionCommand: TypeAlias = TakeOver | SetStandbys | StartMove | CancelMove | CompleteMove

encoder = msgspec.msgpack.Encoder(order="deterministic")
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


def encode_command(command: Command) -> bytes:
    """Raises BoundExceeded over COMMAND_BYTES_MAX."""
    return bounded(encoder.encode(command), limits.COMMAND_BYTES_MAX, "a command", "make its texts shorter")


def decode_command(encoded: bytes) -> Command:
    """Raises CatalogCorrupt for bytes that are no command, or one with a field over its bound."""
    if len(encoded) > limits.COMMAND_BYTES_MAX:
        raise CatalogCorrupt(f"a command of {len(encoded)} bytes is over COMMAND_BYTES_MAX; propose a smaller one")
    try:
        return _commands.decode(encoded)
    except (msgspec.MsgspecError, UnicodeDecodeError) as failure:
        raise CatalogCorrupt(f"a command can't be read: {failure}; propose it again from the same release") from failure


def bounded(encoded: bytes, bytes_max: int, what: str, advice: str) -> bytes:
    """The bytes themselves. Raises BoundExceeded when they are more than `bytes_max`."""
    if len(encoded) > bytes_max:
        raise BoundExceeded(f"{what} of {len(encoded)} bytes is over {bytes_max}; {advice}")
    return encoded
