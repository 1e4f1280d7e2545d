"""What the tests of snapshots share: stores with rows in them, and frames that change some."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from node.kernel.clock import SystemClock
from node.kernel.digest import StoreDigest, digest_store
from node.kernel.limits import MIB
from node.kernel.types import Frame
from node.state.inspection import changelog_offset_of
from node.state.rocksdb import RocksEnvironment, RocksStore
from replication.catalog import Assignment, Catalog, Node
from replication.peers import PeerClient, PeerServer
from replication.snapshot_folder import SnapshotFolder
from replication.snapshot_store import SnapshotStore
from replication.snapshots import Snapshots, Sources

ENVIRONMENT = RocksEnvironment.of(32 * MIB, 8 * MIB)
CHANGELOG = "shop-changelog"


def frames(seed: int = 1, customers: int = 2_000, rows: int = 100, slots: int = 32) -> Iterator[Frame]:
    """Frames of one writer, each with `rows` rows of random `customers`; the n-th says so in its progress."""
    generator = np.random.default_rng(seed)
    number = 0
    while True:
        number += 1
        names = [b"%06d" % name for name in generator.choice(customers, rows, replace=False)]
        yield Frame({"events": number}, 1, names, generator.random((rows, slots)), b"layout")


def fold(store: RocksStore, source: Iterator[Frame], count: int) -> None:
    """The n-th frame of all has the changelog offset n."""
    for _ in range(count):
        frame = next(source)
        store.apply(frame, frame.progress["events"])


def open_store(folder: Path) -> RocksStore:
    return RocksStore(folder, ENVIRONMENT)


def digest_folder(folder: Path) -> StoreDigest:
    store = open_store(folder)
    try:
        return digest_store(store)
    finally:
        store.close()


def damage(path: Path) -> None:
    """Change bytes in its middle, in place."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        found = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([found[0] ^ 0xFF]))


# --- nodes ----------------------------------------------------------------------------------------------------------

SECRET = b"a secret of the cluster"
WAIT_S_MAX = 60.0


@dataclass
class Membership:
    """One node's view of the cluster."""

    name: str
    catalog: Catalog


class SnapshotNode:
    """The parts of a node that snapshots need: stores, peers, and snapshots of them on its disk."""

    def __init__(
        self, path: Path, name: str, store: SnapshotStore | None = None, interval_seconds: float = 3600.0
    ) -> None:
        self.path = path / name
        self.cluster = Membership(name, Catalog())
        self.stores: dict[int, RocksStore] = {}
        self.bounds = (0, 2**60)
        clock = SystemClock()
        self.client = PeerClient(name, SECRET, clock)
        self.folder = SnapshotFolder(self.path / "snapshots", CHANGELOG, name, clock)
        sources = Sources(lambda: self.stores, changelog_offset_of, self._bounds)
        self.snapshots = Snapshots(self.folder, self.cluster, self.client, sources, clock, interval_seconds, store)
        self.server = PeerServer("127.0.0.1:0", name, SECRET, clock, self.snapshots.routes())
        self._running: asyncio.Task[None] | None = None

    async def _bounds(self, partition: int) -> tuple[int, int]:
        return self.bounds

    async def start(self) -> None:
        await self.snapshots.open()
        await self.client.start()
        await self.server.start()

    def run(self) -> None:
        self._running = asyncio.create_task(self.snapshots.run())

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self.snapshots.close()
        await self.server.stop()
        await self.client.stop()
        for store in self.stores.values():
            store.close()
        self.stores.clear()

    def open(self, partition: int, name: str = "") -> RocksStore:
        self.stores[partition] = open_store(self.path / (name or f"store-{partition}"))
        return self.stores[partition]


def agree(nodes: Sequence[SnapshotNode], owner: str = "", standbys: tuple[str, ...] = (), partitions: int = 1) -> None:
    """Tell the nodes of each other, and who has the partitions."""
    members = {node.cluster.name: Node(node.cluster.name, "", node.server.address, "", 1.0, 1, 0) for node in nodes}
    held = Assignment(owner=owner or nodes[0].cluster.name, epoch=1, standbys=standbys)
    for node in nodes:
        node.cluster.catalog = Catalog(revision=1, nodes=members, partitions=(held,) * partitions)
