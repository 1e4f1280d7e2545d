"""Content-addressed files: what has a name is whole, what is given out has its hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.kernel.errors import BoundExceeded, NotFound, StoreUnavailable
from replication.blobs import BlobStore


@settings(deadline=None)  # it waits for the disk
@given(st.binary(max_size=4096))
def test_what_is_put_comes_back_under_its_hash(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    sha256 = store.put(content)
    assert sha256 == hashlib.sha256(content).hexdigest()
    assert store.get(sha256) == content
    assert store.put(content) == sha256
    assert store.statistics().files == 1
    assert store.names() == [sha256]
    store.delete(sha256)
    assert store.names() == []


def test_a_file_is_copied_and_the_copy_is_its_own(tmp_path: Path) -> None:
    source = tmp_path / "model.joblib"
    source.write_bytes(b"first")
    store = BlobStore(tmp_path / "blobs")
    sha256 = store.put(source)
    source.write_bytes(b"later")
    assert store.get(sha256) == b"first"


def test_a_damaged_file_is_never_given_out(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    sha256 = store.put(b"good")
    (tmp_path / sha256).write_bytes(b"bad!")
    with pytest.raises(NotFound, match="damaged"):
        store.get(sha256)
    assert not store.has(sha256)
    assert store.put(b"good") == sha256
    assert store.get(sha256) == b"good"


def test_too_large_a_file_leaves_nothing_behind(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, bytes_max=10)
    with pytest.raises(BoundExceeded, match="10 bytes"):
        store.put(b"x" * 11)
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_named_and_no_path_gets_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    store = BlobStore(tmp_path / "blobs")
    for name in ("0" * 64, "../secret", "", "A" * 64):
        with pytest.raises(NotFound):
            store.get(name)
    store.delete("0" * 64)


def test_half_written_files_of_a_crash_are_removed_at_the_start(tmp_path: Path) -> None:
    (tmp_path / ".new-abc").write_bytes(b"half")
    BlobStore(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreUnavailable, match="can't be opened"):
        BlobStore(tmp_path / "file")


def test_a_check_reads_the_bytes_and_removes_what_is_damaged(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    sha256 = store.put(b"good")
    assert store.check(sha256)
    store.path(sha256).write_bytes(b"bad!")
    assert not store.check(sha256)
    assert not store.has(sha256)
    assert not store.check(sha256)
    with pytest.raises(NotFound):
        store.check("../secret")


def test_parts_of_files_stay_over_a_start_and_go_when_no_longer_wanted(tmp_path: Path) -> None:
    wanted, other = "1" * 64, "2" * 64
    for sha256 in (wanted, other):
        (tmp_path / f".{sha256}.part").write_bytes(b"half")
    store = BlobStore(tmp_path)
    assert store.names() == []
    assert store.statistics().files == 0
    store.delete_parts({wanted})
    assert [path.name for path in tmp_path.iterdir()] == [f".{wanted}.part"]
