"""What a tenant may put into the watched directory never gets further than a line about it."""

from __future__ import annotations

import os
from pathlib import Path

from node.kernel.types import ModelName
from tenants.folder import scan


def test_names_that_no_model_can_have_are_told_and_not_taken(tmp_path: Path) -> None:
    (tmp_path / "ads").mkdir()
    for stem in (b"bid", b"\xff", b"new\nline", b"Bid", b"a" * 200):
        for suffix in (b".toml", b".joblib"):
            (tmp_path / "ads" / os.fsdecode(stem + suffix)).touch()
    os.mkdir(os.fsencode(tmp_path) + b"/\xfe")
    found = scan(tmp_path)
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
    assert len(scan(tmp_path).ignored) <= 256
