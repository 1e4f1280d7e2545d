"""The demo from its first line to its last: prepare, start, stream, judge, clean up."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from demonstration.data import DAY_MS, Array, Events, Frames, build_events, read_frames
from demonstration.figures import Figures, NodeFigures, Speed
from demonstration.processes import Child, DemoError, free_port, start_broker, start_node
from demonstration.results import Quality, Results, quality
from demonstration.screen import Screen
from demonstration.settings import BATCH_EVENTS, PARTITIONS, WARM_UP_DAYS, Settings, Topics, node_config
from demonstration.stream import Stream
from demonstration.training import CUT_MS, FRAUD, OFFERS, REORDER, TRIGGERS, Training, drop_models, labels
from node.console import NodeUnreachable, fetch_object
from node.kernel.broker import broker_call, close_quietly
from node.kernel.errors import BrokerUnavailable
from node.kernel.types import ModelName

BROKER_CONNECT_SECONDS_MAX = 5.0
BROKER_START_SECONDS_MAX = 20.0
NODE_START_SECONDS_MAX = 90.0
STALL_SECONDS_MAX = 60.0
"""Nothing came for so long, though there is something to come."""
QUIET_SECONDS = 5.0
"""All is processed and nothing came for so long: what is missing now will not come."""
LOOK_SECONDS = 0.25

Show: TypeAlias = Callable[[Figures], None]


@dataclass(frozen=True)
class Prepared:
    """The part of the year that is streamed, and the truth about it by model (float64 [events], NaN: not judged)."""

    events: Events
    warm_up: int
    """Events at its beginning that are of the time before the cut."""
    truth: dict[ModelName, Array]
    models: dict[ModelName, Any]


@dataclass(frozen=True)
class Outcome:
    """`report` is what `--json` prints; `scores` float64 [events] by model, NaN where none came."""

    report: dict[str, Any]
    prepared: Prepared
    scores: Mapping[ModelName, Array]


def prepare(settings: Settings, screen: Screen, watched: Path, read: Callable[[], Frames]) -> Prepared:
    """Read the year, train on its first part, and drop the models into the watched directory."""
    with screen.stage("reading a year of shopping"):
        events = build_events(read())
    cut = int(np.searchsorted(events.times_ms, CUT_MS))
    with screen.stage("working out what happened later"):
        truth = labels(events, int(events.times_ms[-1]))
        training = Training(events.take(slice(0, cut)), BATCH_EVENTS)
    with screen.stage("computing features as the node will", cut) as advance:
        training.observe(advance)
    models: dict[ModelName, Any] = {}
    for name in (REORDER, OFFERS, FRAUD):
        with screen.stage(f"training {name}"):
            models[name] = training.fit(name)
    drop_models(models, watched)
    part, warm_up = _streamed(events, cut, settings.events)
    judged = {name: column[part].copy() for name, column in truth.items()}
    for column in judged.values():
        column[:warm_up] = np.nan
    return Prepared(events.take(part), warm_up, judged, models)


def _streamed(events: Events, cut: int, limit: int | None) -> tuple[slice, int]:
    """Which events to stream, and how many of them are for warming up."""
    warm_up = cut - int(np.searchsorted(events.times_ms, CUT_MS - WARM_UP_DAYS * DAY_MS))
    end = len(events)
    if limit is not None:
        end = min(end, cut + limit)
        warm_up = min(warm_up, limit // 4)
    return slice(cut - warm_up, end), warm_up


def run(settings: Settings, screen: Screen, folder: Path, read: Callable[[], Frames] = read_frames) -> Outcome:
    """All of it. What was started is stopped, whatever happens. Raises HeadraceError."""
    if settings.kafka:
        check_answers(settings.kafka)
    prepared = prepare(settings, screen, folder / "tenants", read)
    with ExitStack() as children:
        address, started = settings.kafka, list[Child]()
        if address is None:
            broker, address = start_broker(folder / "broker.log")
            children.callback(broker.stop)
            started.append(broker)
        return asyncio.run(_Demo(settings, screen, folder, prepared, address, children, started).run())


def check_answers(address: str) -> None:
    """Before all the work: raises DemoError if nobody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), BROKER_CONNECT_SECONDS_MAX).close()
    except (OSError, OverflowError) as error:
        raise DemoError(f"no Kafka answers at {address} ({error}); start one, or leave out --kafka") from error


class _Demo:
    def __init__(
        self,
        settings: Settings,
        screen: Screen,
        folder: Path,
        prepared: Prepared,
        address: str,
        children: ExitStack,
        started: list[Child],
    ) -> None:
        self._settings = settings
        self._screen = screen
        self._folder = folder
        self._prepared = prepared
        self._address = address
        self._children = children
        self._started = started
        self._topics = Topics(f"demo-{secrets.token_hex(4)}")
        self._port = free_port()
        self._url = f"http://127.0.0.1:{self._port}"
        self._speed = Speed()
        self._node = NodeFigures()

    async def run(self) -> Outcome:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._source_topic())
            node = self._start_node()
            # Before the topics go, the node does: it would otherwise wait for their return.
            stack.push_async_callback(asyncio.to_thread, node.stop)
            with self._screen.stage("starting the node and trying the models"):
                await self._models_live(node)
            return await self._stream(node)

    @asynccontextmanager
    async def _source_topic(self) -> AsyncIterator[None]:
        """The demo's topic; on a real broker all of the run's topics are deleted at the end."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self._address)
        await self._connect(admin)
        try:
            created = await broker_call(
                "create the demo's topic", admin.create_topics([NewTopic(self._topics.events, PARTITIONS, 1)])
            )
            for _, code, *rest in created.topic_errors:
                if code:
                    raise DemoError(f"the topic {self._topics.events} can't be made: Kafka error {code} {rest}")
            yield
        finally:
            if self._settings.kafka:
                with contextlib.suppress(BrokerUnavailable):
                    await broker_call("delete the demo's topics", admin.delete_topics(list(self._topics.all)), 10_000)
            await close_quietly("admin client", admin.close())

    async def _connect(self, admin: AIOKafkaAdminClient) -> None:
        deadline = time.monotonic() + BROKER_START_SECONDS_MAX
        while True:
            try:
                return await broker_call("connect", admin.start(), 5_000)
            except BrokerUnavailable as failure:
                if self._settings.kafka or time.monotonic() > deadline:
                    await close_quietly("admin client", admin.close())
                    raise DemoError(f"no Kafka answers at {self._address}: {failure}") from failure
                await asyncio.sleep(0.05)

    def _start_node(self) -> Child:
        config = self._folder / "node.toml"
        config.write_text(node_config(self._address, self._topics, self._port))
        node = start_node(config, self._folder / "node.log")
        self._children.callback(node.stop)
        self._started.append(node)
        return node

    def _check_children(self) -> None:
        for child in self._started:
            child.check()

    async def _models_live(self, node: Child) -> None:
        """Wait until the node is ready and all models live. Raises DemoError when one is refused, or late."""
        deadline = time.monotonic() + NODE_START_SECONDS_MAX
        waiting = "it has not answered yet"
        while time.monotonic() < deadline:
            self._check_children()
            with contextlib.suppress(NodeUnreachable):
                await asyncio.to_thread(fetch_object, self._url, "/readyz")
                answer = await asyncio.to_thread(fetch_object, self._url, "/v1/models")
                models = {ModelName(entry["tenant"], entry["model"]): entry for entry in answer["models"]}
                for name, entry in models.items():
                    if entry["state"] == "refused":
                        raise DemoError(f"the node refused model {name}: {'; '.join(entry['reasons'])}")
                missing = [str(name) for name in TRIGGERS if models.get(name, {}).get("state") != "live"]
                if not missing:
                    return
                waiting = f"not live: {', '.join(missing)}"
            await asyncio.sleep(0.1)
        raise DemoError(
            f"the node is not ready after {NODE_START_SECONDS_MAX:.0f} s ({waiting}); it said last:\n"
            + node.last_lines()
        )

    async def _stream(self, node: Child) -> Outcome:
        options = {"bootstrap_servers": self._address}
        producer = AIOKafkaProducer(**options, acks="all")
        consumer = AIOKafkaConsumer(**options, isolation_level="read_committed", enable_auto_commit=False)
        events = self._prepared.events
        triggers = np.sum([events.kinds == kind for kind in TRIGGERS.values()], axis=0)
        stream = Stream(producer, self._topics.events, events, triggers, self._settings.rate)
        results = Results(list(TRIGGERS), stream.places, len(events))
        tasks: list[asyncio.Task[None]] = []
        try:
            await broker_call("start the demo's producer", producer.start())
            await broker_call("start the demo's consumer", consumer.start())
            reading = results.read(
                consumer,
                self._topics.inferences,
                self._topics.dead_letters,
                lambda: stream.tell_answered(self._answered(results)),
            )
            tasks += [asyncio.create_task(reading), asyncio.create_task(stream.run())]
            with self._screen.stream(self._addresses()) as show:
                seconds = await self._until_done(node, stream, results, tasks, show)
                report = self._report(stream, results, seconds)
                if not self._settings.once:
                    await self._until_interrupted(stream, results, tasks, show)
            return Outcome(report, self._prepared, results.scores)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await close_quietly("the demo's consumer", consumer.stop())
            await close_quietly("the demo's producer", producer.stop())

    async def _until_done(
        self, node: Child, stream: Stream, results: Results, tasks: list[asyncio.Task[None]], show: Show
    ) -> float:
        """Show the stream until its last inference is here; gives the seconds since its first event."""
        started = time.monotonic()
        while True:
            await self._look(stream, results, tasks)
            behind = stream.produced < len(self._prepared.events) or self._node.processed < stream.produced
            show(self._figures(self._phase(), stream, results))
            if not behind and self._answered(results) >= stream.expected:
                return results.last_arrival - started
            quiet = time.monotonic() - results.last_arrival
            if not behind and not self._node.backlog_rows and quiet > QUIET_SECONDS:
                return results.last_arrival - started
            waiting = self._node.processed < stream.produced or self._node.backlog_rows
            if waiting and quiet > STALL_SECONDS_MAX:
                raise DemoError(
                    f"nothing came from the node for {quiet:.0f} s, {stream.produced - self._node.processed:,} events "
                    f"and {self._node.backlog_rows:,} triggers wait: {'; '.join(self._node.reasons) or 'no reason'}; "
                    f"it said last:\n{node.last_lines()}"
                )
            await asyncio.sleep(LOOK_SECONDS)

    async def _until_interrupted(
        self, stream: Stream, results: Results, tasks: list[asyncio.Task[None]], show: Show
    ) -> None:
        """Keep the node up for whoever wants to look at it. Ctrl-C, here, is how the demo ends well."""
        self._screen.say("The node keeps running; Ctrl-C ends the demo.")
        try:
            while True:
                await self._look(stream, results, tasks)
                show(self._figures("done", stream, results))
                await asyncio.sleep(LOOK_SECONDS)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()

    async def _look(self, stream: Stream, results: Results, tasks: list[asyncio.Task[None]]) -> None:
        """Ask the node how it is. A busy node may be late to answer: then what it said last stands."""
        self._check_children()
        for task in tasks:
            if task.done():
                task.result()
        with contextlib.suppress(NodeUnreachable):
            status = await asyncio.to_thread(fetch_object, self._url, "/v1/status")
            self._node = self._node.then(status, self._topics.events)
        stream.tell_answered(self._answered(results))
        self._speed.tell(time.monotonic(), {"events": self._node.processed, **results.inferences})

    def _answered(self, results: Results) -> int:
        """Triggers that are done with, one way or another."""
        return results.total + self._node.failed + self._node.shed

    def _phase(self) -> str:
        return "warming up" if self._node.processed < self._prepared.warm_up else "streaming"

    def _figures(self, phase: str, stream: Stream, results: Results) -> Figures:
        times_ms = self._prepared.events.times_ms
        reached = times_ms[min(self._node.processed, len(times_ms) - 1)]
        return Figures(
            phase=phase,
            total=len(times_ms),
            produced=stream.produced,
            events_per_s=self._speed.of("events"),
            day=str(np.datetime64(int(reached), "ms").astype("datetime64[D]")),
            inferences=dict(results.inferences),
            inferences_per_s={name: self._speed.of(name) for name in results.inferences},
            dead_letters=results.dead_letters,
            node=self._node,
        )

    def _report(self, stream: Stream, results: Results, seconds: float) -> dict[str, Any]:
        """Print the result, and give it as it goes into JSON."""
        judged = {name: quality(results.scores[name], self._prepared.truth[name]) for name in TRIGGERS}
        figures = self._figures("done", stream, results)
        self._screen.result(figures, seconds, judged)
        return report_of(figures, seconds, judged, self._prepared.warm_up, results.doubled)

    def _addresses(self) -> list[str]:
        customer = f"/v1/customers/{self._prepared.events.households[-1]}"
        # As of the customer's own last event: by today, all that happened in 2017 has expired.
        paths = (
            "/v1/status",
            "/v1/models",
            f"{customer}?at=last",
            f"{customer}/features?model={OFFERS}&at=last",
            f"{customer}/inferences?at=last",
            "/metrics",
        )
        return [f"look at {self._url}{path}" for path in paths]


def report_of(
    figures: Figures, seconds: float, judged: Mapping[ModelName, Quality], warm_up: int, doubled: int
) -> dict[str, Any]:
    """The object that `--json` prints. `events` counts those of the warm-up too, `quality` does not."""
    return {
        "events": figures.node.processed,
        "warm_up_events": warm_up,
        "seconds": round(seconds, 3),
        "events_per_s": round(figures.node.processed / seconds, 1) if seconds > 0 else 0.0,
        "delivery": figures.node.delivery,
        "inferences": {str(name): count for name, count in figures.inferences.items()},
        "quality": {str(name): found.as_json() for name, found in judged.items()},
        "cpu_seconds": {name: round(tenant.cpu_seconds, 3) for name, tenant in figures.node.tenants.items()},
        "dead_letters": figures.dead_letters,
        "sheds": figures.node.shed,
        "doubled": doubled,
    }
