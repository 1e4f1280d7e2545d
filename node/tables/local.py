"""Tables of a node that is by itself: what is live is kept in one file beside the versions."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from node.kernel.errors import NotFound, StateCorrupt, StoreUnavailable, TableRefused
from node.kernel.table_versions import Feed, Table, TableVersion
from node.tables.library import TableLibrary


class _Kept(msgspec.Struct, frozen=True):
    revision: int = 0
    tables: dict[str, Table] = {}


class LocalTables:
    """A `TableLedger`: a version that is put is live once the file says so.

    Raises StateCorrupt for a damaged file, StoreUnavailable.
    """

    def __init__(self, path: Path, library: TableLibrary) -> None:
        self._path = path
        self._library = library
        self._changing = asyncio.Lock()
        try:
            self._kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
        except FileNotFoundError:
            self._kept = _Kept()
        except (OSError, msgspec.MsgspecError) as failure:
            raise StateCorrupt(
                f"{path} can't be read: {failure}; restore it, or remove it and put the tables anew"
            ) from None

    def start(self) -> None:
        self._library.agreed(self._kept.tables)

    def tables(self) -> Mapping[str, Table]:
        return self._kept.tables

    def waits_for(self, name: str) -> list[str]:
        return []

    def held(self, name: str) -> bool:
        return True

    async def put(self, name: str, version: TableVersion) -> None:
        async with self._changing:
            revision = self._kept.revision + 1
            table = self._kept.tables.get(name, Table(name, {}))
            problem = table.problem_of(version)
            if problem:
                raise TableRefused([problem])
            table = table.with_put(version, revision)
            if table.passed is not None:
                table = table.with_live(version.version, revision)
            for surplus in table.surplus:
                table = table.without(surplus, revision)
            await self._keep({**self._kept.tables, name: table})

    async def drop(self, name: str) -> None:
        async with self._changing:
            if name not in self._kept.tables:
                raise NotFound(f"there is no table {name}; `headrace table list` names those that are")
            await self._keep({other: table for other, table in self._kept.tables.items() if other != name})

    async def follow(self, name: str, feed: Feed) -> None:
        async with self._changing:
            table = self._kept.tables.get(name, Table(name, {}))
            if not feed.same_wish(table.feed):
                await self._keep({**self._kept.tables, name: table.with_feed(feed, self._kept.revision + 1)})

    async def unfollow(self, name: str) -> None:
        async with self._changing:
            tables = dict(self._kept.tables)
            table = tables.pop(name, None)
            if table is not None and table.versions:
                tables[name] = table.with_feed(None, self._kept.revision + 1)
            await self._keep(tables)

    async def _keep(self, tables: dict[str, Table]) -> None:
        kept = _Kept(self._kept.revision + 1, tables)
        try:
            await self._library.open({table.live for table in tables.values() if table.live})
            await asyncio.to_thread(self._write, msgspec.json.encode(kept))
            self._kept = kept
        finally:
            self._library.agreed(self._kept.tables)

    def _write(self, content: bytes) -> None:
        beside = self._path.with_suffix(".new")
        try:
            with beside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError as failure:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise StoreUnavailable(f"{self._path} can't be written: {failure}; free or repair the disk") from failure
