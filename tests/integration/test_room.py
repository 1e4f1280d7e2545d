"""Rows that have no room for a model any more, on a whole node: its update is refused, and harms nobody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from node_support import Kafka, Node, drop, event, linear, status_file, wait_until

WIDE, SPEND = "wide/sums", "shop/spend"


def sums(first: int, last: int) -> dict[str, str]:
    return {f"sum{day}": f"sum(transaction.amount, '{day}d')" for day in range(first, last + 1)}


def test_an_update_without_room_gives_way_to_the_version_before_also_after_a_restart(
    kafka: str, tmp_path: Path, topic_names: Callable[[str], str]
) -> None:
    broker = Kafka(kafka)
    topics, tenants = [broker.create(topic_names("events"))], {"window_bytes_max": 32_768}
    node = Node(tmp_path, broker, topics, topic_names("node"), tenants=tenants)
    drop(node.models, WIDE, linear(*[1.0] * 180), sums(20, 199))
    drop(node.models, SPEND, linear(1.0), {"amount": "event.amount"})
    node.start()
    try:
        first = node.live(WIDE)
        node.live(SPEND)
        node.kafka.produce(node.topics[0], [event("ann", number) for number in range(3)])
        node.inferences(6)
        drop(node.models, WIDE, linear(*[1.0] * 180), sums(200, 379))
        wait_until(lambda: status_file(node.models, WIDE)["state"] == "refused", "the update is refused")
        assert "in partition 0, a customer's row would need" in status_file(node.models, WIDE)["problems"][0]

        node.kill()  # no partition is open when it is tried again
        node.start()
        wait_until(lambda: status_file(node.models, WIDE)["state"] == "quarantined", "the partition has no room")
        assert status_file(node.models, WIDE)["running"]["version"].startswith(first)
        drop(node.models, SPEND, linear(2.0), {"amount": "event.amount"})
        second = node.live(SPEND, differs_from=node.live(SPEND))
        node.kafka.produce(node.topics[0], [event("ann", number) for number in range(3, 6)])
        assert [one["version"][:12] for one in node.inferences(6, model="spend")[3:]] == [second[:12]] * 3
        assert [one["version"][:12] for one in node.inferences(6, model="sums")] == [first[:12]] * 6
        assert node.status()["partitions"][0]["reason"] == ""
    finally:
        node.kill()
