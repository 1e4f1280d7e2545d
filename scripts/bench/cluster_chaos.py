"""Three nodes on real Kafka under load, and faults at random from a seed: then everything is counted.

Each node has a network namespace of its own. kill -9, SIGSTOP and SIGCONT, a network cut (from the peers, from Kafka,
from both), a restart with and without a drain; now and then two at once, so that no quorum is left for a while.
Afterwards a read_committed reader must find exactly one inference for each trigger, its output what the model gives
for the features that an independent, plain per-event program computes; every customer's state must be that program's;
and each standby's store must be the owner's, row for row: by `headrace verify` while they run, and by reading both once
they are stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import random
import secrets
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chaos
import cluster
import harness
import network
import orjson
import workload

sys.path.insert(0, str(harness.ROOT))
from node.state.rocksdb import RocksEnvironment, RocksStore

AIMS = {
    "faults": ">= 30",
    "missing": "= 0",
    "duplicated": "= 0",
    "row_mismatches": "= 0",
    "state_mismatches": "= 0",
    "output_mismatches": "= 0",
}
SEED = 7
NODES = ("n1", "n2", "n3")
SECONDS, SECONDS_QUICK = 600.0, 40.0
RATE_PER_S = 400
PIECE_S = 0.25
TOPIC, APPLICATION = "events", "cluster-chaos"
SETTLE_S_MAX = 120.0
FINISH_S_MAX = 240.0
FRAMES_BEHIND_MAX = 20
BOTH_CHANCE = 0.15
"""That a second node has a fault before the first is over: no quorum is left then."""
PATIENT_CHANCE = 0.6
"""That the next fault waits until the cluster is whole again."""
REPAIR_S = (0.5, 5.0)
"""Until the next fault, where it does not wait for that."""
WHOLE_S_MAX = 30.0
SCAN_ROWS = 10_000
REQUEST_S_MAX = 2.0


# --- faults ---------------------------------------------------------------------------------------------------------


@dataclass
class Faults:
    """Makes one fault after the other. Whatever it breaks it mends, `heal` also what an error left broken."""

    nodes: cluster.Cluster
    net: network.Network
    random: random.Random
    made: Counter[str] = field(default_factory=Counter)
    unplanned: list[str] = field(default_factory=list)
    """Nodes that ended by themselves, with the end of their logs; started again, as systemd would."""
    whole_s: list[float] = field(default_factory=list)
    """How long it took the cluster to be whole again, where that was waited for."""
    _broken: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with ThreadPoolExecutor(1) as other:
            while time.monotonic() < deadline:
                self.start_ended()
                first = self._victim()
                both = self.random.random() < BOTH_CHANCE
                second = self.random.choice([name for name in NODES if name != first]) if both else ""
                chosen = self._chosen(second) if second else None
                self._make(first, self._chosen(first), other, chosen)
                self._repair()

    def _make(
        self, name: str, fault: Callable[[], None], other: ThreadPoolExecutor, second: Callable[[], None] | None
    ) -> None:
        waiting = other.submit(second) if second is not None else None
        fault()
        if waiting is not None:
            waiting.result()

    def _victim(self) -> str:
        """A third each: the leader, the owner of some partition, anyone."""
        with contextlib.suppress(RuntimeError):
            status = self.nodes.status()
            owners = [name for name in cluster.owners(status).values() if name]
            found = self.random.choice([status["leader"], self.random.choice(owners or NODES), ""])
            if found in NODES:
                return str(found)
        return self.random.choice(NODES)

    def _chosen(self, name: str) -> Callable[[], None]:
        """A fault of this node, all that is random about it drawn now: threads must not change the order."""
        uniform = self.random.uniform
        faults: Mapping[str, Callable[[], Callable[[], None]]] = {
            "kill": lambda: self._bound(self._kill, name, uniform(0, 3)),
            "pause": lambda: self._bound(self._pause, name, uniform(0.3, 6)),
            "cut_peers": lambda: self._bound(self._cut, name, uniform(0.5, 8), ("peers",)),
            "cut_broker": lambda: self._bound(self._cut, name, uniform(0.5, 8), ("broker",)),
            "cut_all": lambda: self._bound(self._cut, name, uniform(0.5, 8), ("peers", "broker")),
            "restart": lambda: self._bound(self._restart, name, self.random.random() < 0.5),
        }
        kind = self.random.choice(sorted(faults))
        work = faults[kind]()

        def fault() -> None:
            print(f"{kind} {name}", file=sys.stderr)
            with self._lock:
                self._broken.add(name)
                self.made[kind] += 1
            work()
            with self._lock:
                self._broken.discard(name)

        return fault

    @staticmethod
    def _bound(work: Callable[..., None], *arguments: Any) -> Callable[[], None]:
        return lambda: work(*arguments)

    def _kill(self, name: str, seconds: float) -> None:
        self.nodes.nodes[name].kill()
        time.sleep(seconds)
        self.nodes.nodes[name].start(wait_s_max=0)

    def _pause(self, name: str, seconds: float) -> None:
        node = self.nodes.nodes[name]
        node.pause()
        time.sleep(seconds)
        node.resume()

    def _cut(self, name: str, seconds: float, kinds: tuple[str, ...]) -> None:
        self.net.cut(name, kinds)
        time.sleep(seconds)
        self.net.mend(name)

    def _restart(self, name: str, drained: bool) -> None:
        """A drain that can't end, since the cluster is not whole, is no reason not to stop."""
        if drained:
            with contextlib.suppress(RuntimeError):
                self.nodes.operate("drain", name, "--wait", "--wait-s", "20")
        node = self.nodes.nodes[name]
        try:
            if not node.ended:
                node.stop()
        except RuntimeError as failure:
            self.unplanned.append(f"{name}: {failure}")
        node.start(wait_s_max=0)
        if drained:
            self.nodes.wait(lambda: self._undrained(name), f"{name} takes part again", SETTLE_S_MAX)

    def _undrained(self, name: str) -> bool:
        self.nodes.operate("undrain", name)
        return True

    def _repair(self) -> None:
        if self.random.random() >= PATIENT_CHANCE:
            time.sleep(self.random.uniform(*REPAIR_S))
            return
        started = time.monotonic()
        while time.monotonic() < started + WHOLE_S_MAX:
            self.start_ended()
            with contextlib.suppress(RuntimeError):
                if cluster.settled(self.nodes.status(), workload.PARTITIONS, 1, FRAMES_BEHIND_MAX):
                    break
            time.sleep(0.2)
        self.whole_s.append(time.monotonic() - started)

    def start_ended(self) -> None:
        for name, node in self.nodes.nodes.items():
            with self._lock:
                ended = node.ended and name not in self._broken
            if ended:
                print(f"{name} ended by itself", file=sys.stderr)
                self.unplanned.append(f"{name}:\n{node.log_tail(8)}")
                node.start(wait_s_max=0)

    def heal(self) -> None:
        for name, node in self.nodes.nodes.items():
            self.net.mend(name)
            if not node.ended:
                node.resume()
        self._broken.clear()
        self.start_ended()


# --- load -----------------------------------------------------------------------------------------------------------


def send(address: str, chunks: list[workload.Events], seconds: float) -> None:
    """All events, evenly over the time, in pieces of PIECE_S."""

    async def run() -> None:
        events = sum(map(len, chunks))
        pieces = max(1, int(seconds / PIECE_S))
        started, done = time.monotonic(), 0
        for piece in _pieces(chunks, -(-events // pieces)):
            await workload.produce(address, TOPIC, workload.PARTITIONS, [piece])
            done += len(piece)
            await asyncio.sleep(max(0.0, started + seconds * done / events - time.monotonic()))

    asyncio.run(run())


def _pieces(chunks: list[workload.Events], size: int) -> Iterator[workload.Events]:
    for chunk in chunks:
        for start, stop in itertools.pairwise([*range(0, len(chunk), size), len(chunk)]):
            at = slice(start, stop)
            yield workload.Events(chunk.values[at], chunk.customers[at], chunk.types[at], chunk.times_ms[at])


def finished(nodes: cluster.Cluster, events: int) -> bool:
    """Whether the owners have taken every event in, and no trigger waits."""
    done = behind = 0
    for number, owner in cluster.owners(nodes.status()).items():
        partitions = nodes.ask("/v1/status", owner)["partitions"] if owner else []
        for partition in partitions:
            if partition["number"] == number:
                done += partition["counters"].get("events", 0)
                behind += sum(model["rows"] for model in partition["backlog"].values())
    return done >= events and not behind


# --- what came of it ------------------------------------------------------------------------------------------------


def state_mismatches(nodes: cluster.Cluster, expected: chaos.Expected) -> tuple[int, list[str]]:
    """Customers whose aggregates at the owner of their partition are not the plain program's; some examples."""
    owners = cluster.owners(nodes.status())
    wrong, examples = 0, []
    for number, owner in owners.items():
        customers = [one for one in expected.customers if workload.partition_of(int(one[1:])) == number]
        found, shown = chaos.state_mismatches(nodes.nodes[owner].url, expected, customers)
        wrong += found
        examples += shown
    return wrong, examples[:5]


def row_mismatches(
    nodes: cluster.Cluster, owners: Mapping[int, str], standbys: Mapping[int, list[str]]
) -> tuple[int, int]:
    """Rows that a standby's store has otherwise than the owner's, or only one of them has; and rows compared.

    The nodes are stopped.
    """
    environment = RocksEnvironment.of(32 << 20, 16 << 20)

    def rows(name: str, number: int) -> dict[bytes, bytes]:
        store = RocksStore(nodes.nodes[name].config.parent / "data" / "partitions" / str(number), environment)
        try:
            found: dict[bytes, bytes] = {}
            while page := store.scan(max(found, default=None), SCAN_ROWS):
                found.update(page)
            return found
        finally:
            store.close()

    wrong = compared = 0
    for number, owner in owners.items():
        right = rows(owner, number)
        for name in standbys[number]:
            copy = rows(name, number)
            customers = right.keys() | copy.keys()
            compared += len(customers)
            wrong += sum(right.get(customer) != copy.get(customer) for customer in customers)
    return wrong, compared


@dataclass(frozen=True, slots=True)
class Outcome:
    values: Mapping[str, float]
    detail: Mapping[str, object]


def counted(folder: Path, address: str, expected: chaos.Expected) -> Outcome:
    """Every committed inference against every trigger."""
    outputs = expected.outputs(folder / NODES[0] / "tenants")
    found: Counter[chaos.Trigger] = Counter()
    wrong = 0
    for record in asyncio.run(chaos.all_records(address, f"{APPLICATION}.inferences")):
        inference = orjson.loads(record.value)
        trigger = (f"{inference['tenant']}/{inference['model']}", inference["partition"], inference["offset"])
        found[trigger] += 1
        wrong += not math.isclose(inference["outputs"]["score"], outputs.get(trigger, math.nan), rel_tol=1e-9)
    letters = sum(1 for _ in asyncio.run(chaos.all_records(address, f"{APPLICATION}.dead-letters")))
    return Outcome(
        {
            "missing": len(outputs.keys() - found.keys()),
            "duplicated": sum(count - 1 for count in found.values()) + len(found.keys() - outputs.keys()),
            "output_mismatches": wrong,
        },
        {"triggers": len(outputs), "inferences": sum(found.values()), "dead_letters": letters},
    )


# --- the run --------------------------------------------------------------------------------------------------------


def main(quick: bool) -> harness.Result:
    seconds = SECONDS_QUICK if quick else SECONDS
    with (
        tempfile.TemporaryDirectory(prefix="headrace-bench-") as name,
        network.network(NODES) as net,
        harness.broker(Path(name) / "kafka", host=net.broker_host) as broker,
    ):
        folder = Path(name)
        asyncio.run(workload.create_topic(broker.address, TOPIC))
        (folder / "secret").write_text(secrets.token_hex(32))
        settings: dict[str, dict[str, object]] = {
            "state": {"flush_interval_s": 1},
            "cycle": {"events_max": 512},
            "cluster": {"secret_file": str(folder / "secret"), "snapshot_interval_s": 10},
        }
        nodes = cluster.Cluster(folder, NODES, broker.address, TOPIC, APPLICATION, settings, net.places)
        nodes.request_s_max = REQUEST_S_MAX
        workload.models(nodes.tenants(NODES[0]))
        try:
            nodes.start()
            nodes.wait_until_settled(workload.PARTITIONS, 1, FRAMES_BEHIND_MAX, SETTLE_S_MAX)
            return _run(folder, broker, net, nodes, seconds)
        finally:
            nodes.kill()


def _run(
    folder: Path, broker: harness.Broker, net: network.Network, nodes: cluster.Cluster, seconds: float
) -> harness.Result:
    chunks = list(workload.generate(int(RATE_PER_S * seconds), seed=SEED))
    events = sum(map(len, chunks))
    faults = Faults(nodes, net, random.Random(SEED))
    with ThreadPoolExecutor(1) as thread:
        sending = thread.submit(send, broker.address, chunks, seconds)
        try:
            faults.run(seconds)
        finally:
            faults.heal()
        sending.result()
    nodes.wait(lambda: finished(nodes, events), "all events taken in", FINISH_S_MAX)
    nodes.wait_until_settled(workload.PARTITIONS, 1, 0, SETTLE_S_MAX)
    verified = json.loads(nodes.operate("verify", "--json", check=False))
    expected = chaos.Expected(folder / NODES[0] / "tenants")
    for record in asyncio.run(chaos.all_records(broker.address, TOPIC)):
        expected.see(record.partition, record.offset, record.value)
    mismatches, examples = state_mismatches(nodes, expected)
    status = nodes.status()
    nodes.stop()
    owners, standbys = cluster.owners(status), cluster.standbys(status)
    rows_wrong, rows_compared = row_mismatches(nodes, owners, standbys)
    outcome = counted(folder, broker.address, expected)
    return harness.Result(
        {
            "faults": sum(faults.made.values()),
            "row_mismatches": rows_wrong + sum(verified[name] for name in ("differ", "unknown", "damaged")),
            "state_mismatches": mismatches,
            **outcome.values,
        },
        {
            "seconds": seconds,
            "events": events,
            "customers": len(expected.customers),
            "rows_compared": rows_compared,
            "faults": dict(faults.made),
            "unplanned_exits": faults.unplanned,
            "whole_again_s_max": round(max(faults.whole_s, default=0.0), 1),
            "verified": verified,
            "examples": examples,
            **outcome.detail,
        },
    )
