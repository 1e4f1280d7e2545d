"""(P) What customers' rows keep for versions that do not run and may come to, in place of those that do."""

from __future__ import annotations

from node.kernel.types import EventSchema, ModelName
from tenants.manifest import Manifest
from tenants.quotas import window_bytes
from tenants.registry import Snapshot


def reserve_of(snapshot: Snapshot, schema: EventSchema) -> tuple[Manifest, ...]:
    """What is to run, which counts for its tenant's quota, and versions to fall back to.

    These do not count, as an update must not need room for both: a tenant keeps as many as are within its quota by
    themselves, those of the newest live versions first.
    """
    kept = [] if snapshot.shared is None else [one for coming in snapshot.shared.coming.values() for one in coming]
    fallbacks = _fallbacks(snapshot)
    for tenant in sorted({manifest.name.tenant for manifest in fallbacks}):
        kept += _within_quota(snapshot, tenant, [one for one in fallbacks if one.name.tenant == tenant], schema)
    return tuple(kept)


def _fallbacks(snapshot: Snapshot) -> list[Manifest]:
    if snapshot.shared is not None:
        found = dict(snapshot.shared.fallbacks)
    else:
        found = {name: one.previous.manifest for name, one in snapshot.models.items() if one.previous is not None}

    def place(name: ModelName) -> tuple[int, ModelName]:
        live = snapshot.models[name].live if name in snapshot.models else None
        return (0 if live is None else -live.live_since_ms, name)

    return [found[name] for name in sorted(found, key=place)]


def _within_quota(snapshot: Snapshot, tenant: str, fallbacks: list[Manifest], schema: EventSchema) -> list[Manifest]:
    settings = snapshot.settings(tenant)
    most = settings.window_bytes_max

    def fit(manifests: list[Manifest]) -> bool:
        stored = sum(manifest.stored_bytes for manifest in manifests)
        return stored <= settings.stored_bytes_max and window_bytes(tenant, manifests, schema, enough=most) <= most

    if fit(fallbacks):
        return fallbacks
    kept: list[Manifest] = []
    for manifest in fallbacks:
        if fit([*kept, manifest]):
            kept.append(manifest)
    return kept
