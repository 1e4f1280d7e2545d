"""(P) What of the registry is kept over restarts, as bytes.

A node by itself keeps what is live. A node of a cluster keeps what its own directory held: what is live, the catalog
says.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from node.kernel.errors import ManifestError
from node.kernel.types import EventSchema, ModelName
from tenants.agreement import TrialReport
from tenants.manifest import TenantSettings, parse_manifest
from tenants.registry import Entry, Live, Shared, Snapshot


class _SavedModel(msgspec.Struct, frozen=True):
    tenant: str
    model: str
    manifest: str
    blob: str
    report: TrialReport
    live_since_ms: int


class _Saved(msgspec.Struct, frozen=True, omit_defaults=True):
    format: Literal[1]
    models: tuple[_SavedModel, ...]
    tenants: tuple[TenantSettings, ...]
    taken: tuple[tuple[str, str, str], ...] = ()
    """Tenant, model, version; of a node of a cluster, as are the settings."""
    taken_settings: dict[str, str] = {}


def encode(snapshot: Snapshot) -> bytes:
    """The live versions and the tenants as JSON, so that a restarted node is live at once, without new trials.

    In a cluster: which pairs and settings of this node's directory the catalog has had.
    """
    if snapshot.shared is not None:
        taken = tuple((name.tenant, name.model, version) for name, version in sorted(snapshot.shared.taken.items()))
        return msgspec.json.encode(_Saved(1, (), (), taken, dict(sorted(snapshot.shared.taken_settings.items()))))
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
        return Snapshot(1, shared=Shared(taken=taken, taken_settings=saved.taken_settings)), ()
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
