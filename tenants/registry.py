"""(P) What is known of tenants and their models, what happens to them and what is done about it.

A `Snapshot` is immutable; `tenants.transitions` gives the next one for each event. For each model there is at most one
live version and at most one newer pair of files that is not live: on trial (`candidate`), `waiting` for a model
whose output it uses, or `refused`. Whatever becomes of the newer one, the live version goes on until a better one has
passed its trial, and has gone through the stages beside it that its manifest asks for (`Staged`).

In a cluster (`Snapshot.shared` is not None) the directory is this node's own, and what is live is not: a pair that
passed is published (`publications`), and it is the catalog, told by `Agreed`, that makes versions live, on every node
the same whatever its directory holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from node.kernel import limits
from node.kernel.types import AgreedModels, AgreedVersion, ModelName, ModelVersion, Quota, StageChange, StagedVersion
from tenants.agreement import TrialReport
from tenants.definitions import NOTHING_SHARED, Definitions
from tenants.manifest import Manifest, TenantSettings
from tenants.sharing import Neighbours
from tenants.stage import Promote, RollBack, Stage

NewestState: TypeAlias = Literal[
    "candidate", "waiting", "refused", "quarantined", "shadow", "canary", "passed", "rolling out", "retired"
]
"""The last three in a cluster only: to be published; agreed, but not live yet; agreed, and replaced or withdrawn."""
AUTOMATIC = "auto"
"""Who: the node itself, by the conditions of the manifest."""
TENANT = "tenant"
"""Who: whoever put the files there."""
_COMING = ("candidate", "waiting", "shadow", "canary", "passed", "rolling out")
NOT_HERE = "its model file is not here yet; it is fetched from the other nodes, and its triggers wait meanwhile"


Files: TypeAlias = tuple[tuple[int, ...], ...]
"""What tells the files of a pair from those that were there before, were they the same bytes."""


@dataclass(frozen=True, slots=True)
class Live:
    """`failing` is why the pool can't run it any more; '' while it can. `at_fault`: by its own fault."""

    manifest: Manifest
    version: ModelVersion
    report: TrialReport
    live_since_ms: int
    failing: str = ""
    at_fault: bool = False


@dataclass(frozen=True, slots=True)
class Staged:
    """A version that passed its trial and runs beside the live one; `stage` counts its manifest's stages from 0."""

    manifest: Manifest
    version: ModelVersion
    report: TrialReport
    stage: int
    since_ms: int
    who: str
    reason: str = ""
    failing: str = ""
    """As of `Live`, as is `at_fault`."""
    at_fault: bool = False

    @property
    def asked(self) -> Stage:
        return self.manifest.rollout[self.stage]

    @property
    def beside(self) -> StagedVersion:
        return StagedVersion(self.version, self.asked.kind, self.asked.share)


@dataclass(frozen=True, slots=True)
class Newest:
    """The pair of files found last, unless it is the live one. `version` is '' where no manifest could be read."""

    state: NewestState
    version: str
    blob: str
    seen_at_ms: int
    problems: tuple[str, ...] = ()
    manifest: Manifest | None = None
    report: TrialReport | None = None
    """Of the state "passed"."""
    files: Files = ()

    def says(self, other: Newest) -> bool:
        """The same to its tenant as another."""
        return (self.state, self.version, self.problems) == (other.state, other.version, other.problems)


@dataclass(frozen=True, slots=True)
class Unserved:
    """What the cluster made live and this node can't run: in no plan of this node, which says so."""

    version: str
    blob: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """`previous` was live before `live`, and is again when that one fails; `quarantined` are versions that failed, with
    the reason. Both are those of a node by itself: in a cluster the catalog has them."""

    name: ModelName
    live: Live | None = None
    newest: Newest | None = None
    unserved: Unserved | None = None
    previous: Live | None = None
    quarantined: Mapping[str, str] = field(default_factory=dict)
    staged: Staged | None = None
    history: tuple[StageChange, ...] = ()
    """The last changes, the newest last."""

    @property
    def running(self) -> list[Manifest]:
        return [one.manifest for one in (self.live, self.staged) if one is not None]

    @property
    def empty(self) -> bool:
        """Whether nothing is left but what was."""
        return replace(self, history=()) == Entry(self.name)

    def remembering(self, *changes: StageChange) -> Entry:
        """With these changes, from now on the newest."""
        told = [replace(one, reason=one.reason[: limits.STAGE_REASON_BYTES_MAX]) for one in changes]
        return replace(self, history=(*self.history, *told)[-limits.STAGE_HISTORY_MAX :])


Catalogued: TypeAlias = Mapping[ModelName, Mapping[str, AgreedVersion]]
"""What the catalog knows of each model, by version."""


@dataclass(frozen=True, slots=True)
class Shared:
    """What a node of a cluster knows beside its models.

    `taken` and `taken_settings` are kept over restarts: the version of each pair of this node's directory that the
    catalog has had, and the text of each tenant.toml. Only what is remembered is deleted: a lost disk deletes nothing.
    `asked` are tenants' settings yet to be published, `gone` are models yet to be withdrawn. `taken_features` and
    `asked_features` are the same of each features.toml.
    """

    versions: Catalogued = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    taken: Mapping[ModelName, str] = field(default_factory=dict)
    taken_settings: Mapping[str, str] = field(default_factory=dict)
    asked: Mapping[str, TenantSeen] = field(default_factory=dict)
    gone: frozenset[ModelName] = frozenset()
    taken_features: Mapping[str, str] = field(default_factory=dict)
    asked_features: Mapping[str, str] = field(default_factory=dict)
    coming: Mapping[ModelName, tuple[Manifest, ...]] = field(default_factory=dict)
    """The catalog's versions that do not run here and are to, or do on other nodes."""
    fallbacks: Mapping[ModelName, Manifest] = field(default_factory=dict)
    """Those that are live again once the live ones fail."""

    def version(self, name: ModelName, version: str) -> AgreedVersion | None:
        return self.versions.get(name, {}).get(version)

    def standing(self, name: ModelName, version: str) -> str:
        """The version's state in the catalog, '' when it is not there."""
        known = self.version(name, version)
        return known.state if known is not None else ""

    def has_fallback(self, name: ModelName) -> bool:
        """Whether a version was live before that may be again."""
        return any(known.fallback for known in self.versions.get(name, {}).values())

    def overtaken(self, name: ModelName, version: str) -> bool:
        """Whether another version was put after this one, and not taken back: not one that it was to replace, which
        may be live again."""
        known = self.version(name, version)
        since = known.put if known is not None else 0
        others = (other for other in self.versions.get(name, {}).values() if other.version != version)
        return any(other.put > since for other in others if other.state in ("passed", "staged", "live"))

    def newest(self, name: ModelName) -> str:
        """The version of the model that was put last, unless it was taken back; '' without one."""
        by_state = {known.state: version for version, known in self.versions.get(name, {}).items()}
        return by_state.get("passed") or by_state.get("staged") or by_state.get("live") or ""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All models and tenants known; `number` rises with each change. `shared` is None without a cluster.

    `definitions` are the shared features in force; `refused_features` says of a tenant why its newest features.toml
    is not.
    """

    number: int = 0
    models: Mapping[ModelName, Entry] = field(default_factory=dict)
    tenants: Mapping[str, TenantSettings] = field(default_factory=dict)
    shared: Shared | None = None
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    """Tenant, known or not -> what operators allow it."""
    definitions: Definitions = NOTHING_SHARED
    refused_features: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def live(self) -> tuple[tuple[ModelVersion, Manifest], ...]:
        """What `compile_plan` takes, in order of the models' names."""
        entries = sorted(self.models.items())
        return tuple((entry.live.version, entry.live.manifest) for _, entry in entries if entry.live is not None)

    def settings(self, tenant: str) -> TenantSettings:
        """Those that hold for the tenant, known already or not."""
        return self.tenants.get(tenant) or self.trial_settings(tenant)

    def trial_settings(self, tenant: str) -> TenantSettings:
        """Those for a trial: what this node's tenant.toml asks for, also while the cluster has yet to hear of it."""
        asked = self.shared.asked.get(tenant) if self.shared is not None else None
        if asked is None:
            return self.tenants.get(tenant) or self.granted(TenantSettings(tenant))
        return self.granted(asked.settings)

    def granted(self, settings: TenantSettings) -> TenantSettings:
        """Under the tenant's quota, if it has one."""
        quota = self.quotas.get(settings.tenant)
        return settings if quota is None else settings.granted(quota.limits())

    @property
    def beside(self) -> tuple[tuple[StagedVersion, Manifest], ...]:
        """What runs beside the live versions, in order of the models' names."""
        entries = (entry.staged for _, entry in sorted(self.models.items()) if entry.live is not None)
        return tuple((staged.beside, staged.manifest) for staged in entries if staged is not None)

    def on_trial(self, name: ModelName, version: str) -> bool:
        newest = self.models[name].newest if name in self.models else None
        return newest is not None and newest.state == "candidate" and newest.version == version

    def with_entry(self, entry: Entry) -> Snapshot:
        return replace(self, number=self.number + 1, models={**self.models, entry.name: entry})

    def without(self, name: ModelName) -> Snapshot:
        left = {other: entry for other, entry in self.models.items() if other != name}
        return replace(self, number=self.number + 1, models=left)

    def sharing(self, **changes: Any) -> Snapshot:
        """With other values of `shared`, which is there; the same object when they are no others."""
        assert self.shared is not None
        shared = replace(self.shared, **changes)
        return self if shared == self.shared else replace(self, number=self.number + 1, shared=shared)

    @property
    def watched(self) -> frozenset[ModelName]:
        """The models whose files are, or were, in this node's directory."""
        if self.shared is None:
            return frozenset(self.models)
        found = (name for name, entry in self.models.items() if entry.newest is not None)
        return frozenset((*self.shared.taken, *found))

    @property
    def watched_tenants(self) -> frozenset[str]:
        """The tenants whose folders are, or were, in this node's directory."""
        if self.shared is None:
            return frozenset(self.tenants)
        named = {name.tenant for name in self.watched - self.shared.gone}
        return frozenset(named | self.shared.taken_settings.keys() | self.shared.asked.keys())


# What happens


@dataclass(frozen=True, slots=True)
class PairSeen:
    """A whole pair of files is there; `blob` is the sha256 of the model file, '' when `may_take` spared the copy.

    `first`: it was there when the node started, so it may be old. `files`: one that failed its trial is tried again
    once these are others.
    """

    name: ModelName
    manifest: bytes
    blob: str
    at_ms: int
    first: bool = False
    files: Files = ()


@dataclass(frozen=True, slots=True)
class PairRefused:
    """A pair of files that can't even be read, with the lines for its tenant."""

    name: ModelName
    problems: tuple[str, ...]
    at_ms: int


@dataclass(frozen=True, slots=True)
class PairGone:
    name: ModelName


@dataclass(frozen=True, slots=True)
class TrialPassed:
    name: ModelName
    version: str
    report: TrialReport
    at_ms: int


@dataclass(frozen=True, slots=True)
class TrialFailed:
    """`suffix` is that of the file at fault."""

    name: ModelName
    version: str
    reason: str
    at_ms: int
    suffix: str = ".joblib"


@dataclass(frozen=True, slots=True)
class VersionFailing:
    """The pool can't run a live version any more; reason '': it can again.

    `at_fault`: the model itself is to blame, so it gives way to the version before it.
    """

    name: ModelName
    version: str
    reason: str
    at_ms: int = 0
    at_fault: bool = False


@dataclass(frozen=True, slots=True)
class TenantSeen:
    """`text` is that of the tenant.toml, '' without one; `first` as of a pair."""

    settings: TenantSettings
    text: str = ""
    first: bool = False


@dataclass(frozen=True, slots=True)
class TenantGone:
    tenant: str


@dataclass(frozen=True, slots=True)
class QuotaSet:
    """Of a node by itself: an operator has changed what the tenant may have. `caps` are those for all tenants."""

    tenant: str
    quota: Quota
    caps: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class FeaturesSeen:
    """What a tenant's features.toml says now, '' without one; `first` as of a pair."""

    tenant: str
    text: str
    first: bool = False


@dataclass(frozen=True, slots=True)
class FeaturesUnreadable:
    """A features.toml that can't even be read, with the lines for its tenant."""

    tenant: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the catalog says now. `unfit` are live models of it that customers' rows can't hold, with the reason."""

    models: AgreedModels
    settings: Mapping[str, TenantSettings]
    """Of the tenants in `models`."""
    at_ms: int
    unfit: Mapping[ModelName, str] = field(default_factory=dict)
    stages: bool = True
    """False: nothing runs beside what is live, as customers' rows can't hold both."""


@dataclass(frozen=True, slots=True)
class Published:
    """The catalog has it, as `Agreed` said before."""

    publication: Publication


@dataclass(frozen=True, slots=True)
class NotPublished:
    """It is tried again."""

    publication: Publication
    reason: str


Event: TypeAlias = (
    PairSeen
    | PairRefused
    | PairGone
    | TrialPassed
    | TrialFailed
    | VersionFailing
    | Promote
    | RollBack
    | TenantSeen
    | TenantGone
    | QuotaSet
    | FeaturesSeen
    | FeaturesUnreadable
    | Agreed
    | Published
    | NotPublished
)

# What to do about it


@dataclass(frozen=True, slots=True)
class StartTrial:
    version: ModelVersion
    text_features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GoLive:
    version: ModelVersion
    text_features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunBeside:
    """As a shadow or canary."""

    version: ModelVersion
    text_features: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Retire:
    version: ModelVersion


@dataclass(frozen=True, slots=True)
class WriteStatus:
    name: ModelName


@dataclass(frozen=True, slots=True)
class WriteFeaturesStatus:
    tenant: str


@dataclass(frozen=True, slots=True)
class ConfigureTenant:
    settings: TenantSettings


@dataclass(frozen=True, slots=True)
class RemoveTenant:
    tenant: str


@dataclass(frozen=True, slots=True)
class PutTenant:
    tenant: str
    text: str


@dataclass(frozen=True, slots=True)
class PutFeatures:
    tenant: str
    text: str


@dataclass(frozen=True, slots=True)
class PutVersion:
    name: ModelName
    version: str
    blob: str
    manifest: str
    report: TrialReport
    stages: tuple[str, ...] = ()
    """What it is to go through beside the live one."""


@dataclass(frozen=True, slots=True)
class Withdraw:
    name: ModelName
    version: str


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A version that failed on this node, to be stopped on all; one that is live is replaced by the one before it."""

    name: ModelName
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class CountRefusal:
    """A pair was refused because of the quota `limit` of its tenant."""

    tenant: str
    limit: str


Publication: TypeAlias = PutTenant | PutFeatures | PutVersion | Withdraw | Quarantine
Action: TypeAlias = (
    StartTrial
    | GoLive
    | RunBeside
    | Retire
    | WriteStatus
    | WriteFeaturesStatus
    | ConfigureTenant
    | RemoveTenant
    | CountRefusal
)
Step: TypeAlias = tuple[Snapshot, tuple[Action, ...]]


def prospect(snapshot: Snapshot) -> list[tuple[ModelVersion, Manifest]]:
    """What runs once all that this node has passed does: what `compile_plan` takes."""
    models: list[tuple[ModelVersion, Manifest]] = []
    for _, entry in sorted(snapshot.models.items()):
        newest, live = entry.newest, entry.live
        if newest is not None and newest.manifest is not None and newest.state in ("passed", "rolling out"):
            models.append((newest.manifest.version(newest.blob), newest.manifest))
            if live is not None and newest.manifest.rollout:
                models.append(under_key(StagedVersion(live.version, "shadow"), live.manifest))
        elif live is not None:
            models.append((live.version, live.manifest))
    return [*models, *(under_key(*beside) for beside in snapshot.beside)]


def under_key(staged: StagedVersion, manifest: Manifest) -> tuple[ModelVersion, Manifest]:
    """What a plan that has the live version too is compiled with."""
    return replace(staged.version, name=staged.key), manifest


def neighbours(snapshot: Snapshot) -> Neighbours:
    """The models as they run, and as they are to run once all that was found has passed."""
    live = {manifest.name: manifest for _, manifest in snapshot.live}
    found = [entry.newest for entry in snapshot.models.values() if entry.newest is not None]
    coming = [one.manifest for one in found if one.state in _COMING]
    wished = {manifest.name: manifest for manifest in coming if manifest is not None}
    return Neighbours(live, {**live, **wished}, snapshot.definitions)


def publications(snapshot: Snapshot) -> tuple[Publication, ...]:
    """What this node has yet to tell the cluster, in the order in which it can be taken."""
    shared = snapshot.shared
    if shared is None:
        return ()
    tenants = [PutTenant(tenant, seen.text) for tenant, seen in sorted(shared.asked.items())]
    features = [PutFeatures(tenant, text) for tenant, text in sorted(shared.asked_features.items())]
    versions = [
        PutVersion(
            name,
            newest.version,
            newest.blob,
            newest.manifest.text.decode(),
            newest.report,
            tuple(map(str, newest.manifest.rollout)),
        )
        for name, entry in sorted(snapshot.models.items())
        if (newest := entry.newest) is not None and newest.state == "passed" and newest.manifest and newest.report
    ]
    failed = [
        Quarantine(name, entry.live.version.version, entry.live.failing)
        for name, entry in sorted(snapshot.models.items())
        if entry.live is not None and entry.live.at_fault and shared.has_fallback(name)
    ]
    failed += [
        Quarantine(name, entry.staged.version.version, f"in stage {entry.staged.asked}: {entry.staged.failing}")
        for name, entry in sorted(snapshot.models.items())
        if entry.staged is not None and entry.staged.at_fault
    ]
    return (
        *tenants,
        *features,
        *versions,
        *(Withdraw(name, shared.taken.get(name, "")) for name in sorted(shared.gone)),
        *failed,
    )


def quarantine_problem(name: ModelName, reason: str) -> str:
    why = reason or "an operator has rolled it back and gave no reason"
    return (
        f"{name.model}.joblib: quarantined, and the version before it runs: {why}; drop a mended pair, which"
        " is another version"
    )


def text_features(manifest: Manifest) -> tuple[str, ...]:
    """The features whose values are texts, sorted."""
    return tuple(sorted(name for name, kind in manifest.feature_types.items() if kind == "text"))


# Told to the tenant


def status(snapshot: Snapshot, name: ModelName) -> dict[str, object]:
    """What `<model>.status.json` and the admin API say of a model."""
    entry = snapshot.models[name]
    newest, live = entry.newest, entry.live
    told: dict[str, object] = {"model": str(name), "state": _state(entry)}
    if newest is not None:
        told |= {
            "problems": list(newest.problems),
            "version": newest.version,
            "sha256": newest.blob,
            "seen_at_ms": newest.seen_at_ms,
        }
        if newest.manifest is not None:
            told["columns"] = [feature.name for feature in newest.manifest.features]
    elif entry.unserved is not None:
        unserved = entry.unserved
        told |= {"problems": list(unserved.problems), "version": unserved.version, "sha256": unserved.blob}
    elif live is not None:
        told |= {"problems": [live.failing] if live.failing else [], **_live_status(live)}
    if newest is not None and live is not None:
        told["running"] = _live_status(live)
    if entry.staged is not None:
        told["stage"] = _stage_status(entry.staged)
    told["history"] = [
        {"at_ms": one.at_ms, "version": one.version, "to": one.to, "who": one.who, "reason": one.reason}
        for one in entry.history
    ]
    return told


def features_status(snapshot: Snapshot, tenant: str) -> dict[str, object]:
    """What `features.status.json` says of a tenant's shared features."""
    shared, refused = snapshot.shared, snapshot.refused_features.get(tenant, ())
    asked = shared is not None and tenant in shared.asked_features
    problems = [*refused, *snapshot.definitions.problems.get(tenant, ())]
    if asked:
        problems.append("features.toml: is not agreed by the cluster yet; it is tried again until it is")
    names = [str(name) for name, feature in snapshot.definitions.features.items() if feature.offer.owner == tenant]
    return {
        "tenant": tenant,
        "state": "refused" if refused else "rolling out" if asked else "live",
        "problems": problems,
        "in_force": sorted(names),
    }


def _stage_status(staged: Staged) -> dict[str, object]:
    return {
        "version": staged.version.version,
        "stage": str(staged.asked),
        "number": staged.stage + 1,
        "of": len(staged.manifest.rollout),
        "since_ms": staged.since_ms,
        "problems": [staged.failing] if staged.failing else [],
    }


def _state(entry: Entry) -> str:
    if entry.newest is not None:
        return entry.newest.state
    return "failing" if entry.live is None or entry.live.failing else "live"


def _live_status(live: Live) -> dict[str, object]:
    report = live.report
    return {
        "version": live.version.version,
        "sha256": live.version.blob,
        "columns": list(live.version.features),
        "outputs": list(live.version.outputs),
        "labels": list(live.version.labels),
        "class": report.class_name,
        "seconds_per_call": report.seconds_per_call,
        "seconds_per_row": report.seconds_per_row,
        "memory_bytes": report.memory_bytes,
        "notes": list(report.notes),
        "live_since_ms": live.live_since_ms,
    }
