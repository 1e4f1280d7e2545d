"""`headrace restore`, as an operator of a stopped node runs it: from its own disk, a peer and a store by URL."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from snapshot_support import CHANGELOG, SECRET, SnapshotNode, damage, digest_folder, fold, frames, open_store
from test_cli import GOOD, headrace

from node.kernel.clock import SystemClock
from node.kernel.digest import StoreDigest, digest_store
from node.state.rocksdb import RocksStore
from replication.snapshot_folder import SnapshotFolder
from replication.snapshot_store import SnapshotStore


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "secret").write_bytes(SECRET)
    path = tmp_path / "n1.toml"
    path.write_text(
        f'{GOOD}[node]\nname = "n1"\n[kafka]\napplication = "shop"\nchangelog_topic = "{CHANGELOG}"\n'
        '[cluster]\nlisten = "127.0.0.1:1"\npeers = { n1 = "127.0.0.1:1" }\npeer_listen = "127.0.0.1:2"\n'
        'secret_file = "secret"\n'
    )
    return str(path)


@pytest.fixture
def store_folder(tmp_path: Path) -> Path:
    """Where the node's store of partition 3 belongs."""
    return tmp_path / "data" / "partitions" / "3"


def snapshot(tmp_path: Path, place: Callable[[SnapshotFolder, int], None] | None = None) -> StoreDigest:
    """A snapshot of partition 3 in the node's data_dir; what it is a snapshot of."""
    folder = SnapshotFolder(tmp_path / "data" / "snapshots", CHANGELOG, "n1", SystemClock())
    folder.open()
    store = open_store(tmp_path / "made")
    fold(store, frames(), 40)
    digest = digest_store(store)
    folder.take(3, store.checkpoint)
    if place is not None:
        place(folder, 40)
    store.close()
    folder.close()
    return digest


def leave_broken(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "broken").write_text("what is left of a store")


def inode(path: Path) -> int:
    return path.stat().st_ino


def damage_alone(table: Path) -> None:
    """The store links the same file: give the snapshot one of its own first."""
    content = table.read_bytes()
    table.unlink()
    table.write_bytes(content)
    damage(table)


async def test_from_its_own_disk(tmp_path: Path, config: str, store_folder: Path) -> None:
    ran = await headrace("restore", "3", "--config", config)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "this node has no snapshot of partition 3; give another source with --from\n"
    digest = snapshot(tmp_path)
    leave_broken(store_folder)
    (tmp_path / "secret").unlink()  # as systemd takes a credential away from a unit that is stopped
    ran = await headrace("restore", "3", "--config", config)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("partition 3 restored from its own snapshot: ")
    assert "as of 40; the node goes on from there" in ran.out
    assert digest_folder(store_folder) == digest


async def test_from_a_store_by_url(tmp_path: Path, config: str, store_folder: Path) -> None:
    url = f"file://{tmp_path}/kept"

    def upload(folder: SnapshotFolder, offset: int) -> None:
        store = SnapshotStore(url, "shop", CHANGELOG, "n1", SystemClock())
        store.upload(folder.read(3, offset), folder.place(3, offset))
        store.close()

    digest = snapshot(tmp_path, upload)
    shutil.rmtree(tmp_path / "data")
    ran = await headrace("restore", "3", "--from", url, "--config", config)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[-2].endswith("bytes are here")
    assert digest_folder(store_folder) == digest
    ran = await headrace("restore", "4", "--from", url, "--config", config)
    assert (ran.code, ran.err) == (1, f"{url} has no snapshot of partition 4; give another source with --from\n")


@contextlib.asynccontextmanager
async def peer_with_a_snapshot(tmp_path: Path, offset: int) -> AsyncIterator[tuple[SnapshotNode, RocksStore]]:
    """Of partition 3; and its store."""
    peer = SnapshotNode(tmp_path, "n2")
    await peer.start()
    store = open_store(tmp_path / "peer")
    try:
        fold(store, frames(), offset)
        peer.stores[3] = store
        await peer.snapshots.take(3)
        yield peer, store
    finally:
        store.close()
        await peer.stop()


async def test_from_a_peer(tmp_path: Path, config: str, store_folder: Path) -> None:
    async with peer_with_a_snapshot(tmp_path, 30) as (peer, store):
        ran = await headrace("restore", "3", "--from", peer.server.address, "--config", config)
        assert (ran.code, ran.err) == (0, "")
        assert digest_folder(store_folder) == digest_store(store)
        fold(store, frames(2), 31)
        store.flush()
        await peer.snapshots.take(3)
        ran = await headrace("restore", "3", "--from", peer.server.address, "--config", config)
        assert (ran.code, ran.err) == (0, "")
        assert digest_folder(store_folder) == digest_store(store)


async def test_from_a_peer_whose_snapshot_is_as_of_the_same_offset_as_the_nodes_own(
    tmp_path: Path, config: str, store_folder: Path
) -> None:
    """Of a quiet partition all nodes have one, each with files of its own; the node's may be the damaged one."""
    async with peer_with_a_snapshot(tmp_path, 40) as (peer, store):
        theirs = {path.name: path.read_bytes() for path in (tmp_path / "n2" / "snapshots" / "3" / "40").glob("*.sst")}
        ours = tmp_path / "data" / "snapshots" / "3" / "40"
        for damaged in (False, True):
            if damaged:
                damage_alone(next(ours.glob("*.sst")))
            else:
                snapshot(tmp_path)
            ran = await headrace("restore", "3", "--from", peer.server.address, "--config", config)
            assert (ran.code, ran.err) == (0, "")
            assert digest_folder(store_folder) == digest_store(store)
            assert {path.name: path.read_bytes() for path in ours.glob("*.sst")} == theirs


async def test_what_is_wrong_is_one_line_and_changes_nothing(tmp_path: Path, config: str, store_folder: Path) -> None:
    digest = snapshot(tmp_path)
    await headrace("restore", "3", "--config", config)
    table = next((tmp_path / "data" / "snapshots" / "3" / "40").glob("*.sst"))
    lock = tmp_path / "data" / "cluster" / "raft" / "lock"
    lock.parent.mkdir(parents=True)
    with lock.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ran = await headrace("restore", "3", "--config", config)
        assert (ran.code, ran.out) == (1, "")
        assert "stop it first" in ran.err
    for source, words in (
        ("127.0.0.1:9", "127.0.0.1:9 can't be reached"),
        ("nowhere", "nowhere is neither a URL nor a peer's HOST:PORT"),
        ("gopher://x/y", "no driver for gopher://x/y"),
    ):
        ran = await headrace("restore", "3", "--from", source, "--config", config)
        assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
        assert words in ran.err
    assert digest_folder(store_folder) == digest
    before = inode(store_folder)
    damage_alone(table)
    ran = await headrace("restore", "3", "--config", config)
    assert (ran.code, "is damaged" in ran.err) == (1, True)
    assert inode(store_folder) == before
    assert digest_folder(store_folder) == digest
