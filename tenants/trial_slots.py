"""Who may try a model now: a bounded number of slots, shared fairly among tenants.

A tenant has one slot at most, and the one that has used least of them goes first. A trial may run for as long as it
needs while nobody else waits; otherwise it has to give its slot back after its turn, and runs again from its start, in
a turn twice as long, once it is first again. One slot is never used for such longer turns. So files that load for
ever hold up nobody's model for more than a turn, and one that is really slow is tried after all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from node.kernel.clock import Clock

_Done = TypeVar("_Done")


@dataclass(slots=True, eq=False)
class _Waiting:
    tenant: str
    longer: bool
    """Not its first turn."""
    free: asyncio.Future[None]


class TrialSlots:
    """`slots` trials at once, two at least; `turn_seconds`: of a trial's first turn."""

    def __init__(self, slots: int, turn_seconds: float, clock: Clock) -> None:
        self._slots = slots
        self._turn_seconds = turn_seconds
        self._clock = clock
        self._running: dict[str, bool] = {}
        """Tenants that have a slot, and whether for a longer turn."""
        self._waiting: list[_Waiting] = []
        self._used: dict[str, float] = {}
        """Seconds, since a slot was free last: then nothing is left to be fair about."""
        self._wanted = asyncio.Event()

    async def run(self, tenant: str, trial: Callable[[], Awaitable[_Done]]) -> _Done:
        """What the trial gives or raises, once it has had a slot for long enough."""
        turn_seconds = self._turn_seconds
        while True:
            await self._enter(tenant, longer=turn_seconds > self._turn_seconds)
            entered = self._clock.monotonic()
            attempt = asyncio.ensure_future(trial())
            try:
                await self._turn(attempt, turn_seconds)
            finally:
                unfinished = not attempt.done()
                attempt.cancel()
                try:
                    await asyncio.wait([attempt])  # its worker must have gone before another's comes
                finally:  # also where a newer pair takes its place meanwhile
                    self._leave(tenant, self._clock.monotonic() - entered)
            if not unfinished:
                return attempt.result()
            turn_seconds *= 2

    async def _turn(self, attempt: asyncio.Future[Any], turn_seconds: float) -> None:
        """Until the attempt is done, or its turn is over and somebody else could use the slot."""
        await asyncio.wait([attempt], timeout=turn_seconds)
        while not attempt.done() and self._next() is None:
            self._wanted.clear()
            wanted = asyncio.ensure_future(self._wanted.wait())
            try:
                await asyncio.wait([attempt, wanted], return_when=asyncio.FIRST_COMPLETED)
            finally:
                wanted.cancel()

    async def _enter(self, tenant: str, longer: bool) -> None:
        waiting = _Waiting(tenant, longer, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._admit()
        try:
            await waiting.free
        except asyncio.CancelledError:
            if waiting.free.done() and not waiting.free.cancelled():
                self._leave(tenant, 0.0)
            else:
                self._waiting.remove(waiting)
            raise

    def _leave(self, tenant: str, seconds: float) -> None:
        del self._running[tenant]
        self._used[tenant] = self._used.get(tenant, 0.0) + seconds
        self._admit()

    def _next(self) -> _Waiting | None:
        """Whose turn it is of those who could begin if there were a slot; among equals, who came first."""
        longer = sum(self._running.values()) < self._slots - 1
        could = [one for one in self._waiting if one.tenant not in self._running and (longer or not one.longer)]
        return min(could, key=lambda one: self._used.get(one.tenant, 0.0), default=None)

    def _admit(self) -> None:
        while len(self._running) < self._slots and (first := self._next()) is not None:
            self._waiting.remove(first)
            self._running[first.tenant] = first.longer
            first.free.set_result(None)
        if len(self._running) < self._slots and not self._waiting:
            self._used.clear()
        elif self._waiting:
            self._wanted.set()
