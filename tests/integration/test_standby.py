"""Standbys on a real broker and real RocksDB: what they fold, how far they say they are, and what stops one of them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, RecordsToDelete
from node_support import Kafka
from waiting import until

from node.kernel.clock import SystemClock
from node.kernel.errors import (
    BrokerUnavailable,
    ChangelogCut,
    FrameCorrupt,
    HeadraceError,
    ProgressLost,
    StoreUnavailable,
)
from node.kernel.limits import STANDBY_PROOF_MS_MAX, STANDBY_UNKNOWN_FRAMES
from node.kernel.ports import StateStore
from node.kernel.types import Frame
from node.outbox import BrokerTraits, Outbox, Outgoing, OutputTopics
from node.state.rocksdb import RocksEnvironment, RocksStore
from replication.frame import encode_frame
from replication.standby import StandbyFolder

CLOCK = SystemClock()
WAIT_S_MAX = 60
SLOTS = 6
RECORD_BYTES_MAX = 700
"""So that most frames have several parts."""


class Application:
    """The output topics of one application, and owners of its partitions."""

    def __init__(self, address: str, name: str, partitions: int) -> None:
        self.address = address
        self.name = name
        self.partitions = partitions
        self.topics = OutputTopics(*(f"{name}.{kind}" for kind in ("inferences", "changelog", "dead-letters")))
        self.outboxes: list[Outbox] = []

    async def create(self) -> None:
        for topic in (self.topics.inferences, self.topics.changelog, self.topics.dead_letters):
            await asyncio.to_thread(Kafka(self.address).create, topic, self.partitions)

    async def outbox(self, partition: int) -> Outbox:
        encode = lambda frame: encode_frame(frame, RECORD_BYTES_MAX)  # noqa: E731
        options = {"bootstrap_servers": self.address}
        traits = BrokerTraits(takes_group_offsets=False)
        outbox = Outbox(options, self.topics, self.name, partition, "required", "lz4", encode, CLOCK, traits)
        self.outboxes.append(outbox)
        async with asyncio.timeout(WAIT_S_MAX):
            await outbox.open()
        return outbox

    async def cut(self, partition: int, before: int) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.address)
        await admin.start()
        try:
            await admin.delete_records({TopicPartition(self.topics.changelog, partition): RecordsToDelete(before)})
        finally:
            await admin.close()

    async def close(self) -> None:
        for outbox in self.outboxes:
            await outbox.close()
        self.outboxes.clear()
        gc.collect()


@pytest.fixture
async def application(kafka: str, topic_names: Callable[[str], str]) -> AsyncIterator[Application]:
    one = Application(kafka, topic_names("standby"), 3)
    await one.create()
    yield one
    await one.close()


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Callable[[str], RocksStore]]:
    """Opens stores by name; closes what a test leaves open."""
    environment = RocksEnvironment.of()
    opened: list[RocksStore] = []

    def open_store(name: str) -> RocksStore:
        opened.append(RocksStore(tmp_path / name, environment))
        return opened[-1]

    yield open_store
    for store in opened:
        store.close()


@contextlib.asynccontextmanager
async def folding(address: str, topic: str, flush_interval_seconds: float = 0.05) -> AsyncIterator[StandbyFolder]:
    folder = StandbyFolder({"bootstrap_servers": address}, topic, CLOCK, flush_interval_seconds)
    running = asyncio.ensure_future(folder.run())
    try:
        yield folder
        assert not running.done()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def frame(number: int, customers: int = 20) -> Frame:
    noise = np.random.default_rng(number)
    rows = noise.normal(size=(customers, SLOTS))
    names = [b"c%d" % name for name in noise.choice(500, customers, replace=False)]
    return Frame({"source": number}, 1, names, rows, counters={"events": number})


def contents(store: StateStore) -> tuple[object, ...]:
    rows, after = [], None
    while page := store.scan(after, 500):
        rows += page
        after = page[-1][0]
    return rows, store.progress(), store.counters(), store.changelog_offset()


def refuse(failure: HeadraceError) -> None:
    raise AssertionError(failure)


def at_end(folder: StandbyFolder, partition: int) -> bool:
    progress = folder.progress(partition)
    return progress is not None and progress.frames_behind == 0 and progress.ms_behind == 0


async def test_the_reader_connects_while_the_state_is_on_its_way(
    application: Application, stores: Callable[[str], RocksStore]
) -> None:
    async with folding(application.address, application.topics.changelog) as folder:
        folder.expect(0)
        await until(lambda: folder._asker is not None, "connected")
        reader = folder._reader
        await folder.remove(0)
        await until(lambda: folder._asker is None, "closed again, as nothing is to come")
        folder.expect(0)
        folder.expect(1)
        await until(lambda: folder._asker is not None, "connected again")
        assert folder._reader is not reader
        reader = folder._reader
        await folder.remove(0)
        folder.add(1, stores("standby"), refuse)
        await until(lambda: at_end(folder, 1), "at the end")
        assert folder._reader is reader


async def test_a_new_standby_knows_its_lag_before_the_broker_has_answered_a_fetch_of_nothing(
    application: Application, stores: Callable[[str], RocksStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replication.standby.STANDBY_POLL_MS", 25_000)
    outbox, store = await application.outbox(0), stores("standby")
    one = frame(1)
    store.apply(one, await outbox.send(Outgoing(one)))
    async with folding(application.address, application.topics.changelog) as folder:
        folder.add(0, store, refuse)
        await until(lambda: (told := folder.progress(0)) and told.frames_behind <= 1, "its lag is known", 10)


async def test_standbys_equal_their_owners_row_for_row_through_changes_of_the_assignment(
    application: Application, stores: Callable[[str], RocksStore]
) -> None:
    """Frames in parts, transactions given up, partitions that leave and come back in the middle of it all."""
    owners = [stores(f"owner-{number}") for number in range(3)]
    standbys = [stores(f"standby-{number}") for number in range(3)]
    chance = random.Random(5)

    async def own(partition: int) -> None:
        outbox = await application.outbox(partition)
        for number in range(1, 120):
            one = Outgoing(frame(1000 * partition + number))
            owners[partition].apply(one.frame, await outbox.send(one))
            if number % 20 == 0:  # the next owner finds a transaction that nobody ends
                producer = outbox._producer
                assert producer is not None
                part = encode_frame(frame(9_000_000 + number), RECORD_BYTES_MAX)[0]
                await producer.send_and_wait(application.topics.changelog, part, partition=partition)
                outbox = await application.outbox(partition)

    async with folding(application.address, application.topics.changelog) as folder:
        for partition in range(3):
            folder.add(partition, standbys[partition], refuse)
        owning = asyncio.gather(*(own(partition) for partition in range(3)))
        while not owning.done():
            await asyncio.wait({owning}, timeout=0.05)
            partition = chance.randrange(3)
            await folder.remove(partition)
            assert folder.progress(partition) is None
            folder.add(partition, standbys[partition], refuse)
        await owning
        for partition in range(3):
            end, standby = owners[partition].changelog_offset(), standbys[partition]
            await until(lambda: standby.changelog_offset() >= end, f"standby {partition}")  # noqa: B023
            await until(lambda: at_end(folder, partition), f"standby {partition} at the end")  # noqa: B023
            assert contents(standby) == contents(owners[partition])
    standbys[0].close()
    assert contents(stores("standby-0"))[1:3] == contents(owners[0])[1:3], "it is durable"


async def test_a_standby_waits_at_an_offset_and_goes_on(
    application: Application, stores: Callable[[str], RocksStore]
) -> None:
    outbox, store = await application.outbox(0), stores("one")
    ends = [await outbox.send(Outgoing(frame(number))) for number in range(1, 4)]
    async with folding(application.address, application.topics.changelog) as folder:
        folder.add(0, store, refuse)
        assert folder.hold(0, ends[1]) < ends[1]
        await until(lambda: store.changelog_offset() == ends[1], "the second frame")
        ends.append(await outbox.send(Outgoing(frame(4))))
        assert store.changelog_offset() == ends[1]
        folder.resume(0)
        await until(lambda: store.changelog_offset() == ends[3], "the last frame")
        assert folder.hold(0, ends[1]) == ends[3], "it is past that"
    assert store.progress() == {"source": 4}


async def test_a_standby_that_waits_at_an_offset_can_be_removed_and_comes_back(
    application: Application, stores: Callable[[str], RocksStore]
) -> None:
    outboxes = [await application.outbox(partition) for partition in (0, 1)]
    for outbox in outboxes:
        await outbox.send(Outgoing(frame(1)))
    store, other = stores("one"), stores("other")
    async with folding(application.address, application.topics.changelog) as folder:
        folder.add(0, store, refuse)
        await until(lambda: at_end(folder, 0), "the end")
        folder.hold(0, 0)
        folder.add(1, other, refuse)
        await until(lambda: at_end(folder, 1), "the other is read without it")
        await folder.remove(0)
        end = await outboxes[0].send(Outgoing(frame(2)))
        folder.add(0, store, refuse)
        await until(lambda: store.changelog_offset() == end, "it goes on")


async def test_an_owner_goes_on_from_a_standby(application: Application, stores: Callable[[str], RocksStore]) -> None:
    """Once the new producer has started, `finish` folds to the end and leaves the store; the others stand by on."""
    first, other = await application.outbox(0), await application.outbox(1)
    await first.send(Outgoing(frame(1)))
    await other.send(Outgoing(frame(2)))
    store, beside = stores("0"), stores("1")
    async with folding(application.address, application.topics.changelog) as folder:
        folder.add(0, store, refuse)
        folder.add(1, beside, refuse)
        await until(lambda: at_end(folder, 0) and at_end(folder, 1), "both ends")
        folder.hold(0, 0)
        end = await first.send(Outgoing(frame(3)))
        heir = await application.outbox(0)
        report = await folder.finish(0)
        assert (report.frames, report.rows) == (1, 20), "what it was held back from"
        assert store.changelog_offset() == end
        assert folder.progress(0) is None
        store.apply(frame(4), await heir.send(Outgoing(frame(4))))
        last = await other.send(Outgoing(frame(5)))
        await until(lambda: beside.changelog_offset() == last, "the other goes on")
        assert store.progress() == {"source": 4}
        with pytest.raises(BrokerUnavailable, match="opened again"):
            await folder.finish(0)
        folder.add(0, store, refuse)
        end = await heir.send(Outgoing(frame(6)))
        await until(lambda: store.changelog_offset() == end, "it stands by again")


class Calling(RocksStore):
    """A store that calls back once it has applied a frame."""

    applied: Callable[[], None] = lambda self: None

    def apply(self, frame: Frame, changelog_offset: int) -> None:
        super().apply(frame, changelog_offset)
        self.applied()


async def test_frames_that_were_held_back_are_not_missed_by_a_promotion(
    application: Application, tmp_path: Path
) -> None:
    """Held while a poll is folded, and let go before that poll is done with: the rest of it is still to be folded."""
    ends: dict[int, int] = {}
    for partition in (0, 1):
        outbox = await application.outbox(partition)
        for number in range(1, 9):
            ends[partition] = await outbox.send(Outgoing(frame(number)))
    stores = [Calling(tmp_path / str(partition), RocksEnvironment.of()) for partition in (0, 1)]
    finishing: dict[int, asyncio.Future[object]] = {}
    held: list[int] = []

    async with folding(application.address, application.topics.changelog) as folder:

        def applied(partition: int) -> None:
            """The first of the two that folds a frame is held there, and promoted once the other folds one."""
            if not held:
                held.append(partition)
                folder.hold(partition, 0)
            elif not finishing and partition not in held:
                finishing[held[0]] = asyncio.ensure_future(folder.finish(held[0]))

        for partition, store in enumerate(stores):
            store.applied = lambda partition=partition: applied(partition)  # type: ignore[method-assign, misc]
            folder.add(partition, store, refuse)
        await until(lambda: finishing, "one is promoted in mid-poll")
        for partition, finished in finishing.items():
            await finished
            assert stores[partition].changelog_offset() == ends[partition]
            assert stores[partition].progress() == {"source": 8}
    for store in stores:
        store.close()


async def test_one_that_cannot_go_on_is_told_and_the_others_do(
    application: Application, stores: Callable[[str], RocksStore]
) -> None:
    outboxes = [await application.outbox(partition) for partition in range(3)]
    ends = [await outbox.send(Outgoing(frame(1))) for outbox in outboxes]
    await outboxes[0].send(Outgoing(frame(2)))
    await application.cut(0, ends[0])
    plain = AIOKafkaProducer(bootstrap_servers=application.address)
    await plain.start()
    await plain.send_and_wait(application.topics.changelog, b"no frame", partition=1)
    await plain.stop()
    failures: dict[int, HeadraceError] = {}
    opened = [stores(str(partition)) for partition in range(3)]
    async with folding(application.address, application.topics.changelog) as folder:
        for partition in range(3):
            folder.add(partition, opened[partition], lambda failure, at=partition: failures.update({at: failure}))
        await until(lambda: len(failures) == 2, "both reports")
        assert isinstance(failures[0], ChangelogCut)
        assert isinstance(failures[1], FrameCorrupt)
        assert opened[1].changelog_offset() == ends[1], "what came before is folded"
        last = await outboxes[2].send(Outgoing(frame(3)))
        await until(lambda: opened[2].changelog_offset() == last, "the third goes on")

        # a snapshot as of the cut is what it needed
        opened[0].apply(frame(1), ends[0])
        folder.add(0, opened[0], refuse)
        await until(lambda: opened[0].progress() == {"source": 2}, "the rest of the cut changelog")

        ahead = stores("ahead")
        ahead.apply(frame(1), 10_000)
        folder.add(1, ahead, lambda failure: failures.update({9: failure}))
        await until(lambda: 9 in failures, "a store from another changelog")
        assert isinstance(failures[9], ProgressLost)
        assert not isinstance(failures[9], ChangelogCut)

        opened[2].close()
        await folder.remove(2)
        folder.add(2, opened[2], lambda failure: failures.update({2: failure}))
        await outboxes[2].send(Outgoing(frame(5)))
        await until(lambda: 2 in failures, "a closed store")
        assert isinstance(failures[2], (StoreUnavailable, HeadraceError))


async def test_a_partition_that_is_added_later_is_waited_for(
    application: Application, stores: Callable[[str], RocksStore]
) -> None:
    failures: list[HeadraceError] = []
    async with folding(application.address, application.topics.changelog) as folder:
        folder.add(0, stores("0"), refuse)
        folder.add(3, stores("3"), failures.append)
        await until(lambda: failures, "the report")
        admin = AIOKafkaAdminClient(bootstrap_servers=application.address)
        await admin.start()
        for topic in (application.topics.inferences, application.topics.changelog, application.topics.dead_letters):
            await admin.create_partitions({topic: NewPartitions(4)})
        await admin.close()
        store = stores("again")
        end = await (await application.outbox(3)).send(Outgoing(frame(1)))

        def add_again(failure: HeadraceError) -> None:
            failures.append(failure)
            folder.add(3, store, add_again)

        folder.add(3, store, add_again)
        await until(lambda: store.changelog_offset() == end, "its frame")
        assert at_end(folder, 0)


async def test_the_lag_in_time_grows_while_the_broker_is_gone(
    own_kafka: Any, stores: Callable[[str], RocksStore]
) -> None:
    one = Application(own_kafka.address, "silent", 1)
    await one.create()
    outbox, store = await one.outbox(0), stores("store")
    await outbox.send(Outgoing(frame(1)))
    async with folding(one.address, one.topics.changelog) as folder:
        folder.add(0, store, refuse)
        first = folder.progress(0)
        assert first is not None
        assert first.frames_behind == STANDBY_UNKNOWN_FRAMES
        await until(lambda: at_end(folder, 0), "the end")
        own_kafka.pause()
        lagging = await until(lambda: not at_end(folder, 0) and folder.progress(0), "a lag in time")
        assert lagging.ms_behind > STANDBY_PROOF_MS_MAX
        assert lagging.frames_behind == 0, "nothing is known of more frames"
        own_kafka.resume()
        await until(lambda: at_end(folder, 0), "the end again")
        await outbox.send(Outgoing(frame(2)))
        await until(lambda: store.progress() == {"source": 2}, "the next frame")
    await one.close()
