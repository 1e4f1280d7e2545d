"""(P) What of the registry is kept over restarts, as bytes.

A node by itself keeps what is live. A node of a cluster keeps what its own directory held: what is live, the catalog
says.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from node.kernel.errors import ManifestError
from node.kernel.types import EventSchema, ModelName, Quota, StageChange
from tenants.agreement import TrialReport
from tenants.definitions import Definitions, compile_definitions
from tenants.manifest import TenantSettings, parse_manifest
from tenants.registry import Entry, Live, Shared, Snapshot, Staged


class _SavedModel(msgspec.Struct, frozen=True):
    tenant: str
    model: str
    manifest: str
    blob: str
    report: TrialReport
    live_since_ms: int


class _SavedStage(msgspec.Struct, frozen=True):
    model: _SavedModel
    stage: int
    since_ms: int
    who: str
    reason: str


class _History(msgspec.Struct, frozen=True):
    tenant: str
    model: str
    changes: tuple[StageChange, ...]


class _Failed(msgspec.Struct, frozen=True):
    tenant: str
    model: str
    quarantined: dict[str, str]


class _Saved(msgspec.Struct, frozen=True, omit_defaults=True):
    format: Literal[1]
    models: tuple[_SavedModel, ...]
    tenants: tuple[TenantSettings, ...]
    taken: tuple[tuple[str, str, str], ...] = ()
    """Tenant, model, version; of a node of a cluster, as are the settings."""
    taken_settings: dict[str, str] = {}
    previous: tuple[_SavedModel, ...] = ()
    """What was live before each of `models`, where it may be again."""
    failed: tuple[_Failed, ...] = ()
    quotas: dict[str, Quota] = {}
    features: dict[str, str] = {}
    """Tenant -> its features.toml: what is in force; of a node of a cluster, what the catalog has had of this node."""
    staged: tuple[_SavedStage, ...] = ()
    history: tuple[_History, ...] = ()


def encode(snapshot: Snapshot) -> bytes:
    """The live versions and the tenants as JSON, so that a restarted node is live at once, without new trials.

    In a cluster: which pairs and settings of this node's directory the catalog has had.
    """
    if snapshot.shared is not None:
        taken = tuple((name.tenant, name.model, version) for name, version in sorted(snapshot.shared.taken.items()))
        settings, features = snapshot.shared.taken_settings, snapshot.shared.taken_features
        saved = _Saved(1, (), (), taken, dict(sorted(settings.items())), features=dict(sorted(features.items())))
        return msgspec.json.encode(saved)
    entries = sorted(snapshot.models.items())
    models = tuple(_saved(name, entry.live) for name, entry in entries if entry.live is not None)
    previous = tuple(_saved(name, entry.previous) for name, entry in entries if entry.previous is not None)
    failed = tuple(
        _Failed(name.tenant, name.model, dict(entry.quarantined)) for name, entry in entries if entry.quarantined
    )
    staged = tuple(
        _SavedStage(_saved(name, one), one.stage, one.since_ms, one.who, one.reason)
        for name, entry in entries
        if (one := entry.staged) is not None
    )
    history = tuple(_History(name.tenant, name.model, entry.history) for name, entry in entries if entry.history)
    saved = _Saved(
        1,
        models,
        tuple(snapshot.tenants.values()),
        previous=previous,
        failed=failed,
        quotas=dict(sorted(snapshot.quotas.items())),
        features=dict(snapshot.definitions.files),
        staged=staged,
        history=history,
    )
    return msgspec.json.encode(saved)


def _saved(name: ModelName, one: Live | Staged) -> _SavedModel:
    since_ms = one.live_since_ms if isinstance(one, Live) else one.since_ms
    return _SavedModel(name.tenant, name.model, one.manifest.text.decode(), one.version.blob, one.report, since_ms)


def decode(content: bytes, schema: EventSchema, in_cluster: bool = False) -> tuple[Snapshot, tuple[str, ...]]:
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
    if in_cluster:
        taken = {ModelName(tenant, model): version for tenant, model, version in saved.taken}
        return Snapshot(
            1, shared=Shared(taken=taken, taken_settings=saved.taken_settings, taken_features=saved.features)
        ), ()
    definitions = compile_definitions(saved.features, schema)
    problems = [line for lines in definitions.problems.values() for line in lines]
    live = _restored(saved.models, schema, definitions, problems)
    previous = _restored(saved.previous, schema, definitions, [])
    failed = {ModelName(one.tenant, one.model): one.quarantined for one in saved.failed}
    staged = _restored_stages(saved.staged, schema, definitions)
    history = {ModelName(one.tenant, one.model): one.changes for one in saved.history}
    models = {
        name: Entry(
            name,
            live[name],
            previous=previous.get(name),
            quarantined=failed.get(name, {}),
            staged=staged.get(name),
            history=history.get(name, ()),
        )
        for name in sorted(live)
    }
    tenants = {settings.tenant: settings for settings in saved.tenants}
    return Snapshot(1, models, tenants, quotas=saved.quotas, definitions=definitions), tuple(problems)


def _restored_stages(
    saved: Iterable[_SavedStage], schema: EventSchema, definitions: Definitions
) -> dict[ModelName, Staged]:
    """One that the schema does not allow any more is found again, and refused."""
    found: dict[ModelName, Staged] = {}
    for one in saved:
        for name, live in _restored((one.model,), schema, definitions, []).items():
            if one.stage < len(live.manifest.rollout):
                found[name] = Staged(
                    live.manifest, live.version, live.report, one.stage, one.since_ms, one.who, one.reason
                )
    return found


def _restored(
    saved: Iterable[_SavedModel], schema: EventSchema, definitions: Definitions, problems: list[str]
) -> dict[ModelName, Live]:
    found: dict[ModelName, Live] = {}
    for model in saved:
        name = ModelName(model.tenant, model.model)
        try:
            text, shared = model.manifest.encode(), definitions.resolver(model.tenant)
            manifest = parse_manifest(f"{name}.toml", model.tenant, model.model, text, schema, shared)
        except ManifestError as error:
            problems.extend(error.problems)
            continue
        version = manifest.version(model.blob, model.report.labels)
        found[name] = Live(manifest, version, model.report, model.live_since_ms)
    return found
