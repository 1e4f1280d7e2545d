"""Guesses at what was meant, in messages about tenants' files."""

from __future__ import annotations

import difflib

import pytest

from tenants import wording
from tenants.wording import suggestion

NAMES = [f"{start}_{days}d" for start in ("sum_buy", "sum_sell", "mean_buy", "mean_sell") for days in range(60)]


@pytest.mark.parametrize(
    ("name", "near"),
    [("sum_bye_30d", "sum_buy_30d"), ("maen_sell_7d", "mean_sell_7d"), ("summ_buy_59d", "sum_buy_59d")],
)
def test_the_nearest_of_many_names_is_guessed(name: str, near: str) -> None:
    assert suggestion(name, NAMES) == f", did you mean '{near}'?"


def test_where_nothing_is_near_it_says_what_there_is() -> None:
    assert suggestion("xyz", ["amount", "age"]) == "; known: 'age', 'amount'"
    assert suggestion("xyz", []) == "; there are none"
    assert suggestion("", ["amount"]) == "; known: 'amount'"


def test_few_names_are_compared_and_none_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """What that takes is the node's loop's: 400 long names, and a hundred mistakes, kept it for half a minute."""
    compared: list[int] = []

    class Counted(difflib.SequenceMatcher[str]):
        def ratio(self) -> float:
            compared.append(len(self.a) + len(self.b))
            return super().ratio()

    monkeypatch.setattr(wording, "SequenceMatcher", Counted)
    assert suggestion("ba" * 60, ["ab" * 60 + str(number) for number in range(400)]).startswith(", did you mean")
    assert len(compared) <= 8
    assert max(compared) <= 128
