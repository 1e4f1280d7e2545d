"""The demo from its first line to its last: prepare, start, stream, judge, clean up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow.parquet
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from demonstration import products
from demonstration.data import DAY_MS, Array, Events, Frames, build_events, read_frames
from demonstration.figures import Figures, NodeFigures, Speed
from demonstration.labels import WEEK_MS, list_labels
from demonstration.lists import left_out
from demonstration.processes import Child, DemoError, free_port, headrace, start_broker, start_node
from demonstration.results import Quality, Results, quality
from demonstration.screen import Screen
from demonstration.settings import BATCH_EVENTS, PARTITIONS, WARM_UP_DAYS, Settings, Topics, node_config
from demonstration.stream import Stream
from demonstration.training import CUT_MS, FRAUD, LIST, MODELS, OFFERS, REORDER, TRIGGERS, Training, drop_models, labels
from node.console import NodeUnreachable, fetch_object
from node.kernel.broker import broker_call, close_quietly
from node.kernel.errors import BrokerUnavailable
from node.kernel.types import ModelName

BROKER_CONNECT_SECONDS_MAX = 5.0
BROKER_START_SECONDS_MAX = 20.0
NODE_START_SECONDS_MAX = 90.0
STALL_SECONDS_MAX = 60.0
"""Nothing came for so long, though there is something to come."""
LISTED_SECONDS = 1.0
"""No list was under way for so long: the last one has come."""
QUIET_SECONDS = 5.0
"""All is processed and nothing came for so long: what is missing now will not come."""
LOOK_SECONDS = 0.25

_CHECKED = ("compared", "different", "unchecked", "state_rows", "state_different")
"""Of what `headrace check-training` finds, what the report has."""
Show: TypeAlias = Callable[[Figures], None]


@dataclass(frozen=True)
class Prepared:
    """The part of the year that is streamed, and the truth about it by model (float64 [events], NaN: not judged)."""

    events: Events
    warm_up: int
    """Events at its beginning that are of the time before the cut."""
    truth: dict[ModelName, Array]
    models: dict[ModelName, Any]
    catalogues: tuple[Path, Path]
    """The table's files: as of the cut, and as of half-way."""
    known_until_ms: int
    """What happens later is not known."""


@dataclass(frozen=True)
class Outcome:
    """`report` is what `--json` prints."""

    report: dict[str, Any]
    prepared: Prepared
    results: Results


def prepare(settings: Settings, screen: Screen, folder: Path, read: Callable[[], Frames]) -> Prepared:
    """Read the year, and train on its first part."""
    with screen.stage("reading a year of shopping"):
        frames = read()
        events = build_events(frames)
    cut = int(np.searchsorted(events.times_ms, CUT_MS))
    part, warm_up = _streamed(events, cut, settings.events)
    with screen.stage("writing the catalogue, as of two days"):
        half = part.start + (part.stop - part.start) // 2
        catalogues = (
            products.write(products.catalogue(frames, events, cut), folder / "products-1.parquet"),
            products.write(products.catalogue(frames, events, half), folder / "products-2.parquet"),
        )
        table = products.table_set(products.reader(catalogues[0]))
    with screen.stage("working out what happened later"):
        truth = labels(events, int(events.times_ms[-1]))
        training = Training(events.take(slice(0, cut)), BATCH_EVENTS, table)
    with screen.stage("computing features as the node will", cut) as advance:
        training.observe(advance)
    models: dict[ModelName, Any] = {}
    for name in MODELS:
        with screen.stage(f"training {name}"):
            models[name] = training.fit(name)
    judged = {name: column[part].copy() for name, column in truth.items()}
    for column in judged.values():
        column[:warm_up] = np.nan
    return Prepared(events.take(part), warm_up, judged, models, catalogues, int(events.times_ms[-1]))


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
    prepared = prepare(settings, screen, folder, read)
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
        self._config = folder / "node.toml"
        self._half_way = asyncio.Event()
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
            with self._screen.stage("starting the node, putting the catalogue and trying the models"):
                await self._ready(node)
                await self._put(0)
                drop_models(self._prepared.models, self._folder / "tenants")
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
        (self._folder / "tenants").mkdir(exist_ok=True)
        self._config.write_text(node_config(self._address, self._topics, self._port))
        node = start_node(self._config, self._folder / "node.log")
        self._children.callback(node.stop)
        self._started.append(node)
        return node

    def _check_children(self) -> None:
        for child in self._started:
            child.check()

    async def _ready(self, node: Child) -> None:
        async def reached() -> str:
            await asyncio.to_thread(fetch_object, self._url, "/readyz")
            return ""

        await self._until(reached, node)

    async def _put(self, number: int) -> None:
        """Make that version of the catalogue the live one."""
        put = ("table", "put", products.TABLE, str(self._prepared.catalogues[number]), "--key", products.SCHEMA.key)
        await asyncio.to_thread(headrace, self._config, *put)

    async def _models_live(self, node: Child) -> None:
        async def reached() -> str:
            answer = await asyncio.to_thread(fetch_object, self._url, "/v1/models")
            models = {ModelName(entry["tenant"], entry["model"]): entry for entry in answer["models"]}
            refused = [
                f"the node refused model {name}: {'; '.join(entry['reasons'])}"
                for name, entry in models.items()
                if entry["state"] == "refused"
            ]
            missing = [str(name) for name in MODELS if models.get(name, {}).get("state") != "live"]
            return "; ".join(refused) or (f"not live: {', '.join(missing)}" if missing else "")

        await self._until(reached, node)

    async def _until(self, reached: Callable[[], Awaitable[str]], node: Child) -> None:
        """Wait until that is '' and not a reason. Raises DemoError with the last one."""
        deadline = time.monotonic() + NODE_START_SECONDS_MAX
        waiting = "it has not answered yet"
        while time.monotonic() < deadline:
            self._check_children()
            with contextlib.suppress(NodeUnreachable):
                waiting = await reached()
                if not waiting:
                    return
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
        results = Results(list(TRIGGERS), stream.places, len(events), [LIST])
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
            working = [asyncio.create_task(stream.run()), asyncio.create_task(self._flip())]
            tasks += [asyncio.create_task(reading), *working]
            with self._screen.stream(self._addresses()) as show:
                seconds = await self._until_done(node, stream, results, tasks, working, show)
                report = await self._report(stream, results, seconds)
                if not self._settings.once:
                    await self._until_interrupted(stream, results, tasks, show)
            return Outcome(report, self._prepared, results)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await close_quietly("the demo's consumer", consumer.stop())
            await close_quietly("the demo's producer", producer.stop())

    async def _flip(self) -> None:
        """Half-way, the catalogue's second version."""
        await self._half_way.wait()
        await self._put(1)

    async def _until_done(
        self,
        node: Child,
        stream: Stream,
        results: Results,
        tasks: Sequence[asyncio.Task[None]],
        working: Sequence[asyncio.Task[None]],
        show: Show,
    ) -> float:
        """Show the stream until its last inference is here; gives the seconds since its first event."""
        started, listing = time.monotonic(), time.monotonic()
        while True:
            await self._look(stream, results, tasks)
            behind = stream.produced < len(self._prepared.events) or self._node.processed < stream.produced
            behind = behind or not all(task.done() for task in working)
            show(self._figures(self._phase(), stream, results))
            if behind or self._node.lists_running or results.inferences[LIST] < self._node.listed:
                listing = time.monotonic()
            # A run that the last events have made due begins a moment after they are committed.
            listed = time.monotonic() - listing > LISTED_SECONDS
            if listed and self._answered(results) >= stream.expected:
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
        self, stream: Stream, results: Results, tasks: Sequence[asyncio.Task[None]], show: Show
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

    async def _look(self, stream: Stream, results: Results, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Ask the node how it is. A busy node may be late to answer: then what it said last stands."""
        self._check_children()
        for task in tasks:
            if task.done():
                task.result()
        with contextlib.suppress(NodeUnreachable):
            status = await asyncio.to_thread(fetch_object, self._url, "/v1/status")
            self._node = self._node.then(status, self._topics.events, str(LIST))
        if self._node.processed >= len(self._prepared.events) // 2:
            self._half_way.set()
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

    async def _report(self, stream: Stream, results: Results, seconds: float) -> dict[str, Any]:
        """Print the result, and give it as it goes into JSON."""
        judged = {name: quality(results.scores[name], self._prepared.truth[name]) for name in TRIGGERS}
        judged[LIST] = self._list_quality(results.lists[LIST])
        figures = self._figures("done", stream, results)
        shared = await asyncio.to_thread(fetch_object, self._url, "/v1/features")
        with self._screen.stage(f"exporting what {FRAUD} was fed, and computing it anew from the events"):
            rows, checked = await asyncio.to_thread(self._training_rows)
        missing = stream.expected - self._answered(results)
        report = report_of(figures, seconds, judged, self._prepared.warm_up, results.doubled, missing)
        versions = results.of_versions()
        report["tables"] = {
            "inferences_by_version": versions,
            "mixed": results.mixed,
            "unnamed": figures.inferences[REORDER] - sum(versions.values()),
        }
        report["lists"] = {
            **figures.node.lists,
            "missing": figures.node.listed - figures.inferences[LIST],
            "left_out": left_out(results.lists[LIST], self._prepared.events, stream.partitions, WEEK_MS),
        }
        report["shared_features"] = {one["name"]: one["users"] for one in shared["features"]}
        report["training_rows"] = {"exported": rows, **{name: checked[name] for name in _CHECKED}}
        report["problems"] = problems_of(report)
        self._screen.result(figures, seconds, judged, report)
        return report

    def _list_quality(self, lists: Mapping[tuple[int, int], float]) -> Quality:
        by_end: dict[int, list[tuple[int, float]]] = {}
        for (end_ms, household), score in lists.items():
            if end_ms >= CUT_MS:
                by_end.setdefault(end_ms, []).append((household, score))
        scores, truth = [np.zeros(0)], [np.zeros(0)]
        for end_ms, found in by_end.items():
            households = np.array([household for household, _ in found])
            scores.append(np.array([score for _, score in found]))
            truth.append(list_labels(self._prepared.events, households, end_ms, self._prepared.known_until_ms))
        return quality(np.concatenate(scores), np.concatenate(truth))

    def _training_rows(self) -> tuple[int, dict[str, Any]]:
        """How many rows were exported, and what the check of them found."""
        out = self._folder / "training"
        headrace(self._config, "export", "training", str(FRAUD), "--out", str(out))
        rows = sum(pyarrow.parquet.read_metadata(path).num_rows for path in out.glob("*.parquet"))
        told = headrace(self._config, "check-training", str(FRAUD), "--rows-max", "1000000", "--json", codes=(0, 1))
        return rows, json.loads(told)

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


def problems_of(report: Mapping[str, Any]) -> list[str]:
    """What must not be, a line each."""
    found = []
    if report["doubled"] and report["delivery"] == "exactly_once":
        found.append(f"{report['doubled']} inferences came twice")
    if report["missing"]:
        found.append(f"{report['missing']} triggers have neither an inference nor a dead letter, and none was shed")
    if report["tables"]["unnamed"]:
        found.append(f"{report['tables']['unnamed']} inferences of {REORDER} name no version of the catalogue")
    if report["tables"]["mixed"]:
        found.append(f"{report['tables']['mixed']} inferences are of the catalogue's version before, after the flip")
    if report["lists"]["missing"]:
        found.append(f"{report['lists']['missing']} inferences of {LIST} are committed and did not come")
    if report["lists"]["left_out"]:
        found.append(f"{report['lists']['left_out']} times {LIST} left out a household that had come in the week")
    rows = report["training_rows"]
    # The embedded broker at times tells an end that is before the last records; a real one never does.
    whole = rows["compared"] == rows["exported"] == report["inferences"][str(FRAUD)]
    if rows["different"] or rows["state_different"] or not (whole or report["delivery"] == "at_least_once"):
        found.append(f"the rows of {FRAUD} are not what the events give: {rows}")
    return found


def report_of(
    figures: Figures, seconds: float, judged: Mapping[ModelName, Quality], warm_up: int, doubled: int, missing: int
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
        "missing": missing,
    }
