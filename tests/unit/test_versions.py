"""What versions were is kept while their triggers may wait; a disk that refuses never looks like a deletion."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from node.kernel.errors import StoreUnavailable
from node.kernel.types import ModelName, ModelVersion
from tenants.versions import REPLACED_MAX, VersionFolder

BID, FRAUD = ModelName("ads", "bid"), ModelName("grocery", "fraud")


def version(number: int, name: ModelName = BID) -> ModelVersion:
    key = f"{number:064x}"
    return ModelVersion(name, key, f"{number + 1000:064x}", ("transaction",), ("x",), ("score",), "predict", 0, 1000)


def test_what_was_live_is_known_after_a_restart(tmp_path: Path) -> None:
    first = VersionFolder(tmp_path / "versions")
    first.keep([version(1)])
    first.keep([version(2), version(3, FRAUD)])
    again = VersionFolder(tmp_path / "versions")
    assert [again.recall(BID, version(number).version) for number in (1, 2)] == [version(1), version(2)]
    assert again.recall(BID, version(9).version) is None


def test_a_damaged_file_is_not_known_and_a_disk_that_refuses_is_told(tmp_path: Path) -> None:
    (tmp_path / version(1).version).write_bytes(b"{")
    assert VersionFolder(tmp_path).recall(BID, version(1).version) is None
    (tmp_path / version(2).version).mkdir()
    with pytest.raises(StoreUnavailable, match="repair the disk"):
        VersionFolder(tmp_path).recall(BID, version(2).version)


def test_what_the_disk_refuses_stays_in_memory_and_is_written_at_the_next_change(tmp_path: Path) -> None:
    folder = tmp_path / "versions"
    folder.write_text("in the way")
    versions = VersionFolder(folder)
    versions.keep([version(1)])
    assert versions.recall(BID, version(1).version) == version(1)
    folder.unlink()
    versions.keep([version(2)])
    again = VersionFolder(folder)
    assert again.recall(BID, version(1).version) == version(1)
    assert again.recall(BID, version(2).version) == version(2)


def test_a_file_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    VersionFolder(tmp_path).keep([version(1)])
    before = (tmp_path / version(1).version).stat().st_ino
    VersionFolder(tmp_path).keep([version(1)])
    assert (tmp_path / version(1).version).stat().st_ino == before


def test_a_model_that_is_renamed_keeps_what_it_was(tmp_path: Path) -> None:
    """The same files make the same version, whatever they are called."""
    versions, renamed = VersionFolder(tmp_path), ModelName("ads", "offer")
    versions.keep([version(1)])
    versions.keep([version(1, renamed)])
    versions.keep([version(2, renamed)])
    assert versions.collect([renamed], [version(2).version]).dropped == set()
    for known in (versions, VersionFolder(tmp_path)):
        assert known.recall(renamed, version(1).version) == version(1, renamed)


def test_the_newest_replaced_versions_of_each_model_stay(tmp_path: Path) -> None:
    versions = VersionFolder(tmp_path)
    count = REPLACED_MAX + 3
    for number in range(count):
        versions.keep([version(number), version(100, FRAUD)])
        os.utime(tmp_path / version(number).version, ns=(number, number))
    os.utime(tmp_path / version(100).version, ns=(0, 0))
    live = {version(count - 1).version, version(100).version}
    kept = VersionFolder(tmp_path).collect({BID, FRAUD}, live)
    expected = {version(number).version for number in range(2, count)} | live
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert kept.dropped == {version(0).version, version(1).version}
    assert kept.blobs == {version(int(key, 16)).blob for key in expected}


def test_a_version_that_went_live_again_is_new_again(tmp_path: Path) -> None:
    versions = VersionFolder(tmp_path)
    versions.keep([version(1)])
    os.utime(tmp_path / version(1).version, ns=(0, 0))
    versions.keep([version(2)])
    versions.keep([version(1)])
    assert (tmp_path / version(1).version).stat().st_mtime_ns > 0


def test_versions_of_deleted_models_go_and_are_forgotten(tmp_path: Path) -> None:
    versions = VersionFolder(tmp_path)
    versions.keep([version(1), version(2, FRAUD)])
    versions.keep([version(1)])
    kept = versions.collect({BID}, {version(1).version})
    versions.forget(kept.dropped)
    assert kept.dropped == {version(2).version}
    assert versions.recall(BID, version(2).version) is None
    assert versions.recall(BID, version(1).version) == version(1)
