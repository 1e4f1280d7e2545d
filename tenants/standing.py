"""(P) How the pairs of one node's directory stand in the cluster's catalog, and what the catalog makes live here.

What is live follows from what was agreed alone, whatever this node's directory holds or held: nodes that were told
the same have the same plan. The directory only makes wishes: to put a version, to withdraw a model, to change a
tenant's settings. Two wishes of one model count in the order in which the catalog takes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from node.kernel.errors import ManifestError
from node.kernel.types import AgreedVersion, EventSchema, ModelName
from tenants import sharing
from tenants.agreement import decode_report, read_version
from tenants.definitions import Definitions, compile_definitions
from tenants.manifest import Manifest
from tenants.registry import (
    NOT_HERE,
    Action,
    Agreed,
    ConfigureTenant,
    Entry,
    GoLive,
    Live,
    Newest,
    NotPublished,
    PairSeen,
    Published,
    PutFeatures,
    PutTenant,
    PutVersion,
    Quarantine,
    RemoveTenant,
    Retire,
    RunBeside,
    Shared,
    Snapshot,
    Staged,
    Step,
    TenantSeen,
    Unserved,
    Withdraw,
    WriteFeaturesStatus,
    WriteStatus,
    neighbours,
    quarantine_problem,
    text_features,
)
from tenants.stages import unlike

_ROLLING_OUT = "it is agreed, and goes live, or to its first stage, once every node has its file"
_RETIRED = (
    "the cluster runs another version, which was put later, or none, as the model was deleted on another node; drop a"
    " changed pair, or remove these files"
)
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


# This node's directory


def pair_known(snapshot: Snapshot, shared: Shared, event: PairSeen, manifest: Manifest) -> Step | None:
    """What becomes of a pair that the catalog has or had; None when it is to be tried."""
    name, version = event.name, manifest.version(event.blob).version
    taken, agreed = shared.taken.get(name), shared.version(name, version)
    if taken != version and agreed is None:
        return None
    entry = snapshot.models.get(name, Entry(name))
    newest: Newest | None = Newest("retired", version, event.blob, event.at_ms, manifest=manifest)
    assert newest is not None
    # What a node without memory finds when it starts may be older than what the cluster has: no wish of now.
    wished = taken != version and not (event.first and taken is None)
    if agreed is not None and wished and shared.newest(name) != version:
        newest = replace(newest, state="passed", report=decode_report(agreed.report))
    else:
        newest = _stands(shared, name, newest)
        snapshot = snapshot.sharing(taken={**shared.taken, name: version})
    same = entry.newest.says(newest) if entry.newest is not None and newest is not None else entry.newest is newest
    if not same:
        snapshot = snapshot.with_entry(replace(entry, newest=newest))
    return snapshot, (WriteStatus(name),) if not same or event.first or taken != version else ()


def pair_gone(snapshot: Snapshot, shared: Shared, entry: Entry) -> Snapshot:
    """The pair's files are gone: the model is withdrawn, unless the cluster has taken another node's pair since."""
    name = entry.name
    taken = shared.taken.get(name)
    if taken is not None and name in shared.versions and not shared.overtaken(name, taken):
        if sharing.kept_for(name, neighbours(snapshot)):
            return snapshot  # asked again at the next look
        snapshot = snapshot.sharing(gone=shared.gone | {name})
    else:
        snapshot = snapshot.sharing(taken=_less(shared.taken, name))
    if entry.newest is None:
        return snapshot
    left = replace(entry, newest=None)
    return snapshot.without(name) if left.empty else snapshot.with_entry(left)


def settings_seen(snapshot: Snapshot, shared: Shared, event: TenantSeen) -> Snapshot:
    """A tenant.toml that says something new is to be published; that there is none says nothing, unless there was."""
    tenant, text = event.settings.tenant, event.text
    agreed, taken = shared.settings.get(tenant), shared.taken_settings.get(tenant)
    silent = not text and not taken
    maybe_old = event.first and taken is None and bool(agreed)
    if agreed == text or (agreed is not None and (silent or maybe_old or text == taken)):
        asked = _less(shared.asked, tenant)
        return snapshot.sharing(asked=asked, taken_settings={**shared.taken_settings, tenant: text})
    return snapshot.sharing(asked={**shared.asked, tenant: event})


def folder_gone(snapshot: Snapshot, shared: Shared, tenant: str) -> Snapshot:
    """All files of a tenant are gone from here. Its settings stay, other nodes may have models of it."""
    asked, taken = _less(shared.asked, tenant), _less(shared.taken_settings, tenant)
    snapshot = snapshot.sharing(asked=asked, taken_settings=taken)
    for name in sorted(snapshot.watched):
        if name.tenant == tenant and snapshot.shared is not None:
            snapshot = pair_gone(snapshot, snapshot.shared, snapshot.models.get(name, Entry(name)))
    return snapshot


# Publishing


def published(snapshot: Snapshot, shared: Shared, event: Published) -> Step:
    match event.publication:
        case PutTenant(tenant, text):
            asked = {other: seen for other, seen in shared.asked.items() if (other, seen.text) != (tenant, text)}
            return snapshot.sharing(asked=asked, taken_settings={**shared.taken_settings, tenant: text}), ()
        case PutFeatures(tenant, text):
            asked_features = {
                other: wish for other, wish in shared.asked_features.items() if (other, wish) != (tenant, text)
            }
            taken = {**shared.taken_features, tenant: text}
            return snapshot.sharing(asked_features=asked_features, taken_features=taken), (WriteFeaturesStatus(tenant),)
        case Quarantine():
            return snapshot, ()  # the catalog has told what became of it
        case Withdraw(name, _):
            return snapshot.sharing(gone=shared.gone - {name}, taken=_less(shared.taken, name)), ()
        case PutVersion(name=name):
            snapshot = snapshot.sharing(taken={**shared.taken, name: event.publication.version})
            entry = snapshot.models.get(name)
            if entry is None or entry.newest is None or not _is_of(entry.newest, event.publication):
                return snapshot, ()
            return snapshot.with_entry(replace(entry, newest=_stands(shared, name, entry.newest))), (WriteStatus(name),)


def not_published(snapshot: Snapshot, event: NotPublished) -> Step:
    put = event.publication
    entry = snapshot.models.get(put.name) if isinstance(put, PutVersion) else None
    if not isinstance(put, PutVersion) or entry is None or entry.newest is None or not _is_of(entry.newest, put):
        return snapshot, ()
    told = replace(entry.newest, problems=(f"not agreed by the cluster yet, tried again: {event.reason}",))
    if told == entry.newest:
        return snapshot, ()
    return snapshot.with_entry(replace(entry, newest=told)), (WriteStatus(put.name),)


def _is_of(newest: Newest, put: PutVersion) -> bool:
    return newest.state == "passed" and newest.version == put.version


# What the catalog says


def agreed(snapshot: Snapshot, before: Shared, event: Agreed, schema: EventSchema) -> Step:
    """The live versions and tenants of the catalog, and where this node's own pairs stand now."""
    shared = _heard(before, event)
    actions: list[Action] = [
        ConfigureTenant(settings)
        for tenant, settings in sorted(event.settings.items())
        if snapshot.tenants.get(tenant) != settings
    ]
    texts = {tenant: text for tenant, text in sorted(event.models.features.items()) if text}
    unchanged = texts == snapshot.definitions.files
    definitions = snapshot.definitions if unchanged else compile_definitions(texts, schema)
    models: dict[ModelName, Entry] = {}
    taken = dict(shared.taken)
    reserved: dict[ModelName, tuple[tuple[Manifest, ...], Manifest | None]] = {}
    for name in sorted(snapshot.models.keys() | shared.versions.keys()):
        entry = snapshot.models.get(name, Entry(name))
        newest = _followed(entry, before, shared, event.at_ms)
        if entry.newest is not None and newest is not entry.newest:
            taken[name] = entry.newest.version
        live, unserved = _agreed_live(entry, before, shared, event, schema, (definitions, unchanged))
        staged = _agreed_staged(entry, live, shared, event, schema, (definitions, unchanged))
        after = Entry(name, live, newest, unserved, staged=staged, history=event.models.histories.get(name, ()))
        reserved[name] = _reserve(after, before, shared, schema, (definitions, unchanged))
        actions.extend(_swapped(entry, after))
        if not after.empty:
            models[name] = after
    for name in [name for name in shared.gone if shared.overtaken(name, taken.get(name, ""))]:
        shared = replace(shared, gone=shared.gone - {name})  # put anew by another node: no longer this one's to delete
        taken.pop(name, None)
    actions.extend(RemoveTenant(tenant) for tenant in sorted(snapshot.tenants.keys() - event.settings.keys()))
    shared = replace(
        shared,
        taken=taken,
        coming={name: coming for name, (coming, _) in reserved.items() if coming},
        fallbacks={name: fallback for name, (_, fallback) in reserved.items() if fallback is not None},
    )
    agreed_snapshot = replace(
        snapshot,
        number=snapshot.number + 1,
        models=models,
        tenants=dict(event.settings),
        shared=shared,
        quotas=event.models.quotas,
        definitions=definitions,
    )
    return agreed_snapshot, tuple(actions)


def _heard(before: Shared, event: Agreed) -> Shared:
    versions: dict[ModelName, dict[str, AgreedVersion]] = {}
    for version in event.models.versions:
        versions.setdefault(version.name, {})[version.version] = version
    texts = dict(event.models.tenants)
    asked = {tenant: seen for tenant, seen in before.asked.items() if texts.get(tenant) != seen.text}
    heard = {tenant: seen.text for tenant, seen in before.asked.items() if tenant not in asked}
    taken = {**before.taken_settings, **heard}
    return replace(before, versions=versions, settings=texts, asked=asked, taken_settings=taken)


def _followed(entry: Entry, before: Shared, shared: Shared, at_ms: int) -> Newest | None:
    """This node's newest pair after the catalog changed; what another node put counts as put."""
    name, newest = entry.name, entry.newest
    if newest is None:
        # A pair of this node was live: it is not any more when another node put a newer one, or deleted the model.
        version = shared.taken.get(name, "")
        ran = before.version(name, version)
        if ran is None or ran.state != "live" or name in shared.gone:
            return None
        manifest = entry.live.manifest if entry.live is not None else None
        return _stands(shared, name, Newest("retired", version, ran.blob, at_ms, manifest=manifest))
    was, now = before.standing(name, newest.version), shared.standing(name, newest.version)
    put_elsewhere = now != was and (now in ("passed", "staged", "live") or not was)
    if newest.state not in ("rolling out", "shadow", "canary") and not put_elsewhere:
        return newest
    stands = _stands(shared, name, newest)
    return newest if stands == newest else stands


def _stands(shared: Shared, name: ModelName, newest: Newest) -> Newest | None:
    """A pair that the catalog has or had, as it stands there; None for the live one."""
    match shared.standing(name, newest.version):
        case "live":
            return None
        case "passed":
            return replace(newest, state="rolling out", problems=(_ROLLING_OUT,), report=None)
        case "staged":
            known = shared.versions[name][newest.version]
            asked = newest.manifest.rollout if newest.manifest is not None else ()
            kind = asked[known.stage].kind if known.stage < len(asked) else "shadow"
            return replace(newest, state=kind, problems=(), report=None)
        case "quarantined":
            reason = shared.versions[name][newest.version].reason
            return replace(newest, state="quarantined", problems=(quarantine_problem(name, reason),), report=None)
        case _:
            return replace(newest, state="retired", problems=(_RETIRED,), report=None)


def _agreed_live(
    entry: Entry, before: Shared, shared: Shared, event: Agreed, schema: EventSchema, defined: tuple[Definitions, bool]
) -> tuple[Live | None, Unserved | None]:
    """What runs of a model here by the catalog, whatever ran before; or why it can't."""
    name, live = entry.name, entry.live
    agreed = next((known for known in shared.versions.get(name, {}).values() if known.state == "live"), None)
    if agreed is None:
        return None, None
    try:
        if name in event.unfit:
            raise ManifestError([f"{name.model}.toml: with the live models, {event.unfit[name]}"])
        definitions, unchanged = defined
        same = live is not None and _same_text(before.version(name, live.version.version), agreed)
        if live is None or not same or (live.manifest.shared_values and not unchanged):
            read = read_version(agreed, schema, definitions.resolver(name.tenant))
            live = Live(read.manifest, read.version, read.report, event.at_ms)
    except ManifestError as error:
        return None, Unserved(agreed.version, agreed.blob, error.problems)
    if not agreed.here:
        return replace(live, failing=NOT_HERE), None
    return (replace(live, failing="") if live.failing == NOT_HERE else live), None


def _agreed_staged(
    entry: Entry,
    live: Live | None,
    shared: Shared,
    event: Agreed,
    schema: EventSchema,
    defined: tuple[Definitions, bool],
) -> Staged | None:
    """What runs beside the live version here; None also where it can't, which the judge of its figures finds."""
    agreed = next((known for known in shared.versions.get(entry.name, {}).values() if known.state == "staged"), None)
    if agreed is None or live is None or not event.stages:
        return None
    staged, (definitions, unchanged) = entry.staged, defined
    same = staged is not None and staged.version.version == agreed.version
    if staged is None or not same or (staged.manifest.shared_values and not unchanged):
        try:
            read = read_version(agreed, schema, definitions.resolver(entry.name.tenant))
        except ManifestError:
            return None
        staged = Staged(read.manifest, read.version, read.report, agreed.stage, agreed.at_ms, agreed.who)
    if agreed.stage >= len(staged.manifest.rollout) or unlike(live.version, staged.version):
        return None
    return replace(staged, stage=agreed.stage, since_ms=agreed.at_ms, who=agreed.who, reason=agreed.reason)


def _reserve(
    entry: Entry, before: Shared, shared: Shared, schema: EventSchema, defined: tuple[Definitions, bool]
) -> tuple[tuple[Manifest, ...], Manifest | None]:
    """What is to run in place of what `entry` does, or does on other nodes, and what would run again. What can't be
    read here is left out."""
    name, (definitions, unchanged) = entry.name, defined
    held_before = [*before.coming.get(name, ()), *filter(None, [before.fallbacks.get(name)])]
    known = {one.text: one for one in held_before}
    running = {one.version.version for one in (entry.live, entry.staged) if one is not None}

    def read(version: AgreedVersion) -> Manifest | None:
        held = known.get(version.manifest.encode())
        if held is not None and (unchanged or not held.shared_values):
            return held
        with contextlib.suppress(ManifestError):
            return read_version(version, schema, definitions.resolver(name.tenant)).manifest
        return None

    versions = [one for one in shared.versions.get(name, {}).values() if one.version not in running]
    coming = [read(one) for one in versions if one.state in ("passed", "staged", "live")]
    has_live = entry.live is not None or entry.unserved is not None
    fallback = next((one for one in versions if one.fallback), None) if has_live else None
    return tuple(one for one in coming if one is not None), None if fallback is None else read(fallback)


def _same_text(one: AgreedVersion | None, other: AgreedVersion) -> bool:
    return one is not None and (
        (one.version, one.blob, one.manifest, one.report) == (other.version, other.blob, other.manifest, other.report)
    )


def _swapped(before: Entry, after: Entry) -> list[Action]:
    """What the pool and the tenant hear of it."""
    actions: list[Action] = []
    old = before.live.version if before.live is not None else None
    was = before.staged.version if before.staged is not None else None
    runs = {one.version.version for one in (after.live, after.staged) if one is not None}
    ended = was is not None and was.version not in runs
    if after.live is not None and (after.live.version != old or ended):  # it takes over what a staged one has queued
        actions.append(GoLive(after.live.version, text_features(after.live.manifest)))
    if after.staged is not None and after.staged.version != was:
        actions.append(RunBeside(after.staged.version, text_features(after.staged.manifest)))
    actions.extend(Retire(gone) for gone in (old, was) if gone is not None and gone.version not in runs)
    if after != before and not after.empty:
        actions.append(WriteStatus(before.name))
    return actions


def _less(kept: Mapping[_Key, _Value], key: _Key) -> Mapping[_Key, _Value]:
    return {other: value for other, value in kept.items() if other != key}
