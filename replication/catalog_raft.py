"""A state machine replicated by Raft: the catalog's shell.

Raft (`raft_replica`) runs on a thread of its own, so that a busy event loop does not cost the node its place in the
cluster. The state machine is called on that thread only. What other threads read of it must be one immutable value that
`apply` and `restore` put in place by one assignment; it is in place before `changed` is called, and that is called
before `propose` or `read_barrier` return.

Raft here decides who and what. A command may be applied twice when its outcome was unknown and it was proposed again,
so commands are idempotent. On a port without a secret whoever reaches it runs code as this process (the wire format is
pickle), therefore the secret is mandatory unless every address is loopback. With it each message is encrypted and
authenticated before it is unpickled. The port still belongs on a private network.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from node.kernel import limits
from node.kernel.clock import Clock, SystemClock
from node.kernel.errors import BoundExceeded, CatalogCorrupt, ClusterUnavailable, ConfigError, HeadraceError
from replication.raft_journal import RaftFolder
from replication.raft_replica import DENIED, NOT_APPLIED, SUCCESS, Answer, Replica
from replication.raft_types import (
    CommandRate,
    RaftSettings,
    RaftStatistics,
    RaftStatus,
    StateMachine,
    address_problems,
    secret_problems,
)

log = structlog.get_logger(__name__)

_RETRY_S = 0.02
_ATTEMPT_S = 1.0
_STEP_DOWN_S_MAX = 0.5


class CatalogRaft:
    """One node's copy of the replicated state machine; every method is called on the event loop.

    `changed` is called on the loop after commands were applied, and after the leader, the members or readiness changed;
    several changes may come as one call.
    """

    def __init__(
        self,
        settings: RaftSettings,
        machine: StateMachine,
        changed: Callable[[], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        settings.check()
        self.settings = settings
        self._machine = machine
        self._changed = changed
        self._clock = clock or SystemClock()
        self._replica: Replica | None = None
        self._status = RaftStatus()
        self._state: object = None
        self._stopping = threading.Event()
        self._calls: deque[Callable[[Replica], None]] = deque()
        self._answers: deque[Callable[[], None]] = deque()
        self._told = threading.Event()
        self._turn = asyncio.Event()
        self._waiting = 0
        self._rate = CommandRate(settings.commands_per_second_max, self._clock.monotonic())
        self._proposals = self._retried = self._failed = self._ticks_failed = self._ticks_failed_in_row = 0
        self._ended: asyncio.Future[None] | None = None
        self.closed = False
        """Others may see from now on that this node no longer takes part. Set on the Raft thread."""

    # --- life

    async def start(self) -> None:
        """Bind the port, read the folder, take part. There may be no leader yet: see `wait_ready`.

        Raises ConfigError, CatalogCorrupt, StoreUnavailable.
        """
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._ended = self._loop.create_future()
        self._ended.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        threading.Thread(target=self._work, name="raft", daemon=True).start()
        try:
            async with asyncio.timeout(limits.CLUSTER_START_MS_MAX / 1000):
                await self._started
        except TimeoutError:
            self._stopping.set()
            raise self._unavailable(f"its log was not read in {limits.CLUSTER_START_MS_MAX} ms") from None

    async def stop(self) -> None:
        """Hand leadership on when this node has it, and leave the port and the folder."""
        self._stopping.set()
        if self._ended is None:
            return
        if self._replica is not None and not self._ended.done():
            self._replica.wake()
        with contextlib.suppress(HeadraceError, TimeoutError):
            async with asyncio.timeout(limits.CLUSTER_STOP_MS_MAX / 1000):
                await asyncio.shield(self._ended)

    async def watch(self) -> None:
        """Return when the node was stopped; raise what ended the Raft thread otherwise. For a Supervisor."""
        if self._ended is not None:
            await asyncio.shield(self._ended)

    async def wait_ready(self, wait_seconds_max: float) -> None:
        """Wait for a leader whose state is here. Raises ClusterUnavailable."""
        try:
            async with asyncio.timeout(wait_seconds_max):
                while not self.ready:
                    await self._change(wait_seconds_max)
        except TimeoutError:
            raise self._unavailable(f"no leader was found and caught up with in {wait_seconds_max} s") from None

    # --- what is known

    @property
    def status(self) -> RaftStatus:
        return self._status

    @property
    def leader(self) -> str | None:
        return self._status.leader

    @property
    def is_leader(self) -> bool:
        """Whether this node takes itself for the leader; another may have been elected already."""
        return self._status.is_leader

    @property
    def ready(self) -> bool:
        return self._status.ready

    @property
    def members(self) -> Mapping[str, str]:
        """Name -> address."""
        return self._status.members

    @property
    def index(self) -> int:
        return self._status.index

    def statistics(self) -> RaftStatistics:
        status, replica = self._status, self._replica
        return RaftStatistics(
            name=self.settings.name,
            leader=status.leader,
            members=status.members,
            ready=status.ready,
            term=status.term,
            index=status.index,
            commit_index=status.commit_index,
            log_entries=0 if replica is None else len(replica.log()),
            log_bytes=0 if replica is None else replica.folder.journal.bytes,
            compactions=0 if replica is None else replica.compactions,
            compactions_failed=0 if replica is None else replica.compactions_failed,
            proposals=self._proposals,
            proposals_retried=self._retried,
            proposals_failed=self._failed,
            ticks_failed=self._ticks_failed,
            strangers_refused=0 if replica is None else replica.strangers_refused,
        )

    # --- commands

    async def propose(self, command: bytes, wait_seconds_max: float) -> str:
        """Replicate an idempotent command; what the state machine here answered to it.

        Asks again while the outcome is unknown. Raises ClusterUnavailable when the time is up (the command may still be
        applied), BoundExceeded for one too large, too many at once or too many a second.
        """
        if len(command) > self.settings.command_bytes_max:
            raise BoundExceeded(
                f"a catalog command of {len(command)} bytes is over {self.settings.command_bytes_max}; make it smaller"
            )
        return await self._replicate(command, wait_seconds_max)

    def offer(self, command: bytes, at_once: bool = False) -> None:
        """Replicate a command if there is a leader, and wait for nothing: it may be lost, or applied late.

        It goes with the leader's next heartbeat, which costs no message of its own, or at once. Raises
        ClusterUnavailable before the start and after the end, BoundExceeded.
        """
        replica = self._running()
        self._rate.take(self._clock.monotonic())
        replica.run(command, callback=_ignored if at_once else None)
        replica.wake()

    async def read_barrier(self, wait_seconds_max: float = 5.0) -> None:
        """Return once all that was committed anywhere before this call is applied here: replicates a no-op.

        Raises ClusterUnavailable, BoundExceeded.
        """
        await self._replicate(None, wait_seconds_max)

    async def _replicate(self, command: bytes | None, wait_seconds_max: float) -> str:
        replica = self._running()
        self._admit()
        self._waiting += 1
        self._proposals += 1
        try:
            return str(await self._insist(functools.partial(replica.run, command), wait_seconds_max))
        finally:
            self._waiting -= 1

    def _admit(self) -> None:
        if self._waiting >= limits.CLUSTER_PROPOSALS_MAX:
            raise BoundExceeded(
                f"{limits.CLUSTER_PROPOSALS_MAX} catalog commands wait for their outcome on this node; ask again later"
            )
        self._rate.take(self._clock.monotonic())

    def _running(self) -> Replica:
        if self._ended is not None and self._ended.done():
            self._ended.result()
            raise self._unavailable("this node's catalog has been stopped")
        if self._replica is None or self._ended is None:
            raise self._unavailable("this node's catalog has not started")
        return self._replica

    async def _insist(self, ask: Callable[..., None], wait_seconds_max: float, until: Any = None) -> Any:
        """Ask until it succeeded, or until `until` (a condition) holds. Raises ClusterUnavailable when time is up."""
        deadline_s = self._clock.monotonic() + wait_seconds_max
        unknown = False
        while (left_s := deadline_s - self._clock.monotonic()) > 0:
            result, reason = await self._attempt(ask, min(left_s, _ATTEMPT_S))
            if reason == SUCCESS or (until is not None and until()):
                return result
            unknown |= reason not in NOT_APPLIED
            self._retried += 1
            self._running()
            await self._change(_RETRY_S)
        self._failed += 1
        fate = "it may or may not be applied later" if unknown else "it was not applied"
        raise self._unavailable(f"no quorum took the command in {wait_seconds_max} s, and {fate}")

    async def _attempt(self, ask: Callable[..., None], wait_s: float) -> tuple[Any, int | None]:
        """One try: its result and the reason, None when nothing came back in time."""
        answer: asyncio.Future[tuple[Any, int]] = self._loop.create_future()

        def settle(result: Any, reason: int) -> None:
            if not answer.done():
                answer.set_result((result, reason))

        ask(callback=lambda result, reason: self._answers.append(functools.partial(settle, result, reason)))
        self._running().wake()
        try:
            async with asyncio.timeout(wait_s):
                return await answer
        except TimeoutError:
            return None, None

    def _unavailable(self, what: str) -> ClusterUnavailable:
        status = self._status
        return ClusterUnavailable(
            f"{what}. Node {self.settings.name} sees "
            f"{'no leader' if status.leader is None else f'{status.leader} as leader'} among the members "
            f"{', '.join(sorted(status.members)) or 'configured'}. Start the missing nodes or mend the network, then "
            "ask again; if this node was removed from the cluster, join it again"
        )

    async def _change(self, wait_s: float) -> None:
        """Wait for the next change, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._turn.wait()

    # --- members

    async def join(self, name: str, address: str, wait_seconds_max: float = 10.0) -> None:
        """Make a node a member; start it after that, with all members as its peers.

        Raises ConfigError for a name or address that is taken or may not be, ClusterUnavailable.
        """
        problems = [*address_problems(address), *secret_problems(self.settings.secret, [address])]
        members = self.members
        if members.get(name, address) != address or (address in members.values() and name not in members):
            problems.append(
                f"the name {name} or the address {address} belongs to another member; remove that one first"
            )
        if name not in members and len(members) >= limits.CLUSTER_NODES_MAX:
            problems.append(f"a cluster has at most {limits.CLUSTER_NODES_MAX} nodes that vote")
        if problems:
            raise ConfigError(problems)
        if name in members:
            return
        ask = functools.partial(self._running().add, name, address)
        await self._insist(ask, wait_seconds_max, until=lambda: self.members.get(name) == address)

    async def leave(self, name: str, wait_seconds_max: float = 10.0) -> None:
        """Remove another member, running or dead; a running leader hands leadership on first.

        Raises ConfigError when asked to remove this node itself, ClusterUnavailable.
        """
        if name == self.settings.name:
            raise ConfigError([f"node {name} can't remove itself; ask another node to"])
        address = self.members.get(name)
        if address is None:
            return
        replica = self._running()

        def ask(callback: Answer) -> None:
            if self.leader == name:
                self._calls.append(lambda replica: replica.ask_to_step_down(name, address))
                callback(None, DENIED)
            else:
                replica.remove(name, address, callback)

        await self._insist(ask, wait_seconds_max, until=lambda: name not in self.members)

    # --- the Raft thread

    def _work(self) -> None:
        failure: BaseException | None = None
        folder: RaftFolder | None = None
        try:
            settings = self.settings
            folder = RaftFolder(settings.folder, settings.name, settings.address, settings.sync)
            replica = self._build(folder)
            self._on_loop(self._begin)
            while not self._stopping.is_set():
                self._tick(replica)
            self._step_down(replica)
        except BaseException as error:
            failure = error if isinstance(error, HeadraceError) else self._unexpected(error)
        finally:
            self.closed = True
            self._close(folder)
        self._on_loop(self._end, failure)

    def _build(self, folder: RaftFolder) -> Replica:
        settings = self.settings
        members = folder.members(settings.members())
        problems = secret_problems(settings.secret, list(members))
        if problems:
            raise ConfigError(problems)
        if members != settings.members():
            log.warning(
                "the members recorded in the catalog's folder differ from those configured; the recorded ones count",
                recorded=sorted(members.values()),
                configured=sorted(settings.members().values()),
            )
        self._replica = replica = Replica(settings, folder, self._machine, self._clock)
        replica.doTick(0.0)
        replica.recorded = None
        self._check(replica)
        self._publish(replica)
        replica.addOnTickCallback(functools.partial(self._publish, replica))
        return replica

    def _tick(self, replica: Replica) -> None:
        while self._calls:
            self._calls.popleft()(replica)
        try:
            replica.doTick(replica.round_s())
            self._ticks_failed_in_row = 0
        except HeadraceError:
            raise
        except Exception as error:
            self._ticks_failed += 1
            self._ticks_failed_in_row += 1
            if self._ticks_failed_in_row > limits.CLUSTER_TICKS_FAILED_MAX:
                raise
            log.error("a step of the catalog's Raft failed and is tried again", error=repr(error))
            time.sleep(_RETRY_S)
        self._check(replica)

    def _check(self, replica: Replica) -> None:
        if replica.failure is None:
            return
        if isinstance(replica.failure, HeadraceError):
            raise replica.failure
        raise CatalogCorrupt(
            f"the catalog can't apply what was committed ({replica.failure!r}); this is a fault of the program: "
            "update this node, then start it"
        ) from replica.failure

    def _publish(self, replica: Replica) -> None:
        """Tell the loop what changed, then who waits for an answer; in each round before it waits for messages."""
        if replica.failure is not None:
            return
        state = replica.read_state()
        if state != self._state:
            self._state, self._status = state, replica.read_status()
            if replica.has_all_committed():
                replica.folder.trust()
            if not self._told.is_set():
                self._told.set()
                self._on_loop(self._tell)
        while self._answers:
            self._on_loop(self._answers.popleft())

    def _step_down(self, replica: Replica) -> None:
        """A stopping leader hands on, so that nobody waits for an election timeout."""
        deadline_s = self._clock.monotonic() + _STEP_DOWN_S_MAX
        if replica._isLeader() and replica.otherNodes:
            replica.transferLeadership()
            while replica._isLeader() and self._clock.monotonic() < deadline_s:
                replica.doTick(_RETRY_S)

    def _close(self, folder: RaftFolder | None) -> None:
        with contextlib.suppress(Exception):
            if self._replica is not None:
                self._replica.destroy()
        if folder is not None:
            folder.close()

    def _unexpected(self, error: BaseException) -> HeadraceError:
        log.error("the catalog's Raft thread died", error=repr(error), exc_info=error)
        failure = HeadraceError(f"the catalog's Raft thread died ({error!r}); restart this node")
        failure.__cause__ = error
        return failure

    # --- crossing over

    def _on_loop(self, call: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(call, *arguments)

    def _begin(self) -> None:
        if not self._started.done():
            self._started.set_result(None)

    def _end(self, failure: BaseException | None) -> None:
        for future in (self._ended, self._started):
            if future is None or future.done():
                continue
            if failure is None:
                future.set_result(None)
            else:
                future.set_exception(failure)

    def _tell(self) -> None:
        self._told.clear()
        self._turn.set()
        self._turn = asyncio.Event()
        if self._changed is not None:
            self._changed()


def _ignored(result: Any, reason: int) -> None:
    """What came of an offer is seen in the state machine, if anything did."""
