"""The benchmarks' own ground: the workload is the one that is stated, and the harness measures what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from node.config import load_config
from tenants.manifest import parse_manifest

BENCH = Path(__file__).resolve().parent.parent.parent / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

import harness  # noqa: E402
import workload  # noqa: E402

COUNT = 150_000


@pytest.fixture(scope="module")
def zipf() -> list[workload.Events]:
    return list(workload.generate(COUNT))


def test_events_are_of_the_stated_size_types_and_order(zipf: list[workload.Events]) -> None:
    assert [len(chunk) for chunk in zipf] == [100_000, 50_000]
    values = [value for chunk in zipf for value in chunk.values]
    assert min(map(len, values)) >= 120
    assert max(map(len, values)) <= 150
    shares = np.bincount(np.concatenate([chunk.types for chunk in zipf])) / COUNT
    assert np.allclose(shares, 1 / 3, atol=0.01)
    assert (np.diff(np.concatenate([chunk.times_ms for chunk in zipf])) >= 0).all()


def test_each_event_says_what_its_columns_say(zipf: list[workload.Events]) -> None:
    for chunk in zipf:
        for index in range(0, len(chunk), 997):
            event = json.loads(chunk.values[index])
            assert event["type"] == workload.TYPES[chunk.types[index]]
            assert event["customer"].encode() == workload.customer_key(int(chunk.customers[index]))
            assert event["time"] == chunk.times_ms[index]
            assert (event["type"] == "transaction") == ("amount" in event)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    first, again, other = (next(workload.generate(1000, seed=seed)).values for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize(("skew", "low", "high"), [("zipf", 0.10, 0.18), ("uniform", 0.0, 0.001), ("hot", 0.54, 0.60)])
def test_the_busiest_customer_has_the_stated_share(skew: workload.Skew, low: float, high: float) -> None:
    events = next(workload.generate(100_000, skew))
    _, counts = np.unique(events.customers, return_counts=True)
    assert low <= counts.max() / len(events) <= high


def test_the_node_takes_the_configuration_and_the_manifests(tmp_path: Path) -> None:
    path = workload.config(tmp_path / "node.toml", "127.0.0.1:9092", "events", 8123, settings={"cycle": {"wait_ms": 7}})
    config = load_config(path)
    assert (config.cycle.wait_ms, config.cycle.commit_interval_ms, config.http.port) == (7, 100, 8123)
    for tenant, model, event, _ in workload.MODELS:
        text = workload.manifest(event).encode()
        manifest = parse_manifest(f"{model}.toml", tenant, model, text, config.schema())
        assert manifest.events == (event,)
        assert len(manifest.features) == len(manifest.aggregates) == 10


def test_aims_are_met_or_not_as_they_read() -> None:
    aims = {"speed": ">= 10", "lost": "= 0", "late_ms": "<= 50", "absent": "<= 1", "undefined": "<= 1"}
    values = {"speed": 10.0, "lost": 1, "late_ms": 50.1, "undefined": float("nan")}
    found = harness.evaluated(values, aims)
    assert [name for name in aims if found[name]["met"]] == ["speed"]
    assert found["undefined"]["value"] is None
    with pytest.raises(ValueError, match="unknown"):
        harness.evaluated({"unknown": 1}, aims)


def test_cpu_of_children_is_counted_living_and_dead() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    before = harness.tree_cpu(os.getpid())
    living = subprocess.Popen(
        [sys.executable, "-c", burn + "print('burnt', flush=True)\nimport sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with living:
        assert living.stdout is not None
        assert living.stdout.readline() == b"burnt\n"
        while_living = harness.tree_cpu(os.getpid()) - before
    after_death = harness.tree_cpu(os.getpid()) - before
    assert while_living.below_s >= 0.28
    assert after_death.below_s >= while_living.below_s
    assert harness.tree_cpu(os.getpid()).own_s >= before.own_s


def test_cpu_of_a_process_that_is_gone_is_an_error() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait(30)
    with pytest.raises(ProcessLookupError):
        harness.tree_cpu(child.pid)
