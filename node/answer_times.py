"""How long models lately took to answer, to know whom a cycle had better not wait for. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

_DECAY: Final = 0.8
"""Of the longest recent answer, with each later one: about ten quick ones follow a slow one before it is forgotten."""
SLOW_SHARE: Final = 0.25
"""Of the time a cycle waits at most: a model whose answers take longer is slow."""

Call = TypeVar("Call")


class AnswerTimes:
    """By line of the sequence log, the longest recent time from submission to answer, in seconds."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def observe(self, line: str, seconds: float) -> None:
        self._seconds[line] = max(seconds, self._seconds.get(line, 0.0) * _DECAY)

    def slow(self, line: str, wait_seconds: float) -> bool:
        """Whether it is likely to use much of a cycle's wait. One that has not answered yet is not."""
        return self._seconds.get(line, 0.0) > SLOW_SHARE * wait_seconds

    def worth_waiting(
        self, calls: Sequence[Call], line: Callable[[Call], str], tenant: Callable[[Call], str], wait_seconds: float
    ) -> list[Call]:
        """Those that a commit waits for: not a tenant's slow ones while another tenant's quick ones wait with them."""
        quick = {tenant(call) for call in calls if not self.slow(line(call), wait_seconds)}
        return [call for call in calls if not self.slow(line(call), wait_seconds) or not quick - {tenant(call)}]
