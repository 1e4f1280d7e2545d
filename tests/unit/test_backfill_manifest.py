"""What a manifest's [backfill] says, and each mistake in it."""

from __future__ import annotations

import pytest

from node.kernel.types import Backfill
from tenants.backfill_manifest import parse_backfill

DAY_MS = 86_400_000


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"from": "30d"}, Backfill(back_ms=30 * DAY_MS)),
        ({"from": "all"}, Backfill()),
        ({"from": "2026-01-01", "until": "held"}, Backfill(since_ms=1_767_225_600_000, hold=True)),
    ],
)
def test_from_is_a_duration_a_day_or_all(value: object, expected: Backfill) -> None:
    problems: list[str] = []
    assert (parse_backfill(value, problems.append), problems) == (expected, [])


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("30d", "must be a table"),
        ({}, "from must be"),
        ({"from": 30}, "from must be"),
        ({"from": "2026-13-01"}, "neither a day"),
        ({"from": "10"}, "neither a day"),
        ({"from": "all", "until": "soon"}, "until must be"),
        ({"from": "all", "til": "held"}, "unknown key"),
    ],
)
def test_a_mistake_is_told(value: object, said: str) -> None:
    problems: list[str] = []
    parse_backfill(value, problems.append)
    assert len(problems) == 1
    assert said in problems[0]


def test_from_when_on_it_is_wanted() -> None:
    assert Backfill(back_ms=5).wanted_ms(12) == 7
    assert Backfill(since_ms=5).wanted_ms(12) == 5
    assert Backfill().wanted_ms(12) == 0
    assert Backfill(back_ms=12).wanted_ms(12) == 1, "0 would be all there is"
