"""Snapshots in a store by URL: a folder, and S3 as a local server speaks it. The snapshots are of real stores."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from snapshot_support import CHANGELOG, WAIT_S_MAX, damage, digest_folder, fold, frames, open_store

from node.kernel.clock import ManualClock, SystemClock
from node.kernel.digest import digest_store
from node.kernel.errors import ConfigError, NotFound, StateCorrupt, StoreUnavailable
from node.kernel.limits import SNAPSHOT_STORE_KEPT_MS_MIN, SNAPSHOT_UPLOAD_MS_MAX
from node.state.rocksdb import RocksStore
from replication.snapshot import Snapshot, SnapshotFile
from replication.snapshot_folder import SnapshotFolder
from replication.snapshot_store import SnapshotStore, _stamp


@pytest.fixture(scope="module")
def s3_address() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/remote"
    address = request.getfixturevalue("s3_address")
    for name, value in {
        "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    import fsspec

    bucket = f"bucket-{os.getpid()}-{abs(hash(tmp_path))}"
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}/snapshots"


class Source:
    """One partition's store and its snapshots on the local disk."""

    def __init__(self, path: Path) -> None:
        self.store: RocksStore = open_store(path / "store")
        self._frames = frames(rows=1000)
        self.folder = SnapshotFolder(path / "local", CHANGELOG, "a", SystemClock())
        self.folder.open()

    def next(self, count: int = 5, partition: int = 3) -> tuple[Snapshot, Path]:
        fold(self.store, self._frames, count)
        snapshot = self.folder.take(partition, self.store.checkpoint)
        return snapshot, self.folder.place(partition, snapshot.changelog_offset)


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    made = Source(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(SystemClock().now_ms())


def opened(url: str, clock: ManualClock, node: str = "a") -> SnapshotStore:
    return SnapshotStore(url, "shop", CHANGELOG, node, clock)


def fetched(store: SnapshotStore, snapshot: Snapshot, folder: Path) -> Path:
    here = SnapshotFolder(folder / "here", CHANGELOG, "b", SystemClock())
    here.open()
    for file in here.wanted(snapshot):
        store.fetch(snapshot, file, here.fetched(snapshot.partition, file.sha256))
    here.adopt(snapshot)
    here.link(snapshot, folder / "restored")
    return folder / "restored"


def test_what_was_uploaded_comes_back(url: str, source: Source, clock: ManualClock, tmp_path: Path) -> None:
    store = opened(url, clock)
    assert store.newest(3) is None
    assert store.offsets(3) == []
    snapshot, place = source.next()
    store.upload(snapshot, place)
    assert (store.newest(3), store.newest(2)) == (snapshot, None)
    assert digest_folder(fetched(opened(url, clock, "b"), snapshot, tmp_path)) == digest_store(source.store)
    with pytest.raises(NotFound):
        store.read(3, 999)


def test_only_new_files_are_uploaded(url: str, source: Source, clock: ManualClock) -> None:
    snapshot, place = source.next()
    opened(url, clock).upload(snapshot, place)
    later, later_place = source.next(1)
    store = opened(url, clock, "b")
    store.upload(later, later_place)
    tables = {file.sha256 for file in snapshot.files}
    told = store.statistics()
    assert told.bytes_uploaded == sum({f.sha256: f.bytes for f in later.files if f.sha256 not in tables}.values())
    assert told.files_left_out > 0
    assert store.newest(3) == later
    assert store.offsets(3) == [snapshot.changelog_offset, later.changelog_offset]


def test_a_fetch_that_was_called_off_is_in_the_way_of_no_other(
    source: Source, clock: ManualClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread goes on with the file, while the restore that comes next fetches the same one."""
    store = opened(f"file://{tmp_path}/remote", clock)
    snapshot, place = source.next()
    store.upload(snapshot, place)
    file = max(snapshot.files, key=lambda one: one.bytes)
    content = (place / file.name).read_bytes()
    half_way, begun_again, over = threading.Event(), threading.Event(), threading.Event()

    def get_file(remote: str, target: str) -> None:
        again = half_way.is_set()
        with open(target, "wb", buffering=0) as written:
            if again:
                begun_again.set()
                assert over.wait(WAIT_S_MAX)
                written.write(content)
                return
            written.write(content[: len(content) // 2])
            half_way.set()
            assert begun_again.wait(WAIT_S_MAX)
            written.write(content[len(content) // 2 :])

    monkeypatch.setattr(store._files, "get_file", get_file)
    target = tmp_path / "fetched" / file.sha256
    target.parent.mkdir()
    with ThreadPoolExecutor(2) as threads:
        called_off = threads.submit(store.fetch, snapshot, file, target)
        called_off.add_done_callback(lambda _: over.set())
        assert half_way.wait(WAIT_S_MAX)
        threads.submit(store.fetch, snapshot, file, target).result()
        assert called_off.exception() is None
    assert target.read_bytes() == content
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_is_missing_or_changed_there_is_noticed(
    url: str, source: Source, clock: ManualClock, tmp_path: Path
) -> None:
    store = opened(url, clock)
    first, first_place = source.next()
    store.upload(first, first_place)
    second, second_place = source.next(1)
    store.upload(second, second_place)
    new = next(file for file in second.files if first.file(file.sha256) is None and file.name.endswith(".sst"))
    remote, path = store._files, f"{store._files_of(3)}/{new.sha256}"
    content = remote.cat_file(path)
    remote.rm_file(path)
    assert store.newest(3) == first
    remote.pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))
    assert store.newest(3) == second
    with pytest.raises(StateCorrupt, match="other bytes"):
        store.fetch(second, new, tmp_path / "file")
    assert not list(tmp_path.glob("file*"))
    remote.pipe_file(store._manifest(3, second.changelog_offset), b"{}")
    assert store.newest(3) == first


def test_what_changed_on_the_way_is_not_kept(url: str, source: Source, clock: ManualClock) -> None:
    """The local file was damaged after the manifest was made: the read after the upload shows it."""
    store = opened(url, clock)
    snapshot, place = source.next()
    largest = max(snapshot.files, key=lambda file: file.bytes)
    damage(place / largest.name)
    with pytest.raises(StoreUnavailable, match=largest.name):
        store.upload(snapshot, place)
    assert store.newest(3) is None
    assert largest.sha256 not in store._sizes(store._files_of(3))


def test_old_snapshots_go_and_their_files_after_them(url: str, source: Source, clock: ManualClock) -> None:
    store = opened(url, clock)
    taken = []
    for _ in range(4):
        snapshot, place = source.next()
        store.upload(snapshot, place)
        taken.append(snapshot)
    store.collect(3)
    assert len(store.offsets(3)) == 4
    clock.advance(SNAPSHOT_STORE_KEPT_MS_MIN + 60_000)
    store.collect(3)
    assert store.offsets(3) == [snapshot.changelog_offset for snapshot in taken[2:]]
    named = {file.sha256 for snapshot in taken[2:] for file in snapshot.files}
    assert set(store._sizes(store._files_of(3))) > named
    clock.advance(2 * SNAPSHOT_UPLOAD_MS_MAX - 1)
    store.collect(3)
    assert set(store._sizes(store._files_of(3))) > named
    clock.advance(1)
    store.collect(3)
    assert set(store._sizes(store._files_of(3))) == named
    assert store.newest(3) == taken[-1]


def test_a_file_that_is_uploaded_again_is_not_taken_for_waste(url: str, source: Source, clock: ManualClock) -> None:
    """Another node's files, left by an upload that was given up, are what this node uploads while that one collects."""
    theirs, ours = opened(url, clock, "b"), opened(url, clock)
    snapshot, place = source.next()
    theirs.upload(snapshot, place)
    theirs._files.rm_file(theirs._manifest(3, snapshot.changelog_offset))
    theirs.collect(3)
    clock.advance(2 * SNAPSHOT_UPLOAD_MS_MAX)
    before = {name: _stamp(entry) for name, entry in theirs._listed(theirs._files_of(3)).items()}
    for file in ours._missing(snapshot):
        while _stamp(ours._files.info(f"{ours._files_of(3)}/{file.sha256}")) == before[file.sha256]:
            ours._put(3, file, place / file.name, clock.monotonic())  # S3 tells times to the second
    theirs.collect(3)
    ours.upload(snapshot, place)
    assert theirs.newest(3) == snapshot
    assert ours.statistics().files_left_out == len({file.sha256 for file in snapshot.files})


def test_an_upload_that_takes_too_long_leaves_no_manifest(url: str, source: Source, clock: ManualClock) -> None:
    store = opened(url, clock)
    snapshot, place = source.next()
    put = store._put

    def slow(*arguments: object) -> None:
        put(*arguments)  # type: ignore[arg-type]
        clock.advance(SNAPSHOT_UPLOAD_MS_MAX / 2)

    store._put = slow  # type: ignore[method-assign]
    with pytest.raises(StoreUnavailable, match="SNAPSHOT_UPLOAD_MS_MAX"):
        store.upload(snapshot, place)
    assert store.newest(3) is None


class Interrupted(SnapshotStore):
    """Between the steps of an upload the other node, or this one's collection, gets its turn."""

    turn: Callable[[], None] = staticmethod(lambda: None)

    def _check_time(self, started_s: float) -> None:
        self.turn()
        super()._check_time(started_s)


U = SNAPSHOT_UPLOAD_MS_MAX
turns = st.lists(
    st.tuples(
        st.integers(0, 1), st.sampled_from(["collect", "wait", "upload"]), st.sampled_from([0, 1, U // 3, U, 2 * U])
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns, st.lists(st.sets(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=8))
def test_two_that_upload_and_collect_at_once_break_no_snapshot(
    tmp_path: Path, plan: list[tuple[int, str, int]], contents: list[set[int]]
) -> None:
    """What the rules in `snapshot_store` promise: whatever manifest is there names files that are there."""
    root = Path(tempfile.mkdtemp(dir=tmp_path))
    clock, local = ManualClock(10**12), root / "local"
    local.mkdir()
    files = {}
    for number in range(6):
        (local / f"{number}.sst").write_bytes(bytes([number]))
        files[number] = SnapshotFile(f"{number}.sst", hashlib.sha256(bytes([number])).hexdigest(), 1)
    nodes = [Interrupted(f"file://{root}/remote", "shop", CHANGELOG, name, clock) for name in ("a", "b")]
    uploading: list[bool] = [False, False]
    offset = 0

    def step() -> None:
        nonlocal offset
        if not plan:
            return
        who, what, wait_ms = plan.pop(0)
        clock.advance(wait_ms)
        if what == "collect":
            nodes[who].collect(0)
        elif what == "upload" and not uploading[who]:
            offset += 1
            upload(who, offset)
        check()

    def upload(who: int, at: int) -> None:
        uploading[who] = True
        taken = Snapshot(
            changelog=CHANGELOG, partition=0, changelog_offset=at, created_ms=clock.now_ms(), node="a",
            files=tuple(files[number] for number in sorted(contents[at % len(contents)])),
        )  # fmt: skip
        with contextlib.suppress(StoreUnavailable):
            nodes[who].upload(taken, local)
        nodes[who]._threads.submit(int).result()  # of an upload that is given up, the file on its way goes on
        uploading[who] = False

    def check() -> None:
        listed = nodes[0]._sizes(nodes[0]._files_of(0))
        for found in nodes[0]._manifests(0).values():
            assert {file.sha256 for file in found.files} <= listed.keys(), found.changelog_offset

    for node in nodes:
        node.turn = step
        node._threads = ThreadPoolExecutor(1)
    while plan:
        step()
    shutil.rmtree(root)


PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from snapshot_support import CHANGELOG, fold, frames, open_store
from node.kernel.clock import SystemClock
from replication.snapshot_folder import SnapshotFolder
from replication.snapshot_store import SnapshotStore, _stamp
place, url = Path(sys.argv[3]), sys.argv[4]
folder = SnapshotFolder(place / "local", CHANGELOG, "a", SystemClock())
folder.open()
store, source = open_store(place / "store"), frames(rows=1000)
remote = SnapshotStore(url, "shop", CHANGELOG, "a", SystemClock())
while True:
    fold(store, source, 2)
    snapshot = folder.take(3, store.checkpoint)
    print("uploading", snapshot.changelog_offset, flush=True)
    remote.upload(snapshot, folder.place(3, snapshot.changelog_offset))
    print("uploaded", snapshot.changelog_offset, flush=True)
"""


@pytest.mark.parametrize("kill_after", ["uploading", "uploaded"])
def test_kill_9_while_uploading(url: str, tmp_path: Path, clock: ManualClock, kill_after: str) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[2])]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *paths, str(tmp_path / "there"), url], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    uploaded = 0
    for line in process.stdout:
        word, offset = line.split()
        uploaded = int(offset) if word == "uploaded" else uploaded
        if word == kill_after and uploaded >= 4:
            process.kill()
            break
    process.stdout.close()
    process.wait()
    store = opened(url, clock, "b")
    newest = store.newest(3)
    assert newest is not None
    assert newest.changelog_offset >= uploaded
    restored = fetched(store, newest, tmp_path)
    assert digest_folder(restored).changelog_offset == newest.changelog_offset
    again = Source(tmp_path / "again")
    snapshot, place = again.next(20)
    store.upload(snapshot, place)
    assert store.newest(3) == snapshot
    again.store.close()


def test_a_store_that_does_not_answer_is_unavailable(
    tmp_path: Path, source: Source, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "remote").write_bytes(b"no folder")
    snapshot, place = source.next()
    with pytest.raises(StoreUnavailable, match="look whether"):
        opened(f"file://{tmp_path}/remote", clock).upload(snapshot, place)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store = SnapshotStore("s3://bucket/x", "shop", CHANGELOG, "a", clock, {"retries": 0})
    with pytest.raises(StoreUnavailable, match=r"s3://bucket/x") as refused:
        store.newest(3)
    assert "secret" not in str(refused.value)


def test_a_url_without_a_driver_is_refused_and_its_secrets_are_not_shown(clock: ManualClock) -> None:
    with pytest.raises(ConfigError, match="gopher://host/x") as refused:
        opened("gopher://user:secret@host/x", clock)
    assert "secret" not in str(refused.value)
