"""A whole cluster in one deterministic loop: time, network, Raft's log, Kafka, faults. One seed, one run."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sim_models
import sim_tables
from sim_broker import PartitionLog
from sim_checks import STALE_MS, Checks, InvariantBroken
from sim_node import SimNode, Told
from sim_session import Replica

from replication.commands import (
    Command,
    DrainNode,
    GrowPartitions,
    PutTenant,
    RenewLease,
    SetSettings,
    Settings,
    decode_command,
    encode_command,
)
from replication.ownership import PlanSettings

STEP_MS = 100
TRACE_EVENTS = 60
DUMP_ENTRIES = 15
"""A node that is further behind gets a dump."""
HEAL_STEPS_MAX = 400
DRIFT = 0.05
"""Clocks run within this part of real time; what the plan assumes."""


@dataclass(slots=True)
class Raft:
    """The agreed log, and who may add to it. A deposed leader can't: it has no majority."""

    log: list[Command] = field(default_factory=list)
    leader: str | None = None
    elect_at_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    steps: int
    heal_steps: int
    commits: int
    owner_changes: int
    restores: int
    faults: int
    flips: int


class World:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.now_ms = 0.0
        self.trace: deque[tuple[object, ...]] = deque(maxlen=TRACE_EVENTS)
        self.counts: dict[str, int] = {}
        self.numbers = itertools.count(1)
        self.messages: list[tuple[float, int, Callable[[], None]]] = []
        self.checks = Checks(self)
        self.tables = sim_tables.Tables(self)
        self.raft = Raft()
        self.faulty = True
        self.loss = self.random.choice((0.0, 0.02, 0.1))
        self.plan_settings = PlanSettings(
            clock_drift=DRIFT,
            margin_ms=100,
            leader_wait_ms=self.random.choice((200, 500)),
            standby_replace_ms=4000,
            caught_up_frames=5,
            caught_up_ms=1500,
            move_ms_max=4000,
        )
        count = self.random.choice((3, 3, 4, 5))
        racks = self.random.choice((1, 2, 3))
        self.settings = Settings(
            standby_count=self.random.choice((1, 1, 2)), moves_max=self.random.choice((1, 2)), lease_ms=1000
        )
        self.nodes = {
            name: SimNode(
                self, name, f"r{place % racks}", 1 + self.random.uniform(-DRIFT, DRIFT), self.random.uniform(-1e5, 1e5)
            )
            for place, name in enumerate("abcde"[:count])
        }
        self.fault_ms = dict.fromkeys(self.nodes, -1e9)
        self.loss_ms = -1e9
        self.group = dict.fromkeys(self.nodes, 0)
        self.running_in = [0, 0]
        """Side of the network -> nodes there that run in this step."""
        self.without_kafka: set[str] = set()
        self.logs = [PartitionLog() for _ in range(self.random.choice((2, 3, 4)))]
        for _ in self.logs:
            self.checks.add_partition()
        self.raft.log += [
            SetSettings(revision=0, settings=self.settings),
            GrowPartitions(revision=1, count=len(self.logs)),
            PutTenant(revision=2, name=sim_models.TENANT, settings=""),
        ]

    def note(self, *facts: object) -> None:
        self.trace.append((int(self.now_ms), *facts))
        self.counts[str(facts[0])] = self.counts.get(str(facts[0]), 0) + 1

    def next_number(self) -> int:
        return next(self.numbers)

    # messages

    def _send(self, deliver: Callable[[], None], delay_ms: float | None = None) -> None:
        if delay_ms is None:
            delay_ms = self.random.uniform(1, 90)
            if self.faulty and self.random.random() < 0.1:
                delay_ms += self.random.uniform(0, 2500)
        heapq.heappush(self.messages, (self.now_ms + delay_ms, self.next_number(), deliver))

    def _lost(self) -> bool:
        return self.faulty and self.random.random() < self.loss

    def _to_node(self, node: SimNode, boots: int, deliver: Callable[[], None]) -> None:
        """A process that is stopped finds its messages when it goes on; one that has died does not."""
        if not node.alive or node.boots != boots:
            return
        if node.running():
            deliver()
        else:
            self._send(lambda: self._to_node(node, boots, deliver), node.paused_until_ms - self.now_ms + 1)

    def call_broker(
        self, node: SimNode, operation: Callable[[Any], Any], answered: Callable[[Any, Any], None], session: Any
    ) -> None:
        boots = node.boots

        def at_broker() -> None:
            if self.kafka_cut(node):
                return
            answer = operation(session)
            if not self._lost():
                self._send(lambda: self._to_node(node, boots, lambda: answered(session, answer)))

        if not self._lost() and not self.kafka_cut(node):
            self._send(at_broker)

    def kafka_cut(self, node: SimNode) -> bool:
        return node.name in self.without_kafka

    def _leader(self, near: SimNode) -> SimNode | None:
        """The leader, if a message of `near` reaches it now."""
        name = self.raft.leader
        if name is None or not self.nodes[name].running() or self.group[name] != self.group[near.name]:
            return None
        return self.nodes[name]

    def propose(self, node: SimNode, command: Command) -> None:
        encoded = encode_command(command)
        copies = 2 if self.faulty and self.random.random() < 0.05 else 1

        def at_leader() -> None:
            if self._leader(node) is not None and self._majority(self.group[node.name]):
                self.raft.log.append(decode_command(encoded))
                if not isinstance(command, RenewLease):
                    self.note("agreed", len(self.raft.log), node.name, command)

        for _ in range(copies):
            if not self._lost():
                self._send(at_leader)

    def report(self, node: SimNode, told: Told) -> None:
        def at_leader() -> None:
            leader = self._leader(node)
            if leader is not None:
                leader.hear(node.name, told)

        if not self._lost():
            self._send(at_leader)

    def _tell_near(self, node: SimNode, tell: Callable[[SimNode], None]) -> None:
        """What the network lets others see of a process: those that it is cut off from don't, nor when that is over."""
        for other in self.nodes.values():
            if other is not node and self.group[other.name] == self.group[node.name]:
                self._send(lambda other=other, boots=other.boots: self._to_node(other, boots, lambda: tell(other)))

    def ask_snapshot(self, replica: Replica) -> None:
        node, boots = replica.node, replica.node.boots
        start = self.logs[replica.partition].start
        holders = [
            other.disk.snapshots[replica.partition]
            for other in self.nodes.values()
            if other.running()
            and self.group[other.name] == self.group[node.name]
            and replica.partition in other.disk.snapshots
            and other.disk.snapshots[replica.partition].offset >= start
        ]
        if holders:
            snapshot = self.random.choice(holders)
            replica.pinned = snapshot.offset
            self._send(
                lambda: self._to_node(node, boots, lambda: replica.restore(snapshot)), self.random.uniform(100, 700)
            )

    def ask_blob(self, node: SimNode, blob: str) -> None:
        disk = node.disk
        near = (
            other
            for other in self.nodes.values()
            if other.running() and self.group[other.name] == self.group[node.name]
        )
        if any(blob in other.disk.blobs for other in near) and not self._lost():
            self._send(lambda: disk.blobs.add(blob), self.random.uniform(50, 900))

    def replicas_verified(self, asker: SimNode, partition: int) -> dict[str, int]:
        """What those that have the partition, as the asker knows, answer it of their snapshots."""
        held = asker.catalog.partitions[partition]
        return {
            name: self.nodes[name].disk.snapshots[partition].offset
            for name in (held.owner, *held.standbys)
            if name in self.nodes
            and self.nodes[name].running()
            and self.group[name] == self.group[asker.name]
            and partition in self.nodes[name].disk.snapshots
        }

    def cut(self, node: SimNode, partition: int, before: int) -> None:
        def at_broker() -> None:
            if before > self.logs[partition].start:
                self.checks.cut_is_safe(partition, before)
                self.note("cut", partition, before, node.name)
                self.logs[partition].cut(before)

        if not self.kafka_cut(node) and not self._lost():
            self._send(at_broker, self.random.uniform(1, 90))

    # Raft

    def _majority(self, group: int) -> bool:
        return self.running_in[group] * 2 > len(self.nodes)

    def _elect(self) -> None:
        leader = self.raft.leader
        if leader is not None and self.nodes[leader].running() and self._majority(self.group[leader]):
            return
        if leader is not None:
            self.raft.leader = None
            self.raft.elect_at_ms = self.now_ms + self.random.uniform(200, 900)
            return
        able = [n for n in self.nodes.values() if n.running() and self._majority(self.group[n.name])]
        if able and self.now_ms >= self.raft.elect_at_ms:
            chosen = self.random.choice(able)
            self.raft.leader = chosen.name
            chosen.catch_up(len(self.raft.log))
            chosen.became_leader(chosen.local_ms)
            self.note("leader", chosen.name)

    def _replicate(self, node: SimNode) -> None:
        behind = len(self.raft.log) - node.applied
        leader = self._leader(node) if behind else None
        if leader is None or (self.faulty and self.random.random() < 0.15):
            return
        if behind > DUMP_ENTRIES and leader.applied > node.applied:
            node.install(leader)
        else:
            node.catch_up(behind if self.random.random() < 0.7 else self.random.randint(1, behind))

    # faults

    def _inject(self) -> None:
        choice = self.random.random()
        node = self.random.choice(list(self.nodes.values()))
        if choice < 0.012:
            self.crash(node)
        elif choice < 0.024 and node.running():
            node.paused_until_ms = self.now_ms + self.random.choice((300, 1500, 4000))
            self._fault("pause", node)
        elif choice < 0.030:
            self.group = {name: int(self.random.random() < 0.35) for name in self.nodes}
            self._fault("network", *self.nodes.values())
        elif choice < 0.050 and any(self.group.values()):
            self.group = dict.fromkeys(self.nodes, 0)
            self.note("network whole")
        elif choice < 0.056:
            self.without_kafka ^= {node.name}
            self._fault("kafka", node)
        elif choice < 0.070:
            self.without_kafka.clear()
        elif choice < 0.078 and self.raft.leader is not None:
            self.depose()
        elif choice < 0.090:
            node.folds = self.random.choice((0.05, 0.3, 1.0))
        elif choice < 0.100:
            self._drain(node)
        elif choice < 0.120 and node.running():
            sim_models.put(node)
        elif choice < 0.123 and node.disk.blobs:
            node.disk.blobs.discard(self.random.choice(sorted(node.disk.blobs)))
            self._fault("file lost", node)

    def is_well(self, node: SimNode) -> bool:
        """Whether a leader's view of it may be expected to be right: nothing has been wrong with it for a while."""
        return self.now_ms - self.fault_ms[node.name] >= STALE_MS

    def _fault(self, what: str, *nodes: SimNode) -> None:
        self.note("fault", what, *(node.name for node in nodes))
        for node in nodes:
            self.fault_ms[node.name] = self.now_ms

    def _drain(self, node: SimNode) -> None:
        """The operator's wish, by way of any node; most of the time that nodes are not drained."""
        wanted = self.random.random() < 0.4
        member = node.catalog.nodes.get(node.name)
        if node.running() and member is not None and member.draining != wanted:
            node.propose(DrainNode(revision=node.catalog.revision, name=node.name, draining=wanted))

    def depose(self) -> None:
        self.raft.leader = None
        self.note("leader deposed")

    def crash(self, node: SimNode) -> None:
        if not node.alive:
            return
        node.alive = False
        node.start_at_ms = self.now_ms + self.random.choice((100, 900, 3000, 7000))
        self._fault("crash", node)
        self._tell_near(node, lambda other: None if node.alive else other.saw_end(node.name))
        if self.random.random() < 0.3 and self._survives_without(node):
            node.wipe()
            self.loss_ms = self.now_ms
            self._fault("disk lost", node)
            self.checks.can_be_restored()

    def _survives_without(self, node: SimNode) -> bool:
        """The fault model: never the last disk that restores a partition.

        Nor a second one while cuts that were decided before the first loss may still be on their way: a
        changelog is cut behind `snapshot_holders_min` disks, two here, so that one may be lost.
        """
        if self.now_ms - self.loss_ms < STALE_MS:
            return False
        others = [other for other in self.nodes.values() if other is not node]
        return all(
            not log.start or any(self._goes_on_from(other, partition) >= log.start for other in others)
            for partition, log in enumerate(self.logs)
        )

    def _goes_on_from(self, node: SimNode, partition: int) -> int:
        """As `Disk.restores_from`; but of what it does not hold any more a node gives a snapshot only, no store."""
        held = self.checks.catalogs[-1].partitions[partition:]
        if held and node.name in (held[0].owner, *held[0].standbys):
            return node.disk.restores_from(partition)
        snapshot = node.disk.snapshots.get(partition)
        return -1 if snapshot is None else snapshot.offset

    def _heal(self) -> None:
        self.faulty = False
        self.group = dict.fromkeys(self.nodes, 0)
        self.without_kafka.clear()
        for node in self.nodes.values():
            node.folds = 1.0
            node.paused_until_ms = min(node.paused_until_ms, self.now_ms)
            node.start_at_ms = min(node.start_at_ms, self.now_ms)
        self.note("healed")

    def _look_around(self) -> None:
        """Who runs, and who is not well in this step."""
        apart = any(self.group.values())
        self.running_in = [0, 0]
        for name, node in self.nodes.items():
            if node.running():
                self.running_in[self.group[name]] += 1
                if not apart and node.joined == node.disk.incarnation:
                    continue
            self.fault_ms[name] = self.now_ms

    # the loop

    def step(self) -> None:
        self.now_ms += STEP_MS
        for node in self.nodes.values():
            node.tick()
        if self.faulty:
            self._inject()
            for log in self.logs:
                if self.random.random() < 0.4:
                    log.source_end += self.random.randrange(4)
        self.tables.step()
        for node in self.nodes.values():
            if not node.alive and self.now_ms >= node.start_at_ms:
                node.boot()
                self.note("start", node.name)
                self._tell_near(node, lambda other, name=node.name: other.saw_start(name))
        self._look_around()
        self._elect()
        while self.messages and self.messages[0][0] <= self.now_ms:
            heapq.heappop(self.messages)[2]()
        for node in self.nodes.values():
            if node.running():
                self._replicate(node)
                node.step()
        self.checks.at_most_one_owner()

    def run(self, steps: int) -> Outcome:
        """Raises InvariantBroken."""
        for _ in range(steps):
            self.step()
        self._heal()
        for log in self.logs:
            log.source_end += 3
        self.tables.grow()
        heal_steps = 0
        while why := self._unfinished():
            if heal_steps == HEAL_STEPS_MAX:
                self.checks.fail(f"(h) not whole {HEAL_STEPS_MAX} steps after the last fault", why)
            self.step()
            heal_steps += 1
        self.checks.at_the_end()
        self.checks.can_be_restored()
        commits = sum(len(log.commits) for log in self.logs)
        owner_changes = sum(held.epoch for held in self.checks.catalogs[-1].partitions)
        told = (self.counts.get(what, 0) for what in ("restore", "fault", "flip"))
        return Outcome(steps, heal_steps, commits, owner_changes, *told)

    def _unfinished(self) -> str:
        return self.checks.unfinished() if len(self.checks.catalogs) > 2 else "nothing is agreed"


def simulate(seed: int, steps: int) -> Outcome:
    """One run. Raises InvariantBroken with the seed and the last events; any other exception gets them as a note."""
    world = World(seed)
    try:
        return world.run(steps)
    except Exception as failure:
        last = "\n".join("  ".join(str(fact) for fact in facts) for facts in world.trace)
        text = f"seed {seed}, {steps} steps, at {world.now_ms:.0f} ms; the last events:\n{last}\nseed {seed}"
        if isinstance(failure, InvariantBroken):
            raise InvariantBroken(f"{failure}\n{text}\n{failure}") from failure
        failure.add_note(text)
        raise
