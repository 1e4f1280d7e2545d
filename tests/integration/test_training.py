"""Training data of running nodes: the rows that models were fed, exported from Kafka and computed anew."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from node_support import TIME_MS, Kafka, Node, drop, event, harness, linear, wait_until

HEAD = 'on = ["transaction"]\nmethod = "predict"\noutput = "score"\nlog_rows = {share}\n[features]\n'
FEATURES = {"amount": "event.amount", "spent": "sum(transaction.amount, '1h')", "often": "count(transaction)"}
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
    return done.stdout + done.stderr


@pytest.fixture
def node(kafka: str, tmp_path: Path, topic_names: Callable[[str], str]) -> Iterator[Node]:
    broker = Kafka(kafka)
    topics = [broker.create(topic_names(stem), PARTITIONS) for stem in ("first", "second")]
    one = Node(tmp_path / "node", broker, topics, topic_names("node"))
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
