"""CPU time that nobody asked for is told from that of requests."""

from __future__ import annotations

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenants.cpu_time import Meter, cpu_seconds


def test_only_what_is_used_between_requests_is_unasked() -> None:
    meter = Meter(1.0)
    meter.asked(1.0)
    meter.answered(6.0)
    assert meter.look(6.0) == (0.0, False)
    assert meter.look(6.0) == (0.0, True)
    assert meter.look(9.0) == (3.0, True)
    meter.asked(9.5)
    assert meter.look(20.0) == (0.5, False), "what a request in progress uses is charged with it"
    meter.answered(21.0)
    assert meter.look(21.25) == (0.25, False), "a request was answered since the last look"


@given(st.lists(st.tuples(st.floats(0, 10), st.sampled_from(["ask", "answer", "look", "rest"])), max_size=30))
def test_each_second_counts_once(steps: list[tuple[float, str]]) -> None:
    meter, now, asking, unasked, found = Meter(), 0.0, False, 0.0, 0.0
    for seconds, step in [*steps, (0.0, "answer"), (0.0, "look")]:
        now += seconds
        unasked += 0.0 if asking else seconds
        if step == "ask" and not asking:
            meter.asked(now)
            asking = True
        elif step == "answer" and asking:
            meter.answered(now)
            asking = False
        elif step == "look":
            found += meter.look(now).seconds
    assert found == pytest.approx(unasked)


def test_the_kernel_tells_of_others_and_of_those_gone() -> None:
    assert cpu_seconds(os.getpid()) > 0
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert cpu_seconds(ended.pid) == 0
