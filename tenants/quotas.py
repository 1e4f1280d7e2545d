"""(P) Whether a tenant may have one more model, by its quotas.

They refuse what adds to what there is: a quota that is lowered takes nothing away that runs.
"""

from __future__ import annotations

from node.kernel.errors import QuotaRefused
from node.kernel.types import ModelName
from tenants.manifest import Manifest
from tenants.registry import Entry, Snapshot

_ENDED = ("refused", "quarantined", "retired")


def check_quota(snapshot: Snapshot, manifest: Manifest) -> None:
    """Raises QuotaRefused when the model is one too many, or its outputs take too much of a customer's row."""
    name = manifest.name
    models, settings = models_of(snapshot, name.tenant), snapshot.settings(name.tenant)
    if name not in models and len(models) >= settings.models_max:
        raise QuotaRefused(
            "models_max",
            f"{name.model}.toml: tenant {name.tenant} has {len(models)} models and its quota models_max is"
            f" {settings.models_max}: delete one, or ask the operator for more (headrace quota set {name.tenant}"
            " --models-max)",
        )
    before = models.get(name, 0)
    taken = sum(models.values()) - before + manifest.stored_bytes
    if taken > settings.stored_bytes_max and manifest.stored_bytes > before:
        raise QuotaRefused(
            "stored_bytes_max",
            f"{name.model}.toml: its outputs take {manifest.stored_bytes} bytes of each customer's row, all of tenant"
            f" {name.tenant} {taken}, and its quota stored_bytes_max is {settings.stored_bytes_max}: name fewer"
            f" outputs, delete a model, or ask the operator for more (headrace quota set {name.tenant}"
            " --stored-bytes-max)",
        )


def models_of(snapshot: Snapshot, tenant: str) -> dict[ModelName, int]:
    """The tenant's models that are live, or may be next, and the bytes that their outputs take of a customer's row.

    0 for one that another node of the cluster has put and that is not live yet.
    """
    agreed = {} if snapshot.shared is None else snapshot.shared.versions
    found = {
        name: 0
        for name, versions in agreed.items()
        if name.tenant == tenant and any(one.state in ("passed", "live") for one in versions.values())
    }
    for name, entry in snapshot.models.items():
        size = _stored_bytes(entry)
        if name.tenant == tenant and size:
            found[name] = size
    return found


def _stored_bytes(entry: Entry) -> int:
    """Of the larger of what is live and what may be next; 0 when there is neither."""
    newest = entry.newest
    coming = newest.manifest if newest is not None and newest.state not in _ENDED else None
    live = entry.live.manifest if entry.live is not None else None
    return max((one.stored_bytes for one in (coming, live) if one is not None), default=0)
