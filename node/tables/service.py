"""Putting, rolling back and dropping tables on a node, whoever asked.

A file is checked and built by a process of its own (`node.tables.build`), kept by its sha256, and then wished for in
the ledger; until that is done nothing has changed, and a file that is refused leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec
import structlog

from node.kernel.clock import Clock
from node.kernel.errors import BoundExceeded, NotFound, StoreUnavailable, TableRefused
from node.kernel.limits import MIB, TABLE_BUILD_MS_MAX, TABLE_UPLOADS_MAX, TABLES_MAX
from node.kernel.table_versions import Table, TableVersion
from node.kernel.tables import TableSchema
from node.kernel.types import FieldType
from node.tables.library import TableLibrary

_ROOT: Final = Path(__file__).resolve().parents[2]
"""Where the packages are: the building process is to find this very code."""

log = structlog.get_logger(__name__)


class TableLedger(Protocol):
    """Where it is agreed what tables there are: a file of this node's, or the cluster's catalog.

    Both changes return once this node has them. Raise StoreUnavailable, PeerRefused, ClusterUnavailable.
    """

    def tables(self) -> Mapping[str, Table]: ...

    def waits_for(self, name: str) -> list[str]:
        """Nodes that lack the version that waits to go live."""
        ...

    async def put(self, name: str, version: TableVersion) -> None: ...

    async def drop(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Files:
    """Where versions are kept, by sha256. Blocking; called in a thread."""

    keep: Callable[[Path], str]
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


class TableService:
    """`users` gives the live models that read a table: it is not dropped while there are any."""

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
        self._node = node
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
        if name not in self.ledger.tables() and len(self.ledger.tables()) >= TABLES_MAX:
            raise BoundExceeded(f"there are {TABLES_MAX} tables (TABLES_MAX); drop one first")
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

    async def put(self, name: str, source: Path, wish: FileWish) -> TableVersion:
        """Check and build `source`, which is in the folder of its `upload`, and wish for it.

        Raises TableRefused, and what the ledger raises.
        """
        before = self.ledger.tables().get(name)
        built = await self._build(name, source, wish, before.schema if before is not None else None)
        self._keeping += 1
        try:
            sha256 = await asyncio.to_thread(self._files.keep, source.parent / "built")
            version = TableVersion(
                sha256, built.schema.encode(), built.rows, built.bytes, who=self._node, at_ms=self._clock.now_ms()
            )
            await self.ledger.put(name, version)
        finally:
            self._keeping -= 1
        log.info("table put", table=name, version=version.short_version, rows=built.rows)
        await self.collect()
        return version

    async def rollback(self, name: str) -> TableVersion:
        """Wish for the version that was live before. Raises NotFound, TableRefused."""
        table = self._table(name)
        version = table.fallback
        if version is None:
            raise TableRefused([f"table {name} has no version before the live one to go back to"])
        used = set(self._users(name))
        missing = TableSchema.decode(version.schema).problems_after(table.schema)
        if missing and used:
            raise TableRefused([*missing, f"models that read the table: {', '.join(sorted(used))}"])
        await self.ledger.put(name, msgspec.structs.replace(version, at_ms=self._clock.now_ms()))
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

    async def _build(self, name: str, source: Path, wish: FileWish, before: TableSchema | None) -> _Built:
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
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "node.tables.build"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=MIB,
            cwd=_ROOT,
        )
        try:
            async with asyncio.timeout(TABLE_BUILD_MS_MAX / 1000):
                return await self._followed(name, process, msgspec.json.encode(order))
        except TimeoutError:
            raise TableRefused(
                [f"building took over {TABLE_BUILD_MS_MAX // 60_000} minutes; take fewer rows"]
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    async def _followed(self, name: str, process: asyncio.subprocess.Process, order: bytes) -> _Built:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(order)
        process.stdin.write_eof()
        async for line in process.stdout:
            report = msgspec.json.decode(line, type=_Report)
            if report.problems:
                raise TableRefused(report.problems)
            if report.built is not None:
                return report.built
            self.building[name] = report.rows
        code = await process.wait()
        raise TableRefused([f"the process that checks the file ended with {code}: is [tables] build_memory_mb enough?"])
