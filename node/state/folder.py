"""One partition's state on this node: the folder on disk, and the store that is open on it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from node.kernel.ports import StateStore

log = structlog.get_logger(__name__)

Restore = Callable[[int, Path], Awaitable[bool]]
"""Puts a snapshot of the partition into the folder, in place of what is there; False: there is none to be had."""


class StateFolder:
    def __init__(
        self, partition: int, path: Path, open_store: Callable[[Path], StateStore], restore: Restore | None = None
    ) -> None:
        self._partition = partition
        self._path = path
        self._open_store = open_store
        self._restore = restore
        self.store: StateStore | None = None
        """While it is open."""

    @property
    def exists(self) -> bool:
        return self._path.exists()

    async def open(self) -> StateStore:
        """The store that is open, or else opened now; where nothing was folded yet, a snapshot is asked for first.

        Raises StoreUnavailable, StateCorrupt and what restoring raises.
        """
        if self.store is None:
            store = self._open_store(self._path) if self._path.exists() else None
            if self._restore is not None and (store is None or store.changelog_offset() == 0):
                if store is not None:
                    await _closed(store)
                await self._restore(self._partition, self._path)
                store = None
            self.store = store or self._open_store(self._path)
        return self.store

    async def restore(self) -> bool:
        """Take a snapshot in place of what is there, which the changelog no longer reaches back to; the store is
        closed. False when there is none."""
        if self._restore is None:
            return False
        await self.close()
        return await self._restore(self._partition, self._path)

    async def close(self) -> None:
        """It is closed to whoever asks at once; the folder may be opened again when this returns."""
        if self.store is not None:
            store, self.store = self.store, None
            await _closed(store)

    async def set_aside(self) -> None:
        """Keep the newest damaged store for inspection; the partition is rebuilt without it. One that can't be renamed
        stays where it is, and whoever opens it is told so."""
        await self.close()
        damaged = self._path.with_name(f"{self._path.name}.damaged")
        shutil.rmtree(damaged, ignore_errors=True)
        try:
            with contextlib.suppress(FileNotFoundError):
                self._path.rename(damaged)
        except OSError as failure:
            log.error("damaged store can't be set aside, move it away or mend the disk", reason=str(failure))
            return
        log.error("damaged store set aside, the partition is rebuilt from its changelog", folder=str(damaged))

    async def delete(self) -> None:
        await self.close()
        if self._path.exists():
            await asyncio.to_thread(shutil.rmtree, self._path, ignore_errors=True)
            log.info("unused state deleted", partition=self._partition, folder=str(self._path))


async def _closed(store: StateStore) -> None:
    """Beside the loop, and to the end: a store writes what it has in memory first, and waits for a copy being made."""
    await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, store.close))


class StateFolders:
    """The state folders of a node, each named by its partition's number."""

    def __init__(self, root: Path, open_store: Callable[[Path], StateStore], restore: Restore | None = None) -> None:
        self._root = root
        self._open_store = open_store
        self._restore = restore

    def of(self, partition: int) -> StateFolder:
        return StateFolder(partition, self._root / str(partition), self._open_store, self._restore)

    def found(self) -> list[int]:
        """The partitions that have a folder on disk."""
        entries = self._root.iterdir() if self._root.exists() else ()
        return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and entry.is_dir())
