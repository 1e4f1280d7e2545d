"""kill -9 of an owner under 5,000 events a second: until the next output of each of its partitions is readable.

Three Headrace nodes with one standby, and three Kafka Streams instances with one standby doing the same work, on one
broker, one side at a time, in rounds. A kill's time is that of the worst of the partitions the victim owned, taken at
a read_committed reader; medians are over all kills. A side is killed again only when every partition has its owner and
a caught-up standby. Kafka Streams is measured at its default time-outs (its members expire after 45 s), and tuned; of
several ways to tune it the fastest median counts.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import harness
import kafka_streams
import traffic
import workload

AIMS = {"median_s": "<= 3", "ratio_to_kafka_streams_default": ">= 5", "ratio_to_kafka_streams_tuned": ">= 1"}
RATE_PER_S = 5_000
INSTANCES = 3
TOPIC = "events"
WARM_S, WARM_S_QUICK = 10.0, 3.0
PAUSE_S = 2.0
"""Between settled and the next kill, so that kills do not come at the same moment of every period."""
OUTPUT_S_MAX = 150.0
SETTLE_S_MAX = 180.0
LAG_RECORDS_MAX = 5_000
"""Of all stores of an instance together: a second of changelog."""
BROKER_OPTIONS = {
    # Lets a member ask for a session shorter than the 6 s that brokers allow by default.
    "group.min.session.timeout.ms": 1000,
    # Streams waits for the killed owner's transaction to be aborted: looked after every 10 s by default.
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": 200,
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


# --- the run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contender:
    start: Callable[[int], AbstractContextManager[Side]]
    """Given the round's number."""
    kills: int
    """In all rounds together."""
    times_s: list[float] = field(default_factory=list)
    rates_per_s: list[float] = field(default_factory=list)


def kill_once(side: Side, driven: traffic.Traffic, partition: int) -> float:
    """Seconds from the kill of the partition's owner to the first output of the last of its partitions."""
    victim, owned = side.owned_with(partition)
    killed = time.monotonic()
    side.kill(victim)
    # Whatever the victim appended came before; see traffic.Traffic.
    driven.watch(time.time_ns() // 1_000_000)
    seen = driven.wait(owned, OUTPUT_S_MAX)
    side.revive(victim)
    return max(seen.values()) - killed


def run_round(contender: Contender, name: str, number: int, kills: range, address: str, warm_s: float) -> None:
    with contender.start(number) as side, traffic.Traffic(address, TOPIC, side.output, RATE_PER_S) as driven:
        driven.watch(time.time_ns() // 1_000_000)
        side.settle()
        driven.wait(frozenset(range(workload.PARTITIONS)), OUTPUT_S_MAX)
        time.sleep(warm_s)
        started, sent = time.monotonic(), driven.sent
        for kill in kills:
            side.settle()
            time.sleep(PAUSE_S * (1 + kill % 3 / 3))
            contender.times_s.append(kill_once(side, driven, kill % workload.PARTITIONS))
            print(f"{name}: {contender.times_s[-1]:.2f} s", file=sys.stderr)
        contender.rates_per_s.append((driven.sent - sent) / (time.monotonic() - started))


def figures(times_s: Sequence[float]) -> dict[str, object]:
    return {
        "kills": len(times_s),
        "median_s": round(statistics.median(times_s), 3),
        "worst_s": round(max(times_s), 3),
        "times_s": [round(value, 3) for value in times_s],
    }


def compared(times_s: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The values of AIMS, from each contender's times; "headrace", "default", the others are ways to tune."""
    medians = {name: statistics.median(found) for name, found in times_s.items() if found}
    values: dict[str, float] = {}
    if "headrace" in medians:
        own = medians["headrace"]
        values["median_s"] = round(own, 3)
        tuned = [median for name, median in medians.items() if name not in ("headrace", "default")]
        if "default" in medians:
            values["ratio_to_kafka_streams_default"] = round(medians["default"] / own, 2)
        if tuned:
            values["ratio_to_kafka_streams_tuned"] = round(min(tuned) / own, 2)
    return values


def rounds_of(kills: int, rounds: int) -> list[range]:
    """The numbers of all kills, cut into rounds as evenly as can be."""
    bounds = [kills * number // rounds for number in range(rounds + 1)]
    return [range(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]
