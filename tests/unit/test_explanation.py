"""What windows say in words: asked for is got and held back, and each thing that can hold a tenant back is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenants.explanation import NOTHING, TenantFacts, explain, held_back_by
from tenants.shares import HOLDS, Competitor, Hold, ShareWindow

FACTS = TenantFacts("ads", 2.0, 50.0, 512, 2)
EMPTY = ShareWindow(
    10.0, dict.fromkeys(HOLDS, 0.0) | {"idle": 10.0}, 0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, None, None, 0.0, ()
)
BUSY = replace(
    EMPTY,
    held=dict.fromkeys(HOLDS, 0.0) | {"idle": 1.0, "turn": 6.0, "served": 3.0},
    waited=10,
    asked=90,
    got=60,
    dropped=5,
    running=15,
    waiting=20,
    cpu_seconds=2.0,
    cpu_waiting=0.5,
    cpu_all=8.0,
    share_got=0.25,
    share_due=0.3,
    competitors=(Competitor("fraud", 4.0, 9.0, 6.0),),
)


def says(window: ShareWindow, facts: TenantFacts = FACTS) -> str:
    return "\n".join(explain((window,), facts).windows[0].says)


def test_a_tenant_without_work_is_told_so() -> None:
    assert says(EMPTY) == "it had no work at all: no event concerned its models, or none of them is live"
    assert held_back_by(EMPTY) == NOTHING


def test_rows_seconds_and_shares_are_told() -> None:
    assert says(BUSY) == (
        "it asked for 100 rows, 10 of them from before;"
        " 60 were computed, 5 were dropped, 15 are being computed, 20 wait\n"
        "that is 2.5 s of CPU time asked for, 2.0 s got and 500 ms held back\n"
        "it got 25% of all CPU time of models; its weight made it 30%\n"
        "6.0 s: rows waited while others had the 2 CPU slots: weight 2 against fraud 4\n"
        "3.0 s: all that it asked for was being computed\n"
        "1.0 s: nothing waited"
    )


@pytest.mark.parametrize(
    ("hold", "facts", "words"),
    [
        ("turn", FACTS, "weight 2 against fraud 4"),
        ("worker", FACTS, "one worker, which computes one batch at a time"),
        ("quota", FACTS, "50 rows a second (rows_s_max, which the operator may raise)"),
        ("quota", replace(FACTS, own=frozenset({"rows_s_max"})), "which its tenant.toml sets"),
        ("blocked", FACTS, "in 512 MB of memory"),
        ("blocked", replace(FACTS, troubles=("its worker was lost 2 times, the last: memory",)), "the last: memory"),
    ],
)
def test_what_held_it_longest_is_named_and_explained(hold: Hold, facts: TenantFacts, words: str) -> None:
    window = replace(BUSY, held=dict.fromkeys(HOLDS, 0.2) | {hold: 9.0})
    assert held_back_by(window) == hold
    assert words in says(window, facts)
    assert held_back_by(replace(window, waiting=0)) == NOTHING, "all that it asked for was computed"


def test_a_worker_that_does_not_run_is_noted() -> None:
    told = explain((EMPTY,), replace(FACTS, worker="out of memory", troubles=("bid can't run: no file",)))
    assert told.notes == ("its worker does not run now: out of memory", "bid can't run: no file")


@given(st.floats(0, 100), st.floats(0, 100))
def test_cpu_time_asked_for_is_what_was_got_and_held_back(got: float, waiting: float) -> None:
    window = explain((replace(BUSY, cpu_seconds=got, cpu_waiting=waiting),), FACTS).windows[0]
    assert window.cpu_asked_seconds == window.cpu_got_seconds + window.cpu_held_back_seconds
