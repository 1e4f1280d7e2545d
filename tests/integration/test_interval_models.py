"""Interval models in a whole node on real Kafka: each customer once an interval, also when the node is killed."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from typing import Any

from node_support import TIME_MS, Node, drop, event, headers, linear, slow, wait_until

PARTITIONS = 2
SPENT = {"spent": "sum(transaction.amount)", "recent": "count(transaction, '1h')"}
FEATURES = "[features]\n"


def head(*lines: str) -> str:
    return "\n".join([*lines, 'method = "predict"', FEATURES])


def runs(node: Node, model: str) -> list[dict[str, Any]]:
    partitions = node.status().get("partitions", [])
    return [found for one in partitions if (found := one["intervals"].get(model))]


def test_each_customer_has_one_inference_an_interval_whatever_is_killed(node: Node) -> None:
    """A short interval by the clock, over all customers; kills while runs are under way."""
    model = "shop/reorder"
    customers = [f"c{number:04}" for number in range(1200)]
    node.kafka.produce(node.topics[0], [event(name, 1) for name in customers], PARTITIONS)
    node.start()
    wait_until(lambda: node.counter("events") == len(customers), "all customers are known")
    drop(node.models, model, slow(linear(1), 20), {"seen": "profile.events"}, head('every = "1s"', "all = true"))
    node.live(model)
    for _ in range(2):
        seen = node.counter(f"inferences {model}")
        wait_until(lambda seen=seen: node.counter(f"inferences {model}") > seen, "a run is under way")  # type: ignore[misc]
        node.kill()
        node.start()
    whole = node.counter(f"intervals {model}") + 2 * PARTITIONS
    wait_until(lambda: node.counter(f"intervals {model}") >= whole, "runs after the kills")
    assert node.stop() == 0
    inferences = node.kafka.inferences(node.application, PARTITIONS)
    assert not [identity for identity, count in Counter(one["id"] for one in inferences).items() if count > 1]
    by_run: defaultdict[tuple[int, int], list[str]] = defaultdict(list)
    for one in inferences:
        assert one["id"] == f"{model}/interval/{one['interval']}/{one['customer']}"
        assert one["time"] == one["interval"]
        assert one["interval"] % 1000 == 0
        assert one["outputs"] == {"score": 1.0}
        by_run[one["partition"], one["interval"]].append(one["customer"])
    for partition in range(PARTITIONS):
        mine = [sorted(names) for (number, _), names in sorted(by_run.items()) if number == partition]
        assert len(mine) >= 2
        everybody = mine[0]
        assert all(names == everybody for names in mine[:-1]), "a run left somebody out"
        assert set(mine[-1]) <= set(everybody), "the last one may have been stopped half-way"
    assert {name for names in by_run.values() for name in names} == set(customers)


def test_by_event_time_those_with_events_are_run_over_once_their_window_is_closed(node: Node) -> None:
    model = "shop/window"
    drop(node.models, model, linear(1, 100), SPENT, head('every = "1h"', 'by = "event"', 'grace = "5m"'))
    drop(node.models, "ads/uses", linear(1), {"score": "models.shop.window.score"}, head('on = ["search"]'))
    node.start()
    node.live(model)
    node.live("ads/uses")
    hour_s = 3600
    start_s = TIME_MS // 1000 // hour_s * hour_s - TIME_MS // 1000

    def send(name: str, at_s: int, kind: str = "transaction") -> None:
        node.kafka.produce(node.topics[0], [{**event(name, start_s + at_s, kind), "amount": 1}], 1)

    def finished(count: int) -> None:
        wait_until(lambda: node.counter(f"intervals {model}") == count, f"{count} windows closed")

    send("ann", 600)
    wait_until(lambda: runs(node, model), "the first events are seen")
    send("bob", hour_s - 1)
    send("ann", hour_s + 299)
    wait_until(lambda: node.counter("events") == 3, "events taken")
    assert node.counter(f"intervals {model}") == 0
    node.kill()
    node.start()
    send("cat", hour_s + 1200)
    finished(1)
    send("cat", 2 * hour_s + 300)
    finished(2)
    send("dan", 3 * hour_s + 300)
    finished(3)
    found = sorted(
        (one["interval"] - TIME_MS - 1000 * start_s, one["customer"], one["outputs"]["score"])
        for one in node.inferences(5, PARTITIONS, "window")
    )
    hour_ms = hour_s * 1000
    assert found == [
        (hour_ms, "ann", 2 + 100),
        (hour_ms, "bob", 1 + 100),
        (hour_ms, "cat", 1),
        # cat's second event came after the first run: it was run over again, as of the end of the hour before it.
        (2 * hour_ms, "cat", 2 + 100),
        (3 * hour_ms, "dan", 1),
    ]
    send("bob", 3 * hour_s + 301, "search")
    assert node.inferences(1, PARTITIONS, "uses")[0]["outputs"]["score"] == 101


def test_what_a_model_fails_on_is_a_dead_letter_once_and_status_tells_of_runs(node: Node) -> None:
    model = "shop/reorder"
    drop(node.models, model, linear(1, 0), {**SPENT, "spent": "last(transaction.amount)"}, head('every = "1s"'))
    node.start()
    node.live(model)
    # A customer without transactions has no last amount: the model raises on NaN.
    node.kafka.produce(node.topics[0], [event("ann", 1), event("bob", 2, kind="search")], 1)
    node.inferences(1, PARTITIONS)
    letters = wait_until(lambda: node.kafka.records(f"{node.application}.dead-letters", PARTITIONS), "a letter")
    more = node.counter(f"intervals {model}") + 2 * PARTITIONS
    wait_until(lambda: node.counter(f"intervals {model}") >= more, "further runs")
    letters = node.kafka.records(f"{node.application}.dead-letters", PARTITIONS)
    assert [record.key for record in letters] == [b"bob"]
    told = headers(letters[0])
    assert (told["reason"], told["model"], told["source_topic"]) == ("model_failed", model, "")
    assert [one["customer"] for one in node.kafka.inferences(node.application, PARTITIONS)] == ["ann"]
    assert all(one["due_ms"] % 1000 == 0 for one in runs(node, model))
    assert abs(max(one["due_ms"] for one in runs(node, model)) - time.time() * 1000) < 20_000
    (info,) = node.get("/v1/models")["models"]
    assert info["schedule"] == {
        "every_ms": 1000, "at_ms": 0, "zone": "UTC", "by": "clock", "grace_ms": 0, "all": False, "gap_ms": 0
    }  # fmt: skip
    assert info["events"] == []


def test_each_closed_session_has_one_inference_whatever_is_killed(node: Node) -> None:
    """Sessions that the customer's next ends, in one micro-batch or another, and sessions that time ends."""
    model = "shop/visit"
    features = {"events": "count(any, session='10m')", "ever": "profile.events"}
    drop(node.models, model, linear(1, 1000), features, head("session = '10m'", "every = '1m'"))
    drop(node.models, "ads/uses", linear(1), {"score": "models.shop.visit.score"}, head('on = ["search"]'))
    node.start()
    node.live(model)
    node.live("ads/uses")
    start_s = 3600 - TIME_MS // 1000 % 3600
    node.kafka.produce(node.topics[0], [event(f"first{one}", start_s) for one in range(8)], PARTITIONS)
    wait_until(lambda: len(runs(node, model)) == PARTITIONS, "the first events are seen")
    customers = [f"c{number:03}" for number in range(150)]
    expected: dict[tuple[str, int], float] = {}
    """(customer, when the session began) -> the model's output."""
    for visit in range(6):
        # Of three events, two minutes apart, 15 minutes after the visit before; every second customer leaves one out.
        begin_s = start_s + 60 + 19 * 60 * visit
        sent = []
        for at_s in (0, 120, 240):
            for number, name in enumerate(customers):
                if (number + visit) % 2 and at_s == 240:
                    continue
                sent.append(event(name, begin_s + at_s))
        for number, name in enumerate(customers):
            before = expected.get((name, TIME_MS + 1000 * (begin_s - 19 * 60)), 0.0)
            count = 2 if (number + visit) % 2 else 3
            expected[name, TIME_MS + 1000 * begin_s] = count + 1000 * (before // 1000 + count)
        node.kafka.produce(node.topics[0], sent, PARTITIONS)
        if visit in (1, 4):
            wait_until(lambda visit=visit: node.counter(f"inferences {model}") > 150 * visit - 75, "sessions close")  # type: ignore[misc]
            node.kill()
            node.start()
    node.kafka.produce(
        node.topics[0], [event(f"last{one}", start_s + 200 * 60, "transaction") for one in range(8)], PARTITIONS
    )
    wait_until(lambda: node.counter(f"inferences {model}") >= len(expected) + 8, "all have closed")
    node.kafka.produce(node.topics[0], [event(customers[0], start_s + 201 * 60, "search")], PARTITIONS)
    (used,) = node.inferences(1, PARTITIONS, "uses")
    assert node.stop() == 0
    found: Counter[tuple[str, int]] = Counter()
    for one in node.kafka.inferences(node.application, PARTITIONS):
        if one["model"] != "visit" or one["customer"].startswith("first"):
            continue
        assert one["id"] == f"{model}/session/{one['session']}/{one['customer']}"
        assert one["outputs"]["score"] == expected[one["customer"], one["session"]]
        found[one["customer"], one["session"]] += 1
    assert found == dict.fromkeys(expected, 1)
    assert used["outputs"]["score"] == expected[customers[0], max(at for name, at in expected if name == customers[0])]
