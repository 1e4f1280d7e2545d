"""Snapshots at work between nodes: real stores, real HTTP between peers, a folder as the store by URL."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from snapshot_support import CHANGELOG, WAIT_S_MAX, SnapshotNode, agree, damage, digest_folder, fold, frames
from waiting import until

from node.kernel.clock import SystemClock
from node.kernel.digest import digest_store
from node.kernel.errors import NotFound, PeerRefused, PeerUnavailable, StateCorrupt, StoreUnavailable
from node.kernel.limits import MIB, NODES_MAX, PEER_ASKS_MAX, SNAPSHOT_RESTORES_MAX
from replication.snapshot import Snapshot, decode_snapshot
from replication.snapshot_store import SnapshotStore

ROOT = Path(__file__).resolve().parents[2]


class Nodes:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[SnapshotNode] = []

    async def start(self, name: str, url: str = "", interval_seconds: float = 3600.0) -> SnapshotNode:
        store = SnapshotStore(url, "shop", CHANGELOG, name, SystemClock()) if url else None
        node = SnapshotNode(self.path, name, store, interval_seconds)
        await node.start()
        self.all.append(node)
        return node


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    made = Nodes(tmp_path)
    yield made
    for node in made.all:
        await node.stop()


async def test_snapshots_are_taken_as_the_changelog_moves_and_two_are_kept(nodes: Nodes) -> None:
    node = await nodes.start("a", interval_seconds=0.0)
    agree([node])
    store, source = node.open(0), frames()
    node.run()
    for offset in (10, 20, 30):
        fold(store, source, 10)
        await until(lambda at=offset: node.snapshots.verified().get(0) == at, "the snapshot is verified")
    await until(lambda: node.folder.offsets(0) == [20, 30], "older ones are removed")
    taken = node.snapshots.statistics().taken
    told = await node.snapshots.take_now(0)
    assert (told["changelog_offset"], node.snapshots.statistics().taken) == (30, taken)
    with pytest.raises(NotFound, match="not open"):
        await node.snapshots.take(1)


async def test_what_an_earlier_run_left_counts_once_it_was_verified(nodes: Nodes) -> None:
    first = await nodes.start("a")
    agree([first])
    store, source = first.open(0), frames()
    for _ in range(2):
        fold(store, source, 10)
        await first.snapshots.take(0)
    await first.stop()
    shared = {path.name for path in first.folder.place(0, 10).iterdir()}
    new = [path for path in first.folder.place(0, 20).glob("*.sst") if path.name not in shared]
    damage(max(new, key=lambda path: path.stat().st_size))
    nodes.all.clear()
    again = await nodes.start("a")
    agree([again])
    assert dict(again.snapshots.verified()) == {}
    again.run()
    await until(lambda: again.snapshots.verified(), "a snapshot is verified")
    assert dict(again.snapshots.verified()) == {0: 10}
    assert again.folder.offsets(0) == [10]


async def test_a_damaged_snapshot_is_found_and_replaced(nodes: Nodes) -> None:
    node = await nodes.start("a", interval_seconds=0.0)
    agree([node])
    store, source = node.open(0), frames()
    node.run()
    fold(store, source, 10)
    await until(lambda: node.snapshots.verified().get(0) == 10, "the snapshot is verified")
    (manifest,) = node.folder.place(0, 10).glob("MANIFEST-*")
    damage(manifest)
    told = await node.snapshots.verify_again(0)
    assert told["right"] == []
    assert manifest.name in told["damaged"][0]
    await until(lambda: node.snapshots.verified().get(0) == 10, "another one is taken")
    assert (await node.snapshots.verify_again(0))["right"] == [10]


async def test_a_new_node_restores_from_a_peer_and_folds_the_rest(nodes: Nodes) -> None:
    there, here = await nodes.start("a"), await nodes.start("b")
    agree([there, here])
    store, source = there.open(0), frames(rows=500)
    fold(store, source, 20)
    await there.snapshots.take(0)
    tail = [next(source) for _ in range(5)]
    for frame in tail:
        store.apply(frame, frame.progress["events"])
    assert await here.snapshots.restore(0, here.path / "store-0")
    restored = here.open(0)
    assert restored.changelog_offset() == 20
    for frame in tail:
        restored.apply(frame, frame.progress["events"])
    assert digest_store(restored) == digest_store(store)
    told = here.snapshots.statistics().restored[0]
    assert (told.source, told.changelog_offset) == ("a", 20)
    assert dict(here.snapshots.verified()) == {0: 20}
    assert here.folder.offsets(0) == [20]
    await here.snapshots.verify_again(0)
    assert dict(here.snapshots.verified()) == {0: 20}


async def test_a_restore_that_is_called_off_changes_nothing_behind_the_next_one(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder would be put in place under a store that is open on it."""
    there, here = await nodes.start("a"), await nodes.start("b")
    agree([there, here])
    fold(there.open(0), frames(), 10)
    await there.snapshots.take(0)
    begun, goes_on, link = threading.Event(), threading.Event(), here.folder.link

    def slow(snapshot: Snapshot, folder: Path) -> None:
        begun.set()
        assert goes_on.wait(WAIT_S_MAX)
        link(snapshot, folder)

    monkeypatch.setattr(here.folder, "link", slow)
    restoring = asyncio.create_task(here.snapshots.restore(0, here.path / "store-0"))
    await asyncio.to_thread(begun.wait)
    restoring.cancel()
    done, _ = await asyncio.wait({restoring}, timeout=0.1)
    assert not done, "what is under way on the disk is waited for"
    goes_on.set()
    await asyncio.wait({restoring})
    assert restoring.cancelled()
    assert here.open(0).changelog_offset() == 10


async def test_nobody_has_a_snapshot(nodes: Nodes) -> None:
    there, here = await nodes.start("a"), await nodes.start("b", f"file://{nodes.path}/remote")
    agree([there, here])
    assert not await here.snapshots.restore(0, here.path / "store-0")
    await there.server.stop()
    assert not await here.snapshots.restore(0, here.path / "store-0")
    assert not (here.path / "store-0").exists()


async def test_few_partitions_are_restored_at_once(nodes: Nodes) -> None:
    """More would have more calls under way than a node may, and take a peer that was not asked for one without any."""
    there, here = await nodes.start("a"), await nodes.start("b")
    agree([there, here], partitions=3 * SNAPSHOT_RESTORES_MAX)
    running, most = 0, 0

    async def bounds(partition: int) -> tuple[int, int]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return 0, 100

    here.snapshots._sources = replace(here.snapshots._sources, changelog_bounds=bounds)
    partitions = range(3 * SNAPSHOT_RESTORES_MAX)
    found = await asyncio.gather(*(here.snapshots.restore(number, here.path / str(number)) for number in partitions))
    assert not any(found)
    assert 1 < most <= SNAPSHOT_RESTORES_MAX
    assert SNAPSHOT_RESTORES_MAX * NODES_MAX <= PEER_ASKS_MAX


async def test_the_nearest_useful_snapshot_is_taken(nodes: Nodes) -> None:
    url = f"file://{nodes.path}/remote"
    first, second, here = await nodes.start("a", url), await nodes.start("b"), await nodes.start("c", url)
    agree([first, second, here], standbys=("b",))
    store, source = first.open(0), frames()
    sizes = {}
    for node, name in ((here, "own"), (second, "b"), (first, "store"), (first, "a")):
        fold(store, source, 10)
        snapshot = await first.snapshots.take(0)
        sizes[name] = snapshot.changelog_offset
        if node is not first:
            await node.snapshots._fetch(await _source_of(node, first))
        if name == "store":
            await asyncio.to_thread(first.snapshots._store.upload, snapshot, first.folder.place(0, 30))
    folder = here.path / "store-0"
    for start, expected in ((0, "c"), (11, "a")):
        here.bounds = (start, 100)
        assert await here.snapshots.restore(0, folder)
        assert here.snapshots.statistics().restored[0].source == expected
    here.folder.forget(0)
    here.bounds = (0, 25)
    assert await here.snapshots.restore(0, folder)
    assert here.snapshots.statistics().restored[0].source == "b"
    here.folder.forget(0)
    here.bounds = (30, 30)
    assert await here.snapshots.restore(0, folder)
    assert here.snapshots.statistics().restored[0].source == "store"
    assert digest_folder(folder).changelog_offset == 30
    here.bounds = (31, 35)
    assert not await here.snapshots.restore(0, folder)
    assert digest_folder(folder).changelog_offset == 30


async def _source_of(node: SnapshotNode, owner: SnapshotNode) -> object:
    source = await node.snapshots._told(owner.cluster.name, owner.server.address, 0)
    assert source is not None
    return source


async def test_a_damaged_file_of_a_peer_is_not_taken_and_another_source_is(nodes: Nodes) -> None:
    """Whoever offers the newest snapshot can't give it whole: then others are asked, the store by URL last."""
    url = f"file://{nodes.path}/remote"
    there, older, here = await nodes.start("a", url), await nodes.start("b"), await nodes.start("c", url)
    agree([there, older, here])
    store, source = there.open(0), frames()
    fold(store, source, 10)
    snapshot = await there.snapshots.take(0)
    await asyncio.to_thread(there.snapshots._store.upload, snapshot, there.folder.place(0, 10))  # type: ignore[union-attr]
    fold(store, source, 10)
    await there.snapshots.take(0)
    await older.snapshots._fetch(await _source_of(older, there))  # type: ignore[arg-type]
    fold(store, source, 10)
    await there.snapshots.take(0)
    here.bounds = (10, 40)
    for bad, offset, expected in ((there, 30, "b"), (older, 20, "store")):
        damage(next(bad.folder.place(0, offset).glob("MANIFEST-*")))
        assert await here.snapshots.restore(0, here.path / "store-0")
        assert here.snapshots.statistics().restored[0].source == expected
        here.folder.forget(0)
    here.bounds = (20, 40)
    with pytest.raises(PeerUnavailable, match="tried again"):
        await here.snapshots.restore(0, here.path / "store-0")
    here.bounds = (0, 9)
    assert not await here.snapshots.restore(0, here.path / "store-0")


async def test_a_changelog_that_is_whole_is_folded_where_no_snapshot_can_be_had(nodes: Nodes) -> None:
    """Neither a peer's damaged snapshot nor a store by URL that can't be asked keeps a partition from starting."""
    there, here = await nodes.start("a"), await nodes.start("b", f"file://{nodes.path}/remote")
    agree([there, here])
    fold(there.open(0), frames(), 10)
    await there.snapshots.take(0)
    damage(max(there.folder.place(0, 10).glob("*.sst"), key=lambda path: path.stat().st_size))
    (nodes.path / "remote").write_text("no folder")
    assert not await here.snapshots.restore(0, here.path / "store-0")
    here.bounds = (1, 20)
    with pytest.raises((PeerUnavailable, StoreUnavailable)):
        await here.snapshots.restore(0, here.path / "store-0")


async def test_a_changelog_that_is_whole_is_folded_where_the_store_by_url_gives_no_file(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may list what it then does not give: a right to read that is missing, an object in an archive."""
    url = f"file://{nodes.path}/remote"
    there, here = await nodes.start("a", url), await nodes.start("b", url)
    agree([there, here])
    fold(there.open(0), frames(), 10)
    snapshot = await there.snapshots.take(0)
    await asyncio.to_thread(there.snapshots._store.upload, snapshot, there.folder.place(0, 10))
    await there.server.stop()

    def refused(source: str, target: str) -> None:
        raise PermissionError(f"access to {source} denied")

    monkeypatch.setattr(here.snapshots._store._files, "get_file", refused)
    assert not await here.snapshots.restore(0, here.path / "store-0")
    here.bounds = (1, 20)
    with pytest.raises(StoreUnavailable, match="denied"):
        await here.snapshots.restore(0, here.path / "store-0")


async def test_what_was_fetched_stays_beside_snapshots_of_an_earlier_changelog(nodes: Nodes) -> None:
    """Those are further, as its topic was made again, and only the furthest are kept."""
    there, here = await nodes.start("a"), await nodes.start("b")
    agree([there, here])
    store, source = here.open(0, "earlier"), frames()
    for _ in range(2):
        fold(store, source, 30)
        await here.snapshots.take(0)
    fold(there.open(0), frames(2), 10)
    await there.snapshots.take(0)
    here.bounds = (5, 20)
    assert await here.snapshots.restore(0, here.path / "store-0")
    assert here.open(0).changelog_offset() == 10


async def test_a_snapshot_that_a_peer_is_fetching_stays(nodes: Nodes) -> None:
    there, here = await nodes.start("a"), await nodes.start("b")
    agree([there, here])
    store, source = there.open(0), frames()
    fold(store, source, 10)
    await there.snapshots.take(0)
    found = await _source_of(here, there)
    for _ in range(3):
        fold(store, source, 10)
        await there.snapshots.take(0)
    assert there.folder.offsets(0) == [10, 30, 40]
    await here.snapshots._fetch(found)
    assert dict(here.snapshots.verified()) == {0: 10}


async def test_only_the_owner_uploads_and_what_others_had_is_removed(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replication.snapshots.UNUSED_MS_MAX", 0)
    url = f"file://{nodes.path}/remote"
    owner, standby = await nodes.start("a", url, 0.0), await nodes.start("b", url, 0.0)
    agree([owner, standby], standbys=("b",))
    for node in (owner, standby):
        fold(node.open(0), frames(), 10)
        node.run()
    await until(lambda: owner.snapshots.statistics().partitions.get(0, None), "taken")
    await until(lambda: owner.snapshots.statistics().partitions[0].uploaded_offset == 10, "uploaded")
    await until(lambda: standby.snapshots.verified() == {0: 10}, "taken by the standby")
    assert await standby.snapshots.stored(0) == 10
    assert decode_snapshot(next((nodes.path / "remote").rglob("10.json")).read_bytes(), CHANGELOG, 0).node == "a"
    assert standby.snapshots.statistics().partitions[0].uploaded_offset == 0
    standby.stores.pop(0).close()
    agree([owner, standby])
    standby.bounds = (5, 100)
    assert standby.cluster.catalog.settings.snapshot_holders_min == 2
    await until(lambda: standby.folder.offsets(0) == [], "removed, for the owner and the store have it")
    assert not standby.snapshots.verified()
    assert owner.folder.offsets(0) == [10]


async def test_a_copy_of_a_partition_that_comes_back_while_others_are_asked_is_kept(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replication.snapshots.UNUSED_MS_MAX", 0)
    owner, left = await nodes.start("a"), await nodes.start("b")
    agree([owner, left])
    fold(left.open(0), frames(), 10)
    await left.snapshots.take(0)
    left.stores.pop(0).close()
    asked = []

    async def bounds(partition: int) -> tuple[int, int]:
        agree([owner, left], standbys=("b",))
        asked.append(partition)
        return 0, 100

    left.snapshots._sources = replace(left.snapshots._sources, changelog_bounds=bounds)
    await left.snapshots._remove_unused()
    assert asked == [0]
    assert left.folder.offsets(0) == [10]


async def test_a_copy_that_the_changelog_was_cut_behind_is_kept_until_enough_others_have_one(nodes: Nodes) -> None:
    owner, standby, left = [await nodes.start(name) for name in ("a", "b", "c")]
    agree([owner, standby, left], standbys=("b",))
    for node in (owner, left):
        fold(node.open(0), frames(), 10)
        await node.snapshots.take(0)
    left.bounds = (0, 20)
    assert await left.snapshots.may_forget(0), "all frames are there still"
    left.bounds = (10, 20)
    assert not await left.snapshots.may_forget(0), "the owner's disk may be lost next"
    fold(standby.open(0), frames(), 9)
    await standby.snapshots.take(0)
    assert not await left.snapshots.may_forget(0), "the standby's ends before the changelog begins"
    fold(standby.open(0, "further"), frames(), 10)
    await standby.snapshots.take(0)
    assert await left.snapshots.may_forget(0)
    left.bounds = (9, 9)
    assert not await left.snapshots.may_forget(0), "theirs are of an earlier changelog, whose topic was made again"
    left.bounds = (10, 20)
    assert await left.snapshots.may_forget(0)
    await standby.server.stop()
    assert not await left.snapshots.may_forget(0), "it does not answer"


async def test_why_an_upload_failed_is_told_until_one_did_not(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await nodes.start("a", f"file://{nodes.path}/remote")
    agree([node])
    store, source, remote = node.open(0), frames(), node.snapshots._store
    assert remote is not None
    fold(store, source, 10)
    snapshot = await node.snapshots.take(0)

    def refused(snapshot: Snapshot, folder: Path) -> None:
        raise StoreUnavailable("access denied")

    with monkeypatch.context() as patched:
        patched.setattr(remote, "upload", refused)
        await node.snapshots._upload(remote, snapshot)
    assert node.snapshots.statistics().partitions[0].reason == "access denied"
    fold(store, source, 10)
    snapshot = await node.snapshots.take(0)
    assert node.snapshots.statistics().partitions[0].reason == "access denied", "that one was taken says nothing of it"
    await node.snapshots._upload(remote, snapshot)
    told = node.snapshots.statistics().partitions[0]
    assert (told.reason, told.uploaded_offset) == ("", 20)


async def test_a_store_by_url_that_hangs_holds_up_nothing_else(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Partitions flush on the loop's own few threads; whoever asks the store is told after a while."""
    monkeypatch.setattr("replication.snapshots.SNAPSHOT_STORE_ASK_MS_MAX", 100)
    node = await nodes.start("a", f"file://{nodes.path}/remote")
    agree([node], partitions=40)
    going_on = threading.Event()
    assert node.snapshots._store is not None
    monkeypatch.setattr(node.snapshots._store._files, "ls", lambda *_, **__: going_on.wait() and [])
    node.bounds = (1, 100)
    try:
        async with asyncio.timeout(20):
            asking = [*map(node.snapshots.stored, range(40)), node.snapshots.restore(0, node.path / "store-0")]
            told = await asyncio.gather(*asking, return_exceptions=True)
            assert {type(one) for one in told} == {StoreUnavailable}
            assert await asyncio.to_thread(lambda: "flushed") == "flushed"
            node.snapshots.close()
            with pytest.raises(StoreUnavailable, match="stops"):
                await node.snapshots.restore(0, node.path / "store-0")
    finally:
        going_on.set()


@pytest.mark.parametrize("path", ["x", "-1", "1" * 20, "0/5/" + "0" * 64, "0/10/" + "0" * 64, "0/10/.."])
async def test_peers_get_nothing_but_files_of_snapshots(nodes: Nodes, path: str) -> None:
    there, here = await nodes.start("a"), await nodes.start("b")
    agree([there, here])
    fold(there.open(0), frames(), 10)
    await there.snapshots.take(0)
    with pytest.raises((NotFound, PeerRefused, PeerUnavailable)):
        await here.client.ask(there.server.address, "GET", f"/peer/snapshots/{path}")


async def test_a_store_that_went_away_while_it_was_copied_costs_one_snapshot(nodes: Nodes) -> None:
    node = await nodes.start("a", interval_seconds=0.0)
    agree([node])
    store = node.open(0)
    fold(store, frames(), 10)
    store.close()
    node.run()
    await until(lambda: node.snapshots.statistics().failed, "it failed")
    assert "closed" in node.snapshots.statistics().partitions[0].reason
    assert node.folder.offsets(0) == []


async def test_copies_that_could_not_be_verified_do_not_pile_up(nodes: Nodes) -> None:
    """Each is tried again with a newer one, and its links keep tables on a disk that may be full already."""
    node = await nodes.start("a")
    agree([node])
    store, source = node.open(0), frames()
    fold(store, source, 10)
    await node.snapshots.take(0)
    right = node.snapshots._sources

    async def unable(folder: Path) -> int:
        raise StoreUnavailable(f"the copy in {folder} could not be looked at: no space left")

    node.snapshots._sources = replace(right, opened_offset=unable)
    for _ in range(3):
        fold(store, source, 10)
        with pytest.raises(StoreUnavailable, match="no space left"):
            await node.snapshots.take(0)
    assert node.folder.offsets(0) == [10]
    assert dict(node.snapshots.verified()) == {0: 10}
    node.snapshots._sources = right
    await node.snapshots.take(0)
    assert node.folder.offsets(0) == [10, 40]


async def test_a_copy_of_another_offset_than_it_says_is_refused(nodes: Nodes) -> None:
    node = await nodes.start("a")
    agree([node])
    store = node.open(0)
    fold(store, frames(), 10)

    class Wrong:
        def changelog_offset(self) -> int:
            return 11

        def checkpoint(self, folder: Path) -> int:
            return store.checkpoint(folder) + 1

    node.stores[0] = Wrong()  # type: ignore[assignment]
    with pytest.raises(StateCorrupt, match="as of 10"):
        await node.snapshots.take(0)
    node.stores[0] = store
    assert node.folder.offsets(0) == []


PROGRAM = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from snapshot_support import SnapshotNode, Membership
from replication.catalog import Assignment, Catalog, Node

async def main():
    node = SnapshotNode(Path(sys.argv[3]), "b")
    await node.start()
    there = Node("a", "", sys.argv[4], "", 1.0, 1, 0)
    node.cluster.catalog = Catalog(revision=1, nodes={"a": there}, partitions=(Assignment(owner="a", epoch=1),))
    print("restoring", flush=True)
    assert await node.snapshots.restore(0, node.path / "store-0")
    print(node.snapshots.statistics().restored[0].bytes_fetched, flush=True)
    await node.stop()

asyncio.run(main())
"""


@pytest.mark.parametrize("files_at_kill", [0, 3])
async def test_kill_9_while_restoring_loses_only_what_was_on_its_way(nodes: Nodes, files_at_kill: int) -> None:
    there = await nodes.start("a")
    agree([there])
    store, source = there.open(0), frames(rows=2000, slots=256)
    for _ in range(6):
        fold(store, source, 1)
        store.flush()
    snapshot = await there.snapshots.take(0)
    assert snapshot.bytes > 8 * MIB
    command = ["-c", PROGRAM, str(Path(__file__).parent), str(ROOT), str(nodes.path), there.server.address]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    fetched = nodes.path / "b" / "snapshots" / "0" / ".fetched"
    whole = lambda: [path for path in fetched.glob("*") if len(path.name) == 64]  # noqa: E731
    await until(lambda: len(whole()) >= files_at_kill or process.returncode is not None, "some files are there")
    if process.returncode is None:
        process.kill()
    await process.wait()
    again = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    output, _ = await again.communicate()
    assert again.returncode == 0
    assert int(output.split()[-1]) <= snapshot.bytes
    assert digest_folder(nodes.path / "b" / "store-0") == digest_store(store)
    assert not fetched.exists()
