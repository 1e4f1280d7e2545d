"""One node of Raft, as the Raft thread has it: pysyncobj with what it lacks. The only module that knows pysyncobj.

It stands in for parts of pysyncobj that lose entries, send too often, or trust whoever connects; names in its spelling
and those with its prefix replace methods of it. All is used by the Raft thread, but where it says otherwise.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pysyncobj.syncobj
import structlog
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, replicated
from pysyncobj.node import TCPNode
from pysyncobj.transport import TCPTransport

from node.kernel import limits
from node.kernel.clock import Clock
from node.kernel.errors import ConfigError
from replication.raft_journal import Dump, Journal, RaftFolder, write_dump
from replication.raft_types import RaftSettings, RaftStatus, StateMachine

log = structlog.get_logger(__name__)

SUCCESS: int = FAIL_REASON.SUCCESS
DENIED: int = FAIL_REASON.REQUEST_DENIED
NOT_APPLIED = frozenset({FAIL_REASON.MISSING_LEADER, FAIL_REASON.QUEUE_FULL, FAIL_REASON.REQUEST_DENIED})
"""Reasons that say that nothing came of what was asked; of any other the outcome is unknown."""

Answer = Callable[[Any, int], None]
"""Called on the Raft thread with the result and SUCCESS or another reason; perhaps never."""

_ROUND_S_MIN = 0.002
_ROUND_S_MAX = 0.25
_IDLE_S = 0.02
_DUMP_RETRY_S = 10.0
_LISTEN_QUEUE = 128
_BATCH_SPARE_BYTES = 64 * limits.KIB
"""pysyncobj sends an entry over its batch size in pieces, and cuts some of them wrongly: none may be that large. Its
pickle protocol writes a byte over 127 as two."""
_EMPTY_LOG = (1, 0)
"""Index and term of the last entry of a log in which nothing happened yet."""
_ALIVE = {"type": "alive"}
"""Says nothing else."""
_REFUSED = {"last_log_index": 0, "last_log_term": -1}
"""A log that no voter finds good enough; the candidate's term still reaches it."""


_pysyncobj_journal = pysyncobj.syncobj.createJournal


def _journal(given: Journal | str | None) -> Any:
    return given if isinstance(given, Journal) else _pysyncobj_journal(given)


pysyncobj.syncobj.createJournal = _journal


class Replica(SyncObj):  # type: ignore[misc]
    """Raises ConfigError when its address can't be listened on."""

    _SyncObj__raftElectionDeadline: float

    def __init__(self, settings: RaftSettings, folder: RaftFolder, machine: StateMachine, clock: Clock) -> None:
        self.failure: BaseException | None = None
        self.settings = settings
        self.folder = folder
        self.clock = clock
        self.machine = machine
        self.awaited = False
        self.awaited_index = 0
        self.presence_changes = 0
        """Rises when a member's process is seen to end or to be there."""
        self.compactions = 0
        self.compactions_failed = 0
        self.dump_failed_s = float("-inf")
        self.recorded: dict[str, str] | None = folder.members(settings.members())
        others = [TCPNode(address, name=name) for address, name in self.recorded.items() if address != settings.address]
        own = TCPNode(settings.address, name=settings.name)
        try:
            super().__init__(own, others, self._configuration(), transportClass=_Transport)
        except pysyncobj.SyncObjException as error:
            raise ConfigError(
                [f"the cluster address {settings.listen} can't be listened on ({error}); free it or choose another"]
            ) from error
        self._SyncObj__conf.appendEntriesUseBatch = True  # only now: the constructor makes the pipe for `wake` without

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

    # --- when to send: at once what somebody waits for, one message for all that came since the last round; what nobody
    # waits for (`CatalogRaft.offer`) goes with the next heartbeat, and that it is committed with the one after

    def _applyCommand(self, command: bytes, callback: Any, commandType: int | None = None) -> None:  # noqa: N802, N803
        if callback is not None:
            self.awaited = True
        super()._applyCommand(command, callback, commandType)

    def _checkCommandsToApply(self) -> None:  # noqa: N802
        awaited, self.awaited = self.awaited, False
        super()._checkCommandsToApply()
        if awaited and self._isLeader():
            self.awaited_index = self.log()[-1][1]
            self._SyncObj__sendAppendEntries()

    def _SyncObj__applyLogEntries(self) -> bool:  # noqa: N802
        before = self.raftLastApplied
        super()._SyncObj__applyLogEntries()
        return bool(before < self.raftLastApplied and before < self.awaited_index)

    def _SyncObj__onBecomeLeader(self) -> None:  # noqa: N802
        super()._SyncObj__onBecomeLeader()
        self.awaited_index = self.log()[-1][1]

    def next_index(self, node: Any) -> int | None:
        """At the leader: the first entry of the log that this node is sent next."""
        index: int | None = self._SyncObj__raftNextIndex.get(node)
        return index

    def match_index(self, node: Any) -> int:
        """At the leader: the last entry that this node is counted for."""
        return int(self._SyncObj__raftMatchIndex.get(node, 0))

    def lower_match(self, node: Any, index: int) -> None:
        """This node's log goes no further, though it may have before its disk was lost: pysyncobj would go on to count
        it among those that have what it had."""
        self._SyncObj__raftMatchIndex[node] = min(self.match_index(node), index)

    def send_soon(self) -> None:
        """With the next round, if this node leads: somebody needs entries, and would wait for up to a heartbeat."""
        self._SyncObj__newAppendEntriesTime = 0.0

    def wake(self) -> None:
        """Begin the next round now; called on the loop."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full: the thread is awake
            self._SyncObj__pipeNotifier.notify()

    def round_s(self) -> float:
        """How long a round may wait for messages: until the next heartbeat is due, or the election."""
        due_s = self._SyncObj__newAppendEntriesTime if self._isLeader() else self._SyncObj__raftElectionDeadline
        left_s = due_s - pysyncobj.syncobj.monotonicTime()
        return max(_ROUND_S_MIN, min(left_s, _ROUND_S_MAX)) if left_s > 0 else _IDLE_S

    def connected(self, node: Any) -> None:
        self.machine.connected(name_of(node))
        self.presence_changes += 1

    def disconnected(self, node: Any) -> None:
        """Look whether the process of that node has ended, which the kernel of its host knows at once."""
        if not is_gone(node.ip, node.port):
            return
        self.machine.ended(name_of(node))
        self.presence_changes += 1
        if node == self._getLeader() and not self._isLeader():
            self._succeed(node)

    def _succeed(self, leader: Any) -> None:
        """Stand for election before heartbeats are missed: without a leader no lease can be renewed, and all would lose
        theirs with this one. Followers do so in the order of their addresses, which splits no vote. A leader that is
        only cut off from here is given the usual time.
        """
        followers = sorted(other.id for other in {*self.otherNodes, self.selfNode} - {leader})
        turn_s = followers.index(self.selfNode.id) * self.settings.succession_ms / 1000
        deadline_s = pysyncobj.syncobj.monotonicTime() + turn_s
        self._SyncObj__raftElectionDeadline = min(self._SyncObj__raftElectionDeadline, deadline_s)

    # --- members

    def add(self, name: str, address: str, callback: Answer) -> None:
        """From any thread."""
        self.addNodeToCluster(TCPNode(address, name=name), callback)

    def remove(self, name: str, address: str, callback: Answer) -> None:
        """From any thread."""
        self.removeNodeFromCluster(TCPNode(address, name=name), callback)

    def ask_to_step_down(self, name: str, address: str) -> None:
        self._SyncObj__transport.send(TCPNode(address, name=name), {"type": "step_down"})

    def _SyncObj__changeCluster(self, request: Any) -> bool:  # noqa: N802
        """One change of members at a time: pysyncobj means to check that, and never notes which is under way."""
        index = self.log()[-1][1] + 1
        done: bool = super()._SyncObj__changeCluster(request)
        if done:
            self._SyncObj__changeClusterIDx = index
        return done

    # --- what is known

    @property
    def strangers_refused(self) -> int:
        refused: int = self._SyncObj__transport.strangers_refused
        return refused

    def log(self) -> Any:
        return self._SyncObj__raftLog

    def log_is_empty(self) -> bool:
        index, term = self.log()[-1][1:]
        return (index, term) == _EMPTY_LOG

    def leader(self) -> Any:
        """None also when it has not been heard of: pysyncobj keeps its leader for ever once nobody is connected."""
        late = self._SyncObj__raftElectionDeadline < pysyncobj.syncobj.monotonicTime()
        return None if late and not self._isLeader() else self._getLeader()

    def caught_up(self) -> bool:
        """Whether an entry of the current leader's term is applied, and so all that was committed before it."""
        if self.leader() is None:
            return False
        entries = self.log()
        position = self.raftLastApplied - entries[0][1]
        return 0 <= position < len(entries) and bool(entries[position][2] == self.raftCurrentTerm)

    def has_all_committed(self) -> bool:
        """Whether it has applied all that the leader had committed when it last wrote: a dump of the leader's own term
        alone makes `caught_up` true, however much came after it."""
        committed: int | None = self._SyncObj__leaderCommitIndex
        return self.caught_up() and committed is not None and self.raftLastApplied >= committed

    def read_state(self) -> object:
        """Changes whenever `read_status` does, and costs less: members change with entries of the log only."""
        applied, end = self.raftLastApplied, self.log()[-1][1]
        role = self.leader(), self._isLeader(), self.raftCurrentTerm
        return *role, self.raftCommitIndex, applied, end, self.presence_changes

    def read_status(self) -> RaftStatus:
        leader = self.leader()
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


def is_gone(host: str | None, port: int) -> bool:
    """Whether nobody listens there any more: the host says so, or ends a new connection at once, as it does while the
    process ends. Not when it does not answer in time, or has no address."""
    if host is None:
        return False
    try:
        with socket.create_connection((host, port), limits.CLUSTER_PROBE_MS_MAX / 1000) as probe:
            return not probe.recv(1)
    except (ConnectionRefusedError, ConnectionResetError):
        return True
    except OSError:
        return False


class _Transport(TCPTransport):  # type: ignore[misc]
    """pysyncobj's transport with answers bound to their term, and rules for strangers and voters.

    Terms: an answer counts only in the term it was given in, which pysyncobj does not check. Voters: see
    `RaftFolder.trusted`.
    """

    def __init__(self, replica: Replica, own: Any, others: Any) -> None:
        self._replica = replica
        self._strangers: dict[Any, float] = {}
        self._founders: dict[Any, dict[str, Any]] = {}
        self.strangers_refused = 0
        self._alive_s = 0.0
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
        elif kind == "response_vote" and replica.log_is_empty() and not self._founds(node, message):
            return
        elif kind == "step_down":
            replica.transferLeadership()
            return
        elif kind == _ALIVE["type"]:
            return
        before = replica.next_index(node)
        super()._onMessageReceived(node, message)
        if kind == "next_node_idx" and message["reset"]:
            replica.lower_match(node, message["next_node_idx"] - 1)
            if replica.next_index(node) != before:
                replica.send_soon()

    def _onNodeConnected(self, node: Any) -> None:  # noqa: N802
        """One that starts hears at once who leads, and by its answer gets the log: it would wait for two heartbeats."""
        super()._onNodeConnected(node)
        self._replica.send_soon()
        self._replica.connected(node)

    def _onNodeDisconnected(self, node: Any) -> None:  # noqa: N802
        """pysyncobj also tells of each attempt to connect again that fails, and gives a connection up that was silent
        for too long, of which nothing follows."""
        in_use = self._replica.isNodeConnected(node) and not _is_silent(self._connections.get(node))
        super()._onNodeDisconnected(node)
        if in_use:
            self._replica.disconnected(node)

    def _judge(self, message: dict[str, Any]) -> None:
        """A node whose own log is not trusted refuses its vote to any log but an empty one, and that if it has none."""
        if not self._replica.log_is_empty() or (message["last_log_index"], message["last_log_term"]) != _EMPTY_LOG:
            message |= _REFUSED

    def _founds(self, voter: Any, vote: dict[str, Any]) -> bool:
        """Whether all members have voted for this node with its empty log, as they do only when theirs are empty too.

        A majority would not do: it could be of disks that were lost, and what the others still have would be
        overwritten. The votes before the last are kept back from pysyncobj, which counts a majority.
        """
        before = {node: kept for node, kept in self._founders.items() if kept["term"] == vote["term"]}
        self._founders = {**before, voter: vote}
        if not self._replica.otherNodes <= self._founders.keys():
            return False
        self._replica.folder.trust()
        for node, kept in before.items():
            if node != voter:
                super()._onMessageReceived(node, kept)
        return True

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
        self._say_alive()
        self._close_strangers()

    def _say_alive(self) -> None:
        """Followers have nothing to say to each other until one needs a vote, and pysyncobj closes a connection that it
        takes up after so long a silence: the vote would be asked of nobody."""
        replica = self._replica
        now_s = replica.clock.monotonic()
        if replica._isLeader() or now_s < self._alive_s + replica.settings.connection_lost_ms / 3000:
            return
        self._alive_s = now_s
        for node in replica.otherNodes - {replica._getLeader()}:
            self.send(node, _ALIVE)

    def _close_strangers(self) -> None:
        self._strangers = {c: since for c, since in self._strangers.items() if c in self._unknownConnections}
        oldest_s = self._replica.clock.monotonic() - limits.CLUSTER_STRANGER_MS_MAX / 1000
        spare = len(self._strangers) - limits.CLUSTER_STRANGERS_MAX
        for position, (connection, since) in enumerate(list(self._strangers.items())):
            if position < spare or since < oldest_s or _unread(connection) > limits.CLUSTER_STRANGER_BYTES_MAX:
                self.strangers_refused += 1
                connection.disconnect()
                self._unknownConnections.discard(connection)


def _is_silent(connection: Any) -> bool:
    if connection is None:
        return True
    silent_s = pysyncobj.syncobj.monotonicTime() - connection._TcpConnection__lastReadTime
    return bool(silent_s > connection._TcpConnection__timeout)


def _unread(connection: Any) -> int:
    return len(connection._TcpConnection__readBuffer)
