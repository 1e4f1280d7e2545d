"""What the interval benchmark makes of its parts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "bench"))

from interval import ratios


def test_each_part_is_held_against_those_around_it() -> None:
    assert ratios([10.0, 30.0, 10.0], [30.0, 25.0]) == pytest.approx([1.5, 1.25])
    with pytest.raises(ValueError, match="zip"):
        ratios([10.0, 30.0], [30.0, 25.0])
