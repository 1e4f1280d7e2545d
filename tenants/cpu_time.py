"""CPU time of workers, from the kernel: what a worker has used, and what of it nobody had asked for."""

from __future__ import annotations

import time
from typing import NamedTuple


def cpu_seconds(pid: int) -> float:
    """CPU time of a process with all its threads, from the kernel: a worker can't lie about it. 0 once it is gone.

    The clock's id is made as glibc's clock_getcpuclockid(3) makes it.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


class Unasked(NamedTuple):
    """CPU time outside of requests since the last look; `quiet` if there was no request in all that time."""

    seconds: float
    quiet: bool


class Meter:
    """Tells the CPU time of requests from that between them. Pure: figures of `cpu_seconds` arrive as arguments."""

    def __init__(self, cpu_seconds: float = 0.0) -> None:
        self._at_rest = cpu_seconds
        self._unasked = 0.0
        self._quiet = False
        self._asking = False

    def asked(self, cpu_seconds: float) -> None:
        self._unasked += max(0.0, cpu_seconds - self._at_rest)
        self._asking, self._quiet = True, False

    def answered(self, cpu_seconds: float) -> None:
        self._at_rest, self._asking, self._quiet = cpu_seconds, False, False

    def look(self, cpu_seconds: float) -> Unasked:
        if not self._asking:
            self._unasked += max(0.0, cpu_seconds - self._at_rest)
            self._at_rest = cpu_seconds
        found = Unasked(self._unasked, self._quiet and not self._asking)
        self._unasked, self._quiet = 0.0, True
        return found
