"""Events at a steady rate, and a read_committed reader that sees when outputs come again: what failover runs under."""

from __future__ import annotations

import asyncio
import threading
import time
from types import TracebackType
from typing import Any

import numpy as np
import uvloop
import workload

TICK_S = 0.01
BATCH_BYTES_MAX = 1 << 20
STOP_S_MAX = 60.0
LAG_S_MAX = 2.0
"""Further behind than this, the traffic skips what it owes: a bench that is starved must not send a flood later."""


class Traffic:
    """Sends the standard events to `topic` and reads `output`, on a thread of its own, until it is left.

    The output topic must be of LogAppendTime: the broker's time of a record tells who wrote it. An owner that was
    killed has appended nothing since that can be committed, for its commit would have to follow the append.
    """

    def __init__(self, address: str, topic: str, output: str, rate_per_s: int) -> None:
        self._address, self._topic, self._output = address, topic, output
        self._rate = rate_per_s
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._after_ms = 0
        self._seen: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._gaps: dict[int, float] = {}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)
        self.sent = 0
        self.read = 0

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join(STOP_S_MAX)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raises what ended the traffic early."""
        if self._failure is not None:
            raise RuntimeError(f"the traffic ended early: {self._failure!r}") from self._failure

    def watch(self, after_ms: int) -> None:
        """From now on, note for each partition when its first output came that was appended after this Unix time, and
        the longest gap between outputs."""
        with self._changed:
            self._after_ms, self._seen, self._gaps = after_ms, {}, {}

    def gaps(self) -> dict[int, float]:
        """Of each partition, the longest time since `watch` in which the reader saw no output, in seconds."""
        with self._changed:
            return dict(self._gaps)

    def wait(self, partitions: frozenset[int], wait_s_max: float) -> dict[int, float]:
        """Monotonic seconds at which each partition's first watched output was read.

        Raises TimeoutError when one of them has none in time.
        """
        with self._changed:
            done = self._changed.wait_for(lambda: partitions <= self._seen.keys() or self._failure, wait_s_max)
            self.check()
            if not done:
                missing = sorted(partitions - self._seen.keys())
                raise TimeoutError(f"no output of partitions {missing} within {wait_s_max} s")
            return {number: self._seen[number] for number in partitions}

    def _run(self) -> None:
        try:
            uvloop.run(self._serve())
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(self._read())
            await self._send()
            reading.cancel()

    async def _send(self) -> None:
        from aiokafka import AIOKafkaProducer

        producer = AIOKafkaProducer(
            bootstrap_servers=self._address, acks="all", compression_type="lz4", max_batch_size=BATCH_BYTES_MAX
        )
        await producer.start()
        random = np.random.default_rng(workload.SEED)
        cumulative = np.cumsum(np.arange(1, workload.CUSTOMERS + 1) ** -workload.ZIPF_EXPONENT)
        partitions = np.array([workload.partition_of(number) for number in range(workload.CUSTOMERS)])
        started, due = time.monotonic(), 0
        try:
            while not self._stopping.is_set():
                now = time.monotonic()
                count = int((now - started) * self._rate) - due
                due += count
                count = min(count, int(LAG_S_MAX * self._rate))
                ranks = np.searchsorted(cumulative, random.random(count) * cumulative[-1])
                ranks = np.minimum(ranks, workload.CUSTOMERS - 1)
                await self._send_batches(producer, random, ranks, partitions[ranks])
                self.sent += count
                await asyncio.sleep(max(0.0, TICK_S - (time.monotonic() - now)))
        finally:
            async with asyncio.timeout(STOP_S_MAX):
                await producer.stop()

    async def _send_batches(
        self, producer: Any, random: np.random.Generator, ranks: np.ndarray, owners: np.ndarray
    ) -> None:
        events = (
            workload.formatted(random, ranks, np.full(len(ranks), time.time_ns() // 1_000_000)) if len(ranks) else None
        )
        for partition in range(workload.PARTITIONS):
            chosen = np.flatnonzero(owners == partition).tolist()
            if events is None or not chosen:
                continue
            batch = producer.create_batch()
            for index in chosen:
                key = workload.customer_key(int(ranks[index]))
                if batch.append(key=key, value=events.values[index], timestamp=None) is None:
                    raise RuntimeError("a tick's events do not fit into one batch")
            await producer.send_batch(batch, self._topic, partition=partition)

    async def _read(self) -> None:
        from aiokafka import AIOKafkaConsumer, TopicPartition

        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._address, isolation_level="read_committed", auto_offset_reset="latest"
        )
        await consumer.start()
        consumer.assign([TopicPartition(self._output, number) for number in range(workload.PARTITIONS)])
        try:
            while True:
                polled = await consumer.getmany(timeout_ms=100)
                now = time.monotonic()
                with self._changed:
                    for place, records in polled.items():
                        self.read += len(records)
                        number, last = place.partition, self._last.get(place.partition, now)
                        self._gaps[number] = max(self._gaps.get(number, 0.0), now - last)
                        self._last[number] = now
                        # Append times only grow within a partition: the last record tells.
                        if records[-1].timestamp > self._after_ms:
                            self._seen.setdefault(place.partition, now)
                    self._changed.notify_all()
        finally:
            await consumer.stop()
