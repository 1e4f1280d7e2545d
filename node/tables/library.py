"""The versions of tables that this node has open, and the set of them that cycles pin.

`agreed` says what is live; a version that waits to go live is opened beforehand, in a thread, so that the flip itself
is one assignment on the loop, between two cycles. A live version that is not here is told as absent: models that read
the table wait for it, rather than be fed from another version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import structlog

from node.kernel.errors import StoreUnavailable
from node.kernel.supervise import Supervisor
from node.kernel.table_versions import Table
from node.kernel.tables import NO_TABLES, TableReader, TableSchema, TableSet
from node.tables.version_file import MENDED, VersionFile

log = structlog.get_logger(__name__)


class TableLibrary:
    """`path` is where the file of a version is, once it is here. `changed` hears when schemas have changed."""

    def __init__(self, path: Callable[[str], Path], supervisor: Supervisor) -> None:
        self._path = path
        self._supervisor = supervisor
        self._open: dict[str, VersionFile] = {}
        self._opening: set[str] = set()
        self.schemas: dict[str, TableSchema] = {}
        """Of all tables: changed in place, as it is what manifests are checked against."""
        self.tables: Mapping[str, Table] = {}
        self.changed: Callable[[], None] = lambda: None
        self.flips = 0
        self._current = NO_TABLES

    def current(self) -> TableSet:
        """What is live now; a new object whenever that changes."""
        return self._current

    def agreed(self, tables: Mapping[str, Table]) -> None:
        """What is so from now on. On the loop."""
        known = self.tables
        self.tables = dict(tables)
        wanted = {version for table in tables.values() for version in table.versions}
        for version in self._open.keys() - wanted:
            del self._open[version]
        for version in wanted - self._open.keys():
            self._open_ahead(version, tables)
        if known != self.tables or self._current.absent:
            self._flip()
        schemas = {name: table.schema for name, table in tables.items() if table.versions}
        if schemas != self.schemas:
            self.schemas.clear()
            self.schemas.update(schemas)
            self.changed()

    def _flip(self) -> None:
        readers: dict[str, TableReader] = {}
        absent: dict[str, str] = {}
        for name, table in self.tables.items():
            if not table.live:
                continue
            try:
                readers[name] = self._opened(table.live)
            except StoreUnavailable as failure:
                absent[name] = str(failure)
        before = self._current
        self._current = TableSet(readers, absent)
        if before.versions(readers) != self._current.versions(readers):
            self.flips += 1
            log.info("tables flipped", versions=self._current.versions(readers), absent=sorted(absent))

    def _opened(self, version: str) -> VersionFile:
        found = self._open.get(version)
        if found is None:
            path = self._path(version)
            if not path.exists():
                raise StoreUnavailable(f"version {version[:12]} is not here yet; {MENDED}")
            found = self._open[version] = VersionFile(path, version[:12])
        return found

    def _open_ahead(self, version: str, tables: Mapping[str, Table]) -> None:
        waits = any(table.live != version and version in table.versions for table in tables.values())
        if waits and version not in self._opening and self._path(version).exists():
            self._opening.add(version)
            self._supervisor.start(f"open table {version[:12]}", self._ahead(version))

    async def _ahead(self, version: str) -> None:
        try:
            opened = await self._opened_beside(version)
            if opened is not None and any(version in table.versions for table in self.tables.values()):
                self._open.setdefault(version, opened)
        finally:
            self._opening.discard(version)

    async def open(self, versions: Set[str]) -> None:
        """Open what is about to be agreed: `agreed` must follow, also if it has come to nothing, and closes what is not
        wanted. What can't be opened is told as absent then."""
        for version in versions - self._open.keys():
            opened = await self._opened_beside(version)
            if opened is not None:
                self._open[version] = opened

    async def _opened_beside(self, version: str) -> VersionFile | None:
        try:
            return await asyncio.to_thread(VersionFile, self._path(version), version[:12])
        except StoreUnavailable as failure:
            log.warning("a table's version can't be opened", version=version[:12], reason=str(failure))
            return None
