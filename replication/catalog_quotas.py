"""(P) How operators' quotas change in the catalog, and what they refuse there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from node.kernel import limits
from replication.catalog_values import ENDED, Catalog, Outcome, TenantQuota, addition_stale, advanced, put, stale
from replication.commands import QuotaLimits, SetQuota

_NONE: Final = QuotaLimits()


def _set_quota(catalog: Catalog, command: SetQuota) -> Outcome:
    tenant, before = command.tenant, catalog.quotas.get(command.tenant)
    if (_NONE if before is None else before.limits) == command.limits:
        return catalog
    if before is None and len(catalog.quotas) >= limits.TENANTS_MAX:
        return f"{len(catalog.quotas)} tenants have quotas, the most that may; clear one first"
    late = addition_stale(catalog, command) if before is None else stale(f"quota of {tenant}", before.revision, command)
    if late:
        return late
    revision = catalog.revision + 1
    if command.limits == _NONE:
        fewer = {name: quota for name, quota in catalog.quotas.items() if name != tenant}
        return advanced(catalog, quotas=fewer, removed_revision=revision)
    quota = TenantQuota(command.limits, command.who, command.at_ms, revision)
    return advanced(catalog, quotas=put(catalog.quotas, tenant, quota))


def model_problem(catalog: Catalog, tenant: str) -> str:
    """Why the tenant may not have one more model; '' when it may. Nodes ask first: this is for two that ask at once."""
    quota = catalog.quotas.get(tenant)
    most = None if quota is None else quota.limits.models_max
    running = sum(
        model.tenant == tenant and any(version.state not in ENDED for version in model.versions.values())
        for model in catalog.models.values()
    )
    if most is None or running < most:
        return ""
    return f"tenant {tenant} has {running} models and its quota models_max is {most}; ask the operator for more"


HANDLERS: Final[Mapping[type, Callable[[Catalog, Any], Outcome]]] = {SetQuota: _set_quota}
