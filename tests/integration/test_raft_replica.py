"""Whether the process of a leader is gone: what a new connection to its port says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from replication.raft_replica import is_gone

HOST = "127.0.0.1"


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
