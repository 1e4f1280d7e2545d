"""Tables that follow a compacted topic: what has come since a table's last version becomes its next one.

One node feeds all of them: the one by itself, or the cluster's leader. It keeps nothing of its own, as a version says
as of which offsets it is: another node goes on from there, and one that only takes itself for the leader can't take
the table back, since the ledger refuses offsets that are behind. Tables are fed one after another, for no more than
TABLE_FEED_SHARE_MAX of the time.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO, Final

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition

from node.ingest.topics import Topics
from node.kernel.broker import ClientOptions, broker_call, close_quietly
from node.kernel.clock import Clock
from node.kernel.errors import BoundExceeded, BrokerUnavailable, HeadraceError, ProgressLost, TableRefused, TopicMissing
from node.kernel.limits import (
    TABLE_FEED_GAP_MS_MAX,
    TABLE_FEED_PARTITIONS_MAX,
    TABLE_FEED_PROBLEMS_MAX,
    TABLE_FEED_SHARE_MAX,
)
from node.kernel.reading import committed_reader, polls_up_to
from node.kernel.table_versions import Feed, Table, TableVersion, later
from node.kernel.tables import TableSchema
from node.tables.changes import Changes, RecordRefused
from node.tables.service import TableService

log = structlog.get_logger(__name__)

_LOOK_SECONDS: Final = 0.5
_FAILED_SECONDS: Final = 5.0
_COUNT_SECONDS: Final = 15.0
_LOST_SECONDS: Final = 60.0
_POLL_MS: Final = 200
_RECORDS_PER_POLL: Final = 500
_REST_FACTOR: Final = 1 / TABLE_FEED_SHARE_MAX - 1

Offsets = tuple[int, ...]


def _no_problems() -> deque[str]:
    return deque(maxlen=TABLE_FEED_PROBLEMS_MAX)


@dataclass(slots=True)
class _Made:
    """What records came to."""

    rows: int = 0
    refused: int = 0
    problems: deque[str] = field(default_factory=_no_problems)


@dataclass(slots=True)
class Fed:
    """How one table is fed by this node."""

    offsets: Offsets = ()
    """Up to which the topic has been looked at; what was no row is behind the version's."""
    behind: int = 0
    """Offsets that the topic has from there on."""
    caught_up: float | None = None
    """When last, by the monotonic clock."""
    refused: int = 0
    problems: deque[str] = field(default_factory=_no_problems)
    rowless: bool = False
    """Whether the topic, looked at from its beginning up to `offsets`, had no row."""
    reason: str = ""
    """Why it is not fed now."""
    rests_until: float = 0.0
    lost_since: float | None = None
    """By the monotonic clock, since when no node has had the file of the version that is to go live."""

    def waits(self, table: Table, held: bool, now: float) -> bool:
        """Whether a version is still to go live; `held`: a node has its file. One whose only file went with a disk
        never will: after _LOST_SECONDS the table is fed again from the version that is live."""
        if table.passed is None or held:
            self.lost_since = None
            return table.passed is not None
        if self.lost_since is None:
            self.lost_since = now
        if now - self.lost_since < _LOST_SECONDS:
            return True
        self.offsets, self.caught_up, self.lost_since = (), None, None
        return False

    def take(self, made: _Made, ends: Offsets, now: float) -> None:
        """All up to `ends` is looked at: what was refused is counted only now, as a try that fails is made anew."""
        self.offsets, self.behind, self.caught_up = ends, 0, now
        self.refused += made.refused
        self.problems.extend(made.problems)


class TableFeeds:
    """`feeding` tells whether it is this node's turn."""

    def __init__(
        self, service: TableService, options: ClientOptions, clock: Clock, feeding: Callable[[], bool] = lambda: True
    ) -> None:
        self._service = service
        self._options = options
        self._clock = clock
        self._feeding = feeding
        self._topics = Topics(options, 1, may_create=False)
        self._counts: dict[str, tuple[int, float]] = {}
        self._consumer: AIOKafkaConsumer | None = None
        self._fed: dict[tuple[str, int], Fed] = {}

    def of(self, table: Table) -> Fed | None:
        """None where this node does not feed it."""
        return None if table.feed is None else self._fed.get((table.name, table.feed.number))

    async def run(self) -> None:
        try:
            while True:
                tables = self._service.ledger.tables().values() if self._feeding() else ()
                followed = {(table.name, table.feed.number): table for table in tables if table.feed is not None}
                if not followed:
                    await self._stop()
                self._fed = {key: self._fed.get(key) or Fed() for key in followed}
                for key, table in followed.items():
                    await self._look(table, self._fed[key])
                await asyncio.sleep(_LOOK_SECONDS)
        finally:
            await self._stop()

    async def _stop(self) -> None:
        self._fed.clear()
        self._counts.clear()
        await self._give_client_up()

    async def _give_client_up(self) -> None:
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            await close_quietly("table feeds", consumer.stop())

    async def _look(self, table: Table, fed: Fed) -> None:
        assert table.feed is not None
        started = self._clock.monotonic()
        if started < fed.rests_until or fed.waits(table, self._service.ledger.held(table.name), started):
            return
        try:
            changed = await self._feed(table, table.feed, fed)
        except HeadraceError as failure:
            reason = f"{type(failure).__name__}: {failure}"
            if reason != fed.reason:
                log.warning("table not fed", table=table.name, topic=table.feed.topic, reason=reason)
            fed.reason = reason
            fed.rests_until = self._clock.monotonic() + _FAILED_SECONDS
            if isinstance(failure, BrokerUnavailable):  # its fetching may have ended, for all tables
                await self._give_client_up()
            return
        fed.reason = ""
        if changed:
            ended = self._clock.monotonic()
            fed.rests_until = max(started + table.feed.every_ms / 1000, ended + (ended - started) * _REST_FACTOR)

    async def _feed(self, table: Table, feed: Feed, fed: Fed) -> bool:
        """Make the next version on top of the live one, if something has come."""
        base = table.live_fed
        consumer, places = await self._places(feed.topic)
        starts, ends = await self._bounds(consumer, places)
        seen = fed.offsets or (() if base is None else base.offsets)
        if later(seen, ends):
            raise ProgressLost(
                f"topic {feed.topic} ends at {ends}, before {seen}, which table {table.name} is as of: it was made "
                "again; unfollow it and follow it anew"
            )
        fed.behind = sum(end - at for end, at in zip_longest(ends, seen, fillvalue=0))
        if seen and not fed.behind:
            fed.caught_up = self._clock.monotonic()
            _check_rows(feed, fed)
            return False
        if base is not None and (self._missed(fed, base) or later(starts, base.offsets)):
            log.info("table is fed from the beginning of its topic", table=table.name, topic=feed.topic)
            base = None
        async with self._service.upload(table.name) as folder:
            begin = since(() if base is None else base.offsets, starts)
            made = await self._write(folder / "file", feed, fed.offsets, consumer, places, begin, ends)
            if made.rows:
                await self._service.put_changes(table.name, folder / "file", feed, base, ends)
        fed.take(made, ends, self._clock.monotonic())
        fed.rowless = not made.rows and base is None
        _check_rows(feed, fed)
        return True

    def _missed(self, fed: Fed, base: TableVersion) -> bool:
        """Whether deletions may have come and gone unseen since then."""
        if fed.caught_up is not None:
            return (self._clock.monotonic() - fed.caught_up) * 1000 > TABLE_FEED_GAP_MS_MAX
        return self._clock.now_ms() - base.at_ms > TABLE_FEED_GAP_MS_MAX

    async def _places(self, topic: str) -> tuple[AIOKafkaConsumer, list[TopicPartition]]:
        if self._consumer is None:
            consumer = committed_reader(self._options, auto_offset_reset="none")
            await broker_call("start table feeds", consumer.start())
            self._consumer = consumer
        return self._consumer, [TopicPartition(topic, number) for number in range(await self._count(topic))]

    async def _count(self, topic: str) -> int:
        """Its partitions, of late. A consumer knows those of topics that it has been given, and no others."""
        count, at = self._counts.get(topic, (0, 0.0))
        if count and self._clock.monotonic() - at < _COUNT_SECONDS:
            return count
        count = (await self._topics.partitions([topic]))[topic]
        if not count:
            raise TopicMissing(f"topic {topic} does not exist: create it, the table is fed then")
        if count > TABLE_FEED_PARTITIONS_MAX:
            raise BoundExceeded(f"topic {topic} has {count} partitions, over TABLE_FEED_PARTITIONS_MAX")
        self._counts[topic] = (count, self._clock.monotonic())
        return count

    @staticmethod
    async def _bounds(consumer: AIOKafkaConsumer, places: Sequence[TopicPartition]) -> tuple[Offsets, Offsets]:
        what = f"bounds of {places[0].topic}"
        starts = await broker_call(what, consumer.beginning_offsets(places))
        ends = await broker_call(what, consumer.end_offsets(places))
        return tuple(starts[place] for place in places), tuple(ends[place] for place in places)

    async def _write(
        self,
        path: Path,
        feed: Feed,
        known: Offsets,
        consumer: AIOKafkaConsumer,
        places: Sequence[TopicPartition],
        begin: Offsets,
        ends: Offsets,
    ) -> _Made:
        """Changes between these offsets as lines of a file; what is refused before `known` has been counted."""
        made = _Made()
        if begin == ends:  # assigned and taken back before the client has looked, its fetching would end for good
            return made
        changes = Changes(TableSchema.decode(feed.schema))
        with path.open("wb") as file:
            consumer.assign(places)
            for place, start in zip(places, begin, strict=True):
                consumer.seek(place, start)
            try:
                for place, counted, end in zip(places, since(known, (0,) * len(ends)), ends, strict=True):
                    async for records in self._records(consumer, place, end):
                        _add_lines(records, counted, end, changes, file, made)
                        if file.tell() > self._service.upload_bytes_max:
                            raise TableRefused(
                                [f"what topic {feed.topic} has is over [tables] upload_mb_max; raise it"]
                            )
            finally:
                consumer.unsubscribe()  # of a topic that is deleted it would ask thousands of times a second
        return made

    async def _records(self, consumer: AIOKafkaConsumer, place: TopicPartition, end: int) -> AsyncIterator[list[Any]]:
        """Each poll's, with a rest after what was made of it."""
        what = f"read {place.topic}[{place.partition}]"
        async for records, _ in polls_up_to(consumer, place, end, what, self._clock, _POLL_MS, _RECORDS_PER_POLL):
            started = self._clock.monotonic()
            yield records
            await asyncio.sleep((self._clock.monotonic() - started) * _REST_FACTOR)


def _check_rows(feed: Feed, fed: Fed) -> None:
    if fed.rowless:
        raise TableRefused([f"topic {feed.topic} has no rows; the table is fed once it has"])


def _add_lines(records: Sequence[Any], counted: int, end: int, changes: Changes, file: BinaryIO, made: _Made) -> None:
    for record in records:
        if record.offset >= end:
            continue
        try:
            file.write(changes.line(record.key, record.value))
            made.rows += 1
        except RecordRefused as refusal:
            if record.offset >= counted:
                made.refused += 1
                made.problems.append(f"partition {record.partition}, offset {record.offset}: {refusal}")


def since(offsets: Offsets, starts: Offsets) -> Offsets:
    """Where to go on, of as many partitions as there are by now: new ones from their beginning."""
    return (offsets + starts[len(offsets) :])[: len(starts)]
