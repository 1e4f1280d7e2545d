"""What is found in the watched directory, what never gets further than a line about it, and what was not looked at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from node.kernel import limits
from node.kernel.errors import ManifestError
from node.kernel.types import ModelName
from tenants import folder


def test_names_that_no_model_can_have_are_told_and_not_taken(tmp_path: Path) -> None:
    (tmp_path / "ads").mkdir()
    for stem in (b"bid", b"\xff", b"new\nline", b"Bid", b"a" * 200):
        for suffix in (b".toml", b".joblib"):
            (tmp_path / "ads" / os.fsdecode(stem + suffix)).touch()
    os.mkdir(os.fsencode(tmp_path) + b"/\xfe")
    found = folder.scan(tmp_path)
    assert set(found.pairs) == {ModelName("ads", "bid")}
    assert found.halves == frozenset()
    assert set(found.tenants) == {"ads"}
    assert len(found.ignored) == 5
    assert all(line.isprintable() and line.encode() for line in found.ignored)
    assert any(line.startswith("ads/Bid: ") for line in found.ignored)


def test_lines_about_names_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "ads").mkdir()
    for number in range(1000):
        (tmp_path / "ads" / f"X{number}.toml").touch()
    assert len(folder.scan(tmp_path).ignored) <= 256


def test_each_tenant_has_lines_of_its_own_however_many_another_one_has(tmp_path: Path) -> None:
    for tenant, count in (("ads", 1000), ("mail", 1)):
        (tmp_path / tenant).mkdir()
        for number in range(count):
            (tmp_path / tenant / f"X{number}.toml").touch()
    pair(tmp_path, "shop")
    told = folder.scan(tmp_path).ignored_of
    assert {tenant: len(lines) for tenant, lines in told.items()} == {"ads": 16, "mail": 1}
    assert told["mail"] == (
        "mail/X0: a model is named with a-z, 0-9, '_' and '-' only, at most 63 of them, the first a letter or digit;"
        " rename its files",
    )


def pair(root: Path, tenant: str, model: str = "m") -> ModelName:
    (root / tenant).mkdir(exist_ok=True)
    for suffix in (folder.MANIFEST, folder.MODEL):
        (root / tenant / f"{model}{suffix}").write_text("x")
    return ModelName(tenant, model)


def test_a_folder_over_the_bound_takes_no_place_of_one_that_is_known_and_is_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TENANTS_MAX", 2)
    known = {pair(tmp_path, "bb"), pair(tmp_path, "cc")}
    pair(tmp_path, "aa")
    found = folder.scan(tmp_path, {"bb", "cc"})
    assert (set(found.pairs), set(found.tenants), found.unseen) == (known, {"bb", "cc"}, {"aa"})
    assert "aa/: there are 2 tenants already" in found.ignored[0]
    assert folder.scan(tmp_path).unseen == {"cc"}


def test_a_tenant_with_too_many_files_is_told_so_and_what_was_not_seen_is_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "TENANT_FOLDER_ENTRIES_MAX", 6)
    name = pair(tmp_path, "ads")
    for number in range(4):
        (tmp_path / "ads" / f"notes{number}.txt").touch()
    whole = folder.scan(tmp_path)
    assert (set(whole.pairs), whole.unseen, whole.ignored) == ({name}, frozenset(), ())
    (tmp_path / "ads" / "one more").touch()
    found = folder.scan(tmp_path)
    assert found.unseen == {"ads"}
    assert "ads/: has more than 6 files" in found.ignored[0]


def test_a_file_that_can_not_be_looked_at_is_not_gone(tmp_path: Path) -> None:
    name = pair(tmp_path, "ads")
    broken = tmp_path / "ads" / "loop.toml"
    broken.symlink_to(broken)
    (tmp_path / "ads" / "dangling.toml").symlink_to(tmp_path / "nowhere")
    found = folder.scan(tmp_path)
    assert (set(found.pairs), found.unseen) == ({name}, {"ads"})
    assert "ads/loop.toml: can't be read" in found.ignored[0]
    assert len(found.ignored) == 1, "what a link points to may be gone"


def test_a_file_that_grows_while_it_is_read_is_read_no_further_than_its_bound(tmp_path: Path) -> None:
    pair(tmp_path, "ads")
    with folder.opened(tmp_path, "ads", "m.toml", 16) as held:
        assert held.read() == b"x"
        os.truncate(tmp_path / "ads" / "m.toml", 16)
        assert len(held.read()) == 16
        os.truncate(tmp_path / "ads" / "m.toml", 1 << 40)  # all of it would not fit into memory
        with pytest.raises(ManifestError, match=r"m\.toml: has more than 16 bytes; make it smaller"):
            held.read()
    with pytest.raises(ManifestError, match="more than 16 bytes"), folder.opened(tmp_path, "ads", "m.toml", 16):
        pass
