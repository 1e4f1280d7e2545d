"""How many events a second one node takes, exactly once, and what each costs in CPU: node, workers and broker apart.

The events are loaded beforehand; a fresh application reads them all. Runs over the Zipf events and over the
same with one customer sending half of all alternate on one broker; medians are given.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import harness
import workload

AIMS = {"events_per_s": ">= 58000", "node_cpu_us_per_event": "<= 20", "hot_key_cost_ratio": "<= 1.5"}
EVENTS, EVENTS_QUICK = 1_000_000, 100_000
RUNS, RUNS_QUICK = 3, 1
COMMIT_INTERVAL_MS = 100
POLL_S = 0.1
RUN_S_MAX = 300.0


@dataclass(frozen=True, slots=True)
class Run:
    skew: str
    events: int
    seconds: float
    events_per_s: float
    node_cpu_us_per_event: float
    workers_cpu_us_per_event: float
    broker_cpu_us_per_event: float
    inferences: int
    steps_us_per_event: dict[str, float]
    """By step of the cycle, wall time added up over the partitions; poll, trigger and commit mostly wait."""
    commits_per_partition_per_s: float


def status(url: str) -> dict:  # type: ignore[type-arg]
    with urllib.request.urlopen(f"{url}/v1/status", timeout=10) as answer:
        return dict(json.load(answer))


def counted(found: dict, name: str) -> int:  # type: ignore[type-arg]
    return sum(
        count
        for partition in found["partitions"]
        for key, count in partition["counters"].items()
        if key.partition(" ")[0] == name
    )


def measured(node: harness.Node, broker: harness.Broker, skew: str, events: int) -> Run:
    """From the first cycle seen to the last event: its ends are commits, so nothing is half done in it."""
    deadline = time.monotonic() + RUN_S_MAX
    first = status(node.url)
    while not counted(first, "events"):
        _check(deadline, node)
        first = status(node.url)
    started, node_before, broker_before = time.monotonic(), node.cpu(), broker.cpu()
    last = first
    while counted(last, "events") < events:
        _check(deadline, node)
        last = status(node.url)
    seconds = time.monotonic() - started
    node_cpu, broker_cpu = node.cpu() - node_before, broker.cpu() - broker_before
    done = counted(last, "events") - counted(first, "events")
    us = 1e6 / done
    steps = {
        step: sum(partition["step_seconds"][step] for partition in last["partitions"]) * 1e6 / events
        for step in last["partitions"][0]["step_seconds"]
    }
    return Run(
        skew,
        done,
        seconds,
        done / seconds,
        node_cpu.own_s * us,
        node_cpu.below_s * us,
        (broker_cpu.own_s + broker_cpu.below_s) * us,
        counted(last, "inferences"),
        {step: round(value, 2) for step, value in steps.items()},
        (counted(last, "commits") - counted(first, "commits")) / len(last["partitions"]) / seconds,
    )


def _check(deadline: float, node: harness.Node) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError(f"not done within {RUN_S_MAX} s; the node's log ends:\n{node.log_tail()}")
    time.sleep(POLL_S)


def one_run(folder: Path, broker: harness.Broker, skew: workload.Skew, number: int, events: int) -> Run:
    name, port = f"{skew}{number}", harness.free_port()
    config = workload.config(
        folder / "node" / f"{name}.toml",
        broker.address,
        skew,
        port,
        application=name,
        settings={
            "node": {"data_dir": f"data-{name}"},
            "cycle": {"commit_interval_ms": COMMIT_INTERVAL_MS},
            "tenants": {"directory": "tenants"},
        },
    )
    with harness.running_node(config, port) as node:
        run = measured(node, broker, skew, events)
    print(
        f"{name}: {run.events_per_s:,.0f} events/s, node {run.node_cpu_us_per_event:.1f} µs an event", file=sys.stderr
    )
    return run


def main(quick: bool) -> harness.Result:
    events, runs = (EVENTS_QUICK, RUNS_QUICK) if quick else (EVENTS, RUNS)
    skews: tuple[workload.Skew, ...] = ("zipf", "hot")
    results: list[Run] = []
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        folder = Path(name)
        workload.models(folder / "node" / "tenants")
        with harness.broker(folder / "kafka") as broker:
            for skew in skews:
                asyncio.run(_load(broker.address, skew, events))
            for number in range(runs):
                results += [one_run(folder, broker, skew, number, events) for skew in skews]
    middle = {skew: _median([run for run in results if run.skew == skew]) for skew in skews}
    return harness.Result(
        {
            "events_per_s": round(middle["zipf"].events_per_s),
            "node_cpu_us_per_event": round(middle["zipf"].node_cpu_us_per_event, 2),
            "hot_key_cost_ratio": round(middle["hot"].node_cpu_us_per_event / middle["zipf"].node_cpu_us_per_event, 3),
        },
        {"commit_interval_ms": COMMIT_INTERVAL_MS, "runs": [asdict(run) for run in results]},
    )


def _median(runs: list[Run]) -> Run:
    """The run of median throughput, with the median CPU of all."""
    by_rate = sorted(runs, key=lambda run: run.events_per_s)
    run = by_rate[(len(by_rate) - 1) // 2]
    cpu = statistics.median(run.node_cpu_us_per_event for run in runs)
    return Run(**{**asdict(run), "node_cpu_us_per_event": cpu})


async def _load(address: str, skew: workload.Skew, events: int) -> None:
    await workload.create_topic(address, skew)
    await workload.produce(address, skew, workload.PARTITIONS, workload.generate(events, skew))
