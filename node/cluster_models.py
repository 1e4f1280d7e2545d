"""Models between the tenants' side and the cluster's catalog: what is put there, and what it says.

A command that the catalog refuses because it changed meanwhile is decided anew, a few times; see `replication.catalog`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import msgspec

from node.kernel.clock import Clock
from node.kernel.errors import PeerRefused
from node.kernel.limits import NAME_BYTES_MAX, REASON_BYTES_MAX
from node.kernel.types import AgreedModels, AgreedVersion, ModelName, Quota
from replication.catalog import ENDED, Catalog, model_key
from replication.commands import (
    Command,
    ForgetVersion,
    PutFeatures,
    PutTenant,
    PutVersion,
    QuarantineVersion,
    QuotaLimits,
    RetireVersion,
    SetQuota,
)

_DECISIONS_MAX = 8
"""Two nodes that put the same thing at once refuse each other once; more often, somebody else is at fault."""


class Proposer(Protocol):
    """What is needed of `replication.cluster.Cluster`."""

    @property
    def name(self) -> str: ...

    @property
    def catalog(self) -> Catalog: ...

    async def propose(self, command: Command) -> None: ...

    async def agreed(self) -> Catalog: ...


class CatalogModels:
    """Puts this node's findings into the catalog: `tenants.agreement.ModelPublisher`."""

    def __init__(self, cluster: Proposer, clock: Clock) -> None:
        self._cluster = cluster
        self._clock = clock
        self.told_revision = 0
        """Of the catalog that the tenants' side was told of last: what it wishes was decided on that."""

    def agreed(self) -> AgreedModels:
        """What the tenants' side is told next."""
        catalog = self._cluster.catalog
        self.told_revision = catalog.revision
        return agreed_models(catalog, self._cluster.name)

    async def current(self) -> None:
        await self._cluster.agreed()

    async def put(self, name: ModelName, version: str, blob: str, manifest: str, report: str) -> None:
        told = self.told_revision

        def decide(catalog: Catalog) -> PutVersion:
            if catalog.features_revision > told:
                raise PeerRefused(f"{name} is not put yet: shared features have just changed; it is checked anew")
            return PutVersion(
                revision=catalog.revision,
                tenant=name.tenant,
                model=name.model,
                version=version,
                blob=blob,
                manifest=manifest,
                report=report,
                who=self._cluster.name,
                at_ms=self._clock.now_ms(),
            )

        await insist(self._cluster, decide)

    async def features(self, tenant: str, text: str) -> None:
        """Decided once only: what is newer than `told_revision` has to be looked at before it is proposed again."""
        await self._cluster.propose(
            PutFeatures(
                revision=self.told_revision,
                tenant=tenant,
                text=text,
                who=self._cluster.name,
                at_ms=self._clock.now_ms(),
            )
        )

    async def withdraw(self, name: ModelName, version: str) -> None:
        while self._withdrawal(self._cluster.catalog, name, version) is not None:
            await insist(self._cluster, lambda catalog: self._withdrawal(catalog, name, version))

    def _withdrawal(self, catalog: Catalog, name: ModelName, deleted: str) -> Command | None:
        """The next step: a version retires before it is forgotten. None when all is done, or overtaken by a put."""
        model = catalog.models.get(model_key(name.tenant, name.model))
        if model is None or any(
            version.state not in ENDED and version.version != deleted for version in model.versions.values()
        ):
            return None
        version = next(iter(model.versions.values()))
        if version.state in ENDED:
            return ForgetVersion(
                revision=catalog.revision, tenant=model.tenant, model=model.model, version=version.version
            )
        return RetireVersion(
            revision=catalog.revision,
            tenant=model.tenant,
            model=model.model,
            version=version.version,
            who=self._cluster.name,
            at_ms=self._clock.now_ms(),
        )

    async def quarantine(self, name: ModelName, version: str, reason: str) -> None:
        await insist(self._cluster, lambda catalog: self._quarantine(catalog, name, version, reason))

    def _quarantine(self, catalog: Catalog, name: ModelName, version: str, reason: str) -> Command | None:
        """None when the version is not live any more, or there is none to fall back to."""
        model = catalog.models.get(model_key(name.tenant, name.model))
        if model is None or model.live != version or model.fallback is None:
            return None
        return QuarantineVersion(
            revision=catalog.revision,
            tenant=model.tenant,
            model=model.model,
            version=version,
            fall_back_to=model.fallback.version,
            reason=reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore"),
            who=self._cluster.name,
            at_ms=self._clock.now_ms(),
        )

    async def tenant(self, name: str, settings: str) -> None:
        await insist(
            self._cluster,
            lambda catalog: PutTenant(
                revision=catalog.revision,
                name=name,
                settings=settings,
                who=self._cluster.name,
                at_ms=self._clock.now_ms(),
            ),
        )

    async def change_quota(self, tenant: str, changes: Mapping[str, float | None], who: str) -> None:
        """What an operator allows the tenant from now on, on all nodes; None: what each node's config allows all.

        Raises PeerRefused, ClusterUnavailable.
        """
        await insist(
            self._cluster,
            lambda catalog: SetQuota(
                revision=catalog.revision,
                tenant=tenant,
                limits=msgspec.structs.replace(_limits(catalog, tenant), **changes),
                who=f"{who} by {self._cluster.name}"[:NAME_BYTES_MAX],
                at_ms=self._clock.now_ms(),
            ),
        )


async def insist(cluster: Proposer, decide: Callable[[Catalog], Command | None]) -> None:
    """Propose what `decide` makes of the catalog known here, anew when it was refused because that has changed.

    Nothing when that is None. Raises PeerRefused, ClusterUnavailable.
    """
    for left in reversed(range(_DECISIONS_MAX)):
        catalog = cluster.catalog
        command = decide(catalog)
        if command is None:
            return
        try:
            await cluster.propose(command)
        except PeerRefused:
            if not left or cluster.catalog.revision == catalog.revision:
                raise
        else:
            return


def agreed_models(catalog: Catalog, node: str) -> AgreedModels:
    """What the catalog says of models; a file counts as here once `node` has told the catalog that it verified it."""
    tenants = {name: tenant.settings for name, tenant in catalog.tenants.items()}
    quotas = {
        tenant: Quota(**msgspec.structs.asdict(quota.limits), who=quota.who, at_ms=quota.at_ms)
        for tenant, quota in catalog.quotas.items()
    }
    features = {name: tenant.features for name, tenant in catalog.tenants.items() if tenant.features}
    return AgreedModels(catalog.revision, tuple(_versions(catalog, node)), tenants, quotas, features)


def _limits(catalog: Catalog, tenant: str) -> QuotaLimits:
    quota = catalog.quotas.get(tenant)
    return QuotaLimits() if quota is None else quota.limits


def _versions(catalog: Catalog, node: str) -> Iterator[AgreedVersion]:
    for _, model in sorted(catalog.models.items()):
        for version in sorted(model.versions.values(), key=lambda version: version.revision):
            yield AgreedVersion(
                ModelName(model.tenant, model.model),
                version.version,
                version.blob,
                version.manifest,
                version.report,
                version.state,
                node in catalog.holders.get(version.blob, {}),
                version.served_revision > 0,
                version.reason,
            )
