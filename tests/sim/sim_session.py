"""One node's replica of one partition: a standby that folds, or an owner's session that fences, folds and commits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import sim_tables
from sim_broker import PartitionLog, Row, Transaction, customer_of, row_after
from sim_disk import Snapshot, clone

from node.kernel.types import Frame
from node.state.memory import MemoryStore
from replication.frame import FrameAssembler, encode_frame

if TYPE_CHECKING:
    from sim_node import SimNode
    from sim_world import World

Step = Literal["start", "fold", "serve", "commit"]
ANSWER_MS_MAX = 1500
"""A session that waits longer for the broker takes the outcome as unknown and opens again."""
FRAMES_PER_STEP = 12


@dataclass(slots=True)
class Session:
    """An owner's open partition; one dies and another is made after every failure, nothing is carried over."""

    number: int
    epoch: int
    step: Step = "start"
    asked_ms: float | None = None
    producer_epoch: int = 0
    pending: Frame | None = None


class Replica:
    def __init__(self, world: World, node: SimNode, partition: int) -> None:
        self.world = world
        self.node = node
        self.partition = partition
        flushed = node.disk.flushed.get(partition)
        self.store = MemoryStore() if flushed is None else clone(flushed)
        self.session: Session | None = None
        self.released_revision = 0
        self.pinned: int | None = None
        self.at_end_ms = -1e9
        self.fetch_ms = -1e9
        self.flush_at_ms = self.snapshot_at_ms = node.local_ms

    @property
    def log(self) -> PartitionLog:
        return self.world.logs[self.partition]

    # folding, alike for standby and owner

    def fold(self, frames_max: int) -> bool:
        """Fold what is committed; True once at the end. Restores a snapshot where the changelog is cut."""
        if self.store.changelog_offset() < self.log.start:
            self._ask_snapshot()
            return False
        assembler = FrameAssembler()
        for offset, record in self.log.read(self.store.changelog_offset(), frames_max):
            frame = assembler.add(record)
            if frame is not None:
                self.store.apply(frame, offset + 1)
                self.world.checks.store_is_right(self.node.name, self.partition, self.store)
        at_end = self.log.frames_after(self.store.changelog_offset()) == 0
        if at_end:
            self.at_end_ms = self.node.local_ms
        return at_end

    def _ask_snapshot(self) -> None:
        own = self.node.disk.snapshots.get(self.partition)
        if own is not None and own.offset >= self.log.start:
            self.restore(own)
        elif self.node.local_ms - self.fetch_ms > 1000:
            self.fetch_ms = self.node.local_ms
            self.world.ask_snapshot(self)

    def restore(self, snapshot: Snapshot) -> None:
        if snapshot.offset > self.store.changelog_offset():
            self.store = clone(snapshot.store)
            self.flush()
            self.world.note("restore", self.node.name, self.partition, snapshot.offset)
        self.pinned = None

    def flush(self) -> None:
        self.node.disk.flushed[self.partition] = clone(self.store)

    def snapshot(self) -> None:
        self.node.disk.keep(self.partition, Snapshot(self.store.changelog_offset(), clone(self.store)))

    # the owner

    def close(self) -> None:
        self.session = None

    def own(self, epoch: int) -> None:
        """One step of an owner that may own, as the node has just asked."""
        if self.session is None or self.session.epoch != epoch:
            self.session = Session(self.world.next_number(), epoch)
        session = self.session
        if session.step == "start":
            self._start(session)
        elif session.step == "fold":
            if self.fold(FRAMES_PER_STEP):
                session.step = "serve"
        elif session.step == "commit":
            if self._waited(session):
                self.close()
        else:
            self._cycle(session)

    def _waited(self, session: Session) -> bool:
        return session.asked_ms is not None and self.node.local_ms - session.asked_ms > ANSWER_MS_MAX

    def _start(self, session: Session) -> None:
        if session.asked_ms is None:
            session.asked_ms = self.node.local_ms
            self.world.call_broker(self.node, self._init, self._inited, session)
        elif self._waited(session):
            self.close()

    def _init(self, session: Session) -> int:
        self.world.note("producer", self.node.name, self.partition, session.epoch, session.number)
        return self.log.init_producer(session.number)

    def _inited(self, session: Session, producer_epoch: int) -> None:
        if session is self.session:
            session.producer_epoch = producer_epoch
            session.step = "fold"

    def _cycle(self, session: Session) -> None:
        position = self.store.progress().get("events", 0)
        count = min(self.log.source_end - position, 1 + self.world.random.randrange(6 if self.world.faulty else 30))
        read = sim_tables.pinned(self.node)
        if count <= 0 or read is None:
            return
        frame = self._computed(position, count)
        record_bytes_max = 90 if self.world.random.random() < 0.2 else 10_000
        records = tuple(encode_frame(frame, record_bytes_max))
        events = tuple(range(position, position + count))
        transaction = Transaction(
            records, events, position, position + count, session.number, session.epoch, (read.version, read.revision)
        )
        session.step, session.asked_ms, session.pending = "commit", self.node.local_ms, frame
        self.world.call_broker(self.node, lambda asked: self._send(asked, transaction), self._sent, session)

    def _computed(self, position: int, count: int) -> Frame:
        rows: dict[bytes, Row] = {}
        for event in range(position, position + count):
            customer = customer_of(event)
            if customer not in rows:
                stored = self.store.load([customer])[0]
                before = (0.0, 0.0, 0.0) if stored is None else tuple(np.frombuffer(stored, "<f8").tolist())
                rows[customer] = before  # type: ignore[assignment]
            rows[customer] = row_after(rows[customer], event)
        return Frame({"events": position + count}, 0, list(rows), np.array(list(rows.values())))

    def _send(self, session: Session, transaction: Transaction) -> bool:
        return self.log.send(session.producer_epoch, transaction)

    def _sent(self, session: Session, taken: bool) -> None:
        if session is not self.session:
            return
        if taken and self.node.may_own(self.partition, session.epoch):
            self.world.call_broker(self.node, self._commit, self._committed, session)
        else:
            self.close()

    def _commit(self, session: Session) -> int | None:
        after = self.log.commit(session.producer_epoch)
        if after is not None:
            self.world.checks.committed(self.partition)
        return after

    def _committed(self, session: Session, after: int | None) -> None:
        if session is not self.session:
            return
        if after is None or session.pending is None:
            self.close()
            return
        self.store.apply(session.pending, after)
        self.world.checks.store_is_right(self.node.name, self.partition, self.store)
        session.step, session.pending = "serve", None
