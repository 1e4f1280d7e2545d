"""What the tests of whole nodes share: a node as a process on real Kafka, its events, and what it committed."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import joblib
import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic, RecordsToDelete
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

import harness
import workload

WAIT_S_MAX = 60.0
POLL_S = 0.03
TIME_MS = 1_767_225_600_000
"""2026-01-01, UTC: the time of a test's first event."""
MANIFEST = 'on = ["transaction"]\nmethod = "predict"\noutput = "score"\nttl = "30d"\n[features]\n'
Found = TypeVar("Found")


def wait_until(condition: Callable[[], Found], what: str = "", seconds_max: float = WAIT_S_MAX) -> Found:
    """What `condition` gives once that is true; fails after `seconds_max`, saying what it gave last."""
    deadline, pause = time.monotonic() + seconds_max, threading.Event()
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what or condition} did not come about in {seconds_max} s: {found!r}"
        pause.wait(POLL_S)  # between two looks at the condition
    return found


# --- events ---------------------------------------------------------------------------------------------------------


def event(customer: str, number: int, kind: str = "transaction", **fields: Any) -> dict[str, Any]:
    """The `number`-th event of a test: a second later than the one before, its amount its number."""
    return {"type": kind, "customer": customer, "time": TIME_MS + 1000 * number, "amount": float(number), **fields}


def partition_of(customer: str, partitions: int) -> int:
    return zlib.crc32(customer.encode()) % partitions


class Kafka:
    """Plain, blocking ways into a broker. Topics are as many as a test makes; everything else is theirs."""

    def __init__(self, address: str) -> None:
        self.address = address

    def _admin(self, work: Callable[[AIOKafkaAdminClient], Any]) -> Any:
        async def run() -> Any:
            admin = AIOKafkaAdminClient(bootstrap_servers=self.address)
            async with asyncio.timeout(WAIT_S_MAX):
                await admin.start()
                try:
                    return await work(admin)
                finally:
                    await admin.close()

        return asyncio.run(run())

    def create(self, topic: str, partitions: int = 1, record_bytes_max: int = 8 << 20) -> str:
        new = NewTopic(
            topic, partitions, 1, topic_configs={"max.message.bytes": str(record_bytes_max), "retention.ms": "-1"}
        )
        for _, code, message in self._admin(lambda admin: admin.create_topics([new])).topic_errors:
            assert code == 0, message
        return topic

    def delete(self, topic: str) -> None:
        self._admin(lambda admin: admin.delete_topics([topic]))
        wait_until(lambda: topic not in self._admin(lambda admin: admin.list_topics()), f"{topic} is gone")

    def grow(self, topic: str, partitions: int) -> None:
        self._admin(lambda admin: admin.create_partitions({topic: NewPartitions(partitions)}))

    def cut(self, topic: str, before: Mapping[int, int]) -> None:
        """Delete the records of each partition before its offset."""
        places = {TopicPartition(topic, number): RecordsToDelete(offset) for number, offset in before.items()}
        self._admin(lambda admin: admin.delete_records(places))

    def produce(
        self,
        topic: str,
        events: Iterable[Mapping[str, Any] | bytes | None],
        partitions: int = 1,
        compression: str | None = None,
        keys: Callable[[Any], bytes | None] = lambda event: b"key" if event is None else None,
    ) -> None:
        """Send in order; an event to its customer's partition, bytes as they are to partition 0."""

        async def run() -> None:
            producer = AIOKafkaProducer(
                bootstrap_servers=self.address, compression_type=compression, max_request_size=8 << 20, linger_ms=5
            )
            async with asyncio.timeout(WAIT_S_MAX):
                await producer.start()
                try:
                    sent = []
                    for one in events:
                        raw = one is None or isinstance(one, bytes)
                        value = one if raw else json.dumps(one).encode()  # type: ignore[union-attr]
                        partition = 0 if raw else partition_of(one["customer"], partitions)  # type: ignore[index]
                        sent.append(await producer.send(topic, value, keys(one), partition=partition))
                    await asyncio.gather(*sent)
                finally:
                    await producer.stop()

        asyncio.run(run())

    def records(self, topic: str, partitions: int = 1) -> list[Any]:
        """All committed records, partition after partition, each in order."""
        return list(itertools.chain.from_iterable(asyncio.run(self._records(topic, partitions))))

    async def _records(self, topic: str, partitions: int) -> list[list[Any]]:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self.address, isolation_level="read_committed", auto_offset_reset="none"
        )
        found: list[list[Any]] = [[] for _ in range(partitions)]
        async with asyncio.timeout(WAIT_S_MAX):
            await consumer.start()
            try:
                places = [TopicPartition(topic, number) for number in range(partitions)]
                ends = await consumer.end_offsets(places)
                consumer.assign(places)
                for place in places:
                    consumer.seek(place, 0)
                while any([await consumer.position(place) < ends[place] for place in places]):
                    for place, records in (await consumer.getmany(timeout_ms=100)).items():
                        found[place.partition] += records
            finally:
                await consumer.stop()
        return found

    def inferences(self, application: str, partitions: int = 1) -> list[dict[str, Any]]:
        return [json.loads(record.value) for record in self.records(f"{application}.inferences", partitions)]


def headers(record: Any) -> dict[str, str]:
    return {name: value.decode() for name, value in record.headers}


# --- models ---------------------------------------------------------------------------------------------------------


def linear(*weights: float, offset: float = 0.0) -> LinearRegression:
    """A model whose output is the sum of its columns, each times its weight, plus `offset`: easy to foretell."""
    model = LinearRegression()
    model.coef_, model.intercept_ = np.array(weights, np.float64), offset
    model.n_features_in_, model.rank_ = len(weights), len(weights)
    return model


def slow(model: LinearRegression, rounds: int = 60) -> Any:
    """The same outputs, behind `rounds` steps that change nothing and take their time."""
    steps = [FunctionTransformer(func=None, validate=False) for _ in range(rounds)]
    return make_pipeline(*steps, model)


def drop(directory: Path, name: str, model: Any, features: Mapping[str, str], head: str = MANIFEST) -> None:
    """Put "tenant/model" into the watched directory as a tenant would: both files renamed in."""
    stream = io.BytesIO()
    joblib.dump(model, stream)
    lines = "".join(f'{column} = "{expression}"\n' for column, expression in features.items())
    place = directory / name
    place.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".toml", (head + lines).encode()), (".joblib", stream.getvalue())):
        made = place.with_name(f".{place.name}{suffix}")
        made.write_bytes(content)
        made.rename(place.with_name(place.name + suffix))


def remove(directory: Path, name: str) -> None:
    for suffix in (".toml", ".joblib"):
        (directory / (name + suffix)).unlink()


def status_file(directory: Path, name: str) -> dict[str, Any]:
    """What the node answered the tenant; empty before it did."""
    try:
        found: dict[str, Any] = json.loads((directory / f"{name}.status.json").read_text())
    except FileNotFoundError:
        return {}
    return found


# --- the node -------------------------------------------------------------------------------------------------------


class Node(harness.Node):
    """A node process with its folder; see `node`."""

    def __init__(self, folder: Path, kafka: Kafka, topics: Sequence[str], application: str, **settings: Any) -> None:
        port = harness.free_port()
        sections: dict[str, dict[str, object]] = {
            "kafka": {"topics": list(topics)},
            "cycle": {"commit_interval_ms": 20, "inference_deadline_ms": 1000},
            "events": {"types": ["search", "transaction"]},
            "events.fields": {"amount": "number", "channel": "text"},
            "state": {"flush_interval_s": 1},
            "tenants": {"directory": "tenants", "settle_ms": 20, "rescan_s": 1},
        }
        for name, fields in settings.items():
            section = name.replace("__", ".")
            sections[section] = {**sections.get(section, {}), **fields}
        super().__init__(
            workload.config(folder / "node.toml", kafka.address, topics[0], port, application, sections), port
        )
        self.folder = folder
        self.kafka = kafka
        self.topics = list(topics)
        self.application = application
        self.models = folder / "tenants"
        self.models.mkdir(parents=True, exist_ok=True)

    def configure_topics(self, topics: Sequence[str]) -> None:
        """Name other source topics in the config, for its next start."""
        text, before = self.config.read_text(), f"topics = {json.dumps(self.topics)}"
        assert before in text
        self.topics = list(topics)
        self.config.write_text(text.replace(before, f"topics = {json.dumps(self.topics)}"))

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def status(self) -> dict[str, Any]:
        """/v1/status; empty while nobody answers."""
        with contextlib.suppress(OSError):
            return self.get("/v1/status")
        return {}

    def unready(self) -> str:
        """What /readyz says is wrong, as text; '' when it answers 200."""
        try:
            self.get("/readyz")
        except urllib.error.HTTPError as answer:
            return answer.read().decode()
        return ""

    def counter(self, name: str) -> int:
        """Over all partitions, as of the newest cycle."""
        return sum(partition["counters"].get(name, 0) for partition in self.status().get("partitions", []))

    def backlog(self) -> int:
        partitions = self.status()["partitions"]
        return sum(model["rows"] for partition in partitions for model in partition["backlog"].values())

    def live(self, name: str, differs_from: str = "") -> str:
        """Wait until the tenant reads that its model is live; the version."""

        def version() -> str:
            told = status_file(self.models, name)
            assert told.get("state") != "refused", told
            return str(told["version"]) if told.get("state") == "live" and told["version"] != differs_from else ""

        return wait_until(version, f"{name} live")

    def inferences(self, count: int, partitions: int = 1, model: str = "") -> list[dict[str, Any]]:
        """All committed inferences, of `model` if one is named, once they are at least `count`."""

        def committed() -> list[dict[str, Any]]:
            inferences = self.kafka.inferences(self.application, partitions)
            return [one for one in inferences if model in ("", one["model"])]

        try:
            return wait_until(lambda: found if len(found := committed()) >= count else [], f"{count} inferences")
        except AssertionError as failure:
            seen = len(committed())
            raise AssertionError(f"{failure}; {seen} are there; the log ends:\n{self.log_tail()}") from None

    def log_has(self, text: str) -> bool:
        return text in self.log.read_text(errors="replace")

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The log's entries of that event, in order."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if event in line]
        return [one for one in map(json.loads, lines) if one["event"] == event]


@contextlib.contextmanager
def stopped_after(*nodes: Node) -> Iterator[None]:
    """Whatever happens, no node is left."""
    try:
        yield
    finally:
        for node in nodes:
            node.kill()


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(") ")[2].split()[1]) == pid:
                    found.append(int(entry.name))
    return found


def workers(node: Node) -> list[int]:
    """Processes of tenants' models: below the warm server, which is below the node."""
    return [worker for server in children(node.pid) for worker in children(server)]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
