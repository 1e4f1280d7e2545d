"""Roles of partitions on nodes that share a real broker: promotion, lost leases, planned moves, restored state.

The nodes are `Replicas` with everything they use, in one process; what Raft would agree is in a plain object.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from node_support import TIME_MS, Kafka

from node.config import parse_config
from node.counts import NodeCounts
from node.cycle import CycleSettings, Engine
from node.ingest.decode import EventDecoder
from node.ingest.history import TopicHistory
from node.ingest.source import Source
from node.ingest.topics import Topics
from node.kernel.clock import SystemClock
from node.kernel.errors import BoundExceeded, ClusterUnavailable, HeadraceError, PeerRefused
from node.kernel.limits import STANDBY_UNKNOWN_FRAMES, STOP_MS_MAX
from node.kernel.ports import StateStore
from node.kernel.supervise import Supervisor
from node.kernel.types import FeatureRows, Frame, ModelOutputs, ModelVersion, ReplicaProgress
from node.outbox import BrokerTraits, Outbox, OutputTopics
from node.outgoing import Origin
from node.replicas import Guard, Held, Replicas, Surroundings
from node.session import ChangelogReader, PartitionSession, Parts, open_session
from node.state.flushing import FlushTurns
from node.state.folder import StateFolder, StateFolders
from node.state.rocksdb import RocksEnvironment, RocksStore
from node.waiting import Bound
from replication.changelog import Changelog
from replication.frame import encode_frame
from replication.standby import StandbyFolder
from tenants.features import compile_plan
from tenants.manifest import parse_manifest

CLOCK = SystemClock()
WAIT_S_MAX = 60
CONFIG = parse_config('[events]\ntypes = ["buy"]\n[events.fields]\namount = "number"\n', Path.cwd())
MANIFEST = 'on = ["buy"]\nmethod = "predict"\n[features]\ntotal = "sum(buy.amount, \'1d\')"\n'
MODEL = parse_manifest("a/m.toml", "a", "m", MANIFEST.encode(), CONFIG.schema())
VERSION = MODEL.version("0" * 64)
PLAN = compile_plan([(VERSION, MODEL)], CONFIG.schema())


class Echo:
    """A model runner whose model gives its first column back."""

    async def _outputs(self, rows: FeatureRows) -> ModelOutputs:
        return ModelOutputs(np.ascontiguousarray(rows.numbers[:, :1]))

    def submit(self, version: ModelVersion, rows: FeatureRows) -> Any:
        return self._outputs(rows)

    def rows_queued_max(self, name: object) -> int:
        return 1_000_000


@dataclass
class Assigned:
    owner: str = ""
    epoch: int = 0
    standbys: tuple[str, ...] = ()
    to: str = ""
    revision: int = 0


@dataclass
class Agreed:
    """What the nodes have agreed, known to each of them at once unless it is cut off."""

    partitions: list[Assigned] = field(default_factory=list)
    leases: set[str] = field(default_factory=set)
    seats: list[Seat] = field(default_factory=list)
    revision: int = 0
    unavailable: int = 0
    """Calls that will find no quorum."""
    held_elsewhere: bool = False
    """Whether enough others have what a node is to forget."""
    refusal: type[HeadraceError] = ClusterUnavailable

    def changed(self) -> None:
        for seat in self.seats:
            seat.update()

    def assign(self, partition: int, **changes: Any) -> None:
        self.revision += 1
        held = self.partitions[partition]
        for name, value in {**changes, "revision": self.revision}.items():
            setattr(held, name, value)
        self.changed()

    def take_over(self, partition: int, to: str) -> None:
        held = self.partitions[partition]
        standbys = (*(name for name in held.standbys if name != to), *([held.owner] if held.owner else []))
        self.assign(partition, owner=to, epoch=held.epoch + 1, standbys=standbys, to="")

    def lease(self, name: str, holds: bool) -> None:
        (self.leases.add if holds else self.leases.discard)(name)
        self.changed()


class Seat:
    """One node's place in it: its `Ownership`."""

    def __init__(self, agreed: Agreed, name: str, leads: bool) -> None:
        self.agreed = agreed
        self.name = name
        self.leads = leads
        self.update: Callable[[], None] = lambda: None
        self.asked = 0
        """How often it was asked whether it may forget."""
        self.opened: Callable[[], None] = lambda: None
        agreed.seats.append(self)
        agreed.leases.add(name)

    def held(self) -> Mapping[int, Held]:
        return {
            number: Held(number, one.owner == self.name, one.epoch, one.revision, one.to)
            for number, one in enumerate(self.agreed.partitions)
            if one.owner == self.name or self.name in one.standbys
        }

    def may_own(self, partition: int, epoch: int) -> bool:
        one = self.agreed.partitions[partition]
        return one.owner == self.name and one.epoch == epoch and self.lease_left_ms() > 0

    def lease_left_ms(self) -> float:
        return 1.0 if self.name in self.agreed.leases else 0.0

    async def may_forget(self, partition: int) -> bool:
        self.asked += 1
        return self.agreed.held_elsewhere

    async def released(self, partition: int, epoch: int, to: str, revision: int) -> None:
        await self._ask()
        one = self.agreed.partitions[partition]
        if (one.epoch, one.to, one.revision) != (epoch, to, revision):
            raise PeerRefused("the move was cancelled")
        self.agreed.take_over(partition, to)

    async def _ask(self) -> None:
        await asyncio.sleep(0)
        if self.agreed.unavailable:
            self.agreed.unavailable -= 1
            raise self.agreed.refusal("not now")

    async def grow(self, count: int) -> None:
        await self._ask()
        missing = count - len(self.agreed.partitions)
        self.agreed.partitions += [Assigned() for _ in range(missing)]
        self.agreed.changed()


class Application:
    """The topics of one application and its nodes."""

    def __init__(self, address: str, name: str, folder: Path) -> None:
        self.options = {"bootstrap_servers": address}
        self.kafka = Kafka(address)
        self.name = name
        self.folder = folder
        self.source = f"{name}.events"
        self.topics = OutputTopics(*(f"{name}.{kind}" for kind in ("inferences", "changelog", "dead-letters")))
        self.agreed = Agreed()
        self.nodes: list[Node] = []
        self.produced: Counter[str] = Counter()
        self._producer: AIOKafkaProducer | None = None

    def node(self, name: str, **settings: Any) -> Node:
        self.nodes.append(Node(self, name, **settings))
        return self.nodes[-1]

    async def produce(self, *customers: str, partition: int = 0) -> None:
        """One event of amount 1 for each name."""
        if self._producer is None:
            self._producer = AIOKafkaProducer(**self.options)
            await self._producer.start()
        for customer in customers:
            self.produced[customer] += 1
            event = {"type": "buy", "customer": customer, "time": TIME_MS + self.produced.total(), "amount": 1.0}
            await self._producer.send_and_wait(self.source, json.dumps(event).encode(), partition=partition)

    async def inferences(self) -> list[dict[str, Any]]:
        partitions = len(self.agreed.partitions)
        return await asyncio.to_thread(self.kafka.inferences, self.name, partitions)

    async def exactly_once(self) -> None:
        """Wait until there is an inference for every event; each must be as of its own event, and the only one."""
        async with asyncio.timeout(WAIT_S_MAX):
            while len(found := await self.inferences()) < self.produced.total():  # noqa: ASYNC110
                await asyncio.sleep(0.02)  # between two looks
        seen = Counter((one["customer"], next(iter(one["outputs"].values()))) for one in found)
        expected = {(name, float(nth)) for name, count in self.produced.items() for nth in range(1, count + 1)}
        assert seen == Counter(expected)

    async def close(self) -> None:
        for node in self.nodes:
            await node.stop()
        if self._producer is not None:
            await self._producer.stop()
        gc.collect()


class Node:
    """One node's partitions; `restored` is what was asked of `restore`, which takes snapshots from `snapshots`."""

    def __init__(self, application: Application, name: str, leads: bool = False) -> None:
        self.application = application
        self.name = name
        self.seat = Seat(application.agreed, name, leads)
        self.supervisor = Supervisor()
        self.restored: list[int] = []
        self.snapshots: dict[int, Callable[[Path], bool]] = {}
        self.snapshots_there = asyncio.Event()
        self.snapshots_there.set()
        environment = RocksEnvironment.of()
        self.folders = StateFolders(
            application.folder / name, lambda path: RocksStore(path, environment), self._restore
        )
        self.standbys = StandbyFolder(application.options, application.topics.changelog, CLOCK, 0.2, self._tell)
        self.told: list[Mapping[int, ReplicaProgress]] = []
        """The progress at each time when it was to be told at once."""
        self.sessions: dict[int, int] = Counter()
        self.replicas = Replicas(
            Surroundings(self.seat, self.standbys, self._open, 0.02, CLOCK),
            self.folders,
            Topics(application.options, 1, True),
            [application.source],
            {application.topics.inferences: {}, application.topics.changelog: {}, application.topics.dead_letters: {}},
            self.supervisor,
        )
        self.seat.update = self.replicas.update
        self.seat.opened = self._tell

    def _tell(self) -> None:
        self.told.append(self.replicas.progress())

    async def _restore(self, partition: int, path: Path) -> bool:
        self.restored.append(partition)
        await self.snapshots_there.wait()
        return self.snapshots.get(partition, lambda path: False)(path)

    async def _open(
        self, number: int, state: StateFolder, guard: Guard, reader: ChangelogReader | None
    ) -> PartitionSession:
        one, schema = self.application, CONFIG.schema()
        self.sessions[number] += 1
        engine = Engine(EventDecoder(CONFIG.events), lambda: PLAN, Echo(), CycleSettings(1000, 20, 5.0))
        parts = Parts(
            state=state,
            outbox=lambda: Outbox(
                one.options, one.topics, one.name, number, "required", "lz4", encode_frame, CLOCK, BrokerTraits(), guard
            ),
            source=lambda: Source(one.options, [one.source], number, 1 << 20, "earliest", "wait", CLOCK),
            changelog=lambda: reader or Changelog(one.options, one.topics.changelog, number, CLOCK),
            history=lambda: TopicHistory(one.options, [one.source], number, engine.decoder, CLOCK),
            versions=lambda name, version: VERSION,
            bound=lambda name: Bound(100_000),
            cache_bytes=1 << 20,
            flushes=FlushTurns(0.1),
            keep_store=True,
        )
        origin = Origin(self.name, [one.source], number, schema)
        return await open_session(parts, engine, origin, NodeCounts(CLOCK), CLOCK)

    def start(self, owns: bool = True) -> None:
        self.supervisor.start("replicas", self.replicas.run())
        if owns:
            self.replicas.own()

    def progress(self, partition: int) -> ReplicaProgress | None:
        return self.replicas.progress().get(partition)

    async def serves(self, partition: int = 0) -> None:
        def serving() -> bool:
            replica = self.replicas.running.get(partition)
            return replica is not None and replica.condition.phase == "running" and replica.session is not None

        await self.until(serving, f"{self.name} serves {partition}")

    async def follows(self, partition: int = 0) -> None:
        def near() -> bool:
            progress = self.progress(partition)
            return (
                progress is not None and not progress.serving and (progress.frames_behind, progress.ms_behind) == (0, 0)
            )

        await self.until(near, f"{self.name} follows {partition}")

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(WAIT_S_MAX):
                while not condition():
                    assert not self.supervisor.failed.is_set(), self.supervisor.failure
                    await asyncio.sleep(0.005)  # between two looks
        except TimeoutError:
            raise AssertionError(f"{what}: {self.replicas.progress()}, {self.replicas.unready()}") from None

    def store(self, partition: int = 0) -> StateStore:
        return self.replicas.stores()[partition]

    async def stop(self) -> None:
        await self.replicas.stop()
        await self.supervisor.stop()
        assert self.supervisor.failure is None

    async def die(self) -> None:
        """As after a kill: nothing is finished or told. Connections end, transactions stay open."""
        self.application.agreed.seats.remove(self.seat)
        await self.supervisor.stop()


@pytest.fixture
async def application(kafka: str, topic_names: Callable[[str], str], tmp_path: Path) -> AsyncIterator[Application]:
    one = Application(kafka, topic_names("takeover"), tmp_path)
    await asyncio.to_thread(one.kafka.create, one.source, 2)
    yield one
    await one.close()


async def pair(application: Application) -> tuple[Node, Node]:
    """Node a owns partition 0 and b stands by, both where they should be; partition 1 is nobody's."""
    a, b = application.node("a", leads=True), application.node("b")
    a.start()
    await a.until(lambda: len(application.agreed.partitions) == 2, "the leader found the partitions")
    application.agreed.assign(0, owner="a", epoch=1, standbys=("b",))
    b.start()
    await application.produce("ann", "bob", "ann")
    await a.serves()
    await b.follows()
    return a, b


def contents(store: StateStore) -> tuple[object, ...]:
    return store.scan(None, 10_000), store.progress(), store.counters(), store.layout()


async def equal(owner: Node, standby: Node) -> None:
    def there() -> bool:
        return standby.store().changelog_offset() >= owner.store().changelog_offset()

    await standby.until(there, "standby at the owner's offset")
    assert contents(standby.store()) == contents(owner.store())


async def test_a_node_whose_models_are_on_trial_stands_by_for_what_it_will_own(application: Application) -> None:
    node = application.node("a", leads=True)
    node.start(owns=False)
    await node.until(lambda: len(application.agreed.partitions) == 2, "the leader found the partitions")
    application.agreed.assign(0, owner="a", epoch=1)
    await node.follows()
    assert node.restored == [0], "state is fetched meanwhile"
    assert not node.sessions
    assert any("models are being tried" in reason for reason in node.replicas.unready())
    assert any("tries its models" in reason for reason in node.replicas.unready())
    node.replicas.own()
    await node.serves()


async def test_what_a_move_waits_for_is_told_at_once(application: Application) -> None:
    a, b = await pair(application)
    assert [told[0].serving for told in a.told if 0 in told] == [True], "an owner that has opened the partition"
    *before, last = [(told[0].serving, told[0].frames_behind) for told in b.told]
    assert last == (False, 0), "a standby at the end"
    assert len(before) <= 1, "how far behind it is, unless it is at the end"
    application.agreed.take_over(0, "b")
    await b.serves()
    assert b.told[-1][0].serving


async def test_a_partition_that_has_done_everything_waits_for_events_only(application: Application) -> None:
    a, _ = await pair(application)
    await application.exactly_once()
    session = a.replicas.running[0].session
    assert session is not None
    await a.until(lambda: session._cycle._idle, "idle")
    await application.produce("eve")
    await application.exactly_once()


async def test_a_standby_is_promoted_when_its_owner_dies_in_mid_transaction(application: Application) -> None:
    a, b = await pair(application)
    await application.exactly_once()
    session = a.replicas.running[0].session
    assert session is not None
    producer = session.outbox._producer
    assert producer is not None
    await producer.send_and_wait(application.topics.inferences, b"never", partition=0)
    await producer.send_and_wait(application.topics.changelog, b"never", partition=0)
    await a.die()
    await application.produce("ann", "eve")
    store = b.store()
    application.agreed.take_over(0, "b")
    await b.serves()
    await application.exactly_once()
    assert b.store() is store, "it was open all the time"
    assert b.sessions[0] == 1
    progress = b.progress(0)
    assert progress is not None
    assert progress.serving


async def test_a_move_there_and_back(application: Application) -> None:
    a, b = await pair(application)
    producing = asyncio.ensure_future(_produce_until_cancelled(application))
    for source, target in ((a, b), (b, a), (a, b)):
        await target.follows()
        application.agreed.unavailable = 1
        application.agreed.assign(0, to=target.name)
        await target.serves()
        assert application.agreed.partitions[0].owner == target.name
        await source.follows()
    producing.cancel()
    await asyncio.gather(producing, return_exceptions=True)
    await application.exactly_once()
    await equal(b, a)
    assert a.replicas.running[0].role == "standby"
    assert b.replicas.running[0].epoch == 4


async def _produce_until_cancelled(application: Application) -> None:
    number = 0
    while True:
        number += 1
        await application.produce(f"c{number % 7}")


async def test_a_node_that_proposes_too_much_at_once_asks_again(application: Application) -> None:
    application.agreed.refusal, application.agreed.unavailable = BoundExceeded, 1
    a, b = await pair(application)
    assert application.agreed.unavailable == 0
    application.agreed.unavailable = 1
    application.agreed.assign(0, to="b")
    await b.serves()
    assert application.agreed.unavailable == 0
    await application.exactly_once()
    await a.follows()


async def test_a_cancelled_move_leaves_the_owner_in_place(application: Application) -> None:
    a, b = await pair(application)
    application.agreed.unavailable = 1_000_000
    application.agreed.assign(0, to="b")
    revision = application.agreed.partitions[0].revision

    def released() -> bool:
        progress = a.progress(0)
        return progress is not None and progress.released_revision == revision

    await a.until(released, "the release is reported")
    assert a.replicas.running[0].session is None
    await application.produce("ann")
    application.agreed.assign(0, to="")
    await a.serves()
    progress = a.progress(0)
    assert progress is not None
    assert progress.released_revision == 0
    await application.exactly_once()
    await equal(a, b)


async def test_a_lost_lease_closes_the_session_until_it_is_back(application: Application) -> None:
    a, b = await pair(application)
    await application.exactly_once()
    application.agreed.lease("a", holds=False)
    await a.until(lambda: a.replicas.running[0].session is None, "the session is closed")
    await a.follows()
    before = await application.inferences()
    await application.produce("ann")
    assert a.replicas.running[0].role == "owner"
    assert len(await application.inferences()) == len(before)
    application.agreed.lease("a", holds=True)
    await application.exactly_once()
    assert a.sessions[0] == 2
    await equal(a, b)


async def test_an_owner_that_was_paused_through_a_takeover_commits_nothing(application: Application) -> None:
    """It learns of nothing, as a stopped process, and has a commit under way; then it wakes."""
    a, b = await pair(application)
    await application.exactly_once()
    session = a.replicas.running[0].session
    assert session is not None
    stale, held = session.outbox, dict(a.seat.held())
    a.seat.update = lambda: None
    a.seat.held = lambda: held  # type: ignore[method-assign]
    a.seat.may_own = lambda partition, epoch: True  # type: ignore[method-assign]
    inner = stale._send
    waking = asyncio.Event()

    async def paused(*given: Any) -> int:
        await waking.wait()
        return await inner(*given)

    stale._send = paused  # type: ignore[method-assign]
    await application.produce("ann")
    await a.until(lambda: not session._committer.idle, "a commit is under way")
    application.agreed.take_over(0, "b")
    await b.serves()
    await application.exactly_once()
    waking.set()
    await a.until(lambda: "Fenced" in a.replicas.running[0].condition.reason, "the old owner is fenced")
    del a.seat.held, a.seat.may_own
    a.seat.update = a.replicas.update
    application.agreed.changed()
    await application.produce("ann", "bob")
    await application.exactly_once()
    await equal(b, a)


async def test_a_cut_changelog_asks_for_a_snapshot(application: Application) -> None:
    a, b = await pair(application)
    await application.exactly_once()
    await b.die()
    offset = a.store().changelog_offset()
    await application.produce("ann", "eve")
    await application.exactly_once()
    admin = AIOKafkaAdminClient(**application.options)
    await admin.start()
    place = TopicPartition(application.topics.changelog, 0)
    await admin.delete_records({place: RecordsToDelete(a.store().changelog_offset())})
    await admin.close()
    assert a.store().changelog_offset() > offset

    # the node comes back with what it had on disk, and one with nothing joins
    snapshot = application.folder / "snapshot"
    again, fresh = application.node("b"), application.node("c")
    for node in (again, fresh):
        node.snapshots[0] = lambda path: _restore_from(a.store(), path)
        node.start()
    application.agreed.assign(0, standbys=("b", "c"))
    for node in (again, fresh):
        await node.follows()
        assert node.restored == [0]
        await equal(a, node)
    assert not snapshot.exists()

    # nobody has one: it waits, says so, and goes on when there is one
    hopeless = application.node("d")
    hopeless.start()
    application.agreed.assign(0, standbys=("b", "c", "d"))
    await hopeless.until(lambda: len(hopeless.restored) > 1, "it asks again")
    assert "ChangelogCut" in hopeless.replicas.running[0].condition.reason
    hopeless.snapshots[0] = lambda path: _restore_from(a.store(), path)
    await hopeless.follows()
    await application.produce("ann")
    await equal(a, hopeless)


def _restore_from(store: StateStore, path: Path) -> bool:
    """A copy as of the store's offset, written as a store's own files are."""
    environment = RocksEnvironment.of()
    copy = RocksStore(path, environment)
    with contextlib.closing(copy):
        rows = store.scan(None, 10_000)
        columns = np.array([np.frombuffer(row, "<f8") for _, row in rows])
        keys = [key for key, _ in rows]
        frame = Frame(store.progress(), 0, keys, columns, store.layout(), (), {}, store.counters())
        copy.apply(frame, store.changelog_offset())
    return True


async def test_state_that_is_not_wanted_any_more_is_closed_and_comes_back(application: Application) -> None:
    a, b = await pair(application)
    application.agreed.assign(0, standbys=())
    await b.until(lambda: not b.replicas.stores(), "the store is closed")
    assert b.replicas.running == {}
    kept = b.progress(0)
    assert kept is not None
    assert 0 < kept.offset <= a.store().changelog_offset()
    assert kept.frames_behind == STANDBY_UNKNOWN_FRAMES
    await application.produce("ann")
    application.agreed.assign(0, standbys=("b",))
    await b.follows()
    await application.exactly_once()
    await equal(a, b)
    assert b.restored == [0], "once, when it was empty"


async def test_state_is_deleted_only_once_enough_others_have_it(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.replicas.UNUSED_MS_MAX", 0)
    monkeypatch.setattr("node.replicas._LOOK_SECONDS", 0.01)
    a, b = await pair(application)
    folder = application.folder / "b" / "0"
    application.agreed.assign(0, standbys=())
    await b.until(lambda: b.seat.asked > 2, "it asks, and again")
    assert folder.exists()
    kept = b.progress(0)
    assert kept is not None, "the leader may still give it the partition"
    application.agreed.held_elsewhere = True
    await b.until(lambda: not folder.exists(), "it is deleted")
    assert b.progress(0) is None
    await application.exactly_once()
    assert a.store().changelog_offset() >= kept.offset


async def test_a_standby_that_restores_heeds_what_it_is_told_meanwhile(application: Application) -> None:
    """A restore of gigabytes may take minutes."""
    a, _ = await pair(application)
    fresh = application.node("c")
    fresh.snapshots_there.clear()
    fresh.start()
    application.agreed.assign(0, standbys=("b", "c"))
    await fresh.until(lambda: bool(fresh.restored), "it restores")
    application.agreed.assign(0, standbys=("b",))
    await fresh.until(lambda: fresh.replicas._all[0].condition.phase == "stopped", "it has no business with it")
    application.agreed.assign(0, standbys=("b", "c"))
    await fresh.until(lambda: len(fresh.restored) == 2, "it restores again")
    async with asyncio.timeout(STOP_MS_MAX / 3000):
        await fresh.stop()
    await application.exactly_once()
    assert a.store().changelog_offset() > 0
