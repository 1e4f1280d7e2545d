"""The manifest of a snapshot: what is taken and refused, and which snapshots and files go."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.kernel.errors import StateCorrupt
from replication.snapshot import Snapshot, SnapshotFile, decode_snapshot, encode_snapshot, superseded, unreferenced

HASHES = st.integers(0, 9).map(lambda number: f"{number:064x}")


def manifest(*files: tuple[str, str, int], partition: int = 3, changelog_offset: int = 70) -> Snapshot:
    return Snapshot(
        changelog="shop-changelog",
        partition=partition,
        changelog_offset=changelog_offset,
        created_ms=5,
        node="a",
        files=tuple(SnapshotFile(*file) for file in files),
    )


@given(st.dictionaries(st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,20}", fullmatch=True), HASHES, min_size=1))
def test_a_manifest_comes_back_as_it_went(files: dict[str, str]) -> None:
    sent = manifest(*((name, sha256, number) for number, (name, sha256) in enumerate(files.items())))
    assert decode_snapshot(encode_snapshot(sent), "shop-changelog", 3) == sent


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/etc", ".hidden", "a\n", "x" * 101])
def test_a_file_can_only_be_named_plainly(name: str) -> None:
    with pytest.raises(StateCorrupt, match="can't be read"):
        decode_snapshot(encode_snapshot(manifest((name, "0" * 64, 1))), "shop-changelog", 3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"changelog": "other"}, "is of other"),
        ({"partition": 4}, r"is of shop-changelog\[4\]"),
        ({"format": 2}, "can't be read"),
        ({"extra": 1}, "can't be read"),
        ({"files": []}, "can't be read"),
        ({"files": [["a", "0" * 64, 1], ["a", "1" * 64, 1]]}, "twice"),
        ({"files": [["a", "0" * 63, 1]]}, "can't be read"),
        ({"files": [["a", "0" * 64, -1]]}, "can't be read"),
        ({"changelog_offset": -1}, "can't be read"),
    ],
)
def test_what_is_no_manifest_of_this_partition_is_refused(changes: dict[str, object], reason: str) -> None:
    fields = msgspec.to_builtins(manifest(("a", "0" * 64, 1))) | changes
    with pytest.raises(StateCorrupt, match=reason):
        decode_snapshot(msgspec.json.encode(fields), "shop-changelog", 3)


@given(st.binary(max_size=60))
def test_noise_is_refused(content: bytes) -> None:
    with pytest.raises(StateCorrupt):
        decode_snapshot(content, "shop-changelog", 3)


@given(st.sets(st.integers(0, 99)), st.sets(st.integers(0, 99)), st.integers(1, 3))
def test_the_newest_stay_and_so_does_what_is_read(offsets: set[int], pinned: set[int], kept: int) -> None:
    going = set(superseded(offsets, pinned, kept))
    assert going <= offsets - pinned
    assert going.isdisjoint(sorted(offsets)[-kept:])
    assert len(offsets - going - pinned) <= kept


@given(st.sets(HASHES), st.lists(st.lists(HASHES, min_size=1, max_size=4, unique=True), max_size=3))
def test_a_file_that_any_snapshot_names_is_kept(found: set[str], snapshots: list[list[str]]) -> None:
    named = [manifest(*((f"f{n}", sha256, 1) for n, sha256 in enumerate(files))) for files in snapshots]
    going = unreferenced(found, named)
    assert going == {sha256 for sha256 in found if not any(sha256 in files for files in snapshots)}
