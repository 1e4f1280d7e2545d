"""Files by the sha256 of their bytes, in one local folder: model files, later snapshots and tables.

Blocking: callers on an event loop use a thread. A file is written beside its place, synced, and renamed into it, so
what has its name is whole; and what is read is hashed again, so what is given out has its hash.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from node.kernel.errors import BoundExceeded, NotFound, StoreUnavailable
from node.kernel.limits import MIB, MODEL_BYTES_MAX

_NAME = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = ".new-"
_PART = re.compile(r"\.([0-9a-f]{64})\..*")
"""What has come of a file that is being fetched; kept over restarts, so that the rest can follow."""


@dataclass(frozen=True, slots=True)
class BlobStatistics:
    files: int
    bytes: int


class BlobStore:
    """Content-addressed files of at most `bytes_max` bytes each. Raises StoreUnavailable when the disk refuses."""

    def __init__(self, folder: Path, bytes_max: int = MODEL_BYTES_MAX) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        with self._disk("opened"):
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"{_TEMPORARY}*"):
                left.unlink()

    @property
    def bytes_max(self) -> int:
        """Of one file."""
        return self._bytes_max

    def put(self, content: bytes | Path) -> str:
        """Keep bytes, or a copy of a file; the sha256 in hex. Raises BoundExceeded over `bytes_max`."""
        with self._disk("written"):
            handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=self._folder)
            temporary = Path(name)
            try:
                with os.fdopen(handle, "wb") as target:
                    digest = self._fill(target, content)
                    target.flush()
                    os.fsync(target.fileno())
                temporary.replace(self._folder / digest)
                self._sync_folder()
            finally:
                temporary.unlink(missing_ok=True)
        return digest

    def _fill(self, target: BinaryIO, content: bytes | Path) -> str:
        digest, size = hashlib.sha256(), 0
        for chunk in _chunks(content):
            size += len(chunk)
            if size > self._bytes_max:
                raise BoundExceeded(f"a file of more than {self._bytes_max} bytes is not kept; make it smaller")
            digest.update(chunk)
            target.write(chunk)
        return digest.hexdigest()

    def get(self, sha256: str) -> bytes:
        """The bytes with that hash. Raises NotFound when they are not here, or were damaged and have been removed."""
        path = self.path(sha256)
        with self._disk("read"):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                raise NotFound(f"no file with sha256 {sha256} is kept here; put it in again") from None
        if hashlib.sha256(content).hexdigest() != sha256:
            self.delete(sha256)
            raise NotFound(f"the file with sha256 {sha256} was damaged on disk and removed; put it in again")
        return content

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def check(self, sha256: str) -> bool:
        """Whether the bytes are here with their hash; a file that was damaged is removed."""
        path = self.path(sha256)
        with self._disk("read"):
            try:
                with path.open("rb") as source:
                    found = hashlib.file_digest(source, "sha256").hexdigest()
            except FileNotFoundError:
                return False
        if found != sha256:
            self.delete(sha256)
        return found == sha256

    def delete(self, sha256: str) -> None:
        """Remove it; one that is not here is no error."""
        with self._disk("removed"):
            self.path(sha256).unlink(missing_ok=True)

    def delete_parts(self, keep: Collection[str]) -> None:
        """Remove what has come of other files than those (sha256) that are still wanted."""
        with self._disk("removed"):
            for entry in os.listdir(self._folder):
                part = _PART.fullmatch(entry)
                if part and part[1] not in keep:
                    (self._folder / entry).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """The sha256 of each file that is kept."""
        with self._disk("listed"):
            return [name for name in os.listdir(self._folder) if _NAME.fullmatch(name)]

    def statistics(self) -> BlobStatistics:
        with self._disk("listed"):
            sizes = [entry.stat().st_size for entry in os.scandir(self._folder) if _NAME.fullmatch(entry.name)]
        return BlobStatistics(len(sizes), sum(sizes))

    def path(self, sha256: str) -> Path:
        """Where the file is, or would be. Raises NotFound for what is no sha256."""
        if not _NAME.fullmatch(sha256):
            raise NotFound(f"{sha256!r} is not a sha256 in hex")
        return self._folder / sha256

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    @contextmanager
    def _disk(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"a file in {self._folder} can't be {done}: {error}; free or repair the disk"
            raise StoreUnavailable(reason) from error


def _chunks(content: bytes | Path) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as source:
        while chunk := source.read(4 * MIB):
            yield chunk
