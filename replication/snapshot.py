"""(P) What a snapshot of a partition is: a manifest that names files by their sha256.

A snapshot holds a partition's state as of one frame; `changelog_offset` is where the changelog goes on after it. Its
files are those of a RocksDB checkpoint. Tables never change once written, so snapshots share most of them, and a file
is written, sent and stored once for each sha256.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from node.kernel.errors import StateCorrupt
from node.kernel.limits import (
    NAME_BYTES_MAX,
    PARTITIONS_MAX,
    SNAPSHOT_FILE_BYTES_MAX,
    SNAPSHOT_FILES_MAX,
    SNAPSHOT_MANIFEST_BYTES_MAX,
    SNAPSHOTS_KEPT,
)

FORMAT = 1
Sha256: TypeAlias = Annotated[str, Meta(pattern="^[0-9a-f]{64}\\Z")]
FileName: TypeAlias = Annotated[str, Meta(pattern="^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}\\Z")]
"""Never hidden, "." or "..", and no path."""
Number: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class SnapshotFile(Struct, frozen=True, array_like=True):
    name: FileName
    sha256: Sha256
    bytes: Annotated[int, Meta(ge=0, le=SNAPSHOT_FILE_BYTES_MAX)]


class Snapshot(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The manifest. `changelog` is the topic whose frames it holds; `node` took it."""

    changelog: Annotated[str, Meta(min_length=1, max_length=249)]
    partition: Annotated[int, Meta(ge=0, lt=PARTITIONS_MAX)]
    changelog_offset: Number
    created_ms: Number
    node: Annotated[str, Meta(min_length=1, max_length=NAME_BYTES_MAX)]
    files: Annotated[tuple[SnapshotFile, ...], Meta(min_length=1, max_length=SNAPSHOT_FILES_MAX)]
    format: Annotated[int, Meta(ge=FORMAT, le=FORMAT)] = FORMAT

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def file(self, sha256: str) -> SnapshotFile | None:
        return next((file for file in self.files if file.sha256 == sha256), None)


_decoder = msgspec.json.Decoder(Snapshot)


def encode_snapshot(snapshot: Snapshot) -> bytes:
    return msgspec.json.encode(snapshot)


def decode_snapshot(content: bytes, changelog: str, partition: int) -> Snapshot:
    """Raises StateCorrupt for what is no manifest, or one of another changelog or partition."""
    what = f"a snapshot's manifest of {changelog}[{partition}]"
    if len(content) > SNAPSHOT_MANIFEST_BYTES_MAX:
        raise StateCorrupt(f"{what} has {len(content)} bytes, over SNAPSHOT_MANIFEST_BYTES_MAX; take another snapshot")
    try:
        snapshot = _decoder.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError) as failure:
        raise StateCorrupt(f"{what} can't be read: {failure}; take another snapshot") from failure
    if (snapshot.changelog, snapshot.partition) != (changelog, partition):
        raise StateCorrupt(f"{what} is of {snapshot.changelog}[{snapshot.partition}]; look who writes to that place")
    names = {file.name for file in snapshot.files}
    if len(names) != len(snapshot.files):
        raise StateCorrupt(f"{what} names a file twice; take another snapshot")
    return snapshot


def superseded(offsets: Iterable[int], pinned: Collection[int] = (), kept: int = SNAPSHOTS_KEPT) -> list[int]:
    """Which snapshots go: all but the newest `kept` and those that someone still reads."""
    return [offset for offset in sorted(offsets, reverse=True)[kept:] if offset not in pinned]


def unreferenced(found: Iterable[str], snapshots: Iterable[Snapshot]) -> set[str]:
    """The sha256 of files that no snapshot names."""
    return set(found) - {file.sha256 for snapshot in snapshots for file in snapshot.files}
