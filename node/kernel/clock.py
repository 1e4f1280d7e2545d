"""Time as an argument: shells take a `Clock`, so tests and the simulator decide what time it is."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now_ms(self) -> int:
        """Wall-clock time, milliseconds since the Unix epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go backwards; for durations and deadlines."""
        ...


class SystemClock:
    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told to; shipped, because the simulator runs on it."""

    def __init__(self, now_ms: int = 0) -> None:
        self._start_ms = now_ms
        self._elapsed_ms = 0.0

    def now_ms(self) -> int:
        return self._start_ms + int(self._elapsed_ms)

    def monotonic(self) -> float:
        return self._elapsed_ms / 1000

    def advance(self, elapsed_ms: float) -> None:
        self._elapsed_ms += elapsed_ms
