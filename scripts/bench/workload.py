"""The standard workload of every benchmark: events, models, and a node's configuration for them, from fixed seeds.

Events are JSON of 120 to 150 bytes, a third each search, add_to_cart and transaction, of 50,000 customers:
Zipf 1.1, uniform, or "hot" (one customer sends half, the rest is Zipf). Event times advance by 17 ms on
average, exponentially: each customer then sends some 100 events a day, so that windows hold what they would
in production, however fast the events are read.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Skew: TypeAlias = Literal["zipf", "uniform", "hot"]

SEED = 20_260_101
CUSTOMERS = 50_000
ZIPF_EXPONENT = 1.1
HOT_SHARE = 0.5
TYPES = ("search", "add_to_cart", "transaction")
EVENT_BYTES_MIN = 120
EVENT_BYTES_MAX = 150
FIRST_TIME_MS = 1_735_689_600_000
"""2025-01-01, UTC."""
GAP_MS_MEAN = 17.0
CHUNK_EVENTS = 100_000
PARTITIONS = 4
BATCH_BYTES_MAX = 512 * 1024
BROKER_S_MAX = 60.0

TEMPLATES = (
    b'{"type":"search","customer":"c%05d","time":%d,"channel":"web",'
    b'"query":"organic oat milk %d","results":%d,"page":1}',
    b'{"type":"add_to_cart","customer":"c%05d","time":%d,"channel":"app","sku":"sku-%05d","price":%d.49,"quantity":2}',
    b'{"type":"transaction","customer":"c%05d","time":%d,"channel":"store",'
    b'"sku":"sku-%05d","amount":%d.25,"items":3,"payment":"card"}',
)
NUMBER_RANGES = ((10_000, 100, 1000), (20_000, 10, 100), (20_000, 10, 1000))
"""By type: how many of the first number, and the range [low, high) of the second; digits keep the sizes in bounds."""


@dataclass(frozen=True, slots=True)
class Events:
    """Consecutive events: `values[i]` is of customer number `customers[i]`; `types[i]` indexes TYPES."""

    values: list[bytes]
    customers: NDArray[np.int64]
    types: NDArray[np.int64]
    times_ms: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.values)


def customer_key(customer: int) -> bytes:
    return b"c%05d" % customer


def partition_of(customer: int, partitions: int = PARTITIONS) -> int:
    """All events of a customer are in one partition, whatever the run."""
    return zlib.crc32(customer_key(customer)) % partitions


def generate(count: int, skew: Skew = "zipf", seed: int = SEED) -> Iterator[Events]:
    """`count` events in chunks of CHUNK_EVENTS; the same arguments give the same bytes."""
    random = np.random.default_rng(seed)
    numbers = random.permutation(CUSTOMERS)
    cumulative = np.cumsum(np.arange(1, CUSTOMERS + 1) ** -ZIPF_EXPONENT)
    time_ms = float(FIRST_TIME_MS)
    for first in range(0, count, CHUNK_EVENTS):
        size = min(CHUNK_EVENTS, count - first)
        if skew == "uniform":
            customers = random.integers(0, CUSTOMERS, size)
        else:
            ranks = np.searchsorted(cumulative, random.random(size) * cumulative[-1])
            customers = numbers[np.minimum(ranks, CUSTOMERS - 1)]
        if skew == "hot":
            customers = np.where(random.random(size) < HOT_SHARE, numbers[0], customers)
        times_ms = time_ms + np.cumsum(random.exponential(GAP_MS_MEAN, size))
        time_ms = float(times_ms[-1])
        yield formatted(random, customers, times_ms.astype(np.int64))


def formatted(random: np.random.Generator, customers: NDArray[np.int64], times_ms: NDArray[np.int64]) -> Events:
    types = random.integers(0, len(TYPES), len(customers))
    values = np.empty(len(customers), dtype=object)
    for kind, (template, (names, low, high)) in enumerate(zip(TEMPLATES, NUMBER_RANGES, strict=True)):
        chosen = np.flatnonzero(types == kind)
        columns = (
            customers[chosen],
            times_ms[chosen],
            random.integers(names // 10, names, len(chosen)),
            random.integers(low, high, len(chosen)),
        )
        values[chosen] = [template % row for row in zip(*(column.tolist() for column in columns), strict=True)]
    sizes = [len(value) for value in values]
    assert min(sizes) >= EVENT_BYTES_MIN, f"an event of {min(sizes)} bytes"
    assert max(sizes) <= EVENT_BYTES_MAX, f"an event of {max(sizes)} bytes"
    return Events(values.tolist(), customers, types, times_ms)


async def create_topic(
    bootstrap: str, topic: str, partitions: int = PARTITIONS, settings: Mapping[str, str] | None = None
) -> None:
    from aiokafka.admin import AIOKafkaAdminClient, NewTopic

    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    async with asyncio.timeout(BROKER_S_MAX):
        await admin.start()
        try:
            answer = await admin.create_topics([NewTopic(topic, partitions, 1, topic_configs=dict(settings or {}))])
        finally:
            await admin.close()
    for name, code, message in answer.topic_errors:
        if code:
            raise RuntimeError(f"topic {name} could not be created: {message}")


async def produce(bootstrap: str, topic: str, partitions: int, events: Iterable[Events]) -> list[int]:
    """Load the events, keyed by customer; the records acknowledged, by partition.

    The topic must exist. Kafka's own timestamps are the events' times.
    """
    from aiokafka import AIOKafkaProducer

    partition_of_customer = np.array([partition_of(number, partitions) for number in range(CUSTOMERS)])
    keys = [customer_key(number) for number in range(CUSTOMERS)]
    producer = AIOKafkaProducer(
        bootstrap_servers=bootstrap, compression_type="lz4", max_batch_size=BATCH_BYTES_MAX, acks="all"
    )
    counts = [0] * partitions
    async with asyncio.timeout(BROKER_S_MAX):
        await producer.start()
    try:
        for chunk in events:
            owners = partition_of_customer[chunk.customers]
            for partition in range(partitions):
                chosen = np.flatnonzero(owners == partition).tolist()
                await _send(producer, topic, partition, chunk, chosen, keys)
                counts[partition] += len(chosen)
    finally:
        async with asyncio.timeout(BROKER_S_MAX):
            await producer.stop()
    return counts


async def _send(
    producer: Any, topic: str, partition: int, chunk: Events, chosen: Sequence[int], keys: list[bytes]
) -> None:
    """Send the chosen events, in order, in as few batches as fit; returns once they are acknowledged."""
    acknowledged = []
    batch = producer.create_batch()
    for index in chosen:
        record = {
            "key": keys[chunk.customers[index]],
            "value": chunk.values[index],
            "timestamp": int(chunk.times_ms[index]),
        }
        if batch.append(**record) is None:
            acknowledged.append(await producer.send_batch(batch, topic, partition=partition))
            batch = producer.create_batch()
            batch.append(**record)
    if batch.record_count():
        acknowledged.append(await producer.send_batch(batch, topic, partition=partition))
    async with asyncio.timeout(BROKER_S_MAX):
        await asyncio.gather(*acknowledged)


# --- models ---------------------------------------------------------------------------------------------------------

FEATURES = {
    "searches_1h": "count(search, '1h')",
    "carts_1d": "count(add_to_cart, '1d')",
    "transactions_30d": "count(transaction, '30d')",
    "spend_1h": "coalesce(sum(transaction.amount, '1h'), 0)",
    "spend_mean_1h": "coalesce(mean(transaction.amount, '1h'), 0)",
    "spend_max_1h": "coalesce(max(transaction.amount, '1h'), 0)",
    "spend_30d": "coalesce(sum(transaction.amount, '30d'), 0)",
    "spend_mean_30d": "coalesce(mean(transaction.amount, '30d'), 0)",
    "spend_max_30d": "coalesce(max(transaction.amount, '30d'), 0)",
    "since_transaction": "coalesce(seconds_since(transaction), 0)",
}
"""Ten windowed aggregates, in column order; missing ones are 0, so that a bare LogisticRegression takes them."""

MODELS = (
    ("ads", "bid", "add_to_cart", "logistic"),
    ("offers", "coupon", "transaction", "logistic"),
    ("fraud", "abuse", "transaction", "boosting"),
)
"""(tenant, model, event type, kind): one model each of three tenants, about one inference an event in all."""

TRAINING_ROWS = 20_000


def training_rows(random: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Made-up rows in the shape of FEATURES, float64 [TRAINING_ROWS, 10], and labels 0 and 1 that depend on them."""
    counts = random.poisson((1.5, 35.0, 1000.0), (TRAINING_ROWS, 3)).astype(np.float64)
    hour = random.gamma(2.0, 250.0, (TRAINING_ROWS, 1)) * (0.5, 0.4, 1.0)
    month = random.gamma(50.0, 10_000.0, (TRAINING_ROWS, 1)) * (1.0, 0.001, 0.002)
    since = random.exponential(2600.0, (TRAINING_ROWS, 1))
    rows = np.hstack([counts, hour, month, since])
    standard = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    score = standard @ random.normal(size=rows.shape[1]) + random.normal(size=len(rows))
    return rows, (score > 0).astype(np.int64)


def trained(kind: str, random: np.random.Generator) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression

    rows, labels = training_rows(random)
    if kind == "boosting":
        return HistGradientBoostingClassifier(max_iter=100, early_stopping=False, random_state=SEED).fit(rows, labels)
    mean, scale = rows.mean(axis=0), rows.std(axis=0)
    model = LogisticRegression(max_iter=1000).fit((rows - mean) / scale, labels)
    # Fold the scaling into the coefficients: the model takes raw features and a call is one matrix product.
    model.coef_ = model.coef_ / scale
    model.intercept_ = model.intercept_ - model.coef_ @ mean
    return model


def manifest(event: str) -> str:
    lines = [f'on = ["{event}"]', 'output = "score"', 'method = "predict_proba"', 'ttl = "30d"', "", "[features]"]
    return "\n".join([*lines, *(f'{name} = "{expression}"' for name, expression in FEATURES.items())]) + "\n"


def models(directory: Path) -> list[str]:
    """Write the three models and their manifests as a watched directory; gives their "tenant/model" names."""
    import joblib
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    for number, (tenant, name, event, kind) in enumerate(MODELS):
        folder = directory / tenant
        folder.mkdir(parents=True, exist_ok=True)
        # More threads than free cores make gradient boosting several times slower.
        with threadpool_limits(1):
            model = trained(kind, np.random.default_rng(SEED + number))
        joblib.dump(model, folder / f"{name}.joblib")
        (folder / f"{name}.toml").write_text(manifest(event))
    return [f"{tenant}/{name}" for tenant, name, _, _ in MODELS]


# --- configuration --------------------------------------------------------------------------------------------------


def config(
    path: Path,
    bootstrap: str,
    topic: str,
    port: int,
    application: str = "bench",
    settings: dict[str, dict[str, object]] | None = None,
) -> Path:
    """Write a node's configuration for this workload beside its folders `data` and `tenants`; gives `path`.

    `settings` adds to or replaces the fields of a section: {"cycle": {"commit_interval_ms": 20}}.
    """
    sections: dict[str, dict[str, object]] = {
        "node": {"data_dir": "data"},
        "kafka": {"bootstrap": [bootstrap], "topics": [topic], "application": application, "transactions": "required"},
        "cycle": {"commit_interval_ms": 100},
        "events": {"types": list(TYPES)},
        "events.fields": {"amount": "number"},
        "tenants": {"directory": "tenants"},
        "http": {"port": port},
    }
    for section, fields in (settings or {}).items():
        sections[section] = {**sections.get(section, {}), **fields}
    path.parent.mkdir(parents=True, exist_ok=True)
    # JSON's strings, numbers, booleans and flat lists are TOML's too.
    path.write_text(
        "\n".join(
            "\n".join([f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in fields.items()), ""])
            for section, fields in sections.items()
        )
    )
    return path
