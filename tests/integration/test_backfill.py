"""History in a whole node on real Kafka: windows are those of a model there from the start, also after kills."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

from aiokafka import AIOKafkaProducer
from node_support import MANIFEST, TIME_MS, Kafka, Node, drop, event, linear, wait_until

from node.config import parse_config
from node.ingest.decode import EventDecoder
from node.ingest.history import TopicHistory
from node.kernel.backfills import Fill
from node.kernel.clock import SystemClock

PARTITIONS = 2
CUSTOMERS = [f"c{number:02}" for number in range(40)]
HISTORY = 30_000
HEAD = MANIFEST.removesuffix("[features]\n")
COLUMNS = {
    "spent": "sum(transaction.amount, '1h')",
    "ever": "mean(transaction.amount)",
    "odd": "count(transaction, '1d', where=event.channel == 'web')",
}


def events(first: int, count: int) -> list[dict[str, Any]]:
    return [
        event(CUSTOMERS[number * 7 % len(CUSTOMERS)], number, channel="web" if number % 3 else "app")
        for number in range(first, first + count)
    ]


def backfill(node: Node, model: str) -> dict[str, Any]:
    """As /v1/models tells it; empty while nobody answers, or the model is not there yet."""
    with contextlib.suppress(OSError):
        return node.get(f"/v1/models/{model}")["versions"][0].get("backfill") or {}
    return {}


def head(until: str) -> str:
    return HEAD + f'[backfill]\nfrom = "all"\nuntil = "{until}"\n[features]\n'


def test_filled_windows_are_those_of_a_model_there_from_the_start_whatever_is_killed(node: Node) -> None:
    """`ads/first` is there before any event; the others come later, one marked and one held, and the node is killed
    amid the fill, while events go on. Once filled, all three say the same of every event."""
    drop(node.models, "ads/first", linear(1, 3, 7), COLUMNS)
    node.start()
    node.live("ads/first")
    node.kafka.produce(node.topics[0], events(0, HISTORY), PARTITIONS)
    wait_until(lambda: node.counter("events") == HISTORY, "history is taken in")
    drop(node.models, "ads/marked", linear(1, 3, 7), COLUMNS, head("marked"))
    drop(node.models, "ads/held", linear(1, 3, 7), COLUMNS, head("held"))
    amid = []
    for number in range(3):
        told = wait_until(lambda: found if (found := backfill(node, "ads/held")).get("events") else {}, "history comes")
        node.kill()
        amid.append(told["warming"] and told["percent"] < 100)
        node.kafka.produce(node.topics[0], events(HISTORY + 40 * number, 40), PARTITIONS)
        node.start()
    for model in ("ads/marked", "ads/held"):
        wait_until(lambda model=model: backfill(node, model).get("warming") is False, f"{model} is filled")  # type: ignore[misc]
        told = backfill(node, model)
        assert (told["percent"], told["lost"], told["floor_ms"]) == (100.0, 0, 0)
        assert told["events"] >= HISTORY
    after = HISTORY + 120
    node.kafka.produce(node.topics[0], events(after, 200), PARTITIONS)
    wait_until(lambda: node.counter("events") == after + 200, "the last events are taken in")
    wait_until(lambda: node.backlog() == 0, "all are answered")
    assert node.stop() == 0
    found: dict[str, dict[tuple[int, int], dict[str, Any]]] = {"first": {}, "marked": {}, "held": {}}
    for one in node.kafka.inferences(node.application, PARTITIONS):
        at = (one["partition"], one["offset"])
        assert at not in found[one["model"]], "exactly once"
        found[one["model"]][at] = one
    assert len(found["first"]) == after + 200
    assert not any("warming" in one for model in ("first", "held") for one in found[model].values())
    filled = {at for at, one in found["marked"].items() if "warming" not in one}
    assert len(filled) >= 200
    for at in filled | found["held"].keys():
        same = {model: found[model][at]["outputs"] for model in found if at in found[model]}
        assert all(outputs == same["first"] for outputs in same.values()), (at, same)
    assert len(found["held"]) >= 200
    assert any(amid), "none of the kills came amid the fill"
    assert any("warming" in one for one in found["marked"].values())


async def test_history_of_several_topics_comes_by_time_in_chunks_from_a_time_on_and_tells_what_is_gone(
    kafka: str, topic_names: Callable[[str], str]
) -> None:
    broker, clock = Kafka(kafka), SystemClock()
    topics = [topic_names("a"), topic_names("b")]
    for topic in topics:
        await asyncio.to_thread(broker.create, topic)
    async with AIOKafkaProducer(bootstrap_servers=kafka) as producer:
        for number in range(20):  # the same times in both, every other one
            for place, topic in enumerate(topics):
                if place == 0 or number % 2 == 0:
                    sent = json.dumps(event(f"{place}", number)).encode()
                    await producer.send_and_wait(topic, sent, partition=0, timestamp_ms=TIME_MS + number)
    config = parse_config('[events]\ntypes = ["transaction"]\n[events.fields]\namount = "number"\n', Path.cwd())
    reader = TopicHistory({"bootstrap_servers": kafka}, topics, 0, EventDecoder(config.events), clock)
    target = {topics[0]: 18, topics[1]: 10}

    async def all_of(fill: Fill, events_max: int) -> tuple[list[tuple[str, int]], Fill, int, int]:
        found: list[tuple[str, int]] = []
        floor_ms = lost = 0
        while not fill.progress or fill.progress != target:
            history = await reader.read(fill, target, events_max)
            part = history.events
            found += [(part.customers[row], int(at)) for row, at in zip(part.rows, part.times_ms, strict=True)]
            assert len(part) <= events_max
            floor_ms, lost = max(floor_ms, history.floor_ms), lost + history.lost
            fill = replace(fill, progress=history.progress, starts=history.starts)
        return found, fill, floor_ms, lost

    def expected(first: int) -> list[tuple[str, int]]:
        return [
            (f"{place}", TIME_MS + 1000 * number)
            for number in range(first, 20)
            for place in (0, 1)
            if (place == 0 and number < 18) or (place == 1 and number % 2 == 0)
        ]

    try:
        assert await all_of(Fill((0,), 0), 1000) == (expected(0), ANY, 0, 0)
        assert await all_of(Fill((0,), 0), 4) == (expected(0), ANY, 0, 0)
        found, fill, *told = await all_of(Fill((0,), TIME_MS + 7), 4)
        assert (found, told) == (expected(7), [0, 0])
        assert dict(fill.starts) == {topics[0]: 7, topics[1]: 4}
        for topic, before in zip(topics, (12, 6), strict=True):
            await asyncio.to_thread(broker.cut, topic, {0: before})
        assert await all_of(Fill((0,), TIME_MS + 7), 4) == (expected(12), ANY, TIME_MS + 12, 0)
        await reader.close()
        begun = Fill((0,), TIME_MS + 7, progress={topics[0]: 9, topics[1]: 5}, starts=fill.starts)
        assert await all_of(begun, 4) == (expected(12), ANY, TIME_MS + 12, 4)
    finally:
        await reader.close()
