"""Snapshots on a node's own disk, of real stores: taken, verified, linked back; and what crashes and damage leave."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from snapshot_support import CHANGELOG, damage, digest_folder, fold, frames, open_store
from waiting import until

from node.kernel.clock import ManualClock
from node.kernel.digest import digest_store
from node.kernel.errors import NotFound, StateCorrupt
from node.kernel.limits import SNAPSHOT_CHECKED_MS_MAX
from node.state.inspection import changelog_offset_of, digest_of
from replication.peers import part_of
from replication.snapshot_folder import SnapshotFolder


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1_000_000)


@pytest.fixture
def folder(tmp_path: Path, clock: ManualClock) -> SnapshotFolder:
    return opened(tmp_path, clock)


def opened(path: Path, clock: ManualClock | None = None) -> SnapshotFolder:
    made = SnapshotFolder(path / "snapshots", CHANGELOG, "a", clock or ManualClock())
    made.open()
    return made


async def test_a_snapshot_and_the_frames_after_it_are_the_store(tmp_path: Path, folder: SnapshotFolder) -> None:
    store, source = open_store(tmp_path / "store"), frames()
    fold(store, source, 60)
    snapshot = folder.take(3, store.checkpoint)
    assert (snapshot.changelog_offset, snapshot.partition, folder.offsets(3)) == (60, 3, [60])
    folder.verify(snapshot)
    assert await changelog_offset_of(folder.place(3, 60)) == 60
    at_snapshot = digest_store(store)
    assert await digest_of(folder.place(3, 60)) == at_snapshot
    later = [next(source) for _ in range(20)]
    for frame in later:
        store.apply(frame, frame.progress["events"])
    folder.link(snapshot, tmp_path / "restored")
    restored = open_store(tmp_path / "restored")
    assert digest_store(restored) == at_snapshot
    for frame in later:
        restored.apply(frame, frame.progress["events"])
    assert digest_store(restored) == digest_store(store)
    restored.flush()
    restored.close()
    store.close()
    folder.verify(snapshot, math.inf)


def test_only_what_is_new_is_read_for_the_next_snapshot(
    tmp_path: Path, folder: SnapshotFolder, clock: ManualClock
) -> None:
    store, source = open_store(tmp_path / "store"), frames(rows=1000)
    fold(store, source, 10)
    first = folder.take(0, store.checkpoint)
    folder.verify(first)
    read = folder.bytes_hashed
    assert read == first.bytes
    fold(store, source, 1)
    second = folder.take(0, store.checkpoint)
    tables = {file.sha256 for file in first.files if file.name.endswith(".sst")}
    new = [file for file in second.files if file.sha256 not in tables]
    assert sum(file.bytes for file in new) < second.bytes / 2
    assert 0 < folder.bytes_hashed - read <= sum(file.bytes for file in new)
    clock.advance(SNAPSHOT_CHECKED_MS_MAX)
    read = folder.bytes_hashed
    folder.verify(second)
    assert folder.bytes_hashed - read == second.bytes
    store.close()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bytes": damage,
    "shorter": lambda path: os.truncate(path, path.stat().st_size - 1),
    "gone": Path.unlink,
    "unreadable": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_though_the_file_was_right_before(tmp_path: Path, folder: SnapshotFolder, kind: str) -> None:
    store = open_store(tmp_path / "store")
    fold(store, frames(), 10)
    snapshot = folder.take(0, store.checkpoint)
    store.close()
    folder.verify(snapshot)
    largest = max(snapshot.files, key=lambda file: file.bytes)
    DAMAGES[kind](folder.place(0, 10) / largest.name)
    with pytest.raises(StateCorrupt, match=largest.name):
        folder.verify(snapshot)


def test_a_copy_that_was_made_wrong_is_found_by_opening_it(tmp_path: Path, folder: SnapshotFolder) -> None:
    store = open_store(tmp_path / "store")
    fold(store, frames(), 10)

    def without_a_table(made: Path) -> int:
        offset = store.checkpoint(made)
        max(made.glob("*.sst"), key=lambda path: path.stat().st_size).unlink()
        return offset

    snapshot = folder.take(0, without_a_table)
    store.close()
    folder.verify(snapshot)
    with pytest.raises(StateCorrupt):
        asyncio.run(changelog_offset_of(folder.place(0, 10)))


async def test_a_look_into_a_snapshot_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for number in range(5_000):  # copied one by one: it is still at it when it is given up
        (copy / f"{number}.log").touch()
    looking = asyncio.ensure_future(changelog_offset_of(copy))
    await until(lambda: list(tmp_path.glob(".look-*")), "it looks")
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    assert os.listdir(tmp_path) == ["copy"]


def test_what_a_crash_left_is_removed_and_what_is_whole_stays(tmp_path: Path, folder: SnapshotFolder) -> None:
    store, source = open_store(tmp_path / "store"), frames()
    for _ in range(3):
        fold(store, source, 5)
        folder.take(7, store.checkpoint)
    store.close()
    place = tmp_path / "snapshots" / "7"
    (place / "10.json").unlink()  # a kill between the folder's rename and the manifest's, or while it was removed
    shutil.copytree(place / "15", place / ".new-99")
    (place / ".new-16.json").write_bytes(b"{")
    whole, resumed = "a" * 64, part_of(place / ".fetched" / ("b" * 64), "b" * 64).name
    (place / ".fetched").mkdir()
    for name in (whole, resumed, f"{'c' * 64}.0123456789abcdef.part"):
        (place / ".fetched" / name).touch()
    again = opened(tmp_path)
    assert again.offsets(7) == [5, 15]
    assert sorted(path.name for path in place.iterdir()) == [".fetched", "15", "15.json", "5", "5.json"]
    assert {path.name for path in (place / ".fetched").iterdir()} == {whole, resumed}
    again.verify(again.read(7, 15))
    again.remove(7, 5)
    with pytest.raises(NotFound):
        again.read(7, 5)
    newest = again.newest(7)
    assert newest is not None
    assert newest.changelog_offset == 15


def test_a_damaged_manifest_is_passed_over(tmp_path: Path, folder: SnapshotFolder) -> None:
    store, source = open_store(tmp_path / "store"), frames()
    for _ in range(2):
        fold(store, source, 5)
        folder.take(0, store.checkpoint)
    store.close()
    (tmp_path / "snapshots" / "0" / "10.json").write_bytes(b"{}")
    newest = folder.newest(0)
    assert newest is not None
    assert newest.changelog_offset == 5


def test_fetched_files_become_a_snapshot_once_all_are_there_and_right(tmp_path: Path) -> None:
    there, here = opened(tmp_path / "there"), opened(tmp_path / "here")
    store, source = open_store(tmp_path / "store"), frames(rows=1000)
    fold(store, source, 10)
    first = there.take(0, store.checkpoint)
    assert {file.sha256 for file in here.wanted(first)} == {file.sha256 for file in first.files}
    for file in first.files:
        shutil.copyfile(there.path(first, file.sha256), here.fetched(0, file.sha256))
    largest = max(first.files, key=lambda file: file.bytes)
    damage(here.fetched(0, largest.sha256))
    with pytest.raises(StateCorrupt, match=largest.name):
        here.adopt(first)
    assert here.offsets(0) == []
    here.open()
    assert [file.sha256 for file in here.wanted(first)] == [largest.sha256]
    shutil.copyfile(there.path(first, largest.sha256), here.fetched(0, largest.sha256))
    here.adopt(first)
    here.verify(here.read(0, 10), math.inf)
    fold(store, source, 1)
    second = there.take(0, store.checkpoint)
    missing = here.wanted(second)
    assert 0 < sum(file.bytes for file in missing) < second.bytes / 2
    for file in missing:
        shutil.copyfile(there.path(second, file.sha256), here.fetched(0, file.sha256))
    here.adopt(second)
    here.link(second, tmp_path / "restored")
    assert digest_folder(tmp_path / "restored") == digest_store(store)
    store.close()


def test_a_restored_snapshot_takes_the_place_of_what_is_there(tmp_path: Path, folder: SnapshotFolder) -> None:
    store, source = open_store(tmp_path / "store"), frames()
    fold(store, source, 5)
    snapshot, before = folder.take(0, store.checkpoint), digest_store(store)
    fold(store, source, 5)
    store.close()
    (tmp_path / ".old-store").mkdir()
    (tmp_path / ".new-store").mkdir()
    folder.link(snapshot, tmp_path / "store")
    assert digest_folder(tmp_path / "store") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snapshots", "store"]


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[2], sys.argv[3]]
from snapshot_support import CHANGELOG, digest_folder, fold, frames, open_store
from node.kernel.clock import SystemClock
from node.kernel.errors import StoreUnavailable
from replication.snapshot_folder import SnapshotFolder
mode, place = sys.argv[1], Path(sys.argv[4])
folder = SnapshotFolder(place / "snapshots", CHANGELOG, "a", SystemClock())
folder.open()
store, source = open_store(place / "store"), frames(rows=1000)

def taking():
    while True:
        fold(store, source, 3)
        snapshot = folder.take(0, store.checkpoint)
        folder.link(snapshot, place / "restored" / str(snapshot.changelog_offset))
        for offset in folder.offsets(0)[:-2]:
            folder.remove(0, offset)
        print(snapshot.changelog_offset, flush=True)

def full():
    fold(store, source, 20)
    first = folder.take(0, store.checkpoint)
    fold(store, source, 20)
    ballast = (place / "ballast").open("wb", buffering=0)
    try:
        while ballast.write(bytes(1 << 16)) == 1 << 16: pass
    except OSError:
        pass
    try:
        folder.take(0, store.checkpoint)
    except StoreUnavailable as failure:
        print("StoreUnavailable", failure)
    print(folder.offsets(0), sorted(path.name for path in (place / "snapshots" / "0").iterdir()))
    ballast.close()
    (place / "ballast").unlink()
    folder.verify(first, float("inf"))
    store.close()  # as its partition does: a store that could not flush takes no more writes until it is opened again
    again = open_store(place / "store")
    fold(again, frames(rows=1000), 41)
    print(folder.take(0, again.checkpoint).changelog_offset)

{"taking": taking, "full": full}[mode]()
"""
PATHS = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]


@pytest.mark.parametrize("kill_after", [1, 4, 7])
def test_kill_9_while_snapshots_are_taken_linked_and_removed(tmp_path: Path, kill_after: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "taking", *PATHS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    told = [int(process.stdout.readline()) for _ in range(kill_after)]
    process.kill()
    told += [int(line) for line in process.stdout.read().split()]
    process.wait()
    process.stdout.close()
    folder = opened(tmp_path)
    offsets = folder.offsets(0)
    assert told[-1] in offsets
    for offset in offsets:
        folder.verify(folder.read(0, offset))
        assert asyncio.run(changelog_offset_of(folder.place(0, offset))) == offset
    for restored in (tmp_path / "restored").glob("[0-9]*"):
        assert digest_folder(restored).changelog_offset == int(restored.name)


def test_a_full_disk_costs_the_new_snapshot_only(tmp_path: Path, small_disk: Callable[[Path, int], None]) -> None:
    small_disk(tmp_path, 48)
    command = [sys.executable, "-c", PROGRAM, "full", *PATHS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("StoreUnavailable"), done.stdout + done.stderr
    assert "No space left on device" in lines[0]
    assert lines[1:] == ["[20] ['20', '20.json']", "41"]
