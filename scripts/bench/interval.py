"""What an interval run over a million customers costs the models that run by event.

The standard stream of `latency` at RATE_PER_S, on a store of CUSTOMERS: in turn alone and beside a model that runs by
interval over all customers, and is taken away and dropped in again, so that its run goes on where it was. The ratio is
the median over the parts beside it, of the 99th percentile to the mean of those of the parts before and after. Then the
run is left to come to its end. Reader and producer share a process, so its own load is part of all.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
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
PART_S, PART_S_QUICK = 30.0, 5.0
PARTS, PARTS_QUICK = 5, 2
"""Beside the model; one more alone."""
WARM_S = 40.0
SETTLE_S = 5.0
"""After the model came or went."""
RATE_PER_S = 2_000
LOAD_S_MAX = 240.0
RUN_S_MAX = 600.0
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


async def measure(address: str, url: str, models: Path, count: int, part_s: float, parts: int) -> dict[str, Any]:
    await load(address, count)
    await until(url, "events", count, LOAD_S_MAX)
    stream, reader = latency.Stream(address, RATE_PER_S), Reader(address, "interval.inferences")
    reading = asyncio.ensure_future(reader.run())
    alone: list[tuple[float, float]] = []
    beside: list[tuple[float, float]] = []
    rows = 0

    async def ran() -> int:
        return await asyncio.to_thread(counter, url, f"inferences {MODEL}")

    async def part(kind: list[tuple[float, float]]) -> None:
        await asyncio.sleep(SETTLE_S)
        started = time.monotonic()
        await asyncio.sleep(part_s)
        kind.append((started, time.monotonic()))

    async def dropped_in() -> None:
        before = await ran()
        await asyncio.to_thread(drop_model, models)
        await until(url, f"inferences {MODEL}", before + 1, RUN_S_MAX)

    streaming = asyncio.ensure_future(stream.run(WARM_S + 2 * (parts + 1) * (part_s + 4 * SETTLE_S) + 2 * RUN_S_MAX))
    try:
        await asyncio.sleep(WARM_S)
        await part(alone)
        for _ in range(parts):
            await dropped_in()
            before = await ran()
            began = time.monotonic()
            await part(beside)
            rows += round((await ran() - before) * part_s / (time.monotonic() - began))
            await asyncio.to_thread(remove_model, models)
            await part(alone)
        await dropped_in()
        await until(url, f"intervals {MODEL}", workload.PARTITIONS, RUN_S_MAX)
        late = await asyncio.to_thread(counter, url, f"intervals_late {MODEL}")
    finally:
        streaming.cancel()
        await asyncio.gather(streaming, return_exceptions=True)
        await asyncio.sleep(LOOK_S)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    found = {
        "alone": [percentiles(stream, reader, *span) for span in alone],
        "beside": [percentiles(stream, reader, *span) for span in beside],
    }
    return {**found, "rows_per_s": round(rows / (part_s * parts)), "runs_late": late}


def ratios(alone: Sequence[float], beside: Sequence[float]) -> list[float]:
    """Of each part to the mean of the two around it; `alone` has one more."""
    around = [(before + after) / 2 for before, after in itertools.pairwise(alone)]
    return [one / mean for one, mean in zip(beside, around, strict=True)]


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
                part_s, parts = (PART_S_QUICK, PARTS_QUICK) if quick else (PART_S, PARTS)
                found = uvloop.run(measure(broker.address, node.url, folder / "tenants", count, part_s, parts))
                steps = throughput.status(node.url)["partitions"]
    p99_ms = {kind: [part["p99_ms"] for part in found[kind]] for kind in ("alone", "beside")}
    each = [round(ratio, 3) for ratio in ratios(p99_ms["alone"], p99_ms["beside"])]
    detail = {
        **found,
        "event_p99_ratios": each,
        "customers": count,
        "events_per_s": RATE_PER_S,
        "commits": sum(one["counters"]["commits"] for one in steps),
    }
    return harness.Result({"event_p99_ratio": statistics.median(each)}, detail)
