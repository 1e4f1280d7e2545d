"""(P) The lease of this node: which renewal it proposed when, and until when the one that came back holds.

`replication.ownership` says what follows from it and why two owners never overlap.
"""

from __future__ import annotations

from typing import Final

from node.kernel.limits import CLUSTER_RENEWALS_MAX
from replication.ownership import may_own

NUMBERS_A_PROCESS: Final = 2**32
"""Each process of a node starts its numbers at least so far after those of the one before."""


def same_process(one: int, other: int) -> bool:
    """Whether two numbers of a node are of one process."""
    return abs(one - other) < NUMBERS_A_PROCESS // 2


class Lease:
    """Times are seconds of this node's monotonic clock, which goes on while the process is stopped."""

    def __init__(self, first: int) -> None:
        """`first` is higher than every number that this incarnation of the node has used before."""
        self._next = first
        self._proposed_s: dict[int, float] = {}

    def next_number(self) -> int:
        """A number higher than all before; renewals and reports share them."""
        self._next += 1
        return self._next - 1

    def renew(self, now_s: float) -> int:
        """The number of a renewal that is proposed now, not earlier."""
        if len(self._proposed_s) >= CLUSTER_RENEWALS_MAX:
            del self._proposed_s[min(self._proposed_s)]
        number = self.next_number()
        self._proposed_s[number] = now_s
        return number

    def came_back(self, number: int) -> None:
        """Forget the renewals before this one."""
        self._proposed_s = {other: at_s for other, at_s in self._proposed_s.items() if other >= number}

    def left_ms(self, number: int | None, now_s: float, lease_ms: int) -> float:
        """How long the lease still holds by the renewal that came back last; 0 when it is over."""
        proposed_s = self._proposed_s.get(number) if number is not None else None
        if proposed_s is None or not may_own(now_s * 1000, proposed_s * 1000, lease_ms):
            return 0.0
        return lease_ms - (now_s - proposed_s) * 1000
