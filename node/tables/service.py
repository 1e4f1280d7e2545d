"""Putting, rolling back and dropping tables on a node, whoever asked.

A file is checked and built by a process of its own (`node.tables.build`), kept by its sha256, and then wished for in
the ledger; until that is done nothing has changed, and a file that is refused leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from node.kernel.child import in_child
from node.kernel.clock import Clock
from node.kernel.errors import BoundExceeded, NotFound, StoreUnavailable, TableRefused
from node.kernel.limits import TABLE_BUILD_MS_MAX, TABLE_UPLOADS_MAX, TABLES_MAX
from node.kernel.table_versions import Feed, Table, TableVersion
from node.kernel.tables import TableSchema
from node.kernel.types import FieldType
from node.tables.library import TableLibrary

log = structlog.get_logger(__name__)


class TableLedger(Protocol):
    """Where it is agreed what tables there are: a file of this node's, or the cluster's catalog.

    All changes return once this node has them. Raise TableRefused, StoreUnavailable, PeerRefused, ClusterUnavailable.
    """

    def tables(self) -> Mapping[str, Table]: ...

    def waits_for(self, name: str) -> list[str]:
        """Nodes that lack the version that waits to go live."""
        ...

    def held(self, name: str) -> bool:
        """Whether a node has the file of the version that waits to go live; True without one."""
        ...

    async def put(self, name: str, version: TableVersion) -> None: ...

    async def drop(self, name: str) -> None: ...

    async def follow(self, name: str, feed: Feed) -> None: ...

    async def unfollow(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Files:
    """Where versions are kept, by sha256. Blocking; called in a thread."""

    keep: Callable[[Path], str]
    path: Callable[[str], Path]
    names: Callable[[], Iterable[str]]
    delete: Callable[[str], None]


@dataclass(frozen=True, slots=True)
class FileWish:
    """What is asked of an uploaded file; see `node.tables.reading.Wish`."""

    format: str
    key: str = ""
    columns: tuple[str, ...] = ()
    types: Mapping[str, FieldType] | None = None
    defaults: Mapping[str, str] | None = None


class _Built(msgspec.Struct, frozen=True):
    schema: TableSchema
    rows: int
    bytes: int


class _Report(msgspec.Struct, frozen=True):
    """A line of `node.tables.build`, whose own struct would bring Arrow into the node."""

    rows: int = 0
    built: _Built | None = None
    problems: tuple[str, ...] = ()
    disk: str = ""


class TableService:
    """`users` gives the models, live or staged, that read a table: it is not dropped while there are any."""

    def __init__(
        self,
        node: str,
        folder: Path,
        files: Files,
        library: TableLibrary,
        ledger: TableLedger,
        users: Callable[[str], list[str]],
        upload_bytes_max: int,
        build_memory_mb: int,
        clock: Clock,
    ) -> None:
        self.node = node
        self._folder = folder
        self._files = files
        self.library = library
        self.ledger = ledger
        self._users = users
        self.upload_bytes_max = upload_bytes_max
        self._memory_mb = build_memory_mb
        self._clock = clock
        self._collecting = asyncio.Lock()
        self._keeping = 0
        self.building: dict[str, int] = {}
        """Table -> rows read so far of the file that is being checked."""

    @contextlib.asynccontextmanager
    async def upload(self, name: str) -> AsyncIterator[Path]:
        """A folder for one upload of the table, gone afterwards. Raises BoundExceeded, StoreUnavailable."""
        if name in self.building or len(self.building) >= TABLE_UPLOADS_MAX:
            raise BoundExceeded(f"{len(self.building)} tables are being put on this node already; wait for them")
        self._check_room(name)
        self.building[name] = 0
        try:
            with tempfile.TemporaryDirectory(prefix=".upload-", dir=self._folder) as folder:
                yield Path(folder)
        except OSError as failure:
            raise StoreUnavailable(
                f"the upload of table {name} can't be written: {failure}; free the disk"
            ) from failure
        finally:
            del self.building[name]

    def _check_room(self, name: str) -> None:
        if name not in self.ledger.tables() and len(self.ledger.tables()) >= TABLES_MAX:
            raise BoundExceeded(f"there are {TABLES_MAX} tables (TABLES_MAX); drop one first")

    async def put(self, name: str, source: Path, wish: FileWish) -> TableVersion:
        """Check and build `source`, which is in the folder of its `upload`, and wish for it.

        Raises TableRefused, StoreUnavailable, and what the ledger raises.
        """
        before = self.ledger.tables().get(name)
        self._check_unfed(before)
        built = await self._build(name, source, wish, before.schema if before is not None else None)
        return await self._kept(name, source, built)

    async def put_changes(
        self, name: str, source: Path, feed: Feed, base: TableVersion | None, offsets: tuple[int, ...]
    ) -> TableVersion:
        """A version that its feed made, None: an empty table, with the changes in `source`, which bring it to
        `offsets`. Raises as `put`."""
        path = "" if base is None else str(self._files.path(base.version))
        schema = TableSchema.decode(feed.schema)
        built = await self._build(name, source, FileWish("ndjson"), schema, changes_to=path)
        return await self._kept(name, source, built, feed.number, offsets)

    async def _kept(
        self, name: str, source: Path, built: _Built, feed: int = 0, offsets: tuple[int, ...] = ()
    ) -> TableVersion:
        schema, now_ms = built.schema.encode(), self._clock.now_ms()
        self._keeping += 1
        try:
            sha256 = await asyncio.to_thread(self._files.keep, source.parent / "built")
            version = TableVersion(
                sha256, schema, built.rows, built.bytes, who=self.node, at_ms=now_ms, feed=feed, offsets=offsets
            )
            await self.ledger.put(name, version)
        finally:
            self._keeping -= 1
        log.info("table put", table=name, version=version.short_version, rows=built.rows)
        await self.collect()
        return version

    async def follow(self, name: str, feed: Feed) -> None:
        """Have the table follow a topic. Raises TableRefused, BoundExceeded, and what the ledger raises."""
        self._check_room(name)
        table = self.ledger.tables().get(name)
        if table is not None and table.versions:
            problems = TableSchema.decode(feed.schema).problems_after(table.schema)
            if problems:
                raise TableRefused(problems)
        await self.ledger.follow(name, msgspec.structs.replace(feed, who=self.node, at_ms=self._clock.now_ms()))
        log.info("table follows a topic", table=name, topic=feed.topic)

    async def unfollow(self, name: str) -> None:
        """Leave the table as it is. Raises NotFound, and what the ledger raises."""
        if self._table(name).feed is None:
            raise TableRefused([f"table {name} follows no topic"])
        await self.ledger.unfollow(name)
        log.info("table follows no topic any more", table=name)

    @staticmethod
    def _check_unfed(table: Table | None) -> None:
        if table is not None and table.feed is not None:
            raise TableRefused([f"table {table.name} follows topic {table.feed.topic}; unfollow it first"])

    async def rollback(self, name: str) -> TableVersion:
        """Wish for the version that was live before. Raises NotFound, TableRefused."""
        table = self._table(name)
        self._check_unfed(table)
        version = table.fallback
        if version is None:
            raise TableRefused([f"table {name} has no version before the live one to go back to"])
        used = set(self._users(name))
        missing = TableSchema.decode(version.schema).problems_after(table.schema)
        if missing and used:
            raise TableRefused([*missing, f"models that read the table: {', '.join(sorted(used))}"])
        # One that a topic made comes back as a file would: the table does not follow that topic any more.
        again = msgspec.structs.replace(version, at_ms=self._clock.now_ms(), feed=0, offsets=())
        await self.ledger.put(name, again)
        log.info("table rolled back", table=name, version=version.short_version)
        return version

    async def drop(self, name: str) -> None:
        """Raises NotFound, and TableRefused with the models that read it."""
        self._table(name)
        users = self._users(name)
        if users:
            raise TableRefused([f"table {name} is read by {', '.join(users)}; delete these models first"])
        await self.ledger.drop(name)
        log.info("table dropped", table=name)
        await self.collect()

    def _table(self, name: str) -> Table:
        table = self.ledger.tables().get(name)
        if table is None:
            raise NotFound(f"there is no table {name}; `headrace table list` names those that are")
        return table

    async def collect(self) -> None:
        """Delete the files of versions that no table has; not while one is kept that is not in the ledger yet."""
        async with self._collecting:
            for sha256 in list(await asyncio.to_thread(self._files.names)):
                wanted = {version for table in self.ledger.tables().values() for version in table.versions}
                if sha256 not in wanted and not self._keeping:
                    await asyncio.to_thread(self._files.delete, sha256)

    async def _build(
        self, name: str, source: Path, wish: FileWish, before: TableSchema | None, changes_to: str | None = None
    ) -> _Built:
        order = {
            "source": str(source),
            "format": wish.format,
            "target": str(source.parent / "built"),
            "scratch": str(source.parent),
            "memory_mb": self._memory_mb,
            "key": wish.key,
            "columns": wish.columns,
            "types": dict(wish.types or {}),
            "defaults": dict(wish.defaults or {}),
            "before": before,
            "changes_to": changes_to,
        }
        try:
            async with asyncio.timeout(TABLE_BUILD_MS_MAX / 1000):
                return await in_child(
                    ("-m", "node.tables"), lambda process: self._followed(name, process, msgspec.json.encode(order))
                )
        except TimeoutError:
            raise TableRefused(
                [f"building took over {TABLE_BUILD_MS_MAX // 60_000} minutes; take fewer rows"]
            ) from None

    def _followed(self, name: str, process: subprocess.Popen[bytes], order: bytes) -> _Built:
        """Runs in a thread."""
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # it has ended: its code is told below
            pipe.write(order)
        for line in process.stdout:
            report = msgspec.json.decode(line, type=_Report)
            if report.problems:
                raise TableRefused(report.problems)
            if report.disk:
                raise StoreUnavailable(f"table {name} can't be built: {report.disk}; free or repair the disk")
            if report.built is not None:
                return report.built
            self.building[name] = report.rows
        code = process.wait()
        raise TableRefused([f"the process that checks the file ended with {code}: is [tables] build_memory_mb enough?"])
