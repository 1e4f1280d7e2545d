"""(P) Which version of which model is live: what happened, and the snapshot after it.

A node by itself and a node of a cluster go the same way as far as the trial; `tenants.standing` has what is different.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

from node.kernel import limits
from node.kernel.errors import ManifestError, QuotaRefused
from node.kernel.types import EventSchema, ModelName, StageChange, StoredOutput
from tenants import feature_files, sharing, stages, standing
from tenants.expression import expression_name
from tenants.manifest import Manifest, parse_manifest
from tenants.quotas import check_quota
from tenants.registry import (
    AUTOMATIC,
    TENANT,
    Action,
    Agreed,
    ConfigureTenant,
    CountRefusal,
    Entry,
    Event,
    FeaturesSeen,
    FeaturesUnreadable,
    GoLive,
    Live,
    Newest,
    NewestState,
    NotPublished,
    PairGone,
    PairRefused,
    PairSeen,
    Published,
    QuotaSet,
    RemoveTenant,
    Retire,
    Snapshot,
    StartTrial,
    Step,
    TenantGone,
    TenantSeen,
    TrialFailed,
    TrialPassed,
    VersionFailing,
    WriteStatus,
    neighbours,
    quarantine_problem,
    text_features,
)
from tenants.stage import Promote, RollBack


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


@singledispatch
def _apply(event: Event, snapshot: Snapshot, schema: EventSchema) -> Step:
    raise TypeError(f"{type(event).__name__} is not an event of the registry")


@_apply.register
def _(event: PairSeen, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name, Entry(event.name))
    if snapshot.shared is not None:
        snapshot = snapshot.sharing(gone=snapshot.shared.gone - {event.name})
    try:
        manifest = _checked(snapshot, event.name, event.manifest, schema)
    except ManifestError as error:
        refused = Newest("refused", "", event.blob, event.at_ms, error.problems)
        if entry.newest is not None and entry.newest.says(refused):
            return snapshot, ()
        counted = (CountRefusal(event.name.tenant, error.limit),) if isinstance(error, QuotaRefused) else ()
        return snapshot.with_entry(replace(entry, newest=refused)), (WriteStatus(event.name), *counted)
    if not event.blob:
        return snapshot, ()  # never tried without its file
    version = manifest.version(event.blob)
    if snapshot.shared is not None:
        known = standing.pair_known(snapshot, snapshot.shared, event, manifest)
        if known is not None:
            return known
    elif entry.live is not None and entry.live.version.version == version.version:
        if entry.newest is None and entry.staged is None:
            return snapshot, ()
        return _live_again(snapshot, entry, entry.live, event)
    elif entry.staged is not None and entry.staged.version.version == version.version:
        newest = stages.found_again(entry.staged, event.at_ms)
        same = entry.newest is not None and entry.newest.says(newest)
        return (
            (snapshot, ()) if same else (snapshot.with_entry(replace(entry, newest=newest)), (WriteStatus(event.name),))
        )
    if entry.newest is not None and entry.newest.version == version.version and not _dropped_anew(entry.newest, event):
        return snapshot, ()
    if version.version in entry.quarantined:
        problem = quarantine_problem(event.name, entry.quarantined[version.version])
        found = Newest("quarantined", version.version, event.blob, event.at_ms, (problem,), manifest)
        return snapshot.with_entry(replace(entry, newest=found)), (WriteStatus(event.name),)
    newest = Newest("candidate", version.version, event.blob, event.at_ms, manifest=manifest, files=event.files)
    return _tried(snapshot.with_entry(replace(entry, newest=newest)), event.name)


def _dropped_anew(newest: Newest, event: PairSeen) -> bool:
    """Whether the same pair is there once more, so that it is to be tried once more."""
    return newest.state == "retired" or (newest.state == "refused" and newest.files != event.files)


def _live_again(snapshot: Snapshot, entry: Entry, live: Live, event: PairSeen) -> Step:
    """The live pair was put back: nothing is to replace it any more."""
    actions: list[Action] = []
    after = replace(entry, newest=None)
    if entry.staged is not None:
        why = "the live version's files were put back"
        after, gone = stages.taken_back(after, entry.staged, TENANT, why, event.at_ms)
        actions = [GoLive(live.version, text_features(live.manifest)), *gone]
    return snapshot.with_entry(after), (*actions, WriteStatus(event.name))


@_apply.register
def _(event: PairRefused, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name, Entry(event.name))
    refused = Newest("refused", "", "", event.at_ms, event.problems)
    if entry.newest is not None and entry.newest.says(refused):
        return snapshot, ()
    if event.name not in snapshot.models:
        try:
            _check_place(snapshot, event.name)
        except ManifestError:
            return snapshot, ()
    return snapshot.with_entry(replace(entry, newest=refused)), (WriteStatus(event.name),)


@_apply.register
def _(event: PairGone, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name)
    users = sharing.kept_for(event.name, neighbours(snapshot))
    if entry is not None and users:
        return _kept(snapshot, entry, users)
    if snapshot.shared is not None:
        return standing.pair_gone(snapshot, snapshot.shared, entry or Entry(event.name)), ()
    if entry is None:
        return snapshot, ()
    return snapshot.without(event.name), tuple(_retired(entry))


def _kept(snapshot: Snapshot, entry: Entry, users: str) -> Step:
    """A model whose files were deleted while others use its outputs."""
    problem = f"{entry.name.model}: its files are gone, and it goes on: its outputs are used by {users}"
    refused = Newest("refused", "", "", entry.live.live_since_ms if entry.live is not None else 0, (problem,))
    if entry.newest is not None and entry.newest.says(refused):
        return snapshot, ()
    return snapshot.with_entry(replace(entry, newest=refused)), (WriteStatus(entry.name),)


@_apply.register
def _(event: TrialPassed, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name)
    tried = entry.newest if entry is not None and snapshot.on_trial(event.name, event.version) else None
    if entry is None or tried is None or tried.manifest is None:
        return snapshot, ()
    try:
        _checked(snapshot, event.name, tried.manifest.text, schema)
    except ManifestError as error:  # others changed meanwhile
        refused = replace(tried, state="refused", version="", problems=error.problems)
        return snapshot.with_entry(replace(entry, newest=refused)), (WriteStatus(event.name),)
    version = tried.manifest.version(tried.blob, event.report.labels)
    live = Live(tried.manifest, version, event.report, event.at_ms)
    stays = entry.live if tried.manifest.rollout and entry.live is not None and not entry.live.failing else None
    if stays is not None and (unlike := stages.unlike(stays.version, version)):
        failed = TrialFailed(event.name, event.version, unlike, event.at_ms, ".toml")
        return _apply(failed, snapshot, schema)
    if snapshot.shared is not None:
        passed = replace(tried, state="passed", report=event.report)
        return snapshot.with_entry(replace(entry, newest=passed)), (WriteStatus(event.name),)
    if stays is not None:
        begun, begin = stages.begin(entry, live, event.at_ms)
        return snapshot.with_entry(begun), begin
    actions: list[Action] = [GoLive(version, text_features(tried.manifest))]
    actions.extend(_retired(entry))
    actions.append(WriteStatus(event.name))
    good = entry.live if entry.live is not None and not entry.live.failing else entry.previous
    after = Entry(event.name, live, previous=good, quarantined=entry.quarantined, history=entry.history)
    after = after.remembering(StageChange(event.at_ms, event.version, "live", TENANT, "passed its trial"))
    snapshot, more = _without_wait(snapshot.with_entry(after))
    return snapshot, (*actions, *more)


@_apply.register
def _(event: TrialFailed, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name)
    if entry is None or entry.newest is None or not snapshot.on_trial(event.name, event.version):
        return snapshot, ()
    refused = replace(entry.newest, state="refused", problems=(f"{event.name.model}{event.suffix}: {event.reason}",))
    return snapshot.with_entry(replace(entry, newest=refused)), (WriteStatus(event.name),)


@_apply.register
def _(event: VersionFailing, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name)
    if entry is not None and entry.staged is not None and entry.staged.version.version == event.version:
        return _staged_failing(snapshot, entry, event)
    if entry is None or entry.live is None or entry.live.version.version != event.version:
        return snapshot, ()
    if entry.live.failing == event.reason:
        return snapshot, ()
    if event.at_fault and entry.previous is not None and snapshot.shared is None:
        return _apply(RollBack(event.name, event.version, AUTOMATIC, event.reason, event.at_ms), snapshot, schema)
    live = replace(entry.live, failing=event.reason, at_fault=event.at_fault)
    return snapshot.with_entry(replace(entry, live=live)), (WriteStatus(event.name),)


def _staged_failing(snapshot: Snapshot, entry: Entry, event: VersionFailing) -> Step:
    staged = entry.staged
    assert staged is not None
    if event.at_fault and snapshot.shared is None:
        reason = f"in stage {staged.asked}: {event.reason}"
        stepped = stages.roll_back(entry, RollBack(event.name, event.version, AUTOMATIC, reason, event.at_ms))
        return (snapshot, ()) if stepped is None else (snapshot.with_entry(stepped[0]), stepped[1])
    if staged.failing == event.reason:
        return snapshot, ()
    failing = replace(staged, failing=event.reason, at_fault=event.at_fault)
    return snapshot.with_entry(replace(entry, staged=failing)), (WriteStatus(event.name),)


@_apply.register
def _(event: Promote, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name)
    stepped = stages.promote(entry, event) if entry is not None and snapshot.shared is None else None
    if stepped is None:
        return snapshot, ()
    snapshot, more = _without_wait(snapshot.with_entry(stepped[0]))
    return snapshot, (*stepped[1], *more)


@_apply.register
def _(event: RollBack, snapshot: Snapshot, schema: EventSchema) -> Step:
    entry = snapshot.models.get(event.name)
    stepped = stages.roll_back(entry, event) if entry is not None and snapshot.shared is None else None
    return (snapshot, ()) if stepped is None else (snapshot.with_entry(stepped[0]), stepped[1])


def _retired(entry: Entry) -> list[Retire]:
    """What runs of a model, when none of it is to."""
    running = [one.version for one in (entry.live, entry.staged) if one is not None]
    return [Retire(version) for version in running]


@_apply.register
def _(event: TenantSeen, snapshot: Snapshot, schema: EventSchema) -> Step:
    if snapshot.shared is not None:
        return _with_more_memory(snapshot, standing.settings_seen(snapshot, snapshot.shared, event))
    settings = snapshot.granted(event.settings)
    known = snapshot.tenants.get(settings.tenant)
    if known == settings or (known is None and len(snapshot.tenants) >= limits.TENANTS_MAX):
        return snapshot, ()
    tenants = {**snapshot.tenants, settings.tenant: settings}
    after = replace(snapshot, number=snapshot.number + 1, tenants=tenants)
    return _with_more_memory(snapshot, after, ConfigureTenant(settings))


@_apply.register
def _(event: TenantGone, snapshot: Snapshot, schema: EventSchema) -> Step:
    if snapshot.shared is not None:
        return standing.folder_gone(snapshot, snapshot.shared, event.tenant), ()
    gone = [entry for name, entry in snapshot.models.items() if name.tenant == event.tenant]
    if not gone and event.tenant not in snapshot.tenants:
        return snapshot, ()
    needed = _needed_by_others(snapshot, event.tenant)
    if needed:
        return snapshot, ()  # as a whole: the tenant's worker runs what others use
    return (
        replace(
            snapshot,
            number=snapshot.number + 1,
            models={name: entry for name, entry in snapshot.models.items() if name.tenant != event.tenant},
            tenants={tenant: settings for tenant, settings in snapshot.tenants.items() if tenant != event.tenant},
        ),
        (*(retire for entry in gone for retire in _retired(entry)), RemoveTenant(event.tenant)),
    )


def _needed_by_others(snapshot: Snapshot, tenant: str) -> bool:
    among = neighbours(snapshot)
    others = replace(among, live={name: one for name, one in among.live.items() if name.tenant != tenant})
    mine = [manifest for name, manifest in among.live.items() if name.tenant == tenant]
    return any(sharing.kept_for(one.name, replace(others, live={**others.live, one.name: one})) for one in mine)


@_apply.register
def _(event: FeaturesSeen, snapshot: Snapshot, schema: EventSchema) -> Step:
    return feature_files.seen(snapshot, event, schema)


@_apply.register
def _(event: FeaturesUnreadable, snapshot: Snapshot, schema: EventSchema) -> Step:
    return feature_files.refused(snapshot, event.tenant, event.problems)


@_apply.register
def _(event: QuotaSet, snapshot: Snapshot, schema: EventSchema) -> Step:
    if snapshot.shared is not None or snapshot.quotas.get(event.tenant) == event.quota:
        return snapshot, ()
    limits_set = event.quota.limits()
    quotas = {tenant: quota for tenant, quota in snapshot.quotas.items() if tenant != event.tenant}
    if limits_set:
        quotas[event.tenant] = event.quota
    before, snapshot = snapshot, replace(snapshot, number=snapshot.number + 1, quotas=quotas)
    known = snapshot.tenants.get(event.tenant)
    settings = None if known is None else known.under(event.caps).granted(limits_set)
    if settings is None or settings == known:
        return snapshot, ()
    after = replace(snapshot, tenants={**snapshot.tenants, event.tenant: settings})
    return _with_more_memory(before, after, ConfigureTenant(settings))


@_apply.register
def _(event: Agreed, snapshot: Snapshot, schema: EventSchema) -> Step:
    if snapshot.shared is None:
        return snapshot, ()
    before = snapshot
    snapshot, actions = standing.agreed(snapshot, snapshot.shared, event, schema)
    snapshot, actions = _with_more_memory(before, snapshot, *actions)
    snapshot, told = feature_files.agreed(snapshot, schema)
    snapshot, more = _without_wait(snapshot)
    return snapshot, (*actions, *told, *more)


@_apply.register
def _(event: Published, snapshot: Snapshot, schema: EventSchema) -> Step:
    return (snapshot, ()) if snapshot.shared is None else standing.published(snapshot, snapshot.shared, event)


@_apply.register
def _(event: NotPublished, snapshot: Snapshot, schema: EventSchema) -> Step:
    return standing.not_published(snapshot, event)


def _with_more_memory(before: Snapshot, snapshot: Snapshot, *actions: Action) -> Step:
    """Try again what failed its trial while its tenant might use less memory."""
    for name, entry in sorted(snapshot.models.items()):
        tried = entry.newest is not None and entry.newest.state == "refused" and entry.newest.version
        memory_mb = snapshot.trial_settings(name.tenant).memory_mb
        if tried and memory_mb > before.trial_settings(name.tenant).memory_mb:
            snapshot, more = _tried(snapshot, name)
            actions = (*actions, *more)
    return snapshot, actions


def _without_wait(snapshot: Snapshot) -> Step:
    """Try what waits for no model any more."""
    actions: list[Action] = []
    for name, entry in sorted(snapshot.models.items()):
        if entry.newest is not None and entry.newest.state == "waiting":
            snapshot, more = _tried(snapshot, name)
            actions.extend(more)
    return snapshot, tuple(actions)


def _checked(snapshot: Snapshot, name: ModelName, manifest: bytes, schema: EventSchema) -> Manifest:
    """Raises ManifestError."""
    _check_place(snapshot, name)
    shared = snapshot.definitions.resolver(name.tenant)
    parsed = parse_manifest(f"{name.model}.toml", name.tenant, name.model, manifest, schema, shared)
    check_quota(snapshot, parsed, schema)
    problems = sharing.problems(parsed, neighbours(snapshot))
    if problems:
        raise ManifestError(problems)
    return parsed


def _check_place(snapshot: Snapshot, name: ModelName) -> None:
    """Whether there is room for the model and its name is its own. Raises ManifestError."""
    file = f"{name.model}.toml"
    if name.tenant not in snapshot.tenants and len(snapshot.tenants) >= limits.TENANTS_MAX:
        raise ManifestError([f"{file}: the node has {limits.TENANTS_MAX} tenants already; ask its operator"])
    agreed = snapshot.shared.versions.keys() if snapshot.shared is not None else set()
    others = sorted((snapshot.models.keys() | agreed) - {name})
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
    return tuple(sorted(snapshot.definitions.stored_outputs(manifest) - given))


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
    after = snapshot.with_entry(replace(entry, newest=replace(newest, state=state, problems=problems)))
    if missing:
        return after, (WriteStatus(name),)
    version = newest.manifest.version(newest.blob)
    return after, (StartTrial(version, text_features(newest.manifest)), WriteStatus(name))
