"""What must hold of tables: computed from the commands alone, by other rules than the catalog's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from sim_broker import Transaction
from sim_tables import READ, Offsets, rows_after

from node.kernel.table_versions import Table, TableVersion
from replication.catalog import Catalog
from replication.commands import Command, DropTable, FlipTable, FollowTopic, ForgetTable, PutTable, UnfollowTopic

if TYPE_CHECKING:
    from sim_world import World

TableCommand: TypeAlias = PutTable | FollowTopic | UnfollowTopic | FlipTable | ForgetTable | DropTable


@dataclass(slots=True)
class Known:
    """Of one table, from the commands that counted."""

    changed: int
    """The catalog's revision after the last of them."""
    live: str = ""
    before: str = ""
    """What was live until the last flip."""
    wish: str = ""
    """What is to go live; '': nothing is."""
    feed: int = 0
    topic: str = ""
    offsets: dict[int, Offsets] = field(default_factory=dict)
    """Feed -> up to where its topic is in the table."""


class TableChecks:
    """(j): one version of a table is live, everywhere from one place of the catalog on; the newest wish goes live next,
    and only where its file is; the version before stays; a feed goes forward only, and makes what its topic says."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.known: dict[str, Known] = {}
        self.gone: dict[str, int] = {}
        self.flips: dict[int, str] = {0: ""}
        """Revision -> what of the table that is read has gone live there."""
        self.reached: dict[int, int] = {}
        """Partition -> the flip that its newest commit has seen."""

    def _fail(self, what: str, *facts: object) -> None:
        self.world.checks.fail(f"(j) {what}", *facts)

    # what the catalog agrees on

    def changed(self, command: Command, before: Catalog, after: Catalog) -> None:
        if not isinstance(command, TableCommand):
            if after.tables != before.tables:
                self._fail("a command that is about no table changes one", command)
            return
        others = {name for name in before.tables.keys() | after.tables.keys() if name != command.name}
        if any(before.tables.get(name) != after.tables.get(name) for name in others):
            self._fail("a command changes another table", command)
        known = self._known_before(command)
        self._follow(known, command)
        table = after.tables.get(command.name)
        if table is None:
            self._is_gone(command, known, after)
        else:
            self._is_sound(table, known, command)
        known.changed = after.revision

    def _known_before(self, command: TableCommand) -> Known:
        known = self.known.get(command.name)
        if known is None:
            if command.revision < self.gone.get(command.name, 0):
                self._fail("a table comes back by a command from before it went", command)
            known = self.known[command.name] = Known(0)
        if command.revision < known.changed:
            self._fail("a command counts that knew nothing of the one before", command, known.changed)
        return known

    def _follow(self, known: Known, command: TableCommand) -> None:
        """What is known, with that command."""
        if isinstance(command, PutTable):
            if command.feed != known.feed:
                self._fail("a version that is not of what the table follows", command, known.feed)
            known.wish = "" if command.version == known.live else command.version
        elif isinstance(command, FollowTopic):
            known.feed, known.topic = self.world.checks.catalogs[-1].revision + 1, command.topic
        elif isinstance(command, UnfollowTopic):
            known.feed, known.topic = 0, ""
        elif isinstance(command, FlipTable):
            self._flipped(known, command, self.world.checks.catalogs[-1])

    def _flipped(self, known: Known, command: FlipTable, before: Catalog) -> None:
        version = command.version
        self.world.note("flip", command.name, version[:4])
        if version != known.wish:
            self._fail("a flip to what is not the newest wish", command.name, version[:4], known.wish[:4])
        lacking = [n.name for n in self.world.nodes.values() if self.world.is_well(n) and version not in n.disk.blobs]
        if lacking:
            self._fail("a version went live on nodes that lack its file", command.name, version[:4], lacking)
        if not set(command.holders) <= before.holders[version].keys():
            self._fail("a flip counts though not all of its holders have the file any more", command)
        known.before, known.live, known.wish = known.live, version, ""
        if command.name == READ:
            self.flips[before.revision + 1] = version

    def _is_gone(self, command: TableCommand, known: Known, after: Catalog) -> None:
        if not (isinstance(command, DropTable) or (isinstance(command, UnfollowTopic) and not known.live)):
            self._fail("a table went that nobody has dropped", command)
        del self.known[command.name]
        self.gone[command.name] = after.revision

    def _is_sound(self, table: Table, known: Known, command: TableCommand) -> None:
        if isinstance(command, DropTable):
            self._fail("a table that was dropped is there", command)
        live = [one.version for one in table.versions.values() if one.state == "live"]
        if table.live != known.live or live != ([known.live] if known.live else []):
            self._fail("not one version is live, or another than went live", table.name, live, known.live)
        waiting = [one.version for one in table.versions.values() if one.state == "passed"]
        if waiting != ([known.wish] if known.wish else []):
            self._fail("what waits is not the newest wish", table.name, waiting, known.wish)
        if known.before and known.before not in table.versions:
            self._fail("the version before is gone", table.name, known.before[:4], command)
        if known.feed:
            self._feed_goes_forward(table, known)

    def _feed_goes_forward(self, table: Table, known: Known) -> None:
        newest = table.versions.get(known.wish or known.live)
        if newest is None or newest.feed != known.feed:
            if known.feed in known.offsets:
                self._fail("what a feed has made is not the newest", table.name, known)
            return
        was, now = known.offsets.get(known.feed, ()), newest.offsets
        back = [place for place, offset in enumerate(was) if offset > (now[place] if place < len(now) else 0)]
        if back:
            self._fail("a feed went back", table.name, was, now)
        known.offsets[known.feed] = now
        if not self._is_the_topics(newest, known.topic):
            self._fail("a version is not what its topic says", table.name, newest.version[:4], now)

    def _is_the_topics(self, version: TableVersion, topic: str) -> bool:
        tables = self.world.tables
        return tables.contents[version.version] == rows_after({}, tables.topics[topic], (), version.offsets)

    # what partitions read

    def committed(self, partition: int, done: Transaction) -> None:
        version, revision = done.table
        if self.flips.get(revision) != version:
            self._fail("a partition read what did not go live there", partition, version[:4], revision)
        if revision < self.reached.get(partition, 0):
            self._fail("a partition went back to what was live before", partition, version[:4], revision)
        self.reached[partition] = revision

    # at the end

    def unfinished(self, catalog: Catalog) -> str:
        """Everything that is wished for is live, all that is kept is everywhere, and nothing else is."""
        for name, table in catalog.tables.items():
            if table.passed is not None or table.live != self.known[name].live:
                return f"table {name} waits for {table.passed}"
            if table.surplus:
                return f"table {name} has {table.surplus}, which nothing needs"
            why = self._behind(table)
            if why:
                return why
        return self._files_differ(catalog)

    def _behind(self, table: Table) -> str:
        known = self.known[table.name]
        ends = self.world.tables.topics[known.topic].ends() if known.feed else ()
        if any(ends) and known.offsets.get(known.feed) != ends:
            return f"table {table.name} is as of {known.offsets.get(known.feed)}, its topic at {ends}"
        return ""

    def _files_differ(self, catalog: Catalog) -> str:
        wanted = {version for table in catalog.tables.values() for version in table.versions}
        nodes, known = self.world.nodes.values(), self.world.tables.contents.keys()
        if catalog.holders.keys() & known != wanted:
            return f"the catalog says who has files, not of {wanted}, but of {catalog.holders.keys() & known}"
        for version in wanted:
            having = self.world.tables.having_file(version)
            if having and (having != catalog.nodes.keys() or catalog.holders[version].keys() != having):
                return f"not every node has version {version[:4]} of a table"
        left = {version for node in nodes for version in node.disk.blobs & known} - wanted
        return f"files that no table has are left: {left}" if left else ""
