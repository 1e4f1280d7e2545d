"""(P) The versions of one table and how they follow each other: the same for a node by itself and for a cluster.

A version that was put is `passed`; it waits until it may go live. The one that was live before stays, `retired`, so
that it can be put again: that is a rollback. What was never live, or went out of use before that one, is surplus.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from node.kernel.limits import TABLE_VERSIONS_RETIRED_MAX
from node.kernel.tables import TableSchema


class TableVersion(Struct, frozen=True):
    """`version` is the sha256 of the built file, `schema` as `TableSchema.encode` gives it."""

    version: str
    schema: str
    rows: int
    bytes: int
    state: Literal["passed", "live", "retired"] = "passed"
    who: str = ""
    at_ms: int = 0
    """Who put it, and when by the proposer's clock."""
    served_revision: int = 0
    """When it last went live; 0: never."""

    @property
    def short_version(self) -> str:
        """As inferences name it."""
        return self.version[:12]


class Table(Struct, frozen=True):
    """Treat `versions` as frozen. `revision` is of the last change."""

    name: str
    versions: dict[str, TableVersion]
    live: str = ""
    revision: int = 0

    @property
    def passed(self) -> TableVersion | None:
        """The version that waits to go live."""
        return next((one for one in self.versions.values() if one.state == "passed"), None)

    @property
    def fallback(self) -> TableVersion | None:
        """The version that was live before the live one."""
        retired = (one for one in self.versions.values() if one.state == "retired" and one.served_revision)
        return max(retired, key=lambda version: version.served_revision, default=None)

    @property
    def schema(self) -> TableSchema:
        """Of the live version, or of the one that is to be the first."""
        version = self.versions.get(self.live) or next(iter(self.versions.values()))
        return TableSchema.decode(version.schema)

    @property
    def surplus(self) -> list[str]:
        """Versions that nothing needs any more."""
        ended = [one for one in self.versions.values() if one.state == "retired"]
        kept = sorted(ended, key=lambda one: one.served_revision)[-TABLE_VERSIONS_RETIRED_MAX:]
        return [one.version for one in ended if one not in kept or not one.served_revision]

    def with_put(self, version: TableVersion, revision: int) -> Table:
        """With that version as the wish; one that waited to go live waits no longer. The live one again: no wish."""
        versions = {
            name: replace(one, state="retired") if one.state == "passed" else one for name, one in self.versions.items()
        }
        known = versions.get(version.version)
        if version.version != self.live:
            served = known.served_revision if known is not None else 0
            versions[version.version] = replace(version, state="passed", served_revision=served)
        return replace(self, versions=versions, revision=revision)

    def with_live(self, version: str, revision: int) -> Table:
        """With that version live, and the one before it retired."""
        versions = dict(self.versions)
        if self.live:
            versions[self.live] = replace(versions[self.live], state="retired")
        versions[version] = replace(versions[version], state="live", served_revision=revision)
        return replace(self, versions=versions, live=version, revision=revision)

    def without(self, version: str, revision: int) -> Table:
        left = {name: one for name, one in self.versions.items() if name != version}
        return replace(self, versions=left, revision=revision)
