"""(P) What the steps of a feature plan cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SharedCost:
    """Of one shared feature, since its plan went live: `seconds` is the CPU time of it and all that it is computed
    from, but for the fold of the aggregates; `values` is how many rows of it were computed."""

    seconds: float
    values: int


class StepMeter:
    """How long each step of a plan took, and for how many rows; `timer` gives seconds."""

    def __init__(self, timer: Callable[[], float], steps: int) -> None:
        self._timer = timer
        self._since = 0.0
        self.seconds = [0.0] * steps
        self.values = [0] * steps

    def start(self) -> None:
        self._since = self._timer()

    def note(self, number: int, size: int) -> None:
        """The step was computed since the last call of this or of `start`."""
        now = self._timer()
        self.seconds[number] += now - self._since
        self.values[number] += size
        self._since = now
