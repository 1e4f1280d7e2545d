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
from tenants.lending import LOOK_SECONDS, SlotLook, cpu_seconds, wants_cpu

SLEEPS = "import time; print(flush=True); time.sleep(600)"
COMPUTES = "print(flush=True)\nwhile True: pass"
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


@pytest.mark.parametrize(("program", "computing"), [(SLEEPS, False), (COMPUTES, True)])
async def test_a_process_is_seen_to_sleep_or_to_compute(program: str, computing: bool) -> None:
    told: asyncio.Queue[tuple[float, bool]] = asyncio.Queue()
    with running(program) as process:
        look = SlotLook(process.pid, SystemClock(), lambda *seen: told.put_nowait(seen))
        seen = [await asyncio.wait_for(told.get(), 10) for _ in range(4)]
        look.end()
    assert [wanted for _, wanted in seen] == [True, computing, computing, computing]
    used = [seconds for seconds, _ in seen]
    assert used == sorted(used)
    assert (used[-1] >= LOOK_SECONDS / 2) == computing


async def test_time_that_was_lent_is_not_held_and_a_slot_is_asked_back() -> None:
    clock = SystemClock()
    told: asyncio.Queue[bool] = asyncio.Queue()
    with running(BOTH) as process:
        started, look = clock.monotonic(), SlotLook(process.pid, clock, lambda _, wanted: told.put_nowait(wanted))
        while await asyncio.wait_for(told.get(), 10):
            pass
        lent = clock.monotonic()
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        while not await asyncio.wait_for(told.get(), 10):
            pass
        back = clock.monotonic()
        held, took = look.end(), clock.monotonic() - started
    assert held <= took - (back - lent) + 0.010
    assert held >= took - (back - lent) - 0.010


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
