"""Which version of which model is live: a state machine over immutable snapshots. Pure.

`apply` takes what happened and gives the next snapshot with what to do about it. For each model there is at most
one live version and at most one newer pair of files that is not live: on trial (`candidate`), `waiting` for a model
whose output it uses, or `refused`. Whatever becomes of the newer one, the live version goes on until a better one has
passed its trial.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import singledispatch
from typing import Literal, TypeAlias

import msgspec

from node.kernel import limits
from node.kernel.errors import ManifestError
from node.kernel.types import EventSchema, ModelName, ModelVersion, StoredOutput
from tenants.agreement import TrialReport
from tenants.expression import expression_name
from tenants.manifest import Manifest, TenantSettings, parse_manifest

NewestState: TypeAlias = Literal["candidate", "waiting", "refused"]


@dataclass(frozen=True, slots=True)
class Live:
    """`failing` is why the pool can't run it any more; '' while it can."""

    manifest: Manifest
    version: ModelVersion
    report: TrialReport
    live_since_ms: int
    failing: str = ""


@dataclass(frozen=True, slots=True)
class Newest:
    """The pair of files found last, unless it is the live one. `version` is '' where no manifest could be read."""

    state: NewestState
    version: str
    blob: str
    seen_at_ms: int
    problems: tuple[str, ...] = ()
    manifest: Manifest | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    name: ModelName
    live: Live | None = None
    newest: Newest | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All models and tenants known; `number` rises with each change."""

    number: int = 0
    models: Mapping[ModelName, Entry] = field(default_factory=dict)
    tenants: Mapping[str, TenantSettings] = field(default_factory=dict)

    @property
    def live(self) -> tuple[tuple[ModelVersion, Manifest], ...]:
        """What `compile_plan` takes, in order of the models' names."""
        entries = sorted(self.models.items())
        return tuple((entry.live.version, entry.live.manifest) for _, entry in entries if entry.live is not None)


# What happens


@dataclass(frozen=True, slots=True)
class PairSeen:
    """A whole pair of files is there; `blob` is the sha256 of the model file, '' when `may_take` spared the copy."""

    name: ModelName
    manifest: bytes
    blob: str
    at_ms: int


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
    """The pool can't run a live version any more; reason '': it can again."""

    name: ModelName
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class TenantSeen:
    settings: TenantSettings


@dataclass(frozen=True, slots=True)
class TenantGone:
    tenant: str


Event: TypeAlias = (
    PairSeen | PairRefused | PairGone | TrialPassed | TrialFailed | VersionFailing | TenantSeen | TenantGone
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
class Retire:
    version: ModelVersion


@dataclass(frozen=True, slots=True)
class WriteStatus:
    name: ModelName


@dataclass(frozen=True, slots=True)
class ConfigureTenant:
    settings: TenantSettings


@dataclass(frozen=True, slots=True)
class RemoveTenant:
    tenant: str


Action: TypeAlias = StartTrial | GoLive | Retire | WriteStatus | ConfigureTenant | RemoveTenant
Step: TypeAlias = tuple[Snapshot, tuple[Action, ...]]


def apply(snapshot: Snapshot, event: Event, schema: EventSchema) -> Step:
    """The next snapshot and what to do, in order. An event that changes nothing gives the same snapshot, no action."""
    return _apply(event, snapshot, schema)


def may_take(snapshot: Snapshot, name: ModelName, manifest: bytes, schema: EventSchema) -> bool:
    """Whether a pair with this manifest would be tried at all, so that its model file is worth a copy."""
    try:
        _checked(snapshot, name, manifest, schema)
    except ManifestError:
        return False
    return True


def text_features(manifest: Manifest) -> tuple[str, ...]:
    """The features whose values are texts, sorted."""
    return tuple(sorted(name for name, kind in manifest.feature_types.items() if kind == "text"))


@singledispatch
def _apply(event: Event, snapshot: Snapshot, schema: EventSchema) -> Step:
    raise TypeError(f"{type(event).__name__} is not an event of the registry")


@_apply.register
def _(event: PairSeen, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name, Entry(event.name))
    try:
        manifest = _checked(snapshot, event.name, event.manifest, schema)
    except ManifestError as error:
        refused = Newest("refused", "", event.blob, event.at_ms, error.problems)
        if entry.newest is not None and _same(entry.newest, refused):
            return snapshot, ()
        return _with(snapshot, replace(entry, newest=refused)), (WriteStatus(event.name),)
    if not event.blob:
        return snapshot, ()  # never tried without its file
    version = manifest.version(event.blob)
    if entry.live is not None and entry.live.version.version == version.version:
        if entry.newest is None:
            return snapshot, ()
        return _with(snapshot, replace(entry, newest=None)), (WriteStatus(event.name),)
    if entry.newest is not None and entry.newest.version == version.version:
        return snapshot, ()
    newest = Newest("candidate", version.version, event.blob, event.at_ms, manifest=manifest)
    return _tried(_with(snapshot, replace(entry, newest=newest)), event.name)


@_apply.register
def _(event: PairRefused, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name, Entry(event.name))
    refused = Newest("refused", "", "", event.at_ms, event.problems)
    if entry.newest is not None and _same(entry.newest, refused):
        return snapshot, ()
    if event.name not in snapshot.models:
        try:
            _check_place(snapshot, event.name)
        except ManifestError:
            return snapshot, ()
    return _with(snapshot, replace(entry, newest=refused)), (WriteStatus(event.name),)


@_apply.register
def _(event: PairGone, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name)
    if entry is None:
        return snapshot, ()
    left = {name: other for name, other in snapshot.models.items() if name != event.name}
    retired = (Retire(entry.live.version),) if entry.live is not None else ()
    return replace(snapshot, number=snapshot.number + 1, models=left), retired


@_apply.register
def _(event: TrialPassed, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name)
    tried = entry.newest if entry is not None else None
    if entry is None or tried is None or tried.manifest is None or not _on_trial(tried, event.version):
        return snapshot, ()
    version = tried.manifest.version(tried.blob, event.report.labels)
    live = Live(tried.manifest, version, event.report, event.at_ms)
    actions: list[Action] = [GoLive(version, text_features(tried.manifest))]
    if entry.live is not None:
        actions.append(Retire(entry.live.version))
    actions.append(WriteStatus(event.name))
    snapshot = _with(snapshot, Entry(event.name, live))
    for name, other in sorted(snapshot.models.items()):
        if other.newest is not None and other.newest.state == "waiting":
            snapshot, more = _tried(snapshot, name)
            actions.extend(more)
    return snapshot, tuple(actions)


@_apply.register
def _(event: TrialFailed, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name)
    if entry is None or entry.newest is None or not _on_trial(entry.newest, event.version):
        return snapshot, ()
    refused = replace(entry.newest, state="refused", problems=(f"{event.name.model}{event.suffix}: {event.reason}",))
    return _with(snapshot, replace(entry, newest=refused)), (WriteStatus(event.name),)


@_apply.register
def _(event: VersionFailing, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name)
    if entry is None or entry.live is None or entry.live.version.version != event.version:
        return snapshot, ()
    if entry.live.failing == event.reason:
        return snapshot, ()
    live = replace(entry.live, failing=event.reason)
    return _with(snapshot, replace(entry, live=live)), (WriteStatus(event.name),)


@_apply.register
def _(event: TenantSeen, snapshot: Snapshot, schema: EventSchema) -> Step:
    settings = event.settings
    known = snapshot.tenants.get(settings.tenant)
    if known == settings or (known is None and len(snapshot.tenants) >= limits.TENANTS_MAX):
        return snapshot, ()
    tenants = {**snapshot.tenants, settings.tenant: settings}
    return replace(snapshot, number=snapshot.number + 1, tenants=tenants), (ConfigureTenant(settings),)


@_apply.register
def _(event: TenantGone, snapshot: Snapshot, schema: EventSchema) -> Step:
    gone = [entry for name, entry in snapshot.models.items() if name.tenant == event.tenant]
    if not gone and event.tenant not in snapshot.tenants:
        return snapshot, ()
    return (
        Snapshot(
            snapshot.number + 1,
            {name: entry for name, entry in snapshot.models.items() if name.tenant != event.tenant},
            {tenant: settings for tenant, settings in snapshot.tenants.items() if tenant != event.tenant},
        ),
        (*(Retire(entry.live.version) for entry in gone if entry.live is not None), RemoveTenant(event.tenant)),
    )


def _with(snapshot: Snapshot, entry: Entry) -> Snapshot:
    return replace(snapshot, number=snapshot.number + 1, models={**snapshot.models, entry.name: entry})


def _same(one: Newest, other: Newest) -> bool:
    return (one.state, one.version, one.problems) == (other.state, other.version, other.problems)


def _on_trial(newest: Newest, version: str) -> bool:
    return newest.state == "candidate" and newest.version == version


def _checked(snapshot: Snapshot, name: ModelName, manifest: bytes, schema: EventSchema) -> Manifest:
    """Raises ManifestError."""
    _check_place(snapshot, name)
    return parse_manifest(f"{name.model}.toml", name.tenant, name.model, manifest, schema)


def _check_place(snapshot: Snapshot, name: ModelName) -> None:
    """Whether there is room for the model and its name is its own. Raises ManifestError."""
    file = f"{name.model}.toml"
    if name.tenant not in snapshot.tenants and len(snapshot.tenants) >= limits.TENANTS_MAX:
        raise ManifestError([f"{file}: the node has {limits.TENANTS_MAX} tenants already; ask its operator"])
    others = [other for other in snapshot.models if other != name]
    clashing = [str(other) for other in others if expression_name(other) == expression_name(name)]
    if clashing:
        raise ManifestError(
            [f"{file}: expressions can't tell {name} from {clashing[0]}, as '-' reads as '_'; rename one of them"]
        )
    if sum(other.tenant == name.tenant for other in others) >= limits.MODELS_PER_TENANT_MAX:
        raise ManifestError(
            [f"{file}: tenant {name.tenant} has {limits.MODELS_PER_TENANT_MAX} models already; delete one first"]
        )


def _missing(snapshot: Snapshot, manifest: Manifest) -> tuple[StoredOutput, ...]:
    """Outputs that the manifest uses and no live model gives; its own it may use, they are of the event before."""
    given = {
        StoredOutput(expression_name(version.name), output)
        for version, _ in snapshot.live
        for output in version.outputs
    }
    given |= {StoredOutput(expression_name(manifest.name), output) for output in manifest.outputs}
    return tuple(output for output in manifest.stored_outputs if output not in given)


def _tried(snapshot: Snapshot, name: ModelName) -> Step:
    """Start the trial of a model's newest pair, or leave it waiting for the models it needs."""
    entry = snapshot.models[name]
    newest = entry.newest
    assert newest is not None
    assert newest.manifest is not None
    missing = _missing(snapshot, newest.manifest)
    problems = tuple(
        f"{name.model}.toml: uses {output}, which no live model gives; it is tried as soon as one does"
        for output in missing
    )
    state: NewestState = "waiting" if missing else "candidate"
    if newest.state == "waiting" and problems == newest.problems:
        return snapshot, ()
    after = _with(snapshot, replace(entry, newest=replace(newest, state=state, problems=problems)))
    if missing:
        return after, (WriteStatus(name),)
    version = newest.manifest.version(newest.blob)
    return after, (StartTrial(version, text_features(newest.manifest)), WriteStatus(name))


# Kept over restarts


class _SavedModel(msgspec.Struct, frozen=True):
    tenant: str
    model: str
    manifest: str
    blob: str
    report: TrialReport
    live_since_ms: int


class _Saved(msgspec.Struct, frozen=True):
    format: Literal[1]
    models: tuple[_SavedModel, ...]
    tenants: tuple[TenantSettings, ...]


def encode(snapshot: Snapshot) -> bytes:
    """The live versions and the tenants as JSON, so that a restarted node is live at once, without new trials."""
    models = tuple(
        _SavedModel(
            name.tenant,
            name.model,
            entry.live.manifest.text.decode(),
            entry.live.version.blob,
            entry.live.report,
            entry.live.live_since_ms,
        )
        for name, entry in sorted(snapshot.models.items())
        if entry.live is not None
    )
    return msgspec.json.encode(_Saved(1, models, tuple(snapshot.tenants.values())))


def decode(content: bytes, schema: EventSchema) -> tuple[Snapshot, tuple[str, ...]]:
    """What `encode` gave, and one line for each mistake of a model that the schema, changed since, does not allow.

    Those are left out: their pairs are found again and answered in their status files. Raises ManifestError when the
    content is damaged.
    """
    try:
        saved = msgspec.json.decode(content, type=_Saved)
    except msgspec.MsgspecError as error:
        raise ManifestError(
            [f"the kept registry is damaged ({error}); remove it, all models are tried again"]
        ) from None
    models: dict[ModelName, Entry] = {}
    problems: list[str] = []
    for model in saved.models:
        name = ModelName(model.tenant, model.model)
        try:
            manifest = parse_manifest(f"{name}.toml", model.tenant, model.model, model.manifest.encode(), schema)
        except ManifestError as error:
            problems.extend(error.problems)
            continue
        version = manifest.version(model.blob, model.report.labels)
        models[name] = Entry(name, Live(manifest, version, model.report, model.live_since_ms))
    tenants = {settings.tenant: settings for settings in saved.tenants}
    return Snapshot(1, models, tenants), tuple(problems)


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
    elif live is not None:
        told |= {"problems": [live.failing] if live.failing else [], **_live_status(live)}
    if newest is not None and live is not None:
        told["running"] = _live_status(live)
    return told


def _state(entry: Entry) -> str:
    if entry.newest is not None:
        return entry.newest.state
    return "failing" if entry.live is not None and entry.live.failing else "live"


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
