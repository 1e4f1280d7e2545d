"""From the moment an event is made until its inference is in a read_committed reader's hands.

5,000 events a second, in ticks of 2 ms; every inference of every event counts. The reader and the producer share a
process, so its own load is part of the figure.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import numpy as np
import orjson
import throughput
import uvloop
import workload

AIMS = {"p99_ms": "<= 50"}
RATE_PER_S = 5_000
TICK_S = 0.002
WARM_S, SECONDS, SECONDS_QUICK = 25.0, 60.0, 15.0
COMMIT_INTERVAL_MS = 15
DEADLINE_MS = 60
DRAIN_S_MAX = 20.0


class Stream:
    """Makes events at the rate, and knows when each (partition, offset) was made.

    One batch a partition is on its way at a time; what comes meanwhile waits for it, and that is part of the latency.
    """

    def __init__(self, address: str, rate_per_s: int = RATE_PER_S) -> None:
        self._address = address
        self._rate = rate_per_s
        self._waiting: list[list[tuple[bytes, bytes, int, float]]] = [[] for _ in range(workload.PARTITIONS)]
        self._more = [asyncio.Event() for _ in range(workload.PARTITIONS)]
        self._done = False
        self.sent: dict[tuple[int, int], float] = {}
        self.expected = 0

    async def run(self, seconds: float) -> None:
        from aiokafka import AIOKafkaProducer

        producer = AIOKafkaProducer(bootstrap_servers=self._address, acks="all", max_batch_size=1 << 20)
        await producer.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                for partition in range(workload.PARTITIONS):
                    tasks.create_task(self._send(producer, partition))
                await self._make(seconds)
        finally:
            await producer.stop()

    async def _make(self, seconds: float) -> None:
        random = np.random.default_rng(workload.SEED)
        cumulative = np.cumsum(np.arange(1, workload.CUSTOMERS + 1) ** -workload.ZIPF_EXPONENT)
        started = time.monotonic()
        count = 0
        while (now := time.monotonic()) - started < seconds:
            due = int((now - started) * self._rate) - count
            if due > 0:
                ranks = np.searchsorted(cumulative, random.random(due) * cumulative[-1])
                events = workload.formatted(random, ranks, np.full(due, time.time_ns() // 1_000_000))
                count += due
                for customer, kind, value in zip(ranks.tolist(), events.types.tolist(), events.values, strict=True):
                    partition = workload.partition_of(customer)
                    # Inferences of an event: search 0, add_to_cart 1, transaction 2, as numbered.
                    self._waiting[partition].append((workload.customer_key(customer), value, kind, now))
                    self._more[partition].set()
            await asyncio.sleep(max(0.0, TICK_S - (time.monotonic() - now)))
        self._done = True
        for more in self._more:
            more.set()

    async def _send(self, producer: Any, partition: int) -> None:
        while True:
            await self._more[partition].wait()
            self._more[partition].clear()
            events, self._waiting[partition] = self._waiting[partition], []
            if not events and self._done:
                return
            batch = producer.create_batch()
            for key, value, _, _ in events:
                assert batch.append(key=key, value=value, timestamp=None) is not None, "the batch is full"
            acknowledged = await (await producer.send_batch(batch, "events", partition=partition))
            for place, (_, _, kind, made) in enumerate(events):
                self.sent[partition, acknowledged.offset + place] = made
                self.expected += kind
            if self._done:
                self._more[partition].set()


class Reader:
    """When each inference arrived, by (partition, offset) of its event."""

    def __init__(self, address: str, topic: str) -> None:
        self._address = address
        self._topic = topic
        self.arrived: list[tuple[int, int, float]] = []
        self.more = asyncio.Event()

    def taken(self, value: bytes) -> bool:
        """Whether the record is looked at."""
        return True

    async def run(self) -> None:
        from aiokafka import AIOKafkaConsumer, TopicPartition

        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._address, isolation_level="read_committed", auto_offset_reset="earliest"
        )
        await consumer.start()
        consumer.assign([TopicPartition(self._topic, number) for number in range(workload.PARTITIONS)])
        try:
            while True:
                polled = await consumer.getmany(timeout_ms=100)
                now = time.monotonic()
                for records in polled.values():
                    for record in records:
                        if not self.taken(record.value):
                            continue
                        inference = orjson.loads(record.value)
                        self.arrived.append((inference["partition"], inference["offset"], now))
                    self.more.set()
        finally:
            await consumer.stop()


def latencies(sent: Mapping[tuple[int, int], float], reader: Reader, after: float) -> np.ndarray:
    return np.array(
        [
            (arrived - sent[partition, offset]) * 1000
            for partition, offset, arrived in reader.arrived
            if sent[partition, offset] >= after
        ]
    )


async def _measure(address: str, seconds: float) -> dict[str, float]:
    stream, reader = Stream(address), Reader(address, "latency.inferences")
    reading = asyncio.ensure_future(reader.run())
    started = time.monotonic()
    try:
        await stream.run(WARM_S + seconds)
        async with asyncio.timeout(DRAIN_S_MAX):
            while len(reader.arrived) < stream.expected:
                reader.more.clear()
                await reader.more.wait()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    found = latencies(stream.sent, reader, started + WARM_S)
    p50, p99, p999 = np.percentile(found, [50, 99, 99.9])
    return {
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
        "p99_9_ms": round(float(p999), 2),
        "max_ms": round(float(found.max()), 2),
        "inferences": len(found),
        "events_per_s": round(len(stream.sent) / (WARM_S + seconds)),
    }


def main(quick: bool) -> harness.Result:
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        folder, port = Path(name), harness.free_port()
        workload.models(folder / "tenants")
        with harness.broker(folder / "kafka") as broker:
            asyncio.run(workload.create_topic(broker.address, "events"))
            cycle: dict[str, object] = {
                "commit_interval_ms": COMMIT_INTERVAL_MS,
                "wait_ms": 10,
                "inference_deadline_ms": DEADLINE_MS,
            }
            config = workload.config(
                folder / "node.toml",
                broker.address,
                "events",
                port,
                application="latency",
                settings={"cycle": cycle, "tenants": {"directory": "tenants", "workers_parallel": 2}},
            )
            with harness.running_node(config, port) as node:
                before = node.cpu()
                found = uvloop.run(_measure(broker.address, SECONDS_QUICK if quick else SECONDS))
                cpu, partitions = node.cpu() - before, throughput.status(node.url)["partitions"]
    commits = sum(partition["counters"]["commits"] for partition in partitions)
    steps = {
        step: round(sum(partition["step_seconds"][step] for partition in partitions) * 1000 / commits, 3)
        for step in partitions[0]["step_seconds"]
    }
    detail = {
        **found,
        **cycle,
        "commits": commits,
        "step_ms_per_commit": steps,
        "node_cpu_s": round(cpu.own_s, 2),
        "workers_cpu_s": round(cpu.below_s, 2),
    }
    return harness.Result({"p99_ms": found["p99_ms"]}, detail)
