"""Cutting a real changelog: what is there before and after, and who may say so."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from snapshot_support import fold, frames, open_store

from node.kernel.clock import ManualClock
from node.kernel.digest import digest_store
from node.kernel.errors import ProgressLost, TopicMissing
from node.kernel.limits import CUT_STORE_MS_MIN
from replication.catalog import Assignment, Catalog
from replication.commands import Settings
from replication.cutter import Changelogs, Cutter
from replication.frame import FrameAssembler, encode_frame
from replication.ownership import NodeReport, Progress, Reports


@dataclass
class Leader:
    snapshots: dict[str, dict[int, int]]
    offsets: dict[str, dict[int, int]]
    holders_min: int = 2
    leads: bool = True
    asked: list[int] = field(default_factory=list)

    @property
    def catalog(self) -> Catalog:
        held = Assignment(owner="a", epoch=1, standbys=("b",))
        return Catalog(settings=Settings(snapshot_holders_min=self.holders_min), partitions=(held, held))

    def reports(self) -> Reports:
        told = {
            name: NodeReport(0, 1, {number: Progress(offset, 0, 0) for number, offset in held.items()})
            for name, held in self.offsets.items()
        }
        return Reports(0, told)

    def verified(self) -> dict[str, dict[int, int]]:
        return {name: self.snapshots.get(name, {}) for name in self.offsets}

    async def stored(self, partition: int) -> int:
        self.asked.append(partition)
        return self.snapshots["store"].get(partition, 0)


async def produced(address: str, topic: str, partition: int, count: int) -> None:
    """`count` frames, the n-th at the offset n - 1."""
    producer = AIOKafkaProducer(bootstrap_servers=address, compression_type="lz4")
    await producer.start()
    try:
        source = frames()
        for _ in range(count):
            (record,) = encode_frame(next(source))
            await producer.send_and_wait(topic, record, partition=partition)
    finally:
        await producer.stop()


async def test_a_changelog_is_cut_behind_snapshots_and_what_is_left_completes_them(
    kafka: str, topics: Any, tmp_path: Path
) -> None:
    topic = await topics.create("changelog", 2)
    await produced(kafka, topic, 0, 60)
    await produced(kafka, topic, 1, 10)
    store, source = open_store(tmp_path / "store"), frames()
    fold(store, source, 40)
    assert store.checkpoint(tmp_path / "snapshot") == 40
    fold(store, source, 20)
    options = {"bootstrap_servers": kafka}
    changelogs, clock = Changelogs(options, topic), ManualClock()
    assert await changelogs.bounds(0) == (0, 60)
    leader = Leader({"a": {0: 50}, "b": {0: 40, 1: 5}}, {"a": {0: 60, 1: 10}, "b": {0: 60, 1: 10}})
    cutter = Cutter(changelogs, leader, leader.stored, clock, 1000)
    leader.snapshots["store"] = {}
    for _ in range(2):
        await cutter.round()
        clock.advance(1000)
    assert cutter.statistics().reason == ""
    assert await changelogs.bounds(0) == (40, 60)
    assert await changelogs.bounds(1) == (0, 10)
    assert {number: cut.before for number, cut in cutter.statistics().cuts.items()} == {0: 40}
    restored = open_store(tmp_path / "snapshot")
    await folded(kafka, topic, restored, 60)
    assert digest_store(restored) == digest_store(store)
    restored.close()
    store.close()
    await changelogs.close()


async def folded(address: str, topic: str, store: Any, end: int) -> None:
    from aiokafka import AIOKafkaConsumer, TopicPartition

    consumer = AIOKafkaConsumer(bootstrap_servers=address, enable_auto_commit=False, auto_offset_reset="none")
    place, assembler = TopicPartition(topic, 0), FrameAssembler()
    async with asyncio.timeout(60):
        await consumer.start()
        try:
            consumer.assign([place])
            consumer.seek(place, store.changelog_offset())
            while store.changelog_offset() < end:
                record = await consumer.getone(place)
                frame = assembler.add(record.value)
                assert frame is not None
                store.apply(frame, record.offset + 1)
        finally:
            await consumer.stop()


async def test_the_store_by_url_counts_as_a_holder_and_is_not_asked_too_often(kafka: str, topics: Any) -> None:
    topic = await topics.create("changelog", 2)
    await produced(kafka, topic, 0, 20)
    changelogs, clock = Changelogs({"bootstrap_servers": kafka}, topic), ManualClock()
    leader = Leader({"a": {0: 15}, "store": {0: 12}}, {"a": {0: 20, 1: 0}})
    cutter = Cutter(changelogs, leader, leader.stored, clock, 1000)
    await cutter.round()
    assert leader.asked == [0]
    clock.advance(1000)
    leader.snapshots["store"] = {0: 11}
    for _ in range(5):
        await cutter.round()
        clock.advance(1000)
    assert leader.asked == [0, 0]  # once more before it was cut: what was there may be gone
    assert await changelogs.bounds(0) == (11, 20)
    assert cutter.statistics().cuts[0].holders == {"a": 15, "store": 11}
    clock.advance(CUT_STORE_MS_MIN)
    await cutter.round()
    assert leader.asked == [0, 0, 0]
    leader.leads = False
    leader.snapshots = {"a": {0: 20}, "store": {0: 20}}
    clock.advance(CUT_STORE_MS_MIN)
    await cutter.round()
    assert await changelogs.bounds(0) == (11, 20)
    await changelogs.close()


async def test_what_kafka_refuses_is_told_and_the_next_round_goes_on(kafka: str, topics: Any) -> None:
    missing = Changelogs({"bootstrap_servers": kafka}, "no-such-changelog")
    with pytest.raises(TopicMissing):
        await missing.bounds(0)
    topic = await topics.create("changelog", 2)
    await produced(kafka, topic, 0, 5)
    changelogs, clock = Changelogs({"bootstrap_servers": kafka}, topic), ManualClock()
    with pytest.raises(ProgressLost):
        await changelogs.cut(0, 6)
    await changelogs.close()
    leader = Leader({"a": {0: 9}, "b": {0: 9}}, {"a": {0: 9, 1: 0}, "b": {0: 9, 1: 0}})
    cutter = Cutter(changelogs, leader, leader.stored, clock, 0)
    await cutter.round()
    assert "before 9" in cutter.statistics().reason
    leader.snapshots = {"a": {0: 3}, "b": {0: 3}}
    await cutter.round()
    assert cutter.statistics().reason == ""
    assert await changelogs.bounds(0) == (3, 5)
    await changelogs.close()
