"""Tables in the simulation: what operators and topics do to them, who feeds them, and what a cycle reads of them.

Only one in SEEDS_A_TABLE seeds has any, and what is done to tables is drawn apart from all else: the other seeds go as
if there were none, so that mistakes which hardly any seed shows are not thinned out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.kernel.table_versions import Feed, Table, TableVersion
from replication.catalog import problem
from replication.catalog_tables import table_blobs, table_rollout
from replication.commands import DropTable, FollowTopic, PutTable, UnfollowTopic
from replication.ownership import Reports, living

if TYPE_CHECKING:
    from sim_node import SimNode
    from sim_world import World

SEEDS_A_TABLE = 4
TABLES = ("prices", "products")
READ = TABLES[0]
"""The table that the models of this world read: it is never dropped, as that would be refused."""
TOPICS = ("rows", "others")
SCHEMA = '{"key":"sku","key_type":"text","columns":{}}'
LOOK_MS, ASK_MS, KEPT_MS = 400, 500, 6000

Key = tuple[int, str]
Rows = dict[Key, int]
"""What a table holds, by the topic's partition and the key there; a file's are in partition -1."""
Offsets = tuple[int, ...]


class Topic:
    """Of few keys and values, so that what was so before is soon so again: then a version is one that there was."""

    def __init__(self) -> None:
        self.partitions: list[list[tuple[str, int | None]]] = [[]]

    def ends(self) -> Offsets:
        return tuple(len(records) for records in self.partitions)

    def grow(self, chance: random.Random) -> None:
        if len(self.partitions) < 3 and chance.random() < 0.02:
            self.partitions.append([])
        chance.choice(self.partitions).append((chance.choice("kl"), chance.choice((None, 1, 2))))


def rows_after(rows: Mapping[Key, int], topic: Topic, begin: Offsets, ends: Offsets) -> Rows:
    """With what the topic has between these offsets; partitions that one does not name begin at 0."""
    after = dict(rows)
    for partition, end in enumerate(ends):
        first = begin[partition] if partition < len(begin) else 0
        for key, value in topic.partitions[partition][first:end]:
            if value is None:
                after.pop((partition, key), None)
            else:
                after[partition, key] = value
    return after


@dataclass(frozen=True, slots=True)
class Pinned:
    """What a cycle reads: a version, and the catalog's revision at which it went live; 0: there is no table."""

    version: str = ""
    revision: int = 0


@dataclass(slots=True)
class Build:
    """The next version of a table, as a node makes it of a topic; it takes a while, whoever leads by then."""

    feed: Feed
    version: str
    offsets: Offsets
    done_ms: float


class NodeTables:
    """What one process of a node does about tables."""

    def __init__(self, node: SimNode) -> None:
        self.node = node
        self.builds: dict[str, Build] = {}
        self.kept_until_ms: dict[str, float] = {}
        """Files that may be wished for by a command on its way."""

    def step(self) -> None:
        node = self.node
        if node.is_due("tables", LOOK_MS):
            self._collect()
        for name in list(self.builds):
            self._insist(name)
        if node.world.raft.leader == node.name:
            for name, table in node.catalog.tables.items():
                if name not in self.builds:
                    self._feed(name, table)

    def keep(self, rows: Rows) -> str:
        """The version of these rows, with its file on this node's disk."""
        version = self.node.world.tables.version_of(rows)
        self.node.disk.blobs.add(version)
        self.kept_until_ms[version] = self.node.local_ms + KEPT_MS
        return version

    def put(self, name: str, version: str, feed: int = 0, offsets: Offsets = ()) -> PutTable:
        revision = self.node.catalog.revision
        return PutTable(
            revision=revision, name=name, version=version, schema=SCHEMA, rows=1, bytes=1, feed=feed, offsets=offsets
        )

    def _collect(self) -> None:
        """Files that no table has, as far as this node knows."""
        node, wanted = self.node, table_blobs(self.node.catalog)
        for version in sorted(node.disk.blobs & node.world.tables.contents.keys() - wanted):
            if self.kept_until_ms.get(version, -1e18) < node.local_ms:
                node.disk.blobs.discard(version)

    def _feed(self, name: str, table: Table) -> None:
        """As `node.tables.feeds`: on top of the newest version, if this feed has made it and its file is here."""
        node, world = self.node, self.node.world
        if table.feed is None or table.passed is not None:
            return
        topic, base = world.tables.topics[table.feed.topic], table.newest_fed
        ends = topic.ends()
        if ends == (() if base is None else base.offsets) or (base is not None and base.version not in node.disk.blobs):
            return
        rows = rows_after({}, topic, (), ends) if base is None else self._on_top(base, topic, ends)
        if not any(ends):
            return
        done_ms = node.local_ms + world.tables.random.choice((200, 700, 1500, 4000))
        self.builds[name] = Build(table.feed, self.keep(rows), ends, done_ms)

    def _on_top(self, base: TableVersion, topic: Topic, ends: Offsets) -> Rows:
        return rows_after(self.node.world.tables.contents[base.version], topic, base.offsets, ends)

    def _insist(self, name: str) -> None:
        """Put what is built, until that is agreed or can't be any more."""
        node, build = self.node, self.builds[name]
        self.kept_until_ms[build.version] = node.local_ms + KEPT_MS
        if node.local_ms < build.done_ms:
            return
        command = self.put(name, build.version, build.feed.number, build.offsets)
        table = node.catalog.tables.get(name)
        newest = table.newest if table is not None else None
        done = newest is not None and (newest.version, newest.offsets) == (build.version, build.offsets)
        if done or table is None or problem(node.catalog, command):
            del self.builds[name]
        elif node.is_due(f"put {name}", ASK_MS):
            node.world.propose(node, command)


def pinned(node: SimNode) -> Pinned | None:
    """What a cycle of this node is to read now; None: its file is not here, so that the partition has to wait."""
    table = node.catalog.tables.get(READ)
    if table is None or not table.live:
        return Pinned()
    return Pinned(table.live, table.versions[table.live].served_revision) if table.live in node.disk.blobs else None


def lead(node: SimNode, reports: Reports) -> None:
    world, now_ms = node.world, int(node.local_ms)
    alive = living(node.catalog, reports, now_ms, world.plan_settings)
    commands = table_rollout(node.catalog, tuple(sorted(alive & node.catalog.nodes.keys())))
    world.checks.all_is_valid(node.catalog, commands)
    for command in commands:
        world.propose(node, command)


class Tables:
    """What comes from outside: topics that grow, operators who ask any node, and faults amid a flip or a build."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.there = world.seed % SEEDS_A_TABLE == 1
        self.random = random.Random(f"tables of {world.seed}")
        self.topics = {name: Topic() for name in TOPICS}
        self.contents: dict[str, Rows] = {}

    def version_of(self, rows: Rows) -> str:
        version = hashlib.sha256(repr(sorted(rows.items())).encode()).hexdigest()
        self.contents[version] = rows
        return version

    def having_file(self, version: str) -> set[str]:
        return {node.name for node in self.world.nodes.values() if version in node.disk.blobs}

    def step(self) -> None:
        if not self.there:
            return
        if not self.world.faulty:
            self._replace_what_is_lost()
            return
        for topic in self.topics.values():
            if self.random.random() < 0.15:
                topic.grow(self.random)
        if self.random.random() < 0.06:
            self._operate(self.random.choice(TABLES), self.random.choice((1, 1, 2)))
        changing = self._changing()
        if changing and self.random.random() < 0.03:
            self._disturb(self.random.choice(changing))

    def grow(self) -> None:
        for topic in self.topics.values():
            topic.grow(self.random)

    def _operate(self, name: str, operators: int) -> None:
        """So many at once, none of whom knows of the others, wish for something of the table."""
        for node in self.random.sample(list(self.world.nodes.values()), operators):
            if node.running():
                self._wish(node, name)

    def _wish(self, node: SimNode, name: str) -> None:
        """Of an operator at this node, going by what it knows."""
        table, choice = node.catalog.tables.get(name), self.random.random()
        revision = node.catalog.revision
        if choice < 0.15 and table is not None and name != READ:
            node.propose(DropTable(revision=revision, name=name))
        elif choice < 0.4 and table is not None and table.feed is not None:
            node.propose(UnfollowTopic(revision=revision, name=name))
        elif choice < 0.4 and table is not None and table.fallback is not None:
            node.propose(node.tables.put(name, table.fallback.version))
        elif choice < 0.6:
            topic = self.random.choice(TOPICS)
            node.propose(FollowTopic(revision=revision, name=name, topic=topic, schema=SCHEMA, every_ms=1000))
        else:
            self._put_new(node, name)

    def _put_new(self, node: SimNode, name: str) -> None:
        """Mostly what there never was."""
        number = self.world.next_number() if self.random.random() < 0.8 else 0
        node.propose(node.tables.put(name, node.tables.keep({(-1, "k"): number})))

    def _changing(self) -> list[str]:
        """Tables of which a version is being built, or waits to go live."""
        waiting = {name for name, table in self.world.checks.catalogs[-1].tables.items() if table.passed is not None}
        return sorted(waiting.union(*(node.tables.builds for node in self.world.nodes.values())))

    def _disturb(self, name: str) -> None:
        choice = self.random.random()
        if choice < 0.5:
            self.world.depose()
        elif choice < 0.7:
            self.world.crash(self.random.choice(list(self.world.nodes.values())))
        else:
            self._operate(name, 1)

    def _replace_what_is_lost(self) -> None:
        """Once all else is healed, an operator puts anew what is waited for and no disk has any more."""
        node = self.world.nodes.get(self.world.raft.leader or "")
        if node is None or not node.running() or not node.is_due("replace", 2000):
            return
        for name, table in node.catalog.tables.items():
            needed = [one.version for one in (table.passed, table.versions.get(table.live)) if one is not None]
            if all(self.having_file(version) for version in needed):
                continue
            if table.feed is not None:
                node.propose(UnfollowTopic(revision=node.catalog.revision, name=name))
            else:
                self._put_new(node, name)
