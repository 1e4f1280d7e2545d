"""(P) The versions of one table and how they follow each other: the same for a node by itself and for a cluster.

A version that was put is `passed`; it waits until it may go live. The one that was live before stays, `retired`, so
that it can be put again: that is a rollback. What was never live, or went out of use before that one, is surplus.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from node.kernel.limits import TABLE_VERSIONS_RETIRED_MAX
from node.kernel.tables import TableSchema


def later(some: Sequence[int], others: Sequence[int]) -> bool:
    """Whether any partition's offset is later than the other's; partitions that one does not have yet are at 0."""
    return any(one > other for one, other in zip_longest(some, others, fillvalue=0))


class Feed(Struct, frozen=True):
    """A compacted topic that a table follows: a record's value is the row of its key, one without a value deletes it.

    `schema` as `TableSchema.encode` gives it; `number` tells it from other feeds that the table has had.
    """

    topic: str
    schema: str
    every_ms: int
    """The shortest time between two versions."""
    who: str = ""
    at_ms: int = 0
    number: int = 0

    def same_wish(self, other: Feed | None) -> bool:
        return other is not None and (self.topic, self.schema, self.every_ms) == (
            other.topic,
            other.schema,
            other.every_ms,
        )


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
    feed: int = 0
    """Number of the feed that it is of; 0: it is a file's."""
    offsets: tuple[int, ...] = ()
    """Of a feed's version, by partition: it holds all that the topic had before them."""

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
    feed: Feed | None = None

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
        """Of the live version, or of the one that is to be the first: not of whichever comes first in `versions`, which
        is another one at a node that got the catalog as a dump."""
        version = self.versions.get(self.live) or self.passed
        if version is None and self.feed is not None:
            return TableSchema.decode(self.feed.schema)
        assert version is not None
        return TableSchema.decode(version.schema)

    @property
    def newest(self) -> TableVersion | None:
        """The version that waits to go live, or else the live one."""
        return self.passed or self.versions.get(self.live)

    @property
    def newest_fed(self) -> TableVersion | None:
        """The newest version, if its feed has made it."""
        return self._if_fed(self.newest)

    @property
    def live_fed(self) -> TableVersion | None:
        """The live version, if its feed has made it."""
        return self._if_fed(self.versions.get(self.live))

    def _if_fed(self, version: TableVersion | None) -> TableVersion | None:
        if version is None or self.feed is None or version.feed != self.feed.number:
            return None
        return version

    def problem_of(self, version: TableVersion) -> str:
        """Why that version can't be put; '' when it can. Of two nodes that both take themselves for the one that feeds
        the table, the one that is behind must not take it back."""
        if not version.feed:
            return f"table {self.name} follows topic {self.feed.topic}; unfollow it first" if self.feed else ""
        if self.feed is None or self.feed.number != version.feed:
            return f"table {self.name} does not follow that topic any more"
        before = self.newest_fed
        if before is not None and later(before.offsets, version.offsets):
            return f"table {self.name} is as of {before.offsets} already, later than {version.offsets}"
        return ""

    def with_feed(self, feed: Feed | None, revision: int) -> Table:
        """Following that topic from now on; None: none. What is live stays."""
        return replace(self, feed=None if feed is None else replace(feed, number=revision), revision=revision)

    @property
    def surplus(self) -> list[str]:
        """Versions that nothing needs any more."""
        ended = [one for one in self.versions.values() if one.state == "retired"]
        kept = sorted(ended, key=lambda one: one.served_revision)[-TABLE_VERSIONS_RETIRED_MAX:]
        return [one.version for one in ended if one not in kept or not one.served_revision]

    def with_put(self, version: TableVersion, revision: int) -> Table:
        """With that version as the wish; one that waited to go live waits no longer. The live one again: no wish, but
        it may be as of a later point of its topic."""
        versions = {
            name: replace(one, state="retired") if one.state == "passed" else one for name, one in self.versions.items()
        }
        known = versions.get(version.version)
        if known is None or version.version != self.live:
            served = known.served_revision if known is not None else 0
            versions[version.version] = replace(version, state="passed", served_revision=served)
        else:
            versions[version.version] = replace(known, feed=version.feed, offsets=version.offsets)
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
