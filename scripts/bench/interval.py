"""What an interval run over a million customers costs the models that run by event.

The standard stream of `latency` at RATE_PER_S, on a store of CUSTOMERS: first alone, then beside a model that runs by
interval over all customers, one run after the other, then alone again. The ratio is that of the 99th percentiles, of
the middle part to the mean of the two others. Reader and producer share a process, so its own load is part of both.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import joblib
import latency
import numpy as np
import throughput
import uvloop
import workload

AIMS = {"event_p99_ratio": "<= 1.25"}
CUSTOMERS, CUSTOMERS_QUICK = 1_000_000, 40_000
PART_S, PART_S_QUICK = 60.0, 10.0
WARM_S = 20.0
RATE_PER_S = 2_000
LOAD_S_MAX = 240.0
RUN_S_MAX = 180.0
LOOK_S = 0.5
BATCH_EVENTS = 5_000
MODEL = "lists/reorder"
EVENT = b'{"type":"search","customer":"i%07d","time":%d,"channel":"web","query":"organic oat milk %d","page":1}'


async def load(address: str, count: int) -> None:
    """One event of each of `count` customers, now."""
    from aiokafka import AIOKafkaProducer

    producer = AIOKafkaProducer(
        bootstrap_servers=address, acks="all", compression_type="lz4", max_batch_size=1 << 20, linger_ms=5
    )
    await producer.start()
    try:
        for first in range(0, count, BATCH_EVENTS):
            numbers = range(first, min(count, first + BATCH_EVENTS))
            batches = [producer.create_batch() for _ in range(workload.PARTITIONS)]
            now_ms = time.time_ns() // 1_000_000
            for number in numbers:
                key = b"i%07d" % number
                batch = batches[number % workload.PARTITIONS]
                assert batch.append(key=key, value=EVENT % (number, now_ms, number), timestamp=None) is not None
            sent = [
                await producer.send_batch(batch, "events", partition=partition)
                for partition, batch in enumerate(batches)
                if batch.record_count()
            ]
            await asyncio.gather(*sent)
    finally:
        await producer.stop()


def drop_model(directory: Path) -> None:
    lines = ['every = "1s"', "all = true", 'output = "score"', 'method = "predict_proba"', "[features]"]
    text = "\n".join([*lines, *(f'{name} = "{expression}"' for name, expression in workload.FEATURES.items())]) + "\n"
    place = directory / MODEL
    place.parent.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".toml").write_text(text)
    joblib.dump(workload.trained("logistic", np.random.default_rng(workload.SEED)), place.with_suffix(".joblib"))


def remove_model(directory: Path) -> None:
    for suffix in (".toml", ".joblib"):
        (directory / MODEL).with_suffix(suffix).unlink()


def counter(url: str, name: str) -> int:
    return sum(int(one["counters"].get(name, 0)) for one in throughput.status(url)["partitions"])


async def until(url: str, name: str, least: int, wait_s_max: float) -> None:
    async with asyncio.timeout(wait_s_max):
        while await asyncio.to_thread(counter, url, name) < least:  # noqa: ASYNC110 (another process counts)
            await asyncio.sleep(LOOK_S)


class Reader(latency.Reader):
    """Passes over the inferences of interval runs."""

    def taken(self, value: bytes) -> bool:
        return b'"interval":' not in value


async def measure(address: str, url: str, models: Path, count: int, part_s: float) -> dict[str, Any]:
    await load(address, count)
    await until(url, "events", count, LOAD_S_MAX)
    stream, reader = latency.Stream(address, RATE_PER_S), Reader(address, "interval.inferences")
    reading = asyncio.ensure_future(reader.run())
    parts: dict[str, tuple[float, float]] = {}

    async def part(name: str, seconds: float) -> None:
        started = time.monotonic()
        await asyncio.sleep(seconds)
        parts[name] = (started, time.monotonic())

    streaming = asyncio.ensure_future(stream.run(WARM_S * 3 + 3 * part_s + RUN_S_MAX))
    try:
        await asyncio.sleep(WARM_S)
        await part("before", part_s)
        await asyncio.to_thread(drop_model, models)
        await until(url, f"inferences {MODEL}", 1, RUN_S_MAX)
        rows = await asyncio.to_thread(counter, url, f"inferences {MODEL}")
        await part("beside", part_s)
        rows = await asyncio.to_thread(counter, url, f"inferences {MODEL}") - rows
        began, ended = parts["beside"]
        await until(url, f"intervals {MODEL}", workload.PARTITIONS, RUN_S_MAX)
        late = await asyncio.to_thread(counter, url, f"intervals_late {MODEL}")
        await asyncio.to_thread(remove_model, models)
        await asyncio.sleep(WARM_S / 2)
        await part("after", part_s)
    finally:
        streaming.cancel()
        await asyncio.gather(streaming, return_exceptions=True)
        await asyncio.sleep(LOOK_S)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    return {
        **{name: percentiles(stream, reader, *span) for name, span in parts.items()},
        "rows_per_s": round(rows / (ended - began)),
        "runs_late": late,
    }


def percentiles(stream: latency.Stream, reader: latency.Reader, began: float, ended: float) -> dict[str, float]:
    found = [
        (arrived - made) * 1000
        for partition, offset, arrived in reader.arrived
        if (made := stream.sent.get((partition, offset), -1.0)) >= began and made < ended
    ]
    p50, p99 = np.percentile(found, [50, 99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2), "inferences": len(found)}


def main(quick: bool) -> harness.Result:
    count = CUSTOMERS_QUICK if quick else CUSTOMERS
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        folder, port = Path(name), harness.free_port()
        workload.models(folder / "tenants")
        with harness.broker(folder / "kafka") as broker:
            asyncio.run(workload.create_topic(broker.address, "events"))
            config = workload.config(
                folder / "node.toml",
                broker.address,
                "events",
                port,
                application="interval",
                settings={
                    "cycle": {
                        "commit_interval_ms": latency.COMMIT_INTERVAL_MS,
                        "wait_ms": 10,
                        "inference_deadline_ms": latency.DEADLINE_MS,
                    },
                    "tenants": {"directory": "tenants", "workers_parallel": 2},
                },
            )
            with harness.running_node(config, port) as node:
                part_s = PART_S_QUICK if quick else PART_S
                found = uvloop.run(measure(broker.address, node.url, folder / "tenants", count, part_s))
                steps = throughput.status(node.url)["partitions"]
    alone_ms = (found["before"]["p99_ms"] + found["after"]["p99_ms"]) / 2
    ratio = round(found["beside"]["p99_ms"] / alone_ms, 3)
    detail = {
        **found,
        "customers": count,
        "events_per_s": RATE_PER_S,
        "commits": sum(one["counters"]["commits"] for one in steps),
    }
    return harness.Result({"event_p99_ratio": ratio}, detail)
