"""Cutting changelogs: the leader deletes the records behind snapshots that enough nodes have, and never more.

`replication.retention` says how far. What could be cut is cut CUT_DELAY_MS later, and then only as far as it still
could be: whoever began to restore a snapshot in between finds the frames after it.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.clock import Clock
from node.kernel.errors import BrokerUnavailable, ProgressLost, StoreUnavailable, TopicMissing
from node.kernel.limits import BROKER_CALL_MS_MAX, CUT_CANDIDATES_MAX, CUT_DELAY_MS, CUT_INTERVAL_MS, CUT_STORE_MS_MIN
from replication.catalog import Assignment, Catalog
from replication.ownership import Reports
from replication.retention import cut_offset
from replication.snapshots import STORE_HOLDER

log = structlog.get_logger(__name__)


class Leading(Protocol):
    """What is needed of `replication.cluster.Cluster`."""

    @property
    def leads(self) -> bool: ...

    @property
    def catalog(self) -> Catalog: ...

    def reports(self) -> Reports: ...

    def verified(self) -> Mapping[str, Mapping[int, int]]:
        """Node -> partition -> offset of its newest verified snapshot, of all nodes that are there."""
        ...


@dataclass(frozen=True, slots=True)
class Cut:
    """What a partition's changelog was cut before, and why that was safe."""

    before: int
    at_ms: int
    holders: Mapping[str, int]
    """Who has a verified snapshot at which offset; `store` is the store by URL."""
    needed: Mapping[str, int]
    """Where each replica that is there goes on."""


@dataclass(frozen=True, slots=True)
class CutterStatistics:
    cuts: Mapping[int, Cut]
    """The last of each partition."""
    reason: str
    """Why the last round failed; '' if it did not."""


class Changelogs:
    """A changelog topic as one who does not read it: where its partitions begin and end, and cutting them."""

    def __init__(self, options: ClientOptions, topic: str) -> None:
        self._options = options
        self._topic = topic
        self._admin: AIOKafkaAdminClient | None = None

    async def bounds(self, partition: int) -> tuple[int, int]:
        """The first offset and the next one to be written. Raises BrokerUnavailable, TopicMissing."""
        place, what = TopicPartition(self._topic, partition), f"bounds of changelog {self._topic}[{partition}]"
        consumer = AIOKafkaConsumer(**self._options, enable_auto_commit=False)
        try:
            await broker_call(what, consumer.start())
            # The client asks for a topic that is gone thousands of times a second, so it must not.
            if self._topic not in await broker_call(what, consumer.topics()):
                raise TopicMissing(f"changelog topic {self._topic} does not exist: create it, partitions go on")
            start = (await broker_call(what, consumer.beginning_offsets([place])))[place]
            end = (await broker_call(what, consumer.end_offsets([place])))[place]
        finally:
            await close_quietly(what, consumer.stop())
        return start, end

    async def cut(self, partition: int, before: int) -> int:
        """Delete the records before an offset; the first offset after that. Raises BrokerUnavailable, TopicMissing,
        and ProgressLost when the changelog ends before it."""
        place = TopicPartition(self._topic, partition)
        what = f"cut changelog {self._topic}[{partition}] before {before}"
        if self._admin is None:
            self._admin = AIOKafkaAdminClient(**self._options, request_timeout_ms=BROKER_CALL_MS_MAX)
            await broker_call(what, self._admin.start())
        told = await broker_call(what, self._admin.delete_records({place: RecordsToDelete(before_offset=before)}))
        return int(told[place])

    async def close(self) -> None:
        """It may be used again."""
        if self._admin is not None:
            admin, self._admin = self._admin, None
            await close_quietly("administration of changelogs", admin.close())


class Cutter:
    """`stored` gives the offset of a partition's newest snapshot in the store by URL, 0 for none."""

    def __init__(
        self,
        changelogs: Changelogs,
        cluster: Leading,
        stored: Callable[[int], Awaitable[int]],
        clock: Clock,
        delay_ms: int = CUT_DELAY_MS,
    ) -> None:
        self._changelogs = changelogs
        self._cluster = cluster
        self._stored = stored
        self._clock = clock
        self._delay = delay_ms / 1000
        self._candidates: dict[int, deque[tuple[float, int]]] = {}
        self._starts: dict[int, int] = {}
        self._kept: dict[int, tuple[int, float]] = {}
        """The offset of the newest snapshot in the store by URL, and when it was asked for."""
        self._cuts: dict[int, Cut] = {}
        self._reason = ""

    async def run(self) -> None:
        """Cut while this node leads, until cancelled."""
        try:
            while True:
                if self._cluster.leads:
                    await self.round()
                else:
                    self._candidates.clear()
                    self._starts.clear()
                    self._kept.clear()
                    await self._changelogs.close()
                await asyncio.sleep(min(self._delay, CUT_INTERVAL_MS / 1000) or CUT_INTERVAL_MS / 1000)
        finally:
            await self._changelogs.close()

    async def round(self) -> None:
        """Look at each partition once, and cut what may be. Without a broker the next round goes on."""
        reason = ""
        for partition in range(len(self._cluster.catalog.partitions)):
            await asyncio.sleep(0)  # all of many partitions would hold the leader's loop for longer than its lease
            try:
                await self._attend(partition)
            except (TopicMissing, ProgressLost, StoreUnavailable) as failure:
                reason = str(failure)
            except BrokerUnavailable as failure:
                reason = str(failure)
                await self._changelogs.close()
                break
        if reason and reason != self._reason:
            log.warning("changelog not cut", reason=reason)
        self._reason = reason

    async def _attend(self, partition: int) -> None:
        start = await self._start(partition)
        await self._ask_store(partition)
        cut = self._safe(partition, start)
        if cut is not None and len(cut.holders.keys() - {STORE_HOLDER}) < self._holders_min:
            self._kept[partition] = (await self._stored(partition), self._clock.monotonic())
            cut = self._safe(partition, start)
        if cut is None or not self._cluster.leads:
            return
        self._starts[partition] = await self._changelogs.cut(partition, cut.before)
        self._cuts[partition] = cut
        log.info("changelog cut", partition=partition, before=cut.before, holders=dict(cut.holders))

    @property
    def _holders_min(self) -> int:
        return self._cluster.catalog.settings.snapshot_holders_min

    async def _ask_store(self, partition: int) -> None:
        """Only if nodes alone are too few, and have something newer than what is known to be there."""
        stored, asked = self._kept.get(partition, (0, -math.inf))
        holders, _ = self._told(partition, self._cluster.catalog.partitions[partition], 0)
        newer = any(offset > stored for offset in holders.values())
        few = len(holders) < self._holders_min
        now = self._clock.monotonic()
        if few and newer and now - asked >= CUT_STORE_MS_MIN / 1000:
            self._kept[partition] = (stored, now)
            self._kept[partition] = (await self._stored(partition), now)

    async def _start(self, partition: int) -> int:
        if partition not in self._starts:
            self._starts[partition] = (await self._changelogs.bounds(partition))[0]
        return self._starts[partition]

    def _safe(self, partition: int, start: int) -> Cut | None:
        """What to cut now: what could have been cut a delay ago and still can be."""
        held = self._cluster.catalog.partitions[partition]
        holders, needed = self._told(partition, held, self._kept.get(partition, (0, 0.0))[0])
        if held.owner not in needed:
            return None
        # What is further than the owner is of an earlier changelog, whose topic was made again, or its report is late.
        holders = {name: offset for name, offset in holders.items() if offset <= needed[held.owner]}
        before = cut_offset(holders, [offset for offset in needed.values() if offset >= start], self._holders_min)
        before = min(before, self._ripe(partition, before))
        return Cut(before, self._clock.now_ms(), holders, needed) if before > start else None

    def _told(self, partition: int, held: Assignment, stored: int) -> tuple[dict[str, int], dict[str, int]]:
        """Snapshots and offsets of the partition's replicas that are there; others may delete theirs any time."""
        verified, reports = self._cluster.verified(), self._cluster.reports().nodes
        replicas = [name for name in (held.owner, *held.standbys) if name in verified]
        holders = {name: verified[name][partition] for name in replicas if partition in verified[name]}
        if stored:
            holders[STORE_HOLDER] = max(stored, holders.get(STORE_HOLDER, 0))
        told = {name: reports[name].partitions.get(partition) for name in replicas if name in reports}
        return holders, {name: progress.offset for name, progress in told.items() if progress is not None}

    def _ripe(self, partition: int, before: int) -> int:
        """The highest offset that could have been cut a delay ago; remembers this one for later."""
        now = self._clock.monotonic()
        waiting = self._candidates.setdefault(partition, deque())
        if not waiting or (before > waiting[-1][1] and len(waiting) < CUT_CANDIDATES_MAX):
            waiting.append((now, before))
        ripe = 0
        while waiting and now - waiting[0][0] >= self._delay:
            ripe = waiting.popleft()[1]
        if ripe:
            waiting.appendleft((now - self._delay, ripe))
        return ripe

    def statistics(self) -> CutterStatistics:
        return CutterStatistics(dict(self._cuts), self._reason)
