"""A whole node and models that go bad: on one row, or on most."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from node_support import MANIFEST, Kafka, Node, drop, event, headers, linear, status_file, stopped_after, wait_until
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from hostile_making import ALLOW_GLOBALS, TRIGGER, Target, evaluated, pair, program  # isort: skip

EVENTS = 300
POISON = 117
PARTITIONS = 2


def of_channel(handle_unknown: str) -> Any:
    """Gives 5 for a channel that it does not know, or raises."""
    model = make_pipeline(OneHotEncoder(handle_unknown=handle_unknown), LinearRegression())
    model.fit(np.array([["web"], ["app"]] * 9, dtype=object), [4.0, 6.0] * 9)
    return model


def events_from(first: int, channel: str) -> list[dict[str, Any]]:
    return [
        event(f"c{number % 9}", number, amount=1000.0 + number, channel=channel)
        for number in range(first, first + EVENTS)
    ]


def scores(node: Node, model: str) -> Counter[float]:
    inferences = node.kafka.inferences(node.application, PARTITIONS)
    return Counter(round(one["outputs"]["score"], 6) for one in inferences if one["model"] == model)


def failed(node: Node, model: str) -> int:
    return node.counter(f"failed {model}")


def test_bad_rows_are_found_and_bad_versions_replaced(
    kafka: str, topic_names: Callable[[str], str], tmp_path: Path
) -> None:
    """A row that segfaults is alone a dead letter; what raises on most rows gives way to the version before it."""
    broker = Kafka(kafka)
    topic = broker.create(topic_names("events"), PARTITIONS)
    tenants = {"directory": "tenants", "settle_ms": 20, "rescan_s": 1, "allow_globals": list(ALLOW_GLOBALS)}
    node = Node(tmp_path / "node", broker, [topic], topic_names("node"), tenants=tenants)
    drop(node.models, "shop/spend", linear(2), {"amount": "event.amount"})
    drop(node.models, "shop/channel", of_channel("ignore"), {"channel": "event.channel"})
    crashing = program("ctypes.string_at(0)", Target(0, (), 0, 0, "", "", "", "", ""), at_load=False)
    pair(node.models / "bad", evaluated(crashing), MANIFEST + 'amount = "event.amount"\n', "crash")
    with stopped_after(node):
        node.start()
        good = node.live("shop/channel")
        for name in ("shop/spend", "bad/crash"):
            node.live(name)
        events = events_from(0, "web")
        events[POISON]["amount"] = TRIGGER
        broker.produce(topic, events, PARTITIONS)
        wait_until(lambda: failed(node, "bad/crash"), "the row is found")
        wait_until(lambda: scores(node, "crash") == Counter({0.0: EVENTS - 1}), "its neighbours have their outputs")
        (record,) = broker.records(f"{node.application}.dead-letters", PARTITIONS)
        assert headers(record)["model"] == "bad/crash"
        assert "lost 2 times with this row" in headers(record)["detail"]
        assert json.loads(record.value)["features"]["amount"] == TRIGGER

        drop(node.models, "shop/channel", of_channel("error"), {"channel": "event.channel"})
        node.live("shop/channel", differs_from=good)
        for batch in (1, 2):
            broker.produce(topic, events_from(batch * EVENTS, "moon"), PARTITIONS)
        told = wait_until(
            lambda: found if (found := status_file(node.models, "shop/channel"))["state"] == "quarantined" else {},
            "the version is quarantined",
        )
        assert "most rows" in " ".join(told["problems"])
        broker.produce(topic, events_from(3 * EVENTS, "moon"), PARTITIONS)
        wait_until(
            lambda: scores(node, "channel")[5.0] + failed(node, "shop/channel") == 3 * EVENTS, "all are answered"
        )
        assert scores(node, "channel")[5.0] >= EVENTS, "by the version before it"
        assert failed(node, "shop/channel") > 0
        spent = Counter(2 * one["amount"] for one in events)
        for batch in (1, 2, 3):
            spent.update(2 * one["amount"] for one in events_from(batch * EVENTS, "moon"))
        wait_until(lambda: scores(node, "spend") == spent, "nobody else was harmed")
