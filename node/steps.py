"""Where a partition's time goes, by step of the cycle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from node.kernel.clock import Clock

STEPS = ("poll", "decode", "load", "fold", "features", "trigger", "encode", "commit", "apply")


class StepTimes:
    """Running totals in seconds. `poll`, `trigger` and `commit` wait for others; the rest is this process's work."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds = dict.fromkeys(STEPS, 0.0)

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        started = self._clock.monotonic()
        try:
            yield
        finally:
            self.seconds[step] += self._clock.monotonic() - started

    def statistics(self) -> dict[str, float]:
        return {step: round(seconds, 6) for step, seconds in self.seconds.items()}
