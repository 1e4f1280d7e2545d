"""Flips of a table of 92,331 products on three nodes under 20,000 events a second, kill -9 amid them, and costs.

Every row of a version has the same two numbers, so a row fed from two versions shows in the output of a model, and two
models on each event show whether they were fed alike. `mixed_versions` counts inferences whose output is of another
version than they name, and events whose inferences name two.

A pause is the longest gap between two appends of inferences to any partition while the table changes: from the begin
of the command, so with the upload, its check, the build and the fetching, until a second after all nodes have it.
After each change the same is measured for as long without one. `pause_ms_max` is the longest pause of a change less
the median of those without; `load_alone_pause_ms_max` in `detail` is the longest of those without less that same
median: what is not above it is not the flips' doing. All pauses are there too, uploads and rollbacks apart: a
rollback is a flip alone.

Clients run at the lowest priority: they stand for another machine. `detail` has the rate reached, each kill, and the
costs of look-ups in a table of 5,000,000 rows, in one process.
"""

from __future__ import annotations

import asyncio
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cluster
import harness
import numpy as np
import traffic
import workload

sys.path.insert(0, str(harness.ROOT))

AIMS = {"mixed_versions": "= 0", "pause_ms_max": "<= 50"}
PRODUCTS = 92_331
NAMES = ("node-0", "node-1", "node-2")
KEY = f"floor(coalesce(event.amount, 0) * 997) % {PRODUCTS}"
FEATURES = {name: f"tables.products[{KEY}].{name}" for name in ("price", "again")}
MODELS = ("first", "second")
SETTLED_MS = 1_000
"""After a change, what is still counted as its doing."""
CLIENT_NICENESS = 19
LIVE_S_MAX = 120.0
WARM_S, WARM_S_QUICK = 240.0, 5.0
"""Under the load before anything counts. The broker still compiles itself after two minutes, in bursts in which it
takes two or three times its processor for up to half a second: all partitions wait, change or no change."""
ROWS, ROWS_QUICK = 5_000_000, 200_000
BATCH_EVENTS = 4_000


def catalogue(folder: Path, step: int) -> Path:
    path = folder / f"products-{step}.csv"
    path.write_text("id,price,again\n" + "".join(f"{number},{step},{step}\n" for number in range(PRODUCTS)))
    return path


def put_models(directory: Path) -> None:
    import joblib
    from sklearn.linear_model import LinearRegression

    model = LinearRegression()
    model.coef_, model.intercept_, model.n_features_in_, model.rank_ = np.array([1000.0, 1.0]), 0.0, 2, 2
    lines = "\n".join(f'{name} = "{expression}"' for name, expression in FEATURES.items())
    (directory / "shop").mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        stream = io.BytesIO()
        joblib.dump(model, stream)
        (directory / "shop" / f"{name}.joblib").write_bytes(stream.getvalue())
        head = 'on = ["transaction"]\nmethod = "predict"\noutput = "score"\n[features]\n'
        (directory / "shop" / f"{name}.toml").write_text(head + lines + "\n")


def table(node: harness.Node, *arguments: str) -> subprocess.Popen[bytes]:
    nice = ["nice", "-n", str(CLIENT_NICENESS)]
    asked = [*nice, sys.executable, "-m", "node", "table", *arguments, "--config", str(node.config)]
    return subprocess.Popen(asked, cwd=harness.ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def lives(nodes: cluster.Cluster) -> set[str]:
    """The version that each living node has live."""
    found = set()
    for node in nodes.nodes.values():
        if node.started and not node.ended:
            try:
                found |= {one["live"] for one in cluster.get(f"{node.url}/v1/tables")["tables"]} or {""}
            except OSError:
                found.add("")
    return found


def flip(nodes: cluster.Cluster, before: str, *arguments: str, victim: str = "", after_s: float = 0.0) -> str:
    """Change the table by a command and wait until all nodes have one other version; it. With a victim, that node is
    killed so long after the command began, and started again."""
    changing = table(nodes.nodes["node-0"], *arguments)
    if victim:
        time.sleep(after_s)
        nodes.nodes[victim].kill()
        nodes.nodes[victim].start()
    if changing.wait(LIVE_S_MAX):
        raise RuntimeError(f"headrace table {' '.join(arguments)} failed")
    nodes.wait(lambda: len(found := lives(nodes)) == 1 and found.isdisjoint({"", before}), "one version", LIVE_S_MAX)
    (version,) = lives(nodes)
    return version


def mixed(inferences: Sequence[Mapping[str, Any]], outputs: Mapping[str, float]) -> int:
    """Inferences that are not of the version they name, and events whose inferences name two."""
    wrong, named = 0, defaultdict(set)
    for one in inferences:
        version = one["tables"]["products"]
        wrong += one["outputs"]["score"] != outputs.get(version)
        named[one["partition"], one["offset"]].add(version)
    return wrong + sum(len(versions) > 1 for versions in named.values())


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the table, in Unix ms: all nodes had it at `end_ms`."""

    kind: str
    begin_ms: float
    end_ms: float

    @property
    def alone_ms(self) -> float:
        """From the end on: with what is its doing, and as long as that and itself without it."""
        return 2 * SETTLED_MS + self.end_ms - self.begin_ms


def longest_gap_ms(appends: Iterable[Sequence[int]], begin_ms: float, end_ms: float) -> float:
    """Of any partition, the longest time without an append that overlaps the time given."""
    longest = 0.0
    for appended in appends:
        times = np.unique(np.asarray(appended))
        gaps, ends = np.diff(times), times[1:]
        longest = max(longest, float(gaps[(ends > begin_ms) & (ends - gaps < end_ms)].max(initial=0)))
    return longest


def pauses(changes: Sequence[Change], appends: Mapping[int, Sequence[int]]) -> tuple[float, dict[str, object]]:
    """The longest pause of a change less the median of those without one, and all that were measured."""
    found: dict[str, list[float]] = {"load_alone": []}
    for change in changes:
        with_it = longest_gap_ms(appends.values(), change.begin_ms, change.end_ms + SETTLED_MS)
        found.setdefault(change.kind, []).append(round(with_it))
        alone_ms = longest_gap_ms(appends.values(), change.end_ms + SETTLED_MS, change.end_ms + change.alone_ms)
        found["load_alone"].append(round(alone_ms))
    usual = statistics.median(found["load_alone"])
    longest = max(one for kind, measured in found.items() if kind != "load_alone" for one in measured)
    alone = max(found["load_alone"]) - usual
    detail = {"pauses_ms": found, "usual_pause_ms": usual, "load_alone_pause_ms_max": alone}
    detail["change_ms"] = [round(change.end_ms - change.begin_ms) for change in changes]
    return max(0.0, longest - usual), detail


async def read_back(address: str, topic: str) -> tuple[list[dict[str, Any]], dict[int, list[int]]]:
    """All inferences that name a table, and the append times of each partition."""
    from aiokafka import AIOKafkaConsumer, TopicPartition

    consumer = AIOKafkaConsumer(bootstrap_servers=address, isolation_level="read_committed")
    await consumer.start()
    places = [TopicPartition(topic, number) for number in range(workload.PARTITIONS)]
    found: list[dict[str, Any]] = []
    appends: dict[int, list[int]] = {place.partition: [] for place in places}
    try:
        ends = await consumer.end_offsets(places)
        consumer.assign(places)
        await consumer.seek_to_beginning()
        while any([await consumer.position(place) < ends[place] for place in places]):
            for place, records in (await consumer.getmany(timeout_ms=200)).items():
                appends[place.partition] += [record.timestamp for record in records]
                found += [json.loads(record.value) for record in records if b'"tables"' in record.value]
    finally:
        await consumer.stop()
    return found, appends


def costs(folder: Path, rows: int) -> dict[str, object]:
    """Of a table of `rows` rows: building, opening, memory, and look-ups of a price and a brand."""
    import pyarrow as pa
    import pyarrow.parquet

    from node.tables.version_file import VersionFile

    source, target = folder / "large.parquet", folder / "large"
    numbers = range(rows)
    columns = {"sku": [f"SKU{number:09d}" for number in numbers], "brand": [f"b{number % 5000}" for number in numbers]}
    random = np.random.default_rng(workload.SEED)
    pyarrow.parquet.write_table(pa.table({**columns, "price": random.random(rows)}), source)
    order: dict[str, object] = {"source": str(source), "format": "parquet", "target": str(target)}
    order |= {"scratch": str(folder), "memory_mb": 4096, "key": "sku"}
    started = time.monotonic()
    program = [sys.executable, "-c", _MEASURED]
    done = subprocess.run(program, input=json.dumps(order).encode(), capture_output=True, cwd=harness.ROOT, check=True)
    seconds, peak_kb = time.monotonic() - started, int(done.stderr.split()[-1])
    started = time.monotonic()
    version = VersionFile(target, "large")
    opened_ms = (time.monotonic() - started) * 1000
    found: dict[str, object] = {"rows": rows, "build_s": round(seconds, 2), "build_memory_mb": round(peak_kb / 1024)}
    found |= {"file_mb": round(target.stat().st_size / 1e6), "open_ms": round(opened_ms, 1)}
    for skew, drawn in (("zipf", random.zipf(1.1, 200_000) % rows), ("uniform", random.integers(0, rows, 200_000))):
        keys = np.array([columns["sku"][number] for number in drawn.tolist()], dtype=object)
        batches = [keys[at : at + BATCH_EVENTS] for at in range(0, len(keys), BATCH_EVENTS)]
        distinct = sum(len(set(batch.tolist())) for batch in batches)
        started = time.monotonic()
        for batch in batches:
            places = version.rows(batch)
            version.column("price", places)
            version.column("brand", places)
        spent = (time.monotonic() - started) * 1e6
        found[f"{skew}_us_per_event"] = round(spent / len(keys), 3)
        found[f"{skew}_us_per_distinct_key"] = round(spent / distinct, 3)
    return found


_MEASURED = """import pathlib, re, sys
from node.tables.build import main
code = main()
status = pathlib.Path("/proc/self/status").read_text()
print(re.search(r"VmHWM:\\s+([0-9]+) kB", status)[1], file=sys.stderr)
sys.exit(code)"""
"""Of this program alone: `ru_maxrss` would begin with what the benchmark has that started it."""


def main(quick: bool) -> harness.Result:
    rate, rounds, kills = (2_000, 2, (0.5,)) if quick else (20_000, 4, (0.2, 0.8, 1.4, 2.0))
    warm_s = WARM_S_QUICK if quick else WARM_S
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as name:
        folder = Path(name)
        with harness.broker(folder / "kafka") as broker:
            asyncio.run(workload.create_topic(broker.address, "events"))
            settings = {"message.timestamp.type": "LogAppendTime"}
            asyncio.run(workload.create_topic(broker.address, "tables.inferences", settings=settings))
            start = {"cycle": {"start_from": "latest"}}
            with cluster.running(folder, NAMES, broker.address, "events", "tables", start, models=False) as nodes:
                outputs, detail, changes = drive(nodes, folder, broker.address, rate, warm_s, rounds, kills)
            inferences, appends = asyncio.run(read_back(broker.address, "tables.inferences"))
        detail["large_table"] = costs(folder, ROWS_QUICK if quick else ROWS)
    pause_ms, measured = pauses(changes, appends)
    detail |= {"inferences": len(inferences), "products": PRODUCTS, **measured}
    return harness.Result({"mixed_versions": mixed(inferences, outputs), "pause_ms_max": round(pause_ms, 1)}, detail)


def drive(
    nodes: cluster.Cluster, folder: Path, address: str, rate: int, warm_s: float, rounds: int, kills: Sequence[float]
) -> tuple[dict[str, float], dict[str, Any], list[Change]]:
    """Flips without kills, then with; each version's output, the detail, and the changes without kills."""
    key = ("--key", "id")
    # Before there is traffic: writing them would hold up the thread that sends it.
    files = {step: str(catalogue(folder, step)) for step in range(1, 2 + rounds + len(kills))}
    version = flip(nodes, "none", "put", "products", files[1], *key)
    outputs = {version: 1001.0}
    put_models(nodes.tenants(NAMES[0]))
    cluster.wait_for_models(nodes.nodes.values(), len(MODELS), LIVE_S_MAX)
    nodes.wait_until_settled(workload.PARTITIONS, 1, 20, LIVE_S_MAX)
    changes: list[Change] = []
    with traffic.Traffic(address, "events", "tables.inferences", rate) as driven:
        driven.watch(time.time_ns() // 1_000_000)
        driven.wait(frozenset(range(workload.PARTITIONS)), LIVE_S_MAX)
        time.sleep(warm_s)
        begun, sent, read = time.monotonic(), driven.sent, driven.read

        def change(kind: str, *arguments: str) -> str:
            begin_ms = time.time() * 1000
            live = flip(nodes, version, kind, "products", *arguments)
            changes.append(Change(kind, begin_ms, time.time() * 1000))
            time.sleep(changes[-1].alone_ms / 1000)
            return live

        for step in range(2, 2 + rounds):
            version = change("put", files[step], *key)
            outputs[version] = 1001.0 * step
            version = change("rollback")
        seconds = time.monotonic() - begun
        detail: dict[str, Any] = {"events_per_s_aimed": rate, "events_per_s": round((driven.sent - sent) / seconds)}
        detail["inferences_read_per_s"] = round((driven.read - read) / seconds)
        for number, after_s in enumerate(kills, 2 + rounds):
            victim = NAMES[number % len(NAMES)]
            arguments = ("put", "products", files[number], *key)
            version = flip(
                nodes, version, *arguments, victim=victim if victim != NAMES[0] else NAMES[1], after_s=after_s
            )
            outputs[version] = 1001.0 * number
            nodes.wait_until_settled(workload.PARTITIONS, 1, 1000, LIVE_S_MAX)
        detail["kills_after_s"] = list(kills)
    return outputs, detail, changes
