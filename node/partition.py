"""One owned partition from opening to closing: recovery, cycles, and what to do when something fails.

There is one way back from every failure: close everything, wait, open again from what was committed. So
recovery is the code that also runs at every start, and is exercised all the time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import structlog

from node.kernel.clock import Clock
from node.kernel.errors import (
    BoundExceeded,
    BrokerUnavailable,
    Fenced,
    FrameCorrupt,
    ProgressLost,
    StateCorrupt,
    StoreUnavailable,
    TopicMissing,
)
from node.kernel.limits import BROKER_RETRY_MS_MAX, BROKER_RETRY_MS_MIN, FENCED_RETRY_MS
from node.session import PartitionSession

log = structlog.get_logger(__name__)

Phase = Literal["starting", "running", "waiting", "stopped"]
_RECOVERABLE = (
    BoundExceeded,
    BrokerUnavailable,
    Fenced,
    FrameCorrupt,
    ProgressLost,
    StateCorrupt,
    StoreUnavailable,
    TopicMissing,
)


@dataclass(slots=True)
class Condition:
    phase: Phase = "starting"
    reason: str = ""
    """Why it waits, in words for the operator; '' while it runs."""
    failures: int = 0


class Partition:
    """Runs one partition's sessions until told to stop."""

    def __init__(
        self,
        number: int,
        open_session: Callable[[], Awaitable[PartitionSession]],
        set_damaged_aside: Callable[[], None],
        commit_interval_seconds: float,
        clock: Clock,
    ) -> None:
        self.number = number
        self.condition = Condition()
        self.session: PartitionSession | None = None
        """While it is open."""
        self._open_session = open_session
        self._set_damaged_aside = set_damaged_aside
        self._interval = commit_interval_seconds
        self._clock = clock
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ask for a clean end: the cycle in progress is finished and committed."""
        self._stopping.set()

    async def run(self) -> None:
        wait_ms = BROKER_RETRY_MS_MIN
        while not self._stopping.is_set():
            try:
                await self._run_session()
            except _RECOVERABLE as failure:
                if self.condition.phase == "running":
                    wait_ms = BROKER_RETRY_MS_MIN
                self._fail(failure)
                await self._pause((FENCED_RETRY_MS if isinstance(failure, Fenced) else wait_ms) / 1000)
                wait_ms = min(wait_ms * 2, BROKER_RETRY_MS_MAX)
        self.condition.phase = "stopped"

    async def _run_session(self) -> None:
        session = await self._open_session()
        try:
            self.session = session
            while not self._stopping.is_set():
                started = self._clock.monotonic()
                more = await session.cycle()
                if session.proven:
                    self.condition.phase, self.condition.reason = "running", ""
                if not more:
                    await self._pause(started + self._interval - self._clock.monotonic())
            await session.finish()
        finally:
            self.session = None
            await session.close()

    def _fail(self, failure: Exception) -> None:
        self.condition.failures += 1
        reason = f"{type(failure).__name__}: {failure}"
        if reason != self.condition.reason:
            log.warning("partition waits", partition=self.number, reason=reason)
        self.condition.phase, self.condition.reason = "waiting", reason
        if isinstance(failure, StateCorrupt):
            self._set_damaged_aside()

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._stopping.wait()
