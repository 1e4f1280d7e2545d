"""Looks at batches that run for longer than usual: one that sleeps lends its slot, so that it holds up only its own
tenant."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from node.kernel.clock import Clock
from tenants.cpu_time import cpu_seconds

LOOK_SECONDS = 0.020
"""How often a batch is looked at: one of usual length ends before the first look."""
COMPUTING_SHARE_MIN = 0.5
"""A worker that used less of the time since the last look, and isn't waiting for a CPU either, doesn't compute."""


def wants_cpu(stat: str) -> bool:
    """Whether the process of that /proc/PID/stat runs or waits for a CPU."""
    return stat.rpartition(")")[2].split()[:1] == ["R"]


class SlotLook:
    """Looks at one running batch until it ends. `lend` is told whether its slot is lent, whenever that changes."""

    def __init__(self, pid: int, clock: Clock, lend: Callable[[bool], None]) -> None:
        self._pid = pid
        self._clock = clock
        self._lend = lend
        self._computed, self._lent = True, False
        self._held = 0.0
        self._seen = self.began = clock.monotonic()
        self._before = self._used = cpu_seconds(pid)
        self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        used, seconds = cpu_seconds(self._pid), self._since()
        computes = used - self._used >= COMPUTING_SHARE_MIN * seconds or self._wants_cpu()
        # Twice in a row: one that has just answered rests too, and this may run before a busy loop has read its answer.
        lent, self._computed, self._used = not computes and not self._computed, computes, used
        if lent != self._lent:
            self._lent = lent
            self._lend(lent)
        self._timer = asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _since(self) -> float:
        """Seconds since the last look, which are then counted as held or lent."""
        now = self._clock.monotonic()
        seconds, self._seen = now - self._seen, now
        if not self._lent:
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
