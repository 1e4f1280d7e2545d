"""(P) What a cluster agrees on: the catalog as a value, and the rule by which a command may change it.

Mappings are to be treated as frozen: a change makes another catalog, with the next revision.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from node.kernel.table_versions import Table
from replication.commands import Command, QuotaLimits, Settings

VersionState: TypeAlias = Literal["passed", "staged", "live", "retired", "quarantined"]
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
    joined_revision: int = 0
    """Of the catalog that had it as this incarnation first."""


class Tenant(Struct, frozen=True):
    name: str
    settings: str
    who: str
    at_ms: int
    revision: int = 0
    features: str = ""
    """Its features.toml, '' without one."""


class TenantQuota(Struct, frozen=True):
    """What operators allow a tenant, and who did so last."""

    limits: QuotaLimits
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
    reason: str = ""
    """Why it was brought to its state, as whoever did it said."""
    served_revision: int = 0
    """When it last went live; 0: never. What is fallen back to is the retired one with the highest."""
    stages: tuple[str, ...] = ()
    stage: int = 0
    """Which of its stages it is in, while it is staged."""


class Change(Struct, frozen=True, array_like=True):
    """One change of what runs of a model: `version` became `to`; `at_ms` by the proposer's clock."""

    at_ms: int
    version: str
    to: str
    who: str
    reason: str = ""


class Model(Struct, frozen=True):
    """A tenant's model: at most one version is live; `live_revision` is where it went live, on every node alike."""

    tenant: str
    model: str
    versions: dict[str, Version]
    live: str = ""
    live_revision: int = 0
    revision: int = 0
    history: tuple[Change, ...] = ()
    """The last changes, the newest last."""

    @property
    def staged(self) -> Version | None:
        return next((version for version in self.versions.values() if version.state == "staged"), None)

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
    quotas: dict[str, TenantQuota] = {}
    """By tenant, known or not."""
    models: dict[str, Model] = {}
    """By `model_key`."""
    tables: dict[str, Table] = {}
    holders: dict[str, dict[str, int]] = {}
    """Blob sha256 -> node that has and has verified it -> revision since when."""
    partitions: tuple[Assignment, ...] = ()
    text_bytes: int = 0
    """Of all manifests, reports and tenants' settings."""
    refusals: tuple[Refusal, ...] = ()
    """The last ones."""
    features_revision: int = 0
    """When any tenant's shared features last changed."""

    def version(self, tenant: str, model: str, version: str) -> Version | None:
        found = self.models.get(model_key(tenant, model))
        return None if found is None else found.versions.get(version)


def model_key(tenant: str, model: str) -> str:
    return f"{tenant}/{model}"


# the rule


def stale(what: str, changed: int, command: Command) -> str:
    if changed <= command.revision:
        return ""
    return f"{what} changed at revision {changed}, after {command.revision}; read the catalog and decide anew"


def addition_stale(catalog: Catalog, command: Command) -> str:
    return stale("what may be added", catalog.removed_revision, command)


Kept = TypeVar("Kept", Node, Tenant, Model, TenantQuota)


def put(kept: Mapping[str, Kept], key: str, new: Kept) -> dict[str, Kept]:
    return {**kept, key: new}


def advanced(catalog: Catalog, **changes: Any) -> Catalog:
    return replace(catalog, revision=catalog.revision + 1, **changes)


Outcome: TypeAlias = Catalog | str
"""The next catalog, or why not."""
