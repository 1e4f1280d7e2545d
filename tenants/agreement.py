"""(P) What tenants' models are to a whole cluster: what one node publishes, and how it reads what was agreed.

A version travels as its manifest's text and the report of its trial; every node makes the same ModelVersion of
them. The model file itself travels by its sha256, elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from node.kernel.errors import ManifestError
from node.kernel.types import AgreedVersion, EventSchema, ModelName, ModelVersion
from tenants.manifest import Manifest, parse_manifest
from tenants.shared_names import Resolver
from tenants.stage import Promote, RollBack


class ModelPublisher(Protocol):
    """Puts into the cluster's catalog what was found on this node. Each call may be repeated without harm.

    Each returns once `TenantService.agreed` has been told of a revision that has it. Raises ClusterUnavailable, or
    PeerRefused with the catalog's reason; the caller tries again.
    """

    async def current(self) -> None:
        """Return once `TenantService.agreed` has been told all that the cluster had agreed before this call."""
        ...

    async def put(
        self, name: ModelName, version: str, blob: str, manifest: str, report: str, stages: tuple[str, ...] = ()
    ) -> None:
        """A version that passed its trial becomes the newest of its model, also one that had retired. With `stages`
        it goes through these beside the live version, if there is one.

        Its tenant is in the catalog already; the file `blob` is in this node's blob store.
        """
        ...

    async def withdraw(self, name: ModelName, version: str) -> None:
        """The model was deleted when `version` was its newest: retire and forget all its versions.

        Nothing is done, and that is no error, when another version waits or is live by now, or the model is not known.
        """
        ...

    async def quarantine(self, name: ModelName, version: str, reason: str) -> None:
        """The version must not run any more; if it is live, the one that was live before is again.

        Nothing is done, and that is no error, when it does not run any more or is live and none was live before.
        """
        ...

    async def features(self, tenant: str, text: str) -> None:
        """Put a tenant's features.toml, '' for none; refused where models or others' features changed meanwhile."""
        ...

    async def promote(self, wish: Promote) -> None:
        """The staged version goes to its next stage, or is live. Nothing is done when it has left that stage."""
        ...

    async def roll_back(self, wish: RollBack) -> None:
        """As `quarantine`, by whoever the wish names."""
        ...

    def gathered(self, observed: Mapping[str, bytes]) -> Mapping[str, Sequence[bytes]] | None:
        """Tell the cluster what this node has observed of staged versions, by version; what all have, at the node that
        is to judge them now, None at all others. Called again and again; never waits."""
        ...

    async def tenant(self, name: str, settings: str) -> None:
        """Put a tenant's settings: the text of its tenant.toml, '' without one."""
        ...


@dataclass(frozen=True, slots=True)
class TrialReport:
    """What a trial found; CPU seconds, bytes the model takes in a worker."""

    seconds_per_call: float
    seconds_per_row: float
    memory_bytes: int
    class_name: str
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ReadVersion:
    manifest: Manifest
    version: ModelVersion
    report: TrialReport


def encode_report(report: TrialReport) -> str:
    """As JSON, the same text for equal reports."""
    return msgspec.json.encode(report, order="deterministic").decode()


def decode_report(text: str) -> TrialReport:
    """Raises ManifestError for what `encode_report` of this release does not give."""
    try:
        return msgspec.json.decode(text, type=TrialReport)
    except msgspec.MsgspecError as error:
        raise ManifestError([f"the report of its trial can't be read here ({error}); upgrade this node"]) from None


def read_version(agreed: AgreedVersion, schema: EventSchema, shared: Resolver) -> ReadVersion:
    """The version as this node runs it. Raises ManifestError when it can't: its [events] may differ, or its release."""
    name = agreed.name
    manifest = parse_manifest(f"{name.model}.toml", name.tenant, name.model, agreed.manifest.encode(), schema, shared)
    report = decode_report(agreed.report)
    version = manifest.version(agreed.blob, report.labels)
    if version.version != agreed.version:
        raise ManifestError(
            [f"{name.model}.toml: makes version {version.short_version} here, not {agreed.version[:12]}; put it again"]
        )
    return ReadVersion(manifest, version, report)
