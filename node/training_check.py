"""`headrace check-training`: rows that models were fed, computed anew from the topics while nodes run or not."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress, TaskID

from node.app import client_options
from node.ingest.decode import EventDecoder
from node.kernel.broker import ClientOptions
from node.kernel.clock import Clock, SystemClock
from node.kernel.errors import StoreUnavailable
from node.kernel.limits import MIB
from node.kernel.tables import TableSet
from node.kernel.types import EventSchema, ModelName
from node.state.memory import MemoryStore
from node.state.rocksdb import RocksEnvironment, RocksStore
from node.tables.version_file import VersionFile
from node.training.consistency import Check, Consistency, Recipe
from node.training.events import EventReader
from node.training.fed_rows import Described, FedRows
from node.training.logged import Logged
from node.training.reader import RowReader
from node.training.replay import Replay
from node.training.verdicts import Verdicts
from node.training_console import Wanted, progress
from replication.changelog import Changelog
from tenants.definitions import compile_definitions
from tenants.features import compile_plan
from tenants.manifest import Manifest, parse_manifest

if TYPE_CHECKING:
    from node.config_sections import Config

_CACHE_MB, _WRITE_MB = 256, 128


async def check(config: Config, wanted: Wanted, rows_max: int) -> Consistency:
    """Compare, and keep what was found for the model's status. Raises ExportFailed, BrokerUnavailable, TopicMissing,
    StateCorrupt, FrameCorrupt, ManifestError."""
    clock, data = SystemClock(), Path(config.node.data_dir)
    verdicts = Verdicts(data)
    verdicts.try_folder()
    found = Consistency(str(wanted.model), clock.now_ms(), wanted.from_ms, wanted.to_ms)
    options = client_options(config.kafka, "headrace-check")
    checking = _Checking(config, wanted, rows_max, options, clock, found, data)
    with progress(f"rows of {wanted.model}") as (bar, task):
        async with RowReader(options, config.kafka.rows_topic, clock) as reader:
            partitions = await reader.partitions()
            bar.update(task, total=100 * len(partitions))
            for partition in partitions:
                logged = await checking.logged(reader, partition)
                if logged.rows:
                    await checking.partition(partition, logged, bar, task)
                else:
                    checking.nothing(partition, logged)
                bar.update(task, completed=100 * (partition + 1))
    verdicts.put(wanted.model, found)
    return found


class _Checking:
    def __init__(
        self,
        config: Config,
        wanted: Wanted,
        rows_max: int,
        options: ClientOptions,
        clock: Clock,
        found: Consistency,
        data: Path,
    ) -> None:
        self._config = config
        self._wanted = wanted
        self._rows_max = rows_max
        self._options = options
        self._clock = clock
        self._found = found
        self._recipes = _Recipes(config.schema(), data / "tables" / "files")

    async def logged(self, reader: RowReader, partition: int) -> Logged:
        """The rows to check, and those that models gave whose outputs went into them."""
        logged = Logged()
        async for record in reader.records(partition, self._wanted.model):
            rows = self._wanted.of(record) if isinstance(record, FedRows) else record
            if rows is not None:
                logged.add(rows, self._rows_max)
        for name in logged.inputs():
            tenant, _, model = name.partition("/")
            async for record in reader.records(partition, ModelName(tenant, model)):
                if isinstance(record, FedRows) and record.triggers.kind == "event":
                    logged.add_input(record)
        return logged

    def nothing(self, partition: int, logged: Logged) -> None:
        """No row of the partition can be compared."""
        self._check(partition, logged, Replay(MemoryStore(), (), whole=False)).finish()

    def _check(self, partition: int, logged: Logged, replay: Replay) -> Check:
        topics = self._config.kafka.topics
        return Check(partition, logged, replay, self._recipes.of, self._recipes.tables, topics, self._found)

    async def partition(self, partition: int, logged: Logged, bar: Progress, task: TaskID) -> None:
        config, kafka = self._config, self._config.kafka
        changelog = Changelog(self._options, kafka.changelog_topic, partition, self._clock)
        events = EventReader(self._options, kafka.topics, partition, EventDecoder(config.events), self._clock)
        with tempfile.TemporaryDirectory(prefix="headrace-check-") as folder:
            environment = RocksEnvironment.of(_CACHE_MB * MIB, _WRITE_MB * MIB)
            store = RocksStore(Path(folder) / "state", environment)
            checking: Check | None = None
            before: Mapping[str, int] = {}
            try:
                await events.open()
                async for frame, offset, share in changelog.frames():
                    first = checking is None
                    if checking is None:
                        whole = frame.counters.get("commits", 0) == 1
                        checking = self._check(partition, logged, Replay(store, config.events.types, whole))
                    skipped = first and (not whole or config.cycle.start_from != "earliest")
                    taken = None if skipped else await events.between(before, frame.progress)
                    checking.commit(frame, offset, taken)
                    before = frame.progress
                    bar.update(task, completed=100 * (partition + share))
                (checking or self._check(partition, logged, Replay(store, (), whole=False))).finish()
            finally:
                await events.close()
                store.close()


class _Recipes:
    """Plans by what the rows topic says of versions, and tables by the files that this node keeps."""

    def __init__(self, schema: EventSchema, files: Path) -> None:
        self._files = files
        self._schema = schema
        self._known: dict[tuple[object, ...], tuple[Described, Recipe]] = {}
        self._open: dict[str, VersionFile | None] = {}

    def of(self, described: Described, tables: Mapping[str, str]) -> Recipe:
        """Raises ManifestError when today's config does not allow the manifest."""
        key = (id(described), *sorted(tables.items()))
        held = self._known.get(key)
        if held is None:
            schemas = {name: file.schema for name, file in self._files_of(tables).items() if file is not None}
            held = self._known[key] = described, self._made(described, replace(self._schema, tables=schemas))
        return held[1]

    def _made(self, described: Described, schema: EventSchema) -> Recipe:
        name, source = described.name, described.source
        definitions = compile_definitions(source.definitions, schema)
        file, resolver = f"{name}.toml", definitions.resolver(name.tenant)
        text = source.manifest.encode()
        manifest = parse_manifest(file, name.tenant, name.model, text, schema, resolver)
        version, ttls_ms = manifest.version(""), {name: manifest.ttl_ms}
        models = [(version, manifest)]
        for other, (outputs, ttl_ms) in source.inputs.items():
            tenant, _, model = other.partition("/")
            stub = Manifest(ModelName(tenant, model), b"", (), outputs, "predict", ttl_ms, 0, 1.0, ())
            ttls_ms[stub.name] = ttl_ms
            models.append((stub.version(""), stub))
        return Recipe(compile_plan(models, schema, definitions), name, ttls_ms)

    def tables(self, versions: Mapping[str, str]) -> TableSet:
        found = self._files_of(versions)
        absent = {name: "its file is not here" for name, file in found.items() if file is None}
        return TableSet({name: file for name, file in found.items() if file is not None}, absent)

    def _files_of(self, versions: Mapping[str, str]) -> dict[str, VersionFile | None]:
        return {name: self._table(version) for name, version in versions.items()}

    def _table(self, version: str) -> VersionFile | None:
        if version not in self._open:
            self._open[version] = None
            for path in sorted(self._files.glob(f"{version}*")):
                try:
                    self._open[version] = VersionFile(path, version)
                except StoreUnavailable:
                    continue
        return self._open[version]


def lines(found: Consistency) -> list[str]:
    """For the operator."""
    told = [f"{found.model}: {found.compared:,} of {found.logged:,} rows compared, {found.different:,} differ"]
    told += [f"  not compared: {rows:,}: {reason}" for reason, rows in sorted(found.unchecked.items())]
    told.append(f"  state: {found.state_rows:,} rows compared, {found.state_different:,} differ")
    told += [f"  {one.inference} {one.column}: fed {one.fed!r}, computed {one.computed!r}" for one in found.differences]
    if not found.compared:
        told.append("  nothing was compared, so nothing is shown")
    return told
