"""Training data of running nodes: the rows that models were fed, exported from Kafka and computed anew.

A node is killed and started again a few times on purpose, which takes most of the seconds.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiokafka import AIOKafkaProducer
from node_support import TIME_MS, Kafka, Node, drop, event, harness, linear, wait_until

from node.training.fed_rows import FedRows, decode, encode_rows

HEAD = 'on = ["transaction"]\nmethod = "predict"\noutput = "score"\nlog_rows = {share}\n[features]\n'
FEATURES = {"amount": "event.amount", "spent": "sum(transaction.amount, '1h')", "often": "count(transaction)"}
USING = {
    "spread": "coalesce(std(transaction.amount, '1d'), 0)",
    "some": "sum(transaction.amount, '2h', where=event.channel == 'c1')",
    "price": "tables.products[event.channel].price",
    "bid": "coalesce(models.ads.bid.score, 0)",
    "own": "coalesce(models.ads.use.score, -1)",
}
PARTITIONS = 2


def headrace(node: Node, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "node", *arguments, "--config", str(node.config)],
        cwd=harness.ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, f"{arguments}: {done.stdout}{done.stderr}\n{node.log_tail()}"
    return done.stdout if "--json" in arguments else done.stdout + done.stderr


@pytest.fixture
def node(kafka: str, tmp_path: Path, topic_names: Callable[[str], str]) -> Iterator[Node]:
    broker = Kafka(kafka)
    topics = [broker.create(topic_names(stem), PARTITIONS) for stem in ("first", "second")]
    one = Node(tmp_path / "node", broker, topics, topic_names("node"), cycle={"events_max": 50})
    yield one
    one.kill()


def stream(count: int, start: int = 0) -> list[dict[str, Any]]:
    """With every fifth event late by two hours or more, and every seventh the one before it once more."""
    events: list[dict[str, Any]] = []
    for number in range(start, start + count):
        one = event(f"customer{number % 7}", number, amount=number / 3, channel=f"c{number % 4}")
        if number % 5 == 0:
            one["time"] -= 7_200_000 + number
        if number % 7 == 0 and events:
            one = dict(events[-1])
        events.append(one)
    return events


def exported(node: Node, folder: Path, *arguments: str, model: str = "ads/bid") -> pa.Table:
    said = headrace(node, "export", "training", model, "--out", str(folder), *arguments)
    assert "rows" in said
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.iterdir())])


def test_each_row_is_exported_once_though_the_node_is_killed(node: Node, tmp_path: Path) -> None:
    drop(node.models, "ads/bid", linear(1, 2, 3), FEATURES, HEAD.format(share=1))
    drop(node.models, "ads/part", linear(1, 2, 3), FEATURES, HEAD.format(share=0.5))
    node.start()
    for part in range(2):
        for place, topic in enumerate(node.topics):
            node.kafka.produce(topic, stream(150, 1000 * part + 300 * place), PARTITIONS)
        node.inferences(100 + 600 * part, PARTITIONS)
        node.kill()
        node.start()
    inferences = {one["id"]: one for one in node.inferences(1200, PARTITIONS)}
    bids = {key: one for key, one in inferences.items() if one["model"] == "bid"}
    assert len(bids) == 600

    rows = exported(node, tmp_path / "whole").to_pylist()
    assert sorted(row["key.inference"] for row in rows) == sorted(bids)
    for row in rows:
        told = bids[row["key.inference"]]
        assert (row["key.customer"], row["key.topic"], row["key.offset"], row["outputs.score"]) == (
            told["customer"], told["topic"], told["offset"], told["outputs"]["score"]
        )  # fmt: skip
        fed = row["features.amount"] + 2 * row["features.spent"] + 3 * row["features.often"]
        assert fed == pytest.approx(row["outputs.score"], rel=1e-12)
    part = exported(node, tmp_path / "part", model="ads/part").to_pylist()
    customers = {row["key.customer"] for row in part}
    assert 0 < len(customers) < 7
    wanted = {one["offset"] for one in inferences.values() if one["model"] == "part" and one["customer"] in customers}
    assert {row["key.offset"] for row in part} == wanted

    from_ms, to_ms = TIME_MS + 50_000, TIME_MS + 1_200_000
    some = exported(node, tmp_path / "some", "--from", str(from_ms), "--to", str(to_ms)).to_pylist()
    inside = [key for key, one in bids.items() if from_ms <= one["time"] < to_ms]
    assert sorted(row["key.inference"] for row in some) == sorted(inside)
    assert inside
    assert "is there already" in headrace(node, "export", "training", "ads/bid", "--out", str(tmp_path), code=1)
    wait_until(lambda: node.counter("inferences ads/bid") == 600)
    assert node.counter("logged ads/bid") == 600


def checked(node: Node, model: str, code: int = 0) -> dict[str, Any]:
    said = headrace(node, "check-training", model, "--json", code=code)
    found: dict[str, Any] = json.loads(said)
    return found


def prices(folder: Path, step: int) -> str:
    path = folder / f"products{step}.csv"
    path.write_text("channel,price\n" + "".join(f"c{number},{number + step / 3}\n" for number in range(3)))
    return str(path)


def test_rows_computed_anew_are_the_same_and_a_changed_one_is_named(node: Node, tmp_path: Path) -> None:
    drop(node.models, "ads/bid", linear(1, 2, 3), FEATURES, HEAD.format(share=1))
    node.start()
    headrace(node, "table", "put", "products", prices(tmp_path, 1), "--key", "channel", "--default", "price=9")
    node.kafka.produce(node.topics[0], stream(100), PARTITIONS)
    drop(node.models, "ads/use", linear(1, 1, 1, 1, 0), USING, HEAD.format(share=1))
    node.live("ads/use")
    for part in range(1, 3):
        for place, topic in enumerate(node.topics):
            node.kafka.produce(topic, stream(150, 1000 * part + 70 * place), PARTITIONS)
        wait_until(lambda most=100 * part: node.counter("logged ads/use") > most, "some rows")
        node.kill()
        node.start()
        if part == 1:
            headrace(node, "table", "put", "products", prices(tmp_path, 2))
    wait_until(lambda: node.counter("inferences ads/bid") == 700, "all events")
    wait_until(lambda: node.counter("inferences ads/use") >= 600, "all events")

    for model in ("ads/bid", "ads/use"):
        found = checked(node, model)
        assert (found["different"], found["state_different"], found["unchecked"]) == (0, 0, {}), found
        assert found["compared"] == found["logged"] == node.counter(f"logged {model}")
        assert found["state_rows"] > 0
    status = node.get("/v1/models/ads/use")["versions"][0]["consistency"]
    assert (status["share"], status["different"], status["compared"]) == (1.0, 0, found["compared"])

    both = node.topics
    node.configure_topics(both[:1])
    found = checked(node, "ads/bid")
    assert (found["different"], found["state_different"]) == (0, 0), "where a topic is not read, nothing is told"
    assert found["unchecked"]
    node.configure_topics(both)

    changed = tampered(node, "ads/use", "bid")
    found = checked(node, "ads/use", code=1)
    assert found["different"] == 1
    (difference,) = found["differences"]
    assert (difference["inference"], difference["column"]) == (changed, "features.bid")
    assert difference["fed"] == np.nextafter(difference["computed"], np.inf)
    status = node.get("/v1/models/ads/use")["versions"][0]["consistency"]
    assert status["share"] == 1 - 1 / status["compared"]
    with urllib.request.urlopen(node.url + "/metrics", timeout=10) as answer:
        metrics = answer.read().decode()
    assert 'headrace_training_rows_different{model="use",tenant="ads"} 1.0' in metrics


def tampered(node: Node, model: str, column: str) -> str:
    """Put a record of the model into the rows topic once more, one value of it a bit larger; its inference."""
    rows_topic = f"{node.application}.rows"
    for record in node.kafka.records(rows_topic, PARTITIONS):
        rows = decode(record.value)
        if record.key == model.encode() and isinstance(rows, FedRows):
            place = rows.triggers.rows.names.index(column)
            numbers = rows.triggers.rows.numbers.copy()
            at = np.flatnonzero(np.isfinite(numbers[:, place]))
            if len(at):
                break
    numbers[at[0], place] = np.nextafter(numbers[at[0], place], np.inf)
    fed = replace(rows.triggers, rows=replace(rows.triggers.rows, numbers=numbers))
    value = encode_rows(replace(rows, triggers=fed))

    async def send() -> None:
        producer = AIOKafkaProducer(bootstrap_servers=node.kafka.address)
        await producer.start()
        await producer.send_and_wait(rows_topic, value, record.key, partition=record.partition)
        await producer.stop()

    asyncio.run(send())
    topic, offset = fed.event_names.topics[int(fed.topics[at[0]])], fed.offsets[at[0]]
    return f"{model}/{topic}/{record.partition}/{offset}"
