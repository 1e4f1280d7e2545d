"""(P) How commands change what the catalog says of tenants, model versions and who has their files."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

from msgspec.structs import replace

from node.kernel import limits
from replication.catalog_quotas import model_problem
from replication.catalog_values import (
    ENDED,
    Catalog,
    Change,
    Model,
    Outcome,
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
    ForgetVersion,
    GoLive,
    HoldBlob,
    PutFeatures,
    PutTenant,
    PutVersion,
    QuarantineVersion,
    RetireVersion,
    StageVersion,
)


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
    features = before.features if before else ""
    tenant = Tenant(command.name, command.settings, command.who, command.at_ms, catalog.revision + 1, features)
    return reason or advanced(catalog, tenants=put(catalog.tenants, tenant.name, tenant), text_bytes=text_bytes)


def _put_features(catalog: Catalog, command: PutFeatures) -> Outcome:
    """Whoever proposes has looked whether any model or feature would lose what it uses: none may be newer than that."""
    before = catalog.tenants.get(command.tenant)
    if before is None:
        return f"there is no tenant {command.tenant}; put the tenant first"
    if before.features == command.text:
        return catalog
    newest_model = max((model.revision for model in catalog.models.values()), default=0)
    text_bytes = catalog.text_bytes + _size(command.text) - _size(before.features)
    reason = _stale("a model", newest_model, command) or _text_problem(text_bytes)
    reason = reason or _stale("a tenant's shared features", catalog.features_revision, command)
    tenant = replace(before, features=command.text, who=command.who, at_ms=command.at_ms)
    tenants = put(catalog.tenants, tenant.name, tenant)
    return reason or advanced(catalog, tenants=tenants, text_bytes=text_bytes, features_revision=catalog.revision + 1)


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
    reason = reason or _stale("a tenant's shared features", catalog.features_revision, command)
    reason = reason or _text_problem(text_bytes)
    if reason:
        return reason
    base = before or Model(command.tenant, command.model, {})
    versions = _without_passed(versions, command.who, command.at_ms) | {command.version: _passed(catalog, command)}
    model = replace(base, versions=versions, revision=catalog.revision + 1)
    holders = catalog.holders if command.blob in catalog.holders else {**catalog.holders, command.blob: {}}
    return advanced(catalog, models=put(catalog.models, key, model), holders=holders, text_bytes=text_bytes)


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
        stages=put.stages,
    )


def _without(states: Collection[str], versions: Mapping[str, Version], who: str, at_ms: int) -> dict[str, Version]:
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
    # To wish for the live version again takes back what is staged beside it, too.
    replaced: tuple[VersionState, ...] = ("passed", "staged") if known.state == "live" else ("passed",)
    waiting = any(version.state in replaced for version in model.versions.values())
    if known.state == "passed" or (known.state in ("live", "staged") and not waiting):
        return catalog
    text_bytes = catalog.text_bytes + _size(command.report) - _size(known.report)
    reason = _stale(f"model {key}", model.revision, command) or _text_problem(text_bytes)
    reason = reason or _stale("a tenant's shared features", catalog.features_revision, command)
    if reason:
        return reason
    state: VersionState = "passed" if known.state in ENDED else known.state
    renewed = replace(_passed(catalog, command), state=state, served_revision=known.served_revision, stage=known.stage)
    versions = _without(replaced, model.versions, command.who, command.at_ms) | {known.version: renewed}
    changed = replace(model, versions=versions, revision=catalog.revision + 1)
    staged = model.staged
    if staged is not None and versions[staged.version].state != "staged":
        change = _change(staged, "retired", command, "the live version was put again")
        changed = _remembering(changed, change)
    return advanced(catalog, models=put(catalog.models, key, changed), text_bytes=text_bytes)


def _version_problem(catalog: Catalog, command: PutVersion, versions: int) -> str:
    if command.tenant not in catalog.tenants:
        return f"there is no tenant {command.tenant}; put the tenant first"
    if versions >= limits.VERSIONS_PER_MODEL_MAX:
        return f"model {model_key(command.tenant, command.model)} has {versions} versions; forget retired ones first"
    mine = sum(model.tenant == command.tenant for model in catalog.models.values())
    if not versions and mine >= limits.MODELS_PER_TENANT_MAX:
        return f"tenant {command.tenant} has {mine} models, the most it may; forget one first"
    over = "" if versions else model_problem(catalog, command.tenant)
    if over:
        return over
    if command.blob not in catalog.holders and len(catalog.holders) >= limits.BLOBS_MAX:
        return f"there are {len(catalog.holders)} model files, the most there may be; forget old versions"
    return ""


def _found(catalog: Catalog, tenant: str, model: str, version: str) -> tuple[Model, Version] | str:
    found = catalog.models.get(model_key(tenant, model))
    if found is None or version not in found.versions:
        return f"there is no version {version[:12]} of {model_key(tenant, model)}; put it first"
    return found, found.versions[version]


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
    others: tuple[VersionState, ...] = ("staged",) if version.state == "staged" else ("passed", "staged")
    versions = _without(others, model.versions, command.who, command.at_ms)
    if model.live:
        versions[model.live] = replace(versions[model.live], state="retired", who=command.who, at_ms=command.at_ms)
    return _with_live(catalog, model, versions, version, command, _change(version, "live", command, command.reason))


def _lacking(catalog: Catalog, version: Version, holders: tuple[str, ...]) -> str:
    missing = [name for name in holders if name not in catalog.holders.get(version.blob, {})]
    if not missing:
        return ""
    return f"nodes {', '.join(sorted(missing))} lack the file of version {version.version[:12]}; fetch it first"


def _change(
    version: Version,
    to: str,
    command: PutVersion | GoLive | StageVersion | QuarantineVersion | RetireVersion,
    reason: str = "",
) -> Change:
    return Change(command.at_ms, version.version, to, command.who, reason[: limits.STAGE_REASON_BYTES_MAX])


def _remembering(model: Model, *changes: Change) -> Model:
    return replace(model, history=(*model.history, *changes)[-limits.STAGE_HISTORY_MAX :])


def _with_live(
    catalog: Catalog,
    model: Model,
    versions: dict[str, Version],
    version: Version,
    command: GoLive | QuarantineVersion,
    *changes: Change,
) -> Catalog:
    versions[version.version] = replace(
        version,
        state="live",
        who=command.who,
        at_ms=command.at_ms,
        reason=changes[-1].reason,
        served_revision=catalog.revision + 1,
    )
    return _with_model(catalog, model, versions, version.version, catalog.revision + 1, *changes)


def _stage(catalog: Catalog, command: StageVersion) -> Outcome:
    found = _found(catalog, command.tenant, command.model, command.version)
    if isinstance(found, str):
        return found
    model, version = found
    if version.state == "staged" and version.stage >= command.stage:
        return catalog
    if not model.live or version.state == "live":
        return f"version {version.version[:12]} can be staged only beside another one that is live"
    if command.stage >= len(version.stages):
        return f"version {version.version[:12]} has {len(version.stages)} stages, so none of number {command.stage}"
    stale = _stale(f"model {model_key(model.tenant, model.model)}", model.revision, command)
    reason = _lacking(catalog, version, command.holders) or stale
    if reason:
        return reason
    other = model.staged
    replaced = () if other in (None, version) else (_change(other, "retired", command, "a newer one is staged"),)
    versions = _without(("staged",), model.versions, command.who, command.at_ms)
    versions[version.version] = replace(
        version, state="staged", stage=command.stage, who=command.who, at_ms=command.at_ms, reason=command.reason
    )
    change = _change(version, version.stages[command.stage], command, command.reason)
    return _with_model(catalog, model, versions, model.live, model.live_revision, *replaced, change)


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
    change = _change(version, "quarantined", command, command.reason)
    if model.live != version.version:
        return _with_model(catalog, model, versions, model.live, model.live_revision, change)
    if not command.fall_back_to:
        return _with_model(catalog, model, versions, "", catalog.revision + 1, change)
    again = versions.get(command.fall_back_to)
    if again is None or again.state != "retired" or not again.served_revision:
        return f"version {command.fall_back_to[:12]} was never live, or may not be again; name another, or none"
    back = _change(again, "live", command, "the version after it was quarantined")
    return _with_live(catalog, model, versions, again, command, change, back)


def _with_model(
    catalog: Catalog, model: Model, versions: dict[str, Version], live: str, live_revision: int, *changes: Change
) -> Catalog:
    if not live:  # nothing is left to run beside
        versions = _without(("staged",), versions, changes[-1].who if changes else "", 0)
    changed = replace(model, versions=versions, live=live, live_revision=live_revision, revision=catalog.revision + 1)
    changed = _remembering(changed, *changes)
    return advanced(catalog, models=put(catalog.models, model_key(model.tenant, model.model), changed))


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
    ran = version.state in ("live", "staged")
    changes = (_change(version, "retired", command, "taken back"),) if ran else ()
    return _with_model(catalog, model, versions, live, live_revision, *changes)


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
    return advanced(catalog, models=models, holders=holders, text_bytes=text_bytes, removed_revision=revision)


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
        return stale or advanced(catalog, holders={**catalog.holders, command.blob: {**held, command.node: revision}})
    stale = _stale(f"the file {command.blob[:12]} on {command.node}", held[command.node], command)
    fewer = {name: at for name, at in held.items() if name != command.node}
    return stale or advanced(catalog, holders={**catalog.holders, command.blob: fewer}, removed_revision=revision)


HANDLERS: Final[Mapping[type, Callable[[Catalog, Any], Outcome]]] = {
    PutTenant: _put_tenant,
    PutFeatures: _put_features,
    PutVersion: _put_version,
    GoLive: _go_live,
    StageVersion: _stage,
    QuarantineVersion: _quarantine,
    RetireVersion: _retire,
    ForgetVersion: _forget,
    HoldBlob: _hold,
}
