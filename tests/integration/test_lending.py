"""A worker that sleeps is told from one that computes or waits for a CPU, by what the kernel says of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from node.kernel.clock import SystemClock
from tenants.cpu_time import cpu_seconds
from tenants.lending import SlotLook, wants_cpu

SLEEPS = "import signal; print(flush=True); signal.pause()"
"""It uses no CPU, as the models that lend their slots do, until it is killed."""
BOTH = "import sys; print(flush=True); sys.stdin.readline()\nwhile True: pass"


@contextlib.contextmanager
def running(program: str) -> Iterator[subprocess.Popen[bytes]]:
    """Given once the program has said its first line."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


async def test_a_process_that_sleeps_lends_its_slot() -> None:
    told: asyncio.Queue[bool] = asyncio.Queue()
    with running(SLEEPS) as process:
        look = SlotLook(process.pid, SystemClock(), told.put_nowait)
        assert await asyncio.wait_for(told.get(), 10) is True
        look.end()


class Watched(SystemClock):
    """Remembers what it said last, so that what was made of it can be told exactly."""

    said = 0.0

    def monotonic(self) -> float:
        self.said = super().monotonic()
        return self.said


async def test_time_that_was_lent_is_not_held_and_a_slot_is_asked_back() -> None:
    clock = Watched()
    told: asyncio.Queue[tuple[bool, float]] = asyncio.Queue()
    with running(BOTH) as process:
        look = SlotLook(process.pid, clock, lambda lent: told.put_nowait((lent, clock.said)))
        started = clock.said
        lent, lent_at = await asyncio.wait_for(told.get(), 10)
        assert lent
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        lent, back_at = await asyncio.wait_for(told.get(), 10)
        assert not lent
        # The process goes on computing, so nothing is lent again until the end, whenever that is.
        held = look.end()
    assert told.empty()
    assert held == pytest.approx(clock.said - started - (back_at - lent_at), abs=1e-6)


def test_a_process_that_is_gone_has_used_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert cpu_seconds(process.pid) == 0.0
    assert cpu_seconds(os.getpid()) > 0.0


@pytest.mark.parametrize(
    ("stat", "wanted"), [("7 (a) R 1", True), ("7 (R) S) S 1", False), ("7 (x) D 1", False), ("", False)]
)
def test_the_state_is_read_behind_a_name_that_may_hold_anything(stat: str, wanted: bool) -> None:
    assert wants_cpu(stat) is wanted
