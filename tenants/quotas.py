"""(P) Whether a tenant may have one more model, by its quotas.

They refuse what adds to what there is: a quota that is lowered takes nothing away that runs.
"""

from __future__ import annotations

from collections.abc import Iterable

from node.kernel.errors import QuotaRefused
from node.kernel.types import EventSchema, ModelName
from node.kernel.windows import window_slots
from tenants.definitions import NOTHING_SHARED, Definitions
from tenants.expression import evaluate_profile
from tenants.manifest import SLOT_BYTES, Manifest
from tenants.registry import Entry, Snapshot
from tenants.shared_names import FEATURES_FILE

_ENDED = ("refused", "quarantined", "retired")


def check_quota(snapshot: Snapshot, manifest: Manifest, schema: EventSchema) -> None:
    """Raises QuotaRefused when the model is one too many, or takes too much of a customer's row."""
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
    _check_windows(snapshot, manifest, schema)


def _check_windows(snapshot: Snapshot, manifest: Manifest, schema: EventSchema) -> None:
    name = manifest.name
    most = snapshot.settings(name.tenant).window_bytes_max
    others = [one for one in manifests_of(snapshot, name.tenant) if one.name != name]
    taken = window_bytes(snapshot.definitions, name.tenant, [*others, manifest], schema)
    if taken > most and taken > window_bytes_of(snapshot, name.tenant, schema):
        alone = window_bytes(NOTHING_SHARED, name.tenant, [manifest], schema)
        raise QuotaRefused(
            "window_bytes_max",
            f"{name.model}.toml: its windows take {alone} bytes of each customer's row, all of tenant {name.tenant}"
            f" {taken}, and its quota window_bytes_max is {most}: ask for fewer or coarser windows, delete a model, or"
            f" ask the operator for more (headrace quota set {name.tenant} --window-bytes-max)",
        )


def window_problem(snapshot: Snapshot, definitions: Definitions, tenant: str, schema: EventSchema) -> str:
    """Why the tenant can't share the features of these definitions, by its quota; '' when it can."""
    most, models = snapshot.settings(tenant).window_bytes_max, manifests_of(snapshot, tenant)
    taken = window_bytes(definitions, tenant, models, schema)
    if taken <= most or taken <= window_bytes_of(snapshot, tenant, schema):
        return ""
    return (
        f"{FEATURES_FILE}: with it the windows of tenant {tenant} take {taken} bytes of each customer's row, and its"
        f" quota window_bytes_max is {most}: share fewer windows, or ask the operator for more (headrace quota set"
        f" {tenant} --window-bytes-max)"
    )


def window_bytes_of(snapshot: Snapshot, tenant: str, schema: EventSchema) -> int:
    """What the windows that the tenant asks for take of each customer's row."""
    return window_bytes(snapshot.definitions, tenant, manifests_of(snapshot, tenant), schema)


def window_bytes(definitions: Definitions, tenant: str, models: Iterable[Manifest], schema: EventSchema) -> int:
    """As if no other tenant had any; those of features that it shares are its own, whoever uses them, and those of the
    operator's profile are nobody's."""
    asked = definitions.aggregates_of(tenant).union(*(manifest.aggregates for manifest in models))
    return SLOT_BYTES * window_slots(asked - set(evaluate_profile(schema).values()))


def manifests_of(snapshot: Snapshot, tenant: str) -> list[Manifest]:
    """Of the tenant's models: what is live, and what may be next."""
    found: list[Manifest] = []
    for name, entry in sorted(snapshot.models.items()):
        if name.tenant == tenant:
            found += _manifests(entry)
    return found


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
    return max((one.stored_bytes for one in _manifests(entry)), default=0)


def _manifests(entry: Entry) -> list[Manifest]:
    newest = entry.newest
    coming = newest.manifest if newest is not None and newest.state not in _ENDED else None
    live = entry.live.manifest if entry.live is not None else None
    return [one for one in (coming, live) if one is not None]
