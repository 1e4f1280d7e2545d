"""Reading customers from stores that hold folded frames: against the plain program, and over HTTP."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import DAY, HOUR, MINUTE, Event, Reference

from node.config_sections import HttpSection
from node.kernel.clock import ManualClock
from node.kernel.errors import BoundExceeded, NotFound, StoreUnavailable
from node.kernel.ports import StateStore
from node.kernel.tables import NO_TABLES, TableColumn, TableSchema, TableSet
from node.kernel.types import Aggregate, Bools, EventColumns, EventSchema, Floats, Frame, ModelName, ModelVersion
from node.serving.reads import CustomerReads, OpenPartition
from node.serving.server import HttpServer
from node.serving.view import ModelInfo, NodeStatus, SharedFeatures
from node.state.codec import images, unpack
from node.state.fold import filters_of, fold
from node.state.layout import Layout
from node.state.memory import MemoryStore
from node.state.outputs import write_outputs
from node.state.rocksdb import RocksEnvironment, RocksStore
from tenants.features import CompiledFeatures, compile_plan, evaluate_profile
from tenants.lineage import event_features
from tenants.manifest import Manifest, parse_manifest

START_MS = 1_700_000_000_000
SCHEMA = EventSchema(
    types=("search", "transaction"),
    fields={"amount": "number", "channel": "text", "online": "boolean"},
    profile={"spend": "sum(transaction.amount, '30d')", "web_1h": "count(any, '1h', where=event.channel == 'web')"},
    tables={"caps": TableSchema("name", "text", {"cap": TableColumn("number")})},
)
WEB = "event.channel == 'web'"
BID = """
on = ["transaction"]
output = "score"
ttl = "1h"
[features]
spend = "sum(transaction.amount, '1d')"
rate = "spend / max(1, count(transaction, '1d'))"
since = "seconds_since(transaction)"
hour = "hour(event.time)"
kind = "event.type"
amount = "event.amount"
known_amount = "coalesce(amount, 1)"
channel = "coalesce(event.channel, 'none')"
word = "'big' if spend > 5 else 'small'"
total = "profile.spend"
"""
RANK = """
on = ["search", "transaction"]
output = "rank"
ttl = "never"
method = "predict"
[features]
bid = "models.ads.bid.score"
"""
CAP = """
on = ["transaction"]
output = "score"
[features]
cap = "tables.caps['all'].cap"
"""


def manifest(tenant: str, model: str, text: str) -> Manifest:
    return parse_manifest(f"{tenant}/{model}.toml", tenant, model, text.encode(), SCHEMA)


def columns(events: Sequence[Event]) -> EventColumns:
    customers = list(dict.fromkeys(event.customer for event in events))
    channels = np.empty(len(events), object)
    channels[:] = [event.fields.get("channel") for event in events]
    zeros = np.zeros(len(events), np.int64)
    numbers = {
        name: np.array([event.fields.get(name, math.nan) for event in events], np.float64)
        for name in ("amount", "online")
    }
    return EventColumns(
        np.array([SCHEMA.types.index(event.type) for event in events], np.int64),
        np.array([event.time_ms for event in events], np.int64),
        np.array([customers.index(event.customer) for event in events], np.int64),
        customers,
        zeros,
        zeros,
        {**numbers, "channel": channels},
    )


@dataclass
class Folder:
    """One partition that folds events into its store, as a cycle does, without Kafka and models."""

    store: StateStore
    layout: Layout = field(default_factory=Layout.empty)

    def take(self, plan: CompiledFeatures, events: Sequence[Event]) -> None:
        self.layout = self.layout.grown(plan.aggregates, plan.stored_models)
        batch = columns(events)
        rows = unpack(self.layout, self.store.load([name.encode() for name in batch.customers]))
        masks = plan.masks(batch, filters_of(self.layout, batch, SCHEMA.types))
        fold(self.layout, rows, batch, masks, np.zeros(len(batch), np.bool_), SCHEMA.types)
        self._apply(batch.customers, rows)

    def infer(self, version: ModelVersion, customer: str, time_ms: int, values: Sequence[float]) -> None:
        rows = unpack(self.layout, self.store.load([customer.encode()]))
        at = np.zeros(1, np.int64)
        write_outputs(self.layout, rows, version, at, np.array([time_ms]), np.array([values], np.float64))
        self._apply([customer], rows)

    def _apply(self, customers: Sequence[str], rows: Floats) -> None:
        keys = [customer.encode() for customer in customers]
        self.store.apply(Frame({}, self.layout.id, keys, images(rows), layout=self.layout.encode()), 1)


class Node:
    """A `NodeView` made of `CustomerReads` and lists."""

    def __init__(self, partitions: dict[int, Folder | None], *manifests: Manifest) -> None:
        self.partitions = partitions
        self.profile = evaluate_profile(SCHEMA)
        self.set_models(*manifests)
        self.tables = NO_TABLES
        self.reads = CustomerReads(
            self.open, lambda: self.plan, SCHEMA, self.profile, self.event_features, lambda: self.tables
        )
        self.customer = self.reads.customer
        self.features = self.reads.features
        self.inferences = self.reads.inferences

    def set_models(self, *manifests: Manifest, labels: tuple[str, ...] = ()) -> None:
        self.manifests = {one.name: one for one in manifests}
        self.plan = compile_plan([(one.version("ab" * 32, labels), one) for one in manifests], SCHEMA)
        self.versions = {version.name: version for version in self.plan.models}

    def open(self) -> dict[int, OpenPartition | None]:
        return {
            number: None if part is None else OpenPartition(number, part.store, part.layout)
            for number, part in self.partitions.items()
        }

    def event_features(self, name: ModelName) -> frozenset[str]:
        return event_features(self.manifests[name])

    def take(self, number: int, *events: Event) -> None:
        folder = self.partitions[number]
        assert folder is not None
        folder.take(self.plan, events)

    def status(self) -> NodeStatus:
        return NodeStatus(node="n", started_ms=0, now_ms=0)

    def unready(self) -> Sequence[str]:
        return [f"partition {number} is not open" for number, part in self.partitions.items() if part is None]

    def shared_features(self) -> SharedFeatures:
        return SharedFeatures(features=[], refused={})

    def models(self) -> Sequence[ModelInfo]:
        return [ModelInfo.of(version, "live") for version in self.plan.models]


BID_NAME = ModelName("ads", "bid")
RANK_NAME = ModelName("shop", "rank")


@pytest.fixture(params=["memory", "rocksdb"])
def node(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Node]:
    environment = RocksEnvironment.of(16 << 20, 4 << 20)
    stores: list[StateStore] = [
        MemoryStore() if request.param == "memory" else RocksStore(tmp_path / str(number), environment)
        for number in range(2)
    ]
    folders: dict[int, Folder | None] = {number: Folder(store) for number, store in enumerate(stores)}
    yield Node(folders, manifest("ads", "bid", BID), manifest("shop", "rank", RANK))
    for store in stores:
        store.close()


def bought(customer: str, amount: float, after_ms: int = 0, channel: str | None = "web") -> Event:
    return Event(customer, "transaction", START_MS + after_ms, {"amount": amount, "channel": channel})


# --- the customer's state -------------------------------------------------------------------------------------------


async def test_profile_by_name(node: Node) -> None:
    node.take(1, bought("ann", 2.0), bought("ann", 3.0, HOUR), bought("bob", 9.0))
    state = await node.customer("ann", START_MS + 2 * HOUR)
    assert state.profile == {
        "events": 2.0,
        "first_seen": START_MS / 1000,
        "last_seen": (START_MS + HOUR) / 1000,
        "spend": 5.0,
        "web_1h": 0.0,
    }
    assert state.changed_ms == START_MS + HOUR
    assert (state.partition, state.also_on) == (1, [])
    assert state.aggregates[str(Aggregate("sum", "transaction", "amount", DAY))] == 5.0


async def test_last_is_the_time_of_the_latest_event(node: Node) -> None:
    node.take(0, bought("ann", 2.0), bought("ann", 3.0, HOUR), bought("ann", 4.0, 30 * MINUTE))
    state = await node.customer("ann", "last")
    assert state.at_ms == START_MS + HOUR
    assert state.profile["web_1h"] == 2.0


async def test_newest_part_of_a_customer_on_two_partitions(node: Node) -> None:
    node.take(0, bought("ann", 2.0))
    node.take(1, bought("ann", 3.0, HOUR))
    state = await node.customer("ann", "last")
    assert (state.partition, state.also_on, state.profile["spend"]) == (1, [0], 3.0)


async def test_unknown_customer(node: Node) -> None:
    node.take(0, bought("ann", 2.0))
    for read in (node.customer, node.inferences):
        with pytest.raises(NotFound):
            await read("bob", START_MS)
    with pytest.raises(NotFound):
        await node.features("bob", BID_NAME, START_MS)


async def test_a_partition_that_is_not_open_might_hold_the_customer(node: Node) -> None:
    node.take(0, bought("ann", 2.0))
    node.partitions[1] = None
    assert (await node.customer("ann", START_MS)).partition == 0
    with pytest.raises(StoreUnavailable, match=r"\[1\]"):
        await node.customer("bob", START_MS)


async def test_rows_that_grow_while_other_partitions_are_looked_into_are_read_as_they_are_then(node: Node) -> None:
    both = tuple(node.manifests.values())
    node.set_models()
    node.take(0, bought("ann", 2.0))
    behind = Folder(MemoryStore())
    node.partitions = {number: Folder(MemoryStore()) for number in range(20)} | {20: behind}
    node.take(20, bought("ann", 2.0))
    reading = asyncio.create_task(node.customer("ann", START_MS))
    await asyncio.sleep(0)  # it rests after the first partitions
    node.set_models(*both)
    node.take(20, bought("ann", 3.0, 1000))
    assert (await reading).profile["spend"] == 5.0


async def test_rows_of_an_older_layout_are_read_under_the_new_plan(node: Node) -> None:
    both = tuple(node.manifests.values())
    node.set_models()
    node.take(0, bought("ann", 2.0))
    node.set_models(*both)
    features = (await node.features("ann", BID_NAME, START_MS)).features
    assert (features["spend"], features["total"]) == (0.0, 2.0), "a new window begins empty"
    assert (await node.inferences("ann", START_MS)).inferences == []
    folder = node.partitions[0]
    assert folder is not None
    assert folder.layout.id == 1, "reading grows nothing"


async def test_a_model_that_rows_have_no_room_for_keeps_nobody_from_reading_the_others(node: Node) -> None:
    days = {"first": range(20, 200), "second": range(200, 380)}
    wide = {
        name: manifest("wide", "sums", BID + "\n".join(f"s{day} = \"sum(transaction.amount, '{day}d')\"" for day in of))
        for name, of in days.items()
    }
    bid, rank = node.manifests.values()
    node.set_models(bid, rank, wide["first"])
    node.take(0, bought("ann", 2.0))
    node.set_models(bid, rank, wide["second"])
    assert (await node.customer("ann", START_MS)).profile["spend"] == 2.0
    assert (await node.features("ann", BID_NAME, START_MS)).features["spend"] == 2.0
    assert (await node.inferences("ann", START_MS)).inferences == []
    with pytest.raises(
        BoundExceeded, match=r"rows of partition 0 have no room for sum\(transaction.amount, 172\d+ms\)"
    ):
        await node.features("ann", ModelName("wide", "sums"), START_MS)


async def test_windows_that_are_being_filled_from_history_are_empty(node: Node) -> None:
    bid = node.manifests[BID_NAME]
    node.set_models()
    node.take(0, bought("ann", 2.0))
    folder = node.partitions[0]
    assert folder is not None
    node.set_models(bid)
    asked = set(node.plan.aggregates) - set(folder.layout.aggregates)
    folder.layout = folder.layout.awaiting_history(asked)
    features = (await node.features("ann", BID_NAME, START_MS)).features
    assert (features["spend"], features["total"]) == (0.0, 2.0)


AMOUNTS = st.sampled_from([0.0, 0.1, 0.2, -0.7, 3.3333, 1e15, math.nan])
STEPS_MS = st.sampled_from([0, 1, 999, 4000, -700, MINUTE, -MINUTE, 5 * MINUTE, HOUR, -HOUR, DAY, -DAY, 40 * DAY])
HISTORY = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from(SCHEMA.types), AMOUNTS, st.sampled_from(["web", None]), STEPS_MS),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(history=HISTORY, later_ms=STEPS_MS, cut=st.integers(0, 25))
def test_every_aggregate_is_what_the_plain_program_says(
    history: list[tuple[str, str, float, str | None, int]], later_ms: int, cut: int
) -> None:
    node = Node({0: Folder(MemoryStore())}, manifest("ads", "bid", BID))
    reference = Reference({WEB: lambda event: event.fields["channel"] == "web"})
    reference.ask(list(node.plan.aggregates))
    now, events = START_MS, []
    for customer, kind, amount, channel, step in history:
        now += step
        events.append(Event(customer, kind, now, {"amount": amount, "channel": channel}))
        reference.see(events[-1])
    for part in (events[:cut], events[cut:]):
        if part:
            node.take(0, *part)
    for customer in {event.customer for event in events}:
        state = asyncio.run(node.customer(customer, now + later_ms))
        for aggregate in node.plan.aggregates:
            expected = reference.read(aggregate, customer, now + later_ms)
            assert state.aggregates[str(aggregate)] == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
        assert state.changed_ms == max(event.time_ms for event in events if event.customer == customer)


# --- features -------------------------------------------------------------------------------------------------------


async def test_features_as_of_now(node: Node) -> None:
    node.take(0, bought("ann", 2.0), bought("ann", 4.0, HOUR))
    found = await node.features("ann", BID_NAME, START_MS + HOUR + 30_000)
    assert list(found.features) == list(node.versions[BID_NAME].features)
    assert found.features == {
        "spend": 6.0,
        "rate": 3.0,
        "since": 30.0,
        "hour": 23.0,
        "kind": None,
        "amount": None,
        "known_amount": None,
        "channel": None,
        "word": "big",
        "total": 6.0,
    }
    assert found.needs_event == ["kind", "amount", "known_amount", "channel"]
    assert found.version == node.versions[BID_NAME].short_version


async def test_features_are_what_the_next_event_would_see(node: Node) -> None:
    """Shares no code with reading: the fold at an event of another type that changes none of these windows."""
    node.take(0, bought("ann", 2.0), bought("ann", 4.0, HOUR))
    at_ms = START_MS + 5 * HOUR
    read = (await node.features("ann", BID_NAME, at_ms)).features
    folder = node.partitions[0]
    assert folder is not None
    event = columns([Event("ann", "search", at_ms, {})])
    rows = unpack(folder.layout, folder.store.load([b"ann"]))
    wanted: Bools = np.ones(1, np.bool_)
    masks = node.plan.masks(event, filters_of(folder.layout, event, SCHEMA.types))
    values = fold(folder.layout, rows, event, masks, wanted, SCHEMA.types).values

    class Reads:
        def aggregate(self, aggregate: Aggregate) -> Floats:
            return values[aggregate]

        def stored(self, output: object) -> Floats:
            return np.full(1, np.nan)

    folded = node.plan.rows(event, Reads(), {BID_NAME: wanted})[BID_NAME]
    for name in ("spend", "rate", "since", "hour", "total"):
        assert read[name] == folded.numbers[0, folded.names.index(name)]
    assert read["word"] == folded.texts["word"][0]


async def test_features_from_other_models_keep_their_ttl(node: Node) -> None:
    node.take(0, bought("ann", 2.0))
    folder = node.partitions[0]
    assert folder is not None
    folder.infer(node.versions[BID_NAME], "ann", START_MS, [0.75])
    assert (await node.features("ann", RANK_NAME, START_MS + HOUR)).features == {"bid": 0.75}
    late = (await node.features("ann", RANK_NAME, START_MS + HOUR + 1)).features["bid"]
    assert isinstance(late, float)
    assert math.isnan(late)


async def test_features_of_a_model_that_is_not_live(node: Node) -> None:
    node.take(0, bought("ann", 2.0))
    with pytest.raises(NotFound, match="ads/other"):
        await node.features("ann", ModelName("ads", "other"), START_MS)


# --- inferences -----------------------------------------------------------------------------------------------------


async def test_inferences_until_they_expire(node: Node) -> None:
    node.take(0, bought("ann", 2.0))
    folder = node.partitions[0]
    assert folder is not None
    folder.infer(node.versions[BID_NAME], "ann", START_MS, [0.75])
    folder.infer(node.versions[RANK_NAME], "ann", START_MS + 1, [3.0])
    bid, rank = (await node.inferences("ann", START_MS + HOUR)).inferences
    assert (bid.tenant, bid.model, bid.outputs) == ("ads", "bid", {"score": 0.75})
    assert bid.version == node.versions[BID_NAME].version[:12]
    assert (bid.live, bid.event_time_ms, bid.expires_ms) == (True, START_MS, START_MS + HOUR)
    assert (rank.outputs, rank.expires_ms) == ({"rank": 3.0}, None)
    (rank_only,) = (await node.inferences("ann", START_MS + HOUR + 1)).inferences
    assert rank_only.model == "rank"


async def test_inferences_of_versions_that_are_gone(node: Node) -> None:
    node.take(0, bought("ann", 2.0))
    folder = node.partitions[0]
    assert folder is not None
    folder.infer(node.versions[RANK_NAME], "ann", START_MS, [1.0])
    rank = node.manifests[RANK_NAME]
    node.set_models(rank, labels=("no", "yes"))
    (labelled,) = (await node.inferences("ann", START_MS)).inferences
    assert labelled.outputs == {"rank": "yes"}
    node.set_models(manifest("shop", "rank", RANK.replace('output = "rank"', 'output = "place"')))
    (old,) = (await node.inferences("ann", START_MS)).inferences
    assert (old.live, old.outputs) == (False, {"rank": 1.0})
    node.set_models()
    (gone,) = (await node.inferences("ann", START_MS)).inferences
    assert (gone.live, gone.outputs) == (False, {"rank": 1.0})


# --- over HTTP ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def get(node: Node) -> AsyncIterator[Any]:
    server = HttpServer(node, HttpSection(port=0), ManualClock(START_MS + HOUR))
    await server.start()
    async with aiohttp.ClientSession(f"http://{server.address}") as session:

        async def fetch(path: str) -> tuple[int, Any]:
            async with session.get(path) as response:
                return response.status, await response.json(content_type=None)

        yield fetch
    await server.stop()


async def test_over_http(node: Node, get: Any) -> None:
    node.take(0, bought("ann", 2.0))
    folder = node.partitions[0]
    assert folder is not None
    folder.infer(node.versions[BID_NAME], "ann", START_MS, [math.nan])
    status, state = await get("/v1/customers/ann")
    assert (status, state["at_ms"], state["profile"]["spend"]) == (200, START_MS + HOUR, 2.0)
    status, features = await get("/v1/customers/ann/features?model=ads/bid&at=last")
    assert (status, features["at_ms"], features["features"]["since"]) == (200, START_MS, 0.0)
    assert features["features"]["channel"] is None
    status, inferences = await get("/v1/customers/ann/inferences")
    assert (status, inferences["inferences"][0]["outputs"]) == (200, {"score": None})
    assert (await get("/v1/customers/bob"))[0] == 404
    status, models = await get("/v1/models")
    assert [model["columns"][0] for model in models["models"]] == ["spend", "bid"]
    node.partitions[1] = None
    assert (await get("/v1/customers/bob"))[0] == 503
    status, problem = await get("/readyz")
    assert (status, problem["reasons"]) == (503, ["partition 1 is not open"])


async def test_features_wait_for_a_table_whose_live_version_is_not_here(node: Node, get: Any) -> None:
    """Without it they would be others than the model's, as if no key had a row."""
    node.set_models(manifest("ads", "bid", BID), manifest("shop", "cap", CAP))
    node.take(0, bought("ann", 2.0))
    node.tables = TableSet({}, {"caps": "version 1 is not here yet", "others": "nor this one"})
    status, problem = await get("/v1/customers/ann/features?model=shop/cap")
    assert (status, problem["type"]) == (503, "urn:headrace:problem:table-unavailable")
    assert problem["detail"] == "model shop/cap waits for table caps: version 1 is not here yet"
    assert (await get("/v1/customers/ann/features?model=ads/bid"))[0] == 200, "it reads no table"
    node.tables = TableSet({}, {"others": "nor this one"})
    assert (await get("/v1/customers/ann/features?model=shop/cap"))[0] == 200


async def test_no_time_that_may_be_asked_for_fails(node: Node, get: Any) -> None:
    node.take(0, bought("ann", 2.0))
    for at in (0, 1, START_MS - 1, START_MS + 400 * DAY, 9_999_999_999_999):
        for what in ("?", "/inferences?", "/features?model=ads/bid&"):
            status, _ = await get(f"/v1/customers/ann{what}at={at}")
            assert status == 200
