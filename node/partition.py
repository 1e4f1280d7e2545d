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
    ClusterUnavailable,
    Fenced,
    FrameCorrupt,
    LeaseLost,
    PeerRefused,
    PeerUnavailable,
    ProgressLost,
    StateCorrupt,
    StoreUnavailable,
    TableUnavailable,
    TopicMissing,
)
from node.kernel.limits import BROKER_RETRY_MS_MAX, BROKER_RETRY_MS_MIN, FENCED_RETRY_MS
from node.kernel.ports import StateStore
from node.kernel.types import ReplicaProgress
from node.session import PartitionSession
from node.state.folder import StateFolder
from node.state.layout import Layout

log = structlog.get_logger(__name__)

Phase = Literal["starting", "running", "waiting", "stopped"]
Role = Literal["owner", "standby", "none"]
RECOVERABLE = (
    BoundExceeded,
    BrokerUnavailable,
    ClusterUnavailable,
    Fenced,
    FrameCorrupt,
    LeaseLost,
    PeerRefused,
    PeerUnavailable,
    ProgressLost,
    StateCorrupt,
    StoreUnavailable,
    TableUnavailable,
    TopicMissing,
)
_STORE_IS_SOUND = (BrokerUnavailable, Fenced, LeaseLost, TableUnavailable, TopicMissing)
"""Failures after which a store that was kept open holds committed frames only, and goes on being used."""


@dataclass(slots=True)
class Condition:
    phase: Phase = "starting"
    reason: str = ""
    """Why it waits, in words for the operator; '' while it runs."""
    failures: int = 0

    def failed(self, failure: Exception, partition: int) -> None:
        """Wait for that reason; it is logged once."""
        self.failures += 1
        reason = f"{type(failure).__name__}: {failure}"
        if reason != self.reason:
            log.warning("partition waits", partition=partition, reason=reason)
        self.phase, self.reason = "waiting", reason


def unguarded() -> None:
    """The guard of a node that is alone: its partitions are always its own."""


class Partition:
    """Runs one partition's sessions until told to stop.

    `guard` raises LeaseLost while this node may not own the partition; no session is opened then. A failure of the
    store closes it in `state`, so that the next session opens it again.
    """

    role: Role = "owner"

    def __init__(
        self,
        number: int,
        open_session: Callable[[], Awaitable[PartitionSession]],
        state: StateFolder,
        commit_interval_seconds: float,
        clock: Clock,
        guard: Callable[[], None] = unguarded,
        condition: Condition | None = None,
        fenced_retry_ms: int = FENCED_RETRY_MS,
        epoch: int = 0,
        opened: Callable[[], None] = lambda: None,
    ) -> None:
        """`opened` hears of each session."""
        self.number = number
        self.epoch = epoch
        self.condition = condition or Condition()
        self.session: PartitionSession | None = None
        """While it is open."""
        self._open_session = open_session
        self._state = state
        self._interval = commit_interval_seconds
        self._clock = clock
        self._guard = guard
        self._opened = opened
        self._fenced_retry_ms = fenced_retry_ms
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ask for a clean end: the cycle in progress is finished and committed."""
        self._stopping.set()

    async def run(self) -> None:
        """May also be cancelled: a commit in progress is given up then, its outcome is in the changelog."""
        wait_ms = BROKER_RETRY_MS_MIN
        while not self._stopping.is_set():
            try:
                await self._run_session()
            except RECOVERABLE as failure:
                if self.condition.phase == "running":
                    wait_ms = BROKER_RETRY_MS_MIN
                await self._fail(failure)
                await self._pause((self._fenced_retry_ms if isinstance(failure, Fenced) else wait_ms) / 1000)
                wait_ms = min(wait_ms * 2, BROKER_RETRY_MS_MAX)
        self.condition.phase = "stopped"

    async def _run_session(self) -> None:
        self._guard()
        session = await self._open_session()
        try:
            self.session = session
            self._opened()
            while not self._stopping.is_set():
                started = self._clock.monotonic()
                more = await session.cycle()
                if session.proven:
                    self.condition.phase, self.condition.reason = "running", ""
                if not more:  # events taken before the commit has ended would only wait for it, and for few of them
                    await session.finish()
                    await self._pause(started + self._interval - self._clock.monotonic())
            await session.finish()
        finally:
            self.session = None
            await asyncio.shield(session.close())

    async def _fail(self, failure: Exception) -> None:
        self.condition.failed(failure, self.number)
        if isinstance(failure, StateCorrupt):
            await self._state.set_aside()
        elif not isinstance(failure, _STORE_IS_SOUND):
            await self._state.close()

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._stopping.wait()

    def readable(self) -> tuple[StateStore, Layout] | None:
        """What customers can be read from, None while it is closed."""
        return None if self.session is None else (self.session.store, self.session.state.layout)

    def progress(self) -> ReplicaProgress | None:
        """None while it is closed."""
        return None if self.session is None else ReplicaProgress(self.session.store.changelog_offset(), 0, 0, True)
