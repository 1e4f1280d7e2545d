"""(P) What becomes of a tenant's features.toml: in force at once on a node by itself, by the catalog in a cluster.

A new state of the file is taken whole or not at all: what is in force stays while the new one has mistakes, or while
models or other tenants' features use what it would take away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from node.kernel.errors import ManifestError, QuotaRefused
from node.kernel.types import EventSchema
from tenants.definitions import Definitions, replaced
from tenants.manifest import Manifest
from tenants.quotas import check_features
from tenants.registry import (
    Action,
    CountRefusal,
    FeaturesSeen,
    Shared,
    Snapshot,
    Step,
    WriteFeaturesStatus,
    neighbours,
    prospect,
)
from tenants.sharing import withheld_features

_Value = TypeVar("_Value")


def seen(snapshot: Snapshot, event: FeaturesSeen, schema: EventSchema) -> Step:
    """A file that was found, changed or deleted."""
    tenant, text = event.tenant, event.text
    in_force, shared = snapshot.definitions.files.get(tenant, ""), snapshot.shared
    if shared is not None and _says_nothing_new(shared, event, in_force):
        taken = {**shared.taken_features, tenant: text} if text or in_force else shared.taken_features
        asked = _without(shared.asked_features, tenant)
        return _accepted(snapshot, snapshot.sharing(taken_features=taken, asked_features=asked), tenant)
    if text == in_force:
        return _accepted(snapshot, snapshot, tenant)
    try:
        definitions = _replaced(snapshot, tenant, text, schema)
        check_features(snapshot, definitions, tenant, schema)
    except ManifestError as error:
        after, told = refused(snapshot, tenant, error.problems)
        counted = (CountRefusal(tenant, error.limit),) if isinstance(error, QuotaRefused) and told else ()
        return after, (*counted, *told)
    if shared is not None:
        after = snapshot.sharing(asked_features={**shared.asked_features, tenant: text})
    else:
        after = replace(snapshot, number=snapshot.number + 1, definitions=definitions)
    return _accepted(snapshot, after, tenant)


def _says_nothing_new(shared: Shared, event: FeaturesSeen, in_force: str) -> bool:
    """As of a tenant.toml: what was told before, what may be older than the cluster's, and silence are no wishes."""
    taken = shared.taken_features.get(event.tenant)
    maybe_old = event.first and taken is None and bool(in_force)
    return event.text == in_force or event.text == taken or maybe_old or (not event.text and not taken)


def _accepted(before: Snapshot, after: Snapshot, tenant: str) -> Step:
    if tenant in after.refused_features:
        left = _without(after.refused_features, tenant)
        after = replace(after, number=after.number + 1, refused_features=left)
    return after, (WriteFeaturesStatus(tenant),) if after is not before else ()


def refused(snapshot: Snapshot, tenant: str, problems: tuple[str, ...]) -> Step:
    """What is in force stays."""
    if snapshot.shared is not None:
        snapshot = snapshot.sharing(asked_features=_without(snapshot.shared.asked_features, tenant))
    if snapshot.refused_features.get(tenant) == problems:
        return snapshot, ()
    known = {**snapshot.refused_features, tenant: problems}
    return replace(snapshot, number=snapshot.number + 1, refused_features=known), (WriteFeaturesStatus(tenant),)


def agreed(snapshot: Snapshot, schema: EventSchema) -> Step:
    """The catalog changed: what was to be published may have become a mistake, and what is told may be outdated."""
    actions: list[Action] = []
    if snapshot.shared is None:
        return snapshot, ()
    for tenant, text in sorted(snapshot.shared.asked_features.items()):
        if text == snapshot.definitions.files.get(tenant, ""):
            continue  # published; the catalog's answer follows
        try:
            _replaced(snapshot, tenant, text, schema)
        except ManifestError as error:
            snapshot, told = refused(snapshot, tenant, error.problems)
            actions.extend(told)
    return snapshot, tuple(actions)


def _replaced(snapshot: Snapshot, tenant: str, text: str, schema: EventSchema) -> Definitions:
    """Raises ManifestError."""
    definitions = replaced(snapshot.definitions, tenant, text, _users(snapshot), schema)
    if problems := withheld_features(definitions, tenant, neighbours(snapshot)):
        raise ManifestError(problems)
    return definitions


def _users(snapshot: Snapshot) -> list[Manifest]:
    """Of what runs, is to run, or would run again if that failed."""
    before = [entry.previous.manifest for entry in snapshot.models.values() if entry.previous is not None]
    return [*(manifest for _, manifest in prospect(snapshot)), *before]


def _without(kept: Mapping[str, _Value], key: str) -> dict[str, _Value]:
    return {other: value for other, value in kept.items() if other != key}
