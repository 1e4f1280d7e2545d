"""A light tenant on a real node, from its event in Kafka to its inference read: alone, and beside nine neighbours.

The latency counts from the moment an event is made to the moment a read_committed reader has its inference; reader and
producer share a process, so its own load is part of the figure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import latency
import neighbours
import numpy as np
import shares
import throughput
import workload

LIGHT_PER_S = 100.0
HEAVY_COSTS_S = (0.2e-3, 0.3e-3, 0.5e-3, 0.7e-3, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3)
OFFERED_CORES = 1.3
"""Model CPU that all nine neighbours ask for together, of the one core that models have: they are ever more behind."""
BURST_S = 1.0
"""Of the neighbours' work that is there at once when a phase begins."""
BROKEN_PER_S, BROKEN_SHARE = 50.0, 0.1
"""A broken neighbour's events, and how many of them it breaks on."""
TICK_S = 0.002
WARM_S = 3.0
COLD_S = 10.0
"""Of each arm that comes before anything counts: the first seconds of a node and its broker are several times as slow
as later ones (Java compiles the broker's code for as long as the load is new to it), and a baseline taken from them
would hide what neighbours do."""
ROWS_QUEUED_MAX = 4096
DRAIN_S_MAX = 120.0
POLL_S = 0.05
CYCLE: Mapping[str, object] = {
    "commit_interval_ms": latency.COMMIT_INTERVAL_MS,
    "wait_ms": 10,
    "inference_deadline_ms": latency.DEADLINE_MS,
    "start_from": "latest",
}
HEAVY = tuple(f"heavy{number}" for number in range(len(HEAVY_COSTS_S)))
BROKEN = tuple(neighbours.BROKEN)
TYPES = ("light", *HEAVY, *BROKEN)
TOPIC = "events"


def rates(arm: str) -> dict[str, float]:
    """Events a second by type: "alone", "heavy", or the name of a broken neighbour that stands in for the last one."""
    found = {"light": LIGHT_PER_S}
    if arm == "alone":
        return found
    share = OFFERED_CORES / len(HEAVY)
    found |= {name: share / cost for name, cost in zip(HEAVY, HEAVY_COSTS_S, strict=True)}
    if arm in BROKEN:
        del found[HEAVY[-1]]
        found[arm] = BROKEN_PER_S
    return found


def tenants(directory: Path, per_neighbour: float) -> None:
    """Every working tenant's model and manifest, as a watched directory."""
    drop(directory, "light", neighbours.of_cost(0.0, per_neighbour))
    for name, cost in zip(HEAVY, HEAVY_COSTS_S, strict=True):
        drop(directory, name, neighbours.of_cost(cost, per_neighbour))


def drop(directory: Path, name: str, model: Any) -> None:
    import joblib

    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    joblib.dump(model, folder / "score.joblib")
    (folder / "score.toml").write_text(manifest(name))
    (folder / "tenant.toml").write_text(f"rows_queued_max = {ROWS_QUEUED_MAX}\n")


@contextlib.contextmanager
def broken(directory: Path, name: str, number: int) -> Iterator[None]:
    """The broken neighbour is live meanwhile, then deleted: what it has waiting goes with it.

    Each `number` is another version, so that one quarantined in an earlier round is not known yet.
    """
    drop(directory, name, neighbours.BROKEN[name](number))
    status = directory / name / "score.status.json"
    deadline = time.monotonic() + DRAIN_S_MAX
    while not (status.exists() and json.loads(status.read_bytes())["state"] == "live"):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{name} is not live after {DRAIN_S_MAX} s")
        time.sleep(POLL_S)
    try:
        yield
    finally:
        for file in ("score.joblib", "score.toml"):
            (directory / name / file).unlink()


def manifest(event: str) -> str:
    expressions = ("event.amount", f"count({event}, '1h')", f"coalesce(sum({event}.amount, '1d'), 0)")
    lines = [f'on = ["{event}"]', 'output = "score"', 'method = "predict"', "[features]"]
    lines += [f'{name} = "{text}"' for name, text in zip(neighbours.COLUMNS, expressions, strict=True)]
    return "\n".join(lines) + "\n"


def configured(folder: Path, broker: str, port: int, application: str, tenants: str) -> Path:
    settings: dict[str, dict[str, object]] = {
        "cycle": dict(CYCLE),
        "events": {"types": list(TYPES)},
        "tenants": {
            "directory": f"../{tenants}",
            "workers_parallel": 1,
            "allow_globals": [f"neighbours.{kind.__name__}" for kind in neighbours.BROKEN.values()],
        },
    }
    return workload.config(folder / "node.toml", broker, TOPIC, port, application, settings)


class Load(latency.Stream):
    """Events of several types at their rates, evenly spaced, after a burst of the neighbours'."""

    def __init__(self, address: str, per_s: Mapping[str, float]) -> None:
        super().__init__(address)
        self._per_s = per_s
        self.made = 0

    async def _make(self, seconds: float) -> None:
        random = np.random.default_rng(workload.SEED)
        made = dict.fromkeys(self._per_s, 0)
        started = time.monotonic()
        while (now := time.monotonic()) - started < seconds:
            for name, rate in self._per_s.items():
                elapsed = now - started + (0.0 if name == "light" or name in BROKEN else BURST_S)
                for _ in range(int(elapsed * rate) - made[name]):
                    made[name] += 1
                    self._add(random, name, now)
            await asyncio.sleep(max(0.0, TICK_S - (time.monotonic() - now)))
        self.made = sum(made.values())
        self._done = True
        for more in self._more:
            more.set()

    def _add(self, random: np.random.Generator, name: str, now: float) -> None:
        customer = int(random.integers(workload.CUSTOMERS))
        breaks = name in BROKEN and random.random() < BROKEN_SHARE
        amount = neighbours.TRIGGER if breaks else round(float(random.random()), 3)
        event = b'{"type":"%s","customer":"c%05d","time":%d,"channel":"web","sku":"sku-%05d","amount":%.3f,"items":3}'
        value = event % (name.encode(), customer, time.time_ns() // 1_000_000, customer, amount)
        partition = workload.partition_of(customer)
        self._waiting[partition].append((workload.customer_key(customer), value, int(name == "light"), now))
        self._more[partition].set()


class Reader:
    """When each of the light tenant's inferences arrived, by (partition, offset) of its event."""

    def __init__(self, address: str, topic: str) -> None:
        self._address = address
        self._topic = topic
        self.arrived: dict[tuple[int, int], float] = {}
        self.others = 0
        self.more = asyncio.Event()
        self.ready = asyncio.Event()

    async def run(self) -> None:
        from aiokafka import AIOKafkaConsumer, TopicPartition

        consumer = AIOKafkaConsumer(bootstrap_servers=self._address, isolation_level="read_committed")
        await consumer.start()
        places = [TopicPartition(self._topic, number) for number in range(workload.PARTITIONS)]
        consumer.assign(places)
        await consumer.seek_to_end(*places)
        self.ready.set()
        try:
            while True:
                polled = await consumer.getmany(timeout_ms=100)
                now = time.monotonic()
                for records in polled.values():
                    self._take([record.value for record in records], now)
        finally:
            await consumer.stop()

    def _take(self, values: Sequence[bytes], now: float) -> None:
        for value in values:
            if b'"type":"light"' in value:
                inference = json.loads(value)
                self.arrived.setdefault((inference["partition"], inference["offset"]), now)
            else:
                self.others += 1
        self.more.set()


async def measured(broker: str, topic: str, arm: str, seconds: float) -> dict[str, Any]:
    """One phase: the events of the arm for so long, and the light tenant's latencies without the first moments."""
    load, reader = Load(broker, rates(arm)), Reader(broker, topic)
    reading = asyncio.ensure_future(reader.run())
    try:
        await asyncio.wait(
            [reading, ready := asyncio.ensure_future(reader.ready.wait())], return_when="FIRST_COMPLETED"
        )
        ready.cancel()
        started = time.monotonic()
        await load.run(WARM_S + seconds)
        others = reader.others
        async with asyncio.timeout(DRAIN_S_MAX):
            while len(reader.arrived) < load.expected:
                reader.more.clear()
                await reader.more.wait()
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    found = [
        (arrived - load.sent[place]) * 1000
        for place, arrived in reader.arrived.items()
        if load.sent[place] >= started + WARM_S
    ]
    return {
        "p50_ms": round(shares.percentile(found, 50), 2),
        "p99_ms": round(shares.percentile(found, 99), 2),
        "max_ms": round(max(found), 2),
        "inferences": len(found),
        "neighbours_answered_per_s": round(others / (WARM_S + seconds)),
        "neighbours_made_per_s": round((load.made - load.expected) / (WARM_S + seconds)),
    }


def drained(url: str) -> None:
    """Wait until nobody has anything left."""
    deadline = time.monotonic() + DRAIN_S_MAX
    while behind := [model for partition in throughput.status(url)["partitions"] for model in partition["backlog"]]:
        if time.monotonic() > deadline:
            raise RuntimeError(f"still behind after {DRAIN_S_MAX} s: {', '.join(sorted(set(behind)))}")
        time.sleep(POLL_S)


@contextlib.contextmanager
def node(
    folder: Path, broker: str, application: str, tenants: str = "tenants", program: Sequence[str] = ("-m", "node")
) -> Iterator[harness.Node]:
    """A fresh node of that application in `folder`, beside the folder of its tenants."""
    port = harness.free_port()
    config = configured(folder / application, broker, port, application, tenants)
    started = harness.Node(config, port, program=program)
    try:
        started.start()
        yield started
        started.stop()
    finally:
        started.kill()
