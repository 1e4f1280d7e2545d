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
    entry = snapshot.models.get(name, Entry(name))
    beside = [entry.live.manifest] if entry.live is not None and manifest.rollout else []
    then = [*_agreed(snapshot, name.tenant, but=name), *beside, manifest]
    taken = window_bytes(name.tenant, then, schema, snapshot.definitions, most)
    if taken > most and taken > window_bytes_of(snapshot, name.tenant, schema):
        alone = window_bytes(name.tenant, [manifest], schema)
        raise QuotaRefused(
            "window_bytes_max",
            f"{name.model}.toml: its windows take {alone} bytes of each customer's row, all of tenant {name.tenant}"
            f" {taken}, and its quota window_bytes_max is {most}: ask for fewer windows, delete a model, or ask the"
            f" operator for more (headrace quota set {name.tenant} --window-bytes-max)",
        )


def check_features(snapshot: Snapshot, definitions: Definitions, tenant: str, schema: EventSchema) -> None:
    """Raises QuotaRefused when the features that the tenant shares by these definitions take too much of a row."""
    most = snapshot.settings(tenant).window_bytes_max
    taken = window_bytes(tenant, _agreed(snapshot, tenant), schema, definitions, most)
    if taken > most and taken > window_bytes_of(snapshot, tenant, schema):
        raise QuotaRefused(
            "window_bytes_max",
            f"{FEATURES_FILE}: with it the windows of tenant {tenant} take {taken} bytes of each customer's row, and"
            f" its quota window_bytes_max is {most}: share fewer windows, or ask the operator for more (headrace quota"
            f" set {tenant} --window-bytes-max)",
        )


def window_bytes_of(snapshot: Snapshot, tenant: str, schema: EventSchema) -> int:
    """What the windows take of each customer's row that the tenant shares, or that its models use which run."""
    entries = [entry for name, entry in snapshot.models.items() if name.tenant == tenant]
    return window_bytes(tenant, [one for entry in entries for one in entry.running], schema, snapshot.definitions)


def window_bytes(
    tenant: str,
    models: Iterable[Manifest],
    schema: EventSchema,
    definitions: Definitions = NOTHING_SHARED,
    enough: int = 0,
) -> int:
    """As if no other tenant had any; those of features that it shares are its own, whoever uses them, and those of the
    operator's profile are nobody's, which is not looked at where all is `enough`."""
    asked = definitions.aggregates_of(tenant).union(*(manifest.aggregates for manifest in models))
    taken = SLOT_BYTES * window_slots(asked)
    if taken <= enough:
        return taken
    return SLOT_BYTES * window_slots(asked - set(evaluate_profile(schema).values()))


def _agreed(snapshot: Snapshot, tenant: str, but: ModelName | None = None) -> list[Manifest]:
    """Of the tenant's models: what runs, and what has passed and is to. What may still fail counts once it passes."""
    coming = {} if snapshot.shared is None else snapshot.shared.coming
    found: list[Manifest] = []
    for name in snapshot.models.keys() | coming.keys():
        if name.tenant == tenant and name != but:
            found += coming.get(name, ())
            found += _passed(snapshot.models.get(name, Entry(name)))
    return found


def _passed(entry: Entry) -> list[Manifest]:
    newest = entry.newest
    if newest is not None and newest.manifest is not None and newest.state in ("passed", "rolling out"):
        return [newest.manifest, *entry.running]
    return entry.running


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
