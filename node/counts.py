"""What the partitions of a node have counted since it started.

A partition's own counters are all since its changelog began: a sum of those that are open falls when one closes, and
jumps when one comes that others have had. Counters for Prometheus must do neither.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping

from node.cycle import PartitionState
from node.kernel.clock import Clock
from node.kernel.types import ModelName
from node.outgoing import add_up_former, counted_under
from node.steps import StepTimes


class Opening:
    """What one session of a partition adds."""

    def __init__(self, state: PartitionState) -> None:
        self._state = state
        self._before = Counter(state.committed)

    def counted(self) -> Counter[str]:
        committed = Counter(self._state.committed)
        before = Counter[str]()
        for counter, count in self._before.items():
            before[counted_under(counter, committed)] += count
        return committed - before


class NodeCounts:
    def __init__(self, clock: Clock, models: Callable[[], Collection[ModelName]] = tuple) -> None:
        """`models` are those there are, live or beside one."""
        self._clock = clock
        self._models = models
        self._open: list[Opening] = []
        self._closed: Counter[str] = Counter()
        self._steps: dict[int, StepTimes] = {}

    def steps(self, partition: int) -> StepTimes:
        return self._steps.setdefault(partition, StepTimes(self._clock))

    def opened(self, state: PartitionState) -> Opening:
        """To be given to `closed`, once nothing is committed any more."""
        self._open.append(Opening(state))
        return self._open[-1]

    def closed(self, opening: Opening) -> None:
        self._open.remove(opening)
        self._closed.update(opening.counted())
        add_up_former(self._closed, self._models())

    def counters(self) -> Mapping[str, int]:
        """By the names of a partition's; nothing of those that have not risen."""
        return sum((opening.counted() for opening in self._open), self._closed)

    def step_seconds(self) -> Mapping[str, float]:
        """Of the cycle, all partitions together."""
        seconds: Counter[str] = Counter()
        for steps in self._steps.values():
            seconds.update(steps.statistics())
        return seconds
