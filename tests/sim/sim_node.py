"""A node: its copy of the catalog, its lease, its replicas; and, while it leads, the planner."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import sim_models
import sim_tables
from sim_disk import Disk
from sim_session import Replica

from replication.catalog import Assignment, Catalog, apply, decode_catalog, encode_catalog, problem
from replication.catalog_machine import Ending
from replication.commands import Command, CompleteMove, JoinNode, RenewLease
from replication.lease import NUMBERS_A_PROCESS
from replication.ownership import NodeReport, Progress, Reports, may_own, plan
from replication.report import has_ended
from replication.retention import cut_offset, may_forget

if TYPE_CHECKING:
    from sim_world import World

RENEW_MS, REPORT_MS, PLAN_MS, CUT_MS, FLUSH_MS, SNAPSHOT_MS, DROP_MS = 300, 200, 300, 1000, 900, 1700, 1500
TRIALS_MS = (0.0, 400.0, 7_000.0)
"""How long a node tries its models after a start, in turns. The checker of moves looks at times over its STALE_MS."""


@dataclass(frozen=True, slots=True)
class Told:
    """A report, as the leader keeps it."""

    incarnation: int
    number: int
    partitions: Mapping[int, Progress]
    verified: Mapping[int, int]
    tries_models: bool
    at_ms: float = 0.0


class SimNode:
    def __init__(self, world: World, name: str, rack: str, rate: float, offset_ms: float) -> None:
        self.world = world
        self.name = name
        self.rack = rack
        self.rate = rate
        self.offset_ms = offset_ms
        self.tick()
        self.disk = Disk()
        self.catalog = Catalog()
        self.applied = 0
        self.alive = True
        self.paused_until_ms = -1.0
        self.start_at_ms = 0.0
        self.folds = 1.0
        self.boots = 0
        self.joined = 0
        self.boot()

    def boot(self) -> None:
        """A new process on the disk as it is."""
        self.alive = True
        self.boots += 1
        self.booted_ms = self.local_ms
        self.renewals = 0
        self.reported = 0
        self.pending: dict[int, float] = {}
        self.last_quorum_ms: float | None = None
        self.replicas: dict[int, Replica] = {}
        self.unused_since: dict[int, float] = {}
        self.due: dict[str, float] = {}
        self.tables = sim_tables.NodeTables(self)
        self.heard: dict[str, float] = {}
        self.endings: dict[str, Ending] = {}
        self.became_leader(0)

    def wipe(self) -> None:
        """A new disk: the catalog, too, comes from the others."""
        self.disk = Disk(self.disk.incarnation + 1)
        self.catalog, self.applied = Catalog(), 0

    def tick(self) -> None:
        """The world's time has gone on, and with it this node's clock."""
        self.local_ms = self.world.now_ms * self.rate + self.offset_ms

    def running(self) -> bool:
        return self.alive and self.world.now_ms >= self.paused_until_ms

    @property
    def tries_models(self) -> bool:
        return self.local_ms - self.booted_ms < TRIALS_MS[(self.boots + ord(self.name[-1])) % len(TRIALS_MS)]

    def is_due(self, what: str, every_ms: float) -> bool:
        now_ms = self.local_ms
        if now_ms < self.due.get(what, -1e18):
            return False
        self.due[what] = now_ms + every_ms
        return True

    # the agreed log

    def catch_up(self, entries: int) -> None:
        for command in self.world.raft.log[self.applied : self.applied + entries]:
            self.catalog = apply(self.catalog, command)
            self.applied += 1
            self.world.checks.catalog_is_agreed(self.applied, command, self.catalog)
            if isinstance(command, RenewLease):
                self._renewed(command.name, command.number)

    def _renewed(self, name: str, number: int) -> None:
        """A renewal has come back, by the log or in a dump."""
        self.heard[name] = self.local_ms
        sent_ms = self.pending.get(number)
        if name == self.name and sent_ms is not None and self.catalog.leases.get(name) == number:
            self.last_quorum_ms = sent_ms
            self.pending = {other: at_ms for other, at_ms in self.pending.items() if other > number}

    def install(self, source: SimNode) -> None:
        """A dump, for a node that is far behind."""
        before = self.catalog.leases
        self.catalog, self.applied = decode_catalog(encode_catalog(source.catalog)), source.applied
        self.world.checks.catalog_is_copied(self.applied, self.catalog)
        for name, number in self.catalog.leases.items():
            if number != before.get(name):
                self._renewed(name, number)

    # who is there

    def saw_end(self, name: str) -> None:
        """The other's process has ended and there is no new one yet."""
        member, number = self.catalog.nodes.get(name), self.catalog.leases.get(name)
        if member is not None and number is not None:
            self.endings[name] = Ending(member.incarnation, number, self.local_ms / 1000)

    def saw_start(self, name: str) -> None:
        self.endings.pop(name, None)

    def _has_ended(self, name: str) -> bool:
        told_s = self.told[name].at_ms / 1000 if name in self.told else -math.inf
        return has_ended(self.endings.get(name), name, self.catalog, told_s)

    # the lease, and what may be done under it

    def has_lease(self) -> bool:
        return may_own(self.local_ms, self.last_quorum_ms, self.catalog.settings.lease_ms)

    def may_own(self, partition: int, epoch: int) -> bool:
        if partition >= len(self.catalog.partitions):
            return False
        held = self.catalog.partitions[partition]
        return held.owner == self.name and held.epoch == epoch and self.has_lease()

    def step(self) -> None:
        member = self.catalog.nodes.get(self.name)
        self.joined = 0 if member is None else member.incarnation
        if self.joined != self.disk.incarnation:
            if self.is_due("join", 1000):
                self.propose(self._join_command())
            return
        if self.is_due("renew", RENEW_MS):
            self._renew()
        for partition, held in enumerate(self.catalog.partitions):
            if held.owner == self.name or self.name in held.standbys:
                self._attend(partition, held)
            else:
                self._clean(partition)
        if self.is_due("models", sim_models.LOOK_MS):
            sim_models.look(self)
        if self.world.tables.there:
            self.tables.step()
        if self.is_due("report", REPORT_MS):
            self.reported += 1
            number = self.boots * NUMBERS_A_PROCESS + self.reported
            told = Told(self.disk.incarnation, number, self._report(), self._verified(), self.tries_models)
            self.world.report(self, told)
        if self.world.raft.leader == self.name:
            self._lead()

    def _join_command(self) -> JoinNode:
        return JoinNode(
            revision=self.catalog.revision,
            name=self.name,
            raft_address=self.name,
            http_address=self.name,
            rack=self.rack,
            incarnation=self.disk.incarnation,
        )

    def propose(self, command: Command) -> None:
        if not problem(self.catalog, command):
            self.world.propose(self, command)

    def _renew(self) -> None:
        self.renewals += 1
        number = self.boots * NUMBERS_A_PROCESS + self.renewals
        self.pending[number] = self.local_ms
        if len(self.pending) > 20:
            del self.pending[min(self.pending)]
        self.propose(
            RenewLease(revision=self.catalog.revision, name=self.name, incarnation=self.disk.incarnation, number=number)
        )

    def _attend(self, partition: int, held: Assignment) -> None:
        replica = self.replicas.get(partition)
        if replica is None:
            self.unused_since.pop(partition, None)
            replica = self.replicas[partition] = Replica(self.world, self, partition)
        if self.world.kafka_cut(self):
            if not self.has_lease():
                replica.close()
            return
        if held.owner != self.name or not self.has_lease() or (self.tries_models and held.move is None):
            replica.close()
            if self.world.random.random() < self.folds:
                replica.fold(6)
        elif held.move is not None:
            self._release(replica, held)
        else:
            replica.released_revision = 0
            replica.own(held.epoch)
        self._keep(replica)

    def _release(self, replica: Replica, held: Assignment) -> None:
        """Finish the commit in flight, close, and hand over."""
        assert held.move is not None
        session = replica.session
        if session is not None and session.step == "commit" and session.epoch == held.epoch:
            replica.own(held.epoch)
            return
        replica.close()
        replica.released_revision = held.revision
        if self.is_due(f"complete {replica.partition}", 400):
            self.propose(
                CompleteMove(
                    revision=self.catalog.revision, partition=replica.partition, epoch=held.epoch, to=held.move.to
                )
            )

    def _keep(self, replica: Replica) -> None:
        now_ms = self.local_ms
        if now_ms >= replica.flush_at_ms:
            replica.flush_at_ms = now_ms + FLUSH_MS
            replica.flush()
        if now_ms >= replica.snapshot_at_ms:
            replica.snapshot_at_ms = now_ms + SNAPSHOT_MS * (0.5 + self.world.random.random())
            replica.snapshot()

    def _clean(self, partition: int) -> None:
        """Of what is no longer here: closed at once, and after a while off the disk."""
        self.replicas.pop(partition, None)
        since_ms = self.unused_since.setdefault(partition, self.local_ms)
        if self.local_ms - since_ms <= DROP_MS or self.disk.restores_from(partition) < 0:
            return
        start = self.world.logs[partition].start
        if may_forget(self.world.replicas_verified(self, partition), start, self.catalog.settings.snapshot_holders_min):
            self.disk.flushed.pop(partition, None)
            self.disk.snapshots.pop(partition, None)
            self.world.checks.deletion_is_safe(partition)

    # what the leader is told, and does

    def _report(self) -> dict[int, Progress]:
        found = {}
        for partition, replica in self.replicas.items():
            offset = replica.store.changelog_offset()
            behind = self.world.logs[partition].frames_after(offset)
            serving = replica.session is not None and replica.session.step in ("serve", "commit")
            found[partition] = Progress(
                offset if replica.pinned is None else replica.pinned,
                1_000_000 if offset < self.world.logs[partition].start else behind,
                0 if serving else int(self.local_ms - replica.at_end_ms),
                serving,
                replica.released_revision,
            )
        return found

    def _verified(self) -> dict[int, int]:
        return {partition: snapshot.offset for partition, snapshot in self.disk.snapshots.items()}

    def became_leader(self, since_ms: float) -> None:
        self.since_ms = since_ms
        self.told: dict[str, Told] = {}

    def hear(self, name: str, told: Told) -> None:
        member, before = self.catalog.nodes.get(name), self.told.get(name)
        if member is None or member.incarnation != told.incarnation:
            return
        if before is not None and before.incarnation == told.incarnation and before.number >= told.number:
            return
        self.heard[name] = self.local_ms
        self.told[name] = replace(told, at_ms=self.local_ms)

    def _reports(self) -> Reports:
        nodes = {
            name: NodeReport(
                int(self.heard[name]),
                told.incarnation,
                told.partitions,
                int(told.at_ms),
                told.tries_models,
                self._has_ended(name),
            )
            for name, told in self.told.items()
            if name in self.heard
        }
        for name, heard_ms in self.heard.items():
            if name not in nodes and name in self.catalog.nodes:
                incarnation = self.catalog.nodes[name].incarnation
                nodes[name] = NodeReport(int(heard_ms), incarnation, ended=self._has_ended(name))
        return Reports(int(self.since_ms) + 1, nodes)

    def _lead(self) -> None:
        if self.is_due("plan", PLAN_MS):
            reports = self._reports()
            sim_models.lead(self, reports)
            if self.world.tables.there:
                sim_tables.lead(self, reports)
            commands = plan(self.catalog, reports, int(self.local_ms), self.world.plan_settings)
            self.world.checks.plan_is_right(self.catalog, commands)
            for command in commands:
                self.world.propose(self, command)
        if self.has_lease() and self.is_due("cut", CUT_MS):
            self._cut()

    def _cut(self) -> None:
        near = {name: told for name, told in self.told.items() if self.local_ms - told.at_ms < 1200}
        near = {
            name: told
            for name, told in near.items()
            if name in self.catalog.nodes and self.catalog.nodes[name].incarnation == told.incarnation
        }
        for partition, held in enumerate(self.catalog.partitions):
            replicas = {held.owner, *held.standbys}
            heard = [(name, told) for name, told in near.items() if name in replicas]
            verified = {name: told.verified[partition] for name, told in heard if partition in told.verified}
            needed = [told.partitions[partition].offset for _, told in heard if partition in told.partitions]
            start = self.world.logs[partition].start
            before = cut_offset(
                verified, [offset for offset in needed if offset >= start], self.catalog.settings.snapshot_holders_min
            )
            if before > start:
                self.world.cut(self, partition, before)
