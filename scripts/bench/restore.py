"""From an empty disk to the caught-up owner of 2 GB of state; the same for Kafka Streams, in turns on one broker.

Headrace: of three nodes one has all partitions and their snapshots, one only votes, one starts with an empty disk. The
first is drained, so that the empty one takes every partition over as soon as it can. The time is from the start of its
process until it serves all of them as their owner; sampled customers are then compared with what the first node said.

Kafka Streams: one instance with an empty state directory, from the start of its process until it is RUNNING, its
stores restored from a changelog of the same rows. It gets a stream thread a core and larger fetches than by default.

The rows are those of the standard workload (`state_rows`). Seconds are medians of three; MB are those of the rows and
their keys, 10^6 bytes, whatever compression makes of them. Takes five minutes, and asks for 16 GB of free disk.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cluster
import harness
import kafka_streams
import state_rows
import throughput
import workload

AIMS = {"ratio_to_kafka_streams": ">= 10"}
STATE_BYTES, STATE_BYTES_QUICK = 2_000_000_000, 40_000_000
EVENTS, EVENTS_QUICK = 1_000_000, 40_000
RUNS, RUNS_QUICK = 3, 1
TOPIC = "events"
APPLICATION = "restore"
HAS, VOTES, EMPTY = "has-it", "votes", "empty"
SAMPLES = 200
SEED = 7
WAIT_S_MAX = 600.0
POLL_S = 0.05
DISK_FACTOR = 8
"""Of the state's size, free on the disk: two changelogs, two stores, a snapshot, and compactions under way."""
FRAMES_BEHIND_MAX = 5
SNAPSHOT_INTERVAL_S = 20
STREAMS_SETTINGS: Mapping[str, object] = {
    "processing.guarantee": "exactly_once_v2",
    "commit.interval.ms": 100,
    "replication.factor": 1,
    "main.consumer.auto.offset.reset": "latest",
    # Else the broker would wait for the session of the run before, which was killed.
    "group.instance.id": APPLICATION,
    "num.stream.threads": len(os.sched_getaffinity(0)),
    "restore.consumer.max.poll.records": 10_000,
    "restore.consumer.max.partition.fetch.bytes": 8 << 20,
    "restore.consumer.receive.buffer.bytes": 1 << 20,
    "peer.store": kafka_streams.STORE,
    "peer.input": TOPIC,
    "peer.output": f"{APPLICATION}.streams",
    "peer.report.ms": 100,
}


@dataclass(frozen=True, slots=True)
class State:
    """What both sides restore."""

    rows: int
    bytes: int
    row_bytes: int
    changelog_bytes: int
    """Of Headrace's, compressed."""
    customers: list[str]
    """A sample of them."""


# --- the state ------------------------------------------------------------------------------------------------------


def prepared(folder: Path, address: str, events: int, state_bytes: int) -> State:
    """Topics and changelogs for both sides; the rows are made by a node of its own."""
    topics = {
        TOPIC: {},
        f"{APPLICATION}.changelog": {"max.message.bytes": str(1 << 20), "retention.ms": "-1"},
        f"{APPLICATION}.streams": {},
        f"{APPLICATION}-{kafka_streams.STORE}-changelog": {"cleanup.policy": "compact"},
    }
    for topic, settings in topics.items():
        asyncio.run(workload.create_topic(address, topic, settings=settings))
    rows = made(folder / "maker", address, events)
    copies = max(1, round(state_bytes / (rows.row_bytes * len(rows.customers))))
    streams_topic = f"{APPLICATION}-{kafka_streams.STORE}-changelog"
    size = asyncio.run(state_rows.write_records(address, streams_topic, rows, copies, workload.PARTITIONS))
    packed = asyncio.run(
        state_rows.write_frames(address, f"{APPLICATION}.changelog", rows, copies, workload.PARTITIONS)
    )
    chosen = random.Random(SEED)
    sample = [f"{chosen.randrange(copies):04d}-{chosen.choice(rows.customers).decode()}" for _ in range(SAMPLES)]
    return State(copies * len(rows.customers), size, rows.row_bytes, packed, sample)


def made(folder: Path, address: str, events: int) -> state_rows.Rows:
    """The rows that a single node makes of a month of events."""
    port = harness.free_port()
    config = workload.config(folder / "node.toml", address, TOPIC, port, "maker")
    workload.models(folder / "tenants")
    with harness.running_node(config, port) as node:
        deadline = time.monotonic() + WAIT_S_MAX
        cluster.wait_for_models([node], len(workload.MODELS), WAIT_S_MAX)
        generated = state_rows.month_of_events(events)
        asyncio.run(workload.produce(address, TOPIC, workload.PARTITIONS, generated))
        while throughput.counted(throughput.status(node.url), "events") < events:
            _pause(deadline, f"{events} events", node)
    return asyncio.run(state_rows.read_rows(address, "maker.changelog", workload.PARTITIONS))


def _pause(deadline: float, what: str, node: harness.Node) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError(f"{what}: not within {WAIT_S_MAX} s; the node's log ends:\n{node.log_tail()}")
    time.sleep(POLL_S)


# --- Headrace -------------------------------------------------------------------------------------------------------


def caught_up(status: Mapping[str, Any], node: str) -> int:
    """How many partitions the node has caught up with, as their owner or a standby; what it said last is told on while
    it is silent, and does not count."""
    if not any(member["name"] == node and member["fresh"] for member in status["members"]):
        return 0
    return sum(
        copy["node"] == node
        and ((copy["role"] == "owner" and copy["serving"]) or cluster.stands_by(copy, FRAMES_BEHIND_MAX))
        for found in status["partitions"]
        for copy in found["replicas"]
    )


def serves(status: Mapping[str, Any], node: str) -> int:
    """How many partitions the node has open as their owner."""
    return sum(
        copy["node"] == node and copy["role"] == "owner" and copy["serving"]
        for found in status["partitions"]
        for copy in found["replicas"]
    )


def snapshots_of(status: Mapping[str, Any], node: str) -> int:
    """How many partitions the node has a verified snapshot of that reaches as far as its copy."""
    return sum(
        copy["node"] == node and copy["snapshot_offset"] is not None and copy["snapshot_offset"] >= copy["offset"]
        for found in status["partitions"]
        for copy in found["replicas"]
        if copy["offset"] is not None
    )


class Restoring:
    """The cluster whose third node starts empty, again and again."""

    def __init__(self, nodes: cluster.Cluster, sample: list[str]) -> None:
        self._nodes = nodes
        self._sample = sample

    def start(self) -> None:
        """Found the cluster, for which all three are needed, and let the first have everything, snapshots too."""
        self._nodes.start([HAS, VOTES, EMPTY], wait_s_max=WAIT_S_MAX)
        self._nodes.wait(lambda: len(self._nodes.status()["members"]) == 3, "all members", WAIT_S_MAX)
        self._nodes.operate("drain", VOTES)
        self._nodes.operate("drain", EMPTY)
        self._let_the_first_have_all()
        self._empty()

    def _empty(self) -> None:
        node = self._nodes.nodes[EMPTY]
        node.stop()
        shutil.rmtree(node.config.with_name("data"))
        self._nodes.operate("undrain", EMPTY, at=HAS)
        self._nodes.wait(lambda: caught_up(self._nodes.status(), EMPTY) == 0, f"{EMPTY} is missed", WAIT_S_MAX)

    def _let_the_first_have_all(self) -> None:
        nodes, every = self._nodes, workload.PARTITIONS
        nodes.wait(lambda: serves(nodes.status(), HAS) == every, f"{HAS} serves everything", WAIT_S_MAX)
        nodes.wait(lambda: snapshots_of(nodes.status(), HAS) == every, f"snapshots at {HAS}", WAIT_S_MAX)

    def measured(self) -> dict[str, float]:
        """Seconds from the start of the empty node until it has caught up, and until it serves everything."""
        nodes, every = self._nodes, workload.PARTITIONS
        before = self._answers(HAS)
        nodes.operate("drain", HAS, at=HAS)  # nobody can take over yet; the command's own time is no restore
        started = time.monotonic()
        nodes.start([EMPTY], wait_s_max=0)
        nodes.wait(lambda: caught_up(nodes.status(), EMPTY) == every, f"{EMPTY} has caught up", WAIT_S_MAX)
        caught_up_s = time.monotonic() - started
        nodes.wait(lambda: serves(nodes.status(), EMPTY) == every, f"{EMPTY} serves everything", WAIT_S_MAX)
        seconds = time.monotonic() - started
        after = self._answers(EMPTY)
        wrong = [customer for customer in self._sample if before[customer] != after[customer]]
        if wrong:
            raise RuntimeError(
                f"{len(wrong)} of {len(self._sample)} customers are not as they were, such as {wrong[0]}"
            )
        return {"seconds": round(seconds, 2), "caught_up_s": round(caught_up_s, 2)}

    def _answers(self, node: str) -> dict[str, Any]:
        """The sampled customers' aggregates, as of their newest event."""
        found = {name: self._nodes.ask(f"/v1/customers/{name}?at=last", node) for name in self._sample}
        return {name: answer["aggregates"] for name, answer in found.items()}

    def undo(self) -> None:
        """Give everything back to the first node, and take the third one's disk away."""
        self._nodes.operate("undrain", HAS, at=HAS)
        self._nodes.operate("drain", EMPTY, at=HAS)
        self._let_the_first_have_all()
        self._empty()


# --- Kafka Streams --------------------------------------------------------------------------------------------------


def streams_restored(program: kafka_streams.Program, folder: Path, address: str, rows: int) -> dict[str, float]:
    """Seconds from the start of the process until it is RUNNING with all rows; its files go with `folder`."""
    settings = {**STREAMS_SETTINGS, "application.id": APPLICATION, "bootstrap.servers": address}
    instance = kafka_streams.Instance(program, folder, settings, heap="2g")
    started = time.monotonic()
    try:
        instance.start()
        while (report := instance.report()).state != "RUNNING" or len(report.active) < workload.PARTITIONS:
            instance.check()
            if time.monotonic() - started > WAIT_S_MAX:
                raise RuntimeError(f"Kafka Streams did not restore in {WAIT_S_MAX} s; its log:\n{instance.log_tail()}")
            time.sleep(POLL_S)
        seconds = time.monotonic() - started
    finally:
        instance.kill()
        shutil.rmtree(folder)
    if report.restored < rows:
        raise RuntimeError(f"Kafka Streams restored {report.restored} of {rows} rows")
    return {"seconds": round(seconds, 2), "running_s": report.running_s}


# --- the run --------------------------------------------------------------------------------------------------------


def main(quick: bool) -> harness.Result:
    events, size, runs = (EVENTS_QUICK, STATE_BYTES_QUICK, RUNS_QUICK) if quick else (EVENTS, STATE_BYTES, RUNS)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        if free < size * DISK_FACTOR:
            raise RuntimeError(f"needs {size * DISK_FACTOR >> 20} MB of disk, {free >> 20} MB are free")
        program = kafka_streams.compiled(folder / "program")
        with harness.broker(folder / "kafka") as broker:
            state = prepared(folder, broker.address, events, size)
            print(f"{state.rows:,} rows, {state.bytes / 1e6:,.0f} MB, are in both changelogs", file=sys.stderr)
            settings = {"cluster": {"snapshot_interval_s": SNAPSHOT_INTERVAL_S}}
            nodes = cluster.Cluster(folder / "nodes", [HAS, VOTES, EMPTY], broker.address, TOPIC, APPLICATION, settings)
            workload.models(nodes.tenants(HAS))
            try:
                found = _runs(Restoring(nodes, state.customers), program, folder, broker.address, state, runs)
            finally:
                nodes.kill()
    return _result(found, state)


def _runs(
    restoring: Restoring, program: kafka_streams.Program, folder: Path, address: str, state: State, runs: int
) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {"headrace": [], "kafka_streams": []}
    restoring.start()
    for number in range(runs):
        if number:
            restoring.undo()
        found["headrace"].append(restoring.measured())
        print(f"headrace: {found['headrace'][-1]}", file=sys.stderr)
        found["kafka_streams"].append(streams_restored(program, folder / "streams", address, state.rows))
        print(f"kafka streams: {found['kafka_streams'][-1]}", file=sys.stderr)
    return found


def _result(found: Mapping[str, list[dict[str, float]]], state: State) -> harness.Result:
    medians = {side: statistics.median(run["seconds"] for run in runs) for side, runs in found.items()}
    detail: dict[str, Any] = {
        side: {"median_s": medians[side], "mb_per_s": round(state.bytes / 1e6 / medians[side], 1), "runs": runs}
        for side, runs in found.items()
    }
    detail |= {
        "rows": state.rows,
        "state_mb": round(state.bytes / 1e6, 1),
        "row_bytes": state.row_bytes,
        "changelog_mb": round(state.changelog_bytes / 1e6, 1),
        "streams_settings": {name: str(value) for name, value in STREAMS_SETTINGS.items()},
    }
    return harness.Result({"ratio_to_kafka_streams": round(medians["kafka_streams"] / medians["headrace"], 2)}, detail)
