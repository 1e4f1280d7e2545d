"""Owner and standby compared row for row: a real changelog, real folding, real HTTP between the two."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaProducer
from snapshot_support import SECRET, SnapshotNode, agree, damage, frames
from waiting import until

from node.kernel.clock import SystemClock
from node.kernel.errors import HeadraceError, NotFound, PeerRefused
from node.kernel.types import Frame
from node.state.inspection import bucket_of, digest_of
from replication.frame import encode_frame
from replication.peers import PeerServer
from replication.standby import StandbyFolder
from replication.verification import Inspection, Verification

CLOCK = SystemClock()


class Comparing:
    """A node that stands by for partition 0, or owns it, and can compare."""

    def __init__(self, path: Path, name: str, address: str, topic: str) -> None:
        self.node = SnapshotNode(path, name)
        self.standbys = StandbyFolder({"bootstrap_servers": address}, topic, CLOCK)
        self.verification = Verification(
            self.node.path / "verify",
            self.node.cluster,
            self.node.client,
            lambda: self.node.stores,
            self.standbys,
            Inspection(digest_of, bucket_of),
            self.node.snapshots.verify_again,
            CLOCK,
        )
        routes = [*self.node.snapshots.routes(), *self.verification.routes()]
        self.node.server = PeerServer("127.0.0.1:0", name, SECRET, CLOCK, routes)
        self._folding: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.verification.open()
        await self.node.start()
        self.store = self.node.open(0)

    def fold(self) -> None:
        self.standbys.add(0, self.store, _refuse)
        self._folding = asyncio.create_task(self.standbys.run())

    async def stop(self) -> None:
        await self.verification.close()
        if self._folding is not None:
            self._folding.cancel()
            await asyncio.gather(self._folding, return_exceptions=True)
        await self.node.stop()


def _refuse(failure: HeadraceError) -> None:
    raise AssertionError(failure)


class Pair:
    """`a` owns the partition: what it appends to the changelog, it applies itself; `b` folds it."""

    def __init__(self, owner: Comparing, standby: Comparing, producer: AIOKafkaProducer, topic: str) -> None:
        self.owner = owner
        self.standby = standby
        self._producer = producer
        self._topic = topic
        self._frames = frames(customers=500)

    async def append(self, count: int = 1) -> None:
        for _ in range(count):
            frame = next(self._frames)
            (record,) = encode_frame(frame)
            sent = await self._producer.send_and_wait(self._topic, record, partition=0)
            self.owner.store.apply(frame, sent.offset + 1)

    async def append_on(self, ending: asyncio.Event) -> None:
        """Until then, and whole: what is sent is applied."""
        while not ending.is_set():
            await self.append()


@pytest.fixture
async def pair(kafka: str, topics: Any, tmp_path: Path) -> AsyncIterator[Pair]:
    topic = await topics.create("changelog", 1)
    owner, standby = (Comparing(tmp_path, name, kafka, topic) for name in ("a", "b"))
    producer = AIOKafkaProducer(bootstrap_servers=kafka)
    await producer.start()
    for one in (owner, standby):
        await one.start()
    agree([owner.node, standby.node], standbys=("b",))
    yield Pair(owner, standby, producer, topic)
    await producer.stop()
    for one in (owner, standby):
        await one.stop()


async def test_equal_stores_are_found_equal_while_frames_go_on(pair: Pair) -> None:
    await pair.append(50)
    pair.standby.fold()
    await pair.owner.node.snapshots.take(0)
    ending = asyncio.Event()
    appending = asyncio.create_task(pair.append_on(ending))
    results = [await pair.owner.verification.verify(0) for _ in range(2)]
    ending.set()
    await appending
    for result in results:
        assert result["right"]
        assert result["standbys"] == {"b": {"equal": True, "differences": [], "first": []}}
        assert 50 <= result["changelog_offset"] <= pair.owner.store.changelog_offset()
        assert result["rows"] == 500
    assert results[0]["changelog_offset"] < results[1]["changelog_offset"]
    assert results[0]["snapshots"] == [
        {"node": "a", "right": [50], "damaged": []}, {"node": "b", "right": [], "damaged": []}
    ]  # fmt: skip
    end = pair.owner.store.changelog_offset()
    await until(lambda: pair.standby.store.changelog_offset() == end, "the standby folds on")
    for one in (pair.owner, pair.standby):
        assert list((one.node.path / "verify").glob("*")) == []


async def test_a_row_that_differs_is_named(pair: Pair) -> None:
    await pair.append(30)
    pair.standby.fold()
    await until(lambda: pair.standby.store.changelog_offset() == 30, "the standby is there")
    await pair.standby.standbys.remove(0)
    (row,) = pair.standby.store.load([b"000123"])
    changed = np.frombuffer(row or bytes(32 * 8)).copy()
    changed[7] += 1
    pair.standby.store.apply(Frame({"events": 30}, 1, [b"000123"], changed[None, :]), 30)
    pair.standby.standbys.add(0, pair.standby.store, _refuse)
    result = await pair.owner.verification.verify(0)
    assert not result["right"]
    assert result["standbys"]["b"]["equal"] is False
    assert result["standbys"]["b"]["first"] == ["customer 000123"]
    assert result["standbys"]["b"]["differences"] == ["1 of 4096 buckets of rows"]


async def test_a_standby_that_is_gone_or_does_not_fold_is_no_proof(pair: Pair) -> None:
    await pair.append(10)
    result = await pair.owner.verification.verify(0)
    assert not result["right"]
    assert result["standbys"]["b"]["equal"] is None
    assert "does not stand by" in result["standbys"]["b"]["reason"]
    await pair.standby.node.server.stop()
    result = await pair.owner.verification.verify(0)
    assert result["standbys"]["b"]["equal"] is None
    assert not result["right"]


async def test_a_standby_that_was_held_and_forgotten_folds_on(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replication.verification.VERIFY_HOLD_MS_MAX", 300)
    await pair.append(10)
    pair.standby.fold()
    await until(lambda: pair.standby.store.changelog_offset() == 10, "the standby is there")
    address = pair.standby.node.server.address
    assert await pair.owner.node.client.ask(address, "POST", "/peer/verify/0/hold") == b"10"
    await pair.append(10)
    await until(lambda: pair.standby.store.changelog_offset() == 20, "it folds on by itself")
    with pytest.raises(PeerRefused, match="past 15"):
        await pair.owner.node.client.ask(address, "POST", "/peer/verify/0/digest?offset=15")
    with pytest.raises(PeerRefused, match="not to 25"):
        await pair.owner.node.client.ask(address, "POST", "/peer/verify/0/digest?offset=25")
    with pytest.raises(NotFound):
        await pair.owner.node.client.ask(address, "POST", "/peer/verify/0/bucket?offset=20&bucket=1")
    with pytest.raises(NotFound):
        await pair.owner.node.client.ask(address, "POST", "/peer/verify/0/digest?offset=x")


async def test_damaged_snapshots_of_either_are_told(pair: Pair) -> None:
    await pair.append(10)
    pair.standby.fold()
    await until(lambda: pair.standby.store.changelog_offset() == 10, "the standby is there")
    await pair.standby.node.snapshots.take(0)
    with contextlib.suppress(StopIteration):
        damage(next(pair.standby.node.folder.place(0, 10).glob("MANIFEST-*")))
    result = await pair.owner.verification.verify(0)
    assert result["standbys"]["b"]["equal"] is True
    assert not result["right"]
    assert "MANIFEST" in result["snapshots"][1]["damaged"][0]


async def test_only_the_owner_compares(pair: Pair) -> None:
    with pytest.raises(PeerRefused, match="does not own partition 0; ask a"):
        await pair.standby.verification.verify(0)
    with pytest.raises(PeerRefused, match="does not own partition 7"):
        await pair.owner.verification.verify(7)
