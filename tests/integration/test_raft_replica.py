"""One replica by itself: what it makes of a leader's messages, and of a leader's port that nobody may listen on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from order_lines import free_address
from pysyncobj.tcp_connection import TcpConnection

from node.kernel.clock import SystemClock
from replication.raft_journal import Dump, RaftFolder, write_dump
from replication.raft_replica import Replica, is_gone
from replication.raft_types import RaftSettings

HOST = "127.0.0.1"
TERM = 5
NO_OP = b"\x01"


class Values:
    """What is replicated; only that it can be restored matters here."""

    def __init__(self) -> None:
        self.gone: set[str] = set()

    def apply(self, command: bytes) -> str:
        return ""

    def dump(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None:
        return

    def ended(self, member: str) -> None:
        self.gone.add(member)

    def connected(self, member: str) -> None:
        self.gone.discard(member)


class Follower:
    """A replica with an empty folder; what its transport gets is handed to it."""

    def __init__(self, folder: Path) -> None:
        peers = {name: free_address() for name in "abc"}
        self.settings = RaftSettings("a", peers["a"], peers, folder)
        self.folder = RaftFolder(folder, "a", peers["a"], sync=False)
        self.values = Values()
        self.replica = Replica(self.settings, self.folder, self.values, SystemClock())
        self.replica.doTick(0.0)
        self.replica.recorded = None
        self.transport: Any = self.replica._SyncObj__transport
        self.leader = next(node for node in self.replica.otherNodes if node.name == "b")

    def receive(self, **message: Any) -> None:
        self.transport._onMessageReceived(self.leader, {"term": TERM, **message})
        self.replica.doTick(0.0)

    def close(self) -> None:
        self.replica.destroy()
        self.replica.doTick(0.0)
        self.folder.close()


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[Follower]:
    made = Follower(tmp_path / "raft")
    yield made
    made.close()


@pytest.mark.parametrize(("silent", "gone"), [(False, {"b"}), (True, set())])
def test_a_connection_that_was_given_up_for_its_silence_says_nothing_of_the_process(
    follower: Follower, silent: bool, gone: set[str]
) -> None:
    transport, node = follower.transport, follower.leader
    connection: Any = TcpConnection(None, timeout=follower.settings.connection_lost_ms / 1000)
    transport._connections[node] = connection
    transport._onNodeConnected(node)
    if silent:
        connection._TcpConnection__lastReadTime -= follower.settings.connection_lost_ms
    transport._onNodeDisconnected(node)
    assert follower.values.gone == gone
    transport._onNodeDisconnected(node)
    transport._onNodeConnected(node)
    assert follower.values.gone == set()


def test_a_dump_of_the_leaders_own_term_is_not_all_that_was_committed(follower: Follower, tmp_path: Path) -> None:
    path = tmp_path / "sent"
    members = [(address, name) for address, name in follower.settings.members().items()]
    write_dump(path, Dump(b"", (NO_OP, 99, TERM), (NO_OP, 100, TERM), members))
    for piece in ((path.read_bytes(), True, False), (b"", False, True)):
        follower.receive(type="append_entries", commit_index=102, serialized=piece)
    assert follower.replica.raftLastApplied == 100
    assert follower.replica.caught_up()
    assert not follower.replica.has_all_committed()

    rest = [(NO_OP, 101, TERM), (NO_OP, 102, TERM)]
    follower.receive(type="append_entries", commit_index=102, prevLogIdx=100, prevLogTerm=TERM, entries=rest)
    assert follower.replica.raftLastApplied == 102
    assert follower.replica.has_all_committed()


def test_a_node_whose_log_was_lost_is_not_counted_among_those_that_have_what_it_had(follower: Follower) -> None:
    replica, node = follower.replica, follower.leader
    replica._SyncObj__onBecomeLeader()
    answer = {"type": "next_node_idx", "term": replica.raftCurrentTerm}
    follower.receive(**answer, next_node_idx=3, reset=False, success=True)
    assert replica.match_index(node) == 2
    follower.receive(**answer, next_node_idx=2, reset=True, success=False)
    assert replica.match_index(node) == 1


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((HOST, 0)) as made:
        yield made


def port_of(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def test_one_that_listens_is_there_though_it_says_nothing(listener: socket.socket) -> None:
    assert not is_gone(HOST, port_of(listener))


def test_one_that_does_not_answer_may_be_there() -> None:
    """A queue for connections that is full, as behind a network that is cut, leaves the question open."""
    with socket.create_server((HOST, 0), backlog=0) as full:
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex((HOST, port_of(full)))
            assert not is_gone(HOST, port_of(full))
        finally:
            for filler in fillers:
                filler.close()


def test_one_whose_port_is_closed_is_gone(listener: socket.socket) -> None:
    port = port_of(listener)
    listener.close()
    assert is_gone(HOST, port)


def test_one_that_ends_a_new_connection_is_ending(listener: socket.socket) -> None:
    def accept_and_end() -> None:
        listener.accept()[0].close()

    ending = threading.Thread(target=accept_and_end)
    ending.start()
    assert is_gone(HOST, port_of(listener))
    ending.join()


def test_a_name_without_an_address_may_be_there() -> None:
    assert not is_gone(None, 1)
