"""kill -9 of an owner under 5,000 events a second: until the next output of each of its partitions is readable.

Three Headrace nodes with one standby, and three Kafka Streams instances with one standby doing the same work, on one
broker, one side at a time, in rounds. A kill's time is that of the worst of the partitions the victim owned, taken at
a read_committed reader; medians are over all kills. A side is killed again only when every partition has its owner and
a caught-up standby. Kafka Streams is measured at its default time-outs (its members expire after 45 s), and tuned; of
several ways to tune it the fastest median counts. `tuned_with_broker` gives a member up after a second, as Headrace's
default lease does. `headrace_silent` is shown beside the aims and not counted in them: the owner is stopped instead, so
that nothing tells the others that it has ended and they wait for its lease, as when its host is gone; Kafka Streams
waits for its time-outs either way. Ten kills each take 24 minutes, ten of them for those of Kafka Streams by default.

Planned moves, at the end of each round of Headrace: a node is drained under the same load, and the longest time in
which one of its partitions gave no output is the pause; without a move it is about a commit interval.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import cluster
import harness
import kafka_streams
import traffic
import workload

AIMS = {"median_s": "<= 3", "ratio_to_kafka_streams_default": ">= 5", "ratio_to_kafka_streams_tuned": ">= 1"}
RATE_PER_S = 5_000
INSTANCES = 3
TOPIC = "events"
KILLS = dict.fromkeys(
    ("headrace", "tuned", "tuned_with_broker", "tuned_streams_protocol", "headrace_silent", "default"), 10
)
KILLS_QUICK = {"headrace": 1, "tuned_with_broker": 1, "default": 1}
ROUNDS = 2
DRAINS = 3
"""Of each round of Headrace: one node after another."""
AFTER_MOVE_S = 1.0
WARM_S, WARM_S_QUICK = 10.0, 2.0
PAUSE_S = 2.0
"""Between settled and the next kill, so that kills do not come at the same moment of every period."""
OUTPUT_S_MAX = 150.0
SETTLE_S_MAX = 180.0
LAG_RECORDS_MAX = 10_000
"""Of all stores of an instance together: what Kafka Streams itself takes for caught up, two seconds of changelog."""
FRAMES_BEHIND_MAX = 20
"""What Headrace takes for caught up, two seconds too: a frame a commit."""
BROKER_OPTIONS = {
    # Lets a member ask for a session shorter than the 6 s that brokers allow by default.
    "group.min.session.timeout.ms": 1000,
    # Streams waits for the killed owner's transaction to be aborted: looked after every 10 s by default.
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": 200,
    # Groups of the new "streams" protocol have these from the broker, and none of their own.
    "group.streams.min.session.timeout.ms": 1000,
    "group.streams.session.timeout.ms": 1000,
    "group.streams.min.heartbeat.interval.ms": 250,
    "group.streams.heartbeat.interval.ms": 250,
    "group.streams.num.standby.replicas": 1,
}


class Side(Protocol):
    """One of the systems compared, running."""

    output: str

    def settle(self) -> None:
        """Return once every partition has an owner and a caught-up standby."""

    def owned_with(self, partition: int) -> tuple[int, frozenset[int]]:
        """The number of the instance that owns the partition, and all partitions that it owns."""

    def kill(self, instance: int) -> None: ...

    def revive(self, instance: int) -> None: ...


# --- Kafka Streams --------------------------------------------------------------------------------------------------

STREAMS_COMMON: Mapping[str, object] = {
    "processing.guarantee": "exactly_once_v2",
    "commit.interval.ms": 100,
    "num.standby.replicas": 1,
    "replication.factor": 1,
    "main.consumer.auto.offset.reset": "latest",
    "peer.store": kafka_streams.STORE,
    "peer.input": TOPIC,
}
STREAMS_SETTINGS: Mapping[str, Mapping[str, object]] = {
    "default": {},
    # As far as a broker at its defaults allows.
    "tuned": {
        "session.timeout.ms": 6000,
        "heartbeat.interval.ms": 1500,
        "producer.transaction.timeout.ms": 5000,
        "acceptable.recovery.lag": 1_000_000,
    },
    # As far as it goes with the broker set for it too.
    "tuned_with_broker": {
        "session.timeout.ms": 1000,
        "heartbeat.interval.ms": 250,
        "producer.transaction.timeout.ms": 1000,
        "acceptable.recovery.lag": 1_000_000,
    },
    "tuned_streams_protocol": {"group.protocol": "streams", "producer.transaction.timeout.ms": 1000},
}


@dataclass
class StreamsSide:
    instances: Sequence[kafka_streams.Instance]
    output: str

    def settle(self) -> None:
        kafka_streams.wait_for_all(self.instances, workload.PARTITIONS, 1, LAG_RECORDS_MAX, SETTLE_S_MAX)

    def owned_with(self, partition: int) -> tuple[int, frozenset[int]]:
        for number, instance in enumerate(self.instances):
            active = instance.report().active
            if partition in active:
                return number, active
        raise RuntimeError(f"no Kafka Streams instance owns partition {partition}")

    def kill(self, instance: int) -> None:
        self.instances[instance].kill()

    def revive(self, instance: int) -> None:
        self.instances[instance].start()


@contextmanager
def streams_side(
    folder: Path, program: kafka_streams.Program, address: str, name: str, settings: Mapping[str, object]
) -> Iterator[StreamsSide]:
    output = f"{name}.inferences"
    asyncio.run(workload.create_topic(address, output, settings={"message.timestamp.type": "LogAppendTime"}))
    own = {**STREAMS_COMMON, **settings, "application.id": name, "bootstrap.servers": address, "peer.output": output}
    instances = [kafka_streams.Instance(program, folder / f"{name}-{number}", own) for number in range(INSTANCES)]
    try:
        for instance in instances:
            instance.start()
        yield StreamsSide(instances, output)
    finally:
        for instance in instances:
            instance.kill()


# --- Headrace -------------------------------------------------------------------------------------------------------


LEASE_MS = 1000
"""The default."""
SILENT = {"headrace": False, "headrace_silent": True}
"""Whether an owner is stopped in place of killed."""


@dataclass
class HeadraceSide:
    nodes: cluster.Cluster
    output: str
    silent: bool

    def settle(self) -> None:
        self.nodes.wait_until_settled(workload.PARTITIONS, 1, FRAMES_BEHIND_MAX, SETTLE_S_MAX)

    def owned_with(self, partition: int) -> tuple[int, frozenset[int]]:
        owners = cluster.owners(self.nodes.status())
        owner = owners[partition]
        return list(self.nodes.nodes).index(owner), frozenset(p for p, name in owners.items() if name == owner)

    def kill(self, instance: int) -> None:
        node = list(self.nodes.nodes.values())[instance]
        if self.silent:
            node.pause()
        else:
            node.kill()

    def revive(self, instance: int) -> None:
        node = list(self.nodes.nodes.values())[instance]
        node.kill()
        node.start()


def drained_once(side: HeadraceSide, driven: traffic.Traffic, name: str) -> float:
    """The longest pause, in seconds, of a partition that a drained node gave to others; the node owns again after."""
    moving = frozenset(number for number, owner in cluster.owners(side.nodes.status()).items() if owner == name)
    driven.watch(time.time_ns() // 1_000_000)
    side.nodes.operate("drain", name)
    side.nodes.wait(lambda: name not in cluster.owners(side.nodes.status()).values(), f"{name} drained", SETTLE_S_MAX)
    side.settle()
    time.sleep(AFTER_MOVE_S)
    gaps = driven.gaps()
    side.nodes.operate("undrain", name)
    side.nodes.wait(lambda: name in cluster.owners(side.nodes.status()).values(), f"{name} owns again", SETTLE_S_MAX)
    side.settle()
    return max(gaps[number] for number in moving)


def drained(side: HeadraceSide, driven: traffic.Traffic, name: str) -> list[float]:
    side.settle()
    names = [node for node in side.nodes.nodes if node in cluster.owners(side.nodes.status()).values()][:DRAINS]
    pauses = [drained_once(side, driven, node) for node in names]
    print(f"{name}: planned moves pause {pauses} s", file=sys.stderr)
    return pauses


@contextmanager
def headrace_side(folder: Path, address: str, application: str, silent: bool) -> Iterator[HeadraceSide]:
    output = f"{application}.inferences"
    asyncio.run(workload.create_topic(address, output, settings={"message.timestamp.type": "LogAppendTime"}))
    names = [f"node-{number}" for number in range(INSTANCES)]
    settings: cluster.Settings = {
        "cycle": {"start_from": "latest", "commit_interval_ms": 100},
        "cluster": {"lease_ms": LEASE_MS},
    }
    with cluster.running(folder, names, address, TOPIC, application, settings) as nodes:
        yield HeadraceSide(nodes, output, silent)


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contender:
    start: Callable[[int], AbstractContextManager[Side]]
    """Given the round's number."""
    kills: int
    """In all rounds together."""
    times_s: list[float] = field(default_factory=list)
    rates_per_s: list[float] = field(default_factory=list)
    moves_s: list[float] = field(default_factory=list)


def kill_once(side: Side, driven: traffic.Traffic, partition: int) -> tuple[int, float]:
    """Kills the partition's owner: who that was, and seconds to the first output of the last of its partitions."""
    victim, owned = side.owned_with(partition)
    killed = time.monotonic()
    side.kill(victim)
    # Whatever the victim appended came before; see traffic.Traffic.
    driven.watch(time.time_ns() // 1_000_000)
    seen = driven.wait(owned, OUTPUT_S_MAX)
    return victim, max(seen.values()) - killed


def run_round(contender: Contender, name: str, number: int, kills: range, address: str, warm_s: float) -> None:
    started = time.monotonic()
    with contender.start(number) as side, traffic.Traffic(address, TOPIC, side.output, RATE_PER_S) as driven:
        driven.watch(time.time_ns() // 1_000_000)
        side.settle()
        driven.wait(frozenset(range(workload.PARTITIONS)), OUTPUT_S_MAX)
        print(f"{name}: runs after {time.monotonic() - started:.0f} s", file=sys.stderr)
        time.sleep(warm_s)
        started, sent = time.monotonic(), driven.sent
        for kill in kills:
            side.settle()
            time.sleep(PAUSE_S * (1 + kill % 3 / 3))
            victim, seconds = kill_once(side, driven, kill % workload.PARTITIONS)
            contender.times_s.append(seconds)
            print(f"{name}: {seconds:.2f} s", file=sys.stderr)
            if kill != kills[-1]:
                side.revive(victim)
        if isinstance(side, HeadraceSide):
            side.revive(victim)
            contender.moves_s.extend(drained(side, driven, name))
        contender.rates_per_s.append((driven.sent - sent) / (time.monotonic() - started))


def figures(times_s: Sequence[float]) -> dict[str, object]:
    return {
        "kills": len(times_s),
        "median_s": round(statistics.median(times_s), 3),
        "worst_s": round(max(times_s), 3),
        "times_s": [round(value, 3) for value in times_s],
    }


def pauses(moves_s: Sequence[float]) -> dict[str, object]:
    median, worst = statistics.median(moves_s), max(moves_s)
    return {"moves": len(moves_s), "median_s": round(median, 3), "worst_s": round(worst, 3)}


def compared(times_s: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The values of AIMS, from each contender's times; "tuned…" are ways to tune Kafka Streams."""
    medians = {name: statistics.median(found) for name, found in times_s.items() if found}
    values: dict[str, float] = {}
    if "headrace" in medians:
        own = medians["headrace"]
        values["median_s"] = round(own, 3)
        tuned = [median for name, median in medians.items() if name.startswith("tuned")]
        if "default" in medians:
            values["ratio_to_kafka_streams_default"] = round(medians["default"] / own, 2)
        if tuned:
            values["ratio_to_kafka_streams_tuned"] = round(min(tuned) / own, 2)
    return values


def rounds_of(kills: int, rounds: int) -> list[range]:
    """The numbers of all kills, cut into rounds as evenly as can be."""
    bounds = [kills * number // rounds for number in range(rounds + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


def contenders(
    folder: Path, program: kafka_streams.Program, address: str, kills: Mapping[str, int]
) -> dict[str, Contender]:
    streams = functools.partial(streams_side, folder, program, address)

    def of_streams(name: str) -> Callable[[int], AbstractContextManager[Side]]:
        return lambda number: streams(f"{name}-{number}", STREAMS_SETTINGS[name])

    def of_headrace(name: str) -> Callable[[int], AbstractContextManager[Side]]:
        return lambda number: headrace_side(folder / f"{name}-{number}", address, f"{name}-{number}", SILENT[name])

    starts: dict[str, Callable[[int], AbstractContextManager[Side]]] = {name: of_headrace(name) for name in SILENT}
    starts |= {name: of_streams(name) for name in STREAMS_SETTINGS}
    return {name: Contender(starts[name], count) for name, count in kills.items()}


def main(quick: bool) -> harness.Result:
    kills, rounds, warm_s = (KILLS_QUICK, 1, WARM_S_QUICK) if quick else (KILLS, ROUNDS, WARM_S)
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        folder = Path(name)
        program = kafka_streams.compiled(folder / "program")
        with harness.broker(folder / "kafka", options=BROKER_OPTIONS) as broker:
            asyncio.run(workload.create_topic(broker.address, TOPIC))
            found = contenders(folder, program, broker.address, kills)
            for number in range(rounds):
                for name, contender in found.items():
                    part = rounds_of(contender.kills, rounds)[number]
                    run_round(contender, name, number, part, broker.address, warm_s)
    detail: dict[str, Any] = {
        name: {
            **figures(contender.times_s),
            "settings": {"lease_ms": LEASE_MS} if name in SILENT else STREAMS_SETTINGS[name],
            "events_per_s": round(statistics.fmean(contender.rates_per_s)),
            **({"planned_moves": pauses(contender.moves_s)} if contender.moves_s else {}),
        }
        for name, contender in found.items()
    }
    detail |= {"broker": BROKER_OPTIONS, "rounds": rounds, "standbys": 1, "instances": INSTANCES}
    return harness.Result(compared({name: contender.times_s for name, contender in found.items()}), detail)
