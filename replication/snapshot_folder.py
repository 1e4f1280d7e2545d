"""The snapshots of one node, on its own disk. Blocking: callers on an event loop use a thread.

`<folder>/<partition>/<changelog offset>/` holds the files and `<changelog offset>.json` beside it the manifest, written
last: files without a manifest are what a crash left and are removed. Everything is made under a hidden name and then
renamed. A file counts as right once it was read and had its hash; tables are linked from snapshot to snapshot and to
the live store, so what was found right of one is remembered for the others, by inode and time of change, for
SNAPSHOT_CHECKED_MS_MAX.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from node.kernel.clock import Clock
from node.kernel.errors import HeadraceError, NotFound, StateCorrupt, StoreUnavailable
from node.kernel.limits import SNAPSHOT_CHECKED_MS_MAX, SNAPSHOT_FILES_MAX, SNAPSHOT_THREADS_MAX
from replication.snapshot import Snapshot, SnapshotFile, decode_snapshot, encode_snapshot

_HIDDEN = "."
_NEW = ".new-"
_OLD = ".old-"
_FETCHED = ".fetched"
_SHARED = ".sst"
"""Only tables never change; every other file of a store is copied rather than linked."""


@dataclass(frozen=True, slots=True)
class _Checked:
    sha256: str
    at_s: float


_FileId = tuple[int, int, int, int]
"""Device, inode, size, time of change in nanoseconds of the content."""


class SnapshotFolder:
    """Raises StoreUnavailable when the disk refuses, StateCorrupt when what it holds is damaged, NotFound."""

    def __init__(self, folder: Path, changelog: str, node: str, clock: Clock) -> None:
        self._folder = folder
        self.changelog = changelog
        self._node = node
        self._clock = clock
        self._threads = ThreadPoolExecutor(SNAPSHOT_THREADS_MAX, thread_name_prefix="snapshot")
        self._checked: dict[_FileId, _Checked] = {}
        self._checking = threading.Lock()
        self.bytes_hashed = 0

    def open(self) -> None:
        """Remove what a crash left, but for files on their way here, which are taken up again."""
        with self._disk("opened"):
            self._folder.mkdir(parents=True, exist_ok=True)
            for partition in self.partitions():
                known = set(self.offsets(partition))
                for path in self._of(partition).iterdir():
                    left = path.name.startswith(_HIDDEN) and path.name != _FETCHED
                    if left or (path.is_dir() and path.name.isdecimal() and int(path.name) not in known):
                        _remove(path)
                for path in (self._of(partition) / _FETCHED).glob("[!.]*.part"):  # of the store by URL: not taken up
                    _remove(path)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def partitions(self) -> list[int]:
        with self._disk("listed"):
            return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())

    def offsets(self, partition: int) -> list[int]:
        """The changelog offsets of the whole snapshots here, oldest first."""
        with self._disk("listed"):
            try:
                names = os.listdir(self._of(partition))
            except FileNotFoundError:
                return []
        folders = set(names)
        stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
        return sorted(int(stem) for stem in stems if stem.isdecimal() and stem in folders)

    def read(self, partition: int, changelog_offset: int) -> Snapshot:
        """The manifest; its files are not looked at."""
        with self._disk("read"):
            try:
                content = self._manifest(partition, changelog_offset).read_bytes()
            except FileNotFoundError:
                raise NotFound(f"no snapshot of partition {partition} at {changelog_offset} is here") from None
        return decode_snapshot(content, self.changelog, partition)

    def newest(self, partition: int) -> Snapshot | None:
        """The newest with a readable manifest."""
        for offset in reversed(self.offsets(partition)):
            try:
                return self.read(partition, offset)
            except (NotFound, StateCorrupt):
                continue
        return None

    def path(self, snapshot: Snapshot, sha256: str) -> Path:
        """Where a file of it is. Raises NotFound."""
        file = snapshot.file(sha256)
        if file is None:
            raise NotFound(f"no file {sha256[:12]} is in the snapshot at {snapshot.changelog_offset}")
        return self.place(snapshot.partition, snapshot.changelog_offset) / file.name

    def place(self, partition: int, changelog_offset: int) -> Path:
        return self._of(partition) / str(changelog_offset)

    # taking and verifying

    def take(self, partition: int, checkpoint: Callable[[Path], int]) -> Snapshot:
        """A new snapshot of what `checkpoint` puts into the folder it is given; it says the changelog offset."""
        with self._disk("written"):
            self._of(partition).mkdir(parents=True, exist_ok=True)
            made = self._of(partition) / f"{_NEW}{self._clock.now_ms()}"
            try:
                offset = checkpoint(made)
                paths = sorted(path for path in made.iterdir() if path.is_file())
                if len(paths) > SNAPSHOT_FILES_MAX:
                    raise StoreUnavailable(
                        f"partition {partition} has {len(paths)} files, over SNAPSHOT_FILES_MAX: no snapshot is taken"
                    )
                files = tuple(self._threads.map(self._described, paths))
                snapshot = Snapshot(
                    changelog=self.changelog,
                    partition=partition,
                    changelog_offset=offset,
                    created_ms=self._clock.now_ms(),
                    node=self._node,
                    files=files,
                )
                self._keep(snapshot, made)
            finally:
                _remove(made)
        return snapshot

    def _described(self, path: Path) -> SnapshotFile:
        """Synced, so that a snapshot that was reported outlives a loss of power."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            known = self._known(file.fileno())
            if known is None:
                os.fdatasync(file.fileno())
                known = self._hashed(file.fileno())
        return SnapshotFile(path.name, known, size)

    def _keep(self, snapshot: Snapshot, made: Path) -> None:
        place = self.place(snapshot.partition, snapshot.changelog_offset)
        if place.exists():
            self._manifest(snapshot.partition, snapshot.changelog_offset).unlink(missing_ok=True)
            _remove(place)
        _sync_folder(made)
        made.replace(place)
        manifest = self._manifest(snapshot.partition, snapshot.changelog_offset)
        temporary = manifest.with_name(f"{_NEW}{manifest.name}")
        with temporary.open("wb") as file:
            file.write(encode_snapshot(snapshot))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(manifest)
        _sync_folder(manifest.parent)

    def verify(self, snapshot: Snapshot, since_s: float = -math.inf) -> None:
        """Read every file, but those found right of late, and since `since_s` by the monotonic clock.

        Raises StateCorrupt naming what is not right.
        """
        with self._disk("read"):
            wrong = [
                problem
                for problem in self._threads.map(lambda f: self._problem(snapshot, f, since_s), snapshot.files)
                if problem
            ]
        if wrong:
            raise StateCorrupt(
                f"the snapshot of partition {snapshot.partition} at {snapshot.changelog_offset} is damaged: "
                f"{', '.join(wrong[:10])}; it is not used, look at the disk"
            )

    def _problem(self, snapshot: Snapshot, file: SnapshotFile, since_s: float) -> str:
        path = self.place(snapshot.partition, snapshot.changelog_offset) / file.name
        try:
            if self._is(path, file, since_s):
                return ""
        except OSError as failure:
            return f"{file.name} can't be read ({failure.strerror})"
        return f"{file.name} has other bytes"

    def _is(self, path: Path, file: SnapshotFile, since_s: float = -math.inf) -> bool:
        with path.open("rb") as opened:
            if os.fstat(opened.fileno()).st_size != file.bytes:
                return False
            known = self._known(opened.fileno(), since_s)
            return (known or self._hashed(opened.fileno())) == file.sha256

    def _known(self, handle: int, since_s: float = -math.inf) -> str | None:
        found = self._checked.get(_file_id(handle))
        oldest_s = max(since_s, self._clock.monotonic() - SNAPSHOT_CHECKED_MS_MAX / 1000)
        return found.sha256 if found is not None and found.at_s > oldest_s else None

    def _hashed(self, handle: int) -> str:
        """Read it all. The GIL is released by reads and by hashing."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
        offset = 0
        while count := os.preadv(handle, [buffer], offset):
            digest.update(buffer[:count])
            offset += count
        found = digest.hexdigest()
        with self._checking:
            self.bytes_hashed += offset
            self._checked[_file_id(handle)] = _Checked(found, self._clock.monotonic())
        return found

    # restoring

    def link(self, snapshot: Snapshot, folder: Path) -> None:
        """Make `folder` a store as of the snapshot, in place of what is there: tables are linked, the rest is copied.

        After a crash there may be no folder; none is better than half of one. No store may be open on it.
        """
        source = self.place(snapshot.partition, snapshot.changelog_offset)
        temporary = folder.with_name(f"{_NEW}{folder.name}")
        with self._disk("linked"):
            _remove(temporary)
            try:
                temporary.mkdir(parents=True)
                for file in snapshot.files:
                    _link(source / file.name, temporary / file.name)
                if folder.exists():
                    replaced = folder.with_name(f"{_OLD}{folder.name}")
                    _remove(replaced)
                    folder.rename(replaced)
                    _remove(replaced)
                temporary.rename(folder)
            except OSError:
                _remove(temporary)
                raise

    # fetching: files arrive under their hash, in any order and over any number of attempts

    def wanted(self, snapshot: Snapshot) -> list[SnapshotFile]:
        """Files of it that are not here yet, once each; those that another snapshot here has are linked first."""
        fetched = self._of(snapshot.partition) / _FETCHED
        with self._disk("read"):
            fetched.mkdir(parents=True, exist_ok=True)
            here = self._by_sha256(snapshot.partition)
            wanted = {file.sha256: file for file in snapshot.files}
            for sha256, file in list(wanted.items()):
                target = fetched / sha256
                found = here.get(sha256)
                if not target.exists() and found is not None and self._is(found, file):
                    _link(found, target, shared=True)
                if target.exists():
                    if self._is(target, file):
                        del wanted[sha256]
                    else:
                        target.unlink()
        return list(wanted.values())

    def _by_sha256(self, partition: int) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for offset in self.offsets(partition):
            try:
                snapshot = self.read(partition, offset)
            except (NotFound, StateCorrupt):
                continue
            place = self.place(partition, offset)
            found |= {f.sha256: place / f.name for f in snapshot.files if (place / f.name).is_file()}
        return found

    def fetched(self, partition: int, sha256: str) -> Path:
        """Where the file with that hash goes to be `adopt`ed."""
        return self._of(partition) / _FETCHED / sha256

    def arrived(self, partition: int, sha256: str) -> None:
        """The file with that hash is in its place, and was hashed on its way: it need not be read again."""
        with self._disk("read"), self.fetched(partition, sha256).open("rb") as file, self._checking:
            self._checked[_file_id(file.fileno())] = _Checked(sha256, self._clock.monotonic())

    def adopt(self, snapshot: Snapshot) -> None:
        """Keep a snapshot all of whose files have been fetched, verifying what was not. Raises StateCorrupt."""
        made = self._of(snapshot.partition) / f"{_NEW}{self._clock.now_ms()}"
        with self._disk("written"):
            made.mkdir()
            try:
                wrong = [n for n in self._threads.map(lambda f: self._adopted(snapshot, f, made), snapshot.files) if n]
                if wrong:
                    raise StateCorrupt(f"fetched files are damaged: {', '.join(wrong[:10])}; they are fetched again")
                self._keep(snapshot, made)
            finally:
                _remove(made)
            _remove(self._of(snapshot.partition) / _FETCHED)

    def _adopted(self, snapshot: Snapshot, file: SnapshotFile, made: Path) -> str:
        source = self.fetched(snapshot.partition, file.sha256)
        if not self._is(source, file):
            source.unlink()
            return file.name
        _link(source, made / file.name)
        return ""

    def forget_fetched(self, partition: int) -> None:
        """Remove what was fetched and never became a snapshot."""
        with self._disk("removed"):
            _remove(self._of(partition) / _FETCHED)

    def forget(self, partition: int) -> None:
        """Remove all there is of a partition."""
        with self._disk("removed"):
            _remove(self._of(partition))

    def remove(self, partition: int, changelog_offset: int) -> None:
        """Its manifest first, so that a crash leaves no snapshot without files."""
        with self._disk("removed"):
            self._manifest(partition, changelog_offset).unlink(missing_ok=True)
            _remove(self.place(partition, changelog_offset))
            self._forget()

    def _forget(self) -> None:
        now_s = self._clock.monotonic()
        with self._checking:
            old = [
                key for key, found in self._checked.items() if (now_s - found.at_s) * 1000 >= SNAPSHOT_CHECKED_MS_MAX
            ]
            for key in old:
                del self._checked[key]

    def _of(self, partition: int) -> Path:
        return self._folder / str(partition)

    def _manifest(self, partition: int, changelog_offset: int) -> Path:
        return self._of(partition) / f"{changelog_offset}.json"

    @contextmanager
    def _disk(self, done: str) -> Iterator[None]:
        try:
            yield
        except HeadraceError:
            raise
        except OSError as failure:
            raise StoreUnavailable(
                f"snapshots in {self._folder} can't be {done}: {failure}; free or repair the disk"
            ) from failure


def _file_id(handle: int) -> _FileId:
    found = os.fstat(handle)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _link(source: Path, target: Path, shared: bool = False) -> None:
    if shared or source.name.endswith(_SHARED) or target.name.endswith(_SHARED):
        try:
            os.link(source, target)
            return
        except OSError as failure:
            if failure.errno not in (errno.EXDEV, errno.EMLINK, errno.EPERM):
                raise
    shutil.copyfile(source, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
