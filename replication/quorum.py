"""(P) When this node last had proof of contact with a quorum, on its own monotonic clock.

Heartbeats and their answers carry stamps. A stamp is a time on the sender's clock; the other side echoes the last one
it got. So a proof dates from when the question was *sent*: a process that was paused and finds old answers waiting
in its sockets learns nothing new from them.

A leader has proof as of t when a majority answered, in the leader's term, heartbeats sent at t or later. A follower
has proof as of s - a when the leader echoes the follower's stamp s and its own proof is a milliseconds old.

What a lease may build on: if a follower's proof is of time t, the leader heard from it at t or later (`heard_ms` at
the leader). And a leader elected later was elected after t, because its voters include one that answered at t or later.
So a new leader that waits one lease after its election, and one lease after it last heard from a node, finds that
node's lease ended. Clocks need equal rates, not equal times.
"""

from __future__ import annotations

import math
from collections.abc import Collection

NEVER = -math.inf


class QuorumContact:
    """Times are in milliseconds; peers are named by address."""

    def __init__(self) -> None:
        self.last_quorum_ms = NEVER
        self.heard_ms: dict[str, float] = {}
        self._term = -1
        self._answered_ms: dict[str, float] = {}
        self._stamps: dict[str, float] = {}

    def stamp_from(self, peer: str) -> float | None:
        """The last stamp this peer sent, to be echoed to it."""
        return self._stamps.get(peer)

    def quorum_age_ms(self, now_ms: float) -> float | None:
        """How old the proof is; None when there is none."""
        return None if self.last_quorum_ms == NEVER else now_ms - self.last_quorum_ms

    def follower_heard(self, leader: str, stamp_ms: float, echo_ms: float | None, age_ms: float | None) -> None:
        """A heartbeat of the current term's leader has come."""
        self._stamps[leader] = stamp_ms
        if echo_ms is not None and age_ms is not None:
            self.last_quorum_ms = max(self.last_quorum_ms, echo_ms - age_ms)

    def leader_heard(self, peer: str, term: int, stamp_ms: float, echo_ms: float | None, now_ms: float) -> None:
        """A peer answered a heartbeat in the current term, in which this node leads."""
        self.begin(term)
        self._stamps[peer] = stamp_ms
        self.heard_ms[peer] = now_ms
        if echo_ms is not None:
            self._answered_ms[peer] = max(self._answered_ms.get(peer, NEVER), echo_ms)

    def begin(self, term: int) -> None:
        """What was answered in an earlier term proves nothing for this one."""
        if term != self._term:
            self._term = term
            self._answered_ms, self.heard_ms = {}, {}

    def settle(self, peers: Collection[str], now_ms: float) -> None:
        """Count the leader's proof anew; `peers` are the other members."""
        answered = sorted((self._answered_ms.get(peer, NEVER) for peer in peers), reverse=True)
        needed = (len(peers) + 1) // 2
        proof = now_ms if needed == 0 else answered[needed - 1]
        self.last_quorum_ms = max(self.last_quorum_ms, proof)
