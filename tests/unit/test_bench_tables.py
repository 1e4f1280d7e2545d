"""What the tables benchmark makes of append times and of inferences."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

import tables  # noqa: E402
from tables import Change, longest_gap_ms, mixed, pauses  # noqa: E402


def appended(*gaps_ms: tuple[int, int], end_ms: int = 40_000) -> list[int]:
    """Every 100 ms, but for the gaps (from, until)."""
    return [at for at in range(0, end_ms, 100) if not any(begin < at < end for begin, end in gaps_ms)]


def test_a_gap_counts_where_it_overlaps() -> None:
    appends = [appended(), appended((1000, 1700))]
    assert longest_gap_ms(appends, 0, 900) == 100
    assert longest_gap_ms(appends, 1200, 1300) == 700, "longer than what is looked at"
    assert longest_gap_ms(appends, 1700, 9000) == 100
    assert longest_gap_ms([[]], 0, 900) == 0


def test_a_pause_is_what_a_change_adds_to_what_is_usual() -> None:
    changes = [Change("put", 10_000, 12_000), Change("rollback", 20_000, 20_100), Change("put", 30_000, 31_000)]
    appends = {0: appended((10_500, 10_900), (32_500, 32_800)), 1: appended((20_500, 20_700))}
    pause_ms, detail = pauses(changes, appends)
    assert detail["pauses_ms"] == {"put": [400, 100], "rollback": [200], "load_alone": [100, 100, 300]}
    assert (pause_ms, detail["usual_pause_ms"], detail["load_alone_pause_ms_max"]) == (300, 100, 200)
    assert detail["change_ms"] == [2000, 100, 1000]


@pytest.mark.parametrize(
    ("scores", "named", "wrong"),
    [((1001.0, 1001.0), "aa", 0), ((1001.0, 2002.0), "ab", 1), ((1001.0, 2001.0), "aa", 1), ((5.0, 5.0), "ab", 3)],
)
def test_mixtures_are_counted(scores: tuple[float, float], named: str, wrong: int) -> None:
    told = [
        {"partition": 0, "offset": 7, "tables": {"products": name}, "outputs": {"score": score}}
        for score, name in zip(scores, named, strict=True)
    ]
    assert mixed(told, {"a": 1001.0, "b": 2002.0}) == wrong


def test_every_row_of_a_catalogue_tells_its_version(tmp_path: Path) -> None:
    lines = tables.catalogue(tmp_path, 3).read_text().splitlines()
    assert (len(lines), {line.partition(",")[2] for line in lines[1:]}) == (tables.PRODUCTS + 1, {"3,3"})
