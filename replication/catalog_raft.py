"""A state machine replicated by Raft: the catalog's shell, and the only module that knows pysyncobj.

pysyncobj runs on a thread of its own, so that a busy event loop does not cost the node its place in the cluster. The
state machine is called on that thread only. What other threads read of it must be one immutable value that `apply` and
`restore` put in place by one assignment; it is in place before `propose` or `read_barrier` return and before `changed`
is called.

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
from pathlib import Path
from typing import Any

import pysyncobj.syncobj
import structlog
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, replicated
from pysyncobj.node import TCPNode
from pysyncobj.transport import TCPTransport

from node.kernel import limits
from node.kernel.clock import Clock, SystemClock
from node.kernel.errors import BoundExceeded, CatalogCorrupt, ClusterUnavailable, ConfigError, HeadraceError
from replication.raft_journal import Dump, Journal, RaftFolder, write_dump
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

_TICK_S = 0.05
_RETRY_S = 0.02
_ATTEMPT_S = 1.0
_STEP_DOWN_S_MAX = 0.5
_DUMP_RETRY_S = 10.0
_LISTEN_QUEUE = 128
_BATCH_SPARE_BYTES = 64 * limits.KIB
"""pysyncobj sends an entry over its batch size in pieces, and cuts some of them wrongly: none may be that large. Its
pickle protocol writes a byte over 127 as two."""
_EMPTY_LOG = (1, 0)
"""Index and term of the last entry of a log in which nothing happened yet."""
_REFUSED = {"last_log_index": 0, "last_log_term": -1}
"""A log that no voter finds good enough; the candidate's term still reaches it."""


_pysyncobj_journal = pysyncobj.syncobj.createJournal


def _journal(given: Journal | str | None) -> Any:
    return given if isinstance(given, Journal) else _pysyncobj_journal(given)


pysyncobj.syncobj.createJournal = _journal


class _Replica(SyncObj):  # type: ignore[misc]
    """pysyncobj's node; the two names with its prefix replace private methods of it."""

    def __init__(self, settings: RaftSettings, folder: RaftFolder, machine: StateMachine, clock: Clock) -> None:
        self.failure: BaseException | None = None
        self.settings = settings
        self.folder = folder
        self.clock = clock
        self.machine = machine
        self.compactions = 0
        self.compactions_failed = 0
        self.dump_failed_s = float("-inf")
        self.recorded: dict[str, str] | None = folder.members(settings.members())
        others = [TCPNode(address, name=name) for address, name in self.recorded.items() if address != settings.address]
        super().__init__(
            TCPNode(settings.address, name=settings.name), others, self._configuration(), transportClass=_Transport
        )

    def _configuration(self) -> Any:
        settings = self.settings
        return SyncObjConf(
            password=settings.secret,
            bindAddress=settings.listen,
            maxBindRetries=1,
            autoTick=False,
            appendEntriesUseBatch=False,
            appendEntriesPeriod=settings.heartbeat_ms / 1000,
            appendEntriesBatchSizeBytes=2 * settings.command_bytes_max + _BATCH_SPARE_BYTES,
            raftMinTimeout=settings.election_ms_min / 1000,
            raftMaxTimeout=settings.election_ms_max / 1000,
            leaderFallbackTimeout=settings.quorum_lost_ms / 1000,
            connectionTimeout=settings.connection_lost_ms / 1000,
            connectionRetryTime=settings.reconnect_ms / 1000,
            commandsQueueSize=limits.CLUSTER_PROPOSALS_MAX * limits.CLUSTER_NODES_MAX,
            commandsWaitLeader=False,
            dynamicMembershipChange=True,
            journalFile=self.folder.journal,
            fullDumpFile=str(self.folder.dump_path),
            logCompactionMinEntries=settings.compaction_entries,
            logCompactionMinTime=settings.compaction_ms / 1000,
            useFork=False,
            serializer=self._dump,
            deserializer=self._load,
        )

    @replicated  # type: ignore[untyped-decorator]
    def run(self, command: bytes | None) -> str:
        """Apply one command, None for a read barrier, and give its answer. pysyncobj would repeat a raise for ever."""
        if command is not None and self.failure is None:
            try:
                return self.machine.apply(command)
            except Exception as error:
                self.failure = error
        return ""

    def _dump(self, path: str, log_state: tuple[Any, Any, Any]) -> None:
        last, before, members = log_state
        if self.clock.monotonic() - self.dump_failed_s < _DUMP_RETRY_S:
            raise TimeoutError("a dump failed a moment ago")
        try:
            named = [(node.id, name_of(node)) for node in members]
            write_dump(Path(path), Dump(self.machine.dump(), tuple(before), tuple(last), named))
        except Exception as error:
            self.compactions_failed += 1
            self.dump_failed_s = self.clock.monotonic()
            log.error("the catalog's log was not compacted", error=str(error))
            raise
        self.compactions += 1

    def _load(self, path: str) -> tuple[Any, Any, Any]:
        """Read the dump of this node, at the start, or one the leader sent.

        Of its own the journal goes on after it, and the members are those of the journal's end, committed or not: with
        the dump's older ones, two halves of a cluster that grew could each take itself for a majority.
        pysyncobj goes on with an empty state when this raises; the thread sees `failure` and does not.
        """
        try:
            dump = self.folder.read_dump()
            self.machine.restore(dump.state)
        except Exception as error:
            self.failure = error
            raise
        members = self.recorded or dict(dump.members)
        return dump.last, dump.before, {TCPNode(address, name=name) for address, name in members.items()}

    def _SyncObj__changeCluster(self, request: Any) -> bool:  # noqa: N802
        """One change of members at a time: pysyncobj means to check that, and never notes which is under way."""
        index = self.log()[-1][1] + 1
        done: bool = super()._SyncObj__changeCluster(request)
        if done:
            self._SyncObj__changeClusterIDx = index
        return done

    def log(self) -> Any:
        return self._SyncObj__raftLog

    def log_is_empty(self) -> bool:
        index, term = self.log()[-1][1:]
        return (index, term) == _EMPTY_LOG

    def caught_up(self) -> bool:
        """Whether an entry of the current leader's term is applied, and so all that was committed before it."""
        if self._getLeader() is None:
            return False
        entries = self.log()
        position = self.raftLastApplied - entries[0][1]
        return 0 <= position < len(entries) and bool(entries[position][2] == self.raftCurrentTerm)

    def read_status(self) -> RaftStatus:
        leader = self._getLeader()
        members = {name_of(node): node.id for node in self.otherNodes | {self.selfNode}}
        return RaftStatus(
            leader=None if leader is None else name_of(leader),
            is_leader=self._isLeader(),
            ready=self.caught_up(),
            members=members,
            term=self.raftCurrentTerm,
            index=self.raftLastApplied,
            commit_index=self.raftCommitIndex,
        )


def name_of(node: Any) -> str:
    return str(getattr(node, "name", node.id))


class _Transport(TCPTransport):  # type: ignore[misc]
    """pysyncobj's transport with answers bound to their term, and rules for strangers and voters.

    Terms: an answer counts only in the term it was given in, which pysyncobj does not check. Voters: see
    `RaftFolder.trusted`.
    """

    def __init__(self, replica: _Replica, own: Any, others: Any) -> None:
        self._replica = replica
        self._strangers: dict[Any, float] = {}
        self.strangers_refused = 0
        super().__init__(replica, own, others)

    def send(self, node: Any, message: dict[str, Any]) -> bool:
        replica = self._replica
        if replica.failure is not None:
            return False
        replica.folder.journal.sync()
        kind = message["type"]
        if kind == "next_node_idx":
            message["term"] = replica.raftCurrentTerm
        elif kind == "request_vote" and not replica.folder.trusted and not replica.log_is_empty():
            message |= _REFUSED
        return bool(super().send(node, message))

    def _onMessageReceived(self, node: Any, message: Any) -> None:  # noqa: N802
        replica = self._replica
        kind = message["type"]
        if kind == "next_node_idx":
            if message["term"] != replica.raftCurrentTerm or not replica._isLeader():
                return
        elif kind == "request_vote" and not replica.folder.trusted:
            self._judge(message)
        elif kind == "response_vote" and replica.log_is_empty():
            replica.folder.trust()
        elif kind == "step_down":
            replica.transferLeadership()
            return
        super()._onMessageReceived(node, message)

    def _judge(self, message: dict[str, Any]) -> None:
        """What a node does with a request for its vote while its own log is not trusted: it founds, or refuses."""
        if self._replica.log_is_empty() and (message["last_log_index"], message["last_log_term"]) == _EMPTY_LOG:
            self._replica.folder.trust()
        else:
            message |= _REFUSED

    def _maybeBind(self) -> None:  # noqa: N802
        """Listen with a queue for all that may come at once: pysyncobj's holds five, and a sixth waits a second."""
        bound = self._ready
        super()._maybeBind()
        if self._ready and not bound:
            self._server._TcpServer__socket.listen(_LISTEN_QUEUE)

    # --- connections that have not shown the secret

    def _onNewIncomingConnection(self, connection: Any) -> None:  # noqa: N802
        super()._onNewIncomingConnection(connection)
        read = connection._TcpConnection__processRead

        def read_bounded() -> bool:
            if connection in self._unknownConnections and _unread(connection) > limits.CLUSTER_STRANGER_BYTES_MAX:
                return False
            return bool(read())

        connection._TcpConnection__processRead = read_bounded
        self._strangers[connection] = self._replica.clock.monotonic()

    def _onTick(self) -> None:  # noqa: N802
        super()._onTick()
        self._strangers = {c: since for c, since in self._strangers.items() if c in self._unknownConnections}
        oldest_s = self._replica.clock.monotonic() - limits.CLUSTER_STRANGER_MS_MAX / 1000
        spare = len(self._strangers) - limits.CLUSTER_STRANGERS_MAX
        for position, (connection, since) in enumerate(list(self._strangers.items())):
            if position < spare or since < oldest_s or _unread(connection) > limits.CLUSTER_STRANGER_BYTES_MAX:
                self.strangers_refused += 1
                connection.disconnect()
                self._unknownConnections.discard(connection)


def _unread(connection: Any) -> int:
    return len(connection._TcpConnection__readBuffer)


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
        self._replica: _Replica | None = None
        self._status = RaftStatus()
        self._stopping = threading.Event()
        self._calls: deque[Callable[[_Replica], None]] = deque()
        self._told = threading.Event()
        self._turn = asyncio.Event()
        self._waiting = 0
        self._rate = CommandRate(settings.commands_per_second_max, self._clock.monotonic())
        self._proposals = self._retried = self._failed = self._ticks_failed = self._ticks_failed_in_row = 0
        self._ended: asyncio.Future[None] | None = None

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
            strangers_refused=0 if replica is None else replica._SyncObj__transport.strangers_refused,
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

    def offer(self, command: bytes) -> None:
        """Replicate a command if there is a leader, and wait for nothing: it may be lost, or applied late.

        Raises ClusterUnavailable before the start and after the end, BoundExceeded.
        """
        replica = self._running()
        self._rate.take(self._clock.monotonic())
        with contextlib.suppress(BlockingIOError):
            replica.run(command)

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

    def _running(self) -> _Replica:
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
            if reason == FAIL_REASON.SUCCESS or (until is not None and until()):
                return result
            unknown |= reason not in (FAIL_REASON.MISSING_LEADER, FAIL_REASON.QUEUE_FULL, FAIL_REASON.REQUEST_DENIED)
            self._retried += 1
            self._running()
            await self._change(_RETRY_S)
        self._failed += 1
        fate = "it may or may not be applied later" if unknown else "it was not applied"
        raise self._unavailable(f"no quorum took the command in {wait_seconds_max} s, and {fate}")

    async def _attempt(self, ask: Callable[..., None], wait_s: float) -> tuple[Any, int | None]:
        """One try: its result and pysyncobj's reason, None when nothing came back in time."""
        answer: asyncio.Future[tuple[Any, int]] = self._loop.create_future()

        def settle(result: Any, reason: int) -> None:
            if not answer.done():
                answer.set_result((result, reason))

        with contextlib.suppress(BlockingIOError):  # the pipe that wakes the thread is full: the thread is awake
            ask(callback=lambda result, reason: self._on_loop(settle, result, reason))
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
        node = TCPNode(address, name=name)
        ask = functools.partial(self._running().addNodeToCluster, node)
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
        node = TCPNode(address, name=name)
        replica = self._running()

        def ask(callback: Any) -> None:
            if self.leader == name:
                self._calls.append(lambda replica: replica._SyncObj__transport.send(node, {"type": "step_down"}))
                callback(None, FAIL_REASON.REQUEST_DENIED)
            else:
                replica.removeNodeFromCluster(node, callback)

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
            self._close(folder)
        self._on_loop(self._end, failure)

    def _build(self, folder: RaftFolder) -> _Replica:
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
        try:
            self._replica = replica = _Replica(settings, folder, self._machine, self._clock)
        except pysyncobj.SyncObjException as error:
            raise ConfigError(
                [f"the cluster address {settings.listen} can't be listened on ({error}); free it or choose another"]
            ) from error
        replica.doTick(0.0)
        replica.recorded = None
        self._check(replica)
        self._publish(replica)
        return replica

    def _tick(self, replica: _Replica) -> None:
        while self._calls:
            self._calls.popleft()(replica)
        try:
            replica.doTick(_TICK_S)
            self._ticks_failed_in_row = 0
        except HeadraceError:
            raise
        except Exception as error:
            self._ticks_failed += 1
            self._ticks_failed_in_row += 1
            if self._ticks_failed_in_row > limits.CLUSTER_TICKS_FAILED_MAX:
                raise
            log.error("a step of the catalog's Raft failed and is tried again", error=repr(error))
            time.sleep(_TICK_S)
        self._check(replica)
        self._publish(replica)

    def _check(self, replica: _Replica) -> None:
        if replica.failure is None:
            return
        if isinstance(replica.failure, HeadraceError):
            raise replica.failure
        raise CatalogCorrupt(
            f"the catalog can't apply what was committed ({replica.failure!r}); this is a fault of the program: "
            "update this node, then start it"
        ) from replica.failure

    def _publish(self, replica: _Replica) -> None:
        status = replica.read_status()
        if status.ready:
            replica.folder.trust()
        if status != self._status:
            self._status = status
            if not self._told.is_set():
                self._told.set()
                self._on_loop(self._tell)

    def _step_down(self, replica: _Replica) -> None:
        """A stopping leader hands on, so that nobody waits for an election timeout."""
        deadline_s = self._clock.monotonic() + _STEP_DOWN_S_MAX
        if replica._isLeader() and replica.otherNodes:
            replica.transferLeadership()
            while replica._isLeader() and self._clock.monotonic() < deadline_s:
                replica.doTick(_TICK_S)

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
