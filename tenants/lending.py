"""Looks at batches that run for longer than usual: one that sleeps lends its slot, so that it holds up only its own
tenant."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from node.kernel.clock import Clock

LOOK_SECONDS = 0.020
"""How often a batch is looked at: one of usual length ends before the first look."""
COMPUTING_SHARE_MIN = 0.5
"""A worker that used less of the time since the last look, and isn't waiting for a CPU either, doesn't compute."""


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads, from the kernel: a worker can't lie about it. 0 once it is gone.

    The clock's id is made as glibc's clock_getcpuclockid(3) makes it.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def wants_cpu(stat: str) -> bool:
    """Whether the process of that /proc/PID/stat runs or waits for a CPU."""
    return stat.rpartition(")")[2].split()[:1] == ["R"]


class SlotLook:
    """Looks at one running batch until it ends. `overrun` is told at each look what CPU time it has used, and whether
    it computes."""

    def __init__(self, pid: int, clock: Clock, overrun: Callable[[float, bool], None]) -> None:
        self._pid = pid
        self._clock = clock
        self._overrun = overrun
        self._computing = self._computed = True
        self._held = 0.0
        self._seen = clock.monotonic()
        self._before = self._used = cpu_seconds(pid)
        self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        used, seconds = cpu_seconds(self._pid), self._since()
        computes = used - self._used >= COMPUTING_SHARE_MIN * seconds or self._wants_cpu()
        # Twice in a row: one that has just answered rests too, and this may run before a busy loop has read its answer.
        self._computing, self._computed, self._used = computes or self._computed, computes, used
        self._overrun(used - self._before, self._computing)
        self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _since(self) -> float:
        """Seconds since the last look, which are then counted as held or lent."""
        now = self._clock.monotonic()
        seconds, self._seen = now - self._seen, now
        if self._computing:
            self._held += seconds
        return seconds

    def _wants_cpu(self) -> bool:
        try:
            return wants_cpu(Path(f"/proc/{self._pid}/stat").read_text())
        except OSError:
            return False

    def used(self) -> float:
        """CPU seconds since the batch began."""
        return cpu_seconds(self._pid) - self._before

    def end(self) -> float:
        """Seconds for which the batch held its slot."""
        self._timer.cancel()
        self._since()
        return self._held
