"""Whether tenants notice each other: shares by weight, a light tenant's latency beside heavy and broken ones, and what
fairness costs.

- `jain_min`: ten tenants that always have work, of weights 1 to 5 and costs of 1 us to 5 ms a row; Jain's index of CPU
  time by weight over every window of 10 s, as the kernel counts it (crowd.py).
- `light_p99_ratio`: a light tenant's p99 from event to inference on a real node beside nine heavy neighbours, to its
  p99 alone; the same with one of the nine that crashes, sleeps or takes all memory; the worst of the four. Medians of
  rounds, each of which runs all arms (light_tenant.py). Beside it the node with one queue, first come first served,
  and Kafka Streams that calls the models in a chain; and a node that takes the same events and has no other tenant:
  what of the ratio is due to there being twenty times the events, not to the neighbours' models.
- `goodput_ratio`: the same rows of ten backlogged tenants, rows a second with the scheduler to first come first served.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import kafka_streams
import light_tenant
import neighbours
import shares
import uvloop
import workload

AIMS = {"jain_min": ">= 0.99", "light_p99_ratio": "<= 1.25", "goodput_ratio": ">= 0.95"}
FIRST_COME = Path(__file__).with_name("first_come.py")


@dataclass(frozen=True, slots=True)
class Size:
    """How much of each part is run."""

    shares_s: float
    goodput_s: float
    goodput_rounds: int
    rounds: int
    arm_s: float


FULL = Size(shares_s=40.0, goodput_s=8.0, goodput_rounds=3, rounds=3, arm_s=10.0)
QUICK = Size(shares_s=4.0, goodput_s=1.0, goodput_rounds=1, rounds=1, arm_s=0.5)


def main(quick: bool) -> harness.Result:
    size = QUICK if quick else FULL
    sys.path.insert(0, str(harness.ROOT))
    # Workers import the broken models from here, by the names that the node's config allows.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(FIRST_COME.parent), os.environ.get("PYTHONPATH"))))
    import crowd

    per_neighbour = neighbours.seconds_per_neighbour()
    tenants = crowd.made(per_neighbour)
    crowded, goodput = uvloop.run(crowd.measured(tenants, size.shares_s, size.goodput_s, size.goodput_rounds))
    light = _light(per_neighbour, size)
    values = {
        "jain_min": crowded["jain_min"],
        "light_p99_ratio": round(shares.worst(light["p99_ratio"]), 3),
        "goodput_ratio": goodput["ratio"],
    }
    return harness.Result(values, {"shares": crowded, "goodput": goodput, "light": light})


def _light(per_neighbour: float, size: Size) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        folder = Path(name)
        light_tenant.tenants(folder / "tenants", per_neighbour)
        light_tenant.drop(folder / "one-tenant", "light", neighbours.of_cost(0.0, per_neighbour))
        program = kafka_streams.compiled(folder)
        with harness.broker(folder / "kafka") as broker:
            asyncio.run(workload.create_topic(broker.address, light_tenant.TOPIC))
            with light_tenant.node(folder, broker.address, "fair") as node:
                for arm in ("alone", "heavy"):
                    _measured(broker.address, "fair.inferences", arm, light_tenant.COLD_S, "cold")
                light_tenant.drained(node.url)
                rounds = [_round(folder, broker.address, node, number, size.arm_s) for number in range(size.rounds)]
            with light_tenant.node(folder, broker.address, "events-only", tenants="one-tenant"):
                events_only = _pair(broker.address, "events-only.inferences", "events only", size.arm_s)
            with light_tenant.node(folder, broker.address, "first-come", program=(str(FIRST_COME),)):
                first_come = _pair(broker.address, "first-come.inferences", "first come", size.arm_s)
            with _chain(folder, broker.address, program, "streams") as topic:
                streams = _pair(broker.address, topic, "streams", size.arm_s)
    p99 = {arm: [found[arm]["p99_ms"] for found in rounds] for arm in rounds[0]}
    return {
        "p99_ms": p99,
        "p99_ratio": _rounded(shares.median_ratios(p99, "alone")),
        "events_only": events_only,
        "first_come": first_come,
        "streams": streams,
        "events_only_p99_ratio": _pair_ratio(events_only),
        "first_come_p99_ratio": _pair_ratio(first_come),
        "streams_p99_ratio": _pair_ratio(streams),
        "p50_ms": {arm: statistics.median(found[arm]["p50_ms"] for found in rounds) for arm in rounds[0]},
        "rounds": rounds,
        "light_per_s": light_tenant.LIGHT_PER_S,
        "heavy_us_per_row": [cost * 1e6 for cost in light_tenant.HEAVY_COSTS_S],
        "offered_model_cores": light_tenant.OFFERED_CORES,
        "cycle": dict(light_tenant.CYCLE),
        "workers_parallel": 1,
        "streams_threads": 1,
    }


def _rounded(ratios: dict[str, float]) -> dict[str, float]:
    return {arm: round(ratio, 3) for arm, ratio in ratios.items()}


def _round(folder: Path, broker: str, node: harness.Node, number: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Every arm once, each from a node that has nothing left to do."""
    found: dict[str, dict[str, Any]] = {}
    for arm in ("alone", "heavy", *light_tenant.BROKEN):
        neighbour = (
            light_tenant.broken(folder / "tenants", arm, number) if arm in light_tenant.BROKEN else nullcontext()
        )
        with neighbour:
            found[arm] = _measured(broker, "fair.inferences", arm, seconds, f"round {number}")
        light_tenant.drained(node.url)
    return found


def _pair(broker: str, topic: str, name: str, seconds: float) -> dict[str, dict[str, Any]]:
    """What is compared with, once, on a broker that is warm: alone, then beside the heavy neighbours."""
    _measured(broker, topic, "alone", light_tenant.COLD_S, f"{name}, cold")
    return {arm: _measured(broker, topic, arm, seconds, name) for arm in ("alone", "heavy")}


def _pair_ratio(pair: dict[str, dict[str, Any]]) -> float:
    return round(float(pair["heavy"]["p99_ms"]) / float(pair["alone"]["p99_ms"]), 3)


def _measured(broker: str, topic: str, arm: str, seconds: float, what: str) -> dict[str, Any]:
    found = uvloop.run(light_tenant.measured(broker, topic, arm, seconds))
    print(f"{what}, {arm}: {found}", file=sys.stderr)
    return found


@contextmanager
def _chain(folder: Path, broker: str, program: kafka_streams.Program, application: str) -> Iterator[str]:
    """Kafka Streams with one thread, as models have one core on the node; gives the topic of its inferences."""
    topic = f"{application}.inferences"
    asyncio.run(workload.create_topic(broker, topic))
    costs = {"light": 1e-6, **dict(zip(light_tenant.HEAVY, light_tenant.HEAVY_COSTS_S, strict=True))}
    settings: dict[str, object] = {
        "application.id": application,
        "bootstrap.servers": broker,
        "processing.guarantee": "exactly_once_v2",
        "commit.interval.ms": light_tenant.CYCLE["commit_interval_ms"],
        "auto.offset.reset": "latest",
        "num.stream.threads": 1,
        "peer.input": light_tenant.TOPIC,
        "peer.output": topic,
        "peer.costs": ",".join(f"{name}={cost}" for name, cost in costs.items()),
    }
    instance = kafka_streams.Instance(program, folder / application, settings)
    try:
        instance.start()
        kafka_streams.wait_for_all([instance], workload.PARTITIONS, 0, 0, harness.READY_S_MAX)
        yield topic
    finally:
        instance.kill()
