"""kill -9 at random moments, of the node and of its workers, on real Kafka; then everything is counted.

Half of the events are sent while the node is killed again and again, at moments from the first milliseconds of its
start (so in recovery too) to well into its work; half while its workers are. Afterwards a read_committed reader
of the inferences must find exactly one for each trigger, its output what the model gives for the features
that an independent, plain per-event program computes; and every customer's state must be that program's.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness
import numpy as np
import orjson
import workload

sys.path.insert(0, str(harness.ROOT))
from node.kernel.types import Aggregate, EventSchema
from tenants.expression import evaluate_profile
from tenants.features import compile_plan
from tenants.manifest import parse_manifest
from tests.reference import Event, Reference

AIMS = {"kills": ">= 20", "missing": "= 0", "duplicated": "= 0", "state_mismatches": "= 0", "output_mismatches": "= 0"}
EVENTS, EVENTS_QUICK = 100_000, 20_000
KILLS, KILLS_QUICK = 24, 4
LIFE_S = (0.2, 4.0)
"""A node lives this long before it is killed; start-up and recovery take the first second or two of it."""
WORKER_KILLS, WORKER_KILLS_QUICK = 20, 4
WORKER_KILL_EVERY_S = 0.7
SEED = 7
FINISH_S_MAX = 240.0
TOPIC, APPLICATION = "events", "chaos"
SCHEMA = EventSchema(workload.TYPES, {"amount": "number"})
Trigger = tuple[str, int, int]
"""Model, partition, offset."""


# --- what must come out ---------------------------------------------------------------------------------------------


class Expected:
    """Every trigger with its model's input, and every customer's aggregates, by the plain program."""

    def __init__(self, directory: Path) -> None:
        self.models = {f"{tenant}/{name}": event for tenant, name, event, _ in workload.MODELS}
        pairs = []
        for name in self.models:
            tenant, _, model = name.partition("/")
            text = (directory / f"{name}.toml").read_bytes()
            manifest = parse_manifest(f"{name}.toml", tenant, model, text, SCHEMA)
            pairs.append((manifest.version("0" * 64), manifest))
        self.aggregates = compile_plan(pairs, SCHEMA).aggregates
        self.features = list(workload.FEATURES)
        self.program = Reference({})
        self.program.ask(sorted({*self.aggregates, *evaluate_profile(SCHEMA).values()}))
        self.rows: dict[Trigger, list[float]] = {}
        self.customers: dict[str, int] = {}
        """Time of each customer's newest event."""

    def see(self, partition: int, offset: int, value: bytes) -> None:
        found = orjson.loads(value)
        event = Event(found["customer"], found["type"], found["time"], {"amount": found.get("amount")})
        values = self.program.see(event)
        self.customers[event.customer] = max(event.time_ms, self.customers.get(event.customer, 0))
        for model, wanted in self.models.items():
            if wanted == event.type:
                self.rows[model, partition, offset] = [feature(name, values) for name in self.features]

    def outputs(self, directory: Path) -> dict[Trigger, float]:
        import joblib

        found: dict[Trigger, float] = {}
        for name in self.models:
            model = joblib.load(directory / f"{name}.joblib")
            triggers = [trigger for trigger in self.rows if trigger[0] == name]
            scores = model.predict_proba(np.array([self.rows[trigger] for trigger in triggers]))[:, -1]
            found.update(zip(triggers, scores.tolist(), strict=True))
        return found


_ASKED = {
    "searches_1h": ("count", "search", "", 3_600_000),
    "carts_1d": ("count", "add_to_cart", "", 86_400_000),
    "transactions_30d": ("count", "transaction", "", 30 * 86_400_000),
    "spend_1h": ("sum", "transaction", "amount", 3_600_000),
    "spend_mean_1h": ("mean", "transaction", "amount", 3_600_000),
    "spend_max_1h": ("max", "transaction", "amount", 3_600_000),
    "spend_30d": ("sum", "transaction", "amount", 30 * 86_400_000),
    "spend_mean_30d": ("mean", "transaction", "amount", 30 * 86_400_000),
    "spend_max_30d": ("max", "transaction", "amount", 30 * 86_400_000),
    "since_transaction": ("since", "transaction", "", 0),
}


def feature(name: str, values: Mapping[Aggregate, float]) -> float:
    """What the manifest's expression of this name means, by hand: an aggregate, 0 where it is missing."""
    value = values[Aggregate(*_ASKED[name])]  # type: ignore[arg-type]
    return 0.0 if math.isnan(value) else value


# --- what did come out ----------------------------------------------------------------------------------------------


async def records(address: str, topic: str, partition: int) -> list[Any]:
    """All committed records of a partition."""
    from aiokafka import AIOKafkaConsumer, TopicPartition

    place = TopicPartition(topic, partition)
    consumer = AIOKafkaConsumer(bootstrap_servers=address, isolation_level="read_committed", auto_offset_reset="none")
    await consumer.start()
    try:
        end = (await consumer.end_offsets([place]))[place]
        consumer.assign([place])
        consumer.seek(place, 0)
        found: list[Any] = []
        async with asyncio.timeout(FINISH_S_MAX):
            while await consumer.position(place) < end:
                found += (await consumer.getmany(place, timeout_ms=200)).get(place, [])
        return found
    finally:
        await consumer.stop()


async def all_records(address: str, topic: str) -> Iterator[Any]:
    parts = [await records(address, topic, partition) for partition in range(workload.PARTITIONS)]
    return (record for part in parts for record in part)


def state_mismatches(url: str, expected: Expected, customers: Collection[str] | None = None) -> tuple[int, list[str]]:
    """Of these customers or all: those whose aggregates, as of their newest event, are not the plain program's.

    With some examples.
    """
    examples: list[str] = []

    def differs(customer: str) -> bool:
        with urllib.request.urlopen(f"{url}/v1/customers/{customer}?at=last", timeout=30) as answer:
            found = json.load(answer)["aggregates"]
        at_ms = expected.customers[customer]
        for aggregate in expected.aggregates:
            wanted = expected.program.read(aggregate, customer, at_ms)
            got = found[str(aggregate)]
            if not (got == wanted or (got is None and math.isnan(wanted))):
                examples.append(f"{customer} {aggregate}: {got} instead of {wanted}")
                return True
        return False

    with ThreadPoolExecutor(4) as threads:
        return sum(threads.map(differs, expected.customers if customers is None else customers)), examples[:5]


# --- the run --------------------------------------------------------------------------------------------------------


class Killer:
    def __init__(self, node: harness.Node) -> None:
        self._node = node
        self._random = random.Random(SEED)
        self.kills = self.worker_kills = 0

    def kill_nodes(self, kills: int) -> None:
        """Start the node, let it live a random time, kill it; in the end start it once more."""
        for _ in range(kills):
            self._node.start(wait_s_max=0)
            time.sleep(self._random.uniform(*LIFE_S))
            self._node.kill()
            self.kills += 1
        self._node.start()

    def kill_workers(self, kills: int) -> None:
        """A random process below the warm server at a time; never that itself, which would take all along."""
        deadline = time.monotonic() + FINISH_S_MAX
        while self.worker_kills < kills and time.monotonic() < deadline:
            time.sleep(self._random.uniform(0, 2 * WORKER_KILL_EVERY_S))
            workers = [worker for server in _children(self._node.pid) for worker in _children(server)]
            if workers:
                os.kill(self._random.choice(workers), signal.SIGKILL)
                self.worker_kills += 1


def _children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(") ")[2].split()[1])
            except OSError:
                continue
            if parent == pid:
                found.append(int(entry.name))
    return found


def _wait_for_all(node: harness.Node, events: int) -> None:
    deadline = time.monotonic() + FINISH_S_MAX
    while True:
        if time.monotonic() > deadline:
            raise RuntimeError(f"not finished within {FINISH_S_MAX} s; the node's log ends:\n{node.log_tail()}")
        try:
            with urllib.request.urlopen(f"{node.url}/v1/status", timeout=10) as answer:
                partitions = json.load(answer)["partitions"]
        except OSError:
            continue
        done = sum(partition["counters"].get("events", 0) for partition in partitions)
        behind = sum(model["rows"] for partition in partitions for model in partition["backlog"].values())
        if done >= events and not behind:
            return
        time.sleep(0.2)


def main(quick: bool) -> harness.Result:
    events, kills, worker_kills = (
        (EVENTS_QUICK, KILLS_QUICK, WORKER_KILLS_QUICK) if quick else (EVENTS, KILLS, WORKER_KILLS)
    )
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        folder, port = Path(name), harness.free_port()
        workload.models(folder / "tenants")
        with harness.broker(folder / "kafka") as broker:
            asyncio.run(workload.create_topic(broker.address, TOPIC))
            settings: dict[str, dict[str, object]] = {"state": {"flush_interval_s": 1}, "cycle": {"events_max": 512}}
            config = workload.config(folder / "node.toml", broker.address, TOPIC, port, APPLICATION, settings)
            node = harness.Node(config, port)
            try:
                return _run(folder, broker, node, events, kills, worker_kills)
            finally:
                node.kill()


def _run(
    folder: Path, broker: harness.Broker, node: harness.Node, events: int, kills: int, worker_kills: int
) -> harness.Result:
    killer = Killer(node)
    chunk = next(iter(workload.generate(events, seed=SEED)))
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(_send, broker.address, chunk, slice(0, events // 2), sum(LIFE_S) / 2 * kills)
        killer.kill_nodes(kills)
        sending.result()
        seconds = worker_kills * WORKER_KILL_EVERY_S
        sending = thread.submit(_send, broker.address, chunk, slice(events // 2, events), seconds)
        killer.kill_workers(worker_kills)
        sending.result()
    _wait_for_all(node, events)
    expected = Expected(folder / "tenants")
    for record in asyncio.run(all_records(broker.address, TOPIC)):
        expected.see(record.partition, record.offset, record.value)
    mismatches, examples = state_mismatches(node.url, expected)
    node.stop()
    found: Counter[Trigger] = Counter()
    wrong = 0
    outputs = expected.outputs(folder / "tenants")
    for record in asyncio.run(all_records(broker.address, f"{APPLICATION}.inferences")):
        inference = orjson.loads(record.value)
        trigger = (f"{inference['tenant']}/{inference['model']}", inference["partition"], inference["offset"])
        found[trigger] += 1
        wrong += not math.isclose(inference["outputs"]["score"], outputs.get(trigger, math.nan), rel_tol=1e-9)
    letters = sum(1 for _ in asyncio.run(all_records(broker.address, f"{APPLICATION}.dead-letters")))
    return harness.Result(
        {
            "kills": killer.kills,
            "missing": len(outputs.keys() - found.keys()),
            "duplicated": sum(count - 1 for count in found.values()) + len(found.keys() - outputs.keys()),
            "state_mismatches": mismatches,
            "output_mismatches": wrong,
        },
        {
            "worker_kills": killer.worker_kills,
            "events": events,
            "triggers": len(outputs),
            "inferences": sum(found.values()),
            "dead_letters": letters,
            "customers": len(expected.customers),
            "examples": examples,
        },
    )


def _send(address: str, events: workload.Events, part: slice, seconds: float) -> None:
    """The events of `part`, evenly over the time."""

    async def send() -> None:
        pieces = max(1, int(seconds * 5))
        bounds = np.linspace(part.start, part.stop, pieces + 1).astype(int).tolist()
        for start, stop in itertools.pairwise(bounds):
            at = slice(start, stop)
            piece = workload.Events(events.values[at], events.customers[at], events.types[at], events.times_ms[at])
            await workload.produce(address, TOPIC, workload.PARTITIONS, [piece])
            await asyncio.sleep(0.2)

    asyncio.run(send())
