"""What must hold whatever fails: each check looks at the whole world and computes what is right by itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from sim_broker import Row, plain_fold
from sim_models import ModelChecks
from sim_table_checks import TableChecks

from node.state.memory import MemoryStore
from replication.catalog import Catalog, apply, problem
from replication.commands import Command, PartitionCommand, StartMove

if TYPE_CHECKING:
    from sim_world import World

STALE_MS = 4500
"""A leader's view may be so old: a report is late by the longest delay of a message, believed until its node counts as
silent, and a command is on its way as long again as a message."""


class InvariantBroken(AssertionError):
    """The message names the invariant; the simulator adds the seed and what happened last."""


class Checks:
    def __init__(self, world: World) -> None:
        self.world = world
        self.models = ModelChecks(world)
        self.tables = TableChecks(world)
        self.catalogs: list[Catalog] = [Catalog()]
        self.effective: set[Command] = set()
        self.history: list[dict[int, dict[bytes, bytes]]] = []
        self.rows: list[dict[bytes, Row]] = []
        self.commit_ms: list[list[float]] = []

    def fail(self, invariant: str, *facts: object) -> None:
        raise InvariantBroken(f"{invariant}: {' '.join(str(fact) for fact in facts)}")

    def add_partition(self) -> None:
        self.history.append({0: {}})
        self.rows.append({})
        self.commit_ms.append([])

    # (e) and (f): the catalog

    def catalog_is_agreed(self, index: int, command: Command, catalog: Catalog) -> None:
        if index < len(self.catalogs):
            if self.catalogs[index] != catalog:
                self.fail("(e) catalogs differ at one index", index)
            return
        before = self.catalogs[-1]
        if catalog.revision != before.revision or catalog.leases != before.leases:
            if command in self.effective:
                self.fail("(e) a command counted twice", command)
            self.effective.add(command)
            self.models.changed(command, before, catalog)
            self.tables.changed(command, before, catalog)
        self._changes_are_sound(before, catalog)
        self.catalogs.append(catalog)

    def catalog_is_copied(self, index: int, catalog: Catalog) -> None:
        if self.catalogs[index] != catalog:
            self.fail("(e) a dump differs from the catalog at its index", index)

    def _changes_are_sound(self, before: Catalog, after: Catalog) -> None:
        if after.partitions is before.partitions:
            return
        moving = sum(held.move is not None for held in after.partitions)
        if moving > after.settings.moves_max:
            self.fail("(f) too many moves at once", moving)
        for partition, (old, new) in enumerate(zip(before.partitions, after.partitions, strict=False)):
            if new.epoch != old.epoch + (new.owner != old.owner):
                self.fail("(f) epoch and owner do not change together", partition, old, new)
            if new.owner in new.standbys or len(set(new.standbys)) < len(new.standbys):
                self.fail("(f) a replica twice on one node", partition, new)
            if old.move is not None and new.move is not None and old.move != new.move:
                self.fail("(f) a move replaced by another", partition, old, new)

    def plan_is_right(self, catalog: Catalog, commands: Sequence[PartitionCommand]) -> None:
        twice = [partition for partition, count in Counter(c.partition for c in commands).items() if count > 1]
        if twice:
            self.fail("(f) two steps of one partition at once", twice)
        self.all_is_valid(catalog, commands)
        for command in commands:
            if isinstance(command, StartMove):
                self._target_has_caught_up(command)
                self._target_has_tried_its_models(command)

    def all_is_valid(self, catalog: Catalog, commands: Sequence[Command]) -> None:
        for command in commands:
            reason = problem(catalog, command)
            if reason:
                self.fail("(f) the leader proposes what the catalog refuses", command, reason)
            catalog = apply(catalog, command)

    def _target_has_caught_up(self, command: StartMove) -> None:
        world, partition = self.world, command.partition
        node = world.nodes[command.to]
        if not world.is_well(node):
            return
        replica = node.replicas.get(partition)
        offset = -1 if replica is None else replica.store.changelog_offset()
        lag = world.logs[partition].frames_after(offset)
        recent = sum(at >= world.now_ms - STALE_MS for at in self.commit_ms[partition][-100:])
        if offset < 0 or lag > world.plan_settings.caught_up_frames + recent:
            self.fail("(f) a move onto a standby that lags", command, "lag", lag, "recent", recent)

    def _target_has_tried_its_models(self, command: StartMove) -> None:
        """Or what its last process said is still believed."""
        node = self.world.nodes[command.to]
        if self.world.is_well(node) and node.tries_models and node.local_ms - node.booted_ms > STALE_MS:
            self.fail("(f) a move onto a node that tries its models", command)

    # (a), (b), (c): what was committed, and what is made of it

    def committed(self, partition: int) -> None:
        log = self.world.logs[partition]
        after, done = log.commits[-1]
        self.world.note("commit", partition, done.epoch, done.session, after, done.next_event)
        if not log.started or done.session != log.started[-1]:
            self.fail("(c) a session committed that another had fenced", partition, done.session, log.started[-3:])
        if len(log.commits) > 1:
            before = log.commits[-2][1]
            if done.epoch < before.epoch:
                self.fail("(c) a replaced owner committed", partition, done.epoch, "after", before.epoch)
            if done.first_event != before.next_event:
                self.fail("(a) events committed twice or left out", partition, before.next_event, done.first_event)
        if done.inferences != tuple(range(done.first_event, done.next_event)):
            self.fail("(a) a commit without one inference for each event", partition, done.inferences)
        self.tables.committed(partition, done)
        rows = self.rows[partition] = plain_fold(self.rows[partition], done.first_event, done.next_event)
        self.history[partition][after] = {name: np.array(row, "<f8").tobytes() for name, row in rows.items()}
        self.commit_ms[partition].append(self.world.now_ms)

    def store_is_right(self, node: str, partition: int, store: MemoryStore) -> None:
        expected = self.history[partition].get(store.changelog_offset())
        if expected is None:
            self.fail("(b) a store at an offset where no frame ends", node, partition, store.changelog_offset())
        elif dict(store.scan(None, 1000)) != expected:
            self.fail("(b) a store differs from the plain fold", node, partition, store.changelog_offset())

    # (d) and (g): at every step

    def at_most_one_owner(self) -> None:
        owners: dict[int, str] = {}
        for node in self.world.nodes.values():
            if not node.alive or not node.has_lease():
                continue
            for partition, replica in node.replicas.items():
                if replica.session is not None and node.may_own(partition, replica.session.epoch):
                    first = owners.setdefault(partition, node.name)
                    if first != node.name:
                        self.fail("(d) two nodes own a partition under valid leases", partition, first, node.name)

    def cut_is_safe(self, partition: int, before: int) -> None:
        holders = [n.name for n in self.world.nodes.values() if n.disk.restores_from(partition) >= before]
        calm = self.world.now_ms - self.world.loss_ms > STALE_MS
        wanted = self.world.settings.snapshot_holders_min if calm else 1
        if len(holders) < wanted:
            self.fail("(g) the changelog is cut where too few can restore", partition, before, holders)

    def deletion_is_safe(self, partition: int) -> None:
        """What is left must outlive the loss of a disk, as it must when a changelog is cut."""
        start = self.world.logs[partition].start
        holders = [n.name for n in self.world.nodes.values() if n.disk.restores_from(partition) >= start]
        if start and len(holders) < self.world.settings.snapshot_holders_min:
            self.fail("(g) a copy is deleted that too few others have", partition, start, holders)

    def can_be_restored(self) -> None:
        for partition, log in enumerate(self.world.logs):
            if log.start and not any(n.disk.restores_from(partition) >= log.start for n in self.world.nodes.values()):
                self.fail("(g) nothing restores a partition any more", partition, log.start)

    # (h) and the whole of (a), (b): at the end

    def unfinished(self) -> str:
        """Why the cluster is not whole yet; '' once it is."""
        catalog = self.catalogs[-1]
        able = [node.name for node in catalog.nodes.values() if not node.draining]
        count = self.world.settings.standby_count
        standbys = range(max(0, min(count, len(able) - 1)), count + 1)
        for partition, log in enumerate(self.world.logs):
            held = catalog.partitions[partition]
            owner = self.world.nodes.get(held.owner)
            if owner is None or held.move is not None:
                return f"partition {partition} has no owner, or moves: {held}"
            if len(held.standbys) not in standbys:
                return f"partition {partition} has standbys {held.standbys}, {standbys} are wanted"
            for name in (held.owner, *held.standbys):
                replica = self.world.nodes[name].replicas.get(partition)
                progress = 0 if replica is None else replica.store.progress().get("events", 0)
                if progress != log.source_end:
                    return f"partition {partition} on {name} is at event {progress} of {log.source_end}"
        owned = Counter(held.owner for held in catalog.partitions)
        counts = [owned[name] for name in able] or [0]
        if max(counts) - min(counts) > 1:
            return f"owners are not balanced: {dict(owned)}"
        return self.models.unfinished(catalog) or self.tables.unfinished(catalog)

    def at_the_end(self) -> None:
        for partition, log in enumerate(self.world.logs):
            if log.inferences != Counter(range(log.source_end)):
                self.fail("(a) not one inference for each event", partition)
            held = self.catalogs[-1].partitions[partition]
            for name in (held.owner, *held.standbys):
                store = self.world.nodes[name].replicas[partition].store
                self.store_is_right(name, partition, store)
                if store.changelog_offset() != log.frame_ends[-1]:
                    self.fail("(b) a store is not at the changelog's end", name, partition)
