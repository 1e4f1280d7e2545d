"""What the tests of snapshots share: stores with rows in them, and frames that change some."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from node.kernel.digest import StoreDigest, digest_store
from node.kernel.limits import MIB
from node.kernel.types import Frame
from node.state.rocksdb import RocksEnvironment, RocksStore

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
