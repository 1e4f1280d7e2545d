"""What a cluster costs: an idle node's CPU, and what changelog, Raft and standbys add to an event's CPU and bytes.

The same events go to a node on its own, to a cluster of three without standbys, and to one with a standby of each
partition. CPU is of the node processes, their workers' apart, from before the events are sent until every copy has
folded them. Bytes are those of the topics' files on the broker's disk, and of the Raft journals.

The idle cluster is the one with standbys, models live, before it has had an event: the core's share is taken over 30
seconds, and the busiest node's counts, workers included. Takes 4 minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cluster
import harness
import throughput
import workload

AIMS = {"idle_core_pct": "<= 3"}
EVENTS, EVENTS_QUICK = 300_000, 30_000
IDLE_S, IDLE_S_QUICK = 30.0, 5.0
IDLE_RUNS, IDLE_RUNS_QUICK = 3, 1
CALM_S, CALM_S_QUICK = 10.0, 3.0
"""After the cluster has settled and before it counts as idle: imports, trials and first snapshots are over."""
NODES = ("a", "b", "c")
RUN_S_MAX = 300.0
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Setting:
    """One of the ways to run that are compared."""

    name: str
    nodes: int
    standbys: int
    """Of each partition; a single node has no cluster section."""


SETTINGS = (Setting("alone", 1, 0), Setting("cluster", 3, 0), Setting("standby", 3, 1))


@dataclass(frozen=True, slots=True)
class Costs:
    """Of an event; microseconds of CPU of all nodes together, and bytes on the broker's disk."""

    seconds: float
    nodes_cpu_us: float
    workers_cpu_us: float
    broker_cpu_us: float
    changelog_bytes: float
    inferences_bytes: float
    raft_bytes: float
    """Written to the nodes' Raft folders while the events went through, all nodes together."""


# --- measuring ------------------------------------------------------------------------------------------------------


def folder_bytes(folders: Iterable[Path]) -> int:
    """Bytes of all files below; one that goes away meanwhile counts nothing."""
    size = 0
    for folder in folders:
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                size += path.stat().st_size if path.is_file() else 0
    return size


def topic_bytes(logs: Path, topic: str, partitions: int) -> int:
    """Bytes of a topic's records on the broker's disk; index files are left out, they are allocated ahead."""
    files = (path for number in range(partitions) for path in (logs / f"{topic}-{number}").glob("*.log"))
    return sum(path.stat().st_size for path in files)


def idle_shares(nodes: Iterable[harness.Node], seconds: float) -> list[float]:
    """Per cent of a core that each node and its workers use."""
    nodes = list(nodes)
    started, before = time.monotonic(), [node.cpu() for node in nodes]
    time.sleep(seconds)
    spent = [node.cpu() - earlier for node, earlier in zip(nodes, before, strict=True)]
    elapsed = time.monotonic() - started
    return [round(100 * (cpu.own_s + cpu.below_s) / elapsed, 2) for cpu in spent]


def loopback_bytes() -> int:
    """Bytes that went through the loopback device so far: all that nodes and broker say to each other."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    raise RuntimeError("/proc/net/dev has no loopback device")


def costs(
    nodes: Mapping[str, harness.Node],
    broker: harness.Broker,
    folder: Path,
    application: str,
    events: int,
    standbys: int,
) -> Costs:
    """Send the events and wait until all copies have them."""
    logs, rafts = folder / "kafka" / "logs", [node.config.with_name("data") / "raft" for node in nodes.values()]
    started, before, broker_before = time.monotonic(), [node.cpu() for node in nodes.values()], broker.cpu()
    raft_before = folder_bytes(rafts)
    generated = workload.generate(events)
    asyncio.run(workload.produce(broker.address, application, workload.PARTITIONS, generated))
    deadline = started + RUN_S_MAX
    urls = [node.url for node in nodes.values()]
    while events_done(map(throughput.status, urls)) < events or (
        standbys and not folded_by_standbys(cluster.get(f"{urls[0]}/v1/cluster"))
    ):
        if time.monotonic() > deadline:
            tails = "\n".join(node.log_tail(10) for node in nodes.values())
            raise RuntimeError(f"{application}: {events} events not done within {RUN_S_MAX} s; logs end:\n{tails}")
        time.sleep(POLL_S)
    spent = [node.cpu() - earlier for node, earlier in zip(nodes.values(), before, strict=True)]
    broker_cpu = broker.cpu() - broker_before
    us = 1e6 / events
    return Costs(
        round(time.monotonic() - started, 1),
        round(sum(cpu.own_s for cpu in spent) * us, 2),
        round(sum(cpu.below_s for cpu in spent) * us, 2),
        round((broker_cpu.own_s + broker_cpu.below_s) * us, 2),
        round(topic_bytes(logs, f"{application}.changelog", workload.PARTITIONS) / events, 1),
        round(topic_bytes(logs, f"{application}.inferences", workload.PARTITIONS) / events, 1),
        round((folder_bytes(rafts) - raft_before) / events, 3),
    )


def events_done(statuses: Iterable[Mapping[str, Any]]) -> int:
    """Events that the owners have committed since the changelog began."""
    return sum(
        partition["counters"].get("events", 0)
        for status in statuses
        for partition in status["partitions"]
        if partition["role"] == "owner"
    )


def folded_by_standbys(status: Mapping[str, Any]) -> bool:
    """Whether all standbys are as far as their owners, by what the leader was told."""
    for partition in status["partitions"]:
        offsets = {copy["offset"] for copy in partition["replicas"] if copy["role"] in ("owner", "standby")}
        if len(offsets) != 1 or None in offsets:
            return False
    return True


# --- the run --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(setting: Setting, folder: Path, address: str) -> Iterator[Mapping[str, harness.Node]]:
    """Nodes that serve everything, their models live."""
    names = NODES[: setting.nodes]
    if setting.nodes == 1:
        port = harness.free_port()
        workload.models(folder / names[0] / "tenants")
        config = workload.config(folder / names[0] / "node.toml", address, setting.name, port, setting.name)
        with harness.running_node(config, port) as node:
            cluster.wait_for_models([node], len(workload.MODELS), RUN_S_MAX)
            yield {names[0]: node}
        return
    settings = {"cluster": {"standbys": setting.standbys}}
    with cluster.running(folder, names, address, setting.name, setting.name, settings) as nodes:
        nodes.wait_until_settled(workload.PARTITIONS, setting.standbys, 0, RUN_S_MAX)
        cluster.wait_for_models(nodes.nodes.values(), len(workload.MODELS), RUN_S_MAX)
        yield nodes.nodes


def idle(nodes: Mapping[str, harness.Node], quick: bool) -> dict[str, Any]:
    """The median run by its busiest node."""
    seconds, runs, calm_s = (IDLE_S_QUICK, IDLE_RUNS_QUICK, CALM_S_QUICK) if quick else (IDLE_S, IDLE_RUNS, CALM_S)
    time.sleep(calm_s)
    started, before = time.monotonic(), loopback_bytes()
    shares = sorted((idle_shares(nodes.values(), seconds) for _ in range(runs)), key=max)
    rate = (loopback_bytes() - before) / (time.monotonic() - started)
    return {"core_pct": shares[len(shares) // 2], "runs": shares, "loopback_bytes_per_s": round(rate)}


def main(quick: bool) -> harness.Result:
    events = EVENTS_QUICK if quick else EVENTS
    found: dict[str, Costs] = {}
    resting: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        folder = Path(name)
        with harness.broker(folder / "kafka") as broker:
            for setting in SETTINGS:
                asyncio.run(workload.create_topic(broker.address, setting.name))
                with running(setting, folder / setting.name, broker.address) as nodes:
                    if setting.standbys or not quick:
                        resting[setting.name] = idle(nodes, quick)
                        print(f"{setting.name}, idle: {resting[setting.name]}", file=sys.stderr)
                    found[setting.name] = costs(nodes, broker, folder, setting.name, events, setting.standbys)
                    print(f"{setting.name}: {found[setting.name]}", file=sys.stderr)
    detail: dict[str, Any] = {
        "events": events,
        "idle": resting,
        "per_event": {setting: asdict(cost) for setting, cost in found.items()},
        "added_per_event": added(found),
    }
    return harness.Result({"idle_core_pct": max(resting["standby"]["core_pct"])}, detail)


def added(found: Mapping[str, Costs]) -> dict[str, dict[str, float]]:
    """What Raft adds to a node alone, and what standbys add to that: CPU of all nodes and of the broker."""
    pairs = {"raft": ("alone", "cluster"), "standby": ("cluster", "standby")}
    return {
        what: {
            "nodes_cpu_us": round(found[after].nodes_cpu_us - found[before].nodes_cpu_us, 2),
            "broker_cpu_us": round(found[after].broker_cpu_us - found[before].broker_cpu_us, 2),
        }
        for what, (before, after) in pairs.items()
    }
