"""The cluster as the HTTP API shows it: the bodies of /v1/cluster, and what gives them.

Lags, snapshots and when a node was last heard of are known to the leader only. Any node answers with what the leader
says; while that can't be reached or can't be sure to lead still, with what the catalog says, and `complete` is false.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

import msgspec

from node.serving.view import Body

Role: TypeAlias = Literal["owner", "standby", "left"]
"""left: it still has the partition on disk, and is not to have it."""


class ClusterMember(Body, frozen=True):
    name: str
    raft_address: str
    peer_address: str
    rack: str = ""
    weight: float = 1.0
    incarnation: int = 1
    """Rises each time it starts with an empty disk."""
    draining: bool = False
    leader: bool = False
    lease: int = 0
    """Number of its last renewal."""
    heard_ms: int | None = None
    """Since the leader last heard of it; null: not since it leads, or not known here."""
    fresh: bool | None = None
    """Whether it was heard of within its lease; null: not known here."""
    tries_models: bool = False
    """It has just started, and opens nothing that it is given until it has tried its models."""
    owns: int = 0
    stands_by: int = 0


class ClusterReplica(Body, frozen=True):
    """One node's copy of one partition. What null is was not reported, or is not known here."""

    node: str
    role: Role
    offset: int | None = None
    """Where the changelog goes on after what it has folded."""
    frames_behind: int | None = None
    ms_behind: int | None = None
    serving: bool = False
    """The owner has it open."""
    snapshot_offset: int | None = None
    """Of the newest snapshot that the node has and has verified."""


class ClusterMove(Body, frozen=True):
    """A planned change of owner that is not done yet."""

    source: str
    to: str
    why: str
    since_ms: int
    waits_for: str
    """What has to happen next."""


class ClusterPartition(Body, frozen=True):
    number: int
    owner: str
    """'': nobody yet."""
    epoch: int
    replicas: list[ClusterReplica]
    """The owner's first."""
    move: ClusterMove | None = None
    reason: str = ""
    """Why it is not as it should be; '' while an owner serves it and stays."""


class ClusterModel(Body, frozen=True):
    """A version that some member has not got the bytes of."""

    tenant: str
    model: str
    version: str
    """Its first 12 hex digits."""
    state: str
    waits_for: list[str]
    """Members that lack the model file."""


class ClusterRefusal(Body, frozen=True):
    """A command that the catalog did not take."""

    command: str
    reason: str
    revision: int


class ClusterAgreement(Body, frozen=True):
    """Settings that hold for all nodes."""

    standbys: int
    lease_ms: int
    moves_max: int
    builds_max: int
    snapshot_holders_min: int


class ClusterStatus(Body, frozen=True):
    node: str
    """Whose knowledge this is."""
    leader: str | None
    complete: bool
    """Whether it is the leader's, while it has a lease: else lags, snapshots and ages are null."""
    ready: bool
    """Whether that node has caught up with a quorum."""
    revision: int
    now_ms: int
    settings: ClusterAgreement
    members: list[ClusterMember]
    partitions: list[ClusterPartition]
    models: list[ClusterModel]
    refusals: list[ClusterRefusal]
    """The last ones, newest last."""
    awaited: dict[str, str] = msgspec.field(default_factory=dict)
    """Nodes that may join and have not come yet -> Raft addresses. Each counts for a majority, as one that is down."""


class ClusterView(Protocol):
    async def cluster(self) -> ClusterStatus: ...

    def unready(self) -> Sequence[str]:
        """Why this node is no part of the cluster now, one line each; empty: it is."""
        ...
