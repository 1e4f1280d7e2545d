"""Snapshots in a store by URL, through fsspec: a folder, S3, or whatever else has a driver here. Blocking.

`<url>/<application>/<partition>/files/<sha256>` are the files, each uploaded once, and `<partition>/<changelog
offset>.json` beside that folder the manifests, written when everything they name was uploaded and read back. A
partition's owner uploads, and removes what no manifest names any more. Another node may take itself for the owner, and
upload, meanwhile; these rules keep its snapshot whole, U being SNAPSHOT_UPLOAD_MS_MAX:

1. An upload writes its manifest within U of its start, or not at all.
2. It leaves out only files that a manifest names then, or that it has itself uploaded within U.
3. A manifest is kept for SNAPSHOT_STORE_KEPT_MS_MIN, three U, at least.
4. A file goes when the same process saw it twice, two U apart, unnamed and not uploaded again in between.

A file left out at a time T is needed by a manifest that appears up to T + U. If it was named at T, that manifest
outlives T + U, or it appeared after the first look of rule 4 and outlives the second; if it was uploaded, the first
look came after that.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from node.kernel.clock import Clock
from node.kernel.errors import ConfigError, HeadraceError, NotFound, StateCorrupt, StoreUnavailable
from node.kernel.limits import (
    MIB,
    SNAPSHOT_FETCHES_MAX,
    SNAPSHOT_MANIFEST_BYTES_MAX,
    SNAPSHOT_STORE_KEPT_MS_MIN,
    SNAPSHOT_UPLOAD_MS_MAX,
    SNAPSHOTS_KEPT,
)
from replication.snapshot import Snapshot, SnapshotFile, decode_snapshot, encode_snapshot, unreferenced

_MANIFEST = re.compile(r"([0-9]{1,19})\.json")
_WHOLE_OR_NOT_AT_ALL = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}
"""Drivers whose files appear when they are complete; with others they are renamed into place."""
_NEW = ".new-"


@dataclass(frozen=True, slots=True)
class SnapshotStoreStatistics:
    place: str
    files_uploaded: int
    bytes_uploaded: int
    files_left_out: int
    files_removed: int
    bytes_fetched: int


def place_of(url: str) -> str:
    """The URL without what may be secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"


def look_up_driver(url: str) -> None:
    """Nothing is asked of the store. Raises ConfigError when its driver is not here."""
    with _driver_needed(url):
        fsspec.get_filesystem_class(urlsplit(url).scheme)


@contextmanager
def _driver_needed(url: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, ValueError) as failure:
        reason = f"cluster.snapshot_url: no driver for {place_of(url)} ({failure}); install the extra s3 for s3://"
        raise ConfigError([reason]) from failure


class SnapshotStore:
    """Raises ConfigError for a URL without a driver; StoreUnavailable when the store refuses or does not answer.

    `options` go to the driver. Credentials come from its own places (environment, files, instance), never from here.
    """

    def __init__(
        self,
        url: str,
        application: str,
        changelog: str,
        node: str,
        clock: Clock,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.place = place_of(url)
        given = {"use_listings_cache": False, "skip_instance_cache": True, **(options or {})}
        with _driver_needed(url):
            self._files, root = fsspec.core.url_to_fs(url, **given)
        self._root = f"{root.rstrip('/')}/{application}"
        self._changelog = changelog
        self._node = node
        self._clock = clock
        self._whole = not _WHOLE_OR_NOT_AT_ALL.isdisjoint(_protocols(self._files))
        self._threads = ThreadPoolExecutor(SNAPSHOT_FETCHES_MAX, thread_name_prefix="snapshot-store")
        self._closed = False
        self._uploaded: dict[tuple[int, str], float] = {}
        self._unnamed: dict[int, dict[str, tuple[float, str]]] = {}
        """By partition and name: when, by the monotonic clock, it was first seen so, and when it had been written."""
        self._counts = dict.fromkeys(("uploaded", "bytes", "left_out", "removed", "fetched"), 0)

    def close(self) -> None:
        """Uploads in progress end after the file that is on its way."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)

    def offsets(self, partition: int) -> list[int]:
        """Changelog offsets of the snapshots there, oldest first."""
        return sorted(
            int(found[1]) for name in self._sizes(self._of(partition)) if (found := _MANIFEST.fullmatch(name))
        )

    def read(self, partition: int, changelog_offset: int) -> Snapshot:
        """Raises NotFound, StateCorrupt."""
        with self._driver("read"):
            try:
                with self._files.open(self._manifest(partition, changelog_offset), "rb") as file:
                    content = file.read(SNAPSHOT_MANIFEST_BYTES_MAX + 1)
            except FileNotFoundError:
                raise NotFound(f"{self.place} has no snapshot of partition {partition} at {changelog_offset}") from None
        return decode_snapshot(content, self._changelog, partition)

    def newest(self, partition: int) -> Snapshot | None:
        """The newest whose manifest can be read and whose files are all listed with their sizes."""
        sizes: Mapping[str, int] | None = None
        for offset in reversed(self.offsets(partition)):
            with suppress(NotFound, StateCorrupt):
                snapshot = self.read(partition, offset)
                sizes = self._sizes(self._files_of(partition)) if sizes is None else sizes
                if all(sizes.get(file.sha256) == file.bytes for file in snapshot.files):
                    return snapshot
        return None

    def upload(self, snapshot: Snapshot, folder: Path) -> None:
        """Put a snapshot whose files are in `folder` there; when this returns, it was read back and counts."""
        started_s = self._clock.monotonic()
        partition = snapshot.partition
        missing = self._missing(snapshot)
        for _ in self._threads.map(lambda file: self._put(partition, file, folder / file.name, started_s), missing):
            pass
        sizes = self._sizes(self._files_of(partition))
        lost = [file.name for file in snapshot.files if sizes.get(file.sha256) != file.bytes]
        if lost:
            raise StoreUnavailable(
                f"{self.place} does not list {', '.join(lost[:5])} after the upload; it is tried again"
            )
        self._check_time(started_s)
        with self._driver("written"):
            self._write(self._manifest(partition, snapshot.changelog_offset), encode_snapshot(snapshot))

    def _missing(self, snapshot: Snapshot) -> list[SnapshotFile]:
        """By rule 2."""
        partition, now_s = snapshot.partition, self._clock.monotonic()
        self._uploaded = {
            key: at_s for key, at_s in self._uploaded.items() if now_s - at_s < _seconds(SNAPSHOT_UPLOAD_MS_MAX)
        }
        named = {file.sha256 for found in self._manifests(partition).values() for file in found.files}
        sizes = self._sizes(self._files_of(partition))
        wanted = {file.sha256: file for file in snapshot.files}
        missing = [
            file
            for sha256, file in wanted.items()
            if sizes.get(sha256) != file.bytes or not (sha256 in named or (partition, sha256) in self._uploaded)
        ]
        self._counts["left_out"] += len(wanted) - len(missing)
        return missing

    def _put(self, partition: int, file: SnapshotFile, source: Path, started_s: float) -> None:
        """Upload one file and read it back."""
        self._check_time(started_s)
        target = f"{self._files_of(partition)}/{file.sha256}"
        with self._driver("written"):
            self._write(target, source)
        with self._driver("read"):
            if self._digest(target) != file.sha256:
                with suppress(OSError):
                    self._files.rm_file(target)
                raise StoreUnavailable(f"{self.place} gave other bytes back than {file.name} has; it is uploaded again")
        self._uploaded[partition, file.sha256] = self._clock.monotonic()
        self._counts["uploaded"] += 1
        self._counts["bytes"] += file.bytes

    def _write(self, target: str, content: bytes | Path) -> None:
        written = target
        if not self._whole:
            parent, _, name = target.rpartition("/")
            self._files.makedirs(parent, exist_ok=True)
            written = f"{parent}/{_NEW}{self._node}-{name}"
        if isinstance(content, bytes):
            self._files.pipe_file(written, content)
        else:
            self._files.put_file(str(content), written)
        if written != target:
            if isinstance(self._files, LocalFileSystem):
                _sync(written)
            self._files.mv(written, target)

    def _digest(self, path: str) -> str:
        digest = hashlib.sha256()
        with self._files.open(path, "rb", block_size=8 * MIB) as file:
            while piece := file.read(8 * MIB):
                digest.update(piece)
        return digest.hexdigest()

    def _check_time(self, started_s: float) -> None:
        if self._closed:
            raise StoreUnavailable(f"the node stops, no more is uploaded to {self.place}; what arrived is kept")
        if self._clock.monotonic() - started_s >= _seconds(SNAPSHOT_UPLOAD_MS_MAX):
            raise StoreUnavailable(
                f"a snapshot was not in {self.place} within {SNAPSHOT_UPLOAD_MS_MAX} ms (SNAPSHOT_UPLOAD_MS_MAX); "
                "what arrived is kept and the next one goes on from it"
            )

    def fetch(self, snapshot: Snapshot, file: SnapshotFile, target: Path) -> None:
        """Raises StateCorrupt when its bytes are not those that the manifest says."""
        # A name of its own: the thread of a fetch that was called off goes on, and the next one is of the same file.
        part = target.with_name(f"{target.name}.{secrets.token_hex(8)}.part")
        source = f"{self._files_of(snapshot.partition)}/{file.sha256}"
        with self._driver("read"):
            if self._closed:
                raise StoreUnavailable(f"the node stops, no more is fetched from {self.place}")
            try:
                self._files.get_file(source, str(part))
                with part.open("rb") as here:
                    digest = hashlib.file_digest(here, "sha256").hexdigest()
                if digest != file.sha256:
                    raise StateCorrupt(
                        f"{file.name} in {self.place} has other bytes than its sha256 says; remove it there"
                    )
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
        self._counts["fetched"] += file.bytes

    # what goes

    def collect(self, partition: int) -> None:
        """Remove manifests that newer ones stand for, then, by rule 4, files that none names."""
        now_ms, now_s = self._clock.now_ms(), self._clock.monotonic()
        found = self._manifests(partition)
        for offset in sorted(found, reverse=True)[SNAPSHOTS_KEPT:]:
            if now_ms - found[offset].created_ms >= SNAPSHOT_STORE_KEPT_MS_MIN:
                self._remove(self._manifest(partition, offset))
                del found[offset]
        listed = self._listed(self._files_of(partition))
        before = self._unnamed.pop(partition, {})
        unnamed = {}
        for name in unreferenced(listed, found.values()):
            stamp = _stamp(listed[name])
            seen_s, same = before.get(name, (now_s, stamp))
            if same != stamp:
                seen_s = now_s
            if now_s - seen_s < 2 * _seconds(SNAPSHOT_UPLOAD_MS_MAX):
                unnamed[name] = seen_s, stamp
            else:
                self._remove_unchanged(f"{self._files_of(partition)}/{name}", stamp)
        self._unnamed[partition] = unnamed

    def _remove_unchanged(self, path: str, stamp: str) -> None:
        with self._driver("removed"), suppress(FileNotFoundError):
            if _stamp(self._files.info(path)) == stamp:
                self._files.rm_file(path)
                self._counts["removed"] += 1

    def _manifests(self, partition: int) -> dict[int, Snapshot]:
        """All that can be read. One that is damaged names nothing: nobody can restore it."""
        found = {}
        for offset in self.offsets(partition):
            with suppress(NotFound, StateCorrupt):
                found[offset] = self.read(partition, offset)
        return found

    def _remove(self, path: str) -> None:
        with self._driver("removed"), suppress(FileNotFoundError):
            self._files.rm_file(path)

    def _sizes(self, folder: str) -> dict[str, int]:
        """Name -> bytes of the files in a folder; a folder that is not there is empty."""
        return {name: int(entry["size"] or 0) for name, entry in self._listed(folder).items()}

    def _listed(self, folder: str) -> dict[str, Mapping[str, Any]]:
        with self._driver("listed"):
            try:
                listed = self._files.ls(folder, detail=True)
            except FileNotFoundError:
                return {}
        return {entry["name"].rpartition("/")[2]: entry for entry in listed if entry["type"] == "file"}

    def statistics(self) -> SnapshotStoreStatistics:
        counts = self._counts
        return SnapshotStoreStatistics(
            self.place, counts["uploaded"], counts["bytes"], counts["left_out"], counts["removed"], counts["fetched"]
        )

    def _of(self, partition: int) -> str:
        return f"{self._root}/{partition}"

    def _files_of(self, partition: int) -> str:
        return f"{self._root}/{partition}/files"

    def _manifest(self, partition: int, changelog_offset: int) -> str:
        return f"{self._of(partition)}/{changelog_offset}.json"

    @contextmanager
    def _driver(self, done: str) -> Iterator[None]:
        """A driver raises what its client library raises, whatever that is."""
        try:
            yield
        except (HeadraceError, FileNotFoundError) as failure:
            if isinstance(failure, FileNotFoundError):
                raise StoreUnavailable(f"a snapshot's file in {self.place} is gone: {failure}") from failure
            raise
        except Exception as failure:
            raise StoreUnavailable(
                f"snapshots in {self.place} can't be {done}: {type(failure).__name__}: {failure}; "
                "look whether it can be reached and written to from this node"
            ) from failure


def _protocols(files: Any) -> set[str]:
    return {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)


def _stamp(entry: Mapping[str, Any]) -> str:
    """What changes when a file is written again, under the name that its driver gives it."""
    names = ("mtime", "LastModified", "last_modified", "updated", "modified", "created", "etag", "ETag")
    return " ".join(str(entry[name]) for name in names if name in entry)


def _seconds(milliseconds: int) -> float:
    return milliseconds / 1000


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
