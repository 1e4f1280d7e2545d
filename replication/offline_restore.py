"""Restoring one partition of a node that is stopped: from its own snapshots, another node's, or the store by URL.

A running node restores by itself; this is for an operator who wants a certain source, or has only the store left.
"""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from node.kernel.errors import HeadraceError, NotFound, StateCorrupt
from replication.peers import PeerClient
from replication.snapshot import Snapshot, SnapshotFile, decode_snapshot
from replication.snapshot_folder import SnapshotFolder
from replication.snapshot_store import SnapshotStore

Told = Callable[[int, int], None]
"""Called with the bytes that are here and all the bytes there are."""


class NodeRuns(HeadraceError):
    """The node has its data_dir in use; stop it first."""


class Source(Protocol):
    """Where a snapshot is taken from; both raise what their client or driver raises."""

    name: str

    async def newest(self, partition: int) -> Snapshot | None: ...

    async def fetch(self, snapshot: Snapshot, file: SnapshotFile, target: Path) -> None: ...


class PeerSource:
    def __init__(self, client: PeerClient, address: str, changelog: str) -> None:
        self.name = address
        self._client = client
        self._changelog = changelog

    async def newest(self, partition: int) -> Snapshot | None:
        try:
            content = await self._client.ask(self.name, "GET", f"/peer/snapshots/{partition}")
        except NotFound:
            return None
        return decode_snapshot(content, self._changelog, partition)

    async def fetch(self, snapshot: Snapshot, file: SnapshotFile, target: Path) -> None:
        path = f"/peer/snapshots/{snapshot.partition}/{snapshot.changelog_offset}/{file.sha256}"
        await self._client.fetch(self.name, path, target, file.bytes, file.sha256)


class StoreSource:
    def __init__(self, store: SnapshotStore) -> None:
        self.name = store.place
        self._store = store

    async def newest(self, partition: int) -> Snapshot | None:
        return await asyncio.to_thread(self._store.newest, partition)

    async def fetch(self, snapshot: Snapshot, file: SnapshotFile, target: Path) -> None:
        await asyncio.to_thread(self._store.fetch, snapshot, file, target)


async def restore(
    partition: int,
    target: Path,
    folder: SnapshotFolder,
    source: Source | None,
    opened_offset: Callable[[Path], Awaitable[int]],
    told: Told,
) -> Snapshot:
    """Make `target` the store of the partition as of the newest snapshot of `source`, None: of the node's own.

    What is fetched becomes one of the node's own snapshots first, so an interrupted call is taken up by the next. The
    old store is replaced only once the copy is whole and opens. Raises NotFound where there is no snapshot,
    StateCorrupt for a damaged one, and what the source raises.
    """
    await asyncio.to_thread(folder.open)
    snapshot = await (asyncio.to_thread(folder.newest, partition) if source is None else source.newest(partition))
    if snapshot is None:
        where = "this node" if source is None else source.name
        raise NotFound(f"{where} has no snapshot of partition {partition}; give another source with --from")
    if source is not None:
        await _fetch(snapshot, folder, source, told)
    await asyncio.to_thread(folder.verify, snapshot)
    found = await opened_offset(folder.place(partition, snapshot.changelog_offset))
    if found != snapshot.changelog_offset:
        raise StateCorrupt(
            f"the snapshot of partition {partition} at {snapshot.changelog_offset} is as of {found}; use another one"
        )
    await asyncio.to_thread(folder.link, snapshot, target)
    return snapshot


async def _fetch(snapshot: Snapshot, folder: SnapshotFolder, source: Source, told: Told) -> None:
    """Also where the node has one as of the same offset: its files are its own, and may be what is damaged."""
    wanted = await asyncio.to_thread(folder.wanted, snapshot)
    here = snapshot.bytes - sum(file.bytes for file in wanted)
    told(here, snapshot.bytes)
    for file in wanted:
        await source.fetch(snapshot, file, folder.fetched(snapshot.partition, file.sha256))
        here += file.bytes
        told(here, snapshot.bytes)
    await asyncio.to_thread(folder.adopt, snapshot)


@contextmanager
def stopped(lock: Path) -> Iterator[None]:
    """Keeps the node from being started meanwhile. Raises NodeRuns while it runs; `lock` is what it locks."""
    if not lock.exists():
        yield
        return
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NodeRuns(f"a node runs on {lock.parent}; stop it first, and start it once this is done") from None
        yield
