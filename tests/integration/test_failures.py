"""A whole node when what it stands on fails: it says so, loses and doubles nothing, and goes on by itself."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from node_support import Kafka, Node, cpu_seconds, drop, event, linear, stopped_after, wait_until

SUMS = {"amount": "event.amount", "spent": "sum(transaction.amount, '30d')"}
IDLE_CPU_SHARE_MAX = 0.5
"""Of one core, by a node that waits: its idle work is a few percent, a loop that spins takes all."""
LOG_LINES_MAX = 200
"""Of a whole test: what goes on is not said again and again."""


@pytest.fixture
def make(tmp_path: Path, topic_names: Callable[[str], str]) -> Iterator[Callable[..., Node]]:
    """`make(kafka, topic, …)`: a node with the model shop/spend, not started."""
    made: list[Node] = []

    def one(kafka: Kafka, topic: str, application: str = "", **settings: Any) -> Node:
        folder = tmp_path / f"node{len(made)}"
        made.append(Node(folder, kafka, [topic], application or topic_names("node"), **settings))
        drop(made[-1].models, "shop/spend", linear(1, 1), SUMS)
        return made[-1]

    yield one
    for node in made:
        node.kill()


def check(inferences: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
    """Exactly one inference for each event, each the customer's sum so far and its amount."""
    sums: Counter[str] = Counter()
    expected = []
    for one in events:
        sums[one["customer"]] += one["amount"]
        expected.append((one["customer"], one["time"], one["amount"] + sums[one["customer"]]))
    found = [(one["customer"], one["time"], one["outputs"]["score"]) for one in inferences]
    assert sorted(found) == sorted(expected)


def events_from(first: int, count: int) -> list[dict[str, Any]]:
    return [event(f"c{number % 9}", number) for number in range(first, first + count)]


def test_kafka_goes_away_and_comes_back(own_kafka: Any, make: Callable[..., Node]) -> None:
    """Stopped under a node that idles, then killed under one that works; the node lives through both."""
    kafka = Kafka(own_kafka.address)
    topic = kafka.create("events", 2)
    node = make(kafka, topic)
    events = events_from(0, 1000)
    kafka.produce(topic, events, 2)
    node.start()
    check(node.inferences(1000, 2), events)
    pid = node.pid

    own_kafka.stop()
    reason = wait_until(node.unready, "not ready")
    assert "Kafka" in reason or "Broker" in reason
    spent, since = cpu_seconds(pid), os.times().elapsed
    wait_until(lambda: sum(part["failures"] for part in node.status()["partitions"]) >= 4, "it tries again")
    assert cpu_seconds(pid) - spent < IDLE_CPU_SHARE_MAX * max(1.0, os.times().elapsed - since)
    assert node.get("/healthz")["alive"]
    own_kafka.start()
    wait_until(lambda: not node.unready(), "ready again")

    events += events_from(1000, 20_000)
    kafka.produce(topic, events[1000:], 2)
    wait_until(lambda: node.counter("events") > 1000, "at work")
    own_kafka.kill()
    own_kafka.start()
    check(node.inferences(len(events), 2), events)
    wait_until(lambda: not node.unready(), "ready again")
    assert node.pid == pid
    own_kafka.kill()
    assert node.stop() == 0, node.log_tail()
    assert len(node.log.read_text().splitlines()) < LOG_LINES_MAX


def test_source_topics_that_are_missing_grow_and_are_made_again(
    kafka: str, make: Callable[..., Node], topic_names: Callable[[str], str]
) -> None:
    broker, topic = Kafka(kafka), topic_names("events")
    node = make(broker, topic)
    node.start(wait_s_max=0)
    wait_until(lambda: topic in node.unready() if node.status() else "", "names the missing topic")
    broker.create(topic)
    events = events_from(0, 50)
    broker.produce(topic, events)
    wait_until(lambda: not node.unready(), "ready")
    check(node.inferences(50), events)

    broker.grow(topic, 3)
    more = [event(f"d{number}", number) for number in range(50)]
    broker.produce(topic, more, 3)
    check(node.inferences(100, 3), events + more)
    assert len(node.status()["partitions"]) == 3

    broker.delete(topic)
    broker.create(topic, 3)
    reason = wait_until(node.unready, "not ready")
    wait_until(lambda: "on_source_reset" in node.unready(), f"says what to do, not only {reason}")
    assert node.stop() == 0
    config = node.config.read_text().replace("[kafka]\n", '[kafka]\non_source_reset = "earliest"\n')
    node.config.write_text(config)
    node.start()
    again = [event(f"e{number}", number) for number in range(20)]
    broker.produce(topic, again, 3)
    check(node.inferences(120, 3), events + more + again)

    broker.delete(topic)
    wait_until(lambda: "does not exist" in node.unready(), "says that the topic is gone")
    spent, since = cpu_seconds(node.pid), os.times().elapsed
    failures = sum(part["failures"] for part in node.status()["partitions"])
    wait_until(lambda: sum(part["failures"] for part in node.status()["partitions"]) > failures + 3, "it tries again")
    assert cpu_seconds(node.pid) - spent < IDLE_CPU_SHARE_MAX * max(1.0, os.times().elapsed - since)
    broker.create(topic, 3)
    wait_until(lambda: not node.unready(), "ready")
    last = [event(f"f{number}", number) for number in range(10)]
    broker.produce(topic, last, 3)
    check(node.inferences(130, 3), events + more + again + last)
    assert node.stop() == 0
    assert len(node.log.read_text().splitlines()) < LOG_LINES_MAX


def test_a_full_disk(
    kafka: str,
    make: Callable[..., Node],
    topic_names: Callable[[str], str],
    tmp_path: Path,
    small_disk: Callable[[Path, int], None],
) -> None:
    broker = Kafka(kafka)
    topic = broker.create(topic_names("events"))
    disk = tmp_path / "disk"
    small_disk(disk, 24)
    node = make(broker, topic, node={"data_dir": str(disk)}, state={"flush_interval_s": 1, "write_buffer_mb": 1})
    with stopped_after(node):
        _fill_and_free(node, broker, topic, disk)


def fill(filler: Path) -> None:
    """Take all the space there is."""
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def _fill_and_free(node: Node, broker: Kafka, topic: str, disk: Path) -> None:
    node.start()
    events = events_from(0, 100)
    broker.produce(topic, events)
    node.inferences(100)
    filler = disk / "filler"
    fill(filler)
    more = [event(f"d{number % 4000}", number) for number in range(20_000)]
    broker.produce(topic, more)
    reason = wait_until(node.unready, "not ready")
    assert "StoreUnavailable" in reason
    drop(node.models, "shop/late", linear(1), {"amount": "event.amount"})
    wait_until(lambda: node.log_has("model not taken yet"), "the new model was met")
    assert node.get("/healthz")["alive"]
    filler.unlink()
    wait_until(lambda: not node.unready(), "ready again")
    check(node.inferences(20_100, model="spend"), events + more)
    node.live("shop/late")
    assert node.stop() == 0


def damage_table(folder: Path) -> None:
    for table in folder.glob("*.sst"):
        content = bytearray(table.read_bytes())
        for at in range(0, len(content), 7):
            content[at] ^= 0xFF
        table.write_bytes(content)


def damage_manifest(folder: Path) -> None:
    for manifest in folder.glob("MANIFEST-*"):
        os.truncate(manifest, manifest.stat().st_size // 2)


def lose_tables(folder: Path) -> None:
    for table in folder.glob("*.sst"):
        table.unlink()


def customers(node: Node) -> dict[str, Any]:
    return {name: node.get(f"/v1/customers/{name}?at=last")["aggregates"] for name in (f"c{n}" for n in range(9))}


def test_a_damaged_store_is_set_aside_and_rebuilt(
    kafka: str, make: Callable[..., Node], topic_names: Callable[[str], str]
) -> None:
    broker = Kafka(kafka)
    topic = broker.create(topic_names("events"))
    node = make(broker, topic)
    node.start()
    store = node.folder / "data" / "partitions" / "0"
    events: list[dict[str, Any]] = []
    for damage in (damage_table, damage_manifest, lose_tables):
        more = events_from(len(events), 200)
        events += more
        broker.produce(topic, more)
        wait_until(lambda: node.counter("events") == len(events), "taken")  # noqa: B023
        wait_until(lambda: list(store.glob("*.sst")), "flushed")
        before = customers(node)
        assert node.stop() == 0
        assert list(store.glob("*.sst"))
        damage(store)
        node.start()
        assert customers(node) == before, damage.__name__
        assert store.with_name("0.damaged").exists()
        broker.produce(topic, more := events_from(len(events), 10))
        events += more
        check(node.inferences(len(events)), events)
    assert node.stop() == 0


def test_two_nodes_of_one_application(kafka: str, make: Callable[..., Node], topic_names: Callable[[str], str]) -> None:
    """The node that came later has fenced the older one, which says so; each trigger has one inference all the same."""
    broker = Kafka(kafka)
    topic = broker.create(topic_names("events"), 2)
    older = make(broker, topic, cycle={"events_max": 100})
    newer = make(broker, topic, older.application, cycle={"events_max": 100})
    older.start()
    events = events_from(0, 6000)
    broker.produce(topic, events[:3000], 2)
    wait_until(lambda: older.counter("events") > 300, "the older one works")
    newer.start()
    broker.produce(topic, events[3000:], 2)
    wait_until(lambda: "Fenced" in older.unready(), "the older one says so")
    check(newer.inferences(6000, 2), events)
    assert "Fenced" in older.unready(), "it does not take the partitions back"
    assert not newer.unready()
    assert not newer.log_has("Fenced")


def test_where_a_node_begins_at_the_end_is_durable_before_the_first_event(
    kafka: str, make: Callable[..., Node], topic_names: Callable[[str], str]
) -> None:
    """Events that come while it is down again belong to it, although it has not seen one yet."""
    broker = Kafka(kafka)
    topic = broker.create(topic_names("events"))
    broker.produce(topic, events_from(0, 50))
    node = make(broker, topic, cycle={"start_from": "latest"})
    node.start()
    wait_until(lambda: node.counter("commits") == 1, "progress is committed")
    node.kill()
    broker.produce(topic, events_from(50, 30))
    node.start()
    check(node.inferences(30), events_from(50, 30))
    assert node.counter("events") == 30
