"""What this node holds of the cluster's partitions: its role in each follows the catalog and the lease.

One task a partition does one duty after another, so no two roles are ever had at once: it owns (and runs sessions),
stands by (and folds the changelog), hands over, or has no business with it. The store stays open from one duty to
the next: a promotion fences, folds the tail and goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import structlog

from node.ingest.topics import Topics, TopicSettings
from node.kernel.clock import Clock
from node.kernel.errors import (
    BoundExceeded,
    BrokerUnavailable,
    ChangelogCut,
    ClusterUnavailable,
    HeadraceError,
    LeaseLost,
    PeerRefused,
    PeerUnavailable,
    StateCorrupt,
    TopicMissing,
    TopicUnfit,
)
from node.kernel.limits import (
    BROKER_RETRY_MS_MAX,
    BROKER_RETRY_MS_MIN,
    LEASE_LOOK_MS,
    RELEASE_MS_MAX,
    STANDBY_UNKNOWN_FRAMES,
    STOP_MS_MAX,
    UNUSED_MS_MAX,
)
from node.kernel.ports import StateStore
from node.kernel.supervise import Supervisor
from node.kernel.types import ReplicaProgress
from node.partition import RECOVERABLE, Condition, Partition, Role
from node.session import ChangelogReader, PartitionSession, Recovered
from node.state.folder import StateFolder, StateFolders
from node.state.layout import Layout

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 15.0
"""How often the leader looks at the source topics for added partitions."""
_NOT_LOOKED_UP = (
    BoundExceeded,
    BrokerUnavailable,
    TopicMissing,
    TopicUnfit,
    ClusterUnavailable,
    PeerRefused,
    PeerUnavailable,
)
_TELL_SECONDS = 0.4
"""A release that could not be told is told again after this."""
_LEASE_LOST = (
    "this node has not heard from the quorum for its lease, or is no longer the owner; it goes on by itself once it "
    "is back, see the cluster's status"
)
_NOT_READY = "this node has just started and tries its models; it owns the partition once it has"
Guard = Callable[[], None]
OpenSession = Callable[[int, StateFolder, Guard, ChangelogReader | None], Awaitable[PartitionSession]]
"""Opens a session of a partition on its state; the guard is for its outbox. The reader, if there is one, is that of the
standby that is promoted, and takes the place of a new one."""


@dataclass(frozen=True, slots=True)
class Held:
    """What the catalog gives this node of one partition."""

    number: int
    owner: bool
    """Else standby."""
    epoch: int
    revision: int
    moving_to: str = ""
    """Of an owner: release it to that node."""


class Ownership(Protocol):
    """The cluster, as the replicas see it."""

    @property
    def leads(self) -> bool: ...

    def held(self) -> Mapping[int, Held]:
        """All that the newest catalog known here gives this node, by partition."""
        ...

    def may_own(self, partition: int, epoch: int) -> bool:
        """Whether this node owns it at that epoch and its lease holds now."""
        ...

    def lease_left_ms(self) -> float:
        """How long the catalog known here will surely be recent; 0 without a lease."""
        ...

    async def may_forget(self, partition: int) -> bool:
        """Whether enough others have what this node, no replica any more, has of it. Raises BrokerUnavailable,
        TopicMissing, StoreUnavailable."""
        ...

    def opened(self) -> None:
        """A partition has just been opened here, which the cluster may be waiting to hear."""
        ...

    async def released(self, partition: int, epoch: int, to: str, revision: int) -> None:
        """This owner has closed the partition, so the move may complete. Raises ClusterUnavailable, PeerUnavailable,
        BoundExceeded, or PeerRefused when the move is no more."""
        ...

    async def grow(self, count: int) -> None:
        """The source topics have so many partitions. Raises what `released` raises."""
        ...


class Standbys(Protocol):
    """What folds changelogs into the stores of standbys."""

    def expect(self, partition: int) -> None:
        """It will be added once its state is here; until `add` or `remove`."""
        ...

    def add(self, partition: int, store: StateStore, failed: Callable[[HeadraceError], None]) -> None: ...

    async def remove(self, partition: int) -> None: ...

    async def finish(self, partition: int) -> Recovered:
        """Fold all that is committed by now, and remove."""
        ...

    def progress(self, partition: int) -> ReplicaProgress | None: ...

    async def run(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Duty:
    """What to do with a partition now; a replica starts over when it is another one."""

    role: Literal["own", "release", "stand_by", "none"]
    epoch: int = 0
    revision: int = 0
    to: str = ""


NO_DUTY = Duty("none")
STAND_BY = Duty("stand_by")


def duty_of(held: Held | None, may_own: Callable[[int, int], bool]) -> Duty:
    """An owner without a lease stands by: another may have been made owner, and it folds what that one does."""
    if held is None:
        return NO_DUTY
    if not held.owner:
        return STAND_BY
    if held.moving_to:
        return Duty("release", held.epoch, held.revision, held.moving_to)
    return Duty("own", held.epoch) if may_own(held.number, held.epoch) else STAND_BY


def _never(partition: int, epoch: int) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What all replicas of a node share."""

    ownership: Ownership
    standbys: Standbys
    open_session: OpenSession
    commit_interval_seconds: float
    clock: Clock


class _Tail:
    """`ChangelogReader` of a partition that is stood by for: connected already, and nearly at the end."""

    def __init__(self, standbys: Standbys, partition: int) -> None:
        self._standbys = standbys
        self._partition = partition

    async def connect(self) -> None:
        """It is."""

    async def fold_into(self, store: StateStore) -> Recovered:
        return await self._standbys.finish(self._partition)

    async def close(self) -> None:
        await self._standbys.remove(self._partition)


class Replica:
    """One partition on this node. `assign` says what to do; `run` does it."""

    def __init__(self, number: int, state: StateFolder, around: Surroundings) -> None:
        self.number = number
        self.condition = Condition()
        self.held: Held | None = None
        self.duty = NO_DUTY
        self.released_revision = 0
        self._state = state
        self._around = around
        self._term: Partition | None = None
        self._changed = asyncio.Event()
        self._stopping = False
        self._layout: tuple[bytes | None, Layout] = (None, Layout.empty())
        self._opening_since = 0.0
        self._tail: ChangelogReader | None = None
        self._kept_offset: int | None = None
        """Of state that is on disk, closed and not wanted at present, where that is known."""

    def assign(self, held: Held | None, duty: Duty) -> None:
        self.held = held
        if duty != self.duty:
            self.duty = duty
            self._changed.set()

    def stop(self) -> None:
        """Ask for a clean end: an owner finishes and commits its cycle."""
        self._stopping = True
        self._changed.set()

    async def run(self) -> None:
        try:
            while not self._stopping:
                duty = self.duty
                self._changed.clear()
                if duty.role == "own":
                    await self._own(duty)
                    continue
                await self._drop_tail()
                if duty.role == "none":
                    await self._idle(duty)
                else:
                    await self._stand_by(duty)
        finally:
            await self._drop_tail()
            await self._state.close()
            self.condition.phase = "stopped"

    async def _drop_tail(self) -> None:
        """A promotion that was called off before it began."""
        if self._tail is not None:
            tail, self._tail = self._tail, None
            await tail.close()

    def _lasts(self, duty: Duty) -> bool:
        return self.duty == duty and not self._stopping

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self._changed.clear()

    # the owner

    async def _own(self, duty: Duty) -> None:
        self.released_revision = 0
        self._opening_since = self._around.clock.monotonic()
        self.condition.phase, self.condition.reason = "starting", ""
        term = self._term = self._new_term(duty.epoch, self._tail)
        self._tail = None
        work = asyncio.ensure_future(term.run())
        changed = asyncio.ensure_future(self._until_other(duty))
        try:
            await asyncio.wait({work, changed}, return_when=asyncio.FIRST_COMPLETED)
            if term.session is not None and (self._stopping or self.duty.role == "release"):
                term.stop()
                await asyncio.wait({work}, timeout=(STOP_MS_MAX if self._stopping else RELEASE_MS_MAX) / 1000)
        finally:
            changed.cancel()
            work.cancel()
            await asyncio.wait({work})
            await self._around.standbys.remove(self.number)
            self._term = None
        if not work.cancelled():
            work.result()  # what no session recovers from stops the node

    async def _until_other(self, duty: Duty) -> None:
        while self._lasts(duty):
            self._changed.clear()
            await self._changed.wait()

    def _new_term(self, epoch: int, tail: ChangelogReader | None) -> Partition:
        around = self._around

        def guard() -> None:
            if not around.ownership.may_own(self.number, epoch):
                raise LeaseLost(_LEASE_LOST)

        def open_session() -> Awaitable[PartitionSession]:
            nonlocal tail
            reader, tail = tail, None
            return around.open_session(self.number, self._state, guard, reader)

        return Partition(
            self.number,
            open_session,
            self._state,
            around.commit_interval_seconds,
            around.clock,
            guard,
            self.condition,
            BROKER_RETRY_MS_MIN,
            opened=around.ownership.opened,
        )

    # the standby

    async def _stand_by(self, duty: Duty) -> None:
        """Fold until there is another duty. An owner that releases the partition says so first."""
        telling = asyncio.ensure_future(self._tell_released(duty)) if duty.role == "release" else None
        wait_ms: float = BROKER_RETRY_MS_MIN
        try:
            while self._lasts(duty):
                try:
                    await self._fold(duty)
                except RECOVERABLE as failure:
                    if self.condition.phase == "running":
                        wait_ms = BROKER_RETRY_MS_MIN
                    self.condition.failed(failure, self.number)
                    await self._mend(failure)
                    if self._lasts(duty):
                        await self._pause(wait_ms / 1000)
                    wait_ms = min(wait_ms * 2, BROKER_RETRY_MS_MAX)
        finally:
            if telling is not None:
                telling.cancel()
                await asyncio.wait({telling})

    async def _fold(self, duty: Duty) -> None:
        """Raises what the store, the changelog or restoring a snapshot raises."""
        store = None
        self._around.standbys.expect(self.number)
        try:
            store = await self._opened(duty)
        finally:
            if store is None:
                await self._around.standbys.remove(self.number)
        if store is None:
            return
        failed: asyncio.Future[HeadraceError] = asyncio.get_running_loop().create_future()

        def fail(failure: HeadraceError) -> None:
            if not failed.done():
                failed.set_result(failure)

        changed = asyncio.ensure_future(self._until_other(duty))
        self._around.standbys.add(self.number, store, fail)
        self._tell_standing_by(duty)
        promoted = False
        try:
            waits: set[asyncio.Future[Any]] = {failed, changed}
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            promoted = not failed.done() and self.duty.role == "own" and not self._stopping
        finally:
            changed.cancel()
            if not promoted:
                await self._around.standbys.remove(self.number)
        if failed.done():
            raise failed.result()
        if promoted:
            self._tail = _Tail(self._around.standbys, self.number)

    async def _opened(self, duty: Duty) -> StateStore | None:
        """The store; None when there is another duty first, since a restore may take minutes. It is taken up again."""
        opening = asyncio.ensure_future(self._state.open())
        changed = asyncio.ensure_future(self._until_other(duty))
        try:
            await asyncio.wait({opening, changed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            opening.cancel()
            await asyncio.wait({opening})
        return None if opening.cancelled() else opening.result()

    def _tell_standing_by(self, duty: Duty) -> None:
        condition = self.condition
        if duty.role == "release":
            condition.phase, condition.reason = "waiting", f"it moves to {duty.to}"
        elif self.role == "owner":
            leased = self._around.ownership.may_own(self.number, self.epoch)
            condition.phase, condition.reason = "waiting", _NOT_READY if leased else _LEASE_LOST
        else:
            condition.phase, condition.reason = "running", ""

    async def _mend(self, failure: Exception) -> None:
        """What a failure asks for before the next attempt; whatever it was, the store is opened again."""
        if isinstance(failure, StateCorrupt):
            await self._state.set_aside()
            return
        await self._state.close()
        if isinstance(failure, ChangelogCut):
            try:
                restored = await self._state.restore()
            except RECOVERABLE as refused:
                self.condition.failed(refused, self.number)
            else:
                log.info("changelog cut", partition=self.number, restored=restored)

    async def _tell_released(self, duty: Duty) -> None:
        self.released_revision = duty.revision
        while True:
            try:
                await self._around.ownership.released(self.number, duty.epoch, duty.to, duty.revision)
                return
            except PeerRefused as refused:
                log.info("move is no more", partition=self.number, to=duty.to, reason=str(refused))
                return
            except (BoundExceeded, ClusterUnavailable, PeerUnavailable) as failure:
                log.debug("release not told", partition=self.number, reason=str(failure))
                await asyncio.sleep(_TELL_SECONDS)

    # neither

    async def _idle(self, duty: Duty) -> None:
        """Keep the state for a while: it may be wanted back. It is deleted on a recent catalog's word only, and not
        while the changelog is cut behind what too few others have."""
        if self._state.store is not None:
            self._kept_offset = self._state.store.changelog_offset()
        await self._state.close()
        clock, ownership = self._around.clock, self._around.ownership
        since = clock.monotonic()
        self.condition.phase, self.condition.reason = "stopped", ""
        while self._lasts(duty):
            if clock.monotonic() - since > UNUSED_MS_MAX / 1000 and ownership.lease_left_ms() > 0:
                if await self._may_forget() and self._lasts(duty):
                    self._kept_offset = None
                    await self._state.delete()
                    await self._until_other(duty)
                    return
                since = clock.monotonic()  # asked again only after as long
            await self._pause(_LOOK_SECONDS)

    async def _may_forget(self) -> bool:
        try:
            return not self._state.exists or await self._around.ownership.may_forget(self.number)
        except RECOVERABLE as failure:
            log.info("unused state kept", partition=self.number, reason=str(failure))
            return False

    # what others see

    @property
    def role(self) -> Role:
        """What this node is by the catalog, whatever it may do at present."""
        if self.held is None:
            return "none"
        return "owner" if self.held.owner else "standby"

    @property
    def epoch(self) -> int:
        return 0 if self.held is None else self.held.epoch

    @property
    def session(self) -> PartitionSession | None:
        return None if self._term is None else self._term.session

    @property
    def store(self) -> StateStore | None:
        """While it is open; as of the end of a frame whenever the loop is not in the store itself."""
        return self._state.store

    def readable(self) -> tuple[StateStore, Layout] | None:
        """What customers can be read from, None while nothing is open."""
        found = None if self._term is None else self._term.readable()
        store = self._state.store
        if found is not None or store is None:
            return found
        encoded = store.layout()
        if encoded != self._layout[0]:
            self._layout = (encoded, Layout.empty() if encoded is None else Layout.decode(encoded))
        return store, self._layout[1]

    def progress(self) -> ReplicaProgress | None:
        """None while there is nothing on disk that could be told of.

        An owner that has not opened the partition yet lags by the time since it began to. State that is kept though
        this node is neither owner nor standby counts as far behind: it is still better than none.
        """
        store, term = self._state.store, self._term
        if term is not None:
            opening_ms = int((self._around.clock.monotonic() - self._opening_since) * 1000)
            return term.progress() or ReplicaProgress(store.changelog_offset() if store else 0, 0, opening_ms)
        found = self._around.standbys.progress(self.number)
        if found is None:
            if self.duty.role != "none" or self._kept_offset is None:
                return None
            return ReplicaProgress(self._kept_offset, STANDBY_UNKNOWN_FRAMES, UNUSED_MS_MAX)
        return ReplicaProgress(
            found.offset, found.frames_behind, found.ms_behind, released_revision=self.released_revision
        )


class Replicas:
    """All partitions of a clustered node. `update` is to be called when the catalog or the lease has changed.

    Until `own` is called it stands by for what it should own: state is fetched and folded while models are tried.
    """

    def __init__(
        self,
        around: Surroundings,
        folders: StateFolders,
        topics: Topics,
        sources: Sequence[str],
        outputs: Mapping[str, TopicSettings],
        supervisor: Supervisor,
    ) -> None:
        self._around = around
        self._folders = folders
        self._topics = topics
        self._sources = tuple(sources)
        self._outputs = outputs
        self._supervisor = supervisor
        self._stopping = asyncio.Event()
        self._look_now = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._all: dict[int, Replica] = {}
        self._led = False
        self._owns = False
        self.reason = "source topics have not been looked up yet"
        """Why partitions could not be looked up, '' if they were or another node leads."""

    @property
    def running(self) -> Mapping[int, Replica]:
        """Those this node owns or stands by for."""
        return {number: replica for number, replica in self._all.items() if replica.role != "none"}

    async def run(self) -> None:
        """Start, and keep roles in step with the lease, until stopped."""
        self._supervisor.start("standbys", self._around.standbys.run())
        self._supervisor.start("partitions looked up", self._look_up())
        for number in self._folders.found():
            self._replica(number)
        while not self._stopping.is_set():
            self.update()
            wait_ms = max(self._around.ownership.lease_left_ms(), LEASE_LOOK_MS)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_ms / 1000):
                    await self._stopping.wait()

    def own(self) -> None:
        """From now on sessions can be opened: the node's models are ready for events."""
        self._owns = True
        self.update()

    def update(self) -> None:
        """Give every replica its duty."""
        if self._stopping.is_set():
            return
        ownership = self._around.ownership
        held = ownership.held()
        for number in [*held, *(number for number in self._all if number not in held)]:
            mine = held.get(number)
            self._replica(number).assign(mine, duty_of(mine, ownership.may_own if self._owns else _never))
        if ownership.leads and not self._led:
            self._look_now.set()
        self._led = ownership.leads

    def _replica(self, number: int) -> Replica:
        replica = self._all.get(number)
        if replica is None:
            replica = self._all[number] = Replica(number, self._folders.of(number), self._around)
            self._tasks.append(self._supervisor.start(f"partition {number}", replica.run()))
        return replica

    # partitions of the source topics

    async def _look_up(self) -> None:
        """While this node leads, it makes the topics and says how many partitions there are."""
        wait_ms: float = BROKER_RETRY_MS_MIN
        while not self._stopping.is_set():
            try:
                if self._around.ownership.leads:
                    await self._look()
                    self.reason = ""
                wait_ms = BROKER_RETRY_MS_MIN
                pause = _LOOK_SECONDS
            except _NOT_LOOKED_UP as failure:
                reason = f"{type(failure).__name__}: {failure}"
                if reason != self.reason:
                    log.warning("topics not ready", reason=reason)
                self.reason, pause = reason, wait_ms / 1000
                wait_ms = min(wait_ms * 2, BROKER_RETRY_MS_MAX)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._look_now.wait()
            self._look_now.clear()

    async def _look(self) -> None:
        count = await self._topics.source_partitions(self._sources)
        await self._topics.ensure(count, self._outputs)
        await self._around.ownership.grow(count)

    # what others see

    def unready(self) -> list[str]:
        """Why this node can't do all its work now, a line each: its own partitions that do not run."""
        reasons = [] if self._owns else ["models are being tried; nothing is owned until that is done"]
        reasons += [self.reason] if self.reason and self._led else []
        for number, replica in sorted(self._all.items()):
            condition = replica.condition
            if replica.role == "owner" and replica.duty.role != "release" and condition.phase != "running":
                reasons.append(f"partition {number} is {condition.phase}: {condition.reason or 'recovering'}")
        return reasons

    def progress(self) -> Mapping[int, ReplicaProgress]:
        """What the leader is to be told."""
        told = {number: replica.progress() for number, replica in self._all.items()}
        return {number: progress for number, progress in told.items() if progress is not None}

    def stores(self) -> Mapping[int, StateStore]:
        """The stores that are open now, for snapshots; each may be closed at any await."""
        open_now = {number: replica.store for number, replica in self._all.items()}
        return {number: store for number, store in open_now.items() if store is not None}

    async def stop(self) -> None:
        """Let every owned partition finish and commit its cycle, for at most STOP_MS_MAX."""
        self._stopping.set()
        self._look_now.set()
        for replica in self._all.values():
            replica.stop()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=STOP_MS_MAX / 1000)
            if late:
                log.warning("partitions did not stop in time", late=len(late))
