"""Models between the tenants' side and the cluster's catalog: what is put there, and what it says.

A command that the catalog refuses because it changed meanwhile is decided anew, a few times; see `replication.catalog`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

import msgspec

from node.kernel.clock import Clock
from node.kernel.errors import PeerRefused
from node.kernel.limits import NAME_BYTES_MAX, REASON_BYTES_MAX, STAGES_REPORTED_MAX
from node.kernel.types import AgreedModels, AgreedVersion, ModelName, Quota, StageChange
from replication.catalog import ENDED, Catalog, Model, model_key
from replication.commands import (
    Command,
    ForgetVersion,
    GoLive,
    PutFeatures,
    PutTenant,
    PutVersion,
    QuarantineVersion,
    QuotaLimits,
    RetireVersion,
    SetQuota,
    StageVersion,
)
from tenants.stage import Promote, RollBack

_DECISIONS_MAX = 8
"""Two nodes that put the same thing at once refuse each other once; more often, somebody else is at fault."""


class Proposer(Protocol):
    """What is needed of `replication.cluster.Cluster`."""

    @property
    def name(self) -> str: ...

    @property
    def catalog(self) -> Catalog: ...

    @property
    def leads(self) -> bool: ...

    observed: Mapping[str, bytes]

    def observations(self) -> Sequence[Mapping[str, bytes]]: ...

    async def propose(self, command: Command) -> None: ...

    async def agreed(self) -> Catalog: ...


class CatalogModels:
    """Puts this node's findings into the catalog: `tenants.agreement.ModelPublisher`."""

    def __init__(self, cluster: Proposer, clock: Clock) -> None:
        self._cluster = cluster
        self._clock = clock
        self.told_revision = 0
        """Of the catalog that the tenants' side was told of last: what it wishes was decided on that."""
        self._told: tuple[Catalog, AgreedModels] | None = None

    def agreed(self) -> AgreedModels:
        """What the tenants' side is told next. It is made anew only where models may have changed: going through 2,000
        takes 0.1 s, and owners change often, not least when time counts."""
        catalog, told = self._cluster.catalog, self._told
        self.told_revision = catalog.revision
        if told is not None and _same_models(told[0], catalog):
            models = replace(told[1], revision=catalog.revision)
        else:
            models = agreed_models(catalog, self._cluster.name)
        self._told = catalog, models
        return models

    async def current(self) -> None:
        await self._cluster.agreed()

    async def put(
        self, name: ModelName, version: str, blob: str, manifest: str, report: str, stages: tuple[str, ...] = ()
    ) -> None:
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
                stages=stages,
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
        if model is None or _overtaken(model, deleted):
            return None
        # The live version last: while one is staged, it is the older one, and goes with the newer one.
        version = min(model.versions.values(), key=lambda one: (one.state in ENDED, one.state == "live"))
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
        """None when the version does not run any more, or it is live and there is none to fall back to."""
        return _quarantine(catalog, RollBack(name, version, self._cluster.name, reason, self._clock.now_ms()))

    async def promote(self, wish: Promote) -> None:
        await insist(self._cluster, lambda catalog: _promoted(catalog, wish))

    async def roll_back(self, wish: RollBack) -> None:
        await insist(self._cluster, lambda catalog: _quarantine(catalog, wish))

    def gathered(self, observed: Mapping[str, bytes]) -> Mapping[str, Sequence[bytes]] | None:
        self._cluster.observed = dict(islice(observed.items(), STAGES_REPORTED_MAX))
        if not self._cluster.leads:
            return None
        found: dict[str, list[bytes]] = {}
        for told in self._cluster.observations():
            for version, figures in told.items():
                found.setdefault(version, []).append(figures)
        return found

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


def _overtaken(model: Model, deleted: str) -> bool:
    """Whether another version was put after the deleted one, which may be staged beside a live one put before it."""
    known = model.versions.get(deleted)
    since = known.revision if known is not None else 0
    return any(
        version.state not in ENDED and version.version != deleted and version.revision > since
        for version in model.versions.values()
    )


def _promoted(catalog: Catalog, wish: Promote) -> Command | None:
    """What makes the wish true; None when the version has left the stage that was spoken of."""
    model = catalog.models.get(model_key(wish.name.tenant, wish.name.model))
    staged = model.staged if model is not None else None
    if model is None or staged is None or (staged.version, staged.stage) != (wish.version, wish.stage):
        return None
    named: dict[str, Any] = {
        "revision": catalog.revision,
        "tenant": model.tenant,
        "model": model.model,
        "version": staged.version,
        "holders": tuple(catalog.holders[staged.blob]),
        "reason": _cut(wish.reason),
        "who": wish.who,
        "at_ms": wish.at_ms,
    }
    if wish.to_live or staged.stage + 1 >= len(staged.stages):
        return GoLive(**named)
    return StageVersion(**named, stage=staged.stage + 1)


def _quarantine(catalog: Catalog, wish: RollBack) -> Command | None:
    model = catalog.models.get(model_key(wish.name.tenant, wish.name.model))
    version = model.versions.get(wish.version) if model is not None else None
    if model is None or version is None or version.state not in ("live", "staged"):
        return None
    live, fallback = version.state == "live", model.fallback
    if live and fallback is None:
        return None
    return QuarantineVersion(
        revision=catalog.revision,
        tenant=model.tenant,
        model=model.model,
        version=version.version,
        fall_back_to=fallback.version if live and fallback is not None else "",
        reason=_cut(wish.reason),
        who=wish.who,
        at_ms=wish.at_ms,
    )


def _cut(reason: str) -> str:
    return reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore")


def _same_models(before: Catalog, after: Catalog) -> bool:
    """Of catalogs that came one after the other: what a command does not change stays the same object."""
    return (
        before.models is after.models
        and before.holders is after.holders
        and before.tenants is after.tenants
        and before.quotas is after.quotas
    )


def agreed_models(catalog: Catalog, node: str) -> AgreedModels:
    """What the catalog says of models; a file counts as here once `node` has told the catalog that it verified it."""
    tenants = {name: tenant.settings for name, tenant in catalog.tenants.items()}
    histories = {
        ModelName(model.tenant, model.model): tuple(
            StageChange(one.at_ms, one.version, one.to, one.who, one.reason) for one in model.history
        )
        for model in catalog.models.values()
    }
    quotas = {
        tenant: Quota(**msgspec.structs.asdict(quota.limits), who=quota.who, at_ms=quota.at_ms)
        for tenant, quota in catalog.quotas.items()
    }
    features = {name: tenant.features for name, tenant in catalog.tenants.items() if tenant.features}
    return AgreedModels(catalog.revision, tuple(_versions(catalog, node)), tenants, quotas, features, histories)


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
                version is model.fallback,
                version.reason,
                version.stage,
                version.who,
                version.at_ms,
                version.revision,
            )
