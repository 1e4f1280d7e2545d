"""The standbys of one node: one reader of the changelog folds the committed frames of all their partitions."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import OffsetOutOfRangeError

from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.clock import Clock
from node.kernel.errors import BrokerUnavailable, HeadraceError, ProgressLost, TopicMissing
from node.kernel.limits import (
    BROKER_CALL_MS_MAX,
    BROKER_RETRY_MS_MAX,
    BROKER_RETRY_MS_MIN,
    MIB,
    STANDBY_POLL_MS,
    STANDBY_PROOF_MS_MAX,
    STANDBY_SILENT_MS_MAX,
    STANDBY_UNKNOWN_FRAMES,
)
from node.kernel.ports import StateStore
from node.kernel.types import ReplicaProgress
from replication.changelog import FoldReport, progress_lost
from replication.frame import FrameAssembler

log = structlog.get_logger(__name__)

_RECORDS_PER_POLL = 64
_RETRY_MS = 20
_FINISH_POLL_MS = 5
"""While an end is waited for: a poll does not return for the markers of transactions, and every end is behind some."""
_OFFSETS_PER_FRAME = 2
"""A record at least and the marker of its transaction."""
Failed = Callable[[HeadraceError], None]


@dataclass(slots=True, eq=False)
class _Fold:
    """One partition being folded; never used again once it was removed."""

    store: StateStore
    failed: Failed
    flushed: float
    ended: float
    """When its end was last seen to be reached; at first, when it was added."""
    flushed_offset: int
    assembler: FrameAssembler = field(default_factory=FrameAssembler)
    assigned: bool = False
    whole: bool = False
    """The end has been reached once."""
    gap: int | None = None
    """Offsets between the reader and the last stable one, as of the last poll."""
    stamp: int | None = None
    heard: float = 0.0
    reached: int = 0
    """Everything committed before this offset is folded."""
    wanted: tuple[int, asyncio.Future[None]] | None = None
    """What `finish` waits for."""
    hold: int | None = None
    """Frames that end behind this offset have to wait."""
    frames: int = 0
    rows: int = 0
    bytes: int = 0
    flushing: asyncio.Future[None] | None = None

    @property
    def held(self) -> bool:
        return self.hold is not None and self.store.changelog_offset() >= self.hold


class StandbyFolder:
    """Keeps the stores of a node's standbys up to date. A partition that can't go on is dropped and reported; it never
    stops the others. A broker that is gone is waited for, and the lag in time grows meanwhile."""

    def __init__(
        self,
        options: ClientOptions,
        topic: str,
        clock: Clock,
        flush_interval_seconds: float = 30.0,
        near: Callable[[], None] = lambda: None,
    ) -> None:
        """`near` is called when it is known for the first time how far a partition that was added is behind, and when
        it has been folded to its end for the first time."""
        self._options = options
        self._topic = topic
        self._clock = clock
        self._flush_interval = flush_interval_seconds
        self._near = near
        self._folds: dict[int, _Fold] = {}
        self._expected: set[int] = set()
        self._added = asyncio.Event()
        self._stale = False
        """The consumer's assignment is not what it should be."""
        self._polling: asyncio.Future[Any] | None = None
        self._reader: AIOKafkaConsumer | None = None
        self._asker: AIOKafkaConsumer | None = None
        """Asks for offsets: a fetch that waits at the broker holds up what is asked on the same connection."""
        self.frames = 0
        self.reason = ""
        """Why nothing can be read at present; '' while the broker is there."""

    # what is folded

    def expect(self, partition: int) -> None:
        """It will be added once its state has been fetched: the reader connects meanwhile. Until `add` or `remove`."""
        self._expected.add(partition)
        self._added.set()

    def add(self, partition: int, store: StateStore, failed: Failed) -> None:
        """Fold into `store` from its changelog offset on; nobody else may write to it until `remove` has returned.

        `failed` is called, once and on the loop, when the partition can't go on and was dropped: with ChangelogCut,
        ProgressLost, FrameCorrupt, TopicMissing, or what the store raised.
        """
        now = self._clock.monotonic()
        self._folds[partition] = _Fold(store, failed, now, now, store.changelog_offset())
        self._expected.discard(partition)
        self._added.set()
        self._reassign()

    async def remove(self, partition: int) -> None:
        """Stop to fold; the store stays open and is as of the end of a frame. A partition not folded is no mistake."""
        if partition in self._expected:
            self._expected.discard(partition)
            self._added.set()  # the reader may have waited for this one only
        fold = self._folds.pop(partition, None)
        if fold is None:
            return
        if self._reader is not None and fold.assigned:
            # Another assignment would make the others wait for the fetch that is under way at the broker.
            self._reader.pause(TopicPartition(self._topic, partition))
        if fold.wanted is not None:
            fold.wanted[1].cancel()
        if fold.flushing is not None:
            await asyncio.wait({fold.flushing})

    async def finish(self, partition: int) -> FoldReport:
        """Fold all that is committed by now, and no more: `remove` is implied. So an owner goes on from a standby.

        To be called after the partition's producer has started, which makes the end final; no connection has to be
        made for it. Raises BrokerUnavailable when the partition is not folded or nothing can be read at present, and
        what `add` tells of.
        """
        fold, asker, started = self._folds.get(partition), self._asker, self._clock.monotonic()
        if fold is None or asker is None:
            raise BrokerUnavailable(f"{self._topic}[{partition}] is not being read here; it is opened again")
        before = (fold.frames, fold.rows, fold.bytes)
        try:
            self.resume(partition)
            at = TopicPartition(self._topic, partition)
            end = (await broker_call(f"end of changelog {self._topic}", asker.end_offsets([at])))[at]
            await self._reach(partition, fold, end)
        finally:
            await self.remove(partition)
        frames, rows, size = fold.frames - before[0], fold.rows - before[1], fold.bytes - before[2]
        return FoldReport(frames, rows, size, self._clock.monotonic() - started)

    async def _reach(self, partition: int, fold: _Fold, end: int) -> None:
        if self._folds.get(partition) is not fold:
            raise BrokerUnavailable(f"{self._topic}[{partition}] is not being read any more; it is opened again")
        while fold.reached < end:
            reached, future = fold.reached, asyncio.get_running_loop().create_future()
            fold.wanted = (end, future)
            self._poll_anew()
            await asyncio.wait({future}, timeout=BROKER_CALL_MS_MAX / 1000)
            if future.cancelled():
                raise BrokerUnavailable(f"{self._topic}[{partition}] is not being read any more; it is opened again")
            if future.done():
                future.result()
            elif fold.reached == reached:
                raise BrokerUnavailable(f"{self._topic}[{partition}]: nothing came, {end - reached} to go")

    def hold(self, partition: int, offset: int) -> int:
        """Fold no frame that ends behind `offset` until `resume`, so that the store can be compared as of then; gives
        the store's offset, which is higher if the frames are folded already. Raises KeyError if it is not folded."""
        fold = self._folds[partition]
        fold.hold = offset
        self._reassign()
        return fold.store.changelog_offset()

    def resume(self, partition: int) -> None:
        fold = self._folds.get(partition)
        if fold is not None and fold.hold is not None:
            fold.hold = None
            self._reassign()

    def progress(self, partition: int) -> ReplicaProgress | None:
        """How far the store is, and how far behind; None if the partition is not folded."""
        fold = self._folds.get(partition)
        if fold is None:
            return None
        silent_ms = math.ceil((self._clock.monotonic() - fold.ended) * 1000)
        if fold.gap is None:
            return ReplicaProgress(fold.store.changelog_offset(), STANDBY_UNKNOWN_FRAMES, silent_ms)
        frames = -(-fold.gap // _OFFSETS_PER_FRAME)
        near = fold.gap == 0 and silent_ms <= STANDBY_PROOF_MS_MAX
        return ReplicaProgress(fold.store.changelog_offset(), frames, 0 if near else silent_ms)

    def _reassign(self) -> None:
        self._stale = True
        self._poll_anew()

    def _poll_anew(self) -> None:
        if self._polling is not None:
            self._polling.cancel()

    def _drop(self, partition: int, fold: _Fold, failure: HeadraceError) -> None:
        if self._folds.get(partition) is fold:
            del self._folds[partition]
            self._reassign()
            if fold.wanted is not None and not fold.wanted[1].done():
                fold.wanted[1].set_exception(failure)
            fold.failed(failure)

    # the reader

    async def run(self) -> None:
        """Fold until cancelled."""
        wait_ms = BROKER_RETRY_MS_MIN
        while True:
            await self._added.wait()
            try:
                await self._read()
                wait_ms = BROKER_RETRY_MS_MIN
            except (BrokerUnavailable, TopicMissing, ProgressLost) as failure:
                wait_ms = BROKER_RETRY_MS_MIN if not self.reason else min(wait_ms * 2, BROKER_RETRY_MS_MAX)
                reason = f"{type(failure).__name__}: {failure}"
                if reason != self.reason:
                    log.warning("standbys wait", reason=reason)
                self.reason = reason
                await asyncio.sleep(wait_ms / 1000)

    async def _read(self) -> None:
        """Fold with one consumer until it fails or nothing is left to fold."""
        reader, asker = self._consumer(), self._consumer()
        try:
            await broker_call("open changelogs", reader.start())
            await broker_call("open changelogs", asker.start())
            # The client asks for a topic that is gone thousands of times a second, so it must not.
            if self._topic not in await broker_call("look up changelogs", reader.topics()):
                raise TopicMissing(f"changelog topic {self._topic} does not exist: create it, standbys go on")
            await broker_call("look up changelogs", asker.end_offsets([TopicPartition(self._topic, 0)]))
            self._reader, self._asker, self._stale = reader, asker, True
            while self._folds or self._expected:
                if not self._folds:
                    self._added.clear()
                    await self._added.wait()
                    continue
                if self._stale:
                    self._assign(reader)
                    await self._ask_ends(reader, asker)
                await self._fold(await self._poll(reader), reader)
                await self._flush()
            self._added.clear()
        finally:
            self._reader = self._asker = None
            for fold in self._folds.values():
                fold.assigned = False
            await close_quietly("changelogs", reader.stop())
            await close_quietly("changelogs", asker.stop())

    def _consumer(self) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(
            **self._options,
            enable_auto_commit=False,
            isolation_level="read_committed",
            auto_offset_reset="none",
            retry_backoff_ms=_RETRY_MS,
            fetch_max_wait_ms=STANDBY_POLL_MS,
            fetch_max_bytes=32 * MIB,
            max_partition_fetch_bytes=4 * MIB,
        )

    def _assign(self, consumer: AIOKafkaConsumer) -> None:
        """Every partition starts again behind the last frame that its store has, so half a frame is no loss."""
        self._stale = False
        wanted = {TopicPartition(self._topic, number): fold for number, fold in self._folds.items() if not fold.held}
        consumer.assign(list(wanted))
        now = self._clock.monotonic()
        for fold in self._folds.values():
            fold.assigned = False
        for place, fold in wanted.items():
            consumer.seek(place, fold.store.changelog_offset())
            fold.assembler, fold.assigned, fold.stamp, fold.heard = FrameAssembler(), True, None, now

    async def _ask_ends(self, reader: AIOKafkaConsumer, asker: AIOKafkaConsumer) -> None:
        """How far new partitions are behind: most have next to nothing to fold, and the answer to the first fetch of
        nothing comes only after STANDBY_POLL_MS, for which whoever waits for a move would wait."""
        known = asker.partitions_for_topic(self._topic) or ()
        new = [(at, fold) for at, fold in self._assigned(reader) if fold.gap is None and at.partition in known]
        if not new:
            return
        ends = await broker_call(f"ends of changelog {self._topic}", asker.end_offsets([at for at, _ in new]))
        for at, fold in new:
            gap = ends[at] - fold.store.changelog_offset()
            fold.gap, fold.whole = gap if gap >= 0 else None, gap == 0  # below 0, the fetch says what is wrong
        self._near()

    async def _poll(self, consumer: AIOKafkaConsumer) -> Mapping[TopicPartition, Sequence[Any]]:
        """What has come. Nothing when the assignment is to be changed."""
        waited_for = any(fold.wanted is not None for fold in self._folds.values())
        wait_ms = _FINISH_POLL_MS if waited_for else STANDBY_POLL_MS
        self._polling = asyncio.ensure_future(_next_records(consumer, wait_ms))
        try:
            await asyncio.wait({self._polling})
            return {} if self._polling.cancelled() else self._polling.result()
        except ProgressLost as lost:
            places = lost.__cause__.args[0] if isinstance(lost.__cause__, OffsetOutOfRangeError) else {}
            if not places:
                raise
            await self._tell_lost(consumer, list(places))
            return {}
        finally:
            self._polling.cancel()
            self._polling = None

    async def _tell_lost(self, consumer: AIOKafkaConsumer, places: Sequence[TopicPartition]) -> None:
        starts = await broker_call("start offsets of changelogs", consumer.beginning_offsets(places))
        ends = await broker_call("end offsets of changelogs", consumer.end_offsets(places))
        for place in places:
            fold = self._folds.get(place.partition)
            if fold is not None and fold.assigned:
                lost = progress_lost(place, fold.store.changelog_offset(), starts[place], ends[place])
                self._drop(place.partition, fold, lost or ProgressLost(f"{place.topic}[{place.partition}] was cut"))

    async def _fold(self, polled: Mapping[TopicPartition, Sequence[Any]], consumer: AIOKafkaConsumer) -> None:
        gaps, now = await self._gaps(consumer), self._clock.monotonic()
        positions = {fold: await consumer.position(place) for place, fold in self._assigned(consumer)}
        for place, records in polled.items():
            fold = self._folds.get(place.partition)
            if fold is None or not fold.assigned:
                continue
            try:
                await self._apply(place.partition, fold, records)
            except HeadraceError as failure:
                self._drop(place.partition, fold, failure)
        caught_up = False
        for fold, gap in gaps.items():
            fold.gap = gap
            if gap == 0:
                fold.ended = now
                caught_up, fold.whole = caught_up or not fold.whole, True
        for fold, position in positions.items():
            if fold.assigned and not fold.held:
                fold.reached = position
                if fold.wanted is not None and position >= fold.wanted[0] and not fold.wanted[1].done():
                    fold.wanted[1].set_result(None)
        if caught_up:
            self._near()

    def _assigned(self, consumer: AIOKafkaConsumer) -> list[tuple[TopicPartition, _Fold]]:
        found = ((place, self._folds.get(place.partition)) for place in consumer.assignment())
        return [(place, fold) for place, fold in found if fold is not None and fold.assigned]

    async def _apply(self, partition: int, fold: _Fold, records: Sequence[Any]) -> None:
        for record in records:
            fold.bytes += len(record.value or b"")
            frame = fold.assembler.add(record.value)
            if frame is None:
                continue
            if fold.hold is not None and record.offset + 1 > fold.hold:
                fold.hold = fold.store.changelog_offset()
                # The reader is past frames that were not folded, and so must not be taken for how far they are, even
                # if the hold ends at once: `finish` would promote without them.
                fold.assigned = False
                self._reassign()
                return
            fold.store.apply(frame, record.offset + 1)
            fold.frames, fold.rows = fold.frames + 1, fold.rows + len(frame.customers)
            self.frames += 1
            await asyncio.sleep(0)
            if self._folds.get(partition) is not fold:
                return

    async def _gaps(self, consumer: AIOKafkaConsumer) -> dict[_Fold, int]:
        """Offsets to go for each partition that the broker has answered for since the last look. Raises TopicMissing,
        and BrokerUnavailable when it has been silent for too long: the client's polls say nothing of that."""
        now, gaps = self._clock.monotonic(), {}
        known = consumer.partitions_for_topic(self._topic)
        for place, fold in self._assigned(consumer):
            if known is not None and place.partition not in known:
                missing = f"changelog {self._topic} has no partition {place.partition}: add partitions, it goes on"
                self._drop(place.partition, fold, TopicMissing(missing))
                continue
            stamp = consumer.last_poll_timestamp(place)
            if stamp is None or stamp == fold.stamp:
                if now - fold.heard > STANDBY_SILENT_MS_MAX / 1000:
                    raise BrokerUnavailable(f"the broker has not answered for changelog {self._topic}: reconnecting")
                continue
            fold.stamp, fold.heard, self.reason = stamp, now, ""
            stable = consumer.last_stable_offset(place)
            end = stable if stable is not None and stable >= 0 else consumer.highwater(place)
            gaps[fold] = max(0, end - await consumer.position(place))
        return gaps

    async def _flush(self) -> None:
        """One store that is due, in a thread; the others wait for that short time."""
        now = self._clock.monotonic()
        for partition, fold in self._folds.items():
            offset = fold.store.changelog_offset()
            if now - fold.flushed < self._flush_interval or fold.flushed_offset == offset:
                continue
            fold.flushed, fold.flushed_offset = now, offset
            fold.flushing = asyncio.ensure_future(asyncio.to_thread(fold.store.flush))
            try:
                await asyncio.shield(fold.flushing)
            except HeadraceError as failure:
                self._drop(partition, fold, failure)
            fold.flushing = None
            return

    def statistics(self) -> Mapping[str, object]:
        return {"partitions": sorted(self._folds), "frames": self.frames, "reason": self.reason}


async def _next_records(consumer: AIOKafkaConsumer, wait_ms: int) -> Mapping[TopicPartition, Sequence[Any]]:
    call = consumer.getmany(timeout_ms=wait_ms, max_records=_RECORDS_PER_POLL)
    return await broker_call("read changelogs", call)
