"""Tables that follow a compacted topic on running nodes: rows come, change and go, also while the feeding node dies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from cluster_support import running
from node_support import Kafka, Node, drop, event, linear, status_file, wait_until
from test_tables import PRICES, headrace, live, products
from waiting import until

from node.kernel.clock import SystemClock
from node.kernel.reading import committed_reader
from node.kernel.supervise import Supervisor
from node.kernel.table_versions import Feed, Table
from node.kernel.tables import TableColumn, TableSchema
from node.tables.feeds import Fed, TableFeeds
from node.tables.library import TableLibrary
from node.tables.local import LocalTables
from node.tables.service import Files, TableService
from replication.blobs import BlobStore

Rows = Iterable[tuple[str, object]]
"""Keys and what comes for them: a step, None to delete, or the bytes of a value."""
TYPES = ("--type", "channel=text", "--type", "price=number", "--type", "check=number")
DEFAULTS = ("--default", "price=7", "--default", "check=7")


class Topic:
    def __init__(self, broker: Kafka, name: str) -> None:
        self.name = broker.create(name)
        self._broker = broker
        self.count = 0

    def send(self, rows: Rows) -> None:
        """A step is both the price and the check, so that a mixture would show."""
        listed = list(rows)
        self.count += len(listed)
        keys = iter([key.encode() for key, _ in listed])
        self._broker.produce(self.name, [_value(row) for _, row in listed], keys=lambda _: next(keys))


def _value(row: object) -> bytes | None:
    return row if row is None or isinstance(row, bytes) else orjson.dumps({"price": row, "check": row})


def feed(node: Node) -> dict[str, Any]:
    tables = node.get("/v1/tables")["tables"]
    return dict(tables[0]["feed"]) if tables and tables[0]["feed"] else {}


def whole(node: Node, topic: Topic) -> bool:
    """Whether what is live has all that was sent. A version that all nodes have still waits for the flip."""
    (table,) = node.get("/v1/tables")["tables"]
    waiting = any(version["state"] == "passed" for version in table["versions"])
    return bool(table["feed"]["offsets"] == [topic.count] and table["live"] and not waiting)


def test_rows_come_change_and_go_also_while_the_node_is_killed(
    kafka: str, node: Node, tmp_path: Path, topic_names: Callable[[str], str]
) -> None:
    topic = Topic(Kafka(kafka), topic_names("rows"))
    topic.send([*((f"c{number}", 1) for number in range(50)), ("c3", b'{"price":"dear"}')])
    drop(node.models, "shop/price", linear(1000, 1), PRICES)
    node.start()
    wait_until(lambda: status_file(node.models, "shop/price").get("state") == "refused", "there is no table yet")
    assert "say which column is the key" in headrace(node, "follow", "products", "--topic", topic.name, code=1)
    follow = ("follow", "products", "--topic", topic.name, "--key", "channel", *TYPES, *DEFAULTS, "--every", "1s")
    assert "follows topic" in headrace(node, *follow)
    wait_until(lambda: status_file(node.models, "shop/price")["state"] == "live", "the model has its table")
    told = feed(node)
    assert (told["offsets"], told["by"], told["refused"], told["behind"]) == ([51], "headrace", 1, 0)
    assert "offset 50: column price must be a number of at most 1e+15, not 'dear'" in told["problems"][0]
    assert "follows topic" in headrace(node, "list", config=False)
    first = live(node)

    asked = 0

    def scores(*channels: str) -> list[float]:
        nonlocal asked
        node.kafka.produce(node.topics[0], [event("ann", asked + n, channel=one) for n, one in enumerate(channels)])
        asked += len(channels)
        found = node.inferences(asked)[asked - len(channels) :]
        assert {one["tables"]["products"] for one in found} == {live(node)}
        return [one["outputs"]["score"] for one in found]

    assert scores("c3", "c4", "zz") == [1001, 1001, 7007]
    topic.send([("c3", 2), ("c4", None), ("zz", 5)])
    wait_until(lambda: whole(node, topic), "the second version")
    assert live(node) != first
    assert scores("c3", "c4", "zz", "c5") == [2002, 7007, 5005, 1001]
    assert "follows topic" in headrace(node, "rollback", "products", code=1)
    assert "follows topic" in headrace(node, "put", "products", str(products(tmp_path, 9)), code=1)

    for step in range(10, 13):  # killed amid a version, or before, or after
        topic.send([(f"c{number}", step) for number in range(50)] + [("c9", None), (f"new{step}", step)])
        node.kill()
        topic.send([("c1", 100 + step)])
        node.start()
    wait_until(lambda: whole(node, topic), "all that came meanwhile")
    assert scores("c0", "c1", "c9", "zz", "new10", "new12") == [12012, 112112, 7007, 5005, 10010, 12012]

    headrace(node, "unfollow", "products")
    topic.send([("c0", 50)])
    headrace(node, "put", "products", str(products(tmp_path, 9)))
    assert scores("c0", "c1") == [9009, 9009]
    headrace(node, *follow)
    wait_until(lambda: whole(node, topic), "all of the topic, from its beginning")
    assert scores("c0", "c1", "c9", "c400") == [50050, 112112, 7007, 7007]


def test_a_cluster_goes_on_from_where_the_node_that_fed_it_was(
    kafka: str, tmp_path: Path, topic_names: Callable[[str], str]
) -> None:
    broker = Kafka(kafka)
    events, topic = broker.create(topic_names("events"), 4), Topic(broker, topic_names("rows"))
    topic.send([(f"c{number}", 1) for number in range(500)])
    with running(tmp_path, broker, events, 4, topic_names("cluster")) as cluster:
        nodes = cluster.nodes
        follow = ("follow", "products", "--topic", topic.name, "--key", "channel", *TYPES, "--every", "1s")
        headrace(nodes["n2"], *follow)
        wait_until(lambda: all(whole(one, topic) for one in nodes.values()), "the first version on all")
        for model in ("price", "again"):
            drop(nodes["n1"].models, f"shop/{model}", linear(1000, 1), PRICES)
            nodes["n1"].live(f"shop/{model}")

        def fed_by() -> str:
            return next((name for name in cluster.living() if feed(nodes[name]).get("by")), "")

        made, steps = 0, range(2, 5)
        for step in steps:
            topic.send([(f"c{number}", step) for number in range(500)])
            broker.produce(events, [event(f"k{n % 40}", n, channel=f"c{n % 500}") for n in range(made, made + 100)], 4)
            made += 100
            feeder = wait_until(fed_by, "a node that feeds")
            nodes[feeder].kill()
            wait_until(lambda feeder=feeder: fed_by() not in ("", feeder), "another that feeds")
            cluster.start(feeder)
        wait_until(lambda: all(whole(one, topic) for one in nodes.values()), "all that came, on all")
        assert len({live(one) for one in nodes.values()}) == 1
        broker.produce(events, [event(f"k{n % 40}", n, channel=f"c{n % 500}") for n in range(made, made + 100)], 4)
        named: dict[tuple[int, int], set[str]] = {}
        last = (event("", made)["time"], max(steps) * 1001.0)
        for model in ("price", "again"):
            for one in cluster.inferences(made + 100, model):
                assert one["outputs"]["score"] in {step * 1001.0 for step in (1, *steps)}, "a mixture"
                assert one["time"] < last[0] or one["outputs"]["score"] == last[1]
                named.setdefault((one["partition"], one["offset"]), set()).add(one["tables"]["products"])
        assert all(len(versions) == 1 for versions in named.values())


SCHEMA = TableSchema("sku", "text", {"price": TableColumn("number")})


@dataclass
class Feeding:
    service: TableService
    feeds: TableFeeds
    consumers: list[AIOKafkaConsumer]
    """Those of the feeds, the newest last."""

    async def follow(self, name: str, topic: str) -> None:
        await self.service.follow(name, Feed(topic, SCHEMA.encode(), 1000))

    def fed(self, name: str) -> Fed:
        return self.feeds.of(self.table(name)) or Fed()

    def table(self, name: str) -> Table:
        return self.service.ledger.tables()[name]

    def rows(self, name: str) -> int:
        """Of the live version."""
        table = self.table(name)
        return table.versions[table.live].rows if table.live else 0


@contextlib.asynccontextmanager
async def feeding(
    folder: Path, kafka: str, monkeypatch: pytest.MonkeyPatch, upload_bytes_max: int = 1 << 20
) -> AsyncIterator[Feeding]:
    """Feeds that run, of a node by itself."""
    consumers: list[AIOKafkaConsumer] = []

    def connected(*arguments: Any, **settings: Any) -> AIOKafkaConsumer:
        consumers.append(committed_reader(*arguments, **settings))
        return consumers[-1]

    monkeypatch.setattr("node.tables.feeds.committed_reader", connected)
    files, clock = BlobStore(folder / "files"), SystemClock()
    library = TableLibrary(files.path, Supervisor())
    ledger = LocalTables(folder / "tables.json", library)
    kept = Files(files.put, files.path, files.names, files.delete)
    service = TableService("n", folder, kept, library, ledger, lambda _: [], upload_bytes_max, 1000, clock)
    feeds = TableFeeds(service, {"bootstrap_servers": [kafka]}, clock)
    running_feeds = asyncio.create_task(feeds.run())
    try:
        yield Feeding(service, feeds, consumers)
    finally:
        running_feeds.cancel()
        await asyncio.gather(running_feeds, return_exceptions=True)


async def sent(kafka: str, topic: str, key: str, value: bytes | None = b'{"price":1}') -> None:
    async with AIOKafkaProducer(bootstrap_servers=[kafka]) as producer:
        await producer.send_and_wait(topic, value, key=key.encode())


@pytest.mark.parametrize("upload_bytes_max", [1 << 20, 10])
async def test_no_topic_is_listened_to_between_its_versions(
    kafka: str, topics: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upload_bytes_max: int
) -> None:
    """Or the client would ask for one that is deleted thousands of times a second."""
    topic = await topics.create("rows")
    await sent(kafka, topic, "a")
    async with feeding(tmp_path, kafka, monkeypatch, upload_bytes_max) as running_feeds:
        await running_feeds.follow("one", topic)
        await until(
            lambda: running_feeds.rows("one") or "upload_mb_max" in running_feeds.fed("one").reason,
            "a version, or why there is none",
        )
        assert running_feeds.rows("one") == int(upload_bytes_max > 10)
        (consumer,) = running_feeds.consumers
        assert consumer.assignment() == frozenset()


async def test_an_empty_topic_keeps_no_other_table_from_being_fed(
    kafka: str, topics: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty, good = await topics.create("empty"), await topics.create("good")
    await sent(kafka, good, "a")
    async with feeding(tmp_path, kafka, monkeypatch) as running_feeds:
        await running_feeds.follow("good", good)
        await until(lambda: running_feeds.rows("good") == 1, "the first row")
        await running_feeds.follow("empty", empty)
        await until(lambda: "has no rows" in running_feeds.fed("empty").reason, "why there is no version")
        await sent(kafka, good, "b")
        await until(lambda: running_feeds.rows("good") == 2 or running_feeds.fed("good").reason, "the second row")
        assert (running_feeds.rows("good"), running_feeds.fed("good").reason) == (2, "")
        assert len(running_feeds.consumers) == 1, "its client was left alone"
        await sent(kafka, empty, "a")
        await until(lambda: running_feeds.rows("empty") == 1, "the first row of the other")


@pytest.mark.parametrize("value", [None, b"not a row"])
async def test_why_a_table_has_no_version_is_told_until_it_has_one(
    kafka: str, topics: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: bytes | None
) -> None:
    """Of a topic that is empty, or has records that are no rows only."""
    monkeypatch.setattr("node.tables.feeds._FAILED_SECONDS", 0.1)
    topic = await topics.create("rows")
    if value is not None:
        await sent(kafka, topic, "a", value)
    async with feeding(tmp_path, kafka, monkeypatch) as running_feeds:
        await running_feeds.follow("one", topic)
        await until(lambda: "has no rows" in running_feeds.fed("one").reason, "why there is no version")
        for _ in range(2):
            looked = running_feeds.fed("one").caught_up
            await until(lambda at=looked: running_feeds.fed("one").caught_up != at, "the next look at it")
            assert "has no rows" in running_feeds.fed("one").reason
        assert running_feeds.fed("one").refused == int(value is not None)
        await sent(kafka, topic, "a")
        await until(lambda: running_feeds.rows("one") == 1, "the first row")
        await until(lambda: not running_feeds.fed("one").reason, "that all is well")


async def test_a_record_that_is_no_row_is_counted_once_however_often_it_is_read(
    kafka: str, topics: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.tables.feeds._FAILED_SECONDS", 0.1)
    topic = await topics.create("rows")
    await sent(kafka, topic, "a", b"not a row")
    await sent(kafka, topic, "a", None)
    async with feeding(tmp_path, kafka, monkeypatch) as running_feeds:
        await running_feeds.follow("one", topic)
        await until(lambda: "can't be empty" in running_feeds.fed("one").reason, "why there is no version")
        for _ in range(2):
            tried = running_feeds.fed("one").rests_until
            await until(lambda at=tried: running_feeds.fed("one").rests_until != at, "the next try")
        await sent(kafka, topic, "b")
        await until(lambda: running_feeds.fed("one").offsets == (3,), "the first row")
        assert running_feeds.fed("one").refused == len(running_feeds.fed("one").problems) == 1, "each try reads it"
        await sent(kafka, topic, "a", b"not a row")
        await until(lambda: running_feeds.fed("one").refused == 2, "the second that is no row")
        await sent(kafka, topic, "c")
        await until(lambda: running_feeds.fed("one").offsets == (5,), "the second row")
        assert running_feeds.fed("one").refused == len(running_feeds.fed("one").problems) == 2, "no version was past it"


async def test_a_client_that_reads_no_more_is_replaced(
    kafka: str, topics: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await topics.create("rows")
    await sent(kafka, topic, "a")
    monkeypatch.setattr("node.kernel.reading.BROKER_CALL_MS_MAX", 1000)
    async with feeding(tmp_path, kafka, monkeypatch) as running_feeds:
        await running_feeds.follow("one", topic)
        await until(lambda: running_feeds.rows("one") == 1, "the first row")
        consumer = running_feeds.consumers[-1]
        consumer.assign([TopicPartition(topic, 0)])
        consumer.unsubscribe()  # ends its fetching for good
        await sent(kafka, topic, "b")
        await until(lambda: running_feeds.rows("one") == 2, "the second row")
        assert running_feeds.consumers[-1] is not consumer
