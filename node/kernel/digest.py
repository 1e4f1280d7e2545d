"""(P) Whether two stores hold the same, row for row, found out by exchanging little.

Every row and chunk goes, by a hash of its key, into one of DIGEST_BUCKETS buckets, each a sha256 over its entries in
key order. Stores that differ do so in some buckets, and the entries of one of those name the first that differ.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol
from zlib import crc32

import msgspec

from node.kernel.errors import printable
from node.kernel.limits import DIGEST_BUCKET_ENTRIES_MAX, DIGEST_BUCKETS, DIGEST_DIFFERENCES_MAX

_LENGTHS = struct.Struct("<BII")
_FAMILIES = {"profiles": 0, "sequence": 1, "runs": 2, "backfill": 3}
_NAMES = {"profiles": "customer", "sequence": "chunk", "runs": "interval run", "backfill": "state of the backfill"}


class Digestible(Protocol):
    """A store that can be gone through from end to end; see `StateStore` for the rest."""

    def changelog_offset(self) -> int: ...

    def progress(self) -> Mapping[str, int]: ...

    def counters(self) -> Mapping[str, int]: ...

    def layout(self) -> bytes | None: ...

    def entries(self) -> Iterator[tuple[str, bytes, bytes]]:
        """(family, key, value) of all rows, chunks, runs and the backfill, in key order in each family."""
        ...


class StoreDigest(msgspec.Struct, frozen=True):
    """All that a store holds after the frame before `changelog_offset`."""

    changelog_offset: int
    progress: dict[str, int]
    counters: dict[str, int]
    layout: str
    """sha256 of the encoded row layout; "" where there is none."""
    rows: int
    chunks: int
    buckets: tuple[str, ...]


class BucketEntry(msgspec.Struct, frozen=True, array_like=True):
    family: str
    key: bytes
    sha256: str


def bucket_of(key: bytes) -> int:
    return crc32(key) % DIGEST_BUCKETS


def digest_store(store: Digestible) -> StoreDigest:
    """Goes through the whole store: two to four seconds for a million rows, for a process of its own."""
    hashes = [hashlib.sha256() for _ in range(DIGEST_BUCKETS)]
    counts = [0] * len(_FAMILIES)
    for family, key, value in store.entries():
        number = _FAMILIES[family]
        counts[number] += 1
        hashes[crc32(key) % DIGEST_BUCKETS].update(_LENGTHS.pack(number, len(key), len(value)) + key + value)
    layout = store.layout()
    return StoreDigest(
        store.changelog_offset(),
        dict(store.progress()),
        dict(store.counters()),
        "" if layout is None else hashlib.sha256(layout).hexdigest(),
        counts[0],
        counts[1],
        tuple(found.hexdigest()[:32] for found in hashes),
    )


def bucket_entries(store: Digestible, bucket: int) -> list[BucketEntry]:
    """The entries of one bucket, DIGEST_BUCKET_ENTRIES_MAX at most."""
    found: list[BucketEntry] = []
    for family, key, value in store.entries():
        if bucket_of(key) == bucket:
            found.append(BucketEntry(family, key, hashlib.sha256(value).hexdigest()))
            if len(found) == DIGEST_BUCKET_ENTRIES_MAX:
                break
    return found


def differing_buckets(ours: StoreDigest, theirs: StoreDigest) -> list[int]:
    return [number for number, pair in enumerate(zip(ours.buckets, theirs.buckets, strict=True)) if pair[0] != pair[1]]


def differences(ours: StoreDigest, theirs: StoreDigest) -> list[str]:
    """What differs beside the rows, and how much of the rows does; empty for equal stores."""
    found = [
        f"{name}: {mine!r} and {other!r}"
        for name in ("changelog_offset", "progress", "counters", "layout", "rows", "chunks")
        if (mine := getattr(ours, name)) != (other := getattr(theirs, name))
    ]
    buckets = len(differing_buckets(ours, theirs))
    return [*found, f"{buckets} of {DIGEST_BUCKETS} buckets of rows"] if buckets else found


def differing_entries(ours: Iterable[BucketEntry], theirs: Iterable[BucketEntry]) -> list[str]:
    """The first customers and chunks, in key order, that one has and the other has not, or otherwise."""
    mine, other = set(ours), set(theirs)
    keys = sorted({(entry.family, entry.key) for entry in mine ^ other})
    return [f"{_NAMES[family]} {_readable(key)}" for family, key in keys[:DIGEST_DIFFERENCES_MAX]]


def _readable(key: bytes) -> str:
    return printable(key.decode(errors="backslashreplace"))
